"""The tables of results, their sentences, and the picture."""

from pathlib import Path

import numpy as np

from experiments import script
from experiments.few_shot.small_meta_dataset.methods import BATCH, CHECKED, RATES, UNTRAINED, Settings
from experiments.few_shot.small_meta_dataset.training import Methods
from metaopt import evaluation, plots


def joined(result: evaluation.Evaluation, seeds: dict[str, list[str]]) -> evaluation.Evaluation:
    """Joins the seeds of each method: an episode's score is the mean over the seeds of its trainings."""
    mean = lambda source, names: np.mean([result.scores[name][source] for name in names], axis=0)
    return result._replace(
        scores={name: {s: mean(s, names) for s in result.sources} for name, names in seeds.items()},
        transductive={name: any(result.transductive[n] for n in names) for name, names in seeds.items()},
    )


def by_number(result: evaluation.Evaluation) -> str:
    """Tabulates accuracy against ways and shots, over the episodes of all sources."""
    rows: dict[str, list[str]] = {name: [name] for name in result.scores}
    header = [""]
    for what, edges in (("ways", (5, 6, 7, 8, 9)), ("shots", (1, 2, 3, 4, 9))):
        binned = evaluation.by_number(result, what, edges)
        if what == "ways":
            header += [f"{number:.0f} ways" for number, *_ in next(iter(binned.values()))]
        else:
            header += [f"{number:.1f} shots" for number, *_ in next(iter(binned.values()))]
        for name, bins in binned.items():
            # A single episode has no interval.
            rows[name] += [f"{mean:.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "") for _, _, mean, half in bins]
    return script.table(header, list(rows.values()))


def missed(means: dict[str, dict[str, float]], against: dict[str, tuple[float, float]]) -> str:
    """Lists methods that miss the aim, which is to be above pixel prototypes.

    Numbers are rounded as in the table before they are compared.

    Args:
      means: method -> source -> mean accuracy.
      against: method -> the difference to pixel prototypes, mean over the sources and half of its interval.
    """
    trained = [name for name in means if name not in ("pixel prototypes", UNTRAINED)]
    bar = means["pixel prototypes"]
    below = {name: [s for s, mean in means[name].items() if round(mean, 3) <= round(bar[s], 3)] for name in trained}
    level = [name for name in trained if round(against[name][0], 3) <= round(against[name][1], 3)]
    return (
        f"The aim is that every method is above pixel prototypes. Means that are not: {script.listed(below)}. Over all "
        f"sources, the interval of the difference is not above 0 of: {'; '.join(level) or 'none'}."
    )


def draw(result: evaluation.Evaluation, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    plots.ranking(result, axes=left)
    left.set(xlabel="accuracy, mean over sources", title="")
    # There are more methods than colors.
    right.set_prop_cycle(color=[*matplotlib.colormaps["tab10"].colors] * 2, linestyle=["-"] * 10 + ["--"] * 10)
    plots.scores_by_number(result, "shots", (1, 2, 3, 4, 9), axes=right, ylabel="accuracy")
    right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(each: evaluation.Evaluation, result: evaluation.Evaluation, methods: Methods) -> str:
    """Returns the tables. `each` has all seeds, and `result` their means."""
    text = evaluation.leaderboard(result, reference="pixel prototypes")
    whole_means = evaluation.mean_scores(result)
    pairs = evaluation.paired_differences(result, "pixel prototypes")
    over_sources = {
        name: np.array(list(values.values())) for name, values in pairs.items()
    }  # the same as in `leaderboard`
    text += "\n" + missed(
        {name: {source: mean for source, (mean, _) in values.items()} for name, values in whole_means.items()},
        {
            name: (values[:, 0].mean(), float(np.hypot.reduce(values[:, 1])) / len(values))
            for name, values in over_sources.items()
        },
    )
    text += "\n"
    means = evaluation.mean_scores(each)
    of_seeds = {
        name: [np.mean([m for m, _ in means[one].values()]) for one in all_] for name, all_ in methods.names.items()
    }
    text += "\nMean over the sources, by seed:\n\n"
    text += script.table(["", "by seed"], [[name, ", ".join(f"{x:.3f}" for x in xs)] for name, xs in of_seeds.items()])
    text += "\n\nAgainst the numbers of ways and of shots (support examples for each way, in four bins):\n\n"
    text += by_number(result)
    return text


def circumstances(settings: Settings, seeds: int, chosen: list[str]) -> str:
    """Returns paragraphs on the sizes, and on how methods and settings were chosen."""
    return (
        "\n\n"
        "**Setup.**\n\n"
        f"- Accuracies are means over {seeds} seed(s), which differ in initialization and training episodes. ± is "
        "95 % over episodes.\n"
        f"- The features are {settings.filters} filters in each of two blocks, normalized by the support set, and the "
        "image next to them. The mean of the support set is subtracted from the image.\n"
        f"- Training takes {settings.steps} outer steps of {settings.tasks} episodes. Fine-tuning takes "
        f"{settings.plain_steps:,} steps of {BATCH} rows, at a tenth of the cost. There is one training for each "
        "source that is left out.\n"
        "- Episodes have 5 to 8 ways, and at most 40 support and 5 query examples of a class.\n"
        '- "Untrained" is the same method with a network drawn from the same distribution.\n'
        "- Inner steps in training are 2 (Proto-MAML, CAVIA) or 5. The inner gradients of Proto-MAML and Meta-SGD "
        "are of first order, and their rates are learned, one per leaf.\n"
        "- CAVIA's context scales and shifts the features, which a head of prototypes reads.\n"
        f"- Inner steps at test are at most 15 (iMAML 20, Reptile and BOIL 30). Fine-tuning's rate is one of {RATES}. "
        f"Both are the best on {CHECKED} episodes of the training sources: {', '.join(chosen)}. If the chosen value "
        "is the largest one, larger values might be better.\n"
        "- MAML++ has a rate and a loss for every step, but no separate normalization for each step.\n\n"
        "**Choice of settings.**\n\n"
        "- Earlier versions lost to pixel prototypes on these sources:\n"
        "  - most methods without the image among their features, and with larger fixed rates\n"
        "  - Meta-SGD with 3 inner steps, 5 at test and half as many outer steps\n"
        "  - fine-tuning after 200 steps\n"
        "  - iMAML, Reptile and BOIL with the settings of MAML (-.288, -.037, -.050), whose rate is too large for "
        "iMAML\n"
        "- All of these settings were changed after these results were known. From Meta-SGD on, the new settings "
        "were chosen by episodes of the training sources. For each of the last three methods, these were about ten "
        "settings, compared by two of the five trainings with another key.\n"
        "- In these comparisons, subtracting the mean of the support set helped all heads that start from zeros.\n"
        "- So small differences to pixel prototypes are partly chosen.\n"
        "- The episodes here are not those of the earlier results. The rows of QuickDraw, Fashion-MNIST and MNIST "
        "are not those of the first versions."
    )
