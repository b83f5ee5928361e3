"""metaopt: gradient-based meta-optimization in JAX."""

from typing import TYPE_CHECKING, Any

from metaopt import (
    automl,
    base,
    blackbox,
    evaluation,
    few_shot,
    hypergrad,
    inner,
    nas,
    predictors,
    spaces,
    tasks,
    training,
    transforms,
)
from metaopt._saving import load, save
from metaopt.blackbox import train_meta_optimizer, train_meta_searcher

if TYPE_CHECKING:
    from metaopt import plots

__version__ = "0.1.0"

__all__ = [
    "automl",
    "base",
    "blackbox",
    "hypergrad",
    "inner",
    "evaluation",
    "few_shot",
    "load",
    "nas",
    "plots",
    "predictors",
    "save",
    "spaces",
    "tasks",
    "train_meta_optimizer",
    "train_meta_searcher",
    "training",
    "transforms",
]


def __getattr__(name: str) -> Any:
    """Imports `metaopt.plots` at its first use."""
    if name == "plots":
        import importlib

        return importlib.import_module("metaopt.plots")
    raise AttributeError(f"module 'metaopt' has no attribute {name!r}")
