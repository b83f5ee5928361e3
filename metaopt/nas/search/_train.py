"""Trains an inner loop on the host, with progress, checkpoints and signals."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, training


def train_loop(
    loop: base.InnerLoop,
    data: base.Data,
    *,
    num_steps: int,
    key: jax.Array,
    hyperparams: base.HyperParams = None,
    callback: Callable[[int, dict[str, Any]], Any] | None = None,
    progress: bool | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int = 1_000,
    settings: Mapping[str, Any] | None = None,
    compilation_cache: str | os.PathLike | None = None,
) -> tuple[base.InnerState, np.ndarray]:
    """Trains an inner loop step by step on the host: `inner.run` for long runs that may be interrupted and continued.

    It calls `training.fit` with a rule whose λ has no effect. Progress, checkpoints and signals work as in `fit`:
    Ctrl-C or SIGTERM ends the training after the current step. It then raises, so half-trained parameters are never
    returned, and a loop over architectures ends too. The result equals, to rounding, that of `inner.run` with the first
    key of `jax.random.split(key)`.

    Args:
      loop: the inner loop.
      data: its training data.
      num_steps: total number of steps, including the steps before an interruption.
      key: the source of all randomness.
      hyperparams: λ, constant, a tree of arrays; None if the loop has none.
      callback: `(step, metrics) -> stop`, with the metric "loss", the training loss. Training continues after a
        non-finite loss, as in `inner.run`: use the callback to stop it.
      progress: as for `training.fit`: None shows a bar in a terminal, and prints lines elsewhere.
      checkpoint_dir: the folder for checkpoints; each training needs its own. None writes no checkpoints.
      checkpoint_every: steps between checkpoints. Checkpoints do not contain the data.
      settings: as for `training.fit`, such as `{"genotype": nas.genotype_to_text(genotype)}`.
      compilation_cache: as for `training.fit`: a folder in which JAX keeps compiled programs.

    Returns:
      The inner state, and [steps] training losses: fewer than `num_steps` if `callback` stopped it.

    Raises:
      KeyboardInterrupt: if SIGINT arrived; with `checkpoint_dir`, the same call continues. The exception's `result` is
        the partial `FitResult`, whose `state.estimator_state` is the inner state.
      SystemExit: the same for SIGTERM, with status 143.
      ValueError: if a count is out of range; if the loop's `init` rejects the data, such as labels that are not classes
        of a `retraining`. Also if `checkpoint_dir` is in use, or holds another run: another key,
        other data, another λ, another program or other `settings`.
    """
    init_key, fit_key = jax.random.split(key)
    # `fit` traces the data, and the values of traced labels cannot be checked. So let `init` see the arrays once.
    arrays = jax.tree.map(jnp.asarray, (hyperparams, data))
    jax.eval_shape(lambda key: loop.init(key, *arrays), init_key)
    result = training.fit(
        training.learner(_plain_training(loop, init_key), optax.set_to_zero()),
        lambda key: {"data": data, "hyperparams": hyperparams},
        hyperparams=jnp.zeros(()),
        num_steps=num_steps,
        key=fit_key,
        callback=callback,
        progress=progress,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        settings=settings,
        compilation_cache=compilation_cache,
    )
    return result.state.estimator_state, result.history.get("loss", np.zeros(0))


def _plain_training(loop: base.InnerLoop, init_key: jax.Array) -> base.Estimator:
    """Returns an estimator whose step is an inner step.

    Its task holds the data and the loop's λ. Its own λ is a number without effect.
    """

    def init(key, hyperparams, task):
        return loop.init(init_key, task["hyperparams"], task["data"])

    def estimate(hyperparams, task, state):
        batch, context = loop.batch(state, task["data"]), loop.context(state)
        loss = jax.value_and_grad(loop.loss, has_aux=True)
        (value, model_state), grads = loss(loop.params(state), task["hyperparams"], batch, context)
        state = loop.update(state, grads, model_state, task["hyperparams"])
        # A non-finite value would end the task, and training would start again.
        finite = jnp.where(jnp.isfinite(value), value, jnp.finfo(value.dtype).max)
        return base.Estimate(finite, jnp.zeros_like(hyperparams), jnp.array(False), {"loss": value}), state

    return base.Estimator(init, estimate, kind="exact")
