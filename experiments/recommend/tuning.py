"""Choice of the baselines' hyperparameters, on training users that are held out as new users."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.recommend import baselines
from experiments.recommend.baselines import Offsets
from experiments.recommend.ratings import NewUsers, Ratings
from experiments.recommend.scores import user_rmse

MULTIPLES = (1.0, 1.5, 2.0)  # in the factorization, a new user's offset has its tuned ridge times one of these

TUNING_SWEEPS = 6  # of alternating least squares


class Grids(NamedTuple):
    """The values of each hyperparameter to choose from."""

    item_ridges: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    sweeps: tuple[int, ...] = (3, 8, 20)
    offset_ridges: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
    centers: tuple[float, ...] = (-1.0, -0.8, -0.6, -0.4, -0.2, 0.0)
    shrinks: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    neighbour_ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    num_factors: tuple[int, ...] = (4, 8, 16)
    ridges: tuple[float, ...] = (10.0, 20.0, 40.0, 80.0, 160.0)
    factor_ridges: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    gibbs_factors: tuple[int, ...] = (2, 4, 8, 16)


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


def profiles(names: Iterable[str], options: list[tuple], errors: np.ndarray) -> dict[str, dict[float, float]]:
    """Returns hyperparameter -> value -> the least error of the options with this value, minus the least of all."""
    return {
        name: {
            value: float(
                min(e for option, e in zip(options, errors, strict=True) if option[place] == value) - min(errors)
            )
            for value in sorted({option[place] for option in options})
        }
        for place, name in enumerate(names)
    }


def choose_neighbours(parts: list[Part], offsets: list[Offsets], user: dict, grids: Grids) -> tuple[dict, dict]:
    """Chooses for each k the shrinkage of similarities and the ridge of the mean; `offsets` are those of each part.

    Returns:
      k -> (shrinkage, ridge), and the profiles of the error.
    """
    options = list(itertools.product(grids.shrinks, grids.neighbour_ridges))
    total = {k: np.zeros(len(options)) for k in parts[0].new}
    for part, own in zip(parts, offsets, strict=True):
        neighbours = baselines.fit_neighbours(baselines.residual_matrix(part.train, own))
        for k, new in part.new.items():
            similar = baselines.similar_items(neighbours, new).to_items(new.later_item)
            predict = functools.partial(neighbour_predictions, similar, own.base[new.later_item], own, new, user[k])
            total[k] += [entry_error(predict(option), new, part.train) for option in options]
    shown = {}
    for k, errors in total.items():
        names = f"kNN, k = {k}: shrinkage", f"kNN, k = {k}: ridge"
        shown |= profiles(names, options, errors / len(parts))
    return {k: options[int(np.argmin(errors))] for k, errors in total.items()}, shown


class FactorChoice(NamedTuple):
    """Hyperparameters of the factorization; for each k a new user's ridges of offset and factors, and the center."""

    num_factors: int
    ridge: float
    user: dict[int, tuple[float, float, float]]


def choose_factors(parts: list[Part], offsets: list[Offsets], user: dict, grids: Grids) -> tuple[FactorChoice, dict]:
    """Chooses number of factors and ridge by the mean over k, and for each k the ridges of the fold-in.

    Returns:
      The choice, and the profiles of the error.
    """
    residuals = [baselines.residual_matrix(part.train, own) for part, own in zip(parts, offsets, strict=True)]
    grid = list(itertools.product(MULTIPLES, grids.factor_ridges))
    options = {
        k: [(multiple * ridge, factor_ridge, center) for multiple, factor_ridge in grid]
        for k, (ridge, center) in user.items()
    }
    pairs, totals = list(itertools.product(grids.num_factors, grids.ridges)), []
    for num_factors, ridge in pairs:
        total = {k: np.zeros(len(own)) for k, own in options.items()}
        for part, own, residual in zip(parts, offsets, residuals, strict=True):
            factors = baselines.factorize(residual, num_factors, ridge, sweeps=TUNING_SWEEPS)
            for k, new in part.new.items():
                scores = (baselines.factor_scores(own, factors, new, *option) for option in options[k])
                total[k] += [entry_error(linear.of_items(new.later_item), new, part.train) for linear in scores]
        totals.append({k: errors / len(parts) for k, errors in total.items()})
    errors = np.array([np.mean([own.min() for own in total.values()]) for total in totals])
    least = int(np.argmin(errors))
    shown = profiles(("factorization: factors", "factorization: ridge"), pairs, errors)
    for k, own in totals[least].items():
        names = "multiple of the offset's ridge", "ridge of a new user's factors"
        shown |= profiles((f"factorization, k = {k}: {name}" for name in names), grid, own)
    chosen = {k: options[k][int(np.argmin(own))] for k, own in totals[least].items()}
    return FactorChoice(*pairs[least], chosen), shown


def choose_gibbs(parts: list[Part], offsets: list[Offsets], grids: Grids, sweeps: int) -> tuple[dict, dict]:
    """Chooses the number of factors for each k.

    Returns:
      k -> number, and the profiles of the error.
    """
    total = {k: np.zeros(len(grids.gibbs_factors)) for k in parts[0].new}
    for part, own in zip(parts, offsets, strict=True):
        for place, num_factors in enumerate(grids.gibbs_factors):
            samples = baselines.gibbs_samples(part.train, own, num_factors, sweeps)
            for k, new in part.new.items():
                total[k][place] += mean_error(baselines.gibbs_scores(samples, own.base, new).matrix(), new, part.train)
    options, shown = [(num_factors,) for num_factors in grids.gibbs_factors], {}
    for k, errors in total.items():
        shown |= profiles((f"Gibbs, k = {k}: factors",), options, errors / len(parts))
    return {k: grids.gibbs_factors[int(np.argmin(errors))] for k, errors in total.items()}, shown
