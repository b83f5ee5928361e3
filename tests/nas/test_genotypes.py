"""Genotypes: counts that are published, keys of published tables, round trips, and the trap of ranking α."""

import itertools
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import softmax
from small_search import DARTS_V2, graph, nas_bench_201_cells

from metaopt import blackbox, nas
from metaopt.nas import _graphs, _named_spaces, _relaxations, _specs

CONV3, CONV1, POOL = _named_spaces.NAS_BENCH_101_PRIMITIVES
TABLES = Path(os.environ.get("METAOPT_DATA", "absent"))
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason="needs the folder that METAOPT_DATA names")


# ---- Discretization -------------------------------------------------------------------------------------------------

THREE = nas.Network(
    {"cell": nas.complete_cell(2, ("none", "skip_connect", "mlp"))}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), 2
)


def test_the_two_strongest_edges_are_those_of_the_softmax_and_not_of_alpha():
    cell = nas.complete_cell(1, ("none", "skip_connect", "mlp"), num_inputs=2)
    cell = cell._replace(edges=(*cell.edges, nas.Edge(0, 3, cell.edges[0].ops), nas.Edge(1, 3, cell.edges[0].ops)))
    cell = cell._replace(edges=(*cell.edges, nas.Edge(2, 3, cell.edges[0].ops)), output=(3,))
    net = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), 2)
    alpha = np.zeros((5, 3))
    alpha[2:] = [
        [5.0, 4.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 2.0],
    ]  # α's largest belongs to an edge that is nearly none
    found = nas.derive_genotype(net, {"cell": softmax(alpha, -1)})
    assert found["cell"] == ((0, 2, "skip_connect"), (1, 2, "skip_connect"), (1, 3, "skip_connect"), (2, 3, "mlp"))
    # A constant on a row changes no weight.
    alpha[3] -= 100
    assert nas.derive_genotype(net, {"cell": softmax(alpha, -1)}) == found


def test_every_edge_by_its_own_argmax():
    weights = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.3, 0.3, 0.4]])
    assert nas.derive_genotype(THREE, {"cell": weights}, keep=None) == {"cell": ((0, 1, "skip_connect"), (1, 2, "mlp"))}
    kept = nas.derive_genotype(THREE, {"cell": weights}, keep=np.int64(1))
    assert kept == {"cell": ((0, 1, "skip_connect"), (1, 2, "mlp"))}
    assert nas.derive_genotype(THREE, {"cell": weights})["cell"][1] == (0, 2, "mlp")  # none is never kept by this rule


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_traced_weights_of_a_search_that_diverged_pass(value):
    """Without a trace they are an error."""
    weights = np.full((3, 3), 0.3)
    weights[2, 1] = value
    assert jax.jit(lambda w: _relaxations.discretized(THREE, {"cell": w})["cell"])(weights).shape == (3, 3)


def test_how_genotypes_are_read_is_the_spaces_own():
    weights = np.full((6, 5), 0.1)
    weights[:, 3], weights[4, 0] = 0.6, 0.9
    found = nas.derive_genotype(nas.nas_bench_201_space(), {"cell": weights})
    text = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|none~1|nor_conv_3x3~2|"
    assert nas.genotype_to_text(found, form="nas_bench_201") == text
    assert _specs.network_from_dict(_specs.network_to_dict(nas.nas_bench_201_space())) == nas.nas_bench_201_space()
    assert (
        _specs.network_from_dict({k: v for k, v in _specs.network_to_dict(THREE).items() if k != "keep"}) == THREE
    )  # the default


def test_one_hot_and_discrete():
    genotype = {"cell": ((1, 2, "mlp"), (0, 1, "skip_connect"))}
    np.testing.assert_array_equal(nas.one_hot(THREE, genotype)["cell"], [[0, 1, 0], [0, 0, 0], [0, 0, 1]])
    edges = nas.discrete(THREE, genotype).cells["cell"].edges
    assert edges == (nas.Edge(0, 1, ("skip_connect",)), nas.Edge(1, 2, ("mlp",)))


# ---- Forms ----------------------------------------------------------------------------------------------------------


def test_darts():
    genotype = nas.genotype_from_text(DARTS_V2, form="darts")
    assert len(genotype["normal"]) == len(genotype["reduce"]) == 8
    assert genotype["normal"][-1] == (2, 5, "dil_conv_3x3") and genotype["reduce"][2] == (2, 3, "skip_connect")
    nas.discrete(nas.darts_space(), genotype)  # it is in the space
    again = nas.genotype_from_text(nas.genotype_to_text(genotype, form="darts"), form="darts")
    assert {kind: sorted(edges) for kind, edges in again.items()} == {k: sorted(e) for k, e in genotype.items()}
    assert nas.genotype_to_text(again, form="darts") == nas.genotype_to_text(genotype, form="darts")
    assert nas.genotype_from_text(nas.genotype_to_text(genotype)) == genotype
    assert nas.genotype_from_text(f"genotypes.{DARTS_V2}", form="darts") == genotype


def test_text_of_darts_with_numpys_integers():
    genotype = nas.genotype_from_text(DARTS_V2, form="darts")
    of_numpy = {kind: tuple((np.int64(s), np.int64(t), op) for s, t, op in edges) for kind, edges in genotype.items()}
    text = nas.genotype_to_text(of_numpy, form="darts")
    assert text == nas.genotype_to_text(genotype, form="darts") and "np." not in text


def test_json_of_numpys_integers():
    edges = np.array([[0, 1], [1, 2]])
    genotype = {"cell": tuple((s, t, "mlp") for s, t in edges)}
    assert nas.genotype_from_text(nas.genotype_to_text(genotype)) == {"cell": ((0, 1, "mlp"), (1, 2, "mlp"))}


def test_darts_form_with_an_own_op():
    own = nas.genotype_from_text(
        DARTS_V2.replace("dil_conv_3x3", "mlp"), form="darts", primitives=(*nas.DARTS_PRIMITIVES, "mlp")
    )
    assert own["normal"][-1] == (2, 5, "mlp")


def test_random_genotypes_are_in_the_space_and_each_alike():
    net = nas.darts_space()
    drawn = [nas.random_genotype(seed, net) for seed in range(300)]
    for genotype in drawn[:20]:
        nas.discrete(net, genotype)
        assert (
            nas.genotype_from_text(nas.genotype_to_text(genotype, form="darts"), form="darts").keys() == genotype.keys()
        )
        assert [sum(t == node for _, t, _ in genotype["normal"]) for node in (2, 3, 4, 5)] == [2] * 4
    assert drawn[3] == nas.random_genotype(3, net) != drawn[4]
    ops = np.array([[op for _, _, op in genotype["reduce"]] for genotype in drawn]).ravel()
    counts = [np.mean(ops == op) for op in nas.DARTS_PRIMITIVES]
    assert counts[0] == 0 and np.abs(np.array(counts[1:]) - 1 / 7).max() < 0.03
    into = np.array([[s for s, t, _ in genotype["normal"] if t == 5] for genotype in drawn])
    assert np.abs(np.bincount(into.ravel(), minlength=5) / 600 - 0.2).max() < 0.06
    each = [nas.random_genotype(seed, nas.nas_bench_201_space())["cell"] for seed in range(200)]
    assert abs(np.mean([len(edges) for edges in each]) - 6 * 4 / 5) < 0.2  # a fifth is "none"


def test_an_edge_that_can_only_be_none_is_never_kept():
    cell = nas.Cell(
        1, tuple(nas.Edge(s, t, (op,)) for s, t, op in [(0, 1, "none"), (0, 2, "mlp"), (1, 2, "none")]), (2,)
    )
    network = THREE._replace(cells={"cell": cell})
    for keep in (1, 2, None):
        assert nas.derive_genotype(network, {"cell": np.ones((3, 1))}, keep=keep) == {"cell": ((0, 2, "mlp"),)}
        assert nas.random_genotype(0, network, keep=keep) == {"cell": ((0, 2, "mlp"),)}


# ---- Configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "searcher", [blackbox.random_search(first=()), blackbox.regularized_evolution(population_size=6, sample_size=3)]
)
@pytest.mark.once
def test_searchers_without_a_gradient_stay_in_the_space_of_darts(searcher):
    net = nas.darts_space()
    space = nas.configuration_space(net)
    sizes = [leaf.high + 1 for leaf in space.values()]
    assert sizes == [3, 6, 10, *[7] * 8] * 2  # two of the nodes before each but the first, an op on each of 8 edges
    state, found = searcher.init(jax.random.key(1), space), []
    for _ in range(12):
        (trial,), state = searcher.ask(state, 1)
        genotype = nas.genotype_from_configuration(net, trial.configuration)
        assert nas.genotype_to_configuration(net, genotype) == trial.configuration
        assert nas.genotype_from_text(nas.genotype_to_text(genotype, form="darts"), form="darts") == genotype
        found.append(nas.genotype_to_text(genotype, form="darts"))
        state = searcher.tell(state, [trial._replace(outcome=float(len(found)), status="COMPLETE")])
    assert len(set(found)) > 6


def test_every_configuration_is_another_genotype_and_every_genotype_has_one():
    net = nas.darts_space(num_nodes=2, primitives=("none", "skip_connect", "sep_conv_3x3"))
    space = nas.configuration_space(net)
    kinds = [name for name in space if name.startswith("normal.")]
    assert kinds == ["normal.inputs3", *(f"normal.op{i}" for i in range(4))]
    found = set()
    for digits in itertools.product(*(range(space[name].high + 1) for name in kinds)):
        genotype = nas.genotype_from_configuration(
            net, {**dict.fromkeys(space, 1), **dict(zip(kinds, digits, strict=True))}
        )
        nas.discrete(net, genotype)
        assert list(nas.genotype_to_configuration(net, genotype).values()) == [*digits, 1, 1, 1, 1, 1]
        found.add(genotype["normal"])
    assert len(found) == 3 * 2**4
    assert {nas.random_genotype(seed, net)["normal"] for seed in range(400)} == found
    darts = nas.genotype_from_text(DARTS_V2, form="darts")
    again = nas.genotype_from_configuration(nas.darts_space(), nas.genotype_to_configuration(nas.darts_space(), darts))
    assert {kind: sorted(edges) for kind, edges in again.items()} == {k: sorted(edges) for k, edges in darts.items()}


def test_configurations_where_each_edge_stands_for_itself():
    net, genotype = nas.nas_bench_201_space(), nas.genotype_from_text(CELL_9930, form="nas_bench_201")
    digits = nas.genotype_to_configuration(net, genotype)
    assert digits == {"cell.0-1": 3, "cell.0-2": 3, "cell.1-2": 3, "cell.0-3": 1, "cell.1-3": 3, "cell.2-3": 3}
    assert nas.genotype_from_configuration(net, digits) == genotype
    assert nas.genotype_from_configuration(net, {name: float(x) for name, x in digits.items()}) == genotype
    assert nas.genotype_to_configuration(net, {"cell": genotype["cell"][1:]})["cell.0-1"] == 0  # none
    assert nas.genotype_to_configuration(THREE, {"cell": ((1, 2, "mlp"),)}, keep=None) == {
        "cell.0-1": 0, "cell.0-2": 0, "cell.1-2": 2}  # fmt: skip


CELL_9930 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"


def test_nas_bench_201():
    genotype = nas.genotype_from_text(CELL_9930, form="nas_bench_201")
    assert nas.genotype_to_text(genotype, form="nas_bench_201") == CELL_9930
    assert len(genotype["cell"]) == 6 and genotype["cell"][3] == (0, 3, "skip_connect")
    assert nas.genotype_to_text({"cell": ()}, form="nas_bench_201") == "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"


def test_the_counts_of_nas_bench_201():
    cells = nas_bench_201_cells()
    classes = [_graphs.canonical(g["cell"], output=(3,)) for g in cells]
    assert len({nas.genotype_to_text(g, form="nas_bench_201") for g in cells}) == 15_625
    assert sum(c != "0" for c in classes) == 15_284
    assert len(set(classes)) == 4_930


def test_what_is_the_same():
    form = lambda *edges, **options: _graphs.canonical(edges, **{"output": (3,), **options})
    assert form((0, 1, "a"), (1, 3, "b")) == form((0, 2, "a"), (2, 3, "b")) == "b(a(x0))"
    assert form((0, 1, "a"), (0, 2, "b"), (1, 3, "skip_connect"), (2, 3, "skip_connect")) == "a(x0)+b(x0)"
    assert form((0, 1, "a"), (1, 3, "skip_connect"), skip=None) == "skip_connect(a(x0))"
    assert form((0, 1, "a"), (1, 3, "none"), (2, 3, "b")) == "0"
    assert form((0, 2, "a"), (1, 3, "b"), num_inputs=2, output=(2, 3)) == "a(x0),b(x1)"
    assert form((0, 2, "a"), (1, 3, "b"), num_inputs=2, output=(3, 2)) == "a(x0),b(x1)"


# ---- NAS-Bench-101 --------------------------------------------------------------------------------------------------


PUBLISHED = graph(
    [(0, 1), (0, 4), (0, 5), (1, 2), (2, 3), (2, 6), (3, 5), (4, 5), (5, 6)], (CONV3, POOL, CONV3, CONV3, CONV1)
)


def test_the_hash_is_the_key_of_the_published_table():
    assert _graphs.nas_bench_101_hash(PUBLISHED) == "00005c142e6f48ac74fdcf73e3439874"


def test_the_hash_knows_no_order_of_vertices_and_nothing_that_leads_nowhere():
    # Vertices 3 and 4 trade places, and a vertex without a way out is added.
    edges = [(0, 1), (0, 3), (0, 5), (1, 2), (2, 4), (2, 7), (4, 5), (3, 5), (5, 7), (1, 6)]
    same = graph(edges, (CONV3, POOL, CONV3, CONV3, CONV1, POOL))
    assert _graphs.nas_bench_101_hash(same) == _graphs.nas_bench_101_hash(PUBLISHED)
    assert _graphs.pruned(same).ops == ("input", CONV3, POOL, CONV3, CONV3, CONV1, "output")
    other = PUBLISHED._replace(ops=("input", POOL, CONV3, CONV3, CONV3, CONV1, "output"))
    assert _graphs.nas_bench_101_hash(other) != _graphs.nas_bench_101_hash(PUBLISHED)
    assert _graphs.pruned(graph([(0, 1)], (CONV3,))) is None


@needs_tables
def test_the_keys_of_the_table():
    with np.load(TABLES / "nasbench101_subset.npz") as table:
        keys, upper, codes = table["key"].astype(str), table["adj_upper"], table["ops"]
    for i in range(0, len(keys), 300):
        ops = [(CONV3, CONV1, POOL)[c] for c in codes[i] if c >= 0]
        matrix = np.zeros((7, 7), int)
        matrix[np.triu_indices(7, 1)] = upper[i]
        size = len(ops) + 2
        cell = nas.Graph(tuple(map(tuple, matrix[:size, :size].tolist())), ("input", *ops, "output"))
        assert _graphs.nas_bench_101_hash(cell) == keys[i]


def test_a_cell_with_ops_on_edges_as_a_graph_of_them():
    edges = [(0, 1, "a"), (0, 2, "none"), (1, 2, "b"), (0, 3, "c"), (2, 3, "d"), (1, 3, "none")]
    graph = nas.edge_graph(edges, output=(3,))
    assert graph.ops == ("input", "a", "b", "c", "d", "output")
    assert set(zip(*np.nonzero(graph.matrix), strict=True)) == {(0, 1), (1, 2), (0, 3), (2, 4), (3, 5), (4, 5)}
    # Two inputs, and an input that is part of the output.
    graph = nas.edge_graph([(0, 2, "a"), (1, 2, "b")], num_inputs=2, output=(1, 2))
    assert graph.ops == ("input 0", "input 1", "a", "b", "output")
    assert set(zip(*np.nonzero(graph.matrix), strict=True)) == {(0, 2), (1, 3), (1, 4), (2, 4), (3, 4)}
    # The nodes 1 and 2 trade names.
    edges = [(0, 1, "maxpool3x3"), (0, 2, "conv1x1-bn-relu"), (1, 3, "conv1x1-bn-relu"), (2, 3, "conv3x3-bn-relu")]
    swap = {0: 0, 1: 2, 2: 1, 3: 3}
    renamed = nas.edge_graph([(swap[s], swap[t], op) for s, t, op in edges], output=(3,))
    graph = nas.edge_graph(edges, output=(3,))
    assert renamed != graph and _graphs.nas_bench_101_hash(renamed) == _graphs.nas_bench_101_hash(graph)


def test_alpha_of_scores_that_are_sums_over_edges():
    names = ("none", "skip_connect", "mlp")
    cell = nas.complete_cell(2, names)
    network = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2)
    own = np.random.default_rng(0).normal(size=(3, 3))
    choices = list(itertools.product(range(3), repeat=3))
    scores = np.array([7 + own[range(3), choice].sum() for choice in choices])
    genotypes = [
        {"cell": tuple((*e[:2], names[x]) for i, (e, x) in enumerate(zip(cell.edges, choice, strict=True)) if x or i)}
        for choice in choices
    ]
    alpha = nas.op_scores(network, genotypes, scores)["cell"]
    np.testing.assert_allclose(alpha, own - own.mean(1, keepdims=True), atol=1e-12)
    alive = [g for g, choice in zip(genotypes, choices, strict=True) if choice[0]]
    assert nas.op_scores(network, alive, np.arange(18.0))["cell"][0, 0] == 0  # no one has it
    # What failed is as bad as the worst.
    failed = np.arange(18.0)
    failed[[3, 7]] = np.nan, -np.inf
    found = nas.op_scores(network, alive, failed)["cell"]
    np.testing.assert_array_equal(found, nas.op_scores(network, alive, np.nan_to_num(failed, neginf=0))["cell"])
