"""Choice of the baselines' hyperparameters, on training users that are held out as new users."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.recommend import baselines
from experiments.recommend.baselines import Offsets
from experiments.recommend.ratings import NewUsers, Ratings
from experiments.recommend.scores import user_rmse


class Grids(NamedTuple):
    """The values that the choice is made of."""

    item_ridges: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    sweeps: tuple[int, ...] = (1, 3, 8)
    offset_ridges: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
    centers: tuple[float, ...] = (-1.0, -0.8, -0.6, -0.4, -0.2, 0.0)
    shrinks: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    neighbour_ridges: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    num_factors: tuple[int, ...] = (2, 4, 8)
    ridges: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0)
    factor_ridges: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)
    gibbs_factors: tuple[int, ...] = (4, 8, 12)


SMALL = Grids(
    item_ridges=(5.0,),
    sweeps=(0, 1),
    offset_ridges=(1.0, 3.0),
    centers=(0.0,),
    shrinks=(3.0,),
    neighbour_ridges=(1.0,),
    num_factors=(2,),
    ridges=(4.0,),
    factor_ridges=(3.0, 10.0),
    gibbs_factors=(2,),
)


class Part(NamedTuple):
    """A part of the training users: the ratings of all other training users, and this part as new users for each k."""

    train: Ratings
    new: dict[int, NewUsers]


class OffsetChoice(NamedTuple):
    """Hyperparameters of the offsets: `item` for `fit_offsets`; for each k a new user's ridge and center; the error."""

    item: dict[str, Any]
    user: dict[int, tuple[float, float]]
    error: float


def best(options: Iterable, error: Callable[[Any], float]) -> Any:
    """Returns the option of the smallest error, the first of ties."""
    options = list(options)
    return options[int(np.argmin([error(option) for option in options]))]


def entry_error(prediction: np.ndarray, new: NewUsers, ratings: Ratings) -> float:
    """Returns the mean over users of the root mean squared error, from predictions of the later ratings [U, Q]."""
    return float(user_rmse(new.later_rating - np.clip(prediction, ratings.low, ratings.high), new.mask).mean())


def mean_error(matrix: np.ndarray, new: NewUsers, ratings: Ratings) -> float:
    """Returns `entry_error` of predictions of all items [U, I]."""
    return entry_error(np.take_along_axis(matrix, new.later_item, axis=1), new, ratings)


def offset_error(offsets: Offsets, new: NewUsers, ridge: float, center: float, ratings: Ratings) -> float:
    """Returns `mean_error` of the offsets, without predictions of other items."""
    user = baselines.user_offsets(offsets, new, ridge, center)
    return entry_error(offsets.base[new.later_item] + user[:, None], new, ratings)


def choose_offsets(parts: list[Part], grids: Grids, content: bool) -> OffsetChoice:
    """Chooses the items' ridge and sweeps by the mean over k, and for each k a new user's ridge and center."""
    user_options = list(itertools.product(grids.offset_ridges, grids.centers))
    choices = []
    for item_ridge, sweeps in itertools.product(grids.item_ridges, grids.sweeps):
        item = {"item_ridge": item_ridge, "sweeps": sweeps, "content": content}
        fitted = [baselines.fit_offsets(part.train, **item) for part in parts]
        user, total = {}, 0.0
        for k in parts[0].new:
            errors = [
                np.mean([offset_error(o, p.new[k], *option, p.train) for o, p in zip(fitted, parts, strict=True)])
                for option in user_options
            ]
            user[k], total = user_options[int(np.argmin(errors))], total + min(errors)
        choices.append(OffsetChoice(item, user, total))
    return min(choices, key=lambda choice: choice.error)


def neighbour_predictions(
    similar: baselines.Similar,
    base: np.ndarray,
    offsets: Offsets,
    new: NewUsers,
    user: tuple[float, float],
    option: tuple[float, float],
) -> np.ndarray:
    """Returns [U, J], predictions of item kNN on residuals, for the J items of `similar` and `base` [U or 1, J]."""
    offset = baselines.user_offsets(offsets, new, *user)
    residual = new.rating - offsets.base[new.item] - offset[:, None]
    return base + offset[:, None] + baselines.neighbour_correction(similar, residual, *option)


def choose_neighbours(part: Part, offsets: Offsets, user: dict, grids: Grids) -> dict[int, tuple[float, float]]:
    """Chooses for each k the shrinkage of similarities and the ridge of the mean."""
    neighbours = baselines.fit_neighbours(baselines.residual_matrix(part.train, offsets))
    choice = {}
    for k, new in part.new.items():
        similar = baselines.similar_items(neighbours, new).to_items(new.later_item)

        def error(option, k=k, new=new, similar=similar):
            base = offsets.base[new.later_item]
            prediction = neighbour_predictions(similar, base, offsets, new, user[k], option)
            return entry_error(prediction, new, part.train)

        choice[k] = best(itertools.product(grids.shrinks, grids.neighbour_ridges), error)
    return choice


class FactorChoice(NamedTuple):
    """Hyperparameters of the factorization; for each k a new user's ridges of offset and factors, and the center."""

    num_factors: int
    ridge: float
    user: dict[int, tuple[float, float, float]]


def choose_factors(part: Part, offsets: Offsets, user: dict, grids: Grids) -> FactorChoice:
    """Chooses number of factors and ridge by the mean over k, and for each k the ridges of the fold-in."""
    residuals = baselines.residual_matrix(part.train, offsets)
    choices = []
    for num_factors, ridge in itertools.product(grids.num_factors, grids.ridges):
        factors = baselines.factorize(residuals, num_factors, ridge)
        chosen, total = {}, 0.0
        for k, new in part.new.items():
            offset_ridge, center = user[k]
            options = itertools.product((offset_ridge, 1.5 * offset_ridge), grids.factor_ridges, (center,))
            error = lambda o, factors=factors, new=new: mean_error(
                baselines.factor_scores(offsets, factors, new, *o).matrix(), new, part.train
            )
            chosen[k] = best(options, error)
            total += error(chosen[k])
        choices.append((total, FactorChoice(num_factors, ridge, chosen)))
    return min(choices, key=lambda choice: choice[0])[1]


def choose_gibbs(part: Part, grids: Grids, sweeps: int) -> tuple[dict[int, int], dict[int, np.ndarray]]:
    """Chooses the number of factors for each k. Also returns the predictions [U, I] of the part with these numbers."""
    choice, matrices, least = {}, {}, {}
    for num_factors in grids.gibbs_factors:
        samples = list(baselines.gibbs(part.train, num_factors, sweeps=sweeps, burn_in=sweeps // 2))
        for k, new in part.new.items():
            matrix = baselines.gibbs_scores(samples, part.train.rating.mean(), new).matrix()
            error = mean_error(matrix, new, part.train)
            if error < least.get(k, np.inf):
                least[k], choice[k], matrices[k] = error, num_factors, matrix
    return choice, matrices
