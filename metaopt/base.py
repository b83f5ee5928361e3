"""The contract of the library: problems, estimators, tasks and searchers, as pairs of pure functions.

A **problem** consists of an inner loop and an outer loss f. The inner loop trains the parameters θ on the inner loss ℓ.
The outer loss judges the result:

    F(λ) = Σ_t w_t f(θ_t(λ), λ),    θ_{t+1}(λ) = update(θ_t, ∇θ ℓ(θ_t, λ), λ).

An **estimator** estimates dF/dλ. A **task** holds the data of one training run. A **searcher** proposes values of λ
without a gradient.

All of these are plain `NamedTuple`s of functions or arrays, without base classes. λ is any pytree
of floating-point arrays. It is called `hyperparams`, or meta-parameters if it consists of a network's weights.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

PyTree = Any
Params = PyTree  # θ
HyperParams = PyTree  # λ
Batch = PyTree
Data = PyTree
InnerState = PyTree
EstimatorState = PyTree


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
    """The `init` of an `InnerLoop`: `(key, hyperparams, data) -> state`."""

    def __call__(self, key: jax.Array, hyperparams: HyperParams, data: Data) -> InnerState:
        """Starts the training of one task. The inner parameters may come from λ (MAML)."""
        ...


class BatchFn(Protocol):
    """The `batch` of an `InnerLoop`: `(state, data) -> batch`."""

    def __call__(self, state: InnerState, data: Data) -> Batch:
        """Returns the batch of the next step from `state`. It is pure: the state holds the order of the data."""
        ...


class LossFn(Protocol):
    """The `loss` of an `InnerLoop`: `(params, hyperparams, batch, context) -> (ℓ, model_state)`."""

    def __call__(
        self, params: Params, hyperparams: HyperParams, batch: Batch, context: Context
    ) -> tuple[jax.Array, PyTree]:
        """Returns the inner loss ℓ, a scalar, and the new model state."""
        ...


class UpdateFn(Protocol):
    """The `update` of an `InnerLoop`: `(state, grads, model_state, hyperparams) -> state`."""

    def __call__(self, state: InnerState, grads: Params, model_state: PyTree, hyperparams: HyperParams) -> InnerState:
        """Takes one optimizer step, given the gradient of ℓ."""
        ...


class InnerLoop(NamedTuple):
    """How θ is trained. Make it with `inner.loop`, not by hand; `inner.step` derives a training step from it.

    Attributes:
      init: `(key, hyperparams, data) -> state`, the state before the first step. It holds θ, the state of the optimizer
        and the model state.
      batch: `(state, data) -> batch`, the batch of the next step.
      loss: `(params, hyperparams, batch, context) -> (ℓ, model_state)`.
      update: `(state, grads, model_state, hyperparams) -> state`, one step of the optimizer.
      params: `state -> θ`, the parameters that the outer loss judges and that a prediction uses.
      context: `state -> Context`, what a loss or a model needs besides θ: the key of the next step, the number of steps
        taken, and the model state, such as batch statistics. After training, it is the context for a prediction:
        `model.apply(loop.params(state), loop.context(state), x)` (`inner.Model`).
      iterate: `state -> θ`, the parameters at which `update` expects the gradient of ℓ. They are `params`, except for
        schedule-free optimizers, whose `params` are an average.
    """

    init: InitFn
    batch: BatchFn
    loss: LossFn
    update: UpdateFn
    params: Callable[[InnerState], Params]
    context: Callable[[InnerState], Context]
    iterate: Callable[[InnerState], Params]


class OuterLossFn(Protocol):
    """The `outer_loss` of a `Problem`: `(params, hyperparams, batch, context) -> []`."""

    def __call__(self, params: Params, hyperparams: HyperParams, batch: Batch, context: Context) -> jax.Array:
        """Returns the outer loss f, a scalar."""
        ...


class OuterBatchFn(Protocol):
    """The `outer_batch` of a `Problem`: `(key, task) -> batch`, the data on which f is evaluated."""

    def __call__(self, key: jax.Array, task: Task) -> Batch:
        """Returns the data on which f is evaluated: by default all of `task.valid`."""
        ...


class Problem(NamedTuple):
    """An inner loop and the outer loss that judges its result; made by `inner.problem`.

    Attributes:
      loop: trains θ.
      outer_loss: f, `(params, hyperparams, batch, context) -> []`.
      outer_batch: `(key, task) -> batch`, the data on which f is evaluated.
    """

    loop: InnerLoop
    outer_loss: OuterLossFn
    outer_batch: OuterBatchFn


def reparametrized(problem: Problem, hyperparams_fn: Callable[[HyperParams, Any], HyperParams]) -> Problem:
    """Returns the same problem in other quantities μ instead of λ, with λ_t = `hyperparams_fn(μ, t)`.

    λ enters a problem in four places: `init`, `loss`, `update` and `outer_loss`. `hyperparams_fn` is composed into each
    of them. Gradients in μ therefore obey the chain rule, and rules that perturb their input, such as evolution
    strategies, perturb μ. t counts inner steps from 0. The initialization receives λ_0, and the outer loss receives the
    λ of the last inner step.

    Args:
      problem: a problem in λ.
      hyperparams_fn: `(μ, step) -> λ`.

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


class Estimate(NamedTuple):
    """The result of one call of an estimator.

    Attributes:
      value: [] the outer loss F(λ).
      hypergrad: dF/dλ, shaped like λ.
      done: [] bool (one per task after `over_tasks`), whether the horizon has ended. If so, the caller may give this
        slot a new task and a fresh state.
      metrics: a flat dict of residuals, norms and counts; it is never carried to the next call. A rule whose
        hypergradient comes from random perturbations of λ must have the metric "sampling_variance": `hypergrad.check`
        and `hypergrad.recommend` detect such rules by it.
    """

    value: jax.Array
    hypergrad: HyperParams
    done: PyTree
    metrics: dict[str, jax.Array]


class EstimatorInitFn(Protocol):
    """The `init` of an `Estimator`: `(key, hyperparams, task) -> state`."""

    def __call__(self, key: jax.Array, hyperparams: HyperParams, task: Task) -> EstimatorState:
        """Returns everything that is carried between calls: inner state, adjoint, key."""
        ...


class EstimateFn(Protocol):
    """The `estimate` of an `Estimator`: `(hyperparams, task, state) -> (Estimate, state)`."""

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


class Predictor(NamedTuple):
    """A predictor (g or h) that maps a task to λ. Its weights φ are meta-parameters.

    Attributes:
      init: `(key) -> meta_params`.
      apply: `(meta_params, task) -> hyperparams`, for one task.
      config: the arguments that it was built with, as plain values. They are enough to build it again
        (`metaopt.save`).
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, Task], HyperParams]
    config: dict[str, Any] = {}


class Record(NamedTuple):
    """One trial: its task, its configuration and its outcome. With status "WAITING" it is a trial that is still to run.

    Attributes:
      task: the task's name.
      configuration: λ as plain values, by path (`spaces.names`).
      outcome: the loss, smaller is better; NaN if not known. For a pruned trial, the loss that it had reached. If the
        objective returns several outcomes, this is the first one.
      fidelity: the requested fraction of the full budget, in (0, 1].
      cost: seconds.
      seed: the trial's seed.
      status: "WAITING", "RUNNING", "COMPLETE", "PRUNED" or "FAIL".
      trial: the trial's number in its search; one trial may have records at several fidelities.
      reason: the cause of a failure: a time limit, a signal, or the text of an exception.
      outcomes: all outcomes by name, if the objective returns several; otherwise None. Outcomes that are not known for
        a pruned trial are NaN.
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
    outcomes: dict[str, float] | None = None


STATUSES = ("WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL")  # the valid statuses of a record


class SearcherInitFn(Protocol):
    """The `init` of a `Searcher`: `(key, space) -> state`."""

    def __call__(self, key: jax.Array, space: PyTree) -> PyTree:
        """Returns a searcher's state before the first trial."""
        ...


class AskFn(Protocol):
    """The `ask` of a `Searcher`: `(state, num) -> (trials, state)`."""

    def __call__(self, state: PyTree, num: int) -> tuple[list[Record], PyTree]:
        """Returns at most `num` trials to run next ("WAITING", with fidelity and seed), and the state that has them."""
        ...


class TellFn(Protocol):
    """The `tell` of a `Searcher`: `(state, records) -> state`."""

    def __call__(self, state: PyTree, records: Sequence[Record]) -> PyTree:
        """Returns the state after learning the outcomes of earlier trials."""
        ...


class Searcher(NamedTuple):
    """Proposes λ without a gradient, for example for a random forest or a remote training run.

    Attributes:
      init: `(key, space) -> state`, the state before the first trial.
      ask: `(state, num) -> (trials, state)`: at most `num` trials to run next, as records with status "WAITING".
      tell: `(state, records) -> state`, the state after it has learned from trials that have ended. Smaller outcomes
        are better.
    """

    init: SearcherInitFn
    ask: AskFn
    tell: TellFn
