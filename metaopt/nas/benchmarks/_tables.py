"""Benchmarks of trained architectures in one common format, for searches that train nothing.

An architecture is a row of integers, its encoding. **Outcomes are losses: smaller is better.**
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt import _files, base
from metaopt.nas._genotype_text import from_nas_bench_201
from metaopt.nas._genotypes import NONE
from metaopt.nas._graphs import Graph, edge_graph, nas_bench_101_hash, pruned
from metaopt.nas._named_spaces import (
    NAS_BENCH_201_PRIMITIVES,
    NAS_BENCH_MACRO_PRIMITIVES,
    TRANS_NAS_BENCH_101_PRIMITIVES,
)
from metaopt.nas._nas_bench_101 import genotype_graph, nas_bench_101_graph
from metaopt.nas._specs import Genotype


class Benchmark(NamedTuple):
    """A table of outcomes for architectures, tasks and fidelities.

    Attributes:
      name: the name of the benchmark.
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
        a name. The fidelity is 1.0 by default and must equal one of `fidelities` to within 1e-3. `query` raises
        ValueError if the table has no such entry, or if the architecture was not trained there. In some benchmarks, an
        architecture may have other forms. NAS-Bench-101: a `Graph`, or a genotype of `nas_bench_101_space`; both are
        found by their hash. NAS-Bench-201: a genotype of `nas_bench_201_space`, or the text form of the benchmark. The
        micro space of TransNAS-Bench-101: a genotype of `trans_nas_bench_101_space`. NAS-Bench-Macro: a genotype of
        `nas_bench_macro_space`.
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

    def records(self, tasks: Sequence[str] | None = None, *, test: bool = False) -> list[base.Record]:
        """Converts the full-budget results to records, for `nas.train_cell_searcher` and similar functions.

        Args:
          tasks: names of some of its tasks; None takes all.
          test: whether to take the outcomes by which a search is judged, instead of the outcomes that it may see.

        Returns:
          Records of all architectures, task by task. A configuration maps the names in `dims` to the digits of an
          encoding. Architectures that were not trained (NaN) get no record: they are not failed trials.

        Raises:
          ValueError: if a task is not in the table, or if `tasks` is a single name instead of a sequence of names.
        """
        names = self.tasks if tasks is None else list(tasks)
        if unknown := [name for name in names if name not in self.tasks]:
            raise ValueError(f"{self.name} has the tasks {', '.join(self.tasks)}; got {unknown[0]!r}.")
        configurations = [dict(zip(self.dims, row, strict=True)) for row in self.encodings.tolist()]
        outcomes, records = self.test if test else self.valid[..., -1], []
        for name in names:
            column = self.tasks.index(name)
            values = outcomes[:, column].tolist(), self.cost[:, column, -1].tolist()
            records += [
                base.Record(name, configuration, outcome, cost=cost)
                for configuration, outcome, cost in zip(configurations, *values, strict=True)
                if math.isfinite(outcome)
            ]
        return records

    def graph(self, encoding: Iterable[int]) -> Graph:
        """Returns a row's architecture as a graph with ops on vertices, without vertices that do not reach the output.

        A network that is a sequence of blocks becomes a chain.

        Args:
          encoding: [D] a row of `encodings`. (NAS-Bench-301 has no such graph, since its networks have two kinds of
            cells.)

        Returns:
          A `Graph`. If no path joins input and output, it has only these two vertices and no edge.

        Raises:
          ValueError: if the benchmark is unknown, or if the row is not an encoding of it.
        """
        return _graph(self, encoding)


def benchmark_table(
    name: str,
    tasks: Sequence[str],
    dims: Sequence[str],
    num_choices: Sequence[int],
    encodings: Any,
    valid: Any,
    *,
    fidelities: Sequence[float] = (1.0,),
    test: Any = None,
    cost: Any = None,
) -> Benchmark:
    """Makes a benchmark from arrays.

    Args:
      name: name of the benchmark. `query` and `graph` know the spaces "NAS-Bench-201", "NAS-Bench-101",
        "NAS-Bench-101, a part", "NAS-Bench-Macro", "NAS-Bench-Graph", "TransNAS-Bench-101, micro" and
        "TransNAS-Bench-101, macro" by their names. With another name, architectures are rows of integers.
      tasks: [T] names.
      dims: [D] names of the entries of an encoding.
      num_choices: [D] number of values of each entry.
      encodings: [A, D] integers.
      valid: [A, T, F] or, with one fidelity, [A, T]; NaN if the architecture was not trained.
      fidelities: [F] in (0, 1], increasing; the last one is 1.
      test: [A, T]; by default `valid` at the full fidelity.
      cost: [A, T, F] seconds of training; by default unknown.

    Returns:
      A `Benchmark`.

    Raises:
      ValueError: if an outcome or a cost is infinite.

    >>> from metaopt import nas
    >>> table = nas.benchmark_table(
    ...     "mine", ["digits"], ["depth", "width"], [2, 3], [[0, 2], [1, 0]], [[0.2], [0.1]]
    ... )
    >>> round(table.query([1, 0], "digits")[0], 3)
    0.1
    >>> [record.configuration for record in table.records()]
    [{'depth': 0, 'width': 2}, {'depth': 1, 'width': 0}]
    """
    tasks, dims = tuple(map(str, tasks)), tuple(dims)
    encodings = np.asarray(encodings, np.int64)
    for what, values in (("valid", valid), ("test", test), ("cost", cost)):
        if values is not None:
            _files.check_finite(what, np.asarray(values), missing=True)
    valid = np.asarray(valid, np.float32)
    valid = valid if valid.ndim == 3 else valid[..., None]
    test = valid[..., -1] if test is None else np.asarray(test, np.float32)
    cost = np.full(valid.shape, np.nan, np.float32) if cost is None else np.asarray(cost, np.float32)
    rows = _Rows(name, dims, {row: i for i, row in enumerate(map(tuple, encodings.tolist()))}, {})
    table = Benchmark(
        name, tasks, dims, tuple(num_choices), encodings, tuple(fidelities), valid, test, cost, lambda: (0.0, 0.0)
    )
    return table._replace(query=functools.partial(_query, table, rows))


# ---- Looking up an architecture -------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Finds the row of an architecture.

    Attributes:
      name: name of the benchmark.
      dims: names of the entries of an encoding.
      by_encoding: encoding -> row.
      by_hash: hash of a cell of NAS-Bench-101 -> row. It is filled at the first use, since it takes seconds.
    """

    name: str
    dims: tuple[str, ...]
    by_encoding: dict[tuple[int, ...], int]
    by_hash: dict[str, int]


_PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
_EDGE_OPS = {
    "NAS-Bench-201": NAS_BENCH_201_PRIMITIVES,
    "TransNAS-Bench-101, micro": TRANS_NAS_BENCH_101_PRIMITIVES,
}
_CHAINS = {
    "TransNAS-Bench-101, macro": (NONE, "plain", "channels", "stride", "channels and stride"),
    "NAS-Bench-Macro": NAS_BENCH_MACRO_PRIMITIVES,
}


def _query(table: Benchmark, rows: _Rows, architecture: Any, task: str, fidelity: float = 1.0) -> tuple[float, float]:
    """The outcome and the cost of an architecture: `Benchmark.query`."""
    row = _row(rows, architecture)
    fidelity_indices = [i for i, each in enumerate(table.fidelities) if abs(each - fidelity) < 1e-3]
    if row is None or task not in table.tasks or not fidelity_indices:
        raise ValueError(
            f"{table.name} has {len(rows.by_encoding)} architectures, the tasks {', '.join(table.tasks)} and the "
            f"fidelities {', '.join(map(str, table.fidelities))}; got {architecture}, {task!r}, {fidelity}."
        )
    entry = row, table.tasks.index(task), fidelity_indices[0]
    if np.isnan(table.valid[entry]):
        raise ValueError(f"{table.name}: {architecture} was not trained on {task!r} at the fidelity {fidelity}.")
    return float(table.valid[entry]), float(table.cost[entry])


def _row(rows: _Rows, architecture: Any) -> int | None:
    """The row of an architecture in any form that the benchmark takes; None if the table does not have it."""
    if rows.name.startswith("NAS-Bench-101"):
        if isinstance(architecture, Mapping):
            architecture = genotype_graph(_tuples(architecture))
        if isinstance(architecture, Graph):
            return _graph_row(rows, architecture)
    if rows.name == "NAS-Bench-201" and isinstance(architecture, str):
        architecture = from_nas_bench_201(architecture)
    if isinstance(architecture, Mapping) and rows.name in _EDGE_OPS:
        return _cell_row(rows, _tuples(architecture))
    if isinstance(architecture, Mapping) and rows.name == "NAS-Bench-Macro":
        return _chain_row(rows, _tuples(architecture))
    try:
        digits = [float(x) for x in architecture]
    except (TypeError, ValueError):
        return None
    return rows.by_encoding.get(tuple(map(int, digits))) if all(x.is_integer() for x in digits) else None


def _graph_row(rows: _Rows, graph: Graph) -> int | None:
    if not rows.by_hash:
        whole = {row: pruned(nas_bench_101_graph(encoding)) for encoding, row in rows.by_encoding.items()}
        rows.by_hash.update({nas_bench_101_hash(g): row for row, g in whole.items() if g is not None})
    return rows.by_hash.get(nas_bench_101_hash(graph))


def _cell_row(rows: _Rows, genotype: Genotype) -> int | None:
    edges, primitives = genotype.get("cell", ()), _EDGE_OPS[rows.name]
    ops = {(s, t): op for s, t, op in edges}
    fits = set(genotype) == {"cell"} and len(ops) == len(edges) and set(ops) <= set(_PAIRS)
    if not fits or not set(ops.values()) <= {*primitives, NONE}:
        return None
    return rows.by_encoding.get(tuple(primitives.index(ops.get(pair, NONE)) for pair in _PAIRS))


def _chain_row(rows: _Rows, genotype: Genotype) -> int | None:
    digits: dict[tuple, int] = {((0, 1, op),): i for i, op in enumerate(_CHAINS[rows.name])}
    if set(genotype) != set(rows.dims) or not set(genotype.values()) <= set(digits):
        return None
    return rows.by_encoding.get(tuple(digits[genotype[dim]] for dim in rows.dims))


def _tuples(genotype: Mapping[str, Any]) -> Genotype:
    """Returns kind -> edges, as tuples."""
    return {k: tuple((operator.index(s), operator.index(t), op) for s, t, op in e) for k, e in genotype.items()}


# ---- Architectures as graphs ----------------------------------------------------------------------------------------

_GRAPH_OPS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")
# For each shape of a NAS-Bench-Graph cell, the sources of its four nodes: 0 is the input, i is node i.
_GRAPH_LINKS = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 2), (0, 0, 1, 3)]
_GRAPH_LINKS += [(0, 1, 1, 1), (0, 1, 1, 2), (0, 1, 2, 2), (0, 1, 2, 3)]


def _graph(benchmark: Benchmark, encoding: Iterable[int]) -> Graph:
    """The architecture of a row of a table: `Benchmark.graph`."""
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
        raise ValueError(f"The architectures of {benchmark.name!r} cannot be converted to graphs.")
    return pruned(graph) or Graph(((0, 0), (0, 0)), ("input", "output"))
