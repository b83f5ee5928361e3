"""`AutoClusterer`: a scikit-learn estimator that chooses an algorithm and a number of clusters for a table."""

import warnings
from typing import Any

import joblib
import numpy as np
import pandas as pd
import threadpoolctl
from sklearn.base import ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from metaopt import _checks, _files, _saving, tasks
from metaopt.automl import _stability, _table_estimator
from metaopt.automl._ensemble_fit import num_jobs
from metaopt.automl._stability import Clusters, Measured
from metaopt.automl._table_estimator import TableEstimator

_MAX_AXES = 20  # principal axes


class AutoClusterer(ClusterMixin, TableEstimator):
    """Clusters the rows of a table, with the algorithm and number of clusters that are stable over random parts.

    Each candidate (an algorithm with k clusters) clusters eight random parts of the rows. Its stability s is the mean
    adjusted Rand index of two parts on their shared rows. In an elongated table without clusters, two clusters are
    stable, too. So s is compared with a reference r, the stability on normally distributed rows with the covariance of
    the table, and only candidates with s - r of at least 0.15 count. Among the candidates with at least 95 % of the
    largest s, `fit` chooses the largest k, with its most stable algorithm. If no candidate counts, all rows are one
    cluster. The stability follows Ben-Hur et al. (PSB 2002); the reference follows Dudoit & Fridlyand (Genome Biology
    2002).

    Clusters need not agree with labels that you have in mind: look at the clusters before you use them. Tables without
    clusters are not always recognized; a uniform square, for example, has four stable quarters.

    Columns may be numbers, categories, booleans, dates or texts, with missing values, as in `AutoClassifier`. Numbers
    get zero mean and unit variance, and are clipped softly to (-3, 3); a category gets a column for each level. At most
    20 principal axes stay. The distances depend on this scaling: leave out columns that should not matter, such as a
    known label.

    Limits. At most `sample_rows` random rows are clustered; the other rows are labeled like new ones. HDBSCAN finds the
    number of clusters itself. It is tried with four minimal cluster sizes, and rows that it marks as noise join the
    nearest cluster.

    Args:
      max_clusters: the largest number of clusters.
      algorithms: some of "kmeans", "mixture" (of normal distributions), "agglomerative" (Ward) and "hdbscan"; None
        compares the first three. The most stable clusters of HDBSCAN are often a few outlying rows and the rest.
      sample_rows: the largest number of rows that are clustered.
      n_jobs: the number of candidates at a time; −1 is one per core.
      random_state: the seed. Equal seeds give equal results.

    Attributes:
      labels_: [n] the cluster of each row, 0..k-1. Cluster 0 is the largest.
      n_clusters_: k.
      algorithm_: the algorithm of the chosen candidate, or None if there is one cluster.
      leaderboard_: a frame of the candidates by decreasing s: algorithm, k, stability s, its spread over the parts,
        reference r, seconds, and whether it was chosen.
      encoder_: a `tasks.TableEncoder`; its `notes` list the columns that were dropped or changed.

    Example:
      >>> from sklearn.datasets import make_blobs
      >>> from metaopt import automl
      >>> X, y = make_blobs(120, centers=3, random_state=0, cluster_std=0.5)
      >>> model = automl.AutoClusterer(
      ...     max_clusters=5, algorithms=("kmeans", "agglomerative")
      ... ).fit(X)
      >>> model.n_clusters_, model.predict(X[:4]).shape
      (3, (4,))
    """

    clusters_: Clusters

    def __init__(
        self,
        max_clusters: int = 10,
        *,
        algorithms: tuple[str, ...] | None = None,
        sample_rows: int = 1000,
        n_jobs: int | None = -1,
        random_state: Any = 0,
    ):
        self.max_clusters = max_clusters
        self.algorithms = algorithms
        self.sample_rows = sample_rows
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X, y=None):
        """Chooses the clusters.

        Args:
          X: [n, d] a pandas or polars frame, an array, a dict of columns or a list of dicts.
          y: ignored.

        Returns:
          The estimator.

        Raises:
          ValueError: if there are fewer than two rows, or an argument is invalid.
        """
        algorithms = self._check()
        rng = check_random_state(self.random_state)
        vars(self).pop("clusters_", None)  # if this fit fails, no older clusters may remain with the new encoder
        x = self._fit_table(X)
        if len(x) < 2:
            raise ValueError("The table has n_samples = 1 row: at least two are needed to find clusters.")
        self.columns_ = tasks.fit_columns(x, self.encoder_.categorical, scaling="standard")
        sample = np.sort(rng.permutation(len(x))[: self.sample_rows])
        scaled = self.columns_.transform(x[sample]).astype(np.float64)
        self.center_, self.axes_ = scaled.mean(axis=0), _principal_axes(scaled)
        z = (scaled - self.center_) @ self.axes_
        board = measure_all(z, algorithms, self.max_clusters, rng, num_jobs(self.n_jobs))
        best = _stability.choose(board)
        self.algorithm_ = None if best is None else best.candidate.algorithm
        self.leaderboard_ = _leaderboard(board, best)
        clusters = _stability.one_cluster(z) if best is None else best.clusters
        every_row = self._axes_of(x)
        self.clusters_ = _stability.largest_first(clusters, clusters.assign(every_row))
        self.labels_ = self.clusters_.assign(every_row)
        self.n_clusters_ = int(self.clusters_.labels.max()) + 1
        return self

    def predict(self, X) -> np.ndarray:
        """Returns the cluster of each row: that of the nearest centroid or clustered row, or the likeliest component.

        Args:
          X: [n, d] rows with the columns of `fit`.

        Returns:
          [n] 0..k-1.

        Raises:
          ValueError: if the columns are not those of `fit`.
        """
        check_is_fitted(self, "clusters_")
        return self.clusters_.assign(self._axes_of(self._read_table(X)))

    def _axes_of(self, x: np.ndarray) -> np.ndarray:
        """[n, q] the rows x [n, d] of the encoder in principal axes."""
        return (self.columns_.transform(x).astype(np.float64) - self.center_) @ self.axes_

    def _check(self) -> tuple[str, ...]:
        _checks.check_integer("max_clusters", self.max_clusters, 1)
        _checks.check_integer("sample_rows", self.sample_rows, 2)
        algorithms = _stability.DEFAULT_ALGORITHMS if self.algorithms is None else self.algorithms
        algorithms = (algorithms,) if isinstance(algorithms, str) else tuple(algorithms)
        if not algorithms or not set(algorithms) <= set(_stability.ALGORITHMS):
            known = ", ".join(_stability.ALGORITHMS)
            raise ValueError(f"`algorithms` must be one or more of {known}; got {self.algorithms!r}.")
        return algorithms


def measure_all(
    z: np.ndarray, algorithms: tuple[str, ...], max_clusters: int, rng: np.random.RandomState, n_jobs: int
) -> list[Measured]:
    """The stability of all candidates on rows z [n, q] in principal axes.

    Candidates that find one cluster, or more than `max_clusters`, are left out.
    """
    num_distinct = len(np.unique(z.round(6), axis=0))
    size = round(_stability.SHARE * len(z))
    max_clusters = min(max_clusters, num_distinct, size // 2)
    if max_clusters < 2:
        return []
    reference = rng.normal(size=z.shape) * z.std(axis=0)  # the axes are uncorrelated
    parts = np.stack([rng.permutation(len(z))[:size] for _ in range(_stability.NUM_PARTS)])
    seed = int(rng.randint(2**31 - 100))
    jobs = [
        joblib.delayed(_stability.measure)(candidate, z, reference, parts, seed)
        for candidate in _stability.candidates(algorithms, max_clusters)
    ]
    # BLAS has one limit for the whole process. If each thread only set its own, the first one to finish would lift the
    # limit for the others.
    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about convergence, and fewer different rows than clusters
        board: Any = joblib.Parallel(n_jobs, prefer="threads")(jobs)
    return [measured for measured in board if 2 <= measured.k <= max_clusters]


def _principal_axes(scaled: np.ndarray) -> np.ndarray:
    """[D, q] the principal axes with the largest variances."""
    _, _, axes = np.linalg.svd(scaled - scaled.mean(axis=0), full_matrices=False)
    return axes[:_MAX_AXES].T


def _leaderboard(board: list[Measured], best: Measured | None) -> pd.DataFrame:
    names = ["algorithm", "k", "stability", "spread", "reference", "seconds", "chosen"]
    ordered = sorted(board, key=lambda m: -m.stability)
    rows = [(m.candidate.algorithm, m.k, m.stability, m.spread, m.reference, m.seconds, m is best) for m in ordered]
    return pd.DataFrame(rows, columns=names)


# --- files ---


def _encode(estimator: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    header = _table_estimator.encode(estimator, "clusters_")
    header |= {"algorithm": estimator.algorithm_, "leaderboard": estimator.leaderboard_.to_dict("list")}
    arrays = {"labels": estimator.labels_, "center": estimator.center_, "axes": estimator.axes_}
    arrays |= {f"columns.{name}": value for name, value in estimator.columns_._asdict().items()}
    arrays |= {f"clusters.{name}": value for name, value in estimator.clusters_._asdict().items()}
    return header, arrays


def _decode(header: dict[str, Any], file: _files.Npz) -> Any:
    estimator: Any = AutoClusterer()
    _table_estimator.decode(estimator, header)
    estimator.columns_ = tasks.FittedColumns(**{name: file[f"columns.{name}"] for name in tasks.FittedColumns._fields})
    estimator.clusters_ = Clusters(**{name: file[f"clusters.{name}"] for name in Clusters._fields})
    estimator.labels_, estimator.center_, estimator.axes_ = (file[name] for name in ("labels", "center", "axes"))
    estimator.algorithm_ = header["algorithm"]
    estimator.leaderboard_ = pd.DataFrame(header["leaderboard"])
    _check_loaded(estimator)
    estimator.n_clusters_ = int(estimator.clusters_.labels.max()) + 1
    return estimator


def _check_loaded(estimator: AutoClusterer) -> None:
    """Raises ValueError unless the parts fit each other."""
    clusters, labels = estimator.clusters_, estimator.labels_
    num_points, num_axes = clusters.points.shape
    num_factors = num_points if len(clusters.factors) else 0
    shapes = {
        (num_points,): clusters.labels.shape,
        (num_factors, num_axes, num_axes): clusters.factors.shape,
        (num_factors, 0): (*clusters.log_weights.shape, 0),
        (*estimator.center_.shape, num_axes): estimator.axes_.shape,
        (len(labels),): labels.shape,
    }
    floats = (clusters.points, clusters.factors, clusters.log_weights, estimator.center_, estimator.axes_)
    holds = all(expected == shape for expected, shape in shapes.items()) and num_points > 0
    holds = holds and all(x.dtype == np.float64 and np.isfinite(x).all() for x in floats)
    holds = holds and labels.dtype == clusters.labels.dtype == np.int64 and clusters.labels.min() == 0
    holds = holds and 0 <= labels.min(initial=0) <= labels.max(initial=0) <= clusters.labels.max() < num_points
    holds = holds and estimator.algorithm_ in (None, *_stability.ALGORITHMS)
    if not holds:
        raise ValueError("its labels, axes and clusters do not fit each other")
    try:
        estimator.clusters_.assign(estimator._axes_of(_table_estimator.odd_rows(estimator)))
    except Exception as error:  # wrong fields of the columns raise errors of many types
        raise ValueError(f"its columns do not fit its axes: {error}") from error


_saving.register(_saving.Kind("auto_clusterer", AutoClusterer, _encode, _decode, compress=True))
