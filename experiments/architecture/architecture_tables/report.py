"""The tables of results and the picture."""

from pathlib import Path

import numpy as np

from experiments import script
from experiments.architecture.architecture_tables.cells import EDGE_OPS, PROBED, PROBES
from experiments.architecture.architecture_tables.choices import Outcomes
from experiments.architecture.architecture_tables.curves import MARKS

BARS = {  # stated before any run
    "TransNAS-Bench-101, micro": {"h, no trial": 0.88, "h, 5 trials": 0.975},
    "TransNAS-Bench-101, macro": {"h, no trial": 0.89, "h, 5 trials": 0.97},
    "NAS-Bench-Graph": {"h, no trial": 0.92, "h, 5 trials": 0.935},
}


def rows_of(name: str, judged: dict[str, np.ndarray]) -> list[list[str]]:
    """Returns a row per method: its mean, the value of each task, its wins and its bar.

    With several keys of training, the deviation is that of the mean over tasks, from key to key.
    """
    rows = []
    for method, values in judged.items():
        # The baseline with the same number of trials. Without such a baseline, the one without trials.
        rival = (
            "best of the other tasks" + method[method.rindex(",") :].replace(", no trial", "") if "," in method else ""
        )
        baseline = judged.get(rival, judged["best of the other tasks"])
        won = (values > baseline).sum(1)
        wins = f"{won.mean():.3g} of {values.shape[1]}" if method.startswith(("h", "mean")) else ""
        means, bar = values.mean(1), BARS[name].get(method)
        verdict = "" if bar is None else f"{bar} {'reached' if means.mean() >= bar else 'missed'}"
        if verdict and len(means) > 1:
            verdict = verdict.replace("missed", "missed; reached") + f" by {(means >= bar).sum()} of {len(means)} keys"
        mean = script.spread(means) if len(means) > 1 else f"{means[0]:.3f}"
        rows.append([method, mean, *(f"{v:.2f}" for v in values.mean(0)), wins, verdict])
    return rows


def about_ties(tasks: list[str], ties: list[np.ndarray]) -> list[str]:
    """Describes how much of validation's choice is chance, if several configurations are the best by validation."""
    texts = [
        f"{task}: {len(values)} configurations, of percentiles {values.min():.3f} to {values.max():.3f}"
        for task, values in zip(tasks, ties, strict=False)
        if len(values) > 1
    ]
    if not texts:
        return []
    low, mean, high = (np.mean([statistic(values) for values in ties]) for statistic in (np.min, np.mean, np.max))
    return [
        f'Several are the best by validation of the whole table ({"; ".join(texts)}). "All by validation" is their '
        f"mean; by which of them is taken, its mean over tasks is {low:.3f} to {high:.3f} ({mean:.3f} on average).",
        "",
    ]


def report(tables: dict[str, tuple[list[str], Outcomes]], curves, num_seeds: int, num_keys: int = 1) -> str:
    lines = [
        "The form of the model was chosen with the results of these left-out tasks in view. A run leaves out a task, "
        "not a table. The weights within h are chosen by leaving out one of the other tasks. The transformers "
        "of h and of h by cells were trained with "
        + (
            f"{num_keys} keys: their rows are means over them, with the standard deviation over keys of the mean over "
            "tasks."
            if num_keys > 1
            else "one key; how much hangs on it, the deviation over members says (`--train-seeds`)."
        ),
        "",
        '"h by digits" is a linear model of the digits of an architecture and of their pairs. "h by cells" is a '
        'transformer over the graphs of cells. "h" is the average of the other tasks\' scores, shrunk towards both '
        "(`nas.train_cell_searcher`). All learn from the other tasks of the table. They see nothing of the task that "
        'is left out, except its trials. Only "crossed", the transformer, also reads features of this task. For '
        f"TransNAS-Bench-101 they are the rank correlations of {len(PROBES)} training-free scores with operations, on "
        f"{PROBED} architectures ({', '.join(PROBES)}). For NAS-Bench-Graph they are the sizes of the graph. "
        '"Half of the table" is the mean over 40 random halves of the table, from each of which a method chooses an '
        "architecture. A choice from the whole table is one architecture, and its percentile is largely chance.",
        "",
    ]
    for name, (tasks, (judged, lost, alone, effects, ties)) in tables.items():
        header = ["", "mean", *tasks[: len(ties)], "better than the best of the others", "bar"]
        shown = script.spread(alone.mean(1).ravel())  # one seed each
        lines += [f"## {name}: percentile of what is chosen", "", script.table(header, rows_of(name, judged)), ""]
        lines += about_ties(tasks, ties)
        if name.endswith("micro"):
            lines += ["The form of h was chosen with these tables, so its rows do not test it.", ""]
        if effects:
            cells = np.unique(np.concatenate(list(effects.values())), axis=0).tolist()
            named = "; ".join(", ".join(EDGE_OPS[name][x] for x in cell) for cell in cells)
            lines += [f"The cells by mean effects of ops, on the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3: {named}.", ""]
            if len(cells) == 1:
                lines += [
                    'It is one cell, for every held-out task and with every h. So the rows "mean effects" measure '
                    "the effects of single ops, and not h. In this space, a good cell depends on the combination of "
                    "its ops, which effects of single ops do not show.",
                    "",
                ]
        members = "the members of all keys" if num_keys > 1 else "members"
        lines += [f'Single members of "h by cells", mean over tasks and deviation of that over {members}: {shown}.', ""]
        if name == "NAS-Bench-Graph":  # the other tables' tasks have their own units
            lines += [
                "Test error minus the test error of the best by validation of the whole table, in percentage points:"
            ]
            rows = [[method, f"{100 * values.mean():+.2f}"] for method, values in lost.items()]
            lines += ["", script.table(["method", "points"], rows), ""]
    lines += ["## Regret curves", ""]
    rows = []
    for (name, task), judged in curves.items():
        for method, values in judged.items():
            shown = []
            for mark in MARKS:
                if mark <= values.shape[1]:
                    at_mark = values[:, mark - 1]
                    band = 1.96 * at_mark.std(ddof=1) / np.sqrt(len(at_mark)) if len(at_mark) > 1 else 0.0
                    shown.append(f"{at_mark.mean():.3g} ± {band:.1g}" if len(at_mark) > 1 else f"{at_mark.mean():.3g}")
                else:
                    shown.append("")
            rows.append([name, task, method, *shown])
    lines.append(script.table(["table", "task", "", *(f"after {m}" for m in MARKS)], rows))
    lines += [
        "",
        "- Percentiles are among the test losses of the task (of TransNAS-Bench-101, which has none, validation "
        "losses).\n"
        "- Test regret is in the units of the table, for the best by validation so far: mean and 95 % band over "
        f"{num_seeds} seeds, by the number of trained architectures. This includes tables without training seconds.\n"
        "- Regularized evolution: population 10, samples of 3. It cannot run if the table lacks some combinations of "
        "the digits, because it would ask for them.",
    ]
    return "\n".join(lines)


def plot(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods_shown = list(dict.fromkeys(method for regret in curves.values() for method in regret))
    columns = 3
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, ((name, task), regret) in zip(axes.flat, curves.items(), strict=False):
        for method, values in regret.items():
            steps, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
            color = f"C{methods_shown.index(method)}"
            (line,) = axis.plot(steps, mean, "--" if len(values) == 1 else "-", color=color, label=method)
            if len(values) > 1:
                band = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
                axis.fill_between(steps, mean - band, mean + band, color=line.get_color(), alpha=0.3)
        axis.set(title=f"{name}: {task}", xscale="log", xlabel="trained architectures", ylabel="test regret")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
