"""The reproductions run from end to end, in a process of their own; those whose data are absent are skipped."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# script -> its data, and what stands in its table.
SCRIPTS = {
    "data_cleaning": ("mnist.npz", ("oracle: clean rows and validation rows", "`implicit`, 2 steps, warm CG")),
    "feature_penalties": ("sms_spam.tsv.gz", ("one penalty, grid of 3", "`implicit`, fixed point, K = 2")),
    "parameter_decay": ("fashion_mnist_sub.npz", ("each parameter (3,818)", "each layer (3)")),
}


def run(name, *arguments, **environment):
    command = [sys.executable, "-W", "ignore", f"experiments/{name}.py", *map(str, arguments)]
    # Small programs: most of the time would go into the compiler's optimizations.
    environment = {**os.environ, "JAX_ENABLE_X64": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def has_data(name):
    present = (Path(os.environ.get("METAOPT_DATA", "")) / name).is_file()
    return pytest.mark.skipif(not present, reason=f"METAOPT_DATA names no folder with {name}")


@pytest.mark.parametrize(
    "name", ["data_cleaning", "feature_penalties", pytest.param("parameter_decay", marks=pytest.mark.slow)]
)
def test_smoke_prints_a_table_and_writes_nothing(name, tmp_path):
    file, expected = SCRIPTS[name]
    if not (Path(os.environ.get("METAOPT_DATA", "")) / file).is_file():
        pytest.skip(f"METAOPT_DATA names no folder with {file}")
    done = run(name, "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert all(any(text in line for line in table) for text in expected)
    assert "nan" not in done.stdout and not list(tmp_path.iterdir())


def test_smoke_of_the_sinusoids(tmp_path):
    done = run("sinusoid", "--smoke", "--out", tmp_path, "--work", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    names = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert names == ["| model", "| ---", "| Meta-SGD, 1 step"]
    assert "nan" not in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_absent_data_are_named(name, tmp_path):
    done = run(name, "--smoke", METAOPT_DATA=str(tmp_path))
    assert done.returncode == 1
    assert f"{name} needs {SCRIPTS[name][0]}, in the folder that the environment variable METAOPT_DATA" in done.stderr


def smoke(name, tmp_path):
    """The rows of every table that the script prints, by their first cell."""
    done = run(name, "--smoke", "--out", tmp_path)
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


@pytest.mark.slow
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
