"""few_shot"""

from metaopt.few_shot._adaptation import (
    Adaptation,
    adaptation,
    adapted,
)
from metaopt.few_shot._conv4 import (
    NORMALIZATIONS,
    Network,
    conv4,
)
from metaopt.few_shot._evaluate import (
    AdaptFn,
    accuracy,
    evaluate_episodes,
    mean_absolute_error,
    mean_squared_error,
)
from metaopt.few_shot._methods import (
    anil,
    boil,
    cavia,
    cross_entropy,
    fomaml,
    imaml,
    linear_head,
    maml,
    maml_plus_plus,
    meta_sgd,
    pretrained,
    proto_maml,
    prototypical_networks,
    reptile,
    ridge_head,
)

__all__ = [
    "AdaptFn",
    "Adaptation",
    "NORMALIZATIONS",
    "Network",
    "accuracy",
    "adaptation",
    "adapted",
    "anil",
    "boil",
    "cavia",
    "conv4",
    "cross_entropy",
    "evaluate_episodes",
    "fomaml",
    "imaml",
    "linear_head",
    "maml",
    "maml_plus_plus",
    "mean_absolute_error",
    "mean_squared_error",
    "meta_sgd",
    "pretrained",
    "proto_maml",
    "prototypical_networks",
    "reptile",
    "ridge_head",
]
