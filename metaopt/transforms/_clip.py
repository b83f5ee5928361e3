"""Clipping by a norm that can be learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks
from metaopt._jaxpr import Tracer


def learnable_clip(
    max_norm: jax.typing.ArrayLike, *, scope: str = "global", sharpness: jax.Array | float | None = None
) -> optax.GradientTransformation:
    """Scales updates down to a norm c: u = g · min(1, c/‖g‖), with finite derivatives everywhere.

    With this minimum, c has no gradient while no update is clipped. A `sharpness` p replaces the minimum by a smooth
    one,

        u = g · (1 + (‖g‖/c)^p)^(−1/p),

    whose norm is below both ‖g‖ and c. It tends to the minimum for p → ∞, and has a derivative in c at every step.

    Without a `sharpness` the values are those of `optax.clip_by_global_norm`, in float32 and float64. Norms of
    half-precision updates are computed in float32. At g = 0 the derivative in g is 1, and in c it is 0.

    Args:
      max_norm: c, positive.
      scope: "global" for the norm of all updates together, "leaf" for a separate norm of each parameter.
      sharpness: p, positive; 1 gives g · c/(c + ‖g‖), None gives the minimum itself.

    Returns:
      A stateless transform, differentiable in c, p and g in both modes.

    Raises:
      KeyError: if `scope` is neither "global" nor "leaf".
      ValueError: if `max_norm` or `sharpness` is not one positive number; the sign of a traced number is not checked.

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import transforms
    >>> length = lambda c, p: jnp.sum(
    ...     transforms.learnable_clip(c, sharpness=p).update(jnp.array([1.0]), ())[0]
    ... )
    >>> [round(float(jax.grad(length)(2.0, p)), 3) for p in (None, 1.0)]
    [0.0, 0.111]
    """
    for name, value in (("max_norm", max_norm), ("sharpness", sharpness)):
        if value is not None and np.shape(value):
            raise ValueError(
                f"`{name}` must be one number; got shape {np.shape(value)}. One for each parameter: "
                '`per_parameter(functools.partial(learnable_clip, scope="leaf"))`.'
            )
        if not isinstance(value, Tracer):  # it is traced within `inject_hyperparams`
            _checks.check_positive(name, value, optional=name == "sharpness")

    def clip(updates):
        precise = jax.tree.map(lambda u: u.astype(jnp.promote_types(u.dtype, jnp.float32)), updates)
        square = optax.tree.norm(precise, squared=True)
        norm = jnp.sqrt(jnp.where(square > 0, square, 1))

        def scaled(u, like):
            if sharpness is None:
                clipped = jnp.where((square == 0) | (norm < max_norm), u, (u / norm) * max_norm)
            else:
                # (1 + r^p)^(-1/p), where r^p may overflow.
                shrink = jnp.exp(-jnp.logaddexp(0, sharpness * jnp.log(norm / max_norm)) / sharpness)
                clipped = u * jnp.where(square > 0, shrink, 1)
            return clipped.astype(like.dtype)

        return jax.tree.map(scaled, precise, updates)

    clipped = {"global": clip, "leaf": functools.partial(jax.tree.map, clip)}[scope]

    def update(updates, state, params=None):
        del params
        return clipped(jax.tree.map(jnp.asarray, updates)), state

    return optax.GradientTransformation(optax.init_empty_state, update)
