"""The best of several draws: trains a predictor of a distribution of λ by the smallest of K outer losses."""

import jax
import jax.numpy as jnp

from metaopt import _proposals, base


def best_of(
    estimator: base.Estimator, predictor: base.Predictor, *, num_proposals: int = 10, chunk: int | None = None
) -> base.Estimator:
    """Estimates dF/dφ of the best of K draws from the predicted distribution, which `training.propose` uses.

        (z, s) = g(task; φ),    λ_1 = z,    λ_k = z + s ε_k,  ε_k ~ N(0, I),    F(φ) = min_{k ≤ K} F(λ_k)

    The minimum has the gradient of its smallest member. With b = argmin_k F(λ_k), each estimate has

        dF/dz = dF/dλ(λ_b),    dF/d log s = dF/dλ(λ_b) · s ε_b,    dF/dφ by one reverse pass of g.

    This is exact for the given draws, except where two candidates have equal values. F is a sample: it depends on the
    key of training and on the draws. Its mean is the expected outer loss of the best of K. It costs K training runs
    without a hypergradient, and one hypergradient. As in `training.propose`, all K runs share one key, the first
    candidate is the predicted center, and a candidate with non-finite F is the best only if all are. A candidate with
    more non-finite seeds than another one is not the best. The key and the draws are new in each estimate. Wrap the
    result in `hypergrad.over_tasks`.

    To start from a predictor that was trained by `amortize`, add its weights: `wide.init(key) | meta_params`, where
    `wide` is the same predictor with `spread`.

    Args:
      estimator: the estimator for one task, as for `amortize`. Each candidate has a fresh start and one estimate. For a
        rule that carries training between estimates, F is that of its first window; use a rule of whole runs instead.
      predictor: g, made with `spread`.
      num_proposals: K, at least 1. With 1 it is `amortize` of the center, and the spread has no gradient.
      chunk: the number of runs that train at once, by vmap; by default all K.

    Returns:
      An `Estimator` of the same kind for one task, except that "unbiased" becomes "biased", since the values that
      select the best candidate have the same noise as its hypergradient. Its `hyperparams` are φ, its state is a key,
      and it is `done` after every estimate. Metrics: those of the rule, and "center_value", F of the center.

    Raises:
      ValueError: at trace time, if the predictor has no spread.

    Source: Kingma & Welling, ICLR 2014, https://arxiv.org/abs/1312.6114 (the derivative of a draw).
    """

    def init(key, hyperparams, task):
        del hyperparams, task
        return key

    def estimate(hyperparams, task, state):
        run_key, draw_key, key = jax.random.split(state, 3)
        normal = predictor.apply(hyperparams, task)
        if not isinstance(normal, _proposals.Normal):
            raise ValueError(
                "`predictor` must predict a spread; make it with `spread`, such as `predictors.mlp(..., spread=0.5)`."
            )
        noise = _proposals.noise(draw_key, normal.center, num_proposals)
        candidates = _proposals.candidates(normal, noise)
        values, excluded = _proposals.values(estimator, run_key, candidates, task, chunk)
        best = jnp.argmin(_proposals.ranked(values, excluded))
        best_noise = jax.tree.map(lambda e: e[best], noise)

        def best_draw(meta_params):
            center, spread = predictor.apply(meta_params, task)
            return jax.tree.map(lambda x, s, e: x + s * e, center, spread, best_noise)

        draw, pullback = jax.vjp(best_draw, hyperparams)
        inner, _ = estimator.estimate(draw, task, estimator.init(run_key, draw, task))
        metrics = {**inner.metrics, "center_value": values[0]}
        return base.Estimate(inner.value, pullback(inner.hypergrad)[0], jnp.array(True), metrics), key

    return base.Estimator(init, estimate, "biased" if estimator.kind == "unbiased" else estimator.kind)
