"""Training runs on development tasks that keep the probability of each row's class, so that runs can be combined."""

from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from experiments.hyperparameters.auto_tune.learning import outer_optimizer
from experiments.hyperparameters.transfer.combine import log_loss
from metaopt import automl, base, hypergrad, spaces

CHUNK = 4  # tasks that train at the same time


class Part(NamedTuple):
    """Tasks of one padded shape.

    Attributes:
      task: leaves [n, ...], without features.
      test: like `task.valid`.
      raw_features: [n, F] meta-features.
      family: [n] names.
      kind: [n] kinds of targets.
      rows: [n] numbers of rows of the whole tables.
    """

    task: base.Task
    test: dict
    raw_features: np.ndarray
    family: np.ndarray
    kind: np.ndarray
    rows: np.ndarray


class Probabilities(NamedTuple):
    """The probability of the true class of each row under K runs; 0 for a run that diverged.

    Attributes:
      valid: [K, n, N] of validation rows.
      test: [K, n, N'] of test rows.
    """

    valid: np.ndarray
    test: np.ndarray


class Recorded:
    """Trains on all tasks, each with its own λ, and keeps the probabilities. It replaces `auto_tune.Trials`."""

    def __init__(self, network: automl.TabularNetwork, parts: list[Part]):
        self.parts, self.units = parts, np.arange(sum(len(part.family) for part in parts))
        self._kept: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in parts]

        def of_true_class(params, hyperparams, rows):
            log_p = network.log_probabilities(params, hyperparams, rows)
            p = jnp.exp(jnp.take_along_axis(log_p, rows["y"][:, None], axis=1)[:, 0])
            return jnp.where(jnp.isfinite(p).all(), p, 0.0)

        def run(args):
            key, hyperparams, task, test = args
            params = automl.train(network, key, hyperparams, task)
            return of_true_class(params, hyperparams, task.valid), of_true_class(params, hyperparams, test)

        self._runs = jax.jit(lambda *args: jax.lax.map(run, args, batch_size=CHUNK))

    def __call__(self, key: jax.Array, hyperparams) -> np.ndarray:
        """Takes λ with a leading axis over all tasks, and returns [tasks, 3]: validation loss, test loss, 0."""
        losses, start = [], 0
        for k, part in enumerate(self.parts):
            n = len(part.family)
            own = jax.tree.map(lambda x, s=start, n=n: x[s : s + n], hyperparams)
            keys = jax.random.split(jax.random.fold_in(key, k), n)
            p = jax.device_get(self._runs(keys, own, part.task, part.test))
            self._kept[k].append(p)
            masks = part.task.valid["mask"], part.test["mask"]
            losses.append(np.stack([*(log_loss(x, mask) for x, mask in zip(p, masks, strict=True)), np.zeros(n)], 1))
            start += n
        return np.concatenate(losses)

    def take(self) -> list[Probabilities]:
        """Returns the runs since the last call, for each part."""
        taken = [Probabilities(*(np.stack(x) for x in zip(*kept, strict=True))) for kept in self._kept]
        self._kept = [[] for _ in self.parts]
        return taken


def make_steps(network: automl.TabularNetwork, num_steps: int, rate: float):
    """Returns `(key, z, part) -> [num_steps, n, L]`: λ after each hypergradient step, in unconstrained coordinates.

    Each step of a task has the same key, as `training.fine_tune` by default.
    """
    constrained = spaces.constrain(network.problem, network.space)
    estimator = hypergrad.unrolled(constrained, num_steps=network.num_steps, remat="step")
    unravel = unravel_in(network.space)
    optimizer = outer_optimizer(rate, num_steps + 1)

    def steps(args):
        key, z, task = args

        def step(carry, _):
            z, state = carry
            estimate, _ = estimator.estimate(z, task, estimator.init(key, z, task))
            updates, state = optimizer.update(estimate.hypergrad, state, z)
            z = jax.tree.map(jnp.add, z, updates)
            return (z, state), jax.flatten_util.ravel_pytree(z)[0]

        z = unravel(z)
        return jax.lax.scan(step, (z, optimizer.init(z)), length=num_steps)[1]

    mapped = jax.jit(lambda *args: jax.lax.map(steps, args, batch_size=CHUNK))

    def visited(key, z, part: Part) -> np.ndarray:
        return np.swapaxes(mapped(jax.random.split(key, len(z)), jnp.asarray(z), part.task), 0, 1)

    return visited


def unravel_in(space):
    """Returns `z [L] -> ` the coordinates as `spaces.Unconstrained`."""
    return jax.flatten_util.ravel_pytree(spaces.to_unconstrained(space, spaces.default(space)))[1]


def hyperparams_of(space, z: np.ndarray):
    """Returns λ of the coordinates [n, L], with a leading axis."""
    unravel = unravel_in(space)
    return jax.vmap(lambda row: spaces.to_constrained(space, unravel(row)))(jnp.asarray(z, jnp.float32))
