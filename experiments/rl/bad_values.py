"""Does a bad rate or do the other bad values keep an actor-critic from tuning its hyperparameters?

`meta_gradients.py` tunes from two bad starts. It succeeds from the start with a rate that is too small, and fails from
the start with a rate that is too large. All five values are bad in both starts, so neither shows the effect of one
value. Here the starts combine a rate with the other four values, which are the reference or `actor_critic.OTHER_START`.
From each start there are runs with fixed hyperparameters, with all five tuned, and with only the rate tuned. Everything
else is as in `meta_gradients.py`, including the outer rate, the outer loss and the seeds.

    python experiments/rl/bad_values.py --full     # minutes; writes results/rl_bad_values.md and .png
    python experiments/rl/bad_values.py            # five seeds
    python experiments/rl/bad_values.py --smoke    # seconds; prints only
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import script
from experiments.rl import actor_critic, environments, meta_gradients, scores, searches
from experiments.rl.actor_critic import OTHER_START, REFERENCE, SPACE, START

STARTS = {
    f"{name}, rate {rate:g}": {**values, "rate": rate}
    for name, values, rate in [
        ("reference", REFERENCE, START["rate"]),
        ("reference", REFERENCE, OTHER_START["rate"]),
        ("other bad values", OTHER_START, 0.01),
        ("other bad values", OTHER_START, OTHER_START["rate"]),
    ]
}
TUNED = {"fixed": (), "rate tuned": ("rate",), "all tuned": tuple(SPACE)}


def measure(name: str, settings: meta_gradients.Settings, keep: Callable) -> dict[str, dict[str, np.ndarray]]:
    """Returns start and tuned values -> {"score": [seeds], "rate": [seeds] at the end} of one family."""
    programs, keys = meta_gradients.make_programs(name, settings), searches.run_keys(range(settings.seeds))

    def run(start, names):
        if not names:
            z = searches.coordinates([start] * settings.seeds)
            curves, rates = (
                programs.trainer.train(keys, z, settings.num_updates),
                np.full(settings.seeds, start["rate"]),
            )
        else:
            curves, paths = meta_gradients.tune_all(programs, keys, settings, start, names=names)
            rates = paths["rate"][:, -1]
        return {"score": programs.family.score(searches.final(curves)), "rate": rates}

    results = {}
    for label, start in STARTS.items():
        for kind, names in TUNED.items():
            make = lambda start=start, names=names: run(start, names)
            results[f"{label}, {kind}"] = keep(f"{name}, {label}, {kind}", make)
    return results


def report(results: dict[str, dict], settings: meta_gradients.Settings) -> str:
    rows = []
    for method in next(iter(results.values())):
        values = np.stack([family[method]["score"] for family in results.values()])
        ends = [np.median(family[method]["rate"]) for family in results.values()]
        cells = [meta_gradients.interval_text(row[None]) for row in values]
        label, kind = method.rsplit(", ", 1)
        ends_text = ", ".join(f"{end:.2g}" for end in ends)
        rows.append([label, kind, *cells, meta_gradients.interval_text(values), ends_text])
    return (
        "Interquartile mean of the score over seeds, with a 95 % stratified bootstrap interval. "
        f"{meta_gradients.failures(results)}\n\n"
        f"{script.table(['start', 'tuned', *results, 'all', 'rate at the end'], rows)}\n\n"
        f"The last column has medians over seeds, in the order of the environments. {settings.num_updates} updates, "
        f"outer Adam with rate {settings.outer_rate}; seeds 0 to {settings.seeds - 1}."
    )


def plot(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STARTS), figsize=(11, 3.6), layout="constrained", sharey=True)
    for ax, label in zip(axes, STARTS, strict=True):
        for color, kind in enumerate(TUNED):
            values = [family[f"{label}, {kind}"]["score"] for family in results.values()]
            intervals = [scores.interval(value[None]) for value in values]
            place = np.arange(len(intervals)) + 0.25 * (color - 1)
            middle = np.array([m for m, _, _ in intervals])
            errors = [[m - low for m, low, _ in intervals], [high - m for m, _, high in intervals]]
            ax.bar(place, middle, 0.25, yerr=np.maximum(errors, 0), color=f"C{color}", label=kind)
        ax.set_xticks(range(len(results)), list(results))
        ax.set_title(label, fontsize=10)
    axes[0].set_ylabel("score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=5)
    parser.add_argument("--full", action="store_true", help="20 seeds")
    parser.add_argument("--families", nargs="*", default=meta_gradients.FAMILY_NAMES, help="only these families")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished parts")
    args = parser.parse_args()
    settings = meta_gradients.Settings(seeds=20 if args.full else args.seeds)
    if args.smoke:
        settings, args.families = meta_gradients.SMOKE, args.families[:1]
    files = [Path(module.__file__) for module in (actor_critic, environments, meta_gradients, scores, searches)]
    folder = None if args.keep is None or args.smoke else script.work_folder(args.keep, Path(__file__), *files)
    keep, seconds = script.timed_parts(folder and folder / f"{settings.seeds}_seeds")
    results = {name: measure(name, settings, keep) for name in args.families}
    title = "Meta-gradients from bad values: the rate and the others"
    script.publish(__file__, title, report(results, settings), args, name="rl_bad_values", seconds=sum(seconds))
    if not args.smoke:
        plot(results, args.out / "rl_bad_values.png")


if __name__ == "__main__":
    script.run(main)
