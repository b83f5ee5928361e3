"""The table of results, its page and its picture."""

import json
import platform
from pathlib import Path

import jax
import numpy as np
import scipy.stats

from experiments import script
from metaopt import tasks

COMMITTED = script.RESULTS / "auto_tune.md"


def report(scores: dict[str, np.ndarray], costs: dict[str, tuple], unit_table, families, reference: str, seed=0):
    """Returns rows of the table of results: means, mean ranks, and paired differences to `reference`.

    Scores are first averaged over a table's seeds. The 95 % intervals are from a bootstrap over families, since tables
    of one family are not independent.
    """
    names = list(scores)
    table_ids = np.unique(unit_table)
    mean = np.stack([[scores[n][unit_table == t, :2].mean(0) for t in table_ids] for n in names])  # [M, tables, 2]
    ranks = scipy.stats.rankdata(mean[:, :, 0], axis=0)  # ties share their mean rank
    family = np.array([families[t] for t in table_ids])
    groups = [np.flatnonzero(family == f) for f in np.unique(family)]
    rng = np.random.default_rng(seed)
    draws = [np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))]) for _ in range(2000)]
    reference_row = names.index(reference)
    rows = []
    for m, name in enumerate(names):
        difference = mean[m, :, 0] - mean[reference_row, :, 0]
        low, high = np.percentile([difference[d].mean() for d in draws], [2.5, 97.5])
        rows.append(
            {
                "method": name,
                "test_nll": mean[m, :, 0].mean(),
                "test_error": mean[m, :, 1].mean(),
                "mean_rank": ranks[m].mean(),
                "difference": difference.mean(),
                "low": low,
                "high": high,
                "wins": float((mean[m, :, 0] < mean[reference_row, :, 0]).mean()),
                "trainings": costs[name][0],
                "seconds": costs[name][1],
            }
        )
    return rows


def to_markdown(rows, title: str, reference: str) -> str:
    lines = [
        f"### {title}",
        "",
        f"| method | test log loss | test error | mean rank | difference to {reference} [95 %] | tables better than it "
        "| cost on the new table, in training runs | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        trainings = "" if r["trainings"] is None else f"{r['trainings']:.1f}"
        difference = "" if r["method"] == reference else f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]"
        wins = "" if r["method"] == reference else f"{r['wins']:.0%}"
        lines.append(
            f"| {r['method']} | {r['test_nll']:.4f} | {r['test_error']:.2%} | {r['mean_rank']:.2f} | {difference} | "
            f"{wins} | {trainings} | {r['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, histories, predicted, path: Path, reference: str) -> None:
    """Left: outer loss while λ and then g are learned. Middle: differences with intervals. Right: predictions of g."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5.2), width_ratios=[1, 1.3, 1.2])
    for fold, (first, second) in histories.items():
        x = np.arange(len(first) + len(second))
        y = np.concatenate([first, second])
        width = max(1, len(x) // 12)
        smooth = np.convolve(np.pad(y, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
        left.plot(x, smooth, label=f"fold {fold}")
        left.axvline(len(first), color="0.8", linewidth=1)
    left.set(title="one λ for all tables, then g(t)", xlabel="outer step", ylabel="validation log loss (smoothed)")
    left.legend(frameon=False)
    order = np.arange(len(rows))[::-1]
    for y, r in zip(order, rows, strict=True):
        color = "C3" if r["method"].startswith("g(t')") else "C0"
        middle.plot([r["low"], r["high"]], [y, y], color=color)
        middle.plot(r["difference"], y, "o", color=color)
    middle.axvline(0, color="0.6", linewidth=1)
    middle.set_yticks(order, [r["method"] for r in rows])
    middle.set(title=f"test log loss against {reference}", xlabel="difference, 95 % over families")
    middle.locator_params(axis="x", nbins=6)  # otherwise the labels overlap
    names = list(predicted)
    right.boxplot(
        [predicted[n] for n in names], orientation="horizontal", tick_labels=names, showfliers=False, widths=0.6
    )
    right.set(title="what g predicts, over held-out tables", xlabel="place in its range (log scale)", xlim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def merge(parts: list[dict]) -> dict:
    """Merges results of runs over different folds: `--folds 0 1` here, `--folds 2 3 4` there, then `--merge`."""
    if len(parts) == 1:
        return parts[0]
    for field in ("preset", "num_seeds", "training_run", "reference"):
        if len({json.dumps(p[field]) for p in parts}) > 1:
            raise ValueError(f"The results to merge differ in {field!r}: {[p[field] for p in parts]}.")
    pairs = [pair for p in parts for pair in zip(p["tables"], p["seeds"], strict=True)]
    if len(set(pairs)) < len(pairs):
        raise ValueError("The results to merge share tables: merge runs over different folds.")
    share = np.array([len(p["tables"]) for p in parts]) / len(pairs)
    names = parts[0]["scores"]
    alone = [p["one_member"] for p in parts]
    return {
        **parts[0],
        "trees_while_learning": any(part.get("trees_while_learning") for part in parts),
        "command": "; ".join(p["command"] for p in parts),
        "hypergradient_cost": float(share @ [p["hypergradient_cost"] for p in parts]),
        "seconds": sum(p["seconds"] for p in parts),
        "one_member": None if None in alone else float(share @ alone),
        **{f: [x for p in parts for x in p[f]] for f in ("tables", "families", "seeds")},
        "scores": {n: [row for p in parts for row in p["scores"][n]] for n in names},
        "costs": {
            n: (
                None if parts[0]["costs"][n][0] is None else float(share @ [p["costs"][n][0] for p in parts]),
                float(share @ [p["costs"][n][1] for p in parts]),
            )
            for n in names
        },
        "predicted": {n: [x for p in parts for x in p["predicted"][n]] for n in parts[0]["predicted"]},
        "histories": {fold: pair for p in parts for fold, pair in p["histories"].items()},
    }


def without_made_tables(scores, details, unit_table, families) -> str:
    """Returns a paragraph with the results without the tables that are simulated or follow a rule."""
    synthetic = np.isin(families, list(tasks.SYNTHETIC_FAMILIES))
    if not synthetic.any() or synthetic.all():
        return ""
    kept = ~synthetic[unit_table]
    scores = {n: s[kept] for n, s in scores.items()}
    rows = report(scores, details["costs"], unit_table[kept], families, details["reference"])
    cells = [[r["method"], f"{r['test_nll']:.4f}", f"{r['mean_rank']:.2f}"] for r in rows]
    return (
        f"\nWithout the {synthetic.sum()} tables of {len(set(np.array(families)[synthetic]))} families that are "
        f"simulated or follow a rule (`tasks.SYNTHETIC_FAMILIES`), the other {(~synthetic).sum()} tables have:\n"
        "\n"
        f"{script.table(['method', 'test log loss', 'mean rank'], cells)}\n"
    )


def finish(parts: list[dict], out: Path) -> list[dict]:
    """Writes and prints the table, and writes the picture."""
    details = merge(parts)
    names, unit_table = np.unique(details["tables"], return_inverse=True)
    families = [details["families"][details["tables"].index(n)] for n in names]
    scores = {n: np.array(s) for n, s in details["scores"].items()}
    reference, preset = details["reference"], details["preset"]
    rows = report(scores, details["costs"], unit_table, families, reference)
    markdown = to_markdown(
        rows,
        f"auto_tune, {preset}: {len(names)} held-out tables of {len(set(families))} families, "
        f"{details['num_seeds']} {'seed' if details['num_seeds'] == 1 else 'seeds'} each",
        reference,
    )
    merged = "; then `--merge` of their results" if "; " in details["command"] else ""
    markdown += (
        f"\nCommand: `{details['command'].strip()}`"
        f"{merged}. JAX {jax.__version__}, Python {platform.python_version()}, "
        f"{details['num_cores']} core(s), {details['seconds']:.0f} s in all. Lower is better throughout. Seconds are "
        "per table and seed, without compilation; runs of many tables are batched. A training run is "
        f"{details['training_run']}; a hypergradient step costs {details['hypergradient_cost']:.2f} of them, in "
        "operations.\n"
    )
    markdown += without_made_tables(scores, details, unit_table, families)
    if details["baselines"] is not None:
        markdown += (
            "\nThe trials, the trees and their seconds are from an earlier run of "
            f"`{details['baselines']['command'].strip()}`, {details['baselines']['num_cores']} core(s), "
            f"{details['baselines']['seconds']:.0f} s in all. Training with the defaults gave the same scores there.\n"
        )
    if details.get("trees_while_learning"):
        markdown += "\nForests and boosting trained while g was learned, so their seconds are upper bounds.\n"
    if details["one_member"] is not None:
        markdown += (
            "\ng is the mean of several predictors, trained with different keys. A single one has a mean test log "
            f"loss of {details['one_member']:.4f} over tables and seeds.\n"
            ""
        )
    (out / f"auto_tune_{preset}.md").write_text(markdown)
    (out / f"auto_tune_{preset}.json").write_text(json.dumps({**details, "rows": rows}))
    plot(rows, details["histories"], details["predicted"], out / f"auto_tune_{preset}.png", reference)
    print(markdown)
    print(f"Results in {out}/auto_tune_{preset}.md, .png and .json\n")
    return rows
