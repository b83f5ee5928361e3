"""Predicts a new task from earlier ones: a mixture of Gaussian processes, one around each earlier task.

Let f_s(c) be the normalized outcome (0 best, 1 worst) of configuration c on the earlier task s. Let f̄ be the mean of
the S functions and C their covariance, a function of two configurations. A new task t with features x_t has, up to an
unknown offset a and scale b of its outcomes,

    y_t(c) = a + b f(c),    f ~ Σ_s w_s(x_t) GP(f̄ + ρ (f_s − f̄), (1 − ρ²) C + η k).

ρ interpolates between two models. At ρ = 0 the mixture is one process with a learned mean and covariance. At ρ = 1 (and
η = 0) the new task is one of the earlier ones, as a greedy portfolio assumes. If all w_s are equal, ρ does not change
the mean and covariance of f. k is a plain kernel over encoded configurations.

One more component, GP(0, v k), does not use the earlier tasks; it takes over where their predictions fail. Deep kernels
(`_deep_kernel`) may be added to the mixture. Transformers (`_transformer`) may be used next to it, but are not part of
it. Offsets have a flat prior. Scales are those of the earlier tasks times a few factors. One more scale maximizes the
likelihood of the task's own trials, in case its outcomes have other units. Everything except the adaptation of deep
kernels is in closed form, and everything is differentiable in c.

Sources: Wang et al., Pre-trained Gaussian processes for Bayesian optimization, JMLR 2024,
https://arxiv.org/abs/2109.08215 (learned mean and covariance, ρ = 0); Silverman, Density estimation, 1986, section 6.4
(the smoothed bootstrap that keeps the covariance); Feurer et al., https://arxiv.org/abs/1802.02219 (mixtures of the
surrogates of earlier tasks).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _row_embedding
from metaopt.blackbox import _deep_kernel, _processes, _transformer


class TaskTrials(NamedTuple):
    """The trials of one task.

    Attributes:
      x: [N, D] encoded configurations.
      y: [N] outcomes, smaller is better; NaN if the trial failed.
    """

    x: np.ndarray
    y: np.ndarray


class Kernel(NamedTuple):
    """k(c, c') = smooth·exp(−½ Σ_d ((c_d − c'_d)/ℓ_d)²) + (1 − smooth)·[c = c'], at most 1.

    Attributes:
      log_lengths: [D] logarithms of ℓ, in units of the encoding.
      logit_smooth: [] logit of smooth/.99, where smooth is the share of the outcome that similar configurations have in
        common.
      log_amplitude: [] logarithm of v, the variance of normalized outcomes within a task.
    """

    log_lengths: jax.Array
    logit_smooth: jax.Array
    log_amplitude: jax.Array


class Embedding(NamedTuple):
    """How the rows of a task's table become W more features.

    Attributes:
      params: the parameters of `embed_rows`.
      center: [W] the mean over earlier tasks, which is subtracted.
      scale: [W] the standard deviation over earlier tasks, which divides.
    """

    params: dict[str, Any]
    center: jax.Array
    scale: jax.Array


class Surrogate(NamedTuple):
    """A model of earlier tasks, as arrays: M reference configurations, S tasks, E members, F features.

    Attributes:
      reference: [M, D] encoded configurations.
      curves: [S, M] f_s at the reference configurations.
      coefficients: [M, 1 + S] K⁻¹ times the values of f̄ and f_s − f̄ at the reference configurations, where K is the
        matrix of k between these configurations. So k(c, reference) @ coefficients gives these functions at c.
      log_scales: [S] logarithm of b.
      kernel: k.
      attention: parameters by which features weight tasks (`attention_weights`).
      sorted_features: [F, S] the features of earlier tasks in ascending order, which turn raw features into ranks.
      features: [S, F] as ranks; [S, F + W] with an embedding of the tasks' rows.
      closeness: [] ρ.
      residual: [] η.
      deep: E Gaussian processes that contain a meta-learned network (`deep_kernel_loss`), or None.
      deep_share: [] their total prior weight, before the first trial.
      embedding: how a task's rows become features, or None.
      transformers: E transformers, which read trials (`transformer_loss`), or None.
      transformer_share: [] their share of the prediction, for any trials.
      max_shown: the number of trials per task with which the transformers were trained; they are never shown more.
    """

    reference: jax.Array
    curves: jax.Array
    coefficients: jax.Array
    log_scales: jax.Array
    kernel: Kernel
    attention: dict[str, jax.Array]
    sorted_features: np.ndarray
    features: jax.Array
    closeness: float
    residual: float
    deep: _deep_kernel.DeepKernel | None = None
    deep_share: float = 0.0
    embedding: Embedding | None = None
    transformers: _transformer.Transformer | None = None
    transformer_share: float = 0.0
    max_shown: int = _transformer.MAX_SHOWN


def kernel_matrix(kernel: Kernel, x: jax.Array, z: jax.Array) -> jax.Array:
    """k between two sets of configurations.

    Args:
      kernel: its parameters.
      x: [P, D].
      z: [M, D].

    Returns:
      [P, M].
    """
    smooth = 0.99 * jax.nn.sigmoid(kernel.logit_smooth)  # below 1, so that the matrix is invertible
    distance = _processes.square_distances(x, z, jnp.exp(-2 * kernel.log_lengths))
    return smooth * jnp.exp(-distance / 2) + (1 - smooth) * _processes.same_configuration(x, z)


def kernel_loss(kernel: Kernel, trials: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """The negative log marginal likelihood, per trial, of one task's outcomes, and a weak prior on k.

    Args:
      kernel: its parameters, to be learned.
      trials: (x [N, D], y [N] normalized outcomes minus their mean, mask [N]).

    Returns:
      [].
    """
    x, y, mask = trials
    both = mask[:, None] * mask[None]
    matrix = jnp.exp(kernel.log_amplitude) * kernel_matrix(kernel, x, x) * both
    chol = jnp.linalg.cholesky(matrix + jnp.diag(_processes.NOISE + 1 - mask))
    whitened = jax.scipy.linalg.solve_triangular(chol, y * mask, lower=True)
    nll = (whitened @ whitened) / 2 + jnp.log(jnp.diag(chol)).sum()
    prior = ((kernel.log_lengths + 0.5) ** 2).sum() / 2 + kernel.logit_smooth**2 / 8
    return (nll + 0.1 * prior) / mask.sum()


def normalize(y: np.ndarray) -> tuple[np.ndarray, float]:
    """Normalizes the outcomes of one task from 0, the best, to 1, the worst.

    Diverged outcomes do not set the scale, unless the 75 % quantile equals the best outcome.

    Args:
      y: [N], NaN if a trial failed; at least one is finite.

    Returns:
      [N] normalized outcomes, and their scale b.
    """
    finite = y[np.isfinite(y)]
    low, upper = finite.min(), np.quantile(finite, 0.75)
    scale = (min(finite.max(), upper + 3 * (upper - low)) if upper > low else finite.max()) - low
    scale = float(scale) if scale > 0 else 1.0
    return np.minimum((y - low) / scale, 1.0), scale


def surrogate(
    tasks: Sequence[TaskTrials],
    kernel: Kernel,
    reference: np.ndarray,
    *,
    features: np.ndarray | None = None,
    closeness: float = 0.8,
    residual: float = 0.005,
    num_rounds: int = 5,
) -> Surrogate:
    """Learns f_s, their mean and their covariance from the trials of earlier tasks, by expectation maximization.

    Each f_s is the posterior mean given the task's trials. Its prior has the mean and covariance of the f_s of all
    tasks from the previous round. A failed trial counts as the midpoint between its expected outcome and the worst
    outcome. It costs O(S N³ + S M N²) per round for N trials per task.

    Args:
      tasks: S tasks, each with a finite outcome.
      kernel: k, by `kernel_loss`.
      reference: [M, D] the configurations at which functions are stored: all tried ones, or some of them.
      features: [S, F], NaN if unknown.
      closeness: ρ, in [0, 1].
      residual: η.
      num_rounds: the number of rounds.

    Returns:
      A `Surrogate` that weights all tasks equally (`attention` has no member).
    """
    reference = np.asarray(reference, np.float64)
    amplitude = float(np.exp(kernel.log_amplitude))
    gram = _gram(kernel, reference, reference)
    inverse = np.linalg.inv(gram + 1e-6 * np.eye(len(reference)))
    normalized = [normalize(np.asarray(task.y, np.float64)) for task in tasks]
    cross = [_gram(kernel, np.asarray(task.x, np.float64), reference) for task in tasks]
    project = [k @ inverse for k in cross]
    # The variance at a configuration that the reference configurations do not explain.
    variance_left = [amplitude * np.maximum(1 - (k * a).sum(1), 0) for k, a in zip(cross, project, strict=True)]
    mean = np.full(len(reference), np.mean([np.nanmean(y) for y, _ in normalized]))
    covariance = amplitude * gram
    curves = np.zeros((len(tasks), len(reference)))
    is_complete = np.zeros(len(tasks), bool)
    for s, ((y, _), a) in enumerate(zip(normalized, project, strict=True)):
        columns = a.argmax(1)
        is_complete[s] = np.isfinite(y).all() and len(y) == len(np.unique(columns)) == len(reference)
        if is_complete[s]:  # each reference configuration was tried once: nothing to infer
            curves[s, columns] = y
    for round_number in range(1, num_rounds + 1):
        for s, ((y, _), a, variance) in enumerate(zip(normalized, project, variance_left, strict=True)):
            if is_complete[s]:
                continue
            seen = np.isfinite(y)
            curve = _posterior(mean, covariance, a[seen], y[seen], variance[seen])
            if round_number == num_rounds and not seen.all():
                y = np.where(seen, y, (a @ curve + 1) / 2)
                curve = _posterior(mean, covariance, a, y, variance)
            curves[s] = curve
        mean = curves.mean(0)
        deviations = curves - mean
        covariance = deviations.T @ deviations / len(tasks) + 2e-2 * amplitude * gram
    sorted_features = np.zeros((0, len(tasks))) if features is None else np.sort(np.asarray(features, float), axis=0).T
    dtype = jnp.result_type(float)
    coefficients = inverse @ np.concatenate([mean[None], curves - mean]).T
    return Surrogate(
        jnp.asarray(reference, dtype),
        jnp.asarray(curves, dtype),
        jnp.asarray(coefficients, dtype),
        jnp.asarray(np.log([scale for _, scale in normalized]), dtype),
        Kernel(*(jnp.asarray(leaf, dtype) for leaf in kernel)),
        init_attention(jax.random.key(0), 0, len(sorted_features)),
        sorted_features,
        jnp.asarray(rank_features(sorted_features, features, len(tasks)), dtype),
        closeness,
        residual,
    )


def _gram(kernel: Kernel, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """`kernel_matrix` in float64 on the host, since its inverses are needed."""
    lengths = np.exp(np.asarray(kernel.log_lengths, np.float64))
    smooth = 0.99 / (1 + np.exp(-float(kernel.logit_smooth)))
    a, b = x / lengths, z / lengths
    square = lambda a, b: np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)
    return smooth * np.exp(-square(a, b) / 2) + (1 - smooth) * (square(x, z) < 1e-8)


def explained_share(kernel: Kernel, seen: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The share of the prior variance at x that outcomes at other configurations explain.

        r(c) = 1 − var[f(c) | y(seen)] / var[f(c)] = k(c, seen) (k(seen, seen) + σ²/v I)⁻¹ k(seen, c)

    Args:
      kernel: k and v; σ² is the variance of a repeated outcome, 0.001 in normalized units.
      seen: [N, D] encoded configurations with an outcome.
      x: [P, D].

    Returns:
      [P] in [0, 1).
    """
    noise = _processes.NOISE / float(np.exp(kernel.log_amplitude))
    seen, x = np.asarray(seen, np.float64), np.asarray(x, np.float64)
    cross = _gram(kernel, x, seen)
    return (cross * np.linalg.solve(_gram(kernel, seen, seen) + noise * np.eye(len(seen)), cross.T).T).sum(1)


def _posterior(mean, covariance, a, y, rest):
    """The posterior mean of f ~ N(mean, covariance), given y = a f + noise of variance `rest` + 1e-4."""
    cross = a @ covariance
    return mean + cross.T @ np.linalg.solve(cross @ a.T + np.diag(rest + 1e-4), y - a @ mean)


def rank_features(sorted_features: np.ndarray, features: Any, num: int) -> np.ndarray:
    """Ranks of features among those of earlier tasks, with unit variance: neither heavy tails nor units matter.

    Args:
      sorted_features: [F, S].
      features: [num, F]; NaN if unknown, which gets the middle rank. If None, all features are unknown.
      num: the number of tasks.

    Returns:
      [num, F] in [−√3, √3].
    """
    if features is None:
        return np.zeros((num, len(sorted_features)))
    features = np.asarray(features, float)
    ranks = np.zeros(features.shape)
    for f, column in enumerate(sorted_features):
        column = column[np.isfinite(column)]
        if len(column):
            below, upto = (np.searchsorted(column, features[:, f], side) for side in ("left", "right"))
            ranks[:, f] = np.where(np.isfinite(features[:, f]), (below + upto) / len(column) - 1, 0)
    return np.sqrt(3) * ranks


def init_attention(key: jax.Array, num_members: int, num_features: int) -> dict[str, jax.Array]:
    """Initial parameters of `attention_weights`, one row per member, spread so that the members differ from the start.

    Args:
      key: consumed.
      num_members: E; 0 weights all tasks equally.
      num_features: F.

    Returns:
      A dict: "log_rates" [E, F], "logit_share" [E].
    """
    spread = jax.random.normal(key, (num_members, num_features))
    log_rates = -1.0 - np.log(max(num_features, 1)) / 2 + 0.7 * spread
    return {"log_rates": log_rates, "logit_share": jnp.zeros(num_members)}


def attention_weights(
    attention: dict[str, jax.Array], query: jax.Array, features: jax.Array, excluded: jax.Array | None = None
) -> jax.Array:
    """w_s(x) = share·softmax_s(−½ Σ_f (r_f (x_f − x_sf))²) + (1 − share)/S, for one member.

    Args:
      attention: the attention of one member: "log_rates" [F], "logit_share" [].
      query: [Q, F] ranked features.
      features: [S, F] of the earlier tasks.
      excluded: [Q, S] bool, earlier tasks that get no weight (of the same family). The uniform part is shared by the
        others.

    Returns:
      [Q, S], rows sum to 1.
    """
    rates = jnp.exp(attention["log_rates"])[None]
    a, b = query * rates, features * rates
    square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    allowed = jnp.ones(square.shape, bool) if excluded is None else ~excluded
    softmax_weights = jax.nn.softmax(jnp.where(allowed, -square / 2, -1e9), axis=1)
    share = jax.nn.sigmoid(attention["logit_share"])
    return share * softmax_weights + (1 - share) * allowed / allowed.sum(1, keepdims=True)


def attention_loss(
    attention: dict[str, jax.Array],
    data: dict[str, jax.Array],
    *,
    temperature: float = 0.02,
    penalty: float = 1e-3,
) -> jax.Array:
    """The regret of choosing for each task by the weighted mean of tasks of other families: a ranking loss.

        Σ_t v_t Σ_c softmax_c(−f̂_t(c)/τ) f_t(c),    f̂_t = Σ_s w_s(x_t) f_s,    s not of t's family.

    Only the order of the best configurations matters to it. Each member has its own weights v of the tasks (the
    Bayesian bootstrap). The regret is divided by the standard deviation of all f_s.

    Args:
      attention: the attention of all members, [E, ...].
      data: "features" [S, F], "curves" [S, M], "same_family" [S, S] bool, "weights" [E, S].
      temperature: τ.
      penalty: on the sum of the rates.

    Returns:
      [], the sum over members.
    """
    features, curves = data["features"], data["curves"]

    def member(attention, weights):
        expected = attention_weights(attention, features, features, data["same_family"]) @ curves
        regret = (jax.nn.softmax(-expected / temperature, axis=1) * curves).sum(1)
        return weights @ regret / curves.std() + penalty * jnp.exp(attention["log_rates"]).sum()

    return jax.vmap(member)(attention, data["weights"]).sum()


MAX_ROWS = 64  # the maximal number of rows of a task's table that its embedding uses


def task_features(surrogate: Surrogate, features: Any = None, data: Any = None) -> jax.Array | None:
    """The features that distinguish a task: the ranks of its meta-features, and the embedding of its rows.

    Args:
      surrogate: the model of the earlier tasks.
      features: [F] of the task, raw; None or NaN if unknown.
      data: a dict like `train` of `tasks.to_task`; None if unknown. It is ignored if the surrogate has no embedding.

    Returns:
      [F + W], 0 if unknown; None if everything is unknown.
    """
    embedding, num_features = surrogate.embedding, len(surrogate.sorted_features)
    data = None if embedding is None else data
    if (features is None or not num_features) and data is None:
        return None
    raw_features = None if features is None or not num_features else np.asarray(features)[None]
    parts = [jnp.asarray(rank_features(surrogate.sorted_features, raw_features, 1)[0])]
    if embedding is not None:
        embedded = jnp.zeros_like(embedding.center)
        if data is not None:
            raw = _row_embedding.embed_rows(embedding.params, jax.tree.map(jnp.asarray, data), max_rows=MAX_ROWS)
            embedded = (raw - embedding.center) / embedding.scale
        parts.append(embedded)
    return jnp.concatenate(parts)


def task_weights(surrogate: Surrogate, features: Any = None, data: Any = None) -> jax.Array:
    """The prior weight of each earlier task, and of each deep kernel, for a new task without trials.

    Args:
      surrogate: the model of the earlier tasks.
      features: [F] of the new task, raw; None or NaN if unknown.
      data: its rows, as for `task_features`.

    Returns:
      [S + E], sums to 1: earlier tasks by the mean over the attention's members, then the E deep kernels with equal
        weights.
    """
    num_tasks = len(surrogate.curves)
    query = task_features(surrogate, features, data)
    if query is None or not len(surrogate.attention["logit_share"]):
        weights = jnp.full(num_tasks, 1 / num_tasks)
    else:
        of_member = lambda attention: attention_weights(attention, query[None], surrogate.features)[0]
        weights = jax.vmap(of_member)(surrogate.attention).mean(0)
    if surrogate.deep is None:
        return weights
    num_deep = len(surrogate.deep.log_amplitude)
    share = surrogate.deep_share
    return jnp.concatenate([(1 - share) * weights, jnp.full(num_deep, share / num_deep)])


def at_task(surrogate: Surrogate, features: Any = None, data: Any = None) -> Surrogate:
    """The surrogate for one task: its deep kernels and transformers get the task's features.

    Without this call they predict as if the features were unknown.

    Args:
      surrogate: the model of the earlier tasks.
      features: [F] of the task, raw; None or NaN if unknown.
      data: its rows, as for `task_features`.

    Returns:
      A `Surrogate`.
    """
    query = task_features(surrogate, features, data)
    deep, transformers = surrogate.deep, surrogate.transformers
    if query is None or deep is transformers is None:
        return surrogate
    return surrogate._replace(
        deep=None if deep is None else _deep_kernel.at_features(deep, query),
        transformers=None if transformers is None else _deep_kernel.at_features(transformers, query),
    )


def expected_outcomes(surrogate: Surrogate, x: jax.Array) -> jax.Array:
    """f_s, and the means of deep kernels, at any configurations.

    Args:
      surrogate: the model of the earlier tasks; if it has deep kernels, specialized to the task (`at_task`).
      x: [P, D] encoded configurations.

    Returns:
      [P, S + E] normalized outcomes. Deep kernels predict only up to an offset. It is chosen such that their mean over
        the reference configurations equals that of earlier tasks.
    """
    functions = kernel_matrix(surrogate.kernel, x, surrogate.reference) @ surrogate.coefficients
    outcomes = functions[:, :1] + functions[:, 1:]
    if surrogate.deep is None:
        return outcomes
    mean_at = lambda deep, x: _deep_kernel.embed(deep, x) @ deep.mean
    of_member = lambda deep: mean_at(deep, x) - mean_at(deep, surrogate.reference).mean() + surrogate.curves.mean()
    return jnp.concatenate([outcomes, jax.vmap(of_member)(surrogate.deep).T], axis=1)
