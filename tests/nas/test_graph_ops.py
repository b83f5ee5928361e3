"""Ops on graphs and tokens: against loops over neighbors in NumPy, relabelled nodes, and inside a supernet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import nas
from metaopt.nas import _specs

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# A directed graph with weights; node 4 has no neighbor.
GRAPH = np.array([[0, 1, 0, 2, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0.5, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
X = RNG.normal(size=(2, 5, 3))


def params_of(name):
    params = jax.jit(lambda key: nas.graph_ops(GRAPH)[name].init(key, X.shape[1:], 4, 1))(KEY)
    return {**params, "epsilon": jnp.array(0.3)} if name == "gin" else params


def by_hand(name, p, x, i):
    """The row of node i."""
    near = [j for j in range(5) if GRAPH[i, j]]
    if name == "gcn":
        degree = GRAPH.sum(1) + 1
        rows = [x[i] / degree[i], *(GRAPH[i, j] * x[j] / np.sqrt(degree[i] * degree[j]) for j in near)]
        return sum(rows) @ p["w"]
    if name == "sage":
        mean = sum((GRAPH[i, j] * x[j] for j in near), np.zeros(3)) / max(GRAPH[i].sum(), 1e-9)
        return x[i] @ p["a"] + mean @ p["b"]
    if name == "gin":
        total = 1.3 * x[i] + sum((GRAPH[i, j] * x[j] for j in near), np.zeros(3))
        return np.maximum(total @ p["in"], 0) @ p["out"]
    scores = {j: (x[i] @ p["w"]) @ p["to"] + (x[j] @ p["w"]) @ p["from"] for j in [i, *near]}
    raised = {j: np.exp(s if s > 0 else 0.2 * s) for j, s in scores.items()}
    return sum(e * (x[j] @ p["w"]) for j, e in raised.items()) / sum(raised.values())


@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "gat"])
def test_each_op_is_its_sum_over_neighbors_and_follows_its_nodes(name):
    params = params_of(name)
    apply = jax.jit(lambda graph, x: nas.graph_ops(graph)[name].apply(params, x, 4, 1))
    outputs = np.asarray(apply(GRAPH, X))
    p = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(outputs, [[by_hand(name, p, x, i) for i in range(5)] for x in X], atol=1e-12)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(apply(GRAPH[order][:, order], X[:, order]), outputs[:, order], atol=1e-12)


@pytest.mark.once
def test_a_batch_of_graphs_is_a_vmap_over_their_adjacency():
    cell = nas.complete_cell(2, ("skip_connect", "gcn", "gat"), preprocess=False)
    network = nas.Network({"cell": cell}, (nas.Layer("gin", 4), nas.Layer("cell", 4)), 2)
    alpha = nas.init_alpha(KEY, network, scale=1.0)
    weights = nas.mixing_weights(nas.softmax(), network, alpha, KEY)

    def logits(graph, x):
        supernet = nas.supernet(network, (5, 3), ops={**nas.BLOCKS, **nas.graph_ops(graph)})
        return supernet.apply(supernet.init(KEY), weights, x[None])[0]

    graphs = jnp.stack([jnp.asarray(GRAPH), jnp.asarray(GRAPH.T), jnp.zeros((5, 5))])
    run = jax.jit(jax.vmap(logits, (0, None)))
    many = run(graphs, X[0])
    order = np.array([3, 0, 4, 1, 2])
    reordered = run(graphs[:, order][:, :, order], X[0, order])
    np.testing.assert_allclose(reordered, many, atol=1e-9)  # the mean over nodes has no order
    assert abs(many[:, None] - many[None]).max(-1)[np.triu_indices(3, 1)].min() > 1e-4


def test_outputs_at_every_node():
    network = nas.Network({}, (nas.Layer("gcn", 4),), 2, pooled=False)
    assert _specs.network_from_dict(_specs.network_to_dict(network)) == network != network._replace(pooled=True)
    ops = nas.graph_ops(GRAPH)
    each, mean = (nas.supernet(net, (5, 3), ops=ops) for net in (network, network._replace(pooled=True)))
    params = each.init(KEY)
    params["head"]["b"] = jnp.array([0.5, -0.5])
    outputs = each.apply(params, None, X)
    assert outputs.shape == (2, 5, 2) and abs(np.diff(outputs, axis=1)).max() > 1e-3
    np.testing.assert_allclose(outputs.mean(1), mean.apply(params, None, X), atol=1e-12)


def test_tokens_and_transformers_by_hand():
    """Columns of a table as positions: what attention has no order of, tokens have."""
    tokens, block = nas.BLOCKS["tokens"], nas.BLOCKS["transformer"]
    rows = RNG.normal(size=(3, 4, 1))
    p = tokens.init(KEY, (4, 1), 6, 1)
    y = np.asarray(jax.jit(lambda p, x: tokens.apply(p, x, 6, 1))(p, rows))
    np.testing.assert_allclose(y, rows * np.asarray(p["w"])[:, 0] + np.asarray(p["b"]), atol=1e-12)
    q = jax.jit(lambda key: block.init(key, (4, 6), 6, 1))(KEY)
    assert "enter" not in q
    assert jax.eval_shape(lambda key: block.init(key, (4, 6), 8, 1), KEY)["enter"].shape == (6, 8)
    outputs = np.asarray(jax.jit(lambda q, y: block.apply(q, y, 6, 1))(q, y))
    q = jax.tree.map(np.asarray, q)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def gelu(x):
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2

    query, key, value = (norm(y) @ q["attention"][n] for n in "qkv")
    shares = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(6))
    middle = y + shares / shares.sum(-1, keepdims=True) @ value @ q["attention"]["out"]
    np.testing.assert_allclose(outputs, middle + gelu(norm(middle) @ q["up"]) @ q["down"], atol=1e-9)


def test_a_table_is_a_sequence_of_its_columns():
    ops = nas.BLOCKS
    cell = nas.complete_cell(2, ("skip_connect", "transformer", "attention", "mlp"))
    network = nas.Network({"cell": cell}, (nas.Layer("tokens", 4), nas.Layer("cell", 4)), 3)
    supernet = nas.supernet(network, (6, 1), ops=ops)
    y = jax.eval_shape(lambda x: supernet.apply(supernet.init(KEY), None, x), jnp.zeros((5, 6, 1)))
    assert y.shape == (5, 3)
