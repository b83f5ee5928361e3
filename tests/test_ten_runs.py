"""Uses of several training runs on one task: weights from validation rows, their costs, and the tables of the study."""

import csv
import json

import numpy as np
import pytest

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
from experiments.hyperparameters.transfer.families import FILE, is_development
from experiments.hyperparameters.transfer.natural import LEFT_OUT, RESPONSES, _sample
from experiments.hyperparameters.transfer.ten_runs import agreement, candidates
from metaopt import tasks

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


def test_every_set_of_runs_has_the_cost_of_its_runs():
    starts = ["g", "one λ"]
    labels = [*starts, "g_0", "g_1", "half of the way", *(f"TPE, trial {i}" for i in range(50))]
    labels += [f"{s}, {t} {i}" for s in starts for t in ("draw", "key", "draw and key") for i in range(1, 10)]
    labels += [f"{s}, step {i}" for s in starts for i in range(1, 4)]
    for name, (members, cost) in candidates(labels).items():
        assert set(members) <= set(labels) and len(set(members)) == len(members)
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
