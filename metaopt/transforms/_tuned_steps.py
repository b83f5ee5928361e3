"""Steps of an optimizer as functions of λ: their derivatives in λ, and from these the hypergradient h of a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metaopt import _explained, _trees, base
from metaopt.transforms._differentiable import differentiable


class Settings(NamedTuple):
    """The arguments of `self_tuning`."""

    factory: Callable
    start: base.HyperParams
    tuner: optax.GradientTransformationExtraArgs
    rule: str
    discount: float
    gap: float
    mode: str
    projection_fn: Callable | None
    valid_loss_fn: Callable | None


class SelfTuningState(NamedTuple):
    """State of `self_tuning`.

    Attributes:
      hyperparams: λ, as the last step used it; read it for logging.
      inner: the optimizer's state.
      tuner: the state of the optimizer of λ.
      last: the data that determine how λ moved the parameters. With `mode="forward"` these are the derivatives
        themselves, with a leading axis for the entries of λ; with "reverse", the inputs of the last step.
      count: [] int32, the number of steps taken.
    """

    hyperparams: base.HyperParams
    inner: optax.OptState
    tuner: optax.OptState
    last: tuple
    count: jax.Array


def make_optimizer(factory: Callable, hyperparams: base.HyperParams) -> optax.GradientTransformationExtraArgs:
    """The optimizer for one λ, with finite derivatives at zero gradients."""
    try:
        with _explained.schedules("factory"):
            return differentiable(factory(hyperparams))
    except TypeError as error:
        error.add_note(
            "`factory` must be a function of the whole of λ that returns an optax transform: for a dict, "
            "`lambda hp: optax.adamw(**hp)`."
        )
        raise


def run(
    factory: Callable,
    hyperparams: base.HyperParams,
    updates: optax.Updates,
    inner: optax.OptState,
    params: base.Params,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """u and the next state of the optimizer, as arrays, since some states hold a Python number."""
    with _explained.schedules("factory"):
        outputs = make_optimizer(factory, hyperparams).update(updates, inner, params, **extra_args)
        return jax.tree.map(jnp.asarray, outputs)


def forward_signal(settings: Settings, grads: base.Params, state: SelfTuningState) -> base.HyperParams:
    """Z_tᵀ g_t; zero before the first step, since Z is zero."""
    derivatives, _ = state.last
    flat, unravel = ravel_pytree(state.hyperparams)
    # `axis_size` allows parameters that are an empty tree.
    dots = jax.vmap(lambda z: optax.tree.vdot(_trees.wide(z), _trees.wide(grads)), axis_size=flat.size)(derivatives)
    signal = jnp.real(dots)
    if settings.rule in ("normalized", "cosine"):
        lengths = jax.vmap(norm, axis_size=flat.size)(derivatives)
        signal = divided(signal, norm(grads) * (lengths if settings.rule == "cosine" else jnp.max(lengths)))
    return unravel(jnp.asarray(signal, flat.dtype))


def forward_step(
    settings: Settings,
    hyperparams: base.HyperParams,
    updates: optax.Updates,
    state: SelfTuningState,
    params: base.Params,
    grad_fn: Callable | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState, tuple]:
    """u_t, the next state of the optimizer, and Z_t: the derivatives of the parameters and, if μ > 0, of the state."""
    floats, rest = _trees.split((updates, params, state.inner))
    flat, unravel = ravel_pytree(hyperparams)
    # One tangent per entry, in λ or in log λ.
    directions = jnp.ones_like(flat) if settings.rule == "additive" else flat
    primals, tangents = (hyperparams,), (jax.vmap(unravel)(jnp.diag(directions)),)
    if settings.discount:
        by_params, by_inner = jax.tree.map(lambda z: settings.discount * z, state.last)
        if grad_fn is None:
            raise ValueError(
                "`discount` above 0 needs the gradient of the training loss as a function, to see how it changes "
                "with the parameters: call `update(updates, state, params, grad_fn=grad_fn)`."
            )
        train_grad = lambda p: gradient("grad_fn", grad_fn, _trees.merge(p, rest[1]), updates)
        _, hessian = jax.linearize(train_grad, floats[1])
        by_updates = cast_like(jax.vmap(hessian, axis_size=flat.size)(by_params), floats[0])
        primals, tangents = (hyperparams, floats), (*tangents, (by_updates, by_params, by_inner))

    def advance(hyperparams, floats=floats):
        updates, params, inner = _trees.merge(floats, rest)
        out, inner = run(settings.factory, hyperparams, updates, inner, params, extra_args)
        return _trees.split((out, cast_like(inner, state.inner)))

    floats_out, jvp_fn, rest_out = jax.linearize(advance, *primals, has_aux=True)
    by_params_out, by_inner_out = jax.vmap(jvp_fn)(*tangents)
    out, inner = _trees.merge(floats_out, rest_out)
    if not settings.discount:
        return out, inner, (by_params_out, None)
    # `advance` returns u_t, and Z_t belongs to θ_t = θ_{t−1} + u_t, so the part of θ_{t−1}, μ Z_{t−1}, is added.
    return out, inner, (jax.tree.map(jnp.add, by_params, by_params_out), by_inner_out)


def reverse_signal(
    settings: Settings, grads: base.Params, state: SelfTuningState, extra_args: dict[str, Any]
) -> base.HyperParams:
    """(∂u_{t−1}/∂λ)ᵀ g_t, by a pullback through the last step, which is computed again."""
    last_grads, last_inner, last_params = state.last

    def last_update(hyperparams):
        out, _ = run(settings.factory, hyperparams, last_grads, last_inner, last_params, extra_args)
        return _trees.split(out)[0]

    last_updates, pullback = jax.vjp(last_update, state.hyperparams)
    if settings.rule == "normalized":  # before the products, which may over- or underflow in half precision
        length = norm(grads)
        grads = jax.tree.map(lambda g: divided(g, length), _trees.wide(grads))
    # JAX's pullback belongs to u ↦ Re Σ g u, without a conjugate.
    (signal,) = pullback(cast_like(jax.tree.map(jnp.conj, grads), last_updates))
    if settings.rule != "additive":
        signal = jax.tree.map(jnp.multiply, state.hyperparams, signal)
    if settings.rule == "normalized":
        last_length = norm(last_updates)
        signal = jax.tree.map(lambda h: divided(h, last_length), signal)
    # No update exists yet before the first step.
    return jax.tree.map(lambda h: jnp.where(state.count > 0, h, 0), signal)


def gradient(name: str, grad_fn: Callable, params: base.Params, updates: optax.Updates) -> base.Params:
    """The result of the caller's gradient function, for the leaves whose updates have a derivative."""
    if not callable(grad_fn):
        raise ValueError(
            f"`{name}` must be a function `params -> gradient`, such as "
            f"`lambda params: jax.grad(loss)(params, batch)`; got a {type(grad_fn).__name__}."
        )
    grads = grad_fn(params)
    check_like(f"the result of `{name}`", grads, updates)
    return jax.tree.map(lambda x, u: jnp.asarray(x) if _trees.is_inexact(u) else None, grads, updates)


_CHANGED_STRUCTURE = (
    " (`jax.value_and_grad` returns a pair. Transforms that change the parameters' structure, such as "
    "`optax.lookahead`, belong around `self_tuning`, not into its factory.)"
)


def check_like(
    name: str,
    tree: base.PyTree,
    like: base.PyTree,
    like_name: str = "the gradients",
    *,
    hint: str = _CHANGED_STRUCTURE,
    real: bool = True,
) -> None:
    """Raises ValueError if a tree differs from another in structure or shapes, or is not floating-point like it.

    With `real`, it must not be complex either if the other is real.
    """

    def fits(leaf, other):
        if not _trees.is_inexact(other):
            return True
        imaginary = real and jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(other)
        return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not imaginary

    shapes, expected = (jax.tree.map(jnp.shape, t) for t in (tree, like))
    same = jax.tree.structure(tree) == jax.tree.structure(like) and shapes == expected
    if not same or not all(map(fits, jax.tree.leaves(tree), jax.tree.leaves(like))):
        types, expected = (jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", t) for t in (tree, like))
        raise ValueError(f"{name[0].upper()}{name[1:]} must be a tree like {like_name}, {expected}; got {types}.{hint}")


def cast_like(new: base.PyTree, old: base.PyTree) -> base.PyTree:
    """Casts `new` to the precision of `old`, so that λ in float32 does not widen values in bfloat16."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if _trees.is_inexact(y) else x, new, old)


def norm(tree: base.PyTree) -> jax.Array:
    """The norm, with a derivative of zero at zero, since the last update is zero before the first step."""
    square = optax.tree.norm(_trees.wide(tree), squared=True)
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def divided(x: jax.Array, norm: jax.Array) -> jax.Array:
    """x / norm, or zero if the norm is zero."""
    return jnp.where(norm == 0, 0, x / jnp.where(norm == 0, 1, norm))
