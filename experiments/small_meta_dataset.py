"""A small Meta-Dataset, in minutes: what was learned on some sources, judged on unseen classes and on unseen sources.

Six sources of 14 × 14 images: Omniglot, drawings (QuickDraw), sign digits, spoken digits (spectrograms), Fashion-MNIST,
MNIST. For each of the last five there is one training, on Omniglot's background characters and the four others; it is
judged on the source that it never saw. Omniglot is judged on its evaluation characters, by the first training. Ways,
shots and the balance of classes vary as in Meta-Dataset, with smaller numbers; where a source knows who drew or spoke,
support and query are by different people. All methods see the same episodes; pixel prototypes, the nearest class mean
by cosine, learn nothing. The five trainings of a method run as one program, a `vmap` over the learner's functions.

    python experiments/small_meta_dataset.py             minutes; writes experiments/results/small_meta_dataset.md
    python experiments/small_meta_dataset.py --smoke     seconds; prints only

The sources are read from the folder that METAOPT_DATA names.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import script
from jax.tree_util import Partial

from metaopt import hypergrad, methods, tasks, training

LEFT_OUT = ("quickdraw8", "signdigits", "spoken_digits", "fashion_mnist", "mnist")


class Settings(NamedTuple):
    filters: int = 16
    tasks: int = 2  # a step, of each training
    steps: int = 120
    rows: int = 2000  # of a source, at most; Omniglot's are all used
    episodes: int = 600
    sources: int = len(LEFT_OUT)


SMOKE = Settings(filters=2, tasks=1, steps=2, rows=200, episodes=2, sources=2)
EPISODES: dict[str, Any] = {"min_ways": 5, "max_ways": 8, "max_query": 5, "max_support": 40}


def small(source: tasks.Source, rows: int) -> tasks.Source:
    """Fewer rows, at random, and images of half the size."""
    if source.name != "omniglot" and len(source.x) > rows:
        source = tasks.keep(source, rows=np.random.default_rng(0).permutation(len(source.x))[:rows])
    x = source.x.reshape(len(source.x), 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)
    return source._replace(x=x)


def samplers(sources: Sequence[tasks.Source], left_out: Sequence[str]) -> Partial:
    """One sampler whose data have a leading axis of trainings: they differ in the shares of the sources alone."""
    some: list[Any] = [
        tasks.meta_dataset_episodes(sources, **EPISODES, weights=[1e-12 if s.name == name else 1.0 for s in sources])
        for name in left_out
    ]
    return Partial(some[0].func, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.args for one in some)))


def pixels(key, support, query):
    """The nearest class mean of the images, by cosine."""
    flat = lambda x: x.reshape(len(x), -1)
    of = jax.nn.one_hot(support["y"], len(support["class_mask"])) * support["mask"][:, None]
    center = of.T @ flat(support["x"])
    length = jnp.maximum(jnp.linalg.norm(center, axis=1, keepdims=True), 1e-6)
    return (flat(query["x"]) @ (center / length).T)[None]


def train(adaptation: methods.Adaptation, start: Callable, sampler: Partial, settings: Settings):
    """λ of all trainings, along a leading axis."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, settings.steps))
    learner = training.learner(hypergrad.over_tasks(adaptation.estimator), optimizer)

    def one(sampler, key):
        start_key, init_key, key = jax.random.split(key, 3)
        draw = tasks.episode_batches(sampler, settings.tasks)
        state = learner.init(init_key, adaptation.hyperparams(start(start_key)), draw(key))
        step = lambda state, i: (learner.step(state, draw(jax.random.fold_in(key, i)))[0], None)
        return jax.lax.scan(step, state, jnp.arange(settings.steps))[0].hyperparams

    keys = jax.random.split(jax.random.key(0), settings.sources)
    return jax.jit(jax.vmap(one))(sampler, keys)


def main() -> None:
    options = script.parser(__doc__, num_seeds=1).parse_args()
    settings = SMOKE if options.smoke else Settings()
    folder = script.data_file(__file__, "omniglot.npz").parent
    left_out = list(LEFT_OUT[: settings.sources])
    sources = {
        name: small(s, settings.rows) for name, s in tasks.from_image_sets(["omniglot", *left_out], path=folder).items()
    }
    split = tasks.omniglot_split(folder)
    background, unseen = (tasks.select(sources["omniglot"], split, part)[0] for part in ("train", "test"))
    sampler = samplers([background, *(sources[name] for name in left_out)], left_out)

    network = methods.conv4(normalization="support", num_filters=settings.filters, num_blocks=2)
    head = methods.linear_head(network.features)

    made = {  # all start at a network without a head, which the support set makes
        "prototypical networks": methods.prototypical_networks(network.features),
        "ridge head (R2D2)": methods.ridge_head(network.features),
        "Proto-MAML, first order": methods.proto_maml(network.features, num_steps=2, rate=0.02, order="first"),
    }
    judged: dict[str, methods.AdaptFn] = {"pixel prototypes": pixels}
    for name, adaptation in list(made.items())[: 1 if options.smoke else None]:
        started = time.process_time()
        hyperparams = train(adaptation, network.init, sampler, settings)

        def method(key, support, query, adaptation=adaptation, hyperparams=hyperparams):
            of_source = jax.tree.map(lambda x: x[support["training"]], hyperparams)
            return methods.adapted(adaptation, of_source, head)(key, support, query)

        judged[name] = method
        if name == "prototypical networks":
            drawn = adaptation.hyperparams(network.init(jax.random.key(1)))
            judged[f"{name}, untrained"] = methods.adapted(adaptation, drawn, head)
        print(f"[{time.process_time() - started:5.0f} s] {name}", flush=True)

    def of_training(number, sample):
        def marked(key):
            support, query, meta = sample(key)
            return tasks.Episode({**support, "training": jnp.int32(number)}, query, meta)

        return marked

    tests = {"omniglot": of_training(0, tasks.meta_dataset_episodes(unseen, **EPISODES))}
    tests |= {
        name: of_training(number, tasks.meta_dataset_episodes(sources[name], **EPISODES))
        for number, name in enumerate(left_out)
    }
    evaluation = methods.evaluate_episodes(
        judged, tests, jax.random.key(2025), num_episodes=settings.episodes, chunk_size=min(20, settings.episodes)
    )
    text = methods.leaderboard(evaluation, reference="pixel prototypes")
    text += (
        f"\n{settings.filters} filters in each of two blocks, normalized by the support set; {settings.steps} outer "
        f"steps of {settings.tasks} episodes; one training for each source that was left out. 5 to 8 ways, at most 40 "
        'support and 5 query examples of a class. "Untrained" is the same method with the network as it was drawn. '
        "A first network (8 filters in three blocks) lost to pixel prototypes on every source, and was changed when "
        "that was seen."
    )
    script.publish(__file__, "A small Meta-Dataset", text, options)


if __name__ == "__main__":
    main()
