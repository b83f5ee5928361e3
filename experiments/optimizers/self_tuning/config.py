"""The compared tuners, their starts, and the problems."""

from typing import NamedTuple

import optax

TABLES = ("abalone", "fars", "page-blocks", "satimage", "segment", "yeast", "digits")
IMAGES = ("mnist", "fashion_mnist_sub")


class Signal(NamedTuple):
    """The signal of the tuner, and the hyperparameters that it tunes."""

    share: float  # the validation batch, as a share of the training batch
    gap: float = 0.0  # γ
    decay: bool = False  # whether λ holds the weight decay, too


SIGNALS = {
    "training signal": Signal(0.0),
    "validation signal": Signal(0.5),
    "validation and gap": Signal(1.0, gap=1.0),
    "validation signal, decay too": Signal(0.5, decay=True),
}
START = 0.01  # as a share of the given rate
# The starts of λ, in units of the best rate of the grid. The last two are not recommended. They show the cost of a bad
# start by itself.
STARTS = {"rate / 100": START / 100, "rate × 10": START * 10, "λ from best / 100": 1 / 100, "λ from best × 10": 10.0}
OF_ALL, OF_SOME = list(STARTS)[:2], list(STARTS)[2:]  # for all signals, and for the two in the documentation
TRUE_STARTS = ("training signal", "validation signal, decay too")
DECAY_START = 0.01
TUNER = optax.sgd(0.5)
TUNERS = {"rate": TUNER, "decay": optax.sgd(2.0)}
DECAYS = (0.01, 0.1, 1.0)  # next to optax's 1e-4 in the grid of rates and decays, with every second rate
FREE = {
    "prodigy": optax.contrib.prodigy,
    "dowg": optax.contrib.dowg,
    "schedule-free": optax.contrib.schedule_free_adamw,
    "dadapt": optax.contrib.dadapt_adamw,
}
NUM_CLASSES = 10
WIDTH = {"table": 64, "image": 196}
