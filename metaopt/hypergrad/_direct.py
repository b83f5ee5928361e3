"""Any differentiable function of λ as an estimator: no inner loop, or one that the function hides."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metaopt import base


def direct(loss: Callable) -> base.Estimator:
    """The value and the gradient of a plain function, so that `training.fit` runs it.

        F(λ) = loss(λ, task, key),    dF/dλ by reverse mode.

    For predictors that are trained on records of past trials, for losses that solve their inner problem themselves
    (`unroll`, a closed form), for ordinary training of λ. Works under jit, vmap and further differentiation, as `loss`
    does; the memory is that of its reverse pass.

    Args:
      loss: `(hyperparams, task, key) -> []`, differentiable in λ; the key is fresh at every call.

    Returns:
      An `Estimator` of kind "exact", `done` after every estimate; its state is a key.

    Raises:
      TypeError: at trace time, from JAX: the loss is no floating-point scalar.

    >>> import jax
    >>> from metaopt import hypergrad
    >>> estimator = hypergrad.direct(lambda hyperparams, task, key: (hyperparams - task) ** 2)
    >>> estimate, _ = estimator.estimate(3.0, 1.0, estimator.init(jax.random.key(0), 3.0, 1.0))
    >>> float(estimate.value), float(estimate.hypergrad)
    (4.0, 4.0)
    """

    def init(key, hyperparams, task):
        del hyperparams, task
        return key

    def estimate(hyperparams, task, state):
        loss_key, key = jax.random.split(state)
        value, hypergrad = jax.value_and_grad(loss)(hyperparams, task, loss_key)
        return base.Estimate(value, hypergrad, jnp.array(True), {}), key

    return base.Estimator(init, estimate, kind="exact")
