"""Joins the results of the folds; the cost of each row; differences and their intervals."""

from typing import Any

import numpy as np

from experiments.architecture.auto_architecture.config import Config

# Rows of the table of results.
LEARNED = ", from the learned start"
A_STAR = "a* = h(t'), no trial"
FIXED = "best fixed architecture"
FINE_TUNED = "a* fine-tuned"
IGNORANT = "h of the average task"
DARTS = "DARTS on each task"
RECORDS = "h from records, no trial"
BOTH = "h by hypergradient and from records, no trial"
RANDOM = "random search, {} networks"
EVOLUTION = "regularized evolution, {} networks"


def joined(parts: list[dict[str, Any]], costs: dict[str, Any], random: np.ndarray, config: Config) -> dict[str, Any]:
    """Joins the results of several folds of one shape.

    Args:
      parts: results of each fold, with the results of DARTS in "darts", by order.
      costs: "operations" and "seconds" of the parts of the work; for DARTS by order.
      random: [networks, tasks, 3] outcomes of random networks, on all tasks.
      config: the configuration of the run.
    """
    sizes = [len(part["tasks"]) for part in parts]
    end_to_end = lambda name: [x for part in parts for x in part[name]]
    by_label = lambda name: {
        label: [x for part in parts for x in part[name][label]] for label in parts[0][name] if label != "DARTS"
    }
    chosen = [best_variant(part["darts"]) for part in parts]
    labels = {**dict.fromkeys(parts[0]["scores"]), DARTS: None}  # older parts have their own DARTS row
    parts = [
        {
            **part,
            "scores": {**part["scores"], DARTS: part["darts"][order]["scores"][reading]},
            "supernets": {
                FINE_TUNED: part.get("supernets", {}).get(FINE_TUNED),
                DARTS: part["darts"][order].get("supernets", {}).get(reading),
            },
        }
        for part, (order, reading, _) in zip(parts, chosen, strict=True)
    ]
    trust = [part["trust"] for part in parts]
    runs, seconds = prices(list(labels), costs, trust, sizes, [order for order, _, _ in chosen], config)
    variants = []
    for order, own in parts[0]["darts"].items():
        alone = prices([DARTS], costs, trust, sizes, [order] * len(parts), config)
        variants += [
            {
                "order": order,
                "reading": reading,
                "scores": [x for part in parts for x in part["darts"][order]["scores"][reading]],
                "rates": [part["darts"][order]["rate"][reading] for part in parts],
                "valid": float(np.average([min(part["darts"][order]["losses"][reading]) for part in parts])),
                "none": [
                    ", none" in ", " + x for part in parts for x in part["darts"][order]["architectures"][reading]
                ],
                "runs": alone[0][DARTS],
                "seconds": alone[1][DARTS],
            }
            for reading in own["scores"]
        ]
    return {
        **{name: parts[0][name] for name in ("shape", "features", "ops", "space", "num_folds")},
        **{name: end_to_end(name) for name in ("tasks", "families", "values")},
        **{name: by_label(name) for name in ("scores", "weights", "architectures")},
        **{name: [part[name] for part in parts] for name in ("trust", "left_out", "tuned_on", "history")},
        "scores": {label: [x for part in parts for x in part["scores"][label]] for label in labels},
        "supernets": {
            label: [x for part in parts for x in part["supernets"][label]]
            for label in (DARTS, FINE_TUNED)
            if all(part["supernets"][label] is not None for part in parts)  # older parts have none
        },
        "rates": [part["rates"][FINE_TUNED] for part in parts],
        "darts": {"chosen": chosen, "variants": variants},
        "random": {"error": float(random[:, :, 2].mean()), "networks": random.shape[0], "tasks": random.shape[1]},
        "sizes": sizes,
        "costs": costs,
        "seconds": seconds,
        "runs": runs,
    }


def best_variant(darts: dict[str, Any]) -> tuple[str, str, float]:
    """Returns order, reading and rate with the smallest validation loss on the tuning tasks."""
    losses = {
        (order, reading, rate): loss
        for order, variants in darts.items()
        for reading, by_rate in variants["losses"].items()
        for rate, loss in zip(variants["rates"], by_rate, strict=True)
    }
    return min(losses, key=losses.__getitem__)


def costs_of(kept: dict[str, Any], shape: str) -> dict[str, Any]:
    """Returns the costs of the parts of the work on one task, for DARTS by order."""
    costs, darts = kept[f"{shape}, costs"], kept[f"{shape}, costs of DARTS"]
    clock, by_order = costs["seconds"], darts["seconds"]
    # Older parts timed the second order of DARTS in the same run as a training run, and all orders in a later run.
    # Machines differ, so all orders are scaled such that the second one has its time in the first run.
    scale = clock["DARTS"] / by_order["second"] if "DARTS" in clock else 1.0
    return {
        "operations": {"fine-tuning": costs["operations"]["fine-tuning"], "alternation": darts["operations"]},
        "seconds": {**clock, "DARTS": {order: scale * x for order, x in by_order.items()}},
    }


def prices(labels, costs, trust: list[float], sizes: list[int], orders: list[str], config: Config) -> tuple[dict, dict]:
    """Returns each row's cost on a new task: in training runs, by operations, and in processor seconds.

    The operations for the inputs of h are not counted. Their cost is the ratio of their processor seconds to those of a
    training run. If the trust is 0, the inputs are not needed and cost nothing. `trust`, `sizes` and `orders` (of
    DARTS) have one entry per fold. All tasks have the same weight.
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
    of_darts = lambda by_order: np.average([by_order[order] for order in orders], weights=sizes)
    runs[DARTS] += config.darts_steps * of_darts(operations["alternation"])
    seconds[DARTS] += of_darts(clock["DARTS"])
    trained = {RANDOM.format(t): t for t in config.trials} | {EVOLUTION.format(config.evolution): config.evolution}
    for label in set(labels) & set(trained):
        runs[label], seconds[label] = float(trained[label]), trained[label] * run
    return {k: float(x) for k, x in runs.items()}, {k: float(x) for k, x in seconds.items()}


def report(scores: dict[str, np.ndarray], families: list[str], reference: str) -> dict[str, dict[str, float]]:
    """Returns means, mean ranks, and paired differences to `reference`.

    The 95 % intervals are from a bootstrap over families.
    """
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
    """Returns the 95 % interval of the mean over tasks, by drawing families with replacement."""
    rng = np.random.default_rng(0)
    draws = [np.concatenate([groups[g] for g in rng.integers(0, len(groups), len(groups))]) for _ in range(num_draws)]
    low, high = np.percentile([difference[d].mean() for d in draws], [2.5, 97.5])
    return float(low), float(high)


def groups_of(results: list[dict[str, Any]]) -> list[np.ndarray]:
    """Returns the tasks of each family, over all shapes."""
    families = [f"{r['shape']} {f}" for r in results for f in r["families"]]
    return [np.flatnonzero(np.array(families) == f) for f in sorted(set(families))]
