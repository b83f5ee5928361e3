"""Fits the networks of a learned optimizer: deep kernels and transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import hypergrad, training
from metaopt.blackbox import _deep_kernel, _posterior, _surrogates, _transformer
from metaopt.blackbox._fitting import Budget, fit, generator, keep_learners, sample_trials, stack, usable_tasks

_KNOWN = 0.8  # the probability that a task's features are known during training
_BATCH = 16  # tasks per step of the transformers


def fit_deep_kernels(
    key: jax.Array,
    trials: Sequence[_surrogates.TaskTrials],
    features: jax.Array,
    num_members: int,
    budget: Budget,
) -> _deep_kernel.DeepKernel:
    """Fits deep kernels by the marginal likelihood of few or many trials, with or without the task's features.

    Args:
      key: consumed.
      trials: the trials of S tasks.
      features: [S, F] of the tasks, ranked.
      num_members: E.
      budget: the number of steps.

    Returns:
      A `DeepKernel` with leaves [E, ...].
    """
    init_key, fit_key = jax.random.split(key)
    usable, task_features = usable_tasks(trials), np.asarray(features)
    num_dims, num_features = trials[0].x.shape[1], task_features.shape[1]
    init = lambda key: _deep_kernel.init_deep_kernel(key, num_dims, num_features)
    start = jax.vmap(init)(jax.random.split(init_key, num_members))
    if not usable or num_dims == 0:
        return start

    def with_features(rng, s, x, y, mask):
        few = np.arange(len(mask)) < rng.integers(2, len(mask) + 1)
        return (x, y, mask * few), task_features[usable[s]] * (rng.random() < _KNOWN)

    sample_tasks = sample_trials([trials[s] for s in usable], 32, with_features)
    return fit("deep kernels", _deep_kernel_learner, sample_tasks, start, budget, fit_key, budget.num_steps)


@keep_learners
def _deep_kernel_learner(shapes, num_steps: int) -> training.Learner:
    def loss(deep, task, key):
        return jax.vmap(lambda member: _deep_kernel.deep_kernel_loss(member, *task))(deep).sum()

    rate = optax.cosine_decay_schedule(3e-3, max(num_steps, 1))
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    return training.learner(hypergrad.over_tasks(hypergrad.direct(loss)), optimizer)


def fit_transformers(
    key: jax.Array,
    trials: Sequence[_surrogates.TaskTrials],
    surrogate: _surrogates.Surrogate,
    family: Sequence[Any],
    num_members: int,
    budget: Budget,
) -> tuple[_transformer.Transformer, int]:
    """Fits transformers to predict the outcomes of some trials of a task, given zero, few or many others.

    Trials that are good on average over tasks of other families are given more often.

    Args:
      key: consumed.
      trials: the trials of S tasks.
      surrogate: the model of the tasks.
      family: S names.
      num_members: E.
      budget: the number of steps.

    Returns:
      A `Transformer` with leaves [E, ...], and the maximum number of trials of a task that they have read.
    """
    init_key, start_key, fit_key = jax.random.split(key, 3)
    num_dims, num_features = trials[0].x.shape[1], surrogate.features.shape[1]
    init = lambda key: _transformer.init_transformer(key, num_dims, num_features)
    start = jax.vmap(init)(jax.random.split(init_key, num_members))
    usable = usable_tasks(trials)
    if not usable:
        return start, _transformer.MAX_SHOWN
    num_shown = min(_transformer.MAX_SHOWN, max(len(trials[s].y) for s in usable) - 1)
    sample_tasks = sample_shown(usable, trials, surrogate, family, num_shown)
    start = _with_frequencies(start, [sample_tasks(key) for key in jax.random.split(start_key, 32)])
    args = "transformers", _transformer_learner, sample_tasks, start, budget, fit_key, budget.num_steps
    return fit(*args), num_shown


def sample_shown(usable, trials, surrogate, family, num_shown: int) -> Callable[[jax.Array], Any]:
    """Returns `sample_tasks` for `fit`: shown trials, trials to predict, and features.

    The choice of shown trials depends on the mean outcomes on tasks of other families. It must not depend on the task's
    own outcomes, which are the targets.
    """
    features = np.asarray(surrogate.features)
    outcomes = [_surrogates.normalize(trials[s].y)[0] for s in usable]
    functions = jax.jit(lambda x: _posterior.functions_at(surrogate, x))
    _, index = np.unique([str(name) for name in family], return_inverse=True)
    expected = [mean_of_others(np.asarray(functions(jnp.asarray(trials[s].x))), index == index[s]) for s in usable]
    num_asked = min(_transformer.MAX_SHOWN, max(len(y) for y in outcomes))

    def sample_task(rng, i):
        x, y = trials[usable[i]].x, outcomes[i]
        good = -rng.uniform(0, 3) * expected[i] / max(expected[i].std(), 1e-9)
        order = np.argsort(-good - rng.gumbel(size=len(y)))
        few = min(int((num_shown + 1) * rng.random() ** 2), len(y) - 1)
        shown = _padded_rows(x, y, order[:few], num_shown)
        asked = _padded_rows(x, y, order[few:][:num_asked], num_asked)
        return shown, asked, features[usable[i]] * (rng.random() < _KNOWN)

    def sample_tasks(key):
        rng = generator(key)
        return stack([sample_task(rng, i) for i in rng.integers(len(usable), size=_BATCH)])

    return sample_tasks


def _padded_rows(x: np.ndarray, y: np.ndarray, rows: np.ndarray, size: int):
    """(x, y, mask) of some trials, padded to `size`."""
    pad = (0, size - len(rows))
    return np.pad(x[rows], (pad, (0, 0))), np.pad(y[rows], pad), np.pad(np.ones(len(rows)), pad)


def mean_of_others(functions: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """[P] the mean function over the tasks that are not left out; 0 if no task remains.

    `functions` [P, 1 + S] has f̄ and f_s − f̄. `left_out` [S] marks the tasks to leave out.
    """
    num = (~left_out).sum()
    return functions[:, 0] + functions[:, 1:][:, ~left_out].sum(1) / num if num else np.zeros(len(functions))


def _with_frequencies(start: _transformer.Transformer, drawn: Sequence[Any]) -> _transformer.Transformer:
    """Initializes the output bias with the log frequency of each bin.

    Bins without outcomes would otherwise dominate the mean, since they lie far away.
    """
    counts = np.ones(start.head_bias.shape[1]) / 10
    for shown, asked, _ in drawn:
        classes = np.asarray(jax.vmap(_transformer.outcome_classes)(shown, asked))
        counts += np.bincount(classes[np.asarray(asked[2]) > 0], minlength=len(counts))
    return start._replace(head_bias=start.head_bias + jnp.log(jnp.asarray(counts / counts.sum()))[None])


@keep_learners
def _transformer_learner(shapes, num_steps: int) -> training.Learner:
    def loss(transformers, task, key):
        return jax.vmap(lambda member: _transformer.transformer_loss(member, *task))(transformers).sum()

    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, max(num_steps // 20, 1), max(num_steps, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
    return training.learner(hypergrad.over_tasks(hypergrad.direct(loss)), optimizer)
