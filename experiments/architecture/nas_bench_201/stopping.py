"""Epochs at which a finished search would have stopped, from measurements at the end of every epoch.

`nas.robust_darts` and `nas.darts_plus` apply the same two rules while they search.

Sources: Zela et al., ICLR 2020, Sec. 4.3, https://arxiv.org/abs/1909.09656; Liang et al., 2019 (DARTS+),
https://arxiv.org/abs/1909.06035
"""

from collections.abc import Sequence

import numpy as np


def by_sharpness(
    curvatures: Sequence[float], *, window: int = 5, start: int = 10, delta: int = 4, factor: float = 1.3
) -> int | None:
    """Returns the epoch whose α RobustDARTS keeps; None if it does not stop.

    Args:
      curvatures: κ, the dominant eigenvalue of ∂²f/∂α², at every epoch from 0.
      window: number of epochs over which |κ| is averaged.
      start: the first epoch that may stop. The search never stops before two full means exist.
      delta: how many epochs to look back for the comparison, and to go back.
      factor: by how much the mean may grow.
    """
    values = np.abs(np.asarray(curvatures, float))
    for e in range(max(start, window + delta - 1), len(values)):
        now, before = (values[end + 1 - window : end + 1].mean() for end in (e, e - delta))
        if now > factor * before:
            return e - delta
    return None


def by_skips(counts: Sequence[int], *, max_skips: int = 1, start: int = 1) -> int | None:
    """Returns the last epoch before the genotype has more than `max_skips` skips; None if it never has.

    Args:
      counts: number of skips in the genotype at every epoch from 0.
      max_skips: number of skips that a cell may have.
      start: the first epoch that may stop, at least 1. A stop at epoch 0 would keep the random initial α.
    """
    return next((e - 1 for e in range(start, len(counts)) if counts[e] > max_skips), None)
