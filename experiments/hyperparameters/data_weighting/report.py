"""The tables and the picture of the result."""

from pathlib import Path

import numpy as np

from experiments import script
from experiments.hyperparameters.data_weighting.windows import KINDS


def column(runs: list[dict], name: str, entry: str) -> np.ndarray:
    """Returns an entry of a method's results, [seeds, ...]."""
    return np.array([run[name][entry] for run in runs], float)


def cell(values: np.ndarray, digits: int = 3) -> str:
    return "" if np.isnan(values).any() else script.spread(values, digits)


def losses_table(runs: list[dict]) -> str:
    """Returns the table of test losses.

    A "% of the gap" is a share of the difference between uniform weights and clean windows, computed for each seed.
    """
    uniform, clean = (column(runs, name, "losses") for name in ("uniform weights", "clean windows"))
    rows = []
    for name in runs[0]:
        losses, cost = column(runs, name, "losses"), column(runs, name, "cost").mean()
        share = 100 * (uniform - losses) / (uniform - clean)
        shares = [cell(share[:, j], 0) for j in (0, 2)]
        cells = [cell(losses[:, j]) for j in range(3)]
        rows.append([name, cells[0], shares[0], cells[1], cells[2], shares[1], f"{cost:.1f}" if cost else ""])
    header = [
        "trained on",
        "test loss",
        "% of the gap",
        "with validation text",
        "unseen windows",
        "% of the gap",
        "cost",
    ]
    return script.table(header, rows)


def detection_table(runs: list[dict]) -> str:
    rows = []
    for name in runs[0]:
        pool, unseen = (column(runs, name, entry) for entry in ("auc", "unseen_auc"))
        if not np.isnan(pool).all():
            rows.append([name, *(cell(values[:, k], 2) for values in (pool, unseen) for k in range(len(KINDS)))])
    kinds = [*KINDS[1:], "all"]
    return script.table(["AUC", *kinds, *(f"{kind}, unseen" for kind in kinds)], rows)


def report(runs: list[dict], settings) -> str:
    s = settings
    return "\n\n".join(
        [
            losses_table(runs),
            "Test loss in nats per character of a transformer trained on the chosen half of the windows. The gap is "
            "that between uniform weights and clean windows (0 % and 100 %). With validation text: trained on the same "
            "windows and the validation text. Unseen windows: trained on the half that the same scores choose of other "
            "windows, which the method has not seen. Cost: operations of the method, without the judged training, in "
            "units of one plain training.",
            "AUC of clean against corrupted windows, of each kind and of all:",
            detection_table(runs),
            f"{s.num_windows:,} windows of {s.context + 1} characters, of which a sixth each is shuffled, repeated, or "
            f"from SMS messages; {s.num_valid} validation and {s.num_test:,} test windows. Transformer of two layers, "
            f"width {s.width}, {s.num_steps} steps of {s.batch} windows; {s.outer_steps} metagradients for the "
            f"weights, and {s.scorer_steps} through {s.scorer_horizon} steps for the scorer. Mean ± "
            f"standard deviation over {len(runs)} seeds, which differ in text, corruption and initialization.",
        ]
    )


def plot(runs: list[dict], path: Path) -> None:
    """Plots the test losses, and the AUC by kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [name for name in runs[0] if not np.isnan(column(runs, name, "losses")[:, 0]).all()]
    for i, name in enumerate(names):
        losses = column(runs, name, "losses")[:, 0]
        left.plot(losses, np.full(len(losses), i), "o", color="C0", alpha=0.6)
        left.plot(losses.mean(), i, "|", color="black", markersize=16)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel="test loss, nats per character (a point per seed)")
    learned = [name for name in names if not np.isnan(column(runs, name, "auc")).all()]
    for k, kind in enumerate(KINDS[1:]):
        values = [column(runs, name, "auc")[:, k].mean() for name in learned]
        right.plot(values, range(len(learned)), "osD"[k], label=kind)
    right.axvline(0.5, color="gray", linewidth=0.8)
    right.set_yticks(range(len(learned)), learned)
    right.invert_yaxis()
    right.set(xlabel="AUC of finding corrupted windows", xlim=(None, 1.02))
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
