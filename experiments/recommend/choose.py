"""Compares designs on the training users of fold 0: part by part, the users of a part are new to all models."""

import itertools
import time
from collections.abc import Callable

import numpy as np

from experiments.recommend import learned, networks
from experiments.recommend.fold import ONE, G, Settings
from experiments.recommend.learned import Learning
from experiments.recommend.ordinary import fit_ordinary
from experiments.recommend.ratings import Data, make_split
from experiments.recommend.tuning import mean_error

DESIGNS = ("networks", "ridge")
RIDGE = {
    "": {},
    "linear g": {"num_hidden": 0},
    "predicted center": {"predicted_center": True},
    "first ratings only": {"order": "time"},
    "no decay": {"decay": False},
}
RATES = 5e-4, 2e-3
INNER_RATES = 3e-3, 1e-2, 3e-2


def run(data: Data, settings: Settings, designs: str) -> None:
    """Prints the errors of the held-out parts, by design of the networks or of the ridge regression."""
    split = make_split(len(data.users), 0)
    grids = settings.grids._replace(gibbs_factors=settings.grids.gibbs_factors[:1])  # no other method depends on it
    ordinary = fit_ordinary(data, split, grids, 4)
    print(ordinary.choices, flush=True)
    learnings = [learned.make_learning(data, split, ordinary, k) for k in settings.first]
    for name in ordinary.part[settings.first[0]]:
        errors = [
            mean_error(ordinary.part[k][name], data.first[k].select(split.parts[0]), data.ratings)
            for k in settings.first
        ]
        print(f"part 0: {name}: " + ", ".join(f"{e:.4f}" for e in errors), flush=True)
    print("header: " + ", ".join(f"k = {k}: part 0, mean over parts ± deviation" for k in settings.first))
    show = lambda name, predict: _show(name, predict, learnings, settings.num_seeds)
    show("offsets", lambda learning, seed: learning.offset_matrix(learning.held(seed)))
    if designs == "networks":
        for kind, rate, inner_rate in itertools.product(networks.NAMES, RATES, INNER_RATES):
            if kind == networks.NAMES[0] and inner_rate != INNER_RATES[0]:
                continue  # this network takes no inner steps
            design = settings.network[kind]._replace(rate=rate, inner_rate=inner_rate)
            show(f"{kind}, rate {rate}, inner rate {inner_rate}", _network(kind, design))
    else:
        show(ONE, _ridge(settings.ridge, one=True))
        for name, changes in RIDGE.items():
            show(f"{G}, {name}", _ridge(settings.ridge._replace(**changes)))


def _network(kind: str, design: networks.Settings) -> Callable[[Learning, int], np.ndarray]:
    return lambda learning, seed: learned.train_network(learning, kind, design, seed)(learning.held(seed))


def _ridge(design, one: bool = False) -> Callable[[Learning, int], np.ndarray]:
    return lambda learning, seed: learned.train_ridge(learning, design, seed, one=one)(learning.held(seed))[1]


def _show(name: str, predict: Callable, learnings: list[Learning], num_seeds: int) -> None:
    """Prints the errors of predictions of the held-out users, one seed for each part."""
    start, cells = time.process_time(), []
    for learning in learnings:
        errors = []
        for seed in range(num_seeds):
            new = learning.data.first[learning.k].select(learning.held(seed))
            errors.append(mean_error(predict(learning, seed), new, learning.data.ratings))
        cells.append(f"{errors[0]:.4f}, {np.mean(errors):.4f} ± {np.std(errors):.4f}")
    print(f"{name}: {'; '.join(cells)}; {time.process_time() - start:.0f} s", flush=True)
