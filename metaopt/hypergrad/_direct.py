"""Any differentiable function of λ as an estimator, without an inner loop or with an inner loop inside the function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metaopt import _explained, base


def direct(loss: Callable) -> base.Estimator:
    """Makes an estimator of a plain differentiable function, so that `training.fit` can minimize it.

        F(λ) = loss(λ, task, key),    dF/dλ by reverse mode.

    Use it for predictors trained on records of past trials, for losses that solve their own inner problem (`unroll`, a
    closed form), and for ordinary training of λ. It works under jit, vmap and further differentiation if `loss` does.
    The memory is that of the reverse pass of `loss`. If `loss` trains in a `lax.scan`, it stores all intermediate
    values of every step. With `jax.checkpoint(step)`, it stores only the states between the steps, and computes each
    step once more. If its inner loss has convolutions, use `inner.im2col(inner_loss, only_on_cpu=True)` there, as
    `inner.loop` does: on a CPU, XLA's convolutions inside loops are slow.

    `loss` gets the task as it is. For a batch of tasks, such as that of `tasks.stack`, wrap the estimator in
    `over_tasks`. Otherwise the loss gets the whole batch, and may mix its tasks without an error.

    `fit(space=...)` passes unconstrained coordinates to `loss`. Convert them to λ in its first line, by
    `spaces.to_constrained(space, z)`.

    Args:
      loss: `(hyperparams, task, key) -> []`, differentiable in λ; the key is new in every call.

    Returns:
      An `Estimator` of kind "exact", `done` after every estimate. Its state is a key.

    Raises:
      TypeError: at trace time, from JAX, if the loss is not a floating-point scalar.
      ValueError: at trace time, if the loss reads the value of λ, the task or the key (in `if`, `float`, `int` or
        NumPy), as some optax schedules do.

    >>> import jax
    >>> from metaopt import hypergrad
    >>> estimator = hypergrad.direct(
    ...     lambda hyperparams, task, key: (hyperparams - task) ** 2
    ... )
    >>> estimate, _ = estimator.estimate(
    ...     3.0, 1.0, estimator.init(jax.random.key(0), 3.0, 1.0)
    ... )
    >>> float(estimate.value), float(estimate.hypergrad)
    (4.0, 4.0)
    """

    def init(key, hyperparams, task):
        del hyperparams, task
        return key

    def estimate(hyperparams, task, state):
        loss_key, key = jax.random.split(state)
        try:
            value, hypergrad = jax.value_and_grad(loss)(hyperparams, task, loss_key)
        except _explained.NEEDS_A_VALUE as error:
            raise ValueError(
                "`loss` of `hypergrad.direct` reads the value of a traced array (in `if`, `float`, `int` or NumPy). "
                f"JAX traces λ, the task and the key, so they have no values. {_explained.SCHEDULES} JAX: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return base.Estimate(value, hypergrad, jnp.array(True), {}), key

    return base.Estimator(init, estimate, kind="exact")
