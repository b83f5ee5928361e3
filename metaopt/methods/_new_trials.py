"""The trials of a new task as arrays, and those that a surrogate reads of them: few of many, outcomes of one scale,
padded."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, spaces

MAX_TRIALS = 256  # of the new task that the surrogate looks at
_NEAREST = 8  # fidelities above one's own that are compared with it


def as_configurations(name: str, given: Any, space: base.PyTree = None) -> Sequence[Mapping[str, Any]]:
    """Configurations from a list of dicts, or a data frame, whose gaps are what a row does not have.

    Args:
      name: of the argument.
      given: what it is.
      space: where a choice of it has None as a label, and is active, a gap (NaN, None, NA, NaT) is None.

    Raises:
      ValueError: it is something else, such as an array, which does not say what its columns are.
    """
    if hasattr(given, "columns"):
        given = base.as_pandas(name, given)
        # Gaps of nullable types are NaN, too.
        return _without_gaps(given.astype(object).where(given.notna(), math.nan).to_dict("records"), space)
    if isinstance(given, Mapping):
        raise ValueError(f"`{name}` must be a list of configurations; got one.")
    if isinstance(given, (str, np.ndarray, jax.Array)) or not isinstance(given, Sequence):
        raise ValueError(
            f"`{name}` must be a list of configurations, dicts of values by name such as {{'x': 0.5}}, or a data frame "
            f"with a column a name; got {type(given).__name__}. `pandas.DataFrame(array, columns=names)` makes a frame "
            "of an array."
        )
    for i, configuration in enumerate(given):
        if not isinstance(configuration, (dict, Mapping)):  # the first is looked up at once
            raise ValueError(f"`{name}[{i}]` must be a dict of values by name; got {configuration!r}.")
    return given


def _without_gaps(rows: list[dict[str, Any]], space: base.PyTree) -> list[dict[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(space)
    nones = [(path, leaf) for path, leaf in leaves if None in getattr(leaf, "labels", ())]
    conditional = {jax.tree_util.keystr(p, simple=True, separator=".") or "hyperparams": x.condition for p, x in nones}
    leaf_name = lambda name: name if name in conditional else str(name).rpartition("[")[0]  # of one that has a shape

    def given(row):
        found = {name: value for name, value in row.items() if value == value}
        gaps = [name for name in row if name not in found and leaf_name(name) in conditional]
        if any(conditional[leaf_name(name)] for name in gaps):
            whole = spaces.complete(space, found | dict.fromkeys(gaps, math.nan), strict=False)
            gaps = [name for name in gaps if name in whole]
        return found | dict.fromkeys(gaps)

    return [given(row) for row in rows]


def as_outcomes(given: Any, num: int) -> np.ndarray:
    """[N] outcomes of so many configurations, from any array of N numbers.

    Args:
      given: a number each, [N] or [N, 1]; what is not finite has failed, and None, too.
      num: N.

    Raises:
      ValueError: it is something else, or of another length.
    """
    try:
        y = np.asarray(given, float)
    except (TypeError, ValueError):
        raise ValueError(f"`outcomes` must be numbers, NaN where a trial failed; got {given!r}.") from None
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ValueError(f"`outcomes` must be a number for each configuration, [N]; got shape {y.shape}.")
    if len(y) != num:
        raise ValueError(f"Each configuration has an outcome; got {num} and {len(y)}.")
    return np.where(np.isfinite(y), y, np.nan)


class TriedConfiguration(NamedTuple):
    """One trial of the new task; `tried_configuration` makes one.

    Attributes:
      x: [D] the encoded configuration.
      outcomes: by fidelity, to six digits; NaN where the trial failed. Of a pruned trial, what it had reached, by the
        fidelity asked for.
      log_costs: of the full budget, as each fidelity says it; NaN where it does not.
      log_cost: the first one that is known, or NaN.
      given_up: whether it was pruned at its largest fidelity. It counts as no better than the best trial that was not.
      reached: the largest fidelity that has an outcome; NaN where none has.
      last: the outcome there; NaN where the trial failed, then or later.
    """

    x: np.ndarray
    outcomes: dict[float, float]
    log_costs: dict[float, float]
    log_cost: float
    given_up: bool
    reached: float
    last: float


class Told(NamedTuple):
    """All trials of a new task, few of whose configurations are looked at.

    Attributes:
      y: [N] outcomes that stand beside one another, NaN where a trial has none.
      given_up: [N] whether it was pruned.
      log_cost: [N] of the full budget, NaN where it is not known.
      x: i -> [D] the encoded configuration.
      names: () -> the bytes of all encoded configurations.
    """

    y: np.ndarray
    given_up: np.ndarray
    log_cost: np.ndarray
    x: Callable[[int], np.ndarray]
    names: Callable[[], set[bytes]]


def tried_configuration(
    x: np.ndarray, outcomes: dict[float, float], log_costs: dict[float, float] | None = None, given_up: bool = False
) -> TriedConfiguration:
    """A trial with its largest fidelity looked up once, and not whenever something is asked for.

    What is not finite failed.
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
    """To six digits, and 1 where it is that but for rounding: float32 keeps 1/3 to 3e-8."""
    return 1.0 if base.is_full_budget(fidelity) else float(f"{fidelity:.6g}")


def at_full_budget(tried: Sequence[TriedConfiguration]) -> np.ndarray:
    """[N] outcomes that stand beside one another, of trials at several fidelities; NaN where a trial has none.

    A trial counts with its outcome at its largest fidelity, moved by the mean difference between that fidelity and
    the next in trials that have been at both, step by step; where none has, by the difference of means. Of trials that
    ended there, and of those that went further, the latest `MAX_TRIALS` are compared: what a fidelity costs does not
    grow with N.
    """
    reached, y = np.array([trial.reached for trial in tried]), np.array([trial.last for trial in tried])
    several = np.array([len(trial.outcomes) > 1 for trial in tried], bool)
    ended = np.argsort(reached, kind="stable")[: np.isfinite(reached).sum()]  # by fidelity, the latest last
    by_fidelity = np.split(ended, np.flatnonzero(np.diff(reached[ended])) + 1)[::-1]
    fidelities, shifts, compared, further = [], [], [], ended[:0]

    @functools.cache
    def mean(level):
        return float(np.nanmean([of[fidelities[level]] for of in compared[level] if fidelities[level] in of]))

    for level, those in enumerate(by_fidelity if len(ended) else ()):
        fidelities.append(s := float(reached[those[0]]))
        both = np.sort(np.concatenate([those[-MAX_TRIALS:], further]))
        # What went further, and has one outcome, has none here.
        compared.append([tried[i].outcomes for i in both[several[both] | (reached[both] == s)].tolist()])
        further = both[-MAX_TRIALS:]
        for above in range(level - 1, max(level - _NEAREST, 0) - 1, -1):  # the nearest first
            h = fidelities[above]
            pairs = [of[h] - of[s] for of in compared[above] if s in of and h in of]
            pairs = [difference for difference in pairs if math.isfinite(difference)]
            if pairs:
                shifts.append(shifts[above] + float(np.mean(pairs)))
                break
        else:
            shifts.append(shifts[-1] + mean(level - 1) - mean(level) if level else 0.0)
        y[those] += shifts[-1]
    return y


def from_the_best(y: np.ndarray, widest: float) -> tuple[np.ndarray, float]:
    """[N] outcomes from the best one on (at least one is finite), at most `widest`, and the best one.

    An offset means nothing, and what diverged does not set the scale. Where half of all trials are beyond what earlier
    tasks have seen, units are others, and the better half says what is far.
    """
    seen = y[np.isfinite(y)]
    low = float(seen.min())
    middle = np.quantile(seen, 0.5, method="lower") - low
    return np.minimum(y - low, widest if middle <= widest else 4 * middle), low


def best_and_latest(y: np.ndarray, num: int) -> np.ndarray:
    """Indices of at most `num` trials, in order: the best half, failures (NaN) up to a quarter, and the latest."""
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
    """Which of P configurations is farthest from the nearest of N others: the next point of a maximin distance design
    (Johnson, Moore and Ylvisaker 1990, "Minimax and maximin distance designs").

    Args:
      x: [P, D] encoded configurations, finite.
      tried: [N, D], at least one.

    Returns:
      Its index, the first of those that are as far in float32. It takes memory O(P + N D), and time O(P N D).
    """
    from scipy.spatial.distance import cdist

    parts = np.array_split(x, -(-len(x) // 256))
    distances = np.concatenate([cdist(part, tried).min(1) for part in parts])
    return int(distances.astype(np.float32).argmax())


def without_outliers(y: np.ndarray) -> np.ndarray:
    """[N] outcomes, those far beyond three in four of all cut off, as `predictors.normalize` does for earlier tasks.

    One of four may have diverged, and does not say how far: quartiles are outcomes, and not between them.
    """
    finite = y[np.isfinite(y)]
    if len(finite) < 4:
        return y
    low, upper = finite.min(), np.quantile(finite, 0.75, method="lower")
    return np.minimum(y, low + 4 * (upper - low)) if upper > low else y


def shown_to_transformers(x: np.ndarray, y: np.ndarray, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, y, mask) of at most `num` trials, NaN where one failed; what diverged does not set their scale."""
    keep = best_and_latest(y, num)
    return padded(x[keep], without_outliers(y)[keep])


def padded(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, y, mask) of trials at 16, 64, 256 ...: few programs are compiled."""
    size = 16
    while size < len(y):
        size *= 4
    pad = size - len(y)
    dtype = jnp.result_type(float)
    # Padding lies far away, so that it is nobody's neighbor.
    x = np.concatenate([x, 1e3 + np.arange(pad)[:, None] * np.ones(x.shape[1])[None]]) if pad else x
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(np.pad(y, (0, pad)), dtype),
        jnp.asarray(np.pad(np.ones(len(y)), (0, pad)), dtype),
    )
