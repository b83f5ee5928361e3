"""Runs of several processes (`jax.distributed`). Each process holds a part of the tasks and states, and all of λ.

All processes take the same steps. A process may leave the loop, write a checkpoint or evaluate only when all do, since
the others would wait for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaopt import base


def is_split(x: Any) -> bool:
    """Whether other processes hold a part of this array."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated


def local(tree: base.PyTree) -> base.PyTree:
    """The arrays of which every process has a copy, as arrays of this process only."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else jnp.asarray(np.asarray(x)), tree)


def agreed(received: Sequence[int], ended: bool) -> tuple[int, bool]:
    """Shares signals and requests to stop with the other processes.

    A signal may arrive at any moment, at one process only. So decide by the returned number, which is the same in all
    processes.

    Returns:
      The number of a signal that a process has received, or 0, and whether any process asked to stop.
    """
    number = max(received, default=0)
    if jax.process_count() == 1:
        return number, ended
    from jax.experimental import multihost_utils

    number, ended = multihost_utils.process_allgather(np.array([number, ended])).max(0)
    return int(number), bool(ended)


def in_all(function: Callable, *args: Any) -> Any:
    """Calls a function in every process. If it raises an error in one of them, all raise an error."""
    result = failure = None
    try:
        result = function(*args)
    except Exception as error:
        failure = error
    _, failed = agreed([], failure is not None)
    if failed:
        raise failure or ValueError("another process had an error")
    return result


def of_first(number: float) -> float:
    """The number of the first process, to the bit. Others may have computed another one."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    words = np.array([number], np.float64).view(np.uint32)  # JAX would round a float64
    return float(multihost_utils.process_allgather(words)[0].view(np.float64)[0])


def gathered(x: jax.Array) -> np.ndarray:
    """All of an array that is split over processes."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def whole(x: jax.Array) -> np.ndarray:
    """All of an array, which may be split over processes."""
    return gathered(x) if is_split(x) else np.asarray(x)


def checksum(x: jax.Array) -> int:
    """A checksum of the bits that does not depend on how the array is split."""
    return int(_checksum(x))


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    word = jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    # Sums of integers modulo 2³² do not depend on their order. The factors are odd, so that each bit of a word counts.
    mixed = (words ^ (words >> 15)) * (position * jnp.uint32(2_654_435_769) | jnp.uint32(1))
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def described_sharding(x: jax.Array) -> dict[str, Any] | None:
    """How an array is split, as JSON values; None if it is not split along axes of a mesh."""
    if not isinstance(x.sharding, NamedSharding) or not isinstance(x.sharding.mesh, Mesh):
        return None
    mesh = x.sharding.mesh
    spec = [list(axis) if isinstance(axis, tuple) else axis for axis in x.sharding.spec]
    return {"mesh": dict(mesh.shape), "devices": [device.id for device in mesh.devices.flat], "spec": spec}


def sharding(described: dict[str, Any]) -> NamedSharding | None:
    """The sharding of a description; None if it has other devices than this run."""
    devices = {device.id: device for device in jax.devices()}
    if jax.process_count() == 1 or sorted(devices) != sorted(described["devices"]):
        return None
    sizes: Sequence[int] = list(described["mesh"].values())
    mesh = Mesh(np.array([devices[i] for i in described["devices"]]).reshape(sizes), tuple(described["mesh"]))
    return NamedSharding(
        mesh, PartitionSpec(*(tuple(axis) if type(axis) is list else axis for axis in described["spec"]))
    )
