"""Scores of predictions [U, I] for new users: error, ranking, and intervals."""

from typing import NamedTuple

import numpy as np

from experiments.recommend.ratings import NewUsers, Ratings

NUM_RANKED = 10


def later_errors(matrix: np.ndarray, new: NewUsers, low: float, high: float) -> np.ndarray:
    """Returns [U, Q], later ratings minus predictions, which are clipped to the range of ratings."""
    return new.later_rating - np.clip(np.take_along_axis(matrix, new.later_item, axis=1), low, high)


def user_rmse(errors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns [U], root mean squared errors over the real entries of errors [U, Q]."""
    return np.sqrt((mask * errors**2).sum(1) / mask.sum(1))


# ---- Ranking ---------------------------------------------------------------------------------------------------------


def ndcg(matrix: np.ndarray, new: NewUsers, num: int = NUM_RANKED) -> np.ndarray:
    """Returns [U], NDCG@10 over all items that are not among the first ratings.

    The gain of an item is its later rating, and 0 if the user did not rate it. The discount of rank r is 1/log2(r + 1).
    NDCG is the discounted gain of the items with the largest predictions, divided by that of the best order.
    """
    discounts = 1 / np.log2(np.arange(num) + 2)
    values = []
    for scores, first, later, ratings, mask in zip(matrix, *new[:1], *new[3:], strict=True):
        gains = np.zeros(len(scores))
        gains[later[mask > 0]] = ratings[mask > 0]
        gains[first] = 0
        scores = scores.copy()
        scores[first] = -np.inf
        chosen = np.argpartition(-scores, num)[:num] if len(scores) > num else np.arange(len(scores))
        chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
        best = np.sort(gains[gains > 0])[::-1][:num]
        ideal = (best * discounts[: len(best)]).sum()
        values.append((gains[chosen] * discounts[: len(chosen)]).sum() / ideal if ideal > 0 else 0.0)
    return np.array(values)


def recent_popularity(train: Ratings, new: NewUsers, days: float = 30.0) -> np.ndarray:
    """Returns [U, I], the training ratings of each item in the 30 days before a new user's last first rating."""
    counts = []
    for day in new.day[:, -1]:
        first, last = np.searchsorted(train.day, (day - days, day))
        counts.append(np.bincount(train.item[first:last], minlength=train.num_items))
    return np.array(counts)


# ---- Intervals -------------------------------------------------------------------------------------------------------


class Intervals(NamedTuple):
    """Prediction intervals of new users: share of later ratings inside [U], and mean width [U]."""

    coverage: np.ndarray
    width: np.ndarray


def user_scale(first_errors: np.ndarray, prior: float, prior_weight: float) -> np.ndarray:
    """Returns [U], the scale of a user's errors, from those of the first ratings [U, k] and a prior scale.

    scale² = (weight · prior² + Σ_j e_j²) / (weight + k)
    """
    return np.sqrt((prior_weight * prior**2 + (first_errors**2).sum(1)) / (prior_weight + first_errors.shape[1]))


def conformal_quantile(scores: np.ndarray, mask: np.ndarray, coverage: float) -> float:
    """Returns the quantile of nonnegative scores [M, Q] of M calibration users that covers a new user's rating.

    Users are exchangeable, and each counts the same. The new user's score counts as infinite, so the weight of each
    calibration user is 1 / (M + 1), divided by its number of ratings.
    """
    weight = (mask / mask.sum(1, keepdims=True))[mask > 0] / (len(mask) + 1)
    values = scores[mask > 0]
    order = np.argsort(values)
    above = np.searchsorted(np.cumsum(weight[order]), coverage - 1e-12)
    return float(values[order][above]) if above < len(order) else np.inf


def intervals(predictions: np.ndarray, half: np.ndarray, new: NewUsers, low: float, high: float) -> Intervals:
    """Returns coverage and width of the intervals prediction ± half, cut to the range of ratings.

    Args:
      predictions: [U, Q], of the later ratings.
      half: [U], half of the widths.
      new: the users.
      low: the lowest rating.
      high: the highest rating.
    """
    bottom, top = (np.clip(predictions + sign * half[:, None], low, high) for sign in (-1, 1))
    inside = (new.later_rating >= bottom - 1e-9) & (new.later_rating <= top + 1e-9)
    mean = lambda values: (new.mask * values).sum(1) / new.mask.sum(1)
    return Intervals(mean(inside), mean(top - bottom))
