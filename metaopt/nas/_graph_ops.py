"""Ops on graphs.

The nodes of a graph are positions. x is [N, nodes, C], N signals on one graph; N is 1 if the nodes are the rows of a
data set. The ops hold the adjacency of the graph, so each graph needs its own set of ops. Their parameters do not
depend on the adjacency, so weights can move from one graph to another. Adjacency may be traced: a batch of graphs is a
`vmap` over it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from metaopt.nas._ops import Op, uniform


def graph_ops(adjacency: Any) -> dict[str, Op]:
    """Makes a set of ops for cells on one graph.

    Use it together with `BLOCKS`: `{**nas.BLOCKS, **nas.graph_ops(adjacency)}`.

    A[i, j] is the weight of the edge from node j to node i, and Ã = A + I. The row sums of A and Ã are d and d̃. D̃ is
    diag(d̃), and x_i is the row of node i:

        gcn:   D̃^(−1/2) Ã D̃^(−1/2) x W                                    (Kipf & Welling)
        sage:  x W₁ + (A x / d) W₂, the mean over neighbors                (Hamilton, Ying & Leskovec)
        gin:   relu(((1 + ε) x + A x) W₁) W₂                               (Xu et al.)
        gat:   Σ_j softmax_j(LeakyReLU(a·x_i W + b·x_j W)) x_j W over Ã_ij ≠ 0, one head (Veličković et al.)

    The ops have no normalization, and no nonlinearity before or after; add a layer "norm_relu" for both. "mlp",
    "linear" and "skip_connect" of `BLOCKS` act on each node separately. "attention" acts on all nodes, whether edges
    join them or not.

    Args:
      adjacency: [nodes, nodes], not negative, without self-loops (an op adds them if it needs them). Make it symmetric
        for an undirected graph. It is dense, so memory grows as nodes².

    Returns:
      Name -> `Op`.

    Raises:
      ValueError: at build time, if an op has a stride other than 1.
      TypeError: (by JAX) at build time, if an input has another number of nodes.

    Sources: https://arxiv.org/abs/1609.02907, https://arxiv.org/abs/1706.02216, https://arxiv.org/abs/1810.00826,
    https://arxiv.org/abs/1710.10903

    >>> import jax.numpy as jnp
    >>> from metaopt import nas
    >>> path = jnp.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> ops = {**nas.BLOCKS, **nas.graph_ops(path)}
    >>> cell = nas.complete_cell(2, ("skip_connect", "gcn", "gat"))
    >>> net = nas.Network(
    ...     {"cell": cell}, (nas.Layer("gcn", 4), nas.Layer("cell", 4)), num_outputs=2
    ... )
    >>> nas.supernet(net, (3, 5), ops=ops).in_shape
    (3, 5)
    """
    adjacency = jnp.asarray(adjacency)
    num = adjacency.shape[0]
    if adjacency.shape != (num, num):
        raise ValueError(f"`adjacency` must be square; got shape {adjacency.shape}.")
    adjacency = adjacency.astype(jnp.zeros(0).dtype)
    loops = adjacency + jnp.eye(num)
    degree = jnp.maximum(adjacency.sum(1, keepdims=True), 1e-12)  # so that the mean over no neighbors is 0
    root = jax.lax.rsqrt(loops.sum(1, keepdims=True))

    def op(init, apply):
        return Op(
            lambda key, in_shape, channels, stride: init(key, in_shape[-1], channels),
            lambda params, x, channels, stride: apply(params, x),
        )

    def weights(names: str):
        """One matrix per name."""
        return lambda key, c, d: {n: uniform(key, (c, d), c, number=i) for i, n in enumerate(names)}

    def gin_init(key, c, d):
        return {"in": uniform(key, (c, d), c), "out": uniform(key, (d, d), d, number=1), "epsilon": jnp.zeros(())}

    def gat_init(key, c, d):
        ends = {"to": uniform(key, (d,), d, number=1), "from": uniform(key, (d,), d, number=2)}
        return {"w": uniform(key, (c, d), c), **ends}

    def gat_apply(p, x):
        y = x @ p["w"]
        scores = jax.nn.leaky_relu((y @ p["to"])[:, :, None] + (y @ p["from"])[:, None, :], 0.2)
        share = jax.nn.softmax(jnp.where(loops[None] != 0, scores, -jnp.inf), -1)
        return share @ y

    return {
        "gcn": op(weights("w"), lambda p, x: root[None] * (loops @ (root[None] * (x @ p["w"])))),
        "sage": op(weights("ab"), lambda p, x: x @ p["a"] + (adjacency @ x / degree[None]) @ p["b"]),
        "gin": op(gin_init, lambda p, x: jax.nn.relu(((1 + p["epsilon"]) * x + adjacency @ x) @ p["in"]) @ p["out"]),
        "gat": op(gat_init, gat_apply),
    }
