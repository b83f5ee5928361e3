"""Trains every method, evaluates it, and writes the result."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import metaopt
from experiments import script
from experiments.few_shot import film, omniglot
from experiments.few_shot.omniglot.evaluation import SEED, judge, judge_over_steps
from experiments.few_shot.omniglot.images import load, pixels
from experiments.few_shot.omniglot.methods import ROWS, SETTINGS, SMALL, SMOKE, Scale
from experiments.few_shot.omniglot.report import SPREAD, draw, report
from experiments.few_shot.omniglot.training import Trained, num_tasks, train


def parse() -> tuple[argparse.Namespace, Scale]:
    """Returns the options and the sizes.

    Each number of ways in `own_head`, and each number of shots in `own_shots`, has its own training.
    """
    parser = script.parser(omniglot.__doc__, num_seeds=1)
    parser.add_argument("--small", action="store_true", help="a network and a number of steps for one processor core")
    parser.add_argument("--split", choices=("official", "random"), default="official")
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--ways", nargs="+", type=int, choices=(5, 20), default=[5, 20])
    parser.add_argument(
        "--head-ways",
        nargs="+",
        type=int,
        choices=(5, 20),
        help="of methods whose head is learned, a training for each; as --ways, or 5 with --small",
    )
    parser.add_argument(
        "--shots",
        nargs="+",
        type=int,
        choices=(1, 5),
        help="of methods whose head is learned, a training for each; both, or 1 with --small",
    )
    parser.add_argument(
        "--disjoint-drawers",
        action="store_true",
        help="nobody drew on both sides of an episode: harder than in the literature, which does not ask who drew",
    )
    parser.add_argument("--steps", type=int, help="outer steps of prototypical networks")
    parser.add_argument("--tasks", type=int, help="a step, of five ways; a quarter as many of twenty")
    parser.add_argument("--rate", type=float, default=2e-3, help="of the outer Adam, at the start")
    parser.add_argument("--name", help="of the result; omniglot, or omniglot_small")
    parser.add_argument(
        "--work", type=Path, default=Path("omniglot_runs"), help="trainings are kept here, by their code"
    )
    options = parser.parse_args()
    options.work = script.work_folder(options.work, Path(__file__).parent, film.__file__)
    options.own_head = options.head_ways or ([5] if options.small else options.ways)  # one core has no time for more
    options.own_shots = sorted(options.shots or ([1] if options.small else [1, 5]))
    options.ways = sorted({*options.ways, *options.own_head})
    scale = SMOKE if options.smoke else SMALL if options.small else Scale()
    scale = scale._replace(steps=options.steps or scale.steps, tasks=options.tasks or scale.tasks)
    if options.smoke:
        options.methods, options.seeds = ["MAML++", "prototypical networks"], 1
        options.ways, options.own_head, options.own_shots = [5], [5], [1]
    return options, scale


def keep_split(split: dict, options: argparse.Namespace) -> None:
    """Writes the split next to the trainings. Exits the script if these are of another split."""
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / f"split_{options.split}.json"
    if file.is_file() and metaopt.load(file) != split:
        sys.exit(f"The trainings in {options.work} are of another split ({file}): give --work another folder.")
    metaopt.save(file, split)


class Trainings(NamedTuple):
    """All trained methods. Names of methods end with their seed."""

    methods: dict[tuple, dict[str, Any]]  # (ways, shots) of the test -> name -> method, name of its folder
    by_label: dict[str, list[Trained]]  # method, with ways and shots of its training -> seeds
    over_steps: dict[str, tuple]  # name -> the method with all inner steps, name of its folder


def train_all(parts: dict, scale: Scale, options: argparse.Namespace) -> Trainings:
    """Trains every method with every seed, for each number of ways and shots that needs its own training."""
    settings = [setting for setting in SETTINGS if setting[0] in options.ways]
    plain = f"pixels_{options.split}_{scale.size}{'_disjoint' * options.disjoint_drawers}"
    trainings = Trainings({s: {f"pixel prototypes{SEED}0": (pixels, plain)} for s in settings}, {}, {})
    for seed in range(options.seeds):
        for name in options.methods:
            row = ROWS[name]
            all_shots = options.own_shots if row.ways and row.shots is None else options.own_shots[:1]
            for ways in options.own_head if row.ways else options.ways[-1:]:
                for shots in all_shots:
                    started = time.process_time()
                    one = train(name, ways, shots, seed, parts, scale, options)
                    label = f"{name}, {ways} ways" + (f", {shots} shot(s)" if len(all_shots) > 1 else "")
                    trainings.by_label.setdefault(label, []).append(one)
                    seconds = time.process_time() - started
                    print(f"[{seconds:6.0f} s] {label}, seed {seed}: {np.round([*one.curve.values()], 3)}", flush=True)
                    for tested in settings:
                        same_shots = tested[1] == shots or len(all_shots) == 1
                        if same_shots and (tested[0] == ways or not row.ways):
                            trainings.methods[tested][f"{name}{SEED}{seed}"] = one.methods[tested[1]], one.name
                            if tested == (5, 1) and one.over_steps is not None:
                                trainings.over_steps[f"{name}{SEED}{seed}"] = one.over_steps, one.name
    return trainings


def main() -> None:
    options, scale = parse()
    parts, split = load(options.split, scale.size)
    if not options.smoke:
        keep_split(split, options)
    trainings = train_all(parts, scale, options)
    one_shot = script.data_file(Path(__file__).parent, "omniglot.npz").parent / "omniglot_oneshot_runs.npz"
    if options.split != "official" or not one_shot.is_file():  # Lake's runs have the official evaluation characters
        one_shot = None
    accuracies = judge(trainings.methods, parts, scale, options, one_shot)
    over_steps = judge_over_steps(trainings.over_steps, parts, scale, options)
    name = options.name or ("omniglot_small" if options.small else "omniglot")
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(accuracies, over_steps, trainings.by_label, options.out / f"{name}.png")
    text = report(accuracies, trainings.by_label) + circumstances(scale, options)
    script.publish(Path(__file__).parent, "Omniglot", text, options, name=name)


def circumstances(scale: Scale, options: argparse.Namespace) -> str:
    """Returns a list of the sizes, and of how methods were trained and tested."""
    shares = ", ".join(f"{name} {ROWS[name].share:g}" for name in options.methods)
    drawers = "An episode ignores who drew an example, as in the literature."
    if options.disjoint_drawers:
        drawers = "No person drew in both sets of an episode, which is harder than the literature's episodes."
    with_shots = "Training is with one shot (Reptile five), tests are with one and five."
    if len(options.own_shots) > 1:
        with_shots = (
            "Methods that learn a head are trained with as many shots as tested. "
            "The others are trained with one (Reptile five)."
        )
    spread = SPREAD if options.seeds > 1 else ""
    return (
        "\n\n"
        f"- {scale.episodes} episodes of unseen characters, {options.split} split, the same for all.\n"
        f"- Accuracies: mean ± 95 % over episodes, of the mean over {options.seeds} seed(s).{spread}\n"
        f"- Network: {scale.blocks} blocks of {scale.filters} filters on {scale.size} × {scale.size} pixels.\n"
        f"- Training: {scale.steps:,} outer steps of {scale.tasks} tasks of five ways, or {num_tasks(scale, 20)} of "
        "twenty (fine-tuning: of 30 rows each).\n"
        f"- Methods take these shares of the outer steps: {shares}.\n"
        f"- Inner steps in training: {scale.inner_steps} for MAML and related methods (iMAML 5, Reptile 4, MAML++ 3, "
        f"Proto-MAML 1). At test: at most {scale.test_steps}.\n"
        f"- {with_shots}\n"
        f"- {drawers} Pixel prototypes see the same images."
    )
