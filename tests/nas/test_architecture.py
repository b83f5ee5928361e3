"""Searches: the α-hypergradient of every exact one against finite differences, and what each adds to DARTS."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, hypergrad, inner, nas, training
from metaopt.nas import _derivation, _nas_bench_101, _relaxations

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
# One edge with as many ops, and no more: programs of seconds.
ONE = nas.Network({"cell": nas.complete_cell(1, CELL.edges[0].ops, preprocess=False)}, (nas.Layer("cell", 3),), 2)
RNG = np.random.default_rng(0)


def rows(num):
    x = RNG.normal(size=(num, 3))
    return {"x": jnp.asarray(x), "y": jnp.asarray((x[:, 0] * x[:, 1] > 0).astype(np.int32))}


TASK = base.Task(rows(9), rows(8))


def sgd(hyperparams):
    return optax.sgd(0.3, momentum=0.5)


def search_of(method, network=NET, **options):
    return method(network, (3,), ops=OPS, **{"optimizer": sgd, "decay": 0.03, **options})


FIRST = {
    "darts": lambda **o: search_of(nas.darts, **{"order": "first", **o}),
    "gumbel": lambda **o: search_of(nas.darts, order="first", relaxation=nas.gumbel_softmax(1.0, hard=False), **o),
    "pc_darts": lambda **o: search_of(nas.pc_darts, partial=2, **o),
    "darts_minus": lambda **o: search_of(nas.darts_minus, num_steps=10, **o),
    "beta_darts": lambda **o: search_of(nas.beta_darts, num_steps=10, weight=2.0, **o),
}
SCHEDULED = (nas.gdas, nas.darts_minus, nas.beta_darts, nas.unrolled_darts)
QUICK = ("darts-0", "darts-1", "darts_minus-1")


def alpha_of(search):
    key = jax.random.key(5)
    return jax.jit(lambda: jax.tree.map(lambda a: a + 0.5 * jax.random.normal(key, a.shape), search.hyperparams(KEY)))()


def estimate_of(search, alpha):
    """The first estimate, from `KEY`."""
    start = lambda: search.estimator.init(KEY, alpha, TASK)
    return jax.jit(lambda: search.estimator.estimate(alpha, TASK, start()))()


def differences(function, at, epsilon=1e-5):
    """Central differences of a scalar function, one compiled program for all."""
    flat, unravel = jax.flatten_util.ravel_pytree(at)
    ends = np.concatenate([np.asarray(flat) + s * epsilon * np.eye(len(flat)) for s in (1, -1)])
    values = np.asarray(jax.jit(lambda ends: jax.lax.map(lambda x: function(unravel(x)), ends))(ends))
    ahead, behind = np.split(values, 2)
    return (ahead - behind) / (2 * epsilon)


def close(hypergrad, expected, rtol):
    found = jax.flatten_util.ravel_pytree(hypergrad)[0]
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "ahead", "network"),
    [
        pytest.param(name, ahead, network, id=f"{name}-{ahead}-{edges}", marks=marks)
        for network, edges, marks in ((ONE, "one edge", []), (NET, "three edges", [pytest.mark.slow]))
        for name in FIRST
        for ahead in (0, 1)
        if (name, ahead) != ("gumbel", 1) and (network is NET or f"{name}-{ahead}" in QUICK)
    ],
)
@pytest.mark.once
def test_one_step_searches_against_finite_differences(name, ahead, network):
    search = FIRST[name](network=network, **({"order": "exact"} if ahead else {}))
    loop, alpha = search.problem.loop, alpha_of(search)
    estimate, after = estimate_of(search, alpha)

    def objective(alpha):
        state = after.inner  # committed
        for _ in range(ahead):
            state = inner.step(loop, state, alpha, TASK.train)
        return search.problem.outer_loss(loop.params(state), alpha, TASK.valid, loop.context(state))

    close(estimate.hypergrad, differences(objective, alpha), 1e-6)
    # The committed step is one step of training.
    assert int(loop.context(after.inner).step) == 1


@pytest.mark.parametrize("network", [ONE, pytest.param(NET, marks=pytest.mark.slow)], ids=["one edge", "three edges"])
@pytest.mark.once
def test_second_order_is_the_exact_one_up_to_its_differences(network):
    options = {"network": network, "epsilon": 1e-3}
    exact, second = (search_of(nas.darts, order=order, **options) for order in ("exact", "second"))
    alpha = alpha_of(exact)
    found = [estimate_of(search, alpha)[0].hypergrad["cell"] for search in (second, exact)]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-8)  # the first order is a third off


@pytest.mark.slow
def test_unrolled_against_finite_differences():
    search = search_of(nas.unrolled_darts, num_steps=4)
    alpha = alpha_of(search)
    value = lambda alpha: search.estimator.estimate(alpha, TASK, KEY)[0].value
    close(estimate_of(search, alpha)[0].hypergrad, differences(value, alpha), 1e-6)


@pytest.mark.slow
def test_one_step_unrolled_is_the_lookahead():
    search = search_of(nas.unrolled_darts, num_steps=1)
    alpha = alpha_of(search)

    @jax.jit
    def both():
        lookahead = hypergrad.lookahead(search.problem, commit=0, num_steps=1)
        state = search.problem.loop.init(jax.random.split(jax.random.split(KEY)[0])[0], alpha, TASK.train)
        start = hypergrad.LookaheadState(state, KEY)
        return [
            e.estimate(alpha, TASK, s)[0].hypergrad["cell"] for e, s in ((search.estimator, KEY), (lookahead, start))
        ]

    np.testing.assert_allclose(*both(), rtol=1e-10)


@pytest.mark.slow
def test_implicit_where_the_weights_rest():
    search = search_of(nas.implicit_darts, num_steps=6_000, solver=hypergrad.dense())
    alpha = alpha_of(search)
    estimate, after = estimate_of(search, alpha)
    assert estimate.metrics["inner_grad_norm"] < 1e-9

    def value(alpha):
        trained = jax.lax.fori_loop(
            0, 6_000, lambda _, s: inner.step(search.problem.loop, s, alpha, TASK.train), after.inner
        )
        context = search.problem.loop.context(trained)
        return search.problem.outer_loss(trained.params, alpha, TASK.valid, context)

    close(estimate.hypergrad, differences(value, alpha), 1e-5)


@pytest.mark.slow
def test_gdas_trains_the_sampled_ops_alone_and_draws_anew():
    search = search_of(nas.gdas, num_steps=20, decay=0.0, optimizer=lambda hp: optax.sgd(0.1))
    alpha = alpha_of(search)

    @jax.jit
    def run():
        def step(state, _):
            estimate, after = search.estimator.estimate(alpha, TASK, state)
            return after, (after.inner.params["layers"][1]["edges"][0][2]["w"][0], estimate.hypergrad["cell"])

        return jax.lax.scan(step, search.estimator.init(KEY, alpha, TASK), length=13)[1]

    weights, grads = jax.tree.map(np.asarray, run())
    moved = abs(np.diff(weights, axis=0)).max((-1, -2)) > 0  # [steps, edges]: "smooth" was sampled, and reached
    assert moved.shape == (12, 3) and 0 < moved.mean() < 1 and len(np.unique(moved, axis=0)) > 2
    assert np.isfinite(grads).all() and (abs(grads).max((1, 2)) > 0).any()
    assert search.weights(alpha)["cell"].sum(-1) == pytest.approx(np.ones(3))  # read without noise


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gdas", "darts_minus"])
def test_over_tasks_each_has_its_own_draws_and_weights(name):
    search = search_of(nas.gdas, num_steps=20) if name == "gdas" else FIRST[name](order="exact")
    alpha = alpha_of(search)
    tasks = [TASK, base.Task(TASK.valid, TASK.train)]
    tasks = [base.Task(*(jax.tree.map(lambda x: x[:8], part) for part in task[:2])) for task in tasks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    keys = jax.random.split(KEY, 2)
    one = jax.jit(lambda key, task: search.estimator.estimate(alpha, task, search.estimator.init(key, alpha, task))[0])
    many = jax.jit(jax.vmap(one))(keys, stacked)
    for i, task in enumerate(tasks):
        single = one(keys[i], task)
        np.testing.assert_allclose(many.hypergrad["cell"][i], single.hypergrad["cell"], atol=1e-12)
        np.testing.assert_allclose(many.value[i], single.value, rtol=1e-10)
    over = hypergrad.over_tasks(search.estimator)
    estimate = jax.jit(lambda: over.estimate(alpha, stacked, over.init(KEY, alpha, stacked))[0])()
    assert np.isfinite(estimate.hypergrad["cell"]).all() and estimate.done.shape == (2,)


def test_partial_searches_have_weights_for_edges():
    search = FIRST["pc_darts"]()
    alpha = search.hyperparams(KEY)
    assert {name: a.shape for name, a in alpha["cell"].items()} == {"ops": (3, 3), "edges": (3,)}
    weights = search.weights(alpha)["cell"]
    np.testing.assert_allclose(weights.sum(-1), [1, 0.5, 0.5], rtol=1e-9)
    assert len(search.genotype(alpha)["cell"]) == 3


def test_a_penalty_that_is_no_function_is_refused_at_once():
    with pytest.raises(ValueError, match="`penalty` must be .* got 50.0. The weight of β-DARTS is `weight=`"):
        search_of(nas.beta_darts, num_steps=10, penalty=50.0)
    with pytest.raises(ValueError, match=r"such as `nas.resource_penalty\(...\)`; got 50.0"):
        search_of(nas.darts, penalty=50.0)


@pytest.mark.once
def test_the_schedules_follow_the_inner_steps_and_noise_is_drawn_apart():
    gumbel = FIRST["gumbel"](decay=0.0)
    minus, beta = FIRST["darts_minus"](), FIRST["beta_darts"]()
    alpha = alpha_of(minus)

    @jax.jit
    def outer():
        params = minus.supernet.init(KEY)
        at = [(FIRST["darts"](), 0), (minus, 10), (minus, 0), (beta, 5)]
        contexts = [base.Context(KEY, jnp.array(step)) for _, step in at]
        each = [s.problem.outer_loss(params, alpha, TASK.valid, c) for (s, _), c in zip(at, contexts, strict=True)]
        noisy = gumbel.problem.outer_loss(params, alpha, TASK.valid, contexts[0])
        losses = [s.problem.loop.loss(params, alpha, TASK.valid, contexts[0])[0] for s in (gumbel, FIRST["darts"]())]
        return *each, noisy, *losses, sum((leaf**2).sum() for leaf in jax.tree.leaves(params))

    plain, at_end, at_start, decayed, noisy, gumbel_trained, trained, squares = map(float, outer())
    assert abs(noisy - gumbel_trained) > 1e-3
    np.testing.assert_allclose(trained - plain, 0.03 / 2 * squares, rtol=1e-9)  # the weights' decay
    np.testing.assert_allclose(at_end, plain, rtol=1e-6)
    assert abs(at_start - plain) > 1e-3
    np.testing.assert_allclose(decayed, plain + 1.0 * nas.beta_decay(alpha), rtol=1e-6)


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
    nas.discrete(NET, search.genotype(search.found(first)))


def fitted(search, num_steps, **options):
    learner = training.learner(search.estimator, optax.adam(0.3))
    start = search.hyperparams(KEY)
    return training.fit(
        learner, lambda key: TASK, hyperparams=start, num_steps=num_steps, key=KEY, settings=search.settings, **options
    )


@pytest.mark.once
def test_what_robust_darts_has_found_is_the_alpha_before_its_stop():
    """Every epoch is too sharp: it stops at the first two means, and goes back to the α that it started at."""
    search = search_of(nas.robust_darts, every=1, window=1, start=1, delta=1, factor=1e-9)
    result = fitted(search, 9, callback=lambda step, metrics: metrics["stop"] > 0)
    assert result.stopped == "callback" and len(result.history["stop"]) == 2
    np.testing.assert_allclose(search.found(result)["cell"], search.hyperparams(KEY)["cell"], rtol=1e-6)
    assert np.abs(search.found(result)["cell"] - result.hyperparams["cell"]).max() > 0.1
    assert FIRST["darts"]().found(result) is result.hyperparams


@pytest.mark.once
def test_darts_plus_counts_the_search_s_own_cell():
    """With `keep=1` an edge is left into each of two nodes; under a budget λ is another tree."""
    alpha = {"cell": jnp.array([[0.0, 5.0, 0.0], [0.0, 4.0, 0.0], [0.0, 1.0, 5.0]])}
    search = nas.darts_plus(NET, (3,), ops=OPS, every=1, keep=1)
    table = nas.CostTable(1.0, (nas.CostTerm((("cell", 0),), np.arange(3.0)),), "s")
    for made, given in (
        (search_of(nas.darts_plus, every=1), alpha),  # keeps two: both skips
        (nas.under_budget(search, table, budget=1.0), {"hyperparams": alpha, "multiplier": jnp.array(0.0)}),
    ):
        estimate, state = estimate_of(made, given)
        assert estimate.metrics["skips"] == (2 if given is alpha else 1) and estimate.metrics["stop"] == 0
        jax.tree.map(np.testing.assert_array_equal, state.kept, given)
    bare = NET._replace(cells={"cell": nas.complete_cell(2, ("none", "smooth"), preprocess=False)})
    with pytest.raises(ValueError, match="No edge of the network has 'skip_connect'"):
        nas.darts_plus(bare, (3,), ops=OPS, every=1)


@pytest.mark.once
def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    first = fitted(FIRST["darts"](), 1, **options)
    for other, name in [
        (FIRST["darts"](relaxation=nas.sigmoid()), "relaxation"),
        (FIRST["darts"](keep=1), "keep"),
        (FIRST["darts_minus"](), "method"),
        (FIRST["darts"](optimizer=optax.sgd), "optimizer"),
    ]:
        with pytest.raises(ValueError, match=rf"`settings\['{name}'\]` is .* in the checkpoint and .* in this run"):
            fitted(other, 2, **options)
    again = fitted(FIRST["darts"](), 1, **options)  # built anew, it is the same
    np.testing.assert_array_equal(again.hyperparams["cell"], first.hyperparams["cell"])


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
    made = [
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
    texts = [json.dumps(search.settings, allow_nan=False) for search in made]
    assert len(set(texts)) == len(made) and "0x" not in "".join(texts)
    assert (
        made[3].settings["method"] == "gdas" and nas.network_from_json(json.dumps(made[0].settings["network"])) == NET
    )
    for same in (
        search_of(nas.darts, order="first", keep="space"),
        search_of(nas.darts, order="first", keep=NET.keep, epsilon=0.01, partial=1),
        search_of(nas.darts, order="first", relaxation=nas.softmax(), decode=nas.softmax(1.0)),
        search_of(nas.darts, order="first", relaxation=None, penalty=None),
        nas.darts(NET._replace(keep=1), (3,), ops=OPS, optimizer=sgd, decay=0.03, order="first", keep=NET.keep),
    ):
        assert same.settings == made[0].settings  # defaults that are written out
    written = search_of(nas.gdas, num_steps=9, single_path=True, order="first", edge_weights=False)
    assert written.settings == made[3].settings
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
    again, _ = nas.train(one_shot.loop, TASK.train, num_steps=60, key=KEY, hyperparams=one_shot.hyperparams)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        again.params,
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


def test_what_is_annealed_in_training_is_read_at_temperature_one():
    relaxation = nas.softmax(optax.linear_schedule(10.0, 0.1, 100))
    search = search_of(nas.darts, order="first", relaxation=relaxation, keep=1)
    alpha = {"cell": jnp.array([[0.0, 0.0, 0.0], [3.0, 2.9, -10.0], [1.0, 0.0, 0.0]])}
    plain = search_of(nas.darts, order="first", keep=1)
    np.testing.assert_allclose(search.weights(alpha)["cell"], plain.weights(alpha)["cell"])
    assert search.genotype(alpha) == plain.genotype(alpha)
    inside = _relaxations.decoding(nas.edge_normalized(relaxation))(
        {"ops": alpha["cell"], "edges": jnp.zeros(3)}, NET.cells["cell"], KEY, 0
    )
    np.testing.assert_allclose(inside, plain.weights(alpha)["cell"] * np.array([[1.0], [0.5], [0.5]]))


def test_a_genotype_of_nas_bench_101_is_one_of_its_cells():
    net = nas.nas_bench_101_space(2, channels=2, cells_per_stack=1, num_stacks=1, num_vertices=4)
    search = nas.darts(net, (4, 4, 1), ops=nas.NAS_BENCH_101_OPS)
    alpha = {"cell": jnp.asarray(np.random.default_rng(0).normal(size=search.hyperparams(KEY)["cell"].shape))}
    cell = _derivation.derive_graph(net, jax.device_get(search.weights(alpha)))
    assert search.genotype(alpha) == _nas_bench_101.graph_genotype(net, cell)


@pytest.mark.parametrize(
    "relaxation", [None, nas.sigmoid(), nas.auxiliary_skip(nas.gumbel_softmax(1.0, hard=True), 1.0)]
)
def test_one_op_an_edge_needs_weights_of_one_op(relaxation):
    with pytest.raises(ValueError, match="gives weight to several ops of an edge of 'cell'"):
        search_of(nas.darts, relaxation=relaxation, single_path=True)


def test_bad_order():
    with pytest.raises(ValueError, match="`order` must be one of first, second, exact; got 'third'"):
        nas.darts(NET, (3,), ops=OPS, order="third")
    with pytest.raises(ValueError, match="`difference` must be one of central, forward; got 'backward'"):
        nas.darts(NET, (3,), ops=OPS, difference="backward")


def test_the_weight_of_beta_darts_may_be_traced():
    def value(weight):
        search = search_of(nas.beta_darts, num_steps=5, weight=weight)
        context = base.Context(KEY, jnp.array(5))
        return search.problem.outer_loss(search.supernet.init(KEY), search.hyperparams(KEY), TASK.valid, context)

    traced, plain, none = (float(found) for found in (jax.jit(value)(2.0), value(2.0), value(0.0)))
    assert traced == pytest.approx(plain, rel=1e-9) and abs(plain - none) > 1e-3


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        # Schedules of no steps are none: each of these is another method.
        *((method, {"num_steps": 0}, "`num_steps` must be at least 1; got 0") for method in SCHEDULED),
        *((method, {"num_steps": -5}, "`num_steps` must be at least 1; got -5") for method in SCHEDULED),
        (nas.gdas, {"num_steps": 2.5}, "`num_steps` must be an integer of at least 1; got 2.5"),
        (nas.beta_darts, {"num_steps": 5, "weight": -1.0}, "`weight` must be at least 0; got -1.0"),
        (nas.darts, {"relaxation": "softmax"}, r"`relaxation` must be a function `\(alpha, .*; got 'softmax'\.$"),
        (nas.darts, {"relaxation": nas.softmax}, "`relaxation` must be .* such as `nas.softmax.*; call it"),
        (nas.darts, {"decode": 3}, "`decode` must be a function .*; got 3"),
    ],
)
def test_options_that_make_another_method_or_none_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        search_of(method, **options)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ({"normal": jnp.zeros((3, 3))}, r"each kind of cell .* \['cell'\]; got the kinds \['normal'\]"),
        ({"cell": jnp.zeros((3, 3)), "reduce": jnp.zeros((3, 3))}, r"got the kinds \['cell', 'reduce'\]"),
        (jnp.zeros((3, 3)), "each kind of cell .*; got Array"),
    ],
)
def test_an_alpha_of_another_search_is_refused(alpha, message):
    search = search_of(nas.darts)
    for read in (search.weights, search.genotype):
        with pytest.raises(ValueError, match=message):
            read(alpha)


def test_an_alpha_without_a_start_is_read_where_it_is_said():
    rule = lambda problem: hypergrad.unrolled(problem, num_steps=1)
    search = nas.architecture_search(NET, (3,), rule, ops=OPS, learn_init=True)
    alpha = {"cell": jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match=r"""With `learn_init` .* got the keys \['cell'\]. .* pass {"alpha": α}"""):
        search.genotype(alpha)
    assert len(search.genotype({"alpha": alpha})["cell"]) == 3


# ---- Padding, and labels --------------------------------------------------------------------------------------------

PADDED = {"x": np.pad(TASK.train["x"], ((0, 3), (0, 0)), constant_values=20.0), "mask": np.repeat([1.0, 0], [9, 3])}
PADDED["y"] = np.pad(TASK.train["y"], (0, 3))
NORMAL = NET._replace(layers=(*NET.layers, nas.Layer("norm_relu", 4)))


@pytest.mark.once
def test_padding_counts_in_no_search():
    """`f` and its gradients, and one-shot scores, are those of the real rows alone."""
    search = search_of(nas.darts, network=NORMAL, order="first")
    alpha, padded = alpha_of(search), base.Task(PADDED, PADDED)
    start = jax.jit(lambda: search.estimator.init(KEY, alpha, TASK))()
    estimate = jax.jit(lambda task, state: search.estimator.estimate(alpha, task, state))
    alone, after = estimate(base.Task(TASK.train, TASK.train), start)
    found, after_padded = estimate(padded, start)
    np.testing.assert_allclose(found.value, alone.value, rtol=1e-10)
    close(found.hypergrad, jax.flatten_util.ravel_pytree(alone.hypergrad)[0], 1e-8)
    close(after_padded.inner.params, jax.flatten_util.ravel_pytree(after.inner.params)[0], 1e-8)

    one_shot = nas.single_path_one_shot(NORMAL, (3,), ops=OPS, num_steps=2)
    params, genotype = start.inner.params, {"cell": ((0, 1, "smooth"), (1, 2, "skip_connect"))}
    scores = [one_shot.score(params, genotype, batch) for batch in (TASK.train, PADDED)]
    np.testing.assert_allclose(*scores, rtol=1e-10)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5])
def test_one_shot_search_trains_some_steps(num_steps):
    with pytest.raises(ValueError, match="`num_steps` must be"):
        nas.single_path_one_shot(ONE, (3,), ops=OPS, num_steps=num_steps)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_that_are_no_classes_are_refused_where_they_are_seen(shift):
    wrong = {**TASK.train, "y": TASK.train["y"] + shift}
    search, one_shot = (
        search_of(nas.darts, network=ONE),
        nas.single_path_one_shot(ONE, (3,), ops=OPS, num_steps=1),
    )
    alpha = {"cell": jnp.zeros((1, 3))}
    for task in (base.Task(wrong, TASK.valid), base.Task(TASK.train, wrong)):
        with pytest.raises(ValueError, match=r"of a network with 2 outputs must be in 0\.\.1"):
            search.estimator.init(KEY, alpha, task)
    with pytest.raises(ValueError, match="Number the classes from 0"):
        one_shot.train(KEY, wrong)
    with pytest.raises(ValueError, match="Number the classes from 0"):
        one_shot.score(None, {"cell": ((0, 1, "smooth"),)}, wrong)
    free = nas.training_free_scores(ONE, (3,), ops=OPS)
    with pytest.raises(ValueError, match="Number the classes from 0"):
        free(KEY, {"cell": ((0, 1, "smooth"),)}, wrong)
    # Labels of a loss of one's own are its own.
    own = search_of(nas.darts, network=ONE, loss=lambda outputs, batch: ((outputs[:, 0] - batch["y"]) ** 2).mean())
    jax.eval_shape(lambda: own.estimator.init(KEY, alpha, base.Task(wrong, wrong)))


@pytest.mark.once
@pytest.mark.parametrize("method", [nas.darts, functools.partial(nas.robust_darts, every=1)])
def test_a_run_without_a_finite_step_has_found_nothing(method):
    search = search_of(method, network=ONE, order="first")
    learner = training.learner(search.estimator, optax.sgd(0.1))

    def fitted(task):
        options = {"hyperparams": {"cell": jnp.zeros((1, 3))}, "num_steps": 2, "key": KEY, "progress": False}
        return training.fit(learner, lambda key: task, **options)

    assert search.found(fitted(TASK))["cell"].shape == (1, 3)
    # Below 0, too, where another class would be trained.
    wrong = {**TASK.train, "y": TASK.train["y"] - 1}
    with pytest.raises(ValueError, match="None of the run's 2 steps had a finite loss and a finite hyper"):
        search.found(fitted(base.Task(wrong, wrong)))


def test_rows_that_are_no_dict_are_refused():
    search = search_of(nas.darts, network=ONE, order="first")
    rows = tuple(TASK.train.values())
    with pytest.raises(ValueError, match='must be a dict with the inputs as "x".*got tuple'):
        jax.eval_shape(lambda: estimate_of_task(search, base.Task(rows, rows)))


def estimate_of_task(search, task):
    alpha = {"cell": jnp.zeros((1, 3))}
    return search.estimator.estimate(alpha, task, search.estimator.init(KEY, alpha, task))
