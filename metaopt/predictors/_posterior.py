"""What to expect of configurations on a new task, given its trials: the mixture of `_surrogates`, in closed form.

What depends on the trials alone (`condition`) is computed once for all configurations at which it is looked at.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.predictors._surrogates import NOISE, Surrogate, kernel_matrix

_FACTORS = (-0.7, 0.0, 0.7)  # of scales, as logarithms


class Mixture(NamedTuple):
    """Outcomes at P configurations: K Gaussians each, in the units of the task, up to one offset for all.

    Attributes:
      log_weights: [K].
      mean: [P, K].
      std: [P, K].
    """

    log_weights: jax.Array
    mean: jax.Array
    std: jax.Array


class Joint(NamedTuple):
    """Outcomes at P configurations and at Q others: K Gaussians of two processes, informed of earlier tasks and not.

    Attributes:
      log_weights: [K].
      mean: [P + Q, K].
      scales: [K]; variances and covariances of Gaussian k are scales[k]² times those of process kind[k].
      kind: [K] which process it is of: 0 or 1.
      variance: [2, P + Q].
      covariance: [2, P + Q, Q], with the Q others.
    """

    log_weights: jax.Array
    mean: jax.Array
    scales: jax.Array
    kind: jax.Array
    variance: jax.Array
    covariance: jax.Array


class Conditioned(NamedTuple):
    """A surrogate given the N trials of a new task.

    Attributes:
      seen: [N, D] their encoded configurations.
      at_seen: [N, 1 + S] k(seen, reference) @ coefficients.
      processes: what follows for the process that earlier tasks inform, and for the one that knows nothing.
      log_weights: [3 S + 5] of all Gaussians.
    """

    seen: jax.Array
    at_seen: jax.Array
    processes: tuple["_Given", "_Given"]
    log_weights: jax.Array


class _Given(NamedTuple):
    """K Gaussian processes with B scales each and one covariance LLᵀ, given N trials.

    L⁻¹ is kept, since products take a tenth of the time of solves; noise bounds the condition of L by some hundreds.
    """

    whitening: jax.Array  # [N, N] L⁻¹
    mask: jax.Array  # [N]
    one: jax.Array  # [N] L⁻¹1
    at_y: jax.Array  # [N] L⁻¹y
    at_mu: jax.Array  # [N, K] L⁻¹μ
    middle: jax.Array  # [] what was taken off y
    scales: jax.Array  # [K, B]
    log_likelihood: jax.Array  # [K, B]


def condition(surrogate: Surrogate, weights: jax.Array, trials: tuple[jax.Array, jax.Array, jax.Array]) -> Conditioned:
    """What the trials of a new task say, whatever is asked afterwards.

    Args:
      surrogate: what is known.
      weights: [S], by `task_weights`.
      trials: (x [N, D], y [N], mask [N]); at least one is real. y may have any units.

    Returns:
      A `Conditioned`, for `posterior_at` and `joint_posterior_at`; it takes memory O(N (N + S + M)).
    """
    seen, y, mask = trials
    at_seen = functions_at(surrogate, seen)
    within = kernel_matrix(surrogate.kernel, seen, seen)
    return Conditioned(seen, at_seen, *_condition(surrogate, weights, (at_seen, y, mask), within))


def functions_at(surrogate: Surrogate, x: jax.Array) -> jax.Array:
    """What earlier tasks say of x: f̄ and every f_s − f̄.

    Args:
      surrogate: what is known.
      x: [P, D]; differentiable.

    Returns:
      [P, 1 + S].
    """
    return kernel_matrix(surrogate.kernel, x, surrogate.reference) @ surrogate.coefficients


def posterior_at(
    surrogate: Surrogate, conditioned: Conditioned, x: jax.Array, *, functions: jax.Array | None = None
) -> Mixture:
    """Few-shot adaptation in closed form: the outcomes to expect at x, given the trials seen on the new task.

    Args:
      surrogate: what is known.
      conditioned: by `condition`.
      x: [P, D]; differentiable.
      functions: `functions_at(surrogate, x)`, where it is known already.

    Returns:
      A `Mixture` of 3 S + 5 Gaussians; it takes memory O(P (S + N + M)).
    """
    functions = functions_at(surrogate, x) if functions is None else functions
    return _mixture(surrogate, conditioned, functions, kernel_matrix(surrogate.kernel, x, conditioned.seen))


def joint_posterior_at(
    surrogate: Surrogate,
    conditioned: Conditioned,
    x: jax.Array,
    others: jax.Array,
    *,
    functions: jax.Array | None = None,
) -> Joint:
    """`posterior_at` with the covariances between the outcomes at x and at others.

    Args:
      surrogate: what is known.
      conditioned: by `condition`.
      x: [P, D]; differentiable.
      others: [Q, D]; differentiable.
      functions: `functions_at(surrogate, x)`, where it is known already.

    Returns:
      A `Joint`; it takes memory O((P + Q) Q) beyond that of `posterior_at`.
    """
    functions = functions_at(surrogate, x) if functions is None else functions
    at_x = jnp.concatenate([functions, functions_at(surrogate, others)])
    both = jnp.concatenate([x, others])
    between, among = (kernel_matrix(surrogate.kernel, both, z) for z in (conditioned.seen, others))
    mean, variances, covariances = _at(surrogate, conditioned, at_x, between, among)
    scales = [given.scales.ravel() for given in conditioned.processes]
    kind = jnp.asarray(np.repeat([0, 1], [len(s) for s in scales]))
    spread = jnp.stack(variances), jnp.stack(covariances)
    return Joint(conditioned.log_weights, mean, jnp.concatenate(scales), kind, *spread)


def posterior(
    surrogate: Surrogate, weights: jax.Array, trials: tuple[jax.Array, jax.Array, jax.Array], x: jax.Array
) -> Mixture:
    """`condition` and `posterior_at` in one: for one look at a task.

    Args:
      surrogate: what is known.
      weights: [S], by `task_weights`.
      trials: (x [N, D], y [N], mask [N]); at least one is real. y may have any units.
      x: [P, D]; differentiable.

    Returns:
      A `Mixture` of 3 S + 5 Gaussians; it takes memory O(P (S + N + M)), and N² for the trials.
    """
    return posterior_at(surrogate, condition(surrogate, weights, trials), x)


def posterior_given(
    surrogate: Surrogate,
    weights: jax.Array,
    trials: tuple[jax.Array, jax.Array, jax.Array],
    at_x: jax.Array,
    within: jax.Array,
    between: jax.Array,
) -> Mixture:
    """`posterior`, where all that configurations enter by has been computed: many searches over one finite set.

    Args:
      surrogate: what is known.
      weights: [S].
      trials: (at_seen [N, 1 + S], y [N], mask [N]), at_seen = k(seen, reference) @ coefficients.
      at_x: [P, 1 + S], the same of x.
      within: [N, N], k(seen, seen).
      between: [P, N], k(x, seen).

    Returns:
      A `Mixture`.
    """
    at_seen = trials[0]
    nothing = jnp.zeros((len(at_seen), 0), at_seen.dtype)  # its configurations are not looked at
    conditioned = Conditioned(nothing, at_seen, *_condition(surrogate, weights, trials, within))
    return _mixture(surrogate, conditioned, at_x, between)


def _condition(surrogate: Surrogate, weights, trials, within):
    """Both processes given the trials, and the log weights of all Gaussians."""
    at_seen, y, mask = trials
    rho = surrogate.closeness
    informed = _given(
        at_seen[:, :1] + rho * at_seen[:, 1:],
        _share(surrogate) * at_seen[:, 1:] @ at_seen[:, 1:].T + surrogate.residual * within,
        surrogate.log_scales[:, None] + jnp.array(_FACTORS)[None],
        (y, mask),
    )
    naive = _given(
        jnp.zeros((len(y), 1)),
        jnp.exp(surrogate.kernel.log_amplitude) * within,
        jnp.quantile(surrogate.log_scales, jnp.array([0.1, 0.3, 0.5, 0.7, 0.9]))[None],
        (y, mask),
    )
    prior = jnp.log(0.95 * weights / len(_FACTORS) + 1e-12)[:, None]
    naive_prior = np.log(0.05 / naive.log_likelihood.size)
    both = [(prior + informed.log_likelihood).ravel(), (naive_prior + naive.log_likelihood).ravel()]
    return (informed, naive), jax.nn.log_softmax(jnp.concatenate(both))


def _given(mu_seen, cov, log_scales, trials) -> _Given:
    """The offset is integrated out under a flat prior: with P = K⁻¹ − K⁻¹11ᵀK⁻¹/1ᵀK⁻¹1, residuals r = y/b − μ have the
    log likelihood −½ (rᵀPr + log|K| + log 1ᵀK⁻¹1) − (n − 1) log b. It is quadratic in 1/b, and so costs one solve.
    """
    y, mask = trials
    scales = jnp.exp(log_scales)
    num = mask.sum()
    middle = jnp.where(mask > 0, y, 0.0).sum() / num  # taken off, and put back: float32 has few digits
    y = jnp.where(mask > 0, y - middle, 0.0)
    chol = jnp.linalg.cholesky(cov * mask[:, None] * mask[None] + jnp.diag(jnp.where(mask > 0, NOISE, 1.0)))
    whitening = jax.scipy.linalg.solve_triangular(chol, jnp.eye(len(y), dtype=chol.dtype), lower=True)
    one, at_y, at_mu = whitening @ mask, whitening @ y, whitening @ (mu_seen * mask[:, None])
    total = one @ one
    y_c, mu_c = at_y - one * (one @ at_y) / total, at_mu - jnp.outer(one, one @ at_mu) / total
    quadratic = (y_c @ y_c) / scales**2 - 2 * (y_c @ mu_c)[:, None] / scales + (mu_c**2).sum(0)[:, None]
    likelihood = -quadratic / 2 - jnp.log(jnp.diag(chol)).sum() - jnp.log(total) / 2 - (num - 1) * log_scales
    return _Given(whitening, mask, one, at_y, at_mu, middle, scales, likelihood)


def _share(surrogate: Surrogate):
    return (1 - surrogate.closeness**2) / len(surrogate.curves)


def _mixture(surrogate: Surrogate, conditioned: Conditioned, at_x, between) -> Mixture:
    mean, variances, _ = _at(surrogate, conditioned, at_x, between, jnp.zeros((len(at_x), 0), at_x.dtype))
    std = [
        jnp.sqrt(variance)[:, None] * given.scales.ravel()[None]
        for variance, given in zip(variances, conditioned.processes, strict=True)
    ]
    return Mixture(conditioned.log_weights, mean, jnp.concatenate(std, axis=1))


def _at(surrogate: Surrogate, conditioned: Conditioned, at_x, between, among):
    """[P, K] means of all Gaussians; for each process, variances [P] and covariances [P, Q] with the last Q of x, in
    units of the scale, squared. `among` is k(x, the last Q of x)."""
    informed, naive = conditioned.processes
    share, amplitude = _share(surrogate), jnp.exp(surrogate.kernel.log_amplitude)
    functions, at_seen = at_x[:, 1:], conditioned.at_seen[:, 1:]
    others = functions[len(at_x) - among.shape[1] :]
    mean, *of_informed = _predict(
        informed,
        at_x[:, :1] + surrogate.closeness * functions,
        share * functions @ at_seen.T + surrogate.residual * between,
        share * (functions**2).sum(1) + surrogate.residual,
        share * functions @ others.T + surrogate.residual * among,
    )
    naive_mean, *of_naive = _predict(
        naive,
        jnp.zeros((len(at_x), 1)),
        amplitude * between,
        jnp.broadcast_to(amplitude, len(at_x)),
        amplitude * among,
    )
    return jnp.concatenate([mean, naive_mean], axis=1), *zip(of_informed, of_naive, strict=True)


def _predict(given: _Given, mu_x, cov_x, variance, covariance):
    """[P, K·B] means in the task's units; the variances and covariances that the trials leave."""
    one, at_y, at_mu = given.one, given.at_y, given.at_mu
    at_x = given.whitening @ (cov_x * given.mask[None]).T  # [N, P]
    total = one @ one
    # Means: offset + μ(c) + k K⁻¹(r − offset), and those are linear in y/b and in μ.
    unexplained = 1 - one @ at_x  # [P]
    offset_y, offset_mu = (one @ at_y) / total, (one @ at_mu) / total
    mean_y = at_x.T @ at_y + unexplained * offset_y + given.middle  # [P]
    mean_mu = mu_x - at_x.T @ at_mu - unexplained[:, None] * offset_mu[None]  # [P, K]
    mean = mean_y[:, None, None] + given.scales[None] * mean_mu[..., None]
    variance = jnp.maximum(variance - (at_x**2).sum(0) + unexplained**2 / total, 1e-9)
    others = slice(len(mu_x) - covariance.shape[1], None)
    covariance = covariance - at_x.T @ at_x[:, others] + jnp.outer(unexplained, unexplained[others]) / total
    return mean.reshape(len(mu_x), -1), variance, covariance
