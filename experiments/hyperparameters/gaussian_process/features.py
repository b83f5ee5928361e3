"""Features of a table and of its columns, and g, which maps them to λ.

A column's features: its correlation with the target, its ridge coefficient, how well neighbours in its order predict
the target and the residual of the ridge, its distinct values, tails, and correlation with other columns. With
`LIKELIHOOD`, also the slopes of the log marginal likelihood in its log length scale at three fixed λ, which cost as
much as three steps of ascent. A table's features: its rows, columns, the error of the ridge, the tails of the target,
the three likelihoods with their slopes in s and σ, and the mean and maximum of all columns' features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.hyperparameters.gaussian_process import model
from metaopt import base, predictors, spaces

REFERENCES = ((0.5, 0.1), (1.0, 0.3), (2.0, 0.3))  # length scale in units of √D, noise
WINDOW = 5  # neighbours on each side
NUM_COLUMN = 8 + len(REFERENCES)
NUM_TABLE = 6 + 3 * len(REFERENCES)
LIMIT = 8.0  # of scaled features: the noise of deterministic tables is far from the mean


def _neighbours(x: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns 1 − the squared error of the mean target of neighbours in the order of x [N]; the variance is 1."""
    order = jnp.argsort(jnp.where(mask > 0, x, jnp.inf))
    target, mask = (target * mask)[order], mask[order]
    place, last = jnp.arange(len(x)), mask.sum().astype(int)
    low, high = jnp.maximum(place - WINDOW, 0), jnp.minimum(place + WINDOW + 1, last)
    sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(target)])
    mean = (sums[high] - sums[low] - target) / jnp.maximum(high - low - 1, 1)
    return 1 - (mask * (target - mean) ** 2).sum() / jnp.maximum((target**2).sum(), 1e-3)


def _distinct(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the share of distinct values."""
    values = jnp.append(jnp.sort(jnp.where(mask > 0, x, jnp.inf)), jnp.inf)
    return ((jnp.diff(values) > 1e-6) & jnp.isfinite(values[:-1])).sum() / mask.sum()


def _likelihoods(train: base.Data) -> tuple[jax.Array, jax.Array]:
    """Returns [R, D] slopes in log length scales, and [3 R] likelihoods with slopes in log signal and log noise."""
    num, num_columns = train["mask"].sum(), train["columns"].shape[0]
    value = model.closed_form(model.marginal_likelihood)
    slopes, rest = [], []
    for lengthscale, noise in REFERENCES:
        hp = spaces.default(model.space(num_columns))
        hp = {**hp, "lengthscale": lengthscale * hp["lengthscale"], "noise": noise + 0 * hp["noise"]}
        z = spaces.to_unconstrained(model.space(num_columns), hp)
        loss, grad = jax.value_and_grad(value)(z, base.Task(train, None))
        grad = grad.coordinates
        slopes.append(jnp.arcsinh(-num * grad["lengthscale"]))
        rest += [loss, jnp.arcsinh(-num * grad["signal"]), jnp.arcsinh(-num * grad["noise"])]
    return jnp.stack(slopes), jnp.stack(rest)


def describe(train: base.Data, likelihood: bool = True) -> dict[str, jax.Array]:
    """Returns {"columns": [D, NUM_COLUMN], "table": [NUM_TABLE + 2 NUM_COLUMN]}, before scaling."""
    x, y, mask, columns = (train[name] for name in ("x", "y", "mask", "columns"))
    num, num_columns = mask.sum(), columns.sum()
    x = x * mask[:, None]
    gram = x.T @ x / num
    correlation = x.T @ y / num
    penalty = jnp.diag(jnp.where(columns > 0, 0.1 + num_columns / num, 1.0))
    inverse = jnp.linalg.inv(gram + penalty)
    weights = inverse @ correlation
    leverage = ((x @ inverse) * x).sum(1) / num
    residual = mask * (y - x @ weights)
    left_out = (mask * (residual / jnp.maximum(1 - leverage, 0.1)) ** 2).sum() / num
    other = gram * (1 - jnp.eye(len(columns)))
    by_column = lambda fn, *args: jax.vmap(fn, in_axes=(1, *(None for _ in args)))(x, *args)
    parts = [
        jnp.abs(correlation),
        jnp.abs(weights),
        by_column(_neighbours, y, mask),
        by_column(_neighbours, residual, mask),
        jnp.log(by_column(_distinct, mask) + 0.01),
        jnp.log1p((jnp.abs(x) ** 4).sum(0) / num),
        jnp.sqrt((other**2).sum(0) / jnp.maximum(num_columns - 1, 1)),
        jnp.abs(other).max(0),
    ]
    slopes, likelihoods = _likelihoods(train)
    keep = 1.0 if likelihood else 0.0
    described = jnp.concatenate([jnp.stack(parts), keep * slopes]).T * columns[:, None]
    table = [
        jnp.log(num),
        jnp.log(num_columns),
        jnp.log(num_columns / num),
        jnp.log(left_out),
        jnp.log1p((y**4).sum() / num),
        jnp.log(_distinct(y, mask) + 0.01),
    ]
    largest = jnp.where(columns[:, None] > 0, described, -jnp.inf).max(0)
    pooled = [described.sum(0) / num_columns, largest]
    return {"columns": described, "table": jnp.concatenate([jnp.stack(table), keep * likelihoods, *pooled])}


class Scaling(NamedTuple):
    """Mean and deviation of the features over tasks: of the columns' ones and of the tables' ones."""

    mean: dict[str, jax.Array]
    deviation: dict[str, jax.Array]

    def __call__(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {n: (x - _as_row(self.mean[n], x)) / _as_row(self.deviation[n], x) for n, x in features.items()}


def _as_row(values: jax.Array, rows: jax.Array) -> jax.Array:
    return values.reshape((1,) * (rows.ndim - 1) + values.shape)


def fit_scaling(features: dict[str, jax.Array], columns: jax.Array) -> Scaling:
    """Fits the scaling on features with a leading axis of tasks; `columns` [T, D] marks the real columns."""
    rows = {
        "columns": (features["columns"], columns[..., None] / columns.sum()),
        "table": (features["table"], jnp.full((len(columns), 1), 1 / len(columns))),
    }
    axes = {"columns": (0, 1), "table": (0,)}
    mean = {name: (x * w).sum(axes[name]) for name, (x, w) in rows.items()}
    variance = {name: ((x - _as_row(mean[name], x)) ** 2 * w).sum(axes[name]) for name, (x, w) in rows.items()}
    return Scaling(mean, {name: jnp.sqrt(v) + 1e-3 for name, v in variance.items()})


def predictor(num_hidden: int, constant: bool = False) -> base.Predictor:
    """Returns g of scaled features. With `constant` it does not see them, so that λ is the same for all tables."""
    num = NUM_TABLE + 2 * NUM_COLUMN
    own = model.space(1)
    column = predictors.mlp({"lengthscale": spaces.positive()}, NUM_COLUMN + num, num_hidden=num_hidden, limit=LIMIT)
    table = predictors.mlp({n: own[n] for n in ("signal", "noise")}, num, num_hidden=num_hidden, limit=LIMIT)

    def init(key):
        keys = jax.random.split(key)
        return {"column": column.init(keys[0]), "table": table.init(keys[1])}

    def apply(meta_params, task):
        features = jax.tree.map(lambda x: x * (0.0 if constant else 1.0), task.features)
        described = features["table"]

        def lengthscale(own):
            of_column = base.Task(None, None, jnp.concatenate([own, described]))
            return column.apply(meta_params["column"], of_column).coordinates["lengthscale"]

        rest = table.apply(meta_params["table"], base.Task(None, None, described)).coordinates
        return spaces.Unconstrained({"lengthscale": jax.vmap(lengthscale)(features["columns"]), **rest})

    return base.Predictor(init, apply)
