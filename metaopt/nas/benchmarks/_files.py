"""Readers for the files that the authors of the benchmarks publish.

They need neither TensorFlow nor PyTorch, and they run no code from a file.

| benchmark | files | format |
|---|---|---|
| 101 | nasbench_full.tfrecord, nasbench_only108.tfrecord | TFRecord of JSON, with a protocol buffer in base64 inside |
| 201 | NAS-Bench-201-v1_1-096897.pth, NATS-tss-v1_0-3ffb9-simple/, …pickle.pbz2 | pickles |
| 301 | the training logs, nb_301_v13/ or nasbench301_full_data/ | one JSON file per network |

The readers are tested on files in these formats that the tests write. They have not been run on the official files,
which take gigabytes.

Reading takes minutes, and an hour for a .pth file. `metaopt.save` writes the result to a small file, which
`metaopt.load` opens in a second.

Pickles are programs. `_pickles` reads their containers, texts and numbers and rejects everything else. The readers
support the training logs of NAS-Bench-301. They do not support its surrogate models, which are pickles of classes from
other libraries.
"""

import base64
import collections
import itertools
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from metaopt import _files, _saving
from metaopt._tfrecord import fields, read_tfrecords
from metaopt.nas._genotype_text import from_nas_bench_201
from metaopt.nas._named_spaces import DARTS_PRIMITIVES, NAS_BENCH_101_PRIMITIVES, NAS_BENCH_201_PRIMITIVES
from metaopt.nas.benchmarks._pickles import read_pickle
from metaopt.nas.benchmarks._tables import Benchmark, benchmark_table


def _encode(benchmark: Benchmark) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {name: np.asarray(x) for name, x in benchmark._asdict().items() if name != "query"}


def _decode(header: dict[str, Any], file: _files.Npz) -> Benchmark:
    _check_benchmark(file.specs)
    data = {name: file[name] for name in Benchmark._fields if name != "query"}
    fidelities = data["fidelities"]
    if not len(fidelities) or not (np.diff(fidelities, prepend=0) > 0).all() or fidelities[-1] != 1:
        raise ValueError(f"its fidelities must increase to 1; got {fidelities}")
    encodings = data["encodings"]
    if (encodings < 0).any() or (encodings >= data["num_choices"]).any():
        raise ValueError("its encodings are not below `num_choices`")
    return benchmark_table(
        str(data["name"]),
        data["tasks"].tolist(),
        data["dims"].tolist(),
        data["num_choices"].tolist(),
        encodings,
        data["valid"],
        fidelities=tuple(fidelities.tolist()),
        test=data["test"],
        cost=data["cost"],
    )


def _check_benchmark(specs: Any) -> None:
    """Raises ValueError unless the arrays of a benchmark have shapes and types that fit one another."""
    size = lambda name: specs[name].shape[-1]
    num_tasks, num_dims, num_fidelities = (size(name) for name in ("tasks", "dims", "fidelities"))
    num = specs["encodings"].shape[0]
    outcomes = (num, num_tasks, num_fidelities)
    expected = {
        "name": ((), "U"),
        "tasks": ((num_tasks,), "U"),
        "dims": ((num_dims,), "U"),
        "num_choices": ((num_dims,), "iu"),
        "encodings": ((num, num_dims), "iu"),
        "fidelities": ((num_fidelities,), "f"),
        "valid": (outcomes, "f"),
        "test": (outcomes[:2], "f"),
        "cost": (outcomes, "f"),
    }
    for name, (shape, kinds) in expected.items():
        if specs[name].shape != shape or specs[name].dtype.kind not in kinds:
            raise ValueError(f"{name} has {specs[name]}; its shape should be {shape}")


_saving.register(_saving.Kind("benchmark", Benchmark, _encode, _decode, compress=True))


# ---- NAS-Bench-101: TFRecord, JSON, protocol buffers ----------------------------------------------------------------


_MAX_LENGTHS_101 = 10  # distinct numbers of epochs; the benchmark has four


def _final_metrics(message: bytes) -> tuple[float, float, float]:
    """Returns seconds, validation accuracy and test accuracy of the last evaluation in a ModelMetrics message.

    The message has evaluations at 0, half and all epochs.
    """
    last = dict(fields([value for number, value in fields(message) if number == 1][-1]))
    seconds, valid, test = (struct.unpack("<d", last[number])[0] for number in (2, 4, 5))
    if not all(map(math.isfinite, (seconds, valid, test))):
        raise ValueError(f"Accuracies and seconds must be finite; got {seconds}, {valid} and {test}.")
    return seconds, valid, test


def read_nas_bench_101(path: str | os.PathLike[str], *, verify: bool = False) -> Benchmark:
    """Reads NAS-Bench-101 from its own file: nasbench_full.tfrecord (2 GB) or nasbench_only108.tfrecord (500 MB).

    Results are means over the three runs at every number of epochs; the published protocol draws one of them. Errors
    are fractions. Costs are seconds of training. If a cell lacks a run, the mean is over the available runs; without
    any run it is NaN.

    Args:
      path: path of the file.
      verify: whether to check the checksums of the data too. The checksums of record lengths are always checked.

    Returns:
      A `Benchmark`. Digits are the 21 entries above the diagonal of the matrix, then the ops of vertices 1 to 5: 1 is a
      3×3 convolution, 2 a 1×1 convolution, and 3 a pool. 0 is the output, or a vertex that does not exist.

    Raises:
      ValueError: if the file is damaged or is of another kind, or if a cell has ops or vertices outside the space.

    Source: Ying et al., ICML 2019, https://arxiv.org/abs/1902.09635
    """
    rows: dict[str, int] = {}
    encodings: list[list[int]] = []
    sums: dict[int, dict[int, np.ndarray]] = collections.defaultdict(dict)  # epochs -> row -> four sums
    for record in read_tfrecords(path, check=verify):
        with _files.reading(path, f"has a record that is not of NAS-Bench-101, {record[:100]!r}"):
            name, epochs, bits, ops, metrics = _files.parse_json(record)
            seconds, valid, test = _final_metrics(base64.b64decode(metrics))
            if not all(isinstance(text, str) for text in (name, bits, ops)) or type(epochs) is not int or epochs < 1:
                raise ValueError("a cell must consist of strings, and its number of epochs must be a positive integer")
            if name not in rows:
                rows[name] = len(encodings)
                encodings.append(_encode_101(bits, ops.split(","), name))
            sums[epochs].setdefault(rows[name], np.zeros(4))
            sums[epochs][rows[name]] += (1.0, seconds, valid, test)
            if len(sums) > _MAX_LENGTHS_101:
                raise ValueError(f"there are more than {_MAX_LENGTHS_101} different numbers of epochs")
    if not rows:
        raise ValueError(f"{path} is empty.")
    lengths = sorted(sums)
    means = np.full((len(rows), len(lengths), 3), np.nan)
    for i, epochs in enumerate(lengths):
        for row, (count, *values) in sums[epochs].items():
            means[row, i] = np.array(values) / count
    pairs = [f"{s}->{t}" for s, t in zip(*np.triu_indices(7, 1), strict=True)]
    with _files.reading(path, "is not a file of NAS-Bench-101"):
        return benchmark_table(
            "NAS-Bench-101",
            ["cifar10"],
            [*pairs, *(f"op{i}" for i in range(1, 6))],
            [2] * 21 + [4] * 5,
            encodings,
            1 - means[:, None, :, 1],
            fidelities=tuple(epochs / lengths[-1] for epochs in lengths),
            test=1 - means[:, None, -1, 2],
            cost=means[:, None, :, 0],
        )


def _encode_101(bits: str, ops: list[str], name: str) -> list[int]:
    """The 21 entries above the diagonal of a 7 × 7 matrix, and five ops; the output is the last vertex of a cell."""
    size = len(ops)
    fits = size <= 7 and len(bits) == size**2 and set(bits) <= {"0", "1"}
    fits = fits and set(ops[1:-1]) <= set(NAS_BENCH_101_PRIMITIVES)
    if not fits or size < 2 or (ops[0], ops[-1]) != ("input", "output"):
        raise ValueError(f"The cell {name!r} is not in the space of NAS-Bench-101: {bits!r}, {ops}.")
    matrix = np.zeros((7, 7), int)
    matrix[:size, :size] = np.array(list(bits), int).reshape(size, size)
    digits = [NAS_BENCH_101_PRIMITIVES.index(op) + 1 for op in ops[1:-1]]
    return [*matrix[np.triu_indices(7, 1)].tolist(), *digits, *[0] * (5 - len(digits))]


# ---- NAS-Bench-201: pickles -----------------------------------------------------------------------------------------


_LEGACY_PYTORCH = 0x1950A86A20F9469CFC6C  # a first pickle; then come three: version, system, object


def _unpickled(path: Path) -> Any:
    """The value of a .pth file of PyTorch (old or new format) or of a .pickle.pbz2 file."""
    with _files.reading(path, "is not a pickle that can be read, or is damaged"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
                if len(members) != 1:
                    raise ValueError("it is a zip archive without one data.pkl, which is where PyTorch keeps objects")
                if members[0].file_size > _files.unpacked_limit(os.path.getsize(path)):
                    raise ValueError(f"its data.pkl would take {members[0].file_size} bytes")
                return read_pickle(archive.read(members[0]))[0]
        data = _files.read_compressed(path)
        value, end = read_pickle(data)
        if type(value) is int and value == _LEGACY_PYTORCH:
            for _ in range(3):
                value, end = read_pickle(data, end)
        return value


# task -> (training run with a validation set, name of that set), (training run with a test set, name of that set)
_SETS_201 = {
    "cifar10": (("cifar10-valid", "x-valid"), ("cifar10", "ori-test")),
    "cifar100": (("cifar100", "x-valid"), ("cifar100", "x-test")),
    "ImageNet16-120": (("ImageNet16-120", "x-valid"), ("ImageNet16-120", "x-test")),
}


def read_nas_bench_201(path: str | os.PathLike[str]) -> Benchmark:
    """Reads NAS-Bench-201 from its own files: a .pth file (30 GB of memory) or NATS-Bench's topology space.

    Prefer NATS-Bench's directory "…-simple", which has a small file for each architecture and takes little memory.
    Results are means over the available runs. Errors are in %. Validation errors are from the end of the schedules of
    12 and of 200 epochs. Test errors are after 200 epochs; for CIFAR-10 they come from training on all images. Costs
    are seconds of training.

    Args:
      path: path of NAS-Bench-201-v1_1-096897.pth or NATS-tss-v1_0-3ffb9.pickle.pbz2, or of the directory
        NATS-tss-v1_0-3ffb9-simple.

    Returns:
      A `Benchmark`, in the order of the file; a digit is an index into `NAS_BENCH_201_PRIMITIVES`. Missing results are
      NaN.

    Raises:
      ValueError: if the file is damaged or is of another kind, or if it names a class or function that does not make a
        container or a number.

    Source: Dong & Yang, ICLR 2020, https://arxiv.org/abs/2001.00326
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name[:6].isdigit())
        if not files:
            raise ValueError(f"{path} has no files such as 000000.pickle.pbz2.")
        cells = (_unpickled(file) for file in files)
    else:
        whole = _unpickled(path)
        if not isinstance(whole, dict) or not isinstance(whole.get("arch2infos"), dict):
            raise ValueError(f"{path} has no results of NAS-Bench-201.")
        with _files.reading(path, "has no results of NAS-Bench-201"):
            cells = [whole["arch2infos"][index] for index in sorted(whole["arch2infos"])]
    encodings, valid, test, cost = [], [], [], []
    for infos in cells:
        with _files.reading(path, "has no results of NAS-Bench-201"):
            short, long = (infos.get(name) or infos[other] for name, other in (("12", "less"), ("200", "full")))
            text = short["arch_str"]
            if not isinstance(text, str) or long["arch_str"] != text:
                raise ValueError("its two schedules are of different architectures")
            rows = [_results_201(short, long, task) for task in _SETS_201]
            kept = {(s, t): op for s, t, op in from_nas_bench_201(text)["cell"]}
            edges = [(s, t) for t in (1, 2, 3) for s in range(t)]
            encodings.append([NAS_BENCH_201_PRIMITIVES.index(kept.get(edge, "none")) for edge in edges])
        for values, column in zip(zip(*rows, strict=True), (valid, test, cost), strict=True):
            column.append(values)
    with _files.reading(path, "has no results of NAS-Bench-201"):
        return benchmark_table(
            "NAS-Bench-201",
            list(_SETS_201),
            [f"{s}->{t}" for t in (1, 2, 3) for s in range(t)],
            [len(NAS_BENCH_201_PRIMITIVES)] * 6,
            encodings,
            valid,
            fidelities=(12 / 200, 1.0),
            test=test,
            cost=cost,
        )


def _results_201(short: dict, long: dict, task: str) -> tuple[list[float], float, list[float]]:
    """Returns validation errors at 12 and 200 epochs, the test error after 200, and seconds at 12 and 200 epochs."""
    (searched, valid_name), (trained, test_name) = _SETS_201[task]

    def mean(schedule, data, value):
        runs = [run for (name, _), run in schedule["all_results"].items() if name == data]
        values = [float(value(run, int(run["epochs"]))) for run in runs]
        if any(np.isinf(values)):
            raise ValueError(f"the results on {data} must be finite; got {values}")
        return float(np.mean(values)) if values else np.nan

    error = lambda name: lambda run, epochs: 100 - run["eval_acc1es"][f"{name}@{epochs - 1}"]
    seconds = lambda run, epochs: sum(run["train_times"].values()) if run["train_times"] else np.nan
    valid = [mean(each, searched, error(valid_name)) for each in (short, long)]
    return valid, mean(long, trained, error(test_name)), [mean(each, searched, seconds) for each in (short, long)]


# ---- NAS-Bench-301: JSON --------------------------------------------------------------------------------------------

_DARTS_301 = "NetworkSelectorDatasetInfo:darts:"
_OPS_301 = DARTS_PRIMITIVES[1:]  # without "none"
_PAIRS_301: dict[int, list[tuple[int, ...]]] = {
    node: list(itertools.combinations(range(node), 2)) for node in (3, 4, 5)
}


def read_nas_bench_301(path: str | os.PathLike[str]) -> Benchmark:
    """Reads the training logs of NAS-Bench-301: networks of the DARTS space, trained on CIFAR-10.

    Errors are in %, costs in seconds of training. A network that was trained more than once is one row of means. The
    reader keeps only the logs of one depth, width and number of epochs, those with the most networks. The other logs
    are of networks of other sizes, or of other numbers of epochs.

    Args:
      path: path of the folder, such as nb_301_v13; all files "results_*.json" below it are read.

    Returns:
      A `Benchmark`. For each kind of cell, three digits state which two nodes are the inputs of nodes 3, 4 and 5. Eight
      more digits state the ops of the edges, in their order. `dims` are the names of the `configuration_space` of
      `darts_space`, so `genotype_from_configuration` makes the genotype of a row.

    Raises:
      ValueError: if no such file exists, or if a file is not a log of NAS-Bench-301.

    Source: Siems et al., ICLR 2022, https://arxiv.org/abs/2008.09777
    """
    outcomes: dict[tuple, dict[tuple, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for file in sorted(Path(path).rglob("results_*.json")):
        with _files.reading(file, "is not a log of NAS-Bench-301"):
            log = _files.read_json(file)
            settings = log["optimized_hyperparamater_config"]
            scale = tuple(
                settings.get(name)
                for name in (
                    f"{_DARTS_301}layers",
                    f"{_DARTS_301}init_channels",
                    "SimpleLearningrateSchedulerSelector:cosine_annealing:T_max",
                )
            )
            outcome = (float(log["info"][0]["val_accuracy"]), float(log["test_accuracy"]), float(log["runtime"]))
            if not all(map(math.isfinite, outcome)):
                raise ValueError(f"its outcomes must be finite; got {outcome}")
            outcomes[scale][tuple(_encode_301(settings))].append(outcome)
    if not outcomes:
        raise ValueError(f"There are no files results_*.json below {path}.")
    networks = max(outcomes.values(), key=len)
    means = np.array([np.mean(runs, 0) for runs in networks.values()])
    kinds = ("normal", "reduce")
    dims = [[*(f"{k}.inputs{n}" for n in (3, 4, 5)), *(f"{k}.op{i}" for i in range(8))] for k in kinds]
    choices = [*(len(pairs) for pairs in _PAIRS_301.values()), *[len(_OPS_301)] * 8]
    valid, test, seconds = means.T
    with _files.reading(path, "has no results of NAS-Bench-301"):
        return benchmark_table(
            "NAS-Bench-301",
            ["cifar10"],
            [*dims[0], *dims[1]],
            choices * 2,
            list(networks),
            100 - valid[:, None],
            test=100 - test[:, None],
            cost=seconds[:, None, None],
        )


def _encode_301(settings: dict) -> list[int]:
    digits = []
    for kind in ("normal", "reduce"):
        inputs = {
            node: tuple(map(int, settings[f"{_DARTS_301}inputs_node_{kind}_{node}"].split("_"))) for node in _PAIRS_301
        }
        edges = [(source, node) for node, pair in {2: (0, 1), **inputs}.items() for source in pair]
        # The log numbers edges by target, then source; the first two lead to node 2.
        names = [settings[f"{_DARTS_301}edge_{kind}_{sum(range(2, node)) + source}"] for source, node in edges]
        digits += [pairs.index(inputs[node]) for node, pairs in _PAIRS_301.items()]
        digits += [_OPS_301.index(name) for name in names]
    return digits
