"""A tabular network in one file predicts new rows of a frame as the network does with the prepared table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt
from metaopt import automl, spaces, tasks


def test_a_loaded_model_predicts_new_rows_as_the_network_and_the_prepared_table(tmp_path):
    rng = np.random.default_rng(0)
    size, color = rng.normal(size=80), rng.choice(["red", "blue", "green"], 80)
    label = np.where(size + (color == "red") > 0.3, "big", "small").astype(object)
    size[::9] = np.nan
    frame = {"size": size, "color": color, "sold": [f"2024-{1 + k % 12:02}-03" for k in range(80)], "label": label}
    table = tasks.prepare(frame, "label", test_fraction=0.0)
    network, task = automl.tabular_network(num_steps=20, num_hidden=4), automl.tabular_task(table)
    changed = {"linear_scale": jnp.array(1.7), "hinge_scale": jnp.array(0.6)}
    hyperparams = spaces.default(network.space) | changed
    params = automl.train(network, jax.random.key(0), hyperparams, task)
    path = tmp_path / "model.npz"
    saved = automl.TabularModel(params, hyperparams, table.encoder, table.columns, table.classes)
    metaopt.save(path, saved)

    new = {"color": ["green", "red", None], "sold": ["2025-01-01", "?", "2024-05-03"], "size": [0.1, -3.0, np.nan]}
    model = metaopt.load(path)
    rows = {**task.valid, "x": table.transform(new)}
    expected = np.exp(network.log_probabilities(params, hyperparams, rows))
    np.testing.assert_array_equal(model.predict_proba(new), saved.predict_proba(new))
    np.testing.assert_allclose(model.predict_proba(new), expected, rtol=1e-6)
    assert model.predict(new).tolist() == table.classes[expected.argmax(axis=1)].tolist()
    assert set(model.predict(frame)) == {"big", "small"} and expected.std(axis=0).min() > 0.01
    with pytest.raises(ValueError, match="color"):
        model.predict({"size": [0.1], "sold": ["2025-01-01"]})
    with pytest.raises(ValueError, match="one for each row and class|do not fit each other"):
        metaopt.save(tmp_path / "other.npz", saved._replace(classes=np.array(["big", "middle", "small"], object)))
    assert not (tmp_path / "other.npz").exists()


def test_a_table_without_names_takes_numbers(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 2))
    table = tasks.prepare(tasks.Table("t", "t", x, (x[:, 0] > 0).astype(int), np.zeros(2, bool)))
    network = automl.tabular_network(num_steps=5, num_hidden=4)
    params = automl.train(network, jax.random.key(0), spaces.default(network.space), automl.tabular_task(table))
    model = automl.TabularModel(params, spaces.default(network.space), None, table.columns, table.classes)
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(loaded.predict_proba(x), model.predict_proba(x))
    assert set(loaded.predict(x)) == {0, 1}
