"""Adaptation: a few inner steps from a shared start to one task. All MAML variants are settings of one specification.

    θ_0 = init(λ, support),    θ_{t+1} = θ_t − α_t ∇_θ ℓ(θ_t, λ; support),    F(λ) = Σ_t w_t f(θ_t, λ; query)

λ = {"init": the meta-parameters, "rate": α if it is learned, ...}. θ has the structure of the model. It holds the
leaves that adapt, and None in place of the others; ℓ and f read the others from λ["init"]. Computations that no step
changes are done once for the support set, when training starts. If only the head adapts, these are the features
z = body(λ, support):

    ℓ(θ, λ; support) = head(θ, λ, z),    dF/dλ = ∂F/∂λ + (∂z/∂λ)ᵀ ∂F/∂z,

so that T steps cost T forward and backward passes through the head and one through the body. `_jaxpr.split` finds the
constant part in the traced loss. It consists of the matrix products and convolutions, in any layer, that do not depend
on an adapting leaf. `_problem.py` has the start, ℓ and f; this file has the factory and the estimators.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base, hypergrad, inner
from metaopt.few_shot import _adaptation_checks, _problem

LATE = np.iinfo(np.int32).max  # an outer step after every schedule


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
      params: `(state, hyperparams) -> params`, all leaves of the model, adapted or not, in this inner state. These are
        the parameters that the outer loss f receives.
      test_steps: the number of inner steps at test time.
      unrolling: a copy of `problem`. Its `init` also computes the parts of the model that no inner step changes, and
        the steps reuse them. It is correct only if λ and the support set are the same at every step, and if derivatives
        are taken through `init`. `estimator` and `adapted` satisfy this. The model state of its loop has further
        fields; the network's own state is `unrolling.loop.context(state).model_state.own`.
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
    adapt: str | re.Pattern[str] = "",
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
    rule: Callable[..., base.Estimator] | None = None,
    remat: str = "none",
    sampler: inner.Sampler | None = None,
    keep_support: bool = False,
    with_context: bool = False,
) -> Adaptation:
    """Specifies how a model adapts to a task by a few inner steps; `maml`, `anil` and others are settings of it.

    Args:
      loss: ℓ, `(params, hyperparams, batch) -> []` on the support set, where `params` are all leaves of the model. With
        `with_context`, `(params, hyperparams, batch, context) -> []` or `-> ([], model_state)`.
      outer_loss: f on the query set, with the same arguments, `-> []`. The default is `loss` (without its model state).
        Then dropout is on in f too, and a BatchNorm normalizes by the query set, as it does in training.
      init: `(key, hyperparams, data) -> params`: θ_0 and the leaves that do not adapt. The default is λ["init"]. It may
        add or change leaves, such as a head computed from the support set. If such a leaf does not adapt, the inner
        steps keep the value that `init` computed. With `with_context`, `-> (params, model_state)`.
      extra: additional leaves of λ, by name, with their initial values; the losses and `init` can read them.
      adapt: selects the leaves that adapt: a regular expression that is searched for in paths like "layers/0/bias".
        Leaves that do not adapt are in λ["init"], and only the outer step changes them. The default is all leaves.
      optimizer: `rate -> optax.GradientTransformation`.
      rate: α, or its initial value if it is learned. A fixed rate can be anything that the optimizer takes, such as a
        schedule.
      rates: "fixed", or learned: "one" for all, one for each "leaf", or one for each "entry" (Meta-SGD).
      rates_per_step: whether a learned rate has a leading axis of T, with one value for each step. Steps after the T-th
        use the last value. With `rates="leaf"` this is LSLR of MAML++.
      leaves_per_step: a regular expression, as for `adapt`. It selects leaves in λ["init"] that do not adapt and have a
        leading axis of T, with one value for each step. Scales and shifts of a normalization are an example. The loss
        sees the value of the current step, and f the value of the last step.
      num_steps: T, in training; at least 0. With 0, λ["init"] is trained on the query sets without adaptation.
      test_steps: steps at test, T by default.
      order: "second"; "first" (∇ℓ is held constant: no second derivatives); or a number n, for "first" in the first n
        outer steps and "second" after them.
      outer: the weights w_1..w_T, as for `hypergrad.unrolled`, or a schedule of them, `step -> [T]` of the outer step.
      proximal: μ ≥ 0 adds μ |θ − λ["init"]|²/2, over the leaves that adapt, to ℓ.
      rule: `(problem, num_steps=T) -> Estimator` instead of `hypergrad.unrolled`, such as `hypergrad.implicit` (iMAML)
        or `hypergrad.reptile`. Do not combine it with `order`, `outer` and `remat`, which are options of unrolling. It
        is called twice, and again at each call of `estimator_at`.
      remat: as for `hypergrad.unrolled`.
      sampler: the rows of the support set that a step sees; all rows by default.
      keep_support: f and predictions find the support set's "x" and "mask" in `params["support"]` (`params` must then
        be a dict). This is for statistics of the support set only, as in `conv4(normalization="support")`. Your own
        network that normalizes by its batch uses the query set's statistics, with or without this option.
      with_context: whether the losses take a context (a key for dropout, batch statistics, the number of the step), and
        `init` returns a model state.

    Returns:
      An `Adaptation`. To train, pass `hypergrad.over_tasks(a.estimator)` to `training.learner`. `adapted` makes the
      prediction function for test. Parts of ℓ that depend only on leaves that do not adapt are computed once per task,
      since they are the same at each step. With a `sampler`, a `rule` or checkpoints (`remat`), each step computes them
      again.

    Raises:
      ValueError: if `rates` or `order` is unknown, or `num_steps` is negative.
      ValueError: at trace time, if `adapt` or `leaves_per_step` finds no leaf, or both find the same leaf.
      ValueError: at trace time, if a leaf with a value per step has a leading axis other than T.
      ValueError: at trace time, if `init` makes leaves that do not adapt and there is a `rule` that is not of kind
        "unbiased", or leaves that adapt and there is a `proximal`.
      ValueError: at trace time, if λ is not a dict with "init" (and "rate" if it is learned), or if the "mask" of a
        task has an axis of tasks.

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import base, few_shot
    >>> loss = lambda params, hyperparams, batch: (
    ...     (params["w"] + params["b"] - batch) ** 2 / 2
    ... )
    >>> a = few_shot.adaptation(loss, adapt="b", rate=0.5, rates="leaf")
    >>> hyperparams = a.hyperparams({"w": jnp.array(1.0), "b": jnp.array(0.0)})
    >>> jax.tree.map(float, hyperparams["rate"])
    {'b': 0.5, 'w': None}
    >>> task = base.Task(jnp.array(3.0), jnp.array(3.0))
    >>> # the error is halved: 2, 1
    >>> estimate, _ = a.estimator.estimate(hyperparams, task, jax.random.key(0))
    >>> float(estimate.value), float(estimate.hypergrad["rate"]["b"])
    (0.5, -2.0)
    """
    num_steps = operator.index(num_steps)  # a number in an array cannot be hashed
    _adaptation_checks.check_options(rates, order, outer, remat, rule)
    full = lambda function: function if with_context else lambda *args: function(*args[:3])
    spec = _problem.Spec(
        loss=full(loss),
        outer_loss=full(outer_loss or loss),
        init=init,
        adapt=re.compile(adapt),
        optimizer=optimizer,
        rate=rate,
        rates=rates,
        rates_per_step=rates_per_step,
        leaves_per_step=None if leaves_per_step is None else re.compile(leaves_per_step),
        num_steps=num_steps,
        proximal=proximal,
        sampler=sampler,
        keep_support=keep_support,
        with_context=with_context,
        rule_kind=None,
        log_constant=_checks.constant_state_logged_once(),
    )
    if rule is not None:  # no kind is known before the rule has a problem, so the first call only asks for the kind
        kind = rule(_problem.make_problem(spec, constants_once=False), num_steps=num_steps).kind
        spec = spec._replace(rule_kind=kind)
    problem = _problem.make_problem(spec, constants_once=False)
    unrolling = _problem.make_problem(spec, constants_once=True)
    # Checkpoints save memory, but each would store a copy of the part that is computed once.
    unrolled = _Unrolled(unrolling if remat == "none" else problem, num_steps, order, outer, remat)
    estimator_at = lambda step: _unrolled_at(unrolled, step) if rule is None else rule(problem, num_steps=num_steps)
    return Adaptation(
        problem,
        estimator_at(int(LATE)),
        estimator_at,
        lambda meta_params, data=None: _initial(spec, {"init": meta_params, **(extra or {})}, data),
        lambda state, hyperparams: _params_of(spec, problem.loop, state, hyperparams),
        num_steps if test_steps is None else operator.index(test_steps),
        unrolling,
    )


def _initial(spec: _problem.Spec, hyperparams: dict[str, Any], data: Any) -> dict[str, Any]:
    """Adds the initial rates to λ, if they are learned."""
    if spec.rates == "fixed":
        return hyperparams
    like: Any = jnp.zeros([])
    if spec.rates != "one":
        first = _problem.leaves_at(spec, hyperparams, 0)
        try:
            like = jax.eval_shape(lambda data: _problem.start(spec, jax.random.key(0), first, data)[0], data)
        except TypeError as error:
            if data is not None or spec.init is None:
                raise
            raise ValueError(
                "Each leaf or entry that `init` computes from a support set has a rate, so `hyperparams` needs the "
                "data of one task for their shapes: `hyperparams(meta_params, data)`."
            ) from error
    lead = (spec.num_steps,) if spec.rates_per_step else ()
    dtype = lambda x: x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else float  # as an integer, a rate would be 0
    value = lambda x: jnp.full(lead + (x.shape if spec.rates == "entry" else ()), spec.rate, dtype(x))
    return {**hyperparams, "rate": jax.tree.map(value, like)}


def _params_of(spec: _problem.Spec, loop: base.InnerLoop, state, hyperparams: base.HyperParams) -> base.Params:
    """All leaves of the model as f sees them after a state's steps."""
    context = loop.context(state)
    if spec.rates_per_step or spec.leaves_per_step is not None:
        hyperparams = _problem.at_step(spec, hyperparams, context.step - 1)
    return _problem.params_after(spec, loop.params(state), context.model_state, hyperparams["init"])


# ---- Estimators ------------------------------------------------------------------------------------------------------


class _Unrolled(NamedTuple):
    problem: base.Problem
    num_steps: int
    order: str | int
    outer: Any
    remat: str


def _unrolled_at(unrolled: _Unrolled, step: Any) -> base.Estimator:
    """The estimator of unrolled training at an outer step, by the schedules of `order` and `outer`."""
    problem, num_steps, order, _, remat = unrolled
    weights: Any = unrolled.outer
    if callable(weights) and isinstance(step, int):  # known weights: if only the last is not 0, f is evaluated once
        with jax.ensure_compile_time_eval():
            weights = np.asarray(weights(step))
    elif callable(weights):
        weights = weights(step)
    estimator = lambda grad: hypergrad.unrolled(problem, num_steps=num_steps, remat=remat, outer=weights, grad=grad)
    first, second = estimator(_held_grad)._replace(kind="biased"), estimator(hypergrad.mixed_grad)
    if isinstance(order, str):
        return first if order == "first" else second
    if isinstance(step, int):
        return first if step < order else second
    estimate = lambda hyperparams, task, state: jax.lax.cond(
        step < order, first.estimate, second.estimate, hyperparams, task, state
    )
    return first._replace(estimate=estimate)


def _held_grad(loss: Callable, has_aux: bool = False) -> Callable:
    """`jax.grad` whose result has no derivative, for first order. The model's new state has no derivative either."""

    def held(params, hyperparams, batch, context):
        args = jax.lax.stop_gradient((params, hyperparams, batch, context))
        grads, carried = jax.grad(loss, has_aux=has_aux)(*args)
        return grads, carried._replace(made=context.model_state.made)  # f has derivatives through these

    return held
