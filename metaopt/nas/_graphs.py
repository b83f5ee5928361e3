"""Cells as expressions and as graphs with ops on vertices, and the rules that decide whether two cells are equal."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from metaopt.nas._genotypes import NONE, SKIP, by_target
from metaopt.nas._named_spaces import NAS_BENCH_101_PRIMITIVES

# ---- Expressions ----------------------------------------------------------------------------------------------------


def canonical(
    edges: Iterable[tuple[int, int, str]], *, num_inputs: int = 1, output: Sequence[int], skip: str | None = SKIP
) -> str:
    """A cell as an expression. Cells that compute the same function of their weights have the same expression.

    A node is the sorted sum of its terms. An edge adds the term op(source), and a skip adds the terms of its source.
    Zeros are left out. (As in the rule of NAS-Bench-201, the expression does not distinguish one op that is used twice
    from two equal ops with separate weights.)

    Args:
      edges: (source, target, op), of one kind of cell of a genotype.
      num_inputs: 1 or 2.
      output: the nodes whose channels are the output, in any order.
      skip: the op that is the identity; None if no op is the identity (because of strides or changed channels).

    Returns:
      Text; "0" if nothing arrives at the output.
    """
    edges = sorted(edges, key=by_target)
    terms: dict[int, list[str]] = {i: [f"x{i}"] for i in range(num_inputs)}
    for node in sorted({t for _, t, _ in edges} | set(output)):
        terms.setdefault(node, [])
        for s, t, op in edges:
            arriving = terms.get(s, [])
            if t == node and arriving and op != NONE:
                terms[node] += arriving if op == skip else [f"{op}({'+'.join(arriving)})"]
        terms[node].sort()
    outputs = sorted("+".join(terms[node]) or "0" for node in output)
    return ",".join(outputs)


# ---- Graphs ---------------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    """A cell of NAS-Bench-101: a graph with ops on vertices.

    Attributes:
      matrix: [V, V] of 0 and 1, strictly upper triangular; the first vertex is the input, the last one the output.
      ops: [V] names, "input" first and "output" last.
    """

    matrix: tuple[tuple[int, ...], ...]
    ops: tuple[str, ...]


def edge_graph(edges: Iterable[tuple[int, int, str]], *, num_inputs: int = 1, output: Sequence[int]) -> Graph:
    """Converts a cell with ops on edges to a graph with ops on vertices, the form that an encoder of cells reads.

    Each op other than "none" becomes a vertex. Its predecessors are the ops into its source, or the input if its source
    is an input. The predecessors of the output are the ops into the output nodes. Nodes are in topological order; a
    different topological order changes only the order of the vertices.

    Args:
      edges: (source, target, op), of one kind of cell of a genotype; `source` < `target`.
      num_inputs: how many of the first nodes are inputs, at least 1; no edge leads to them.
      output: the nodes whose channels are the output.

    Returns:
      A `Graph`. With several inputs, the first vertices are "input 0", "input 1" ...

    Raises:
      ValueError: if an edge leads backwards or to an input.
    """
    edges = list(edges)
    for source, target, _ in edges:
        if not 0 <= source < target or target < num_inputs:
            raise ValueError(f"An edge must go to a later node that is not an input; got {source} -> {target}.")
    kept = sorted((edge for edge in edges if edge[2] != NONE), key=by_target)
    inputs = ["input"] if num_inputs == 1 else [f"input {i}" for i in range(num_inputs)]
    size = num_inputs + len(kept) + 1
    matrix = np.zeros((size, size), int)
    arriving: dict[int, list[int]] = {i: [i] for i in range(num_inputs)}  # node -> its predecessor vertices
    for vertex, (source, target, _) in enumerate(kept, num_inputs):
        matrix[arriving.get(source, []), vertex] = 1
        arriving.setdefault(target, []).append(vertex)
    for node in output:
        matrix[arriving.get(node, []), -1] = 1
    return Graph(tuple(map(tuple, matrix.tolist())), (*inputs, *(op for _, _, op in kept), "output"))


def pruned(graph: Graph) -> Graph | None:
    """A graph without the vertices that are on no path from the input to the output.

    Args:
      graph: any graph.

    Returns:
      A `Graph`; None if no path leads from the input to the output.

    Raises:
      ValueError: if the matrix is not square, not of 0 and 1, or not strictly upper triangular (with zeros on the
        diagonal). Also if there is not one op per vertex.
    """
    matrix = np.asarray(graph.matrix)
    size = len(graph.ops)
    if matrix.shape != (size, size) or (np.tril(matrix) != 0).any() or not np.isin(matrix, (0, 1)).all():
        raise ValueError(
            f"`matrix` must be strictly upper triangular, of 0 and 1 and shape {(size, size)}; got {graph.matrix}."
        )
    reached, reaching = np.zeros(size, bool), np.zeros(size, bool)
    reached[0] = reaching[-1] = True
    for v in range(size):
        reached |= reached[v] * (matrix[v] > 0)
        reaching |= reaching[-1 - v] * (matrix[:, -1 - v] > 0)
    on_path = np.flatnonzero(reached & reaching)
    if not (on_path.size and on_path[0] == 0 and on_path[-1] == size - 1):
        return None
    rows = tuple(tuple(int(x) for x in matrix[v, on_path]) for v in on_path)
    return Graph(rows, tuple(graph.ops[v] for v in on_path))


def pruned_cell(graph: Graph) -> Graph:
    """`pruned(graph)`; raises ValueError if no path leads from the input to the output."""
    pruned_graph = pruned(graph)
    if pruned_graph is None:
        raise ValueError(f"The graph has no path from its input to its output: {graph}.")
    return pruned_graph


def nas_bench_101_hash(graph: Graph) -> str:
    """The hash by which NAS-Bench-101 identifies a cell: equal for isomorphic graphs.

    It takes as many rounds of message passing as there are vertices. A vertex starts with the digest of its degrees and
    its op. In each round it becomes the digest of (its predecessors, sorted | its successors, sorted | itself).

    Args:
      graph: a cell; it is pruned first.

    Returns:
      32 hexadecimal digits, the key in the tables of the benchmark.

    Raises:
      ValueError: if no path joins input and output, if an op is unknown, or as for `pruned`.

    Source: Ying et al., ICML 2019, https://arxiv.org/abs/1902.09635
    """
    pruned_graph = pruned_cell(graph)
    digest = lambda text: hashlib.md5(text.encode()).hexdigest()
    matrix = np.asarray(pruned_graph.matrix)
    labels = [-1, *(NAS_BENCH_101_PRIMITIVES.index(op) for op in pruned_graph.ops[1:-1]), -2]
    degrees = zip(matrix.sum(1).tolist(), matrix.sum(0).tolist(), labels, strict=True)
    hashes = [digest(str(each)) for each in degrees]
    neighbors = [(np.flatnonzero(matrix[:, v]), np.flatnonzero(matrix[v])) for v in range(len(matrix))]
    for _ in hashes:
        sides = [["".join(sorted(hashes[u] for u in side)) for side in both] for both in neighbors]
        hashes = [digest(f"{before}|{behind}|{own}") for (before, behind), own in zip(sides, hashes, strict=True)]
    return digest(str(sorted(hashes)))
