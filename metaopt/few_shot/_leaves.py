"""Leaves of a model by their paths: the leaves that adapt, and those that are read from λ or from `init`."""

import re
from typing import Any

import jax

from metaopt import base


def by_path(tree: base.PyTree) -> dict[Any, Any]:
    """Maps key paths to leaves. As strings, the paths of {"a/b": ...} and {"a": {"b": ...}} would be the same."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def name(path: Any) -> str:
    """Returns a path as text, such as "layers/0/bias"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matches(pattern: str | re.Pattern[str], path: Any) -> bool:
    """Whether the pattern is found in the name of a path."""
    return re.search(pattern, name(path)) is not None


def select(pattern: str | re.Pattern[str], params: base.PyTree) -> base.PyTree:
    """Returns the leaves that match, with None in place of the others."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x if matches(pattern, path) else None, params)


def fill(params: base.PyTree, made: base.PyTree, meta_params: base.PyTree) -> base.PyTree:
    """Returns all leaves: those that do not adapt come from `made`, or else from the meta-parameters."""
    others = by_path(meta_params) | by_path(made)
    leaf_at = lambda path, x: others.get(path) if x is None else x  # a None of the model itself stays None
    return jax.tree_util.tree_map_with_path(leaf_at, params, is_leaf=lambda x: x is None)
