"""Regularized evolution, the baseline of architecture search, over a space of integers."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from metaopt import base, spaces


class EvolutionState(NamedTuple):
    """Carried from one call to the next.

    Attributes:
      seed: of the search; what a trial draws follows from it, the trial's number and what has been told.
      space: what is searched.
      population: (configuration, outcome) of the newest trials, oldest first.
      num_asked: how many trials have been asked for.
    """

    seed: tuple[int, ...]
    space: dict[str, spaces.Integer]
    population: tuple
    num_asked: int


def regularized_evolution(*, population_size: int = 100, sample_size: int = 25) -> base.Searcher:
    """Regularized (aging) evolution: the best of a few of the population has a child, and the oldest dies.

    The first `population_size` trials are random. Then a child is the best of `sample_size` members, drawn with
    replacement, with one entry changed to another value, each alike. Trials without a finite outcome do not enter.

    Args:
      population_size: at least 1.
      sample_size: at least 1.

    Returns:
      A searcher of a dict of `spaces.integer`, whose values are taken as categories.

    Raises:
      ValueError: a size is below 1; in `init`, the space is another.

    Source: Real et al., AAAI 2019, https://arxiv.org/abs/1802.01548

    >>> import jax
    >>> from metaopt import methods, spaces
    >>> searcher = methods.regularized_evolution(population_size=2, sample_size=1)
    >>> state = searcher.init(jax.random.key(0), {"edge0": spaces.integer(0, 4), "edge1": spaces.integer(0, 4)})
    >>> trials, state = searcher.ask(state, 2)
    >>> state = searcher.tell(state, [trial._replace(outcome=0.1, status="COMPLETE") for trial in trials])
    >>> (child,), state = searcher.ask(state, 1)
    >>> sorted(child.configuration), child.trial
    (['edge0', 'edge1'], 2)
    """
    base.check_integer("population_size", population_size, 1)
    base.check_integer("sample_size", sample_size, 1)

    def init(key, space):
        if not isinstance(space, dict) or not all(isinstance(leaf, spaces.Integer) for leaf in space.values()):
            raise ValueError(
                "`regularized_evolution` searches a dict of `spaces.integer` leaves; got another space. Leave out what "
                "has one value (`spaces.fixed`), and add it to what the searcher asks for."
            )
        shaped = [name for name, leaf in space.items() if leaf.shape]
        if shaped or not space:
            raise ValueError(
                f"`regularized_evolution` changes one number at a time: it needs at least one `spaces.integer`, and "
                f"they have no `shape`; got {f'a shape of {shaped[0]!r}' if shaped else 'an empty space'}. Give every "
                "entry a leaf of its own."
            )
        seed = tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
        return EvolutionState(seed, dict(space), (), 0)

    def propose(rng, state):
        names = list(state.space)
        lows = [leaf.low for leaf in state.space.values()]
        sizes = [leaf.high - leaf.low + 1 for leaf in state.space.values()]
        if state.num_asked < population_size or not state.population:
            return {name: low + int(rng.integers(size)) for name, low, size in zip(names, lows, sizes, strict=True)}
        drawn = rng.integers(len(state.population), size=sample_size)
        parent, _ = min((state.population[i] for i in drawn), key=lambda member: member[1])
        i = int(rng.integers(len(names)))  # `spaces.integer` has at least two values
        # Another value than the parent's: a step around the circle of values.
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
        population = deque(state.population, maxlen=population_size)
        for record in records:
            if record.status == "COMPLETE" and np.isfinite(record.outcome):
                population.append((record.configuration, record.outcome))
        return state._replace(population=tuple(population))

    return base.Searcher(init, ask, tell)
