"""g whose expectations are those of transformers over trials: predictions, trials, failures, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt
from metaopt import blackbox, spaces
from metaopt.base import Record
from metaopt.blackbox import _fit_networks, _meta_search, _new_trials, _surrogates, _transformer

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
    return blackbox.train_meta_optimizer(
        records, space=SPACE, features=features, num_steps=200, num_members=2, transformers=1, transformer_share=1.0
    )


@pytest.fixture(scope="module")
def untrained():
    """Five tasks of eight trials, the last of which failed; random networks."""
    records = [
        Record(f"t{t}", c, loss(c, t / 5), status="FAIL" if i == 7 else "COMPLETE")
        for t in range(5)
        for i, c in enumerate(LINE[::3] + LINE[1:2])
    ]
    h = blackbox.train_meta_optimizer(
        records, space=SPACE, candidates=LINE, num_steps=0, transformers=2, transformer_share=1.0
    )
    rng = np.random.default_rng(0)
    random = lambda leaf: leaf + rng.normal(size=leaf.shape) / 10
    return rebuilt(h, LINE, transformers=jax.tree.map(random, h.surrogate.transformers))


def rebuilt(g, candidates=None, **changes):
    return _meta_search.meta_optimizer(g.surrogate._replace(**changes), None, SPACE, candidates)


def run(searcher, best, num, batch=1, fails=lambda x: False):
    state, ended = searcher.init(jax.random.key(0), None), []
    while len(ended) < num:
        trials, state = searcher.ask(state, batch)
        batch_ended = [
            trial._replace(status="FAIL")
            if fails(trial.configuration["x"])
            else trial._replace(status="COMPLETE", outcome=loss(trial.configuration, best))
            for trial in trials
        ]
        ended += batch_ended
        state = searcher.tell(state, batch_ended)
    return ended


@pytest.mark.slow
def test_they_predict_from_features_and_adapt_to_trials(g):
    regrets, blind = [], []
    for best in (0.1, 0.3, 0.7, 0.9):
        assert abs(g.predict([best])["x"] - best) < 0.2  # without features, 0.4 for the outer two
        tried = run(g.searcher([best], first=()), best, 4)
        assert tried[0].configuration == g.predict([best])
        assert min(record.outcome for record in tried) < 3.0 + 0.01
        # Nothing is known of the task, but for three trials.
        three = [{"x": 0.2}, {"x": 0.5}, {"x": 0.8}]
        predicted = g.outcomes(LINE, tried=three, outcomes=[loss(c, best) for c in three])
        regrets.append(abs(LINE[int(predicted.mean.argmin())]["x"] - best))
        blind.append(abs(g.predict()["x"] - best))
    assert np.mean(regrets) < 0.6 * np.mean(blind), (regrets, blind)
    other = [
        g.suggest([{"x": 0.2}, {"x": 0.6}, {"x": 0.9}], [a + b * y for y in (9, 1, 4)])[0]
        for a, b in ((0, 1), (5, 1e3))
    ]
    assert other[0]["x"] == pytest.approx(other[1]["x"], abs=1e-3)
    # A failure and a second outcome say more than one outcome.
    predicted = g.outcomes(LINE, [0.3], tried=[{"x": 0.1}, {"x": 0.6}, {"x": 1.0}], outcomes=[3.04, 3.09, np.nan])
    blank = g.outcomes(LINE, tried=LINE[:1], outcomes=[3.04])
    assert np.ptp(predicted.quantiles[:14], axis=1).mean() < 0.7 * np.ptp(blank.quantiles[:14], axis=1).mean()


@pytest.mark.slow
def test_they_foresee_failures_from_features_and_from_trials(g):
    def failure(features, x_new, x, y):
        networks = _surrogates.at_task(g.surrogate, features).transformers
        trials = np.reshape(x, (-1, 1)), np.array(y, float), np.ones(len(y))
        representation = _transformer.read_trials(networks, trials)
        return float(_transformer.predict_binned(networks, representation, np.array([[x_new]])).failure[0])

    assert failure(np.array([0.3]), 0.9, [], []) > 0.7 > 0.2 > failure(np.array([0.3]), 0.7, [], [])
    failed, ended = [3.0, np.nan], [3.0, 3.1]
    assert failure(None, 0.7, [0.2, 0.6], failed) > 0.3 > 2 * failure(None, 0.7, [0.2, 0.6], ended)
    assert failure(None, 0.4, [0.2, 0.6], failed) < 0.1


@pytest.mark.slow
def test_transformers_change_the_trials_only_with_a_positive_share(g):
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
    assert min(loss({"x": x}, 0.4) for x in tried if x <= 0.7) < 3.01 and len(set(tried)) == 9
    first, state = searcher.ask(searcher.init(jax.random.key(0), None), 2)
    state = searcher.tell(state, [first[0]._replace(status="COMPLETE", outcome=3.0)])
    one, other = (searcher.ask(state, 2)[0] for _ in range(2))
    assert one == other and one[0].configuration != one[1].configuration  # pure


@pytest.mark.slow
def test_a_batch_does_not_repeat_running_trials(g):
    """After one bad trial, what runs is believed to be better, and promises nothing once more."""
    searcher = g.searcher(first=[{"x": 0.95}])
    (first,), state = searcher.ask(searcher.init(jax.random.key(0), None), 1)
    state = searcher.tell(state, [first._replace(status="COMPLETE", outcome=4.0)])
    trials, _ = searcher.ask(state._replace(num_asked=4), 3)  # of which none is random
    x = np.sort([record.configuration["x"] for record in trials])
    assert np.diff(x).min() > 0.03, x


@pytest.mark.slow
def test_of_many_trials_the_best_and_the_latest_are_read(g):
    """A suggestion does not depend on the configurations of other trials."""
    h = rebuilt(g)
    many = np.random.default_rng(0).uniform(size=100)
    y = np.array([loss({"x": x}, 0.4) for x in many])

    def suggested(*moved):
        tried = [{"x": float(1 - x if i in moved else x)} for i, x in enumerate(many)]
        return h.suggest(tried, y)

    read = _new_trials.best_and_latest(y, h.surrogate.max_shown)
    assert len(read) == h.surrogate.max_shown <= 16
    assert suggested(*set(range(100)) - set(read)) == suggested()
    assert np.mean([suggested(i) != suggested() for i in read]) > 0.5
    # The number of trials in its training, padded.
    arrays = _new_trials.shown_to_transformers(many[:, None], y, h.surrogate.max_shown)
    assert [array.shape for array in arrays] == [(16, 1), (16,), (16,)]
    np.testing.assert_array_equal(_new_trials.best_and_latest(np.array([5, 1, 4, 2, 3, np.nan]), 4), [1, 3, 4, 5])


@pytest.mark.slow
def test_a_loaded_optimizer_continues_a_killed_search(g, tmp_path):
    h = rebuilt(g, LINE, transformer_share=0.25)
    metaopt.save(tmp_path / "h.npz", h)
    loaded = metaopt.load(tmp_path / "h.npz")
    assert jax.tree.structure(loaded.surrogate) == jax.tree.structure(h.surrogate)
    for one, other in zip(jax.tree.leaves(loaded.surrogate), jax.tree.leaves(h.surrogate), strict=True):
        np.testing.assert_array_equal(one, other)
    with np.load(tmp_path / "h.npz") as file:
        arrays = dict(file)
    for name in ("transformers.head", "transformers.layers['up']"):
        np.savez(tmp_path / "wrong.npz", **arrays | {f"outcome.{name}": arrays[f"outcome.{name}"][..., :-1]})
        with pytest.raises(ValueError, match="does not describe .* have shapes"):
            metaopt.load(tmp_path / "wrong.npz")

    def collect(searcher, num, **kwargs):
        return blackbox.collect(
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
    assert plain(collect(loaded.searcher(), 8, store=tmp_path / "r.db")) == plain(collect(h.searcher(), 8))


@pytest.mark.slow
def test_predicted_outcomes_are_conditional_on_success_and_finite_at_certain_failure(untrained):
    """In float32, as users have it."""
    with jax.enable_x64(False):
        cast = lambda leaf: leaf.astype("float32") if isinstance(leaf, jax.Array) else leaf
        one = jax.tree.map(lambda leaf: leaf[:1], untrained.surrogate.transformers)
        surrogate = jax.tree.map(cast, untrained.surrogate._replace(transformers=one))
        bias, predicted = surrogate.transformers.head_bias, []
        for failure in (0.0, 25.0):
            transformers = surrogate.transformers._replace(head_bias=bias.at[:, -1].add(failure))
            h = _meta_search.meta_optimizer(surrogate._replace(transformers=transformers), None, SPACE, LINE)
            predicted.append(h.outcomes(LINE, tried=LINE[:3] + LINE[-1:], outcomes=[3.1, 3.0, 3.2, np.nan]))
        np.testing.assert_allclose(predicted[1].mean, predicted[0].mean, rtol=1e-4)
        np.testing.assert_allclose(predicted[1].quantiles, predicted[0].quantiles, rtol=1e-4)


@pytest.mark.slow
def test_at_most_as_many_trials_are_read_as_in_training_and_diverged_ones_are_clipped(untrained):
    """Predictions depend on the best three trials, the last failed one and the latest three others."""
    h, everywhere = untrained, rebuilt(untrained)
    assert h.surrogate.max_shown == 7
    y = [3.3, 3.1, 3.2, 3.5, 3.6, 3.0, np.nan, 3.4, 3.6, 3.4, 1e6, 3.9]

    def read_by(function):
        """The trials whose configurations change the result."""
        moved = [[*LINE[:i], {"x": 0.93}, *LINE[i + 1 : 12]] for i in range(12)]
        return [i for i in range(12) if function(moved[i]) != function(LINE[:12])]

    read = read_by(lambda tried: h.outcomes(LINE, tried=tried, outcomes=y).mean.tolist())
    assert read == [1, 2, 5, 6, 9, 10, 11]
    # A maximum does not change with every trial that is read.
    read_for_suggestions = read_by(lambda tried: everywhere.suggest(tried, y))
    assert set(read_for_suggestions) <= set(read) and len(read_for_suggestions) > 3
    limit = 3.0 + 2 * float(np.exp(h.surrogate.log_scales.max()))  # twice the largest scale of earlier tasks
    near, far, at_limit, below = (
        h.outcomes(LINE, tried=LINE[:12], outcomes=np.where(np.array(y) == 1e6, diverged, y))
        for diverged in (1e6, 1e9, limit, limit - 0.3)
    )
    np.testing.assert_allclose(near.quantiles, far.quantiles, rtol=1e-3)
    np.testing.assert_allclose(near.mean, at_limit.mean, rtol=1e-9)
    assert limit < 3.0 + 4 and np.abs(near.mean - below.mean).max() > 1e-4


def test_best_and_latest_selects_trials_and_outliers_are_clipped():
    nan, y = np.nan, np.arange(20.0)[::-1].copy()
    y[[0, 3]] = nan
    # The best four, the latest, which are the same, and of the failures the latest as far as a quarter.
    np.testing.assert_array_equal(_new_trials.best_and_latest(y, 8), [0, 3, 14, 15, 16, 17, 18, 19])
    np.testing.assert_array_equal(_new_trials.best_and_latest(y[:10], 2), [3, 9])
    np.testing.assert_array_equal(_new_trials.best_and_latest(np.full(9, nan), 3), [6, 7, 8])
    np.testing.assert_array_equal(_new_trials.best_and_latest(y, 20), np.arange(20))
    clipped = _new_trials.without_outliers(np.array([5.0, 5.1, nan, 5.2, 1e6]))
    np.testing.assert_allclose(clipped, [5.0, 5.1, nan, 5.2, 5.8])
    for same in ([0.0, 0.0, 0.0, 1.0], [0.0, 0.2, 9.0], [0.1, nan]):
        np.testing.assert_array_equal(_new_trials.without_outliers(np.array(same)), same)


@pytest.mark.once
def test_the_mean_of_others_leaves_out_the_trials_to_predict():
    """The mean over tasks would hold a task's own outcomes, and those of near-duplicates: they are left out."""
    f = np.random.default_rng(0).normal(size=(6, 4))  # of four tasks
    functions = np.concatenate([f.mean(1, keepdims=True), f - f.mean(1, keepdims=True)], 1)
    means = _fit_networks.mean_of_others(functions, np.array([True, False, True, False]))
    np.testing.assert_allclose(means, f[:, [1, 3]].mean(1))
    np.testing.assert_array_equal(_fit_networks.mean_of_others(functions, np.ones(4, bool)), np.zeros(6))
    # Other outcomes of one task of a family do not change which trials of this family are shown.
    x, y = np.linspace(0, 1, 8)[:, None], np.random.default_rng(1).normal(size=(3, 8))
    kernel = _surrogates.Kernel(jnp.array([-0.5]), jnp.array(1.5), jnp.array(-2.0))
    family, shown = ["one", "two", "one"], []
    for first in (y[0], -10 * y[0]):
        trials = [_surrogates.TaskTrials(x, outcomes) for outcomes in (first, y[1], y[2])]
        surrogate = _surrogates.surrogate(trials, kernel, x)
        sample_tasks = _fit_networks.sample_shown([0, 1, 2], trials, surrogate, family, 7)
        shown.append([sample_tasks(key)[0] for key in jax.random.split(jax.random.key(0), 4)])
    # Which task is drawn shows in its outcomes: the second task is the other family.
    second = _surrogates.normalize(y[1])[0]
    is_second = lambda values: all(np.isclose(values[:, None], second[None]).any(1))
    same, other = [], []
    for (x_one, y_one, mask), (x_two, _, _) in zip(
        *([jax.tree.map(np.asarray, s) for s in v] for v in shown), strict=True
    ):
        for task in range(len(mask)):
            real = mask[task] > 0
            if real.sum() > 1:
                equal = np.array_equal(x_one[task], x_two[task])
                (other if is_second(y_one[task][real]) else same).append(equal)
    assert all(same) and not all(other) and len(same) > 9
