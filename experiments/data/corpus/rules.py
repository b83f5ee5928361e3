"""Simulated tables of categorical columns whose class follows a rule of a few columns, such as "a equals b"."""

import numpy as np

from metaopt import tasks

MIN_ROWS, MAX_ROWS = 70, 1200
MIN_SHARE = 0.08  # the least share of a class


def rule_tables(num: int, seed: int) -> list[tasks.Table]:
    """Returns `num` tables of different families.

    Columns have two to five levels with unequal shares, and some of them do not matter. A third of the tables has wrong
    classes in up to a tenth of the rows. Half of them hold the levels as numbers, in their order.
    """
    tables = []
    for k in range(num):
        rng = np.random.default_rng([seed, k])
        name, rule = list(RULES.items())[k % len(RULES)]
        x, y = _draw(rule, rng)
        categorical = np.full(x.shape[1], rng.random() < 0.5)
        tables.append(
            tasks.Table(f"rule/{name}/{k}", f"rule:{k}", x.astype(np.float32), y, categorical, None, "simulated")
        )
    return tables


def _draw(rule, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns x [n, d] and y [n]: the first draw in which no class is rare."""
    while True:
        levels = rng.integers(2, 6, rng.integers(3, 11))
        if rng.random() < 0.5:
            levels[:] = levels[0]
        num = int(np.exp(rng.uniform(np.log(MIN_ROWS), np.log(MAX_ROWS))))
        shares = [rng.dirichlet(np.full(size, 5.0)) for size in levels]
        x = np.stack([rng.choice(size, num, p=p) for size, p in zip(levels, shares, strict=True)], axis=1)
        classes = rule(x[:, rng.permutation(len(levels))], rng)
        y = np.unique(classes, return_inverse=True)[1].astype(np.int32)
        if y.max() > 0 and np.bincount(y).min() >= MIN_SHARE * num:
            break
    if rng.random() < 1 / 3:
        wrong = rng.random(num) < rng.uniform(0, 0.1)
        y = np.where(wrong, rng.permutation(y), y)
    return x, y


def _equal(x, rng):
    """Two columns are equal, or a third one has its first level."""
    return (x[:, 0] == x[:, 1]) | ((x[:, 2] == 0) & (rng.random() < 0.5))


def _count(x, rng):
    """A certain number of columns has its first level."""
    num = int(rng.integers(3, x.shape[1] + 1))
    matches = (x[:, :num] == 0).sum(1)
    return matches == int(np.median(matches)) if rng.random() < 0.5 else matches >= int(rng.integers(1, 3))


def _balance(x, rng):
    """The sign of the difference of two products or sums."""
    if x.shape[1] < 4 or rng.random() < 0.3:
        return np.sign(x[:, 0] + x[:, 1] - 2 * x[:, 2])
    return np.sign((1 + x[:, 0]) * (1 + x[:, 1]) - (1 + x[:, 2]) * (1 + x[:, 3]))


def _terms(x, rng):
    """One of a few conjunctions of two conditions holds."""
    result = np.zeros(len(x), bool)
    for _ in range(rng.integers(2, 4)):
        i, j = rng.choice(x.shape[1], 2, replace=False)
        result |= (x[:, i] == rng.integers(0, 2)) & (x[:, j] != rng.integers(0, 2))
    return result


def _list(x, rng):
    """The first condition that holds gives one of three classes."""
    result = np.full(len(x), 2)
    for i in rng.permutation(x.shape[1])[: rng.integers(2, 5)]:
        result = np.where(x[:, i] == rng.integers(0, 2), rng.integers(0, 3), result)
    return result


def _parity(x, rng):
    """Whether the sum of two columns is odd."""
    return (x[:, 0] + x[:, 1]) % 2


RULES = {"equal": _equal, "count": _count, "balance": _balance, "terms": _terms, "list": _list, "parity": _parity}
