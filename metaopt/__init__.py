"""metaopt: gradient-based meta-optimization in JAX."""

from metaopt import base, hypergrad, inner, methods, predictors, spaces, tasks, training, transforms
from metaopt.base import Context, Estimate, Estimator, InnerLoop, Predictor, Problem, Record, Searcher, Task

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Estimate",
    "Estimator",
    "InnerLoop",
    "Predictor",
    "Problem",
    "Record",
    "Searcher",
    "Task",
    "base",
    "hypergrad",
    "inner",
    "methods",
    "predictors",
    "spaces",
    "tasks",
    "training",
    "transforms",
]
