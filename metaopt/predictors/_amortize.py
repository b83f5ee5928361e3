"""λ = g(task; φ): turns an estimator of dF/dλ into an estimator of dF/dφ."""

import jax

from metaopt import _proposals, base


def amortize(estimator: base.Estimator, predictor: base.Predictor) -> base.Estimator:
    """Estimates dF/dφ = (∂g(task; φ)/∂φ)ᵀ dF/dλ, where λ = g(task; φ) for every task.

    The inner estimator sees λ, and its hypergradient is pulled back through the predictor. Any hypergradient rule
    works. The pullback is exact and costs one reverse pass of the predictor. Wrap the result in `hypergrad.over_tasks`
    to learn φ over many tasks.

    Args:
      estimator: the estimator for one task. Make it from `spaces.constrain(problem, space)`, since the predictors of
        metaopt return `spaces.Unconstrained` coordinates. If your own predictor returns λ in natural units, make the
        estimator from the problem itself.
      predictor: g.

    Returns:
      An `Estimator` of the same kind for one task. Its `hyperparams` are φ, and its state is the inner estimator's
        state.

    Raises:
      ValueError: at trace time, if the predictor was made with `spread`, which would not be trained.
      ValueError: at trace time, if the predictor returns `Unconstrained` and the problem takes λ in natural units, or
        if the predictor returns λ in natural units and the problem is constrained.
    """

    def predict(meta_params, task):
        prediction = predictor.apply(meta_params, task)
        if isinstance(prediction, _proposals.Normal):
            raise ValueError("`predictor` predicts a spread, which has no gradient here: use `predictors.best_of`.")
        return prediction

    def init(key, hyperparams, task):
        return estimator.init(key, predict(hyperparams, task), task)

    def estimate(hyperparams, task, state):
        predicted, pullback = jax.vjp(lambda meta_params: predict(meta_params, task), hyperparams)
        inner, state = estimator.estimate(predicted, task, state)
        return inner._replace(hypergrad=pullback(inner.hypergrad)[0]), state

    return base.Estimator(init, estimate, estimator.kind)
