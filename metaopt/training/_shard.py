"""Spreads a batch of tasks over several devices.

Each device estimates on its share of the tasks. Devices may have skipped different numbers of non-finite tasks. We
therefore combine sums and counts, not means of means:

    F = Σ_d n_d F_d / Σ_d n_d,    dF/dλ = Σ_d n_d (dF/dλ)_d / Σ_d n_d,

where n_d tasks entered the mean of device d.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from metaopt import base

COUNTS = ("num_tasks", "num_finite", "num_nonfinite")  # of `over_tasks`; its other metrics are means over tasks


def shard(estimator: base.Estimator, mesh: Mesh, axis_name: str = "tasks") -> base.Estimator:
    """Spreads the batch of tasks of `estimator` over the devices of `mesh`.

    λ is copied to every device. Tasks, states and `done` are split along their leading axis, and stay where they are.
    In each step, only one sum of the size of λ travels between devices. The result equals that of the estimator without
    `shard`, up to rounding, and `init` returns the same bits.

    Args:
      estimator: an estimator wrapped by `hypergrad.over_tasks`. It computes a mean over the leading axis of the tasks,
        and its metric "num_finite" is the number of tasks in this mean.
      mesh: the mesh of the devices, for example `jax.make_mesh((jax.device_count(),), ("tasks",))`.
      axis_name: the mesh axis to split over. Along other axes, the same values are computed repeatedly.

    Returns:
      An `Estimator` of the same kind. Metrics are combined, too: the counts of `over_tasks` are summed, its variance is
      pooled, and the others are averaged like F. Means are NaN if no task was finite; `learner` then skips the step.

    Raises:
      KeyError: at trace time, if the metric "num_finite", which `hypergrad.over_tasks` adds, is missing.
      ValueError: (by JAX) at trace time, if a batch of tasks does not split evenly.
    """
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    split, whole = PartitionSpec(axis_name), PartitionSpec()

    def init(key, hyperparams, task):
        state = estimator.init(key, hyperparams, task)
        return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, split))

    def local_estimate(hyperparams, task, state):
        estimate, state = estimator.estimate(hyperparams, task, state)
        num = estimate.metrics["num_finite"]
        total = jax.lax.psum(num, axis_name)

        def weighted_sum(x):
            # A mean over no tasks may be NaN; it has no weight.
            return jax.lax.psum(jnp.where(num > 0, x * num, 0), axis_name)

        def mean(x):
            dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
            return (weighted_sum(x) / total).astype(dtype)

        hypergrad = jax.tree.map(mean, estimate.hypergrad)
        metrics = {
            name: jax.lax.psum(x, axis_name) if name in COUNTS else jax.tree.map(mean, x)
            for name, x in estimate.metrics.items()
        }
        if "hypergrad_variance" in metrics:
            # Σ over all tasks of ‖h_i − h‖²: the part within devices, plus the part between them.
            within = estimate.metrics["hypergrad_variance"] * jnp.maximum(num - 1, 1) / jnp.maximum(num, 1)
            between = optax.tree.norm(optax.tree.sub(estimate.hypergrad, hypergrad), squared=True)
            degrees = jnp.where(total > 0, jnp.maximum(total - 1, 1), jnp.nan)
            metrics["hypergrad_variance"] = weighted_sum(within + between) / degrees
        return base.Estimate(mean(estimate.value), hypergrad, estimate.done, metrics), state

    # No check of varying axes: with it, a gradient in λ taken inside would already be summed over devices.
    sharded_estimate = jax.shard_map(
        local_estimate,
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=(base.Estimate(whole, whole, split, whole), split),  # pyright: ignore[reportArgumentType]
        check_vma=False,
    )

    def estimate(hyperparams, task, state):
        return sharded_estimate(hyperparams, task, state)

    return base.Estimator(init, estimate, estimator.kind)
