"""λ of each method: by hypergradients over tasks, or the best of a grid on the same tasks."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.hyperparameters.fine_tuning.images import LARGEST, Source, draw_task
from experiments.hyperparameters.fine_tuning.network import (
    LAYERS,
    SPACE,
    Settings,
    accuracy,
    cross_entropy,
    make_problem,
)
from metaopt import base, hypergrad, inner, predictors, spaces, tasks, training

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LEARNED = "learned rates and strengths"
SCRATCH = "from scratch"


def hyperparams(head: float, others: float, strength: float, head_strength: float = 0.0) -> base.HyperParams:
    """Returns λ with one rate and one strength for the layers below the head."""
    rates = dict.fromkeys(LAYERS, others) | {"head": head}
    strengths = dict.fromkeys(LAYERS, strength) | {"head": head_strength}
    return jax.tree.map(lambda value: jnp.asarray(value, float), {"rate": rates, "strength": strengths})


def grids() -> dict[str, list[base.HyperParams]]:
    """Returns the grid of each baseline."""
    fine_rates = np.geomspace(3e-4, 1e-1, 6)
    full = [hyperparams(r, r, 0.0) for r in fine_rates]
    return {
        SCRATCH: full,
        "full fine-tuning": full,
        "linear probe": [hyperparams(r, 0.0, 0.0, s) for r, s in itertools.product(fine_rates, (0.0, 1e-2))],
        "hand-set rates": [
            hyperparams(r, factor * r, s)
            for r, factor, s in itertools.product(RATES, (0.03, 0.1, 0.3, 1.0), (0.0, 0.1))
        ],
    }


def generator(key: jax.Array) -> np.random.Generator:
    """Returns a generator of numpy that follows from the key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def sample_training_task(rng, sources: dict[str, Source], start, shots: int, settings: Settings) -> base.Task:
    """Draws a task of a training source that has enough images per class. All tasks have the same shapes."""
    names = [name for name in sources if shots <= LARGEST.get(name, shots)]
    source = sources[names[rng.integers(len(names))]]
    num_classes, num_query = settings.num_classes, settings.num_query
    rows = max(settings.shots) * num_classes
    return draw_task(rng, source, start, shots=shots, rows=rows, num_classes=num_classes, num_query=num_query)


@functools.cache
def make_learner(settings: Settings) -> tuple[training.Learner, base.Predictor]:
    """Returns the learner of g, and g. All seeds share its compiled program."""
    problem = spaces.constrain(make_problem(settings), SPACE)
    predictor = predictors.mlp(SPACE, 1, num_hidden=0)
    rule = hypergrad.unrolled(problem, num_steps=settings.num_steps, remat="step")
    estimator = hypergrad.over_tasks(predictors.amortize(rule, predictor), task_chunk=1)
    schedule = optax.cosine_decay_schedule(settings.outer_rate, settings.outer_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.9))
    return training.learner(estimator, optimizer), predictor


def learn(sources: dict[str, Source], start, settings: Settings, key: jax.Array) -> tuple[Callable, float, np.ndarray]:
    """Returns `shots -> λ`, the operations of all hypergradients, and the losses of the outer steps."""
    learner, predictor = make_learner(settings)

    def sample_tasks(key):
        rng = generator(key)
        return tasks.stack([sample_training_task(rng, sources, start, shots, settings) for shots in settings.shots])

    init_key, key = jax.random.split(key)
    weights = predictor.init(init_key)
    result = training.fit(
        learner, sample_tasks, hyperparams=weights, num_steps=settings.outer_steps, key=key, progress=False
    )
    flops = hypergrad.flops(lambda state: learner.step(state)[0].hyperparams, result.state)

    def predict(shots: int) -> base.HyperParams:
        features = jnp.array([np.log(shots / 20) / np.log(5)], jnp.float32)
        return spaces.to_constrained(SPACE, predictor.apply(result.hyperparams, base.Task(None, None, features)))

    return predict, settings.outer_steps * flops, result.history["value"]


@functools.cache
def make_judge(settings: Settings) -> Callable:
    """Returns `(key, λ, task) -> (loss, accuracy)` after fine-tuning, on the images to judge by."""
    train = inner.run(make_problem(settings).loop, settings.num_steps, trace_fn=lambda state: ())  # a scan

    @jax.jit
    def judge(key, hyperparams, task):
        params = train(key, hyperparams, task.train)[0].params
        return cross_entropy(params, None, task.valid), accuracy(params, task.valid)

    return judge


def choose(judge: Callable, sources, starts: dict, settings: Settings, key) -> dict[str, dict[int, base.HyperParams]]:
    """Returns by baseline and number of images the point of its grid with the smallest mean loss on training tasks."""
    chosen: dict[str, dict[int, base.HyperParams]] = {name: {} for name in grids()}
    for shots in settings.shots:
        rng = generator(jax.random.fold_in(key, shots))
        drawn = [sample_training_task(rng, sources, None, shots, settings) for _ in range(settings.grid_tasks)]
        for name, points in grids().items():
            started = [task._replace(train=task.train | {"start": starts[name]}) for task in drawn]
            losses = [np.mean([float(judge(key, point, task)[0]) for task in started]) for point in points]
            chosen[name][shots] = points[int(np.nanargmin(losses))]
    return chosen
