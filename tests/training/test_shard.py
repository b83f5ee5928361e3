"""Sharding over four (host) devices equals the same on one; the devices must be made before JAX starts."""

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
    from metaopt import base, training

    assert jax.device_count() == 4
    whole = small.carried()
    split = training.shard(whole, jax.make_mesh((4,), ("tasks",)))
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
        sample_tasks = lambda key: small.sample(key, 8)
        arguments = {"hyperparams": lam, "num_steps": 7, "key": key} | kwargs
        return training.fit(learner, sample_tasks, **arguments)

    import tempfile
    with tempfile.TemporaryDirectory() as directory:
        unbroken = fit(split)
        close(fit(whole)[:-1], unbroken[:-1], rtol=1e-9)  # all but why they stopped, a string
        fit(split, num_steps=4, checkpoint_dir=directory)
        assert small.bits(fit(split, checkpoint_dir=directory)) == small.bits(unbroken)

    # A tuple of batches, and a mesh with another axis, and outside jit.
    mesh = jax.make_mesh((2, 2), ("other", "tasks"))
    pair, pair_split = small.paired(whole), training.shard(small.paired(whole), mesh)
    both = (tasks, tasks[:2] + 1)
    outs = [e.estimate(lam, both, e.init(key, lam, both)) for e in (pair, pair_split)]
    close(outs[0], outs[1])

    try:
        split.init(key, lam, tasks[:6])
    except ValueError as error:
        print(error)
"""


@pytest.mark.once
def test_equals_the_unsharded_estimator_with_nonfinite_tasks_and_unequal_counts():
    env = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    # As in `pyproject.toml`: another process may be writing the program.
    warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache entry:UserWarning"]
    command = [sys.executable, *warnings, "-c", textwrap.dedent(RUN)]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "divide the shape" in process.stdout  # reported by JAX
