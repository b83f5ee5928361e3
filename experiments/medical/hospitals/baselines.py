"""Predictions without g: the class share, pooled and site-wise logistic regression, with and without Platt scaling.

Platt scaling fits two numbers b + a s to 20 patients. Its shrunken form has a ridge penalty that draws them to (0, a₀):

    (b, a) = argmin Σ_i CE(b + a s_i, y_i) + ½ ρ_b b² + ½ ρ_a (a − a₀)².

(a₀, ρ_a, ρ_b) are those with the least mean log loss over the training sites. Each of these is calibrated with 20 of
its patients, 40 times, and judged on its others. The pooled model is that of the other training sites.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.medical.hospitals import model, worlds
from metaopt import base

SITE_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
NUM_FOLDS = 5
NUM_TUNING_DRAWS = 120  # over all training sites
SLOPES, SLOPE_PENALTIES, INTERCEPT_PENALTIES = (0.5, 0.75, 1.0), (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), (0.03, 0.3, 3.0)
SHRINKAGES = tuple(itertools.product(SLOPES, SLOPE_PENALTIES, INTERCEPT_PENALTIES))  # (a₀, ρ_a, ρ_b)


def _site_fit(x: jax.Array, y: jax.Array, mask: jax.Array, penalty: jax.Array) -> jax.Array:
    """Returns the logistic regression of one site. The penalty of 0.01 keeps its intercept finite with one class."""
    rows = jnp.concatenate([jnp.ones((len(x), 1)), x], axis=1)
    ridge = jnp.concatenate([jnp.full(1, 0.01), jnp.full(x.shape[1], penalty)])
    return model.ridge_logistic(rows, y, mask, jnp.zeros(rows.shape[1]), ridge)


def _site_wise(task: base.Task) -> tuple[jax.Array, jax.Array]:
    """Returns out-of-fold logits of the labelled patients [20], and logits of the others [n], of the site's regression.

    Five folds of the 20 patients choose the penalty by log loss.
    """
    labelled, y = task.train["x"], task.train["y"]
    folds = (jnp.arange(len(y))[None] % NUM_FOLDS == jnp.arange(NUM_FOLDS)[:, None]).astype(labelled.dtype)
    logits = lambda params, rows: params[0] + rows @ params[1:]

    def out_of_fold(penalty):
        held = lambda fold: fold * logits(_site_fit(labelled, y, 1 - fold, penalty), labelled)
        return jax.vmap(held)(folds).sum(0)

    penalties = jnp.array(SITE_PENALTIES)
    scores = jax.vmap(out_of_fold)(penalties)
    best = jax.vmap(lambda s: model.cross_entropy(s, y).mean())(scores).argmin()
    return scores[best], logits(_site_fit(labelled, y, jnp.ones(len(y)), penalties[best]), task.valid["x"])


def _pooled(task: base.Task) -> tuple[jax.Array, jax.Array]:
    """Returns the logits of the labelled patients [20] and of the others [n], of the pooled model."""
    return task.train["scores"].sum(1), task.valid["scores"].sum(1)


def shrunken_platt(scores: jax.Array, y: jax.Array, shrinkage: jax.Array) -> jax.Array:
    """Returns [2], intercept and slope, from `shrinkage` (a₀, ρ_a, ρ_b)."""
    rows = jnp.stack([jnp.ones_like(scores), scores], axis=1)
    center = jnp.stack([jnp.zeros_like(shrinkage[0]), shrinkage[0]])
    return model.ridge_logistic(rows, y, jnp.ones_like(scores), center, jnp.stack([shrinkage[2], shrinkage[1]]))


def tuned_shrinkage(world: worlds.World, scores_of: Callable) -> jax.Array:
    """Returns (a₀, ρ_a, ρ_b), chosen on the training sites of a world. `scores_of` is `_pooled` or `_site_wise`.

    Patients outside the training sites have no effect.
    """
    everyone, shrinkages = jnp.arange(len(world.y)), jnp.array(SHRINKAGES)

    def losses(site_and_key):
        site, key = site_and_key
        noise = jnp.where(world.site == site, jax.random.gumbel(key, world.y.shape), -jnp.inf)
        labelled = jax.lax.top_k(noise, worlds.NUM_LABELLED)[1]
        judged = (world.site == site).astype(noise.dtype).at[labelled].set(0.0)
        task = worlds.new_site(world, site, everyone, labelled)
        own, others = scores_of(task)

        def loss(shrinkage):
            intercept, slope = shrunken_platt(own, task.train["y"], shrinkage)
            return (judged * model.cross_entropy(intercept + slope * others, world.y)).sum() / judged.sum()

        return jax.vmap(loss)(shrinkages)

    sites = jnp.repeat(world.sites, NUM_TUNING_DRAWS // len(world.sites))
    keys = jax.random.split(jax.random.key(0), len(sites))
    return shrinkages[jax.lax.map(losses, (sites, keys)).mean(0).argmin()]


def _recalibrated(scores: jax.Array, y: jax.Array, new_scores: jax.Array) -> jax.Array:
    """Returns logits whose intercept fits the labelled patients; the penalty of 0.1 keeps it finite with one class."""
    rows, ones = jnp.stack([jnp.ones_like(scores), scores], axis=1), jnp.ones_like(scores)
    fixed_slope = jnp.array([0.1, 1e6])
    params = model.ridge_logistic(rows, y, ones, jnp.array([0.0, 1.0]), fixed_slope)
    return params[0] + params[1] * new_scores


MODELS = {"pooled": _pooled, "site-wise": _site_wise}


@jax.jit
def shrinkages(world: worlds.World) -> dict[str, jax.Array]:
    """Returns the chosen (a₀, ρ_a, ρ_b) of the pooled and of the site-wise model."""
    return {name: tuned_shrinkage(world, scores_of) for name, scores_of in MODELS.items()}


@jax.jit
def predict(world: worlds.World, site: jax.Array, rows: jax.Array, labelled: jax.Array) -> dict[str, jax.Array]:
    """Returns name -> [R, n] probabilities, for R draws of labelled patients.

    The pooled models of the world have one intercept.
    """
    chosen = shrinkages(world)

    def of_draw(drawn):
        task = worlds.new_site(world, site, rows, drawn)
        y = task.train["y"]
        share = (y.sum() + 0.5) / (len(y) + 1)
        logits = {"class share": jnp.full(len(rows), jnp.log(share / (1 - share)))}
        for name, scores_of in MODELS.items():
            own, plain = scores_of(task)
            intercept, slope = worlds.platt(own, y, jnp.ones(len(y)))
            shrunken = shrunken_platt(own, y, chosen[name])
            logits[name] = plain
            if name == "pooled":
                logits["pooled, own intercept"] = _recalibrated(own, y, plain)
            logits[f"{name} + Platt"] = intercept + slope * plain
            logits[f"{name} + shrunken Platt"] = shrunken[0] + shrunken[1] * plain
        return {name: jax.nn.sigmoid(values) for name, values in logits.items()}

    return jax.lax.map(of_draw, labelled)


@jax.jit
def transferred(world: worlds.World, site: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns [n, 2] p-values that are calibrated on the training sites: a control without labels of the new site.

    Each training site is predicted by the pooled model of the others.
    """

    def predicted_by(number):
        everyone = jnp.arange(len(world.y))
        data = worlds.side(world, world.weights[number], everyone, world.marks)
        return jax.nn.sigmoid(data["scores"].sum(1))

    own = jax.vmap(predicted_by)(jnp.arange(len(world.weights)))[world.site, jnp.arange(len(world.y))]
    known = (world.site[:, None] == world.sites[None]).any(1)
    scores = jnp.where(known, jnp.where(world.y > 0, 1 - own, own), -jnp.inf)
    p = predicted_by(site)[rows]
    above = scores[:, None, None] >= jnp.stack([p, 1 - p], axis=-1)[None]
    return (1 + above.sum(0)) / (known.sum() + 1)
