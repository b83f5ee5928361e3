"""The command line: prepare, learn, judge."""

import argparse
from pathlib import Path

from experiments.hyperparameters import transfer
from experiments.hyperparameters.transfer.config import DEFAULT, SMOKE
from experiments.hyperparameters.transfer.families import judged_tables
from experiments.hyperparameters.transfer.judge import judge
from experiments.hyperparameters.transfer.learning import learn
from experiments.hyperparameters.transfer.pool import prepare_corpus
from experiments.hyperparameters.transfer.report import publish


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        "transfer", description=transfer.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="?", choices=("prepare", "learn", "judge", "all"), default="all")
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds of learning")
    parser.add_argument("--no-trees", action="store_true", help="leave forests and boosting out")
    parser.add_argument("--out", type=Path, default=Path("results_local/transfer"), help="folder of the results")
    args = parser.parse_args(argv)
    config = SMOKE if args.smoke else DEFAULT
    if args.step in ("prepare", "all"):
        prepare_corpus(config, args.out)
    if args.step in ("learn", "all"):
        for seed in args.seed:
            learn(config, args.out, seed)
    if args.step in ("judge", "all"):
        tables = judged_tables()[: config.max_judged]
        publish(judge(config, tables, args.out, args.seed, not args.no_trees), args)
