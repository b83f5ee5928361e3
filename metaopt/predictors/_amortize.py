"""λ = g(task; φ): from an estimator of dF/dλ to one of dF/dφ."""

import jax

from metaopt import base


def amortize(estimator: base.Estimator, predictor: base.Predictor) -> base.Estimator:
    """Estimates dF/dφ = (∂g(task; φ)/∂φ)ᵀ dF/dλ, where λ = g(task; φ) for every task.

    The estimator sees λ, and its hypergradient is pulled back through the predictor: any rule serves, and the pullback
    is exact and costs one reverse pass of the predictor. Wrap it in `hypergrad.over_tasks` to learn φ over many tasks.

    Args:
      estimator: for one task, of `spaces.constrain(problem, space)`: predictors of a space return `Unconstrained`
        coordinates. For a predictor of one's own, of the problem in the λ that it returns.
      predictor: g.

    Returns:
      An `Estimator` of the same kind for one task, whose `hyperparams` are φ and whose state is the inner estimator's.

    Raises:
      ValueError: at trace time, if the predictor returns `Unconstrained` and the problem takes λ in natural units, or
        the predictor returns λ in natural units and the problem is constrained.
    """

    def init(key, hyperparams, task):
        return estimator.init(key, predictor.apply(hyperparams, task), task)

    def estimate(hyperparams, task, state):
        predicted, pullback = jax.vjp(lambda meta_params: predictor.apply(meta_params, task), hyperparams)
        inner, state = estimator.estimate(predicted, task, state)
        return inner._replace(hypergrad=pullback(inner.hypergrad)[0]), state

    return base.Estimator(init, estimate, estimator.kind)
