"""The tasks of one shape with their folds, and the rows and keys that all parts of a fold share."""

from typing import NamedTuple

import jax
import numpy as np

from experiments.architecture.auto_architecture.image_table_tasks import Unit
from experiments.architecture.auto_architecture.searcher import Meta
from experiments.architecture.auto_architecture.training import Shape
from metaopt import base


class Prepared(NamedTuple):
    """Tasks of one shape, and random networks that were trained on all of them."""

    shape: Shape
    meta: Meta
    units: list[Unit]
    fold: np.ndarray  # [units]
    batch: base.Task
    test: dict[str, jax.Array]
    gradients: np.ndarray  # [units, K]
    codes: np.ndarray  # [networks, edges]
    outcomes: np.ndarray  # [trained, units, 3], of the first `trained` networks


def assign_folds(units: list[Unit], num_folds: int, seed: int) -> np.ndarray:
    """Returns [units] the fold of each unit. A family is never split."""
    families = sorted({u.family for u in units})
    order = np.random.default_rng(seed).permutation(len(families))
    fold = {families[f]: i % num_folds for i, f in enumerate(order)}
    return np.array([fold[u.family] for u in units])


def leave_out(units: list[Unit], rows: np.ndarray, share: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows: h learns from the first part, and the second part has the left-out families.

    No family is in both parts.
    """
    families = sorted({units[i].family for i in rows})
    num = max(1, round(share * len(families))) if len(families) > 2 else 0
    out = {families[i] for i in rng.permutation(len(families))[:num]}
    is_out = np.array([units[i].family in out for i in rows])
    return rows[~is_out], rows[is_out]


def rows_of_fold(p: Prepared, f: int, seed: int) -> tuple[np.ndarray, ...]:
    """Returns four sets of rows: meta-training tasks, those that h learns from, left-out ones, and held-out tasks.

    h learns from some families of the meta-training tasks. Their other families are the left-out ones.
    """
    train_rows = np.flatnonzero(p.fold != f)
    learned, left = leave_out(p.units, train_rows, p.shape.config.left_out, np.random.default_rng((seed, f, 2)))
    held = np.random.default_rng((seed, f)).permutation(np.flatnonzero(p.fold == f))[: p.shape.config.held_out]
    return train_rows, learned, left, held


def asked(learn_rows: np.ndarray, left_rows: np.ndarray, f: int, seed: int) -> np.ndarray:
    """Returns the meta-training tasks, in random order, that select trust and rates."""
    return np.random.default_rng((seed, f, 1)).permutation(left_rows if len(left_rows) else learn_rows)


def compared_key(key: jax.Array) -> jax.Array:
    """Returns the key, derived from a fold's key, that trains a* and all networks in the comparison."""
    return jax.random.split(key, 16)[5]
