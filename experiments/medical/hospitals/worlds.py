"""The knowledge without a left-out site: scaled columns, pooled models of the other sites, and resampled tasks.

A world has two or three training sites. Each training task draws one of them as the "new" site, with the pooled model
of the others. It draws patients of this site near an age, with a shifted class share. In half of the tasks, each
patient also loses the measurements that a random patient of another training site lacks. Each measurement is blank
with probability 0.1. A new site may differ more than the few known ones, so the pooled model of a task is perturbed:
its intercept by N(0, 0.7²), and each weight by 30 %. Nothing in a world depends on sites that are not in training.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.medical.hospitals import model
from experiments.medical.hospitals.tables import Patients
from metaopt import base

NUM_LABELLED = 20
PENALTIES = np.array([1.0, 3.0, 10.0, 30.0, 100.0, 300.0], np.float32)


class World(NamedTuple):
    """Arrays of equal shapes for all left-out sites, so that one program serves all.

    Attributes:
      values: [N, D], scaled by the training sites; 0 where missing.
      marks: [N, M], 1 where a measurement is missing.
      owner: [D], the measurement of each column.
      y, site, age: [N]; the age is scaled.
      sites: [6], the training sites, each equally often.
      weights: [S, 1 + D + M], the pooled model for a task of each site: intercept and columns. It is fitted on the
        training sites without this one. For a site outside the world, it is fitted on all training sites.
      groups: [1 + D + M, 3], to which of the three scores a column belongs.
    """

    values: jax.Array
    marks: jax.Array
    owner: jax.Array
    y: jax.Array
    site: jax.Array
    age: jax.Array
    sites: jax.Array
    weights: jax.Array
    groups: jax.Array


# ---- Pooled models ---------------------------------------------------------------------------------------------------


def pooled_fit(x: jax.Array, y: jax.Array, used: jax.Array, intercepts: jax.Array, penalty: jax.Array) -> jax.Array:
    """Returns [1 + columns], a logistic regression with ridge penalty: the intercept and the columns.

    Args:
      x: [N, columns].
      y: [N].
      used: [N], 1 for patients that are used.
      intercepts: [N, K], one column of ones, or one column for each site. The result has the mean intercept of the
        sites with used patients.
      penalty: ρ of the columns, in ℓ = Σ CE + ½ ρ |w|².
    """
    rows = jnp.concatenate([intercepts, x], axis=1)
    num = intercepts.shape[1]
    ridge = jnp.concatenate([jnp.full(num, 1e-3), jnp.full(x.shape[1], penalty)])
    params = model.ridge_logistic(rows, y, used, jnp.zeros(rows.shape[1]), ridge)
    is_used = (used @ intercepts > 0).astype(params.dtype)
    return jnp.concatenate([(params[:num] @ is_used / is_used.sum())[None], params[num:]])


def platt(scores: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns [2], intercept and slope of Platt scaling, with Platt's smoothed targets.

    The targets are (n₁ + 1) / (n₁ + 2) for the n₁ sick and 1 / (n₀ + 2) for the n₀ healthy. A penalty of 1e-3 on the
    slope keeps it finite if all scores are equal.

    Source: Platt, Advances in Large Margin Classifiers, 1999.
    """
    sick, healthy = (mask * y).sum(), (mask * (1 - y)).sum()
    target = jnp.where(y > 0, (sick + 1) / (sick + 2), 1 / (healthy + 2))
    rows = jnp.stack([jnp.ones_like(scores), scores], axis=1)
    return model.ridge_logistic(rows, target, mask, jnp.zeros(2), jnp.array([1e-5, 1e-3]))


@jax.jit
def _penalty_losses(x, y, site, intercepts, training):
    """Returns [S, penalties], the log losses of each site when it is left out.

    Scores are first Platt-scaled on the left-out site, since its share of the sick may differ.
    """

    def loss(left_out, penalty):
        used, judged = training[site] * (site != left_out), (site == left_out).astype(x.dtype)
        weights = pooled_fit(x, y, used, intercepts, penalty)
        scores = weights[0] + x @ weights[1:]
        intercept, slope = platt(scores, y, judged)
        losses = model.cross_entropy(intercept + slope * scores, y)
        return (judged * losses).sum() / judged.sum()

    over_penalties = lambda left_out: jax.vmap(lambda p: loss(left_out, p))(jnp.asarray(PENALTIES))
    return jax.lax.map(over_penalties, jnp.arange(len(training)))


@jax.jit
def _pooled_by_site(x, y, site, intercepts, training, penalty):
    """Returns [S, 1 + columns], the pooled model for each site, without its patients."""
    one = lambda left_out: pooled_fit(x, y, training[site] * (site != left_out), intercepts, penalty)
    return jax.lax.map(one, jnp.arange(len(training)))


def make_world(patients: Patients, training: list[int], by_site: bool) -> World:
    """Returns the world of some training sites.

    Args:
      patients: of all sites. Patients outside the training sites have no effect, except through their own rows.
      training: the numbers of the training sites, two or three.
      by_site: whether pooled models have an intercept for each site.
    """
    rows = np.isin(patients.site, training)
    gaps = np.isnan(patients.x)
    mean, std = np.nanmean(patients.x[rows], axis=0), np.nanstd(patients.x[rows], axis=0)
    values = np.where(gaps, 0, (patients.x - mean) / np.where(std > 0, std, 1)).astype(np.float32)
    num_measured, num_sites = patients.owner.max() + 1, len(patients.names)
    first = np.array([np.flatnonzero(patients.owner == m)[0] for m in range(num_measured)])
    marks = gaps[:, first].astype(np.float32)
    share = np.max([marks[patients.site == s].mean(0) for s in training], axis=0)  # of gaps at the worst site
    group = np.concatenate([[0], np.where(share[patients.owner] > 0.2, 1, 0), np.full(num_measured, 2)])
    x, y, site = np.concatenate([values, marks], axis=1), patients.y, patients.site
    flags = np.isin(np.arange(num_sites), training).astype(np.float32)
    intercepts = np.eye(num_sites, dtype=np.float32)[site] if by_site else np.ones((len(y), 1), np.float32)
    losses = _penalty_losses(x, y, site, intercepts, flags)[np.array(training)]
    penalty = PENALTIES[np.asarray(losses).mean(0).argmin()]
    weights = _pooled_by_site(x, y, site, intercepts, flags, penalty)
    age = values[:, patients.window]
    sites = np.tile(training, 6 // len(training))
    leaves = World(values, marks, patients.owner, y, site, age, sites, weights, np.eye(3, dtype=np.float32)[group])
    return World(*map(jnp.asarray, leaves))


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def side(world: World, weights: jax.Array, rows: jax.Array, marks: jax.Array) -> dict[str, jax.Array]:
    """Returns the data of patients `rows` whose measurements are missing where `marks` is 1."""
    x = jnp.concatenate([world.values[rows] * (1 - marks[:, world.owner]), marks], axis=1)
    ones = jnp.ones((len(rows), 1))
    scores = jnp.concatenate([ones, x], axis=1) @ (weights[:, None] * world.groups)
    age, mask = world.age[rows], jnp.ones(len(rows))
    return {"x": x, "scores": scores, "marks": marks, "age": age, "y": world.y[rows], "mask": mask}


def resampled_task(world: World, key: jax.Array, num_query: int) -> base.Task:
    """Returns a training task: resampled patients of one training site. Its features are not scaled."""
    keys = jax.random.split(key, 10)
    site = jax.random.choice(keys[0], world.sites)
    here = world.site == site
    center = world.age[jax.random.categorical(keys[1], jnp.where(here, 0.0, -jnp.inf))]
    width = jnp.exp(jax.random.uniform(keys[2], minval=jnp.log(0.5), maxval=jnp.log(5.0)))
    shift = 1.5 * jax.random.normal(keys[3])
    preference = shift * world.y - 0.5 * ((world.age - center) / width) ** 2
    noise = jax.random.gumbel(keys[4], here.shape)
    rows = jax.lax.top_k(jnp.where(here, preference + noise, -jnp.inf), NUM_LABELLED + num_query)[1]
    rows = jax.random.permutation(keys[5], rows)
    donor = jax.random.choice(keys[6], world.sites)
    lacking = jax.random.categorical(keys[7], jnp.where(world.site == donor, 0.0, -jnp.inf), shape=rows.shape)
    copy_key, blank_key = jax.random.split(keys[8])
    copied = jax.random.bernoulli(copy_key) * world.marks[lacking]
    blank = jax.random.bernoulli(blank_key, 0.1, world.marks.shape[1:])
    marks = jnp.maximum(jnp.maximum(world.marks[rows], copied), blank[None])
    noise = jax.random.normal(keys[9], world.weights.shape[1:])
    weights = (world.weights[site] * (1 + 0.3 * noise)).at[0].set(world.weights[site, 0] + 0.7 * noise[0])
    data = side(world, weights, rows, marks)
    part = lambda first, last: {name: leaf[first:last] for name, leaf in data.items()}
    train = part(0, NUM_LABELLED)
    return base.Task(train, part(NUM_LABELLED, None), model.features(train))


def new_site(world: World, site: jax.Array, rows: jax.Array, labelled: jax.Array) -> base.Task:
    """Returns the task of a new site.

    Args:
      world: without this site.
      site: its number.
      rows: [n], its patients, all of which are predicted. Their labels are not in the task.
      labelled: [NUM_LABELLED], the patients whose labels are known.
    """
    train = side(world, world.weights[site], labelled, world.marks[labelled])
    valid = side(world, world.weights[site], rows, world.marks[rows])
    return base.Task(train, {name: leaf for name, leaf in valid.items() if name != "y"}, model.features(train))


class Scaling(NamedTuple):
    """The mean and the deviation of each feature over training tasks."""

    mean: jax.Array
    deviation: jax.Array

    def __call__(self, task: base.Task) -> base.Task:
        return task._replace(features=(task.features - self.mean) / self.deviation)


def draws(patients: Patients, site: int, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the patients [n] of a site, and [num, NUM_LABELLED] draws of labelled ones, without replacement."""
    rows = np.flatnonzero(patients.site == site)
    rng = np.random.default_rng([seed, site])
    return rows, np.stack([rng.permutation(rows)[:NUM_LABELLED] for _ in range(num)])
