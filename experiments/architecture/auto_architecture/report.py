"""The page of the result: tables and sentences.

This file computes no part of a result. So it may change, and the finished parts still count as made by the same code.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.architecture.auto_architecture.reading import plot, what_h_reads
from experiments.architecture.auto_architecture.results import (
    A_STAR,
    BOTH,
    DARTS,
    FINE_TUNED,
    LEARNED,
    RANDOM,
    RECORDS,
    groups_of,
    interval,
    report,
)


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of one shape of tasks."""
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


def compared(ours: np.ndarray, others: np.ndarray, groups: list[np.ndarray]) -> str:
    """Compares test log loss and error [n, 2] of two methods on the same tasks."""
    texts = []
    for column, measure, form in ((0, "log loss", ".4f"), (1, "error", ".2%")):
        difference = ours[:, column] - others[:, column]
        low, high = interval(difference, groups)
        texts.append(
            f"test {measure} {ours[:, column].mean():{form}} and {others[:, column].mean():{form}}, difference "
            f"{difference.mean():+{form}} [{low:+{form}}, {high:+{form}}], smaller on "
            f"{np.mean(difference < 0):.0%} and larger on {np.mean(difference > 0):.0%} of {len(ours)} tasks"
        )
    return "; ".join(texts)


def bars(results: list[dict[str, Any]], most: int) -> str:
    """Describes the two comparisons that were the aim, over all held-out tasks, in log loss and in errors."""
    groups, text = groups_of(results), []
    for first, second in (
        (A_STAR, RANDOM.format(most)),
        (FINE_TUNED, DARTS),
        *([(RECORDS, RANDOM.format(most)), (BOTH, RANDOM.format(most))] if RECORDS in results[0]["scores"] else []),
        (A_STAR + LEARNED, RANDOM.format(most)),
        (FINE_TUNED + LEARNED, DARTS),
    ):
        a, b = (np.concatenate([np.array(r["scores"][label]) for r in results]) for label in (first, second))
        runs, seconds = (
            [np.mean([r[unit][label] for r in results]) for label in (first, second)] for unit in ("runs", "seconds")
        )
        text.append(
            f"- {first} against {second}: {compared(a, b, groups)}; cost {runs[0]:.1f} and {runs[1]:.1f} training "
            f"runs, {runs[0] / runs[1]:.2f} of it, and {seconds[0]:.3f} and {seconds[1]:.3f} processor seconds, "
            f"{seconds[0] / seconds[1]:.2f} of it."
        )
    return "\n".join(text) + "\n"


def verdict(difference: np.ndarray, groups: list[np.ndarray], ratio: float, share: float = 0.2) -> str:
    """Describes whether one method is better than another, and at which share of its cost."""
    low, high = interval(difference, groups)
    relation = "better" if high < 0 else "worse" if low > 0 else "level with it"
    reached = "reached" if high < 0 and ratio <= share else "missed"
    return f"{relation}, {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}], at {ratio:.2f} of its cost: {reached}"


ORDERS = {"first": "first order", "second": "second order", "exact": "second order, exact"}


def darts_rows(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns DARTS's variants over all tasks, each at its best rate."""
    rows = {}
    for own in results[0]["darts"]["variants"]:
        same = []
        for r in results:
            variants = {v["reading"]: v for v in r["darts"]["variants"] if v["order"] == own["order"]}
            # If a node has at most two edges, keeping two is the same as leaving "none" out.
            same.append(variants.get(own["reading"], variants.get("none left out")))
        rows[f"{ORDERS[own['order']]}, {own['reading']}"] = {
            "scores": np.concatenate([np.array(v["scores"]) for v in same]),
            "none": sum(sum(v["none"]) for v in same),
            "rates": "; ".join(
                f"{r['shape']} {', '.join(map(str, v['rates']))}" for r, v in zip(results, same, strict=True)
            ),
            "runs": np.mean([v["runs"] for v in same]),
        }
    return rows


def darts_text(results: list[dict[str, Any]]) -> str:
    """Describes DARTS's variants over all tasks, and compares a* fine-tuned with each variant, which was an aim."""
    groups, variants = groups_of(results), darts_rows(results)
    scores_of = lambda label: np.concatenate([np.array(r["scores"][label]) for r in results])
    cost = lambda label: np.mean([r["runs"][label] for r in results])
    differences = lambda ours, scores: (scores_of(ours) - scores).T  # [2, tasks]
    lines = [
        '| order, and how an architecture is read off α | test log loss | test error | with a "none" | rate of α, by '
        "fold | cost, in training runs | a* fine-tuned against it: log loss | errors | share of its cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    chosen = {"scores": scores_of(DARTS), "none": "", "rates": "; ".join(f"{r['shape']} {picks(r)}" for r in results)}
    for name, row in {**variants, "chosen, fold by fold": {**chosen, "runs": cost(DARTS)}}.items():
        loss, error = row["scores"].mean(0)
        texts = []
        for difference, form in zip(differences(FINE_TUNED, row["scores"]), (".4f", ".2%"), strict=True):
            low, high = interval(difference, groups)
            texts.append(f"{difference.mean():+{form}} [{low:+{form}}, {high:+{form}}]")
        cells = [name, f"{loss:.4f}", f"{error:.2%}", str(row["none"]), row["rates"], f"{row['runs']:.1f}", *texts]
        lines.append(f"| {' | '.join(cells)} | {cost(FINE_TUNED) / row['runs']:.2f} |")
    best = min(variants, key=lambda name: variants[name]["scores"].mean(0)[0])
    after, texts = variants[best], []
    for name, scores, runs in (
        ("the variant that is chosen by validation", scores_of(DARTS), cost(DARTS)),
        (f"the one with the smallest test log loss, known afterwards ({best})", after["scores"], after["runs"]),
    ):
        each = []
        for ours in (FINE_TUNED, FINE_TUNED + LEARNED):
            loss, error = (verdict(d, groups, cost(ours) / runs) for d in differences(ours, scores))
            each.append(f"{ours}: log loss {loss}; errors {error}")
        texts.append(f"Against {name}, {'. '.join(each)}.")
    aim = "**Fine-tuned, better than DARTS on each task at a fifth of its cost**, the aim. "
    return "\n".join(lines) + "\n\n" + aim + " ".join(texts)


def gaps_text(results: list[dict[str, Any]]) -> str:
    """Tabulates test scores of supernets, of discrete architectures with their weights, and of separate training."""
    lines = [
        "| search | measure | supernet, mixed | its weights, discrete | trained alone | discretization gap (discrete − "
        "mixed) [95 %] | trained alone − mixed [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        groups = groups_of([r])
        for label, supernets in r["supernets"].items():
            (mixed, discrete), alone = np.array(supernets).transpose(1, 0, 2), np.array(r["scores"][label])
            for column, measure, form in ((0, "log loss", ".4f"), (1, "error", ".2%")):
                texts = []
                for difference in (discrete - mixed, alone - mixed):
                    low, high = interval(difference[:, column], groups)
                    texts.append(f"{difference[:, column].mean():+{form}} [{low:+{form}}, {high:+{form}}]")
                means = [f"{x[:, column].mean():{form}}" for x in (mixed, discrete, alone)]
                lines.append(f"| {label}, {r['shape']} | test {measure} | {' | '.join([*means, *texts])} |")
    texts = {f"{label}, {r['shape']}" for r in results for label in (DARTS, FINE_TUNED) if label not in r["supernets"]}
    lacking = f"\nNot kept in parts of earlier code: {'; '.join(sorted(texts))}.\n" * bool(texts)
    return "\n".join(lines) + "\n" + lacking


def trust_text(result: dict[str, Any]) -> str:
    """Describes each fold: the number of left-out tasks, and the trust in features that they selected."""
    texts = []
    for num, trust in zip(result["left_out"], result["trust"], strict=True):
        texts.append(f"{num} tasks left out, which gave its reading the trust {trust}" if num else "none left out")
    return "; ".join(texts)


def picks(result: dict[str, Any]) -> str:
    """Describes the DARTS variant that each fold chose."""
    return ", ".join(f"({ORDERS[order]}, {reading}, {rate})" for order, reading, rate in result["darts"]["chosen"])


def random_text(result: dict[str, Any], few: int) -> str:
    """Describes the error of a single random network, and of the best of a few."""
    random, best = result["random"], np.mean(result["scores"][RANDOM.format(few)], 0)[1]
    return (
        f"{random['error']:.1%} of errors on {result['shape']} (mean of {random['networks']} networks on all "
        f"{random['tasks']} tasks; the best of {few} by validation, on those held out, {best:.1%})"
    )


def rates_text(config: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Describes the rate of α, and the DARTS variant that each fold chose."""
    most = max(max(r["tuned_on"]) for r in results)
    what = "which h did not learn from"
    if any(not num for r in results for num in r["left_out"]):
        what = "which h did not learn from where there are more than two families to leave one out of"
    by_shape = lambda tell: "; ".join(f"{r['shape']} {tell(r)}" for r in results)
    tuned = f"is {config['rates'][0]}, which was not tuned"
    if len(config["rates"]) > 1:
        by_fold = by_shape(lambda r: ", ".join(map(str, r["rates"])))
        tuned = f"is one of {', '.join(map(str, config['rates']))} (by fold: {by_fold})"
    chosen = [pick for r in results for pick in r["darts"]["chosen"]]
    largest = sum(rate == max(config["darts_rates"]) for _, _, rate in chosen)
    edge = f"; the largest rate that was tried in {largest} of {len(chosen)} folds" * (len(config["darts_rates"]) > 1)
    return (
        f"the rate of α of fine-tuning {tuned}; DARTS is of the orders {', '.join(config['darts_orders'])}, of the "
        f"rates {', '.join(map(str, config['darts_rates']))} and of the ways to read an architecture off α that one "
        f'(by fold: {by_shape(picks)}{edge}). They may let "none" count as an op, leave it out, or leave it out and '
        "keep the two strongest edges into a node, as published. Chosen are those with the smallest validation loss of "
        f"what they find on {most} tasks of the meta-training set, {what}. "
    )


def reading_text(result: dict[str, Any]) -> str:
    clock = result["costs"]["seconds"]
    run, look = clock["training run"], clock["look"]
    return (
        f"{(look + clock['gradients']) / run:.1f} training runs on {result['shape']} (a run {run:.4f} s; the look "
        f"{look:.4f}; gradients {clock['gradients']:.4f})"
    )


def choices_text(result: dict[str, Any], best: str) -> str:
    """Describes each fold: the number of architectures that h chose for the held-out tasks, and losses.

    The row `best` is added for comparison.
    """
    ends = np.cumsum(result["sizes"])
    by_fold = lambda rows: [rows[end - size : end] for end, size in zip(ends, result["sizes"], strict=True)]
    joint = lambda values: ", ".join(values)
    loss = lambda row: joint(f"{np.mean(part, 0)[0]:.3f}" for part in by_fold(result["scores"][row]))
    chosen = {"a*": A_STAR, RECORDS: RECORDS, BOTH: BOTH}
    texts = [
        f"{label}: {joint(str(len(set(part))) for part in by_fold(result['architectures'][label]))} (test log loss "
        f"{loss(row)})"
        for label, row in chosen.items()
        if label in result["architectures"]
    ]
    return (
        f"How many architectures there are for the {joint(map(str, result['sizes']))} held-out {result['shape']} of "
        f"each fold, {'; '.join(texts)}; {best} had {loss(best)}."
    )


def finish(details: dict[str, Any], path: Path) -> None:
    """Writes and prints the tables, and writes the picture."""
    config, results = details["config"], details["results"]
    most = 20 if 20 in config["trials"] else max(config["trials"])
    best, other_code = RANDOM.format(most), details["num_other_code"]
    each, took = lambda tell: " and ".join(map(tell, results)), f"{details['this_call']:.0f} s"
    text = f"# auto_architecture, {details['preset']}\n\n"
    text += f"![Differences, and what h chose for which task]({path.name}.png)\n\n"
    text += "\n".join(to_markdown(r) for r in results)
    text += "\n### Over all of them\n\n" + bars(results, most)
    text += "\n### DARTS's variants, over all of them\n\n" + darts_text(results) + "\n"
    text += "\n### Supernets, discrete and trained alone\n\n" + gaps_text(results)
    text += "\n**What h reads.** " + " ".join(map(what_h_reads, results)) + "\n"
    text += (
        f"\nA training run is {config['num_steps']} steps of {config['batch_size']} rows, of one network; an "
        "alternation of DARTS costs "
        + each(
            lambda r: (
                ", ".join(f"{x:.2f} ({ORDERS[order]})" for order, x in r["costs"]["operations"]["alternation"].items())
                + f" on {r['shape']}"
            )
        )
        + " of it, in operations, and one of fine-tuning "
        + each(lambda r: f"{r['costs']['operations']['fine-tuning']:.2f}")
        + ", which differentiates, as the exact order does. What h reads in a task (statistics of its "
        "rows, and gradients at random weights) has no count of operations, and is told by processor seconds against "
        "those of a training run, all on one core, per task and without compilation: "
        + each(reading_text)
        + ". Nothing is read where it is trusted nothing, and the rows are means over folds. Intervals are from a "
        "bootstrap over families. Random search is the mean over draws of which of the trained networks it saw, "
        "and takes the best of them by validation; a random network alone makes "
        + each(lambda r: random_text(r, min(config["trials"])))
        + ". "
        "Processor seconds are those of the parts of the work, each measured alone: searches on 8 tasks, four of them "
        "side by side, the rest on all tasks. "
        f"DARTS takes {config['darts_steps']} alternations, fine-tuning {config['fine_tune_steps']}; "
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
        + {0: "", 1: f"{took}, "}.get(details["processes"], f"{took}, with a process for each shape, ")
        + f"all calls together {details['seconds']:.0f} s of their processes ({details['processor']:.0f} processor "
        f"seconds){', each on one core' * hasattr(os, 'sched_setaffinity')}; "
        f"Python {platform.python_version()}, JAX {jax.__version__}."
        + (f" {other_code} of {details['num_parts']} parts are by other code than the script's." * (other_code > 0))
        + "\n"
    )
    Path(f"{path}.md").write_text(text)
    Path(f"{path}.json").write_text(json.dumps(details))
    plot(results, Path(f"{path}.png"))
    print(text)
    print(f"Results in {path}.md, .png and .json")
