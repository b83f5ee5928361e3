"""Random search, from the distributions of the space."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from metaopt import base, spaces
from metaopt.blackbox import _fidelities


class RandomSearchState(NamedTuple):
    """The state between calls.

    Attributes:
      key: the key of the search; the key of a trial is folded from it and the trial's number.
      space: the search space.
      first: the configurations of the first trials.
      num_asked: the number of trials that the search has proposed.
    """

    key: jax.Array
    space: base.PyTree
    first: list[dict[str, Any]]
    num_asked: int


def random_search(*, first: Sequence[Mapping[str, Any]] | None = None) -> base.Searcher:
    """Draws every configuration independently, as `spaces.sample` does, after a few given ones.

    A drawn configuration depends only on the key and the number of the trial. It does not depend on outcomes, or on the
    number of trials per call.

    Args:
      first: configurations to try first; parameters that one lacks get their defaults. By default, the default of the
        space. A configuration is skipped if `tell` has received a full-budget record of it from another search.

    Returns:
      A searcher.

    >>> import jax
    >>> from metaopt import blackbox, spaces
    >>> searcher = blackbox.random_search()
    >>> state = searcher.init(jax.random.key(0), {"depth": spaces.integer(1, 9)})
    >>> trials, state = searcher.ask(state, 3)
    >>> trials[0].configuration, [trial.trial for trial in trials]
    ({'depth': 5}, [0, 1, 2])
    """

    def init(key, space):
        return RandomSearchState(key, space, complete(space, first), 0)

    def ask(state, num):
        leaves, treedef = jax.tree.flatten(state.space)
        draw = _draw_fn(tuple(leaves), treedef)
        trials = []
        for trial in range(state.num_asked, state.num_asked + num):
            drawn, seed = draw(state.key, trial)
            is_first = trial < len(state.first)
            configuration = state.first[trial] if is_first else spaces.configuration(state.space, drawn)
            trials.append(base.Record("", configuration, seed=int(seed), status="WAITING", trial=trial))
        return trials, state._replace(num_asked=state.num_asked + num)

    def tell(state, records):
        begun, left = state.first[: state.num_asked], state.first[state.num_asked :]
        return state._replace(first=[*begun, *untried(left, records, state.num_asked)])

    return base.Searcher(init, ask, tell)


def complete(space: base.PyTree, first: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Returns the configurations to try first; missing parameters get their defaults.

    Args:
      space: a tree of leaves.
      first: configurations, or None for only the default of the space.

    Returns:
      Complete configurations, without inactive parameters.

    Raises:
      ValueError: if a configuration does not fit the space.
    """
    return [spaces.complete(space, c) for c in ([{}] if first is None else first)]


def untried(
    configurations: Sequence[dict[str, Any]], records: Sequence[base.Record], num_asked: int = 0
) -> tuple[dict[str, Any], ...]:
    """Returns the configurations that no other searcher has tried at the full budget.

    Args:
      configurations: complete ones, as in records.
      records: the records that a searcher receives, with any status.
      num_asked: the number of trials that this searcher has proposed. They have the numbers 0 to num_asked - 1, and are
        ignored.

    Returns:
      Some of `configurations`, in their order.

    >>> from metaopt import base
    >>> untried([{"depth": 5}, {"depth": 7}], [base.Record("", {"depth": 5}, trial=-2)])
    ({'depth': 7},)
    """
    others = [
        r.configuration for r in records if _fidelities.is_full_budget(r.fidelity) and not 0 <= r.trial < num_asked
    ]
    return tuple(c for c in configurations if c not in others)


def seed_of(key: jax.Array, trial: int) -> int:
    """The seed of a trial, from the key of a search and the number of the trial."""
    return int(jax.random.randint(jax.random.fold_in(key, trial), (), 0, 2**31 - 1))


@functools.lru_cache(maxsize=64)
def _draw_fn(leaves, treedef):
    space = treedef.unflatten(leaves)

    def draw(key, trial):
        sample_key, seed_key = jax.random.split(jax.random.fold_in(key, trial))
        return spaces.sample(sample_key, space), jax.random.randint(seed_key, (), 0, 2**31 - 1)

    return jax.jit(draw)
