"""Supernets: all networks of a spec in one, with mixing weights on its ops; and single networks by the same code.

If edges of a cell have the same candidates and the same shapes, they are one scan over their stacked parameters. Equal
layers that follow one another are also one scan. So a program contains each op once per group, however many edges and
layers there are. This keeps compilation short.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.nas import _elastic, _genotypes, _layers, _normalization, _ops
from metaopt.nas._specs import ElasticNetwork, Genotype, Network, Space, check_network, check_single_path

Weights = Mapping[str, Any]  # kind -> [edges, ops]


class Supernet(NamedTuple):
    """The functions and settings that `supernet` makes from a spec.

    Attributes:
      init: `(key) -> params`.
      apply: `(params, weights, x, drop_path=None, mask=None, statistics=None) -> [N, num_outputs]`, with
        `x: [N, *in_shape]`. If the spec is not `pooled`, the axes of positions stay between N and num_outputs. If
        `weights=None`, every op has weight 1, and all sizes of an `ElasticNetwork` are the largest. Integers in x are
        converted to floating point without scaling: uint8 images are 0..255. If the first layer of a network does not
        normalize, it learns better from x / 255. Without `statistics`, this is the network in training and search: it
        normalizes by the batch, so the outputs of a row depend on the other rows. A single row without positions raises
        a ValueError. With `statistics` (from `statistics` below), the outputs of a row depend only on this row: predict
        in this way. With `drop_path=(key, rate)`, each edge is dropped from each example with probability `rate`. An
        edge whose op returns its input unchanged is never dropped. The remaining edges are scaled by 1 / (1 − rate). An
        `ElasticNetwork` has no edges to drop. `mask` [N] is 1 for a real row and 0 for padding. With it, the outputs of
        real rows equal the outputs of a batch of only these rows, up to rounding: `nas.normalized` leaves padding out.
        (If your own op computes over the batch in another way, it uses all rows, even with `mask` or `statistics`.)
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


def supernet(
    network: Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    partial: int = 1,
    single_path: bool = False,
    remat_edges: bool = False,
) -> Supernet:
    """Makes the supernet of a spec, and checks all shapes.

        node_t = Σ_{edges (s, t)} Σ_o w[edge, o] · o(node_s)

    w are mixing weights, which a relaxation makes of α. They have one row for each edge of a kind of cell, and all
    cells of the kind share them. The supernet is differentiable in w and in the parameters, in any mode. `vmap` over
    tasks works, even if each task has its own w. The memory of the backward pass grows with the number of ops that run.

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
      ValueError: if the spec is inconsistent.
      KeyError: if `ops` lacks an op of the network.
      ValueError: if the input or output of an op has a wrong shape.
      ValueError: if K does not divide the channels, or if K > 1 for an `ElasticNetwork`.

    Sources: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055; for K, Xu et al., ICLR 2020,
    https://arxiv.org/abs/1907.05737

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import nas
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    >>> table = nas.Network(
    ...     {"cell": cell}, (nas.Layer("linear", 8), nas.Layer("cell", 8)), num_outputs=3
    ... )
    >>> net = nas.supernet(table, (5,), ops=nas.BLOCKS)
    >>> alpha = nas.init_alpha(jax.random.key(0), table)
    >>> weights = nas.mixing_weights(nas.softmax(), table, alpha, jax.random.key(1))
    >>> params = jax.eval_shape(net.init, jax.random.key(2))
    >>> jax.eval_shape(net.apply, params, weights, jnp.ones((4, 5))).shape
    (4, 3)
    """
    in_shape = tuple(in_shape)
    if isinstance(network, ElasticNetwork):
        if partial > 1:
            raise ValueError(f"`partial` must be 1 for a network of sizes, which has no ops; got {partial}.")
        return _elastic_supernet(network, in_shape, single_path, remat_edges)
    check_network(network)
    runs = _layers.build(network, in_shape, ops, partial)
    net = _Net(network, in_shape, ops, runs, _layers.Options(partial, single_path, remat_edges))

    def apply(params, weights, x, drop_path=None):
        return head(params, _last_layer(net, params, weights, x, drop_path))

    def head(params, last):
        return _layers.head(network, params["head"], last)

    features = functools.partial(_all_layers, net)
    inherit = functools.partial(_inherit, net)
    over_rows = functools.partial(_over_rows, in_shape)
    rows = over_rows(apply), over_rows(features), head, inherit, _statistics_fn(in_shape, apply)
    return Supernet(functools.partial(_init, net), *rows, network, in_shape, single_path, partial)


def _elastic_supernet(network: ElasticNetwork, in_shape: tuple[int, ...], single_path: bool, remat: bool) -> Supernet:
    functions = _elastic.elastic_functions(network, in_shape, single_path=single_path, remat=remat)
    init, apply, features, head, sliced = functions
    inherit = lambda params, genotype: sliced(params, _genotypes.discrete(network, genotype))
    over_rows = functools.partial(_over_rows, in_shape)
    rows = over_rows(apply), over_rows(features), head, inherit, _statistics_fn(in_shape, apply)
    return Supernet(init, *rows, network, in_shape, single_path)


# ---- A network of cells ---------------------------------------------------------------------------------------------


class _Net(NamedTuple):
    """A network of cells with its shapes."""

    network: Network
    in_shape: tuple[int, ...]
    ops: Mapping[str, _ops.Op]
    runs: list[_layers.Run]
    options: _layers.Options


def _init(net: _Net, key: jax.Array) -> base.Params:
    """Initial parameters {"layers": one entry for each run, "head": {"w", "b"}}."""
    network, features = net.network, net.runs[-1].out_shape[-1]
    # One split for all keys: every draw of `jax.random` takes the compiler half a second.
    nums = [run.length * _layers.num_keys(run) for run in net.runs]
    head_key, *keys = jnp.split(jax.random.split(key, 1 + sum(nums)), np.cumsum([1, *nums[:-1]]))
    layers = [
        _layers.init_run(k, run, network.cells.get(run.layer.name), net.ops)
        for k, run in zip(keys, net.runs, strict=True)
    ]
    head = {"w": _ops.uniform(head_key[0], (features, network.num_outputs), features)}
    return {"layers": layers, "head": {**head, "b": jnp.zeros(network.num_outputs)}}


def _last_layer(net: _Net, params, weights, x, drop_path) -> jax.Array:
    """The output of the last layer."""
    return _run_layers(net, params, weights, x, drop_path, every=False)[-1]


def _all_layers(net: _Net, params, weights, x, drop_path=None) -> list[jax.Array]:
    """The outputs of all layers, in order."""
    return _run_layers(net, params, weights, x, drop_path, every=True)


def _run_layers(net: _Net, params, weights, x: jax.Array, drop_path, every: bool) -> list[jax.Array]:
    """A list of the outputs of all layers if `every`, otherwise of only the last output."""
    network, runs = net.network, net.runs
    kept = _layers.kept_edges(drop_path, runs, network, x) if drop_path is not None else [None] * len(runs)
    before, last = x, x
    outputs: list[Any] = []
    for run, stacked, keep in zip(runs, params["layers"], kept, strict=True):
        cell = network.cells.get(run.layer.name)
        w = _cell_weights(net, run, weights)

        def step(carry, xs, run=run, cell=cell, w=w):
            (before, last), (layer, keep) = carry, xs
            if cell is None:
                new = net.ops[run.layer.name].apply(layer, last, run.layer.channels, run.layer.stride)
            else:
                inputs = [before, last][2 - cell.num_inputs :]
                new = _layers.apply_cell(cell, run, net.ops, net.options, layer, w, keep, inputs)
            return (last, new), new if every else None

        if len(run.in_shapes) == 1:
            before = last  # not read; the carry of a scan must keep its shapes
        if run.length > 1:
            (before, last), new = jax.lax.scan(step, (before, last), (stacked, keep), length=run.length)
            outputs += [] if new is None else list(new)
        else:
            (before, last), new = step((before, last), jax.tree.map(lambda leaf: leaf[0], (stacked, keep)))
            outputs.append(new)
        if run is runs[0] and run.length == 1:
            # Both inputs of the second layer are the output of the first one. (A longer first run also has the second
            # layer, and leaves its last two outputs.)
            before = last
    return outputs if every else [last]


def _cell_weights(net: _Net, run: _layers.Run, weights: Weights | None) -> Any:
    """The weights [edges, ops] of a run of cells; None for a single op, or if all ops have the weight 1."""
    cell = net.network.cells.get(run.layer.name)
    if weights is None or cell is None:
        return None
    w, shape = weights[run.layer.name], (len(cell.edges), len(cell.edges[0].ops))
    if w.shape != shape:
        raise ValueError(f"The weights of {run.layer.name!r} must have the shape {shape}; got {w.shape}.")
    if net.options.single_path:
        check_single_path(run.layer.name, w)
    return w


def _inherit(net: _Net, params: base.Params, genotype: Genotype) -> base.Params:
    """The parameters of the discrete network of a genotype."""
    small = _genotypes.discrete(net.network, genotype)
    whole = _layers.unstacked(params["layers"], net.runs, net.network)
    runs = _layers.build(small, net.in_shape, net.ops, net.options.partial)
    return {"layers": _layers.stacked_layers(whole, runs, small), "head": params["head"]}


# ---- Rows, masks and statistics -------------------------------------------------------------------------------------


def _as_rows(in_shape: tuple[int, ...], x: Any) -> jax.Array:
    """Returns the inputs in floating point. Raises ValueError if they have another shape than the network's."""
    check_shape("x", x, in_shape)
    return jnp.asarray(x, jnp.result_type(x, float))


def check_shape(name: str, x: Any, in_shape: tuple[int, ...], *, of_task: bool = False) -> None:
    """Raises ValueError if `x` is not [N, *in_shape].

    Args:
      name: the name of `x` in the error message.
      x: the inputs.
      in_shape: the shape of one input.
      of_task: whether `x` belongs to a task, so that a leading axis may be that of several tasks.
    """
    shape, advice = np.shape(x), ""
    if shape and shape[1:] == in_shape:
        return
    if shape == in_shape:
        advice = f" For one input, use `{name}[None]`."
    elif (*shape[1:], 1) == in_shape:
        advice = f" Add an axis for the channel, `{name}[..., None]`."
    elif of_task and shape[2:] == in_shape:
        advice = " For a batch of tasks, use `hypergrad.over_tasks`."
    raise ValueError(f"`{name}` must have the shape (N, {', '.join(map(str, in_shape))}); got {shape}.{advice}")


def _over_rows(in_shape: tuple[int, ...], fn: Callable) -> Callable:
    """Extends `apply` or `features` to integers, a mask of rows, and statistics for normalization."""

    def over_rows(params, weights, x, drop_path=None, mask=None, statistics=None):
        x = _as_rows(in_shape, x)
        run = lambda x: fn(params, weights, x, drop_path)
        if statistics is not None:
            return _normalization.at_statistics(run, x, statistics)
        _normalization.check_one_row(run, x)
        return _normalization.over_real_rows(run, x, mask)

    return over_rows


def _statistics_fn(in_shape: tuple[int, ...], apply: Callable) -> Callable:
    """Makes `Supernet.statistics`."""

    def statistics(params, weights, x, mask=None):
        x = _as_rows(in_shape, x)
        run = lambda x: apply(params, weights, x)
        _normalization.check_one_row(run, x)
        return _normalization.statistics_of(run, x, mask)

    return statistics


def init_alpha(key: jax.Array, network: Space, *, scale: float = 1e-3) -> dict[str, jax.Array]:
    """Draws an initial α: `scale` · N(0, 1), with one leaf for each kind of cell, or for each choice of a size.

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
