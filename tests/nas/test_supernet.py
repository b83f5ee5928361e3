"""Supernets: a network by hand, the discrete network at one-hot weights, isomorphic cells, groups against no groups."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_search import nas_bench_201_cells

from metaopt import inner, nas
from metaopt.nas import _graphs, _specs

KEY = jax.random.key(0)
TABLE = nas.Network(
    {"cell": nas.complete_cell(3, ("none", "skip_connect", "linear", "mlp"), preprocess=False)},
    (nas.Layer("linear", 4), nas.Layer("cell", 4), nas.Layer("cell", 4), nas.Layer("norm_relu", 4)),
    2,
)
X = jax.random.normal(jax.random.key(3), (6, 3))


def weights_of(net, seed=0):
    return nas.mixing_weights(nas.softmax(), net, nas.init_alpha(jax.random.key(seed), net, scale=1.0), KEY)


@pytest.mark.once
def test_a_network_by_hand():
    supernet = nas.supernet(TABLE, (3,), ops=nas.BLOCKS)
    params, w = jax.jit(supernet.init)(KEY), weights_of(TABLE)["cell"]
    predicted = jax.jit(supernet.apply)(params, {"cell": w}, X)
    linear, cells, norm = params["layers"]
    assert jax.tree.leaves(norm) == [] and params["head"]["w"].shape == (4, 2)
    # Two layers, each of one group of six edges.
    assert cells["edges"][0][2]["w"].shape == (2, 6, 4, 4)
    linear, cells, head, x, w = jax.tree.map(np.asarray, (linear, cells, params["head"], X, w))

    def normalized(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

    def gelu(x):
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2

    x = normalized(x @ linear["w"][0])
    for layer in range(2):
        nodes = [x, 0, 0, 0]
        _, _, conv, mlp = cells["edges"][0]
        for e, (source, target) in enumerate([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]):
            node = nodes[source]
            hidden = gelu(normalized(node @ mlp["in"][layer, e]))
            outputs = [0 * node, node, normalized(node @ conv["w"][layer, e]), hidden @ mlp["out"][layer, e]]
            nodes[target] = nodes[target] + sum(w[e, o] * y for o, y in enumerate(outputs))
        x = nodes[3]
    np.testing.assert_allclose(predicted, np.maximum(normalized(x), 0) @ head["w"] + head["b"], rtol=1e-9)


@pytest.mark.parametrize("stem", [True, False])
def test_the_second_layer_sees_the_first_ones_output_twice(stem):
    """As DARTS's first cell sees its stem; the third layer sees the two before it."""
    cell = nas.Cell(2, (nas.Edge(0, 2, ("skip_connect",)), nas.Edge(1, 2, ("skip_connect",))), (2,))
    layers = (*[nas.Layer("linear", 4)] * stem, *[nas.Layer("cell", 4 if stem else 3)] * 3)
    supernet = nas.supernet(nas.Network({"cell": cell}, layers, 4), (3,), ops=nas.BLOCKS)
    params = jax.jit(supernet.init)(KEY)
    y = [np.asarray(f) for f in jax.jit(supernet.features)(params, None, X)]
    weights = []
    for stacked in params["layers"][stem:]:
        inputs = [np.asarray(p["w"]) for p in stacked["inputs"]]
        weights += [[w[i] for w in inputs] for i in range(len(inputs[0]))]

    def normalized(x, w):
        x = np.maximum(x, 0) @ w
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

    x = np.asarray(X)
    pairs = [(y[0], y[0]), (y[0], y[1]), (y[1], y[2])] if stem else [(x, x), (y[0], y[0]), (y[0], y[1])]
    assert len(y) == len(layers) and len(weights) == 3
    for (old, new), (first, second), outputs in zip(pairs, weights, y[stem:], strict=True):
        np.testing.assert_allclose(outputs, normalized(old, first) + normalized(new, second), rtol=1e-9)


def image_case(name):
    if name == "201":
        net, shape = nas.nas_bench_201_space(3, channels=2, cells_per_stage=2), (5, 4, 1)
        net = net._replace(layers=net.layers[:4])  # two cells and a residual block
        ops = nas.NAS_BENCH_201_OPS
    elif name == "transnas":
        net, shape = nas.trans_nas_bench_101_space(3, channels=3), (13, 9, 1)
        net, ops = (
            net._replace(layers=net.layers[:5]),
            nas.TRANS_NAS_BENCH_101_OPS,
        )  # the first module, and half another
    elif name == "macro":
        net, shape, ops = nas.nas_bench_macro_space(3, channels=2, features=5), (9, 5, 1), nas.NAS_BENCH_MACRO_OPS
        cells = {f"block{i}": net.cells[f"block{i}"] for i in range(4)}
        net = net._replace(cells=cells, layers=(*net.layers[:5], net.layers[-1]))
    else:
        primitives = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")
        net, shape = nas.darts_space(3, channels=4, num_cells=3, num_nodes=2, primitives=primitives), (7, 4, 1)
        ops = nas.DARTS_OPS
    return net, shape, ops


@pytest.mark.parametrize(
    ("name", "partial"),
    [
        ("table", 1),
        ("201", 1),
        ("transnas", 1),
        ("macro", 1),
        ("darts", 2),
        pytest.param("darts", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.once
def test_one_hot_weights_are_the_discrete_network(name, partial):
    net, shape, ops = (TABLE, (3,), nas.BLOCKS) if name == "table" else image_case(name)
    if partial == 2:  # quicker: a normal cell and a reduction
        net = net._replace(layers=net.layers[:3])
    supernet = nas.supernet(net, shape, ops=ops, partial=partial)
    genotype = nas.derive_genotype(net, weights_of(net), keep=2 if name == "darts" else None)
    chosen = {op for edges in genotype.values() for _, _, op in edges}
    none_among = any(len(edges) < len(net.cells[kind].edges) for kind, edges in genotype.items())
    assert len(chosen) == 3 if name == "macro" else none_among
    # As it is exported and read again.
    exported = _specs.network_to_dict(nas.discrete(net, nas.genotype_from_text(nas.genotype_to_text(genotype))))
    small = nas.supernet(_specs.network_from_dict(exported), shape, ops=ops, partial=partial)

    @jax.jit
    def both(x):
        params = supernet.init(KEY)
        inherited = supernet.inherit(params, genotype)
        assert jax.tree.map(jnp.shape, inherited) == jax.tree.map(jnp.shape, jax.eval_shape(small.init, KEY))
        return supernet.apply(params, nas.one_hot(net, genotype), x), small.apply(inherited, None, x)

    mixed, discrete = map(np.asarray, both(np.random.default_rng(0).normal(size=(3, *shape))))
    assert abs(discrete).max() > 0.01
    np.testing.assert_allclose(mixed, discrete, atol=1e-9)


@pytest.mark.once
def test_a_cell_whose_input_has_other_channels_by_hand():
    """Ops on the edges from the input change its channels; all others have the cell's."""
    linear = lambda node, p: (lambda z: (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5))(node @ p)
    cell = nas.complete_cell(2, ("linear",), preprocess=False)
    network = nas.Network({"cell": cell}, (nas.Layer("cell", 5),), 2)
    supernet = nas.supernet(network, (3,), ops=nas.BLOCKS)
    params = jax.jit(supernet.init)(KEY)
    enters, inside = ([np.asarray(w) for w in p["w"][0]] for (p,) in params["layers"][0]["edges"])
    first = linear(np.asarray(X), enters[0])
    second = linear(np.asarray(X), enters[1]) + linear(first, inside[0])
    assert [w.shape for w in (*enters, *inside)] == [(3, 5), (3, 5), (5, 5)]
    np.testing.assert_allclose(jax.jit(supernet.features)(params, None, X)[0], second, atol=1e-9)


def test_layers_that_are_alike_are_one_scan_and_still_have_their_own_weights():
    """Runs are for the compiler: layers with another name are not alike, and give the same."""
    twice = TABLE._replace(
        cells={"cell": TABLE.cells["cell"], "again": TABLE.cells["cell"]},
        layers=(*TABLE.layers[:2], nas.Layer("again", 4), TABLE.layers[3]),
    )
    one, two = (nas.supernet(net, (3,), ops=nas.BLOCKS) for net in (TABLE, twice))
    params = jax.jit(one.init)(KEY)
    linear, cells, norm = params["layers"]
    separate = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], cells) for i in (0, 1)]
    w = weights_of(TABLE)["cell"]
    first, second = jax.jit(one.apply), jax.jit(two.apply)
    expected = first(params, {"cell": w}, X)
    outputs = second({**params, "layers": [linear, *separate, norm]}, {"cell": w, "again": w}, X)
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)
    swapped = {**params, "layers": [linear, *separate[::-1], norm]}
    assert abs(second(swapped, {"cell": w, "again": w}, X) - expected).max() > 1e-3


@pytest.mark.once
def test_isomorphic_cells_give_equal_outputs():
    """With the same weights on every edge, cells of one canonical form are one function, and others are not."""
    net = nas.nas_bench_201_space(2, channels=2, cells_per_stage=1)
    net = net._replace(layers=net.layers[:2])
    supernet = nas.supernet(net, (3, 4, 1), ops=nas.NAS_BENCH_201_OPS)
    params = jax.jit(supernet.init)(KEY)
    tie = lambda leaf: jnp.broadcast_to(leaf[:, :1], leaf.shape)
    params["layers"][1]["edges"] = jax.tree.map(tie, params["layers"][1]["edges"])
    classes = collections.defaultdict(list)
    for genotype in nas_bench_201_cells():
        classes[_graphs.canonical(genotype["cell"], output=(3,))].append(genotype)
    large = [c for c in sorted(classes) if len(classes[c]) >= 4]
    chosen = [classes[large[i]][j] for i in range(0, len(large), len(large) // 12) for j in (0, 1, -1)]
    x = jax.random.normal(KEY, (3, 3, 4, 1))
    w = np.stack([nas.one_hot(net, genotype)["cell"] for genotype in chosen])
    outputs = jax.jit(jax.vmap(lambda w: supernet.apply(params, {"cell": w}, x)))(w)
    outputs = np.asarray(outputs).reshape(-1, 3, 6)  # of each class three
    assert len(outputs) >= 12
    np.testing.assert_allclose(outputs, np.broadcast_to(outputs[:, :1], outputs.shape), atol=1e-9)
    distances = abs(outputs[:, None, 0] - outputs[None, :, 0]).max(-1)
    assert (distances + np.eye(len(distances)) > 1e-4).all()


@pytest.mark.once
def test_a_single_path_runs_the_op_that_is_chosen():
    net = TABLE._replace(layers=TABLE.layers[:2])
    dense = nas.supernet(net, (3,), ops=nas.BLOCKS)
    single = nas.supernet(net, (3,), ops=nas.BLOCKS, single_path=True, remat_edges=True)
    weights = {"cell": np.eye(4)[[2, 1, 3, 3, 2, 0]]}

    def loss(net):
        return lambda params, weights: (net.apply(params, weights, X) ** 2).sum()

    @jax.jit
    def both():
        params = dense.init(KEY)
        return [jax.value_and_grad(loss(net), (0, 1))(params, weights) for net in (dense, single)]

    (value, grads), (single_value, single_grads) = jax.tree.map(np.asarray, both())
    np.testing.assert_allclose(single_value, value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), single_grads[0], grads[0])
    # Of α's gradient only the chosen entries are there.
    chosen, of_alpha = weights["cell"], grads[1]["cell"]
    np.testing.assert_allclose(single_grads[1]["cell"], of_alpha * chosen, atol=1e-12)
    assert abs(of_alpha * (1 - chosen)).max() > 1e-3


def test_a_single_path_refuses_a_mixture_that_it_can_see():
    """Of cells and of sizes; not one-hot weights that are off by rounding, and nothing that is traced. Nor
    NaN, of which none is the largest."""
    cells = TABLE._replace(layers=TABLE.layers[:2])
    for net, ops, kind in ((cells, nas.BLOCKS, "cell"), (nas.mlp_space(2, widths=(2, 4), depths=(1,)), {}, None)):
        kind = kind or next(iter(net.cells))
        single = nas.supernet(net, (3,), ops=ops, single_path=True)
        assert single.single_path and not nas.supernet(net, (3,), ops=ops).single_path
        params = jax.eval_shape(single.init, KEY)
        edges, num = len(net.cells[kind].edges), len(net.cells[kind].edges[0].ops)
        hot = np.eye(num, dtype=np.float32)[np.arange(edges) % num]
        soft = jnp.asarray(0.9 * hot + 0.1 * np.roll(hot, 1, -1))
        noise = np.random.default_rng(0).uniform(size=hot.shape).astype(np.float32)
        off = (hot - noise) + noise  # a straight-through estimator's
        off += 1e-7 * np.roll(hot, 1, -1)
        assert (off != hot).any()
        for fine in (hot, off, jnp.asarray(off), 0 * hot):
            jax.eval_shape(lambda params, net=single, w={kind: fine}: net.apply(params, w, X), params)
        for call in (single.apply, single.features):
            with pytest.raises(ValueError, match=f"`single_path` runs only the op .*; those of '{kind}' are"):
                jax.eval_shape(lambda params, call=call, w={kind: soft}: call(params, w, X), params)
        jax.eval_shape(single.apply, params, {kind: soft}, X)
        for bad in (np.nan, np.inf):
            w = {kind: np.where(hot > 0, bad, 0.0)}
            with pytest.raises(ValueError, match=f"the weights must be finite, .* those of '{kind}' are .*{bad}"):
                jax.eval_shape(lambda params, net=single, w=w: net.apply(params, w, X), params)


@pytest.mark.once
def test_partial_channels():
    """Channels that pass by: the ops see C/K, and the shuffle brings each part of the channels to the front."""
    cell = nas.Cell(1, (nas.Edge(0, 1, ("linear",)),), (1,), preprocess=False)
    net = nas.Network({"cell": cell}, (nas.Layer("cell", 6),), 6)
    supernet = nas.supernet(net, (6,), ops={"linear": nas.BLOCKS["linear"]}, partial=3)
    params = jax.jit(supernet.init)(KEY)
    params["head"] = {"w": jnp.eye(6), "b": jnp.zeros(6)}
    x = jax.random.normal(KEY, (5, 6))
    w = params["layers"][0]["edges"][0][0]["w"][0, 0]
    assert w.shape == (2, 2)
    apply = jax.jit(supernet.apply)
    y, z = apply(params, None, x), apply(params, {"cell": np.array([[0.5]])}, x)
    mixed, x = np.asarray(nas.normalized(x[:, :2] @ w)), np.asarray(x)
    expected = np.stack([mixed[:, 0], x[:, 2], x[:, 4], mixed[:, 1], x[:, 3], x[:, 5]], 1)
    np.testing.assert_allclose(y, expected, rtol=1e-9)
    np.testing.assert_allclose(z, expected / 2, rtol=1e-9)  # a weight is that of the whole edge
    # At a stride the rest is a maximum.
    net = nas.Network(
        {"cell": cell._replace(edges=(nas.Edge(0, 1, ("skip_connect",)),))}, (nas.Layer("cell", 2, 2),), 1
    )
    supernet = nas.supernet(net, (3, 3, 2), ops=nas.BLOCKS, partial=2)
    params = jax.jit(supernet.init)(KEY)
    params["head"] = {"w": jnp.array([[0.0], [1.0]]), "b": jnp.zeros(1)}
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 2))
    y, rest = jax.jit(supernet.apply)(params, None, x)[:, 0], x[..., 1]
    pooled = [rest[:, :2, :2].max((1, 2)), rest[:, :2, 2].max(1), rest[:, 2, :2].max(1), rest[:, 2, 2]]
    np.testing.assert_allclose(y, np.stack(pooled).mean(0))


@pytest.mark.once
def test_works_inside_a_loop_as_matrix_products():
    net, shape, ops = image_case("darts")
    supernet = nas.supernet(net, shape, ops=ops)
    params, w, x = jax.eval_shape(supernet.init, KEY), weights_of(net), jnp.zeros((2, *shape))
    text = str(jax.make_jaxpr(inner.im2col(supernet.apply))(params, w, x))
    assert "conv_general_dilated" not in text and "reduce_window" not in text and "scan" in text


# ---- Padding --------------------------------------------------------------------------------------------------------

MASK = np.array([1, 1, 0, 1, 0, 1.0])
SIZES = nas.mlp_space(2, widths=(2, 4), depths=(1, 2), norm="batch")


@pytest.mark.once
@pytest.mark.parametrize(
    ("net", "single_path"), [(TABLE, False), (TABLE, True), (SIZES, False)], ids=["mixture", "one path", "sizes"]
)
def test_padding_counts_in_no_normalization_and_no_loss(net, single_path):
    """Outputs and gradients depend only on real rows, in scans over layers and edges and in branches."""
    supernet = nas.supernet(net, (3,), ops=nas.BLOCKS, single_path=single_path)
    x, y, w = jnp.where(MASK[:, None] > 0, X, 50.0), np.array([0, 1, -1, 0, 7, 1]), weights_of(net)
    if single_path:
        w = {"cell": jax.nn.one_hot(w["cell"].argmax(-1), w["cell"].shape[-1])}
    params, real = jax.jit(supernet.init)(KEY), np.flatnonzero(MASK)

    def loss(params, batch):
        outputs = supernet.apply(params, w, batch["x"], None, batch.get("mask"))
        return inner.cross_entropy(outputs, batch), outputs

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (alone, outputs), grads = both(params, {"x": x[real], "y": y[real]})
    (value, among), padded = both(params, {"x": x, "y": y, "mask": MASK})
    np.testing.assert_allclose(among[real], outputs, rtol=1e-10)
    np.testing.assert_allclose(value, alone, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), padded, grads)
    # The mask marks the padding; the values in padding do not.
    assert abs(jax.jit(supernet.apply)(params, w, x)[real] - outputs).max() > 0.1


@pytest.mark.once
def test_labels_that_are_no_classes_give_no_loss():
    outputs = jnp.zeros((3, 2))
    np.testing.assert_allclose(inner.cross_entropy(outputs, {"y": np.array([0, 1, 1])}), np.log(2))
    for bad in (-1, 2):  # nor a gradient, which would move α
        gradient = jax.jit(jax.grad(inner.cross_entropy))  # a program cannot raise
        assert np.isnan(gradient(outputs, {"y": np.array([0, 1, bad])})[2]).all()
    among = {"y": np.array([0, 1, 1]), "class_mask": np.array([1, 1, 0.0])}
    np.testing.assert_allclose(inner.cross_entropy(jnp.zeros((3, 3)), among), np.log(2))
    for same in (np.array([False, True, True]), np.array([0, 1, 1], np.uint8), [0, 1, 1]):
        np.testing.assert_allclose(inner.cross_entropy(outputs, {"y": same}), np.log(2))
    for narrow in (np.uint8, np.int8):  # fewer numbers than there are classes
        y = np.array([0, 1, np.iinfo(narrow).max], narrow)
        np.testing.assert_allclose(inner.cross_entropy(jnp.zeros((3, 256)), {"y": y}), np.log(256))


@pytest.mark.once
def test_integers_are_taken_as_floats():
    for net in (TABLE, SIZES):
        supernet = nas.supernet(net, (3,), ops=nas.BLOCKS)
        params, x = supernet.init(KEY), np.array([[0, 200, 7], [3, 255, 1], [0, 0, 9]], np.uint8)
        more = ((KEY, 0.5),) if net is TABLE else ()
        for fn in (supernet.apply, lambda *args, net=supernet: net.features(*args)[-1]):
            outputs, floats = fn(params, None, x, *more), fn(params, None, x.astype(float), *more)
            np.testing.assert_array_equal(outputs, floats)
            assert outputs.dtype == floats.dtype
    convolution = nas.Network({}, (nas.Layer("conv", 2, 2),), 2)
    images = nas.supernet(convolution, (4, 5, 1), ops={"conv": nas.convolution(3)})
    shape = jax.eval_shape(lambda: images.apply(images.init(KEY), None, jnp.zeros((2, 4, 5, 1), jnp.uint8)))
    assert shape.shape == (2, 2)
