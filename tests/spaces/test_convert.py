"""Optuna's distributions and ConfigSpace's JSON: what goes out comes back."""

import json
import math

import chex
import jax
import pytest

from metaopt import spaces

SPACE = {
    "a": spaces.integer(1, 10, default=6),
    "b": spaces.interval(1e-3, 1.0, default=0.5005),
    "flag": spaces.choice([True, False]),
    "g": spaces.active_if(spaces.interval(1e-4, 1.0, log=True, default=1e-2), "kind", ["x"]),
    "kind": spaces.choice(["x", "y", "z"], default="y"),
    "n": spaces.active_if(spaces.active_if(spaces.integer(1, 64, log=True), "kind", ["x", "y"]), "a", [9, 10]),
    "three": spaces.fixed(3),
}

# Written by ConfigSpace 1.2.0.
DOCUMENT = json.loads("""
{"name": null, "hyperparameters": [
{"type": "uniform_int", "name": "a", "lower": 1, "upper": 10, "default_value": 6, "log": false, "meta": null},
{"type": "constant", "name": "const", "value": 3, "meta": null},
{"type": "categorical", "name": "kind", "choices": ["x", "y", "z"], "weights": null, "default_value": "x",
 "meta": null},
{"type": "normal_float", "name": "norm", "mu": 0.0, "sigma": 1.0, "lower": -3.0, "upper": 3.0, "default_value": 3.0,
 "log": false, "meta": null},
{"type": "ordinal", "name": "o", "sequence": ["s", "m", "l"], "default_value": "m", "meta": null},
{"type": "uniform_float", "name": "b", "lower": 0.001, "upper": 1.0, "default_value": 0.5005, "log": false,
 "meta": null},
{"type": "uniform_float", "name": "g", "lower": 0.0001, "upper": 1.0, "default_value": 0.01, "log": true,
 "meta": null},
{"type": "uniform_int", "name": "n", "lower": 1, "upper": 64, "default_value": 8, "log": true, "meta": null}],
"conditions": [
{"type": "AND", "child": "b", "conditions": [{"type": "NEQ", "child": "b", "parent": "kind", "value": "x"},
 {"type": "GT", "child": "b", "parent": "a", "value": 5}]},
{"type": "EQ", "child": "g", "parent": "kind", "value": "x"},
{"type": "IN", "child": "n", "parent": "kind", "values": ["x", "y"]}],
"forbiddens": [], "python_module_version": "1.2.0", "format_version": 0.4}
""")


def test_a_space_comes_back_from_configspace_s_json():
    document = spaces.to_configspace(SPACE)
    assert spaces.from_configspace(json.loads(json.dumps(document))) == SPACE


def test_configspace_s_own_json_is_read():
    space = spaces.from_configspace(DOCUMENT)
    b = spaces.active_if(spaces.interval(0.001, 1.0), "kind", ["y", "z"])
    assert space == {
        "a": spaces.integer(1, 10, default=6),
        "const": spaces.fixed(3),
        "kind": spaces.choice(["x", "y", "z"]),
        "norm": spaces.interval(-3.0, 3.0, default=3.0 - 6e-6),
        "o": spaces.choice(["s", "m", "l"], default="m"),
        "b": spaces.active_if(b, "a", [6, 7, 8, 9, 10]),
        "g": spaces.active_if(spaces.interval(1e-4, 1.0, log=True, default=0.01), "kind", ["x"]),
        "n": spaces.active_if(spaces.integer(1, 64, log=True, default=8), "kind", ["x", "y"]),
    }


def test_configspace_reads_what_is_written_for_it(tmp_path):
    ConfigSpace = pytest.importorskip("ConfigSpace")
    (tmp_path / "space.json").write_text(json.dumps(spaces.to_configspace(SPACE)))
    theirs = ConfigSpace.ConfigurationSpace.from_json(tmp_path / "space.json")
    default = spaces.configuration(SPACE, spaces.default(SPACE))
    assert dict(theirs.get_default_configuration()) == pytest.approx(default)
    for drawn in theirs.sample_configuration(50):
        ours = spaces.configuration(SPACE, spaces.from_configuration(SPACE, dict(drawn)))
        assert ours == pytest.approx(dict(drawn))
    theirs.to_json(tmp_path / "again.json")
    assert spaces.from_configspace(json.loads((tmp_path / "again.json").read_text())) == SPACE


def test_a_constant_label_stays_in_the_configuration():
    constant = {"type": "constant", "name": "criterion", "value": "friedman_mse"}
    space = spaces.from_configspace({"hyperparameters": [constant, DOCUMENT["hyperparameters"][0]]})
    λ = spaces.sample(jax.random.key(0), space)
    assert spaces.configuration(space, λ)["criterion"] == "friedman_mse"
    assert not spaces.at_bounds(space, λ)["criterion"]
    z = spaces.to_unconstrained(space, λ)
    chex.assert_trees_all_close(spaces.to_constrained(space, z), λ)
    assert spaces.from_json(json.loads(json.dumps(spaces.to_json(space)))) == space
    assert spaces.from_configspace(spaces.to_configspace(space)) == space
    optuna = pytest.importorskip("optuna").distributions
    assert spaces.from_optuna(spaces.to_optuna(space))["criterion"] == space["criterion"]
    assert spaces.from_optuna({"c": optuna.CategoricalDistribution([None])}) == {"c": spaces.choice([None])}


@pytest.mark.parametrize(("log", "inside"), [(False, 5.0 + 1e-6 * 2.0), (True, 5.0 * (7 / 5) ** 1e-6)])
def test_a_default_at_the_lower_bound_moves_a_millionth_of_the_range_inside(log, inside):
    kind = {"type": "uniform_float", "name": "x", "lower": 5.0, "upper": 7.0, "default_value": 5.0, "log": log}
    space = spaces.from_configspace({"hyperparameters": [kind], "conditions": [], "forbiddens": []})
    assert float(space["x"].default) == pytest.approx(inside, rel=1e-12)


def test_optuna_s_distributions():
    optuna = pytest.importorskip("optuna").distributions
    distributions = spaces.to_optuna(SPACE | {"real": spaces.real(1.0, 2.0), "rates": spaces.positive(0.1, shape=(2,))})
    rate = optuna.FloatDistribution(0.1 * math.exp(-3), 0.1 * math.exp(3), log=True)
    assert distributions == {
        "a": optuna.IntDistribution(1, 10),
        "b": optuna.FloatDistribution(1e-3, 1.0),
        "flag": optuna.CategoricalDistribution([True, False]),
        "kind": optuna.CategoricalDistribution(["x", "y", "z"]),
        "rates[0]": rate,
        "rates[1]": rate,
        "real": optuna.FloatDistribution(-5.0, 7.0),
        "g": optuna.FloatDistribution(1e-4, 1.0, log=True),
        "n": optuna.IntDistribution(1, 64, log=True),
    }
    assert list(distributions).index("kind") < list(distributions).index("g")
    converted = spaces.from_optuna(distributions)
    assert converted["g"] == spaces.interval(1e-4, 1.0, log=True) and converted["flag"] == SPACE["flag"]
    assert converted["n"] == spaces.integer(1, 64, log=True)
    stepped = {"i": optuna.IntDistribution(2, 6, step=2), "one": optuna.FloatDistribution(0.5, 0.5)}
    assert spaces.from_optuna(stepped) == {"i": spaces.choice([2, 4, 6], default=4), "one": spaces.fixed(0.5)}


def test_an_ordinals_places_are_compared_and_not_its_labels():
    size = {"name": "size", "type": "ordinal", "sequence": ["small", "medium", "large"], "default_value": "small"}
    rate = {"name": "rate", "type": "uniform_float", "lower": 0.0, "upper": 1.0}
    condition = {"type": "LT", "child": "rate", "parent": "size", "value": "large"}
    space = spaces.from_configspace({"hyperparameters": [size, rate], "conditions": [condition]})
    assert space["rate"].condition == (("size", ("small", "medium")),)


def test_the_distributions_of_a_study():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=1)
    distributions = {n: d for trial in study.trials for n, d in trial.distributions.items()}
    assert spaces.from_optuna(distributions) == {"x": spaces.interval(0.0, 1.0)}
