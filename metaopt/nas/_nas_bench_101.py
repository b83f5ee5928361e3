"""NAS-Bench-101: an enumeration of its cells, a network of one cell, and a supernet of all cells.

A cell is a graph with an op on every vertex. Each inner vertex applies its op to the sum of its inputs. The input of
the cell enters each vertex through a projection (a 1×1 convolution with normalization and ReLU). The vertices that lead
to the output split the channels of the cell among them, and the output concatenates their channels. If the input leads
to the output too, the projected input is added.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.nas import _ops
from metaopt.nas._graphs import Graph, pruned_cell
from metaopt.nas._named_spaces import NAS_BENCH_101_PRIMITIVES
from metaopt.nas._specs import Cell, Edge, Genotype, Layer, Network

MAX_EDGES = 9  # of a cell with at most 7 vertices
_PROJECTION = "conv1x1-bn-relu"


# ---- All cells ------------------------------------------------------------------------------------------------------


def nas_bench_101_cells(num_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    """All cells with `num_vertices` vertices, one per isomorphism class, as NAS-Bench-101 has them.

    Every vertex lies on a path from the input to the output, and there are at most 9 edges. For 2 to 7 vertices there
    are 1, 6, 84, 2,441, 62,010 and 359,082 cells: 423,624 in all. Isomorphism is decided by the rule of the benchmark
    (rounds of messages), with words of 64 bits instead of digests. 7 vertices take half a minute and two gigabytes.

    Args:
      num_vertices: 2 to 7, including input and output.

    Returns:
      Matrices [M, V, V] of 0 and 1, and ops [M, V − 2] as indices into `NAS_BENCH_101_PRIMITIVES`.

    Raises:
      ValueError: if `num_vertices` is out of range.
    """
    if not 2 <= num_vertices <= 7:
        raise ValueError(f"A cell of NAS-Bench-101 has 2 to 7 vertices; got {num_vertices}.")
    matrices = _full_matrices(num_vertices)
    blank = np.zeros(matrices.shape[:2], np.int64)
    blank[:, 0], blank[:, -1] = 8, 9
    matrices = matrices[np.unique(_class_words(matrices, blank), return_index=True)[1]]  # labels are ignored
    inner = num_vertices - 2
    ops = np.array(list(itertools.product(range(3), repeat=inner)), np.int64).reshape(3**inner, inner)
    ends = (np.full((len(ops), 1), 8), np.full((len(ops), 1), 9))
    labels = np.concatenate([ends[0], ops, ends[1]], 1)
    # One matrix per class of unlabeled graphs, with all possible labels, covers every class of labeled graphs.
    words = np.concatenate([_class_words(np.repeat(m[None], len(labels), 0), labels) for m in matrices])
    first = np.sort(np.unique(words, return_index=True)[1])
    return matrices[first // len(labels)], ops[first % len(labels)].astype(np.int8)


def _full_matrices(size: int) -> np.ndarray:
    """Upper triangular matrices with at most nine edges and no dead ends.

    Every vertex except the input has a predecessor, and every vertex except the output has a successor.
    """
    pairs = [(s, t) for t in range(size) for s in range(t)]
    chunks = []
    for chunk in np.array_split(np.arange(2 ** len(pairs)), max(1, 2 ** len(pairs) >> 16)):
        bits = chunk[:, None] >> np.arange(len(pairs)) & 1
        bits = bits[bits.sum(1) <= MAX_EDGES]
        matrices = np.zeros((len(bits), size, size), np.int8)
        for i, pair in enumerate(pairs):
            matrices[:, *pair] = bits[:, i]
        into, out_of = np.any(matrices, axis=1), np.any(matrices, axis=2)
        chunks.append(matrices[np.all(into[:, 1:], axis=1) & np.all(out_of[:, :-1], axis=1)])
    return np.concatenate(chunks)


def _class_words(matrices: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[M] words, equal for isomorphic graphs: the rule of `nas_bench_101_hash` with sums of mixed words."""

    def mix(*parts):
        x = np.zeros_like(parts[0], np.uint64)
        for part in parts:
            x = (x ^ part.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            x ^= x >> np.uint64(29)
            x = x * np.uint64(0xBF58476D1CE4E5B9)
            x ^= x >> np.uint64(32)
        return x

    m = matrices.astype(np.uint64)
    state = mix(m.sum(2), m.sum(1), labels)
    for _ in range(m.shape[1]):
        spread = mix(state, np.full_like(state, 7))
        before, behind = (m.transpose(0, 2, 1) @ spread[..., None])[..., 0], (m @ spread[..., None])[..., 0]
        state = mix(before, behind, state)
    return mix(state, np.full_like(state, 11)).sum(1)


def nas_bench_101_graph(encoding: Sequence[int] | np.ndarray) -> Graph:
    """The cell that a row of `read_nas_bench_101` encodes.

    Args:
      encoding: 21 entries above the diagonal, then five ops (0: no op).

    Returns:
      A `Graph`, not pruned.

    Raises:
      ValueError: if the digits do not describe a cell.
    """
    digits = [int(x) for x in encoding]
    ops = [x for x in digits[21:] if x]
    has_valid_digits = len(digits) == 26 and {*digits[:21]} <= {0, 1} and {*ops} <= {1, 2, 3}
    if not has_valid_digits or digits[21:] != [*ops, *[0] * (5 - len(ops))]:
        raise ValueError(
            f"A cell of NAS-Bench-101 is 21 bits and up to five ops from 1 to 3, then zeros; got {digits}."
        )
    matrix, size = np.zeros((7, 7), int), len(ops) + 2
    matrix[np.triu_indices(7, 1)] = digits[:21]
    if matrix[size:].any() or matrix[:, size:].any():
        raise ValueError(f"The cell has {size} vertices, but its matrix has edges of further vertices; got {digits}.")
    rows = tuple(tuple(int(x) for x in row) for row in matrix[:size, :size])
    return Graph(rows, ("input", *(NAS_BENCH_101_PRIMITIVES[op - 1] for op in ops), "output"))


# ---- A network of one cell ------------------------------------------------------------------------------------------


def nas_bench_101_network(
    cell: Graph | Genotype,
    num_outputs: int = 10,
    *,
    channels: int = 128,
    cells_per_stack: int = 3,
    num_stacks: int = 3,
) -> tuple[Network, dict[str, _ops.Op]]:
    """The network that NAS-Bench-101 trains for a cell: stacks of the cell.

    Pooling between stacks halves the positions, and the first cell of the next stack doubles the channels. The network
    is as published, except that normalization has no scale and shift. In training, normalization is by the batch. To
    predict, normalize by training rows (`nas.trained_network`).

    Args:
      cell: a cell as a graph, or as a genotype of `nas_bench_101_space`; it is pruned first.
      num_outputs: number of classes.
      channels: channels of the first stack.
      cells_per_stack: number of cells per stack.
      num_stacks: number of stacks.

    Returns:
      A `Network` without mixing weights, and the ops for `supernet`. The cell is one of these ops.

    Raises:
      ValueError: if no path joins input and output, or if an op is unknown.
      ValueError: at build time, if more vertices lead to the output than there are channels.

    Source: Ying et al., ICML 2019, https://arxiv.org/abs/1902.09635

    >>> from metaopt import nas
    >>> cell = nas.Graph(
    ...     ((0, 1, 1), (0, 0, 1), (0, 0, 0)), ("input", "conv3x3-bn-relu", "output")
    ... )
    >>> network, ops = nas.nas_bench_101_network(cell, channels=16, num_stacks=1)
    >>> [layer.name for layer in network.layers]
    ['conv3x3-bn-relu', 'graph', 'graph', 'graph']
    """
    graph = cell if isinstance(cell, Graph) else genotype_graph(cell)
    layers = [Layer("conv3x3-bn-relu", channels)]
    for stack in range(num_stacks):
        if stack:
            layers.append(Layer("maxpool2x2", channels * 2 ** (stack - 1), 2))
        layers += [Layer("graph", channels * 2**stack)] * cells_per_stack
    return Network({}, tuple(layers), num_outputs), {**_ops.NAS_BENCH_101_OPS, "graph": graph_op(graph)}


def graph_op(graph: Graph) -> _ops.Op:
    """A cell of NAS-Bench-101 as one op.

    Args:
      graph: a cell; it is pruned first.

    Returns:
      An `Op` of stride 1.

    Raises:
      ValueError: if no path joins input and output, if an op is unknown, or as for `pruned`.
    """
    pruned_graph = pruned_cell(graph)
    if not set(pruned_graph.ops[1:-1]) <= set(NAS_BENCH_101_PRIMITIVES):
        raise ValueError(f"The ops of NAS-Bench-101 are {NAS_BENCH_101_PRIMITIVES}; got {pruned_graph.ops}.")
    m, last = np.asarray(pruned_graph.matrix), len(pruned_graph.ops) - 1
    ops = _ops.NAS_BENCH_101_OPS

    def init(key, in_shape, channels, stride):
        widths, params = _vertex_channels(m, channels), {}
        for v in range(1, last + 1):
            if m[0, v]:
                projection_key = jax.random.fold_in(key, v)
                params[f"projection{v}"] = ops[_PROJECTION].init(projection_key, in_shape, widths[v], 1)
            if v < last:
                shape = (*in_shape[:-1], widths[v])
                vertex_key = jax.random.fold_in(key, last + v)
                params[f"vertex{v}"] = ops[pruned_graph.ops[v]].init(vertex_key, shape, widths[v], 1)
        return params

    def apply(params, x, channels, stride):
        widths, values = _vertex_channels(m, channels), {}
        projected = lambda v: ops[_PROJECTION].apply(params[f"projection{v}"], x, widths[v], 1)
        for v in range(1, last):
            terms = [values[u][..., : widths[v]] for u in range(1, v) if m[u, v]]
            terms += [projected(v)] if m[0, v] else []
            op = ops[pruned_graph.ops[v]]
            values[v] = op.apply(params[f"vertex{v}"], sum(terms[1:], terms[0]), widths[v], 1)
        out = [values[v] for v in range(1, last) if m[v, last]]
        if not out:
            return projected(last)
        y = jnp.concatenate(out, -1)
        return y + projected(last) if m[0, last] else y

    return _ops.Op(init, apply)


def _vertex_channels(m: np.ndarray, channels: int) -> list[int]:
    """The number of channels of every vertex.

    The vertices that lead to the output split its channels; the first ones get one more if there is a remainder. Every
    other vertex has the largest number of channels among its successors.
    """
    last = len(m) - 1
    widths = [0] * last + [channels]
    out = [v for v in range(1, last) if m[v, last]]
    if len(out) > channels:
        raise ValueError(
            f"{len(out)} vertices lead to the output, but there are only {channels} channels to split. Use more "
            "channels."
        )
    for i, v in enumerate(out):
        widths[v] = channels // len(out) + (i < channels % len(out))
    for v in range(last - 1, 0, -1):
        if not m[v, last]:
            widths[v] = max(widths[t] for t in range(v + 1, last) if m[v, t])
    return widths


# ---- A supernet of all cells ----------------------------------------------------------------------------------------


def nas_bench_101_space(
    num_outputs: int = 10,
    *,
    channels: int = 128,
    cells_per_stack: int = 3,
    num_stacks: int = 3,
    num_vertices: int = 7,
) -> Network:
    """The space of NAS-Bench-101 as a supernet, with mixing weights for the op of every vertex and for every edge.

    A vertex v is two nodes: 2v − 1 is the sum of its inputs, and 2v is the result of its op. So a cell has three kinds
    of edges, each with three candidates:

    - from a vertex: ("none", "none", "skip_connect");
    - from the input of the cell: ("none", "none", "conv1x1-bn-relu"), its projection;
    - the op of a vertex: `NAS_BENCH_101_PRIMITIVES`.

    ("none" occurs twice because all edges must have the same number of candidates.) The supernet differs from the
    published networks in two ways:

    - In a published network, the vertices that lead to the output split the channels of the cell. In the supernet, each
      vertex has all channels of the cell, and the output is their sum, since the weights of a supernet have one shape.
    - In a published network, the first cell of a stack doubles the channels. In the supernet, a layer between stacks
      does so.

    Args:
      num_outputs: number of classes.
      channels: channels of the first stack; the benchmark has 128.
      cells_per_stack: number of cells per stack; the benchmark has 3.
      num_stacks: number of stacks; the benchmark has 3.
      num_vertices: largest number of vertices of a cell, at least 3; the benchmark has 7.

    Returns:
      A `Network` over `NAS_BENCH_101_OPS`, with the single kind "cell": 26 rows of mixing weights for 7 vertices.
      `derive_genotype` reads a cell from them, and `nas_bench_101_network` builds its published network.

    Sources: Ying et al., ICML 2019, https://arxiv.org/abs/1902.09635; Zela et al., ICLR 2020,
    https://arxiv.org/abs/2001.10422, for one-shot search in it
    """
    last = num_vertices - 1
    edges = []
    for v in range(1, num_vertices):
        for u in range(v):
            op = "skip_connect" if u else _PROJECTION
            edges.append(Edge(2 * u, 2 * v - 1, ("none", "none", op)))
        if v < last:
            edges.append(Edge(2 * v - 1, 2 * v, NAS_BENCH_101_PRIMITIVES))
    cell = Cell(1, tuple(edges), (2 * last - 1,), preprocess=False)
    layers = [Layer("conv3x3-bn-relu", channels)]
    for stack in range(num_stacks):
        if stack:
            layers.append(Layer("downsample", channels * 2**stack, 2))
        layers += [Layer("cell", channels * 2**stack)] * cells_per_stack
    return Network({"cell": cell}, tuple(layers), num_outputs, keep="graph")


def graph_genotype(network: Network, graph: Graph) -> Genotype:
    """Converts a cell of NAS-Bench-101 to a genotype of `nas_bench_101_space`, for `discrete`, `one_hot` and `inherit`.

    Args:
      network: a network of `nas_bench_101_space`.
      graph: a cell with at most as many vertices as the space; it is pruned first.

    Returns:
      A `Genotype`.

    Raises:
      ValueError: if no path joins input and output, or if there are too many vertices.
    """
    pruned_graph, last = pruned_cell(graph), last_vertex(network)
    size = len(pruned_graph.ops)
    if size > last + 1:
        raise ValueError(f"The space has {last + 1} vertices; the graph has {size}.")
    vertex = [*range(size - 1), last]  # the output is the last vertex of the space
    edges = []
    for t in range(1, size):
        for s in range(t):
            if pruned_graph.matrix[s][t]:
                edges.append((2 * vertex[s], 2 * vertex[t] - 1, "skip_connect" if s else _PROJECTION))
        if t < size - 1:
            edges.append((2 * t - 1, 2 * t, pruned_graph.ops[t]))
    return {"cell": tuple(edges)}


def genotype_graph(genotype: Genotype) -> Graph:
    """Converts a genotype of `nas_bench_101_space` to a cell of NAS-Bench-101: the inverse of `graph_genotype`.

    Args:
      genotype: {"cell": edges} between the nodes of such a space. Node 2v − 1 is the sum of the inputs of vertex v, and
        node 2v is the result of its op. The last node leads to the output.

    Returns:
      A pruned `Graph`.

    Raises:
      ValueError: if the genotype is of another space, or if no path joins input and output.

    >>> from metaopt import nas
    >>> graph = nas.Graph(
    ...     ((0, 1, 1), (0, 0, 1), (0, 0, 0)), ("input", "maxpool3x3", "output")
    ... )
    >>> genotype_graph(graph_genotype(nas.nas_bench_101_space(), graph)) == graph
    True
    """
    edges = [(int(s), int(t), op) for s, t, op in genotype.get("cell", ())]
    ops = {s: op for s, t, op in edges if s % 2 and t == s + 1 and op in NAS_BENCH_101_PRIMITIVES}
    links = [(s, t) for s, t, op in edges if not s % 2 and t % 2 and op == ("skip_connect" if s else _PROJECTION)]
    no_duplicates = len({edge[:2] for edge in edges}) == len(edges)
    if set(genotype) != {"cell"} or not no_duplicates or len(ops) + len(links) < len(edges):
        raise ValueError(
            'A genotype of NAS-Bench-101 has only the kind "cell". The ops of its vertices are on edges from 2v − 1 to '
            f"2v, and its links from 2u to 2v − 1, as `graph_genotype` writes them; got {genotype!r}."
        )
    end = max((t for _, t in links), default=1)
    # A vertex without an op leads nowhere, so it is left out.
    vertices = [0, *sorted((node + 1) // 2 for node in ops if node < end), (end + 1) // 2]
    place = {v: i for i, v in enumerate(vertices)}
    matrix = np.zeros((len(vertices),) * 2, int)
    for s, t in links:
        if s // 2 in place and (t + 1) // 2 in place:
            matrix[place[s // 2], place[(t + 1) // 2]] = 1
    named = ("input", *(ops[2 * v - 1] for v in vertices[1:-1]), "output")
    return pruned_cell(Graph(tuple(tuple(int(x) for x in row) for row in matrix), named))


def last_vertex(network: Network) -> int:
    cell = network.cells.get("cell")
    if cell is None or set(network.cells) != {"cell"} or not any(edge.ops[-1] == _PROJECTION for edge in cell.edges):
        raise ValueError("`network` must be one that `nas_bench_101_space` made.")
    return (cell.output[0] + 1) // 2
