"""h by an encoder of cells, on tasks whose best cells are known."""

import contextlib
import itertools
import json
import signal
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from scipy.stats import rankdata

import metaopt
from metaopt import base, blackbox, nas, spaces
from metaopt.blackbox._earlier_trials import by_task, features_by_task
from metaopt.nas.search import _cell_encoder, _score_prior
from metaopt.nas.search._cell_searcher import cell_searcher
from metaopt.nas.search._train_cell_searcher import _losses

KEY = jax.random.key(0)
OPS = ("none", "a", "b", "c")
CELLS = [{"e0": x, "e1": y, "e2": z} for x, y, z in itertools.product(OPS, repeat=3)]


def graph(cell):
    edges = [(0, 1, cell["e0"]), (1, 2, cell["e1"]), (0, 2, cell["e2"])]
    return nas.edge_graph(edges, output=(2,))


def loss(cell, share):
    """Some tasks want the op a, some b, and all of them a path of two."""
    ops = list(cell.values())
    on_path = "none" not in ops[:2]
    return 30 - 4 * on_path - share * ops.count("a") - (1 - share) * ops.count("b")


def records(shares, cells=CELLS):
    return [base.Record(f"t{share}", cell, loss(cell, share)) for share in shares for cell in cells]


SPACE = {name: spaces.choice(OPS) for name in CELLS[0]}
SHARES = (0.0, 0.1, 0.2, 0.8, 0.9, 1.0)


def trained(trials, **options):
    return nas.train_cell_searcher(trials, graph, width=8, num_layers=1, num_members=2, batch_size=32, **options)


@pytest.fixture(scope="module")
def h():
    """Learned from half of all cells, not the same on all tasks; the op "c" fails where it comes first."""
    rng = np.random.default_rng(0)
    half = [record for record in records(SHARES) if rng.uniform() < 0.5]
    half = [
        record._replace(outcome=float("nan"), status="FAIL") if record.configuration["e0"] == "c" else record
        for record in half
    ]
    half += [
        record._replace(outcome=0.0, status="PRUNED") for record in half if "none" in record.configuration.values()
    ]
    return trained(half, features={f"t{s}": [s] for s in SHARES}, candidates=CELLS, num_steps=60, rate=2e-2)


@pytest.mark.once
def test_it_reads_the_task_ranks_cells_that_were_never_tried_and_avoids_what_fails(h):
    fails, dead = (np.array([cell["e0"] == op for cell in CELLS]) for op in ("c", "none"))
    for share in (0.05, 0.95):
        losses = np.array([loss(cell, share) for cell in CELLS])
        scores = h.scores(base.Task(None, None, np.array([share])))
        np.testing.assert_allclose([scores.mean(1), scores.std(1)], [[0, 0], [1, 1]], atol=1e-6)
        mean = scores.mean(0)
        assert mean[fails].mean() < mean[dead].mean() < mean[~fails & ~dead].mean()
        ended = [(m, -y) for m, y, f in zip(mean, losses, fails, strict=True) if not f]
        assert np.corrcoef(rankdata(ended, axis=0).T)[0, 1] > 0.6
        assert loss(h.predict([share]), share) - losses.min() < 0.5 and h.predict([share])["e0"] != "c"
    assert h.predict([0.05]) != h.predict([0.95])
    assert {"none"}.isdisjoint(list(h.predict().values())[:2])  # what all tasks want, where nothing is known
    np.testing.assert_array_equal(h.scores([np.nan]), h.scores())
    # Scores are those of the encoder itself, of each member.
    assert h.encoded.shape == (2, len(CELLS), 8)
    graphs = [graph(cell) for cell in CELLS]
    cells = _cell_encoder.cells(graphs, sorted({op for each in graphs for op in each.ops}))
    second = jax.tree.map(lambda x: x[1], h.meta_params)
    raw = jax.jit(h.encoder.score)(second, cells, (np.array([0.3]) - np.mean(SHARES)) / np.std(SHARES))
    np.testing.assert_allclose(h.scores([0.3])[1], (raw - raw.mean()) / raw.std(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"must have features of shape \[1\]; got shape \(2,\)"):
        h.predict([0.1, 0.2])
    with pytest.raises(ValueError, match="those features as an array of numbers"):
        h.predict({"share": 0.1})


def unlike(cell):
    """A task that wants what no earlier one did."""
    return 30 - 3 * list(cell.values()).count("c") - (cell["e2"] == "none")


@pytest.mark.once
def test_trials_on_an_unusual_task_correct_its_prediction(h):
    losses = np.array([unlike(cell) for cell in CELLS])
    searcher = h.searcher()
    state = start = searcher.init(KEY, None)
    tried = []
    for _ in range(8):
        trials, state = searcher.ask(state, 2)
        tried += [trial.configuration for trial in trials]
        ended = [trial._replace(outcome=unlike(trial.configuration), status="COMPLETE") for trial in trials]
        state = searcher.tell(state, ended)
    assert len({tuple(cell.values()) for cell in tried}) == 16 == len(state.trials) and trials[1].trial == 15
    assert unlike(h.predict(trials=state.trials)) <= np.quantile(losses, 0.1) < unlike(h.predict()) - 1
    assert h.suggest([0.05]) != h.suggest([0.95]) == h.searcher([0.95]).ask(start, 1)[0][0].configuration
    # The same by hand; trials that run are not proposed again, and what says nothing changes nothing.
    ended = list(state.trials)
    assert h.suggest(trials=ended) == searcher.ask(state, 1)[0][0].configuration
    running = base.Record("", h.suggest(trials=ended), status="RUNNING")
    low = base.Record("", CELLS[50], 0.0, fidelity=0.5)
    assert h.suggest(trials=[*ended, running, low]) != running.configuration
    (mean, variance), (before, wide) = h.posterior(trials=[*ended, running, low]), h.posterior()
    np.testing.assert_array_equal(mean, h.posterior(trials=ended)[0])
    rounded = [record._replace(fidelity=1 - 1e-8) for record in ended]  # the full budget
    np.testing.assert_array_equal(mean, h.posterior(trials=rounded)[0])
    assert (variance <= wide).all() and np.abs(mean - before).max() > 0.5
    failed = h.posterior(trials=[ended[0], base.Record("", ended[1].configuration, status="FAIL")])[0]
    diverged = h.posterior(trials=[ended[0], ended[1]._replace(outcome=-1e9)])[0]
    row = CELLS.index(ended[1].configuration)
    assert failed[row] < before[row] < diverged[row]
    every = [base.Record("", cell, loss) for cell, loss in zip(CELLS, losses, strict=True)]
    assert h.suggest(trials=every) == h.predict(trials=every) and unlike(h.predict(trials=every)) == losses.min()
    with pytest.raises(ValueError, match="A trial must be one of the candidates; got {'e0': 'z'}"):
        h.predict(trials=[base.Record("", {"e0": "z"}, 1.0)])


def of_prior(mean):
    """A searcher of six candidates whose encoder says nothing."""
    zeros, rng = np.zeros((1, 6, 2)), np.random.default_rng(0)
    features, spread = rng.normal(size=(6, 3)), 0.3 * rng.normal(size=(6, 2))
    prior = _score_prior.ScorePrior(features, np.array(mean), spread, np.full(3, 0.1), np.full(6, 0.2), 0.05)
    encoder = SimpleNamespace(coefficients=lambda meta_params, features: meta_params)
    cells = [{"op": i} for i in range(6)]
    return cell_searcher(zeros, encoder, zeros[:, 0], cells, ("a",), np.zeros(0), np.ones(0), prior, np.zeros(()))


def test_failed_cells_are_not_predicted():
    h = of_prior([9.0, 8.0, 0.0, 0.0, 0.0, -9.0])
    failed = [base.Record("", {"op": i}, float("nan"), status="FAIL") for i in range(6)]
    assert h.predict() == {"op": 0} and h.predict(trials=failed[:1]) == h.suggest(trials=failed[:1]) == {"op": 1}
    # However little is expected of others.
    assert h.predict(trials=failed[:5]) == {"op": 5}
    assert h.predict(trials=failed) == h.suggest(trials=failed) == {"op": 0}  # all have failed
    ended = base.Record("", {"op": 5}, 1.0)
    assert h.predict(trials=[*failed[:5], ended]) == h.suggest(trials=[*failed[:5], ended]) == {"op": 5}
    assert h.predict(trials=[failed[0], base.Record("", {"op": 0}, 1.0)]) == {"op": 0}  # not with each seed


def test_cells_with_a_trial_are_not_proposed_again():
    h = of_prior([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    for part in ({"status": "PRUNED"}, {"status": "COMPLETE", "fidelity": 0.3}, {"status": "FAIL"}, {}):
        searcher = h.searcher()
        state, trials = searcher.init(KEY, None), []
        for _ in range(6):
            (trial,), state = searcher.ask(state, 1)
            trials.append(trial._replace(outcome=0.5)._replace(**part))
            state = searcher.tell(state, trials[-1:])
        assert sorted(trial.configuration["op"] for trial in trials) == list(range(6))
        is_silent = "PRUNED" not in part.values() and "fidelity" not in part  # of scores; others are named below
        with (
            contextlib.nullcontext() if is_silent else pytest.warns(UserWarning, match="they do not change the scores")
        ):
            assert h.suggest(trials=trials[:1]) != trials[0].configuration
    # A rung compares different cells.
    asha = blackbox.asha(h.searcher(), reduction_factor=3, num_rungs=2)
    state, trials = asha.init(KEY, {"op": spaces.integer(0, 5)}), []
    for _ in range(4):
        (trial,), state = asha.ask(state, 1)
        trials.append((trial.configuration["op"], trial.fidelity < 1))
        state = asha.tell(state, [trial._replace(status="COMPLETE", outcome=float(len(trials)))])
    assert trials == [(0, True), (1, True), (2, True), (0, False)]


def test_a_searcher_ignores_trials_that_are_no_candidates():
    h = of_prior([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    searcher = blackbox.enqueue(h.searcher(), [{"op": 8}, {"op": 0}])
    state, trials = searcher.init(KEY, {"op": spaces.integer(0, 9)}), []
    for _ in range(3):
        (trial,), state = searcher.ask(state, 1)
        trials.append(trial._replace(status="COMPLETE", outcome=1.0))
        state = searcher.tell(state, trials[-1:])
    assert [trial.configuration["op"] for trial in trials] == [8, 0, 1]
    state = h.searcher().tell(h.searcher().init(KEY, None), [base.Record("", {"op": [0]}, 1.0), *trials])
    assert [trial.configuration["op"] for trial in state.trials] == [0, 1]


@pytest.mark.once
def test_validation_outcomes_that_tests_do_not_share_are_noise():
    rng = np.random.default_rng(1)
    tests = records(SHARES)
    noisy = [record._replace(outcome=record.outcome + 3 * rng.normal()) for record in tests]
    first, second = (trained(noisy, num_steps=0, tests=test_trials) for test_trials in (None, tests[::-1]))
    assert first.prior.noise == 1e-6 and 0.2 < second.prior.noise < 0.9
    np.testing.assert_array_equal(first.encoded, second.encoded)


@pytest.mark.once
def test_data_frames_and_generators_are_records_too():
    trials = records((0.1, 0.9), CELLS[::4])
    frame = blackbox.records_to_frame(trials)
    first = trained(trials, num_steps=0, tests=trials)
    for same in (trained(frame, num_steps=0, tests=frame), trained(iter(trials), num_steps=0, tests=iter(trials))):
        assert same.candidates == first.candidates == CELLS[::4]
        np.testing.assert_array_equal(same.posterior()[0], first.posterior()[0])
    tried = [base.Record("", cell, float(i)) for i, cell in enumerate(CELLS[:12:4])]
    mean = first.posterior(trials=tried)[0]
    for same in (blackbox.records_to_frame(tried), iter(tried)):
        np.testing.assert_array_equal(first.posterior(trials=same)[0], mean)


@pytest.mark.once
def test_tasks_without_a_full_budget_and_trials_without_one_are_named():
    trials = records((0.1, 0.2))
    half = [record._replace(task="half", fidelity=0.5) for record in trials[:5]]
    with pytest.warns(UserWarning, match="1 of 3 tasks are ignored, 'half': they have no outcome"):
        h = trained([*trials, *half], num_steps=0)
    np.testing.assert_array_equal(h.posterior()[0], trained(trials, num_steps=0).posterior()[0])
    for ask in (h.posterior, h.predict, h.suggest):
        for status in ("COMPLETE", "PRUNED"):
            low = base.Record("", CELLS[50], 0.0, fidelity=0.5, status=status)
            with pytest.warns(UserWarning, match="`trials` have no outcome of a complete trial at fidelity 1"):
                ask(trials=[low])
            ask(trials=[low, low._replace(fidelity=1.0, status="COMPLETE")])
            ask(trials=[low._replace(outcome=float("nan"), status="RUNNING")])


@pytest.mark.once
def test_tasks_of_one_outcome_do_not_enter_training():
    trials = records((0.1,), CELLS[::4])
    constant = [record._replace(task="constant", outcome=1.0) for record in trials]
    with_constant = trained([*trials, *constant, base.Record("one", CELLS[0], 1.0)], num_steps=0)
    assert with_constant.prior.spread.shape == trained(trials, num_steps=0).prior.spread.shape


def test_losses_are_means_of_ended_trials_and_failures_are_worst():
    record_of = lambda i, y, status="COMPLETE": base.Record("t", {"op": i}, y, status=status)
    trials = [
        record_of(0, 3.0),
        record_of(0, 5.0),
        record_of(0, 0.0, "FAIL"),
        record_of(1, 2e9),
        record_of(2, 1.0, "FAIL"),
        record_of(3, float("nan")),
    ]
    trials += [record_of(4, float("inf")), record_of(5, 1.0, "PRUNED")]
    losses = _losses(by_task(trials, lambda c: np.array(c["op"]))[1], 7)[:, 0]
    np.testing.assert_array_equal(losses[[0, 1, 5, 6]], [4.0, 2e9, np.nan, np.nan])
    assert len({*losses[2:5].astype(np.float32)}) == 1 and np.float32(losses[2]) > np.float32(2e9)


@pytest.mark.once
def test_one_failure_among_good_trials_changes_nothing():
    trials = records((0.1,), CELLS[::4])
    failed = min(trials, key=lambda record: record.outcome)._replace(outcome=float("nan"), status="FAIL", seed=1)
    means = [trained(records, num_steps=0).posterior()[0] for records in (trials, [*trials, failed])]
    np.testing.assert_array_equal(*means)
    # The same on the new task, where a complete trial without a finite outcome counts as failed, too.
    h = of_prior([9.0, 8.0, 7.0, 0.0, 0.0, -9.0])
    ended = [base.Record("", {"op": i}, float(i)) for i in range(2)]
    failure = base.Record("", {"op": 0}, status="FAIL", seed=1)
    np.testing.assert_array_equal(h.posterior(trials=[*ended, failure]), h.posterior(trials=ended))
    for y in (float("nan"), float("inf")):
        lost = h.posterior(trials=[ended[0]._replace(outcome=y), ended[1]])[0]
        np.testing.assert_array_equal(lost, h.posterior(trials=[failure, ended[1]])[0])
        assert lost[0] < h.posterior()[0][0] - 0.1


@pytest.mark.once
def test_features_of_a_task_under_another_name_are_named():
    trials = records((0.1, 0.2, 0.3), CELLS[::8])
    features = {"t0.1": [1.0], "T0.2": [2.0], "t0.3": [3.0]}
    for train in (trained, lambda trials, **more: blackbox.train_meta_searcher(trials, space=SPACE, **more)):
        with pytest.warns(UserWarning, match="lacks 1 of 3 tasks, 't0.2', .* not in the records, 'T0.2'"):
            train(trials, features=features, num_steps=0)
    names = ["t0.1", "t0.2", "t0.3"]
    np.testing.assert_array_equal(features_by_task(names, {"t0.1": [1.0]})[:, 0], [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(features_by_task(names, {**features, "t0.2": [2.0]})[:, 0], [1.0, 2.0, 3.0])


@pytest.mark.once
@pytest.mark.parametrize("feature", [np.inf, -np.inf])
def test_infinite_features_of_a_new_task_are_unknown(h, feature):
    """As in training; every score would be NaN, and the first candidate the best."""
    for values, expected in zip(h.posterior([feature]), h.posterior([np.nan]), strict=True):
        np.testing.assert_array_equal(values, expected)
    assert h.predict([feature]) == h.predict([np.nan]) != h.candidates[0]


def test_a_loaded_searcher_equals_the_saved_one(h, tmp_path):
    metaopt.save(tmp_path / "h.npz", h)
    loaded = metaopt.load(tmp_path / "h.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["h.npz"]
    for task in (None, [0.3], base.Task(None, None, np.array([0.9]))):
        np.testing.assert_array_equal(loaded.scores(task), h.scores(task))
        assert loaded.predict(task) == h.predict(task)
        tried = [base.Record("", CELLS[i], float(i % 7)) for i in (3, 9, 40)]
        np.testing.assert_array_equal(loaded.posterior(task, tried), h.posterior(task, tried))
    assert loaded.candidates == h.candidates and h.predict([0.05]) != h.predict([0.95])
    # The encoder and its inputs come back, too.
    cells = _cell_encoder.cells([graph(CELLS[60])], loaded.ops, num_vertices=loaded.encoder.config["num_vertices"])
    encode = lambda h: jax.vmap(h.encoder.encode, in_axes=(0, None))(h.meta_params, cells)
    np.testing.assert_array_equal(encode(loaded), encode(h))

    with np.load(tmp_path / "h.npz") as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())

    def change(**changed):
        new = {k: v for k, v in (header | changed).items() if k in header}
        rest = {k: changed.get(k, v) for k, v in arrays.items() if changed.get(k, v) is not None}
        np.savez(tmp_path / "other.npz", **rest | {"header": np.frombuffer(json.dumps(new).encode(), np.uint8)})
        metaopt.load(tmp_path / "other.npz")

    for changed, message in (
        ({"encoder": header["encoder"] | {"width": 12}}, "does not describe .* should be floating-point of shape"),
        ({"encoder": {"num_ops": 5}}, "does not describe .* 'num_vertices'"),
        ({"ops": ["a"]}, "does not describe .* reads 5 ops; there are 1"),
        ({"candidates": header["candidates"][1:]}, "does not describe .* should be floating-point of shape"),
        ({"candidates": []}, "its candidates are not configurations"),
        ({"center": None}, "does not describe .* should be floating-point of shape"),
        ({"prior.mean": None}, "does not describe .* should be floating-point of shape"),
        ({"prior.spread": None}, "does not describe .* 'prior.spread'"),
        ({"prior.spread": np.array(1.0)}, "does not describe a `CellSearcher`"),
        ({"weights['out']": None}, "does not describe .* should be floating-point of shape"),
        ({"weights['out']": arrays["weights['out']"].astype(str)}, "should be floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            change(**changed)
    for value, message in (
        ((1, 2), "would come back from JSON as {'e0': \\[1, 2\\]}"),
        (print, "not JSON serializable|cannot be written as JSON"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            metaopt.save(tmp_path / "new.npz", h._replace(candidates=[{"e0": value}]))
    assert not list(tmp_path.glob("new*"))
    # As rows of a table are.
    metaopt.save(tmp_path / "new.npz", h._replace(candidates=[{"e0": np.int64(2)}]))
    with np.load(tmp_path / "new.npz") as file:
        assert json.loads(file["header"].tobytes())["candidates"] == [{"e0": 2}]


@pytest.mark.once
def test_an_interrupt_in_training_raises(monkeypatch):
    adam = optax.adam

    def interrupted(rate):
        def init(params):
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C at the start of the training
            return adam(rate).init(params)

        return optax.GradientTransformation(init, adam(rate).update)

    monkeypatch.setattr(optax, "adam", interrupted)  # the training calls no function of the user
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt, match="SIGINT ended the run after 0 of 3 steps"):
            trained(records((0.5,)), num_steps=3)
    finally:
        signal.signal(signal.SIGINT, former)
