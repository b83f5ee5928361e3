"""Trees of leaves: what is fixed disappears, and what does not fit is named."""

import json
import re
from collections import OrderedDict
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
    with pytest.raises(ValueError, match="at `seed`: it must be the value that the space fixes, 3; got 8.*the leaf of"):
        spaces.to_unconstrained(SPACE, value | {"seed": 8})
    in_float32 = spaces.to_unconstrained({"momentum": spaces.fixed(0.9)}, {"momentum": np.float32(0.9)})
    assert in_float32.coordinates == {"momentum": None}
    assert spaces.discretize(SPACE, value | {"seed": 8})["seed"] == 3
    with pytest.raises(ValueError, match=r"at `seed`: expected an array of shape \(\) \(fixed\), got shape \(2,\)"):
        spaces.to_unconstrained(SPACE, value | {"seed": jnp.ones(2)})


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
    at = spaces.at_bounds(SPACE, value)
    expected = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), SPACE)
    chex.assert_trees_all_equal(at, expected | {"depth": np.array(True), "mix": np.array(True)})


def drop(tree, name):
    return {key: value for key, value in tree.items() if key != name}


LAM = spaces.default(SPACE)
CONSTRAINED = {
    "missing": (drop(LAM, "mix"), "at `mix`: expected an array of shape (3,) (simplex), got nothing"),
    "missing_subtree": (drop(LAM, "adam"), "at `adam`: expected Adam, got nothing"),
    "extra": (LAM | {"decay": 0.1}, "at `decay`: expected nothing, got float; leave it out, or add it to the space"),
    "list": (LAM | {"mix": [0.2, 0.3, 0.5]}, "at `mix`: expected an array of shape (3,) (simplex), got list; make it"),
    "none": (LAM | {"depth": None}, "at `depth`: expected an array of shape () (integer), got None"),
    "container": (LAM | {"adam": tuple(LAM["adam"])}, "at `adam`: expected Adam, got tuple"),
    "root": (jnp.zeros(8), "at `hyperparams`: expected dict, got an array of shape (8,)"),
    "ordered": (OrderedDict(LAM), "at `hyperparams`: expected dict, got OrderedDict"),
    "nested": (LAM | {"adam": LAM["adam"]._replace(betas=[0.9])}, "expected an array of shape () (fixed), got nothing"),
    "shape": (
        LAM | {"weights": jnp.ones(3)},
        "at `weights`: expected an array of shape (2,) (positive), got shape (3,)",
    ),
    "text": (LAM | {"depth": "two"}, "at `depth`: expected an array of shape () (integer), got 'two'"),
    "space": (SPACE, "at `adam.rate`: expected an array of shape () (interval), got Interval("),
    "complex": (LAM | {"depth": 1j}, "at `depth`: expected an array of shape () (integer), got 1j"),
    "key": (LAM | {"depth": jax.random.key(0)}, "at `depth`: expected an array of shape () (integer), got "),
}


def test_a_traced_value_outside_its_range_becomes_nan_and_others_stay():
    space = {"rate": spaces.interval(0.0, 1.0), "weights": spaces.positive(shape=(3,))}
    values = {"rate": 1.5, "weights": jnp.array([1.0, -2.0, np.e])}
    z = jax.jit(lambda values: spaces.to_unconstrained(space, values).coordinates)(values)
    np.testing.assert_allclose(z["rate"], np.nan)
    np.testing.assert_allclose(z["weights"], [0.0, np.nan, 1.0], atol=1e-12)


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("fn", [spaces.to_unconstrained, spaces.discretize, spaces.encode, spaces.at_bounds])
def test_a_mismatch_names_the_path_what_was_expected_and_what_came(name, fn):
    value, message = CONSTRAINED[name]
    with pytest.raises(ValueError, match="^λ does not fit the space .*" + re.escape(message)):
        fn(SPACE, value)


def test_a_mismatch_says_what_to_do():
    with pytest.raises(ValueError, match=r"`spaces.default\(space\)` has the structure that is needed"):
        spaces.encode(SPACE, drop(LAM, "mix"))
    with pytest.raises(ValueError, match=r"Give the leaf of the space another `shape`; or, .* `jax.vmap`"):
        spaces.encode(SPACE, LAM | {"depth": jnp.ones(3)})


def test_a_mismatch_of_unconstrained_coordinates():
    z = spaces.to_unconstrained(SPACE, LAM).coordinates
    with pytest.raises(
        ValueError, match="at `seed`: expected None, since a fixed leaf has no unconstrained.* got float"
    ):
        spaces.to_constrained(SPACE, spaces.Unconstrained(z | {"seed": 1.0}))
    with pytest.raises(ValueError, match=r"^The unconstrained λ .* at `depth`: .*to_unconstrained\(space, default"):
        spaces.to_constrained(SPACE, spaces.Unconstrained(z | {"depth": None}))
    with pytest.raises(ValueError, match=r"at `weights`: expected an array of shape \(2,\)"):
        jax.jit(lambda z: spaces.to_constrained(SPACE, spaces.Unconstrained(z)))(z | {"weights": jnp.ones(())})


@pytest.mark.parametrize("space", [{"a": 0.1}, [spaces.real(), "adam"]])
def test_a_leaf_of_another_kind_is_refused(space):
    for fn in (spaces.default, spaces.num_dims, spaces.names, lambda space: spaces.sample(jax.random.key(0), space)):
        with pytest.raises(ValueError, match=r"Every leaf of a space must be made by `real`.*got .* at `(a|1)`"):
            fn(space)


def test_json_of_a_tree():
    space = {"a": [spaces.real(), (spaces.fixed(jnp.arange(3)), None)], "type": {"items": spaces.simplex(2)}}
    document = json.loads(json.dumps(spaces.to_json(space)))
    assert spaces.from_json(document) == space
    assert document["space"]["items"]["a"]["items"][0] == {"type": "real", "default": 0.0, "scale": 1.0, "shape": []}


@pytest.mark.parametrize(
    "space, message",
    [
        (SPACE, r"of type Adam at `space.adam`. Write a NamedTuple as a dict, `space.adam._asdict\(\)`"),
        ({1: spaces.real()}, "dicts with strings as keys.*got {1: .* at `space`"),
        (OrderedDict(a=spaces.real()), "of type OrderedDict at `space`"),
        ({"a": 0.1}, "got 0.1 of type float at `space.a`"),
    ],
)
def test_json_refuses_what_it_would_lose(space, message):
    with pytest.raises(ValueError, match=message):
        spaces.to_json(space)


@pytest.mark.parametrize(
    "document, message",
    [
        ({"space": None}, "`document` must have `version` 1 .* and `space`"),
        ({"version": 2, "space": None}, "must have `version` 1 .of this metaopt release.*got .*2"),
        ({"version": 1, "space": {"type": "categorical"}}, "known `type`; got {'type': 'categorical'} at `space`"),
        ({"version": 1, "space": {"type": "dict", "items": {"a": 0.1}}}, "got 0.1 at `space.a`"),
        ({"version": 1, "space": {"type": "real", "mean": 1}}, "type 'real' at `space` cannot be read .*mean"),
        ({"version": 1, "space": {"type": "fixed", "value": 1}}, "type 'fixed' at `space` cannot be read .*dtype"),
        ({"version": 1, "space": {"type": "interval", "low": 2, "high": 1}}, "`high` must be above `low`"),
    ],
)
def test_json_refuses_what_it_does_not_know(document, message):
    with pytest.raises(ValueError, match=message):
        spaces.from_json(document)
