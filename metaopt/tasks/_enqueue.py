"""Configurations of one's own before those of a searcher."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from metaopt import base, spaces


class EnqueuedState(NamedTuple):
    """Carried from one call to the next.

    Attributes:
      searcher: the state of the searcher.
      key: of the seeds of configurations of one's own.
      waiting: configurations that have not been asked for.
      numbers: the searcher's number of a trial -> its number here.
      num_asked: how many trials there are.
    """

    searcher: Any
    key: jax.Array
    waiting: tuple[dict[str, Any], ...]
    numbers: dict[int, int]
    num_asked: int


def enqueue(searcher: base.Searcher, configurations: Sequence[Mapping[str, Any]]) -> base.Searcher:
    """Tries some configurations first, at the full budget, and tells any searcher what came of them.

    `first=` of a searcher replaces what it begins with; this stands before it, is there for every searcher, and is not
    part of one: a searcher hears of these trials as of others' (under numbers of their own, below 0). In a collection,
    they are part of what must stay the same for it to go on.

    Args:
      searcher: any.
      configurations: in order; what one lacks is at its default.

    Returns:
      A searcher, whose trials are numbered in the order in which they are asked for.

    Raises:
      ValueError: when a search starts, a configuration does not fit the space, or no space is given.

    >>> import jax
    >>> from metaopt import spaces, tasks
    >>> searcher = tasks.enqueue(tasks.random_search(), [{"depth": 2}, {"depth": 7}])
    >>> state = searcher.init(jax.random.key(0), {"depth": spaces.integer(1, 9)})
    >>> trials, state = searcher.ask(state, 3)
    >>> [(trial.trial, trial.configuration["depth"]) for trial in trials]
    [(0, 2), (1, 7), (2, 5)]
    """
    if isinstance(configurations, Mapping):
        raise ValueError("`configurations` must be a list of configurations; got one: put it into a list.")

    def init(key, space):
        if space is None:
            raise ValueError("`init` needs the space here, to complete what was enqueued; got None.")
        searcher_key, key = jax.random.split(key)
        whole = tuple(spaces.complete(space, configuration) for configuration in configurations)
        return EnqueuedState(searcher.init(searcher_key, space), key, whole, {}, 0)

    def ask(state, num):
        asked, numbers = [], dict(state.numbers)
        for number, configuration in enumerate(state.waiting[:num], state.num_asked):
            seed = int(jax.random.randint(jax.random.fold_in(state.key, number), (), 0, 2**31 - 1))
            asked.append(base.Record("", dict(configuration), seed=seed, status="WAITING", trial=number))
        num_asked, inner = state.num_asked + len(asked), state.searcher
        if len(asked) < num:
            others, inner = searcher.ask(inner, num - len(asked))
            for trial in others:
                if trial.trial not in numbers:  # it may have been asked for at another fidelity
                    numbers[trial.trial] = num_asked
                    num_asked += 1
                asked.append(trial._replace(trial=numbers[trial.trial]))
        waiting = state.waiting[num:]
        return asked, state._replace(searcher=inner, waiting=waiting, numbers=numbers, num_asked=num_asked)

    def tell(state, records):
        of_searcher = {here: there for there, here in state.numbers.items()}
        below = lambda n: -2 - 2 * n if n >= 0 else 2 * n - 1  # no two alike, whatever enqueues within
        heard = [record._replace(trial=of_searcher.get(record.trial, below(record.trial))) for record in records]
        return state._replace(searcher=searcher.tell(state.searcher, heard))

    return base.Searcher(init, ask, tell)
