"""The ordinary recommenders of one stage, as predictions [U, I] by name."""

from typing import Any, NamedTuple

import numpy as np

from experiments.recommend import baselines, tuning
from experiments.recommend.baselines import Offsets
from experiments.recommend.ratings import Data, NewUsers, Ratings, Split
from experiments.recommend.tuning import FactorChoice, OffsetChoice

FIXED_RIDGES = 3.0, 5.0  # of new users and of items, for the figures that come with the data
ITEM_MEANS = "item means, ridge 1"
PLAIN = "offsets, ridges 3 and 5"
TUNED = "offsets, tuned"
CONTENT = "offsets with year, genres and popularity, tuned"
NEIGHBOURS = "item kNN on residuals, tuned"
FACTORS = "matrix factorization, tuned"
BAYESIAN = "Bayesian factorization"
TUNED_NAMES = (TUNED, CONTENT, NEIGHBOURS, FACTORS, BAYESIAN)


def simple_matrices(train: Ratings, new: NewUsers) -> dict[str, np.ndarray]:
    """Returns the untuned baselines, which reproduce the figures that come with the data."""
    user_ridge, item_ridge = FIXED_RIDGES
    mean, count = train.rating.mean(), np.bincount(train.item, minlength=train.num_items)
    constant = Offsets(mean, np.zeros(train.num_items), np.zeros(train.num_users), count)
    means = baselines.fit_offsets(train, item_ridge=1.0).base
    offsets = baselines.fit_offsets(train, item_ridge=item_ridge, user_ridge=user_ridge, sweeps=1)
    num_users = len(new.item)
    whole = lambda row: np.broadcast_to(row[None], (num_users, train.num_items))
    return {
        "global mean": whole(constant.base),
        ITEM_MEANS: whole(means),
        "user offset, ridge 3": whole(constant.base) + baselines.user_offsets(constant, new, user_ridge, 0.0)[:, None],
        PLAIN: whole(offsets.base) + baselines.user_offsets(offsets, new, user_ridge, 0.0)[:, None],
    }


def offset_matrix(offsets: Offsets, new: NewUsers, user: tuple[float, float]) -> np.ndarray:
    return offsets.base[None] + baselines.user_offsets(offsets, new, *user)[:, None]


class Stage:
    """Models that are fitted to the ratings of some training users, with chosen hyperparameters."""

    def __init__(self, train: Ratings, choices: dict[str, OffsetChoice], factor_choice: FactorChoice, base: str):
        self.train, self.base = train, base
        self.offsets = {name: baselines.fit_offsets(train, **choice.item) for name, choice in choices.items()}
        self._users = {name: choice.user for name, choice in choices.items()}
        self._factor_choice = factor_choice
        residuals = baselines.residual_matrix(train, self.offsets[base])
        self.factors = baselines.factorize(residuals, factor_choice.num_factors, factor_choice.ridge)

    def matrices(self, k: int, new: NewUsers) -> dict[str, np.ndarray]:
        """Returns the predictions of offsets and of the factorization."""
        by_name = {name: offset_matrix(o, new, self._users[name][k]) for name, o in self.offsets.items()}
        linear = baselines.factor_scores(self.offsets[self.base], self.factors, new, *self._factor_choice.user[k])
        return {**by_name, FACTORS: linear.matrix()}

    def neighbour_matrices(self, new_users: dict[int, NewUsers], choice: dict) -> dict[int, np.ndarray]:
        """Returns the predictions of item kNN for each k."""
        offsets = self.offsets[self.base]
        neighbours = baselines.fit_neighbours(baselines.residual_matrix(self.train, offsets))
        return {
            k: tuning.neighbour_predictions(
                baselines.similar_items(neighbours, new),
                offsets.base[None],
                offsets,
                new,
                self._users[self.base][k],
                choice[k],
            )
            for k, new in new_users.items()
        }

    def gibbs_matrices(self, new_users: dict[int, NewUsers], choice: dict[int, int], sweeps: int) -> dict:
        """Returns the predictions of Bayesian factorization for each k."""
        offsets = self.offsets[self.base]
        samples = {
            num: baselines.gibbs_samples(self.train, offsets, num, sweeps) for num in sorted(set(choice.values()))
        }
        return {
            k: baselines.gibbs_scores(samples[choice[k]], offsets.base, new).matrix() for k, new in new_users.items()
        }

    def user_offset(self, k: int, new: NewUsers) -> np.ndarray:
        """Returns [U], the new users' tuned offsets that belong to `base`."""
        return baselines.user_offsets(self.offsets[self.base], new, *self._users[self.base][k])


class Ordinary(NamedTuple):
    """The baselines of a fold: stages, the better of the two offsets, and predictions by k and name.

    Attributes:
      stages: of the parts, and the last one of all training users.
      base: the name of the offsets on which the other methods build.
      test: k -> name -> [U, I], of the test users.
      part: the same for the users of part 0, by its stage.
      choices: all chosen hyperparameters, for the report.
    """

    stages: list[Stage]
    base: str
    test: dict[int, dict[str, np.ndarray]]
    part: dict[int, dict[str, np.ndarray]]
    choices: dict[str, Any]


def _narrow(matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Halves the memory."""
    return {name: matrix.astype(np.float32) for name, matrix in matrices.items()}


def fit_ordinary(data: Data, split: Split, grids: tuning.Grids, gibbs_sweeps: int) -> Ordinary:
    """Tunes and fits the baselines."""
    ratings, users = data.ratings, data.users
    new_of = lambda positions: {k: new.select(positions) for k, new in data.first.items()}
    whole = ratings.without(users[split.test])
    parts = [tuning.Part(whole.without(users[part]), new_of(part)) for part in split.parts]
    choices = {name: tuning.choose_offsets(parts, grids, name == CONTENT) for name in (TUNED, CONTENT)}
    base = min(choices, key=lambda name: choices[name].error)
    offsets = [baselines.fit_offsets(part.train, **choices[base].item) for part in parts]
    factor_choice, of_factors = tuning.choose_factors(parts, offsets, choices[base].user, grids)
    neighbour_choice, of_neighbours = tuning.choose_neighbours(parts, offsets, choices[base].user, grids)
    gibbs_choice, of_gibbs = tuning.choose_gibbs(parts, offsets, grids, gibbs_sweeps // 3)
    fitted = [Stage(train, choices, factor_choice, base) for train in [*(part.train for part in parts), whole]]
    test = new_of(split.test)

    def by_k(stage, new):
        near = stage.neighbour_matrices(new, neighbour_choice)
        gibbs = stage.gibbs_matrices(new, gibbs_choice, gibbs_sweeps)
        return {
            k: {
                **_narrow(simple_matrices(stage.train, new[k])),
                **_narrow(stage.matrices(k, new[k])),
                **_narrow({NEIGHBOURS: near[k], BAYESIAN: gibbs[k]}),
            }
            for k in new
        }

    chosen = {name: {**choice.item, "new users": choice.user} for name, choice in choices.items()}
    chosen |= {"base": base, "factorization": factor_choice._asdict(), "kNN": neighbour_choice, "Gibbs": gibbs_choice}
    chosen["profiles"] = of_factors | of_neighbours | of_gibbs
    return Ordinary(fitted, base, by_k(fitted[-1], test), by_k(fitted[0], parts[0].new), chosen)
