"""The meta-searcher h: its inputs, its samples, and the programs that learn it and fine-tune with it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.architecture.auto_architecture.config import Config
from experiments.architecture.auto_architecture.image_table_tasks import NUM_CLASSES, Unit
from experiments.architecture.auto_architecture.training import Shape, masked_loss
from metaopt import base, hypergrad, inner, nas, predictors, spaces, tasks, training


def gradient_features(shape: Shape, key, batch: base.Task) -> tuple[np.ndarray, float]:
    """Returns [n, K] `nas.gradient_features` of every task, and the processor seconds per task, without compilation."""
    num = 2 * shape.config.batch_size
    rows = {k: v[:, :num] if k in ("x", "y", "mask") else v for k, v in batch.train.items()}
    one = lambda key, rows: nas.gradient_features(shape.search.supernet, key, rows, loss=masked_loss)
    keys, rewritten = jax.random.split(key, len(batch.train["y"])), inner.im2col(one, only_on_cpu=True)
    program = jax.jit(lambda *args: jax.lax.map(lambda a: rewritten(*a), args)).lower(keys, rows).compile()
    start = time.process_time()
    features = np.asarray(program(keys, rows))
    return features, (time.process_time() - start) / len(keys)


def scale_features(units: list[Unit], gradients: np.ndarray, fit_on: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Scales the features [units, F]: statistics of rows, and gradients at the start.

    The scaling is fitted on the meta-training tasks.
    """
    names = list(units[0].features)
    rows = [
        {**u.features, **{f"gradient {i}": g for i, g in enumerate(gs)}} for u, gs in zip(units, gradients, strict=True)
    ]
    scaling = tasks.fit_scaling(
        [rows[i] for i in fit_on], [*names, *(f"gradient {i}" for i in range(gradients.shape[1]))]
    )
    values = np.stack([scaling.transform(row, clip=3.0) for row in rows]).astype(np.float32)
    values[:, len(names) :] *= 0.5  # there are many of them
    return values, names


def sampled(predictor: base.Predictor, space: base.PyTree, temperature: float) -> base.Predictor:
    """α = (h(0) + trust · (h(t) − h(0)) + G) / τ: with Gumbel noise G, softmax(α) is nearly a discrete architecture.

    The features of the average task are 0. The noise stays the same for a whole training run. The noise and the trust
    are in `task.features`.
    """

    def apply(meta_params, task):
        values, trust = task.features["values"], task.features["trust"]
        predict = lambda x: spaces.to_constrained(space, predictor.apply(meta_params, task._replace(features=x)))
        average, own = predict(0 * values), predict(values)
        return jax.tree.map(
            lambda a, b, noise: (a + trust * (b - a) + noise) / temperature, average, own, task.features["noise"]
        )

    return base.Predictor(predictor.init, apply, {})


def with_features(shape: Shape, batch: base.Task, values) -> base.Task:
    """Returns a batch of tasks with these features for h, with trust 1 and without noise."""
    num = len(values)
    noise = {k: jnp.zeros((num, *leaf.shape)) for k, leaf in shape.space().items()}
    return batch._replace(features={"values": jnp.asarray(values), "trust": jnp.ones(num), "noise": noise})


def trusted(batch: base.Task, trust: float) -> base.Task:
    """Returns the same tasks, with this trust in their features."""
    return batch._replace(features={**batch.features, "trust": jnp.full_like(batch.features["trust"], trust)})


def resplit(key: jax.Array, task: base.Task) -> base.Task:
    """`tasks.resplit`, for images too."""
    shape = task.train["x"].shape[1:]
    as_shape = lambda data, *shape: {**data, "x": data["x"].reshape(len(data["x"]), *shape)}
    flat = task._replace(train=as_shape(task.train, -1), valid=as_shape(task.valid, -1))
    new = tasks.resplit(key, flat)
    return new._replace(train=as_shape(new.train, *shape), valid=as_shape(new.valid, *shape))


def make_sampler(batch: base.Task, rows: np.ndarray, meta_batch: int):
    """Returns `key -> tasks`: some of the meta-training tasks, with resplit rows, permuted classes, and noise."""

    @jax.jit
    def draw(key, batch, rows):
        pick_key, split_key, class_key, noise_key = jax.random.split(key, 4)
        drawn = rows[jax.random.choice(pick_key, rows.shape[0], (meta_batch,), replace=False)]
        chosen = jax.tree.map(lambda x: x[drawn], batch)
        chosen = jax.vmap(resplit)(jax.random.split(split_key, meta_batch), chosen)
        # The classes of a task in random order, the real ones first.
        order = jax.random.uniform(class_key, (meta_batch, NUM_CLASSES)) + 2 * (1 - chosen.train["class_mask"])
        place = jnp.argsort(jnp.argsort(order, 1), 1)
        rename = lambda data: {**data, "y": jnp.take_along_axis(place, data["y"], 1)}
        leaves, treedef = jax.tree.flatten(chosen.features["noise"])
        keys = jax.random.split(noise_key, len(leaves))
        noise = [jax.random.gumbel(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        features = {**chosen.features, "noise": jax.tree.unflatten(treedef, noise)}
        return base.Task(rename(chosen.train), rename(chosen.valid), features)

    return lambda key: draw(key, batch, jnp.asarray(rows))


class Meta:
    """h for tasks of one shape, and the programs that learn it and fine-tune with it."""

    def __init__(self, shape: Shape, num_features: int):
        config, self.num_features = shape.config, num_features
        predictor = predictors.mlp(shape.space(), num_features, num_hidden=config.num_hidden)
        h = sampled(predictor, shape.space(), config.temperature)
        self.search = nas.meta_architecture_search(shape.search, h)
        self.learner = make_learner(self.search, config)
        self.hyperparams = jax.jit(self.search.hyperparams)
        self.alpha = jax.jit(jax.vmap(self.search.alpha, in_axes=(None, 0)))

        def fine_tune(rate, learned, key, task):
            adam = optax.adam(rate, b1=0.5)
            tuned = nas.meta_architecture_search(shape.tuning, h, num_steps=config.fine_tune_steps, optimizer=adam)
            result = tuned.fine_tune(key, learned, task)
            return result.alpha, result.params

        self.fine_tune = jax.jit(lambda shared, args: jax.vmap(fine_tune, in_axes=(None, None, 0, 0))(*shared, *args))


def make_learner(meta: nas.MetaArchitecture, config: Config) -> training.Learner:
    """Returns a learner of h and of the initial weights, each at its own rate.

    Weight decay keeps the effect of features small.
    """
    clipped = lambda rate, decay: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(rate, config.meta_steps), weight_decay=decay),
    )
    label = lambda path, _: "start" if path[0].key == "init" else "reading" if path[1].key in ("linear", "out") else "h"
    optimizer = optax.partition(
        {
            "start": clipped(config.init_rate, 0.0),
            "reading": clipped(config.meta_rate, config.meta_decay / config.meta_rate),
            "h": clipped(config.meta_rate, 0.0),
        },
        lambda hyperparams: jax.tree_util.tree_map_with_path(label, hyperparams),
    )
    return training.learner(hypergrad.over_tasks(meta.estimator, max_norm=1.0), optimizer)
