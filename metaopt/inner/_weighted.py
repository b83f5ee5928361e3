"""Losses in which λ only weights examples or terms: learned example weights, data cleaning, multi-task weights."""

from collections.abc import Callable

import jax.numpy as jnp


def weighted(
    per_example_loss: Callable, weight_fn: Callable, *, normalize: str = "count", with_context: bool = False
) -> Callable:
    """Returns an inner loss that depends on λ only through the weights of its examples.

        ℓ(θ, λ) = 1/N Σ_i w_i(λ) ℓ_i(θ)

    ℓ_i does not depend on λ, and w does not depend on θ. The product of a vector v with the mixed second derivative is
    therefore a Jacobian-vector product of the losses' forward pass: (∂²ℓ/∂λ∂θ)ᵀ v = 1/N Σ_i (∂w_i/∂λ)ᵀ (∂ℓ_i/∂θ) v.
    Automatic differentiation finds this structure by itself. Under jit it takes the operations of 3 forward passes and
    less memory than a gradient. This holds only if the rule of the hypergradient does not need a product with the
    Hessian ∂²ℓ/∂θ² at the same time. So it holds in the one-step rules, and in the implicit rules after their linear
    solve.

    Args:
      per_example_loss: ℓ_i, `(params, batch) -> [B]`: one loss per example, or one per term. With `with_context`,
        `(params, batch, context) -> [B]` or `-> ([B], model_state)`.
      weight_fn: w, `(hyperparams, batch) -> [B]`, or with `with_context` `(hyperparams, batch, context) -> [B]`. For
        example, a network of the example's features, or
        `lambda hp, batch: jax.nn.sigmoid(hp["weight"][batch["index"]])`.
      normalize: the value of N. "count": B, so that an example of weight zero adds nothing and the others do not gain
        by it. "weights": Σ_i w_i, which must not be zero; only ratios of weights matter. "none": 1, for sums and for
        weights that are already normalized (for example by `batch["mask"].sum()`).
      with_context: whether both functions take a context.

    Returns:
      A loss for `inner.loop`, which needs the same `with_context`. It is a plain function: every AD mode works, and you
      can add a penalty to it.

    Raises:
      KeyError: at trace time, if `normalize` is unknown.
      ValueError: at trace time, if losses or weights are not [B].

    >>> import jax
    >>> from metaopt import inner
    >>> loss = inner.weighted(
    ...     lambda params, batch: (params - batch) ** 2,
    ...     lambda hyperparams, batch: jax.nn.sigmoid(hyperparams),
    ... )
    >>> # the second is weighed down
    >>> print(loss(0.0, jax.numpy.array([0.0, -50.0]), jax.numpy.array([1.0, 9.0])))
    0.25
    """

    def loss(params, hyperparams, batch, *context):
        losses, weights = per_example_loss(params, batch, *context), weight_fn(hyperparams, batch, *context)
        losses, model_state = losses if isinstance(losses, tuple) else (losses, None)
        if jnp.ndim(losses) != 1 or jnp.shape(weights) != jnp.shape(losses):
            raise ValueError(
                "`per_example_loss` and `weight_fn` must both return one number for each example, shape [B]; got "
                f"shapes {jnp.shape(losses)} and {jnp.shape(weights)}."
            )
        divisor = {"count": losses.size, "weights": jnp.sum(weights), "none": 1}[normalize]
        value = jnp.sum(weights * losses) / divisor  # a dot product loses precision on some accelerators
        return value if model_state is None else (value, model_state)

    if with_context:
        return lambda params, hyperparams, batch, context: loss(params, hyperparams, batch, context)
    return lambda params, hyperparams, batch: loss(params, hyperparams, batch)
