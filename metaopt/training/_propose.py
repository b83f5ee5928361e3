"""Proposals: train with several λ around a predicted one, and keep the best by validation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, _proposals, _tuned_space, base, spaces
from metaopt.training import _learner


class Proposed(NamedTuple):
    """The result of `propose`.

    Attributes:
      hyperparams: the candidate λ with the smallest outer loss. It is in natural units if `propose` was given `space`,
        and otherwise in the units of the start.
      value: [] the outer loss of this λ.
      index: [] int32, its place in `values`; 0 is the start.
      values: [rounds · num_proposals] the outer loss of every candidate, one round after another.
    """

    hyperparams: base.HyperParams
    value: jax.Array
    index: jax.Array
    values: jax.Array


def propose(
    estimator: base.Estimator,
    *,
    num_proposals: int = 10,
    spread: float | jax.Array | base.PyTree | None = None,
    rounds: int = 1,
    space: base.PyTree | None = None,
    chunk: int | None = None,
) -> Callable[[jax.Array, base.HyperParams, base.Task], Proposed]:
    """Makes a function that trains with K values of λ around the start, and returns the best by validation loss.

        λ_1 = λ,    λ_k = λ + spread · ε_k,  ε_k ~ N(0, I),    λ* = argmin_{k ≤ K} F(λ_k)

    Start from λ in natural units, or from a prediction g(t') = `predictor.apply(meta_params, task)`. The first
    candidate is the start itself. The cost is K training runs without a hypergradient, in one program. The returned
    function is pure: jit it, and vmap it over tasks that each have their own λ.

    All candidates share one key: the same initialization, the same order of the data and the same noise. These common
    random numbers remove much of the noise from the comparison. The smallest of K values is still an optimistic
    estimate of the outer loss, so evaluate the result on other data.

    Later rounds read the values of the earlier ones. Each round has K more training runs, under the same key. Its first
    candidate is a weighted mean m of the better half of the last round's candidates, with the weights
    w_i ∝ log(⌊K/2⌋ + ½) − log i of the i-th best. The others are drawn around m. The squared spread of each coordinate
    becomes the mean of its old value and of the weighted variance Σ_i w_i (λ_i − m)². This is the cross-entropy method
    with the weights of CMA-ES, and a smoothing of ½.

    `fine_tune` uses hypergradients instead. Both can be combined: pass `hyperparams` of one result to the other.

    Args:
      estimator: the estimator for one task. Make it from `spaces.constrain(problem, space)`, so that every candidate
        lies inside its space. Only the `value` of its first estimate from a fresh start is used. For a rule that
        carries training between estimates, this is F after its first window, so use a rule of whole runs such as
        `hypergrad.unrolled`. With `hypergrad.over_seeds(rule, S)`, each candidate is the mean of S runs. With
        `hypergrad.over_tasks(rule)`, one λ is chosen for a batch of tasks.
      num_proposals: K, at least 1; 1 returns the start.
      spread: the standard deviation of a draw, in the estimator's coordinates: a number, or a tree like the start. The
        leaves of the tree are numbers or arrays, finite and at least 0, and None for fixed leaves. They may be traced.
        By default, it is the spread of the prediction if its predictor was made with `spread`, and otherwise 0.5.
      rounds: the number of rounds, at least 1; K · rounds runs in all.
      space: the space of λ. A start in natural units is converted to the estimator's coordinates, and the result is in
        natural units. Without it, the start must be in the estimator's coordinates, and the result is in them too.
      chunk: the number of runs that train at once, by vmap. By default all K do, with the memory of K runs.

    Returns:
      `(key, hyperparams, task) -> Proposed`. Its fields are `hyperparams`, the candidate with the smallest F; `value`
      [], its F; `values` [rounds · K], F of every candidate, round by round; and `index` [], the place of `value` in
      `values`, where 0 is the start. A λ with non-finite F is the best only if F is finite nowhere; then it is the
      start. If F is a mean over tasks or seeds, a λ with more non-finite tasks or seeds than another λ is not the best.
      Of equal values the first one is the best.

    Raises:
      ValueError: if the task has labels outside its classes, or a number of `spread` that is not traced is negative,
        infinite or NaN.
      ValueError: at trace time, if the start does not fit `space`, or `spread` does not fit the start.
      ValueError: at trace time, if `space` is not the problem's. Also if `space` is missing, the start is in natural
        units, and the estimator takes unconstrained coordinates.

    Source: Rubinstein, The cross-entropy method, 1999, https://doi.org/10.1023/A:1010091220143; for the weights,
      Hansen, The CMA evolution strategy: a tutorial, 2016, https://arxiv.org/abs/1604.00772 (without negative weights).
    """
    _proposals.check_spread(spread)

    def evaluate(key, candidates, task):
        return _proposals.values(estimator, key, candidates, task, chunk)

    def propose_for(key, hyperparams, task):
        _checks.check_task_labels("task", task)  # else every F is NaN, and the start is the best
        run_key, draw_key = jax.random.split(_checks.checked_key(key))
        normal = _start(space, hyperparams, spread)

        def one_round(normal, round_key):
            noise = _proposals.noise(round_key, normal.center, num_proposals)
            candidates = _proposals.candidates(normal, noise)
            values, excluded = evaluate(run_key, candidates, task)
            ranked = _proposals.ranked(values, excluded)
            return _updated(normal, candidates, ranked), (candidates, values, excluded)

        with _tuned_space.recording(evaluate):
            _, rounds_of = jax.lax.scan(one_round, normal, jax.random.split(draw_key, rounds))
        _tuned_space.check(evaluate, space)
        candidates, values, excluded = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rounds_of)
        index = jnp.argmin(_proposals.ranked(values, excluded)).astype(jnp.int32)
        best = jax.tree.map(lambda x: x[index], candidates)
        best = best if space is None else spaces.to_constrained(space, best)
        return Proposed(best, values[index], index, values)

    return propose_for


def _start(space: base.PyTree | None, hyperparams: base.HyperParams, spread: base.PyTree | None) -> _proposals.Normal:
    """The normal of the first round, in the estimator's coordinates."""
    if isinstance(hyperparams, _proposals.Normal):
        hyperparams, predicted = hyperparams
        spread = predicted if spread is None else spread
    elif space is not None and not isinstance(hyperparams, spaces.Unconstrained):
        hyperparams = spaces.to_unconstrained(space, hyperparams)
    spread = 0.5 if spread is None else spread
    if isinstance(hyperparams, spaces.Unconstrained) and isinstance(spread, type(hyperparams.coordinates)):
        spread = spaces.Unconstrained(spread)  # a tree like the space
    center = _learner.check_hyperparams(hyperparams)
    return _proposals.Normal(center, _proposals.spread_like(center, spread))


def _updated(normal: _proposals.Normal, candidates: base.HyperParams, values: jax.Array) -> _proposals.Normal:
    """The normal of the next round: weighted moments of the better half, by the ranked values [K] of the candidates."""
    num_best = max(len(values) // 2, 1)
    best = jnp.argsort(values)[:num_best]
    weights = jnp.asarray(np.log(num_best + 0.5) - np.log(np.arange(1, num_best + 1)), values.dtype)
    weights = jnp.where(jnp.isfinite(values[best]), weights, 0)
    total = weights.sum()

    def moments(center, spread, candidates):
        share = (weights / jnp.where(total > 0, total, 1)).astype(center.dtype)
        mean = jnp.tensordot(share, candidates[best], 1)
        variance = jnp.tensordot(share, jnp.square(candidates[best] - mean[None]), 1)
        new_spread = jnp.sqrt((jnp.square(spread) + variance) / 2)
        return jnp.where(total > 0, mean, center), jnp.where(total > 0, new_spread, spread)

    pairs = jax.tree.map(moments, normal.center, normal.spread, candidates)
    outer, inner = jax.tree.structure(normal.center), jax.tree.structure((0, 0))
    return _proposals.Normal(*jax.tree.transpose(outer, inner, pairs))
