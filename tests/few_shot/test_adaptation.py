"""The specification, setting by setting, against a network whose training is written in NumPy and its differences."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, evaluation, few_shot, hypergrad, inner, tasks, training

KEY = jax.random.key(0)
RATE = 0.1


def tree(rng, gain=None):
    params = {
        "hidden": {"w": rng.normal(size=(1, 3)), "b": 0.3 * rng.normal(size=3)},
        "out": {"w": rng.normal(size=(3, 1)), "b": rng.normal(size=1)},
    }
    return params | ({} if gain is None else {"gain": np.array(gain)})


RNG = np.random.default_rng(0)
META = tree(RNG)
DATA = [{"x": RNG.normal(size=(n, 1)), "y": RNG.normal(size=(n, 1))} for n in (4, 5)]
TASK = base.Task(*DATA)


# ---- By hand, in NumPy: h = tanh(x w + b + context), out = gain · (h w + b) ------------------------------------------


def predicted(params, x):
    hidden = np.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"] + params.get("context", 0.0))
    return params.get("gain", 1.0) * (hidden @ params["out"]["w"] + params["out"]["b"])


def error(params, data):
    return ((predicted(params, data["x"]) - data["y"]) ** 2).mean()


def slopes(params, data):
    """The gradient of `error`, for every leaf but the gain."""
    x, y, gain = data["x"], data["y"], params.get("gain", 1.0)
    hidden = np.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"] + params.get("context", 0.0))
    cotangent = gain * 2 * (predicted(params, x) - y) / len(y)
    inner = cotangent @ params["out"]["w"].T * (1 - hidden**2)
    grads = {
        "hidden": {"w": x.T @ inner, "b": inner.sum(0)},
        "out": {"w": hidden.T @ cotangent, "b": cotangent.sum(0)},
    }
    return grads | ({"context": inner.sum(0)} if "context" in params else {})


def trained(params, num_steps, adapts=lambda path: True, rate=lambda path, t: RATE, where=lambda params, t: params):
    """θ_0..θ_T; `at` maps the parameters of a step to those that the model receives."""
    visited = [params]
    for t in range(num_steps):
        grads = slopes(where(params, t), DATA[0])

        def move(path, x, t=t, grad=grads):
            for key in path:
                grad = grad.get(key.key, 0.0) if isinstance(grad, dict) else grad
            name = "/".join(str(key.key) for key in path)
            return x - rate(name, t) * grad if adapts(name) else x

        params = jax.tree_util.tree_map_with_path(move, params)
        visited.append(params)
    return visited


def differences(function, hyperparams, size=1e-6):
    """Central differences of a function of a tree of NumPy arrays."""
    leaves, structure = jax.tree.flatten(hyperparams)
    grads = [np.zeros_like(leaf) for leaf in leaves]
    for number, leaf in enumerate(leaves):
        for index in np.ndindex(leaf.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in leaves]
                moved[number][index] += sign * size
                ends.append(function(structure.unflatten(moved)))
            grads[number][index] = (ends[0] - ends[1]) / (2 * size)
    return structure.unflatten(grads)


# ---- The same by metaopt ---------------------------------------------------------------------------------------------


def network(params, x):
    context = params.get("context", jnp.zeros(3))
    hidden = jnp.tanh(x @ params["hidden"]["w"] + (params["hidden"]["b"] + context)[None])
    return params.get("gain", 1.0) * (hidden @ params["out"]["w"] + params["out"]["b"][None])


def loss(params, hyperparams, batch):
    return ((network(params, batch["x"]) - batch["y"]) ** 2).mean()


def at_gain(params, t):
    return params | {"gain": params["gain"][min(t, 1)]}


def lookup(rates, path):
    for name in path.split("/"):
        rates = rates[name]
    return rates


def lslr_by_hand(hp):
    visited = trained(hp["init"], 2, lambda p: p != "gain", lambda p, t: lookup(hp["rate"], p)[t], where=at_gain)
    return 0.3 * error(at_gain(visited[1], 0), DATA[1]) + 0.7 * error(at_gain(visited[2], 1), DATA[1])


LSLR = {"adapt": "hidden|out", "rates": "leaf", "rates_per_step": True, "leaves_per_step": "gain", "outer": (0.3, 0.7)}
CASES = {  # the adaptation, the meta-parameters, and F in NumPy
    "maml": (few_shot.maml(loss, num_steps=2, rate=RATE), META, lambda hp: error(trained(hp["init"], 2)[-1], DATA[1])),
    "anil": (
        few_shot.anil(loss, head="^out", num_steps=2, rate=RATE),
        META,
        lambda hp: error(trained(hp["init"], 2, lambda path: "out" in path)[-1], DATA[1]),
    ),
    "boil": (
        few_shot.boil(loss, head="^out", num_steps=1, rate=RATE),
        META,
        lambda hp: error(trained(hp["init"], 1, lambda path: "out" not in path)[-1], DATA[1]),
    ),
    "meta_sgd": (
        few_shot.meta_sgd(loss, num_steps=2, rate=RATE),
        META,
        lambda hp: error(trained(hp["init"], 2, rate=lambda path, t: lookup(hp["rate"], path))[-1], DATA[1]),
    ),
    "lslr": (
        few_shot.adaptation(loss, num_steps=2, rate=RATE, **LSLR),
        META | {"gain": np.array([1.1, 0.9])},
        lslr_by_hand,
    ),
    "cavia": (
        few_shot.cavia(loss, num_context=3, num_steps=2, rate=RATE),
        META,
        lambda hp: error(trained(hp["init"] | {"context": np.zeros(3)}, 2, lambda p: p == "context")[-1], DATA[1]),
    ),
    "pretrained": (few_shot.pretrained(loss), META, lambda hp: error(hp["init"], DATA[1])),
}
OTHERS = {  # compared with those, or with NumPy, below
    "fomaml": few_shot.fomaml(loss, num_steps=2, rate=RATE),
    "reptile": few_shot.maml(loss, num_steps=2, rate=RATE, rule=hypergrad.reptile),
    "all leaves by name": few_shot.anil(loss, head="^hidden/|^out/", num_steps=2, rate=RATE),
}


@pytest.fixture(scope="module")
def estimates():
    """All of them by one program."""
    adaptations = {name: (case[0], case[1]) for name, case in CASES.items()} | {n: (a, META) for n, a in OTHERS.items()}
    hyperparams = {name: a.hyperparams(jax.tree.map(jnp.asarray, meta)) for name, (a, meta) in adaptations.items()}

    def program(hyperparams, task):
        by_name = {}
        for name, (a, _) in adaptations.items():
            state = a.estimator.init(KEY, hyperparams[name], task)
            by_name[name] = a.estimator.estimate(hyperparams[name], task, state)[0]
        return by_name

    by_name = jax.jit(program)(hyperparams, jax.tree.map(jnp.asarray, TASK))
    return SimpleNamespace(by_name=jax.device_get(by_name), hyperparams=jax.device_get(hyperparams))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.once
def test_the_hypergradient_is_that_of_differences_of_training_in_numpy(name, estimates):
    _, _, by_hand = CASES[name]
    out, hyperparams = estimates.by_name[name], estimates.hyperparams[name]
    np.testing.assert_allclose(out.value, by_hand(hyperparams), rtol=1e-12)
    expected = differences(by_hand, hyperparams)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), out.hypergrad, expected)
    assert any(abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(expected))


def close(a, b, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13), a, b)


@pytest.mark.once
def test_no_inner_step_is_plain_training(estimates):
    close(estimates.by_name["pretrained"].hypergrad["init"], slopes(META, DATA[1]))


def test_all_leaves_by_name_are_maml_and_so_are_equal_rates(estimates):
    close(estimates.by_name["all leaves by name"], estimates.by_name["maml"])
    close(estimates.by_name["meta_sgd"].hypergrad["init"], estimates.by_name["maml"].hypergrad["init"])
    assert estimates.by_name["meta_sgd"].value == pytest.approx(estimates.by_name["maml"].value, rel=1e-13)


def test_first_order_is_the_gradient_of_f_where_training_ends(estimates):
    close(estimates.by_name["fomaml"].hypergrad["init"], slopes(trained(META, 2)[-1], DATA[1]))
    assert few_shot.fomaml(loss).estimator.kind == "biased" and few_shot.maml(loss).estimator.kind == "exact"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden", "out", "nothing"], meta_fields=[])
@dataclasses.dataclass
class Module:
    """A model like those of Equinox: a callable dataclass whose static part is None."""

    hidden: dict
    out: dict
    nothing: None = None

    def __call__(self, x):
        return network({"hidden": self.hidden, "out": self.out}, x)


def module_loss(params, hyperparams, batch):
    assert params.nothing is None
    return ((params(batch["x"]) - batch["y"]) ** 2).mean()


@pytest.mark.once
def test_a_model_that_can_be_called_and_has_none_in_it(estimates):
    adaptations = {
        "maml": few_shot.maml(module_loss, num_steps=2, rate=RATE),
        "anil": few_shot.anil(module_loss, head="^out", num_steps=2, rate=RATE),
        "reptile": few_shot.maml(module_loss, num_steps=2, rate=RATE, rule=hypergrad.reptile),
        "meta_sgd": few_shot.meta_sgd(module_loss, num_steps=2, rate=RATE),
    }

    @jax.jit
    def program(init, task):
        by_name = {}
        for name, a in adaptations.items():
            hyperparams = a.hyperparams(init)
            by_name[name] = a.estimator.estimate(hyperparams, task, a.estimator.init(KEY, hyperparams, task))[0]
        return by_name

    by_name = program(Module(**jax.tree.map(jnp.asarray, META)), jax.tree.map(jnp.asarray, TASK))
    for name, estimate in by_name.items():
        expected = estimates.by_name[name].hypergrad["init"]
        init = estimate.hypergrad["init"]
        chex.assert_trees_all_close({"hidden": init.hidden, "out": init.out}, expected, rtol=1e-10)


@pytest.mark.once
def test_truncation_to_one_step_is_first_order():
    """In coordinates δ = θ − λ, where every step sees λ; the step itself is held, and the past is cut off."""
    shifted_loss = lambda delta, hp, batch: loss(jax.tree.map(jnp.add, hp, delta), None, batch)
    zeros = lambda key, hp, data: jax.tree.map(jnp.zeros_like, hp)
    problem = inner.problem(inner.loop(shifted_loss, lambda hp: optax.sgd(RATE), init=zeros), shifted_loss)
    held = lambda function, has_aux: lambda *args: jax.grad(function, has_aux=has_aux)(*jax.lax.stop_gradient(args))
    estimator = hypergrad.truncated(problem, num_steps=2, truncation_length=1, grad=held)
    hyperparams, task = jax.tree.map(jnp.asarray, (META, TASK))
    state, estimate = estimator.init(KEY, hyperparams, task), jax.jit(estimator.estimate)
    for steps, theta in enumerate(trained(META, 2)[1:], 1):
        out, state = estimate(hyperparams, task, state)
        close(out.hypergrad, slopes(theta, DATA[1]))
        first_order = few_shot.fomaml(loss, num_steps=steps, rate=RATE)
        expected, _ = jax.jit(first_order.estimator.estimate)({"init": hyperparams}, task, KEY)
        close((out.value, out.hypergrad), (expected.value, expected.hypergrad["init"]))


def test_reptile_is_the_difference_that_training_made(estimates):
    start, _, end = trained(META, 2)
    close(estimates.by_name["reptile"].hypergrad["init"], jax.tree.map(np.subtract, start, end))
    assert estimates.by_name["reptile"].value == pytest.approx(error(end, DATA[1]), rel=1e-12)
    assert OTHERS["reptile"].estimator.kind == "pseudo"


@pytest.mark.once
def test_schedules_follow_the_outer_step():
    """MAML++: first order and equal weights at step 0; second order and only the last loss from step 1 on."""
    a = few_shot.maml_plus_plus(
        loss, num_steps=2, rate=RATE, rates="fixed", rates_per_step=False, first_order_steps=1, multi_step_steps=1
    )
    learner = training.learner(lambda step: hypergrad.over_tasks(a.estimator_at(step)), optax.sgd(1.0))
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], TASK)
    start = a.hyperparams(jax.tree.map(jnp.asarray, META))
    state, step = learner.init(KEY, start, batch), jax.jit(learner.step)
    state, metrics = step(state)
    _, once, twice = trained(META, 2)
    direction = jax.tree.map(lambda a, b: (a + b) / 2, slopes(once, DATA[1]), slopes(twice, DATA[1]))
    after = jax.tree.map(np.subtract, META, direction)
    close(state.hyperparams["init"], after)
    assert metrics["value"] == pytest.approx((error(once, DATA[1]) + error(twice, DATA[1])) / 2, rel=1e-12)
    state, metrics = step(state)
    direction = differences(lambda params: error(trained(params, 2)[-1], DATA[1]), after)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        state.hyperparams["init"],
        jax.tree.map(np.subtract, after, direction),
    )
    assert metrics["value"] == pytest.approx(error(trained(after, 2)[-1], DATA[1]), rel=1e-12)


def test_schedules_of_maml_plus_plus():
    a = few_shot.maml_plus_plus(loss, num_steps=3, first_order_steps=5, multi_step_steps=10)
    assert [a.estimator_at(step).kind for step in (0, 4, 5, 99)] == ["biased"] * 2 + ["exact"] * 2
    rates = a.hyperparams(META)["rate"]
    assert jax.tree.map(jnp.shape, rates) == jax.tree.map(lambda _: (3,), META)
    assert few_shot.meta_sgd(loss).hyperparams(META)["rate"]["out"]["w"].shape == (3, 1)
    assert few_shot.adaptation(loss, rates="one", rates_per_step=True, num_steps=2).hyperparams(META)["rate"].shape == (
        2,
    )


def test_more_steps_at_test_use_the_last_rates_and_each_step_has_predictions():
    a, meta, _ = CASES["lslr"]
    hyperparams = a.hyperparams(jax.tree.map(jnp.asarray, meta))
    hyperparams["rate"] = jax.tree.map(lambda x: x * jnp.array([1.0, 0.5]), hyperparams["rate"])
    method = few_shot.adapted(a, hyperparams, lambda params, query: network(params, query["x"]), num_steps=3)
    outputs = jax.jit(method)(KEY, *jax.tree.map(jnp.asarray, DATA))
    visited = trained(meta, 3, lambda p: p != "gain", lambda p, t: RATE * (1.0, 0.5, 0.5)[t], where=at_gain)
    expected = [predicted(at_gain(params, max(t - 1, 0)), DATA[1]["x"]) for t, params in enumerate(visited)]
    np.testing.assert_allclose(outputs, expected, rtol=1e-10)


@pytest.mark.once
def test_memory_at_test_is_that_of_the_outputs_whatever_the_steps():
    """No graph is kept, unlike in a derivative through as many steps."""
    a = CASES["maml"][0]
    hyperparams, (support, query) = jax.tree.map(jnp.asarray, (a.hyperparams(META), DATA))
    solve = lambda num: hypergrad.unroll(a.problem.loop, num_steps=num)
    end = lambda hp, support, query, num: solve(num)(KEY, hp, support).params["out"]["b"].sum()

    def temporary(num_steps, derivative=False):
        method = few_shot.adapted(a, hyperparams, lambda p, query: network(p, query["x"]), num_steps=num_steps)
        program = lambda hp, support, query: method(KEY, support, query)
        if derivative:
            program = jax.grad(lambda hp, support, query: end(hp, support, query, num_steps))
        compiled = jax.jit(program).lower(hyperparams, support, query).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    outputs = 500 * query["y"].size * 8
    assert temporary(506) - temporary(6) <= 2 * outputs + 1000
    assert temporary(506, derivative=True) - temporary(6, derivative=True) > 4 * outputs


@pytest.mark.once
def test_model_state_is_carried_and_seen():
    """A running mean of the inputs, which the outer loss subtracts."""

    def with_state(params, hyperparams, batch, context):
        mean = 0.5 * context.model_state + 0.5 * batch["x"].mean()
        value = ((params["w"] * (batch["x"] - mean) - batch["y"]) ** 2).mean()
        return value, mean

    def outer(params, hyperparams, batch, context):
        return ((params["w"] * (batch["x"] - context.model_state) - batch["y"]) ** 2).mean()

    a = few_shot.maml(
        with_state,
        outer_loss=outer,
        init=lambda key, hp, data: (hp["init"], jnp.zeros([])),
        rate=RATE,
        proximal=0.5,
        with_context=True,
    )
    hyperparams, task = a.hyperparams({"w": jnp.array(0.7)}), jax.tree.map(jnp.asarray, TASK)
    estimate = a.estimator.estimate(hyperparams, task, KEY)[0]

    def by_hand(hp):
        (x, y), (xq, yq) = ((data["x"], data["y"]) for data in DATA)
        mean = 0.5 * x.mean()
        w = hp["w"] - RATE * (2 * (hp["w"] * (x - mean) - y) * (x - mean)).mean()  # the proximal term rests at θ_0
        return ((w * (xq - mean) - yq) ** 2).mean()

    assert estimate.value == pytest.approx(by_hand({"w": np.array(0.7)}), rel=1e-12)
    expected = differences(lambda w: by_hand({"w": w}), np.array(0.7))
    # d θ_1 / d λ with the proximal term: its pull on θ and on λ cancel at the first step.
    np.testing.assert_allclose(estimate.hypergrad["init"]["w"], expected, rtol=1e-7)
    predict = lambda params, query, context: params["w"] * (query["x"] - context.model_state)
    outputs = few_shot.adapted(a, hyperparams, predict, with_context=True)(KEY, task.train, task.valid)
    np.testing.assert_allclose(outputs[0], 0.7 * DATA[1]["x"], rtol=1e-12)
    np.testing.assert_allclose(((outputs[1] - DATA[1]["y"]) ** 2).mean(), estimate.value, rtol=1e-12)
    # The unrolled loop, as the docstring of `adapted` describes it.
    state = hypergrad.unroll(a.unrolling.loop, num_steps=1)(KEY, hyperparams, task.train)
    context = a.unrolling.loop.context(state)
    context = context._replace(model_state=context.model_state.own)
    np.testing.assert_allclose(predict(a.params(state, hyperparams), task.valid, context), outputs[1], rtol=1e-12)


@pytest.mark.parametrize("returned", ["nothing", "state"])
def test_a_loss_that_omits_running_statistics_logs_one_warning(returned, caplog):
    def loss(params, hyperparams, batch, context):
        value = ((params["w"] * (batch["x"] - context.model_state["mean"]) - batch["y"]) ** 2).mean()
        return value if returned == "nothing" else (value, context.model_state)

    init = lambda key, hp, data: (hp["init"], {"mean": jnp.zeros([])})
    outer = lambda *args: jax.tree.leaves(loss(*args))[0]
    a = few_shot.maml(loss, outer_loss=outer, init=init, rate=RATE, with_context=True)
    a.estimator.estimate(a.hyperparams({"w": jnp.array(0.7)}), jax.tree.map(jnp.asarray, TASK), KEY)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == (returned == "nothing")
    assert all("mean" in message and "(loss, model_state)" in message for message in messages)


def test_leaves_whose_paths_look_alike_are_two():
    params = {"enc/w": jnp.array([2.0]), "enc": {"w": jnp.array([5.0])}, "head": jnp.array([0.1])}
    product = lambda p, _, batch: ((p["enc/w"] * p["enc"]["w"] * p["head"] * batch - 3.0) ** 2).sum()
    task = base.Task(jnp.ones(1), jnp.ones(1))
    value = lambda a, init: a.estimator.estimate(a.hyperparams(init), task, KEY)[0].value
    assert value(few_shot.anil(product, num_steps=0), params) == 4.0
    # `init` makes one of them; the other is that of λ.
    doubled = lambda key, hp, data: {**hp["init"], "enc": {"w": 2 * hp["init"]["enc"]["w"]}}
    assert value(few_shot.anil(product, num_steps=0, init=doubled), params) == 1.0


def test_init_may_pass_on_leaves_under_other_keys():
    """`init` returns a NamedTuple: its leaves are those of λ["init"], but under other keys."""

    class Params(NamedTuple):
        body: jax.Array
        head: jax.Array

    loss = lambda p, _, batch: ((p.body * p.head * batch - 3.0) ** 2).sum()
    params, task = {"body": jnp.ones(1), "head": jnp.ones(1)}, base.Task(jnp.ones(1), jnp.ones(1))
    value = lambda a: a.estimator.estimate(a.hyperparams(params), task, KEY)[0].value
    init = lambda key, hp, data: Params(**hp["init"])
    assert value(few_shot.anil(loss, num_steps=0, init=init)) == 4.0


def with_made(params):
    """A gain out of the support set, and a changed bias, neither of which adapts."""
    gain = 1 + 0.3 * params["hidden"]["b"][0] * DATA[0]["y"].mean()
    return {**params, "gain": gain, "out": {"w": params["out"]["w"], "b": 2.0 * params["out"]["b"]}}


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.once
def test_leaves_made_by_init_that_do_not_adapt_stay(order):
    a = few_shot.anil(
        loss, init=lambda key, hp, data: with_made(hp["init"]), head="hidden", num_steps=2, rate=RATE, order=order
    )
    hyperparams, task = jax.tree.map(jnp.asarray, (a.hyperparams(META), TASK))
    estimate = jax.jit(lambda hp: a.estimator.estimate(hp, task, KEY)[0])(hyperparams)
    end = trained(with_made(META), 2, lambda path: "hidden" in path)[-1]
    assert estimate.value == pytest.approx(error(end, DATA[1]), rel=1e-12)

    def by_hand(meta):
        if order == "second":
            return error(trained(with_made(meta), 2, lambda path: "hidden" in path)[-1], DATA[1])
        moved = jax.tree.map(lambda a, b: a - b, end["hidden"], META["hidden"])  # held
        start = with_made(meta)
        return error(start | {"hidden": jax.tree.map(lambda a, b: a + b, start["hidden"], moved)}, DATA[1])

    expected = differences(by_hand, META)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), estimate.hypergrad["init"], expected
    )
    predict = lambda params, query: network(params, query["x"])
    outputs = few_shot.adapted(a, hyperparams, predict)(KEY, task.train, task.valid)
    np.testing.assert_allclose(outputs[-1], predicted(end, DATA[1]["x"]), rtol=1e-10)


@pytest.mark.parametrize(
    "rule",
    [
        None,
        functools.partial(hypergrad.evolution, sigma=1e-4, num_pairs=2000),
    ],
    ids=["no rule", "evolution"],
)
def test_rules_that_see_init_have_the_derivative_through_leaves_that_it_made(rule):
    """The body enters only through the gain that `init` makes of it."""
    gain = lambda key, hyperparams, data: {**hyperparams["init"], "gain": jnp.sin(hyperparams["init"]["body"])}
    loss = lambda params, hyperparams, batch: ((params["gain"] * params["head"] * batch - 2.0) ** 2).mean()
    meta, size = {"body": jnp.array(0.7), "head": jnp.array(0.3)}, 1e-6
    task = base.Task(jnp.array([1.0, 2.0]), jnp.array([1.5, -0.5]))

    def outer(body):
        """f after two steps of the head, in NumPy."""
        head, product = 0.3, np.sin(body) * np.array(task.train)
        for _ in range(2):
            head = head - 0.1 * (2 * product * (product * head - 2.0)).mean()
        return ((np.sin(body) * head * np.array(task.valid) - 2.0) ** 2).mean()

    a = few_shot.adaptation(loss, init=gain, adapt="head", rate=0.1, num_steps=2, rule=rule)
    hyperparams = a.hyperparams(meta)
    estimate, _ = jax.jit(a.estimator.estimate)(hyperparams, task, a.estimator.init(KEY, hyperparams, task))
    error = 4 * np.sqrt(estimate.metrics.get("sampling_variance", 0.0)) + 1e-8
    expected = (outer(0.7 + size) - outer(0.7 - size)) / (2 * size)
    assert error < abs(expected) / 4
    assert abs(estimate.hypergrad["init"]["body"] - expected) < error


def test_inputs_and_labels_of_a_support_set_may_be_trees():
    def line(params, batch):
        levels, slopes = batch["x"]
        return levels[:, 0] + params["w"] * slopes

    loss = lambda params, hyperparams, batch: jnp.square(line(params, batch) - batch["y"]["of"]).mean()
    slopes = jnp.arange(4.0)
    side = {"x": (jnp.ones((4, 1)), slopes), "y": {"of": slopes}}
    a = few_shot.maml(loss, num_steps=1, rate=0.1)
    outputs = jax.jit(few_shot.adapted(a, a.hyperparams({"w": jnp.ones(())}), line))(KEY, side, side)
    # All errors are 1, so that the gradient is twice the mean slope, 3.
    np.testing.assert_allclose(outputs, [1 + slopes, 1 + 0.7 * slopes], rtol=1e-10)


# ---- What no step changes is computed once ---------------------------------------------------------------------------


def units(params, x, layers):
    for layer in layers:
        x = jnp.tanh(x @ params[layer]["w"] + params[layer]["b"][None])
    return x


DEEP = {"first": tree(RNG)["hidden"], "second": {"w": RNG.normal(size=(3, 3)), "b": RNG.normal(size=3)}}
DEEP |= {"head": tree(RNG)["out"], "gain": np.array([1.1, 0.9])}
SIDES = [{**data, "mask": np.array([1.0] * (len(data["x"]) - 1) + [0.0])} for data in DATA]  # the last row is padding


def masked(outputs, batch):
    return (batch["mask"][:, None] * (outputs - batch["y"]) ** 2).sum() / batch["mask"].sum()


def deep(params, batch):
    return params["gain"].mean() * units(params, batch["x"], ("first", "second")) @ params["head"]["w"]


def deep_loss(params, hyperparams, batch):
    return masked(deep(params, batch), batch)


def jitted_loss(params, hyperparams, batch):
    """The whole model is one nested call."""
    return masked(jax.jit(deep)(params, batch), batch)


def noisy_loss(params, hyperparams, batch, context):
    """Dropout after the first layer; the model's state is a running mean of the second's units."""
    kept = jax.random.bernoulli(context.key, 0.7, (3,))
    x = units(params, units(params, batch["x"], ("first",)) * kept[None], ("second",))
    value = masked((x - context.model_state[None]) @ params["head"]["w"], batch)
    return value, 0.5 * context.model_state + 0.5 * x.mean(0)


def normal_of_support(params, batch):
    """Units that are normalized by the support set, wherever they are."""
    x = units(params, batch["x"], ("first", "second"))
    reference = params.get("support", batch)
    features = units(params, reference["x"], ("first", "second")) * reference["mask"][:, None]
    return (x - features.sum(0, keepdims=True) / reference["mask"].sum()) @ params["head"]["w"] + params["head"]["b"][
        None
    ]


def with_state(key, hyperparams, data):
    return hyperparams["init"], jnp.zeros(3)


def made_bias(key, hyperparams, data):
    """A bias of the body that the support set makes, and that does not adapt."""
    params = hyperparams["init"]
    second = {"w": params["second"]["w"], "b": params["first"]["w"][0] * data["y"].mean()}
    return {**params, "second": second}


def gain_in_front(params, hyperparams, batch):
    return deep_loss(params, hyperparams, {**batch, "x": params["gain"] * batch["x"]})


TWO = {"num_steps": 2, "rate": RATE}
ONCE = {  # an adaptation; the shapes of what is computed once
    "a nested call": (few_shot.anil(jitted_loss, **TWO), [(4, 3)]),
    "a layer in the middle": (few_shot.adaptation(deep_loss, adapt="second", **TWO), [(4, 3)]),
    "a value a step": (
        few_shot.anil(deep_loss, rates="leaf", rates_per_step=True, leaves_per_step="gain", **TWO),
        [(4, 3)],
    ),
    "dropout and a state": (
        few_shot.anil(
            noisy_loss, init=with_state, with_context=True, outer_loss=lambda *args: noisy_loss(*args)[0], **TWO
        ),
        [(4, 3)],
    ),
    "made by init": (few_shot.anil(deep_loss, init=made_bias, **TWO), [(4, 3)]),
    "made by init, first order": (few_shot.anil(deep_loss, init=made_bias, order="first", **TWO), [(4, 3)]),
    "normalized": (
        few_shot.anil(
            lambda params, hyperparams, batch: masked(normal_of_support(params, batch), batch), keep_support=True, **TWO
        ),
        [(4, 3)],
    ),
    "checkpoints": (few_shot.anil(deep_loss, num_steps=4, rate=RATE, remat="sqrt", outer="mean"), [(4, 3)]),
}
NOT_ONCE = {
    "all adapt": few_shot.maml(deep_loss),
    "what comes first adapts": few_shot.boil(deep_loss),
    "a value a step in front": few_shot.anil(gain_in_front, leaves_per_step="gain", **TWO),
    "a sampler": few_shot.anil(deep_loss, sampler=inner.minibatch(2)),
    # A value that is computed only from λ may depend on the number of rows.
    "a sampler, and a product of λ": few_shot.anil(
        lambda params, hyperparams, batch: (
            (params["first"]["w"] @ params["second"]["w"]).mean() / len(batch["x"])
            + deep_loss(params, hyperparams, batch)
        ),
        sampler=inner.minibatch(2),
    ),
}


def hold(loss, has_aux=False):
    """First order: inner gradients are held, and what `init` made is read as λ is."""

    def held(params, hyperparams, batch, context):
        grads, state = jax.grad(loss, has_aux=True)(*jax.lax.stop_gradient((params, hyperparams, batch, context)))
        return grads, state._replace(made=context.model_state.made)

    return held


OPTIONS = {"checkpoints": {"remat": "sqrt", "outer": "mean"}, "made by init, first order": {"grad": hold}}


@pytest.fixture(scope="module")
def both_ways():
    """Estimates with, and without: by `problem`, which computes all of g at every step."""
    sides = [jax.tree.map(jnp.asarray, side) for side in SIDES]
    hyperparams = {name: a.hyperparams(jax.tree.map(jnp.asarray, DEEP), sides[0]) for name, (a, _) in ONCE.items()}

    def program(hyperparams):
        pairs = {}
        for name, (a, _) in ONCE.items():
            plain = hypergrad.unrolled(a.problem, num_steps=a.test_steps, **OPTIONS.get(name, {}))
            estimate = lambda e, name=name: e.estimate(hyperparams[name], base.Task(*sides), KEY)[0]
            pairs[name] = estimate(a.estimator), estimate(plain)
        return pairs

    return hyperparams, sides, jax.device_get(jax.jit(program)(hyperparams))


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.once
def test_values_that_no_step_changes_are_computed_once(name, both_ways):
    hyperparams, sides, pairs = both_ways
    close(*pairs[name])
    slopes = pairs[name][0].hypergrad["init"]
    assert min(abs(slopes["first"]["w"]).max(), abs(slopes["head"]["w"]).max()) > 1e-3
    a, shapes = ONCE[name]
    # And the steps use it: without a word they would compute all of it again.
    estimators = a.estimator, hypergrad.unrolled(a.problem, num_steps=a.test_steps, **OPTIONS.get(name, {}))
    once, always = (
        hypergrad.flops(
            lambda hp, e=e: e.estimate(hp, base.Task(*sides), KEY)[0].hypergrad, hyperparams[name], products_only=True
        )
        for e in estimators
    )
    assert once == always if name == "checkpoints" else once < always
    state = jax.eval_shape(a.unrolling.loop.init, KEY, hyperparams[name], sides[0])
    assert [x.shape for x in state.model_state.once] == shapes
    assert jax.eval_shape(a.problem.loop.init, KEY, hyperparams[name], sides[0]).model_state.once == ()


@pytest.mark.parametrize("name", NOT_ONCE)
def test_values_that_a_step_changes_are_not_computed_once(name):
    side, hyperparams = jax.tree.map(jnp.asarray, (SIDES[0], {"init": DEEP}))
    state = jax.eval_shape(NOT_ONCE[name].unrolling.loop.init, KEY, hyperparams, side)
    assert state.model_state.once == ()


@pytest.mark.once
def test_predictions_compute_the_body_once_too():
    """Predictions of a query set with statistics of the support set: the body is computed once for both."""
    sides = [jax.tree.map(jnp.asarray, side) for side in SIDES]
    a, _ = ONCE["normalized"]
    hyperparams = a.hyperparams(jax.tree.map(jnp.asarray, DEEP))

    def at_every_step(params, query):
        """Hidden in a branch that the head decides on."""
        return jax.lax.cond(params["head"]["b"][0] < 1e9, normal_of_support, lambda p, q: q["y"], params, query)

    method = few_shot.adapted(a, hyperparams, normal_of_support, num_steps=6)
    without = few_shot.adapted(a._replace(unrolling=a.problem), hyperparams, at_every_step, num_steps=6)
    close(jax.jit(method)(KEY, *sides), jax.jit(without)(KEY, *sides))
    count = lambda method: hypergrad.flops(method, KEY, *sides, products_only=True)
    head = 2 * 3 * (3 * 4 + 5)  # a step's forward pass and gradient on the support set, and the query set's outputs
    body = 2 * (3 + 9) * (4 + 5 + 4)  # the query set is normalized by the support set
    assert count(method) <= 7 * head + 2 * body < 6 * body < count(without)


def test_the_cost_of_more_steps_is_that_of_the_head():
    """Operations of one hypergradient, by the number of steps."""
    side = {"x": jnp.ones((4, 1)), "y": jnp.ones((4, 1)), "mask": jnp.ones(4)}
    hyperparams = {"init": jax.tree.map(jnp.asarray, DEEP)}

    def count(num_steps, adapt, always=False):
        a = few_shot.adaptation(deep_loss, adapt=adapt, num_steps=num_steps)
        estimator = hypergrad.unrolled(a.problem, num_steps=num_steps) if always else a.estimator
        program = lambda hp: estimator.estimate(hp, base.Task(side, side), KEY)[0].hypergrad
        return hypergrad.flops(program, hyperparams, products_only=True)

    step = lambda *args, **options: (count(16, *args, **options) - count(6, *args, **options)) / 10
    forward = 2 * 4 * (3 + 9 + 3)
    assert step("head") <= 8 * 2 * 4 * 3  # the head's share of `forward`, and of its derivatives
    assert step("head", always=True) > 2 * forward
    assert step("") == step("", always=True)


def test_errors_of_the_part_that_is_computed_once_are_raised():
    """Only errors at trace time are suppressed. The network fails once: a second computation would succeed."""
    failures = [MemoryError("of the query set")]

    def fail_once(x):
        if failures:
            raise failures.pop()
        return x

    def network(params, query):
        x = jax.pure_callback(fail_once, jax.ShapeDtypeStruct(query["x"].shape, query["x"].dtype), query["x"])
        return deep(params, {**query, "x": x})

    side = jax.tree.map(jnp.asarray, SIDES[0])
    a = few_shot.anil(deep_loss, sampler=inner.minibatch(2))  # whose steps compute all of g
    method = few_shot.adapted(a, {"init": jax.tree.map(jnp.asarray, DEEP)}, network)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of the query set"):
        jax.block_until_ready(method(KEY, side, side))
    method(KEY, side, side)


def test_at_test_init_is_called_once_and_a_stopped_derivative_is_zero():
    calls = []

    def init(key, hyperparams, data):
        calls.append(0)
        return hyperparams["init"]

    a = few_shot.maml(loss, init=init)
    hyperparams = a.hyperparams(jax.tree.map(jnp.asarray, META))
    support, query = jax.tree.map(jnp.asarray, DATA)
    a.unrolling.loop.init(KEY, hyperparams, support)
    alone, method = len(calls), lambda hp: few_shot.adapted(a, hp, lambda p, q: network(p, q["x"]))(KEY, support, query)
    calls.clear()
    assert method(hyperparams).shape == (2, 5, 1) and len(calls) == alone
    assert not jax.grad(lambda x: jax.lax.stop_gradient(method({**hyperparams, "init": x})).sum())(META)["out"]["b"]


@pytest.mark.once
def test_values_that_are_computed_once_are_stored_once():
    x = jnp.ones((64, 4))
    loss = lambda params, hyperparams, batch: ((jnp.tanh(batch @ params["w"]) @ params["head"]) ** 2).mean()
    a = few_shot.anil(loss, num_steps=24)
    hyperparams = {"init": {"w": jnp.ones((4, 256)), "head": jnp.ones(256)}}
    program = jax.jit(lambda hp: a.estimator.estimate(hp, base.Task(x, x), KEY)[0].hypergrad)
    assert program.lower(hyperparams).compile().memory_analysis().temp_size_in_bytes < 8 * (64 * 256 * 8)


def test_convolutions_of_init_and_of_predictions_are_products():
    """On CPU those in a loop are slow, and those of one kernel a task too."""
    kernel = jnp.ones((2, 1, 3, 3), jnp.float32)
    features = lambda params, b: jax.lax.conv(b["x"][:, None], params["k"], (1, 1), "SAME").mean((2, 3))
    a = few_shot.prototypical_networks(features)
    part = {"x": jnp.ones((2, 5, 5), jnp.float32), "y": jnp.arange(2), "mask": jnp.ones(2), "class_mask": jnp.ones(2)}
    hyperparams = a.hyperparams({"k": kernel})
    init = jax.make_jaxpr(a.problem.loop.init)(KEY, hyperparams, part)
    method = jax.make_jaxpr(few_shot.adapted(a, hyperparams, few_shot.linear_head(features)))(KEY, part, part)
    for jaxpr in (init, method):
        assert ("conv_general_dilated" in str(jaxpr)) == (jax.default_backend() != "cpu")


def test_a_schedule_may_be_made_inside_a_program():
    outside = few_shot.maml_plus_plus(loss, num_steps=2, rate=RATE, multi_step_steps=3)
    program = lambda hp: (
        few_shot.maml_plus_plus(loss, num_steps=2, rate=RATE, multi_step_steps=3)
        .estimator.estimate(hp, jax.tree.map(jnp.asarray, TASK), KEY)[0]
        .value
    )
    hyperparams = outside.hyperparams(jax.tree.map(jnp.asarray, META))
    assert float(jax.jit(program)(hyperparams)) == pytest.approx(error(trained(META, 2)[-1], DATA[1]), rel=1e-12)


@pytest.mark.once
def test_numbers_and_rates_may_be_arrays_and_schedules():
    data = jax.tree.map(jnp.asarray, DATA)
    predict = lambda params, query: network(params, query["x"])
    for options in (
        {"num_steps": jnp.array(2), "rate": jnp.array(RATE)},
        {"num_steps": np.int64(1), "rate": optax.constant_schedule(RATE), "test_steps": jnp.array(2)},
        {"num_steps": 1, "rate": {"of": RATE}, "optimizer": lambda rate: optax.sgd(rate["of"]), "test_steps": 2},
        {"num_steps": 2, "rate": np.array([RATE, RATE]), "rates": "one", "rates_per_step": True},
        {"num_steps": 1, "rate": None, "optimizer": lambda rate: optax.sgd(RATE), "test_steps": 2},
    ):
        a = few_shot.adaptation(loss, **options)
        hyperparams = a.hyperparams(jax.tree.map(jnp.asarray, META))
        assert isinstance(a.test_steps, int)
        outputs = few_shot.adapted(a, hyperparams, predict)(KEY, *data)
        np.testing.assert_allclose(outputs[-1], predicted(trained(META, 2)[-1], DATA[1]["x"]), rtol=1e-6)
    method = few_shot.adapted(a, hyperparams, predict, num_steps=jnp.array(3))
    assert jax.eval_shape(method, KEY, *data).shape == (4, 5, 1)
    a = few_shot.maml(loss, num_steps=jnp.array(2))
    jax.eval_shape(a.estimator.estimate, a.hyperparams(META), base.Task(*data), KEY)
    assert np.isfinite(jax.jit(lambda rate: few_shot.maml(loss, rate=rate).hyperparams(META)["init"]["out"]["b"])(0.1))
    assert few_shot.maml(loss, num_steps=jnp.array(2), rule=hypergrad.reptile).estimator.kind == "pseudo"


@pytest.mark.slow
def test_learns_sinusoids():
    """A few outer steps through `fit`, several a call, and the evaluation: better than where it started."""
    a = few_shot.meta_sgd(loss, num_steps=1, rate=0.05, rates="leaf")
    start = a.hyperparams(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), META))
    result = training.fit(
        training.learner(hypergrad.over_tasks(a.estimator), optax.adam(0.05)),
        tasks.episode_batches(tasks.sinusoids(), 8),
        hyperparams=start,
        num_steps=60,
        key=KEY,
        steps_per_call=30,
    )
    predict = lambda params, query: network(params, query["x"])
    scored = few_shot.evaluate_episodes(
        {"start": few_shot.adapted(a, start, predict), "learned": few_shot.adapted(a, result.hyperparams, predict)},
        tasks.sinusoids(),
        jax.random.key(1),
        num_episodes=50,
        chunk_size=50,
        score_fn=few_shot.mean_squared_error,
        higher_is_better=False,
    )
    scores = {name: evaluation.mean_scores(scored)[name]["episodes"][0] for name in ("start", "learned")}
    assert scores["learned"] < 0.8 * scores["start"]
    assert scored.scores["learned"]["episodes"].shape == (50, 2)
