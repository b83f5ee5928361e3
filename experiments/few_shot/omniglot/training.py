"""The training of one method with one seed."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.few_shot.film import modulated
from experiments.few_shot.omniglot.methods import ROWS, Row, Scale
from metaopt import few_shot, hypergrad, inner, tasks, training


class Trained(NamedTuple):
    methods: dict[int, Callable]  # shots at test -> (key, support, query) -> outputs
    curve: dict[int, float]  # outer step -> validation accuracy
    test_steps: dict[int, int]  # shots at test -> inner steps
    over_steps: Callable | None  # the same, with all inner steps of the curves; None without inner steps
    name: str  # of its folder, unique to this training


def num_tasks(scale: Scale, ways: int) -> int:
    return max(1, scale.tasks * 5 // ways)


def draws(row: Row, ways: int, shots: int, source: tasks.Source, scale: Scale, options) -> tuple[Callable, int]:
    """Returns `key -> tasks` of the training, and the number of outputs of the head."""
    num = num_tasks(scale, ways)
    if row.at_test is not None:
        return tasks.episode_batches(tasks.labelled_batches(source, 30), num), source.num_classes
    sample = tasks.episodes(
        source, num_ways=ways, num_shots=shots, num_query=5, disjoint_groups=options.disjoint_drawers
    )
    return tasks.episode_batches(sample, num), ways


def init_params(row: Row, init: Callable, outputs: int, scale: Scale, init_key, head_key, context_key) -> dict:
    """Returns the parameters of the network and, where the method learns them, of the head and the modulation."""
    params = init(init_key)
    depth = scale.filters * (scale.size // 2**scale.blocks) ** 2
    if row.ways or row.at_test is not None:  # otherwise, the support set gives the head
        drawn_head = row.head * jax.random.normal(head_key, (depth, outputs)) / depth**0.5
        params["head"] = {"w": drawn_head, "b": jnp.zeros(outputs)}
    if row.context:
        shape = (2, row.context, depth)
        params["modulation"] = jax.random.normal(context_key, shape) / row.context**0.5
    return params


def validation_episodes(ways: int, source: tasks.Source, scale: Scale, options) -> dict:
    """Returns shots -> episodes. They are the same for all methods and steps."""
    drawn = {}
    for shots in (1, 5):
        sample = tasks.episodes(
            source, num_ways=ways, num_shots=shots, num_query=5, disjoint_groups=options.disjoint_drawers
        )
        drawn[shots] = tasks.episode_batches(sample, max(2, scale.episodes // 10))(jax.random.key(1))
    return drawn


def train(name: str, ways: int, shots: int, seed: int, parts: dict, scale: Scale, options) -> Trained:
    row = ROWS[name]
    trained_shots = row.shots or shots
    network = few_shot.conv4(
        normalization=row.normalization, num_filters=scale.filters, num_blocks=scale.blocks, num_steps=row.steps
    )
    features = modulated(network.features) if row.context else network.features
    head = few_shot.linear_head(features)
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    adaptation = row.make(network.features, loss, scale.inner_steps)
    draw, outputs = draws(row, ways, trained_shots, parts["train"], scale, options)
    *param_keys, fit_key = jax.random.split(jax.random.key(seed), 4)
    params = init_params(row, network.init, outputs, scale, *param_keys)
    at_test = adaptation if row.at_test is None else row.at_test(network.features)
    most = scale.test_steps if at_test.test_steps else 0
    method = lambda hyperparams, num_steps: few_shot.adapted(at_test, hyperparams, head, num_steps=num_steps)
    drawn = validation_episodes(ways, parts["valid"], scale, options)

    @jax.jit
    def right(hyperparams, batch):
        """Returns validation accuracy after 0..`most` steps."""

        def one(support, query):
            seen = {k: v for k, v in query.items() if k != "y"}
            outputs = method(hyperparams, most)(jax.random.key(0), support, seen)
            return jax.vmap(few_shot.accuracy, (0, None))(outputs, query)

        return jax.lax.map(lambda task: one(*task[:2]), batch).mean(0)

    steps = max(scale.checks, int(scale.steps * row.share) // scale.checks * scale.checks)
    optimizer = optax.adam(optax.cosine_decay_schedule(options.rate, steps))
    if name == "Reptile":  # its direction is a distance moved, not a gradient
        optimizer = optax.sgd(optax.cosine_decay_schedule(1.0, steps))
    every = steps // scale.checks
    started = time.monotonic()

    def say(step, metrics):
        if step % every == 0:
            passed = time.monotonic() - started
            print(
                f"[{passed:6.0f} s] {name}, {ways}w{shots}s: {step} of {steps} steps, loss {metrics['value']:.3f}",
                flush=True,
            )

    folder = (
        options.work / f"{name.replace(', ', '_').replace(' ', '-')}_{ways}_{options.split}_{scale.filters}_{steps}"
        f"_{scale.size}_{scale.tasks}_{options.rate:g}_{trained_shots}_{shots}"
        f"{'_disjoint' * options.disjoint_drawers}_{seed}"
    )
    result = training.fit(
        training.learner(lambda step: hypergrad.over_tasks(adaptation.estimator_at(step)), optax.chain(optimizer)),
        draw,
        hyperparams=adaptation.hyperparams(params),
        num_steps=steps,
        key=fit_key,
        evaluate=lambda key, hyperparams: 1 - right(hyperparams, drawn[shots]).max(),
        eval_every=every,
        steps_per_call=min(20, every),
        callback=None if options.smoke else say,
        checkpoint_dir=None if options.smoke else folder.absolute(),
        checkpoint_every=every,
        settings={"inner_steps": scale.inner_steps, "shots": trained_shots, "head": row.head, "context": row.context},
    )
    best, curve = result.best_hyperparams, {i * every: float(1 - x) for i, x in enumerate(result.evaluations)}
    test_steps = {k: int(right(best, batch).argmax()) for k, batch in drawn.items()}
    over_steps = method(best, scale.over_steps) if most else None
    return Trained({k: method(best, num) for k, num in test_steps.items()}, curve, test_steps, over_steps, folder.name)
