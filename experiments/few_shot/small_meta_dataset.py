"""A small Meta-Dataset: training on some sources, scored on unseen classes and on unseen sources.

Six sources of 14 × 14 images: Omniglot, drawings (QuickDraw), sign digits, spoken digits (spectrograms), Fashion-MNIST,
MNIST. For each of the last five there is one training, on Omniglot's background characters and the four others. It is
scored on the source that it never saw. For Omniglot, the first training is scored on its evaluation characters. Ways,
shots and the balance of classes vary as in Meta-Dataset, with smaller numbers. If a source knows who drew or spoke,
support and query are by different people.

All methods see the same episodes. Pixel prototypes (the nearest class mean by cosine) learn nothing. The learned
features are concatenated with the image itself, scaled to length 1, so a network begins with the inputs of pixel
prototypes. The five trainings of a method run as one program, a `vmap` over the learner's two functions.

    python experiments/few_shot/small_meta_dataset.py             three seeds, 95 minutes on a core; writes the page
    python experiments/few_shot/small_meta_dataset.py --seeds 1   2.4 minutes for each of 13 methods
    python experiments/few_shot/small_meta_dataset.py --smoke     seconds; prints only

The sources are read from the folder that METAOPT_DATA names.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from experiments import script
from metaopt import evaluation, few_shot, hypergrad, plots, tasks, training

LEFT_OUT = ("quickdraw8", "signdigits", "spoken_digits", "fashion_mnist", "mnist")


class Settings(NamedTuple):
    filters: int = 16
    tasks: int = 2  # per step, of each training
    steps: int = 400
    plain_steps: int = 1500  # of fine-tuning's pre-training; a step costs a tenth
    test_steps: int | None = None  # at most, for all; the number is chosen on episodes of the training sources
    rows: int = 2000  # at most, per source; Omniglot's are all used
    episodes: int = 600
    sources: int = len(LEFT_OUT)


SMOKE = Settings(filters=2, tasks=1, steps=2, plain_steps=2, test_steps=2, rows=200, episodes=2, sources=2)
MOST_WAYS = 8
EPISODES: dict[str, Any] = {"min_ways": 5, "max_ways": MOST_WAYS, "max_query": 5, "max_support": 40}
BATCH = 64  # rows of a step of pre-training
# gains of the network's features and of the image, at the start: distances in both have a similar size
GAINS = (4.0, 5.0)
RATES = (1e-3, 5e-3, 2e-2)  # of fine-tuning, chosen on episodes of the training sources
CHECKED = 60  # such episodes
UNTRAINED = "prototypical networks, untrained"


class Row(NamedTuple):
    make: Callable  # (features, loss) -> Adaptation
    head: float | None = None  # for a learned head: standard deviation of its weights at the start, times √D
    context: int = 0  # entries of a context vector that scales and shifts the features
    plain: bool = False  # pre-trained on all classes at once
    outer: Callable = optax.adam  # a schedule -> the outer optimizer
    outer_rate: float = 3e-3  # at first
    test_steps: int = 15  # at most


LEARNED: dict[str, Any] = {"rates": "leaf", "order": "first"}
FIXED: dict[str, Any] = {"rate": 0.2, "keep_support": True}
STRONGER: dict[str, Any] = {"rate": 0.4, "keep_support": True}
ROWS = {
    "prototypical networks": Row(lambda f, loss: few_shot.prototypical_networks(f)),
    "ridge head (R2D2)": Row(lambda f, loss: few_shot.ridge_head(f)),
    "Proto-MAML": Row(lambda f, loss: few_shot.proto_maml(f, num_steps=2, rate=0.005, **LEARNED)),
    "MAML": Row(lambda f, loss: few_shot.maml(loss, num_steps=5, **FIXED), 0.0),
    "FOMAML": Row(lambda f, loss: few_shot.fomaml(loss, num_steps=5, **FIXED), 0.0),
    "Meta-SGD, a rate a leaf": Row(lambda f, loss: few_shot.meta_sgd(loss, num_steps=5, **FIXED, **LEARNED), 0.0),
    "MAML++": Row(lambda f, loss: few_shot.maml_plus_plus(loss, num_steps=5, multi_step_steps=200, **FIXED), 0.0),
    "ANIL": Row(lambda f, loss: few_shot.anil(loss, num_steps=5, **FIXED), 0.0),
    # With a head of zeros, nothing else would have a gradient.
    "BOIL": Row(lambda f, loss: few_shot.boil(loss, num_steps=5, **STRONGER), 0.3, test_steps=30),
    # Its direction is a distance moved, not a gradient.
    "Reptile": Row(
        lambda f, loss: few_shot.reptile(loss, num_steps=5, **STRONGER),
        0.0,
        outer=optax.sgd,
        outer_rate=0.3,
        test_steps=30,
    ),
    "iMAML": Row(lambda f, loss: imaml(loss), 0.0, outer_rate=2e-3, test_steps=20),
    "CAVIA, with prototypes": Row(lambda f, loss: cavia_with_prototypes(f), context=32),
    "fine-tuning": Row(lambda f, loss: few_shot.pretrained(loss), 0.0, plain=True),
}


def drawn_rows(source: tasks.Source, rows: int, *, fresh: bool = False) -> np.ndarray | None:
    """Returns at most `rows` random rows; None means all rows.

    With `fresh`, it returns other rows if the source has as many more.
    """
    if source.name == "omniglot" or len(source.x) <= rows:
        return None
    order = np.random.default_rng(0).permutation(len(source.x))
    others = fresh and len(order) >= 2 * rows
    return order[-rows:] if others else order[:rows]


def small(source: tasks.Source, rows: int, *, fresh: bool = False) -> tasks.Source:
    """Returns fewer random rows, and images of half the size.

    With `fresh`, other rows if the source has as many more.
    """
    kept = drawn_rows(source, rows, fresh=fresh)
    source = source if kept is None else tasks.keep(source, rows=kept)
    x = source.x.reshape(len(source.x), 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)
    return source._replace(x=x)


def weights(sources: Sequence[tasks.Source], left_out: str) -> list[float]:
    return [0.0 if source.name == left_out else 1.0 for source in sources]


def of_all_trainings(make: Callable, left_out: Sequence[str]) -> Partial:
    """Returns one sampler whose data have a leading axis of trainings.

    These only differ in the shares of the sources.
    """
    some = [make(name) for name in left_out]
    return Partial(some[0].func, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.args for one in some)))


def pixels(key, support, query):
    """Classifies by the nearest class mean of the images, by cosine."""
    flat = lambda x: x.reshape(len(x), -1)
    of = jax.nn.one_hot(support["y"], len(support["class_mask"])) * support["mask"][:, None]
    center = of.T @ flat(support["x"])
    length = jnp.maximum(jnp.linalg.norm(center, axis=1, keepdims=True), 1e-6)
    return (flat(query["x"]) @ (center / length).T)[None]


def beside_the_image(network: few_shot.Network) -> few_shot.Network:
    """Concatenates the network's features and the image, each times a learned gain.

    The image has length 1, minus the mean of the support set. Without this subtraction, the common part of all images
    would make up most of the curvature for a head that starts from zeros.
    """

    def init(key):
        return {**network.init(key), "gain": jnp.array(GAINS)}

    def of_length_1(batch):
        image = batch["x"].reshape(len(batch["x"]), -1)
        return image / jnp.sqrt((image**2).sum(1, keepdims=True) + 1e-6)

    def features(params, batch):
        learned = network.features(params, batch)
        support = params.get("support", batch)  # a support set is its own
        mean = (of_length_1(support) * support["mask"][:, None]).sum(0) / support["mask"].sum()
        image = of_length_1(batch) - mean
        gain = params["gain"]
        return jnp.concatenate([gain[0] * learned / learned.shape[1] ** 0.5, gain[1] * image], axis=1)

    return few_shot.Network(init, features)


def modulated(features: Callable) -> Callable:
    """Multiplies features by 1 + A φ, and adds B φ, with a context vector φ."""

    def of_context(params, batch):
        scale, shift = jnp.einsum("k,ikd->id", params["context"], params["modulation"])
        return features(params, batch) * (1 + scale[None]) + shift[None]

    return of_context


def cavia_with_prototypes(features: Callable) -> few_shot.Adaptation:
    """Adapts a context vector, from zero, as in CAVIA. The head is the prototypes of the unmodulated features."""
    prototypes = few_shot.proto_maml(features).problem.loop

    def init(key, hyperparams, data):
        made = prototypes.params(prototypes.init(key, {"init": hyperparams["init"]}, data))
        context = jnp.zeros(hyperparams["init"]["modulation"].shape[1])
        return {**hyperparams["init"], "head": made["head"], "context": context}

    head = few_shot.linear_head(modulated(features))
    loss = lambda params, hyperparams, batch: few_shot.cross_entropy(head(params, batch), batch)
    return few_shot.adaptation(loss, init=init, adapt="^context$", num_steps=2, rate=0.5, keep_support=True)


def imaml(loss: Callable) -> few_shot.Adaptation:
    """iMAML with momentum, which comes closer to θ* than plain steps."""
    momentum = lambda rate: optax.sgd(rate, momentum=0.9)
    options: dict[str, Any] = {"optimizer": momentum, "rate": 0.05, "keep_support": True}
    return few_shot.imaml(loss, proximal=0.3, num_steps=15, solver=hypergrad.cg(num_steps=5), **options)


def train(row: Row, adaptation: few_shot.Adaptation, start: Callable, sampler: Partial, settings: Settings):
    """Returns `key -> λ` of all trainings, along a leading axis."""
    num_tasks = None if row.plain else settings.tasks
    num_steps = settings.plain_steps if row.plain else settings.steps
    optimizer = row.outer(optax.cosine_decay_schedule(row.outer_rate, num_steps))
    over = (lambda estimator: estimator) if row.plain else hypergrad.over_tasks
    learner = training.learner(lambda step: over(adaptation.estimator_at(step)), optax.chain(optimizer))

    def one(sampler, key):
        start_key, init_key, key = jax.random.split(key, 3)
        draw = tasks.episode_batches(sampler, num_tasks) if num_tasks else sampler
        support = jax.tree.map(lambda x: x[0], draw(key).train) if num_tasks else draw(key).train
        state = learner.init(init_key, adaptation.hyperparams(start(start_key), support), draw(key))
        step = lambda state, i: (learner.step(state, draw(jax.random.fold_in(key, i)))[0], None)
        return jax.lax.scan(step, state, jnp.arange(num_steps))[0].hyperparams

    all_trainings = jax.jit(jax.vmap(one))
    return lambda key: all_trainings(sampler, jax.random.split(key, settings.sources))


def kept(name: str, make: Callable[[], Any], options) -> Any:
    """Returns the result of `make`, loaded from the folder of finished work, or computed and saved there."""
    if options.smoke:
        return make()
    file = options.work / f"{name.replace(' ', '_')}.npz"
    if file.is_file():
        leaves, treedef = jax.tree.flatten(jax.eval_shape(make))
        with np.load(file) as saved:
            return jax.tree.unflatten(treedef, [jnp.asarray(saved[f"{i}"]) for i in range(len(leaves))])
    found = make()
    options.work.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, **{f"{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(found))})
    temporary.replace(file)
    return found


def joined(result: evaluation.Evaluation, seeds: dict[str, list[str]]) -> evaluation.Evaluation:
    """Joins the seeds of each method: an episode's score is the mean over the seeds of its trainings."""
    mean = lambda source, names: np.mean([result.scores[name][source] for name in names], axis=0)
    return result._replace(
        scores={name: {s: mean(s, names) for s in result.sources} for name, names in seeds.items()},
        transductive={name: any(result.transductive[n] for n in names) for name, names in seeds.items()},
    )


def by_number(result: evaluation.Evaluation) -> str:
    """Tabulates accuracy against ways and shots, over the episodes of all sources."""
    rows: dict[str, list[str]] = {name: [name] for name in result.scores}
    header = [""]
    for of, edges in (("ways", (5, 6, 7, 8, 9)), ("shots", (1, 2, 3, 4, 9))):
        binned = evaluation.by_number(result, of, edges)
        if of == "ways":
            header += [f"{number:.0f} ways" for number, *_ in next(iter(binned.values()))]
        else:
            header += [f"{number:.1f} shots" for number, *_ in next(iter(binned.values()))]
        for name, bins in binned.items():
            # A single episode has no interval.
            rows[name] += [f"{mean:.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "") for _, _, mean, half in bins]
    return script.table(header, list(rows.values()))


def missed(means: dict[str, dict[str, float]], against: dict[str, tuple[float, float]]) -> str:
    """Lists methods that miss the aim, to be above pixel prototypes, by the digits in the table.

    Args:
      means: method -> source -> mean accuracy.
      against: method -> the difference to pixel prototypes, mean over the sources and half of its interval.
    """
    trained = [name for name in means if name not in ("pixel prototypes", UNTRAINED)]
    bar = means["pixel prototypes"]
    below = {name: [s for s, mean in means[name].items() if round(mean, 3) <= round(bar[s], 3)] for name in trained}
    level = [name for name in trained if round(against[name][0], 3) <= round(against[name][1], 3)]
    return (
        f"The aim is that every method is above pixel prototypes. Means that are not: {script.listed(below)}. Over all "
        f"sources, the interval of the difference is not above 0 of: {'; '.join(level) or 'none'}."
    )


def splits(whole: dict[str, tasks.Source], omniglot: dict[str, Any], rows: int) -> dict[str, dict[str, Any]]:
    """Returns, for each left-out source, the classes and rows of the sources for training ("train") and test."""

    def of(name, fresh=False):
        kept = drawn_rows(whole[name], rows, fresh=fresh)
        return {} if kept is None else {"rows": kept.tolist()}

    names = [name for name in whole if name != "omniglot"]
    return {
        left_out: tasks.merge_splits(
            omniglot,
            {"train": {name: of(name) for name in names if name != left_out}},
            {"test": {left_out: of(left_out, fresh=True)}},
        )
        for left_out in names
    }


def draw(result: evaluation.Evaluation, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    plots.leaderboard(result, axes=left)
    left.set(xlabel="accuracy, mean over sources", title="")
    # There are more methods than colors.
    right.set_prop_cycle(color=[*matplotlib.colormaps["tab10"].colors] * 2, linestyle=["-"] * 10 + ["--"] * 10)
    plots.scores_by_number(result, "shots", (1, 2, 3, 4, 9), axes=right, ylabel="accuracy")
    right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=3)
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("small_meta_dataset_runs"),
        help="what has ended is kept here, by what code it was made with",
    )
    options = parser.parse_args()
    options.work = script.work_folder(options.work, __file__)
    settings, seeds = (SMOKE, 1) if options.smoke else (Settings(), options.seeds)
    if options.smoke:
        options.methods = ["prototypical networks"]
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

    network = beside_the_image(few_shot.conv4(normalization="support", num_filters=settings.filters, num_blocks=2))
    head = few_shot.linear_head(network.features)
    loss = lambda params, hyperparams, batch: few_shot.cross_entropy(head(params, batch), batch)

    judged: dict[str, few_shot.AdaptFn] = {"pixel prototypes": pixels}
    names: dict[str, list[str]] = {"pixel prototypes": ["pixel prototypes"], UNTRAINED: []}
    untrained = few_shot.prototypical_networks(network.features)
    for seed in range(seeds):
        drawn = untrained.hyperparams(network.init(jax.random.fold_in(jax.random.key(1), seed)))
        judged[f"{UNTRAINED}, {seed}"] = few_shot.adapted(untrained, drawn, head)
        names[UNTRAINED].append(f"{UNTRAINED}, {seed}")
    tuned = lambda rate: few_shot.proto_maml(network.features, adapt="^head", rate=rate)

    def of_each(adaptation, hyperparams, num_steps, outputs):
        """Returns a method that uses the λ of the training in the episode."""

        def method(key, support, query):
            of_source = jax.tree.map(lambda x: x[support["training"]], hyperparams)
            return few_shot.adapted(adaptation, of_source, outputs, num_steps=num_steps)(key, support, query)

        return method

    def on_trained(adaptation, hyperparams, outputs, test_steps):
        """Returns accuracy on episodes of the training sources, after 0..`test_steps` steps."""
        method = of_each(adaptation, hyperparams, test_steps, outputs)

        def one(episodes, key, number):
            support, query, _ = jax.tree.map(lambda x: x[number], episodes)(key)
            seen = {k: v for k, v in query.items() if k != "y"}
            predicted = method(key, {**support, "training": number}, seen)
            return jax.vmap(few_shot.accuracy, (0, None))(predicted, query)

        keys = jax.random.split(jax.random.key(3), CHECKED)
        numbers = jnp.arange(CHECKED) % settings.sources
        # The data are an argument: constants would take long to compile.
        mean = jax.jit(lambda episodes: jax.lax.map(lambda pair: one(episodes, *pair), (keys, numbers)).mean(0))
        return mean(episodes)

    chosen: list[str] = []
    for name, row in [(name, ROWS[name]) for name in options.methods]:
        started = time.process_time()
        adaptation = row.make(network.features, loss)
        outputs = few_shot.linear_head(modulated(network.features)) if row.context else head

        def start(key, row=row):
            network_key, head_key, context_key = jax.random.split(key, 3)
            params = network.init(network_key)
            num, depth = num_classes if row.plain else MOST_WAYS, settings.filters * 9 + 14**2
            if row.head is not None:
                drawn = row.head * jax.random.normal(head_key, (depth, num)) / depth**0.5
                params["head"] = {"w": drawn, "b": jnp.zeros(num)}
            if row.context:
                drawn = jax.random.normal(context_key, (2, row.context, depth))
                params["modulation"] = drawn / row.context**0.5
            return params

        run = train(row, adaptation, start, rows if row.plain else episodes, settings)
        found = [kept(f"{name}_{seed}", Partial(run, jax.random.key(seed)), options) for seed in range(seeds)]
        # Free choices at test are made on the training sources: the number of steps, and fine-tuning's rate.
        num_steps = 0
        if adaptation.test_steps:
            candidates = {f"rate {rate:g}": tuned(rate) for rate in RATES} if row.plain else {"": adaptation}
            steps = settings.test_steps or row.test_steps
            scores = {s: on_trained(candidate, found[0], outputs, steps) for s, candidate in candidates.items()}
            setting = max(scores, key=lambda setting: float(scores[setting].max()))
            adaptation, num_steps = candidates[setting], int(scores[setting].argmax())
            most = " (the most)" if num_steps == steps else ""
            chosen.append(f"{name} {num_steps}{most}" + (f" ({setting})" if row.plain else ""))
        names[name] = [f"{name}, {seed}" for seed in range(seeds)]
        each = zip(names[name], found, strict=True)
        judged |= {one: of_each(adaptation, hp, num_steps, outputs) for one, hp in each}
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
    by_seed = []
    for seed in range(seeds):
        of_seed = {name: judged[name] for all_ in names.values() for name in all_[seed : seed + 1]}
        file = options.work / f"episodes_{seed}.npz"
        known = evaluation.load_evaluation(file) if file.is_file() and not options.smoke else None
        new = {name: method for name, method in of_seed.items() if known is None or name not in known.scores}
        if new:
            chunk_size = min(20, settings.episodes)
            key, num_episodes = jax.random.key(2028), settings.episodes
            one = few_shot.evaluate_episodes(new, tests, key, num_episodes=num_episodes, chunk_size=chunk_size)
            known = one if known is None else evaluation.join_evaluations(known, one)
            if not options.smoke:
                evaluation.save_evaluation(file, known)
        by_seed.append(known)
        print(f"[{time.process_time():5.0f} s in all] seed {seed} is judged", flush=True)
    each = functools.reduce(evaluation.join_evaluations, by_seed)
    result = joined(each, names)
    text = evaluation.leaderboard(result, reference="pixel prototypes")
    whole_means = evaluation.mean_scores(result)
    pairs = evaluation.paired_differences(result, "pixel prototypes")
    over_sources = {name: np.array(list(of.values())) for name, of in pairs.items()}  # the same as in `leaderboard`
    text += "\n" + missed(
        {name: {source: mean for source, (mean, _) in of.items()} for name, of in whole_means.items()},
        {name: (of[:, 0].mean(), float(np.hypot.reduce(of[:, 1])) / len(of)) for name, of in over_sources.items()},
    )
    text += "\n"
    means = evaluation.mean_scores(each)
    of_seeds = {name: [np.mean([m for m, _ in means[one].values()]) for one in all_] for name, all_ in names.items()}
    text += "\nMean over the sources, by seed: "
    text += "; ".join(f"{name} {', '.join(f'{x:.3f}' for x in xs)}" for name, xs in of_seeds.items())
    text += ".\n\nAgainst the numbers of ways and of shots (support examples for each way, in four bins):\n\n"
    text += by_number(result)
    text += (
        f"\n\nAccuracies are means over {seeds} seed(s), which differ in initialization and training episodes; ± is 95 "
        f"% over episodes. {settings.filters} filters in each of two blocks, normalized by the support set, beside the "
        f"image; {settings.steps} outer steps of {settings.tasks} episodes (fine-tuning: {settings.plain_steps:,} of "
        f"{BATCH} rows, a tenth as dear); one training for each source that was left out. 5 to 8 ways, at most 40 "
        'support and 5 query examples of a class. "Untrained" is the same method with a network drawn alike. Inner '
        "steps in training are 2 (Proto-MAML, CAVIA) or 5; the inner gradients of Proto-MAML and Meta-SGD are of first "
        "order, and their rates are learned, one a leaf. CAVIA's context scales and shifts features before a head of "
        "prototypes. Of the image the support set's mean is taken away. Inner steps at test, at most 15 (iMAML 20, "
        f"Reptile and BOIL 30), and fine-tuning's rate, of {RATES}, are the best on {CHECKED} episodes of what was "
        f"trained on: {', '.join(chosen)}. Where that is the most, or the largest rate, more might be better. MAML++ "
        "is without its normalization for each step: rates and losses of every step alone. Earlier forms lost to pixel "
        "prototypes on these sources: most methods without the image among their features, and with larger fixed "
        "rates; Meta-SGD with 3 inner steps, 5 at test and half as many outer steps; fine-tuning after 200 steps; "
        "iMAML, Reptile and BOIL with the settings of MAML, whose rate is too large for the first (-.288, -.037, "
        "-.050). All that was changed when it was seen, from Meta-SGD on by episodes of what is trained on (for each "
        "of the last three about ten settings, by two of the five trainings with another key; there, too, the support "
        "set's mean was found to help all heads that start from zeros). So small differences to pixel prototypes are "
        "partly chosen. The episodes here are others than those that were seen before, and so are the rows of "
        "QuickDraw, Fashion-MNIST and MNIST than those of the first forms."
    )
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(result, options.out / "small_meta_dataset.png")
        for name, one in splits(whole, split, settings.rows).items():
            tasks.save_split(options.work / f"split_without_{name}.json", one)
    script.publish(__file__, "A small Meta-Dataset", text, options)


if __name__ == "__main__":
    script.run(main)
