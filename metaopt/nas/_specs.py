"""Cells and networks as data: which nodes an edge joins, which ops are its candidates, and in what order layers stand.

A cell is a directed graph. Its first nodes are its inputs, numbered from 0, and every other node is the sum of the
edges into it; each edge mixes its candidate ops by weights w, and the output is the channels of some nodes together:

    node_t = Σ_{edges (s, t)} Σ_o w[edge, o] · o(node_s),    output = concat(node_t for t in `output`).

A discrete network is a network whose edges have one candidate each: the same data, and the same code.
"""

import json
import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from metaopt import _files, base


class Edge(NamedTuple):
    """From node `source` to node `target`, with the names of the ops that are its candidates."""

    source: int
    target: int
    ops: tuple[str, ...]


class Cell(NamedTuple):
    """One kind of cell.

    Attributes:
      num_inputs: 1, the output of the layer before; or 2, those of the two layers before, older first. (Of the second
        layer both are the first one's output; of the first layer, the data.)
      edges: in any order; mixing weights follow it. `source` < `target`.
      output: the nodes whose channels are the output.
      preprocess: whether inputs first go through ReLU, a 1×1 convolution to the cell's channels, and normalization.
        Without it there is one input, as it is: where it has other channels, the ops on the edges from it change them.
    """

    num_inputs: int
    edges: tuple[Edge, ...]
    output: tuple[int, ...]
    preprocess: bool = True


class Layer(NamedTuple):
    """A cell of a kind, or a single op, by name, with the channels of its nodes and its stride."""

    name: str
    channels: int
    stride: int = 1


class Network(NamedTuple):
    """Layers in order, then the mean over all positions, if `pooled`, and a linear layer to `num_outputs`.

    Attributes:
      cells: kind -> `Cell`; all cells of one kind share their architecture, and not their weights.
      layers: the first one sees the data. The stride of a cell is that of the edges from its inputs.
      num_outputs: classes, or targets of a regression.
      pooled: False gives outputs at every position: of a graph's nodes, a sequence's steps.
      keep: how a genotype is read from mixing weights, unless it is said: so many edges into each node, as in DARTS's
        space; None, every edge by itself, as in NAS-Bench-201's; "graph", by `discretize_graph`, as in
        NAS-Bench-101's.
    """

    cells: Mapping[str, Cell]
    layers: tuple[Layer, ...]
    num_outputs: int
    pooled: bool = True
    keep: int | None | str = 2


class ElasticLayer(NamedTuple):
    """Layers of one kind whose sizes are candidates: those with more than one are chosen by mixing weights.

    Attributes:
      kind: "conv" and "linear", with bias, normalization (if any) and ReLU; "max_pool" and "avg_pool" over windows as
        wide as the stride; "flatten", which makes positions into features of the linear layer behind it.
      width: candidates for channels, or features; the first of them that a mask keeps. None of pools and "flatten".
      kernel: candidates for the window of a convolution along every spatial axis, odd; smaller ones are the center of
        the largest.
      depth: candidates for how many times the layer is there, the later ones with as many channels and stride 1.
      stride: of a convolution's first time, or a pool.
      norm: None; "batch", of each channel over the batch and all positions; "layer", over the channels of each position
        that are there. Both without scale and shift.
    """

    kind: str
    width: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    depth: tuple[int, ...] = (1,)
    stride: int = 1
    norm: str | None = None


SIZES = ("width", "kernel", "depth")


class ElasticNetwork(NamedTuple):
    """Layers in order, of which sizes are searched, then a linear layer to `num_outputs`.

    A size with more than one candidate is a choice, "conv1.width": for relaxations, α, genotypes and searches it is a
    kind of cell with one edge, whose ops are the sizes as text. Between a last layer with positions and the outputs is
    the mean over them, unless "flatten" stands there. In search a step costs what the largest network costs: masks save
    nothing. (What asks for a certain op has nothing to say to sizes: DARTS− its skip, PC-DARTS its partial channels.)

    Attributes:
      layers: name -> `ElasticLayer`, in order; the first one sees the data.
      num_outputs: classes, or targets of a regression.
    """

    layers: Mapping[str, ElasticLayer]
    num_outputs: int

    @property
    def cells(self) -> dict[str, Cell]:
        """Choice -> a cell of one edge, in the order of the layers."""
        choices = {f"{n}.{size}": getattr(layer, size) for n, layer in self.layers.items() for size in SIZES}
        edge = lambda sizes: Edge(0, 1, tuple(map(str, sizes)))
        return {name: Cell(1, (edge(sizes),), (1,), False) for name, sizes in choices.items() if len(sizes) > 1}


Space = Network | ElasticNetwork  # what a search may be over

# kind -> (source, target, op) of the edges that are kept
Genotype = dict[str, tuple[tuple[int, int, str], ...]]


def check_network(network: Network) -> None:
    """ValueError where a network does not hold together; shapes are checked by `supernet`.

    Args:
      network: a spec.

    Raises:
      ValueError: an edge goes backwards or nowhere, a cell has no output, a kind no layer; `num_outputs` is below 1;
        `keep` is no such value; cells, layers or candidates have another form.
    """
    base.check_integer("num_outputs", network.num_outputs, 1)
    if not isinstance(network.cells, Mapping) or not all(isinstance(layer, Layer) for layer in network.layers):
        raise ValueError(
            "`cells` must be a dict, kind -> `nas.Cell`, and `layers` a tuple of `nas.Layer`; got "
            f"{type(network.cells).__name__}, and layers {network.layers!r}."
        )
    is_number = isinstance(network.keep, (int, np.integer)) and not isinstance(network.keep, bool)
    if network.keep not in (None, "graph") and not (is_number and int(network.keep) >= 1):
        raise ValueError(
            f'`keep` must be a number of edges, at least 1, None, or "graph", which NAS-Bench-101\'s space says; got '
            f"{network.keep!r}."
        )
    for kind, cell in network.cells.items():
        if cell.num_inputs not in (1, 2):
            raise ValueError(f"A cell has 1 or 2 inputs; the cell {kind!r} has {cell.num_inputs}.")
        if cell.num_inputs == 2 and not cell.preprocess:
            raise ValueError(f"The cell {kind!r} has two inputs, of different shapes: it needs `preprocess=True`.")
        for edge in cell.edges:
            _check_names(f"The candidates of the edge {edge.source} -> {edge.target} of the cell {kind!r}", edge.ops)
            if not 0 <= edge.source < edge.target or edge.target < cell.num_inputs:
                raise ValueError(
                    f"An edge goes from a node to a later one that is no input; the cell {kind!r} has {edge.source} -> "
                    f"{edge.target}."
                )
            if len(edge.ops) != len(cell.edges[0].ops) or not edge.ops:
                raise ValueError(
                    f"Every edge of the cell {kind!r} must have the same number of candidates, at least 1."
                )
        if not cell.output or min(cell.output) < cell.num_inputs:
            raise ValueError(f"`output` names nodes that are no inputs; that of {kind!r} is {cell.output}.")
        if kind not in {layer.name for layer in network.layers}:
            raise ValueError(f"No layer is of the kind {kind!r}.")


def _check_names(what: str, ops: Any) -> None:
    """ValueError where what should be names of ops is one text, or something else."""
    if isinstance(ops, str) or not np.iterable(ops) or not all(isinstance(op, str) for op in ops):
        one = f"; of one op that is ({ops!r},)" if isinstance(ops, str) else ", and the ops themselves go to `supernet`"
        raise ValueError(f"{what} must be names, such as ('none', 'mlp'); got {ops!r}{one}.")


def to_json(network: Space) -> str:
    """A network as JSON.

    Args:
      network: a spec.

    Returns:
      Text, with the version of the form.
    """
    if isinstance(network, ElasticNetwork):
        elastic = [[name, layer._asdict()] for name, layer in network.layers.items()]
        return json.dumps({"version": 1, "elastic": elastic, "num_outputs": network.num_outputs}, default=int)
    cells = {
        kind: cell._replace(edges=[list(edge) for edge in cell.edges])._asdict() for kind, cell in network.cells.items()
    }
    layers = [list(layer) for layer in network.layers]
    rest = {"num_outputs": network.num_outputs, "pooled": network.pooled, "keep": network.keep}
    return json.dumps({"version": 1, "cells": cells, "layers": layers, **rest}, default=int)  # NumPy's integers


def from_json(text: str) -> Space:
    """The network that `to_json` wrote.

    Args:
      text: JSON.

    Returns:
      A `Network`, or an `ElasticNetwork`.

    Raises:
      ValueError: if the text is not JSON of this form, is of another version, or describes an invalid network.
    """
    data = read_json(text)
    try:
        network = _read_elastic(data) if "elastic" in data else _read_network(data)
        if isinstance(network, ElasticNetwork):
            check_elastic(network)
        else:
            check_network(network)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"This is not a network that `to_json` wrote ({reason}): {text[:200]!r}.") from error
    return network


def _read_elastic(data: Mapping[str, Any]) -> ElasticNetwork:
    layers = {}
    for name, fields in data["elastic"]:
        layers[_text(name)] = ElasticLayer(**{**fields, **{size: tuple(fields[size]) for size in SIZES}})
    return ElasticNetwork(layers, data["num_outputs"])


def _read_network(data: Mapping[str, Any]) -> Network:
    cells = {
        kind: Cell(
            operator.index(cell["num_inputs"]),
            tuple(Edge(operator.index(s), operator.index(t), tuple(map(_text, ops))) for s, t, ops in cell["edges"]),
            tuple(map(operator.index, cell["output"])),
            bool(cell["preprocess"]),
        )
        for kind, cell in data["cells"].items()
    }
    layers = tuple(Layer(_text(name), *map(operator.index, sizes)) for name, *sizes in data["layers"])
    return Network(cells, layers, data["num_outputs"], bool(data.get("pooled", True)), data.get("keep", 2))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"names must be texts; got {reprlib.repr(value)}")
    return value


KINDS = ("conv", "linear", "max_pool", "avg_pool", "flatten")


def check_elastic(network: ElasticNetwork) -> None:
    """ValueError where the sizes of a network do not hold together; shapes are checked by `supernet`.

    Args:
      network: a spec.

    Raises:
      ValueError: an unknown kind or normalization, sizes that are missing, not increasing, or of no use.
    """
    base.check_integer("num_outputs", network.num_outputs, 1)
    if not network.layers:
        raise ValueError("An `ElasticNetwork` must have a layer.")
    for name, layer in network.layers.items():
        if layer.kind not in KINDS:
            raise ValueError(f"The kind of a layer is one of {', '.join(KINDS)}; {name!r} has {layer.kind!r}.")
        if layer.norm not in (None, "batch", "layer"):
            raise ValueError(f'`norm` must be None, "batch" or "layer"; {name!r} has {layer.norm!r}.')
        base.check_integer(f"{name}.stride", layer.stride, 1)
        wants = {"width": layer.kind in ("conv", "linear"), "kernel": layer.kind == "conv", "depth": True}
        for size in SIZES:
            candidates = getattr(layer, size)
            if not isinstance(candidates, tuple) or bool(candidates) != wants[size]:
                raise ValueError(
                    f"{name}.{size} must be {'a tuple of integers' if wants[size] else 'empty'}, since the layer is "
                    f"{layer.kind!r}; got {candidates!r}."
                )
            for candidate in candidates:
                base.check_integer(f"{name}.{size}", candidate, 1)
            if list(candidates) != sorted(set(candidates)):
                raise ValueError(f"The candidates of {name}.{size} must increase; got {candidates}.")
        if any(k % 2 == 0 for k in layer.kernel):
            raise ValueError(f"{name}.kernel must be odd, so that windows have one center; got {layer.kernel}.")
        if layer.kind not in ("conv", "linear") and (layer.depth != (1,) or layer.norm):
            raise ValueError(f"{name} is {layer.kind!r}, which has no depth and no normalization.")
        if layer.kind in ("linear", "flatten") and layer.stride > 1:
            raise ValueError(f"{name} is {layer.kind!r}, which has no stride; got {layer.stride}.")


def check_single_path(kind: str, weights: Any) -> None:
    """ValueError where mixing weights that are not traced give an edge several ops, of which one would run, or are not
    finite, so that none is the largest."""
    if isinstance(weights, Tracer):
        return
    weights = np.asarray(weights, np.float64)
    if not np.isfinite(weights).all():
        raise ValueError(f"The mixing weights of {kind!r} must be finite; got {weights.tolist()}.")
    sizes = np.sort(np.abs(weights), -1)
    # One-hot weights may be off by rounding, as those of a straight-through estimator.
    if (sizes[..., :-1] > 1e-5 * sizes[..., -1:]).any():
        raise ValueError(
            f"`single_path` runs the op with the largest weight alone, and the weights of {kind!r} give weight to "
            "several: pass one-hot weights (`nas.one_hot`), or the same parameters to a `nas.supernet` of this spec "
            "without `single_path`, which runs the mixture."
        )


def read_json(text: str, *names: str) -> dict[str, Any]:
    """The fields of a JSON object of version 1; ValueError if `text` is something else.

    Args:
      text: JSON.
      *names: fields that it must have.
    """
    try:
        data = _files.parse_json(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"This is not JSON with finite numbers ({error}): {text[:200]!r}.") from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != 1:
        raise ValueError(f"The version of this form is 1; got {reprlib.repr(version)}.")
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"This form has {', '.join(names)}; {', '.join(missing)} is missing in {text[:200]!r}.")
    return data


def complete_cell(num_nodes: int, ops: Sequence[str], *, num_inputs: int = 1, preprocess: bool = True) -> Cell:
    """A cell in which every node sees all nodes before it, and which gives out the last one.

    Args:
      num_nodes: beside the inputs, at least 1.
      ops: the candidates on every edge, by name.
      num_inputs: 1 or 2.
      preprocess: as for `Cell`.

    Returns:
      A `Cell`, its edges ordered by target, then source.

    Raises:
      ValueError: `num_nodes` is below 1; `ops` is a text, or not of texts.
    """
    base.check_integer("num_nodes", num_nodes, 1)
    given: Any = tuple(ops) if np.iterable(ops) and not isinstance(ops, str) else ops  # also of a generator
    _check_names("`ops`", given)
    last = num_inputs + num_nodes
    edges = tuple(Edge(s, t, given) for t in range(num_inputs, last) for s in range(t))
    return Cell(num_inputs, edges, (last - 1,), preprocess)


# ---- Named spaces ---------------------------------------------------------------------------------------------------

DARTS_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NAS_BENCH_201_PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
TRANS_NAS_BENCH_101_PRIMITIVES = ("none", "skip_connect", "conv1x1", "conv3x3")
NAS_BENCH_MACRO_PRIMITIVES = ("identity", "MB3_K3", "MB6_K5")


def darts_space(
    num_outputs: int = 10,
    *,
    channels: int = 16,
    num_cells: int = 8,
    num_nodes: int = 4,
    primitives: Sequence[str] = DARTS_PRIMITIVES,
) -> Network:
    """The DARTS space: normal cells, and reduction cells at a third and two thirds of the depth.

    Args:
      num_outputs: classes.
      channels: of the first cells; the stem has three times as many, and reductions double them.
      num_cells: in all.
      num_nodes: of a cell, beside its two inputs.
      primitives: the candidates on every edge; ("skip_connect", "sep_conv_3x3") is RobustDARTS's S2.

    Returns:
      A `Network` over `DARTS_OPS`, of two kinds, "normal" and "reduce", with mixing weights [14, 8] each.

    Raises:
      ValueError: a count is below 1.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055
    """
    counts = {"num_outputs": num_outputs, "channels": channels, "num_cells": num_cells, "num_nodes": num_nodes}
    for name, value in counts.items():
        base.check_integer(name, value, 1)
    cell = complete_cell(num_nodes, primitives, num_inputs=2)._replace(output=tuple(range(2, 2 + num_nodes)))
    layers, width = [Layer("stem", 3 * channels)], channels
    for i in range(num_cells):
        reduces = i in (num_cells // 3, 2 * num_cells // 3)
        width *= 2 if reduces else 1
        layers.append(Layer("reduce", width, 2) if reduces else Layer("normal", width))
    kinds = {layer.name for layer in layers}
    cells = {kind: cell for kind in ("normal", "reduce") if kind in kinds}
    return Network(cells, tuple(layers), num_outputs)


def nas_bench_201_space(num_outputs: int = 10, *, channels: int = 16, cells_per_stage: int = 5) -> Network:
    """The space of NAS-Bench-201: three stages of one kind of cell with four nodes, residual blocks between them.

    Args:
      num_outputs: classes.
      channels: C of the first stage; the benchmark has 16.
      cells_per_stage: N; the benchmark has 5.

    Returns:
      A `Network` over `NAS_BENCH_201_OPS`, of the one kind "cell" with mixing weights [6, 5]: edges 0→1, 0→2, 1→2, 0→3,
      1→3, 2→3, each of which has its own argmax.

    Raises:
      ValueError: a count is below 1.

    Source: Dong & Yang, ICLR 2020, https://arxiv.org/abs/2001.00326
    """
    counts = {"num_outputs": num_outputs, "channels": channels, "cells_per_stage": cells_per_stage}
    for name, value in counts.items():
        base.check_integer(name, value, 1)
    stage = lambda width: [Layer("cell", width)] * cells_per_stage
    layers = [Layer("stem", channels), *stage(channels)]
    for width in (2 * channels, 4 * channels):
        layers += [Layer("residual", width, 2), *stage(width)]
    cell = complete_cell(3, NAS_BENCH_201_PRIMITIVES, preprocess=False)
    return Network({"cell": cell}, (*layers, Layer("norm_relu", 4 * channels)), num_outputs, keep=None)


def trans_nas_bench_101_space(num_outputs: int = 10, *, channels: int = 64, cells_per_module: int = 2) -> Network:
    """The micro space of TransNAS-Bench-101: five modules of one kind of cell, of which every other one is a reduction.

    A reduction doubles the channels, and halves the positions, on the edges from its first cell's input. The networks
    of the macro space change shapes by what is chosen, which no mixture has: they are a table alone.

    Args:
      num_outputs: classes, or targets; the benchmark has decoders of their own for tasks with outputs at every pixel.
      channels: C of the stem, behind which reductions double it three times; the benchmark has 64.
      cells_per_module: the benchmark has 2.

    Returns:
      A `Network` over `TRANS_NAS_BENCH_101_OPS`, of the one kind "cell" with mixing weights [6, 4]: edges as in
      `nas_bench_201_space`. Its genotypes are asked for as they are: `trans_nas_bench_101_table().query(found, task)`.

    Raises:
      ValueError: a count is below 1.

    Source: Duan et al., CVPR 2021, https://arxiv.org/abs/2105.11871
    """
    counts = {"num_outputs": num_outputs, "channels": channels, "cells_per_module": cells_per_module}
    for name, value in counts.items():
        base.check_integer(name, value, 1)
    layers = [Layer("stem", -(-channels // 2), 2), Layer("conv3x3", channels, 2)]
    for i in range(5):
        width = channels * 2 ** (i // 2 + 1)
        layers += [Layer("cell", width, 1 if i % 2 else 2), *[Layer("cell", width)] * (cells_per_module - 1)]
    cell = complete_cell(3, TRANS_NAS_BENCH_101_PRIMITIVES, preprocess=False)
    return Network({"cell": cell}, tuple(layers), num_outputs, keep=None)


def nas_bench_macro_space(num_outputs: int = 10, *, channels: int = 32, features: int = 1280) -> Network:
    """The space of NAS-Bench-Macro: eight layers, each an identity or one of two inverted residuals, chosen one by one.

    The first, third and sixth layer double the channels and halve the positions. A layer is all that there is at its
    place: `drop_path` would leave nothing, and `methods.retraining` takes `drop_path=0` alone.

    Args:
      num_outputs: classes.
      channels: of the stem; the benchmark has 32.
      features: of the last convolution; the benchmark has 1,280.

    Returns:
      A `Network` over `NAS_BENCH_MACRO_OPS`, of the kinds "block0" to "block7" with mixing weights [1, 3] each. Its
      genotypes are asked for as they are: `nas_bench_macro_table().query(genotype, "cifar10")`.

    Raises:
      ValueError: a count is below 1.

    Source: Su et al., CVPR 2021, https://arxiv.org/abs/2103.11922
    """
    for name, value in {"num_outputs": num_outputs, "channels": channels, "features": features}.items():
        base.check_integer(name, value, 1)
    layers, width = [Layer("stem_relu", channels)], channels
    for i in range(8):
        halves = i in (0, 2, 5)
        width *= 2 if halves else 1
        layers.append(Layer(f"block{i}", width, 2 if halves else 1))
    cell = Cell(1, (Edge(0, 1, NAS_BENCH_MACRO_PRIMITIVES),), (1,), preprocess=False)
    layers.append(Layer("last_relu", features))
    return Network({f"block{i}": cell for i in range(8)}, tuple(layers), num_outputs, keep=None)


def conv_net_space(
    num_outputs: int = 10,
    *,
    widths: Sequence[int] = (16, 32, 48, 64),
    kernels: Sequence[int] = (3, 5, 7),
    depths: Sequence[int] = (1, 2),
    hidden: Sequence[int] = (256, 512, 1024),
    norm: str | None = None,
) -> ElasticNetwork:
    """Conv–ReLU–Pool–Conv–ReLU–Pool–Flatten–Linear with all of its sizes searched, for images, sequences and volumes.

    Args:
      num_outputs: classes.
      widths: candidates for the channels of both convolutions.
      kernels: for their windows.
      depths: for how often Conv–ReLU stands before each pool; (1,) is the network as written above.
      hidden: for the features of the linear layer (and ReLU), behind which is the one to the outputs.
      norm: of the convolutions, as for `ElasticLayer`.

    Returns:
      An `ElasticNetwork`: 1,728 networks by default.

    Raises:
      ValueError: sizes are not integers that increase.
    """
    conv = ElasticLayer("conv", tuple(widths), tuple(kernels), tuple(depths), norm=norm)
    pool = ElasticLayer("max_pool", stride=2)
    layers = {"conv1": conv, "pool1": pool, "conv2": conv, "pool2": pool, "flatten": ElasticLayer("flatten")}
    network = ElasticNetwork({**layers, "linear": ElasticLayer("linear", tuple(hidden))}, num_outputs)
    check_elastic(network)
    return network


def mlp_space(
    num_outputs: int,
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (1, 2, 3, 4),
    norm: str | None = None,
) -> ElasticNetwork:
    """Linear–ReLU, as often as `depths` says, for rows of a table: one width for all layers.

    Args:
      num_outputs: classes, or targets.
      widths: candidates for the features.
      depths: for the hidden layers.
      norm: as for `ElasticLayer`.

    Returns:
      An `ElasticNetwork`.

    Raises:
      ValueError: sizes are not integers that increase.
    """
    network = ElasticNetwork({"linear": ElasticLayer("linear", tuple(widths), (), tuple(depths), 1, norm)}, num_outputs)
    check_elastic(network)
    return network
