"""Trains every method, evaluates it on the same episodes, and writes the result."""

import functools
import time
from pathlib import Path

import jax

import metaopt
from experiments import script
from experiments.few_shot import film, small_meta_dataset
from experiments.few_shot.small_meta_dataset.methods import ROWS, SMOKE, Settings
from experiments.few_shot.small_meta_dataset.report import circumstances, draw, joined, report
from experiments.few_shot.small_meta_dataset.sources import Data, load_data, splits, test_samplers
from experiments.few_shot.small_meta_dataset.training import Methods, make_methods
from metaopt import evaluation, few_shot


def evaluate(methods: Methods, data: Data, settings: Settings, seeds: int, options) -> evaluation.Evaluation:
    """Evaluates all methods on the same episodes. Scores that are in the folder of finished work are not computed."""
    tests, by_seed = test_samplers(data), []
    for seed in range(seeds):
        own = {name: methods.by_seed[name] for names in methods.names.values() for name in names[seed : seed + 1]}
        file = options.work / f"episodes_{seed}.npz"
        scored = metaopt.load(file) if file.is_file() and not options.smoke else None
        new = {name: method for name, method in own.items() if scored is None or name not in scored.scores}
        if new:
            chunk_size = min(20, settings.episodes)
            key, num_episodes = jax.random.key(2028), settings.episodes
            one = few_shot.evaluate_episodes(new, tests, key, num_episodes=num_episodes, chunk_size=chunk_size)
            scored = one if scored is None else evaluation.join_evaluations(scored, one)
            if not options.smoke:
                metaopt.save(file, scored)
        by_seed.append(scored)
        print(f"[{time.process_time():5.0f} s in all] seed {seed} is judged", flush=True)
    return functools.reduce(evaluation.join_evaluations, by_seed)


def main() -> None:
    parser = script.parser(small_meta_dataset.__doc__, num_seeds=3)
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("small_meta_dataset_runs"),
        help="what has ended is kept here, by what code it was made with",
    )
    options = parser.parse_args()
    options.work = script.work_folder(options.work, Path(__file__).parent, film.__file__)
    settings, seeds = (SMOKE, 1) if options.smoke else (Settings(), options.seeds)
    if options.smoke:
        options.methods = ["prototypical networks"]
    data = load_data(script.data_file(Path(__file__).parent, "omniglot.npz").parent, settings)
    methods = make_methods(data, settings, seeds, options)
    each = evaluate(methods, data, settings, seeds, options)
    result = joined(each, methods.names)
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(result, options.out / "small_meta_dataset.png")
        for name, one in splits(data.whole, data.split, settings.rows).items():
            metaopt.save(options.work / f"split_without_{name}.json", one)
    text = report(each, result, methods) + circumstances(settings, seeds, methods.chosen)
    script.publish(Path(__file__).parent, "A small Meta-Dataset", text, options)
