"""Forward mode: a closed form, all other exact rules, the carried values, and the work that is done once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner, training

KEY = jax.random.key(3)
NUM_STEPS = 4


def exact_rules():
    options = {"num_steps": NUM_STEPS, "outer": "mean"}
    yield "forward", hypergrad.forward(problems.EVERYTHING, **options)
    yield "unrolled", hypergrad.unrolled(problems.EVERYTHING, **options)
    # "sqrt" recomputes stretches, and in them steps, as "step" does.
    yield "truncated", hypergrad.truncated(problems.EVERYTHING, **options, truncation_length=NUM_STEPS, remat="sqrt")


@pytest.mark.slow
def test_every_exact_rule_is_the_same_on_everything_at_once():
    # One program: initialization, dropout, minibatches, statistics, Adam; λ enters everywhere.
    @jax.jit
    def estimates(lam):
        keys = {"truncated": jax.random.split(KEY)[0]}  # it draws once a run, and the others once an estimate
        return {
            name: rule.estimate(lam, problems.TASK, rule.init(keys.get(name, KEY), lam, problems.TASK))[0][:3]
            for name, rule in exact_rules()
        }

    by_rule = estimates(problems.EVERYTHING_LAM)
    expected = by_rule.pop("unrolled")
    for part in expected[1]:
        assert optax.tree.norm(part) > 1e-3
    for name, estimate in by_rule.items():
        chex.assert_trees_all_close(estimate, expected, rtol=1e-9, atol=1e-12, custom_message=name)
    assert {rule.kind for _, rule in exact_rules()} == {"exact"}


def trained(hyperparams, task, num_steps):
    """θ_T of gradient descent on ridge from zero: (I − (I − 0.4 H)^T) θ*."""
    x = task.train["x"]
    hessian = x.T @ x / len(x) + jnp.diag(jnp.exp(hyperparams["log_penalty"]))
    shrunk = jnp.linalg.matrix_power(jnp.eye(len(hessian)) - 0.4 * hessian, num_steps)
    solution = problems.solution(hyperparams, task)
    return solution - shrunk @ solution


@pytest.mark.parametrize(("outer", "chunk"), [([0, 0, 0, 0, 3.0], 3), ([0, 0.5, 0, 2, 0], None)])
@pytest.mark.once
def test_equals_the_closed_form_over_tasks_and_devices(outer, chunk):
    batch = problems.stack([problems.regression_task(seed) for seed in range(3)])
    estimator = hypergrad.over_tasks(hypergrad.forward(problems.RIDGE, num_steps=5, outer=outer, chunk=chunk))
    estimator = training.shard(estimator, jax.make_mesh((1,), ("tasks",)))

    def mean(lam):
        def single(task):
            losses = [problems.mean_squares(trained(lam, task, t), task.valid) for t in range(1, 6)]
            return jnp.dot(jnp.array(outer), jnp.stack(losses))

        return jax.vmap(single)(batch).mean()

    expected = jax.jit(jax.value_and_grad(mean))(problems.LAM)
    estimate, _ = jax.jit(estimator.estimate)(problems.LAM, batch, estimator.init(KEY, problems.LAM, batch))
    assert optax.tree.norm(expected[1]) > 1e-2
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), expected, rtol=1e-10)


def wave_problem():
    """A loss whose only transcendental function is sin; its gradient's is cos."""
    loop = inner.loop(
        lambda params, hp, batch: (hp["scale"] * jnp.sin(params)).sum(),
        lambda hp: optax.sgd(hp["rate"]),
        init=lambda key, hp, data: jnp.linspace(0.0, 1.0, 500),
    )
    return inner.problem(loop, lambda params, hp, batch: (params**2).sum())


WAVE_LAM = {"rate": jnp.array(0.1), "scale": jnp.linspace(1.0, 2.0, 500)}


def shapes_of(jaxpr, primitives):
    """The shapes that the named primitives are applied to, anywhere in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in primitives:
            yield equation.invars[0].aval.shape
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(parameter, "jaxpr") or hasattr(parameter, "eqns"):
                yield from shapes_of(getattr(parameter, "jaxpr", parameter), primitives)


def test_the_step_itself_is_computed_once_and_not_for_every_tangent():
    estimator = hypergrad.forward(wave_problem(), num_steps=3)
    jaxpr = jax.make_jaxpr(estimator.estimate)(WAVE_LAM, problems.TASK, KEY)
    assert set(shapes_of(jaxpr.jaxpr, {"sin", "cos"})) == {(500,)}


def test_memory_does_not_depend_on_the_number_of_steps():
    def temporary(num_steps):
        estimator = hypergrad.forward(wave_problem(), num_steps=num_steps, outer="mean")
        compiled = jax.jit(estimator.estimate).lower({**WAVE_LAM, "scale": jnp.ones(())}, problems.TASK, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(4), temporary(400)
    assert few > 3 * 500 * 8  # θ and its tangents are counted
    assert many < few + 8 * 400 * 2  # a weight a step


def test_float32_stays_float32():
    lam, task = jax.tree.map(lambda x: np.asarray(x, np.float32), (problems.LAM, problems.TASK))
    estimate, _ = jax.jit(hypergrad.forward(problems.RIDGE, num_steps=2, outer="mean").estimate)(lam, task, KEY)
    assert estimate.hypergrad["log_penalty"].dtype == estimate.value.dtype == np.float32


def test_a_mean_of_losses_in_bfloat16_does_not_stop_growing():
    loop = inner.loop(lambda params, hp, data: 0 * params, lambda hp: optax.sgd(0.1), init=lambda key, hp, data: hp)
    problem = inner.problem(loop, lambda params, hp, batch: 1.5 * params)  # F(λ) = 1.5 λ
    rule = hypergrad.forward(problem, num_steps=1000, outer="mean")
    estimate, _ = jax.jit(rule.estimate)(jnp.bfloat16(2.0), problems.TASK, KEY)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), (3.0, 1.5), rtol=1e-2)
