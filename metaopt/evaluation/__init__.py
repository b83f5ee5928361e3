"""evaluation"""

from metaopt.evaluation._evaluations import (
    Evaluation,
    average_ranks,
    by_number,
    join_evaluations,
    leaderboard,
    mean_scores,
    paired_differences,
)
from metaopt.evaluation._saved import load_evaluation, save_evaluation

__all__ = [
    "load_evaluation",
    "save_evaluation",
    "Evaluation",
    "average_ranks",
    "by_number",
    "join_evaluations",
    "leaderboard",
    "mean_scores",
    "paired_differences",
]
