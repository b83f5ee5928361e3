"""Named compositions of the contract, with no numerics of their own."""

from metaopt.methods._evaluate import (
    AdaptFn,
    Evaluation,
    accuracy,
    average_ranks,
    by_number,
    evaluate_episodes,
    leaderboard,
    mean_absolute_error,
    mean_scores,
    mean_squared_error,
    paired_differences,
)
from metaopt.methods._fine_tune import FineTuned, fine_tune

__all__ = [
    "AdaptFn",
    "Evaluation",
    "FineTuned",
    "accuracy",
    "average_ranks",
    "by_number",
    "evaluate_episodes",
    "fine_tune",
    "leaderboard",
    "mean_absolute_error",
    "mean_scores",
    "mean_squared_error",
    "paired_differences",
]
