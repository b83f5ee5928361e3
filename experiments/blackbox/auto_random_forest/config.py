"""The sizes of the experiment."""

from typing import NamedTuple


class Config(NamedTuple):
    max_rows: int = 400  # for training
    max_trees: int = 64
    num_folds: int = 5  # of cross-validation
    num_configurations: int = 100
    num_splits: int = 5  # number of parts of the families
    trials: tuple[int, ...] = (1, 5, 10, 30)  # on a new table
    more_trials: tuple[int, ...] = (100,)  # only for random search
    num_steps: int = 150  # steps that train g
    max_tables: int | None = None


SMOKE = Config(60, 10, 2, 4, 2, (1, 2), (4,), 3, 4)
FULL = Config(2000, 500, 5, 100)
