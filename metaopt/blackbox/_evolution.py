"""Regularized evolution, a baseline for architecture search, over a space of integers."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from metaopt import _checks, base, spaces


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
    children: the best of `sample_size` members, drawn with replacement, with one entry changed. All entries that are
    not fixed, and all their other values, are equally likely.
    Trials without a finite outcome, and others' trials outside the space, do not enter the population.

    Each fidelity has its own population, because losses at different fidelities are not comparable. Parents come from
    the highest fidelity whose population has `sample_size` members (or `population_size`, if that is smaller). Until
    one has, they come from the largest population. `asha` around this searcher therefore begins with children of
    configurations that were good after a short training.

    Args:
      population_size: at least 1.
      sample_size: at least 1.

    Returns:
      A searcher over a dict of `spaces.integer`, whose values are treated as categories, and `spaces.fixed`.

    Raises:
      ValueError: if a size is below 1; in `init`, if the space is not such a dict.

    Source: Real et al., AAAI 2019, https://arxiv.org/abs/1802.01548

    >>> import jax
    >>> from metaopt import blackbox, spaces
    >>> searcher = blackbox.regularized_evolution(population_size=2, sample_size=1)
    >>> state = searcher.init(jax.random.key(0), {"edge0": spaces.integer(0, 4), "edge1": spaces.integer(0, 4)})
    >>> trials, state = searcher.ask(state, 2)
    >>> state = searcher.tell(state, [trial._replace(outcome=0.1, status="COMPLETE") for trial in trials])
    >>> (child,), state = searcher.ask(state, 1)
    >>> sorted(child.configuration), child.trial
    (['edge0', 'edge1'], 2)
    """
    _checks.check_integer("population_size", population_size, 1)
    _checks.check_integer("sample_size", sample_size, 1)

    def init(key, space):
        known = (spaces.Integer, spaces.Fixed)
        if not isinstance(space, dict) or not all(isinstance(leaf, known) for leaf in space.values()):
            raise ValueError(
                "`regularized_evolution` searches a dict of `spaces.integer` and `spaces.fixed`; got another space."
            )
        if shaped := [name for name, leaf in space.items() if leaf.shape]:
            raise ValueError(
                f"`regularized_evolution` searches integers without shape; `{shaped[0]}` has shape "
                f"{space[shaped[0]].shape}: write one leaf for each of its entries."
            )
        seed = tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
        return EvolutionState(seed, dict(space), {}, 0)

    def parents(populations):
        enough = min(sample_size, population_size)
        of = max(populations, key=lambda fidelity: (min(len(populations[fidelity]), enough), fidelity))
        return populations[of]

    def propose(rng, state):
        free = {name: leaf for name, leaf in state.space.items() if isinstance(leaf, spaces.Integer)}
        names, lows = list(free), [leaf.low for leaf in free.values()]
        sizes = [leaf.high - leaf.low + 1 for leaf in free.values()]
        if state.num_asked < population_size or not state.populations:
            drawn = {name: low + int(rng.integers(size)) for name, low, size in zip(names, lows, sizes, strict=True)}
            return {name: drawn[name] if name in drawn else leaf.value.item() for name, leaf in state.space.items()}
        population = parents(state.populations)
        drawn = rng.integers(len(population), size=sample_size)
        parent, _ = min((population[i] for i in drawn), key=lambda member: member[1])
        if not free:
            return dict(parent)
        i = int(rng.integers(len(names)))
        # A step around the circle of values never returns the parent's value.
        value = (parent[names[i]] - lows[i] + 1 + int(rng.integers(sizes[i] - 1))) % sizes[i] + lows[i]
        return {**parent, names[i]: value}

    def ask(state, num):
        trials = []
        for _ in range(num):
            rng = np.random.default_rng((*state.seed, state.num_asked))
            configuration = propose(rng, state)
            seed = int(rng.integers(2**31))
            trials.append(base.Record("", configuration, seed=seed, status="WAITING", trial=state.num_asked))
            state = state._replace(num_asked=state.num_asked + 1)
        return trials, state

    def tell(state, records: Sequence[base.Record]):
        populations = {fidelity: deque(members, population_size) for fidelity, members in state.populations.items()}
        for record in records:
            counts = record.status == "COMPLETE" and np.isfinite(record.outcome)
            if counts and _fits(state.space, record.configuration):
                own = populations.setdefault(record.fidelity, deque(maxlen=population_size))
                own.append((record.configuration, record.outcome))
        return state._replace(populations={fidelity: tuple(members) for fidelity, members in populations.items()})

    return base.Searcher(init, ask, tell)


def _fits(space, configuration) -> bool:
    """Returns whether a child of `configuration` would be in the space."""
    return configuration.keys() == space.keys() and not spaces.foreign(space, configuration)
