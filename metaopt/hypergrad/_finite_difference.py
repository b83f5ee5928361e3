"""One-step hypergradients without second derivatives: the mixed product as a central difference.

Through one step θ' = Φ(θ, ∇θ g(θ, λ), λ) of any optimizer, θ held constant, the chain rule is

    d f(θ', λ)/dλ = ∂f/∂λ + (∂Φ/∂λ)ᵀ v + (∂²g/∂λ∂θ)ᵀ u,    v = ∂f/∂θ',    u = (∂Φ/∂grads)ᵀ v.

Everything but the last product is a gradient that training takes anyway, or a pullback through the optimizer's few
operations. The product is the derivative of ∇λ g along u, which two gradients estimate, to O(ε²):

    (∂²g/∂λ∂θ)ᵀ u ≈ ‖u‖/2ε · [∇λ g(θ + ε u/‖u‖, λ) − ∇λ g(θ − ε u/‖u‖, λ)].

With ∇λ g(θ, λ) in the place of the second it is to O(ε), and costs one gradient less: ∇λ g(θ, λ) comes out of the
backward pass of ∇θ g(θ, λ).
"""

import math

import jax
import jax.numpy as jnp
import optax

from metaopt import base, inner, rewrite
from metaopt.hypergrad import _refusals
from metaopt.hypergrad._lookahead import LookaheadState

DIFFERENCES = ("central", "forward")
LARGE = 2**22  # bytes that the operations of a loss write, from which on its gradients are taken one by one


def check(epsilon: float | None, horizon: int | None) -> None:
    base.check_positive("epsilon", epsilon, optional=True)
    base.check_integer("horizon", horizon, 1, optional=True)


def start(problem: base.Problem, rule: str) -> base.EstimatorInitFn:
    """`init` of the one-step rules; refuses the leaves of λ that no step sees."""
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        places = ("inner", "model_state", "update", "outer")
        entering = _refusals.entering(problem, state, hyperparams, task, *places)
        refused = [path for path, enters in entering.items() if not enters]
        if refused:
            raise ValueError(
                f"`{rule}` cannot answer for the leaves {', '.join(refused)} of λ: neither the inner loss's gradient, "
                "nor the optimizer's update, nor the outer loss depends on them, and one step does not know where "
                "training began. Use `hypergrad.unrolled` for them, or fix them (`spaces.fixed`)."
            )
        return LookaheadState(state, key)

    return init


def _apart(loop, state, hyperparams, data) -> bool:
    """Whether gradients are taken in bodies of loops and branches, so that all of them share one gradient's memory.

    XLA's CPU compiler gives the gradients that it finds in one computation memory of their own, even where one follows
    from the other; above 32 MiB the C library maps that anew at every call, which can take as long as the gradients do.
    Small losses are faster written out, and convolutions that are not `inner.im2col`'s are slow in bodies.
    """
    if jax.default_backend() != "cpu":
        return False
    at = loop.params(state), hyperparams, loop.batch(state, data), loop.context(state)
    equations = list(rewrite.equations(jax.make_jaxpr(loop.loss)(*at).jaxpr))
    if any(equation.primitive.name == "conv_general_dilated" for equation in equations):
        return False
    made = (variable.aval for equation in equations for variable in equation.outvars)
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in made) > LARGE


def _train(loop, state, hyperparams, data, *, num_steps, argnums, apart):
    """The state before the last of `num_steps` steps, and its gradient, by `argnums` of the loss, and model state."""

    def gradient(state):
        at = loop.params(state), hyperparams, loop.batch(state, data), loop.context(state)
        return jax.grad(loop.loss, argnums, has_aux=True)(*at)

    if not apart:
        state = jax.lax.fori_loop(0, num_steps - 1, lambda _, s: inner.step(loop, s, hyperparams, data), state)
        return state, *gradient(state)

    def step(_, carry):
        state, *_ = carry
        grads, model_state = gradient(state)
        by_params = grads[0] if isinstance(argnums, tuple) else grads
        return loop.update(state, by_params, model_state, hyperparams), state, grads, model_state

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, state))
    return jax.lax.fori_loop(0, num_steps, step, (state, state, *zeros))[1:]


def one_step(problem, state, hyperparams, task, key, *, num_steps=1, epsilon, around, difference="central"):
    """f after `num_steps` steps from `state`, the hypergradient through the last, the states around it, and ‖u‖.

    Args:
      problem: any.
      state: θ, and the optimizer's state; held constant.
      hyperparams: λ.
      task: its training data give the steps' batches.
      key: for the outer batch.
      num_steps: at least 1; all but the last are not differentiated.
      epsilon: the distance ε in θ; None takes the product exactly.
      around: where the mixed product is taken: "before" the step, as the chain rule has it, or "after" it.
      difference: "central" or "forward"; the latter is taken "before" the step, by whose backward pass ∇λ g comes too.
    """
    loop = problem.loop
    one_sided = difference == "forward" and epsilon is not None
    apart = _apart(loop, state, hyperparams, task.train)
    state, grads, model_state = _train(
        loop, state, hyperparams, task.train, num_steps=num_steps, argnums=(0, 1) if one_sided else 0, apart=apart
    )
    grads, hyper_grad_here = grads if one_sided else (grads, None)
    params, batch, context = loop.params(state), loop.batch(state, task.train), loop.context(state)

    def outer(grads, model_state, hyperparams):
        ahead = loop.update(state, grads, model_state, hyperparams)
        outer_batch = problem.outer_batch(key, task)
        return problem.outer_loss(loop.params(ahead), hyperparams, outer_batch, loop.context(ahead)), ahead

    value, pullback, ahead = jax.vjp(outer, grads, model_state, hyperparams, has_aux=True)
    u, to_model_state, direct = pullback(jnp.ones_like(value))
    # λ may move the model state too; that is a first derivative, and nothing where there is no model state.
    _, pullback = jax.vjp(lambda hyperparams: loop.loss(params, hyperparams, batch, context)[1], hyperparams)
    (through_model_state,) = pullback(to_model_state)
    norm = optax.tree.norm(u)
    origin = params if around == "before" else loop.params(ahead)

    def hyper_grad(params):
        return jax.grad(lambda hyperparams: loop.loss(params, hyperparams, batch, context)[0])(hyperparams)

    def product():
        """(∂²g/∂λ∂θ)ᵀ u."""
        if epsilon is None:
            return jax.jvp(hyper_grad, (origin,), (u,))[1]
        size = epsilon / jnp.where(norm == 0, 1, norm)
        at = lambda size: hyper_grad(optax.tree.add_scale(origin, size, u))
        if one_sided:
            return jax.tree.map(lambda a, b: (a - b) / size, at(size), hyper_grad_here)
        if not apart:
            return jax.tree.map(lambda a, b: (a - b) / (2 * size), at(size), at(-size))
        both = jax.lax.map(at, jnp.stack([size, -size]))
        return jax.tree.map(lambda x: (x[0] - x[1]) / (2 * size), both)

    # A branch, for the memory; NaN takes it as well.
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(product))
    mixed = jax.lax.cond(norm != 0, product, zeros) if apart else product()
    hypergrad = jax.tree.map(lambda h, m, x: (h + m + x).astype(h.dtype), direct, through_model_state, mixed)
    return value, hypergrad, state, ahead, norm


def finish(value, hypergrad, loop, state, horizon, norm) -> base.Estimate:
    taken = loop.context(state).step
    done = jnp.array(False) if horizon is None else taken >= horizon
    return base.Estimate(value, hypergrad, done, {"inner_steps": taken, "direction_norm": norm})


def darts_fd(
    problem: base.Problem,
    *,
    commit: int = 1,
    epsilon: float | None = 0.01,
    difference: str = "central",
    horizon: int | None = None,
) -> base.Estimator:
    """Estimates dF/dλ one step ahead without second derivatives: DARTS's finite difference, for any optimizer.

        θ ← Φ^commit(θ, λ)  (no derivative),    θ' = Φ(θ, ∇θ g(θ, λ), λ),    v = ∂f/∂θ',    u = (∂Φ/∂grads)ᵀ v,
        dF/dλ ≈ ∂f/∂λ + (∂Φ/∂λ)ᵀ v + ‖u‖/2ε · [∇λ g(θ + ε u/‖u‖, λ) − ∇λ g(θ − ε u/‖u‖, λ)].

    With SGD u = −rate · v and this is DARTS; with Adam u goes through its moments. It is `lookahead(problem,
    commit=commit)` up to O(ε²), and exact for what enters the optimizer or the outer loss alone, such as a rate. In
    float32 rounding adds an error of about 1e-7 |∇λ g| ‖u‖/ε, so that ε must not be small. The forward difference,
    ‖u‖/ε · [∇λ g(θ + ε u/‖u‖, λ) − ∇λ g(θ, λ)], is so up to O(ε), with twice the rounding.

    All of this is for a g that is smooth between the points. A network with ReLUs or maxima has a kink wherever an
    input of one changes its sign, and ∇λ g may jump there, which the exact product leaves out and a difference divides
    by ε. On the supernet of NAS-Bench-201 (C = 8, N = 1, 16x16 images, 16 a batch) they agree at ε = 1e-6, in float64
    alone (to 1e-9; the forward difference to 2e-6). In float32, at ε = 0.01, the central difference is off by 9.9 times
    the product's norm at initialization and by 1.3 times after 50 steps, the forward one by 14 and 1.5 times; at
    ε = 0.1 by 2.8 and 0.6, and by 3.3 and 1.1 times. With softplus in the place of every ReLU, at ε = 0.01, the central
    one is off by 0.0005 and 0.002 times, the forward one by 0.02 and 0.08. `epsilon=None` has no such error, for about
    a tenth more time there.

    Costs, beside the committed steps, four gradients (∇θ g, ∇θ f, two ∇λ g; three with the forward difference, since
    the backward pass of ∇θ g gives ∇λ g at θ too), one more pullback where there is a model state, and memory for one
    of them. Where λ only weighs examples (`inner.weighted`) a ∇λ g is one forward pass, and `epsilon=None` takes the
    product exactly by one Jacobian-vector product of it. The estimate itself is not meant to be differentiated.

    Args:
      problem: λ must enter the inner loss, the optimizer or the outer loss. Both points see the same batch and noise.
      commit: steps of training per estimate, at least 0.
      epsilon: ε, the distance in θ at which ∇λ g is evaluated, positive, in units of θ; None differentiates ∇λ g in
        forward mode instead, exactly, so that it is `lookahead`.
      difference: "central", as published, or "forward"; nothing with `epsilon=None`.
      horizon: `done` once so many steps are committed; None never ends.

    Returns:
      An `Estimator` of kind "biased", whose value is f(θ'). Metrics: "inner_steps", and "direction_norm", ‖u‖.

    Raises:
      ValueError: an argument is out of range, or `difference` is unknown; at trace time, a leaf of λ is used by `init`
        alone.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055, Eq. 7 and 8.
    """
    base.check_integer("commit", commit, 0)
    check(epsilon, horizon)
    if difference not in DIFFERENCES:
        raise ValueError(f"`difference` must be one of {', '.join(DIFFERENCES)}; got {difference!r}.")
    loop = problem.loop

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        value, hypergrad, committed, _, norm = one_step(
            problem,
            state.inner,
            hyperparams,
            task,
            outer_key,
            num_steps=commit + 1,
            epsilon=epsilon,
            around="before",
            difference=difference,
        )
        return finish(value, hypergrad, loop, committed, horizon, norm), LookaheadState(committed, key)

    return base.Estimator(start(problem, "darts_fd"), estimate, kind="biased")
