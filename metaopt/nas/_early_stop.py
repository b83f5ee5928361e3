"""Stops a search before it collapses: when the validation loss becomes too sharp in α, or a cell has many skips.

    curvature: stop at epoch e ≥ `start` if  mean of |κ| over the last `window` epochs > factor · the same mean `delta`
               epochs earlier, and keep the α of epoch e − `delta`
    skips:     stop at epoch e ≥ `start` if  a cell of the genotype has more than `max_skips` skips,
               and keep the α of epoch e − 1

Sources: Zela et al., ICLR 2020, Sec. 4.3, https://arxiv.org/abs/1909.09656; Liang et al., 2019 (DARTS+),
https://arxiv.org/abs/1909.06035
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, base
from metaopt.nas._genotypes import SKIP
from metaopt.nas._relaxations import discretized, dominant_eigenvalue
from metaopt.nas._specs import Space


class StoppingState(NamedTuple):
    """The state of `stopped_by_curvature` and `stopped_by_skips`.

    Attributes:
      estimator: the state of the watched rule.
      count: [] int32, the number of estimates so far.
      measured: κ, or the number of skips, of the last epochs, newest last; NaN before the first epoch.
      alphas: like α, with a leading axis: α at the end of each epoch that the rule looks back to, newest last.
      stopped: [] bool.
      kept: like α. Once the search is stopped, it is the α that the rule keeps; until then it is the newest α.
      key: the key for the outer batch and the first vector of the iterations.
    """

    estimator: base.EstimatorState
    count: jax.Array
    measured: jax.Array
    alphas: base.HyperParams
    stopped: jax.Array
    kept: base.HyperParams
    key: jax.Array


def stopped_by_curvature(
    estimator: base.Estimator,
    problem: base.Problem,
    *,
    every: int,
    window: int = 5,
    start: int = 10,
    delta: int = 4,
    factor: float = 1.3,
    num_iterations: int = 20,
    inner_state: Callable = lambda state: state.inner,
    own: Callable[[base.HyperParams], base.HyperParams] = lambda hyperparams: hyperparams,
    alpha: Callable[[base.HyperParams], base.HyperParams] = lambda hyperparams: hyperparams,
) -> base.Estimator:
    """The same estimator, which also measures κ, the dominant eigenvalue of ∂²f/∂α², at the end of every epoch.

    Once it stops, `metrics["stop"]` becomes 1 and stays 1, and `kept` in the state is the α to take. Later steps are
    useless but harmless. To end the run, pass `training.fit` a callback that returns `metrics["stop"] > 0`. The state
    holds everything, so a continued run stops at the same epoch as an uninterrupted one.

    Once per epoch it costs `num_iterations` Hessian-vector products of f in α. (Under `vmap` it costs this at every
    estimate.)

    Args:
      estimator: an estimator of one task, such as DARTS's; its state must carry the training.
      problem: the problem whose f is measured. It is the problem that `estimator` differentiates, or the problem from
        which that one was made (see `own`).
      every: number of estimates per epoch.
      window: number of epochs that are averaged.
      start: the first epoch that may stop, counted from 0.
      delta: how many epochs to look back for the comparison, and to go back.
      factor: the search stops if the mean of |κ| exceeds this factor times the mean `delta` epochs before.
      num_iterations: iterations of `dominant_eigenvalue`.
      inner_state: `(estimator's state) -> inner state`.
      own: the estimator's λ -> the λ of `problem`, if they differ. Under a constraint, for instance, λ also has
        multipliers.
      alpha: the problem's λ -> the part of it for which κ is computed, a selection of its leaves; all of λ by default.

    Returns:
      An `Estimator` of the same kind. Its metrics are the metrics of `estimator`, "curvature" (κ at the end of an
      epoch, NaN otherwise) and "stop".

    Raises:
      ValueError: if `every` is below 1.
    """
    loop = problem.loop

    def measure(keys, hyperparams, task, after):
        batch_key, vector_key = keys
        trained, own_hyperparams = inner_state(after), own(hyperparams)
        point, put = jax.vjp(alpha, own_hyperparams)  # the transpose of a selection puts leaves back to their places

        def outer_loss(a):
            (change,) = put(jax.tree.map(jnp.subtract, a, point))
            moved = jax.tree.map(jnp.add, own_hyperparams, change)
            batch = problem.outer_batch(batch_key, task)
            return problem.outer_loss(loop.params(trained), moved, batch, loop.context(trained))

        return dominant_eigenvalue(outer_loss, point, vector_key, num_steps=num_iterations)

    def grows(curvatures):
        # Epochs that have not happened are NaN, and comparisons with NaN are false.
        sharpness = jnp.abs(curvatures)
        return sharpness[-window:].mean() > factor * sharpness[:window].mean()

    return _stopped(estimator, "curvature", measure, grows, every, window + delta, delta, start)


def stopped_by_skips(
    estimator: base.Estimator,
    num_skips: Callable[[base.HyperParams], jax.Array],
    *,
    every: int,
    max_skips: int = 1,
    start: int = 1,
) -> base.Estimator:
    """The same estimator, which also applies this module's rule for skips at the end of every epoch.

    After the stop it behaves like `stopped_by_curvature`. The cost is negligible.

    Args:
      estimator: an estimator of one task, such as DARTS's.
      num_skips: `(λ) -> []` for the estimator's λ, such as `lambda λ: num_skips(network, search.weights(λ))`.
      every: number of estimates per epoch.
      max_skips: number of skips that a cell may have; DARTS+ stops at two in a normal cell of eight edges.
      start: the first epoch that may stop, counted from 0; at least 1. A stop at epoch 0 would keep the random initial
        α.

    Returns:
      An `Estimator` of the same kind. Its metrics are the metrics of `estimator`, "skips" (NaN except at the end of an
      epoch) and "stop".

    Raises:
      ValueError: if `every` or `start` is below 1.

    Source: Liang et al., 2019, https://arxiv.org/abs/1909.06035
    """
    _checks.check_integer("start", start, 1)
    measure = lambda keys, hyperparams, task, after: num_skips(hyperparams)
    return _stopped(estimator, "skips", measure, lambda counts: counts[-1] > max_skips, every, 1, 1, start)


def num_skips(network: Space, weights: Mapping[str, Any]) -> jax.Array:
    """The number of skips in the genotype of mixing weights, for the kind of cell that has the most.

    Args:
      network: the spec of a supernet.
      weights: kind -> [edges, ops]; they may be traced.

    Returns:
      [], a number.

    Raises:
      ValueError: if no edge of the network may be a skip, or as for `discretized`.
    """
    is_skip = {
        k: np.array([[op == SKIP for op in edge.ops] for edge in cell.edges]) for k, cell in network.cells.items()
    }
    if not any(each.any() for each in is_skip.values()):
        raise ValueError(f"No edge of the network has {SKIP!r} among its ops: there is nothing to count.")
    chosen = discretized(network, weights)
    return jnp.stack([(chosen[kind] * each).sum() for kind, each in is_skip.items()]).max()


def _stopped(estimator, name, measure, stops, every, num_measured, delta, start) -> base.Estimator:
    """Wraps `estimator`: measures at the end of every epoch, and keeps the α of `delta` epochs before the stop."""
    _checks.check_integer("every", every, 1)

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = estimator.init(init_key, hyperparams, task)
        dtype = jax.eval_shape(estimator.estimate, hyperparams, task, state)[0].value.dtype
        alphas = jax.tree.map(lambda a: jnp.broadcast_to(a, (delta + 1, *jnp.shape(a))), hyperparams)
        kept = jax.tree.map(jnp.asarray, hyperparams)
        nans = jnp.full(num_measured, jnp.nan, dtype)
        return StoppingState(state, jnp.zeros([], jnp.int32), nans, alphas, jnp.array(False), kept, key)

    def estimate(hyperparams, task, state):
        *keys, key = jax.random.split(state.key, 3)
        estimate, after = estimator.estimate(hyperparams, task, state.estimator)
        count, dtype = state.count + 1, state.measured.dtype
        ends = count % every == 0
        now = lambda: measure(keys, hyperparams, task, after).astype(dtype)
        value = jax.lax.cond(ends, now, lambda: jnp.full([], jnp.nan, dtype))
        push = lambda old, new: jnp.where(ends, jnp.concatenate([old[1:], new[None]]), old)
        measured = push(state.measured, value)
        alphas = jax.tree.map(push, state.alphas, hyperparams)
        stops_now = ends & (count // every > start) & stops(measured) & ~state.stopped
        kept = jax.tree.map(lambda old, a: jnp.where(stops_now, a[0], old), state.kept, alphas)
        stopped = state.stopped | stops_now
        # Until the stop, the newest α is kept.
        kept = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), kept, hyperparams)
        metrics = {**estimate.metrics, name: value, "stop": stopped.astype(estimate.value.dtype)}
        after = StoppingState(after, count, measured, alphas, stopped, kept, key)
        return estimate._replace(metrics=metrics), after

    return base.Estimator(init, estimate, kind=estimator.kind)
