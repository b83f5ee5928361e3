"""What every few-shot method must satisfy.

To add a method: write it in a file of `metaopt/few_shot`, export it in `__init__.py`, and add a row to `METHODS`. The
row is a function `(loss, features) -> Adaptation`, where `loss(params, hyperparams, batch)` is a cross-entropy and
`features(params, batch)` is [N, D]; take the one that the method needs. λ["init"] has the leaves "map" and "head". All
tests below then run for the method, as parts of one compiled program. A second setting of a method may have its own
row.

A method of kind "unbiased" draws random numbers for its hypergradient. Its `value` may be a mean over perturbed λ,
which differs from the loss at λ. Use perturbations of about 1e-4 in its row, so that the tests accept the difference.
"""

import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, few_shot, hypergrad, inner

RATE = 0.3
LSLR = {"rates": "leaf", "rates_per_step": True}
EVOLUTION = functools.partial(hypergrad.evolution, sigma=1e-4, num_pairs=2)
METHODS = {
    "maml": lambda loss, features: few_shot.maml(loss, num_steps=2, rate=RATE),
    "fomaml": lambda loss, features: few_shot.fomaml(loss, num_steps=2, rate=RATE),
    "anil": lambda loss, features: few_shot.anil(loss, num_steps=2, rate=RATE),
    "boil": lambda loss, features: few_shot.boil(loss, num_steps=2, rate=RATE),
    "meta_sgd": lambda loss, features: few_shot.meta_sgd(loss, num_steps=2, rate=RATE),
    "maml_plus_plus": lambda loss, features: few_shot.maml_plus_plus(loss, num_steps=2, rate=RATE),
    "imaml": lambda loss, features: few_shot.imaml(loss, proximal=1.0, num_steps=3, rate=RATE),
    "cavia": lambda loss, features: few_shot.cavia(loss, num_context=3, num_steps=2, rate=RATE),
    "pretrained": lambda loss, features: few_shot.pretrained(loss, test_steps=2, rate=RATE),
    "proto_maml": lambda loss, features: few_shot.proto_maml(features, num_steps=2, rate=RATE),
    "prototypical_networks": lambda loss, features: few_shot.prototypical_networks(features),
    "ridge_head": lambda loss, features: few_shot.ridge_head(features),
    "Reptile": lambda loss, features: few_shot.maml(loss, num_steps=2, rate=RATE, rule=hypergrad.reptile),
    "evolution": lambda loss, features: few_shot.maml(loss, num_steps=2, rate=RATE, rule=EVOLUTION),
    "proto_maml, learned rates": lambda loss, features: few_shot.proto_maml(features, num_steps=2, rate=RATE, **LSLR),
    "proto_maml, only the head": lambda loss, features: few_shot.proto_maml(
        features, num_steps=2, rate=RATE, adapt="^head"
    ),
    "ridge_head that adapts": lambda loss, features: few_shot.ridge_head(features, num_steps=2, rate=RATE),
}

pytestmark = pytest.mark.once  # one large program
KEY = jax.random.key(0)
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
    adaptations = {name: make(loss, features) for name, make in METHODS.items()}
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


def is_random(methods, name):
    return methods.adaptations[name].estimator.kind == "unbiased"


def test_without_a_sampler_the_key_matters_only_to_random_hypergradients(methods):
    estimates, predictions = methods.run(key=jax.random.key(7))
    assert_close(predictions, methods.reference[1], rtol=0)
    for name, estimate in estimates.items():
        expected = methods.reference[0][name]
        if is_random(methods, name):
            assert optax.tree.norm(optax.tree.sub(estimate.hypergrad, expected.hypergrad)) > 1e-3, name
        else:
            assert_close(estimate, expected, rtol=0)


def test_training_and_prediction_adapt_in_the_same_way(methods):
    """F is the loss of the predictions after as many steps."""
    for name, estimate in methods.reference[0].items():
        step = 0 if name == "pretrained" else -1
        expected = inner.cross_entropy(jnp.asarray(methods.reference[1][name][step]), jax.tree.map(jnp.asarray, QUERY))
        assert estimate.value == pytest.approx(float(expected), rel=1e-6 if is_random(methods, name) else 1e-10), name


def test_steps_change_predictions(methods):
    for name, predicted in methods.reference[1].items():
        assert len(predicted) == methods.adaptations[name].test_steps + 1
        assert all(abs(a - b).max() > 1e-3 for a, b in zip(predicted, predicted[1:], strict=False)), name


def test_exact_hypergradients_are_those_of_finite_differences(methods):
    """Along one random direction of all of λ."""
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), methods.hyperparams)
    moved = lambda size: methods.run(optax.tree.add_scale(methods.hyperparams, size, direction))[0]
    high, low = moved(1e-5), moved(-1e-5)
    exact = [name for name, a in methods.adaptations.items() if a.estimator.kind == "exact"]
    assert len(exact) >= 12
    for name in exact:
        expected = (high[name].value - low[name].value) / 2e-5
        assert abs(expected) > 1e-3, name
        slope = optax.tree.vdot(methods.reference[0][name].hypergrad, direction[name])
        np.testing.assert_allclose(slope, expected, rtol=1e-6, err_msg=name)
