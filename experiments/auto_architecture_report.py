"""What `auto_architecture.py` tells of its folds: tables, sentences and the picture.

Parts are not made here, so that this file may change and what is finished is still by the script's own code.
"""

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from auto_architecture import Config

# Rows of the table of results.
LEARNED = ", from the learned start"
A_STAR = "a* = h(t'), no trial"
FIXED = "best fixed architecture"
FINE_TUNED = "a* fine-tuned"
DARTS = "DARTS on each task"
RECORDS = "h from records, no trial"
BOTH = "h by hypergradient and from records, no trial"
RANDOM = "random search, {} networks"
EVOLUTION = "regularized evolution, {} networks"


def joined(parts: list[dict[str, Any]], costs: dict[str, dict[str, float]], config: "Config") -> dict[str, Any]:
    """The results of several folds of one shape."""
    sizes = [len(part["tasks"]) for part in parts]
    end_to_end = lambda name: [x for part in parts for x in part[name]]
    by_label = lambda name: {label: [x for part in parts for x in part[name][label]] for label in parts[0][name]}
    runs, seconds = prices(list(parts[0]["scores"]), costs, [part["trust"] for part in parts], sizes, config)
    return {
        **{name: parts[0][name] for name in ("shape", "features", "ops", "space", "num_folds")},
        **{name: end_to_end(name) for name in ("tasks", "families", "values")},
        **{name: by_label(name) for name in ("scores", "weights", "architectures")},
        **{name: [part[name] for part in parts] for name in ("rates", "trust", "left_out", "tuned_on", "history")},
        "sizes": sizes,
        "costs": costs,
        "seconds": seconds,
        "runs": runs,
    }


def prices(labels, costs, trust: list[float], sizes: list[int], config: "Config") -> tuple[dict, dict]:
    """What each row costs on a new task: in training runs, by operations, and in processor seconds.

    What h reads has no count of operations: it is the processor's seconds against those of a training run. Where it is
    trusted nothing, nothing is read. `trust` and `sizes` are of the folds, whose tasks count alike.
    """
    operations, clock = costs["operations"], costs["seconds"]
    run = clock["training run"]
    read = (clock["look"] + clock["gradients"]) * np.average([t > 0 for t in trust], weights=sizes)
    runs, seconds = dict.fromkeys(labels, 1.0), dict.fromkeys(labels, run)
    for label in labels:
        if label.startswith("a*") or label == BOTH:
            runs[label] += read / run
            seconds[label] += read
        if label.startswith(FINE_TUNED):
            runs[label] += config.fine_tune_steps * operations["fine-tuning"]
            seconds[label] += clock["fine-tuning"]
    runs[DARTS] += config.darts_steps * operations["alternation"]
    seconds[DARTS] += clock["DARTS"]
    trained = {RANDOM.format(t): t for t in config.trials} | {EVOLUTION.format(config.evolution): config.evolution}
    runs |= {label: float(t) for label, t in trained.items()}
    seconds |= {label: t * run for label, t in trained.items()}
    return {k: float(x) for k, x in runs.items()}, {k: float(x) for k, x in seconds.items()}


def report(scores: dict[str, np.ndarray], families: list[str], reference: str) -> dict[str, dict[str, float]]:
    """Means, mean ranks, and paired differences to `reference` with 95 % intervals, by a bootstrap over families."""
    import scipy.stats

    ranks = scipy.stats.rankdata([x[:, 0] for x in scores.values()], axis=0)
    groups = [np.flatnonzero(np.array(families) == f) for f in sorted(set(families))]
    rows = {}
    for i, (label, x) in enumerate(scores.items()):
        difference = x[:, 0] - scores[reference][:, 0]
        low, high = interval(difference, groups)
        rows[label] = {
            "loss": x[:, 0].mean(),
            "error": x[:, 1].mean(),
            "rank": ranks[i].mean(),
            "difference": difference.mean(),
            "low": low,
            "high": high,
            "better": float((difference < 0).mean()),
        }
    return rows


def interval(difference: np.ndarray, groups: list[np.ndarray], num_draws: int = 2000) -> tuple[float, float]:
    """95 % of the mean over tasks, families drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = [np.concatenate([groups[g] for g in rng.integers(0, len(groups), len(groups))]) for _ in range(num_draws)]
    low, high = np.percentile([difference[d].mean() for d in draws], [2.5, 97.5])
    return float(low), float(high)


def to_markdown(result: dict[str, Any]) -> str:
    """The table of one shape of tasks."""
    scores = {label: np.array(x) for label, x in result["scores"].items()}
    rows = report(scores, result["families"], A_STAR)
    lines = [
        f"### {result['shape']}: {len(result['tasks'])} held-out tasks of {len(set(result['families']))} families, "
        f"{result['space']:,} architectures",
        "",
        "| method | test log loss | test error | mean rank | difference to a* [95 %] | tasks better than a* | cost on "
        "the new task, in training runs | in processor seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, r in rows.items():
        own = label == A_STAR
        difference = "" if own else f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]"
        lines.append(
            f"| {label} | {r['loss']:.4f} | {r['error']:.2%} | {r['rank']:.2f} | {difference} | "
            f"{'' if own else format(r['better'], '.0%')} | {result['runs'][label]:.1f} | "
            f"{result['seconds'][label]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def bars(results: list[dict[str, Any]], most: int) -> str:
    """The two comparisons that were the aim, over all held-out tasks, in log loss and in errors."""
    families = [f"{r['shape']} {f}" for r in results for f in r["families"]]
    groups = [np.flatnonzero(np.array(families) == f) for f in sorted(set(families))]
    text = []
    for first, second in (
        (A_STAR, RANDOM.format(most)),
        (FINE_TUNED, DARTS),
        *([(RECORDS, RANDOM.format(most)), (BOTH, RANDOM.format(most))] if RECORDS in results[0]["scores"] else []),
        (A_STAR + LEARNED, RANDOM.format(most)),
        (FINE_TUNED + LEARNED, DARTS),
    ):
        a, b = (np.concatenate([np.array(r["scores"][label]) for r in results]) for label in (first, second))
        told = []
        for column, measure, form in ((0, "log loss", ".4f"), (1, "error", ".2%")):
            difference = a[:, column] - b[:, column]
            low, high = interval(difference, groups)
            told.append(
                f"test {measure} {a[:, column].mean():{form}} and {b[:, column].mean():{form}}, difference "
                f"{difference.mean():+{form}} [{low:+{form}}, {high:+{form}}], smaller on "
                f"{np.mean(difference < 0):.0%} and larger on {np.mean(difference > 0):.0%} of {len(a)} tasks"
            )
        runs, seconds = (
            [np.mean([r[unit][label] for r in results]) for label in (first, second)] for unit in ("runs", "seconds")
        )
        text.append(
            f"- {first} against {second}: {'; '.join(told)}; cost {runs[0]:.1f} and {runs[1]:.1f} training runs, "
            f"{runs[0] / runs[1]:.2f} of it, and {seconds[0]:.3f} and {seconds[1]:.3f} processor seconds, "
            f"{seconds[0] / seconds[1]:.2f} of it."
        )
    return "\n".join(text) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """For each shape: differences with intervals; what h chose by family; and how that follows features."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), 3, figsize=(19, 6.5 * len(results)), squeeze=False, width_ratios=[1, 1, 1.1]
    )
    for (left, middle, right), result in zip(axes, results, strict=True):
        rows = report({k: np.array(x) for k, x in result["scores"].items()}, result["families"], A_STAR)
        order = np.arange(len(rows))[::-1]
        for y, (label, r) in zip(order, rows.items(), strict=True):
            color = "C3" if label.startswith("a*") else "C0"
            left.plot([r["low"], r["high"]], [y, y], color=color)
            left.plot(r["difference"], y, "o", color=color)
        left.axvline(0, color="0.6", linewidth=1)
        left.set_yticks(order, list(rows))
        left.set(title=f"{result['shape']}: test log loss against a*", xlabel="difference, 95 % over families")

        # Mean mixing weight of every op over the edges of its kind.
        labels, columns = [], []
        for kind, w in result["weights"].items():
            mean = np.array(w).mean(1)  # [tasks, ops]
            labels += [f"{kind}: {op}" for op in result["ops"][kind]]
            columns += list(mean.T)
        chosen = np.array(columns)  # [ops, tasks]
        families = sorted(set(result["families"]))
        if len(families) > 12:  # too many to name: the tasks in the order of the features' first principal direction
            values = np.array(result["values"])
            direction = np.linalg.svd(values - values.mean(0), full_matrices=False)[2][0]
            at = np.argsort(values @ direction)
            shown = chosen[:, at]
            strongest = result["features"][int(np.abs(direction).argmax())]
            middle.set_xlabel(f"held-out tasks, along the features' main direction (mostly {strongest!r})")
        else:
            shown = np.stack([chosen[:, np.array(result["families"]) == f].mean(1) for f in families], 1)
            middle.set_xticks(range(len(families)), families, rotation=35, ha="right")
        image = middle.imshow(shown, aspect="auto", cmap="Blues", vmin=0)
        middle.set_yticks(range(len(labels)), labels)
        middle.set_title("what h chose: mean mixing weight")
        figure.colorbar(image, ax=middle, fraction=0.03)

        values = np.array(result["values"])
        standard = lambda x: (x - x.mean(0)) / (x.std(0) + 1e-9)
        with np.errstate(invalid="ignore"):
            correlation = standard(chosen.T).T @ standard(values) / len(values)
        image = right.imshow(correlation, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
        right.set_yticks(range(len(labels)), labels)
        right.set_xticks(range(len(result["features"])), result["features"], rotation=50, ha="right")
        right.set_title("correlation of a choice with a feature, over held-out tasks")
        figure.colorbar(image, ax=right, fraction=0.03)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def trust_text(result: dict[str, Any]) -> str:
    """By fold: how many tasks were left out, and what they say of what h reads."""
    told = []
    for num, trust in zip(result["left_out"], result["trust"], strict=True):
        told.append(f"{num} tasks left out, which gave its reading the trust {trust}" if num else "none left out")
    return "; ".join(told)


def rates_text(config: dict[str, Any], results: list[dict[str, Any]]) -> str:
    if len(config["rates"]) == 1:
        return f"both move α at the rate {config['rates'][0]}, which was tuned for neither. "
    chosen = "; ".join(
        f"{r['shape']} {', '.join(f'{rates[FINE_TUNED]} and {rates[DARTS]}' for rates in r['rates'])}" for r in results
    )
    most = max(max(r["tuned_on"]) for r in results)
    what = "which h did not learn from"
    if any(not num for r in results for num in r["left_out"]):
        what = "which h did not learn from where there are more than two families to leave one out of"
    return (
        f"the rate of α of both is that of {', '.join(map(str, config['rates']))} with the smallest validation loss of "
        f"what it finds on {most} tasks of the meta-training set, {what} (fine-tuning and DARTS, by fold: {chosen}). "
    )


def reading_text(result: dict[str, Any]) -> str:
    clock = result["costs"]["seconds"]
    run, look = clock["training run"], clock["look"]
    return (
        f"{(look + clock['gradients']) / run:.1f} training runs on {result['shape']} (a run {run:.4f} s; the look "
        f"{look:.4f}; gradients {clock['gradients']:.4f})"
    )


def choices_text(result: dict[str, Any], best: str) -> str:
    """Fold by fold: how many architectures h wrote for the held-out tasks, and losses, with those of the row `best`."""
    ends = np.cumsum(result["sizes"])
    by_fold = lambda rows: [rows[end - size : end] for end, size in zip(ends, result["sizes"], strict=True)]
    joint = lambda values: ", ".join(values)
    loss = lambda row: joint(f"{np.mean(part, 0)[0]:.3f}" for part in by_fold(result["scores"][row]))
    chosen = {"a*": A_STAR, RECORDS: RECORDS, BOTH: BOTH}
    told = [
        f"{label}: {joint(str(len(set(part))) for part in by_fold(result['architectures'][label]))} (test log loss "
        f"{loss(row)})"
        for label, row in chosen.items()
        if label in result["architectures"]
    ]
    return (
        f"How many architectures there are for the {joint(map(str, result['sizes']))} held-out {result['shape']} of "
        f"each fold, {'; '.join(told)}; {best} had {loss(best)}."
    )


def finish(details: dict[str, Any], path: Path) -> None:
    """Writes and prints the tables and the picture."""
    config, results = details["config"], details["results"]
    most = 20 if 20 in config["trials"] else max(config["trials"])
    best, other_code = RANDOM.format(most), details["num_other_code"]
    each = lambda tell: " and ".join(map(tell, results))
    text = f"# auto_architecture, {details['preset']}\n\n" + "\n".join(to_markdown(r) for r in results)
    text += "\n### Over all of them\n\n" + bars(results, most)
    text += (
        f"\nA training run is {config['num_steps']} steps of {config['batch_size']} rows, of one network; an "
        "alternation of DARTS costs "
        + each(lambda r: f"{r['costs']['operations']['alternation']:.2f} ({r['shape']})")
        + " of it, in operations, and one of fine-tuning "
        + each(lambda r: f"{r['costs']['operations']['fine-tuning']:.2f}")
        + ", which differentiates where DARTS takes finite differences. What h reads in a task (statistics of its "
        "rows, and gradients at random weights) has no count of operations, and is told by processor seconds against "
        "those of a training run, all on one core, per task and without compilation: "
        + each(reading_text)
        + ". Nothing is read where it is trusted nothing, and the rows are means over folds. Intervals are from a "
        "bootstrap over families. Random search is the mean over draws of which of the trained networks it saw. "
        "Processor seconds are those of the parts of the work, each measured alone: searches on 8 tasks, four of them "
        "side by side, the rest on all tasks. "
        f"DARTS takes {config['darts_steps']} alternations of second order, fine-tuning {config['fine_tune_steps']}; "
        + rates_text(config, results)
        + " ".join(
            f"Of {r['shape']}, {len(r['trust'])} of {r['num_folds']} folds were held out; of the rest, {trust_text(r)}."
            for r in results
        )
        + " "
        + " ".join(choices_text(r, best) for r in results)
        + " "
        + details["note"]
        + "\n\n"
        f"`{'METAOPT_DATA=... ' if details['data'] else ''}{details['command'].strip()}`, seed {details['seed']}, "
        f"{details['seconds']:.0f} s ({details['processor']:.0f} processor seconds) on {details['cores']} core(s); "
        f"Python {platform.python_version()}, JAX {jax.__version__}."
        + (f" {other_code} of {details['num_parts']} parts are by other code than the script's." * (other_code > 0))
        + "\n"
    )
    Path(f"{path}.md").write_text(text)
    Path(f"{path}.json").write_text(json.dumps(details))
    plot(results, Path(f"{path}.png"))
    print(text)
    print(f"Results in {path}.md, .png and .json")
