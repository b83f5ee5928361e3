"""Spaces as JSON, for records that outlive the program that made them.

A document is `{"version": 1, "space": node}`. A node is null, a container `{"type": "dict", "items": ...}` (or
"list", "tuple"), or a leaf `{"type": kind, ...}` with the arguments of its factory. A leaf with conditions also has
`"condition"`, a list of [name, values].
"""

import dataclasses
import math
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.spaces import _factories, _leaves

VERSION = 1
_MAX_VALUES = 2**24  # entries of λ in a document; a short document can have a leaf with a large `shape`

_FACTORIES = {
    "real": _factories.real,
    "positive": _factories.positive,
    "interval": _factories.interval,
    "integer": _factories.integer,
    "simplex": _factories.simplex,
    "choice": _factories.choice,
}


def to_json(space: base.PyTree) -> dict[str, Any]:
    """Returns a space of nested dicts, lists and tuples as plain data, for `json.dump`.

    Args:
      space: a tree of leaves.

    Returns:
      `{"version": 1, "space": ...}`, from which `from_json` makes an equal space.

    Raises:
      ValueError: if a container is a NamedTuple or has another type, a key is not a string, or a value is not a leaf.

    >>> import json
    >>> from metaopt import spaces
    >>> space = {"rate": spaces.positive(0.1), "momentum": spaces.fixed(0.9)}
    >>> spaces.from_json(json.loads(json.dumps(spaces.to_json(space)))) == space
    True
    """
    return {"version": VERSION, "space": _to_node(space, "space")}


def from_json(document: dict[str, Any]) -> base.PyTree:
    """Returns the space that `to_json` wrote. The factory of every leaf checks its arguments again.

    Args:
      document: the result of `to_json`, or `json.load` of it.

    Returns:
      A tree of leaves.

    Raises:
      ValueError: if the version or the type of a node is unknown, an argument of a leaf is invalid, or λ has more than
        2**24 entries.
    """
    if not isinstance(document, dict) or document.get("version") != VERSION or "space" not in document:
        raise ValueError(
            f"`document` must have `version` {VERSION} (of this metaopt release) and `space`, as `to_json` writes; got "
            f"{reprlib.repr(document)}."
        )
    try:
        space = _from_node(document["space"], "space")
    except RecursionError:
        raise ValueError("`document` is nested too deeply.") from None
    is_leaf = lambda node: isinstance(node, _leaves.Leaf)
    num_values = sum(math.prod(leaf.value_shape) for leaf in jax.tree.leaves(space, is_leaf=is_leaf))
    if num_values > _MAX_VALUES:
        raise ValueError(f"λ of `document` must have at most {_MAX_VALUES} entries; it has {num_values}.")
    return space


def _to_node(space, path: str):
    if space is None:
        return None
    if isinstance(space, _leaves.Fixed):
        floating = jnp.issubdtype(space.value.dtype, jnp.floating)
        value = space.value.astype(np.float64) if floating else space.value
        condition = {"condition": _lists(space.condition)} if space.condition else {}
        return {"type": "fixed", "value": value.tolist(), "dtype": space.value.dtype.name, **condition}
    if isinstance(space, _leaves.Leaf):
        fields = {field.name: _lists(getattr(space, field.name)) for field in dataclasses.fields(space)}
        if not space.condition:
            del fields["condition"]
        return {"type": space.kind, **fields}
    if type(space) is dict and all(isinstance(key, str) for key in space):
        return {"type": "dict", "items": {key: _to_node(child, f"{path}.{key}") for key, child in space.items()}}
    if type(space) in (list, tuple):
        items = [_to_node(child, f"{path}.{index}") for index, child in enumerate(space)]
        return {"type": type(space).__name__, "items": items}
    raise ValueError(
        f"JSON can hold a space of dicts with strings as keys, lists, tuples and leaves; got {reprlib.repr(space)} of "
        f"type {type(space).__name__} at `{path}`. Write a NamedTuple as a dict, `{path}._asdict()`."
    )


def _from_node(node, path: str):
    if node is None:
        return None
    kind = node.get("type") if isinstance(node, dict) else None
    if kind not in ("dict", "list", "tuple", "fixed", *_FACTORIES):
        got = reprlib.repr(node)
        raise ValueError(f"A node must be a container or a leaf with a known `type`; got {got} at `{path}`.")
    arguments = {name: value for name, value in node.items() if name != "type"}
    try:
        if kind == "dict":
            return {name: _from_node(child, f"{path}.{name}") for name, child in arguments["items"].items()}
        if kind in ("list", "tuple"):
            items = [_from_node(child, f"{path}.{i}") for i, child in enumerate(arguments["items"])]
            return items if kind == "list" else tuple(items)
        condition = arguments.pop("condition", [])
        if kind == "fixed":
            leaf = _fixed(arguments["value"], jnp.dtype(arguments["dtype"]))
        elif kind == "simplex" and len(arguments["default"]) == 0:  # the factory would make a leaf of `num` entries
            raise TypeError("`default` is empty")
        else:
            leaf = _FACTORIES[kind](**arguments)
        for name, values in condition:
            leaf = _factories.active_if(leaf, name, values)
        return leaf
    except (AttributeError, KeyError, OverflowError, TypeError, ZeroDivisionError) as error:
        got = reprlib.repr(node)
        raise ValueError(f"The node of type {kind!r} at `{path}` cannot be read ({error}); got {got}.") from None


def _fixed(value, dtype):
    with np.errstate(over="ignore"):
        array = np.asarray(value, dtype)
    if array.dtype.kind == "f" and (np.isinf(array) & np.isfinite(np.asarray(value, np.float64))).any():
        raise TypeError(f"`value` is beyond {dtype}")
    return _factories.fixed(array)


def _lists(value):
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
