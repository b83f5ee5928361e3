"""Learns a searcher h of cells from records of earlier searches: `train_cell_searcher`."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base, hypergrad, training
from metaopt.blackbox._earlier_trials import as_records, by_task, candidate_key, features_by_task, first_names
from metaopt.blackbox._new_trials import as_configurations
from metaopt.blackbox._surrogates import TaskTrials
from metaopt.nas import _graphs
from metaopt.nas.search import _cell_encoder, _score_prior, _score_weights
from metaopt.nas.search._cell_searcher import (
    CellSearcher,
    cell_searcher,
    columns,
    members_coefficients,
    standardized,
)

_CELLS_PER_BATCH = 2048  # in encoding


def train_cell_searcher(
    records: Iterable[base.Record],
    graph_fn: Callable[[dict[str, Any]], _graphs.Graph],
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

        min_φ mean_t L(score(·, t; φ), y_t),    L: a logistic loss over all pairs of a batch of architectures

    It runs `training.fit` over `hypergrad.direct` for an ensemble, whose members have their own initializations and
    random draws. In half of the steps, a member does not see the features of tasks. It thereby learns to rank for a
    task about which nothing is known.

    On a new task, the expected score of an architecture is the average of its scores on the earlier tasks, where a
    score is a rank within a task. The average is shrunk towards a model, which also predicts architectures that no
    task tried. The model is a weighted mean of two predictions: those of a linear model of the entries of
    configurations and their pairs, and those of the encoder. The features of the new task shift the prediction of the
    encoder. The weights of the shrinkage, of the encoder and of this shift are those that give the best choices on
    earlier tasks that are left out. For this purpose, each member of the ensemble leaves out some of the tasks. With
    one task or one member, these weights are fixed. Trials on the new task update the expected scores by Gaussian
    conditioning, in the features of these models. So `predict` returns the architecture with the largest expected
    score, which need not be the one with the best observed outcome.

    `blackbox.train_meta_searcher` compares configurations digit by digit. Here, the encoder treats isomorphic cells as
    equal, and knowledge about an op applies at every position of the cell.

    Args:
      records: trials of earlier tasks, or a data frame of them (`blackbox.records_to_frame`). Complete trials at full
        fidelity count, and their outcomes are averaged over seeds. Failed trials count too: an architecture whose
        trials on a task all failed ranks there below all architectures whose trials ended. A complete trial without
        a finite outcome counts as failed, so an architecture that was never tried must have no record
        (`nas.Benchmark.records` writes none for a table's NaN). A warning names tasks that have outcomes, but none
        at the full budget. Tasks whose trials all have the same outcome carry no ranking and are left out.
      graph_fn: returns the cell of a configuration, such as `nas.Benchmark.graph` of its digits.
      features: task name -> [F] numbers, NaN where unknown. Tasks without an entry are entirely unknown. A warning is
        given if some tasks have no entry and some entries belong to no task.
      candidates: architectures to choose from; by default, all architectures in the records.
      tests: records of the same trials with test losses, which no search sees. They are used to estimate the noise of
        validation: the part of a validation outcome that is not in the test loss. Trials without such a record are left
        out of this estimate. By default, validation is treated as free of noise, and differences between tasks as real.
      width: width of the encoder, a multiple of 4.
      num_layers: layers of the encoder.
      num_members: members of the ensemble. Each task is left out by at least one of them.
      num_steps: steps of Adam, whose rate falls to zero on a cosine schedule.
      batch_size: architectures per step.
      rate: Adam's rate at the start.
      progress: as for `training.fit`.
      key: the source of all randomness; `jax.random.key(0)` by default.

    Returns:
      A `CellSearcher`. Training takes memory for about num_members · batch_size · V · (20 · width + 8 · V) · num_layers
      numbers, for cells of V vertices.

    Raises:
      ValueError: if `batch_size` is below 1.
      ValueError: if a record is invalid (unknown status, fidelity outside (0, 1], or non-numeric outcome). Also if no
        record has an outcome, or all outcomes of every task are equal. Also if `candidates` is empty, if features have
        different lengths, or if no entry of `features` is for a task of the records. Also if no trial of `records` is
        in `tests`.

    Example: a table of nine cells on three tasks, which agree that a path of two MLPs is best:

    >>> import itertools
    >>> from metaopt import base, nas
    >>> ops = ("none", "skip_connect", "mlp")
    >>> cells = [
    ...     {"0->1": first, "1->2": second} for first, second in itertools.product(ops, ops)
    ... ]
    >>> graph = lambda cell: nas.edge_graph(
    ...     [(0, 1, cell["0->1"]), (1, 2, cell["1->2"])], output=(2,)
    ... )
    >>> value = {"none": 0.0, "skip_connect": 0.1, "mlp": 0.2}
    >>> error = lambda cell, easy: (
    ...     1 - easy * (2 * value[cell["0->1"]] + value[cell["1->2"]])
    ... )
    >>> records = [
    ...     base.Record(f"task {easy}", cell, error(cell, easy))
    ...     for easy in (0.5, 0.7, 0.9)
    ...     for cell in cells
    ... ]
    >>> sizes = {
    ...     "width": 8,
    ...     "num_layers": 1,
    ...     "num_members": 2,
    ...     "num_steps": 20,
    ...     "batch_size": 9,
    ... }
    >>> h = nas.train_cell_searcher(records, graph, progress=False, **sizes)
    >>> h.predict()  # a*, without a trial on the new task
    {'0->1': 'mlp', '1->2': 'mlp'}
    >>> failed = base.Record("new", h.predict(), status="FAIL")
    >>> h.predict(trials=[failed])
    {'0->1': 'mlp', '1->2': 'skip_connect'}
    """
    _checks.check_integer("batch_size", batch_size, 1)  # with 0 rows, the loss would be 0
    trials = _earlier_trials(records, tests, features)
    pool = list(trials.all_configurations.values()) if candidates is None else _as_candidates(candidates)
    configurations = trials.tried | {candidate_key(c): c for c in pool if candidate_key(c) not in trials.tried}
    cells, ops = _cells([graph_fn(c) for c in configurations.values()])
    encoder = _cell_encoder.cell_encoder(
        len(ops), cells.ops.shape[1], num_features=trials.features.shape[1], width=width, num_layers=num_layers
    )
    tried_cells = jax.tree.map(lambda x: x[: len(trials.tried)], cells)
    left_out = _left_out(num_members, trials.outcomes.shape[1])
    data = tried_cells, jnp.asarray(trials.outcomes, jnp.result_type(float)), trials.features, jnp.asarray(~left_out)
    init_key, fit_key = jax.random.split(jax.random.key(0) if key is None else key)
    fitted = training.fit(
        training.learner(
            hypergrad.direct(functools.partial(_ensemble_loss, encoder, batch_size, num_members)),
            optax.adam(optax.cosine_decay_schedule(rate, max(num_steps, 1))),
        ),
        lambda key: data,
        hyperparams=jax.vmap(encoder.init)(jax.random.split(init_key, num_members)),
        num_steps=num_steps,
        key=fit_key,
        progress=progress,
    )
    encoded = _encode(encoder, fitted.hyperparams, num_members, cells)
    row_index = {name: row for row, name in enumerate(configurations)}
    rows = [row_index[candidate_key(c)] for c in pool]
    pool_encoded = np.ascontiguousarray(encoded[:, rows])
    scores = functools.partial(_encoder_scores, encoder, fitted.hyperparams, encoded, pool_encoded)
    blocks = columns(list(configurations.values()), encoded, pool, pool_encoded)
    prior, slope = _prior(blocks, trials, scores, left_out)
    prior = prior._replace(**{name: getattr(prior, name)[rows] for name in ("features", "mean", "spread", "alone")})
    return cell_searcher(
        pool_encoded,
        encoder,
        fitted.hyperparams,
        pool,
        ops,
        trials.center,
        trials.scale,
        prior,
        np.array(slope),
    )


# ---- Records of earlier tasks ---------------------------------------------------------------------------------------


class _Trials(NamedTuple):
    """The trials of earlier tasks. A tried configurations, T tasks.

    Attributes:
      all_configurations: key -> configuration, of all records.
      tried: key -> configuration, of the A configurations with a result on a task that is used.
      outcomes: [A, T] mean losses, NaN if not tried.
      test_outcomes: [A, T] the same from `tests`; None without them.
      features: [T, F] standardized features of the tasks, 0 where unknown.
      center: [F] means of the features before standardization.
      scale: [F] standard deviations of the features before standardization.
    """

    all_configurations: dict[tuple, dict[str, Any]]
    tried: dict[tuple, dict[str, Any]]
    outcomes: np.ndarray
    test_outcomes: np.ndarray | None
    features: jax.Array
    center: np.ndarray
    scale: np.ndarray


def _earlier_trials(records: Any, tests: Any, features: Mapping[str, Any] | None) -> _Trials:
    records = as_records(records)
    configurations = {candidate_key(record.configuration): dict(record.configuration) for record in records}
    indices = {name: np.array(row) for row, name in enumerate(configurations)}
    last = np.array(len(indices))  # of configurations that only `tests` has
    row_of = lambda configuration: indices.get(candidate_key(configuration), last)
    names, trials = by_task(records, row_of)
    test_trials = None if tests is None else by_task(as_records(tests, "tests"), row_of, "tests")
    standard, center, scale = _standardized_features(features_by_task(names, features), len(names))
    outcomes = _losses(trials, len(configurations))
    test_outcomes = None if test_trials is None else _test_losses(*test_trials, names, outcomes)
    rows = np.isfinite(outcomes).any(1)  # False: tried only on tasks that are left out, or not to the end
    tried = {name: c for (name, c), row in zip(configurations.items(), rows, strict=True) if row}
    test_outcomes = None if test_outcomes is None else test_outcomes[rows]
    return _Trials(configurations, tried, outcomes[rows], test_outcomes, standard, center, scale)


def _as_candidates(candidates: Any) -> list[dict[str, Any]]:
    pool = [dict(c) for c in as_configurations("candidates", candidates)]
    if not pool:
        raise ValueError(
            "`candidates` must contain an architecture, or be None to use those of the records; it is empty."
        )
    return pool


def _losses(trials: list[TaskTrials], num: int) -> np.ndarray:
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


def _test_losses(test_names, trials, names, outcomes) -> np.ndarray:
    """Returns [A, T] outcomes of the same configurations and tasks in other records, NaN where they have none."""
    losses = dict(zip(test_names, _losses(trials, len(outcomes) + 1)[:-1].T, strict=True))
    nothing = np.full(len(outcomes), np.nan)
    test_outcomes = np.stack([losses.get(name, nothing) for name in names], 1)
    if not np.isfinite(outcomes + test_outcomes).any():
        raise ValueError(
            "`tests` and `records` must share tasks and configurations, but no configuration has a trial on the same "
            f"task in both. The tasks of `tests` are {first_names(test_names)}, those of `records` "
            f"{first_names(names)}."
        )
    return test_outcomes


def _standardized_features(raw: np.ndarray | None, num_tasks: int) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Returns features [T, F] of mean 0 and variance 1 over tasks, 0 where unknown; and means and deviations [F]."""
    if raw is None:
        return jnp.zeros((num_tasks, 0)), np.zeros(0), np.ones(0)
    finite = np.isfinite(raw)
    count = np.maximum(finite.sum(0), 1)
    center = np.where(finite, raw, 0).sum(0) / count
    scale = np.sqrt((np.where(finite, raw - center, 0) ** 2).sum(0) / count)
    scale = np.where(scale > 0, scale, 1.0)
    return jnp.asarray(np.where(finite, (raw - center) / scale, 0), jnp.result_type(float)), center, scale


# ---- The encoder ----------------------------------------------------------------------------------------------------


def _cells(graphs: Sequence[_graphs.Graph]) -> tuple[_cell_encoder.Cells, tuple[str, ...]]:
    """Returns the graphs as arrays, and the names of their ops."""
    ops = sorted({op for graph in graphs for op in graph.ops})
    return _cell_encoder.cells(graphs, ops), tuple(ops)


def _left_out(num_members: int, num_tasks: int) -> np.ndarray:
    """[members, T], the tasks that a member does not learn from: each task is left out by at least one member.

    With one member or one task, there is nothing to leave out.
    """
    num_folds = min(num_members, num_tasks)
    folds = np.arange(num_members)[:, None] % num_folds == np.arange(num_tasks) % num_folds
    return folds & (num_folds > 1)


def _ensemble_loss(encoder, batch_size, num_members, meta_params, data, key) -> jax.Array:
    """The sum of the members' losses, each on its own batch and tasks."""
    *data, learned_from = data
    member_loss = functools.partial(_member_loss, encoder, batch_size)
    keys = jax.random.split(key, num_members)
    return jax.vmap(member_loss, in_axes=(0, None, 0, 0))(meta_params, data, learned_from, keys).sum()


def _member_loss(encoder, batch_size, meta_params, data, learned_from, key) -> jax.Array:
    """The ranking loss of a batch of architectures, mean over tasks. In half of the calls, features are hidden."""
    row_key, blind_key = jax.random.split(key)
    cells, outcomes, features = data
    rows = jax.random.randint(row_key, (batch_size,), 0, len(outcomes))
    z = encoder.encode(meta_params, jax.tree.map(lambda x: x[rows], cells))
    features = jnp.where(jax.random.bernoulli(blind_key), features, 0)

    def task_loss(features, outcomes):
        return _cell_encoder.cell_ranking_loss(z @ encoder.coefficients(meta_params, features), outcomes)

    return jnp.mean(jax.vmap(task_loss)(features, outcomes[rows].T), where=learned_from)


def _encode(encoder, meta_params, num_members, cells) -> np.ndarray:
    """z of all cells, [members, architectures, width] in float64."""

    @jax.jit
    def encode(member, cells):
        one = lambda cell: encoder.encode(member, jax.tree.map(lambda x: x[None], cell))[0]
        return jax.lax.map(one, cells, batch_size=min(_CELLS_PER_BATCH, len(cells.ops)))

    members = [jax.tree.map(lambda x, i=i: x[i], meta_params) for i in range(num_members)]
    return np.stack([np.asarray(encode(member, cells), np.float64) for member in members])


def _encoder_scores(encoder, meta_params, encoded, pool_encoded, features) -> np.ndarray:
    """[members, architectures] for a task with features [F]."""
    return standardized(members_coefficients(encoder)(meta_params, features), encoded, pool_encoded)


# ---- The prior of the scores ----------------------------------------------------------------------------------------


def _prior(blocks, trials: _Trials, scores_fn: Callable, left_out: np.ndarray) -> tuple[_score_prior.ScorePrior, float]:
    """Returns the prior for all architectures, and the weight of the shift that a task's features cause.

    In `blocks`, the tried architectures come first. `scores_fn` returns the encoder's scores of all architectures for a
    task. The linear part of the mean uses only entries and their pairs.
    """
    outcomes = trials.outcomes
    tests = outcomes if trials.test_outcomes is None else trials.test_outcomes
    scores = np.full((2, len(blocks[0][0]), outcomes.shape[1]), np.nan)
    for part, losses in zip(scores, (outcomes, tests), strict=True):
        for t, column in enumerate(losses.T):
            rows = np.flatnonzero(np.isfinite(column))
            part[rows, t] = _score_prior.normal_scores(column[rows])
    valid, test = scores
    fitted = np.concatenate([block for block, _ in blocks[:2]], 1) @ _score_prior.task_coefficients(blocks[:2], valid)
    any_task = scores_fn(jnp.zeros(trials.features.shape[1]))
    weights = _score_weights.DEFAULT_WEIGHTS
    if left_out.any():
        # A task's scores are means over the members that did not learn from it: [T, members], rows with sum 1.
        held_out_weights = left_out.T.astype(float)
        held_out_weights /= held_out_weights.sum(1, keepdims=True)
        # [A, T] scores, computed with the features of each task, and without.
        this_task = np.stack(
            [w @ scores_fn(features) for w, features in zip(held_out_weights, trials.features, strict=True)], 1
        )
        blind = (held_out_weights @ any_task).T
        weights = _score_weights.choose_weights(_score_weights.HeldOut(valid, test, fitted, blind, this_task - blind))
    mean, slope = _score_weights.expected_scores(valid, fitted, any_task.mean(0), weights)
    prior = _score_prior.score_prior(blocks if weights.encoder else blocks[:2], valid, test)
    features = np.concatenate([block for block, _ in blocks], 1)
    # If the encoder has no share, the variances of its features are 0.
    coefficient_variances = np.pad(prior.own, (0, features.shape[1] - len(prior.own)))
    return prior._replace(mean=mean, features=features, own=coefficient_variances), weights.features * slope
