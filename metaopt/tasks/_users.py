"""One task per person, patient or hospital: adapt to the first few records of a new user, and predict the others."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt._jaxpr import Tracer
from metaopt.tasks._class_sources import exact_array, first_missing
from metaopt.tasks._columns import merged_values
from metaopt.tasks._episodes import Episode

_log = logging.getLogger(__name__)

ORDERS = ("time", "window", "random")


class UserTable(NamedTuple):
    """Records of `U` users: `N` rows, `D` columns.

    Attributes:
      x: [N, D] float32; NaN where missing.
      y: [N] float32, or int32 for classes.
      user: [N] int32 in 0..U-1.
      time: [N] float64, the time of each record; None if times are not known.
      user_names: U names.
      feature_names: D names.
    """

    x: np.ndarray
    y: np.ndarray
    user: np.ndarray
    time: np.ndarray | None
    user_names: tuple[str, ...]
    feature_names: tuple[str, ...]

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_names)

    def standardized(self, fit_on: Sequence[int] | np.ndarray) -> "UserTable":
        """Scales columns to mean 0 and variance 1 over some users; gaps become 0, and additional columns mark them.

        Args:
          fit_on: the training users, by their positions in `user_names`; the statistics come only from them.

        Returns:
          A table without NaN: first the D columns, then a column of 0 and 1 for each column with gaps, "missing NAME".

        Raises:
          ValueError: if a user does not exist, or `fit_on` is a mask or has names.
        """
        rows = np.isin(self.user, _check_users("fit_on", self, fit_on))
        gaps = np.isnan(self.x)
        present = np.where(gaps, 0, self.x)[rows].astype(np.float64)
        count = np.maximum((~gaps[rows]).sum(axis=0), 1)
        mean = present.sum(axis=0) / count
        deviation = np.sqrt((np.where(gaps[rows], 0, present - mean) ** 2).sum(axis=0) / count)
        x = np.where(gaps, 0, (self.x - mean) / np.where(deviation > 0, deviation, 1))
        with_gaps = np.flatnonzero(gaps.any(axis=0))
        x = np.concatenate([x, gaps[:, with_gaps]], axis=1).astype(np.float32)
        marks = tuple(f"missing {self.feature_names[j]}" for j in with_gaps)
        return self._replace(x=x, feature_names=self.feature_names + marks)


def from_user_records(
    x: Any, y: Any, user: Any, *, time: Any = None, feature_names: Sequence[str] | None = None
) -> UserTable:
    """Makes a table of records, each of one user.

    Args:
      x: [N, D], numbers; NaN where missing.
      y: [N], numbers, or integers for classes; all must be present.
      user: [N], the user of each record: any values.
      time: [N], the time of each record: numbers, or dates (NumPy's, `datetime` or ISO 8601); all must be present. None
        if times are not known.
      feature_names: D names; None numbers the columns.

    Returns:
      A `UserTable`; users are the different values of `user`, sorted.

    Raises:
      ValueError: if `x` is empty, lengths differ, or a value is text.
      ValueError: if integer labels are not 0..C-1.
      ValueError: if an entry of `x` is infinite, or an entry of `y`, `user` or `time` is missing (NaN, NaT) or
        infinite.
    """
    wide, y = _numbers("x", x), _numbers("y", y)
    with np.errstate(over="ignore"):  # infinite values are rejected below
        x = wide.astype(np.float32)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"`x` must be [records, columns], at least one of each; got shape {x.shape}.")
    for name, array in (("y", y), ("user", user), ("time", time)):
        if array is not None and np.shape(array) != (len(x),):
            raise ValueError(f"`{name}` must have one entry for each of the {len(x)} records; got {np.shape(array)}.")
    names = tuple(map(str, range(x.shape[1]) if feature_names is None else feature_names))
    if len(names) != x.shape[1]:
        raise ValueError(f"`feature_names` must be {x.shape[1]} names; got {len(names)}.")
    if (row := first_missing(user)) is not None:
        raise ValueError(f"`user` must be known for every record; row {row} has none.")
    for j, num_lost in merged_values(wide).items():
        _log.warning(
            "float32 merges %d values of the column %r of `x`; remove it if it is an id, otherwise subtract its "
            "smallest value",
            num_lost,
            names[j],
        )
    users, user = np.unique(exact_array(user), return_inverse=True)
    classes = np.issubdtype(y.dtype, np.integer) or y.dtype == bool
    labels = np.unique(y)
    if classes and (labels[0] != 0 or labels[-1] != len(labels) - 1):
        raise ValueError(
            f"Integers in `y` are classes and must be 0..C-1, without gaps; got {labels[:10].tolist()}. "
            "Number them, `np.unique(y, return_inverse=True)[1]`, or pass counts and measurements as floats."
        )
    with np.errstate(over="ignore"):
        y = y.astype(np.int32 if classes else np.float32)
    if time is not None:
        times = _numbers("time", time)
        time = times.astype(np.float64)  # seconds since 1970 do not fit float32
        if times.dtype.kind in "mM":
            time[np.isnat(times)] = np.nan  # as a number, NaT would be the earliest time
    table = UserTable(x, y, user.astype(np.int32), time, tuple(map(str, users)), names)
    _check_finite(table)
    return table


def _numbers(name: str, values: Any) -> np.ndarray:
    """Returns an array of numbers, or of times. Raises ValueError if there is text."""
    array = np.asarray(values)
    try:
        if array.dtype.kind == "O":  # None is a gap
            array = array.astype(np.float64)
    except TypeError:  # objects such as `datetime`
        pass
    except ValueError:
        array = array.astype(str)
    if name == "time" and array.dtype.kind in "OU":
        try:
            return array.astype("datetime64[us]")
        except (TypeError, ValueError):
            pass
    if array.dtype.kind not in "biuf" + "mM" * (name == "time"):
        hint = {"x": "one-hot encode columns of text", "time": "ISO 8601 is read as dates"}
        also = hint.get(name, "number the classes, `np.unique(y, return_inverse=True)[1]`")
        raise ValueError(f"`{name}` must be numbers; got {array.dtype}, {array.ravel()[:3].tolist()}: {also}.")
    return array


def _check_finite(table: UserTable) -> None:
    """Raises ValueError if an entry is infinite, or an entry of y or time is missing."""
    for name, array in (("x", table.x), ("y", table.y), ("time", table.time)):
        if array is None:  # no time
            continue
        bad = np.isinf(array) if name == "x" else ~np.isfinite(array)
        if bad.any():
            row, *column = np.argwhere(bad)[0]
            gaps = ", or NaN where missing" if name == "x" else ""
            where = "".join(f", column {table.feature_names[j]!r}" for j in column)
            raise ValueError(
                f"`{name}` must be finite in {array.dtype}{gaps}; got {array[row, *column]} in row {row}{where}, of "
                f"user {table.user_names[table.user[row]]}."
            )


def user_episodes(
    table: UserTable,
    *,
    num_support: int,
    num_query: int | None = None,
    order: str = "time",
    users: Sequence[int] | np.ndarray | None = None,
) -> Callable[..., Episode]:
    """Makes a sampler of one episode per user: `num_support` records to adapt to, and later (or other) ones to predict.

    Args:
      table: the table of all users, without NaN (`UserTable.standardized`).
      num_support: K, at least 1.
      num_query: the largest number of query records; None takes all remaining ones, padded to the longest user.
      order: how to divide the records. "time": the first K are the support set, and the next ones the query set.
        "window": the same from a random record on, so that training does not see only beginnings. "random": at random,
        for records without a time.
      users: the users, by their positions in `table.user_names`, integers in 0..U-1; None takes all.

    Returns:
      `(key, user=None) -> Episode`, pure, works under `jit` and `vmap`. By default, the user is drawn uniformly from
      `users`. An argument `user` is a position in `users`, so that `vmap` over `arange(len(users))` gives every user
      once. A traced position is not checked; if it is out of range, the episode is of another user in `users`. Records
      with equal times are in the table's order. The support set has "x" [K, D], "y" [K], "mask" [K] and "num_rows". If
      y is an integer, it also has "class_mask" [C], ones for the classes 0..C-1 of the whole table. The query set
      likewise; `meta` has "user" [] int32, the position in the table.

    Raises:
      ValueError: if `order` is unknown, or `users` is a mask or has names.
      ValueError: if a user has K records or fewer, or x has NaN.
      ValueError: if the table has no time, except with `order="random"`.
      ValueError: in the sampler, if `user` is not a position in `users`.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {', '.join(map(repr, ORDERS))}; got {order!r}.")
    if order != "random" and table.time is None:
        raise ValueError(f'The table has no time, so `order` must be "random"; got {order!r}.')
    if np.isnan(table.x).any():
        raise ValueError("The table has NaN: fill the gaps first, with `table.standardized(users)`.")
    chosen = _check_users("users", table, range(table.num_users) if users is None else users)
    by_time = np.lexsort((np.zeros(len(table.x)) if table.time is None else table.time, table.user))
    counts = np.bincount(table.user, minlength=table.num_users)
    short = [u for u in chosen if counts[u] <= num_support]
    if short:
        raise ValueError(
            f"User {table.user_names[short[0]]} has {counts[short[0]]} records, but needs {num_support} to adapt to "
            "and one to predict. Reduce `num_support`, or exclude such users with `users`."
        )
    widest = int(counts[chosen].max())
    num_padded = widest - num_support if num_query is None else min(num_query, widest - num_support)
    classes = {}
    if np.issubdtype(table.y.dtype, np.integer):
        classes["class_mask"] = jnp.ones(int(table.y.max()) + 1, jnp.float32)
    records = _Records(
        x=jnp.asarray(table.x[by_time]),
        y=jnp.asarray(table.y[by_time]),
        first=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
        count=jnp.asarray(counts, jnp.int32),
        classes=classes,
    )
    user_positions = jnp.asarray(chosen, jnp.int32)

    def sample(key, user=None):
        if user is not None and not isinstance(user, Tracer):
            _check_position(user, len(chosen))
        user_key, row_key = jax.random.split(key)
        position = jax.random.randint(user_key, (), 0, len(chosen)) if user is None else user
        table_user = user_positions[position]  # `user` is a position in `users`
        order_of_records = _draw_order(row_key, order, widest, records.count[table_user], num_support)
        support = _part(records, table_user, order_of_records[:num_support])
        query = _part(records, table_user, order_of_records[num_support : num_support + num_padded])
        return Episode(support, query, {"user": table_user})

    return sample


class _Records(NamedTuple):
    """The records of all users, sorted by user, then by time."""

    x: jax.Array  # [N, D]
    y: jax.Array  # [N]
    first: jax.Array  # [U], the first record of each user
    count: jax.Array  # [U]
    classes: dict[str, jax.Array]  # "class_mask" [C], or empty


def _draw_order(key: jax.Array, order: str, widest: int, count: jax.Array, num_support: int) -> jax.Array:
    """[widest], numbers of records of a user with `count` records; numbers from `count` on are padding."""
    place = jnp.arange(widest, dtype=jnp.int32)
    if order == "window":
        return place + jax.random.randint(key, (), 0, count - num_support)
    if order == "random":
        bits = jax.random.bits(key, (widest,), jnp.uint32)
        return jnp.lexsort((bits, place >= count)).astype(jnp.int32)
    return place


def _part(records: _Records, user: jax.Array, place: jax.Array) -> dict[str, jax.Array]:
    real = place < records.count[user]
    row = jnp.where(real, records.first[user] + place, 0)
    return {
        "x": jnp.where(real[:, None], records.x[row], 0),
        "y": jnp.where(real, records.y[row], 0),
        "mask": real.astype(jnp.float32),
        "num_rows": real.sum().astype(jnp.int32),
        **records.classes,
    }


def _check_position(user: Any, num_users: int) -> None:
    user = np.asarray(user)
    if user.ndim or user.dtype.kind not in "iu" or not 0 <= user < num_users:
        raise ValueError(
            f"`user` must be an index into the sampler's users, an integer in 0..{num_users - 1}; got "
            f"{user.tolist()!r}. It is not an index into `table.user_names`."
        )


def _check_users(name: str, table: UserTable, users: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the positions of users [M]. Rejects masks, because NumPy would take them for the users 0 and 1."""
    positions = [np.asarray(user) for user in users] if np.iterable(users) else []
    is_place = lambda user: user.dtype.kind in "iu" and not user.ndim and 0 <= user < table.num_users
    if not positions or not all(map(is_place, positions)):
        shown = f"[{', '.join(repr(user.tolist()) for user in positions[:5])}{', ...' if len(positions) > 5 else ''}]"
        raise ValueError(
            f"`{name}` must be indices into `table.user_names`, integers in 0..{table.num_users - 1}, at least one; "
            f"got {shown if np.iterable(users) else repr(users)}. For a mask use `np.flatnonzero(mask)`, for names "
            "`[table.user_names.index(name) for name in names]`."
        )
    return np.array(positions, int)
