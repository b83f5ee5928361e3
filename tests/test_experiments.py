"""The experiments run from end to end, in a process of their own (they run in float32)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metaopt import base, predictors, spaces

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_auto_tune_smoke(tmp_path):
    printed = run("experiments/auto_tune.py", "--smoke", "--packaged", "--out", tmp_path)
    details = json.loads((tmp_path / "auto_tune_smoke.json").read_text())
    rows = {row["method"]: row for row in details["rows"]}
    expected = {
        "defaults",
        "one global λ",
        "g(t'), no trial",
        "g(t') + 2 hypergradient steps",
        "random search, 2 trials",
        "Optuna TPE, 2 trials",
        "random forest, default",
        "gradient boosting, tuned",
    }
    assert expected <= set(rows)
    assert all(np.isfinite([row["test_nll"], row["test_error"], row["mean_rank"]]).all() for row in rows.values())
    # Ranks of the methods on a table add up to 1 + 2 + ... + M, ties or not.
    num_methods = len(rows)
    assert sum(row["mean_rank"] for row in rows.values()) == pytest.approx(num_methods * (num_methods + 1) / 2)
    # More trials are never worse on the rows that they are chosen by; a chosen test score is one of those measured.
    assert rows["g(t'), no trial"]["trainings"] == 1 < rows["g(t') + 2 hypergradient steps"]["trainings"]
    assert (tmp_path / "auto_tune_smoke.png").stat().st_size > 10_000
    assert "| g(t'), no trial |" in printed

    saved = predictors.load(tmp_path / "auto_tune_fold0.npz")
    features = np.zeros(len(saved.scaling["names"]), np.float32)
    z = saved.predictor.apply(saved.meta_params, base.Task(None, None, features))
    hyperparams = spaces.to_constrained(saved.space, z)
    assert set(hyperparams) == set(saved.space) and 3e-4 < hyperparams["rate"] < 1e-1


@pytest.mark.slow
def test_auto_tune_reads_a_persons_own_tables_and_names_the_bad_file(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for t in range(8):
        x = rng.normal(size=(120, 4))
        label = np.where(x @ rng.normal(size=4) > 0, "yes", "no")
        lines = ["a,b,c,d,kind", *(",".join([*(f"{v:.3f}" for v in r), k]) for r, k in zip(x, label, strict=True))]
        (folder / f"table{t}.csv").write_text("\n".join(lines))
    (folder / "broken.csv").write_text("a,b\n1,2\n")
    command = [sys.executable, "-W", "ignore", "experiments/auto_tune.py", "--smoke", "--no-trees"]
    command += ["--csv", str(folder), "--target", "kind", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "broken.csv" in done.stderr
    assert "8 tables of 8 families" in done.stdout
