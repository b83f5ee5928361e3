"""Tables, the missed aims, and the picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import script
from experiments.recommend import networks, ordinary
from experiments.recommend.fold import COVERAGE, ONE, POPULAR, G
from metaopt import evaluation

AIMS = {5: 1.434, 10: 1.399}  # offsets with fixed ridges: the figures that come with MovieTweetings
ORDINARY = ("global mean", ordinary.ITEM_MEANS, "user offset, ridge 3", ordinary.PLAIN, *ordinary.TUNED_NAMES)
LEARNED = (*networks.NAMES, ONE, G)
NAMES = (*ORDINARY, *LEARNED)
ADAPTIVE = ("MeLU", "CAVIA", G)


def join_folds(folds: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the scores of all users; the last axis of each array is in the order of the users' positions."""
    order = np.argsort(np.concatenate([fold["users"] for fold in folds]))
    names = [name for name, value in folds[0].items() if value.ndim and name != "users"]
    return {name: np.concatenate([fold[name] for fold in folds], axis=-1)[..., order] for name in names}


def first_fold(folds: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Returns the places of the users of the first fold in the scores of `join_folds`."""
    users = np.sort(np.concatenate([fold["users"] for fold in folds]))
    return np.flatnonzero(np.isin(users, folds[0]["users"]))


def numbers(scores: Mapping[str, np.ndarray]) -> list[int]:
    """Returns the numbers of first ratings, k."""
    return sorted({int(name.split("|")[0]) for name in scores})


def by_name(scores: Mapping[str, np.ndarray], k: int, kind: str) -> dict[str, np.ndarray]:
    """Returns name -> values, for one k and one kind of score."""
    parts = ((name.split("|"), value) for name, value in scores.items())
    return {name: value for (number, own, name), value in parts if (int(number), own) == (k, kind)}


def user_errors(scores: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Returns name -> [U], the mean over seeds of each user's root mean squared error."""
    return {name: value.mean(0) for name, value in by_name(scores, k, "rmse").items()}


def paired(errors: Mapping[str, np.ndarray], reference: str) -> dict[str, tuple[float, float]]:
    """Returns name -> the mean difference to a reference, and half of its 95 % interval over users."""
    ones = {"users": np.ones(len(errors[reference]))}
    columns = {name: {"users": value[:, None]} for name, value in errors.items()}
    table = evaluation.Evaluation(columns, ones, ones, dict.fromkeys(errors, False), higher_is_better=False)
    return {name: difference["users"] for name, difference in evaluation.paired_differences(table, reference).items()}


def best_ordinary(errors: Mapping[str, np.ndarray]) -> str:
    """Returns the tuned baseline with the smallest error on the test users."""
    return min(ordinary.TUNED_NAMES, key=lambda name: errors[name].mean())


def best_ranking(values: Mapping[str, np.ndarray]) -> str:
    """Returns the method without learning that has the largest NDCG on the test users."""
    return max((POPULAR, *ORDINARY), key=lambda name: values[name].mean())


def _interval(pair: tuple[float, float], digits: int = 3) -> str:
    return f"{pair[0]:+.{digits}f} ± {pair[1]:.{digits}f}"


def error_table(scores: Mapping[str, np.ndarray]) -> str:
    header, columns = ["method"], []
    for k in numbers(scores):
        errors = user_errors(scores, k)
        best = best_ordinary(errors)
        differences = paired(errors, best)
        seeds = by_name(scores, k, "rmse")
        header += [f"k = {k}: error", "seeds", "− best baseline"]
        columns += [
            {n: f"{e.mean():.3f} ± {e.std(ddof=1) / len(e) ** 0.5:.3f}" for n, e in errors.items()},
            {n: f"{s.mean(1).std(ddof=1):.4f}" if len(s) > 1 else "" for n, s in seeds.items()},
            {n: "best baseline" if n == best else _interval(pair) for n, pair in differences.items()},
        ]
    return script.table(header, [[name, *(column[name] for column in columns)] for name in NAMES])


def ranking_table(scores: Mapping[str, np.ndarray]) -> str:
    header, columns = ["method"], []
    for k in numbers(scores):
        header += [f"k = {k}: NDCG@10", "− best baseline", "by rating only"]
        with_popularity, by_rating = by_name(scores, k, "ndcg"), by_name(scores, k, "ndcg by rating")
        best = best_ranking(with_popularity)
        differences = paired(with_popularity, best)
        columns += [
            {n: f"{v.mean():.4f} ± {v.std(ddof=1) / len(v) ** 0.5:.4f}" for n, v in with_popularity.items()},
            {n: "best baseline" if n == best else _interval(pair, 4) for n, pair in differences.items()},
            {n: f"{by_rating[n].mean():.4f}" if n in by_rating else "" for n in with_popularity},
        ]
    return script.table(header, [[name, *(column[name] for column in columns)] for name in (POPULAR, *NAMES)])


def interval_table(scores: Mapping[str, np.ndarray]) -> str:
    header, columns = ["intervals of 90 %"], []
    for k in numbers(scores):
        header += [f"k = {k}: coverage", "users below 80 %", "mean width"]
        coverage, width = by_name(scores, k, "coverage"), by_name(scores, k, "width")
        columns += [
            {
                n: f"{100 * v.mean():.1f} ± {100 * v.mean(0).std(ddof=1) / v.shape[1] ** 0.5:.1f} %"
                for n, v in coverage.items()
            },
            {n: f"{100 * (v < 0.8).mean():.0f} %" for n, v in coverage.items()},
            {n: f"{v.mean():.2f}" for n, v in width.items()},
        ]
    return script.table(header, [[name, *(column[name] for column in columns)] for name in columns[0]])


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def correlations(scores: Mapping[str, np.ndarray], k: int, name: str) -> list[tuple[str, float]]:
    """Returns the features of the first ratings and their rank correlations with λ, the strongest first."""
    own = ranks(by_name(scores, k, "λ")[name][0])
    pairs = [(feature, np.corrcoef(ranks(x), own)[0, 1]) for feature, x in by_name(scores, k, "feature").items()]
    return sorted(pairs, key=lambda pair: -abs(np.nan_to_num(pair[1])))


def hyperparameter_table(scores: Mapping[str, np.ndarray]) -> str:
    rows = []
    for k in numbers(scores):
        for name, value in by_name(scores, k, "λ").items():
            low, middle, high = np.quantile(value[0], (0.1, 0.5, 0.9))
            features = ", ".join(f"{feature} ({r:+.2f})" for feature, r in correlations(scores, k, name)[:3])
            rows.append([str(k), name, f"{middle:.3g}", f"{low:.3g} to {high:.3g}", features])
    return script.table(["k", "λ", "median", "10 to 90 % of users", "strongest rank correlations"], rows)


def missed(scores: Mapping[str, np.ndarray], aims: Mapping[int, float]) -> str:
    """Lists the aims that are missed. Numbers are rounded as in the tables before they are compared."""
    lines = []
    for k in numbers(scores):
        errors = user_errors(scores, k)
        best = best_ordinary(errors)
        differences, against_one = paired(errors, best), paired(errors, ONE)
        above = [n for n in (*ADAPTIVE, ONE) if k in aims and round(errors[n].mean(), 3) >= aims[k]]
        level = [n for n in (*ADAPTIVE, ONE) if round(sum(differences[n]), 3) >= 0]
        ranking = by_name(scores, k, "ndcg")
        by_rank = paired(ranking, best_ranking(ranking))
        not_above = [n for n in LEARNED if round(by_rank[n][0] - by_rank[n][1], 4) <= 0]
        figure = f"Not below {aims[k]}: {', '.join(above) or 'none'}. " if k in aims else ""
        lines.append(
            f"k = {k}. {figure}Not below the best tuned baseline ({best}) by an interval that excludes 0: "
            f"{', '.join(level) or 'none'}. Difference of g to one λ for all: {_interval(against_one[G])}. NDCG@10 not "
            f"above the best baseline ({best_ranking(ranking)}) by an interval that excludes 0: "
            f"{', '.join(not_above) or 'none'}."
        )
    return "\n\n".join(lines)


def unseen(scores: Mapping[str, np.ndarray], positions: np.ndarray) -> str:
    """States the differences on the test users of fold 0, which had no part in the design."""
    texts = []
    for k in numbers(scores):
        errors = {name: value[positions] for name, value in user_errors(scores, k).items()}
        pair = paired(errors, best_ordinary(user_errors(scores, k)))[G]
        texts.append(f"{_interval(pair)} (k = {k})")
    return f"On the {len(positions)} test users of fold 0 the difference of g to this baseline is {', '.join(texts)}."


def report(scores: Mapping[str, np.ndarray], unseen_users: np.ndarray, aims: Mapping[int, float], about: str) -> str:
    """Returns the result in Markdown."""
    return "\n\n".join(
        [
            "## Error of later ratings",
            error_table(scores),
            about,
            missed(scores, aims),
            unseen(scores, unseen_users),
            "## Ranking of all items",
            ranking_table(scores),
            "NDCG@10 over all items that are not among the first ratings. The gain of an item is its later rating, and "
            "0 if the user did not rate it. Items are ranked by prediction + w log(1 + ratings in the last 30 days), "
            'with w chosen on training users; and by the prediction only. Learned methods: seed 0. "− best baseline" '
            "is the paired difference to the method without learning that has the largest NDCG@10 on the test users, "
            "± 1.96 standard errors over users.",
            "## Prediction intervals",
            interval_table(scores),
            f"Conformal intervals with a nominal coverage of {COVERAGE:.0%}, calibrated on training users that are "
            "held out; the mean over users, ± standard error, and over seeds. Widths are in units of ratings.",
            "## Predicted regularization",
            hyperparameter_table(scores),
            "A rating that is t days older than the last one has the weight (1 + t) to the power of −decay. The center "
            "is the value to which the user's offset is drawn, in ratings. The slope is the coefficient of the item's "
            "offset. Correlations are over users, with statistics of their first ratings.",
        ]
    )


def draw(scores: Mapping[str, np.ndarray], path: Path) -> None:
    """Draws the errors of the methods, and how predicted λ depends on the first ratings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    k = numbers(scores)[0]
    _draw_errors(axes[0, 0], scores)
    values = {n: v[0] for n, v in by_name(scores, k, "λ").items() if n != "center"}
    spread = lambda name: np.subtract(*np.quantile(np.log(values[name] + 1e-12), (0.9, 0.1)))
    widest = sorted(values, key=lambda name: -spread(name))[:3]
    for name, ax in zip(widest, axes.ravel()[1:], strict=False):
        (first, _), (second, _) = correlations(scores, k, name)[:2]
        features = by_name(scores, k, "feature")
        color = ranks(features[second]) / len(features[second])
        points = ax.scatter(features[first], values[name], c=color, s=8, cmap="viridis")
        ax.set(yscale="log", xlabel=first, ylabel=name, title=f"λ of {len(color)} new users, from {k} ratings")
        figure.colorbar(points, ax=ax, label=f"rank of: {second}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_errors(ax, scores: Mapping[str, np.ndarray]) -> None:
    shown = [name for name in NAMES if name not in ("global mean", ordinary.ITEM_MEANS, "user offset, ridge 3")]
    for i, k in enumerate(numbers(scores)):
        errors = user_errors(scores, k)
        reference = best_ordinary(errors)
        pairs = paired(errors, reference)
        heights = np.arange(len(shown)) + 0.2 * (2 * i - 1)
        ax.errorbar(
            [pairs[n][0] for n in shown],
            heights,
            xerr=[np.nan_to_num(pairs[n][1]) for n in shown],
            fmt="o",
            color=f"C{i}",
            label=f"k = {k}",
        )
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(shown)), shown, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("error − that of the best tuned baseline, 95 % over users")
    ax.legend()
