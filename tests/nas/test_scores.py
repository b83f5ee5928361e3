"""Training-free scores against a slow network in NumPy: gradients by finite differences, signs counted one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import inner, nas
from metaopt.nas import _scores

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
# The first one without normalization, after which the rows' Jacobians would add up to zero.
PLAIN = nas.Op(
    lambda key, shape, c, stride: {"w": nas.uniform(key, (shape[-1], c), shape[-1])}, lambda p, x, *_: x @ p["w"]
)
OPS = {**nas.BLOCKS, "plain": PLAIN, "conv": nas.convolution(1), "max": nas.DARTS_OPS["max_pool_3x3"]}
CELL = nas.complete_cell(3, ("none", "skip_connect", "conv"), preprocess=False)
NET = nas.Network({"cell": CELL}, (nas.Layer("plain", 8), *[nas.Layer("cell", 8)] * 2, nas.Layer("norm_relu", 8)), 2)
GENOTYPE = {"cell": ((0, 1, "conv"), (0, 2, "skip_connect"), (1, 2, "conv"), (1, 3, "skip_connect"), (2, 3, "conv"))}
RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(6, 9)), "y": np.array([0, 1, 1, 0, 1, 0])}


class Slow:
    """The network of `GENOTYPE`, row by row; θ is a flat vector of its weights, without the head's bias."""

    shapes = {"plain": (9, 8), **{f"conv{i}": (8, 8) for i in range(6)}, "head": (8, 2)}

    def __init__(self, params):
        plain, cells, _ = params["layers"]
        convs = [cells["edges"][0][2]["w"][layer, edge] for layer in (0, 1) for edge in (0, 2, 5)]
        arrays = [plain["w"][0], *convs, params["head"]["w"]]
        self.theta = np.concatenate([np.ravel(a) for a in arrays])

    def split(self, theta):
        sizes = [np.prod(shape) for shape in self.shapes.values()]
        parts = np.split(theta, np.cumsum(sizes)[:-1])
        return {name: p.reshape(shape) for p, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def __call__(self, theta, x, *, norm=True, signs=None):
        """Outputs [N, 2]; `signs` collects [N] booleans, one for each ReLU."""
        w = self.split(theta)

        def normalized(x):
            return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) if norm else x

        def relu(x):
            if signs is not None:
                signs.extend((x > 0).T)
            return np.where(x > 0, x, 0)

        x = x @ w["plain"]
        for layer in range(2):
            a, b, c = (w[f"conv{3 * layer + i}"] for i in range(3))
            conv = lambda x, w: normalized(relu(x) @ w)
            one = conv(x, a)
            two = x + conv(one, b)
            x = one + conv(two, c)
        return relu(normalized(x)) @ w["head"]

    def loss(self, theta, batch):
        outputs = self(theta, batch["x"])
        return np.mean(np.log(np.exp(outputs).sum(1)) - outputs[range(len(outputs)), batch["y"]])


def differences(function, point, epsilon=1e-6):
    ends = [(function(point + d), function(point - d)) for d in epsilon * np.eye(len(point))]
    return np.array([(ahead - behind) / (2 * epsilon) for ahead, behind in ends])


@pytest.fixture(scope="module")
def scored():
    """Parameters, and all scores: in the supernet with one op an edge, of the discrete network, and of no network."""
    supernet = nas.supernet(NET, (9,), ops=OPS, single_path=True)
    small = nas.supernet(nas.discrete(NET, GENOTYPE), (9,), ops=OPS)

    def scores(net, params, weights):
        return {name: score(net, params, weights, BATCH) for name, score in nas.SCORES.items()}

    @jax.jit
    def both(weights):
        params = supernet.init(KEY)
        return params, scores(supernet, params, weights), scores(small, supernet.inherit(params, GENOTYPE), None)

    params, one, other = jax.device_get(both(nas.one_hot(NET, GENOTYPE)))
    return params, one, other, jax.device_get(both(nas.one_hot(NET, {"cell": ()}))[1])


def test_scores_against_a_slow_network(scored):
    params, scores, _, _ = scored
    slow = Slow(params)
    grad = differences(lambda theta: slow.loss(theta, BATCH), slow.theta)
    norms = [np.linalg.norm(g) for g in slow.split(grad).values()]
    np.testing.assert_allclose(scores["grad_norm"], sum(norms), rtol=1e-6)
    np.testing.assert_allclose(scores["snip"], abs(grad * slow.theta).sum(), rtol=1e-6)

    positive = abs(slow.theta)
    flow = differences(lambda theta: slow(theta, np.ones((1, 9)), norm=False).sum(), positive)
    np.testing.assert_allclose(scores["synflow"], np.log((positive * flow).sum()), rtol=1e-7)

    jacobian = differences(lambda x: slow(slow.theta, x.reshape(6, 9)).sum(), BATCH["x"].ravel()).reshape(6, 9)
    values = np.linalg.eigvalsh(np.corrcoef(jacobian)) + 1e-5
    np.testing.assert_allclose(scores["jacob_cov"], -(np.log(values) + 1 / values).sum(), rtol=1e-5)

    signs = []
    slow(slow.theta, BATCH["x"], signs=signs)
    assert len(signs) == 8 * 7
    kernel = np.array([[sum(s[i] == s[j] for s in signs) for j in range(6)] for i in range(6)])
    np.testing.assert_allclose(scores["nwot"], np.linalg.slogdet(kernel)[1], rtol=1e-9)


def test_a_genotype_scores_in_the_supernet_as_by_itself(scored):
    _, scores, discrete, _ = scored
    for name, score in scores.items():
        np.testing.assert_allclose(score, discrete[name], rtol=1e-9, err_msg=name)


def test_padding_scores_nothing(scored):
    params, scores, _, _ = scored
    supernet = nas.supernet(NET, (9,), ops=OPS, single_path=True)
    place = np.array([0, 2, 3, 5, 6, 7])
    x, y, mask = np.full((8, 9), 30.0), np.full(8, -1), np.zeros(8)
    x[place], y[place], mask[place] = BATCH["x"], BATCH["y"], 1
    names = ("jacob_cov", "nwot", "grad_norm", "snip")

    @jax.jit
    def padded(params, batch):
        return {name: nas.SCORES[name](supernet, params, nas.one_hot(NET, GENOTYPE), batch) for name in names}

    for name, score in padded(params, {"x": x, "y": y, "mask": mask}).items():
        np.testing.assert_allclose(score, scores[name], rtol=1e-6, err_msg=name)


def test_integers_score_as_the_same_floats():
    supernet = nas.supernet(NET, (9,), ops=OPS, single_path=True)
    batch = {"x": np.random.default_rng(0).integers(0, 9, (6, 9)).astype(np.uint8), "y": BATCH["y"]}
    params = jax.jit(supernet.init)(jax.random.key(0))
    # The others read x only through `Supernet.apply`.
    score = lambda batch: nas.SCORES["jacob_cov"](supernet, params, nas.one_hot(NET, GENOTYPE), batch)
    integers, floats = jax.jit(lambda a, b: (score(a), score(b)))(batch, {**batch, "x": batch["x"] * 1.0})
    np.testing.assert_allclose(integers, floats, rtol=1e-12)


def test_where_nothing_arrives(scored):
    nothing = scored[3]
    assert nothing["synflow"] == nothing["jacob_cov"] == -np.inf
    assert nothing["snip"] == 0 and 0 <= nothing["grad_norm"] < np.inf


def test_synflow_of_a_deep_network_does_not_overflow():
    """A chain of matrices with equal entries, in float32. The score is log(number of layers · product of all)."""
    net = nas.Network({}, (nas.Layer("linear", 64),) * 30, 1)
    supernet = nas.supernet(net, (64,), ops=nas.BLOCKS)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, jnp.float32), jax.eval_shape(supernet.init, KEY))
    with jax.enable_x64(False):
        score = jax.jit(lambda params: _scores.synflow(supernet, params, None))(params)
    # 64 inputs of 1; every layer and the head multiply by 64 · 0.5. (The bias is not a matrix.)
    expected = np.log(31.0) + 31 * np.log(32.0)
    assert score.dtype == jnp.float32 and expected > np.log(np.finfo(np.float32).max)
    np.testing.assert_allclose(score, expected, rtol=1e-6)


@pytest.mark.once
def test_scores_of_networks_as_matrix_products():
    """Scores are equal with the rewritten convolutions and pooling of a loop on a CPU."""
    cell = nas.complete_cell(1, ("max", "conv"), preprocess=False)
    net = nas.Network({"cell": cell}, (nas.Layer("stem", 2), nas.Layer("cell", 2), nas.Layer("residual", 2, 2)), 2)
    supernet = nas.supernet(net, (4, 4, 1), ops=OPS, single_path=True)
    products = supernet._replace(apply=inner.im2col(supernet.apply))
    batch = {"x": RNG.normal(size=(5, 4, 4, 1)), "y": np.arange(5) % 2}

    @jax.jit
    def both(weights):
        params = supernet.init(KEY)
        names = ("synflow", "nwot")
        return [{name: nas.SCORES[name](s, params, weights, batch) for name in names} for s in (supernet, products)]

    for weights in ([[1.0, 0.0]], [[0.0, 1.0]]):
        first, second = both({"cell": jnp.array(weights)})
        for name, value in first.items():
            assert np.isfinite(value)
            np.testing.assert_allclose(second[name], value, rtol=1e-9, err_msg=name)


def test_first_gradients_of_ops_are_slopes_of_the_loss():
    """By central differences in the mixing weights, at each initialization; over edges, each kind with the length 1."""
    cell = nas.complete_cell(2, ("none", "skip_connect", "plain"), preprocess=False)
    net = nas.Network({"cell": cell}, (nas.Layer("plain", 3), nas.Layer("cell", 3)), 2)
    supernet = nas.supernet(net, (9,), ops=OPS)
    loss = lambda outputs, batch: ((outputs - batch["y"][:, None]) ** 2).mean()
    features = jax.jit(lambda: nas.gradient_features(supernet, KEY, BATCH, loss=loss, num_keys=3))()

    @jax.jit
    def value(w, key):
        return loss(supernet.apply(supernet.init(key), {"cell": w}, BATCH["x"]), BATCH)

    slopes = np.zeros((3, 3, 3))
    for i, key in enumerate(jax.random.split(KEY, 3)):
        for e, o in np.ndindex(3, 3):
            step = 1e-5 * (np.arange(9).reshape(3, 3) == 3 * e + o)
            slopes[i, e, o] = (value(1 / 3 + step, key) - value(1 / 3 - step, key)) / 2e-5
    expected = (slopes - slopes.mean(-1, keepdims=True)).mean((0, 1))
    np.testing.assert_allclose(features, expected / (np.linalg.norm(expected) + 1e-6), rtol=1e-6)
