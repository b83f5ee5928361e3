"""Losses whose λ only weighs examples, or terms: learned example weights, data cleaning, multi-task weights."""

from collections.abc import Callable

import jax.numpy as jnp

NORMALIZE = ("count", "weights", "none")


def weighted(
    per_example_loss: Callable, weight_fn: Callable, *, normalize: str = "count", with_context: bool = False
) -> Callable:
    """An inner loss through whose weights alone λ enters.

        g(θ, λ) = 1/N Σ_i w_i(λ) ℓ_i(θ)

    Since ℓ does not see λ and w does not see θ, the mixed product is a Jacobian-vector product of the losses' forward
    pass, (∂²g/∂λ∂θ)ᵀ v = 1/N (∂w/∂λ)ᵀ (∂ℓ/∂θ) v. Automatic differentiation finds that by itself: under jit it takes 3
    forward passes' operations and less memory than a gradient, wherever the product with the Hessian is not asked for
    along with it: in the one-step rules, and in the implicit ones after their solve.

    Args:
      per_example_loss: ℓ, `(params, batch) -> [B]`: one loss an example, or one a term. With `with_context`,
        `(params, batch, context) -> [B]` or `-> ([B], model_state)`.
      weight_fn: w, `(hyperparams, batch) -> [B]`, or with `with_context` `(hyperparams, batch, context) -> [B]`: a
        network of the example's features, or `lambda hp, batch: jax.nn.sigmoid(hp["weight"][batch["index"]])`.
      normalize: what N is. "count": B, so that a weight of zero takes its example's share of the gradient away;
        "weights": Σ_i w_i, which must not be zero, so that only ratios of weights count; "none": 1, for sums and for
        weights that are normalized already (by `batch["mask"].sum()`, say).
      with_context: the functions are in their full form.

    Returns:
      A loss for `inner.loop`, to be given the same `with_context`. It is a plain function: every AD mode works, and a
      penalty may be added to it.

    Raises:
      ValueError: `normalize` is unknown; at trace time, losses or weights are not [B].

    >>> import jax
    >>> from metaopt import inner
    >>> loss = inner.weighted(
    ...     lambda params, batch: (params - batch) ** 2,
    ...     lambda hyperparams, batch: jax.nn.sigmoid(hyperparams),
    ... )
    >>> print(loss(0.0, jax.numpy.array([0.0, -50.0]), jax.numpy.array([1.0, 9.0])))  # the second is weighed down
    0.25
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"`normalize` must be one of {', '.join(map(repr, NORMALIZE))}; got {normalize!r}.")

    def loss(params, hyperparams, batch, *context):
        losses, weights = per_example_loss(params, batch, *context), weight_fn(hyperparams, batch, *context)
        losses, model_state = losses if isinstance(losses, tuple) else (losses, None)
        if jnp.ndim(losses) != 1 or jnp.shape(weights) != jnp.shape(losses):
            raise ValueError(
                "`per_example_loss` and `weight_fn` must both return one number an example, shape [B]; got shapes "
                f"{jnp.shape(losses)} and {jnp.shape(weights)}."
            )
        divisor = {"count": losses.size, "weights": jnp.sum(weights), "none": 1}[normalize]
        value = jnp.sum(weights * losses) / divisor  # a dot product loses precision on some accelerators
        return value if model_state is None else (value, model_state)

    if with_context:
        return lambda params, hyperparams, batch, context: loss(params, hyperparams, batch, context)
    return lambda params, hyperparams, batch: loss(params, hyperparams, batch)
