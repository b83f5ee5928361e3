"""Predictions of an adaptation at test."""

import contextlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import _jaxpr, base, inner
from metaopt.few_shot import _leaves
from metaopt.few_shot._adaptation import Adaptation
from metaopt.few_shot._evaluate import AdaptFn
from metaopt.few_shot._phase import traced_after_steps

_NO_DERIVATIVE = (
    "The outputs of `few_shot.adapted` have no derivative: it does not store the values that reverse mode needs, so "
    "the gradient would silently be 0. Use `hypergrad.unroll(adaptation.unrolling.loop, num_steps=...)` to "
    "differentiate through the steps, or `adaptation.estimator` for the hypergradient."
)


def adapted(
    adaptation: Adaptation,
    hyperparams: base.HyperParams,
    predict: Callable,
    *,
    num_steps: int | None = None,
    with_context: bool = False,
) -> AdaptFn:
    """Returns a function that adapts to a support set and predicts a query set, as `evaluate_episodes` takes it.

    The outputs for a query row depend on the other query rows only if `predict` makes them do so. A network that
    normalizes by its batch (`conv4(normalization="batch")`) gives a single row other outputs than a whole query set.
    With `conv4(normalization="support")`, or with statistics in the model state, a query set may have any number of
    rows.

    Args:
      adaptation: the specification of how to adapt.
      hyperparams: λ, learned.
      predict: `(params, query) -> outputs` [Q, ...], where `params` are all leaves of the model. With `with_context`,
        `(params, query, context)`, whose `context.model_state` holds the statistics of a batch normalization.
      num_steps: T at test; `test_steps` by default.
      with_context: whether `predict` takes a context.

    Returns:
      `(key, support, query) -> outputs` [T + 1, Q, ...], after 0..T steps. To differentiate through the steps, use
      `hypergrad.unroll(adaptation.unrolling.loop, num_steps=T)`, which takes λ and returns a state. The parameters are
      `adaptation.params(state, hyperparams)`. A network's own model state is the field `own` of the `model_state` of
      `adaptation.unrolling.loop.context(state)`.

    Raises:
      ValueError: at trace time, if the outputs are differentiated.
      ValueError: at trace time, if "x" and "y" of the support set have different numbers of rows.
    """
    loop = adaptation.unrolling.loop
    steps = adaptation.test_steps if num_steps is None else operator.index(num_steps)

    def method(key, support, query):
        _check_support(support)
        inputs = hyperparams, support, query
        fixed, support, query = jax.lax.stop_gradient(inputs)

        def outputs(state):
            context = loop.context(state)
            context = context._replace(model_state=context.model_state.own)
            with traced_after_steps(True):
                return predict(adaptation.params(state, fixed), query, *([context] if with_context else []))

        def changes_per_step(path, _):
            return not _leaves.name(path).startswith(("model_state/made", "model_state/support"))

        state, halves = loop.init(key, fixed, support), None
        with contextlib.suppress(Exception):  # as for ℓ: compute once the parts of a prediction that no step changes
            halves = _jaxpr.split(outputs, (state,), (jax.tree_util.tree_map_with_path(changes_per_step, state),))
        constants = () if halves is None else inner.im2col(halves.once, only_on_cpu=True)((state,))
        predictions = outputs if halves is None else lambda state: halves.rest((state,), constants)
        predictions = inner.im2col(predictions, only_on_cpu=True)
        _, after = inner.run(loop._replace(init=lambda *_: state), steps, trace_fn=predictions)(key, fixed, support)
        visited = jnp.concatenate([predictions(state)[None], after])
        return _jaxpr.refuse_derivative(visited, inputs, _NO_DERIVATIVE)

    return method


def _check_support(support: Any) -> None:
    """Raises ValueError if the number of labels of a support set is not the number of rows."""
    if not isinstance(support, Mapping) or not {"x", "y"} <= support.keys():
        return
    x, y = (getattr(support[name], "shape", ()) for name in ("x", "y"))  # for a user's own loss, both may be trees
    if x and y and x[0] != y[0]:
        raise ValueError(f'"x" and "y" of a support set must have the same number of rows; got {x[0]} and {y[0]}.')
