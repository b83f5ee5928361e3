"""Predicts outcomes of configurations on a new task, given its trials: the mixture of `_surrogates`, in closed form.

`condition` computes everything that depends only on the trials, once for all configurations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox import _deep_kernel, _processes
from metaopt.blackbox._surrogates import Surrogate, expected_outcomes, kernel_matrix

_FACTORS = (-0.7, 0.0, 0.7)  # of scales, as logarithms
# The prior probability that a task's outcomes have other units than those of earlier tasks. The first number is for the
# process that earlier tasks inform, the second for the naive one, which does not use them.
_OWN_UNITS, _OWN_UNITS_NAIVE = 0.1, 0.5


class Mixture(NamedTuple):
    """Outcomes at P configurations: K Gaussians each, in the units of the task, up to one offset that all share.

    Attributes:
      log_weights: [K].
      mean: [P, K].
      std: [P, K].
    """

    log_weights: jax.Array
    mean: jax.Array
    std: jax.Array


class Joint(NamedTuple):
    """Outcomes at P configurations and at Q others: K Gaussians of a few processes.

    Attributes:
      log_weights: [K].
      mean: [P + Q, K].
      scales: [K]; the variances and covariances of Gaussian k are scales[k]² times those of process process_index[k].
      process_index: [K] the index of the process of each Gaussian; there are R processes: 2 and the deep kernels.
      variance: [R, P + Q].
      covariance: [R, P + Q, Q], with the Q others.
    """

    log_weights: jax.Array
    mean: jax.Array
    scales: jax.Array
    process_index: jax.Array
    variance: jax.Array
    covariance: jax.Array


class Conditioned(NamedTuple):
    """A surrogate given the N trials of a new task.

    Attributes:
      seen: [N, D] their encoded configurations.
      functions_seen: [N, 1 + S] k(seen, reference) @ coefficients.
      processes: the process that earlier tasks inform, and the one that does not use them, each given the trials.
      log_weights: [4 S + 6 + 6 E] of all Gaussians.
      deep: the E deep kernels, adapted, or None.
    """

    seen: jax.Array
    functions_seen: jax.Array
    processes: tuple[_processes.Processes, _processes.Processes]
    log_weights: jax.Array
    deep: "Adapted | None" = None


class Adapted(NamedTuple):
    """E deep kernels after a few steps on a task's trials, and given those trials.

    Attributes:
      members: their parameters.
      processes: given the trials; leaves [E, ...].
      embedded_seen: [E, N, H] φ of the trials.
    """

    members: _deep_kernel.DeepKernel
    processes: _processes.Processes
    embedded_seen: jax.Array


def condition(
    surrogate: Surrogate,
    weights: jax.Array,
    trials: tuple[jax.Array, jax.Array, jax.Array],
    *,
    adaptation_steps: int = _deep_kernel.ADAPTATION_STEPS,
) -> Conditioned:
    """Conditions a surrogate on the trials of a new task; the result serves for predictions at any configurations.

    Args:
      surrogate: the model of the earlier tasks; if it has deep kernels, specialized to the task (`at_task`).
      weights: [S + E], by `task_weights`.
      trials: (x [N, D], y [N], mask [N]); at least one is real. y may have any units.
      adaptation_steps: the number of steps by which deep kernels are adapted to these trials.

    Returns:
      A `Conditioned`, for `posterior_at` and `joint_posterior_at`; it takes memory O(N (N + S + M)).
    """
    seen, y, mask = trials
    functions_seen = functions_at(surrogate, seen)
    k_seen = kernel_matrix(surrogate.kernel, seen, seen)
    processes, log_weights = _condition(surrogate, weights, (functions_seen, y, mask), k_seen)
    deep = None
    if surrogate.deep is not None:
        log_scales = _typical_scales(surrogate)

        def of_member(member):
            # An adapted member would always explain the trials best, so it keeps its likelihood before the adaptation.
            before = _deep_kernel.condition_deep(member, log_scales, trials).log_likelihood.max()
            member = _deep_kernel.adapt_deep_kernel(member, log_scales, trials, num_steps=adaptation_steps)
            process = _deep_kernel.condition_deep(member, log_scales, trials)
            gained = process.log_likelihood.max() - before
            process = process._replace(log_likelihood=process.log_likelihood - gained)
            return Adapted(member, process, _deep_kernel.embed(member, seen))

        deep = jax.vmap(of_member)(surrogate.deep)
        prior = _log(weights[len(surrogate.curves) :])
        log_weights = (*log_weights, jax.vmap(_weigh)(deep.processes, prior).ravel())
    return Conditioned(seen, functions_seen, processes, jax.nn.log_softmax(jnp.concatenate(log_weights)), deep)


def functions_at(surrogate: Surrogate, x: jax.Array) -> jax.Array:
    """The functions of earlier tasks at x: f̄ and every f_s − f̄.

    Args:
      surrogate: the model of the earlier tasks.
      x: [P, D]; differentiable.

    Returns:
      [P, 1 + S].
    """
    return kernel_matrix(surrogate.kernel, x, surrogate.reference) @ surrogate.coefficients


def posterior_at(
    surrogate: Surrogate, conditioned: Conditioned, x: jax.Array, *, functions: jax.Array | None = None
) -> Mixture:
    """Few-shot adaptation in closed form: predicts the outcomes at x, given the trials of the new task.

    Args:
      surrogate: the model of the earlier tasks.
      conditioned: the result of `condition`.
      x: [P, D]; differentiable.
      functions: `functions_at(surrogate, x)`, if already computed.

    Returns:
      A `Mixture` of 4 S + 6 + 6 E Gaussians; it takes memory O(P (S + N + M)).
    """
    functions = functions_at(surrogate, x) if functions is None else functions
    return _mixture(surrogate, conditioned, x, functions, kernel_matrix(surrogate.kernel, x, conditioned.seen))


def expected_after_failures(
    surrogate: Surrogate, weights: jax.Array, failed: tuple[jax.Array, jax.Array], x: jax.Array
) -> jax.Array:
    """The expected outcomes at x on a task on which all trials so far failed.

    Without an outcome the offset is unknown, but it is not needed. A failed trial counts as 1, the worst normalized
    outcome, or as its expected outcome if that is worse. A failure changes the prediction for similar configurations.
    Unlike an outcome, it does not change which earlier tasks the new one resembles. With m = Σ_s w_s f_s,

        E[f(x)] = m(x) + k(x, F) (k(F, F) + noise)⁻¹ max(1 − m(F), 0).

    Args:
      surrogate: the model of the earlier tasks; if it has deep kernels, specialized to the task (`at_task`).
      weights: [S + E], by `task_weights`.
      failed: (x [N, D], mask [N]); running trials may be included, so that a batch spreads.
      x: [P, D]; differentiable.

    Returns:
      [P] normalized outcomes.
    """
    failed_x, mask = failed
    expected = lambda x: expected_outcomes(surrogate, x) @ weights
    k_failed = kernel_matrix(surrogate.kernel, failed_x, failed_x)
    within = k_failed * mask[:, None] * mask[None] + jnp.diag(1 - mask + 1e-2)
    worse = jnp.maximum(1 - expected(failed_x), 0) * mask
    return expected(x) + kernel_matrix(surrogate.kernel, x, failed_x) @ jnp.linalg.solve(within, worse)


def joint_posterior_at(
    surrogate: Surrogate,
    conditioned: Conditioned,
    x: jax.Array,
    others: jax.Array,
    *,
    functions: jax.Array | None = None,
) -> Joint:
    """`posterior_at` with the covariances between the outcomes at x and at other configurations.

    Args:
      surrogate: the model of the earlier tasks.
      conditioned: the result of `condition`.
      x: [P, D]; differentiable.
      others: [Q, D]; differentiable.
      functions: `functions_at(surrogate, x)`, if already computed.

    Returns:
      A `Joint`; it takes memory O((P + Q) Q) beyond the memory of `posterior_at`.
    """
    functions = functions_at(surrogate, x) if functions is None else functions
    points = jnp.concatenate([x, others])
    functions = jnp.concatenate([functions, functions_at(surrogate, others)])
    k_seen, k_others = (kernel_matrix(surrogate.kernel, points, z) for z in (conditioned.seen, others))
    mean, variances, covariances = _at(surrogate, conditioned, _Queries(points, functions, k_seen, k_others))
    scales = _scales(conditioned)
    process_index = jnp.asarray(np.repeat(np.arange(len(scales)), [len(s) for s in scales]))
    spread = jnp.stack(variances), jnp.stack(covariances)
    return Joint(conditioned.log_weights, mean, jnp.concatenate(scales), process_index, *spread)


def posterior(
    surrogate: Surrogate, weights: jax.Array, trials: tuple[jax.Array, jax.Array, jax.Array], x: jax.Array
) -> Mixture:
    """`condition` and `posterior_at` in one call, for a single prediction on a task.

    Args:
      surrogate: the model of the earlier tasks.
      weights: [S + E], by `task_weights`.
      trials: (x [N, D], y [N], mask [N]); at least one is real. y may have any units.
      x: [P, D]; differentiable.

    Returns:
      A `Mixture` of 4 S + 6 + 6 E Gaussians; it takes memory O(P (S + N + M)), and N² for the trials.
    """
    return posterior_at(surrogate, condition(surrogate, weights, trials), x)


def _condition(surrogate: Surrogate, weights, trials, k_seen):
    """The informed and the naive process given the trials, and the log weights of all their Gaussians.

    The informed process uses the functions of earlier tasks; the naive process does not.
    """
    functions_seen, y, mask = trials
    rho = surrogate.closeness
    informed = _processes.condition(
        functions_seen[:, :1] + rho * functions_seen[:, 1:],
        _share(surrogate) * functions_seen[:, 1:] @ functions_seen[:, 1:].T + surrogate.residual * k_seen,
        surrogate.log_scales[:, None] + jnp.array(_FACTORS)[None],
        (y, mask),
    )
    naive = _processes.condition(
        jnp.zeros((len(y), 1)),
        jnp.exp(surrogate.kernel.log_amplitude) * k_seen,
        _typical_scales(surrogate)[None],
        (y, mask),
    )
    prior = _log(0.95 * weights[: len(surrogate.curves)])[:, None]
    naive_prior = _log(0.05 * weights[: len(surrogate.curves)].sum())
    return (informed, naive), (_weigh(informed, prior), _weigh(naive, naive_prior, _OWN_UNITS_NAIVE))


def _log(weights: jax.Array) -> jax.Array:
    """The logarithm; −∞ for zero weights, so that no likelihood of the trials can revive them."""
    return jnp.where(weights > 0, jnp.log(jnp.maximum(weights, 1e-37)), -jnp.inf)


def _typical_scales(surrogate: Surrogate) -> jax.Array:
    return jnp.quantile(surrogate.log_scales, jnp.array([0.1, 0.3, 0.5, 0.7, 0.9]))


def _weigh(processes: _processes.Processes, prior: jax.Array, own: float = _OWN_UNITS) -> jax.Array:
    """[K·B] log prior plus log likelihood; the task's own scale has the prior `own`, the others share the rest."""
    num = processes.scales.shape[1] - 1
    scales = np.log(np.append(np.full(num, (1 - own) / num), own)).astype(processes.scales.dtype)
    return (prior + scales[None] + processes.log_likelihood).ravel()


def _share(surrogate: Surrogate):
    return (1 - surrogate.closeness**2) / len(surrogate.curves)


class _Queries(NamedTuple):
    """P configurations at which outcomes are predicted; covariances are with the last Q of them, which may be none.

    Attributes:
      x: [P, D].
      functions: [P, 1 + S] `functions_at` x.
      k_seen: [P, N] k(x, the trials).
      k_others: [P, Q] k(x, the last Q of x).
    """

    x: jax.Array
    functions: jax.Array
    k_seen: jax.Array
    k_others: jax.Array


def _mixture(surrogate: Surrogate, conditioned: Conditioned, x, functions, k_seen) -> Mixture:
    queries = _Queries(x, functions, k_seen, jnp.zeros((len(functions), 0), functions.dtype))
    mean, variances, _ = _at(surrogate, conditioned, queries)
    std = [
        jnp.sqrt(variance)[:, None] * scales[None]
        for variance, scales in zip(variances, _scales(conditioned), strict=True)
    ]
    return Mixture(conditioned.log_weights, mean, jnp.concatenate(std, axis=1))


def _scales(conditioned: Conditioned) -> list[jax.Array]:
    """The scales of every process, each [K·B]."""
    scales = [processes.scales.ravel() for processes in conditioned.processes]
    return scales if conditioned.deep is None else [*scales, *conditioned.deep.processes.scales[:, 0]]


def _at(surrogate: Surrogate, conditioned: Conditioned, queries: _Queries):
    """[P, K] means of all Gaussians, and for each process variances [P] and covariances [P, Q] with the last Q of x.

    Variances and covariances are in units of the squared scale.
    """
    x, functions, k_seen, k_others = queries
    informed, naive = conditioned.processes
    share, amplitude = _share(surrogate), jnp.exp(surrogate.kernel.log_amplitude)
    mean, deviations = functions[:, :1], functions[:, 1:]
    deviations_seen = conditioned.functions_seen[:, 1:]
    num_others = k_others.shape[1]
    deviations_others = deviations[len(x) - num_others :]
    predictions = [
        _processes.predict(
            informed,
            mean + surrogate.closeness * deviations,
            share * deviations @ deviations_seen.T + surrogate.residual * k_seen,
            share * (deviations**2).sum(1) + surrogate.residual,
            share * deviations @ deviations_others.T + surrogate.residual * k_others,
        ),
        _processes.predict(
            naive,
            jnp.zeros((len(x), 1)),
            amplitude * k_seen,
            jnp.broadcast_to(amplitude, len(x)),
            amplitude * k_others,
        ),
    ]
    if conditioned.deep is not None:
        same = _processes.same_configuration(x, conditioned.seen)
        same_other = _processes.same_configuration(x, x[len(x) - num_others :])

        def of_member(deep, process, embedded_seen):
            embedded_x = _deep_kernel.embed(deep, x)
            return _processes.predict(
                process,
                (embedded_x @ deep.mean)[:, None],
                _deep_kernel.covariance(deep, embedded_x, embedded_seen, same),
                jnp.broadcast_to(jnp.exp(deep.log_amplitude), len(x)),
                _deep_kernel.covariance(deep, embedded_x, embedded_x[len(x) - num_others :], same_other),
            )

        members = jax.vmap(of_member)(*conditioned.deep)
        predictions += [jax.tree.map(lambda leaf, e=e: leaf[e], members) for e in range(len(members[0]))]
    means, variances, covariances = zip(*predictions, strict=True)
    return jnp.concatenate(means, axis=1), variances, covariances
