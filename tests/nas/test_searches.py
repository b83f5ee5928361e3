"""Every architecture search: what holds for all of them, and hypergradients against finite differences.

To add a search method:

1. Write one file in `metaopt/nas/search/`, such as `_fair_darts.py`: a function `(network, in_shape, *, ops, ...,
   **options) -> Search` under `@with_settings`, which calls `darts` or `architecture_search` with other options.
   The second example of `architecture_search` is one.
2. Export it in `metaopt/nas/__init__.py`, in the imports and in `__all__`.
3. Add a row to `SEARCHES`: `"fair_darts": (nas.fair_darts, {})`, with the options that it requires.
4. If its hypergradient with `order="first"` is ∂f/∂α at the trained weights, add the row's name to `FIRST_ORDER`. It is
   then compared with finite differences: of f, and with `order="exact"` of f after one more step of training.

Every row is checked: the estimates are finite, have a gradient and advance their keys; the content of padding rows has
no effect; α gives weights and a genotype that decodes to a network; settings are JSON and tell the rows apart.
"""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_search import KEY, NET, ONE, OPS, TASK, alpha_of, close, estimate_of, search_of

from metaopt import base, hypergrad, inner, nas


def budgeted(network, in_shape, **options):
    table = nas.CostTable(1.0, (nas.CostTerm((("cell", 0),), np.arange(3.0)),), "s")
    return nas.under_budget(nas.darts(network, in_shape, **options), table, budget=2.0)


def with_learned_start(network, in_shape, **options):
    rule = lambda problem: hypergrad.unrolled(problem, num_steps=2)
    return nas.architecture_search(network, in_shape, rule, learn_init=True, **options)


SEARCHES = {  # (method, options)
    "darts": (nas.darts, {"order": "first"}),
    "darts, second order": (nas.darts, {}),
    "darts, exact": (nas.darts, {"order": "exact"}),
    "gumbel noise": (nas.darts, {"order": "first", "relaxation": nas.gumbel_softmax(1.0, hard=False)}),
    "unrolled_darts": (nas.unrolled_darts, {"num_steps": 2}),
    "implicit_darts": (nas.implicit_darts, {"num_steps": 2, "damping": 1.0}),
    "gdas": (nas.gdas, {"num_steps": 10}),
    "pc_darts": (nas.pc_darts, {"partial": 2}),
    "darts_minus": (nas.darts_minus, {"num_steps": 10}),
    "beta_darts": (nas.beta_darts, {"num_steps": 10, "weight": 2.0}),
    "robust_darts": (nas.robust_darts, {"every": 1}),
    "darts_plus": (nas.darts_plus, {"every": 1}),
    "under_budget": (budgeted, {"order": "first"}),
    "architecture_search, learned start": (with_learned_start, {}),
}
FIRST_ORDER = ("darts", "gumbel noise", "pc_darts", "darts_minus", "beta_darts")
QUICK = ("darts-0", "darts-1", "darts_minus-1")  # not marked slow


def search_named(name, **options):
    method, own = SEARCHES[name]
    return search_of(method, **{**own, **options})


def first_order(name, **options):
    return search_named(name, **{"order": "first", **options})


# ---- What holds for every search ------------------------------------------------------------------------------------

SMALL = nas.Network(ONE.cells, (nas.Layer("smooth", 4), nas.Layer("cell", 4), nas.Layer("norm_relu", 4)), 2)


def padded(rows, content):
    """Twelve rows, of which those after the real ones hold `content`."""
    num = 12 - len(rows["y"])
    x = np.pad(rows["x"], ((0, num), (0, 0)), constant_values=content)
    return {"x": x, "y": np.pad(rows["y"], (0, num)), "mask": np.repeat([1.0, 0.0], [12 - num, num])}


def key_words(state):
    """The data of all keys in a state."""
    keys = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return jnp.concatenate([jnp.ravel(jax.random.key_data(key)) for key in keys])


@pytest.mark.once
@pytest.mark.parametrize("name", SEARCHES)
def test_estimates(name):
    search = search_named(name, network=SMALL)
    hyperparams = alpha_of(search)

    @jax.jit
    def run(task):
        def step(state, _):
            estimate, state = search.estimator.estimate(hyperparams, task, state)
            return state, (estimate.value, estimate.hypergrad, key_words(state))

        return jax.lax.scan(step, search.estimator.init(KEY, hyperparams, task), length=4)[1]

    values, hypergrads, keys = run(base.Task(padded(TASK.train, 0.0), padded(TASK.valid, 0.0)))
    assert jax.tree.map(lambda a: a.shape[1:], hypergrads) == jax.tree.map(jnp.shape, hyperparams)
    assert np.isfinite(values).all()
    gradient, _ = jax.flatten_util.ravel_pytree(search.alpha(hypergrads))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6
    assert len({row.tobytes() for row in np.asarray(keys)}) == 4
    # The content of padding has no effect, and that of real rows has one.
    changed_padding = run(base.Task(padded(TASK.train, 20.0), padded(TASK.valid, -30.0)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), changed_padding[:2], (values, hypergrads)
    )
    other = run(base.Task(padded(TASK.valid, 0.0), padded(TASK.train, 0.0)))
    assert np.abs(other[0] - values).min() > 1e-9


@pytest.mark.parametrize("name", SEARCHES)
def test_genotypes_decode(name):
    search = search_named(name)
    hyperparams = search.hyperparams(KEY)
    weights = search.weights(hyperparams)
    assert {kind: w.shape for kind, w in weights.items()} == {"cell": (3, 3)}
    assert all(np.isfinite(w).all() and (w >= 0).all() for w in weights.values())
    network = nas.discrete(search.supernet.network, search.genotype(hyperparams))
    supernet = nas.supernet(network, (3,), ops=OPS)
    assert jax.eval_shape(lambda key: supernet.apply(supernet.init(key), None, TASK.train["x"]), KEY).shape == (9, 2)


def test_every_search_has_a_row():
    searches = {
        name
        for name in nas.__all__
        if inspect.isfunction(getattr(nas, name))
        and inspect.signature(getattr(nas, name)).return_annotation is nas.Search
    }
    assert "darts" in searches and searches <= {name.split(",")[0] for name in SEARCHES}


def test_settings_tell_the_searches_apart():
    settings = {name: search_named(name).settings for name in SEARCHES}
    texts = {name: json.dumps(value, allow_nan=False) for name, value in settings.items()}
    assert len(set(texts.values())) == len(SEARCHES)
    for name, text in texts.items():
        assert callable(getattr(nas, settings[name]["method"]))
        assert json.dumps(search_named(name).settings) == text and "0x" not in text  # no address in memory


# ---- Exact hypergradients -------------------------------------------------------------------------------------------


def differences(function, point, epsilon=1e-5):
    """Central differences of a scalar function, one compiled program for all."""
    flat, unravel = jax.flatten_util.ravel_pytree(point)
    ends = np.concatenate([np.asarray(flat) + s * epsilon * np.eye(len(flat)) for s in (1, -1)])
    values = np.asarray(jax.jit(lambda ends: jax.lax.map(lambda x: function(unravel(x)), ends))(ends))
    ahead, behind = np.split(values, 2)
    return (ahead - behind) / (2 * epsilon)


@pytest.mark.parametrize(
    ("name", "ahead", "network"),
    [
        pytest.param(name, ahead, network, id=f"{name}-{ahead}-{edges}", marks=marks)
        for network, edges, marks in ((ONE, "one edge", []), (NET, "three edges", [pytest.mark.slow]))
        for name in FIRST_ORDER
        for ahead in (0, 1)
        if (name, ahead) != ("gumbel noise", 1) and (network is NET or f"{name}-{ahead}" in QUICK)
    ],
)
@pytest.mark.once
def test_one_step_searches_against_finite_differences(name, ahead, network):
    search = first_order(name, network=network, **({"order": "exact"} if ahead else {}))
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
    hypergrads = [estimate_of(search, alpha)[0].hypergrad["cell"] for search in (second, exact)]
    np.testing.assert_allclose(*hypergrads, rtol=1e-4, atol=1e-8)  # the first order is a third off


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
        start = lookahead.init(KEY, alpha, TASK)._replace(inner=state, key=KEY)
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
def test_gdas_trains_only_the_sampled_ops_and_samples_at_each_step():
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
    search = search_of(nas.gdas, num_steps=20) if name == "gdas" else first_order(name, order="exact")
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


@pytest.mark.once
def test_the_schedules_follow_the_inner_steps_and_noise_is_drawn_apart():
    gumbel = first_order("gumbel noise", decay=0.0)
    minus, beta = first_order("darts_minus"), first_order("beta_darts")
    alpha = alpha_of(minus)

    @jax.jit
    def outer():
        params = minus.supernet.init(KEY)
        cases = [(first_order("darts"), 0), (minus, 10), (minus, 0), (beta, 5)]
        contexts = [base.Context(KEY, jnp.array(step)) for _, step in cases]
        each = [s.problem.outer_loss(params, alpha, TASK.valid, c) for (s, _), c in zip(cases, contexts, strict=True)]
        noisy = gumbel.problem.outer_loss(params, alpha, TASK.valid, contexts[0])
        losses = [
            s.problem.loop.loss(params, alpha, TASK.valid, contexts[0])[0] for s in (gumbel, first_order("darts"))
        ]
        return *each, noisy, *losses, sum((leaf**2).sum() for leaf in jax.tree.leaves(params))

    plain, at_end, at_start, decayed, noisy, gumbel_trained, trained, squares = map(float, outer())
    assert abs(noisy - gumbel_trained) > 1e-3
    np.testing.assert_allclose(trained - plain, 0.03 / 2 * squares, rtol=1e-9)  # the weights' decay
    np.testing.assert_allclose(at_end, plain, rtol=1e-6)
    assert abs(at_start - plain) > 1e-3
    np.testing.assert_allclose(decayed, plain + 1.0 * np.log(np.exp(alpha["cell"]).sum(-1)).mean(), rtol=1e-6)
