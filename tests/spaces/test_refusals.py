"""What `spaces` rejects: leaves, values that do not fit or lie outside, coordinates for λ, conditions, documents."""

import re
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from metaopt import base, hypergrad, predictors, spaces

KEY = jax.random.key(0)


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
LAM: Any = spaces.default(SPACE)
Z: Any = spaces.to_unconstrained(SPACE, LAM)
RIDGE = hypergrad.unrolled(problems.POSITIVE_RIDGE, num_steps=1)
IN_Z = spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE)
CONSTRAINED = hypergrad.unrolled(IN_Z, num_steps=1)
EVOLUTION = hypergrad.evolution(IN_Z, num_steps=1, sigma={"penalty": 0.1}, num_pairs=1)
PENALTY = spaces.default(problems.SPACE)
COORDINATES: Any = spaces.to_unconstrained(problems.SPACE, PENALTY)
SCALAR: Any = 1.0


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


def drop(tree, name):
    return {key: value for key, value in tree.items() if key != name}


def to_unconstrained(**values):
    return spaces.to_unconstrained(SPACE, LAM | values)


def to_constrained(**coordinates):
    return spaces.to_constrained(SPACE, spaces.Unconstrained(Z.coordinates | coordinates))


def conditional(parent, values):
    """A space whose `a` has a condition that cannot be met."""
    space = {"a": spaces.active_if(spaces.integer(0, 3), parent, values)}
    return space | {"real": spaces.real(), "model": spaces.choice(["svm", "forest"])}


def read(document, version=1):
    return spaces.from_json({"version": version, "space": document})


def configspace(*hyperparameters, condition=None, **parts):
    conditions = [] if condition is None else [{"type": "EQ", "child": "a", **condition}]
    return spaces.from_configspace({"hyperparameters": hyperparameters, "conditions": conditions, **parts})


def optuna(**parts):
    distributions = pytest.importorskip("optuna").distributions
    return spaces.from_optuna({"f": distributions.FloatDistribution(0.0, 1.0, **parts)})


A = {"name": "a", "type": "uniform_int", "lower": 1, "upper": 10, "default_value": 6}
B = {"name": "b", "type": "uniform_float", "lower": 0.0, "upper": 1.0, "default_value": 0.5}
KIND = {"name": "kind", "type": "categorical", "choices": ["x", "y"], "default_value": "x"}
SIZE = {"name": "size", "type": "ordinal", "sequence": ["small", "large"], "default_value": "small"}
SAME_NAME = {"a.b": spaces.positive(2.0), "a": {"b": spaces.positive(3.0)}}
SAME_ENTRY = {"a": spaces.real(0.0, shape=(1,)), "a[0]": spaces.real(0.0)}
MISMATCHES = {  # of λ and the space
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
OUTSIDE = "λ lies outside the space at "
NATURAL = "but got λ in natural units .*Pass `space=` to `training.fit` or `training.fine_tune`, or convert λ by"
UNCONSTRAINED = "Expected λ in natural units, but got unconstrained coordinates"
NO_ENTRY = "These are unconstrained coordinates and not λ: they have no .*spaces.to_constrained.*spaces.constrain"
NO_LEAF = r"Every leaf of a space must be made by `real`.*got .* at `(a|1)`"
READERS = {"to_unconstrained": spaces.to_unconstrained, "discretize": spaces.discretize, "encode": spaces.encode}
READERS |= {"at_bounds": spaces.at_bounds}
REFUSALS = [
    # Factories.
    (lambda: spaces.real(float("nan")), "`default` must be finite, of shape .*; got nan"),
    (lambda: spaces.real("0.1"), "`default` must be a concrete number or array of real numbers.*got '0.1'"),
    (lambda: spaces.real([1.0, 2.0]), r"`default` must be finite, of shape \(\); got \[1.0, 2.0\]"),
    (lambda: spaces.real(0.0, 0.0), "`scale` must be positive; got 0.0"),
    (lambda: spaces.real(0.0, [1.0]), r"`scale` must be finite, of shape \(\); got \[1.0\]"),
    (lambda: spaces.real(shape=3), "`shape` must be a tuple of integers of at least 1; got 3"),  # pyright: ignore
    (lambda: spaces.real(shape=(0,)), r"`shape` must be .* got \(0,\)"),
    (lambda: spaces.positive(0.0), "`default` must be positive, between 1e-30 and 1e30; got 0.0"),
    (lambda: spaces.positive(1.0, -1.0), "`scale` must be positive; got -1.0"),
    (lambda: spaces.interval(1.0, 1.0), "`high` must be above `low`.*got low=1.0, high=1.0"),
    (lambda: spaces.interval(0.0, float("inf")), "`high` must be finite.*got inf"),
    (lambda: spaces.interval(0.0, 1.0, log=True), "`low` positive if `log` is true; got low=0.0"),
    (lambda: spaces.interval(0.0, 1.0, default=1.0), r"`default` must lie inside \(0.0, 1.0\).*got 1.0"),
    (lambda: spaces.interval(0.0, 1.0, default=1 - 1e-8), "`default` must lie inside"),
    (lambda: spaces.interval(0.0, 1.0, default=-3.0), "`default` must lie inside .*got -3.0"),
    (lambda: spaces.interval(0.1, 1.0, log=True, default=0.1), "`default` must lie inside"),
    (lambda: spaces.interval(0.1, 1.0, log=True, default=-1.0), "`default` must lie inside"),
    (lambda: spaces.interval(0, 1, default=0.0), "`default` must lie inside"),
    (lambda: spaces.integer(1, 2.5), r"`high` must be an integer within ±2\*\*24.*got 2.5"),  # pyright: ignore
    (lambda: spaces.integer(1, 10**9), r"`high` must be an integer within ±2\*\*24.*got 1000000000"),
    (lambda: spaces.integer(3, 3), "`high` must be above `low`.*got low=3, high=3, .*For one value, use `fixed`"),
    (lambda: spaces.integer(0, 3, log=True), "`low` positive if `log` is true; got low=0"),
    (lambda: spaces.integer(0, 3, default=4), "`default` must be an integer from 0 to 3; got 4"),
    (lambda: spaces.integer(0, 3, default=1.5), "`default` must be an integer from 0 to 3; got 1.5"),
    (lambda: spaces.simplex(1), "`num` must be at least 2; got 1"),
    (lambda: spaces.simplex(3, default=[0.5, 0.5]), r"`default` must be finite, of shape \(3,\)"),
    (lambda: spaces.simplex(2, default=[1.0, 0.0]), r"`default` must be positive.*got \[1.0, 0.0\]"),
    (lambda: spaces.simplex(2, default=[0.5, 0.6]), "`default` must be positive.* must sum to one"),
    (lambda: spaces.choice("ab"), "`labels` must be a list of strings, numbers, booleans or None; got 'ab'"),
    (lambda: spaces.choice([(1,), (2,)]), "`labels` must be a list of strings"),
    (lambda: spaces.choice([1, True]), r"`labels` must have at least two entries, all different; got \(1, True\)"),
    (lambda: spaces.choice([1]), "at least two entries, all different.*For one value, use `fixed`"),
    (lambda: spaces.choice([]), "at least two entries, all different"),
    (lambda: spaces.choice(["a", "b"], default="c"), r"`default` must be one of \('a', 'b'\); got 'c'"),
    (lambda: spaces.active_if(spaces.real(), "a", "b"), "`values` must be a list of at least one value; got 'b'"),
    (lambda: spaces.fixed("adam"), "`value` must be a concrete number or array of real numbers.*got 'adam'"),
    (lambda: spaces.fixed(None), "`value` must be a concrete number"),
    (lambda: spaces.fixed(1j), "`value` must be a concrete number"),
    (lambda: jax.jit(spaces.fixed)(1.0), "`value` must be a concrete number .* not a traced value"),
    (lambda: jax.jit(spaces.real)(1.0), "`default` must be a concrete number .* not a traced value"),
    *(
        (lambda x=x: spaces.positive(x), "`default` must be positive, between 1e-30 and 1e30; got")
        for x in (0.99e-30, 1.01e30, -1.0)
    ),
    # Spaces.
    *(
        (lambda fn=fn, space=space: fn(space), NO_LEAF)
        for space in ({"a": 0.1}, [spaces.real(), "adam"])
        for fn in (spaces.default, spaces.num_dims, spaces.names, lambda space: spaces.sample(KEY, space))
    ),
    (lambda: spaces.constrain(problems.RIDGE, {"rate": 0.1}), "Every leaf of a space must be made by"),
    (
        lambda: spaces.constrain(problems.RIDGE, {"rate": spaces.fixed(0.1)}),
        "at least one leaf that is tuned",
    ),
    # λ that does not fit, and λ outside.
    *(
        (lambda fn=fn, value=value: fn(SPACE, value), "^λ does not fit the space .*" + re.escape(message))
        for value, message in MISMATCHES.values()
        for fn in READERS.values()
    ),
    (lambda: spaces.encode(SPACE, drop(LAM, "mix")), r"`spaces.default\(space\)` has the structure that is needed"),
    (
        lambda: spaces.encode(SPACE, LAM | {"depth": jnp.ones(3)}),
        r"Give the leaf of the space another `shape`; or, .* `jax.vmap`",
    ),
    (lambda: to_unconstrained(seed=8), OUTSIDE + "`seed`: .* value that the space fixes, 3; got 8.*the leaf of"),
    (
        lambda: to_unconstrained(seed=np.ones(2)),
        r"`seed`: expected .* shape \(\) \(fixed\), got shape \(2,\)",
    ),
    (
        lambda: to_unconstrained(adam=Adam(2.0, LAM["adam"].betas)),
        OUTSIDE + r"`adam.rate`: it must be between 0.0001 and 0.1\d*; got 2.0",
    ),
    (
        lambda: to_unconstrained(mix=np.array([0.7, 0.7, 0.0])),
        OUTSIDE + r"`mix`: it must be 3 nonnegative weights that sum to one; got \[0.7, 0.7, 0.0\]",
    ),
    (lambda: to_unconstrained(weights=np.array([1.0, -3.0])), "`weights`: it must be positive.*; got -3.0"),
    (lambda: spaces.to_unconstrained([spaces.real()], [np.nan]), OUTSIDE + "`0`: .* finite; got nan"),
    (lambda: to_constrained(seed=1.0), "at `seed`: expected None, since a fixed leaf has no unconstrained.* got float"),
    (lambda: to_constrained(depth=None), r"^The unconstrained λ .* at `depth`: .*to_unconstrained\(space, default"),
    (lambda: to_constrained(weights=jnp.ones(())), r"at `weights`: expected an array of shape \(2,\)"),
    (
        lambda: IN_Z.loop.init(KEY, spaces.Unconstrained({"penalty": None}), problems.TASK.train),
        "The unconstrained λ does not fit the space at `penalty`: expected an array",
    ),
    # Unconstrained coordinates instead of λ, and λ instead of coordinates.
    (lambda: estimate(CONSTRAINED, PENALTY), NATURAL),
    (lambda: spaces.to_constrained(SPACE, LAM), NATURAL),
    (lambda: spaces.to_constrained(spaces.real(), SCALAR), "in natural units .float"),
    (lambda: spaces.to_constrained(SPACE, Z.coordinates), "Mark your own coordinates with `spaces.Unc"),
    (lambda: amortized(CONSTRAINED, PENALTY), NATURAL),
    (lambda: spaces.to_unconstrained(SPACE, Z), UNCONSTRAINED),
    (lambda: spaces.encode(SPACE, Z), UNCONSTRAINED),
    (lambda: spaces.discretize(SPACE, Z), UNCONSTRAINED),
    (lambda: spaces.at_bounds(SPACE, Z), UNCONSTRAINED),
    (lambda: spaces.configuration(SPACE, Z), UNCONSTRAINED),
    (lambda: spaces.active(SPACE, Z), UNCONSTRAINED),
    (lambda: spaces.to_constrained(SPACE, spaces.Unconstrained(Z)), "expected dict, got Unc"),
    (lambda: spaces.encode(SPACE, LAM | {"adam": Z}), "expected Adam, got Unc"),
    (lambda: predictors.mlp(SPACE, 2, hyperparams=Z), UNCONSTRAINED),
    (lambda: estimate(RIDGE, COORDINATES), NO_ENTRY),
    (lambda: amortized(RIDGE, COORDINATES), NO_ENTRY),
    (lambda: COORDINATES["penalty"], "no entry 'penalty'"),
    (lambda: list(COORDINATES), NO_ENTRY),
    (lambda: "penalty" in COORDINATES, NO_ENTRY),
    (lambda: estimate(EVOLUTION, COORDINATES), "`sigma` must be a number or a tree like λ, .*Unconstrained"),
    # Configurations and their conditions.
    *(
        (lambda fn=fn, space=space: fn(space, spaces.default(space)), message)
        for fn in (spaces.configuration, spaces.active)
        for space, message in (
            (
                conditional("b", [1]),
                "condition of `a` names `b`, which must be a `choice` or an `integer`.*got None",
            ),
            (conditional("real", [1]), r"names `real`, .* got Real\("),
            (conditional("model", ["tree"]), "condition of `a` has 'tree', which is not a value of `model`"),
            (conditional("a", [1]), r"conditions of \['a'\] depend on one another"),
            (SAME_NAME, r"Two leaves of the space have the same name, a\.b: rename one of them"),
        )
    ),
    (lambda: spaces.from_configuration(SAME_ENTRY, {"a[0]": 1.0}), r"the same name, a\[0\]"),
    (lambda: spaces.infer([{"layers": [1]}]), r"`layers` has the value \[1\], which is not a number"),
    (lambda: spaces.infer([{"a": True}, {"a": 1}, {"a": "x"}]), r"`a` has labels that are equal \(1, 1.0 and True\)"),
    (lambda: spaces.infer([{"a": str(i)} for i in range(101)]), "`a` has 101 labels"),
    (lambda: spaces.infer([{}]), "No configuration has a parameter"),
    # Documents of ConfigSpace and Optuna.
    (lambda: configspace(A, forbiddens=[{"type": "EQUALS"}]), "cannot have forbidden clauses"),
    (lambda: configspace(A | {"type": "beta_int", "lower": None}), "`a` cannot be represented in a space"),
    (lambda: configspace(B | {"q": 0.25}), "`b` cannot be represented in a space"),
    (lambda: configspace(A, condition={"type": "OR", "conditions": []}), "cannot represent this condition"),
    (
        lambda: configspace(A, B, condition={"parent": "b", "value": 0.5}),
        "condition of `a` names `b`, which must be a `choice` or an `integer`",
    ),
    (
        lambda: configspace(A, KIND, condition={"parent": "kind", "value": "w"}),
        "condition of `a` has 'w', which is not a value of `kind`",
    ),
    (
        lambda: configspace(A, SIZE, condition={"type": "LT", "parent": "size", "value": "small"}),
        "This condition never holds",
    ),
    (lambda: optuna(step=0.25), "`f` cannot be represented in a space: FloatDistribution"),
    (lambda: spaces.to_optuna({"mix": spaces.simplex(2)}), r"`mix\[0\]` belongs to a simplex, which cannot be"),
    (lambda: spaces.to_configspace({"mix": spaces.simplex(2)}), r"`mix\[0\]` belongs to a simplex, which cannot be"),
    # JSON.
    (
        lambda: spaces.to_json(SPACE),
        r"Adam at `space.adam`. Write a NamedTuple as a dict, `space.adam._asdict\(\)`",
    ),
    (lambda: spaces.to_json({1: spaces.real()}), "dicts with strings as keys.*got {1: .* at `space`"),
    (lambda: spaces.to_json(OrderedDict(a=spaces.real())), "of type OrderedDict at `space`"),
    (lambda: spaces.to_json({"a": 0.1}), "got 0.1 of type float at `space.a`"),
    (lambda: spaces.from_json({"space": None}), "`document` must have `version` 1 .* and `space`"),
    (
        lambda: read(None, version=2),
        "must have `version` 1 .of this metaopt release.*got .*2",
    ),
    (
        lambda: read({"type": "categorical"}),
        "known `type`; got {'type': 'categorical'} at `space`",
    ),
    (lambda: read({"type": "dict", "items": {"a": 0.1}}), "got 0.1 at `space.a`"),
    (
        lambda: read({"type": "real", "mean": 1}),
        "type 'real' at `space` cannot be read .*mean",
    ),
    (
        lambda: read({"type": "fixed", "value": 1}),
        "type 'fixed' at `space` cannot be read .*dtype",
    ),
    (
        lambda: read({"type": "interval", "low": 2, "high": 1}),
        "`high` must be above `low`",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
