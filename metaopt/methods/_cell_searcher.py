"""h from records of earlier searches, by an encoder of cells crossed with the task: `train_cell_searcher`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, nas, predictors, training
from metaopt.methods._meta_search import check_no_mapping

_AT_ONCE = 2048  # cells that are encoded together


class CellSearcher(NamedTuple):
    """What `train_cell_searcher` returns. A new task is given as for `MetaOptimizer`; None: nothing is known of it.

    `save_cell_searcher` and `load_cell_searcher` keep it on disk.

    Attributes:
      predict: `(new_task) -> configuration`, a*: the candidate with the largest mean score.
      scores: `(new_task) -> [members, candidates]`, larger is better, each member's of mean 0 and variance 1 over the
        candidates. Their spread says how far members agree.
      encoded: [members, candidates, width], z: features of architectures in which a member's scores are linear, for a
        model of one's own that spends trials.
      encoder: of cells.
      meta_params: its weights, leaves [members, ...].
      candidates: the architectures that it chooses from.
      ops: what `predictors.cells` must be told, beside `encoder.config["num_vertices"]`, of cells for the encoder.
      center: [F] means of the features over the tasks that it learned from.
      scale: [F] their deviations. The encoder reads (features − center) / scale, 0 where unknown.
    """

    predict: Callable[..., dict[str, Any]]
    scores: Callable[..., np.ndarray]
    encoded: np.ndarray
    encoder: predictors.CellEncoder
    meta_params: base.PyTree
    candidates: list[dict[str, Any]]
    ops: tuple[str, ...]
    center: np.ndarray
    scale: np.ndarray


def train_cell_searcher(
    records: Sequence[base.Record],
    graph_fn: Callable[[dict[str, Any]], nas.Graph],
    *,
    features: Mapping[str, Any] | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    width: int = 32,
    num_layers: int = 2,
    num_members: int = 4,
    num_steps: int = 300,
    batch_size: int = 128,
    rate: float = 3e-3,
    key: jax.Array | None = None,
) -> CellSearcher:
    """Learns from architectures × tasks × outcomes which architecture to take for a new task, with no trial there.

        min_φ mean_t L(score(·, t; φ), y_t),    L: `predictors.cell_ranking_loss` over a batch of architectures

    by `training.fit` over `hypergrad.direct`, for an ensemble whose members start, and draw, by themselves. In half of
    the steps a member does not see the features of tasks, so that it ranks for a task of which nothing is known, too.

    Beside `train_meta_searcher`, which compares configurations digit by digit: here isomorphic cells are one, and what
    is learned of an op serves wherever it stands. It spends no trials; what it predicts can be the first of another's,
    `searcher(first=[h.predict(task)])`.

    Args:
      records: trials of earlier tasks: complete ones at full fidelity, and failed ones, which are worse than all.
      graph_fn: the cell of a configuration, such as `nas.benchmark_graph` of its digits.
      features: task name -> [F] numbers, NaN where unknown; tasks without an entry are unknown altogether.
      candidates: architectures to choose from; by default, all that are in the records.
      width: of the encoder, a multiple of 4.
      num_layers: of the encoder.
      num_members: of the ensemble.
      num_steps: of Adam, whose rate falls to zero like a cosine.
      batch_size: architectures a step.
      rate: of Adam, at the start.
      key: what everything random follows from; `jax.random.key(0)` by default.

    Returns:
      A `CellSearcher`. Training takes memory of about num_members times what `predictors.cell_encoder` says for a
      batch.

    Raises:
      ValueError: a size is out of range; no record has an outcome; `candidates` is empty; features are by name, have
        different lengths, or are of none of the records' tasks.
    """
    for name, value in (("num_members", num_members), ("batch_size", batch_size)):
        base.check_integer(name, value, 1)
    base.check_integer("num_steps", num_steps, 0)
    base.check_positive("rate", rate)
    names, tried, outcomes = _outcomes(records)
    pool = list(tried.values()) if candidates is None else [dict(c) for c in candidates]
    if not pool:
        raise ValueError(
            "`candidates` must hold an architecture, or be None to take those of the records; it is empty."
        )
    graphs = [graph_fn(c) for c in tried.values()]
    offered_graphs = graphs if candidates is None else [graph_fn(c) for c in pool]
    ops = sorted({op for graph in [*graphs, *offered_graphs] for op in graph.ops})
    most = max(len(graph.ops) for graph in [*graphs, *offered_graphs])
    seen = predictors.cells(graphs, ops, num_vertices=most)
    offered = seen if candidates is None else predictors.cells(offered_graphs, ops, num_vertices=most)
    known, center, scale = _features(names, features)

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
        progress=False,
        handle_signals=False,
    )

    @jax.jit
    def encode(meta_params, cells):
        one = lambda cell: encoder.encode(meta_params, jax.tree.map(lambda x: x[None], cell))[0]
        return jax.lax.map(one, cells, batch_size=min(_AT_ONCE, len(pool)))

    members = [jax.tree.map(lambda x, i=i: x[i], fitted.hyperparams) for i in range(num_members)]
    encoded = np.stack([np.asarray(encode(member, offered), np.float64) for member in members])
    return cell_searcher(encoded, encoder, fitted.hyperparams, pool, tuple(ops), center, scale)


def cell_searcher(
    encoded: np.ndarray,
    encoder: predictors.CellEncoder,
    meta_params: base.PyTree,
    candidates: list[dict[str, Any]],
    ops: tuple[str, ...],
    center: np.ndarray,
    scale: np.ndarray,
) -> CellSearcher:
    """The searcher of what was learned."""
    coefficients = jax.jit(jax.vmap(encoder.coefficients, in_axes=(0, None)))

    def scores(new_task: Any = None) -> np.ndarray:
        given = new_task.features if isinstance(new_task, base.Task) else new_task
        check_no_mapping("new_task", given)
        if given is None:
            given = np.full(len(center), np.nan)
        if np.shape(given) != np.shape(center):
            raise ValueError(f"A new task has [{len(center)}] features; got shape {np.shape(given)}.")
        given = jnp.asarray(np.nan_to_num((np.asarray(given, float) - center) / scale), jnp.result_type(float))
        c = np.asarray(coefficients(meta_params, given), np.float64)
        found = np.einsum("maw,mw->ma", encoded, c)
        return (found - found.mean(1, keepdims=True)) / (found.std(1, keepdims=True) + 1e-12)

    def predict(new_task: Any = None) -> dict[str, Any]:
        return dict(candidates[int(scores(new_task).mean(0).argmax())])

    return CellSearcher(predict, scores, encoded, encoder, meta_params, candidates, ops, center, scale)


def _outcomes(records) -> tuple[list[str], dict[tuple, dict[str, Any]], np.ndarray]:
    """Tasks, configurations by what tells them apart, and mean losses [A, T]: NaN where not tried, ∞ where failed."""
    names: dict[str, int] = {}
    tried: dict[tuple, dict[str, Any]] = {}
    of: dict[tuple[int, int], list[float]] = {}
    at: dict[tuple, int] = {}
    for record in records:
        failed = record.status == "FAIL"
        if failed or (record.status == "COMPLETE" and record.fidelity == 1.0):
            y = float(record.outcome) if not failed and np.isfinite(record.outcome) else np.inf
            name = tuple(sorted(record.configuration.items()))
            tried.setdefault(name, record.configuration)
            row = at.setdefault(name, len(at)), names.setdefault(record.task, len(names))
            of.setdefault(row, []).append(y)
    if not of:
        raise ValueError('`records` must hold trials that are "COMPLETE" at fidelity 1; there is none.')
    outcomes = np.full((len(tried), len(names)), np.nan)
    for at_, values in of.items():
        outcomes[at_] = np.mean(values)
    # The ranking loss knows losses alone: what failed is worse than all that ended.
    worst = np.max(outcomes, 0, initial=0.0, where=np.isfinite(outcomes))
    return list(names), tried, np.where(np.isinf(outcomes), worst[None] + 1, outcomes)


def _features(names, features) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """[T, F] of mean 0 and variance 1 over tasks, 0 where unknown; the means and deviations [F]."""
    if features is None:
        return jnp.zeros((len(names), 0)), np.zeros(0), np.ones(0)
    for name in names:
        check_no_mapping("features", features.get(name))
    raw = [np.asarray(features[name], float).ravel() if name in features else None for name in names]
    lengths = sorted({len(row) for row in raw if row is not None})
    if len(lengths) != 1:
        raise ValueError(
            "`features` must have an entry for some of the records' tasks, all of one length; the tasks are "
            f"{', '.join(map(repr, names[:3]))}, the lengths {lengths}."
        )
    rows = np.stack([np.full(lengths[0], np.nan) if row is None else row for row in raw])
    known = np.isfinite(rows)
    count = np.maximum(known.sum(0), 1)
    center = np.where(known, rows, 0).sum(0) / count
    scale = np.sqrt((np.where(known, rows - center, 0) ** 2).sum(0) / count)
    scale = np.where(scale > 0, scale, 1.0)
    return jnp.asarray(np.where(known, (rows - center) / scale, 0), jnp.result_type(float)), center, scale
