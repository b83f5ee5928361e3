"""Trains the methods, and makes their free choices on the training sources."""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from experiments.few_shot.film import modulated
from experiments.few_shot.small_meta_dataset.methods import (
    CHECKED,
    MOST_WAYS,
    RATES,
    ROWS,
    UNTRAINED,
    Row,
    Settings,
    beside_the_image,
    pixels,
)
from experiments.few_shot.small_meta_dataset.sources import Data
from metaopt import few_shot, hypergrad, inner, tasks, training


def make_start(row: Row, network: few_shot.ConvNet, num_classes: int, settings: Settings) -> Callable:
    """Returns `key -> params` of the network and, where the method learns them, of the head and the modulation."""

    def start(key):
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

    return start


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
    result = make()
    options.work.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, **{f"{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(result))})
    temporary.replace(file)
    return result


def of_each(adaptation: few_shot.Adaptation, hyperparams, num_steps: int, outputs: Callable) -> Callable:
    """Returns a method that uses the λ of the training in the episode."""

    def method(key, support, query):
        own = jax.tree.map(lambda x: x[support["training"]], hyperparams)
        return few_shot.adapted(adaptation, own, outputs, num_steps=num_steps)(key, support, query)

    return method


def accuracy_on_trained(adaptation, hyperparams, outputs, test_steps: int, episodes: Partial, num_sources: int):
    """Returns accuracy on episodes of the training sources, after 0..`test_steps` steps."""
    method = of_each(adaptation, hyperparams, test_steps, outputs)

    def one(episodes, key, number):
        support, query, _ = jax.tree.map(lambda x: x[number], episodes)(key)
        seen = {k: v for k, v in query.items() if k != "y"}
        predicted = method(key, {**support, "training": number}, seen)
        return jax.vmap(few_shot.accuracy, (0, None))(predicted, query)

    keys = jax.random.split(jax.random.key(3), CHECKED)
    numbers = jnp.arange(CHECKED) % num_sources
    # The data are an argument: constants would take long to compile.
    mean = jax.jit(lambda episodes: jax.lax.map(lambda pair: one(episodes, *pair), (keys, numbers)).mean(0))
    return mean(episodes)


class Methods(NamedTuple):
    """All methods that are evaluated."""

    by_seed: dict[str, Callable]  # "method, seed" -> method
    names: dict[str, list[str]]  # method -> its keys in `by_seed`
    chosen: list[str]  # texts on the choices at test


def make_methods(data: Data, settings: Settings, seeds: int, options: argparse.Namespace) -> Methods:
    """Trains the methods, and adds those that need no training."""
    network = beside_the_image(few_shot.conv4(normalization="support", num_filters=settings.filters, num_blocks=2))
    head = few_shot.linear_head(network.features)
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    methods = Methods({"pixel prototypes": pixels}, {"pixel prototypes": ["pixel prototypes"], UNTRAINED: []}, [])
    untrained = few_shot.prototypical_networks(network.features)
    for seed in range(seeds):
        drawn = untrained.hyperparams(network.init(jax.random.fold_in(jax.random.key(1), seed)))
        methods.by_seed[f"{UNTRAINED}, {seed}"] = few_shot.adapted(untrained, drawn, head)
        methods.names[UNTRAINED].append(f"{UNTRAINED}, {seed}")
    tuned = lambda rate: few_shot.proto_maml(network.features, adapt="^head", rate=rate)
    for name, row in [(name, ROWS[name]) for name in options.methods]:
        started = time.process_time()
        adaptation = row.make(network.features, loss)
        outputs = few_shot.linear_head(modulated(network.features)) if row.context else head
        start = make_start(row, network, data.num_classes, settings)
        run = train(row, adaptation, start, data.rows if row.plain else data.episodes, settings)
        learned = [kept(f"{name}_{seed}", Partial(run, jax.random.key(seed)), options) for seed in range(seeds)]
        # Free choices at test are made on the training sources: the number of steps, and fine-tuning's rate.
        num_steps = 0
        if adaptation.test_steps:
            candidates = {f"rate {rate:g}": tuned(rate) for rate in RATES} if row.plain else {"": adaptation}
            steps = settings.test_steps or row.test_steps
            scores = {
                setting: accuracy_on_trained(candidate, learned[0], outputs, steps, data.episodes, settings.sources)
                for setting, candidate in candidates.items()
            }
            setting = max(scores, key=lambda setting: float(scores[setting].max()))
            adaptation, num_steps = candidates[setting], int(scores[setting].argmax())
            most = " (the most)" if num_steps == steps else ""
            methods.chosen.append(f"{name} {num_steps}{most}" + (f" ({setting})" if row.plain else ""))
        methods.names[name] = [f"{name}, {seed}" for seed in range(seeds)]
        for key, hyperparams in zip(methods.names[name], learned, strict=True):
            methods.by_seed[key] = of_each(adaptation, hyperparams, num_steps, outputs)
        print(f"[{time.process_time() - started:5.0f} s] {name}", flush=True)
    return methods
