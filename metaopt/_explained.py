"""Explanations of errors that JAX and Python raise inside of functions of the user."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from metaopt import base

NEEDS_A_VALUE = (  # JAX's errors if a program reads the value of a traced array
    jax.errors.ConcretizationTypeError,  # `if`, `float`
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
SCHEDULES = (
    "Some optax schedules do this, for example with `peak_value` of `optax.warmup_cosine_decay_schedule`: use "
    "`transforms.cosine_schedule` (or `wsd_schedule`, `polynomial_schedule`, `knot_schedule`), which is differentiable "
    "in all of its numbers."
)


@contextlib.contextmanager
def schedules(name: str) -> Iterator[None]:
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
    except NEEDS_A_VALUE as error:
        raise ValueError(
            f"`{name}` needs the concrete value of a hyperparameter (in `if`, `float`, `int` or NumPy), but JAX traces "
            f"the hyperparameter, so it has no value. {SCHEDULES} In your own code "
            f"use `jnp.where` instead of `if`. JAX: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def structures(params: base.Params) -> Iterator[None]:
    """Explains JAX's error if a mask or labels of an optimizer do not have the structure of the parameters.

    Args:
      params: the parameters.

    Returns:
      A context manager for the optimizer's `init`.

    Raises:
      ValueError: the same error, with a note.
    """
    try:
        yield
    except ValueError as error:
        if "structure" in str(error):
            error.add_note(
                "The optimizer cannot be initialized with these parameters. A mask or labels must have their "
                f"structure, {str(jax.tree.structure(params))[:300]}; or pass a function that makes them from the "
                "parameters."
            )
        raise


@contextlib.contextmanager
def tasks(task: Any) -> Iterator[None]:
    """Explains Python's error if a rule reads the field of a task that is a dict.

    Args:
      task: the task, or a batch of tasks.

    Returns:
      A context manager for calls of the rule. Some rules (`hypergrad.direct`) take any task, so the type is not checked
      before.

    Raises:
      ValueError: if the task is a mapping, and the calls read `train`, `valid` or `features` of a mapping.
    """
    try:
        yield
    except AttributeError as error:
        if error.name not in base.Task._fields or not isinstance(error.obj, Mapping) or not isinstance(task, Mapping):
            raise
        raise ValueError(
            f"A task must be a `base.Task(train=..., valid=...)`; got a {type(error.obj).__name__} with the keys "
            f"{list(error.obj)}. If they are those of a `Task`, pass `base.Task(**task)`."
        ) from error
