"""Ordinary recommenders. Each is fitted to the ratings of training users, and predicts from the first k of a new user.

Offsets, matrix factorization and its Bayesian form predict base_i + w_u·x_i (`Linear`), where w_u is a ridge solution:

    w_u = c + (X'X + R)⁻¹ X'(e − X c),    e = the new user's first ratings − base, X = their rows x_i.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse

from experiments.recommend.ratings import NewUsers, Ratings


class Linear(NamedTuple):
    """Predictions base_i + w_u·x_i for U new users.

    Attributes:
      base: [I].
      weights: [U, D], w.
      design: [I, D], x.
    """

    base: np.ndarray
    weights: np.ndarray
    design: np.ndarray

    def matrix(self) -> np.ndarray:
        """Returns [U, I]."""
        return self.base[None] + self.weights @ self.design.T

    def of_items(self, items: np.ndarray) -> np.ndarray:
        """Returns the predictions [U, Q] for items [U, Q] of each user."""
        return self.base[items] + (self.design[items] @ self.weights[..., None])[..., 0]


def fold_in(design: np.ndarray, residual: np.ndarray, ridge: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Returns the ridge solutions [U, D] of new users.

    Args:
      design: [U, k, D], X.
      residual: [U, k], e.
      ridge: [D, D], R.
      center: [D] or [U, D], c.
    """
    num_users, num_rows, size = design.shape
    center = np.broadcast_to(center, (num_users, size))
    transposed = np.swapaxes(design, 1, 2)
    errors = residual[..., None] - design @ center[..., None]
    if num_rows < size:  # the same solution by the smaller system: R⁻¹X'(X R⁻¹X' + I)⁻¹ (e − X c)
        scaled = np.linalg.inv(ridge) @ transposed
        change = scaled @ np.linalg.solve(design @ scaled + np.eye(num_rows), errors)
    else:
        change = np.linalg.solve(transposed @ design + ridge, transposed @ errors)
    return center + change[..., 0]


class Rows(NamedTuple):
    """The rows of a sparse matrix that have n entries each.

    Attributes:
      place: [R], the numbers of the rows.
      column: [R, n], the columns of the entries.
      value: [R, n].
    """

    place: np.ndarray
    column: np.ndarray
    value: np.ndarray


def rows_by_length(matrix: scipy.sparse.csr_array) -> list[Rows]:
    """Groups the rows by their numbers of entries. Rows without entries are omitted."""
    lengths = np.diff(matrix.indptr)
    groups = []
    for length in np.unique(lengths[lengths > 0]):
        place = np.flatnonzero(lengths == length)
        entries = matrix.indptr[place][:, None] + np.arange(length)
        groups.append(Rows(place, matrix.indices[entries], matrix.data[entries]))
    return groups


# ---- Offsets ---------------------------------------------------------------------------------------------------------


class Offsets(NamedTuple):
    """Rating ≈ mean + item offset + user offset.

    Attributes:
      mean: of all ratings.
      item: [I], shrunken offsets.
      user: [V], those of the training users.
      count: [I], ratings per item.
    """

    mean: float
    item: np.ndarray
    user: np.ndarray
    count: np.ndarray

    @property
    def base(self) -> np.ndarray:
        """[I], the mean plus the item offset."""
        return self.mean + self.item


def fit_offsets(
    train: Ratings, *, item_ridge: float, user_ridge: float = 5.0, sweeps: int = 0, content: bool = False
) -> Offsets:
    """Fits offsets. Each is the mean of its n residuals and of `ridge` additional ones that equal its prior.

    Args:
      train: the ratings of the training users.
      item_ridge: of items.
      user_ridge: of the training users.
      sweeps: how often users' offsets are fitted and then items' offsets again; with 0, users' offsets are 0.
      content: whether the prior of an item's offset is a linear function of its year, genres and number of ratings.
        Otherwise it is 0.
    """
    mean, num_users = train.rating.mean(), train.num_users
    count, user_count = np.bincount(train.item, minlength=train.num_items), np.bincount(train.user)
    user = np.zeros(num_users)
    for sweep in range(sweeps + 1):
        total = np.bincount(train.item, train.rating - mean - user[train.user], train.num_items)
        prior = _content_prior(train, count, total, item_ridge) if content else 0.0
        item = (total + item_ridge * prior) / np.maximum(count + item_ridge, 1e-9)
        if sweep < sweeps:
            residual = train.rating - mean - item[train.item]
            user = np.bincount(train.user, residual, num_users) / (user_count + user_ridge)
    return Offsets(mean, item, user, count)


def item_columns(ratings: Ratings, count: np.ndarray) -> np.ndarray:
    """Returns [I, 5 + G]: one, year, its square, logarithm of a number of ratings, its square, genres."""
    year = np.where(np.isnan(ratings.year), 0, (ratings.year - 2000) / 20)
    popularity = np.log1p(count) / 3
    columns = [np.ones_like(year), year, year**2, popularity, popularity**2]
    return np.concatenate([np.stack(columns, axis=1), ratings.genres], axis=1)


def _content_prior(train: Ratings, count: np.ndarray, total: np.ndarray, item_ridge: float) -> np.ndarray:
    """Returns [I], a regression of the items' mean residuals, weighted by 1 / (1/n + 1/ridge).

    A rating is regressed on the number of the other ratings of its item, as for a new user's rating.
    """
    rated = count > 0
    columns = item_columns(train, np.maximum(count - 1, 0))[rated]
    weight = count[rated] * item_ridge / (count[rated] + item_ridge + 1e-9) + 1e-9
    gram = columns.T @ (weight[:, None] * columns) + np.eye(columns.shape[1])
    slopes = np.linalg.solve(gram, columns.T @ (weight * total[rated] / count[rated]))
    return item_columns(train, count) @ slopes


def user_offsets(offsets: Offsets, new: NewUsers, ridge: float, center: float) -> np.ndarray:
    """Returns [U], the shrunken offsets of new users."""
    residual = new.rating - offsets.base[new.item]
    return (residual.sum(1) + ridge * center) / (new.item.shape[1] + ridge)


def residual_matrix(train: Ratings, offsets: Offsets) -> scipy.sparse.csr_array:
    """Returns [V, I], the training ratings minus their offsets."""
    residual = train.rating - offsets.base[train.item] - offsets.user[train.user]
    return scipy.sparse.csr_array((residual, (train.user, train.item)), (train.num_users, train.num_items))


# ---- Neighbours ------------------------------------------------------------------------------------------------------


class Neighbours(NamedTuple):
    """Similarities of items.

    Attributes:
      product: [I, I], sums of products of the residuals of users who rated both items.
      common: [I, I], numbers of these users.
      norm: [I], root of the sum of squared residuals.
    """

    product: scipy.sparse.csr_array
    common: scipy.sparse.csr_array
    norm: np.ndarray


def fit_neighbours(residuals: scipy.sparse.csr_array) -> Neighbours:
    """Fits the similarities of items to residuals [V, I]."""
    rated = residuals.copy()
    rated.data = np.ones_like(rated.data)
    norm = np.sqrt(np.asarray((residuals * residuals).sum(0)).ravel()) + 1e-6
    return Neighbours((residuals.T @ residuals).tocsr(), (rated.T @ rated).tocsr(), norm)


class Similar(NamedTuple):
    """Cosines of the k first items of U new users with J items, and numbers of common users; both [U, k, J]."""

    cosine: np.ndarray
    common: np.ndarray

    def to_items(self, items: np.ndarray) -> "Similar":
        """Returns the similarities to items [U, Q] of each user."""
        return Similar(*(np.take_along_axis(leaf, items[:, None], axis=2) for leaf in self))


def similar_items(neighbours: Neighbours, new: NewUsers) -> Similar:
    """Returns the similarities to all items, in float32."""
    num_users, num_first = new.item.shape
    rows = new.item.ravel()
    dense = lambda matrix: matrix[rows].toarray().astype(np.float32).reshape(num_users, num_first, -1)
    norm = neighbours.norm.astype(np.float32)
    return Similar(dense(neighbours.product) / (norm[new.item][..., None] * norm[None, None]), dense(neighbours.common))


def neighbour_correction(similar: Similar, residual: np.ndarray, shrink: float, ridge: float) -> np.ndarray:
    """Returns [U, J], weighted means of a new user's residuals.

        s_ij = cosine_ij n_ij / (n_ij + shrink),    correction_j = Σ_i s_ij e_i / (Σ_i |s_ij| + ridge)

    Args:
      similar: of the first items i to items j.
      residual: [U, k], e.
      shrink: of similarities from n common users.
      ridge: of the mean.
    """
    similarity = similar.cosine * similar.common / (similar.common + np.float32(shrink))
    return np.einsum("ukj,uk->uj", similarity, residual) / (np.abs(similarity).sum(1) + ridge)


# ---- Matrix factorization --------------------------------------------------------------------------------------------


def factorize(
    residuals: scipy.sparse.csr_array, num_factors: int, ridge: float, *, sweeps: int = 12, seed: int = 0
) -> np.ndarray:
    """Returns item factors [I, F] of residuals [V, I], by alternating least squares:

    min Σ (r_ui − p_u·q_i)² + ridge (Σ |p_u|² + Σ |q_i|²).
    """
    item = np.random.default_rng(seed).normal(size=(residuals.shape[1], num_factors))
    by_user, by_item = rows_by_length(residuals), rows_by_length(residuals.T.tocsr())
    for _ in range(sweeps):
        user = _solve_factors(by_user, residuals.shape[0], item, ridge)
        item = _solve_factors(by_item, residuals.shape[1], user, ridge)
    return item


def _solve_factors(groups: list[Rows], num: int, factors: np.ndarray, ridge: float) -> np.ndarray:
    """Returns the ridge solutions of `num` rows, given the factors of the columns. Rows without entries have 0."""
    size = factors.shape[1]
    solutions = np.zeros((num, size))
    for place, column, value in groups:
        solutions[place] = fold_in(factors[column], value, ridge * np.eye(size), np.zeros(size))
    return solutions


def factor_scores(
    offsets: Offsets, factors: np.ndarray, new: NewUsers, offset_ridge: float, factor_ridge: float, center: float
) -> Linear:
    """Folds new users in: an offset and factors from the first ratings, in one ridge regression."""
    design = np.concatenate([np.ones((len(factors), 1)), factors], axis=1)
    ridge = np.diag(np.r_[offset_ridge, np.full(factors.shape[1], factor_ridge)])
    residual = new.rating - offsets.base[new.item]
    return Linear(offsets.base, fold_in(design[new.item], residual, ridge, center * np.eye(len(ridge))[0]), design)


# ---- Bayesian matrix factorization -----------------------------------------------------------------------------------


class GibbsSample(NamedTuple):
    """A sample of the posterior: item factors [I, F], the prior of users (mean [F], precision [F, F]), noise."""

    item: np.ndarray
    user_mean: np.ndarray
    user_precision: np.ndarray
    noise_precision: float


def gibbs(
    residuals: scipy.sparse.csr_array, num_factors: int, *, sweeps: int = 60, burn_in: int = 25, seed: int = 0
) -> Iterator[GibbsSample]:
    """Samples the posterior of Bayesian probabilistic matrix factorization (Salakhutdinov & Mnih, ICML 2008).

    r_ui − base_i ~ N(p_u·q_i, 1/α), p_u ~ N(μ_p, Λ_p⁻¹), q_i ~ N(μ_q, Λ_q⁻¹), with Normal-Wishart priors of (μ, Λ), and
    α ~ Gamma(2, rate 2). The means of the priors act as offsets. `residuals` [V, I] are the ratings minus base.
    """
    rng = np.random.default_rng(seed)
    by_user, by_item = rows_by_length(residuals), rows_by_length(residuals.T.tocsr())
    user, item = (0.3 * rng.normal(size=(size, num_factors)) for size in residuals.shape)
    item[:, 0] += 1.0  # the first factor begins as the offset of users
    present = np.diff(residuals.indptr) > 0  # users without ratings have no part in the prior
    noise_precision = 0.5
    for sweep in range(sweeps):
        user_prior = sample_prior(rng, user[present])
        user = sample_factors(rng, by_user, len(user), item, user_prior, noise_precision)
        item = sample_factors(rng, by_item, len(item), user, sample_prior(rng, item), noise_precision)
        squares = sum(
            ((value - (item[column] @ user[place][..., None])[..., 0]) ** 2).sum() for place, column, value in by_user
        )
        noise_precision = rng.gamma(2 + residuals.nnz / 2, 1 / (2 + squares / 2))
        if sweep >= burn_in:
            yield GibbsSample(item, *user_prior, noise_precision)


def gibbs_samples(train: Ratings, offsets: Offsets, num_factors: int, sweeps: int) -> list[GibbsSample]:
    """Returns the samples of the second half of the sweeps; factors explain the residuals of the items' offsets."""
    residuals = residual_matrix(train, offsets._replace(user=np.zeros_like(offsets.user)))
    return list(gibbs(residuals, num_factors, sweeps=sweeps, burn_in=sweeps // 2))


def sample_prior(rng: np.random.Generator, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples mean and precision of factors [N, F] from their posterior, with a Normal-Wishart(0, 2, I, F) prior."""
    num, size = factors.shape
    mean = factors.mean(0)
    centered = factors - mean
    scale = np.linalg.inv(np.eye(size) + centered.T @ centered + 2 * num / (2 + num) * np.outer(mean, mean))
    # Bartlett's decomposition of a Wishart matrix with num + F degrees of freedom
    lower = np.tril(rng.normal(size=(size, size)), -1) + np.diag(np.sqrt(rng.chisquare(num + size - np.arange(size))))
    root = np.linalg.cholesky(scale) @ lower
    precision = root @ root.T
    noise = np.linalg.solve(np.linalg.cholesky((2 + num) * precision).T, rng.normal(size=size))
    return num * mean / (2 + num) + noise, precision


def sample_factors(rng, groups: list[Rows], num: int, factors: np.ndarray, prior, noise_precision: float):
    """Samples the factors of `num` rows from their posterior, given those of the columns.

    A draw p of the prior and a draw ε of the noise become a draw of the posterior, if the fold-in moves p to the
    ratings plus ε (Matheron's rule).
    """
    mean, precision = prior
    draws = mean + rng.normal(size=(num, len(mean))) @ np.linalg.inv(np.linalg.cholesky(precision))
    for place, column, value in groups:
        noisy = value + rng.normal(size=value.shape) / noise_precision**0.5
        draws[place] = fold_in(factors[column], noisy, precision / noise_precision, draws[place])
    return draws


def gibbs_scores(samples: list[GibbsSample], base: np.ndarray, new: NewUsers) -> Linear:
    """Returns the mean prediction over samples; in each, a new user's factors are their posterior mean."""
    residual = new.rating - base[new.item]
    weights = [
        fold_in(item[new.item], residual, precision / noise_precision, user_mean)
        for item, user_mean, precision, noise_precision in samples
    ]
    design = np.concatenate([sample.item for sample in samples], axis=1) / len(samples)
    return Linear(base, np.concatenate(weights, axis=1), design)
