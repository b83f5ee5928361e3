"""Scores of probabilities, and sets of conformal prediction.

The expected calibration error has fixed bins, the ten tenths of [0, 1]:

    ECE = Σ_k (n_k / n) |mean of p in bin k − share of y in bin k| = (1/n) Σ_k |Σ_{i in bin k} (p_i − y_i)|.

A constant prediction is in one bin. So its ECE is small if it equals the share of y, although it distinguishes no
patients.
"""

import numpy as np

NUM_BINS = 10


def bins(p: np.ndarray) -> np.ndarray:
    """Returns the number of the bin of each probability, 0..9; 1 belongs to the last bin."""
    return np.minimum((np.asarray(p) * NUM_BINS).astype(int), NUM_BINS - 1)


def brier(p: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [B, R] Brier scores, the weighted means of (p − y)².

    Args:
      p: [R, N] probabilities of R resamples.
      y: [N] outcomes, 0 or 1.
      weights: [B, R, N] or [R, N] weights of patients; 0 for those that are not judged.
    """
    return (weights * (p - y) ** 2).sum(-1) / weights.sum(-1)


def ece(p: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [B, R] expected calibration errors; arguments as for `brier`."""
    number, residual = bins(p), weights * (p - y)
    gaps = sum(np.abs((residual * (number == k)).sum(-1)) for k in range(NUM_BINS))
    return gaps / weights.sum(-1)


def log_loss(p: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [B, R] log losses; arguments as for `brier`."""
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return -(weights * np.log(np.where(y > 0, p, 1 - p))).sum(-1) / weights.sum(-1)


def area(p: np.ndarray, y: np.ndarray) -> float:
    """Returns the area under the ROC curve: the share of pairs in the right order; ties count half."""
    above = p[y > 0][:, None] - p[y == 0][None]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def bootstrapped(p: np.ndarray, y: np.ndarray, judged: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns name -> [B, R], scores in which patients count as often as a bootstrap has drawn them.

    Args:
      p: [R, N].
      y: [N].
      judged: [R, N], 1 for patients without a known label, 0 for the labelled ones.
      counts: [B, N], how often each patient was drawn.
    """
    total = counts @ judged.T
    number, residual = bins(p), judged * (p - y)
    gaps = sum(np.abs(counts @ (residual * (number == k)).T) for k in range(NUM_BINS))
    return {"Brier": counts @ (judged * (p - y) ** 2).T / total, "ECE": gaps / total}


# ---- Conformal prediction --------------------------------------------------------------------------------------------


def prediction_sets(p_values: np.ndarray, alpha: float) -> np.ndarray:
    """Returns [..., 2] bool, the outcomes whose p-value is above α."""
    return p_values > alpha + 1e-6


class Abstention:
    """What happens at a nominal coverage 1 − α. A set with one outcome is an answer, and any other set abstains.

    Attributes:
      coverage: [R], the share of judged patients whose outcome is in their set.
      answered: [R], the share with an answer.
      wrong: [R], the share of wrong answers among all judged patients.
      sick, healthy: [R], the coverage of each class, NaN if a resample has no such patient.
    """

    def __init__(self, p_values: np.ndarray, y: np.ndarray, judged: np.ndarray, alpha: float):
        sets = prediction_sets(p_values, alpha)  # [R, N, 2]
        hit = np.where(y > 0, sets[..., 1], sets[..., 0])
        one = sets.sum(-1) == 1
        mean = lambda values, rows: (rows * values).sum(-1) / np.where(rows.sum(-1) > 0, rows.sum(-1), np.nan)
        self.coverage, self.answered, self.wrong = mean(hit, judged), mean(one, judged), mean(one & ~hit, judged)
        self.sick, self.healthy = mean(hit, judged * (y > 0)), mean(hit, judged * (y == 0))

    @property
    def risk(self) -> float:
        """The share of wrong answers among all answers of all resamples."""
        return float(self.wrong.mean() / max(self.answered.mean(), 1e-9))


def selective_risk(p: np.ndarray, y: np.ndarray, judged: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Returns [len(shares)], the error rate among the share of patients with the most confident predictions."""
    errors = []
    for row, is_judged in zip(p, judged, strict=True):
        row, outcome = row[is_judged > 0], y[is_judged > 0]
        order = np.argsort(-np.abs(row - 0.5), kind="stable")
        wrong = np.cumsum((row > 0.5)[order] != outcome[order])
        numbers = np.maximum((shares * len(row)).round().astype(int), 1)
        errors.append(wrong[numbers - 1] / numbers)
    return np.mean(errors, axis=0)
