"""Genotypes as text: JSON, and the forms of DARTS and of NAS-Bench-201."""

import ast
import contextlib
import json
import operator
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from metaopt import _files
from metaopt.nas._genotypes import NONE, by_target
from metaopt.nas._named_spaces import DARTS_PRIMITIVES, NAS_BENCH_201_PRIMITIVES
from metaopt.nas._specs import Genotype


def genotype_to_text(genotype: Genotype, *, form: str = "json") -> str:
    """Writes a genotype as text.

    Args:
      genotype: kind -> edges, whose nodes may be NumPy integers.
      form: "json", for any genotype; "darts", `Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=..., ...)`,
        for kinds with two inputs and two edges into each node; or "nas_bench_201",
        `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`, for a cell of that space.

    Returns:
      Text that `genotype_from_text` reads. The code of DARTS and the tables of NAS-Bench-201 use the other two forms.

    Raises:
      KeyError: if `form` is unknown.
      ValueError: if the genotype cannot be written in this form.
      TypeError: if a node is not an integer.
    """
    write = {"json": _to_json, "darts": _to_darts, "nas_bench_201": _to_nas_bench_201}
    return write[form](genotype)


def genotype_from_text(text: str, *, form: str = "json", primitives: Sequence[str] = DARTS_PRIMITIVES) -> Genotype:
    """Reads a genotype from text.

    Args:
      text: the text in the given form; see `genotype_to_text`.
      form: "json", "darts" or "nas_bench_201".
      primitives: the ops that a genotype in the form of DARTS may have.

    Returns:
      A `Genotype`. The ops of JSON are not checked here; `discrete` checks them against a network.

    Raises:
      KeyError: if `form` is unknown.
      ValueError: if the text does not have this form.
      ValueError: if an edge does not go from a node to a later one or occurs twice, or an op is not in the space.

    >>> from metaopt import nas
    >>> text = "|none~0|+|skip_connect~0|none~1|+|none~0|none~1|none~2|"
    >>> genotype = nas.genotype_from_text(text, form="nas_bench_201")
    >>> print(nas.genotype_to_text(genotype))
    {"version": 1, "genotype": {"cell": [[0, 2, "skip_connect"]]}}
    """
    read = {
        "json": _from_json,
        "darts": lambda text: _from_darts(text, primitives),
        "nas_bench_201": from_nas_bench_201,
    }
    return read[form](text)


def _to_json(genotype: Genotype) -> str:
    """A genotype as JSON.

    Args:
      genotype: kind -> edges, whose nodes may be NumPy integers.

    Returns:
      Text, with the version of the format.

    Raises:
      TypeError: if a node is not an integer.
    """
    return json.dumps({"version": 1, "genotype": genotype}, default=operator.index)


@contextlib.contextmanager
def _reading_json(text: str) -> Iterator[dict[str, Any]]:
    """Yields the fields of a JSON object of version 1. Converts errors of the `with` block to a ValueError.

    Args:
      text: JSON.
    """
    try:
        data = _files.parse_json(text)
        version = data.get("version")
        if version != 1:
            raise ValueError(f"its version must be 1; got {reprlib.repr(version)}")
        yield data
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"This is not JSON that `genotype_to_text` wrote ({reason}): {text[:200]!r}.") from error


def _from_json(text: str) -> Genotype:
    """The genotype that `genotype_to_text` wrote.

    Args:
      text: JSON.

    Returns:
      A `Genotype`. Its ops are not checked here; `discrete` checks them against a network.

    Raises:
      ValueError: if the text is not JSON of this form, or is of another version.
      ValueError: if an edge does not go from a node to a later one, or occurs twice.
    """
    genotype = {}
    with _reading_json(text) as data:
        for kind, edges in data["genotype"].items():
            for edge in edges:
                triple = isinstance(edge, list) and [type(x) for x in edge] == [int, int, str]
                if not triple or not 0 <= edge[0] < edge[1]:
                    raise ValueError(
                        "an edge is [source, target, op], from a node to a later one, such as [0, 2, 'skip_connect']; "
                        f"{kind!r} has {edge!r}"
                    )
            genotype[kind] = tuple((s, t, op) for s, t, op in edges)
            if len({edge[:2] for edge in genotype[kind]}) < len(edges):
                raise ValueError(f"it has an edge of {kind!r} twice")
    return genotype


def _to_darts(genotype: Genotype) -> str:
    """A genotype in the form of DARTS, "Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=..., reduce=...)".

    Args:
      genotype: a genotype of kinds "normal" and "reduce" with two inputs, and two edges into each node.

    Returns:
      Text, which the code of DARTS reads.

    Raises:
      ValueError: if a node does not have two edges, or if an edge does not come from an earlier node.
    """
    parts = []
    for kind, edges in genotype.items():
        targets = sorted(operator.index(t) for _, t, _ in edges)
        nodes = range(2, targets[-1] + 1) if targets else range(0)
        if not targets or targets != [t for t in nodes for _ in range(2)] or any(not 0 <= s < t for s, t, _ in edges):
            raise ValueError(
                f"In the form of DARTS, every node has two edges from earlier nodes; {kind!r} has {edges}."
            )
        pairs = [(op, operator.index(s)) for s, _, op in sorted(edges, key=by_target)]
        parts += [f"{kind}={pairs}", f"{kind}_concat={nodes}"]
    return f"Genotype({', '.join(parts)})"


def _from_darts(text: str, primitives: Sequence[str] = DARTS_PRIMITIVES) -> Genotype:
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
        genotype = {kind: _darts_cell(pairs, nodes) for kind, pairs, nodes in _darts_fields(text)}
    except (SyntaxError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is not a genotype in DARTS's format whose output uses all of its nodes: {text!r}."
        ) from error
    for kind, edges in genotype.items():
        for source, target, op in edges:
            if type(source) is not int or not 0 <= source < target or op not in primitives:
                raise ValueError(
                    f"The edges to node {target} of {kind!r} must come from nodes 0 to {target - 1}, with an op among "
                    f"{', '.join(primitives)}; got {source!r} and {op!r}. To read ops of your own space, pass "
                    "`primitives`."
                )
        if len({edge[:2] for edge in edges}) < len(edges):
            raise ValueError(f"A node of {kind!r} has two edges from the same node: {text!r}.")
    return genotype


def _darts_fields(text: str) -> list[tuple[str, list, list[int]]]:
    """(kind, its pairs of op and source, the nodes of its output) of a text in the form of DARTS."""
    call = ast.parse(text.strip(), mode="eval").body
    name = lambda func: getattr(func, "id", getattr(func, "attr", ""))
    if not isinstance(call, ast.Call) or name(call.func) != "Genotype" or call.args:
        raise TypeError("it is not a call of `Genotype` with named fields")
    fields = {str(keyword.arg): keyword.value for keyword in call.keywords}
    kinds = [name for name in fields if not name.endswith("_concat")]
    if not kinds or set(fields) != {*kinds, *(f"{kind}_concat" for kind in kinds)} or len(fields) < len(call.keywords):
        raise ValueError(
            "each cell must have exactly one field `<kind>`, and one field `<kind>_concat` with the nodes of its output"
        )
    cells = []
    for kind in kinds:
        nodes = fields[f"{kind}_concat"]
        if isinstance(nodes, ast.Call):  # range(2, 6)
            nodes = range(*(ast.literal_eval(argument) for argument in nodes.args))
        else:
            nodes = ast.literal_eval(nodes)
        cells.append((kind, ast.literal_eval(fields[kind]), list(nodes)))
    return cells


def _darts_cell(pairs: list, nodes: list[int]) -> tuple[tuple[int, int, str], ...]:
    if nodes != list(range(2, 2 + len(pairs) // 2)) or len(pairs) % 2:
        raise ValueError("the output does not list all nodes in order, or the number of edges is odd")
    return tuple((source, 2 + i // 2, op) for i, (op, source) in enumerate(pairs))


def _to_nas_bench_201(genotype: Genotype) -> str:
    """A genotype in the form of NAS-Bench-201, "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|".

    Args:
      genotype: a genotype of the single kind "cell"; absent edges are "none".

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
    nodes = [[term.partition("~") for term in node.strip("|").split("|")] for node in text.split("+")]
    if [[source for _, _, source in node] for node in nodes] != [["0"], ["0", "1"], ["0", "1", "2"]]:
        raise ValueError(f"This is not a cell in NAS-Bench-201's format: {text!r}.")
    edges = [(s, t, op) for t, node in enumerate(nodes, 1) for s, (op, _, _) in enumerate(node)]
    if not {op for _, _, op in edges} <= set(NAS_BENCH_201_PRIMITIVES):
        raise ValueError(f"The ops of NAS-Bench-201 are {', '.join(NAS_BENCH_201_PRIMITIVES)}; got {text!r}.")
    return {"cell": tuple(edge for edge in edges if edge[2] != NONE)}
