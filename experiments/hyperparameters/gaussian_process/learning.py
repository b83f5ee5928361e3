"""g, learned by hypergradients over tables."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from experiments.hyperparameters.gaussian_process import features, model, tables
from metaopt import base, hypergrad, predictors, training

LEAST_TRAIN, LEAST_VALID = 16, 20  # rows of a task to learn from


class Settings(NamedTuple):
    """Sizes of g and of its training.

    Attributes:
      bank: tasks to learn from, drawn once.
      steps: outer steps.
      tasks: per step.
      train, valid: the most rows of a task.
      width: columns of a task.
      hidden: tanh units.
      rate, decay: of Adam and the weight decay.
      likelihood: whether g sees slopes of the marginal likelihood.
    """

    bank: int = 1500
    steps: int = 400
    tasks: int = 16
    train: int = 128
    valid: int = 64
    width: int = 24
    hidden: int = 32
    rate: float = 0.01
    decay: float = 0.03
    likelihood: bool = True


SMOKE = Settings(bank=8, steps=2, tasks=2, train=24, valid=16, width=4, hidden=2)


class Trained(NamedTuple):
    """Weights of g, and the scaling of its features."""

    meta_params: Any
    scaling: features.Scaling


@functools.partial(jax.jit, static_argnames=("settings", "num"))
def training_tasks(pool, probability: jax.Array, key: jax.Array, settings: Settings, num: int) -> base.Task:
    """Returns random tasks of random sizes, with features that are not scaled."""

    def one(key):
        table_key, size_key, row_key = jax.random.split(key, 3)
        index = jax.random.choice(table_key, probability.shape[0], p=probability)
        most = jnp.minimum(settings.train, pool.rows[index] - LEAST_VALID)
        num_train = jnp.exp(jax.random.uniform(size_key) * jnp.log(most / LEAST_TRAIN)) * LEAST_TRAIN
        task = tables.draw(pool, index, row_key, num_train.astype(int), (settings.train, settings.valid))
        return tables.described(task, settings.likelihood)

    return jax.vmap(one)(jax.random.split(key, num))


@functools.cache
def _learner(outer, settings: Settings, constant: bool) -> training.Learner:
    g = features.predictor(settings.hidden, constant)
    estimator = predictors.amortize(hypergrad.direct(model.closed_form(outer)), g)
    decayed = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "center", params)
    schedule = optax.cosine_decay_schedule(settings.rate, settings.steps)
    adam = optax.adamw(schedule, weight_decay=settings.decay, mask=decayed)
    return training.learner(hypergrad.over_tasks(estimator, max_norm=1.0), adam)


def draw_bank(pool: tables.Pool, settings: Settings, num_per_call: int = 50) -> base.Task:
    """Returns tasks to learn from, in float32, with features that are not scaled. Families have equal weights."""
    _, index, counts = np.unique(pool.family, return_inverse=True, return_counts=True)
    weight = jnp.asarray((1 / counts)[index])
    arrays = jax.tree.map(jnp.asarray, pool._replace(family=None))
    num = min(num_per_call, settings.bank)
    keys = jax.random.split(jax.random.key(7), settings.bank // num)
    parts = [training_tasks(arrays, weight / weight.sum(), key, settings, num) for key in keys]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves).astype(jnp.float32), *parts)


def learn(bank: base.Task, outer, settings: Settings, seed: int, constant: bool = False) -> Trained:
    """Returns g, learned on random batches of the bank."""
    scaling = features.fit_scaling(bank.features, bank.train["columns"])
    scaled = bank._replace(features=jax.vmap(scaling)(bank.features))

    @jax.jit
    def sample(key, tasks):
        rows = jax.random.choice(key, len(tasks.train["y"]), (settings.tasks,), replace=False)
        return jax.tree.map(lambda leaf: leaf[rows], tasks)

    start = features.predictor(settings.hidden, constant).init(jax.random.key(seed))
    result = training.fit(
        _learner(outer, settings, constant),
        lambda key: sample(key, scaled),
        hyperparams=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start),
        num_steps=settings.steps,
        key=jax.random.key(100 + seed),
        progress=False,
    )
    return Trained(result.hyperparams, scaling)


def kept(folder: Path | None, part: str, bank: base.Task, outer, settings: Settings, seed: int, constant=False):
    """Returns the result of `learn`, or its saved result."""
    make = lambda: jax.tree.leaves(learn(bank, outer, settings, seed, constant).meta_params)
    saved = script.kept(folder, part, lambda: {f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(make())})
    structure = jax.tree.structure(features.predictor(settings.hidden, constant).init(jax.random.key(seed)))
    meta_params = structure.unflatten([jnp.asarray(saved[f"leaf {i}"]) for i in range(len(saved))])
    return Trained(meta_params, features.fit_scaling(bank.features, bank.train["columns"]))


def coordinates_of(trained: Trained, task: base.Task, settings: Settings, constant: bool = False):
    """Returns λ = g(task) in unconstrained coordinates, for a task whose features are not scaled."""
    g = features.predictor(settings.hidden, constant)
    return g.apply(trained.meta_params, task._replace(features=trained.scaling(task.features)))
