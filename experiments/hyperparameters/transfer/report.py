"""The table of results and its picture."""

import json
import re
from pathlib import Path

import numpy as np
import scipy.stats

from experiments import script

REFERENCES = ("TPE, 50 trials", "TPE, 100 trials", "one λ for all")
SIZES = {"below 500 rows": (0, 500), "500 to 2,000 rows": (500, 2000), "above 2,000 rows": (2000, np.inf)}


def family_means(values: np.ndarray, families: list[str]) -> np.ndarray:
    """Returns [..., families] means of [..., units]."""
    names, index = np.unique(families, return_inverse=True)
    return np.stack([values[..., index == i].mean(-1) for i in range(len(names))], axis=-1)


def by_method(scores: dict[str, list]) -> dict[str, np.ndarray]:
    """Returns [seeds, units, 2] for each method. Methods that learned have one entry per seed, in their labels."""
    grouped: dict[str, list] = {}
    for label, values in scores.items():
        grouped.setdefault(re.sub(r" \(seed \d+\)", "", label), []).append(values)
    return {label: np.array(values) for label, values in grouped.items()}


def interval(difference: np.ndarray, num: int = 4000) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over families, from a bootstrap."""
    rows = np.random.default_rng(0).integers(0, len(difference), (num, len(difference)))
    low, high = np.percentile(difference[rows].mean(1), [2.5, 97.5])
    return float(low), float(high)


def rows_of(details: dict) -> list[dict]:
    """Returns one row per method, with means over families."""
    families, runs = details["families"], details["runs"]
    methods = by_method(details["scores"])
    losses = {label: family_means(values[..., 0], families) for label, values in methods.items()}  # [seeds, families]
    num_seeds = max(map(len, losses.values()))
    of_seed = lambda s: np.stack([loss[s % len(loss)] for loss in losses.values()])
    ranks = np.mean([scipy.stats.rankdata(of_seed(s), axis=0).mean(1) for s in range(num_seeds)], axis=0)
    shares = methods["class shares"][0, :, 0]
    references = [name for name in REFERENCES if name in losses] or [list(losses)[-1]]
    rows = []
    for (label, loss), rank in zip(losses.items(), ranks, strict=True):
        first = next(name for name in runs if re.sub(r" \(seed \d+\)", "", name) == label)
        row = {
            "method": label,
            "loss": loss.mean(),
            "spread": loss.mean(1).std(ddof=1) if len(loss) > 1 else None,
            "error": family_means(methods[label][..., 1], families).mean(),
            "rank": rank,
            "runs": runs[first],
            "worst": float((methods[label][..., 0] - shares).max()),
        }
        for name in references:
            difference = loss.mean(0) - losses[name].mean(0)
            row[name] = (difference.mean(), *interval(difference), (difference < 0).mean())
        rows.append(row)
    return rows


def sizes_table(details: dict) -> str:
    """Returns the mean log loss by size of the table."""
    methods, num_rows = by_method(details["scores"]), np.array(details["rows"])
    header, rows = ["method"], [[label] for label in methods]
    for name, (low, high) in SIZES.items():
        inside = np.flatnonzero((num_rows >= low) & (num_rows < high))
        families = [details["families"][i] for i in inside]
        if len(inside):
            header.append(f"{name} ({len(set(families))} families)")
            for row, values in zip(rows, methods.values(), strict=True):
                row.append(f"{family_means(values[:, inside, 0], families).mean():.4f}")
    return script.table(header, rows)


def to_markdown(details: dict) -> str:
    rows = rows_of(details)
    references = [name for name in REFERENCES if name in rows[0]]
    header = ["method", "training runs", "test log loss", "test error", "mean rank", "worst excess over class shares"]
    header += [f"difference to {name} [95 %], share of families better" for name in references]
    lines = []
    for r in rows:
        loss = f"{r['loss']:.4f}" + ("" if r["spread"] is None else f" ± {r['spread']:.4f}")
        runs = "" if r["runs"] is None else f"{r['runs']:.0f}"
        cells = [r["method"], runs, loss, f"{r['error']:.2%}", f"{r['rank']:.2f}", f"{r['worst']:+.3f}"]
        for name in references:
            mean, low, high, wins = r[name]
            cells.append("" if r["method"] == name else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}], {wins:.0%}")
        lines.append(cells)
    num = len(set(details["families"])), len(set(details["tables"]))
    return (
        f"{num[1]} tables of {num[0]} families, {len(details['tables']) // num[1]} splits of the rows each. Means are "
        "over families. ± is the standard deviation over training seeds. The worst excess is over all splits and "
        "seeds. A rank is the mean over seeds. A family counts in each size class in which it has a table.\n\n"
        f"{script.table(header, lines)}\n\nTest log loss by the size of the table:\n\n{sizes_table(details)}"
    )


def _marker(name: str, start: str) -> str:
    """Returns the marker of a method that begins with `start`: alone, with draws, or with steps; else an empty text."""
    kind = name.removeprefix(start)
    return {"": "o", "draws": "s", "steps": "D"}.get(kind.split()[-1] if kind.startswith(" +") else kind, "")


def plot(details: dict, path: Path) -> None:
    """Test log loss against the number of training runs on the new table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {r["method"]: r for r in rows_of(details)}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label in ("random search", "TPE"):
        trials = [r for name, r in rows.items() if name.startswith(label)]
        axes.plot([r["runs"] for r in trials], [r["loss"] for r in trials], ".-", label=label)
    others = {name: r for name, r in rows.items() if not name.startswith(("random search", "TPE"))}
    starts = [name for name, r in others.items() if r["runs"] == 1]
    for color, start in zip(("0.5", "C2", "C4", "C3"), starts, strict=False):
        for name, r in others.items():
            if marker := _marker(name, start):
                axes.plot(r["runs"], r["loss"], marker, color=color, label=name)
    axes.set(xscale="log", xlabel="training runs on the new table", ylabel="test log loss, mean over families")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def publish(judged: Path, args) -> None:
    """Prints the table. Writes the page and the picture to the results, except in a smoke run."""
    details = json.loads(judged.read_text())
    if not args.smoke:
        plot(details, script.RESULTS / "transfer.png")
    args.out = script.RESULTS
    script.publish(
        Path(__file__).parent,
        "A g for tables of new families",
        to_markdown(details),
        args,
        picture="Test log loss against training runs",
        seconds=details["seconds"],
    )
