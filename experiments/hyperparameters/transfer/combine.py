"""Weights of several training runs on one task, from the probabilities of the validation rows."""

from collections.abc import Callable

import numpy as np

from experiments.hyperparameters.transfer.judge import LEAST_PROBABILITY

EM_STEPS, GREEDY_STEPS = 10, 20


def log_loss(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns [...] mean losses over the rows of p [..., n, N] that are in mask [n, N]."""
    return -(np.log(np.maximum(p, LEAST_PROBABILITY)) * mask).sum(-1) / np.asarray(mask).sum(-1)


def mixture(weights: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Returns [n, N] averages of p [K, n, N] with weights [K, n]."""
    return np.einsum("kn,knr->nr", weights, p)


def choose(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns [K, n]: 1 for the run with the smallest validation loss. Of equal runs, it is the first."""
    return (np.arange(len(p))[:, None] == log_loss(p, mask).argmin(0)[None]).astype(float)


def average(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns equal weights [K, n] of the runs that did not diverge."""
    alive = ((p * mask).sum(-1) > 0).astype(float)
    return alive / np.maximum(alive.sum(0), 1)


def best_half(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns equal weights [K, n] of the ⌈K/2⌉ runs with the smallest validation losses."""
    rank = log_loss(p, mask).argsort(0, kind="stable").argsort(0, kind="stable")
    num = (len(p) + 1) // 2
    return (rank < num) / num


def greedy(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns [K, n] shares of the best prefix of 20 greedy steps, each of which adds a run to the average.

    Source: Caruana et al., "Ensemble selection from libraries of models", ICML 2004.
    """
    num, n, _ = p.shape
    total, counts = np.zeros_like(p[0]), np.zeros((num, n))
    best, best_counts = np.full(n, np.inf), counts
    for step in range(1, GREEDY_STEPS + 1):
        losses = log_loss((total[None] + p) / step, mask)
        added = losses.argmin(0)
        total = total + p[added, np.arange(n)]
        counts = counts + (np.arange(num)[:, None] == added[None])
        better = losses.min(0) < best - 1e-9
        best, best_counts = np.where(better, losses.min(0), best), np.where(better, counts, best_counts)
    return best_counts / np.maximum(best_counts.sum(0), 1)


def likely(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns [K, n] weights after ten EM steps towards the mixture with the largest likelihood, from equal ones."""
    weights = average(p, mask)
    for _ in range(EM_STEPS):
        shares = weights[..., None] * p / np.maximum(mixture(weights, p), 1e-30)
        weights = (shares * mask).sum(-1) / np.asarray(mask).sum(-1)
        weights = weights / np.maximum(weights.sum(0), 1e-30)
    return weights


WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "the best": choose,
    "average": average,
    "average of the better half": best_half,
    "greedy ensemble": greedy,
    "likely mixture": likely,
}
