"""Converts Flax modules, NNX or Linen, to pure functions that a loss can call.

**BatchNorm and dropout in the inner and the outer loss.** Training and evaluation differ in two layers, and flax has
one switch for each. `Model.apply` takes both under flax's names, and `train` sets the two together:

| | `use_running_average` | `deterministic` |
|---|---|---|
| layer | BatchNorm | dropout |
| False | normalizes by the batch, and updates the running statistics | drops units at random |
| True | normalizes by the running statistics, and keeps them unchanged | drops nothing |
| default | `not train` | `not train` |

The inner loss usually takes `train=True`, and returns the new model state next to its value. For the outer loss there
are three choices:

- `train=False`, the default, evaluates the model as it will predict. F then depends on λ through θ and through the
  running statistics, because every inner step changed both. The hypergradient includes both paths.
- `use_running_average=False` normalizes by the outer batch, without dropout. The running statistics do not enter F. The
  value depends on which rows share a batch, so it is not the loss of the model that will predict.
- `deterministic=False` keeps dropout on, with `context.key`. F is then the loss at one random mask, and it is noisier.

Running statistics are in float32, and start at mean 0 and variance 1. After T steps with momentum m, the share of these
starting values is m^T. With few inner steps and flax's default m = 0.99, F is mostly the loss of a network that is
normalized by the starting values. Choose m so that m^T is small.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from metaopt import _trees, base
from metaopt.inner import _stopped


class Model(NamedTuple):
    """A network as two pure functions. An inner loss calls `apply`, and returns the new model state:

        def loss(params, hyperparams, batch, context):
            logits, model_state = model.apply(params, context, batch["x"], train=True)
            return inner.cross_entropy(logits, batch), model_state

        loop = inner.loop(loss, optimizer, init=model.init, with_context=True)

    Attributes:
      init: `(key, hyperparams, data) -> (params, model_state)`, for `inner.loop(..., with_context=True)`.
      apply: `(params, context, *inputs, train=False, use_running_average=None, deterministic=None, **options) ->
        (outputs, model_state)`. `context` is the `base.Context` that a loss gets: dropout uses its key, and BatchNorm
        its model state. `train=True` switches both layers to training. `use_running_average` sets only BatchNorm, and
        `deterministic` only dropout; both default to `not train`. If all three are set to evaluation, the model state
        is returned unchanged.
    """

    init: Callable[[jax.Array, base.HyperParams, base.Data], tuple[base.Params, base.PyTree]]
    apply: Callable[..., tuple[Any, base.PyTree]]


class _Mode(NamedTuple):
    """The switches of one call."""

    train: bool
    use_running_average: bool
    deterministic: bool


def _model(init: Callable, call: Callable, *, adapter: str, allow_stopped_state: bool) -> Model:
    """A `Model` from `call`, `(mode, key, params, model_state, inputs, options) -> (outputs, model_state)`."""

    def apply(params, context, *inputs, train=False, use_running_average=None, deterministic=None, **options):
        switches = [not train if switch is None else switch for switch in (use_running_average, deterministic)]
        mode, state = _Mode(train, *switches), context.model_state
        outputs, new_state = call(mode, context.key, params, state, inputs, options)
        if mode == (False, True, True):
            return outputs, jax.tree.map(lambda leaf: leaf, state)  # another object: see `inner.loop`
        if not allow_stopped_state and any(map(_trees.is_inexact, jax.tree.leaves(state))):
            call_named = lambda args: call(mode, context.key, **args)[1]
            args = {"params": params, "state": state, "inputs": inputs, "options": options}
            _check_not_stopped(_stopped.stopped_paths(call_named, args), adapter)
        return outputs, new_state

    return Model(init, apply)


def _check_not_stopped(stopped: list[tuple[str, str]], adapter: str) -> None:
    if stopped:
        leaves, arguments = (_first_three(paths) for paths in zip(*stopped, strict=True))
        raise ValueError(
            f"The module applies `stop_gradient` to its new model state {leaves}, which depends on {arguments}: a "
            "hypergradient through this state would be wrong. Remove the `stop_gradient` from the module; or, if no "
            f"hypergradient passes through this state, call `{adapter}` with `allow_stopped_state=True`."
        )


def _first_three(paths: Sequence[str]) -> str:
    unique = list(dict.fromkeys(paths))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")


def from_nnx(make: Callable[[Any], Any], *, allow_stopped_state: bool = False) -> Model:
    """Makes a `Model` from a Flax NNX module.

    `nnx.Param` variables are θ; everything else (batch statistics, rng counts) is the model state. Each call
    creates a new module from these, so a traced step does not change the caller's module.
    flax's `nnx.BatchNorm` stops the gradient of its running statistics. Here the layer updates them by flax's own
    formula and keeps the gradient. Other layers that stop the gradient of their state raise, for example
    `nnx.SpectralNorm`, or a subclass of `nnx.BatchNorm` with its own `__call__`.

    Args:
      make: `(nnx.Rngs) -> nnx.Module`, such as `lambda rngs: Net(rngs=rngs)`. It may be called several times.
      allow_stopped_state: whether to accept a module that stops the gradient of its new model state. A hypergradient
        then omits the path through this state. It is correct only if neither the outer loss nor a later inner step
        reads the state, or if nothing differentiates through training.

    Returns:
      A `Model`. Its switches set the module's attributes of the same names, as `module.train()` and `module.eval()` do.
      They also set arguments of the same names if the module's `__call__` has them. `init` can be vmapped.

    Raises:
      TypeError: if `make` is a module and not a function.
      ValueError: at trace time, if the module stops the gradient of its new model state.
    """
    from flax import nnx

    if isinstance(make, nnx.Module) or not callable(make):
        raise TypeError(
            "`from_nnx` takes a function `(rngs) -> module`, such as `lambda rngs: Net(rngs=rngs)`, because each "
            f"training run draws new weights; got {type(make).__name__}."
        )

    def split(module):
        return nnx.split(module, nnx.Param, ...)

    def init(key, hyperparams, data):
        del hyperparams, data
        _, params, rest = split(make(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def call(mode, key, params, state, inputs, options):
        # The graph and its paths are the same for every key; no weight is computed here.
        template = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        _keep_gradient_of_statistics(template)
        definition, params_state, rest_state = split(template)
        nnx.replace_by_pure_dict(params_state, params)
        nnx.replace_by_pure_dict(rest_state, state)
        module = nnx.merge(definition, params_state, rest_state, copy=True)
        nnx.reseed(module, default=key, dropout=key, params=key)
        switches = {"use_running_average": mode.use_running_average, "deterministic": mode.deterministic}
        module.train() if mode.train else module.eval()
        module.set_attributes(raise_if_not_found=False, **switches)
        accepted = inspect.signature(module).parameters
        options = {**{name: switch for name, switch in switches.items() if name in accepted}, **options}
        outputs = module(*inputs, **options)
        _, _, rest = split(module)
        return outputs, nnx.to_pure_dict(rest)

    return _model(init, call, adapter="from_nnx", allow_stopped_state=allow_stopped_state)


def _keep_gradient_of_statistics(module: Any) -> None:
    """Replaces the class of each `nnx.BatchNorm` in the module by one whose running statistics keep their gradient."""
    from flax import nnx

    for _, layer in nnx.iter_modules(module):
        if type(layer).__call__ is nnx.BatchNorm.__call__:
            object.__setattr__(layer, "__class__", _batch_norm(type(layer)))


@functools.cache
def _batch_norm(original: type) -> type:
    from flax import nnx

    class BatchNorm(original):
        """flax's BatchNorm without its `stop_gradient`, which it applies only to the new running statistics."""

        def __call__(self, *inputs, **options):
            definition, params, statistics = nnx.split(self, nnx.Param, ...)

            def call(params, statistics, inputs, options):
                layer = nnx.merge(definition, params, statistics, copy=True)
                outputs = original.__call__(layer, *inputs, **options)
                return outputs, nnx.split(layer, nnx.Param, ...)[2]

            outputs, statistics = _stopped.without_stops(call)(params, statistics, inputs, options)
            nnx.update(self, statistics)
            return outputs

    return BatchNorm


def from_linen(
    module: Any,
    example: Callable[[base.Data], Any] | Any,
    *,
    train_argument: str | Sequence[str] | None = "train",
    allow_stopped_state: bool = False,
) -> Model:
    """Makes a `Model` from a Flax Linen module.

    The collection "params" is θ. All other collections (batch statistics) are the model state, and mutable in training.
    In training, `make_rng("dropout")` gives a new key in each step. There is no other stream of random numbers.

    Args:
      module: a `flax.linen.Module`.
      example: the inputs to initialize with: an array (or a tuple of arrays), or `data -> inputs`.
      train_argument: the keyword of the module's `__call__` that switches to training, a tuple of several keywords, or
        None. The keywords "use_running_average" and "deterministic" get the switch of that name; any other keyword gets
        `train`. A call can set both switches separately with `("use_running_average", "deterministic")`.
      allow_stopped_state: as in `from_nnx`.

    Returns:
      A `Model`.

    Raises:
      TypeError: if `module` is a class; at trace time, if the module has no keyword `train_argument`.
      ValueError: at trace time, if a switch differs from `not train` and `train_argument` does not name it.
      ValueError: at trace time, if the module stops the gradient of its new model state.
    """
    if isinstance(module, type):
        raise TypeError(f"`from_linen` takes a module, such as `{module.__name__}(...)`; got the class.")
    keywords = (train_argument,) if isinstance(train_argument, str) else tuple(train_argument or ())

    def switch_options(mode):
        switches = {"use_running_average": mode.use_running_average, "deterministic": mode.deterministic}
        for name, switch in switches.items():
            if name not in keywords and switch == mode.train:
                raise ValueError(
                    f"`{name}={switch}` with `train={mode.train}` needs a keyword `{name}` in the module's `__call__`; "
                    f"`train_argument` is {train_argument!r}. Give the module that keyword, and name it in "
                    "`train_argument` of `from_linen`."
                )
        return {name: switches.get(name, mode.train) for name in keywords}

    def init(key, hyperparams, data):
        del hyperparams
        inputs = example(data) if callable(example) else example
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        params_key, dropout_key = jax.random.split(key)
        keys = {"params": params_key, "dropout": dropout_key}
        variables = module.init(keys, *inputs, **switch_options(_Mode(False, True, True)))
        return variables["params"], {name: v for name, v in variables.items() if name != "params"}

    def call(mode, key, params, state, inputs, options):
        variables, options = {"params": params, **(state or {})}, {**switch_options(mode), **options}
        if mode == (False, True, True):
            return module.apply(variables, *inputs, **options), state
        mutable = list(state or {})
        outputs, changed = module.apply(variables, *inputs, rngs={"dropout": key}, mutable=mutable, **options)
        return outputs, {**(state or {}), **changed}

    return _model(init, call, adapter="from_linen", allow_stopped_state=allow_stopped_state)
