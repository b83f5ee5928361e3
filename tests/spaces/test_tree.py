"""Trees of leaves: fixed leaves disappear, and errors name the value that does not fit."""

import json
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import spaces


class Adam(NamedTuple):
    rate: Any
    betas: Any


SPACE = {
    "adam": Adam(spaces.interval(1e-4, 1e-1, log=True), [spaces.interval(0, 1, default=0.9), spaces.fixed(0.999)]),
    "depth": spaces.integer(1, 4),
    "mix": spaces.simplex(3),
    "nothing": None,
    "seed": spaces.fixed(3),
    "weights": spaces.positive(shape=(2,)),
}


@pytest.mark.once
def test_fixed_leaves_disappear_from_the_unconstrained_tree():
    z = spaces.to_unconstrained(SPACE, spaces.default(SPACE))
    assert z.coordinates["adam"].betas[1] is None and z.coordinates["seed"] is None
    assert len(jax.tree.leaves(z)) == 5
    value = spaces.to_constrained(SPACE, z)
    chex.assert_trees_all_close(value, spaces.default(SPACE), rtol=1e-12)
    assert value["seed"].dtype == jnp.int64 and value["adam"].betas[1] == 0.999
    grads = jax.grad(lambda z: sum(jnp.sum(x) for x in jax.tree.leaves(spaces.to_constrained(SPACE, z))))(z)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, z)


def test_a_fixed_leaf_has_its_value_and_no_other():
    value = spaces.default(SPACE)
    in_float32 = spaces.to_unconstrained({"momentum": spaces.fixed(0.9)}, {"momentum": np.float32(0.9)})
    assert in_float32.coordinates == {"momentum": None}
    assert spaces.discretize(SPACE, value | {"seed": 8})["seed"] == 3


def test_names_and_encoding_have_one_order():
    names = spaces.names(SPACE)
    assert names == (
        "adam.rate",
        "adam.betas.0",
        "depth",
        "mix[0]",
        "mix[1]",
        "mix[2]",
        "weights[0]",
        "weights[1]",
    )
    value = spaces.default(SPACE) | {"mix": jnp.array([0.2, 0.3, 0.5]), "weights": jnp.array([1.0, np.e])}
    code = dict(zip(names, spaces.encode(SPACE, value).tolist(), strict=True))
    assert spaces.num_dims(SPACE) == len(code) == 8
    expected = [0.5, 0.9, 0.375, 0.2, 0.3, 0.5, 0.5, 0.8413447460685429]  # depth 2 of 1..4; Φ(1)
    chex.assert_trees_all_close(list(code.values()), expected, rtol=1e-9)


def test_a_space_of_fixed_leaves_has_no_dimensions():
    space = {"a": spaces.fixed(1.0), "b": ()}
    assert spaces.num_dims(space) == 0 and spaces.names(space) == ()
    assert spaces.encode(space, spaces.default(space)).shape == (0,)
    assert spaces.sample(jax.random.key(0), {}) == {}
    assert jax.tree.leaves(spaces.to_unconstrained(space, spaces.default(space))) == []


def test_fixing_a_leaf_leaves_the_samples_of_the_others():
    key = jax.random.key(0)
    free, held = spaces.sample(key, SPACE), spaces.sample(key, SPACE | {"depth": spaces.fixed(2)})
    chex.assert_trees_all_equal({**free, "depth": None}, {**held, "depth": None})
    assert free["depth"] != 2
    assert not np.allclose(*spaces.sample(key, [spaces.real(), spaces.real()]))


def test_at_bounds_is_a_tree_of_bools():
    value = spaces.default(SPACE) | {"depth": 4, "mix": jnp.array([0.0, 0.995, 0.005])}
    is_at_bound = spaces.at_bounds(SPACE, value)
    expected = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), SPACE)
    chex.assert_trees_all_equal(is_at_bound, expected | {"depth": np.array(True), "mix": np.array(True)})


LAM = spaces.default(SPACE)


def test_a_traced_value_outside_its_range_becomes_nan_and_others_stay():
    space = {"rate": spaces.interval(0.0, 1.0), "weights": spaces.positive(shape=(3,))}
    values = {"rate": 1.5, "weights": jnp.array([1.0, -2.0, np.e])}
    z = jax.jit(lambda values: spaces.to_unconstrained(space, values).coordinates)(values)
    np.testing.assert_allclose(z["rate"], np.nan)
    np.testing.assert_allclose(z["weights"], [0.0, np.nan, 1.0], atol=1e-12)


def test_json_of_a_tree():
    space = {"a": [spaces.real(), (spaces.fixed(jnp.arange(3)), None)], "type": {"items": spaces.simplex(2)}}
    document = json.loads(json.dumps(spaces.to_json(space)))
    assert spaces.from_json(document) == space
    assert document["space"]["items"]["a"]["items"][0] == {"type": "real", "default": 0.0, "scale": 1.0, "shape": []}
