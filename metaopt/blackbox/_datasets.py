"""Features of tasks that are given as labeled data: a table, or a pair of rows and labels.

They describe the earlier tasks whose data `train_meta_optimizer(datasets=)` gets, and the new task of
`MetaOptimizer.predict(x, y)`. They need no scaling, because they are ranked among those of earlier tasks
(`rank_features`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metaopt import tasks

# Names of `tasks.metafeatures`: size, balance of the classes, types of columns, correlation and information. A saved
# optimizer has ranks of exactly these features in this order.
TABLE_FEATURES = (
    "nr_inst",
    "nr_attr",
    "nr_class",
    "inst_to_attr",
    "class_ent",
    "freq_class.sd",
    "cat_to_num",
    "nr_cat",
    "cor.mean",
    "nr_cor_attr",
    "kurtosis.mean",
    "can_cor.mean",
    "mut_inf.mean",
)
_GROUPS = ("simple", "statistical", "information_theoretic")
_NUM_CLASSES = 4  # the number of classes into which a numeric target is cut
_MOST_CLASSES = 20  # the largest number of different floats that count as classes


def is_dataset(task: Any) -> bool:
    """Whether a task is a `tasks.Table` or a pair (x, y) of arrays, and not a vector of features or a `base.Task`."""
    if isinstance(task, tasks.Table):
        return True
    return isinstance(task, (tuple, list)) and len(task) == 2 and len(np.shape(task[0])) > 1


def check_datasets(names: Sequence[str], datasets: Mapping[str, Any]) -> None:
    """Raises ValueError if a task of the records has no entry, or if entries have different forms."""
    missing = [name for name in names if name not in datasets]
    if missing:
        raise ValueError(f"`datasets` lacks {len(missing)} of the records' tasks, such as {missing[0]!r}.")
    for name, dataset in datasets.items():
        if not is_dataset(dataset) and not isinstance(dataset, Mapping):
            raise ValueError(
                f"`datasets` must have a `tasks.Table`, a pair (x, y) with x of two or more axes, or a dict of rows; "
                f"{name!r} has a {type(dataset).__name__}."
            )
    kinds = sorted({kind_of(dataset) if is_dataset(dataset) else "dict of rows" for dataset in datasets.values()})
    if len(kinds) > 1:
        raise ValueError(f"`datasets` must all be tables, all be images, or all be dicts of rows; got {kinds}.")


def kind_of(dataset: Any) -> str:
    """ "images" if x has more than two axes, else "table"."""
    return "table" if isinstance(dataset, tasks.Table) or len(np.shape(dataset[0])) == 2 else "images"


def dataset_features(dataset: Any) -> np.ndarray:
    """[F] the features of a dataset: numbers of `tasks.metafeatures`, or of `tasks.image_features` for images.

    Args:
      dataset: a `tasks.Table`, or a pair (x, y). x is [n, columns], [n, height, width] or [n, height, width, channels];
        y has n labels of any type. Floating-point numbers with fractions, or with more than 20 different values, are
        cut into four classes.

    Raises:
      ValueError: if x is not numeric, or if x and y do not fit together.
    """
    if isinstance(dataset, tasks.Table):
        x, y, categorical = dataset.x, dataset.y, dataset.categorical
    else:
        x, y = np.asarray(dataset[0], float), np.asarray(dataset[1])
        categorical = np.zeros(x.shape[1], bool)
    labels = _labels(y)
    if x.ndim == 2:
        values = tasks.metafeatures((x, labels, categorical), groups=_GROUPS)
        return np.array([values[name] for name in TABLE_FEATURES])
    images = x[..., None] if x.ndim == 3 else x
    scale = images.std()
    return np.array([*tasks.image_features((images - images.mean()) / (scale if scale else 1.0), labels).values()])


def features_of_datasets(datasets: Mapping[str, Any], features: Any = None) -> tuple[str, dict[str, np.ndarray]]:
    """The kind of datasets, and task -> its features.

    Raises:
      ValueError: if `features` are given too, or under the conditions of `dataset_features`.
    """
    if features is not None:
        raise ValueError("Give either `features`, or tables or images as `datasets`; both describe the tasks.")
    return kind_of(next(iter(datasets.values()))), {
        name: dataset_features(dataset) for name, dataset in datasets.items()
    }


def _labels(y: np.ndarray) -> np.ndarray:
    """[n] integers from 0: the classes of y, or the quarters of a numeric target."""
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError(f"y must be finite; {(~np.isfinite(y)).sum()} of {len(y)} entries are not.")
    values, codes = np.unique(y, return_inverse=True)
    if y.dtype.kind == "f" and (len(values) > _MOST_CLASSES or (values % 1 != 0).any()):
        return np.searchsorted(np.quantile(y, np.arange(1, _NUM_CLASSES) / _NUM_CLASSES), y)
    return codes
