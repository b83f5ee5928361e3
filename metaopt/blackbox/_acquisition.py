"""Acquisition functions, which score the next trial: larger is better, and they are differentiable in it."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox._posterior import Conditioned, Mixture, joint_posterior_at
from metaopt.blackbox._surrogates import Surrogate


def expected_improvement(mixture: Mixture, best: jax.Array) -> jax.Array:
    """E[max(best − y, 0)] under the mixture.

    Args:
      mixture: the predictions at P configurations.
      best: [] the smallest outcome so far.

    Returns:
      [P], larger is better.
    """
    return _improvement(best - mixture.mean, mixture.std) @ jnp.exp(mixture.log_weights)


def censored_mean(mixture: Mixture, bound: jax.Array) -> jax.Array:
    """E[y | y ≥ bound] under the mixture, for each configuration separately.

        Σ_k w_k (μ_k Φ(u_k) + σ_k φ(u_k)) / Σ_k w_k Φ(u_k),    u_k = (μ_k − bound)/σ_k.

    This is the outcome to impute for a failed trial. A failed trial is treated as censored: its outcome is at least as
    bad as the worst observed one. The function computes the expectation step of a censored likelihood once. Imputing
    the worst outcome itself would assume too much: that the outcome is known exactly. It would also assume too little:
    that the failed configuration is not worse than the worst successful one.

    Args:
      mixture: the predictions at P configurations, given the trials that did not fail.
      bound: [] the worst outcome of those trials.

    Returns:
      [P], at least the bound.

    Source: Tobin, Econometrica 1958 (the censored likelihood); Hutter, Hoos & Leyton-Brown, Bayesian optimization with
      censored response data, 2011, https://arxiv.org/abs/1310.1947 (repeated imputation in Bayesian optimization).
    """
    u = (mixture.mean - bound) / mixture.std
    weights = jnp.exp(mixture.log_weights)
    shares = jax.scipy.special.ndtr(u) @ weights
    # E[y | y ≥ bound] − bound is the expected improvement in the other direction, divided by the mass above the bound.
    excess = _improvement(mixture.mean - bound, mixture.std) @ weights
    # If the bound is far above the predictions, `shares` underflows. The excess is then below the std of every
    # component, so we return the bound.
    return bound + jnp.where(shares > 1e-6, excess / jnp.maximum(shares, 1e-6), 0.0)


def lower_confidence_bound(mixture: Mixture, width: float = 1.0) -> jax.Array:
    """width·σ − μ, with the mean μ and the standard deviation σ of the whole mixture.

    Args:
      mixture: the predictions at P configurations.
      width: the width in standard deviations.

    Returns:
      [P], larger is better.
    """
    weights = jnp.exp(mixture.log_weights)
    mean = mixture.mean @ weights
    variance = (mixture.std**2 + (mixture.mean - mean[:, None]) ** 2) @ weights
    return width * jnp.sqrt(variance) - mean


def thompson_sample(key: jax.Array, mixture: Mixture, *, independent: bool) -> jax.Array:
    """Minus a sampled outcome per configuration, from one Gaussian component that all configurations share.

    Args:
      key: consumed.
      mixture: the predictions at P configurations.
      independent: whether to sample each outcome independently, which ignores correlations; use it for finite sets. If
        False, the outcomes are the means of the sampled component, a smooth function. Then only the
        choice of the component is random. A component usually stands for one earlier task.

    Returns:
      [P], larger is better.
    """
    component_key, noise_key = jax.random.split(key)
    component = jax.random.categorical(component_key, mixture.log_weights)
    values = mixture.mean[:, component]
    if independent:
        values += jax.random.normal(noise_key, values.shape) * mixture.std[:, component]
    return -values


def batch_expected_improvement(
    surrogate: Surrogate,
    conditioned: Conditioned,
    pending: tuple[jax.Array, jax.Array],
    x: jax.Array,
    best: jax.Array,
    key: jax.Array,
    *,
    num_samples: int = 128,
    functions: jax.Array | None = None,
) -> jax.Array:
    """How much one more configuration adds to the expected improvement of a batch that contains the running trials.

        E[max(best − min(y(x), y_pending), 0)] − E[max(best − min y_pending, 0)] = E_{y_pending}[EI(x; y_pending)]

    The outer expectation is over samples of the running trials' outcomes. Within each component of the mixture they are
    jointly Gaussian with y(x). The inner expectation is in closed form, so the gradient in x is exact for the given
    samples. A batch that is chosen greedily by this score has at least 1 − 1/e of the best batch's expected
    improvement.

    Args:
      surrogate: the model of the earlier tasks.
      conditioned: the same model given the finished trials, by `condition`.
      pending: (x [Q, D], mask [Q]) of the running trials.
      x: [P, D]; differentiable.
      best: [] the smallest outcome so far.
      key: the key for the samples.
      num_samples: the number of samples; a component is drawn for each.
      functions: `functions_at(surrogate, x)`, if already computed.

    Returns:
      [P], larger is better. It takes memory O((P + Q) Q + P num_samples) beyond the memory of `posterior_at`.

    Source: Snoek, Larochelle & Adams, NeurIPS 2012, https://arxiv.org/abs/1206.2944, section 3.2 (integration over
      running trials); Wilson, Hutter & Deisenroth, NeurIPS 2018, https://arxiv.org/abs/1805.10196 (gradient-based and
      greedy batches)
    """
    running, mask = pending
    joint = joint_posterior_at(surrogate, conditioned, x, running, functions=functions)
    num = len(x)
    component_key, noise_key = jax.random.split(key)
    # Evenly spaced levels, so that each component is drawn in proportion to its weight.
    levels = (jnp.arange(num_samples) + jax.random.uniform(component_key)) / num_samples
    cumulative = jnp.cumsum(jnp.exp(joint.log_weights))
    drawn = jnp.minimum(jnp.searchsorted(cumulative, levels), len(cumulative) - 1)
    # Per process, in normalized units: covariances among the running trials, and between them and x.
    cross = joint.covariance[:, :num] * mask[None, None]
    within = joint.covariance[:, num:] * (mask[:, None] * mask[None])[None]
    chol = jnp.linalg.cholesky(within + jnp.diag(1e-6 + 1 - mask)[None])
    gain = jax.vmap(lambda c, k: jax.scipy.linalg.cho_solve((c, True), k.T).T)(chol, cross)  # [R, P, Q]
    variance_left = joint.variance[:, :num] - (gain * cross).sum(2)
    std = jnp.sqrt(jnp.maximum(variance_left, 1e-9))  # [R, P]

    scale, process = joint.scales[drawn], joint.process_index[drawn]  # [n]
    deviations = jnp.einsum("nij,nj->ni", chol[process], jax.random.normal(noise_key, (num_samples, len(mask))))
    y = joint.mean[num:, drawn].T + scale[:, None] * deviations  # [n, Q]
    best = jnp.minimum(best, jnp.where(mask[None] > 0, y, jnp.inf).min(1))  # [n]
    mean = joint.mean[:num, drawn] + scale[None] * jnp.einsum("npq,nq->pn", gain[process], deviations * mask[None])
    return _improvement(best[None] - mean, scale[None] * std[process].T).mean(1)


def _improvement(gap: jax.Array, std: jax.Array) -> jax.Array:
    """E[max(gap + std ε, 0)]."""
    u = gap / std
    return std * (u * jax.scipy.special.ndtr(u) + jnp.exp(-(u**2) / 2) / np.sqrt(2 * np.pi))
