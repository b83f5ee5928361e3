"""Sharding over four or eight (host) devices equals the same on one; the devices must be made before JAX starts."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

RUN = """
    import jax
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    import chex, numpy as np, optax
    import small_estimators as small
    from metaopt import base, hypergrad, training

    assert jax.device_count() == 8
    whole = small.carried()
    split = training.shard(whole, jax.make_mesh((4,), ("tasks",), devices=jax.devices()[:4]))
    assert split.kind == whole.kind
    key, lam = jax.random.key(0), {"x": 0.5}

    def close(a, b, rtol=1e-12):
        chex.assert_trees_all_close(*(jax.tree.map(np.asarray, small.plain(t)) for t in (a, b)), rtol=rtol)

    # Two tasks a device: all finite; one left out; a device with none left; unequal counts; none at all.
    tasks = np.asarray(small.sample(key, 8))
    compiled = [(jax.jit(e.init), jax.jit(e.estimate)) for e in (whole, split)]
    for bad in ([], [3], [4, 5], [0, 2, 3, 7], range(8)):
        drawn = tasks.copy()
        drawn[list(bad)] = np.nan
        (a, a_state), (b, b_state) = (
            estimate(lam, drawn, init(key, lam, drawn)) for init, estimate in compiled
        )
        assert a.metrics["num_finite"] == b.metrics["num_finite"] == 8 - len(bad)
        close(a, b)
        close(a_state, b_state)
        assert b.done.sharding.num_devices == b_state.params.sharding.num_devices == 4

    # The whole loop, resumed in the middle.
    def fit(estimator, **kwargs):
        learner = training.learner(estimator, optax.adam(0.1))
        arguments = {"sample_tasks": lambda key: small.sample(key, 8), "hyperparams": lam, "num_steps": 7, "key": key}
        return training.fit(learner, **(arguments | kwargs))

    import tempfile
    with tempfile.TemporaryDirectory() as directory:
        unbroken = fit(split)
        close(fit(whole)[:-1], unbroken[:-1], rtol=1e-9)  # all but why they stopped, a string
        fit(split, num_steps=4, checkpoint_dir=directory)
        assert small.bits(fit(split, checkpoint_dir=directory)) == small.bits(unbroken)

    # Numbers of tasks that eight devices do not divide: fewer than devices, and more; one of them left out.
    eight = jax.make_mesh((8,), ("tasks",))
    split = training.shard(whole, eight)
    compiled[1] = jax.jit(split.init), jax.jit(split.estimate)
    for num in (1, 3, 11, 20):
        for bad in ([], [num - 1]):
            drawn = np.asarray(small.sample(jax.random.key(num), num)).copy()
            drawn[bad] = np.nan
            state = whole.init(key, lam, drawn)
            assert small.bits(split.init(key, lam, drawn)) == small.bits(state)
            for _ in range(small.HORIZON):  # each estimate carries the state of the one before
                (a, state), (b, split_state) = (estimate(lam, drawn, state) for _, estimate in compiled)
                assert a.metrics["num_tasks"] == b.metrics["num_tasks"] == num
                close(a, b)
                close(state, split_state)
    uneven = lambda key: small.sample(key, 11)
    close(*(fit(estimator, sample_tasks=uneven)[:-1] for estimator in (whole, split)), rtol=1e-9)

    # A tuple of batches, one with fewer tasks than devices; the first task is alone on its device.
    one = small.carried_single()
    init, estimate = lambda k, h, t: one.init(k, h, t.train), lambda h, t, s: one.estimate(h, t.train, s)
    over_tasks = hypergrad.over_tasks(base.Estimator(init, estimate, one.kind))
    split_tuple = training.shard(over_tasks, eight)
    ragged = tuple(base.Task(small.sample(jax.random.key(num), num), ()) for num in (7, 2, 9))
    outs = [jax.jit(e.estimate)(lam, ragged, e.init(key, lam, ragged)) for e in (over_tasks, split_tuple)]
    close(outs[0], outs[1])
    assert outs[0][0].metrics["num_tasks"] == outs[1][0].metrics["num_tasks"] == 18

    # A tuple of batches, and a mesh with another axis, and outside jit.
    mesh = jax.make_mesh((2, 2), ("other", "tasks"), devices=jax.devices()[:4])
    pair, pair_split = small.paired(whole), training.shard(small.paired(whole), mesh)
    both = (tasks, tasks[:2] + 1)
    outs = [e.estimate(lam, both, e.init(key, lam, both)) for e in (pair, pair_split)]
    close(outs[0], outs[1])
"""


SECOND_AXIS = """
    import jax
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp, numpy as np, optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from metaopt import base, hypergrad, inner, training

    mesh = jax.make_mesh((2, 4), ("tasks", "other"), axis_types=(AxisType.Auto,) * 2)
    x, y = jax.random.normal(jax.random.key(0), (4, 64, 32)), jax.random.normal(jax.random.key(1), (4, 64))
    tasks = base.Task((x, y), (x[:, ::-1] + 1, y))

    def problem(constrained=False):
        def loss(w, penalty, rows):
            hidden = w["in"] if not constrained else jax.lax.with_sharding_constraint(w["in"], P(None, "other"))
            errors = jnp.tanh(rows[0] @ hidden) @ w["out"] - rows[1]
            return jnp.mean(errors**2) + penalty * jnp.sum(w["in"] ** 2)

        init = lambda key, penalty, data: {"in": jax.random.normal(key, (32, 64)) / 8, "out": jnp.ones(64) / 8}
        return inner.problem(inner.loop(loss, lambda penalty: optax.sgd(0.1), init=init), loss)

    def compiled(split, tasks, constrained=False):
        estimator = hypergrad.over_tasks(hypergrad.unrolled(problem(constrained), num_steps=4))
        estimator = training.shard(estimator, mesh) if split else estimator
        state = jax.jit(estimator.init)(jax.random.key(2), 0.1, tasks)
        program = jax.jit(estimator.estimate).lower(0.1, tasks, state).compile()
        estimate, _ = program(0.1, tasks, state)
        return np.array([estimate.value, estimate.hypergrad]), program.cost_analysis()["flops"]

    on_mesh = lambda *axes: jax.device_put(tasks, NamedSharding(mesh, P(*axes)))
    expected, _ = compiled(False, tasks)
    repeated, flops = compiled(True, on_mesh("tasks"))
    for values, fewer in (compiled(True, on_mesh("tasks", "other")), compiled(True, on_mesh("tasks"), True)):
        np.testing.assert_allclose(values, expected, rtol=1e-9)
        assert fewer < 0.4 * flops, (fewer, flops)  # of one device; a quarter, and what is not split
    np.testing.assert_allclose(repeated, expected, rtol=1e-9)
"""


def run(code):
    env = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    # As in `pyproject.toml`: another process may be writing the program.
    warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache entry:UserWarning"]
    command = [sys.executable, *warnings, "-c", textwrap.dedent(code)]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.once
def test_equals_the_unsharded_estimator_with_nonfinite_tasks_and_unequal_counts():
    run(RUN)


@pytest.mark.once
def test_a_second_axis_splits_the_rows_of_each_task_or_the_parameters_of_its_model():
    run(SECOND_AXIS)
