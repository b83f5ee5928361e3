"""Tables of trained architectures in one common format, for searches that train nothing.

The files are in the data folder (`METAOPT_DATA`). They were converted from the files that the benchmarks publish; the
README of the folder lists the sources. An architecture is a row of integers, its encoding. **Outcomes are losses:
smaller is better.**
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
    """A table of outcomes for architectures, tasks and fidelities.

    Attributes:
      name: of the benchmark.
      tasks: [T] names.
      dims: [D] names of the entries of an encoding.
      num_choices: [D] number of values of each entry.
      encodings: [A, D] int. If the table has all combinations, A is the product of `num_choices`.
      fidelities: [F] in (0, 1], increasing.
      valid: [A, T, F] outcomes that a search may see; NaN if the architecture was not trained.
      test: [A, T] outcomes by which a search is judged. If the benchmark has none, they are `valid` at the full
        fidelity.
      cost: [A, T, F] seconds of training; NaN if unknown.
      query: `(architecture, task, fidelity) -> (outcome, cost)`. The architecture is a row of integers and the task is
        a name. The fidelity is 1.0 by default and must match one of `fidelities` to 1e-3. It raises ValueError if the
        table has no such entry, or if the architecture was not trained there. For NAS-Bench-101 an architecture may
        also be a `Graph` or a genotype of `nas_bench_101_space`, which is found by its hash. Three benchmarks also take
        genotypes: NAS-Bench-201 of `nas_bench_201_space`, the micro space of TransNAS-Bench-101 of
        `trans_nas_bench_101_space`, and NAS-Bench-Macro of `nas_bench_macro_space`. NAS-Bench-201 also takes its own
        text form.
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
            if not by_hash:  # built on first use, since it takes seconds
                whole = {row: pruned(nas_bench_101_graph(encoding)) for encoding, row in rows.items()}
                by_hash.update({nas_bench_101_hash(g): row for row, g in whole.items() if g is not None})
            return by_hash.get(nas_bench_101_hash(architecture))
        if isinstance(architecture, str) and name == "NAS-Bench-201":
            architecture = from_nas_bench_201(architecture)
        if isinstance(architecture, Mapping) and name in _EDGE_OPS:
            edges = _genotype(architecture).get("cell", ())
            given = {(s, t): op for s, t, op in edges}
            once = len(given) == len(edges)  # one op per edge
            ops = [given.pop(pair, NONE) for pair in _PAIRS]
            known = once and set(architecture) == {"cell"} and not given and set(ops) <= set(_EDGE_OPS[name])
            return rows.get(tuple(map(_EDGE_OPS[name].index, ops))) if known else None
        if isinstance(architecture, Mapping) and name == "NAS-Bench-Macro":
            digit: dict[tuple, int] = {((0, 1, op),): i for i, op in enumerate(_CHAINS[name])}
            found = _genotype(architecture)
            digits = tuple(digit.get(found.get(dim, ())) for dim in dims)
            return rows.get(digits) if set(architecture) == set(dims) else None
        if isinstance(architecture, str | Mapping | Graph) or not np.iterable(architecture):
            raise ValueError(f"{name} takes rows of {len(dims)} integers; got {architecture!r}.")
        digits = tuple(architecture)
        if any(isinstance(x, str | bytes) or np.ndim(x) for x in digits):
            raise ValueError(
                f"{name} takes rows of {len(dims)} integers, which stand for {', '.join(dims)}; got {architecture!r}."
            )
        return rows.get(tuple(map(int, digits))) if all(float(x).is_integer() for x in digits) else None

    def query(architecture, task, fidelity=1.0):
        if np.ndim(fidelity) or np.asarray(fidelity).dtype.kind not in "biuf":
            raise ValueError(
                f"`fidelity` must be a number, one of {', '.join(map(str, fidelities))}; got {fidelity!r}. The "
                "default is the full budget, 1.0."
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
    """Returns kind -> edges, as tuples; raises ValueError if the value is something else."""
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
            f"There is no file {path}. Pass the folder of the tables, or set the environment variable METAOPT_DATA to "
            "it."
        )
    with _files.reading(path, "is not the table of this benchmark"), _files.open_npz(path) as data:
        yield data


def nas_bench_201_table(folder: str | os.PathLike | None = None) -> Benchmark:
    """NAS-Bench-201: 15,625 cells on CIFAR-10, CIFAR-100 and ImageNet16-120, in the order of the benchmark.

    Validation errors are from the separate schedule of 12 epochs, the only true validation; test errors are after 200
    epochs. So the only fidelity, 1.0, stands for those 12 epochs. `read_nas_bench_201` has both lengths, and its 1.0
    stands for 200 epochs. Errors are in %. Costs are seconds for the 12 epochs. They follow the measure of the
    benchmark, in proportion to the number of images (25,000, 50,000 and 151,700). Row 9930 is the best cell nearly
    everywhere.

    Args:
      folder: folder of nasbench201.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`; a digit is an index into `NAS_BENCH_201_PRIMITIVES`.

    Raises:
      ValueError: if the file does not exist.
    """
    with _open("nasbench201", folder) as data:
        valid, test, encodings = 100 - data["val_acc_12"], 100 - data["test_acc_200"], data["edge_ops"]
        cost = data["cost_12_s_cifar10"][:, None] * (np.array([25_000, 50_000, 151_700]) / 25_000)
        dims, tasks = data["edge_order"].tolist(), data["datasets"]
        return make_benchmark("NAS-Bench-201", tasks, dims, [5] * 6, encodings, valid, test=test, cost=cost[..., None])


def trans_nas_bench_101_table(folder: str | os.PathLike | None = None, *, space: str = "micro") -> Benchmark:
    """TransNAS-Bench-101: 4,096 cells or 3,256 networks on six tasks; validation only, in the metric of each task.

    Args:
      folder: folder of transnasbench101.npz; by default the folder that METAOPT_DATA names.
      space: "micro" or "macro". The digits of "micro" stand for none, skip, 1×1 and 3×3 convolution on six edges. The
        digits of "macro" state the type of each of up to six blocks (0: no block; plain, more channels, stride 2,
        both). Micro cells are the cells of `trans_nas_bench_101_space`. Macro networks exist only as a table.

    Returns:
      A `Benchmark`; losses are the negative metric.

    Raises:
      ValueError: if the file does not exist, or if `space` is unknown.
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

    The benchmark has the test accuracies of three runs. A search sees the first run, and is judged by the mean of the
    other two. Errors are in %.

    Args:
      folder: folder of nasbenchmacro.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`; digits stand for an identity and two inverted residuals, the layers of `nas_bench_macro_space`.

    Raises:
      ValueError: if the file does not exist.
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

    On "proteins" only 2,021 of them were trained. The others are NaN, and `benchmark_records` makes no records of them.
    The benchmark exists only as a table. A cell is one of nine shapes, not a choice of ops on edges, so no supernet
    covers it.

    Args:
      folder: folder of nasbenchgraph.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`; the first digit is one of the nine shapes of the cell, the others are the ops of its four nodes.

    Raises:
      ValueError: if the file does not exist.
    """
    with _open("nasbenchgraph", folder) as data:
        encodings = np.concatenate([data["link_idx"][:, None], data["ops"]], 1)
        dims = ["links", *(f"op{i}" for i in range(4))]
        return make_benchmark(
            "NAS-Bench-Graph", data["datasets"], dims, [9] * 5, encodings, 1 - data["val"], test=1 - data["test"]
        )


def nas_bench_101_table(folder: str | os.PathLike | None = None) -> Benchmark:
    """A part of NAS-Bench-101: 30,001 of its 423,624 cells, on CIFAR-10, at 4, 12, 36 and 108 epochs.

    It has validation results only, from one run each. Errors are fractions. Seconds are for 108 epochs, and
    proportionally less for fewer epochs.

    Args:
      folder: folder of nasbench101_subset.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`. Digits are the 21 entries above the diagonal of the matrix, then the ops of vertices 1 to 5. The
      ops 1, 2 and 3 are `NAS_BENCH_101_PRIMITIVES`; 0 stands for the output or for a vertex that does not exist.

    Raises:
      ValueError: if the file does not exist.
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
    """Converts the full-budget results of a table to records, for `nas.train_cell_searcher` and similar functions.

    Args:
      benchmark: any benchmark.
      tasks: names of some of its tasks; None takes all.
      test: whether to take the outcomes by which a search is judged, instead of the outcomes that it may see.

    Returns:
      Records of all architectures, task by task. A configuration maps the names in `benchmark.dims` to the digits of an
      encoding. Architectures that were not trained (NaN) get no record: they are not failed trials.

    Raises:
      ValueError: if a task is not in the table, or if `tasks` is a single name instead of a sequence of names.
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
# For each shape of a NAS-Bench-Graph cell, the sources of its four nodes: 0 is the input, i is node i.
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
    """The architecture of a row of a table, as a graph with ops on vertices, without vertices that lead nowhere.

    A network of blocks becomes a chain.

    Args:
      benchmark: any benchmark except NAS-Bench-301, whose networks have two kinds of cells.
      encoding: [D] a row of integers.

    Returns:
      A `Graph`. If no path joins input and output, it has only these two vertices and no edge.

    Raises:
      ValueError: if the benchmark is unknown, or if the row is not an encoding of it.
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
        matrix[1:5, 5] = ~matrix[1:5].any(1)  # nodes without a successor lead to the output
        graph = Graph(tuple(map(tuple, matrix.tolist())), ("input", *(_GRAPH_OPS[x] for x in digits[1:]), "output"))
    else:
        raise ValueError(f"The architectures of {benchmark.name!r} are not known as graphs.")
    return pruned(graph) or Graph(((0, 0), (0, 0)), ("input", "output"))
