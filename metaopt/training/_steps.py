"""The programs of a run: they draw tasks and take one or several outer steps. Each is compiled once for its shapes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metaopt import _checks, _tuned_space, base
from metaopt._progress import Report
from metaopt.training import _learner, _processes, _program
from metaopt.training._learner import LearnerState
from metaopt.training._run import Run, owned

SampleTasksFn = Callable[[jax.Array], base.PyTree]  # key -> tasks


class Steps:
    """Draws tasks, and holds the compiled programs of a run: for the initial state, one step, and several steps."""

    def __init__(self, learner, sample_tasks, keys, hyperparams, steps_per_call, space=None, donate=True):
        _check_functions(learner, sample_tasks)
        init_key, self.sample_key = keys
        # A `Partial` is an argument of the program, so that its arrays (`tasks.episodes`) are not compiled into it.
        self.sampler = sample_tasks if isinstance(sample_tasks, Partial) else Partial(sample_tasks)
        self.start = init_key, hyperparams
        self.init = jax.jit(learner.init)
        self.learner_init, self.learner_step, self.space = learner.init, learner.step, space
        self.step = jax.jit(learner.step, donate_argnums=0 if donate else ())
        self.several = _several_steps(learner.step, self.sample_key, steps_per_call, donate)
        self.drawn: int | None = None  # the step for which `tasks` were drawn
        self.tasks: base.PyTree = None
        self.types: tuple = ()  # of `tasks`
        self.compiled: set = set()
        self.descriptions: dict = {}

    def draw(self, step: int) -> base.PyTree:
        """The tasks of a step. The tasks drawn last are not drawn again."""
        if step != self.drawn:
            self.tasks = self.drawn_for(step)
            self.drawn, self.types = step, _types(self.tasks)
        return self.tasks

    def drawn_for(self, step: int) -> base.PyTree:
        """The tasks of a step, as `draw` returns them. `self.tasks`, which the next call uses, does not change."""
        return self.tasks if step == self.drawn else _processes.in_all(_draw, self.sampler, self.sample_key, step)

    def first(self, report: Report) -> Run:
        """The run before its first step."""
        with report.during("drawing tasks"):
            args = (*self.start, self.draw(0))
        with report.compiling("the initial state"):
            _processes.in_all(self._show_labels)  # in all, also if only some processes can read the labels
            _compile(self.init, args, [])
        state = owned(self.init(*args))
        return Run(state, self.start[1], {}, [], step=0, drawn=0, any_done=_any(state.done))

    def _show_labels(self) -> None:
        """Traces the initial state once with the arrays of the first tasks, so that an estimator can check labels.

        The program itself has the tasks as arguments. Their values are not known while JAX traces it, and a compiled
        program cannot raise.
        """
        if not _checks.has_unchecked_labels(self.tasks):
            return
        jax.eval_shape(lambda *start: self.learner_init(*start, self.tasks), *self.start)

    def next_call(self, run: Run, num: int, report: Report) -> tuple[Callable, tuple, int]:
        """The program for the next `num` steps, its arguments, and the last step for which tasks were drawn."""
        state, drawn = run.state, run.drawn
        if num > 1:
            return self.several, (state, run.step, num, self.sampler), run.step + num - 1
        if run.any_done:
            tasks, drawn = self.draw(run.step), run.step
            if not _learner.same_types(tasks, state.tasks):
                _check_all_done(state, tasks)
                with report.compiling("the initial state"):
                    state = owned(_learner.restart(self.init, state, tasks))
        return self.step, (state, self.tasks), drawn

    def compile(self, program: Callable, args: tuple, num: int, received: Sequence[int], report: Report) -> bool:
        """Compiles a program for arguments of new shapes. Returns False if it was already compiled."""
        kind = (num, self.types)
        if kind in self.compiled:
            return False
        with report.compiling("one step" if num == 1 else f"{num} steps"):
            with _tuned_space.recording(self.learner_step):
                _compile(program, args, received)
        _tuned_space.check(self.learner_step, self.space)
        self.compiled.add(kind)
        return True

    def traced_init(self, tasks: base.PyTree, report: Report) -> Any:
        """The trace of the initial state, which JAX keeps. A run that continues only traces the initial state."""
        with report.during("tracing the initial state", compiles=True):
            return self.init.trace(*self.start, tasks)

    def describe(self, state: LearnerState, report: Report) -> dict[str, Any]:
        """Describes the programs for tasks of the shapes in the state. JAX traces them only once."""
        types = _types(state.tasks)
        if types not in self.descriptions:
            traced = {"init": self.traced_init(state.tasks, report)}
            with report.during("tracing one step", compiles=True):
                with _tuned_space.recording(self.learner_step):
                    traced["step"] = self.step.trace(state, state.tasks)
                programs = {name: _program.describe(program.jaxpr) for name, program in traced.items()}
            self.descriptions[types] = {"environment": _program.environment(), **programs}
        return self.descriptions[types]


def _check_functions(learner: Any, sample_tasks: Any) -> None:
    """Raises ValueError if the first two arguments of `fit` are exchanged, or are a task or an estimator."""
    is_learner = all(callable(getattr(learner, name, None)) for name in ("init", "step"))
    if not is_learner or not callable(sample_tasks):
        raise ValueError(
            "The first arguments of `fit` are `learner`, made by `training.learner(estimator, optimizer)`, and "
            f"`sample_tasks`, a function `(key) -> tasks`; got {type(learner).__name__} and "
            f"{type(sample_tasks).__name__}. For fixed tasks, pass `lambda key: tasks`."
        )


def _draw(sample_tasks: SampleTasksFn, key: jax.Array, step: Any) -> base.PyTree:
    return _learner.check_tasks(sample_tasks(jax.random.fold_in(key, step)))


def _several_steps(step: Callable, sample_key: jax.Array, steps_per_call: int, donate: bool) -> Any:
    """`(state, start, num, sample_tasks) -> state, metrics [num]`, a program of `num` steps from step `start` on."""
    step_fn = jax.jit(step, inline=True)  # shares its trace with the program of one step

    @functools.partial(jax.jit, static_argnums=2, donate_argnums=0 if donate else ())
    def several(state, start, num, sample_tasks):
        # Slots that are not done ignore the tasks drawn for them.
        def body(state, step):
            return step_fn(state, _draw(sample_tasks, sample_key, step))

        return jax.lax.scan(body, state, start + jnp.arange(num))

    return several


def _compile(program: Any, args: tuple, received: Sequence[int]) -> None:
    """Traces and compiles, unless a signal arrives in between. JAX keeps the result for the next call."""
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return
    traced = program.trace(*args)
    if not received:
        traced.lower().compile()


def _check_all_done(state: LearnerState, tasks: base.PyTree) -> None:
    done = np.concatenate([np.atleast_1d(_processes.whole(x)).ravel() for x in jax.tree.leaves(state.done)])
    if not done.all():
        drawn, carried = ([x.shape for x in jax.tree.leaves(tree)] for tree in (tasks, state.tasks))
        raise ValueError(
            f"`sample_tasks` returned tasks of shapes {drawn} where {carried} are carried, and "
            f"slots {np.flatnonzero(~done).tolist()} of {done.size} are not done: their tasks and the inner training "
            "carried for them would be lost. Pad every draw to the same shapes, or let all horizons end together."
        )


def _any(done: base.PyTree) -> bool:
    return any(bool(jnp.any(x)) for x in jax.tree.leaves(done))


def _types(tasks: base.PyTree) -> tuple:
    """The structure, shapes and dtypes of tasks."""
    leaves, structure = jax.tree.flatten(tasks)
    return structure, *((x.shape, x.dtype) for x in leaves)
