"""g whose expectations are those of transformers over trials: predictions, trials, failures, files."""

from typing import Any

import jax
import numpy as np
import pytest

from metaopt import Record, methods, predictors, spaces, tasks
from metaopt.methods import _meta_search

SPACE = {"x": spaces.interval(0.0, 1.0)}
LINE = [{"x": float(x)} for x in np.linspace(0, 1, 21)]


def loss(configuration, best):
    return 3.0 + (configuration["x"] - best) ** 2


@pytest.fixture(scope="module")
def g():
    """A task's feature is where its best is, and beyond .7 above it all fails."""
    rng, records, features = np.random.default_rng(0), [], {}
    for t, best in enumerate(rng.uniform(size=60)):
        features[f"t{t}"] = [best]
        for c in [LINE[i] for i in rng.permutation(21)[: rng.integers(8, 16)]]:
            failed = c["x"] > best + 0.5
            records.append(
                Record(f"t{t}", c, np.nan if failed else loss(c, best), status="FAIL" if failed else "COMPLETE")
            )
    return methods.train_meta_optimizer(
        records, space=SPACE, features=features, num_steps=200, num_members=2, transformers=1, transformer_share=1.0
    )


def rebuilt(g, candidates=None, **changes):
    return _meta_search.meta_optimizer(g.surrogate._replace(**changes), None, SPACE, candidates)


def run(searcher, best, num, batch=1, fails=lambda x: False):
    state, told = searcher.init(jax.random.key(0), None), []
    while len(told) < num:
        asked, state = searcher.ask(state, batch)
        done = [
            trial._replace(status="FAIL")
            if fails(trial.configuration["x"])
            else trial._replace(status="COMPLETE", outcome=loss(trial.configuration, best))
            for trial in asked
        ]
        told += done
        state = searcher.tell(state, done)
    return told


@pytest.mark.slow
def test_they_predict_from_features_and_adapt_to_trials(g):
    told, blind = [], []
    for best in (0.1, 0.3, 0.7, 0.9):
        assert abs(g.predict([best])["x"] - best) < 0.15
        tried = run(g.searcher([best], first=()), best, 4)
        assert tried[0].configuration == g.predict([best])
        assert min(record.outcome for record in tried) < 3.0 + 0.01
        # Nothing is known of the task, but for three trials.
        at = [{"x": 0.2}, {"x": 0.5}, {"x": 0.8}]
        found = g.outcomes(LINE, tried=at, outcomes=[loss(c, best) for c in at])
        told.append(abs(LINE[int(found.mean.argmin())]["x"] - best))
        blind.append(abs(g.predict()["x"] - best))
    assert np.mean(told) < 0.6 * np.mean(blind), (told, blind)
    other = [
        g.suggest([{"x": 0.2}, {"x": 0.6}, {"x": 0.9}], [a + b * y for y in (9, 1, 4)])[0]
        for a, b in ((0, 1), (5, 1e3))
    ]
    assert other[0]["x"] == pytest.approx(other[1]["x"], abs=1e-3)
    # What is believed is so, with a probability that failures take no part of.
    found = g.outcomes(LINE, [0.3], tried=[{"x": 0.1}, {"x": 0.5}, {"x": 1.0}], outcomes=[3.04, 3.04, np.nan])
    assert LINE[int(found.mean[:14].argmin())]["x"] == pytest.approx(0.3, abs=0.1)
    assert (np.diff(found.quantiles, axis=1) > 0).all()
    # What fails is left, and what has not been seen to fail is tried.
    tried = [record.configuration["x"] for record in run(g.searcher([0.8], first=()), 0.3, 6, fails=lambda x: x > 0.6)]
    assert tried[0] > 0.6 and sum(x > 0.6 for x in tried) <= 3


@pytest.mark.slow
def test_without_a_share_they_change_nothing_and_with_some_they_do(g):
    without = rebuilt(g, LINE, transformers=None)
    none, half = (rebuilt(g, LINE, transformer_share=share) for share in (0.0, 0.5))
    trials = [[r.configuration for r in run(h.searcher([0.3]), 0.6, 6, batch=2)] for h in (without, none, half)]
    assert trials[0] == trials[1] != trials[2]
    assert without.portfolio(4, [0.3]) == none.portfolio(4, [0.3])
    assert len({c["x"] for c in half.portfolio(4, [0.3])}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("acquisition", ["ei", "ucb", "thompson"])
def test_every_acquisition_goes_on_in_batches_with_failures_and_repeats_nothing(g, acquisition):
    searcher = rebuilt(g, LINE, transformer_share=0.5).searcher(acquisition=acquisition)
    tried = [r.configuration["x"] for r in run(searcher, 0.4, 9, batch=3, fails=lambda x: x > 0.7)]
    assert len(set(tried)) == 9
    first, state = searcher.ask(searcher.init(jax.random.key(0), None), 2)
    state = searcher.tell(state, [first[0]._replace(status="COMPLETE", outcome=3.0)])
    one, other = (searcher.ask(state, 2)[0] for _ in range(2))
    assert one == other and one[0].configuration != one[1].configuration  # pure


@pytest.mark.slow
def test_many_trials_are_seen_through_the_best_and_the_latest(g, monkeypatch):
    seen = []
    read = predictors.read_trials
    monkeypatch.setattr(predictors, "read_trials", lambda *args: seen.append(args[1][0].shape) or read(*args))
    h = rebuilt(g)
    many = np.random.default_rng(0).uniform(size=100)
    h.suggest([{"x": float(x)} for x in many], [loss({"x": x}, 0.4) for x in many])
    assert seen[-1] == (64, 1)  # 32, padded
    np.testing.assert_array_equal(_meta_search._best_and_latest(np.array([5, 1, 4, 2, 3, np.nan]), 4), [1, 3, 4, 5])


@pytest.mark.slow
def test_they_come_back_from_disk_and_go_on_after_a_kill(g, tmp_path):
    h = rebuilt(g, LINE, transformer_share=0.25)
    methods.save_meta_optimizer(tmp_path / "h.npz", h)
    again = methods.load_meta_optimizer(tmp_path / "h.npz")
    assert jax.tree.structure(again.surrogate) == jax.tree.structure(h.surrogate)
    for one, other in zip(jax.tree.leaves(again.surrogate), jax.tree.leaves(h.surrogate), strict=True):
        np.testing.assert_array_equal(one, other)
    with np.load(tmp_path / "h.npz") as file:
        arrays = dict(file)
    for name in ("transformers.head", "transformers.layers['up']"):
        np.savez(tmp_path / "wrong.npz", **arrays | {f"outcome.{name}": arrays[f"outcome.{name}"][..., :-1]})
        with pytest.raises(ValueError, match="does not describe .* have shapes"):
            methods.load_meta_optimizer(tmp_path / "wrong.npz")

    def collect(searcher, num, **kwargs):
        return tasks.collect(
            lambda trial, task: loss(trial.configuration, 0.35),
            SPACE,
            {"t": 0},
            num_trials=num,
            searcher=searcher,
            key=jax.random.key(1),
            isolated=False,
            progress=False,
            **kwargs,
        )

    plain = lambda records: [(r.configuration, r.seed, r.outcome) for r in records]
    collect(h.searcher(), 4, store=tmp_path / "r.db")
    assert plain(collect(again.searcher(), 8, store=tmp_path / "r.db")) == plain(collect(h.searcher(), 8))


def test_what_is_wrong_is_said():
    records = [Record("t", c, loss(c, 0.4)) for c in LINE]
    refused: list[tuple[Any, str]] = [
        ({"transformers": -1}, "`transformers` must be"),
        ({"transformer_share": 2}, r"`transformer_share` must lie in \[0, 1\]; got 2"),
    ]
    for kwargs, message in refused:
        with pytest.raises(ValueError, match=message):
            methods.train_meta_optimizer(records, space=SPACE, **kwargs)
    with pytest.raises(ValueError, match="`width` must be a multiple of 4"):
        predictors.init_transformer(jax.random.key(0), 1, 0, width=6)
