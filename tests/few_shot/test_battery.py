"""What every few-shot method must satisfy.

To add a method: write it in a file of `metaopt/few_shot`, export it in `__init__.py`, and add a row to `METHODS`. The
row is the kind of its hypergradient and a function `(loss, features) -> Adaptation`, where
`loss(params, hyperparams, batch)` is a cross-entropy and `features(params, batch)` is [N, D]; take the one that the
method needs. λ["init"] has the leaves "map" and "head". All tests below then run for the method, as parts of one
compiled program. A second setting of a method may have its own row.

The kinds are those of `base.Estimator`. The tests compare the kind of a row with that of the estimator, and with the
hypergradient: "exact" is the derivative of `value`; "biased" and "pseudo" are not; all three are the same for each key;
"unbiased" differs between keys, and its mean is the derivative of `value`. The `value` of such a method may be a mean
over perturbed λ, which differs from the loss at λ. Use perturbations of about 1e-4 in its row, so that the tests accept
the difference.
"""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, few_shot, hypergrad, inner

RATE = 0.3
LSLR = {"rates": "leaf", "rates_per_step": True}
EVOLUTION = functools.partial(hypergrad.evolution, sigma=1e-4, num_pairs=8)


class Row(NamedTuple):
    """One method: the kind of its hypergradient, and `(loss, features) -> Adaptation`."""

    kind: str
    make: Callable[..., few_shot.Adaptation]


METHODS = {
    "maml": Row("exact", lambda loss, features: few_shot.maml(loss, num_steps=2, rate=RATE)),
    "fomaml": Row("biased", lambda loss, features: few_shot.fomaml(loss, num_steps=2, rate=RATE)),
    "anil": Row("exact", lambda loss, features: few_shot.anil(loss, num_steps=2, rate=RATE)),
    "boil": Row("exact", lambda loss, features: few_shot.boil(loss, num_steps=2, rate=RATE)),
    "meta_sgd": Row("exact", lambda loss, features: few_shot.meta_sgd(loss, num_steps=2, rate=RATE)),
    "maml_plus_plus": Row("exact", lambda loss, features: few_shot.maml_plus_plus(loss, num_steps=2, rate=RATE)),
    "imaml": Row("biased", lambda loss, features: few_shot.imaml(loss, proximal=1.0, num_steps=3, rate=RATE)),
    "cavia": Row("exact", lambda loss, features: few_shot.cavia(loss, num_context=3, num_steps=2, rate=RATE)),
    "pretrained": Row("exact", lambda loss, features: few_shot.pretrained(loss, test_steps=2, rate=RATE)),
    "proto_maml": Row("exact", lambda loss, features: few_shot.proto_maml(features, num_steps=2, rate=RATE)),
    "prototypical_networks": Row("exact", lambda loss, features: few_shot.prototypical_networks(features)),
    "ridge_head": Row("exact", lambda loss, features: few_shot.ridge_head(features)),
    "Reptile": Row(
        "pseudo", lambda loss, features: few_shot.maml(loss, num_steps=2, rate=RATE, rule=hypergrad.reptile)
    ),
    "evolution": Row("unbiased", lambda loss, features: few_shot.maml(loss, num_steps=2, rate=RATE, rule=EVOLUTION)),
    "proto_maml, learned rates": Row(
        "exact", lambda loss, features: few_shot.proto_maml(features, num_steps=2, rate=RATE, **LSLR)
    ),
    "proto_maml, only the head": Row(
        "exact", lambda loss, features: few_shot.proto_maml(features, num_steps=2, rate=RATE, adapt="^head")
    ),
    "ridge_head that adapts": Row(
        "exact", lambda loss, features: few_shot.ridge_head(features, num_steps=2, rate=RATE)
    ),
}

pytestmark = pytest.mark.once  # one large program
KEY = jax.random.key(0)
NUM_DRAWS = 200  # of random hypergradients
RNG = np.random.default_rng(1)
WAYS, DIM = 3, 4  # the third class is padding
META = {"map": RNG.normal(size=(DIM, DIM)), "head": {"w": RNG.normal(size=(DIM, WAYS)), "b": RNG.normal(size=WAYS)}}


def part(num, num_padded):
    """A support or query set of two real classes, with padded rows at the end."""
    x = np.concatenate([RNG.normal(size=(num, DIM)), np.zeros((num_padded, DIM))])
    y = np.concatenate([np.arange(num) % 2, np.zeros(num_padded, int)])
    mask = np.concatenate([np.ones(num), np.zeros(num_padded)])
    return {"x": x, "y": y, "mask": mask, "class_mask": np.array([1.0, 1.0, 0.0])}


SUPPORT, QUERY = part(6, 2), part(5, 1)


def features(params, batch):
    return jnp.tanh(batch["x"] @ params["map"])


def outputs(params, batch):
    return few_shot.linear_head(features)(params, batch) + params.get("context", jnp.zeros(WAYS))[None]


def loss(params, hyperparams, batch):
    return inner.cross_entropy(outputs(params, batch), batch)


@pytest.fixture(scope="module")
def methods():
    """All methods: their adaptations, λ, and one program `(λ, support, query, key) -> (estimates, outputs)`."""
    to_jax = lambda tree: jax.tree.map(jnp.asarray, tree)
    adaptations = {name: row.make(loss, features) for name, row in METHODS.items()}
    hyperparams = {name: a.hyperparams(to_jax(META), to_jax(SUPPORT)) for name, a in adaptations.items()}

    @jax.jit
    def program(hyperparams, support, query, key):
        estimates, predictions = {}, {}
        for name, a in adaptations.items():
            task = base.Task(support, query)
            state = a.estimator.init(key, hyperparams[name], task)
            estimates[name] = a.estimator.estimate(hyperparams[name], task, state)[0]
            predictions[name] = few_shot.adapted(a, hyperparams[name], outputs)(key, support, query)
        return estimates, predictions

    def run(hyperparams=hyperparams, support=SUPPORT, query=QUERY, key=KEY):
        return jax.device_get(program(hyperparams, to_jax(support), to_jax(query), key))

    return SimpleNamespace(adaptations=adaptations, hyperparams=hyperparams, run=run, reference=run())


def assert_close(actual, expected, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-11), actual, expected)


def differences(methods, direction):
    """The slope of each method's `value` along a direction, by central differences."""
    moved = lambda size: methods.run(optax.tree.add_scale(methods.hyperparams, size, direction))[0]
    high, low = moved(1e-5), moved(-1e-5)
    return {name: float(high[name].value - low[name].value) / 2e-5 for name in METHODS}


def test_every_public_method_has_a_row():
    public = {name: getattr(few_shot, name) for name in few_shot.__all__}
    of_adaptations = {
        n for n, f in public.items() if inspect.isfunction(f) and f.__annotations__.get("return") is few_shot.Adaptation
    }
    assert of_adaptations - {"adaptation"} <= METHODS.keys()


def test_predictions_do_not_depend_on_other_query_rows(methods):
    other = QUERY | {"x": np.where(np.arange(6)[:, None] == 2, QUERY["x"], 3.0)}
    for name, predicted in methods.run(query=other)[1].items():
        expected = methods.reference[1][name]
        np.testing.assert_allclose(predicted[:, 2], expected[:, 2], rtol=1e-10, err_msg=name)
        assert abs(predicted[:, 1] - expected[:, 1]).max() > 1e-3, name


def test_adaptation_does_not_read_the_query_set(methods):
    """Its labels change the outer loss, and not the predictions."""
    other = QUERY | {"y": 1 - QUERY["y"]}
    estimates, predictions = methods.run(query=other)
    assert_close(predictions, methods.reference[1], rtol=0)
    for name, estimate in estimates.items():
        assert abs(estimate.value - methods.reference[0][name].value) > 1e-4, name


def test_the_order_of_support_rows_does_not_matter(methods):
    order = np.array([7, 3, 0, 5, 6, 2, 4, 1])  # padding moves, too
    support = {name: x[order] if len(x) == 8 else x for name, x in SUPPORT.items()}
    assert_close(methods.run(support=support), methods.reference)


def test_padded_rows_are_not_read(methods):
    wild = lambda rows: (
        rows
        | {"x": np.where(rows["mask"][:, None] > 0, rows["x"], 50.0), "y": np.where(rows["mask"] > 0, rows["y"], 99)}
    )
    estimates, predictions = methods.run(support=wild(SUPPORT), query=wild(QUERY))
    real = lambda predictions: {name: x[:, QUERY["mask"] > 0] for name, x in predictions.items()}
    assert_close((estimates, real(predictions)), (methods.reference[0], real(methods.reference[1])))


def test_each_method_has_the_kind_of_its_row(methods):
    kinds = {name: a.estimator.kind for name, a in methods.adaptations.items()}
    assert kinds == {name: row.kind for name, row in METHODS.items()}


def test_without_a_sampler_the_key_matters_only_to_random_hypergradients(methods):
    estimates, predictions = methods.run(key=jax.random.key(7))
    assert_close(predictions, methods.reference[1], rtol=0)
    for name, estimate in estimates.items():
        expected = methods.reference[0][name]
        if METHODS[name].kind == "unbiased":
            assert optax.tree.norm(optax.tree.sub(estimate.hypergrad, expected.hypergrad)) > 1e-3, name
        else:
            assert_close(estimate, expected, rtol=0)


def test_training_and_prediction_adapt_in_the_same_way(methods):
    """F is the loss of the predictions after as many steps."""
    for name, estimate in methods.reference[0].items():
        step = 0 if name == "pretrained" else -1
        expected = inner.cross_entropy(jnp.asarray(methods.reference[1][name][step]), jax.tree.map(jnp.asarray, QUERY))
        assert estimate.value == pytest.approx(
            float(expected), rel=1e-6 if METHODS[name].kind == "unbiased" else 1e-10
        ), name


def test_steps_change_predictions(methods):
    for name, predicted in methods.reference[1].items():
        assert len(predicted) == methods.adaptations[name].test_steps + 1
        assert all(abs(a - b).max() > 1e-3 for a, b in zip(predicted, predicted[1:], strict=False)), name


def test_only_exact_hypergradients_are_those_of_finite_differences(methods):
    """Along one random direction of all of λ."""
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), methods.hyperparams)
    expected = differences(methods, direction)
    for name in [name for name, row in METHODS.items() if row.kind != "unbiased"]:
        assert abs(expected[name]) > 1e-3, name
        slope = optax.tree.vdot(methods.reference[0][name].hypergrad, direction[name])
        is_derivative = abs(slope - expected[name]) < 1e-6 * abs(expected[name])
        assert is_derivative == (METHODS[name].kind == "exact"), (name, slope, expected[name])


def test_the_mean_of_random_hypergradients_is_that_of_finite_differences(methods):
    """Along the mean of some of the draws, on which the others have a large slope."""
    random = [name for name, row in METHODS.items() if row.kind == "unbiased"]
    draws = [methods.run(key=jax.random.key(i))[0] for i in range(NUM_DRAWS)]
    draws = {name: [estimates[name].hypergrad for estimates in draws] for name in random}
    direction = {name: jax.tree.map(lambda *x: sum(x), *draws[name][::2]) for name in random}
    direction = {name: optax.tree.scale(1 / optax.tree.norm(x), x) for name, x in direction.items()}
    expected = differences(methods, optax.tree.zeros_like(methods.hyperparams) | direction)
    for name in random:
        slopes = np.array([optax.tree.vdot(x, direction[name]) for x in draws[name][1::2]])
        error = slopes.std(ddof=1) / np.sqrt(len(slopes))
        assert abs(expected[name]) > 8 * error, f"{name}: too few draws"
        assert abs(slopes.mean() - expected[name]) < 4 * error, (name, slopes.mean(), expected[name])
