"""`AutoClusterer`: scikit-learn's contract, stability, the choice of clusters, new rows and files."""

import copy
import itertools
import warnings
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import threadpoolctl
from sklearn import datasets, metrics
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import check_estimator

import metaopt
from metaopt import automl
from metaopt.automl import _stability

QUICK: dict[str, Any] = {"max_clusters": 4, "algorithms": ("kmeans",), "n_jobs": 1}
CHOSEN = ("kmeans", "mixture", "agglomerative")  # by default


@pytest.fixture(scope="module")
def shapes():
    """A frame of three groups, with categories and gaps."""
    x, y = datasets.make_blobs(180, centers=[[0, 0], [6, 0], [0, 6]], random_state=0)
    frame = pd.DataFrame(x, columns=["width", "height"])
    frame["color"] = pd.Categorical(np.array(["red", "red", "blue"])[y])
    frame.loc[::17, "width"] = np.nan
    return frame, y


@pytest.fixture(scope="module")
def fitted(shapes):
    return automl.AutoClusterer(5).fit(shapes[0])


@pytest.mark.once
def test_scikit_learns_contract():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about check_estimator's own odd data
        results = check_estimator(automl.AutoClusterer(**QUICK), on_skip=None)
    assert len(results) > 30


def test_groups_of_a_frame_with_categories_and_gaps_are_found(shapes, fitted):
    frame, y = shapes
    assert fitted.n_clusters_ == 3
    assert metrics.adjusted_rand_score(y, fitted.labels_) > 0.8  # a gap is filled with the median of all groups
    np.testing.assert_array_equal(fitted.predict(frame), fitted.labels_)
    assert (np.diff(np.bincount(fitted.labels_)) <= 0).all()  # cluster 0 is the largest
    leaders = fitted.leaderboard_
    assert set(leaders["algorithm"]) == set(CHOSEN) and leaders["stability"].is_monotonic_decreasing
    (chosen,) = leaders[leaders["chosen"]].itertuples()
    assert (chosen.algorithm, chosen.k) == (fitted.algorithm_, 3)
    assert leaders["stability"].between(-0.1, 1).all() and (leaders["seconds"] > 0).all()


@pytest.mark.parametrize("algorithm", _stability.ALGORITHMS)
def test_every_algorithm_finds_them_and_labels_new_rows(algorithm, shapes):
    frame, y = shapes
    model = automl.AutoClusterer(4, algorithms=algorithm, n_jobs=1).fit(frame[::2])
    assert (model.algorithm_, model.n_clusters_) == (algorithm, 3)
    assert metrics.adjusted_rand_score(y[1::2], model.predict(frame[1::2])) > 0.9


def test_a_table_without_clusters_is_one_cluster():
    for stretch in (1.0, 5.0):  # two halves of an elongated table are stable
        x = (
            np.random.default_rng(0).normal(size=(200, 3))
            * [stretch, 1, 1]
            @ np.linalg.qr(np.ones((3, 3)) + np.eye(3))[0]
        )
        model = automl.AutoClusterer(4, n_jobs=1).fit(x)
        assert model.n_clusters_ == 1 and model.algorithm_ is None and not model.labels_.any()


def test_equal_seeds_give_equal_results(shapes):
    runs = [automl.AutoClusterer(4, n_jobs=jobs, random_state=3).fit(shapes[0]) for jobs in (1, 2)]
    np.testing.assert_array_equal(runs[0].labels_, runs[1].labels_)
    boards = [run.leaderboard_.drop(columns="seconds") for run in runs]
    pd.testing.assert_frame_equal(*boards)


def test_rows_outside_the_sample_are_labeled_like_new_rows(shapes):
    frame, y = shapes
    model = automl.AutoClusterer(**QUICK, sample_rows=60).fit(frame)
    assert len(model.labels_) == len(y)
    assert metrics.adjusted_rand_score(y, model.labels_) > 0.9


def test_a_fit_in_a_thread_has_one_thread(monkeypatch):
    """OpenMP adds up the parts of several threads in any order, which may change the last bits of centroids."""
    fit, num_threads = KMeans.fit, []

    def watched(*args, **options):
        num_threads.append({pool["num_threads"] for pool in threadpoolctl.threadpool_info()})
        return fit(*args, **options)

    monkeypatch.setattr(KMeans, "fit", watched)
    x = datasets.make_blobs(60, random_state=0)[0]
    before = threadpoolctl.threadpool_info()
    automl.AutoClusterer(3, algorithms="kmeans", n_jobs=2).fit(x)
    assert len(num_threads) == 2 * 17 and all(nums == {1} for nums in num_threads)
    assert threadpoolctl.threadpool_info() == before


def test_cluster_0_is_the_largest_of_all_rows_and_not_of_the_sample():
    x = datasets.make_blobs([75, 70, 65], centers=[[0, 0], [9, 0], [0, 9]], random_state=0)[0]
    sizes = []
    for seed in range(6):
        model = automl.AutoClusterer(**QUICK, sample_rows=40, random_state=seed).fit(x)
        sizes.append(np.bincount(model.labels_))
        np.testing.assert_array_equal(model.predict(x), model.labels_)
    assert len({len(each) for each in sizes}) > 1 and all((np.diff(each) <= 0).all() for each in sizes)


def test_a_fit_that_fails_leaves_no_clusters_of_the_fit_before(shapes):
    frame, _ = shapes
    model = automl.AutoClusterer(**QUICK).fit(frame)
    with pytest.raises(ValueError, match="n_samples = 1"):
        model.fit(frame[["height", "width", "color"]][:1])
    with pytest.raises(NotFittedError):
        model.predict(frame)
    with pytest.raises(ValueError, match="not fitted"):
        metaopt.save("never.npz", model)


def test_dicts_of_columns_are_frames(shapes):
    frame, _ = shapes
    model = automl.AutoClusterer(**QUICK).fit({name: frame[name].tolist() for name in frame})
    np.testing.assert_array_equal(model.predict(frame.to_dict("records")), model.labels_)
    np.testing.assert_array_equal(model.labels_, automl.AutoClusterer(**QUICK).fit(frame).labels_)


def test_components_without_rows_are_left_out():
    clusters = _stability.Clusters(
        np.arange(6.0).reshape(3, 2), np.arange(3), np.stack([np.eye(2) * k for k in (1, 2, 3)]), np.arange(3.0)
    )
    labels, compact = _stability._compact(np.array([2, 0, 0, 2]), clusters)
    np.testing.assert_array_equal(labels, [1, 0, 0, 1])
    expected = (clusters.points[[0, 2]], [0, 1], clusters.factors[[0, 2]], [0.0, 2.0])
    jax.tree.map(np.testing.assert_array_equal, tuple(compact), tuple(map(np.asarray, expected)))
    nearest = _stability._nearest(clusters.points, np.arange(3))
    assert [len(part) for part in _stability._compact(np.array([2, 0]), nearest)[1]] == [2, 2, 0, 0]


def board(*rows):
    """Measured candidates of (algorithm, k, stability, reference)."""
    return [
        _stability.Measured(_stability.Candidate(name, k), k, s, 0.0, r, 0.0, _stability.one_cluster(np.zeros((1, 1))))
        for name, k, s, r in rows
    ]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([("kmeans", 2, 0.9, 0.5), ("kmeans", 3, 0.86, 0.5), ("kmeans", 4, 0.84, 0.1)], ("kmeans", 3)),
        ([("kmeans", 3, 0.86, 0.5), ("mixture", 3, 0.9, 0.5), ("kmeans", 2, 0.88, 0.5)], ("mixture", 3)),
        # Those that are hardly more stable than normal rows do not count, also not as the most stable one.
        ([("kmeans", 2, 0.98, 0.84), ("kmeans", 3, 0.6, 0.2)], ("kmeans", 3)),
        ([("kmeans", 2, 0.5, 0.34)], ("kmeans", 2)),
        ([("kmeans", 2, 0.5, 0.36)], None),
        ([], None),
    ],
)
def test_the_largest_k_among_the_stable_candidates_is_chosen(rows, best):
    chosen = _stability.choose(board(*rows))
    assert best == (chosen and (chosen.candidate.algorithm, chosen.k))


@pytest.mark.parametrize("algorithm", ["kmeans", "mixture"])
def test_stability_is_the_agreement_of_parts_of_the_rows_and_its_reference_that_of_the_reference(algorithm):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 2)) + 3 * rng.integers(0, 2, (60, 1))
    reference, parts = rng.normal(size=(60, 2)), np.stack([rng.permutation(60)[:48] for _ in range(4)])
    candidate = _stability.Candidate(algorithm, 3)
    measured = _stability.measure(candidate, z, reference, parts, seed=5)
    values = []
    for table in (z, reference):
        labels = [
            _stability.cluster(candidate, table[rows], seed=5 + i, num_starts=3)[0] for i, rows in enumerate(parts)
        ]
        values.append(_stability.agreement(labels, parts))
    expected = values[0].mean(), values[0].std(ddof=1), values[1].mean()
    assert (measured.stability, measured.spread, measured.reference) == pytest.approx(expected)
    labels, _ = _stability.cluster(candidate, z, seed=5, num_starts=10)
    np.testing.assert_array_equal(measured.clusters.assign(z), labels)
    assert measured.k == len(np.unique(labels)) and measured.seconds > 0


@pytest.fixture
def fits(monkeypatch):
    """[(model, rows)] of scikit-learn's fits, in their order, without those that a mixture starts with."""
    calls, running = [], []

    def watch(kind):
        fit = kind.fit

        def watched(model, x, y=None):
            if not running:
                calls.append((model, x.copy()))
            running.append(model)
            fit(model, x, y)
            running.pop()
            return model

        monkeypatch.setattr(kind, "fit", watched)

    for kind in (KMeans, GaussianMixture, AgglomerativeClustering):
        watch(kind)
    return calls


def num_clusters(model):
    return model.n_components if isinstance(model, GaussianMixture) else model.n_clusters


def test_candidates_share_random_parts_and_normal_rows_with_the_covariance_of_the_table(fits):
    rng = np.random.default_rng(0)
    mixing = np.array([[3.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.3]])
    x = rng.normal(size=(600, 3)) @ mixing
    automl.AutoClusterer(4, n_jobs=1, sample_rows=400).fit(x)
    # Each candidate clusters the sample, eight parts of it, and the same parts of the reference.
    calls = [[rows for _, rows in fits[i : i + 17]] for i in range(0, len(fits), 17)]
    kinds = KMeans, GaussianMixture, AgglomerativeClustering
    assert [(type(model), num_clusters(model)) for model, _ in fits[::17]] == [(a, k) for a in kinds for k in (2, 3, 4)]
    assert all([rows.shape for rows in call] == [(400, 3)] + 16 * [(320, 3)] for call in calls)
    jax.tree.map(np.testing.assert_array_equal, calls, 9 * [calls[0]])
    z, *tables = calls[0]
    np.testing.assert_allclose(np.cov(z.T), np.diag(z.var(axis=0, ddof=1)), atol=1e-9)  # principal axes
    assert (np.diff(z.std(axis=0)) < 0).all()
    position = {tuple(row): i for i, row in enumerate(z)}
    parts = [[position[tuple(row)] for row in rows] for rows in tables[:8]]
    assert all(len(set(part)) == 320 for part in parts) and len({tuple(sorted(part)) for part in parts}) == 8
    reference = np.zeros_like(z)
    for part, rows in zip(parts, tables[8:], strict=True):
        reference[part] = rows
    for part, rows in zip(parts, tables[8:], strict=True):
        np.testing.assert_array_equal(rows, reference[part])
    np.testing.assert_allclose(reference.std(axis=0), z.std(axis=0), rtol=0.1)


def test_rows_are_predicted_on_the_axes_on_which_they_were_clustered(fits):
    x = np.exp(np.random.default_rng(0).normal(size=(200, 3)))  # skewed: the mean of clipped columns is not 0
    model = automl.AutoClusterer(2, algorithms="kmeans", n_jobs=1).fit(x)
    np.testing.assert_allclose(model._axes_of(model.encoder_.transform(x)), fits[0][1], atol=1e-9)
    assert np.abs(model.center_).max() > 0.01


def test_no_candidate_has_more_clusters_than_different_rows_or_half_of_a_part(fits):
    few = np.repeat(np.eye(5), 6, axis=0)
    for x, most in ((few, 5), (np.random.default_rng(0).normal(size=(10, 2)), 4), (np.repeat(few, 9, axis=0), 5)):
        automl.AutoClusterer(8, algorithms="kmeans", n_jobs=1).fit(x)
        assert {num_clusters(model) for model, _ in fits} == set(range(2, most + 1))
        fits.clear()


def test_noise_of_hdbscan_joins_the_nearest_cluster():
    z = np.repeat([[0.0, 0], [20, 0]], 40, axis=0) + np.random.default_rng(0).normal(size=(80, 2)) / 2
    z = np.r_[z, [[80.0, 0], [-60, 0]]]
    labels = _stability._density_labels(z, 0.2)
    assert labels[80] == labels[40] != labels[0] == labels[81] and set(labels) == {0, 1}
    np.testing.assert_array_equal(_stability._density_labels(np.arange(30.0)[:, None] ** 3, 0.9), 0)  # all are noise


def test_at_most_20_principal_axes_stay():
    x = np.random.default_rng(0).normal(size=(60, 30))
    model = automl.AutoClusterer(2, algorithms="kmeans", n_jobs=1).fit(x)
    assert model.axes_.shape == (30, 20)


def test_agreement_is_the_mean_index_of_pairs_on_shared_rows():
    rng = np.random.default_rng(0)
    parts = np.stack([rng.permutation(30)[:20] for _ in range(3)])
    labels = [rng.integers(3, size=20) for _ in parts]
    index = np.zeros((3, 3))
    for i, j in itertools.permutations(range(3), 2):
        by_row = [dict(zip(parts[part], labels[part], strict=True)) for part in (i, j)]
        shared = sorted(by_row[0].keys() & by_row[1].keys())
        index[i, j] = metrics.adjusted_rand_score(*([part[row] for row in shared] for part in by_row))
    np.testing.assert_allclose(_stability.agreement(labels, parts), index.sum(axis=1) / 2, rtol=1e-12)
    same = [np.zeros(20, int)] * 3
    np.testing.assert_array_equal(_stability.agreement(same, parts), 0)  # a single cluster


def test_two_parts_that_single_out_different_rows_do_not_agree():
    parts = np.array([[0, 1, 2, 3], [1, 2, 3, 4]])
    labels = [np.array([1, 0, 0, 0]), np.array([0, 0, 0, 1])]  # the shared rows are one cluster in both
    np.testing.assert_array_equal(_stability.agreement(labels, parts), 0)


def test_a_mixture_assigns_as_scikit_learn():
    z = np.random.default_rng(0).normal(size=(300, 3)) * [3, 1, 0.3]
    labels, clusters = _stability.cluster(_stability.Candidate("mixture", 3), z, seed=0, num_starts=3)
    expected = GaussianMixture(3, reg_covar=1e-2, random_state=0).fit(z)
    np.testing.assert_array_equal(labels, expected.predict(z))
    np.testing.assert_array_equal(clusters.assign(2 * z), expected.predict(2 * z))


def test_saved_clusters_are_the_same(shapes, fitted, tmp_path):
    frame, _ = shapes
    models = [fitted, *(automl.AutoClusterer(3, algorithms=a, n_jobs=1).fit(frame) for a in ("mixture", "hdbscan"))]
    for model in models:
        metaopt.save(tmp_path / "clusters.npz", model)
        loaded = metaopt.load(tmp_path / "clusters.npz")
        assert loaded.get_params() == model.get_params() and loaded.n_clusters_ == model.n_clusters_
        np.testing.assert_array_equal(loaded.predict(frame), model.labels_)
        np.testing.assert_array_equal(loaded.labels_, model.labels_)
        pd.testing.assert_frame_equal(loaded.leaderboard_, model.leaderboard_)


CHANGES = [
    {"labels_": lambda x: x + 3},
    {"labels_": lambda x: x - 1},
    {"labels_": lambda x: x.astype(float)},
    {"algorithm_": lambda x: "dbscan"},
    {"center_": lambda x: x[:-1]},
    {"center_": lambda x: np.full_like(x, np.nan)},
    {"axes_": lambda x: x[:, :-1]},
    {"axes_": lambda x: x[:-1]},
    {"points": lambda x: x[:-1]},
    {"points": lambda x: x[:, :-1]},
    {"points": lambda x: x.astype(np.float32)},
    {"labels": lambda x: x + 1},
    {"labels": lambda x: x + 3},
    {"factors": lambda x: x[:-1]},
    {"factors": lambda x: np.full_like(x, np.inf)},
    {"log_weights": lambda x: x[:-1]},
    {"kept": lambda x: ~x},
]


@pytest.fixture(scope="module")
def mixture(shapes):
    return automl.AutoClusterer(3, algorithms="mixture", n_jobs=1).fit(shapes[0][::4])


@pytest.mark.parametrize("change", CHANGES)
def test_files_whose_parts_do_not_fit_each_other_are_rejected(change, mixture, tmp_path):
    model = copy.copy(mixture)
    ((name, function),) = change.items()
    if name in model.clusters_._fields:
        model.clusters_ = model.clusters_._replace(**{name: function(getattr(model.clusters_, name))})
    elif name in model.columns_._fields:
        model.columns_ = model.columns_._replace(**{name: function(getattr(model.columns_, name))})
    else:
        setattr(model, name, function(getattr(model, name)))
    metaopt.save(tmp_path / "clusters.npz", model)
    with pytest.raises(ValueError, match="do not fit"):
        metaopt.load(tmp_path / "clusters.npz")


ODD = {
    "one value": np.ones((30, 2)),
    "no value": np.full((30, 2), np.nan),
    "two rows": np.array([[0.0, 1.0], [1.0, 0.0]]),
    "two values": np.repeat([[0.0], [1.0]], 15, axis=0),
    "huge values": np.array([[1e300, -1e300], [0.0, 1.0]] * 10),
    "infinite values": np.array([[np.inf, 1.0], [0.0, np.nan]] * 10),
    "texts": [[f"word {i % 3}", None] for i in range(30)],
    "wide": np.random.default_rng(0).normal(size=(12, 200)),
    "one outlier": np.r_[np.random.default_rng(0).normal(size=(40, 2)), [[1e9, 1e9]]],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tables_get_labels(name):
    model = automl.AutoClusterer(3, n_jobs=1).fit(ODD[name])
    assert len(model.labels_) == len(ODD[name])
    assert set(model.labels_) <= set(range(model.n_clusters_))
    np.testing.assert_array_equal(model.predict(ODD[name]), model.labels_)


def fit(x=((0.0, 1.0), (1.0, 0.0)), **options):
    return automl.AutoClusterer(**options).fit(np.array(x))


REFUSALS = [
    (lambda: fit(max_clusters=0), "`max_clusters`"),
    (lambda: fit(sample_rows=1), "`sample_rows`"),
    (lambda: fit(algorithms=("dbscan",)), "`algorithms` must be one or more of kmeans, mixture, agglomerative"),
    (lambda: fit(algorithms=()), "`algorithms` must be one or more of kmeans"),
    (lambda: fit([[1.0, 2.0]]), "n_samples = 1"),
    (lambda: fit([1.0, 2.0]), "2D"),
    (lambda: fit(np.zeros((0, 2))), "0 sample"),
    (lambda: fit([[1j, 2], [3, 4]]), "omplex"),
    (lambda: fit().predict(np.zeros((2, 3))), "3 features"),
    (lambda: fit().predict(np.zeros(3)), "reshape"),
    (lambda: metaopt.save("never.npz", automl.AutoClusterer()), "not fitted"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
