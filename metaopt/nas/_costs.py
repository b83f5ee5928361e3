"""What an architecture costs, as a differentiable function of its mixing weights.

A table has the cost of every op where it stands, so that the cost of a mixture is what the networks that it mixes cost
on average, were each choice drawn by its weights:

    C(w) = c₀ + Σ_terms Σ_(i, j, ...) w_a[i] · w_b[j] · ... · c[i, j, ...]

A term is an edge of a cell (c of its ops), a layer of an `ElasticNetwork` (c of its sizes and those of its input), or
a whole cell, of which only networks were measured. At one-hot weights C is the discrete network's cost; "none", which
no discrete network has, costs nothing by itself. (Where no edge leaves the input of a cell, the layers before it are of
no use: C counts them, and `hypergrad.flops` of the whole network may leave them out as dead code.) What it costs to
train the supernet is another matter: that runs every op, and every size at its largest.

Source: the expected latency of Cai, Zhu & Han, ICLR 2019, https://arxiv.org/abs/1812.00332
"""

import json
import math
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from metaopt import base
from metaopt.nas import _benchmarks, _elastic, _genotypes, _ops, _supernet
from metaopt.nas._relaxations import discretized
from metaopt.nas._specs import ElasticNetwork, Genotype, Network, Space, check_network, read_json

Measure = Callable[..., float]  # (apply, params, x) -> cost


class CostTerm(NamedTuple):
    """A part of a cost that depends on some choices together.

    Attributes:
      rows: (kind of cell or name of a size, edge), one for each axis of `values`.
      values: the cost at each combination of candidates.
    """

    rows: tuple[tuple[str, int], ...]
    values: np.ndarray


class CostTable(NamedTuple):
    """What the parts of a space's networks cost.

    Attributes:
      fixed: of what all networks have.
      terms: of what is chosen.
      unit: of the costs, for people.
    """

    fixed: float
    terms: tuple[CostTerm, ...]
    unit: str = ""


def cost_table(
    network: Space,
    in_shape: Sequence[int],
    measure: Measure,
    *,
    ops: Mapping[str, _ops.Op],
    partial: int = 1,
    batch_size: int = 1,
    unit: str = "",
) -> CostTable:
    """Measures every op of a space once at every shape at which it stands.

    Sums of nodes, concatenations and the supernet's own copies are not in it.

    Args:
      network: a supernet's spec.
      in_shape: of one input, without the batch axis.
      measure: `(apply, params, x) -> cost`, of a function `apply(params, x)` and the shapes of its arguments:
        `hypergrad.flops` (or `functools.partial(hypergrad.flops, products_only=True)`, which is what the literature
        counts, twice over), `nas.num_params`, `nas.latency()`, or one's own.
      ops: as for `supernet`.
      partial: likewise.
      batch_size: of the input that is measured.
      unit: of the costs.

    Returns:
      A `CostTable`, for a batch of `batch_size`.

    Raises:
      ValueError: `measure` is no function; as for `supernet`.

    >>> from metaopt import hypergrad, nas
    >>> space = nas.mlp_space(2, widths=(4, 8), depths=(1, 2))
    >>> table = nas.cost_table(space, (3,), nas.num_params, ops={})
    >>> wide = {"linear.width": ((0, 1, "8"),), "linear.depth": ((0, 1, "2"),)}
    >>> nas.cost_of(table, space, wide)  # (3 + 1)8 + (8 + 1)8 + (8 + 1)2
    122.0
    """
    base.check_integer("batch_size", batch_size, 1)
    if not callable(measure):
        raise ValueError(
            f"`measure` must be a function, such as `nas.num_params` or `hypergrad.flops`; got {measure!r}."
        )
    known: dict[Any, float] = {}
    dtype = jnp.zeros(0).dtype

    def cost(name, init, apply, shape):
        """Of one op by name; what has the same name and shape is the same."""
        if (name, shape) not in known:
            params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
            known[name, shape] = float(measure(apply, params, jax.ShapeDtypeStruct((batch_size, *shape), dtype)))
        return known[name, shape]

    in_shape = tuple(in_shape)
    if isinstance(network, ElasticNetwork):
        return CostTable(*_elastic_costs(network, in_shape, cost), unit)
    check_network(network)
    return CostTable(*_cell_costs(network, in_shape, ops, partial, cost), unit)


def _cell_costs(network: Network, in_shape, ops, partial, cost) -> tuple[float, tuple[CostTerm, ...]]:
    runs = _supernet._build(network, in_shape, ops, partial)
    fixed = 0.0
    values = {
        (kind, e): np.zeros(len(edge.ops)) for kind, cell in network.cells.items() for e, edge in enumerate(cell.edges)
    }

    def of(name, op, shape, channels, stride):
        apply = lambda params, x: op.apply(params, x, channels, stride)
        return cost((name, channels, stride), lambda key: op.init(key, shape, channels, stride), apply, shape)

    inputs = _ops.Op(_supernet._input_init, _supernet._input_apply)
    for run in runs:
        kind, channels, stride = run.layer
        if kind not in network.cells:
            fixed += run.length * of(kind, ops[kind], run.in_shapes[0], channels, stride)
            continue
        for shape in run.in_shapes if network.cells[kind].preprocess else ():
            by = _supernet._preprocess_stride(shape, run.in_shapes[-1])
            fixed += run.length * of("preprocess", inputs, shape, channels, by)
        for group in run.groups:
            price = lambda op, group=group: of(op, ops[op], group.in_shape, group.channels, group.stride)
            each = [0.0 if op == _genotypes.NONE else price(op) for op in group.ops]
            for e in group.edges:
                values[kind, e] += run.length * np.array(each)
    shape, num = runs[-1].out_shape, network.num_outputs
    init = lambda key: {"w": jnp.zeros((shape[-1], num)), "b": jnp.zeros(num)}
    fixed += cost("head", init, lambda params, x: _supernet.head(network, params, x), shape)
    return fixed, tuple(CostTerm((row,), c) for row, c in values.items())


def _elastic_costs(network: ElasticNetwork, in_shape, cost) -> tuple[float, tuple[CostTerm, ...]]:
    fixed, terms = 0.0, []

    def of(at: _elastic.Placed):
        init = lambda key: _elastic.init_layer(at, jax.random.split(key, 1))
        apply = lambda params, x: _elastic.apply_layer(at, params, x, {})
        # Where it stands matters by the shape alone, but for the head, which has no ReLU.
        name = (at.name == "head", at.layer, at.in_width, at.flat)
        return cost(name, init, apply, (*at.spatial, at.in_width[0]))

    def of_depth(at: _elastic.Placed, depth: int):
        layer = at.layer._replace(depth=(1,))
        total = of(at._replace(layer=layer))
        if depth > 1:
            again = at._replace(layer=layer._replace(stride=1), spatial=at.out_spatial, in_width=layer.width)
            total += (depth - 1) * of(again._replace(flat=False))
        return total

    for at in _elastic.placed(network, in_shape):
        choices = at.choices()
        depths = at.layer.depth
        sizes = {name: at.in_width if name == "in" else getattr(at.layer, name) for name in choices if name != "depth"}
        values = np.zeros([*map(len, sizes.values()), len(depths)])
        for digits in np.ndindex(values.shape[:-1]):
            small = at.sized({name: c[d] for d, (name, c) in zip(digits, sizes.items(), strict=True)})
            values[digits] = [of_depth(small, depth) for depth in depths]
        if "depth" not in choices:
            values = values[..., 0]
        rows = tuple((choices[name], 0) for name in [*sizes, *(["depth"] if "depth" in choices else [])])
        if rows:
            terms.append(CostTerm(rows, values))
        else:
            fixed += float(values)
    return fixed, tuple(terms)


def check_table(table: CostTable, network: Space) -> None:
    """ValueError where a table is of another space, whose choices a network does not have, or where a term's costs have
    not one axis for each of its edges."""
    cells = network.cells
    for term in table.terms:
        if np.ndim(term.values) != len(term.rows):
            raise ValueError(
                f"A term of `table` has costs of shape {np.shape(term.values)} for {len(term.rows)} edges; it must "
                "have one axis for each, of its candidates."
            )
        for (kind, edge), num in zip(term.rows, np.shape(term.values), strict=True):
            edges = cells[kind].edges if kind in cells else ()
            there = len(edges[edge].ops) if edge < len(edges) else 0
            if there != num:
                has = f"{there} there" if there else f"none there; its kinds are {', '.join(cells)}"
                raise ValueError(
                    "`table` must be of the network's space, as `nas.cost_table(network, ...)` is: it has costs of "
                    f"{num} candidates for the edge {edge} of {kind!r}, and the network has {has}."
                )


def expected_cost(table: CostTable, weights: Mapping[str, Any], network: Space | None = None) -> jax.Array:
    """C(w), what the networks under mixing weights cost on average.

    It is the mean over networks whose choices are drawn apart, each by its own weights, where these are a softmax's.
    Differentiable in any mode; linear in the weights of each choice.

    Where a space keeps so many edges into each node (`Network.keep`, DARTS's 2), the mean over all edges is no cost of
    its networks. With `network` only those edges count that `discretize` keeps at these weights, by their ops that are
    not "none", w[e, o] / Σ_{o' ≠ none} w[e, o']: the mean over networks of these edges. Which ones they are is
    constant for derivatives, and C jumps where others become the strongest. (NAS-Bench-101's graphs count with all
    their vertices.)

    An edge that is not kept, or whose weights are 0 (`one_hot` of a genotype without it), adds nothing where it has a
    term of its own. In a term of several edges (`nas_bench_201_costs`) it is its "none", which only `network` tells.

    Args:
      table: of the space.
      weights: kind -> [edges, ops].
      network: the space, whose `keep` is then taken into account.

    Returns:
      [], in the table's unit.

    Raises:
      ValueError: the weights are not of this space; in a term of several edges one has no weight (where that can be
        seen: the weights are not traced), and `network` is not given; or such an edge has no "none".
    """
    dtype = jnp.zeros(0).dtype
    if isinstance(network, Network) and isinstance(network.keep, (int, np.integer)):
        weights = {**weights, **_of_kept_edges(network, weights)}
    total = jnp.asarray(table.fixed, dtype)
    for term in table.terms:
        left = jnp.asarray(term.values, dtype)
        for kind, edge in term.rows:
            if kind not in weights or np.ndim(weights[kind]) != 2 or np.shape(weights[kind])[1] != left.shape[0]:
                got = {kind: np.shape(w) for kind, w in weights.items()}
                raise ValueError(f"The weights of {kind!r} must have {left.shape[0]} columns; got the shapes {got}.")
            row = jnp.asarray(weights[kind], dtype)[edge]
            if len(term.rows) > 1:
                row = _in_whole(row, weights[kind], network, kind, edge)
            left = jnp.tensordot(row, left, 1)
        total = total + left
    return total


def _in_whole(row: jax.Array, given: Any, network: Space | None, kind: str, edge: int) -> jax.Array:
    """Weights in a table of whole networks: an edge that is not there is its "none", since a product with 0 is 0."""
    absent = not isinstance(given, Tracer) and not np.asarray(given)[edge].any()
    if network is None and absent:
        raise ValueError(
            f"The edge {edge} of {kind!r} has no weight, and the table is of whole networks, which have an op or "
            '"none" there: pass `network`, which says where "none" stands.'
        )
    if not isinstance(network, Network):
        return row
    edges, keep = network.cells[kind].edges, network.keep
    num_into = sum(other.target == edges[edge].target for other in edges)
    may_go = absent or (isinstance(keep, (int, np.integer)) and keep < num_into)
    if not may_go and _genotypes.NONE not in edges[edge].ops:
        return row
    return jnp.where(row.any(), row, _none_row(network, kind, edge))


def _none_row(network: Space, kind: str, edge: int) -> np.ndarray:
    """The weights of an edge that is not there, in a table of whole networks."""
    ops = network.cells[kind].edges[edge].ops
    if _genotypes.NONE not in ops:
        raise ValueError(
            f'The table is of whole networks, and the edge {edge} of {kind!r}, which a network may lack, has no "none".'
        )
    return np.array([float(op == _genotypes.NONE) for op in ops])


def _of_kept_edges(network: Network, weights: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Of the edges that `discretize` keeps, the weights of ops other than "none", with sum 1; of others 0."""
    kept = {}
    for kind, chosen in discretized(network, weights).items():
        w = jnp.asarray(weights[kind])
        some = np.array([[op != _genotypes.NONE for op in edge.ops] for edge in network.cells[kind].edges])
        total = jnp.where(some, w, 0.0).sum(1, keepdims=True)
        # A genotype's own weights, `one_hot`, have no op on an edge that it has not.
        shares = jnp.where(some & (total > 0), w / jnp.where(total > 0, total, 1.0), 0.0)
        kept[kind] = chosen.sum(1, keepdims=True) * shares
    return kept


def cost_of(table: CostTable, network: Space, genotype: Genotype) -> float:
    """What one architecture costs.

    Args:
      table: of the space.
      network: the space.
      genotype: of it.

    Returns:
      The cost, in the table's unit, in double precision.

    Raises:
      ValueError: the genotype, or the table, is not of this space; an edge that it lacks has no "none" in a table of
        whole networks.
    """
    check_table(table, network)
    weights, total = _genotypes.one_hot(network, genotype), table.fixed
    for term in table.terms:
        left = term.values
        for kind, edge in term.rows:
            row = weights[kind][edge]
            if len(term.rows) > 1 and not row.any():
                row = _none_row(network, kind, edge)
            left = np.tensordot(row, left, 1)
        total += float(left)
    return total


# ---- Measures, and tables that are there ----------------------------------------------------------------------------


def num_params(apply: Callable, params: base.PyTree, x: Any) -> float:
    """A measure for `cost_table`: the number of parameters.

    Args:
      apply: not looked at.
      params: of the op.
      x: not looked at.

    Returns:
      A number of entries.
    """
    return float(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)))


def latency(*, num_samples: int = 15, min_seconds: float = 1e-3) -> Measure:
    """A measure for `cost_table`: seconds on this device, of the compiled op by itself, warm.

    The median of `num_samples` times, each of so many calls that they take `min_seconds` together. Ops by themselves
    are not what they are in one program, where they are fused and none is dispatched: a sum of them is no prediction of
    a network's time, and how well sums rank networks has not been measured. Take the batch size at which it will run,
    and a machine that does nothing else.

    Args:
      num_samples: at least 1.
      min_seconds: positive.

    Returns:
      `(apply, params, x) -> seconds`.

    Raises:
      ValueError: a number is out of range.
    """
    base.check_integer("num_samples", num_samples, 1)
    base.check_positive("min_seconds", min_seconds)

    def measure(apply, params, x):
        rng = np.random.default_rng(0)  # zeros may be quicker, and denormal numbers slower
        arguments = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), (params, x))
        compiled = jax.jit(apply).lower(*arguments).compile()

        def seconds(calls):
            start = time.perf_counter()
            for _ in range(calls):
                out = compiled(*arguments)
            jax.block_until_ready(out)
            return time.perf_counter() - start

        calls = 1
        while seconds(calls) < min_seconds:
            calls *= 2
        return float(np.median([seconds(calls) / calls for _ in range(num_samples)]))

    return measure


def nas_bench_201_costs(resource: str, task: str = "cifar10", *, folder: str | os.PathLike | None = None) -> CostTable:
    """What HW-NAS-Bench measured of NAS-Bench-201's networks, as a table: one term over all six edges.

    Args:
      resource: "edgegpu_latency", "raspi4_latency", "edgetpu_latency", "pixel3_latency", "eyeriss_latency" or
        "fpga_latency" (ms); "edgegpu_energy", "eyeriss_energy" or "fpga_energy" (mJ); "eyeriss_arithmetic_intensity".
      task: "cifar10", "cifar100" or "ImageNet16-120".
      folder: of nasbench201.npz; by default what METAOPT_DATA names.

    Returns:
      A `CostTable` of `nas_bench_201_space`, for one image.

    Raises:
      ValueError: the file is not there, or has no such resource or task.

    Source: Li et al., ICLR 2021, https://arxiv.org/abs/2103.10584
    """
    with _benchmarks._open("nasbench201", folder) as data:
        names, tasks = data["hw_names"].tolist(), data["datasets"].tolist()
        for name, given, known in (("resource", resource, names), ("task", task, tasks)):
            if given not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {given!r}.")
        values = np.zeros([5] * 6)
        values[tuple(data["edge_ops"].T.astype(int))] = data["hw_cost"][tasks.index(task), :, names.index(resource)]
    unit = "ms" if resource.endswith("latency") else "mJ" if resource.endswith("energy") else ""
    return CostTable(0.0, (CostTerm(tuple(("cell", e) for e in range(6)), values),), unit)


def cost_table_to_json(table: CostTable) -> str:
    """A table as JSON: a device is measured once.

    Args:
      table: any.

    Returns:
      Text, with the version of the form.
    """
    terms = [{"rows": term.rows, "values": term.values.tolist()} for term in table.terms]
    return json.dumps({"version": 1, "fixed": table.fixed, "unit": table.unit, "terms": terms})


def cost_table_from_json(text: str) -> CostTable:
    """The table that `cost_table_to_json` wrote.

    Args:
      text: JSON.

    Returns:
      A `CostTable`.

    Raises:
      ValueError: if the text is not JSON of this form, or is of another version.
    """
    data = read_json(text, "fixed", "unit", "terms")
    try:
        terms = []
        for term in data["terms"]:
            rows = tuple((str(kind), operator.index(edge)) for kind, edge in term["rows"])
            values = np.asarray(term["values"], float)
            if values.ndim != len(rows):
                raise ValueError(f"`values` must have an axis for each of the {len(rows)} rows; got {values.shape}")
            terms.append(CostTerm(rows, values))
        table = CostTable(float(data["fixed"]), tuple(terms), str(data["unit"]))
        if not all(np.isfinite(costs).all() for costs in (table.fixed, *(term.values for term in terms))):
            raise ValueError("costs must be finite")
        return table
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"This is not a table that `cost_table_to_json` wrote ({reason}): {text[:200]!r}.") from error
