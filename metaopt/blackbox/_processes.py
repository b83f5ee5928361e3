"""Gaussian processes with an unknown offset and a few possible scales, given the trials of one task.

    y(c) = a + b f(c),    f ~ GP(μ, K),    a flat prior on a.

With P = K⁻¹ − K⁻¹11ᵀK⁻¹/1ᵀK⁻¹1 and residuals r = y/b − μ, n trials have the log likelihood

    −½ (rᵀPr + log|K| + log 1ᵀK⁻¹1) − (n − 1) log b.

Except for the last term, the log likelihood is quadratic in 1/b. So any number of scales costs one solve, and the
maximum over b is in closed form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NOISE = 1e-3  # variance of a repeated outcome, in normalized units
_WIDEST = 10.0  # the largest log ratio between a task's units and those of earlier tasks
_FEW = 16  # up to this number of coordinates, they are summed one by one


class Processes(NamedTuple):
    """K processes with B scales each and one covariance LLᵀ, given N trials.

    L⁻¹ is stored, because products take a tenth of the time of solves. The noise bounds the condition number of L by
    some hundreds.

    Attributes:
      whitening: [N, N] L⁻¹.
      mask: [N].
      one: [N] L⁻¹1.
      whitened_y: [N] L⁻¹y.
      whitened_mu: [N, K] L⁻¹μ.
      middle: [] the mean outcome, which was subtracted from y.
      scales: [K, B] b.
      log_likelihood: [K, B].
    """

    whitening: jax.Array
    mask: jax.Array
    one: jax.Array
    whitened_y: jax.Array
    whitened_mu: jax.Array
    middle: jax.Array
    scales: jax.Array
    log_likelihood: jax.Array


def square_distances(x: jax.Array, z: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_d weights_d (x_d − z_d)² between two sets of configurations.

    Args:
      x: [P, D].
      z: [M, D].
      weights: [D].

    Returns:
      [P, M].
    """
    if x.shape[1] > _FEW:  # each summand takes some hundredths of a second to compile, with its gradient
        return (jnp.square(x[:, None] - z[None]) * weights[None, None]).sum(-1)
    # On CPU, XLA does not vectorize sums over the last axis: summing one by one takes a quarter of the time.
    total = jnp.zeros((len(x), len(z)), jnp.result_type(x, z, weights))
    for d in range(x.shape[1]):
        total = total + jnp.square(x[:, d][:, None] - z[:, d][None]) * weights[d]
    return total


def same_configuration(x: jax.Array, z: jax.Array) -> jax.Array:
    """[c = c'].

    Args:
      x: [P, D].
      z: [N, D].

    Returns:
      [P, N] bool.
    """
    return square_distances(x, z, jnp.ones(x.shape[1], x.dtype)) < 1e-8


def condition(
    mu: jax.Array,
    covariance: jax.Array,
    log_scales: jax.Array,
    trials: tuple[jax.Array, jax.Array],
    *,
    own_scale: bool = True,
) -> Processes:
    """Conditions K processes on trials.

    Args:
      mu: [N, K] their means, in normalized units.
      covariance: [N, N], without noise.
      log_scales: [K, B] or [1, B], logarithms of b.
      trials: (y [N], mask [N]).
      own_scale: whether to add one more scale, at the maximum of the likelihood. Its likelihood is the mean over all
        scales that a task may have, by Laplace's method. For this mean, log b is uniform within ±10 of the median of
        `log_scales`.

    Returns:
      A `Processes`, with B + 1 scales if `own_scale`.
    """
    y, mask = trials
    num_trials = mask.sum()
    middle = jnp.where(mask > 0, y, 0.0).sum() / num_trials  # added back later: float32 has few digits
    y = jnp.where(mask > 0, y - middle, 0.0)
    chol = jnp.linalg.cholesky(covariance * mask[:, None] * mask[None] + jnp.diag(jnp.where(mask > 0, NOISE, 1.0)))
    whitening = jax.scipy.linalg.solve_triangular(chol, jnp.eye(len(y), dtype=chol.dtype), lower=True)
    one, whitened_y, whitened_mu = whitening @ mask, whitening @ y, whitening @ (mu * mask[:, None])
    total = one @ one
    y_c, mu_c = whitened_y - one * (one @ whitened_y) / total, whitened_mu - jnp.outer(one, one @ whitened_mu) / total
    y_dot_y, y_dot_mu = y_c @ y_c, (y_c @ mu_c)[:, None]
    log_scales = jnp.broadcast_to(log_scales, (mu.shape[1], log_scales.shape[1]))
    rest = -jnp.log(jnp.diag(chol)).sum() - jnp.log(total) / 2 - (mu_c**2).sum(0)[:, None] / 2

    def log_likelihood(log_scales):
        inverse = jnp.exp(-log_scales)
        return rest - y_dot_y * inverse**2 / 2 + y_dot_mu * inverse - (num_trials - 1) * log_scales

    values = log_likelihood(log_scales)
    if own_scale:
        own, width = _likeliest(y_dot_y, y_dot_mu, num_trials, log_scales)
        has_scale = num_trials > 1  # one trial does not determine a scale
        at_own = jnp.where(has_scale, log_likelihood(own) + jnp.log(width / (2 * _WIDEST)), values[:, :1])
        values = jnp.concatenate([values, at_own], axis=1)
        log_scales = jnp.concatenate([log_scales, jnp.where(has_scale, own, log_scales[:, :1])], axis=1)
    return Processes(whitening, mask, one, whitened_y, whitened_mu, middle, jnp.exp(log_scales), values)


def _likeliest(y_dot_y, y_dot_mu, num_trials, log_scales):
    """[K, 1] the log b that maximizes −½ y_dot_y/b² + y_dot_mu/b − (n − 1) log b, and √(2π / its curvature there)."""
    root = jnp.sqrt(y_dot_mu**2 + 4 * y_dot_y * (num_trials - 1))
    # Both are the positive root of −y_dot_y u² + y_dot_mu u + (n − 1), u = 1/b. Each is accurate where the other one
    # cancels.
    inverse = jnp.where(
        y_dot_mu > 0,
        (y_dot_mu + root) / jnp.maximum(2 * y_dot_y, 1e-30),
        2 * (num_trials - 1) / jnp.maximum(root - y_dot_mu, 1e-30),
    )
    middle = jnp.median(log_scales)
    # Equal outcomes have no scale; the maximum would be at b = 0.
    own = jnp.clip(-jnp.log(jnp.maximum(inverse, 1e-30)), middle - _WIDEST, middle + _WIDEST)
    curvature = y_dot_y * jnp.exp(-2 * own) + jnp.maximum(num_trials - 1, 1)
    return jax.lax.stop_gradient(own), jax.lax.stop_gradient(jnp.sqrt(2 * np.pi / curvature))


def predict(processes: Processes, mu: jax.Array, cross: jax.Array, variance: jax.Array, covariance: jax.Array):
    """Means of all processes at P configurations, and their posterior variances and covariances.

    Args:
      processes: given the trials.
      mu: [P, K] prior means.
      cross: [P, N] prior covariances with the trials.
      variance: [P] prior variances.
      covariance: [P, Q] prior covariances with the last Q configurations.

    Returns:
      [P, K·B] means in the task's units; [P] variances and [P, Q] covariances in normalized units.
    """
    one, whitened_y, whitened_mu = processes.one, processes.whitened_y, processes.whitened_mu
    whitened_cross = processes.whitening @ (cross * processes.mask[None]).T  # [N, P]
    total = one @ one
    # The means are offset + μ(c) + k K⁻¹(r − offset), which is linear in y/b and in μ.
    unexplained = 1 - one @ whitened_cross  # [P]
    offset_y, offset_mu = (one @ whitened_y) / total, (one @ whitened_mu) / total
    mean_y = whitened_cross.T @ whitened_y + unexplained * offset_y + processes.middle  # [P]
    mean_mu = mu - whitened_cross.T @ whitened_mu - unexplained[:, None] * offset_mu[None]  # [P, K]
    mean = mean_y[:, None, None] + processes.scales[None] * mean_mu[..., None]
    variance = jnp.maximum(variance - (whitened_cross**2).sum(0) + unexplained**2 / total, 1e-9)
    others = slice(len(mu) - covariance.shape[1], None)
    of_offset = jnp.outer(unexplained, unexplained[others]) / total
    covariance = covariance - whitened_cross.T @ whitened_cross[:, others] + of_offset
    return mean.reshape(len(mu), -1), variance, covariance
