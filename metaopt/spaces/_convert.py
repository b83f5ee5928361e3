"""Converts spaces to Optuna's distributions and to ConfigSpace's JSON, and back.

Names are those of a configuration. `real` and `positive` have no bounds in metaopt. Here they get the bounds z = ±3,
which contain 99.7 % of their samples. A simplex has no counterpart in Optuna or ConfigSpace.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from metaopt import base
from metaopt.spaces import _factories, _leaves
from metaopt.spaces._configuration import _conditions, _entry
from metaopt.spaces._leaves import Leaf
from metaopt.spaces._tree import _flatten, _name

_MOST_VALUES = 1_000  # limit for an integer in an inequality condition


def to_optuna(space: base.PyTree) -> dict[str, Any]:
    """Returns Optuna's distribution of every tuned entry, by name. Conditions are omitted: Optuna does not have them.

    Args:
      space: a tree of leaves.

    Returns:
      Float, integer and categorical distributions. Parents of conditions come before the parameters that depend on
      them.

    Raises:
      ValueError: if the space has a simplex, or a condition that cannot be met.
      ImportError: if Optuna is not installed.
    """
    from optuna import distributions as optuna

    distributions = {}
    for name, leaf, index in _entries(space):
        if isinstance(leaf, _leaves.Choice):
            distributions[name] = optuna.CategoricalDistribution(leaf.labels)
        elif isinstance(leaf, _leaves.Integer):
            distributions[name] = optuna.IntDistribution(leaf.low, leaf.high, log=leaf.log)
        elif leaf.tuned:
            distributions[name] = optuna.FloatDistribution(*_bounds(name, leaf, index)[:2], log=_is_log(leaf))
    return distributions


def suggest(trial: Any, space: base.PyTree) -> dict[str, Any]:
    """Draws a configuration with Optuna's sampler, inside the objective of a study. It draws only active quantities.

    In a study that already has trials, the names of the space must be those of the study's parameters, as in the space
    that `from_optuna` makes. Otherwise Optuna adds a new parameter to the study, without an error.

    Args:
      trial: an `optuna.Trial`.
      space: a tree of leaves.

    Returns:
      Plain values by name, as from `configuration`.

    Raises:
      ValueError: if the space has a simplex, or a condition that cannot be met.
    """
    configuration: dict[str, Any] = {}
    for name, leaf, index in _entries(space):
        if not all(parent in configuration and configuration[parent] in values for parent, values in leaf.condition):
            continue
        if isinstance(leaf, _leaves.Fixed):
            configuration[name] = leaf.value[index].item()
        elif isinstance(leaf, _leaves.Choice):
            configuration[name] = trial.suggest_categorical(name, leaf.labels)
        else:
            fn = trial.suggest_int if isinstance(leaf, _leaves.Integer) else trial.suggest_float
            configuration[name] = fn(name, *_bounds(name, leaf, index)[:2], log=_is_log(leaf))
    return configuration


def from_optuna(distributions: Mapping[str, Any]) -> dict[str, Leaf]:
    """Makes a space from Optuna's distributions, for example those of a study's trials.

    Args:
      distributions: Optuna's distributions by name. For a study, use
        `{n: d for trial in study.trials for n, d in trial.distributions.items()}`. An integer with a step becomes a
        choice of its values, whose default is the middle one.

    Returns:
      A flat dict of leaves; a distribution of one number becomes a fixed leaf.

    Raises:
      ValueError: if a distribution has no counterpart (such as a float with a step), or an integer with a step has more
        than 1,000 values.
    """
    space: dict[str, Leaf] = {}
    for name, distribution in distributions.items():
        kind = type(distribution).__name__
        if kind == "CategoricalDistribution":
            space[name] = _choice(distribution.choices)
        elif distribution.single():
            space[name] = _factories.fixed(distribution.low)
        elif kind == "IntDistribution" and distribution.step == 1:
            space[name] = _factories.integer(distribution.low, distribution.high, log=distribution.log)
        elif kind == "IntDistribution":
            values = range(distribution.low, distribution.high + 1, distribution.step)
            space[name] = _choice(_convertible_values(name, values), default=values[(len(values) - 1) // 2])
        elif kind == "FloatDistribution" and distribution.step is None:
            space[name] = _factories.interval(distribution.low, distribution.high, log=distribution.log)
        else:
            raise ValueError(f"`{name}` cannot be represented in a space: {distribution}.")
    return space


def to_configspace(space: base.PyTree) -> dict[str, Any]:
    """Returns ConfigSpace's JSON (its format 0.4) of a space, with conditions.

    Args:
      space: a tree of leaves.

    Returns:
      A document for `json.dump`, which `ConfigurationSpace.from_json` reads.

    Raises:
      ValueError: if the space has a simplex, or a condition that cannot be met.
    """
    hyperparameters, conditions = [], []
    for name, leaf, index in _entries(space):
        entry: dict[str, Any] = {"name": name, "meta": None}
        if isinstance(leaf, _leaves.Fixed):
            entry |= {"type": "constant", "value": leaf.value[index].item()}
        elif isinstance(leaf, _leaves.Choice):
            entry |= {"type": "categorical", "choices": list(leaf.labels), "weights": None}
            entry["default_value"] = leaf.default
        else:
            low, high, default = _bounds(name, leaf, index)
            entry |= {
                "type": f"uniform_{'int' if isinstance(leaf, _leaves.Integer) else 'float'}",
                "log": _is_log(leaf),
            }
            entry |= {"lower": low, "upper": high, "default_value": default}
        hyperparameters.append(entry)
        clauses = [
            {"type": "IN", "child": name, "parent": parent, "values": list(values)} for parent, values in leaf.condition
        ]
        conditions += clauses if len(clauses) <= 1 else [{"type": "AND", "child": name, "conditions": clauses}]
    document = {"name": None, "hyperparameters": hyperparameters, "conditions": conditions, "forbiddens": []}
    return document | {"format_version": 0.4}


def from_configspace(document: Mapping[str, Any]) -> dict[str, Leaf]:
    """Makes a space from ConfigSpace's JSON (its format 0.4).

    A normal distribution with bounds becomes uniform between its bounds. An ordinal parameter becomes a choice. The
    weights of a categorical parameter become equal. A constant becomes a fixed leaf or a choice of one label. A float
    default at a bound is moved inside by a millionth of the (log) range. Conditions may be =, ≠, in, <, > and their
    conjunctions.

    Args:
      document: the dict that `ConfigurationSpace.to_json` wrote, as `json.load` returns it.

    Returns:
      A flat dict of leaves.

    Raises:
      ValueError: if `document` has a forbidden clause, a disjunction of conditions, or a parameter without a
        counterpart.
    """
    if document.get("forbiddens"):
        raise ValueError(
            "A space cannot have forbidden clauses; remove them, and let the objective raise for such configurations."
        )
    entries = document["hyperparameters"]
    space = {entry["name"]: _leaf(entry) for entry in entries}
    ordinals = {entry["name"]: list(entry["sequence"]) for entry in entries if entry["type"] == "ordinal"}
    for condition in document.get("conditions", []):
        for part in condition["conditions"] if condition["type"] == "AND" else [condition]:
            space[part.get("child")] = _with_condition(part, space, ordinals)
    _conditions(space)
    return space


def _leaf(entry: Mapping[str, Any]) -> Leaf:
    """The leaf of one of ConfigSpace's hyperparameters."""
    kind, default = entry["type"], entry.get("default_value")
    if entry.get("q") is None:
        if kind in ("constant", "unparametrized"):
            return _choice([entry["value"]])
        if kind in ("categorical", "ordinal"):
            return _choice(entry["choices" if kind == "categorical" else "sequence"], default)
        if kind.endswith(("_int", "_float")) and entry.get("lower") is not None:
            low, high, log = entry["lower"], entry["upper"], entry.get("log", False)
            if kind.endswith("_int"):
                return _factories.integer(low, high, log=log, default=default)
            return _factories.interval(low, high, log=log, default=_inside(low, high, log, default))
    raise ValueError(f"`{entry['name']}` cannot be represented in a space: {entry}.")


def _with_condition(condition: Mapping[str, Any], space: dict[str, Leaf], ordinals: dict[str, list]) -> Leaf:
    """Returns the child of a condition: its leaf, with the condition added."""
    kind, name, parent = condition["type"], condition.get("child"), condition.get("parent")
    if kind not in _COMPARISONS or name not in space or parent not in space:
        raise ValueError(f"A space cannot represent this condition: {condition}.")
    compare, leaf = _COMPARISONS[kind], space[parent]
    if isinstance(leaf, _leaves.Integer):
        allowed = _convertible_values(parent, range(leaf.low, leaf.high + 1))
    else:
        allowed = getattr(leaf, "labels", ())  # `_conditions` reports parents that are not choices
    value = condition["values"] if kind == "IN" else condition["value"]
    if parent in ordinals and kind in ("LT", "GT"):  # compares positions in the sequence, not texts
        position = ordinals[parent].index
        values = [label for label in allowed if compare(position(label), position(value))]
    else:
        values = [label for label in allowed if compare(label, value)]
    if allowed and not values and kind in ("LT", "GT"):
        raise ValueError(f"This condition never holds: {condition}.")
    return _factories.active_if(space[name], parent, values or [value])


_COMPARISONS = {
    "EQ": lambda value, wanted: value == wanted,
    "NEQ": lambda value, wanted: value != wanted,
    "IN": lambda value, wanted: value in wanted,
    "LT": lambda value, wanted: value < wanted,
    "GT": lambda value, wanted: value > wanted,
}


def _entries(space) -> list[tuple[str, Leaf, tuple[int, ...]]]:
    """The name, leaf and index of every plain value; parents of conditions come first."""
    leaves = {_name(path): leaf for path, leaf in _flatten(space)[0]}
    return [
        (_entry(name, index), leaves[name], index)
        for name in _conditions(space)
        for index in np.ndindex(leaves[name].plain_shape)
    ]


def _bounds(name: str, leaf: Leaf, index) -> tuple[float, float, float]:
    """The smallest value, the largest value and the default of one entry."""
    if isinstance(leaf, _leaves.Simplex):
        raise ValueError(
            f"`{name}` belongs to a simplex, which cannot be converted; use a `choice`, or weights that you normalize."
        )
    assert isinstance(leaf, (_leaves.Real, _leaves.Positive, _leaves._Bounded))
    default = float(np.broadcast_to(leaf.default, leaf.shape)[index])
    if isinstance(leaf, _leaves.Integer):
        return leaf.low, leaf.high, int(default)
    if isinstance(leaf, _leaves._Bounded):
        return leaf.low, leaf.high, default
    if isinstance(leaf, _leaves.Positive):
        return default * math.exp(-3 * leaf.scale), default * math.exp(3 * leaf.scale), default
    return default - 3 * leaf.scale, default + 3 * leaf.scale, default


def _is_log(leaf: Leaf) -> bool:
    return isinstance(leaf, _leaves.Positive) or getattr(leaf, "log", False)


def _inside(low, high, log, default):
    if default is None:
        return None
    low, high, point = (math.log(x) if log else x for x in (low, high, default))
    inside = min(max(point, low + 1e-6 * (high - low)), high - 1e-6 * (high - low))
    if inside == point:
        return default
    return math.exp(inside) if log else inside


def _choice(labels, default=None) -> Leaf:
    labels = list(labels)
    if len(labels) == 1 and isinstance(labels[0], (int, float)):
        return _factories.fixed(labels[0])
    return _factories.choice(labels, default=default)


def _convertible_values(name, values):
    """Returns the values. Raises ValueError if there are too many."""
    if len(values) > _MOST_VALUES:
        raise ValueError(f"`{name}` has {len(values)} values; at most {_MOST_VALUES} can be converted.")
    return values
