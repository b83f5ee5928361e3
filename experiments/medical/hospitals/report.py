"""The tables and the picture of the result."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import script
from experiments.medical import scores
from experiments.medical.hospitals.learning import Settings
from experiments.medical.hospitals.tables import Patients

OWN = "g"
PLATT = ("pooled + Platt", "site-wise + Platt", "pooled + shrunken Platt", "site-wise + shrunken Platt")
BASELINES = (*PLATT, "one λ")
ALPHAS = (0.1, 0.2)
SCORES: dict[str, Callable] = {"Brier": scores.brier, "ECE": scores.ece, "log loss": scores.log_loss}


def methods(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns name -> [seeds, R, n] probabilities."""
    return {key.removeprefix("p:"): values for key, values in arrays.items() if key.startswith("p:")}


def of_site(arrays: dict[str, np.ndarray], y: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Returns method -> score -> [seeds, R]."""
    judged, all_scores = arrays["judged"], {}
    for name, runs in methods(arrays).items():
        all_scores[name] = {label: np.stack([fn(p, y, judged) for p in runs]) for label, fn in SCORES.items()}
        areas = [[scores.area(p[u > 0], y[u > 0]) for p, u in zip(run, judged, strict=True)] for run in runs]
        all_scores[name]["AUC"] = np.array(areas)
    return all_scores


def interval(difference: np.ndarray) -> tuple[float, float]:
    """Returns the mean over R resamples, and half of its 95 % interval."""
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return float(difference.mean()), float(1.96 * deviation / len(difference) ** 0.5)


def over_patients(arrays: dict[str, np.ndarray], y: np.ndarray, num: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns baseline -> score -> 95 % interval of the mean difference, over bootstraps of patients and of draws."""
    rng = np.random.default_rng(0)
    judged, runs = arrays["judged"], methods(arrays)
    counts = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=num).astype(float)
    drawn = rng.multinomial(len(judged), np.full(len(judged), 1 / len(judged)), size=num) / len(judged)

    def means(name):
        of_seeds = [scores.bootstrapped(p, y, judged, counts) for p in runs[name]]
        return {label: np.mean([(s[label] * drawn).sum(-1) for s in of_seeds], axis=0) for label in of_seeds[0]}

    own = means(OWN)
    ranges = {}
    for name in BASELINES:
        other = means(name)
        ranges[name] = {k: tuple(np.percentile(own[k] - other[k], [2.5, 97.5])) for k in own}
    return ranges


def level_table(patients: Patients, by_site: list[dict]) -> str:
    """Means over resamples for each site and method; the deviation is over seeds."""
    rows = []
    for site, arrays in enumerate(by_site):
        for name, values in of_site(arrays, patients.y[arrays["rows"]]).items():
            cells = [
                script.spread(values[k].mean(1)) if len(values[k]) > 1 else f"{values[k].mean():.3f}"
                for k in ("Brier", "ECE", "log loss", "AUC")
            ]
            rows.append([patients.names[site], name, *cells])
    return script.table(["site", "method", "Brier", "ECE", "log loss", "AUC"], rows)


def difference_table(patients: Patients, by_site: list[dict], num_bootstraps: int) -> tuple[str, list[str]]:
    """Returns the table of paired differences, and the comparisons that miss the aim."""
    rows, missed = [], []
    for site, arrays in enumerate(by_site):
        y = patients.y[arrays["rows"]]
        values, ranges = of_site(arrays, y), over_patients(arrays, y, num_bootstraps)
        for name in BASELINES:
            row = [patients.names[site], name]
            for label in ("Brier", "ECE"):
                mean, half = interval((values[OWN][label] - values[name][label]).mean(0))
                low, high = ranges[name][label]
                row += [f"{mean:+.4f} ± {half:.4f}", f"{low:+.3f} to {high:+.3f}"]
                if name in PLATT and round(mean, 4) + round(half, 4) >= 0:
                    missed.append(f"{patients.names[site]}, {label}, {name}")
            rows.append(row)
    header = ["site", "g minus", "Brier", "patients and draws", "ECE", "patients and draws"]
    return script.table(header, rows), missed


def conformal_table(patients: Patients, by_site: list[dict]) -> tuple[str, list[str]]:
    """Returns the table of abstention, and the missed aims.

    The aim is that the coverage of the leave-one-out sets is within 2 points of the nominal one.
    """
    rows, missed = [], []
    for site, arrays in enumerate(by_site):
        y, judged = patients.y[arrays["rows"]], arrays["judged"]
        for kind in ("leave one out", "split", "of the training sites"):
            for alpha in ALPHAS:
                runs = [scores.Abstention(p, y, judged, alpha) for p in arrays[f"conformal:{kind}"]]
                mean = lambda name, runs=runs: 100 * np.mean([getattr(run, name) for run in runs])
                risk = 100 * np.mean([run.risk for run in runs])
                cells = [mean("coverage"), mean("answered"), risk, mean("sick"), mean("healthy")]
                rows.append([patients.names[site], kind, f"{1 - alpha:.0%}", *(f"{cell:.1f}" for cell in cells)])
                if kind == "leave one out" and abs(round(cells[0], 1) - 100 * (1 - alpha)) > 2:
                    missed.append(f"{patients.names[site]}, {1 - alpha:.0%}: {cells[0]:.1f}")
    header = ["site", "calibrated by", "nominal", "coverage", "answered", "wrong answers", "sick", "healthy"]
    return script.table(header, rows), missed


def subgroups(patients: Patients, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns name -> [n] masks of a site's patients."""
    masks = {}
    if patients.sex is not None:
        masks |= {"women": patients.sex[rows] == 0, "men": patients.sex[rows] == 1}
    if patients.age is not None:
        old = patients.age[rows] >= 55
        masks |= {"below 55": ~old, "55 and older": old}
    return masks


def subgroup_table(patients: Patients, by_site: list[dict]) -> str:
    rows = []
    for site, arrays in enumerate(by_site):
        y, judged, runs = patients.y[arrays["rows"]], arrays["judged"], methods(arrays)
        for name, mask in subgroups(patients, arrays["rows"]).items():
            weights = judged * mask
            if weights.sum(1).min() == 0:
                continue
            row = [patients.names[site], name, str(mask.sum()), f"{y[mask].mean():.2f}"]
            for method in (OWN, "pooled + Platt"):
                p = runs[method]
                row.append(f"{np.mean([(weights * run).sum(1) / weights.sum(1) for run in p]):.2f}")
                row += [f"{np.mean([fn(run, y, weights) for run in p]):.3f}" for fn in (scores.brier, scores.ece)]
            sets = [scores.Abstention(p, y, weights, 0.1) for p in arrays["conformal:leave one out"]]
            rows.append([*row, f"{100 * np.mean([s.coverage for s in sets]):.0f}"])
    if not rows:
        return ""
    names = [f"{score} {label}" for label in ("of g", "of Platt") for score in ("mean p", "Brier", "ECE")]
    return script.table(["site", "patients", "number", "share", *names, "coverage"], rows)


def hyperparams_table(patients: Patients, by_site: list[dict]) -> str:
    """λ of g over resamples and seeds: median, and the range from the 10th to the 90th percentile."""
    keys = [key for key in by_site[0] if key.startswith("λ:g:")]

    def cell(values):
        low, middle, high = np.percentile(values, [10, 50, 90])
        return f"{middle:.2g} ({low:.2g} to {high:.2g})"

    rows = []
    for key in keys:
        constant = np.median([arrays[key.replace("λ:g:", "λ:one λ:")] for arrays in by_site])
        cells = [cell(arrays[key]) for arrays in by_site]
        rows.append([key.removeprefix("λ:g:"), *cells, f"{constant:.2g}"])
    names = [patients.names[i] for i in range(len(by_site))]
    return script.table(["λ", *names, "one λ, median"], rows)


def chosen_text(patients: Patients, chosen: list[dict[str, bool]]) -> str:
    """Returns a table of the chosen variants."""
    words = lambda by_site: "an intercept per site" if by_site else "one intercept"
    names = list(chosen[0])
    rows = [[patients.names[i], *(words(of_site[name]) for name in names)] for i, of_site in enumerate(chosen)]
    return script.table(["pooled model", *names], rows)


def shrinkage_text(patients: Patients, by_site: list[dict]) -> str:
    """Returns the chosen shrinkages of Platt scaling in words."""
    words = lambda values: "slope to {:g} with penalty {:g}, intercept with penalty {:g}".format(*values)
    sites = [
        f"{patients.names[i]}: " + "; ".join(f"{m} {words(arrays[f'shrinkage:{m}'])}" for m in ("pooled", "site-wise"))
        for i, arrays in enumerate(by_site)
    ]
    return "Shrinkage of Platt scaling, chosen on the training sites: " + ". ".join(sites) + "."


def report(parts: dict[str, tuple[Patients, list, list]], settings: Settings) -> str:
    texts = ["Research, not a medical device."]
    for label, (patients, chosen, by_site) in parts.items():
        differences, missed = difference_table(patients, by_site, settings.bootstraps)
        conformal, uncovered = conformal_table(patients, by_site)
        num_seeds = len(by_site[0]["p:g"])
        texts += [
            f"## {label[0].upper()}{label[1:]}",
            level_table(patients, by_site),
            f"Means over {settings.resamples} draws of 20 labelled patients; of g and one λ, ± the standard deviation "
            f"over {num_seeds} seed(s). ECE has ten fixed bins of equal width.",
            chosen_text(patients, chosen),
            shrinkage_text(patients, by_site),
            "### Differences in pairs",
            differences,
            "Below 0, g is better. The first interval is ± 1.96 standard errors over the draws. The second one is a "
            "95 % bootstrap of patients and draws. The aim is an interval over draws below 0 against all Platt "
            "scalings. "
            f"Missed: {'; '.join(missed) or 'none'}.",
            "### Abstention",
            conformal,
            'In percent. A prediction set with one outcome is an answer, others abstain. "wrong answers" is their '
            'share among the answers, "sick" and "healthy" the coverages of each class. The first two rules use the '
            "20 labelled patients, and the last one the pooled model and only the training sites. Leave one out is "
            f"beyond 2 points of the nominal coverage at: {'; '.join(uncovered) or 'none'}.",
            "### Subgroups",
            subgroup_table(patients, by_site) or "The table has neither age nor sex.",
            '"share" is that of the sick, "mean p" the mean prediction, "Platt" pooled logistic regression with Platt '
            "scaling, and coverage that of the leave-one-out sets at 90 %.",
            "### Predicted λ",
            hyperparams_table(patients, by_site),
            "Median over draws and seeds (10th to 90th percentile). Each penalty pulls one part of the model to a "
            'value: the intercept to "intercept", the weight of the pooled model to "slope", and its own weights of '
            'values and of marks of missing values to 0. "often_missing" and "marks" weigh these parts of the pooled '
            "model.",
        ]
    return "\n\n".join(texts)


# ---- The picture -----------------------------------------------------------------------------------------------------


def reliability(runs: np.ndarray, y: np.ndarray, judged: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the mean prediction, the share of the sick and the share of patients of each bin, over all resamples."""
    number = scores.bins(runs)
    total = np.array([(judged * (number == k)).sum() for k in range(scores.NUM_BINS)])
    p = np.array([(judged * runs * (number == k)).sum() for k in range(scores.NUM_BINS)])
    sick = np.array([(judged * y * (number == k)).sum() for k in range(scores.NUM_BINS)])
    present = total > 0.005 * total.sum()
    return p[present] / total[present], sick[present] / total[present], total[present] / total.sum()


def plot(patients: Patients, chosen: list, by_site: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"g": "C0", "pooled + Platt": "C1", "site-wise + Platt": "C2", "pooled + shrunken Platt": "C3"}
    figure, axes = plt.subplots(2, len(by_site), figsize=(11, 5.6), layout="constrained", squeeze=False)
    shares = np.linspace(0.1, 1, 19)
    for site, arrays in enumerate(by_site):
        y, judged, runs = patients.y[arrays["rows"]], arrays["judged"], methods(arrays)
        top, bottom = axes[:, site]
        top.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
        for name, color in shown.items():
            p, sick, share = reliability(runs[name], y, judged)
            top.plot(p, sick, color=color, linewidth=1)
            top.scatter(p, sick, s=8 + 150 * share, color=color, label=name)
            risk = np.mean([scores.selective_risk(run, y, judged, shares) for run in runs[name]], axis=0)
            bottom.plot(100 * shares, 100 * risk, color=color, label=name)
        top.set_title(f"{patients.names[site]}, {len(y)} patients", fontsize=10)
        top.set_xlabel("predicted probability")
        bottom.set_xlabel("% answered, most confident first")
    axes[0, 0].set_ylabel("share of the sick")
    axes[1, 0].set_ylabel("% wrong among answers")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
