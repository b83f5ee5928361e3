"""Networks that map a task to λ: where they start, what does not change them, the chain rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.test_util import check_grads

from metaopt import _row_embedding, base, hypergrad, predictors, spaces
from metaopt.predictors import _networks

KEY = jax.random.key(0)
SPACE = {
    "rate": spaces.interval(1e-3, 1.0, log=True),
    "penalty": spaces.positive(0.1, shape=(2,)),
    "mix": spaces.simplex(3),
    "held": spaces.fixed(0.5),
}
START = {"rate": jnp.array(0.03), "penalty": jnp.array([0.2, 0.5]), "mix": jnp.array([0.5, 0.3, 0.2]), "held": 0.5}


def table(seed=0, rows=12, columns=3, classes=3):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, columns)),
        "y": rng.permutation(np.arange(rows) % classes),
        "mask": np.ones(rows),
        "feature_mask": np.ones(columns),
        "class_mask": np.ones(classes),
    }


def task(seed=0, **options):
    return base.Task(jax.tree.map(jnp.asarray, table(seed, **options)), None, jnp.array([0.3, -1.2]) * (seed + 1))


MAKE = {
    "mlp": lambda **options: predictors.mlp(SPACE, 2, **options),
    "dataset_embedding": lambda **options: predictors.dataset_embedding(SPACE, width=5, num_hidden=4, **options),
    "embedding_and_features": lambda **options: predictors.dataset_embedding(SPACE, num_features=2, width=5, **options),
    "ensemble": lambda **options: predictors.ensemble(predictors.mlp(SPACE, 2, **options), 3),
    "limited": lambda **options: predictors.mlp(SPACE, 2, limit=0.5, **options),
    "limited_embedding": lambda **options: predictors.dataset_embedding(
        SPACE, num_features=2, width=5, limit=0.5, **options
    ),
}
LIMITED = {  # a function of the limit, and the weights' head
    "mlp": (lambda limit: predictors.mlp(SPACE, 2, limit=limit), lambda phi: phi),
    "embedding": (lambda limit: predictors.dataset_embedding(SPACE, num_features=2, limit=limit), lambda p: p["head"]),
    "ensemble": (lambda limit: predictors.ensemble(predictors.mlp(SPACE, 2, limit=limit), 3), lambda phi: phi),
}


def random_weights(predictor, scale=0.5):
    params = predictor.init(KEY)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, params, structure.unflatten(noise))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.once
def test_starts_at_one_given_lambda_for_every_task(name):
    for start, options in ((START, {"hyperparams": START}), (spaces.default(SPACE), {})):
        predictor = MAKE[name](**options)
        for seed in range(3):
            lam = spaces.to_constrained(SPACE, predictor.apply(predictor.init(KEY), task(seed)))
            chex.assert_trees_all_close(lam, jax.tree.map(jnp.asarray, start), rtol=1e-10)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.once
def test_predictions_with_random_weights_differ_between_tasks(name):
    predictor = MAKE[name]()
    phi = random_weights(predictor)
    a, b = (predictor.apply(phi, task(seed)) for seed in range(2))
    assert a.coordinates["held"] is None
    assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_every_predictor_has_a_row():
    assert set(_networks._FACTORIES) <= set(MAKE)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.once
def test_at_the_start_every_output_has_a_gradient_that_depends_on_the_task(name):
    predictor = MAKE[name]()
    phi = predictor.init(KEY)
    outputs = lambda phi, seed: jnp.concatenate([z.ravel() for z in jax.tree.leaves(predictor.apply(phi, task(seed)))])
    gradients = [jax.tree.leaves(jax.jacrev(outputs)(phi, seed)) for seed in range(2)]
    differs = [np.abs(x - y).reshape(len(x), -1).max(1) > 0 for x, y in zip(*gradients, strict=True)]
    assert np.any(differs, axis=0).all()
    head = phi.get("head", phi)
    for part in ("linear", "out"):  # of networks: both parts of the head learn
        if part in head:
            sums = jax.grad(lambda phi: outputs(phi, 0).sum())(phi)
            assert (jnp.abs(sums.get("head", sums)[part]).max(-2) > 0).all()


@pytest.mark.once
def test_an_ensemble_predicts_the_mean_of_its_members():
    member = MAKE["mlp"]()
    predictor = predictors.ensemble(member, 3)
    phi = random_weights(predictor)
    each = [member.apply(jax.tree.map(lambda x, m=m: x[m], phi), task()) for m in range(3)]
    mean = jax.tree.map(lambda *zs: sum(zs) / 3, *each)
    chex.assert_trees_all_close(predictor.apply(phi, task()), mean, rtol=1e-12)
    # Members start from different weights.
    hidden = predictor.init(KEY)["hidden"]
    assert (hidden[0] != hidden[1]).all()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.once
def test_tasks_batch(name):
    predictor = MAKE[name]()
    phi = random_weights(predictor)
    tasks = [task(seed) for seed in range(3)]
    batched = jax.jit(jax.vmap(predictor.apply, (None, 0)))(phi, problems.stack(tasks))
    expected = problems.stack([predictor.apply(phi, one) for one in tasks])
    chex.assert_trees_all_close(batched, expected, rtol=1e-10)


@pytest.mark.parametrize("axis", ["rows", "columns", "classes", "padding"])
@pytest.mark.once
def test_the_embedding_does_not_change(axis):
    predictor = MAKE["embedding_and_features"]()
    phi = random_weights(predictor)
    data = table(rows=11)
    changed = dict(data)
    rng = np.random.default_rng(3)
    if axis == "rows":
        order = rng.permutation(11)
        changed |= {name: data[name][order] for name in ("x", "y", "mask")}
    elif axis == "columns":
        changed["x"] = data["x"][:, [2, 0, 1]]
    elif axis == "classes":
        changed["y"] = np.array([1, 2, 0])[data["y"]]
    else:
        changed = {
            "x": np.pad(data["x"], ((0, 4), (0, 2)), constant_values=7.0),
            "y": np.pad(data["y"], (0, 4)),
            "mask": np.pad(data["mask"], (0, 4)),
            "feature_mask": np.pad(data["feature_mask"], (0, 2)),
            "class_mask": np.pad(data["class_mask"], (0, 3)),
        }

    def apply(data):
        return predictor.apply(phi, base.Task(jax.tree.map(jnp.asarray, data), None, jnp.ones(2)))

    chex.assert_trees_all_close(apply(changed), apply(data), rtol=1e-10)
    other = {**data, "y": np.roll(data["y"], 1)}
    assert np.abs(apply(other).coordinates["rate"] - apply(data).coordinates["rate"]) > 1e-6


def test_the_embedding_by_hand():
    """Its formula in NumPy, class by class and column by column. Labels of padded rows may be anything."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape)), _row_embedding.init_embedding(KEY, 4))
    data = table(rows=8, columns=3, classes=2)
    data |= {"mask": np.arange(8) < 6.0, "feature_mask": np.array([1.0, 1.0, 0.0])}
    data["y"][6:] = 99
    entry, pair, expected = params["entry"], params["pair"], np.zeros(4)
    entries = lambda rows, d: np.maximum(data["x"][rows][:, [d]] * entry["w"] + entry["b"], 0).mean(0)  # [W]
    real = data["mask"] > 0
    for c, d in ((c, d) for c in range(2) for d in range(2)):
        member = real & (data["y"] == c)
        share = member.sum() / real.sum()
        s = np.concatenate([entries(member, d), entries(real, d), [share]]) @ pair["w"] + pair["b"]
        expected += share * np.maximum(s, 0) @ params["embedding"] / 2
    data["mask"] = data["mask"].astype(float)
    np.testing.assert_allclose(_row_embedding.embed_rows(params, data), expected, rtol=1e-12)


@pytest.mark.once
def test_the_embedding_reads_no_more_than_max_rows():
    predictor = MAKE["dataset_embedding"](max_rows=5)
    phi = random_weights(predictor)
    data = table()
    changed = {**data, "x": np.concatenate([data["x"][:5], data["x"][5:] + 1])}
    a, b = (predictor.apply(phi, base.Task(jax.tree.map(jnp.asarray, d), None)) for d in (data, changed))
    chex.assert_trees_all_equal(a, b)
    # The first real ones, wherever they stand.
    before = {name: np.concatenate([np.ones_like(data[name]), data[name]]) for name in ("x", "y", "mask")}
    before["mask"][: len(data["mask"])] = 0
    late = predictor.apply(phi, base.Task(jax.tree.map(jnp.asarray, {**data, **before}), None))
    chex.assert_trees_all_equal(a, late)


def test_the_embedding_of_labels_of_few_bits_beside_more_classes_than_they_hold():
    predictor = MAKE["dataset_embedding"]()
    phi, data = random_weights(predictor), table() | {"class_mask": np.ones(260)}
    narrow = data | {"y": data["y"].astype(np.uint8)}
    a, b = (predictor.apply(phi, base.Task(jax.tree.map(jnp.asarray, d), None)) for d in (data, narrow))
    chex.assert_trees_all_equal(a, b)


def flat(predictor, phi, features):
    """z as one vector."""
    z = predictor.apply(phi, task()._replace(features=jnp.asarray(features)))
    return jax.flatten_util.ravel_pytree(z)[0]


@pytest.mark.optimized
@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.once
def test_a_limit_changes_nothing_within_it_to_the_bit(name, x64):
    make, _ = LIMITED[name]
    with jax.enable_x64(x64):
        free, limited = make(None), make(2.0)
        phi = random_weights(free)

        @jax.jit
        def value_and_pullback(phi, features):
            values, pullback = zip(
                *(jax.vjp(lambda p, g=g: flat(g, p, features), phi) for g in (free, limited)), strict=True
            )
            return values, [pull(jnp.ones_like(values[0])) for pull in pullback]

        for features in ([0.3, -1.2], [2.0, -2.0], [0.0, 1.9999]):
            values, pulled = value_and_pullback(phi, jnp.array(features))
            chex.assert_trees_all_equal(*values)
            chex.assert_trees_all_equal(*pulled)
            chex.assert_trees_all_equal(flat(free, phi, features), flat(limited, phi, features))


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.once
def test_beyond_the_limit_predictions_return_to_the_start(name):
    make, head = LIMITED[name]
    free, limited = make(None), make(2.0)
    phi = random_weights(free)
    start = head(phi)["center"].reshape(-1, head(phi)["center"].shape[-1]).mean(0)
    distance = jax.jit(lambda x: jnp.linalg.norm(flat(limited, phi, x) - start))
    for direction in ([1.0, -1.0], [0.0, 1.0], [-1.0, 0.0]):
        distances = np.stack([distance(2.0 * scale * np.array(direction)) for scale in np.geomspace(1.0, 1e5, 50)])
        assert (np.diff(distances) < 0).all() and distances[-1] < 1e-6 < 1e-1 < distances[0]
    for beyond in ([1e30, 0.0], [-np.inf, np.inf]):
        np.testing.assert_allclose(flat(limited, phi, beyond), start, rtol=1e-12)
    # By hand: the first feature is 1.5 limits away, so its excess is 1/2.
    weight = 1 / (1 + (0.5**2 + 0) / 2)
    expected = start + weight * (flat(free, phi, [2.0, -0.7]) - start)
    np.testing.assert_allclose(flat(limited, phi, [3.0, -0.7]), expected, rtol=1e-12)


@pytest.mark.once
def test_a_limit_is_differentiable():
    predictor = LIMITED["mlp"][0](2.0)
    phi = random_weights(predictor)
    coordinates = jax.jit(lambda phi, x: flat(predictor, phi, x))
    for features in ([3.0, -0.7], [5.0, -9.0]):
        check_grads(coordinates, (phi, jnp.array(features)), order=2, rtol=1e-5)
    steps = jnp.array([-1e-6, 1e-6])
    slope = jax.vmap(jax.jacfwd(lambda step: flat(predictor, phi, jnp.array([2.0, 7.0]).at[1].add(step))))(steps)
    chex.assert_trees_all_close(slope[0], slope[1], rtol=1e-4)


@pytest.mark.parametrize("num_hidden", [0, 3])
@pytest.mark.once
def test_amortize_is_the_chain_rule(num_hidden):
    space = {"log_penalty": spaces.real(-1.0, shape=(problems.NUM_FEATURES,))}
    predictor = predictors.mlp(space, 2, num_hidden=num_hidden)
    phi = random_weights(predictor)
    estimator = hypergrad.unrolled(spaces.constrain(problems.RIDGE, space), num_steps=4)
    amortized = predictors.amortize(estimator, predictor)
    assert amortized.kind == "exact"
    state = amortized.init(KEY, phi, problems.TASK)
    estimate, _ = jax.jit(amortized.estimate)(phi, problems.TASK, state)
    in_lambda = hypergrad.unrolled(problems.RIDGE, num_steps=4)
    lam = lambda phi: spaces.to_constrained(space, predictor.apply(phi, problems.TASK))
    plain, _ = jax.jit(in_lambda.estimate)(lam(phi), problems.TASK, state)
    jacobian = jax.jacfwd(lambda phi: lam(phi)["log_penalty"])(phi)
    expected = jax.tree.map(lambda j: jnp.tensordot(plain.hypergrad["log_penalty"], j, 1), jacobian)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), (plain.value, expected), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.once
def test_float32_stays_float32(name):
    with jax.enable_x64(False):
        predictor = MAKE[name]()
        one = jax.tree.map(lambda x: np.asarray(x, np.float32 if x.dtype == float else np.int32), task())
        phi = predictor.init(KEY)
        z = jax.jit(predictor.apply)(phi, one)
        assert {leaf.dtype for leaf in jax.tree.leaves((phi, z))} == {np.dtype(np.float32)}
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((phi, z)))
