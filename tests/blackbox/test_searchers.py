"""Every searcher proposes new trials at each ask, and treats records without an outcome as documented.

To add a searcher:

1. Write one file in `metaopt/blackbox/`, such as `_my_search.py`: a function `(*, ...) -> base.Searcher`, or one that
   trains on earlier records and returns a `NamedTuple` with a field `searcher`.
2. Export it in `metaopt/blackbox/__init__.py`, in the imports and in `__all__`.
3. Add a row to `SEARCHERS` under the name of the function, such as `"my_search": Row(blackbox.my_search)`. `Row`
   documents the fields. A second setting of a searcher may have its own row, "my_search, setting".

Every row is checked: the functions name their arguments as the contract does; asks without a tell propose different
trials with different seeds; trials and seeds follow from the key; a trial without a finite outcome counts as failed.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from metaopt import base, blackbox, nas, spaces
from metaopt.base import Record

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
INTEGERS = {"a": spaces.integer(0, 9), "b": spaces.integer(0, 9)}
LINE = {"x": spaces.interval(0.0, 1.0)}
POOL = [{"x": x / 15} for x in range(16)]
OPS = ("none", "a", "b")
CELLS = [{"e0": x, "e1": y, "e2": z} for x, y, z in itertools.product(OPS, repeat=3)]


def loss(configuration, shift=0.3):
    return sum((i + 1) * (OPS.index(v) if isinstance(v, str) else v) for i, v in enumerate(configuration.values())) % (
        1 + shift
    )


def earlier(configurations, fidelities=(1.0,)):
    return [
        Record(f"t{t}", c, loss(c, t / 3) + 1 - fidelity, fidelity, trial=i)
        for t in range(3)
        for i, c in enumerate(configurations)
        for fidelity in fidelities
    ]


@functools.cache
def meta_optimizer(finite):
    return blackbox.train_meta_optimizer(
        earlier(POOL), space=LINE, candidates=POOL if finite else None, num_members=1, num_steps=0
    )


@functools.cache
def cell_searcher():
    graph = lambda cell: nas.edge_graph([(0, 1, cell["e0"]), (1, 2, cell["e1"]), (0, 2, cell["e2"])], output=(2,))
    sizes = {"width": 4, "num_layers": 1, "num_members": 1, "batch_size": 9, "num_steps": 0}
    return nas.train_cell_searcher(earlier(CELLS), graph, **sizes)


def curve_searcher():
    return blackbox.train_curve_searcher(earlier(POOL, (0.5, 1.0)), space=LINE, num_steps=0).searcher()


def gaussian_processes():
    return blackbox.train_meta_searcher(earlier(POOL), space=LINE, candidates=POOL, num_steps=0).searcher()


class Row(NamedTuple):
    """A searcher of the table.

    Attributes:
      make: `() -> Searcher`. Choose small networks and few steps.
      space: the space of its `init`.
      needs: the package that the searcher imports, if it is optional; without it, the tests of the row skip.
    """

    make: Callable[[], base.Searcher]
    space: Any = LINE
    needs: str | None = None


SEARCHERS = {
    "random_search": Row(blackbox.random_search),
    "enqueue": Row(lambda: blackbox.enqueue(blackbox.random_search(), [{"x": 0.1}], after=2)),
    "train_meta_optimizer": Row(lambda: meta_optimizer(False).searcher()),
    "train_meta_optimizer, candidates": Row(lambda: meta_optimizer(True).searcher()),
    "train_meta_searcher": Row(gaussian_processes),
    "train_cell_searcher": Row(lambda: cell_searcher().searcher(), None),
    "train_curve_searcher": Row(curve_searcher),
    "tpe": Row(blackbox.tpe, needs="optuna"),
    "bohb": Row(blackbox.bohb, needs="optuna"),
    "asha": Row(blackbox.asha),
    "regularized_evolution": Row(lambda: blackbox.regularized_evolution(population_size=3, sample_size=2), INTEGERS),
    "screened_random_search": Row(lambda: nas.screened_random_search(loss, num_candidates=3)),
}


@functools.cache
def start(name):
    row = SEARCHERS[name]
    if row.needs:
        pytest.importorskip(row.needs)
    return row.make(), row.space


def test_every_searcher_has_a_row():
    signatures = {
        name: inspect.signature(getattr(room, name))
        for room in (blackbox, nas)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
    }
    unstated = {name for name, signature in signatures.items() if signature.return_annotation is signature.empty}
    assert not unstated & set(blackbox.__all__), "state what the function returns"
    returned = {name: signature.return_annotation for name, signature in signatures.items()}
    factories = {name for name, kind in returned.items() if kind is base.Searcher or hasattr(kind, "searcher")}
    assert factories == {name.split(", ")[0] for name in SEARCHERS}


@pytest.mark.parametrize("name", SEARCHERS)
def test_arguments_have_the_names_of_the_contract(name):
    searcher, _ = start(name)
    for function, protocol in (
        (searcher.init, base.SearcherInitFn),
        (searcher.ask, base.AskFn),
        (searcher.tell, base.TellFn),
    ):
        assert list(inspect.signature(function).parameters) == list(inspect.signature(protocol.__call__).parameters)[1:]


def with_outcomes(trials, **kwargs):
    return [t._replace(status="COMPLETE", outcome=loss(t.configuration), **kwargs) for t in trials]


@pytest.mark.parametrize("name", SEARCHERS)
def test_asks_without_a_tell_propose_different_trials(name):
    searcher, space = start(name)
    state, trials = searcher.init(KEY, space), []
    for outcomes_are_known in (False, True):
        if outcomes_are_known:
            state = searcher.tell(state, with_outcomes(trials))
        first, state = searcher.ask(state, 3)
        second, state = searcher.ask(state, 3)
        new = [t for t in first + second if t.trial not in {before.trial for before in trials}]
        assert len({(t.trial, t.fidelity) for t in first + second}) == len(first + second) > len(first) > 0
        assert len({t.seed for t in new}) == len(new)
        assert len({repr(sorted(t.configuration.items())) for t in new}) == len(new) > 0
        trials += first + second


@pytest.mark.parametrize("name", SEARCHERS)
def test_trials_follow_from_the_key(name):
    searcher, space = start(name)

    def search(key):
        trials, state = searcher.ask(searcher.init(key, space), 3)
        return trials + searcher.ask(searcher.tell(state, with_outcomes(trials)), 3)[0]

    trials, repeated, other = search(KEY), search(KEY), search(jax.random.key(1))
    assert repr(trials) == repr(repeated)
    assert not {t.seed for t in trials} & {t.seed for t in other}


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_complete_trial_without_a_finite_outcome_has_failed(name):
    searcher, space = start(name)

    def next_trials(**ending):
        state = searcher.init(KEY, space)
        trials, state = searcher.ask(state, 4)
        state = searcher.tell(state, [*with_outcomes(trials[:2]), *(t._replace(**ending) for t in trials[2:])])
        return [t._replace(seed=0) for t in searcher.ask(state, 2)[0]]

    failed = next_trials(status="FAIL")
    for outcome in (math.nan, math.inf, -math.inf):
        assert repr(next_trials(status="COMPLETE", outcome=outcome)) == repr(failed)


def test_of_earlier_trials_a_non_finite_outcome_is_a_failure_and_an_unfinished_one_does_not_count():
    train = lambda records: blackbox.train_meta_optimizer(
        records, space=LINE, candidates=POOL, num_steps=0, num_members=1
    )
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a.surrogate, b.surrogate)
    records = earlier(POOL)
    finished, rest = records[::2], records[1::2]
    failed = train(finished + [r._replace(status="FAIL", outcome=math.nan) for r in rest[:5]])
    for outcome in (math.nan, math.inf, -math.inf):
        same(train(finished + [r._replace(outcome=outcome) for r in rest[:5]]), failed)
    absent = train(finished)
    for status in ("WAITING", "RUNNING", "PRUNED"):
        same(train(finished + [r._replace(status=status, outcome=-100.0) for r in rest]), absent)
