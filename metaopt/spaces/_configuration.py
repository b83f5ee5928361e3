"""Configurations: λ as plain values, for a black box to run with and for records to keep.

A configuration is a flat dict from names to Python's numbers, strings, booleans and None. It is therefore the same in
JSON, in a database and in Optuna or ConfigSpace.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.spaces._leaves import Choice, Integer, Leaf
from metaopt.spaces._tree import _flatten, _match, _name


def configuration(space: base.PyTree, hyperparams: base.HyperParams) -> dict[str, Any]:
    """Returns λ as plain values by name: integers rounded, choices as labels, inactive quantities omitted.

    Args:
      space: a tree of leaves.
      hyperparams: λ, structured like the space. Integers and choices may be relaxed. It cannot be traced.

    Returns:
      A value for each entry of each active leaf, including fixed leaves. A value is a float (also for each weight of a
      `simplex`), an int, or a label. Names are paths, with an index if a leaf has a shape: `"adam.rate"`, `"mix[0]"`. A
      float has the fewest digits that identify it among the numbers of λ's dtype (0.1, not 0.10000000149), and lies
      within the bounds of its leaf.

    Raises:
      ValueError: if λ does not fit the space, a condition names something that the space does not have, or two leaves
        have the same name.

    >>> import numpy as np
    >>> from metaopt import spaces
    >>> space = {"depth": spaces.integer(1, 8), "loss": spaces.choice(["mse", "mae"])}
    >>> spaces.configuration(space, {"depth": 2.7, "loss": np.array([0.4, 0.6])})
    {'depth': 3, 'loss': 'mae'}
    """
    conditions = _conditions(space)
    plain = {}
    for path, leaf, value in _match(space, hyperparams)[0]:
        array = np.asarray(value)
        for index in np.ndindex(leaf.plain_shape):
            plain[_entry(_name(path), index)] = leaf.to_plain(array[index])
    holds: dict[str, bool] = {}
    for name in conditions:  # parents come first
        holds[name] = all(holds[parent] and plain[parent] in values for parent, values in conditions[name])
    return {name: value for name, value in plain.items() if holds[_leaf_name(name, conditions)]}


def from_configuration(
    space: base.PyTree, configuration: Mapping[str, Any], *, strict: bool = True
) -> base.HyperParams:
    """Reads λ from plain values by name. Missing values, such as those of inactive quantities, get their defaults.

    NaN marks a missing value, as in a row of a data frame, in two cases: if the leaf has a condition, or if `strict` is
    false. For a choice that has None as a label, NaN means None, since a column of numbers cannot hold None.

    Args:
      space: a tree of leaves.
      configuration: plain values by name, as `configuration` returns them. Values of fixed leaves are ignored.
      strict: whether to raise for values that the space does not have: unknown names, unknown labels, numbers out of
        bounds, and non-integers for an integer. If false, unknown names are ignored, numbers out of bounds or between
        integers are kept, and an unknown label gives all labels the same weight. In place of a number, any other value
        (None, "auto", True or NaN) then becomes the default. Use this for records of an earlier version of the space,
        or of other spaces.

    Returns:
      λ, structured like the space, of NumPy arrays of JAX's default floating-point type; a choice is one-hot.

    Raises:
      ValueError: if `strict` and a name or a label is unknown, or a value is not a number (True is not a number here).
      ValueError: if `strict` and a number is out of bounds, or is not an integer for an integer leaf, beyond the
        rounding of float32.
      ValueError: if two leaves of the space have the same name.

    >>> from metaopt import spaces
    >>> space = {
    ...     "depth": spaces.integer(1, 8, default=2),
    ...     "loss": spaces.choice(["mse", "mae"]),
    ... }
    >>> λ = spaces.from_configuration(space, {"loss": "mae"})
    >>> λ["depth"].item(), λ["loss"].tolist()
    (2.0, [0.0, 1.0])
    """
    leaves, treedef = _flatten(space)
    unknown = dict(configuration)
    values, names, gaps = [], [], []
    for path, leaf in leaves:
        value = np.array(_default_value(leaf, jnp.result_type(float)))
        for index in np.ndindex(leaf.plain_shape):
            name = _entry(_name(path), index)
            names.append(name)
            plain = unknown.pop(name, _MISSING)
            if _is_gap(plain) and isinstance(leaf, Choice) and None in leaf.labels:
                plain = None
            if _is_gap(plain) and (leaf.condition or not strict):
                gaps.append(name)
            elif plain is not _MISSING and leaf.tuned:
                try:
                    value[index] = leaf.from_plain(plain, strict)
                except ValueError as error:
                    if not strict:
                        continue
                    raise ValueError(f"The configuration's `{name}` must be {error}; got {plain!r}.") from None
        values.append(value)
    _check_names(names)
    if unknown and strict:
        error = ValueError(
            f"The space has no {', '.join(f'`{name}`' for name in unknown)}; it has "
            f"{', '.join(f'`{name}`' for name in names)}."
        )
        # This is a note, because a searcher shows only the error: it ignores other names in its records.
        error.add_note("Use `from_configuration(strict=False)` to ignore the others.")
        raise error
    hyperparams = treedef.unflatten(values)
    if gaps and strict and (lacking := [name for name in _configuration(space, hyperparams) if name in gaps]):
        raise ValueError(f"The configuration's `{lacking[0]}` is active, and must have a value; got nan.")
    return hyperparams


def complete(space: base.PyTree, configuration: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """Returns a complete configuration: missing values get their defaults, and inactive quantities are omitted.

    A given value is omitted, too, if other given values make it inactive. Records that list all parameters have such
    values.

    Args:
      space: a tree of leaves.
      configuration: plain values by name.
      strict: as for `from_configuration`. If true, a given value also raises if missing values make it inactive. If
        false, `foreign` values are replaced. A label becomes the first label, and a number becomes the bound or the
        nearest integer. A value that is not a number becomes the default.

    Returns:
      A configuration as from `configuration`, but with all digits of the given numbers, which λ in float32 would lose.
      So you can find a record by its configuration.

    Raises:
      ValueError: under the conditions of `from_configuration`.
      ValueError: if `strict` and a given parameter is inactive only because missing parameters are at their defaults.
        Without the error, it would be omitted without notice.

    >>> from metaopt import spaces
    >>> spaces.complete(
    ...     {"rate": spaces.interval(0.0, 1.0), "depth": spaces.integer(1, 9)},
    ...     {"rate": 0.123456789},
    ... )
    {'depth': 5, 'rate': 0.123456789}
    """
    partial = configuration
    completed = _configuration(space, from_configuration(space, partial, strict=strict))
    if strict:
        _check_active(space, partial, completed)
    choices = {_name(path) for path, leaf in _flatten(space)[0] if isinstance(leaf, Choice)}

    def uses_given_number(name, value):  # since λ is rounded; not for labels
        if name in choices or name.rpartition("[")[0] in choices or not isinstance(value, float):
            return False
        return name in partial and _is_number(partial[name]) and math.isclose(partial[name], value, rel_tol=1e-6)

    return {
        name: float(partial[name]) if uses_given_number(name, value) else value for name, value in completed.items()
    }


def foreign(space: base.PyTree, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a configuration whose name is in the space, but whose value the space does not allow.

    Args:
      space: a tree of leaves.
      configuration: plain values by name, of another space or of an earlier version of this one.

    Returns:
      Labels that a choice does not have, numbers out of bounds or between integers, and values that are not numbers
      (True is not a number here) for numerical leaves. None for a numerical leaf is not returned, since it means that
      no value was given. NaN is not returned either, since it marks a gap.

    >>> from metaopt import spaces
    >>> space = {"depth": spaces.integer(1, 8), "loss": spaces.choice(["mse", "mae"])}
    >>> spaces.foreign(space, {"depth": None, "loss": "huber", "rate": 0.1})
    {'loss': 'huber'}
    """
    values = {}
    for path, leaf in _flatten(space)[0]:
        for index in np.ndindex(leaf.plain_shape if leaf.tuned else (0,)):
            name = _entry(_name(path), index)
            value = configuration.get(name, _MISSING)
            if value is _MISSING or _is_gap(value) or (value is None and not isinstance(leaf, Choice)):
                continue
            try:
                leaf.from_plain(value, True)
            except ValueError:
                values[name] = value
    return values


def active(space: base.PyTree, hyperparams: base.HyperParams) -> jax.Array:
    """Returns which dimensions of the encoding are active at λ. It works under `jax.jit` and `jax.vmap`.

    Args:
      space: a tree of leaves.
      hyperparams: λ, structured like the space; relaxed or not.

    Returns:
      [num_dims] bool, ordered like `encode`: whether all conditions of the leaf (`active_if`) hold, and those of its
      parents.

    Raises:
      ValueError: if λ does not fit the space, or a condition names something that the space does not have.

    >>> from metaopt import spaces
    >>> space = {
    ...     "depth": spaces.integer(0, 8),
    ...     "width": spaces.active_if(spaces.integer(1, 64), "depth", range(1, 9)),
    ... }
    >>> spaces.active(space, {"depth": 0, "width": 8}).tolist()
    [True, False]
    """
    conditions = _conditions(space)
    leaves = {_name(path): (leaf, value) for path, leaf, value in _match(space, hyperparams)[0]}
    holds: dict[str, jax.Array] = {}
    for name in conditions:
        is_active = jnp.array(True)
        for parent, values in conditions[name]:
            leaf, value = leaves[parent]
            if isinstance(leaf, Choice):
                number, allowed = jnp.argmax(value), [leaf.labels.index(label) for label in values]
            else:
                number, allowed = leaf.discretize(value), list(values)
            is_active &= holds[parent] & jnp.isin(number, jnp.array(allowed))
        holds[name] = is_active
    parts = [jnp.full(leaf.value_shape, holds[name]) for name, (leaf, _) in leaves.items() if leaf.tuned]
    return jnp.concatenate([jnp.ravel(part) for part in parts]) if parts else jnp.zeros((0,), bool)


_configuration = configuration  # for functions with an argument of the same name
_MISSING = object()


def _is_gap(value) -> bool:
    """Whether a value is NaN, with which data frames fill missing entries of a row."""
    return isinstance(value, (float, np.floating)) and value != value


def _check_active(space, partial: Mapping[str, Any], completed: Mapping[str, Any]) -> None:
    """Raises ValueError if `completed` lacks a given value only because of the default of a missing value."""
    conditions = _conditions(space)

    def failing_conditions(leaf):
        for parent, values in conditions[leaf]:
            if parent not in completed:
                yield from failing_conditions(parent)
            elif completed[parent] not in values:
                yield parent, values

    for name, value in partial.items():
        if name in completed or _is_gap(value):
            continue
        failed = list(failing_conditions(_leaf_name(name, conditions)))
        # If a parent is given, the user has made the parameter inactive on purpose.
        if all(parent not in partial or _is_gap(partial[parent]) for parent, _ in failed):
            parent, values = failed[0]
            raise ValueError(
                f"The configuration's `{name}` is {value!r}, but would be ignored: it is active only if "
                f"`{parent}` is {' or '.join(map(repr, values))}, but `{parent}` is missing and "
                f"{completed[parent]!r} by default. Add `{parent}`, or remove `{name}`."
            )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.lru_cache(maxsize=1024)
def _default_value(leaf: Leaf, dtype) -> np.ndarray:
    """The leaf's default in NumPy, cached per type of λ: thousands of records are read with one space."""
    return np.asarray(leaf.default_value())


def _entry(name: str, index: tuple[int, ...]) -> str:
    return name + (f"[{','.join(map(str, index))}]" if index else "")


def _leaf_name(name: str, conditions) -> str:
    return name if name in conditions else name[: name.rindex("[")]


def _check_names(names: list[str]) -> None:
    """Raises ValueError if two names are equal. {"a.b": ...} and {"a": {"b": ...}} have the same name."""
    duplicates = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if duplicates:
        raise ValueError(f"Two leaves of the space have the same name, {', '.join(duplicates)}: rename one of them.")


def _conditions(space) -> dict[str, tuple[tuple[str, tuple], ...]]:
    """The condition of every leaf by its name, parents before their children. Raises if a condition cannot be met."""
    flat = _flatten(space)[0]
    _check_names([_entry(_name(path), index) for path, leaf in flat for index in np.ndindex(leaf.plain_shape)])
    leaves: dict[str, Leaf] = {_name(path): leaf for path, leaf in flat}
    for name, leaf in leaves.items():
        for parent, values in leaf.condition:
            other = leaves.get(parent)
            if not isinstance(other, (Choice, Integer)) or other.shape:
                raise ValueError(
                    f"The condition of `{name}` names `{parent}`, which must be a `choice` or an `integer` of the "
                    f"space, without shape; got {other!r}."
                )
            allowed = other.labels if isinstance(other, Choice) else range(other.low, other.high + 1)
            if wrong := [value for value in values if value not in allowed]:
                raise ValueError(f"The condition of `{name}` has {wrong[0]!r}, which is not a value of `{parent}`.")
    ordered: dict[str, tuple] = {}
    while len(ordered) < len(leaves):
        ready = [n for n, x in leaves.items() if n not in ordered and all(p in ordered for p, _ in x.condition)]
        if not ready:
            raise ValueError(f"The conditions of {[n for n in leaves if n not in ordered]} depend on one another.")
        ordered.update({name: leaves[name].condition for name in ready})
    return ordered
