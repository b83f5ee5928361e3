"""The tables and the picture of the result."""

from pathlib import Path

import numpy as np
from scipy import stats

from experiments import script
from experiments.hyperparameters.fine_tuning.images import JUDGED
from experiments.hyperparameters.fine_tuning.methods import LEARNED
from experiments.hyperparameters.fine_tuning.network import LAYERS


def values(runs: list[dict], name: str, source: str, shots: int) -> np.ndarray:
    return np.array([run["accuracies"][name, source, shots] for run in runs])


def mean_over_places(runs: list[dict], name: str, settings) -> np.ndarray:
    """Returns the mean accuracy over sources and numbers of images, [seeds]."""
    return np.mean([values(runs, name, source, shots) for source in JUDGED for shots in settings.shots], 0)


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Returns the mean of a − b and the half width of its 95 % interval over seeds."""
    gap = a - b
    if len(gap) < 2:
        return f"{gap.mean():+.1f}"
    return f"{gap.mean():+.1f} ± {stats.t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5:.1f}"


def report(runs: list[dict], settings) -> str:
    names = list(runs[0]["chosen"])
    places = [(source, shots) for source in JUDGED for shots in settings.shots]
    header = ["test accuracy, %", *(f"{JUDGED[source]}, {shots}" for source, shots in places), "mean"]
    rows, gaps = [], []
    for name in names:
        mean = mean_over_places(runs, name, settings)
        rows.append([name, *(script.spread(values(runs, name, *p), 1) for p in places), script.spread(mean, 1)])
        if name != LEARNED:
            gap = [difference(values(runs, LEARNED, *p), values(runs, name, *p)) for p in places]
            gaps.append([name, *gap, difference(mean_over_places(runs, LEARNED, settings), mean)])
    s, costs = settings, runs[0]["costs"]
    return "\n\n".join(
        [
            script.table(header, rows),
            f"Accuracy on test images, by source and images per class: mean ± standard deviation over {len(runs)} "
            "seeds, which differ in pre-training, training tasks and judged images. Each seed has a mean of "
            f"{s.draws} draws.",
            f"Difference of {LEARNED} from each baseline, with the 95 % interval over seeds (Student's t):",
            script.table(["minus", *header[1:]], gaps),
            "Learning rates and strengths of L2-SP (medians over seeds), from the input to the head:",
            script.table(
                ["method", "images", *(f"rate {n}" for n in LAYERS), *(f"strength {n}" for n in LAYERS)],
                [
                    [name, str(shots), *medians(runs, name, shots)]
                    for name in (LEARNED, "hand-set rates", "full fine-tuning")
                    for shots in s.shots
                ],
            ),
            f"Fine-tuning: {s.num_steps} steps of Adam on {s.batch} images. Learning takes {s.outer_steps} outer "
            f"steps on {len(s.shots)} tasks, the operations of {costs['learned']:.0f} fine-tunings; the grid of "
            f"hand-set rates takes {costs['grid']:.0f} fine-tunings.",
        ]
    )


def medians(runs: list[dict], name: str, shots: int) -> list[str]:
    points = [run["chosen"][name][shots] for run in runs]
    return [f"{np.median([float(p[part][n]) for p in points]):.2g}" for part in ("rate", "strength") for n in LAYERS]


def plot(runs: list[dict], settings, path: Path) -> None:
    """Plots accuracy by images per class, for each judged source."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(JUDGED), figsize=(10, 4), layout="constrained")
    for axis, (source, title) in zip(axes, JUDGED.items(), strict=True):
        for name in runs[0]["chosen"]:
            runs_values = np.array([values(runs, name, source, shots) for shots in settings.shots])
            error = runs_values.std(1, ddof=1) if len(runs) > 1 else np.zeros(len(settings.shots))
            axis.errorbar(settings.shots, runs_values.mean(1), error, marker="o", capsize=3, label=name)
        axis.set(xscale="log", title=title, xlabel="images per class", ylabel="test accuracy, %")
        axis.set_xticks(settings.shots, map(str, settings.shots))
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
