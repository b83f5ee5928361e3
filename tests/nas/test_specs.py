"""Specs as data: the named spaces' counts, and JSON."""

import json

import pytest

import metaopt
from metaopt import nas
from metaopt.nas import _specs


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


NETWORKS = {
    "darts": nas.darts_space(num_cells=2),
    "201": nas.nas_bench_201_space(cells_per_stage=1),
    "transnas": nas.trans_nas_bench_101_space(),
    "macro": nas.nas_bench_macro_space(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_json(name):
    net = NETWORKS[name]
    assert _specs.network_from_dict(_specs.network_to_dict(net)) == net


TEXT = json.dumps({"format": "metaopt.network", "version": 1, **_specs.network_to_dict(NETWORKS["201"])})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT[:-1], "delimiter"),
        (TEXT.replace('"version": 1', '"version": 2'), "is of version 2"),
        (TEXT.replace('"layers"', '"other"'), "it lacks 'layers'"),
        (TEXT.replace('"num_inputs"', '"other"'), "it lacks 'num_inputs'"),
        (TEXT.replace('"edges": [[0, ', '"edges": [['), "unpack"),
        (TEXT.replace('"cells": {', '"cells": [], "x": {'), "has no attribute 'items'"),
        (TEXT.replace('"keep": null', '"keep": 2.0'), "`keep` must be a number of edges"),
    ],
)
def test_json_of_another_form_is_refused(text, message, tmp_path):
    (tmp_path / "network.json").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        metaopt.load(tmp_path / "network.json")


CELL = nas.complete_cell(2, ("none", "skip_connect"))
LAYERS = (nas.Layer("cell", 4),)


def test_ops_of_a_complete_cell_may_come_one_by_one():
    assert nas.complete_cell(2, (op for op in ("none", "mlp"))) == nas.complete_cell(2, ("none", "mlp"))
