"""One fold: tunes all methods on the training users, and scores them on the test users."""

import json
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.recommend import learned, networks, per_user, tuning
from experiments.recommend.learned import Learning
from experiments.recommend.ordinary import Ordinary, fit_ordinary
from experiments.recommend.ratings import NUM_PARTS, Data, NewUsers, Split, make_split
from experiments.recommend.scores import (
    conformal_quantile,
    intervals,
    later_errors,
    ndcg,
    recent_popularity,
    user_rmse,
    user_scale,
)

G = "ridge, λ of each user by g"
ONE = "ridge, one λ for all"
POPULAR = "most rated in the last 30 days"
POPULARITY_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PRIOR_WEIGHTS = (1e6, 20.0, 10.0, 5.0, 2.0)
COVERAGE = 0.9


class Settings(NamedTuple):
    """Sizes of the experiment."""

    first: tuple[int, ...] = (5, 10)  # k
    num_seeds: int = 2
    gibbs_sweeps: int = 60
    grids: tuning.Grids = tuning.Grids()
    ridge: per_user.Settings = per_user.Settings()
    network: Mapping[str, networks.Settings] = networks.DESIGNS


SMOKE = Settings(
    first=(5,),
    num_seeds=1,
    gibbs_sweeps=6,
    grids=tuning.SMALL,
    ridge=per_user.Settings(num_hidden=2, num_steps=20, num_users=8, num_later=8),
    network=dict.fromkeys(
        networks.NAMES, networks.Settings(width=4, num_inner=2, num_steps=4, num_users=4, num_later=8)
    ),
)


# ---- Scores ----------------------------------------------------------------------------------------------------------


def popularity_weight(matrix: np.ndarray, popularity: np.ndarray, new: NewUsers) -> float:
    """Returns the weight w of prediction + w log(1 + popularity) with the largest NDCG."""
    score = lambda weight: -ndcg(matrix + weight * np.log1p(popularity), new).mean()
    return tuning.best(POPULARITY_WEIGHTS, score)


def ranking(data: Data, split: Split, ordinary: Ordinary, k: int, learned: dict) -> dict[str, np.ndarray]:
    """Returns NDCG of the test users [U] by name; `learned` has pairs of predictions, for the test and for part 0.

    The weight of popularity is chosen on part 0, a part of the training users.
    """
    whole, part = ordinary.stages[-1].train, ordinary.stages[0].train
    test, held = (data.first[k].select(positions) for positions in (split.test, split.parts[0]))
    popular, popular_part = recent_popularity(whole, test), recent_popularity(part, held)
    pairs = {name: (matrix, ordinary.part[k][name]) for name, matrix in ordinary.test[k].items()} | learned
    values = {f"{k}|ndcg|{POPULAR}": ndcg(popular.astype(float), test)}
    for name, (matrix, matrix_part) in pairs.items():
        weight = popularity_weight(matrix_part, popular_part, held)
        values[f"{k}|ndcg|{name}"] = ndcg(matrix + weight * np.log1p(popular), test)
        values[f"{k}|ndcg by rating|{name}"] = ndcg(matrix, test)
        values[f"{k}|popularity weight|{name}"] = np.array(weight)
    return values


def scale_weight(learning: Learning, seed: int) -> float:
    """Returns the weight of the prior scale for which the intervals of the offsets are the narrowest.

    It is chosen on two parts of the training users, neither of which the seed holds out.
    """
    one, other = (learning.split.parts[(seed + step) % NUM_PARTS] for step in (1, 2))
    errors, mask = np.abs(learning.offset_errors(one)), learning.data.first[learning.k].mask[one]
    first = [learning.first_errors(positions) for positions in (one, other)]

    def width(weight):
        scales = [user_scale(e, float(user_rmse(errors, mask).mean()), weight) for e in first]
        return conformal_quantile(errors / scales[0][:, None], mask, COVERAGE) * scales[1].mean()

    return tuning.best(PRIOR_WEIGHTS, width)


def interval_scores(learning: Learning, matrices: dict, seed: int) -> dict[str, np.ndarray]:
    """Returns coverage and width [U] by name; `matrices` has predictions of the held-out part and of the test.

    The interval is prediction ± q s. The scale s of a user follows from the residuals of the first ratings. The factor
    q is the conformal quantile of the training users that the seed holds out.
    """
    ratings, k = learning.data.ratings, learning.k
    groups = learning.held(seed), learning.split.test
    held, test = (learning.data.first[k].select(positions) for positions in groups)
    first = [learning.first_errors(positions) for positions in groups]
    prior = float(user_rmse(learning.offset_errors(groups[0]), held.mask).mean())
    values = {}
    for label, weight in (("one width", PRIOR_WEIGHTS[0]), ("a width for each user", scale_weight(learning, seed))):
        scales = [user_scale(e, prior, weight) for e in first]
        for name, (held_matrix, test_matrix) in matrices.items():
            errors = np.abs(later_errors(held_matrix, held, ratings.low, ratings.high))
            factor = conformal_quantile(errors / scales[0][:, None], held.mask, COVERAGE)
            prediction = np.take_along_axis(test_matrix, test.later_item, axis=1)
            prediction = np.clip(prediction, ratings.low, ratings.high)
            result = intervals(prediction, factor * scales[1], test, ratings.low, ratings.high)
            values[f"{k}|coverage|{name}, {label}"] = result.coverage
            values[f"{k}|width|{name}, {label}"] = result.width
    return values


# ---- The fold --------------------------------------------------------------------------------------------------------


def run_learned(learning: Learning, ordinary: Ordinary, settings: Settings) -> dict[str, np.ndarray]:
    """Trains the learned methods for one k with all seeds, and returns the scores of all methods."""
    data, split, k = learning.data, learning.split, learning.k
    test, ratings = data.first[k].select(split.test), data.ratings
    error = lambda matrix: user_rmse(later_errors(matrix, test, ratings.low, ratings.high), test.mask)
    rmse: dict[str, list] = {name: [error(matrix)] for name, matrix in ordinary.test[k].items()}
    values: dict[str, list] = {}
    pairs = {}  # predictions of the first seed, which holds out part 0
    for seed in range(settings.num_seeds):
        groups = split.test, learning.held(seed)
        ridge = {name: learned.train_ridge(learning, settings.ridge, seed, one=name == ONE) for name in (G, ONE)}
        by_name = {name: [predict(users)[1] for users in groups] for name, predict in ridge.items()}
        for name in networks.NAMES:
            predict = learned.train_network(learning, name, settings.network[name], seed)
            by_name[name] = [predict(users) for users in (groups if seed == 0 else groups[:1])]
        for name, matrices in by_name.items():
            rmse.setdefault(name, []).append(error(matrices[0]))
        if seed == 0:
            pairs = by_name
            hyperparams = ridge[G](split.test)[0]
            values |= {f"{k}|λ|{name}": [leaf] for name, leaf in hyperparams.items()}
        offsets = [learning.offset_matrix(users) for users in reversed(groups)]
        scored = interval_scores(learning, {"offsets": offsets, G: by_name[G][::-1]}, seed)
        for name, value in scored.items():
            values.setdefault(name, []).append(value)
        print(f"k = {k}, seed {seed}: " + ", ".join(f"{n} {rmse[n][-1].mean():.4f}" for n in by_name), flush=True)
    raw = learned.raw_features(learning, split.test)
    scores = {f"{k}|rmse|{name}": np.array(value) for name, value in rmse.items()}
    scores |= {name: np.array(value) for name, value in values.items()}
    return scores | {f"{k}|feature|{n}": x for n, x in raw.items()} | ranking(data, split, ordinary, k, pairs)


def run_fold(data: Data, fold: int, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the scores of all methods on the test users of a fold, by "k|score|method".

    Further entries are the positions of the users, the seconds, and the chosen hyperparameters.
    """
    start = time.process_time()
    split = make_split(len(data.users), fold)
    ordinary = fit_ordinary(data, split, settings.grids, settings.gibbs_sweeps)
    print(f"fold {fold}: baselines, {time.process_time() - start:.0f} s: {ordinary.choices}", flush=True)
    scores = {}
    for k in settings.first:
        scores |= run_learned(learned.make_learning(data, split, ordinary, k), ordinary, settings)
    seconds = np.array(time.process_time() - start)
    return {**scores, "users": split.test, "seconds": seconds, "choices": np.array(json.dumps(ordinary.choices))}
