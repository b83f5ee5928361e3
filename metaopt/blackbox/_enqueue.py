"""Your own configurations before those of a searcher."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from metaopt import base, spaces
from metaopt.blackbox._random_search import seed_of, untried

_OWN_SEEDS = 0x656E7175  # folded into the searcher's key; far above trial numbers, which the searcher folds in


class EnqueuedState(NamedTuple):
    """The state between calls.

    Attributes:
      searcher: the state of the searcher.
      key: the key for the seeds of the enqueued configurations.
      waiting: the enqueued configurations that have not been proposed yet.
      numbers: the searcher's number of a trial -> its number here.
      num_asked: the number of trials so far.
      held: trials that the searcher has already proposed and that come after the waiting configurations.
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
    """Tries your configurations before those of a searcher, at the full budget. The searcher receives their records.

    The argument `first=` of a searcher replaces the configurations that the searcher begins with. `enqueue` keeps them,
    and works with every searcher. The searcher receives the records of enqueued trials before it proposes more trials.
    Therefore a batch of enqueued configurations has no trials of the searcher, and may be smaller than requested. To
    the searcher, these records are those of another search: their trial numbers are negative. If one of the searcher's
    first configurations was enqueued, the searcher does not try it again. Wrap `enqueue` around `blackbox.asha`, not
    the other way round. Inside `blackbox.asha`, enqueued configurations begin at a low fidelity and do not count as
    tried.

    To continue a collection, pass the same enqueued configurations again. To add configurations in the middle of a
    collection, place them `after` its existing trials. The searcher receives the same key, so its earlier trials are
    found in the store.

        records = blackbox.collect(objective, space, named, num_trials=25, searcher=searcher, store=store, key=key)
        more = blackbox.enqueue(searcher, [{"depth": 7}], after=25)
        records = blackbox.collect(objective, space, named, num_trials=50, searcher=more, store=store, key=key)

    Args:
      searcher: any searcher.
      configurations: your configurations, in order; parameters that a configuration lacks get their defaults.
      after: the number of trials of the searcher that come before the configurations. A trial at several fidelities
        counts once. For a store with several tasks, use the largest number of trials of a task. If the searcher ends
        earlier, the configurations follow its last trial.
      skip_if_exists: whether to leave out repeated configurations, and those that a trial has already tried at the full
        budget, whatever its outcome. The name is Optuna's.

    Returns:
      A searcher. Its trials are numbered in the order in which they are proposed.

    Raises:
      ValueError: at the start of a search, if a configuration does not fit the space.

    >>> import jax
    >>> from metaopt import blackbox, spaces
    >>> searcher = blackbox.enqueue(blackbox.random_search(), [{"depth": 2}, {"depth": 7}])
    >>> state = searcher.init(jax.random.key(0), {"depth": spaces.integer(1, 9)})
    >>> trials, state = searcher.ask(state, 3)
    >>> [(trial.trial, trial.configuration["depth"]) for trial in trials]
    [(0, 2), (1, 7)]
    >>> trials, state = searcher.ask(state, 1)
    >>> [(trial.trial, trial.configuration["depth"]) for trial in trials]
    [(2, 5)]
    """

    def init(key, space):
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
            seed = seed_of(state.key, number)
            asked.append(base.Record("", dict(configuration), seed=seed, status="WAITING", trial=number))
        return asked, state._replace(waiting=state.waiting[num:], num_asked=state.num_asked + len(asked))

    def ask_searcher(state, num):
        # Ask for as many trials as without a queue, because the searcher's answer may depend on the number.
        proposed, inner = (state.held, state.searcher) if state.held else searcher.ask(state.searcher, num)
        waiting = untried(state.waiting, proposed) if skip_if_exists else state.waiting
        asked, numbers, num_asked = [], dict(state.numbers), state.num_asked
        for trial in proposed[:num]:
            if trial.trial not in numbers:  # otherwise it was proposed at another fidelity before
                if waiting and num_asked >= after:
                    break
                numbers[trial.trial] = num_asked
                num_asked += 1
            asked.append(trial._replace(trial=numbers[trial.trial]))
        return asked, EnqueuedState(inner, state.key, waiting, numbers, num_asked, tuple(proposed[len(asked) :]))

    def tell(state, records):
        of_searcher = {own: number for number, own in state.numbers.items()}
        negative_number = lambda n: -2 - 2 * n if n >= 0 else 2 * n - 1  # all different, even if `enqueue` is nested
        number_of = lambda record: of_searcher.get(record.trial, negative_number(record.trial))
        renumbered = [record._replace(trial=number_of(record)) for record in records]
        waiting = untried(state.waiting, records) if skip_if_exists else state.waiting
        return state._replace(searcher=searcher.tell(state.searcher, renumbered), waiting=waiting)

    return base.Searcher(init, ask, tell)
