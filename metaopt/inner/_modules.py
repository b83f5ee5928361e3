"""Flax modules at the door: from an NNX or Linen module to the pure functions that a loss is written with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metaopt import base


class Model(NamedTuple):
    """A network as two pure functions.

    Attributes:
      init: `(key, hyperparams, data) -> (params, model_state)`: what `inner.loop(..., with_context=True)` takes.
      apply: `(params, context, *inputs, train=False, **options) -> (outputs, model_state)`, where `context` is the
        `base.Context` that a loss is given: dropout takes its key, batch statistics its model state. With `train=True`
        dropout is on and batch statistics are updated.
    """

    init: Callable[[jax.Array, base.HyperParams, base.Data], tuple[base.Params, base.PyTree]]
    apply: Callable[..., tuple[Any, base.PyTree]]


def from_nnx(make: Callable[[Any], Any]) -> Model:
    """A Flax NNX module as a `Model`.

    `nnx.Param` variables are θ; everything else (batch statistics, rng counts) is the model state. Each call merges
    fresh copies, so a traced step leaves the caller's module alone.

    `nnx.BatchNorm` stops the gradient of its running statistics, so that a hypergradient through an outer loss in
    evaluation mode leaves out how λ moved them. Let the outer loss take the statistics of its batch (`train=True`), or
    use a Linen module, where nothing is stopped.

    Args:
      make: `(nnx.Rngs) -> nnx.Module`, such as `lambda rngs: Net(rngs=rngs)`. It may be called several times.

    Returns:
      A `Model`; `train` sets the module's mode as `module.train()` and `module.eval()` do, and `init` can be vmapped.
    """
    from flax import nnx

    def split(module):
        return nnx.split(module, nnx.Param, ...)

    def init(key, hyperparams, data):
        del hyperparams, data
        _, params, rest = split(make(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(params, context, *inputs, train=False, **options):
        # The graph and its places are the same for every key; no weight is computed here.
        definition, params_state, rest_state = split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        nnx.replace_by_pure_dict(params_state, params)
        nnx.replace_by_pure_dict(rest_state, context.model_state)
        module = nnx.merge(definition, params_state, rest_state, copy=True)
        nnx.reseed(module, default=context.key, dropout=context.key, params=context.key)
        module.train() if train else module.eval()
        outputs = module(*inputs, **options)
        if not train:
            return outputs, context.model_state
        _, _, rest = split(module)
        return outputs, nnx.to_pure_dict(rest)

    return Model(init, apply)


def from_linen(
    module: Any, example: Callable[[base.Data], Any] | Any, *, train_argument: str | None = "train"
) -> Model:
    """A Flax Linen module as a `Model`.

    The collection "params" is θ; every other collection (batch statistics) is the model state, and mutable in training.

    Args:
      module: a `flax.linen.Module`.
      example: the inputs to initialize with: an array (or a tuple of arrays), or `data -> inputs`.
      train_argument: the keyword of the module's `__call__` that says whether it trains, given as `train`; where the
        keyword is "deterministic" or "use_running_average" its negation is given; None where there is none.

    Returns:
      A `Model`.

    Raises:
      ValueError: at trace time, the module has no keyword `train_argument`.
    """

    def mode(train):
        if train_argument is None:
            return {}
        negated = train_argument in ("deterministic", "use_running_average")
        return {train_argument: not train if negated else train}

    def init(key, hyperparams, data):
        del hyperparams
        inputs = example(data) if callable(example) else example
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        params_key, dropout_key = jax.random.split(key)
        try:
            variables = module.init({"params": params_key, "dropout": dropout_key}, *inputs, **mode(False))
        except TypeError as error:
            if train_argument is None or f"unexpected keyword argument '{train_argument}'" not in str(error):
                raise
            raise ValueError(
                f"The module takes no argument `{train_argument}`: {error}. Give `train_argument` of `from_linen` the "
                "name of the keyword that says whether the module trains, or None where there is none."
            ) from error
        return variables["params"], {name: v for name, v in variables.items() if name != "params"}

    def apply(params, context, *inputs, train=False, **options):
        variables = {"params": params, **(context.model_state or {})}
        options = {**mode(train), **options}
        if not train:
            return module.apply(variables, *inputs, **options), context.model_state
        outputs, changed = module.apply(
            variables, *inputs, rngs={"dropout": context.key}, mutable=list(context.model_state or {}), **options
        )
        return outputs, {**(context.model_state or {}), **changed}

    return Model(init, apply)
