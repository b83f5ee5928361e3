"""Benchmarks made from arrays: records, and architectures in the forms in which searches give them."""

import numpy as np
import pytest

from metaopt import base, blackbox, nas
from metaopt.nas import _nas_bench_101


def test_records_of_a_table_leave_out_untrained_architectures(tmp_path):
    digits, nan = [[0, 1], [1, 0], [1, 1]], float("nan")
    valid = np.array([[[3.0, 1.0], [nan, nan]], [[5.0, 4.0], [2.0, 6.0]], [[7.0, 8.0], [nan, 9.0]]])
    test, cost = [[1.5, nan], [nan, 2.5], [3.5, nan]], np.full((3, 2, 2), 10.0)
    part = nas.benchmark_table("mine", "ab", "xy", [2, 2], digits, valid, fidelities=(0.5, 1.0), test=test, cost=cost)
    record = lambda task, x, y, outcome: base.Record(task, {"x": x, "y": y}, outcome, cost=10.0)
    first, second = (
        [record("a", 0, 1, 1.0), record("a", 1, 0, 4.0), record("a", 1, 1, 8.0)],
        [record("b", 1, 0, 6.0), record("b", 1, 1, 9.0)],
    )
    assert part.records() == [*first, *second]
    assert part.records(["b"]) == second
    assert part.records(["a"], test=True) == [record("a", 0, 1, 1.5), record("a", 1, 1, 3.5)]
    blackbox.append_records(tmp_path / "records.db", part.records())  # an invalid record is an error


def test_an_architecture_has_five_forms():
    digits = [[0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 1]]
    part = nas.benchmark_table(
        "NAS-Bench-201", ["cifar10"], [f"e{i}" for i in range(6)], [5] * 6, digits, [[9.0], [1.0]]
    )
    inside = {"cell": ((0, 1, "nor_conv_3x3"), (2, 3, "skip_connect"))}
    for form in (
        inside,
        nas.genotype_to_text(inside, form="nas_bench_201"),
        digits[1],
        np.array(digits[1], float),
        tuple(digits[1]),
    ):
        assert part.query(form, "cifar10")[0] == 1.0


def test_outcomes_that_are_missing_at_another_fidelity():
    valid = [[[0.5, np.nan], [np.nan, 0.25]]]
    part = nas.benchmark_table("mine", ["a", "b"], ["e"], [2], [[1]], valid, fidelities=(0.5, 1.0))
    np.testing.assert_equal([part.query([1], "a", 0.5), part.query([1], "b")], [(0.5, np.nan), (0.25, np.nan)])


def test_nas_bench_101_takes_the_genotype_that_a_search_gives():
    bits = lambda *on: [int(i in on) for i in range(21)]
    digits = [[*bits(0, 1, 6), 3, 0, 0, 0, 0], [*bits(0), 0, 0, 0, 0, 0]]  # 0→1, 0→2, 1→2 with a pool; 0→1
    dims, num_choices = [f"d{i}" for i in range(26)], [2] * 21 + [4] * 5
    part = nas.benchmark_table("NAS-Bench-101, a part", ["cifar10"], dims, num_choices, digits, [[1.0], [2.0]])
    space = nas.nas_bench_101_space(num_vertices=4)
    for row, outcome in zip(digits, (1.0, 2.0), strict=True):
        genotype = _nas_bench_101.graph_genotype(space, _nas_bench_101.nas_bench_101_graph(row))
        assert part.query(genotype, "cifar10")[0] == outcome
    # A vertex without an op, and one that leads nowhere, are not there.
    more = ((0, 1, "conv1x1-bn-relu"), (1, 2, "maxpool3x3"), (2, 5, "skip_connect"), (0, 5, "conv1x1-bn-relu"))
    more += ((2, 3, "skip_connect"), (4, 5, "skip_connect"))
    assert part.query({"cell": more}, "cifar10")[0] == 1.0


@pytest.mark.parametrize("name", ["NAS-Bench-201", "NAS-Bench-101, a part", "NAS-Bench-Macro"])
def test_genotypes_of_other_forms_are_errors(name):
    part = nas.benchmark_table(name, ["a"], ["cell"], [2], [[1]], [[0.5]])
    for bad in (5, [5], ((0, 1),), ((0, 1, ["identity"]),), ((None, 1, "identity"),), (("0", 1, "identity"),)):
        with pytest.raises((TypeError, ValueError)):
            part.query({"cell": bad}, "a")
    if name == "NAS-Bench-Macro":  # nodes and edges of any kind
        assert part.query({"cell": [[np.int64(0), 1, "MB3_K3"]]}, "a")[0] == 0.5
