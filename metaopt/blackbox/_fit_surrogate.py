"""Fits the parts of a surrogate: the kernel, the weights of tasks, and the embedding of tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _row_embedding, hypergrad, training
from metaopt.blackbox import _surrogates
from metaopt.blackbox._fitting import Budget, fit, keep_learners, sample_trials, usable_tasks
from metaopt.blackbox._new_task import ROWS


def fit_kernel(
    key: jax.Array, trials: Sequence[_surrogates.TaskTrials], budget: Budget, *, smooth: bool
) -> _surrogates.Kernel:
    """Fits the kernel by the marginal likelihood of some trials of some tasks at every step.

    Args:
      key: consumed.
      trials: the trials of the earlier tasks.
      budget: the number of steps.
      smooth: whether to bound the share of the outcome that is specific to a configuration (`at_least_smooth`).

    Returns:
      A `Kernel`.
    """
    num_dims = trials[0].x.shape[1]
    kernel = _surrogates.Kernel(jnp.full(num_dims, -0.5), jnp.array(2.0), jnp.log(jnp.array(0.1)))
    usable = [trials[s] for s in usable_tasks(trials)]
    if usable and num_dims:
        sample_tasks = sample_trials(usable, 64, _centered)
        kernel = fit("the kernel", _kernel_learner, sample_tasks, kernel, budget, key)
    return at_least_smooth(kernel) if smooth else kernel


def _centered(rng, s, x, y, mask):
    return x, (y - (y * mask).sum() / mask.sum()) * mask, mask


@keep_learners
def _kernel_learner(shapes) -> training.Learner:
    estimator = hypergrad.direct(lambda kernel, task, key: _surrogates.kernel_loss(kernel, task))
    return training.learner(hypergrad.over_tasks(estimator), optax.adam(0.05))


def at_least_smooth(kernel: Any) -> Any:
    """Bounds the share of the outcome that is specific to each configuration, 1 − smooth in the kernel.

    A deviation of a single configuration can be learned only in a finite set. In a continuous space, every new point
    could have a large one, so that every new point would look promising, even one next to the best point.

    Args:
      kernel: a `Kernel` or a `DeepKernel`.

    Returns:
      The same type.
    """
    return kernel._replace(logit_smooth=jnp.maximum(kernel.logit_smooth, 5.0))


def reference_configurations(
    key: jax.Array, trials: Sequence[_surrogates.TaskTrials], max_reference: int
) -> np.ndarray:
    """[M, D] tried configurations, or a random subset of them."""
    tried = np.unique(np.concatenate([task.x for task in trials]).round(6), axis=0)
    if len(tried) > max_reference:
        tried = tried[np.asarray(jax.random.permutation(key, len(tried)))[:max_reference]]
    return tried


def fit_attention(
    key: jax.Array, surrogate: _surrogates.Surrogate, family: Sequence[Any], num_members: int, budget: Budget
) -> _surrogates.Surrogate:
    """Fits an ensemble that weights the tasks. In its loss, each member weights the families at random (bootstrap).

    Args:
      key: consumed.
      surrogate: the surrogate of S tasks.
      family: S names.
      num_members: size of the ensemble.
      budget: the number of steps.

    Returns:
      The surrogate with `attention`; it has no member if there is only one family.
    """
    init_key, boot_key, fit_key = jax.random.split(key, 3)
    data = _attention_data(boot_key, surrogate, family, num_members)
    num_members = 0 if data is None else num_members
    attention = _surrogates.init_attention(init_key, num_members, surrogate.features.shape[1])
    if data is not None:
        attention = fit("the weights of tasks", _attention_learner, lambda key: data, attention, budget, fit_key)
    return surrogate._replace(attention=attention)


@keep_learners
def _attention_learner(shapes) -> training.Learner:
    estimator = hypergrad.direct(lambda attention, data, key: _surrogates.attention_loss(attention, data))
    return training.learner(estimator, optax.adam(0.05))


def _attention_data(key, surrogate, family, num_members: int):
    """The data for `attention_loss`; None if there is only one family, since no other family is left to learn from."""
    _, index = np.unique([str(name) for name in family], return_inverse=True)
    size = np.bincount(index)
    if len(size) < 2:
        return None
    draws = jax.random.exponential(key, (num_members, len(size)))[:, index] / np.sqrt(size)[index][None]
    return {
        "features": surrogate.features,
        "curves": surrogate.curves,
        "same_family": jnp.asarray(index[:, None] == index[None]),
        "weights": draws / draws.sum(1, keepdims=True),
    }


def fit_embedding(
    key: jax.Array,
    surrogate: _surrogates.Surrogate,
    rows: dict[str, jax.Array],
    family: Sequence[Any],
    num_members: int,
    budget: Budget,
    *,
    num_tasks: int = 32,
) -> _surrogates.Surrogate:
    """Fits the embedding of rows jointly with the weights of tasks.

    Each step sees a subset of tasks. The loss of a task uses only the tasks of other families in this subset.

    Args:
      key: consumed.
      surrogate: the surrogate of S tasks.
      rows: the rows, from `stacked_rows`.
      family: S names.
      num_members: size of the ensemble that weights tasks.
      budget: the number of steps.
      num_tasks: the size of a subset.

    Returns:
      The surrogate with `attention`, `embedding`, and the embedding's features.
    """
    init_key, boot_key, fit_key, embedding_key = jax.random.split(key, 4)
    data = _attention_data(boot_key, surrogate, family, num_members)
    params = _row_embedding.init_embedding(embedding_key)
    num_features = surrogate.features.shape[1] + len(params["embedding"])
    num_members = 0 if data is None else num_members
    attention = _surrogates.init_attention(init_key, num_members, num_features)
    if data is not None:
        sample_tasks = sample_subsets(data, rows, num_tasks)
        start = attention, params
        attention, params = fit("the embedding of rows", _embedding_learner, sample_tasks, start, budget, fit_key)
    features, center, scale = _embed_all(params, rows)
    return surrogate._replace(
        attention=attention,
        features=jnp.concatenate([surrogate.features, features], axis=1),
        embedding=_surrogates.Embedding(params, center, scale),
    )


def sample_subsets(data, rows, num_tasks: int):
    """Returns `sample_tasks` for `fit`, which draws tasks of at least two families."""
    same, num_all = np.asarray(data["same_family"]), len(data["same_family"])

    def sample_tasks(key):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), num_all))
        drawn = order[: min(num_tasks, num_all)]
        if same[drawn[0], drawn].all():  # more than one family must be among them
            drawn = np.append(drawn[:-1], next(i for i in order if not same[drawn[0], i]))
        weights = data["weights"][:, drawn]
        subset = {"features": data["features"][drawn], "curves": data["curves"][drawn]}
        subset |= {"same_family": data["same_family"][drawn][:, drawn]}
        subset |= {"weights": weights / weights.sum(1, keepdims=True)}
        return subset, jax.tree.map(lambda leaf: leaf[drawn], rows)

    return sample_tasks


@keep_learners
def _embedding_learner(shapes) -> training.Learner:
    rates = optax.partition({"attention": optax.adam(0.05), "rows": optax.adam(3e-3)}, ("attention", "rows"))
    return training.learner(hypergrad.direct(lambda hyperparams, batch, key: embedding_loss(hyperparams, batch)), rates)


def embedding_loss(hyperparams, batch) -> jax.Array:
    """The `attention_loss`, where a task's features are its given ones, followed by the embedding of its rows.

    Args:
      hyperparams: (parameters of the attention, parameters of the embedding).
      batch: (data of S tasks as for `attention_loss`, their rows).

    Returns:
      [] the `attention_loss`. Embeddings are standardized over tasks.
    """
    (attention, params), (data, rows) = hyperparams, batch
    features = _standardized(_embed(params, rows))[0]
    data = data | {"features": jnp.concatenate([data["features"], features], axis=1)}
    return _surrogates.attention_loss(attention, data)


def _embed(params, rows):
    """[S, W] embeddings of the rows of S tables."""
    return jax.vmap(lambda data: _row_embedding.embed_rows(params, data, max_rows=_surrogates.MAX_ROWS))(rows)


def _standardized(raw):
    """Standardizes over tasks; also returns the centers and scales."""
    center, scale = raw.mean(0), jnp.sqrt(raw.var(0) + 1e-6)
    return (raw - center[None]) / scale[None], center, scale


@jax.jit
def _embed_all(params, rows):
    return _standardized(_embed(params, rows))


def stacked_rows(names: Sequence[str], datasets: Mapping[str, Any]) -> dict[str, jax.Array]:
    """[S, ...] the rows that the embedding reads, with columns and classes padded to a common size.

    Raises:
      KeyError: if a task has no rows, or they lack an array.
    """
    has_rows = lambda k: k in ("x", "y", "mask")
    cut = lambda data, k: np.asarray(data[k])[: _surrogates.MAX_ROWS if has_rows(k) else None]
    stacked = {}
    for k in ROWS:
        arrays = [cut(datasets[name], k) for name in names]
        shape = np.max([array.shape for array in arrays], axis=0)
        pad = lambda array, shape=shape: np.pad(array, [(0, n - m) for n, m in zip(shape, array.shape, strict=True)])
        dtype = None if k == "y" else jnp.result_type(float)
        stacked[k] = jnp.asarray(np.stack([pad(array) for array in arrays]), dtype)
    return stacked
