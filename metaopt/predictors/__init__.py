"""What g and h are: networks that map a task to λ, and what makes an estimator tune their weights."""

from metaopt.predictors._amortize import amortize
from metaopt.predictors._files import SavedPredictor, load, save
from metaopt.predictors._networks import dataset_embedding, ensemble, from_config, mlp

__all__ = ["SavedPredictor", "amortize", "dataset_embedding", "ensemble", "from_config", "load", "mlp", "save"]
