"""Searched sizes: a network by hand, the small network at one-hot weights, and gradients of the mixing weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.signal import correlate

from metaopt import base, blackbox, inner, nas
from metaopt.nas import _specs

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def conv_net(norm=None, **options):
    sizes = {"widths": (3, 4, 6), "kernels": (1, 3, 5), "depths": (1, 2), "hidden": (4, 6), "norm": norm, **options}
    return nas.conv_net_space(3, **sizes)


def genotype_of(network, **sizes):
    """The largest of what is not named."""
    labels = {name.replace("_", "."): str(size) for name, size in sizes.items()}
    return {name: ((0, 1, labels.get(name, cell.edges[0].ops[-1])),) for name, cell in network.cells.items()}


def random_weights(network, seed=0):
    alpha = nas.init_alpha(jax.random.key(seed), network, scale=1.0)
    return nas.mixing_weights(nas.softmax(), network, alpha, KEY)


def by_hand(params, genotype, x, norm):
    """The seed's network in NumPy, of sizes that slice the largest network's weights."""
    size = {name: int(edges[0][2]) for name, edges in genotype.items()}
    params = jax.tree.map(np.asarray, params)

    def normalized(y):
        axes = {"batch": (0, 1, 2), "layer": (3,), None: ()}[norm]
        return (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5) if norm else y

    for name in ("conv1", "conv2"):
        for p in params[name][: size[f"{name}.depth"]]:
            k, c, rim = size[f"{name}.kernel"], size[f"{name}.width"], (5 - size[f"{name}.kernel"]) // 2
            w = p["w"][rim : rim + k, rim : rim + k, : x.shape[-1], :c]
            full = np.zeros((len(x), x.shape[1] + k - 1, x.shape[2] + k - 1, c))
            for n, o, i in itertools.product(range(len(x)), range(c), range(x.shape[-1])):
                full[n, ..., o] += correlate(x[n, ..., i], w[..., i, o], "full")
            half = k // 2
            y = full[:, half : half + x.shape[1], half : half + x.shape[2]]
            y = y if norm == "batch" else y + p["b"][:c]
            x = np.maximum(normalized(y), 0)
        height, width = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
        pooled = np.zeros((len(x), height, width, x.shape[-1]))
        for i, j in itertools.product(range(height), range(width)):
            pooled[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2))
        x = pooled
    w = params["linear"][0]["w"][:, : x.shape[-1], : size["linear.width"]]
    x = np.maximum(np.tensordot(x.reshape(len(x), -1, x.shape[-1]), w, 2) + params["linear"][0]["b"][: w.shape[-1]], 0)
    return x @ params["head"][0]["w"][0, : x.shape[-1]] + params["head"][0]["b"]


def with_biases(params):
    """Zeros hide a bias that a mask should have hidden; and weights so large that logits differ."""
    return jax.tree.map(lambda leaf: leaf + 0.3 if leaf.ndim == 1 else 3 * leaf, params)


@pytest.mark.parametrize("norm", [*(pytest.param(n, marks=pytest.mark.once) for n in (None, "batch")), "layer"])
def test_a_one_hot_choice_is_the_small_network_and_that_by_hand(norm):
    """Images have one channel and are not square. The slices have the shapes of the small network's parameters."""
    network, shape = conv_net(norm), (7, 4, 1)
    supernet = nas.supernet(network, shape, ops={})
    sizes = {"conv1_width": 4, "conv1_kernel": 3, "conv1_depth": 1, "conv2_width": 3, "conv2_kernel": 1}
    chosen = genotype_of(network, **sizes, linear_width=4)  # conv2 is there twice
    small = nas.supernet(nas.discrete(network, chosen), shape, ops={})
    x = RNG.normal(size=(3, *shape))

    @jax.jit
    def both(params, x):
        inherited = supernet.inherit(params, chosen)
        assert jax.tree.map(jnp.shape, inherited) == jax.tree.map(jnp.shape, jax.eval_shape(small.init, KEY))
        return supernet.apply(params, nas.one_hot(network, chosen), x), small.apply(inherited, None, x)

    params = with_biases(jax.jit(supernet.init)(KEY))
    mixed, discrete = map(np.asarray, both(params, x))
    expected = by_hand(params, chosen, x, norm)
    assert np.ptp(expected, 0).max() > 1e-2
    np.testing.assert_allclose(mixed, expected, atol=1e-9)
    np.testing.assert_allclose(discrete, expected, atol=1e-9)


@pytest.mark.parametrize("norm", ["layer", pytest.param("batch", marks=pytest.mark.once)])
def test_rows_and_sequences_too(norm):
    layers = {
        "conv": nas.ElasticLayer("conv", (4, 6), (3, 5), (1, 3), stride=2, norm=norm),
        "pool": nas.ElasticLayer("avg_pool", stride=3),
        "tokens": nas.ElasticLayer("linear", (4, 6), norm=norm),  # at every position
    }
    sequences = nas.ElasticNetwork(layers, 2)
    cases = [(sequences, (11, 2)), (nas.mlp_space(2, widths=(5, 8), depths=(1, 2, 3), norm=norm), (4,))]
    for network, shape in cases:
        supernet = nas.supernet(network, shape, ops={})
        chosen = genotype_of(network, conv_width=4, conv_kernel=3, tokens_width=4, linear_width=5, linear_depth=2)
        small = nas.supernet(nas.discrete(network, chosen), shape, ops={})

        @jax.jit
        def both(x, network=network, supernet=supernet, small=small, chosen=chosen):
            params = with_biases(supernet.init(KEY))
            mixed = supernet.apply(params, nas.one_hot(network, chosen), x)
            return mixed, small.apply(supernet.inherit(params, chosen), None, x)

        mixed, discrete = both(RNG.normal(size=(6, *shape)))
        assert mixed.shape == (6, 2) and np.ptp(discrete, 0).max() > 1e-3
        np.testing.assert_allclose(mixed, discrete, atol=1e-12)


@pytest.mark.once
def test_gradients_of_mixing_weights_are_finite_differences():
    network = conv_net("layer", kernels=(1, 3))
    supernet = nas.supernet(network, (4, 3, 2), ops={})
    params = with_biases(jax.jit(supernet.init)(KEY))
    flat, unravel = jax.flatten_util.ravel_pytree(random_weights(network))
    x, probe = RNG.normal(size=(3, 4, 3, 2)), RNG.normal(size=(3, 3))

    @jax.jit
    def both(w):
        loss = lambda w: (supernet.apply(params, unravel(w), x) * probe).sum()
        ends = w[None] + 1e-6 * jnp.concatenate([jnp.eye(w.size), -jnp.eye(w.size)])
        return jax.grad(loss)(w), jax.lax.map(loss, ends)

    grads, values = map(np.asarray, both(flat))
    expected = np.subtract(*np.split(values, 2)) / 2e-6
    assert (abs(expected) > 1e-5).sum() > flat.size // 2
    np.testing.assert_allclose(grads, expected, atol=1e-7 * abs(expected).max())


def test_mixtures_before_linear_layers_are_mixtures_of_logits():
    """Behind a last layer's width and depth; and of windows, too, where biases keep every ReLU open."""
    layers = {"conv": nas.ElasticLayer("conv", (2, 4), (1, 5), (1, 2))}
    network = nas.ElasticNetwork(layers, 3)
    supernet = nas.supernet(network, (6, 2), ops={})
    params = jax.tree.map(lambda leaf: leaf + 9 if leaf.ndim == 1 else leaf, jax.jit(supernet.init)(KEY))
    x = RNG.normal(size=(3, 6, 2))
    apply = jax.jit(lambda w: supernet.apply(params, w, x))
    once = {name: np.eye(2)[:1] for name in network.cells}  # two widths of one layer that is there once
    for name in network.cells:
        single = [np.asarray(apply({**once, name: np.eye(2)[i : i + 1]})) for i in range(2)]
        assert abs(single[0] - single[1]).max() > 1e-2
        mixed = apply({**once, name: np.array([[0.3, 0.7]])})
        np.testing.assert_allclose(mixed, 0.3 * single[0] + 0.7 * single[1], atol=1e-12)


def test_a_single_path_gives_a_gradient_only_to_the_chosen_ops():
    network = nas.mlp_space(2, widths=(2, 4), depths=(1, 2))
    dense, single = (nas.supernet(network, (3,), ops={}, single_path=path, remat_edges=path) for path in (False, True))
    chosen = genotype_of(network, linear_width=2)
    weights = {name: jnp.asarray(w) for name, w in nas.one_hot(network, chosen).items()}
    x = RNG.normal(size=(5, 3))

    @jax.jit
    def both():
        params = dense.init(KEY)
        loss = lambda net: jax.value_and_grad(lambda w: (net.apply(params, w, x) ** 2).sum())(weights)
        return loss(dense), loss(single)

    (value, grads), (single_value, single_grads) = both()
    np.testing.assert_allclose(single_value, value, rtol=1e-12)
    for name, w in weights.items():
        assert abs(grads[name] * (1 - w)).max() > 1e-4
        np.testing.assert_allclose(single_grads[name], grads[name] * w, atol=1e-12)


def rows(num):
    x = RNG.normal(size=(num, 3))
    return {"x": jnp.asarray(x), "y": jnp.asarray((x[:, 0] * x[:, 1] > 0).astype(np.int32))}


TASK = base.Task(rows(9), rows(8))
SIZES = nas.mlp_space(2, widths=(2, 4), depths=(1, 2))
SEARCHES = {
    "darts": {},
    "unrolled_darts": {"num_steps": 2},
    "implicit_darts": {"num_steps": 2},
    "gdas": {"num_steps": 5},
    "pc_darts": {"partial": 1},
    "beta_darts": {"num_steps": 5},
    "robust_darts": {"every": 2},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gdas" else [pytest.mark.once]) for name in SEARCHES]
)
def test_every_search_takes_sizes(name):
    search = getattr(nas, name)(SIZES, (3,), ops={}, **SEARCHES[name])
    alpha = jax.tree.map(lambda a: a + 0.1, search.hyperparams(KEY))

    def estimate(key):
        return search.estimator.estimate(alpha, TASK, search.estimator.init(key, alpha, TASK))[0]

    shapes = jax.eval_shape(estimate, KEY)
    assert jax.tree.map(jnp.shape, shapes.hypergrad) == jax.tree.map(jnp.shape, alpha)
    genotype = search.genotype(alpha)
    assert nas.genotype_from_text(nas.genotype_to_text(genotype)) == genotype
    assert [len(edges) for edges in genotype.values()] == [1, 1]
    assert not nas.discrete(SIZES, genotype).cells


def test_no_gradient_is_only_rounding_noise():
    """As that of a bias before a batch normalization would be: Adam makes whole steps of it."""
    supernet = nas.supernet(conv_net("batch"), (7, 4, 1), ops={})
    x, y = jnp.asarray(RNG.normal(size=(8, 7, 4, 1))), jnp.arange(8) % 3
    loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(supernet.apply(params, None, x), y).mean()
    grads = jax.jit(jax.grad(loss))(jax.jit(supernet.init)(KEY))
    assert min(float(abs(grad).max()) for grad in jax.tree.leaves(grads)) > 1e-4


@pytest.mark.slow
def test_the_exact_hypergradient_is_finite_differences():
    """In windows, widths and depths at once, one step ahead, through `nas.darts`."""
    network = conv_net(widths=(1, 2), kernels=(1, 3), depths=(1, 2), hidden=(2, 3), norm="batch")
    sgd = lambda hyperparams: optax.sgd(0.3)
    search = nas.darts(network, (4, 2, 1), ops={}, order="exact", optimizer=sgd)
    images = lambda num: {"x": jnp.asarray(RNG.normal(size=(num, 4, 2, 1))), "y": jnp.arange(num) % 3}
    task, loop = base.Task(images(6), images(5)), search.problem.loop
    alpha = nas.init_alpha(KEY, network, scale=1.0)
    flat, unravel = jax.flatten_util.ravel_pytree(alpha)

    def objective(alpha, state):
        state = inner.step(loop, state, alpha, task.train)
        return search.problem.outer_loss(loop.params(state), alpha, task.valid, loop.context(state))

    @jax.jit
    def both():
        estimate, after = search.estimator.estimate(alpha, task, search.estimator.init(KEY, alpha, task))
        ends = flat[None] + 1e-5 * jnp.concatenate([jnp.eye(flat.size), -jnp.eye(flat.size)])
        values = jax.lax.map(lambda end: objective(unravel(end), after.inner), ends)
        return estimate.hypergrad, values

    hypergrad, values = both()
    expected = np.subtract(*np.split(np.asarray(values), 2)) / 2e-5
    hypergrad = np.asarray(jax.flatten_util.ravel_pytree(hypergrad)[0])
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(hypergrad - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.once
def test_single_path_one_shot_and_evolution_over_sizes():
    one_shot = nas.single_path_one_shot(SIZES, (3,), ops={}, num_steps=20)
    params = one_shot.train(KEY, TASK.train)
    searcher = blackbox.regularized_evolution(population_size=4, sample_size=2)
    state, scores = searcher.init(KEY, nas.configuration_space(SIZES)), {}
    for _ in range(12):
        (trial,), state = searcher.ask(state, 1)
        genotype = nas.genotype_from_configuration(SIZES, trial.configuration)
        score = float(one_shot.score(params, genotype, TASK.valid))
        scores[nas.genotype_to_text(genotype)] = score
        state = searcher.tell(state, [trial._replace(outcome=score, status="COMPLETE")])
    assert len(scores) >= 3 and np.ptp(list(scores.values())) > 1e-6  # of 4 networks
    for text, score in scores.items():
        genotype = nas.genotype_from_text(text)
        small = nas.supernet(nas.discrete(SIZES, genotype), (3,), ops={})
        logits = small.apply(one_shot.supernet.inherit(params, genotype), None, TASK.valid["x"])
        expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, TASK.valid["y"]).mean()
        np.testing.assert_allclose(score, expected, rtol=1e-9)


def test_configurations_are_genotypes():
    network = conv_net(kernels=(3,))  # one candidate does not make a choice
    assert list(network.cells) == ["conv1.width", "conv1.depth", "conv2.width", "conv2.depth", "linear.width"]
    space = nas.configuration_space(network)
    assert {name: leaf.high for name, leaf in space.items()} == dict(zip(space, (2, 1, 2, 1, 1), strict=True))
    genotype = nas.genotype_from_configuration(network, dict(zip(space, (1, 0, 2, 1, 0), strict=True)))
    small = nas.discrete(network, genotype)
    assert (small.layers["conv1"].width, small.layers["conv2"].depth) == ((4,), (2,))
    assert (
        _specs.network_from_dict(_specs.network_to_dict(small)) == small
        and _specs.network_from_dict(_specs.network_to_dict(network)) == network
    )
    cells = nas.nas_bench_201_space(channels=2, cells_per_stage=1)
    digits = dict(zip(nas.configuration_space(cells), (3, 0, 1, 0, 0, 2), strict=True))
    assert list(digits)[1] == "cell.0-2"
    text = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|nor_conv_1x1~2|"
    assert nas.genotype_from_configuration(cells, digits) == nas.genotype_from_text(text, form="nas_bench_201")


def test_without_weights_the_network_is_the_largest():
    supernet = nas.supernet(SIZES, (3,), ops={})
    shapes = jax.eval_shape(supernet.apply, jax.eval_shape(supernet.init, KEY), None, jnp.zeros((2, 3)))
    assert shapes.shape == (2, 2)
