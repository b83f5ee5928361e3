"""Searches: how genotypes are decoded, settings, checkpoints, padding and labels."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_search import KEY, NET, ONE, OPS, TASK, alpha_of, close, estimate_of, search_of, sgd

from metaopt import base, hypergrad, nas, training
from metaopt.nas import _derivation, _nas_bench_101, _relaxations, _specs

SCHEDULED = (nas.gdas, nas.darts_minus, nas.beta_darts, nas.unrolled_darts)


def test_partial_searches_have_weights_for_edges():
    search = search_of(nas.pc_darts, partial=2)
    alpha = search.hyperparams(KEY)
    assert {name: a.shape for name, a in alpha["cell"].items()} == {"ops": (3, 3), "edges": (3,)}
    weights = search.weights(alpha)["cell"]
    np.testing.assert_allclose(weights.sum(-1), [1, 0.5, 0.5], rtol=1e-9)
    assert len(search.genotype(alpha)["cell"]) == 3


def test_the_weights_of_edges_multiply_those_of_any_relaxation():
    search = search_of(nas.pc_darts, partial=2, relaxation=nas.sigmoid())
    ops, edges = np.random.default_rng(0).normal(size=(3, 3)), np.array([5.0, 1.0, 2.0])
    weights = search.weights({"cell": {"ops": jnp.asarray(ops), "edges": jnp.asarray(edges)}})["cell"]
    shares = np.array([1.0, 1 / (1 + np.e), np.e / (1 + np.e)])  # the second and the third edge lead to one node
    np.testing.assert_allclose(weights, shares[:, None] / (1 + np.exp(-ops)), rtol=1e-9)


@pytest.mark.slow
def test_the_same_seed_finds_the_same_alpha_killed_or_not(tmp_path):
    search = search_of(nas.robust_darts, every=5, window=2, start=1, delta=1)
    learner = training.learner(search.estimator, optax.adam(0.1))
    start = search.hyperparams(KEY)

    def fit(num_steps=30, **options):
        return training.fit(learner, lambda key: TASK, hyperparams=start, num_steps=num_steps, key=KEY, **options)

    first, second = fit(), fit()
    np.testing.assert_array_equal(first.hyperparams["cell"], second.hyperparams["cell"])
    assert first.history["value"][-1] < first.history["value"][0]
    fit(13, checkpoint_dir=tmp_path)
    resumed = fit(checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(first.hyperparams["cell"], resumed.hyperparams["cell"])
    np.testing.assert_array_equal(first.history["curvature"], resumed.history["curvature"])
    assert np.isfinite(first.history["curvature"]).sum() == 6
    nas.discrete(NET, search.genotype(search.selected_alpha(first)))


def fitted(search, num_steps, **options):
    learner = training.learner(search.estimator, optax.adam(0.3))
    start = search.hyperparams(KEY)
    return training.fit(
        learner, lambda key: TASK, hyperparams=start, num_steps=num_steps, key=KEY, settings=search.settings, **options
    )


@pytest.mark.once
def test_robust_darts_returns_the_alpha_before_its_stop():
    """Every epoch is too sharp: it stops at the first two means, and goes back to the α that it started at."""
    search = search_of(nas.robust_darts, every=1, window=1, start=1, delta=1, factor=1e-9)
    result = fitted(search, 9, callback=lambda step, metrics: metrics["stop"] > 0)
    assert result.stopped == "callback" and len(result.history["stop"]) == 2
    np.testing.assert_allclose(search.selected_alpha(result)["cell"], search.hyperparams(KEY)["cell"], rtol=1e-6)
    assert np.abs(search.selected_alpha(result)["cell"] - result.hyperparams["cell"]).max() > 0.1
    assert search_of(nas.darts, order="first").selected_alpha(result) is result.hyperparams


@pytest.mark.once
def test_darts_plus_counts_the_search_s_own_cell():
    """With `keep=1` an edge is left into each of two nodes; under a budget λ is another tree."""
    alpha = {"cell": jnp.array([[0.0, 5.0, 0.0], [0.0, 4.0, 0.0], [0.0, 1.0, 5.0]])}
    search = nas.darts_plus(NET, (3,), ops=OPS, every=1, keep=1)
    table = nas.CostTable(1.0, (nas.CostTerm((("cell", 0),), np.arange(3.0)),), "s")
    for method, hyperparams in (
        (search_of(nas.darts_plus, every=1), alpha),  # keeps two: both skips
        (nas.under_budget(search, table, budget=1.0), {"hyperparams": alpha, "multiplier": jnp.array(0.0)}),
    ):
        estimate, state = estimate_of(method, hyperparams)
        assert estimate.metrics["skips"] == (2 if hyperparams is alpha else 1) and estimate.metrics["stop"] == 0
        jax.tree.map(np.testing.assert_array_equal, state.kept, hyperparams)


@pytest.mark.once
def test_a_checkpoint_of_another_search_is_rejected(tmp_path):
    first_order = lambda **more: search_of(nas.darts, network=ONE, order="first", **more)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    first = fitted(first_order(), 1, **options)
    for other, name in [
        (first_order(relaxation=nas.sigmoid()), "relaxation"),
        (search_of(nas.darts_minus, network=ONE, num_steps=10), "method"),
    ]:
        with pytest.raises(ValueError, match=rf"`settings\['{name}'\].*` is .* in the checkpoint and .* in this run"):
            fitted(other, 2, **options)
    continued = fitted(first_order(), 1, **options)  # another object with the same settings
    np.testing.assert_array_equal(continued.hyperparams["cell"], first.hyperparams["cell"])


@pytest.mark.once
def test_settings_tell_searches_apart_and_are_json():
    @dataclasses.dataclass
    class Weighted:
        factor: float
        later: object = dataclasses.field(init=False)  # not assigned

        def __call__(self, outputs, batch):
            return self.factor * outputs.mean()

        method = __call__

        @jax.jit
        def jitted(self, outputs, batch):
            return self.factor * outputs.sum()

    def own(rate):
        return lambda hyperparams: optax.sgd(rate)

    def scaled(factor):
        return lambda outputs, batch: factor * outputs.mean()

    table = nas.CostTable(1.0, (nas.CostTerm((("cell", 0),), np.arange(3.0)),), "s")
    one, plain = np.arange(3.0) + 1, search_of(nas.darts)
    searches = [
        search_of(nas.darts, order="first"),
        plain,
        search_of(nas.darts, epsilon=0.02),
        search_of(nas.gdas, num_steps=9),
        search_of(nas.darts, relaxation=nas.softmax(2.0)),
        search_of(nas.darts, relaxation=nas.softmax(optax.linear_schedule(1.0, 0.1, 9))),
        search_of(nas.darts, relaxation=nas.softmax(optax.linear_schedule(1.0, 0.2, 9))),
        search_of(nas.darts, optimizer=own(0.1)),
        search_of(nas.darts, optimizer=own(0.2)),
        search_of(nas.single_path_one_shot, num_steps=9),
        nas.darts(NET._replace(num_outputs=np.int64(3)), (3,), ops=OPS),
        search_of(nas.darts, loss=jax.jit(scaled(1.0))),
        search_of(nas.darts, loss=jax.jit(scaled(2.0))),
        *(nas.under_budget(plain, table, budget=b) for b in (2.0, jnp.array(3.0))),
        *(
            nas.under_budget(nas.under_budget(plain, table, budget=a), table, budget=b)
            for a, b in ((2.0, 3.0), (4.0, 3.0), (2.0, 4.0))
        ),
        # Defaults, keywords among them; methods and dataclasses.
        *(search_of(nas.darts, loss=lambda outputs, batch, w=w: w * outputs.mean()) for w in (1.0, 2.0)),
        *(search_of(nas.darts, loss=lambda outputs, batch, *, w=w: w * outputs.mean()) for w in (1.0, 2.0)),
        *(search_of(nas.darts, loss=Weighted(w).method) for w in (1.0, 2.0)),
        *(search_of(nas.darts, loss=Weighted(w).jitted) for w in (1.0, 2.0)),
        *(search_of(nas.darts, loss=Weighted(w)) for w in (1.0, 2.0)),
        # A penalty within β-DARTS' own; tables that differ in one number.
        *(
            search_of(nas.beta_darts, num_steps=9, penalty=nas.resource_penalty(t, NET, weight=1.0, target=2.0))
            for t in (table, table._replace(fixed=2.0), table._replace(terms=(table.terms[0]._replace(values=one),)))
        ),
    ]
    texts = [json.dumps(search.settings, allow_nan=False) for search in searches]
    assert len(set(texts)) == len(searches) and "0x" not in "".join(texts)
    assert searches[3].settings["method"] == "gdas" and _specs.network_from_dict(searches[0].settings["network"]) == NET
    for same in (
        search_of(nas.darts, order="first", keep="space"),
        search_of(nas.darts, order="first", keep=NET.keep, epsilon=0.01, partial=1),
        search_of(nas.darts, order="first", relaxation=nas.softmax(), decode=nas.softmax(1.0)),
        search_of(nas.darts, order="first", relaxation=None, penalty=None),
        nas.darts(NET._replace(keep=1), (3,), ops=OPS, optimizer=sgd, decay=0.03, order="first", keep=NET.keep),
    ):
        assert same.settings == searches[0].settings  # defaults that are written out
    explicit = search_of(nas.gdas, num_steps=9, single_path=True, order="first", edge_weights=False)
    assert explicit.settings == searches[3].settings
    later = []

    def not_yet(hyperparams):
        return unassigned, later

    assert "not_yet" in str(search_of(nas.darts, sampler=not_yet).settings["sampler"])
    unassigned = 1


@pytest.mark.slow
def test_single_path_one_shot():
    one_shot = search_of(nas.single_path_one_shot, num_steps=60, decay=0.0)
    params = jax.jit(one_shot.train)(KEY, TASK.train)
    # The same training step by step, which can be stopped and goes on.
    first = jax.random.split(KEY)[0]
    repeated, _ = nas.train_loop(one_shot.loop, TASK.train, num_steps=60, key=KEY, hyperparams=one_shot.hyperparams)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        repeated.params,
        jax.jit(one_shot.train)(first, TASK.train),
    )
    empty = {"cell": ()}
    full = {"cell": ((0, 1, "smooth"), (0, 2, "skip_connect"), (1, 2, "smooth"))}
    scores = [float(one_shot.score(params, genotype, TASK.train)) for genotype in (full, empty)]
    assert scores[0] < scores[1] - 0.02  # nothing arrives at the output of the second
    small = nas.supernet(nas.discrete(NET, full), (3,), ops=OPS)
    inherited = one_shot.supernet.inherit(params, full)
    outputs = jax.jit(small.apply)(inherited, None, TASK.train["x"])
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, TASK.train["y"]).mean()
    np.testing.assert_allclose(scores[0], expected, rtol=1e-9)


def test_an_auxiliary_skip_composed_by_hand_leaves_no_trace_in_genotypes():
    relaxation = nas.auxiliary_skip(nas.softmax(), optax.linear_schedule(1.0, 0.0, 10))
    search = search_of(nas.darts, order="first", relaxation=relaxation, keep=None)
    alpha = {"cell": jnp.array([[0.0, 0.4, 0.6]] * 3)}  # with 1 more, skipping would win
    np.testing.assert_allclose(search.weights(alpha)["cell"].sum(-1), 1.0)
    assert {op for _, _, op in search.genotype(alpha)["cell"]} == {"smooth"}


def test_annealed_weights_are_decoded_at_temperature_one():
    relaxation = nas.softmax(optax.linear_schedule(10.0, 0.1, 100))
    search = search_of(nas.darts, order="first", relaxation=relaxation, keep=1)
    alpha = {"cell": jnp.array([[0.0, 0.0, 0.0], [3.0, 2.9, -10.0], [1.0, 0.0, 0.0]])}
    plain = search_of(nas.darts, order="first", keep=1)
    np.testing.assert_allclose(search.weights(alpha)["cell"], plain.weights(alpha)["cell"])
    assert search.genotype(alpha) == plain.genotype(alpha)
    inside = _relaxations.decoding(_relaxations.edge_normalized(relaxation))(
        {"ops": alpha["cell"], "edges": jnp.zeros(3)}, NET.cells["cell"], KEY, 0
    )
    np.testing.assert_allclose(inside, plain.weights(alpha)["cell"] * np.array([[1.0], [0.5], [0.5]]))


def test_a_genotype_of_nas_bench_101_is_one_of_its_cells():
    net = nas.nas_bench_101_space(2, channels=2, cells_per_stack=1, num_stacks=1, num_vertices=4)
    search = nas.darts(net, (4, 4, 1), ops=nas.NAS_BENCH_101_OPS)
    alpha = {"cell": jnp.asarray(np.random.default_rng(0).normal(size=search.hyperparams(KEY)["cell"].shape))}
    cell = _derivation.derive_graph(net, jax.device_get(search.weights(alpha)))
    assert search.genotype(alpha) == _nas_bench_101.graph_genotype(net, cell)


@pytest.mark.once
def test_the_weight_of_beta_darts_may_be_traced():
    def value(weight):
        search = search_of(nas.beta_darts, num_steps=5, weight=weight)
        context = base.Context(KEY, jnp.array(5))
        return search.problem.outer_loss(search.supernet.init(KEY), search.hyperparams(KEY), TASK.valid, context)

    traced, plain, none = (float(result) for result in (jax.jit(value)(2.0), value(2.0), value(0.0)))
    assert traced == pytest.approx(plain, rel=1e-9) and abs(plain - none) > 1e-3


def test_alpha_without_a_start_decodes():
    rule = lambda problem: hypergrad.unrolled(problem, num_steps=1)
    search = nas.architecture_search(NET, (3,), rule, ops=OPS, learn_init=True)
    assert len(search.genotype({"alpha": {"cell": jnp.zeros((3, 3))}})["cell"]) == 3


# ---- Padding, and labels --------------------------------------------------------------------------------------------

PADDED = {"x": np.pad(TASK.train["x"], ((0, 3), (0, 0)), constant_values=20.0), "mask": np.repeat([1.0, 0], [9, 3])}
PADDED["y"] = np.pad(TASK.train["y"], (0, 3))
NORMAL = NET._replace(layers=(*NET.layers, nas.Layer("norm_relu", 4)))


@pytest.mark.once
def test_padding_counts_in_no_search():
    """`f`, its gradients and one-shot scores depend only on the real rows."""
    search = search_of(nas.darts, network=NORMAL, order="first")
    alpha, padded = alpha_of(search), base.Task(PADDED, PADDED)
    start = jax.jit(lambda: search.estimator.init(KEY, alpha, TASK))()
    estimate = jax.jit(lambda task, state: search.estimator.estimate(alpha, task, state))
    alone, after = estimate(base.Task(TASK.train, TASK.train), start)
    after_padding, after_padded = estimate(padded, start)
    np.testing.assert_allclose(after_padding.value, alone.value, rtol=1e-10)
    close(after_padding.hypergrad, jax.flatten_util.ravel_pytree(alone.hypergrad)[0], 1e-8)
    close(after_padded.inner.params, jax.flatten_util.ravel_pytree(after.inner.params)[0], 1e-8)

    one_shot = nas.single_path_one_shot(NORMAL, (3,), ops=OPS, num_steps=2)
    params, genotype = start.inner.params, {"cell": ((0, 1, "smooth"), (1, 2, "skip_connect"))}
    scores = [one_shot.score(params, genotype, batch) for batch in (TASK.train, PADDED)]
    np.testing.assert_allclose(*scores, rtol=1e-10)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_of_an_own_loss_may_be_anything(shift):
    rows = {**TASK.train, "y": TASK.train["y"] + shift}
    own = search_of(nas.darts, network=ONE, loss=lambda outputs, batch: ((outputs[:, 0] - batch["y"]) ** 2).mean())
    jax.eval_shape(lambda: own.estimator.init(KEY, {"cell": jnp.zeros((1, 3))}, base.Task(rows, rows)))


@pytest.mark.once
def test_a_run_without_a_finite_step_has_no_result():
    search = search_of(nas.robust_darts, network=ONE, every=1)
    learner = training.learner(search.estimator, optax.sgd(0.1))

    def fitted(task):
        options = {"hyperparams": {"cell": jnp.zeros((1, 3))}, "num_steps": 2, "key": KEY, "progress": False}
        return training.fit(learner, lambda key: task, **options)

    assert search.selected_alpha(fitted(TASK))["cell"].shape == (1, 3)
    unknown = {**TASK.train, "x": TASK.train["x"] * jnp.nan}
    with pytest.raises(ValueError, match="None of the run's 2 steps had a finite loss and a finite hyper"):
        search.selected_alpha(fitted(base.Task(unknown, unknown)))
    # `fit` checks labels also where it compiles nothing. Below 0, another class would be trained.
    wrong = {**TASK.valid, "y": TASK.valid["y"] - 1}
    with pytest.raises(ValueError, match=r"`task\.valid\['y'\]` .* got labels from -1 to 0"):
        fitted(TASK._replace(valid=wrong))
