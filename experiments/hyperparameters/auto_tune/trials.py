"""Trials: one training run on every unit at once, each with its own λ."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import inner


def in_chunks(fn: Callable, most: int) -> Callable:
    """Returns `fn` mapped over the first axis of its arguments: at most `most` entries at once, in equal chunks.

    The last chunk is filled up with the first entries. `jax.lax.map` would compile a second program for a shorter one.
    """

    def mapped(*args):
        num = len(jax.tree.leaves(args)[0])
        size = math.ceil(num / math.ceil(num / most))
        filled = jax.tree.map(lambda x: jnp.concatenate([x, x[: -num % size]]), args)
        outputs = jax.lax.map(lambda one: fn(*one), filled, batch_size=size)
        return jax.tree.map(lambda x: x[:num], outputs)

    return mapped


class Trials:
    """Trains on many units, each with its own λ."""

    def __init__(self, problem, scores, buckets, config):
        self.buckets, self.config = buckets, config
        self.units = np.concatenate([b.units for b in buckets])
        train = inner.run(problem.loop, config.num_steps)

        def trial(key, hyperparams, task, test):
            params = problem.loop.params(train(key, hyperparams, task.train))
            valid_loss, _ = scores(params, hyperparams, task.valid)
            return valid_loss, *scores(params, hyperparams, test)

        self._batch = jax.jit(in_chunks(trial, config.chunk))

    def compile(self, hyperparams) -> float:
        start = time.perf_counter()
        self(jax.random.key(0), hyperparams)
        return time.perf_counter() - start

    def __call__(self, key, hyperparams) -> np.ndarray:
        """Takes λ with a leading axis over `self.units`, returns [units, 3]: validation loss, test loss, test error."""
        outputs, start = [], 0
        for k, b in enumerate(self.buckets):
            n = len(b.units)
            part = jax.tree.map(lambda x, s=start, n=n: x[s : s + n], hyperparams)
            keys = jax.random.split(jax.random.fold_in(key, k), n)
            outputs.append(self._batch(keys, part, b.task, b.test))  # JAX runs all buckets at the same time
            start += n
        out = np.concatenate([np.stack(of_bucket, axis=1) for of_bucket in jax.device_get(outputs)])
        # A run that diverged counts as a failed trial: it is never chosen, and its test scores are poor guesses.
        return np.where(np.isfinite(out), out, np.array([np.inf, np.log(100.0), 1.0]))


def train_and_validate(problem, config, hyperparams, task):
    """One plain training run with its validation, as a scan, so that its products can be counted."""
    train = inner.run(problem.loop, config.num_steps, trace_fn=lambda state: ())
    state, _ = train(jax.random.key(0), hyperparams, task.train)
    return problem.outer_loss(problem.loop.params(state), hyperparams, task.valid, problem.loop.context(state))
