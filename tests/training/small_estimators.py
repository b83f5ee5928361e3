"""Estimators whose every number is known by hand, for one task and for batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base

HORIZON = 3


def quadratic() -> base.Estimator:
    """F(λ) = mean over tasks of (λ − a)², a batch of numbers; every horizon ends at once."""

    def estimate(hyperparams, task, state):
        value, hypergrad = jax.value_and_grad(lambda x: jnp.mean((x - task) ** 2))(hyperparams)
        return base.Estimate(value, hypergrad, jnp.ones(task.shape, bool), {"spread": jnp.std(task)}), state

    return base.Estimator(lambda key, hyperparams, task: jnp.zeros(task.shape), estimate, kind="exact")


class CarriedState(NamedTuple):
    params: jax.Array  # starts at λ; each estimate adds a random number: one rounding, however it is compiled
    age: jax.Array  # starts at random below HORIZON: staggered
    key: jax.Array


def carried_single() -> base.Estimator:
    """F(λ) = (λ["x"] − a)² + w²/100; w is carried over HORIZON estimates."""

    def init(key, hyperparams, task):
        age_key, key = jax.random.split(key)
        return CarriedState(hyperparams["x"] + 0.0, jax.random.bits(age_key) % HORIZON, key)

    def estimate(hyperparams, task, state):
        noise_key, key = jax.random.split(state.key)
        params = state.params + jax.random.uniform(noise_key)
        loss = lambda h: (h["x"] - task) ** 2 + params**2 / 100  # noqa: E731
        value, hypergrad = jax.value_and_grad(loss)(hyperparams)
        age = state.age + 1
        return base.Estimate(value, hypergrad, age >= HORIZON, {"age": age}), CarriedState(params, age, key)

    return base.Estimator(init, estimate, kind="biased")


def batched(single: base.Estimator) -> base.Estimator:
    """The mean over a batch of tasks, non-finite tasks left out: what `hypergrad.over_tasks` promises."""

    def init(key, hyperparams, tasks):
        num = jax.tree.leaves(tasks)[0].shape[0]
        return jax.vmap(single.init, (0, None, 0))(jax.random.split(key, num), hyperparams, tasks)

    def estimate(hyperparams, tasks, state):
        each, state = jax.vmap(single.estimate, (None, 0, 0))(hyperparams, tasks, state)
        finite = jnp.isfinite(each.value)
        num = finite.sum()
        mean = lambda x: jnp.where(finite, x, 0).sum() / num  # noqa: E731
        hypergrad = jax.tree.map(mean, each.hypergrad)
        squares = jnp.square(each.hypergrad["x"] - hypergrad["x"])
        metrics = {
            "num_tasks": jnp.array(finite.size),
            "num_finite": num,
            "num_nonfinite": finite.size - num,
            "hypergrad_variance": jnp.where(
                num > 0, jnp.where(finite, squares, 0).sum() / jnp.maximum(num - 1, 1), jnp.nan
            ),
            "age": mean(each.metrics["age"]),
        }
        return base.Estimate(mean(each.value), hypergrad, each.done | ~finite, metrics), state

    return base.Estimator(init, estimate, single.kind)


def carried() -> base.Estimator:
    return batched(carried_single())


def paired(one: base.Estimator) -> base.Estimator:
    """Two batches of tasks, of different shapes, that count as one."""

    def init(key, hyperparams, tasks):
        return tuple(one.init(key, hyperparams, batch) for batch in tasks)

    def estimate(hyperparams, tasks, states):
        (a, a_state), (b, b_state) = (one.estimate(hyperparams, *pair) for pair in zip(tasks, states, strict=True))
        num = a.metrics["num_finite"] + b.metrics["num_finite"]

        def mean(x, y):
            return (x * a.metrics["num_finite"] + y * b.metrics["num_finite"]) / num

        hypergrad = jax.tree.map(mean, a.hypergrad, b.hypergrad)
        out = base.Estimate(mean(a.value, b.value), hypergrad, (a.done, b.done), {"num_finite": num})
        return out, (a_state, b_state)

    return base.Estimator(init, estimate, one.kind)


def sample(key: jax.Array, num: int = 4) -> jax.Array:
    return 1 + jax.random.normal(key, (num,))


def plain(tree):
    """PRNG keys as their data."""

    def data(x):
        is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, tree)


def bits(tree) -> list[bytes]:
    """Every leaf to the bit."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(plain(tree))]
