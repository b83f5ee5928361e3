"""Costs of architectures compared with formulas, whole programs and published tables, and the use of these costs."""

import functools
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import base, hypergrad, inner, nas, training
from metaopt.nas import _budgets

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
FLOPS = functools.partial(hypergrad.flops, products_only=True)
MEASURES = {"flops": FLOPS, "params": nas.num_params}
SIZES = nas.conv_net_space(3, widths=(2, 3, 5), kernels=(1, 3), depths=(1, 3), hidden=(4, 6))
CELLS = nas.nas_bench_201_space(3, channels=4, cells_per_stage=2)
DARTS = nas.darts_space(3, channels=4, num_cells=3, num_nodes=2, primitives=("none", "skip_connect", "sep_conv_3x3"))
SPACES = {
    "sizes": (SIZES, (7, 4, 2), {}, 1),
    "201": (CELLS, (8, 6, 1), nas.NAS_BENCH_201_OPS, 1),
    "transnas": (nas.trans_nas_bench_101_space(3, channels=4), (65, 40, 1), nas.TRANS_NAS_BENCH_101_OPS, 1),
    "macro": (nas.nas_bench_macro_space(3, channels=2, features=5), (16, 10, 1), nas.NAS_BENCH_MACRO_OPS, 1),
    "darts": (DARTS, (8, 6, 1), nas.DARTS_OPS, 2),
}


@functools.cache
def table_of(space, measure):
    network, shape, ops, partial = SPACES[space]
    return nas.cost_table(network, shape, MEASURES[measure], ops=ops, partial=partial)


def weights_of(network, scale=1.0):
    alpha = nas.init_alpha(KEY, network, scale=scale)
    return nas.mixing_weights(nas.softmax(), network, alpha, KEY)


def draws(network, num):
    """Draws that do not depend on earlier tests. They have no cell whose input is unused: layers before such a cell are
    dead code, which a count of a jaxpr omits and a table of costs does not."""
    space, rng = nas.configuration_space(network), np.random.default_rng(0)
    cells = [kind for kind, cell in network.cells.items() if cell.num_inputs == 1]
    while num:
        genotype = nas.genotype_from_configuration(
            network, {n: int(rng.integers(leaf.high + 1)) for n, leaf in space.items()}
        )
        if all(any(source == 0 for source, *_ in genotype[kind]) for kind in cells):
            num -= 1
            yield genotype


@pytest.mark.parametrize(
    "space", ["sizes", *(pytest.param(name, marks=pytest.mark.once) for name in SPACES if name != "sizes")]
)
def test_one_hot_costs_are_those_of_the_discrete_network(space):
    """Parameters of its tree, and products of its whole jaxpr: scans, stacks of layers and all."""
    network, shape, ops, partial = SPACES[space]
    flops = set()
    for genotype in draws(network, 2):
        small = nas.supernet(nas.discrete(network, genotype), shape, ops=ops, partial=partial)
        params = jax.eval_shape(small.init, KEY)
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float64)
        apply = lambda params, x, small=small: small.apply(params, None, x)
        counted = {"flops": FLOPS(apply, params, x), "params": sum(leaf.size for leaf in jax.tree.leaves(params))}
        for measure, expected in counted.items():
            table = table_of(space, measure)
            assert table.cost_of(network, genotype) == expected
            assert float(table.expected_cost(nas.one_hot(network, genotype))) == expected
        flops.add(counted["flops"])
    assert len(flops) > 1


def test_a_supernet_of_sizes_costs_what_its_largest_network_costs():
    """Masks save nothing in search, and add next to nothing."""
    network, shape = nas.conv_net_space(), (28, 28, 1)
    supernet, weights = nas.supernet(network, shape, ops={}), jax.eval_shape(lambda: weights_of(network))
    params, x = jax.eval_shape(supernet.init, KEY), jax.ShapeDtypeStruct((1, *shape), jnp.float64)
    largest = FLOPS(lambda params, x: supernet.apply(params, None, x), params, x)
    assert 1 < FLOPS(supernet.apply, params, weights, x) / largest < 1.001


def test_sizes_by_formula():
    """2 k² c_in c_out per position and time; (k² c_in + 1) c_out parameters."""
    sizes = {"conv1": (3, 1, 3), "conv2": (5, 3, 1)}  # width, kernel, depth
    genotype = {
        f"{n}.{s}": ((0, 1, str(v)),)
        for n, each in sizes.items()
        for s, v in zip(("width", "kernel", "depth"), each, strict=True)
    }
    genotype["linear.width"] = ((0, 1, "4"),)
    flops = 2 * (28 * (2 * 3 + 3 * 3 + 3 * 3) + 8 * 9 * 3 * 5 + 2 * 5 * 4 + 4 * 3)  # 7×4, then 4×2, then 2×1 positions
    params = (2 + 1) * 3 + 2 * (3 + 1) * 3 + (9 * 3 + 1) * 5 + (10 + 1) * 4 + (4 + 1) * 3
    assert table_of("sizes", "flops").cost_of(SIZES, genotype) == flops
    assert table_of("sizes", "params").cost_of(SIZES, genotype) == params


@pytest.mark.parametrize("space", ["sizes", "201"])
def test_the_gradient_of_the_expected_cost_is_finite_differences(space):
    table, network = table_of(space, "flops"), SPACES[space][0]
    flat, unravel = jax.flatten_util.ravel_pytree(nas.init_alpha(KEY, network, scale=1.0))

    def cost(flat):
        return table.expected_cost(nas.mixing_weights(nas.softmax(), network, unravel(flat), KEY)) / 1e4

    grads = jax.jit(jax.grad(cost))(flat)
    ends = flat[None] + 1e-5 * jnp.concatenate([jnp.eye(flat.size), -jnp.eye(flat.size)])
    expected = np.subtract(*np.split(np.asarray(jax.jit(jax.vmap(cost))(ends)), 2)) / 2e-5
    assert abs(expected).max() > 1e-3
    np.testing.assert_allclose(grads, expected, atol=1e-8 * abs(expected).max())


def test_the_expected_cost_is_the_mean_over_networks():
    """Every choice drawn apart, by its weights; all 96 networks."""
    network = nas.conv_net_space(3, widths=(2, 3), kernels=(1, 3), depths=(1, 2), hidden=(4,))
    table = nas.cost_table(network, (5, 4, 1), FLOPS, ops={})
    weights, mean = jax.device_get(weights_of(network)), 0.0
    for digits in itertools.product(*(range(w.size) for w in weights.values())):
        chance = np.prod([w[0, d] for w, d in zip(weights.values(), digits, strict=True)])
        genotype = nas.genotype_from_configuration(network, dict(zip(weights, digits, strict=True)))
        mean += chance * table.cost_of(network, genotype)
    np.testing.assert_allclose(table.expected_cost(weights), mean, rtol=1e-12)


WHOLE = nas.CostTable(  # of whole networks: 27 choices of "none", "skip_connect", "mlp" on 3 edges
    1.0, (nas.CostTerm((("cell", 0), ("cell", 1), ("cell", 2)), 5 + np.arange(27.0).reshape(3, 3, 3)),)
)


@pytest.mark.parametrize("keep", [None, 1])
def test_a_table_of_whole_networks_counts_edges_that_are_not_there(keep):
    """As "none", which they are: a product with their weights, all 0, would make every cost nothing."""
    ops = ("none", "skip_connect", "mlp")
    cell = nas.complete_cell(2, ops)  # 0→1, 0→2, 1→2
    network = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2, keep=keep)
    genotype = {"cell": ((0, 1, "mlp"), (1, 2, "skip_connect"))}
    cost = 1 + 5 + 9 * 2 + 1
    one_hot = nas.one_hot(network, genotype)
    assert WHOLE.cost_of(network, genotype) == WHOLE.expected_cost(one_hot, network) == cost
    assert jax.jit(lambda w: WHOLE.expected_cost(w, network))(one_hot) == cost
    search = nas.darts(network, (3,), ops=nas.BLOCKS)
    alpha = {"cell": jnp.asarray([[-9.0, 0.0, 1.0], [0.0, -9.0, -9.0], [-9.0, 0.5, 0.0]])}
    excess, grads = jax.value_and_grad(_budgets.over_budget(WHOLE, network, budget=10.0))(alpha, 0)
    w, mean = jax.device_get(search.weights(alpha))["cell"], 1.0
    if keep:  # 0→2 is not kept, and "none" on the other edges gives no network
        w = np.where(np.arange(3) == 0, np.array([0.0, 1.0, 0.0])[:, None], w * np.array([[1], [0], [1]]))
        w = w / w.sum(1, keepdims=True)
    for i, j, k in itertools.product(range(3), repeat=3):
        mean += w[0, i] * w[1, j] * w[2, k] * (5 + 9 * i + 3 * j + k)
    np.testing.assert_allclose(10 * (1 + excess), mean, rtol=1e-9)
    assert abs(grads["cell"][0]).max() > 0.1


def test_latency_is_seconds_of_a_call(monkeypatch):
    """Uses a clock that every call of the op advances by its milliseconds."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    spent = iter([0.5, 4.0, 2.0, 3.0, *[1.0] * 1_000])  # the first call; then the calls of the median

    class Compiled:
        def lower(self, *arguments):
            assert arguments[1].shape == (2, 3) and np.isfinite(arguments[1]).all()
            return self

        def compile(self):
            return self

        def __call__(self, params, x):
            clock[0] += next(spent) * 1e-3
            return x

    monkeypatch.setattr(jax, "jit", lambda apply: Compiled())
    x = jax.ShapeDtypeStruct((2, 3), jnp.float64)
    # .5 ms is too short; then two calls in 6 ms are enough, and samples are of two.
    seconds = nas.latency(num_samples=3, min_seconds=5e-3)(None, (), x)
    np.testing.assert_allclose(seconds, 1e-3)


@pytest.mark.once
def test_latencies_of_this_device_are_saved(tmp_path):
    network = nas.mlp_space(2, widths=(4, 8), depths=(1, 2))
    measure = nas.latency(num_samples=2, min_seconds=1e-5)
    table = nas.cost_table(network, (5,), measure, ops={}, batch_size=2, unit="s")
    metaopt.save(tmp_path / "costs.json", table)
    loaded = metaopt.load(tmp_path / "costs.json")
    assert loaded.unit == "s" and loaded.fixed == table.fixed == 0
    assert [term.rows for term in loaded.terms] == [term.rows for term in table.terms]
    for term, other in zip(table.terms, loaded.terms, strict=True):
        assert (term.values > 0).all() and (term.values < 10).all()
        np.testing.assert_array_equal(term.values, other.values)


@pytest.mark.parametrize("values", [[0.0, None], [0.0, "nan"], ["1", "2"], [True, False]])
def test_costs_in_json_are_numbers(values, tmp_path):
    """NumPy and `float` would make NaN of null and of a text."""
    term = {"rows": [["cell", 0]], "values": values}
    header, file = {"format": "metaopt.cost_table", "version": 1, "unit": "ms"}, tmp_path / "costs.json"
    for fields, name in (({"fixed": 0.5, "terms": [term]}, "values"), ({"fixed": "nan", "terms": []}, "fixed")):
        file.write_text(json.dumps(header | fields))
        with pytest.raises(ValueError, match=f"`{name}` must be numbers"):
            metaopt.load(file)


def test_products_are_counted_alone():
    function = lambda a, b: jnp.tanh(a @ b) + 1
    shapes = jnp.zeros((2, 3)), jnp.zeros((3, 4))
    assert FLOPS(function, *shapes) == 48 and hypergrad.flops(function, *shapes) == 64
    scanned = lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, length=5)[0]
    assert FLOPS(scanned, jnp.zeros((2, 3)), jnp.zeros((3, 3))) == 5 * 2 * 2 * 9


# ---- Penalties and constraints --------------------------------------------------------------------------------------

ROWS = nas.mlp_space(2, widths=(2, 16), depths=(1, 2))


def rows(num):
    x = RNG.normal(size=(num, 3))
    return {"x": jnp.asarray(x), "y": jnp.asarray((x[:, 0] * x[:, 1] > 0).astype(np.int32))}


TASK = base.Task(rows(16), rows(16))


@functools.cache
def row_table():
    return nas.cost_table(ROWS, (3,), nas.num_params, ops={})


def test_penalties_by_hand_and_in_a_problem():
    alpha = nas.init_alpha(KEY, ROWS, scale=1.0)
    cost = float(row_table().expected_cost(nas.mixing_weights(nas.softmax(), ROWS, alpha, KEY)))
    penalties = {}
    for form, target in itertools.product(("linear", "hinge", "absolute"), (2 * cost, cost / 2)):
        penalty = nas.resource_penalty(row_table(), ROWS, weight=3.0, target=target, form=form)
        penalties[form, target] = float(penalty(alpha, 0))
    expected = {"linear": (1.5, 6.0), "hinge": (0.0, 3.0), "absolute": (1.5, 3.0)}
    for form, values in expected.items():
        np.testing.assert_allclose([penalties[form, 2 * cost], penalties[form, cost / 2]], values, rtol=1e-6)
    search = nas.darts(ROWS, (3,), ops={}, order="first")
    penalty = nas.resource_penalty(row_table(), ROWS, weight=3.0, target=cost)
    problem = _budgets.penalized(search.problem, penalty)
    optional = nas.darts(ROWS, (3,), ops={}, order="first", penalty=penalty).problem

    @jax.jit
    def values(alpha):
        context = base.Context(KEY, jnp.array(0))
        params = search.supernet.init(KEY)
        return [p.outer_loss(params, alpha, TASK.valid, context) for p in (search.problem, problem, optional)]

    plain, wrapped, option = values(alpha)
    np.testing.assert_allclose([wrapped - plain, option - plain], 3.0, rtol=1e-9)


def quadratic():
    """f = |λ − (2, 1)|², whatever is trained."""
    loop = inner.loop(lambda params, hyperparams, batch: 0.0 * params, lambda hp: optax.sgd(0.1), init=lambda *a: 1.0)
    target = jnp.array([2.0, 1.0])
    return inner.problem(loop, lambda params, hyperparams, batch: ((hyperparams - target) ** 2).sum())


@pytest.mark.parametrize("limit", [1.0, 5.0])
def test_the_lagrangian_finds_the_constrained_minimum_and_the_multiplier(limit):
    """min |λ − (2, 1)|² with λ₁ + λ₂ ≤ b: λ = (2, 1) − max(0, 3 − b)/2, μ = max(0, 3 − b)."""
    problem = _budgets.lagrangian(quadratic(), lambda hp, step: hp.sum() - limit, damping=1.0)
    context = base.Context(KEY, jnp.array(1))

    @jax.jit
    def descend(both):
        def step(both, _):
            value, grads = jax.value_and_grad(problem.outer_loss, 1)(1.0, both, None, context)
            return jax.tree.map(lambda x, g: x - 0.05 * g, both, grads), value

        return jax.lax.scan(step, both, length=3_000)

    both, values = descend({"hyperparams": jnp.full(2, 4.0), "multiplier": jnp.array(0.0)})
    excess = max(0.0, 3 - limit)
    np.testing.assert_allclose(both["hyperparams"], np.array([2, 1]) - excess / 2, atol=2e-2)
    np.testing.assert_allclose(jax.nn.softplus(both["multiplier"]), excess, atol=2e-2)
    np.testing.assert_allclose(values[0], 13.0)  # only f, without the excess
    assert problem.loop.loss(2.0, {"hyperparams": jnp.zeros(2), "multiplier": jnp.array(0.0)}, None, context)[0] == 0


@pytest.mark.once
def test_a_search_comes_to_its_budget():
    search = nas.darts(ROWS, (3,), ops={}, order="first", optimizer=lambda hp: optax.sgd(0.05), decay=0.0)
    budget = 60.0  # networks have 14 to 354 parameters
    bound = nas.under_budget(search, row_table(), budget=budget, damping=1.0)
    learner = training.learner(bound.estimator, optax.adam(0.05))
    start = bound.hyperparams(KEY)
    run = training.fit(learner, lambda key: TASK, hyperparams=start, num_steps=400, key=KEY, steps_per_call=200)
    cost = lambda hp: float(row_table().expected_cost(bound.weights(hp)))
    assert cost(start) > 1.5 * budget
    assert cost(run.hyperparams) < 1.05 * budget
    genotype = nas.within_budget(ROWS, jax.device_get(bound.weights(run.hyperparams)), row_table(), budget)
    assert row_table().cost_of(ROWS, genotype) <= budget
    # With a learned start the constraint still sees α alone.
    search = nas.unrolled_darts(ROWS, (3,), ops={}, num_steps=1, learn_init=True)
    learned = nas.under_budget(search, row_table(), budget=budget)
    hyperparams = learned.hyperparams(KEY)
    excess = _budgets.over_budget(row_table(), ROWS, budget=budget)(learned.alpha(hyperparams), 0)
    assert set(hyperparams["hyperparams"]) == {"alpha", "init"}
    run = lambda hyperparams: learned.estimator.estimate(
        hyperparams, TASK, learned.estimator.init(KEY, hyperparams, TASK)
    )[0]
    estimate = jax.jit(run)(hyperparams)
    sigma = jax.nn.sigmoid(hyperparams["multiplier"])
    np.testing.assert_allclose(estimate.hypergrad["multiplier"], -excess * sigma, rtol=1e-6)


def test_robust_darts_under_budgets_measures_the_validation_loss_in_alpha_alone():
    robust = nas.robust_darts(ROWS, (3,), ops={}, every=1)
    twice = nas.under_budget(
        nas.under_budget(robust, row_table(), budget=60.0), row_table(), budget=100.0, multiplier=1.0
    )
    both = twice.hyperparams(KEY)

    @jax.jit
    def run():
        state = twice.estimator.init(KEY, both, TASK)
        estimate, after = twice.estimator.estimate(both, TASK, state)
        trained = after.estimator.inner
        loop = robust.problem.loop
        loss = lambda alpha: robust.problem.outer_loss(loop.params(trained), alpha, TASK.valid, loop.context(trained))
        flat, unravel = jax.flatten_util.ravel_pytree(twice.alpha(both))
        return estimate.metrics["curvature"], jax.hessian(lambda x: loss(unravel(x)))(flat)

    curvature, hessian = run()
    values = np.linalg.eigvalsh(hessian)
    expected = values[np.argmax(abs(values))]
    assert abs(expected) > 1e-4
    np.testing.assert_allclose(curvature, expected, rtol=1e-6)


def test_penalties_read_only_the_weights_of_ops():
    cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    network = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2)
    table = nas.cost_table(network, (3,), nas.num_params, ops=nas.BLOCKS)
    penalty = nas.resource_penalty(table, network, weight=1.0, target=50.0)
    context = base.Context(KEY, jnp.array(5))
    batch = {"x": TASK.train["x"], "y": TASK.train["y"]}
    for method, options in ((nas.beta_darts, {"num_steps": 10}), (nas.pc_darts, {"partial": 2})):
        plain, more = (method(network, (3,), ops=nas.BLOCKS, **options, **p) for p in ({}, {"penalty": penalty}))

        @jax.jit
        def run(plain=plain, more=more):
            alpha, params = plain.hyperparams(KEY), plain.supernet.init(KEY)
            return alpha, params, *(s.problem.outer_loss(params, alpha, batch, context) for s in (more, plain))

        alpha, params, with_it, without = run()
        ops = alpha["cell"]["ops"] if isinstance(alpha["cell"], dict) else alpha["cell"]
        expected = table.expected_cost({"cell": jax.nn.softmax(ops, -1)}, network) / 50
        np.testing.assert_allclose(with_it - without, expected, rtol=1e-6)
    bound = nas.under_budget(nas.pc_darts(network, (3,), ops=nas.BLOCKS, partial=2), table, budget=30.0)
    bounded = jax.jit(lambda: bound.problem.outer_loss(params, bound.hyperparams(KEY), batch, context))()
    assert jnp.isfinite(bounded)


def test_edges_of_pc_darts_are_kept_by_both_of_its_weights():
    cell = nas.complete_cell(3, ("none", "skip_connect", "mlp"))
    network = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2, keep=1)
    table = nas.cost_table(network, (3,), nas.num_params, ops=nas.BLOCKS)
    # Edges from the input are surer of their op, and weak in the sum of their node.
    weak = np.array([edge.source == 0 for edge in cell.edges])
    alpha = {"ops": np.where(weak[:, None], [-9.0, 9.0, -9.0], [-9.0, 0.0, 6.0]), "edges": np.where(weak, -2.0, 2.0)}
    alpha = {"cell": jax.tree.map(jnp.asarray, alpha)}
    for keep in (1, None):
        search = nas.pc_darts(network, (3,), ops=nas.BLOCKS, partial=2, keep=keep)
        excess = _budgets.over_budget(table, search.supernet.network, budget=1.0)
        weights = search.weights(alpha) if keep else {"cell": jax.nn.softmax(alpha["cell"]["ops"], -1)}
        expected = table.expected_cost(weights, search.supernet.network)
        np.testing.assert_allclose(1 + excess(alpha, 0), expected, rtol=1e-9)
        grads = jax.grad(excess)(alpha, 0)["cell"]
        assert jnp.abs(grads["ops"]).max() > 0.01 and not grads["edges"].any()
        if keep:
            np.testing.assert_allclose(expected, table.cost_of(network, search.genotype(alpha)), rtol=0.02)


def test_the_op_none_costs_nothing_in_every_unit():
    table = nas.cost_table(CELLS, (8, 6, 1), hypergrad.flops, ops=nas.NAS_BENCH_201_OPS)
    empty = {"cell": ()}
    zeros = np.eye(5)[np.zeros(6, int)]  # all on "none"
    np.testing.assert_allclose(table.expected_cost({"cell": zeros}), table.cost_of(CELLS, empty))
    skips = {"cell": tuple((*e[:2], "skip_connect") for e in CELLS.cells["cell"].edges)}
    assert table.cost_of(CELLS, empty) <= table.cost_of(CELLS, skips)


def test_layers_before_a_cell_without_edges_from_its_input_have_costs():
    """As dead code it is not in the count of the whole network; a cell that is cut behind them is."""
    network, shape, ops, _ = SPACES["transnas"]
    x, counted = jax.ShapeDtypeStruct((1, *shape), jnp.float64), []
    for edges in ((), ((0, 1, "conv3x3"), (2, 3, "conv3x3"))):
        small = nas.supernet(nas.discrete(network, {"cell": edges}), shape, ops=ops)
        flops = FLOPS(lambda params, x, small=small: small.apply(params, None, x), jax.eval_shape(small.init, KEY), x)
        counted.append(flops / table_of("transnas", "flops").cost_of(network, {"cell": edges}))
    assert counted[0] < 0.1 and counted[1] == 1


def test_the_projection_changes_the_edge_that_loses_least():
    weights = {"linear.width": np.array([[0.4, 0.6]]), "linear.depth": np.array([[0.1, 0.9]])}
    sizes = lambda g: [edges[0][2] for edges in g.values()]
    project = lambda budget: sizes(nas.within_budget(ROWS, weights, row_table(), budget))
    assert project(1_000) == ["16", "2"]  # 4·16 + 17·16 + 17·2 = 370
    assert project(369) == ["2", "2"]  # 8 + 6 + 6 = 20
    assert project(19) == ["2", "1"]  # 14


def test_costs_of_a_space_that_keeps_two_edges_a_node():
    """At weights that say one network, C is its cost; it is the mean over the ops of the edges that are kept."""
    table, rng = table_of("darts", "params"), np.random.default_rng(3)
    for seed in range(3):
        genotype = nas.random_genotype(seed, DARTS)
        weights = nas.one_hot(DARTS, genotype)
        cost = table.cost_of(DARTS, genotype)
        np.testing.assert_allclose(table.expected_cost(weights, DARTS), cost, rtol=1e-12)
        # As after a search: much weight on its ops, a little on all others, "none" among them.
        near = {kind: 1e-6 * rng.random(w.shape) + w for kind, w in weights.items()}
        near = {kind: w + 10.0 * (np.arange(3) == 0) for kind, w in near.items()}
        near = {kind: w / w.sum(-1, keepdims=True) for kind, w in near.items()}
        np.testing.assert_allclose(table.expected_cost(near, DARTS), cost, rtol=1e-3)
        assert float(table.expected_cost(near)) < 0.9 * cost  # of all edges, mostly "none"
    weights = jax.device_get(weights_of(DARTS))
    kept = nas.derive_genotype(DARTS, weights)
    options = [("skip_connect", "sep_conv_3x3")] * sum(map(len, kept.values()))
    mean = 0.0
    for drawn in itertools.product(*options):
        names, chance, chosen = iter(drawn), 1.0, {}
        for kind, edges in kept.items():
            chosen[kind] = []
            for s, t, _ in edges:
                (e,) = [i for i, edge in enumerate(DARTS.cells[kind].edges) if edge[:2] == (s, t)]
                op, w = next(names), weights[kind][e]
                chance *= float(w[1 + (op == "sep_conv_3x3")] / w[1:].sum())
                chosen[kind].append((s, t, op))
        mean += chance * table.cost_of(DARTS, {kind: tuple(edges) for kind, edges in chosen.items()})
    np.testing.assert_allclose(table.expected_cost(weights, DARTS), mean, rtol=1e-9)
    flat, unravel = jax.flatten_util.ravel_pytree(nas.init_alpha(KEY, DARTS, scale=1.0))
    excess = _budgets.over_budget(table, DARTS, budget=mean)
    jax.test_util.check_grads(jax.jit(lambda flat: excess(unravel(flat), 0)), (flat,), order=1)
    np.testing.assert_allclose(excess(unravel(flat), 0), 0.0, atol=1e-9)


def test_a_budget_counts_the_edges_that_the_search_keeps():
    cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    network = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2)
    table = nas.cost_table(network, (3,), nas.num_params, ops=nas.BLOCKS)
    alpha, costs = {"cell": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))}, []
    for keep in (1, None):
        search = nas.darts(network, (3,), ops=nas.BLOCKS, keep=keep)
        expected = table.expected_cost(search.weights(alpha), network._replace(keep=keep))
        # What `under_budget` asks of a search.
        excess = _budgets.over_budget(table, search.supernet.network, budget=1.0)(search.alpha(alpha), 0)
        np.testing.assert_allclose(excess, expected - 1, rtol=1e-9)
        costs.append(float(expected))
    assert abs(costs[0] - costs[1]) > 1


@pytest.mark.parametrize("seed", range(3))
def test_the_projection_keeps_as_many_edges_as_the_space(seed):
    table = table_of("darts", "params")
    alpha = nas.init_alpha(jax.random.key(seed), DARTS, scale=2.0)
    weights = jax.device_get(nas.mixing_weights(nas.softmax(), DARTS, alpha, KEY))
    whole = nas.derive_genotype(DARTS, weights)
    cost = table.cost_of(DARTS, whole)
    assert nas.within_budget(DARTS, weights, table, cost) == whole == nas.within_budget(DARTS, weights, table, 1e12)
    small = nas.within_budget(DARTS, weights, table, 0.8 * cost)
    assert small != whole and table.cost_of(DARTS, small) <= 0.8 * cost
    nas.genotype_to_text(small, form="darts")  # two edges into every node
    with pytest.raises(ValueError, match="the cheapest network found costs"):
        nas.within_budget(DARTS, weights, table, 1.0)
    by_edge = nas.within_budget(DARTS, weights, table, 1e12, keep=None)
    assert by_edge == nas.derive_genotype(DARTS, weights, keep=None) != whole


def test_the_projection_takes_another_edge_where_that_loses_less():
    """Into node 3 lead 0, 1 and 2; a pool is cheap, and stands on 1 -> 3, which is not among the two strongest."""
    cell = nas.complete_cell(2, ("max_pool_3x3", "sep_conv_3x3"), num_inputs=2)
    network = nas.Network({"cell": cell}, (nas.Layer("stem", 4), nas.Layer("cell", 4)), num_outputs=2)
    table = nas.cost_table(network, (4, 4, 1), nas.num_params, ops=nas.DARTS_OPS)
    w = np.array([[0.9, 0.1], [0.9, 0.1], [0.01, 0.99], [0.6, 0.4], [0.01, 0.98]])
    whole = nas.derive_genotype(network, {"cell": w})
    assert [edge[:2] for edge in whole["cell"]] == [(0, 2), (1, 2), (0, 3), (2, 3)]
    budget = table.cost_of(network, whole) - 1
    genotype = nas.within_budget(network, {"cell": w}, table, budget)
    assert genotype["cell"][2:] == ((0, 3, "sep_conv_3x3"), (1, 3, "max_pool_3x3"))


# ---- Fronts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_fronts_against_all_pairs(num_objectives):
    points = RNG.integers(0, 6, size=(60, num_objectives)).astype(float)
    points[7] = np.nan
    better = (points[:, None] <= points[None]).all(-1) & (points[:, None] < points[None]).any(-1)
    expected = np.flatnonzero(~better.any(0) & ~np.isnan(points).any(1))
    front = nas.pareto_front(points)
    assert sorted(front) == sorted(expected) and (np.diff(points[front, 0]) >= 0).all()


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_the_hypervolume_is_the_share_of_a_grid_that_is_dominated(num_objectives):
    points = RNG.integers(0, 7, size=(12, num_objectives)).astype(float)
    points = points[(points.sum(1) > 4) | (num_objectives == 1)]
    limit = np.arange(5, 5 + num_objectives)
    centers = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in limit], indexing="ij"), -1).reshape(-1, num_objectives)
    expected = (points[:, None] <= centers[None]).all(-1).any(0).sum()
    assert 0 < expected < np.prod(limit) or num_objectives == 1
    assert nas.hypervolume(points, limit) == expected
    assert nas.hypervolume(points + 100, limit) == 0
