"""Checks of `adaptation`: rates, patterns, λ and tasks of the wrong kind."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metaopt import _checks, tasks
from metaopt._jaxpr import Tracer


def check_pattern(name: str, pattern: Any) -> None:
    """Raises ValueError unless `pattern` is a regular expression."""
    if not isinstance(pattern, (str, re.Pattern)):
        raise ValueError(f'`{name}` must be a regular expression, such as "w2|b2"; got {pattern!r}.')
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{name}` must be a regular expression; got {pattern!r}: {error}.") from error


def check_rate(rate: Any, *, learned: bool) -> None:
    """Raises ValueError if a rate is not a finite number.

    A fixed rate may also be anything else that the optimizer takes, except text.
    """
    for leaf in [rate] if learned else jax.tree.leaves(rate):
        try:
            wrong = isinstance(leaf, (str, bytes)) or not np.isfinite(np.asarray(leaf, float)).all()
        except (TypeError, ValueError):
            wrong = learned and not isinstance(leaf, Tracer)
        if wrong:
            raise ValueError(
                f"`rate` must be a finite number{' where it is learned' if learned else ''}; got {rate!r}."
            )


def check_hyperparams(hyperparams: Any, *names: str) -> None:
    """Raises ValueError if λ lacks one of `names`, which are "init" and possibly "rate"."""
    is_dict = isinstance(hyperparams, Mapping)
    if is_dict and all(name in hyperparams for name in names):
        return
    found = f"a dict of {[*hyperparams]}" if is_dict else type(hyperparams).__name__
    rates = ' and the learned rates as "rate"' if "rate" in names else ""
    other = "Is it from an adaptation whose rates are fixed?" if is_dict and "init" in hyperparams else ""
    raise ValueError(
        f'λ must be a dict with the meta-parameters as "init"{rates}, as `a.hyperparams(meta_params)` returns '
        f"for an adaptation `a`; got {found}. {other or 'Did you pass only the meta-parameters?'}"
    )


def check_one_task(data: Any) -> None:
    """Raises ValueError if a support set has an axis of tasks, or (unless traced) labels that are not its classes.

    With an axis of tasks, all tasks would be treated as one, which is another objective.
    """
    if not isinstance(data, Mapping):
        return
    _checks.check_task_labels("data", data)
    mask, y = (np.shape(data.get(name, ())) for name in ("mask", "y"))
    # An episode has one "num_rows". Without it, labels distinguish a batch from a mask over parts of rows (tokens).
    batch = np.ndim(data["num_rows"]) > 0 if "num_rows" in data else len(mask) == 2 and y[:2] == mask
    if batch:
        raise ValueError(
            f'An adaptation takes one task, whose "mask" is [N], a number for each row; got shape {mask}. Use '
            "`hypergrad.over_tasks` for a batch of tasks. If the mask is for labels with several values per row, give "
            "it another name."
        )


def check_task(task: Any) -> None:
    """Raises ValueError if `task` is an episode."""
    if isinstance(task, tasks.Episode):
        raise ValueError(
            "This estimator takes tasks `base.Task(train, valid)`; got an `Episode`: pass its `.task`. For a sampler "
            "of episodes, use `hypergrad.over_tasks(estimator)` and `tasks.episode_batches(sample, num_tasks)`."
        )
