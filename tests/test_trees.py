"""Trees in two parts, and trees without weak types."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _trees

TREE = {
    "w": jnp.ones(2),
    "z": jnp.ones(1, complex),
    "n": jnp.arange(3),
    "key": jax.random.key(0),
    "none": None,
    "x": 0.5,
}


def test_the_parts_of_a_tree_give_the_tree():
    floats, rest = _trees.split(TREE)
    assert {name for name, leaf in floats.items() if leaf is not None} == {"w", "z", "x"}
    assert {name for name, leaf in rest.items() if leaf is not None} == {"n", "key"}
    merged = _trees.merge(floats, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(TREE) and merged["key"] is TREE["key"]
    chex.assert_trees_all_equal({**merged, "key": None}, {**TREE, "key": None})
    arrays, others = _trees.split({"a": np.ones(2), "name": "b"}, lambda leaf: isinstance(leaf, np.ndarray))
    assert others == {"a": None, "name": "b"} and arrays["name"] is None


def test_shapes_and_types_have_a_derivative_or_not():
    assert _trees.is_inexact(jax.ShapeDtypeStruct((2,), jnp.bfloat16)) and _trees.is_inexact(1.0)
    assert not any(map(_trees.is_inexact, (1, True, jax.ShapeDtypeStruct((), jnp.int32), jax.random.key(0))))


def test_weak_types_become_strong():
    strong = _trees.strong(TREE)
    assert jnp.asarray(0.5).weak_type and strong["x"].dtype == jnp.float64
    assert not any(leaf.weak_type for name, leaf in strong.items() if name not in ("key", "none"))
    assert strong["key"].dtype == TREE["key"].dtype
