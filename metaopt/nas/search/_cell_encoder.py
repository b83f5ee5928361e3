"""A transformer that scores a cell for a task: how good would this architecture be on that task?

A cell is a directed acyclic graph with an op on every vertex. The vertices are tokens without an order. The position of
a token is encoded only by its depth below the input and its height above the output. A token attends only to vertices
that are connected to it by edges or paths. There are four heads. One attends to the direct predecessors of a vertex and
one to all its ancestors; one to its direct successors and one to all its descendants. Each head also attends to the
vertex itself.

    x_v = E[op_v] + D[depth_v] + H[height_v],
    x ← x + Σ_heads attention(norm x; mask),    x ← x + W₂ relu(W₁ norm x)        (`num_layers` times)
    z(a) = relu(W Σ_v x_v / √V + b),
    score(a, t) = z(a) · c(t),    c(t) = c₀ + A t + B tanh(C t + b)

A task is thus a vector of coefficients, which depends on the task's features. A and B start at zero, so the ranking is
initially the same for all tasks. Reordering the vertices does not change the score, and neither do the values in
padding. The score does depend on V.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt._heads import apply_head, init_head
from metaopt.nas import _graphs

_NUM_HEADS = 4


class Cells(NamedTuple):
    """Cells as arrays, made by `cells`. Each has V vertices, of which some may be padding.

    Attributes:
      ops: [A, V] int32, indices into the names of the ops.
      edges: [A, V, V] bool, whether an edge leads from one vertex to another.
      paths: [A, V, V] bool, whether a path leads from one vertex to another.
      depth: [A, V] int32, the number of edges of the longest path that ends at a vertex.
      height: [A, V] int32, the number of edges of the longest path that begins at a vertex.
      mask: [A, V] bool, which vertices are real.
    """

    ops: jax.Array
    edges: jax.Array
    paths: jax.Array
    depth: jax.Array
    height: jax.Array
    mask: jax.Array


class CellEncoder(NamedTuple):
    """The functions that `cell_encoder` returns.

    Attributes:
      init: `(key) -> φ`.
      encode: `(φ, Cells) -> [A, width]`, z.
      score: `(φ, Cells, features [F]) -> [A]`, larger is better.
      coefficients: `(φ, features [F]) -> [width]`, c.
      config: the options of the encoder; `cell_encoder(**config)` builds the same one.
    """

    init: Callable[[jax.Array], base.PyTree]
    encode: Callable[[base.PyTree, Cells], jax.Array]
    score: Callable[[base.PyTree, Cells, jax.Array], jax.Array]
    coefficients: Callable[[base.PyTree, jax.Array], jax.Array]
    config: dict[str, int]


def cells(graphs: Sequence[_graphs.Graph], ops: Sequence[str], *, num_vertices: int | None = None) -> Cells:
    """Converts graphs to arrays of one shape.

    Args:
      graphs: their vertices may be in any order. `nas.edge_graph` makes a graph from a cell whose ops are on edges.
      ops: all names that may be on a vertex, including those of the input and the output.
      num_vertices: V; by default, the size of the largest graph.

    Returns:
      `Cells`.

    Raises:
      ValueError: if a graph has a cycle, or more than V vertices.
    """
    index = {op: i for i, op in enumerate(ops)}
    num_vertices = max(len(graph.ops) for graph in graphs) if num_vertices is None else num_vertices
    labels = np.zeros((len(graphs), num_vertices), np.int32)
    edges = np.zeros((len(graphs), num_vertices, num_vertices), bool)
    mask = np.zeros((len(graphs), num_vertices), bool)
    for a, graph in enumerate(graphs):
        size = len(graph.ops)
        labels[a, :size], mask[a, :size] = [index[op] for op in graph.ops], True
        edges[a, :size, :size] = graph.matrix
    paths, depth, height = edges.copy(), np.zeros_like(labels), np.zeros_like(labels)
    for _ in range(num_vertices - 1):
        paths = paths | (paths.astype(np.uint8) @ edges.astype(np.uint8) > 0)
        depth = np.where(edges, depth[:, :, None] + 1, 0).max(1)
        height = np.where(edges, height[:, None] + 1, 0).max(2)
    if np.einsum("avv->av", paths).any():
        raise ValueError("A graph has a cycle; the graph of a cell must be acyclic.")
    return Cells(*map(jnp.asarray, (labels, edges, paths, depth, height, mask)))


def cell_encoder(
    num_ops: int, num_vertices: int, *, num_features: int = 0, width: int = 32, num_layers: int = 2, num_hidden: int = 8
) -> CellEncoder:
    """A scorer of cells for tasks. `nas.train_cell_searcher` trains it by `cell_ranking_loss`.

    Args:
      num_ops: the number of op names, including the input's and the output's. The indices in `Cells.ops` must be
        smaller; this is not checked.
      num_vertices: V.
      num_features: F, of a task; with 0 the scores are the same for all tasks.
      width: the width of a token and of z, a multiple of 4 (the number of heads).
      num_layers: the number of attention layers.
      num_hidden: tanh units between a task's features and its coefficients.

    Returns:
      A `CellEncoder`. Its functions are pure and work under jit, vmap and any mode of differentiation. A differentiated
        call takes memory for about A·V·(20·width + 8·V)·num_layers numbers.

    Raises:
      ValueError: at trace time, if the cells do not have V vertices.

    Sources: Luo, Thost & Shi, Transformers over directed acyclic graphs, NeurIPS 2023, https://arxiv.org/abs/2210.13148
      (attention along paths, depth as position); Zaheer et al., Deep Sets, NeurIPS 2017,
      https://arxiv.org/abs/1703.06114 (the sum).
    """
    config = {
        "num_ops": num_ops,
        "num_vertices": num_vertices,
        "num_features": num_features,
        "width": width,
        "num_layers": num_layers,
        "num_hidden": num_hidden,
    }

    def encode(meta_params, cells):
        if cells.ops.shape[-1] != num_vertices:  # an index beyond the embeddings would be clamped
            raise ValueError(f"This encoder reads cells of {num_vertices} vertices; got {cells.ops.shape[-1]}.")
        return jax.vmap(lambda cell: _encode(meta_params, cell))(cells)

    coefficients = lambda meta_params, features: apply_head(meta_params["head"], features)
    score = lambda meta_params, cells, features: encode(meta_params, cells) @ coefficients(meta_params, features)
    return CellEncoder(functools.partial(_init, **config), encode, score, coefficients, config)


def _init(key, num_ops, num_vertices, num_features, width, num_layers, num_hidden):
    token_key, layer_key, out_key, center_key, head_key = jax.random.split(key, 5)
    normal = lambda key, rows, columns: jax.random.normal(key, (rows, columns)) / np.sqrt(rows)

    def layer(key):
        keys = jax.random.split(key, 4)
        return {
            "qkv": normal(keys[0], width, 3 * width),
            "mix": normal(keys[1], width, width),
            "up": normal(keys[2], width, 2 * width),
            "down": normal(keys[3], 2 * width, width),
        }

    sizes = {"op": num_ops, "depth": num_vertices, "height": num_vertices}
    keys = jax.random.split(token_key, len(sizes))
    return {
        "tokens": {name: jax.random.normal(k, (n, width)) for k, (name, n) in zip(keys, sizes.items(), strict=True)},
        "layers": jax.vmap(layer)(jax.random.split(layer_key, num_layers)),
        "out": normal(out_key, width, width),
        "bias": jnp.zeros(width),
        "head": init_head(head_key, num_features, num_hidden, normal(center_key, width, 1)[:, 0]),
    }


def _encode(meta_params, cell: Cells) -> jax.Array:
    """z [W] of one cell."""
    tokens = meta_params["tokens"]
    x = tokens["op"][cell.ops] + tokens["depth"][cell.depth] + tokens["height"][cell.height]  # [V, W]
    masks = (
        jnp.stack([cell.edges.T, cell.paths.T, cell.edges, cell.paths]) | jnp.eye(len(x), dtype=bool)[None]
    )  # [heads, V, V]
    norm = lambda x: jax.nn.standardize(x, epsilon=1e-6)

    def step(x, layer):
        q, k, v = jnp.split((norm(x) @ layer["qkv"]).reshape(len(x), _NUM_HEADS, -1), 3, axis=-1)
        # Not `jax.nn.dot_product_attention`, which always computes the softmax in float32.
        logits = jnp.einsum("uhk,vhk->huv", q, k) / np.sqrt(q.shape[-1])
        mixed = jnp.einsum("huv,vhk->uhk", jax.nn.softmax(logits, where=masks), v)
        x = x + mixed.reshape(x.shape) @ layer["mix"]
        return x + jax.nn.relu(norm(x) @ layer["up"]) @ layer["down"], None

    x, _ = jax.lax.scan(step, x, meta_params["layers"])
    # A sum keeps the number of ops, which matters. Attention averages, so it loses this number.
    total = jnp.where(cell.mask[:, None], x, 0).sum(0) / np.sqrt(len(x))
    return jax.nn.relu(total @ meta_params["out"] + meta_params["bias"])


def cell_ranking_loss(scores: jax.Array, outcomes: jax.Array) -> jax.Array:
    """The logistic ranking loss over all pairs of cells, each pair weighted by the difference of its normal scores.

        Σ_{i, j: y_i < y_j} |q_i − q_j| log(1 + exp(s_j − s_i)) / Σ |q_i − q_j|

    Here q are the normal scores of the outcomes: standard normal quantiles of their ranks. So the best and the worst
    cells count more than those in the middle, and the units of a task do not matter.

    Args:
      scores: [N] s, larger is better.
      outcomes: [N] y, losses, smaller is better; NaN if missing.

    Returns:
      []; log 2 if all scores are equal, 0 if no two outcomes differ.

    Source: Burges et al., Learning to rank using gradient descent, ICML 2005 (logistic loss over pairs).
    """
    finite = jnp.isfinite(outcomes)
    y = jnp.where(finite, outcomes, 0.0)
    below = ((y[:, None] > y[None]) & finite[None]).sum(1) + 0.5 * ((y[:, None] == y[None]) & finite[None]).sum(1)
    q = jax.scipy.special.ndtri(jnp.clip(below / jnp.maximum(finite.sum(), 1), 1e-3, 1 - 1e-3))
    better = (y[:, None] < y[None]) & finite[:, None] & finite[None]
    weights = jnp.where(better, jnp.abs(q[:, None] - q[None]), 0.0)
    losses = jax.nn.softplus(scores[None] - scores[:, None])
    return (weights * losses).sum() / jnp.maximum(weights.sum(), 1e-9)
