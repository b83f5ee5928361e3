"""The methods that score windows. Each returns scores of the pool and of unseen windows, and its operations."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.hyperparameters import transformer
from experiments.hyperparameters.data_weighting import scorer
from experiments.hyperparameters.data_weighting.windows import Texts
from metaopt import base, hypergrad, inner, predictors, spaces, training


class Settings(NamedTuple):
    """Sizes and rates; `num_steps` are those of every model that is judged."""

    context: int = 24
    width: int = 16
    num_windows: int = 900
    num_valid: int = 200
    num_test: int = 800
    batch: int = 32
    num_steps: int = 100
    rate: float = 0.02
    outer_steps: int = 10  # for the weights of windows
    weight_rate: float = 0.5  # their outer rate
    scorer_steps: int = 40  # outer steps of the scorer
    scorer_horizon: int = 30  # training steps of each of its metagradients
    scorer_rate: float = 0.1
    online_rate: float = 0.03
    multiplier: float = 2.0  # of `f2sa`
    reference_steps: int = 60  # on the validation text, from the start
    tuning_steps: int = 30  # on the validation text, from the uniform model


SMOKE = Settings(
    6, 4, 24, 8, 8, 4, 4, outer_steps=2, scorer_steps=2, scorer_horizon=2, reference_steps=2, tuning_steps=2
)


class Scores(NamedTuple):
    """Scores of windows, larger is cleaner.

    Attributes:
      pool: [N].
      unseen: [N], or None if the method scores only windows that it was trained on.
      flops: the operations of the method, without the training of the judged model.
      params: a model that was trained with the scores while they were learned, or None.
    """

    pool: np.ndarray
    unseen: np.ndarray | None
    flops: float
    params: Any = None


# ---- models ----------------------------------------------------------------------------------------------------------


def row_losses(params, batch):
    return transformer.row_losses(params, batch["windows"])


def mean_loss(params, hyperparams, windows):
    return transformer.row_losses(params, windows).mean()


def make_loop(settings: Settings, weight_fn: Callable, num_steps: int) -> base.InnerLoop:
    """Returns training from random parameters, or from `hp["start"]` if λ is a dict that has them."""

    def init(key, hyperparams, data):
        if isinstance(hyperparams, dict) and "start" in hyperparams:
            return hyperparams["start"]
        return transformer.init_params(key, settings.context, settings.width)

    loss = inner.weighted(row_losses, weight_fn, normalize="weights")
    schedule = optax.linear_schedule(settings.rate, 0.0, num_steps)
    optimizer = lambda hp: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    return inner.loop(loss, optimizer, init=init, sampler=inner.minibatch(settings.batch))


@functools.cache
def plain_training(settings: Settings, num_steps: int) -> Callable:
    """Returns `(key, hyperparams, {"windows", "mask"}) -> θ`, training on the marked windows."""
    equal = lambda hp, batch: jnp.ones(len(batch["windows"]))
    train = inner.run(make_loop(settings, equal, num_steps), num_steps, trace_fn=lambda state: ())  # a scan
    return jax.jit(lambda key, hp, data: train(key, hp, data)[0].params)


def marked(windows: np.ndarray, valid: np.ndarray, mask, with_valid: float = 0) -> dict[str, jax.Array]:
    """Returns data for `plain_training`: marked windows, and the validation text if it is trained on."""
    mask = np.concatenate([mask, np.full(len(valid), with_valid)])
    return {"windows": jnp.asarray(np.concatenate([windows, valid])), "mask": jnp.asarray(mask, jnp.float32)}


def all_windows(texts: Texts) -> dict[str, jax.Array]:
    return marked(texts.pool.windows, texts.valid, np.ones(len(texts.pool.kind)))


@jax.jit
def losses_of(params, windows):
    return transformer.row_losses(params, windows)


# ---- reference models ------------------------------------------------------------------------------------------------


def perplexity(texts: Texts, key, settings: Settings, uniform) -> Scores:
    """Minus the loss under a model that was trained on the validation text."""
    train, data = (
        plain_training(settings, settings.reference_steps),
        marked(texts.pool.windows, texts.valid, np.zeros(settings.num_windows), 1),
    )
    params = train(key, {}, data)
    pool, unseen = (-np.asarray(losses_of(params, p.windows)) for p in (texts.pool, texts.unseen))
    cost = hypergrad.flops(train, key, {}, data) + hypergrad.flops(losses_of, params, texts.pool.windows)
    return Scores(pool, unseen, cost)


def loss_difference(texts: Texts, key, settings: Settings, uniform) -> Scores:
    """How much the loss falls when the uniform model continues with the validation text."""
    train, data = (
        plain_training(settings, settings.tuning_steps),
        marked(texts.pool.windows, texts.valid, np.zeros(settings.num_windows), 1),
    )
    start = {"start": uniform}
    params = train(key, start, data)
    pool, unseen = (
        np.asarray(losses_of(uniform, p.windows) - losses_of(params, p.windows)) for p in (texts.pool, texts.unseen)
    )
    cost = hypergrad.flops(train, key, start, data) + 2 * hypergrad.flops(losses_of, params, texts.pool.windows)
    return Scores(pool, unseen, cost + plain_flops(texts, key, settings))


def plain_flops(texts: Texts, key, settings: Settings) -> float:
    """Returns the operations of one plain training."""
    return hypergrad.flops(plain_training(settings, settings.num_steps), key, {}, all_windows(texts))


# ---- learned weights -------------------------------------------------------------------------------------------------


def make_task(texts: Texts) -> base.Task:
    windows = jnp.asarray(texts.pool.windows)
    return base.Task({"windows": windows, "index": jnp.arange(len(windows))}, jnp.asarray(texts.valid))


def make_learner(estimator: base.Estimator, num_steps: int, rate: float) -> training.Learner:
    schedule = optax.cosine_decay_schedule(rate, num_steps)
    return training.learner(estimator, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)))


def fit(learner: training.Learner, task: base.Task, start, key, *, num_steps, space=None) -> tuple[Any, float]:
    """Returns the result of the outer loop, and its operations."""
    result = training.fit(
        learner, lambda key: task, hyperparams=start, space=space, num_steps=num_steps, key=key, progress=False
    )
    flops = hypergrad.flops(lambda state: learner.step(state)[0].hyperparams, result.state)
    return result, num_steps * flops


# Learners are made once, so that all seeds share their compiled programs.


def by_index(settings: Settings, num_steps: int) -> base.Problem:
    """Returns the problem whose λ has a weight for each window."""
    loop = make_loop(settings, lambda hp, batch: hp["weight"][batch["index"]], num_steps)
    return inner.problem(loop, mean_loss)


@functools.cache
def window_learner(settings: Settings) -> training.Learner:
    problem = spaces.constrain(by_index(settings, settings.num_steps), weight_space(settings))
    rule = hypergrad.unrolled(problem, num_steps=settings.num_steps, remat="step")
    return make_learner(rule, settings.outer_steps, settings.weight_rate)


@functools.cache
def scorer_learner(settings: Settings) -> training.Learner:
    horizon = settings.scorer_horizon
    rule = hypergrad.unrolled(by_index(settings, horizon), num_steps=horizon, remat="step")
    return make_learner(predictors.amortize(rule, scorer.predictor()), settings.scorer_steps, settings.scorer_rate)


@functools.cache
def online_learner(settings: Settings) -> training.Learner:
    """Returns a learner whose λ is the scorer itself, and which takes an outer step at each step of the training."""

    def outer_batch(key, task):
        return task.valid[jax.random.choice(key, len(task.valid), (settings.batch,))]

    loop = make_loop(settings, scorer.weight, settings.num_steps)
    problem = inner.problem(loop, mean_loss, outer_batch=outer_batch)
    rule = hypergrad.f2sa(problem, num_steps=1, multiplier=settings.multiplier)
    return make_learner(rule, settings.num_steps, settings.online_rate)


@functools.cache
def weight_space(settings: Settings) -> dict[str, Any]:
    return {"weight": spaces.interval(0, 1, shape=(settings.num_windows,))}


def weight_per_window(texts: Texts, key, settings: Settings, uniform) -> Scores:
    """λ are weights of the windows; exact hypergradients through whole trainings."""
    space, learner = weight_space(settings), window_learner(settings)
    start, steps = spaces.default(space), settings.outer_steps
    result, flops = fit(learner, make_task(texts), start, key, num_steps=steps, space=space)
    return Scores(np.asarray(result.hyperparams["weight"]), None, flops)


def amortized_scorer(texts: Texts, key, settings: Settings, uniform) -> Scores:
    """Hypergradients of the same weights, pulled back to the parameters of a network that reads the windows.

    They go through shorter trainings, since the network needs more outer steps.
    """
    init_key, key = jax.random.split(key)
    learner, start = scorer_learner(settings), scorer.init(init_key)
    result, flops = fit(learner, make_task(texts), start, key, num_steps=settings.scorer_steps)
    return Scores(*scores_by(result.hyperparams, texts), flops)


def online_scorer(texts: Texts, key, settings: Settings, uniform) -> Scores:
    """The scorer learns at each step of one training, by first derivatives of a second, penalized training."""
    init_key, key = jax.random.split(key)
    learner, start = online_learner(settings), scorer.init(init_key)
    result, flops = fit(learner, make_task(texts), start, key, num_steps=settings.num_steps)
    return Scores(*scores_by(result.hyperparams, texts), flops, result.state.estimator_state.inner.params)


def scores_by(params, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    pool, unseen = (np.asarray(scorer.score(params, jnp.asarray(p.windows))) for p in (texts.pool, texts.unseen))
    return pool, unseen


METHODS = {
    "perplexity": perplexity,
    "loss difference": loss_difference,
    "metagradient, a weight per window": weight_per_window,
    "metagradient, a scorer": amortized_scorer,
    "online, a scorer": online_scorer,
}
