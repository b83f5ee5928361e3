"""Cells and networks as data: the nodes that an edge joins, the candidate ops of an edge, and the order of layers.

A cell is a directed graph. Its first nodes are its inputs, numbered from 0. Every other node is the sum of the edges
into it. Each edge mixes its candidate ops by weights w, and the output concatenates the channels of some nodes:

    node_t = Σ_{edges (s, t)} Σ_o w[edge, o] · o(node_s),    output = concat(node_t for t in `output`).

A discrete network is a network whose edges have one candidate each. It uses the same data and the same code.
"""

import json
import operator
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from metaopt import _files, _saving
from metaopt._jaxpr import Tracer


class Edge(NamedTuple):
    """An edge from node `source` to node `target`, with the names of its candidate ops. Inputs are the first nodes."""

    source: int
    target: int
    ops: tuple[str, ...]


class Cell(NamedTuple):
    """One kind of cell.

    Attributes:
      num_inputs: 1, the output of the layer before; or 2, the outputs of the two layers before, the older one first.
        (For the second layer, both are the output of the first layer. For the first layer, both are the data.)
      edges: the edges, in any order, with `source` < `target`; the rows of the mixing weights have this order.
      output: the nodes whose channels are the output.
      preprocess: whether inputs first go through ReLU, a 1×1 convolution to the cell's channels, and normalization. If
        False, the cell must have one input, which is used unchanged. If this input has another number of channels than
        the cell, the ops on the edges from it also change the number of channels.
    """

    num_inputs: int
    edges: tuple[Edge, ...]
    output: tuple[int, ...]
    preprocess: bool = True


class Layer(NamedTuple):
    """A layer of a `Network`.

    Attributes:
      name: a kind of cell, or the name of an op.
      channels: the channels of its output, or of each node of the cell.
      stride: its stride.
    """

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
      keep: the default rule for reading a genotype from mixing weights. A number keeps that many edges into each node,
        as in the space of DARTS. None chooses the op of every edge separately, as in the space of NAS-Bench-201.
        "graph" takes the strongest path from the input to the output and adds edges to it, as in the space of
        NAS-Bench-101.
    """

    cells: Mapping[str, Cell]
    layers: tuple[Layer, ...]
    num_outputs: int
    pooled: bool = True
    keep: int | None | str = 2


class ElasticLayer(NamedTuple):
    """Layers of one kind whose sizes are candidates. Mixing weights choose each size that has several candidates.

    Attributes:
      kind: "conv" and "linear" have bias, normalization (if any) and ReLU. "max_pool" and "avg_pool" have windows as
        wide as the stride. "flatten" turns positions into features of the linear layer after it.
      width: candidates for the number of channels, or features. For a smaller number, a mask keeps the first channels.
        Empty for pools and "flatten".
      kernel: candidates for the window of a convolution along every spatial axis, odd. The weights of a smaller window
        are the center of the largest window.
      depth: candidates for the number of repetitions of the layer. Later repetitions have the same number of channels
        and stride 1.
      stride: stride of a convolution's first repetition, or of a pool.
      norm: None, "batch" or "layer". "batch" normalizes each channel over the batch and all positions. "layer"
        normalizes each position over the channels that are kept. Both have no scale and shift.
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
    a choice is a kind of cell with one edge, whose ops are the sizes as text. If the output of the last layer has
    positions, the final linear layer takes the mean over them; after a "flatten", it takes all of them as features. In
    a search, a step costs as much as a step of the largest network, since smaller sizes only mask its outputs. (Some
    methods do not apply to sizes: those that need a certain op, such as DARTS− with its skip, and PC-DARTS, which needs
    ops on a part of the channels.)

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


def complete_cell(num_nodes: int, ops: Iterable[str], *, num_inputs: int = 1, preprocess: bool = True) -> Cell:
    """A cell in which every node sees all earlier nodes, and whose output is the last node.

    Args:
      num_nodes: number of nodes besides the inputs, at least 1.
      ops: the candidates on every edge, by name.
      num_inputs: 1 or 2.
      preprocess: as for `Cell`.

    Returns:
      A `Cell`, its edges ordered by target, then source.
    """
    ops, last = tuple(ops), num_inputs + num_nodes
    edges = tuple(Edge(s, t, ops) for t in range(num_inputs, last) for s in range(t))
    return Cell(num_inputs, edges, (last - 1,), preprocess)


def check_network(network: Network) -> None:
    """Raises ValueError if a network is inconsistent; `supernet` checks shapes.

    Args:
      network: a spec.

    Raises:
      ValueError: if an edge goes backwards or to an input, if two edges join the same nodes, if a cell has no output,
        or if a kind has no layer.
      ValueError: if `keep` is not a valid value, or if edges have different numbers of candidates.
    """
    is_number = isinstance(network.keep, (int, np.integer)) and not isinstance(network.keep, bool)
    if network.keep not in (None, "graph") and not (is_number and int(network.keep) >= 1):
        raise ValueError(
            f'`keep` must be a number of edges (at least 1), None, or "graph" (for NAS-Bench-101\'s space); got '
            f"{network.keep!r}."
        )
    for kind, cell in network.cells.items():
        if cell.num_inputs not in (1, 2) or (cell.num_inputs == 2 and not cell.preprocess):
            raise ValueError(
                f"A cell has one input, or two inputs of different shapes with `preprocess=True`; {kind!r} has "
                f"{cell.num_inputs}, with preprocess={cell.preprocess}."
            )
        for edge in cell.edges:
            if not 0 <= edge.source < edge.target or edge.target < cell.num_inputs:
                raise ValueError(
                    f"An edge must go from a node to a later one that is not an input; the cell {kind!r} has "
                    f"{edge.source} -> {edge.target}."
                )
            if len(edge.ops) != len(cell.edges[0].ops) or not edge.ops or isinstance(edge.ops, str):
                raise ValueError(
                    f"Every edge of the cell {kind!r} must have a tuple of candidates, the same number on all edges; "
                    f"{edge.source} -> {edge.target} has {edge.ops!r}."
                )
        if len({edge[:2] for edge in cell.edges}) < len(cell.edges):  # a genotype names an edge by its nodes
            raise ValueError(
                f"The cell {kind!r} has two edges between the same nodes: {[edge[:2] for edge in cell.edges]}. Put the "
                "candidates of both on one edge, or add a node."
            )
        if not cell.output or min(cell.output) < cell.num_inputs:
            raise ValueError(f"`output` must list nodes that are not inputs; the cell {kind!r} has {cell.output}.")
        if kind not in {layer.name for layer in network.layers}:
            raise ValueError(f"No layer uses the cell {kind!r}; each kind in `cells` needs a layer with this name.")


# kind of an elastic layer -> the fields that it uses
_USED = {
    "conv": {"width", "kernel", "depth", "stride", "norm"},
    "linear": {"width", "depth", "norm"},
    "max_pool": {"stride"},
    "avg_pool": {"stride"},
    "flatten": set(),
}


def check_elastic(network: ElasticNetwork) -> None:
    """Raises ValueError if the sizes of a network are inconsistent; `supernet` checks shapes.

    Args:
      network: a spec.

    Raises:
      ValueError: if a kind or normalization is unknown, if sizes are not increasing positive integers, or if a layer
        has a field that its kind does not use.
    """
    for name, layer in network.layers.items():
        if layer.kind not in _USED or layer.norm not in (None, "batch", "layer"):
            raise ValueError(
                f'The kind of a layer must be one of {", ".join(_USED)}, and `norm` None, "batch" or "layer"; {name!r} '
                f"has {layer.kind!r} and {layer.norm!r}."
            )
        unused = set(ElasticLayer._fields[1:]) - _USED[layer.kind]
        if wrong := [field for field in unused if getattr(layer, field) != ElasticLayer._field_defaults[field]]:
            raise ValueError(f"{name!r} is a {layer.kind!r} layer, which does not use {wrong[0]!r}; leave it out.")
        for size in {*SIZES} & _USED[layer.kind]:
            candidates = getattr(layer, size)
            positive = all(isinstance(n, (int, np.integer)) and n >= 1 for n in candidates)
            if not candidates or not positive or list(candidates) != sorted(set(candidates)):
                raise ValueError(
                    f"The candidates of {name}.{size} must be positive integers that increase; got {candidates}."
                )
        if any(k % 2 == 0 for k in layer.kernel):
            raise ValueError(f"{name}.kernel must be odd, so that each window has a center; got {layer.kernel}.")


def check_single_path(kind: str, weights: Any) -> None:
    """Raises ValueError if mixing weights give an edge several ops, or are not finite.

    With `single_path` only the op with the largest weight would run. Traced weights are not checked.
    """
    if isinstance(weights, Tracer):
        return
    sizes = np.sort(np.abs(np.asarray(weights, np.float64)), -1)
    # One-hot weights may have rounding errors, such as from a straight-through estimator.
    if not np.isfinite(sizes).all() or (sizes[..., :-1] > 1e-5 * sizes[..., -1:]).any():
        raise ValueError(
            "`single_path` runs only the op with the largest weight, so the weights must be finite, with one op for "
            f"each edge; those of {kind!r} are {np.asarray(weights).tolist()}. Pass one-hot weights (`nas.one_hot`), "
            "or run the mixture: pass the same parameters to a `nas.supernet` of this spec without `single_path`."
        )


# ---- Files -----------------------------------------------------------------------------------------------------------


def network_to_dict(network: Space) -> dict[str, Any]:
    """The JSON values of a network."""
    if isinstance(network, ElasticNetwork):
        elastic = [[name, layer._asdict()] for name, layer in network.layers.items()]
        return _plain({"elastic": elastic, "num_outputs": network.num_outputs})
    cells = {
        kind: cell._replace(edges=[list(edge) for edge in cell.edges])._asdict() for kind, cell in network.cells.items()
    }
    layers = [list(layer) for layer in network.layers]
    rest = {"num_outputs": network.num_outputs, "pooled": network.pooled, "keep": network.keep}
    return _plain({"cells": cells, "layers": layers, **rest})


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value, default=int))  # NumPy's integers


def network_from_dict(data: Mapping[str, Any]) -> Space:
    """The network of JSON values: a `Network`, or an `ElasticNetwork`.

    Raises:
      ValueError: if the values describe an invalid network. Values of another form raise other errors, which
        `metaopt.load` explains.
    """
    if "elastic" in data:
        network = _read_elastic(data)
        check_elastic(network)
    else:
        network = _read_network(data)
        check_network(network)
    return network


def _encode(network: Space) -> tuple[dict[str, Any], dict[str, Any]]:
    return network_to_dict(network), {}


def _decode(header: dict[str, Any], file: _files.Npz) -> Space:
    return network_from_dict(header)


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


_saving.register(_saving.Kind("network", Network, _encode, _decode))
_saving.register(_saving.Kind("elastic_network", ElasticNetwork, _encode, _decode))
