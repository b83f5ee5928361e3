"""The expected scores on a new task: the average of the earlier tasks' scores, corrected by two models.

A score is a normal score, a rank within its task. The average over the tasks that tried an architecture is noisy: the
best of many averages owes part of its rank to chance. Two models have less noise, but know less about a single
architecture: a linear model of entries and their pairs, and the encoder. The average is shrunk towards their mixture m.

    mean(a) = m(a) + trust_a · (average − m)(a),    m = (1 − v) · linear + v · encoder,    trust_a = n_a / (n_a + κ)

n_a is the number of the T tasks that tried the architecture a, and κ = T · w / (1 − w). So w = 0 is the plain average,
and w = 1 the models only. If no task tried an architecture, only the models predict it. (average − m)(a) is the mean
difference over the n_a tasks. So a task that did not try the architecture counts as if its score were m.

The weights are those that give the best choices on earlier tasks, when each task is predicted from the other ones.
"""

from typing import NamedTuple

import numpy as np

_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
_ENCODER = (0.0, 0.5, 1.0)
_FEATURES = (0.0, 0.5, 1.0, 2.0)
# A choice is judged by the mean result of the 1/_TOP of architectures with the largest expected scores, because a
# single result is noisy.
_TOP = 100


class ScoreWeights(NamedTuple):
    """Weights of the corrections to the average of the earlier tasks' scores.

    Attributes:
      models: w in [0, 1], how far an average over all earlier tasks is shrunk towards the models.
      encoder: v in [0, 1], the share of the encoder in the models.
      features: in [0, 2], the weight of the change that the features of a task cause in the encoder's prediction.
    """

    models: float
    encoder: float
    features: float


DEFAULT_WEIGHTS = ScoreWeights(0.5, 0.5, 1.0)  # where no task can be left out


class HeldOut(NamedTuple):
    """Results and predictions of A architectures on T tasks, from which `choose_weights` chooses.

    Attributes:
      scores: [A, T] `normal_scores` of validation losses, NaN if an architecture was not tried.
      judged: [A, T] `normal_scores` of the losses by which a choice is judged, NaN if unknown.
      fitted: [A, T] the linear model's fit to each task.
      encoder: [A, T] scores by encoders that were not trained on the task, without its features.
      shift: [A, T] the change of these scores by the features of the task.
    """

    scores: np.ndarray
    judged: np.ndarray
    fitted: np.ndarray
    encoder: np.ndarray
    shift: np.ndarray


def expected_scores(
    scores: np.ndarray, fitted: np.ndarray, encoder: np.ndarray, weights: ScoreWeights
) -> tuple[np.ndarray, float]:
    """The expected scores on a task without features.

    Args:
      scores: [A, T] of the earlier tasks, NaN if an architecture was not tried.
      fitted: [A, T] the linear model's fit to each task.
      encoder: [A] the encoder's scores, in any units.
      weights: see `ScoreWeights`.

    Returns:
      The expected scores [A], and the slope that converts units of `encoder` to units of scores. It is the slope of the
      regression of the averages on `encoder`.
    """
    tried = np.isfinite(scores)
    times = tried.sum(1)
    over_tried = lambda x: np.where(tried, x, 0).sum(1) / np.maximum(times, 1)
    average, rows = over_tried(scores), times > 0
    centered = encoder - encoder[rows].mean()
    slope = float((centered * average)[rows].sum() / max((centered[rows] ** 2).sum(), 1e-12))
    learned = average[rows].mean() + slope * centered
    kept = 1 - weights.models
    trust = times * kept / np.maximum(times * kept + scores.shape[1] * weights.models, 1e-12)
    v = weights.encoder
    model = (1 - v) * fitted.mean(1) + v * learned
    # The part of the average that the models miss, over the tasks that tried the architecture.
    return model + trust * (average - (1 - v) * over_tried(fitted) - v * learned), slope


def choose_weights(held_out: HeldOut) -> ScoreWeights:
    """The weights with the best choices on the tasks of `held_out`, when each task is predicted from the other ones.

    On each task, it takes the architectures with the largest expected scores: 1/100 of those with a result, at least
    one. The value of the weights on this task is the mean percentile of their results. First `models` is chosen, with
    the linear model only: the smallest weight with the largest mean value over tasks. Then `encoder` is chosen, and
    then `features`. They are positive only if the gain in value exceeds its standard error over tasks. The reason is
    that a few tasks cannot distinguish many weights, and that a network misleads more than an average.

    Raises:
      ValueError: if `held_out` has fewer than two tasks.
    """
    num_tasks = held_out.scores.shape[1]
    if num_tasks < 2:
        raise ValueError(f"Leaving out a task needs at least 2 tasks; got {num_tasks}.")
    weights = max([ScoreWeights(w, 0.0, 0.0) for w in _SHARES], key=lambda weights: _values(held_out, weights).mean())
    for name, shares in (("encoder", _ENCODER), ("features", _FEATURES)):
        values = {share: _values(held_out, weights._replace(**{name: share})) for share in shares}
        best = max(values, key=lambda share: values[share].mean())
        gain = values[best] - values[0.0]
        if gain.mean() > gain.std(ddof=1) / np.sqrt(num_tasks):
            weights = weights._replace(**{name: best})
    return weights


def _values(held_out: HeldOut, weights: ScoreWeights) -> np.ndarray:
    """The value of a choice on each task, [T]; 0.5 without a result to judge it by."""
    from scipy.stats import norm

    values = np.full(held_out.scores.shape[1], 0.5)
    for t in range(len(values)):
        scores, fitted = (np.delete(x, t, 1) for x in (held_out.scores, held_out.fitted))
        mean, slope = expected_scores(scores, fitted, held_out.encoder[:, t], weights)
        mean = mean + weights.features * slope * held_out.shift[:, t]
        rows = np.flatnonzero(np.isfinite(held_out.judged[:, t]))
        if len(rows):
            best = rows[np.argsort(-mean[rows], kind="stable")[: max(len(rows) // _TOP, 1)]]
            values[t] = norm.cdf(held_out.judged[best, t]).mean()
    return values
