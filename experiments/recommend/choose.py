"""Compares designs on the training users of fold 0: part by part, the users of a part are new to all models."""

import time

import numpy as np

from experiments.recommend import learned, networks
from experiments.recommend.fold import ONE, Settings
from experiments.recommend.ordinary import fit_ordinary
from experiments.recommend.ratings import Data, make_split
from experiments.recommend.tuning import mean_error

RIDGE = {
    "": {},
    "linear g": {"num_hidden": 0},
    "predicted center": {"predicted_center": True},
    "first ratings only": {"order": "time"},
}
NETWORK = {"": {}, "rate 0.002": {"rate": 2e-3}}


def run(data: Data, settings: Settings) -> None:
    """Prints the errors of the held-out parts, by design."""
    split = make_split(len(data.users), 0)
    grids = settings.grids._replace(gibbs_factors=settings.grids.gibbs_factors[:1])  # no other method depends on it
    ordinary = fit_ordinary(data, split, grids, 4)
    print(ordinary.choices, flush=True)
    learnings = {k: learned.make_learning(data, split, ordinary, k) for k in settings.first}
    of_part = lambda k: data.first[k].of(split.parts[0])
    for name in ordinary.part[settings.first[0]]:
        errors = [mean_error(ordinary.part[k][name], of_part(k), data.ratings) for k in settings.first]
        print(f"part 0: {name}: " + ", ".join(f"{e:.4f}" for e in errors), flush=True)
    print("header: " + ", ".join(f"k = {k}: part 0, mean over parts" for k in settings.first))

    def show(name, train):
        start, cells = time.process_time(), []
        for learning in learnings.values():
            errors = [train(learning, seed) for seed in range(settings.num_seeds)]
            cells.append(f"{errors[0]:.4f}, {np.mean(errors):.4f} ± {np.std(errors):.4f}")
        print(f"{name}: {'; '.join(cells)}; {time.process_time() - start:.0f} s", flush=True)

    def error(learning, seed, matrix):
        new = data.first[learning.k].of(learning.held(seed))
        return mean_error(matrix, new, data.ratings)

    show("offsets", lambda learning, seed: error(learning, seed, learning.offset_matrix(learning.held(seed))))
    for kind in networks.NAMES:
        for name, changes in NETWORK.items():
            design = settings.network._replace(**changes)
            predict = lambda learning, seed, kind=kind, design=design: error(
                learning, seed, learned.train_network(learning, kind, design, seed)(learning.held(seed))
            )
            show(f"{kind}, {name}", predict)
    for name, changes in RIDGE.items():
        for one in (True, False):
            if one and name:
                continue
            design = settings.ridge._replace(**changes)
            predict = lambda learning, seed, design=design, one=one: error(
                learning,
                seed,
                learned.train_ridge(learning, design, seed, one=one)(learning.held(seed))[1],
            )
            show(f"{ONE if one else 'g'}, {name}", predict)
