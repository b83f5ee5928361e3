"""What `nas` rejects: genotypes, specs of networks, ops, costs and tables. `test_search_refusals` has the searches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_search import DARTS_V2, graph

from metaopt import nas, predictors, spaces
from metaopt.nas import _graphs, _named_spaces, _nas_bench_101, _normalization, _relaxations

KEY = jax.random.key(0)
CONV3, CONV1, POOL = _named_spaces.NAS_BENCH_101_PRIMITIVES
CELL = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
THREE = nas.Network({"cell": CELL}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), 2)
ALPHA = np.random.default_rng(0).normal(size=(3, 3))
CELLS_201 = nas.nas_bench_201_space()
GRAPHS = nas.nas_bench_101_space(3, channels=2, cells_per_stack=1, num_stacks=1, num_vertices=4)
SIZES = nas.mlp_space(2, widths=(2, 4), depths=(1, 2))
WIDTHS = nas.mlp_space(2, widths=(4, 6), depths=(1,))
DARTS_CELLS = nas.genotype_from_text(DARTS_V2, form="darts")
TEXT_201 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
DIGITS = nas.genotype_to_configuration(CELLS_201, nas.genotype_from_text(TEXT_201, form="nas_bench_201"))
MIXED = nas.Cell(1, (nas.Edge(0, 1, ("none", "mlp")), nas.Edge(0, 2, ("skip_connect", "mlp"))), (2,))
ODD = nas.Network({"cell": MIXED}, THREE.layers, 2)
BARE = nas.Network({"cell": nas.complete_cell(2, CELL.edges[0].ops[1:])}, THREE.layers, 2)
from_text, to_text = nas.genotype_from_text, nas.genotype_to_text


# ---- Genotypes ------------------------------------------------------------------------------------------------------


def weights_with(value):
    weights = np.full((3, 3), 0.3)
    weights[2, 1] = value
    return {"cell": weights}


def darts_with(op):
    """A published cell with another last edge than `('dil_conv_3x3', 2)`."""
    return lambda: from_text(DARTS_V2.replace("('dil_conv_3x3', 2)", op), form="darts")


COST = nas.CostTable(1.0, (nas.CostTerm((("cell", 0),), np.arange(3.0)),), "s")
NO_PATH = graph([(0, 1)], (CONV3,))
PARALLEL = graph([(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4)], [CONV1] * 3)
ROW_101 = [1, 0, 0, 0, 0, 0, 1, *[0] * 14, 3, *[0] * 4]
TWO_EDGES = "every node has two edges from earlier nodes"
GENOTYPES = [
    (lambda: nas.derive_genotype(THREE, {"cell": ALPHA}), "must not be negative; .* instead of α"),
    (
        lambda: nas.derive_genotype(THREE, {"cell": np.ones((2, 3))}),
        r"the shape \(3, 3\), a row for each edge, .* got the shape \(2, 3\)",
    ),
    *(
        (lambda value=value, read=read: read(value), "The weights of 'cell' are not all finite")
        for value in (np.nan, np.inf)
        for read in (
            lambda value: nas.derive_genotype(THREE, weights_with(value)),
            lambda value: nas.derive_genotype(THREE, weights_with(value), keep=None),
            lambda value: _relaxations.discretized(THREE, weights_with(value)),
            lambda value: nas.within_budget(THREE, weights_with(value), COST, 9.0),
            lambda value: nas.derive_genotype(GRAPHS, {"cell": np.full((8, 3), value)}),
        )
    ),
    *(
        (lambda keep=keep: nas.random_genotype(0, CELLS_201, keep=keep), "`keep` must be a number of edges .*; got")
        for keep in ("all", 0, 1.5)
    ),
    *(
        (lambda bad=bad: nas.discrete(THREE, bad), message)
        for bad, message in [
            ({"cell": ((0, 1, "conv"),)}, "no op 'conv' on the edge 0 -> 1"),
            ({"cell": ((0, 3, "mlp"),)}, "no op 'mlp' on the edge 0 -> 3"),
            ({"other": ()}, "the kinds"),
            ({"cell": ((0, 1, "mlp"), (0, 1, "none"))}, "twice"),
        ]
    ),
    *(
        (lambda bad=bad: from_text(bad, form="darts"), "not a genotype in DARTS's format")
        for bad in [
            *(DARTS_V2.replace("Genotype", "print"), DARTS_V2.replace("normal=", "", 1), "Genotype()", "print(1)"),
            *("Genotype(normal_concat=[2])", DARTS_V2[:-1] + ", other_concat=[2])", "Genotype(1)"),
            *("Genotype(normal=", "3", DARTS_V2.replace("[2, 3, 4, 5]", "[4, 5]"), DARTS_V2[:-37] + ")"),
        ]
    ),
    (darts_with("('dil_conv_7x7', 2)"), "with an op among none, .*; got 2 and 'dil_conv_7x7'"),
    (darts_with("('dil_conv_3x3', 5)"), "edges to node 5 of 'normal' must come from nodes 0 to 4.*got 5"),
    (darts_with("('dil_conv_3x3', -1)"), "must come from nodes 0 to 4, .*; got -1"),
    (darts_with("('dil_conv_3x3', 0)"), "has two edges from the same node"),
    (darts_with("('dil_conv_3x3', '2')"), "got '2'"),
    (darts_with("('dil_conv_3x3', 2), ('none', 3)"), "not a genotype in DARTS's format"),
    (lambda: to_text({"normal": ((0, 2, "skip_connect"),)}, form="darts"), TWO_EDGES),
    (lambda: to_text({"normal": ((0, 2, "none"), (2, 2, "none"))}, form="darts"), "two edges from earlier nodes"),
    (lambda: to_text({"normal": ()}, form="darts"), TWO_EDGES),
    *(
        (lambda text=text: from_text(text), f"This is not JSON that `genotype_to_text` wrote .*{message}")
        for text, message in [
            ("no JSON", "Expecting value"),
            ("[1]", "'list' object has no attribute"),
            ('{"version": 2, "genotype": {}}', "its version must be 1; got 2"),
            ('{"genotype": {}}', "its version must be 1; got None"),
            ('{"version": 1}', "it lacks 'genotype'"),
            ('{"version": 1, "genotype": [1]}', "'list' object has no attribute"),
            ('{"version": 1, "genotype": {"cell": 3}}', "'int' object is not iterable"),
            ('{"version": 1, "genotype": {"cell": [[0, 2]]}}', "an edge is"),
            ('{"version": 1, "genotype": {"cell": [[2, 2, "none"]]}}', "an edge is"),
            ('{"version": 1, "genotype": {"cell": [[-1, 2, "none"]]}}', "an edge is"),
            ('{"version": 1, "genotype": {"cell": [[true, 2, "none"]]}}', "an edge is"),
            ('{"version": 1, "genotype": {"cell": [[0, 2, "none"], [0, 2, "mlp"]]}}', "has an edge of 'cell' twice"),
        ]
    ),
    *(
        (lambda bad=bad: to_text(bad, form="nas_bench_201"), "A cell of NAS-Bench-201 is")
        for bad in (
            {"normal": ()},
            {"cell": ((0, 4, "none"),)},
            {"cell": ((0, 1, "mlp"),)},
            {"cell": ((0, 1, "none"),) * 2},
        )
    ),
    (
        lambda: from_text("|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|", form="nas_bench_201"),
        "The ops of NAS-Bench-201 are .*; got '.conv~0",
    ),
    *(
        (lambda bad=bad: from_text(bad, form="nas_bench_201"), "NAS-Bench-201")
        for bad in ("|a~0|", TEXT_201.replace("~2", "~1"), "|a~0|+|a~0|a~1|+|a~0|a~1|a~2|a~3|")
    ),
    *(
        (lambda keep=keep: nas.darts(THREE, (3,), ops=nas.BLOCKS, keep=keep), r"`keep` must be a number of edges \(at")
        for keep in ["foo", 2.0, 0, True]
    ),
    (
        lambda: nas.darts(THREE, (3,), ops=nas.BLOCKS, keep="graph"),
        "be a number of edges or None for others; got 'graph'",
    ),
    (lambda: nas.genotype_to_configuration(THREE, {"cell": ((1, 2, "mlp"),)}), "has 1 edges into node 1 .*; got those"),
    (
        lambda: nas.genotype_to_configuration(ODD, {"cell": ()}, keep=None),
        'lacks the edge 0 -> 2 of .* no "none": skip',
    ),
    (lambda: nas.configuration_space(ODD), 'Only some edges of .* have the candidate "none"'),
    (lambda: nas.configuration_space(nas.nas_bench_101_space()), "cells are graphs with ops on vertices"),
    *(
        (
            lambda digit=digit: nas.genotype_from_configuration(CELLS_201, {**DIGITS, "cell.0-1": digit}),
            rf"must be an integer in \[0, 4\]; got {digit}",
        )
        for digit in (5, 1.7, np.nan)
    ),
    (
        lambda: nas.genotype_from_configuration(SIZES, dict.fromkeys(nas.configuration_space(SIZES), 2)),
        r"'linear.width' must be an integer in \[0, 1\]; got 2",
    ),
    (lambda: nas.genotype_from_configuration(SIZES, {"linear.width": 1}), "A configuration has the entries .*; got"),
    # Graphs.
    (lambda: _graphs.nas_bench_101_hash(NO_PATH), "no path"),
    (lambda: _graphs.pruned(nas.Graph(((0, 1), (1, 0)), ("input", "output"))), "must be strictly upper triangular"),
    (lambda: nas.edge_graph([(0, 2, "a"), (2, 1, "b")], output=(1,)), "got 2 -> 1"),
    (lambda: nas.edge_graph([(0, 1, "a")], num_inputs=2, output=(1,)), "got 0 -> 1"),
    *(
        (
            lambda scores=scores: nas.op_scores(THREE, [{"cell": ()}, {"cell": ((0, 1, "mlp"),)}], scores),
            r"`scores` must have a finite score and no \+inf",
        )
        for scores in (np.full(2, np.nan), np.array([0.0, np.inf]))
    ),
    (lambda: _nas_bench_101.nas_bench_101_cells(8), "has 2 to 7 vertices; got 8"),
    (
        lambda: _nas_bench_101.graph_op(PARALLEL).init(KEY, (5, 3), 2, 1),
        "3 vertices lead to the output, but there are only 2 channels",
    ),
    (lambda: _nas_bench_101.graph_op(NO_PATH), "no path"),
    (lambda: _nas_bench_101.graph_op(graph([(0, 1), (1, 2)], ("mlp",))), "The ops of NAS-Bench-101"),
    (
        lambda: nas.derive_genotype(GRAPHS, {"cell": np.ones((8, 2))}),
        r"shape \(8, 3\), .* not be negative; got the shape \(8, 2\)",
    ),
    (
        lambda: _nas_bench_101.graph_genotype(GRAPHS, graph([(0, 1), (1, 2), (2, 3), (3, 4)], [CONV3] * 3)),
        "The space has 4 vertices; the graph has 5",
    ),
    (
        lambda: _nas_bench_101.graph_genotype(CELLS_201, graph([(0, 1), (1, 2)], [CONV3])),
        "must be one that `nas_bench_101_space` made",
    ),
    *(
        (lambda row=row: _nas_bench_101.nas_bench_101_graph(row), "NAS-Bench-101")
        for row in (*(ROW_101[:-1], [2, *ROW_101[1:]], [*ROW_101[:21], 0, 3, 0, 0, 0], [*ROW_101[:21], 4, 0, 0, 0, 0]),)
    ),
    (
        lambda: _nas_bench_101.nas_bench_101_graph([*ROW_101[:2], 1, *ROW_101[3:]]),
        "has 3 vertices, but its matrix has edges of further vertices",
    ),
    *(
        (call, "cells are graphs with ops on vertices")
        for call in (
            lambda: nas.within_budget(GRAPHS, {"cell": np.full((8, 3), 1 / 3)}, nas.CostTable(1.0, ()), 1e9),
            lambda: nas.derive_genotype(GRAPHS, {"cell": np.full((8, 3), 1 / 3)}, keep=2),
            lambda: nas.random_genotype(0, GRAPHS),
        )
    ),
]

# ---- Networks -------------------------------------------------------------------------------------------------------

TWO = nas.complete_cell(2, ("none", "skip_connect"))
CONV = nas.ElasticLayer("conv", (2, 4), (3,))
POINTS = np.array([[0, 1, 0, 2, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0.5, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
LINEAR = nas.Op(lambda *_: (), lambda params, x, channels, stride: x)
UNCHANGED = nas.complete_cell(3, ("none", "linear"), preprocess=False)
TWO_CELLS = nas.Network({"cell": UNCHANGED}, (nas.Layer("cell", 4), nas.Layer("cell", 4)), 2)
ROWS, MASK = jnp.ones((6, 3)), jnp.ones(6)


def network_of_cell(cell):
    return nas.supernet(nas.Network({"cell": cell}, (nas.Layer("cell", 4),), 2), (3,), ops=nas.BLOCKS)


def network_of_layer(layer, shape):
    return nas.supernet(nas.Network({}, (layer,), 2), shape, ops={**nas.BLOCKS, **nas.graph_ops(POINTS)})


def apply(network, weights, x, ops=nas.BLOCKS):
    """The shapes of a network's outputs for inputs of 3 numbers."""
    supernet = nas.supernet(network, (3,), ops=ops)
    return jax.eval_shape(lambda: supernet.apply(supernet.init(KEY), weights, x))


def normalized_with_a_derivative():
    normalized = jax.custom_jvp(nas.normalized)
    normalized.defjvp(lambda x, dx: (nas.normalized(*x), nas.normalized(*dx)))
    return _normalization.over_real_rows(normalized, ROWS, MASK)


NETWORKS = [
    *(
        (lambda cell=cell: network_of_cell(cell), message)
        for cell, message in [
            (TWO._replace(edges=(nas.Edge(2, 1, ("none",)),)), "from a node to a later one"),
            (TWO._replace(edges=(nas.Edge(0, 0, ("none",)),)), "from a node to a later one"),
            (
                TWO._replace(edges=(nas.Edge(0, 1, ("none",)), nas.Edge(0, 2, ("none", "mlp")))),
                "same number on all edges",
            ),
            (TWO._replace(edges=(nas.Edge(0, 1, ("mlp",)), nas.Edge(0, 1, ("none",)))), "edges between the same nodes"),
            (TWO._replace(edges=(nas.Edge(0, 1, ()),)), "a tuple of candidates"),
            (TWO._replace(edges=(nas.Edge(0, 1, "mlp"),)), "0 -> 1 has 'mlp'"),
            (TWO._replace(output=()), "`output` must list nodes"),
            (TWO._replace(output=(0,)), "`output` must list nodes"),
            (TWO._replace(num_inputs=3), "one input, or two inputs"),
            (TWO._replace(num_inputs=2, preprocess=False), "with `preprocess=True`; 'cell' has 2"),
            (nas.complete_cell(0, ("mlp",)), "`output` must list nodes"),
        ]
    ),
    *(
        (lambda network=network: nas.supernet(network, (3,), ops=nas.BLOCKS), message)
        for network, message in [
            (nas.Network({"cell": TWO}, (nas.Layer("linear", 4),), 2), "No layer uses the cell 'cell'"),
        ]
    ),
    *(
        (lambda layers=layers, shape=shape: nas.supernet(nas.ElasticNetwork(layers, 2), shape, ops={}), message)
        for layers, shape, message in [
            ({"a": CONV._replace(kind="dense")}, (4, 1), "The kind of a layer must be one of .*; 'a' has 'dense'"),
            ({"a": CONV._replace(norm="group")}, (4, 1), "has 'conv' and 'group'"),
            ({"a": CONV._replace(width=(4, 2))}, (4, 1), "candidates of a.width must be positive integers that incr"),
            ({"a": CONV._replace(width=())}, (4, 1), r"candidates of a.width .*; got \(\)"),
            ({"a": CONV._replace(depth=(0, 1))}, (4, 1), "candidates of a.depth"),
            ({"a": CONV._replace(kernel=(2, 3))}, (4, 1), "a.kernel must be odd"),
            ({"a": nas.ElasticLayer("max_pool", kernel=(3,))}, (4, 1), "'max_pool' layer, which does not use 'kernel'"),
            ({"a": nas.ElasticLayer("avg_pool", norm="batch")}, (4, 1), "does not use 'norm'"),
            ({"a": nas.ElasticLayer("linear", (2,), stride=2)}, (4,), "does not use 'stride'"),
            ({"a": CONV}, (4,), r"'a' is 'conv', which needs one to three spatial axes; .* \(4,\)"),
            ({"f": nas.ElasticLayer("flatten"), "a": CONV}, (4, 1), "layer after a 'flatten'"),
            ({"head": CONV}, (4, 1), "A layer is called 'head'"),
        ]
    ),
    *(
        (lambda layer=layer, shape=shape: network_of_layer(layer, shape), message)
        for layer, shape, message in [
            (nas.Layer("gcn", 4, 2), (5, 3), r"'gcn' must turn the shape \(2, 5, 3\) into \(2, 3, 4\) .* stride 2"),
            (nas.Layer("tokens", 4), (4,), r"'tokens' needs inputs of the shape \(length, width\); got \(4,\)"),
            (nas.Layer("transformer", 4, 2), (4, 4), r"'transformer' must turn the shape \(2, 4, 4\) into \(2, 2, 4\)"),
        ]
    ),
    (lambda: nas.graph_ops(jnp.ones((3, 1))), r"`adjacency` must be square; got shape \(3, 1\)"),
    (
        lambda: nas.supernet(nas.Network({}, (nas.Layer("own", 4),), 2), (3,), ops={"own": LINEAR}),
        r"'own' must turn the shape \(2, 3\) into \(2, 4\) .*; it returned \(2, 3\)",
    ),
    (
        lambda: nas.supernet(THREE, (3,), ops=nas.BLOCKS, partial=3),
        "`partial` must divide the number of channels; got 3, but 'cell' has 4 channels",
    ),
    (
        lambda: nas.supernet(TWO_CELLS, (3,), ops=nas.BLOCKS, partial=2),
        "its input has 3 and `preprocess=False`, so the channels",
    ),
    (lambda: apply(THREE, None, jnp.zeros((5, 2))), r"`x` must have the shape \(N, 3\); got \(5, 2\)"),
    (
        lambda: apply(THREE, {"cell": jnp.ones((2, 3))}, jnp.zeros((5, 3))),
        r"must have the shape \(3, 3\); got \(2, 3\)",
    ),
    (
        lambda: apply(THREE, None, jnp.zeros((1, 3))),
        r"has one row, and an op normalizes it without positions.*\(1, 4\)",
    ),
    (lambda: apply(SIZES, None, jnp.zeros((2, 4)), ops={}), r"must have the shape \(N, 3\)"),
    (
        lambda: nas.supernet(WIDTHS, (3,), ops={}).inherit(None, {"linear.width": ((0, 1, "5"),)}),
        "no op '5' on the edge 0 -> 1 of 'linear.width'",
    ),
    (
        lambda: nas.discrete(SIZES, {"linear.width": (), "linear.depth": ((0, 1, "1"),)}),
        "The genotype has no size for 'linear.width'",
    ),
    (lambda: _normalization.over_real_rows(nas.normalized, ROWS, MASK[:5]), r"`mask` must be \[N\] = \(6,\)"),
    (
        lambda: _normalization.over_real_rows(lambda x: nas.normalized(x.reshape(18, 1)), ROWS, MASK),
        "Incompatible shapes for broadcasting",  # an error of JAX
    ),
    (normalized_with_a_derivative, "a custom derivative"),
    (lambda: nas.cutout(2)(KEY, jnp.ones((5, 3))), r"need a spatial axis: .*; got the shape \(5, 3\)"),
    (
        lambda: nas.auxiliary_skip(nas.softmax(), 1.0)(ALPHA, nas.complete_cell(2, ("none", "mlp")), KEY, 0),
        "needs 'skip_connect'",
    ),
]

# ---- Costs ----------------------------------------------------------------------------------------------------------

WHOLE = nas.CostTable(  # of whole networks: 27 choices on 3 edges
    1.0, (nas.CostTerm((("cell", 0), ("cell", 1), ("cell", 2)), 5 + np.arange(27.0).reshape(3, 3, 3)),)
)
WHOLE_BARE = nas.CostTable(1.0, (WHOLE.terms[0]._replace(values=WHOLE.terms[0].values[1:, 1:, 1:]),))
PATH = {"cell": ((0, 1, "mlp"), (1, 2, "skip_connect"))}


@functools.cache
def cost_of_sizes():
    return nas.cost_table(SIZES, (3,), nas.num_params, ops={})


def table_of_term(rows, values):
    return nas.CostTable(1.0, (nas.CostTerm(rows, values),))


def under_budget(budget=10.0, table=None, network=SIZES, ops=None):
    search = nas.darts(network, (3,), ops=ops or {}, order="first")
    return nas.under_budget(search, table or cost_of_sizes(), budget=budget)


COSTS = [
    (lambda: COST.expected_cost({"cell": jnp.ones((2, 1, 3))}), "must be .edges, ops. of one task"),
    *(
        (
            lambda keep=keep: WHOLE.expected_cost(nas.one_hot(THREE._replace(keep=keep), PATH)),
            "The edge 1 of 'cell' has no weight, .* Pass `network`",
        )
        for keep in (None, 1)
    ),
    (
        lambda: WHOLE_BARE.expected_cost(nas.one_hot(BARE, PATH), BARE),
        'which a network may lack, has no "none"',
    ),
    (lambda: WHOLE_BARE.cost_of(BARE, PATH), 'which a network may lack, has no "none"'),
    (
        lambda: nas.meta_architecture_search(
            under_budget(), predictors.mlp({"cell": spaces.real(shape=(3, 3))}, num_features=2)
        ),
        "has a multiplier, which h cannot predict",
    ),
    (
        lambda: nas.within_budget(
            SIZES, {"linear.width": np.ones((1, 2)), "linear.depth": np.ones((1, 2))}, cost_of_sizes(), 1
        ),
        "`budget` is 1, and the cheapest network found costs 14",
    ),
    *(
        (
            lambda term=term, build=build: build(table_of_term(*term)),
            f"`table` must be of the network's space, .* costs of {message}",
        )
        for term, message in [
            (((("linear.width", 0),), np.ones(2)), "2 candidates for the edge 0 of 'linear.width', .* none there"),
            (((("cell", 3),), np.ones(3)), "3 candidates for the edge 3 of 'cell', .* none there; its kinds are"),
            (((("cell", 2),), np.ones(5)), "5 candidates for the edge 2 of 'cell', and the network has 3 there"),
            (((("cell", 2), ("cell", 0)), np.ones((3, 2))), "2 candidates for the edge 0 of 'cell'"),
        ]
        for build in (
            lambda table: under_budget(table=table, network=THREE, ops=nas.BLOCKS),
            lambda table: nas.resource_penalty(table, THREE, weight=1.0, target=10.0),
            lambda table: table.cost_of(THREE, PATH),
            lambda table: nas.within_budget(THREE, nas.one_hot(THREE, PATH), table, 10.0),
        )
    ),
    (lambda: nas.hypervolume(np.ones((4, 2)), [1.0] * 3), "an entry for each of"),
    (lambda: nas.pareto_front(np.ones(4)), r"`points` must be \[n, k\]"),
]

# ---- Benchmark tables -----------------------------------------------------------------------------------------------

NAN = float("nan")
HALVES = nas.benchmark_table("mine", ["a", "b"], ["e"], [2], [[1]], [[[0.5, NAN], [NAN, 0.25]]], fidelities=(0.5, 1.0))
PART_201 = nas.benchmark_table(
    *("NAS-Bench-201", ["cifar10"], [f"e{i}" for i in range(6)], [5] * 6),
    *([[0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 1]], [[9.0], [1.0]]),
)
OUTSIDE = {"cell": ((0, 1, "skip_connect"),)}


PART_101 = nas.benchmark_table(  # 0→1, 0→2, 1→2 with a pool; 0→1
    *("NAS-Bench-101, a part", ["cifar10"], [f"d{i}" for i in range(26)], [2] * 21 + [4] * 5),
    *([[1, 1, 0, 0, 0, 0, 1, *[0] * 14, 3, *[0] * 4], [1, *[0] * 25]], [[1.0], [2.0]]),
)
TABLES = [
    (lambda: HALVES.records(["a", "c"]), "mine has the tasks a, b; got 'c'"),
    *(
        (lambda bad=bad: PART_201.query(bad, "cifar10"), "NAS-Bench-201 has 2 architectures, the tasks")
        for bad in (
            OUTSIDE,
            to_text(OUTSIDE, form="nas_bench_201"),
            {"cell": ((0, 1, "skip_connect"), (2, 3, "skip_connect"), (0, 1, "nor_conv_3x3"))},
            [3.7, 0, 0, 0, 0, 1],
            [3, 0, 0, 0, 0, np.inf],
            ["a"] * 6,
            3,
        )
    ),
    *(
        (
            lambda task=task, fidelity=fidelity: HALVES.query([1], task, fidelity),
            rf"\[1\] was not trained on '{task}' at the fidelity {fidelity}",
        )
        for task, fidelity in (("a", 1.0), ("b", 0.5))
    ),
    *(
        (lambda fidelity=fidelity: HALVES.query([1], "b", fidelity), "and the fidelities 0.5, 1.0")
        for fidelity in (0.7, np.nan)
    ),
    *(
        (lambda bad=bad: PART_101.query(bad, "cifar10"), message)
        for bad, message in [
            ({"cell": ((0, 1, "nor_conv_3x3"),)}, "links from 2u to 2v − 1"),
            ({"normal": ()}, 'has only the kind "cell"'),
            ({"cell": ()}, "no path"),
            (_nas_bench_101.graph_genotype(GRAPHS, graph([(0, 1), (1, 2)], (CONV1,))), "the tasks"),
        ]
    ),
]


@pytest.mark.parametrize(("call", "message"), [*GENOTYPES, *NETWORKS, *COSTS, *TABLES])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_text({kind: ((0.0, 2, "none"), (1, 2, "none")) for kind in DARTS_CELLS}, form="darts"),
        lambda: to_text({"cell": ((np.float32(0), 1, "mlp"),)}),
    ],
)
def test_nodes_that_are_no_integers_are_an_error_of_python(call):
    with pytest.raises(TypeError, match="integer"):
        call()


def test_inputs_of_another_graph_are_an_error_of_jax():
    with pytest.raises(TypeError, match="incompatible shapes"):
        network_of_layer(nas.Layer("gcn", 4), (4, 3))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: nas.supernet(TWO_CELLS, (4,), ops={"none": nas.BLOCKS["none"]}), "linear"),
        (lambda: apply(SIZES, {"linear.width": jnp.ones((1, 2))}, jnp.zeros((2, 3)), ops={}), "'linear.depth'"),
        (lambda: nas.resource_penalty(cost_of_sizes(), SIZES, weight=1.0, target=1.0, form="log"), "log"),
        (lambda: nas.convolution(3, order="norm_conv"), "norm_conv"),
        (lambda: to_text({"cell": ()}, form="yaml"), "yaml"),
        (lambda: from_text("", form="yaml"), "yaml"),
    ],
)
def test_names_that_are_missing_are_an_error_of_python(call, name):
    with pytest.raises(KeyError, match=name):
        call()


def test_a_misspelt_name_is_an_error_that_lists_the_names():
    with pytest.raises(KeyError, match="third") as error:
        nas.darts(THREE, (3,), ops=nas.BLOCKS, order="third")
    assert error.value.__notes__ == ["`order` must be one of exact, first, second."]
    with pytest.raises(KeyError, match="linear") as error:
        nas.supernet(TWO_CELLS, (4,), ops={"none": nas.BLOCKS["none"]})
    assert error.value.__notes__ == ["The name of an op or a layer must be one of none."]
