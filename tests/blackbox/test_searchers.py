"""Every searcher proposes new trials at every ask, and treats failed and unfinished trials as documented."""

import functools
import inspect
import itertools
import math

import jax
import numpy as np
import pytest

from metaopt import Record, Searcher, blackbox, nas, spaces

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


SEARCHERS = {  # name -> (its factory, the space)
    "random_search": (blackbox.random_search, LINE),
    "enqueue": (lambda: blackbox.enqueue(blackbox.random_search(), [{"x": 0.1}], after=2), LINE),
    "g": (lambda: meta_optimizer(False).searcher(), LINE),
    "g of candidates": (lambda: meta_optimizer(True).searcher(), LINE),
    "h of cells": (lambda: cell_searcher().searcher(), None),
    "curves": (curve_searcher, LINE),
    "tpe": (blackbox.tpe, LINE),
    "bohb": (blackbox.bohb, LINE),
    "asha": (blackbox.asha, LINE),
    "regularized_evolution": (lambda: blackbox.regularized_evolution(population_size=3, sample_size=2), INTEGERS),
    "screened_random_search": (lambda: nas.screened_random_search(loss, num_candidates=3), LINE),
}


@functools.cache
def start(name):
    if name in ("tpe", "bohb"):
        pytest.importorskip("optuna")
    make, space = SEARCHERS[name]
    return make(), space


def test_every_searcher_has_a_row():
    searchers = {
        name
        for name in blackbox.__all__
        if inspect.isfunction(getattr(blackbox, name))
        and inspect.signature(getattr(blackbox, name)).return_annotation is Searcher
    }
    assert "tpe" in searchers and searchers <= SEARCHERS.keys()


def told(trials, **kwargs):
    return [t._replace(status="COMPLETE", outcome=loss(t.configuration), **kwargs) for t in trials]


@pytest.mark.parametrize("name", SEARCHERS)
def test_asks_without_a_tell_propose_different_trials(name):
    searcher, space = start(name)
    state, trials = searcher.init(KEY, space), []
    for outcomes_are_known in (False, True):
        if outcomes_are_known:
            state = searcher.tell(state, told(trials))
        first, state = searcher.ask(state, 3)
        second, state = searcher.ask(state, 3)
        new = [t for t in first + second if t.trial not in {before.trial for before in trials}]
        assert len({(t.trial, t.fidelity) for t in first + second}) == len(first + second) > len(first) > 0
        assert len({t.seed for t in new}) == len(new)
        assert len({repr(sorted(t.configuration.items())) for t in new}) == len(new) > 0
        trials += first + second


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_complete_trial_without_a_finite_outcome_has_failed(name):
    searcher, space = start(name)

    def next_trials(**ending):
        state = searcher.init(KEY, space)
        trials, state = searcher.ask(state, 4)
        state = searcher.tell(state, [*told(trials[:2]), *(t._replace(**ending) for t in trials[2:])])
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
