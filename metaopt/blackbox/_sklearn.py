"""scikit-learn: classifiers, regressors and clusterers as objectives, and default spaces of eight families."""

import importlib
import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from metaopt import spaces
from metaopt.blackbox._trials import ObjectiveFn


class SklearnModel(NamedTuple):
    """A family of models.

    Attributes:
      estimator: an unfitted scikit-learn estimator.
      space: the space of its parameters, under their own names. Its default is scikit-learn's default, as far as one
        space can express it.
      scoring: the score that `sklearn_objective` uses for it.
    """

    estimator: Any
    space: dict[str, spaces.Leaf]
    scoring: str


# Scores of a clustering without true labels: name -> (name of scikit-learn's function of the rows and the cluster
# labels, whether larger is better).
_INTERNAL = {
    "silhouette": ("silhouette_score", True),
    "davies_bouldin": ("davies_bouldin_score", False),
    "calinski_harabasz": ("calinski_harabasz_score", True),
}


def sklearn_objective(
    estimator: Any, *, scoring: str | None = None, num_folds: int = 5, split_seed: int = 0, preparation: Any = None
) -> ObjectiveFn:
    """Makes an objective for `blackbox.collect`: a scikit-learn estimator with a trial's parameters, cross-validated.

    Missing values are replaced by the column's median. In columns that the table marks as categorical, they become an
    additional category. Categories are one-hot, and other columns are standardized. This preparation is fitted on the
    training rows of each fold. The folds are the same in all trials, and stratified by class. Every `random_state` of
    the estimator, and of estimators inside it, is the trial's seed. At fidelity s < 1, the estimator is fitted on a
    stratified fraction s of the training rows, which is contained in those of larger fidelities.

    All of scikit-learn's classifiers, regressors and clusterers work as objectives; a test checks each of them. There
    are two exceptions. Classifiers with several labels per row (`ClassifierChain`, `MultiOutputClassifier`) have no
    classes for stratified folds. `FeatureAgglomeration` clusters columns. Some estimators need more than their
    defaults:

    - Combinations of estimators (`VotingClassifier`, `OneVsRestClassifier`) need those estimators.
    - Estimators that reject negative values (`MultinomialNB`, `ComplementNB`, `CategoricalNB`) need another
      `preparation`. `CategoricalNB` also needs `min_categories` if a fold may lack a category.
    - Regressors of several targets (`MultiTaskLasso`, `RegressorChain`) need a y with as many columns.
    - `CCA` and `PLSCanonical` allow at most as many components as targets.
    - `IsotonicRegression` needs one column, and `out_of_bounds="clip"`.
    - `GammaRegressor` and similar regressors need targets in the range of their distributions.
    - Clusterers that determine their number of clusters need rows for which it is at least 2.

    Args:
      estimator: unfitted; a trial sets its parameters by their names (`"svc__C"` in a pipeline).
      scoring: a scorer's name (`sklearn.metrics.get_scorer_names()`). For clusterers, "silhouette", "davies_bouldin"
        or "calinski_harabasz", on all rows without folds. "log_likelihood" is the log-density per held-out row. By
        default "balanced_accuracy" for classifiers, "r2" for regressors, "silhouette" for clusterers, "log_likelihood"
        for densities.
      num_folds: K of K-fold cross-validation, at least 2.
      split_seed: the seed of the folds.
      preparation: a transformer of the rows that replaces the preparation above. For example
        `preprocessing.MinMaxScaler()` if values must not be negative (`MultinomialNB`), or "passthrough" for no
        preparation.

    Returns:
      `(trial, task) -> outcome`, for tasks that are a `tasks.Table` or a pair (x, y), where y may be None for
      clusterers. The outcome is 1 − the mean score. If the scorer's name starts with "neg_", or for the log-likelihood,
      it is minus the mean score. Internal scores other than the silhouette are not bounded by 1. Their outcome is minus
      the score, or the score itself if smaller scores are better.

    Raises:
      ValueError: if `scoring` is missing and the estimator's kind does not have a default.
      ImportError: if scikit-learn is not installed.
    """
    import sklearn.base

    if scoring is None:
        if sklearn.base.is_classifier(estimator):
            scoring = "balanced_accuracy"
        elif sklearn.base.is_regressor(estimator):
            scoring = "r2"
        elif issubclass(type(estimator), sklearn.base.ClusterMixin):
            scoring = "silhouette"
        elif hasattr(estimator, "score_samples"):
            scoring = "log_likelihood"
        else:
            raise ValueError(
                f"`scoring` must be given, since this is not a classifier, regressor or clusterer: {estimator}."
            )

    def objective(trial, task):
        from sklearn import metrics, pipeline

        x, y, categorical = _data(task)
        parameters = dict(trial.configuration)
        seeds = [name for name in estimator.get_params() if name.rpartition("__")[2] == "random_state"]
        parameters |= dict.fromkeys(seeds, trial.seed)
        model: Any = sklearn.base.clone(estimator)
        model.set_params(**parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about models that have not converged, and classes that a fold lacks
            if scoring in _INTERNAL:
                rows = _part(np.random.default_rng(split_seed), np.zeros(len(x)), trial.fidelity)
                filled = pipeline.make_pipeline(_preparation(categorical, preparation)).fit_transform(x[rows])
                name, larger = _INTERNAL[scoring]
                score = getattr(metrics, name)(filled, model.fit_predict(filled))
                return 1 - score if scoring == "silhouette" else -score if larger else score
            labels = y if sklearn.base.is_classifier(estimator) else None
            scores = []
            for fold, (train, test) in enumerate(_folds(x, y, estimator, num_folds, split_seed)):
                part = _subset(train, labels, trial.fidelity, split_seed + fold)
                prepared = pipeline.make_pipeline(_preparation(categorical, preparation), sklearn.base.clone(model))
                scores.append(_score(prepared, scoring, x, y, part, test))
        score = float(np.mean(scores))
        return -score if scoring == "log_likelihood" or scoring.startswith("neg_") else 1 - score

    return objective


def _score(fitted, scoring, x, y: Any, train, test) -> float:
    from sklearn import metrics

    if scoring == "log_likelihood":
        fitted.fit(x[train])
        # `score` of a density is a sum over rows, but that of a mixture is a mean.
        return float(np.mean(fitted.score_samples(x[test])))
    return metrics.get_scorer(scoring)(fitted.fit(x[train], y[train]), x[test], y[test])


def _folds(x, y, estimator, num_folds, seed):
    import sklearn.base
    from sklearn import model_selection

    stratified = sklearn.base.is_classifier(estimator)
    split = model_selection.StratifiedKFold if stratified else model_selection.KFold
    return split(num_folds, shuffle=True, random_state=seed).split(x, y if stratified else None)


def _subset(train, y: Any, fidelity, seed):
    """Returns the training rows of a fold that are used at a fidelity."""
    labels = np.zeros(len(train)) if y is None else y[train]
    return train[_part(np.random.default_rng(seed), labels, fidelity)]


def _part(rng, labels, fidelity) -> np.ndarray:
    """Returns rows: a fraction of each class, at least one, contained in the rows of every larger fidelity."""
    order = rng.permutation(len(labels))
    kept = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([rows[: max(1, math.ceil(fidelity * len(rows) - 1e-9))] for rows in kept]))


def _data(task) -> tuple[np.ndarray, Any, np.ndarray]:
    """x [n, d], y [n] or None, categorical [d] bool."""
    if hasattr(task, "x"):
        return task.x, task.y, np.asarray(task.categorical)
    x, y = task
    x = np.asarray(x)
    return x, None if y is None else np.asarray(y), np.zeros(x.shape[1], bool)


def _preparation(categorical, preparation):
    import sklearn.base
    from sklearn import compose, impute, pipeline, preprocessing

    if preparation is not None:
        return preparation if isinstance(preparation, str) else sklearn.base.clone(preparation)
    numeric = pipeline.make_pipeline(impute.SimpleImputer(strategy="median"), preprocessing.StandardScaler())
    labels = pipeline.make_pipeline(
        impute.SimpleImputer(strategy="constant", fill_value=-1),
        preprocessing.OneHotEncoder(handle_unknown="ignore", sparse_output=False),
    )
    return compose.ColumnTransformer([("numeric", numeric, ~categorical), ("labels", labels, categorical)])


def sklearn_model(name: str) -> SklearnModel:
    """Returns a family of scikit-learn models, with a space of the parameters that are worth tuning.

    Args:
      name: "random_forest", "extra_trees", "gradient_boosting", "svm", "k_nearest" or "linear", followed by
        "_classifier" or "_regressor"; or "k_means" or "gaussian_mixture".

    Returns:
      A NamedTuple: `estimator`, an unfitted scikit-learn estimator; `space`, the space of its parameters; and
        `scoring`, the score that `sklearn_objective` uses for it.

    Raises:
      KeyError: if `name` is unknown.
      ImportError: if scikit-learn is not installed.
    """
    module, cls, arguments, space = _MODELS[name]
    estimator = getattr(importlib.import_module(f"sklearn.{module}"), cls)(**arguments)
    kind = name.rpartition("_")[2]
    scoring = {"classifier": "balanced_accuracy", "regressor": "r2", "mixture": "log_likelihood"}.get(
        kind, "silhouette"
    )
    return SklearnModel(estimator, dict(space), scoring)


def _count(low, high, default):
    return spaces.integer(low, high, log=True, default=default)


def _forest(criteria, features, bootstrap):
    return {
        "n_estimators": _count(10, 500, 100),
        "criterion": spaces.choice(criteria),
        "max_depth": _count(1, 64, 64),  # scikit-learn's default has no limit
        "max_features": spaces.choice(
            [features, *(f for f in ("sqrt", "log2", 0.25, 0.5, 0.75, 1.0) if f != features)]
        ),
        "min_samples_leaf": _count(1, 32, 1),
        "min_samples_split": _count(2, 64, 2),
        "bootstrap": spaces.choice([bootstrap, not bootstrap]),
    }


def _boosting(losses):
    return {
        "n_estimators": _count(10, 500, 100),
        "learning_rate": spaces.interval(1e-3, 1.0, log=True, default=0.1),
        "max_depth": _count(1, 12, 3),
        "max_features": spaces.choice([1.0, 0.75, 0.5, 0.25]),
        "min_samples_leaf": _count(1, 32, 1),
        "subsample": spaces.choice([1.0, 0.9, 0.75, 0.5]),
    } | ({"loss": spaces.choice(losses)} if losses else {})


def _svm(**more):
    return {
        "C": spaces.interval(1e-3, 1e3, log=True, default=1.0),
        "kernel": spaces.choice(["rbf", "linear", "poly", "sigmoid"]),
        # scikit-learn's default depends on the number of columns.
        "gamma": spaces.active_if(
            spaces.interval(1e-4, 10.0, log=True, default=0.1), "kernel", ["rbf", "poly", "sigmoid"]
        ),
        "degree": spaces.active_if(spaces.integer(2, 5, default=3), "kernel", ["poly"]),
        "coef0": spaces.active_if(spaces.interval(-1.0, 1.0, default=0.0), "kernel", ["poly", "sigmoid"]),
        **more,
    }


_NEIGHBORS = {
    "n_neighbors": _count(1, 100, 5),
    "weights": spaces.choice(["uniform", "distance"]),
    "p": spaces.choice([2, 1]),
}
_SQUARES = ["squared_error", "absolute_error", "friedman_mse"]

# name -> module of scikit-learn, class, arguments, space
_MODELS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "random_forest_classifier": (
        "ensemble",
        "RandomForestClassifier",
        {},
        _forest(["gini", "entropy"], "sqrt", True),
    ),
    "random_forest_regressor": ("ensemble", "RandomForestRegressor", {}, _forest(_SQUARES[:2], 1.0, True)),
    "extra_trees_classifier": ("ensemble", "ExtraTreesClassifier", {}, _forest(["gini", "entropy"], "sqrt", False)),
    "extra_trees_regressor": ("ensemble", "ExtraTreesRegressor", {}, _forest(_SQUARES[:2], 1.0, False)),
    "gradient_boosting_classifier": ("ensemble", "GradientBoostingClassifier", {}, _boosting(None)),
    "gradient_boosting_regressor": (
        "ensemble",
        "GradientBoostingRegressor",
        {},
        _boosting(["squared_error", "absolute_error", "huber"]),
    ),
    "svm_classifier": ("svm", "SVC", {}, _svm(class_weight=spaces.choice([None, "balanced"]))),
    "svm_regressor": ("svm", "SVR", {}, _svm(epsilon=spaces.interval(1e-3, 1.0, log=True, default=0.1))),
    "k_nearest_classifier": ("neighbors", "KNeighborsClassifier", {}, _NEIGHBORS),
    "k_nearest_regressor": ("neighbors", "KNeighborsRegressor", {}, _NEIGHBORS),
    "linear_classifier": (
        "linear_model",
        "LogisticRegression",
        {"max_iter": 1_000},
        {
            "C": spaces.interval(1e-4, 1e4, log=True, default=1.0),
            "class_weight": spaces.choice([None, "balanced"]),
        },
    ),
    "linear_regressor": ("linear_model", "Ridge", {}, {"alpha": spaces.interval(1e-4, 1e4, log=True, default=1.0)}),
    "k_means": (
        "cluster",
        "KMeans",
        {},
        {
            "n_clusters": _count(2, 32, 8),
            "init": spaces.choice(["k-means++", "random"]),
            "n_init": _count(1, 16, 1),
        },
    ),
    "gaussian_mixture": (
        "mixture",
        "GaussianMixture",
        {},
        {
            "n_components": _count(1, 32, 1),
            "covariance_type": spaces.choice(["full", "tied", "diag", "spherical"]),
            "reg_covar": spaces.interval(1e-8, 1e-1, log=True, default=1e-6),
        },
    ),
}

SKLEARN_MODELS = tuple(_MODELS)
