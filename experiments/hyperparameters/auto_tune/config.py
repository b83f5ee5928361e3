"""The sizes of the experiment, and the meta-features that g reads."""

import dataclasses

from metaopt.blackbox._datasets import TABLE_FEATURES

# The meta-features of a table that g reads; `tasks.metafeatures` defines them. They were chosen before the experiment.
# They describe size, class balance, column types, correlation, information, and the performance of cheap learners on
# training rows.
FEATURES = (
    *TABLE_FEATURES,
    "one_nn.mean",
    "elite_nn.mean",
    "linear_discr.mean",
    "naive_bayes.mean",
    "best_node.mean",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an experiment.

    The network and one training run have the same sizes in all presets except `smoke`.
    """

    num_steps: int = 100  # of one training run
    batch_size: int = 64
    num_members: int = 4
    num_hidden: int = 32
    folds: tuple[int, ...] = (0,)  # out of five folds of families; a g from the other folds predicts each
    num_seeds: int = 2  # each has its own split of the rows, initialization and order of the data
    max_tables: int | None = None
    max_rows: int = 5000
    max_features: int = 64
    max_classes: int = 1_000  # tables with more are left out: one with 100 makes its whole bucket twice as slow
    max_buckets: int = 3
    meta_batch: int = 10
    global_steps: int = 60
    meta_steps: int = 60
    global_rate: float = 0.1
    meta_rate: float = 0.01
    max_norm: float = 0.3  # of each task's hypergradient; the norms have heavy tails
    meta_decay: float = 0.1
    num_predictors: int = 1  # each is trained with its own key; g is the mean of their predictions
    fine_tune_steps: tuple[int, ...] = (5,)
    fine_tune_rate: float = 0.1
    trials: tuple[int, ...] = (5, 20, 50)
    tree_trials: int = 3
    chunk: int = 4  # tables that train at the same time


PRESETS = {
    "default": Config(num_seeds=1, max_rows=2000, max_classes=20, max_buckets=1, global_steps=50, meta_steps=50),
    "smoke": Config(
        num_steps=12,
        num_members=2,
        num_hidden=8,
        num_seeds=1,
        max_tables=8,
        max_rows=300,
        max_features=32,
        max_buckets=1,
        meta_batch=4,
        global_steps=3,
        meta_steps=3,
        fine_tune_steps=(2,),
        trials=(1, 2),
        tree_trials=1,
    ),
    "full": Config(
        folds=(0, 1, 2, 3, 4),
        max_buckets=5,
        meta_steps=120,
        num_predictors=3,
        fine_tune_steps=(3, 5),
        trials=(5, 20, 50, 100),
        tree_trials=6,
    ),
}
