"""Makes an `InnerLoop` from a loss and an optax factory, and from it a step, a training run and a `Problem`."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _checks, _explained, _jaxpr, _schedule_free, _trees, base, transforms
from metaopt.inner import _cpu, _samplers

_FACTORY = (
    "`optimizer` must be a factory `hyperparams -> optax.GradientTransformation`, such as "
    "`lambda hp: optax.adam(hp['lr'])`"
)


class LoopState(NamedTuple):
    """The state that one training run carries from step to step.

    Attributes:
      params: θ.
      opt_state: the optax state.
      model_state: batch statistics and similar values, or None.
      key: the run's key; each step's keys are folded from it.
      step: [] int32, the number of steps taken.
    """

    params: base.Params
    opt_state: optax.OptState
    model_state: base.PyTree
    key: jax.Array
    step: jax.Array


_LOGGER = logging.getLogger("metaopt")


def _with_products(loss: Callable, im2col: bool | None, owner: str) -> Callable:
    """The loss with its convolutions as matrix products, if `im2col` selects them; None selects them on CPU only."""
    rewritten = loss if im2col is False else _cpu.rewrite(loss, only_on_cpu=im2col is None, log=_logged_once(owner))

    def call(params, hyperparams, batch, context):
        return rewritten(params, hyperparams, batch, context)

    return call


def _logged_once(owner: str) -> Callable[[list[str]], None]:
    """A function that logs the convolutions of the first program that has some, as one line."""
    logged = []

    def log(convolutions):
        if convolutions and not logged:
            logged.append(True)
            _LOGGER.info(
                "%s computes the convolutions of its loss in forms that are fast on CPU (images * kernels): %s. Use "
                "`im2col=False` to keep the convolutions of XLA.",
                owner,
                ", ".join(convolutions),
            )

    return log


def _check_scalar(value: Any, name: str) -> None:
    if jax.tree_util.all_leaves([value]) and _is_array(value):
        got = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
        if jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return
    else:
        got = f"type {type(value).__name__}"
    raise ValueError(
        f"The {name} must return a floating-point scalar; got {got}. Reduce an array, for instance with `.mean()`. "
        "With `with_context=True`, the inner loss may return a pair (loss, model state)."
    )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))


def _check_floating(params: base.Params) -> None:
    """Raises ValueError for parameters that cannot be trained; complex ones would be updated in a wrong direction."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not _is_array(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            kind = f"of dtype {jnp.result_type(leaf)}" if _is_array(leaf) else f"of type {type(leaf).__name__}"
            raise ValueError(
                f"The parameters must be floating-point arrays; the leaf {jax.tree_util.keystr(path) or 'itself'} is "
                f"{kind}. Keep values that are not trained in the loss's closure (`equinox.partition`), or in the "
                "model state. Train the real and the imaginary part of a complex number as two leaves."
            )


def _like(new: base.PyTree, old: base.PyTree) -> base.PyTree:
    """`new` with the floating-point precision of `old`, so that λ in float32 does not widen a state in bfloat16."""

    def cast(new, old):
        both = all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in (new, old))
        return new.astype(old.dtype) if both else new

    return jax.tree.map(cast, new, old) if jax.tree.structure(new) == jax.tree.structure(old) else new


def _transform(optimizer: Callable, zero: str, hyperparams: base.HyperParams) -> optax.GradientTransformationExtraArgs:
    """The optimizer for one λ, with finite derivatives at zero gradients."""
    try:
        with _explained.schedules("optimizer"):
            return transforms.differentiable(optimizer(hyperparams), zero=zero)
    except TypeError as error:
        error.add_note(f"{_FACTORY}.")
        raise


def _check_arguments(name: str, loss: Callable, with_context: bool) -> None:
    """Raises ValueError if a loss takes a context and would not get one, or the reverse."""
    try:
        arguments = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return
    kinds = [argument.kind for argument in arguments]
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return
    if with_context and len(positional) == 3:
        raise ValueError(
            f"`{name}` takes three arguments, but with `with_context=True` it gets four: (params, hyperparams, batch, "
            "context). Add the context, or leave out `with_context=True`."
        )
    if not with_context and sum(argument.default is argument.empty for argument in positional) == 4:
        raise ValueError(
            f"`{name}` takes four arguments, but it gets three: (params, hyperparams, batch). If the fourth one is the "
            "context, pass `with_context=True`."
        )


def _init(
    init: Callable,
    transform: Callable,
    with_context: bool,
    key: jax.Array,
    hyperparams: base.HyperParams,
    data: base.Data,
) -> LoopState:
    """The state before the first step."""
    init_key, key = jax.random.split(key)
    params, model_state = init(init_key, hyperparams, data), None
    if with_context:
        if type(params) not in (tuple, list) or len(params) != 2:  # an array of two entries would be unpacked
            raise ValueError(
                "With `with_context=True`, `init` must return a pair (params, model state), where the model state "
                f"may be None; got {type(params).__name__}."
            )
        params, model_state = params
    _check_floating(params)
    params, model_state = _trees.strong((params, model_state))
    with _explained.schedules("optimizer"), _explained.structures(params):
        opt_state = _trees.strong(transform(hyperparams).init(params))
    _schedule_free.check_is_last(opt_state)
    return LoopState(params, opt_state, model_state, key, jnp.zeros([], jnp.int32))


def _loss(
    loss: Callable,
    with_context: bool,
    log_constant: Callable,
    params: base.Params,
    hyperparams: base.HyperParams,
    batch: base.Batch,
    context: base.Context,
) -> tuple[jax.Array, base.PyTree]:
    """ℓ and the model state after the step."""
    try:
        value = loss(params, hyperparams, batch, *([context] if with_context else []))
    except _explained.NEEDS_A_VALUE as error:
        error.add_note(
            "The inner loss reads the value of a traced array (in `if`, `float`, `int` or NumPy). JAX traces λ, so "
            "it has no value: use `jnp.where` instead of `if`. flax's dropout compares its rate with 0, so the rate "
            "cannot be part of λ; Gaussian noise of the same variance can take its place (`docs/how_to/flax_more.md`)."
        )
        raise
    if with_context and isinstance(value, tuple):
        value, model_state = value
        before = None if context is None else context.model_state
        pairs = zip(jax.tree.leaves(model_state), jax.tree.leaves(before), strict=False)
        # The object itself is returned on purpose.
        if model_state is not before and all(new is old for new, old in pairs):
            log_constant(model_state, is_returned=True)
    else:
        model_state = context.model_state
        log_constant(model_state, is_returned=False)
    _check_scalar(value, "inner loss")
    return value, model_state


def _update(
    transform: Callable,
    state: LoopState,
    grads: base.Params,
    model_state: base.PyTree,
    hyperparams: base.HyperParams,
) -> LoopState:
    """One step of the optimizer."""
    with _explained.schedules("optimizer"):
        optimizer = transform(hyperparams)
        opt_state = state.opt_state
        if _schedule_free.keeps_hyperparams(opt_state):
            opt_state = _schedule_free.refreshed(opt_state, optimizer.init(state.params))
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    opt_state, model_state = _like(opt_state, state.opt_state), _like(model_state, state.model_state)
    new_state = LoopState(params, opt_state, model_state, state.key, state.step + 1)
    return new_state


def _context(state: LoopState) -> base.Context:
    """The context of the next step's loss."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step)
    return base.Context(key, state.step, state.model_state)


def _params(state: LoopState) -> base.Params:
    """θ, or where a schedule-free optimizer trains it, the average that is to be evaluated."""
    params = state.params
    for average in _schedule_free.states(state.opt_state):
        params = _schedule_free.average(average, params)
    return params


def _batch(sample: _samplers.Sampler, state: LoopState, data: base.Data) -> base.Batch:
    """The batch of the next step."""
    return sample(jax.random.fold_in(state.key, 1), state.step, data)


def loop(
    loss: Callable,
    optimizer: Callable[[base.HyperParams], optax.GradientTransformation],
    *,
    init: Callable,
    sampler: _samplers.Sampler | None = None,
    with_context: bool = False,
    zero: str = "drop",
    im2col: bool | None = None,
) -> base.InnerLoop:
    """Makes an `InnerLoop` from a loss and an optax factory.

    One step is u, s = optimizer(λ).update(∇θ ℓ(θ, λ), s, θ); θ ← θ + u. It is differentiable in everything, with finite
    derivatives where gradients are exactly zero (`transforms.differentiable`).

    Args:
      loss: ℓ, `(params, hyperparams, batch) -> []`. With `with_context`, `(params, hyperparams, batch, context) -> []`
        or `-> ([], model_state)`. The context is a `base.Context`: a fresh key, the number of the step and the model
        state. If the loss returns no model state, the state stays constant. If this constant state has floating-point
        leaves, such as running statistics, the loop logs a warning.
      optimizer: `hyperparams -> optax.GradientTransformation`, such as `lambda hp: optax.adamw(hp["lr"])`. Its state
        must keep its structure for every λ. It must not read the value of λ in Python, as some schedules of optax do.
        The schedules of `transforms`, such as `transforms.cosine_schedule`, do not. `optax.inject_hyperparams` is not
        needed; each step replaces the values in its state by those of λ. With `optax.contrib.schedule_free`, gradients
        are taken at the training parameters, and the outer loss and `loop.params` get the evaluation parameters. No
        other transform may change its updates, so it must be the last one of an `optax.chain`.
      init: `(key, hyperparams, data) -> params`. It may take θ from λ (MAML), and may ignore its arguments. With
        `with_context`, `-> (params, model_state)`.
      sampler: selects the rows of each step, such as `inner.minibatch(64)`. By default each step gets all of the data.
      with_context: whether the loss takes a context and `init` returns a model state.
      zero: the derivative of the optimizer at zero gradients, "drop" or "exact" (see `transforms.differentiable`).
      im2col: whether to compute the convolutions and the pooling of the loss by `inner.im2col`. None does so only if
        the default backend is a CPU, where XLA's convolutions inside loops are slow. The first program with such
        convolutions logs a line with their shapes (logger "metaopt", level INFO).

    Returns:
      An `InnerLoop`.

    Raises:
      ValueError: at trace time, if the loss is not a scalar, the parameters are not floating-point, or `init` does not
        return the pair that `with_context` needs.
      ValueError: at trace time, if the optimizer reads the value of a traced hyperparameter.

    >>> import jax, optax
    >>> from metaopt import inner
    >>> quadratic = lambda params, hyperparams, batch: ((params - batch) ** 2).sum()
    >>> train = inner.run(
    ...     inner.loop(
    ...         quadratic,
    ...         lambda hp: optax.sgd(hp["rate"]),
    ...         init=lambda key, hp, data: jax.numpy.zeros(2),
    ...     ),
    ...     num_steps=50,
    ... )
    >>> print(
    ...     train(
    ...         jax.random.key(0), {"rate": 0.1}, jax.numpy.array([1.0, 2.0])
    ...     ).params.round(3)
    ... )
    [1. 2.]
    """
    _check_arguments("loss", loss, with_context)
    transform = functools.partial(_transform, optimizer, zero)
    loss_fn = functools.partial(_loss, loss, with_context, _checks.constant_state_logged_once())
    return base.InnerLoop(
        init=functools.partial(_init, init, transform, with_context),
        batch=functools.partial(_batch, _samplers.full_batch() if sampler is None else sampler),
        loss=_with_products(loss_fn, im2col, "`inner.loop`"),
        update=functools.partial(_update, transform),
        params=_params,
        context=_context,
        iterate=lambda state: state.params,
    )


def step(
    loop: base.InnerLoop,
    state: base.InnerState,
    hyperparams: base.HyperParams,
    data: base.Data,
    *,
    grad: Callable = jax.grad,
) -> base.InnerState:
    """Takes one inner step: computes the batch and ∇θ ℓ on it, and updates θ.

    Args:
      loop: the inner loop.
      state: the state before the step.
      hyperparams: λ.
      data: the task's training data.
      grad: the function that takes the gradient, called as `jax.grad(loss, has_aux=True)`. Rules that need another
        gradient (a stopped one for first-order MAML, a penalized one, mixed mode) replace only this function.

    Returns:
      The state after the step.
    """
    batch, context = loop.batch(state, data), loop.context(state)
    grads, model_state = grad(loop.loss, has_aux=True)(loop.iterate(state), hyperparams, batch, context)
    return loop.update(state, grads, model_state, hyperparams)


_NO_DERIVATIVE = (
    "`inner.run` cannot be differentiated: it does not store the values that a derivative needs, and a gradient of 0 "
    "would be wrong. Use `hypergrad.unroll(loop, num_steps=...)` to differentiate through training. If "
    "the result is a constant here, pass `jax.lax.stop_gradient` of the hyperparameters and of the data to it."
)


def run(loop: base.InnerLoop, num_steps: int | None = None, *, trace_fn: Callable | None = None) -> Callable:
    """Makes a function that trains without differentiation, for evaluation and baselines.

    The trained state has no derivative: differentiating it raises an error instead of returning 0. For a derivative,
    use `hypergrad.unroll`. Within a differentiated function the result may go into metrics or through
    `jax.lax.stop_gradient`. (Forward mode raises before it reaches a later `stop_gradient`. In forward mode, stop the
    gradient of the arguments instead.) Memory does not depend on the number of steps.

    Args:
      loop: the inner loop.
      num_steps: the number of steps, at least 0. None if each call gives it; it may then be traced.
      trace_fn: `(state) -> PyTree`, evaluated after every step; needs a static `num_steps`.

    Returns:
      `(key, hyperparams, data) -> InnerState`, or, with `trace_fn`, `-> (InnerState, trace)` whose leaves have a
      leading axis of `num_steps`. With `num_steps=None`, `(key, hyperparams, data, num_steps)`.

    Raises:
      ValueError: if `num_steps < 0`.
      ValueError: at trace time, if the result is differentiated.
    """
    _checks.check_integer("num_steps", num_steps, 0, optional=True)

    def train(key, hyperparams, data, num_steps=num_steps):
        inputs = key, hyperparams, data
        # From here on these are constants, so that a differentiated caller neither computes nor stores tangents.
        key, hyperparams, data = jax.lax.stop_gradient(inputs)
        start = loop.init(key, hyperparams, data)  # `init` may close over values that the caller differentiates
        state = jax.lax.stop_gradient(start)

        def next_state(state):
            return step(loop, state, hyperparams, data)

        if trace_fn is None:
            result = jax.lax.fori_loop(0, num_steps, lambda _, s: next_state(s), state)
        else:

            def traced(state, _, trace_fn=trace_fn):
                state = next_state(state)
                return state, trace_fn(state)

            result = jax.lax.scan(traced, state, length=num_steps)
        return _jaxpr.refuse_derivative(result, (inputs, start), _NO_DERIVATIVE)

    return train


def problem(
    loop: base.InnerLoop,
    outer_loss: Callable,
    *,
    outer_batch: base.OuterBatchFn | None = None,
    with_context: bool = False,
    im2col: bool | None = None,
) -> base.Problem:
    """Makes a `Problem` from an inner loop and the outer loss that judges its result.

    Args:
      loop: trains θ.
      outer_loss: f, `(params, hyperparams, batch) -> []`, or with `with_context`
        `(params, hyperparams, batch, context) -> []`, where the context is `loop.context` of the trained state.
      outer_batch: `(key, task) -> batch`; by default all of `task.valid`.
      with_context: whether the outer loss takes a context.
      im2col: as in `inner.loop`, for the outer loss.

    Returns:
      A `Problem`.

    Raises:
      ValueError: if the number of arguments of the outer loss does not fit `with_context`; at trace time, if the
        outer loss is not a scalar.
    """
    _check_arguments("outer_loss", outer_loss, with_context)

    def full_outer_loss(params, hyperparams, batch, context):
        value = outer_loss(params, hyperparams, batch, *([context] if with_context else []))
        _check_scalar(value, "outer loss")
        return value

    return base.Problem(
        loop, _with_products(full_outer_loss, im2col, "`inner.problem`"), outer_batch or (lambda key, task: task.valid)
    )
