"""The experiment that trains g: kept results are used only for what determines them, and footers count all the work."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import script
from experiments.hyperparameters.transfer import main as command
from experiments.hyperparameters.transfer.compare import _groups, _table
from experiments.hyperparameters.transfer.config import FEATURES, Width
from experiments.hyperparameters.transfer.judge import Finished, Outcome, digest
from experiments.hyperparameters.transfer.pool import Pool, _describe_one
from metaopt import base, tasks

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


@pytest.mark.parametrize("options, folder", [(["--smoke"], "transfer_smoke"), ([], "transfer")])
def test_a_smoke_run_has_its_own_folder(monkeypatch, options, folder):
    folders = []
    monkeypatch.setattr(command, "ship", lambda out, seeds: folders.append(out.name))
    command.main(["ship", *options])
    assert folders == [folder]


def test_groups_of_development_tasks_are_those_of_their_sizes_and_kinds():
    mask = lambda rows: (np.arange(500)[None] < np.array(rows)[:, None]).astype(np.float32)
    shared = (np.arange(20)[None] < np.array([2, 3, 20])[:, None]).astype(np.float32)
    train, valid = {"mask": mask([80, 100, 400]), "class_mask": shared}, {"mask": mask([60, 60, 200])}
    part = Pool(base.Task(train, valid), None, np.array(["a", "a", "b"]), np.array(["rule", "natural", "rotated"]))
    groups = {name: inside.tolist() for name, inside in _groups([part]).items()}
    assert groups["below 150 rows"] == groups["simulated rules"] == [True, False, False]
    assert groups["150 to 500 rows"] == groups["natural targets"] == [False, True, False]
    assert groups["500 rows and more"] == groups["13 classes and more"] == [False, False, True]
    assert groups["others, without rules"] == [False, True, False]
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
