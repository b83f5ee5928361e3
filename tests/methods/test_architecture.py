"""Searches: the α-hypergradient of every exact one against finite differences, and what each adds to DARTS."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, hypergrad, inner, methods, nas, training

KEY = jax.random.key(0)


def smooth(params, x, channels, stride):
    return jnp.tanh(x @ params["w"])


# No normalization, whose weights have no length at rest, and no kinks.
OPS = {
    **nas.BLOCKS,
    "smooth": nas.Op(lambda key, shape, c, stride: {"w": nas.uniform(key, (shape[-1], c), shape[-1])}, smooth),
}
CELL = nas.complete_cell(2, ("none", "skip_connect", "smooth"), preprocess=False)
NET = nas.Network({"cell": CELL}, (nas.Layer("smooth", 4), nas.Layer("cell", 4)), 2)
RNG = np.random.default_rng(0)


def rows(num):
    x = RNG.normal(size=(num, 3))
    return {"x": jnp.asarray(x), "y": jnp.asarray((x[:, 0] * x[:, 1] > 0).astype(np.int32))}


TASK = base.Task(rows(9), rows(8))


def sgd(hyperparams):
    return optax.chain(optax.add_decayed_weights(0.03), optax.sgd(0.3, momentum=0.5))


FIRST = {
    "darts": lambda **o: methods.darts(NET, (3,), ops=OPS, order="first", optimizer=sgd, **o),
    "pc_darts": lambda **o: methods.pc_darts(NET, (3,), ops=OPS, partial=2, optimizer=sgd, **o),
    "darts_minus": lambda **o: methods.darts_minus(NET, (3,), ops=OPS, num_steps=10, optimizer=sgd, **o),
    "beta_darts": lambda **o: methods.beta_darts(NET, (3,), ops=OPS, num_steps=10, penalty=2.0, optimizer=sgd, **o),
    "gumbel": lambda **o: methods.darts(
        NET, (3,), ops=OPS, order="first", optimizer=sgd, relaxation=nas.gumbel_softmax(1.0, hard=False), **o
    ),
}
EXACT = {
    "darts": lambda: methods.darts(NET, (3,), ops=OPS, order="exact", optimizer=sgd),
    "pc_darts": lambda: FIRST["pc_darts"](order="exact"),
    "darts_minus": lambda: FIRST["darts_minus"](order="exact"),
}


def alpha_of(search):
    key = jax.random.key(5)
    return jax.tree.map(lambda a: a + 0.5 * jax.random.normal(key, a.shape), search.hyperparams(KEY))


def differences(function, at, epsilon=1e-5):
    """Central differences of a scalar function, one compiled program for all."""
    flat, unravel = jax.flatten_util.ravel_pytree(at)
    ends = jnp.concatenate([flat + s * epsilon * jnp.eye(len(flat)) for s in (1, -1)])
    values = np.asarray(jax.jit(jax.lax.map, static_argnums=0)(lambda x: function(unravel(x)), ends))
    ahead, behind = np.split(values, 2)
    return (ahead - behind) / (2 * epsilon)


def close(hypergrad, expected, rtol):
    found = jax.flatten_util.ravel_pytree(hypergrad)[0]
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


@pytest.mark.parametrize(("make", "ahead"), [(m, 0) for m in FIRST.values()] + [(m, 1) for m in EXACT.values()])
def test_one_step_searches_against_finite_differences(make, ahead):
    search = make()
    loop, alpha = search.problem.loop, alpha_of(search)
    state = search.estimator.init(KEY, alpha, TASK)
    estimate, after = jax.jit(search.estimator.estimate)(alpha, TASK, state)

    def objective(alpha):
        state = after.inner  # committed
        for _ in range(ahead):
            state = inner.step(loop, state, alpha, TASK.train)
        return search.problem.outer_loss(loop.params(state), alpha, TASK.valid, loop.context(state))

    close(estimate.hypergrad, differences(objective, alpha), 1e-6)
    # The committed step is one step of training.
    assert int(loop.context(after.inner).step) == 1


def test_second_order_is_the_exact_one_up_to_its_differences():
    exact = EXACT["darts"]()
    second = methods.darts(NET, (3,), ops=OPS, epsilon=1e-3, optimizer=sgd)
    alpha = alpha_of(exact)
    found = [
        jax.jit(s.estimator.estimate)(alpha, TASK, s.estimator.init(KEY, alpha, TASK))[0].hypergrad["cell"]
        for s in (second, exact)
    ]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-8)


def test_unrolled_against_finite_differences_and_one_step_of_it_is_lookahead():
    search = methods.unrolled_darts(NET, (3,), ops=OPS, num_steps=6, optimizer=sgd)
    alpha = alpha_of(search)
    estimate = jax.jit(search.estimator.estimate)(alpha, TASK, KEY)[0]
    value = lambda alpha: search.estimator.estimate(alpha, TASK, KEY)[0].value
    close(estimate.hypergrad, differences(value, alpha), 1e-6)
    one = hypergrad.unrolled(search.problem, num_steps=1)
    lookahead = hypergrad.lookahead(search.problem, commit=0, num_steps=1)
    state = search.problem.loop.init(jax.random.split(jax.random.split(KEY)[0])[0], alpha, TASK.train)
    start = lookahead.init(KEY, alpha, TASK)._replace(inner=state)
    found = [jax.jit(e.estimate)(alpha, TASK, s)[0].hypergrad["cell"] for e, s in ((one, KEY), (lookahead, start))]
    np.testing.assert_allclose(*found, rtol=1e-10)


def test_implicit_where_the_weights_rest():
    solver = hypergrad.dense()
    search = methods.implicit_darts(NET, (3,), ops=OPS, num_steps=6_000, solver=solver, optimizer=sgd)
    alpha = alpha_of(search)
    state = search.estimator.init(KEY, alpha, TASK)
    estimate, after = jax.jit(search.estimator.estimate)(alpha, TASK, state)
    assert estimate.metrics["inner_grad_norm"] < 1e-9

    def value(alpha):
        trained = jax.lax.fori_loop(
            0, 6_000, lambda _, s: inner.step(search.problem.loop, s, alpha, TASK.train), after.inner
        )
        context = search.problem.loop.context(trained)
        return search.problem.outer_loss(trained.params, alpha, TASK.valid, context)

    close(estimate.hypergrad, differences(value, alpha), 1e-5)


def test_gdas_trains_the_sampled_ops_alone_and_draws_anew():
    search = methods.gdas(NET, (3,), ops=OPS, num_steps=20, optimizer=lambda hp: optax.sgd(0.1))
    alpha = alpha_of(search)
    estimate = jax.jit(search.estimator.estimate)
    state = search.estimator.init(KEY, alpha, TASK)
    start = state.inner.params["layers"][1]["edges"][0][2]["w"][0]
    moved, grads = [], []
    for _ in range(12):
        before = state.inner.params["layers"][1]["edges"][0][2]["w"][0]
        out, state = estimate(alpha, TASK, state)
        moved.append(abs(state.inner.params["layers"][1]["edges"][0][2]["w"][0] - before).max((-1, -2)) > 0)
        grads.append(abs(out.hypergrad["cell"]) > 0)
    moved = np.stack(moved)
    assert start.shape == (3, 4, 4) and 0 < moved.mean() < 1 and len(np.unique(moved, axis=0)) > 2
    assert search.weights(alpha)["cell"].sum(-1) == pytest.approx(np.ones(3))  # read without noise


def test_partial_searches_have_weights_for_edges():
    search = FIRST["pc_darts"]()
    alpha = search.hyperparams(KEY)
    assert {name: a.shape for name, a in alpha["cell"].items()} == {"ops": (3, 3), "edges": (3,)}
    weights = search.weights(alpha)["cell"]
    np.testing.assert_allclose(weights.sum(-1), [1, 0.5, 0.5], rtol=1e-9)
    assert len(search.genotype(alpha)["cell"]) == 3


def test_the_schedules_follow_the_inner_steps():
    minus, beta = FIRST["darts_minus"](), FIRST["beta_darts"]()
    alpha = alpha_of(minus)
    params = minus.supernet.init(KEY)

    def outer(search, step):
        return float(search.problem.outer_loss(params, alpha, TASK.valid, base.Context(KEY, jnp.array(step))))

    plain = outer(FIRST["darts"](), 0)
    np.testing.assert_allclose(outer(minus, 10), plain, rtol=1e-6)
    assert abs(outer(minus, 0) - plain) > 1e-3
    np.testing.assert_allclose(outer(beta, 5), plain + 1.0 * nas.beta_decay(alpha), rtol=1e-6)


def test_the_same_seed_finds_the_same_alpha_and_learns():
    search = methods.robust_darts(NET, (3,), ops=OPS, every=5, window=2, start=1, delta=1, order="exact", optimizer=sgd)

    def fit():
        return training.fit(
            training.learner(search.estimator, optax.adam(0.1)),
            lambda key: TASK,
            hyperparams=search.hyperparams(KEY),
            num_steps=30,
            key=KEY,
        )

    first, second = fit(), fit()
    np.testing.assert_array_equal(first.hyperparams["cell"], second.hyperparams["cell"])
    assert first.history["value"][-1] < first.history["value"][0]
    assert np.isfinite(first.history["curvature"]).sum() == 6
    assert first.state.estimator_state.kept["cell"].shape == (3, 3)
    nas.discrete(NET, search.genotype(first.hyperparams))


def test_single_path_one_shot():
    one_shot = methods.single_path_one_shot(NET, (3,), ops=OPS, num_steps=60, optimizer=sgd)
    params = jax.jit(one_shot.train)(KEY, TASK.train)
    empty = {"cell": ()}
    full = {"cell": ((0, 1, "smooth"), (0, 2, "skip_connect"), (1, 2, "smooth"))}
    scores = [float(one_shot.score(params, genotype, TASK.train)) for genotype in (full, empty)]
    assert scores[0] < scores[1] - 0.02  # nothing arrives at the output of the second
    small = nas.supernet(nas.discrete(NET, full), (3,), ops=OPS)
    inherited = one_shot.supernet.inherit(params, full)
    outputs = jax.jit(small.apply)(inherited, None, TASK.train["x"])
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, TASK.train["y"]).mean()
    np.testing.assert_allclose(scores[0], expected, rtol=1e-9)


def test_bad_order():
    with pytest.raises(ValueError, match="`order` must be one of first, second, exact; got 'third'"):
        methods.darts(NET, (3,), ops=OPS, order="third")
