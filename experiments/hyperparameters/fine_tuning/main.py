"""Options and the seeds of the experiment."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import script
from experiments.hyperparameters import fine_tuning
from experiments.hyperparameters.fine_tuning import images, methods, network, report
from experiments.hyperparameters.fine_tuning.methods import LEARNED, SCRATCH
from experiments.hyperparameters.fine_tuning.network import SMOKE, Settings
from metaopt import hypergrad


def judged_task(rng, source: images.Source, start, shots: int, settings: Settings):
    """Draws a task with all classes of a judged source, and at most 100 test images of each."""
    num_classes = len(np.unique(source.y))
    per_class = np.bincount(source.y).min()
    num_test = min(per_class - max(settings.shots), settings.num_test)
    rows = max(settings.shots) * num_classes
    return images.draw_task(rng, source, start, shots=shots, rows=rows, num_classes=num_classes, num_query=num_test)


def run_seed(seed: int, settings: Settings, sources: dict, judged: dict, cifar: dict) -> dict[str, Any]:
    """Returns accuracies by (method, source, shots), the chosen λ, and costs."""
    keys = jax.random.split(jax.random.key(seed), 5)
    params = network.pretrained(keys[0], cifar["train"], settings)
    start = network.with_new_head(params)
    starts = dict.fromkeys(methods.grids(), start) | {SCRATCH: network.init_params(keys[1], settings)}
    test = {name: cifar["val"]._asdict()[name][:2000] for name in ("x", "y")}
    print(f"seed {seed}: CIFAR-10 accuracy {network.accuracy(params, test):.3f}", flush=True)
    predict, flops, history = methods.learn(sources, start, settings, keys[2])
    judge = methods.make_judge(settings)
    chosen = methods.choose(judge, sources, starts, settings, keys[3])
    chosen[LEARNED], starts[LEARNED] = {shots: predict(shots) for shots in settings.shots}, start
    accuracies = {}
    for source in judged:
        for shots in settings.shots:
            rng = methods.generator(jax.random.fold_in(keys[4], shots))
            for draw in range(settings.draws):
                task = judged_task(rng, judged[source], None, shots, settings)
                key = jax.random.fold_in(keys[4], draw)
                for name, points in chosen.items():
                    started = task._replace(train=task.train | {"start": starts[name]})
                    accuracies.setdefault((name, source, shots), []).append(
                        float(judge(key, points[shots], started)[1])
                    )
    # The unit of cost is one fine-tuning of the grid, on a training task. All training tasks have the same shapes.
    task = methods.sample_training_task(methods.generator(keys[3]), sources, start, settings.shots[0], settings)
    one = lambda hp: judge(keys[0], hp, task)
    num_grid = len(methods.grids()["hand-set rates"]) * settings.grid_tasks * len(settings.shots)
    costs = {"learned": flops / hypergrad.flops(one, predict(settings.shots[0])), "grid": float(num_grid)}
    means = {place: 100 * float(np.mean(values)) for place, values in accuracies.items()}
    return {"accuracies": means, "chosen": chosen, "costs": costs, "history": history}


def main() -> None:
    parser = script.parser(fine_tuning.__doc__, num_seeds=2)
    parser.add_argument("--full", action="store_true", help="five seeds")
    options = parser.parse_args()
    settings, seeds = (SMOKE, 1) if options.smoke else (Settings(), 5 if options.full else options.seeds)
    folder = Path(__file__).parent
    cifar = {part: images.read_cifar(part) for part in ("train", "val")}
    for name in (*images.TRAINING, *images.JUDGED):
        script.data_file(folder, "fashion_mnist_sub.npz" if name == "fashion_mnist" else f"{name}.npz")
    sources, judged = ({name: images.read_source(name) for name in names} for names in (images.TRAINING, images.JUDGED))
    runs = []
    for seed in range(seeds):
        runs.append(run_seed(seed, settings, sources, judged, cifar))
        for place, value in runs[-1]["accuracies"].items():
            print(f"seed {seed}: {', '.join(map(str, place))}: {value:.1f}", flush=True)
    script.publish(folder, "Fine-tuning on few images", report.report(runs, settings), options)
    if not options.smoke:
        report.plot(runs, settings, options.out / "fine_tuning.png")


if __name__ == "__main__":
    script.run(main)
