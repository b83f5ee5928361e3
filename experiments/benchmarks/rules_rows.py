"""Rows of the tables, their errors, and the rows of other libraries."""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import cases
import jax
import numpy as np
from rules_programs import PLAIN
from timing import num_cores, relative_error

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3  # of hypergradients, in float32


class Row(NamedTuple):
    name: str
    ms: float = float("nan")
    against: str = PLAIN  # name of the row whose time it is compared with
    floor: float | None = None
    operations: float | None = None
    by_hand: str | None = None
    mib: float = float("nan")
    error: float | None = None
    compile_seconds: float = float("nan")
    reason: str = ""  # the reason for missing numbers


def number(value, digits):
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def error(actual: dict, expected: dict) -> float:
    """Returns `relative_error`, also if λ has only one penalty."""
    if not isinstance(actual["decay"], dict):  # one penalty: its derivative is the sum over the layers
        expected = {**expected, "decay": sum(np.sum(leaf) for leaf in expected["decay"].values())}
    return relative_error(actual, expected)


def peers(
    case: cases.Case, num_steps: int, options: argparse.Namespace, expected: dict, num_products: int = 0
) -> tuple[list[Row], str]:
    """Returns rows of other libraries, from their own environment, and its versions."""
    task = cases.task_of(case, num_steps)
    trees = {"params": case.params, "train": case.train, "valid": case.valid, "decay": case.hyperparams["decay"]}
    arrays = {f"{tree}/{name}": leaf for tree, leaves in trees.items() for name, leaf in leaves.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        np.savez(file, order=task.train["order"], rate=case.hyperparams["rate"], eps=cases.EPS, **arrays)
        command = [options.peers, str(HERE / "peers.py"), case.name.rstrip("0123456789"), str(file)]
        command += [str(num_cores()), str(options.repetitions), str(options.seconds), str(num_products)]
        command += [options.clock.__name__]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        return [Row("other libraries", reason=f"failed, exit {done.returncode}: {last_line}")], ""
    answer = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for row in answer["rows"]:
        hypergrad = row.pop("hypergrad", None)
        hypergrad = jax.tree.map(np.asarray, hypergrad, is_leaf=lambda x: isinstance(x, list))
        rows.append(Row(**row, error=error(hypergrad, expected) if hypergrad else None))
    return rows, answer["versions"]
