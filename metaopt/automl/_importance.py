"""Permutation importance of the columns that a fitted estimator reads."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from metaopt import _logs, _progress


def permutation_importance(
    estimator: Any,
    X: Any,
    y: Any,
    names: Sequence[Any],
    used: Collection[int],
    *,
    n_repeats: int,
    scoring: Any,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffles one column at a time. For columns in use, the result is that of scikit-learn's `permutation_importance`.

    Args:
      estimator: fitted; `verbose` says whether progress is reported.
      X: a frame, or anything that scikit-learn reads as an array.
      y: [n] targets.
      names: [d] the columns of `fit`. If X is a frame, its columns are found by these names.
      used: positions in `names` of the columns that predictions depend on.
      n_repeats: the number of shuffles of each column.
      scoring: a scorer's name, as for `sklearn.metrics.check_scoring`.
      seed: the seed of the shuffles, which are the same for all columns.

    Returns:
      [d] means and [d] standard deviations of the fall of the score; 0 for other columns.
    """
    from sklearn.metrics import check_scoring
    from sklearn.utils import check_array, check_random_state

    is_frame = hasattr(X, "iloc") or hasattr(X, "get_column")  # of pandas or polars
    if not is_frame:
        check: Any = check_array  # scikit-learn's stubs know fewer values of its arguments
        X = check(X, ensure_all_finite="allow-nan", dtype=None)
    scorer: Any = check_scoring(estimator, scoring=scoring)
    shuffle_seed = check_random_state(seed).randint(np.iinfo(np.int32).max + 1)
    by_name = is_frame and isinstance(names[0], str) and len(set(names)) == len(names)
    falls = np.zeros((len(names), n_repeats))
    total = len(used) * n_repeats
    with _progress.report_progress(total, estimator.verbose, "shuffling {column}", unit="score", column="") as report:
        baseline = scorer(estimator, X, y)
        for done, place in enumerate(sorted(used)):
            random = check_random_state(shuffle_seed)
            column = list(X.columns).index(names[place]) if by_name else place
            shuffled, order = X.clone() if hasattr(X, "clone") else X.copy(), np.arange(len(X))
            for i in range(n_repeats):
                random.shuffle(order)
                shuffled = _with_shuffled(shuffled, column, order)
                with _logs.hold_back():  # a shuffled column has the warnings that `baseline` has logged
                    falls[place, i] = baseline - scorer(estimator, shuffled, y)
                report(done * n_repeats + i + 1, column=names[place])
    return falls.mean(axis=1), falls.std(axis=1)


def _with_shuffled(X: Any, column: int, order: np.ndarray) -> Any:
    if hasattr(X, "iloc"):
        values = X.iloc[order, column]
        values.index = X.index
        X[X.columns[column]] = values
    elif hasattr(X, "get_column"):
        X = X.with_columns(X.get_column(X.columns[column])[order])
    else:
        X[:, column] = X[order, column]
    return X
