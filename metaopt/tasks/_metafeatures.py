"""Meta-features: a few dozen numbers that describe a classification table, for a predictor of λ.

The names are from Rivolli et al., "Meta-features for meta-learning", Knowledge-Based Systems 2022,
https://doi.org/10.1016/j.knosys.2021.108101, as in pymfe. A feature with many values (one per column, pair, class or
fold) is summarized by its mean and its standard deviation (n - 1): "skewness.mean", "skewness.sd". A feature that is
undefined for a table (such as the skewness without numeric columns) is NaN. `FeatureScaling.transform` replaces it by
the median.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt import _checks, _extras
from metaopt.tasks._labeled_frame import labeled_frame
from metaopt.tasks._log_loss_features import log_loss_features
from metaopt.tasks._prepare import PreparedTable, encode
from metaopt.tasks._tables import Table

GROUPS = ("simple", "statistical", "information_theoretic", "landmarking")  # by default
_ALL_GROUPS = (*GROUPS, "log_loss")
_MAX_ROWS = 1000  # for features whose cost grows faster than the rows: concentrations of pairs, landmarkers
_MAX_LEVELS = 1000  # over all columns, for the concentrations of pairs
_NUM_FOLDS = 5


def metafeatures(
    table: Any,
    target: Any = None,
    *,
    groups: Sequence[str] = GROUPS,
    seed: int = 0,
) -> dict[str, float]:
    """Describes a table by numbers.

    Only the groups "landmarking" and "log_loss" depend on the order of rows and columns, since they use random folds.

    Let n be the rows, d the columns, K the classes. Missing values count as the median of the column, or as one more
    category.

    - simple: `attr_to_inst` d/n, `inst_to_attr` n/d, `nr_attr` d, `nr_num`, `nr_cat`, `nr_bin` (columns of two values),
      `cat_to_num`, `num_to_cat`, `nr_inst` n, `nr_class` K, `freq_class` (shares of the classes).
    - statistical, of the numeric columns: `mean`, `median`, `t_mean` (without 20 % on each side), `min`, `max`,
      `range`, `sd`, `var`, `iq_range`, `mad` (1.4826 times the median distance from the median), `skewness` m₃/s³,
      `kurtosis` m₄/s⁴ - 3, `sparsity` (n / distinct values - 1)/(n - 1); `cor`, `cov` (absolute, over pairs),
      `nr_cor_attr` (share of pairs correlated above .5), `eigenvalues` of the covariance; `nr_outliers` (columns with
      values over 1.5 interquartile ranges from the quartiles); `gravity` (distance between the means of the most and
      the least frequent class); `can_cor` ρ (canonical correlations with the classes) and its tests `p_trace` Σρ²,
      `lh_trace` Σρ²/(1 - ρ²), `roy_root` max ρ²/(1 - ρ²), `w_lambda` Π(1 - ρ²), with ρ² at most 1 - 10⁻⁶.
    - information_theoretic, in bits, numeric columns cut into max(2, ⌊n^⅓⌋) bins of equal frequency: `attr_ent` H(x),
      `class_ent` H(y), `joint_ent` H(x, y), `mut_inf` I(x; y), `eq_num_attr` H(y)/mean I, `ns_ratio` (mean H(x) - mean
      I)/mean I; `attr_conc`, `class_conc`: Goodman and Kruskal's τ between columns, and of a column for the class.
    - landmarking: accuracies over 5 stratified folds of at most 1000 rows: `best_node`, `random_node`, `worst_node`
      (decision stumps on the best column, a random one, the one of least mutual information), `one_nn`, `elite_nn`
      (1-NN on all standardized columns; on the one of most mutual information), `linear_discr`, `naive_bayes`.
    - log_loss (not by default), of the D columns that `prepare` encodes: the log loss L over 3 stratified folds of at
      most 600 rows, in nats, with probabilities of at least 10⁻⁴. `log_loss.prior` is L of the class shares, smoothed
      by ½ per class. The other learners give gains, 1 - L / max(L of the prior, .02), within [-2, 1]:
      `log_loss.ridge_strong`, `log_loss.ridge_medium`, `log_loss.ridge_weak` (logistic regression with the penalty
      |w|²/2C, C = .003, .1, 3) and `log_loss.neighbors` (15-NN, (15 p + 2 shares)/17). Differences between gains:
      `log_loss.medium_gain` (medium - strong), `log_loss.weak_gain` (weak - medium), `log_loss.neighbors_gain`
      (neighbors - best ridge). `log_loss.best` is the largest gain. Sizes: `log_loss.log_columns` log D,
      `log_loss.log_rows` log n, `log_loss.log_minority` (log of the rows of the rarest class),
      `log_loss.log_rows_per_column` log n/D. If the training rows of a fold have one class, its losses are the prior's.

    Args:
      table: a `PreparedTable`, of which only the training rows are used; a `Table`; or (x [n, d], y [n], categorical
        [d]). With `target`, a frame, of which all rows with a label are used.
      target: a column of the frame or its labels, as for `prepare`.
      groups: some of "simple", "statistical", "information_theoretic", "landmarking" and "log_loss"; by default, all
        but the last.
      seed: the seed of subsamples, folds and the random column.

    Returns:
      One float per name. The names depend only on `groups`.

    Raises:
      ValueError: if a group is unknown, or there are fewer than 2 rows or no columns.
      ValueError: if the arrays do not fit together, or have infinite values, or `prepare` would reject the frame.
      ImportError: if `groups` has "landmarking" or "log_loss" and scikit-learn is not installed.
    """
    unknown = set(groups) - set(_ALL_GROUPS)
    if unknown:
        raise ValueError(f"`groups` must be among {_ALL_GROUPS}; got {sorted(unknown)}.")
    if target is not None:
        frame = labeled_frame(table, target)
        table = frame.x, frame.y, frame.encoder.categorical
    raw, y, categorical = _checked(table)
    x = _without_gaps(raw, categorical)
    rng = np.random.default_rng(seed)
    values: dict[str, float] = {}
    if "simple" in groups:
        values |= _simple(x, y, categorical)
    if "statistical" in groups:
        values |= _statistical(x[:, ~categorical], y)
    if "information_theoretic" in groups:
        values |= _information(_discretize(x, categorical), y, rng)
    if "landmarking" in groups:
        values |= _landmarking(x, y, categorical, rng)
    if "log_loss" in groups:
        encoded = table.train.x if isinstance(table, PreparedTable) else encode(raw, y, categorical)
        values |= log_loss_features(encoded, y, seed)
    return {name: float(value) if np.isfinite(value) else math.nan for name, value in values.items()}


def image_features(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Describes the images of a task by simple statistics, for a predictor of λ (g) or of architectures (h).

    It trains no learner. For parts a and b of the images x, which are centered by subtracting their mean image,

        between(a, b) = mean(a · b) / mean(x²).

    Args:
      images: [N, height, width, channels] of training rows, standardized; channels are averaged.
      labels: [N] integers, from 0.

    Returns:
      A dict of floats. "rows" and "classes" are logarithms of their numbers. "between neighboring pixels" (of a row)
      and "between opposite halves" (left and mirrored right) are defined above. They are NaN if all images are equal,
      or one pixel wide. "ink" is the share of values above 0. "in the class means" is the variance between class means
      over the variance of the images, each averaged over pixels. `fit_scaling` brings these numbers to one scale.

    Raises:
      ValueError: if `images` is not [N, height, width, channels], or a label is negative.

    >>> import numpy as np
    >>> from metaopt import tasks
    >>> # bright to the left, and to the right
    >>> bars = np.array([[[1.0, -1.0]] * 2, [[-1.0, 1.0]] * 2])[..., None]
    >>> features = tasks.image_features(bars, np.array([0, 1]))
    >>> features["between opposite halves"], features["ink"]
    (-1.0, 0.5)
    """
    if np.ndim(images) != 4:
        raise ValueError(
            f"`images` must be [N, height, width, channels]; got shape {np.shape(images)}. Gray images need an axis "
            "for their channel, `images[..., None]`."
        )
    _checks.check_labels("`labels`", labels, int(np.max(labels)) + 1)
    x, half = np.asarray(images).mean(-1), np.shape(images)[2] // 2
    centered = x - x.mean(0)
    power = float((centered**2).mean())
    class_means = np.stack([x[labels == c].mean(0) for c in np.unique(labels)])
    mean = lambda products: float(products.mean()) if products.size else math.nan  # images of width 1 have no products
    return {
        "rows": math.log(len(x)),
        "classes": math.log(int(np.max(labels)) + 1),
        "between neighboring pixels": _ratio(mean(centered[:, :, 1:] * centered[:, :, :-1]), power),
        "between opposite halves": _ratio(mean(centered[:, :, :half] * centered[:, :, ::-1][:, :, :half]), power),
        "ink": float((x > 0).mean()),
        "in the class means": float(class_means.var(0).mean() / (x.var(0).mean() + 1e-6)),
    }


def _checked(table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x [n, d] in float64 with NaN in the gaps, y [n] in {0, …, K − 1} and `categorical` [d]."""
    if isinstance(table, PreparedTable):
        x, y, categorical = table.train.raw, table.train.y, table.categorical
    elif isinstance(table, Table):
        x, y, categorical = table.x, table.y, table.categorical
    else:
        x, y, categorical = table
    x, categorical = np.array(x, np.float64), np.asarray(categorical, bool)
    y = np.unique(np.asarray(y), return_inverse=True)[1]
    if x.ndim != 2 or len(x) < 2 or not x.shape[1] or categorical.shape != x.shape[1:] or y.shape != x.shape[:1]:
        raise ValueError(
            "meta-features need x [rows, columns], y [rows] and `categorical` [columns], at least 2 rows and 1 column; "
            f"got {x.shape}, {y.shape} and {categorical.shape}."
        )
    if np.isinf(x).any():
        raise ValueError("meta-features need finite values; missing ones are NaN.")
    return x, y, categorical


def _without_gaps(x: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    """Fills gaps with the median of the column, or with -1 in categorical columns."""
    x = x.copy()
    for j in range(x.shape[1]):
        gaps = np.isnan(x[:, j])
        if gaps.any():
            x[gaps, j] = -1.0 if categorical[j] or gaps.all() else np.median(x[~gaps, j])
    return x


def _summary(name: str, values) -> dict[str, float]:
    values = np.asarray(values, np.float64).ravel()
    values = values[np.isfinite(values)]
    mean = values.mean() if len(values) else math.nan
    sd = values.std(ddof=1) if len(values) > 1 else math.nan
    return {f"{name}.mean": float(mean), f"{name}.sd": float(sd)}


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _simple(x: np.ndarray, y: np.ndarray, categorical: np.ndarray) -> dict[str, float]:
    num_rows, num_columns = x.shape
    num_categorical = int(categorical.sum())
    num_numeric = num_columns - num_categorical
    return {
        "attr_to_inst": num_columns / num_rows,
        "inst_to_attr": num_rows / num_columns,
        "nr_attr": num_columns,
        "nr_num": num_numeric,
        "nr_cat": num_categorical,
        "nr_bin": sum(len(np.unique(column)) == 2 for column in x.T),
        "cat_to_num": _ratio(num_categorical, num_numeric),
        "num_to_cat": _ratio(num_numeric, num_categorical),
        "nr_inst": num_rows,
        "nr_class": int(y.max()) + 1,
        **_summary("freq_class", np.bincount(y) / num_rows),
    }


def _statistical(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    num_rows, num_columns = x.shape
    ordered = np.sort(x, axis=0)
    centered = x - x.mean(axis=0)
    sd = x.std(axis=0, ddof=1)
    sd = np.where(sd > 1e-12 * np.abs(x).max(axis=0, initial=0.0), sd, 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = centered / sd  # NaN if a column is constant
        skewness, kurtosis = (scaled**3).mean(axis=0), (scaled**4).mean(axis=0) - 3.0
        if num_columns:
            q1, median, q3 = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
        else:
            q1 = median = q3 = np.zeros(0)
        cut = int(0.2 * num_rows)
        distinct = 1 + (np.diff(ordered, axis=0) > 0).sum(axis=0)
        outliers = (ordered[0] < q1 - 1.5 * (q3 - q1)) | (ordered[-1] > q3 + 1.5 * (q3 - q1))
        cov = centered.T @ centered / (num_rows - 1)
        pairs = np.tril_indices(num_columns, -1)
        cor = np.abs((cov / sd[:, None] / sd)[pairs])
        cor = cor[np.isfinite(cor)]
    values = {
        "mean": x.mean(axis=0),
        "median": median,
        "t_mean": ordered[cut : num_rows - cut].mean(axis=0),
        "min": ordered[0],
        "max": ordered[-1],
        "range": ordered[-1] - ordered[0],
        "sd": sd,
        "var": sd**2,
        "iq_range": q3 - q1,
        "mad": 1.4826 * np.median(np.abs(x - median), axis=0) if num_columns else median,
        "skewness": skewness,
        "kurtosis": kurtosis,
        "sparsity": (num_rows / distinct - 1.0) / (num_rows - 1),
        "cor": cor,
        "cov": np.abs(cov[pairs]),
        "eigenvalues": np.linalg.eigvalsh(cov) if num_columns else sd,
    }
    counts = np.bincount(y)
    least = len(counts) - 1 - np.argmin(counts[::-1])  # not the most frequent class, even if all are equally frequent
    centers = [x[y == k].mean(axis=0) for k in (np.argmax(counts), least)]
    squared = _canonical_correlations(centered, sd, y) ** 2
    eigenvalues = squared / (1.0 - squared)
    has_correlations = len(squared) > 0
    return {
        **{key: value for name, v in values.items() for key, value in _summary(name, v).items()},
        **_summary("can_cor", np.sqrt(squared)),
        "nr_cor_attr": float((cor > 0.5).mean()) if len(cor) else math.nan,
        "nr_outliers": float(outliers.sum()) if num_columns else math.nan,
        "gravity": float(np.linalg.norm(centers[0] - centers[1])) if num_columns else math.nan,
        "p_trace": float(squared.sum()) if has_correlations else math.nan,
        "lh_trace": float(eigenvalues.sum()) if has_correlations else math.nan,
        "roy_root": float(eigenvalues.max()) if has_correlations else math.nan,
        "w_lambda": float(np.prod(1.0 - squared)) if has_correlations else math.nan,
    }


def _canonical_correlations(centered: np.ndarray, sd: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The min(d, K - 1) cosines of the angles between the span of the columns and the span of the class indicators.

    Divided by √count, the class indicators are orthonormal. Centered columns are orthogonal to the sum of the
    indicators, so that at most K - 1 cosines are not 0.
    """
    scaled = centered[:, sd > 0] / sd[sd > 0]
    if not scaled.shape[1]:
        return np.zeros(0)
    eigenvalues, vectors = np.linalg.eigh(scaled.T @ scaled)
    spans = eigenvalues > 1e-10 * eigenvalues[-1]
    whitened = vectors[:, spans] / np.sqrt(eigenvalues[spans])
    indicators = np.eye(y.max() + 1)[y]
    projected = whitened.T @ (scaled.T @ indicators) / np.sqrt(indicators.sum(axis=0))
    cosines = np.linalg.svd(projected, compute_uv=False)
    return np.minimum(cosines[: y.max()], math.sqrt(1.0 - 1e-6))


def _discretize(x: np.ndarray, categorical: np.ndarray) -> list[np.ndarray]:
    """Codes 0, 1, 2 ... of every column. Numeric columns with many values are cut into bins of equal frequency."""
    num_bins = max(2, int(len(x) ** (1 / 3) + 1e-9))
    codes = []
    for column, is_categorical in zip(x.T, categorical, strict=True):
        if not is_categorical:
            edges = np.unique(np.quantile(column, np.arange(1, num_bins) / num_bins))
            if len(np.unique(column)) > num_bins:
                column = np.searchsorted(edges, column, side="right")
        codes.append(np.unique(column, return_inverse=True)[1])
    return codes


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _mutual_information(code: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """H(x), H(x, y) and I(x; y)."""
    width = y.max() + 1
    joint = np.bincount(code * width + y, minlength=(code.max() + 1) * width).reshape(-1, width)
    entropy, joint_entropy = _entropy(joint.sum(axis=1)), _entropy(joint.ravel())
    return entropy, joint_entropy, max(entropy + _entropy(joint.sum(axis=0)) - joint_entropy, 0.0)


def _information(codes: list[np.ndarray], y: np.ndarray, rng) -> dict[str, float]:
    entropy, joint_entropy, mutual = np.array([_mutual_information(code, y) for code in codes]).T
    class_entropy, mean = _entropy(np.bincount(y)), mutual.mean()
    rows = rng.choice(len(y), _MAX_ROWS, replace=False) if len(y) > _MAX_ROWS else np.arange(len(y))
    order = rng.permutation(len(codes)) if sum(code.max() + 1 for code in codes) > _MAX_LEVELS else range(len(codes))
    chosen_codes, width = [], 0
    for j in order:
        width += codes[j].max() + 1
        if width <= _MAX_LEVELS or len(chosen_codes) < 2:
            chosen_codes.append(codes[j][rows])
    between = _concentration(chosen_codes, chosen_codes)
    np.fill_diagonal(between, np.nan)
    return {
        "class_ent": class_entropy,
        "eq_num_attr": _ratio(class_entropy, mean),
        "ns_ratio": _ratio(entropy.mean() - mean, mean),
        **_summary("attr_ent", entropy),
        **_summary("joint_ent", joint_entropy),
        **_summary("mut_inf", mutual),
        **_summary("attr_conc", between),
        **_summary("class_conc", _concentration(codes, [y])),
    }


def _concentration(known: list[np.ndarray], about: list[np.ndarray]) -> np.ndarray:
    """[known, about] τ of `about` given `known`: (Σ_ij p_ij²/p_i - Σ_j p_j²) / (1 - Σ_j p_j²), NaN for a constant."""

    def onehot(codes):
        starts = np.cumsum([0] + [code.max() + 1 for code in codes])
        z = np.zeros((len(codes[0]), starts[-1]), np.float32)
        for code, start in zip(codes, starts, strict=False):
            z[np.arange(len(code)), start + code] = 1.0
        return z, starts[:-1]

    (a, a_starts), (b, b_starts) = onehot(known), onehot(about)
    joint = (a.T @ b).astype(np.float64) / len(a)
    a_share, b_share = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    squares = joint**2 / np.where(a_share > 0, a_share, 1.0)[:, None]
    # Rows of `squares` are the levels of all known columns, its columns those of `about`: sum over each pair's block.
    conditional = np.add.reduceat(np.add.reduceat(squares, a_starts, axis=0), b_starts, axis=1)
    marginal = np.add.reduceat(b_share**2, b_starts)
    varies = 1.0 - marginal > 1e-12
    return np.where(varies, (conditional - marginal) / np.where(varies, 1.0 - marginal, 1.0), np.nan)


def _landmarking(x: np.ndarray, y: np.ndarray, categorical: np.ndarray, rng) -> dict[str, float]:
    _extras.require("sklearn", "examples", 'The group "landmarking" of meta-features')
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier
    from threadpoolctl import threadpool_limits  # scikit-learn needs it too

    shuffled = rng.permutation(len(y))[:_MAX_ROWS]
    shuffled = shuffled[np.argsort(y[shuffled], kind="stable")]
    x, y = x[shuffled], y[shuffled]
    sd = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(sd > 0, sd, 1.0)
    fold = np.arange(len(y)) % min(_NUM_FOLDS, len(y))  # rows are sorted by class: stratified
    stump = DecisionTreeClassifier(max_depth=1, random_state=0)
    one_nn = KNeighborsClassifier(1, algorithm="brute")
    names = ("best_node", "random_node", "worst_node", "one_nn", "elite_nn", "linear_discr", "naive_bayes")
    scores: dict[str, list[float]] = {name: [] for name in names}
    all_columns = slice(None)
    with threadpool_limits(1), warnings.catch_warnings():  # here, threads cost more than they save
        warnings.simplefilter("ignore")  # collinear columns, classes of one row
        for k in range(fold.max() + 1):
            train, test = fold != k, fold == k
            labels = np.unique(y[train], return_inverse=True)[1]
            gains = np.array([_mutual_information(code, labels)[2] for code in _discretize(x[train], categorical)])
            best, worst, random_column = ([int(j)] for j in (gains.argmax(), gains.argmin(), rng.integers(x.shape[1])))
            columns = (all_columns, random_column, worst, all_columns, best, all_columns, all_columns)
            learners = (stump, stump, stump, one_nn, one_nn, LinearDiscriminantAnalysis(), GaussianNB())
            for name, learner, column in zip(names, learners, columns, strict=True):
                try:
                    score = learner.fit(x[train][:, column], y[train]).score(x[test][:, column], y[test])
                except (ValueError, IndexError, np.linalg.LinAlgError):  # one class, few rows, or constant columns
                    score = math.nan
                scores[name].append(float(score))
    return {key: value for name in names for key, value in _summary(name, scores[name]).items()}


class FeatureScaling(NamedTuple):
    """How meta-features become the input of a network; plain values, so that `json` writes `_asdict()`.

    Attributes:
      names: F names, in the order of the input.
      center: the median over tables, after the logarithm if there is one.
      scale: 1/1.349 of the interquartile range, which is the standard deviation of a normal variable.
      log: whether sign(v) log(1 + |v|) is applied first.
    """

    names: Sequence[str]
    center: Sequence[float]
    scale: Sequence[float]
    log: Sequence[bool]

    def transform(
        self, features: Mapping[str, float], *, clip: float | None = None, limit: float | None = None
    ) -> np.ndarray:
        """Brings the meta-features of one table to the scale of the training tables.

        Pass either `clip` or `limit`. A clipped feature hides how far the table is from the training tables. A
        predictor with a `limit` needs this distance. Other models need smaller features, and so `clip`.

        Args:
          features: the meta-features of one table, by name; names that the scaling does not have are ignored.
          clip: the largest absolute value. A usual value is 3, for models without a safeguard against extrapolation.
          limit: the `limit` of the predictor that reads the features (`predictors.mlp`). The largest absolute value is
            then 50 times the limit.

        Returns:
          [F] float32 within ±`clip` or ±50 `limit`, in the order of `names`; a non-finite feature becomes 0, the value
          of the median table.

        Raises:
          ValueError: if neither `clip` nor `limit` is given, or both are, or it is not positive.
          KeyError: if a name is absent.
        """
        bound = clip if limit is None else 50 * limit
        if bound is None or None not in (clip, limit):
            raise ValueError(
                "Pass `limit=` if the features are for a predictor with a `limit`, and otherwise `clip=`, such as "
                f"`clip=3.0`; got clip={clip}, limit={limit}."
            )
        _checks.check_positive("clip" if limit is None else "limit", clip if limit is None else limit)
        values = _values(features, self.names)
        values = np.where(np.asarray(self.log, bool), _log(values), values)
        scaled = (values - np.array(self.center)) / np.array(self.scale)
        return np.where(np.isfinite(scaled), np.clip(scaled, -bound, bound), 0.0).astype(np.float32)


def fit_scaling(features: Iterable[Mapping[str, float]], names: Sequence[str] | None = None) -> FeatureScaling:
    """Fits the scaling of meta-features on the training tables.

    Features with heavy tails get a logarithm, sign(x) log(1 + |x|). A feature has heavy tails if its 1 % and 99 %
    quantiles are more than 5 interquartile ranges apart. For a normal variable, this distance is 3.4.

    Args:
      features: the meta-features of the tables, one dict each.
      names: the features to use, in this order; None takes all features of the first table, except those that are equal
        in all tables.

    Returns:
      The scaling; its `transform` scales the features of one table.

    Raises:
      KeyError: if a table lacks a name.
    """
    features = list(features)
    chosen = list(features[0]) if names is None else list(names)
    table = np.array([_values(f, chosen) for f in features])
    kept, centers, scales, logs = [], [], [], []
    for name, column in zip(chosen, table.T, strict=True):
        column = column[np.isfinite(column)]
        if names is None and (not len(column) or np.ptp(column) == 0):
            continue
        heavy, center, scale = False, 0.0, 1.0
        if len(column):
            low, q1, q3, high = np.quantile(column, (0.01, 0.25, 0.75, 0.99))
            heavy = bool(high - low > 5.0 * (q3 - q1))
            column = _log(column) if heavy else column
            q1, center, q3 = np.quantile(column, (0.25, 0.5, 0.75))
            scale = next((s for s in ((q3 - q1) / 1.349, column.std()) if s > 1e-9 * (1e-9 + abs(center))), 1.0)
        kept.append(name)
        centers.append(float(center))
        scales.append(float(scale))
        logs.append(heavy)
    return FeatureScaling(tuple(kept), tuple(centers), tuple(scales), tuple(logs))


def _log(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def _values(features: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    if absent := [name for name in names if name not in features]:
        raise KeyError(f"the features {', '.join(absent)} are absent; there are {', '.join(features) or 'none'}.")
    return np.array([features[name] for name in names], np.float64)
