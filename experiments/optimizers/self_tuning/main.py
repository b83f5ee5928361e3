"""Runs every problem with every tuner, and writes the result."""

import argparse
from pathlib import Path

from experiments import script
from experiments.optimizers import self_tuning
from experiments.optimizers.self_tuning.config import IMAGES, TABLES
from experiments.optimizers.self_tuning.problems import images, table, text
from experiments.optimizers.self_tuning.report import report
from experiments.optimizers.self_tuning.training import measure, measure_time


def sized(config):
    """Returns the options with the sizes, and {problem: its loader}."""
    small = config.smoke
    config.seeds = 1 if small else config.seeds
    config.hidden, config.batch, config.num_rows = (4, 8, 3000) if small else (64, 128, 3000)
    config.num_steps, config.num_rates, config.repeats = (6, 3, 1) if small else (300, 20, 20)
    text_sizes = dict(context=16, width=16, batch=8, num_train=3000, num_valid=400, num_test=800)
    config.text = argparse.Namespace(**text_sizes, num_steps=config.num_steps)
    names = (
        {"yeast": table} if small else {**dict.fromkeys(TABLES, table), **dict.fromkeys(IMAGES, images), "text": text}
    )
    for name in ("mnist.npz", "fashion_mnist_sub.npz", "tiny_shakespeare.txt.gz"):
        script.data_file(Path(__file__).parent, name)
    return config, names


def main() -> None:
    config, names = sized(script.parser(self_tuning.__doc__).parse_args())
    report(measure(names, config), measure_time(config), config)
