"""A small Meta-Dataset, in minutes: what was learned on some sources, judged on unseen classes and on unseen sources.

Six sources of 14 × 14 images: Omniglot, drawings (QuickDraw), sign digits, spoken digits (spectrograms), Fashion-MNIST,
MNIST. For each of the last five there is one training, on Omniglot's background characters and the four others; it is
judged on the source that it never saw. Omniglot is judged on its evaluation characters, by the first training. Ways,
shots and the balance of classes vary as in Meta-Dataset, with smaller numbers; where a source knows who drew or spoke,
support and query are by different people. All methods see the same episodes; pixel prototypes, the nearest class mean
by cosine, learn nothing. The features that are learned stand beside the image itself, of length 1: so a network begins
with what pixel prototypes see. The five trainings of a method run as one program, a `vmap` over the learner's two
functions.

    python experiments/small_meta_dataset.py             minutes; experiments/results/small_meta_dataset.md and .png
    python experiments/small_meta_dataset.py --smoke     seconds; prints only

The sources are read from the folder that METAOPT_DATA names.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import script
from jax.tree_util import Partial

from metaopt import hypergrad, methods, plots, tasks, training

LEFT_OUT = ("quickdraw8", "signdigits", "spoken_digits", "fashion_mnist", "mnist")


class Settings(NamedTuple):
    filters: int = 16
    tasks: int = 2  # a step, of each training
    steps: int = 400
    plain_steps: int = 1500  # of fine-tuning's pre-training, each of which costs a tenth
    test_steps: int = 15  # at most; how many is chosen on episodes of what was trained on
    rows: int = 2000  # of a source, at most; Omniglot's are all used
    episodes: int = 600
    sources: int = len(LEFT_OUT)


SMOKE = Settings(filters=2, tasks=1, steps=2, plain_steps=2, test_steps=2, rows=200, episodes=2, sources=2)
MOST_WAYS = 8
EPISODES: dict[str, Any] = {"min_ways": 5, "max_ways": MOST_WAYS, "max_query": 5, "max_support": 40}
BATCH = 64  # rows of a step of pre-training
GAINS = (4.0, 5.0)  # of the network's features and of the image, at the start: distances in both are about as large
RATES = (1e-3, 5e-3, 2e-2)  # of fine-tuning, chosen on episodes of what was trained on
CHECKED = 60  # such episodes
UNTRAINED = "prototypical networks, untrained"


class Row(NamedTuple):
    make: Callable  # (features, loss) -> Adaptation
    outputs: Callable | None = None  # number of classes trained on -> width of a head that is learned


LEARNED: dict[str, Any] = {"rates": "leaf", "order": "first"}
ROWS = {
    "prototypical networks": Row(lambda f, loss: methods.prototypical_networks(f)),
    "ridge head (R2D2)": Row(lambda f, loss: methods.ridge_head(f)),
    "Proto-MAML, learned rates": Row(lambda f, loss: methods.proto_maml(f, num_steps=2, rate=0.005, **LEARNED)),
    "MAML, learned rates": Row(
        lambda f, loss: methods.meta_sgd(loss, num_steps=5, rate=0.2, keep_support=True, **LEARNED),
        lambda num_classes: MOST_WAYS,
    ),
    "fine-tuning": Row(lambda f, loss: methods.pretrained(loss), lambda num_classes: num_classes),
}


def small(source: tasks.Source, rows: int, *, fresh: bool = False) -> tasks.Source:
    """Fewer rows, at random, and images of half the size; `fresh`: other rows, where a source has as many more."""
    if source.name != "omniglot" and len(source.x) > rows:
        order = np.random.default_rng(0).permutation(len(source.x))
        others = fresh and len(order) >= 2 * rows
        source = tasks.keep(source, rows=order[-rows:] if others else order[:rows])
    x = source.x.reshape(len(source.x), 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)
    return source._replace(x=x)


def weights(sources: Sequence[tasks.Source], left_out: str) -> list[float]:
    # Weights are positive; in float32 this share is zero.
    return [1e-12 if source.name == left_out else 1.0 for source in sources]


def of_all_trainings(make: Callable, left_out: Sequence[str]) -> Partial:
    """One sampler whose data have a leading axis of trainings: they differ in the shares of the sources alone."""
    some = [make(name) for name in left_out]
    return Partial(some[0].func, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.args for one in some)))


def pixels(key, support, query):
    """The nearest class mean of the images, by cosine."""
    flat = lambda x: x.reshape(len(x), -1)
    of = jax.nn.one_hot(support["y"], len(support["class_mask"])) * support["mask"][:, None]
    center = of.T @ flat(support["x"])
    length = jnp.maximum(jnp.linalg.norm(center, axis=1, keepdims=True), 1e-6)
    return (flat(query["x"]) @ (center / length).T)[None]


def beside_the_image(network: methods.Network) -> methods.Network:
    """The network's features, and the image of length 1, each times a gain that is learned."""

    def init(key):
        return {**network.init(key), "gain": jnp.array(GAINS)}

    def features(params, batch):
        learned = network.features(params, batch)
        image = batch["x"].reshape(len(learned), -1)
        length = jnp.sqrt((image**2).sum(1, keepdims=True) + 1e-6)
        gain = params["gain"]
        return jnp.concatenate([gain[0] * learned / learned.shape[1] ** 0.5, gain[1] * image / length], axis=1)

    return methods.Network(init, features)


def train(adaptation: methods.Adaptation, start: Callable, sampler: Partial, num_tasks: int | None, settings: Settings):
    """`key -> λ` of all trainings, along a leading axis. `num_tasks`: None for a sampler of one task."""
    num_steps = settings.steps if num_tasks else settings.plain_steps
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
    over = hypergrad.over_tasks if num_tasks else lambda estimator: estimator
    learner = training.learner(over(adaptation.estimator), optimizer)

    def one(sampler, key):
        start_key, init_key, key = jax.random.split(key, 3)
        draw = tasks.episode_batches(sampler, num_tasks) if num_tasks else sampler
        support = jax.tree.map(lambda x: x[0], draw(key).train) if num_tasks else draw(key).train
        state = learner.init(init_key, adaptation.hyperparams(start(start_key), support), draw(key))
        step = lambda state, i: (learner.step(state, draw(jax.random.fold_in(key, i)))[0], None)
        return jax.lax.scan(step, state, jnp.arange(num_steps))[0].hyperparams

    all_trainings = jax.jit(jax.vmap(one))
    return lambda key: all_trainings(sampler, jax.random.split(key, settings.sources))


def joined(evaluation: methods.Evaluation, seeds: dict[str, list[str]]) -> methods.Evaluation:
    """Each method once: the score of an episode is the mean over the seeds of its trainings."""
    mean = lambda source, names: np.mean([evaluation.scores[name][source] for name in names], axis=0)
    return evaluation._replace(
        scores={name: {s: mean(s, names) for s in evaluation.sources} for name, names in seeds.items()},
        transductive={name: evaluation.transductive[names[0]] for name, names in seeds.items()},
    )


def by_number(evaluation: methods.Evaluation) -> str:
    """Accuracy against ways and shots, over the episodes of all sources."""
    rows: dict[str, list[str]] = {name: [name] for name in evaluation.scores}
    header = [""]
    for of, edges in (("ways", (5, 6, 7, 8, 9)), ("shots", (1, 2, 3, 4, 9))):
        binned = methods.by_number(evaluation, of, edges)
        if of == "ways":
            header += [f"{number:.0f} ways" for number, *_ in next(iter(binned.values()))]
        else:
            header += [f"{number:.1f} shots" for number, *_ in next(iter(binned.values()))]
        for name, bins in binned.items():
            # One episode alone has no interval.
            rows[name] += [f"{mean:.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "") for _, _, mean, half in bins]
    return script.table(header, list(rows.values()))


def draw(evaluation: methods.Evaluation, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    plots.leaderboard(evaluation, axes=left)
    left.set(xlabel="accuracy, mean over sources", title="")
    plots.scores_by_number(evaluation, "shots", (1, 2, 3, 4, 9), axes=right, ylabel="accuracy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = script.parser(__doc__, num_seeds=3).parse_args()
    settings, seeds = (SMOKE, 1) if options.smoke else (Settings(), options.seeds)
    folder = script.data_file(__file__, "omniglot.npz").parent
    left_out = list(LEFT_OUT[: settings.sources])
    whole = tasks.from_image_sets(["omniglot", *left_out], path=folder)
    sources = {name: small(s, settings.rows) for name, s in whole.items()}
    judged_on = {name: small(s, settings.rows, fresh=True) for name, s in whole.items()}
    split = tasks.omniglot_split(folder)
    background, unseen = (tasks.select(sources["omniglot"], split, part)[0] for part in ("train", "test"))
    trained_on = [background, *(sources[name] for name in left_out)]
    num_classes = sum(source.num_classes for source in trained_on)
    episodes = of_all_trainings(
        lambda name: tasks.meta_dataset_episodes(trained_on, **EPISODES, weights=weights(trained_on, name)), left_out
    )
    rows = of_all_trainings(
        lambda name: tasks.labelled_batches(trained_on, BATCH, weights=weights(trained_on, name)), left_out
    )

    network = beside_the_image(methods.conv4(normalization="support", num_filters=settings.filters, num_blocks=2))
    head = methods.linear_head(network.features)
    loss = lambda params, hyperparams, batch: methods.cross_entropy(head(params, batch), batch)

    judged: dict[str, methods.AdaptFn] = {"pixel prototypes": pixels}
    names: dict[str, list[str]] = {"pixel prototypes": ["pixel prototypes"], UNTRAINED: []}
    untrained = methods.prototypical_networks(network.features)
    for seed in range(seeds):
        drawn = untrained.hyperparams(network.init(jax.random.fold_in(jax.random.key(1), seed)))
        judged[f"{UNTRAINED}, {seed}"] = methods.adapted(untrained, drawn, head)
        names[UNTRAINED].append(f"{UNTRAINED}, {seed}")
    tuned = lambda rate: methods.proto_maml(network.features, adapt="^head", rate=rate)

    def of_each(adaptation, hyperparams, num_steps):
        """The method whose λ is that of the training which an episode names."""

        def method(key, support, query):
            of_source = jax.tree.map(lambda x: x[support["training"]], hyperparams)
            return methods.adapted(adaptation, of_source, head, num_steps=num_steps)(key, support, query)

        return method

    def on_trained(adaptation, hyperparams):
        """Accuracy on episodes of what was trained on, after 0..`test_steps` steps."""
        method = of_each(adaptation, hyperparams, settings.test_steps)

        def one(episodes, key, number):
            support, query, _ = jax.tree.map(lambda x: x[number], episodes)(key)
            seen = {k: v for k, v in query.items() if k != "y"}
            outputs = method(key, {**support, "training": number}, seen)
            return jax.vmap(methods.accuracy, (0, None))(outputs, query)

        keys = jax.random.split(jax.random.key(3), CHECKED)
        numbers = jnp.arange(CHECKED) % settings.sources
        # The data are an argument: constants would take long to compile.
        mean = jax.jit(lambda episodes: jax.lax.map(lambda pair: one(episodes, *pair), (keys, numbers)).mean(0))
        return mean(episodes)

    chosen: list[str] = []
    for name, row in list(ROWS.items())[: 1 if options.smoke else None]:
        started = time.process_time()
        adaptation = row.make(network.features, loss)

        def start(key, row=row):
            params = network.init(key)
            if row.outputs is None:
                return params
            num, depth = row.outputs(num_classes), settings.filters * 9 + 14**2
            return {**params, "head": {"w": jnp.zeros((depth, num)), "b": jnp.zeros(num)}}

        alone = name == "fine-tuning"
        run = train(adaptation, start, rows if alone else episodes, None if alone else settings.tasks, settings)
        found = [run(jax.random.key(seed)) for seed in range(seeds)]
        # What is free at test is chosen on what was trained on: the number of steps, and fine-tuning's rate.
        num_steps = 0
        if adaptation.test_steps:
            candidates = {f"rate {rate:g}": tuned(rate) for rate in RATES} if alone else {"": adaptation}
            scores = {setting: on_trained(candidate, found[0]) for setting, candidate in candidates.items()}
            setting = max(scores, key=lambda setting: float(scores[setting].max()))
            adaptation, num_steps = candidates[setting], int(scores[setting].argmax())
            chosen.append(f"{name} {num_steps}" + (f" ({setting})" if alone else ""))
        names[name] = [f"{name}, {seed}" for seed in range(seeds)]
        judged |= {one: of_each(adaptation, hp, num_steps) for one, hp in zip(names[name], found, strict=True)}
        print(f"[{time.process_time() - started:5.0f} s] {name}", flush=True)

    def of_training(number, sample):
        def marked(key):
            support, query, meta = sample(key)
            return tasks.Episode({**support, "training": jnp.int32(number)}, query, meta)

        return marked

    tests = {"omniglot": of_training(0, tasks.meta_dataset_episodes(unseen, **EPISODES))}
    tests |= {
        name: of_training(number, tasks.meta_dataset_episodes(judged_on[name], **EPISODES))
        for number, name in enumerate(left_out)
    }
    each = methods.evaluate_episodes(
        judged, tests, jax.random.key(2027), num_episodes=settings.episodes, chunk_size=min(20, settings.episodes)
    )
    evaluation = joined(each, names)
    text = methods.leaderboard(evaluation, reference="pixel prototypes")
    means = methods.mean_scores(each)
    of_seeds = {name: [np.mean([m for m, _ in means[one].values()]) for one in all_] for name, all_ in names.items()}
    text += "\nMean over the sources, by seed: "
    text += "; ".join(f"{name} {', '.join(f'{x:.3f}' for x in xs)}" for name, xs in of_seeds.items())
    text += ".\n\nAgainst the numbers of ways and of shots (support examples for each way, in four bins):\n\n"
    text += by_number(evaluation)
    text += (
        f"\n\nAccuracies are means over {seeds} seed(s), which differ in initialization and training episodes; ± is 95 "
        f"% over episodes. {settings.filters} filters in each of two blocks, normalized by the support set, beside the "
        f"image; {settings.steps} outer steps of {settings.tasks} episodes (fine-tuning: {settings.plain_steps:,} of "
        f"{BATCH} rows, a tenth as dear); one training for each source that was left out. 5 to 8 ways, at most 40 "
        'support and 5 query examples of a class. "Untrained" is the same method with a network drawn alike. Inner '
        "gradients are of first order, and rates are learned, one a leaf, in training over 2 inner steps (Proto-MAML) "
        f"or 5 (MAML). Inner steps at test, at most {settings.test_steps}, and fine-tuning's rate, of {RATES}, are the "
        f"best on {CHECKED} episodes of what was trained on: {', '.join(chosen)}. Earlier forms lost to pixel "
        "prototypes on these sources: most methods without the image among their features, and with larger fixed "
        "rates; MAML with 3 inner steps, 5 at test and half as many outer steps, and fine-tuning after 200 steps. All "
        "that was changed when it was seen, the last two by episodes of what is trained on; so small differences to "
        "pixel prototypes are partly chosen. The episodes here, and of QuickDraw, Fashion-MNIST and MNIST the rows, "
        "are others than those."
    )
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(evaluation, options.out / "small_meta_dataset.png")
    script.publish(__file__, "A small Meta-Dataset", text, options)


if __name__ == "__main__":
    main()
