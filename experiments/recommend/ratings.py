"""Ratings of items by users: MovieTweetings, a copy of MovieLens, or synthetic ones. And the first ratings of users."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import tasks

MIN_RATINGS = 20  # users with fewer ratings are not tested
NUM_FOLDS = 5
NUM_PARTS = 4  # the training users are divided into so many parts


class Ratings(NamedTuple):
    """N ratings of I items, in order of time.

    Attributes:
      user: [N] int.
      item: [N] int in 0..I-1.
      rating: [N] float64.
      day: [N] float64, days since the first rating.
      year: [I] float64, of the item; NaN if it is not known.
      genres: [I, G] float64, 0 or 1.
      genre_names: G names.
      low: the lowest possible rating.
      high: the highest possible rating.
      name: of the data.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    day: np.ndarray
    year: np.ndarray
    genres: np.ndarray
    genre_names: tuple[str, ...]
    low: float
    high: float
    name: str

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.year)

    @property
    def num_users(self) -> int:
        """The largest user plus one."""
        return int(self.user.max()) + 1

    def without(self, users: np.ndarray) -> "Ratings":
        """Returns the ratings by all other users."""
        rows = ~np.isin(self.user, users)
        return self._replace(user=self.user[rows], item=self.item[rows], rating=self.rating[rows], day=self.day[rows])


def _ratings(user, item, rating, seconds, year, genres, genre_names, low, high, name) -> Ratings:
    """Returns the ratings in order of time; equal times keep the order of the file."""
    order = np.argsort(seconds, kind="stable")
    day = (np.asarray(seconds, np.float64)[order] - np.min(seconds)) / 86_400
    year = np.asarray(year, np.float64)
    return Ratings(
        np.unique(user, return_inverse=True)[1][order],
        np.asarray(item, int)[order],
        np.asarray(rating, np.float64)[order],
        day,
        np.where(year > 1800, year, np.nan),
        np.asarray(genres, np.float64),
        tuple(map(str, genre_names)),
        low,
        high,
        name,
    )


def from_movietweetings(path: Path) -> Ratings:
    """Reads `movietweetings_100k.npz`: 100,000 ratings from 0 to 10 of 10,506 films, Dooms et al., CrowdRec 2013."""
    with np.load(path, allow_pickle=False) as data:
        columns = (data[name] for name in ("user", "item", "rating", "time", "year", "genres", "genre_names"))
        return _ratings(*columns, 0.0, 10.0, "MovieTweetings")


def from_movielens(path: Path) -> Ratings:
    """Reads a file of ratings of MovieLens, and the file of films next to it. Or their folder.

    The releases have `ratings.csv` and `movies.csv` (20M and later), `ratings.dat` and `movies.dat` (1M, 10M), or
    `u.data` and `u.item` (100K). Without the file of films, years and genres are not known.

    Raises:
      FileNotFoundError: if the file of ratings does not exist.
    """
    if path.is_dir():
        path = next((path / name for name in _FILMS if (path / name).is_file()), path / "ratings.csv")
    with open(path, encoding="latin-1") as file:
        lines = (line.replace("::", ",").replace("\t", ",") for line in file)
        user, film, rating, seconds = np.loadtxt(lines, delimiter=",", skiprows=int(path.suffix == ".csv"), ndmin=2).T
    films, item = np.unique(film.astype(int), return_inverse=True)
    films_file, read_films = _FILMS.get(path.name, _FILMS["ratings.csv"])
    facts = read_films(path.with_name(films_file)) if path.with_name(films_file).is_file() else {}
    names = sorted({genre for _, genres in facts.values() for genre in genres})
    year = [facts.get(film, (np.nan, ()))[0] for film in films.tolist()]
    genres = np.array([[name in facts.get(film, (0, ()))[1] for name in names] for film in films.tolist()])
    genres = genres.reshape(len(films), len(names))
    return _ratings(user, item, rating, seconds, year, genres, names, rating.min(), rating.max(), "MovieLens")


def _year(title: str) -> float:
    """Returns the year in the parentheses at the end of a title."""
    year = re.search(r"(\d{4})\)\s*$", title)
    return float(year[1]) if year else np.nan


def _genres(text: str) -> tuple[str, ...]:
    return tuple(genre for genre in text.split("|") if genre and not genre.startswith("("))


def _films_of_csv(path: Path) -> dict[int, tuple[float, tuple[str, ...]]]:
    """Returns film -> year and genres."""
    with open(path, encoding="utf-8", newline="") as file:
        return {int(row["movieId"]): (_year(row["title"]), _genres(row["genres"])) for row in csv.DictReader(file)}


def _films_of_dat(path: Path) -> dict[int, tuple[float, tuple[str, ...]]]:
    """Returns film -> year and genres."""
    rows = [line.split("::") for line in path.read_text(encoding="latin-1").splitlines() if line]
    return {int(film): (_year(title), _genres(genres)) for film, title, genres in rows}


def _films_of_u_item(path: Path) -> dict[int, tuple[float, tuple[str, ...]]]:
    """Returns film -> year and genres, which are numbered in the file."""
    rows = [line.split("|") for line in path.read_text(encoding="latin-1").splitlines() if line]
    genres = lambda flags: tuple(f"genre {i:02}" for i, flag in enumerate(flags) if flag == "1")
    return {int(row[0]): (_year(row[1]), genres(row[5:])) for row in rows}


_FILMS = {
    "ratings.csv": ("movies.csv", _films_of_csv),
    "ratings.dat": ("movies.dat", _films_of_dat),
    "u.data": ("u.item", _films_of_u_item),
}


def synthetic(seed: int = 0, num_users: int = 160, num_items: int = 60) -> Ratings:
    """Draws ratings from 0 to 10 with offsets and two factors. Three of four users have 20 ratings or more."""
    rng = np.random.default_rng(seed)
    count = np.where(np.arange(num_users) % 4 > 0, rng.integers(20, 40, num_users), rng.integers(2, 9, num_users))
    user = np.repeat(np.arange(num_users), count)
    item = np.concatenate([rng.choice(num_items, n, replace=False) for n in count])
    genres = rng.integers(0, 2, (num_items, 3))
    factors = rng.normal(size=(num_users, 2)), rng.normal(size=(num_items, 2))
    mean = 6.5 + rng.normal(size=num_users)[user] + (rng.normal(size=num_items) + genres[:, 0])[item]
    noise = rng.uniform(0.3, 1.5, num_users)[user] * rng.normal(size=len(user))
    rating = np.clip(np.round(mean + 0.7 * (factors[0][user] * factors[1][item]).sum(1) + noise), 0, 10)
    seconds = rng.uniform(0, 1e7, len(user))
    year = rng.integers(1950, 2013, num_items)
    return _ratings(user, item, rating, seconds, year, genres, ("a", "b", "c"), 0.0, 10.0, "synthetic")


# ---- New users -------------------------------------------------------------------------------------------------------


class NewUsers(NamedTuple):
    """The first k ratings of U users, and later ones, padded to Q.

    Attributes:
      item: [U, k] int.
      rating: [U, k].
      day: [U, k].
      later_item: [U, Q] int; 0 where padded.
      later_rating: [U, Q].
      mask: [U, Q], 1 for ratings and 0 for padding.
    """

    item: np.ndarray
    rating: np.ndarray
    day: np.ndarray
    later_item: np.ndarray
    later_rating: np.ndarray
    mask: np.ndarray

    def select(self, positions: np.ndarray) -> "NewUsers":
        """Returns the users at some positions."""
        return NewUsers(*(leaf[positions] for leaf in self))

    def later_rows(self, rng: np.random.Generator, num: int) -> "NewUsers":
        """Returns the users with `num` of their later ratings, drawn without repetition and padded."""
        places = np.where(self.mask > 0, rng.random(self.mask.shape), 2.0)
        rows = np.argsort(places, axis=1)[:, :num]
        later = (np.take_along_axis(leaf, rows, axis=1) for leaf in self[3:])
        return NewUsers(*self[:3], *later)


def frequent_users(ratings: Ratings) -> np.ndarray:
    """Returns the users with at least 20 ratings, sorted."""
    return np.flatnonzero(np.bincount(ratings.user) >= MIN_RATINGS)


def folds(num_users: int, num_folds: int = NUM_FOLDS) -> list[np.ndarray]:
    """Divides the positions of users at random."""
    return [np.sort(part) for part in np.array_split(np.random.default_rng(0).permutation(num_users), num_folds)]


def user_sampler(ratings: Ratings, users: np.ndarray, num_first: int, order: str = "time") -> Callable[..., NewUsers]:
    """Returns `(key, positions in users) -> NewUsers`.

    With `order="time"`, these are each user's first k ratings and all later ones. With "window", k successive ratings
    from a random one on, and all later ones.
    """
    own = np.flatnonzero(np.isin(ratings.user, users))
    row = own[:, None].astype(np.float32)  # a record's input is the number of its rating
    table = tasks.from_user_records(row, ratings.rating[own], ratings.user[own], time=ratings.day[own])
    draw = jax.jit(jax.vmap(tasks.user_episodes(table, num_support=num_first, order=order)))

    def sample(key: jax.Array, positions: np.ndarray) -> NewUsers:
        first, later, _ = draw(jax.random.split(key, len(positions)), jnp.asarray(positions))
        rows, later_rows = (np.asarray(part["x"][..., 0]).astype(int) for part in (first, later))
        mask = np.asarray(later["mask"], np.float64)
        of_first = ratings.item[rows], ratings.rating[rows], ratings.day[rows]
        real = mask > 0
        of_later = np.where(real, ratings.item[later_rows], 0), np.where(real, ratings.rating[later_rows], 0.0), mask
        return NewUsers(*of_first, *of_later)

    return sample


class Data(NamedTuple):
    """The ratings, the users that are tested, and for each k their first ratings and a sampler of windows."""

    ratings: Ratings
    users: np.ndarray
    first: dict[int, NewUsers]
    window: dict[int, Callable]


def make_data(ratings: Ratings, numbers: tuple[int, ...]) -> Data:
    """Returns the data for the first k ratings, for each k of `numbers`."""
    users = frequent_users(ratings)
    first = {k: user_sampler(ratings, users, k)(jax.random.key(0), np.arange(len(users))) for k in numbers}
    return Data(ratings, users, first, {k: user_sampler(ratings, users, k, "window") for k in numbers})


class Split(NamedTuple):
    """Positions of users: those of the test, and those of the parts [P, M] of the others; and each user's stage."""

    test: np.ndarray
    parts: np.ndarray
    stage: np.ndarray


def make_split(num_users: int, fold: int) -> Split:
    """Returns the split of a fold: the users of part p are new to stage p, and those of the test to the last stage."""
    test = folds(num_users)[fold]
    others = np.random.default_rng(100 + fold).permutation(np.setdiff1d(np.arange(num_users), test))
    size = len(others) // NUM_PARTS
    parts = others[: NUM_PARTS * size].reshape(NUM_PARTS, size)
    stage = np.full(num_users, NUM_PARTS)
    stage[parts] = np.arange(NUM_PARTS)[:, None]
    return Split(test, parts, stage)
