"""Keyed permutations: every order occurs equally often, and a key keeps its orders in later versions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from metaopt._permutations import shuffled

KEY = jax.random.key(0)


def orders(num_epochs, size):
    """[epochs, size], one permutation per epoch."""
    epochs, positions = jnp.meshgrid(jnp.arange(num_epochs), jnp.arange(size), indexing="ij")
    return np.asarray(jax.jit(shuffled)(KEY, epochs, positions, size))


def test_every_order_of_four_rows_occurs_equally_often():
    drawn, counts = np.unique(orders(24 * 200, 4), axis=0, return_counts=True)
    assert [*map(tuple, drawn)] == list(itertools.permutations(range(4)))
    assert np.sum((counts - 200) ** 2 / 200) < 58.6  # 23 degrees of freedom: above once in 10,000 keys


def test_a_key_keeps_its_orders_in_later_versions():
    """A run that is resumed from a checkpoint reads the rows that it would have read without the interruption."""
    assert orders(3, 8).tolist() == [[6, 4, 2, 3, 7, 0, 1, 5], [1, 7, 6, 4, 3, 0, 5, 2], [7, 6, 3, 4, 5, 0, 2, 1]]
