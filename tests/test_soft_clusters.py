"""Soft k-means by hypergradient: its steps, its outer loss and the derivative of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from experiments.automl import soft_clusters
from metaopt import spaces

pytestmark = pytest.mark.once  # an experiment
SETTINGS = soft_clusters.Settings(resamples=3, em_steps=4, outer_steps=3)


def rows(seed=0, num=90):
    """Three clusters in the first two columns; two columns of noise."""
    rng = np.random.default_rng(seed)
    centers = np.array([[0, 0], [4, 0], [0, 4]])[np.arange(num) % 3]
    return np.concatenate([centers + rng.normal(size=(num, 2)), rng.normal(size=(num, 2))], axis=1)


def in_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float) if leaf.dtype.kind == "f" else leaf, tree)


def test_soft_agreement_of_hard_clusters_is_nearly_the_adjusted_rand_index():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, 2000)
    second = np.where(rng.random(2000) < 0.7, first, rng.integers(0, 4, 2000))
    own = soft_clusters.soft_agreement(jnp.eye(4)[first], jnp.eye(4)[second])
    np.testing.assert_allclose(own, adjusted_rand_score(first, second), atol=5e-3)
    same, one = jnp.eye(4)[first], jnp.eye(4)[0 * first]
    assert soft_clusters.soft_agreement(same, same) > 0.99 and abs(soft_clusters.soft_agreement(one, one)) < 1e-9
    assert soft_clusters.soft_agreement(0.5 * same + 0.125, same) < 0.9  # softer clusters agree less


def test_steps_reach_a_minimum_of_the_free_energy_and_hard_ones_are_k_means():
    x, used = jnp.asarray(rows()), jnp.array([1.0, 1, 1, 0])
    start = jnp.concatenate([x[:3], jnp.zeros((1, 4))])
    hp = {"weights": jnp.full(4, 0.25), "width": jnp.array(0.3)}
    values = [soft_clusters.free_energy(soft_clusters.fit(start, hp, x, used, n), hp, x, used) for n in range(8)]
    assert np.all(np.diff(values) < 1e-12) and values[0] - values[-1] > 1e-3
    found = soft_clusters.fit(start, hp, x, used, 300)
    np.testing.assert_allclose(jax.grad(soft_clusters.free_energy)(found, hp, x, used), 0, atol=1e-9)
    hard = soft_clusters.fit(start, {**hp, "width": jnp.array(1e-4)}, x, used, 50)
    peer = KMeans(3, init=np.asarray(start[:3]), n_init=1, tol=0).fit(rows()).cluster_centers_
    np.testing.assert_allclose(hard[:3], peer, atol=1e-6)
    np.testing.assert_array_equal(hard[3], 0)


def test_hypergradients_equal_finite_differences_and_padded_columns_have_no_weight():
    task = in_float64(soft_clusters.task_of(rows(), 3, 0, SETTINGS, 8))
    start = spaces.default(soft_clusters.space(8)) | {"width": jnp.array(0.3)}
    z = jax.tree.map(lambda leaf: leaf + 0.0, spaces.to_unconstrained(soft_clusters.space(8), start))
    loss = jax.jit(lambda z: soft_clusters.outer_loss(z, task, None, 4))
    slopes = jax.grad(loss)(z).coordinates
    leaves, structure = jax.tree.flatten(z)
    for i, name in enumerate(sorted(start)):
        for j in np.ndindex(leaves[i].shape):
            moved = [
                structure.unflatten([*leaves[:i], leaves[i].at[j].add(h), *leaves[i + 1 :]]) for h in (1e-5, -1e-5)
            ]
            np.testing.assert_allclose(slopes[name][j], (loss(moved[0]) - loss(moved[1])) / 2e-5, rtol=1e-4, atol=1e-9)
    assert np.abs(slopes["weights"][:4]).min() > 1e-5 and np.abs(slopes["width"]) > 1e-5
    np.testing.assert_allclose(slopes["weights"][4:], 0, atol=1e-12)


def test_tuning_increases_the_stability_beyond_that_of_normal_rows():
    settings = SETTINGS._replace(em_steps=8, outer_steps=20)
    result = soft_clusters.tuned(rows(), 0, settings, counts=(3,))
    assert result.after[0] > result.before[0] + 0.005
    np.testing.assert_allclose(result.weights.sum(), 1, rtol=1e-5)  # padded columns have none
    assert np.ptp(result.weights) > 0.05  # not those of the truth: a column of noise may gain, too
    np.testing.assert_allclose(result.inputs[0], rows() * np.sqrt(4 * result.weights[0]), rtol=1e-6)
