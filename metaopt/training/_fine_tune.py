"""Fine-tuning: a few hypergradient steps on one new task, starting from a predicted λ."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _checks, _proposals, _tuned_space, base, spaces
from metaopt._jaxpr import Tracer
from metaopt.training import _learner

_log = logging.getLogger(__name__)


class FineTuned(NamedTuple):
    """The result of fine-tuning.

    Attributes:
      hyperparams: the visited λ with the smallest outer loss, including the start. It is in natural units if
        `fine_tune` was given `space`, and otherwise in the units of the start.
      value: [] the outer loss of this λ.
      step: [] int32, the outer step at which it was visited; 0 is the start.
      values: [num_steps + 1] the outer loss at every visited λ; NaN if no horizon ended there.
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
    space: base.PyTree | None = None,
    same_key: bool = True,
) -> Callable[[jax.Array, base.HyperParams, base.Task], FineTuned]:
    """Makes a function that takes a few hypergradient steps on one task, and returns the best λ by validation loss.

        λ_{k+1} = λ_k + optimizer(dF/dλ(λ_k)),    λ* = argmin_{k ≤ K} F(λ_k)

    Start from λ in natural units, or from a prediction g(t') = `predictor.apply(meta_params, task)`, which is
    `spaces.Unconstrained`. It costs K hypergradients and one more training run for F(λ_K). The returned function is
    pure: jit it, and vmap it over tasks that each have their own λ.

    F is a sample: it depends on the key of the initialization, of the order of the data and of the noise. Every
    training run starts with the same key, so all K + 1 values are compared under one key, at no further cost. The steps
    then descend on F for this key only. With `same_key=False`, each run has a new key: the noise of the steps averages
    out, but the values also differ by the noise of their keys. `hypergrad.over_seeds(rule, S)` reduces the noise in
    both cases, at S times the cost. The smallest of K + 1 values is an optimistic estimate of the outer loss. Evaluate
    the result on other data.

    Called without `jit` and `vmap`, it logs a warning if an implicit rule runs far from rest, or if its linear solve is
    worse than none.

    `propose` draws several λ instead of taking steps. This function tunes λ; `few_shot.pretrained` fine-tunes a
    pre-trained model θ to a few-shot task.

    Args:
      estimator: the estimator for one task. Make it from `spaces.constrain(problem, space)`, so that λ stays inside its
        space. A rule that carries training between estimates has comparable values only where a horizon ended. Before
        that, F falls because θ is trained, and not because λ is better. If no horizon ended, the last λ is returned.
      num_steps: K, at least 0; 0 returns the start.
      optimizer: any optax transform; `optax.adam(0.1)` by default. On 46 development tables, with three steps from a
        predicted λ, this rate had the best mean. The rates .03 and .3 were within the noise of it
        (`experiments/hyperparameters/transfer`). In unconstrained coordinates, the first step of Adam moves each
        coordinate by about the rate. A tree of labels or masks must then be `spaces.Unconstrained`, too.
      space: the space of λ. A start in natural units is converted to the estimator's coordinates, and the result is in
        natural units. Without it, the start must be in the estimator's coordinates, and the result is in them too.
      same_key: whether every training run starts with the same key, so that their values are comparable.

    Returns:
      `(key, hyperparams, task) -> FineTuned`. Its fields are `hyperparams`, the visited λ with the smallest F,
      including the start; `value` [], its F; `step` [], the step at which it was visited, where 0 is the start; and
      `values` [K + 1], F at every visited λ, NaN where no horizon ended. A λ with non-finite F is the best only if F is
      finite nowhere. If F is a mean over tasks or seeds, a λ with more non-finite tasks or seeds than another λ is not
      the best.

    Raises:
      ValueError: if `num_steps` is negative.
      ValueError: at trace time, if the start does not fit `space`, or `space` is not the problem's.
      ValueError: at trace time, without `space`, if the start is in natural units and the estimator takes unconstrained
        coordinates.
    """
    _checks.check_integer("num_steps", num_steps, 0)
    optimizer = optax.adam(0.1) if optimizer is None else optimizer

    def tune(key, hyperparams, task):
        init_key, last_key = jax.random.split(_checks.checked_key(key))
        # JAX traces the estimate once in this call of `tune`. Without `jit`, the next call traces again, and so sees
        # new values of the variables that the loss closes over.
        shared = estimator._replace(estimate=_tuned_space.traced_once(estimator.estimate))
        init_with_key = lambda key, hyperparams, task: shared.init(last_key if same_key else key, hyperparams, task)
        learner = _learner.learner(shared._replace(init=init_with_key), optimizer)
        hyperparams = _proposals.center_of(hyperparams)
        if space is not None and not isinstance(hyperparams, spaces.Unconstrained):
            hyperparams = spaces.to_unconstrained(space, hyperparams)

        def step(state, _):
            visited = state.hyperparams
            state, metrics = learner.step(state)
            horizon_ended = metrics["num_done"] > 0
            values = jnp.where(horizon_ended, metrics["value"], jnp.nan)
            return state, (visited, values, _proposals.num_excluded(metrics), metrics)

        with _tuned_space.recording(tune):
            start = learner.init(init_key, hyperparams, task)
            state, (visited, values, excluded, metrics) = jax.lax.scan(step, start, length=num_steps)
        _tuned_space.check(tune, space)
        _warn_of_implicit(metrics)
        last = state.hyperparams
        last = jax.tree.map(lambda x: x[None], last)
        outcome_of = lambda estimate: (*_proposals.value_and_excluded(estimate), jnp.all(estimate.done))
        last_value, last_excluded, ended = _proposals.values(
            shared, last_key, last, start.tasks, None, read_fn=outcome_of
        )
        last_value = jnp.where(ended | ~jnp.isfinite(values).any(), last_value, jnp.nan)
        visited = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), visited, last)
        values = jnp.concatenate([values, last_value])
        best = jnp.argmin(_proposals.ranked(values, jnp.concatenate([excluded, last_excluded]))).astype(jnp.int32)
        tuned = jax.tree.map(lambda x: x[best], visited)
        tuned = tuned if space is None else spaces.to_constrained(space, tuned)
        return FineTuned(tuned, values[best], best, values)

    return tune


def _warn_of_implicit(metrics: dict[str, jax.Array]) -> None:
    """Logs a warning if an implicit rule ran far from rest or its solve failed, on average over the steps.

    Never for traced metrics.
    """
    if any(isinstance(x, Tracer) for x in metrics.values()):
        return
    means = {name: x.mean() for name, x in metrics.items() if x.ndim == 1 and x.size}
    for message in _checks.warnings_of_implicit_rules(means).values():
        _log.warning(message)
