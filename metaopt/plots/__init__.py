"""Plots of learning curves, λ over the outer steps, comparisons of methods, episodes, cells and Pareto fronts.

They need the extra `examples`.

Every function draws on the given axes or makes a new figure, and returns the axes. Use matplotlib for everything else.
Matplotlib is imported when a function is called.
"""

from metaopt.plots._architectures import cell, genotype, pareto
from metaopt.plots._comparisons import comparison, critical_difference, ranking
from metaopt.plots._curves import adaptation_curves, hyperparameter_trace, learning_curve, scores_by_number

__all__ = [
    "adaptation_curves",
    "cell",
    "comparison",
    "critical_difference",
    "genotype",
    "hyperparameter_trace",
    "learning_curve",
    "pareto",
    "ranking",
    "scores_by_number",
]
