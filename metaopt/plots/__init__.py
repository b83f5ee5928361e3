"""Plots of outer loops, λ and its importance, searches, comparisons of methods, episodes, cells and Pareto fronts.

They need the extra `examples`.

Every function draws on the given axes or makes a new figure, and returns the axes. Use matplotlib for everything else.
Matplotlib is imported when a function is called.
"""

from metaopt.plots._architectures import cell, genotype, pareto
from metaopt.plots._comparisons import comparison, critical_difference, ranking
from metaopt.plots._curves import (
    adaptation_curves,
    hypergradients,
    hyperparameter_trace,
    learning_curve,
    scores_by_number,
)
from metaopt.plots._hyperparams import hyperparameters_by_feature, slices
from metaopt.plots._searches import importance, regret

__all__ = [
    "adaptation_curves",
    "cell",
    "comparison",
    "critical_difference",
    "genotype",
    "hypergradients",
    "hyperparameter_trace",
    "hyperparameters_by_feature",
    "importance",
    "learning_curve",
    "pareto",
    "ranking",
    "regret",
    "scores_by_number",
    "slices",
]
