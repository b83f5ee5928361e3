"""h from records of earlier searches, by an encoder of cells crossed with the task: `train_cell_searcher`."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, nas, predictors, training
from metaopt.methods._earlier_trials import as_records, by_task, features_by_task, full_loss, partial_fidelity, some
from metaopt.methods._meta_search import features_of
from metaopt.methods._new_trials import as_configurations

_AT_ONCE = 2048  # cells that are encoded together


# Variances over that of the noise that `predictors.score_prior` chooses from.
_DIGITS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_PAIRS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_LEARNED = (1e-2, 1.0, 100.0)


class PredictCellFn(Protocol):
    def __call__(self, new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
        """The candidate that is best, or to be tried next, given what came of trials on the new task."""
        ...


class CellPosteriorFn(Protocol):
    def __call__(self, new_task: Any = None, trials: Iterable[base.Record] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the variance of the candidates' scores, [candidates] each."""
        ...


class CellSearcher(NamedTuple):
    """What `train_cell_searcher` returns. A new task is given as for `MetaOptimizer`; None: nothing is known of it.

    Trials of the new task are records of candidates, or a data frame of them: complete ones at full fidelity, and
    failed ones, those without a finite outcome among them; others say nothing of scores, and a warning says so where
    there are no more. A failure counts where no other trial of the same candidate ended. Whatever its status and
    fidelity, what has a trial is not proposed again while another is left. `save_cell_searcher` and
    `load_cell_searcher` keep it on disk.

    Attributes:
      predict: `(new_task, trials) -> configuration`, a*: the candidate with the largest expected score, of those that
        have not failed where there is one.
      suggest: `(new_task, trials) -> configuration` to try next: the one with the most expected improvement.
      searcher: `(new_task) -> Searcher` that asks for what `suggest` says; the space of its `init` may be None. Told of
        others' trials, it passes over those of no candidate, which `predict`, `suggest` and `posterior` refuse.
      posterior: `(new_task, trials) -> (mean, variance)` of the candidates' scores (`predictors.score_posterior`).
        Without trials, and for a task of which nothing is known, the mean is that of two: of what the encoder's
        `scores` say, in units of the earlier tasks' scores, and of what the entries of configurations and their pairs
        do. What the encoder makes of a task's features is added.
      scores: `(new_task) -> [members, candidates]` by the encoder alone, larger is better, each member's of mean 0 and
        variance 1 over the candidates. Their spread says how far members agree.
      prior: what the earlier tasks say, `mean` by entries alone.
      units: [2] (a, b): the encoder expects a score of a + b · mean over members of `scores`.
      encoded: [members, candidates, width], z: features of architectures in which a member's scores are linear.
      encoder: of cells.
      meta_params: its weights, leaves [members, ...].
      candidates: the architectures that it chooses from.
      ops: what `predictors.cells` must be told, beside `encoder.config["num_vertices"]`, of cells for the encoder.
      center: [F] means of the features over the tasks that it learned from.
      scale: [F] their deviations. The encoder reads (features − center) / scale, 0 where unknown.
    """

    predict: PredictCellFn
    suggest: PredictCellFn
    searcher: Callable[..., base.Searcher]
    posterior: CellPosteriorFn
    scores: Callable[..., np.ndarray]
    prior: predictors.ScorePrior
    units: np.ndarray
    encoded: np.ndarray
    encoder: predictors.CellEncoder
    meta_params: base.PyTree
    candidates: list[dict[str, Any]]
    ops: tuple[str, ...]
    center: np.ndarray
    scale: np.ndarray


class CellSearcherState(NamedTuple):
    """Carried from one call to the next.

    Attributes:
      seed: of the search, which the trials' seeds follow from.
      trials: what was told, and what has been asked for and not told.
      num_asked: how many trials have been asked for.
    """

    seed: tuple[int, ...]
    trials: tuple[base.Record, ...]
    num_asked: int


def train_cell_searcher(
    records: Iterable[base.Record],
    graph_fn: Callable[[dict[str, Any]], nas.Graph],
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
    """Learns from architectures × tasks × outcomes which architecture to take for a new task, and which to try there.

        min_φ mean_t L(score(·, t; φ), y_t),    L: `predictors.cell_ranking_loss` over a batch of architectures

    by `training.fit` over `hypergrad.direct`, for an ensemble whose members start, and draw, by themselves. In half of
    the steps a member does not see the features of tasks, so that it ranks for a task of which nothing is known, too.

    What it expects of an unknown task is averaged with what a linear model of the entries of configurations and their
    pairs does (`predictors.configuration_columns`), and trials on the new task change it by Gaussian conditioning, in
    the features of both (`predictors.score_prior`). Beside `train_meta_searcher`, which compares configurations digit
    by digit: for the encoder isomorphic cells are one, and what is learned of an op serves wherever it stands.

    Args:
      records: trials of earlier tasks, or a data frame of them (`tasks.records_to_frame`): complete ones at full
        fidelity, whose outcomes are averaged over seeds, and failed ones: an architecture whose trials on a task all
        failed is worse there than all that ended. A complete trial without a finite outcome has failed, so that what
        was never tried must have no record (`nas.benchmark_records` writes none of a table's NaN). A warning names
        tasks that have an outcome, but none at the full budget; tasks whose trials all have one outcome say nothing of
        what is better, and are left out.
      graph_fn: the cell of a configuration, such as `nas.benchmark_graph` of its digits.
      features: task name -> [F] numbers, NaN where unknown; tasks without an entry are unknown altogether. A warning
        says where some have none, and some entries are of no task.
      candidates: architectures to choose from; by default, all that are in the records.
      tests: records of the same trials whose outcomes are losses that no search sees: what validation does not share
        with them is its noise. By default validation has none, and what tasks do not share is each one's own. Trials
        of which there is no such record are left out of this.
      width: of the encoder, a multiple of 4.
      num_layers: of the encoder.
      num_members: of the ensemble.
      num_steps: of Adam, whose rate falls to zero like a cosine.
      batch_size: architectures a step.
      rate: of Adam, at the start.
      progress: as for `training.fit`.
      key: what everything random follows from; `jax.random.key(0)` by default.

    Returns:
      A `CellSearcher`. Training takes memory of about num_members times what `predictors.cell_encoder` says for a
      batch.

    Raises:
      ValueError: a size is out of range; one of the records is none (an unknown status, a fidelity out of (0, 1], an
        outcome that is no number); no record has an outcome, or all outcomes of every task are equal; `candidates` is
        empty; a configuration has a list or array among its values; features are by name, have different lengths, or
        are of none of the records' tasks; no trial of `records` is in `tests`.

    Of a table of nine cells on three tasks, which agree that a path of two MLPs is best:

    >>> import itertools
    >>> from metaopt import base, methods, nas
    >>> ops = ("none", "skip_connect", "mlp")
    >>> cells = [{"0->1": first, "1->2": second} for first, second in itertools.product(ops, ops)]
    >>> graph = lambda cell: nas.edge_graph([(0, 1, cell["0->1"]), (1, 2, cell["1->2"])], output=(2,))
    >>> value = {"none": 0.0, "skip_connect": 0.1, "mlp": 0.2}
    >>> error = lambda cell, easy: 1 - easy * (2 * value[cell["0->1"]] + value[cell["1->2"]])
    >>> records = [base.Record(f"task {easy}", cell, error(cell, easy)) for easy in (0.5, 0.7, 0.9) for cell in cells]
    >>> sizes = {"width": 8, "num_layers": 1, "num_members": 2, "num_steps": 20, "batch_size": 9}
    >>> h = methods.train_cell_searcher(records, graph, progress=False, **sizes)
    >>> h.predict()  # a*, without a trial on the new task
    {'0->1': 'mlp', '1->2': 'mlp'}
    >>> failed = base.Record("new", h.predict(), status="FAIL")
    >>> h.predict(trials=[failed])
    {'0->1': 'mlp', '1->2': 'skip_connect'}
    """
    for name, value in (("num_members", num_members), ("batch_size", batch_size)):
        base.check_integer(name, value, 1)
    base.check_integer("num_steps", num_steps, 0)
    base.check_positive("rate", rate)
    if candidates is not None and not len(candidates := as_configurations("candidates", candidates)):
        raise ValueError(
            "`candidates` must hold an architecture, or be None to take those of the records; it is empty."
        )
    for i, candidate in enumerate(candidates or ()):
        _check_values(f"`candidates[{i}]`", candidate)
    records = _as_records(records)
    of_records = {_name(record.configuration): dict(record.configuration) for record in records}
    places = {name: np.array(row) for row, name in enumerate(of_records)}
    row_of = lambda configuration: places.get(_name(configuration), np.array(len(places)))  # of tests alone: the last
    names, trials = by_task(records, row_of)
    of_tests = None if tests is None else by_task(_as_records(tests, "tests"), row_of, "tests")
    known, center, scale = _standardized_features(features_by_task(names, features), len(names))
    outcomes = _losses(trials, len(of_records))
    test_outcomes = None if of_tests is None else _same(*of_tests, names, outcomes)
    rows = np.isfinite(outcomes).any(1)  # others were tried on tasks that say nothing, or not to the end
    tried = {name: c for (name, c), row in zip(of_records.items(), rows, strict=True) if row}
    outcomes, test_outcomes = outcomes[rows], None if test_outcomes is None else test_outcomes[rows]
    pool = list(of_records.values()) if candidates is None else [dict(c) for c in candidates]
    every = tried | {_name(c): c for c in pool if _name(c) not in tried}
    graphs = [graph_fn(c) for c in every.values()]
    ops = sorted({op for graph in graphs for op in graph.ops})
    most = max(len(graph.ops) for graph in graphs)
    cells = predictors.cells(graphs, ops, num_vertices=most)
    seen = jax.tree.map(lambda x: x[: len(tried)], cells)

    encoder = predictors.cell_encoder(len(ops), most, num_features=known.shape[1], width=width, num_layers=num_layers)

    def member_loss(meta_params, data, key):
        row_key, blind_key = jax.random.split(key)
        cells, outcomes, features = data
        rows = jax.random.randint(row_key, (batch_size,), 0, len(outcomes))
        z = encoder.encode(meta_params, jax.tree.map(lambda x: x[rows], cells))
        features = jnp.where(jax.random.bernoulli(blind_key), features, 0)

        def of_task(features, outcomes):
            return predictors.cell_ranking_loss(z @ encoder.coefficients(meta_params, features), outcomes)

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
    encoded = np.stack([np.asarray(encode(member, cells), np.float64) for member in members])  # of all
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


def _prior(blocks, outcomes, tests, found) -> tuple[predictors.ScorePrior, np.ndarray]:
    """What the tasks say of all architectures, the first of which were tried, and the units of `found` by the encoder.

    The mean is that by entries, of whose units those of the encoder are.
    """
    num_tried, num_tasks = outcomes.shape
    scores = np.full((2, len(blocks[0][0]), num_tasks), np.nan)
    for to, losses in zip(scores, (outcomes, outcomes if tests is None else tests), strict=True):
        for t, column in enumerate(losses.T):
            told = np.flatnonzero(np.isfinite(column))
            to[told, t] = predictors.normal_scores(column[told])
    entries, prior = (predictors.score_prior(some, *scores) for some in (blocks[:2], blocks))
    shared = np.nanmean(scores[0, :num_tried], 1)
    slope = np.cov(found, shared)[0, 1] / max(found.var(ddof=1), 1e-12) if num_tried > 1 else 0.0
    return prior._replace(mean=entries.mean), np.array([shared.mean() - slope * found.mean(), slope])


def columns(
    configurations: Sequence[Mapping[str, Any]],
    encoded: np.ndarray,
    pool: Sequence[Mapping[str, Any]],
    pool_encoded: np.ndarray,
) -> list[tuple[np.ndarray, tuple[float, ...]]]:
    """Blocks for `predictors.score_prior`: entries, their pairs, and what members make of a cell, as among the pool."""
    digits, pairs = predictors.configuration_columns(configurations, pool)
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
    """[members, architectures] scores, each member's of mean 0 and variance 1 over those of `among`."""
    c = np.asarray(coefficients, np.float64)
    found, others = (np.einsum("maw,mw->ma", z, c) for z in (encoded, among))
    return (found - others.mean(1, keepdims=True)) / (others.std(1, keepdims=True) + 1e-12)


def cell_searcher(
    encoded: np.ndarray,
    encoder: predictors.CellEncoder,
    meta_params: base.PyTree,
    candidates: list[dict[str, Any]],
    ops: tuple[str, ...],
    center: np.ndarray,
    scale: np.ndarray,
    prior: predictors.ScorePrior,
    units: np.ndarray,
) -> CellSearcher:
    """The searcher of what was learned."""
    coefficients = _coefficients(encoder)
    at = {_name(candidate): row for row, candidate in enumerate(candidates)}

    def scores(new_task: Any = None) -> np.ndarray:
        given = features_of(new_task)
        if given is None:
            given = np.full(len(center), np.nan)
        if np.shape(given) != np.shape(center):
            raise ValueError(f"A new task has [{len(center)}] features; got shape {np.shape(given)}.")
        given = jnp.asarray(np.nan_to_num((np.asarray(given, float) - center) / scale), jnp.result_type(float))
        return _standardized(coefficients(meta_params, given), encoded, encoded)

    def for_task(new_task):
        anywhere, here = (scores(task).mean(0) for task in (None, new_task))
        mean = (prior.mean + units[0] + units[1] * anywhere) / 2
        return prior._replace(mean=mean + units[1] * (here - anywhere))

    def row_of(record):
        try:
            return at.get(_name(record.configuration))
        except TypeError:  # of what has no hash, as no candidate does
            return None

    def told(trials):
        """What was tried with which losses, and all that has a trial."""
        tried, losses, begun = [], [], []
        for record in trials:
            row = row_of(record)
            if row is None:
                raise ValueError(f"A trial must be one of the candidates; got {record.configuration}.")
            begun.append(row)
            if (loss := full_loss(record)) is not None:
                tried.append(row)
                losses.append(np.inf if np.isnan(loss) else loss)
        # What ended with one seed has not failed.
        ended = {row for row, loss in zip(tried, losses, strict=True) if loss < np.inf}
        says = [i for i, row in enumerate(tried) if losses[i] < np.inf or row not in ended]
        return [tried[i] for i in says], np.array([losses[i] for i in says]), begun

    def given(trials):
        """What a caller gives: refused where it is none, and warned of where it says nothing."""
        trials = as_records(trials, "trials")
        if any(map(partial_fidelity, trials)) and all(full_loss(record) is None for record in trials):
            warnings.warn(
                "The `trials` have outcomes, and none of a complete trial at fidelity 1, the full budget: they say "
                "nothing of scores. Give the largest budget that is meant to count the fidelity 1.",
                stacklevel=3,
            )
        return trials

    def posterior(new_task: Any = None, trials: Iterable[base.Record] = ()) -> tuple[np.ndarray, np.ndarray]:
        return predictors.score_posterior(for_task(new_task), *told(given(trials))[:2])

    def predict(new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
        return best_of(for_task(new_task), given(trials))

    def suggest(new_task: Any = None, trials: Iterable[base.Record] = ()) -> dict[str, Any]:
        return next_of(for_task(new_task), given(trials))

    def best_of(prior, trials):
        tried, losses, _ = told(trials)
        mean = predictors.score_posterior(prior, tried, losses)[0].copy()
        failed = np.array(tried, int)[np.isinf(losses)]
        if len(set(failed.tolist())) < len(mean):
            mean[failed] = -np.inf
        return dict(candidates[int(mean.argmax())])

    def next_of(prior, trials):
        tried, losses, begun = told(trials)
        gain = predictors.score_improvement(prior, tried, losses)
        gain[begun] = -np.inf
        if not np.isfinite(gain).any():  # all were tried: the best
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
    """ValueError where a configuration cannot be looked up."""
    try:
        hash(_name(configuration))
    except TypeError:
        raise ValueError(
            f"{place} must have values such as numbers and texts, by names that are texts; got "
            f"{dict(configuration)!r}. Give each entry of a list a name of its own."
        ) from None


def _losses(trials: list[predictors.TaskTrials], num: int) -> np.ndarray:
    """[num, T] losses, the mean of those that ended: NaN where not tried, worse than all where none ended."""
    losses = np.full((num, len(trials)), np.nan)
    for column, (rows, y) in zip(losses.T, trials, strict=True):
        ended = np.isfinite(y)
        count, total = np.bincount(rows[ended], minlength=num), np.bincount(rows[ended], y[ended], num)
        column[count > 0] = total[count > 0] / count[count > 0]
        # The ranking loss knows losses alone.
        worst = np.nanmax(column)
        column[np.setdiff1d(rows, rows[ended])] = worst + 1 + abs(worst)
    return losses


def _same(of_tasks, trials, names, outcomes) -> np.ndarray:
    """[A, T] outcomes of the same configurations and tasks in other records, NaN where they have none."""
    losses = dict(zip(of_tasks, _losses(trials, len(outcomes) + 1)[:-1].T, strict=True))
    nothing = np.full(len(outcomes), np.nan)
    found = np.stack([losses.get(name, nothing) for name in names], 1)
    if not np.isfinite(outcomes + found).any():
        raise ValueError(
            "`tests` must be of tasks and configurations that `records` have; no configuration has a trial on the same "
            f"task in both. The tasks there are {some(of_tasks)}, and of `records` {some(names)}."
        )
    return found


def _standardized_features(raw: np.ndarray | None, num_tasks: int) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """[T, F] of mean 0 and variance 1 over tasks, 0 where unknown; the means and deviations [F]."""
    if raw is None:
        return jnp.zeros((num_tasks, 0)), np.zeros(0), np.ones(0)
    known = np.isfinite(raw)
    count = np.maximum(known.sum(0), 1)
    center = np.where(known, raw, 0).sum(0) / count
    scale = np.sqrt((np.where(known, raw - center, 0) ** 2).sum(0) / count)
    scale = np.where(scale > 0, scale, 1.0)
    return jnp.asarray(np.where(known, (raw - center) / scale, 0), jnp.result_type(float)), center, scale
