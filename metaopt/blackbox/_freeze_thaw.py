"""Freeze-thaw search: pauses and continues trials by predictions of their learning curves (`train_curve_searcher`)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, spaces, training
from metaopt.blackbox import _curves, _fidelities, _misfits, _trial_tables
from metaopt.blackbox._earlier_trials import candidate_key
from metaopt.blackbox._new_trials import best_and_latest
from metaopt.blackbox._random_search import seed_of

_MAX_SEEN = 1024  # maximum number of outcomes on a new task that the surrogate reads


class PredictFinalFn(Protocol):
    def __call__(self, trials: Sequence[base.Record] = (), levels: Sequence[float] = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Returns [M, levels] quantiles of candidates' outcomes at the full budget, given trials on the new task."""
        ...


class MakeCurveSearcherFn(Protocol):
    def __call__(self, *, first: Sequence[Mapping[str, Any]] = (), resumes: bool = True) -> base.Searcher:
        """Returns a searcher that decides after every step which trial to start or to continue.

        It starts with the configurations of `first`. Unlike other searchers, it does not start with the space's
        default, since the default may not be a candidate. `resumes` states whether trials continue from the point where
        they paused, so that only the difference in budget is paid."""
        ...


class CurveSearcher(NamedTuple):
    """The result of `train_curve_searcher`.

    Attributes:
      predict: `(trials=(), levels=(0.05, 0.5, 0.95)) -> [M, levels]`, quantiles of the outcomes of all candidates at
        the full budget, given the records of trials on the new task.
      searcher: `(*, first=(), resumes=True) -> Searcher`. It starts with the configurations of `first`. `resumes`
        states whether the objective continues trials from their checkpoints.
      candidates: M configurations.
      surrogate: the learned model of curves, a NamedTuple of arrays.
      space: the search space of λ.
    """

    predict: PredictFinalFn
    searcher: MakeCurveSearcherFn
    candidates: list[dict[str, Any]]
    surrogate: _curves.CurveSurrogate
    space: base.PyTree


class FreezeThawState(NamedTuple):
    """State of the searcher, passed from one call to the next.

    Attributes:
      key: the key of the trials' seeds.
      started: the started candidates by trial number.
      seen: (candidate, index of the fidelity, outcome) of each finite outcome of a complete record.
      closed: candidates that failed, or that the objective pruned.
      pending: (candidate, index of the fidelity) of each trial without a result.
    """

    key: jax.Array
    started: tuple[int, ...]
    seen: tuple[tuple[int, int, float], ...]
    closed: frozenset[int]
    pending: tuple[tuple[int, int], ...]


def train_curve_searcher(
    records: Sequence[base.Record],
    *,
    space: base.PyTree,
    num_steps: int = 100,
    progress: bool | None = None,
    key: jax.Array | None = None,
) -> CurveSearcher:
    """Learns from the learning curves of earlier tasks which trial of a new task to start or to continue.

    The surrogate is one Gaussian process over all candidates and fidelities. `training.fit` learns its scales on
    randomly drawn tasks, each left out of the earlier tasks. Its errors are also calibrated on left-out tasks.

    The searcher is freeze-thaw. The next fidelity goes to one of all candidates, started or not. It is the candidate
    with the largest expected improvement at the full budget per unit of remaining budget,

        E[max(y* − y(c, F), 0)] / (1 − fidelity reached),

    where y* is the best outcome at the full budget. Before the first such outcome, y* is the smallest predicted mean at
    the full budget. Objectives should continue a trial from its own checkpoint (`blackbox.collect(resumes=True)`).

    Sometimes every fidelity costs its full budget again (larger training sets, or no checkpoints). Then use
    `searcher(resumes=False)`, which only asks for full budgets, by expected improvement. A trial at a lower fidelity
    would cost more than its information is worth. The searcher still learns from all records that it receives.

    The outcome of a pruned trial belongs to an unknown fidelity below the requested one. It has no place on a learning
    curve, so it is not used, neither on earlier tasks nor on the new one. Outcomes of this trial at lower fidelities
    count, and it is not continued.

    The searcher reads at most 1,024 outcomes of a new task. If there are more, it reads the latest outcome of each
    candidate, and then the latest of the other outcomes. If more than 1,024 candidates have outcomes, it reads the
    latest outcome only of the candidates for which this outcome is among the best or the latest. A decision takes time
    O(1024² (1024 + M)) and memory O(1024 (1024 + M)) at most, for M candidates.

    Args:
      records: trials of at least three earlier tasks at several fidelities, including the full budget. Outcomes of all
        tasks must be on one scale, such as error rates or clipped losses. Failed and pruned trials are not used, and
        missing outcomes are filled in.
      space: the search space of λ. The candidates are the configurations of complete records. Each of them must have an
        outcome at each fidelity on some task.
      num_steps: outer steps that learn the scales of the Gaussian process.
      progress: as for `training.fit`.
      key: random key; `jax.random.key(0)` by default.

    Returns:
      A `CurveSearcher`. Its searcher's `tell` ignores records whose configurations are not candidates, such as those of
      other searches or of `enqueue`. One warning for each call counts them, except those that failed.

    Raises:
      ValueError: if the "COMPLETE" records have fewer than three tasks, or none is at the full budget.
      ValueError: if a configuration does not fit the space, or if a candidate has no outcome at some fidelity.
      ValueError: (in `tell`) if a trial that the searcher asked for has a fidelity that the records do not have. A
        trial is recognized by its number, configuration and seed.

    Source: Swersky, Snoek & Adams, 2014, https://arxiv.org/abs/1406.3896
    """
    key = jax.random.key(0) if key is None else key
    fit_key, calibrate_key = jax.random.split(key)
    complete = [record for record in records if record.status == "COMPLETE"]
    if (num_tasks := len({record.task for record in complete})) < 3:
        raise ValueError(
            '`records` must have trials that are "COMPLETE" for at least three tasks, since cross-validation leaves '
            f"out one and needs two; got {num_tasks}."
        )
    table = _trial_tables.tabulate(complete)
    if table.fidelities[-1] < 1:
        raise ValueError(
            '`records` must hold trials that are "COMPLETE" at fidelity 1, the full budget, which the searcher '
            f"predicts; the largest fidelity is {table.fidelities[-1]:g}. Give your largest budget the fidelity 1, and "
            "smaller budgets their fractions of it."
        )
    hyperparams = [spaces.from_configuration(space, c) for c in table.configurations]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *hyperparams)
    x = np.asarray(jax.jit(jax.vmap(lambda hp: spaces.encode(space, hp)))(stacked))
    surrogate = _curves.curve_surrogate(table.outcomes, x, table.fidelities)
    surrogate = surrogate._replace(noise=_fit_noise(fit_key, surrogate, table.outcomes, num_steps, progress))
    surrogate = _curves.calibrate(surrogate, calibrate_key)
    return _curve_searcher(surrogate, space, [dict(c) for c in table.configurations])


def _fit_noise(
    key, surrogate, curves, num_steps: int, progress: bool | None, *, num_tasks: int = 4, num_candidates: int = 16
):
    """Fits the scales by the likelihood of a few candidates' outcomes on a left-out task.

    A candidate's outcomes are those at a random number of its first fidelities and, for about half of the candidates,
    at the last one.
    """
    num_fidelities = curves.shape[2]

    def sample_tasks(key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        batch = []
        for task in rng.integers(len(curves), size=num_tasks):
            some = rng.choice(curves.shape[1], min(num_candidates, curves.shape[1]), replace=False)
            candidate, fidelity = np.repeat(some, num_fidelities), np.tile(np.arange(num_fidelities), len(some))
            begun = np.repeat(rng.integers(1, num_fidelities + 1, len(some)), num_fidelities)
            ended = np.repeat(rng.random(len(some)) < 0.5, num_fidelities) & (fidelity == num_fidelities - 1)
            y = curves[task, candidate, fidelity]
            mask = np.isfinite(y) & ((fidelity < begun) | ended)
            y = jnp.asarray(np.where(mask, y, 0.0), jnp.result_type(float))
            observed = _curves.Observed(jnp.asarray(candidate), jnp.asarray(fidelity), y, jnp.asarray(mask * 1.0))
            batch.append((jnp.asarray(task), observed))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)

    def loss(noise, task, key):
        number, observed = task
        return _curves.curve_loss(noise, surrogate, number, observed)

    learner = training.learner(hypergrad.over_tasks(hypergrad.direct(loss)), optax.adam(0.05))
    fitted = training.fit(
        learner,
        sample_tasks,
        hyperparams=surrogate.noise,
        num_steps=num_steps,
        key=key,
        progress=progress,
    )
    return fitted.hyperparams


class _Learned(NamedTuple):
    """Everything that the methods of a `CurveSearcher` share.

    Attributes:
      surrogate: the model of curves.
      space: the search space of λ.
      candidates: M configurations.
      rows: the sorted items of a candidate -> its index.
    """

    surrogate: _curves.CurveSurrogate
    space: base.PyTree
    candidates: list[dict[str, Any]]
    rows: dict[tuple, int]


def _curve_searcher(
    surrogate: _curves.CurveSurrogate, space: base.PyTree, candidates: list[dict[str, Any]]
) -> CurveSearcher:
    rows = {candidate_key(candidate): i for i, candidate in enumerate(candidates)}
    learned = _Learned(surrogate, space, candidates, rows)
    return CurveSearcher(partial(_predict, learned), partial(_searcher, learned), candidates, surrogate, space)


def _row_of(learned: _Learned, configuration: Mapping[str, Any]) -> int:
    """The index of a candidate; raises `ValueError` if the configuration is not a candidate."""
    name = candidate_key(configuration)
    if name not in learned.rows:  # fill missing values with defaults
        name = candidate_key(spaces.complete(learned.space, configuration))
    if name in learned.rows:
        return learned.rows[name]
    raise ValueError(
        f"{configuration} is not one of the candidates, which are the configurations of the earlier tasks."
    )


def _outcomes_of(learned: _Learned, records: Sequence[base.Record]) -> list[tuple[int, int, float]]:
    """(candidate, index of the fidelity, outcome) of each finite outcome of a complete record."""
    complete = [r for r in records if r.status == "COMPLETE" and np.isfinite(r.outcome)]
    rows = [_row_of(learned, record.configuration) for record in complete]
    rungs = [_fidelities.rung_of(learned.surrogate.fidelities.tolist(), record, own=True) for record in complete]
    triples = zip(rows, rungs, complete, strict=True)
    return [(row, rung, float(record.outcome)) for row, rung, record in triples if rung is not None]


def _predict(
    learned: _Learned, trials: Sequence[base.Record] = (), levels: Sequence[float] = (0.05, 0.5, 0.95)
) -> np.ndarray:
    """`CurveSearcher.predict`."""
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"`levels` must lie between 0 and 1; got {list(levels)}.")
    seen, (num, num_fidelities) = _outcomes_of(learned, trials), learned.surrogate.mean.shape
    final = jnp.arange(num), jnp.full(num, num_fidelities - 1)
    mean, std = (np.asarray(value) for value in _at(learned.surrogate, _padded(seen), *final))
    errors = np.asarray(learned.surrogate.errors)[_reached(seen, num)]
    middle = (np.arange(errors.shape[1]) + 0.5) / errors.shape[1]
    at_levels = np.stack([[np.interp(level, middle, row) for level in levels] for row in errors])
    return mean[:, None] + std[:, None] * at_levels


def _searcher(learned: _Learned, *, first: Sequence[Mapping[str, Any]] = (), resumes: bool = True) -> base.Searcher:
    """`CurveSearcher.searcher`."""
    first_rows = [_row_of(learned, configuration) for configuration in first]

    def init(key, space):
        del space  # the candidates come from the records
        return FreezeThawState(key, (), (), frozenset(), ())

    return base.Searcher(init, partial(_ask, learned, first_rows, resumes), partial(_tell, learned))


def _ask(learned: _Learned, first_rows: list[int], resumes: bool, state: FreezeThawState, num: int):
    asked = []
    for _ in range(num):
        chosen = _choose(learned, first_rows, resumes, state)
        if chosen is None:
            break
        candidate, rung = chosen
        if candidate not in state.started:
            state = state._replace(started=(*state.started, candidate))
        trial = state.started.index(candidate)
        asked.append(
            base.Record(
                "",
                dict(learned.candidates[candidate]),
                fidelity=float(learned.surrogate.fidelities[rung]),
                seed=seed_of(state.key, trial),
                status="WAITING",
                trial=trial,
            )
        )
        state = state._replace(pending=(*state.pending, (candidate, rung)))
    return asked, state


def _choose(learned: _Learned, first_rows: list[int], resumes: bool, state: FreezeThawState) -> tuple[int, int] | None:
    """The candidate and the index of the fidelity to run next; None if no candidate is open."""
    num, num_fidelities = learned.surrogate.mean.shape
    last = num_fidelities - 1
    seen = [*state.seen, *_expected_of_running(learned, state)]
    reached = _reached(seen, num)
    busy = {candidate for candidate, _ in state.pending}
    is_open = (reached < num_fidelities) & ~np.isin(np.arange(num), [*busy, *state.closed])
    if not is_open.any():
        return None
    waiting = [c for c in first_rows if is_open[c] and not reached[c]]
    if waiting:
        return waiting[0], 0 if resumes else last
    best = min((y for _, rung, y in state.seen if rung == last), default=np.inf)
    remaining = _remaining(learned.surrogate.fidelities)
    to_pay = remaining if resumes else jnp.ones_like(remaining)
    value, mean = _score(learned.surrogate, _padded(seen), jnp.asarray(reached), to_pay, best)
    value, mean = np.where(is_open, value, -1.0), np.where(is_open, mean, np.inf)
    # If no improvement is expected, choose the smallest expected outcome.
    chosen = int(value.argmax()) if value.max() > 1e-12 else int(mean.argmin())
    return chosen, int(reached[chosen]) if resumes else last


def _expected_of_running(learned: _Learned, state: FreezeThawState) -> list[tuple[int, int, float]]:
    """The expected outcomes of the running trials, like `FreezeThawState.seen`."""
    if not state.pending:
        return []
    candidate, rung = (np.array(column) for column in zip(*state.pending, strict=True))
    pad = 0, max(8, 1 << (len(rung) - 1).bit_length()) - len(rung)
    padded = (jnp.asarray(np.pad(column, pad)) for column in (candidate, rung))
    mean = np.asarray(_at(learned.surrogate, _padded(list(state.seen)), *padded)[0])[: len(rung)]
    return [(int(c), int(j), float(y)) for c, j, y in zip(candidate, rung, mean, strict=True)]


def _remaining(fidelities: np.ndarray) -> jax.Array:
    """[1 + F] the remaining budget of a candidate after 0, 1, ... F fidelities."""
    return jnp.asarray(np.maximum(1 - np.concatenate([[0.0], fidelities / fidelities[-1]]), 1e-9))


def _tell(learned: _Learned, state: FreezeThawState, records: Sequence[base.Record]) -> FreezeThawState:
    reasons = []
    for record in records:
        if record.status not in ("COMPLETE", "PRUNED", "FAIL"):
            continue
        try:
            candidate = _row_of(learned, record.configuration)
        except (TypeError, ValueError) as error:  # a trial of another search that is not a candidate
            reasons += [str(error)] if record.status != "FAIL" else []
            continue
        asked = 0 <= record.trial < len(state.started) and state.started[record.trial] == candidate
        own = asked and record.seed == seed_of(state.key, record.trial)
        if (rung := _fidelities.rung_of(learned.surrogate.fidelities.tolist(), record, own=own)) is None:
            continue
        state = state._replace(pending=tuple(p for p in state.pending if p != (candidate, rung)))
        seen = _outcomes_of(learned, [record])
        state = state._replace(seen=(*state.seen, *seen))
        if record.status != "COMPLETE" or not seen:
            state = state._replace(closed=state.closed | {candidate})
    _misfits.log_misfits(reasons, len(records), "They are not used.")
    return state


_at = jax.jit(_curves.curve_posterior)


@jax.jit
def _score(surrogate, observed, reached, remaining, best):
    """[M] expected improvements per unit of remaining budget, and [M] means at the full budget."""
    num, num_fidelities = surrogate.mean.shape
    mean, std = _at(surrogate, observed, jnp.arange(num), jnp.full(num, num_fidelities - 1))
    y = jnp.where(jnp.isfinite(best), best, mean.min())
    return _curves.curve_improvement(mean, std, surrogate.errors[reached], y) / remaining[reached], mean


def _reached(seen, num: int) -> np.ndarray:
    """[M] the number of fidelities that each candidate has reached."""
    reached = np.zeros(num, int)
    for candidate, rung, _ in seen:
        reached[candidate] = max(reached[candidate], rung + 1)
    return reached


def _few(seen, num: int):
    """Selects at most `num` outcomes, in order; each candidate's latest outcome has priority over earlier ones.

    If there are too many candidates, it keeps those with the best and the latest outcomes.
    """
    if len(seen) <= num:
        return seen
    last = np.array(sorted({candidate: i for i, (candidate, _, _) in enumerate(seen)}.values()))
    kept = last[best_and_latest(np.array([seen[i][2] for i in last]), num)]
    others = np.setdiff1d(np.arange(len(seen)), last)
    return [seen[i] for i in np.union1d(kept, others[max(len(others) + len(kept) - num, 0) :])]


def _padded(seen, max_seen: int = _MAX_SEEN) -> _curves.Observed:
    """Selects at most `max_seen` outcomes, and pads them to a power of two, at least 32, so that JAX compiles few
    programs."""
    seen = _few(seen, max_seen)
    size = max(32, 1 << max(len(seen) - 1, 0).bit_length())
    candidate, fidelity, y = (np.array(column) for column in zip(*seen, strict=True)) if seen else (np.zeros(0),) * 3
    pad = (0, size - len(seen))
    return _curves.Observed(
        jnp.asarray(np.pad(candidate.astype(int), pad)),
        jnp.asarray(np.pad(fidelity.astype(int), pad)),
        jnp.asarray(np.pad(y.astype(float), pad), jnp.result_type(float)),
        jnp.asarray(np.pad(np.ones(len(seen)), pad), jnp.result_type(float)),
    )
