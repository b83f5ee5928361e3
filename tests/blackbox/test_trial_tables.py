"""Tables of trials: records as an array and back, and the published ones."""

import json
import math

import numpy as np
import pytest

from metaopt import blackbox, spaces
from metaopt.base import Record


def test_records_become_a_table_and_come_back():
    records = [
        Record("b", {"x": 1, "kind": "p"}, 0.5, 1 / 3, 2.0),
        Record("b", {"kind": "p", "x": 1}, 0.4, 1.0, 6.0),  # the same configuration
        Record("a", {"x": 2}, 0.1, 1.0, 1.0, seed=0),
        Record("a", {"x": 2}, 0.3, 1.0, 2.0, seed=1),
        Record("a", {"x": 3}, status="FAIL"),
        Record("a", {"x": 1, "kind": "p"}, 0.9, 1.0, status="PRUNED"),  # reached somewhere below the whole budget
    ]
    table = blackbox.tabulate(records, families={"a": "letters"})
    assert table.tasks == ("b", "a") and table.families == ("b", "letters")
    assert table.configurations == ({"x": 1, "kind": "p"}, {"x": 2}, {"x": 3})
    nan = math.nan
    expected = [[[0.5, 0.4], [nan, nan], [nan, nan]], [[nan, nan], [nan, 0.2], [nan, nan]]]
    np.testing.assert_allclose(table.outcomes, expected)
    np.testing.assert_allclose(table.costs[0, 0], [2.0, 6.0])
    loaded = table.records()
    assert [(r.task, r.trial, r.fidelity, r.outcome) for r in loaded] == [
        ("b", 0, pytest.approx(1 / 3), 0.5),
        ("b", 0, 1.0, 0.4),
        ("a", 1, 1.0, pytest.approx(0.2)),
    ]


def test_fidelities_that_are_equal_but_for_rounding_are_one_column():
    budgets = [1 / 3, float(np.float32(1 / 3)), 0.5, 0.9999999, 1.0]
    table = blackbox.tabulate([Record("a", {"x": i}, float(i), f) for i, f in enumerate(budgets)])
    assert table.fidelities.tolist() == [1 / 3, 0.5, 1.0] and table.outcomes.shape == (1, 5, 3)
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in table.outcomes[0]] == [[0], [0], [1], [2], [2]]
    both = blackbox.tabulate([Record("a", {"x": 1}, 0.5), Record("a", {"x": 1}, 0.25, 0.9999999)])
    assert both.fidelities.tolist() == [1.0] and both.outcomes.tolist() == [[[0.375]]]
    assert blackbox.tabulate([Record("a", {"x": 1}, 0.25, 0.9999999)]).fidelities.tolist() == [1.0]


def test_hpob_s_json(tmp_path):
    content = {"5860": {"3": {"X": [[0.0, 1.0], [0.5, 0.25]], "y": [[0.75], [0.5]]}, "9": {"X": [[1, 0]], "y": [[1]]}}}
    (tmp_path / "meta.json").write_text(json.dumps(content))
    records = blackbox.from_hpob(tmp_path / "meta.json", "5860")
    assert records == [
        Record("3", {"x0": 0.0, "x1": 1.0}, 0.25, trial=0, cost=records[0].cost),
        Record("3", {"x0": 0.5, "x1": 0.25}, 0.5, trial=1, cost=records[1].cost),
        Record("9", {"x0": 1, "x1": 0}, 0.0, trial=0, cost=records[2].cost),
    ]
    with pytest.raises(ValueError, match="has no search space '1'; it has 5860"):
        blackbox.from_hpob(tmp_path / "meta.json", "1")


def test_records_in_the_form_of_hpob_or_openml_are_read_again(tmp_path):
    file, plain = tmp_path / "meta.json", lambda records: [(r.task, r.configuration, r.outcome) for r in records]
    trials = [("3", {"x0": 0.0, "x1": 1}, 0.25), ("9", {"x1": 0.5, "x0": 0.25}, 0.5), ("3", {"x0": 1, "x1": 0.75}, 0)]
    records = [Record(task, c, y, trial=i) for i, (task, c, y) in enumerate(trials)]
    others = [Record("3", {"x0": 0.5, "x1": 0.5}, status="FAIL"), Record("3", {"x0": 0.1, "x1": 0.5}, 0.1, 0.5)]
    blackbox.to_hpob(file, "a", records + others)
    blackbox.to_hpob(file, "b", records[:1])
    assert plain(blackbox.from_hpob(file, "a")) == plain([records[0], records[2], records[1]])
    assert plain(blackbox.from_hpob(file, "b")) == plain(records[:1]) and list(tmp_path.iterdir()) == [file]
    content = json.loads(file.read_text())["a"]["3"]
    assert content == {"X": [[0.0, 1.0], [1.0, 0.75]], "y": [[0.75], [1.0]]}
    space = {"rate": spaces.interval(1e-4, 1.0, log=True), "kind": spaces.choice(["a", "b"])}
    blackbox.to_hpob(file, "c", [Record("3", {"rate": 1e-2, "kind": "b"}, 0.25)], space=space)
    (record,) = blackbox.from_hpob(file, "c")
    assert sorted(record.configuration.values()) == pytest.approx([0.0, 0.5, 1.0], abs=1e-6)
    assert "a" in json.loads(file.read_text())
    # Names and labels of all kinds, None and booleans.
    mixed = [Record("t", {"svc__C": 1.5, "kernel": "rbf", "depth": None, "shrinking": True, "n": 3}, 0.25, trial=7)]
    rows = blackbox.to_openml_evaluations(mixed + others)
    loaded = blackbox.from_openml_evaluations(rows)
    assert rows[0]["value"] == 0.75 and rows[0]["parameters"]["kernel"] == '"rbf"'
    assert [r._replace(cost=0.0) for r in loaded] == [r._replace(cost=0.0) for r in mixed]
    # NumPy's numbers are plain ones there.
    typed = Record("t", {"x": np.float32(0.5), "n": np.int64(1)}, np.float32(0.25), trial=7)  # pyright: ignore
    blackbox.to_hpob(file, "d", [typed])
    assert json.loads(file.read_text())["d"]["t"] == {"X": [[0.5, 1.0]], "y": [[0.75]]}
    assert blackbox.to_openml_evaluations([typed])[0]["parameters"] == {"x": "0.5", "n": "1"}


def test_numpys_scalars_are_numbers(tmp_path):
    configuration = {"x0": np.float32(0.5), "x1": np.int64(1), "x2": 0}
    record = Record("3", configuration, 0.25)
    blackbox.to_hpob(tmp_path / "a.json", "a", [record])
    assert blackbox.from_hpob(tmp_path / "a.json", "a")[0].configuration == {"x0": 0.5, "x1": 1.0, "x2": 0.0}
    (row,) = blackbox.to_openml_evaluations([record._replace(configuration=configuration | {"b": np.bool_(True)})])
    assert row["parameters"] == {"x0": "0.5", "x1": "1", "x2": "0", "b": "true"}
    assert blackbox.tabulate([record]).configurations == ({"x0": 0.5, "x1": 1, "x2": 0},)


def test_openml_s_evaluations():
    flow = "sklearn.svm.classes.SVC(16)"
    pipe = "sklearn.pipeline.Pipeline(imputer=a.Imputer,svc=sklearn.svm.classes.SVC)(1)"
    row = {
        "run_id": 7,
        "task_id": 3,
        "setup_id": 5,
        "flow_id": 16,
        "data_id": 3,
        "data_name": "kr-vs-kp",
        "value": 0.75,
    }
    parameters = {f"{flow}_C": "1.5", f"{flow}_kernel": '"rbf"', f"{flow}_shrinking": "true", f"{flow}_tol": "null"}
    parameters |= {f"{flow}_steps": '[{"oml-python:serialized_object": 1}]', f"{flow}_note": "free text"}
    both = {f"{flow}_verbose": "1", f"{pipe}_verbose": "2"}
    records = blackbox.from_openml_evaluations([row | {"parameters": parameters}, row | {"parameters": both}])
    expected = {"C": 1.5, "kernel": "rbf", "shrinking": True, "tol": None, "note": "free text"}
    assert records[0] == Record("kr-vs-kp", expected, 0.25, trial=7, cost=records[0].cost)
    assert records[1].configuration == {f"{flow}_verbose": 1, f"{pipe}_verbose": 2}


def test_openml_s_data_sets_of_one_name_are_several_tasks():
    row = {"data_name": "iris", "run_id": 7, "value": 0.5, "parameters": {}}
    ids = [{"data_id": 61}, {"data_id": 969.0}, {"data_id": 61, "data_name": "wine"}, {"data_id": math.nan}, {}]
    rows = [row | other for other in ids]
    names = [record.task for record in blackbox.from_openml_evaluations(rows)]
    assert names == ["iris (61)", "iris (969)", "wine", "iris", "iris"]
    assert [record.task for record in blackbox.from_openml_evaluations(rows[1:])] == ["iris", "wine", "iris", "iris"]


def test_measures_of_openml_that_are_errors_keep_their_sign():
    row = {"run_id": 7, "data_name": "iris", "value": 37.2, "parameters": {}}
    rmse = row | {"function": "root_mean_squared_error"}
    outcomes_of = lambda *rows, **kwargs: [r.outcome for r in blackbox.from_openml_evaluations(rows, **kwargs)]
    assert outcomes_of(rmse, row | {"value": 0.5}, higher_is_better=False) == [37.2, 0.5]
    assert outcomes_of(row, higher_is_better=True) == [1.0 - 37.2]
    assert outcomes_of(row | {"value": "0.75", "function": "area_under_roc_curve"}) == [0.25]
    for none in (None, math.nan):
        (record,) = blackbox.from_openml_evaluations([row | {"value": none}])
        assert (record.status, record.reason) == ("FAIL", "OpenML lists no value for this run")
        assert math.isnan(record.outcome)
    frame = pytest.importorskip("pandas").DataFrame([row | {"value": 0.5}])
    assert [r.outcome for r in blackbox.from_openml_evaluations(frame)] == [0.5]
