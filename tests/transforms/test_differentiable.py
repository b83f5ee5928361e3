"""Any optax transform: the same values, and a derivative that is finite where gradients are exactly zero."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import transforms


def clipped(make):
    return lambda rate: optax.chain(optax.clip_by_global_norm(0.5), make(rate))


OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=rate),
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "radam": optax.radam,
    "amsgrad": optax.amsgrad,
    "adamax": optax.adamax,
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adagrad": optax.adagrad,
    "adafactor": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2),
    "rmsprop": optax.rmsprop,
    "rmsprop_centered": lambda rate: optax.rmsprop(rate, centered=True, momentum=0.5),
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lion": optax.lion,
    "novograd": optax.novograd,
    "yogi": optax.yogi,
    "sm3": optax.sm3,
    "clipped_sgd": clipped(optax.sgd),
    "clipped_adam": clipped(optax.adam),
}
NUM_STEPS = 2
# A matrix with a dead row and a dead entry, a vector that is dead as a whole, a vector that lives.
ALIVE = {
    "matrix": np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]),
    "dead": np.zeros(2),
    "vector": np.ones(2),
}
START = {
    "matrix": np.array([[0.5, -1.0, 0.3], [0.4, 0.2, -0.7], [-0.6, 0.8, 1.1]]),
    "dead": np.array([0.5, -0.5]),
    "vector": np.array([1.2, -0.4]),
}


def loss(params, scale, alive):
    return sum(
        (mask * jnp.sin(scale * leaf + 0.3)).sum()
        for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(alive), strict=True)
    )


def train(optimizer, lam, alive, wrap=transforms.differentiable, num_steps=NUM_STEPS):
    """θ_T and the optimizer's state; λ: the rate, and a scale within the loss."""
    params = jax.tree.map(lambda x: jnp.asarray(x, lam["rate"].dtype), START)
    transform = wrap(optimizer(lam["rate"]))

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params, lam["scale"], alive), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, transform.init(params)), length=num_steps)[0]


def objective(optimizer, lam, alive=ALIVE):
    return loss(train(optimizer, lam, alive)[0], 1.3, jax.tree.map(np.ones_like, START))


LAM = {"rate": jnp.array(0.05), "scale": jnp.array(0.9)}


EVERYWHERE = ("adamw", "adafactor", "clipped_sgd", "rmsprop")  # on every Python


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", [n if n in EVERYWHERE else pytest.param(n, marks=pytest.mark.once) for n in OPTIMIZERS]
)
def test_values_are_equal_to_the_bit(name):
    expected, values = (
        jax.jit(lambda lam, wrap=wrap: train(OPTIMIZERS[name], lam, ALIVE, wrap))(LAM)
        for wrap in (lambda optimizer: optimizer, transforms.differentiable)
    )
    chex.assert_trees_all_equal(values, expected)


# `test_every_optax_transform` has all of them.
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["adafactor", "clipped_adam"])
@pytest.mark.once
def test_values_in_lower_precision_are_equal_to_the_bit(name, dtype):
    lam = jax.tree.map(lambda x: x.astype(dtype), LAM)
    with jax.enable_x64(False):
        expected, values = (
            jax.jit(lambda lam, wrap=wrap: train(OPTIMIZERS[name], lam, ALIVE, wrap))(lam)
            for wrap in (lambda optimizer: optimizer, transforms.differentiable)
        )
    chex.assert_trees_all_equal(values, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(values[0])} == {jnp.dtype(dtype)}


# Left to the slow tests: a relative of each is among the others.
ALIKE = (
    "nadam",
    "nadamw",
    "radam",
    "adamax",
    "adabelief",
    "adagrad",
    "rmsprop_centered",
    "lars",
    "yogi",
    "clipped_adam",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in OPTIMIZERS])
@pytest.mark.once
def test_derivatives_with_dead_entries(name):
    # One program: value and gradient, differentiated forward along λ itself, for two λ at once.
    value_and_grad = jax.value_and_grad(lambda lam: objective(OPTIMIZERS[name], lam))
    program = jax.jit(jax.vmap(lambda lam: jax.jvp(value_and_grad, (lam,), (lam,))))

    def derivatives_at(*lams):
        return program(jax.tree.map(lambda *xs: jnp.stack(xs), *lams))

    (_, reverse), (forward, nested) = jax.tree.map(lambda x: x[0], derivatives_at(LAM, LAM))
    chex.assert_tree_all_finite((reverse, forward, nested))
    assert abs(reverse["rate"]) > 1e-3
    np.testing.assert_allclose(forward, optax.tree.vdot(reverse, LAM), rtol=1e-8)
    # Dead entries stay dead for every λ, so that the derivatives are those of the training as a whole.
    eps = 1e-6
    values, grads = derivatives_at(*(optax.tree.scale(1 + sign * eps, LAM) for sign in (1, -1)))[0]
    np.testing.assert_allclose(forward, (values[0] - values[1]) / (2 * eps), rtol=2e-5, atol=1e-7)
    expected = jax.tree.map(lambda g: (g[0] - g[1]) / (2 * eps), grads)
    chex.assert_trees_all_close(nested, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw", jnp.float32), ("adafactor", jnp.float32), ("clipped_adam", jnp.bfloat16)]
)
@pytest.mark.once
def test_other_dtypes(name, dtype):
    lam = jax.tree.map(lambda x: x.astype(dtype), LAM)

    def function(lam):
        params, state = train(OPTIMIZERS[name], lam, ALIVE, num_steps=2)
        return loss(params, 1.0, ALIVE).astype(jnp.float32), (params, state)

    grads, (params, _) = jax.jit(jax.grad(function, has_aux=True))(lam)
    chex.assert_tree_all_finite(grads)
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, params))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(("zero", "expected"), [("exact", -0.1 / 1e-8), ("drop", 0.0)])
@pytest.mark.once
def test_the_first_step_of_adam_at_a_zero_gradient(zero, expected):
    def first_step(grad):
        adam = transforms.differentiable(optax.adam(0.1), zero=zero)
        return adam.update(grad, adam.init(grad), grad)[0]

    np.testing.assert_allclose(jax.grad(first_step)(0.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(first_step, (0.0,), (1.0,))[1], expected, rtol=1e-6)
    # Away from zero there is nothing to define, and both are the plain derivative.
    plain = jax.grad(lambda g: optax.adam(0.1, eps=0.5).update(g, optax.adam(0.1).init(g), g)[0])(0.3)
    safe = transforms.differentiable(optax.adam(0.1, eps=0.5), zero=zero)
    np.testing.assert_allclose(jax.grad(lambda g: safe.update(g, safe.init(g), g)[0])(0.3), plain, rtol=1e-12)


BROKEN_IN_OPTAX = ["adam", "adamw", "nadam", "radam", "lamb", "adafactor", "amsgrad", "clipped_sgd"]
QUICK = ("adam", "clipped_sgd")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.once) for n in BROKEN_IN_OPTAX]
)
def test_without_it_optax_gives_nan(name):
    # Or else this room has nothing to do any more. A clip is broken where the whole gradient is zero, Adafactor in
    # float32, where (1e-30)^(-3/2) overflows.
    alive = np.zeros([2, 2]) if name == "clipped_sgd" else np.array([[1.0, 1.0], [0.0, 0.0]])

    def trained(scale, wrap=lambda optimizer: optimizer):
        params = jnp.array([[0.5, -1.0], [0.4, 0.2]], scale.dtype)
        optimizer = wrap(OPTIMIZERS[name](0.05))
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(jnp.asarray(alive, scale.dtype) * jnp.sin(scale * params), state, params)
            params = params + updates
        return (params**2).sum()

    scale, eps = jnp.float32(0.9), 1e-6
    assert jnp.isnan(jax.jit(jax.grad(trained))(scale))
    gradient = jax.jit(jax.grad(lambda scale: trained(scale, transforms.differentiable)))(scale)
    values = jax.jit(jax.vmap(trained))(jnp.array([0.9 + eps, 0.9 - eps]))
    expected = (values[0] - values[1]) / (2 * eps)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3)
    assert (expected == 0) == (name == "clipped_sgd")


# A root and quotients; 1/√; a power; a norm.
COMPLEX = [
    "adam",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("rmsprop_centered", "adafactor", "clipped_adam")),
]


def train_complex(optimizer, lam, wrap=transforms.differentiable):
    """θ_T and the state, for complex θ; λ is real."""
    dtype = jnp.result_type(lam["rate"].dtype, jnp.complex64)
    params = jax.tree.map(lambda x: jnp.asarray(x + 0.5j * x[::-1], dtype), START)
    transform = wrap(optimizer(lam["rate"]))

    def real_loss(params):
        return loss(jax.tree.map(lambda z: z.real + z.imag**2, params), lam["scale"], ALIVE)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.conj, jax.grad(real_loss)(params))
        updates, state = transform.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, transform.init(params)), length=NUM_STEPS)[0]


@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.once
def test_derivatives_with_complex_dead_entries(name):
    def value(lam, wrap):
        params = train_complex(OPTIMIZERS[name], lam, wrap)[0]
        return sum((abs(z - 1) ** 2).sum() for z in jax.tree.leaves(params))

    eps = 1e-5
    ends = [{**LAM, k: LAM[k] + sign * eps} for k in LAM for sign in (1, -1)]
    plain = jax.jit(jax.vmap(lambda lam: value(lam, lambda optimizer: optimizer)))
    values = plain(jax.tree.map(lambda *xs: jnp.stack(xs), *ends)).reshape(2, 2)
    grads = jax.jit(jax.grad(lambda lam: value(lam, transforms.differentiable)))(LAM)
    expected = dict(zip(LAM, (values[:, 0] - values[:, 1]) / (2 * eps), strict=True))
    assert all(abs(x) > 1e-5 for x in expected.values())
    chex.assert_trees_all_close(grads, expected, rtol=1e-4)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64])
@pytest.mark.once
def test_complex_values_are_equal_to_the_bit(dtype):
    lam = jax.tree.map(lambda x: x.astype(dtype), LAM)
    adam = OPTIMIZERS["clipped_adam"]
    expected, values = (
        jax.jit(lambda lam, wrap=wrap: train_complex(adam, lam, wrap))(lam)
        for wrap in (lambda optimizer: optimizer, transforms.differentiable)
    )
    chex.assert_trees_all_equal(values, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(values[0])} == {jnp.result_type(dtype, jnp.complex64)}


@pytest.mark.once
def test_singular_rules_at_complex_operands():
    def update(updates, state, params=None):
        root = jnp.sqrt(updates) + jax.lax.rsqrt(updates + 1.0) + jnp.where(updates == 0, 0, jax.lax.rsqrt(updates))
        quotient = updates / (jnp.abs(updates) + 1e-8) + jnp.where(updates == 0, 0, 1 / updates)
        power = updates**0.3 + jnp.where(updates == 0, 0, updates**-2) + updates**state
        return root + quotient + power, state

    plain = optax.GradientTransformation(lambda params: jnp.array(1.5), update)
    safe = transforms.differentiable(plain)
    grads, state = jnp.array([0.3 - 0.2j, 0.0, -0.4, 2e-3j]), jnp.array(1.5)
    tangents = (jnp.full(4, 1.0 - 0.5j), jnp.array(0.7))
    values, derivatives = zip(
        *(
            jax.jit(lambda *primals, o=o: jax.jvp(lambda g, s: o.update(g, s)[0], primals, tangents))(grads, state)
            for o in (safe, plain)
        ),
        strict=True,
    )
    np.testing.assert_allclose(*values, rtol=1e-14)
    alive = np.array([0, 2, 3])
    np.testing.assert_allclose(derivatives[0][alive], derivatives[1][alive], rtol=1e-12)
    assert jnp.isnan(derivatives[1][1])
    # For the entry with a zero gradient, only the derivative of 1/√(x + 1) is left.
    np.testing.assert_allclose(derivatives[0][1], -0.5 * (1.0 - 0.5j), rtol=1e-12)


def test_outputs_have_the_types_that_they_have_under_jit():
    def update(updates, state, params=None):
        return updates, {"flag": False, "count": 1, "rate": 0.5, "array": np.arange(2.0), "passed": state["passed"]}

    constants = optax.GradientTransformation(lambda params: {"passed": True}, update)
    for transform in (constants, optax.optimistic_adam_v2(0.1)):
        params = jnp.ones(2)
        operands = (params, transform.init(params), params)
        expected, outputs = jax.jit(transform.update)(*operands), transforms.differentiable(transform).update(*operands)
        chex.assert_trees_all_equal(outputs, expected)
        leaves = jax.tree.leaves(outputs)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        assert [leaf.aval for leaf in leaves] == [leaf.aval for leaf in jax.tree.leaves(expected)]


@pytest.mark.once
def test_control_flow_and_custom_derivatives_within_a_transform():
    def update(updates, state, params=None):
        def body(i, x):
            return x / (jnp.sqrt(x**2) + 1e-3)

        looped = jax.lax.fori_loop(0, 2, body, updates)  # a scan
        chosen = jax.lax.cond(state > 0, lambda x: x / jnp.sqrt(jnp.abs(x)), lambda x: 2 * x, looped)
        _, scanned = jax.lax.scan(lambda c, x: (c, jax.nn.relu(x) + jnp.cbrt(x)), 0.0, chosen)
        counted = jax.lax.while_loop(lambda c: c < 3, lambda c: c + 1, state)
        return jnp.where(updates == 0, 0.0, scanned), counted

    transform = optax.GradientTransformation(lambda params: jnp.array(1), update)
    safe = transforms.differentiable(transform)
    grads = jnp.array([0.5, 0.0, -0.3])
    for state in (jnp.array(1), jnp.array(0)):
        chex.assert_trees_all_close(safe.update(grads, state), transform.update(grads, state), rtol=1e-12)
        slopes = jax.grad(lambda g, state=state: safe.update(g, state)[0].sum())(grads)
        chex.assert_tree_all_finite(slopes)
        plain = jax.grad(lambda g, state=state: transform.update(g, state)[0].sum())(grads)
        chex.assert_trees_all_close(slopes[jnp.array([0, 2])], plain[jnp.array([0, 2])], rtol=1e-9)


def test_extra_arguments_reach_the_transform():
    def update(updates, state, params=None, *, value, value_fn, tree, double, name):
        factor = tree["a"] * (2 if double and name == "it" else 1)  # Python's own values are not traced
        return jax.tree.map(lambda u: u * value * factor + value_fn(params), updates), state

    safe = transforms.differentiable(optax.GradientTransformationExtraArgs(lambda params: (), update))
    options = {"value_fn": lambda p: p + 1, "tree": {"a": np.array(5.0)}, "double": True, "name": "it"}
    updates, _ = safe.update(2.0, (), 1.0, value=jnp.array(3.0), **options)
    assert updates == 2 * 3 * 10 + 2
    by_value = jax.grad(lambda value: safe.update(2.0, (), 1.0, value=value, **options)[0])(3.0)
    assert by_value == 2 * 10


def scanning():
    """A transform with a scan and a while loop inside: a running root of squares."""

    def update(updates, state, params=None):
        del params

        def accumulate(total, u):
            return 0.9 * total + jnp.sqrt(u * u), total

        total, _ = jax.lax.scan(accumulate, jnp.zeros([], updates.dtype), updates)
        count, _ = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sqrt(c[1])), (0, updates[0] ** 2))
        return updates / (total + 1e-8) * count, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.once
def test_loops_inside_a_transform():
    safe, plain = transforms.differentiable(scanning()), scanning()
    grads = jnp.array([0.0, 1.0, 2.0])
    np.testing.assert_array_equal(jax.jit(safe.update)(grads, ())[0], jax.jit(plain.update)(grads, ())[0])
    weights = jnp.array([1.0, -2.0, 3.0])
    tangent = jnp.array([0.0, 0.3, -0.5])
    _, forward = jax.jvp(lambda g: weights @ safe.update(g, ())[0], (grads,), (tangent,))
    step = 1e-6
    ends = [weights @ plain.update(grads + s * tangent, ())[0] for s in (step, -step)]
    np.testing.assert_allclose(forward, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_a_zero_that_is_a_hyperparameter_keeps_its_derivative(momentum):
    def trained(hyperparams, wrap):
        optimizer = wrap(optax.sgd(hyperparams["rate"], hyperparams["momentum"] if momentum is not None else None))
        params, state = jnp.array(0.0), optimizer.init(jnp.array(0.0))
        for gradient in (2000.0, 3000.0):
            updates, state = optimizer.update(jnp.array(gradient), state, params)
            params = params + updates
        return params

    point = {"rate": 0.0 if momentum is None else 0.1, "momentum": 0.0}
    safe, plain = (jax.grad(trained)(point, wrap) for wrap in (transforms.differentiable, lambda o: o))
    assert safe["rate"] == plain["rate"] == -5000 and safe["momentum"] == plain["momentum"]
