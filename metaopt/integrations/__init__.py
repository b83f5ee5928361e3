"""Models of other libraries as black boxes, and Optuna studies. Each library is imported only when it is used."""

from metaopt.integrations import lightning
from metaopt.integrations._optuna import from_optuna_study, optuna_sampler, to_optuna_study
from metaopt.integrations._sklearn import SKLEARN_MODELS, SklearnModel, sklearn_model, sklearn_objective

__all__ = [
    "SKLEARN_MODELS",
    "SklearnModel",
    "from_optuna_study",
    "lightning",
    "optuna_sampler",
    "sklearn_model",
    "sklearn_objective",
    "to_optuna_study",
]
