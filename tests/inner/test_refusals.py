"""What `inner` rejects, or explains where Python or JAX raises: losses, optimizers, starts, rows, labels, modules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import linen, nnx

from metaopt import _batches, base, inner

KEY = jax.random.key(0)
DATA = problems.TASK.train
LAM = {"rate": jnp.array(0.1), "penalty": jnp.full(problems.NUM_FEATURES, 0.2)}


def numbers(state):
    """A state without typed keys, which cannot be compared."""
    return state._replace(key=jax.random.key_data(state.key))


def make(loss=problems.penalized, optimizer=lambda hp: optax.adam(hp["rate"]), init=problems.zeros, **options):
    return inner.loop(loss, optimizer, init=init, **options)


def step(**options):
    loop = make(**options)
    return jax.eval_shape(lambda: numbers(inner.step(loop, loop.init(KEY, LAM, DATA), LAM, DATA)))


def step_of_loss(value, **options):
    return step(loss=lambda params, *_: value(params), **options)


def step_from(params):
    return step(init=lambda *_: params)


def run(optimizer=lambda hp: optax.adam(hp["rate"]), **options):
    loop = make(optimizer=optimizer, **options)
    return jax.eval_shape(lambda lam: numbers(inner.run(loop, num_steps=2)(KEY, lam, DATA)), LAM)


def changing_state(after):
    """An optimizer whose state {"a": [2]} is `after` of it after one step."""
    return lambda hp: optax.GradientTransformation(
        lambda params: {"a": jnp.zeros(2)}, lambda updates, state, params=None: (updates, after(state))
    )


def outer_loss(value):
    problem = inner.problem(make(), lambda params, hyperparams, batch: value(params))
    return problem.outer_loss(jnp.zeros(2), LAM, problems.TASK.valid, None)


def piecewise(windows, hyperparams=LAM):
    problem = inner.piecewise(inner.problem(make(), problems.penalized), windows, num_steps=4)
    return problem.loop.init(KEY, hyperparams, DATA)


def weighted(losses, weights, **options):
    return inner.weighted(losses, weights, **options)(None, None, None)


def rows(data, **options):
    return inner.minibatch(2, **options)(KEY, 0, data)


def dense():
    return inner.from_linen(linen.Dense(2), jnp.ones((1, 3)))


def deterministic_training():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.Dense(2)(x)

    model = inner.from_linen(Net(), jnp.ones((1, 3)))
    params, state = model.init(KEY, None, None)
    context = base.Context(KEY, jnp.int32(0), state)
    return model.apply(params, context, jnp.ones((1, 3)), train=True, deterministic=True)


SCALAR = "The inner loss must return a floating-point scalar; got "
FACTORY = r"(?s){}.*`optimizer` must be a factory"
CONCRETE = r"`optimizer` needs the concrete value of a hyperparameter.*`transforms.cosine_sched"
LABELS = np.array([0, 1, 1])
CLASS_MASKS = [
    ({"y": LABELS * 1.0}, r'The labels "y" must be integers.*got float'),
    ({"y": LABELS, "class_mask": np.ones(3)}, r'"class_mask" must be \[C\] = \(2,\).*got shape \(3,\)'),
    ({"y": LABELS, "class_mask": np.ones((3, 2))}, r'"class_mask" must be \[C\] = \(2,\).*got shape \(3, 2\)'),
]


def cross_entropy(batch):
    """Of traced labels."""
    return jax.eval_shape(lambda batch: inner.cross_entropy(jnp.zeros((3, 2)), batch), batch)


REFUSALS = [
    # Losses.
    (
        lambda: step(loss=lambda params, hp, batch: (batch["x"] @ params - batch["y"]) ** 2),
        ValueError,
        SCALAR + r"shape \(20,\) and dtype float64. Reduce an array",
    ),
    (lambda: step_of_loss(lambda params: jnp.int32(1)), ValueError, SCALAR + r"shape \(\) and dtype int32"),
    (lambda: step_of_loss(lambda params: (params.sum(), None)), ValueError, SCALAR + "type tuple.*with_context=True"),
    (lambda: step_of_loss(lambda params: "a"), ValueError, SCALAR + "type str"),
    *(
        (lambda value=value: outer_loss(value), ValueError, "The outer loss must return a floating-point scalar")
        for value in (lambda p: "a", lambda p: p, lambda p: (p.sum(), None), lambda p: {"loss": p.sum()})
    ),
    (lambda: weighted(lambda *_: 1.0, lambda *_: np.ones(3)), ValueError, r"one number for each example, shape \[B\]"),
    (
        lambda: weighted(lambda *_: np.ones(3), lambda *_: np.ones(2)),
        ValueError,
        r"example, shape \[B\]; got shapes",
    ),
    (lambda: weighted(lambda *_: np.ones(3), lambda *_: np.ones(3), normalize="mean"), KeyError, "mean"),
    # Parameters.
    (
        lambda: step_from({"w": jnp.zeros(2), "n": jnp.zeros(2, int)}),
        ValueError,
        r"The parameters must be floating-point arrays; the leaf \['n'\] is of dtype int64",
    ),
    (
        lambda: step_from({"w": jnp.zeros(2, complex)}),
        ValueError,
        r"the leaf \['w'\] is of dtype complex128.*Train the real and the imaginary part",
    ),
    (
        lambda: step_from({"w": jnp.zeros(2), "activation": jnp.tanh}),
        ValueError,
        r"The parameters must be floating-point arrays; the leaf \['activation'\] is of type",
    ),
    (
        lambda: step_of_loss(lambda params: params.sum(), init=lambda *_: jnp.zeros(2), with_context=True),
        ValueError,
        r"With `with_context=True`, `init` must return a pair \(params, model state\)",
    ),
    # A state that a step changes is an error of JAX.
    (lambda: run(changing_state(lambda state: {"b": state["a"]})), TypeError, "carry"),
    (lambda: run(changing_state(lambda state: {"a": jnp.zeros(3)})), TypeError, "carry"),
    (lambda: run(changing_state(lambda state: {"a": state["a"].astype(int)})), TypeError, "carry"),
    (
        lambda: run(
            loss=lambda params, *_: (params.sum(), {"mean": 0.0, "var": 1.0}),
            init=lambda *_: (jnp.zeros(2), {"mean": 0.0}),
            with_context=True,
        ),
        TypeError,
        "carry",
    ),
    # Optimizers.
    (lambda: step(optimizer=lambda hp: optax.adam()), TypeError, FACTORY.format("learning_rate")),
    (
        lambda: step(optimizer=optax.adam(0.1)),
        TypeError,
        FACTORY.format("'GradientTransformation.*' object is not callable"),
    ),
    (
        lambda: run(lambda hp: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, hp["rate"], 3, 10))),
        ValueError,
        CONCRETE,
    ),
    (lambda: run(lambda hp: optax.sgd(hp["rate"] if hp["rate"] > 0 else 0.0)), ValueError, CONCRETE),
    (lambda: run(lambda hp: optax.sgd(float(hp["rate"]))), ValueError, CONCRETE),
    (lambda: run(lambda hp: optax.sgd(np.asarray(hp["rate"]))), ValueError, CONCRETE),
    (lambda: run(lambda hp: optax.sgd(lambda step: jnp.linspace(0, 1, hp["rate"])[step])), ValueError, CONCRETE),
    (lambda: run(lambda hp: optax.sgd(lambda step: float(hp["rate"]))), ValueError, CONCRETE),
    # Numbers of steps, and windows.
    (lambda: inner.run(make(), num_steps=-1), ValueError, "`num_steps` must be at least 0, or None; got -1"),
    (lambda: inner.run(make(), 2.5), ValueError, "`num_steps` must be an integer of at least 0, or None; got 2.5"),
    (lambda: piecewise({"rate": -1, "penalty": 2}), ValueError, "`windows` must be between 0 and .* is 4; got -1"),
    (lambda: piecewise(5), ValueError, "`windows` must be between 0 and `num_steps`, which is 4; got 5"),
    (
        lambda: piecewise(2, {"rate": jnp.array(0.1)}),
        ValueError,
        r"λ\['rate'\] must have a leading axis of 2.*got shape \(\)",
    ),
    # Rows.
    (lambda: rows({"x": np.zeros(3), "y": np.zeros(4)}), ValueError, r"rows as its leading.*\['y'\].*\(4,\).*shared="),
    (lambda: rows({"x": np.zeros(3), "scale": np.zeros([])}), ValueError, r"rows as its leading axis.*'scale'.*\(\)"),
    (  # With a count, too: an index past the end of the other leaf would be clipped, not raise.
        lambda: rows({"x": np.zeros(8), "classes": np.zeros(3), "num_rows": 8}),
        ValueError,
        r"rows as its leading axis.*'classes'",
    ),
    (
        lambda: rows({"x": np.zeros(8), "classes": np.zeros(3), "mask": np.ones(8)}),
        ValueError,
        r"rows as its leading axis.*'classes'",
    ),
    (lambda: rows({"x": np.zeros((0, 2))}), ValueError, "at least one"),
    (lambda: rows({}), ValueError, "at least one"),
    (lambda: inner.minibatch(0), ValueError, "`batch_size` must be at least 1; got 0"),
    (lambda: inner.minibatch(2.5), ValueError, "`batch_size` must be an integer of at least 1; got 2.5"),
    (lambda: rows({"x": np.zeros(3)}, shared=("scales",)), ValueError, r"`shared` names .*: scales\. The data have x"),
    (lambda: rows((np.zeros(3),), shared=("x",)), ValueError, r"not have: x\. The data have no names \(tuple\)"),
    # Labels: where a loss sees them, and before any training.
    *(
        (lambda batch=batch: cross_entropy(batch), ValueError, message)
        for batch, message in [
            *CLASS_MASKS,
            ({"y": LABELS[:1]}, r'The labels "y" must have the shape \(3,\), .*got \(1,\)'),
            ({"y": LABELS[:2]}, r"must have the shape \(3,\), .*got \(2,\)"),
            ({"y": LABELS[:, None]}, r"must have the shape \(3,\), .*got \(3, 1\)"),
            ({"y": np.eye(2, dtype=int)[LABELS]}, r"must have the shape \(3,\), .*got \(3, 2\).*argmax"),
            ({"y": LABELS, "mask": np.ones((3, 1))}, r'"mask" must be \[N\].*got shape \(3, 1\)'),
            ({"y": LABELS, "mask": np.ones(2)}, r'"mask" must be \[N\].*got shape \(2,\)'),
        ]
    ),
    *((lambda batch=batch: _batches.check_labels(batch, 2), ValueError, message) for batch, message in CLASS_MASKS),
    *(
        (lambda batch=batch: jax.eval_shape(lambda b: _batches.check_labels(b, 2), batch), ValueError, message)
        for batch, message in CLASS_MASKS
    ),
    *(
        (
            lambda num=num: _batches.check_labels({"x": np.zeros((3, 4)), "y": LABELS[:num]}, 2),
            ValueError,
            '"x" and "y" must have the same number of rows; got 3 and',
        )
        for num in (1, 2)
    ),
    (
        lambda: step(optimizer=lambda hp: optax.masked(optax.sgd(hp["rate"]), {"a": True})),
        ValueError,
        "mask or labels must have their structure",
    ),
    # The arguments of losses.
    (lambda: make(lambda params, hp, batch, context: 0.0), ValueError, "`loss` takes four .* `with_context=True`"),
    (lambda: make(lambda params, hp, batch: 0.0, with_context=True), ValueError, "`loss` takes three arguments"),
    (lambda: inner.problem(make(), lambda params, hp, batch, context: 0.0), ValueError, "`outer_loss` takes four"),
    # Modules.
    (lambda: inner.from_nnx(nnx.Linear(2, 1, rngs=nnx.Rngs(0))), TypeError, "takes a function .* got Linear"),
    (lambda: inner.from_linen(linen.Dense, None), TypeError, r"such as `Dense\(\.\.\.\)`; got the class"),
    (lambda: dense().init(KEY, None, None), TypeError, "unexpected keyword argument 'train'"),
    (deterministic_training, ValueError, "`deterministic=True` with `train=True` needs a keyword `deterministic`"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):  # of notes, too
        call()
