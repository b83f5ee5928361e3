"""Predictions without g: the class share, pooled and site-wise logistic regression, with and without Platt scaling."""

import jax
import jax.numpy as jnp

from experiments.medical.hospitals import model, worlds

SITE_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
NUM_FOLDS = 5


def _site_fit(x: jax.Array, y: jax.Array, mask: jax.Array, penalty: jax.Array) -> jax.Array:
    """Returns the logistic regression of one site. The penalty of 0.01 keeps its intercept finite with one class."""
    rows = jnp.concatenate([jnp.ones((len(x), 1)), x], axis=1)
    ridge = jnp.concatenate([jnp.full(1, 0.01), jnp.full(x.shape[1], penalty)])
    return model.ridge_logistic(rows, y, mask, jnp.zeros(rows.shape[1]), ridge)


def _site_wise(train: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns [n] logits of the site's own regression, without and with Platt scaling.

    Five folds of the 20 patients choose the penalty by log loss. Platt scaling uses their out-of-fold scores.
    """
    labelled, y = train["x"], train["y"]
    folds = (jnp.arange(len(y))[None] % NUM_FOLDS == jnp.arange(NUM_FOLDS)[:, None]).astype(labelled.dtype)
    logits = lambda params, rows: params[0] + rows @ params[1:]

    def out_of_fold(penalty):
        held = lambda fold: fold * logits(_site_fit(labelled, y, 1 - fold, penalty), labelled)
        return jax.vmap(held)(folds).sum(0)

    penalties = jnp.array(SITE_PENALTIES)
    scores = jax.vmap(out_of_fold)(penalties)
    best = jax.vmap(lambda s: model.cross_entropy(s, y).mean())(scores).argmin()
    plain = logits(_site_fit(labelled, y, jnp.ones(len(y)), penalties[best]), x)
    intercept, slope = worlds.platt(scores[best], y, jnp.ones(len(y)))
    return plain, intercept + slope * plain


def _recalibrated(scores: jax.Array, y: jax.Array, at: jax.Array) -> jax.Array:
    """Returns logits whose intercept fits the labelled patients; the penalty of 0.1 keeps it finite with one class."""
    rows, ones = jnp.stack([jnp.ones_like(scores), scores], axis=1), jnp.ones_like(scores)
    fixed_slope = jnp.array([0.1, 1e6])
    params = model.ridge_logistic(rows, y, ones, jnp.array([0.0, 1.0]), fixed_slope)
    return params[0] + params[1] * at


@jax.jit
def predict(world: worlds.World, site: jax.Array, rows: jax.Array, labelled: jax.Array) -> dict[str, jax.Array]:
    """Returns name -> [R, n] probabilities, for R draws of labelled patients. The world has a plain pooled model."""

    def of_draw(drawn):
        task = worlds.new_site(world, site, rows, drawn)
        own, y = task.train["scores"].sum(1), task.train["y"]
        score = task.valid["scores"].sum(1)
        intercept, slope = worlds.platt(own, y, jnp.ones(len(y)))
        plain, scaled = _site_wise(task.train, task.valid["x"])
        share = (y.sum() + 0.5) / (len(y) + 1)
        logits = {
            "class share": jnp.full(len(rows), jnp.log(share / (1 - share))),
            "pooled": score,
            "pooled, own intercept": _recalibrated(own, y, score),
            "pooled + Platt": intercept + slope * score,
            "site-wise": plain,
            "site-wise + Platt": scaled,
        }
        return {name: jax.nn.sigmoid(values) for name, values in logits.items()}

    return jax.lax.map(of_draw, labelled)


@jax.jit
def transferred(world: worlds.World, site: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns [n, 2] p-values that are calibrated on the training sites: a control without labels of the new site.

    Each training site is predicted by the pooled model of the others.
    """

    def at(number):
        everyone = jnp.arange(len(world.y))
        data = worlds.side(world, world.weights[number], everyone, world.marks)
        return jax.nn.sigmoid(data["scores"].sum(1))

    own = jax.vmap(at)(jnp.arange(len(world.weights)))[world.site, jnp.arange(len(world.y))]
    known = (world.site[:, None] == world.sites[None]).any(1)
    scores = jnp.where(known, jnp.where(world.y > 0, 1 - own, own), -jnp.inf)
    p = at(site)[rows]
    above = scores[:, None, None] >= jnp.stack([p, 1 - p], axis=-1)[None]
    return (1 + above.sum(0)) / (known.sum() + 1)
