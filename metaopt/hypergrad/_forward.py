"""Forward-mode hypergradients: the derivative of the inner state is carried together with the state.

    Z_{t+1} = (∂Φ/∂θ) Z_t + ∂Φ/∂λ,    dF/dλ = Σ_t w_t [∂f/∂λ + (∂f/∂θ_t) Z_t],    Z_t = dθ_t/dλ.

No step is stored for later, so memory does not depend on T. Time and memory grow with the number of entries of λ.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt import _trees, base, inner
from metaopt.hypergrad import _unroll


def _pushed(linear: Callable, *tangents: base.PyTree, chunk: int | None) -> base.PyTree:
    """Applies a linear map to each of n tangents."""
    if chunk is None:
        return jax.vmap(linear)(*tangents)
    return jax.lax.map(lambda tangent: linear(*tangent), tangents, batch_size=chunk)


def _judged(
    problem: base.Problem,
    hyperparams: base.HyperParams,
    batch: base.Batch,
    state: base.InnerState,
    tangents: base.PyTree,
) -> tuple[jax.Array, base.HyperParams]:
    """f and its total derivative; one reverse pass of f serves all tangents."""
    loop = problem.loop
    flat, unravel = ravel_pytree(hyperparams)
    floats, rest = _trees.split(state)

    def outer_loss(floats, hyperparams):
        state = _trees.merge(floats, rest)
        return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

    value, (by_state, direct) = jax.value_and_grad(outer_loss, argnums=(0, 1))(floats, hyperparams)
    through = jax.vmap(lambda tangent: jnp.asarray(optax.tree.vdot(tangent, by_state), flat.dtype))(tangents)
    return value, optax.tree.add(direct, unravel(through))


def _advanced(
    loop: base.InnerLoop,
    hyperparams: base.HyperParams,
    data: base.Data,
    basis: base.HyperParams,
    state: base.InnerState,
    tangents: base.PyTree,
    *,
    chunk: int | None,
    grad: Callable,
) -> tuple[base.InnerState, base.PyTree]:
    """The state after one step, and its tangents: (∂Φ/∂θ) Z + ∂Φ/∂λ."""
    floats, rest = _trees.split(state)

    def advance(floats, hyperparams):
        return _trees.split(inner.step(loop, _trees.merge(floats, rest), hyperparams, data, grad=grad))

    # Leaves that are not floating-point have no tangent. The linear map holds the intermediate values of the step, so
    # they are computed once and not once for each of the n tangents.
    floats, linear, rest = jax.linearize(advance, floats, hyperparams, has_aux=True)
    return _trees.merge(floats, rest), _pushed(linear, tangents, basis, chunk=chunk)


def forward(
    problem: base.Problem,
    *,
    num_steps: int,
    outer: str | Sequence[float] | np.ndarray = "last",
    chunk: int | None = None,
    grad: Callable = jax.grad,
) -> base.Estimator:
    """Estimates dF/dλ exactly, by forward mode through T steps from a fresh start: few λ, any number of steps.

        F(λ) = Σ_{t=1..T} w_t f(θ_t(λ), λ)

    The estimate equals that of `unrolled` with the same key. Each step is linearized once, and this linear map is
    applied to a tangent for each of the n entries of λ. Counted in matrix products, one tangent through a layer costs
    twice as much as the layer's plain step. In the first layer, whose inputs have no tangent, it costs as much as the
    plain step. The memory is n + 1 times that of the state, for any T. The rule works under jit, vmap and further
    forward differentiation. Reverse differentiation of it would store every step.

    For hyperparameter schedules over a long horizon, with one value per window of steps (non-greedy, as in the FDS of
    Micaelli & Storkey), use `forward(inner.piecewise(problem, num_windows, num_steps=T), num_steps=T)`.

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, at least 1 (0 is allowed with `outer="last"`).
      outer: "last" (w_T = 1), "mean" (w_t = 1/T), or T weights w_1..w_T. If a step before the last has a nonzero
        weight, every step costs a gradient of f.
      chunk: the number of tangents that pass through a step at once; one chunk follows another. This bounds the memory
        of a step in addition to the carried tangents. None passes all at once. On a CPU, 1 is often fastest.
      grad: the function that takes the inner gradient; see `inner.step`. It must be forward-differentiable, as
        `jax.grad` is.

    Returns:
      An `Estimator` of kind "exact", `done` after every estimate. Its state is a key.

    Raises:
      ValueError: if `num_steps` or the number of weights is wrong.

    Source: Franceschi et al., ICML 2017, https://arxiv.org/abs/1703.01785, Alg. 2; Micaelli & Storkey, NeurIPS 2021,
      https://arxiv.org/abs/2007.07869, for long horizons.
    """
    weights, last_weight = _unroll.step_weights(outer, num_steps)
    loop = problem.loop

    def init(key, hyperparams, task):
        del hyperparams, task
        return key

    def estimate(hyperparams, task, state):
        run_key, key = jax.random.split(state)
        train_key, outer_key = jax.random.split(run_key)
        batch = problem.outer_batch(outer_key, task)
        flat, unravel = ravel_pytree(hyperparams)
        basis = jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))  # dλ/dλ, a row for each entry
        judge = functools.partial(_judged, problem, hyperparams, batch)

        def step(carry, weight):
            state, tangents, total = carry
            state, tangents = _advanced(loop, hyperparams, task.train, basis, state, tangents, chunk=chunk, grad=grad)
            if weight is not None:
                total = jax.tree.map(lambda t, x: t + weight.astype(t.dtype) * x, total, judge(state, tangents))
            return (state, tangents, total), None

        floats, linear, rest = jax.linearize(
            lambda hyperparams: _trees.split(loop.init(train_key, hyperparams, task.train)), hyperparams, has_aux=True
        )
        start = _trees.merge(floats, rest), _pushed(linear, basis, chunk=chunk)
        shapes = jax.eval_shape(judge, *start)
        total = _trees.wide(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        xs = None if weights is None else jnp.asarray(weights)
        (state, tangents, total), _ = jax.lax.scan(step, (*start, total), xs, length=num_steps)
        if weights is None:
            total = jax.tree.map(lambda x: last_weight * x, judge(state, tangents))
        value, hypergrad = jax.tree.map(lambda x, like: x.astype(like.dtype), total, shapes)
        return base.Estimate(value, hypergrad, jnp.array(True), {}), key

    return base.Estimator(init, estimate, kind="exact")
