"""Checks that several subpackages need. Checks of arguments raise a ValueError that names the argument and the fix."""

import logging
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _trees, base
from metaopt._jaxpr import Tracer

_LOGGER = logging.getLogger("metaopt")


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
        is_array = isinstance(value, jax.Array) and not isinstance(value, Tracer)
        number = np.asarray(value) if is_array else value  # within jit, JAX would trace the comparison
        is_valid = number >= 0 if zero else number > 0
    except TypeError:  # not a number
        is_valid = False
    if not is_valid:
        wanted = f"{'at least 0' if zero else 'positive'}{', or None' if optional else ''}"
        raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")


def check_problem(problem: Any) -> None:
    """Checks that a problem has an inner loop.

    Args:
      problem: the argument `problem`.

    Raises:
      ValueError: if it is not a `base.Problem`, for example an estimator or a loss.
    """
    if not isinstance(problem, base.Problem):
        raise ValueError(
            f"`problem` must be a `base.Problem`, such as that of `inner.problem`; got {type(problem).__name__}. "
            "A loss that trains in a loop of its own has no such problem: use `hypergrad.check` with the estimator of "
            "`hypergrad.direct`."
        )


def named(options: Mapping[str, Any], key: str, name: str) -> Any:
    """`options[key]`; the KeyError of an unknown key lists the names of the options.

    Args:
      options: the values by name.
      key: the name of one of them.
      name: the argument that has the key, for the message.

    Returns:
      The value.

    Raises:
      KeyError: if the key is not a name of the options.
    """
    try:
        return options[key]
    except KeyError as error:
        error.add_note(f"{name} must be one of {', '.join(sorted(options)) or '(none)'}.")
        raise


def checked_key(key: Any, name: str = "key") -> jax.Array:
    """Checks a random key.

    Args:
      key: a key of `jax.random.key`, or an array of uint32 as `jax.random.PRNGKey` returns it.
      name: the argument's name in the error message.

    Returns:
      The key.

    Raises:
      ValueError: if `key` is not such an array; a seed, for example, is not.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32):
        seed = int(key) if isinstance(key, int | np.integer) and not isinstance(key, bool) else 0
        raise ValueError(f"`{name}` must be a random key, such as `jax.random.key({seed})`; got {key!r}.")
    return key


def is_finite(x: np.ndarray) -> np.ndarray:
    """Returns which entries are finite in the type that JAX gives them: float32 instead of float64, by default.

    Args:
      x: floating-point or complex numbers.

    Returns:
      A bool array of the same shape.
    """
    with np.errstate(over="ignore"):
        return np.isfinite(x.astype(jax.dtypes.canonicalize_dtype(x.dtype)))


def check_optimizer(name: str, optimizer: Any) -> None:
    """Raises ValueError unless `optimizer` is an optax transform.

    Args:
      name: the argument's name in the error message.
      optimizer: the value to check.

    Raises:
      ValueError: if it has no `init` and `update`, as a rate has none.
    """
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise ValueError(f"`{name}` must be an optax transform, such as `optax.adam(0.1)`; got {optimizer!r}.")


def check_hyperparams(hyperparams: base.HyperParams) -> None:
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


LABELS_ADVICE = (
    "Labels are 0 to C - 1 for C classes: subtract the smallest label, or use "
    "`np.unique(labels, return_inverse=True)[1]` on the labels of all rows together. If there are more classes, "
    "increase C (`num_outputs` of a network)."
)


def check_labels(name: str, y: Any, num_classes: int, *, mask: Any = None, class_mask: Any = None) -> None:
    """Raises ValueError if the label of a real row is not a class.

    Traced arrays are not checked, because a compiled program cannot raise. Neither are arrays of which other processes
    hold a part.

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
    if not all(map(_is_readable, (y, mask, class_mask))):
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
            f"{int((real & ~inside).sum())} of {int(real.sum())} outside. {LABELS_ADVICE}"
        )
    if class_mask is None:
        return
    class_mask = np.asarray(class_mask)
    class_index = np.where(inside, y, 0).astype(int).reshape(*class_mask.shape[:-1], -1)
    allowed = (np.take_along_axis(class_mask, class_index, axis=-1) > 0).reshape(y.shape)
    if (real & ~allowed).any():
        raise ValueError(
            f'{name} have classes that "class_mask" excludes: {np.unique(y[real & ~allowed]).tolist()}. It must be 1 '
            "for every class of the task."
        )


def check_task_labels(name: str, tasks: base.PyTree) -> None:
    """Raises ValueError if a part of a task has labels "y" that its "class_mask" does not allow.

    Args:
      name: the name of the tasks in the error message.
      tasks: a task, an episode or a batch of them. The check covers each mapping inside it that has "y" [..., N] and
        "class_mask" [..., C]. Only rows with a positive "mask" [..., N] are checked. Floating-point labels are checked
        if they have the shape of "mask"; others may be targets of another kind, such as probabilities.

    Raises:
      ValueError: under the conditions of `check_labels`.
    """
    for path, part in _parts_with_labels(tasks, with_classes=True):
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


def has_unchecked_labels(tasks: base.PyTree) -> bool:
    """Whether labels of a task are integers that `check_task_labels` does not check, because there is no "class_mask".

    Only the estimator knows the classes of such labels.

    Args:
      tasks: a task or a batch of tasks, as arrays.

    Returns:
      Whether a mapping inside it has integers as "y" and no "class_mask". Labels of which other processes hold a part
      do not count.
    """
    labels = [part["y"] for _, part in _parts_with_labels(tasks, with_classes=False)]
    is_integer = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer)
    return any(is_integer(y) and _is_readable(y) for y in labels)


_LARGEST_SCALED = 2  # of images without negative values; standardized images have negative values


def warn_of_unscaled_images(name: str, x: Any) -> None:
    """Warns if images have values that nobody has scaled, such as pixels from 0 to 255.

    Traced arrays are not checked. Neither are arrays of which other processes hold a part, and complex arrays.

    Args:
      name: the name of the images in the warning.
      x: [N, height, width, ...]. Values with fewer axes pass, and so do trees.
    """
    if not isinstance(x, np.ndarray | jax.Array) or not _is_readable(x) or x.ndim < 3 or not x.size:
        return
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        return
    with jax.ensure_compile_time_eval():  # JAX may be tracing a function that closes over `x`
        low, high = float(x.min()), float(x.max())
    if low >= 0 and high > _LARGEST_SCALED:
        warnings.warn(
            f"{name} has values from {low:g} to {high:g}. If these are images, a network usually learns better from "
            "values from 0 to 1. Divide by the largest possible value, such as 255, unless your code does so later.",
            stacklevel=4,  # the caller of a sampler's factory
        )


def _parts_with_labels(tasks: base.PyTree, *, with_classes: bool) -> list[tuple[Any, Mapping[str, Any]]]:
    """The mappings with "y" inside a tree that have a "class_mask", or those that have none, with their paths."""
    is_part = lambda x: isinstance(x, Mapping) and "y" in x and ("class_mask" in x) == with_classes
    leaves = jax.tree_util.tree_leaves_with_path(tasks, is_leaf=is_part)
    return [(path, leaf) for path, leaf in leaves if is_part(leaf)]


def _is_readable(x: Any) -> bool:
    """Whether this process has all values of an array, which is then neither traced nor split over processes."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


_REST_TOLERANCE = 0.3  # limit of ‖∇θ ℓ‖ / ‖∂f/∂θ‖
REST_ADVICE = (
    "Take more inner steps per estimate (`num_steps`) or a better inner optimizer, or use `hypergrad.unrolled`, which "
    "needs no stationary point. Minibatch noise also counts as distance from the stationary point; an implicit rule "
    "with `batch='full'` has no such noise."
)


def far_from_rest(metrics: Mapping[str, Any]) -> list[str]:
    """Finds implicit rules that ran far from a stationary point of ℓ, where their hypergradient is biased.

    θ differs from the stationary point by about A⁻¹ ∇θ ℓ, where A is the Hessian of the inner loss ℓ. This changes
    ∂f/∂θ, the right-hand side of the linear system, by (∂²f/∂θ²) A⁻¹ ∇θ ℓ. If f and ℓ have about the same curvature
    (one loss on two data sets), this change is ∇θ ℓ. So ‖∇θ ℓ‖ / ‖∂f/∂θ‖ estimates the relative error of the
    hypergradient. The ratio does not depend on the unit of the loss. Its limit is 0.3.

    Args:
      metrics: scalars by name: the metrics of an estimate, or their means over some steps. The function compares
        "inner_grad_norm" and "outer_grad_shift", if present, with "outer_grad_norm". The names may have the prefixes of
        `hypergrad.partition`. The metrics of rules that are not implicit do not have these pairs.

    Returns:
      One sentence for each such rule; `REST_ADVICE` lists the remedies.
    """
    sentences = []
    for name in metrics:
        prefix = name.removesuffix("inner_grad_norm").removesuffix("outer_grad_shift")
        change, outer_norm = float(metrics[name]), float(metrics.get(f"{prefix}outer_grad_norm", math.nan))
        if prefix != name and change > _REST_TOLERANCE * outer_norm:
            sentences.append(
                f"An implicit rule runs far from a stationary point of the inner loss, so that its hypergradient is "
                f"biased: `{name}` is {change:.3g} and `{prefix}outer_grad_norm` is {outer_norm:.3g}."
            )
    return sentences


def useless_solves(metrics: Mapping[str, Any]) -> list[str]:
    """Finds implicit rules whose linear solve left a residual that is larger than that of no solve.

    The solve A v = b starts with the residual ‖b‖ at v = 0. A larger residual has two possible reasons. If A is not
    positive definite, as in a network with BatchNorm, v may be useless, and the sign may be wrong. If A is positive
    definite but badly conditioned, conjugate gradients that stop early may leave several times ‖b‖ with a
    good v. The residual does not tell which. So the limit is 1.1 ‖b‖, and the sentence names both reasons.

    Args:
      metrics: as for `far_from_rest`. The function compares "adjoint_residual" with "outer_grad_norm", which is ‖b‖.

    Returns:
      One sentence with the remedies for each such rule.
    """
    sentences = []
    for name in metrics:
        prefix = name.removesuffix("adjoint_residual")
        residual, norm = float(metrics[name]), float(metrics.get(f"{prefix}outer_grad_norm", math.nan))
        if prefix != name and residual > 1.1 * norm:
            sentences.append(
                f"The linear solve of an implicit rule left a larger residual than no solve: `{name}` is "
                f"{residual:.3g}, and without a solve it is {norm:.3g}. So the hypergradient may have a wrong sign or "
                "size. First increase the solver's `num_steps` about tenfold: if the residual then falls, the solve "
                "only stopped too early. If it does not, the matrix may not be positive definite, as that of a network "
                "with BatchNorm, or with few inner steps. Then pass `gauss_newton=` or a larger `damping`, or use "
                "`hypergrad.unrolled`. If the solver has a step size (`adjoint_rate`), lower it."
            )
    return sentences


def warnings_of_implicit_rules(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Joins the sentences of `far_from_rest` with their remedies, and those of `useless_solves`.

    Args:
      metrics: as for `far_from_rest`.

    Returns:
      {"rest": text, "solve": text}, without a warning that has no sentences.
    """
    far = far_from_rest(metrics)
    sentences = {"rest": [*far, *[REST_ADVICE] * bool(far)], "solve": useless_solves(metrics)}
    return {name: " ".join(texts) for name, texts in sentences.items() if texts}


def check_record(record: Any, name: str = "A record") -> None:
    """Raises ValueError unless `record` is a valid record of a trial.

    Args:
      record: the value to check.
      name: the record's name in the error message, such as "`records[3]`".

    Raises:
      ValueError: if it is not a `Record`, its task is not a string, or its configuration is not a mapping.
      ValueError: if its status is unknown, its fidelity is not in (0, 1], or its outcome or cost is not a number.
      ValueError: if its outcomes are neither None nor a dict of numbers whose first one is the outcome.
    """
    if not isinstance(record, base.Record):
        raise ValueError(
            f"{name} must be a `Record`; got {type(record).__name__}. Use `Record(**fields)` for a dict with "
            '"task", "configuration", "outcome" and so on, and `blackbox.records_from_frame` for a data frame.'
        )
    if not isinstance(record.task, str):
        raise ValueError(f"{name}'s task must be a string, the name of the task; got {record.task!r}.")
    if not isinstance(record.configuration, Mapping):
        raise ValueError(
            f"{name}'s configuration must be a dict from parameter names to values; got {record.configuration!r}."
        )
    if record.status not in base.STATUSES:
        raise ValueError(f"{name}'s status must be one of {', '.join(base.STATUSES)}; got {record.status!r}.")
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
    if record.outcomes is not None and not _are_outcomes(record.outcomes, record.outcome):
        raise ValueError(
            f"{name}'s outcomes must be None or a dict from names to numbers, the first of which is its outcome, "
            f"{record.outcome!r}; got {record.outcomes!r}."
        )


def _are_outcomes(outcomes: Any, first: float) -> bool:
    try:
        numbers = [float(value) for value in outcomes.values()]
    except (AttributeError, TypeError, ValueError, OverflowError):
        return False
    has_names = bool(numbers) and all(isinstance(name, str) for name in outcomes)
    return has_names and (numbers[0] == first or (math.isnan(numbers[0]) and math.isnan(first)))


def constant_state_logged_once() -> Callable[..., None]:
    """Makes a function that logs a warning, once, if a model state with floating-point leaves stays constant.

    Returns:
      A function of the model state, and whether the loss returned it. It logs at its first call with such a leaf.
    """
    logged = []

    def log(model_state, *, is_returned):
        leaves = jax.tree_util.tree_leaves_with_path(model_state)
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        paths = [name(path) for path, leaf in leaves if _trees.is_inexact(leaf)]
        wrong, remedy = "no model state", "Return the pair (loss, model_state) from the inner loss."
        if is_returned:
            wrong, remedy = "its model state unchanged", "Call the network in its training mode (`train=True`)."
        if paths and not logged:
            logged.append(True)
            _LOGGER.warning(
                "The inner loss returns %s, so the model state keeps its starting values (%s). With BatchNorm, the "
                "outer loss then uses wrong running statistics. %s To keep the state constant, return (loss, "
                "context.model_state).",
                wrong,
                ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else ""),
                remedy,
            )

    return log
