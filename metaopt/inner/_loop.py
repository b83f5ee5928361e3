"""Makes an `InnerLoop` from a loss and an optax factory, and from it a step, a training run and a `Problem`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _checks, _jaxpr, base, transforms
from metaopt.inner import _im2col, _samplers

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


def _with_products(fn: Callable, choice: bool | None) -> Callable:
    """`fn` with its convolutions as matrix products, if `choice` selects them; None selects them on CPU only."""
    chosen = fn if choice is False else _im2col.im2col(fn, only_on_cpu=choice is None)

    def called(params, hyperparams, batch, context):
        return chosen(params, hyperparams, batch, context)

    return called


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))


def _check_scalar(value: Any, what: str) -> None:
    leaves, structure = jax.tree.flatten(value)
    is_leaf = leaves and jax.tree_util.treedef_is_leaf(structure)
    if not is_leaf or not _is_array(value):
        got = f"type {type(value).__name__}" if is_leaf else structure
        raise ValueError(
            f"The {what} must return a floating-point scalar; got {got}. Return only the loss"
            + (", or a pair (loss, model state) with `with_context=True`." if what == "inner loss" else ".")
        )
    shape, dtype = jnp.shape(leaves[0]), jnp.result_type(leaves[0])
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"The {what} must return a floating-point scalar; got shape {shape} and dtype {dtype}. "
            "Reduce it, for instance with `.mean()`."
        )


def _strong(leaf: Any) -> jax.Array:
    """A leaf as an array without a weak type, so that a step does not change its type. Typed PRNG keys are kept."""
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf, leaf.dtype)


def _check_floating(params: base.Params) -> base.Params:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        instead = "Keep values that are not trained in the loss's closure (`equinox.partition`), or in the model state."
        if not _is_array(leaf):
            problem = f"of type {type(leaf).__name__}"
        elif not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            problem = f"of dtype {jnp.result_type(leaf)}"
            if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                instead = "Train the real and the imaginary parts as two leaves, and combine them in the loss."
        else:
            continue
        raise ValueError(
            f"The parameters must be floating-point arrays; the leaf {jax.tree_util.keystr(path) or 'itself'} is "
            f"{problem}. {instead}"
        )
    return params


def _like(new: base.PyTree, old: base.PyTree) -> base.PyTree:
    """`new` with the floating-point precision of `old`, so that λ in float32 does not widen a state in bfloat16."""

    def cast(new, old):
        both = all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in (new, old))
        return new.astype(old.dtype) if both else new

    return jax.tree.map(cast, new, old) if jax.tree.structure(new) == jax.tree.structure(old) else new


def _check_same_structure(new: base.PyTree, old: base.PyTree, what: str) -> None:
    """Raises ValueError that names the leaf whose shape or dtype changed: a scan needs a carry that keeps both."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"The {what} changed its structure in one step, from {jax.tree.structure(old)} to "
            f"{jax.tree.structure(new)}: a step must not change it."
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
        before, after = (jnp.shape(a), jnp.result_type(a)), (jnp.shape(b), jnp.result_type(b))
        if before != after:
            raise ValueError(
                f"The {what} changed its leaf {jax.tree_util.keystr(path) or 'itself'} in one step, from shape and "
                f"dtype {before} to {after}: a step must not change them."
            )


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
        or `-> ([], model_state)`: `base.Context` has a fresh key, the number of the step and the model state.
      optimizer: `hyperparams -> optax.GradientTransformation`, such as `lambda hp: optax.adamw(hp["lr"])`. Its state
        must keep its structure for every λ. It must not read the value of λ in Python, as some schedules of optax do.
        The schedules of `transforms`, such as `cosine_schedule`, do not. (`optax.inject_hyperparams` freezes λ into the
        state; do not use it here.)
      init: `(key, hyperparams, data) -> params`. It may take θ from λ (MAML), and may ignore its arguments. With
        `with_context`, `-> (params, model_state)`.
      sampler: selects the rows of each step: `inner.full_batch()` (default) or `inner.minibatch(64)`.
      with_context: whether the loss and `init` have their full form.
      zero: the derivative of the optimizer at zero gradients, "drop" or "exact" (see `transforms.differentiable`).
      im2col: whether the convolutions and the pooling of the loss become matrix products and slices (`inner.im2col`).
        None does so if the default backend is a CPU, whose convolutions in loops are slow.

    Returns:
      An `InnerLoop`.

    Raises:
      ValueError: if `loss` is not a function, or `optimizer` is not a factory.
      ValueError: at trace time, if the loss is not a scalar, the parameters are not floating-point, or `init` does not
        return the pair that `with_context` needs.
      ValueError: at trace time, if the optimizer reads the value of a traced hyperparameter.
      ValueError: at trace time, if a step changes the structure, a shape or a dtype of the parameters, of the
        optimizer's state or of the model state.

    >>> import jax, optax
    >>> from metaopt import inner
    >>> quadratic = lambda params, hyperparams, batch: ((params - batch) ** 2).sum()
    >>> train = inner.run(
    ...     inner.loop(quadratic, lambda hp: optax.sgd(hp["rate"]), init=lambda key, hp, data: jax.numpy.zeros(2)),
    ...     num_steps=50,
    ... )
    >>> print(train(jax.random.key(0), {"rate": 0.1}, jax.numpy.array([1.0, 2.0])).params.round(3))
    [1. 2.]
    """
    sample = _samplers.full_batch() if sampler is None else sampler
    if not callable(loss):
        raise ValueError(
            "`loss` must be a function `(params, hyperparams, batch) -> []`, or, with `with_context`, "
            f"`(params, hyperparams, batch, context) -> []`; got {loss!r}."
        )
    if not callable(optimizer):
        raise ValueError(f"{_FACTORY}; got {type(optimizer).__name__} itself.")

    def transform(hyperparams):
        try:
            with _checks.explained_schedules("optimizer"):
                optimizer_ = optimizer(hyperparams)
        except TypeError as error:
            raise ValueError(f"{_FACTORY}; called with λ it raised: {error}") from error
        if not (hasattr(optimizer_, "init") and hasattr(optimizer_, "update")):
            raise ValueError(f"{_FACTORY}; it returned {type(optimizer_).__name__}.")
        return transforms.differentiable(optimizer_, zero=zero)

    def init_state(key, hyperparams, data):
        init_key, key = jax.random.split(key)
        params, model_state = init(init_key, hyperparams, data), None
        if with_context:
            if type(params) not in (tuple, list) or len(params) != 2:
                raise ValueError(
                    "With `with_context=True`, `init` must return a pair (params, model state), where the model state "
                    f"may be None; got {type(params).__name__}."
                )
            params, model_state = params
        params, model_state = _check_floating(params), jax.tree.map(_strong, model_state)
        params = jax.tree.map(_strong, params)
        with _checks.explained_schedules("optimizer"):
            opt_state = jax.tree.map(_strong, transform(hyperparams).init(params))
        return LoopState(params, opt_state, model_state, key, jnp.zeros([], jnp.int32))

    def context(state):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step)
        return base.Context(key, state.step, state.model_state)

    def batch(state, data):
        return sample(jax.random.fold_in(state.key, 1), state.step, data)

    def full_loss(params, hyperparams, batch, context):
        if not with_context:
            value = loss(params, hyperparams, batch)
            _check_scalar(value, "inner loss")
            return value, context.model_state
        value = loss(params, hyperparams, batch, context)
        if isinstance(value, tuple) and len(value) != 2:
            raise ValueError(f"The inner loss must return [] or ([], model_state); got {len(value)} values.")
        value, model_state = value if isinstance(value, tuple) else (value, context.model_state)
        _check_scalar(value, "inner loss")
        return value, model_state

    def update(state, grads, model_state, hyperparams):
        with _checks.explained_schedules("optimizer"):
            updates, opt_state = transform(hyperparams).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        opt_state, model_state = _like(opt_state, state.opt_state), _like(model_state, state.model_state)
        _check_same_structure(opt_state, state.opt_state, "optimizer's state")
        _check_same_structure(params, state.params, "parameters")
        _check_same_structure(model_state, state.model_state, "model state")
        return LoopState(params, opt_state, model_state, state.key, state.step + 1)

    loss_fn = _with_products(full_loss, im2col)
    return base.InnerLoop(init_state, batch, loss_fn, update, lambda state: state.params, context)


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
    grads, model_state = grad(loop.loss, has_aux=True)(loop.params(state), hyperparams, batch, context)
    return loop.update(state, grads, model_state, hyperparams)


_NO_DERIVATIVE = (
    "`inner.run` has no derivative: it trains without storing what a derivative needs, so that the gradient of what it "
    "trained would be 0 and wrong. Use `hypergrad.unroll(loop, num_steps=...)` to differentiate through training. If "
    "the result is a constant here, pass `jax.lax.stop_gradient` of the hyperparameters and of the data to it."
)


def run(loop: base.InnerLoop, num_steps: int | None = None, *, trace_fn: Callable | None = None) -> Callable:
    """Trains without differentiation, for evaluation, other numbers of steps and baselines.

    The result has no derivative: differentiation raises instead of returning 0. For a derivative, use
    `hypergrad.unroll`. Within a differentiated function the result may go into metrics or through
    `jax.lax.stop_gradient`. (Forward mode cannot see a later `stop_gradient`; stop the gradient of the arguments
    there.) Memory does not depend on the number of steps.

    Args:
      loop: the inner loop.
      num_steps: the number of steps, at least 0. None if each call gives it; it may then be traced.
      trace_fn: `(state) -> PyTree`, evaluated after every step; needs a static `num_steps`.

    Returns:
      `(key, hyperparams, data) -> InnerState`, or, with `trace_fn`, `-> (InnerState, trace)` whose leaves have a
      leading axis of `num_steps`. With `num_steps=None`, `(key, hyperparams, data, num_steps)`.

    Raises:
      ValueError: if `num_steps < 0`, or `trace_fn` is given without `num_steps`.
      ValueError: at trace time, if the result is differentiated.
    """
    _checks.check_integer("num_steps", num_steps, 0, optional=True)
    if num_steps is None and trace_fn is not None:
        raise ValueError("`trace_fn` needs `num_steps`, the length of the trace: pass it to `run`.")

    def train(key, hyperparams, data, num_steps=num_steps):
        if num_steps is None:
            raise ValueError("`num_steps` must be passed to `run` or to the returned function; got None.")
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
            look = trace_fn  # the name tells the type checker that it is not None

            def traced(state, _):
                state = next_state(state)
                return state, look(state)

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
        `(params, hyperparams, batch, context) -> []`, where the context is that of the trained state.
      outer_batch: `(key, task) -> batch`; by default all of `task.valid`.
      with_context: whether the outer loss has its full form.
      im2col: as in `inner.loop`, for the outer loss.

    Returns:
      A `Problem`.

    Raises:
      ValueError: at trace time, if the outer loss is not a scalar.
    """

    def full_outer_loss(params, hyperparams, batch, context):
        value = outer_loss(params, hyperparams, batch, *([context] if with_context else []))
        _check_scalar(value, "outer loss")
        return value

    return base.Problem(loop, _with_products(full_outer_loss, im2col), outer_batch or (lambda key, task: task.valid))
