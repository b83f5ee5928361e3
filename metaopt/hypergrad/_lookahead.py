"""Lookahead hypergradients: commit steps at the current λ, then differentiate a few virtual steps and discard them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import _checks, base, inner
from metaopt.hypergrad import _mixed, _refusals, _unroll


class LookaheadState(NamedTuple):
    """The state of `lookahead`.

    Attributes:
      inner: the inner loop's state, after the committed steps.
      key: the PRNG key for later estimates.
    """

    inner: base.InnerState
    key: jax.Array


def lookahead(
    problem: base.Problem,
    *,
    commit: int = 1,
    num_steps: int = 1,
    horizon: int | None = None,
    remat: str | int = "none",
    grad: Callable = _mixed.mixed_grad,
) -> base.Estimator:
    """Estimates dF/dλ by looking K steps ahead of a training run that continues between estimates.

        θ ← Φ^commit(θ, λ)  (no derivative),    F(λ) = f(Φ^K(θ, λ), λ)  with θ held constant.

    One training run serves all outer steps. The hypergradient is exact for this F. As an estimate of the effect of λ on
    a whole training run it is short-sighted: it ignores how λ has shaped θ so far (Wu et al., ICLR 2018, on rates).
    `commit=1, num_steps=1` is DARTS (second order). `num_steps=0` is its first-order form.

    Args:
      problem: λ must enter the inner loss, the optimizer or the outer loss.
      commit: training steps per estimate, at least 0.
      num_steps: K, the number of virtual steps, at least 0.
      horizon: `done` once this many steps are committed; with None or 0 the run never ends.
      remat: "none", "step", "grads", "sqrt" or a number of levels, over the virtual steps.
      grad: the function that takes the inner gradient of the virtual steps; see `inner.step`.

    Returns:
      An `Estimator`. Its hypergradient is that of the F above. The committed θ is held constant there, although it
      depends on λ too, so the kind is "biased". With `commit=0` it is "exact".

    Raises:
      ValueError: if `commit`, `num_steps` or `horizon` is negative, or `remat` is unknown; at trace time, if a leaf of
        λ enters neither a virtual step nor the outer loss.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055, Eq. 6; Luketina et al., ICML 2016.
    """
    _checks.check_positive("horizon", horizon, zero=True, optional=True)  # with −1, every estimate would be done
    _checks.check_integer("commit", commit, 0)
    _unroll.check_steps(num_steps, remat)
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        places = ("outer", "inner", "model_state", "update") if num_steps else ("outer",)
        entering = _refusals.entering(problem, state, hyperparams, task, *places)
        reason = (
            f"the {num_steps} virtual steps and the outer loss do not depend on them. Use `hypergrad.unrolled` for a "
            "learned initialization, more virtual steps for values that enter later steps, or fix the leaves "
            "(`spaces.fixed`)."
        )
        _refusals.refuse_unanswered("`lookahead`", entering, reason)
        return LookaheadState(state, key)

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        committed = jax.lax.fori_loop(0, commit, lambda _, s: inner.step(loop, s, hyperparams, task.train), state.inner)

        def objective(hyperparams):
            def step(s, _):
                return inner.step(loop, s, hyperparams, task.train, grad=grad), None

            ahead, _ = _unroll.checkpointed_scan(step, committed, None, length=num_steps, remat=remat)
            batch = problem.outer_batch(outer_key, task)
            return problem.outer_loss(loop.params(ahead), hyperparams, batch, loop.context(ahead))

        value, hypergrad = jax.value_and_grad(objective)(hyperparams)
        taken = loop.context(committed).step
        done = jnp.array(False) if not horizon else taken >= horizon
        return base.Estimate(value, hypergrad, done, {"inner_steps": taken}), LookaheadState(committed, key)

    return base.Estimator(init, estimate, kind="exact" if commit == 0 else "biased")
