"""Models for tables: scikit-learn estimators, and a trained meta-optimizer g that comes with the package.

`AutoClassifier` and `AutoRegressor` choose, combine and calibrate models within a time limit. `AutoClusterer` chooses
clusters.

    model = automl.AutoClassifier(time_limit=60).fit(frame, target)
    model.predict_proba(new_frame)

`tabular_network` is a training run for classification tables: its search space, its problem and its predictions.
`predict_hyperparams` describes a table by meta-features and returns g's hyperparameters for this run. g has learned
from some 2,400 tasks; `experiments/hyperparameters/transfer` trains and judges it.

    prepared = tasks.prepare(table)  # splits and encodes the rows
    hyperparams = automl.predict_hyperparams(prepared)
    network = automl.tabular_network()
    params = automl.train(network, key, hyperparams, automl.tabular_task(prepared))
    model = automl.TabularModel(params, hyperparams, prepared.encoder, prepared.columns, prepared.classes)  # one file
"""

from typing import TYPE_CHECKING, Any

from metaopt import _extras
from metaopt.automl._network import TabularNetwork, tabular_network, tabular_task, train
from metaopt.automl._shipped import predict_hyperparams, shipped_predictor
from metaopt.automl._tabular_model import TabularModel

if TYPE_CHECKING:
    from metaopt.automl._clusterer import AutoClusterer
    from metaopt.automl._estimators import AutoClassifier, AutoRegressor

__all__ = [
    "AutoClassifier",
    "AutoClusterer",
    "AutoRegressor",
    "TabularModel",
    "TabularNetwork",
    "predict_hyperparams",
    "shipped_predictor",
    "tabular_network",
    "tabular_task",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports the estimators at their first use, since they need scikit-learn and pandas."""
    if name in ("AutoClassifier", "AutoClusterer", "AutoRegressor"):
        for package in ("sklearn", "pandas"):
            _extras.require(package, "automl", f"automl.{name}")
        if name == "AutoClusterer":
            from metaopt.automl import _clusterer

            return _clusterer.AutoClusterer
        from metaopt.automl import _estimators, _saved  # noqa: F401  (registers the formats of files)

        return getattr(_estimators, name)
    raise AttributeError(f"module 'metaopt.automl' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names the estimators before their first use, too."""
    return sorted({*globals(), *__all__})
