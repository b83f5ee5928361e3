"""MeLU and CAVIA: a network that corrects tuned offsets, adapted to a user's first ratings by gradient steps.

The network sees an item's columns and the features of the user's first ratings. MeLU (Lee et al., KDD 2019) adapts the
last layer, with a learned rate for each leaf. CAVIA adapts a context vector. The control does not adapt.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.recommend.per_user import root_mean_square
from metaopt import base, few_shot, hypergrad, inner, training

NUM_CONTEXT = 4
NAMES = ("network, not adapted", "MeLU", "CAVIA")


class Settings(NamedTuple):
    """Settings of the training of networks: sizes, and rates of the inner steps and of AdamW."""

    width: int = 24
    num_inner: int = 5
    inner_rate: float = 0.003
    rate: float = 5e-4
    weight_decay: float = 0.1
    num_steps: int = 300
    num_users: int = 32
    num_later: int = 32
    order: str = "window"


# Chosen on training users of fold 0, by `--choose networks`.
DESIGNS = {NAMES[0]: Settings(), "MeLU": Settings(rate=2e-3), "CAVIA": Settings(rate=2e-3, inner_rate=0.03)}


def hidden(params, batch):
    """Returns [N, width + C]: hidden units and the inputs themselves."""
    first = batch["x"] @ params["hidden"]["w"] + params["hidden"]["b"][None]
    if "context" in params:
        first += (params["context"] @ params["hidden"]["context"])[None]
    return jnp.concatenate([jnp.tanh(first), batch["x"]], axis=1)


output = few_shot.linear_head(hidden)


def initial(key: jax.Array, num_inputs: int, width: int, name: str) -> dict:
    """Returns initial weights. The head is 0, so that the network begins as the tuned offsets."""
    input_key, context_key = jax.random.split(key)
    layer = {"w": jax.random.normal(input_key, (num_inputs, width)) / num_inputs**0.5, "b": jnp.zeros(width)}
    if name == "CAVIA":
        layer["context"] = jax.random.normal(context_key, (NUM_CONTEXT, width)) / NUM_CONTEXT**0.5
    return {"hidden": layer, "head": {"w": jnp.zeros((width + num_inputs, 1)), "b": jnp.zeros(1)}}


def rmse(params, hyperparams, batch):
    return root_mean_square(output(params, batch) - batch["y"], batch["mask"][:, None])


def mse(params, hyperparams, batch):
    return few_shot.mean_squared_error(output(params, batch), batch)


def make_adaptation(name: str, settings: Settings) -> few_shot.Adaptation:
    steps, rate = settings.num_inner, settings.inner_rate
    if name == "MeLU":
        return few_shot.anil(mse, outer_loss=rmse, num_steps=steps, rate=rate, rates="leaf")
    if name == "CAVIA":
        return few_shot.cavia(
            mse, outer_loss=rmse, num_context=NUM_CONTEXT, num_steps=steps, rate=100 * rate, rates="one"
        )
    return few_shot.pretrained(mse, outer_loss=rmse, test_steps=0)


class Method(NamedTuple):
    """One kind of network; programs are shared by all folds.

    Attributes:
      init: `(key, number of inputs, task) -> λ`.
      learner: of λ.
      judge: `(λ, tasks) -> []`, the mean outer loss.
      predict: `(λ, support sets, inputs of items [S, I, C], stages [U], features [U, F]) -> [U, I]`, corrections.
    """

    init: Callable
    learner: training.Learner
    judge: Callable
    predict: Callable


def make_method(name: str, settings: Settings) -> Method:
    a = make_adaptation(name, settings)
    decayed = lambda hyperparams: {leaf: leaf == "init" for leaf in hyperparams}
    schedule = optax.cosine_decay_schedule(settings.rate, settings.num_steps)
    adam = optax.adamw(schedule, weight_decay=settings.weight_decay, mask=decayed)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
    run_loop = inner.run(a.unrolling.loop, a.test_steps)

    def init(key, num_inputs, task):
        return a.hyperparams(initial(key, num_inputs, settings.width, name), task)

    def adapted(hyperparams, first):
        return a.params(run_loop(jax.random.key(0), hyperparams, first), hyperparams)

    def judge(hyperparams, tasks):
        one = lambda task: rmse(adapted(hyperparams, task.train), hyperparams, task.valid)
        return jax.vmap(one)(tasks).mean()

    def predict(hyperparams, first, inputs, stages, features):
        def one(user):
            first, stage, features = user
            x = inputs[stage]
            x = jnp.concatenate([x, jnp.broadcast_to(features[None], (len(x), len(features)))], axis=1)
            return output(adapted(hyperparams, first), {"x": x})[:, 0]

        return jax.lax.map(one, (first, stages, features))

    learner = training.learner(hypergrad.over_tasks(a.estimator), optimizer)
    return Method(init, learner, jax.jit(judge), jax.jit(predict))


def train(method: Method, settings: Settings, draw: Callable, held: base.Task, seed: int) -> dict:
    """Returns the λ of the smallest error on the held-out users.

    Args:
      method: see `make_method`.
      settings: of the training.
      draw: `key -> tasks`, of training users.
      held: tasks of training users that are held out.
      seed: of λ and of the draws.
    """
    first = jax.tree.map(lambda x: jnp.asarray(x[0]), held.train)
    result = training.fit(
        method.learner,
        draw,
        hyperparams=method.init(jax.random.key(seed), held.train["x"].shape[-1], first),
        num_steps=settings.num_steps,
        key=jax.random.key(seed),
        evaluate=lambda key, hyperparams: method.judge(hyperparams, held),
        eval_every=max(settings.num_steps // 15, 1),
        progress=False,
    )
    return jax.tree.map(np.asarray, result.best_hyperparams)
