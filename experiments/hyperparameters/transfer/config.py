"""The sizes of the experiment, and the meta-features that g reads."""

import dataclasses
from typing import NamedTuple

from experiments.hyperparameters import auto_tune
from experiments.hyperparameters.auto_tune.config import FEATURES as SIMPLE_FEATURES
from experiments.hyperparameters.auto_tune.config import PRESETS

LANDMARKS = tuple(
    f"log_loss.{name}"
    for name in (
        "prior",
        "ridge_strong",
        "ridge_medium",
        "ridge_weak",
        "neighbors",
        "medium_gain",
        "weak_gain",
        "neighbors_gain",
        "best",
        "log_columns",
        "log_rows",
        "log_minority",
        "log_rows_per_column",
    )
)
FEATURES = SIMPLE_FEATURES + LANDMARKS
GROUPS = ("simple", "statistical", "information_theoretic", "landmarking", "log_loss")


class Width(NamedTuple):
    """A padded width of tables: columns and classes."""

    columns: int
    classes: int


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an experiment. The training run is that of `auto_tune`."""

    run: auto_tune.config.Config = PRESETS["default"]
    widths: tuple[Width, ...] = (Width(10, 4), Width(24, 6), Width(64, 12))
    train_rows: int = 1200
    valid_rows: int = 800
    max_frames: int | None = None
    numbers: bool = False  # targets are intervals of numeric columns
    outer_loss: str = "log_loss"  # or "rank_error": the RMSE of the mean interval
    num_rules: int = 0  # simulated tables
    per_family: int = 4  # tasks with rotated targets
    many_per_family: int = 0  # tasks with many classes
    limit: float = 2.0  # of standardized meta-features; beyond it, g shrinks to its center
    feature_dropout: float = 0.1
    meta_batch: int = 16
    max_norm: float = 0.3  # of the hypergradient of one task, with respect to λ
    global_steps: int = 100
    global_rate: float = 0.1
    meta_steps: int = 1000
    meta_rate: float = 0.01
    meta_decay: float = 0.1
    eval_every: int = 100
    num_evaluated: int = 240  # development tasks
    variant_steps: int = 120  # that continue the training of the shipped g
    recorded_tasks: int = 300  # from which the search of the second stage learns
    # Of judging.
    num_splits: int = 2
    judged_buckets: int = 3  # padded shapes
    proposals: int = 10
    spread: float = 0.5
    fine_tune_steps: int = 3
    fine_tune_rate: float = 0.3
    trials: tuple[int, ...] = (4, 10, 20, 50, 100)
    tree_trials: int = 3
    max_judged: int | None = None


DEFAULT = Config()
EXTENDED = Config(num_rules=80, many_per_family=2, widths=(*DEFAULT.widths, Width(24, 32)))
REGRESSION = Config(numbers=True, widths=(Width(10, 12), Width(24, 12), Width(64, 12)))
SMOKE = Config(
    run=PRESETS["smoke"],
    widths=(Width(64, 12),),
    max_frames=60,
    num_rules=3,
    many_per_family=1,
    meta_batch=4,
    global_steps=2,
    meta_steps=4,
    eval_every=2,
    num_evaluated=4,
    variant_steps=2,
    recorded_tasks=6,
    num_splits=1,
    judged_buckets=1,
    proposals=2,
    fine_tune_steps=1,
    trials=(1, 2),
    tree_trials=1,
    max_judged=3,
)
