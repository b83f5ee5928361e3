"""Regularized evolution, a baseline for architecture search, over a space of integers."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import base, spaces
from metaopt.blackbox import _misfits


class EvolutionState(NamedTuple):
    """State carried from one call to the next.

    Attributes:
      seed: the seed of the search. Together with the trial's number and the reported outcomes, it determines a trial.
      space: the search space.
      populations: fidelity -> (configuration, outcome) of its newest trials, oldest first.
      num_asked: number of trials that have been asked for.
    """

    seed: tuple[int, ...]
    space: dict[str, spaces.Integer | spaces.Fixed]
    populations: dict[float, tuple]
    num_asked: int


def regularized_evolution(*, population_size: int = 100, sample_size: int = 25) -> base.Searcher:
    """Regularized (aging) evolution: the best of a few members of the population has a child, and the oldest dies.

    The first `population_size` trials are random, and so are later trials while the population is empty. All others are
    children: `sample_size` members are drawn with replacement, and the child is a copy of the best of them with one
    entry changed. This entry is drawn uniformly among those that are not fixed, and so is its new value. Trials without
    a finite outcome, and trials of other searches that lie outside the space, do not enter the population. The log
    warns of the latter.

    Each fidelity has its own population, because losses at different fidelities are not comparable. Parents come from
    the highest fidelity whose population has `sample_size` members (or `population_size`, if that is smaller). While no
    population has that many, parents come from the largest one. `asha` around this searcher therefore begins with
    children of configurations that were good after a short training.

    Args:
      population_size: the largest number of members, at least 1.
      sample_size: the number of members among which a parent is chosen, at least 1.

    Returns:
      A searcher over a dict of `spaces.integer`, whose values are treated as categories, and `spaces.fixed`.

    Raises:
      ValueError: in `init`, if the space is not such a dict.

    Source: Real et al., AAAI 2019, https://arxiv.org/abs/1802.01548

    >>> import jax
    >>> from metaopt import blackbox, spaces
    >>> searcher = blackbox.regularized_evolution(population_size=2, sample_size=1)
    >>> state = searcher.init(
    ...     jax.random.key(0),
    ...     {"edge0": spaces.integer(0, 4), "edge1": spaces.integer(0, 4)},
    ... )
    >>> trials, state = searcher.ask(state, 2)
    >>> state = searcher.tell(
    ...     state, [trial._replace(outcome=0.1, status="COMPLETE") for trial in trials]
    ... )
    >>> (child,), state = searcher.ask(state, 1)
    >>> sorted(child.configuration), child.trial
    (['edge0', 'edge1'], 2)
    """
    sizes = _Sizes(population_size, sample_size)
    return base.Searcher(
        init=_init,
        ask=lambda state, num: _ask(sizes, state, num),
        tell=lambda state, records: _tell(sizes, state, records),
    )


class _Sizes(NamedTuple):
    population: int
    sample: int


def _init(key: jax.Array, space: base.PyTree) -> EvolutionState:
    if not isinstance(space, dict) or not all(isinstance(leaf, spaces.Leaf) for leaf in space.values()):
        raise ValueError(
            f"`regularized_evolution` searches a dict of `spaces.integer` and `spaces.fixed`; got {space!r}."
        )
    for name, leaf in space.items():
        integer = isinstance(leaf, (spaces.Integer, spaces.Fixed))
        if not integer or leaf.shape:
            advice = "Write one leaf for each entry of an array." if integer else "Use `tpe` for other leaves."
            raise ValueError(
                "`regularized_evolution` searches a dict of `spaces.integer` and `spaces.fixed` without shape; got "
                f"`{name}`, a `spaces.{leaf.kind}`{f' of shape {leaf.shape}' if leaf.shape else ''}. {advice}"
            )
    seed = tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
    return EvolutionState(seed, dict(space), {}, 0)


def _ask(sizes: _Sizes, state: EvolutionState, num: int) -> tuple[list[base.Record], EvolutionState]:
    trials = []
    for _ in range(num):
        rng = np.random.default_rng((*state.seed, state.num_asked))
        random = state.num_asked < sizes.population or not state.populations
        configuration = _random(rng, state.space) if random else _child(sizes, rng, state)
        seed = int(rng.integers(2**31))
        trials.append(base.Record("", configuration, seed=seed, status="WAITING", trial=state.num_asked))
        state = state._replace(num_asked=state.num_asked + 1)
    return trials, state


def _random(rng: np.random.Generator, space: dict[str, spaces.Integer | spaces.Fixed]) -> dict[str, Any]:
    return {
        name: leaf.low + int(rng.integers(leaf.high - leaf.low + 1))
        if isinstance(leaf, spaces.Integer)
        else leaf.value.item()
        for name, leaf in space.items()
    }


def _child(sizes: _Sizes, rng: np.random.Generator, state: EvolutionState) -> dict[str, Any]:
    enough = min(sizes.sample, sizes.population)
    populations = state.populations
    fidelity = max(populations, key=lambda fidelity: (min(len(populations[fidelity]), enough), fidelity))
    drawn = rng.integers(len(populations[fidelity]), size=sizes.sample)
    parent, _ = min((populations[fidelity][i] for i in drawn), key=lambda member: member[1])
    free = [(name, leaf) for name, leaf in state.space.items() if isinstance(leaf, spaces.Integer)]
    if not free:
        return dict(parent)
    name, leaf = free[int(rng.integers(len(free)))]
    size = leaf.high - leaf.low + 1
    # A step around the circle of values never returns the parent's value.
    value = (parent[name] - leaf.low + 1 + int(rng.integers(size - 1))) % size + leaf.low
    return {**parent, name: value}


def _tell(sizes: _Sizes, state: EvolutionState, records: Sequence[base.Record]) -> EvolutionState:
    populations = {fidelity: deque(members, sizes.population) for fidelity, members in state.populations.items()}
    reasons = []
    for record in records:
        if record.status != "COMPLETE" or not np.isfinite(record.outcome):
            continue
        if reason := _misfit(state.space, record.configuration):
            reasons.append(reason)
        else:
            own = populations.setdefault(record.fidelity, deque(maxlen=sizes.population))
            own.append((record.configuration, record.outcome))
    _misfits.log_misfits(reasons, len(records), "They are not used.")
    return state._replace(populations={fidelity: tuple(members) for fidelity, members in populations.items()})


def _misfit(space, configuration) -> str:
    """Returns "" if `configuration`, and therefore each child of it, is in the space; otherwise the reason."""
    if reason := _misfits.misfit(space, configuration):
        return reason
    for name, leaf in space.items():
        if name not in configuration:
            return f"The configuration lacks `{name}`."
        if isinstance(leaf, spaces.Fixed):
            if reason := _misfits.wrong_fixed(name, configuration[name], leaf.value.item()):
                return reason
    return ""
