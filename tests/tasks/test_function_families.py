"""Families of functions, compared with their documentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metaopt import tasks

KEYS = jax.random.split(jax.random.key(0), 3000)


def draw(sample):
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(sample))(KEYS))


def uniform(values, low, high):
    return stats.kstest((np.ravel(values) - low) / (high - low), "uniform").pvalue > 1e-3


@pytest.mark.once
def test_sinusoids():
    batch = draw(tasks.sinusoids(num_shots=3, num_query=4, noise=0.5))
    amplitude, phase = batch.meta["amplitude"], batch.meta["phase"]
    assert uniform(amplitude, 0.1, 5) and uniform(phase, 0, np.pi) and uniform(batch.support["x"][:, 1], -5, 5)
    exact = [amplitude[:, None, None] * np.sin(p["x"] - phase[:, None, None]) for p in (batch.support, batch.query)]
    np.testing.assert_allclose(batch.query["y"], exact[1], atol=1e-5)
    noise = (batch.support["y"] - exact[0]).ravel()
    assert stats.kstest(noise / 0.5, "norm").pvalue > 1e-3
    assert batch.support["x"].shape == (3000, 3, 1) and batch.support["x"].dtype == np.float32
    assert (batch.query["num_rows"] == 4).all() and (batch.query["mask"] == 1).all()


@pytest.mark.once
def test_coefficients_inputs_and_noise_are_drawn_apart():
    """Draws of one shape from one key would be equal: all three are [4, 1] here."""
    uniform = lambda key: jax.random.uniform(key, (4, 1), jnp.float32)
    family = tasks.function_episodes(uniform, lambda c, x: x, num_shots=3, num_query=1, inputs=(0.0, 1.0), noise=1.0)
    batch = draw(family)
    x = np.concatenate([batch.support["x"], batch.query["x"]], 1)
    noise = (batch.support["y"] - batch.support["x"])[..., 0]
    draws = np.concatenate([batch.meta[..., 0], x[..., 0], stats.norm.cdf(noise)], 1)  # [3000, 4 + 4 + 3]
    assert abs(np.corrcoef(draws.T) - np.eye(11)).max() < 4.5 / np.sqrt(3000)


@pytest.mark.once
def test_mixed_functions():
    batch = draw(tasks.mixed_functions(num_shots=2, num_query=3))
    family, (a, b, c) = batch.meta["family"], batch.meta["coefficients"].T
    assert stats.chisquare(np.bincount(family)).pvalue > 1e-3
    x, y = batch.query["x"][..., 0], batch.query["y"][..., 0]
    values = [
        a[:, None] * np.sin(x - b[:, None]),
        a[:, None] * x + b[:, None],
        a[:, None] * (x - b[:, None]) ** 2 + c[:, None],
    ]
    np.testing.assert_allclose(y, np.choose(family[:, None], values), atol=1e-4)
    assert (
        uniform(a[family == 0], 0.1, 5) and uniform(a[family == 1], -3, 3) and uniform(abs(a[family == 2]), 0.02, 0.15)
    )
    assert uniform(b[family == 0], 0, np.pi) and uniform(b[family == 2], -3, 3) and uniform(c[family == 2], -3, 3)
    assert 0.4 < (a[family == 2] > 0).mean() < 0.6


@pytest.mark.once
def test_a_range_may_be_traced():
    key = jax.random.key(0)
    amplitude = lambda high: tasks.sinusoids(amplitude=(0.1, high))(key).meta["amplitude"]
    np.testing.assert_allclose(jax.jit(amplitude)(2.0), amplitude(2.0), rtol=1e-6)


def test_a_range_of_one_number_fixes_it():
    assert tasks.sinusoids(amplitude=(2.0, 2.0))(KEYS[0]).meta["amplitude"] == 2
