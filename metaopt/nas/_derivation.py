"""Derives the discrete architecture from mixing weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from metaopt import _checks
from metaopt.nas._genotypes import NONE, check_finite, edges_kept
from metaopt.nas._graphs import Graph, pruned_cell
from metaopt.nas._nas_bench_101 import MAX_EDGES, graph_genotype, last_vertex
from metaopt.nas._specs import Cell, Genotype, Network, Space


def derive_genotype(network: Space, weights: Mapping[str, np.ndarray], *, keep: int | None | str = "space") -> Genotype:
    """Reads a genotype from mixing weights: the strongest op of each edge, for the strongest edges into each node.

        strength(e) = max_{o ≠ none} w[e, o],    op(e) = argmax_{o ≠ none} w[e, o]

    Pass weights, not α. The relaxation normalizes over all ops, including "none". Without it, other edges could be the
    strongest. If a number is added to all entries of α on one edge, the softmax stays the same, but the largest entry
    changes.

    Args:
      network: the spec of a supernet.
      weights: kind -> [edges, ops], the weights that the relaxation makes of α; not negative.
      keep: number of edges into each node. The strongest edges are kept; of equally strong edges, the first ones. 2 is
        the rule of DARTS. None keeps every edge whose largest weight is not the weight of "none". "space" uses the rule
        of the network, and is the only value for the space of NAS-Bench-101. The rule of that space has two steps.
        First it keeps the path from the input to the output with the largest product of weights. Then it keeps the
        strongest of the other edges, at most nine edges in all.

    Returns:
      A `Genotype`, its edges in the order of the network.

    Raises:
      ValueError: if the weights do not have the shape of the network, or if some are negative, NaN or infinite.

    >>> import numpy as np
    >>> from metaopt import nas
    >>> cell = nas.complete_cell(1, ("none", "skip_connect", "mlp"))
    >>> network = nas.Network(
    ...     {"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2
    ... )
    >>> nas.derive_genotype(network, {"cell": np.array([[0.5, 0.2, 0.3]])})
    {'cell': ((0, 1, 'mlp'),)}
    >>> nas.derive_genotype(network, {"cell": np.array([[0.5, 0.2, 0.3]])}, keep=None)
    {'cell': ()}
    """
    if isinstance(network, Network) and network.keep == "graph" and keep == "space":
        return graph_genotype(network, derive_graph(network, weights))
    keep = edges_kept(network, keep)
    genotype: Genotype = {}
    for kind, cell in network.cells.items():
        w = _checked_weights(kind, cell, weights)
        is_op = np.array([[op != NONE for op in edge.ops] for edge in cell.edges])
        if keep is None:
            best = w.argmax(1)
            kept = [e for e, edge in enumerate(cell.edges) if edge.ops[best[e]] != NONE]
        else:
            candidate_weights = np.where(is_op, w, -np.inf)
            best, strength = candidate_weights.argmax(1), candidate_weights.max(1)
            kept = []
            for node in sorted({edge.target for edge in cell.edges}):
                edges_into_node = [e for e, edge in enumerate(cell.edges) if edge.target == node and is_op[e].any()]
                kept += sorted(edges_into_node, key=lambda e: -strength[e])[:keep]
        genotype[kind] = tuple((*cell.edges[e][:2], cell.edges[e].ops[best[e]]) for e in sorted(kept))
    return genotype


def derive_graph(network: Network, weights: Mapping[str, Any], *, max_edges: int = MAX_EDGES) -> Graph:
    """The cell of mixing weights: the strongest op of every vertex, and the strongest edges.

    It first takes the path from the input to the output with the largest product of weights. Then it adds the strongest
    of the other edges, up to `max_edges` edges in all, if their weight exceeds the weight of each "none". Finally it
    removes the vertices that are on no path from the input to the output.

    Args:
      network: a network of `nas_bench_101_space`.
      weights: {"cell": [edges, 3]}, not negative.
      max_edges: at least the number of vertices minus one; the benchmark has 9.

    Returns:
      A pruned `Graph`, which is a cell of the benchmark.

    Raises:
      ValueError: if the weights have another shape, or if some are negative, NaN or infinite.
      ValueError: if `max_edges` is too small.
    """
    last, cell = last_vertex(network), network.cells["cell"]
    _checks.check_integer("max_edges", max_edges, last)
    strength, likely, ops = {}, set(), ["input", *[""] * (last - 1), "output"]
    for edge, row in zip(cell.edges, _checked_weights("cell", cell, weights), strict=True):
        if edge.source % 2:
            ops[edge.target // 2] = edge.ops[int(row.argmax())]
        else:
            vertices = edge.source // 2, (edge.target + 1) // 2
            strength[vertices] = row[2]
            likely |= {vertices} if row.argmax() == 2 else set()
    best = {0: (1.0, [])}  # vertex -> the largest product of a path to it, and its edges
    for v in range(1, last + 1):
        best[v] = max(((best[u][0] * strength[u, v], [*best[u][1], (u, v)]) for u in range(v)), key=lambda b: b[0])
    path = best[last][1]
    others = sorted(likely - {*path}, key=lambda edge: (-strength[edge], edge))
    kept = {*path, *others[: max_edges - len(path)]}
    matrix = tuple(tuple(int((s, t) in kept) for t in range(last + 1)) for s in range(last + 1))
    return pruned_cell(Graph(matrix, tuple(ops)))  # does not raise: the path joins input and output


def _checked_weights(kind: str, cell: Cell, weights: Mapping[str, Any]) -> np.ndarray:
    """The weights [edges, ops] of a kind of cell. Raises ValueError unless they have this shape and are in [0, ∞)."""
    w = np.asarray(weights[kind], np.float64)
    shape = len(cell.edges), len(cell.edges[0].ops)
    if w.shape != shape or (w < 0).any():
        raise ValueError(
            f"The weights of {kind!r} must have the shape {shape}, a row for each edge, and must not be negative; got "
            f"the shape {w.shape}. Pass the weights of the relaxation instead of α, for instance "
            "`jax.nn.softmax(alpha)`."
        )
    check_finite(kind, w)
    return w
