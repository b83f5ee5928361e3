"""Ops on graphs, and ops that turn the columns of a table into tokens.

The nodes of a graph are positions. x is [N, nodes, C], N signals on one graph; N is 1 if the nodes are the rows of a
data set. The ops hold the adjacency of the graph, so each graph needs its own set of ops. Their parameters do not
depend on the adjacency, so weights can move from one graph to another. Adjacency may be traced: a batch of graphs is a
`vmap` over it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metaopt.nas._ops import BLOCKS, Op, uniform


def graph_ops(adjacency: Any) -> dict[str, Op]:
    """Makes a set of ops for cells on one graph.

    Use it together with `BLOCKS`: `{**nas.BLOCKS, **nas.graph_ops(adjacency)}`.

    A[i, j] is the weight of the edge from node j to node i, and Ã = A + I. d and d̃ are the row sums of A and Ã; x_i are
    rows:

        gcn:   D̃^(−1/2) Ã D̃^(−1/2) x W                                    (Kipf & Welling)
        sage:  x W₁ + (A x / d) W₂, the mean over neighbors                (Hamilton, Ying & Leskovec)
        gin:   relu(((1 + ε) x + A x) W₁) W₂                               (Xu et al.)
        gat:   Σ_j softmax_j(LeakyReLU(a·x_i W + b·x_j W)) x_j W over Ã_ij ≠ 0, one head (Veličković et al.)

    The ops have no normalization, and no nonlinearity before or after. `norm_relu` is a separate layer. "mlp", "linear"
    and "skip_connect" of `BLOCKS` act on each node separately. "attention" acts on all nodes, whether edges join them
    or not.

    Args:
      adjacency: [nodes, nodes], not negative, without self-loops (a rule adds them if it needs them). Make it symmetric
        for an undirected graph. It is dense, so memory grows as nodes².

    Returns:
      Name -> `Op`. The ops reject a stride other than 1, or another number of nodes, at build time.

    Raises:
      ValueError: if `adjacency` is not square.

    Sources: https://arxiv.org/abs/1609.02907, https://arxiv.org/abs/1706.02216, https://arxiv.org/abs/1810.00826,
    https://arxiv.org/abs/1710.10903

    >>> import jax.numpy as jnp
    >>> from metaopt import nas
    >>> path = jnp.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> ops = {**nas.BLOCKS, **nas.graph_ops(path)}
    >>> cell = nas.complete_cell(2, ("skip_connect", "gcn", "gat"))
    >>> net = nas.Network({"cell": cell}, (nas.Layer("gcn", 4), nas.Layer("cell", 4)), num_outputs=2)
    >>> nas.supernet(net, (3, 5), ops=ops).in_shape
    (3, 5)
    """
    adjacency = jnp.asarray(adjacency)
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"`adjacency` must be [nodes, nodes]; got the shape {adjacency.shape}.")
    num = adjacency.shape[0]
    adjacency = adjacency.astype(jnp.zeros(0).dtype)
    loops = adjacency + jnp.eye(num)
    degree = jnp.maximum(adjacency.sum(1, keepdims=True), 1e-12)  # so that the mean over no neighbors is 0
    root = jax.lax.rsqrt(loops.sum(1, keepdims=True))

    def op(init, apply):
        def checked(key, in_shape, channels, stride):
            if len(in_shape) != 2 or in_shape[0] != num or stride != 1:
                raise ValueError(
                    f"An op of this graph takes inputs of the shape ({num}, channels), a row for each of its nodes, "
                    f"with stride 1; got {tuple(in_shape)}, and stride {stride}."
                )
            return init(key, in_shape[-1], channels)

        return Op(checked, lambda params, x, channels, stride: apply(params, x))

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


def _tokens_init(key: jax.Array, in_shape: Sequence[int], channels: int, stride: int):
    if len(in_shape) != 2 or stride != 1:
        raise ValueError(
            f"'tokens' needs one axis of positions: (columns, 1) for a table, (length, channels) for a sequence, with "
            f"stride 1; got {tuple(in_shape)}, and stride {stride}."
        )
    length, width = in_shape
    w = uniform(key, (length, width, channels), width)
    return {"w": w, "b": uniform(key, (length, channels), width, number=1)}


def _tokens_apply(params, x, channels, stride):
    return jnp.einsum("npc,pcd->npd", x, params["w"]) + params["b"][None]


def _block_init(key: jax.Array, in_shape: Sequence[int], channels: int, stride: int):
    """Attention, then an MLP, with layer norms and residual connections; first a projection if channels differ."""
    attention = BLOCKS["attention"].init(key, (*in_shape[:-1], channels), channels, 1)
    params = {"attention": attention}
    numbers = {"up": (channels, 2 * channels), "down": (2 * channels, channels), "enter": (in_shape[-1], channels)}
    for number, (name, shape) in enumerate(numbers.items(), 4):
        if name != "enter" or in_shape[-1] != channels:
            params[name] = uniform(key, shape, shape[0], number=number)
    if stride != 1:
        raise ValueError(f"'transformer' keeps positions; got stride {stride}.")
    return params


def _block_apply(params, x, channels, stride):
    x = x @ params["enter"] if "enter" in params else x
    x = x + BLOCKS["attention"].apply(params["attention"], _layer_norm(x), channels, 1)
    return x + jax.nn.gelu(_layer_norm(x) @ params["up"]) @ params["down"]


def _layer_norm(x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)


# "tokens": every position has its own projection and vector. Positions are columns of a table (a feature tokenizer,
# Gorishniy et al., NeurIPS 2021, https://arxiv.org/abs/2106.11959) or of a sequence. "transformer": attention and MLP.
TOKEN_OPS: dict[str, Op] = {
    "tokens": Op(_tokens_init, _tokens_apply),
    "transformer": Op(_block_init, _block_apply),
}
