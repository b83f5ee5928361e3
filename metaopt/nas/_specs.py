"""Cells and networks as data: the nodes that an edge joins, the candidate ops of an edge, and the order of layers.

A cell is a directed graph. Its first nodes are its inputs, numbered from 0. Every other node is the sum of the edges
into it. Each edge mixes its candidate ops by weights w, and the output concatenates the channels of some nodes:

    node_t = Σ_{edges (s, t)} Σ_o w[edge, o] · o(node_s),    output = concat(node_t for t in `output`).

A discrete network is a network whose edges have one candidate each. It uses the same data and the same code.
"""

import json
import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt import _checks, _files
from metaopt._jaxpr import Tracer


class Edge(NamedTuple):
    """An edge from node `source` to node `target`, with the names of its candidate ops."""

    source: int
    target: int
    ops: tuple[str, ...]


class Cell(NamedTuple):
    """One kind of cell.

    Attributes:
      num_inputs: 1, the output of the layer before; or 2, the outputs of the two layers before, the older one first.
        (For the second layer, both are the output of the first layer. For the first layer, both are the data.)
      edges: in any order; mixing weights follow this order. `source` < `target`.
      output: the nodes whose channels are the output.
      preprocess: whether inputs first go through ReLU, a 1×1 convolution to the cell's channels, and normalization. If
        False, there is one input, which is used as it is. If its channels differ from the cell's, the ops on the edges
        from it change them.
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
      cells: kind -> `Cell`; all cells of one kind share their architecture, but not their weights.
      layers: the layers; the first one sees the data. The stride of a cell is the stride of the edges from its inputs.
      num_outputs: number of classes, or of regression targets.
      pooled: False gives outputs at every position, such as the nodes of a graph or the steps of a sequence.
      keep: the default rule for reading a genotype from mixing weights. A number keeps so many edges into each node, as
        in the space of DARTS. None decides every edge by itself, as in the space of NAS-Bench-201. "graph" uses
        `discretize_graph`, as in the space of NAS-Bench-101.
    """

    cells: Mapping[str, Cell]
    layers: tuple[Layer, ...]
    num_outputs: int
    pooled: bool = True
    keep: int | None | str = 2


class ElasticLayer(NamedTuple):
    """Layers of one kind whose sizes are candidates. Mixing weights choose each size that has several candidates.

    Attributes:
      kind: "conv" and "linear", with bias, normalization (if any) and ReLU; "max_pool" and "avg_pool", with windows as
        wide as the stride; "flatten", which turns positions into features of the linear layer after it.
      width: candidates for the number of channels, or features; a mask keeps the first of them. Empty for pools and
        "flatten".
      kernel: candidates for the window of a convolution along every spatial axis, odd; smaller windows are the center
        of the largest one.
      depth: candidates for the number of repetitions of the layer. Later repetitions have the same number of channels
        and stride 1.
      stride: stride of a convolution's first repetition, or of a pool.
      norm: None; "batch", for each channel over the batch and all positions; "layer", for each position over the
        channels that are kept. Both have no scale and shift.
    """

    kind: str
    width: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    depth: tuple[int, ...] = (1,)
    stride: int = 1
    norm: str | None = None


SIZES = ("width", "kernel", "depth")


class ElasticNetwork(NamedTuple):
    """Layers in order, with sizes to be searched, then a linear layer to `num_outputs`.

    A size with more than one candidate is a choice, such as "conv1.width". For relaxations, α, genotypes and searches,
    a choice is a kind of cell with one edge, whose ops are the sizes as text. If the last layer has positions, the mean
    over them precedes the outputs, unless there is a "flatten". In search, a step costs as much as the largest network:
    masks save nothing. (Methods that need a certain op do not apply to sizes, such as DARTS− with its skip, or PC-DARTS
    with its partial channels.)

    Attributes:
      layers: name -> `ElasticLayer`, in order; the first one sees the data.
      num_outputs: number of classes, or of regression targets.
    """

    layers: Mapping[str, ElasticLayer]
    num_outputs: int

    @property
    def cells(self) -> dict[str, Cell]:
        """Choice -> a cell of one edge, in the order of the layers."""
        choices = {f"{n}.{size}": getattr(layer, size) for n, layer in self.layers.items() for size in SIZES}
        edge = lambda sizes: Edge(0, 1, tuple(map(str, sizes)))
        return {name: Cell(1, (edge(sizes),), (1,), False) for name, sizes in choices.items() if len(sizes) > 1}


Space = Network | ElasticNetwork  # the spaces that a search takes

# kind -> (source, target, op) of the edges that are kept
Genotype = dict[str, tuple[tuple[int, int, str], ...]]


def check_network(network: Network) -> None:
    """Raises ValueError if a network is inconsistent; `supernet` checks shapes.

    Args:
      network: a spec.

    Raises:
      ValueError: if an edge goes backwards or to an input, if a cell has no output, or if a kind has no layer.
      ValueError: if `num_outputs < 1`, if `keep` is not a valid value, or if cells, layers or candidates have another
        form.
    """
    _checks.check_integer("num_outputs", network.num_outputs, 1)
    if not isinstance(network.cells, Mapping) or not all(isinstance(layer, Layer) for layer in network.layers):
        raise ValueError(
            "`cells` must be a dict, kind -> `nas.Cell`, and `layers` a tuple of `nas.Layer`; got "
            f"{type(network.cells).__name__}, and layers {network.layers!r}."
        )
    is_number = isinstance(network.keep, (int, np.integer)) and not isinstance(network.keep, bool)
    if network.keep not in (None, "graph") and not (is_number and int(network.keep) >= 1):
        raise ValueError(
            f'`keep` must be a number of edges (at least 1), None, or "graph" (for NAS-Bench-101\'s space); got '
            f"{network.keep!r}."
        )
    for kind, cell in network.cells.items():
        if cell.num_inputs not in (1, 2):
            raise ValueError(f"A cell has 1 or 2 inputs; the cell {kind!r} has {cell.num_inputs}.")
        if cell.num_inputs == 2 and not cell.preprocess:
            raise ValueError(f"The cell {kind!r} has two inputs of different shapes, so it needs `preprocess=True`.")
        for edge in cell.edges:
            _check_names(f"The candidates of the edge {edge.source} -> {edge.target} of the cell {kind!r}", edge.ops)
            if not 0 <= edge.source < edge.target or edge.target < cell.num_inputs:
                raise ValueError(
                    f"An edge must go from a node to a later one that is not an input; the cell {kind!r} has "
                    f"{edge.source} -> {edge.target}."
                )
            if len(edge.ops) != len(cell.edges[0].ops) or not edge.ops:
                raise ValueError(
                    f"Every edge of the cell {kind!r} must have the same number of candidates, at least 1."
                )
        if not cell.output or min(cell.output) < cell.num_inputs:
            raise ValueError(f"`output` must list nodes that are not inputs; the cell {kind!r} has {cell.output}.")
        if kind not in {layer.name for layer in network.layers}:
            raise ValueError(f"No layer uses the cell {kind!r}; each kind in `cells` needs a layer with this name.")


def _check_names(what: str, ops: Any) -> None:
    """Raises ValueError unless `ops` is a sequence of names of ops; a single text is not one."""
    if isinstance(ops, str) or not np.iterable(ops) or not all(isinstance(op, str) for op in ops):
        one = f"; for one op, use ({ops!r},)" if isinstance(ops, str) else "; pass the ops themselves to `supernet`"
        raise ValueError(f"{what} must be a sequence of names, such as ('none', 'mlp'); got {ops!r}{one}.")


def to_json(network: Space) -> str:
    """A network as JSON.

    Args:
      network: a spec.

    Returns:
      Text, with the version of the format.
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
        raise TypeError(f"names must be strings; got {reprlib.repr(value)}")
    return value


KINDS = ("conv", "linear", "max_pool", "avg_pool", "flatten")


def check_elastic(network: ElasticNetwork) -> None:
    """Raises ValueError if the sizes of a network are inconsistent; `supernet` checks shapes.

    Args:
      network: a spec.

    Raises:
      ValueError: if a kind or normalization is unknown, or if sizes are missing, not increasing, or not used by the
        kind.
    """
    _checks.check_integer("num_outputs", network.num_outputs, 1)
    if not network.layers:
        raise ValueError("An `ElasticNetwork` must have a layer.")
    for name, layer in network.layers.items():
        if layer.kind not in KINDS:
            raise ValueError(f"The kind of a layer must be one of {', '.join(KINDS)}; {name!r} has {layer.kind!r}.")
        if layer.norm not in (None, "batch", "layer"):
            raise ValueError(f'`norm` must be None, "batch" or "layer"; {name!r} has {layer.norm!r}.')
        _checks.check_integer(f"{name}.stride", layer.stride, 1)
        wants = {"width": layer.kind in ("conv", "linear"), "kernel": layer.kind == "conv", "depth": True}
        for size in SIZES:
            candidates = getattr(layer, size)
            if not isinstance(candidates, tuple) or bool(candidates) != wants[size]:
                raise ValueError(
                    f"{name}.{size} must be {'a tuple of integers' if wants[size] else 'empty'}, since the layer is "
                    f"{layer.kind!r}; got {candidates!r}."
                )
            for candidate in candidates:
                _checks.check_integer(f"{name}.{size}", candidate, 1)
            if list(candidates) != sorted(set(candidates)):
                raise ValueError(f"The candidates of {name}.{size} must increase; got {candidates}.")
        if any(k % 2 == 0 for k in layer.kernel):
            raise ValueError(f"{name}.kernel must be odd, so that each window has a center; got {layer.kernel}.")
        if layer.kind not in ("conv", "linear") and (layer.depth != (1,) or layer.norm):
            raise ValueError(f"{name} is a {layer.kind!r} layer, which must not have a depth or a normalization.")
        if layer.kind in ("linear", "flatten") and layer.stride > 1:
            raise ValueError(f"{name} is a {layer.kind!r} layer, which must not have a stride; got {layer.stride}.")


def check_single_path(kind: str, weights: Any) -> None:
    """Raises ValueError if mixing weights give an edge several ops, or are not finite.

    With `single_path` only the op with the largest weight would run. Traced weights are not checked.
    """
    if isinstance(weights, Tracer):
        return
    weights = np.asarray(weights, np.float64)
    if not np.isfinite(weights).all():
        raise ValueError(f"The mixing weights of {kind!r} must be finite; got {weights.tolist()}.")
    sizes = np.sort(np.abs(weights), -1)
    # One-hot weights may have rounding errors, such as from a straight-through estimator.
    if (sizes[..., :-1] > 1e-5 * sizes[..., -1:]).any():
        raise ValueError(
            f"`single_path` runs only the op with the largest weight, but the weights of {kind!r} give weight to "
            "several ops. Pass one-hot weights (`nas.one_hot`), or run the mixture: pass the same parameters to a "
            "`nas.supernet` of this spec without `single_path`."
        )


def read_json(text: str, *names: str) -> dict[str, Any]:
    """The fields of a JSON object of version 1; raises ValueError if `text` is something else.

    Args:
      text: JSON.
      *names: fields that the object must have.
    """
    try:
        data = _files.parse_json(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"This is not JSON with finite numbers ({error}): {text[:200]!r}.") from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != 1:
        raise ValueError(f"The version of this format must be 1; got {reprlib.repr(version)}.")
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"This format needs {', '.join(names)}; {', '.join(missing)} is missing in {text[:200]!r}.")
    return data


def complete_cell(num_nodes: int, ops: Sequence[str], *, num_inputs: int = 1, preprocess: bool = True) -> Cell:
    """A cell in which every node sees all earlier nodes, and whose output is the last node.

    Args:
      num_nodes: number of nodes besides the inputs, at least 1.
      ops: the candidates on every edge, by name.
      num_inputs: 1 or 2.
      preprocess: as for `Cell`.

    Returns:
      A `Cell`, its edges ordered by target, then source.

    Raises:
      ValueError: if `num_nodes < 1`, or if `ops` is a single text or has entries that are not texts.
    """
    _checks.check_integer("num_nodes", num_nodes, 1)
    given: Any = tuple(ops) if np.iterable(ops) and not isinstance(ops, str) else ops  # `ops` may be a generator
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
      num_outputs: number of classes.
      channels: channels of the first cells; the stem has three times as many, and reductions double them.
      num_cells: number of all cells.
      num_nodes: number of nodes of a cell, besides its two inputs.
      primitives: the candidates on every edge; ("skip_connect", "sep_conv_3x3") is the space S2 of RobustDARTS.

    Returns:
      A `Network` over `DARTS_OPS`, of two kinds, "normal" and "reduce", by default with mixing weights [14, 8] each.

    Raises:
      ValueError: if a count is below 1.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055
    """
    counts = {"num_outputs": num_outputs, "channels": channels, "num_cells": num_cells, "num_nodes": num_nodes}
    for name, value in counts.items():
        _checks.check_integer(name, value, 1)
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
    """The space of NAS-Bench-201: three stages of one kind of cell with four nodes, and residual blocks between them.

    Args:
      num_outputs: number of classes.
      channels: C of the first stage; the benchmark has 16.
      cells_per_stage: N; the benchmark has 5.

    Returns:
      A `Network` over `NAS_BENCH_201_OPS`, of the single kind "cell" with mixing weights [6, 5]. The edges are 0→1,
      0→2, 1→2, 0→3, 1→3, 2→3; each has its own argmax.

    Raises:
      ValueError: if a count is below 1.

    Source: Dong & Yang, ICLR 2020, https://arxiv.org/abs/2001.00326
    """
    counts = {"num_outputs": num_outputs, "channels": channels, "cells_per_stage": cells_per_stage}
    for name, value in counts.items():
        _checks.check_integer(name, value, 1)
    stage = lambda width: [Layer("cell", width)] * cells_per_stage
    layers = [Layer("stem", channels), *stage(channels)]
    for width in (2 * channels, 4 * channels):
        layers += [Layer("residual", width, 2), *stage(width)]
    cell = complete_cell(3, NAS_BENCH_201_PRIMITIVES, preprocess=False)
    return Network({"cell": cell}, (*layers, Layer("norm_relu", 4 * channels)), num_outputs, keep=None)


def trans_nas_bench_101_space(num_outputs: int = 10, *, channels: int = 64, cells_per_module: int = 2) -> Network:
    """The micro space of TransNAS-Bench-101: five modules of one kind of cell.

    The first, third and fifth module are reductions. A reduction doubles the channels and halves the positions, on the
    edges from the input of its first cell. The networks of the macro space have shapes that depend on the choices. No
    mixture can do this, so they exist only as a table.

    Args:
      num_outputs: number of classes or targets; the benchmark has its own decoders for tasks with outputs at every
        pixel.
      channels: C of the stem; the reductions after it double C three times. The benchmark has 64.
      cells_per_module: number of cells per module; the benchmark has 2.

    Returns:
      A `Network` over `TRANS_NAS_BENCH_101_OPS`, of the single kind "cell" with mixing weights [6, 4]. The edges are as
      in `nas_bench_201_space`. The table takes its genotypes directly:
      `trans_nas_bench_101_table().query(genotype, task)`.

    Raises:
      ValueError: if a count is below 1.

    Source: Duan et al., CVPR 2021, https://arxiv.org/abs/2105.11871
    """
    counts = {"num_outputs": num_outputs, "channels": channels, "cells_per_module": cells_per_module}
    for name, value in counts.items():
        _checks.check_integer(name, value, 1)
    layers = [Layer("stem", -(-channels // 2), 2), Layer("conv3x3", channels, 2)]
    for i in range(5):
        width = channels * 2 ** (i // 2 + 1)
        layers += [Layer("cell", width, 1 if i % 2 else 2), *[Layer("cell", width)] * (cells_per_module - 1)]
    cell = complete_cell(3, TRANS_NAS_BENCH_101_PRIMITIVES, preprocess=False)
    return Network({"cell": cell}, tuple(layers), num_outputs, keep=None)


def nas_bench_macro_space(num_outputs: int = 10, *, channels: int = 32, features: int = 1280) -> Network:
    """The space of NAS-Bench-Macro: eight layers, each an identity or one of two inverted residuals.

    Each layer is chosen separately. The first, third and sixth layer double the channels and halve the positions. A
    layer is the only path at its place, so `drop_path` would leave nothing. `nas.retraining` therefore takes only
    `drop_path=0`.

    Args:
      num_outputs: number of classes.
      channels: channels of the stem; the benchmark has 32.
      features: channels of the last convolution; the benchmark has 1,280.

    Returns:
      A `Network` over `NAS_BENCH_MACRO_OPS`, of the kinds "block0" to "block7" with mixing weights [1, 3] each. The
      table takes its genotypes directly: `nas_bench_macro_table().query(genotype, "cifar10")`.

    Raises:
      ValueError: if a count is below 1.

    Source: Su et al., CVPR 2021, https://arxiv.org/abs/2103.11922
    """
    for name, value in {"num_outputs": num_outputs, "channels": channels, "features": features}.items():
        _checks.check_integer(name, value, 1)
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
    """Conv–ReLU–Pool–Conv–ReLU–Pool–Flatten–Linear with all sizes searched, for images, sequences and volumes.

    Args:
      num_outputs: number of classes.
      widths: candidates for the channels of both convolutions.
      kernels: candidates for their windows.
      depths: candidates for the number of Conv–ReLU before each pool; (1,) gives the network of the first line.
      hidden: candidates for the features of the linear layer (with ReLU). Another linear layer gives the outputs.
      norm: normalization of the convolutions, as for `ElasticLayer`.

    Returns:
      An `ElasticNetwork`: 1,728 networks by default.

    Raises:
      ValueError: if sizes are not increasing integers.
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
    """Linear–ReLU layers for rows of a table, with a searched depth and one width for all layers.

    Args:
      num_outputs: number of classes, or of targets.
      widths: candidates for the number of features.
      depths: candidates for the number of hidden layers.
      norm: as for `ElasticLayer`.

    Returns:
      An `ElasticNetwork`.

    Raises:
      ValueError: if sizes are not increasing integers.
    """
    network = ElasticNetwork({"linear": ElasticLayer("linear", tuple(widths), (), tuple(depths), 1, norm)}, num_outputs)
    check_elastic(network)
    return network
