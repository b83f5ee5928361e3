"""Infers a space from configurations of earlier trials, if the space they were drawn from is not known."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from metaopt.spaces import _factories, _leaves
from metaopt.spaces._configuration import _is_gap
from metaopt.spaces._leaves import Leaf

_MOST_LABELS = 100
_MOST_NUMBERS = 20  # different numbers that become labels next to None; more numbers become a range
# A condition needs this many configurations with the parameter, and as many without it. If 3 of 6 configurations have
# the parameter, they are by chance exactly the 3 with a label in one of C(6, 3) = 20 draws.
_FEWEST = 3


def infer(configurations: Iterable[Mapping[str, Any]]) -> dict[str, Leaf]:
    """Infers the smallest space that contains all given configurations, as far as they determine it.

    - Numbers become a range between the smallest and the largest: an `integer` if all are integers, otherwise an
      `interval`. The range has `log` if all numbers are positive and the largest is more than a hundred times the
      smallest.
    - Texts, booleans, and numbers that occur together with them are labels of a `choice`. Labels are sorted, with None
      first, and the first label is the default.
    - None is a label, too, if a parameter has at most 20 different numbers (2 and 2.0 count as one). For example,
      scikit-learn's `max_depth=None` means no limit, and is not a depth between others.
    - None among more than 20 numbers means that no value was given. It then stands for the default of their range. If
      None has another meaning, replace it by a value.
    - A single value is `fixed`; a single text is a `choice` with one label.
    - Some configurations may lack a parameter. If the label of a choice explains which configurations lack it, the
      parameter is active only for some labels of this choice. No label may occur both with and without the parameter.
      At least three different configurations must have the parameter, and three that have the choice must lack it. With
      fewer, chance would produce such a split more often than once in 20.
    - Otherwise the parameter is unconditional, and a configuration that lacks it counts as having its default.

    Args:
      configurations: plain values by name; NaN is a gap, as in a data frame.

    Returns:
      A flat dict of leaves.

    Raises:
      ValueError: if no configuration has a parameter, or a value is not a number, text, boolean or None.
      ValueError: if labels are equal (1, 1.0 and True), or there are more than a hundred.

    >>> from metaopt import spaces
    >>> tried = [{"kernel": "linear", "C": c} for c in (0.1, 1.0, 10.0)]
    >>> tried += [
    ...     {"kernel": "rbf", "C": 1.0, "gamma": gamma} for gamma in (0.001, 0.1, 1.0)
    ... ]
    >>> space = spaces.infer(tried)
    >>> space["gamma"] == spaces.active_if(
    ...     spaces.interval(0.001, 1.0, log=True), "kernel", ["rbf"]
    ... )
    True
    """
    without_gaps = [
        {name: _plain(name, value) for name, value in c.items() if not _is_gap(value)} for c in configurations
    ]
    values: dict[str, list[Any]] = {}
    for configuration in without_gaps:
        for name, value in configuration.items():
            values.setdefault(name, []).append(value)
    # A data frame turns integers into floats if their column has None. So 2 and 2.0 count as one label. It is an
    # integer if one of them is an integer.
    labels = {
        name: {v: v for v in sorted(column, key=lambda v: isinstance(v, int))}
        for name, column in values.items()
        if _is_numeric(column) and None in column and len(set(column)) <= _MOST_NUMBERS + 1
    }
    # Among many numbers None means that no value was given.
    without_none_label = {name for name, column in values.items() if _is_numeric(column) and name not in labels}
    tried = [
        {n: labels[n][v] if n in labels else v for n, v in c.items() if v is not None or n not in without_none_label}
        for c in without_gaps
    ]
    space = {name: _leaf(name, [c[name] for c in tried if name in c]) for name in values}
    if not space:
        raise ValueError("No configuration has a parameter, so no space can be inferred. Pass `space`.")
    # A configuration that was tried on many tasks counts once.
    different = {tuple(sorted((n, type(v).__name__, repr(v)) for n, v in c.items())): c for c in tried}
    return {name: _where_active(name, leaf, space, list(different.values())) for name, leaf in space.items()}


def _plain(name: str, value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise ValueError(
            f"`{name}` has the value {value!r}, which is not a number, string, boolean or None, so no space can be "
            "inferred. Pass `space`, or remove the parameter."
        )
    return value


def _is_numeric(values: list[Any]) -> bool:
    """Whether there are numbers, and no other values except None."""
    numbers = [value for value in values if value is not None]
    return bool(numbers) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)


def _leaf(name: str, values: list[Any]) -> Leaf:
    if _is_numeric(values) and None not in values:
        low, high = min(values), max(values)
        if low == high:
            return _factories.fixed(low)
        log = low > 0 and high > 100 * low
        if all(isinstance(value, int) for value in values) and max(abs(low), abs(high)) <= 2**24:
            return _factories.integer(low, high, log=log)
        return _factories.interval(low, high, log=log)
    labels = list({(type(value), value): value for value in values}.values())
    all_numeric = _is_numeric(labels)  # computed before the sort, during which the list is empty
    kind = lambda label: "" if all_numeric else type(label).__name__
    labels.sort(key=lambda label: (label is not None, kind(label), label if label is not None else ""))
    if len(labels) == 1 and isinstance(labels[0], bool):
        return _factories.fixed(labels[0])
    if len(labels) > _MOST_LABELS or len(set(labels)) < len(labels):
        fault = f"{len(labels)} labels" if len(labels) > _MOST_LABELS else "labels that are equal (1, 1.0 and True)"
        raise ValueError(f"`{name}` has {fault}, such as {labels[:5]}, so no choice can be inferred. Pass `space`.")
    return _factories.choice(labels)


def _where_active(name: str, leaf: Leaf, space: dict[str, Leaf], tried: list[dict[str, Any]]) -> Leaf:
    """The leaf, with a condition if some configurations lack it and a choice explains which."""
    with_parameter = [configuration for configuration in tried if name in configuration]
    without_parameter = [configuration for configuration in tried if name not in configuration]
    if not without_parameter or len(with_parameter) < _FEWEST:
        return leaf
    # First come the choices that every configuration has.
    parents = [other for other, node in space.items() if isinstance(node, _leaves.Choice) and other != name]
    parents.sort(key=lambda other: sum(other not in configuration for configuration in tried))
    typed_label = lambda configuration, parent: (type(label := configuration.get(parent)), label)  # 1 is not True
    for parent in parents:
        labels_with = {typed_label(c, parent) for c in with_parameter}
        labels_without = [typed_label(c, parent) for c in without_parameter if parent in c]
        explains = len(labels_without) >= _FEWEST and labels_with.isdisjoint(labels_without)
        if explains and all(parent in c for c in with_parameter):
            labels = space[parent].labels  # pyright: ignore[reportAttributeAccessIssue]
            values = [label for label in labels if (type(label), label) in labels_with]
            return _factories.active_if(leaf, parent, values)
    return leaf
