"""NAS-Bench-101: its cells' published counts, the parameters in the published table, a supernet by hand."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from small_search import graph

from metaopt import nas
from metaopt.nas import _derivation, _graphs, _named_spaces, _nas_bench_101

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
CONV3, CONV1, POOL = _named_spaces.NAS_BENCH_101_PRIMITIVES
TABLES = Path(os.environ.get("METAOPT_DATA", "absent"))


def as_graph(matrix, ops):
    names = [_named_spaces.NAS_BENCH_101_PRIMITIVES[o] for o in ops]
    return nas.Graph(tuple(map(tuple, matrix.tolist())), ("input", *names, "output"))


def counted(num_vertices, num_hashed=3_000):
    matrices, ops = _nas_bench_101.nas_bench_101_cells(num_vertices)
    assert matrices.shape[1:] == (num_vertices, num_vertices) and ops.shape == (len(matrices), num_vertices - 2)
    # No two have the benchmark's own key.
    some = np.random.default_rng(num_vertices).permutation(len(matrices))[:num_hashed]
    keys = {_graphs.nas_bench_101_hash(as_graph(matrices[i], ops[i])) for i in some}
    assert len(keys) == len(some)
    return len(matrices)


def test_the_counts_up_to_five_vertices():
    assert [counted(size, 300) for size in range(2, 6)] == [1, 6, 84, 2_441]


@pytest.mark.slow
def test_the_count_of_nas_bench_101():
    counts = [1, 6, 84, 2_441, 62_010, 359_082]
    assert [counted(size) for size in range(2, 8)] == counts and sum(counts) == 423_624


# ---- A network of one cell ------------------------------------------------------------------------------------------


def test_no_two_vertices_and_no_two_projections_start_with_the_same_weights():
    cell = graph([(0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (3, 4)], (CONV1, CONV1, CONV1))
    params = _nas_bench_101.graph_op(cell).init(KEY, (5, 4), 4, 1)
    weights = [np.asarray(p["w"]) for p in params.values()]
    assert len(weights) == 6 and {w.shape for w in weights} == {(4, 4)}
    assert len({w.tobytes() for w in weights}) == 6


def test_vertices_share_the_channels_of_the_output_and_are_cut_to_fit():
    # 1 leads to 2 and to the output; 2, 3 and 1 split 8 channels as 3, 3, 2; 3 sees 1's first two.
    cell = graph([(0, 1), (1, 2), (1, 3), (1, 4), (2, 4), (3, 4), (0, 4)], (CONV1, POOL, CONV1))
    op = _nas_bench_101.graph_op(cell)
    x = jax.random.normal(KEY, (4, 5, 3))
    params = jax.jit(lambda: op.init(KEY, (5, 3), 8, 1))()
    assert {name: p["w"].shape for name, p in params.items() if p} == {
        "projection1": (3, 3),
        "vertex1": (3, 3),
        "vertex3": (2, 2),
        "projection4": (3, 8),
    }
    found = jax.jit(lambda p, x: op.apply(p, x, 8, 1))(params, x)
    p, x = jax.tree.map(np.asarray, (params, x))

    def conv(x, w):
        y = x @ w["w"]
        return np.maximum((y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + 1e-5), 0)

    one = conv(conv(x, p["projection1"]), p["vertex1"])
    padded = np.pad(one, ((0, 0), (1, 1), (0, 0)), constant_values=-np.inf)
    two = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    three = conv(one[..., :2], p["vertex3"])
    expected = np.concatenate([one, two, three], -1) + conv(x, p["projection4"])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# ---- A supernet of all cells ----------------------------------------------------------------------------------------


def small_space(num_vertices=4):
    net = nas.nas_bench_101_space(3, channels=2, cells_per_stack=1, num_stacks=1, num_vertices=num_vertices)
    return net, nas.supernet(net, (5, 1), ops=nas.NAS_BENCH_101_OPS)


def test_a_supernet_by_hand_and_its_discrete_networks():
    net, supernet = small_space()
    w = np.random.default_rng(0).uniform(size=(8, 3))
    assert [edge[:2] for edge in net.cells["cell"].edges] == [
        *((0, 1), (1, 2), (0, 3), (2, 3), (3, 4)),
        *((0, 5), (2, 5), (4, 5)),
    ]
    cell = graph([(0, 1), (0, 2), (1, 2), (2, 3), (0, 3)], (CONV1, POOL))
    genotype = _nas_bench_101.graph_genotype(net, cell)
    small = nas.supernet(nas.discrete(net, genotype), (5, 1), ops=nas.NAS_BENCH_101_OPS)
    x = jax.random.normal(KEY, (4, 5, 1))

    @jax.jit
    def run(w):
        params = supernet.init(KEY)
        hot = supernet.apply(params, nas.one_hot(net, genotype), x)
        return (
            params,
            supernet.apply(params, {"cell": w}, x),
            hot,
            small.apply(supernet.inherit(params, genotype), None, x),
        )

    params, mixed, hot, alone = jax.tree.map(np.asarray, run(w))
    np.testing.assert_allclose(hot, alone, atol=1e-12)
    stem, cells = params["layers"]

    def conv(x, w):
        pad = len(w) // 2
        padded = np.pad(x, ((0, 0), (pad, pad), (0, 0)))
        y = sum(padded[:, i : i + 5] @ w[i] for i in range(len(w)))
        return np.maximum((y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + 1e-5), 0)

    def pooled(x):
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=-np.inf)
        return np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])

    by_edge = {}
    for group, names in zip(cells["edges"], groups_of(net), strict=True):
        for j, edge in enumerate(names):
            by_edge[edge] = [leaf[0, j] for leaf in jax.tree.leaves(group)]
    x = conv(np.asarray(x), stem["w"][0])

    def projected(edge):
        return conv(x, by_edge[edge][0][None])

    def vertex(edge, value, row):
        three, one = by_edge[edge]
        return row[0] * conv(value, three) + row[1] * conv(value, one[None]) + row[2] * pooled(value)

    first = vertex((1, 2), w[0, 2] * projected((0, 1)), w[1])
    second = vertex((3, 4), w[2, 2] * projected((0, 3)) + w[3, 2] * first, w[4])
    out = w[5, 2] * projected((0, 5)) + w[6, 2] * first + w[7, 2] * second
    head = params["head"]
    np.testing.assert_allclose(mixed, out.mean(1) @ head["w"] + head["b"], rtol=1e-9)


def groups_of(net):
    """The edges of each scan: alike and next to one another, by target and source."""
    groups, before = [], None
    for edge in sorted(net.cells["cell"].edges, key=lambda e: (e.target, e.source)):
        if edge.ops != before:
            groups.append([])
        groups[-1].append(edge[:2])
        before = edge.ops
    return groups


def test_weights_say_a_cell_and_a_cell_says_weights():
    net, _ = small_space(7)
    assert len(net.cells["cell"].edges) == 26
    matrices, ops = _nas_bench_101.nas_bench_101_cells(5)
    for i in range(0, len(matrices), 40):
        cell = as_graph(matrices[i], ops[i])
        hot = nas.one_hot(net, _nas_bench_101.graph_genotype(net, cell))
        genotype = nas.derive_genotype(net, hot)
        again = _nas_bench_101.genotype_graph(genotype)
        assert nas.nas_bench_101_network(genotype, channels=8)[0] == nas.nas_bench_101_network(cell, channels=8)[0]
        assert _graphs.nas_bench_101_hash(again) == _graphs.nas_bench_101_hash(cell)
    # Weights on everything: the best path is kept, and nine edges at most.
    rng = np.random.default_rng(0)
    for _ in range(20):
        w = rng.uniform(0.01, 1, size=(26, 3))
        found = _derivation.derive_graph(net, {"cell": w})
        assert 1 <= np.sum(found.matrix) <= 9 and _graphs.pruned(found) == found
    # Edges with a probability below one half are dropped, except on the path. So a chain of any length stays a chain.
    for num_vertices in (4, 7):
        small = nas.nas_bench_101_space(num_vertices=num_vertices)
        w = np.zeros((len(small.cells["cell"].edges), 3))
        for e, edge in enumerate(small.cells["cell"].edges):
            on_chain = edge.source % 2 or edge.target == edge.source + 1
            w[e] = [0.01, 0.01, 0.98] if on_chain else [0.49, 0.49, 0.02]
        found = _derivation.derive_graph(small, {"cell": w})
        assert np.sum(found.matrix) == num_vertices - 1 == len(found.ops) - 1
    # The path is that of the largest product: two edges, not six weaker ones, though these sum to more.
    edges = [edge[:2] for edge in net.cells["cell"].edges]
    w = rng.uniform(0.01, 1, size=(26, 3))
    w[[e for e, edge in enumerate(net.cells["cell"].edges) if edge.source % 2 == 0], :2] = 0.0
    chain = [(0, 1), *((2 * v, 2 * v + 1) for v in range(1, 6))]  # input -> 1 -> ... -> 5 -> output
    for direct, weight, size, from_input in [(0.3, 0.5, 5, 2), (0.1, 0.9, 7, 1)]:
        w[:, 2] = 0.0
        w[[edges.index(edge) for edge in chain], 2] = weight
        w[[edges.index((0, 5)), edges.index((6, 11))], 2] = direct  # input -> 3 -> output
        found = _derivation.derive_graph(net, {"cell": w}, max_edges=6)
        assert (len(found.ops), sum(found.matrix[0])) == (size, from_input)


def test_rows_of_the_table_are_cells():
    digits = [1, 0, 0, 0, 0, 0, 1, *[0] * 14, 3, *[0] * 4]
    assert _nas_bench_101.nas_bench_101_graph(digits) == graph([(0, 1), (1, 2)], (POOL,))
