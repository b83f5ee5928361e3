"""Spreads a batch of tasks over several devices.

Each device estimates on its share of the tasks. Devices may have different numbers of tasks, and may have skipped
different numbers of non-finite ones. We therefore combine sums and counts, not means of means:

    F = Σ_d n_d F_d / Σ_d n_d,    dF/dλ = Σ_d n_d (dF/dλ)_d / Σ_d n_d,

where n_d tasks entered the mean of device d.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from metaopt import base
from metaopt._jaxpr import Tracer

COUNTS = ("num_tasks", "num_finite", "num_nonfinite")  # of `over_tasks`; its other metrics are means over tasks


def shard(estimator: base.Estimator, mesh: Mesh, axis_name: str = "tasks") -> base.Estimator:
    """Spreads the batch of tasks of `estimator` over the devices of `mesh`.

    λ is copied to every device. Tasks, states and `done` are split along their leading axis, and stay where they are.
    In each step, only one sum of the size of λ travels between devices. The result equals that of the estimator without
    `shard`, up to rounding, and `init` returns the same bits.

    The number of tasks should be a multiple of the number of devices. Otherwise some devices have one task less than
    others. The batch is then padded, and each device estimates only on its real tasks. Between two steps, every device
    has a copy of the whole batch and of its states, because JAX splits arrays only evenly.

    Other axes of the mesh split the work on each task: the rows of its data or the parameters of its model. The program
    states how, by the sharding of its arrays: `jax.device_put(tasks, NamedSharding(mesh, P("tasks", "rows")))`, or
    `jax.lax.with_sharding_constraint(w, P(None, "model"))` inside a loss. Without that, devices along the other axes
    compute the same values repeatedly.

    Args:
      estimator: an estimator wrapped by `hypergrad.over_tasks`. It computes a mean over the leading axis of the tasks,
        and its metric "num_finite" is the number of tasks in this mean.
      mesh: the mesh of the devices, for example `jax.make_mesh((jax.device_count(),), ("tasks",))`.
      axis_name: the mesh axis to split the tasks over.

    Returns:
      An `Estimator` of the same kind. Metrics are combined, too: the counts of `hypergrad.over_tasks` are summed, its
      variance is pooled, and the others are averaged like F. Means are NaN if no task was finite; `learner` then skips
      the step.

    Raises:
      KeyError: at trace time, if the metric "num_finite", which `hypergrad.over_tasks` adds, is missing.
    """
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    split, whole, num_devices = PartitionSpec(axis_name), PartitionSpec(), mesh.shape[axis_name]

    def is_even(task):
        return all(jnp.shape(x)[0] % num_devices == 0 for x in jax.tree.leaves(task))

    def init(key, hyperparams, task):
        state = estimator.init(key, hyperparams, task)
        if not is_even(task):
            return state
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _split(mesh, axis_name, x)), state)

    def sharded(local_estimate):
        """`estimate` on each device's share. Its results are combined."""

        def combined(hyperparams, task, state):
            estimate, state = local_estimate(hyperparams, task, state)
            return _combined(estimate, axis_name), state

        # Why `check_vma=False`: with this check, JAX would already sum a gradient with respect to λ over the devices.
        mapped = jax.shard_map(
            combined,
            mesh=mesh,
            in_specs=(whole, split, split),
            out_specs=(base.Estimate(whole, whole, split, whole), split),  # pyright: ignore[reportArgumentType]
            axis_names={axis_name},
            check_vma=False,
        )
        return mapped if len(mesh.axis_names) == 1 else jax.jit(mapped)  # JAX runs several axes only inside `jit`

    def estimate(hyperparams, task, state):
        if is_even(task):
            return sharded(estimator.estimate)(hyperparams, task, state)
        shapes = jax.eval_shape(estimator.estimate, hyperparams, task, state)[0]
        shares = jax.tree.map(lambda done: _shares(done.shape[0], num_devices), shapes.done)
        local_estimate = partial(_on_real_tasks, estimator.estimate, shapes, shares, axis_name)
        task, state = (_each_batch(lambda share, x: x[share.sources], shares, tree) for tree in (task, state))
        estimate, state = sharded(local_estimate)(hyperparams, task, state)
        done, state = (_each_batch(lambda share, x: x[share.slots], shares, tree) for tree in (estimate.done, state))
        return estimate._replace(done=done), state

    return base.Estimator(init, estimate, estimator.kind)


def _split(mesh: Mesh, axis_name: str, x: jax.Array) -> NamedSharding:
    """Splits the leading axis. A program may split the others by other axes of the mesh."""
    others = len(mesh.axis_names) > 1 and isinstance(x, Tracer)
    return NamedSharding(mesh, PartitionSpec(axis_name, *[PartitionSpec.UNCONSTRAINED] * (others * (x.ndim - 1))))


def _combined(estimate: base.Estimate, axis_name: str) -> base.Estimate:
    """The estimate over the tasks of all devices, from that of this device."""
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
    return base.Estimate(mean(estimate.value), hypergrad, estimate.done, metrics)


# ---- Numbers of tasks that are not a multiple of the number of devices -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shares:
    """How a batch of B tasks is padded to D devices with ⌈B / D⌉ slots each; the real tasks of a device come first."""

    sizes: np.ndarray  # [D] the number of real tasks of each device
    sources: np.ndarray  # [slots of all devices] the task in each slot; a padded slot has an arbitrary task
    slots: np.ndarray  # [B] the slot of each task


def _shares(num_tasks: int, num_devices: int) -> _Shares:
    num_slots = -(-num_tasks // num_devices)
    sizes = np.full(num_devices, num_tasks // num_devices) + (np.arange(num_devices) < num_tasks % num_devices)
    is_real = np.arange(num_slots) < sizes[:, None]
    sources = np.where(is_real.ravel(), np.cumsum(is_real) - 1, 0)
    return _Shares(sizes, sources, np.flatnonzero(is_real))


def _each_batch(function: Callable, batches: base.PyTree, *trees: base.PyTree) -> base.PyTree:
    """Applies `function(batch, *leaves)` to the leaves of `trees`. Each leaf of `batches` goes with a whole subtree."""
    return jax.tree.map(lambda batch, *subtrees: jax.tree.map(partial(function, batch), *subtrees), batches, *trees)


def _on_real_tasks(estimate_fn: Callable, shapes: base.Estimate, shares, axis_name, hyperparams, task, state):
    """The estimate on the real tasks of this device. Each number of real tasks has its own branch, without padding.

    For example, 5 tasks on 2 devices take 3 slots on each device, and the last slot is padded. `sizes` is [[3], [2]],
    so `patterns` is [[2], [3]] and `branch` is [1, 0]. Device 0 runs the branch for 3 tasks. Device 1 runs the branch
    for 2 tasks, on its first two slots. Its third slot keeps its state, and is not done. So all branches return the
    same shapes.

    A device without real tasks returns zeros. Its "num_finite" is then 0, so it has no weight in `_combined`.
    """
    sizes = np.stack([share.sizes for share in jax.tree.leaves(shares)], axis=1)  # [D, batches]
    patterns, branch = np.unique(sizes, axis=0, return_inverse=True)

    def estimate_with_sizes(pattern, hyperparams, task, state):
        sizes = jax.tree.unflatten(jax.tree.structure(shares), pattern.tolist())
        padded_done = jax.tree.map(lambda share: jnp.zeros(share.sources.size // len(share.sizes), bool), shares)
        if not pattern.any():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(done=padded_done), state
        real = [_each_batch(lambda size, x: x[:size], sizes, tree) for tree in (task, state)]
        estimate, new_state = estimate_fn(hyperparams, *(_with_tasks(sizes, tree) for tree in real))

        def refilled(new, old):
            fill = lambda size, new, old: jnp.concatenate([new[:size], old[size:]])
            return _each_batch(fill, sizes, _with_all(sizes, new, old), old)

        return estimate._replace(done=refilled(estimate.done, padded_done)), refilled(new_state, state)

    branches = [partial(estimate_with_sizes, pattern) for pattern in patterns]
    branch_index = jnp.asarray(branch.ravel())[jax.lax.axis_index(axis_name)]
    return jax.lax.switch(branch_index, branches, hyperparams, task, state)


def _with_tasks(sizes: base.PyTree, batches: base.PyTree) -> base.PyTree:
    """A tuple of batches without those that have no task on this device, since `over_tasks` rejects empty ones."""
    return tuple(x for size, x in zip(sizes, batches, strict=True) if size) if type(sizes) is tuple else batches


def _with_all(sizes: base.PyTree, batches: base.PyTree, former: base.PyTree) -> base.PyTree:
    """The inverse of `_with_tasks`, with the former values of the batches that it left out."""
    if type(sizes) is not tuple:
        return batches
    new = iter(batches)
    return tuple(next(new) if size else old for size, old in zip(sizes, former, strict=True))
