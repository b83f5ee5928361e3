"""Specs as data: the named spaces' counts, JSON, and what does not hold together."""

import pytest

from metaopt import nas


def test_the_darts_space():
    net = nas.darts_space()
    assert [(layer.name[0], layer.channels, layer.stride) for layer in net.layers] == [
        ("s", 48, 1),
        ("n", 16, 1),
        ("n", 16, 1),
        ("r", 32, 2),
        ("n", 32, 1),
        ("n", 32, 1),
        ("r", 64, 2),
        ("n", 64, 1),
        ("n", 64, 1),
    ]
    for cell in net.cells.values():
        assert len(cell.edges) == 14 and len(cell.edges[0].ops) == 8 and cell.output == (2, 3, 4, 5)


def test_the_space_of_nas_bench_201():
    net = nas.nas_bench_201_space()
    assert [e[:2] for e in net.cells["cell"].edges] == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert sum(layer.name == "cell" for layer in net.layers) == 15 and net.layers[-2].channels == 64


def test_the_spaces_of_transnas_and_macro():
    net = nas.trans_nas_bench_101_space()
    assert [layer.channels for layer in net.layers] == [32, 64, *[128] * 4, *[256] * 4, *[512] * 2]
    assert [layer.stride for layer in net.layers] == [2, 2, *[2, 1, 1, 1] * 2, 2, 1]
    assert net.cells["cell"].edges[0].ops == ("none", "skip_connect", "conv1x1", "conv3x3")
    net = nas.nas_bench_macro_space()
    assert [layer.channels for layer in net.layers] == [32, 64, 64, *[128] * 3, *[256] * 3, 1280]
    assert [layer.stride for layer in net.layers] == [1, 2, 1, 2, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    "space",
    [
        nas.darts_space,
        nas.nas_bench_201_space,
        nas.nas_bench_101_space,
        nas.trans_nas_bench_101_space,
        nas.nas_bench_macro_space,
        lambda n: nas.check_network(network_of(n)),
    ],
)
def test_a_network_without_outputs_is_refused(space):
    with pytest.raises(ValueError, match="`num_outputs` must be at least 1; got 0"):
        space(0)


def network_of(num_outputs):
    return nas.Network({}, (nas.Layer("linear", 4),), num_outputs)


@pytest.mark.parametrize(
    "net",
    [
        nas.darts_space(num_cells=2),
        nas.nas_bench_201_space(cells_per_stage=1),
        nas.trans_nas_bench_101_space(),
        nas.nas_bench_macro_space(),
    ],
)
def test_json(net):
    again = nas.from_json(nas.to_json(net))
    assert again == net
    with pytest.raises(ValueError, match="version of this format must be 1; got 2"):
        nas.from_json(nas.to_json(net).replace('"version": 1', '"version": 2'))
    text = nas.to_json(net)
    for bad, message in [
        (text[:-1], "This is not JSON"),
        ("3", "version of this format must be 1; got None"),
        (text.replace('"layers"', '"other"'), "it lacks 'layers'"),
        (text.replace('"num_inputs"', '"other"'), "This is not a network"),
        (text.replace('"edges": [[0, ', '"edges": [['), "This is not a network"),
        (text.replace('"cells": {', '"cells": [], "x": {'), "This is not a network"),
    ]:
        with pytest.raises(ValueError, match=message):
            nas.from_json(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c._replace(edges=(nas.Edge(2, 1, ("none",)),)), "from a node to a later one"),
        (lambda c: c._replace(edges=(nas.Edge(0, 0, ("none",)),)), "from a node to a later one"),
        (lambda c: c._replace(edges=(nas.Edge(0, 1, ("none",)), nas.Edge(0, 2, ("none", "mlp")))), "same number"),
        (lambda c: c._replace(edges=(nas.Edge(0, 1, ()),)), "at least 1"),
        (lambda c: c._replace(edges=(nas.Edge(0, 1, "mlp"),)), r"edge 0 -> 1 .* got 'mlp'; for one op, use \('mlp',\)"),
        (
            lambda c: c._replace(edges=(nas.Edge(0, 1, (3,)),)),
            r"edge 0 -> 1 of the cell 'cell' must be a sequence of names.* got \(3,\)",
        ),
        (lambda c: c._replace(output=()), "`output` must list nodes"),
        (lambda c: c._replace(output=(0,)), "`output` must list nodes"),
        (lambda c: c._replace(num_inputs=3), "1 or 2 inputs"),
        (lambda c: c._replace(num_inputs=2, preprocess=False), "needs `preprocess=True`"),
    ],
)
def test_cells_that_do_not_hold_together(change, message):
    cell = nas.complete_cell(2, ("none", "skip_connect"))
    net = nas.Network({"cell": change(cell)}, (nas.Layer("cell", 4),), 2)
    with pytest.raises(ValueError, match=message):
        nas.check_network(net)
    with pytest.raises(ValueError, match="No layer uses the cell 'cell'"):
        nas.check_network(nas.Network({"cell": cell}, (), 2))
    for cells, layers, got in [
        (cell, (nas.Layer("cell", 4),), "got Cell, and"),
        ({"cell": cell}, ("linear", "cell"), r"layers \('linear', 'cell'\)"),
    ]:
        with pytest.raises(ValueError, match=f"`cells` must be a dict, kind -> `nas.Cell`, and `layers` .*{got}"):
            nas.check_network(nas.Network(cells, layers, 2))


@pytest.mark.parametrize(
    ("num_nodes", "ops", "message"),
    [
        (
            2,
            "mlp",
            r"`ops` must be a sequence of names, such as \('none', 'mlp'\); got 'mlp'; for one op, use \('mlp',\)",
        ),
        (2, (nas.BLOCKS["mlp"],), "`ops` must be a sequence of names.*; pass the ops themselves to `supernet`"),
        (2, 3, "`ops` must be a sequence of names.*; got 3"),
        (0, ("mlp",), "`num_nodes` must be at least 1; got 0"),
    ],
)
def test_complete_cells_of_no_nodes_or_names_are_refused(num_nodes, ops, message):
    with pytest.raises(ValueError, match=message):
        nas.complete_cell(num_nodes, ops)


def test_ops_of_a_complete_cell_may_come_one_by_one():
    assert nas.complete_cell(2, (op for op in ("none", "mlp"))) == nas.complete_cell(2, ("none", "mlp"))
