"""Regularized evolution: children differ in one entry, the oldest die, and it beats chance on a smooth table."""

import jax
import numpy as np
import pytest

from metaopt import blackbox, spaces
from metaopt.base import Record

SPACE = {f"edge{i}": spaces.integer(1, 5) for i in range(6)}
TARGET = (1, 3, 5, 2, 2, 4)


def loss(configuration):
    return sum(abs(value - target) > 0 for value, target in zip(configuration.values(), TARGET, strict=True))


def run(searcher, seed, num, outcome=loss):
    state, trials = searcher.init(jax.random.key(seed), SPACE), []
    for _ in range(num):
        (trial,), state = searcher.ask(state, 1)
        trials.append(trial._replace(outcome=float(outcome(trial.configuration)), status="COMPLETE"))
        state = searcher.tell(state, trials[-1:])
    return trials, state


def test_children_differ_from_a_living_member_in_one_entry():
    trials, state = run(blackbox.regularized_evolution(population_size=10, sample_size=3), 0, 60)
    rows = np.array([list(trial.configuration.values()) for trial in trials])
    assert rows.min() == 1 and rows.max() == 5 and [t.trial for t in trials] == list(range(60))
    for i in range(10, 60):
        assert ((rows[i - 10 : i] != rows[i]).sum(1) == 1).any()
    assert [member[0] for member in state.populations[1.0]] == [t.configuration for t in trials[-10:]]


def test_every_other_value_is_equally_probable():
    # One member, one parent: its children are all of its neighbors.
    searcher = blackbox.regularized_evolution(population_size=1, sample_size=1)
    (first,), state = searcher.ask(searcher.init(jax.random.key(0), SPACE), 1)
    state = searcher.tell(state, [first._replace(outcome=0.0, status="COMPLETE")])
    children, _ = searcher.ask(state, 2_400)
    counts = {}
    for child in children:
        ((name, value),) = [(n, v) for n, v in child.configuration.items() if v != first.configuration[n]]
        counts[name, value] = counts.get((name, value), 0) + 1
    assert len(counts) == 24 and all(abs(n - 100) < 4 * np.sqrt(100) for n in counts.values())


def test_evolution_is_better_than_random_trials_and_follows_from_its_key():
    evolution = blackbox.regularized_evolution(population_size=20, sample_size=5)
    chance = blackbox.regularized_evolution(population_size=1_000)  # never leaves the random phase
    best = lambda searcher: np.mean([min(t.outcome for t in run(searcher, s, 120)[0]) for s in range(8)])
    assert best(evolution) < best(chance) - 0.8
    assert run(evolution, 3, 40)[0] == run(evolution, 3, 40)[0]
    state = evolution.init(jax.random.key(0), SPACE)
    together = [t.configuration for t in evolution.ask(state, 5)[0]]
    assert together == [t.configuration for t in run(evolution, 0, 5)[0]]


def test_failed_trials_do_not_enter_the_population():
    searcher = blackbox.regularized_evolution(population_size=2, sample_size=1)
    trials, state = searcher.ask(searcher.init(jax.random.key(0), SPACE), 3)
    records = [
        trials[0]._replace(status="FAIL", outcome=0.0),
        trials[1]._replace(status="COMPLETE"),
        trials[2]._replace(status="COMPLETE", outcome=1.0),
    ]
    state = searcher.tell(state, records)
    assert state.populations == {1.0: ((trials[2].configuration, 1.0),)}
    assert searcher.tell(state, []).populations == state.populations


def test_trials_of_another_space_have_no_children_and_one_warning_counts_them(caplog):
    searcher = blackbox.regularized_evolution(population_size=1, sample_size=1)
    _, state = searcher.ask(searcher.init(jax.random.key(0), SPACE), 1)
    whole = dict.fromkeys(SPACE, 2)
    others = [{"edge0": 1}, whole | {"edge0": 6}, whole | {"edge0": "a"}, whole | {"edge6": 1}, whole | {"edge0": [1]}]
    records_of = lambda configurations: [Record("", c, 0.0, trial=-2) for c in configurations]
    failed = Record("", {"edge0": 9}, status="FAIL")
    assert searcher.tell(state, [*records_of(others), failed]) == state
    (warning,) = caplog.messages
    assert warning == (
        "5 of 6 records do not fit this searcher. They are not used. The first: The configuration lacks `edge1`."
    )
    (child,), _ = searcher.ask(searcher.tell(state, records_of([whole])), 1)
    assert len(caplog.messages) == 1
    assert sum(child.configuration[name] != 2 for name in SPACE) == 1


def test_every_fidelity_has_a_population_and_parents_are_of_the_highest_with_enough():
    searcher = blackbox.regularized_evolution(population_size=3, sample_size=2)
    trials, state = searcher.ask(searcher.init(jax.random.key(0), SPACE), 4)
    low, high = (
        [t._replace(status="COMPLETE", outcome=y - i, fidelity=f) for i, t in enumerate(trials)]
        for y, f in ((0.0, 0.1), (9.0, 0.5))
    )
    near = lambda child, t: sum(child.configuration[n] != value for n, value in t.configuration.items()) == 1
    children = lambda state: searcher.ask(state, 40)[0]
    alone = searcher.tell(state, [high[0]])
    assert all(near(child, trials[0]) for child in children(alone))  # there is nothing else
    state = searcher.tell(state, low[:3])
    assert all(any(near(child, t) for t in trials[:3]) for child in children(state))
    # One trial at a higher fidelity: the lower fidelity still has most of the trials, and its population is used.
    one = searcher.tell(state, [high[0]])
    assert [c.configuration for c in children(one)] == [c.configuration for c in children(state)]
    two = searcher.tell(one, [high[3], low[3]])
    assert all(near(child, trials[0]) or near(child, trials[3]) for child in children(two))
    members = lambda records: tuple((t.configuration, t.outcome) for t in records)
    assert two.populations == {0.1: members(low[1:]), 0.5: members([high[0], high[3]])}


def test_fixed_entries_stay_as_they_are():
    for space in ({"a": spaces.fixed(2), "b": spaces.integer(0, 3)}, {"a": spaces.fixed(2)}):
        searcher = blackbox.regularized_evolution(population_size=1, sample_size=1)
        (first,), state = searcher.ask(searcher.init(jax.random.key(0), space), 1)
        state = searcher.tell(state, [first._replace(outcome=0.0, status="COMPLETE")])
        (child,), _ = searcher.ask(state, 1)
        assert child.configuration["a"] == 2 and (len(space) == 1) == (child.configuration == first.configuration)
        other = first._replace(configuration=first.configuration | {"a": 99}, outcome=-1.0, status="COMPLETE")
        (child,), _ = searcher.ask(searcher.tell(state, [other]), 1)  # from another space
        assert child.configuration["a"] == 2


@pytest.mark.parametrize("value", [np.float32(0.1), 0.1, float("nan"), True, 3])
def test_records_with_the_fixed_value_enter_the_population(value):
    space = {"a": spaces.fixed(value), "b": spaces.integer(0, 3)}
    searcher = blackbox.regularized_evolution(population_size=2, sample_size=1)
    plain = spaces.configuration(space, spaces.default(space))["a"]
    records = [Record("", {"a": a, "b": b}, outcome=0.0) for b, a in enumerate((plain, "0.1", None, plain))]
    (members,) = searcher.tell(searcher.init(jax.random.key(0), space), records).populations.values()
    assert [configuration["b"] for configuration, _ in members] == [0, 3]
