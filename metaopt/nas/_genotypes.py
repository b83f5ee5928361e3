"""Genotypes, the discrete architectures: from mixing weights, to text and back, and which of them are the same.

A genotype says, for each kind of cell, which edges are kept and with which op: {kind: ((source, target, op), ...)}.
"""

import ast
import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np

from metaopt import base
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

NONE, SKIP = "none", "skip_connect"  # zero, and the identity where shapes are kept


def discretize(network: Space, weights: Mapping[str, np.ndarray], *, keep: int | None | str = "space") -> Genotype:
    """The genotype of mixing weights: the strongest op of every edge, of the strongest edges into every node.

        strength(e) = max_{o ≠ none} w[e, o],    op(e) = argmax_{o ≠ none} w[e, o]

    Weights, not α: the softmax is over all ops, none included, and without it other edges are kept, since α and α + c
    are the same weights and not the same numbers.

    Args:
      network: a supernet's.
      weights: kind -> [edges, ops], what the relaxation made of α; not negative.
      keep: edges into each node, the strongest (of equal ones the first); 2 is DARTS's rule. None keeps every edge
        whose largest weight is not that of "none". "space": what the network says.

    Returns:
      A `Genotype`, its edges in the network's order.

    Raises:
      ValueError: the weights do not have the network's shape, or some are negative, NaN or infinite; the network is
        one of NAS-Bench-101, whose weights `discretize_graph` reads.
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
                f"The weights of {kind!r} are negative in places: they look like α. Pass what the relaxation makes of "
                "it, for instance `jax.nn.softmax(alpha)`."
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
    """The network of a genotype: of each cell only the edges that are kept, with one op each; of each size one.

    Args:
      network: a supernet's.
      genotype: kind -> edges.

    Returns:
      A `Network`, or an `ElasticNetwork`, for `supernet`; it needs no mixing weights then.

    Raises:
      ValueError: a kind is missing, or an edge or op is not in the network.
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
    """The mixing weights at which a supernet is a genotype's network: 1 for its ops, 0 elsewhere.

    Args:
      network: a supernet's.
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
    """α from scores of architectures: what those that have an op on an edge score more than all, in the mean.

        α[e, o] = mean {s_a : o on e in a} − mean_a s_a

    So h from records (`methods.train_cell_searcher`), or any other judge, says where a search, or an h that is then
    learned by hypergradient, starts: `predictors.mlp(space, num_features, hyperparams=alpha)`.

    Args:
      network: a supernet's.
      genotypes: A of them; an edge that one does not have counts as its "none".
      scores: [A], larger is better. NaN and −inf (a training that failed, `synflow` where nothing arrives at the
        output) count as the smallest of the others.

    Returns:
      kind -> [edges, ops]; 0 where no architecture has the op.

    Raises:
      ValueError: there are not as many scores as genotypes, or none that is finite; one is +inf; as for `one_hot`.

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
        raise ValueError(f"`scores` must have a finite one, and no +inf, since larger is better; got {scores}.")
    # Left out, those that failed would speak for the ops that made them fail.
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
    """A genotype drawn at random: what a search must beat.

    Args:
      seed: at least 0; the same one gives the same genotype.
      network: a supernet's.
      keep: edges into each node, distinct, each set of them alike, each with an op that is not "none", each alike. None
        draws an op on every edge, "none" among them. "space": what the network says.

    Returns:
      A `Genotype`, its edges in the network's order.

    Raises:
      ValueError: the network is one of NAS-Bench-101, whose cells are graphs.
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
    """How many edges into each node a genotype has, None where each edge stands for itself; "space" as it says."""
    own = network.keep if isinstance(network, Network) else None
    if own == "graph":
        raise ValueError(
            "The network's cells are graphs with ops on vertices (NAS-Bench-101), which no `keep` says: "
            "`discretize_graph` reads them."
        )
    rule = own if keep == "space" else keep
    if rule is not None and (not isinstance(rule, (int, np.integer)) or isinstance(rule, bool) or rule < 1):
        raise ValueError(f"`keep` must be a number of edges, at least 1, None or 'space'; got {rule!r}.")
    return None if rule is None else int(rule)


def check_finite(kind: str, weights: np.ndarray) -> None:
    """ValueError where mixing weights are NaN or infinite: an argmax of them says nothing."""
    if not np.isfinite(weights).all():
        raise ValueError(
            f"The weights of {kind!r} are not finite in places, so that no op is the strongest: the search has "
            "diverged. Take α of an earlier step, such as its last checkpoint's, or search at a smaller rate."
        )


def _by_target(edge: tuple[int, int, str]) -> tuple[int, int]:
    return edge[1], edge[0]


def check_genotype(network: Space, genotype: Genotype) -> None:
    """ValueError where a genotype is not in the space of a network."""
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
      genotype: kind -> edges, whose nodes may be NumPy's integers.

    Returns:
      Text, with the version of the form.

    Raises:
      TypeError: a node is no integer.
    """
    return json.dumps({"version": 1, "genotype": genotype}, default=operator.index)


def genotype_from_json(text: str) -> Genotype:
    """The genotype that `genotype_to_json` wrote.

    Args:
      text: JSON.

    Returns:
      A `Genotype`.

    Raises:
      ValueError: the text is no JSON of this form or of another version; an edge does not go from a node to a later
        one, or is there twice. Whether a network has the ops, `discrete` says.
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
    """A genotype in DARTS's form, "Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=..., reduce=...)".

    Args:
      genotype: of kinds "normal" and "reduce" with two inputs, two edges into each node.

    Returns:
      Text, which DARTS's own code reads.

    Raises:
      ValueError: a node has not two edges, or an edge does not come from a node before it.
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
    """The genotype that DARTS's form says; it must give out all nodes.

    Args:
      text: "Genotype(normal=[...], normal_concat=..., reduce=[...], reduce_concat=...)".
      primitives: the ops that it may have.

    Returns:
      A `Genotype` of the kinds that are there.

    Raises:
      ValueError: the text has another form (no call of `Genotype`, fields without names, no cell), an op is not among
        `primitives`, or an edge does not come from a node before it or is there twice.
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
        raise ValueError(f"This is no genotype in DARTS's form that gives out all of its nodes: {text!r}.") from error
    for kind, edges in genotype.items():
        for source, target, op in edges:
            if type(source) is not int or not 0 <= source < target:
                raise ValueError(f"Node {target} of {kind!r} sees nodes 0 to {target - 1}; got {source!r} in {text!r}.")
            if op not in primitives:
                raise ValueError(f"The ops are {', '.join(primitives)}; {kind!r} has {op!r}. Pass `primitives`?")
        if len({edge[:2] for edge in edges}) < len(edges):
            raise ValueError(f"A node of {kind!r} sees another one twice: {text!r}.")
    return genotype


def to_nas_bench_201(genotype: Genotype) -> str:
    """A genotype in NAS-Bench-201's form, "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|".

    Args:
      genotype: of the one kind "cell"; edges that are not there are "none".

    Returns:
      Text, as in the benchmark's tables.

    Raises:
      ValueError: the genotype is not in the space.
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
    """The genotype that NAS-Bench-201's form says.

    Args:
      text: "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|".

    Returns:
      A `Genotype` of the one kind "cell", without the edges that are "none".

    Raises:
      ValueError: the text has another form, or an op that is not in the space.
    """
    edges = []
    for target, node in enumerate(text.split("+"), 1):
        for source, term in enumerate(node.strip("|").split("|")):
            op, _, at = term.partition("~")
            if at != str(source) or source >= target:
                raise ValueError(f"This is no cell in NAS-Bench-201's form: {text!r}.")
            if op not in NAS_BENCH_201_PRIMITIVES:
                raise ValueError(f"The ops of NAS-Bench-201 are {', '.join(NAS_BENCH_201_PRIMITIVES)}; got {op!r}.")
            edges.append((source, target, op))
    if len(edges) != 6:
        raise ValueError(f"A cell of NAS-Bench-201 has 6 edges; {text!r} has {len(edges)}.")
    return {"cell": tuple(edge for edge in edges if edge[2] != NONE)}


# ---- Which are the same ---------------------------------------------------------------------------------------------


def canonical(
    edges: Iterable[tuple[int, int, str]], *, num_inputs: int = 1, output: Sequence[int], skip: str | None = SKIP
) -> str:
    """A cell as an expression, which cells share that compute the same function of their weights.

    Each node is the sorted sum of its terms, op(node); zeros are left out, and what is skipped is part of the sum.
    (As in NAS-Bench-201's rule, an op used twice and two ops alike, each with its weights, are written the same.)

    Args:
      edges: (source, target, op), of one kind of cell of a genotype.
      num_inputs: 1 or 2.
      output: the nodes whose channels are the output, in any order.
      skip: the op that is the identity; None where none is (strides, or other channels).

    Returns:
      Text; "0" where nothing arrives at the output.
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
    """NAS-Bench-201's own canonical form, by which it has 6,466 cells; it keeps zeros ("#") as terms of sums.

    Args:
      genotype: of the one kind "cell".

    Returns:
      Text. `canonical` leaves zeros out, and has 4,930 cells.
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
    """A cell of NAS-Bench-101: ops on vertices.

    Attributes:
      matrix: [V, V] of 0 and 1, upper triangular; the first vertex is the input, the last the output.
      ops: [V] names, "input" first and "output" last.
    """

    matrix: tuple[tuple[int, ...], ...]
    ops: tuple[str, ...]


def edge_graph(edges: Iterable[tuple[int, int, str]], *, num_inputs: int = 1, output: Sequence[int]) -> Graph:
    """A cell whose ops are on edges as a graph with ops on vertices: what an encoder of cells reads.

    Each op that is not "none" becomes a vertex, behind the ops into its source, or behind the input that its source is;
    the output is behind the ops into its nodes. Nodes are in topological order; another such order of them changes the
    order of vertices alone.

    Args:
      edges: (source, target, op), of one kind of cell of a genotype; `source` < `target`.
      num_inputs: how many of the first nodes are inputs, at least 1; no edge leads to them.
      output: the nodes whose channels are the output.

    Returns:
      A `Graph`; of several inputs, the first vertices are "input 0", "input 1" ...

    Raises:
      ValueError: there is no input, or an edge leads backwards or to an input.
    """
    base.check_integer("num_inputs", num_inputs, 1)
    edges = list(edges)
    for source, target, _ in edges:
        if not 0 <= source < target or target < num_inputs:
            raise ValueError(f"An edge goes to a later node that is no input; got {source} -> {target}.")
    kept = sorted((edge for edge in edges if edge[2] != NONE), key=_by_target)
    inputs = ["input"] if num_inputs == 1 else [f"input {i}" for i in range(num_inputs)]
    size = num_inputs + len(kept) + 1
    matrix = np.zeros((size, size), int)
    arriving: dict[int, list[int]] = {i: [i] for i in range(num_inputs)}  # node -> vertices into it
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
      graph: any.

    Returns:
      A `Graph`; None where no path leads from the input to the output.

    Raises:
      ValueError: the matrix is not square and upper triangular of 0 and 1, or there is not one op a vertex.
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
    """NAS-Bench-101's name of a cell: equal for isomorphic graphs.

    Rounds of message passing, as many as vertices: a vertex starts at the digest of its degrees and its op, and
    becomes the digest of (those before it, sorted | those behind it, sorted | itself).

    Args:
      graph: it is pruned first.

    Returns:
      32 hexadecimal digits, the key of the benchmark's tables.

    Raises:
      ValueError: nothing joins input and output; an op is unknown; as for `pruned`.

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
      Genotypes of the one kind "cell".
    """
    pairs = [(s, t) for t in (1, 2, 3) for s in range(t)]
    choices = itertools.product(NAS_BENCH_201_PRIMITIVES, repeat=6)
    return [{"cell": tuple((*p, op) for p, op in zip(pairs, ops, strict=True) if op != NONE)} for ops in choices]
