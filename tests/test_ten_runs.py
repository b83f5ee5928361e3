"""Uses of several training runs on one task: weights from validation rows, their costs, and the tables of the study."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt
from experiments import script
from experiments.hyperparameters.transfer.combine import (
    WEIGHTINGS,
    average,
    best_half,
    choose,
    greedy,
    likely,
    log_loss,
    mixture,
)
from experiments.hyperparameters.transfer.config import FEATURES, SMOKE
from experiments.hyperparameters.transfer.families import FILE, is_development
from experiments.hyperparameters.transfer.natural import LEFT_OUT, RESPONSES, _sample
from experiments.hyperparameters.transfer.pool import scale_features
from experiments.hyperparameters.transfer.rates import RATES, Tuned, rates_table, tune_all
from experiments.hyperparameters.transfer.runs import Part, Probabilities, Recorded, hyperparams_of, make_steps
from experiments.hyperparameters.transfer.ten_runs import (
    REFERENCES,
    Stage,
    _kept,
    agreement,
    candidates,
    digest_of_runs,
    groups_of,
    losses_of,
    nearness,
    table,
)
from metaopt import automl, base, hypergrad, predictors, spaces, tasks

pytestmark = pytest.mark.once  # an experiment
ROWS = np.random.default_rng(0).uniform(0.05, 1.0, (6, 4, 30))  # runs, tasks, rows
MASK = (np.arange(30)[None] < np.array([30, 20, 10, 5])[:, None]).astype(np.float32)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_shares_and_do_not_depend_on_padding(name):
    weights = WEIGHTINGS[name](ROWS, MASK)
    assert weights.shape == (6, 4) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(0), 1)
    other = np.where(MASK[None] > 0, ROWS, 0.5)
    np.testing.assert_allclose(WEIGHTINGS[name](other, MASK), weights)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_run_that_diverged_has_no_weight(name):
    p = np.concatenate([np.zeros((1, 4, 30)), ROWS[:3]])
    np.testing.assert_array_equal(WEIGHTINGS[name](p, MASK)[0], 0)


def test_the_best_run_has_the_smallest_loss_and_of_equal_runs_the_first_is_taken():
    losses = log_loss(ROWS, MASK)
    np.testing.assert_array_equal(choose(ROWS, MASK).argmax(0), losses.argmin(0))
    np.testing.assert_array_equal(choose(np.repeat(ROWS[:1], 3, 0), MASK)[0], 1)
    order = losses.argsort(0)
    for k in range(6):
        np.testing.assert_allclose(best_half(ROWS, MASK)[order[k], np.arange(4)], 1 / 3 if k < 3 else 0)


def test_an_average_is_never_worse_than_the_mean_of_the_losses():
    loss = log_loss(mixture(average(ROWS, MASK), ROWS), MASK)
    assert (loss < log_loss(ROWS, MASK).mean(0)).all()


def test_two_runs_that_are_right_on_different_halves_share_the_weight():
    p = np.full((3, 1, 10), 0.2)
    p[0, 0, :5], p[1, 0, 5:] = 0.9, 0.9
    mask = np.ones((1, 10))
    for weigh in (greedy, likely):
        weights = weigh(p, mask)[:, 0]
        np.testing.assert_allclose(weights[:2], weights[0])
        assert weights[0] > 0.4 > 0.1 > weights[2]


def test_the_best_prefix_of_greedy_steps_is_taken():
    p = np.array([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]])  # twenty steps end at 7/20
    np.testing.assert_allclose(greedy(p, np.ones((1, 3)))[:, 0], [1 / 3, 2 / 3])


def test_a_step_of_em_is_the_mean_responsibility(monkeypatch):
    monkeypatch.setattr("experiments.hyperparameters.transfer.combine.EM_STEPS", 1)
    p = np.array([[[0.8, 0.2]], [[0.4, 0.6]]])
    shares = np.array([0.8 / 1.2 + 0.2 / 0.8, 0.4 / 1.2 + 0.6 / 0.8]) / 2
    np.testing.assert_allclose(likely(p, np.ones((1, 2)))[:, 0], shares)


def test_em_and_greedy_steps_do_not_raise_the_validation_loss_above_that_of_the_start():
    for weigh, start in ((likely, average), (greedy, choose)):
        new, old = (log_loss(mixture(f(ROWS, MASK), ROWS), MASK) for f in (weigh, start))
        assert (new <= old + 1e-9).all() and (new < old - 1e-4).any()


def test_seeds_that_agree_keep_the_prediction_and_others_do_not():
    seeds = np.array([1.0, 1.0, 1.0])[:, None, None] * np.ones((3, 2, 4))
    np.testing.assert_allclose(agreement(seeds.mean(0), seeds), 1)
    seeds[:, 0, 0] = [-9.0, 1.0, 11.0]
    np.testing.assert_allclose(agreement(seeds.mean(0), seeds)[0], [1 / 101, 1, 1, 1])


STARTS = ["g", "one λ"]
LABELS = [*STARTS, "g_0", "g_1", "half of the way", *(f"TPE, trial {i}" for i in range(50))]
LABELS += [f"{s}, {t} {i}" for s in STARTS for t in ("draw", "key", "draw and key") for i in range(1, 10)]
LABELS += [f"{s}, step {i}" for s in STARTS for i in range(1, 4)]


def test_every_set_of_runs_has_the_cost_of_its_runs():
    for name, (members, cost) in candidates(LABELS).items():
        assert set(members) <= set(LABELS) and len(set(members)) == len(members)
        num_steps = max((int(m.split()[-1]) for m in members if ", step " in m), default=0)
        num_plain = sum(", step " not in m for m in members)
        assert cost == pytest.approx(max(num_plain, 1) + 4.3 * num_steps), name


def _corpus_families():
    with open(script.RESULTS / "transfer_corpus.csv", newline="") as file:
        return {tuple(row["name"].split("/")[:2]): row["family"] for row in csv.DictReader(file)}


def test_documented_outcomes_are_of_development_families():
    family = _corpus_families()
    assert RESPONSES and all(is_development(family[tuple(item.split("/"))]) for item in RESPONSES)


def test_families_that_a_corpus_leaves_out_are_neither_learned_from_nor_judged():
    judged = set(json.loads(FILE.read_text())["judging"])
    assert not LEFT_OUT & judged and not LEFT_OUT & set(_corpus_families().values())


def test_a_small_sample_has_rows_of_its_table_and_no_rare_class():
    x = np.arange(3000, dtype=np.float32)[:, None]
    y = np.repeat([0, 1, 2], [1800, 1190, 10]).astype(np.int32)
    sample = _sample(tasks.Table("large", "family", x, y, np.zeros(1, bool)))
    assert 120 <= len(sample.y) <= 480 and sample.family == "family" and sample.name == "large (sample)"
    np.testing.assert_array_equal(y[sample.x[:, 0].astype(int)], sample.y)
    assert np.bincount(sample.y).min() >= 6 and sample.num_classes == 2


# ---- The table of the study -----------------------------------------------------------------------------------------


def study() -> tuple[list[Part], Stage]:
    """Two shapes of tasks: three tasks of two families, and one of a third family."""
    rng, parts, probabilities = np.random.default_rng(1), [], []
    for family, rows, num_valid, num_test in ((["a", "a", "b"], [100, 600, 700], 12, 9), (["c"], [90], 7, 5)):
        n = len(family)
        valid = {"mask": (np.arange(num_valid)[None] < num_valid - np.arange(n)[:, None]).astype(np.float32)}
        test = {"mask": (np.arange(num_test)[None] < num_test - np.arange(n)[:, None]).astype(np.float32)}
        kind = np.array(["table"] * (n - 1) + ["response"])
        task = base.Task({"x": rng.normal(size=(n, 4, 2))}, valid)
        parts.append(Part(task, test, np.zeros((n, 1)), np.array(family), kind, np.array(rows)))
        shapes = [(len(LABELS), n, num) for num in (num_valid, num_test)]
        probabilities.append(Probabilities(*(rng.uniform(0.1, 1, shape) for shape in shapes)))
    return parts, Stage(LABELS, probabilities)


def test_validation_rows_choose_and_test_rows_judge():
    parts, runs = study()
    losses = losses_of(parts, runs)
    rows = [LABELS.index(label) for label in ["g", *(f"g, draw {i}" for i in range(1, 10))]]
    expected = []
    for part, p in zip(parts, runs.parts, strict=True):
        for t in range(len(part.family)):
            num_valid, num_test = (int(m[t].sum()) for m in (part.task.valid["mask"], part.test["mask"]))
            best = rows[int(np.log(p.valid[rows, t, :num_valid]).mean(-1).argmax())]
            expected.append(-np.log(p.test[best, t, :num_test]).mean())
    np.testing.assert_allclose(losses["g + 9 draws", "the best"], expected)
    assert ("g", "average") not in losses and len(losses["TPE, 50 trials", "greedy ensemble"]) == 4
    other = Stage(LABELS, [p._replace(test=p.test[:, :, ::-1] * 0 + 0.5) for p in runs.parts])
    assert {name: float(v[0]) for name, v in losses_of(parts, other).items()} == pytest.approx(
        dict.fromkeys(losses, np.log(2))
    )


def test_a_family_counts_once_and_differences_are_to_the_references():
    parts, runs = study()
    losses, groups = losses_of(parts, runs), groups_of(parts)
    assert {name: inside.tolist() for name, inside in groups.items()} == {
        "all": [True] * 4,
        "below 500 rows": [True, False, False, True],
        "500 rows and more": [False, True, True, False],
        "response": [False, False, True, True],
        "table": [True, True, False, False],
    }
    costs = {label: cost for label, (_, cost) in candidates(LABELS).items()}
    header, _, *lines = (line.strip("| ").split(" | ") for line in table(parts, losses, costs, groups).splitlines())
    assert header[3:5] == ["all (3 families)", "below 500 rows (2 families)"] and len(lines) == len(losses)
    means = lambda x: np.mean([x[:2].mean(), x[2], x[3]])
    cells = next(line for line in lines if line[:2] == ["one λ + 9 draws", "average"])
    own = losses["one λ + 9 draws", "average"]
    assert cells[2:5] == ["10.0", f"{means(own):.4f}", f"{np.mean([own[0], own[3]]):.4f}"]
    for text, (label, use) in zip(cells[-len(REFERENCES) :], REFERENCES, strict=True):
        assert text.startswith(f"{means(own - losses[label or 'one λ + 9 draws', use or 'average']):+.4f} [")


def test_kept_runs_are_used_only_for_the_same_rows_starts_and_settings(tmp_path):
    parts, runs = study()
    z = {"g": np.zeros((4, 2)), "one λ": np.ones((4, 2))}
    config = dataclasses.replace(SMOKE, proposals=10)
    other = parts[0]._replace(test={"mask": parts[0].test["mask"] * 0 + 1})
    marks = {
        digest_of_runs(config, parts, z),
        digest_of_runs(config, [other, parts[1]], z),
        digest_of_runs(config, parts, {**z, "g": np.ones((4, 2))}),
        digest_of_runs(dataclasses.replace(config, spread=0.4), parts, z),
        digest_of_runs(dataclasses.replace(config, fine_tune_rate=0.2), parts, z),
    }
    assert len(marks) == 5 and digest_of_runs(config, list(parts), dict(z)) in marks
    recorded = Recorded(automl.tabular_network(num_steps=1), parts)
    recorded._kept = [[(v, t) for v, t in zip(p.valid, p.test, strict=True)] for p in runs.parts]
    stage = _kept(tmp_path / "a.npz", recorded, lambda: LABELS)
    again = _kept(tmp_path / "a.npz", recorded, lambda: pytest.fail("it was kept"))
    assert stage.labels == again.labels == LABELS and recorded._kept == [[], []]
    jax.tree.map(np.testing.assert_array_equal, (stage.parts, again.parts), (runs.parts, runs.parts))


def test_features_far_from_those_of_learning_tasks_shrink_the_prediction(tmp_path):
    rng = np.random.default_rng(0)
    learning = rng.normal(size=(60, len(FEATURES)))
    scaling = tasks.fit_scaling([dict(zip(FEATURES, row, strict=True)) for row in learning], FEATURES)
    space = {"rate": spaces.positive(0.1)}
    g = predictors.mlp(space, num_features=len(FEATURES))
    metaopt.save(tmp_path / "g_0.npz", predictors.TrainedPredictor(g, g.init(jax.random.key(0)), scaling, {}))
    names = [name for name in map(str, range(400)) if not is_development(name)][:60]
    development = next(name for name in map(str, range(400)) if is_development(name))
    far = 3.0 + np.zeros((1, len(FEATURES)))
    saved = {"family": np.array([*names, development]), "raw_features": np.concatenate([learning, far])}
    np.savez(tmp_path / "pool_0.npz", **saved)
    config = dataclasses.replace(SMOKE, limit=4.0)
    nearby, same = nearness(config, tmp_path, np.concatenate([far, learning.mean(0, keepdims=True)]))
    known, new = (np.clip(scale_features(scaling, rows), -4, 4) for rows in (learning, far))
    distances = np.sort(np.linalg.norm(known[:, None] - known[None], axis=-1), axis=1)[:, 1:11].mean(1)
    expected = np.median(distances) / np.sort(np.linalg.norm(new - known, axis=-1))[:10].mean()
    assert nearby == pytest.approx(expected, rel=1e-4) and expected < 0.6 and same == 1


# ---- The runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_float32():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def trained(in_float32):
    """A small network, three tasks as one part, and λ near the default, in unconstrained coordinates."""
    network = automl.tabular_network(num_steps=3, batch_size=8, num_members=2, num_hidden=4)
    rng, each = np.random.default_rng(0), []
    for t in range(3):
        x, y = rng.normal(size=(60, 3)).astype(np.float32), (np.arange(60) % 2).astype(np.int32)
        prepared = tasks.prepare(tasks.Table(f"t{t}", f"t{t}", x, y, np.zeros(3, bool)))
        task = automl.tabular_task(prepared)
        test = {**task.valid, "x": np.asarray(task.valid["x"])[::-1].copy()}
        each.append((task, test))
    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    task, test = stack([task for task, _ in each])._replace(features=None), stack([test for _, test in each])
    part = Part(task, test, np.zeros((3, 1)), np.array(list("abc")), np.array(["table"] * 3), np.full(3, 60))
    default = jax.flatten_util.ravel_pytree(spaces.to_unconstrained(network.space, spaces.default(network.space)))[0]
    return network, part, np.asarray(default) + 0.1 * rng.normal(size=(3, len(default)))


def test_recorded_runs_are_those_of_the_network_and_a_run_that_diverged_has_probability_0(trained):
    network, part, z = trained
    hyperparams = hyperparams_of(network.space, z)
    hyperparams["rate"] = hyperparams["rate"].at[1].set(jnp.nan)
    parts = [jax.tree.map(lambda leaf, rows=rows: leaf[rows], part) for rows in (slice(0, 1), slice(1, 3))]
    recorded = Recorded(network, parts)
    losses = recorded(jax.random.key(4), hyperparams)
    runs = recorded.take()
    assert [p.valid.shape[:2] for p in runs] == [(1, 1), (1, 2)]
    assert not runs[1].valid[0, 0].any() and not runs[1].test[0, 0].any() and runs[1].valid[0, 1].all()
    for t, (k, i) in {0: (0, 0), 2: (1, 1)}.items():  # the task, its part, and its place there
        key = jax.random.split(jax.random.fold_in(jax.random.key(4), k), k + 1)[i]
        task, test = jax.tree.map(lambda leaf, i=i: leaf[i], (parts[k].task, parts[k].test))
        own = jax.tree.map(lambda leaf, t=t: leaf[t], hyperparams)
        params = automl.train(network, key, own, task)
        outer = [float(network.problem.outer_loss(params, own, rows, None)) for rows in (task.valid, test)]
        np.testing.assert_allclose(losses[t], [*outer, 0], rtol=1e-4)
    assert losses[1, 0] == pytest.approx(-np.log(1e-4))


def test_the_first_step_is_that_of_the_optimizer_along_the_hypergradient(trained):
    network, part, z = trained
    visited = make_steps(network, 2, 0.3)(jax.random.key(7), z, part)
    assert visited.shape == (2, *z.shape)
    constrained = spaces.constrain(network.problem, network.space)
    estimator = hypergrad.unrolled(constrained, num_steps=network.num_steps)
    unravel = jax.flatten_util.ravel_pytree(spaces.to_unconstrained(network.space, spaces.default(network.space)))[1]
    key = jax.random.split(jax.random.key(7), 3)[1]
    task, start = jax.tree.map(lambda leaf: leaf[1], part.task), unravel(jnp.asarray(z[1]))
    hypergradient = estimator.estimate(start, task, estimator.init(key, start, task))[0].hypergrad
    sign = np.sign(jax.flatten_util.ravel_pytree(hypergradient)[0])
    moved = np.abs(np.asarray(jax.flatten_util.ravel_pytree(hypergradient)[0])) > 1e-4
    # Adam's first step has the length of the rate.
    np.testing.assert_allclose((visited[0, 1] - z[1])[moved], -0.3 * sign[moved], rtol=1e-2)
    assert moved.sum() > 5 and (np.abs(visited[1] - visited[0]) > 0).any()


def test_finished_rates_are_kept_by_their_names(trained, monkeypatch):
    network, part, z = trained
    monkeypatch.setattr("experiments.hyperparameters.transfer.rates.Recorded", lambda network, parts: None)
    made, kept = [], {"start": [1.0], "0.5": [2.0], "2.0": [3.0]}
    tuned = tune_all(network, 1, [part], z, (2.0, 0.5), lambda name, make: made.append(name) or {"loss": kept[name]})
    assert sorted(made) == ["0.5", "2.0", "start"] and tuned.start == [1.0] and tuned.after.tolist() == [[3.0], [2.0]]


def test_fine_tuning_with_rate_zero_keeps_the_start_and_other_rates_do_not(trained):
    network, part, z = trained
    parts = [jax.tree.map(lambda leaf, rows=rows: leaf[rows], part) for rows in (slice(0, 1), slice(1, 3))]
    tuned = tune_all(network, 2, parts, z, rates=(0.0, 1.0))
    np.testing.assert_allclose(tuned.after[0], tuned.start, rtol=1e-5)
    assert tuned.after.shape == (2, 3) and (np.abs(tuned.after[1] - tuned.start) > 1e-4).any()


def test_rates_are_compared_with_the_start_and_with_the_default_over_families():
    start, after = np.array([0.5, 0.7, 0.6]), [[0.4, 0.6, 0.3], [0.3, 0.5, 0.5], [0.2, 0.4, 0.9], [0.9, 0.9, 0.9]]
    text = rates_table({"g": Tuned(start, np.array(after))}, np.array(["a", "a", "b"]), np.array([True, False, True]))
    header, _, *lines = (line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines())
    assert header[1] == "rate" and [line[1] for line in lines] == ["no step", *map(str, RATES)]
    assert lines[0][2:4] == ["0.6000", "0.5500"] and lines[1][2:4] == ["0.4000", "0.3500"]
    assert lines[1][4].startswith("-0.2000 [") and lines[1][5].startswith("-0.0500 [") and lines[2][5] == ""
