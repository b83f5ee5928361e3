"""Trained networks predict: one row as a thousand, statistics against NumPy, and files."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import metaopt
from metaopt import inner, nas

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)) + np.array([5.0, 0.0, -2.0])
LINEAR = nas.Network({}, (nas.Layer("linear", 4), nas.Layer("norm_relu", 4)), 2)
SUPERNET = nas.supernet(LINEAR, (3,), ops=nas.BLOCKS)
PARAMS = SUPERNET.init(KEY)


def by_hand(params, x, train):
    """The outputs of `LINEAR` for rows x, normalized by the rows `train`."""
    w, head = np.asarray(params["layers"][0]["w"][0]), jax.tree.map(np.asarray, params["head"])
    for layer in range(2):
        x, train = (x @ w, train @ w) if layer == 0 else (x, train)
        mean, scale = train.mean(0), np.sqrt(train.var(0) + 1e-5)
        x, train = (x - mean) / scale, (train - mean) / scale
    return np.maximum(x, 0) @ head["w"] + head["b"]


# ---- A small training -----------------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_retrained_network_predicts_one_image_as_all_images(tmp_path):
    """Of digits: the accuracy on the test images is that of one image at a time, and of batches of one class."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # rows of one writer follow one another
    images, labels = images[order].reshape(-1, 8, 8, 1) / 16, labels[order]
    data = {"x": jnp.asarray(images[:400]), "y": jnp.asarray(labels[:400])}
    x, y = images[400:600], labels[400:600]
    cell = nas.Cell(1, (nas.Edge(0, 1, ("nor_conv_3x3",)), nas.Edge(0, 2, ("skip_connect",))), (1, 2), preprocess=False)
    network = nas.Network({"cell": cell}, (nas.Layer("stem", 8), nas.Layer("cell", 16, 2)), 10)
    options = {"ops": nas.NAS_BENCH_201_OPS, "num_steps": 120, "batch_size": 32, "rate": 0.2, "drop_path": 0.1}
    setup = nas.retraining(network, (8, 8, 1), **options, auxiliary=0.1, auxiliary_widths=(4, 8))
    state = jax.jit(lambda: inner.run(setup.loop, 120)(KEY, None, data))()
    trained = setup.finish(state, data)

    outputs = trained.outputs(x)
    accuracy = trained.accuracy({"x": x, "y": y})
    assert outputs.shape == (200, 10) and accuracy == (outputs.argmax(-1) == y).mean() > 0.8
    np.testing.assert_array_equal(trained.predict(x), outputs.argmax(-1))
    alone = np.concatenate([trained.outputs(image[None]) for image in x])
    np.testing.assert_allclose(alone, outputs, rtol=1e-9, atol=1e-9)
    for label in range(10):
        same = trained.outputs(x[y == label])
        np.testing.assert_allclose(same, outputs[y == label], rtol=1e-9, atol=1e-9)
    # As in training, where the test images are one batch of one class, they are not recognized.
    in_training = jax.jit(lambda x: trained.supernet.apply(trained.params, None, x))
    by_batch = np.concatenate([np.asarray(in_training(x[y == label]).argmax(-1) == label) for label in range(3)])
    assert by_batch.mean() < 0.6

    metaopt.save(tmp_path / "digits.npz", trained)
    loaded = metaopt.load(tmp_path / "digits.npz", ops=nas.NAS_BENCH_201_OPS)
    np.testing.assert_array_equal(loaded.outputs(x[:32]), trained.outputs(x[:32]))
    assert loaded.supernet.network == network


# ---- Statistics -----------------------------------------------------------------------------------------------------


def test_statistics_are_of_the_real_training_rows():
    trained = nas.trained_network(SUPERNET, PARAMS, {"x": X[:30]})
    np.testing.assert_allclose(trained.outputs(X), by_hand(PARAMS, X, X[:30]), rtol=1e-9)
    np.testing.assert_allclose(trained.statistics[0].mean, (X[:30] @ PARAMS["layers"][0]["w"][0]).mean(0), rtol=1e-9)
    real = np.arange(40) % 3 > 0
    padded = {"x": np.where(real[:, None], X, np.nan), "mask": real.astype(float)}
    trained = nas.trained_network(SUPERNET, PARAMS, padded)
    np.testing.assert_allclose(trained.outputs(X), by_hand(PARAMS, X, X[real]), rtol=1e-9)


def test_rows_after_num_rows_are_padding():
    """As in training, where `inner.minibatch` does not draw them."""
    padded = {"x": np.concatenate([X[:30], np.full((10, 3), 20.0)]), "num_rows": jnp.int32(30)}
    trained = nas.trained_network(SUPERNET, PARAMS, padded)
    np.testing.assert_allclose(trained.outputs(X), by_hand(PARAMS, X, X[:30]), rtol=1e-9)
    y = trained.predict(padded["x"])
    for padding in (1 - y, -1):  # −1 is not a class
        assert trained.accuracy(padded | {"y": np.where(np.arange(40) < 30, y, padding)}) == 1
    marked = padded | {"mask": np.ones(40) - np.eye(40)[0]}  # the first 30 of the rows 1 to 39
    trained = nas.trained_network(SUPERNET, PARAMS, marked)
    np.testing.assert_allclose(trained.outputs(X), by_hand(PARAMS, X, padded["x"][1:31]), rtol=1e-9)


def test_more_rows_than_statistics_take_are_drawn_alike_whatever_their_order():
    """Sorted by class, the first rows would be of one class."""
    rows = np.concatenate([RNG.normal(size=(300, 3)), 50 + RNG.normal(size=(300, 3))])
    first, second = (nas.trained_network(SUPERNET, PARAMS, {"x": rows}, num_rows=64) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.statistics, second.statistics)
    mean = (rows @ PARAMS["layers"][0]["w"][0]).mean(0)
    np.testing.assert_allclose(first.statistics[0].mean, mean, rtol=0.4)
    assert abs(first.statistics[0].mean - mean).max() > 1e-6


def test_any_number_of_rows_and_types_of_numbers():
    trained = nas.trained_network(SUPERNET, PARAMS, {"x": X})
    many = np.tile(X, (16, 1))[:601]
    np.testing.assert_allclose(trained.outputs(many), by_hand(PARAMS, many, X), rtol=1e-9)
    assert trained.outputs(X[:0]).shape == (0, 2)
    whole = np.round(X).astype(np.int8)
    np.testing.assert_array_equal(trained.outputs(whole), trained.outputs(whole.astype(float)))


# ---- Files ----------------------------------------------------------------------------------------------------------


CELL = nas.complete_cell(2, ("none", "skip_connect", "linear"))
MIXED = nas.Network({"cell": CELL}, (nas.Layer("linear", 4), nas.Layer("cell", 4), nas.Layer("cell", 4)), 2)
SIZES = nas.mlp_space(2, widths=(2, 4), depths=(1, 2), norm="batch")
SAVED = {  # network, options of the supernet, whether there are mixing weights
    "discrete": (LINEAR, {}, False),
    "a mixture": (MIXED, {}, True),
    "one path": (MIXED, {"single_path": True}, True),
    "partial channels": (MIXED, {"partial": 2}, True),
    "sizes": (SIZES, {}, True),
}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.once
def test_files_hold_the_whole_network(name, tmp_path):
    network, options, mixed = SAVED[name]
    ops = {} if network is SIZES else nas.BLOCKS
    supernet = nas.supernet(network, (3,), ops=ops, **options)
    weights = nas.one_hot(network, nas.random_genotype(0, network)) if mixed else None
    if mixed and not supernet.single_path:
        weights = jax.tree.map(lambda w: 0.3 + w / 2, weights)
    trained = nas.trained_network(supernet, supernet.init(KEY), {"x": X}, weights=weights)
    # All training rows as one batch are normalized by the same statistics.
    np.testing.assert_allclose(trained.outputs(X), supernet.apply(trained.params, weights, X), rtol=1e-8, atol=1e-10)
    metaopt.save(tmp_path / "network.npz", trained)
    loaded = metaopt.load(tmp_path / "network.npz", ops=ops)
    np.testing.assert_array_equal(loaded.outputs(X), trained.outputs(X))
    assert loaded.supernet.network == network and trained.outputs(X).std() > 1e-3


def test_inputs_in_other_units_warn(tmp_path):
    """The network was trained with pixels from 0 to 1, and predicts pixels from 0 to 255; also after a file."""
    rows = {"x": np.clip(abs(X), 0, 1), "mask": np.arange(len(X)) < 8}
    trained = nas.trained_network(SUPERNET, PARAMS, rows)
    assert trained.largest == rows["x"][:8].max()
    metaopt.save(tmp_path / "network.npz", trained)
    for network in (trained, metaopt.load(tmp_path / "network.npz", ops=nas.BLOCKS)):
        network.predict(7.9 * rows["x"][:8])  # warnings are errors in the tests
        for pixels in (255 * rows["x"][:8], (-255 * rows["x"][:8]).astype(int)):
            data = {"x": pixels, "y": np.zeros(len(pixels), int)}
            for use, argument in ((network.outputs, pixels), (network.predict, pixels), (network.accuracy, data)):
                message = "an entry of size .*, and the training rows had none above"
                with pytest.warns(UserWarning, match=message) as record:
                    use(argument)
                assert [warning.filename for warning in record] == [__file__]


def rewritten(path, **changes):
    """Writes the file again with other arrays, without those that are None."""
    with np.load(path) as file:
        arrays = {**{name: file[name] for name in file.files}, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_files_that_do_not_fit_are_rejected(tmp_path):
    path = tmp_path / "network.npz"
    trained = nas.trained_network(SUPERNET, PARAMS, {"x": X})
    save, load = (lambda: metaopt.save(path, trained)), metaopt.load
    with pytest.raises(ValueError, match="the array params.*not finite"):
        bad = jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)
        metaopt.save(path, trained._replace(params=bad))
    assert not path.exists()
    header = lambda **changes: np.frombuffer(
        json.dumps({**json.loads(np.load(path)["header"].tobytes()), **changes}).encode(), np.uint8
    )
    head = "params['head']['w']"
    own = {**nas.BLOCKS, "norm_relu": nas.BLOCKS["skip_connect"]}
    for change, ops, message in [
        (lambda: {}, {}, "`ops` has no op 'linear'"),
        (lambda: {}, own, r"unexpected arrays: .*statistics\[1\]"),
        (lambda: {head: np.ones((3, 2))}, nas.BLOCKS, re.escape(f"{head} should be floating-point of shape (4, 2)")),
        (lambda: {head: np.ones((4, 2), int)}, nas.BLOCKS, "should be floating-point"),
        (lambda: {head: np.full((4, 2), np.inf)}, nas.BLOCKS, "not finite"),
        (lambda: {"statistics[0].variance": -np.ones(4)}, nas.BLOCKS, "negative"),
        (lambda: {"statistics[0].mean": None}, nas.BLOCKS, r"statistics\[0\].mean should .* but it is missing"),
        (lambda: {"header": header(largest=-1.0)}, nas.BLOCKS, "largest input is -1.0"),
        (lambda: {"header": header(network={"version": 1})}, nas.BLOCKS, "does not describe a `TrainedNetwork`"),
    ]:
        save()
        rewritten(path, **change())
        with pytest.raises(ValueError, match=message):
            load(path, ops=ops)


# ---- Accuracy -------------------------------------------------------------------------------------------------------


def with_outputs(outputs):
    """A network that is only its outputs."""
    return nas.TrainedNetwork(SUPERNET, None, None, [], 16.0, lambda x: np.asarray(outputs(np.asarray(x))))


def test_accuracy_is_of_real_rows_among_real_classes():
    above = with_outputs(lambda x: np.stack([4.5 - x[:, 0], x[:, 0] - 4.5], 1))
    data = {"x": np.arange(11.0)[:, None], "y": np.array([0, 1] * 5 + [0])}
    assert above.accuracy(data) == pytest.approx(6 / 11)  # right are 0, 2, 4; 5, 7, 9
    assert above.accuracy({**data, "mask": np.arange(11) < 5}) == pytest.approx(3 / 5)
    last = with_outputs(lambda x: np.tile([0.0, 1.0, 2.0], (len(x), 1)))
    data = {"x": np.zeros((4, 1)), "y": np.array([0, 0, 1, 1])}
    assert last.accuracy(data) == 0.0 and last.accuracy({**data, "class_mask": np.array([1, 1, 0])}) == 0.5
    assert with_outputs(lambda x: np.full((len(x), 2), np.nan)).accuracy({**data, "y": np.zeros(4, int)}) == 0.0
    each = with_outputs(lambda x: np.stack([0 * x, x], -1))  # [N, positions, C]
    assert each.accuracy({"x": np.ones((8, 3)), "y": np.ones((8, 3), int)}) == 1.0


def test_accuracy_takes_labels_of_any_integers():
    x = np.arange(8.0)[:, None]
    y = (x[:, 0] > 3).astype(np.int32)
    above = with_outputs(lambda x: np.stack([3.5 - x[:, 0], x[:, 0] - 3.5], 1))
    for labels in (y, y > 0, y.astype(np.uint8), y.tolist()):
        assert above.accuracy({"x": x, "y": labels}) == 1.0
