"""Each normalization against NumPy; which of them are transductive; statistics of only the support set."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import base, few_shot, hypergrad, inner, tasks

NORMALIZATIONS = ("batch", "support", "tasknorm", "group", "layer", "none")
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
FILTERS = 16
IMAGES = RNG.normal(size=(7, 4, 4, 2)).astype(np.float32)
MASK = np.array([1, 1, 1, 1, 1, 0, 0], np.float32)
SUPPORT = {"x": RNG.normal(size=(4, 4, 4, 2)).astype(np.float32) + 1, "mask": np.array([1, 1, 1, 0], np.float32)}


def convolved(x, w):
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return sum(padded[:, i : i + 4, j : j + 4] @ w[i, j] for i in range(3) for j in range(3))


def by_hand(kind, params, x, reference):
    """One block of images [N, 4, 4, 2]; statistics of the images `whose`, already without padding."""
    block = {name: np.asarray(leaf, float) for name, leaf in params["block0"].items()}
    h, convolved_reference = convolved(x, block["w"]), convolved(reference, block["w"])
    if kind in ("batch", "support"):
        mean, variance = convolved_reference.mean((0, 1, 2)), convolved_reference.var((0, 1, 2))
    elif kind in ("group", "layer"):
        groups = h.reshape(len(h), 16, 8 if kind == "group" else 1, -1)
        spread = lambda m: np.repeat(m, FILTERS // m.shape[1], axis=1)[:, None, None]
        mean, variance = spread(groups.mean((1, 3))), spread(groups.var((1, 3)))
    elif kind == "tasknorm":
        # Half of the places drawn from the support set, by alpha, and the others from the example.
        alpha = 1 / (1 + np.exp(-(block["mix"][0] * len(reference) + block["mix"][1])))
        m, square = convolved_reference.mean((0, 1, 2)), (convolved_reference**2).mean((0, 1, 2))
        own, own_square = h.mean((1, 2), keepdims=True), (h**2).mean((1, 2), keepdims=True)
        mean = alpha * m + (1 - alpha) * own
        variance = alpha * square + (1 - alpha) * own_square - mean**2
    if kind != "none":
        h = (h - mean) / np.sqrt(variance + 1e-5) * block["scale"]
    h = np.maximum(h + block["shift"], 0).reshape(len(h), 2, 2, 2, 2, FILTERS)
    return h.max((2, 4)).reshape(len(h), -1)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@pytest.mark.once
def test_a_block_equals_one_in_numpy(kind):
    network = few_shot.conv4(normalization=kind, num_filters=FILTERS, num_blocks=1, num_channels=2)
    params = network.init(KEY)
    leaves, structure = jax.tree.flatten(params)
    params = structure.unflatten([leaf + 0.2 * RNG.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    features = lambda params, batch: np.asarray(network.features(params, batch))  # without `jit`: four small programs
    batch = {"x": jnp.asarray(IMAGES), "mask": jnp.asarray(MASK)}
    real = features(params, batch)[:5]
    np.testing.assert_allclose(real, by_hand(kind, params, IMAGES[:5], IMAGES[:5]), rtol=2e-4, atol=2e-4)
    kept = features({**params, "support": jax.tree.map(jnp.asarray, SUPPORT)}, batch)[:5]
    reference = SUPPORT["x"][:3] if kind in ("support", "tasknorm") else IMAGES[:5]
    np.testing.assert_allclose(kept, by_hand(kind, params, IMAGES[:5], reference), rtol=2e-4, atol=2e-4)
    assert real.std() > 0.1


@pytest.mark.parametrize("size", [4, 5])
def test_strides_in_place_of_pooling(size):
    """Every other place of the convolution, from the first on; then the mean over places."""
    network = few_shot.conv4(normalization="none", num_filters=3, num_blocks=1, num_channels=2, downsampling="stride")
    params = network.init(KEY)
    images = RNG.normal(size=(2, size, size, 2)).astype(np.float32)
    outputs = network.features(params, {"x": jnp.asarray(images), "mask": jnp.ones(2)})
    w = np.asarray(params["block0"]["w"])
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    places = range(0, size, 2)
    h = [sum(padded[:, a + i, b + j] @ w[i, j] for i in range(3) for j in range(3)) for a in places for b in places]
    np.testing.assert_allclose(outputs, np.maximum(h, 0).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_a_body_that_does_not_adapt_is_computed_once():
    """The body is normalized by a padded support set. The head is made from this set, and only the head adapts."""
    network = few_shot.conv4(normalization="support", num_filters=3, num_blocks=1, num_channels=2)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(KEY))
    side = {"x": jnp.asarray(IMAGES, jnp.float64), "y": jnp.arange(7) % 2, "mask": jnp.asarray(MASK)}
    side |= {"class_mask": jnp.ones(2)}
    task = base.Task(side, {**side, "x": side["x"][::-1], "mask": jnp.ones(7)})
    a = few_shot.proto_maml(network.features, adapt="^head", num_steps=2, rate=0.1)
    hyperparams = a.hyperparams(params)
    state = jax.eval_shape(a.unrolling.loop.init, KEY, hyperparams, side)
    assert [x.shape for x in state.model_state.once] == [(7, 12)]
    estimators = a.estimator, hypergrad.unrolled(a.problem, num_steps=2)
    estimates = jax.jit(lambda hp: [e.estimate(hp, task, KEY)[0] for e in estimators])(hyperparams)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *estimates)
    assert abs(estimates[0].hypergrad["init"]["block0"]["w"]).max() > 1e-3


@pytest.mark.once
def test_scales_and_shifts_may_adapt_alone():
    """BatchNorm only: a step takes them down the slope of the support loss, and leaves all else."""
    network = few_shot.conv4(num_filters=2, num_blocks=1, num_channels=2)
    params = network.init(KEY) | {"head": {"w": jnp.tile(jnp.array([0.3, -0.2]), (8, 1)), "b": jnp.zeros(2)}}
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    head = few_shot.linear_head(network.features)
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    side = {"x": jnp.asarray(IMAGES, jnp.float64), "y": jnp.arange(7) % 2, "mask": jnp.asarray(MASK)}
    side |= {"class_mask": jnp.ones(2)}
    a = few_shot.adaptation(loss, adapt="(^|/)(scale|shift)$", rate=0.5)
    outputs = jax.jit(few_shot.adapted(a, a.hyperparams(params), head))(KEY, side, side)
    down = jax.tree.map(lambda x, slope: x - 0.5 * slope, params, jax.grad(loss)(params, None, side))
    alone = {name: down["block0"][name] for name in ("scale", "shift")}
    moved = {**params, "block0": params["block0"] | alone}
    np.testing.assert_allclose(outputs, [head(params, side), head(moved, side)], rtol=1e-9)
    assert abs(outputs[1] - outputs[0]).max() > 0.01 and abs(head(down, side) - outputs[1]).max() > 0.01


@pytest.mark.once
def test_many_pixels_do_not_overflow_float16():
    network = few_shot.conv4(num_filters=2, num_blocks=1)
    images = RNG.random((90, 28, 28, 1))  # 70,560 pixels; float16 ends at 65,504

    def features(dtype):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), network.init(KEY))
        return network.features(params, {"x": jnp.asarray(images, dtype), "mask": jnp.ones(90, dtype)})

    half, single = features(jnp.float16), features(jnp.float32)
    assert single.max() > 1
    np.testing.assert_allclose(np.asarray(half, np.float32), single, atol=0.05)


@pytest.mark.once
def test_only_batch_statistics_are_transductive():
    """Prototypical networks and MAML, without a word from the user on whose statistics they are."""
    images = RNG.normal(size=(8 * 6, 4, 4)).astype(np.float32)
    sample = tasks.episodes(tasks.from_arrays(images, np.arange(48) // 6), num_ways=2, num_query=2)
    methods = {}
    for kind in ("batch", "support", "tasknorm"):
        network = few_shot.conv4(normalization=kind, num_filters=2, num_blocks=1)
        head, params = few_shot.linear_head(network.features), network.init(KEY)
        a = few_shot.prototypical_networks(network.features)
        methods[kind] = few_shot.adapted(a, a.hyperparams(params), head)
    network = few_shot.conv4(normalization="support", num_filters=2, num_blocks=1)
    head = few_shot.linear_head(network.features)
    params = {**network.init(KEY), "head": {"w": jnp.zeros((8, 2), jnp.float32), "b": jnp.zeros(2, jnp.float32)}}
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    a = few_shot.maml(loss, rate=1.0, keep_support=True)
    methods["maml"] = few_shot.adapted(a, a.hyperparams(params), head)
    kinds = few_shot.evaluate_episodes(methods, sample, KEY, num_episodes=4, chunk_size=4).transductive
    assert kinds == {"batch": True, "support": False, "tasknorm": False, "maml": False}


@pytest.mark.once
def test_a_query_set_is_seen_with_the_support_set():
    """By f. The inner loss sees the support set, and pre-training has its own batch."""
    network = few_shot.conv4(normalization="support", num_filters=2, num_blocks=1)
    head = few_shot.linear_head(network.features)
    params = {**network.init(KEY), "head": {"w": jnp.zeros((8, 2), jnp.float32), "b": jnp.zeros(2, jnp.float32)}}
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    side = {"x": jnp.asarray(IMAGES[..., 0]), "y": jnp.arange(7) % 2, "mask": jnp.asarray(MASK)}
    side |= {"class_mask": jnp.ones(2, jnp.float32)}
    estimate = lambda a: jax.eval_shape(
        lambda hp: a.estimator.estimate(hp, base.Task(side, side), KEY)[0].value, a.hyperparams(params)
    )
    for make in (few_shot.maml, functools.partial(few_shot.maml, rule=hypergrad.reptile)):
        assert estimate(make(loss, keep_support=True)).dtype == jnp.float32
    for make in (few_shot.prototypical_networks, few_shot.ridge_head):  # no steps, but a head of the support set
        assert estimate(make(network.features)).shape == ()
    within = few_shot.maml(loss, keep_support=True)  # whose inner loss is traced within f, and sees a support set there

    def judged_after_more_steps(params, hyperparams, batch):
        own = {"init": {name: leaf for name, leaf in params.items() if name != "support"}}
        outputs = jax.lax.stop_gradient(few_shot.adapted(within, own, head)(KEY, side, batch))
        return inner.cross_entropy(outputs[-1], batch)

    nested = few_shot.adaptation(loss, num_steps=1, outer_loss=judged_after_more_steps, keep_support=True)
    assert estimate(nested).dtype == jnp.float32
    assert estimate(few_shot.pretrained(loss)).dtype == jnp.float32
    # Afterwards the network is as before.
    assert network.features(params, side).shape == (7, 8)


@pytest.mark.once
def test_each_step_has_its_own_scale_and_shift_and_the_statistics_of_its_own_batch():
    """MAML++'s network against two steps of the plain one, written out: no statistics are carried on."""
    per_step = re.compile("scale|shift")
    network, plain = (few_shot.conv4(num_filters=2, num_blocks=1, num_steps=steps) for steps in (2, None))

    def loss_of(network):
        head = few_shot.linear_head(network.features)
        return lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)

    a = few_shot.maml_plus_plus(
        loss_of(network), num_steps=2, rate=0.3, adapt="^(?!.*(scale|shift))", leaves_per_step="scale|shift"
    )
    params = {**network.init(KEY), "head": {"w": jnp.ones((8, 2), jnp.float32), "b": jnp.zeros(2, jnp.float32)}}
    params["head"]["w"] = params["head"]["w"].at[0, 0].set(2.0)
    params["block0"]["scale"] *= jnp.array([[1.5], [0.5]], jnp.float32)
    params["block0"]["shift"] += jnp.array([[0.1], [-0.2]], jnp.float32)
    rows = {"y": jnp.arange(7) % 2, "mask": jnp.asarray(MASK), "class_mask": jnp.ones(2)}
    support, query = ({"x": jnp.asarray(scale * IMAGES[..., 0]), **rows} for scale in (1, 3))

    def leaves_at(params, step):
        pick = lambda path, leaf: leaf[step] if per_step.search(jax.tree_util.keystr(path)) else leaf
        return jax.tree_util.tree_map_with_path(pick, params)

    @jax.jit
    def both(params):
        out = a.estimator.estimate(a.hyperparams(params), base.Task(support, query), KEY)[0]
        theta, loss = params, loss_of(plain)
        for step in (0, 1):
            slopes = jax.grad(loss)(leaves_at(theta, step), None, support)
            move = lambda path, leaf, slope: leaf if per_step.search(jax.tree_util.keystr(path)) else leaf - 0.3 * slope
            theta = jax.tree_util.tree_map_with_path(move, theta, slopes)
        return out, loss(leaves_at(theta, 1), None, query), loss(leaves_at(theta, 0), None, query)

    out, by_hand, of_the_first = both(params)
    assert float(out.value) == pytest.approx(float(by_hand), rel=1e-5) and abs(by_hand - of_the_first) > 1e-3
    scale = np.abs(out.hypergrad["init"]["block0"]["scale"]).max(1)
    assert scale.shape == (2,) and (scale > 1e-6).all() and np.isfinite(out.value)
