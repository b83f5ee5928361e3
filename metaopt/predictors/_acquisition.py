"""What the next trial is chosen by: scores of configurations, larger is better, differentiable in the configuration."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.predictors._posterior import Conditioned, Mixture, joint_posterior_at
from metaopt.predictors._surrogates import Surrogate


def expected_improvement(mixture: Mixture, best: jax.Array) -> jax.Array:
    """E[max(best − y, 0)] under the mixture.

    Args:
      mixture: at P configurations.
      best: [] the smallest outcome so far.

    Returns:
      [P], larger is better.
    """
    return _improvement(best - mixture.mean, mixture.std) @ jnp.exp(mixture.log_weights)


def censored_mean(mixture: Mixture, bound: jax.Array) -> jax.Array:
    """E[y | y ≥ bound] under the mixture, of each configuration by itself.

        Σ_k w_k (μ_k Φ(u_k) + σ_k φ(u_k)) / Σ_k w_k Φ(u_k),    u_k = (μ_k − bound)/σ_k.

    What a trial that failed is worth: all that is known of its outcome is that it is no better than the worst one. It
    is the expectation step of a censored likelihood, taken once. The worst outcome in its place would say more than is
    known, and too little: that the configuration is no worse than another that did run.

    Args:
      mixture: at P configurations, given the trials that did not fail.
      bound: [] the worst outcome of those.

    Returns:
      [P], at least the bound.

    Source: Tobin, Econometrica 1958 (the censored likelihood); Hutter, Hoos & Leyton-Brown, Bayesian optimization with
      censored response data, 2011, https://arxiv.org/abs/1310.1947 (imputed in turn, in Bayesian optimization).
    """
    above = (mixture.mean - bound) / mixture.std
    weights = jnp.exp(mixture.log_weights)
    shares = jax.scipy.special.ndtr(above) @ weights
    # E[y | y ≥ bound] − bound is the improvement in the other direction, among what is beyond the bound.
    excess = _improvement(mixture.mean - bound, mixture.std) @ weights
    # Far from what was expected (shares underflow) the excess is less than a standard deviation of any Gaussian.
    return bound + jnp.where(shares > 1e-6, excess / jnp.maximum(shares, 1e-6), 0.0)


def lower_confidence_bound(mixture: Mixture, width: float = 1.0) -> jax.Array:
    """width·σ − μ, with mean and standard deviation of the whole mixture.

    Args:
      mixture: at P configurations.
      width: standard deviations.

    Returns:
      [P], larger is better.
    """
    weights = jnp.exp(mixture.log_weights)
    mean = mixture.mean @ weights
    variance = (mixture.std**2 + (mixture.mean - mean[:, None]) ** 2) @ weights
    return width * jnp.sqrt(variance) - mean


def thompson_sample(key: jax.Array, mixture: Mixture, *, independent: bool) -> jax.Array:
    """Minus an outcome that is drawn for each configuration: one Gaussian of the mixture for all, and its values.

    Args:
      key: consumed.
      mixture: at P configurations.
      independent: draw values, each by itself: for finite sets, whose correlations are neglected. Otherwise they are
        the Gaussian's means, a smooth function: what is drawn is the earlier task that the new one is like.

    Returns:
      [P], larger is better.
    """
    which, noise = jax.random.split(key)
    at = jax.random.categorical(which, mixture.log_weights)
    values = mixture.mean[:, at]
    if independent:
        values += jax.random.normal(noise, values.shape) * mixture.std[:, at]
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
    """What one more configuration adds to the expected improvement of a batch whose other trials still run.

        E[max(best − min(y(x), y_pending), 0)] − E[max(best − min y_pending, 0)] = E_{y_pending}[EI(x; y_pending)]

    The outer expectation is over samples of the outcomes of the trials that run, jointly Gaussian with y(x) within
    each component of the mixture; the inner one is in closed form, so that the gradient in x is exact for the samples
    at hand. A batch that is chosen greedily by it has at least 1 − 1/e of the best batch's expected improvement.

    Args:
      surrogate: what is known.
      conditioned: the same given the trials that have ended, by `condition`.
      pending: (x [Q, D], mask [Q]) of the trials that run.
      x: [P, D]; differentiable.
      best: [] the smallest outcome so far.
      key: of the samples.
      num_samples: how many; a component is drawn for each.
      functions: `functions_at(surrogate, x)`, where it is known already.

    Returns:
      [P], larger is better. It takes memory O((P + Q) Q + P num_samples) beyond that of `posterior_at`.

    Source: Snoek, Larochelle & Adams, NeurIPS 2012, https://arxiv.org/abs/1206.2944, section 3.2 (integration over what
    runs); Wilson, Hutter & Deisenroth, NeurIPS 2018, https://arxiv.org/abs/1805.10196 (batches by gradient; greedily)
    """
    running, mask = pending
    joint = joint_posterior_at(surrogate, conditioned, x, running, functions=functions)
    num = len(x)
    which, noise = jax.random.split(key)
    # Evenly spaced: components come up as often as they weigh.
    levels = (jnp.arange(num_samples) + jax.random.uniform(which)) / num_samples
    cumulative = jnp.cumsum(jnp.exp(joint.log_weights))
    at = jnp.minimum(jnp.searchsorted(cumulative, levels), len(cumulative) - 1)
    # Within a process, in normalized units: the covariance of what runs, and with x.
    cross = joint.covariance[:, :num] * mask[None, None]
    within = joint.covariance[:, num:] * (mask[:, None] * mask[None])[None]
    chol = jnp.linalg.cholesky(within + jnp.diag(1e-6 + 1 - mask)[None])
    gain = jax.vmap(lambda c, k: jax.scipy.linalg.cho_solve((c, True), k.T).T)(chol, cross)  # [R, P, Q]
    left = joint.variance[:, :num] - (gain * cross).sum(2)
    std = jnp.sqrt(jnp.maximum(left, 1e-9))  # [R, P]

    scale, kind = joint.scales[at], joint.kind[at]  # [n]
    deviations = jnp.einsum("nij,nj->ni", chol[kind], jax.random.normal(noise, (num_samples, len(mask))))
    y = joint.mean[num:, at].T + scale[:, None] * deviations  # [n, Q]
    best = jnp.minimum(best, jnp.where(mask[None] > 0, y, jnp.inf).min(1))  # [n]
    mean = joint.mean[:num, at] + scale[None] * jnp.einsum("npq,nq->pn", gain[kind], deviations * mask[None])
    return _improvement(best[None] - mean, scale[None] * std[kind].T).mean(1)


def _improvement(below: jax.Array, std: jax.Array) -> jax.Array:
    """E[max(below + std ε, 0)]."""
    u = below / std
    return std * (u * jax.scipy.special.ndtr(u) + jnp.exp(-(u**2) / 2) / np.sqrt(2 * np.pi))
