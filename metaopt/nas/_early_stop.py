"""Stopping a search before it collapses: when the curvature of the validation loss in α grows too fast.

    stop at epoch e ≥ `start` if  mean of κ over the last `window` epochs > factor · that mean `delta` epochs earlier,
    and keep the α of epoch e − `delta`.

Source: Zela et al., ICLR 2020, Sec. 4.3, https://arxiv.org/abs/1909.09656
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.nas._relaxations import dominant_eigenvalue


class CurvatureState(NamedTuple):
    """What `stopped_by_curvature` carries.

    Attributes:
      estimator: the state of the rule that is watched.
      count: [] int32, the estimates so far.
      curvatures: [window + delta] κ of the last epochs, newest last; NaN before the first.
      alphas: like α, with a leading axis of delta + 1: at the end of the last epochs, newest last.
      stopped: [] bool.
      kept: like α, what the search chose once it is stopped.
      key: for the outer batch and the first vector of the iterations.
    """

    estimator: base.EstimatorState
    count: jax.Array
    curvatures: jax.Array
    alphas: base.HyperParams
    stopped: jax.Array
    kept: base.HyperParams
    key: jax.Array


def sharpness_stop(
    curvatures: Sequence[float], *, window: int = 5, start: int = 10, delta: int = 4, factor: float = 1.3
) -> int | None:
    """The epoch whose α is kept, by the rule above; None while nothing stops the search.

    Args:
      curvatures: κ at every epoch so far, from epoch 0.
      window: epochs that are averaged.
      start: the first epoch that may stop; no sooner than there are two whole means.
      delta: how many epochs back to compare with, and to go.
      factor: by how much the mean may grow.

    Returns:
      The first epoch that stops, less `delta`; or None.
    """
    values = np.abs(np.asarray(curvatures, float))
    for e in range(max(start, window + delta - 1), len(values)):
        now, before = (values[end + 1 - window : end + 1].mean() for end in (e, e - delta))
        if now > factor * before:
            return e - delta
    return None


def skip_count_stop(counts: Sequence[int], *, most: int = 1, start: int = 1) -> int | None:
    """The epoch whose α is kept: the one before its genotype first has more than `most` skips; None while it has not.

    Args:
      counts: of skips in the genotype at every epoch so far, from epoch 0.
      most: that a cell may have; DARTS+ stops at two in a normal cell of eight edges.
      start: the first epoch that may stop, at least 1: before it, α is what it was drawn as.

    Returns:
      The first epoch that stops, less 1; or None.

    Raises:
      ValueError: `most` is below 0, or `start` below 1.

    Source: Liang et al., 2019, https://arxiv.org/abs/1909.06035
    """
    base.check_integer("most", most, 0)
    base.check_integer("start", start, 1)
    return next((e - 1 for e in range(start, len(counts)) if counts[e] > most), None)


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
    """The same estimator, that measures κ = the dominant eigenvalue of ∂²f/∂α² at the end of every epoch.

    Once it stops, `metrics["stop"]` is 1 and stays so, and the state's `kept` is the α to take; what comes after is of
    no use, but harmless: a callback of `training.fit` that returns `metrics["stop"] > 0` ends the run. All is in the
    state, so a run that is continued stops where an unbroken one does.

    Costs, once an epoch, `num_iterations` Hessian-vector products of f in α. (Under `vmap` at every estimate.)

    Args:
      estimator: of one task, such as DARTS's; it must carry the training.
      problem: whose f is measured: what it is a rule for, or what that was made of (`own`).
      every: estimates an epoch.
      window: epochs that are averaged.
      start: the first epoch that may stop, counted from 0.
      delta: how many epochs back to compare with, and to go.
      factor: by how much the mean may grow.
      num_iterations: of `dominant_eigenvalue`.
      inner_state: `(estimator's state) -> inner state`.
      own: the estimator's λ -> that of `problem`, where they differ: under a constraint λ has multipliers, too.
      alpha: the problem's λ -> the part of it that κ is of, a selection of its leaves; by default, all.

    Returns:
      An `Estimator` of the same kind. Metrics: those of `estimator`, "curvature", κ (NaN but at the end of an epoch),
      and "stop".

    Raises:
      ValueError: a count is out of range.
    """
    for name, value in (("every", every), ("window", window), ("delta", delta), ("num_iterations", num_iterations)):
        base.check_integer(name, value, 1)
    base.check_integer("start", start, 0)
    base.check_positive("factor", factor)
    loop, size = problem.loop, window + delta

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = estimator.init(init_key, hyperparams, task)
        dtype = jax.eval_shape(estimator.estimate, hyperparams, task, state)[0].value.dtype
        alphas = jax.tree.map(lambda a: jnp.broadcast_to(a, (delta + 1, *jnp.shape(a))), hyperparams)
        kept = jax.tree.map(jnp.asarray, hyperparams)
        nans = jnp.full(size, jnp.nan, dtype)
        return CurvatureState(state, jnp.zeros([], jnp.int32), nans, alphas, jnp.array(False), kept, key)

    def estimate(hyperparams, task, state):
        batch_key, vector_key, key = jax.random.split(state.key, 3)
        estimate, after = estimator.estimate(hyperparams, task, state.estimator)
        trained, count = inner_state(after), state.count + 1

        given = own(hyperparams)
        at, put = jax.vjp(alpha, given)  # the transpose of a selection puts its leaves where they come from

        def outer_loss(a):
            (change,) = put(jax.tree.map(jnp.subtract, a, at))
            moved = jax.tree.map(jnp.add, given, change)
            batch = problem.outer_batch(batch_key, task)
            return problem.outer_loss(loop.params(trained), moved, batch, loop.context(trained))

        def measure():
            found = dominant_eigenvalue(outer_loss, at, vector_key, num_steps=num_iterations)
            return found.astype(state.curvatures.dtype)

        ends = count % every == 0
        curvature = jax.lax.cond(ends, measure, lambda: jnp.full([], jnp.nan, state.curvatures.dtype))
        push = lambda old, new: jnp.where(ends, jnp.concatenate([old[1:], new[None]]), old)
        curvatures = push(state.curvatures, curvature)
        alphas = jax.tree.map(push, state.alphas, hyperparams)
        # Comparisons with the NaN of epochs that were not are false.
        sharpness = jnp.abs(curvatures)
        grows = sharpness[-window:].mean() > factor * sharpness[:window].mean()
        stops = ends & (count // every > start) & grows & ~state.stopped
        kept = jax.tree.map(lambda old, a: jnp.where(stops, a[0], old), state.kept, alphas)
        stopped = state.stopped | stops
        # The newest α is kept where nothing has stopped.
        kept = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), kept, hyperparams)
        metrics = {**estimate.metrics, "curvature": curvature, "stop": stopped.astype(estimate.value.dtype)}
        after = CurvatureState(after, count, curvatures, alphas, stopped, kept, key)
        return estimate._replace(metrics=metrics), after

    return base.Estimator(init, estimate, kind=estimator.kind)
