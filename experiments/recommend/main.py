"""Options; runs the folds and writes the result."""

import argparse
import json
import os
from pathlib import Path

import numpy as np

from experiments import recommend, script
from experiments.recommend import choose, report
from experiments.recommend.fold import SMOKE, Settings, run_fold
from experiments.recommend.ratings import (
    NUM_FOLDS,
    Data,
    Ratings,
    from_movielens,
    from_movietweetings,
    make_data,
    synthetic,
)

FILE = "movietweetings_100k.npz"


def load(options: argparse.Namespace) -> Ratings:
    """Reads the ratings. A smoke run without a data folder draws synthetic ones."""
    if options.movielens is not None:
        return from_movielens(options.movielens)
    if options.smoke and not (Path(os.environ.get("METAOPT_DATA", "")) / FILE).is_file():
        return synthetic()
    return from_movietweetings(script.data_file(Path(__file__).parent, FILE))


def describe(data: Data, parts: list[dict[str, np.ndarray]], settings: Settings) -> str:
    """Returns the sentences on data and choices below the table of errors."""
    ratings = data.ratings
    tested = sum(len(part["users"]) for part in parts)
    text = (
        f"{ratings.name}: {len(ratings.rating):,} ratings of {ratings.num_items:,} items by {ratings.num_users:,} "
        f"users, of whom {tested:,} are tested in {len(parts)} fold(s). k is the number of first ratings. Root mean "
        "squared error of a user's later ratings, mean over users ± standard error; predictions are clipped to the "
        f"range of ratings. Learned methods: mean over {settings.num_seeds} seed(s), which differ in initialization, "
        'draws and held-out users; "seeds" is the standard deviation of the mean error over them. "− best baseline" '
        "is the paired difference to the tuned baseline with the smallest error on the test users, ± 1.96 standard "
        "errors over users.\n\nChosen in each fold, on training users:\n\n"
    )
    rows = []
    for number, part in enumerate(parts):
        choices = json.loads(str(part["choices"]))
        cells = [_short(choices[name]) for name in ("factorization", "kNN", "Gibbs")]
        rows.append([str(number), choices["base"], _short(choices[choices["base"]]), *cells])
    header = [
        "fold",
        "better offsets",
        "their hyperparameters",
        "factorization",
        "kNN (shrinkage, ridge)",
        "Gibbs: factors",
    ]
    legend = (
        "In each sweep, users' offsets are fitted, and then items' offsets again. New users have for each k [ridge, "
        "center] of the user's offset, and for the factorization [ridge, ridge of the factors, center]. The center is "
        "the value to which the offset is drawn."
    )
    return f"{text}{script.table(header, rows)}\n\n{legend}\n\n{_profiles(parts)}"


def _profiles(parts: list[dict[str, np.ndarray]]) -> str:
    """Returns a table of the errors of training users along each grid of the baselines."""
    folds = [json.loads(str(part["choices"]))["profiles"] for part in parts]
    rows = []
    for name in folds[0]:
        values = sorted({value for fold in folds for value in fold[name]}, key=float)
        means = {value: np.mean([fold[name][value] for fold in folds if value in fold[name]]) for value in values}
        rows.append([name, ", ".join(f"{float(value):g}: {1000 * mean:.1f}" for value, mean in means.items())])
    text = (
        "How flat the choice is: for each value of a grid, the least error of training users with this value minus the "
        "least error of all, in thousandths of a rating, mean over the folds that tried the value:\n\n"
    )
    return text + script.table(["hyperparameter", "value: error above the least one, in 0.001"], rows)


def _short(choice) -> str:
    return json.dumps(choice).replace('"', "")[1:-1].replace("{", "(").replace("}", ")")


def main() -> None:
    parser = script.parser(recommend.__doc__, num_seeds=2)
    parser.add_argument("--full", action="store_true", help="all seeds instead of one, and all folds instead of two")
    parser.add_argument(
        "--movielens",
        type=Path,
        help="ratings.csv, ratings.dat or u.data, or the folder of it, instead of MovieTweetings",
    )
    parser.add_argument("--choose", choices=choose.DESIGNS, help="compare designs on training users of fold 0")
    parser.add_argument("--work", type=Path, default=Path("recommend_runs"), help="folder of finished folds")
    options = parser.parse_args()
    settings = SMOKE if options.smoke else Settings(num_seeds=options.seeds if options.full else 1)
    data = make_data(load(options), settings.first)
    if options.choose:
        choose.run(data, settings, options.choose)
        return
    name = "recommend" if options.movielens is None else "recommend_movielens"
    work = None if options.smoke else script.work_folder(options.work, Path(__file__).parent) / name
    numbers = range(1 if options.smoke else NUM_FOLDS if options.full else 2)
    own = f"ratings{len(data.ratings.rating)}_users{data.ratings.num_users}"  # each file of ratings has its own
    label = lambda fold: f"fold{fold}_seeds{settings.num_seeds}_{own}"
    scores_of = lambda fold, wait: script.kept(work, label(fold), lambda: run_fold(data, fold, settings), wait=wait)
    for fold in numbers:
        scores_of(fold, False)  # skips folds that another process is computing
    parts = [scores_of(fold, True) for fold in numbers]
    aims = report.AIMS if data.ratings.name == "MovieTweetings" and not options.smoke else {}
    scores = report.join_folds(parts)
    text = report.report(scores, report.first_fold(parts), aims, describe(data, parts, settings))
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        report.draw(scores, options.out / f"{name}.png")
    seconds = sum(float(part["seconds"]) for part in parts)
    script.publish(
        Path(__file__).parent,
        "Recommendation for new users",
        text,
        options,
        name=name,
        picture="Errors, and the predicted regularization of new users",
        seconds=seconds,
    )
