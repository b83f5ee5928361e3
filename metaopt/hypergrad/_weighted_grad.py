"""The gradient of an inner loss whose own derivative is taken forward over θ, and in reverse over λ."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def weighted_grad(function: Callable, *, has_aux: bool = False) -> Callable:
    """`jax.grad` for `inner.step`, whose reverse mode is short where λ only weighs examples (`inner.weighted`).

    The pullback of v through ∇θ g(θ, λ) is the gradient of a directional derivative of g:

        ((∂²g/∂θ²) v, (∂²g/∂λ∂θ)ᵀ v) = ∇(θ,λ) [⟨∇θ g(θ, λ), v⟩],

    where ⟨∇θ g, v⟩ is one Jacobian-vector product of the forward pass. Its gradient by λ alone goes back through what λ
    enters: where that is the weights of examples, 1/N (∂w/∂λ)ᵀ (∂ℓ/∂θ) v, the network is passed once, forward, about
    3 of its forward passes' operations, and no activation is stored. Under jit the other product, with the Hessian, is
    only computed where it is used: not by one step's hypergradient (`lookahead(..., num_steps=1)`).

    Exact for every loss. Works under jit, vmap, remat and further reverse mode; forward mode (`jax.jvp`) does not, and
    neither does a loss that closes over what is differentiated: give it as λ.

    Args:
      function: g, called as `inner.step` calls it.
      has_aux: g returns a pair (value, model state).

    Returns:
      What `jax.grad(function, has_aux=has_aux)` returns.
    """

    @jax.custom_vjp
    def gradient(*args):
        return jax.grad(function, has_aux=has_aux)(*args)

    def forward(*args):
        return gradient(*args), args

    def backward(args, cotangents):
        v, to_aux = cotangents if has_aux else (cotangents, None)

        def directional(params, *rest):
            along = jax.jvp(lambda params: function(params, *rest), (params,), (v,), has_aux=has_aux)
            return along[1], (along[2] if has_aux else None)

        (slope, _), pullback = jax.vjp(directional, *args)
        return pullback((jnp.ones_like(slope), to_aux))

    gradient.defvjp(forward, backward)
    return gradient
