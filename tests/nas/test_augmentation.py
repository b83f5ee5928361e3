"""Crops, flips and cutout of an image whose pixels hold their position; the auxiliary head."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import nas
from metaopt.nas import _augmentation

KEY = jax.random.key(0)
# Pixels are numbered from 1; not square; two channels.
IMAGE = np.arange(1.0, 6 * 9 * 2 + 1).reshape(6, 9, 2)
MANY = jnp.asarray(np.broadcast_to(IMAGE, (400, *IMAGE.shape)))


@jax.jit
def augmented(key):
    return nas.cutout(4)(key, MANY), nas.crop_and_flip(2)(key, MANY), nas.crop_and_flip(1, flip=False)(key, MANY)


def test_cutout_is_one_square_anywhere():
    cut = np.asarray(augmented(KEY)[0])
    assert ((cut == 0) | (cut == IMAGE)).all()
    zeros = (cut == 0).all(-1)
    corners = set()
    for mask in zeros:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)  # a rectangle
        # 4 along each axis, or less at the border: the center, after two of them, is in the image.
        for indices, length in ((rows, 6), (columns, 9)):
            assert (
                len(indices) == 4
                or (indices[0] == 0 and 2 <= len(indices))
                or (indices[-1] == length - 1 and 2 <= len(indices) + 1)
            )
        corners.add((rows[-1], columns[-1]))
    assert len(corners) > 20 and zeros.mean((1, 2)).max() == 16 / 54
    # Each example has its own.
    assert len(np.unique(zeros, axis=0)) > 20


def test_crops_move_and_flips_turn():
    _, both, moved = map(np.asarray, augmented(KEY))
    expected = {}
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    for i in range(5):
        for j in range(5):
            whole = padded[i : i + 6, j : j + 9]
            expected[whole.tobytes()] = (i, j, False)
            expected[whole[:, ::-1].copy().tobytes()] = (i, j, True)
    moves = [expected[image.tobytes()] for image in both]  # a KeyError is an image that no crop gives
    assert len({f[:2] for f in moves}) == 25 and 0.4 < np.mean([f[2] for f in moves]) < 0.6
    padded = np.pad(IMAGE, ((1, 1), (1, 1), (0, 0)))
    plain = {padded[i : i + 6, j : j + 9].tobytes() for i in range(3) for j in range(3)}
    assert {image.tobytes() for image in moved} == plain


def test_cutout_of_sequences_is_one_window():
    x = jnp.ones((50, 7, 1))
    cut = np.asarray(nas.cutout(2)(KEY, x))
    assert set((cut == 0).sum((1, 2)).tolist()) == {1, 2}


def test_the_auxiliary_head_is_the_published_one_on_8_by_8():
    head = _augmentation.auxiliary_head(3, widths=(4, 5))
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 2))
    init = jax.jit(lambda: head.init(KEY, x.shape[1:], 3, 1))
    params = init()
    outputs = jax.jit(lambda p, x: head.apply(p, x, 3, 1))(params, x)
    p = jax.tree.map(np.asarray, params)
    relu, norm = lambda x: np.maximum(x, 0), lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    # Average pooling of 5 with stride 3, 1×1, and a convolution over the 2 × 2 positions that are left.
    pooled = np.stack([[relu(x)[:, i : i + 5, j : j + 5].mean((1, 2)) for j in (0, 3)] for i in (0, 3)])
    near = (pooled @ p["near"]).reshape(-1, 4)  # positions and examples are normalized together
    near = relu((near - near.mean(0)) / np.sqrt(near.var(0) + 1e-5)).reshape(2, 2, 6, 4)
    whole = relu(norm(np.moveaxis(near, 2, 0).reshape(6, -1) @ p["whole"]))
    np.testing.assert_allclose(outputs, whole @ p["w"] + p["b"], rtol=1e-9)
    for shape in [(1, 3, 2), (7, 2), (2, 2, 1)]:
        y = jax.eval_shape(lambda k, x, s=shape: head.apply(head.init(k, s, 3, 1), x, 3, 1), KEY, jnp.ones((4, *shape)))
        assert y.shape == (4, 3)
