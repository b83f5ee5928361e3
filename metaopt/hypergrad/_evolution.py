"""Evolution strategies: hypergradients from values of F only, over whole training runs or over windows of one run.

With ε ~ N(0, I), these rules estimate the gradient of F smoothed by a Gaussian of scale σ,

    F_σ(λ) = E F(λ + σε),    ∇F_σ(λ) = E [ε (F(λ + σε) − F(λ − σε)) / 2σ].

This gradient is within O(σ²) of ∇F. It exists where ∇F does not (steps, rounding), and it stays small where ∇F explodes
(chaotic training). The windowed rules split a training run of T steps, F(λ) = 1/T Σ_t f(θ_t, λ), into windows of K
steps. Each window gives an estimate, so one run serves T/K outer steps instead of one. Both members of an antithetic
pair, λ + σε and λ − σε, train from one key and differ only in λ.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base
from metaopt._jaxpr import Tracer
from metaopt.hypergrad import _unroll


class ParticlesState(NamedTuple):
    """The state of the windowed rules: N antithetic pairs of training runs.

    Attributes:
      inner: the inner loops' states, with leading axes [N, 2]; λ + σε comes first.
      perturbation: ε of the next window, like λ with a leading axis of N.
      score: the factor that multiplies that window's losses, a sum of ε; like λ with a leading axis of N.
      key: the PRNG key for later estimates.
    """

    inner: base.InnerState
    perturbation: base.HyperParams
    score: base.HyperParams
    key: jax.Array


def check_sigma(sigma: base.PyTree) -> None:
    """Raises ValueError unless every entry of σ is positive. Traced entries are not checked."""
    for leaf in jax.tree.leaves(sigma):
        if not isinstance(leaf, Tracer) and not np.all(np.asarray(leaf) > 0):
            raise ValueError(f"`sigma` must be positive; got {leaf}.")


def scales(sigma: base.PyTree, hyperparams: base.HyperParams) -> base.HyperParams:
    """σ for every entry of λ, from a scalar or from a tree like λ of scalars and arrays."""
    if jax.tree.structure(sigma) == jax.tree.structure(0) and jnp.ndim(sigma) == 0:
        sigma = jax.tree.map(lambda _: sigma, hyperparams)
    expected, structure = jax.tree.structure(hyperparams), jax.tree.structure(sigma)
    if structure != expected:
        raise ValueError(f"`sigma` must be a number or a tree like λ, {expected}; got {structure}.")
    jax.tree.map(_check_precision, hyperparams, sigma)
    return jax.tree.map(lambda x, s: jnp.broadcast_to(jnp.asarray(s, x.dtype), x.shape), hyperparams, sigma)


def _check_precision(x: jax.Array, sigma: jax.Array | float) -> None:
    """Raises ValueError if λ has 16 bits, in which a λ near 1 loses perturbations of this size."""
    precision = float(jnp.finfo(x.dtype).eps) if x.dtype.itemsize == 2 else 0.0
    if not isinstance(sigma, Tracer) and np.any(np.asarray(sigma, float) < precision):
        raise ValueError(
            f"`sigma` must be at least {precision:.2g} for a λ of dtype {x.dtype}, which rounds smaller perturbations "
            f"of a λ near 1 away; got {sigma}. Use float32 for λ, or a larger `sigma`."
        )


def normals(key: jax.Array, hyperparams: base.HyperParams, num_pairs: int) -> base.HyperParams:
    """ε of N pairs: standard normal, like λ with a leading axis of N."""
    leaves, structure = jax.tree.flatten(hyperparams)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, (num_pairs, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(draws)


def pairs(hyperparams: base.HyperParams, sigma: base.HyperParams, perturbation: base.HyperParams) -> base.HyperParams:
    """λ ± σε, like λ with leading axes [N, 2]."""

    def pair(epsilon):
        shift = jax.tree.map(jnp.multiply, sigma, epsilon)
        return jax.tree.map(lambda x, s: jnp.stack([x + s, x - s]), hyperparams, shift)

    return jax.vmap(pair)(perturbation)


def over_pairs(function: Callable) -> Callable:
    """Maps `function(hyperparams, argument of the pair, shared argument)` over N pairs and the two members of each."""
    return jax.vmap(jax.vmap(function, (0, None, None)), (0, 0, None))


def score_estimates(score: base.HyperParams, losses: jax.Array, sigma: base.HyperParams) -> base.HyperParams:
    """The N estimates s_i (L_i⁺ − L_i⁻) / 2σ, one per pair, from losses [N, 2]."""
    slopes = (losses[:, 0] - losses[:, 1]) / 2

    def estimate(score, slope):
        return jax.tree.map(lambda s, scale: (s * slope / scale).astype(s.dtype), score, sigma)

    return jax.vmap(estimate)(score, slopes)


def mean_and_metrics(each: base.HyperParams) -> tuple[base.HyperParams, dict[str, jax.Array]]:
    """The mean of N estimates, and the trace of that mean's covariance, which is unknown (`inf`) for N = 1."""
    num = len(jax.tree.leaves(each)[0])
    mean = jax.tree.map(lambda x: x.mean(0), each)
    if num < 2:
        return mean, {"sampling_variance": jnp.array(jnp.inf)}  # NaN would stop a run under `jax.debug_nans`
    variances = [x.var(0, ddof=1).sum() / num for x in jax.tree.leaves(each)]
    return mean, {"sampling_variance": jnp.stack(variances).sum()}


def _window(problem, num_steps, outer):
    """`(state, hyperparams, task, outer_key) -> (Σ_t w_t f(θ_t, λ), state)`; all steps use one validation batch."""
    weights = _unroll.step_weights(outer, num_steps)
    return partial(
        _unroll.weighted_training, problem, weights=weights, num_steps=num_steps, remat="none", grad=jax.grad
    )


def _particles(problem, window, sigma, num_pairs, renew):
    """`init`, and a function `(hyperparams, task, state) -> (Estimate, state)` for one window; its `done` is False.

    The rules differ in `renew(ε, fresh ε, score)`, which returns `(ε, score)` of the next window.
    """
    _checks.check_integer("num_pairs", num_pairs, 1)
    check_sigma(sigma)
    loop = problem.loop

    def init(key, hyperparams, task):
        hyperparams = jax.tree.map(jnp.asarray, hyperparams)
        perturbation_key, loop_key, key = jax.random.split(key, 3)
        epsilon = normals(perturbation_key, hyperparams, num_pairs)
        # λ may enter the initialization, so it is perturbed there too.
        perturbed = pairs(hyperparams, scales(sigma, hyperparams), epsilon)
        start = over_pairs(lambda hyperparams, key, task: loop.init(key, hyperparams, task.train))
        return ParticlesState(start(perturbed, jax.random.split(loop_key, num_pairs), task), epsilon, epsilon, key)

    def estimate(hyperparams, task, state):
        hyperparams = jax.tree.map(jnp.asarray, hyperparams)
        perturbation_key, outer_key, key = jax.random.split(state.key, 3)
        scale = scales(sigma, hyperparams)
        members = jax.vmap(jax.vmap(window, (0, 0, None, None)), (0, 0, None, 0))
        perturbed = pairs(hyperparams, scale, state.perturbation)
        outer_keys = jax.random.split(outer_key, num_pairs)
        losses, particles = members(state.inner, perturbed, task, outer_keys)
        hypergrad, metrics = mean_and_metrics(score_estimates(state.score, losses, scale))
        fresh = normals(perturbation_key, hyperparams, num_pairs)
        perturbation, score = renew(state.perturbation, fresh, state.score)
        out = base.Estimate(losses.mean(), hypergrad, jnp.array(False), metrics)
        return out, ParticlesState(particles, perturbation, score, key)

    return init, estimate


def _windowed(problem, num_steps, truncation_length, sigma, num_pairs, renew, kind) -> base.Estimator:
    """A rule that makes one estimate per window and is done at the horizon."""
    _unroll.check_windows(num_steps, truncation_length)
    window = _window(problem, truncation_length, "mean")
    init, one_window = _particles(problem, window, sigma, num_pairs, renew)

    def estimate(hyperparams, task, state):
        out, state = one_window(hyperparams, task, state)
        taken = jax.vmap(jax.vmap(problem.loop.context))(state.inner).step[0, 0]
        return out._replace(done=taken >= num_steps, metrics={**out.metrics, "inner_steps": taken}), state

    return base.Estimator(init, estimate, kind)


def evolution(
    problem: base.Problem,
    *,
    num_steps: int,
    sigma: float | base.PyTree,
    num_pairs: int,
    outer: str | Sequence[float] | np.ndarray = "last",
) -> base.Estimator:
    """Estimates dF_σ/dλ by antithetic evolution strategies, over whole training runs of T steps from fresh starts.

        1/N Σ_i ε_i (F(λ + σε_i) − F(λ − σε_i)) / 2σ,    ε_i ~ N(0, I),    F(λ) = Σ_{t=1..T} w_t f(θ_t(λ), λ)

    The estimate is unbiased for the smoothed F_σ(λ) = E F(λ + σε) = F + σ²/2 ΔF + O(σ⁴). So the bias for F itself is
    σ²/2 ∇ΔF. The variance is about (n + 1) |∇F|² / N for n entries of λ, so N should grow with n. The rule does not
    differentiate through training. So `outer_loss`, the optimizer and the effect of λ need not be differentiable.
    (Training itself still takes ∇θ ℓ by `jax.grad`.) Memory and time are those of 2N training runs at once; the memory
    does not depend on T.

    Every call starts from scratch, and each pair has its own key. Perturbations are in the coordinates of λ, which are
    unconstrained with `spaces.constrain`. Under `over_tasks`, every task draws its own perturbations. If the loss of a
    pair is not finite, the estimate is not finite either, since dropping the pair would ignore the regions where F is
    worst. `over_tasks` then excludes that task, counts it and ends its slot. The rule works under jit and vmap; it is
    not meant to be differentiated.

    If λ has 16 bits, keep σ above the spacing of λ, 0.0078 |λ| for bfloat16. Otherwise λ + σε is rounded to λ, and the
    estimate is wrong. The rule checks this only for |λ| = 1, since a compiled program cannot raise for a value of λ.
    Use float32 for a λ that may become large.

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, at least 1 (0 is allowed with `outer="last"`).
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.
      outer: "last", "mean" or T weights; see `unrolled`.

    Returns:
      An `Estimator` of kind "unbiased" (for F_σ), `done` after every estimate. Its state is a key. `value` is the mean
      of the 2N losses, which is unbiased for F_σ(λ). Metrics: "sampling_variance", the estimated trace of the
      hypergradient's covariance over the draws of ε and of keys; `inf` for a single pair.

    Raises:
      ValueError: if `num_steps` is too small, `num_pairs` or `sigma` is not positive, or `outer` does not have T
        weights; at trace time, if `sigma` is a tree that is not like λ, or is below the precision of a λ of 16 bits
        (0.0078 for bfloat16).

    Source: Salimans et al., 2017, https://arxiv.org/abs/1703.03864; for inner training, Metz et al., ICML 2019,
      https://arxiv.org/abs/1810.10180.
    """
    start, one_window = _particles(
        problem, _window(problem, num_steps, outer), sigma, num_pairs, lambda epsilon, fresh, score: (epsilon, score)
    )

    def init(key, hyperparams, task):
        del hyperparams, task
        return key

    def estimate(hyperparams, task, state):
        run_key, key = jax.random.split(state)
        out, _ = one_window(hyperparams, task, start(run_key, hyperparams, task))
        return out._replace(done=jnp.array(True)), key

    return base.Estimator(init, estimate, kind="unbiased")


def persistent_es(
    problem: base.Problem, *, num_steps: int, truncation_length: int, sigma: float | base.PyTree, num_pairs: int
) -> base.Estimator:
    """Estimates dF_σ/dλ once every K steps of a training run of T steps, unbiased even for short windows (PES).

        F(λ) = 1/T Σ_{t=1..T} f(θ_t(λ), λ) = K/T Σ_w L_w,    L_w = the mean of f over the steps of window w

    N antithetic pairs of particles continue to train, each with a fresh perturbation ε_w in every window. The estimate
    in window w weights the losses by the sum of a particle's perturbations so far, since all of them have moved θ:

        ĝ_w = 1/N Σ_i (ε_i1 + … + ε_iw) (L_w⁺ − L_w⁻)_i / 2σ

    ĝ_w is unbiased for the gradient of L_w. The mean over the T/K windows of an episode is unbiased for the gradient of
    F. Both are smoothed by perturbations that are independent between windows. This holds if λ is constant: if λ moves
    within the episode, earlier windows belong to earlier λ. The variance grows with w in proportion to the number of
    perturbations. If the L_w have similar gradients, `es_single` has less variance.

    The notes of `evolution` on differentiability, coordinates, tasks and non-finite losses apply here too. A particle
    that became non-finite stays non-finite until its slot restarts. `over_tasks` ends such a slot, and the learner
    restarts it. Memory: 2N inner states, with 2N training runs at once.

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, the horizon, a multiple of `truncation_length`.
      truncation_length: K, steps per estimate, at least 1.
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.

    Returns:
      An `Estimator` of kind "unbiased" (for F_σ, over an episode), `done` once T steps are taken. If the caller does
      not restart it then, it continues as if the horizon were longer. `value` is the mean of the particles' L_w.
      Metrics: "inner_steps" and "sampling_variance", as in `evolution`.

    Raises:
      ValueError: if `truncation_length` does not divide `num_steps`, or `num_pairs` or `sigma` is not positive; at
        trace time, if `sigma` is a tree that is not like λ, or is below the precision of a λ of 16 bits (0.0078 for
        bfloat16).

    Source: Vicol, Metz & Sohl-Dickstein, ICML 2021, https://arxiv.org/abs/2112.13835
    """

    def renew(epsilon, fresh, score):
        del epsilon
        return fresh, optax.tree.add(score, fresh)

    return _windowed(problem, num_steps, truncation_length, sigma, num_pairs, renew, "unbiased")


def es_single(
    problem: base.Problem, *, num_steps: int, truncation_length: int, sigma: float | base.PyTree, num_pairs: int
) -> base.Estimator:
    """Estimates dF_σ/dλ once every K steps of a training run of T steps, with one perturbation for the whole run.

        ĝ_w = 1/N Σ_i ε_i (L_w⁺ − L_w⁻)_i / 2σ

    This is `persistent_es`, except that a particle keeps its perturbation for all windows of an episode. It is unbiased
    for the same L_w and F, smoothed as in `evolution`: F_σ(λ) = E F(λ + σε). As in `persistent_es`, this holds only if
    λ is constant within an episode. The variance does not grow with the number of windows. The errors of the windows
    are correlated within an episode.

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, the horizon, a multiple of `truncation_length`.
      truncation_length: K, steps per estimate, at least 1.
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.

    Returns:
      An `Estimator` like that of `persistent_es`.

    Raises:
      ValueError: if `truncation_length` does not divide `num_steps`, or `num_pairs` or `sigma` is not positive; at
        trace time, if `sigma` is a tree that is not like λ, or is below the precision of a λ of 16 bits (0.0078 for
        bfloat16).

    Source: Vicol, Kolter & Swersky, ICML 2023, https://arxiv.org/abs/2304.11153
    """
    return _windowed(
        problem,
        num_steps,
        truncation_length,
        sigma,
        num_pairs,
        lambda epsilon, fresh, score: (epsilon, score),
        "unbiased",
    )


def truncated_es(
    problem: base.Problem, *, num_steps: int, truncation_length: int, sigma: float | base.PyTree, num_pairs: int
) -> base.Estimator:
    """Estimates the effect of λ only within a window of K steps: the biased variant of `persistent_es`, for comparison.

        ĝ_w = 1/N Σ_i ε_iw (L_w⁺ − L_w⁻)_i / 2σ

    This is `persistent_es`, except that the window's own perturbation weights the losses. The estimate is unbiased for
    the gradient with θ at the window's start held constant. So for F it is as short-sighted as truncated reverse mode.
    If K = T, it equals `evolution` with `outer="mean"`.

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, the horizon, a multiple of `truncation_length`.
      truncation_length: K, steps per estimate, at least 1.
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.

    Returns:
      An `Estimator` like that of `persistent_es`, of kind "biased".

    Raises:
      ValueError: if `truncation_length` does not divide `num_steps`, or `num_pairs` or `sigma` is not positive; at
        trace time, if `sigma` is a tree that is not like λ, or is below the precision of a λ of 16 bits (0.0078 for
        bfloat16).

    Source: Vicol, Metz & Sohl-Dickstein, ICML 2021, https://arxiv.org/abs/2112.13835, Sec. 3.
    """
    return _windowed(
        problem,
        num_steps,
        truncation_length,
        sigma,
        num_pairs,
        lambda epsilon, fresh, score: (fresh, fresh),
        "biased",
    )
