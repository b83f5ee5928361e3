"""Fits the parts of a learned optimizer by gradient steps over earlier tasks (`training.fit`)."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import training
from metaopt._progress import report_progress
from metaopt.blackbox import _surrogates

# `training.fit` compiles the step of a learner once for each shape. We cache learners by `shapes`, so that training on
# other records of the same shapes, or with another key, does not compile again. The cache is small, since a learner's
# compiled programs are freed only with the learner.
keep_learners = functools.lru_cache(maxsize=2)


class Budget(NamedTuple):
    """How long the parts are trained.

    Attributes:
      num_steps: outer steps of the kernel and of the weights of tasks.
      progress: as for `training.fit`.
    """

    num_steps: int
    progress: bool | None


def fit(
    part: str,
    make_learner: Callable[..., training.Learner],
    sample_tasks: Callable[[jax.Array], Any],
    start: Any,
    budget: Budget,
    key: jax.Array,
    *settings: Any,
) -> Any:
    """Trains one part.

    Args:
      part: its name in the log.
      make_learner: `(shapes, *settings) -> Learner`, cached by `keep_learners`.
      sample_tasks: as for `training.fit`.
      start: initial parameters.
      budget: number of steps, and whether to report progress.
      key: the key for `training.fit`.
      *settings: further arguments of `make_learner`.

    Returns:
      Parameters like `start`.
    """
    leaves, structure = jax.tree.flatten((start, sample_tasks(key)))
    learner = make_learner((structure, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)), *settings)
    options = {"hyperparams": start, "num_steps": budget.num_steps, "key": key, "progress": budget.progress}
    with (
        report_progress(None, budget.progress, f"learned {part}") as report,
        report.during(f"learning {part}"),
        _without_the_share(),
    ):
        fitted = training.fit(learner, sample_tasks, **options)
    return fitted.hyperparams


@contextlib.contextmanager
def _without_the_share() -> Iterator[None]:
    """Suppresses the warning of `training.fit` that `logit_share` did not move; callers do not know this parameter.

    For example, it does not move with two tasks: all weight then goes to the other task, whatever the share is.
    """
    logger = logging.getLogger("metaopt.training._advice")
    keep = lambda record: "initial values: logit_share." not in record.getMessage()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def sample_trials(
    trials: Sequence[_surrogates.TaskTrials], num_trials: int, make_task: Callable[..., Any], *, num_tasks: int = 16
) -> Callable[[jax.Array], Any]:
    """Returns `sample_tasks` for `fit`: it stacks `make_task(rng, s, x, y, mask)` of normalized trials of some tasks.

    Args:
      trials: the trials of S tasks.
      num_trials: the maximum number of trials of a task, which are padded to the same number.
      make_task: makes the data of task s in 0..S-1.
      num_tasks: the number of tasks per step.

    Returns:
      A function of a key.
    """
    size = min(num_trials, max(int(np.isfinite(task.y).sum()) for task in trials))

    def sample_tasks(key):
        rng = generator(key)
        batch = []
        for s in rng.integers(len(trials), size=num_tasks):
            y, _ = _surrogates.normalize(trials[s].y)
            rows = rng.permutation(np.flatnonzero(np.isfinite(y)))[:size]
            pad = (0, size - len(rows))
            x, mask = np.pad(trials[s].x[rows], (pad, (0, 0))), np.pad(np.ones(len(rows)), pad)
            batch.append(make_task(rng, s, x, np.pad(y[rows], pad), mask))
        return stack(batch)

    return sample_tasks


def generator(key: jax.Array) -> np.random.Generator:
    """A NumPy generator seeded by a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def stack(batch: Sequence[Any]) -> Any:
    """Stacks trees of NumPy arrays as floating-point JAX arrays."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.result_type(float)), *batch)


def usable_tasks(trials: Sequence[_surrogates.TaskTrials]) -> list[int]:
    """The indices of tasks with at least two finite outcomes."""
    return [s for s, task in enumerate(trials) if np.isfinite(task.y).sum() > 1]
