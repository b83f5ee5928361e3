"""DARTS on CIFAR-10: cells are searched, drawn, trained from scratch, and compared with random ones.

A search trains a supernet on one half of the training images and α on the other. Then the resulting cells, and cells
drawn at random from the same space, are trained separately on all training images by the standard recipe. Every
architecture has three accuracies: of the supernet with mixed ops, of the architecture with the supernet's weights, and
after separate training. They are on test images, and no choice depends on them. The report also states how well the
supernet's ranks agree with those of training.

    python experiments/architecture/darts_cifar.py  # 16 × 16, 4 channels, 3 cells: for processor cores
    python experiments/architecture/darts_cifar.py --full  # the published sizes, with `--data` or `--tfds`
    python experiments/architecture/darts_cifar.py --smoke  # prints only

Every search and every training is saved in the folder that `--work` names. If it was stopped, it continues from there.
Saved results of other images or sizes are rejected.

Images are cifar10_sub32.npz in the folder that METAOPT_DATA names, a fifth of CIFAR-10, which is not enough for
`--full`. `--data FILE` takes an .npz of x_train, y_train, x_test, y_test (uint8 [N, 32, 32, 3], integers), and `--tfds`
uses TensorFlow Datasets. Results go to experiments/results/darts_cifar.md and .png.

Differences from the published experiment: normalization has no scale and shift (see `nas.retraining`). The small
scale takes a hundredth of the steps. So it moves α at a rate of 0.02 instead of 3e-4, drops few edges and has no
auxiliary head. Its α are of first order, unless `--order` says otherwise. Networks are normalized by statistics of
training images. (The committed results are from a version that normalized by batches of test images.)
"""

import functools
import json
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from metaopt import base, inner, nas, tasks, training


class Scale(NamedTuple):
    size: int  # pixels per side
    # The search.
    channels: int
    cells: int
    batch: int
    steps: int
    rate: float  # initial rate of the weights, with a cosine decay to `last_rate`
    last_rate: float
    alpha_rate: float
    # Separate training.
    channels_alone: int
    cells_alone: int
    batch_alone: int
    steps_alone: int
    rate_alone: float
    crop: int
    cutout: int
    drop_path: float
    auxiliary: float
    every: int  # steps between checkpoints
    random: int = 4  # cells drawn at random
    order: str = "first"
    judged: int = 1_000  # test images for the accuracy of supernets, which run all ops
    nodes: int = 4
    primitives: tuple[str, ...] = nas.DARTS_PRIMITIVES


def space(scale: Scale, channels: int, cells: int) -> nas.Network:
    return nas.darts_space(10, channels=channels, num_cells=cells, num_nodes=scale.nodes, primitives=scale.primitives)


SMALL = Scale(16, 4, 3, 16, 400, 0.05, 0.001, 2e-2, 4, 3, 32, 500, 0.1, 2, 4, 0.05, 0.0, 50)
# 25,000 images of each half in batches of 64 for 50 epochs; 50,000 in batches of 96 for 600.
FULL = Scale(32, 16, 8, 64, 391 * 50, 0.025, 0.001, 3e-4, 36, 20, 96, 521 * 600, 0.025, 4, 16, 0.2, 0.4, 1_000)
FULL = FULL._replace(order="second", judged=10_000)
SMOKE = SMALL._replace(size=4, channels=2, cells=2, batch=4, steps=2, channels_alone=2, cells_alone=2, batch_alone=4)
SMOKE = SMOKE._replace(steps_alone=2, cutout=2, random=1, every=1, nodes=1, primitives=nas.DARTS_PRIMITIVES[2:5])


def load(options, scale: Scale) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parts "train" and "test" as {"x", "y"}, standardized by the channels of "train"."""
    if options.full and not (options.data or options.tfds):
        sys.exit("--full needs whole CIFAR-10, by --data FILE or --tfds: cifar10_sub32.npz is a fifth of it.")
    if options.tfds:
        sources = {part: tasks.from_tfds("cifar10", split=part) for part in ("train", "test")}
        raw = {part: (source.x, source.y) for part, source in sources.items()}
    else:
        path = options.data or script.data_file(__file__, "cifar10_sub32.npz")
        with np.load(path, allow_pickle=False) as data:
            missing = {f"{a}_{part}" for a in "xy" for part in ("train", "test")} - set(data)
            if missing:
                sys.exit(f"{path} must hold x_train, y_train, x_test and y_test; {', '.join(sorted(missing))} missing.")
            raw = {part: (data[f"x_{part}"], data[f"y_{part}"]) for part in ("train", "test")}
    parts = {}
    for part, (x, y) in raw.items():
        x = np.asarray(x, np.float32) / 255
        step = x.shape[1] // scale.size
        x = x.reshape(len(x), scale.size, step, scale.size, step, 3).mean((2, 4))
        parts[part] = {"x": x, "y": np.asarray(y, np.int32).ravel()}
    mean, std = (f(parts["train"]["x"], (0, 1, 2)) for f in (np.mean, np.std))
    for part in parts.values():
        part["x"] = (part["x"] - mean) / std
    return {part: {k: v[:64] for k, v in rows.items()} for part, rows in parts.items()} if options.smoke else parts


def identity(parts: dict, scale: Scale) -> dict:
    """Returns everything, besides seed and cell, that a search or a training depends on."""
    sums = {f"{part} {k}": zlib.crc32(np.ascontiguousarray(v)) for part, rows in parts.items() for k, v in rows.items()}
    sizes = scale._asdict()
    for name in ("random", "judged", "every"):  # neither depends on these
        sizes.pop(name)
    return {"images": sums, "scale": json.loads(json.dumps(sizes))}


def search(seed: int, data: dict, scale: Scale, settings: dict, options) -> tuple[nas.Genotype, dict]:
    """Returns the genotype of one search, its supernet, the supernet's params and the mixing weights."""
    network = space(scale, scale.channels, scale.cells)
    halves = np.array_split(np.random.default_rng(seed).permutation(len(data["y"])), 2)
    train, valid = ({k: v[rows] for k, v in data.items()} for rows in halves)

    rows, change = inner.minibatch(scale.batch), nas.crop_and_flip(scale.crop)

    def sampler(key, step, data):
        batch = rows(key, step, data)
        return {**batch, "x": change(jax.random.fold_in(jax.random.fold_in(key, 1), step), batch["x"])}

    def outer_batch(key, task):
        index_key, key = jax.random.split(key)
        index = jax.random.randint(index_key, (scale.batch,), 0, len(halves[1]))
        return {"x": change(key, task.valid["x"][index]), "y": task.valid["y"][index]}

    rate = optax.cosine_decay_schedule(scale.rate, scale.steps, scale.last_rate / scale.rate)
    darts = nas.darts(
        network,
        data["x"].shape[1:],
        ops=nas.DARTS_OPS,
        order=scale.order,
        optimizer=lambda hp: optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(rate, momentum=0.9)),
        sampler=sampler,
        outer_batch=outer_batch,
    )
    of_alpha = optax.chain(optax.add_decayed_weights(1e-3), optax.adam(scale.alpha_rate, b1=0.5))
    task = base.Task(*jax.tree.map(jnp.asarray, (train, valid)))
    key = jax.random.key(seed)
    result = training.fit(
        training.learner(darts.estimator, of_alpha),
        lambda key: task,
        hyperparams=darts.hyperparams(jax.random.fold_in(key, 1)),
        num_steps=scale.steps,
        key=key,
        checkpoint_dir=None if options.smoke else (options.work / f"search_{seed}").absolute(),
        checkpoint_every=scale.every,
        settings={**settings, **darts.settings},
    )
    alpha, params = result.hyperparams, result.state.estimator_state.inner.params
    weights = {kind: np.asarray(w) for kind, w in darts.weights(alpha).items()}
    return darts.genotype(alpha), {"net": darts.supernet, "params": params, "weights": weights}


def train_alone(
    genotype: nas.Genotype, name: str, seed: int, parts: dict, scale: Scale, settings: dict, options
) -> float:
    """Returns the test accuracy after training from scratch. It is saved in a separate file."""
    file = options.work / f"{name}_{seed}.json"
    settings = {**settings, "genotype": json.loads(nas.genotype_to_text(genotype))}
    judged = {**settings, "normalization": "statistics of training images"}
    if not options.smoke and file.is_file():
        kept = json.loads(file.read_text())
        if kept.get("settings") != judged:
            sys.exit(
                f"{file} is of another cell, other images or sizes, or another normalization: give --work another "
                "folder, or remove the file."
            )
        return kept["accuracy"]
    network = space(scale, scale.channels_alone, scale.cells_alone)
    recipe = nas.retraining(
        nas.discrete(network, genotype),
        parts["train"]["x"].shape[1:],
        ops=nas.DARTS_OPS,
        num_steps=scale.steps_alone,
        batch_size=scale.batch_alone,
        rate=scale.rate_alone,
        drop_path=scale.drop_path,
        auxiliary=scale.auxiliary,
        augment=(nas.crop_and_flip(scale.crop), nas.cutout(scale.cutout)),
    )
    state, _ = nas.train_loop(
        recipe.loop,
        jax.tree.map(jnp.asarray, parts["train"]),
        num_steps=scale.steps_alone,
        key=jax.random.key(1_000 + seed),
        checkpoint_dir=None if options.smoke else (options.work / f"{name}_{seed}").absolute(),
        checkpoint_every=scale.every,
        settings=settings,
    )
    accuracy = recipe.finish(state, parts["train"]).accuracy(parts["test"])
    if not options.smoke:
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"settings": judged, "accuracy": accuracy}))
        part.replace(file)
    return accuracy


def num_params(genotype: nas.Genotype, scale: Scale) -> int:
    """Returns the number of parameters of the separately trained network, without its auxiliary head."""
    network = nas.discrete(space(scale, scale.channels_alone, scale.cells_alone), genotype)
    net = nas.supernet(network, (scale.size, scale.size, 3), ops=nas.DARTS_OPS)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))


def text_of(genotypes: dict[str, nas.Genotype], reports: dict[str, Any], scale: Scale, num_images: int) -> str:
    lines = []
    for name, report in reports.items():
        lines += [f"## The supernet of {name}", "", report.text, ""]
    lines += ["## Cells", ""]
    lines += [
        f"- {name}, {num_params(genotype, scale):,} parameters when retrained: "
        f"`{nas.genotype_to_text(genotype, form='darts')}`"
        for name, genotype in genotypes.items()
    ]
    lines += [
        "",
        "**Settings.**",
        "",
        f"- Data: {scale.size} × {scale.size} images, {num_images:,} for training. Half of the training images train "
        f"α. Images are moved by up to {scale.crop} pixels and flipped.",
        f"- Search: DARTS of {'first' if scale.order == 'first' else 'second'} order, {scale.steps:,} alternations "
        f"with batches of {scale.batch}, {scale.cells} cells of {scale.channels} channels.",
        f"- Retraining: {scale.steps_alone:,} steps with batches of {scale.batch_alone}, {scale.cells_alone} cells of "
        f"{scale.channels_alone} channels.",
        f"- Accuracies are test accuracies (supernets: on {scale.judged:,} images). No choice depends on them.",
        "- The random cells are the same in all tables.",
        "- If a run continues earlier ones, its processor seconds are those of the last run.",
    ]
    return "\n".join(lines)


def draw(genotypes: dict[str, nas.Genotype], network: nas.Network, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from metaopt import plots

    figure, axes = pyplot.subplots(
        len(genotypes), 2, figsize=(16, 2.9 * len(genotypes)), layout="constrained", squeeze=False
    )
    for row, (name, genotype) in zip(axes, genotypes.items(), strict=True):
        for axis, (kind, edges) in zip(row, genotype.items(), strict=True):
            output = network.cells[kind].output
            plots.cell(edges, num_inputs=2, output=output, axes=axis, title=f"{name}: {kind}")
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=2)
    parser.add_argument("--full", action="store_true", help="the published sizes, on whole CIFAR-10")
    parser.add_argument("--data", type=Path, help="an .npz of x_train, y_train, x_test, y_test")
    parser.add_argument("--tfds", action="store_true", help="cifar10 of TensorFlow Datasets, as array_record")
    parser.add_argument("--order", choices=("first", "second", "exact"), help="of DARTS")
    parser.add_argument("--steps", type=int, help="alternations of a search")
    parser.add_argument("--steps-alone", type=int, help="of a training from scratch")
    parser.add_argument("--repeats", type=int, default=1, help="trainings from scratch of every architecture")
    parser.add_argument("--random", type=int, help="cells drawn at random")
    parser.add_argument(
        "--work", type=Path, default=Path("darts_cifar_runs"), help="where searches and trainings are kept"
    )
    options = parser.parse_args()
    scale = SMOKE if options.smoke else FULL if options.full else SMALL
    asked = {name: getattr(options, name) for name in ("order", "steps", "steps_alone", "random")}
    scale = scale._replace(**{name: value for name, value in asked.items() if value is not None})
    seeds = 1 if options.smoke else options.seeds
    # Runs of other sizes go to other folders.
    options.work /= f"{scale.size}_{scale.order}_{scale.steps}_{scale.steps_alone}"
    if not options.smoke:
        options.work.mkdir(parents=True, exist_ok=True)
        # A training that continues does not compile again.
        jax.config.update("jax_compilation_cache_dir", str((options.work / "compiled").absolute()))
    parts = load(options, scale)
    settings = identity(parts, scale)
    cells = {f"DARTS, seed {seed}": search(seed, parts["train"], scale, settings, options) for seed in range(seeds)}
    for name, (genotype, _) in cells.items():
        print(f"{name}: {nas.genotype_to_text(genotype, form='darts')}", flush=True)
    network = space(scale, scale.channels_alone, scale.cells_alone)
    genotypes = {name: genotype for name, (genotype, _) in cells.items()}
    genotypes |= {f"random {i}": nas.random_genotype(i, network) for i in range(scale.random)}
    alone = {}
    for name, genotype in genotypes.items():
        file = name.replace(", ", "_").replace(" ", "_")
        runs = range(options.repeats)
        alone[name] = tuple(train_alone(genotype, file, seed, parts, scale, settings, options) for seed in runs)
        print(f"{name}: {', '.join(f'{100 * a:.1f}' for a in alone[name])} % trained alone", flush=True)
    reports, some = {}, {k: v[: scale.judged] for k, v in parts["test"].items()}
    for searched, (_, super_) in cells.items():
        fixed = functools.partial(nas.trained_network, super_["net"], super_["params"], parts["train"])
        judge = lambda weights, fixed=fixed: fixed(weights=weights).accuracy(some)
        spec, scores = super_["net"].network, []
        for name, one in genotypes.items():
            mixed = judge(super_["weights"]) if name == searched else float("nan")
            scores.append(nas.ArchitectureScores(name, judge(nas.one_hot(spec, one)), alone[name], mixed))
        reports[searched] = nas.search_report(scores)
    script.publish(
        __file__,
        "DARTS on CIFAR-10",
        text_of(genotypes, reports, scale, len(parts["train"]["y"])),
        options,
        picture="The cells that were found",
    )
    if not options.smoke:
        draw(genotypes, network, options.out / "darts_cifar.png")


if __name__ == "__main__":
    script.run(main)
