"""Genotypes, the discrete architectures: made from mixing weights, converted to and from text, and compared.

For each kind of cell, a genotype lists the edges that are kept and their ops: {kind: ((source, target, op), ...)}.
"""

import ast
import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np

from metaopt import _checks
from metaopt.nas import _elastic
from metaopt.nas._specs import (
    DARTS_PRIMITIVES,
    NAS_BENCH_201_PRIMITIVES,
    Edge,
    ElasticNetwork,
    Genotype,
    Network,
    Space,
    read_json,
)

NONE, SKIP = "none", "skip_connect"  # the zero op, and the identity (if shapes are kept)


def discretize(network: Space, weights: Mapping[str, np.ndarray], *, keep: int | None | str = "space") -> Genotype:
    """The genotype of mixing weights: the strongest op of each edge, for the strongest edges into each node.

        strength(e) = max_{o ≠ none} w[e, o],    op(e) = argmax_{o ≠ none} w[e, o]

    Pass weights, not α. The softmax is over all ops, including "none". Without it other edges would be kept: α and α +
    c give the same weights, but they are different numbers.

    Args:
      network: the spec of a supernet.
      weights: kind -> [edges, ops], the weights that the relaxation makes of α; not negative.
      keep: number of edges into each node. The strongest are kept, and the first of equal ones; 2 is the rule of DARTS.
        None keeps every edge whose largest weight is not the weight of "none". "space" uses the rule of the network.

    Returns:
      A `Genotype`, its edges in the order of the network.

    Raises:
      ValueError: if the weights do not have the shape of the network, or if some are negative, NaN or infinite.
      ValueError: if the network is a NAS-Bench-101 space; use `discretize_graph` for its weights.
    """
    keep = edges_kept(network, keep)
    genotype: Genotype = {}
    for kind, cell in network.cells.items():
        w = np.asarray(weights[kind], np.float64)
        if w.shape != (len(cell.edges), len(cell.edges[0].ops)):
            raise ValueError(
                f"The weights of {kind!r} must have a row for each of its {len(cell.edges)} edges and a column for "
                f"each of {len(cell.edges[0].ops)} ops; got shape {w.shape}."
            )
        check_finite(kind, w)
        if (w < 0).any():
            raise ValueError(
                f"The weights of {kind!r} must not be negative; they look like α. Pass the relaxation's weights, for "
                "instance `jax.nn.softmax(alpha)`."
            )
        some = np.array([[op != NONE for op in edge.ops] for edge in cell.edges])
        if keep is None:
            best = w.argmax(1)
            kept = [e for e, edge in enumerate(cell.edges) if edge.ops[best[e]] != NONE]
        else:
            among = np.where(some, w, -np.inf)
            best, strength = among.argmax(1), among.max(1)
            kept = []
            for node in sorted({edge.target for edge in cell.edges}):
                into = [e for e, edge in enumerate(cell.edges) if edge.target == node and some[e].any()]
                kept += sorted(into, key=lambda e: -strength[e])[:keep]
        genotype[kind] = tuple((*cell.edges[e][:2], cell.edges[e].ops[best[e]]) for e in sorted(kept))
    return genotype


@overload
def discrete(network: Network, genotype: Genotype) -> Network: ...


@overload
def discrete(network: ElasticNetwork, genotype: Genotype) -> ElasticNetwork: ...


def discrete(network, genotype):
    """The network of a genotype: of each cell only the kept edges, with one op each; for each size one candidate.

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
        kind: cell._replace(edges=tuple(Edge(s, t, (op,)) for s, t, op in sorted(genotype[kind], key=_by_target)))
        for kind, cell in network.cells.items()
    }
    return network._replace(cells=cells)


def one_hot(network: Space, genotype: Genotype) -> dict[str, np.ndarray]:
    """The mixing weights at which a supernet equals the network of a genotype: 1 for its ops, 0 elsewhere.

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
    """α from scores of architectures: how much better architectures with an op on an edge score than the average.

        α[e, o] = mean {s_a : o on e in a} − mean_a s_a

    The scores may come from an h that was learned from records (`nas.train_cell_searcher`), or from any other
    source. The result is a starting point for a search, or for an h that is then learned by hypergradients:
    `predictors.mlp(space, num_features, hyperparams=alpha)`.

    Args:
      network: the spec of a supernet.
      genotypes: A genotypes; an edge that a genotype lacks counts as its "none".
      scores: [A], larger is better. NaN and −inf count as the smallest of the other scores. Examples are a failed
        training, and `synflow` if nothing arrives at the output.

    Returns:
      kind -> [edges, ops]; 0 if no architecture has the op.

    Raises:
      ValueError: if the numbers of scores and genotypes differ, if no score is finite, if a score is +inf, or as for
        `one_hot`.

    >>> from metaopt import nas
    >>> cell = nas.complete_cell(1, ("none", "mlp"))
    >>> network = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2)
    >>> alpha = nas.op_scores(network, [{"cell": ((0, 1, "mlp"),)}, {"cell": ()}], [3.0, 1.0])
    >>> alpha["cell"].tolist()
    [[-1.0, 1.0]]
    """
    scores = np.asarray(scores, np.float64)
    if not len(genotypes) or scores.shape != (len(genotypes),):
        raise ValueError(f"There must be a score for each of the {len(genotypes)} genotypes; got shape {scores.shape}.")
    finite = np.isfinite(scores)
    if not finite.any() or (scores == np.inf).any():
        raise ValueError(f"`scores` must have a finite score and no +inf, since larger is better; got {scores}.")
    # Without the failed architectures, the ops that made them fail would look too good.
    scores = np.where(finite, scores, scores[finite].min())
    rows = [one_hot(network, genotype) for genotype in genotypes]
    alpha = {}
    for kind, cell in network.cells.items():
        has = np.stack([row[kind] for row in rows])  # [A, edges, ops]
        for e, edge in enumerate(cell.edges):
            if NONE in edge.ops:
                has[:, e, edge.ops.index(NONE)] = 0
                has[:, e, edge.ops.index(NONE)] = 1 - has[:, e].sum(-1)
        total = np.einsum("a,aeo->eo", scores - scores.mean(), has)
        alpha[kind] = total / np.maximum(has.sum(0), 1)
    return alpha


def random_genotype(seed: int, network: Network, *, keep: int | None | str = "space") -> Genotype:
    """A random genotype, the baseline that a search must beat.

    Args:
      seed: at least 0; the same seed gives the same genotype.
      network: the spec of a supernet.
      keep: number of edges into each node. They are distinct, and all sets of edges are equally likely. Each edge gets
        an op other than "none", and all of these are equally likely. None draws an op on every edge, with "none" among
        them. "space" uses the rule of the network.

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
                among = lambda edge, node=node: edge.target == node and set(edge.ops) != {NONE}
                into = [e for e, edge in enumerate(cell.edges) if among(edge)]
                kept += rng.permutation(into)[:keep].tolist()
        drawn = []
        for e in sorted(kept):
            among = [op for op in cell.edges[e].ops if keep is None or op != NONE]
            drawn.append((*cell.edges[e][:2], among[int(rng.integers(len(among)))]))
        genotype[kind] = tuple(edge for edge in drawn if edge[2] != NONE)
    return genotype


def edges_kept(network: Space, keep: int | None | str) -> int | None:
    """The number of edges into each node of a genotype; None if every edge is decided by itself.

    `keep` may be "space"; then the rule of the network applies.
    """
    own = network.keep if isinstance(network, Network) else None
    if own == "graph":
        raise ValueError(
            "The network's cells are graphs with ops on vertices (NAS-Bench-101), for which `keep` has no meaning. "
            "Use `discretize_graph`."
        )
    rule = own if keep == "space" else keep
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


def _by_target(edge: tuple[int, int, str]) -> tuple[int, int]:
    return edge[1], edge[0]


def check_genotype(network: Space, genotype: Genotype) -> None:
    """Raises ValueError if a genotype is not in the space of a network."""
    if set(genotype) != set(network.cells):
        raise ValueError(f"The genotype has the kinds {sorted(genotype)}, and the network {sorted(network.cells)}.")
    for kind, cell in network.cells.items():
        candidates = {edge[:2]: edge.ops for edge in cell.edges}
        for s, t, op in genotype[kind]:
            if op not in candidates.get((s, t), ()):
                raise ValueError(f"The network has no op {op!r} on the edge {s} -> {t} of {kind!r}.")
        if len({edge[:2] for edge in genotype[kind]}) < len(genotype[kind]):
            raise ValueError(f"The genotype has an edge of {kind!r} twice.")
        if isinstance(network, ElasticNetwork) and not genotype[kind]:
            raise ValueError(f"The genotype has no size for {kind!r}.")


# ---- Text -----------------------------------------------------------------------------------------------------------


def genotype_to_json(genotype: Genotype) -> str:
    """A genotype as JSON.

    Args:
      genotype: kind -> edges, whose nodes may be NumPy integers.

    Returns:
      Text, with the version of the format.

    Raises:
      TypeError: if a node is not an integer.
    """
    return json.dumps({"version": 1, "genotype": genotype}, default=operator.index)


def genotype_from_json(text: str) -> Genotype:
    """The genotype that `genotype_to_json` wrote.

    Args:
      text: JSON.

    Returns:
      A `Genotype`. Its ops are not checked here; `discrete` checks them against a network.

    Raises:
      ValueError: if the text is not JSON of this form, or is of another version.
      ValueError: if an edge does not go from a node to a later one, or occurs twice.
    """
    data = read_json(text, "genotype")
    if not isinstance(data["genotype"], dict):
        raise ValueError(f"`genotype` must be kind -> edges; got {data['genotype']!r}.")
    genotype = {}
    for kind, edges in data["genotype"].items():
        for edge in edges if isinstance(edges, list) else [edges]:
            numbers = isinstance(edge, list) and len(edge) == 3 and [type(x) for x in edge] == [int, int, str]
            if not (numbers and 0 <= edge[0] < edge[1]):
                raise ValueError(
                    f"An edge is [source, target, op], from a node to a later one, such as [0, 2, 'skip_connect']; "
                    f"{kind!r} has {edge!r}."
                )
        genotype[kind] = tuple((s, t, op) for s, t, op in edges)
        if len({edge[:2] for edge in genotype[kind]}) < len(edges):
            raise ValueError(f"The genotype has an edge of {kind!r} twice.")
    return genotype


def to_darts(genotype: Genotype) -> str:
    """A genotype in the form of DARTS, "Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=..., reduce=...)".

    Args:
      genotype: of kinds "normal" and "reduce" with two inputs, and two edges into each node.

    Returns:
      Text, which the code of DARTS reads.

    Raises:
      ValueError: if a node does not have two edges, or if an edge does not come from an earlier node.
    """
    parts = []
    for kind, edges in genotype.items():
        targets = sorted(t for _, t, _ in edges)
        nodes = range(2, targets[-1] + 1) if targets else range(0)
        backwards = [(s, t) for s, t, _ in edges if not 0 <= s < t]
        if backwards:
            raise ValueError(f"An edge goes from a node to a later one; the cell {kind!r} has {backwards[0]}.")
        if not targets or targets != [t for t in nodes for _ in range(2)]:
            raise ValueError(f"DARTS's form has two edges into every node; the cell {kind!r} has {targets} as targets.")
        pairs = [(op, s) for s, _, op in sorted(edges, key=_by_target)]
        parts += [f"{kind}={pairs}", f"{kind}_concat={nodes}"]
    return f"Genotype({', '.join(parts)})"


def from_darts(text: str, *, primitives: Sequence[str] = DARTS_PRIMITIVES) -> Genotype:
    """The genotype of a text in the form of DARTS; all of its nodes must be part of the output.

    Args:
      text: "Genotype(normal=[...], normal_concat=..., reduce=[...], reduce_concat=...)".
      primitives: the ops that the genotype may have.

    Returns:
      A `Genotype` of the kinds in the text.

    Raises:
      ValueError: if the text has another form (it is not a call of `Genotype`, has fields without names, or has no
        cell).
      ValueError: if an op is not among `primitives`, or if an edge does not come from an earlier node or occurs twice.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or getattr(call.func, "id", getattr(call.func, "attr", "")) != "Genotype":
            raise TypeError("no call of `Genotype`")
        if call.args or len({k.arg for k in call.keywords}) < len(call.keywords):
            raise TypeError("fields without names, or twice")
        fields = {k.arg: k.value for k in call.keywords if not str(k.arg).endswith("_concat")}
        concats = {str(k.arg).removesuffix("_concat"): k.value for k in call.keywords if k.arg not in fields}
        if not fields or set(concats) != set(map(str, fields)):
            raise ValueError("no cells, or nodes of none")
        genotype = {}
        for kind, value in fields.items():
            pairs = ast.literal_eval(value)
            genotype[str(kind)] = tuple((source, 2 + i // 2, op) for i, (op, source) in enumerate(pairs))
            nodes = concats[str(kind)]
            if isinstance(nodes, ast.Call):  # range(2, 6)
                given = list(range(*(ast.literal_eval(a) for a in nodes.args)))
            else:
                given = list(ast.literal_eval(nodes))
            if given != list(range(2, 2 + len(pairs) // 2)) or len(pairs) % 2:
                raise ValueError("not all nodes, or an edge too many")
    except (SyntaxError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is not a genotype in DARTS's format whose output uses all of its nodes: {text!r}."
        ) from error
    for kind, edges in genotype.items():
        for source, target, op in edges:
            if type(source) is not int or not 0 <= source < target:
                raise ValueError(
                    f"The edges to node {target} of {kind!r} must come from nodes 0 to {target - 1}; got {source!r} "
                    f"in {text!r}."
                )
            if op not in primitives:
                raise ValueError(
                    f"The ops must be among {', '.join(primitives)}; {kind!r} has {op!r}. Pass your own `primitives`."
                )
        if len({edge[:2] for edge in edges}) < len(edges):
            raise ValueError(f"A node of {kind!r} has two edges from the same node: {text!r}.")
    return genotype


def to_nas_bench_201(genotype: Genotype) -> str:
    """A genotype in the form of NAS-Bench-201, "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|".

    Args:
      genotype: of the single kind "cell"; absent edges are "none".

    Returns:
      Text, as in the tables of the benchmark.

    Raises:
      ValueError: if the genotype is not in the space.
    """
    ops = {(s, t): op for s, t, op in genotype.get("cell", ())}
    fits = set(genotype) == {"cell"} and len(ops) == len(genotype["cell"])
    if not fits or any(not 0 <= s < t <= 3 or op not in NAS_BENCH_201_PRIMITIVES for (s, t), op in ops.items()):
        raise ValueError(
            'A cell of NAS-Bench-201 is {"cell": edges} between nodes 0 to 3, each at most once, with the ops '
            f"{', '.join(NAS_BENCH_201_PRIMITIVES)}; got {genotype!r}."
        )
    nodes = ("".join(f"|{ops.get((s, t), NONE)}~{s}" for s in range(t)) + "|" for t in (1, 2, 3))
    return "+".join(nodes)


def from_nas_bench_201(text: str) -> Genotype:
    """The genotype of a text in the form of NAS-Bench-201.

    Args:
      text: "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|".

    Returns:
      A `Genotype` of the single kind "cell", without the edges that are "none".

    Raises:
      ValueError: if the text has another form, or an op that is not in the space.
    """
    edges = []
    for target, node in enumerate(text.split("+"), 1):
        for source, term in enumerate(node.strip("|").split("|")):
            op, _, at = term.partition("~")
            if at != str(source) or source >= target:
                raise ValueError(f"This is not a cell in NAS-Bench-201's format: {text!r}.")
            if op not in NAS_BENCH_201_PRIMITIVES:
                raise ValueError(f"The ops of NAS-Bench-201 are {', '.join(NAS_BENCH_201_PRIMITIVES)}; got {op!r}.")
            edges.append((source, target, op))
    if len(edges) != 6:
        raise ValueError(f"A cell of NAS-Bench-201 has 6 edges; {text!r} has {len(edges)}.")
    return {"cell": tuple(edge for edge in edges if edge[2] != NONE)}


# ---- Equal genotypes ------------------------------------------------------------------------------------------------


def canonical(
    edges: Iterable[tuple[int, int, str]], *, num_inputs: int = 1, output: Sequence[int], skip: str | None = SKIP
) -> str:
    """A cell as an expression. Cells that compute the same function of their weights have the same expression.

    Each node is the sorted sum of its terms, op(node). Zeros are left out. The terms of a skipped node join the sum.
    (As in the rule of NAS-Bench-201, two cases are written the same: an op that is used twice, and two equal ops with
    their own weights.)

    Args:
      edges: (source, target, op), of one kind of cell of a genotype.
      num_inputs: 1 or 2.
      output: the nodes whose channels are the output, in any order.
      skip: the op that is the identity; None if no op is the identity (because of strides or changed channels).

    Returns:
      Text; "0" if nothing arrives at the output.
    """
    edges = sorted(edges, key=_by_target)
    terms: dict[int, list[str]] = {i: [f"x{i}"] for i in range(num_inputs)}
    for node in sorted({t for _, t, _ in edges} | set(output)):
        terms.setdefault(node, [])
        for s, t, op in edges:
            arriving = terms.get(s, [])
            if t == node and arriving and op != NONE:
                terms[node] += arriving if op == skip else [f"{op}({'+'.join(arriving)})"]
        terms[node].sort()
    outputs = sorted("+".join(terms[node]) or "0" for node in output)
    return ",".join(outputs)


def nas_bench_201_string(genotype: Genotype) -> str:
    """The canonical form of NAS-Bench-201, by which it has 6,466 distinct cells.

    It keeps zeros ("#") as terms of sums.

    Args:
      genotype: of the single kind "cell".

    Returns:
      Text. `canonical` leaves zeros out, and has 4,930 distinct cells.
    """
    ops = {(s, t): op for s, t, op in genotype["cell"]}
    nodes = ["0"]
    for t in (1, 2, 3):
        terms = []
        for s in range(t):
            op = ops.get((s, t), NONE)
            zero = op == NONE or nodes[s] == "#"
            terms.append("#" if zero else nodes[s] if op == SKIP else f"({nodes[s]})@{op}")
        nodes.append("+".join(sorted(terms)))
    return nodes[-1]


class Graph(NamedTuple):
    """A cell of NAS-Bench-101: a graph with ops on vertices.

    Attributes:
      matrix: [V, V] of 0 and 1, upper triangular; the first vertex is the input, the last one the output.
      ops: [V] names, "input" first and "output" last.
    """

    matrix: tuple[tuple[int, ...], ...]
    ops: tuple[str, ...]


def edge_graph(edges: Iterable[tuple[int, int, str]], *, num_inputs: int = 1, output: Sequence[int]) -> Graph:
    """Converts a cell with ops on edges to a graph with ops on vertices, the form that an encoder of cells reads.

    Each op other than "none" becomes a vertex. Its predecessors are the ops into its source, or the input if its source
    is an input. The predecessors of the output are the ops into the output nodes. Nodes are in topological order; a
    different topological order changes only the order of the vertices.

    Args:
      edges: (source, target, op), of one kind of cell of a genotype; `source` < `target`.
      num_inputs: how many of the first nodes are inputs, at least 1; no edge leads to them.
      output: the nodes whose channels are the output.

    Returns:
      A `Graph`. With several inputs, the first vertices are "input 0", "input 1" ...

    Raises:
      ValueError: if `num_inputs < 1`, or if an edge leads backwards or to an input.
    """
    _checks.check_integer("num_inputs", num_inputs, 1)
    edges = list(edges)
    for source, target, _ in edges:
        if not 0 <= source < target or target < num_inputs:
            raise ValueError(f"An edge must go to a later node that is not an input; got {source} -> {target}.")
    kept = sorted((edge for edge in edges if edge[2] != NONE), key=_by_target)
    inputs = ["input"] if num_inputs == 1 else [f"input {i}" for i in range(num_inputs)]
    size = num_inputs + len(kept) + 1
    matrix = np.zeros((size, size), int)
    arriving: dict[int, list[int]] = {i: [i] for i in range(num_inputs)}  # node -> its predecessor vertices
    for vertex, (source, target, _) in enumerate(kept, num_inputs):
        matrix[arriving.get(source, []), vertex] = 1
        arriving.setdefault(target, []).append(vertex)
    for node in output:
        matrix[arriving.get(node, []), -1] = 1
    return Graph(tuple(map(tuple, matrix.tolist())), (*inputs, *(op for _, _, op in kept), "output"))


NAS_BENCH_101_PRIMITIVES = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")


def pruned(graph: Graph) -> Graph | None:
    """A graph without the vertices that are on no path from the input to the output.

    Args:
      graph: any graph.

    Returns:
      A `Graph`; None if no path leads from the input to the output.

    Raises:
      ValueError: if the matrix is not square, or not upper triangular of 0 and 1, or if there is not one op per vertex.
    """
    matrix = np.asarray(graph.matrix)
    size = len(graph.ops)
    if matrix.shape != (size, size) or (np.tril(matrix) != 0).any() or not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"`matrix` must be upper triangular, of 0 and 1 and shape {(size, size)}; got {graph.matrix}.")
    reached, reaching = np.zeros(size, bool), np.zeros(size, bool)
    reached[0] = reaching[-1] = True
    for v in range(size):
        reached |= reached[v] * (matrix[v] > 0)
        reaching |= reaching[-1 - v] * (matrix[:, -1 - v] > 0)
    on = np.flatnonzero(reached & reaching)
    if not (on.size and on[0] == 0 and on[-1] == size - 1):
        return None
    rows = tuple(tuple(int(x) for x in matrix[v, on]) for v in on)
    return Graph(rows, tuple(graph.ops[v] for v in on))


def nas_bench_101_hash(graph: Graph) -> str:
    """The hash by which NAS-Bench-101 identifies a cell: equal for isomorphic graphs.

    It takes as many rounds of message passing as there are vertices. A vertex starts with the digest of its degrees and
    its op. In each round it becomes the digest of (its predecessors, sorted | its successors, sorted | itself).

    Args:
      graph: a cell; it is pruned first.

    Returns:
      32 hexadecimal digits, the key in the tables of the benchmark.

    Raises:
      ValueError: if no path joins input and output, if an op is unknown, or as for `pruned`.

    Source: Ying et al., ICML 2019, https://arxiv.org/abs/1902.09635
    """
    whole = pruned(graph)
    if whole is None:
        raise ValueError("The graph has no path from its input to its output.")
    if not set(whole.ops[1:-1]) <= set(NAS_BENCH_101_PRIMITIVES):
        raise ValueError(f"The ops of NAS-Bench-101 are {NAS_BENCH_101_PRIMITIVES}; got {whole.ops}.")
    digest = lambda text: hashlib.md5(text.encode()).hexdigest()
    matrix = np.asarray(whole.matrix)
    labels = [-1, *(NAS_BENCH_101_PRIMITIVES.index(op) for op in whole.ops[1:-1]), -2]
    degrees = zip(matrix.sum(1).tolist(), matrix.sum(0).tolist(), labels, strict=True)
    hashes = [digest(str(each)) for each in degrees]
    around = [(np.flatnonzero(matrix[:, v]), np.flatnonzero(matrix[v])) for v in range(len(matrix))]
    for _ in hashes:
        sides = [["".join(sorted(hashes[u] for u in side)) for side in both] for both in around]
        hashes = [digest(f"{before}|{behind}|{own}") for (before, behind), own in zip(sides, hashes, strict=True)]
    return digest(str(sorted(hashes)))


def nas_bench_201_genotypes() -> list[Genotype]:
    """All 15,625 cells of NAS-Bench-201, in the order of `itertools.product` over its edges.

    Returns:
      Genotypes of the single kind "cell".
    """
    pairs = [(s, t) for t in (1, 2, 3) for s in range(t)]
    choices = itertools.product(NAS_BENCH_201_PRIMITIVES, repeat=6)
    return [{"cell": tuple((*p, op) for p, op in zip(pairs, ops, strict=True) if op != NONE)} for ops in choices]
