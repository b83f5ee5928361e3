"""A space from configurations that were tried, where nobody has kept the one that they were drawn from."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from metaopt.spaces import _leaves
from metaopt.spaces._configuration import _is_gap
from metaopt.spaces._leaves import Leaf

_MOST_LABELS = 100
_MOST_NUMBERS = 20  # beside None: of more of them, it is their range that is meant
_FEWEST = 3  # with a parameter, and without it: chance finds those of a label in one of C(6, 3) = 20 draws of 3 of 6


def infer(configurations: Iterable[Mapping[str, Any]]) -> dict[str, Leaf]:
    """The smallest space that has all of some configurations, as far as they tell.

    - Numbers lie between the smallest and the largest: an `integer` where all are integers, otherwise an `interval`;
      with `log` where all are positive and the largest is more than a hundred times the smallest.
    - Texts, booleans, and numbers among them are labels of a `choice`, and so is None, also among at most 20 different
      numbers (2 and 2.0 are one): scikit-learn's `max_depth=None` has no limit, and is no depth between others. Among
      more numbers, None says that nothing is given, and is taken to be the default of their range: replace it by what
      it stands for. As the first label None is the default of its choice.
    - One value alone is `fixed`; one text a `choice` of it.
    - A parameter that some configurations lack is active only if a choice has the labels that it has in those that have
      the parameter, where there is a choice that tells, and at least three different configurations have the parameter,
      and three with such a choice lack it: fewer are divided so by chance more often than once in 20. Otherwise it is
      optional as all parameters are: what lacks it is taken to be at its default.

    Args:
      configurations: plain values by name; NaN is a gap, as of a data frame.

    Returns:
      A flat dict of leaves.

    Raises:
      ValueError: there is no parameter; a value is no plain one; labels are equal (1, 1.0 and True) or more than a
        hundred.

    >>> from metaopt import spaces
    >>> tried = [{"kernel": "linear", "C": c} for c in (0.1, 1.0, 10.0)]
    >>> tried += [{"kernel": "rbf", "C": 1.0, "gamma": gamma} for gamma in (0.001, 0.1, 1.0)]
    >>> space = spaces.infer(tried)
    >>> space["gamma"] == spaces.active_if(spaces.interval(0.001, 1.0, log=True), "kernel", ["rbf"])
    True
    """
    tried = [{name: _plain(name, value) for name, value in c.items() if not _is_gap(value)} for c in configurations]
    values: dict[str, list[Any]] = {}
    for configuration in tried:
        for name, value in configuration.items():
            values.setdefault(name, []).append(value)
    # Beside None a data frame has no integers: 2 and 2.0 are one label, an integer where one of them is.
    labels = {
        name: {v: v for v in sorted(found, key=lambda v: isinstance(v, int))}
        for name, found in values.items()
        if _numbers(found) and None in found and len(set(found)) <= _MOST_NUMBERS + 1
    }
    # Among many numbers None says that nothing is given.
    many = {name for name, found in values.items() if _numbers(found) and name not in labels}
    tried = [
        {n: labels[n][v] if n in labels else v for n, v in c.items() if v is not None or n not in many} for c in tried
    ]
    space = {name: _leaf(name, [c[name] for c in tried if name in c]) for name in values}
    if not space:
        raise ValueError("No configuration has a parameter: there is no space to infer. Give `space`.")
    # What is tried on many tasks is one configuration.
    different = {tuple(sorted((n, type(v).__name__, repr(v)) for n, v in c.items())): c for c in tried}
    return {name: _where_active(name, leaf, space, list(different.values())) for name, leaf in space.items()}


def _plain(name: str, value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise ValueError(
            f"`{name}` has the value {value!r}, which is no number, text, boolean or None: no space is inferred of it. "
            "Give `space`, or leave it out."
        )
    return value


def _numbers(found: list[Any]) -> bool:
    """Whether there are numbers, and nothing else but None."""
    given = [value for value in found if value is not None]
    return bool(given) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in given)


def _leaf(name: str, found: list[Any]) -> Leaf:
    if _numbers(found) and None not in found:
        low, high = min(found), max(found)
        if low == high:
            return _leaves.fixed(low)
        log = low > 0 and high > 100 * low
        if all(isinstance(value, int) for value in found) and max(abs(low), abs(high)) <= 2**24:
            return _leaves.integer(low, high, log=log)
        return _leaves.interval(low, high, log=log)
    labels = list({(type(value), value): value for value in found}.values())
    alike = _numbers(labels)  # a list that is being sorted looks empty
    kind = lambda label: "" if alike else type(label).__name__
    labels.sort(key=lambda label: (label is not None, kind(label), label if label is not None else ""))
    if len(labels) == 1 and isinstance(labels[0], bool):
        return _leaves.fixed(labels[0])
    if len(labels) > _MOST_LABELS or len(set(labels)) < len(labels):
        what = f"{len(labels)} labels" if len(labels) > _MOST_LABELS else "labels that are equal (1, 1.0 and True)"
        raise ValueError(f"`{name}` has {what}, {labels[:5]} among them: no choice is inferred of them. Give `space`.")
    return _leaves.choice(labels)


def _where_active(name: str, leaf: Leaf, space: dict[str, Leaf], tried: list[dict[str, Any]]) -> Leaf:
    """The leaf, with a condition where some lack it and a choice tells which."""
    lacking = [name not in configuration for configuration in tried]
    if not any(lacking) or lacking.count(False) < _FEWEST:
        return leaf
    # What is always there comes first.
    parents = [other for other, of in space.items() if isinstance(of, _leaves.Choice) and other != name]
    parents.sort(key=lambda other: sum(other not in configuration for configuration in tried))
    key = lambda configuration, parent: (type(label := configuration.get(parent)), label)
    for parent in parents:
        has = {key(c, parent) for c, without in zip(tried, lacking, strict=True) if not without}
        without = [key(c, parent) for c, without in zip(tried, lacking, strict=True) if without and parent in c]
        told = len(without) >= _FEWEST and not has & set(without)
        if told and all(parent in c for c, out in zip(tried, lacking, strict=True) if not out):
            labels = space[parent].labels  # pyright: ignore[reportAttributeAccessIssue]
            return _leaves.active_if(leaf, parent, [label for label in labels if (type(label), label) in has])
    return leaf
