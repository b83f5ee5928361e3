"""The products that replace derivatives of strided convolutions: one as a loop, and the limit of the other."""

import itertools

import jax
import numpy as np

from metaopt.inner._cpu import _convolution


def test_few_outputs_from_many_places_are_sums_over_examples_and_places():
    """y[c, k, d] = Σ_{n, q} x[c, k + s q − pad, n] w[q, n, d], with k and q in two axes."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 7, 6, 8)), rng.normal(size=(3, 2, 8, 4))
    params = {"padding": ((1, 0), (0, 1)), "rhs_dilation": (2, 3), "precision": None}
    padded = np.pad(x, ((0, 0), *params["padding"], (0, 0)))
    expected = np.zeros((3, 3, 2, 4))
    for i, j, p, q in itertools.product(range(3), range(2), range(3), range(2)):
        expected[:, i, j] += padded[:, i + 2 * p, j + 3 * q] @ w[p, q]
    np.testing.assert_allclose(_convolution._gathered(x, w, (3, 2), params), expected, rtol=1e-10, atol=1e-12)


def test_the_limit_of_columns_counts_window_channels_images_and_places():
    """The columns of a transposed convolution are [N, spatial..., window..., D], here in float32: 4 bytes each."""
    params = {"lhs_dilation": (2, 2), "rhs_dilation": (1, 1), "window_strides": (1, 1)}

    def spreads(num, size, window, num_outputs):
        x = jax.ShapeDtypeStruct((num, size, size, 5), np.float32)
        w = jax.ShapeDtypeStruct((window, window, 5, num_outputs), np.float32)
        return _convolution._spreads(x, w, (2 * size, 2 * size), params)

    assert 4 * 2**12 * 16**2 * 2**2 * 16 == _convolution.LARGE
    assert spreads(2**12, 16, 2, 16)
    assert not any((spreads(2**12 + 1, 16, 2, 16), spreads(2**12, 17, 2, 16), spreads(2**12, 16, 2, 17)))
    assert not spreads(2**12, 16, 3, 16) and spreads(2**10, 16, 3, 16)
