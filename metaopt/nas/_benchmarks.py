"""Tables of trained architectures, for searches that take no time: one form for all of them.

The files are those of the data folder (`METAOPT_DATA`), converted from what the benchmarks publish; their README says
from where. An architecture is a row of integers, its encoding. **Outcomes are losses, smaller is better.**
"""

import contextlib
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaopt import _files, base
from metaopt.nas._genotypes import NONE, Graph, edge_graph, from_nas_bench_201, nas_bench_101_hash, pruned
from metaopt.nas._nas_bench_101 import genotype_graph, nas_bench_101_graph
from metaopt.nas._specs import (
    NAS_BENCH_201_PRIMITIVES,
    NAS_BENCH_MACRO_PRIMITIVES,
    TRANS_NAS_BENCH_101_PRIMITIVES,
    Genotype,
)


class Benchmark(NamedTuple):
    """Architectures × tasks × outcomes.

    Attributes:
      name: of the benchmark.
      tasks: [T] names.
      dims: [D] what the entries of an encoding say.
      num_choices: [D] how many values each has.
      encodings: [A, D] int; where all combinations are there, their number is the product of `num_choices`.
      fidelities: [F] in (0, 1], increasing.
      valid: [A, T, F] what a search may see; NaN where nothing was trained.
      test: [A, T] what it is judged by; where a benchmark has none, `valid` at the full fidelity.
      cost: [A, T, F] seconds of training; NaN where they are not known.
      query: `(architecture, task, fidelity) -> (outcome, cost)`, of a row of integers, a task's name, a fidelity (1.0
        by default; to 1e-3); raises a ValueError for what is not in the table, or was not trained there. Of
        NAS-Bench-101 an architecture may be a `Graph`, too, or a genotype of `nas_bench_101_space`, and is found by its
        hash; of NAS-Bench-201, the micro space of TransNAS-Bench-101 and NAS-Bench-Macro a genotype of
        `nas_bench_201_space`, `trans_nas_bench_101_space` and `nas_bench_macro_space`, and of NAS-Bench-201 its text.
    """

    name: str
    tasks: tuple[str, ...]
    dims: tuple[str, ...]
    num_choices: tuple[int, ...]
    encodings: np.ndarray
    fidelities: tuple[float, ...]
    valid: np.ndarray
    test: np.ndarray
    cost: np.ndarray
    query: Callable[..., tuple[float, float]]


def make_benchmark(
    name, tasks, dims, num_choices, encodings, valid, *, fidelities=(1.0,), test=None, cost=None
) -> Benchmark:
    tasks, dims = tuple(map(str, tasks)), tuple(dims)
    encodings = np.asarray(encodings, np.int64)
    for what, values in (("valid", valid), ("test", test), ("cost", cost)):
        if values is not None:
            _files.check_finite(what, np.asarray(values), missing=True)
    valid = np.asarray(valid, np.float32)
    valid = valid if valid.ndim == 3 else valid[..., None]
    test = valid[..., -1] if test is None else np.asarray(test, np.float32)
    cost = np.full(valid.shape, np.nan, np.float32) if cost is None else np.asarray(cost, np.float32)
    rows = {encoding: row for row, encoding in enumerate(map(tuple, encodings.tolist()))}
    by_hash: dict[str, int] = {}

    def row_of(architecture) -> int | None:
        if isinstance(architecture, Mapping) and name.startswith("NAS-Bench-101"):
            architecture = genotype_graph(_genotype(architecture))
        if isinstance(architecture, Graph) and name.startswith("NAS-Bench-101"):
            if not by_hash:  # when it is first needed: seconds
                whole = {row: pruned(nas_bench_101_graph(encoding)) for encoding, row in rows.items()}
                by_hash.update({nas_bench_101_hash(g): row for row, g in whole.items() if g is not None})
            return by_hash.get(nas_bench_101_hash(architecture))
        if isinstance(architecture, str) and name == "NAS-Bench-201":
            architecture = from_nas_bench_201(architecture)
        if isinstance(architecture, Mapping) and name in _EDGE_OPS:
            edges = _genotype(architecture).get("cell", ())
            given = {(s, t): op for s, t, op in edges}
            once = len(given) == len(edges)  # one op an edge
            ops = [given.pop(pair, NONE) for pair in _PAIRS]
            known = once and set(architecture) == {"cell"} and not given and set(ops) <= set(_EDGE_OPS[name])
            return rows.get(tuple(map(_EDGE_OPS[name].index, ops))) if known else None
        if isinstance(architecture, Mapping) and name == "NAS-Bench-Macro":
            digit: dict[tuple, int] = {((0, 1, op),): i for i, op in enumerate(_CHAINS[name])}
            found = _genotype(architecture)
            digits = tuple(digit.get(found.get(dim, ())) for dim in dims)
            return rows.get(digits) if set(architecture) == set(dims) else None
        if isinstance(architecture, str | Mapping | Graph) or not np.iterable(architecture):
            raise ValueError(f"{name} is asked for rows of integers of {len(dims)} entries; got {architecture!r}.")
        digits = tuple(architecture)
        if any(isinstance(x, str | bytes) or np.ndim(x) for x in digits):
            raise ValueError(
                f"{name} is asked for rows of integers of {len(dims)} entries, which stand for "
                f"{', '.join(dims)}; got {architecture!r}."
            )
        return rows.get(tuple(map(int, digits))) if all(float(x).is_integer() for x in digits) else None

    def query(architecture, task, fidelity=1.0):
        if np.ndim(fidelity) or np.asarray(fidelity).dtype.kind not in "biuf":
            raise ValueError(
                f"`fidelity` must be a number, one of {', '.join(map(str, fidelities))}; got {fidelity!r}. Without it "
                "that is the full budget, 1.0."
            )
        row, near = row_of(architecture), [i for i, f in enumerate(fidelities) if abs(f - fidelity) < 1e-3]
        if row is None or task not in tasks or not near:
            raise ValueError(
                f"{name} has {len(rows)} architectures, the tasks {', '.join(tasks)} and the fidelities "
                f"{', '.join(map(str, fidelities))}; got {architecture}, {task!r}, {fidelity}."
            )
        at = row, tasks.index(task), near[0]
        if np.isnan(valid[at]):
            raise ValueError(f"{name}: {architecture} was not trained on {task!r} at the fidelity {fidelity}.")
        return float(valid[at]), float(cost[at])

    return Benchmark(name, tasks, dims, tuple(num_choices), encodings, fidelities, valid, test, cost, query)


def _genotype(given: Mapping[str, Any]) -> Genotype:
    """kind -> edges, as tuples; ValueError where it is something else."""
    try:
        genotype = {k: tuple((operator.index(s), operator.index(t), op) for s, t, op in e) for k, e in given.items()}
        hash(tuple(genotype.values()))
    except (TypeError, ValueError):
        raise ValueError(
            "A genotype must be kind -> edges (source, target, op), such as {'cell': ((0, 1, 'skip_connect'),)}; got "
            f"{given!r}."
        ) from None
    return genotype


@contextlib.contextmanager
def _open(name: str, folder: str | os.PathLike | None) -> Iterator[_files.Npz]:
    path = Path(os.environ.get("METAOPT_DATA", "") if folder is None else folder) / f"{name}.npz"
    if not path.is_file():
        raise ValueError(
            f"There is no file {path}: give the folder of the tables, or let the environment variable METAOPT_DATA "
            "name it."
        )
    with _files.reading(path, "is not the table of this benchmark"), _files.open_npz(path) as data:
        yield data


def nas_bench_201_table(folder: str | os.PathLike | None = None) -> Benchmark:
    """NAS-Bench-201: 15,625 cells on CIFAR-10, CIFAR-100 and ImageNet16-120, in the benchmark's order.

    Validation is that of the separate schedule of 12 epochs, which is the only true one; the test error is after 200.
    So the one fidelity, 1.0, is of those 12 epochs, where `read_nas_bench_201` has both lengths, and 1.0 is 200.
    Errors in %. Seconds are of the 12 epochs, in the benchmark's own measure, which goes by the number of images
    (25,000, 50,000 and 151,700). Row 9930 is the cell that is best nearly everywhere.

    Args:
      folder: of nasbench201.npz; by default what METAOPT_DATA names.

    Returns:
      A `Benchmark`; a digit is an index into `NAS_BENCH_201_PRIMITIVES`.

    Raises:
      ValueError: the file is not there.
    """
    with _open("nasbench201", folder) as data:
        valid, test, encodings = 100 - data["val_acc_12"], 100 - data["test_acc_200"], data["edge_ops"]
        cost = data["cost_12_s_cifar10"][:, None] * (np.array([25_000, 50_000, 151_700]) / 25_000)
        dims, tasks = data["edge_order"].tolist(), data["datasets"]
        return make_benchmark("NAS-Bench-201", tasks, dims, [5] * 6, encodings, valid, test=test, cost=cost[..., None])


def trans_nas_bench_101_table(folder: str | os.PathLike | None = None, *, space: str = "micro") -> Benchmark:
    """TransNAS-Bench-101: 4,096 cells or 3,256 networks on six tasks; validation alone, in each task's own metric.

    Args:
      folder: of transnasbench101.npz.
      space: "micro", whose digits are none, skip, 1×1 and 3×3 convolution on six edges; or "macro", whose digits are
        what each of up to six blocks does (0: no block; plain, more channels, stride 2, both). Micro cells are those
        of `trans_nas_bench_101_space`; macro networks are a table alone.

    Returns:
      A `Benchmark`; losses are minus the metric.

    Raises:
      ValueError: the file is not there, or `space` unknown.
    """
    if space not in ("micro", "macro"):
        raise ValueError(f'`space` must be "micro" or "macro"; got {space!r}.')
    with _open("transnasbench101", folder) as data:
        encodings = data[f"{space}_enc"]
        if space == "macro":
            encodings = np.maximum(encodings, 0)  # -1, no block
        dims = data["micro_edge_order"].tolist() if space == "micro" else [f"block{i}" for i in range(6)]
        num_choices = [4 if space == "micro" else 5] * 6
        return make_benchmark(
            f"TransNAS-Bench-101, {space}", data["tasks"], dims, num_choices, encodings, -data[f"{space}_val"]
        )


def nas_bench_macro_table(folder: str | os.PathLike | None = None) -> Benchmark:
    """NAS-Bench-Macro: 6,561 networks of eight blocks on CIFAR-10.

    It has the test accuracies of three runs: the first is what a search sees, the mean of the others what it is judged
    by. Errors in %.

    Args:
      folder: of nasbenchmacro.npz.

    Returns:
      A `Benchmark`; digits are an identity and two inverted residuals, the layers of `nas_bench_macro_space`.

    Raises:
      ValueError: the file is not there.
    """
    with _open("nasbenchmacro", folder) as data:
        errors = 100 - data["test_acc"]
        dims = [f"block{i}" for i in range(8)]
        return make_benchmark(
            "NAS-Bench-Macro",
            ["cifar10"],
            dims,
            [3] * 8,
            data["blocks"],
            errors[:, :1],
            test=errors[:, 1:].mean(1)[:, None],
        )


def nas_bench_graph_table(folder: str | os.PathLike | None = None) -> Benchmark:
    """NAS-Bench-Graph: 26,206 graph networks on seven graphs. Errors are fractions.

    On "proteins" only 2,021 of them were trained; others are NaN, of which `benchmark_records` makes no record. It is a
    table alone: a cell is one of nine shapes, which is no choice of ops on edges, so that no supernet has it.

    Args:
      folder: of nasbenchgraph.npz.

    Returns:
      A `Benchmark`; the first digit is one of nine shapes of the cell, the others are the ops of its four nodes.

    Raises:
      ValueError: the file is not there.
    """
    with _open("nasbenchgraph", folder) as data:
        encodings = np.concatenate([data["link_idx"][:, None], data["ops"]], 1)
        dims = ["links", *(f"op{i}" for i in range(4))]
        return make_benchmark(
            "NAS-Bench-Graph", data["datasets"], dims, [9] * 5, encodings, 1 - data["val"], test=1 - data["test"]
        )


def nas_bench_101_table(folder: str | os.PathLike | None = None) -> Benchmark:
    """A part of NAS-Bench-101: 30,001 of its 423,624 cells, on CIFAR-10, at 4, 12, 36 and 108 epochs.

    Validation alone, of one run each. Errors are fractions; seconds are of 108 epochs, and in proportion of fewer.

    Args:
      folder: of nasbench101_subset.npz.

    Returns:
      A `Benchmark`; digits are the 21 entries above the diagonal of the matrix, then the ops of vertices 1 to 5, where
      1, 2 and 3 are `NAS_BENCH_101_PRIMITIVES`, and 0 is the output's and what is not there.

    Raises:
      ValueError: the file is not there.
    """
    with _open("nasbench101_subset", folder) as data:
        ops = np.maximum(data["ops"][:, 1:6].astype(int), -1) + 1
        encodings = np.concatenate([data["adj_upper"], ops], 1)
        epochs = data["budgets"]
        fidelities = tuple(float(x) for x in epochs / epochs[-1])
        cost = data["train_time_s"][:, None, None] * np.array(fidelities)
        pairs = [f"{s}->{t}" for s, t in zip(*np.triu_indices(7, 1), strict=True)]
        valid = 1 - data["val_acc"][:, None]
        dims, num_choices = [*pairs, *(f"op{i}" for i in range(1, 6))], [2] * 21 + [4] * 5
        return make_benchmark(
            "NAS-Bench-101, a part", ["cifar10"], dims, num_choices, encodings, valid, fidelities=fidelities, cost=cost
        )


def benchmark_records(
    benchmark: Benchmark, tasks: Sequence[str] | None = None, *, test: bool = False
) -> list[base.Record]:
    """What a table says at the full budget as records of trials, for `methods.train_cell_searcher` and its kin.

    Args:
      benchmark: any.
      tasks: names of some of its tasks; None takes all.
      test: whether outcomes are what architectures are judged by, and not what a search may see.

    Returns:
      Records of all architectures on each task in turn, their configurations the digits of an encoding by what they say
      (`benchmark.dims`). What was not trained (NaN) is no trial that failed, and has none.

    Raises:
      ValueError: a task is not in the table, or `tasks` is one name, and no sequence of names.
    """
    if isinstance(tasks, str):
        raise ValueError(f"`tasks` must be a sequence of names, such as [{tasks!r}]; got the string {tasks!r}.")
    names = benchmark.tasks if tasks is None else list(tasks)
    if unknown := [name for name in names if name not in benchmark.tasks]:
        raise ValueError(f"{benchmark.name} has the tasks {', '.join(benchmark.tasks)}; got {unknown[0]!r}.")
    configurations = [dict(zip(benchmark.dims, row, strict=True)) for row in benchmark.encodings.tolist()]
    outcomes, records = benchmark.test if test else benchmark.valid[..., -1], []
    for name in names:
        column = benchmark.tasks.index(name)
        values = outcomes[:, column].tolist(), benchmark.cost[:, column, -1].tolist()
        records += [
            base.Record(name, configuration, outcome, cost=cost)
            for configuration, outcome, cost in zip(configurations, *values, strict=True)
            if math.isfinite(outcome)
        ]
    return records


# ---- Architectures as graphs ----------------------------------------------------------------------------------------

_GRAPH_OPS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")
# Of each shape of a NAS-Bench-Graph cell, what its four nodes come from: 0 the input, i the node before it.
_GRAPH_LINKS = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 2), (0, 0, 1, 3)]
_GRAPH_LINKS += [(0, 1, 1, 1), (0, 1, 1, 2), (0, 1, 2, 2), (0, 1, 2, 3)]
_PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
_EDGE_OPS = {
    "NAS-Bench-201": NAS_BENCH_201_PRIMITIVES,
    "TransNAS-Bench-101, micro": TRANS_NAS_BENCH_101_PRIMITIVES,
}
_CHAINS = {
    "TransNAS-Bench-101, macro": (NONE, "plain", "channels", "stride", "channels and stride"),
    "NAS-Bench-Macro": NAS_BENCH_MACRO_PRIMITIVES,
}


def benchmark_graph(benchmark: Benchmark, encoding) -> Graph:
    """The architecture that a row of a table says, as a graph with ops on vertices, without what leads nowhere.

    Of networks of blocks it is a chain.

    Args:
      benchmark: any but NAS-Bench-301, whose networks have two kinds of cells.
      encoding: [D] a row of integers.

    Returns:
      A `Graph`; where nothing joins input and output, it has these two vertices and no edge.

    Raises:
      ValueError: the benchmark is unknown, or the row is none of its.
    """
    digits = [int(x) for x in encoding]
    counts = benchmark.num_choices
    if len(digits) != len(counts) or not all(0 <= x < n for x, n in zip(digits, counts, strict=True)):
        raise ValueError(f"{benchmark.name} has {len(counts)} digits below {tuple(counts)}; got {tuple(digits)}.")
    if benchmark.name.startswith("NAS-Bench-101"):
        graph = nas_bench_101_graph(digits)
    elif benchmark.name in _EDGE_OPS:
        ops = _EDGE_OPS[benchmark.name]
        graph = edge_graph([(*pair, ops[x]) for pair, x in zip(_PAIRS, digits, strict=True)], output=(3,))
    elif benchmark.name in _CHAINS:
        blocks = [op for op in (_CHAINS[benchmark.name][x] for x in digits) if op != NONE]
        graph = edge_graph([(i, i + 1, op) for i, op in enumerate(blocks)], output=(len(blocks),))
    elif benchmark.name == "NAS-Bench-Graph":
        links, matrix = _GRAPH_LINKS[digits[0]], np.zeros((6, 6), int)
        matrix[links, range(1, 5)] = 1
        matrix[1:5, 5] = ~matrix[1:5].any(1)  # what nothing comes from is the output
        graph = Graph(tuple(map(tuple, matrix.tolist())), ("input", *(_GRAPH_OPS[x] for x in digits[1:]), "output"))
    else:
        raise ValueError(f"The architectures of {benchmark.name!r} are not known as graphs.")
    return pruned(graph) or Graph(((0, 0), (0, 0)), ("input", "output"))
