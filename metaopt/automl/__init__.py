"""Hyperparameters for a new table without a trial: a trained meta-optimizer g that comes with the package.

`tabular_network` is a training run for classification tables: its search space, its problem and its predictions.
`predict_hyperparams` describes a table by meta-features and returns g's hyperparameters for this run. g has learned
from some 2,400 tasks; `experiments/hyperparameters/transfer` trains and judges it.

    prepared = tasks.prepare(table)  # splits and encodes the rows
    hyperparams = automl.predict_hyperparams(prepared)
    network = automl.tabular_network()
    params = automl.train(network, key, hyperparams, automl.tabular_task(prepared))
"""

from metaopt.automl._network import TabularNetwork, tabular_network, tabular_task, train
from metaopt.automl._shipped import predict_hyperparams, shipped_predictor

__all__ = [
    "TabularNetwork",
    "predict_hyperparams",
    "shipped_predictor",
    "tabular_network",
    "tabular_task",
    "train",
]
