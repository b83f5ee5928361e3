"""Runs one estimator over several seeds, and over a batch of tasks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt import _checks, _trees, base

_BATCH = (
    "A batch of tasks is one `Task(train, valid)` whose leaves have a leading axis of tasks (`tasks.stack` makes it "
    "from a list of tasks, `tasks.episode_batches` from a sampler of episodes), or a tuple of such batches"
)


def _is_finite(estimate: base.Estimate) -> jax.Array:
    """[] bool: whether the value and every entry of the hypergradient are finite."""
    leaves = [estimate.value, *jax.tree.leaves(estimate.hypergrad)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def _keep(finite: jax.Array, tree: Any) -> Any:
    """`tree` with zeros where `finite`, over the leading axis, is false. Multiplication would fail: NaN · 0 is NaN."""
    return jax.tree.map(lambda x: jnp.where(finite.reshape(finite.shape + (1,) * (x.ndim - 1)), x, 0), tree)


def _like(tree: Any, template: Any) -> Any:
    """`tree` in the types of `template`."""
    return jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), tree, template)


def _sums(estimate: base.Estimate) -> tuple[dict[str, Any], jax.Array]:
    """The sums over the leading axis that a mean over tasks needs, and whether each entry of this axis is finite.

    If a sum is finite, all its terms are finite. So the entries are checked one by one only if the sum is not finite.
    In the usual case, this test is one sum, which is also the result. It saves 5 % of MAML's time in small networks.
    Under `vmap` both cases are computed.
    """
    estimate = estimate._replace(value=_trees.wide(estimate.value), hypergrad=_trees.wide(estimate.hypergrad))
    hypergrad, value = estimate.hypergrad, estimate.value
    squared = lambda tree: sum(jnp.sum(jnp.square(h), range(1, h.ndim)) for h in jax.tree.leaves(tree)) + 0.0
    total = lambda tree: jax.tree.map(lambda x: x.sum(0), tree)

    def summed(finite, hypergrad, hypergrad_sum):
        # `hypergrad` has zeros in place of non-finite entries, and `hypergrad_sum` is its sum. `_keep` puts such zeros
        # into the other values.
        sums = {"value": value, "squared_norm": squared(hypergrad), "metrics": _trees.wide(estimate.metrics)}
        return {**total(_keep(finite, sums)), "hypergrad": hypergrad_sum}, finite

    def mask_then_sum(hypergrad, hypergrad_sum):
        # Here `hypergrad_sum` is not finite, and the sum is computed again without the non-finite entries.
        finite = jax.vmap(_is_finite)(estimate._replace(hypergrad=hypergrad))
        hypergrad = _keep(finite, hypergrad)
        return summed(finite, hypergrad, total(hypergrad))

    def sum_all(hypergrad, hypergrad_sum):
        # All entries are finite, so `hypergrad_sum` is the result.
        # Under `vmap`, this branch is computed even if the other one is taken. The derivative of a square h² is 2h
        # times a cotangent, which is then 0, and NaN · 0 is NaN. So non-finite entries are replaced with zeros first.
        masked = jax.tree.map(lambda h: jnp.where(jnp.isfinite(h), h, 0), hypergrad)
        return summed(jnp.isfinite(value), masked, hypergrad_sum)

    hypergrad_sum = total(hypergrad)
    all_finite = jnp.isfinite(value).all() & _is_finite(base.Estimate(value.sum(0), hypergrad_sum, estimate.done, {}))
    sums, finite = jax.lax.cond(all_finite, sum_all, mask_then_sum, hypergrad, hypergrad_sum)
    return {**sums, "finite": finite.sum(), "tasks": jnp.array(finite.size)}, finite


def over_seeds(estimator: base.Estimator, num_seeds: int) -> base.Estimator:
    """Averages an estimate over S seeds on one task: S training runs that differ only in their keys.

    This divides the variance from the initialization, the order of the data and the noise by S, and costs S times as
    much. Seeds with a non-finite estimate are excluded from the mean and counted. They also make the estimate `done`,
    so that all S runs restart. If no seed is finite, the estimate is NaN.

    Args:
      estimator: an estimator for one task.
      num_seeds: S, at least 1.

    Returns:
      An `Estimator` for one task. Its state has a leading axis of S. It is `done` if all seeds are done, or if one is
      not finite. Metrics: the means of the inner estimator's metrics, and "num_finite_seeds".

    Raises:
      ValueError: if `num_seeds` is not an integer of at least 1.
    """
    _checks.check_integer("num_seeds", num_seeds, 1)

    def init(key, hyperparams, task):
        return jax.vmap(estimator.init, in_axes=(0, None, None))(jax.random.split(key, num_seeds), hyperparams, task)

    def estimate(hyperparams, task, state):
        estimates, state = jax.vmap(estimator.estimate, in_axes=(None, None, 0))(hyperparams, task, state)
        sums, _ = _sums(estimates)
        mean = jax.tree.map(lambda x: x / sums["finite"], {k: sums[k] for k in ("value", "hypergrad", "metrics")})
        done = jnp.all(estimates.done) | (sums["finite"] < num_seeds)
        metrics = {**mean["metrics"], "num_finite_seeds": sums["finite"]}
        value, hypergrad = _like((mean["value"], mean["hypergrad"]), (estimates.value, estimates.hypergrad))
        return base.Estimate(value, hypergrad, done, metrics), state

    return base.Estimator(init, estimate, estimator.kind)


def _normalize(estimate: base.Estimate, max_norm: float | None, normalize: bool) -> base.Estimate:
    if not normalize and max_norm is None:
        return estimate
    bound = 1.0 if max_norm is None else max_norm
    # Divide by the largest entry first, since its square may overflow.
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(h), initial=0) for h in jax.tree.leaves(estimate.hypergrad)]))
    largest = jnp.where(largest == 0, 1, largest)
    norm = optax.tree.norm(jax.tree.map(lambda h: h / largest, estimate.hypergrad))
    norm = jnp.where(norm == 0, 1, norm)
    scale = bound / norm if normalize else jnp.minimum(largest, bound / norm)
    return estimate._replace(
        hypergrad=jax.tree.map(lambda h: (h / largest * scale).astype(h.dtype), estimate.hypergrad)
    )


def over_tasks(
    estimator: base.Estimator,
    *,
    task_chunk: int | None = None,
    max_norm: float | None = None,
    normalize: bool = False,
) -> base.Estimator:
    """Averages an estimate over a batch of tasks.

        F(λ) = 1/|finite| Σ_{tasks i finite} F_i(λ)

    A task whose value or hypergradient is not finite is excluded from the mean and counted. It is also `done`, so that
    its slot (its place in the batch) gets a new task. If no task is finite, the mean is NaN. (If you differentiate the
    mean, one task with NaN makes the derivative NaN.)

    Args:
      estimator: an estimator for one task.
      task_chunk: the number of tasks that run at once under vmap. A scan runs one chunk after another and accumulates
        the sums, so the memory is that of one chunk. The remaining tasks form a shorter chunk. None runs all tasks at
        once. On a CPU core, 1 is the fastest for a convolutional supernet, since a batch of its tasks does not fit into
        the caches (`experiments/benchmarks/architecture.py`). `nas.MetaArchitecture.over_tasks` chooses `task_chunk`
        itself.
      max_norm: clips the norm of each task's hypergradient, before the mean.
      normalize: scales each task's hypergradient to norm 1, before the mean.

    Returns:
      An `Estimator` of the same kind, except that clipping or normalizing makes "exact" and "unbiased" ones "biased".
      It takes a batch of B tasks: in `init` and `estimate`, the leaves of the task have a leading axis of B. A tuple
      of such batches is also allowed. They may differ in padded shape, and count as one batch. `done` is [B], or a
      tuple of such arrays. Metrics: the means of the inner estimator's metrics, "num_tasks", "num_finite",
      "num_nonfinite", and "hypergrad_variance", the trace of the hypergradient's covariance over tasks.

    Raises:
      ValueError: if `max_norm` is not positive, or `normalize` and `max_norm` are both set. At trace time, if the batch
        is empty or its leaves disagree on B.
    """
    _checks.check_positive("max_norm", max_norm, optional=True)  # a negative norm would reverse the hypergradient
    if normalize and max_norm is not None:
        raise ValueError("`normalize` and `max_norm` exclude each other: a normalized hypergradient has norm 1.")

    def one_task(hyperparams, task, state):
        estimate, state = estimator.estimate(hyperparams, task, state)
        return _normalize(estimate, max_norm, normalize), state

    def init(key, hyperparams, task):
        if _is_ragged(task):
            keys = jax.random.split(key, len(task))
            return tuple(init(k, hyperparams, batch) for k, batch in zip(keys, task, strict=True))
        keys = jax.random.split(key, _batch_size(task))
        return jax.vmap(estimator.init, in_axes=(0, None, 0))(keys, hyperparams, task)

    def estimate(hyperparams, task, state):
        if _is_ragged(task):
            batches = zip(task, state, strict=True)
            parts = [_batch_sums(one_task, task_chunk, hyperparams, *batch) for batch in batches]
            sums = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *[p[0] for p in parts])
            done, state = tuple(p[1] for p in parts), tuple(p[2] for p in parts)
        else:
            sums, done, state = _batch_sums(one_task, task_chunk, hyperparams, task, state)
        return _mean_over_tasks(sums, done, hyperparams), state

    changed = normalize or max_norm is not None
    biased = changed and estimator.kind in ("exact", "unbiased")
    return base.Estimator(init, estimate, "biased" if biased else estimator.kind)


def _is_ragged(tasks: Any) -> bool:
    """Whether `tasks` is a tuple of batches; rejects an empty or mixed tuple, and a list."""
    if type(tasks) is tuple and tasks and all(isinstance(part, base.Task) for part in tasks):
        return True
    if (type(tasks) is tuple and not tasks) or (
        type(tasks) in (tuple, list) and any(isinstance(part, base.Task) for part in tasks)
    ):
        raise ValueError(f"{_BATCH}; got a {type(tasks).__name__} of {[type(t).__name__ for t in tasks]}.")
    return False


def _batch_size(tasks: base.Task) -> int:
    """Checks the leading axes of one batch, and returns its number of tasks."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tasks)}
    if len(sizes) != 1 or sizes in ({()}, {(0,)}):
        raise ValueError(
            "Every leaf of a batch of tasks must have the number of tasks as its leading axis, and there must be at "
            f"least one task; got axes {sorted(map(str, sizes))}. Stack tasks with `tasks.stack`, or draw batches of "
            "episodes with `tasks.episode_batches(sample, num_tasks)`."
        )
    return sizes.pop()[0]


def _batch_sums(
    one_task: Callable, task_chunk: int | None, hyperparams: base.HyperParams, tasks: base.Task, state: Any
) -> tuple[dict[str, Any], jax.Array, Any]:
    """The sums over the tasks of one batch, which slots are done, and the state of every slot."""

    def chunk_sums(tasks, state):
        estimates, state = jax.vmap(one_task, in_axes=(None, 0, 0))(hyperparams, tasks, state)
        sums, finite = _sums(estimates)
        return sums, estimates.done | ~finite, state

    num_tasks = _batch_size(tasks)
    if task_chunk is None or task_chunk >= num_tasks:
        return chunk_sums(tasks, state)
    whole = num_tasks - num_tasks % task_chunk

    def accumulate(total, chunk):
        sums, done, state = chunk_sums(*chunk)
        return jax.tree.map(jnp.add, total, sums), (done, state)

    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, task_chunk, *x.shape[1:]), (tasks, state))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda c: chunk_sums(*c)[0], jax.tree.map(lambda x: x[0], chunks)),
    )
    total, outputs = jax.lax.scan(accumulate, zeros, chunks)
    outputs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outputs)
    if whole < num_tasks:
        total, rest = accumulate(total, jax.tree.map(lambda x: x[whole:], (tasks, state)))
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, rest)
    return total, *outputs


def _mean_over_tasks(sums: dict[str, Any], done: base.PyTree, hyperparams: base.HyperParams) -> base.Estimate:
    """The estimate of `over_tasks`, from the sums over all finite tasks."""
    count = sums["finite"]
    hypergrad = jax.tree.map(lambda x: x / count, sums["hypergrad"])
    spread = sums["squared_norm"] - count * optax.tree.norm(hypergrad, squared=True)
    spread = jnp.where(count == 1, 0, jnp.maximum(spread, 0))  # rounding may make it negative, or nonzero for one task
    metrics = {
        **jax.tree.map(lambda x: x / count, sums["metrics"]),
        "num_tasks": sums["tasks"],
        "num_finite": count,
        "num_nonfinite": sums["tasks"] - count,
        "hypergrad_variance": spread / jnp.maximum(count - 1, 1),
    }
    return base.Estimate(sums["value"] / count, _like(hypergrad, hyperparams), done, metrics)
