"""Shared parts of the scikit-learn estimators for tables: reading a table, and a part of their files."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from metaopt import _logs, tasks
from metaopt.automl import _arguments

_log = logging.getLogger(__name__)


class TableEstimator(BaseEstimator):
    """An estimator for tables with gaps, categories and texts, which its encoder turns into numbers."""

    encoder_: tasks.TableEncoder
    _decimal = "."  # the decimal mark of texts that can be read with either mark

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        return tags

    def _fit_table(self, X) -> np.ndarray:
        """Fits the encoder to a table, and returns [n, d] numbers."""
        X = as_frame(X)
        validate_data(self, X, skip_check_array=True)
        self.encoder_ = tasks.fit_encoder(X, decimal=self._decimal)
        if not self.encoder_.columns:
            _log.warning(
                "No column can be used as a feature, so all predictions are equal. The columns are %s. If the table "
                "comes from a file, was it read with the right delimiter, such as `pandas.read_csv(file, sep=';')`?",
                ", ".join(map(repr, self.encoder_.input_names[:5])),
            )
        self.n_features_in_ = len(self.encoder_.input_names)
        x = self.encoder_.transform(X)
        self.fingerprint_ = _fingerprint(x)
        return x

    def _warn_of_rows_of_fit(self, X) -> None:
        """Warns if X is the whole table of `fit`, in the same order."""
        with _logs.hold_back():  # the prediction logs the warnings about columns
            x = self._read_table(X)
        if _fingerprint(x) == self.fingerprint_:
            _log.warning(
                "These are the rows of `fit`. The models have seen their targets, so the metrics are too good. Pass "
                "other rows, or see `score_`, which is out of fold."
            )

    def _read_table(self, X) -> np.ndarray:
        """Returns the numbers [n, d] of other rows."""
        X = as_frame(X)
        if getattr(X, "ndim", 2) == 1:
            raise ValueError(
                "Expected 2D array, got 1D array instead. Reshape your data: `X.reshape(1, -1)` is one row."
            )
        if not _arguments.has_needed_columns(X, getattr(self, "feature_names_in_", None), self.encoder_):
            validate_data(self, X, reset=False, skip_check_array=True)
        return self.encoder_.transform(X)


def _fingerprint(x: np.ndarray) -> str:
    """Two tables with equal encoded rows, in the same order, have equal fingerprints."""
    return hashlib.sha256(np.ascontiguousarray(x, np.float64).tobytes()).hexdigest()[:16]


def as_frame(X) -> Any:
    """A dict of columns, a list of dicts or polars' lazy frame as a frame, since scikit-learn cannot read them."""
    if hasattr(X, "collect_schema") and hasattr(X, "collect"):
        return X.collect()
    is_rows = isinstance(X, list | tuple) and len(X) and all(isinstance(row, Mapping) for row in X)
    is_columns = isinstance(X, Mapping) and not hasattr(X, "tocsr")  # some sparse arrays are dicts
    return pd.DataFrame(X) if is_rows or is_columns else X


# --- files ---


def encode(estimator: Any, fitted: str) -> dict[str, Any]:
    """The header of a file: arguments, encoder, and names of columns. A random generator is replaced by None.

    Raises:
      ValueError: if the estimator lacks the attribute `fitted`.
    """
    if not hasattr(estimator, fitted):
        raise ValueError(f"This {type(estimator).__name__} is not fitted; call `fit` before you save it.")
    params = {
        key: value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, tuple) else value
        for key, value in estimator.get_params().items()
    }
    params["random_state"] = params["random_state"] if isinstance(params["random_state"], int) else None
    return {
        "params": params,
        "encoder": estimator.encoder_.state(),
        "fingerprint": estimator.fingerprint_,
        "feature_names": list(estimator.feature_names_in_) if hasattr(estimator, "feature_names_in_") else None,
    }


def decode(estimator: Any, header: dict[str, Any]) -> None:
    """Sets the attributes that `encode` wrote. Arguments that are lists become tuples."""
    params = header["params"].items()
    estimator.set_params(**{key: tuple(value) if isinstance(value, list) else value for key, value in params})
    estimator.encoder_ = tasks.TableEncoder.from_state(header["encoder"])
    estimator.n_features_in_ = len(estimator.encoder_.input_names)
    estimator.fingerprint_ = header.get("fingerprint", "")
    names = header["feature_names"]  # the encoder renames equal names
    if names is not None:
        if len(names) != estimator.n_features_in_ or not all(isinstance(name, str) for name in names):
            raise ValueError("its names of columns do not fit its columns")
        estimator.feature_names_in_ = np.array(names, dtype=object)


def odd_rows(estimator: Any) -> np.ndarray:
    """[2, d] rows of zeros and of gaps, by which a loaded estimator is checked."""
    num_columns = len(estimator.encoder_.names)
    return np.stack([np.zeros(num_columns), np.full(num_columns, np.nan)])
