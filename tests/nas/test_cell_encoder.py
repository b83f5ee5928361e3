"""The encoder of cells: changes that it ignores, changes that it sees, and its loss, compared with NumPy."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from metaopt import nas
from metaopt.nas.search._cell_encoder import cell_encoder, cell_ranking_loss
from metaopt.nas.search._cell_encoder import cells as cells_of

KEY = jax.random.key(0)
OPS = ("input", "a", "b", "output")
DIAMOND = nas.Graph(
    ((0, 1, 1, 0, 1), (0, 0, 0, 1, 0), (0, 0, 0, 1, 1), (0, 0, 0, 0, 1), (0,) * 5), ("input", *"aba", "output")
)
ENCODER = cell_encoder(len(OPS), 6, num_features=2, width=8, num_hidden=3)


def moved(params, scale=0.3):
    """Away from the start, where tasks are alike and biases are zero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(
        [x + scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


PARAMS = moved(ENCODER.init(KEY))
ENCODE, LOSS = jax.jit(ENCODER.encode), jax.jit(cell_ranking_loss)


def encoded(*graphs, num_vertices=6):
    return ENCODE(PARAMS, cells_of(graphs, OPS, num_vertices=num_vertices))


def renamed(graph, order):
    matrix = np.asarray(graph.matrix)[np.ix_(order, order)]
    return nas.Graph(tuple(map(tuple, matrix.tolist())), tuple(graph.ops[v] for v in order))


def test_arrays_are_the_graph_its_paths_and_its_depths():
    cells = cells_of([DIAMOND, nas.Graph(((0, 1), (0, 0)), ("input", "output"))], OPS)
    np.testing.assert_array_equal(cells.ops, [[0, 1, 2, 1, 3], [0, 3, 0, 0, 0]])
    np.testing.assert_array_equal(cells.edges[0], np.array(DIAMOND.matrix, bool))
    np.testing.assert_array_equal(cells.depth, [[0, 1, 1, 2, 3], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(cells.height, [[3, 2, 2, 1, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(cells.mask, [[True] * 5, [True] * 2 + [False] * 3])
    paths = np.triu(np.ones((5, 5), bool), 1)
    paths[1, 2] = False
    np.testing.assert_array_equal(cells.paths[0], paths)


@pytest.mark.once
def test_order_of_vertices_and_padding_change_nothing():
    expected = encoded(DIAMOND)
    assert np.abs(expected).max() > 0.1
    for order in itertools.permutations(range(5)):
        if order[0] == 2:  # a fifth of all orders
            chex.assert_trees_all_close(encoded(renamed(DIAMOND, order)), expected, rtol=1e-12)
    cells = cells_of([DIAMOND, DIAMOND], OPS, num_vertices=6)
    dirty = cells._replace(ops=cells.ops.at[:, 5].set(2), depth=cells.depth.at[:, 5].set(3))
    chex.assert_trees_all_close(ENCODE(PARAMS, dirty), jnp.tile(expected, (2, 1)), rtol=1e-12)


@pytest.mark.once
def test_ops_edges_paths_and_counts_are_told_apart():
    graph = lambda edges, ops: nas.Graph(
        tuple(tuple(int((s, t) in edges) for t in range(len(ops))) for s in range(len(ops))), ops
    )
    same = {(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)}
    others = [
        graph(same, ("input", *"abb", "output")),
        graph(same, ("input", *"aab", "output")),  # another op
        graph(same | {(0, 3)}, ("input", *"abb", "output")),  # another edge, and no other path nor depth
        graph(same | {(0, 4)}, ("input", *"abb", "output")),
        graph({(0, 1), (1, 2), (2, 3)}, ("input", *"ab", "output")),
        graph({(0, 1), (1, 2), (2, 3)}, ("input", *"ba", "output")),  # the order along a path
        graph({(0, 1), (1, 2)}, ("input", "a", "output")),
        graph({(0, 1), (0, 2), (1, 3), (2, 3)}, ("input", *"aa", "output")),  # two alike where there was one
    ]
    z = np.asarray(encoded(*others))
    distance = np.abs(z[:, None] - z[None]).max(-1) + np.eye(len(z))
    assert distance.min() > 1e-3


@pytest.mark.once
def test_the_encoder_by_hand():
    encoder = cell_encoder(len(OPS), 5, width=4, num_layers=2)
    params = jax.tree.map(np.asarray, moved(encoder.init(KEY)))
    matrix = np.array(DIAMOND.matrix, bool)
    paths = matrix | (matrix @ matrix) | (matrix @ matrix @ matrix)
    tokens, depth, height = params["tokens"], [0, 1, 1, 2, 3], [3, 2, 2, 1, 0]
    x = np.stack(
        [
            tokens["op"][OPS.index(op)] + tokens["depth"][d] + tokens["height"][h]
            for op, d, h in zip(DIAMOND.ops, depth, height, strict=True)
        ]
    )
    norm = lambda x: (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    for i in range(2):
        layer = {name: w[i] for name, w in params["layers"].items()}
        q, k, v = ((norm(x) @ layer["qkv"])[:, i::3] for i in range(3))  # a number each for a head
        mixed = np.zeros_like(x)
        for head, reachable in enumerate([matrix.T, paths.T, matrix, paths]):
            for u in range(5):
                attended = [w for w in range(5) if reachable[u, w] or w == u]
                weights = np.exp(q[u, head] * k[attended, head])
                mixed[u, head] = weights @ v[attended, head] / weights.sum()
        x = x + mixed @ layer["mix"]
        x = x + np.maximum(norm(x) @ layer["up"], 0) @ layer["down"]
    expected = np.maximum(x.sum(0) / np.sqrt(5) @ params["out"] + params["bias"], 0)
    outputs = jax.jit(encoder.encode)(params, cells_of([DIAMOND], OPS))[0]
    assert expected.max() > 0.01
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)


@pytest.mark.once
def test_one_ranking_for_all_tasks_at_the_start_and_the_bilinear_form_afterwards():
    cells = cells_of([DIAMOND, renamed(DIAMOND, (0, 1, 2, 3, 4))._replace(ops=("input", *"bbb", "output"))], OPS)
    small = cell_encoder(len(OPS), 5, num_features=2, width=8)
    start = small.init(KEY)
    a, b = (small.score(start, cells, jnp.array(f)) for f in ([0.0, 0.0], [3.0, -1.0]))
    chex.assert_trees_all_close(a, b)
    params, features = moved(start), np.array([3.0, -1.0])
    head = jax.tree.map(np.asarray, params["head"])
    c = head["center"] + features @ head["linear"] + np.tanh(features @ head["hidden"] + head["bias"]) @ head["out"]
    expected = np.asarray(small.encode(params, cells)) @ c
    np.testing.assert_allclose(small.score(params, cells, jnp.asarray(features)), expected, rtol=1e-12)


@pytest.mark.once
def test_gradients():
    cells = cells_of([DIAMOND, renamed(DIAMOND, (0, 2, 1, 3, 4))._replace(ops=("input", *"bba", "output"))], OPS)
    tiny = cell_encoder(len(OPS), 5, num_features=1, width=4, num_layers=1, num_hidden=1)
    outcomes = jnp.array([0.3, 0.1])
    loss = lambda p: cell_ranking_loss(tiny.score(p, cells, jnp.array([0.7])), outcomes)
    check_grads(jax.jit(loss), (moved(tiny.init(KEY)),), order=1, modes=["rev"], rtol=1e-5)


@pytest.mark.once
def test_the_ranking_loss_is_its_sum_over_pairs():
    from scipy.stats import norm, rankdata

    rng = np.random.default_rng(0)
    scores, outcomes = rng.normal(size=7), np.array([0.3, 5.0, -2.0, np.nan, 0.3, 1.0, 0.9])
    is_known = np.isfinite(outcomes)
    q = np.zeros(7)
    q[is_known] = norm.ppf((is_known.sum() + 0.5 - rankdata(outcomes[is_known])) / is_known.sum())
    pairs = [(i, j) for i in range(7) for j in range(7) if is_known[i] and is_known[j] and outcomes[i] < outcomes[j]]
    weights = [abs(q[i] - q[j]) for i, j in pairs]
    expected = np.average([np.log1p(np.exp(scores[j] - scores[i])) for i, j in pairs], weights=weights)
    loss = LOSS(jnp.asarray(scores), jnp.asarray(outcomes))
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    # Units and offsets of outcomes mean nothing; a score for a NaN, neither.
    other = LOSS(jnp.asarray(scores).at[3].set(99.0), 7 + 3 * jnp.asarray(outcomes))
    np.testing.assert_allclose(other, expected, rtol=1e-10)
    np.testing.assert_allclose(LOSS(jnp.zeros(7), jnp.asarray(outcomes)), np.log(2))
    single = jax.jit(jax.value_and_grad(cell_ranking_loss))(jnp.asarray(scores), jnp.full(7, np.nan).at[0].set(1.0))
    chex.assert_trees_all_equal(single, (jnp.array(0.0), jnp.zeros(7)))
