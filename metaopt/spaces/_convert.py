"""Converts spaces to Optuna's distributions and to ConfigSpace's JSON, and back.

Names are those of a configuration. `real` and `positive` have no bounds in metaopt. Here they get the bounds z = ±3,
which contain 99.7 % of their samples. A simplex has no counterpart in Optuna or ConfigSpace.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from metaopt import base
from metaopt.spaces import _leaves
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

    found = {}
    for name, leaf, index in _entries(space):
        if isinstance(leaf, _leaves.Choice):
            found[name] = optuna.CategoricalDistribution(leaf.labels)
        elif isinstance(leaf, _leaves.Integer):
            found[name] = optuna.IntDistribution(leaf.low, leaf.high, log=leaf.log)
        elif leaf.tuned:
            found[name] = optuna.FloatDistribution(*_bounds(name, leaf, index)[:2], log=_is_log(leaf))
    return found


def suggest(trial: Any, space: base.PyTree) -> dict[str, Any]:
    """Draws a configuration with Optuna's sampler, for an objective of a study. It obeys conditions while it draws.

    Args:
      trial: an `optuna.Trial`.
      space: a tree of leaves.

    Returns:
      Plain values by name, as from `configuration`.

    Raises:
      ValueError: if the space has a simplex, or a condition that cannot be met.
    """
    found: dict[str, Any] = {}
    for name, leaf, index in _entries(space):
        if not all(parent in found and found[parent] in values for parent, values in leaf.condition):
            continue
        if isinstance(leaf, _leaves.Fixed):
            found[name] = leaf.value[index].item()
        elif isinstance(leaf, _leaves.Choice):
            found[name] = trial.suggest_categorical(name, leaf.labels)
        else:
            fn = trial.suggest_int if isinstance(leaf, _leaves.Integer) else trial.suggest_float
            found[name] = fn(name, *_bounds(name, leaf, index)[:2], log=_is_log(leaf))
    return found


def from_optuna(distributions: Mapping[str, Any]) -> dict[str, Leaf]:
    """Makes a space from Optuna's distributions, for example those of a study's trials.

    Args:
      distributions: Optuna's distributions by name. An integer with a step becomes a choice of its values.

    Returns:
      A flat dict of leaves; a distribution of one number becomes a fixed leaf.

    Raises:
      ValueError: if `distributions` is not a mapping, a distribution has no counterpart (such as a float with a step),
        or an integer with a step has more than 1,000 values.
    """
    if not isinstance(distributions, Mapping):
        raise ValueError(
            f"`distributions` must be a dict from names to Optuna distributions; got {type(distributions).__name__}. "
            "For a study, use `{n: d for trial in study.trials for n, d in trial.distributions.items()}`."
        )
    space: dict[str, Leaf] = {}
    for name, distribution in distributions.items():
        kind = type(distribution).__name__
        if not kind.endswith("Distribution"):
            raise ValueError(f"`{name}` must be an Optuna distribution; got {distribution!r}.")
        if kind == "CategoricalDistribution":
            space[name] = _choice(distribution.choices)
        elif distribution.single():
            space[name] = _leaves.fixed(distribution.low)
        elif kind == "IntDistribution" and distribution.step == 1:
            space[name] = _leaves.integer(distribution.low, distribution.high, log=distribution.log)
        elif kind == "IntDistribution":
            space[name] = _choice(_few(name, range(distribution.low, distribution.high + 1, distribution.step)))
        elif kind == "FloatDistribution" and distribution.step is None:
            space[name] = _leaves.interval(distribution.low, distribution.high, log=distribution.log)
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
        each = [
            {"type": "IN", "child": name, "parent": parent, "values": list(values)} for parent, values in leaf.condition
        ]
        conditions += each if len(each) <= 1 else [{"type": "AND", "child": name, "conditions": each}]
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
      ValueError: if `document` is not such a dict, or has a forbidden clause, a disjunction of conditions, or a
        parameter without a counterpart.
    """
    if not isinstance(document, Mapping) or "hyperparameters" not in document:
        what = f"a dict of {list(document)}" if isinstance(document, Mapping) else type(document).__name__
        raise ValueError(
            '`document` must be the dict that ConfigSpace writes as JSON, with "hyperparameters"; got '
            f"{what}. Write a `ConfigurationSpace` to a file with its `to_json`, and load it with "
            "`json.loads(Path(file).read_text())`."
        )
    if document.get("forbiddens"):
        raise ValueError(
            "A space cannot have forbidden clauses; remove them, and let the objective raise for such configurations."
        )
    space: dict[str, Leaf] = {}
    ordinals = {e["name"]: list(e["sequence"]) for e in document["hyperparameters"] if e["type"] == "ordinal"}
    for entry in document["hyperparameters"]:
        if entry.get("q") is not None:
            raise ValueError(f"`{entry['name']}` is quantized, which a space cannot represent: {entry}.")
        name, kind = entry["name"], entry["type"]
        default = entry.get("default_value")
        if kind in ("constant", "unparametrized"):
            space[name] = _choice([entry["value"]])
        elif kind == "categorical":
            space[name] = _choice(entry["choices"], default)
        elif kind == "ordinal":
            space[name] = _choice(entry["sequence"], default)
        elif kind.endswith("_int") and entry.get("lower") is not None:
            space[name] = _leaves.integer(entry["lower"], entry["upper"], log=entry.get("log", False), default=default)
        elif kind.endswith("_float") and entry.get("lower") is not None:
            low, high, log = entry["lower"], entry["upper"], entry.get("log", False)
            space[name] = _leaves.interval(low, high, log=log, default=_inside(low, high, log, default))
        else:
            raise ValueError(f"`{name}` cannot be represented in a space: {entry}.")
    for condition in document.get("conditions", []):
        for one in condition["conditions"] if condition["type"] == "AND" else [condition]:
            name, parent = one.get("child"), one.get("parent")
            if one["type"] not in _HOLDS or name not in space or parent not in space:
                raise ValueError(f"A space cannot represent this condition: {one}.")
            holds, other = _HOLDS[one["type"]], space[parent]
            if isinstance(other, _leaves.Integer):
                allowed = _few(parent, range(other.low, other.high + 1))
            else:
                allowed = getattr(other, "labels", ())  # `_conditions` reports parents that are not choices
            wanted = one["values"] if one["type"] == "IN" else one["value"]
            if parent in ordinals and one["type"] in ("LT", "GT"):  # compares places in the sequence, not the alphabet
                place = ordinals[parent].index
                holding = [v for v in allowed if holds(place(v), place(wanted))]
            else:
                holding = [v for v in allowed if holds(v, wanted)]
            if allowed and not holding and one["type"] in ("LT", "GT"):
                raise ValueError(f"This condition never holds: {one}.")
            space[name] = _leaves.active_if(space[name], parent, holding or [wanted])
    _conditions(space)
    return space


_HOLDS = {
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
    low, high, at = (math.log(x) if log else x for x in (low, high, default))
    inside = min(max(at, low + 1e-6 * (high - low)), high - 1e-6 * (high - low))
    if inside == at:
        return default
    return math.exp(inside) if log else inside


def _choice(labels, default=None) -> Leaf:
    labels = list(labels)
    if len(labels) == 1 and isinstance(labels[0], (int, float)):
        return _leaves.fixed(labels[0])
    return _leaves.choice(labels, default=default)


def _few(name, values):
    if len(values) > _MOST_VALUES:
        raise ValueError(f"`{name}` has {len(values)} values; at most {_MOST_VALUES} can be converted.")
    return values
