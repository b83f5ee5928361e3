"""The sizes of the experiment."""

from typing import NamedTuple


class Config(NamedTuple):
    size: int  # of images
    channels: int
    cells: int  # N, per stage
    batch: int
    num_steps: int
    num_epochs: int  # cells are recorded at their ends
    num_scored: int  # cells whose training-free scores are compared
    one_shot_cells: int  # random cells from which single-path one-shot chooses

    @property
    def every(self) -> int:
        return self.num_steps // self.num_epochs


QUICK = Config(16, 8, 1, 16, 300, 15, 100, 100)
FULL = Config(32, 16, 5, 64, 19_500, 50, 1_000, 1_000)
SMOKE = Config(4, 2, 1, 4, 6, 2, 3, 3)
LATE = {"start": 10, "window": 5, "delta": 4}  # settings of RobustDARTS
