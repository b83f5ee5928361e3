"""Few-shot learning: how a model adapts to a task, and how methods are compared on the same episodes.

`adaptation` specifies a few inner steps from a learned start. The methods of the literature are settings of it:

| method | what adapts | |
|---|---|---|
| `maml`, `fomaml` | all leaves; second- or first-order hypergradients | with `rule=hypergrad.reptile`: Reptile |
| `anil`, `boil` | only the head; everything but the head | |
| `meta_sgd`, `maml_plus_plus` | all leaves, with learned rates | |
| `imaml` | all leaves, up to a minimum; implicit hypergradients | |
| `cavia` | a context vector | |
| `proto_maml`, `prototypical_networks`, `ridge_head` | a head that is computed from the support set | |
| `pretrained` | nothing in training, all leaves at test | baseline |

`adapted` makes the prediction function of an adaptation, and `evaluate_episodes` scores such functions. To add a
method, write it in one file, export it here, and add a row to the table in `tests/few_shot/test_battery.py`.
"""

from metaopt.few_shot._adaptation import Adaptation, adaptation
from metaopt.few_shot._adapted import adapted
from metaopt.few_shot._conv4 import ConvNet, conv4
from metaopt.few_shot._evaluate import evaluate_episodes
from metaopt.few_shot._heads import linear_head, proto_maml, prototypical_networks, ridge_head
from metaopt.few_shot._methods import (
    anil,
    boil,
    cavia,
    fomaml,
    imaml,
    maml,
    maml_plus_plus,
    meta_sgd,
    pretrained,
)
from metaopt.few_shot._scores import accuracy, mean_absolute_error, mean_squared_error

__all__ = [
    "Adaptation",
    "ConvNet",
    "accuracy",
    "adaptation",
    "adapted",
    "anil",
    "boil",
    "cavia",
    "conv4",
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
    "ridge_head",
]
