"""The layers of a supernet: their shapes and groups of edges, their parameters, and their application.

Edges of a cell with the same candidates and shapes form a group, and equal layers that follow one another form a run.
Each is one scan over stacked parameters.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, base
from metaopt.nas import _ops
from metaopt.nas._specs import Cell, Edge, Layer, Network


class Group(NamedTuple):
    """Edges of a cell that are one scan. They have the same candidates and shapes, and run one after the other."""

    edges: tuple[int, ...]  # positions among the cell's edges
    ops: tuple[str, ...]
    in_shape: tuple[int, ...]  # input shape of the ops, after the split of channels
    channels: int  # output channels of the ops
    stride: int
    enters: bool  # whether the edges start at inputs whose shape differs from the shape of the nodes


class Run(NamedTuple):
    """Equal layers that follow one another: one scan."""

    layer: Layer
    length: int
    in_shapes: tuple[tuple[int, ...], ...]  # input shapes; one entry for a single op
    out_shape: tuple[int, ...]
    groups: tuple[Group, ...]  # empty for a single op


# ---- Shapes ---------------------------------------------------------------------------------------------------------


def build(network: Network, in_shape: tuple[int, ...], ops: Mapping[str, _ops.Op], partial: int) -> list[Run]:
    """The runs of a network with all shapes, which are checked against the output shapes of the ops."""
    checked: dict[tuple, tuple[int, ...]] = {}

    def out_shape(name, shape, channels, stride):
        case = (name, shape, channels, stride)
        if case not in checked:
            op, key = (
                _checks.named(ops, name, "The name of an op or a layer"),
                jax.eval_shape(lambda: jax.random.key(0)),
            )
            x = jax.ShapeDtypeStruct((2, *shape), jnp.zeros(0).dtype)
            params = jax.eval_shape(lambda key: op.init(key, shape, channels, stride), key)
            y = jax.eval_shape(lambda params, x: op.apply(params, x, channels, stride), params, x)
            wanted = (2, *(-(-n // stride) for n in shape[:-1]), channels)
            if getattr(y, "shape", None) != wanted:
                raise ValueError(
                    f"The op {name!r} must turn the shape {x.shape} into {wanted} with {channels} channels and stride "
                    f"{stride}; it returned {getattr(y, 'shape', type(y).__name__)}."
                )
            checked[case] = wanted[1:]
        return checked[case]

    runs: list[Run] = []
    before, last = in_shape, in_shape
    for i, layer in enumerate(network.layers):
        cell = network.cells.get(layer.name)
        if cell is None:
            in_shapes, groups, new = (last,), (), out_shape(layer.name, last, layer.channels, layer.stride)
        else:
            in_shapes = (before, last)[2 - cell.num_inputs :]
            groups, new = _groups(layer, cell, in_shapes, partial, out_shape)
        run = Run(layer, 1, in_shapes, new, groups)
        alike = bool(runs) and runs[-1][2:] == run[2:] and runs[-1].layer == layer
        # The carry of a scan, `before` and `last`, must keep its shapes. Layers with one input do not read `before`.
        if alike and last == new and (len(in_shapes) == 1 or (before == last and i > 1)):
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(run)
        before, last = (last if i else new), new
    return runs


def _groups(
    layer: Layer, cell: Cell, in_shapes: tuple[tuple[int, ...], ...], partial: int, out_shape: Callable
) -> tuple[tuple[Group, ...], tuple[int, ...]]:
    """The groups of a cell's edges, and the shape of its output."""
    name, channels, stride = layer
    spatial = in_shapes[-1][:-1]
    if channels % partial:
        raise ValueError(
            f"`partial` must divide the number of channels; got {partial}, but {name!r} has {channels} channels."
        )
    width = channels if cell.preprocess else in_shapes[-1][-1]  # channels of the inputs, as edges see them
    if partial > 1 and width != channels:
        raise ValueError(
            f"The cell {name!r} has {channels} channels, but its input has {width} and `preprocess=False`, so the "
            "channels that skip the ops because of `partial` do not fit. Change the channels in the layer before it, "
            "or set `preprocess=True`."
        )
    for shape in in_shapes[:-1]:
        preprocess_stride(shape, in_shapes[-1])  # raises if no stride fits
    small = tuple(-(-n // stride) for n in spatial)

    def alike(edge):
        """The properties that edges of one group share."""
        if edge.source < cell.num_inputs and (stride > 1 or width != channels):
            return edge.ops, (*spatial, width // partial), stride, True
        return edge.ops, (*small, channels // partial), 1, False

    # Edges that change the shape come first. All of them start at inputs. The other edges are in the order of their
    # targets, so that a node is complete before an edge starts from it.
    order = sorted(range(len(cell.edges)), key=lambda e: _order(cell.edges[e], alike(cell.edges[e])[3]))
    groups = []
    for (names, shape, edge_stride, enters), edges in itertools.groupby(order, key=lambda e: alike(cell.edges[e])):
        for op in names:
            out_shape(op, shape, channels // partial, edge_stride)
        groups.append(Group(tuple(edges), names, shape, channels // partial, edge_stride, enters))
    return tuple(groups), (*small, channels * len(cell.output))


def _order(edge: Edge, enters: bool) -> tuple[bool, int, int]:
    return not enters, edge.target, edge.source


def preprocess_stride(shape: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    """The stride that shrinks an older input to `wanted`, since the layer in between may have had a stride."""
    for stride in range(1, max((*shape[:-1], 1)) + 1):
        if tuple(-(-n // stride) for n in shape[:-1]) == wanted[:-1]:
            return stride
    raise ValueError(f"No stride reduces an input of shape {shape} to {wanted}.")


# ---- Parameters -----------------------------------------------------------------------------------------------------


def num_keys(run: Run) -> int:
    return len(run.in_shapes) + sum(len(group.edges) * len(group.ops) for group in run.groups)


def init_run(keys: jax.Array, run: Run, cell: Cell | None, ops: Mapping[str, _ops.Op]) -> base.PyTree:
    """Parameters of a run, with one key per op: stacked over layers, and in each group of edges also over the edges."""
    name, channels, stride = run.layer

    def init_layer(keys):
        if cell is None:
            return ops[name].init(keys[0], run.in_shapes[0], channels, stride)
        inputs = [
            input_init(key, shape, channels, preprocess_stride(shape, run.in_shapes[-1])) if cell.preprocess else ()
            for key, shape in zip(keys, run.in_shapes, strict=False)
        ]
        groups, keys = [], keys[len(inputs) :]
        for group in run.groups:
            params, num = [], len(group.edges)
            for op in group.ops:
                init = lambda key, op=ops[op], g=group: op.init(key, g.in_shape, g.channels, g.stride)
                params.append(jax.vmap(init)(keys[:num]))
                keys = keys[num:]
            groups.append(params)
        return {"inputs": inputs, "edges": groups}

    return jax.vmap(init_layer)(keys.reshape(run.length, -1))


def input_init(key, shape, channels, stride):
    """ReLU, 1×1 convolution, normalization; the skip op, with its two halves, if `stride > 1`."""
    return (_ops.BLOCKS["skip_connect"] if stride > 1 else _ops.convolution(1)).init(key, shape, channels, stride)


def input_apply(params, x, channels, stride):
    return (_ops.BLOCKS["skip_connect"] if stride > 1 else _ops.convolution(1)).apply(params, x, channels, stride)


def unstacked(layers: list, runs: list[Run], network: Network) -> list[dict]:
    """One entry per layer: {"inputs" or "op": ..., (source, target, op name): params}."""
    layers_params = []
    for run, stacked in zip(runs, layers, strict=True):
        cell = network.cells.get(run.layer.name)
        for i in range(run.length):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            if cell is None:
                layers_params.append({"op": layer})
                continue
            layer_params: dict = {"inputs": layer["inputs"]}
            for group, params in zip(run.groups, layer["edges"], strict=True):
                for j, e in enumerate(group.edges):
                    for op, stack in zip(group.ops, params, strict=True):
                        layer_params[(*cell.edges[e][:2], op)] = jax.tree.map(lambda leaf, j=j: leaf[j], stack)
            layers_params.append(layer_params)
    return layers_params


def stacked_layers(layers_params: list[dict], runs: list[Run], network: Network) -> list:
    """The inverse of `unstacked`, for a network that may have fewer edges and ops."""
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    layers_params, layers = list(layers_params), []
    for run in runs:
        cell, run_params = network.cells.get(run.layer.name), []
        for _ in range(run.length):
            layer_params = layers_params.pop(0)
            if cell is None:
                run_params.append(layer_params["op"])
                continue
            edges = [
                [stack([layer_params[(*cell.edges[e][:2], op)] for e in group.edges]) for op in group.ops]
                for group in run.groups
            ]
            run_params.append({"inputs": layer_params["inputs"], "edges": edges})
        layers.append(stack(run_params))
    return layers


# ---- Application ----------------------------------------------------------------------------------------------------


def kept_edges(drop_path: tuple, runs: list[Run], network: Network, x: jax.Array) -> list[jax.Array | None]:
    """For each run of cells, [layers, edges, N]: 0 if an edge is dropped, 1 / (1 − rate) if it stays."""
    key, rate = drop_path
    edges = [len(network.cells[run.layer.name].edges) if run.groups else 0 for run in runs]
    sizes = [run.length * num for run, num in zip(runs, edges, strict=True)]
    # One draw for all edges: each draw takes the compiler half a second.
    draws = jax.random.bernoulli(key, 1 - jnp.asarray(rate), (sum(sizes), len(x))).astype(x.dtype)
    parts = jnp.split(draws / (1 - jnp.asarray(rate, x.dtype)), np.cumsum(sizes)[:-1])
    shaped = [part.reshape(run.length, -1, len(x)) for run, part in zip(runs, parts, strict=True) if len(part)]
    return [shaped.pop(0) if size else None for size in sizes]


class Options(NamedTuple):
    """How the ops of an edge run: the arguments `partial`, `single_path` and `remat_edges` of `supernet`."""

    partial: int = 1
    single_path: bool = False
    remat_edges: bool = False


def apply_cell(
    cell: Cell,
    run: Run,
    ops: Mapping[str, _ops.Op],
    options: Options,
    params: base.PyTree,
    weights: Any,
    kept: jax.Array | None,
    inputs: Sequence[jax.Array],
) -> jax.Array:
    """The output of a cell.

    Args:
      cell: the cell.
      run: its layer, with shapes and groups of edges.
      ops: name -> `Op`.
      options: how the ops of an edge run.
      params: {"inputs": ..., "edges": ...} of this layer.
      weights: [edges, ops]; None gives every op the weight 1.
      kept: [edges, N] from `kept_edges`, or None.
      inputs: the outputs of the layers before, as many as the cell has inputs.

    Returns:
      [N, spatial..., channels].
    """
    channels = run.layer.channels
    if cell.preprocess:
        inputs = [
            input_apply(p, x, channels, preprocess_stride(shape, run.in_shapes[-1]))
            for p, x, shape in zip(params["inputs"], inputs, run.in_shapes, strict=True)
        ]
    num_nodes = max([*cell.output, *(edge.target for edge in cell.edges)]) + 1
    # A scan looks up the source of an edge by its index, so all sources must have one shape. `nodes` holds all nodes,
    # and the inputs too if they have the shape of the nodes. Edges that change the shape of an input (`group.enters`)
    # read it from `stack`.
    stack = jnp.stack(inputs)
    shape = (num_nodes, stack.shape[1], *run.out_shape[:-1], channels)
    nodes = jnp.zeros(shape, stack.dtype)
    if stack.shape[1:] == shape[1:]:
        nodes = nodes.at[: cell.num_inputs].set(stack)
    for group, group_params in zip(run.groups, params["edges"], strict=True):
        sources, targets = (np.array([cell.edges[e][i] for e in group.edges]) for i in (0, 1))
        w = None if weights is None else jnp.asarray(weights, stack.dtype)[np.array(group.edges)]

        keep = None if kept is None else kept[np.array(group.edges)]

        def step(nodes, edge, group=group):
            params, w, keep, source, target = edge
            x = jax.lax.dynamic_index_in_dim(stack if group.enters else nodes, source, keepdims=False)
            apply = lambda params, w, keep, x: _edge(group, ops, options, params, w, keep, x)
            y = (jax.checkpoint(apply) if options.remat_edges else apply)(params, w, keep, x)
            old = jax.lax.dynamic_index_in_dim(nodes, target, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(nodes, old + y, target, 0), None

        edge_inputs = (group_params, w, keep, sources, targets)
        if len(sources) > 1:
            nodes, _ = jax.lax.scan(step, nodes, jax.tree.map(jnp.asarray, edge_inputs))
        else:
            nodes, _ = step(nodes, jax.tree.map(lambda leaf: leaf[0], edge_inputs))
    return jnp.concatenate([nodes[i] for i in cell.output], -1)


def _edge(group: Group, ops: Mapping[str, _ops.Op], options: Options, params, w, keep, x: jax.Array) -> Any:
    """Σ_o w_o · o(x), on the first of K parts of the channels if K > 1; each example is multiplied by its `keep`."""
    width, stride, partial = group.in_shape[-1], group.stride, options.partial

    def apply(p, x, name):
        y = ops[name].apply(p, x, group.channels, stride)
        if keep is None or y is x:  # a skip that returns its input is not dropped
            return y
        return y * keep.reshape(-1, *[1] * (y.ndim - 1))

    applied = [lambda p, x, name=name: apply(p, x, name) for name in group.ops]
    op_channels = x[..., :width]
    if w is None:
        y = sum(apply(p, op_channels) for apply, p in zip(applied, params, strict=True))
    elif options.single_path:
        index = jnp.argmax(jnp.abs(w))
        branches = [lambda x, ps, i=i, apply=apply: apply(ps[i], x) for i, apply in enumerate(applied)]
        y = w[index] * jax.lax.switch(index, branches, op_channels, params)
    else:
        y = sum(w[i] * apply(p, op_channels) for i, (apply, p) in enumerate(zip(applied, params, strict=True)))
    if partial == 1:
        return y
    # The sum is 1 after a softmax. Other relaxations use it to scale or drop a whole edge.
    bypass_channels = x[..., width:] * (1 if w is None else w.sum())
    if stride > 1:
        window = (1, *[stride] * (x.ndim - 2), 1)
        padding = [(0, -n % size) for n, size in zip(bypass_channels.shape, window, strict=True)]
        bypass_channels = jax.lax.reduce_window(bypass_channels, -jnp.inf, jax.lax.max, window, window, padding)
    y = jnp.concatenate([y, bypass_channels], -1)
    return y.reshape(*y.shape[:-1], partial, width).swapaxes(-1, -2).reshape(y.shape)  # shuffled


# ---- The head -------------------------------------------------------------------------------------------------------


def head(network: Network, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Maps the output of the last layer to the outputs of the network."""
    x = x.mean(tuple(range(1, x.ndim - 1))) if network.pooled else x
    return x @ params["w"] + params["b"].reshape((1,) * (x.ndim - 1) + (-1,))
