"""Trials that are paused and continued, on curves that are known."""

import jax
import numpy as np
import pytest

from metaopt import base, blackbox, spaces
from metaopt.blackbox import _freeze_thaw

pytestmark = pytest.mark.once

SPACE = {"x": spaces.interval(0.0, 1.0)}
CANDIDATES = [{"x": v} for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
FIDELITIES = (0.25, 0.5, 1.0)


def outcome(task, x, fidelity):
    """All begin alike, and part by their ends; the best x is the task."""
    return 0.2 + 0.8 * (1 - fidelity) ** 2 + fidelity * (x - task) ** 2


@pytest.fixture(scope="module")
def g():
    earlier = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    records = [
        base.Record(str(task), c, outcome(task, c["x"], f), f)
        for task in earlier
        for c in CANDIDATES
        for f in FIDELITIES
    ]
    records.append(base.Record("0.0", {"x": 0.3}, status="FAIL"))  # not a candidate
    return blackbox.train_curve_searcher(records, space=SPACE, num_steps=3)


def begin(g, **kwargs):
    searcher = g.searcher(**kwargs)
    return searcher, searcher.init(jax.random.key(0), SPACE)


def completed(trial, task):
    return trial._replace(status="COMPLETE", outcome=outcome(task, trial.configuration["x"], trial.fidelity))


def test_every_trial_climbs_its_fidelities_and_all_end(g):
    searcher, state = begin(g)
    runs: dict[int, list] = {}
    for _ in range(len(CANDIDATES) * len(FIDELITIES)):
        (trial,), state = searcher.ask(state, 1)
        runs.setdefault(trial.trial, []).append((trial.configuration["x"], trial.fidelity, trial.seed))
        state = searcher.tell(state, [completed(trial, 0.7)])
    assert list(runs) == [0, 1, 2, 3, 4]
    for steps in runs.values():
        x, fidelities, seeds = zip(*steps, strict=True)
        assert fidelities == FIDELITIES and len(set(x)) == len(set(seeds)) == 1
    assert len({steps[0][0] for steps in runs.values()}) == len(CANDIDATES)
    assert searcher.ask(state, 2)[0] == []


def test_the_best_is_found_without_ending_the_others(g):
    for task in (0.1, 0.5, 0.9):
        records = blackbox.collect(
            lambda trial, task: outcome(task, trial.configuration["x"], trial.fidelity),
            SPACE,
            {"new": task},
            num_trials=2,
            key=jax.random.key(0),
            searcher=g.searcher(),
            resumes=True,
            isolated=False,
            num_workers=1,
            progress=False,
        )
        ended = [r for r in records if r.fidelity == 1.0]
        best = min(CANDIDATES, key=lambda c: (c["x"] - task) ** 2)
        assert best in [r.configuration for r in ended] and len(ended) <= 2 < len({r.trial for r in records}) + 1


def test_predictions_follow_the_observed_outcomes(g):
    """Before: the mean of the tasks. After two beginnings on the task x = 1: its order, at narrower intervals."""
    nothing = g.predict()
    order = [g.candidates.index(c) for c in CANDIDATES]
    trials = [
        base.Record("", c, outcome(1.0, c["x"], f), f) for c in (CANDIDATES[0], CANDIDATES[4]) for f in (0.25, 0.5)
    ]
    quantiles = g.predict(trials, (0.1, 0.5, 0.9))[order]
    assert quantiles.shape == (5, 3) and (np.diff(quantiles) >= 0).all() and nothing.shape == (5, 3)
    truth = [outcome(1.0, c["x"], 1.0) for c in CANDIDATES]
    assert np.abs(quantiles[:, 1] - truth).mean() < 0.3 * np.abs(nothing[order][:, 1] - truth).mean()
    assert set(np.argsort(quantiles[:, 1])[:2]) == {3, 4}
    failed = [trials[0]._replace(status="FAIL", outcome=np.nan)]
    np.testing.assert_array_equal(g.predict(failed), nothing)


def test_pending_trials_are_not_repeated_and_failed_ones_are_closed(g):
    searcher, state = begin(g, first=[CANDIDATES[3], CANDIDATES[1]])
    trials, state = searcher.ask(state, 9)
    assert [t.configuration for t in trials[:2]] == [CANDIDATES[3], CANDIDATES[1]]
    assert [t.fidelity for t in trials] == [0.25] * 5 and len({t.trial for t in trials}) == 5
    state = searcher.tell(state, [trials[0]._replace(status="FAIL"), trials[1]._replace(status="PRUNED"), *trials[2:4]])
    assert searcher.ask(state, 1)[0] == []  # two are closed, and three run still: "WAITING" ends nothing
    state = searcher.tell(state, [completed(trials[4], 0.5)])
    (open_trial, *rest), _ = searcher.ask(state, 3)
    assert (open_trial.trial, open_trial.fidelity) == (4, 0.5) and rest == []


def test_enqueued_and_foreign_trials_that_are_no_candidates_are_ignored_with_a_warning(g, caplog):
    searcher = blackbox.enqueue(g.searcher(), [{"x": 0.3}, {"x": 0.75}])  # the first one is not a candidate
    state, proposed = searcher.init(jax.random.key(0), SPACE), []
    for _ in range(len(CANDIDATES) * len(FIDELITIES)):
        trials, state = searcher.ask(state, 1)
        proposed += trials
        state = searcher.tell(state, [completed(trial, 0.7) for trial in trials])
    tried = [(trial.configuration["x"], trial.fidelity) for trial in proposed]
    # The second is at its full budget by then.
    assert tried[:2] == [(0.3, 1.0), (0.75, 1.0)]
    assert set(tried[2:]) == {(c["x"], f) for c in CANDIDATES if c["x"] != 0.75 for f in FIDELITIES}
    assert caplog.messages == [
        "1 of 1 records do not fit this searcher. They are not used. The first: {'x': 0.3} is not one of the "
        "candidates, which are the configurations of the earlier tasks."
    ]
    others = [base.Record("", {"x": x}, 1.0, f) for x, f in (("far", 1.0), ([0], 1.0), (0.5, 0.3))]
    caplog.clear()
    assert searcher.tell(state, [*others, base.Record("", {"y": 0.5}, 1.0)]).searcher == state.searcher
    assert [text.partition(" The first: ")[0] for text in caplog.messages] == [
        "3 of 4 records do not fit this searcher. They are not used."
    ]


def test_the_outcome_of_a_pruned_trial_is_not_used_and_the_trial_is_closed(g):
    """It is the outcome of some fidelity below the one that was asked for."""
    searcher, state = begin(g)
    first_trials, state = searcher.ask(state, 5)
    state = searcher.tell(state, [completed(t, 0.5) for t in first_trials])
    (first,), state = searcher.ask(state, 1)
    half_way = first._replace(status="PRUNED", outcome=outcome(0.5, first.configuration["x"], 0.3))
    pruned_state = searcher.tell(state, [half_way])
    assert (
        pruned_state.seen == state.seen
        and len(pruned_state.seen) == 5
        and len(pruned_state.closed) == 1
        and pruned_state.pending == ()
    )
    assert first.trial not in {t.trial for t in searcher.ask(pruned_state, 4)[0]}
    ended = [completed(t, 0.5) for t in first_trials]
    np.testing.assert_array_equal(g.predict([*ended, half_way]), g.predict(ended))
    # Nor is it an end that others would have to be better than.
    full = half_way._replace(fidelity=1.0, outcome=-9.0)
    np.testing.assert_array_equal(g.predict([full]), g.predict())
    for record in (full, full._replace(outcome=np.nan)):
        assert searcher.tell(begin(g)[1], [record]).seen == ()


def test_a_bounded_number_of_outcomes_is_read_and_no_trial_is_repeated(g):
    # One has only begun, long ago and badly, and one has not been at the last fidelity.
    every = [(4, 0, 9.0), *((c, j, c / 10 + (2 - j)) for j in range(3) for c in range(4))][:-1]
    entries = lambda observed: [
        (int(c), int(j))
        for c, j, mask in zip(observed.candidate, observed.fidelity, observed.mask, strict=True)
        if mask
    ]
    assert entries(_freeze_thaw._padded(every)) == [(c, j) for c, j, _ in every]
    # The latest outcome of each candidate, and two earlier ones.
    assert entries(_freeze_thaw._padded(every, max_seen=7)) == [(4, 0), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2)]
    # The best two of these latest outcomes, and the last two others.
    assert entries(_freeze_thaw._padded(every, max_seen=4)) == [(3, 1), (0, 2), (1, 2), (2, 2)]
    searcher, state = begin(g)
    runs = []
    for _ in range(15):
        (trial,), state = searcher.ask(state, 1)
        runs.append((trial.trial, trial.fidelity))
        state = searcher.tell(state, [completed(trial, 0.7)])
    assert len(set(runs)) == 15 and searcher.ask(state, 1)[0] == []


def test_pruned_trials_of_earlier_tasks_do_not_bend_their_curves():
    records = [
        base.Record(str(task), c, outcome(task, c["x"], f), f)
        for task in (0.0, 0.5, 1.0)
        for c in CANDIDATES
        for f in FIDELITIES
    ]
    early = base.Record("0.5", CANDIDATES[2], outcome(0.5, 0.5, 0.3), 1.0, status="PRUNED")
    one, other = (
        blackbox.train_curve_searcher(r, space=SPACE, num_steps=0).surrogate.mean for r in (records, [*records, early])
    )
    np.testing.assert_array_equal(one, other)


def test_without_resuming_full_budgets_are_asked_for_the_best_candidates_first(g):
    searcher, state = begin(g, resumes=False, first=[CANDIDATES[0]])
    runs = []
    for _ in CANDIDATES:
        (trial,), state = searcher.ask(state, 1)
        state = searcher.tell(state, [completed(trial, 0.7)])
        runs.append(trial)
    assert {t.fidelity for t in runs} == {1.0} and {t.configuration["x"] for t in runs} == {0, 0.25, 0.5, 0.75, 1}
    assert runs[0].configuration == CANDIDATES[0] and CANDIDATES[3] in [t.configuration for t in runs[1:3]]
    assert searcher.ask(state, 1)[0] == []
    # Every trial costs a full budget, and outcomes below the full budget still count.
    low = [base.Record("", c, outcome(0.7, c["x"], f), f) for c in CANDIDATES for f in (0.25, 0.5)]
    (trial,), _ = searcher.ask(searcher.tell(begin(g, resumes=False)[1], low), 1)
    assert (trial.fidelity, trial.configuration) == (1.0, CANDIDATES[3])


def test_without_resuming_a_trial_that_has_begun_is_not_cheaper(g):
    """The best candidate has been at a quarter of the budget, and the second best at half of it."""
    nums = (3, 0, 1, 2, 0)  # of fidelities per candidate
    begun = [
        base.Record("", c, outcome(0.5, c["x"], f), f)
        for c, num in zip(CANDIDATES, nums, strict=True)
        for f in FIDELITIES[:num]
    ]
    for resumes, expected in ((True, (CANDIDATES[3], 1.0)), (False, (CANDIDATES[2], 1.0))):
        searcher, state = begin(g, resumes=resumes)
        (trial,), _ = searcher.ask(searcher.tell(state, begun), 1)
        assert (trial.configuration, trial.fidelity) == expected


def test_another_search_may_have_other_fidelities(g):
    searcher, state = begin(g)
    (trial,), state = searcher.ask(state, 1)
    record = completed(trial, 0.5)._replace(fidelity=0.2501)
    assert searcher.tell(state, [record._replace(seed=trial.seed + 1)]) == state  # another search's
    rounded = searcher.tell(state, [record._replace(fidelity=0.25 + 1e-8)])
    assert rounded.pending == () and len(rounded.seen) == 1


def test_a_fidelity_that_rounds_to_one_is_the_full_budget():
    records = [
        base.Record(str(task), c, outcome(task, c["x"], f), 0.9999999 if task == 0.5 and f == 1 else f)
        for task in (0.0, 0.5, 1.0)
        for c in CANDIDATES
        for f in FIDELITIES
    ]
    g = blackbox.train_curve_searcher(records, space=SPACE, num_steps=0)
    assert g.surrogate.fidelities.tolist() == list(FIDELITIES)
