"""The tables, by what is published about them."""

import functools
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from metaopt import _checks, base, hypergrad, nas
from metaopt.nas.benchmarks._tables import make_benchmark

needs_tables = pytest.mark.skipif(
    not Path(os.environ.get("METAOPT_DATA", "absent")).is_dir(), reason="needs the folder that METAOPT_DATA names"
)
TABLES = {
    "201": (nas.nas_bench_201_table, (15_625, 6), 3),
    "micro": (nas.trans_nas_bench_101_table, (4_096, 6), 6),
    "macro": (lambda: nas.trans_nas_bench_101_table(space="macro"), (3_256, 6), 6),
    "Macro": (nas.nas_bench_macro_table, (6_561, 8), 1),
    "graph": (nas.nas_bench_graph_table, (26_206, 5), 7),
    "101": (nas.nas_bench_101_table, (30_001, 26), 1),
}


@needs_tables
@pytest.mark.parametrize("name", TABLES)
def test_forms(name):
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
    known = np.isfinite(table.test[:, 0]) & np.isfinite(table.valid[:, 0, -1])
    assert (
        np.corrcoef(table.valid[known, 0, -1].argsort().argsort(), table.test[known, 0].argsort().argsort())[0, 1] > 0.5
    )
    with pytest.raises(ValueError, match="architectures, the tasks"):
        table.query([99] * shape[1], table.tasks[0])
    with pytest.raises(ValueError, match="'other'"):
        table.query(table.encodings[0], "other")


@needs_tables
def test_published_numbers():
    table = nas.nas_bench_201_table()
    np.testing.assert_allclose(100 - table.test.min(0), [94.37, 73.51, 47.31], atol=0.006)
    np.testing.assert_allclose(100 - table.test[9930], [94.36, 73.51, 46.34], atol=0.006)
    names = [nas.NAS_BENCH_201_PRIMITIVES[i] for i in table.encodings[9930]]
    assert names == ["nor_conv_3x3"] * 3 + ["skip_connect"] + ["nor_conv_3x3"] * 2
    skips = (table.encodings == 1).all(1)
    np.testing.assert_allclose(100 - table.test[skips], [[54.30, 15.61, 16.32]], atol=0.006)
    # Of the benchmark's own files: cells 0, 11 and 284 of NATS-Bench.
    seconds = [[86.653, 173.306, 525.811], [149.545, 299.089, 907.437], [58.510, 117.019, 355.036]]
    np.testing.assert_allclose(table.cost[[0, 11, 284], :, 0], seconds, atol=1e-3)
    part = nas.nas_bench_101_table()
    assert part.fidelities == (4 / 108, 12 / 108, 36 / 108, 1.0)
    ranks = part.valid[:, 0].argsort(0).argsort(0)
    found = [np.corrcoef(ranks[:, i], ranks[:, 3])[0, 1] for i in range(3)]
    np.testing.assert_allclose(found, [0.45, 0.62, 0.88], atol=0.006)


@needs_tables
@pytest.mark.once
def test_rows_as_graphs():
    folder = Path(os.environ["METAOPT_DATA"])
    table = nas.nas_bench_201_table()
    pairs, of = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)], {}
    for row in table.encodings[::20]:
        edges = [(*p, nas.NAS_BENCH_201_PRIMITIVES[x]) for p, x in zip(pairs, row, strict=True)]
        of.setdefault(nas.benchmark_graph(table, row), set()).add(nas.canonical(edges, output=(3,)))
    assert all(len(same) == 1 for same in of.values())  # what is one graph is one function
    assert of[nas.benchmark_graph(table, [0] * 6)] == {"0"} and len(of) < len(table.encodings[::20])
    graph = nas.benchmark_graph(table, table.encodings[9930])
    assert graph.ops == ("input", *["nor_conv_3x3"] * 3, "skip_connect", *["nor_conv_3x3"] * 2, "output")
    with np.load(folder / "nasbenchgraph.npz") as data:
        links, names = data["links"], data["op_names"].tolist()
    table = nas.nas_bench_graph_table()
    for link in range(9):
        graph = nas.benchmark_graph(table, [link, 0, 1, 2, 8])
        assert graph.ops == ("input", *(names[i] for i in (0, 1, 2, 8)), "output")
        np.testing.assert_array_equal(np.array(graph.matrix)[:, 1:5].argmax(0), links[link])
        assert (np.array(graph.matrix)[:, 1:5].sum(0) == 1).all() and all(map(any, graph.matrix[1:5]))
    macro = nas.trans_nas_bench_101_table(space="macro")
    assert nas.benchmark_graph(macro, [2, 4, 1, 1, 0, 0]).ops[1:-1] == (
        "channels",
        "channels and stride",
        *["plain"] * 2,
    )
    assert len(nas.benchmark_graph(nas.nas_bench_macro_table(), [0] * 8).ops) == 10
    part = nas.nas_bench_101_table()
    assert nas.benchmark_graph(part, part.encodings[5]) == nas.pruned(nas.nas_bench_101_graph(part.encodings[5]))
    with pytest.raises(ValueError, match="digits below"):
        nas.benchmark_graph(macro, [5] * 6)
    with pytest.raises(ValueError, match="'mine' are not known as graphs"):
        nas.benchmark_graph(macro._replace(name="mine"), [1] * 6)


@needs_tables
@pytest.mark.once
def test_architectures_in_the_forms_in_which_searches_give_them():
    table = nas.nas_bench_201_table()
    row = table.encodings[9_000]
    space = nas.nas_bench_201_space()
    names = [f"cell.{s}-{t}" for s, t, _ in space.cells["cell"].edges]
    genotype = nas.from_configuration(space, {name: int(x) for name, x in zip(names, row, strict=True)})
    at = table.query(row, "cifar100")
    assert table.query(genotype, "cifar100") == at == table.query(nas.to_nas_bench_201(genotype), "cifar100", 0.9995)
    micro = nas.trans_nas_bench_101_table()
    cell = {"cell": ((0, 1, "conv3x3"), (2, 3, "skip_connect"))}
    np.testing.assert_equal(micro.query(cell, "jigsaw"), micro.query([3, 0, 0, 0, 0, 1], "jigsaw"))  # costs are NaN
    whole = nas.nas_bench_101_table()
    part = make_benchmark(*whole[:4], whole.encodings[:400], whole.valid[:400], fidelities=whole.fidelities)
    size = lambda e: len(nas.nas_bench_101_graph(e).ops)
    encoding = next(e for e in part.encodings if size(e) == 7 and nas.pruned(nas.nas_bench_101_graph(e)) is not None)
    cell_101 = nas.nas_bench_101_graph(encoding)
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
        (part, nas.nas_bench_101_graph(whole.encodings[-1])),
    ):
        with pytest.raises(ValueError, match="architectures, the tasks"):
            benchmark.query(bad, benchmark.tasks[0])
    for benchmark, bad in ((part, "|none~0|"), (table, 9930), (micro, cell_101), (nas.nas_bench_graph_table(), cell)):
        with pytest.raises(ValueError, match="takes rows of"):
            benchmark.query(bad, benchmark.tasks[0])


@needs_tables
@pytest.mark.once
def test_what_a_supernet_finds_is_looked_up_as_it_is():
    """Genotypes of mixing weights, after JSON too, and sizes as the benchmarks publish them."""
    pairs = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    micro, space = nas.trans_nas_bench_101_table(), nas.trans_nas_bench_101_space(100)
    tables = [(micro, space, nas.TRANS_NAS_BENCH_101_PRIMITIVES)]
    tables += [(nas.nas_bench_macro_table(), nas.nas_bench_macro_space(), nas.NAS_BENCH_MACRO_PRIMITIVES)]
    for table, network, primitives in tables:
        assert [len(set(column)) for column in table.encodings.T] == [len(primitives)] * len(table.dims)
        for row in (1, 77, 1_234, len(table.encodings) - 1):
            hot = iter(np.eye(len(primitives))[table.encodings[row]])
            weights = {kind: np.stack([next(hot) for _ in cell.edges]) for kind, cell in network.cells.items()}
            genotype = nas.discretize(network, weights)
            for found in (genotype, nas.genotype_from_json(nas.genotype_to_json(genotype))):
                for t, task in enumerate(table.tasks):
                    assert table.query(found, task)[0] == float(table.valid[row, t, 0])
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
    with np.load(Path(os.environ["METAOPT_DATA"]) / "transnasbench101.npz") as data:
        scores, names = data["micro_score_subset"], data["score_subset_names"].tolist()
        task = data["tasks"].tolist().index("class_object")
        assert [tuple(map(int, name.split("->"))) for name in micro.dims] == pairs
    counts = nas.cost_table(space, (224, 224, 3), nas.num_params, ops=nas.TRANS_NAS_BENCH_101_OPS)
    for row in np.flatnonzero(np.isfinite(scores[:, task, names.index("params")]))[:40]:
        digits = micro.encodings[row]
        genotype = nas.from_configuration(
            space, dict(zip(nas.configuration_space(space), digits.tolist(), strict=True))
        )
        each = [2 * (x > 1) + (x == 1 and s == 0) for x, (s, _) in zip(digits, pairs, strict=True)]  # of two cells
        scales = 2 * (32 + 64 + sum(each) * (128 + 128 + 256 + 256 + 512)) - 2 * (128 + 256) * sum(
            x == 1 and s == 0 for x, (s, _) in zip(digits, pairs, strict=True)
        )
        published = scores[row, task, names.index("params")]
        np.testing.assert_allclose(nas.cost_of(counts, space, genotype) + scales, 1e6 * published, atol=4)
    macro = nas.nas_bench_macro_space()
    products = nas.cost_table(
        macro, (32, 32, 3), functools.partial(hypergrad.flops, products_only=True), ops=nas.NAS_BENCH_MACRO_OPS
    )
    # By nas-bench-macro_cifar10.json of the benchmark; a product and a sum are one there.
    for blocks, published in (("0" * 8, 7_713_280), ("2" * 8, 105_660_928), ("01201201", 46_109_184)):
        digits = dict(zip(nas.configuration_space(macro), map(int, blocks), strict=True))
        assert nas.cost_of(products, macro, nas.from_configuration(macro, digits)) == 2 * published


def test_records_of_a_table_leave_out_what_was_not_trained():
    digits, nan = [[0, 1], [1, 0], [1, 1]], float("nan")
    valid = np.array([[[3.0, 1.0], [nan, nan]], [[5.0, 4.0], [2.0, 6.0]], [[7.0, 8.0], [nan, 9.0]]])
    test, cost = [[1.5, nan], [nan, 2.5], [3.5, nan]], np.full((3, 2, 2), 10.0)
    part = make_benchmark("mine", "ab", "xy", [2, 2], digits, valid, fidelities=(0.5, 1.0), test=test, cost=cost)
    of = lambda task, x, y, outcome: base.Record(task, {"x": x, "y": y}, outcome, cost=10.0)
    first, second = (
        [of("a", 0, 1, 1.0), of("a", 1, 0, 4.0), of("a", 1, 1, 8.0)],
        [of("b", 1, 0, 6.0), of("b", 1, 1, 9.0)],
    )
    assert nas.benchmark_records(part) == [*first, *second]
    assert nas.benchmark_records(part, ["b"]) == second
    assert nas.benchmark_records(part, ["a"], test=True) == [of("a", 0, 1, 1.5), of("a", 1, 1, 3.5)]
    for record in nas.benchmark_records(part):
        _checks.check_record(record)
    with pytest.raises(ValueError, match="mine has the tasks a, b; got 'c'"):
        nas.benchmark_records(part, ["a", "c"])
    with pytest.raises(ValueError, match=r"`tasks` must be a sequence of names, such as \['a'\]; got the string"):
        nas.benchmark_records(part, "a")


@needs_tables
def test_records_of_nas_bench_graph_have_no_untrained_network():
    records = nas.benchmark_records(nas.nas_bench_graph_table(), ["proteins", "cora"])
    assert [sum(record.task == task for record in records) for task in ("proteins", "cora")] == [2_021, 26_206]


def test_what_a_part_of_a_table_has_not_and_what_is_no_architecture_is_refused():
    digits = [[0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 1]]
    part = make_benchmark("NAS-Bench-201", ["cifar10"], [f"e{i}" for i in range(6)], [5] * 6, digits, [[9.0], [1.0]])
    inside = {"cell": ((0, 1, "nor_conv_3x3"), (2, 3, "skip_connect"))}
    for found in (inside, nas.to_nas_bench_201(inside), digits[1], np.array(digits[1], float), tuple(digits[1])):
        assert part.query(found, "cifar10")[0] == 1.0
    outside = {"cell": ((0, 1, "skip_connect"),)}
    twice = {"cell": ((0, 1, "skip_connect"), (2, 3, "skip_connect"), (0, 1, "nor_conv_3x3"))}
    for bad in (outside, nas.to_nas_bench_201(outside), twice, [3.7, 0, 0, 0, 0, 1], [3, 0, 0, 0, 0, np.inf]):
        with pytest.raises(ValueError, match="NAS-Bench-201 has 2 architectures, the tasks"):
            part.query(bad, "cifar10")

    with pytest.raises(ValueError, match="rows of 6 integers, which stand for e0, .*; got .'a'"):
        part.query(["a"] * 6, "cifar10")


def test_what_was_not_trained_and_what_is_no_fidelity_is_refused():
    valid = [[[0.5, np.nan], [np.nan, 0.25]]]
    part = make_benchmark("mine", ["a", "b"], ["e"], [2], [[1]], valid, fidelities=(0.5, 1.0))
    np.testing.assert_equal([part.query([1], "a", 0.5), part.query([1], "b")], [(0.5, np.nan), (0.25, np.nan)])
    for task, fidelity in (("a", 1.0), ("b", 0.5)):
        with pytest.raises(ValueError, match=rf"\[1\] was not trained on '{task}' at the fidelity {fidelity}"):
            part.query([1], task, fidelity)
    for bad in (None, "1", [1.0, 0.5]):
        with pytest.raises(ValueError, match=r"`fidelity` must be a number, one of 0.5, 1.0"):
            part.query([1], "b", bad)
    for bad in (0.7, np.nan):
        with pytest.raises(ValueError, match="and the fidelities 0.5, 1.0"):
            part.query([1], "b", bad)


def test_nas_bench_101_takes_the_genotype_that_a_search_gives():
    bits = lambda *on: [int(i in on) for i in range(21)]
    digits = [[*bits(0, 1, 6), 3, 0, 0, 0, 0], [*bits(0), 0, 0, 0, 0, 0]]  # 0→1, 0→2, 1→2 with a pool; 0→1
    dims, num_choices = [f"d{i}" for i in range(26)], [2] * 21 + [4] * 5
    part = make_benchmark("NAS-Bench-101, a part", ["cifar10"], dims, num_choices, digits, [[1.0], [2.0]])
    space = nas.nas_bench_101_space(num_vertices=4)
    for row, outcome in zip(digits, (1.0, 2.0), strict=True):
        genotype = nas.graph_genotype(space, nas.nas_bench_101_graph(row))
        assert part.query(genotype, "cifar10")[0] == outcome
    # A vertex without an op, and one that leads nowhere, are not there.
    more = ((0, 1, "conv1x1-bn-relu"), (1, 2, "maxpool3x3"), (2, 5, "skip_connect"), (0, 5, "conv1x1-bn-relu"))
    more += ((2, 3, "skip_connect"), (4, 5, "skip_connect"))
    assert part.query({"cell": more}, "cifar10")[0] == 1.0
    for bad, message in [
        ({"cell": ((0, 1, "nor_conv_3x3"),)}, "links from 2u to 2v − 1"),
        ({"normal": ()}, "of the one kind"),
        ({"cell": ()}, "no path"),
        (nas.graph_genotype(space, nas.Graph(((0, 1, 0), (0, 0, 1), (0, 0, 0)), ("", "maxpool3x3", ""))), "the tasks"),
    ]:
        with pytest.raises(ValueError, match=message):
            part.query(bad, "cifar10")


@pytest.mark.parametrize("name", ["NAS-Bench-201", "NAS-Bench-101, a part", "NAS-Bench-Macro"])
def test_genotypes_of_other_forms_are_refused(name):
    part = make_benchmark(name, ["a"], ["cell"], [2], [[1]], [[0.5]])
    for bad in (5, [5], ((0, 1),), ((0, 1, ["identity"]),), ((None, 1, "identity"),), (("0", 1, "identity"),)):
        with pytest.raises(ValueError, match=r"must be kind -> edges \(source, target, op\).*; got {'cell': "):
            part.query({"cell": bad}, "a")
    if name == "NAS-Bench-Macro":  # nodes and edges of any kind
        assert part.query({"cell": [[np.int64(0), 1, "MB3_K3"]]}, "a")[0] == 0.5


def test_absent_files_and_unknown_spaces(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        nas.nas_bench_201_table(tmp_path)
    with pytest.raises(ValueError, match='`space` must be "micro" or "macro"; got \'mini\''):
        nas.trans_nas_bench_101_table(tmp_path, space="mini")


@needs_tables
def test_nas_bench_201_is_read_in_2_seconds_and_200_mb():
    nas.nas_bench_201_table()  # what is imported once
    tracemalloc.start()
    start = time.process_time()
    table = nas.nas_bench_201_table()
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table.encodings) == 15_625 and seconds < 2
    assert table.encodings.nbytes < peak < 200e6
