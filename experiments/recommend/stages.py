"""Statistics of items, and tasks made of them.

The training users with 20 ratings or more are divided into parts. For each part there is a stage: models that are
fitted to all training users but this part. A user of a part is a new user to the models of its stage. So a training
task of this user is like the task of a test user, whose stage is the last one, fitted to all training users.
"""

from typing import NamedTuple

import jax
import numpy as np

from experiments.recommend.baselines import Offsets
from experiments.recommend.ratings import NewUsers, Ratings
from metaopt import base

NUM_SHARES = 6  # genres whose shares among the first ratings describe a user


class Tables(NamedTuple):
    """Statistics of I items in S stages. float32.

    Attributes:
      base: [S, I], mean plus item offset.
      design: [S, I, D], the columns of a user's ridge regression.
      inputs: [S, I, C], standardized columns for a network.
      popularity: [S, I], log(1 + number of training ratings).
      years: [I], (year - 2000) / 20; 0 if unknown.
    """

    base: np.ndarray
    design: np.ndarray
    inputs: np.ndarray
    popularity: np.ndarray
    years: np.ndarray


def group_sizes(ratings: Ratings, num_factors: int) -> dict[str, int]:
    """Returns the number of columns of each group of the design, in order."""
    sizes = {"offset": 1, "slope": 1, "year": 1, "factors": num_factors, "genres": ratings.genres.shape[1]}
    return {name: size for name, size in sizes.items() if size}


def rotated(factors: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Returns factors [I, F] under the rotation that brings them closest to others: an input keeps its meaning."""
    left, _, right = np.linalg.svd(factors.T @ like)
    return factors @ (left @ right)


def make_tables(ratings: Ratings, offsets: list[Offsets], factors: list[np.ndarray]) -> Tables:
    """Makes the tables from the offsets and factors of each stage."""
    years = np.where(np.isnan(ratings.year), 0, (ratings.year - 2000) / 20)
    design, inputs, popularity = [], [], []
    aligned = [rotated(factor, factors[-1]) for factor in factors]
    for offset, factor in zip(offsets, aligned, strict=True):
        count, weight = np.log1p(offset.count), offset.count / offset.count.sum()
        content = np.concatenate([years[:, None], factor, ratings.genres], axis=1)
        content = content - weight @ content  # so that the first column is the user's offset
        columns = [np.ones_like(years), offset.item, *content.T]
        design.append(np.stack(columns, axis=1))
        x = np.stack([offset.item, count, *content.T], axis=1)
        mean = weight @ x
        inputs.append((x - mean) / np.sqrt(weight @ (x - mean) ** 2 + 1e-6))
        popularity.append(count)
    arrays = [offset.base for offset in offsets], design, inputs, popularity, years
    return Tables(*(np.asarray(leaf, np.float32) for leaf in arrays))


def describe(new: NewUsers, stage: np.ndarray, tables: Tables, ratings: Ratings) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns features [U, F] of the first ratings of users, and their names. They see no later rating."""
    place = stage[:, None]
    residual = new.rating - tables.base[place, new.item]
    item_base = tables.base[place, new.item]
    half = new.item.shape[1] // 2
    gaps = np.diff(new.day, axis=1)
    columns = {
        "mean residual": residual.mean(1),
        "spread of residuals": residual.std(1),
        "absolute mean residual": np.abs(residual.mean(1)),
        "mean rating": new.rating.mean(1),
        "spread of ratings": new.rating.std(1),
        "share of the highest rating": (new.rating >= ratings.high).mean(1),
        "later half minus first half": residual[:, half:].mean(1) - residual[:, :half].mean(1),
        "mean of the items' means": item_base.mean(1),
        "spread of the items' means": item_base.std(1),
        "mean log popularity": tables.popularity[place, new.item].mean(1),
        "spread of log popularity": tables.popularity[place, new.item].std(1),
        "mean year": tables.years[new.item].mean(1),
        "spread of years": tables.years[new.item].std(1),
        "log days": np.log1p(new.day[:, -1] - new.day[:, 0]),
        "log days of the largest gap": np.log1p(gaps.max(1)),
    }
    for genre in np.argsort(-ratings.genres.sum(0), kind="stable")[:NUM_SHARES]:
        columns[f"share of {ratings.genre_names[genre]}"] = ratings.genres[new.item, genre].mean(1)
    return np.stack(list(columns.values()), axis=1), tuple(columns)


class Scaling(NamedTuple):
    """Mean and deviation [F] of features over training users."""

    mean: np.ndarray
    deviation: np.ndarray

    def scaled(self, features: np.ndarray) -> np.ndarray:
        """Returns the features with mean 0 and deviation 1, cut to ±3."""
        return np.clip((features - self.mean) / self.deviation, -3, 3).astype(np.float32)


def fit_scaling(features: np.ndarray) -> Scaling:
    return Scaling(features.mean(0), np.maximum(features.std(0), 1e-6))


def ridge_tasks(new: NewUsers, stage: np.ndarray, tables: Tables, features: np.ndarray) -> base.Task:
    """Returns one task per user, for the ridge regression of `per_user`; leaves have a leading axis of users."""
    place = stage[:, None]
    train = {
        "design": tables.design[place, new.item],
        "residual": (new.rating - tables.base[place, new.item]).astype(np.float32),
        "age": np.log1p(new.day[:, -1:] - new.day).astype(np.float32),
    }
    valid = {
        "design": tables.design[place, new.later_item],
        "base": tables.base[place, new.later_item],
        "rating": new.later_rating.astype(np.float32),
        "mask": new.mask.astype(np.float32),
    }
    return base.Task(train, valid, features)


def network_tasks(
    new: NewUsers, stage: np.ndarray, tables: Tables, features: np.ndarray, offset: np.ndarray
) -> base.Task:
    """Returns one task per user, for the networks: they correct base plus the user's `offset` [U].

    An input has the item's columns and the user's features.
    """
    place = stage[:, None]

    def side(items, ratings, mask):
        user = np.broadcast_to(features[:, None], (*items.shape, features.shape[1]))
        x = np.concatenate([tables.inputs[place, items], user], axis=-1)
        y = ratings - tables.base[place, items] - offset[:, None]
        return {"x": x, "y": y.astype(np.float32)[..., None], "mask": mask.astype(np.float32)}

    first = side(new.item, new.rating, np.ones_like(new.rating))
    return base.Task(first, side(new.later_item, new.later_rating, new.mask))


def rng_of(key: jax.Array) -> np.random.Generator:
    """Returns NumPy's generator for a key of JAX."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32).tolist())
