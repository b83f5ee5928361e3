"""The contract of the library: problems, estimators, tasks and searchers, as pairs of pure functions.

A **problem** consists of an inner loop and an outer loss f. The inner loop trains the parameters θ on the inner loss ℓ.
The outer loss judges the result:

    F(λ) = Σ_t w_t f(θ_t(λ), λ),    θ_{t+1}(λ) = update(θ_t, ∇θ ℓ(θ_t, λ), λ).

An **estimator** estimates dF/dλ. A **task** holds the data of one training run. A **searcher** proposes values of λ
without a gradient.

Everything here is a plain `NamedTuple` of functions or of arrays; there are no base classes. λ is any pytree
of floating-point arrays. It is called `hyperparams`, or meta-parameters if it consists of a network's weights.
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
    """Raises ValueError unless `value` is an integer of at least `least`.

    Args:
      name: the argument's name in the error message.
      value: the value to check.
      least: the smallest allowed value.
      optional: whether None is allowed, too.

    Raises:
      ValueError: if `value` is not such an integer. A boolean is not an integer here.
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
    """Raises ValueError unless `value` is a positive number.

    Args:
      name: the argument's name in the error message.
      value: the value to check.
      zero: whether zero is allowed, too.
      optional: whether None is allowed, too.

    Raises:
      ValueError: if `value` is not such a number.
    """
    if optional and value is None:
        return
    try:
        holds = value >= 0 if zero else value > 0
    except TypeError:  # not a number
        holds = False
    if not holds:
        wanted = f"{'at least 0' if zero else 'positive'}{', or None' if optional else ''}"
        raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")


def check_transform(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an optax transform: an object with functions `init` and `update`.

    Args:
      name: the argument's name in the error message.
      value: the value to check.

    Raises:
      ValueError: if `value` is not a transform, for example if it is the factory of a transform.
    """
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        uncalled = ", a function: call it, as in `optax.adam(1e-3)`" if callable(value) else ""
        raise ValueError(f"`{name}` must be an optax transform; got {value!r}{uncalled}.")


@contextlib.contextmanager
def explained_schedules(name: str) -> Iterator[None]:
    """Explains JAX's error if an optimizer reads the value of a traced hyperparameter, as some optax schedules do.

    Args:
      name: the argument that makes the optimizer, for the error message.

    Returns:
      A context manager for calls of the optimizer and of its factory.

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
            f"`{name}` needs the concrete value of a hyperparameter (in `if`, `float`, `int` or NumPy), but JAX traces "
            "the hyperparameter, so it has no value. Some optax schedules do this, for example with `peak_value` of "
            "`optax.warmup_cosine_decay_schedule`: use `transforms.cosine_schedule` (or `wsd_schedule`, "
            "`polynomial_schedule`, `knot_schedule`), which is differentiable in all of its numbers. In your own code "
            f"use `jnp.where` instead of `if`. JAX: {str(error).splitlines()[0]}"
        ) from error


def check_hyperparams(hyperparams: HyperParams) -> None:
    """Raises ValueError if λ has no leaves, or has a leaf that cannot have a gradient.

    Args:
      hyperparams: λ.

    Raises:
      ValueError: if λ has no leaves, or a leaf is not floating-point.
    """
    leaves = jax.tree_util.tree_leaves_with_path(hyperparams)
    if not leaves:
        raise ValueError("`hyperparams` has no leaves: there is nothing to tune.")
    for path, leaf in leaves:
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            name = f"hyperparams{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"`{name}` has dtype {dtype}, but only floating-point leaves have a gradient. To tune it, write it "
                "as a float (1.0, not 1); otherwise keep it out of λ, for instance in a closure."
            )


def check_labels(name: str, y: Any, num_classes: int, *, mask: Any = None, class_mask: Any = None) -> None:
    """Raises ValueError if the label of a real row is not a class.

    Traced arrays are not checked, because a compiled program cannot raise.

    Args:
      name: the name of the labels in the error message.
      y: [..., N, ...] labels, whole numbers in 0..C-1 or booleans.
      num_classes: C.
      mask: [..., N], where the axes are the first axes of y or all of them. Positive entries mark real rows. None: all
        rows are real.
      class_mask: [..., C], where the leading axes are the first axes of y. Positive entries mark the classes of the
        task. None: the task has every class.

    Raises:
      ValueError: if a label of a real row is below 0, above C - 1 or not a whole number, or `class_mask` excludes its
        class.
    """
    if any(isinstance(x, Tracer) for x in (y, mask, class_mask)):
        return
    y = np.asarray(y)
    y = y.astype(int) if y.dtype == bool else y
    real = np.ones(y.shape, bool)
    if mask is not None:
        mask = np.asarray(mask)
        real = np.broadcast_to((mask > 0).reshape(mask.shape + (1,) * (y.ndim - mask.ndim)), y.shape)
    inside = (y >= 0) & (y < num_classes) & (y == np.floor(y))
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
            f'{name} have classes that "class_mask" excludes: {np.unique(y[real & ~known]).tolist()}. It must be 1 '
            "for every class of the task."
        )


def check_task_labels(name: str, tasks: PyTree) -> None:
    """Raises ValueError if a part of a task has labels "y" that its "class_mask" does not allow.

    Args:
      name: the name of the tasks in the error message.
      tasks: a task, an episode or a batch of them. The check covers each mapping inside it that has "y" [..., N] and
        "class_mask" [..., C]. Only rows with a positive "mask" [..., N] are checked. Floating-point labels are checked
        if they have the shape of "mask"; others may be targets of another kind, such as probabilities.

    Raises:
      ValueError: under the conditions of `check_labels`.
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
        is_label = jnp.issubdtype(dtype, jnp.integer) or (
            jnp.issubdtype(dtype, jnp.floating) and np.shape(mask) == shape
        )
        if not fits or not is_label:
            continue
        if mask is not None and np.shape(mask) != shape[: np.ndim(mask)]:
            continue  # the mask does not mark rows
        labels = f"The labels `{name}{jax.tree_util.keystr(path)}['y']`"
        check_labels(labels, part["y"], classes[-1], mask=mask, class_mask=part["class_mask"])


class Task(NamedTuple):
    """The data of one training run and its evaluation: pytrees of arrays, including masks.

    In a batch of tasks, every leaf has one more leading axis, whose length is the number of tasks. Test data are not
    part of a task. They stay with the experiment, so that nothing can tune on them.

    Attributes:
      train: the data of the inner loss; few-shot learning calls it the support set.
      valid: the data of the outer loss; few-shot learning calls it the query set.
      features: the input of a predictor of λ: meta-features of the task, or None.
    """

    train: Data
    valid: Data
    features: PyTree = None


class Context(NamedTuple):
    """Inputs that a loss may need besides its arguments.

    Attributes:
      key: a fresh PRNG key at every step, for example for dropout or Gumbel noise.
      step: [] int32, the number of inner steps taken so far, for schedules of temperatures and penalties.
      model_state: values that training changes without a gradient, such as batch statistics.
    """

    key: jax.Array
    step: jax.Array
    model_state: PyTree = None


class InitFn(Protocol):
    def __call__(self, key: jax.Array, hyperparams: HyperParams, data: Data) -> InnerState:
        """Starts the training of one task. The inner parameters may come from λ (MAML)."""
        ...


class BatchFn(Protocol):
    def __call__(self, state: InnerState, data: Data) -> Batch:
        """Returns the batch of the next step from `state`. It is pure: the state holds the order of the data."""
        ...


class LossFn(Protocol):
    def __call__(
        self, params: Params, hyperparams: HyperParams, batch: Batch, context: Context
    ) -> tuple[jax.Array, PyTree]:
        """Returns the inner loss ℓ, a scalar, and the new model state."""
        ...


class UpdateFn(Protocol):
    def __call__(self, state: InnerState, grads: Params, model_state: PyTree, hyperparams: HyperParams) -> InnerState:
        """Takes one optimizer step, given the gradient of ℓ."""
        ...


class InnerLoop(NamedTuple):
    """How θ is trained. Make it with `inner.loop`, not by hand; `inner.step` derives a training step from it."""

    init: InitFn
    batch: BatchFn
    loss: LossFn
    update: UpdateFn
    params: Callable[[InnerState], Params]
    context: Callable[[InnerState], Context]


class OuterLossFn(Protocol):
    def __call__(self, params: Params, hyperparams: HyperParams, batch: Batch, context: Context) -> jax.Array:
        """Returns the outer loss f, a scalar."""
        ...


class OuterBatchFn(Protocol):
    def __call__(self, key: jax.Array, task: Task) -> Batch:
        """Returns the data on which f is evaluated: by default all of `task.valid`."""
        ...


class Problem(NamedTuple):
    """An inner loop and the outer loss that judges its result; made by `inner.problem`."""

    loop: InnerLoop
    outer_loss: OuterLossFn
    outer_batch: OuterBatchFn


def reparametrized(problem: Problem, hyperparams_fn: Callable[[HyperParams, Any], HyperParams]) -> Problem:
    """Returns the same problem as a function of other quantities μ, with λ_t = `hyperparams_fn(μ, t)`.

    λ enters a problem in four places: `init`, `loss`, `update` and `outer_loss`. The function is composed into each of
    them. Gradients therefore obey the chain rule, and rules that perturb their input perturb μ. t counts inner steps
    from 0. The initialization receives λ_0, and the outer loss receives the λ of the last step taken.

    Args:
      problem: a problem in λ.
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
    """Returns the entries at `position` of a keyed permutation of 0..size-1, without building the permutation.

    It is a swap-or-not network: in each round, x and (k − x) mod n swap places or not. A hash of the larger of the two
    decides. The cost is a few integer operations per entry, for any size. The size may differ between tasks under vmap.

    Args:
      key: the permutation's key.
      epoch: [...] int; each epoch has its own permutation.
      position: [...] int32, in [0, size).
      size: n, an integer or an array of shape [].

    Returns:
      [...] int32.

    Source: Hoang, Morris & Rogaway, CRYPTO 2012, https://arxiv.org/abs/1208.1176
    """
    size = jnp.asarray(size, jnp.uint32)
    seed = jax.random.bits(key, (2,), jnp.uint32)
    # From 12 rounds on, the statistics of 64 rows among 5,000 equal those of true permutations. We use twice as many.
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
    """The result of one call of an estimator.

    Attributes:
      value: [] the outer loss F(λ).
      hypergrad: dF/dλ, shaped like λ.
      done: [] bool (one per task after `over_tasks`), whether the horizon has ended. If so, the caller may give this
        slot a new task and a fresh state.
      metrics: a flat dict of residuals, norms and counts, for inspection only; it is never carried to the next call.
    """

    value: jax.Array
    hypergrad: HyperParams
    done: PyTree
    metrics: dict[str, jax.Array]


class EstimatorInitFn(Protocol):
    def __call__(self, key: jax.Array, hyperparams: HyperParams, task: Task) -> EstimatorState:
        """Returns everything that is carried between calls: inner state, adjoint, key."""
        ...


class EstimateFn(Protocol):
    def __call__(self, hyperparams: HyperParams, task: Task, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        """Returns one estimate of F and dF/dλ, and the state after it."""
        ...


ESTIMATOR_KINDS = ("exact", "biased", "unbiased", "pseudo")


class Estimator(NamedTuple):
    """A method that estimates dF/dλ.

    Attributes:
      init: `(key, hyperparams, task) -> state`.
      estimate: `(hyperparams, task, state) -> (Estimate, state)`.
      kind: the kind of the hypergradient, which determines the test battery that it must pass. "exact": the derivative
        of `value`, from the same state. "biased": a truncation, an approximation, or exact only in a limit; the
        docstring states which. "unbiased": correct on average. "pseudo": a direction that is not a gradient of F, such
        as Reptile's.
    """

    init: EstimatorInitFn
    estimate: EstimateFn
    kind: str


def check_estimator(estimator: Any, *, or_function: bool = False) -> None:
    """Raises ValueError unless `estimator` is an `Estimator`.

    Args:
      estimator: the value to check.
      or_function: whether a function of the outer step is allowed, too.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(estimator, Estimator) or or_function and callable(estimator):
        return
    instead = "; take its `.estimator`" if isinstance(getattr(estimator, "estimator", None), Estimator) else ""
    function = ", or a function `step -> Estimator`" if or_function else ""
    raise ValueError(f"`estimator` must be a `base.Estimator`{function}; got {type(estimator).__name__}{instead}.")


def as_pandas(name: str, frame: Any) -> Any:
    """Returns a pandas DataFrame, converted if necessary with `to_pandas`, which polars and pyarrow tables have.

    Args:
      name: the argument's name in the error message.
      frame: a `pandas.DataFrame`, or an object with a method `to_pandas` that returns one.

    Returns:
      A `pandas.DataFrame`.

    Raises:
      ValueError: if `frame` is not such a table.
    """
    frame = frame.to_pandas() if callable(getattr(frame, "to_pandas", None)) else frame
    pandas = sys.modules.get("pandas")  # a caller that passes a DataFrame has already imported pandas
    if pandas is None or not isinstance(frame, pandas.DataFrame):
        of = f"{type(frame).__module__}.{type(frame).__qualname__}"
        raise ValueError(f"`{name}` must be a pandas data frame, or have a method `to_pandas`; got {of}.")
    return frame


class Predictor(NamedTuple):
    """A predictor (g or h) that maps a task to λ. Its weights φ are meta-parameters.

    Attributes:
      init: `(key) -> meta_params`.
      apply: `(meta_params, task) -> hyperparams`, for one task.
      config: the arguments that it was built with, as plain values. They are enough to build it again
        (`predictors.save`).
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, Task], HyperParams]
    config: dict[str, Any] = {}


class Record(NamedTuple):
    """One trial: its task, its configuration and its outcome. With status "WAITING" it is a trial that is still to run.

    Attributes:
      task: the task's name.
      configuration: λ as plain values, by path (`spaces.names`).
      outcome: the loss, smaller is better; NaN if not known. For a pruned trial, the loss that it had reached.
      fidelity: the requested fraction of the full budget, in (0, 1].
      cost: seconds.
      seed: the trial's seed.
      status: "WAITING", "RUNNING", "COMPLETE", "PRUNED" or "FAIL".
      trial: the trial's number in its search; one trial may have records at several fidelities.
      reason: the cause of a failure: a time limit, a signal, or the text of an exception.
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


STATUSES = ("WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL")  # the valid statuses of a record


def check_record(record: Any, name: str = "A record") -> None:
    """Raises ValueError unless `record` is a valid record of a trial.

    Args:
      record: the value to check.
      name: the record's name in the error message, such as "`records[3]`".

    Raises:
      ValueError: if it is not a `Record`, its task is not a string, or its configuration is not a mapping.
      ValueError: if its status is unknown, its fidelity is not in (0, 1], or its outcome or cost is not a number.
    """
    if not isinstance(record, Record):
        raise ValueError(
            f"{name} must be a `Record`; got {type(record).__name__}. Use `Record(**fields)` for a dict with "
            '"task", "configuration", "outcome" and so on, and `tasks.records_from_frame` for a data frame.'
        )
    if not isinstance(record.task, str):
        raise ValueError(f"{name}'s task must be a string, the name of the task; got {record.task!r}.")
    if not isinstance(record.configuration, Mapping):
        raise ValueError(
            f"{name}'s configuration must be a dict from parameter names to values; got {record.configuration!r}."
        )
    if record.status not in STATUSES:
        raise ValueError(f"{name}'s status must be one of {', '.join(STATUSES)}; got {record.status!r}.")
    for field in ("outcome", "fidelity", "cost"):
        value = getattr(record, field)
        try:
            if not math.isnan(value):
                float(value)
        except (TypeError, OverflowError):
            raise ValueError(f"{name}'s {field} must be a number, or NaN if it is unknown; got {value!r}.") from None
    if not 0 < record.fidelity <= 1:
        raise ValueError(
            f"{name}'s fidelity must lie in (0, 1]; got {record.fidelity!r}. It is a fraction of the full budget, "
            "not a number of epochs."
        )


def is_full_budget(fidelity: float) -> bool:
    """Whether a fidelity is 1 up to rounding: three thirds, or 1 rounded to float32, are the full budget.

    Args:
      fidelity: in (0, 1].

    Returns:
      Whether at most a millionth of the budget is missing. Such a difference is not visible in any outcome.
    """
    return fidelity >= 1 - 1e-6


def rung_of(fidelities: Sequence[float], record: Record, *, own: bool = False) -> int | None:
    """Returns the position of a record's fidelity among the fidelities of a searcher.

    Fidelities are compared up to rounding: float32 stores 1/3 with an error of 3e-8.

    Args:
      fidelities: in (0, 1].
      record: the record of a trial.
      own: whether the searcher requested the trial, so that its fidelity must be one of `fidelities`.

    Returns:
      The position of the nearest fidelity, if the two differ by at most a millionth of the larger one; else None.

    Raises:
      ValueError: if no fidelity is that near and `own` is true.
    """
    rung = min(range(len(fidelities)), key=lambda i: abs(fidelities[i] - record.fidelity))
    if math.isclose(fidelities[rung], record.fidelity, rel_tol=1e-6):
        return rung
    if own:
        raise ValueError(
            f"A trial's fidelity must be one of the searcher's, {[float(f) for f in fidelities]}, to six digits; got "
            f"{record.fidelity!r} for trial {record.trial}. Report a result at the fidelity that `ask` returned, as in "
            "`trial._replace(status=..., outcome=...)`."
        )
    return None


class SearcherInitFn(Protocol):
    def __call__(self, key: jax.Array, space: PyTree) -> PyTree:
        """Returns a searcher's state before the first trial."""
        ...


class AskFn(Protocol):
    def __call__(self, state: PyTree, num: int) -> tuple[list[Record], PyTree]:
        """Returns at most `num` trials to run next ("WAITING", with fidelity and seed), and the state with them."""
        ...


class TellFn(Protocol):
    def __call__(self, state: PyTree, records: Sequence[Record]) -> PyTree:
        """Returns the state after learning the outcomes of earlier trials."""
        ...


class Searcher(NamedTuple):
    """Proposes λ without a gradient, for example for a random forest or a remote training run."""

    init: SearcherInitFn
    ask: AskFn
    tell: TellFn


def check_searcher(searcher: Any) -> None:
    """Raises ValueError unless `searcher` has the functions `init`, `ask` and `tell`.

    Args:
      searcher: the value to check.

    Raises:
      ValueError: if it is not a searcher, for example if it is the factory of a searcher, or a `MetaOptimizer`.
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
