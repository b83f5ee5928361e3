"""The outer step: it renews only done slots, skips non-finite hypergradients, and is pure."""

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_estimators as small

from metaopt import base, training

KEY = jax.random.key(0)
LAM = {"x": 0.5}


def test_follows_the_closed_form_of_gradient_descent_on_a_quadratic():
    tasks, rate = np.array([1.0, 2.0, 6.0]), 0.1  # F = (λ − 3)² + var, so λ_t = 3 + (λ_0 − 3) (1 − 2 rate)^t
    init, step = training.learner(small.quadratic(), optax.sgd(rate))
    state = init(KEY, 7.0, tasks)
    for t in range(1, 6):
        state, metrics = step(state, tasks)
        error = 4 * (1 - 2 * rate) ** (t - 1)
        np.testing.assert_allclose(state.hyperparams, 3 + error * (1 - 2 * rate), rtol=1e-12)
        np.testing.assert_allclose(metrics["value"], error**2 + tasks.var(), rtol=1e-12)
        np.testing.assert_allclose(metrics["hypergrad_norm"], 2 * error, rtol=1e-12)
        np.testing.assert_allclose(metrics["spread"], tasks.std(), rtol=1e-12)
        assert (metrics["num_done"], metrics["skipped"], state.step) == (3, 0, t)


def check_slots(old, new, fresh_tasks, is_done):
    """Done slots have the fresh task and the age of a first estimate from a fresh state; others went on."""
    is_done = np.asarray(is_done)
    np.testing.assert_array_equal(new.tasks[is_done], fresh_tasks[is_done])
    np.testing.assert_array_equal(new.tasks[~is_done], old.tasks[~is_done])
    kept = jax.vmap(small.carried_single().estimate, (None, 0, 0))(old.hyperparams, old.tasks, old.estimator_state)[1]
    assert small.bits([x[~is_done] for x in new.estimator_state]) == small.bits([x[~is_done] for x in kept])
    assert not np.any(
        np.asarray(jax.random.key_data(new.estimator_state.key) == jax.random.key_data(kept.key))[is_done]
    )
    assert np.all(new.estimator_state.age[is_done] <= small.HORIZON)


@pytest.mark.once
def test_done_slots_are_renewed_and_the_others_kept_to_the_bit():
    init, step = map(jax.jit, training.learner(small.carried(), optax.sgd(0.1)))
    state = init(KEY, LAM, small.sample(KEY, 16))
    assert not state.done.any()
    partly = 0
    for t in range(8):
        fresh = small.sample(jax.random.key(100 + t), 16)
        new, metrics = step(state, fresh)
        check_slots(state, new, fresh, state.done)
        assert metrics["num_done"] == new.done.sum()
        partly += 0 < state.done.sum() < 16
        state = new
    assert partly > 4


def test_the_initial_state_and_a_step_share_one_trace():
    rule, traces = small.quadratic(), []

    def estimate(*args):
        traces.append(args)
        return rule.estimate(*args)

    init, step = map(jax.jit, training.learner(rule._replace(estimate=estimate), optax.sgd(0.1)))
    step(init(KEY, 7.0, jnp.zeros(2)), jnp.zeros(2))
    assert len(traces) == 1


def test_a_learner_can_be_sent_to_another_process():
    init, step = training.learner(small.quadratic(), optax.sgd(0.25))
    step(init(KEY, 7.0, jnp.zeros(2)))  # with its trace
    assert len(cloudpickle.dumps((init, step))) > 100  # joblib, Dask and Ray send functions in this form


def test_a_fresh_state_starts_from_the_current_hyperparams():
    estimator = small.quadratic()._replace(init=lambda key, hyperparams, task: hyperparams + 0 * task)
    init, step = training.learner(estimator, optax.sgd(0.1))
    state, _ = step(init(KEY, 7.0, jnp.zeros(2)))
    np.testing.assert_array_equal(state.estimator_state, [7.0, 7.0])
    new, _ = step(state)
    np.testing.assert_array_equal(new.estimator_state, [state.hyperparams] * 2)


def test_fresh_states_have_keys_of_their_own():
    def estimate(hyperparams, task, key):
        return base.Estimate(hyperparams**2, 2 * hyperparams, jnp.array(True), {}), key

    rule = base.Estimator(lambda key, hyperparams, task: key, estimate, "exact")
    init, step = training.learner(rule, optax.sgd(0.1))
    state = init(KEY, 7.0, jnp.zeros(2))
    keys = [KEY, state.key, state.estimator_state]  # the keys of the learner and of the new state
    state, _ = step(state)  # keeps the fresh state of `init`
    keys.append(state.key)
    for _ in range(2):
        state, _ = step(state)
        keys += [state.key, state.estimator_state]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


@pytest.mark.once
def test_without_fresh_tasks_done_slots_restart_on_their_task():
    init, step = map(jax.jit, training.learner(small.carried(), optax.sgd(0.1)))
    state = init(KEY, LAM, small.sample(KEY))
    for _ in range(5):
        new, _ = step(state)
        check_slots(state, new, state.tasks, state.done)
        state = new


@pytest.mark.once
def test_a_tuple_of_batches_is_renewed_batch_by_batch():
    init, step = map(jax.jit, training.learner(small.paired(small.carried()), optax.sgd(0.1)))
    state = init(KEY, LAM, (small.sample(KEY, 5), small.sample(KEY, 2)))
    for t in range(5):
        fresh = (small.sample(jax.random.key(t), 5), small.sample(jax.random.key(t), 2))
        new, metrics = step(state, fresh)
        assert metrics["num_done"] == sum(d.sum() for d in new.done)
        for i in range(2):
            old_i, new_i = (s._replace(tasks=s.tasks[i], estimator_state=s.estimator_state[i]) for s in (state, new))
            check_slots(old_i, new_i, fresh[i], state.done[i])
        state = new


@pytest.mark.once
def test_tasks_of_another_shape_renew_every_slot():
    init, step = training.learner(small.carried(), optax.sgd(lambda count: 0.1 * (count + 1)))
    state, _ = step(init(KEY, LAM, small.sample(KEY, 4)))
    fresh = small.sample(KEY, 6)
    new, _ = jax.jit(step)(state, fresh)
    np.testing.assert_array_equal(new.tasks, fresh)
    assert new.estimator_state.params.shape == new.done.shape == (6,)
    # λ and the optimizer's count go on: the second step has rate 0.2.
    before = state.hyperparams["x"]
    np.testing.assert_allclose(new.hyperparams["x"], before - 0.2 * 2 * (before - fresh.mean()), rtol=1e-12)
    assert new.step == 2


def test_a_step_without_a_finite_hypergradient_changes_neither_hyperparams_nor_optimizer():
    init, step = training.learner(small.quadratic(), optax.adam(0.1))
    state, _ = step(init(KEY, 7.0, jnp.ones(2)))
    bad, metrics = step(state, jnp.array([1.0, jnp.nan]))
    assert (metrics["skipped"], metrics["num_done"], bad.step) == (1, 2, 2)
    assert not np.isfinite(metrics["hypergrad_norm"])
    assert small.bits((bad.hyperparams, bad.opt_state)) == small.bits((state.hyperparams, state.opt_state))
    good, metrics = step(bad, jnp.ones(2))
    assert metrics["skipped"] == 0
    expected, _ = step(state, jnp.ones(2))
    assert small.bits((good.hyperparams, good.opt_state)) == small.bits((expected.hyperparams, expected.opt_state))


def test_a_skipped_step_has_the_derivative_of_the_identity():
    """Also where the optimizer's derivative at NaN is NaN, such as that of Adam."""
    estimator = small.quadratic()._replace(
        estimate=lambda hyperparams, task, state: (
            base.Estimate(hyperparams + task, hyperparams + task, jnp.array(True), {}),
            state,
        )
    )
    init, step = training.learner(estimator, optax.adam(0.1, eps_root=1e-8))

    def after(hyperparams, task):
        return step(init(KEY, hyperparams, task), task)[0].hyperparams

    assert jax.grad(after)(7.0, jnp.nan) == 1
    np.testing.assert_allclose(jax.grad(after)(0.0, 1e-4), 1 - 0.1 * 1e-8 / (2e-8) ** 1.5, rtol=1e-3)


@pytest.mark.once
def test_scanned_and_vmapped_steps_equal_the_loop():
    init, step = map(jax.jit, training.learner(small.carried(), optax.adam(0.1)))
    keys = jax.random.split(KEY, 3)
    num_steps = 7

    def run(key):
        draws = jax.vmap(small.sample)(jax.random.split(key, num_steps))
        return jax.lax.scan(step, init(key, LAM, small.sample(key)), draws)

    states, metrics = jax.vmap(run)(keys)
    for i, key in enumerate(keys):
        state, values = init(key, LAM, small.sample(key)), []
        for draw in jax.random.split(key, num_steps):
            state, out = step(state, small.sample(draw))
            values.append(out["value"])
        np.testing.assert_allclose(metrics["value"][i], values, rtol=1e-12)
        last = jax.tree.map(lambda x, i=i: x[i], states)
        np.testing.assert_array_equal(jax.random.key_data(last.key), jax.random.key_data(state.key))
        assert small.bits(last.estimator_state.key) == small.bits(state.estimator_state.key)
        arrays = [(s.hyperparams, s.opt_state, s.estimator_state[:2], s.tasks, s.done) for s in (last, state)]
        chex.assert_trees_all_close(*arrays, rtol=1e-12)


def test_the_optimizer_is_given_the_value():
    by_value = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda updates, state, params=None, *, value, **_: (-value * jnp.ones(()), state)
    )
    init, step = training.learner(small.quadratic(), by_value)
    state, metrics = step(init(KEY, 7.0, jnp.ones(2)))
    assert (state.hyperparams, metrics["value"]) == (7.0 - 36.0, 36.0)


def test_python_numbers_do_not_make_it_trace_twice():
    init, step = training.learner(small.quadratic(), optax.adam(0.1))
    step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    state = init(KEY, 7.0, np.ones(2))
    for _ in range(3):
        state, _ = step(state, np.ones(2))


def young():
    """`small.carried`, where every start is a whole horizon before its end."""
    single = small.carried_single()

    def init(key, hyperparams, task):
        state = single.init(key, hyperparams, task)
        return state._replace(age=jnp.zeros_like(state.age))

    return small.batched(single._replace(init=init))


@pytest.mark.once
def test_staggered_slots_end_one_after_another():
    init, step = map(jax.jit, training.learner(young(), optax.sgd(0.1), stagger=small.HORIZON))
    state, ends = init(KEY, LAM, small.sample(KEY, 6)), []
    np.testing.assert_array_equal(state.estimator_state.age, [0, 0, 1, 1, 2, 2])
    assert not state.done.any()
    for _ in range(2 * small.HORIZON):
        state, _ = step(state)
        ends.append(state.done)
    np.testing.assert_array_equal(ends, np.tile(np.repeat(np.eye(3, dtype=bool)[::-1], 2, axis=1), (2, 1)))


@pytest.mark.once
def test_a_slot_that_ends_while_others_go_ahead_waits_for_its_renewal():
    init, _ = training.learner(small.paired(young()), optax.sgd(0.1), stagger=2 * small.HORIZON)
    state = init(KEY, LAM, (small.sample(KEY, 6), small.sample(KEY, 1)))
    for part, is_done, ages in zip(state.estimator_state, state.done, ([0, 1, 2, 3, 3, 3], [0]), strict=True):
        np.testing.assert_array_equal(part.age, ages)
        np.testing.assert_array_equal(is_done, np.array(ages) == small.HORIZON)
