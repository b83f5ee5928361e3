"""SAMA: hypergradients for large models at the price of a few gradients, whatever the optimizer."""

import jax

from metaopt import base
from metaopt.hypergrad import _finite_difference
from metaopt.hypergrad._lookahead import LookaheadState


def sama(
    problem: base.Problem, *, num_steps: int = 1, epsilon: float | None = 0.01, horizon: int | None = None
) -> base.Estimator:
    """Estimates dF/dλ of a training run that goes on, with the identity in the place of the base Jacobian.

    At a fixed point θ* = Φ(θ*, ∇θ g(θ*, λ), λ) of the optimizer, dθ*/dλ = (1 − ∂Φ/∂θ)⁻¹ dΦ/dλ. SAMA takes the inverse
    for the identity, keeps how the optimizer bends gradients, and takes the mixed product as a central difference
    around where the last step arrived:

        θ ← Φ^num_steps(θ, λ)  (no derivative),    v = ∂f/∂θ,    u = (∂Φ/∂grads)ᵀ v  at the last step,
        dF/dλ ≈ ∂f/∂λ + (∂Φ/∂λ)ᵀ v + ‖u‖/2ε · [∇λ g(θ + ε u/‖u‖, λ) − ∇λ g(θ − ε u/‖u‖, λ)].

    So it is one-step lookahead without a virtual step, whose mixed product is taken after the step instead of before:
    the two agree to O(rate²), and where ∂²g/∂λ∂θ does not depend on θ. Its truncation is that of one step: all but the
    last term of Σ_k (∂Φ/∂θ)^k dΦ/dλ is left out, so that the size is off by about 1 / (rate · curvature), direction by
    direction. (∂Φ/∂λ)ᵀ v, for a rate or a decoupled decay, is not in the paper; it costs nothing.

    Costs, beside training, three gradients (∂f, two ∇λ g), and memory for one of them. The paper's nudge of θ along v
    is left out: an inner loop lets θ be moved by its own update alone. The estimate itself is not meant to be
    differentiated.

    Args:
      problem: λ must enter the inner loss, the optimizer or the outer loss.
      num_steps: steps of training per estimate, at least 1.
      epsilon: ε, the distance in θ at which ∇λ g is evaluated, positive, in units of θ; the paper's α. None
        differentiates ∇λ g in forward mode instead, exactly.
      horizon: `done` once so many steps are taken; None never ends.

    Returns:
      An `Estimator` of kind "biased", whose value is f at θ after the steps. Metrics: "inner_steps", and
      "direction_norm", ‖u‖.

    Raises:
      ValueError: an argument is out of range; at trace time, a leaf of λ is used by `init` alone.

    Source: Choe et al., NeurIPS 2023, https://arxiv.org/abs/2310.05674
    """
    base.check_integer("num_steps", num_steps, 1)
    _finite_difference.check(epsilon, horizon)
    loop = problem.loop

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        value, hypergrad, _, after, norm = _finite_difference.one_step(
            problem, state.inner, hyperparams, task, outer_key, num_steps=num_steps, epsilon=epsilon, around="after"
        )
        return _finite_difference.finish(value, hypergrad, loop, after, horizon, norm), LookaheadState(after, key)

    return base.Estimator(_finite_difference.start(problem, "sama"), estimate, kind="biased")
