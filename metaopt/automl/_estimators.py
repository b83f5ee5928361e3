"""`AutoClassifier` and `AutoRegressor`: scikit-learn estimators that choose and combine models for a table."""

import abc
import logging
import warnings
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from metaopt import tasks
from metaopt.automl import _arguments, _ensemble, _ensemble_fit, _score_error
from metaopt.automl._ensemble_fit import Columns, Options
from metaopt.automl._importance import permutation_importance
from metaopt.automl._portfolio import portfolio
from metaopt.automl._report import notes_of_rows, report_frame, suspected_groups, suspected_leaks
from metaopt.automl._rows import NUM_FOLDS, TrainingRows, sorted_rows
from metaopt.automl._schedule import Clock
from metaopt.automl._table_estimator import TableEstimator, as_frame

_log = logging.getLogger(__name__)


class _AutoEstimator(TableEstimator, abc.ABC):
    """The shared part of the classifier and the regressor."""

    _problem = ""

    def __init__(
        self,
        *,
        time_limit: float | None = 60.0,
        preset: str = "balanced",
        eval_metric: str | None = None,
        models: str | tuple[str, ...] | None = None,
        n_jobs: int | None = -1,
        random_state: Any = 0,
        verbose: bool | None = None,
    ):
        self.time_limit = time_limit
        self.preset = preset
        self.eval_metric = eval_metric
        self.models = models
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y, sample_weight=None, *, groups=None, time=None):
        """Fits models within the time limit, and weights them by their out-of-fold predictions.

        Row k of X, value k of y and so on belong together. The labels of their indexes do not count. The log warns if
        they are the same labels in another order.

        Args:
          X: [n, d] a pandas or polars frame, an array, a dict of columns or a list of dicts: numbers, categories,
            booleans, dates and texts, with missing values.
          y: [n] the target.
          sample_weight: [n] weights of rows, at least 0. A row with weight 2 counts as two rows, which stay together in
            splits. Equal rows of X and y also stay together if rows hardly repeat, or if a column has many different
            values. Otherwise they count as different observations; pass `groups` if they are not.
          groups: [n] the group of each row, such as a patient. Rows of one group are never in both parts of a split.
            The name of a column of the frame X means its values, and this column is then not used as a feature. If you
            pass the values themselves, X should not have this column, because new groups have other values.
          time: [n] numbers or dates, also as texts, or the name of a column, as for `groups`. Models are validated on
            rows that are later than their training rows, and models of all rows predict new rows.

        Returns:
          The estimator.

        Raises:
          ValueError: if the arrays do not fit together, the target is not valid, or an argument is unknown.
          RuntimeError: if no model could be fitted in time.
        """
        options = self._options()  # the time begins here
        vars(self).pop("ensemble_", None)  # if this fit fails, no older models may remain with the new encoder
        _arguments.warn_of_other_order(X, y=y, sample_weight=sample_weight, groups=groups, time=time)
        X, groups, time = _arguments.without_named_columns(as_frame(X), groups, time)
        x = self._fit_table(X)
        weight = np.asarray(_check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True))
        used = np.flatnonzero(weight > 0)
        if not len(used):  # recent versions of scikit-learn check this
            raise ValueError("`sample_weight` must have at least one non-zero value.")
        target = self._fit_target(_arguments.target(y, len(x))[used], weight[used])
        name = getattr(y, "name", None)  # of a Series
        self.target_name_, self.target_encoder_ = (name if isinstance(name, str) else None), None
        self.group_name_ = None if groups is None else str(getattr(groups, "name", None) or "")
        if self._num_classes() == len(target) and groups is None and time is None:
            raise ValueError(
                f"No row can be validated: each of the {len(target)} classes has one row only. If the target is a "
                "number, use regression; otherwise check that it is not an id."
            )
        group_codes = None if groups is None else _arguments.group_codes(groups, len(x))
        if group_codes is not None and len(np.unique(group_codes)) == len(group_codes):
            _log.warning(
                "`groups` has a different value in each row, so no rows stay together. Is it an id of the rows?"
            )
        times = None if time is None else _arguments.times(time, len(x))
        parts = (None if part is None else part[used] for part in (group_codes, times))
        rows = sorted_rows(x[used], target, weight[used], *parts)
        columns = Columns(self.encoder_.categorical, self.encoder_.high_cardinality)
        members = portfolio(self._problem, self.preset, self.models, len(rows.y))
        self.suspected_leaks_ = suspected_leaks(x[used], target, self.encoder_, options.clock)
        self.ensemble_ = _ensemble_fit.fit_ensemble(rows, columns, self._num_classes(), members, options)
        self.suspected_groups_ = suspected_groups(x[used], self.encoder_) if groups is None else ()
        self.row_notes_ = notes_of_rows(weight, rows, self.ensemble_.out_of_fold, time, times)
        self.report_ = report_frame(self.encoder_, self.suspected_leaks_, self.suspected_groups_, self.row_notes_)
        self._keep_scores(rows)
        self.score_error_ = _score_error.score_error(rows, self.ensemble_.out_of_fold, options.metric, options.seed)
        return self

    @property
    def leaderboard_(self) -> pd.DataFrame:
        """Models by out-of-fold score (larger is better), with their weight, and seconds of fit and prediction."""
        check_is_fitted(self, "ensemble_")
        table = [(m.member.name, m.score, m.weight, m.fit_seconds, m.predict_seconds) for m in self.ensemble_.members]
        return pd.DataFrame(table, columns=["model", "score", "weight", "fit_seconds", "predict_seconds"])

    @property
    def not_fitted_(self) -> dict[str, str]:
        """The models of the preset that were not fitted, with the reason, such as "out of time"."""
        check_is_fitted(self, "ensemble_")
        return dict(self.ensemble_.failed)

    @property
    def score_(self) -> float:
        """The out-of-fold score of the ensemble by `eval_metric`; losses have a minus sign."""
        check_is_fitted(self, "ensemble_")
        return self.ensemble_.score

    def score_interval(self, *, coverage: float = 0.95, num_new: int | None = None) -> tuple[float, float]:
        """An interval around `score_` for the score on new groups, later times or new rows.

        It is score_ ± t se √(1 + U / m), where U is the number of units in `fit`, and m is `num_new`. Units are parts
        of the validated times (at most 8) if `fit` had `time`, else groups if it had `groups`, and otherwise rows. The
        standard error se is the jackknife's over at most 50 blocks of whole units, and t is Student's quantile with one
        degree of freedom less than blocks. With three groups it is 4.3 instead of 1.96. As in `score_`, each row
        counts by its weight, and so large groups count more.

        The interval covers the randomness of which units the table has. It assumes that new units are like them, and
        does not cover other kinds of units, or changes over time after the last row. The models that predict different
        units share training rows. The interval ignores this dependence, so the true coverage may be lower. It is also
        lower if few units have skewed losses: in simulations 86 to 94 % instead of 95 % for 3 to 10 units.

        `score_` itself has two small biases. It becomes too high because the same predictions select the weights of the
        models. It becomes too low because new rows are predicted by the mean over folds, which is better than the model
        of one fold.

        Args:
          coverage: the probability, in (0, 1).
          num_new: the number of units in a test whose score the interval should contain. They should be about as large
            as those in `fit`. None gives an interval for the expected score, as in a very large test.

        Returns:
          Lower and upper end, in units of `score_`. Both are at the limits of the metric if only one unit was
          validated.

        Raises:
          ValueError: if `coverage` is not in (0, 1), or `num_new < 1`.

        Source: for what such intervals miss, Bates, Hastie & Tibshirani, "Cross-validation: what does it estimate and
        how well does it do it?", JASA 2024, https://arxiv.org/abs/2104.00673
        """
        check_is_fitted(self, "ensemble_")
        if num_new is not None and not num_new >= 1:
            raise ValueError(f"`num_new` must be at least 1 or None; got {num_new!r}.")
        return _score_error.score_interval(self.score_, self.score_error_, self._metric(), _fraction(coverage), num_new)

    def evaluate(self, X, y, *, groups=None, coverage: float = 0.95) -> pd.DataFrame:
        """Metrics of the predictions of labeled rows that `fit` did not get, each with an interval.

        The interval is that of `score_interval`, from the errors of these rows. It covers the randomness of which rows
        the test has, so it is short if there are many.

        Args:
          X: [n, d] rows, with the same columns as in `fit`.
          y: [n] their targets.
          groups: [n] the group of each row, such as a patient, or the name of a column of the frame X, if rows of one
            group are alike. The interval is much too short without them.
          coverage: the probability, in (0, 1).

        Returns:
          A frame with "metric", "value", "lower" and "upper"; `eval_metric` is in the first row. Losses are positive,
          so a smaller "log_loss", "rmse" or "mae" is better. "rmse" and "mae" are in units of the target. "roc_auc" is
          NaN if the rows have one class. An interval of length 0, such as [1, 1] without any error, does not mean that
          the metric is certain: for n rows without an error, the error rate may still be 3/n.

        Raises:
          ValueError: if the arrays do not fit together, X has no column `groups`, or a label did not occur in `fit`.
        """
        check_is_fitted(self, "ensemble_")
        _arguments.warn_of_other_order(X, y=y, groups=groups)
        _, groups, _ = _arguments.without_named_columns(X := as_frame(X), groups)
        self._warn_of_rows_of_fit(X)
        num_rows = len(X)
        codes = self._target_codes(_arguments.target(y, num_rows))
        units = None if groups is None else _arguments.group_codes(groups, num_rows)
        rows = TrainingRows(np.zeros((num_rows, 0)), codes, np.ones(num_rows), np.arange(num_rows), units)
        metrics = dict.fromkeys((self._metric(), *_ensemble.METRICS[self._problem]))
        options = _fraction(coverage), self._seed(), getattr(self, "scale_", 1.0)
        table = _score_error.evaluation(metrics, self._predict_ensemble(X), rows, *options)
        return pd.DataFrame(table, columns=["metric", "value", "lower", "upper"])

    def importance(self, X, y, *, n_repeats: int = 5, scoring: Any = None) -> pd.DataFrame:
        """Permutation importance: how much the score falls if the values of a column are shuffled.

        Columns that `fit` dropped have the importance 0. Progress is reported as in `fit`.

        Args:
          X: rows that were not used in `fit`, with the same columns.
          y: their targets.
          n_repeats: the number of shuffles of each column.
          scoring: a scorer's name; by default accuracy or R².

        Returns:
          A frame with "column", "mean" and "sd", sorted by the mean.
        """
        check_is_fitted(self, "ensemble_")
        names = list(getattr(self, "feature_names_in_", range(self.n_features_in_)))
        used = {code.source for code in self.encoder_.columns}
        mean, sd = permutation_importance(
            self, as_frame(X), y, names, used, n_repeats=n_repeats, scoring=scoring, seed=self._seed()
        )
        table = pd.DataFrame({"column": names, "mean": mean, "sd": sd})
        return table.sort_values("mean", ascending=False, ignore_index=True)

    def _predict_ensemble(self, X) -> np.ndarray:
        check_is_fitted(self, "ensemble_")
        return _ensemble_fit.predict_ensemble(self.ensemble_, self._read_table(X))

    def _metric(self) -> str:
        return _ensemble.METRICS[self._problem][0] if self.eval_metric is None else self.eval_metric

    def _score_name(self) -> str:
        return _ensemble.score_name(self._metric())

    def _options(self) -> Options:
        metrics = _ensemble.METRICS[self._problem]
        metric = self._metric()
        if metric not in metrics:
            raise ValueError(f"`eval_metric` must be one of {', '.join(metrics)}; got {metric!r}.")
        limit = self.time_limit
        if limit is not None and not limit > 0:
            raise ValueError(f"`time_limit` must be positive or None; got {limit!r}.")
        limit = None if limit is None or np.isinf(limit) else float(limit)
        portfolio(self._problem, self.preset, self.models, 1)  # raises before the table is read if a name is unknown
        return Options(metric, Clock(limit), _ensemble_fit.num_jobs(self.n_jobs), self._seed(), self.verbose)

    def _seed(self) -> int:
        from sklearn.utils import check_random_state

        generator = check_random_state(self.random_state)  # raises if the seed is not valid
        is_seed = isinstance(self.random_state, int | np.integer)
        seed = int(self.random_state) if is_seed else int(generator.randint(2**31 - 1))
        return seed % (2**31 - NUM_FOLDS - 1)  # LightGBM's seeds have 31 bits, and each fold has its own

    @abc.abstractmethod
    def _fit_target(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Returns the target as numbers, and stores the classes or the scale that convert predictions back."""

    @abc.abstractmethod
    def _target_codes(self, y: np.ndarray) -> np.ndarray:
        """Returns the target of other rows as the numbers of `_fit_target`."""

    @abc.abstractmethod
    def _num_classes(self) -> int:
        """The number of classes, or 0 for regression."""

    @abc.abstractmethod
    def _nonconformity(self, y: np.ndarray) -> np.ndarray:
        """Returns the nonconformity score of each row: NaN without an out-of-fold prediction."""

    def _keep_scores(self, rows) -> None:
        """Keeps the nonconformity scores of the rows with out-of-fold predictions, and their weights."""
        scores = self._nonconformity(rows.y)
        scored = ~np.isnan(scores)
        self.nonconformity_ = np.stack([scores[scored], rows.weight[scored] / rows.weight.mean()])


class AutoClassifier(ClassifierMixin, _AutoEstimator):
    """A classifier for tables that chooses, combines and calibrates models within a time limit.

    The models are the network of `tabular_network` with the hyperparameters that the shipped g predicts, draws around
    them, linear models, forests and boosted trees. Each is fitted on 8 folds. Greedy selection weights the models by
    their out-of-fold predictions, and a temperature calibrates the result. A prediction is the weighted mean over
    models and folds; no model is fitted again on all rows, except if `fit` gets `time`.

    Limits. Models are fitted in other processes, which take a second to start, and networks on the CPU. A worker of
    `multiprocessing.Pool` cannot start processes, so it fits one model at a time, perhaps beyond the limit. The first
    model is awaited. Some out-of-fold scores are slightly optimistic: g reads the meta-features of all rows, the
    refined network uses the validation rows of all folds, and so do trees with one split (over 20,000 rows), to stop.

    Args:
      time_limit: seconds for `fit`, or None to fit all models of the preset. Only then, equal seeds give equal results.
      preset: "instant" (only the network: with g's hyperparameters, however long it takes, and with up to 7 draws
        around them in the rest of the time), "balanced" (14 models, and CatBoost if it is installed) or "best" (8
        more).
      eval_metric: the score that the weights maximize: "log_loss" (default), "accuracy", "balanced_accuracy" or
        "roc_auc".
      models: the kinds of models to use, one or several of "network", "linear", "lightgbm", "xgboost", "catboost",
        "extra_trees", "random_forest" and "hist_gradient_boosting". None uses all that are installed, but
        "hist_gradient_boosting" only without LightGBM.
      n_jobs: the number of fits at a time, each of which uses one thread; −1 is one per core.
      random_state: the seed.
      verbose: whether to report progress; by default as `training.fit` does.

    Attributes:
      classes_: [C] the labels.
      leaderboard_: a frame of the models, with their score, weight, and seconds of fit and prediction.
      not_fitted_: name -> reason, of models that were not fitted, for example because the time was over.
      score_: the out-of-fold score of the ensemble by `eval_metric`, larger is better.
      report_: a frame of the rows and columns that were changed or dropped, with reasons.

    Example:
      >>> from sklearn.datasets import load_wine
      >>> from metaopt import automl
      >>> X, y = load_wine(return_X_y=True, as_frame=True)
      >>> model = automl.AutoClassifier(
      ...     models=("linear", "extra_trees"), time_limit=None
      ... ).fit(X[::2], y[::2])
      >>> bool(model.score(X[1::2], y[1::2]) > 0.9)
      True
    """

    _problem = "classification"

    def predict_proba(self, X) -> np.ndarray:
        """Returns calibrated probabilities [n, C]; columns are in the order of `classes_`."""
        return self._predict_ensemble(X)

    def predict(self, X) -> np.ndarray:
        """Returns the most probable label of each row, [n]."""
        return self._labels(self.predict_proba(X))

    def predict_set(self, X, *, coverage: float = 0.9) -> np.ndarray:
        """Returns a set of labels for each row. The set contains the true label with a given probability.

        A label is in the set if its probability p satisfies 1 − p ≤ q. For q, each of the n training rows has a score:
        1 − p of its true label, with the out-of-fold probability p. The threshold q is the ⌈(n + 1) coverage⌉-th
        smallest score; with weights, the weighted quantile of the scores. The coverage holds on average over rows that
        are exchangeable with the training rows; it is approximate, because a prediction averages the models of all
        folds.

        Args:
          X: rows.
          coverage: the probability, in (0, 1).

        Returns:
          [n, C] bool, in the order of `classes_`. The most probable label is always in the set.
        """
        return self._label_sets(self.predict_proba(X), coverage)

    def _labels(self, probabilities: np.ndarray) -> np.ndarray:
        return self.classes_[probabilities.argmax(axis=1)]

    def _label_sets(self, probabilities: np.ndarray, coverage: float) -> np.ndarray:
        scores, weight = self.nonconformity_
        threshold = _ensemble.conformal_threshold(scores, weight, _fraction(coverage))
        inside = 1 - probabilities <= threshold
        inside[np.arange(len(inside)), probabilities.argmax(axis=1)] = True
        return inside

    def _fit_target(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        if y.dtype == object:  # texts, and numbers or booleans among them
            self.classes_, codes = tasks.fit_labels(y)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The number of unique classes")
                check_classification_targets(y)
            self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            label = self.classes_.tolist()[0]
            raise ValueError(f"The target has one class, {label!r}: a classifier needs at least two.")
        _arguments.log_similar_labels(self.classes_)
        return codes

    def _target_codes(self, y: np.ndarray) -> np.ndarray:
        classes = {label: code for code, label in enumerate(self.classes_.tolist())}
        codes = np.array([classes.get(label, -1) for label in y.tolist()], np.int64)
        if (codes < 0).any():
            raise ValueError(
                f"{(codes < 0).sum()} of {len(y)} rows have a label that did not occur in `fit`, such as "
                f"{y.tolist()[int(codes.argmin())]!r}. Remove these rows, or correct their labels. `fit` had "
                f"{', '.join(map(repr, list(classes)[:20]))}{', ...' if len(classes) > 20 else ''}."
            )
        return codes

    def _num_classes(self) -> int:
        return len(self.classes_)

    def _nonconformity(self, y: np.ndarray) -> np.ndarray:
        return 1 - self.ensemble_.out_of_fold[np.arange(len(y)), y]


class AutoRegressor(RegressorMixin, _AutoEstimator):
    """A regressor for tables that chooses and combines models within a time limit.

    It works like `AutoClassifier`, with a Gaussian process among its models. On more than 2,000 rows, this process uses
    a sample of 2,000; 300 of them choose its length scales. The network classifies rows by up to ten intervals of the
    target, with hyperparameters of a g that has learned from such tasks (`shipped_predictor("regression")`). Its
    prediction is the mean of the intervals' mean targets, weighted by their probabilities. The ends of the intervals
    are quantiles of the targets of all rows.

    Args:
      time_limit: seconds for `fit`, or None to fit all models of the preset. Only then, equal seeds give equal results.
      preset: "instant", "balanced" or "best".
      eval_metric: "rmse" (default), "mae" or "r2": the score that the weights maximize.
      models: the kinds of models to use, as for `AutoClassifier`, and "gaussian_process", which None also uses.
      n_jobs: the number of fits at a time; −1 is one per core.
      random_state: the seed.
      verbose: whether to report progress; by default as `training.fit` does.

    Attributes:
      leaderboard_: a frame of the models, with their score, weight, and seconds of fit and prediction.
      not_fitted_: name -> reason, of models that were not fitted, for example because the time was over.
      score_: the out-of-fold score of the ensemble by `eval_metric`, larger is better. "rmse" and "mae" are negative,
        in units of the target's standard deviation.
      report_: a frame of the rows and columns that were changed or dropped, with reasons.

    Example:
      >>> from sklearn.datasets import load_diabetes
      >>> from metaopt import automl
      >>> X, y = load_diabetes(return_X_y=True, as_frame=True)
      >>> model = automl.AutoRegressor(models=("linear", "extra_trees"), time_limit=None).fit(
      ...     X[::2], y[::2]
      ... )
      >>> bool(model.score(X[1::2], y[1::2]) > 0.4)
      True
    """

    _problem = "regression"

    def predict(self, X) -> np.ndarray:
        """Returns the predicted target of each row, [n]."""
        predicted = self._predict_ensemble(X)  # checks first that the model is fitted
        return self.mean_ + self.scale_ * predicted

    def predict_interval(self, X, *, coverage: float = 0.9) -> np.ndarray:
        """Returns an interval for each row. The interval contains the true target with a given probability.

        The interval is the prediction ± q, where q is the ⌈(n + 1) coverage⌉-th smallest absolute error of the n
        out-of-fold predictions; with weights, their weighted quantile. All rows get intervals of the same length. The
        coverage holds on average over rows that are exchangeable with the training rows; it is approximate, as in
        `AutoClassifier.predict_set`.

        Args:
          X: rows.
          coverage: the probability, in (0, 1).

        Returns:
          [n, 2] lower and upper ends.
        """
        return self._intervals(self.predict(X), coverage)

    def _intervals(self, predicted: np.ndarray, coverage: float) -> np.ndarray:
        scores, weight = self.nonconformity_
        half = self.scale_ * _ensemble.conformal_threshold(scores, weight, _fraction(coverage))
        return np.stack([predicted - half, predicted + half], axis=1)

    def _fit_target(self, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        y = self._numeric_target(y)
        unit = float(np.abs(y).max()) or 1.0  # squares of large numbers overflow
        mean = np.average(y / unit, weights=weight)
        deviation = np.sqrt(np.average((y / unit - mean) ** 2, weights=weight))
        self.mean_ = float(mean * unit)
        self.scale_ = float(deviation * unit) or 1.0
        return (y - self.mean_) / self.scale_

    def _target_codes(self, y: np.ndarray) -> np.ndarray:
        return (self._numeric_target(y) - self.mean_) / self.scale_

    def _numeric_target(self, y: np.ndarray) -> np.ndarray:
        if y.dtype.kind in "mMc":
            raise ValueError(f"The target must be numbers; got {y.dtype}. Convert it, for example to days.")
        try:
            y = y.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The target must be numbers; got {y.dtype} ({error}). Labels need a classifier. In pandas, '$1,234.5' "
                r"becomes a number by `y.str.replace(r'[^\d.-]', '', regex=True).astype(float)`, and texts like "
                r"'1.234,50 €' by `y.str.replace(r'[^\d,-]', '', regex=True).str.replace(',', '.').astype(float)`."
            ) from error
        if not np.isfinite(y).all():
            raise ValueError("Input y contains NaN or infinity.")
        return y

    def _num_classes(self) -> int:
        return 0

    def _nonconformity(self, y: np.ndarray) -> np.ndarray:
        return np.abs(self.ensemble_.out_of_fold - y)


def _fraction(coverage: float) -> float:
    if not 0 < coverage < 1:
        raise ValueError(f"`coverage` must be between 0 and 1; got {coverage!r}.")
    return coverage
