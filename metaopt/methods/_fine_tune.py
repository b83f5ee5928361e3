"""Fine-tuning: from a predicted λ, a few hypergradient steps on the one new task."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import base, training


class FineTuned(NamedTuple):
    """What fine-tuning found.

    Attributes:
      hyperparams: the λ with the smallest outer loss of all that were visited, the start among them.
      value: [] its outer loss.
      step: [] int32, the outer step at which it was met; 0 is the start.
      values: [num_steps + 1] the outer loss at every λ visited; NaN where no horizon ended.
    """

    hyperparams: base.HyperParams
    value: jax.Array
    step: jax.Array
    values: jax.Array


def fine_tune(
    estimator: base.Estimator,
    *,
    num_steps: int = 5,
    optimizer: optax.GradientTransformation | None = None,
) -> Callable[[jax.Array, base.HyperParams, base.Task], FineTuned]:
    """A few hypergradient steps on one task, keeping the best λ by validation.

        λ_{k+1} = λ_k + optimizer(dF/dλ(λ_k)),    λ* = argmin_{k ≤ K} F(λ_k)

    Start it at g(t') (`predictor.apply`). It costs K hypergradients and one more training run for F(λ_K). Pure: jit it,
    and vmap it over tasks that each have their own λ. F is a sample (a fresh key at every step), so the smallest of
    K + 1 values is optimistic as an estimate of the outer loss: judge on data that took no part.

    Fine-tuning here is of λ. A pre-trained model θ is fine-tuned to a few-shot task by `methods.pretrained`.

    Args:
      estimator: for one task, in unconstrained coordinates (`spaces.constrain`), so that λ stays inside its space. Of
        rules that carry training from estimate to estimate only those values are compared that ended a horizon: before,
        F falls because θ is trained, and not because λ is better. Where none did, the last λ is returned.
      num_steps: K, at least 0; 0 returns the start.
      optimizer: any optax transform; `optax.adam(0.1)` by default.

    Returns:
      `(key, hyperparams, task) -> FineTuned`. A λ whose F is not finite is never the best, unless all are.

    Raises:
      ValueError: `num_steps` is negative.
    """
    base.check_integer("num_steps", num_steps, 0)
    learner = training.learner(estimator, optax.adam(0.1) if optimizer is None else optimizer)

    def tune(key, hyperparams, task):
        init_key, last_key = jax.random.split(key)

        def step(state, _):
            visited = state.hyperparams
            state, metrics = learner.step(state)
            whole = metrics["num_done"] > 0
            return state, (visited, jnp.where(whole, metrics["value"], jnp.nan))

        state, (visited, values) = jax.lax.scan(step, learner.init(init_key, hyperparams, task), length=num_steps)
        last = state.hyperparams
        # Only the value is used: the compiler leaves its gradient out.
        estimate = estimator.estimate(last, task, estimator.init(last_key, last, task))[0]
        counts = jnp.all(estimate.done) | ~jnp.isfinite(values).any()
        last_value = jnp.where(counts, estimate.value, jnp.nan)
        visited = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), visited, last)
        values = jnp.append(values, last_value)
        best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf)).astype(jnp.int32)
        return FineTuned(jax.tree.map(lambda x: x[best], visited), values[best], best, values)

    return tune
