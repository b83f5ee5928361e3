"""The outer step: λ ← λ − optimizer(dF/dλ), with tasks and inner training carried from step to step.

One outer step does the following for every slot of the batch of tasks:

    where done:  task ← a fresh one,  estimator state ← init(λ, task)
    F, dF/dλ, done, estimator state ← estimate(λ, task, estimator state)
    λ ← λ + optimizer.update(dF/dλ)

A slot is `done` when the horizon of its inner training has ended. Other slots keep their task and continue to train.
Both functions are pure: you can jit them, scan them, and vmap them over states.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, _explained, _proposals, _tuned_space, base, spaces
from metaopt._trees import strong as _strong


class LearnerState(NamedTuple):
    """The state of an outer loop. A checkpoint holds all of it, except for tasks that can be drawn again.

    Attributes:
      hyperparams: λ.
      opt_state: the state of the outer optimizer.
      estimator_state: inner states, adjoints, keys; leading axes as `done`.
      tasks: the task of each slot; leading axes as `done`.
      done: [] bool, or [B] for a batch of tasks, or a tree of such arrays for several batches. It marks the slots that
        get a fresh task and a fresh state in the next step.
      step: [] int32, the number of outer steps taken.
      key: the source of the randomness of later steps.
    """

    hyperparams: base.HyperParams
    opt_state: optax.OptState
    estimator_state: base.EstimatorState
    tasks: base.PyTree
    done: base.PyTree
    step: jax.Array
    key: jax.Array


class LearnerInitFn(Protocol):
    def __call__(self, key: jax.Array, hyperparams: base.HyperParams, tasks: base.PyTree) -> LearnerState:
        """Returns the state before the first outer step."""
        ...


class LearnerStepFn(Protocol):
    def __call__(
        self, state: LearnerState, fresh_tasks: base.PyTree = None
    ) -> tuple[LearnerState, dict[str, jax.Array]]:
        """Takes one outer step. Done slots get their `fresh_tasks`, or with None restart on their old task."""
        ...


RecordFn = Callable[[base.HyperParams], base.PyTree]  # λ -> a tree of numbers


class Learner(NamedTuple):
    """An estimator and an outer optimizer, combined; made by `learner`.

    Attributes:
      init: `(key, hyperparams, tasks) -> state`, the state before the first outer step. `state.hyperparams` is λ.
      step: `(state, fresh_tasks=None) -> (state, metrics)`, one outer step; `metrics` is a dict.
    """

    init: LearnerInitFn
    step: LearnerStepFn


def learner(
    estimator: base.Estimator | Callable[[jax.Array], base.Estimator],
    optimizer: optax.GradientTransformation,
    *,
    stagger: int = 1,
    record: RecordFn | None = None,
) -> Learner:
    """Combines an estimator and an outer optimizer into the two pure functions of an outer loop.

    A slot is the place of one task in a batch of tasks. `init(key, hyperparams, tasks)` starts every slot.
    `step(state, fresh_tasks)` first restarts, at the current λ, the slots that the previous estimate marked as `done`.
    Then it estimates dF/dλ, and then it updates λ. `fresh_tasks` have the shapes of the carried tasks; slots that are
    not done ignore theirs. Without `fresh_tasks`, done slots restart on their old task, as needed for tuning on one
    data set. Fresh tasks of other shapes or another structure (for example a batch with other padding) cannot be mixed
    with the carried tasks. Then **every** slot restarts, done or not.

    An outer step whose hypergradient has a non-finite entry, or a squared norm above the largest float, is skipped: λ
    and the optimizer's state stay, the estimator's state advances, and `skipped` is 1. If there is only one task, it
    restarts at the next step.

    Both functions work under `jit`, `vmap` and `lax.scan`. JAX traces an estimate only once for each shape of its
    arguments, even outside `jit`. So a variable that is not an argument, such as a global that the loss reads, must not
    change later. Gradients through both functions are possible as far as the estimator's own functions allow. The state
    may be donated (`jax.jit(step, donate_argnums=0)`) with the same care as in `fit`: the result of `init` may share
    buffers with its arguments.

    Args:
      estimator: an estimator for one task (`done` is []). Or one wrapped by `hypergrad.over_tasks`, for a batch of
        tasks with leading axis B on every leaf ([B]), or for a tuple of such batches (a tuple of [B_i]). The shape of
        each array in `done` must be a prefix of the shapes of the task and state leaves that it governs.
        Or a function `step -> estimator`, for rules with a schedule (MAML++), where step is [] int32, the number of
        outer steps taken. These estimators must take the same λ, and their states must have the same structure.
      optimizer: any optax transform. Its update gets the outer loss F(λ) as the extra argument `value`.
      stagger: E, at least 1. `init` advances slot i of B by ⌊i E / B⌋ estimates, at the initial λ. Slots whose horizon
        is E estimates (`hypergrad.truncated`: T / K) then end at different outer steps, and no horizon is cut short. It
        costs E − 1 estimates at the start. With 1, all slots start together.
      record: `λ -> tree of numbers`, called before each update. Its leaves are added to the metrics, with their paths
        as names ("rate", "decay.conv1"). `lambda z: spaces.to_constrained(space, z)` records λ in natural units. Single
        numbers are also kept in the history of `fit`; arrays only reach its callbacks.

    Returns:
      A `Learner`. Its step has the estimator's metrics, those of `record`, and four more, which replace those of the
      same name: `value` (F before the update), `hypergrad_norm` (not finite if the step was skipped), `num_done` (slots
      that ended here) and `skipped` (0 or 1).

    Raises:
      ValueError: if `optimizer` is not an optax transform.
      ValueError: at trace time, if a leaf of λ is not floating-point, or the tasks are empty or have invalid labels.
      TypeError: (by JAX) at trace time, if the shape of `done` is not a prefix of the shape of a leaf.
      AssertionError: at trace time, if the estimator violates its contract.

    Example:
      >>> def estimate(hyperparams, task, state):
      ...     value, hypergrad = jax.value_and_grad(lambda x: (x - task) ** 2)(hyperparams)
      ...     return base.Estimate(value, hypergrad, jnp.array(True), {}), state
      >>> quadratic = base.Estimator(
      ...     lambda key, hyperparams, task: (), estimate, kind="exact"
      ... )
      >>> init, step = learner(quadratic, optax.sgd(0.25))
      >>> state, metrics = step(init(jax.random.key(0), 3.0, 1.0))
      >>> print(state.hyperparams, metrics["value"])
      2.0 4.0
    """
    _checks.check_optimizer("optimizer", optimizer)
    if isinstance(estimator, base.Estimator):
        # `init` needs the shapes of an estimate, and `step` its program: both come from one trace.
        shared = estimator._replace(estimate=_tuned_space.traced_once(estimator.estimate))
        estimator_at = lambda step: shared
    else:
        estimator_at = estimator
    parts = _Parts(estimator_at, optax.with_extra_args_support(optimizer), stagger, record or (lambda hyperparams: {}))

    def init(key: jax.Array, hyperparams: base.HyperParams, tasks: base.PyTree) -> LearnerState:
        return _init(parts, key, hyperparams, tasks)

    def step(state: LearnerState, fresh_tasks: base.PyTree = None) -> tuple[LearnerState, dict[str, jax.Array]]:
        return _step(parts, state, fresh_tasks)

    return Learner(init, step)


class _Parts(NamedTuple):
    """The arguments of `learner`."""

    estimator_at: Callable[[jax.Array], base.Estimator]
    optimizer: optax.GradientTransformationExtraArgs
    stagger: int
    record: RecordFn


def _init(parts: _Parts, key: jax.Array, hyperparams: base.HyperParams, tasks: base.PyTree) -> LearnerState:
    hyperparams, tasks = check_hyperparams(hyperparams), check_tasks(tasks)
    init_key, key = jax.random.split(key)
    estimator = parts.estimator_at(jnp.int32(0))
    with _explained.tasks(tasks):
        estimator_state = _strong(estimator.init(init_key, hyperparams, tasks))
        estimate, _ = jax.eval_shape(estimator.estimate, hyperparams, tasks, estimator_state)
    done = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), estimate.done)
    if parts.stagger > 1:
        estimator_state, done = _staggered(parts, hyperparams, tasks, estimator_state, done)
    opt_state = _strong(_init_optimizer(parts.optimizer, hyperparams))
    return LearnerState(hyperparams, opt_state, estimator_state, tasks, done, jnp.zeros((), jnp.int32), key)


def _init_optimizer(optimizer: optax.GradientTransformation, hyperparams: base.HyperParams) -> optax.OptState:
    """The optimizer's first state. If labels or masks lack `spaces.Unconstrained`, the error says how to add it."""
    try:
        return optimizer.init(hyperparams)
    except (TypeError, ValueError) as error:
        if isinstance(hyperparams, spaces.Unconstrained):
            error.add_note(
                "The optimizer works in unconstrained coordinates. Its tree of labels or masks must be marked like "
                "them: `spaces.Unconstrained({...})` instead of `{...}`."
            )
        raise


def _staggered(parts: _Parts, hyperparams, tasks, estimator_state, done) -> tuple[base.EstimatorState, base.PyTree]:
    """Advances each slot by its own number of estimates, at the first start only; renewed slots start at 0."""

    def advance(i, carry):
        estimator_state, done = carry
        estimate, new_state = parts.estimator_at(jnp.int32(0)).estimate(hyperparams, tasks, estimator_state)

        def moves(done):
            ahead = jnp.arange(done.size) * parts.stagger // done.size
            return (i < ahead.reshape(done.shape)) & ~done

        moving = jax.tree.map(moves, done)
        ended = jax.tree.map(lambda done, moving, ends: done | (moving & ends), done, moving, estimate.done)
        return _select(moving, _strong(new_state), estimator_state), ended

    return jax.lax.fori_loop(0, parts.stagger - 1, advance, (estimator_state, done))


def _step(parts: _Parts, state: LearnerState, fresh_tasks: base.PyTree) -> tuple[LearnerState, dict[str, jax.Array]]:
    fresh_tasks = state.tasks if fresh_tasks is None else check_tasks(fresh_tasks)
    if not same_types(fresh_tasks, state.tasks):
        state = restart(functools.partial(_init, parts), state, fresh_tasks)
    hyperparams, done = state.hyperparams, state.done
    estimator = parts.estimator_at(state.step)
    init_key, key = jax.random.split(state.key)

    def renew(tasks, estimator_state):
        fresh_state = _strong(estimator.init(init_key, hyperparams, fresh_tasks))
        return _select(done, fresh_tasks, tasks), _select(done, fresh_state, estimator_state)

    def keep(*carried):
        return carried

    tasks, estimator_state = jax.lax.cond(num_true(done) > 0, renew, keep, state.tasks, state.estimator_state)
    estimate, new_estimator_state = estimator.estimate(hyperparams, tasks, estimator_state)
    _check_estimate(estimate, hyperparams, new_estimator_state, estimator_state)
    norm = optax.tree.norm(estimate.hypergrad)
    # If a squared entry overflows, an optimizer such as Adam divides by infinity, and λ does not move.
    finite = all_finite(estimate.hypergrad) & jnp.isfinite(norm)
    recorded = jax.tree_util.tree_leaves_with_path(parts.record(hyperparams))
    hyperparams, opt_state = _updated(parts.optimizer, estimate, hyperparams, state.opt_state, finite)
    # A single task that diverged would never recover. In a batch, `over_tasks` ends such slots.
    ended = estimate.done
    if isinstance(ended, jax.Array) and ended.ndim == 0:
        ended = ended | ~finite | ~jnp.isfinite(estimate.value)
    metrics = {
        **estimate.metrics,
        **{jax.tree_util.keystr(path, simple=True, separator=".") or "hyperparams": leaf for path, leaf in recorded},
        "value": estimate.value,
        "hypergrad_norm": norm,
        "num_done": num_true(ended),
        "skipped": jnp.logical_not(finite).astype(jnp.int32),
    }
    new_state = LearnerState(hyperparams, opt_state, new_estimator_state, tasks, ended, state.step + 1, key)
    return _strong(new_state), metrics


def _updated(optimizer, estimate: base.Estimate, hyperparams, opt_state, finite: jax.Array):
    """λ and the optimizer's state after an update, or unchanged if the hypergradient is not finite."""
    # Zeros, so that the branch that is not taken does not put NaN into a gradient through this step.
    hypergrad = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), estimate.hypergrad)
    updates, new_opt_state = optimizer.update(hypergrad, opt_state, hyperparams, value=estimate.value)
    updated = (optax.apply_updates(hyperparams, updates), new_opt_state)
    return _select(finite, updated, (hyperparams, opt_state))


def restart(init: LearnerInitFn, state: LearnerState, tasks: base.PyTree) -> LearnerState:
    """Returns `state` with every slot restarted on `tasks`; λ and the outer optimizer's state stay."""
    fresh = init(state.key, state.hyperparams, tasks)
    return fresh._replace(opt_state=state.opt_state, step=state.step)


def check_hyperparams(hyperparams: base.HyperParams) -> base.HyperParams:
    """Returns λ as arrays. Raises ValueError if it has a spread, or a leaf that cannot have a gradient."""
    _proposals.check_no_spread("`hyperparams`", hyperparams)
    _checks.check_hyperparams(hyperparams)
    return _strong(hyperparams)


def check_tasks(tasks: base.PyTree) -> base.PyTree:
    """Returns the tasks as arrays. Raises ValueError if a leaf is text or empty, or if labels are not classes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tasks):
        name = f"tasks{jax.tree_util.keystr(path)}"
        if _is_text(leaf):
            raise ValueError(
                f"`{name}` must have numbers; got {np.asarray(leaf).dtype}. If these are labels, number the classes: "
                "`names, y = np.unique(labels, return_inverse=True)`, on the labels of all rows together. Then `y` has "
                "the integers 0 to C - 1, and `names` has the C names."
            )
        if jnp.shape(leaf)[:1] == (0,):
            raise ValueError(f"`{name}` has shape {jnp.shape(leaf)}: a batch without tasks, or a task without data.")
    _checks.check_task_labels("tasks", tasks)
    return _strong(tasks)


def _is_text(leaf: Any) -> bool:
    """Whether a leaf is text, or an array of text or of Python objects, which JAX cannot hold."""
    return isinstance(leaf, str | bytes | np.ndarray) and np.asarray(leaf).dtype.kind in "OSU"


def same_types(a: base.PyTree, b: base.PyTree) -> bool:
    """Whether two trees of arrays have the same structure, shapes and dtypes."""
    types_a, types_b = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and types_a == types_b


def num_true(tree: base.PyTree) -> jax.Array:
    """[] int32, the number of true entries in a tree of bool arrays."""
    return sum((jnp.sum(x, dtype=jnp.int32) for x in jax.tree.leaves(tree)), start=jnp.zeros((), jnp.int32))


def all_finite(tree: base.PyTree) -> jax.Array:
    """[] bool, whether every entry of every leaf is finite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _select(done: base.PyTree, new: base.PyTree, old: base.PyTree) -> base.PyTree:
    """Returns `new` in the slots that are done, and `old` in the others; also for typed PRNG keys."""

    def select(mask, new_leaf, old_leaf):
        mask = mask.reshape(mask.shape + (1,) * (old_leaf.ndim - mask.ndim))
        return jnp.where(mask, new_leaf, old_leaf)

    def select_below(mask, new, old):
        return jax.tree.map(lambda *leaves: select(mask, *leaves), new, old)

    return jax.tree.map(select_below, done, new, old)


def _check_estimate(estimate, hyperparams, new_state, old_state):
    chex.assert_shape(estimate.value, ())
    chex.assert_trees_all_equal_shapes(estimate.hypergrad, hyperparams)
    chex.assert_type(jax.tree.leaves(estimate.done), bool)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, old_state)
