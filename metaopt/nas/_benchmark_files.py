"""The files that the benchmarks' authors publish, read without TensorFlow, PyTorch or code from the file.

| benchmark | files | form |
|---|---|---|
| 101 | nasbench_full.tfrecord, nasbench_only108.tfrecord | TFRecord of JSON, a protocol buffer in base64 inside |
| 201 | NAS-Bench-201-v1_1-096897.pth, NATS-tss-v1_0-3ffb9-simple/, …pickle.pbz2 | pickles |
| 301 | the training logs, nb_301_v13/ or nasbench301_full_data/ | a JSON file a network |

The readers are tested on files in these forms that the tests write, and have not been run on the official files
themselves, which are of gigabytes.

Each takes minutes: `save_benchmark` keeps the result in a small file that `load_benchmark` opens in a second.

Pickles are programs. They are run here by an unpickler that knows containers, numbers of numpy and the empty shells of
tensors, and refuses every other name, so that a file can do no more than fill memory. The surrogate models of
NAS-Bench-301 are pickles of other libraries' classes, and are not read: its training logs are what they were made from.
"""

import base64
import bz2
import collections
import io
import itertools
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.nas._benchmarks import Benchmark, make_benchmark
from metaopt.nas._configurations import configuration_space, from_configuration
from metaopt.nas._genotypes import NAS_BENCH_101_PRIMITIVES, from_nas_bench_201
from metaopt.nas._specs import DARTS_PRIMITIVES, NAS_BENCH_201_PRIMITIVES, Genotype, darts_space
from metaopt.tfrecord import fields, read_tfrecords


def save_benchmark(benchmark: Benchmark, path: str | os.PathLike) -> None:
    """Keeps a benchmark as an .npz of arrays, written atomically.

    Args:
      benchmark: any.
      path: of the file, by the name that it is to have.
    """
    fields: dict[str, Any] = {name: np.asarray(x) for name, x in benchmark._asdict().items() if name != "query"}
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"  # others may write there, too
    with open(temporary, "wb") as file:  # numpy would add .npz to a name
        np.savez_compressed(file, **fields)
    os.replace(temporary, path)


def load_benchmark(path: str | os.PathLike) -> Benchmark:
    """What `save_benchmark` wrote.

    Args:
      path: of the file.

    Returns:
      A `Benchmark`.

    Raises:
      ValueError: the file holds something else, or is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            data = dict(archive)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever damage raises: numpy, zipfile, zlib; an array is no archive
        raise ValueError(f"{path} is no benchmark that `save_benchmark` wrote, or is damaged: {error}") from error
    missing = sorted({*Benchmark._fields} - {"query", *data})
    if missing:
        raise ValueError(f"{path} is no benchmark that `save_benchmark` wrote: it lacks {', '.join(missing)}.")
    return make_benchmark(
        str(data["name"]),
        data["tasks"].tolist(),
        data["dims"].tolist(),
        data["num_choices"].tolist(),
        data["encodings"],
        data["valid"],
        fidelities=tuple(data["fidelities"].tolist()),
        test=data["test"],
        cost=data["cost"],
    )


# ---- NAS-Bench-101: TFRecord, JSON, protocol buffers ----------------------------------------------------------------


def _final_metrics(message: bytes) -> tuple[float, float, float]:
    """(seconds, validation, test accuracy) of the last of a ModelMetrics' evaluations: at 0, half and all epochs."""
    last = dict(fields([value for number, value in fields(message) if number == 1][-1]))
    seconds, valid, test = (struct.unpack("<d", last[number])[0] for number in (2, 4, 5))
    return seconds, valid, test


def read_nas_bench_101(path: str | os.PathLike, *, verify: bool = False) -> Benchmark:
    """NAS-Bench-101 from its own file: nasbench_full.tfrecord (2 GB) or nasbench_only108.tfrecord (500 MB).

    Means over the three runs at every length (the published protocol draws one of them). Errors are fractions, costs
    seconds of training. Of a cell that lacks a run, the mean is of those that are there; without any it is NaN.

    Args:
      path: of the file.
      verify: whether the checksums of the data are checked, too; those of the lengths always are.

    Returns:
      A `Benchmark` with the digits of `nas_bench_101_table`.

    Raises:
      ValueError: the file is damaged or something else, or a cell has ops or vertices that are not the space's.

    Source: Ying et al., ICML 2019, https://arxiv.org/abs/1902.09635
    """
    rows: dict[str, int] = {}
    encodings: list[list[int]] = []
    sums: dict[int, dict[int, np.ndarray]] = collections.defaultdict(dict)  # epochs -> row -> four sums
    for record in read_tfrecords(path, check=verify):
        try:
            name, epochs, bits, ops, metrics = json.loads(record)
            seconds, valid, test = _final_metrics(base64.b64decode(metrics))
        except (ValueError, IndexError, KeyError, struct.error) as error:
            raise ValueError(f"{path} holds no rows of NAS-Bench-101: {record[:100]!r}.") from error
        if name not in rows:
            rows[name] = len(encodings)
            encodings.append(_encode_101(bits, ops.split(","), name))
        sums[epochs].setdefault(rows[name], np.zeros(4))
        sums[epochs][rows[name]] += (1.0, seconds, valid, test)
    if not rows:
        raise ValueError(f"{path} is empty.")
    lengths = sorted(sums)
    means = np.full((len(rows), len(lengths), 3), np.nan)
    for i, epochs in enumerate(lengths):
        for row, (count, *values) in sums[epochs].items():
            means[row, i] = np.array(values) / count
    pairs = [f"{s}->{t}" for s, t in zip(*np.triu_indices(7, 1), strict=True)]
    return make_benchmark(
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
    """The 21 entries above the diagonal of a 7 × 7 matrix, and five ops; the output stays the last of the vertices."""
    size = len(ops)
    known = size <= 7 and len(bits) == size**2 and set(ops[1:-1]) <= set(NAS_BENCH_101_PRIMITIVES)
    if not known or size < 2 or (ops[0], ops[-1]) != ("input", "output"):
        raise ValueError(f"The cell {name!r} is not in the space of NAS-Bench-101: {bits!r}, {ops}.")
    matrix = np.zeros((7, 7), int)
    matrix[:size, :size] = np.array(list(bits), int).reshape(size, size)
    digits = [NAS_BENCH_101_PRIMITIVES.index(op) + 1 for op in ops[1:-1]]
    return [*matrix[np.triu_indices(7, 1)].tolist(), *digits, *[0] * (5 - len(digits))]


# ---- NAS-Bench-201: pickles -----------------------------------------------------------------------------------------


class _Type:
    """In the place of numpy's dtype, which a file could tell to follow a pointer: what it says is looked at first."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1]


def _scalar(dtype, data=b""):
    known = (
        isinstance(dtype, _Type)
        and re.fullmatch("[biuf][1248]", str(dtype.code))
        and dtype.order in ("<", ">", "|", "=")
    )
    if not known:
        raise ValueError("The file holds a number of a type that is none of numpy's integers and floats.")
    return np.frombuffer(data, dtype.order + dtype.code)[0].item()


def _nothing(*args):
    """In the place of a tensor and its storage: weights are not read."""


_HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how protocol 2 writes bytes
    **{(module, "scalar"): _scalar for module in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{("torch._utils", name): _nothing for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")},
}


class _Unpickler(pickle.Unpickler):
    """Runs what builds containers and numbers, and nothing else."""

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return lambda *args, **kwargs: None
        if (module, name) not in _HARMLESS:
            raise ValueError(f"The file asks for {module}.{name}, which is no container or number: it is not run.")
        found = _HARMLESS[module, name]
        if isinstance(found, type):
            return found
        return lambda *args: found(*args)  # a function of its own, whose attributes a file may set as it likes

    def persistent_load(self, pid):
        return None


def _unpickled(path: Path) -> Any:
    """What a .pth of PyTorch (old or new form) or a .pickle.pbz2 holds."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                if len(inside) != 1:
                    raise ValueError("it is a zip archive without one data.pkl, which is where PyTorch keeps objects")
                return _Unpickler(io.BytesIO(archive.read(inside[0]))).load()
        with (bz2.open if path.suffix == ".pbz2" else open)(path, "rb") as file:
            found = _Unpickler(file).load()
            if found == 0x1950A86A20F9469CFC6C:  # the old form of PyTorch: a number, a version, the system, the object
                for _ in range(3):
                    found = _Unpickler(file).load()
            return found
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever damage raises: pickle, zipfile, zlib, bz2, and what builds numbers
        raise ValueError(
            f"{path} is no pickle that can be read, or is damaged: {error or type(error).__name__}"
        ) from error


# task -> the training that has a validation set and its name, that with the test set and its name
_SETS_201 = {
    "cifar10": (("cifar10-valid", "x-valid"), ("cifar10", "ori-test")),
    "cifar100": (("cifar100", "x-valid"), ("cifar100", "x-test")),
    "ImageNet16-120": (("ImageNet16-120", "x-valid"), ("ImageNet16-120", "x-test")),
}


def read_nas_bench_201(path: str | os.PathLike) -> Benchmark:
    """NAS-Bench-201 from its own files: a .pth (which takes 30 GB of memory), or NATS-Bench's topology space.

    NATS-Bench's directory "…-simple", a small file an architecture, is read with little memory: prefer it. Means over
    the runs that there are. Errors in %, validation at the end of the schedules of 12 and of 200 epochs, test after 200
    epochs (on CIFAR-10, trained on all images), seconds of training.

    Args:
      path: of NAS-Bench-201-v1_1-096897.pth or NATS-tss-v1_0-3ffb9.pickle.pbz2, or of the directory
        NATS-tss-v1_0-3ffb9-simple.

    Returns:
      A `Benchmark` with the digits of `nas_bench_201_table`, in the order of the file; NaN where it has no result.

    Raises:
      ValueError: it is something else, or asks for code.

    Source: Dong & Yang, ICLR 2020, https://arxiv.org/abs/2001.00326
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name[:6].isdigit())
        if not files:
            raise ValueError(f"{path} has no files such as 000000.pickle.pbz2.")
        found = (_unpickled(file) for file in files)
    else:
        whole = _unpickled(path)
        if not isinstance(whole, dict) or not isinstance(whole.get("arch2infos"), dict):
            raise ValueError(f"{path} holds no results of NAS-Bench-201.")
        found = (whole["arch2infos"][index] for index in sorted(whole["arch2infos"]))
    encodings, valid, test, cost = [], [], [], []
    for infos in found:
        try:
            short, long = (infos.get(name) or infos[other] for name, other in (("12", "less"), ("200", "full")))
            (text,) = {short["arch_str"], long["arch_str"]}
            rows = [_results_201(short, long, task) for task in _SETS_201]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no results of NAS-Bench-201 ({error!r}).") from error
        kept = {(s, t): op for s, t, op in from_nas_bench_201(text)["cell"]}
        edges = [(s, t) for t in (1, 2, 3) for s in range(t)]
        encodings.append([NAS_BENCH_201_PRIMITIVES.index(kept.get(edge, "none")) for edge in edges])
        for values, column in zip(zip(*rows, strict=True), (valid, test, cost), strict=True):
            column.append(values)
    return make_benchmark(
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
    """Validation errors and seconds at 12 and 200 epochs, and the test error after 200."""
    (searched, valid_name), (trained, test_name) = _SETS_201[task]

    def mean(of, data, value):
        runs = [run for (name, _), run in of["all_results"].items() if name == data]
        return float(np.mean([value(run, int(run["epochs"])) for run in runs])) if runs else np.nan

    error = lambda name: lambda run, epochs: 100 - run["eval_acc1es"][f"{name}@{epochs - 1}"]
    seconds = lambda run, epochs: sum(run["train_times"].values()) if run["train_times"] else np.nan
    valid = [mean(of, searched, error(valid_name)) for of in (short, long)]
    return valid, mean(long, trained, error(test_name)), [mean(of, searched, seconds) for of in (short, long)]


# ---- NAS-Bench-301: JSON --------------------------------------------------------------------------------------------

_DARTS_301 = "NetworkSelectorDatasetInfo:darts:"
_OPS_301 = DARTS_PRIMITIVES[1:]  # without "none"
_PAIRS_301: dict[int, list[tuple[int, ...]]] = {
    node: list(itertools.combinations(range(node), 2)) for node in (3, 4, 5)
}


def read_nas_bench_301(path: str | os.PathLike) -> Benchmark:
    """NAS-Bench-301's training logs: networks of the DARTS space, trained on CIFAR-10.

    Errors in %, seconds of training. Networks that were trained more than once are one row, of means. Logs of other
    depths, widths or lengths than the most frequent ones are left out: they are other networks.

    Args:
      path: of the folder, such as nb_301_v13; all "results_*.json" below it are read.

    Returns:
      A `Benchmark`; for each kind of cell a digit says which two nodes each of the nodes 3 to 5 sees, and eight say the
      ops of the edges, in their order: `nas_bench_301_genotype`.

    Raises:
      ValueError: there are no such files, or they hold something else.

    Source: Siems et al., ICLR 2022, https://arxiv.org/abs/2008.09777
    """
    found: dict[tuple, dict[tuple, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for file in sorted(Path(path).rglob("results_*.json")):
        try:
            log = json.loads(file.read_text())
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
            found[scale][tuple(_encode_301(settings))].append(outcome)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{file} is no log of NAS-Bench-301 ({error!r}).") from error
    if not found:
        raise ValueError(f"There are no files results_*.json below {path}.")
    networks = max(found.values(), key=len)
    means = np.array([np.mean(outcomes, 0) for outcomes in networks.values()])
    kinds = ("normal", "reduce")
    dims = [[*(f"{k} inputs{n}" for n in (3, 4, 5)), *(f"{k} op{i}" for i in range(8))] for k in kinds]
    choices = [*(len(pairs) for pairs in _PAIRS_301.values()), *[len(_OPS_301)] * 8]
    valid, test, seconds = means.T
    return make_benchmark(
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
        # Edges are numbered by target, then source; node 2 has the first two.
        names = [settings[f"{_DARTS_301}edge_{kind}_{sum(range(2, node)) + source}"] for source, node in edges]
        digits += [pairs.index(inputs[node]) for node, pairs in _PAIRS_301.items()]
        digits += [_OPS_301.index(name) for name in names]
    return digits


def nas_bench_301_genotype(encoding: Any) -> Genotype:
    """The genotype that a row of `read_nas_bench_301` says.

    Args:
      encoding: 22 digits.

    Returns:
      A `Genotype` of the kinds "normal" and "reduce", in the space of `darts_space`, whose `configuration_space` has
      these digits.

    Raises:
      ValueError: there are not 22 digits, or one is out of range.
    """
    digits = [int(x) for x in encoding]
    limits = [*(len(pairs) for pairs in _PAIRS_301.values()), *[len(_OPS_301)] * 8] * 2
    if len(digits) != 22 or any(not 0 <= x < limit for x, limit in zip(digits, limits, strict=True)):
        raise ValueError(f"A network of NAS-Bench-301 is 22 digits below {limits}; got {digits}.")
    network = darts_space()
    return from_configuration(network, dict(zip(configuration_space(network), digits, strict=True)))
