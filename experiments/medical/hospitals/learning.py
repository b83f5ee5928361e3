"""g, learned by hypergradients over resampled tasks; and its predictions for the patients of a new site."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.medical.hospitals import model, worlds
from metaopt import base, hypergrad, predictors, spaces, training


class Settings(NamedTuple):
    """Sizes.

    Attributes:
      steps: outer steps.
      tasks: per step.
      query: unlabelled patients of a training task.
      resamples: of the judged site.
      choice_resamples: of each site on which variants are chosen.
      bootstraps: of the judged patients.
    """

    steps: int = 200
    tasks: int = 16
    query: int = 40
    resamples: int = 200
    choice_resamples: int = 40
    bootstraps: int = 500


SMOKE = Settings(steps=2, tasks=2, query=20, resamples=3, choice_resamples=2, bootstraps=5)


DECAY = 1.0  # weight decay of g, except for its center


class Trained(NamedTuple):
    """Weights of g, and the scaling of its features."""

    meta_params: Any
    scaling: worlds.Scaling


@functools.partial(jax.jit, static_argnums=(2, 3))
def _tasks(world: worlds.World, key: jax.Array, num: int, num_query: int) -> base.Task:
    one = lambda key: worlds.resampled_task(world, key, num_query)
    return jax.vmap(one)(jax.random.split(key, num))


@functools.cache
def _learner(steps: int) -> training.Learner:
    estimator = predictors.amortize(hypergrad.direct(model.outer_loss), model.PREDICTOR)
    decayed = lambda params: {name: name != "center" for name in params}
    adam = optax.adamw(optax.cosine_decay_schedule(0.03, steps), weight_decay=DECAY, mask=decayed)
    return training.learner(hypergrad.over_tasks(estimator, max_norm=1.0), adam)


def learn(world: worlds.World, constant: bool, seed: int, settings: Settings) -> Trained:
    """Returns g. With `constant`, the features are scaled to 0, so that λ is the same for all tasks."""
    described = _tasks(world, jax.random.key(1000 + seed), 500, settings.query).features
    scaling = worlds.Scaling(described.mean(0), jnp.where(constant, jnp.inf, described.std(0) + 1e-3))
    result = training.fit(
        _learner(settings.steps),
        lambda key: jax.vmap(scaling)(_tasks(world, key, settings.tasks, settings.query)),
        hyperparams=model.PREDICTOR.init(jax.random.key(seed)),
        num_steps=settings.steps,
        key=jax.random.key(100 + seed),
        progress=False,
    )
    return Trained(result.hyperparams, scaling)


def hyperparams_of(trained: Trained, task: base.Task) -> base.HyperParams:
    """Returns λ for a task whose features are not scaled."""
    z = model.PREDICTOR.apply(trained.meta_params, trained.scaling(task))
    return spaces.to_constrained(model.SPACE, z)


def _predicted(trained: Trained, task: base.Task) -> tuple[jax.Array, Any]:
    """Returns [n] probabilities, and λ."""
    hp = hyperparams_of(trained, task)
    return jax.nn.sigmoid(model.site_logits(model.fit_site(hp, task.train), hp, task.valid)), hp


@jax.jit
def predict(trained: Trained, world, site, rows, labelled):
    """Returns [R, n] probabilities, and λ with leaves [R], for R draws of labelled patients."""
    one = lambda drawn: _predicted(trained, worlds.new_site(world, site, rows, drawn))
    return jax.vmap(one)(labelled)


def without(train: dict[str, jax.Array], dropped: jax.Array) -> dict[str, jax.Array]:
    """Returns the labelled patients with mask 0 where `dropped` is 1. Patients with mask 0 have no effect."""
    return {**train, "mask": train["mask"] * (1 - dropped)}


@jax.jit
def leave_one_out(trained: Trained, world, site, rows, labelled):
    """Returns [R, n, 2] p-values of both outcomes, from models without one of the labelled patients (cross-conformal).

        p(x, y) = (1 + #{i: s_i ≥ s_{−i}(x, y)}) / (n + 1),
        s_{−i}(x, y) = 1 − p_{−i}(y | x),    s_i = s_{−i}(x_i, y_i),

    where the model −i, its features and its λ do not see patient i.

    Source: Barber, Candès, Ramdas & Tibshirani, Annals of Statistics 2021 (jackknife+); Romano, Sesia & Candès,
      NeurIPS 2020.
    """
    num = labelled.shape[1]

    def of_draw(drawn):
        task = worlds.new_site(world, site, rows, drawn)

        def one(dropped):
            train = without(task.train, dropped)
            hp = hyperparams_of(trained, base.Task(train, None, model.features(train)))
            params = model.fit_site(hp, train)
            p, own = (jax.nn.sigmoid(model.site_logits(params, hp, data)) for data in (task.valid, task.train))
            score = (dropped * jnp.where(task.train["y"] > 0, 1 - own, own)).sum()
            return score >= jnp.stack([p, 1 - p], axis=-1)

        return (1 + jax.vmap(one)(jnp.eye(num)).sum(0)) / (num + 1)

    return jax.lax.map(of_draw, labelled)


@jax.jit
def split(trained: Trained, world, site, rows, labelled):
    """Returns [R, n, 2] p-values of split conformal prediction: half of the labelled patients fit, half calibrate."""
    num = labelled.shape[1]
    held = (jnp.arange(num) >= num // 2).astype(jnp.float32)

    def of_draw(drawn):
        task = worlds.new_site(world, site, rows, drawn)
        train = without(task.train, held)
        hp = hyperparams_of(trained, base.Task(train, None, model.features(train)))
        params = model.fit_site(hp, train)
        p, own = (jax.nn.sigmoid(model.site_logits(params, hp, data)) for data in (task.valid, task.train))
        scores = jnp.where(task.train["y"] > 0, 1 - own, own)
        above = held[:, None, None] * (scores[:, None, None] >= jnp.stack([p, 1 - p], axis=-1)[None])
        return (1 + above.sum(0)) / (held.sum() + 1)

    return jax.vmap(of_draw)(labelled)
