"""Other libraries' models as black boxes; each library is imported when it is called for."""

from metaopt.integrations._sklearn import SKLEARN_MODELS, SklearnModel, sklearn_model, sklearn_objective

__all__ = ["SKLEARN_MODELS", "SklearnModel", "sklearn_model", "sklearn_objective"]
