"""The reproductions run from end to end, in a process of their own; those whose data are absent are skipped."""

import os
import subprocess
import sys
from pathlib import Path

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
    environment = {**os.environ, "JAX_ENABLE_X64": "0", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke_prints_a_table_and_writes_nothing(name, tmp_path):
    file, expected = SCRIPTS[name]
    if not (Path(os.environ.get("METAOPT_DATA", "")) / file).is_file():
        pytest.skip(f"METAOPT_DATA names no folder with {file}")
    done = run(name, "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert all(any(text in line for line in table) for text in expected)
    assert "nan" not in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_absent_data_are_named(name, tmp_path):
    done = run(name, "--smoke", METAOPT_DATA=str(tmp_path))
    assert done.returncode == 1
    assert f"{name} needs {SCRIPTS[name][0]}, in the folder that the environment variable METAOPT_DATA" in done.stderr
