"""How stable a clustering is if the rows are drawn again, and the choice of an algorithm and a number of clusters.

Each candidate (an algorithm with k clusters) clusters several random parts of the rows. The agreement of two such
clusterings is their adjusted Rand index on the shared rows, and the mean over all pairs is the stability s. Random
labels have s = 0 for every k. But two clusters are stable in an elongated table without clusters, too. So each
candidate also clusters a reference table of normal rows with the same covariance. Its stability there is r. Candidates
need s - r of at least `LEAST_GAIN`. Small k are more stable than large ones, so the largest k of the stable candidates
is chosen.

Source: Ben-Hur et al., PSB 2002, for the stability; Dudoit & Fridlyand, Genome Biology 2002, for the reference.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score, pairwise_distances_argmin
from sklearn.mixture import GaussianMixture

ALGORITHMS = ("kmeans", "mixture", "agglomerative", "hdbscan")
NUM_PARTS = 8
SHARE = 0.8  # each part has this share of the rows
SMALLEST_SHARES = (0.02, 0.05, 0.1, 0.2)  # rows in the smallest cluster of HDBSCAN, which finds k itself
DEFAULT_ALGORITHMS = ALGORITHMS[:3]
LEAST_GAIN = 0.15  # s - r
STABLE = 0.95  # s divided by the largest s
_REGULARIZATION = 1e-2  # added to the variances of a mixture; those of the table are about 1


class Clusters(NamedTuple):
    """A fitted clustering: a row gets the label of the nearest point, or of the most probable component.

    Attributes:
      points: [p, q] centroids, means of components, or labelled rows.
      labels: [p] int64, the label of each point.
      factors: [p, q, q] of a mixture, F with F Fᵀ = Σ⁻¹; [0, q, q] if the distances are Euclidean.
      log_weights: [p] of a mixture; [0] otherwise.
    """

    points: np.ndarray
    labels: np.ndarray
    factors: np.ndarray
    log_weights: np.ndarray

    def assign(self, z: np.ndarray) -> np.ndarray:
        """[n] int64, the labels of rows z [n, q]."""
        if len(self.points) == 1:  # there may be no axes
            return np.full(len(z), self.labels[0])
        if not len(self.factors):
            return self.labels[pairwise_distances_argmin(z, self.points)]
        scores = np.empty((len(z), len(self.points)))
        for j, (mean, factor) in enumerate(zip(self.points, self.factors, strict=True)):
            log_density = np.log(np.diag(factor)).sum() - 0.5 * (((z - mean) @ factor) ** 2).sum(axis=1)
            scores[:, j] = self.log_weights[j] + log_density
        return self.labels[scores.argmax(axis=1)]


class Candidate(NamedTuple):
    """An algorithm with the number of clusters, or for HDBSCAN the share of rows in the smallest cluster."""

    algorithm: str
    setting: float


class Measured(NamedTuple):
    """A candidate with the clusters of all rows.

    Attributes:
      candidate: the candidate.
      k: the number of clusters.
      stability: s.
      spread: the standard deviation over parts of their mean agreement with the other parts.
      reference: r.
      seconds: the seconds that all its clusterings took.
      clusters: the clusters of all rows.
    """

    candidate: Candidate
    k: int
    stability: float
    spread: float
    reference: float
    seconds: float
    clusters: Clusters


def candidates(algorithms: tuple[str, ...], max_clusters: int) -> list[Candidate]:
    """All candidates, in the order of the algorithms and of k."""
    counts = range(2, max_clusters + 1)
    settings = lambda algorithm: SMALLEST_SHARES if algorithm == "hdbscan" else counts
    return [Candidate(algorithm, setting) for algorithm in algorithms for setting in settings(algorithm)]


def one_cluster(z: np.ndarray) -> Clusters:
    """A single cluster of all rows."""
    return _nearest(z.mean(axis=0, keepdims=True), np.zeros(1, np.int64))


def largest_first(clusters: Clusters, labels: np.ndarray) -> Clusters:
    """Numbers the clusters by their numbers of rows in `labels` [n], the largest first."""
    sizes = np.bincount(labels, minlength=clusters.labels.max() + 1)
    rank = np.argsort(np.argsort(-sizes, kind="stable"))
    return clusters._replace(labels=rank[clusters.labels])


def measure(candidate: Candidate, z: np.ndarray, reference: np.ndarray, parts: np.ndarray, seed: int) -> Measured:
    """Clusters all rows, and the parts of the rows and of the reference table.

    Args:
      candidate: the algorithm and its setting.
      z: [n, q] the rows.
      reference: [n, q] rows without clusters.
      parts: [R, m] positions of the rows of each part.
      seed: the seed of the algorithm.

    Returns:
      Its stability.
    """
    start = time.perf_counter()
    part_labels = lambda table, i: cluster(candidate, table[parts[i]], seed + i, num_starts=3)[0]
    # OpenMP's limit only holds for the calling thread, so it is set here. Without it, sums could be in another order,
    # which could change a label.
    with threadpoolctl.threadpool_limits(1):
        clusters = cluster(candidate, z, seed, num_starts=10)[1]
        num_clusters = int(clusters.labels.max()) + 1
        agreements = [agreement([part_labels(table, i) for i in range(len(parts))], parts) for table in (z, reference)]
    stability, spread = agreements[0].mean(), agreements[0].std(ddof=1)
    seconds = time.perf_counter() - start
    return Measured(
        candidate, num_clusters, float(stability), float(spread), float(agreements[1].mean()), seconds, clusters
    )


def agreement(labels: list[np.ndarray], parts: np.ndarray) -> np.ndarray:
    """[R] the mean adjusted Rand index of each part with the other parts, on the rows that both have.

    The index of two parts is 0 if a clustering has only one cluster on their shared rows.

    Args:
      labels: R arrays [m].
      parts: [R, m] positions of rows.
    """
    num = len(parts)
    index = np.zeros((num, num))
    for i in range(num):
        for j in range(i):
            _, first, second = np.intersect1d(parts[i], parts[j], assume_unique=True, return_indices=True)
            pair = labels[i][first], labels[j][second]
            if min(map(np.ptp, pair)) > 0:  # the index of two single clusters would be 1
                index[i, j] = index[j, i] = adjusted_rand_score(*pair)
    return index.sum(axis=1) / (num - 1)


def choose(board: list[Measured]) -> Measured | None:
    """The most stable candidate with the largest k among the stable ones, or None for one cluster."""
    above_reference = [m for m in board if m.stability - m.reference >= LEAST_GAIN]
    best = max((m.stability for m in above_reference), default=0.0)
    stable = (m for m in above_reference if m.stability >= STABLE * best)
    return max(stable, key=lambda m: (m.k, m.stability), default=None)


def cluster(candidate: Candidate, z: np.ndarray, seed: int, num_starts: int) -> tuple[np.ndarray, Clusters]:
    """Clusters rows z [n, q] by one algorithm from scikit-learn.

    Args:
      candidate: the algorithm and its setting.
      z: [n, q] the rows.
      seed: the seed of the starts of k-means and the mixture.
      num_starts: the number of starts of k-means; at least 3. A mixture has a third of them.

    Returns:
      The labels [n] 0..k-1, and the clusters for other rows.
    """
    algorithm, setting = candidate
    if algorithm == "kmeans":
        options: dict[str, Any] = {"n_init": num_starts, "random_state": seed}
        model: Any = KMeans(int(setting), **options).fit(z)
        return _compact(model.labels_, _nearest(model.cluster_centers_, np.arange(int(setting))))
    if algorithm == "mixture":
        num = int(setting)
        options = {"n_init": num_starts // 3, "reg_covar": _REGULARIZATION, "random_state": seed}
        model = GaussianMixture(num, **options).fit(z)
        clusters = Clusters(model.means_, np.arange(num), model.precisions_cholesky_, np.log(model.weights_))
        return _compact(model.predict(z), clusters)
    if algorithm == "agglomerative":
        labels = AgglomerativeClustering(int(setting)).fit_predict(z)
    else:
        labels = _density_labels(z, setting)
    return labels, _nearest(z, labels)


def _compact(labels: np.ndarray, clusters: Clusters) -> tuple[np.ndarray, Clusters]:
    """Leaves out centroids and components without rows."""
    kept, labels = np.unique(labels, return_inverse=True)
    parts = {name: value[kept] for name, value in clusters._asdict().items() if len(value)}
    return labels, clusters._replace(**{**parts, "labels": np.arange(len(kept))})


def _density_labels(z: np.ndarray, share: float) -> np.ndarray:
    """Labels by HDBSCAN. A row that it calls noise gets the label of the nearest row of a cluster."""
    smallest = max(2, round(share * len(z)))
    options: dict[str, Any] = {"min_cluster_size": smallest, "min_samples": min(5, len(z)), "copy": True}
    labels = HDBSCAN(**options).fit_predict(z)
    noise = labels < 0
    if noise.all():
        return np.zeros(len(z), np.int64)
    labels[noise] = _nearest(z[~noise], labels[~noise]).assign(z[noise]) if noise.any() else labels[noise]
    return labels


def _nearest(points: np.ndarray, labels: np.ndarray) -> Clusters:
    return Clusters(points, labels.astype(np.int64), np.zeros((0, *2 * points.shape[1:])), np.zeros(0))
