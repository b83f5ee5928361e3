"""The condition R(x, λ) = 0 at which training rests, shared by the implicit rules.

condition="gradient":  R = ∇θ ℓ(θ, λ)
condition="step":      R = x − Φ(x, λ)        Φ: a training step; x: all floating-point leaves of the inner state
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from metaopt import _checks, _jaxpr, _schedule_free, _trees, base, inner
from metaopt.hypergrad import _refusals, _solvers

CONDITIONS = ("gradient", "step")
BATCHES = ("next", "full")


def check(num_steps: int, damping: float, batch: Any, condition: str) -> None:
    _checks.check_integer("num_steps", num_steps, 0)
    _checks.check_positive("damping", damping, zero=True)
    if not callable(batch) and batch not in BATCHES:
        raise ValueError(f'`batch` must be "next", "full" or a function `(key, data) -> batch`; got {batch!r}.')
    if condition not in CONDITIONS:
        raise ValueError(f"`condition` must be one of {', '.join(map(repr, CONDITIONS))}; got {condition!r}.")


def default_solver(solver: _solvers.Solver | None, condition: str) -> _solvers.Solver:
    if solver is not None:
        return _solvers.checked(solver)
    return _solvers.cg() if condition == "gradient" else _solvers.neumann(num_steps=20, rate=1.0)


def draw(batch: Any, key: jax.Array, loop: base.InnerLoop, state: base.InnerState, data: base.Data) -> base.Batch:
    """The batch on which R is evaluated."""
    if callable(batch):
        return batch(key, data)
    return data if batch == "full" else loop.batch(state, data)


def unknowns(loop: base.InnerLoop, state: base.InnerState, condition: str) -> tuple[Any, Callable]:
    """Returns x, the values that come to rest, and a function `x -> state` that puts x into the state.

    With the condition "gradient", x is θ: the leaves of the state that `loop.iterate` reads. The average of a
    schedule-free optimizer moves along with it. With "step", x contains all leaves that have a derivative: θ, momentum,
    running statistics.
    """
    leaves, structure = jax.tree.flatten(state)
    if condition == "gradient":
        places = jax.tree.leaves(loop.iterate(structure.unflatten(range(len(leaves)))))
        x = loop.iterate(state)
    else:
        places = [i for i, leaf in enumerate(leaves) if _trees.is_inexact(leaf)]
        x = [leaves[place] for place in places]

    def put(x):
        filled = dict(enumerate(leaves)) | dict(zip(places, jax.tree.leaves(x), strict=True))
        new = structure.unflatten(filled[i] for i in range(len(leaves)))
        if condition == "step" or not _schedule_free.states(new):
            return new
        # At rest, all sequences of a schedule-free optimizer are θ.
        return _schedule_free.shifted(new, optax.tree.sub(x, loop.iterate(state)))

    return x, put


def residual_fn(
    loop: base.InnerLoop, put: Callable, state: base.InnerState, data: base.Data, batch: base.Batch, condition: str
) -> Callable:
    """R(x, λ), which is zero when training is at rest."""
    if condition == "gradient":
        context = loop.context(state)
        return lambda params, hyperparams: jax.grad(loop.loss, has_aux=True)(params, hyperparams, batch, context)[0]
    loop_on_batch = loop._replace(batch=lambda state, data: batch)

    def displacement(x, hyperparams):
        after = inner.step(loop_on_batch, put(x), hyperparams, data)
        return optax.tree.sub(x, unknowns(loop, after, condition)[0])

    return displacement


def reason(condition: str, depends: str) -> str:
    """Why an implicit rule cannot estimate the hypergradient of a leaf of λ, and what to use instead."""
    if condition == "step":
        condition_text, other_places, remedy = "a training step", "the initialization", ""
    else:
        condition_text, other_places = "the gradient of the inner loss", "the initialization or the optimizer's update"
        remedy = (
            ', `condition="step"` if the leaf moves the point where the optimizer rests (a decoupled weight decay) and '
            "the optimizer is like SGD, not like Adam"
        )
    return (
        f"neither {condition_text} {depends}, only {other_places} does, and a minimum does not depend on the path to "
        f"it. Use `hypergrad.unrolled` for them{remedy}, or fix them (`spaces.fixed`)."
    )


def refuse_unanswered(
    problem: base.Problem, state: base.InnerState, hyperparams: base.HyperParams, task: base.Task, condition: str
) -> None:
    """Rejects leaves of λ that neither R nor f depends on, such as a rate or an initialization.

    A minimum does not depend on the rate or the initialization that led to it, so the implicit hypergradient of such a
    leaf is zero. F of a finite training run depends on the leaf, so this zero is wrong.

    Args:
      problem: the problem of the implicit rule.
      state: a state of the inner loop; only its shapes matter.
      hyperparams: λ; only its shapes matter.
      task: a task; only its shapes matter.
      condition: "gradient" to test whether ∇θ ℓ depends on λ, or "step" to test whether a training step does.

    Raises:
      ValueError: if there are such leaves; the message names them.
    """
    loop = problem.loop

    def residual(hyperparams, state, data):
        x, put = unknowns(loop, state, condition)
        return residual_fn(loop, put, state, data, loop.batch(state, data), condition)(x, hyperparams)

    in_residual = _jaxpr.used_leaves(residual, hyperparams, state, task.train)
    in_outer = _refusals.entering(problem, state, hyperparams, task, "outer")
    is_answered = {path: used or in_outer[path] for path, used in zip(in_outer, in_residual, strict=True)}
    reason_text = reason(condition, "nor the outer loss depends on them")
    _refusals.refuse_unanswered("An implicit rule", is_answered, reason_text)
