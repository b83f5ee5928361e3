"""The contract: three nouns, and the pairs of pure functions that carry them.

A **problem** is an inner loop, which says how the parameters θ are trained on the inner loss g, and an outer
loss f, which says how the result is judged:

    F(λ) = Σ_t w_t f(θ_t(λ), λ),    θ_{t+1}(λ) = update(θ_t, ∇θ g(θ_t, λ), λ).

An **estimator** says how dF/dλ is estimated. A **task** is what training runs on. A **searcher** proposes λ where
there is no gradient.

Everything here is a plain `NamedTuple` of functions, or of arrays; there are no base classes. λ (`hyperparams`, or
meta-parameters where they are a network's weights) is any pytree of floating-point arrays.
"""

import contextlib
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any
Params = PyTree  # θ
HyperParams = PyTree  # λ
Batch = PyTree
Data = PyTree
InnerState = PyTree
EstimatorState = PyTree


def check_integer(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Refuses an argument that is no integer of at least `least`.

    Args:
      name: what the message calls it.
      value: what was given.
      least: the smallest that is allowed.
      optional: whether None is, too.

    Raises:
      ValueError: it is something else.
    """
    if optional and value is None:
        return
    try:
        is_integer = not isinstance(value, bool) and operator.index(value) is not None
    except TypeError:
        is_integer = False
    if not is_integer or value < least:
        wanted = f"{'' if is_integer else 'an integer of '}at least {least}{', or None' if optional else ''}"
        raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")


def check_positive(name: str, value: Any, *, zero: bool = False, optional: bool = False) -> None:
    """Refuses an argument that is no positive number.

    Args:
      name: what the message calls it.
      value: what was given.
      zero: whether zero is allowed.
      optional: whether None is.

    Raises:
      ValueError: it is something else.
    """
    if optional and value is None:
        return
    try:
        holds = value >= 0 if zero else value > 0
    except TypeError:  # no number
        holds = False
    if not holds:
        wanted = f"{'at least 0' if zero else 'positive'}{', or None' if optional else ''}"
        raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")


def check_transform(name: str, value: Any) -> None:
    """Refuses an argument that is no transform of optax: no pair of functions `init` and `update`.

    Args:
      name: what the message calls it.
      value: what was given.

    Raises:
      ValueError: it is something else, such as the factory of one.
    """
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        uncalled = ", a function: call it, as in `optax.adam(1e-3)`" if callable(value) else ""
        raise ValueError(f"`{name}` must be an optax transform; got {value!r}{uncalled}.")


@contextlib.contextmanager
def explained_schedules(name: str) -> Iterator[None]:
    """Explains JAX's error where an optimizer asks a traced hyperparameter for its value, as schedules of optax do.

    Args:
      name: the argument that makes the optimizer, for the message.

    Returns:
      A context manager for the calls of the optimizer and of its factory.

    Raises:
      ValueError: if the calls need the value of a traced array.
    """
    try:
        yield
    except (
        jax.errors.ConcretizationTypeError,  # `if`, `float`
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise ValueError(
            f"`{name}` asks a hyperparameter for its value, by `if`, `float`, `int` or NumPy, and it has none while "
            "JAX traces it. Schedules of optax do this to some arguments, such as `peak_value` of "
            "`optax.warmup_cosine_decay_schedule`: use `transforms.cosine_schedule` (or `wsd_schedule`, "
            "`polynomial_schedule`, `knot_schedule`), which is differentiable in all of its numbers. In your own code "
            f"use `jnp.where` instead of `if`. JAX: {str(error).splitlines()[0]}"
        ) from error


def check_hyperparams(hyperparams: HyperParams) -> None:
    """Refuses a λ that has no leaf, or one that has no gradient.

    Args:
      hyperparams: λ.

    Raises:
      ValueError: there is no leaf, or one is not floating-point.
    """
    leaves = jax.tree_util.tree_leaves_with_path(hyperparams)
    if not leaves:
        raise ValueError("`hyperparams` has no leaves: there is nothing to tune.")
    for path, leaf in leaves:
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            name = f"hyperparams{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"`{name}` has dtype {dtype}, and only floating-point leaves have a gradient; write it as a float if "
                "it is to be tuned (1.0, not 1), and keep it out of λ, for instance in a closure, if it is not."
            )


def check_labels(name: str, y: Any, num_classes: int, *, mask: Any = None, class_mask: Any = None) -> None:
    """Raises ValueError if the label of a real row is not a class. Traced arrays pass: a program cannot raise.

    Args:
      name: what the message calls the labels.
      y: [..., N, ...] labels, integers in 0..C-1 or truth values.
      num_classes: C.
      mask: [..., N], a prefix of the axes of y, or shaped as y: positive for a real row; None: all rows are real.
      class_mask: [..., C], where the axes in front are the first ones of y: positive for a class of the task; None:
        every class is one.

    Raises:
      ValueError: if a label of a real row is below 0 or above C - 1, or `class_mask` leaves its class out.
    """
    if any(isinstance(x, Tracer) for x in (y, mask, class_mask)):
        return
    y = np.asarray(y)
    y = y.astype(int) if y.dtype == bool else y
    real = np.ones(y.shape, bool)
    if mask is not None:
        mask = np.asarray(mask)
        real = np.broadcast_to((mask > 0).reshape(mask.shape + (1,) * (y.ndim - mask.ndim)), y.shape)
    inside = (y >= 0) & (y < num_classes)
    if (real & ~inside).any():
        raise ValueError(
            f"{name} must be in 0..{num_classes - 1}; got labels from {y[real].min()} to {y[real].max()}, "
            f"{int((real & ~inside).sum())} of {int(real.sum())} outside. Number the classes from 0 "
            "(`np.unique(y, return_inverse=True)[1]`)."
        )
    if class_mask is None:
        return
    class_mask = np.asarray(class_mask)
    place = np.where(inside, y, 0).astype(int).reshape(*class_mask.shape[:-1], -1)
    known = (np.take_along_axis(class_mask, place, axis=-1) > 0).reshape(y.shape)
    if (real & ~known).any():
        raise ValueError(
            f'{name} have classes that "class_mask" leaves out: {np.unique(y[real & ~known]).tolist()}. It must be 1 '
            "for every class of the task."
        )


def check_task_labels(name: str, tasks: PyTree) -> None:
    """Raises ValueError if a part of a task has integer labels "y" that its "class_mask" does not allow.

    Args:
      name: what the message calls the tasks.
      tasks: a task, an episode or a batch of them. Mappings inside it with "y" [..., N] and "class_mask" [..., C] are
        checked, among the rows with a positive "mask" [..., N].

    Raises:
      ValueError: as `check_labels`.
    """

    def is_part(x: Any) -> bool:
        return isinstance(x, Mapping) and "y" in x and "class_mask" in x

    for path, part in jax.tree_util.tree_leaves_with_path(tasks, is_leaf=is_part):
        if not is_part(part) or any(isinstance(part.get(leaf), Tracer) for leaf in ("y", "mask", "class_mask")):
            continue
        shape, classes = np.shape(part["y"]), np.shape(part["class_mask"])
        fits = classes and shape[: len(classes) - 1] == classes[:-1] and len(shape) >= len(classes)
        mask = part.get("mask")
        dtype = getattr(part["y"], "dtype", None) or np.asarray(part["y"]).dtype
        if not fits or not jnp.issubdtype(dtype, jnp.integer):
            continue
        if mask is not None and np.shape(mask) != shape[: np.ndim(mask)]:
            continue  # the mask is not one of rows
        labels = f"The labels `{name}{jax.tree_util.keystr(path)}['y']`"
        check_labels(labels, part["y"], classes[-1], mask=mask, class_mask=part["class_mask"])


class Task(NamedTuple):
    """What is trained on, and judged on: pytrees of arrays, masks among them.

    A batch of tasks has one more leading axis, of the number of tasks, on every leaf. Test data are not part of a task:
    they stay with the experiment, so that nothing can tune on them.

    Attributes:
      train: what the inner loss sees; few-shot learning calls it the support set.
      valid: what the outer loss sees; few-shot learning calls it the query set.
      features: what a predictor of λ sees: meta-features of the task, or None.
    """

    train: Data
    valid: Data
    features: PyTree = None


class Context(NamedTuple):
    """What a loss may need beside its arguments.

    Attributes:
      key: a fresh PRNG key at every step: dropout, Gumbel noise.
      step: [] int32, the inner steps taken so far: temperature and penalty schedules.
      model_state: what training changes without a gradient: batch statistics.
    """

    key: jax.Array
    step: jax.Array
    model_state: PyTree = None


class InitFn(Protocol):
    def __call__(self, key: jax.Array, hyperparams: HyperParams, data: Data) -> InnerState:
        """Starts the training of one task; the inner parameters may come out of λ (MAML)."""
        ...


class BatchFn(Protocol):
    def __call__(self, state: InnerState, data: Data) -> Batch:
        """The batch of the step that `state` is about to take: pure, the order of the data lives in the state."""
        ...


class LossFn(Protocol):
    def __call__(
        self, params: Params, hyperparams: HyperParams, batch: Batch, context: Context
    ) -> tuple[jax.Array, PyTree]:
        """The inner loss g, a scalar, and the new model state."""
        ...


class UpdateFn(Protocol):
    def __call__(self, state: InnerState, grads: Params, model_state: PyTree, hyperparams: HyperParams) -> InnerState:
        """One optimizer step, given the gradient of g."""
        ...


class InnerLoop(NamedTuple):
    """How θ is trained; made by `inner.loop`, never by hand. A step is derived from it: `inner.step`."""

    init: InitFn
    batch: BatchFn
    loss: LossFn
    update: UpdateFn
    params: Callable[[InnerState], Params]
    context: Callable[[InnerState], Context]


class OuterLossFn(Protocol):
    def __call__(self, params: Params, hyperparams: HyperParams, batch: Batch, context: Context) -> jax.Array:
        """The outer loss f, a scalar."""
        ...


class OuterBatchFn(Protocol):
    def __call__(self, key: jax.Array, task: Task) -> Batch:
        """What f is evaluated on: by default the whole of `task.valid`."""
        ...


class Problem(NamedTuple):
    """An inner loop and the outer loss that judges it; made by `inner.problem`."""

    loop: InnerLoop
    outer_loss: OuterLossFn
    outer_batch: OuterBatchFn


def reparametrized(problem: Problem, hyperparams_fn: Callable[[HyperParams, Any], HyperParams]) -> Problem:
    """The same problem as a function of other quantities μ, λ_t = `hyperparams_fn(μ, t)`.

    λ enters a problem in four places, `init`, `loss`, `update` and `outer_loss`; the function is composed into each,
    so that gradients obey the chain rule and rules that perturb do so in μ. t counts inner steps from 0; the
    initialization sees λ_0, and the outer loss the λ of the last step taken.

    Args:
      problem: in λ.
      hyperparams_fn: `(hyperparams, step) -> hyperparams`.

    Returns:
      A problem in μ.
    """
    loop = problem.loop

    def init(key, hyperparams, data):
        return loop.init(key, hyperparams_fn(hyperparams, 0), data)

    def loss(params, hyperparams, batch, context):
        return loop.loss(params, hyperparams_fn(hyperparams, context.step), batch, context)

    def update(state, grads, model_state, hyperparams):
        return loop.update(state, grads, model_state, hyperparams_fn(hyperparams, loop.context(state).step))

    def outer_loss(params, hyperparams, batch, context):
        return problem.outer_loss(params, hyperparams_fn(hyperparams, context.step - 1), batch, context)

    return problem._replace(loop=loop._replace(init=init, loss=loss, update=update), outer_loss=outer_loss)


def mix_bits(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that mixes all bits: the finalizer of MurmurHash3.

    Args:
      x: [...] uint32.

    Returns:
      [...] uint32.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def shuffled(key: jax.Array, epoch: jax.Array, position: jax.Array, size: int | jax.Array) -> jax.Array:
    """The entries at `position` of a keyed permutation of 0..size-1, without building it.

    A swap-or-not network: in each round x and (k − x) mod n trade places or not, by a hash of the larger one. It costs
    a few integer operations per entry, whatever the size, and the size may differ between tasks under vmap.

    Args:
      key: the permutation's key.
      epoch: [...] int, one permutation for each.
      position: [...] int32, in [0, size).
      size: n, an integer or [].

    Returns:
      [...] int32.

    Source: Hoang, Morris & Rogaway, CRYPTO 2012, https://arxiv.org/abs/1208.1176
    """
    size = jnp.asarray(size, jnp.uint32)
    seed = jax.random.bits(key, (2,), jnp.uint32)
    # The network's rounds: the statistics of 64 rows among 5,000 are those of true permutations from 12 on; twice that.
    rounds = jnp.arange(24, dtype=jnp.uint32)
    salt = mix_bits(seed[0] ^ mix_bits(jnp.asarray(epoch).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
    x = jnp.asarray(position).astype(jnp.uint32)

    def swap_or_not(i, x):
        round_salt = mix_bits(salt + rounds[i] * jnp.uint32(0x9E3779B9))
        partner = (round_salt % size + size - x) % size
        larger = jnp.maximum(x, partner)
        return jnp.where(mix_bits(larger ^ round_salt ^ seed[1]) & 1, partner, x)

    return jax.lax.fori_loop(0, len(rounds), swap_or_not, x).astype(jnp.int32)


class Estimate(NamedTuple):
    """What one call of an estimator returns.

    Attributes:
      value: [] the outer loss F(λ).
      hypergrad: dF/dλ, shaped like λ.
      done: [] bool (one per task after `over_tasks`); the horizon ended, so the caller may give this slot a new task
        and a fresh state.
      metrics: a flat dict of residuals, norms, counts; looked at, never carried.
    """

    value: jax.Array
    hypergrad: HyperParams
    done: PyTree
    metrics: dict[str, jax.Array]


class EstimatorInitFn(Protocol):
    def __call__(self, key: jax.Array, hyperparams: HyperParams, task: Task) -> EstimatorState:
        """Everything that is carried: inner state, adjoint, key."""
        ...


class EstimateFn(Protocol):
    def __call__(self, hyperparams: HyperParams, task: Task, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        """One estimate of F and dF/dλ; the state afterwards."""
        ...


ESTIMATOR_KINDS = ("exact", "biased", "unbiased", "pseudo")


class Estimator(NamedTuple):
    """How dF/dλ is estimated.

    Attributes:
      init: `(key, hyperparams, task) -> state`.
      estimate: `(hyperparams, task, state) -> (Estimate, state)`.
      kind: what the hypergradient is, and so which test battery it must pass: "exact" (the derivative of `value`, from
        the same state), "biased" (a truncation, an approximation, or exact only in a limit; the docstring says which),
        "unbiased" (right on average), "pseudo" (a direction that is no gradient of F: Reptile).
    """

    init: EstimatorInitFn
    estimate: EstimateFn
    kind: str


def check_estimator(estimator: Any, *, or_function: bool = False) -> None:
    """Refuses what is no estimator.

    Args:
      estimator: what was given.
      or_function: whether a function of the outer step is allowed, too.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(estimator, Estimator) or or_function and callable(estimator):
        return
    instead = "; take its `.estimator`" if isinstance(getattr(estimator, "estimator", None), Estimator) else ""
    function = ", or a function `step -> Estimator`" if or_function else ""
    raise ValueError(f"`estimator` must be a `base.Estimator`{function}; got {type(estimator).__name__}{instead}.")


def as_pandas(name: str, frame: Any) -> Any:
    """A data frame of pandas, from one of it or from what has a `to_pandas`, as polars' and pyarrow's have.

    Args:
      name: what the message calls it.
      frame: what was given.

    Returns:
      A `pandas.DataFrame`.

    Raises:
      ValueError: it is something else.
    """
    frame = frame.to_pandas() if callable(getattr(frame, "to_pandas", None)) else frame
    pandas = sys.modules.get("pandas")  # who has a frame of it has loaded it
    if pandas is None or not isinstance(frame, pandas.DataFrame):
        of = f"{type(frame).__module__}.{type(frame).__qualname__}"
        raise ValueError(f"`{name}` must be a data frame of pandas, or have a `to_pandas` that makes one; got {of}.")
    return frame


class Predictor(NamedTuple):
    """g or h: maps a task to λ; its weights φ are meta-parameters.

    Attributes:
      init: `(key) -> meta_params`.
      apply: `(meta_params, task) -> hyperparams`, for one task.
      config: what it was built with, as plain values: enough to build it again (`predictors.save`).
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, Task], HyperParams]
    config: dict[str, Any] = {}


class Record(NamedTuple):
    """One trial: what was tried where, and what came of it; or, with status "WAITING", what is to be tried.

    Attributes:
      task: the task's name.
      configuration: λ as plain values, by path (`spaces.names`).
      outcome: the loss, smaller is better; NaN where there is none. Of a pruned trial, what it had reached.
      fidelity: the fraction of the full budget, in (0, 1], that was asked for.
      cost: seconds.
      seed: the trial's seed.
      status: "WAITING", "RUNNING", "COMPLETE", "PRUNED" or "FAIL".
      trial: the trial's number in its search; one trial may have records at several fidelities.
      reason: why it failed: a time limit, a signal, an exception's text.
    """

    task: str
    configuration: dict[str, Any]
    outcome: float = float("nan")
    fidelity: float = 1.0
    cost: float = float("nan")
    seed: int = 0
    status: str = "COMPLETE"
    trial: int = 0
    reason: str = ""


STATUSES = ("WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL")  # of a record


def check_record(record: Any, name: str = "A record") -> None:
    """Refuses what is no record of a trial.

    Args:
      record: what was given.
      name: what the message calls it, such as "`records[3]`".

    Raises:
      ValueError: it is something else, its task is no text, its configuration no dict, its status unknown, its fidelity
        not in (0, 1], or its outcome or cost no number.
    """
    if not isinstance(record, Record):
        raise ValueError(
            f"{name} must be a `Record`; got {type(record).__name__}. `Record(**fields)` makes one of a dict with "
            '"task", "configuration", "outcome" and so on, `tasks.records_from_frame` a list of a data frame.'
        )
    if not isinstance(record.task, str):
        raise ValueError(f"{name}'s task must be a name, a string, as it is on disk; got {record.task!r}.")
    if not isinstance(record.configuration, Mapping):
        raise ValueError(f"{name}'s configuration must be a dict of values by name; got {record.configuration!r}.")
    if record.status not in STATUSES:
        raise ValueError(f"{name}'s status must be one of {', '.join(STATUSES)}; got {record.status!r}.")
    for field in ("outcome", "fidelity", "cost"):
        value = getattr(record, field)
        try:
            if not math.isnan(value):
                float(value)
        except (TypeError, OverflowError):
            raise ValueError(f"{name}'s {field} must be a number, NaN where there is none; got {value!r}.") from None
    if not 0 < record.fidelity <= 1:
        raise ValueError(
            f"{name}'s fidelity must lie in (0, 1]; got {record.fidelity!r}. It is a fraction of the full budget, and "
            "no number of epochs."
        )


def is_full_budget(fidelity: float) -> bool:
    """Whether a fidelity is 1 but for rounding: three thirds, or what float32 has kept, are the full budget.

    Args:
      fidelity: in (0, 1].

    Returns:
      Whether at most a millionth of the budget is lacking, which no outcome tells.
    """
    return fidelity >= 1 - 1e-6


def rung_of(fidelities: Sequence[float], record: Record, *, own: bool = False) -> int | None:
    """Where a record's fidelity is among those of a searcher, but for rounding: float32 keeps 1/3 to 3e-8.

    Args:
      fidelities: in (0, 1].
      record: of a trial.
      own: whether the searcher has asked for the trial, so that its fidelity must be one of them.

    Returns:
      The position of the nearest one, if they differ by at most a millionth of the larger; else None.

    Raises:
      ValueError: there is none, and the trial is the searcher's own.
    """
    rung = min(range(len(fidelities)), key=lambda i: abs(fidelities[i] - record.fidelity))
    if math.isclose(fidelities[rung], record.fidelity, rel_tol=1e-6):
        return rung
    if own:
        raise ValueError(
            f"A trial's fidelity must be one of {[float(f) for f in fidelities]}, which are asked for, to six digits; "
            f"got {record.fidelity!r} of trial {record.trial}. What a trial came to is told at the fidelity that it "
            "was asked for: `trial._replace(status=..., outcome=...)`."
        )
    return None


class SearcherInitFn(Protocol):
    def __call__(self, key: jax.Array, space: PyTree) -> PyTree:
        """A searcher's state before the first trial."""
        ...


class AskFn(Protocol):
    def __call__(self, state: PyTree, num: int) -> tuple[list[Record], PyTree]:
        """At most `num` trials to run next, "WAITING", with fidelity and seed; the state that remembers them."""
        ...


class TellFn(Protocol):
    def __call__(self, state: PyTree, records: Sequence[Record]) -> PyTree:
        """The state after hearing what came of earlier trials."""
        ...


class Searcher(NamedTuple):
    """Proposes λ where there is no gradient: a forest, a remote training run."""

    init: SearcherInitFn
    ask: AskFn
    tell: TellFn


def check_searcher(searcher: Any) -> None:
    """Refuses what is no searcher: no `init`, `ask` and `tell`.

    Args:
      searcher: what was given.

    Raises:
      ValueError: it is something else, such as the factory of one, or a `MetaOptimizer`.
    """
    if all(callable(getattr(searcher, name, None)) for name in Searcher._fields):
        return
    instead = ""
    if callable(getattr(searcher, "searcher", None)):
        instead = "; its `.searcher(...)` makes one"
    elif callable(searcher):
        instead = ", a function: call it, as in `tasks.random_search()`"
    raise ValueError(
        f"`searcher` must be a `base.Searcher`; got {getattr(searcher, '__name__', type(searcher).__name__)}{instead}."
    )
