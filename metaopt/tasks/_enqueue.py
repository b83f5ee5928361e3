"""Configurations of one's own before those of a searcher."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from metaopt import base, spaces
from metaopt.tasks._random_search import untried

_OWN_SEEDS = 0x656E7175  # folded into the searcher's key, which folds in the numbers of its trials


class EnqueuedState(NamedTuple):
    """Carried from one call to the next.

    Attributes:
      searcher: the state of the searcher.
      key: of the seeds of configurations of one's own.
      waiting: configurations that have not been asked for.
      numbers: the searcher's number of a trial -> its number here.
      num_asked: how many trials there are.
      held: trials that the searcher has asked for, which come after what is waiting.
    """

    searcher: Any
    key: jax.Array
    waiting: tuple[dict[str, Any], ...]
    numbers: dict[int, int]
    num_asked: int
    held: tuple[base.Record, ...]


def enqueue(
    searcher: base.Searcher,
    configurations: Sequence[Mapping[str, Any]],
    *,
    after: int = 0,
    skip_if_exists: bool = False,
) -> base.Searcher:
    """Tries some configurations first, at the full budget, and tells any searcher what came of them.

    `first=` of a searcher replaces what it begins with; this stands before it, is there for every searcher, and is not
    part of one: a searcher hears of these trials as of others' (under numbers of their own, below 0) before it is asked
    for more, and does not try what it begins with again if it was among them. So they are asked for by themselves: a
    batch is not filled up with the searcher's. It stands around `methods.asha`, not within it: there, what is queued
    begins at a low fidelity, and does not count as tried.

    In a collection, they are part of what must stay the same for it to go on. What is to be tried in the middle of one
    comes `after` the trials that it has: the searcher is given the same key, so that these are found in the store.

        records = tasks.collect(objective, space, named, num_trials=25, searcher=searcher, store=store, key=key)
        more = tasks.enqueue(searcher, [{"depth": 7}], after=25)
        records = tasks.collect(objective, space, named, num_trials=50, searcher=more, store=store, key=key)

    Args:
      searcher: any.
      configurations: in order; what one lacks is at its default.
      after: how many trials of the searcher come before them (in a store, of the task that has the most of them); a
        trial at several fidelities is one. A searcher that ends earlier is followed by them.
      skip_if_exists: whether to leave out what a trial at the full budget has tried before, whatever came of it, and
        what comes twice; the name is Optuna's.

    Returns:
      A searcher, whose trials are numbered in the order in which they are asked for.

    Raises:
      ValueError: `searcher` is none; `after` is no integer of at least 0; when a search starts, a configuration does
        not fit the space, or no space is given.

    >>> import jax
    >>> from metaopt import spaces, tasks
    >>> searcher = tasks.enqueue(tasks.random_search(), [{"depth": 2}, {"depth": 7}])
    >>> state = searcher.init(jax.random.key(0), {"depth": spaces.integer(1, 9)})
    >>> trials, state = searcher.ask(state, 3)
    >>> [(trial.trial, trial.configuration["depth"]) for trial in trials]
    [(0, 2), (1, 7)]
    >>> trials, state = searcher.ask(state, 1)
    >>> [(trial.trial, trial.configuration["depth"]) for trial in trials]
    [(2, 5)]
    """
    if isinstance(configurations, Mapping):
        raise ValueError("`configurations` must be a list of configurations; got one: put it into a list.")
    base.check_searcher(searcher)
    base.check_integer("after", after, 0)

    def init(key, space):
        if space is None:
            raise ValueError("`init` needs the space here, to complete what was enqueued; got None.")
        whole = tuple(spaces.complete(space, configuration) for configuration in configurations)
        if skip_if_exists:
            whole = tuple(c for i, c in enumerate(whole) if c not in whole[:i])
        inner = searcher.init(key, space)
        own_key = jax.random.fold_in(inner.key if isinstance(inner, EnqueuedState) else key, _OWN_SEEDS)
        return EnqueuedState(inner, own_key, whole, {}, 0, ())

    def ask(state, num):
        if not state.waiting or state.num_asked < after:
            asked, state = ask_searcher(state, num)
            if asked or not state.waiting:
                return asked, state
        asked = []
        for number, configuration in enumerate(state.waiting[:num], state.num_asked):
            seed = int(jax.random.randint(jax.random.fold_in(state.key, number), (), 0, 2**31 - 1))
            asked.append(base.Record("", dict(configuration), seed=seed, status="WAITING", trial=number))
        return asked, state._replace(waiting=state.waiting[num:], num_asked=state.num_asked + len(asked))

    def ask_searcher(state, num):
        # It is asked for as many as without a queue: what it answers may depend on that.
        others, inner = (state.held, state.searcher) if state.held else searcher.ask(state.searcher, num)
        waiting = untried(state.waiting, others) if skip_if_exists else state.waiting
        asked, numbers, num_asked = [], dict(state.numbers), state.num_asked
        for trial in others[:num]:
            if trial.trial not in numbers:  # it may have been asked for at another fidelity
                if waiting and num_asked >= after:
                    break
                numbers[trial.trial] = num_asked
                num_asked += 1
            asked.append(trial._replace(trial=numbers[trial.trial]))
        return asked, EnqueuedState(inner, state.key, waiting, numbers, num_asked, tuple(others[len(asked) :]))

    def tell(state, records):
        of_searcher = {here: there for there, here in state.numbers.items()}
        below = lambda n: -2 - 2 * n if n >= 0 else 2 * n - 1  # no two alike, whatever enqueues within
        heard = [record._replace(trial=of_searcher.get(record.trial, below(record.trial))) for record in records]
        waiting = untried(state.waiting, records) if skip_if_exists else state.waiting
        return state._replace(searcher=searcher.tell(state.searcher, heard), waiting=waiting)

    return base.Searcher(init, ask, tell)
