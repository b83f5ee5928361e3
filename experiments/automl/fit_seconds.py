"""Seconds of the fits of AutoML's models on one core, for `metaopt/automl/_time_model.py`.

For each kind it times one fit with the settings of the portfolio at several numbers of rows, columns and classes. Then
it fits seconds = a (n / 1000)^p (d / 10)^q (C / 2)^r + b. The Gaussian process is fitted to a numeric target, and the
other models to classes. `--seeds` is the number of repetitions; the fastest counts.

    python experiments/automl/fit_seconds.py            # minutes on an idle machine; writes results/fit_seconds.md
    python experiments/automl/fit_seconds.py --smoke    # seconds; prints only
"""

from collections.abc import Sequence

import numpy as np
from scipy import optimize

from experiments import script
from metaopt.automl import _kinds
from metaopt.automl._portfolio import Member, portfolio

SIZES = [
    (50, 5, 2),
    (300, 10, 2),
    (1000, 10, 2),
    (4000, 10, 2),
    (1000, 3, 2),
    (1000, 40, 2),
    (1000, 10, 8),
    (4000, 40, 4),
]


def data(num_rows: int, num_columns: int, num_classes: int, seed: int) -> _kinds.FoldData:
    """A noisy linear problem with 7 training rows for each validation row; without classes if `num_classes` is 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, num_columns))
    if num_classes:
        y = (x @ rng.normal(size=(num_columns, num_classes)) + rng.gumbel(size=(num_rows, num_classes))).argmax(axis=1)
        y[:num_classes] = np.arange(num_classes)
    else:
        y = x @ rng.normal(size=num_columns) + rng.normal(size=num_rows)
    num_valid = num_rows // 8
    views = _kinds.Views(x, x, x.astype(np.float32))
    valid = _kinds.Views(*(part[-num_valid:] for part in views))
    ones, numeric = np.ones(num_rows), np.zeros(num_columns, bool)
    stops = num_valid >= _kinds.LEAST_TO_STOP
    return _kinds.FoldData(views, y, ones, valid, y[-num_valid:], ones[-num_valid:], numeric, num_classes, seed, stops)


def first_members() -> dict[str, Member]:
    """The first member of each kind that is installed, except networks."""
    members = [*portfolio("classification", "best", None, 1000), *portfolio("regression", "best", None, 1000)]
    members += portfolio("classification", "best", "hist_gradient_boosting", 1000)  # None leaves it out
    return {member.kind: member for member in reversed(members) if member.kind != "network"}


def measure(member: Member, sizes: Sequence[tuple[int, int, int]], repetitions: int) -> np.ndarray:
    """The seconds [sizes] of one fit at each size."""
    seconds = []
    for num_rows, num_columns, num_classes in sizes:
        fold = data(num_rows, num_columns, 0 if member.kind == "gaussian_process" else num_classes, seed=0)
        seconds.append(min(_kinds.fit_fold(member.kind, member.settings, fold)[2] for _ in range(repetitions)))
    return np.array(seconds)


def fitted(seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """(a, p, q, r, b) by least squares of log seconds, and the largest ratio between model and measurement."""
    sizes = np.log(np.array(SIZES) / (1000, 10, 2))

    def predict(parameters):
        a, p, q, r, b = parameters
        return np.log(np.exp(a + sizes @ (p, q, r)) + np.exp(b))

    bounds = ([-12, 0.2, 0, 0, -12], [5, 1.5, 1.5, 1.5, 3])
    start = np.array([np.log(seconds[2]), 0.8, 0.7, 0.7, np.log(seconds[0] / 2)])
    result = optimize.least_squares(
        lambda x: predict(x) - np.log(seconds), np.clip(start, bounds[0], bounds[1]), bounds=bounds, loss="soft_l1"
    )
    a, p, q, r, b = result.x
    error = np.exp(np.abs(predict(result.x) - np.log(seconds)).max())
    return np.array([np.exp(a), p, q, r, np.exp(b)]), float(error)


def main() -> None:
    args = script.parser(__doc__).parse_args()
    sizes = SIZES[:2] if args.smoke else SIZES
    rows = []
    for kind, member in first_members().items():
        seconds = measure(member, sizes, args.seeds)
        row = [kind, *(f"{value:.3f}" for value in seconds)]
        if not args.smoke:
            parameters, error = fitted(seconds)
            row += [*(f"{value:.3f}" for value in parameters), f"{error:.2f}"]
        rows.append(row)
    names = [f"{n} × {d}, {c}" for n, d, c in sizes]
    header = ["kind", *names, *([] if args.smoke else ["a", "p", "q", "r", "b", "largest ratio"])]
    script.publish(__file__, "Seconds of the fits of AutoML's models", script.table(header, rows), args)


if __name__ == "__main__":
    script.run(main)
