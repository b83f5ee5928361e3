"""Depthwise convolutions against their sum, written as a loop."""

import jax
import numpy as np
import pytest

from metaopt.inner._cpu import _depthwise


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, (1, 1), 1), (2, (2, 0), 1), (3, (1, 2), 2)])
def test_a_depthwise_convolution_along_one_axis_is_its_sum(stride, padding, dilation):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 9, 3)), rng.normal(size=(3, 3))
    padded = np.pad(x, ((0, 0), padding, (0, 0)))
    starts = range(0, padded.shape[1] - 2 * dilation, stride)
    expected = [sum(padded[:, q + dilation * k] * w[k] for k in range(3)) for q in starts]
    windows = (_depthwise.Window(3, stride, padding, 1, dilation),)
    y = jax.jit(_depthwise.convolution, static_argnums=2)(x, w, windows)
    np.testing.assert_allclose(y, np.stack(expected, 1), rtol=1e-12)
