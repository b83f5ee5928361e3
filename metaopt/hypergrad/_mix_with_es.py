"""A mixture of an exact estimator and evolution strategies, from the same evaluations, weighted by their variances.

Reverse mode has the smaller variance if F is smooth. If training is chaotic, its variance explodes with T, but that of
evolution strategies does not. At perturbed points, both are unbiased for the gradient of the same F_σ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import _checks, base
from metaopt.hypergrad import _evolution


class MixState(NamedTuple):
    """The state of `mix_with_es`.

    Attributes:
      inner: the exact estimator's states, with leading axes [N, 2]; λ + σε comes first.
      key: the PRNG key for later perturbations.
    """

    inner: base.EstimatorState
    key: jax.Array


def _mix(es: jax.Array, exact: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The N mixed estimates of one leaf, [N, ...], and the weights of the exact estimates, [N]."""
    num = len(es)
    finite = jnp.isfinite(exact).all()
    exact = jnp.where(finite, exact, 0)

    def variance(x):
        """For each i, the trace of the covariance of the other estimates, up to a common factor.

        It is the sum of all squared deviations from the mean, minus the part of estimate i.
        """
        squares = ((x - x.mean(0, keepdims=True)) ** 2).reshape(num, -1).sum(1)
        return jnp.maximum(squares.sum() - squares * num / (num - 1), 0)

    a, b = variance(es), variance(exact)
    weight = jnp.where(a + b == 0, 1, a / jnp.where(a + b == 0, 1, a + b))
    weight = jnp.nan_to_num(weight, nan=0) * finite  # NaN if squares overflow
    each = jax.vmap(lambda w, e, x: ((1 - w) * e + w * x).astype(e.dtype))(weight, es, exact)
    return each, weight


def mix_with_es(estimator: base.Estimator, *, sigma: float | base.PyTree, num_pairs: int) -> base.Estimator:
    """Estimates dF_σ/dλ with the mixture of an exact rule and evolution strategies that has the smallest variance.

        1/N Σ_i [w_i (∇F_i⁺ + ∇F_i⁻)/2 + (1 − w_i) ε_i (F_i⁺ − F_i⁻)/2σ],    F_i^± = F(λ ± σε_i),    ε_i ~ N(0, I)

    Both terms are unbiased for ∇F_σ, where F_σ(λ) = E F(λ + σε); the bias against ∇F is O(σ²). Besides the gradients at
    the same points, evolution strategies cost nothing. The weights follow the inverse variances: w = A / (A + B). A and
    B are the traces of the covariance of the second and the first term, and each leaf of λ has its own w.

    If weights came from the same samples that they weight, the mean would be biased. With few pairs and skewed
    gradients, the bias would be tens of percent. So the weights of pair i come from the other pairs and are independent
    of pair i, and the mean is unbiased. (Running variances would keep it unbiased too, but the state that would hold
    them is reset after every episode.) The disadvantage: if the gradient of one pair is an outlier, the weight of this
    pair does not fall, since the other pairs determine it. So with few pairs and rare explosions, the variance can be a
    few times that of pure evolution strategies.

    If a gradient of the exact rule is not finite in a leaf, only evolution strategies estimate this leaf. If a value is
    not finite, the estimate is not finite either, and `over_tasks` excludes that task. Time and memory are those of 2N
    estimates at once. The rule works under jit and vmap; it is not meant to be differentiated.

    Args:
      estimator: an estimator of kind "exact" for one task, such as `unrolled` or `direct`.
      sigma: σ, in units of λ, positive: a scalar, or a tree like λ of scalars or arrays.
      num_pairs: N antithetic pairs, at least 3, so that the other pairs have a variance; about 10 are better.

    Returns:
      An `Estimator` of kind "unbiased" (for F_σ). Its state is that of the inner estimator for 2N particles. It is
      `done` if all particles are. `value` is the mean of the 2N values. Metrics: the means of the inner estimator's
      metrics; "exact_weight", the mean of w over pairs and leaves; and "sampling_variance" as in `evolution`.

    Raises:
      ValueError: if `estimator` is of another kind, `num_pairs` is below 3, or `sigma` is not positive; at trace time,
        if `sigma` is a tree that is not like λ, or is below the precision of a λ of 16 bits (0.0078 for bfloat16).

    Source: Metz et al., ICML 2019, https://arxiv.org/abs/1810.10180; Parmas et al., ICML 2018,
      https://arxiv.org/abs/1902.01240. The weights that leave one pair out are specific to this library.
    """
    _checks.check_integer("num_pairs", num_pairs, 3)
    _evolution.check_sigma(sigma)
    if estimator.kind != "exact":
        raise ValueError(
            f'`estimator` must be of kind "exact", so that its gradients and its values have one mean; got '
            f'"{estimator.kind}". Wrap the rule itself: `mix_with_es(unrolled(...))` inside `over_tasks`.'
        )

    def init(key, hyperparams, task):
        inner_key, key = jax.random.split(key)
        pair_keys = jnp.stack([jax.random.split(inner_key, num_pairs)] * 2, axis=1)  # one key per pair
        start = jax.vmap(jax.vmap(estimator.init, (0, None, None)), (0, None, None))
        return MixState(start(pair_keys, hyperparams, task), key)

    def estimate(hyperparams, task, state):
        hyperparams = jax.tree.map(jnp.asarray, hyperparams)
        perturbation_key, key = jax.random.split(state.key)
        sigmas = _evolution.scales(sigma, hyperparams)
        epsilon = _evolution.normals(perturbation_key, hyperparams, num_pairs)
        members = jax.vmap(jax.vmap(estimator.estimate, (0, None, 0)), (0, None, 0))
        out, inner = members(_evolution.pairs(hyperparams, sigmas, epsilon), task, state.inner)
        es = _evolution.score_estimates(epsilon, out.value, sigmas)
        leaves, structure = jax.tree.flatten(es)
        exact = [x.mean(1) for x in jax.tree.leaves(out.hypergrad)]
        mixed = [_mix(*pair) for pair in zip(leaves, exact, strict=True)]
        hypergrad, metrics = _evolution.mean_and_metrics(structure.unflatten([each for each, _ in mixed]))
        metrics = {
            **jax.tree.map(lambda x: x.mean((0, 1)), out.metrics),
            **metrics,
            "exact_weight": jnp.stack([weight.mean() for _, weight in mixed]).mean(),
        }
        done = jax.tree.map(lambda x: x.all((0, 1)), out.done)
        return base.Estimate(out.value.mean(), hypergrad, done, metrics), MixState(inner, key)

    return base.Estimator(init, estimate, kind="unbiased")
