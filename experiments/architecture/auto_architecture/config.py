"""The sizes of the experiment."""

import dataclasses

from experiments.architecture.auto_architecture.image_table_tasks import SHAPES


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an experiment."""

    shapes: tuple[str, ...] = SHAPES
    # The evaluated ones of `num_folds` folds of families. For each of them, h is trained on the other folds.
    folds: tuple[int, ...] = (0,)
    num_folds: int = 3
    max_tasks: int = 40  # of each shape
    held_out: int = 12  # tasks of a fold that are evaluated, at most
    num_steps: int = 40  # of one training run
    batch_size: int = 32
    rate: float = 1e-2
    smoothing: float = 0.1  # of training labels; without it, long training of wide networks becomes overconfident
    unroll: int = 20  # steps of training through which h is learned, starting at the learned weights
    meta_batch: int = 6
    meta_steps: int = 30
    meta_rate: float = 0.05
    init_rate: float = 3e-3
    meta_decay: float = 0.1
    temperature: float = 0.5  # for the architectures in the training of h
    num_hidden: int = 8
    fine_tune_steps: int = 8
    darts_steps: int = 60
    rates: tuple[float, ...] = (0.05,)  # candidates for the rate of α in fine-tuning
    darts_rates: tuple[float, ...] = (0.05,)  # candidates for the rate of α in DARTS
    darts_orders: tuple[str, ...] = ("second",)
    trusts: tuple[float, ...] = (0.0, 0.5, 1.0)
    left_out: float = 0.25  # share of the meta-training families that select trust and rates
    tuned_on: int = 8  # of their tasks, for the rates
    trained: int = 24  # random networks on every task; held-out tasks have as many as `trials` needs
    trials: tuple[int, ...] = (5, 20)
    records: int = 12  # random networks on each task of the meta-training set, different for each, for h from records
    evolution: int = 20  # networks per task, including `population` random ones
    population: int = 8


PRESETS = {
    "default": Config(),
    "smoke": Config(
        max_tasks=8,
        held_out=2,
        num_folds=2,
        num_steps=4,
        unroll=2,
        meta_batch=2,
        meta_steps=2,
        fine_tune_steps=2,
        darts_steps=2,
        darts_orders=("first", "second"),
        trained=3,
        records=2,
        trials=(1, 3),
        evolution=3,
        population=2,
    ),
    "full": Config(
        folds=(0, 1, 2),
        max_tasks=63,
        held_out=18,
        meta_steps=150,
        records=24,
        trials=(5, 20, 50),
        rates=(0.01, 0.05, 0.2),
        darts_rates=(0.01, 0.05, 0.2, 0.5, 1.0),
        darts_orders=("first", "second", "exact"),
    ),
}
