"""One-step hypergradients without second derivatives: the mixed product as a central difference.

Take one step θ' = Φ(θ, ∇θ ℓ(θ, λ), λ) of any optimizer, with θ held constant. The chain rule is

    d f(θ', λ)/dλ = ∂f/∂λ + (∂Φ/∂λ)ᵀ v + (∂²ℓ/∂λ∂θ)ᵀ u,    v = ∂f/∂θ',    u = (∂Φ/∂grads)ᵀ v.

All terms except the last product are gradients that training takes anyway, or pullbacks through the optimizer's few
operations. The product is the derivative of ∇λ ℓ along u. Two gradients estimate it up to O(ε²):

    (∂²ℓ/∂λ∂θ)ᵀ u ≈ ‖u‖/2ε · [∇λ ℓ(θ + ε u/‖u‖, λ) − ∇λ ℓ(θ − ε u/‖u‖, λ)].

The forward difference replaces the second gradient with ∇λ ℓ(θ, λ). Its error is O(ε), and it costs one gradient less,
since the backward pass of ∇θ ℓ(θ, λ) gives ∇λ ℓ(θ, λ) too.
"""

import math

import jax
import jax.numpy as jnp
import optax

from metaopt import _checks, _jaxpr, base, inner
from metaopt.hypergrad import _refusals
from metaopt.hypergrad._lookahead import LookaheadState

DIFFERENCES = ("central", "forward")
LARGE = 2**22  # if the operations of a loss write more bytes than this, its gradients are taken one after another


_REASON = (
    "neither the inner loss's gradient, nor the optimizer's update, nor the outer loss depends on them, and one step "
    "does not depend on where training began. Use `hypergrad.unrolled` for them, or fix them (`spaces.fixed`)."
)


def start(problem: base.Problem, rule: str) -> base.EstimatorInitFn:
    """`init` of the one-step rules; it rejects the leaves of λ that do not affect a step."""
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        places = ("inner", "model_state", "update", "outer")
        entering = _refusals.entering(problem, state, hyperparams, task, *places)
        _refusals.refuse_unanswered(f"`{rule}`", entering, _REASON)
        return LookaheadState(state, key)

    return init


def _in_separate_bodies(loop, state, hyperparams, data) -> bool:
    """Whether to compute each gradient inside the body of a loop or branch, so that all share the memory of one.

    XLA's CPU compiler gives each gradient in one computation its own memory, even if one gradient depends on another.
    Above 32 MiB, the C library maps this memory again at every call, which can take as long as the gradients do. Small
    losses are faster without such bodies. Convolutions are slow inside them, except those of `inner.im2col`.
    """
    if jax.default_backend() != "cpu":
        return False
    args = loop.iterate(state), hyperparams, loop.batch(state, data), loop.context(state)
    equations = list(_jaxpr.equations(jax.make_jaxpr(loop.loss)(*args).jaxpr))
    if any(equation.primitive.name == "conv_general_dilated" for equation in equations):
        return False
    outputs = (variable.aval for equation in equations for variable in equation.outvars)
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in outputs) > LARGE


def _train(loop, state, hyperparams, data, *, num_steps, argnums, in_separate_bodies):
    """The state before the last of `num_steps` steps, the loss's gradient in `argnums` there, and the model state."""

    def gradient(state):
        args = loop.iterate(state), hyperparams, loop.batch(state, data), loop.context(state)
        return jax.grad(loop.loss, argnums, has_aux=True)(*args)

    if not in_separate_bodies:
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
    """f after `num_steps` steps from `state`, the hypergradient through the last step, the states around it, and ‖u‖.

    Args:
      problem: any problem.
      state: θ and the optimizer's state; held constant.
      hyperparams: λ.
      task: its training data give the steps' batches.
      key: the PRNG key for the outer batch.
      num_steps: at least 1; only the last step is differentiated.
      epsilon: the distance ε in θ; with None the product is exact.
      around: the point where the mixed product is taken: "before" the step, as in the chain rule, or "after" it.
      difference: "central" or "forward". "forward" is for "before" only, since the step's backward pass gives ∇λ ℓ
        there too.
    """
    loop = problem.loop
    one_sided = difference == "forward" and epsilon is not None
    in_separate_bodies = _in_separate_bodies(loop, state, hyperparams, task.train)
    state, grads, model_state = _train(
        loop,
        state,
        hyperparams,
        task.train,
        num_steps=num_steps,
        argnums=(0, 1) if one_sided else 0,
        in_separate_bodies=in_separate_bodies,
    )
    grads, hyper_grad_here = grads if one_sided else (grads, None)
    params, batch, context = loop.iterate(state), loop.batch(state, task.train), loop.context(state)

    def outer(grads, model_state, hyperparams):
        ahead = loop.update(state, grads, model_state, hyperparams)
        outer_batch = problem.outer_batch(key, task)
        return problem.outer_loss(loop.params(ahead), hyperparams, outer_batch, loop.context(ahead)), ahead

    value, pullback, ahead = jax.vjp(outer, grads, model_state, hyperparams, has_aux=True)
    u, to_model_state, direct = pullback(jnp.ones_like(value))
    # λ may also enter the model state. This term is a first derivative, and it vanishes if there is no model state.
    _, pullback = jax.vjp(lambda hyperparams: loop.loss(params, hyperparams, batch, context)[1], hyperparams)
    (through_model_state,) = pullback(to_model_state)
    norm = optax.tree.norm(u)
    origin = params if around == "before" else loop.iterate(ahead)

    def hyper_grad(params):
        return jax.grad(lambda hyperparams: loop.loss(params, hyperparams, batch, context)[0])(hyperparams)

    def product():
        """(∂²ℓ/∂λ∂θ)ᵀ u."""
        if epsilon is None:
            return jax.jvp(hyper_grad, (origin,), (u,))[1]
        size = epsilon / jnp.where(norm == 0, 1, norm)
        hyper_grad_at = lambda size: hyper_grad(optax.tree.add_scale(origin, size, u))
        if one_sided:
            return jax.tree.map(lambda a, b: (a - b) / size, hyper_grad_at(size), hyper_grad_here)
        if not in_separate_bodies:
            return jax.tree.map(lambda a, b: (a - b) / (2 * size), hyper_grad_at(size), hyper_grad_at(-size))
        both = jax.lax.map(hyper_grad_at, jnp.stack([size, -size]))
        return jax.tree.map(lambda x: (x[0] - x[1]) / (2 * size), both)

    # The branch saves memory (see `_in_separate_bodies`). If the norm is NaN, the product is computed, so that the NaN
    # stays visible.
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(product))
    mixed = jax.lax.cond(norm != 0, product, zeros) if in_separate_bodies else product()
    hypergrad = jax.tree.map(lambda h, m, x: (h + m + x).astype(h.dtype), direct, through_model_state, mixed)
    return value, hypergrad, state, ahead, norm


def finish(value, hypergrad, loop, state, horizon, norm) -> base.Estimate:
    taken = loop.context(state).step
    done = jnp.array(False) if not horizon else taken >= horizon
    return base.Estimate(value, hypergrad, done, {"inner_steps": taken, "direction_norm": norm})


def darts_fd(
    problem: base.Problem,
    *,
    commit: int = 1,
    epsilon: float | None = 0.01,
    difference: str = "central",
    horizon: int | None = None,
) -> base.Estimator:
    """Estimates dF/dλ one step ahead without second derivatives: the finite difference of DARTS, for any optimizer.

        θ ← Φ^commit(θ, λ)  (no derivative),    θ' = Φ(θ, ∇θ ℓ(θ, λ), λ),    v = ∂f/∂θ',    u = (∂Φ/∂grads)ᵀ v,
        dF/dλ ≈ ∂f/∂λ + (∂Φ/∂λ)ᵀ v + ‖u‖/2ε · [∇λ ℓ(θ + ε u/‖u‖, λ) − ∇λ ℓ(θ − ε u/‖u‖, λ)].

    With SGD, u = −rate · v, and this is DARTS. With Adam, u passes through its moments. The estimate equals
    `lookahead(problem, commit=commit)` up to O(ε²). It is exact for leaves that enter only the optimizer or the outer
    loss, such as a rate. In float32, rounding adds an error of about 1e-7 |∇λ ℓ| ‖u‖/ε, so ε must not be small. The
    forward difference, ‖u‖/ε · [∇λ ℓ(θ + ε u/‖u‖, λ) − ∇λ ℓ(θ, λ)], equals `lookahead` up to O(ε), with twice the
    rounding error.

    All of this assumes that ℓ is smooth between the points. A network with ReLUs or maxima has a kink wherever an input
    of one of them changes its sign. ∇λ ℓ may jump at a kink. The exact product ignores the jump, and a difference
    divides it by ε. For example, take the supernet of NAS-Bench-201 (C = 8, N = 1, 16x16 images, batches of 16). There
    the difference and the exact product agree only in float64, at ε = 1e-6: to 1e-9, or to 2e-6 for the forward
    difference. In float32, the errors in multiples of the product's norm are:

                                          at initialization    after 50 steps
        ε = 0.01, central                       9.9                 1.3
        ε = 0.01, forward                      14                   1.5
        ε = 0.1, central                        2.8                 0.6
        ε = 0.1, forward                        3.3                 1.1
        ε = 0.01, softplus, central             0.0005              0.002
        ε = 0.01, softplus, forward             0.02                0.08

    The last two rows replace every ReLU with softplus. `epsilon=None` has no such error, and takes about a tenth more
    time on this supernet.

    Besides the committed steps, an estimate costs four gradients: ∇θ ℓ, ∇θ f, and two ∇λ ℓ. The forward difference
    costs three, since the backward pass of ∇θ ℓ gives ∇λ ℓ at θ too. A model state costs one more pullback. The memory
    is that of one gradient. If λ only weights examples (`inner.weighted`), a ∇λ ℓ costs one forward pass.
    `epsilon=None` then takes the product exactly, by one Jacobian-vector product of this pass. The estimate itself is
    not meant to be differentiated.

    Args:
      problem: λ must enter the inner loss, the optimizer or the outer loss. Both points use the same batch and noise.
      commit: training steps per estimate, at least 0.
      epsilon: ε, the distance in θ at which ∇λ ℓ is evaluated, positive, in units of θ. None differentiates ∇λ ℓ
        exactly, in forward mode; the estimate then equals `lookahead`.
      difference: "central", as published, or "forward"; ignored with `epsilon=None`.
      horizon: `done` once this many steps are committed; with None or 0 the run never ends.

    Returns:
      An `Estimator` of kind "biased", whose value is f(θ'). Metrics: "inner_steps", and "direction_norm", which is ‖u‖.

    Raises:
      ValueError: if `difference` is unknown, or `horizon` is negative; at trace time, if a leaf of λ is used only by
        `init`.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055, Eq. 7 and 8.
    """
    _checks.check_positive("horizon", horizon, zero=True, optional=True)  # with −1, every estimate would be done
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
