"""Regularization per user, predicted by g from the first ratings.

The inner problem of a user is a ridge regression of the first k residuals e on columns X of the items, in closed form:

    w(λ) = argmin_w Σ_j d_j (e_j − x_j·w)² + Σ_c ridge_c (w_c − c_c)²,    d_j = exp(−decay · age_j)
         = c + V X'(X V X' + D⁻¹)⁻¹ (e − X c),    V = diag(1 / ridge),  D = diag(d).

λ has a ridge for each group of columns, the decay, and the center c of the user's offset. The outer loss is the root
mean squared error over the user's later ratings. λ = g(features of the first ratings; φ), and φ is trained over
training users by hypergradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, predictors, spaces, training

RIDGES = {"offset": 3.0, "slope": 10.0, "year": 10.0, "factors": 10.0, "genres": 20.0}  # the start


class Settings(NamedTuple):
    """Settings of the training of g.

    Attributes:
      groups: the groups of columns with a ridge; the others are not used.
      decay: whether older ratings count less.
      predicted_center: whether g predicts the center of the offset; otherwise it is one number for all users.
      num_hidden: hidden units of g.
      order: of the training tasks, as for `user_sampler`.
      rate: of Adam.
      weight_decay: of φ.
      num_steps: outer steps.
      num_users: tasks in a step.
      num_later: later ratings of a task.
    """

    groups: tuple[str, ...] = ("offset", "slope", "year", "factors", "genres")
    decay: bool = True
    predicted_center: bool = False
    num_hidden: int = 8
    order: str = "window"
    rate: float = 0.01
    weight_decay: float = 1.0
    num_steps: int = 400
    num_users: int = 64
    num_later: int = 32


def make_space(settings: Settings) -> dict:
    """Returns the space of λ: ridges in units of ratings, decay per unit of log(1 + days), center in ratings."""
    space = {f"ridge of {name}": spaces.positive(RIDGES[name]) for name in settings.groups}
    if settings.decay:
        space["decay"] = spaces.positive(0.05)
    return {**space, "center": spaces.real(0.0, 0.3)}


def adapted_weights(hyperparams: dict, train: dict, sizes: dict[str, int]) -> jax.Array:
    """Returns w [D], the closed form above.

    Args:
      hyperparams: λ; a group without a ridge is not used.
      train: "design" [k, D], "residual" [k] and "age" [k] of the first ratings.
      sizes: columns of each group.
    """
    x, e, age = train["design"], train["residual"], train["age"]
    ridges = [hyperparams.get(f"ridge of {name}", jnp.inf) for name in sizes]
    ridge = jnp.concatenate([jnp.full(size, r) for r, size in zip(ridges, sizes.values(), strict=True)])
    center = hyperparams["center"] * jnp.eye(1, x.shape[1], dtype=x.dtype)[0]
    scaled = x / ridge[None]
    kernel = scaled @ x.T + jnp.diag(jnp.exp(hyperparams.get("decay", 0.0) * age))
    return center + scaled.T @ jax.scipy.linalg.solve(kernel, e - x @ center, assume_a="pos")


def root_mean_square(errors: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns [], over the real entries; its derivative is finite also if all errors are 0."""
    return jnp.sqrt((mask * errors**2).sum() / mask.sum() + 1e-6)


def outer_loss(hyperparams: dict, task: base.Task, sizes: dict[str, int], low: float, high: float) -> jax.Array:
    """Returns [], the error of the user's later ratings."""
    valid = task.valid
    weights = adapted_weights(hyperparams, task.train, sizes)
    prediction = jnp.clip(valid["base"] + valid["design"] @ weights, low, high)
    return root_mean_square(valid["rating"] - prediction, valid["mask"])


class Method(NamedTuple):
    """The trained parts of the method for one data set; programs are shared by all folds.

    Attributes:
      init: `key -> φ`.
      learner: of φ.
      judge: `(φ, tasks) -> []`, the mean outer loss.
      predict: `(φ, tasks) -> (λ, w)`, with a leading axis of users.
    """

    init: Callable
    learner: training.Learner
    judge: Callable
    predict: Callable


def make_method(settings: Settings, sizes: dict[str, int], num_features: int, low: float, high: float) -> Method:
    """Makes the method. With `num_features=0`, λ is one for all users."""
    space = make_space(settings)
    g = predictors.mlp(space, num_features, num_hidden=settings.num_hidden if num_features else 0, limit=None)
    predictor = g if settings.predicted_center else _with_one_center(g)
    loss = lambda z, task: outer_loss(spaces.to_constrained(space, z), task, sizes, low, high)
    estimator = predictors.amortize(hypergrad.direct(lambda z, task, key: loss(z, task)), predictor)
    schedule = optax.cosine_decay_schedule(settings.rate, settings.num_steps)
    decayed = lambda weights: {name: name != "center" for name in weights}
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay, mask=decayed)
    seen = lambda task: task._replace(features=task.features[..., :num_features])

    def predict(weights, tasks):
        def one(task):
            hyperparams = spaces.to_constrained(space, predictor.apply(weights, seen(task)))
            return hyperparams, adapted_weights(hyperparams, task.train, sizes)

        return jax.vmap(one)(tasks)

    judge = lambda weights, tasks: jax.vmap(lambda t: loss(predictor.apply(weights, seen(t)), t))(tasks).mean()
    return Method(
        predictor.init,
        training.learner(hypergrad.over_tasks(estimator), optimizer),
        jax.jit(judge),
        jax.jit(predict),
    )


def _with_one_center(g: base.Predictor) -> base.Predictor:
    """Returns g with a center of the offset that does not depend on the features."""

    def apply(weights, task):
        z = g.apply(weights, task)
        same = g.apply(weights, task._replace(features=jnp.zeros_like(task.features)))
        return spaces.Unconstrained({**z.coordinates, "center": same.coordinates["center"]})

    return g._replace(apply=apply)


def train(method: Method, settings: Settings, draw: Callable, held: base.Task, seed: int, num_features: int) -> dict:
    """Returns the φ of the smallest error on the held-out users.

    Args:
      method: see `make_method`.
      settings: of the training.
      draw: `key -> tasks`, of training users.
      held: tasks of training users that are held out.
      seed: of φ and of the draws.
      num_features: as for `make_method`.
    """

    def sample(key):
        drawn = draw(key)
        return drawn._replace(features=drawn.features[:, :num_features])

    result = training.fit(
        method.learner,
        sample,
        hyperparams=method.init(jax.random.key(seed)),
        num_steps=settings.num_steps,
        key=jax.random.key(seed),
        evaluate=lambda key, weights: method.judge(weights, held),
        eval_every=max(settings.num_steps // 16, 1),
        progress=False,
    )
    return jax.tree.map(np.asarray, result.best_hyperparams)
