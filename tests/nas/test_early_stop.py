"""Early stopping: the rule on lists, and the same in the state of an estimator, whose curvature is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.architecture.nas_bench_201 import stopping
from metaopt import base, hypergrad, inner, nas, training
from metaopt.nas import _early_stop, _relaxations


def test_the_rule():
    assert stopping.by_sharpness([1.0] * 30) is None
    # The mean of five is 1.4 at epoch 16, and 1 four epochs before.
    assert stopping.by_sharpness([1.0] * 15 + [2.0] * 5) == 12
    assert stopping.by_sharpness([1.0] * 15 + [2.0] * 5, factor=1.5) == 13
    # The growth is over before any epoch may stop.
    assert stopping.by_sharpness([1.0] * 2 + [2.0] * 30) is None
    assert stopping.by_sharpness([1.0, 1.0, 3.0], window=1, start=0, delta=1) == 1
    # The eigenvalue of largest size may be negative.
    assert stopping.by_sharpness([-1.0] * 30) is None
    assert stopping.by_sharpness([-1.0] * 15 + [-2.0] * 5) == 12


def test_the_rule_of_skips():
    assert stopping.by_skips([0, 1, 1, 2, 0, 3]) == 2
    assert stopping.by_skips([0, 1, 1, 2, 0, 3], max_skips=2) == 4
    assert stopping.by_skips([0, 1, 1, 2, 0, 3], max_skips=3) is None
    # What α was drawn as does not count.
    assert stopping.by_skips([5, 1, 2]) == 1
    assert stopping.by_skips([5, 2, 2, 0, 2], start=3) == 3


# f = c(t) |α|²/2, whose curvature in α is c(t) = 1 until step 7, and 1.5 times more at every step from then on.
LOOP = inner.loop(
    lambda params, alpha, batch: (params - alpha["cell"].sum()) ** 2, lambda hp: optax.sgd(0.1), init=lambda *a: 0.0
)
GROWING = inner.problem(
    LOOP,
    lambda params, alpha, batch, context: 1.5 ** jnp.maximum(context.step - 7.0, 0.0) * (alpha["cell"] ** 2).sum() / 2,
    with_context=True,
)
SETTINGS = {"every": 2, "window": 2, "start": 3, "delta": 1}
ALPHA = {"cell": jnp.array([1.0, -2.0, 0.5])}
TASK = base.Task(jnp.zeros(1), jnp.zeros(1))


@pytest.mark.once
def test_in_the_state_of_an_estimator():
    watched = hypergrad.lookahead(GROWING, num_steps=0)
    estimator = _early_stop.stopped_by_curvature(watched, GROWING, **SETTINGS)
    curvatures = []

    def callback(step, metrics):
        curvatures.append(metrics["curvature"])
        return metrics["stop"] > 0

    result = training.fit(
        training.learner(estimator, optax.sgd(0.01)),
        lambda key: TASK,
        hyperparams=ALPHA,
        num_steps=40,
        key=jax.random.key(0),
        callback=callback,
    )
    # By the rule on a list: curvature at epochs e is that at inner step 2 (e + 1).
    steps = np.arange(1, 41)
    expected = 1.5 ** np.maximum(steps - 7.0, 0)
    np.testing.assert_allclose(np.array(curvatures)[1::2], expected[: len(curvatures)][1::2], rtol=1e-6)
    assert np.isnan(curvatures[::2]).all()
    kept = stopping.by_sharpness(expected[1::2], **{k: v for k, v in SETTINGS.items() if k != "every"})
    assert kept == 3 and result.stopped == "callback" and len(curvatures) == 2 * (kept + 1 + SETTINGS["delta"])
    # α of that epoch, by the updates themselves.
    alpha = np.asarray(ALPHA["cell"])
    for t in range(2 * (kept + 1) - 1):
        alpha = alpha * (1 - 0.01 * expected[t])
    np.testing.assert_allclose(result.state.estimator_state.kept["cell"], alpha, rtol=1e-6)
    assert (abs(result.hyperparams["cell"]) < abs(alpha)).all()


@pytest.mark.once
def test_the_curvature_is_of_the_part_that_is_named():
    """Of λ = {"mine": {"cell", "other"}, "more"}, where f is much more curved in "other"."""
    outer = lambda params, own, batch, context: 3 * (own["cell"] ** 2).sum() + 50 * (own["cell"][0] + own["other"]) ** 2
    problem = GROWING._replace(outer_loss=outer)
    within = base.reparametrized(problem, lambda hp, step: hp["mine"])
    rule = hypergrad.lookahead(
        within._replace(outer_loss=lambda *a: within.outer_loss(*a) + a[1]["more"] ** 4), num_steps=0
    )
    hyperparams = {"mine": {**ALPHA, "other": jnp.array(1.0)}, "more": jnp.array(9.0)}
    parts = {"own": lambda hp: hp["mine"], "alpha": lambda own: {"cell": own["cell"]}}
    estimator = _early_stop.stopped_by_curvature(rule, problem, **SETTINGS | {"every": 1}, **parts)
    out, _ = estimator.estimate(hyperparams, TASK, estimator.init(jax.random.key(0), hyperparams, TASK))
    np.testing.assert_allclose(out.metrics["curvature"], 106.0, rtol=1e-6)  # with "other", 203


@pytest.mark.once
def test_the_stop_by_skips_of_an_estimator_is_the_rule_on_their_counts():
    """α moves by a constant step: a skip wins on the second edge at epoch 3, and on the first at 5."""
    cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    network = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), 2, keep=None)
    push = jnp.array([[0, 1, 0], [0, 1, 0], [0, 0, 1]])
    problem = GROWING._replace(outer_loss=lambda params, alpha, batch, context: -(push * alpha["cell"]).sum())
    start = {"cell": jnp.array([[0, -11.0, 0], [0, -7.0, 0], [0, 0, 0]])}
    alpha_at = lambda step: start["cell"] + (step - 1) * push  # that the estimate of a step, from 1, is given
    counts = [int((alpha_at(2 * (e + 1)).argmax(1) == 1).sum()) for e in range(10)]
    assert counts == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    rule = hypergrad.lookahead(problem, num_steps=0)
    for max_skips, expected in ((0, 3), (1, 5), (2, None)):
        assert stopping.by_skips(counts, max_skips=max_skips) == expected
        watched = _early_stop.stopped_by_skips(
            rule, lambda alpha: _early_stop.num_skips(network, alpha), every=2, max_skips=max_skips
        )
        result = training.fit(
            training.learner(watched, optax.sgd(1.0)),
            lambda key: TASK,
            hyperparams=start,
            num_steps=20,
            key=jax.random.key(0),
            callback=lambda step, metrics: metrics["stop"] > 0,
        )
        kept = result.state.estimator_state.kept["cell"]
        if expected is None:
            assert result.stopped == "num_steps" and list(result.history["skips"][1::2]) == counts
            # The α of the last estimate, since nothing has stopped.
            np.testing.assert_allclose(kept, alpha_at(20))
        else:
            assert len(result.history["skips"]) == 2 * (expected + 2)
            np.testing.assert_allclose(kept, alpha_at(2 * (expected + 1)))


@pytest.mark.parametrize("keep", [1, 2, None])
def test_traced_weights_are_decoded_like_concrete_ones(keep):
    """And the kind with the most skips counts."""
    rng = np.random.default_rng(0)
    network = nas.darts_space(num_cells=3, num_nodes=3, primitives=("none", "skip_connect", "sep_conv_3x3"))
    network = network._replace(keep=keep)
    decode = jax.jit(
        lambda weights: (_relaxations.discretized(network, weights), _early_stop.num_skips(network, weights))
    )
    for _ in range(5):
        weights = {kind: rng.integers(0, 4, size=(9, 3)) / 4 for kind in network.cells}  # with ties
        genotype = nas.derive_genotype(network, weights)
        decoded, num = decode(weights)
        jax.tree.map(np.testing.assert_array_equal, decoded, nas.one_hot(network, genotype))
        assert num == max(sum(op == "skip_connect" for _, _, op in edges) for edges in genotype.values())


@pytest.mark.slow
def test_it_changes_no_estimate_and_keeps_the_state():
    watched = hypergrad.lookahead(GROWING, num_steps=0)
    estimator = _early_stop.stopped_by_curvature(watched, GROWING, **SETTINGS)
    state = estimator.init(jax.random.key(0), ALPHA, TASK)
    out, after = jax.jit(estimator.estimate)(ALPHA, TASK, state)
    plain, _ = watched.estimate(ALPHA, TASK, state.estimator)
    np.testing.assert_allclose(out.hypergrad["cell"], plain.hypergrad["cell"])
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(after) == types(state) and (after.kept["cell"] == ALPHA["cell"]).all()
    # Over tasks.
    over = hypergrad.over_tasks(estimator)
    tasks = jax.tree.map(lambda x: jnp.stack([x, x]), TASK)
    shapes = jax.eval_shape(lambda key: over.estimate(ALPHA, tasks, over.init(key, ALPHA, tasks))[0], jax.random.key(0))
    assert shapes.hypergrad["cell"].shape == (3,)
