"""The table of results, its sentences, and the picture."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from experiments import script
from experiments.few_shot.omniglot.evaluation import joined, of_seeds
from experiments.few_shot.omniglot.methods import SETTINGS
from experiments.few_shot.omniglot.training import Trained
from metaopt import evaluation, plots

LITERATURE = {(5, 1): 0.987, (5, 5): 0.999, (20, 1): 0.958, (20, 5): 0.989}  # MAML, transductive, the random split
SPREAD = " After the semicolon is the standard deviation over seeds."


def report(evaluations: dict[str, evaluation.Evaluation], trainings: dict[str, list[Trained]]) -> str:
    """Returns tables of inductive methods, transductive ones with the literature, normalizations, and validation.

    It ends with the missed aims.
    """
    whole = joined(evaluations)
    means = {setting: evaluation.mean_scores(result) for setting, result in whole.items()}

    def cell(name, setting):
        if name not in means[setting]:
            return ""
        ((mean, half),) = means[setting][name].values()
        each = evaluation.mean_scores(evaluations[setting])
        seeds = [mean for training in of_seeds(evaluations[setting])[name] for mean, _ in each[training].values()]
        spread = f"; {100 * np.std(seeds, ddof=1):.1f}" if len(seeds) > 1 else ""
        return f"{100 * mean:.1f} ± {100 * half:.1f}{spread}"

    names = list(dict.fromkeys(name for result in whole.values() for name in result.transductive))
    transductive = {name: any(result.transductive.get(name) for result in whole.values()) for name in names}
    cells = lambda name: [cell(name, setting) for setting in whole]
    plain = [name for name in transductive if not name.startswith("MAML, ")]
    text = script.table(
        ["accuracy, %: inductive", *whole], [[name, *cells(name)] for name in plain if not transductive[name]]
    )
    literature = {f"{w}w{s}s": f"{100 * LITERATURE[w, s]:.1f}" for w, s in SETTINGS}
    rows = [[name, *cells(name)] for name, flag in transductive.items() if flag]
    rows.append(["MAML, in the literature (random split)", *(literature.get(setting, "") for setting in whole)])
    text += "\n\nMethods that use the query set's own statistics:\n\n"
    text += script.table(["accuracy, %: transductive", *whole], rows)
    normalized = {name: "support" if name == "MAML" else name.removeprefix("MAML, ") for name in transductive}
    normalized = {name: result for name, result in normalized.items() if name.split(", ")[0] == "MAML"}
    if len(normalized) > 1:
        rows = [
            [result, "transductive" if transductive[n] else "inductive", *cells(n)] for n, result in normalized.items()
        ]
        text += "\n\nMAML, by the normalization of its network:\n\n"
        text += script.table(["normalization", "", *whole], rows)
    rows = []
    for name, each in trainings.items():
        steps = ["/".join(map(str, one.test_steps.values())) for one in each]
        rows.append([name, str(max(each[0].curve)), ", ".join(steps), " ".join(f"{x:.0f}" for _, x in mean_of(each))])
    text += (
        "\n\n"
        "Accuracy on validation characters during training, in %, with the shots of the training. The values are at "
        "equal distances from the first outer step to the last. Each value has the number of inner steps that is "
        "best there. For the chosen λ, this number is also used in the tests (with one shot/five):"
    )
    text += "\n\n" + script.table(["training", "outer steps", "inner steps at test", "validation"], rows)
    percent = {
        s: {name: 100 * mean for name, result in each.items() for mean, _ in result.values()}
        for s, each in means.items()
    }
    return text + "\n\n" + missed(percent, [name for name, flag in transductive.items() if flag])


def missed(means: dict[str, dict[str, float]], transductive: Collection[str]) -> str:
    """Lists missed aims. Numbers are rounded as in the tables before they are compared.

    The aims are that every method is above pixel prototypes, and that MAML has the literature's accuracy.

    Args:
      means: setting -> method -> mean accuracy in %.
      transductive: the transductive methods; MAML in the literature is one.
    """
    below: dict[str, list[str]] = {}
    for setting, accuracies in means.items():
        for name, mean in accuracies.items():
            if name != "pixel prototypes" and round(mean, 1) <= round(accuracies["pixel prototypes"], 1):
                below.setdefault(name, []).append(setting)
    text = f"The aim is that every method is above pixel prototypes. Those that are not: {script.listed(below)}."
    for name in transductive:
        if name.split(", ")[0] == "MAML":
            literature = [(f"{w}w{s}s", 100 * LITERATURE[w, s]) for w, s in SETTINGS]
            gaps = [f"{means[s][name] - mean:+.1f} ({s})" for s, mean in literature if name in means.get(s, {})]
            text += f" {name} minus the literature's MAML on the random split, in points: {', '.join(gaps)}."
    return text


def mean_of(trainings: list[Trained]) -> list[tuple[int, float]]:
    """Returns (outer step, validation accuracy in %), means over the seeds."""
    return [(step, 100 * float(np.mean([one.curve[step] for one in trainings]))) for step in trainings[0].curve]


def draw(
    evaluations: dict[str, evaluation.Evaluation],
    over_steps: evaluation.Evaluation | None,
    trainings: dict[str, list[Trained]],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = joined(evaluations)
    rows = ["ab"] if over_steps is None else ["ab", "cc"]
    figure, panels = plt.subplot_mosaic(
        [[*row] for row in rows], figsize=(13, len(rows) * (0.3 * len(trainings) + 2.5)), layout="constrained"
    )
    left, right = panels["a"], panels["b"]
    for i, (name, each) in enumerate(trainings.items()):
        left.plot(*zip(*mean_of(each), strict=True), "-o" if i < 10 else "--s", markersize=3, color=f"C{i}", label=name)
    left.set(xlabel="outer steps", ylabel="validation accuracy, %")
    left.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    setting = next(iter(whole))
    plots.ranking(whole[setting], axes=right)
    right.set(xlabel=f"accuracy on unseen characters, {setting}", title="")
    if over_steps is not None:
        below = plots.adaptation_curves(over_steps, axes=panels["c"], ylabel="accuracy on unseen characters, 5w1s")
        below.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
