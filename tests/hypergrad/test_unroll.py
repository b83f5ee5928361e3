"""Unrolled hypergradients: finite differences, forward and nested derivatives, checkpoints, weights, MAML."""

from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.flatten_util import ravel_pytree

from metaopt import base, hypergrad, inner
from metaopt.hypergrad import _unroll

KEY = jax.random.key(3)
DATA = problems.TASK.train


def everything_objective(num_steps=5, **options):
    solve = hypergrad.unroll(problems.EVERYTHING_LOOP, num_steps=num_steps, **options)
    loop = problems.EVERYTHING_LOOP

    def objective(hyperparams):
        state = solve(KEY, hyperparams, DATA)
        return problems.EVERYTHING.outer_loss(loop.params(state), hyperparams, problems.TASK.valid, loop.context(state))

    return jax.jit(objective)


def numerical_gradient(function, tree, eps=1e-5):
    """Central differences, entry by entry."""
    flat, unravel = ravel_pytree(tree)
    shifted = jax.vmap(lambda direction: function(unravel(flat + direction)))
    basis = eps * jnp.eye(flat.size)
    ahead, behind = jnp.split(shifted(jnp.concatenate([basis, -basis])), 2)  # one copy of the function
    return unravel((ahead - behind) / (2 * eps))


# Dropout, minibatches, running statistics and Adam; λ in the initialization, both losses and the optimizer.


@pytest.mark.once
def test_forward_and_reverse_equal_finite_differences_wherever_hyperparams_enter():
    objective = everything_objective(num_steps=6)  # a loop, which compiles faster than steps that are written out
    lam = problems.EVERYTHING_LAM
    expected = jax.jit(lambda lam: numerical_gradient(objective, lam))(lam)
    for name in lam._fields:  # every part has an influence, or else the test says nothing
        assert optax.tree.norm(getattr(expected, name)) > 1e-3, name
    forward, reverse = (jax.jit(jac(objective))(lam) for jac in (jax.jacfwd, jax.grad))
    chex.assert_trees_all_close(reverse, expected, rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_close(forward, reverse, rtol=1e-9, atol=1e-12)


@pytest.mark.once
def test_the_estimator_equals_finite_differences_of_its_own_value():
    estimator = hypergrad.unrolled(problems.EVERYTHING, num_steps=3, remat="step", outer="mean")
    lam = problems.EVERYTHING_LAM
    value = jax.jit(lambda lam: estimator.estimate(lam, problems.TASK, KEY)[0].value)
    expected = jax.jit(lambda lam: numerical_gradient(value, lam))(lam)
    estimate, _ = jax.jit(estimator.estimate)(lam, problems.TASK, KEY)
    chex.assert_trees_all_close(estimate.hypergrad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.once
def test_second_order_equals_finite_differences():
    grad = jax.jit(jax.grad(everything_objective(num_steps=6)))
    lam = problems.EVERYTHING_LAM
    leaves, structure = jax.tree.flatten(lam)
    keys = jax.random.split(KEY, len(leaves))
    v = structure.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    eps = 1e-6
    ahead, behind = (grad(optax.tree.add_scale(lam, sign * eps, v)) for sign in (1, -1))
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * eps), ahead, behind)
    for part in expected:
        assert optax.tree.norm(part) > 1e-3
    forward_over_reverse = jax.jit(lambda lam: jax.jvp(grad, (lam,), (v,))[1])(lam)
    chex.assert_trees_all_close(forward_over_reverse, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.once
def test_three_levels_equal_the_closed_form():
    # Level 1: θ ← θ − r(θ − a), so θ_3 = a (1 − (1 − r)³). Level 2: r ← r − s dF/dr, F = (θ_3 − b)²/2, two steps.
    # Level 3: the derivative with respect to s of F at the end.
    num_steps, outer_steps = 3, 2
    loop = inner.loop(
        lambda params, hyperparams, data: (params - data) ** 2 / 2,
        lambda hyperparams: optax.sgd(hyperparams["rate"]),
        init=lambda key, hyperparams, data: jnp.zeros([]),
    )
    a, b = 1.5, 0.9
    solve = hypergrad.unroll(loop, num_steps=num_steps)

    def level_2_loss(rate, hyperparams, data):
        return (loop.params(solve(KEY, {"rate": rate}, data)) - b) ** 2 / 2

    outer = inner.loop(
        level_2_loss, lambda step_size: optax.sgd(step_size), init=lambda key, step_size, data: jnp.array(0.2)
    )
    solve_outer = hypergrad.unroll(outer, num_steps=outer_steps)

    def nested(step_size):
        return level_2_loss(solve_outer(KEY, step_size, jnp.array(a)).params, None, jnp.array(a))

    def by_hand(step_size):
        theta = lambda rate: a * (1 - (1 - rate) ** num_steps)  # noqa: E731
        slope = lambda rate: (theta(rate) - b) * a * num_steps * (1 - rate) ** (num_steps - 1)  # noqa: E731
        rate = 0.2
        for _ in range(outer_steps):
            rate = rate - step_size * slope(rate)
        return (theta(rate) - b) ** 2 / 2

    for order in (jax.grad, lambda f: jax.grad(jax.grad(f)), lambda f: jax.jacfwd(jax.grad(f))):
        expected = order(by_hand)(0.1)
        assert abs(expected) > 1e-3
        np.testing.assert_allclose(jax.jit(order(nested))(0.1), expected, rtol=1e-11)


# Checkpoints and weights, on a problem that compiles fast: noise, statistics, momentum, a schedule.


def _small_loss(params, hyperparams, batch, context):
    noise = jax.random.normal(context.key, params.shape)
    stats = 0.5 * context.model_state + 0.5 * params
    return (
        jnp.tanh(params + 0.1 * noise - hyperparams["target"]) ** 2 + 0.1 * params * context.model_state
    ).sum(), stats


SMALL = inner.problem(
    inner.loop(
        _small_loss,
        lambda hyperparams: optax.sgd(hyperparams["rate"], momentum=0.5),
        init=lambda key, hyperparams, data: (jnp.array([0.3, -0.2]), jnp.zeros(2)),
        with_context=True,
    ),
    lambda params, hyperparams, batch, context: (jnp.sin(params) ** 2 + context.model_state**2).sum() * context.step,
    with_context=True,
)
SMALL_LAM = {"rate": jnp.array(0.2), "target": jnp.array([1.0, -0.5])}
SMALL_TASK = base.Task(None, None)


@pytest.mark.parametrize("num_steps", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 16, 17)), 5, 23])
@pytest.mark.once
def test_checkpointing_changes_nothing(num_steps):
    def results(remat, lam):
        def objective(lam):
            state = hypergrad.unroll(SMALL.loop, num_steps=num_steps, remat=remat)(KEY, lam, None)
            return (jnp.sin(state.params) ** 2 + state.model_state**2).sum()

        return jax.value_and_grad(objective)(lam)

    kinds = ("none", "step", "grads", "sqrt", *[3] * (num_steps > 17))
    expected, *others = jax.jit(lambda lam: [results(remat, lam) for remat in kinds])(SMALL_LAM)  # one program for all
    assert num_steps == 0 or optax.tree.norm(expected[1]) > 1e-2
    for other in others:  # the same operations, fused otherwise: equal to rounding
        chex.assert_trees_all_close(other, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.slow
def test_orders_of_nesting_agree():
    def hessian(outer, remat):
        def objective(lam):
            return jnp.sin(hypergrad.unroll(SMALL.loop, num_steps=5, remat=remat)(KEY, lam, None).params).sum()

        return jax.jit(outer(jax.grad(objective)))(SMALL_LAM)

    expected = hessian(jax.jacfwd, "none")
    assert optax.tree.norm(expected) > 1e-2
    for outer, remat in ((jax.jacfwd, "sqrt"), (jax.jacrev, "none"), (jax.jacrev, "step"), (jax.jacrev, "sqrt")):
        chex.assert_trees_all_close(hessian(outer, remat), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("length", [0, 1, 3, 5, 11, 28])
def test_checkpointed_scan_keeps_the_order_of_its_steps(length):
    xs = {"x": jnp.arange(1.0, length + 1), "unused": None}

    def step(carry, x):
        carry = 3 * carry + x["x"]
        return carry, {"carry": carry, "none": None}

    @jax.jit  # one program for all
    def scans():
        kinds = ("none", "step", "grads", "sqrt", 3, 4)
        return [_unroll.checkpointed_scan(step, jnp.array(1.0), xs, length=length, remat=remat) for remat in kinds]

    expected = [1.0]
    for x in range(1, length + 1):
        expected.append(3 * expected[-1] + x)
    for carry, ys in scans():
        assert carry == expected[-1]
        np.testing.assert_array_equal(ys["carry"], expected[1:])


@pytest.mark.parametrize(("remat", "most"), [("none", 256), ("step", 64), ("sqrt", 16), (3, 8), (6, 4)])
def test_the_values_stored_between_the_passes(remat, most):
    # The residuals of the reverse pass of 64 steps, in copies of a carry of 100 numbers that a step uses three times.
    _, pullback = jax.vjp(partial(three_uses, length=64, remat=remat), jnp.ones(100))
    stored = sum(leaf.size for leaf in jax.tree.leaves(pullback)) / 100
    assert most / 2 <= stored <= most + 2


def three_uses(carry, length, remat):
    def step(carry, _):
        return jnp.sin(jnp.cos(jnp.tanh(carry))), None

    return _unroll.checkpointed_scan(step, carry, None, length=length, remat=remat)[0].sum()


def test_offloaded_states_are_stored_in_the_memory_of_the_host(monkeypatch):
    # No CPU can do it, so JAX reports another platform, whose programs use memory of the host. We look at the program:
    # of 64 carries, the host has all, and the device none.
    gradient = lambda remat: jax.grad(partial(three_uses, length=64, remat=remat))
    program = lambda remat: str(jax.make_jaxpr(gradient(remat))(jnp.ones(100)))
    with pytest.raises(ValueError, match="the compiler for 'cpu' does not do"):
        program("offload")
    monkeypatch.setattr(jax, "default_backend", lambda: "of this test")
    in_host = SimpleNamespace(host_temp_size_in_bytes=8 * 4096, temp_size_in_bytes=0)
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda program: in_host)
    assert "f64<host>[64,100]" in program("offload") and "f64[64,100]" not in program("offload")
    assert "f64[64,100]" in program("step")
    start = jnp.linspace(0.1, 1, 100)
    np.testing.assert_allclose(jax.jit(gradient("offload"))(start), gradient("step")(start), rtol=1e-12)


def test_more_levels_need_less_memory():
    # The compiler's own count, in carries of 1000 numbers: about k T^(1/k), and a few of a step's.
    length, carries = 512, []
    for levels in (1, 2, 3):
        gradient = jax.jit(jax.grad(partial(three_uses, length=length, remat=levels)))
        carries.append(gradient.lower(jnp.ones(1000)).compile().memory_analysis().temp_size_in_bytes / 8000)
    for levels, num_carries in enumerate(carries, 1):
        assert num_carries < levels * length ** (1 / levels) + 8, carries
    assert carries[2] < 0.7 * carries[1] < 0.1 * carries[0]


def test_each_level_is_one_more_forward_pass():
    counts = [hypergrad.flops(jax.grad(partial(three_uses, length=64, remat=k)), jnp.ones(100)) for k in (1, 2, 3)]
    np.testing.assert_array_equal(np.diff(counts), 3 * 64 * 100)


def weighted_by_hand(hyperparams, weights, key):
    """A Python loop over steps."""
    train_key, _ = jax.random.split(jax.random.split(key)[0])
    loop = SMALL.loop
    state = loop.init(train_key, hyperparams, None)
    total = 0.0
    for weight in weights:
        state = inner.step(loop, state, hyperparams, None)
        total = total + weight * SMALL.outer_loss(loop.params(state), hyperparams, None, loop.context(state))
    return total


@pytest.mark.parametrize("remat", ["none", "sqrt"])
@pytest.mark.parametrize(
    ("outer", "weights"),
    [
        ("last", [0, 0, 0, 0, 1]),
        ("mean", [0.2] * 5),
        ([0.5, 2, 0, 1, -1], [0.5, 2, 0, 1, -1]),
        *(pytest.param(w, w, marks=pytest.mark.slow) for w in ([0, 0, 0, 0, 3], [1, 0, 0, 0, 0])),
    ],
)
@pytest.mark.once
def test_outer_weights_equal_a_loop_over_steps(outer, weights, remat):
    estimator = hypergrad.unrolled(SMALL, num_steps=5, outer=outer, remat=remat)
    estimate, _ = jax.jit(estimator.estimate)(SMALL_LAM, SMALL_TASK, KEY)
    expected = jax.jit(jax.value_and_grad(lambda lam: weighted_by_hand(lam, weights, KEY)))(SMALL_LAM)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), expected, rtol=1e-11, atol=1e-14)
    assert estimate.done


@pytest.mark.once
def test_a_one_hot_weight_at_the_last_step_is_the_last_step():
    estimates = [
        jax.jit(hypergrad.unrolled(SMALL, num_steps=3, outer=outer).estimate)(SMALL_LAM, SMALL_TASK, KEY)[0]
        for outer in ("last", [0, 0, 1.0])
    ]
    chex.assert_trees_all_equal(*estimates)


@pytest.mark.once
def test_steps_of_weight_zero_are_not_evaluated():
    # At the first step the outer loss is infinite, and infinity times zero would be NaN: for a schedule, too.
    problem = inner.problem(
        problems.RIDGE_LOOP,
        lambda params, hyperparams, batch, context: problems.mean_squares(params, batch) / (context.step - 1),
        with_context=True,
    )

    def estimate(outer, key=KEY):
        return hypergrad.unrolled(problem, num_steps=3, outer=outer).estimate(problems.LAM, problems.TASK, key)[0]

    skipped, early = estimate([0, 0, 1.0]), estimate([0, 0.5, 1.0])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((skipped, early)))
    scheduled = jax.jit(jax.vmap(estimate, (None, 0)))(jnp.array([0, 0, 1.0]), jnp.stack([KEY, KEY]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], scheduled), skipped, rtol=1e-12)


# MAML.


def maml_parts():
    def loss(params, data):
        return ((jnp.tanh(data["x"] @ params["w"] + params["b"][None]) @ params["out"] - data["y"]) ** 2).mean()

    loop = inner.loop(
        lambda params, hyperparams, batch: loss(params, batch),
        lambda hyperparams: optax.sgd(0.1),
        init=lambda key, hyperparams, data: hyperparams,
    )
    return loss, loop, inner.problem(loop, lambda params, hyperparams, batch: loss(params, batch))


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.once
def test_maml_equals_its_definition(num_steps):
    loss, _, problem = maml_parts()

    def maml(start):
        adapted = start
        for _ in range(num_steps):
            grads = jax.grad(loss)(adapted, DATA)
            adapted = jax.tree.map(lambda p, g: p - 0.1 * g, adapted, grads)
        return loss(adapted, problems.TASK.valid)

    start = problems.EVERYTHING_LAM.start
    estimate, _ = jax.jit(hypergrad.unrolled(problem, num_steps=num_steps).estimate)(start, problems.TASK, KEY)
    expected = jax.value_and_grad(maml)(start)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.once
def test_first_order_maml_is_the_gradient_at_the_adapted_parameters():
    loss, loop, problem = maml_parts()

    def stopped_grad(function, **options):
        gradient = jax.grad(function, **options)
        return lambda *args: jax.lax.stop_gradient(gradient(*args))

    start = problems.EVERYTHING_LAM.start
    estimator = hypergrad.unrolled(problem, num_steps=3, grad=stopped_grad)
    estimate, _ = jax.jit(estimator.estimate)(start, problems.TASK, KEY)
    adapted = inner.run(loop, num_steps=3)(KEY, start, DATA).params
    expected = jax.value_and_grad(loss)(adapted, problems.TASK.valid)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), expected, rtol=1e-10, atol=1e-13)
    exact, _ = jax.jit(hypergrad.unrolled(problem, num_steps=3).estimate)(start, problems.TASK, KEY)
    assert optax.tree.norm(optax.tree.sub(exact.hypergrad, expected[1])) > 1e-2


def test_zero_inner_steps_are_plain_training():
    loss, _, problem = maml_parts()
    start = problems.EVERYTHING_LAM.start
    estimate, _ = hypergrad.unrolled(problem, num_steps=0).estimate(start, problems.TASK, KEY)
    expected = jax.value_and_grad(loss)(start, problems.TASK.valid)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), expected, rtol=1e-12)


# Keys.


def test_every_estimate_has_its_own_draws_which_follow_from_the_key():
    estimator = hypergrad.unrolled(SMALL, num_steps=2)
    estimate = jax.jit(estimator.estimate)
    first, state = estimate(SMALL_LAM, SMALL_TASK, estimator.init(KEY, None, None))
    second, _ = estimate(SMALL_LAM, SMALL_TASK, state)
    repeated, _ = estimate(SMALL_LAM, SMALL_TASK, estimator.init(KEY, None, None))
    assert first.value != second.value
    chex.assert_trees_all_equal(first, repeated)


RULES_OF_FRESH_RUNS = {
    "unrolled": hypergrad.unrolled,
    "forward": hypergrad.forward,
    "implicit": partial(hypergrad.implicit, warm_start=False),
}


@pytest.mark.parametrize("name", RULES_OF_FRESH_RUNS)
def test_a_plain_run_with_the_stated_key_gives_the_outer_loss(name):
    """The keys are stated in `docs/rules.md`."""
    problem = problems.NOISY._replace(outer_batch=lambda key, task: jax.random.normal(key))
    rule, lam, task = RULES_OF_FRESH_RUNS[name](problem, num_steps=3), jnp.array(0.5), problems.NOISY_TASK
    estimate, _ = jax.jit(rule.estimate)(lam, task, rule.init(KEY, lam, task))
    train_key, outer_key = jax.random.split(jax.random.split(KEY)[0])
    if name == "implicit":
        train_key, outer_key, *_ = jax.random.split(jax.random.split(KEY)[1], 5)
    trained = inner.run(problem.loop, 3)(train_key, lam, task.train)
    batch = problem.outer_batch(outer_key, task)
    expected = problem.outer_loss(problem.loop.params(trained), lam, batch, problem.loop.context(trained))
    np.testing.assert_allclose(estimate.value, expected, rtol=1e-12)


@pytest.mark.once
def test_the_outer_batch_is_drawn_from_the_task():
    def half(key, task):
        rows = jax.random.permutation(key, 15)[:7]
        return jax.tree.map(lambda leaf: leaf[rows], task.valid)

    problem = inner.problem(problems.RIDGE_LOOP, problems.RIDGE.outer_loss, outer_batch=half, with_context=True)
    estimator = hypergrad.unrolled(problem, num_steps=2)
    values = [estimator.estimate(problems.LAM, problems.TASK, jax.random.key(seed))[0].value for seed in (0, 1)]
    whole = hypergrad.unrolled(problems.RIDGE, num_steps=2).estimate(problems.LAM, problems.TASK, KEY)[0].value
    assert len({*map(float, values), float(whole)}) == 3


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.1)])
@pytest.mark.once
def test_bounds_in_low_precision(dtype, bound):
    # Stated bounds on the hypergradient's relative error through 20 steps of ridge, with all arrays in one precision.
    estimate = lambda lam, task: hypergrad.unrolled(problems.RIDGE, num_steps=20).estimate(lam, task, jax.random.key(0))
    exact = estimate(problems.LAM, problems.TASK)[0].hypergrad["log_penalty"]
    narrow = jax.tree.map(lambda x: x.astype(dtype), (problems.LAM, problems.TASK))
    slope = estimate(*narrow)[0].hypergrad["log_penalty"]
    assert slope.dtype == dtype
    error = jnp.linalg.norm(slope.astype(jnp.float64) - exact) / jnp.linalg.norm(exact)
    assert error < bound, error


@pytest.mark.parametrize(("num_steps", "loops"), [(1, False), (5, False), (6, True)])
def test_up_to_five_steps_are_written_out_and_more_are_a_loop(num_steps, loops):
    step = lambda carry, x: (jnp.sin(carry) + x, carry)
    scan = partial(_unroll.checkpointed_scan, step, length=num_steps, remat="none")
    lowered = jax.jit(lambda carry: scan(carry, jnp.arange(float(num_steps)))).lower(0.5).as_text()
    assert ("stablehlo.while" in lowered) == loops


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_scanned_values_may_be_numpy_arrays(num_steps):
    table, start = np.arange(4.0), np.ones(4)

    def step(carry, x):
        carry += x[0]  # in place, were it numpy's
        return carry, carry[x[0].astype(int)]

    carry, ys = _unroll.checkpointed_scan(
        step, start, np.arange(num_steps)[:, None] % 2 + table[:1], length=num_steps, remat="none"
    )
    total = np.cumsum(np.arange(num_steps) % 2)
    np.testing.assert_array_equal(carry, 1 + total[-1] * np.ones(4))
    np.testing.assert_array_equal(ys, 1 + total)
    np.testing.assert_array_equal(start, np.ones(4))


def test_the_first_step_is_one_product_for_all_tasks():
    """Before it, tasks share their parameters, and under `vmap` the product of all has no axis of tasks."""
    x, w = jnp.ones((7, 4, 3)), jnp.ones((3, 3))

    def run(num_steps, x):
        step = lambda w, _: (w - x.T @ (x @ w), None)
        return _unroll.checkpointed_scan(step, w, None, length=num_steps, remat="none")[0]

    batched = lambda n: [
        equation.params["dimension_numbers"][1] != ((), ())
        for equation in jax.make_jaxpr(jax.vmap(partial(run, n)))(x).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert batched(1) == [False, True]  # x w, and then xᵀ (x w) of each task
