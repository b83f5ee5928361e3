"""The products that replace derivatives of strided convolutions: one as a loop, and the limit of the other."""

import itertools

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


def test_the_limit_of_columns_counts_window_channels_images_and_places(monkeypatch):
    """The columns of a transposed convolution are [N, spatial..., window..., D]."""
    x, w = np.zeros((2, 3, 3, 5), np.float32), np.zeros((3, 3, 5, 4), np.float32)
    params = {"lhs_dilation": (2, 2), "rhs_dilation": (1, 1), "window_strides": (1, 1)}
    for limit, expected in ((2 * 9 * 9 * 4 * 4, True), (2 * 9 * 9 * 4 * 4 - 1, False)):
        monkeypatch.setattr(_convolution, "LARGE", limit)
        assert _convolution._spreads(x, w, (6, 6), params) == expected
