"""Learning curves: predicts the end of a trial from its beginning, from other trials and from other tasks' curves.

Let f_s(c, j) be the outcome of configuration c at fidelity j on the earlier task s, m its mean over the S tasks and d_s
= f_s − m. On a new task, all curves are one Gaussian process over configurations and fidelities,

    y ~ GP(m, (α/S) Σ_s d_s d_sᵀ + (β + γ k(c, c') + δ [c = c']) u(c, j) u(c', j') R(j, j')) + N(0, (σ u(c, j))²).

The first term says that the task is a combination of earlier ones. The second term models the rest: a level of the task
(β), a part that similar configurations share (γ), and a part of each single configuration (δ). Here, u(c, j)² is a
variance over tasks, half the candidate's own and half the mean over candidates. R is the correlation of two fidelities.
Both are learned from earlier tasks. The scales α to σ and the lengths of k are learned by leaving one task out
(`curve_loss`). All observations (any fidelities of any configurations) are conditioned on in closed form.

Limits: the outcomes of all tasks must have one scale (error rates, clipped losses). The candidates are a finite set and
were run on earlier tasks (gaps are filled in). Predictions are Gaussian, even if curves can end in two ways, for
example by divergence.

Sources: Swersky, Snoek & Adams, Freeze-thaw Bayesian optimization, 2014, https://arxiv.org/abs/1406.3896 (a process
over curves, conditioned on prefixes); Wang et al., JMLR 2024, https://arxiv.org/abs/2109.08215 (mean and covariance
learned from earlier tasks).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_JITTER = 1e-6
_NUM_ERRORS = 40
_FEW = 10
# How gaps are filled. R is estimated only from curves without gaps if there are more than 10 for each fidelity. It is
# shrunk toward the identity, so that it is invertible. Outcomes have a noise variance, in units of the squared spread.
_WHOLE_CURVES, _SHRINKAGE, _FILL_NOISE, _FILL_ROUNDS = 10, 0.01, 0.05, 3


class CurveNoise(NamedTuple):
    """The parameters that `curve_loss` learns.

    Attributes:
      log_scales: [5] logarithms of α, β, γ, δ and σ².
      log_lengths: [D] logarithms of the lengths of k, in units of the encoding.
    """

    log_scales: jax.Array
    log_lengths: jax.Array


class CurveSurrogate(NamedTuple):
    """A model of the curves of earlier tasks: S tasks, M candidates, F fidelities.

    Attributes:
      x: [M, D] encoded candidates.
      fidelities: [F], ascending; the last one is the full budget.
      mean: [M, F] m.
      deviations: [S, M, F] d_s.
      spread: [M, F] u.
      correlation: [F, F] R.
      known: [S, M, F] bool, which values of f_s were observed; the others were filled in.
      noise: the scales of the terms.
      errors: [1 + F, Q] quantiles of standardized errors (y − μ)/σ at the full budget on left-out earlier tasks
        (`calibrate`), ascending in each row. Row n is for trials of which n fidelities were observed. These quantiles
        replace those of the normal distribution.
    """

    x: jax.Array
    fidelities: np.ndarray
    mean: jax.Array
    deviations: jax.Array
    spread: jax.Array
    correlation: jax.Array
    known: jax.Array
    noise: CurveNoise
    errors: jax.Array


class Observed(NamedTuple):
    """N outcomes of the new task, padded.

    Attributes:
      candidate: [N] int, the index of the candidate.
      fidelity: [N] int, the index of the fidelity.
      y: [N].
      mask: [N] 1.0 for an outcome, 0.0 for padding.
    """

    candidate: jax.Array
    fidelity: jax.Array
    y: jax.Array
    mask: jax.Array


def curve_surrogate(curves: np.ndarray, x: np.ndarray, fidelities: np.ndarray) -> CurveSurrogate:
    """Computes the mean, deviations, spread and correlation of earlier tasks' curves; the noise has its initial values.

    A gap is filled with the sum of three terms: the candidate's mean at that fidelity, the task's mean deviation there,
    and a term for the candidate. R predicts the last term from the candidate's known outcomes on that task.

    Args:
      curves: [S, M, F] outcomes, NaN if missing; at least three tasks, because two must remain when one is left out.
      x: [M, D] encoded candidates.
      fidelities: [F] in (0, 1], ascending.

    Returns:
      A `CurveSurrogate`.

    Raises:
      ValueError: if a candidate has no outcome at some fidelity on any task.
    """
    curves, x, fidelities = np.asarray(curves, float), np.asarray(x, float), np.asarray(fidelities, float)
    known = np.isfinite(curves)
    if not known.any(0).all():
        raise ValueError(
            "Each configuration must have a finite outcome at each fidelity on some task; clip diverged outcomes."
        )
    filled, correlation = _fill(curves, known)
    mean = filled.mean(0)
    deviations = filled - mean
    dtype = jnp.result_type(float)
    start = np.log([0.5, 0.05, 0.2, 0.3, 0.01])
    noise = CurveNoise(jnp.asarray(start, dtype), jnp.full(x.shape[1], -0.5, dtype))
    as_array = lambda value: jnp.asarray(value, dtype)
    return CurveSurrogate(
        as_array(x),
        fidelities,
        as_array(mean),
        as_array(deviations),
        as_array(_spread(deviations, len(deviations))),
        as_array(correlation),
        jnp.asarray(known),
        noise,
        jnp.tile(jax.scipy.special.ndtri((jnp.arange(_NUM_ERRORS) + 0.5) / _NUM_ERRORS), (len(fidelities) + 1, 1)),
    )


def _spread(deviations, num_tasks: int):
    """u [M, F]: half of the variance is the candidate's own, half is the mean over all candidates."""
    own = (deviations**2).sum(0) / max(num_tasks - 1, 1)
    return ((own + own.mean(0, keepdims=True)) / 2 + 1e-8) ** 0.5


def _fill(curves: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the curves without gaps, and R."""
    mean = np.nanmean(curves, 0)
    with np.errstate(invalid="ignore"):
        level = np.where(known.any(1), np.nansum(curves - mean, 1) / np.maximum(known.sum(1), 1), np.nan)  # [S, F]
    for row in level:  # interpolated at fidelities that no candidate has reached
        seen = np.flatnonzero(np.isfinite(row))
        row[:] = np.interp(np.arange(len(row)), seen, row[seen]) if len(seen) else 0.0
    filled = np.where(known, curves, mean + level[:, None])
    is_whole = known.all(2)  # [S, M]
    # Filled values depend on the correlation, and the correlation on filled values, so we alternate.
    for _ in range(1 if known.all() else _FILL_ROUNDS):
        center = filled.mean(0)
        spread = _spread(filled - center, len(filled))
        standard = (filled - center) / spread
        num_fidelities = standard.shape[-1]
        enough = is_whole.sum() > _WHOLE_CURVES * num_fidelities
        rows = standard[is_whole] if enough else standard.reshape(-1, num_fidelities)
        covariance = rows.T @ rows / len(rows)
        scale = np.sqrt(np.diag(covariance) + 1e-12)
        correlation = (1 - _SHRINKAGE) * covariance / np.outer(scale, scale) + _SHRINKAGE * np.eye(len(scale))
        residual = (filled - mean - level[:, None]) / spread
        for s, c in np.argwhere(known.any(2) & ~is_whole):
            seen = known[s, c]
            inner = correlation[np.ix_(seen, seen)] + _FILL_NOISE * np.eye(seen.sum())
            value = correlation[np.ix_(~seen, seen)] @ np.linalg.solve(inner, residual[s, c, seen])
            filled[s, c, ~seen] = (mean + level[s])[c, ~seen] + spread[c, ~seen] * value
    return filled, correlation


def _covariance(surrogate: CurveSurrogate, a, b):
    """[P, N] covariances, without noise, between the points a [P] and b [N], which are pairs (candidate, fidelity)."""
    (c, j), (d, i) = a, b
    alpha, beta, gamma, delta, _ = jnp.exp(surrogate.noise.log_scales)
    lengths = jnp.exp(surrogate.noise.log_lengths)
    square = jnp.square((surrogate.x[c][:, None] - surrogate.x[d][None]) / lengths[None, None]).sum(-1)
    residual = beta + gamma * jnp.exp(-square / 2) + delta * (c[:, None] == d[None])
    residual *= surrogate.correlation[j][:, i] * surrogate.spread[c, j][:, None] * surrogate.spread[d, i][None]
    shared = surrogate.deviations[:, c, j].T @ surrogate.deviations[:, d, i] / len(surrogate.deviations)
    return alpha * shared + residual


def _factor(surrogate: CurveSurrogate, observed: Observed):
    """The Cholesky factor of the covariance of the observed outcomes, and their whitened residual."""
    points = observed.candidate, observed.fidelity
    both = observed.mask[:, None] * observed.mask[None]
    noise = jnp.exp(surrogate.noise.log_scales[4]) * surrogate.spread[points] ** 2
    diagonal = jnp.where(observed.mask > 0, noise + _JITTER, 1.0)
    chol = jnp.linalg.cholesky(_covariance(surrogate, points, points) * both + jnp.diag(diagonal))
    residual = jnp.where(observed.mask > 0, observed.y - surrogate.mean[points], 0.0)
    return chol, jax.scipy.linalg.solve_triangular(chol, residual, lower=True)


def curve_posterior(
    surrogate: CurveSurrogate, observed: Observed, candidate: jax.Array, fidelity: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of outcomes given the observed ones, in closed form, at a cost of N³ + P N (N + S).

    Args:
      surrogate: the model of the earlier tasks.
      observed: N outcomes; entries whose mask is zero are ignored.
      candidate: [P] int.
      fidelity: [P] int.

    Returns:
      [P] means and [P] standard deviations of the outcome that would be observed, noise included.
    """
    queries = candidate, fidelity
    chol, whitened = _factor(surrogate, observed)
    cross = _covariance(surrogate, queries, (observed.candidate, observed.fidelity)) * observed.mask[None]
    solved = jax.scipy.linalg.solve_triangular(chol, cross.T, lower=True)  # [N, P]
    alpha, beta, gamma, delta, sigma = jnp.exp(surrogate.noise.log_scales)
    spread = surrogate.spread[queries] ** 2
    prior = alpha * (surrogate.deviations[:, candidate, fidelity] ** 2).mean(0)
    prior += (beta + gamma + delta) * spread * jnp.diag(surrogate.correlation)[fidelity]
    variance = prior - (solved**2).sum(0) + sigma * spread
    return surrogate.mean[queries] + solved.T @ whitened, jnp.sqrt(jnp.maximum(variance, 1e-12))


def curve_loss(noise: CurveNoise, surrogate: CurveSurrogate, task: jax.Array, observed: Observed) -> jax.Array:
    """The negative log likelihood, per outcome, of one earlier task's outcomes under the process of the other tasks.

    Args:
      noise: the parameters to learn.
      surrogate: the surrogate of all tasks, including this one; the function leaves it out of mean and deviations.
      task: [] int, the index of the task.
      observed: some of the task's outcomes.

    Returns:
      []; it includes a weak prior on `noise`.
    """
    without_task = leave_out(surrogate._replace(noise=noise), task)
    chol, whitened = _factor(without_task, observed)
    nll = (whitened @ whitened) / 2 + (jnp.log(jnp.diag(chol)) * observed.mask).sum()
    prior = ((noise.log_lengths + 0.5) ** 2).sum() / 2 + ((noise.log_scales + 2) ** 2).sum() / 16
    return (nll + 0.1 * prior) / jnp.maximum(observed.mask.sum(), 1)  # `observed` may be empty


def leave_out(surrogate: CurveSurrogate, task: jax.Array) -> CurveSurrogate:
    """The surrogate without one of the earlier tasks; R is unchanged.

    Args:
      surrogate: the surrogate of S tasks.
      task: [] int, the index of the task.

    Returns:
      A `CurveSurrogate` in which the task's deviations are zero. The others are multiplied by √(S/(S − 1)), because the
        covariance divides by S, and only S − 1 tasks remain.
    """
    num, own = len(surrogate.deviations), surrogate.deviations[task]
    # The mean moves by -d/(S - 1), so the deviations of the other tasks move by d/(S - 1).
    keep = (jnp.arange(num) != task)[:, None, None]
    others = jnp.where(keep, surrogate.deviations + own[None] / (num - 1), 0.0)
    return surrogate._replace(
        mean=surrogate.mean - own / (num - 1),
        deviations=others * np.sqrt(num / (num - 1)),
        spread=_spread(others, num - 1),
    )


def calibrate(surrogate: CurveSurrogate, key: jax.Array, *, num_candidates: int = 20, num_draws: int = 4):
    """Standardized errors at the full budget on left-out earlier tasks, for each number of observed fidelities.

    Filled-in values of a task are neither observed nor predicted here. The errors for n observed fidelities come from
    trials with an outcome at the n-th fidelity (if n > 0) and at the full budget. If there are fewer than ten, the
    errors of the next smaller n are used.

    Args:
      surrogate: the model of the earlier tasks, with its noise learned.
      key: selects the candidates.
      num_candidates: the number of candidates that are observed at a time on a task.
      num_draws: the number of such draws for each task.

    Returns:
      The surrogate with `errors`: their quantiles at Q levels, (q + ½)/Q.
    """
    num_tasks, num, _ = surrogate.deviations.shape
    keys = jax.random.split(key, num_tasks * num_draws)
    size = min(num_candidates, num)
    errors = [np.asarray(_errors(surrogate, i % num_tasks, k, size)) for i, k in enumerate(keys)]
    levels, quantiles = (np.arange(_NUM_ERRORS) + 0.5) / _NUM_ERRORS, []
    for row in np.concatenate(errors, 1):
        row = row[np.isfinite(row)]
        enough = len(row) >= _FEW or not quantiles
        quantiles.append(np.quantile(row, levels) if enough else quantiles[-1])
    return surrogate._replace(errors=jnp.asarray(np.array(quantiles), surrogate.mean.dtype))


@partial(jax.jit, static_argnums=3)
def _errors(surrogate, task, key, num_candidates: int):
    """[1 + F, num_candidates] standardized errors at the full budget after 0, 1, ... F fidelities; NaN if unknown."""
    num, num_fidelities = surrogate.mean.shape
    known = surrogate.known[task]
    # In random order, but candidates with an outcome at the full budget come first.
    order = jax.random.permutation(key, num)
    chosen = order[jnp.argsort(~known[order, -1], stable=True)][:num_candidates]
    candidate, fidelity = jnp.repeat(chosen, num_fidelities), jnp.tile(jnp.arange(num_fidelities), num_candidates)
    last = jnp.full(num_candidates, num_fidelities - 1)
    without_task = leave_out(surrogate, task)
    curve = (surrogate.mean + surrogate.deviations[task])[candidate, fidelity]

    def errors_after(count):
        observed = Observed(candidate, fidelity, curve, ((fidelity < count) & known[candidate, fidelity]) * 1.0)
        mean, std = curve_posterior(without_task, observed, chosen, last)
        error = (surrogate.mean[chosen, last] + surrogate.deviations[task][chosen, last] - mean) / std
        reached = (count == 0) | known[chosen, jnp.maximum(count - 1, 0)]
        return jnp.where(known[chosen, last] & reached, error, jnp.nan)

    return jax.lax.map(errors_after, jnp.arange(1 + num_fidelities))


def curve_improvement(mean: jax.Array, std: jax.Array, errors: jax.Array, best: jax.Array) -> jax.Array:
    """E[max(best − y, 0)], y = μ + σ e, over the equally likely errors e.

    Args:
      mean: [P].
      std: [P].
      errors: [P, Q], rows of `CurveSurrogate.errors`.
      best: [].

    Returns:
      [P].
    """
    return jnp.maximum(best - mean[:, None] - std[:, None] * errors, 0.0).mean(1)
