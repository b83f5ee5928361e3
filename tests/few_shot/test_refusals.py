"""What `few_shot` rejects: options of adaptations, leaves and data that do not fit, networks, methods to evaluate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, few_shot, hypergrad, inner, tasks, training

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


def value_per_step_of_leaves_that_look_alike():
    params = {"enc/w": jnp.array([2.0]), "enc": {"w": jnp.ones(3)}, "head": jnp.array([0.1])}
    product = lambda p, _, batch: ((p["enc/w"] * p["enc"]["w"] * p["head"] * batch - 3.0) ** 2).sum()
    start(few_shot.anil(product, leaves_per_step="w$"), params, jnp.ones(1))


class Params(NamedTuple):
    body: jax.Array
    head: jax.Array


def adapt_under_other_keys(**options):
    """`init` only passes on the leaves of λ["init"], but under other keys."""
    product = lambda p, _, batch: ((p.body * p.head * batch - 3.0) ** 2).sum()
    a = few_shot.adaptation(product, adapt="head", init=lambda key, hp, data: Params(**hp["init"]), **options)
    start(a, {"body": jnp.ones(1), "head": jnp.ones(1)}, jnp.ones(1))


def adapted_to(y):
    a = few_shot.prototypical_networks(features)
    adapt = few_shot.adapted(a, a.hyperparams(CLASS_META), few_shot.linear_head(features))
    return adapt(KEY, CLASSES | {"y": y}, CLASSES)


def derivative_of_adapted(differentiate):
    a = few_shot.maml(loss)
    predict = lambda params, query: query["x"] @ params["hidden"]["w"]
    outputs = lambda meta: few_shot.adapted(a, a.hyperparams(meta), predict)(KEY, SIDE, SIDE)
    differentiate(lambda meta: outputs(meta).sum())(META)


def meta_params_for_lambda():
    method = few_shot.adapted(few_shot.maml(loss), META, lambda params, query: query["y"])
    return jax.eval_shape(method, KEY, SIDE, SIDE)


def fit_on_single_episodes():
    a = few_shot.maml(loss)
    learner = training.learner(hypergrad.over_tasks(a.estimator), optax.sgd(0.1))
    training.fit(learner, tasks.sinusoids(), hyperparams=a.hyperparams(META), num_steps=1, key=KEY)


def fit_on_batches(method, **options):
    """Without `over_tasks`, one adaptation to all tasks would be another objective of the right shape."""
    a = method(lambda params, hyperparams, batch: ((params["a"] * batch["x"] - batch["y"]) ** 2).mean(), **options)
    learner = training.learner(a.estimator, optax.sgd(0.1))
    sample = tasks.episode_batches(tasks.sinusoids(num_shots=10), 4)
    training.fit(learner, sample, hyperparams=a.hyperparams({"a": 1.0}), num_steps=1, key=KEY)


def estimate_of_a_batch():
    """As many tasks as rows."""
    a = few_shot.maml(lambda params, hyperparams, batch: inner.cross_entropy(batch["x"] @ params["map"], batch))
    estimate(a, a.hyperparams(CLASS_META), {name: jnp.stack([x] * 4) for name, x in CLASSES.items()})


# ---- Networks -------------------------------------------------------------------------------------------------------


def images(shape=(1, 28, 28), **options):
    network = few_shot.conv4(**{"num_filters": 2, **options})
    params = jax.eval_shape(network.init, KEY)
    return jax.eval_shape(network.features, params, {"x": jnp.ones(shape), "mask": jnp.ones(shape[0])})


def without_support(make, use, kind="support"):
    """A query set that is normalized by a support set that is missing: in f, or in predictions."""
    network = few_shot.conv4(normalization=kind, num_filters=2, num_blocks=1)
    head = few_shot.linear_head(network.features)
    params = {**network.init(KEY), "head": {"w": jnp.zeros((8, 2), jnp.float32), "b": jnp.zeros(2, jnp.float32)}}
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    a, side = make(loss, network.features), CLASSES | {"x": jnp.ones((4, 4, 4))}
    if use == "f":
        return estimate(a, a.hyperparams(params), side)
    return jax.eval_shape(few_shot.adapted(a, a.hyperparams(params), head), KEY, side, side)


WITHOUT_SUPPORT = [
    (lambda loss, features: few_shot.maml(loss), "f"),
    (lambda loss, features: few_shot.maml(loss), "predictions"),
    (lambda loss, features: few_shot.maml(loss, rule=hypergrad.reptile), "f"),
    (lambda loss, features: few_shot.pretrained(loss), "predictions"),
    # No steps, but a head of the support set.
    (lambda loss, features: few_shot.prototypical_networks(features, keep_support=False), "f"),
    (lambda loss, features: few_shot.ridge_head(features, keep_support=False), "f"),
]


# ---- Methods to evaluate --------------------------------------------------------------------------------------------


def evaluate(method, sample=lambda key: tasks.Episode(CLASSES, CLASSES), **options):
    options = {"num_episodes": 1} | options
    return few_shot.evaluate_episodes({"flat": method}, sample, KEY, **options)


def flat(key, support, query):
    return query["x"]


def evaluate_as_many_classes(method=flat, score_fn=few_shot.accuracy, **leaves):
    """As many query examples as classes, so that the shape of outputs does not show an axis of steps."""
    side = {"x": jnp.eye(4), "y": jnp.arange(4), "mask": jnp.ones(4), "class_mask": jnp.ones(4)}
    sample = lambda key: tasks.Episode(side, side | leaves)
    higher_is_better = None if score_fn is few_shot.accuracy else True
    return evaluate(method, sample, score_fn=score_fn, higher_is_better=higher_is_better)


def evaluate_as_many_targets():
    side = {"x": jnp.eye(4), "y": jnp.eye(4), "mask": jnp.ones(4)}
    return evaluate(flat, lambda key: tasks.Episode(side, side), score_fn=any_score, higher_is_better=True)


def any_score(outputs, query):
    return outputs.mean()


class Unhashable:
    def __eq__(self, other):
        return isinstance(other, Unhashable)

    def __call__(self, outputs, query):
        return few_shot.accuracy(outputs, query)


def evaluate_users(**options):
    """Of three users."""
    table = tasks.from_user_records(np.arange(12.0)[:, None], np.arange(12.0), np.repeat([0, 1, 2], 4))
    last = lambda key, support, query: jnp.broadcast_to(support["y"][-1], (1, *query["mask"].shape))
    sample = tasks.user_episodes(table, num_support=2, order="random")
    return evaluate(last, sample, score_fn=few_shot.mean_absolute_error, **options)


def evaluate_labels(**labels):
    """Classes 0, 1 and 3 of four."""

    def part(name):
        y = labels.get(name, jnp.array([0, 1, 0, 3]))
        return {"x": 1.0 * y, "y": y, "mask": jnp.ones(4), "class_mask": jnp.array([1.0, 1.0, 0.0, 1.0])}

    episode = tasks.Episode(part("support"), part("query"))
    return evaluate(lambda key, support, query: jnp.zeros((1, 4, 4)), lambda key: episode)


def outputs_of_another_shape():
    outputs, query = jnp.ones(3), {"y": jnp.ones((3, 1)), "mask": jnp.ones(3)}
    return few_shot.mean_squared_error(outputs, query)


BATCH = {name: jnp.stack([x, x]) for name, x in CLASSES.items()} | {"num_rows": jnp.array([4, 4])}
ORDER = '`order` must be "first", "second" or a number'
OVER_TASKS = r"got shape \(4, 10\). Use `hypergrad.over_tasks` for a batch of tasks"
OUTPUTS = r"'flat' must return outputs \[steps \+ 1, 4, ...\].*`outputs\[None\]`"
REFUSALS = [
    # Options.
    (lambda: few_shot.adaptation(loss, rates="all"), "`rates` must be one of"),
    (lambda: few_shot.adaptation(loss, num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: few_shot.adaptation(loss, order="third"), ORDER),
    (lambda: few_shot.adaptation(loss, order=True), ORDER + ".*got True"),
    (lambda: few_shot.maml_plus_plus(loss, first_order_steps=-1), ORDER + ".* got -1"),
    (lambda: few_shot.maml_plus_plus(loss, multi_step_steps=-1), "`multi_step_steps` must be at least 0; got -1"),
    (
        lambda: few_shot.adaptation(loss, order="first", rule=hypergrad.implicit),
        "`order` is an option of unrolled training and cannot be combined with a `rule`",
    ),
    (
        lambda: few_shot.adaptation(loss, rule=functools.partial(hypergrad.reptile, num_steps=2)),
        "Pass `num_steps` to the method, which passes it on to its `rule`",
    ),
    (lambda: few_shot.imaml(loss, proximal=0.0), "`proximal` must be positive"),
    # Leaves.
    (
        lambda: start(few_shot.anil(loss)),
        r"`adapt` must match at least one leaf: '\(\^\|/\)head\(/\|\$\)' matches none of \['hidden/b'",
    ),
    (
        lambda: start(few_shot.maml(loss, leaves_per_step="hidden/w")),
        r"Leaves with a value for each step cannot adapt: \['hidden/w'\]",
    ),
    (
        lambda: start(few_shot.maml(loss, adapt="hidden", leaves_per_step="gain")),
        "`leaves_per_step` must find leaves.*`num_steps` = 1; 'gain' finds none",
    ),
    (value_per_step_of_leaves_that_look_alike, r"`num_steps` = 1; 'w\$' finds {'enc/w': \(3,\)}"),
    (
        lambda: start(few_shot.imaml(loss, proximal=1.0, init=with_made, adapt="hidden")),
        r"made the leaves \['gain'\], which do not adapt, and the `rule` \(of kind 'biased'\)",
    ),
    (
        lambda: adapt_under_other_keys(rule=functools.partial(hypergrad.lookahead, commit=0)),
        r"made the leaves \['body'\], .*of kind 'exact'\) may see no derivative.* return them in the containers",
    ),
    (
        lambda: estimate_of_classes(few_shot.proto_maml(features, proximal=0.1)),
        r'the distance from λ\["init"\], which lacks the leaves \[\'head/b\', \'head/w\'\] that `init` returned',
    ),
    (
        lambda: adapt_under_other_keys(proximal=1.0),
        r"`proximal` .* lacks the leaves \['head'\] .*must return them in the containers",
    ),
    (
        lambda: few_shot.proto_maml(features, rates="leaf").hyperparams(CLASS_META),
        "`hyperparams` needs the data of one task",
    ),
    *(
        (
            lambda differentiate=differentiate: derivative_of_adapted(differentiate),
            r"`few_shot.adapted` have no derivative.*`hypergrad\.unroll\(",
        )
        for differentiate in (jax.grad, jax.jacfwd)
    ),
    (
        lambda: adapted_to(np.array([0, 1])),
        '"x" and "y" of a support set must have the same number of rows; got 4 and 2',
    ),
    # λ and data.
    (meta_params_for_lambda, r"`a.hyperparams\(meta_params\)`.*got a dict of \['hidden', 'out'\]"),
    (
        lambda: estimate(few_shot.adaptation(loss, rates="leaf"), {"init": META}),
        r'the learned rates as "rate".*got a dict of \[\'init\'\].*are fixed\?',
    ),
    (fit_on_single_episodes, r"the number of tasks as its leading axis.*`tasks.episode_batches"),
    (lambda: estimate_of_classes(few_shot.ridge_head(features), **BATCH), "takes one task"),
    (estimate_of_a_batch, r"got shape \(4, 4\). Use `hypergrad.over_tasks` for a batch of tasks"),
    (
        lambda: inner.cross_entropy(jnp.ones((2, 4, 2)), BATCH),
        r'"class_mask" must be \[C\] = \(2,\), .*; got shape \(2, 2\)',
    ),
    # Whatever the rule.
    (lambda: fit_on_batches(few_shot.maml), OVER_TASKS),
    (lambda: fit_on_batches(few_shot.maml, num_steps=5, rule=hypergrad.reptile), OVER_TASKS),
    (lambda: fit_on_batches(few_shot.pretrained), OVER_TASKS),
    (lambda: fit_on_batches(few_shot.imaml, proximal=1.0), OVER_TASKS),
    (
        lambda: estimate_of_classes(few_shot.ridge_head(features, loss=few_shot.mean_squared_error), y=jnp.ones(4)),
        r"numbers \[N, W\] .* got float64 of shape \(4,\)",
    ),
    # Networks.
    (lambda: images(normalization="instance"), "`normalization` must be one of 'batch'"),
    (lambda: images(num_blocks=5), r"Images of \(28, 28\) are too small for 5 blocks"),
    *(
        (
            lambda make=make, use=use: without_support(make, use),
            r'support"\)` normalizes a query set by the support set.*`keep_support=True`.*`normalization="batch"`',
        )
        for make, use in WITHOUT_SUPPORT
    ),
    (lambda: without_support(*WITHOUT_SUPPORT[1], kind="tasknorm"), r'tasknorm"\)` normalizes a query set by'),
    # Methods to evaluate, and their scores.
    (lambda: evaluate(flat), OUTPUTS),
    (lambda: evaluate_as_many_classes(), OUTPUTS),
    (lambda: evaluate_as_many_classes(score_fn=any_score), OUTPUTS),
    (evaluate_as_many_targets, OUTPUTS),
    *(
        (
            lambda shape=shape: evaluate_as_many_classes(lambda key, support, query: jnp.zeros(shape)),
            r"must be \[Q, W\] = \(4, 4\), .* after each step; got \(4,",
        )
        for shape in ((3, 4), (3, 4, 1))
    ),
    (
        lambda: evaluate_as_many_classes(of_class=jnp.ones((4, 4))),
        r"4 examples and 4 classes, .* \['of_class'\] belong to",
    ),
    (
        lambda: evaluate(flat, tasks.episode_batches(lambda key: tasks.Episode(CLASSES, CLASSES), 3)),
        r"must return one episode, .* support set they are \(3, 4\) and \(3, 4\). Batches are only for training",
    ),
    *(
        (
            lambda score_fn=score_fn: evaluate(flat, score_fn=score_fn),
            "`higher_is_better` must be given .* True for a score such as accuracy, False for an error",
        )
        for score_fn in (any_score, Unhashable())
    ),
    (evaluate_users, "draws users with replacement.*set `each` to the number of users"),
    (lambda: evaluate_users(each=7), "the sampler of 'episodes' has 3, so with each=7"),
    *(
        (
            lambda part=part, label=label: evaluate_labels(**{part: jnp.array([0, 1, label, 1])}),
            rf"labels `episode\['{part}'\]\['y'\]` must be in 0\.\.3; got labels from .*{label}",
        )
        for part, label in (("support", -1), ("query", 4))
    ),
    (
        lambda: evaluate_labels(query=jnp.array([0, 1, 2, 1])),
        r"labels `episode\['query'\]\['y'\]` have classes .*: \[2\]",
    ),
    (outputs_of_another_shape, r"the shape of the labels, \(3, 1\).*got \(3,\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SET_BY_THE_METHOD = "multiple values for keyword argument"
ERRORS_OF_OTHERS = [
    # Of Python: an unknown option, options that a method sets itself, and episodes without classes.
    (lambda: images(downsampling="max"), KeyError, "max"),
    (lambda: few_shot.fomaml(loss, order="second"), TypeError, SET_BY_THE_METHOD),
    (lambda: few_shot.anil(loss, adapt="x"), TypeError, SET_BY_THE_METHOD),
    # The implicit derivative of a rate would be 0.
    (lambda: few_shot.imaml(loss, proximal=1.0, rates="leaf"), TypeError, SET_BY_THE_METHOD),
    (lambda: few_shot.pretrained(loss, num_steps=1), TypeError, SET_BY_THE_METHOD),
    (lambda: few_shot.ridge_head(features, extra={}), TypeError, SET_BY_THE_METHOD),
    (lambda: hypergrad.over_tasks(few_shot.maml(loss)), AttributeError, "'Adaptation' object has no attribute 'kind'"),
    (lambda: evaluate(lambda key, support, query: query["x"][None], tasks.sinusoids()), KeyError, "class_mask"),
    # Of JAX: what is no image of this number of channels.
    *(
        (lambda shape=shape, num=num: images(shape, num_channels=num, num_blocks=1), (TypeError, ValueError), None)
        for num, shapes in {1: [(2, 1, 8, 8), (2, 8, 8, 3), (2, 64)], 3: [(2, 8, 8), (2, 3, 8, 8)]}.items()
        for shape in shapes
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS_OF_OTHERS)
def test_errors_of_others(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_episode_may_lack_a_class_between_others():
    assert evaluate_labels().scores["flat"]["episodes"].shape == (1, 1)


def test_a_support_set_with_its_number_of_rows_is_one_task():
    for num_rows in (2, np.array(2), jnp.array(2)):
        start(few_shot.ridge_head(features), CLASS_META, CLASSES | {"num_rows": num_rows})
