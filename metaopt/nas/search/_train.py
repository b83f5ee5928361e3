"""Trains an inner loop on the host, with progress, checkpoints and signals."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base, training

_MAX_NON_FINITE = 10  # consecutive steps after which a training stops, as in `training.fit`


def train_loop(
    loop: base.InnerLoop,
    data: base.Data,
    *,
    num_steps: int,
    key: jax.Array,
    hyperparams: base.HyperParams = None,
    callback: Callable[[int, dict[str, Any]], Any] | None = None,
    progress: bool | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1_000,
    settings: Mapping[str, Any] | None = None,
    compilation_cache: str | os.PathLike[str] | None = None,
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
      callback: `(step, metrics) -> stop`, with the only metric "loss", the training loss.
      progress: as for `training.fit`: None shows a bar in a terminal, and prints lines elsewhere.
      checkpoint_dir: the folder for checkpoints; each training needs its own. None writes no checkpoints.
      checkpoint_every: steps between checkpoints. Checkpoints do not contain the data.
      settings: as for `training.fit`, such as `{"genotype": nas.genotype_to_text(genotype)}`.
      compilation_cache: as for `training.fit`: a folder in which JAX keeps compiled programs.

    Returns:
      The inner state, and [steps] training losses: fewer than `num_steps` if `callback` stopped it.

    Raises:
      KeyboardInterrupt: if SIGINT arrived; with `checkpoint_dir`, the same call continues. The exception's `result` is
        the partial `training.FitResult`, whose `state.estimator_state` is the inner state.
      SystemExit: the same for SIGTERM, with status 143.
      FloatingPointError: if the loss of 10 consecutive steps was not finite. (`inner.run` continues.)
      ValueError: if a count is out of range; if the loop's `init` rejects the labels of the data, such as labels that
        are not classes of a `retraining`. Also if `checkpoint_dir` is in use, or holds another run: another key, other
        data, another λ, another program or other `settings`.
    """
    init_key, fit_key = jax.random.split(key)
    num_non_finite, ended = 0, False

    def watch(step, metrics):
        nonlocal num_non_finite, ended
        num_non_finite = 0 if np.isfinite(metrics["loss"]) else num_non_finite + 1
        # The other metrics of `fit`, such as the norm of a hypergradient, mean nothing here.
        ended = callback is not None and bool(callback(step, {"loss": metrics["loss"]}))
        return ended or num_non_finite >= _MAX_NON_FINITE

    result = training.fit(
        training.learner(_plain_training(loop, init_key), optax.set_to_zero()),
        lambda key: {"data": data, "hyperparams": hyperparams},
        hyperparams=jnp.zeros(0),  # no λ to learn
        num_steps=num_steps,
        key=fit_key,
        callback=watch,
        progress=progress,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        settings=settings,
        compilation_cache=compilation_cache,
    )
    losses = result.history.get("loss", np.zeros(0))
    if num_non_finite >= _MAX_NON_FINITE and not ended:
        raise FloatingPointError(_no_finite_losses(len(losses), data))
    return result.state.estimator_state, losses


def _no_finite_losses(num_steps: int, data: base.Data) -> str:
    """The message of the exception for losses that are not finite."""
    y, label_range, advice = np.asarray(data.get("y", 0.0) if isinstance(data, Mapping) else 0.0), "", ""
    if y.dtype.kind in "iu":
        label_range = f' ("y" has integers from {y.min()} to {y.max()})'
        advice = f" {_checks.LABELS_ADVICE}"
    return (
        f"The last {_MAX_NON_FINITE} training losses, up to step {num_steps}, were not finite. Likely causes: labels "
        f"that are not among the classes 0..C-1 of the loss{label_range}, NaN in the data, or a rate that is too large."
        f"{advice}"
    )


def _plain_training(loop: base.InnerLoop, init_key: jax.Array) -> base.Estimator:
    """Returns an estimator whose step is an inner step.

    Its task holds the data and the loop's λ. The estimator's own λ is an empty array and has no effect.
    """

    def init(key, hyperparams, task):
        return loop.init(init_key, task["hyperparams"], task["data"])

    def estimate(hyperparams, task, state):
        batch, context = loop.batch(state, task["data"]), loop.context(state)
        loss = jax.value_and_grad(loop.loss, has_aux=True)
        (value, model_state), grads = loss(loop.iterate(state), task["hyperparams"], batch, context)
        state = loop.update(state, grads, model_state, task["hyperparams"])
        # A non-finite value would end the task, and training would start again.
        finite = jnp.where(jnp.isfinite(value), value, jnp.finfo(value.dtype).max)
        return base.Estimate(finite, jnp.zeros_like(hyperparams), jnp.array(False), {"loss": value}), state

    return base.Estimator(init, estimate, kind="exact")
