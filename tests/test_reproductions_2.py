"""The reproductions run from end to end on small sizes, in a process of their own, and their tables are complete."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def has_data(name):
    folder = os.environ.get("METAOPT_DATA", "")
    return pytest.mark.skipif(
        not os.path.isfile(os.path.join(folder, name)), reason=f"METAOPT_DATA names no folder with {name}"
    )


def smoke(name, tmp_path):
    """The rows of every table that the script prints, by their first cell."""
    command = [sys.executable, f"experiments/{name}.py", "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not list(tmp_path.iterdir())  # a smoke run writes no result
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def number(cell):
    value = float(cell.split(" ± ")[0])
    assert np.isfinite(value)
    return value


@has_data("mnist.npz")
def test_rate_schedule(tmp_path):
    rows = smoke("rate_schedule", tmp_path)
    names = (
        "the start, constant",
        "T1–T2 (1 step ahead)",
        "best constant rate of a grid",
        "best cosine of a grid",
        "2 windows, whole horizon",
    )
    losses = {name: number(rows[name][0]) for name in names}
    # In a run this short every larger rate is better.
    assert losses["best constant rate of a grid"] < losses["T1–T2 (1 step ahead)"] < losses["the start, constant"]
    assert number(rows["20"][3]) >= 0  # the last row of T = 20


@has_data("mnist.npz")
def test_distillation(tmp_path):
    rows = smoke("distillation", tmp_path)
    names = ("fixed initialization, 10 distilled images", "random initialization, one real image a digit")
    assert all(0 < number(rows[name][0]) < 60 for name in names)
    assert rows["fixed initialization, 10 images: Wang et al., LeNet"] == ["93.8"]


@pytest.mark.slow
@has_data("tiny_shakespeare.txt.gz")
def test_layer_decay(tmp_path):
    rows = smoke("layer_decay", tmp_path)
    for name in ("the start", "a decay a layer, unrolled", "a decay a layer, truncated", "one decay, best of a grid"):
        assert number(rows[name][0]) > 0


@has_data("spoken_digits.npz")
def test_loss_weights(tmp_path):
    rows = smoke("loss_weights", tmp_path)
    for name in ("no auxiliary task", "all weights 1", "one weight, best of a grid", "a weight a task, hypergradient"):
        assert 0 < number(rows[name][0]) < 10  # the second table: the rate, and the weights found
