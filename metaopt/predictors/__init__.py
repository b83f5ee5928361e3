"""The predictors g and h: networks that map a task to λ, and a wrapper with which an estimator tunes their weights."""

from metaopt.predictors._amortize import (
    amortize,
)
from metaopt.predictors._best_of import (
    best_of,
)
from metaopt.predictors._files import (
    TrainedPredictor,
)
from metaopt.predictors._networks import (
    dataset_embedding,
    ensemble,
    mlp,
)

__all__ = [
    "TrainedPredictor",
    "amortize",
    "best_of",
    "dataset_embedding",
    "ensemble",
    "mlp",
]
