"""λ in natural units and unconstrained coordinates are two types: neither is taken for the other."""

import copy
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import spaces

KEY = jax.random.key(0)
SPACE = {
    "model": {"rate": spaces.interval(1e-3, 1.0, log=True), "mix": [spaces.choice(["a", "b"]), spaces.real(1.0, 2.0)]},
    "seed": spaces.fixed(3),
}
LAM = spaces.default(SPACE)
Z = spaces.to_unconstrained(SPACE, LAM)
IN_Z = spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE)
PENALTY = spaces.default(problems.SPACE)
COORDINATES: Any = spaces.to_unconstrained(problems.SPACE, PENALTY)
NO_ENTRY = "These are unconstrained coordinates and not λ: they have no .*spaces.to_constrained.*spaces.constrain"


def test_it_is_a_pytree_with_the_paths_of_lambda():
    assert jax.tree_util.tree_structure(Z) != jax.tree_util.tree_structure(Z.coordinates)
    by_path, plain = (jax.tree_util.tree_leaves_with_path(tree) for tree in (Z, Z.coordinates))
    assert by_path == plain and len(plain) == 3
    assert jax.tree.leaves(Z) == jax.tree.leaves(Z.coordinates)
    doubled = jax.tree.map(lambda x: 2 * x, Z)
    assert isinstance(doubled, spaces.Unconstrained)
    chex.assert_trees_all_equal(doubled.coordinates, jax.tree.map(lambda x: 2 * x, Z.coordinates))


@pytest.mark.parametrize("inside", [jnp.ones(3), None, {}, (jnp.ones(2), None), {"a": [1.0, {"b": 2.0}], "c": None}])
def test_any_tree_is_flattened_and_put_together_again(inside):
    marked = spaces.Unconstrained(inside)
    leaves, structure = jax.tree.flatten(marked)
    with_paths, same_structure = jax.tree_util.tree_flatten_with_path(marked)
    assert structure == same_structure and len(leaves) == len(with_paths) == len(jax.tree.leaves(inside))
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert isinstance(rebuilt, spaces.Unconstrained)
    chex.assert_trees_all_equal(rebuilt.coordinates, inside)
    hash(structure)
    assert jax.tree.structure(jax.tree.map(lambda x: x, marked)) == structure


@pytest.mark.once
def test_transformations_and_optimizers_work_through_it():
    z: Any = spaces.Unconstrained({"penalty": jnp.array([0.1, -0.2, 0.3, 0.0])})
    loss = lambda z: (spaces.to_constrained(problems.SPACE, z)["penalty"] ** 2).sum()
    grads = jax.jit(jax.grad(loss))(z)
    # d/dz (c exp z)² = 2 (c exp z)²
    np.testing.assert_allclose(
        grads.coordinates["penalty"], 2 * 0.09 * np.exp(2 * z.coordinates["penalty"]), rtol=1e-12
    )
    optimizer = optax.adam(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(z), z)
    moved: Any = optax.apply_updates(z, updates)
    np.testing.assert_allclose(moved.coordinates["penalty"], z.coordinates["penalty"] - 0.1, atol=1e-7)
    many = jax.vmap(lambda shift: jax.tree.map(lambda x: x + shift, z))(jnp.arange(3.0))
    assert many.coordinates["penalty"].shape == (3, 4)
    scanned, _ = jax.lax.scan(lambda z, _: (jax.tree.map(lambda x: x + 1, z), None), z, length=2)
    np.testing.assert_allclose(scanned.coordinates["penalty"], z.coordinates["penalty"] + 2)


def test_copies_and_repr():
    assert repr(spaces.Unconstrained({"a": 1.0})) == "Unconstrained(coordinates={'a': 1.0})"
    assert isinstance(copy.deepcopy(Z), spaces.Unconstrained)
    with pytest.raises(AttributeError):
        COORDINATES.coordinates = {}


@pytest.mark.parametrize("name", ["penalty", "items"])
def test_an_attribute_of_lambda_is_an_error_of_attributes(name):
    assert not hasattr(COORDINATES, name)
    with pytest.raises(AttributeError, match=NO_ENTRY):
        getattr(COORDINATES, name)


def test_the_first_entry_outside_is_named_and_a_traced_one_has_no_coordinate():
    space = {"penalty": spaces.positive(shape=(2, 2))}
    value = np.array([[1.0, 2.0], [-3.0, 0.0]])
    z = jax.jit(lambda x: spaces.to_unconstrained(space, {"penalty": x}))(value).coordinates["penalty"]
    np.testing.assert_allclose(z, [[0.0, np.log(2.0)], [np.nan, np.nan]], rtol=1e-12)
    rows = jax.vmap(lambda x: spaces.to_unconstrained({"p": spaces.positive()}, {"p": x}))(value[:, 0])
    np.testing.assert_array_equal(np.isnan(rows.coordinates["p"]), [False, True])


def test_a_configuration_within_rounding_of_a_bound_is_a_valid_lambda():
    """`from_configuration` accepts numbers that float32 has rounded, and they are inside in float64, too."""
    space = {"rate": spaces.interval(1e-4, 0.1, log=True)}
    for value in (float(np.float32(1e-4)), float(np.float32(0.1))):
        lam = spaces.from_configuration(space, {"rate": value})
        assert np.isfinite(spaces.to_unconstrained(space, lam).coordinates["rate"])
