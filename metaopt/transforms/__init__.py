"""Composable optax transforms.

`differentiable` makes any transform differentiable at zero gradients. The others have more hyperparameters to tune than
those of optax.
"""

from metaopt.transforms._accumulation import (
    learnable_accumulation,
)
from metaopt.transforms._clip import (
    learnable_clip,
)
from metaopt.transforms._differentiable import (
    differentiable,
)
from metaopt.transforms._learned import (
    LearnedWeights,
    init_learned,
    learned,
)
from metaopt.transforms._mixture import (
    mixture,
)
from metaopt.transforms._per_parameter import (
    per_group,
    per_parameter,
)
from metaopt.transforms._schedules import (
    cosine_schedule,
    knot_schedule,
    polynomial_schedule,
    wsd_schedule,
)
from metaopt.transforms._self_tuning import (
    self_tuning,
)

__all__ = [
    "LearnedWeights",
    "cosine_schedule",
    "differentiable",
    "init_learned",
    "knot_schedule",
    "learnable_accumulation",
    "learnable_clip",
    "learned",
    "mixture",
    "per_group",
    "per_parameter",
    "polynomial_schedule",
    "self_tuning",
    "wsd_schedule",
]
