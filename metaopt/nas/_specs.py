"""Cells and networks as data: which nodes an edge joins, which ops are its candidates, and in what order layers stand.

A cell is a directed graph. Its first nodes are its inputs, numbered from 0, and every other node is the sum of the
edges into it; each edge mixes its candidate ops by weights w, and the output is the channels of some nodes together:

    node_t = Σ_{edges (s, t)} Σ_o w[edge, o] · o(node_s),    output = concat(node_t for t in `output`).

A discrete network is a network whose edges have one candidate each: the same data, and the same code.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metaopt import base


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
        Without it there is one input, and it has the cell's channels.
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
    """Layers in order, then the mean over all positions and a linear layer to `num_outputs`.

    Attributes:
      cells: kind -> `Cell`; all cells of one kind share their architecture, and not their weights.
      layers: the first one sees the data. The stride of a cell is that of the edges from its inputs.
      num_outputs: classes, or targets of a regression.
    """

    cells: Mapping[str, Cell]
    layers: tuple[Layer, ...]
    num_outputs: int


# kind -> (source, target, op) of the edges that are kept
Genotype = dict[str, tuple[tuple[int, int, str], ...]]


def check_network(network: Network) -> None:
    """ValueError where a network does not hold together; shapes are checked by `supernet`.

    Args:
      network: a spec.

    Raises:
      ValueError: an edge goes backwards or nowhere, a cell has no output, a kind no layer.
    """
    for kind, cell in network.cells.items():
        if cell.num_inputs not in (1, 2):
            raise ValueError(f"A cell has 1 or 2 inputs; the cell {kind!r} has {cell.num_inputs}.")
        if cell.num_inputs == 2 and not cell.preprocess:
            raise ValueError(f"The cell {kind!r} has two inputs, of different shapes: it needs `preprocess=True`.")
        for edge in cell.edges:
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


def to_json(network: Network) -> str:
    """A network as JSON.

    Args:
      network: a spec.

    Returns:
      Text, with the version of the form.
    """
    cells = {
        kind: cell._replace(edges=[list(edge) for edge in cell.edges])._asdict() for kind, cell in network.cells.items()
    }
    layers = [list(layer) for layer in network.layers]
    return json.dumps({"version": 1, "cells": cells, "layers": layers, "num_outputs": network.num_outputs})


def from_json(text: str) -> Network:
    """The network that `to_json` wrote.

    Args:
      text: JSON.

    Returns:
      A `Network`.

    Raises:
      ValueError: the text is no JSON of this form or of another version, or the network does not hold together.
    """
    data = read_json(text, "cells", "layers", "num_outputs")
    try:
        cells = {
            kind: Cell(
                cell["num_inputs"],
                tuple(Edge(source, target, tuple(ops)) for source, target, ops in cell["edges"]),
                tuple(cell["output"]),
                cell["preprocess"],
            )
            for kind, cell in data["cells"].items()
        }
        network = Network(cells, tuple(Layer(*layer) for layer in data["layers"]), data["num_outputs"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"This is no network as `to_json` writes it ({error!r}): {text[:200]!r}.") from error
    check_network(network)
    return network


def read_json(text: str, *names: str) -> dict[str, Any]:
    """What a JSON object of version 1 holds; ValueError where it is something else."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"This is no JSON: {text[:200]!r}.") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != 1:
        raise ValueError(f"The version of this form is 1; got {version!r}.")
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"This form has {', '.join(names)}; {', '.join(missing)} is missing in {text[:200]!r}.")
    return data


def complete_cell(num_nodes: int, ops: Sequence[str], *, num_inputs: int = 1, preprocess: bool = True) -> Cell:
    """A cell in which every node sees all nodes before it, and which gives out the last one.

    Args:
      num_nodes: beside the inputs, at least 1.
      ops: the candidates on every edge.
      num_inputs: 1 or 2.
      preprocess: as for `Cell`.

    Returns:
      A `Cell`, its edges ordered by target, then source.
    """
    last = num_inputs + num_nodes
    edges = tuple(Edge(s, t, tuple(ops)) for t in range(num_inputs, last) for s in range(t))
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
    for name, value in (("channels", channels), ("num_cells", num_cells), ("num_nodes", num_nodes)):
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
      1→3, 2→3.

    Raises:
      ValueError: a count is below 1.

    Source: Dong & Yang, ICLR 2020, https://arxiv.org/abs/2001.00326
    """
    for name, value in (("channels", channels), ("cells_per_stage", cells_per_stage)):
        base.check_integer(name, value, 1)
    stage = lambda width: [Layer("cell", width)] * cells_per_stage
    layers = [Layer("stem", channels), *stage(channels)]
    for width in (2 * channels, 4 * channels):
        layers += [Layer("residual", width, 2), *stage(width)]
    cell = complete_cell(3, NAS_BENCH_201_PRIMITIVES, preprocess=False)
    return Network({"cell": cell}, (*layers, Layer("norm_relu", 4 * channels)), num_outputs)
