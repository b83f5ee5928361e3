"""The configurations that a learned optimizer chooses from, and the maximization of a score over them.

Without candidates we ascend the gradient of the score over a configuration's unconstrained coordinates z.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt import base, spaces
from metaopt.blackbox._encoding import encode_fn, encoder

NUM_RANDOM = 256  # number of random configurations; ascents start from the best of them
_NUM_RESTARTS, _NUM_ASCENTS = 8, 20


class Domain(NamedTuple):
    """A search space, or P candidates in it.

    Attributes:
      space: the search space of λ.
      encode: (configuration, strict) -> [D], with a cache.
      encode_relaxed: λ -> [D]; differentiable.
      default: [D] the encoded default of the space.
      default_z: [Z] its unconstrained coordinates.
      unravel: z -> a tree like the space.
      sample: keys [N] -> [N, Z] random configurations.
      candidates: the P configurations to choose from; empty to choose from the whole space.
      encoded: [P, D] the encoded candidates, or None without candidates.
      names: the bytes of each encoded candidate.
    """

    space: base.PyTree
    encode: Callable[..., np.ndarray]
    encode_relaxed: Callable[[base.HyperParams], jax.Array]
    default: np.ndarray
    default_z: jax.Array
    unravel: Callable[[jax.Array], base.PyTree]
    sample: Callable[[jax.Array], jax.Array]
    candidates: list[dict[str, Any]]
    encoded: np.ndarray | None
    names: list[bytes]

    @property
    def holds_default(self) -> bool:
        """Whether the default can be chosen."""
        return self.encoded is None or bool(default_candidates(self))


def make_domain(space: base.PyTree, candidates: Sequence[Mapping[str, Any]] | None) -> Domain:
    """Returns the `Domain` of candidates, or of the whole space without candidates."""
    encode, pool = encoder(space), [dict(candidate) for candidate in candidates or ()]
    encoded = np.stack([encode(candidate, True) for candidate in pool]) if pool else None
    names = [] if encoded is None else [row.tobytes() for row in encoded]
    default_z, unravel = ravel_pytree(spaces.to_unconstrained(space, spaces.default(space)))
    to_z = lambda key: ravel_pytree(spaces.to_unconstrained(space, spaces.sample(key, space)))[0]
    sample = jax.jit(jax.vmap(to_z))
    return Domain(space, encode, encode_fn(space), encode({}), default_z, unravel, sample, pool, encoded, names)


def default_candidates(domain: Domain) -> list[dict[str, Any]]:
    """The candidates that are encoded like the space's default."""
    if domain.encoded is None:
        return []
    is_default = (domain.encoded == domain.default).all(1)
    return [candidate for candidate, same in zip(domain.candidates, is_default, strict=True) if same]


def to_configuration(domain: Domain, z: jax.Array) -> dict[str, Any]:
    """The configuration with unconstrained coordinates z, as plain values by name."""
    return spaces.configuration(domain.space, spaces.to_constrained(domain.space, domain.unravel(z)))


def maximize(domain: Domain, key: jax.Array, score: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Finds a configuration of the space with a large score after rounding.

    It scores the default and random configurations, and ascends the gradient from the best of them. It returns the best
    of these starts and ends.

    Args:
      domain: its candidates are ignored.
      key: the key for the random configurations. Their keys are `split(key, NUM_RANDOM)`, which equal `fold_in(key, i)`
        for i below `NUM_RANDOM`. A caller can fold in larger numbers for other purposes.
      score: [P, D] encoded configurations -> [P]; differentiable.

    Returns:
      [Z] the unconstrained coordinates of the configuration.
    """
    relaxed, rounded = (lambda z: _encode_z(domain, z)), (lambda z: _encode_rounded(domain, z))
    z = jnp.concatenate([domain.default_z[None], domain.sample(jax.random.split(key, NUM_RANDOM))])
    top = z[jax.lax.top_k(score(jax.vmap(rounded)(z)), _NUM_RESTARTS)[1]]
    optimizer = optax.adam(0.1)

    def ascend(carry, _):
        z, state = carry
        grads = jax.grad(lambda z: -score(jax.vmap(relaxed)(z)).sum())(z)
        # Acquisition functions are flat far from their maximum, so we use only the direction of the gradient.
        grads = grads / jnp.maximum(jnp.linalg.norm(grads, axis=1, keepdims=True), 1e-12)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(z, updates), state), None

    (ascended, _), _ = jax.lax.scan(ascend, (top, optimizer.init(top)), length=_NUM_ASCENTS)
    points = jnp.concatenate([top, jnp.asarray(ascended)])
    return points[jnp.argmax(score(jax.vmap(rounded)(points)))]


def _encode_z(domain: Domain, z: jax.Array) -> jax.Array:
    return domain.encode_relaxed(spaces.to_constrained(domain.space, domain.unravel(z)))


def _encode_rounded(domain: Domain, z: jax.Array) -> jax.Array:
    """The encoding of the configuration that `to_configuration` returns; a simplex is not rounded."""

    def discretize(leaf, x):
        return x if leaf.kind == "simplex" else jnp.asarray(leaf.discretize(x), z.dtype)

    constrained = spaces.to_constrained(domain.space, domain.unravel(z))
    return domain.encode_relaxed(jax.tree.map(discretize, domain.space, constrained))
