"""Expected seconds of a fit, corrected by the fits that this machine has finished."""

import math
from typing import Any

import numpy as np

# Seconds of one fit of 1,000 rows, 10 columns and 2 classes on one core, and exponents of rows, columns and classes:
# seconds = a (n / 1000)^p (d / 10)^q (C / 2)^r + b. Measured by `experiments/automl/fit_seconds.py`.
_SECONDS = {
    "linear": (0.02, 1.0, 1.0, 1.0, 0.01),
    "extra_trees": (0.15, 1.0, 0.9, 0.3, 0.19),
    "random_forest": (0.27, 1.1, 0.5, 0.6, 0.18),
    "hist_gradient_boosting": (0.55, 0.7, 0.7, 1.1, 0.10),
    "lightgbm": (0.55, 1.2, 0.6, 1.5, 0.01),
    "gaussian_process": (0.6, 0.7, 0.7, 0.0, 0.1),
    "catboost": (1.5, 0.7, 0.8, 1.1, 0.05),
    "xgboost": (1.2, 0.7, 0.8, 1.1, 0.01),
}
NETWORK_COMPILE = 12.0  # seconds for a new shape; less if JAX's cache has the program
REFINED_COMPILE = 35.0  # the same for hypergradients
_RUNS_OF_A_STEP = 5  # training runs that a hypergradient step costs
_NETWORK_STEP = 2e-4  # seconds of a step of one fold
_HANG_FACTOR, _HANG_SECONDS = 20.0, 30.0  # a fit is taken to hang after 20 times its expected seconds, plus 30 s
_PATIENCE = 600.0  # seconds more if nothing is lost by waiting


class TimeModel:
    """Predicts seconds of fits.

    `observe` corrects the predictions by a factor for each kind. Kinds without an observation get the geometric mean of
    the factors of other kinds. `observe_network` corrects one factor for all networks; one call lowers it to no less
    than half.
    """

    def __init__(self, num_rows: int, num_columns: int, num_classes: int, num_dense: int | None = None):
        """`num_dense` is the number of columns of linear models and Gaussian processes, by default that of trees."""
        widths = (num_columns, num_columns if num_dense is None else num_dense)
        self.shape, self.dense_shape = (
            (num_rows / 1000, max(1, width) / 10, max(2, num_classes) / 2) for width in widths
        )
        self.ratios: dict[str, list[float]] = {}
        self.compiled: set[Any] = set()
        self.network_factor = 1.0

    def fit_seconds(self, kind: str, settings: dict[str, Any]) -> float:
        """Seconds of one fold on one core."""
        return self._base(kind, settings) * self._factor(kind)

    def network_seconds(self, settings: dict[str, Any], num_folds: int) -> float:
        """Seconds of all folds of a network, with its compilation if it is the first of its length."""
        compilation, training = _network_seconds(settings, num_folds)
        return (training if _program(settings) in self.compiled else compilation + training) * self.network_factor

    def longest_seconds(self, kind: str, settings: dict[str, Any], num_folds: int, is_hurried: bool) -> float:
        """Seconds after which a fit of one fold, or of all folds of a network, is taken to hang.

        These are 30 s and 20 times the expected seconds; and ten minutes more unless `is_hurried`. Here networks are
        always compiled, since their process may be a new one, and corrections only raise the expected seconds.
        """
        if kind == "network":
            expected = sum(_network_seconds(settings, num_folds)) * max(1.0, self.network_factor)
        else:
            expected = self._base(kind, settings) * max(1.0, self._factor(kind))
        return _HANG_SECONDS + _HANG_FACTOR * expected + (0.0 if is_hurried else _PATIENCE)

    def observe(self, kind: str, settings: dict[str, Any], seconds: float) -> None:
        """Records the seconds of a finished fit of one fold."""
        self.ratios.setdefault(kind, []).append(math.log(max(seconds, 1e-3) / self._base(kind, settings)))

    def observe_network(self, settings: dict[str, Any], num_folds: int, seconds: float) -> None:
        """Records the seconds of all folds of a network, whose program is compiled now."""
        # A cache of programs makes the first network fast; the next one may not be in it.
        self.network_factor *= max(0.5, seconds / self.network_seconds(settings, num_folds))
        self.compiled.add(_program(settings))

    def _base(self, kind: str, settings: dict[str, Any]) -> float:
        a, *powers, b = _SECONDS[kind]
        shape = self.dense_shape if kind in ("linear", "gaussian_process") else self.shape
        size = math.prod(value**power for value, power in zip(shape, powers, strict=True))
        return (a * size + b) * settings.get("n_estimators", 200) / 200

    def _factor(self, kind: str) -> float:
        own = self.ratios.get(kind)
        if own:
            return math.exp(np.mean(own))
        others = [np.mean(values) for values in self.ratios.values()]
        return math.exp(np.mean(others)) if others else 1.0


def _program(settings: dict[str, Any]) -> tuple[int, int]:
    """The settings that decide which program a network needs: steps, and hypergradient steps."""
    return settings.get("num_steps", 100), settings.get("num_refined", 0)


def _network_seconds(settings: dict[str, Any], num_folds: int) -> tuple[float, float]:
    """Seconds of compilation and of training."""
    steps, refined = _program(settings)
    runs = 1 + _RUNS_OF_A_STEP * refined
    return REFINED_COMPILE if refined else NETWORK_COMPILE, _NETWORK_STEP * steps * num_folds * runs
