"""Genotypes as integers and back, for searchers that use no gradient."""

import itertools
from collections.abc import Mapping

from metaopt import spaces
from metaopt.nas._genotypes import NONE, check_genotype, edges_kept
from metaopt.nas._specs import Cell, Edge, ElasticNetwork, Genotype, Space


def configuration_space(
    network: Space, *, keep: int | None | str = "space"
) -> dict[str, spaces.Integer | spaces.Fixed]:
    """Returns the choices of a space as integers, for searchers without a gradient: evolution, random search, Optuna.

    Different configurations are different genotypes. `genotype_from_configuration` and `genotype_to_configuration`
    convert between configurations and genotypes.

    Args:
      network: the spec of a supernet.
      keep: edges into each node, as for `random_genotype`; "space" uses the rule of the network.

    Returns:
      name -> the range of an index. The names and indices are:

      - with `keep=None`: "kind.source-target" is the index of an edge's op;
      - if `keep` is a number: "kind.inputs<node>" is the index of a set of that many edges into a node. The sets have
        the order of `itertools.combinations`. The entry is absent if only one set is possible. "kind.op<i>" is the
        index of the op of the i-th edge in these sets, among its ops other than "none". `darts_space` has 11 entries
        per kind, the digits of NAS-Bench-301;
      - for an `ElasticNetwork`: the name of a size, such as "conv1.width", is the index of its value.

    Raises:
      ValueError: if the network is a NAS-Bench-101 space, whose cells are graphs.
      ValueError: if `keep` is a number and only some edges of a cell have "none", so that edges differ in the number of
        their other ops.

    >>> from metaopt import nas
    >>> network = nas.darts_space(num_nodes=2)
    >>> space = nas.configuration_space(network)
    >>> list(space)[:5], space["normal.inputs3"].high, space["normal.op0"].high
    (['normal.inputs3', 'normal.op0', 'normal.op1', 'normal.op2', 'normal.op3'], 2, 6)
    >>> nas.genotype_from_configuration(
    ...     network, {**dict.fromkeys(space, 0), "normal.inputs3": 2}
    ... )["normal"][3]
    (2, 3, 'max_pool_3x3')
    """
    if (keep := edges_kept(network, keep)) is None:
        sizes = {name: len(edge.ops) for name, (_, edge) in _choices(network).items()}
    else:
        sizes = {}
        for kind, cell in network.cells.items():
            sets, nums = _sets(cell, keep), {len(_ops_without_none(edge)) for edge in cell.edges}
            if len(nums) > 1:
                raise ValueError(f'Only some edges of {kind!r} have the candidate "none". Pass `keep=None`.')
            sizes |= {f"{kind}.inputs{node}": len(edge_sets) for node, edge_sets in sets.items() if len(edge_sets) > 1}
            sizes |= {f"{kind}.op{i}": min(nums) for i in range(sum(len(edge_sets[0]) for edge_sets in sets.values()))}
    return {name: spaces.integer(0, size - 1) if size > 1 else spaces.fixed(0) for name, size in sizes.items()}


def genotype_from_configuration(
    network: Space, configuration: Mapping[str, int], *, keep: int | None | str = "space"
) -> Genotype:
    """Returns the genotype that a configuration of integers describes.

    Args:
      network: the spec of a supernet.
      configuration: as in `configuration_space`.
      keep: as for `configuration_space`.

    Returns:
      A `Genotype`. Its edges have the order of the network; edges with the op "none" are left out.

    Raises:
      ValueError: if an entry is missing, unknown, out of range or not an integer (1.0 counts as an integer), or as for
        `configuration_space`.
    """
    space = configuration_space(network, keep=keep)
    if set(configuration) != set(space):
        raise ValueError(f"A configuration has the entries {sorted(space)}; got {sorted(configuration)}.")
    for name, leaf in space.items():
        high = leaf.high if isinstance(leaf, spaces.Integer) else 0
        if not (0 <= configuration[name] <= high and float(configuration[name]).is_integer()):
            raise ValueError(f"{name!r} must be an integer in [0, {high}]; got {configuration[name]}.")
    index = lambda name: int(configuration.get(name, 0))
    chosen: dict[str, list] = {kind: [] for kind in network.cells}
    if (keep := edges_kept(network, keep)) is None:
        for name, (kind, edge) in _choices(network).items():
            chosen[kind].append((edge, edge.ops[index(name)]))
    else:
        for kind, cell in network.cells.items():
            kept = [
                edge
                for node, edge_sets in _sets(cell, keep).items()
                for edge in edge_sets[index(f"{kind}.inputs{node}")]
            ]
            chosen[kind] = [(edge, _ops_without_none(edge)[index(f"{kind}.op{i}")]) for i, edge in enumerate(kept)]
            chosen[kind].sort(key=lambda pair: cell.edges.index(pair[0]))
    return {kind: tuple((*edge[:2], op) for edge, op in pairs if op != NONE) for kind, pairs in chosen.items()}


def genotype_to_configuration(
    network: Space, genotype: Genotype, *, keep: int | None | str = "space"
) -> dict[str, int]:
    """Returns the configuration of a genotype, for instance for the first trial of a search.

    Args:
      network: the spec of a supernet.
      genotype: kind -> edges.
      keep: as for `configuration_space`.

    Returns:
      A configuration; `genotype_from_configuration` is the inverse.

    Raises:
      ValueError: if a node of the genotype does not have `keep` edges, or as for `discrete` and `configuration_space`.
      ValueError: with `keep=None`, if the genotype lacks an edge whose candidates do not include "none".
    """
    check_genotype(network, genotype)
    configuration = dict.fromkeys(configuration_space(network, keep=keep), 0)
    ops = {kind: {(s, t): op for s, t, op in edges if op != NONE} for kind, edges in genotype.items()}
    if (keep := edges_kept(network, keep)) is None:
        for name, (kind, edge) in _choices(network).items():
            op = ops[kind].get(edge[:2], NONE)
            if op not in edge.ops:
                raise ValueError(
                    f"The genotype lacks the edge {edge.source} -> {edge.target} of {kind!r}, whose candidates have no "
                    f'"none": {", ".join(edge.ops)}.'
                )
            configuration[name] = edge.ops.index(op)
        return configuration
    for kind, cell in network.cells.items():
        kept = []
        for node, edge_sets in _sets(cell, keep).items():
            sources = {s for s, t in ops[kind] if t == node}
            fits = [i for i, edges in enumerate(edge_sets) if {edge.source for edge in edges} == sources]
            if not fits:
                raise ValueError(
                    f"A genotype of this space has {len(edge_sets[0])} edges into node {node} of {kind!r}; "
                    f"got those from {sorted(sources)}."
                )
            if len(edge_sets) > 1:
                configuration[f"{kind}.inputs{node}"] = fits[0]
            kept += edge_sets[fits[0]]
        configuration |= {
            f"{kind}.op{i}": _ops_without_none(edge).index(ops[kind][edge[:2]]) for i, edge in enumerate(kept)
        }
    return configuration


def _choices(network: Space) -> dict[str, tuple[str, Edge]]:
    plain = isinstance(network, ElasticNetwork)
    return {
        kind if plain else f"{kind}.{edge.source}-{edge.target}": (kind, edge)
        for kind, cell in network.cells.items()
        for edge in cell.edges
    }


def _sets(cell: Cell, keep: int) -> dict[int, list[tuple[Edge, ...]]]:
    """Node -> the sets of edges into it, one of which a genotype keeps."""
    nodes = sorted({edge.target for edge in cell.edges})
    edges_into_node = {t: [edge for edge in cell.edges if edge.target == t] for t in nodes}
    return {t: list(itertools.combinations(edges, min(keep, len(edges)))) for t, edges in edges_into_node.items()}


def _ops_without_none(edge: Edge) -> tuple[str, ...]:
    return tuple(op for op in edge.ops if op != NONE)
