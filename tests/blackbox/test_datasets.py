"""Tasks that are given as tables or images and their labels."""

import numpy as np
import pytest

import metaopt
from metaopt import base, blackbox, spaces, tasks
from metaopt.blackbox import _datasets

SPACE = {"x": spaces.interval(0.0, 1.0)}


def rows_of(best, rng, num=40):
    """A table whose classes are the farther apart the larger `best` is."""
    y = rng.permutation(np.arange(num) % 2)
    return rng.normal(size=(num, 3)) / 4 + 4 * best * (y[:, None] - 0.5), np.array(["no", "yes"])[y]


def images_of(best, rng, num=12):
    """Images with a share `best` of pixels above the mean."""
    return (rng.random((num, 6, 6)) < 0.1 + 0.4 * best).astype(float), np.arange(num) % 3


@pytest.mark.once
@pytest.mark.parametrize("data_of", [rows_of, images_of])
def test_tasks_are_described_by_their_data(data_of, tmp_path):
    rng = np.random.default_rng(0)
    line = [{"x": float(x)} for x in np.linspace(0, 1, 11)]
    bests = {f"t{t}": float(best) for t, best in enumerate(np.linspace(0, 1, 24))}
    records = [base.Record(name, c, (c["x"] - best) ** 2) for name, best in bests.items() for c in line]
    options = {"space": SPACE, "candidates": line, "num_steps": 60, "num_members": 2}
    datasets = {name: data_of(best, rng) for name, best in bests.items()}
    g = blackbox.train_meta_optimizer(records, datasets=datasets, **options)
    blind, errors = g.predict()["x"], []
    for best in (0.05, 0.3, 0.7, 0.95):
        x, y = data_of(best, rng)
        errors.append([abs(g.predict(x, y)["x"] - best), abs(blind - best)])
    assert np.mean(errors, 0)[0] < 0.7 * np.mean(errors, 0)[1]

    metaopt.save(tmp_path / "g.npz", g)
    loaded = metaopt.load(tmp_path / "g.npz")
    assert loaded.reads == g.reads == ("table" if data_of is rows_of else "images")
    features = _datasets.dataset_features((x, y))
    assert loaded.predict(x, y) == g.predict((x, y)) == g.predict(features) == g.portfolio(1, (x, y))[0]
    assert g.suggest([], [], (x, y)) == [g.predict(x, y)]
    np.testing.assert_array_equal(*(g.outcomes(line, new_task).mean for new_task in ((x, y), features)))


def test_features_do_not_depend_on_the_type_of_labels_or_of_the_container():
    rng = np.random.default_rng(0)
    x, y = rows_of(0.5, rng)
    table = tasks.Table("t", "t", x, (y == "yes").astype(int), np.zeros(3, bool), ("no", "yes"), "a test")
    expected = _datasets.dataset_features((x, y))
    assert dict(zip(_datasets.TABLE_FEATURES, expected, strict=True))["nr_inst"] == 40
    for dataset in (table, [x.tolist(), list(y)], (x, y == "yes")):
        np.testing.assert_array_equal(_datasets.dataset_features(dataset), expected)
    images, labels = images_of(0.5, rng)
    expected = _datasets.dataset_features((images, labels))
    np.testing.assert_allclose(_datasets.dataset_features((images[..., None] * 255, labels + 5)), expected, rtol=1e-4)


def test_a_target_with_fractions_is_cut_into_quarters():
    x, y = np.random.default_rng(0).normal(size=(40, 3)), np.linspace(0.25, 9, 40)
    values = dict(zip(_datasets.TABLE_FEATURES, _datasets.dataset_features((x, y)), strict=True))
    assert values["nr_class"] == 4 and values["class_ent"] == 2  # bits: equal shares


def test_features_are_not_datasets():
    for features in (None, [0.3, 0.1], (0.3, 0.1), np.zeros(2), base.Task(None, None, [0.3])):
        assert not _datasets.is_dataset(features)


def test_numeric_targets_of_a_corpus_are_cut_alike():
    rng = np.random.default_rng(0)
    x, price = rng.normal(size=(60, 3)), rng.normal(size=60) * 40 + 200
    classes = [_datasets.dataset_features((x, y))[2] for y in (price, price.round(), (price > 200) * 1.0)]
    assert classes == [4, 4, 2]
