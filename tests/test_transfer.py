"""The experiment that trains g: kept results are used only for what determines them, and footers count all the work."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import script
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer import main as command
from experiments.hyperparameters.transfer import second_stage
from experiments.hyperparameters.transfer.compare import _table, groups
from experiments.hyperparameters.transfer.config import DEFAULT, FEATURES, SMOKE, Width
from experiments.hyperparameters.transfer.families import is_development
from experiments.hyperparameters.transfer.judge import Finished, Outcome, digest
from experiments.hyperparameters.transfer.learning import decayed
from experiments.hyperparameters.transfer.pool import Pool, _describe_one
from experiments.hyperparameters.transfer.runs import Part, hyperparams_of
from experiments.hyperparameters.transfer.variants import (
    VARIANTS,
    Predicted,
    best_of_draws,
    development_parts,
    of_spread,
    predict,
    shipped_member,
    start_of,
    table,
    uses,
)
from metaopt import automl, base, tasks

pytestmark = pytest.mark.once  # an experiment


def _make(value, calls):
    def make():
        calls.append(value)
        return {"method": Outcome(np.full((3, 2), value), 2.0)}

    return make


@pytest.mark.parametrize("common", ["other tables", "tables"])
@pytest.mark.parametrize("start", [{"rate": jnp.ones(2)}, {"rate": jnp.array([1.0, 1.001])}])
def test_a_kept_result_is_used_only_for_the_same_tables_and_the_same_start(tmp_path, common, start):
    calls = []
    Finished(tmp_path, "tables", 2)("g", _make(1.0, calls), {"rate": jnp.ones(2)})
    result = Finished(tmp_path, common, 2)("g", _make(2.0, calls), start)["method"]
    is_same = common == "tables" and bool((start["rate"] == 1).all())
    assert calls == ([1.0] if is_same else [1.0, 2.0])
    np.testing.assert_array_equal(result.scores, np.full((3, 2), calls[-1]))
    assert result.runs == 2.0


def test_the_seconds_of_kept_results_are_added(tmp_path):
    first = Finished(tmp_path, "tables")
    for name in ("a", "b"):
        first(name, lambda: sum(range(200_000)) and {})
    continued = Finished(tmp_path, "tables")
    assert continued.seconds == 0
    continued("a", lambda: pytest.fail("it was kept"))
    assert 0 < continued.seconds < first.seconds


def test_a_digest_depends_on_values_names_and_types():
    values = [{"a": 1.0}, {"b": 1.0}, {"a": 1}, {"a": np.float32(1)}, {"a": (1.0, 1.0)}, {"a": "1.0"}, {"a": None}]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": np.arange(3)}) == digest({"a": np.array([0, 1, 2])})


def test_a_footer_states_the_seconds_of_all_the_work(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    script.publish(script.__file__, "Title", "text", SimpleNamespace(smoke=True), seconds=12345.0)
    assert "12345 processor seconds" in capsys.readouterr().out


@pytest.mark.parametrize("problem, option", [("classification", []), ("regression", ["--regression"])])
def test_smoke_runs_and_the_two_problems_have_their_own_folders(monkeypatch, problem, option):
    shipped = []
    monkeypatch.setattr(command, "ship", lambda problem, out, seeds: shipped.append((problem, out.name)))
    command.main(["ship", *option])
    command.main(["ship", "--smoke", *option])
    name = "transfer" + "_regression" * bool(option)
    assert shipped == [(problem, name), (problem, f"{name}_smoke")]


def test_groups_of_development_tasks_are_those_of_their_sizes_and_kinds():
    mask = lambda rows: (np.arange(500)[None] < np.array(rows)[:, None]).astype(np.float32)
    shared = (np.arange(20)[None] < np.array([2, 3, 20])[:, None]).astype(np.float32)
    train, valid = {"mask": mask([80, 100, 400]), "class_mask": shared}, {"mask": mask([60, 60, 200])}
    part = Pool(base.Task(train, valid), None, np.array(["a", "a", "b"]), np.array(["rule", "natural", "rotated"]))
    made = {name: inside.tolist() for name, inside in groups([part]).items()}
    assert made["below 150 rows"] == made["simulated rules"] == [True, False, False]
    assert made["150 to 500 rows"] == made["natural targets"] == [False, True, False]
    assert made["500 rows and more"] == made["13 classes and more"] == [False, False, True]
    assert made["others, without rules"] == [False, True, False]
    values = {"x: mean of g": np.array([1.0, 2.0, 5.0]), "other": np.array([1.0, 4.0, 5.0])}
    table = _table(values, {"all": np.ones(3, bool)}, part.family, [Path("x")])
    assert "| other | 3.7500 (+0.5000 [" in table  # a family counts once


def test_a_task_with_many_classes_is_as_wide_as_the_widths_allow():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(20), 20).astype(np.int32)
    x = rng.normal(size=(400, 30)).astype(np.float32) + y[:, None]
    table = tasks.Table("many", "many", x, y, np.zeros(30, bool))
    assert _describe_one(table, (Width(64, 12),)) is None
    prepared, features = _describe_one(table, (Width(64, 12), Width(24, 32)))
    assert (prepared.num_features, prepared.num_classes) == (24, 20) and set(FEATURES) <= set(features)


# ---- Variants of the shipped g --------------------------------------------------------------------------------------


def _part(n: int) -> Part:
    rng = np.random.default_rng(n)
    train = {
        "x": rng.normal(size=(n, 20, 3)),
        "y": rng.integers(0, 2, (n, 20)),
        "mask": np.ones((n, 20)),
        "feature_mask": np.ones((n, 3)),
        "class_mask": np.ones((n, 2)),
    }
    raw = rng.uniform(0.2, 0.8, (n, len(FEATURES)))
    return Part(base.Task(train, None), {}, raw, np.array(["a"] * n), np.array(["rotated"] * n), np.full(n, 20))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_starts_with_the_predictions_of_the_member_of_its_seed(variant):
    parts = [_part(2), _part(3)]
    start = predict(start_of(variant, DEFAULT, 1), parts)
    np.testing.assert_allclose(start.z, predict(shipped_member(1), parts).z, rtol=1e-5, atol=1e-6)
    assert start.z.shape == (5, 14) and np.abs(start.z - predict(shipped_member(0), parts).z).max() > 0.01
    if variant == "spread":
        np.testing.assert_allclose(start.spread, DEFAULT.spread, rtol=1e-6)
    else:
        assert start.spread is None


def test_the_rows_change_the_prediction_of_a_set_network_that_uses_them():
    start = start_of("rows", DEFAULT, 0)
    head = start.meta_params["head"]
    moved = start._replace(meta_params=start.meta_params | {"head": head | {"linear": head["linear"] + 0.1}})
    part = _part(2)
    other = part._replace(task=part.task._replace(train=part.task.train | {"x": 3 * part.task.train["x"]}))
    assert np.abs(predict(moved, [part]).z - predict(moved, [other]).z).max() > 0.01
    np.testing.assert_allclose(predict(start, [part]).z, predict(start, [other]).z, rtol=1e-5, atol=1e-6)


def test_only_the_spread_has_a_larger_rate():
    masks = {variant: of_spread(start_of(variant, DEFAULT, 0).meta_params) for variant in VARIANTS}
    assert {name: any(jax.tree.leaves(mask)) for name, mask in masks.items()} == {
        "spread": True,
        "rows": False,
        "longer": False,
    }
    assert all(jax.tree.leaves(masks["spread"].pop("log_spread"))) and not any(jax.tree.leaves(masks["spread"]))


def test_centers_and_biases_do_not_decay():
    masks = {variant: decayed(start_of(variant, DEFAULT, 0).meta_params) for variant in VARIANTS}
    plain = {"center": False, "linear": True, "hidden": True, "bias": False, "out": True}
    layer = {"w": True, "b": False}
    assert masks["longer"] == plain
    assert masks["rows"] == {"entry": layer, "pair": layer, "embedding": True, "head": plain}
    assert masks["spread"] == plain | {"log_spread": {"center": False, "linear": True}}


def test_the_half_of_the_validation_rows_that_judges_takes_no_part_in_the_choice(tmp_path):
    names = np.array([*map(str, range(40))])
    mask = (np.arange(30)[None] < np.arange(1, 41)[:, None] % 30).astype(np.float32)
    saved = {"train/mask": np.ones((40, 50), np.float32), "valid/mask": mask, "family": names, "kind": names}
    np.savez(tmp_path / "pool_1.npz", raw_features=np.zeros((40, len(FEATURES))), **saved)
    (part,) = development_parts(DEFAULT, tmp_path)
    rows = np.array([is_development(name) for name in names])
    chooses, judges = part.task.valid["mask"], part.test["mask"]
    np.testing.assert_array_equal(chooses + judges, mask[rows])
    assert not (chooses * judges).any() and 0.4 < chooses.sum() / mask[rows].sum() < 0.6
    assert part.family.tolist() == names[rows].tolist() and (part.rows == 50 + mask[rows].sum(1)).all()


def test_validation_losses_choose_the_draw_whose_test_loss_counts():
    space = automl.shipped_predictor().space
    seen = []

    class Recorded:
        def __call__(self, key, hyperparams):
            seen.append((key, hyperparams))
            k = len(seen)
            return np.array([[abs(k - 3), 10.0 + k, 0], [k, 20.0 + k, 0]])

        def take(self):
            return []

    z = predict(shipped_member(0), [_part(2)]).z
    losses = best_of_draws(Recorded(), space, z, np.array([[0.0], [2.0]]), 4)
    assert losses["center"].tolist() == [11, 21] and losses["best"].tolist() == [13, 21]
    assert len(seen) == 4 and len({str(key) for key, _ in seen}) == 1
    for _, own in seen[1:]:
        start = hyperparams_of(space, z)
        same = jax.tree.map(lambda a, b: np.isclose(a, b, rtol=1e-5), own, start)
        assert all(row[0] for row in same.values()) and not any(row[1] for row in same.values())


def test_a_variant_is_compared_with_g_over_families_and_seeds():
    seeds = lambda *rows: {"center": np.array(rows), "best": np.array(rows) / 2}
    losses = {"g": seeds([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]), "rows": seeds([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])}
    *_, g, rows = table(losses, np.array(["a", "a", "b"]), 10).strip().splitlines()
    assert g.startswith("| g | 2.7500 |  | 1.3750 |")
    assert rows.startswith("| rows | 2.5000 | -0.2500 [") and "| 1.2500 | -0.1250 [" in rows


def test_a_learned_spread_is_also_drawn_around_the_shipped_center():
    z = np.zeros((2, 3))
    variants = {"spread": Predicted(z + 1, z + 2), "rows": Predicted(z + 3, None)}
    methods = uses(Predicted(z, None), variants, SMOKE.spread)
    summary = {label: (float(np.mean(c)), float(np.mean(s))) for label, (c, s) in methods.items()}
    assert summary == {
        "g": (0, 0.5),
        "spread": (1, 0.5),
        "rows": (3, 0.5),
        "spread, learned": (1, 2),
        "g, the learned spread": (0, 2),
    }


# ---- A second stage --------------------------------------------------------------------------------------------------


class FakeRecorded:
    """Runs whose validation loss is the logarithm of the rate, and whose test loss is 100 minus this loss."""

    calls: list

    def __init__(self, network, parts):
        FakeRecorded.calls = []

    def __call__(self, key, hyperparams):
        FakeRecorded.calls.append((key, hyperparams))
        valid = np.log(np.asarray(hyperparams["rate"], np.float64))
        return np.stack([valid, 100 - valid, 0 * valid], axis=1)

    def take(self):
        return []


@pytest.fixture
def second(monkeypatch):
    monkeypatch.setattr(second_stage, "Recorded", FakeRecorded)
    return second_stage


def test_the_search_learns_from_one_task_of_each_family_and_from_no_development_family(tmp_path):
    names = np.array([f"family {i % 30}" for i in range(60)])
    for k in range(2):
        saved = {f"{part}/mask": np.ones((60, 50), np.float32) for part in ("train", "valid")}
        features = np.arange(60.0)[:, None] + 1000 * k + np.zeros(len(FEATURES))
        np.savez(tmp_path / f"pool_{k}.npz", raw_features=features, family=names, kind=names, **saved)
    parts = second_stage.learning_parts(dataclasses.replace(DEFAULT, recorded_tasks=100), tmp_path)
    family = np.concatenate([part.family for part in parts])
    assert sorted(family) == sorted(name for name in set(names) if not is_development(name))
    for k, part in enumerate(parts):  # the features are those of the family's own task
        assert part.family.tolist() == [names[int(row) - 1000 * k] for row in part.raw_features[:, 0]]
    few = second_stage.learning_parts(dataclasses.replace(DEFAULT, recorded_tasks=7), tmp_path)
    assert len({name for part in few for name in part.family}) == sum(len(part.family) for part in few) == 7


def test_the_first_recorded_run_is_that_of_g_and_the_others_lie_around_it(second):
    network, parts = make_network(SMOKE.run), [_part(2), _part(3)]
    runs = second.runs_around(network, parts, (0.0, 0.5, 1.0, 1.0), 0)
    g = hyperparams_of(network.space, second.shipped_starts(parts, network.space)["g"])
    np.testing.assert_allclose(runs["rate"][0], g["rate"], rtol=1e-6)
    assert runs["loss"].shape == (4, 5, 2) and len(np.unique(runs["rate"])) == 4 * 5
    np.testing.assert_allclose(runs["loss"][..., 0], np.log(runs["rate"]), rtol=1e-6)
    assert len({str(key) for key, _ in FakeRecorded.calls}) == 1


def test_a_record_has_the_task_the_hyperparameters_and_the_validation_loss_of_its_run(second, monkeypatch):
    network, parts = make_network(SMOKE.run), [_part(2), _part(3)]
    runs, seen = second.runs_around(network, parts, (0.0, 0.5), 0), {}
    train = lambda records, **options: seen.update(records=records, **options)
    monkeypatch.setattr(second.blackbox, "train_meta_optimizer", train)
    second.learned_search(network, parts, runs)
    assert [record.task for record in seen["records"]] == 2 * ["0", "1", "2", "3", "4"]
    for record in seen["records"]:
        assert record.outcome == pytest.approx(np.log(record.configuration["rate"]), rel=1e-6)
    decays = [record.configuration["decay_hidden"] for record in seen["records"]]
    np.testing.assert_allclose(decays, runs["decay_hidden"].ravel(), rtol=1e-6)
    assert seen["features"].keys() == seen["families"].keys() == set("01234")


def test_a_search_reads_its_own_validation_losses_and_the_best_of_them_counts(second):
    network, told = make_network(SMOKE.run), []

    def searcher(number):
        def ask(state, num):
            rate = 1e-3 * (1 + number) * (3 - state if state < 2 else 2.5)
            return [base.Record("", {name: rate for name in network.space}, trial=state)], state

        def tell(state, records):
            told.append((number, records[0].outcome, records[0].configuration["rate"]))
            return state + 1

        return base.Searcher(lambda key, space: 0, ask, tell)

    losses = second.search(network, [_part(2)], [searcher(0), searcher(1)], 3)["loss"]
    rates = 1e-3 * np.array([[3, 6], [2, 4], [2.5, 5]])
    np.testing.assert_allclose(losses[..., 0], np.log(rates), rtol=1e-6)
    assert all(outcome == pytest.approx(np.log(rate), rel=1e-6) for _, outcome, rate in told) and len(told) == 6
    np.testing.assert_allclose(second.best(losses), 100 - np.log(rates[1]), rtol=1e-6)
