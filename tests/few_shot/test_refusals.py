"""What `few_shot` rejects: options of adaptations, leaves and data that do not fit, networks, methods to evaluate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, few_shot, hypergrad, tasks, training

KEY = jax.random.key(0)
META = {"hidden": {"w": jnp.ones((1, 3)), "b": jnp.zeros(3)}, "out": {"w": jnp.ones((3, 1)), "b": jnp.zeros(1)}}
SIDE = {"x": jnp.ones((4, 1)), "y": jnp.ones((4, 1))}
CLASSES = {"x": jnp.ones((4, 2)), "y": jnp.array([0, 1, 0, 1]), "mask": jnp.ones(4), "class_mask": jnp.ones(2)}
CLASS_META = {"map": jnp.eye(2)}


def loss(params, hyperparams, batch):
    outputs = jnp.tanh(batch["x"] @ params["hidden"]["w"]) @ params["out"]["w"]
    return jnp.square(outputs - batch["y"]).mean()


def features(params, batch):
    return batch["x"] @ params["map"]


def start(a, meta=META, data=SIDE):
    """θ_0 of an adaptation."""
    return jax.eval_shape(lambda meta: a.problem.loop.init(KEY, a.hyperparams(meta), data).params, meta)


def estimate(a, hyperparams, side=SIDE):
    return jax.eval_shape(a.estimator.estimate, hyperparams, base.Task(side, side), KEY)


def estimate_of_classes(a, **changes):
    return estimate(a, a.hyperparams(CLASS_META), CLASSES | changes)


def with_made(key, hyperparams, data):
    return {**hyperparams["init"], "gain": jnp.ones(())}


def meta_params_for_lambda():
    method = few_shot.adapted(few_shot.maml(loss), META, lambda params, query: query["y"])
    return jax.eval_shape(method, KEY, SIDE, SIDE)


def fit_on_single_episodes():
    a = few_shot.maml(loss)
    learner = training.learner(hypergrad.over_tasks(a.estimator), optax.sgd(0.1))
    training.fit(learner, tasks.sinusoids(), hyperparams=a.hyperparams(META), num_steps=1, key=KEY)


def images(shape=(1, 28, 28), **options):
    network = few_shot.conv4(**{"num_filters": 2, **options})
    params = jax.eval_shape(network.init, KEY)
    return jax.eval_shape(network.features, params, {"x": jnp.ones(shape), "mask": jnp.ones(shape[0])})


def evaluate(method, sample=lambda key: tasks.Episode(CLASSES, CLASSES), **options):
    return few_shot.evaluate_episodes({"flat": method}, sample, KEY, num_episodes=1, **options)


def flat(key, support, query):
    return query["x"]


def outputs_of_another_shape():
    outputs, query = jnp.ones(3), {"y": jnp.ones((3, 1)), "mask": jnp.ones(3)}
    return few_shot.mean_squared_error(outputs, query)


BATCH = {name: jnp.stack([x, x]) for name, x in CLASSES.items()} | {"num_rows": jnp.array([4, 4])}
SET_BY_THE_METHOD = "multiple values for keyword argument"
ORDER = '`order` must be "first", "second" or a number'
REFUSALS = [
    # Options.
    (lambda: few_shot.adaptation(loss, rates="all"), ValueError, "`rates` must be one of"),
    (lambda: few_shot.adaptation(loss, num_steps=-1), ValueError, "`num_steps` must be at least 0; got -1"),
    (lambda: few_shot.maml(loss, num_steps=-1), ValueError, "`num_steps` must be at least 0; got -1"),
    (lambda: few_shot.adaptation(loss, proximal=-1), ValueError, "`proximal` must be at least 0; got -1"),
    (lambda: few_shot.adaptation(loss, order="third"), ValueError, ORDER),
    (lambda: few_shot.adaptation(loss, order=-2), ValueError, ORDER),
    (lambda: few_shot.adaptation(loss, order=True), ValueError, ORDER + ".*got True"),
    (
        lambda: few_shot.adaptation(loss, order="first", rule=hypergrad.implicit),
        ValueError,
        "cannot be combined with a `rule`",
    ),
    (lambda: few_shot.imaml(loss, proximal=1.0, order="first"), ValueError, "cannot be combined with a `rule`"),
    (lambda: few_shot.imaml(loss, proximal=0.0), ValueError, "`proximal` must be positive"),
    (lambda: few_shot.maml_plus_plus(loss, multi_step_steps=-1), ValueError, "`multi_step_steps` must be at least 0"),
    (lambda: few_shot.maml_plus_plus(loss, first_order_steps=-1), ValueError, "`order` must be .* got -1"),
    # Options that a method sets itself.
    (lambda: few_shot.fomaml(loss, order="second"), TypeError, SET_BY_THE_METHOD),
    (lambda: few_shot.anil(loss, adapt="x"), TypeError, SET_BY_THE_METHOD),
    # The implicit derivative of a rate would be 0.
    (lambda: few_shot.imaml(loss, proximal=1.0, rates="leaf"), TypeError, SET_BY_THE_METHOD),
    (lambda: few_shot.pretrained(loss, num_steps=1), TypeError, SET_BY_THE_METHOD),
    (lambda: few_shot.ridge_head(features, extra={}), TypeError, SET_BY_THE_METHOD),
    # Leaves.
    (
        lambda: start(few_shot.anil(loss)),
        ValueError,
        r"`adapt` must match at least one leaf: '\(\^\|/\)head\(/\|\$\)' matches none of \['hidden/b'",
    ),
    (
        lambda: start(few_shot.maml(loss, leaves_per_step="hidden/w")),
        ValueError,
        r"Leaves with a value for each step cannot adapt: \['hidden/w'\]",
    ),
    (
        lambda: start(few_shot.maml(loss, adapt="hidden", leaves_per_step="gain")),
        ValueError,
        "`leaves_per_step` must find leaves.*`num_steps` = 1; 'gain' finds none",
    ),
    (
        lambda: start(few_shot.maml(loss, adapt="hidden", leaves_per_step="out")),
        ValueError,
        r"`leaves_per_step` must find leaves.*`num_steps` = 1; 'out' finds {'out/w': \(3, 1\)}",
    ),
    (
        lambda: start(few_shot.imaml(loss, proximal=1.0, init=with_made, adapt="hidden")),
        ValueError,
        r"made the leaves \['gain'\], which do not adapt, and a `rule`",
    ),
    (
        lambda: estimate_of_classes(few_shot.proto_maml(features, proximal=0.1)),
        ValueError,
        r'the distance from λ\["init"\], which lacks the leaves \[\'head/b\', \'head/w\'\] that `init` returned',
    ),
    (
        lambda: few_shot.proto_maml(features, rates="leaf").hyperparams(CLASS_META),
        ValueError,
        "`hyperparams` needs the data of one task",
    ),
    # λ and data.
    (meta_params_for_lambda, ValueError, r"`a.hyperparams\(meta_params\)`.*got a dict of \['hidden', 'out'\]"),
    (
        lambda: estimate(few_shot.adaptation(loss, rates="leaf"), {"init": META}),
        ValueError,
        r'the learned rates as "rate".*got a dict of \[\'init\'\].*are fixed\?',
    ),
    (fit_on_single_episodes, ValueError, r"the number of tasks as its leading axis.*`tasks.episode_batches"),
    (lambda: hypergrad.over_tasks(few_shot.maml(loss)), ValueError, "must be a `base.Estimator`.*got .Adaptation"),
    (lambda: estimate_of_classes(few_shot.ridge_head(features), **BATCH), ValueError, "takes one task"),
    (
        lambda: estimate_of_classes(few_shot.ridge_head(features, loss=few_shot.mean_squared_error), y=jnp.ones(4)),
        ValueError,
        r"numbers \[N, W\] .* got float64 of shape \(4,\)",
    ),
    # Networks.
    (lambda: images(normalization="instance"), ValueError, "`normalization` must be one of 'batch'"),
    (lambda: images(downsampling="max"), ValueError, '`downsampling` must be "pool" or "stride"'),
    (lambda: images(num_blocks=5), ValueError, r"Images of \(28, 28\) are too small for 5 blocks"),
    # Methods to evaluate, and their scores.
    (
        lambda: evaluate(lambda key, support, query: query["x"][None], tasks.sinusoids()),
        ValueError,
        "`accuracy` needs episodes with classes.*`score_fn=few_shot.mean_squared_error`",
    ),
    (lambda: evaluate(flat), ValueError, r"'flat' must return outputs \[steps \+ 1, 4, ...\].*`outputs\[None\]`"),
    (
        lambda: evaluate(flat, tasks.episode_batches(lambda key: tasks.Episode(CLASSES, CLASSES), 3)),
        ValueError,
        r"must return one episode, .* support set they are \(3, 4\) and \(3, 4\). Batches are only for training",
    ),
    (
        lambda: evaluate(flat, score_fn=lambda outputs, query: 0.0),
        ValueError,
        "`higher_is_better` must be given .* True for a score such as accuracy, False for an error",
    ),
    (outputs_of_another_shape, ValueError, r"the shape of the labels, \(3, 1\).*got \(3,\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_support_set_with_its_number_of_rows_is_one_task():
    for num_rows in (2, np.array(2), jnp.array(2)):
        start(few_shot.ridge_head(features), CLASS_META, CLASSES | {"num_rows": num_rows})
