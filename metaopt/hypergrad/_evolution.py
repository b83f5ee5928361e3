"""Evolution strategies: hypergradients from values of F alone, over whole trainings or over windows of one.

With ε ~ N(0, I), what they estimate is the gradient of F smoothed by a Gaussian of scale σ,

    F_σ(λ) = E F(λ + σε),    ∇F_σ(λ) = E [ε (F(λ + σε) − F(λ − σε)) / 2σ],

which is within O(σ²) of ∇F, exists where ∇F does not (steps, rounding), and stays small where ∇F explodes (a chaotic
training). The windowed rules split a training of T steps, F(λ) = 1/T Σ_t f(θ_t, λ), into windows of K steps, each of
which gives an estimate: T/K outer steps where a whole training gives one. Both members of every antithetic pair, λ + σε
and λ − σε, train from one key: they differ in λ alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, inner
from metaopt.hypergrad import _unroll


class ParticlesState(NamedTuple):
    """What the windowed rules carry: N antithetic pairs of trainings.

    Attributes:
      inner: the inner loops' states; leading axes [N, 2], λ + σε first.
      perturbation: ε of the next window, like λ with a leading axis of N.
      score: what that window's losses are multiplied by: a sum of ε, like them.
      key: what later estimates draw from.
    """

    inner: base.InnerState
    perturbation: base.HyperParams
    score: base.HyperParams
    key: jax.Array


def check_pairs(sigma: base.PyTree, num_pairs: int, least: int = 1) -> None:
    """Raises a `ValueError` where a scale is not positive or the pairs are fewer than `least`."""
    if not all(np.all(np.asarray(leaf) > 0) for leaf in jax.tree.leaves(sigma)):
        raise ValueError(f"`sigma` must be positive; got {sigma}.")
    base.check_integer("num_pairs", num_pairs, least)


def scales(sigma: base.PyTree, hyperparams: base.HyperParams) -> base.HyperParams:
    """σ for every entry of λ: from a scalar, or from a tree like λ of scalars and arrays."""
    structure = jax.tree.structure(hyperparams)
    if jax.tree.structure(sigma) == jax.tree.structure(0) and jnp.ndim(sigma) == 0:
        sigma = jax.tree.map(lambda _: sigma, hyperparams)
    if jax.tree.structure(sigma) != structure:
        raise ValueError(
            f"`sigma` must be a scalar or structured like λ, {structure}; got {jax.tree.structure(sigma)}."
        )
    return jax.tree.map(lambda s, x: jnp.broadcast_to(jnp.asarray(s, x.dtype), x.shape), sigma, hyperparams)


def normals(key: jax.Array, hyperparams: base.HyperParams, num_pairs: int) -> base.HyperParams:
    """ε of N pairs: standard normal, like λ with a leading axis of N."""
    leaves, structure = jax.tree.flatten(hyperparams)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, (num_pairs, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(draws)


def pairs(hyperparams: base.HyperParams, sigma: base.HyperParams, perturbation: base.HyperParams) -> base.HyperParams:
    """λ ± σε: like λ with leading axes [N, 2]."""

    def pair(epsilon):
        shift = jax.tree.map(jnp.multiply, sigma, epsilon)
        return jax.tree.map(lambda x, s: jnp.stack([x + s, x - s]), hyperparams, shift)

    return jax.vmap(pair)(perturbation)


def over_pairs(function: Callable) -> Callable:
    """`function(hyperparams, for one pair, for all)`, over N pairs and their two members."""
    return jax.vmap(jax.vmap(function, (0, None, None)), (0, 0, None))


def score_estimates(score: base.HyperParams, losses: jax.Array, sigma: base.HyperParams) -> base.HyperParams:
    """The N estimates s_i (L_i⁺ − L_i⁻) / 2σ, one a pair, from losses [N, 2]."""
    slopes = (losses[:, 0] - losses[:, 1]) / 2

    def estimate(score, slope):
        return jax.tree.map(lambda s, scale: (s * slope / scale).astype(s.dtype), score, sigma)

    return jax.vmap(estimate)(score, slopes)


def mean_and_metrics(each: base.HyperParams) -> tuple[base.HyperParams, dict[str, jax.Array]]:
    """The mean of N estimates, and, from two on, the trace of that mean's covariance."""
    num = len(jax.tree.leaves(each)[0])
    mean = jax.tree.map(lambda x: x.mean(0), each)
    if num < 2:
        return mean, {}
    variances = [x.var(0, ddof=1).sum() / num for x in jax.tree.leaves(each)]
    return mean, {"sampling_variance": jnp.stack(variances).sum()}


def _window(problem, num_steps, outer):
    """`(state, hyperparams, task, outer_key) -> (Σ_t w_t f(θ_t, λ), state)`; one validation batch serves all steps."""
    _unroll._check(num_steps, "none")
    loop, weights = problem.loop, _unroll._weights(outer, num_steps)

    def window(state, hyperparams, task, outer_key):
        def outer_loss(state):
            batch = problem.outer_batch(outer_key, task)
            return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

        def step(state, _):
            return inner.step(loop, state, hyperparams, task.train)

        return _unroll._weighted_scan(step, outer_loss, state, None, weights=weights, num_steps=num_steps, remat="none")

    return window


def _particles(problem, window, sigma, num_pairs, renew):
    """`init`, and `(hyperparams, task, state) -> (Estimate, state)` of one window, never done.

    `renew(ε, fresh ε, score) -> (ε, score)` of the next window is what tells the rules apart.
    """
    loop = problem.loop

    def init(key, hyperparams, task):
        hyperparams = jax.tree.map(jnp.asarray, hyperparams)
        perturbation_key, loop_key, key = jax.random.split(key, 3)
        epsilon = normals(perturbation_key, hyperparams, num_pairs)
        # λ may enter the initialization: it is perturbed there too.
        at = pairs(hyperparams, scales(sigma, hyperparams), epsilon)
        start = over_pairs(lambda hyperparams, key, task: loop.init(key, hyperparams, task.train))
        return ParticlesState(start(at, jax.random.split(loop_key, num_pairs), task), epsilon, epsilon, key)

    def estimate(hyperparams, task, state):
        hyperparams = jax.tree.map(jnp.asarray, hyperparams)
        perturbation_key, outer_key, key = jax.random.split(state.key, 3)
        scale = scales(sigma, hyperparams)
        members = jax.vmap(jax.vmap(window, (0, 0, None, None)), (0, 0, None, 0))
        at, outer_keys = pairs(hyperparams, scale, state.perturbation), jax.random.split(outer_key, num_pairs)
        losses, particles = members(state.inner, at, task, outer_keys)
        hypergrad, metrics = mean_and_metrics(score_estimates(state.score, losses, scale))
        fresh = normals(perturbation_key, hyperparams, num_pairs)
        perturbation, score = renew(state.perturbation, fresh, state.score)
        out = base.Estimate(losses.mean(), hypergrad, jnp.array(False), metrics)
        return out, ParticlesState(particles, perturbation, score, key)

    return init, estimate


def _windowed(problem, num_steps, truncation_length, sigma, num_pairs, renew, kind) -> base.Estimator:
    """A rule that estimates once a window, done at the horizon."""
    check_pairs(sigma, num_pairs)
    base.check_integer("truncation_length", truncation_length, 1)
    base.check_integer("num_steps", num_steps, 1)
    if num_steps % truncation_length:
        raise ValueError(
            f"`num_steps` must be a positive multiple of `truncation_length`, {truncation_length}, so that all windows "
            f"have one length; got {num_steps}."
        )
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
    """Estimates dF_σ/dλ by antithetic evolution strategies, over whole trainings of T steps from fresh starts.

        1/N Σ_i ε_i (F(λ + σε_i) − F(λ − σε_i)) / 2σ,    ε_i ~ N(0, I),    F(λ) = Σ_{t=1..T} w_t f(θ_t(λ), λ)

    Unbiased for the smoothed F_σ(λ) = E F(λ + σε) = F + σ²/2 ΔF + O(σ⁴); so, for F itself, the bias is σ²/2 ∇ΔF. The
    variance is about (n + 1) |∇F|² / N for n entries of λ, so N grows with n. No derivative of the inner training is
    taken: `outer_loss`, the optimizer and λ's role need not be differentiable (the inner gradient itself is
    `jax.grad`). The memory is that of 2N trainings at once, whatever T; the time is that of 2N trainings.

    Every call starts anew, each pair with its own key. Perturbations are in the coordinates of λ: with
    `spaces.constrain` they are unconstrained. Under `over_tasks`, every task draws its own. A pair whose loss is not
    finite makes the estimate non-finite, rather than leave out the regions where F is worst: `over_tasks` then leaves
    that task out, counts it and ends its slot. Works under jit and vmap; it is not meant to be differentiated.

    Args:
      problem: any; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, at least 1 (0 with `outer="last"`).
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.
      outer: "last", "mean" or T weights; see `unrolled`.

    Returns:
      An `Estimator` of kind "unbiased" (for F_σ), `done` after every estimate; its state is a key. `value` is the mean
      of the 2N losses, unbiased for F_σ(λ). Metrics, from two pairs on: "sampling_variance", the estimated trace of
      the hypergradient's covariance over the draws of ε and of keys.

    Raises:
      ValueError: `num_steps`, `sigma`, `num_pairs` or the number of weights is wrong; at trace time, `sigma` is a tree
        that is not like λ.

    Source: Salimans et al., 2017, https://arxiv.org/abs/1703.03864; for inner training, Metz et al., ICML 2019,
      https://arxiv.org/abs/1810.10180.
    """
    check_pairs(sigma, num_pairs)
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
    """Estimates dF_σ/dλ once every K steps of a training of T, unbiased however short the windows (PES).

        F(λ) = 1/T Σ_{t=1..T} f(θ_t(λ), λ) = K/T Σ_w L_w,    L_w = the mean of f over the steps of window w

    N antithetic pairs of particles train on, each with a fresh perturbation ε_w in every window; the estimate in window
    w weighs the losses by the sum of a particle's perturbations so far, which says how they moved θ up to here:

        ĝ_w = 1/N Σ_i (ε_i1 + … + ε_iw) (L_w⁺ − L_w⁻)_i / 2σ

    ĝ_w is unbiased for the gradient of L_w, and the mean over the T/K windows of an episode for that of F, both
    smoothed by perturbations that are independent from window to window, and at a λ that stays: where λ moves within
    the episode, earlier windows belong to earlier λ. The variance grows with w in proportion to the number of
    perturbations; where the L_w pull the same way, `es_single` has less. What is said under `evolution` of
    differentiability, coordinates, tasks and losses that are not finite holds here too (a particle stays non-finite
    until its slot ends, which `over_tasks` and the learner see to). Memory: 2N inner states, 2N trainings at once.

    Args:
      problem: any; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, the horizon, a multiple of `truncation_length`.
      truncation_length: K, steps per estimate, at least 1.
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.

    Returns:
      An `Estimator` of kind "unbiased" (for F_σ, over an episode), `done` once T steps are taken; past that it goes on
      as if the horizon were longer, unless the caller starts it afresh. `value` is the mean of the particles' L_w.
      Metrics: "inner_steps" and, from two pairs on, "sampling_variance".

    Raises:
      ValueError: an argument is out of range; at trace time, `sigma` is a tree that is not like λ.

    Source: Vicol, Metz & Sohl-Dickstein, ICML 2021, https://arxiv.org/abs/2112.13835
    """

    def renew(epsilon, fresh, score):
        del epsilon
        return fresh, optax.tree.add(score, fresh)

    return _windowed(problem, num_steps, truncation_length, sigma, num_pairs, renew, "unbiased")


def es_single(
    problem: base.Problem, *, num_steps: int, truncation_length: int, sigma: float | base.PyTree, num_pairs: int
) -> base.Estimator:
    """Estimates dF_σ/dλ once every K steps of a training of T, with one perturbation for the whole of it.

        ĝ_w = 1/N Σ_i ε_i (L_w⁺ − L_w⁻)_i / 2σ

    As `persistent_es`, but a particle keeps its perturbation for all windows of an episode. Unbiased for the same L_w
    and F, smoothed as by `evolution`: F_σ(λ) = E F(λ + σε), with the same remark on a λ that moves. The variance does
    not grow with the number of windows, and the windows' errors are correlated within an episode.

    Args:
      problem: any; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, the horizon, a multiple of `truncation_length`.
      truncation_length: K, steps per estimate, at least 1.
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.

    Returns:
      An `Estimator` like that of `persistent_es`.

    Raises:
      ValueError: an argument is out of range; at trace time, `sigma` is a tree that is not like λ.

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
    """Estimates what λ does within a window of K steps alone: the biased relative of `persistent_es`, for comparison.

        ĝ_w = 1/N Σ_i ε_iw (L_w⁺ − L_w⁻)_i / 2σ

    As `persistent_es`, but the losses are weighed by the window's own perturbation: unbiased for the gradient that
    holds θ at the window's start constant, and so as short-sighted for F as truncated reverse mode. It equals
    `evolution` with `outer="mean"` where K = T.

    Args:
      problem: any; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, the horizon, a multiple of `truncation_length`.
      truncation_length: K, steps per estimate, at least 1.
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 1.

    Returns:
      An `Estimator` like that of `persistent_es`, of kind "biased".

    Raises:
      ValueError: an argument is out of range; at trace time, `sigma` is a tree that is not like λ.

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
