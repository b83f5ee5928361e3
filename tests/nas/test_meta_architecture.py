"""h(t') by hypergradient: against finite differences, against one shared α, and task by task."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import base, hypergrad, inner, nas, predictors, spaces, tasks

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SMOOTH = nas.Op(  # no kinks, and no normalization
    lambda key, shape, c, stride: {"w": nas.uniform(key, (shape[-1], c), shape[-1])},
    lambda params, x, channels, stride: jnp.tanh(x @ params["w"]),
)
OPS = {**nas.BLOCKS, "smooth": SMOOTH}
CELL = nas.complete_cell(1, ("none", "skip_connect", "smooth"), preprocess=False)
NET = nas.Network({"cell": CELL}, (nas.Layer("smooth", 2), nas.Layer("cell", 2)), 2)
SPACE = {"cell": spaces.real(shape=(1, 3))}


def rows(num):
    x = RNG.normal(size=(num, 3))
    return {"x": x, "y": (x[:, 0] * x[:, 1] > 0).astype(np.int32)}


TASKS = [base.Task(rows(6), rows(5), RNG.normal(size=2)) for _ in range(2)]
BATCH = tasks.stack(TASKS)


def search_of(**options):
    rule = lambda problem: hypergrad.unrolled(problem, num_steps=3)
    sgd = lambda hyperparams: optax.sgd(0.5)
    return nas.architecture_search(NET, (3,), rule, ops=OPS, optimizer=sgd, decay=0.03, keep=None, **options)


SEARCH = search_of(learn_init=True)
META = nas.meta_architecture_search(
    SEARCH, predictors.mlp(SPACE, 2, num_hidden=2), num_steps=2, optimizer=optax.sgd(0.1)
)


@pytest.fixture(scope="module")
def learned():
    """λ away from its start, where parts of h have no gradient yet."""

    def draw():
        flat, unravel = jax.flatten_util.ravel_pytree(META.hyperparams(KEY))
        return unravel(flat + 0.5 * jax.random.normal(jax.random.key(1), flat.shape))

    return jax.jit(draw)()


@pytest.fixture(scope="module")
def estimated(learned):
    """Each task by itself, with the state that the batch has for it; and the batch."""
    over = hypergrad.over_tasks(META.estimator)

    @jax.jit
    def both(learned, batch):
        states = over.init(KEY, learned, batch)
        one = lambda i: META.estimator.estimate(learned, *jax.tree.map(lambda x: x[i], (batch, states)))[0]
        return jax.lax.map(one, jnp.arange(2)), over.estimate(learned, batch, states)[0]

    return both(learned, BATCH)


def test_against_finite_differences(learned, estimated):
    flat, unravel = jax.flatten_util.ravel_pytree(learned)
    state = jax.tree.map(lambda x: x[0], hypergrad.over_tasks(META.estimator).init(KEY, learned, BATCH))

    @jax.jit
    def values(ends):
        value = lambda x: META.estimator.estimate(unravel(x), TASKS[0], state)[0].value
        return jax.lax.map(value, ends)

    epsilon = 1e-5
    ahead, behind = (np.asarray(values(np.asarray(flat) + s * epsilon * np.eye(len(flat)))) for s in (1, -1))
    expected = (ahead - behind) / (2 * epsilon)
    computed = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: x[0], estimated[0].hypergrad))[0]
    np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-9)
    # Every part of h and of the start takes part.
    parts = jax.tree.map(lambda x: float(jnp.abs(x[0]).max()), estimated[0].hypergrad)
    assert min(jax.tree.leaves(parts)) > 1e-6


def test_a_batch_of_tasks_is_the_mean_of_each_by_itself(estimated):
    alone, batch = estimated
    jax.tree.map(
        lambda one, mean: np.testing.assert_allclose(one.mean(0), mean, rtol=1e-9, atol=1e-14),
        alone.hypergrad,
        batch.hypergrad,
    )
    assert float(alone.value[0]) != float(alone.value[1])


def test_on_cpu_tasks_with_positions_run_one_after_the_other(monkeypatch):
    # The options decide only about time and memory, so the estimate does not show them.
    monkeypatch.setattr(hypergrad, "over_tasks", lambda estimator, **options: options)
    assert META.over_tasks(max_norm=1.0) == {"max_norm": 1.0}  # rows of tables
    search = SEARCH._replace(supernet=nas.supernet(NET, (5, 3), ops=OPS))
    images = nas.meta_architecture_search(search, predictors.mlp(SPACE, 2))
    assert images.over_tasks(max_norm=1.0) == {"task_chunk": 1, "max_norm": 1.0}
    assert images.over_tasks(task_chunk=None) == {"task_chunk": None}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # a device that is missing here
    assert images.over_tasks() == {}


def test_a_constant_h_is_a_shared_alpha(learned):
    """An h without inputs has the hypergradient of the search in α. So has the initialization of the weights."""
    constant = nas.meta_architecture_search(SEARCH, predictors.mlp(SPACE, 0, num_hidden=0))
    alpha = {"cell": jnp.array([[0.3, -0.2, 0.5]])}
    own = {"alpha": alpha, "init": learned["init"]}
    task = TASKS[0]._replace(features=jnp.zeros(0))

    @jax.jit
    def both():
        start = {**constant.hyperparams(KEY), "init": learned["init"]}
        start["h"]["center"] = jnp.ravel(alpha["cell"])
        shared = constant.estimator.estimate(start, task, constant.estimator.init(KEY, start, task))[0]
        return shared, SEARCH.estimator.estimate(own, task, SEARCH.estimator.init(KEY, own, task))[0]

    shared, single = both()
    assert float(shared.value) == float(single.value)
    center = shared.hypergrad["h"]["center"]
    np.testing.assert_allclose(center, np.ravel(single.hypergrad["alpha"]["cell"]), rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, shared.hypergrad["init"], single.hypergrad["init"])
    assert np.abs(center).max() > 1e-3


def test_h_of_a_space_in_other_units_gives_alpha_in_natural_units():
    """α = default + scale · z, where z is the output of the predictor's network."""
    space = {"cell": spaces.real([[1.0, -2.0, 0.5]], 3.0, shape=(1, 3))}
    scaled = nas.meta_architecture_search(search_of(), predictors.mlp(space, 0, num_hidden=0))
    task = TASKS[0]._replace(features=jnp.zeros(0))
    weights = scaled.hyperparams(KEY)
    weights["h"]["center"] = jnp.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(scaled.alpha(weights, task)["cell"], [[1.3, -1.4, 1.4]], rtol=1e-12)


def test_h_with_a_spread_gives_the_center_and_is_not_trained(learned):
    wide = nas.meta_architecture_search(SEARCH, predictors.mlp(SPACE, 2, spread=0.5), num_steps=2)
    weights = {**learned, "h": wide.hyperparams(KEY)["h"] | learned["h"]}
    np.testing.assert_array_equal(wide.alpha(weights, TASKS[1])["cell"], META.alpha(learned, TASKS[1])["cell"])
    assert wide.genotype(weights, TASKS[1]) == META.genotype(learned, TASKS[1])
    tuned = jax.eval_shape(wide.fine_tune, KEY, weights, TASKS[1])
    assert tuned.alpha["cell"].shape == (1, 3)
    with pytest.raises(ValueError, match="`predictor` predicts a spread, which gets no gradient here. Create it"):
        wide.estimator.init(KEY, weights, TASKS[1])


def test_fine_tuning_starts_from_what_was_learned(learned):
    """Two alternations are two of DARTS's from α = h(t') and θ_0: written out by the inner steps."""
    loop, task = SEARCH.problem.loop, TASKS[1]

    @jax.jit
    def both():
        tuned = META.fine_tune(KEY, learned, task)
        alpha, state = META.alpha(learned, task), None
        for _ in range(2):
            hyperparams = {"alpha": alpha, "init": learned["init"]}
            state = loop.init(KEY, hyperparams, task.train) if state is None else state
            state = inner.step(loop, state, hyperparams, task.train)

            def ahead(alpha, state=state, hyperparams=hyperparams):
                hyperparams = {**hyperparams, "alpha": alpha}
                virtual = inner.step(loop, state, hyperparams, task.train)
                return SEARCH.problem.outer_loss(loop.params(virtual), hyperparams, task.valid, loop.context(virtual))

            alpha = jax.tree.map(lambda a, g: a - 0.1 * g, alpha, jax.grad(ahead)(alpha))
        return tuned, alpha, loop.params(state)

    tuned, alpha, params = both()
    np.testing.assert_allclose(tuned.alpha["cell"], alpha["cell"], rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), tuned.params, params)
    assert tuned.values.shape == (2,) and np.isfinite(tuned.values).all()


@pytest.mark.once
def test_learned_hyperparams_are_saved_with_their_start(learned, tmp_path):
    path = tmp_path / "h.npz"
    metaopt.save(path, nas.TrainedMetaArchitecture(META, learned))
    rebuilt = nas.meta_architecture_search(search_of(learn_init=True), predictors.mlp(SPACE, 2, num_hidden=2))
    loaded = metaopt.load(path, meta=rebuilt).hyperparams
    chex.assert_trees_all_equal(loaded, learned)
    assert [x.dtype for x in jax.tree.leaves(loaded)] == [x.dtype for x in jax.tree.leaves(learned)]
    assert rebuilt.genotype(loaded, TASKS[0]) == META.genotype(learned, TASKS[0])
    json.dumps(META.settings, allow_nan=False)
    alone = nas.meta_architecture_search(search_of(), predictors.mlp(SPACE, 2, num_hidden=2))
    other = nas.meta_architecture_search(search_of(learn_init=True), predictors.mlp(SPACE, 2, num_hidden=3))
    part = nas.TrainedMetaArchitecture(META, learned["h"])
    for call, message in (
        (lambda: metaopt.load(path, meta=alone), "h.npz does not describe .* unexpected arrays"),
        (lambda: metaopt.load(path, meta=other), "its `h` differs from that of this search"),
        (
            lambda: metaopt.save(path, part),
            "λ of this search has the shapes",
        ),
        # The predictor of h without the rest.
        (
            lambda: metaopt.save(path, predictors.TrainedPredictor(predictors.mlp(SPACE, 2, num_hidden=2), learned)),
            "`meta_params` must have the shapes",
        ),
        (lambda: metaopt.load(path), "holds a `TrainedMetaArchitecture`: `metaopt.load` needs `meta=`, the"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    metaopt.save(path, predictors.TrainedPredictor(predictors.mlp(SPACE, 2, num_hidden=2), learned["h"]))
    chex.assert_trees_all_equal(metaopt.load(path).meta_params, learned["h"])


def test_weights_and_genotypes_are_read_from_a_learned_start(learned):
    start = SEARCH.hyperparams(KEY)
    assert set(start) == {"alpha", "init"} and not set(search_of().hyperparams(KEY)) & {"alpha", "init"}
    alpha = {"cell": jnp.array([[0.0, 2.0, 1.0]])}
    assert SEARCH.genotype({**start, "alpha": alpha}) == {"cell": ((0, 1, "skip_connect"),)}
    # a* is where α is largest.
    predicted = META.alpha(learned, TASKS[0])["cell"]
    best = CELL.edges[0].ops[int(predicted.argmax())]
    kept = () if best == "none" else ((0, 1, best),)
    assert META.genotype(learned, TASKS[0]) == {"cell": kept}


def test_h_from_the_rows_of_images_themselves():
    """An embedding of the data is h's features: of images that are not square, without one mask of `to_task`."""

    def images(scale):
        x = scale * RNG.normal(size=(6, 3, 2, 1))
        return {"x": x, "y": np.arange(6) % 2, "class_mask": np.ones(2)}

    cell = nas.complete_cell(1, ("none", "skip_connect", "smooth"), preprocess=False)
    network = nas.Network({"cell": cell}, (nas.Layer("smooth", 2), nas.Layer("cell", 2)), 2)
    rule = lambda problem: hypergrad.unrolled(problem, num_steps=2)
    search = nas.architecture_search(network, (3, 2, 1), rule, ops=OPS, optimizer=lambda _: optax.sgd(0.5))
    meta = nas.meta_architecture_search(search, predictors.dataset_embedding(SPACE, width=3, num_hidden=2))
    few, many = (base.Task(images(scale), images(scale)) for scale in (1.0, 3.0))
    flat, unravel = jax.flatten_util.ravel_pytree(meta.hyperparams(KEY))
    flat += 0.5 * jax.random.normal(jax.random.key(1), flat.shape)
    alphas = [meta.alpha(unravel(flat), task)["cell"] for task in (few, many)]
    assert abs(alphas[0] - alphas[1]).max() > 1e-3
    turned = few._replace(train={**few.train, "x": few.train["x"][::-1], "y": few.train["y"][::-1]})
    np.testing.assert_allclose(meta.alpha(unravel(flat), turned)["cell"], alphas[0], rtol=1e-12)

    @jax.jit
    def estimate(flat):
        out, _ = meta.estimator.estimate(unravel(flat), few, meta.estimator.init(KEY, unravel(flat), few))
        return out.value, jax.flatten_util.ravel_pytree(out.hypergrad)[0]

    along = jax.random.normal(jax.random.key(2), flat.shape)
    slope = (estimate(flat + 1e-5 * along)[0] - estimate(flat - 1e-5 * along)[0]) / 2e-5
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(estimate(flat)[1] @ along, slope, rtol=1e-6)

    without = {key: few.train[key] for key in ("x", "y")}
    with pytest.raises(KeyError, match="class_mask"):
        meta.alpha(unravel(flat), base.Task(without, without))


def test_without_a_learned_start_the_weights_are_drawn():
    meta = nas.meta_architecture_search(search_of(), predictors.mlp(SPACE, 2, num_hidden=2))
    assert set(jax.eval_shape(meta.hyperparams, KEY)) == {"h"}
