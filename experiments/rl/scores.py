"""Scores of several families: the interquartile mean, with stratified bootstrap intervals.

A score that is not finite counts as `WORST`. It belongs to a run without a finished episode, or to one that diverged.

Source: Agarwal et al., NeurIPS 2021, https://arxiv.org/abs/2108.13264
"""

import numpy as np

WORST = 0.0  # the score of the lowest return of a family


def counted(scores: np.ndarray) -> np.ndarray:
    """Returns the scores, with `WORST` instead of values that are not finite."""
    return np.where(np.isfinite(scores), scores, WORST)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Returns the mean of the middle half, over the last axis; a quarter of the values is cut from each end."""
    values = np.sort(counted(scores), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def interval(scores: np.ndarray, num: int = 2000, coverage: float = 0.95) -> tuple[float, float, float]:
    """Returns the interquartile mean of scores [families, seeds], and the ends of its bootstrap interval.

    Each resample draws seeds with replacement within each family.
    """
    rng = np.random.default_rng(0)
    draws = rng.integers(scores.shape[1], size=(num, *scores.shape))
    resampled = np.take_along_axis(scores[None], draws, axis=2).reshape(num, -1)
    low, high = np.quantile(interquartile_mean(resampled), [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(interquartile_mean(scores.reshape(-1))), float(low), float(high)
