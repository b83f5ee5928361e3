"""Trials of a trained searcher on a new task: many, failed, running, cheap and expensive, at several fidelities."""

import json
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt
from metaopt import blackbox, spaces
from metaopt.base import Record, Task
from metaopt.blackbox import (
    _earlier_trials,
    _encoding,
    _meta_search,
    _new_trials,
    _surrogates,
)

SPACE = {
    "x": spaces.interval(0.0, 1.0),
    "kind": spaces.choice(["a", "b"]),
    "only_b": spaces.active_if(spaces.interval(-1.0, 1.0), "kind", ["b"]),
}
POOL = [{"x": float(x), "kind": "a"} for x in np.linspace(0, 1, 12)]
POOL += [{"x": float(x), "kind": "b", "only_b": float(y)} for x in np.linspace(0, 1, 4) for y in (-0.5, 0.5)]


def loss(configuration, best=0.4):
    return (configuration["x"] - best) ** 2 + 0.2 * (configuration["kind"] == "b")


def make_records(num_tasks=4, cost=lambda configuration: 1.0 + 9.0 * configuration["x"]):
    return [
        Record(f"t{t}", c, loss(c, (t + 1) / 6), cost=(1 + t) * cost(c), trial=i)
        for t in range(num_tasks)
        for i, c in enumerate(POOL)
    ]


def rows_of(rng, shift, num=12, num_columns=2, num_classes=2):
    """A table whose two classes lie as far apart as the shift."""
    y = np.arange(num) % 2
    x = rng.normal(size=(num, num_columns)) / 9 + 3 * shift * (y[:, None] - 0.5)
    masks = {"mask": np.ones(num), "feature_mask": np.ones(num_columns), "class_mask": np.ones(num_classes)}
    return {"x": x, "y": y, **masks}


@pytest.fixture(scope="module")
def g():
    return blackbox.train_meta_optimizer(
        make_records(), space=SPACE, candidates=POOL, features={"t0": [1.0], "t1": [2.0]}, num_steps=0, costs=True
    )


@pytest.fixture(scope="module")
def free(g):
    """`g` without candidates: its suggestions change with every number that they depend on."""
    return _meta_search.meta_optimizer(g.surrogate, None, SPACE, None)


def with_outcomes(trials, best=0.4, **kwargs):
    return [t._replace(status="COMPLETE", outcome=loss(t.configuration, best), **kwargs) for t in trials]


@pytest.mark.once
def test_suggest_equals_the_searcher_without_its_state(g):
    assert g.suggest([], []) == [g.predict()]
    searcher = g.searcher([1.5])
    trials, state = searcher.ask(searcher.init(jax.random.key(0), SPACE), 3)
    tried = [record.configuration for record in trials]
    state = searcher.tell(state, with_outcomes(trials))
    expected, _ = searcher.ask(state, 2)
    suggestions = g.suggest(tried, [loss(c) for c in tried], [1.5], num=2)
    assert suggestions == [record.configuration for record in expected] and suggestions[0] != suggestions[1]
    # A running trial is not suggested again, and a failed trial does not end the search.
    assert suggestions[0] not in g.suggest(tried, [np.nan, *map(loss, tried[1:])], [1.5], pending=suggestions[:1])
    assert g.suggest(tried, [np.inf, *map(loss, tried[1:])]) == g.suggest(tried, [np.nan, *map(loss, tried[1:])])


@pytest.mark.once
def test_predicted_quantiles_are_calibrated_on_new_tasks():
    rng = np.random.default_rng(0)
    line = [{"x": float(x)} for x in np.linspace(0, 1, 15)]

    def outcomes():
        best, width = rng.uniform(), rng.uniform(0.5, 1.5)
        return np.array([width * (c["x"] - best) ** 2 for c in line]) + rng.normal(size=15) / 100

    earlier = [Record(f"t{t}", c, y) for t in range(40) for c, y in zip(line, outcomes(), strict=True)]
    g = blackbox.train_meta_optimizer(earlier, space={"x": SPACE["x"]}, candidates=line, num_steps=20)
    tried_rows = np.array([0, 6, 12])
    open_rows = np.setdiff1d(np.arange(15), tried_rows)
    candidates, tried = [line[i] for i in open_rows], [line[i] for i in tried_rows]
    below, wrong, wide = [], [], []
    for _ in range(60):
        y = outcomes()
        predicted = g.outcomes(candidates, tried=tried, outcomes=y[tried_rows])
        assert (np.diff(predicted.quantiles, axis=1) > 0).all()
        below.append((y[open_rows][:, None] < predicted.quantiles).mean(0))
        wrong.append([np.abs(predicted.mean - y[open_rows]).mean(), np.abs(y[tried_rows].mean() - y[open_rows]).mean()])
        wide.append([np.ptp(predicted.quantiles, axis=1).mean() / 2, y[open_rows].std()])
    below, wrong, wide = (np.mean(values, 0) for values in (below, wrong, wide))
    # On the safe side: here the noise is a third of what the processes take for granted.
    assert below[0] < 0.1 and abs(below[1] - 0.5) < 0.1 and below[2] > 0.9
    assert wrong[0] < 0.4 * wrong[1] and wide[0] < 0.6 * wide[1], (wrong, wide)
    moved = g.outcomes(candidates, tried=tried, outcomes=7 + y[tried_rows])  # in the units of the task
    np.testing.assert_allclose(moved.quantiles, 7 + predicted.quantiles, rtol=1e-6)
    prior = g.outcomes(candidates)
    np.testing.assert_allclose(prior.mean, np.asarray(g.surrogate.curves)[:, open_rows].mean(0), atol=0.02)
    assert (prior.quantiles > -0.1).all() and (prior.quantiles < 1.1).all()


@pytest.mark.once
def test_failed_and_diverged_trials_change_the_prediction_next_to_them(g):
    """As it does to the searcher."""
    line = [{"x": float(x), "kind": "a"} for x in np.linspace(0, 1, 11)]
    prior, tried = g.outcomes(line).mean, [line[0], line[10]]
    for others, y in (([], []), (tried, [0.3, 0.5])):  # where no trial has ended, and where some have
        without = g.outcomes(line, tried=others, outcomes=y) if others else g.outcomes(line)
        after = g.outcomes(line, tried=[*others, line[5]], outcomes=[*y, np.nan])
        worse, quantiles = after.mean - without.mean, after.quantiles - without.quantiles
        assert worse[5] > 0.1 and worse.argmax() == 5 and (quantiles[5] > 0.05).all(), (worse, quantiles)
        assert after.mean[5] > max([0.9 * prior.max(), *y])
    far, further = (g.outcomes(line, tried=[*tried, line[5]], outcomes=[0.3, 0.5, y]).mean for y in (1e6, 1e9))
    np.testing.assert_allclose(far, further, rtol=1e-6)
    assert far.max() < 10
    nothing = g.outcomes([])
    assert nothing.mean.shape == (0,) and nothing.quantiles.shape == (0, 3)


@pytest.mark.once
def test_the_default_is_tried_first_unless_candidates_do_not_hold_it(g):

    def first(g, **kwargs):
        searcher = g.searcher(**kwargs)
        return [record.configuration for record in searcher.ask(searcher.init(jax.random.key(0), None), 2)[0]]

    everywhere = _meta_search.meta_optimizer(g.surrogate, None, SPACE, None, effective_tasks=1e3)
    default = spaces.configuration(SPACE, spaces.default(SPACE))
    assert first(everywhere) == [default, everywhere.predict()]
    assert first(everywhere, first=())[0] == everywhere.predict() == everywhere.suggest([], [])[0] != default
    assert first(g)[0] == g.predict()  # nothing but the pool
    encode = _encoding.encoder(SPACE)
    np.testing.assert_array_equal(encode({}), encode(default, True))  # a missing value is the default exactly
    np.testing.assert_array_equal(encode({"x": 0.2}), encode({"x": 0.2, "kind": "a"}, True))
    within = _meta_search.meta_optimizer(g.surrogate, None, SPACE, [*POOL, default])
    assert first(within)[0] == default != first(within)[1]


@pytest.mark.once
@pytest.mark.parametrize("name", ["g", "tpe", "bohb", "asha"])
def test_the_default_is_not_proposed_again_if_it_was_enqueued(g, name):
    if name in ("tpe", "bohb"):
        pytest.importorskip("optuna")
    inner = {
        "g": lambda: g.searcher(first=[{}, POOL[3]]),
        "tpe": lambda: blackbox.tpe(first=[{}, POOL[3]]),
        "bohb": lambda: blackbox.bohb(first=[{}, POOL[3]], num_rungs=2),
        "asha": lambda: blackbox.asha(g.searcher(first=[{}, POOL[3]]), num_rungs=2),
    }[name]
    default = spaces.complete(SPACE, {})
    for mine, expected in (([{}], [default, POOL[3]]), ([POOL[3], {}], [POOL[3], default]), ([], [default, POOL[3]])):
        searcher = blackbox.enqueue(inner(), mine)
        state, tried = searcher.init(jax.random.key(0), SPACE), []
        while len({trial.trial for trial in tried}) < 4:
            trials, state = searcher.ask(state, 2)
            tried += trials
            state = searcher.tell(state, with_outcomes(trials))
        configurations = [next(t.configuration for t in tried if t.trial == i) for i in range(4)]
        assert configurations[:2] == expected and not any(c in expected for c in configurations[2:]), name


@pytest.mark.once
def test_a_region_with_failures_is_avoided_at_once():
    """Earlier tasks say that x = 0.8 is best; here all beyond 0.55 fails."""
    space, line = {"x": spaces.interval(0.0, 1.0)}, [{"x": float(x)} for x in np.linspace(0, 1, 21)]
    bests = 20 * (0.7, 0.75, 0.8, 0.85, 0.9)
    records = [Record(f"t{t}", c, (c["x"] - best) ** 2) for t, best in enumerate(bests) for c in line]

    g = blackbox.train_meta_optimizer(records, space=space, candidates=line, num_steps=10)

    def failures(num, first=()):
        compiled = _meta_search.meta_optimizer(
            g.surrogate, None, space, line, effective_tasks=g.evidence.effective_tasks
        )
        searcher = compiled.searcher(first=first)
        state, tried = searcher.init(jax.random.key(0), None), []
        for _ in range(num):
            (trial,), state = searcher.ask(state, 1)
            x = trial.configuration["x"]
            tried.append(x)
            ended = {"status": "FAIL"} if x > 0.55 else {"status": "COMPLETE", "outcome": (x - 0.8) ** 2}
            state = searcher.tell(state, [trial._replace(**ended)])
        return np.array(tried) > 0.55

    # Before the first outcome, configurations near a failed trial are expected to be bad, also those of the portfolio.
    assert failures(4).tolist() == [True, False, False, False]
    # Afterwards, a failed trial counts as worse than the worst outcome.
    first = [{"x": 0.4}]
    assert failures(4, first).tolist() == [False, True, False, False]


@pytest.mark.once
def test_of_six_hundred_trials_the_best_and_the_latest_128_are_read(free):
    """A suggestion does not depend on the configurations of other trials."""
    searcher, rng = free.searcher(first=()), np.random.default_rng(1)
    start = searcher.init(jax.random.key(0), None)
    # The only good one is the first.
    y = np.concatenate([[0.1], rng.uniform(1, 2, size=599)])
    x = rng.uniform(size=600)

    def suggested(*moved):
        configurations = [{"x": float(1 - v if i in moved else v), "kind": "a"} for i, v in enumerate(x)]
        records = [Record("", c, float(v), trial=i) for i, (c, v) in enumerate(zip(configurations, y, strict=True))]
        return searcher.ask(searcher.tell(start, records)._replace(num_asked=600), 1)[0][0].configuration

    best = np.argsort(y)[:128]
    latest = np.setdiff1d(np.arange(600), best)[-128:]
    others = set(range(600)) - {*best, *latest}
    expected = suggested()
    assert best[0] == 0 and len(others) == 600 - 256 and suggested(*others) == expected
    for i in (best[0], best[127], latest[0], latest[127]):
        assert suggested(i) != expected, i


@pytest.mark.once
def test_of_six_hundred_trials_the_latest_costs_are_read_and_none_is_repeated(g):
    searcher, rng = g.searcher(acquisition="ei_per_cost"), np.random.default_rng(0)
    others = [{"x": x, "kind": "a"} for x in rng.uniform(size=50).tolist()]
    many = [Record("", others[i % 50], float(rng.uniform(1, 2)), cost=1.0, trial=i) for i in range(600)]
    many = [*with_outcomes([Record("", POOL[0])], trial=601), *many]
    start, asked = searcher.init(jax.random.key(0), None), []
    # All costs but the latest 64 grow or fall 10⁸-fold with x.
    for sign in (1, -1):
        records = [r._replace(cost=1e8 ** (sign * r.configuration["x"])) for r in many[:-64]] + many[-64:]
        trials, state = searcher.ask(searcher.tell(start, records)._replace(num_asked=600), 6)
        asked.append([record.configuration for record in trials])
    assert asked[0] == asked[1] and len(state.tried) == 601
    assert len({tuple(configuration.items()) for configuration in asked[0]}) == 6
    state = searcher.tell(state, [Record("", c, 2.0, trial=1_000 + i) for i, c in enumerate(POOL[:-1])])
    (last,), _ = searcher.ask(state._replace(pending={}), 1)
    assert last.configuration == POOL[-1]


@pytest.mark.once
def test_suggest_equals_the_searcher_and_reads_a_few_hundred_of_many_trials(free, monkeypatch):
    rng = np.random.default_rng(0)
    tried = [{"x": x, "kind": "a"} for x in rng.uniform(size=600).tolist()]
    searcher, completed, real = free.searcher(first=()), [], spaces.from_configuration
    start = searcher.init(jax.random.key(3), None)._replace(num_asked=len(tried))
    monkeypatch.setattr(  # counts the trials that are read
        spaces, "from_configuration", lambda *args, **kwargs: completed.append(args[1]) or real(*args, **kwargs)
    )
    for unit in (1.0, 1e4):
        y = [unit * loss(c) if i % 5 else np.inf if i % 2 else np.nan for i, c in enumerate(tried)]
        suggested = free.suggest(tried, y, key=jax.random.key(3))
        if unit == 1.0:  # later calls find configurations in a cache
            assert 200 < len(completed) <= 2 * 256 + 4  # each is completed before
        state = searcher.tell(start, [Record("", c, v, trial=i) for i, (c, v) in enumerate(zip(tried, y, strict=True))])
        assert suggested == [record.configuration for record in searcher.ask(state, 1)[0]]


@pytest.mark.once
def test_suggest_repeats_no_candidate_in_any_form_or_of_any_age(g):
    late = [{"x": x, "kind": "a"} for x in np.random.default_rng(0).uniform(size=400).tolist()]
    # Bad early trials in another form: in another order, with NumPy's numbers, with inactive parameters.
    early = [dict(reversed(c.items())) | {"x": np.float64(c["x"])} for c in POOL[:-1]]
    early = [c | {"only_b": 0.25} if c["kind"] == "a" else c for c in early]
    y = [9.0 + i for i in range(len(early))] + [loss(c) for c in late]
    assert g.suggest([*early, *late], y) == [POOL[-1]]


def test_failed_trials_do_not_enter_the_model_of_costs():
    records = [r._replace(cost=1e-3, status="FAIL") if r.trial % 2 else r for r in make_records(2)]
    encode = _encoding.encoder(SPACE)
    costs = [task.y for task in _earlier_trials.costs_by_task(records, encode)]
    assert [len(y) for y in costs] == [len(POOL) // 2] * 2 and min(map(np.min, costs)) >= 0


@pytest.mark.once
def test_the_weights_of_a_simplex_are_searched_and_not_its_corners():
    space = {"mix": spaces.simplex(2)}
    mixes = [{"mix[0]": float(a), "mix[1]": float(1 - a)} for a in np.linspace(0.05, 0.95, 19)]
    records = [Record(f"t{t}", c, (c["mix[0]"] - 0.7 - t % 3 / 50) ** 2) for t in range(90) for c in mixes]
    g = blackbox.train_meta_optimizer(records, space=space, num_steps=0)
    assert abs(g.predict()["mix[0]"] - 0.72) < 0.1


@pytest.mark.slow
def test_a_cheap_trial_is_preferred_where_it_is_as_good(g):
    """Costs grow tenfold with x; the loss is symmetric around the middle."""
    tried = [{"x": 0.0, "kind": "a"}, {"x": 1.0, "kind": "a"}]
    searcher = {name: g.searcher(acquisition=name) for name in ("ei", "ei_per_cost")}
    mean_x = {}
    for name, ours in searcher.items():
        state = ours.init(jax.random.key(0), None)
        state = ours.tell(state, [Record("", c, 1.0, cost=1 + 9 * c["x"], trial=i) for i, c in enumerate(tried)])
        trials, _ = ours.ask(state._replace(num_asked=2), 4)
        mean_x[name] = np.mean([record.configuration["x"] for record in trials])
    assert mean_x["ei_per_cost"] < mean_x["ei"] - 0.05
    # Before any trial has a cost, earlier tasks say what costs more.
    state = searcher["ei_per_cost"].tell(state, [])._replace(tried={})
    state = searcher["ei_per_cost"].tell(state, [Record("", tried[1], 1.0, trial=0)])
    assert searcher["ei_per_cost"].ask(state, 1)[0][0].configuration["x"] < 0.7


def at_full_budget(outcomes):
    return _new_trials.at_full_budget([_new_trials.tried_configuration(np.zeros(1), curve) for curve in outcomes])


class Counted(dict):
    """Counts how often it is read."""

    reads = 0

    def __getitem__(self, key):
        Counted.reads += 1
        return super().__getitem__(key)

    def __contains__(self, key):
        Counted.reads += 1
        return super().__contains__(key)


@pytest.mark.parametrize(
    ("together", "num_steps", "nums"),
    [(True, 20, (6_000, 24_000)), (False, 60, (18_000, 36_000)), (False, 1_000, (4_000, 4_000))],
)
def test_the_outcomes_that_are_read_do_not_grow_with_the_number_of_trials(together, num_steps, nums):
    """With trials that report on their way, and with fidelities that no two have in common."""
    steps, reads = [(i + 1) / num_steps for i in range(num_steps)], []
    for num in nums:
        ends = np.random.default_rng(0).integers(1, num_steps + 1, size=num)
        points = lambda i, ends=ends: steps[: ends[i]] if together else steps[ends[i] - 1 : ends[i]]
        curves = [Counted({s: float(i % 7) - s for s in points(i)}) for i in range(num)]
        tried = [_new_trials.tried_configuration(np.zeros(1), curve) for curve in curves]
        Counted.reads = 0
        outcomes = _new_trials.at_full_budget(tried)
        reads.append(Counted.reads)
        if together:  # all curves fall alike
            np.testing.assert_allclose(outcomes, np.arange(num) % 7 - 1.0, atol=1e-9)
    assert 0 < reads[1] < min(1.1 * reads[0], 400_000)


def test_outcomes_at_several_fidelities_are_brought_to_one_scale():
    nan = np.nan
    # 1 -> .5 adds 1, in two trials; the third has only been at .5, the fourth failed there, the fifth has nothing yet.
    outcomes = [{0.5: 2.0, 1.0: 1.0}, {0.5: 3.0, 1.0: 2.0}, {0.5: 2.5}, {0.5: nan}, {0.25: nan, 0.5: 4.0}]
    np.testing.assert_allclose(at_full_budget(outcomes), [1, 2, 1.5, nan, 3])
    # An infinite outcome is a failure, at any fidelity.
    infinite = [*outcomes[:4], {0.25: np.inf, 0.5: 4.0}, {1.0: np.inf}, {0.5: 1.0, 1.0: -np.inf}]
    np.testing.assert_allclose(at_full_budget(infinite), [1, 2, 1.5, nan, 3, nan, nan])
    # Step by step: .25 and 1 have no trial in common.
    chained = [{1.0: 0.0, 0.5: 1.0}, {0.5: 1.0, 0.25: 3.0}, {0.25: 4.0}]
    np.testing.assert_allclose(at_full_budget(chained), [0, 0, 1])
    # Nothing in common at all: their means are the same.
    np.testing.assert_allclose(at_full_budget([{1.0: 0.0}, {1.0: 2.0}, {0.5: 5.0}]), [0, 2, 1])
    np.testing.assert_allclose(at_full_budget([{1.0: 0.0}, {1.0: nan}, {0.5: 1.0, 1.0: nan}]), [0, nan, nan])


@pytest.mark.once
def test_inactive_parameters_do_not_enter_the_model_and_a_branch_is_one_place(g):
    encode = _encoding.encoder(SPACE)
    base, other = {"x": 0.5, "kind": "a"}, {"x": 0.5, "kind": "a", "only_b": 0.9}
    np.testing.assert_array_equal(encode(base), encode(other))
    assert (encode({**other, "kind": "b"}) != encode({**base, "kind": "b"})).any()
    with pytest.raises(ValueError, match="The space has no `y`"):  # and is not remembered as known
        encode({"y": 1.0}), encode({"y": 1.0}, True)
    # Two parameters of a branch that are only good together: additive models of them see nothing at all.
    rng = np.random.default_rng(0)
    draws = [{"x": float(x), "kind": "b", "only_b": float(2 * y - 1)} for x, y in rng.uniform(size=(60, 2))]
    together = lambda c: -4 * (c["x"] - 0.5) * c["only_b"]
    records = [Record(f"t{t}", c, together(c), trial=i) for t in range(2) for i, c in enumerate(draws)]
    h = blackbox.train_meta_searcher(records, space=SPACE, num_steps=0)
    corners = [{"x": x, "kind": "b", "only_b": y} for x in (0.2, 0.8) for y in (-0.6, 0.6)]
    means = _surrogates.expected_outcomes(h.surrogate, np.stack([encode(c) for c in corners])).mean(1)
    np.testing.assert_array_equal(np.argsort(np.asarray(means))[:2] % 3, [0, 0])  # the first and the last


@pytest.mark.once
def test_a_pruned_trial_counts_with_its_last_outcome_and_not_with_its_cost(g):
    searcher = g.searcher()
    (trial,), state = searcher.ask(searcher.init(jax.random.key(0), None), 1)
    pruned = trial._replace(status="PRUNED", outcome=0.3, fidelity=0.5, cost=7.0)
    (tried,) = searcher.tell(state, [pruned]).tried.values()
    assert tried.outcomes == {0.5: 0.3} and np.isnan(tried.log_cost)
    (tried,) = searcher.tell(state, [pruned._replace(status="FAIL")]).tried.values()
    assert np.isnan(tried.outcomes[0.5]) and np.isnan(tried.log_cost)  # what fails at once is not cheap
    # A trial that continues from a checkpoint has the cost of the rest, so the costs of its fidelities are added.
    both = [pruned._replace(status="COMPLETE", fidelity=s, cost=c) for s, c in ((0.25, 2.0), (1.0, 6.0))]
    (tried,) = searcher.tell(searcher.tell(state, both[:1]), both[1:]).tried.values()
    assert tried.log_cost == pytest.approx(np.log(8.0))
    # Of one fidelity the last row counts, and the row of the largest one says whether the trial was given up.
    corrected = [*both, both[0]._replace(cost=20.0), pruned]
    (tried,) = searcher.tell(state, corrected).tried.values()
    assert tried.log_cost == pytest.approx(np.log(80.0)) and not tried.given_up
    without = both[0]._replace(cost=float("nan"))  # it corrects only the outcome
    (tried,) = searcher.tell(state, [both[0], without]).tried.values()
    assert tried.log_cost == pytest.approx(np.log(8.0))
    (tried,) = searcher.tell(state, [both[0], pruned, both[0]]).tried.values()
    assert tried.given_up
    # It does not count as the worst one, as a failed trial does, nor as better than the best completed one.
    others = [Record("", POOL[7], 0.5, trial=1), Record("", POOL[8], 0.9, trial=2)]
    start = searcher.init(jax.random.key(0), None)._replace(num_asked=3)

    def next_trials(**ended):
        """The trials after each possible first one."""
        first = [Record("", c, seed=1, **ended) for c in POOL if c not in (POOL[7], POOL[8])]
        return [searcher.ask(searcher.tell(start, [one, *others]), 1)[0][0].configuration for one in first]

    same = [("PRUNED", 0.6, 0.6), ("PRUNED", 0.3, 0.5)]
    for status, outcome, counted_as in same:
        pruned = next_trials(status=status, outcome=outcome)
        assert pruned == next_trials(outcome=counted_as)
        assert pruned not in (next_trials(outcome=counted_as + d) for d in (-0.2, 0.2))
        assert pruned != next_trials(status="FAIL")


@pytest.mark.once
def test_bohb_and_tpe_begin_with_the_portfolio_of_g(g):
    pytest.importorskip("optuna")
    first = g.portfolio(3, [1.2])
    for searcher, fidelity in ((blackbox.tpe(first=first), 1.0), (blackbox.bohb(first=first, num_rungs=3), 1 / 9)):
        trials, _ = searcher.ask(searcher.init(jax.random.key(0), SPACE), 4)
        assert [t.configuration for t in trials[:3]] == first != [t.configuration for t in trials[1:]]
        assert {round(t.fidelity, 9) for t in trials} == {round(fidelity, 9)}


def test_all_repeats_without_numbers_count_and_failed_trials_are_run_again(g):
    searcher = g.searcher()
    state = searcher.init(jax.random.key(0), None)
    several = [Record("", POOL[3], y) for y in (1.0, 9.0, 3.0)]
    state = searcher.tell(state, several)
    assert [trial.outcomes for trial in state.tried.values()] == [{1.0: 1.0}, {1.0: 9.0}, {1.0: 3.0}]
    assert len(searcher.tell(state, several).tried) == 3  # told again
    failed = Record("", POOL[4], status="FAIL")
    rerun = searcher.tell(searcher.tell(state, [failed]), [failed._replace(status="COMPLETE", outcome=2.0)])
    assert [trial.last for trial in rerun.tried.values()] == [1.0, 9.0, 3.0, 2.0]
    assert searcher.ask(state, 1)[0][0].configuration != POOL[3]


def test_of_a_numbered_trial_the_last_end_counts(g):
    searcher = g.searcher()
    start = searcher.init(jax.random.key(0), None)
    for numbers in ({"trial": 3}, {"seed": 5}):
        one = Record("", POOL[3], 9.0, **numbers)
        (tried,) = searcher.tell(start, [one, one._replace(outcome=1.0)]).tried.values()  # corrected
        assert tried.outcomes == {1.0: 1.0}
        (tried,) = searcher.tell(start, [one, one._replace(status="FAIL")]).tried.values()
        assert np.isnan(tried.last)
    one = Record("", POOL[3], 9.0)
    one, failed = searcher.tell(start, [one, one._replace(status="FAIL")]).tried.values()
    assert one.last == 9.0 and np.isnan(failed.last)


def test_tell_takes_time_linear_in_the_number_of_repeats(g):
    searcher = g.searcher()
    start = searcher.init(jax.random.key(0), None)
    several = [Record("", POOL[3], float(y), fidelity=s) for y in range(10_000) for s in (0.5, 1.0)]
    begin = time.thread_time()
    state = searcher.tell(start, several)
    assert time.thread_time() - begin < 5
    assert [trial.outcomes for trial in state.tried.values()] == [{0.5: float(y), 1.0: float(y)} for y in range(10_000)]
    assert len(searcher.tell(state, several).tried) == 10_000  # told again
    one_by_one = start
    for record in several[:6]:
        one_by_one = searcher.tell(one_by_one, [record])
    assert list(one_by_one.tried) == list(state.tried)[:3] and not start.repeats


def test_fidelities_that_differ_by_rounding_are_one(g):
    searcher = g.searcher()
    start = searcher.init(jax.random.key(0), None)
    record_at = lambda s, y, trial=1: Record("", POOL[trial], y, fidelity=s, trial=trial)
    single = [record_at(float(np.float32(1 / 3)), 5.0), record_at(1 / 3, 4.0), record_at(0.9999999, 3.0)]
    (tried,) = searcher.tell(start, single).tried.values()
    assert list(tried.outcomes.values()) == [4.0, 3.0] and tried.reached == 1.0
    several = [record_at(1 / 3, 4.0), record_at(1.0, 2.0), record_at(1 / 3, 1.0, trial=2)]
    rounded = [r._replace(fidelity=float(np.nextafter(np.float32(r.fidelity), np.float32(0)))) for r in several]
    both = [searcher.tell(start, [*several[:i], *rounded[i:]]).tried for i in range(4)]
    for tried in both:
        np.testing.assert_array_equal(_new_trials.at_full_budget(list(tried.values())), [2.0, -1.0])


@pytest.mark.once
def test_a_foreign_record_with_the_number_of_a_running_trial_leaves_it_running(g):
    searcher = g.searcher()
    (own,), state = searcher.ask(searcher.init(jax.random.key(0), None), 1)
    state = searcher.tell(state, [Record("", POOL[3], 0.5, trial=own.trial), Record("", POOL[4], 0.5, trial=9)])
    assert set(state.pending) == {own.trial} and len(state.tried) == 2
    assert searcher.ask(state, 1)[0][0].configuration not in (own.configuration, POOL[3], POOL[4])
    state = searcher.tell(state, with_outcomes([own]))
    assert not state.pending and len(state.tried) == 3


def without_cost(records):
    return [repr(record._replace(cost=0.0)) for record in records]


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.once
@pytest.mark.parametrize("name", ["g", "asha", "tpe"])
def test_a_killed_collection_continues_to_the_bit_with_any_number_of_workers(g, name, tmp_path):
    """Configurations, seeds, outcomes and failures are equal, and so are the next trials of the searcher. A trial that
    ran when the collector was killed is queued again. Four workers, whose trials end in any order, give the same."""
    if name == "tpe":
        pytest.importorskip("optuna")
    make = {"g": g.searcher, "asha": lambda: blackbox.asha(g.searcher(), num_rungs=3), "tpe": blackbox.tpe}[name]
    ran, num, more = [], *((7, 8) if name == "asha" else (24, 27))  # full budgets: of ASHA, many trials each

    def objective(trial, task):
        ran.append(trial)
        if len(ran) == 13:
            raise Killed
        time.sleep(np.random.default_rng(zlib.crc32(repr(trial.configuration).encode())).uniform(0, 0.02))
        return np.nan if trial.trial % 7 == 3 else loss(trial.configuration) + 1 - trial.fidelity

    kwargs = {"key": jax.random.key(1), "batch_size": 4, "isolated": False, "space": SPACE, "tasks": {"t": 0}}
    collect = lambda objective=objective, **more: blackbox.collect(objective, searcher=make(), **kwargs | more)
    store = tmp_path / "r.db"
    with pytest.raises(Killed):
        collect(num_trials=num, store=store)
    kept = blackbox.read_records(store)
    assert [r.status == "RUNNING" for r in kept] == [False] * 12 + [True]
    records = collect(num_trials=num, store=store, num_workers=4)
    assert ran[12] in ran[13:]  # the trial that ran
    whole = collect(num_trials=more, num_workers=1)
    four = collect(num_trials=num // 2, num_workers=4)
    assert without_cost(four) == without_cost(whole[: len(four)])
    assert without_cost(records) == without_cost(whole[: len(records)]) and {"FAIL", "COMPLETE"} <= {
        r.status for r in records
    }
    assert without_cost(collect(num_trials=more, store=store)) == without_cost(whole) and len(whole) >= 27
    assert len(ran) == 1 + 2 * len(whole) + len(four)  # nothing is run again


def test_only_the_best_few_trials_reach_the_full_budget():
    objective = lambda trial, task: (trial.configuration["x"] - 0.3) ** 2 + (1 - trial.fidelity) / 10
    space = {"x": spaces.interval(0.0, 1.0)}
    kwargs = {"key": jax.random.key(0), "isolated": False, "progress": False, "resumes": True}
    for num_brackets in (1, 3):
        searcher = blackbox.asha(num_rungs=3, num_brackets=num_brackets)
        records = blackbox.collect(objective, space, {"t": 0}, num_trials=12, searcher=searcher, **kwargs)
        by_fidelity = {f: {r.trial: r for r in records if r.fidelity == pytest.approx(f)} for f in (1 / 9, 1 / 3, 1.0)}
        assert sum(map(len, by_fidelity.values())) == len(records)
        assert all(
            by_fidelity[1.0][n].configuration == record.configuration
            for n, record in by_fidelity[1 / 3].items()
            if n in by_fidelity[1.0]
        )
        first = {min(f for f in by_fidelity if n in by_fidelity[f]) for n in {r.trial for r in records}}
        assert len(first) == num_brackets
        assert records[0].fidelity == pytest.approx(1 / 9)  # the bracket with the largest share
        if num_brackets == 1:
            # About a third of each rung. Later trials may be better than those that were promoted.
            for low, high in ((1 / 9, 1 / 3), (1 / 3, 1.0)):
                assert len(by_fidelity[low]) // 3 <= len(by_fidelity[high]) <= 0.45 * len(by_fidelity[low])
            ranks = np.argsort(np.argsort([r.outcome for r in by_fidelity[1 / 9].values()])) / len(by_fidelity[1 / 9])
            promoted = [rank for n, rank in zip(by_fidelity[1 / 9], ranks, strict=True) if n in by_fidelity[1.0]]
            assert np.mean(promoted) < 0.2
        else:
            # Hyperband's shares: 9/3, 3/2 and 1 of 5.5.
            starts = [sum(n not in by_fidelity.get(f / 3, {}) for n in by_fidelity[f]) for f in by_fidelity]
            total = len({r.trial for r in records})
            starts = np.bincount(
                [int(np.argmax([n in by_fidelity[f] for f in by_fidelity])) for n in {r.trial for r in records}]
            )
            np.testing.assert_allclose(starts, total * np.array([3, 1.5, 1]) / 5.5, atol=1.01)


@pytest.mark.slow
def test_a_batch_without_candidates_spreads_and_low_fidelities_inform():
    """Without candidates: the trials of a batch are where each adds to the others."""
    records = [Record(f"t{t}", {"x": float(x)}, (x - t / 4) ** 2) for t in range(5) for x in np.linspace(0, 1, 9)]
    g = blackbox.train_meta_optimizer(records, space={"x": spaces.interval(0.0, 1.0)}, num_steps=0)
    searcher = g.searcher(first=())
    low = [Record("", {"x": x}, 5 + (x - 0.75) ** 2, fidelity=1 / 9, trial=i) for i, x in enumerate((0.0, 0.5, 1.0))]
    start = searcher.init(jax.random.key(0), None)._replace(num_asked=4)
    trials, _ = searcher.ask(searcher.tell(start, low), 1)
    assert abs(trials[0].configuration["x"] - 0.75) < 0.12
    # After one trial all earlier tasks are equally likely, so a batch has the best configurations of several tasks.
    trials, _ = searcher.ask(searcher.tell(start, [Record("", {"x": 0.5}, 1.0, trial=0)]), 3)
    xs = np.array([record.configuration["x"] for record in trials])
    assert np.abs(xs[:, None] - xs[None])[np.triu_indices(3, 1)].min() > 0.1


def test_every_eighth_trial_of_a_finite_set_is_the_farthest_from_earlier_ones(g):
    """Configurations that the surrogate expects to be worse are tried, too, while others near the best one are left."""
    encode = lambda c: np.asarray(spaces.encode(SPACE, spaces.from_configuration(SPACE, c)))
    of_pool, y = np.stack([encode(c) for c in POOL]), [loss(c) for c in POOL]

    def farthest(*tried):
        distances = np.linalg.norm(of_pool[:, None] - np.stack([encode(c) for c in tried])[None], axis=2).min(1)
        return [c for c, distance in zip(POOL, distances, strict=True) if distance > distances.max() - 1e-6]

    searcher = g.searcher(first=())
    of_nine = [Record("", c, loss(c), trial=i) for i, c in enumerate(POOL[:9])]
    state = searcher.tell(searcher.init(jax.random.key(0), None), of_nine)
    for num_asked in (7, 8, 14, 15, 16, 23):
        (trial,), _ = searcher.ask(state._replace(num_asked=num_asked), 1)
        assert (trial.configuration in farthest(*POOL[:9])) == (num_asked % 8 == 7)
    for num in (6, 7, 8):
        (suggestion,) = g.suggest(POOL[:num], y[:num])
        assert (suggestion in farthest(*POOL[:num])) == (num == 7)
    # Running, failed and very old trials count, and so do trials outside the set.
    one = farthest(*POOL[:6])[0]
    another = farthest(*POOL[:6], one)
    assert not any(c in another for c in farthest(*POOL[:6]))
    foreign = one | {"only_b": 0.9 * one["only_b"]}
    assert farthest(*POOL[:6], foreign) == another
    assert g.suggest(POOL[:6], y[:6], pending=[one])[0] in another
    assert g.suggest([*POOL[:6], one], [*y[:6], np.nan])[0] in another
    assert g.suggest([*POOL[:6], foreign], [*y[:6], 1.0])[0] in another
    long = [one, *45 * POOL[:6]]  # more than the surrogate looks at
    assert len(long) % 8 == 7 and g.suggest(long, [loss(c) for c in long])[0] in another
    running, _ = searcher.ask(state._replace(num_asked=7, pending={6: encode(one)}), 1)
    assert running[0].configuration in farthest(*POOL[:9], one) and one in farthest(*POOL[:9])
    # All were tried.
    state = searcher.tell(state, [Record("", c, loss(c), trial=i) for i, c in enumerate(POOL)])
    assert searcher.ask(state._replace(num_asked=23), 1)[0][0].configuration == g.predict()
    # Records of another precision are encoded in the precision of g.
    with jax.enable_x64(False):
        six = [
            Record("", c, loss(c), trial=i) for i, c in enumerate([*POOL[:6], one | {"only_b": 0.8 * one["only_b"]}])
        ]
        state = searcher.tell(searcher.init(jax.random.key(0), None)._replace(num_asked=7), six)
        assert searcher.ask(state, 1)[0][0].configuration in another


@pytest.mark.once
@pytest.mark.parametrize(("trained_in_x64", "transformers"), [(False, 1), (True, 0)], ids=["float32", "float64"])
def test_an_optimizer_trained_in_one_precision_answers_in_the_other(trained_in_x64, transformers):
    """To the same answers; a warning of what is truncated would be an error here."""
    with jax.enable_x64(trained_in_x64):
        options = {"candidates": POOL[:9], "num_steps": 0, "transformers": transformers}
        g = blackbox.train_meta_optimizer(make_records(2), space=SPACE, **options)
        rng = np.random.default_rng(0)  # untrained networks would read nothing
        random = lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) / 10, leaf.dtype)
        networks = jax.tree.map(random, g.surrogate.transformers)
        g = _meta_search.meta_optimizer(g.surrogate._replace(transformers=networks), None, SPACE, POOL[:9])
    searcher = g.searcher(first=())
    tried = [Record("", c, loss(c), trial=i) for i, c in enumerate(POOL[:4])]

    def answers():
        state = searcher.tell(searcher.init(jax.random.key(0), None)._replace(num_asked=4), tried)
        (trial,), _ = searcher.ask(state, 1)
        suggested = g.suggest(POOL[:4], [record.outcome for record in tried])
        return (trial.configuration, suggested, g.predict(), g.portfolio(2)), g.outcomes(POOL[:3])

    with jax.enable_x64(trained_in_x64):
        expected, believed = answers()
    with jax.enable_x64(not trained_in_x64):
        answer, repeated = answers()
    assert answer == expected
    jax.tree.map(np.testing.assert_array_equal, repeated, believed)


@pytest.mark.parametrize("configuration", [{"x": 1 / 11}, {}], ids=["given", "lacking"])
def test_a_configuration_has_one_encoding_in_both_precisions(configuration):
    """That of g, whichever asks first: there are two g of each precision."""
    space = {"x": spaces.interval(1e-4, 1.0, log=True, default=0.1)}
    records = [Record("t", {"x": x}, x) for x in (0.1, 0.5)]
    make = lambda: blackbox.train_meta_searcher(records, space=space, candidates=[{"x": 0.3}], num_steps=0)

    def name(g, x64):
        with jax.enable_x64(x64):
            searcher = g.searcher(first=())
            (key,) = searcher.tell(searcher.init(jax.random.key(0), None), [Record("", configuration, 1.0)]).tried
        return key[2]

    with jax.enable_x64(False):
        single = make(), make()
    double = make(), make()
    for of_g, size in ((single, 4), (double, 8)):
        assert name(of_g[0], False) == name(of_g[1], True) and len(name(of_g[0], False)) == size


def test_the_farthest_of_many():
    rng = np.random.default_rng(0)
    x, tried = rng.normal(size=(600, 3)), rng.normal(size=(40, 3))
    for i in (3, 300, 599):  # over all parts
        moved = x.copy()
        moved[i] += 100
        assert _new_trials.farthest(moved, tried) == i
    line = np.linspace(0, 1, 11)[:, None]
    assert _new_trials.farthest(line, line[[0, 10]]) == 5
    assert _new_trials.farthest(line[::-1], line[[0, 4, 8]]) == 0  # of 0, 4 and 8, which are the same up to rounding


# ---- On disk --------------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_loaded_optimizer_equals_the_saved_one(g, tmp_path):
    metaopt.save(tmp_path / "g.npz", g)
    loaded = metaopt.load(tmp_path / "g.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["g.npz"]
    assert (loaded.space, loaded.candidates) == (SPACE, POOL) and loaded.portfolio(3, [1.2]) == g.portfolio(3, [1.2])
    for one, other in zip(*(jax.tree.leaves((h.surrogate, h.cost_surrogate)) for h in (loaded, g)), strict=True):
        np.testing.assert_array_equal(one, other)
    tried = POOL[:3]
    kwargs = {"acquisition": "ei_per_cost", "num": 2}
    assert loaded.suggest(tried, [1, 2, 3], **kwargs) == g.suggest(tried, [1, 2, 3], **kwargs)

    with np.load(tmp_path / "g.npz") as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())

    def change(**changed):
        new = {k: v for k, v in (header | changed).items() if k in header}
        rest = {k: changed.get(k, v) for k, v in arrays.items() if changed.get(k, v) is not None}
        np.savez(tmp_path / "h.npz", **rest | {"header": np.frombuffer(json.dumps(new).encode(), np.uint8)})
        return metaopt.load(tmp_path / "h.npz")

    for changed, message in (
        ({"outcome.max_shown": None}, "does not describe .* 'outcome.max_shown'"),
        ({"outcome.curves": None}, "does not describe .* 'outcome.curves'"),
        ({"outcome.reference": np.zeros((4, 2))}, "does not describe .* have shapes"),
        ({"candidates": [{"z": 1}]}, "The space has no `z`"),
    ):
        with pytest.raises(ValueError, match=message):
            change(**changed)
    for name, wrong in (("num_records", -1), ("effective_tasks", "many")):
        with pytest.raises(ValueError, match=f"does not describe .* `{name}` must be positive"):
            change(**{name: wrong})


@pytest.mark.slow
def test_a_loaded_optimizer_with_row_embedding_and_deep_kernels_equals_the_saved_one(tmp_path):
    tables = {f"t{t}": rows_of(np.random.default_rng(t), t / 3) for t in range(4)}
    h = blackbox.train_meta_optimizer(
        make_records(), space=SPACE, candidates=POOL, datasets=tables, num_steps=1, deep_kernels=2, deep_share=0.25
    )
    metaopt.save(tmp_path / "h.npz", h)
    loaded = metaopt.load(tmp_path / "h.npz")
    assert jax.tree.structure(loaded.surrogate) == jax.tree.structure(h.surrogate)
    for one, other in zip(jax.tree.leaves(loaded.surrogate), jax.tree.leaves(h.surrogate), strict=True):
        np.testing.assert_array_equal(one, other)
    task = Task(tables["t1"], None)
    assert loaded.predict(task) == h.predict(task)
    with np.load(tmp_path / "h.npz") as file:
        arrays = dict(file)
    for name in ("deep.hidden", "embedding.params['pair']['w']"):
        np.savez(tmp_path / "wrong.npz", **arrays | {f"outcome.{name}": arrays[f"outcome.{name}"][:, :-1]})
        with pytest.raises(ValueError, match="does not describe .* have shapes"):
            metaopt.load(tmp_path / "wrong.npz")


# ---- Errors ---------------------------------------------------------------------------------------------------------


def test_tasks_without_differences_between_outcomes_do_not_enter_training():
    records = make_records(3)
    one = Record("one trial", POOL[-1], 0.0)
    same = [Record("all the same", c, 1.0) for c in POOL[6:]]
    kwargs = {"space": SPACE, "candidates": POOL, "num_steps": 0}
    with_them = blackbox.train_meta_optimizer([*records, one, *same], **kwargs)
    assert with_them.surrogate.curves.shape[0] == 3
    assert with_them.portfolio(4) == blackbox.train_meta_optimizer(records, **kwargs).portfolio(4)
    # A failure next to a success is a difference.
    failed = blackbox.train_meta_optimizer([one, one._replace(configuration=POOL[0], status="FAIL")], **kwargs)
    assert failed.predict()["kind"] == "b"


def test_a_task_has_the_prediction_of_its_features(g):
    assert g.predict(Task(None, None, features=[1.5])) == g.predict([1.5]) == g.predict(jnp.array([1.5]))
