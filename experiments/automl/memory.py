"""Peak memory of `fit` of AutoML's estimators, size of the saved model, and the costs to load it and to predict.

Each made-up table has ten columns, two of them categories. It is fitted, saved and loaded in fresh processes, with
`preset="balanced"` without CatBoost, `time_limit=None` and two workers. These are the numbers of `docs/automl.md`. Only
Linux reports the peak of a worker (0 elsewhere).

    python experiments/automl/memory.py --out FOLDER    # minutes; writes FOLDER/automl_memory.md
    python experiments/automl/memory.py --smoke         # a minute; prints only
"""

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import metaopt
from experiments import script
from metaopt import automl
from metaopt.automl import _workers
from metaopt.training import report_progress

MODELS = ("network", "linear", "extra_trees", "random_forest", "lightgbm", "xgboost")
UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of `ru_maxrss`, per MiB


class Case(NamedTuple):
    """A table and models. `num_classes` is 0 for regression."""

    num_rows: int
    num_classes: int
    models: tuple[str, ...]


EVERYTHING = "all"
CASES = {
    f"{num_rows:,} rows, {problem}, {models}": Case(num_rows, num_classes, kinds)
    for num_rows, num_classes, problem, models, kinds in (
        (800, 3, "three classes", EVERYTHING, MODELS),
        (800, 0, "regression", EVERYTHING, (*MODELS, "gaussian_process")),
        (5000, 3, "three classes", EVERYTHING, MODELS),
        (5000, 0, "regression", EVERYTHING, (*MODELS, "gaussian_process")),
        (800, 3, "three classes", "without the network", MODELS[1:]),
        (5000, 3, "three classes", "only extra_trees", ("extra_trees",)),
    )
}


def data(case: Case, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Eight normal columns and two categories with five levels, and a noisy target."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(case.num_rows, 8)), columns=[f"number {j}" for j in range(8)])
    for j in range(2):
        frame[f"category {j}"] = pd.Categorical(rng.choice(list("abcde"), case.num_rows))
    signal = frame["number 0"] + frame["number 1"] * frame["number 2"] + (frame["category 0"] == "a")
    noisy = signal.to_numpy() + rng.normal(size=case.num_rows)
    if not case.num_classes:
        return frame, noisy
    return frame, np.searchsorted(np.quantile(noisy, np.arange(1, case.num_classes) / case.num_classes), noisy)


def fit(case: Case, path: Path) -> dict[str, float]:
    """Peak memory in MiB of this process, of the process of networks, and of the largest worker. The model is saved."""
    kind: Any = automl.AutoClassifier if case.num_classes else automl.AutoRegressor
    peaks: dict[str, float] = {"network": 0.0, "worker": 0.0}
    done = threading.Event()

    def watch():
        while not done.wait(0.2):
            for (_, name), pool in list(_workers._POOLS.items()):
                part = "network" if name == "network" else "worker"
                peaks[part] = max([peaks[part], *(peak(pid) for pid in list(pool._processes))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(time_limit=None, models=case.models, n_jobs=2, verbose=False).fit(*data(case))
    done.set()
    watcher.join()
    metaopt.save(path, model)
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNIT, **peaks}


def peak(pid: int) -> float:
    """The peak memory of another process so far, in MiB; 0 if the process has ended or the system does not say it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return 0.0


def load(case: Case, path: Path) -> dict[str, float]:
    """Memory in MiB and processor seconds of `metaopt.load`, after the imports; and wall seconds of first predictions.

    The first prediction is of one row, in a process that has loaded the model and has predicted no other rows.
    """
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    model = metaopt.load(path)
    seconds = time.process_time() - begin
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / UNIT
    frame, begin = data(case)[0].iloc[:1], time.perf_counter()
    model.predict(frame)
    return {"load": memory, "seconds": seconds, "predict": time.perf_counter() - begin}


def in_a_process(step: str, name: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.automl.memory", "--step", step, "--case", name, "--file", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=script.FOLDER.parent)
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, dict[str, float]]) -> str:
    header = ["table and models", "peak of the process", "of that of networks", "of each worker", "size of the file"]
    header += ["memory to load it", "processor seconds to load it", "seconds of the first prediction"]
    rows = [
        [
            name,
            *(f"{r[part] / 1024:.1f} GiB" for part in ("process", "network", "worker")),
            f"{r['size']:.1f} MB",
            f"{r['load'] / 1024:.2f} GiB",
            f"{r['seconds']:.1f}",
            f"{r['predict']:.2f}",
        ]
        for name, r in results.items()
    ]
    return script.table(header, rows)


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--step", choices=("fit", "load"), default=None, help="one step, in this process")
    parser.add_argument("--case", choices=CASES, default=None, help="of `--step`")
    parser.add_argument("--file", type=Path, default=None, help="of `--step`")
    args = parser.parse_args()
    if args.step is not None:
        print(json.dumps(fit(CASES[args.case], args.file) if args.step == "fit" else load(CASES[args.case], args.file)))
        return
    results = {}
    names = [list(CASES)[-1]] if args.smoke else list(CASES)
    with tempfile.TemporaryDirectory() as folder, report_progress(len(names), None, "{case}", case="") as progress:
        for number, name in enumerate(names):
            path = Path(folder) / f"{number}.npz"
            results[name] = in_a_process("fit", name, path) | in_a_process("load", name, path)
            results[name]["size"] = path.stat().st_size / 1e6
            progress(number + 1, case=name)
    script.publish(__file__, "Memory of AutoML", report(results), args, name="automl_memory")


if __name__ == "__main__":
    script.run(main)
