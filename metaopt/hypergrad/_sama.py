"""SAMA: hypergradients for large models at the cost of a few gradients, for any optimizer."""

import jax

from metaopt import _checks, base
from metaopt.hypergrad import _finite_difference
from metaopt.hypergrad._lookahead import LookaheadState


def sama(
    problem: base.Problem, *, num_steps: int = 1, epsilon: float | None = 0.01, horizon: int | None = None
) -> base.Estimator:
    """Estimates dF/dλ of a continuing training run, with the identity in place of the base Jacobian.

    At a fixed point θ* = Φ(θ*, ∇θ ℓ(θ*, λ), λ) of the optimizer, dθ*/dλ = (1 − ∂Φ/∂θ)⁻¹ dΦ/dλ. SAMA replaces the
    inverse with the identity, and keeps the optimizer's effect on gradients. It takes the mixed product as a central
    difference around the point after the last step:

        θ ← Φ^num_steps(θ, λ)  (no derivative),    v = ∂f/∂θ,    u = (∂Φ/∂grads)ᵀ v  at the last step,
        dF/dλ ≈ ∂f/∂λ + (∂Φ/∂λ)ᵀ v + ‖u‖/2ε · [∇λ ℓ(θ + ε u/‖u‖, λ) − ∇λ ℓ(θ − ε u/‖u‖, λ)].

    So SAMA is one-step lookahead that differentiates the last training step instead of a virtual step. It takes the
    mixed product after this step instead of before it. The two agree up to O(rate²), and agree exactly if ∂²ℓ/∂λ∂θ does
    not depend on θ. The truncation is that of one step: only the last term of Σ_k (∂Φ/∂θ)^k dΦ/dλ is kept. So in a
    direction of θ with curvature c, the estimate is about rate · c times the full sum. The term (∂Φ/∂λ)ᵀ v, for a rate
    or a decoupled decay, is not in the paper. It costs nothing.

    Besides training, the cost is three gradients (∂f, two ∇λ ℓ). The memory is that of one of them. The paper also
    moves θ along v; this is omitted, since in an inner loop only its own update moves θ. The estimate itself is not
    meant to be differentiated.

    Args:
      problem: λ must enter the inner loss, the optimizer or the outer loss.
      num_steps: training steps per estimate, at least 1.
      epsilon: ε, the distance in θ at which ∇λ ℓ is evaluated, positive, in units of θ; the paper's α. None
        differentiates ∇λ ℓ exactly, in forward mode.
      horizon: `done` once this many steps are taken; with None or 0 the run never ends.

    Returns:
      An `Estimator` of kind "biased", whose value is f at θ after the steps. Metrics: "inner_steps", and
      "direction_norm", which is ‖u‖.

    Raises:
      ValueError: if `horizon` is negative; at trace time, if a leaf of λ is used only by `init`.

    Source: Choe et al., NeurIPS 2023, https://arxiv.org/abs/2310.05674
    """
    _checks.check_positive("horizon", horizon, zero=True, optional=True)  # with −1, every estimate would be done
    loop = problem.loop

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        value, hypergrad, _, after, norm = _finite_difference.one_step(
            problem, state.inner, hyperparams, task, outer_key, num_steps=num_steps, epsilon=epsilon, around="after"
        )
        return _finite_difference.finish(value, hypergrad, loop, after, horizon, norm), LookaheadState(after, key)

    return base.Estimator(_finite_difference.start(problem, "sama"), estimate, kind="biased")
