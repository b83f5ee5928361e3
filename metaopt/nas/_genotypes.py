"""Genotypes, which are discrete architectures: their networks, their mixing weights, and α from their scores.

For each kind of cell, a genotype lists the edges that are kept and their ops: {kind: ((source, target, op), ...)}.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np

from metaopt.nas import _elastic
from metaopt.nas._specs import Edge, ElasticNetwork, Genotype, Network, Space

NONE, SKIP = "none", "skip_connect"  # the zero op, and the identity (if shapes are kept)


@overload
def discrete(network: Network, genotype: Genotype) -> Network: ...


@overload
def discrete(network: ElasticNetwork, genotype: Genotype) -> ElasticNetwork: ...


def discrete(network, genotype):
    """Returns the network of a genotype: each cell has only its edges, with one op each, and each size is fixed.

    Args:
      network: the spec of a supernet.
      genotype: kind -> edges.

    Returns:
      A `Network`, or an `ElasticNetwork`, for `supernet`. It needs no mixing weights.

    Raises:
      ValueError: if a kind is missing, or if an edge or op is not in the network.
    """
    check_genotype(network, genotype)
    if isinstance(network, ElasticNetwork):
        return _elastic.chosen(network, genotype)
    cells = {
        kind: cell._replace(edges=tuple(Edge(s, t, (op,)) for s, t, op in sorted(genotype[kind], key=by_target)))
        for kind, cell in network.cells.items()
    }
    return network._replace(cells=cells)


def one_hot(network: Space, genotype: Genotype) -> dict[str, np.ndarray]:
    """Returns the mixing weights at which a supernet equals the network of a genotype: 1 for its ops, 0 elsewhere.

    Args:
      network: the spec of a supernet.
      genotype: kind -> edges.

    Returns:
      kind -> [edges, ops].

    Raises:
      ValueError: as for `discrete`.
    """
    check_genotype(network, genotype)
    weights = {}
    for kind, cell in network.cells.items():
        kept = {(s, t): op for s, t, op in genotype[kind]}
        weights[kind] = np.array([[float(kept.get(edge[:2]) == op) for op in edge.ops] for edge in cell.edges])
    return weights


def op_scores(network: Network, genotypes: Sequence[Genotype], scores: np.ndarray) -> dict[str, np.ndarray]:
    """Computes α from scores: how much better the architectures with an op on an edge score than the average.

        α[e, o] = mean {s_a : o on e in a} − mean_a s_a

    The scores may come from a predictor h that was learned from records (`nas.train_cell_searcher`), or from any
    other source. The result is a starting point for a search, or for an h that is then learned by hypergradients:
    `predictors.mlp(space, num_features, hyperparams=alpha)`.

    Args:
      network: the spec of a supernet.
      genotypes: A genotypes; an edge that a genotype lacks counts as its "none".
      scores: [A], larger is better. NaN and −inf count as the smallest of the other scores. They come, for example,
        from a failed training, or from `synflow` if nothing arrives at the output.

    Returns:
      kind -> [edges, ops]; 0 if no architecture has the op.

    Raises:
      ValueError: if no score is finite, if a score is +inf, or as for `one_hot`.

    >>> from metaopt import nas
    >>> cell = nas.complete_cell(1, ("none", "mlp"))
    >>> network = nas.Network(
    ...     {"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2
    ... )
    >>> alpha = nas.op_scores(
    ...     network, [{"cell": ((0, 1, "mlp"),)}, {"cell": ()}], [3.0, 1.0]
    ... )
    >>> alpha["cell"].tolist()
    [[-1.0, 1.0]]
    """
    scores = np.asarray(scores, np.float64)
    finite = np.isfinite(scores)
    if not finite.any() or (scores == np.inf).any():
        raise ValueError(f"`scores` must have a finite score and no +inf, since larger is better; got {scores}.")
    # Without the failed architectures, the ops that made them fail would look too good.
    scores = np.where(finite, scores, scores[finite].min())
    rows = [one_hot(network, genotype) for genotype in genotypes]
    alpha = {}
    for kind, cell in network.cells.items():
        op_present = np.stack([row[kind] for row in rows])  # [A, edges, ops]
        for e, edge in enumerate(cell.edges):
            if NONE in edge.ops:
                op_present[:, e, edge.ops.index(NONE)] = 0
                op_present[:, e, edge.ops.index(NONE)] = 1 - op_present[:, e].sum(-1)
        total = np.einsum("a,aeo->eo", scores - scores.mean(), op_present)
        alpha[kind] = total / np.maximum(op_present.sum(0), 1)
    return alpha


def random_genotype(seed: int, network: Network, *, keep: int | None | str = "space") -> Genotype:
    """A random genotype, the baseline that a search must beat.

    Args:
      seed: at least 0; the same seed gives the same genotype.
      network: the spec of a supernet.
      keep: number of edges into each node. They are distinct, and all sets of edges are equally likely. Each edge gets
        an op other than "none", and all these ops are equally likely. With None, every edge gets an op, and "none" is
        as likely as the others. "space" uses the rule of the network.

    Returns:
      A `Genotype`, its edges in the order of the network.

    Raises:
      ValueError: if the network is a NAS-Bench-101 space, whose cells are graphs.
    """
    keep = edges_kept(network, keep)
    rng = np.random.default_rng(seed)
    genotype: Genotype = {}
    for kind, cell in network.cells.items():
        if keep is None:
            kept = list(range(len(cell.edges)))
        else:
            kept = []
            for node in sorted({edge.target for edge in cell.edges}):
                is_candidate = lambda edge, node=node: edge.target == node and set(edge.ops) != {NONE}
                edges_into_node = [e for e, edge in enumerate(cell.edges) if is_candidate(edge)]
                kept += rng.permutation(edges_into_node)[:keep].tolist()
        drawn = []
        for e in sorted(kept):
            candidate_ops = [op for op in cell.edges[e].ops if keep is None or op != NONE]
            drawn.append((*cell.edges[e][:2], candidate_ops[int(rng.integers(len(candidate_ops)))]))
        genotype[kind] = tuple(edge for edge in drawn if edge[2] != NONE)
    return genotype


def edges_kept(network: Space, keep: int | None | str) -> int | None:
    """The number of edges into each node of a genotype; None if the op of every edge is chosen separately.

    `keep` may be "space"; then the rule of the network applies.
    """
    default_keep = network.keep if isinstance(network, Network) else None
    if default_keep == "graph":
        raise ValueError(
            "The network's cells are graphs with ops on vertices (NAS-Bench-101), for which a number of edges into "
            "each node has no meaning."
        )
    rule = default_keep if keep == "space" else keep
    if rule is not None and (not isinstance(rule, (int, np.integer)) or isinstance(rule, bool) or rule < 1):
        raise ValueError(f"`keep` must be a number of edges (at least 1), None or 'space'; got {rule!r}.")
    return None if rule is None else int(rule)


def check_finite(kind: str, weights: np.ndarray) -> None:
    """Raises ValueError if mixing weights are NaN or infinite, because their argmax is meaningless."""
    if not np.isfinite(weights).all():
        raise ValueError(
            f"The weights of {kind!r} are not all finite, so no op is the strongest: the search has diverged. "
            "Use α of an earlier step, for example of a checkpoint, or search with a smaller rate."
        )


def by_target(edge: tuple[int, int, str]) -> tuple[int, int]:
    return edge[1], edge[0]


def check_genotype(network: Space, genotype: Genotype) -> None:
    """Raises ValueError if a genotype is not in the space of a network."""
    if set(genotype) != set(network.cells):
        raise ValueError(f"The genotype has the kinds {sorted(genotype)}, but the network has {sorted(network.cells)}.")
    for kind, cell in network.cells.items():
        candidates = {edge[:2]: edge.ops for edge in cell.edges}
        for s, t, op in genotype[kind]:
            if op not in candidates.get((s, t), ()):
                raise ValueError(f"The network has no op {op!r} on the edge {s} -> {t} of {kind!r}.")
        twice = len({tuple(edge[:2]) for edge in genotype[kind]}) < len(genotype[kind])
        if twice or (isinstance(network, ElasticNetwork) and not genotype[kind]):
            raise ValueError(f"The genotype has {'an edge twice' if twice else 'no size'} for {kind!r}.")
