"""Supernets: all networks of a spec in one, with mixing weights on its ops; and single networks by the same code.

If edges of a cell have the same candidates and the same shapes, they are one scan over their stacked parameters. Equal
layers that follow one another are also one scan. So a program contains each op once per group, however many edges and
layers there are. This keeps compilation short.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, base
from metaopt.nas import _elastic, _genotypes, _normalization, _ops
from metaopt.nas._specs import (
    Cell,
    Edge,
    ElasticNetwork,
    Genotype,
    Layer,
    Network,
    Space,
    check_network,
    check_single_path,
)

Weights = Mapping[str, Any]  # kind -> [edges, ops]


class Supernet(NamedTuple):
    """The functions and settings that `supernet` makes from a spec.

    Attributes:
      init: `(key) -> params`.
      apply: `(params, weights, x, drop_path=None, mask=None, statistics=None) -> [N, num_outputs]`, with
        `x: [N, *in_shape]`. If the spec is not `pooled`, all positions are axes in between. If `weights=None`, every op
        has weight 1, and all sizes of an `ElasticNetwork` are the largest. Integers in x count as the same numbers in
        floating point: uint8 images are 0..255. Networks that do not normalize first learn better from x / 255.
        **Without `statistics` it is the network in training and search.** It normalizes by the batch, so the outputs of
        a row depend on the other rows. A single row without positions raises a ValueError. With `statistics` (from
        `statistics` below), the outputs of a row depend only on this row: predict in this way.
        With `drop_path=(key, rate)`, each edge is dropped from each example with probability `rate`, except if its op
        returns its input unchanged. The remaining edges are scaled by 1 / (1 − rate). Sizes have no edges to drop.
        `mask` [N] is 1 for a real row and 0 for padding. With it, the outputs of real rows equal the outputs of a batch
        of only these rows, up to rounding: `nas.normalized` leaves padding out. (If your own op computes over the batch
        in another way, it uses all rows, with `mask` and with `statistics`.)
      features: like `apply`, but it returns the outputs of all layers in order, as an auxiliary head reads them.
      head: `(params, features of the last layer) -> [N, num_outputs]`.
      inherit: `(params, genotype) -> params` of the genotype's discrete network, with the supernet's weights. It raises
        the same errors as `discrete`.
      statistics: `(params, weights, x, mask=None) -> statistics`, a list with the mean and variance of every
        normalization over the real rows x, all as one batch. They hold for these `params` and `weights` only.
        `nas.trained_network` computes them from training rows.
      network: the spec.
      in_shape: the shape of one input.
      single_path: whether only one op per edge runs, the op with the largest weight.
      partial: K; ops see 1/K of the channels.
    """

    init: Callable[[jax.Array], base.Params]
    apply: Callable[..., jax.Array]
    features: Callable[..., list[jax.Array]]
    head: Callable[[base.Params, jax.Array], jax.Array]
    inherit: Callable[[base.Params, Genotype], base.Params]
    statistics: Callable[..., list[_normalization.Statistics]]
    network: Space
    in_shape: tuple[int, ...]
    single_path: bool = False
    partial: int = 1


class _Group(NamedTuple):
    """Edges of a cell that are one scan: they have the same candidates and stride, and follow one another in order."""

    edges: tuple[int, ...]  # positions among the cell's edges
    ops: tuple[str, ...]
    in_shape: tuple[int, ...]  # of the input of the ops, after the split of channels
    channels: int  # of their output
    stride: int
    enters: bool  # whether they start at inputs whose shape differs from the nodes


class _Run(NamedTuple):
    """Equal layers that follow one another: one scan."""

    layer: Layer
    length: int
    in_shapes: tuple[tuple[int, ...], ...]  # of the inputs; one entry for a single op
    out_shape: tuple[int, ...]
    groups: tuple[_Group, ...]  # empty for a single op


def supernet(
    network: Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    partial: int = 1,
    single_path: bool = False,
    remat_edges: bool = False,
) -> Supernet:
    """The supernet of a spec. It checks all shapes.

        node_t = Σ_{edges (s, t)} Σ_o w[edge, o] · o(node_s)

    w are mixing weights, which a relaxation makes of α. They have one row for each edge of a kind of cell, and all
    cells of the kind share them. The supernet is differentiable in w and in the parameters, in any mode. `vmap` over
    tasks works, also if each task has its own w. The memory of the backward pass grows with the number of ops that run.

    Args:
      network: a spec, or a discrete network. An `ElasticNetwork` has the weights of the largest network. Every step
        then costs as much as the largest network, and layers run on all of its channels, even with `single_path`.
      in_shape: shape of one input without the batch axis: (32, 32, 3), (100, 1) for a sequence, (8,) for rows of a
        table.
      ops: name -> `Op`: the set of the space, such as `DARTS_OPS`, and your own ops. For an `ElasticNetwork`, {}.
      partial: K. Only the first C/K channels of an edge go through the ops, which then have C/K channels. The other
        channels bypass the ops and are multiplied by Σ_o w[edge, o]. With a stride, they are reduced by max pooling.
        Then the channels are shuffled (PC-DARTS). With 1, all channels go through the ops.
      single_path: whether w has at most one nonzero entry per row. Only the op with the largest entry runs, and others
        have no gradient. (Under `vmap` over different w, all ops run.) `apply` rejects other w, but it cannot check
        traced w. For a mixture, use the supernet without `single_path`, which has the same parameters.
      remat_edges: whether the backward pass runs the ops again instead of storing their intermediate results. Its
        memory is then the memory of the nodes and of one edge, at the cost of one more forward pass.

    Returns:
      A `Supernet`. Its parameters are a tree of arrays, with stacks of edges and of layers as leading axes.

    Raises:
      ValueError: if the spec is inconsistent, or if `in_shape` is a number.
      ValueError: if an op is unknown or not an `Op`, or if its input or output has a wrong shape.
      ValueError: if K does not divide the channels, or if K > 1 for an `ElasticNetwork`.

    Sources: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055; for K, Xu et al., ICLR 2020,
    https://arxiv.org/abs/1907.05737

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import nas
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    >>> table = nas.Network({"cell": cell}, (nas.Layer("linear", 8), nas.Layer("cell", 8)), num_outputs=3)
    >>> net = nas.supernet(table, (5,), ops=nas.BLOCKS)
    >>> alpha = nas.init_alpha(jax.random.key(0), table)
    >>> weights = nas.mixing_weights(nas.softmax(), table, alpha, jax.random.key(1))
    >>> params = jax.eval_shape(net.init, jax.random.key(2))
    >>> jax.eval_shape(net.apply, params, weights, jnp.ones((4, 5))).shape
    (4, 3)
    """
    _checks.check_integer("partial", partial, 1)
    if not np.iterable(in_shape):
        raise ValueError(f"`in_shape` must be a shape, such as ({in_shape},) for rows of a table; got {in_shape!r}.")
    in_shape = tuple(in_shape)
    if isinstance(network, ElasticNetwork):
        if partial > 1:
            raise ValueError(f"`partial` must be 1 for a network of sizes, which has no ops; got {partial}.")
        made = _elastic.elastic_functions(network, in_shape, single_path=single_path, remat=remat_edges)
        inherit = lambda params, genotype: made[-1](params, _genotypes.discrete(network, genotype))
        init, apply, all_features, outputs_of = made[:-1]
        rows = _over_rows(apply), _over_rows(all_features), outputs_of, inherit, _statistics_fn(apply)
        return Supernet(init, *rows, network, in_shape, single_path)
    check_network(network)
    runs = _build(network, in_shape, ops, partial)
    features = runs[-1].out_shape[-1]

    def init(key):
        # One split for all keys: every draw of `jax.random` takes the compiler half a second.
        nums = [run.length * _num_keys(run) for run in runs]
        head_key, *keys = jnp.split(jax.random.split(key, 1 + sum(nums)), np.cumsum([1, *nums[:-1]]))
        layers = [_init_run(k, run, network.cells.get(run.layer.name), ops) for k, run in zip(keys, runs, strict=True)]
        head = {"w": _ops.uniform(head_key[0], (features, network.num_outputs), features)}
        return {"layers": layers, "head": {**head, "b": jnp.zeros(network.num_outputs)}}

    def layers(params, weights, x, drop_path, every) -> list[jax.Array]:
        """A list of the outputs of all layers if `every`, otherwise of only the last output."""
        if x.shape[1:] != in_shape:
            raise ValueError(f"`x` must have the shape (N, {', '.join(map(str, in_shape))}); got {x.shape}.")
        kept = _kept(drop_path, runs, network, x) if drop_path is not None else [None] * len(runs)
        before, last = x, x
        outputs: list[Any] = []
        for run, stacked, keep in zip(runs, params["layers"], kept, strict=True):
            cell = network.cells.get(run.layer.name)
            w = None if weights is None or cell is None else weights[run.layer.name]
            if cell is not None and w is not None and w.shape != (len(cell.edges), len(cell.edges[0].ops)):
                raise ValueError(
                    f"The weights of {run.layer.name!r} must have the shape "
                    f"{(len(cell.edges), len(cell.edges[0].ops))}; got {w.shape}."
                )
            if single_path and w is not None:
                check_single_path(run.layer.name, w)

            def step(carry, xs, run=run, cell=cell, w=w):
                (before, last), (layer, keep) = carry, xs
                if cell is None:
                    new = ops[run.layer.name].apply(layer, last, run.layer.channels, run.layer.stride)
                else:
                    inputs = [before, last][2 - cell.num_inputs :]
                    new = _cell(cell, run, layer, w, keep, inputs, ops, partial, single_path, remat_edges)
                return (last, new), new if every else None

            if len(run.in_shapes) == 1:
                before = last
            if run.length > 1:
                (before, last), new = jax.lax.scan(step, (before, last), (stacked, keep), length=run.length)
                outputs += [] if new is None else list(new)
            else:
                (before, last), new = step((before, last), jax.tree.map(lambda leaf: leaf[0], (stacked, keep)))
                outputs.append(new)
            if run is runs[0] and run.length == 1:
                before = last  # both inputs of the second layer are the output of the first one
        return outputs if every else [last]

    def apply(params, weights, x, drop_path=None):
        return outputs_of(params, layers(params, weights, x, drop_path, every=False)[-1])

    def outputs_of(params, last):
        return head(network, params["head"], last)

    def all_features(params, weights, x, drop_path=None):
        return layers(params, weights, x, drop_path, every=True)

    def inherit(params, genotype):
        small = _genotypes.discrete(network, genotype)
        whole = _unstacked(params["layers"], runs, network)
        layers = _stacked(whole, _build(small, in_shape, ops, partial), small)
        return {"layers": layers, "head": params["head"]}

    rows = _over_rows(apply), _over_rows(all_features), outputs_of, inherit, _statistics_fn(apply)
    return Supernet(init, *rows, network, in_shape, single_path, partial)


def _over_rows(fn: Callable) -> Callable:
    """Extends `apply` or `features` to integers, a mask of rows, and statistics for normalization."""

    def over_rows(params, weights, x, drop_path=None, mask=None, statistics=None):
        x = jnp.asarray(x, jnp.result_type(x, float))
        run = lambda x: fn(params, weights, x, drop_path)
        if statistics is not None:
            return _normalization.at_statistics(run, x, statistics)
        if jnp.shape(x)[:1] == (1,):
            _normalization.check_one_row(run, x)
        return _normalization.over_real_rows(run, x, mask)

    return over_rows


def _statistics_fn(apply: Callable) -> Callable:
    """Makes `Supernet.statistics`."""

    def statistics(params, weights, x, mask=None):
        x = jnp.asarray(x, jnp.result_type(x, float))
        run = lambda x: apply(params, weights, x)
        if jnp.shape(x)[:1] == (1,):
            _normalization.check_one_row(run, x)
        return _normalization.statistics_of(run, x, mask)

    return statistics


def head(network: Network, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Maps the output of the last layer to the outputs of the network."""
    x = x.mean(tuple(range(1, x.ndim - 1))) if network.pooled else x
    return x @ params["w"] + params["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def init_alpha(key: jax.Array, network: Space, *, scale: float = 1e-3) -> dict[str, jax.Array]:
    """Initial α: `scale` · N(0, 1), with one leaf for each kind of cell, or for each choice of a size.

    Args:
      key: a PRNG key.
      network: the spec of a supernet.
      scale: standard deviation; with 0, all weights start equal.

    Returns:
      kind -> [edges, ops].
    """
    keys = jax.random.split(key, len(network.cells))
    shapes = {kind: (len(cell.edges), len(cell.edges[0].ops)) for kind, cell in network.cells.items()}
    return {k: scale * jax.random.normal(key, shape) for key, (k, shape) in zip(keys, shapes.items(), strict=True)}


# ---- Shapes ---------------------------------------------------------------------------------------------------------


def _check_op(ops: Mapping[str, _ops.Op], name: str) -> None:
    """Raises ValueError unless `ops` has an `Op` of this name."""
    if not isinstance(ops, Mapping):
        raise ValueError(f"`ops` must be a dict, name -> `nas.Op`, such as `nas.BLOCKS`; got {type(ops).__name__}.")
    if name not in ops:
        none = (
            f"`ops` has no {name!r}, only {', '.join(map(str, ops))}" if ops else f"`ops` is empty and has no {name!r}"
        )
        raise ValueError(
            f"{none}, an op that the network uses. Pass the op set of its space, such as `nas.BLOCKS` or "
            "`nas.DARTS_OPS`, together with your own ops: `{**nas.BLOCKS, 'mine': nas.Op(...)}`."
        )
    op = ops[name]
    if not (callable(getattr(op, "init", None)) and callable(getattr(op, "apply", None))):
        one = "a function" if callable(op) else repr(op)
        raise ValueError(
            f"`ops[{name!r}]` must be a `nas.Op`, the pair `init(key, in_shape, channels, stride) -> params` and "
            f"`apply(params, x, channels, stride) -> y`; got {one}. An op without parameters is "
            "`nas.Op(lambda key, in_shape, channels, stride: (), lambda params, x, channels, stride: ...)`."
        )


def _build(network: Network, in_shape: tuple[int, ...], ops: Mapping[str, _ops.Op], partial: int) -> list[_Run]:
    """The runs of a network with all shapes, which are checked against the output shapes of the ops."""
    checked: dict[tuple, tuple[int, ...]] = {}

    def out_shape(name, shape, channels, stride):
        _check_op(ops, name)
        at = (name, shape, channels, stride)
        if at not in checked:
            op, key = ops[name], jax.eval_shape(lambda: jax.random.key(0))
            x = jax.ShapeDtypeStruct((2, *shape), jnp.zeros(0).dtype)
            params = jax.eval_shape(lambda key: op.init(key, shape, channels, stride), key)
            y = jax.eval_shape(lambda params, x: op.apply(params, x, channels, stride), params, x)
            wanted = (2, *(-(-n // stride) for n in shape[:-1]), channels)
            if getattr(y, "shape", None) != wanted:
                raise ValueError(
                    f"The op {name!r} must turn the shape {x.shape} into {wanted} with {channels} channels and stride "
                    f"{stride}; it returned {getattr(y, 'shape', type(y).__name__)}."
                )
            checked[at] = wanted[1:]
        return checked[at]

    runs: list[_Run] = []
    before, last = in_shape, in_shape
    for i, layer in enumerate(network.layers):
        _checks.check_integer("channels", layer.channels, 1)
        _checks.check_integer("stride", layer.stride, 1)
        cell = network.cells.get(layer.name)
        if cell is None:
            in_shapes, groups, new = (last,), (), out_shape(layer.name, last, layer.channels, layer.stride)
        else:
            in_shapes = (before, last)[2 - cell.num_inputs :]
            groups, new = _groups(layer, cell, in_shapes, partial, out_shape)
        run = _Run(layer, 1, in_shapes, new, groups)
        alike = bool(runs) and runs[-1][2:] == run[2:] and runs[-1].layer == layer
        # The carry of a scan keeps its shapes. Layers with one input do not read `before`.
        if alike and last == new and (len(in_shapes) == 1 or (before == last and i > 1)):
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(run)
        before, last = (last if i else new), new
    return runs


def _groups(
    layer: Layer, cell: Cell, in_shapes: tuple[tuple[int, ...], ...], partial: int, out_shape: Callable
) -> tuple[tuple[_Group, ...], tuple[int, ...]]:
    """The groups of a cell's edges, and the shape of its output."""
    name, channels, stride = layer
    spatial = in_shapes[-1][:-1]
    if channels % partial:
        raise ValueError(
            f"`partial` must divide the number of channels; got {partial}, but {name!r} has {channels} channels."
        )
    width = channels if cell.preprocess else in_shapes[-1][-1]  # of the inputs, as edges see them
    if partial > 1 and width != channels:
        raise ValueError(
            f"The cell {name!r} has {channels} channels, but its input has {width} and `preprocess=False`, so the "
            "channels that skip the ops because of `partial` do not fit. Change the channels in the layer before it, "
            "or set `preprocess=True`."
        )
    for shape in in_shapes[:-1]:
        _preprocess_stride(shape, in_shapes[-1])  # raises
    small = tuple(-(-n // stride) for n in spatial)

    def of(edge):
        if edge.source < cell.num_inputs and (stride > 1 or width != channels):
            return edge.ops, (*spatial, width // partial), stride, True
        return edge.ops, (*small, channels // partial), 1, False

    # First the edges that change the shape, which start at inputs; then by target, so that sources are complete.
    order = sorted(range(len(cell.edges)), key=lambda e: _order(cell.edges[e], of(cell.edges[e])[3]))
    groups = []
    for (names, shape, edge_stride, enters), edges in itertools.groupby(order, key=lambda e: of(cell.edges[e])):
        for op in names:
            out_shape(op, shape, channels // partial, edge_stride)
        groups.append(_Group(tuple(edges), names, shape, channels // partial, edge_stride, enters))
    return tuple(groups), (*small, channels * len(cell.output))


def _order(edge: Edge, enters: bool) -> tuple[bool, int, int]:
    return not enters, edge.target, edge.source


def _preprocess_stride(shape: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    """The stride that shrinks an older input to `wanted`, since the layer in between may have had a stride."""
    for stride in range(1, max((*shape[:-1], 1)) + 1):
        if tuple(-(-n // stride) for n in shape[:-1]) == wanted[:-1]:
            return stride
    raise ValueError(f"No stride reduces an input of shape {shape} to {wanted}.")


# ---- Parameters -----------------------------------------------------------------------------------------------------


def _num_keys(run: _Run) -> int:
    return len(run.in_shapes) + sum(len(group.edges) * len(group.ops) for group in run.groups)


def _init_run(keys: jax.Array, run: _Run, cell: Cell | None, ops: Mapping[str, _ops.Op]) -> base.PyTree:
    """Parameters of a run, with one key per op. Layers are stacked, and within a cell the edges of each group."""
    name, channels, stride = run.layer

    def one(keys):
        if cell is None:
            return ops[name].init(keys[0], run.in_shapes[0], channels, stride)
        inputs = [
            _input_init(key, shape, channels, _preprocess_stride(shape, run.in_shapes[-1])) if cell.preprocess else ()
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

    return jax.vmap(one)(keys.reshape(run.length, -1))


def _input_init(key, shape, channels, stride):
    """ReLU, 1×1 convolution, normalization; the skip op, with its two halves, if `stride > 1`."""
    return (_ops.BLOCKS["skip_connect"] if stride > 1 else _ops.convolution(1)).init(key, shape, channels, stride)


def _input_apply(params, x, channels, stride):
    return (_ops.BLOCKS["skip_connect"] if stride > 1 else _ops.convolution(1)).apply(params, x, channels, stride)


def _unstacked(layers: list, runs: list[_Run], network: Network) -> list[dict]:
    """One entry per layer: {"inputs" or "op": ..., (source, target, op name): params}."""
    flat = []
    for run, stacked in zip(runs, layers, strict=True):
        cell = network.cells.get(run.layer.name)
        for i in range(run.length):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            if cell is None:
                flat.append({"op": layer})
                continue
            one: dict = {"inputs": layer["inputs"]}
            for group, params in zip(run.groups, layer["edges"], strict=True):
                for j, e in enumerate(group.edges):
                    for op, stack in zip(group.ops, params, strict=True):
                        one[(*cell.edges[e][:2], op)] = jax.tree.map(lambda leaf, j=j: leaf[j], stack)
            flat.append(one)
    return flat


def _stacked(flat: list[dict], runs: list[_Run], network: Network) -> list:
    """The inverse of `_unstacked`, for a network that may have fewer edges and ops."""
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    flat, layers = list(flat), []
    for run in runs:
        cell, ones = network.cells.get(run.layer.name), []
        for _ in range(run.length):
            one = flat.pop(0)
            if cell is None:
                ones.append(one["op"])
                continue
            edges = [
                [stack([one[(*cell.edges[e][:2], op)] for e in group.edges]) for op in group.ops]
                for group in run.groups
            ]
            ones.append({"inputs": one["inputs"], "edges": edges})
        layers.append(stack(ones))
    return layers


# ---- A cell ---------------------------------------------------------------------------------------------------------


def _kept(drop_path, runs: list[_Run], network: Network, x: jax.Array) -> list[jax.Array | None]:
    """For each run of cells, [layers, edges, N]: 0 if an edge is dropped, 1 / (1 − rate) if it stays."""
    key, rate = drop_path
    edges = [len(network.cells[run.layer.name].edges) if run.groups else 0 for run in runs]
    sizes = [run.length * num for run, num in zip(runs, edges, strict=True)]
    # One draw for all edges: each draw takes the compiler half a second.
    draws = jax.random.bernoulli(key, 1 - jnp.asarray(rate), (sum(sizes), len(x))).astype(x.dtype)
    parts = jnp.split(draws / (1 - jnp.asarray(rate, x.dtype)), np.cumsum(sizes)[:-1])
    shaped = [part.reshape(run.length, -1, len(x)) for run, part in zip(runs, parts, strict=True) if len(part)]
    return [shaped.pop(0) if size else None for size in sizes]


def _cell(cell, run, params, weights, kept, inputs, ops, partial, single_path, remat_edges):
    name, channels, stride = run.layer
    if cell.preprocess:
        inputs = [
            _input_apply(p, x, channels, _preprocess_stride(shape, run.in_shapes[-1]))
            for p, x, shape in zip(params["inputs"], inputs, run.in_shapes, strict=True)
        ]
    num_nodes = max([*cell.output, *(edge.target for edge in cell.edges)]) + 1
    inputs = jnp.stack(inputs)
    shape = (num_nodes, inputs.shape[1], *run.out_shape[:-1], channels)
    nodes = jnp.zeros(shape, inputs.dtype)
    if inputs.shape[1:] == shape[1:]:
        nodes = nodes.at[: cell.num_inputs].set(inputs)
    for group, group_params in zip(run.groups, params["edges"], strict=True):
        sources, targets = (np.array([cell.edges[e][i] for e in group.edges]) for i in (0, 1))
        w = None if weights is None else jnp.asarray(weights, inputs.dtype)[np.array(group.edges)]

        keep = None if kept is None else kept[np.array(group.edges)]

        def step(nodes, edge, group=group):
            params, w, keep, source, target = edge
            x = jax.lax.dynamic_index_in_dim(inputs if group.enters else nodes, source, keepdims=False)
            apply = lambda params, w, keep, x: _edge(params, w, keep, x, group, ops, partial, single_path)
            y = (jax.checkpoint(apply) if remat_edges else apply)(params, w, keep, x)
            old = jax.lax.dynamic_index_in_dim(nodes, target, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(nodes, old + y, target, 0), None

        each = (group_params, w, keep, sources, targets)
        if len(sources) > 1:
            nodes, _ = jax.lax.scan(step, nodes, jax.tree.map(jnp.asarray, each))
        else:
            nodes, _ = step(nodes, jax.tree.map(lambda leaf: leaf[0], each))
    return jnp.concatenate([nodes[i] for i in cell.output], -1)


def _edge(params, w, keep, x, group, ops, partial, single_path):
    """Σ_o w_o · o(x), on the first of K parts of the channels if K > 1; each example is multiplied by its `keep`."""
    width, stride = group.in_shape[-1], group.stride

    def apply(p, x, name):
        y = ops[name].apply(p, x, group.channels, stride)
        if keep is None or y is x:  # a skip that returns its input is not dropped
            return y
        return y * keep.reshape(-1, *[1] * (y.ndim - 1))

    applied = [lambda p, x, name=name: apply(p, x, name) for name in group.ops]
    seen = x[..., :width]
    if w is None:
        y = sum(apply(p, seen) for apply, p in zip(applied, params, strict=True))
    elif single_path:
        index = jnp.argmax(jnp.abs(w))
        branches = [lambda x, ps, i=i, apply=apply: apply(ps[i], x) for i, apply in enumerate(applied)]
        y = w[index] * jax.lax.switch(index, branches, seen, params)
    else:
        y = sum(w[i] * apply(p, seen) for i, (apply, p) in enumerate(zip(applied, params, strict=True)))
    if partial == 1:
        return y
    # The sum is 1 after a softmax. Other relaxations use it to scale or drop a whole edge.
    rest = x[..., width:] * (1 if w is None else w.sum())
    if stride > 1:
        window = (1, *[stride] * (x.ndim - 2), 1)
        padding = [(0, -n % size) for n, size in zip(rest.shape, window, strict=True)]
        rest = jax.lax.reduce_window(rest, -jnp.inf, jax.lax.max, window, window, padding)
    y = jnp.concatenate([y, rest], -1)
    return y.reshape(*y.shape[:-1], partial, width).swapaxes(-1, -2).reshape(y.shape)  # shuffled
