"""Over tasks and over seeds: loops, chunks, padding, order, and non-finite estimates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner

KEY = jax.random.key(0)
TASKS = [problems.regression_task(seed) for seed in range(4)]
BATCH = problems.stack(TASKS)


def linear():
    """F_i(λ) = Σ (λ − a_i)², whose state counts its calls; `valid` is a_i. λ of two leaves."""

    def value(hyperparams, task):
        return ((hyperparams["u"] - task.valid[:2]) ** 2).sum() + (hyperparams["v"] - task.valid[2]) ** 2

    def estimate(hyperparams, task, state):
        f, grads = jax.value_and_grad(value)(hyperparams, task)
        count = state["count"] + 1
        metrics = {"first": task.valid[0], "count": count}
        return base.Estimate(f, grads, count >= task.train, metrics), {**state, "count": count}

    return base.Estimator(lambda key, hp, task: {"count": jnp.int32(0), "key": key}, estimate, kind="exact")


LINEAR = linear()
LAM = {"u": jnp.array([0.5, -1.0]), "v": jnp.array(2.0)}


@functools.cache
def over_linear(**options):
    """`LINEAR` over tasks, and its compiled estimate: one program for all tests with these options."""
    estimator = hypergrad.over_tasks(LINEAR, **options)
    return estimator, jax.jit(estimator.estimate)


def run_linear(tasks, **options):
    estimator, estimate = over_linear(**options)
    return estimate(LAM, tasks, estimator.init(KEY, LAM, tasks))


def linear_tasks(num=6):
    points = np.random.default_rng(0).normal(size=(num, 3))
    return base.Task(np.arange(num) % 3 + 1, points)


def run(estimator, tasks, hyperparams=LAM, key=KEY):
    return jax.jit(estimator.estimate)(hyperparams, tasks, estimator.init(key, hyperparams, tasks))


def flat(tree):
    """Leaves as arrays, keys as their data."""
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]


@pytest.mark.once
def test_equals_a_loop_over_tasks():
    # To rounding: vmap turns products of a matrix and a vector into products of matrices.
    estimator = hypergrad.unrolled(problems.RIDGE, num_steps=5)
    estimate, state = run(hypergrad.over_tasks(estimator), BATCH, problems.LAM)
    one = jax.jit(estimator.estimate)
    keys = jax.random.split(KEY, len(TASKS))
    singles = [one(problems.LAM, task, estimator.init(k, None, None)) for task, k in zip(TASKS, keys, strict=True)]
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *[(e.value, e.hypergrad) for e, _ in singles])
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), mean, rtol=1e-12, atol=1e-15)
    chex.assert_trees_all_equal(flat(state), flat(jnp.stack([s for _, s in singles])))
    assert estimate.done.tolist() == [True] * 4


@pytest.mark.parametrize("task_chunk", [1, 4, 6, 10])
@pytest.mark.once
def test_chunks_equal_one_vmap(task_chunk):
    expected, expected_state = run_linear(linear_tasks())
    estimate, state = run_linear(linear_tasks(), task_chunk=task_chunk)
    chex.assert_trees_all_close(estimate, expected, rtol=1e-13)
    chex.assert_trees_all_equal(flat(state), flat(expected_state))
    assert {k: v.dtype for k, v in estimate.metrics.items()} == {k: v.dtype for k, v in expected.metrics.items()}


@pytest.mark.parametrize(("dtype", "target", "task_chunk"), [(jnp.bfloat16, 1.0, 1), (jnp.float16, 1000.0, None)])
@pytest.mark.once
def test_means_in_half_precision_neither_stop_growing_nor_overflow(dtype, target, task_chunk):
    # A sum in bfloat16 stays at 256 if ones are added, and a sum in float16 ends at 65,504.
    estimator = hypergrad.over_tasks(hypergrad.direct(lambda hp, task, key: hp * task), task_chunk=task_chunk)
    estimate, _ = run(estimator, jnp.full(1000, target, dtype), dtype(1.5))
    assert (estimate.value, estimate.hypergrad) == (1.5 * target, target)
    assert estimate.hypergrad.dtype == dtype


@pytest.mark.once
def test_a_ragged_tuple_equals_one_batch():
    tasks = linear_tasks()
    parts = tuple(jax.tree.map(lambda x, rows=rows: x[rows], tasks) for rows in (slice(0, 2), slice(2, 6)))
    expected, _ = run_linear(tasks)
    estimate, state = run_linear(parts, task_chunk=3)
    chex.assert_trees_all_close(estimate._replace(done=None), expected._replace(done=None), rtol=1e-13)
    np.testing.assert_array_equal(np.concatenate(estimate.done), expected.done)
    assert [d.shape for d in estimate.done] == [(2,), (4,)]
    assert [s["count"].tolist() for s in state] == [[1, 1], [1] * 4]


@pytest.mark.parametrize("sampler", [None, inner.minibatch(3)])
@pytest.mark.once
def test_padded_tasks_equal_unpadded_ones(sampler):
    # To rounding: sums have more terms, all of them zero.
    estimator = hypergrad.unrolled(problems.masked_problem(sampler), num_steps=6)  # a loop compiles faster than 4 steps
    tasks = problems.unpadded_tasks()
    estimate, _ = run(
        hypergrad.over_tasks(estimator), problems.stack([problems.pad(task) for task in tasks]), problems.LAM
    )
    keys = jax.random.split(KEY, len(tasks))
    one = jax.jit(estimator.estimate)
    singles = [one(problems.LAM, task, k)[0] for task, k in zip(tasks, keys, strict=True)]
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *[(e.value, e.hypergrad) for e in singles])
    assert optax.tree.norm(mean[1]) > 1e-3
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), mean, rtol=1e-10, atol=1e-14)


@pytest.mark.once
def test_permuting_the_tasks_permutes_the_slots():
    (estimator, once), tasks = over_linear(), linear_tasks()
    order = np.array([3, 0, 5, 1, 4, 2])
    state = estimator.init(KEY, LAM, tasks)
    estimate, after = once(LAM, tasks, state)
    permuted, permuted_after = once(
        LAM, jax.tree.map(lambda x: x[order], tasks), jax.tree.map(lambda x: x[order], state)
    )
    np.testing.assert_array_equal(permuted.done, estimate.done[order])
    assert 0 < estimate.done.sum() < 6
    chex.assert_trees_all_equal(flat(permuted_after), flat(jax.tree.map(lambda x: x[order], after)))
    chex.assert_trees_all_close(permuted._replace(done=None), estimate._replace(done=None), rtol=1e-13)


@pytest.mark.parametrize("task_chunk", [None, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
@pytest.mark.once
def test_a_task_that_is_not_finite_is_left_out_counted_and_done(bad, task_chunk):
    tasks = linear_tasks()
    tasks = tasks._replace(train=np.full(6, 5))
    others = np.array([0, 1, 3, 4, 5])
    expected, _ = run_linear(jax.tree.map(lambda x: x[others], tasks))
    tasks.valid[2] = bad
    estimate, state = run_linear(tasks, task_chunk=task_chunk) if task_chunk else run_linear(tasks)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), (expected.value, expected.hypergrad), rtol=1e-13)
    for name in ("first", "count", "hypergrad_variance"):
        np.testing.assert_allclose(estimate.metrics[name], expected.metrics[name], rtol=1e-12)
    assert estimate.done.tolist() == [False, False, True, False, False, False]
    counts = [int(estimate.metrics[f"num_{name}"]) for name in ("tasks", "finite", "nonfinite")]
    assert counts == [6, 5, 1]
    assert state["count"].tolist() == [1] * 6


def test_where_no_task_is_finite_the_mean_is_nan():
    tasks = linear_tasks()
    estimate, _ = run_linear(tasks._replace(valid=np.full((6, 3), np.nan)))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves((estimate.value, estimate.hypergrad)))
    assert estimate.done.all() and estimate.metrics["num_finite"] == 0


def per_task_gradients(tasks):
    return np.concatenate([2 * (LAM["u"][None] - tasks.valid[:, :2]), 2 * (LAM["v"] - tasks.valid[:, 2:])], axis=1)


@pytest.mark.once
def test_the_variance_over_tasks():
    tasks = linear_tasks()
    expected = per_task_gradients(tasks).var(axis=0, ddof=1).sum()
    for estimate, _ in (run_linear(tasks), run_linear(tasks, task_chunk=4)):
        np.testing.assert_allclose(estimate.metrics["hypergrad_variance"], expected, rtol=1e-12)
    one, _ = run_linear(jax.tree.map(lambda x: x[:1], tasks))
    assert one.metrics["hypergrad_variance"] == 0
    same = jax.tree.map(lambda x: np.repeat(x[:1], 6, axis=0), tasks)
    assert run_linear(same)[0].metrics["hypergrad_variance"] >= 0


@pytest.mark.parametrize("options", [{"max_norm": 5.0}, {"normalize": True}])
def test_each_tasks_hypergradient_is_clipped_or_normalized(options):
    tasks = linear_tasks()
    assert over_linear(**options)[0].kind == "biased"
    grads = per_task_gradients(tasks)
    norms = np.linalg.norm(grads, axis=1, keepdims=True)
    assert norms.min() < 5 < norms.max()
    scale = np.minimum(1, 5 / norms) if "max_norm" in options else 1 / norms
    hypergrad_ = run_linear(tasks, **options)[0].hypergrad
    np.testing.assert_allclose([*hypergrad_["u"], hypergrad_["v"]], (grads * scale).mean(0), rtol=1e-12)


def test_a_norm_whose_square_overflows():
    tasks = base.Task(jnp.ones(1, int), jnp.array([[1e200, 1e200, 2.0]]))
    problem = linear()._replace(
        estimate=lambda hyperparams, task, state: (
            base.Estimate(jnp.array(1.0), {"u": task.valid[:2], "v": task.valid[2]}, jnp.array(True), {}),
            state,
        )
    )
    for options in ({"max_norm": 1.0}, {"normalize": True}):
        hypergrad_ = run(hypergrad.over_tasks(problem, **options), tasks)[0].hypergrad
        np.testing.assert_allclose(hypergrad_["u"], np.sqrt([0.5, 0.5]), rtol=1e-12)


def test_a_zero_hypergradient_stays_zero_when_normalized():
    tasks = base.Task(np.ones(6, int), np.tile([0.5, -1.0, 2.0], (6, 1)))
    estimate, _ = run_linear(tasks, normalize=True)
    chex.assert_trees_all_equal(estimate.hypergrad, jax.tree.map(jnp.zeros_like, LAM))


def test_kinds_are_kept():
    pseudo = linear()._replace(kind="pseudo")
    assert hypergrad.over_tasks(pseudo).kind == hypergrad.over_tasks(pseudo, normalize=True).kind == "pseudo"
    unbiased = pseudo._replace(kind="unbiased")
    assert hypergrad.over_tasks(unbiased).kind == "unbiased"
    assert hypergrad.over_tasks(unbiased, max_norm=1.0).kind == "biased"
    assert hypergrad.over_tasks(linear()).kind == hypergrad.over_seeds(linear(), 2).kind == "exact"


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.once
def test_float32_stays_float32(x64):
    with jax.enable_x64(x64):
        tasks = jax.tree.map(lambda x: np.asarray(x, np.float32 if x.dtype == float else np.int32), linear_tasks())
        lam = jax.tree.map(lambda x: np.asarray(x, np.float32), LAM)
        for task_chunk in (None, 2):
            estimator = hypergrad.over_tasks(hypergrad.over_seeds(LINEAR, 2), task_chunk=task_chunk, max_norm=1.0)
            state = jax.eval_shape(estimator.init, KEY, lam, tasks)
            estimate, _ = jax.eval_shape(estimator.estimate, lam, tasks, state)
            for leaf in jax.tree.leaves((estimate.value, estimate.hypergrad)):
                assert leaf.dtype == np.float32


# Seeds.


@pytest.mark.once
def test_seeds_equal_a_loop():
    estimator = hypergrad.unrolled(problems.masked_problem(inner.minibatch(2)), num_steps=2)
    task = problems.unpadded_tasks()[0]
    estimate, state = run(hypergrad.over_seeds(estimator, 3), task, problems.LAM)
    one = jax.jit(estimator.estimate)
    singles = [one(problems.LAM, task, key)[0] for key in jax.random.split(KEY, 3)]
    assert len({float(e.value) for e in singles}) == 3
    mean = jax.tree.map(lambda *xs: sum(xs) / 3, *[(e.value, e.hypergrad) for e in singles])
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), mean, rtol=1e-9, atol=1e-13)
    assert state.shape == (3,) and estimate.done.shape == () and estimate.done


@pytest.mark.once
def test_a_seed_that_is_not_finite_is_left_out():
    def estimate(hyperparams, task, state):
        f, grads = jax.value_and_grad(lambda x: x * state)(hyperparams)
        return base.Estimate(f, grads, state > 1, {"state": state}), state

    estimator = hypergrad.over_seeds(base.Estimator(lambda key, hp, task: jnp.zeros([]), estimate, "exact"), 3)
    out, _ = estimator.estimate(2.0, problems.TASK, jnp.array([1.0, jnp.nan, 4.0]))
    assert (out.value, out.hypergrad, out.metrics["state"]) == (5.0, 2.5, 2.5)
    assert out.done and out.metrics["num_finite_seeds"] == 2
    out, _ = estimator.estimate(2.0, problems.TASK, jnp.full(3, jnp.nan))
    assert jnp.isnan(out.value) and jnp.isnan(out.hypergrad)
    assert estimator.estimate(2.0, problems.TASK, jnp.array([2.0, 3.0, 4.0]))[0].done
