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

from metaopt import base, hypergrad, predictors, spaces

KEY = jax.random.key(0)
SPACE = {
    "model": {"rate": spaces.interval(1e-3, 1.0, log=True), "mix": [spaces.choice(["a", "b"]), spaces.real(1.0, 2.0)]},
    "seed": spaces.fixed(3),
}
LAM = spaces.default(SPACE)
Z = spaces.to_unconstrained(SPACE, LAM)
RIDGE = hypergrad.unrolled(problems.POSITIVE_RIDGE, num_steps=1)
IN_Z = spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE)
CONSTRAINED = hypergrad.unrolled(IN_Z, num_steps=1)
EVOLUTION = hypergrad.evolution(IN_Z, num_steps=1, sigma={"penalty": 0.1}, num_pairs=1)
PENALTY = spaces.default(problems.SPACE)
COORDINATES: Any = spaces.to_unconstrained(problems.SPACE, PENALTY)
SCALAR: Any = 1.0
NATURAL = "λ is in natural units here .*Pass `space=` to `training.fit` or `training.fine_tune`, or convert λ by"
UNCONSTRAINED = "λ is expected in natural units, and these are unconstrained coordinates"
NO_ENTRY = "These are unconstrained coordinates and not λ: they have no .*spaces.to_constrained.*spaces.constrain"


def estimate(estimator, hyperparams):
    """Traces an estimate."""
    run = lambda hyperparams: estimator.estimate(
        hyperparams, problems.TASK, estimator.init(KEY, hyperparams, problems.TASK)
    )
    return jax.eval_shape(run, hyperparams)


def amortized(estimator, predicted):
    """An estimate for a predictor that always predicts the same."""
    predictor = base.Predictor(lambda key: jnp.zeros([]), lambda phi, task: jax.tree.map(lambda x: x + phi, predicted))
    return estimate(predictors.amortize(estimator, predictor), jnp.zeros([]))


WRONG = {
    "constrained_problem": (lambda: estimate(CONSTRAINED, PENALTY), ValueError, NATURAL),
    "to_constrained": (lambda: spaces.to_constrained(SPACE, LAM), ValueError, NATURAL),
    "one_array": (lambda: spaces.to_constrained(spaces.real(), SCALAR), ValueError, "natural units here .got float"),
    "raw_coordinates": (lambda: spaces.to_constrained(SPACE, Z.coordinates), ValueError, "marked by `spaces.Unc"),
    "prediction_in_natural_units": (lambda: amortized(CONSTRAINED, PENALTY), ValueError, NATURAL),
    "to_unconstrained": (lambda: spaces.to_unconstrained(SPACE, Z), ValueError, UNCONSTRAINED),
    "encode": (lambda: spaces.encode(SPACE, Z), ValueError, UNCONSTRAINED),
    "discretize": (lambda: spaces.discretize(SPACE, Z), ValueError, UNCONSTRAINED),
    "at_bounds": (lambda: spaces.at_bounds(SPACE, Z), ValueError, UNCONSTRAINED),
    "configuration": (lambda: spaces.configuration(SPACE, Z), ValueError, UNCONSTRAINED),
    "active": (lambda: spaces.active(SPACE, Z), ValueError, UNCONSTRAINED),
    "twice": (lambda: spaces.to_constrained(SPACE, spaces.Unconstrained(Z)), ValueError, "expected dict, got Unc"),
    "within_lambda": (lambda: spaces.encode(SPACE, {**LAM, "model": Z}), ValueError, "expected dict, got Unc"),
    "start_of_a_predictor": (lambda: predictors.mlp(SPACE, 2, hyperparams=Z), ValueError, UNCONSTRAINED),
    "plain_problem": (lambda: estimate(RIDGE, COORDINATES), ValueError, NO_ENTRY),
    "prediction": (lambda: amortized(RIDGE, COORDINATES), ValueError, NO_ENTRY),
    "entry": (lambda: COORDINATES["penalty"], ValueError, "no entry 'penalty'"),
    "attribute": (lambda: COORDINATES.penalty, AttributeError, NO_ENTRY),
    "items": (lambda: COORDINATES.items(), AttributeError, NO_ENTRY),
    "iteration": (lambda: list(COORDINATES), ValueError, NO_ENTRY),
    "membership": (lambda: "penalty" in COORDINATES, ValueError, NO_ENTRY),
    "sigma_in_natural_units": (
        lambda: estimate(EVOLUTION, COORDINATES),
        ValueError,
        "(?s)pytree structure error: different types.*Unconstrained",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_in_place_of_the_other_raises(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


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
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, spaces.Unconstrained)
    chex.assert_trees_all_equal(again.coordinates, inside)
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


OUTSIDE = {
    "interval": ({"model": {**LAM["model"], "rate": 2.0}}, "`model.rate`: it must be between 0.001 and 1.0; got 2.0"),
    "choice": (
        {"model": {**LAM["model"], "mix": [jnp.array([0.7, 0.7]), 0.0]}},
        r"`model.mix.0`: it must be 2 nonnegative weights that sum to one; got \[0.7, 0.7\]",
    ),
    "real": ({"model": {**LAM["model"], "mix": [LAM["model"]["mix"][0], np.nan]}}, "`model.mix.1`: .* finite; got nan"),
    "fixed": ({"seed": 4}, "`seed`: it must be the value that the space fixes, 3; got 4"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_value_outside_names_its_path_its_range_and_itself(name):
    change, message = OUTSIDE[name]
    with pytest.raises(ValueError, match="λ lies outside the space at " + message):
        spaces.to_unconstrained(SPACE, {**LAM, **change})


def test_the_first_entry_outside_is_named_and_a_traced_one_has_no_coordinate():
    space = {"penalty": spaces.positive(shape=(2, 2))}
    value = np.array([[1.0, 2.0], [-3.0, 0.0]])
    with pytest.raises(ValueError, match="`penalty`: it must be positive.*; got -3.0"):
        spaces.to_unconstrained(space, {"penalty": value})
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
