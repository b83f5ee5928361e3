"""`metaopt.save` and `metaopt.load`: what holds for a file of any kind. `test_round_trips` has one row per kind."""

import contextlib
import json
import os
import pickle
import zipfile
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn import pipeline, preprocessing

import metaopt
from metaopt import automl, evaluation, spaces, tasks

SCORES: Any = {"m": {"u": np.ones((3, 1))}}
EVALUATION = evaluation.Evaluation(SCORES, {"u": np.ones(3)}, {"u": np.ones(3)}, {"m": False}, True, {}, "accuracy")
SPLIT = tasks.Split({"train": {"letters": {}}})
LAYER_NORM = nnx.LayerNorm(8, rngs=nnx.Rngs(0))


def group_norm(num_groups):
    return nnx.GroupNorm(8, num_groups=num_groups, rngs=nnx.Rngs(0))


class Runs:
    """Makes a folder when it is read from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_header(path, **changes):
    metaopt.save(path, EVALUATION)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes()) | changes
    np.savez(path, **arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "is of version 9; this metaopt reads 'metaopt.evaluation' up to version 1"),
        ({"format": "mine"}, "is not a file that .*: its format is 'mine'; this metaopt reads metaopt.*benchmark, "),
        ({"version": "new"}, "is not a file that `metaopt.save` wrote"),
        ({"format": ["metaopt.split"]}, "is not a file that `metaopt.save` wrote"),
        ({"format": "metaopt.benchmark"}, "does not describe a `Benchmark` as it should: it lacks 'tasks'"),
        (
            {"format": "metaopt.trained_network"},
            "needs `ops=`, the ops that the network was built with.*; got",
        ),
    ],
)
def test_headers_that_are_rejected(changes, message, tmp_path):
    with_header(tmp_path / "e.npz", **changes)
    with pytest.raises(ValueError, match=message):
        metaopt.load(tmp_path / "e.npz")


def test_parts_that_the_file_does_not_need_are_rejected(tmp_path):
    metaopt.save(tmp_path / "e.npz", EVALUATION)
    with pytest.raises(ValueError, match="holds a `Evaluation`: `metaopt.load` needs the path only; got `ops=`"):
        metaopt.load(tmp_path / "e.npz", ops={})


def test_garbage_is_rejected_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "e.npz"
    metaopt.save(path, EVALUATION)
    whole = path.read_bytes()
    for content in (b"", b"not a file of this kind", b"{", b"{}", whole[: len(whole) // 2], pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="e.npz is not a file that `metaopt.save` wrote"):
            metaopt.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="is not a file that"):
        metaopt.load(path)
    np.savez(path, header=np.array([Runs(tmp_path / "ran")], object))
    with pytest.raises(ValueError, match="is not a file that"):
        metaopt.load(path)
    assert not (tmp_path / "ran").exists()
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="is not a file that"):
        metaopt.load(tmp_path / "array.npy")
    with pytest.raises(FileNotFoundError):
        metaopt.load(tmp_path / "absent.npz")


def test_a_value_that_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "split.json"
    metaopt.save(path, SPLIT)
    before = path.read_bytes()
    for value, error, message in (
        ({"train": {}}, TypeError, "cannot save a dict; it saves .*Split"),
        (tasks.Split({"train": {"letters": {"rows": [np.int64(1)]}}}), ValueError, "`Split` cannot be written as JSON"),
        (tasks.Split({"train": {"letters": [1]}}), ValueError, "is not a split"),  # type: ignore[dict-item]
    ):
        with pytest.raises(error, match=message):
            metaopt.save(path, value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["split.json"]


def test_a_pipeline_is_saved_by_its_last_step(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 2))
    model = automl.AutoRegressor(models=("linear",), time_limit=None, preset="instant", verbose=False)
    pipe = pipeline.make_pipeline(preprocessing.StandardScaler(), model).fit(x, x[:, 0])
    with pytest.raises(TypeError, match="cannot save a Pipeline; it saves AutoClassifier"):
        metaopt.save(tmp_path / "model.npz", pipe)
    metaopt.save(tmp_path / "model.npz", pipe[-1])
    again = pipeline.make_pipeline(pipe[0], metaopt.load(tmp_path / "model.npz"))
    np.testing.assert_array_equal(again.predict(x), pipe.predict(x))


def test_a_pytree_needs_its_structure_shapes_and_finite_numbers(tmp_path):
    path, saved = tmp_path / "hyperparams.npz", {"rate": np.float32(0.5), "w": np.ones((2, 3), np.float32)}
    metaopt.save(path, saved)
    with pytest.raises(
        ValueError, match="holds a `Pytree`: `metaopt.load` needs `like=`, a pytree .*; got the path only"
    ):
        metaopt.load(path)
    for like, message in (
        (saved | {"w": np.ones((3, 2))}, r"leaf\['w'\] should be floating-point of shape \(3, 2\), but it is float32"),
        ({"rate": 0.0}, r"has unexpected arrays: leaf\['w'\]"),
        (saved | {"rate": 0}, r"`like` must be .* its leaf \['rate'\] is of type int"),
        (saved | {"w": np.ones((2, 3), int)}, r"leaf\['w'\] should be int64 of shape \(2, 3\), but it is float32"),
        (saved | {"more": 0.0}, r"leaf\['more'\] should be .*, but it is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            metaopt.load(path, like=like)
    before = path.read_bytes()
    for value, error, message in (
        ({"rate": np.nan}, ValueError, "rate"),
        ({"state": {"count": 3}}, TypeError, r"of arrays: its leaf \['state'\]\['count'\] is of type int"),
        ({"name": "sgd"}, TypeError, r"\['name'\] is of type str"),
        ({"names": np.array(["sgd"])}, TypeError, r"\['names'\] is of type <U3"),
        ({"bits": jnp.ones(2, jnp.int4)}, TypeError, r"\['bits'\] is of type int4"),
        ({"best": np.array([np.inf, 1e39])}, ValueError, r"\['best'\] has entries that are NaN, or beyond the largest"),
        ({"wave": np.complex64(1j * np.inf)}, ValueError, "wave"),  # its real part is NaN
        ({"wave": np.complex128(complex(np.inf, 1e39))}, ValueError, "wave"),
        ({"count": 3}, TypeError, r"\['count'\] is of type int"),
        ({}, TypeError, "of arrays: it has no leaf"),
    ):
        with pytest.raises(error, match=message):
            metaopt.save(path, value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("saved", "like", "message"),
    [
        (
            {"norm": LAYER_NORM},
            {"norm": group_norm(2)},
            r"leaf\['norm'\] is of type LayerNorm in the file and of type GroupNorm in",
        ),
        (
            optax.adam(0.1).init(1.0),
            optax.adabelief(0.1).init(1.0),
            r"leaf\[0\] is of type ScaleByAdamState .* ScaleByBelief",
        ),
        (spaces.Unconstrained({"a": 1.0}), {"a": 1.0}, "leaf is of type Unconstrained .* plain container in `like`"),
        ({"a": 1.0}, spaces.Unconstrained({"a": 1.0}), "leaf is of type plain container .* Unconstrained in `like`"),
    ],
)
def test_nodes_of_another_type_with_the_same_arrays_are_rejected(saved, like, message, tmp_path):
    metaopt.save(tmp_path / "network.npz", saved)
    with pytest.raises(ValueError, match=message):
        metaopt.load(tmp_path / "network.npz", like=like)
    loaded = metaopt.load(tmp_path / "network.npz", like=jax.eval_shape(lambda: saved))
    chex.assert_trees_all_equal(jax.tree.leaves(loaded), jax.tree.leaves(saved))


def test_modules_with_other_settings_warn(tmp_path):
    metaopt.save(tmp_path / "network.npz", group_norm(2))
    with pytest.warns(UserWarning, match=r"the GroupNorm leaf differ.*`num_groups` is 4 \(in the file 2\)") as record:
        metaopt.load(tmp_path / "network.npz", like=group_norm(4))
    assert record[0].filename == __file__
    dropout = nnx.Sequential(nnx.Dropout(0.5), nnx.LayerNorm(8, rngs=nnx.Rngs(0)))
    metaopt.save(tmp_path / "network.npz", dropout)
    dropout.eval()  # not another network
    metaopt.load(tmp_path / "network.npz", like=dropout)


def test_the_state_of_an_optimizer_may_have_infinities(tmp_path):
    optimizer = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau())
    params = {"w": jnp.ones((2, 3))}
    state = optimizer.init(params)
    assert any(np.isinf(leaf).any() for leaf in jax.tree.leaves(state))
    metaopt.save(tmp_path / "state.npz", state)
    loaded = metaopt.load(tmp_path / "state.npz", like=optimizer.init(params))
    chex.assert_trees_all_equal(loaded, state)
    chex.assert_trees_all_equal_dtypes(loaded, state)


@pytest.mark.parametrize(
    ("saved", "like", "message"),
    [
        (np.int32(3), np.int64(3), "leaf should be int64 of shape .*, but it is int32"),
        (np.int32(3), 3.0, "leaf should be floating-point of shape .*, but it is int32"),
        (np.array([True]), np.array([1], np.uint8), "leaf should be uint8 of shape .*, but it is bool"),
        (np.complex64(1j), np.float32(1), "leaf should be floating-point of shape .*, but it is complex64"),
        (jax.random.key(0), jax.random.key(0, impl="rbg"), r"leaf should be uint32 of shape \(4,\), but it is uint32"),
        (
            jax.random.key(0, impl="rbg"),
            jax.random.key(0, impl="unsafe_rbg"),
            "should be of type key<urbg>, but is of type key<rbg>",
        ),
        (jax.random.key(0), jax.random.PRNGKey(0), "should be of type uint32, but is of type key<fry>"),
        (jax.random.PRNGKey(0), jax.random.key(0), "should be of type key<fry>, but is of type uint32"),
    ],
)
def test_arrays_that_are_not_floating_point_need_a_template_of_their_type(saved, like, message, tmp_path):
    metaopt.save(tmp_path / "state.npz", saved)
    with pytest.raises(ValueError, match=message):
        metaopt.load(tmp_path / "state.npz", like=like)


def test_numbers_beyond_the_type_of_the_template_do_not_become_infinite(tmp_path):
    metaopt.save(tmp_path / "state.npz", np.array([6e4, 7e4, np.inf], np.float32))
    with pytest.raises(ValueError, match="leaf has numbers beyond float16"):
        metaopt.load(tmp_path / "state.npz", like=jnp.zeros(3, jnp.float16))
    with pytest.raises(ValueError, match="leaf has numbers beyond float8_e4m3fn"):  # a type without infinity
        metaopt.load(tmp_path / "state.npz", like=jnp.zeros(3, jnp.float8_e4m3fn))
    assert metaopt.load(tmp_path / "state.npz", like=jnp.zeros(3, jnp.bfloat16))[2] == np.inf


def test_integers_are_not_truncated(tmp_path):
    for number, fits in ((2**31 - 1, True), (2**31, False), (-(2**31) - 1, False)):
        metaopt.save(tmp_path / "count.npz", np.int64(number))
        with (
            jax.enable_x64(False),
            contextlib.nullcontext() if fits else pytest.raises(ValueError, match="beyond int32"),
        ):
            assert int(metaopt.load(tmp_path / "count.npz", like=np.int64(0))) == number
        assert int(metaopt.load(tmp_path / "count.npz", like=np.int64(0))) == number


def test_a_file_without_arrays_is_a_json_text(tmp_path):
    metaopt.save(tmp_path / "split.json", SPLIT)
    parts = {"train": {"letters": {}}}
    assert json.loads((tmp_path / "split.json").read_text()) == {
        "format": "metaopt.split",
        "version": 1,
        "parts": parts,
    }
