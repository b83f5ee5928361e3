"""Compares methods on the same episodes or tables: means, paired differences, intervals, ranks and leaderboards."""

from metaopt.evaluation import _saved as _saved  # registers `Evaluation` for `metaopt.save`
from metaopt.evaluation._evaluations import (
    Evaluation,
    average_ranks,
    by_number,
    join_evaluations,
    leaderboard,
    mean_scores,
    paired_differences,
)

__all__ = [
    "Evaluation",
    "average_ranks",
    "by_number",
    "join_evaluations",
    "leaderboard",
    "mean_scores",
    "paired_differences",
]
