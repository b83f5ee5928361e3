"""Is the g of regression better than that of classification, for networks that predict intervals of a number?"""

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments import script
from experiments.automl import tables
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer import compare, pool
from experiments.hyperparameters.transfer.config import Config
from experiments.hyperparameters.transfer.report import family_means, interval
from metaopt import automl, spaces
from metaopt.automl import _network_folds

NUM_SEEDS = 3
G, OTHER, ONE = "g of regression", "g of classification", "one λ for all"


def compare_regression(config: Config, folder: Path, args) -> None:
    """Writes a page: losses on development tasks of the corpus, and of `AutoRegressor` on its development tables.

    The losses on tasks are those of the g in `folder`. `AutoRegressor` uses the shipped ones, so `ship` comes first.
    """
    network = make_network(config.run)
    parts = [compare.development(part) for part in pool.load_pools(config, folder)]
    family = np.concatenate([part.family for part in parts])

    def methods(raw):
        own = compare.coordinates([folder], raw, network.space)
        return {
            ONE: own[f"{folder.name}: one λ for all"],
            OTHER: compare.predicted_by(automl.shipped_predictor(), raw),
            G: own[f"{folder.name}: mean of g"],
        }

    losses = {}
    for name in ("log_loss", "rank_error"):
        by_method = compare.losses_of(dataclasses.replace(config, outer_loss=name), parts, methods)
        losses[name] = {label: family_means(values, family) for label, values in by_method.items()}
    errors = estimator_errors(args)
    text = (
        f"{len(family)} development tasks of {len(set(family))} families:{table(losses)}\n\n"
        f'`AutoRegressor(preset="instant")` on development tables, {NUM_SEEDS} splits and seeds:'
        f"{table_of_errors(errors)}"
    )
    out = SimpleNamespace(smoke=args.smoke, out=script.RESULTS)
    if not args.smoke:
        plot(losses, script.RESULTS / "transfer_regression.png")
    script.publish(Path(__file__).parent, "A g for regression", text, out, name="transfer_regression")


def estimator_errors(args) -> dict[str, dict[str, list[float]]]:
    """Returns method -> table -> the test RMSE of each seed, in deviations of the target."""
    default = jax.device_get(spaces.default(automl.tabular_network().space))
    own = _network_folds.predicted
    chosen = {"default λ": lambda *_: default, OTHER: lambda _, features: own("classification", features), G: own}
    errors: dict[str, dict[str, list[float]]] = {label: {} for label in chosen}
    for seed in range(NUM_SEEDS):
        options: Any = SimpleNamespace(
            development=True,
            instant=False,
            smoke=False,
            ablations=False,
            fifteen=False,
            tables=None,
            seed=seed,
            time=60.0,
        )
        for split in [split for split in tables.load(options) if not split.is_class]:
            for label, predicted in chosen.items():
                with mock.patch.object(_network_folds, "predicted", predicted), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result, _ = tables.auto(split, seed, options, preset="instant")
                errors[label].setdefault(split.table.name, []).append(tables.loss(result, split)[0])
    return errors


def table(losses: dict[str, dict[str, np.ndarray]]) -> str:
    header, rows = ["method"], [[label] for label in next(iter(losses.values()))]
    for name, values in losses.items():
        header += [name.replace("_", " "), f"difference to {G} [95 %]"]
        for row in rows:
            difference = values[row[0]] - values[G]
            low, high = interval(difference)
            mean = f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}], better on {np.mean(difference < 0):.0%}"
            row += [f"{values[row[0]].mean():.4f}", "" if row[0] == G else mean]
    return "\n\n" + script.table(header, rows)


def table_of_errors(errors: dict[str, dict[str, list[float]]]) -> str:
    names = list(errors[G])
    rows = [
        [label, f"{np.mean(list(values.values())):.4f}", *(script.spread(values[name], 4) for name in names)]
        for label, values in errors.items()
    ]
    return "\n\n" + script.table(["method", "RMSE / deviation", *names], rows)


def plot(losses: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """The mean loss of each method minus that of the g of regression, with intervals over families."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2), layout="constrained", sharey=True)
    others = [label for label in losses["log_loss"] if label != G]
    for axis, (name, values) in zip(axes, losses.items(), strict=True):
        for place, label in enumerate(others):
            difference = values[label] - values[G]
            low, high = interval(difference)
            mean = difference.mean()
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=f"C{place}")
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set(
            xlabel=f"{name.replace('_', ' ')} minus that of the {G}", yticks=range(len(others)), yticklabels=others
        )
    axes[0].set_ylim(-0.5, len(others) - 0.5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
