"""The prediction for a row does not depend on the other rows: alone, in a batch, in a batch of one class, with padding.

`TRANSDUCTIVE` lists predictions that may depend on the other rows, with the reason. They must do so.
"""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metaopt import base, few_shot, inner, nas, predictors, spaces
from metaopt.blackbox import _acquisition, _posterior, _surrogates, _transformer
from metaopt.nas.search import _cell_encoder

# The other rows are made large, of which a trained network warns.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:`x` has an entry of size")]

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# A case is `(predict, x)`: `predict(x [N, ...], mask [N]) -> [N, ...]`.

# ---- Networks of searches -------------------------------------------------------------------------------------------

IMAGES = RNG.normal(size=(8, 6, 5, 2))
IMAGES[4:] += 2.0  # another class
CELL = nas.complete_cell(1, ("skip_connect", "linear", "mlp"))
MIXED = nas.Network({"cell": CELL}, (nas.Layer("linear", 4), *[nas.Layer("cell", 4)] * 3), 3)  # ends with a scan
GRAPH = nas.Graph(
    ((0, 1, 1, 1, 0), *[(0, 0, 0, 0, 1)] * 3, (0,) * 5),
    ("input", "conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3", "output"),
)
# The ops on images, which change the channels and the positions, on one edge.
ON_IMAGES = {
    f"{space}: {name}": op
    for space, ops in (
        ("DARTS", nas.DARTS_OPS),
        ("NAS-Bench-201", nas.NAS_BENCH_201_OPS),
        ("NAS-Bench-Macro", nas.NAS_BENCH_MACRO_OPS),
        ("NAS-Bench-101", nas.NAS_BENCH_101_OPS),
    )
    for name, op in ops.items()
    if name not in nas.BLOCKS
}
NEIGHBORS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def drawn(init):
    """Weights with the shapes of those of `init`, which need not be compiled."""
    return jax.tree.map(lambda leaf: 0.5 * RNG.normal(size=leaf.shape), jax.eval_shape(init, KEY))


def kept(network, *, ops=nas.BLOCKS, x=IMAGES, weights=None, **options):
    """The network of a search, kept by `trained_network`."""
    supernet = nas.supernet(network, x.shape[1:], ops=ops, **options)
    weights = jax.tree.map(np.asarray, weights)
    rows = {"x": RNG.normal(size=x.shape)}  # as many as are predicted, since every number of rows is compiled
    trained = nas.trained_network(supernet, drawn(supernet.init), rows, weights=weights)
    return lambda x, mask: trained.outputs(x), x


def ops_on_images():
    cell = nas.Cell(1, (nas.Edge(0, 1, tuple(ON_IMAGES)),), (1,), preprocess=False)
    network = nas.Network(
        {"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 6, 2), nas.Layer("norm_relu", 6)), 3
    )
    return kept(network, ops={**nas.BLOCKS, **ON_IMAGES})


def retrained():
    cell = nas.complete_cell(2, ("skip_connect", "linear"))  # several edges, which training drops at random
    space = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), 3)
    network = nas.discrete(space, nas.random_genotype(0, space))
    setup = nas.retraining(network, (3,), ops=nas.BLOCKS, num_steps=4, auxiliary=0.0, batch_size=4)
    data = {"x": jnp.asarray(RNG.normal(size=(8, 3))), "y": jnp.arange(8) % 3}
    trained = setup.finish(jax.jit(lambda: inner.run(setup.loop, 4)(KEY, None, data))(), data)
    return lambda x, mask: trained.outputs(x), RNG.normal(size=(8, 3))


def in_search(network=MIXED):
    supernet = nas.supernet(network, (3, 2), ops=nas.BLOCKS)
    params = drawn(supernet.init)
    return jax.jit(lambda x, mask: supernet.apply(params, None, x, None, mask)), RNG.normal(size=(8, 3, 2))


def features_at_statistics():
    supernet = nas.supernet(MIXED, (3,), ops=nas.BLOCKS)
    params, x = drawn(supernet.init), RNG.normal(size=(8, 3))
    statistics = jax.jit(supernet.statistics)(params, None, RNG.normal(size=(8, 3)))
    return jax.jit(lambda x, mask: supernet.features(params, None, x, statistics=statistics)[-1]), x


WEIGHTS = nas.mixing_weights(nas.softmax(), MIXED, nas.init_alpha(KEY, MIXED, scale=1.0), KEY)
PATH = nas.one_hot(MIXED, nas.random_genotype(0, MIXED))
CONVS = nas.conv_net_space(3, widths=(2, 4), kernels=(1, 3), depths=(1, 2), hidden=(4,), norm="batch")
LAYERS = nas.mlp_space(3, widths=(2, 4), depths=(1, 2), norm="layer")
ROWS, NODES = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 3, 4))
SEARCHED = {
    "retraining": retrained,
    "supernet, a mixture": lambda: kept(MIXED, x=ROWS, weights=WEIGHTS),
    "supernet, one path": lambda: kept(MIXED, x=ROWS, weights=PATH, single_path=True),
    "supernet, partial channels, edges computed again": lambda: kept(
        MIXED, x=ROWS, weights=WEIGHTS, partial=2, remat_edges=True
    ),
    "supernet, features": features_at_statistics,
    "sizes, by batch, computed again": lambda: kept(CONVS, ops={}, remat_edges=True),
    "sizes, by layer": lambda: kept(LAYERS, ops={}, x=ROWS),
    "ops on images": ops_on_images,
    "a graph of NAS-Bench-101": lambda: kept(
        nas.nas_bench_101_network(GRAPH, 3, channels=6, cells_per_stack=1, num_stacks=1)[0],
        ops=nas.nas_bench_101_network(GRAPH)[1],
    ),
    "tokens": lambda: kept(
        nas.Network({}, (nas.Layer("tokens", 4), nas.Layer("transformer", 4), nas.Layer("norm_relu", 4)), 3),
        ops=nas.BLOCKS,
        x=NODES,
    ),
    "graphs": lambda: kept(
        nas.Network({}, tuple(nas.Layer(name, 4) for name in ("gcn", "sage", "gin", "gat", "norm_relu")), 3),
        ops={**nas.BLOCKS, **nas.graph_ops(NEIGHBORS)},
        x=NODES,
    ),
    "supernet, in search": in_search,
}

# ---- Few-shot networks ----------------------------------------------------------------------------------------------

SUPPORT = {"x": jnp.asarray(RNG.normal(size=(6, 4, 4))), "y": jnp.arange(6) % 2, "mask": jnp.ones(6)}
SUPPORT |= {"class_mask": jnp.ones(2)}
HEADS = {
    "maml": lambda features, loss: few_shot.maml(loss, rate=0.1, num_steps=1, keep_support=True),
    "cavia": lambda features, loss: few_shot.cavia(loss, num_context=2, keep_support=True),
    "proto_maml": lambda features, loss: few_shot.proto_maml(features, num_steps=1, rate=0.1),
    "prototypical_networks": lambda features, loss: few_shot.prototypical_networks(features),
    "ridge_head": lambda features, loss: few_shot.ridge_head(features),
}


def few_shot_method(head, normalization, num_blocks):
    network = few_shot.conv4(normalization=normalization, num_filters=8, num_blocks=num_blocks)
    params = jax.tree.map(lambda leaf: leaf.astype(float), network.init(KEY))
    num_features = 8 * (4 // 2**num_blocks) ** 2
    params["head"] = {"w": jnp.asarray(RNG.normal(size=(num_features, 2))), "b": jnp.zeros(2)}
    outputs = few_shot.linear_head(network.features)
    loss = lambda params, hyperparams, batch: inner.cross_entropy(outputs(params, batch), batch)
    if head == "cavia":  # the context moves the inputs of the head
        outputs = lambda params, batch: network.features(params, batch)[:, :2] + params["context"][None]
    adaptation = HEADS[head](network.features, loss)
    hyperparams = adaptation.hyperparams(params)
    method = jax.jit(few_shot.adapted(adaptation, hyperparams, outputs))

    def predict(x, mask):
        query = {"x": jnp.asarray(x), "mask": jnp.asarray(mask), "class_mask": jnp.ones(2)}
        return method(KEY, SUPPORT, query)[-1]

    return predict, RNG.normal(size=(8, 4, 4))


def features_by_hand():
    """Rows to normalize by are put into the parameters."""
    network = few_shot.conv4(normalization="support", num_filters=8, num_blocks=2)
    params = {**network.init(KEY), "support": {"x": SUPPORT["x"], "mask": SUPPORT["mask"]}}
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    features = jax.jit(lambda x, mask: network.features(params, {"x": x, "mask": mask}))
    return features, RNG.normal(size=(8, 4, 4))


FEW_SHOT = {
    f"conv4, {kind}": functools.partial(few_shot_method, "prototypical_networks", kind, 1 + (kind == "support"))
    for kind in ("batch", "support", "tasknorm", "group", "layer", "none")
}
FEW_SHOT |= {"conv4, features by hand": features_by_hand}
FEW_SHOT |= {
    name: functools.partial(few_shot_method, name, "support", 1) for name in HEADS if name != "prototypical_networks"
}

# ---- Flax modules ---------------------------------------------------------------------------------------------------


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return linen.Dense(2)(linen.BatchNorm(use_running_average=not train)(x))


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.norm, self.last = nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(x))


def flax_module(make, **options):
    model = make()
    params, model_state = model.init(KEY, None, {"x": jnp.ones((2, 3))})
    context = base.Context(KEY, jnp.int32(0), model_state)
    return lambda x, mask: model.apply(params, context, jnp.asarray(x), **options)[0], ROWS


FLAX = {
    "from_linen": lambda: flax_module(lambda: inner.from_linen(Linen(), lambda data: data["x"])),
    "from_nnx": lambda: flax_module(lambda: inner.from_nnx(lambda rngs: Nnx(rngs=rngs))),
    "from_linen, in training": lambda: flax_module(
        lambda: inner.from_linen(Linen(), lambda data: data["x"]), train=True
    ),
}

# ---- Predictors, whose rows are tasks, configurations or cells ------------------------------------------------------

SPACE = {"rate": spaces.interval(1e-3, 1.0, log=True), "mix": spaces.simplex(3)}


def moved(params):
    """Away from the start, where all tasks have one λ."""
    return jax.tree.map(lambda leaf: leaf + 0.3 * RNG.normal(size=leaf.shape), params)


def of_tasks(predictor, num_features):
    """Rows of features, and of the entries of a table of five rows and two columns."""
    params = moved(predictor.init(KEY))
    table = {"y": jnp.arange(5) % 2, "mask": jnp.array([1.0, 1, 1, 1, 0]), "class_mask": jnp.ones(2)}

    def one(row):
        task = base.Task({"x": row[num_features:].reshape(5, 2), **table}, None, row[:num_features])
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(predictor.apply(params, task))])

    return jax.jit(lambda x, mask: jax.vmap(one)(x)), RNG.normal(size=(8, num_features + 10))


def of_cells():
    encoder = _cell_encoder.cell_encoder(4, 3, num_features=1, width=8)
    params = drawn(encoder.init)
    graphs = [nas.Graph(((0, 1, 0), (0, 0, 1), (0, 0, 0)), (str(i), "2", "3")) for i in range(4)]
    cells = _cell_encoder.cells(graphs, ("0", "1", "2", "3"))

    def predict(x, mask):
        some = jax.tree.map(lambda leaf: leaf[jnp.asarray(x, int)[:, 0] % 4], cells)
        return score(params, some, jnp.ones(1))

    score = jax.jit(encoder.score)
    return predict, np.arange(8.0)[:, None]


def of_processes():
    x = RNG.uniform(size=(12, 2))
    kernel = _surrogates.Kernel(jnp.array([-0.5, -1.0]), jnp.array(1.5), jnp.array(-2.0))
    trials = [_surrogates.TaskTrials(x, (s + 1) * x[:, 0] ** 2 - x[:, 1]) for s in range(4)]
    surrogate = _surrogates.surrogate(trials, kernel, x)
    weights = jnp.ones(4) / 4
    observed = jnp.asarray(x[:3]), jnp.array([0.3, 0.1, 0.5]), jnp.ones(3)
    posterior = jax.jit(lambda x, mask: _posterior.posterior(surrogate, weights, observed, x))

    def predict(x, mask):
        mixture = posterior(x, mask)
        return _acquisition.expected_improvement(mixture, jnp.array(0.4))

    return predict, RNG.uniform(size=(8, 2))


def of_transformer():
    init = _transformer.init_transformer(KEY, 2, 1, width=8, num_layers=1)
    networks = jax.tree.map(lambda leaf: leaf[None] + RNG.normal(size=(1, *leaf.shape)) / 4, init)
    trials = jnp.asarray(RNG.uniform(size=(3, 2))), jnp.array([0.3, 0.1, 0.5]), jnp.ones(3)
    representation = _transformer.read_trials(networks, trials, 1.0)
    return lambda x, mask: _transformer.predict_binned(networks, representation, jnp.asarray(x)).probs, RNG.uniform(
        size=(8, 2)
    )


PREDICTORS = {
    "dataset_embedding": lambda: of_tasks(predictors.dataset_embedding(SPACE, width=4), 0),
    "ensemble": lambda: of_tasks(predictors.ensemble(predictors.mlp(SPACE, 2), 2), 2),
    "cell_encoder": of_cells,
    "posterior": of_processes,
    "transformer": of_transformer,
}

CASES = SEARCHED | FEW_SHOT | FLAX | PREDICTORS
TRANSDUCTIVE = {
    "supernet, in search": "weights that many networks share have no statistics; `trained_network` predicts",
    "conv4, batch": "published results of MAML normalize by the query set; the other normalizations are inductive",
    "from_linen, in training": "training updates the running statistics that `train=False` uses",
}


def differences(name):
    """How far the outputs of a row move with the other rows, in each kind of batch."""
    predict, x = CASES[name]()
    ones = lambda num: np.ones(num)
    whole = np.asarray(predict(x, ones(8)))
    assert whole.std() > 1e-3 and np.isfinite(whole).all()  # else nothing can differ
    far = 30 + RNG.normal(size=x.shape)
    padded = np.concatenate([far[:3], x[4:6], far[3:6]]), np.array([0, 0, 0, 1, 1, 0, 0, 0.0])
    # Of few sizes, since every size is compiled.
    errors = {
        "alone": np.concatenate([np.asarray(predict(x[i : i + 1], ones(1))) for i in (0, 5)]) - whole[[0, 5]],
        "one class": np.asarray(predict(np.concatenate([x[4:], x[4:]]), ones(8)))[:4] - whole[4:],
        "padding": np.asarray(predict(*padded))[3:5] - whole[4:6],
    }
    return {kind: abs(difference).max() / abs(whole).max() for kind, difference in errors.items()}


@pytest.mark.parametrize("name", [name for name in CASES if name not in TRANSDUCTIVE])
def test_the_answer_for_a_row_does_not_depend_on_the_other_rows(name):
    errors = differences(name)
    tolerance = 1e-5 if name in FLAX else 1e-9  # flax computes in float32
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("name", TRANSDUCTIVE)
def test_answers_that_may_depend_on_the_other_rows_do(name):
    errors = differences(name)
    assert errors["one class"] > 1e-3, errors
