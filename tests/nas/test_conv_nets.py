"""Networks of any size for image tasks: one call to train, the objective, padding, and refusals."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from metaopt import base, blackbox, nas

SMALL = {"max_channels": 3, "kernels": (3, 1), "max_width": 6}
SIZES = {"channels": 2, "kernel": 3, "width": 5}


def task_of(num_classes, num_images, num_others=40, seed=0):
    """Images with a bright corner or side that depends on their class."""
    rng = np.random.default_rng(seed)
    y = np.arange(num_images + num_others) % num_classes
    x = 0.3 * rng.normal(size=(len(y), 8, 8, 1))
    for label, (i, j) in enumerate(((0, 0), (4, 4), (0, 4))):
        x[y == label, i : i + 4, j : j + 4] += 1
    return x[:num_images], y[:num_images], x[num_images:], y[num_images:]


TASKS = {"three": task_of(3, 30), "two": task_of(2, 20, seed=1)}


@pytest.fixture(scope="module")
def nets():
    return nas.conv_nets(TASKS, **SMALL)


def log_loss(logits, y):
    logits = np.asarray(logits, np.float64)
    return -(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(y)), y].mean()


def test_a_trained_network_has_its_own_sizes_and_the_outcome_of_its_trial(nets):
    x, y, other_x, other_y = TASKS["three"]
    network = nets.train(SIZES, x, y, seed=3)
    shapes = {leaf.shape for leaf in jax.tree.leaves(network.params)}
    assert {(3, 3, 1, 2), (3, 3, 2, 2), (4, 2, 5), (1, 5, 3)} <= shapes
    outcome = nets.objective(SimpleNamespace(configuration=SIZES, seed=3), TASKS["three"])
    np.testing.assert_allclose(outcome, log_loss(network.outputs(other_x), other_y), rtol=1e-4)
    assert outcome < 0.5 * np.log(3) and network.accuracy({"x": other_x, "y": other_y}) > 0.8
    again = nets.train(SIZES, x, y, seed=4)
    assert np.abs(again.outputs(other_x) - network.outputs(other_x)).max() > 1e-3  # the seed counts


def test_a_smaller_task_has_outputs_for_its_classes_and_does_not_see_the_padding(nets):
    x, y, other_x, other_y = TASKS["two"]
    network = nets.train(SIZES, x, y)
    assert network.outputs(other_x).shape == (40, 2)
    assert network.accuracy({"x": other_x, "y": other_y}) > 0.9
    repeated = nets.train(SIZES, *(np.concatenate([part, part[:10]]) for part in (x, y)))  # 30 images, no padding
    assert repeated.accuracy({"x": other_x, "y": other_y}) > 0.9


def test_records_of_tasks_teach_a_searcher_whose_configuration_is_trained(nets, tmp_path):
    records = blackbox.collect(
        nets.objective, nets.space, TASKS, num_trials=2, key=jax.random.key(0), isolated=False, progress=False
    )
    assert len(records) == 4 and all(isinstance(record, base.Record) and record.outcome < 2 for record in records)
    assert all(nets.train(record.configuration, *TASKS["two"][:2]).outputs(TASKS["two"][2]).shape for record in records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[..., 0], y), r"Images must be \[n, height, width, channels\], of one shape; got \(30, 8, 8\)"),
        (lambda x, y: (x[:, :6], y), "Images must be"),
        (lambda x, y: (x, y[:-1]), r"Labels must be \[30\] whole numbers from 0"),
        (lambda x, y: (x, y - 1), "Labels must be"),
        (lambda x, y: (x, np.array(["a", "b", "c"])[y]), "numbers other labels"),
        (lambda x, y: (x, y + 1), "30 images of 4 classes; the tasks of `conv_nets` have at most 30 images of 3"),
        (lambda x, y: (np.repeat(x, 2, 0), np.repeat(y, 2)), "There are 60 images of 3 classes"),
    ],
)
def test_other_images_and_labels_are_refused(nets, change, message):
    with pytest.raises(ValueError, match=message):
        nets.train(SIZES, *change(*TASKS["three"][:2]))


def test_images_may_have_another_precision(nets):
    images, labels, others, _ = TASKS["three"]
    network = nets.train(SIZES, images, labels)
    single = network.outputs(np.asarray(others, np.float32))
    np.testing.assert_allclose(single, network.outputs(np.asarray(others, np.float64)), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kernel": 7}, "kernel"), ({"width": 1_000}, "width"), ({"depth": 2}, "depth")],
)
def test_configurations_outside_the_space_are_refused(nets, change, message):
    with pytest.raises(ValueError, match=message):
        nets.train({**SIZES, **change}, *TASKS["three"][:2])


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "`tasks` is empty"),
        ([TASKS["two"], (*TASKS["two"][:2], TASKS["two"][2][:, :4], TASKS["two"][3])], {}, "Images must be"),
        (TASKS, {"max_width": 1}, "max_width"),
        (TASKS, {"max_channels": 0}, "max_channels"),
    ],
)
def test_unusable_tasks_and_sizes_are_refused(tasks, options, message):
    with pytest.raises(ValueError, match=message):
        nas.conv_nets(tasks, **{**SMALL, **options})
