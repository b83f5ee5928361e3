"""The page of the result: tables and sentences.

No part of a result depends on this file. If it changes, finished parts still count as made by the same code.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import script
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
    return "\n  - ".join(texts)


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
            f"- {first} against {second}:\n  - {compared(a, b, groups)}\n  - cost {runs[0]:.1f} and {runs[1]:.1f} "
            f"training runs, {runs[0] / runs[1]:.2f} of it, and {seconds[0]:.3f} and {seconds[1]:.3f} processor "
            f"seconds, {seconds[0] / seconds[1]:.2f} of it"
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
        ("the variant chosen by validation", scores_of(DARTS), cost(DARTS)),
        (
            f"the variant with the smallest test log loss, known only afterwards ({best})",
            after["scores"],
            after["runs"],
        ),
    ):
        each = []
        for ours in (FINE_TUNED, FINE_TUNED + LEARNED):
            loss, error = (verdict(d, groups, cost(ours) / runs) for d in differences(ours, scores))
            each += [f"  - {ours}: log loss {loss}", f"  - {ours}: errors {error}"]
        texts += [f"- Against {name}:", *each]
    aim = "**The aim: fine-tuning is better than DARTS on each task, at a fifth of its cost.**"
    return "\n".join([*lines, "", aim, "", *texts])


def gaps_text(results: list[dict[str, Any]]) -> str:
    """Tabulates test scores of supernets, of discrete architectures with their weights, and of separate training."""
    lines = [
        "| search | measure | supernet, mixed | its weights, discrete | retrained | discretization gap (discrete − "
        "mixed) [95 %] | retrained − mixed [95 %] |",
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
        texts.append(f"{num} tasks (trust {trust})" if num else "none")
    return ", ".join(texts)


def picks(result: dict[str, Any]) -> str:
    """Describes the DARTS variant that each fold chose."""
    return ", ".join(f"({ORDERS[order]}, {reading}, {rate})" for order, reading, rate in result["darts"]["chosen"])


def random_text(result: dict[str, Any], few: int) -> str:
    """Describes the error of a single random network, and of the best of a few."""
    random, best = result["random"], np.mean(result["scores"][RANDOM.format(few)], 0)[1]
    return (
        f"{random['error']:.1%} of errors on {result['shape']} (mean of {random['networks']} networks on all "
        f"{random['tasks']} tasks; the best of {few} by validation has {best:.1%} on the held-out tasks)"
    )


def rates_text(config: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """Describes the rate of α, and the DARTS variant that each fold chose."""
    most = max(max(r["tuned_on"]) for r in results)
    unseen = "which h did not learn from"
    if any(not num for r in results for num in r["left_out"]):
        unseen += " if there are more than two families, so that one can be left out"
    by_shape = lambda describe: "; ".join(f"{r['shape']} {describe(r)}" for r in results)
    tuned = f"is {config['rates'][0]}, which was not tuned."
    if len(config["rates"]) > 1:
        by_fold = by_shape(lambda r: ", ".join(map(str, r["rates"])))
        tuned = f"is one of {', '.join(map(str, config['rates']))}. By fold: {by_fold}."
    chosen = [pick for r in results for pick in r["darts"]["chosen"]]
    largest = sum(rate == max(config["darts_rates"]) for _, _, rate in chosen)
    edge = f" {largest} of {len(chosen)} folds chose the largest rate." * (len(config["darts_rates"]) > 1)
    return [
        f"The rate of α in fine-tuning {tuned}",
        f"DARTS has the orders {', '.join(config['darts_orders'])}, the rates "
        f"{', '.join(map(str, config['darts_rates']))}, and several ways to derive an architecture from α. Chosen by "
        f"fold: {by_shape(picks)}.{edge}",
        'Three ways to derive an architecture: "none" counts as an op, or it is left out, or it is left out and a node '
        "keeps its two strongest incoming edges, as published.",
        "The choices above have the smallest validation loss of the resulting networks on "
        f"{most} tasks of the meta-training set, {unseen}.",
    ]


def reading_text(result: dict[str, Any]) -> str:
    clock = result["costs"]["seconds"]
    run, look = clock["training run"], clock["look"]
    return (
        f"{(look + clock['gradients']) / run:.1f} training runs on {result['shape']} (a run {run:.4f} s; statistics "
        f"{look:.4f}; gradients {clock['gradients']:.4f})"
    )


def choices_text(result: dict[str, Any], best: str) -> str:
    """Returns a table: in each fold, the number of architectures for the held-out tasks, and losses.

    The row `best` is added for comparison.
    """
    ends = np.cumsum(result["sizes"])
    by_fold = lambda rows: [rows[end - size : end] for end, size in zip(ends, result["sizes"], strict=True)]
    joint = lambda values: ", ".join(values)
    loss = lambda row: joint(f"{np.mean(part, 0)[0]:.3f}" for part in by_fold(result["scores"][row]))
    chosen = {"a*": A_STAR, RECORDS: RECORDS, BOTH: BOTH}
    rows = [
        [label, joint(str(len(set(part))) for part in by_fold(result["architectures"][label])), loss(row)]
        for label, row in chosen.items()
        if label in result["architectures"]
    ]
    title = f"{joint(map(str, result['sizes']))} held-out {result['shape']}, by fold"
    return script.table([title, "number of architectures", "test log loss"], [*rows, [best, "", loss(best)]])


def settings_text(details: dict[str, Any], best: str) -> str:
    """Describes the costs, the settings and the choices of each fold."""
    config, results = details["config"], details["results"]
    each = lambda describe: " and ".join(map(describe, results))
    alternation = lambda r: (
        ", ".join(f"{x:.2f} ({ORDERS[order]})" for order, x in r["costs"]["operations"]["alternation"].items())
        + f" on {r['shape']}"
    )
    fine_tuning = lambda r: f"{r['costs']['operations']['fine-tuning']:.2f}"
    items = [
        f"A training run is {config['num_steps']} steps of {config['batch_size']} rows, of one network. Costs are in "
        "training runs, by operations.",
        f"An alternation of DARTS costs {each(alternation)}.",
        f"An alternation of fine-tuning costs {each(fine_tuning)}. It differentiates, as the exact order does.",
        "The features that h reads (statistics of a task's rows, and gradients at random weights) have no count of "
        "operations. Their cost is the ratio of their processor seconds to those of a training run. Both are per task, "
        f"on one core and without compilation. The ratio is {each(reading_text)}.",
        "A fold that does not trust the features does not compute them. The rows are means over folds.",
        "Intervals are from a bootstrap over families.",
        "Random search takes the best network by validation. Its scores are means over draws of the trained networks "
        f"that it saw. A single random network makes {each(lambda r: random_text(r, min(config['trials'])))}.",
        "Processor seconds are measured separately for each part of the work: searches on 8 tasks, four of them side "
        "by side, the rest on all tasks.",
        f"DARTS takes {config['darts_steps']} alternations, and fine-tuning {config['fine_tune_steps']}.",
        *rates_text(config, results),
        *(
            f"Of {r['shape']}, {len(r['trust'])} of {r['num_folds']} folds were held out. In each fold, some of the "
            f"other tasks were left out to choose the trust in the features: {trust_text(r)}."
            for r in results
        ),
        *([details["note"]] if details["note"] else []),
    ]
    tables = "\n\n".join(choices_text(r, best) for r in results)
    return "\n".join(f"- {item}" for item in items) + f"\n\nThe architectures that each fold chose:\n\n{tables}\n"


def finish(details: dict[str, Any], path: Path) -> None:
    """Writes and prints the tables, and writes the picture."""
    config, results = details["config"], details["results"]
    most = 20 if 20 in config["trials"] else max(config["trials"])
    best, other_code = RANDOM.format(most), details["num_other_code"]
    took = f"{details['this_call']:.0f} s"
    text = f"# auto_architecture, {details['preset']}\n\n"
    text += f"![Differences, and what h chose for which task]({path.name}.png)\n\n"
    text += "\n".join(to_markdown(r) for r in results)
    text += "\n### Over all of them\n\n" + bars(results, most)
    text += "\n### DARTS's variants, over all of them\n\n" + darts_text(results) + "\n"
    text += "\n### Supernets, discrete and retrained\n\n" + gaps_text(results)
    text += "\n### The features that h reads\n\n" + "\n\n".join(map(what_h_reads, results)) + "\n"
    text += f"\n### Settings and costs\n\n{settings_text(details, best)}\n"
    text += (
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
