"""The cost of an architecture as a differentiable function of its mixing weights.

A table has the cost of every op at its place in the network. The cost of a mixture is the mean cost of its networks, if
each choice is drawn by its weights:

    C(w) = c₀ + Σ_terms Σ_(i, j, ...) w_a[i] · w_b[j] · ... · c[i, j, ...]

A term belongs to one of three parts of a network:

- an edge of a cell: c has the cost of each of its ops;
- a layer of an `ElasticNetwork`: c has the cost of each combination of its sizes and the width of its input;
- a whole cell, if only whole networks were measured: c has the cost of each combination of the ops on its edges.

At one-hot weights C is the cost of the discrete network. "none" costs nothing by itself, because no discrete network
contains it. If no edge leaves the input of a cell, the layers before that cell have no effect. C still counts them, but
`hypergrad.flops` of the whole network may remove them as dead code. C is not the cost of training the supernet, which
runs every op, and every size at its largest.

Source: the expected latency of Cai, Zhu & Han, ICLR 2019, https://arxiv.org/abs/1812.00332
"""

import math
import operator
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _files, _saving, base
from metaopt._jaxpr import Tracer
from metaopt.nas import _elastic, _genotypes, _layers, _ops
from metaopt.nas._relaxations import discretized
from metaopt.nas._specs import ElasticNetwork, Genotype, Network, Space, check_network

Measure = Callable[..., float]  # (apply, params, x) -> cost


class CostTerm(NamedTuple):
    """A part of a cost that depends on one or more choices together.

    Attributes:
      rows: (kind of cell or name of a size, edge number), one for each axis of `values`.
      values: the cost of each combination of candidate ops.
    """

    rows: tuple[tuple[str, int], ...]
    values: np.ndarray


class CostTable(NamedTuple):
    """The costs of the parts of a space's networks.

    Attributes:
      fixed: cost of the parts that all networks have.
      terms: costs of the parts that depend on a choice.
      unit: unit of the costs, for people to read.
    """

    fixed: float
    terms: tuple[CostTerm, ...]
    unit: str = ""

    def expected_cost(self, weights: Mapping[str, Any], network: Space | None = None) -> jax.Array:
        """C(w), the mean cost of the networks under mixing weights.

        If the weights come from a softmax, it is the mean over networks whose choices are drawn independently, each by
        its own weights. It is differentiable in any mode, and linear in the weights of each choice.

        If a space keeps a number of edges into each node (`Network.keep`, 2 for DARTS), the mean over all edges is not
        the cost of any of its networks. With `network`, only the edges count that `derive_genotype` keeps at these
        weights. Their ops other than "none" have the weights w[e, o] / Σ_{o' ≠ none} w[e, o'], and C is the mean over
        networks of these edges. Derivatives treat the set of kept edges as constant, and C jumps when other edges
        become the strongest. (For the space of NAS-Bench-101, all vertices and edges count, even with `network`.)

        An edge may be absent: it is not kept, or its weights are 0 (`one_hot` of a genotype without it). If it has its
        own term, it adds nothing. In a term of several edges (a table of whole networks), it counts as its "none". The
        table does not know which candidate is "none", so pass `network`.

        Args:
          weights: kind -> [edges, ops].
          network: the space; if given, its `keep` is taken into account.

        Returns:
          [], in `unit`.

        Raises:
          ValueError: in a term of several edges, if an edge has no weight and `network` is not given. (Traced weights
            are not checked for this.)
          ValueError: in a term of several edges, if an edge may be absent and has no "none" among its candidates.
        """
        dtype = jnp.zeros(0).dtype
        if isinstance(network, Network) and isinstance(network.keep, (int, np.integer)):
            weights = {**weights, **_of_kept_edges(network, weights)}
        total = jnp.asarray(self.fixed, dtype)
        for kind, rows in weights.items():
            if jnp.ndim(rows) != 2:
                raise ValueError(
                    f"The weights of {kind!r} must be [edges, ops] of one task; got shape {jnp.shape(rows)}."
                )
        for term in self.terms:
            cost = jnp.asarray(term.values, dtype)
            for kind, edge in term.rows:
                row = jnp.asarray(weights[kind], dtype)[edge]
                if len(term.rows) > 1:
                    row = _in_whole(row, weights[kind], network, kind, edge)
                cost = jnp.tensordot(row, cost, 1)
            total = total + cost
        return total

    def cost_of(self, network: Space, genotype: Genotype) -> float:
        """The cost of one architecture.

        Args:
          network: the space.
          genotype: an architecture of the space.

        Returns:
          The cost, in `unit`, in double precision.

        Raises:
          ValueError: if the genotype or the table is not of this space.
          ValueError: in a table of whole networks, if the genotype lacks an edge without a candidate "none".
        """
        check_table(self, network)
        weights, total = _genotypes.one_hot(network, genotype), self.fixed
        for term in self.terms:
            cost = term.values
            for kind, edge in term.rows:
                row = weights[kind][edge]
                if len(term.rows) > 1 and not row.any():
                    row = _none_row(network, kind, edge)
                cost = np.tensordot(row, cost, 1)
            total += float(cost)
        return total


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
    """Measures every op of a space once at every shape at which it occurs.

    The costs of the supernet's own operations between ops are not included: sums, concatenations and copies.

    Args:
      network: the spec of a supernet.
      in_shape: shape of one input, without the batch axis.
      measure: `(apply, params, x) -> cost`. It gets a function `apply(params, x)` and the shapes of its arguments. Use
        `hypergrad.flops`, `nas.num_params`, `nas.latency()` or your own function. With
        `functools.partial(hypergrad.flops, products_only=True)` the cost is twice the usual count of the literature.
      ops: as for `supernet`.
      partial: as for `supernet`.
      batch_size: number of rows of the input that is measured.
      unit: unit of the costs.

    Returns:
      A `CostTable`, for a batch of `batch_size`.

    Raises:
      ValueError: as for `supernet`.

    >>> from metaopt import hypergrad, nas
    >>> space = nas.mlp_space(2, widths=(4, 8), depths=(1, 2))
    >>> table = nas.cost_table(space, (3,), nas.num_params, ops={})
    >>> wide = {"linear.width": ((0, 1, "8"),), "linear.depth": ((0, 1, "2"),)}
    >>> table.cost_of(space, wide)  # (3 + 1)8 + (8 + 1)8 + (8 + 1)2
    122.0
    """
    measured: dict[Any, float] = {}
    dtype = jnp.zeros(0).dtype

    def cost(name, init, apply, shape):
        """Measures one op. Ops with the same name and shape are measured once."""
        if (name, shape) not in measured:
            params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
            measured[name, shape] = float(measure(apply, params, jax.ShapeDtypeStruct((batch_size, *shape), dtype)))
        return measured[name, shape]

    in_shape = tuple(in_shape)
    if isinstance(network, ElasticNetwork):
        return CostTable(*_elastic_costs(network, in_shape, cost), unit)
    check_network(network)
    return CostTable(*_cell_costs(network, in_shape, ops, partial, cost), unit)


def _cell_costs(network: Network, in_shape, ops, partial, cost) -> tuple[float, tuple[CostTerm, ...]]:
    runs = _layers.build(network, in_shape, ops, partial)
    fixed = 0.0
    values = {
        (kind, e): np.zeros(len(edge.ops)) for kind, cell in network.cells.items() for e, edge in enumerate(cell.edges)
    }

    def op_cost(name, op, shape, channels, stride):
        apply = lambda params, x: op.apply(params, x, channels, stride)
        return cost((name, channels, stride), lambda key: op.init(key, shape, channels, stride), apply, shape)

    inputs = _ops.Op(_layers.input_init, _layers.input_apply)
    for run in runs:
        kind, channels, stride = run.layer
        if kind not in network.cells:
            fixed += run.length * op_cost(kind, ops[kind], run.in_shapes[0], channels, stride)
            continue
        for shape in run.in_shapes if network.cells[kind].preprocess else ():
            reduction = _layers.preprocess_stride(shape, run.in_shapes[-1])
            fixed += run.length * op_cost("preprocess", inputs, shape, channels, reduction)
        for group in run.groups:
            price = lambda op, group=group: op_cost(op, ops[op], group.in_shape, group.channels, group.stride)
            each = [0.0 if op == _genotypes.NONE else price(op) for op in group.ops]
            for e in group.edges:
                values[kind, e] += run.length * np.array(each)
    shape, num = runs[-1].out_shape, network.num_outputs
    init = lambda key: {"w": jnp.zeros((shape[-1], num)), "b": jnp.zeros(num)}
    fixed += cost("head", init, lambda params, x: _layers.head(network, params, x), shape)
    return fixed, tuple(CostTerm((row,), c) for row, c in values.items())


def _elastic_costs(network: ElasticNetwork, in_shape, cost) -> tuple[float, tuple[CostTerm, ...]]:
    fixed, terms = 0.0, []

    def once(place: _elastic.Placed):
        init = lambda key: _elastic.init_layer(place, jax.random.split(key, 1))
        apply = lambda params, x: _elastic.apply_layer(place, params, x, {})
        # Layers of equal sizes have equal costs at any place in the network. Only the head differs: it has no ReLU.
        name = (place.name == "head", place.layer, place.in_width, place.flat)
        return cost(name, init, apply, (*place.spatial, place.in_width[0]))

    def repeated(place: _elastic.Placed, depth: int):
        layer = place.layer._replace(depth=(1,))
        total = once(place._replace(layer=layer))
        if depth > 1:
            later = layer._replace(stride=1)
            again = place._replace(layer=later, spatial=place.out_spatial, in_width=layer.width, flat=False)
            total += (depth - 1) * once(again)
        return total

    for place in _elastic.placed(network, in_shape):
        choices = place.choices()
        depths = place.layer.depth
        sizes = {
            name: place.in_width if name == "in" else getattr(place.layer, name) for name in choices if name != "depth"
        }
        values = np.zeros([*map(len, sizes.values()), len(depths)])
        for digits in np.ndindex(values.shape[:-1]):
            small = place.sized({name: c[d] for d, (name, c) in zip(digits, sizes.items(), strict=True)})
            values[digits] = [repeated(small, depth) for depth in depths]
        if "depth" not in choices:
            values = values[..., 0]
        rows = tuple((choices[name], 0) for name in [*sizes, *(["depth"] if "depth" in choices else [])])
        if rows:
            terms.append(CostTerm(rows, values))
        else:
            fixed += float(values)
    return fixed, tuple(terms)


def check_table(table: CostTable, network: Space) -> None:
    """Raises ValueError if a table does not fit a network.

    The table must not have choices that the network lacks, and the costs of a term must have one axis for each of its
    edges.
    """
    cells = network.cells
    for term in table.terms:
        for (kind, edge), num in zip(term.rows, np.shape(term.values), strict=True):
            edges = cells[kind].edges if kind in cells else ()
            num_ops = len(edges[edge].ops) if edge < len(edges) else 0
            if num_ops != num:
                network_text = f"{num_ops} there" if num_ops else f"none there; its kinds are {', '.join(cells)}"
                raise ValueError(
                    "`table` must be of the network's space, as `nas.cost_table(network, ...)` is: it has costs of "
                    f"{num} candidates for the edge {edge} of {kind!r}, and the network has {network_text}."
                )


def _in_whole(row: jax.Array, weights: Any, network: Space | None, kind: str, edge: int) -> jax.Array:
    """Weights of an edge in a table of whole networks. An absent edge counts as its "none".

    Its own weights, all 0, would make the product of the whole term 0.
    """
    absent = not isinstance(weights, Tracer) and not np.asarray(weights)[edge].any()
    if network is None and absent:
        raise ValueError(
            f"The edge {edge} of {kind!r} has no weight, but the table is for whole networks, which have an op or "
            '"none" there. Pass `network`, which has the position of "none".'
        )
    if not isinstance(network, Network):
        return row
    edges, keep = network.cells[kind].edges, network.keep
    num_into = sum(other.target == edges[edge].target for other in edges)
    may_be_absent = absent or (isinstance(keep, (int, np.integer)) and keep < num_into)
    if not may_be_absent and _genotypes.NONE not in edges[edge].ops:
        return row
    return jnp.where(row.any(), row, _none_row(network, kind, edge))


def _none_row(network: Space, kind: str, edge: int) -> np.ndarray:
    """The weights of an absent edge in a table of whole networks: 1 for its "none"."""
    ops = network.cells[kind].edges[edge].ops
    if _genotypes.NONE not in ops:
        raise ValueError(
            f'The table is of whole networks, and the edge {edge} of {kind!r}, which a network may lack, has no "none".'
        )
    return np.array([float(op == _genotypes.NONE) for op in ops])


def _of_kept_edges(network: Network, weights: Mapping[str, Any]) -> dict[str, jax.Array]:
    """For edges that `derive_genotype` keeps, the weights of ops other than "none", with sum 1; 0 for other edges."""
    kept = {}
    for kind, chosen in discretized(network, weights).items():
        w = jnp.asarray(weights[kind])
        is_op = np.array([[op != _genotypes.NONE for op in edge.ops] for edge in network.cells[kind].edges])
        total = jnp.where(is_op, w, 0.0).sum(1, keepdims=True)
        # The weights of a genotype, `one_hot`, are 0 on the edges that it lacks.
        shares = jnp.where(is_op & (total > 0), w / jnp.where(total > 0, total, 1.0), 0.0)
        kept[kind] = chosen.sum(1, keepdims=True) * shares
    return kept


# ---- Measures, and tables as JSON ---------------------------------------------------------------------------------


def num_params(apply: Callable, params: base.PyTree, x: Any) -> float:
    """A measure for `cost_table`: the number of parameters.

    Args:
      apply: not used.
      params: parameters of the op.
      x: not used.

    Returns:
      The number of entries.
    """
    return float(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)))


def latency(*, num_samples: int = 15, min_seconds: float = 1e-3) -> Measure:
    """Makes a measure for `cost_table`: the seconds that a compiled op takes on this device, after a first run.

    It is the median of `num_samples` times. Each time is the mean over enough calls to take `min_seconds` together. The
    op is compiled as a separate program. In the program of a network, ops are fused and not dispatched one by one. So a
    sum of latencies does not predict the time of a network. How well such sums rank networks has not been measured. Use
    the batch size at which the network will run, and a machine that runs nothing else.

    Args:
      num_samples: the number of measured times.
      min_seconds: the smallest total duration of the calls for one measured time.

    Returns:
      `(apply, params, x) -> seconds`.
    """

    def measure(apply, params, x):
        rng = np.random.default_rng(0)  # zeros may run faster, and denormal numbers slower
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


def _numbers(name: str, value: Any) -> np.ndarray:
    """JSON numbers as an array; raises ValueError for other values. (`astype` would convert null and "nan" to NaN.)"""
    array = np.asarray(value)
    if array.dtype.kind not in "if":
        raise ValueError(f"`{name}` must be numbers; got {reprlib.repr(value)}")
    return array.astype(float)


def _encode(table: CostTable) -> tuple[dict[str, Any], dict[str, Any]]:
    terms = [{"rows": term.rows, "values": term.values.tolist()} for term in table.terms]
    return {"fixed": float(table.fixed), "unit": table.unit, "terms": terms}, {}


def _decode(header: dict[str, Any], file: _files.Npz) -> CostTable:
    terms = []
    for term in header["terms"]:
        rows = tuple((str(kind), operator.index(edge)) for kind, edge in term["rows"])
        values = _numbers("values", term["values"])
        if values.ndim != len(rows):
            raise ValueError(f"`values` must have an axis for each of the {len(rows)} rows; got {values.shape}")
        terms.append(CostTerm(rows, values))
    return CostTable(float(_numbers("fixed", header["fixed"])), tuple(terms), str(header["unit"]))


_saving.register(_saving.Kind("cost_table", CostTable, _encode, _decode))
