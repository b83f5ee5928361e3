"""The kernel, the inner problem of the dual weights, and the outer losses, on rows that may be padding.

A task's `train` has x [N, D], y [N], mask [N] (1 for real rows) and columns [D] (1 for real columns); `valid` has x, y
and mask. Padded columns are 0. A padded row has a 1 on the diagonal of K, zeros elsewhere and y = 0: it changes no
result.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import base, hypergrad, inner, spaces

LEAST_VARIANCE = 1e-4  # added to σ²


def space(num_columns: int) -> base.PyTree:
    """Returns the space of λ; length scales are in units of √D."""
    return {
        "lengthscale": spaces.positive(shape=(num_columns,)),
        "signal": spaces.positive(1.0),
        "noise": spaces.positive(0.3),
    }


def covariance(hp: base.HyperParams, a: jax.Array, b: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns k of all rows of a [N, D] and b [M, D], without noise."""
    scale = 1 / (hp["lengthscale"] * jnp.sqrt(columns.sum()))
    a, b = a * scale[None], b * scale[None]
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return hp["signal"] ** 2 * jnp.exp(-0.5 * jnp.maximum(squared, 0.0))


def noisy_covariance(hp: base.HyperParams, train: base.Data) -> jax.Array:
    """Returns K of the training rows."""
    mask = train["mask"]
    real = covariance(hp, train["x"], train["x"], train["columns"]) * mask[:, None] * mask[None]
    return real + jnp.diag(jnp.where(mask > 0, hp["noise"] ** 2 + LEAST_VARIANCE, 1.0))


def solve(hp: base.HyperParams, train: base.Data) -> jax.Array:
    """Returns α = K⁻¹y, the minimum of the inner loss."""
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(noisy_covariance(hp, train)), True), train["y"])


def inner_loss(alpha: jax.Array, hp: base.HyperParams, train: base.Data) -> jax.Array:
    """½ αᵀKα − αᵀy."""
    return alpha @ (0.5 * noisy_covariance(hp, train) @ alpha - train["y"])


# ---- Outer losses: (α, λ, task) -> [] --------------------------------------------------------------------------------


def marginal_likelihood(alpha: jax.Array, hp: base.HyperParams, task: base.Task) -> jax.Array:
    """Returns −log p(y | X) per training row: ½ (yᵀα + log |K| + N log 2π) / N. Uses no other rows."""
    num = task.train["mask"].sum()
    factor = jnp.linalg.cholesky(noisy_covariance(hp, task.train))
    return 0.5 * (task.train["y"] @ alpha + 2 * jnp.log(jnp.diag(factor)).sum()) / num + 0.5 * jnp.log(2 * jnp.pi)


def leave_one_out(alpha: jax.Array, hp: base.HyperParams, task: base.Task) -> jax.Array:
    """Returns the mean squared error of each training row by the others: (α_i / (K⁻¹)_ii)². Uses no other rows."""
    mask = task.train["mask"]
    factor = jnp.linalg.cholesky(noisy_covariance(hp, task.train))
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(mask)))
    return (mask * (alpha / jnp.diag(inverse)) ** 2).sum() / mask.sum()


def squared_error(alpha: jax.Array, hp: base.HyperParams, task: base.Task) -> jax.Array:
    """Returns the mean squared error on the other rows."""
    error = task.valid["y"] - _cross(hp, task).T @ alpha
    return (task.valid["mask"] * error**2).sum() / task.valid["mask"].sum()


def predictive_density(alpha: jax.Array, hp: base.HyperParams, task: base.Task) -> jax.Array:
    """Returns the mean of −log p(y* | x*, X, y) over the other rows."""
    cross = _cross(hp, task)
    factor = jnp.linalg.cholesky(noisy_covariance(hp, task.train))
    explained = (jax.scipy.linalg.solve_triangular(factor, cross, lower=True) ** 2).sum(0)
    variance = jnp.maximum(hp["signal"] ** 2 - explained, 0.0) + hp["noise"] ** 2 + LEAST_VARIANCE
    error = task.valid["y"] - cross.T @ alpha
    losses = 0.5 * (error**2 / variance + jnp.log(2 * jnp.pi * variance))
    return (task.valid["mask"] * losses).sum() / task.valid["mask"].sum()


def _cross(hp: base.HyperParams, task: base.Task) -> jax.Array:
    """Returns [N, M] covariances of training rows and other rows."""
    train = task.train
    return train["mask"][:, None] * covariance(hp, train["x"], task.valid["x"], train["columns"])


# ---- Problems --------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A model, defined by its outer losses.

    Attributes:
      outer: the loss on other rows, by which g is trained and judged.
      tuned: the loss on the training rows of one table, by which λ is tuned on this table.
    """

    outer: Callable
    tuned: Callable


GAUSSIAN_PROCESS = Model(predictive_density, marginal_likelihood)
KERNEL_RIDGE = Model(squared_error, leave_one_out)


def problem(outer: Callable) -> base.Problem:
    """Returns the problem: training starts at its minimum α = K⁻¹y, which needs no step. Its λ is in natural units."""
    loop = inner.loop(inner_loss, lambda hp: optax.sgd(0.0), init=lambda key, hp, train: solve(hp, train))
    return inner.problem(loop, outer, outer_batch=lambda key, task: task)


def closed_form(outer: Callable) -> Callable:
    """Returns F(λ) as `(z, task, key) -> []` in unconstrained coordinates, for `hypergrad.direct`.

    Its derivative equals the implicit one of `problem`, and one factorization of K serves both.
    """

    def value(coordinates, task, key=None):
        hp = spaces.to_constrained(space(task.train["columns"].shape[0]), coordinates)
        return outer(solve(hp, task.train), hp, task)

    return value


# ---- Tuning on one table ---------------------------------------------------------------------------------------------


def adam(tuned: Callable) -> Callable:
    """Returns `(rate, z, task, num_steps) -> z`: steps of Adam down the tuned loss."""
    value = closed_form(tuned)
    loop = inner.loop(
        lambda z, hp, data: value(z, data[1]), lambda rate: optax.adam(rate), init=lambda key, hp, data: data[0]
    )
    train = inner.run(loop)
    return lambda rate, z, task, num_steps: train(jax.random.key(0), rate, (z, task), num_steps).params


def lbfgs(tuned: Callable, num_steps: int) -> Callable:
    """Returns `(z, task) -> z`: steps of L-BFGS with a line search."""
    value = closed_form(tuned)
    minimum = hypergrad.argmin(lambda z, hp, task: value(z, task), num_steps=num_steps)
    return lambda z, task: minimum(z, None, task)


def median_heuristic(task: base.Task) -> base.HyperParams:
    """Returns the default signal and noise, with the median distance of training rows as the common length scale."""
    x, mask, columns = (task.train[name] for name in ("x", "mask", "columns"))
    squared = (x**2).sum(1)[:, None] + (x**2).sum(1)[None] - 2 * x @ x.T
    pairs = jnp.triu(mask[:, None] * mask[None], 1) > 0
    median = jnp.nanmedian(jnp.where(pairs, jnp.sqrt(jnp.maximum(squared, 0.0)), jnp.nan))
    median = jnp.maximum(median, 0.1)
    hp = spaces.default(space(len(columns)))
    return {**hp, "lengthscale": jnp.full_like(hp["lengthscale"], median / jnp.sqrt(columns.sum()))}
