"""The problem of an adaptation, in the order of training: start, inner loss, per-step values of λ, outer loss.

Each function takes the `Spec` first. `make_problem` binds them to a `base.Problem`.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _jaxpr, base, inner, transforms
from metaopt.few_shot import _adaptation_checks, _leaves
from metaopt.few_shot._phase import traced_after_steps


class Spec(NamedTuple):
    """The arguments of `adaptation` that define its problem, with losses in their full form.

    `rule_kind` is the kind of the hypergradient of the `rule`, or None without one. `log_constant` warns of a model
    state that the loss does not return.
    """

    loss: Callable
    outer_loss: Callable
    init: Callable | None
    adapt: re.Pattern[str]
    optimizer: Callable[[Any], optax.GradientTransformation]
    rate: Any
    rates: str
    rates_per_step: bool
    leaves_per_step: re.Pattern[str] | None
    num_steps: int
    proximal: float
    sampler: inner.Sampler | None
    keep_support: bool
    with_context: bool
    rule_kind: str | None
    log_constant: Callable


class Carried(NamedTuple):
    """The model state of an adaptation's inner loop.

    Attributes:
      own: the model's own state.
      made: the leaves of the model that `init` made and that do not adapt, with None in place of the others.
      support: the support set's "x" and "mask", if they are kept.
      once: the parts of ℓ that no step changes; empty if every step computes them.
    """

    own: base.PyTree
    made: base.PyTree
    support: dict[str, jax.Array] | None
    once: Sequence[jax.Array] = ()


# ---- The start -------------------------------------------------------------------------------------------------------


def start(spec: Spec, key: jax.Array, hyperparams: base.HyperParams, data: Any) -> tuple[base.Params, Carried]:
    """Returns the leaves of θ_0 that adapt, and the model state."""
    _adaptation_checks.check_one_task(data)
    meta_params, model_state = hyperparams["init"], None
    with traced_after_steps(False):
        params = meta_params if spec.init is None else spec.init(key, hyperparams, data)
    if spec.with_context and spec.init is not None:
        if type(params) not in (tuple, list) or len(params) != 2:  # an array of two entries would be unpacked
            raise ValueError(
                "With `with_context=True`, `init` must return a pair (params, model state); the model state may be "
                f"None. Got {type(params).__name__}."
            )
        params, model_state = params
    # A leaf that `init` only passed on is the same object as in λ["init"].
    meta_leaves = _leaves.by_path(meta_params)
    is_made = lambda path, x: not _leaves.matches(spec.adapt, path) and x is not meta_leaves.get(path)
    made = jax.tree_util.tree_map_with_path(lambda path, x: x if is_made(path, x) else None, params)
    _adaptation_checks.check_leaves(spec, params, made, meta_leaves)
    # `hyperparams` of an `Adaptation` evaluates only the shapes of θ, and passes no data if `init` reads none.
    support = {name: data[name] for name in ("x", "mask")} if spec.keep_support and data is not None else None
    return _leaves.select(spec.adapt, params), Carried(model_state, made, support)


def start_with_constants(spec: Spec, start_fn: Callable, key: jax.Array, hyperparams: base.HyperParams, data: Any):
    """Like `start`; also computes the parts of ℓ that no step changes."""
    params, carried = start_fn(key, hyperparams, data)
    args = (params, carried.made, hyperparams, data, base.Context(key, jnp.int32(0), carried.own))
    halves = _halves(spec, *args) if spec.sampler is None else None  # with a sampler, steps see fewer rows than `data`
    constants = () if halves is None else inner.im2col(halves.once, only_on_cpu=True)(args)
    return params, carried._replace(once=tuple(constants))


# ---- The inner loss --------------------------------------------------------------------------------------------------


def inner_loss(spec: Spec, params, hyperparams, batch, context: base.Context) -> tuple[jax.Array, Carried]:
    """ℓ, and the new model state. Uses the parts that `start_with_constants` computed, if there are any."""
    carried, own = context.model_state, context.model_state.own
    args = (params, carried.made, hyperparams, batch, context._replace(model_state=own))
    halves = _halves(spec, *args) if carried.once else None
    types = lambda arrays: [(x.shape, x.dtype) for x in arrays]
    if halves is not None and types(halves.kept) == types(carried.once):
        value, own = halves.rest(args, carried.once)
    else:
        value, own = _model_loss(spec, *args)
    if spec.proximal:
        difference = optax.tree.sub(params, _leaves.select(spec.adapt, hyperparams["init"]))
        value = value + spec.proximal / 2 * optax.tree.norm(difference, squared=True)
    # A loss may return the model state as it is. The loop takes only the same object for that.
    is_same = all(new is old for new, old in zip(jax.tree.leaves(own), jax.tree.leaves(carried.own), strict=False))
    return value, carried if is_same else carried._replace(own=own)


def _model_loss(spec: Spec, params, made, hyperparams, batch, context: base.Context) -> tuple[jax.Array, base.PyTree]:
    with traced_after_steps(False):  # ℓ sees a support set, even if it is traced within another adaptation's f
        value = spec.loss(_leaves.fill(params, made, hyperparams["init"]), hyperparams, batch, context)
    if isinstance(value, tuple):
        return value
    spec.log_constant(context.model_state, is_returned=False)
    return value, context.model_state


def _halves(spec: Spec, params, made, hyperparams, batch, context: base.Context) -> _jaxpr.Halves | None:
    """Splits `_model_loss` into the part that no step changes and the rest; None if it cannot be traced."""

    def changes_per_step(path, _):
        argument, (name, _, leaf) = path[0].idx, _leaves.name(path[1:]).partition("/")
        if argument == 2:  # λ
            per_step = spec.leaves_per_step is not None and spec.leaves_per_step.search(leaf)
            return spec.rates_per_step if name == "rate" else name == "init" and bool(per_step)
        return argument not in (1, 3)  # `made` and `batch`

    with contextlib.suppress(Exception):  # the loss branches on a traced value, or fails: ℓ raises the error later
        # The types are not weak, as in the state of the loop. So every step is split like the first one.
        like = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
        args = (like(params), like(made), hyperparams, batch, like(context))
        model_loss = lambda *args: _model_loss(spec, *args)
        return _jaxpr.split(model_loss, args, jax.tree_util.tree_map_with_path(changes_per_step, args))
    return None


# ---- Values of λ for each step ---------------------------------------------------------------------------------------


def at_step(spec: Spec, hyperparams: base.HyperParams, step: Any) -> base.HyperParams:
    """λ with the rates and leaves of one step; later steps use the last values."""
    step = jnp.clip(step, 0, spec.num_steps - 1)
    if spec.rates_per_step:
        hyperparams = {**hyperparams, "rate": jax.tree.map(lambda x: x[step], hyperparams["rate"])}
    return leaves_at(spec, hyperparams, step)


def leaves_at(spec: Spec, hyperparams: base.HyperParams, step: Any) -> base.HyperParams:
    """λ with the `leaves_per_step` of one step."""
    if spec.leaves_per_step is None:
        return hyperparams
    leaves = _leaves.by_path(hyperparams["init"])
    shapes = {path: jnp.shape(x) for path, x in leaves.items() if _leaves.matches(spec.leaves_per_step, path)}
    wrong = {_leaves.name(path): shape for path, shape in shapes.items() if shape[:1] != (spec.num_steps,)}
    if not shapes or wrong:
        raise ValueError(
            f'`leaves_per_step` must find leaves in λ["init"] with a leading axis of `num_steps` = {spec.num_steps}; '
            f"{spec.leaves_per_step.pattern!r} finds {wrong or 'none'}."
        )
    pick = lambda path, x: x[step] if path in shapes else x
    return {**hyperparams, "init": jax.tree_util.tree_map_with_path(pick, hyperparams["init"])}


# ---- The outer loss, and the whole problem ---------------------------------------------------------------------------


def params_after(spec: Spec, params: base.Params, carried: Carried, meta_params: base.PyTree) -> base.Params:
    """Returns the parameters that f and predictions see: all leaves, and the support set if it is kept."""
    params = _leaves.fill(params, carried.made, meta_params)
    return {**params, "support": carried.support} if spec.keep_support else params


def outer_loss(spec: Spec, params, hyperparams, batch, context: base.Context) -> jax.Array:
    """f, the outer loss, of the leaves that adapted."""
    params = params_after(spec, params, context.model_state, hyperparams["init"])
    # Plain pre-training, without inner steps and without `init`, sees its own batch and no query set.
    with traced_after_steps(spec.num_steps > 0 or spec.init is not None):
        value = spec.outer_loss(params, hyperparams, batch, context._replace(model_state=context.model_state.own))
    return value[0] if isinstance(value, tuple) else value


def make_problem(spec: Spec, *, constants_once: bool) -> base.Problem:
    """The problem in λ = {"init": ..., "rate": ...}; optionally its `init` computes the parts that no step changes."""

    def begin(key, hyperparams, data):
        _adaptation_checks.check_hyperparams(hyperparams, learned_rates=spec.rates != "fixed")
        return start(spec, key, hyperparams, data)

    start_fn = begin if spec.init is None else inner.im2col(begin, only_on_cpu=True)
    with_constants = lambda key, hyperparams, data: start_with_constants(spec, start_fn, key, hyperparams, data)
    per_leaf = spec.rates in ("leaf", "entry")
    optimizer = transforms.per_parameter(spec.optimizer) if per_leaf else spec.optimizer
    loop = inner.loop(
        lambda *args: inner_loss(spec, *args),
        lambda hyperparams: optimizer(spec.rate if spec.rates == "fixed" else hyperparams["rate"]),
        init=with_constants if constants_once else start_fn,
        sampler=spec.sampler,
        with_context=True,
    )

    def update(state, grads, model_state, hyperparams):
        """Keeps the part that no step changes, so that reverse mode stores it once and not at every step."""
        same = loop.context(state).model_state._replace(own=model_state.own)
        return loop.update(state, grads, same, hyperparams)

    f = lambda *args: outer_loss(spec, *args)
    problem = inner.problem(loop._replace(update=update), f, with_context=True)
    if not spec.rates_per_step and spec.leaves_per_step is None:
        return problem
    return base.reparametrized(problem, lambda hyperparams, step: at_step(spec, hyperparams, step))
