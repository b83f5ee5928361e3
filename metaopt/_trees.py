"""Helpers for trees of arrays that `jax.tree` and `optax.tree` lack."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import base


def is_inexact(leaf: Any) -> bool:
    """Returns whether a leaf has a derivative: its type is floating-point or complex.

    Args:
      leaf: an array, a number, or a shape and type.

    Returns:
      False for integers, booleans and PRNG keys.
    """
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


def split(tree: base.PyTree, predicate: Callable[[Any], Any] = is_inexact) -> tuple[base.PyTree, base.PyTree]:
    """Splits a tree into the leaves that satisfy a predicate, and the other leaves.

    Args:
      tree: any tree.
      predicate: `leaf -> bool`; by default, whether the leaf has a derivative.

    Returns:
      Two trees like `tree`. Each has None in place of the leaves of the other one.
    """
    selected = jax.tree.map(lambda leaf: leaf if predicate(leaf) else None, tree)
    rest = jax.tree.map(lambda leaf: None if predicate(leaf) else leaf, tree)
    return selected, rest


def merge(selected: base.PyTree, rest: base.PyTree) -> base.PyTree:
    """Returns the tree whose two parts `split` returned.

    Args:
      selected: the first part, with None in place of the other leaves.
      rest: the second part.

    Returns:
      The whole tree.
    """
    return jax.tree.map(lambda x, y: y if x is None else x, selected, rest, is_leaf=lambda x: x is None)


def strong(tree: base.PyTree) -> base.PyTree:
    """Returns the leaves as arrays without weak types, so that a tree that a loop carries keeps its types.

    Args:
      tree: a tree of arrays, numbers and PRNG keys.

    Returns:
      A tree of arrays; typed PRNG keys are kept.
    """

    def strong_leaf(leaf):
        leaf = jnp.asarray(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key else jax.lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(strong_leaf, tree)


def wide(tree: base.PyTree) -> base.PyTree:
    """Casts to at least float32. In half precision, squares underflow, and long sums overflow or stop growing.

    Args:
      tree: a tree of arrays.

    Returns:
      The tree; arrays of float32 and float64 are kept, also weakly typed ones.
    """
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
