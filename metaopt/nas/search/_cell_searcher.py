"""A searcher h of cells: computes predictions and suggestions from the parts that `train_cell_searcher` learned."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.blackbox._earlier_trials import as_records, candidate_key, full_loss, partial_fidelity
from metaopt.blackbox._new_task import features_of
from metaopt.nas.search import _cell_encoder, _score_prior

# Variances relative to the noise variance, from which `score_prior` chooses.
_DIGITS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_PAIRS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_LEARNED = (1e-2, 1.0, 100.0)


class PredictCellFn(Protocol):
    def __call__(self, new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
        """Returns the best candidate, or the one to try next, given trials on the new task."""
        ...


class CellPosteriorFn(Protocol):
    def __call__(self, new_task: Any = None, trials: Iterable[base.Record] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and the variance of the candidates' scores, [candidates] each."""
        ...


class CellSearcher(NamedTuple):
    """The searcher that `train_cell_searcher` returns.

    `new_task` has the same forms as for `blackbox.MetaOptimizer`; None means that nothing is known about the task.

    Trials of the new task are records of candidates, or a data frame of them. Only failed trials, and complete trials
    at full fidelity, are evidence about scores. A complete trial without a finite outcome counts as failed. If the
    trials have outcomes, but all at lower fidelities and without a failure, a warning says so. A failure counts only if
    no other trial of the same candidate ended. A candidate with a trial of any status and fidelity is not proposed
    again as long as there are untried candidates. `metaopt.save` writes the searcher to disk, and `metaopt.load` reads
    it.

    Attributes:
      predict: `(new_task=None, trials=()) -> configuration`, a*: the candidate with the largest expected score.
        Candidates that failed are excluded, unless all failed.
      suggest: `(new_task, trials) -> configuration` to try next: the candidate with the largest expected improvement.
      searcher: `(new_task) -> Searcher` that asks for the suggestions of `suggest`; the space of its `init` may be
        None. It ignores reported trials of configurations that are not candidates. `predict`, `suggest` and
        `posterior` reject them.
      posterior: `(new_task, trials) -> (mean, variance)` of the candidates' scores. Without trials and without
        knowledge of the task, the mean is the mean of `prior`. If the task has features, they change the encoder's mean
        score, and `slope` times this change is added.
      scores: `(new_task) -> [members, candidates]` from the encoder only, larger is better. The scores of each member
        have mean 0 and variance 1 over the candidates. Their spread shows how far members agree.
      prior: the prior from the earlier tasks. Its `mean` is the average of an architecture's scores there, shrunk
        towards the predictions of the encoder and of a linear model of entries and their pairs. The weights of this
        shrinkage were chosen by leaving out one earlier task at a time. If no task tried an architecture, its mean has
        only these predictions.
      slope: [] the weight of the change that features cause in the encoder's mean score; 0 if features did not improve
        the choice on earlier tasks.
      encoded: [members, candidates, width], z: features of architectures in which a member's scores are linear.
      encoder: the encoder of cells.
      meta_params: the encoder's weights, leaves [members, ...].
      candidates: the architectures to choose from.
      ops: the names of the ops of the encoder's cells.
      center: [F] means of the features over the training tasks.
      scale: [F] standard deviations of the same features. The encoder reads (features − center) / scale, 0 where
        unknown.
    """

    predict: PredictCellFn
    suggest: PredictCellFn
    searcher: Callable[..., base.Searcher]
    posterior: CellPosteriorFn
    scores: Callable[..., np.ndarray]
    prior: _score_prior.ScorePrior
    slope: np.ndarray
    encoded: np.ndarray
    encoder: _cell_encoder.CellEncoder
    meta_params: base.PyTree
    candidates: list[dict[str, Any]]
    ops: tuple[str, ...]
    center: np.ndarray
    scale: np.ndarray


class CellSearcherState(NamedTuple):
    """State carried from one call to the next.

    Attributes:
      seed: the seed of the search, from which the trials' seeds are derived.
      trials: the reported trials, and trials that have been asked for and not yet reported.
      num_asked: number of trials that have been asked for.
    """

    seed: tuple[int, ...]
    trials: tuple[base.Record, ...]
    num_asked: int


def cell_searcher(
    encoded: np.ndarray,
    encoder: _cell_encoder.CellEncoder,
    meta_params: base.PyTree,
    candidates: list[dict[str, Any]],
    ops: tuple[str, ...],
    center: np.ndarray,
    scale: np.ndarray,
    prior: _score_prior.ScorePrior,
    slope: np.ndarray,
) -> CellSearcher:
    """Builds the searcher from its learned parts, which `CellSearcher` describes."""
    rows = {candidate_key(candidate): row for row, candidate in enumerate(candidates)}
    coefficients = functools.partial(members_coefficients(encoder), meta_params)
    model = _Model(encoded, coefficients, candidates, rows, center, scale, prior, slope)
    return CellSearcher(
        predict=functools.partial(_predict, model),
        suggest=functools.partial(_suggest, model),
        searcher=functools.partial(_searcher, model),
        posterior=functools.partial(_posterior, model),
        scores=functools.partial(_scores, model),
        prior=prior,
        slope=slope,
        encoded=encoded,
        encoder=encoder,
        meta_params=meta_params,
        candidates=candidates,
        ops=ops,
        center=center,
        scale=scale,
    )


class _Model(NamedTuple):
    """The inputs of all predictions. The fields without a comment are those of `CellSearcher`."""

    encoded: np.ndarray
    coefficients: Callable  # standardized features [F] -> [members, width]
    candidates: list[dict[str, Any]]
    rows: dict[tuple, int]  # a candidate's key -> its index
    center: np.ndarray
    scale: np.ndarray
    prior: _score_prior.ScorePrior
    slope: np.ndarray


class _Evidence(NamedTuple):
    """The results of trials on the new task.

    Attributes:
      rows: [k] indices of the candidates with a result.
      losses: [k] their losses, infinite if all trials of the candidate failed.
      started: indices of all candidates that have a trial.
    """

    rows: list[int]
    losses: np.ndarray
    started: list[int]


# ---- Scores ---------------------------------------------------------------------------------------------------------


def _scores(model: _Model, new_task: Any = None) -> np.ndarray:
    """The encoder's scores for a task, [members, candidates]."""
    features = features_of(new_task)
    if features is None:
        features = np.full(len(model.center), np.nan)
    if np.shape(features) != np.shape(model.center):
        raise ValueError(
            f"A new task must have features of shape [{len(model.center)}]; got shape {np.shape(features)}."
        )
    with np.errstate(over="ignore"):
        standard = ((np.asarray(features, float) - model.center) / model.scale).astype(jnp.result_type(float))
    # As in training, infinite features count as unknown. Otherwise every score would be NaN, and the first candidate
    # would be chosen.
    coefficients = model.coefficients(jnp.asarray(np.where(np.isfinite(standard), standard, 0)))
    return standardized(coefficients, model.encoded, model.encoded)


def _task_prior(model: _Model, new_task: Any) -> _score_prior.ScorePrior:
    """The prior for a new task: its features shift the mean."""
    any_task, this_task = (_scores(model, task).mean(0) for task in (None, new_task))
    return model.prior._replace(mean=model.prior.mean + model.slope * (this_task - any_task))


# ---- Trials on the new task -----------------------------------------------------------------------------------------


def _row(model: _Model, record: base.Record) -> int | None:
    """The index of a trial's candidate; None if it is not a candidate."""
    try:
        return model.rows.get(candidate_key(record.configuration))
    except TypeError:  # unhashable
        return None


def _evidence(model: _Model, trials: Iterable[base.Record]) -> _Evidence:
    rows, losses, started = [], [], []
    for record in trials:
        row = _row(model, record)
        if row is None:
            raise ValueError(f"A trial must be one of the candidates; got {record.configuration}.")
        started.append(row)
        if (loss := full_loss(record)) is not None:
            rows.append(row)
            losses.append(np.inf if np.isnan(loss) else loss)
    # A candidate with one trial that ended has not failed.
    ended = {row for row, loss in zip(rows, losses, strict=True) if loss < np.inf}
    kept = [i for i, row in enumerate(rows) if losses[i] < np.inf or row not in ended]
    return _Evidence([rows[i] for i in kept], np.array([losses[i] for i in kept]), started)


def _checked(trials: Iterable[base.Record]) -> list[base.Record]:
    """Checks a caller's trials, and warns if they carry no information about scores."""
    trials = as_records(trials, "trials")
    if any(map(partial_fidelity, trials)) and all(full_loss(record) is None for record in trials):
        warnings.warn(
            "The `trials` have no outcome of a complete trial at fidelity 1, the full budget, so they do not change "
            "the scores. Give your largest budget the fidelity 1.",
            stacklevel=3,
        )
    return trials


def _best(model: _Model, prior: _score_prior.ScorePrior, trials: Iterable[base.Record]) -> dict[str, Any]:
    """The candidate with the largest expected score among those that have not failed, or among all if all failed."""
    rows, losses, _ = _evidence(model, trials)
    mean = _score_prior.score_posterior(prior, rows, losses)[0].copy()
    failed = np.array(rows, int)[np.isinf(losses)]
    if len(set(failed.tolist())) < len(mean):
        mean[failed] = -np.inf
    return dict(model.candidates[int(mean.argmax())])


def _next(model: _Model, prior: _score_prior.ScorePrior, trials: Iterable[base.Record]) -> dict[str, Any]:
    """The candidate without a trial that has the largest expected improvement."""
    rows, losses, started = _evidence(model, trials)
    gain = _score_prior.score_improvement(prior, rows, losses)
    gain[started] = -np.inf
    if not np.isfinite(gain).any():  # all candidates were tried
        return _best(model, prior, trials)
    return dict(model.candidates[int(gain.argmax())])


# ---- The functions of `CellSearcher` --------------------------------------------------------------------------------


def _posterior(
    model: _Model, new_task: Any = None, trials: Iterable[base.Record] = ()
) -> tuple[np.ndarray, np.ndarray]:
    evidence = _evidence(model, _checked(trials))
    return _score_prior.score_posterior(_task_prior(model, new_task), evidence.rows, evidence.losses)


def _predict(model: _Model, new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
    return _best(model, _task_prior(model, new_task), _checked(trials))


def _suggest(model: _Model, new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
    return _next(model, _task_prior(model, new_task), _checked(trials))


def _searcher(model: _Model, new_task: Any = None) -> base.Searcher:
    prior = _task_prior(model, new_task)

    def init(key, space):
        del space
        return CellSearcherState(tuple(int(word) for word in np.ravel(jax.random.key_data(key))), (), 0)

    def ask(state, num):
        trials = []
        for _ in range(num):
            seed = int(np.random.default_rng((*state.seed, state.num_asked)).integers(2**31))
            best = _next(model, prior, state.trials)
            trials.append(base.Record("", best, seed=seed, status="WAITING", trial=state.num_asked))
            state = state._replace(trials=(*state.trials, trials[-1]), num_asked=state.num_asked + 1)
        return trials, state

    def tell(state, records):
        pending = ("WAITING", "RUNNING")
        records = [record for record in as_records(records) if _row(model, record) is not None]
        ended = {record.trial for record in records if record.status not in pending}
        before = [r for r in state.trials if r.status not in pending or r.trial not in ended]
        return state._replace(trials=(*before, *records))

    return base.Searcher(init, ask, tell)


# ---- Shared with training and files ---------------------------------------------------------------------------------


def members_coefficients(encoder):
    """`(meta_params, features) -> [members, width]`."""
    return jax.jit(jax.vmap(encoder.coefficients, in_axes=(0, None)))


def standardized(coefficients, encoded, reference_encoded) -> np.ndarray:
    """Returns [members, architectures] scores of `encoded`.

    They are shifted and scaled so that each member's scores of `reference_encoded` have mean 0 and variance 1.
    """
    c = np.asarray(coefficients, np.float64)
    scores, reference = (np.einsum("maw,mw->ma", z, c) for z in (encoded, reference_encoded))
    return (scores - reference.mean(1, keepdims=True)) / (reference.std(1, keepdims=True) + 1e-12)


def columns(
    configurations: Sequence[Mapping[str, Any]],
    encoded: np.ndarray,
    pool: Sequence[Mapping[str, Any]],
    pool_encoded: np.ndarray,
) -> list[tuple[np.ndarray, tuple[float, ...]]]:
    """Blocks for `score_prior`: entries, pairs of entries, and encodings standardized over the pool."""
    digits, pairs = _score_prior.configuration_columns(configurations, pool)
    flat = lambda z: np.concatenate(list(z), 1)
    learned, pool_learned = flat(encoded), flat(pool_encoded)
    varying = pool_learned.std(0) > 0
    learned = (learned - pool_learned.mean(0))[:, varying]
    learned /= pool_learned.std(0)[varying] * np.sqrt(learned.shape[1])
    return [(digits, _DIGITS), (pairs, _PAIRS), (learned, _LEARNED)]
