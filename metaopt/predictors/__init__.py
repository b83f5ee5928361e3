"""What g and h are: networks that map a task to λ, and what makes an estimator tune their weights."""

from metaopt.predictors._acquisition import (
    batch_expected_improvement,
    expected_improvement,
    lower_confidence_bound,
    thompson_sample,
)
from metaopt.predictors._amortize import amortize
from metaopt.predictors._files import SavedPredictor, load, save
from metaopt.predictors._networks import dataset_embedding, ensemble, from_config, mlp
from metaopt.predictors._posterior import (
    Conditioned,
    Joint,
    Mixture,
    condition,
    functions_at,
    joint_posterior_at,
    posterior,
    posterior_at,
    posterior_given,
)
from metaopt.predictors._surrogates import (
    Kernel,
    Surrogate,
    TaskTrials,
    attention_loss,
    attention_weights,
    expected_outcomes,
    init_attention,
    kernel_loss,
    kernel_matrix,
    normalize,
    rank_features,
    surrogate,
    task_weights,
)

__all__ = [
    "Conditioned",
    "Joint",
    "Kernel",
    "Mixture",
    "SavedPredictor",
    "Surrogate",
    "TaskTrials",
    "amortize",
    "attention_loss",
    "attention_weights",
    "batch_expected_improvement",
    "condition",
    "dataset_embedding",
    "ensemble",
    "expected_improvement",
    "expected_outcomes",
    "from_config",
    "functions_at",
    "init_attention",
    "joint_posterior_at",
    "kernel_loss",
    "kernel_matrix",
    "load",
    "lower_confidence_bound",
    "mlp",
    "normalize",
    "posterior",
    "posterior_at",
    "posterior_given",
    "rank_features",
    "save",
    "surrogate",
    "task_weights",
    "thompson_sample",
]
