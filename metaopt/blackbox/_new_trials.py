"""Converts the trials of a new task to the arrays that a surrogate reads: selected, on one scale, and padded."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, spaces
from metaopt.blackbox import _fidelities, _frames

MAX_TRIALS = 256  # maximum number of trials of the new task that the surrogate reads
_NEAREST = 8  # number of next larger fidelities that a fidelity is compared with


def as_configurations(name: str, value: Any, space: base.PyTree = None) -> Sequence[Mapping[str, Any]]:
    """Returns configurations from a list of dicts or from a data frame, where gaps are missing values.

    Args:
      name: the argument's name, for error messages.
      value: the argument.
      space: the search space. If a choice has None as a label and is active, a gap (NaN, None, NA, NaT) of a data frame
        means None.

    Returns:
      A sequence of dicts.

    Raises:
      ValueError: if `value` is anything else, such as an array, which does not have the names of its columns.
    """
    if hasattr(value, "columns"):
        frame = _frames.as_pandas(value)
        # Turn the gaps of nullable types into NaN as well.
        return _without_gaps(frame.astype(object).where(frame.notna(), math.nan).to_dict("records"), space)
    value = list(value)
    for i, configuration in enumerate(value):
        if not isinstance(configuration, (dict, Mapping)):  # the check for dict is faster than the one for Mapping
            raise ValueError(f"`{name}[{i}]` must be a dict from parameter names to values; got {configuration!r}.")
    return value


def _without_gaps(rows: list[dict[str, Any]], space: base.PyTree) -> list[dict[str, Any]]:
    """Removes the gaps of rows, except those that mean None: of an active choice that has None as a label.

    Whether a conditional choice is active depends on other values and their defaults, so we look it up in a completed
    row. The returned row has only given values, because a caller may check them. So callers complete it again.
    """
    leaves = jax.tree_util.tree_leaves_with_path(space)
    leaves_with_none = [(path, leaf) for path, leaf in leaves if None in getattr(leaf, "labels", ())]
    name_of = lambda path: jax.tree_util.keystr(path, simple=True, separator=".") or "hyperparams"
    conditional = {name_of(path): leaf.condition for path, leaf in leaves_with_none}
    leaf_name = lambda name: name if name in conditional else str(name).rpartition("[")[0]  # "w[0]" of leaf "w"

    def without_gaps(row):
        values = {name: value for name, value in row.items() if value == value}
        gaps = [name for name in row if name not in values and leaf_name(name) in conditional]
        if any(conditional[leaf_name(name)] for name in gaps):
            whole = spaces.complete(space, values | dict.fromkeys(gaps, math.nan), strict=False)
            gaps = [name for name in gaps if name in whole]
        return values | dict.fromkeys(gaps)

    return [without_gaps(row) for row in rows]


def as_outcomes(outcomes: Any, num: int) -> np.ndarray:
    """[N] outcomes of N configurations, NaN if a trial failed, from any array of N numbers.

    Args:
      outcomes: [N] or [N, 1]; None and non-finite numbers are failures.
      num: N, the number of configurations.

    Returns:
      [N] finite numbers or NaN.

    Raises:
      ValueError: if `outcomes` are not numbers, or have another shape.
    """
    y = np.asarray(outcomes, float)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (num,):
        raise ValueError(f"`outcomes` must be one number for each configuration, [{num}]; got shape {y.shape}.")
    return np.where(np.isfinite(y), y, np.nan)


class TriedConfiguration(NamedTuple):
    """One trial of the new task; `tried_configuration` constructs it.

    Attributes:
      x: [D] the encoded configuration.
      outcomes: fidelity, rounded to six digits -> outcome, NaN if the trial failed. A pruned trial has the outcome that
        it had reached, stored under the requested fidelity.
      log_costs: fidelity -> logarithm of the cost of the full budget, estimated at this fidelity; NaN if unknown.
      log_cost: the first of them that is known, or NaN.
      given_up: whether the trial was pruned at its largest fidelity. It then counts as no better than the best trial
        that was not pruned.
      reached: the largest fidelity that has a finite outcome; NaN if there is none.
      last: the outcome at `reached`; NaN if the trial failed at its largest fidelity.
    """

    x: np.ndarray
    outcomes: dict[float, float]
    log_costs: dict[float, float]
    log_cost: float
    given_up: bool
    reached: float
    last: float


class EndedTrials(NamedTuple):
    """All ended trials of a new task; their configurations are encoded only when needed.

    Attributes:
      y: [N] comparable outcomes, NaN if a trial has none.
      given_up: [N] whether the trial was pruned.
      log_cost: [N] logarithm of the cost of the full budget, NaN if unknown.
      x: i -> [D] the encoded configuration of trial i.
      names: () -> the bytes of all encoded configurations.
      outcomes: [N, K] the same as `y` for each of several outcomes, in the order of `Goals.names`; y is the first one.
        All are NaN if a trial failed, and one is NaN if it is unknown.
    """

    y: np.ndarray
    given_up: np.ndarray
    log_cost: np.ndarray
    x: Callable[[int], np.ndarray]
    names: Callable[[], set[bytes]]
    outcomes: Any = None


def tried_configuration(
    x: np.ndarray, outcomes: dict[float, float], log_costs: dict[float, float] | None = None, given_up: bool = False
) -> TriedConfiguration:
    """Constructs a `TriedConfiguration`, and finds its largest fidelity once instead of at every call of `ask`.

    Non-finite outcomes count as failures.
    """
    if any(math.isinf(y) for y in outcomes.values()):
        outcomes = {fidelity: y if math.isfinite(y) else math.nan for fidelity, y in outcomes.items()}
    reached = max((s for s, y in outcomes.items() if math.isfinite(y)), default=math.nan)
    failed = not outcomes or math.isnan(outcomes[max(outcomes)])
    last = math.nan if failed else outcomes[reached]
    log_costs = log_costs or {}
    log_cost = next((cost for cost in log_costs.values() if math.isfinite(cost)), math.nan)
    return TriedConfiguration(x, outcomes, log_costs, log_cost, given_up, reached, last)


def rounded_fidelity(fidelity: float) -> float:
    """Rounds a fidelity to six digits, or to 1 if it is the full budget up to rounding: float32 has 1/3 to 3e-8."""
    return 1.0 if _fidelities.is_full_budget(fidelity) else float(f"{fidelity:.6g}")


def at_full_budget(tried: Sequence[TriedConfiguration]) -> np.ndarray:
    """[N] comparable outcomes of trials at several fidelities; NaN if a trial has no outcome.

    A trial counts with its outcome at its largest fidelity, plus the shift of this fidelity. The shift of the largest
    fidelity of all trials is 0. The shift of each other fidelity is the mean difference to a larger fidelity, over
    trials with outcomes at both, plus the shift of that fidelity. We take the nearest of the next eight larger
    fidelities for which such trials exist. Without such a fidelity, we take the next larger one, and the difference of
    the means of all outcomes at the two.

    At each fidelity, we compare only the latest `MAX_TRIALS` trials that ended there, and the latest `MAX_TRIALS` that
    went further. So the cost per fidelity does not grow with N.
    """
    reached, y = np.array([trial.reached for trial in tried]), np.array([trial.last for trial in tried])
    several = np.array([len(trial.outcomes) > 1 for trial in tried], bool)
    ended = np.argsort(reached, kind="stable")[: np.isfinite(reached).sum()]  # by fidelity, the latest last
    by_fidelity = np.split(ended, np.flatnonzero(np.diff(reached[ended])) + 1)[::-1]
    fidelities, shifts, compared, went_further = [], [], [], ended[:0]
    for rows in by_fidelity if len(ended) else ():
        fidelities.append(fidelity := float(reached[rows[0]]))
        both = np.sort(np.concatenate([rows[-MAX_TRIALS:], went_further]))
        # A trial that went further and has only one outcome has no outcome at this fidelity.
        compared.append([tried[i].outcomes for i in both[several[both] | (reached[both] == fidelity)].tolist()])
        went_further = both[-MAX_TRIALS:]
        shifts.append(_shift(fidelities, compared, shifts))
        y[rows] += shifts[-1]
    return y


def _shift(fidelities: list[float], compared: list[list[dict[float, float]]], shifts: list[float]) -> float:
    """The shift of the smallest of L fidelities.

    Args:
      fidelities: [L], descending.
      compared: for each fidelity, the outcomes by fidelity of the trials that are compared there.
      shifts: [L - 1] the shifts of the larger fidelities.

    Returns:
      What to add to an outcome at the smallest fidelity, as `at_full_budget` describes it.
    """
    level = len(shifts)
    if level == 0:
        return 0.0
    fidelity = fidelities[level]
    for larger in range(level - 1, max(level - _NEAREST, 0) - 1, -1):  # the nearest first
        larger_fidelity = fidelities[larger]
        pairs = [
            outcomes[larger_fidelity] - outcomes[fidelity]
            for outcomes in compared[larger]
            if fidelity in outcomes and larger_fidelity in outcomes
        ]
        pairs = [difference for difference in pairs if math.isfinite(difference)]
        if pairs:
            return shifts[larger] + float(np.mean(pairs))
    larger_mean, mean = (
        float(np.nanmean([outcomes[s] for outcomes in trials if s in outcomes]))
        for s, trials in zip(fidelities[-2:], compared[-2:], strict=True)
    )
    return shifts[-1] + larger_mean - mean


def from_the_best(y: np.ndarray, widest: float) -> tuple[np.ndarray, float]:
    """Returns [N] distances from the best outcome, clipped at `widest`, and the best outcome; one must be finite.

    An offset of all outcomes has no meaning. Clipping keeps diverged trials from setting the scale. `widest` comes from
    earlier tasks. If half of the distances exceed it, the new task has other units. The limit is then four times the
    median distance.
    """
    seen = y[np.isfinite(y)]
    low = float(seen.min())
    middle = np.quantile(seen, 0.5, method="lower") - low
    return np.minimum(y - low, widest if middle <= widest else 4 * middle), low


def best_and_latest(y: np.ndarray, num: int) -> np.ndarray:
    """Indices of at most `num` trials, in order.

    The best trials get half of the places, the latest failures (NaN) at most a quarter, and the latest trials the rest.
    """
    if len(y) <= num:
        return np.arange(len(y))
    best = np.argsort(y, kind="stable")[: num // 2]
    failed = np.flatnonzero(np.isnan(y))[-max(num // 4, 1) :]
    kept = np.union1d(best[~np.isnan(y[best])], failed)
    chosen = np.zeros(len(y), bool)
    chosen[kept] = True
    chosen[np.flatnonzero(~chosen)[len(y) - num :]] = True
    return np.flatnonzero(chosen)


def farthest(x: np.ndarray, tried: np.ndarray) -> int:
    """Finds the one of P configurations that is farthest from the nearest of N others.

    It is the next point of a maximin distance design (Johnson, Moore and Ylvisaker 1990, "Minimax and maximin distance
    designs"). It takes memory O(P + N D) and time O(P N D).

    Args:
      x: [P, D] encoded configurations, finite.
      tried: [N, D] encoded configurations, at least one.

    Returns:
      The index in `x`; the first index if several distances are equal in float32.
    """
    from scipy.spatial.distance import cdist

    parts = np.array_split(x, -(-len(x) // 256))
    distances = np.concatenate([cdist(part, tried).min(1) for part in parts])
    return int(distances.astype(np.float32).argmax())


def without_outliers(y: np.ndarray) -> np.ndarray:
    """[N] outcomes, clipped far above the third quartile, as `_surrogates.normalize` does for earlier tasks.

    One trial of four may have diverged. Its outcome must not set the limit, so we do not interpolate the quartile.
    """
    finite = y[np.isfinite(y)]
    if len(finite) < 4:
        return y
    low, upper = finite.min(), np.quantile(finite, 0.75, method="lower")
    return np.minimum(y, low + 4 * (upper - low)) if upper > low else y


def shown_to_transformers(x: np.ndarray, y: np.ndarray, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, y, mask) of at most `num` trials, y is NaN if a trial failed; diverged trials do not set the scale."""
    keep = best_and_latest(y, num)
    return padded(x[keep], without_outliers(y)[keep])


def padded(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, y, mask) of trials, padded to 16, 64, 256, ... rows, so that JAX compiles few programs."""
    size = 16
    while size < len(y):
        size *= 4
    pad = size - len(y)
    dtype = jnp.result_type(float)
    # Padding lies far away, so that no trial is near it.
    x = np.concatenate([x, 1e3 + np.arange(pad)[:, None] * np.ones(x.shape[1])[None]]) if pad else x
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(np.pad(y, (0, pad)), dtype),
        jnp.asarray(np.pad(np.ones(len(y)), (0, pad)), dtype),
    )
