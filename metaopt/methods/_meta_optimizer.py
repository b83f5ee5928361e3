"""g and h from records of earlier trials: `train_meta_optimizer`, `train_meta_searcher`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, predictors, spaces, training
from metaopt.methods._meta_search import MetaOptimizer, encoder, meta_optimizer


def train_meta_optimizer(
    records: Sequence[base.Record],
    *,
    space: base.PyTree,
    features: Mapping[str, Any] | None = None,
    families: Mapping[str, Any] | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    num_members: int = 8,
    num_steps: int = 150,
    max_reference: int = 512,
    costs: bool = False,
    key: jax.Array | None = None,
) -> MetaOptimizer:
    """Learns from the records of earlier tasks to predict λ for a new one, and to spend trials on it.

    Three things are learned, each by `training.fit` over `hypergrad.direct` or in closed form: a kernel between
    configurations, by the marginal likelihood of the tasks' outcomes; what every earlier task says about every
    configuration, with mean and covariance over tasks (`predictors.surrogate`); and how a task's features weigh
    earlier tasks, by the regret of what would have been chosen for each task had its family been unknown
    (`predictors.attention_loss`), as an ensemble of bootstrapped members.

    `predict` minimizes the weighted mean outcome by gradient descent over the relaxed space from several starts, or
    over the candidates. The searcher's first trial is that; afterwards it maximizes an acquisition function under
    `predictors.posterior`, in the same way; for a batch, and while trials run, what a trial adds to those that run
    (`predictors.batch_expected_improvement`). Records of unrelated tasks lose their weight after a few trials; their
    outcomes should have the units of the new task's, since scale and noise of those are expected to be like theirs. A
    task whose trials all have one outcome, such as a task with one trial, says nothing of what is better, and is left
    out.

    Args:
      records: trials of earlier tasks: complete ones at full fidelity, and failed ones, which count as bad. Names
        and labels that the space does not have are ignored, and what a record lacks is at its default: tasks whose
        spaces differ still teach.
      space: of λ, for new tasks.
      features: task name -> [F] numbers, NaN where unknown; tasks without an entry are unknown altogether.
      families: task name -> family; tasks of one family (near-duplicates) are left out together while features are
        learned. By default, every task is its own.
      candidates: configurations to choose from; None searches the space.
      num_members: of the ensemble that reads features.
      num_steps: outer steps that learn the kernel, and the ensemble.
      max_reference: configurations at which functions are kept; where more were tried, a random choice of them.
      costs: also learn what trials cost, as the logarithm of a record's `cost` up to a factor for each task, for
        `searcher(acquisition="ei_per_cost")`: expected improvement per predicted cost (Snoek et al., 2012).
      key: what everything random follows from; `jax.random.key(0)` by default.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: no record has an outcome, or all outcomes of every task are equal; a candidate does not fit the
        space; features have different lengths, or, like families, are of none of the records' tasks; `costs`, and no
        task has records of different costs.
    """
    base.check_integer("num_members", num_members, 1)
    base.check_integer("num_steps", num_steps, 0)
    base.check_integer("max_reference", max_reference, 2)
    if candidates is not None and not len(candidates):
        raise ValueError("`candidates` must hold a configuration, or be None to search the whole space; it is empty.")
    key = jax.random.key(0) if key is None else key
    kernel_key, attention_key, reference_key = jax.random.split(key, 3)
    encode = encoder(space)
    names, trials = _by_task(records, encode)
    kernel = _fit_kernel(kernel_key, trials, num_steps)
    if candidates is None:
        # What a configuration has for itself can be found out in a finite set alone: in a continuum every new point
        # would promise it, next to the best one too.
        kernel = kernel._replace(logit_smooth=jnp.maximum(kernel.logit_smooth, 5.0))
    known = _features(names, features)
    if families is not None and not any(name in families for name in names):
        raise ValueError(f"`families` has none of the records' tasks, {_some(names)}; its keys are {_some(families)}.")
    surrogate = predictors.surrogate(trials, kernel, _reference(reference_key, trials, max_reference), features=known)
    if known is not None:
        family = [name if families is None else families.get(name, name) for name in names]
        attention = _fit_attention(attention_key, surrogate, family, num_members, num_steps)
        surrogate = surrogate._replace(attention=attention)
    cost_surrogate = None
    if costs:
        trials = _costs_by_task(records, encode)
        kernel = _fit_kernel(jax.random.fold_in(kernel_key, 1), trials, num_steps)
        kernel = kernel._replace(logit_smooth=jnp.maximum(kernel.logit_smooth, 5.0))
        cost_surrogate = predictors.surrogate(trials, kernel, _reference(reference_key, trials, max_reference))
    return meta_optimizer(surrogate, cost_surrogate, space, candidates)


def train_meta_searcher(
    records: Sequence[base.Record],
    *,
    space: base.PyTree,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    **kwargs,
) -> MetaOptimizer:
    """`train_meta_optimizer` over a finite set: architectures of a benchmark, pipelines, configurations already tried.

    Args:
      records: as for `train_meta_optimizer`.
      space: of architectures; `spaces.encode` of it is what the kernel compares.
      candidates: the architectures to choose from; by default, all that are in the records.
      **kwargs: of `train_meta_optimizer`.

    Returns:
      A `MetaOptimizer` whose `predict`, `portfolio` and `searcher` stay among the candidates.

    Raises:
      ValueError: as for `train_meta_optimizer`.
    """
    if candidates is None:
        plain = lambda record: spaces.configuration(
            space, spaces.from_configuration(space, record.configuration, strict=False)
        )
        candidates = list({tuple(sorted(c.items(), key=lambda i: i[0])): c for c in map(plain, records)}.values())
    return train_meta_optimizer(records, space=space, candidates=candidates, **kwargs)


def _by_task(records, encode) -> tuple[list[str], list[predictors.TaskTrials]]:
    """Names of the tasks whose outcomes differ, and their trials."""
    of: dict[str, list[tuple[np.ndarray, float]]] = {}
    for record in records:
        failed = record.status == "FAIL"
        if failed or (record.status == "COMPLETE" and record.fidelity == 1.0):
            y = np.nan if failed or not np.isfinite(record.outcome) else record.outcome
            of.setdefault(record.task, []).append((encode(record.configuration), y))
    of = {name: pairs for name, pairs in of.items() if np.isfinite([y for _, y in pairs]).any()}
    if not of:
        raise ValueError('`records` must hold trials that are "COMPLETE" at fidelity 1; there is none.')
    # One failure and one success differ, too.
    of = {name: pairs for name, pairs in of.items() if len({y if np.isfinite(y) else None for _, y in pairs}) > 1}
    if not of:
        raise ValueError(
            "`records` must hold a task with trials of different outcomes; each has one trial, or one outcome for all, "
            "which says nothing of what is better."
        )
    return list(of), _stacked(of)


def _costs_by_task(records, encode) -> list[predictors.TaskTrials]:
    """Logarithms of costs at the full budget, of the tasks where they differ."""
    of: dict[str, list[tuple[np.ndarray, float]]] = {}
    for record in records:
        if record.status in ("COMPLETE", "FAIL") and record.fidelity == 1.0 and 0 < record.cost < np.inf:
            of.setdefault(record.task, []).append((encode(record.configuration), np.log(record.cost)))
    of = {name: pairs for name, pairs in of.items() if len({y for _, y in pairs}) > 1}
    if not of:
        raise ValueError("`costs=True` needs records with a `cost` in seconds, and a task where they differ.")
    return _stacked(of)


def _stacked(of) -> list[predictors.TaskTrials]:
    return [predictors.TaskTrials(np.stack([x for x, _ in p]), np.array([y for _, y in p])) for p in of.values()]


def _reference(key, trials, max_reference: int) -> np.ndarray:
    """[M, D] configurations that were tried, or a random choice of them."""
    tried = np.unique(np.concatenate([task.x for task in trials]).round(6), axis=0)
    if len(tried) > max_reference:
        tried = tried[np.asarray(jax.random.permutation(key, len(tried)))[:max_reference]]
    return tried


def _features(names, features) -> np.ndarray | None:
    if features is None:
        return None
    if not any(name in features for name in names):
        raise ValueError(f"`features` has none of the records' tasks, {_some(names)}; its keys are {_some(features)}.")
    rows = [np.asarray(features[name], float).ravel() if name in features else None for name in names]
    lengths = sorted({len(row) for row in rows if row is not None})
    if len(lengths) != 1:
        raise ValueError(f"All tasks must have as many `features`; got {lengths}.")
    return np.stack([np.full(lengths[0], np.nan) if row is None else row for row in rows])


def _some(names) -> str:
    """A few of them, so that a mismatch is seen."""
    names = list(names)
    return ", ".join(repr(name) for name in names[:3]) + (" ..." if len(names) > 3 else "") if names else "none"


def _fit_kernel(key, trials, num_steps: int, *, num_tasks: int = 16, num_trials: int = 64) -> predictors.Kernel:
    """By the marginal likelihood of some trials of some tasks at every step."""
    num_dims = trials[0].x.shape[1]
    start = predictors.Kernel(jnp.full(num_dims, -0.5), jnp.array(2.0), jnp.log(jnp.array(0.1)))
    usable = [task for task in trials if np.isfinite(task.y).sum() > 1]
    if not usable or num_dims == 0:
        return start
    size = min(num_trials, max(int(np.isfinite(task.y).sum()) for task in usable))

    def sample_tasks(key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        batch = []
        for s in rng.integers(len(usable), size=num_tasks):
            y, _ = predictors.normalize(usable[s].y)
            rows = rng.permutation(np.flatnonzero(np.isfinite(y)))[:size]
            pad = (0, size - len(rows))
            x = np.pad(usable[s].x[rows], (pad, (0, 0)))
            batch.append((x, np.pad(y[rows] - y[rows].mean(), pad), np.pad(np.ones(len(rows)), pad)))
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.result_type(float)), *batch)

    estimator = hypergrad.direct(lambda kernel, task, key: predictors.kernel_loss(kernel, task))
    learner = training.learner(hypergrad.over_tasks(estimator), optax.adam(0.05))
    fitted = training.fit(learner, sample_tasks, hyperparams=start, num_steps=num_steps, key=key, progress=False)
    return fitted.hyperparams


def _fit_attention(key, surrogate, family, num_members: int, num_steps: int):
    """An ensemble whose members see the families with weights of their own."""
    init_key, boot_key, fit_key = jax.random.split(key, 3)
    _, of = np.unique([str(name) for name in family], return_inverse=True)
    size = np.bincount(of)
    draws = jax.random.exponential(boot_key, (num_members, len(size)))[:, of] / np.sqrt(size)[of][None]
    data = {
        "features": surrogate.features,
        "curves": surrogate.curves,
        "same_family": jnp.asarray(of[:, None] == of[None]),
        "weights": draws / draws.sum(1, keepdims=True),
    }
    start = predictors.init_attention(init_key, num_members, surrogate.features.shape[1])
    if len(size) < 2:
        return predictors.init_attention(init_key, 0, surrogate.features.shape[1])
    estimator = hypergrad.direct(lambda attention, data, key: predictors.attention_loss(attention, data))
    learner = training.learner(estimator, optax.adam(0.05))
    fitted = training.fit(
        learner, lambda key: data, hyperparams=start, num_steps=num_steps, key=fit_key, progress=False
    )
    return fitted.hyperparams
