"""One training run that carries a random perturbation of θ, for `diagnose`."""

import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import base, inner


class Steps(NamedTuple):
    """The numbers of one training run, step by step.

    Attributes:
      loss: [T] the inner loss ℓ.
      grad_norm: [T] ‖∇θ ℓ‖.
      growth: [T] log growth of the perturbation.
    """

    loss: Any
    grad_norm: Any
    growth: Any


def perturbed_run(
    problem: base.Problem,
    hyperparams: base.HyperParams,
    task: base.Task,
    start_key: jax.Array,
    noise_key: jax.Array,
    num_steps: int,
    with_slopes: bool,
) -> tuple[Steps, jax.Array, tuple[Any, Any]]:
    """Trains once, with a perturbation of θ in forward mode.

    Returns:
      The numbers of each step; f at the end; and whether its gradients with respect to θ and λ are finite, which is
      True without `with_slopes`.
    """
    loop = problem.loop
    state = loop.init(start_key, hyperparams, task.train)
    leaves, structure = jax.tree.flatten(state)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def join(floats, state):
        floats = iter(floats)
        return structure.unflatten(
            [next(floats) if m else x for m, x in zip(moves, jax.tree.leaves(state), strict=True)]
        )

    def floats_of(state):
        return [x for m, x in zip(moves, jax.tree.leaves(state), strict=True) if m]

    # Only θ is perturbed; optimizer states follow. If each leaf of the state is replaced with its index, `loop.iterate`
    # returns the indices of θ.
    is_param = set(jax.tree.leaves(loop.iterate(structure.unflatten(list(range(len(leaves)))))))
    noise = [
        jax.random.normal(jax.random.fold_in(noise_key, i), x.shape, x.dtype) if i in is_param else jnp.zeros_like(x)
        for i, x in enumerate(leaves)
        if moves[i]
    ]
    norm = optax.tree.norm(noise)
    noise = [(n / norm).astype(n.dtype) for n in noise]

    def step(carry, _):
        state, delta = carry
        context, batch = loop.context(state), loop.batch(state, task.train)
        value, grads = jax.value_and_grad(loop.loss, has_aux=True)(loop.iterate(state), hyperparams, batch, context)

        def advance(floats):
            new = inner.step(loop, join(floats, state), hyperparams, task.train)
            return floats_of(new), new

        _, delta, new = jax.jvp(advance, (floats_of(state),), (delta,), has_aux=True)
        # Divide by the largest entry first: the squares of Adam's second moments may overflow.
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(d), initial=0.0) for d in delta]))
        delta = [d / jnp.where(largest > 0, largest, 1).astype(d.dtype) for d in delta]
        size = optax.tree.norm(delta)
        delta = [d / jnp.where(size > 0, size, 1).astype(d.dtype) for d in delta]
        return (new, delta), Steps(value[0], optax.tree.norm(grads), jnp.log(largest) + jnp.log(size))

    (state, _), steps = jax.lax.scan(step, (state, noise), length=num_steps)
    return steps, *_outer_loss(problem, hyperparams, task, state, start_key, with_slopes)


def _outer_loss(problem, hyperparams, task, state, key, with_slopes: bool) -> tuple[jax.Array, tuple[Any, Any]]:
    """f, and whether ∂f/∂θ and ∂f/∂λ are finite; True without `with_slopes`."""
    batch, context = problem.outer_batch(key, task), problem.loop.context(state)

    def outer_loss(params, hyperparams):
        return problem.outer_loss(params, hyperparams, batch, context)

    params = problem.loop.params(state)
    if not with_slopes:
        return outer_loss(params, hyperparams), (True, True)
    outer, grads = jax.value_and_grad(outer_loss, (0, 1), allow_int=True)(params, hyperparams)
    of_theta, of_lambda = (
        jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]))
        for tree in grads
    )
    return outer, (of_theta, of_lambda)


def has_gradient(problem: base.Problem, hyperparams: base.HyperParams, task: base.Task, key: jax.Array) -> bool:
    """Whether JAX can differentiate the outer loss in reverse mode. Evolution strategies do not need this.

    A ValueError that the caller's own derivative rule (`jax.custom_vjp`) raises is not caught. One that JAX raises for
    the result of such a rule, or for a call inside it, counts as no derivative.
    """
    has_derivative = True

    def gradient(hyperparams):
        nonlocal has_derivative
        state = problem.loop.init(key, hyperparams, task.train)
        try:
            _outer_loss(problem, hyperparams, task, state, key, with_slopes=True)
        except (ValueError, NotImplementedError) as error:
            # JAX raises such errors for a loop of unknown length, a callback, or a primitive. They are caught within
            # `eval_shape`, which removes JAX's frames from the traceback.
            *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
            is_own = innermost.f_globals.get("__name__", "").partition(".")[0] not in ("jax", "metaopt")
            if is_own and not isinstance(error, NotImplementedError):
                raise
            has_derivative = False

    jax.eval_shape(gradient, hyperparams)
    return has_derivative
