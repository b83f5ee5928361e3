"""Combines several estimators, each for some leaves of λ."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt import base, spaces


class PartitionState(NamedTuple):
    """The state of `partition`.

    Attributes:
      states: the state of each estimator, by label.
      done: [] bool by label: the estimator's horizon has ended, so the next estimate restarts it.
      key: the PRNG key for those restarts.
    """

    states: dict[str, base.EstimatorState]
    done: dict[str, jax.Array]
    key: jax.Array


def partition(
    problem: base.Problem, estimators: Mapping[str, Callable[[base.Problem], base.Estimator]], labels: Any
) -> base.Estimator:
    """Estimates dF/dλ leaf by leaf, with the estimator that suits the leaf: rates by unrolling, penalties implicitly.

    Each estimator sees the problem as a function of only its own leaves. The other leaves are constants with their
    current values. So an implicit rule does not see a learning rate that an unrolled rule handles. The cost is that of
    all estimators together, since each has its own training run.

    Args:
      problem: the problem in all of λ, or in unconstrained coordinates (`spaces.constrain`).
      estimators: label -> a function `problem -> Estimator` for one task, such as
        `lambda problem: hypergrad.unrolled(problem, num_steps=100)`. They are called while an estimate is traced.
      labels: the label of each leaf: a tree of labels that is a prefix of λ, or a function `path -> label`, where the
        path is written as "layers/0/rate".

    Returns:
      An `Estimator`. `value` is that of the first estimator; the others should share its F. The kind is "exact" if all
      estimators are exact. The hypergradient is then that of `value` if they run the same training. Otherwise, the kind
      is the first of "pseudo", "biased" and "unbiased" that one of them has. It is `done` if all estimators are. An
      estimator whose horizon ends earlier restarts on the same task. Metrics: those of each estimator as "label/name",
      and "label/value".

    Raises:
      ValueError: at trace time, if a label has no estimator, or an estimator has no leaf.

    >>> import jax, optax
    >>> from metaopt import base, hypergrad, inner
    >>> loop = inner.loop(
    ...     lambda params, hp, data: (
    ...         (params - data) ** 2 / 2 + hp["penalty"] * params**2 / 2
    ...     ),
    ...     lambda hp: optax.sgd(hp["rate"]),
    ...     init=lambda key, hp, data: jax.numpy.zeros([]),
    ... )
    >>> estimator = hypergrad.partition(
    ...     inner.problem(loop, lambda params, hp, data: (params - data) ** 2),
    ...     {
    ...         "unrolled": lambda problem: hypergrad.unrolled(problem, num_steps=5),
    ...         "implicit": lambda problem: hypergrad.warm_implicit(
    ...             problem, num_steps=5, adjoint_rate=0.5
    ...         ),
    ...     },
    ...     {"rate": "unrolled", "penalty": "implicit"},
    ... )
    >>> lam, task = (
    ...     {"rate": 0.5, "penalty": 0.1},
    ...     base.Task(jax.numpy.array(1.0), jax.numpy.array(0.8)),
    ... )
    >>> estimate, _ = estimator.estimate(
    ...     lam, task, estimator.init(jax.random.key(0), lam, task)
    ... )
    >>> sorted(estimate.hypergrad)
    ['penalty', 'rate']
    """
    rule = _Partition(problem, dict(estimators), labels)
    kinds = {make(problem).kind for make in estimators.values()}
    kind = next((kind for kind in ("pseudo", "biased", "unbiased") if kind in kinds), "exact")

    def init(key, hyperparams, task):
        return _init(rule, key, hyperparams, task)

    def estimate(hyperparams, task, state):
        return _estimate(rule, hyperparams, task, state)

    return base.Estimator(init, estimate, kind)


class _Partition(NamedTuple):
    """The arguments of `partition`."""

    problem: base.Problem
    estimators: dict[str, Callable[[base.Problem], base.Estimator]]
    labels: Any


def _leaf_labels(rule: _Partition, hyperparams: base.HyperParams) -> list[Any]:
    """The label of each leaf of λ."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(hyperparams)]
    if callable(rule.labels):
        leaf_labels = [rule.labels(jax.tree_util.keystr(path, simple=True, separator="/")) for path in paths]
    else:
        unmarked = hyperparams.coordinates if isinstance(hyperparams, spaces.Unconstrained) else hyperparams
        tree = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), rule.labels, unmarked)
        leaf_labels = jax.tree.leaves(tree)
    if set(leaf_labels) != set(rule.estimators):
        raise ValueError(
            "`labels` and `estimators` must have the same labels; the leaves of λ have "
            f"{sorted(set(map(str, leaf_labels)))}, and the estimators {sorted(rule.estimators)}."
        )
    return leaf_labels


def _parts(rule: _Partition, hyperparams: base.HyperParams) -> Iterator[tuple[str, base.Estimator, base.HyperParams]]:
    """For every label: its estimator, and λ with only its leaves and None in place of the others."""
    leaves, structure = jax.tree.flatten(hyperparams)
    labeled = list(zip(_leaf_labels(rule, hyperparams), leaves, strict=True))

    def complete(label, own):
        own = iter(jax.tree.leaves(own))
        return structure.unflatten([next(own) if name == label else x for name, x in labeled])

    for label, make in rule.estimators.items():
        restricted = base.reparametrized(rule.problem, lambda own, step, label=label: complete(label, own))
        own = structure.unflatten([x if name == label else None for name, x in labeled])
        yield label, make(restricted), own


def _init(rule: _Partition, key: jax.Array, hyperparams: base.HyperParams, task: base.Task) -> PartitionState:
    start_key, key = jax.random.split(key)
    # All estimators get one key: rules that train from the same key see the same F.
    states = {label: estimator.init(start_key, own, task) for label, estimator, own in _parts(rule, hyperparams)}
    return PartitionState(states, {label: jnp.array(False) for label in rule.estimators}, key)


def _estimate(
    rule: _Partition, hyperparams: base.HyperParams, task: base.Task, state: PartitionState
) -> tuple[base.Estimate, PartitionState]:
    start_key, key = jax.random.split(state.key)
    estimates, states = {}, {}
    for label, estimator, own in _parts(rule, hyperparams):
        carried = jax.lax.cond(
            state.done[label],
            lambda estimator=estimator, own=own: estimator.init(start_key, own, task),
            lambda label=label: state.states[label],
        )
        estimates[label], states[label] = estimator.estimate(own, task, carried)
    own = {label: iter(jax.tree.leaves(each.hypergrad)) for label, each in estimates.items()}
    structure = jax.tree.structure(hyperparams)
    hypergrad = structure.unflatten([next(own[label]) for label in _leaf_labels(rule, hyperparams)])
    metrics = {
        f"{label}/{name}": metric
        for label, each in estimates.items()
        for name, metric in {"value": each.value, **each.metrics}.items()
    }
    done = {label: each.done for label, each in estimates.items()}
    first = estimates[next(iter(rule.estimators))]
    all_done = jnp.all(jnp.stack(list(done.values())))
    return base.Estimate(first.value, hypergrad, all_done, metrics), PartitionState(states, done, key)
