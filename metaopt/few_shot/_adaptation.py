"""Adaptation: a few inner steps from a shared start to one task. All MAML variants are settings of one specification.

    θ_0 = init(λ, support),    θ_{t+1} = θ_t − α_t ∇_θ ℓ(θ_t, λ; support),    F(λ) = Σ_t w_t f(θ_t, λ; query)

λ = {"init": the meta-parameters, "rate": α if it is learned, ...}. θ holds the leaves of the model that adapt, and None
in place of the others, which are read from λ["init"]. Computations that no step changes are done once for the support
set, when training starts. If only the head adapts, these are the features z = body(λ, support):

    ℓ(θ, λ; support) = head(θ, λ, z),    dF/dλ = ∂F/∂λ + (∂z/∂λ)ᵀ ∂F/∂z,

so that T steps cost T forward and backward passes through the head and one through the body. The constant part is found
in the traced loss: all matrix products and convolutions that do not depend on an adapting leaf, in any layer.
"""

import contextlib
import contextvars
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, _jaxpr, base, hypergrad, inner, transforms
from metaopt.few_shot import _adaptation_checks
from metaopt.few_shot._evaluate import AdaptFn

RATES = ("fixed", "one", "leaf", "entry")
LATE = np.iinfo(np.int32).max  # an outer step after every schedule
_AFTER_STEPS = contextvars.ContextVar("_AFTER_STEPS", default=False)


def after_steps() -> bool:
    """Returns whether the traced code is f after inner steps, or a prediction; both see a query set.

    A network's arguments do not contain this information. A network that needs the support set there can raise an error
    if it is missing.
    """
    return _AFTER_STEPS.get()


@contextlib.contextmanager
def _traced_after_steps(value: bool) -> Iterator[None]:
    token = _AFTER_STEPS.set(value)
    try:
        yield
    finally:
        _AFTER_STEPS.reset(token)


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


class Adaptation(NamedTuple):
    """The result of `adaptation`.

    Attributes:
      problem: the problem in λ = {"init": ..., "rate": ...}.
      estimator: estimates dF/dλ for one task; with schedules, it is the estimator after their end. For a batch of tasks
        use `hypergrad.over_tasks(a.estimator)`: otherwise all of them would be treated as one task.
      estimator_at: `step -> Estimator`, the estimator at an outer step. To follow the schedules, use
        `training.learner(lambda step: hypergrad.over_tasks(a.estimator_at(step)), optimizer)`.
      hyperparams: `(meta_params, data=None) -> λ`, the starting point. `data` is one task's support set. It is needed
        if `init` reads it and each leaf or entry of θ has a rate.
      params: `(state, hyperparams) -> ` all leaves of the model as f sees them after a state's steps, adapted or not.
      test_steps: steps at test.
      unrolling: the problem with an `init` that also computes the parts that no step changes. It is correct only if λ
        and the support set are the same at every step, and derivatives go through `init`. `estimator` and `adapted`
        satisfy this.
    """

    problem: base.Problem
    estimator: base.Estimator
    estimator_at: Callable[[Any], base.Estimator]
    hyperparams: Callable[..., dict[str, Any]]
    params: Callable[[base.InnerState, base.HyperParams], base.Params]
    test_steps: int
    unrolling: base.Problem


def adaptation(
    loss: Callable,
    *,
    outer_loss: Callable | None = None,
    init: Callable | None = None,
    extra: Mapping[str, base.PyTree] | None = None,
    adapt: str = "",
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.sgd,
    rate: float = 0.01,
    rates: str = "fixed",
    rates_per_step: bool = False,
    leaves_per_step: str | None = None,
    num_steps: int = 1,
    test_steps: int | None = None,
    order: str | int = "second",
    outer: str | Sequence[float] | Callable = "last",
    proximal: float = 0.0,
    rule: Callable[[base.Problem], base.Estimator] | None = None,
    remat: str = "none",
    sampler: inner.Sampler | None = None,
    keep_support: bool = False,
    with_context: bool = False,
) -> Adaptation:
    """Specifies how a model adapts to a task; `maml`, `anil`, `cavia` and the others are settings of it.

    Args:
      loss: ℓ, `(params, hyperparams, batch) -> []` on the support set, where `params` are all leaves of the model. With
        `with_context`, `(params, hyperparams, batch, context) -> []` or `-> ([], model_state)`.
      outer_loss: f on the query set, with the same arguments, `-> []`. The default is `loss` (without its model state).
      init: `(key, hyperparams, data) -> params`: θ_0 and the leaves that do not adapt. The default is λ["init"]. It may
        add or change leaves, such as a head computed from the support set. Leaves that it makes and that do not
        adapt stay constant. With `with_context`, `-> (params, model_state)`.
      extra: additional leaves of λ, by name, with their initial values; the losses and `init` can read them.
      adapt: selects the leaves that adapt: a regular expression that is searched for in paths like "layers/0/bias".
        Leaves that do not adapt are in λ["init"], and only the outer step changes them.
      optimizer: `rate -> optax.GradientTransformation`.
      rate: α, or its initial value if it is learned. A fixed rate can be anything that the optimizer takes, such as a
        schedule.
      rates: "fixed", or learned: "one" for all, one for each "leaf", or one for each "entry" (Meta-SGD).
      rates_per_step: a learned rate has a value for each of the T steps, as its leading axis (LSLR: with "leaf"). Later
        steps use the last value.
      leaves_per_step: paths of leaves in λ["init"] that do not adapt and have a value for each of the T steps, as their
        leading axis. Scales and shifts of a normalization are an example. The loss sees the value of the current step,
        and f the value of the last step.
      num_steps: T, in training; at least 0. With 0, λ["init"] is trained on the query sets without adaptation.
      test_steps: steps at test, T by default.
      order: "second"; "first" (∇ℓ is held constant: no second derivatives); or a number n, for "first" in the first n
        outer steps and "second" afterwards.
      outer: the weights w_1..w_T, as for `hypergrad.unrolled`, or a schedule of them, `step -> [T]` of the outer step.
      proximal: μ ≥ 0 adds μ |θ − λ["init"]|²/2, over the leaves that adapt, to ℓ.
      rule: `problem -> Estimator` instead of `hypergrad.unrolled`, such as `hypergrad.implicit` (iMAML) or `reptile`.
        Do not combine it with `order`, `outer` and `remat`, which are options of unrolling.
      remat: as for `hypergrad.unrolled`.
      sampler: the rows of the support set that a step sees; all rows by default.
      keep_support: f and predictions find the support set's "x" and "mask" in `params["support"]` (`params` must then
        be a dict). This is for statistics of the support set only, as in `conv4(normalization="support")`. Your own
        network that normalizes by its batch uses the query set's statistics, with or without this option.
      with_context: losses and `init` have their full form: dropout keys, batch statistics, the number of the step.

    Returns:
      An `Adaptation`. Train `hypergrad.over_tasks(a.estimator)` by `training.fit`; `adapted` makes predictions at test.
      With a `sampler`, a `rule` or checkpoints (`remat`), every step computes all of ℓ.

    Raises:
      ValueError: if an argument is out of range. At trace time: if `adapt` or `leaves_per_step` finds no leaf; if a
        leaf adapts and has a value per step; or if a leaf with a value per step has a leading axis other than T. Also
        if `init` makes leaves that do not adapt and there is a `rule`, or that adapt and there is a `proximal`. Also if
        λ is not a dict with "init" (and "rate" if it is learned). Also if the task is an episode, or its "mask" has an
        axis of tasks.

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import base, few_shot
    >>> loss = lambda params, hyperparams, batch: (params["w"] + params["b"] - batch) ** 2 / 2
    >>> a = few_shot.adaptation(loss, adapt="b", rate=0.5, rates="leaf")
    >>> hyperparams = a.hyperparams({"w": jnp.array(1.0), "b": jnp.array(0.0)})
    >>> jax.tree.map(float, hyperparams["rate"])
    {'b': 0.5, 'w': None}
    >>> task = base.Task(jnp.array(3.0), jnp.array(3.0))
    >>> estimate, _ = a.estimator.estimate(hyperparams, task, jax.random.key(0))  # the error is halved: 2, 1
    >>> float(estimate.value), float(estimate.hypergrad["rate"]["b"])
    (0.5, -2.0)
    """
    if rates not in RATES:
        raise ValueError(f"`rates` must be one of {', '.join(map(repr, RATES))}; got {rates!r}.")
    _checks.check_integer("num_steps", num_steps, 0)
    _checks.check_integer("test_steps", test_steps, 0, optional=True)
    num_steps = operator.index(num_steps)  # a number in an array cannot be hashed
    _checks.check_positive("proximal", proximal, zero=True)
    _adaptation_checks.check_rate(rate, learned=rates != "fixed")
    _adaptation_checks.check_pattern("adapt", adapt)
    if leaves_per_step is not None:
        _adaptation_checks.check_pattern("leaves_per_step", leaves_per_step)
    number = order if isinstance(order, (int, np.integer)) and not isinstance(order, bool) else -1
    if order not in ("first", "second") and number < 0:
        raise ValueError(f'`order` must be "first", "second" or a number of outer steps; got {order!r}.')
    if rates_per_step and rates == "fixed":
        raise ValueError('`rates_per_step` needs learned rates: `rates="one"`, "leaf" or "entry".')
    judged_last = isinstance(outer, str) and outer == "last"
    if rule is not None and not (order == "second" and judged_last and remat == "none"):
        raise ValueError(
            "`order`, `outer` and `remat` are options of unrolled training and cannot be combined with a `rule`."
        )
    if num_steps == 0 and (rates_per_step or leaves_per_step):
        raise ValueError("`rates_per_step` and `leaves_per_step` need at least one step; got `num_steps=0`.")

    def full_form(function):
        def full(params, hyperparams, batch, context):
            return function(params, hyperparams, batch, *([context] if with_context else []))

        return full

    inner_loss, judge = full_form(loss), full_form(outer_loss or loss)

    def select(params):
        """Returns the leaves that adapt, with None in place of the others."""
        return jax.tree_util.tree_map_with_path(lambda path, x: x if re.search(adapt, _path(path)) else None, params)

    def whole(params, made, meta_params):
        """Returns all leaves: leaves that do not adapt come from `init`'s result or from the meta-parameters."""
        given = _by_path(meta_params) | _by_path(made)
        fill = lambda path, x: given.get(path) if x is None else x  # a None of the model itself stays None
        return jax.tree_util.tree_map_with_path(fill, params, is_leaf=lambda x: x is None)

    def judged(params, carried, meta_params):
        """Returns the parameters that f and predictions see."""
        params = whole(params, carried.made, meta_params)
        if keep_support and not isinstance(params, dict):
            raise ValueError(
                'With `keep_support=True`, f finds the support set in `params["support"]`, so that the model must be a '
                f"dict; got a {type(params).__name__}."
            )
        return {**params, "support": carried.support} if keep_support else params

    def start(key, hyperparams, data):
        _adaptation_checks.check_hyperparams(hyperparams, "init")
        _adaptation_checks.check_one_task(data)
        with _traced_after_steps(False):
            params = hyperparams["init"] if init is None else init(key, hyperparams, data)
        if with_context and init is not None:
            if type(params) not in (tuple, list) or len(params) != 2:
                raise ValueError(
                    "With `with_context=True`, `init` must return a pair (params, model state), where the model state "
                    f"may be None; got {type(params).__name__}."
                )
            params, model_state = params
        else:
            model_state = None
        paths = [_path(path) for path in _by_path(params)]
        if not any(re.search(adapt, path) for path in paths):
            raise ValueError(f"`adapt` must match at least one leaf: {adapt!r} matches none of {paths}.")
        both = [
            path for path in paths if leaves_per_step and re.search(adapt, path) and re.search(leaves_per_step, path)
        ]
        if both:
            raise ValueError(f"Leaves with a value for each step cannot adapt: {both}. Exclude them from `adapt`.")
        given = _by_path(hyperparams["init"])
        alone = [_path(path) for path in _by_path(params) if re.search(adapt, _path(path)) and path not in given]
        # A leaf of λ["init"] is identified by its keys, so `init` must not pass it on under other keys.
        known = {id(x) for x in given.values()}
        rekeyed = [path for path, x in _by_path(params).items() if path not in given and id(x) in known]
        moved = (
            f'`init` passed on the leaves {[*map(_path, rekeyed)]} of λ["init"] under other keys, as of a NamedTuple '
            'in the place of a dict, and so they count as its own: let it return them in the containers of λ["init"]'
        )
        if proximal and any(path in rekeyed for path in _by_path(select(params))):
            raise ValueError(f"{moved}. `proximal` is the distance from there.")
        if proximal and alone:
            raise ValueError(
                f'`proximal` is the distance from λ["init"], in which the leaves {alone}, made by `init`, are not: let '
                "them not adapt (`adapt`), or leave out `proximal`."
            )
        # A leaf that `init` only passed on is the same object as in λ["init"].
        is_made = lambda path, x: not re.search(adapt, _path(path)) and x is not given.get(path)
        made = jax.tree_util.tree_map_with_path(lambda path, x: x if is_made(path, x) else None, params)
        if rule is not None and any(path in rekeyed for path in _by_path(made)):
            raise ValueError(f"{moved}, or adapt (`adapt`). A `rule` sees no derivative through what `init` makes.")
        if rule is not None and jax.tree.leaves(made):
            raise ValueError(
                f"`init` made the leaves {[_path(path) for path in _by_path(made)]}, which do not adapt, and a `rule` "
                "sees no derivative through them: let them adapt (`adapt`), or leave out the `rule`."
            )
        # `hyperparams` only evaluates the shapes of θ, and passes no data if `init` does not need them.
        support = {name: data[name] for name in ("x", "mask")} if keep_support and data is not None else None
        return select(params), Carried(model_state, made, support)

    if init is not None:
        start = inner.im2col(start, only_on_cpu=True)

    def model_loss(params, made, hyperparams, batch, context):
        with _traced_after_steps(False):  # ℓ sees a support set, even if it is traced within another adaptation's f
            value = inner_loss(whole(params, made, hyperparams["init"]), hyperparams, batch, context)
        if isinstance(value, tuple) and len(value) != 2:
            raise ValueError(f"The inner loss must return [] or ([], model_state); got {len(value)} values.")
        return value if isinstance(value, tuple) else (value, context.model_state)

    def halves(params, made, hyperparams, batch, context):
        """Splits `model_loss` into the part that no step changes and the rest, if it can be traced."""

        def moves(path, _):
            which, (name, _, leaf) = path[0].idx, _path(path[1:]).partition("/")
            if which == 2:  # λ
                per_step = leaves_per_step and re.search(leaves_per_step, leaf)
                return rates_per_step if name == "rate" else name == "init" and bool(per_step)
            return which not in (1, 3)

        with contextlib.suppress(Exception):  # a branch on a value, or an error of the loss, which ℓ itself will raise
            # Shapes as in the loop's state, without weak types, so that every step is split like the first.
            like = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
            args = (like(params), like(made), hyperparams, batch, like(context))
            return _jaxpr.split(model_loss, args, jax.tree_util.tree_map_with_path(moves, args))
        return None

    def start_once(key, hyperparams, data):
        params, carried = start(key, hyperparams, data)
        args = (params, carried.made, hyperparams, data, base.Context(key, jnp.int32(0), carried.own))
        cut = halves(*args) if sampler is None else None  # with a sampler, steps see fewer rows than `data` has
        once = () if cut is None else inner.im2col(cut.once, only_on_cpu=True)(args)
        return params, carried._replace(once=tuple(once))

    def g(params, hyperparams, batch, context):
        carried, own = context.model_state, context.model_state.own
        args = (params, carried.made, hyperparams, batch, context._replace(model_state=own))
        cut = halves(*args) if carried.once else None
        fits = cut is not None and [(k.shape, k.dtype) for k in cut.kept] == [(k.shape, k.dtype) for k in carried.once]
        value, own = cut.rest(args, carried.once) if cut is not None and fits else model_loss(*args)
        if proximal:
            distance = optax.tree.norm(optax.tree.sub(params, select(hyperparams["init"])), squared=True)
            value = value + proximal / 2 * distance
        return value, carried._replace(own=own)

    def f(params, hyperparams, batch, context):
        params = judged(params, context.model_state, hyperparams["init"])
        # Plain pre-training, without inner steps and without `init`, sees its own batch and no query set.
        with _traced_after_steps(num_steps > 0 or init is not None):
            value = judge(params, hyperparams, batch, context._replace(model_state=context.model_state.own))
        return value[0] if isinstance(value, tuple) else value

    grouped = transforms.per_parameter(optimizer) if rates in ("leaf", "entry") else optimizer

    def factory(hyperparams):
        if rates != "fixed":
            _adaptation_checks.check_hyperparams(hyperparams, "init", "rate")
        return grouped(rate if rates == "fixed" else hyperparams["rate"])

    def leaves_at(hyperparams, step):
        given = _by_path(hyperparams["init"])
        found = {path: jnp.shape(x) for path, x in given.items() if re.search(leaves_per_step or "", _path(path))}
        wrong = {_path(path): shape for path, shape in found.items() if shape[:1] != (num_steps,)}
        if not found or wrong:
            raise ValueError(
                f'`leaves_per_step` must find leaves in λ["init"] with a leading axis of `num_steps` = {num_steps}; '
                f"{leaves_per_step!r} finds {wrong or 'none'}."
            )
        pick = lambda path, x: x[step] if path in found else x
        return {**hyperparams, "init": jax.tree_util.tree_map_with_path(pick, hyperparams["init"])}

    def at_step(hyperparams, step):
        step = jnp.clip(step, 0, num_steps - 1)
        _adaptation_checks.check_hyperparams(hyperparams, "init", *(["rate"] if rates_per_step else []))
        if rates_per_step:
            hyperparams = {**hyperparams, "rate": jax.tree.map(lambda x: x[step], hyperparams["rate"])}
        return leaves_at(hyperparams, step) if leaves_per_step else hyperparams

    def problem_from(init):
        loop = inner.loop(g, factory, init=init, sampler=sampler, with_context=True)

        def update(state, grads, model_state, hyperparams):
            """Keeps the part that no step changes, so that reverse mode stores it once and not at every step."""
            same = loop.context(state).model_state._replace(own=model_state.own)
            return loop.update(state, grads, same, hyperparams)

        problem = inner.problem(loop._replace(update=update), f, with_context=True)
        return base.reparametrized(problem, at_step) if rates_per_step or leaves_per_step else problem

    problem, unrolling = problem_from(start), problem_from(start_once)
    loop = problem.loop

    def hyperparams(meta_params, data=None):
        made = {"init": meta_params, **(extra or {})}
        if rates == "fixed":
            return made
        if rates == "one":
            like = jnp.zeros([])
        else:
            first = leaves_at(made, 0) if leaves_per_step else made
            try:
                like = jax.eval_shape(lambda data: start(jax.random.key(0), first, data)[0], data)
            except TypeError as error:
                if data is not None or init is None:
                    raise
                raise ValueError(
                    "Each leaf or entry that `init` computes from a support set has a rate, so `hyperparams` needs the "
                    "data of one task for their shapes: `hyperparams(meta_params, data)`."
                ) from error
        lead = (num_steps,) if rates_per_step else ()
        dtype = lambda x: x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else float  # as an integer, a rate would be 0
        value = lambda x: jnp.full(lead + (x.shape if rates == "entry" else ()), rate, dtype(x))
        return {**made, "rate": jax.tree.map(value, like)}

    def params(state, hyperparams):
        if rates_per_step or leaves_per_step:
            hyperparams = at_step(hyperparams, loop.context(state).step - 1)
        return judged(loop.params(state), loop.context(state).model_state, hyperparams["init"])

    def estimator_at(step):
        made = estimator_of(step)

        def init_state(key, hyperparams, task):
            _adaptation_checks.check_task(task)
            return made.init(key, hyperparams, task)

        def estimate(hyperparams, task, state):
            _adaptation_checks.check_task(task)
            return made.estimate(hyperparams, task, state)

        return made._replace(init=init_state, estimate=estimate)

    def estimator_of(step):
        if rule is not None:
            return rule(problem)
        weights: Any = outer
        if callable(outer) and isinstance(step, int):  # weights are known: if only the last counts, only it is judged
            with jax.ensure_compile_time_eval():
                weights = np.asarray(outer(step))
        elif callable(outer):
            weights = outer(step)

        def unrolled(grad):
            # Checkpoints save memory, but each would store a copy of the part that is computed once.
            trained = unrolling if remat == "none" else problem
            return hypergrad.unrolled(trained, num_steps=num_steps, remat=remat, outer=weights, grad=grad)

        first, second = unrolled(_held_grad)._replace(kind="biased"), unrolled(hypergrad.mixed_grad)
        if isinstance(order, str):
            return first if order == "first" else second
        if isinstance(step, int):
            return first if step < order else second
        estimate = lambda hyperparams, task, state: jax.lax.cond(
            step < order, first.estimate, second.estimate, hyperparams, task, state
        )
        return first._replace(estimate=estimate)

    return Adaptation(
        problem,
        estimator_at(int(LATE)),
        estimator_at,
        hyperparams,
        params,
        num_steps if test_steps is None else operator.index(test_steps),
        unrolling,
    )


_NO_DERIVATIVE = (
    "The outputs of `few_shot.adapted` have no derivative: it adapts without storing what a derivative needs, so that "
    "the gradient would be 0 and wrong. Use `hypergrad.unroll(adaptation.unrolling.loop, num_steps=...)` to "
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
    """Returns the prediction function of an adaptation at test, as `evaluate_episodes` takes it.

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
      with_context: whether `predict` has its full form.

    Returns:
      `(key, support, query) -> outputs` [T + 1, Q, ...], after 0..T steps. To differentiate through the steps, use
      `hypergrad.unroll(adaptation.unrolling.loop, num_steps=T)`.

    Raises:
      ValueError: if `num_steps` is not an integer or is negative; at trace time, if the outputs are differentiated.
    """
    loop = adaptation.unrolling.loop
    _checks.check_integer("num_steps", num_steps, 0, optional=True)
    steps = adaptation.test_steps if num_steps is None else operator.index(num_steps)

    def method(key, support, query):
        inputs = hyperparams, support, query
        fixed, support, query = jax.lax.stop_gradient(inputs)

        def outputs(state):
            context = loop.context(state)
            context = context._replace(model_state=context.model_state.own)
            with _traced_after_steps(True):
                return predict(adaptation.params(state, fixed), query, *([context] if with_context else []))

        def moves(path, _):
            return not _path(path).startswith(("model_state/made", "model_state/support"))

        state, cut = loop.init(key, fixed, support), None
        with contextlib.suppress(Exception):  # as for ℓ: parts for the query set that no step changes are computed once
            cut = _jaxpr.split(outputs, (state,), (jax.tree_util.tree_map_with_path(moves, state),))
        kept = () if cut is None else inner.im2col(cut.once, only_on_cpu=True)((state,))
        predictions = outputs if cut is None else lambda state: cut.rest((state,), kept)
        predictions = inner.im2col(predictions, only_on_cpu=True)
        _, after = inner.run(loop._replace(init=lambda *_: state), steps, trace_fn=predictions)(key, fixed, support)
        visited = jnp.concatenate([predictions(state)[None], after])
        return _jaxpr.refuse_derivative(visited, inputs, _NO_DERIVATIVE)

    return method


def _held_grad(loss: Callable, has_aux: bool = False) -> Callable:
    """`jax.grad` whose result has no derivative, for first order. The model's new state has no derivative either."""

    def held(params, hyperparams, batch, context):
        args = jax.lax.stop_gradient((params, hyperparams, batch, context))
        grads, carried = jax.grad(loss, has_aux=has_aux)(*args)
        return grads, carried._replace(made=context.model_state.made)  # f reads these leaves as it reads λ

    return held


def _by_path(tree: base.PyTree) -> dict[Any, Any]:
    """Maps key paths to leaves. As strings, the paths of {"a/b": ...} and {"a": {"b": ...}} would be the same."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
