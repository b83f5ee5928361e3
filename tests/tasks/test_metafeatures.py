"""Meta-features against independent formulas on iris, their invariances, and their scaling."""

import json

import numpy as np
import pytest

from metaopt import tasks

scipy_stats = pytest.importorskip("scipy.stats")
pytest.importorskip("sklearn")

ORDERLESS = ("simple", "statistical", "information_theoretic")


@pytest.fixture(scope="module")
def iris():
    return tasks.from_sklearn()[0]


@pytest.fixture(scope="module")
def iris_features(iris):
    return tasks.metafeatures(iris)


def both(name, values):
    return {f"{name}.mean": np.mean(values), f"{name}.sd": np.std(values, ddof=1)}


def test_simple_and_statistical_on_iris(iris, iris_features):
    x, y = iris.x.astype(np.float64), iris.y
    cor = np.abs(np.corrcoef(x.T)[np.tril_indices(4, -1)])
    cov = np.cov(x.T)
    sd_correction = (149 / 150) ** 1.5, (149 / 150) ** 2  # scipy divides by the standard deviation with n
    expected = {
        "attr_to_inst": 4 / 150,
        "inst_to_attr": 37.5,
        "nr_attr": 4,
        "nr_num": 4,
        "nr_cat": 0,
        "nr_bin": 0,
        "cat_to_num": 0,
        "nr_inst": 150,
        "nr_class": 3,
        "freq_class.mean": 1 / 3,
        "freq_class.sd": 0,
        "nr_cor_attr": np.mean(cor > 0.5),
        "nr_outliers": 1,  # the widths of the sepals, as every box plot shows
        "gravity": np.linalg.norm(x[y == 0].mean(0) - x[y == 2].mean(0)),
        **both("mean", x.mean(0)),
        **both("t_mean", scipy_stats.trim_mean(x, 0.2)),
        **both("iq_range", scipy_stats.iqr(x, axis=0)),
        **both("mad", scipy_stats.median_abs_deviation(x, axis=0, scale=1 / 1.4826)),
        **both("skewness", scipy_stats.skew(x) * sd_correction[0]),
        **both("kurtosis", (scipy_stats.kurtosis(x) + 3) * sd_correction[1] - 3),
        **both("sparsity", [(150 / len(set(c)) - 1) / 149 for c in x.T.tolist()]),
        **both("var", np.diag(cov)),
        **both("cor", cor),
        **both("cov", np.abs(cov[np.tril_indices(4, -1)])),
        **both("eigenvalues", np.linalg.eigvals(cov)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(iris_features[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
    assert np.isnan(iris_features["num_to_cat"])


def test_canonical_correlations_on_iris(iris_features):
    # What R's summary(manova(...)) says of iris: Wilks .023439, Pillai 1.1919, Hotelling-Lawley 32.477, Roy 32.192.
    np.testing.assert_allclose(iris_features["w_lambda"], 0.023439, rtol=1e-4)
    np.testing.assert_allclose(iris_features["p_trace"], 1.1919, rtol=1e-4)
    np.testing.assert_allclose(iris_features["lh_trace"], 32.477, rtol=1e-4)
    np.testing.assert_allclose(iris_features["roy_root"], 32.192, rtol=1e-4)
    np.testing.assert_allclose(iris_features["can_cor.mean"], (0.984821 + 0.471197) / 2, rtol=1e-5)


def test_a_column_that_is_the_class_has_a_canonical_correlation_just_below_one():
    """cos² = 1 − 1e-6, so that the ratio cos² / (1 − cos²) is finite."""
    y = np.repeat([0, 1], 10)
    x = np.stack([y, np.tile([0, 1], 10)], 1).astype(float)
    features = tasks.metafeatures((x, y, np.array([False, False])), groups=["statistical"])
    for name, value in {"can_cor.mean": np.sqrt(1 - 1e-6), "lh_trace": 1e6 - 1, "w_lambda": 1e-6}.items():
        np.testing.assert_allclose(features[name], value, rtol=1e-6, err_msg=name)


def test_information_on_categories_by_hand():
    # x1 tells y; x2 is independent of it.
    x1 = np.repeat([0, 1], 60)
    x2 = np.tile([0, 1, 2], 40)
    features = tasks.metafeatures((np.stack([x1, x2], 1), x1, np.array([True, True])), groups=["information_theoretic"])
    entropy = [1.0, np.log2(3)]
    expected = {
        "class_ent": 1.0,
        **both("attr_ent", entropy),
        **both("joint_ent", [1.0, 1 + np.log2(3)]),
        **both("mut_inf", [1.0, 0.0]),
        "eq_num_attr": 2.0,
        "ns_ratio": (np.mean(entropy) - 0.5) / 0.5,
        **both("class_conc", [1.0, 0.0]),
        **both("attr_conc", [0.0, 0.0]),
    }
    assert set(features) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(features[name], value, atol=1e-9, err_msg=name)


def test_concentration_on_a_two_by_two_table():
    # Goodman and Kruskal's tau from its definition: the share of errors of proportional prediction that x saves.
    x, y = np.repeat([0, 0, 1, 1], [30, 10, 5, 55]), np.repeat([0, 1, 0, 1], [30, 10, 5, 55])
    p = np.array([[0.30, 0.10], [0.05, 0.55]])
    errors = 1 - (p.sum(0) ** 2).sum()
    errors_given = sum(row.sum() * (1 - ((row / row.sum()) ** 2).sum()) for row in p)
    features = tasks.metafeatures((x[:, None], y, np.array([True])), groups=["information_theoretic"])
    np.testing.assert_allclose(features["class_conc.mean"], (errors - errors_given) / errors, rtol=1e-6)
    assert np.isnan(features["attr_conc.mean"])


def test_landmarkers_on_iris(iris_features):
    assert 0.93 < iris_features["one_nn.mean"] < 0.98
    assert 0.95 < iris_features["linear_discr.mean"] <= 1.0
    assert 0.93 < iris_features["naive_bayes.mean"] < 0.98
    assert 0.6 < iris_features["best_node.mean"] < 0.68  # a stump tells one class of three from the others
    assert iris_features["worst_node.mean"] <= iris_features["random_node.mean"] <= iris_features["best_node.mean"]
    assert 0.85 < iris_features["elite_nn.mean"] < 0.97


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_order_does_not_matter(iris, axis):
    rng = np.random.default_rng(0)
    x = np.concatenate([iris.x, rng.integers(0, 4, (150, 2))], axis=1)
    categorical = np.array([False] * 4 + [True] * 2)
    rows, columns = np.arange(150), np.arange(6)
    if axis == "rows":
        rows = rng.permutation(150)
    else:
        columns = rng.permutation(6)
    before = tasks.metafeatures((x, iris.y, categorical), groups=ORDERLESS)
    after = tasks.metafeatures((x[rows][:, columns], iris.y[rows], categorical[columns]), groups=ORDERLESS)
    assert list(before) == list(after)
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-9, atol=1e-12)


def test_only_training_rows_are_seen(iris):
    prepared = tasks.prepare(iris)
    direct = tasks.metafeatures((prepared.train.raw, prepared.train.y, prepared.categorical))
    prepared.test.raw[:] = np.nan
    prepared.valid.raw[:] = np.nan
    assert tasks.metafeatures(prepared) == pytest.approx(direct, nan_ok=True)
    assert direct["nr_inst"] == 90


def test_names_are_the_same_for_every_table(iris, iris_features):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 40)
    odd = {
        "categories alone": (rng.integers(0, 3, (40, 2)), np.array([True, True])),
        "one column": (rng.normal(size=(40, 1)), np.array([False])),
        "constant and copied": (np.stack([np.ones(40), y, y], 1), np.array([False, False, False])),
        "gaps": (np.where(rng.random((40, 3)) < 0.3, np.nan, rng.normal(size=(40, 3))), np.array([False, False, True])),
        "huge": (rng.normal(size=(40, 3)) * 1e30, np.array([False, False, False])),
    }
    for name, (x, categorical) in odd.items():
        features = tasks.metafeatures((x, y, categorical))
        assert list(features) == list(iris_features), name
        assert not any(np.isinf(v) for v in features.values()), name


LOG_LOSS = ("prior", "ridge_strong", "ridge_medium", "ridge_weak", "neighbors", "medium_gain", "weak_gain")
LOG_LOSS += ("neighbors_gain", "best", "log_columns", "log_rows", "log_minority", "log_rows_per_column")


def log_loss(table, **options):
    values = tasks.metafeatures(table, groups=["log_loss"], **options)
    assert tuple(values) == tuple(f"log_loss.{name}" for name in LOG_LOSS)
    assert np.isfinite(list(values.values())).all()
    return {name: values[f"log_loss.{name}"] for name in LOG_LOSS}


def noisy_table(rows=96, classes=3):
    rng = np.random.default_rng(2)
    y = np.arange(rows) % classes
    x = np.concatenate([rng.normal(size=(rows, 2)) + y[:, None], rng.integers(0, 3, (rows, 1))], axis=1)
    return tasks.Table("noisy", "noisy", x, y, np.array([False, False, True]))


@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")  # of an older scikit-learn with a newer SciPy
def test_log_loss_against_scikit_learn():
    linear_model, neighbors = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.neighbors")
    selection = pytest.importorskip("sklearn.model_selection")
    prepared = tasks.prepare(noisy_table())
    x, y = prepared.train.x.astype(float), prepared.train.y
    rows = np.random.default_rng(5).permutation(len(y))
    by_class = np.concatenate([rows[y[rows] == c] for c in range(3)])
    fold = np.empty(len(y), int)
    fold[by_class] = np.arange(len(y)) % 3
    assert all(np.ptp(np.bincount(y[fold == k])) <= 1 for k in range(3))  # stratified
    split = selection.PredefinedSplit(fold)
    shares = np.zeros((len(y), 3))
    for k in range(3):
        counts = np.bincount(y[fold != k])
        shares[fold == k] = (counts + 0.5) / (counts.sum() + 1.5)

    def loss(probability):
        probability = np.maximum(probability, 1e-4)
        return np.mean([-np.log(p[label] / p.sum()) for p, label in zip(probability, y, strict=True)])

    def predict(learner):
        return selection.cross_val_predict(learner, x, y, cv=split, method="predict_proba")

    ridges = [predict(linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=1000)) for c in (0.003, 0.1, 3)]
    nearest = (15 * predict(neighbors.KNeighborsClassifier(15)) + 2 * shares) / 17
    prior = loss(shares)
    strong, medium, weak, near = gains = [1 - loss(p) / prior for p in (*ridges, nearest)]
    sizes = np.log([x.shape[1], len(y), np.bincount(y).min(), len(y) / x.shape[1]])
    expected = (prior, *gains, medium - strong, weak - medium, near - max(gains[:3]), max(gains), *sizes)
    np.testing.assert_allclose(list(log_loss(prepared, seed=5).values()), expected, atol=2e-3)  # 60 steps, not 1000
    np.testing.assert_allclose([log_loss(prepared, seed=5)[n] for n in ("prior", "neighbors")], (prior, near), 1e-12)


def test_log_loss_reads_only_training_rows():
    prepared = tasks.prepare(noisy_table())
    before = log_loss(prepared)
    order = np.random.default_rng(0).permutation(len(prepared.valid.y))
    for rows in ({field: getattr(prepared.valid, field)[order] for field in prepared.valid._fields}, {"x": None}):
        assert log_loss(prepared._replace(valid=prepared.valid._replace(**rows), test=None)) == before
    default = tasks.metafeatures(prepared)
    assert not any(name.startswith("log_loss") for name in default)
    everything = tasks.metafeatures(prepared, groups=[*ORDERLESS, "landmarking", "log_loss"])
    assert everything == pytest.approx(default | {f"log_loss.{name}": v for name, v in before.items()}, nan_ok=True)


def test_log_loss_on_odd_tables():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 2
    signal = log_loss((y[:, None] + rng.normal(size=(90, 2)), y, np.zeros(2, bool)))
    assert signal["ridge_strong"] < signal["ridge_medium"] and signal["best"] > 0.15
    equal = log_loss((np.ones((90, 2)), y, np.array([False, True])))
    prepared = tasks.prepare(noisy_table())
    rows = prepared.train._replace(x=np.ones_like(prepared.train.x))
    for values in (equal, log_loss(prepared._replace(train=rows))):
        np.testing.assert_array_equal([values[name] for name in LOG_LOSS[1:9]], 0)
    np.testing.assert_allclose(equal["prior"], np.log(2))
    lonely = log_loss((rng.normal(size=(31, 2)), np.r_[np.zeros(15, int), np.ones(15, int), 2], np.zeros(2, bool)))
    assert lonely["log_minority"] == 0 and -2 <= lonely["ridge_weak"] <= lonely["best"] <= 1
    one_class = log_loss((rng.normal(size=(30, 2)), np.r_[np.zeros(29, int), 1], np.zeros(2, bool)))
    # The fold that holds the only row of class 1 has the prior's loss, and the others know it.
    assert 0 < one_class["prior"] and np.isfinite(one_class["best"])
    assert all(value == 0 for value in list(log_loss((np.eye(2), np.arange(2), np.zeros(2, bool))).values())[1:9])
    repeated = log_loss((np.repeat([[0.0], [1.0]], 300, 0), rng.permutation(600) % 2, np.zeros(1, bool)))
    assert abs(repeated["neighbors"]) < 0.1  # of 200 equal rows the neighbors are of random classes


def test_a_feature_that_is_absent_is_named_with_those_that_are_there():
    scaling = tasks.fit_scaling([{"rows": 1.0, "noise": 2.0}, {"rows": 3.0, "noise": 1.0}])
    with pytest.raises(KeyError, match="the features noise are absent; there are rows, nose"):
        scaling.transform({"rows": 1.0, "nose": 2.0}, clip=3.0)


def test_scaling_by_hand():
    features = [{"even": float(v), "heavy": float(10.0**v), "same": 1.0, "gap": np.nan} for v in range(11)]
    scaling = tasks.fit_scaling(features)
    assert tuple(scaling.names) == ("even", "heavy") and tuple(scaling.log) == (False, True)
    scaled = np.stack([scaling.transform(f, clip=3.0) for f in features])
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[:, 0], np.clip((np.arange(11) - 5) / (5 / 1.349), -3, 3), rtol=1e-6)
    logs = np.log1p(10.0 ** np.arange(11))
    quartile = np.quantile(logs, 0.75) - np.quantile(logs, 0.25)
    np.testing.assert_allclose(scaled[:, 1], (logs - logs[5]) / (quartile / 1.349), rtol=1e-5)
    far = scaling.transform({"even": np.nan, "heavy": -1e30}, clip=3.0)
    np.testing.assert_array_equal(far, [0, -3])
    restored = tasks.FeatureScaling(**json.loads(json.dumps(scaling._asdict())))
    np.testing.assert_array_equal(restored.transform(features[3], clip=3.0), scaled[3])
    # For a predictor with a limit, the largest value is 50 limits.
    np.testing.assert_array_equal(scaling.transform({"even": 1e9, "heavy": -1e300}, limit=0.5), [25, -25])
    by_name = {str(i): row for i, row in enumerate(features)}
    assert tasks.fit_scaling(by_name.values()) == tasks.fit_scaling(iter(features)) == scaling
    named = tasks.fit_scaling(features, names=["same", "gap"])
    np.testing.assert_array_equal(named.transform({"same": 1.0, "gap": np.nan}, clip=3.0), [0, 0])


def test_images_pixel_by_pixel():
    """Five columns, whose middle one is in neither half; and two channels, which are averaged."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(6, 3, 5, 2)) + np.linspace(-1, 1, 5)[:, None], np.array([0, 0, 2, 2, 2, 0])
    features = tasks.image_features(images, labels)
    x = (images[..., 0] + images[..., 1]) / 2
    d = x - sum(x) / 6
    near = [d[i, r, c] * d[i, r, c + 1] for i in range(6) for r in range(3) for c in range(4)]
    opposite = [d[i, r, c] * d[i, r, 4 - c] for i in range(6) for r in range(3) for c in range(2)]
    means = np.array([x[[0, 1, 5]].mean(0), x[[2, 3, 4]].mean(0)])
    expected = {
        "rows": np.log(6),
        "classes": np.log(3),
        "between neighboring pixels": np.mean(near) / np.mean(d**2),
        "between opposite halves": np.mean(opposite) / np.mean(d**2),
        "ink": np.mean(x > 0),
        "in the class means": np.mean((means[0] - means[1]) ** 2 / 4) / np.mean(d**2),
    }
    assert features.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(features[name], value, rtol=1e-5, err_msg=name)
    assert np.isnan(tasks.image_features(np.ones((4, 2, 2, 1)), np.zeros(4, int))["between neighboring pixels"])
