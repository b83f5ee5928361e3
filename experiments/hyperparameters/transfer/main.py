"""The command line: prepare, learn, judge, ship."""

import argparse
import csv
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

import metaopt
from experiments import script
from experiments.hyperparameters import transfer
from experiments.hyperparameters.transfer.choose import choose_spread
from experiments.hyperparameters.transfer.compare import compare
from experiments.hyperparameters.transfer.config import DEFAULT, EXTENDED, REGRESSION, SMOKE
from experiments.hyperparameters.transfer.families import judged_tables
from experiments.hyperparameters.transfer.judge import judge
from experiments.hyperparameters.transfer.learning import learn
from experiments.hyperparameters.transfer.pool import load_pools, prepare_corpus
from experiments.hyperparameters.transfer.rates import compare_rates
from experiments.hyperparameters.transfer.regression import compare_regression
from experiments.hyperparameters.transfer.report import publish
from experiments.hyperparameters.transfer.second_stage import compare_second_stage
from experiments.hyperparameters.transfer.ten_runs import NUM_SPLITS, compare_ten_runs
from experiments.hyperparameters.transfer.variants import VARIANTS, compare_variants
from metaopt import predictors
from metaopt.automl._shipped import FILES


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        "transfer", description=transfer.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "step",
        nargs="?",
        choices=(
            "prepare",
            "learn",
            "compare",
            "choose",
            "ten-runs",
            "rates",
            "variants",
            "second-stage",
            "judge",
            "ship",
            "all",
        ),
        default="all",
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--extended", action="store_true", help="also tasks with many classes, and simulated rules")
    parser.add_argument("--regression", action="store_true", help="prepare, learn, compare, ship: a g for regression")
    parser.add_argument("--outer-loss", choices=("log_loss", "rank_error"), default="log_loss", help="of learning")
    parser.add_argument("--per-family", type=int, help="prepare: the most tasks of a family with rotated targets")
    parser.add_argument("--splits", type=int, default=NUM_SPLITS, help="rates, second-stage: splits of the rows")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, help="variants: those to train")
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2], help="seeds of learning; none: controls only")
    parser.add_argument("--no-trees", action="store_true", help="leave forests and boosting out")
    parser.add_argument("--out", type=Path, help="folder of the results; by default in results_local")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="compare: folders of other predictors")
    args = parser.parse_args(argv)
    config = SMOKE if args.smoke else EXTENDED if args.extended else DEFAULT
    if args.regression:
        if args.step not in ("prepare", "learn", "compare", "ship") or args.extended:
            parser.error("--regression needs one of the steps prepare, learn, compare and ship, without --extended")
        sizes = {"numbers": True} if args.smoke else {"numbers": True, "widths": REGRESSION.widths}
        config = dataclasses.replace(config, **sizes)
    elif args.outer_loss != "log_loss":
        parser.error("--outer-loss needs --regression")
    config = dataclasses.replace(config, outer_loss=args.outer_loss)
    if args.per_family:
        config = dataclasses.replace(config, per_family=args.per_family)
    name = "transfer" + "_regression" * args.regression + "_smoke" * args.smoke
    name += f"_{args.outer_loss}" if args.outer_loss != "log_loss" else ""
    args.out = args.out or Path("results_local") / name
    if args.step in ("prepare", "all"):
        prepare_corpus(config, args.out)
    if args.step in ("learn", "all"):
        for seed in args.seed:
            learn(config, args.out, seed)
    if args.step == "compare" and args.regression and not args.other:
        compare_regression(config, args.out, args)
    elif args.step == "compare":
        compare(config, load_pools(config, args.out), [args.out, *args.other])
    if args.step == "choose":
        choose_spread(config, args.out, args.seed[0])
    if args.step == "ten-runs":
        compare_ten_runs(config, args.out)
    if args.step == "rates":
        compare_rates(config, args.out, args.splits)
    if args.step == "variants":
        compare_variants(config, args.out, args.seed, args.variants)
    if args.step == "second-stage":
        compare_second_stage(config, args.out, args.splits)
    if args.step in ("judge", "all"):
        judged = judge(config, judged_tables()[: config.max_judged], args.out, args.seed, not args.no_trees)
        if args.seed:
            publish(judged, args)
    if args.step == "ship":
        ship("regression" if config.numbers else "classification", args.out, args.seed)


def ship(problem: str, folder: Path, seeds: list[int]) -> None:
    """Puts the mean of the trained predictors into the package, and the list of its tasks next to the results."""
    trained = [metaopt.load(folder / f"g_{seed}.npz") for seed in seeds]
    meta_params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(t.meta_params for t in trained))
    g = predictors.ensemble(trained[0].predictor, len(seeds))
    file = Path(metaopt.__file__).parent / "automl" / FILES[problem]
    with open(folder / "corpus.csv") as corpus:
        trained_on = {row["name"]: row["row_hash"] for row in csv.DictReader(corpus)}
    metaopt.save(file, predictors.TrainedPredictor(g, meta_params, trained[0].scaling, trained_on))
    suffix = "_regression" if problem == "regression" else ""
    shutil.copy(folder / "corpus.csv", script.RESULTS / f"transfer_corpus{suffix}.csv")
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)
