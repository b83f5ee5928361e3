"""The converted benchmarks of `experiments/data`, compared with published numbers."""

import functools
import importlib.util
import os
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from metaopt import hypergrad, nas
from metaopt.nas import _graphs, _named_spaces, _nas_bench_101

DATA = Path(os.environ.get("METAOPT_DATA", "absent"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder that METAOPT_DATA names")

SPEC = importlib.util.spec_from_file_location(
    "experiment_benchmarks", Path(__file__).parents[1] / "experiments" / "data" / "benchmarks.py"
)
benchmarks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmarks)

FLOPS = functools.partial(hypergrad.flops, products_only=True)
TABLES = {
    "201": (benchmarks.nas_bench_201_table, (15_625, 6), 3),
    "micro": (benchmarks.trans_nas_bench_101_table, (4_096, 6), 6),
    "macro": (lambda: benchmarks.trans_nas_bench_101_table(space="macro"), (3_256, 6), 6),
    "Macro": (benchmarks.nas_bench_macro_table, (6_561, 8), 1),
    "graph": (benchmarks.nas_bench_graph_table, (26_206, 5), 7),
    "101": (benchmarks.nas_bench_101_table, (30_001, 26), 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_have_their_sizes_and_correlations(name):
    make, shape, num_tasks = TABLES[name]
    table = make()
    assert table.encodings.shape == shape == (len(table.encodings), len(table.dims)) and len(table.tasks) == num_tasks
    assert (table.encodings >= 0).all() and (table.encodings.max(0) == np.array(table.num_choices) - 1)[1:].all()
    assert len(np.unique(table.encodings, axis=0)) == len(table.encodings)
    assert table.valid.shape == table.cost.shape == (shape[0], num_tasks, len(table.fidelities))
    assert table.test.shape == (shape[0], num_tasks) and table.fidelities[-1] == 1.0
    row = np.flatnonzero(np.isfinite(table.valid[:, -1, -1]))[1_234]
    outcome, cost = table.query(table.encodings[row].tolist(), table.tasks[-1])
    np.testing.assert_equal([outcome, cost], [table.valid[row, -1, -1], table.cost[row, -1, -1]])
    # Losses: what validation prefers, testing does too.
    is_trained = np.isfinite(table.test[:, 0]) & np.isfinite(table.valid[:, 0, -1])
    assert (
        np.corrcoef(table.valid[is_trained, 0, -1].argsort().argsort(), table.test[is_trained, 0].argsort().argsort())[
            0, 1
        ]
        > 0.5
    )
    with pytest.raises(ValueError, match="architectures, the tasks"):
        table.query([99] * shape[1], table.tasks[0])
    with pytest.raises(ValueError, match="'other'"):
        table.query(table.encodings[0], "other")


def test_published_numbers():
    table = benchmarks.nas_bench_201_table()
    np.testing.assert_allclose(100 - table.test.min(0), [94.37, 73.51, 47.31], atol=0.006)
    np.testing.assert_allclose(100 - table.test[9930], [94.36, 73.51, 46.34], atol=0.006)
    names = [_named_spaces.NAS_BENCH_201_PRIMITIVES[i] for i in table.encodings[9930]]
    assert names == ["nor_conv_3x3"] * 3 + ["skip_connect"] + ["nor_conv_3x3"] * 2
    skips = (table.encodings == 1).all(1)
    np.testing.assert_allclose(100 - table.test[skips], [[54.30, 15.61, 16.32]], atol=0.006)
    # From the benchmark's own files: cells 0, 11 and 284 of NATS-Bench.
    seconds = [[86.653, 173.306, 525.811], [149.545, 299.089, 907.437], [58.510, 117.019, 355.036]]
    np.testing.assert_allclose(table.cost[[0, 11, 284], :, 0], seconds, atol=1e-3)
    part = benchmarks.nas_bench_101_table()
    assert part.fidelities == (4 / 108, 12 / 108, 36 / 108, 1.0)
    ranks = part.valid[:, 0].argsort(0).argsort(0)
    correlations = [np.corrcoef(ranks[:, i], ranks[:, 3])[0, 1] for i in range(3)]
    np.testing.assert_allclose(correlations, [0.45, 0.62, 0.88], atol=0.006)


@pytest.mark.once
def test_rows_as_graphs():
    table = benchmarks.nas_bench_201_table()
    pairs, canonical = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)], {}
    for row in table.encodings[::20]:
        edges = [(*p, _named_spaces.NAS_BENCH_201_PRIMITIVES[x]) for p, x in zip(pairs, row, strict=True)]
        canonical.setdefault(table.graph(row), set()).add(_graphs.canonical(edges, output=(3,)))
    assert all(len(same) == 1 for same in canonical.values())  # equal graphs are equal functions
    assert canonical[table.graph([0] * 6)] == {"0"} and len(canonical) < len(table.encodings[::20])
    graph = table.graph(table.encodings[9930])
    assert graph.ops == ("input", *["nor_conv_3x3"] * 3, "skip_connect", *["nor_conv_3x3"] * 2, "output")
    with np.load(DATA / "nasbenchgraph.npz") as data:
        links, names = data["links"], data["op_names"].tolist()
    table = benchmarks.nas_bench_graph_table()
    for link in range(9):
        graph = table.graph([link, 0, 1, 2, 8])
        assert graph.ops == ("input", *(names[i] for i in (0, 1, 2, 8)), "output")
        np.testing.assert_array_equal(np.array(graph.matrix)[:, 1:5].argmax(0), links[link])
        assert (np.array(graph.matrix)[:, 1:5].sum(0) == 1).all() and all(map(any, graph.matrix[1:5]))
    macro = benchmarks.trans_nas_bench_101_table(space="macro")
    assert macro.graph([2, 4, 1, 1, 0, 0]).ops[1:-1] == (
        "channels",
        "channels and stride",
        *["plain"] * 2,
    )
    assert len(benchmarks.nas_bench_macro_table().graph([0] * 8).ops) == 10
    part = benchmarks.nas_bench_101_table()
    assert part.graph(part.encodings[5]) == _graphs.pruned(_nas_bench_101.nas_bench_101_graph(part.encodings[5]))
    with pytest.raises(ValueError, match="digits below"):
        macro.graph([5] * 6)
    with pytest.raises(ValueError, match="'mine' cannot be converted to graphs"):
        macro._replace(name="mine").graph([1] * 6)


@pytest.mark.once
def test_architectures_in_the_forms_in_which_searches_give_them():
    table = benchmarks.nas_bench_201_table()
    row = table.encodings[9_000]
    space = nas.nas_bench_201_space()
    names = [f"cell.{s}-{t}" for s, t, _ in space.cells["cell"].edges]
    genotype = nas.genotype_from_configuration(space, {name: int(x) for name, x in zip(names, row, strict=True)})
    outcome = table.query(row, "cifar100")
    assert (
        table.query(genotype, "cifar100")
        == outcome
        == table.query(nas.genotype_to_text(genotype, form="nas_bench_201"), "cifar100", 0.9995)
    )
    micro = benchmarks.trans_nas_bench_101_table()
    cell = {"cell": ((0, 1, "conv3x3"), (2, 3, "skip_connect"))}
    np.testing.assert_equal(micro.query(cell, "jigsaw"), micro.query([3, 0, 0, 0, 0, 1], "jigsaw"))  # costs are NaN
    whole = benchmarks.nas_bench_101_table()
    part = nas.benchmark_table(*whole[:4], whole.encodings[:400], whole.valid[:400], fidelities=whole.fidelities)
    size = lambda e: len(_nas_bench_101.nas_bench_101_graph(e).ops)
    encoding = next(
        e for e in part.encodings if size(e) == 7 and _graphs.pruned(_nas_bench_101.nas_bench_101_graph(e)) is not None
    )
    cell_101 = _nas_bench_101.nas_bench_101_graph(encoding)
    # The same cell with its vertices in another order.
    matrix, ops = np.array(cell_101.matrix), np.array(cell_101.ops)
    order = next(
        o
        for o in ([0, 2, 1, 3, 4, 5, 6], [0, 1, 3, 2, 4, 5, 6], [0, 1, 2, 4, 3, 5, 6], [0, 1, 2, 3, 5, 4, 6])
        if not np.tril(matrix[np.ix_(o, o)]).any()
    )
    other = nas.Graph(tuple(map(tuple, matrix[np.ix_(order, order)].tolist())), tuple(ops[order]))
    assert other != cell_101
    np.testing.assert_equal(part.query(other, "cifar10", 0.111), part.query(encoding, "cifar10", 12 / 108))
    for benchmark, bad in (
        (table, {"cell": ((0, 1, "conv3x3"),)}),
        (table, {"cell": ((0, 4, "none"),)}),
        (table, {"normal": ()}),
        (part, _nas_bench_101.nas_bench_101_graph(whole.encodings[-1])),
    ):
        with pytest.raises(ValueError, match="architectures, the tasks"):
            benchmark.query(bad, benchmark.tasks[0])
    for benchmark, bad in (
        (part, "|none~0|"),
        (table, 9930),
        (micro, cell_101),
        (benchmarks.nas_bench_graph_table(), cell),
    ):
        with pytest.raises((TypeError, ValueError)):
            benchmark.query(bad, benchmark.tasks[0])


@pytest.mark.once
def test_a_genotype_of_a_supernet_is_looked_up_without_conversion():
    """Genotypes of mixing weights, after JSON too, and sizes as the benchmarks publish them."""
    pairs = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    micro, space = benchmarks.trans_nas_bench_101_table(), nas.trans_nas_bench_101_space(100)
    tables = [(micro, space, _named_spaces.TRANS_NAS_BENCH_101_PRIMITIVES)]
    tables += [
        (benchmarks.nas_bench_macro_table(), nas.nas_bench_macro_space(), _named_spaces.NAS_BENCH_MACRO_PRIMITIVES)
    ]
    for table, network, primitives in tables:
        assert [len(set(column)) for column in table.encodings.T] == [len(primitives)] * len(table.dims)
        for row in (1, 77, 1_234, len(table.encodings) - 1):
            hot = iter(np.eye(len(primitives))[table.encodings[row]])
            weights = {kind: np.stack([next(hot) for _ in cell.edges]) for kind, cell in network.cells.items()}
            genotype = nas.derive_genotype(network, weights)
            for form in (genotype, nas.genotype_from_text(nas.genotype_to_text(genotype))):
                for t, task in enumerate(table.tasks):
                    assert table.query(form, task)[0] == float(table.valid[row, t, 0])
        other = {**genotype, next(iter(genotype)): ((0, 1, "nor_conv_3x3"),)}
        for bad in (
            other,
            {},
            {**genotype, "other": ()},
            {**genotype, next(iter(genotype)): ((0, 2, primitives[-1]),) * 2},
        ):
            with pytest.raises(ValueError, match="architectures, the tasks"):
                table.query(bad, table.tasks[0])
    # Parameters of networks for 100 classes, with scales and shifts of normalization, which metaopt's have not.
    with np.load(DATA / "transnasbench101.npz") as data:
        scores, names = data["micro_score_subset"], data["score_subset_names"].tolist()
        task = data["tasks"].tolist().index("class_object")
        assert [tuple(map(int, name.split("->"))) for name in micro.dims] == pairs
    counts = nas.cost_table(space, (224, 224, 3), nas.num_params, ops=nas.TRANS_NAS_BENCH_101_OPS)
    for row in np.flatnonzero(np.isfinite(scores[:, task, names.index("params")]))[:40]:
        digits = micro.encodings[row]
        genotype = nas.genotype_from_configuration(
            space, dict(zip(nas.configuration_space(space), digits.tolist(), strict=True))
        )
        each = [2 * (x > 1) + (x == 1 and s == 0) for x, (s, _) in zip(digits, pairs, strict=True)]  # of two cells
        scales = 2 * (32 + 64 + sum(each) * (128 + 128 + 256 + 256 + 512)) - 2 * (128 + 256) * sum(
            x == 1 and s == 0 for x, (s, _) in zip(digits, pairs, strict=True)
        )
        published = scores[row, task, names.index("params")]
        np.testing.assert_allclose(counts.cost_of(space, genotype) + scales, 1e6 * published, atol=4)
    macro = nas.nas_bench_macro_space()
    products = nas.cost_table(
        macro, (32, 32, 3), functools.partial(hypergrad.flops, products_only=True), ops=nas.NAS_BENCH_MACRO_OPS
    )
    # By nas-bench-macro_cifar10.json of the benchmark; a product and a sum are one there.
    for blocks, published in (("0" * 8, 7_713_280), ("2" * 8, 105_660_928), ("01201201", 46_109_184)):
        digits = dict(zip(nas.configuration_space(macro), map(int, blocks), strict=True))
        assert products.cost_of(macro, nas.genotype_from_configuration(macro, digits)) == 2 * published


def test_records_of_nas_bench_graph_have_no_untrained_network():
    records = benchmarks.nas_bench_graph_table().records(["proteins", "cora"])
    assert [sum(record.task == task for record in records) for task in ("proteins", "cora")] == [2_021, 26_206]


def test_a_file_that_is_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        benchmarks.nas_bench_201_table(tmp_path)


def test_nas_bench_201_is_read_in_2_seconds_and_200_mb():
    benchmarks.nas_bench_201_table()  # imports do not count
    tracemalloc.start()
    start = time.process_time()
    table = benchmarks.nas_bench_201_table()
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table.encodings) == 15_625 and seconds < 2
    assert table.encodings.nbytes < peak < 200e6


@pytest.mark.once
def test_networks_have_the_parameters_of_the_published_table():
    with np.load(DATA / "nasbench101_subset.npz") as data:
        published = data["params"]
    table = benchmarks.nas_bench_101_table()
    for row in [1_000, 20_000]:
        cell = _nas_bench_101.nas_bench_101_graph(table.encodings[row])
        net, ops = nas.nas_bench_101_network(cell)
        params = jax.eval_shape(nas.supernet(net, (32, 32, 3), ops=ops).init, jax.random.key(0))
        # Published networks have a scale and a shift for every channel that a convolution gives.
        weights = [leaf.shape for leaf in jax.tree.leaves(params["layers"])]
        count = sum(np.prod(shape) + 2 * shape[0] * shape[-1] for shape in weights)  # the first axis: layers alike
        count += sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params["head"]))
        assert count == published[row], row


@pytest.mark.once
def test_nas_bench_201_as_published():
    """The published parameters, without scale and shift of normalizations, and the published FLOPs of products."""
    network, shape = nas.nas_bench_201_space(10), (32, 32, 3)
    tables = [nas.cost_table(network, shape, m, ops=nas.NAS_BENCH_201_OPS) for m in (nas.num_params, FLOPS)]
    with np.load(DATA / "nasbench201.npz") as data:
        published, digits = data["flops_params_M_cifar10"], data["edge_ops"]
        measured = np.flatnonzero(data["flops_params_measured"])
    for row in measured[:: len(measured) // 20]:
        configuration = dict(zip(nas.configuration_space(network), digits[row].tolist(), strict=True))
        genotype = nas.genotype_from_configuration(network, configuration)
        params, flops = (table.cost_of(network, genotype) for table in tables)
        convolutions = sum(op.startswith("nor_conv") for _, _, op in genotype["cell"])
        # Two for each channel: 5 cells a stage of 16, 32 and 64, the stem, two residual blocks, the last layer's.
        affine = 2 * (convolutions * 5 * (16 + 32 + 64) + 16 + 2 * 32 + 2 * 64 + 64)
        np.testing.assert_allclose((params + affine) / 1e6, published[row, 1], rtol=1e-6)
        assert 0 < published[row, 0] - flops / 2e6 < 5  # of up to 220 million


@pytest.mark.once
def test_a_device_measured_by_others_is_a_table():
    table, network = benchmarks.nas_bench_201_costs("edgegpu_latency", "cifar100"), nas.nas_bench_201_space()
    with np.load(DATA / "nasbench201.npz") as data:
        costs, digits = data["hw_cost"][1, :, 0], data["edge_ops"].astype(int)
    weights = np.random.default_rng(0).dirichlet(np.ones(5), 6)
    chances = weights[np.arange(6), digits].prod(1)
    np.testing.assert_allclose(table.expected_cost({"cell": weights}), chances @ costs, rtol=1e-5)
    text = np.array(_named_spaces.NAS_BENCH_201_PRIMITIVES)[digits[77]]
    edges = tuple((e.source, e.target, op) for e, op in zip(network.cells["cell"].edges, text, strict=True))
    genotype = {"cell": tuple(edge for edge in edges if edge[2] != "none")}
    np.testing.assert_allclose(table.cost_of(network, genotype), costs[77], rtol=1e-6)
    assert table.unit == "ms"
