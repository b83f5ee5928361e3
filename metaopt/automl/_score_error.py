"""How far an out-of-fold score may be from the score on new rows: a jackknife over groups, blocks of time, or rows."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from metaopt.automl._ensemble import Target, score
from metaopt.automl._rows import NUM_FOLDS, TrainingRows

MAX_BLOCKS = 50
_BEST = {"log_loss": 0.0, "rmse": 0.0, "mae": 0.0}  # other metrics are at most 1
_WORST = {"accuracy": 0.0, "balanced_accuracy": 0.0, "roc_auc": 0.0}  # other metrics have no bound


class ScoreError(NamedTuple):
    """The standard error of a score.

    Attributes:
      standard_error: the standard error of the mean over units; NaN for one block.
      num_blocks: K. The standard error has K − 1 degrees of freedom.
      num_units: U ≥ K, the number of groups, blocks of time, or rows.
    """

    standard_error: float
    num_blocks: int
    num_units: int


def score_error(rows: TrainingRows, out_of_fold: np.ndarray, metric: str, seed: int) -> ScoreError:
    """The jackknife's standard error: se² = (K − 1)/K Σ_k (s_k − s̄)², where s_k is the score without block k.

    Blocks consist of whole units, because rows of one unit have similar errors. Units are groups if there are any, and
    otherwise rows (with their copies). They are joined at random to at most 50 blocks. With time, units and blocks are
    up to 8 consecutive parts of the validated rows with equal numbers of times. If the score is a mean over rows, and
    all blocks have equal weight, then se² is the variance of the blocks' means divided by K.

    Args:
      rows: the rows, from `sorted_rows`.
      out_of_fold: [n, C] or [n] predictions, NaN for rows that were not validated.
      metric: one of `METRICS`.
      seed: the seed of the random blocks.

    Returns:
      A `ScoreError`.

    Source: Efron & Stein, "The jackknife estimate of variance", Annals of Statistics 1981; in blocks, Kott, "The
    delete-a-group jackknife", Journal of Official Statistics 2001.
    """
    scored = np.flatnonzero(~np.isnan(out_of_fold.reshape(len(out_of_fold), -1)[:, 0]))
    block, num_blocks, num_units = _blocks(rows, scored, seed)
    if num_blocks < 2:
        return ScoreError(math.nan, num_blocks, num_units)
    parts = [scored[block != k] for k in range(num_blocks)]
    scores = [score(metric, out_of_fold[part], Target(rows.y[part], rows.weight[part])) for part in parts]
    return ScoreError(math.sqrt((num_blocks - 1) * np.var(scores)), num_blocks, num_units)


def score_interval(
    value: float, error: ScoreError, metric: str, coverage: float, num_new: int | None
) -> tuple[float, float]:
    """value ± t se √(1 + U / m), where t is Student's quantile; limited to possible values of the metric.

    Args:
      value: the score.
      error: the error of the score.
      metric: one of `METRICS`.
      coverage: the probability, in (0, 1).
      num_new: m, the number of new units; None for infinitely many.
    """
    from scipy import stats

    half = math.inf
    if error.num_blocks > 1 and not math.isnan(error.standard_error):
        ratio = 0.0 if num_new is None else error.num_units / num_new
        quantile = float(stats.t.ppf((1 + coverage) / 2, error.num_blocks - 1))
        half = quantile * error.standard_error * math.sqrt(1 + ratio)
    return max(value - half, _WORST.get(metric, -math.inf)), min(value + half, _BEST.get(metric, 1.0))


def evaluation(
    metrics: Iterable[str], predicted: np.ndarray, rows: TrainingRows, coverage: float, seed: int, unit: float
) -> list[tuple[str, float, float, float]]:
    """The metrics of new rows. Losses are positive.

    Args:
      metrics: some of `METRICS`.
      predicted: [n, C] or [n] predictions.
      rows: the rows. Their x is not used.
      coverage: the probability of an interval, in (0, 1).
      seed: the seed of the random blocks.
      unit: "rmse" and "mae" are multiplied by it.

    Returns:
      (metric, value, lower, upper) of each metric.
    """
    results = []
    for metric in metrics:
        value = score(metric, predicted, Target(rows.y, rows.weight))
        if metric == "roc_auc" and len(np.unique(rows.y)) < 2:  # it is not defined
            results.append((metric, math.nan, math.nan, math.nan))
            continue
        lower, upper = score_interval(value, score_error(rows, predicted, metric, seed), metric, coverage, None)
        if metric in _BEST:  # a loss, whose score is negative
            factor = -1.0 if metric == "log_loss" else -unit
            value, lower, upper = factor * value, factor * upper, factor * lower
        results.append((metric, value, lower, upper))
    return results


def _blocks(rows: TrainingRows, scored: np.ndarray, seed: int) -> tuple[np.ndarray, int, int]:
    """[m] the block of each validated row, the number of blocks, and the number of units."""
    parts = next(part for part in (rows.time, rows.groups, rows.copies) if part is not None)
    unit = np.unique(parts[scored], return_inverse=True)[1]
    num_units = int(unit.max()) + 1
    if rows.time is not None:
        num_blocks = min(NUM_FOLDS, num_units)
        return unit * num_blocks // num_units, num_blocks, num_blocks
    num_blocks = min(MAX_BLOCKS, num_units)
    shuffled_unit = np.random.default_rng(seed).permutation(num_units)
    return shuffled_unit[unit] * num_blocks // num_units, num_blocks, num_units
