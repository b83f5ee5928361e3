"""scikit-learn's models as objectives, against scikit-learn's own cross-validation."""

import jax
import numpy as np
import pytest

from metaopt import blackbox, spaces, tasks
from metaopt.base import Record
from metaopt.blackbox import _sklearn

sklearn = pytest.importorskip("sklearn")
from sklearn import datasets, metrics, model_selection, pipeline, preprocessing  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = datasets.load_iris(return_X_y=True)
X, Y = X[::3], Y[::3]
TARGET = X[:, 3] + 0.1 * RNG.normal(size=len(X))
TRIAL = Record("t", {}, seed=5, status="RUNNING")


def outcome(name, configuration=None, *, fidelity=1.0, data=None, **kwargs):
    model = blackbox.sklearn_model(name)
    objective = blackbox.sklearn_objective(model.estimator, **kwargs)
    trial = TRIAL._replace(configuration=configuration or {}, fidelity=fidelity)
    y = TARGET if name.endswith("regressor") else Y
    return objective(trial, (X[:, :3], y) if data is None else data)


@pytest.mark.parametrize("name", _sklearn.SKLEARN_MODELS)
def test_the_default_of_every_space_is_scikit_learn_s_and_every_choice_is_valid(name):
    model = blackbox.sklearn_model(name)
    default = spaces.configuration(model.space, spaces.default(model.space))
    theirs = model.estimator.get_params()
    for parameter, value in default.items():
        if (parameter, value) not in {("max_depth", 64), ("gamma", 0.1), ("n_init", 1), ("max_features", 1.0)}:
            assert value == pytest.approx(theirs[parameter]) if isinstance(value, float) else value == theirs[parameter]
    # scikit-learn checks the values of parameters when it fits: every label, and both bounds.
    values = {}
    for parameter, leaf in model.space.items():
        values[parameter] = getattr(leaf, "labels", None) or (leaf.low, leaf.high)
    regressor = name.endswith("regressor")
    y = None if "classifier" not in name and not regressor else TARGET if regressor else Y
    for index in range(max(len(labels) for labels in values.values())):
        configuration = {parameter: labels[index % len(labels)] for parameter, labels in values.items()}
        small = {"n_estimators": 2, "n_neighbors": 3} | {"n_clusters": 5, "n_components": 5}
        configuration |= {key: value for key, value in small.items() if key in configuration}
        score = blackbox.sklearn_objective(model.estimator, num_folds=2)(
            TRIAL._replace(configuration=configuration), (X, y)
        )
        assert np.isfinite(score)
    assert model.scoring in (*metrics.get_scorer_names(), "silhouette", "log_likelihood")


def test_a_classifier_s_outcome_is_scikit_learn_s_cross_validation():
    forest = blackbox.sklearn_model("random_forest_classifier").estimator
    split = model_selection.StratifiedKFold(3, shuffle=True, random_state=0)
    scores = model_selection.cross_val_score(
        forest.set_params(n_estimators=10, max_depth=2, random_state=5),
        X[:, :3],
        Y,
        cv=split,
        scoring="balanced_accuracy",
    )
    assert outcome("random_forest_classifier", {"n_estimators": 10, "max_depth": 2}, num_folds=3) == pytest.approx(
        1 - scores.mean()
    )


def test_regressors_and_other_scores():
    ridge = pipeline.make_pipeline(preprocessing.StandardScaler(), blackbox.sklearn_model("linear_regressor").estimator)
    split = model_selection.KFold(5, shuffle=True, random_state=7)
    for scoring in ("r2", "neg_mean_squared_error"):
        scores = model_selection.cross_val_score(ridge, X[:, :3], TARGET, cv=split, scoring=scoring)
        expected = -scores.mean() if scoring[:4] == "neg_" else 1 - scores.mean()
        assert outcome("linear_regressor", scoring=scoring, split_seed=7) == pytest.approx(expected)


def test_clusterers_are_judged_without_labels():
    scaled = preprocessing.StandardScaler().fit_transform(X[:, :3])
    labels = blackbox.sklearn_model("k_means").estimator.set_params(n_clusters=3, random_state=5).fit_predict(scaled)
    for scoring, expected in (
        ("silhouette", 1 - metrics.silhouette_score(scaled, labels)),
        ("davies_bouldin", metrics.davies_bouldin_score(scaled, labels)),
        ("calinski_harabasz", -metrics.calinski_harabasz_score(scaled, labels)),
    ):
        loss = outcome("k_means", {"n_clusters": 3}, scoring=scoring, data=(X[:, :3], None))
        assert loss == pytest.approx(expected)
    # Three species: two or three components explain held-out flowers better than one.
    mixture = lambda n: outcome("gaussian_mixture", {"n_components": n, "covariance_type": "tied"}, data=(X, None))
    assert mixture(2) < mixture(1)


def test_a_fidelity_is_a_nested_part_of_the_training_rows_with_every_class():
    from metaopt.blackbox._sklearn import _part

    labels = np.repeat([0, 1, 2], [30, 60, 3])
    parts = [_part(np.random.default_rng(0), labels, fidelity) for fidelity in (0.01, 1 / 3, 0.5, 1.0)]
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[1, 1, 1], [10, 20, 1], [15, 30, 2], [30, 60, 3]]
    assert all(set(small) <= set(large) for small, large in zip(parts, parts[1:], strict=False))
    one = {"n_neighbors": 1}
    assert outcome("k_nearest_classifier", one, fidelity=0.05) != outcome("k_nearest_classifier", one)


def test_tables_with_gaps_and_categories():
    codes = RNG.integers(0, 3, size=(90, 1)).astype(np.float32)
    x = np.concatenate([RNG.normal(size=(90, 1)), codes], axis=1).astype(np.float32)
    x[::7, 0] = np.nan
    y = (codes[:, 0] == 1).astype(np.int32)  # linear in one-hot categories, not in their codes
    x[::11, 1] = np.nan
    table = tasks.Table("t", "t", x, y, np.array([False, True]))
    assert outcome("linear_classifier", data=table) < 0.2
    assert outcome("linear_classifier", data=table._replace(categorical=np.array([False, False]))) > 0.3


@pytest.mark.slow
def test_a_search_is_the_same_with_two_workers():
    model = blackbox.sklearn_model("k_nearest_classifier")
    objective = blackbox.sklearn_objective(model.estimator, num_folds=2)
    kwargs = {"num_trials": 4, "key": jax.random.key(0), "isolated": False}
    records = blackbox.collect(objective, model.space, {"iris": (X, Y)}, **kwargs)
    with_two = blackbox.collect(objective, model.space, {"iris": (X, Y)}, num_workers=2, **kwargs)
    assert [r.outcome for r in records] == [r.outcome for r in with_two]
    assert {record.status for record in records} == {"COMPLETE"}


def test_every_generator_of_a_pipeline_is_seeded():
    ensemble = pytest.importorskip("sklearn.ensemble")
    within = pipeline.make_pipeline(preprocessing.StandardScaler(), ensemble.ExtraTreesClassifier(3))
    objective = blackbox.sklearn_objective(within, num_folds=2)
    one, same, other = (objective(TRIAL._replace(seed=seed), (X[:, :1], Y)) for seed in (5, 5, 6))
    assert one == same != other


def test_rows_may_be_prepared_by_another_function():
    naive_bayes = pytest.importorskip("sklearn.naive_bayes")
    model = naive_bayes.MultinomialNB()
    fails = blackbox.sklearn_objective(model)
    with pytest.raises(ValueError, match="Negative values"):  # standardized ones are
        fails(TRIAL, (X, Y))
    for preparation in (preprocessing.MinMaxScaler(clip=True), "passthrough"):
        loss = blackbox.sklearn_objective(model, preparation=preparation)(TRIAL, (X, Y))
        whole = pipeline.make_pipeline(preparation, model)
        split = model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
        scores = model_selection.cross_val_score(whole, X, Y, cv=split, scoring="balanced_accuracy")
        assert loss == pytest.approx(1 - scores.mean())
    # Without labels, too.
    means = blackbox.sklearn_model("k_means").estimator
    raw = blackbox.sklearn_objective(means.set_params(n_clusters=3), preparation="passthrough")
    labels = means.set_params(random_state=5).fit_predict(X)
    assert raw(TRIAL, (X, None)) == pytest.approx(1 - metrics.silhouette_score(X, labels))


# Estimators of scikit-learn that cannot be objectives, and those that need more than their defaults, with the reason.
NO_OBJECTIVES = {
    "ClassifierChain": "several labels a row",
    "MultiOutputClassifier": "several labels a row",
    "FeatureAgglomeration": "clusters columns",
}
OF_OTHERS = {  # estimators of estimators
    "ClassifierChain": "several labels",
    "MultiOutputClassifier": "several labels",
    "FixedThresholdClassifier": "two classes",
    "OneVsOneClassifier": "",
    "OneVsRestClassifier": "",
    "OutputCodeClassifier": "",
    "SelfTrainingClassifier": "",
    "StackingClassifier": "named",
    "StackingRegressor": "named",
    "TunedThresholdClassifierCV": "two classes",
    "VotingClassifier": "named",
    "VotingRegressor": "named",
    "MultiOutputRegressor": "several targets",
    "RegressorChain": "several targets",
}
NOT_NEGATIVE = {"CategoricalNB", "ComplementNB", "MultinomialNB"}
SEVERAL_TARGETS = {"MultiTaskElasticNet", "MultiTaskElasticNetCV", "MultiTaskLasso", "MultiTaskLassoCV"}
ONE_COLUMN = {"IsotonicRegression"}
CONFIGURATIONS = {
    "CategoricalNB": {"min_categories": 2},  # a fold may lack one
    "CCA": {"n_components": 1},  # no more than targets
    "PLSCanonical": {"n_components": 1},
    "IsotonicRegression": {"out_of_bounds": "clip"},  # what lies beyond the training rows
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Class .* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["classifier", "regressor", "cluster"])
def test_every_estimator_of_scikit_learn_is_an_objective(kind):
    """Defaults, two folds, on three heaps of rows; the lists above hold no name in vain."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = 4 * np.eye(3)[labels] + rng.normal(size=(60, 3)) / 4
    target = np.exp(x @ [0.1, 0.2, 0.3])  # positive, as a Gamma distribution has it
    several = np.stack([target, target + x[:, 0]], 1)
    failed = {}

    def run(name, cls):
        kwargs, data = {}, (x, {"classifier": labels, "regressor": target, "cluster": None}[kind])
        if name in OF_OTHERS:
            base = linear_model.LogisticRegression() if kind == "classifier" else linear_model.Ridge()
            estimator = cls([("a", base), ("b", sklearn.base.clone(base))] if OF_OTHERS[name] == "named" else base)
        else:
            estimator = cls()
        if name in NOT_NEGATIVE:
            kwargs["preparation"] = preprocessing.MinMaxScaler(clip=True)
        if name in SEVERAL_TARGETS or OF_OTHERS.get(name) == "several targets":
            data = x, several
        if OF_OTHERS.get(name) == "two classes":
            data = x, labels == 0
        if OF_OTHERS.get(name) == "several labels":
            data = x, np.stack([labels == 0, labels == 1], 1)
        if name in ONE_COLUMN:
            data = x[:, :1], target
        trial = TRIAL._replace(configuration=CONFIGURATIONS.get(name, {}))
        return blackbox.sklearn_objective(estimator, num_folds=2, **kwargs)(trial, data)

    estimators = dict(sklearn.utils.all_estimators(type_filter=kind))
    for name, cls in estimators.items():
        try:
            outcome = run(name, cls)
            if not np.isfinite(outcome):
                failed[name] = outcome
        except Exception as error:
            failed[name] = error
    assert len(estimators) > 8 and set(failed) == set(NO_OBJECTIVES) & set(estimators), failed
    # They fail without these arguments.
    for name in (*OF_OTHERS, *NOT_NEGATIVE, *SEVERAL_TARGETS, *CONFIGURATIONS):
        if name in estimators:
            y = {"classifier": labels, "regressor": target}[kind]
            with pytest.raises((AttributeError, TypeError, ValueError)):
                blackbox.sklearn_objective(estimators[name](), num_folds=2)(TRIAL, (x, y))


def test_a_density_is_scored_by_row_and_integer_targets_of_a_regressor_are_no_classes():
    neighbors, linear_model = pytest.importorskip("sklearn.neighbors"), pytest.importorskip("sklearn.linear_model")
    x = np.random.default_rng(0).normal(size=(200, 2))
    loss = blackbox.sklearn_objective(neighbors.KernelDensity())(Record("t", {}), (x, None))
    assert 2 < loss < 4  # the entropy of N(0, I) is 2.84; a sum over rows is a hundred
    sizes = []

    class Spy(linear_model.Ridge):
        def fit(self, x, y):
            sizes.append(len(y))
            return super().fit(x, y)

    y = np.arange(200)
    blackbox.sklearn_objective(Spy(), num_folds=2)(Record("t", {}, fidelity=0.1), (x, y))
    assert sizes == [10, 10]
