"""A searcher h, learned from records of earlier searches by an encoder of cells and task features.

`train_cell_searcher` trains it.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base, blackbox, hypergrad, training
from metaopt.blackbox._earlier_trials import as_records, by_task, features_by_task, full_loss, partial_fidelity, some
from metaopt.blackbox._meta_search import features_of
from metaopt.blackbox._new_trials import as_configurations
from metaopt.nas import _genotypes
from metaopt.nas.search import _cell_encoder, _score_prior

_AT_ONCE = 2048  # cells per encoding batch


# Variances relative to the noise variance, from which `nas.score_prior` chooses.
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

    A new task is given as for `MetaOptimizer`; None means that nothing is known about it.

    Trials of the new task are records of candidates, or a data frame of them. Only failed trials, and complete trials
    at full fidelity, are evidence about scores. A complete trial without a finite outcome counts as failed. If the
    trials have outcomes, but all at lower fidelities and without a failure, a warning says so. A failure counts only if
    no other trial of the same candidate ended. A candidate with a trial of any status and fidelity is not proposed
    again while there are others. `metaopt.save` writes the searcher to disk, and `metaopt.load` reads it.

    Attributes:
      predict: `(new_task, trials) -> configuration`, a*: the candidate with the largest expected score. Candidates that
        failed are excluded, unless all failed.
      suggest: `(new_task, trials) -> configuration` to try next: the candidate with the largest expected improvement.
      searcher: `(new_task) -> Searcher` that asks for the suggestions of `suggest`; the space of its `init` may be
        None. It ignores reported trials of configurations that are not candidates. `predict`, `suggest` and
        `posterior` reject them.
      posterior: `(new_task, trials) -> (mean, variance)` of the candidates' scores (`nas.score_posterior`).
        Without trials and without knowledge of the task, the mean averages two predictions. One comes from the
        encoder's `scores`, in units of the earlier tasks' scores. The other comes from the entries of configurations
        and their pairs. For a task with features, the change that they cause in the encoder's prediction is added.
      scores: `(new_task) -> [members, candidates]` from the encoder only, larger is better. The scores of each member
        have mean 0 and variance 1 over the candidates. Their spread shows how far members agree.
      prior: the prior from the earlier tasks. Its `mean` uses only the entries of configurations and their pairs.
      units: [2] (a, b): the encoder expects a score of a + b · mean over members of `scores`.
      encoded: [members, candidates, width], z: features of architectures in which a member's scores are linear.
      encoder: the encoder of cells.
      meta_params: the encoder's weights, leaves [members, ...].
      candidates: the architectures to choose from.
      ops: the ops that `nas.cells` needs to make cells for the encoder, besides
        `encoder.config["num_vertices"]`.
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
    units: np.ndarray
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


def train_cell_searcher(
    records: Iterable[base.Record],
    graph_fn: Callable[[dict[str, Any]], _genotypes.Graph],
    *,
    features: Mapping[str, Any] | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    tests: Iterable[base.Record] | None = None,
    width: int = 32,
    num_layers: int = 2,
    num_members: int = 4,
    num_steps: int = 300,
    batch_size: int = 128,
    rate: float = 3e-3,
    progress: bool | None = None,
    key: jax.Array | None = None,
) -> CellSearcher:
    """Learns from architectures × tasks × outcomes which architecture to use, and which to try, on a new task.

        min_φ mean_t L(score(·, t; φ), y_t),    L: `nas.cell_ranking_loss` over a batch of architectures

    It runs `training.fit` over `hypergrad.direct` for an ensemble, whose members have their own initializations and
    random draws. In half of the steps, a member does not see the features of tasks. It thereby learns to rank for a
    task about which nothing is known.

    The encoder's prediction for an unknown task is averaged with that of a linear model, whose inputs are the entries
    of configurations and their pairs (`nas.configuration_columns`). Trials on the new task update the result by
    Gaussian conditioning, in the features of both models (`nas.score_prior`).

    `train_meta_searcher` compares configurations digit by digit. Here, the encoder treats isomorphic cells as equal,
    and knowledge about an op applies at every position of the cell.

    Args:
      records: trials of earlier tasks, or a data frame of them (`blackbox.records_to_frame`). Complete trials at full
        fidelity count, and their outcomes are averaged over seeds. Failed trials count too: an architecture whose
        trials on a task all failed ranks there below all architectures whose trials ended. A complete trial without
        a finite outcome has failed, so an architecture that was never tried must have no record
        (`nas.benchmark_records` writes none for a table's NaN). A warning names tasks that have outcomes, but none
        at the full budget. Tasks whose trials all have the same outcome carry no ranking and are left out.
      graph_fn: returns the cell of a configuration, such as `nas.benchmark_graph` of its digits.
      features: task name -> [F] numbers, NaN where unknown. Tasks without an entry are entirely unknown. A warning is
        given if some tasks have no entry and some entries belong to no task.
      candidates: architectures to choose from; by default, all architectures in the records.
      tests: records of the same trials whose outcomes are losses that no search sees. The part of the validation
        outcomes that they do not share is treated as noise. By default, validation is treated as free of noise, and
        differences between tasks as real. Trials without such a record are left out of this estimate.
      width: width of the encoder, a multiple of 4.
      num_layers: layers of the encoder.
      num_members: members of the ensemble.
      num_steps: steps of Adam, whose rate falls to zero on a cosine schedule.
      batch_size: architectures per step.
      rate: Adam's rate at the start.
      progress: as for `training.fit`.
      key: the source of all randomness; `jax.random.key(0)` by default.

    Returns:
      A `CellSearcher`. Training takes about num_members times the memory that `nas.cell_encoder` states for a
      batch.

    Raises:
      ValueError: if a size is out of range; if a record is invalid (unknown status, fidelity outside (0, 1], or
        non-numeric outcome). Also if no record has an outcome, or all outcomes of every task are equal. Also if
        `candidates` is empty, or if a configuration has a list or array among its values. Also if the features of a
        task are a mapping, if features have different lengths, or if all belong to other tasks than the records.
        Also if no trial of `records` is in `tests`.

    Example: a table of nine cells on three tasks, which agree that a path of two MLPs is best:

    >>> import itertools
    >>> from metaopt import base, nas
    >>> ops = ("none", "skip_connect", "mlp")
    >>> cells = [{"0->1": first, "1->2": second} for first, second in itertools.product(ops, ops)]
    >>> graph = lambda cell: nas.edge_graph([(0, 1, cell["0->1"]), (1, 2, cell["1->2"])], output=(2,))
    >>> value = {"none": 0.0, "skip_connect": 0.1, "mlp": 0.2}
    >>> error = lambda cell, easy: 1 - easy * (2 * value[cell["0->1"]] + value[cell["1->2"]])
    >>> records = [base.Record(f"task {easy}", cell, error(cell, easy)) for easy in (0.5, 0.7, 0.9) for cell in cells]
    >>> sizes = {"width": 8, "num_layers": 1, "num_members": 2, "num_steps": 20, "batch_size": 9}
    >>> h = nas.train_cell_searcher(records, graph, progress=False, **sizes)
    >>> h.predict()  # a*, without a trial on the new task
    {'0->1': 'mlp', '1->2': 'mlp'}
    >>> failed = base.Record("new", h.predict(), status="FAIL")
    >>> h.predict(trials=[failed])
    {'0->1': 'mlp', '1->2': 'skip_connect'}
    """
    for name, value in (("num_members", num_members), ("batch_size", batch_size)):
        _checks.check_integer(name, value, 1)
    _checks.check_integer("num_steps", num_steps, 0)
    _checks.check_positive("rate", rate)
    if candidates is not None and not len(candidates := as_configurations("candidates", candidates)):
        raise ValueError(
            "`candidates` must contain an architecture, or be None to use those of the records; it is empty."
        )
    for i, candidate in enumerate(candidates or ()):
        _check_values(f"`candidates[{i}]`", candidate)
    records = _as_records(records)
    of_records = {_name(record.configuration): dict(record.configuration) for record in records}
    places = {name: np.array(row) for row, name in enumerate(of_records)}
    row_of = lambda configuration: places.get(_name(configuration), np.array(len(places)))  # last row: only in `tests`
    names, trials = by_task(records, row_of)
    of_tests = None if tests is None else by_task(_as_records(tests, "tests"), row_of, "tests")
    known, center, scale = _standardized_features(features_by_task(names, features), len(names))
    outcomes = _losses(trials, len(of_records))
    test_outcomes = None if of_tests is None else _same(*of_tests, names, outcomes)
    rows = np.isfinite(outcomes).any(1)  # False: tried only on tasks that are left out, or not to the end
    tried = {name: c for (name, c), row in zip(of_records.items(), rows, strict=True) if row}
    outcomes, test_outcomes = outcomes[rows], None if test_outcomes is None else test_outcomes[rows]
    pool = list(of_records.values()) if candidates is None else [dict(c) for c in candidates]
    every = tried | {_name(c): c for c in pool if _name(c) not in tried}
    graphs = [graph_fn(c) for c in every.values()]
    ops = sorted({op for graph in graphs for op in graph.ops})
    most = max(len(graph.ops) for graph in graphs)
    cells = _cell_encoder.cells(graphs, ops, num_vertices=most)
    seen = jax.tree.map(lambda x: x[: len(tried)], cells)

    encoder = _cell_encoder.cell_encoder(
        len(ops), most, num_features=known.shape[1], width=width, num_layers=num_layers
    )

    def member_loss(meta_params, data, key):
        row_key, blind_key = jax.random.split(key)
        cells, outcomes, features = data
        rows = jax.random.randint(row_key, (batch_size,), 0, len(outcomes))
        z = encoder.encode(meta_params, jax.tree.map(lambda x: x[rows], cells))
        features = jnp.where(jax.random.bernoulli(blind_key), features, 0)

        def of_task(features, outcomes):
            return _cell_encoder.cell_ranking_loss(z @ encoder.coefficients(meta_params, features), outcomes)

        return jax.vmap(of_task)(features, outcomes[rows].T).mean()

    def loss(meta_params, data, key):
        return jax.vmap(member_loss, in_axes=(0, None, 0))(meta_params, data, jax.random.split(key, num_members)).sum()

    init_key, fit_key = jax.random.split(jax.random.key(0) if key is None else key)
    start = jax.vmap(encoder.init)(jax.random.split(init_key, num_members))
    data = seen, jnp.asarray(outcomes, jnp.result_type(float)), known
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max(num_steps, 1)))
    learner = training.learner(hypergrad.direct(loss), optimizer)
    fitted = training.fit(
        learner,
        lambda key: data,
        hyperparams=start,
        num_steps=num_steps,
        key=fit_key,
        progress=progress,
    )

    @jax.jit
    def encode(meta_params, cells):
        one = lambda cell: encoder.encode(meta_params, jax.tree.map(lambda x: x[None], cell))[0]
        return jax.lax.map(one, cells, batch_size=min(_AT_ONCE, len(cells.ops)))

    members = [jax.tree.map(lambda x, i=i: x[i], fitted.hyperparams) for i in range(num_members)]
    encoded = np.stack([np.asarray(encode(member, cells), np.float64) for member in members])  # tried and candidates
    at = {name: row for row, name in enumerate(every)}
    rows = [at[_name(c)] for c in pool]
    offered = np.ascontiguousarray(encoded[:, rows])
    c = _coefficients(encoder)(fitted.hyperparams, jnp.zeros(len(center)))
    found = _standardized(c, encoded, offered).mean(0)[: len(tried)]
    blocks = columns(list(every.values()), encoded, pool, offered)
    prior, units = _prior(blocks, outcomes, test_outcomes, found)
    of_rows = {name: getattr(prior, name)[rows] for name in ("features", "mean", "spread", "alone")}
    prior = prior._replace(**of_rows)
    return cell_searcher(offered, encoder, fitted.hyperparams, pool, tuple(ops), center, scale, prior, units)


def _prior(blocks, outcomes, tests, found) -> tuple[_score_prior.ScorePrior, np.ndarray]:
    """Returns the prior for all architectures, the first of which were tried, and the units of the encoder's scores.

    `found` are the encoder's scores of the tried architectures. The prior's mean uses only entries and their pairs. The
    units convert the encoder's scores to the same scale.
    """
    num_tried, num_tasks = outcomes.shape
    scores = np.full((2, len(blocks[0][0]), num_tasks), np.nan)
    for to, losses in zip(scores, (outcomes, outcomes if tests is None else tests), strict=True):
        for t, column in enumerate(losses.T):
            told = np.flatnonzero(np.isfinite(column))
            to[told, t] = _score_prior.normal_scores(column[told])
    entries, prior = (_score_prior.score_prior(some, *scores) for some in (blocks[:2], blocks))
    shared = np.nanmean(scores[0, :num_tried], 1)
    slope = np.cov(found, shared)[0, 1] / max(found.var(ddof=1), 1e-12) if num_tried > 1 else 0.0
    return prior._replace(mean=entries.mean), np.array([shared.mean() - slope * found.mean(), slope])


def columns(
    configurations: Sequence[Mapping[str, Any]],
    encoded: np.ndarray,
    pool: Sequence[Mapping[str, Any]],
    pool_encoded: np.ndarray,
) -> list[tuple[np.ndarray, tuple[float, ...]]]:
    """Blocks for `nas.score_prior`: entries, pairs of entries, and encodings standardized over the pool."""
    digits, pairs = _score_prior.configuration_columns(configurations, pool)
    flat = lambda z: np.concatenate(list(z), 1)
    learned, among = flat(encoded), flat(pool_encoded)
    moves = among.std(0) > 0
    learned = (learned - among.mean(0))[:, moves]
    learned /= among.std(0)[moves] * np.sqrt(learned.shape[1])
    return [(digits, _DIGITS), (pairs, _PAIRS), (learned, _LEARNED)]


def _coefficients(encoder):
    """`(meta_params, features) -> [members, width]`."""
    return jax.jit(jax.vmap(encoder.coefficients, in_axes=(0, None)))


def _standardized(coefficients, encoded, among) -> np.ndarray:
    """Returns [members, architectures] scores. Over `among`, each member's scores have mean 0 and variance 1."""
    c = np.asarray(coefficients, np.float64)
    found, others = (np.einsum("maw,mw->ma", z, c) for z in (encoded, among))
    return (found - others.mean(1, keepdims=True)) / (others.std(1, keepdims=True) + 1e-12)


def cell_searcher(
    encoded: np.ndarray,
    encoder: _cell_encoder.CellEncoder,
    meta_params: base.PyTree,
    candidates: list[dict[str, Any]],
    ops: tuple[str, ...],
    center: np.ndarray,
    scale: np.ndarray,
    prior: _score_prior.ScorePrior,
    units: np.ndarray,
) -> CellSearcher:
    """Builds the searcher from its learned parts."""
    coefficients = _coefficients(encoder)
    at = {_name(candidate): row for row, candidate in enumerate(candidates)}

    def scores(new_task: Any = None) -> np.ndarray:
        given = features_of(new_task)
        if given is None:
            given = np.full(len(center), np.nan)
        if np.shape(given) != np.shape(center):
            raise ValueError(f"A new task must have features of shape [{len(center)}]; got shape {np.shape(given)}.")
        given = jnp.asarray(np.nan_to_num((np.asarray(given, float) - center) / scale), jnp.result_type(float))
        return _standardized(coefficients(meta_params, given), encoded, encoded)

    def for_task(new_task):
        anywhere, here = (scores(task).mean(0) for task in (None, new_task))
        mean = (prior.mean + units[0] + units[1] * anywhere) / 2
        return prior._replace(mean=mean + units[1] * (here - anywhere))

    def row_of(record):
        try:
            return at.get(_name(record.configuration))
        except TypeError:  # unhashable, so it is not a candidate
            return None

    def told(trials):
        """Returns the rows with a result, their losses, and all rows that have a trial."""
        tried, losses, begun = [], [], []
        for record in trials:
            row = row_of(record)
            if row is None:
                raise ValueError(f"A trial must be one of the candidates; got {record.configuration}.")
            begun.append(row)
            if (loss := full_loss(record)) is not None:
                tried.append(row)
                losses.append(np.inf if np.isnan(loss) else loss)
        # A candidate with one trial that ended has not failed.
        ended = {row for row, loss in zip(tried, losses, strict=True) if loss < np.inf}
        says = [i for i, row in enumerate(tried) if losses[i] < np.inf or row not in ended]
        return [tried[i] for i in says], np.array([losses[i] for i in says]), begun

    def given(trials):
        """Checks a caller's trials, and warns if they carry no information about scores."""
        trials = as_records(trials, "trials")
        if any(map(partial_fidelity, trials)) and all(full_loss(record) is None for record in trials):
            warnings.warn(
                "The `trials` have no outcome of a complete trial at fidelity 1, the full budget, so they do not "
                "change the scores. Give your largest budget the fidelity 1.",
                stacklevel=3,
            )
        return trials

    def posterior(new_task: Any = None, trials: Iterable[base.Record] = ()) -> tuple[np.ndarray, np.ndarray]:
        return _score_prior.score_posterior(for_task(new_task), *told(given(trials))[:2])

    def predict(new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
        return best_of(for_task(new_task), given(trials))

    def suggest(new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
        return next_of(for_task(new_task), given(trials))

    def best_of(prior, trials):
        tried, losses, _ = told(trials)
        mean = _score_prior.score_posterior(prior, tried, losses)[0].copy()
        failed = np.array(tried, int)[np.isinf(losses)]
        if len(set(failed.tolist())) < len(mean):
            mean[failed] = -np.inf
        return dict(candidates[int(mean.argmax())])

    def next_of(prior, trials):
        tried, losses, begun = told(trials)
        gain = _score_prior.score_improvement(prior, tried, losses)
        gain[begun] = -np.inf
        if not np.isfinite(gain).any():  # all candidates were tried
            return best_of(prior, trials)
        return dict(candidates[int(gain.argmax())])

    def searcher(new_task: Any = None) -> base.Searcher:
        expected = for_task(new_task)

        def init(key, space):
            del space
            return CellSearcherState(tuple(int(word) for word in np.ravel(jax.random.key_data(key))), (), 0)

        def ask(state, num):
            asked = []
            for _ in range(num):
                seed = int(np.random.default_rng((*state.seed, state.num_asked)).integers(2**31))
                best = next_of(expected, state.trials)
                asked.append(base.Record("", best, seed=seed, status="WAITING", trial=state.num_asked))
                state = state._replace(trials=(*state.trials, asked[-1]), num_asked=state.num_asked + 1)
            return asked, state

        def tell(state, records):
            records = [record for record in as_records(records) if row_of(record) is not None]
            ended = {record.trial for record in records if record.status not in ("WAITING", "RUNNING")}
            before = [r for r in state.trials if r.status not in ("WAITING", "RUNNING") or r.trial not in ended]
            return state._replace(trials=(*before, *records))

        return base.Searcher(init, ask, tell)

    return CellSearcher(
        predict,
        suggest,
        searcher,
        posterior,
        scores,
        prior,
        units,
        encoded,
        encoder,
        meta_params,
        candidates,
        ops,
        center,
        scale,
    )


def _name(configuration: Mapping[str, Any]) -> tuple:
    return tuple(sorted(configuration.items()))


def _as_records(given: Any, name: str = "records") -> list[base.Record]:
    records = as_records(given, name)
    for i, record in enumerate(records):
        _check_values(f"`{name}[{i}]`'s configuration", record.configuration)
    return records


def _check_values(place: str, configuration: Mapping[str, Any]) -> None:
    """Raises ValueError if a configuration cannot be looked up."""
    try:
        hash(_name(configuration))
    except TypeError:
        raise ValueError(
            f"{place} must map strings to values such as numbers and strings; got "
            f"{dict(configuration)!r}. Give each entry of a list its own name."
        ) from None


def _losses(trials: list[blackbox.TaskTrials], num: int) -> np.ndarray:
    """Returns [num, T] mean losses of trials that ended: NaN if not tried, worse than all others if no trial ended."""
    losses = np.full((num, len(trials)), np.nan)
    for column, (rows, y) in zip(losses.T, trials, strict=True):
        ended = np.isfinite(y)
        count, total = np.bincount(rows[ended], minlength=num), np.bincount(rows[ended], y[ended], num)
        column[count > 0] = total[count > 0] / count[count > 0]
        # The ranking loss has no flag for failures, so a failure needs a loss.
        worst = np.nanmax(column)
        column[np.setdiff1d(rows, rows[ended])] = worst + 1 + abs(worst)
    return losses


def _same(of_tasks, trials, names, outcomes) -> np.ndarray:
    """Returns [A, T] outcomes of the same configurations and tasks in other records, NaN where they have none."""
    losses = dict(zip(of_tasks, _losses(trials, len(outcomes) + 1)[:-1].T, strict=True))
    nothing = np.full(len(outcomes), np.nan)
    found = np.stack([losses.get(name, nothing) for name in names], 1)
    if not np.isfinite(outcomes + found).any():
        raise ValueError(
            "`tests` and `records` must share tasks and configurations, but no configuration has a trial on the same "
            f"task in both. The tasks of `tests` are {some(of_tasks)}, those of `records` {some(names)}."
        )
    return found


def _standardized_features(raw: np.ndarray | None, num_tasks: int) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Returns features [T, F] of mean 0 and variance 1 over tasks, 0 where unknown; and means and deviations [F]."""
    if raw is None:
        return jnp.zeros((num_tasks, 0)), np.zeros(0), np.ones(0)
    known = np.isfinite(raw)
    count = np.maximum(known.sum(0), 1)
    center = np.where(known, raw, 0).sum(0) / count
    scale = np.sqrt((np.where(known, raw - center, 0) ** 2).sum(0) / count)
    scale = np.where(scale > 0, scale, 1.0)
    return jnp.asarray(np.where(known, (raw - center) / scale, 0), jnp.result_type(float)), center, scale
