"""Momenta at several time scales, whose decays can be learned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class AccumulationState(NamedTuple):
    """State of `learnable_accumulation`.

    Attributes:
      momenta: [K, ...] for each parameter [...].
    """

    momenta: optax.Updates


def learnable_accumulation(
    decays: jax.typing.ArrayLike,
    weights: jax.typing.ArrayLike | None = None,
    *,
    average: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Replaces the gradient by a weighted sum of its momenta at K decays.

        m_k ← β_k m_k + g,    u = Σ_k w_k m_k

    or, with `average`, m_k ← β_k m_k + (1 − β_k) g. With one decay this is `optax.trace` (with `average`, `optax.ema`
    without debiasing). With several decays it is aggregated momentum: the momenta with small β damp the oscillations of
    the momentum with the largest β. It is differentiable in β and w in both modes. Their ranges are not checked:
    `spaces.interval(0, 1, shape=(K,))` and `spaces.simplex(K)` keep them in range.

    Takes K times the memory of the parameters.

    Args:
      decays: β, [K], each in [0, 1).
      weights: w, [K]; 1/K by default.
      average: whether a momentum is an average of gradients instead of a sum.
      accumulator_dtype: the dtype of the momenta; by default the parameters' dtype. In bfloat16 a momentum with β above
        .998 is rounded to itself and never decays: use `jnp.float32` for such decays.

    Returns:
      A transform, to be chained with a learning rate. As with `optax.trace`, its updates have the wider dtype of
        gradient and momentum.

    Raises:
      ValueError: if `weights` has another shape.

    Source: Lucas et al., ICLR 2019, https://arxiv.org/abs/1804.00325

    >>> import jax.numpy as jnp, optax
    >>> from metaopt import transforms
    >>> momentum = transforms.learnable_accumulation(jnp.array([0.0, 0.5]))
    >>> state = momentum.init(1.0)
    >>> for _ in range(2):
    ...     update, state = momentum.update(1.0, state)
    >>> print(update)
    1.25
    """
    if weights is not None and np.shape(weights) != np.shape(decays):
        raise ValueError(
            "`weights` must have one entry for each of `decays`; got shapes "
            f"{np.shape(weights)} and {np.shape(decays)}."
        )
    beta = jnp.asarray(decays)
    weight = jnp.full(beta.shape, 1 / len(beta)) if weights is None else jnp.asarray(weights)

    def init(params):
        return AccumulationState(
            jax.tree.map(
                lambda p: jnp.zeros((len(beta), *jnp.shape(p)), accumulator_dtype or jnp.result_type(p)), params
            )
        )

    def update(updates, state, params=None):
        del params

        def column(vector, m):
            return vector.reshape(-1, *[1] * (m.ndim - 1))

        def decayed(u, m):
            b = column(beta, m)
            return (b * m + (1 - b if average else 1) * jnp.asarray(u)[None]).astype(m.dtype)

        def mixed(u, m):  # a sum of products, since accelerators round in `dot`
            return (column(weight, m) * m).sum(0).astype(jnp.promote_types(jnp.result_type(u), m.dtype))

        momenta = jax.tree.map(decayed, updates, state.momenta)
        return jax.tree.map(mixed, updates, momenta), AccumulationState(momenta)

    return optax.GradientTransformation(init, update)
