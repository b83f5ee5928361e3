"""Rules inside `jax.shard_map`, tasks split over two (host) devices, equal `over_tasks` on one; devices come first."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

RUN = """
    import functools

    import jax
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)  # they take longer than they save
    import chex, optax, problems
    from jax.sharding import AxisType, PartitionSpec as P
    from metaopt import hypergrad

    RULES = {
        "unrolled": functools.partial(hypergrad.unrolled, num_steps=4, remat="sqrt"),
        "truncated": functools.partial(hypergrad.truncated, num_steps=4, truncation_length=2),
        "forward": functools.partial(hypergrad.forward, num_steps=3),
        "implicit": functools.partial(hypergrad.implicit, num_steps=3),
        "darts_fd": hypergrad.darts_fd,
        "f2sa": functools.partial(hypergrad.f2sa, num_steps=3, multiplier=lambda count: 2.0 + count),
        "persistent_es": functools.partial(
            hypergrad.persistent_es, num_steps=4, truncation_length=2, sigma=0.1, num_pairs=2
        ),
        "partition": lambda problem: hypergrad.partition(
            problem,
            {
                "unrolled": functools.partial(hypergrad.unrolled, num_steps=2),
                "implicit": functools.partial(hypergrad.warm_implicit, num_steps=2, adjoint_rate=0.4),
            },
            {"log_penalty": "implicit", "rate": "unrolled"},
        ),
    }
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(AxisType.Auto,))
    assert jax.device_count() == 2
    key, tasks = jax.random.key(0), problems.stack([problems.regression_task(seed) for seed in range(4)])

    def rated(problem):
        # As it is, with a rate that the loop's update is scaled by.
        def update(state, grads, model_state, hyperparams):
            grads = jax.tree.map(lambda g: hyperparams["rate"] * g, grads)
            return problem.loop.update(state, grads, model_state, hyperparams)
        return problem._replace(loop=problem.loop._replace(update=update))

    for name, make in RULES.items():
        problem, lam = problems.RIDGE, dict(problems.LAM)
        if name == "partition":
            problem, lam = rated(problem), lam | {"rate": jax.numpy.array(0.9)}
        rule = hypergrad.over_tasks(make(problem))

        def mean_over_devices(lam, tasks, state):
            estimate, state = rule.estimate(lam, tasks, state)
            return jax.lax.pmean((estimate.value, estimate.hypergrad), "tasks"), estimate.done, state

        split = jax.shard_map(
            mean_over_devices, mesh=mesh, in_specs=(P(), P("tasks"), P("tasks")),
            out_specs=(P(), P("tasks"), P("tasks")), check_vma=False,
        )

        def both(lam, tasks, states):
            estimate, whole = rule.estimate(lam, tasks, states[0])
            mean, done, parts = split(lam, tasks, states[1])
            return (estimate.value, estimate.hypergrad), mean, (estimate.done, done), (whole, parts)

        init = jax.jit(rule.init)(key, lam, tasks)
        states, both = (init, init), jax.jit(both)
        for call in range(2):  # the second from what the first carried
            expected, mean, done, states = both(lam, tasks, states)
        assert optax.tree.norm(expected[1]) > 1e-2, name
        chex.assert_trees_all_close(mean, expected, rtol=1e-10, custom_message=name)
        chex.assert_trees_all_equal(*done)
        data = lambda x: jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        chex.assert_trees_all_close(*jax.tree.map(data, states), rtol=1e-10, atol=1e-14, custom_message=name)
        assert all(leaf.sharding.num_devices == 2 for leaf in jax.tree.leaves(states[1])), name
        print(name)
"""


@pytest.mark.slow
def test_rules_inside_shard_map_equal_rules_outside():
    env = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    # As in `pyproject.toml`: another process may be writing the program.
    warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache entry:UserWarning"]
    command = [sys.executable, *warnings, "-c", textwrap.dedent(RUN)]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == "partition" and len(process.stdout.split()) == 8
