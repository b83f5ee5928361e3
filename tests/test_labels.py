"""Labels outside the classes are an error wherever their values are known, and pass where they are padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, few_shot, hypergrad, inner, predictors, spaces, tasks, training

KEY = jax.random.key(0)
SPACE = {"rate": spaces.real(0.0)}
PREDICTOR = predictors.dataset_embedding(SPACE, width=2, num_hidden=2)
PROTOTYPES = few_shot.prototypical_networks(lambda params, batch: batch["x"])


def part(y, **more):
    """Rows of two classes out of three; the last row is padding."""
    rows = {"x": np.ones((4, 2)), "y": np.array(y), "mask": np.array([1.0, 1, 1, 0])}
    return {**rows, "class_mask": np.array([1.0, 1, 0]), **more}


def task(y):
    return base.Task(part([0, 1, 0, 0]), part(y))


def fit(sampled):
    learner = training.learner(RULE, optax.sgd(0.1))
    training.fit(learner, lambda key: sampled, hyperparams=1.0, num_steps=1, key=KEY)


def stacked(y):
    return jax.tree.map(lambda *leaves: np.stack(leaves), task([0, 0, 1, 1]), task(y))


LOOP = inner.loop(
    lambda params, hyperparams, batch: (params - hyperparams) ** 2,
    lambda hyperparams: optax.sgd(0.1),
    init=lambda key, hyperparams, data: jnp.zeros([]),
)
PROBLEM = inner.problem(LOOP, lambda params, hyperparams, batch: params**2)
RULE = hypergrad.direct(lambda hyperparams, task, key: hyperparams**2)

CALLS = {
    "inner.cross_entropy": lambda y: inner.cross_entropy(jnp.zeros((4, 3)), part(y)),
    "a gradient": lambda y: jax.grad(inner.cross_entropy)(jnp.zeros((4, 3)), part(y)),
    "prototypes": lambda y: PROTOTYPES.problem.loop.init(KEY, PROTOTYPES.hyperparams({}), part(y)),
    "dataset_embedding": lambda y: PREDICTOR.apply(PREDICTOR.init(KEY), base.Task(part(y), None)),
    "tasks.stack": lambda y: tasks.stack([task([0, 0, 1, 1]), task(y)]),
    "fit": lambda y: fit(task(y)),
    "fine_tune": lambda y: training.fine_tune(RULE, num_steps=1)(KEY, jnp.array(1.0), task(y)),
    "propose": lambda y: training.propose(RULE, num_proposals=1)(KEY, jnp.array(1.0), task(y)),
    "diagnose": lambda y: hypergrad.diagnose(PROBLEM, jnp.array(1.0), task(y), num_steps=2),
    "fit with a batch": lambda y: fit(stacked(y)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.once
def test_labels_outside_the_classes_are_an_error(call):
    call([0, 1, 0, 99])  # padding may have any label
    for wrong, range_text in (([0, 3, 1, 0], "from 0 to 3, 1 of"), ([-1, -1, 0, 0], "from -1 to ., 2 of")):
        with pytest.raises(ValueError, match=rf"labels .*y.* must be in 0\.\.2; got labels {range_text} . outside"):
            call(wrong)


@pytest.mark.parametrize("name", ["inner.cross_entropy", "prototypes", "tasks.stack", "fit"])
def test_classes_that_a_task_does_not_have_are_an_error(name):
    with pytest.raises(ValueError, match=r'y.* have classes that "class_mask" excludes: \[2\]'):
        CALLS[name]([0, 2, 1, 2])


@pytest.mark.parametrize("wrong", [9.0, 1.5, -1.0])
def test_floating_point_labels_are_whole_numbers_of_classes(wrong):
    tasks.stack([task([0.0, 1.0, 0.0, 99.0])])
    with pytest.raises(ValueError, match=r"labels .*y.* must be in 0\.\.2; got labels from .* 1 of . outside"):
        tasks.stack([task([0.0, 1.0, wrong, 0.0])])


def test_the_labels_of_images_start_at_zero():
    with pytest.raises(ValueError, match=r"`labels` must be in 0\.\.1; got labels from -1 to 1, 1 of 3 outside"):
        tasks.image_features(np.ones((3, 2, 2, 1)), np.array([0, -1, 1]))
