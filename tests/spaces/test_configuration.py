"""Plain values: λ as a black box receives it, and the way back to λ."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import spaces

SPACE = {
    "model": spaces.choice(["svm", "forest"]),
    "svm": {
        "kernel": spaces.active_if(spaces.choice(["linear", "rbf"], default="rbf"), "model", ["svm"]),
        "gamma": spaces.active_if(spaces.interval(1e-3, 10.0, log=True), "svm.kernel", ["rbf"]),
    },
    "forest": {
        "depth": spaces.active_if(spaces.integer(0, 9), "model", ["forest"]),
        "leaves": spaces.active_if(spaces.integer(2, 64), "forest.depth", [0]),
    },
    "mix": spaces.simplex(2, default=[0.25, 0.75]),
    "scale": spaces.positive(shape=(2,)),
    "flag": spaces.choice([True, False], shape=(2,)),
    "fixed": spaces.fixed(3),
}


DEFAULT = spaces.default(SPACE)


def relaxed(**values):
    """The default, with relaxed values in some places."""
    hyperparams = dict(DEFAULT)
    hyperparams["model"] = jnp.array(values.get("model", [0.6, 0.4]))
    hyperparams["svm"] = {"kernel": jnp.array(values.get("kernel", [0.1, 0.9])), "gamma": jnp.array(0.1)}
    hyperparams["forest"] = {"depth": jnp.array(values.get("depth", 0.3)), "leaves": jnp.array(7.6)}
    return hyperparams


ALWAYS = {
    "mix[0]": 0.25,
    "mix[1]": 0.75,
    "scale[0]": 1.0,
    "scale[1]": 1.0,
    "flag[0]": True,
    "flag[1]": True,
    "fixed": 3,
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"model": "svm", "svm.kernel": "rbf", "svm.gamma": 0.1}),
        ({"kernel": [0.8, 0.2]}, {"model": "svm", "svm.kernel": "linear"}),
        ({"model": [0.1, 0.9]}, {"model": "forest", "forest.depth": 0, "forest.leaves": 8}),
        ({"model": [0.1, 0.9], "depth": 0.6}, {"model": "forest", "forest.depth": 1}),
    ],
)
def test_a_configuration_has_the_active_entries_that_active_marks(values, expected):
    hyperparams = relaxed(**values)
    configuration = spaces.configuration(SPACE, hyperparams)
    assert configuration == expected | ALWAYS
    assert all(type(configuration[name]) is type(value) for name, value in expected.items())
    assert json.loads(json.dumps(configuration)) == configuration
    active = jax.jit(lambda λ: spaces.active(SPACE, λ))(hyperparams)
    names = {name for name, is_active in zip(spaces.names(SPACE), active, strict=True) if is_active}
    assert {name.split("[")[0] for name in names} == {name.split("[")[0] for name in configuration} - {"fixed"}


@pytest.mark.once
def test_configurations_of_samples_come_back():
    draws = jax.jit(jax.vmap(lambda key: spaces.sample(key, SPACE)))(jax.random.split(jax.random.key(0), 10))
    for index in range(10):
        drawn = spaces.configuration(SPACE, jax.tree.map(lambda x, index=index: x[index], draws))
        hyperparams = spaces.from_configuration(SPACE, drawn)
        assert spaces.configuration(SPACE, hyperparams) == drawn
        chex.assert_trees_all_equal_shapes_and_dtypes(hyperparams, DEFAULT)
        # In the corners of the simplex, and at the defaults where nothing is active.
        assert set(np.unique(hyperparams["model"])) == {0.0, 1.0}
        if drawn["model"] == "forest":
            assert hyperparams["svm"]["gamma"] == pytest.approx(0.1)


def test_a_configuration_of_an_older_space_is_read_where_the_spaces_agree():
    old = {"model": "boosting", "svm.gamma": 2, "rate": 0.1}
    hyperparams = spaces.from_configuration(SPACE, old, strict=False)
    assert hyperparams["model"].tolist() == [0.5, 0.5] and hyperparams["svm"]["gamma"] == 2.0
    with pytest.raises(ValueError, match=r"`model` must be one of \('svm', 'forest'\); got 'boosting'"):
        spaces.from_configuration(SPACE, old)
    with pytest.raises(ValueError, match="The space has no `rate`; it has `fixed`, `flag") as error:
        spaces.from_configuration(SPACE, {"rate": 0.1})
    (advice,) = error.value.__notes__  # searchers of records show the error without it
    assert "strict=False" in advice and "strict=False" not in str(error.value)
    # A record of scikit-learn's defaults: None and "auto" where there is a number here.
    other = spaces.from_configuration(SPACE, {"svm.gamma": "auto", "forest.depth": None}, strict=False)
    chex.assert_trees_all_equal(other, DEFAULT)
    with pytest.raises(ValueError, match="`svm.gamma` must be a finite number; got 'auto'"):
        spaces.from_configuration(SPACE, {"svm.gamma": "auto"})


def test_booleans_are_no_numbers_and_fractions_no_integers():
    space = {"depth": spaces.integer(1, 8), "rate": spaces.interval(0.0, 2.0)}
    wrong = {"rate": True, "depth": 3.7}
    for name, message in (("rate", "a finite number; got True"), ("depth", r"an integer \(round it, .*; got 3.7")):
        for fn in (spaces.from_configuration, spaces.complete):
            with pytest.raises(ValueError, match=f"`{name}` must be {message}"):
                fn(space, {name: wrong[name]})
    assert spaces.foreign(space, wrong) == wrong
    assert spaces.complete(space, wrong, strict=False) == {"depth": 4, "rate": 1.0}
    assert spaces.from_configuration(space, wrong, strict=False)["depth"] == pytest.approx(3.7)
    assert spaces.complete(space, {"rate": 2, "depth": np.float32(3.0)}) == {"rate": 2.0, "depth": 3}


def test_defaults_of_missing_parents_do_not_drop_present_entries():
    for partial, message in (
        ({"forest.leaves": 8}, "`forest.leaves` is 8, but .* `model` is 'forest', but `model` is missing and 'svm' by"),
        ({"svm.gamma": 1.0, "model": "forest", "forest.depth": 1, "forest.leaves": 3}, None),  # the forest is meant
        ({"model": "forest", "forest.leaves": 3}, "if `forest.depth` is 0, but `forest.depth` is missing and 4 by"),
        ({"model": "forest", "svm.kernel": float("nan")}, None),
    ):
        if message is None:
            assert "svm.gamma" not in spaces.complete(SPACE, partial)
        else:
            with pytest.raises(ValueError, match=message):
                spaces.complete(SPACE, partial)
        assert set(partial) - set(spaces.complete(SPACE, partial, strict=False)) != set()
    assert spaces.complete(SPACE, {"svm.gamma": 1.0})["svm.gamma"] == 1.0


def test_one_parent_that_rules_out_an_entry_suffices():
    leaf = spaces.active_if(spaces.active_if(spaces.interval(0.0, 1.0), "a", ["y"]), "b", ["y"])
    space = {"a": spaces.choice(["n", "y"]), "b": spaces.choice(["n", "y"]), "x": leaf}
    for parents in ({"a": "n"}, {"b": "n"}, {"a": "n", "b": "y"}):
        assert "x" not in spaces.complete(space, parents | {"x": 0.5})
    for parents in ({}, {"a": "y"}, {"b": "y"}):
        with pytest.raises(ValueError, match=r"`x` is 0.5, but would be ignored: .* is missing"):
            spaces.complete(space, parents | {"x": 0.5})


def test_values_out_of_bounds_are_refused_and_kept_where_the_space_may_have_changed():
    space = {"depth": spaces.integer(1, 8), "rate": spaces.interval(1e-3, 1.0), "rows": spaces.integer(1, 2_000_000)}
    space |= {"C": spaces.interval(1e-3, 1e3, log=True)}
    wrong: list[tuple] = [("depth", 9, "1 and 8"), ("rate", 0.0, "0.001 and 1.0"), ("rows", 2_000_001, "1 and 2000000")]
    wrong += [("rows", n, "1 and 2000000") for n in (0, -1, 2_000_001.0)]
    wrong += [("C", x, "0.001 and 1000.0") for x in (1e-9, -9e-4, 0.00099, 1001)]
    for name, value, bounds in wrong:
        with pytest.raises(ValueError, match=f"`{name}` must be between {bounds}; got {value}"):
            spaces.from_configuration(space, {name: value})
        assert spaces.foreign(space, {name: value}) == {name: value}
        assert spaces.from_configuration(space, {name: value}, strict=False)[name] == value
    assert spaces.from_configuration(space, {"rate": np.float32(1e-3).item()})["rate"] == pytest.approx(1e-3)


def test_numbers_survive_float32_and_stay_within_their_bounds():
    """The float32 next to 0.1 lies above it, that next to 1e-4 below."""
    space = {"rate": spaces.interval(1e-4, 0.1, log=True), "scale": spaces.positive(0.1), "momentum": spaces.fixed(0.9)}
    with jax.enable_x64(False):
        for rate in (1e-4, 3e-3, 0.1):
            hyperparams = spaces.from_configuration(space, {"rate": rate})
            assert hyperparams["rate"].dtype == np.float32
            configuration = spaces.configuration(space, hyperparams)
            assert configuration == {"rate": rate, "scale": 0.1, "momentum": pytest.approx(0.9)}
        coordinates = ({"rate": z, "scale": 0.0, "momentum": None} for z in (-99.0, 99.0))
        ends = [spaces.to_constrained(space, spaces.Unconstrained(z)) for z in coordinates]
        low, high = (spaces.configuration(space, hyperparams)["rate"] for hyperparams in ends)
    assert 1e-4 <= low < 1.001e-4 and 0.0999 < high <= 0.1


def test_foreign_entries_are_named():
    own = {"model": "svm", "svm.gamma": 2, "forest.depth": None, "scale[1]": 1.0, "fixed": "any", "rate": 0.1}
    assert spaces.foreign(SPACE, own) == {}  # None says that nothing is given, other names are not looked at
    others = {"model": None, "svm.gamma": 99.0, "forest.depth": "auto", "svm.kernel": [1]}
    assert spaces.foreign(SPACE, own | others) == others


def test_a_completed_configuration_keeps_its_own_numbers():
    long = 0.0123456789012345678
    partial = {"model": "svm", "svm.gamma": long, "scale[1]": 2, "forest.depth": 3}
    with jax.enable_x64(False):
        completed = spaces.complete(SPACE, partial)
    assert completed == ALWAYS | {"model": "svm", "svm.kernel": "rbf", "svm.gamma": long, "scale[1]": 2.0}
    assert type(completed["scale[1]"]) is float
    # Names that the space does not have are dropped.
    changed = spaces.complete(SPACE, {"model": "boosting", "rate": 1, "svm.gamma": 99.0}, strict=False)
    assert changed == ALWAYS | {"model": "svm", "svm.kernel": "rbf", "svm.gamma": 10.0}
    with pytest.raises(ValueError, match="The space has no `rate`"):
        spaces.complete(SPACE, {"rate": 1})


def test_conditions_survive_json():
    assert spaces.from_json(json.loads(json.dumps(spaces.to_json(SPACE)))) == SPACE
    fixed = spaces.active_if(spaces.fixed(1.0), "model", ["svm"])
    assert spaces.from_json(spaces.to_json(fixed)) == fixed != spaces.fixed(1.0)


def test_gaps_are_absent_where_a_value_does_not_matter_and_refused_where_it_does():
    nan, inactive = float("nan"), {"model": "forest", "svm.kernel": float("nan"), "svm.gamma": np.nan}
    assert spaces.complete(SPACE, inactive) == spaces.complete(SPACE, {"model": "forest"})
    assert spaces.foreign(SPACE, inactive | {"forest.depth": nan, "scale[0]": nan}) == {}
    chex.assert_trees_all_equal(spaces.from_configuration(SPACE, {"scale[0]": nan}, strict=False), DEFAULT)
    with pytest.raises(ValueError, match="`svm.gamma` is active, and must have a value; got nan"):
        spaces.complete(SPACE, {"model": "svm", "svm.kernel": "rbf", "svm.gamma": nan})
    with pytest.raises(ValueError, match=r"`scale\[0\]` must be a finite number; got nan"):
        spaces.complete(SPACE, {"scale[0]": nan})


def test_labels_of_different_types_are_different():
    """`max_features=1` is one feature, and 1.0 is all of them. If all labels are numbers, 2 and 2.0 are equal."""
    space = {"max_features": spaces.choice(["sqrt", 1.0, 0.5]), "bootstrap": spaces.choice([True, False])}
    space |= {"batch": spaces.choice([16, 32]), "dropout": spaces.choice([0.0, 0.5])}
    wrong = {"max_features": 1, "bootstrap": 1, "batch": True, "dropout": False}
    assert spaces.foreign(space, wrong) == wrong
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`{name}` must be one of"):
            spaces.from_configuration(space, {name: value})
    right = {"max_features": np.float64(1.0), "bootstrap": np.bool_(True), "batch": 16.0, "dropout": 0}
    completed = spaces.complete(space, right)
    assert completed == {"max_features": 1.0, "bootstrap": True, "batch": 16, "dropout": 0.0}
    assert type(completed["batch"]) is int and spaces.foreign(space, right | {"max_features": np.str_("sqrt")}) == {}
    share = {"subsample": spaces.choice([1.0, 0.9, 0.5]), "mixed": spaces.choice(["all", 0.9])}
    assert spaces.complete(share, dict.fromkeys(share, float(np.float32(0.9)))) == {"subsample": 0.9, "mixed": 0.9}
    assert spaces.foreign(share, dict.fromkeys(share, 0.90001)) == dict.fromkeys(share, 0.90001)


def test_numbers_next_to_none_are_labels_by_value():
    """In a column with None, a data frame turns 2 into 2.0 and None into NaN. NaN is the default, here None."""
    space = {"depth": spaces.choice([None, 2, 9])}
    for value, expected in ((9.0, 9), (np.float64(2.0), 2), (2, 2), (None, None)):
        completed = spaces.complete(space, {"depth": value})["depth"]
        assert (
            completed == expected
            and type(completed) is type(expected)
            and spaces.foreign(space, {"depth": value}) == {}
        )
    assert spaces.complete(space, {"depth": float("nan")}, strict=False) == {"depth": None}
    two = {"d": spaces.choice([2, 9, None], default=2), "kind": spaces.choice(["a", "b"])}
    two["c"] = spaces.active_if(two["d"], "kind", ["b"])
    for kind, rest in (("a", {}), ("b", {"c": None})):  # also where it is not the default, and only where it is active
        value = {"d": float("nan"), "kind": kind, "c": np.float32("nan")}
        assert (
            spaces.complete(two, value)
            == spaces.complete(two, value, strict=False)
            == {"d": None, "kind": kind, **rest}
        )
    for wrong in (True, "2", 2.5):
        assert spaces.foreign(space, {"depth": wrong}) == {"depth": wrong}


def test_integers_are_whole_but_for_the_rounding_of_float32():
    space = {"depth": spaces.integer(0, 8), "rows": spaces.integer(1, 2_000_000)}
    for name, value, expected in (("depth", 7.9999995, 8), ("depth", 8.000001, 8), ("rows", 1e6 + 1e-2, 1_000_000)):
        assert spaces.complete(space, {name: value})[name] == expected
        assert spaces.from_configuration(space, {name: value})[name] == expected  # exactly
        assert spaces.foreign(space, {name: value}) == {}
    for name, value in (("depth", 7.99), ("depth", 1e-3), ("rows", 1e6 + 0.4)):
        assert spaces.foreign(space, {name: value}) == {name: value}


def test_a_space_is_inferred_from_tried_configurations():
    nan = float("nan")
    tried = [
        {"model": "svm", "kernel": "rbf", "gamma": 0.001, "depth": nan, "n": 1, "flag": True, "seed": 3, "mode": None},
        {"model": "svm", "kernel": "linear", "gamma": nan, "n": 500, "flag": False, "seed": 3, "mode": "x"},
        {"model": "svm", "kernel": "rbf", "gamma": np.float64(1.0), "n": 7, "flag": True, "seed": 3, "mode": "x"},
        {"model": "tree", "depth": 2, "n": 2.0, "flag": True, "seed": 3, "mixed": "sqrt", "mode": "x"},
        {"model": "tree", "depth": None, "n": 2.5, "flag": True, "seed": 3, "mixed": 0.5, "mode": "x"},
        {"model": "tree", "depth": np.int64(9), "n": 3, "flag": True, "seed": 3, "mixed": 0.5, "mode": "x"},
        {"model": "tree", "depth": 5, "n": 3, "flag": True, "seed": 3, "mixed": 1, "mode": "x"},
        {"model": "svm", "kernel": "rbf", "gamma": 0.5, "n": 3, "flag": True, "seed": 3, "mode": "x"},
    ]
    space = spaces.infer([c | {"n": n} for c in tried for n in {c["n"], 2.5, 4}])
    assert space == {
        "model": spaces.choice(["svm", "tree"]),
        "kernel": spaces.active_if(spaces.choice(["linear", "rbf"]), "model", ["svm"]),
        "gamma": spaces.active_if(spaces.interval(0.001, 1.0, log=True), "kernel", ["rbf"]),
        "depth": spaces.active_if(spaces.choice([None, 2, 5, 9]), "model", ["tree"]),
        "n": spaces.interval(1, 500, log=True),
        "flag": spaces.choice([False, True]),
        "seed": spaces.fixed(3),
        "mode": spaces.choice([None, "x"]),
        "mixed": spaces.active_if(spaces.choice([0.5, 1, "sqrt"]), "model", ["tree"]),
    }
    assert all(spaces.foreign(space, configuration) == {} for configuration in tried)
    assert spaces.infer(tried[:3]) == spaces.infer(tried[2::-1])
    optional = spaces.infer([*tried[3:7], {"model": "tree"}, *tried[:3]])
    assert optional["depth"] == spaces.choice([None, 2, 5, 9]) and optional["gamma"].condition == ()
    assert spaces.infer([{"n": 1}, {"n": 2**40}]) == {"n": spaces.interval(1, 2**40, log=True)}
    few = [{"criterion": "gini", "depth": d} for d in (3, 9, 5)] + [{"criterion": "entropy"}] * 5  # one configuration
    assert spaces.infer(few)["depth"] == spaces.integer(3, 9)
    others = [{"criterion": "entropy", "n": n} for n in (1, 2)]
    assert spaces.infer(few + others)["depth"] == spaces.active_if(spaces.integer(3, 9), "criterion", ["gini"])
    assert spaces.infer(few[1:] + others)["depth"] == spaces.integer(5, 9)  # two have it
    # If a column has more numbers than a choice may have, None is ignored.
    line = [{"n": n} for n in range(21)]
    assert spaces.infer([*line[:20], {"n": None}])["n"] == spaces.choice([None, *range(20)])
    assert spaces.infer([*line, {"n": None}])["n"] == spaces.integer(0, 20)
    # A data frame has made floats of half of the integers.
    mixed = [{"n": n} for n in (None, 2.0, 2, 9, 9.0)] + [{"n": float(n)} for n in range(18)]
    assert spaces.infer(mixed[:3])["n"] == spaces.choice([None, 2])
    assert spaces.infer(mixed)["n"].labels == (None, *range(18)) and type(spaces.infer(mixed)["n"].labels[2 + 1]) is int
    whole = [{"n": 2.0, "m": m} for m in (1, 2, 3)] + [{"n": n} for n in (None, 2, 9)]
    assert spaces.infer(whole)["m"] == spaces.integer(1, 3)  # 2 does not tell
    assert spaces.infer([{"n": n} for n in (None, 2, 0.5)])["n"] == spaces.choice([None, 0.5, 2])
