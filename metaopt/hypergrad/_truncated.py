"""Truncated backpropagation: a training run continues between outer steps; each outer step looks back over one window.

θ_{s+K} = Φ^K(θ_s, λ),    F(λ) = Σ_{t=s+1..s+K} w_t f(θ_t(λ), λ)  with θ_s held constant.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from metaopt import base, inner
from metaopt.hypergrad import _mixed, _unroll


class TruncatedState(NamedTuple):
    """The state of `truncated`.

    Attributes:
      inner: the inner loop's state at the start of the next window.
      start_key: the PRNG key of the inner loop's initialization.
      key: the PRNG key for later estimates.
    """

    inner: base.InnerState
    start_key: jax.Array
    key: jax.Array


def truncated(
    problem: base.Problem,
    *,
    num_steps: int,
    truncation_length: int,
    outer: str = "last",
    remat: str | int = "none",
    grad: Callable = _mixed.mixed_grad,
) -> base.Estimator:
    """Estimates dF/dλ by reverse mode through the next K steps of a training run of T steps, and continues the run.

        F(λ) = Σ_{t=1..K} w_t f(θ_{s+t}(λ), λ)  with θ_s held constant

    λ is updated T/K times in one training run, and an estimate costs K steps. It is exact for its own F, but it ignores
    how λ has shaped θ_s. So short windows favor quick gains, such as small rates (Wu et al.). The first window of a run
    also differentiates the initialization, so λ may enter there. Later windows ignore the initialization. (Under vmap,
    JAX computes both branches of a `cond`. So over tasks, every window pays for an initialization.) With K = T, this is
    `unrolled`; with K = 1, it is T1–T2 (Luketina et al.): θ ← Φ(θ, λ), then dF/dλ = ∂f/∂λ + (∂f/∂θ) ∂Φ/∂λ. In contrast,
    `lookahead` looks ahead of its run and discards those steps.

    The runs of a batch that start together also end together. `training.learner(..., stagger=T // K)` makes them end at
    different outer steps.

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, the horizon, at least 1; `done` once T steps are taken.
      truncation_length: K, at least 1; divides T.
      outer: "last" judges the window's last step, "mean" the mean over its steps.
      remat: "none", "step", "grads", "sqrt" or a number of levels, over the window. Time and memory are as in `unroll`,
        with K in place of T.
      grad: the function that takes the inner gradient; see `inner.step`.

    Returns:
      An `Estimator` of kind "biased", or "exact" if K = T. Metrics: "inner_steps", the number of steps taken.

    Raises:
      ValueError: if a count is below 1, K does not divide T, or `outer` or `remat` is unknown.

    Source: Shaban et al., AISTATS 2019, https://arxiv.org/abs/1810.10667; T1–T2: Luketina et al., ICML 2016,
      https://arxiv.org/abs/1511.06727; the bias: Wu et al., ICLR 2018, https://arxiv.org/abs/1803.02021.
    """
    _unroll.check_windows(num_steps, truncation_length)
    _unroll.check_steps(truncation_length, remat)
    weights = _unroll.step_weights(outer, truncation_length)
    loop = problem.loop

    def init(key, hyperparams, task):
        start_key, key = jax.random.split(key)
        return TruncatedState(loop.init(start_key, hyperparams, task.train), start_key, key)

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        batch = problem.outer_batch(outer_key, task)
        first = loop.context(state.inner).step == 0

        def objective(hyperparams):
            def step(state, _):
                return inner.step(loop, state, hyperparams, task.train, grad=grad)

            def outer_loss(state):
                return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

            # In the first window, initialize again with the same key, as a function of λ.
            start = jax.lax.cond(
                first, lambda: loop.init(state.start_key, hyperparams, task.train), lambda: state.inner
            )
            return _unroll.weighted_scan(
                step, outer_loss, start, None, weights=weights, num_steps=truncation_length, remat=remat
            )

        (value, after), hypergrad = jax.value_and_grad(objective, has_aux=True)(hyperparams)
        taken = loop.context(after).step
        estimate = base.Estimate(value, hypergrad, taken >= num_steps, {"inner_steps": taken})
        return estimate, TruncatedState(after, state.start_key, key)

    return base.Estimator(init, estimate, kind="exact" if truncation_length == num_steps else "biased")
