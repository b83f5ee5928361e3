"""Training of the learned methods of one fold, and their predictions."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recommend import networks, per_user, stages
from experiments.recommend.ordinary import Ordinary, Stage
from experiments.recommend.ratings import NUM_PARTS, Data, NewUsers, Split

HELD_ROWS = 128  # later ratings of a held-out user, for the choice of the best step


class Learning(NamedTuple):
    """Data, tables and features for the learned methods of one fold and one k."""

    data: Data
    split: Split
    k: int
    tables: stages.Tables
    fitted: list[Stage]
    scaling: stages.Scaling
    names: tuple[str, ...]  # of features

    def features(self, new: NewUsers, stage: np.ndarray) -> np.ndarray:
        return self.scaling.scaled(stages.describe(new, stage, self.tables, self.data.ratings)[0])

    def first(self, positions: np.ndarray) -> tuple[NewUsers, np.ndarray, np.ndarray]:
        """Returns users with all later ratings, their stages and features."""
        new, stage = self.data.first[self.k].select(positions), self.split.stage[positions]
        return new, stage, self.features(new, stage)

    def offset(self, new: NewUsers, stage: np.ndarray) -> np.ndarray:
        """Returns [U], the users' tuned offsets from their k ratings, by their stages."""
        values = np.empty(len(stage), np.float32)
        for number in np.unique(stage):
            values[stage == number] = self.fitted[number].user_offset(self.k, new.select(stage == number))
        return values

    def first_errors(self, positions: np.ndarray) -> np.ndarray:
        """Returns [U, k], residuals of the first ratings from the tuned offsets."""
        new, stage = self.data.first[self.k].select(positions), self.split.stage[positions]
        return new.rating - self.tables.base[stage[:, None], new.item] - self.offset(new, stage)[:, None]

    def offset_errors(self, positions: np.ndarray) -> np.ndarray:
        """Returns [U, Q], residuals of the later ratings from the tuned offsets."""
        new, stage, ratings = self.data.first[self.k].select(positions), self.split.stage[positions], self.data.ratings
        prediction = self.tables.base[stage[:, None], new.later_item] + self.offset(new, stage)[:, None]
        return new.later_rating - np.clip(prediction, ratings.low, ratings.high)

    def offset_matrix(self, positions: np.ndarray) -> np.ndarray:
        """Returns [U, I], predictions of the tuned offsets."""
        new, stage = self.data.first[self.k].select(positions), self.split.stage[positions]
        return self.tables.base[stage] + self.offset(new, stage)[:, None]

    def held(self, seed: int) -> np.ndarray:
        """Returns the positions of the training users that a seed holds out."""
        return self.split.parts[seed % NUM_PARTS]

    def draw(self, key: jax.Array, seed: int, order: str, num_users: int, num_later: int):
        """Returns training users that are not held out, with some of their later ratings, and their stages."""
        rng = stages.rng_of(key)
        pool = np.delete(self.split.parts, seed % NUM_PARTS, axis=0).ravel()
        chosen = rng.choice(pool, min(num_users, len(pool)), replace=False)
        drawn = self.data.window[self.k](key, chosen) if order == "window" else self.data.first[self.k].select(chosen)
        return drawn.later_rows(rng, num_later), self.split.stage[chosen]


def make_learning(data: Data, split: Split, ordinary: Ordinary, k: int) -> Learning:
    fitted, first = ordinary.stages, data.first[k]
    tables = stages.make_tables(data.ratings, [s.offsets[ordinary.base] for s in fitted], [s.factors for s in fitted])
    trained = split.parts.ravel()
    features, names = stages.describe(first.select(trained), split.stage[trained], tables, data.ratings)
    return Learning(data, split, k, tables, fitted, stages.fit_scaling(features), names)


@functools.cache
def ridge_method(settings: per_user.Settings, sizes: tuple, num_features: int, low: float, high: float):
    return per_user.make_method(settings, dict(sizes), num_features, low, high)


network_method = functools.cache(networks.make_method)


def train_ridge(learning: Learning, settings: per_user.Settings, seed: int, *, one: bool = False):
    """Returns a function: positions of users -> (λ, predictions [U, I]). With `one`, λ is one for all users."""
    ratings, tables = learning.data.ratings, learning.tables
    num_factors = tables.design.shape[-1] - 3 - ratings.genres.shape[1]
    sizes = stages.group_sizes(ratings, num_factors)
    num_features = 0 if one else len(learning.names)
    method = ridge_method(settings, tuple(sizes.items()), num_features, ratings.low, ratings.high)

    def draw(key):
        new, stage = learning.draw(key, seed, settings.order, settings.num_users, settings.num_later)
        return stages.ridge_tasks(new, stage, tables, learning.features(new, stage))

    new, stage, features = learning.first(learning.held(seed))
    held = stages.ridge_tasks(new.later_rows(np.random.default_rng(0), HELD_ROWS), stage, tables, features)
    weights = per_user.train(method, settings, draw, held, seed, num_features)

    def predict(positions):
        new, stage, features = learning.first(positions)
        task = stages.ridge_tasks(new, stage, tables, features)._replace(valid=None)
        hyperparams, w = jax.tree.map(np.asarray, method.predict(weights, task))
        (number,) = np.unique(stage)  # all users of one part, or of the test
        return hyperparams, tables.base[number][None] + w @ tables.design[number].T

    return predict


def train_network(learning: Learning, name: str, settings: networks.Settings, seed: int):
    """Returns a function: positions of users -> predictions [U, I]."""
    tables, method = learning.tables, network_method(name, settings)

    def task(new, stage):
        features = learning.features(new, stage)
        return stages.network_tasks(new, stage, tables, features, learning.offset(new, stage))

    def draw(key):
        return task(*learning.draw(key, seed, settings.order, settings.num_users, settings.num_later))

    new, stage, _ = learning.first(learning.held(seed))
    held = task(new.later_rows(np.random.default_rng(0), HELD_ROWS), stage)
    hyperparams = networks.train(method, settings, draw, held, seed)

    def predict(positions):
        new, stage, features = learning.first(positions)
        first = task(new.later_rows(np.random.default_rng(0), 1), stage).train
        inputs = jnp.asarray(tables.inputs)
        correction = np.asarray(method.predict(hyperparams, first, inputs, jnp.asarray(stage), features))
        return learning.offset_matrix(positions) + correction

    return predict


def raw_features(learning: Learning, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the features of the first ratings by name, not scaled."""
    new, stage, _ = learning.first(positions)
    return dict(
        zip(learning.names, stages.describe(new, stage, learning.tables, learning.data.ratings)[0].T, strict=True)
    )
