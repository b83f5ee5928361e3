"""What every transform of the room does as a transform of optax: pure, jitted, mapped, of any dtype, composed, saved.

A transform that is added to the room and not to `TRANSFORMS` fails `test_every_transform_of_the_room_has_a_row`.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from metaopt import transforms


def grads_of(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p), params)


def bounded(hyperparams):
    # Below the momentum to start from, so that it binds.
    return optax.projections.projection_box(
        hyperparams, {"rate": 0.0, "momentum": 0.0}, {"rate": 1.0, "momentum": 0.85}
    )


def self_tuning(carried=False, **kwargs):
    def make(beta=0.02):
        transform = transforms.self_tuning(
            lambda hp: optax.sgd(hp["rate"], hp["momentum"]), {"rate": 0.1, "momentum": 0.9}, optax.sgd(beta), **kwargs
        )
        if not carried:
            return transform

        def update(updates, state, params=None, **extra_args):  # with the `grad_fn` that a discount needs
            return transform.update(updates, state, params, grad_fn=grads_of, **extra_args)

        return optax.GradientTransformationExtraArgs(transform.init, update)

    return make


PARAMS = {"w": np.array([[0.5, -1.0], [0.3, 0.0]]), "b": np.array([0.1, -0.2])}
DECAYS, WEIGHTS = np.array([0.5, 0.9]), np.array([0.3, 0.7])
# Each with one hyperparameter for `inject_hyperparams`.
TRANSFORMS = {
    "differentiable": lambda rate=0.1: transforms.differentiable(optax.adam(rate)),
    "learned": lambda scale=1.0: optax.chain(LEARNED, optax.scale(scale)),
    "learnable_accumulation": lambda decays=DECAYS: transforms.learnable_accumulation(decays),
    "learnable_clip": lambda max_norm=0.5: transforms.learnable_clip(max_norm),
    "learnable_clip_smooth": lambda p=2.0: transforms.learnable_clip(0.5, scope="leaf", sharpness=p),
    "mixture": lambda weights=WEIGHTS: transforms.mixture([optax.adam(0.1), optax.sgd(0.1)], weights),
    "per_group": lambda decay=0.1: transforms.per_group(optax.adamw, patterns={"matrix": "w", "rest": ""})(
        0.1, weight_decay={"matrix": decay, "rest": 0.0}
    ),
    "per_parameter": lambda decay=0.1: transforms.per_parameter(optax.adamw)({"w": 0.1, "b": 0.2}, weight_decay=decay),
    "self_tuning": self_tuning(),
    "self_tuning_carried": self_tuning(carried=True, discount=0.9),
    "self_tuning_cosine": self_tuning(rule="cosine", projection_fn=bounded),
    "self_tuning_reverse": self_tuning(mode="reverse"),
}
# Compiled whole: operation by operation it takes the compiler many times as long.
LEARNED = transforms.learned()
LEARNED = optax.GradientTransformation(LEARNED.init, jax.jit(LEARNED.update))
NO_TRANSFORMS = ("init_learned",)  # weights of one
COMPOSED = {
    "alone": lambda t: t,
    "chain": lambda t: optax.chain(optax.clip(1.0), t, optax.scale(0.5)),
    "masked": lambda t: optax.masked(t, lambda params: jax.tree.map(lambda _: True, params)),
    "multi_transform": lambda t: optax.multi_transform({"all": t, "none": optax.sgd(0.1)}, lambda params: "all"),
    "apply_if_finite": lambda t: optax.apply_if_finite(t, 3),
    "multi_steps": lambda t: optax.MultiSteps(t, 2).gradient_transformation(),
    "differentiable": transforms.differentiable,
}


def two_steps(transform, params, change=lambda state: state):
    state = change(transform.init(params))
    for _ in range(2):
        updates, state = transform.update(grads_of(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def like(params, dtype):
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


@functools.cache
def two_compiled_steps(name):
    """The parameters and the state after two steps of one program, and how often it was traced."""
    transform, params, traces = TRANSFORMS[name](), like(PARAMS, jnp.float64), []

    @jax.jit
    def step(params, state):
        traces.append(0)
        updates, state = transform.update(grads_of(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(transform.init)(params)
    for _ in range(2):
        params, state = step(params, state)
    return (params, state), len(traces)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.once
def test_init_and_update_are_pure_and_keep_their_types(name):
    transform = TRANSFORMS[name]()

    @jax.jit
    def first_step(params):  # traced twice from one state
        state = transform.init(params)
        return state, *(transform.update(grads_of(params), state, params) for _ in range(2))

    for dtype in (jnp.float32, jnp.bfloat16):
        params = like(PARAMS, dtype)
        state, (updates, after), (repeated, _) = first_step(params)
        chex.assert_trees_all_equal(updates, repeated)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_tree_all_finite((updates, after))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.once
def test_jit_vmap_and_scan(name):
    transform, params = TRANSFORMS[name](), like(PARAMS, jnp.float64)
    expected, num_traces = two_compiled_steps(name)
    assert num_traces == 1

    def step(carry, _):
        updates, state = transform.update(grads_of(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    # One program: a scan of two steps, mapped over two trees of parameters.
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    batched = jax.jit(jax.vmap(lambda p: jax.lax.scan(step, (p, transform.init(p)), length=2)[0]))(many)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], batched), expected, rtol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.once
def test_it_composes_and_ignores_extra_arguments(name):
    params = like(PARAMS, jnp.float64)

    def first_steps(params):  # of every composition
        steps = {}
        for composition, compose in COMPOSED.items():
            transform = optax.with_extra_args_support(compose(TRANSFORMS[name]()))
            state = transform.init(params)
            steps[composition] = state, transform.update(grads_of(params), state, params, unexpected=1.0)
        return steps

    for state, first_step in jax.eval_shape(first_steps, params).values():
        chex.assert_trees_all_equal_shapes_and_dtypes(first_step, (params, state))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.once
def test_inject_hyperparams(name):
    """It may replace the value that the transform was made with by a traced one."""
    injected, params = optax.inject_hyperparams(TRANSFORMS[name])(), like(PARAMS, jnp.float64)

    @jax.jit
    def run(params):
        ((argument, value),) = injected.init(params).hyperparams.items()
        changed = lambda state: state._replace(hyperparams={argument: 0.9 * value})
        results, expected = two_steps(injected, params, changed), two_steps(TRANSFORMS[name](0.9 * value), params)
        return results[0], results[1].inner_state, expected

    moved, inner_state, expected = run(params)
    chex.assert_trees_all_close((moved, inner_state), expected, rtol=1e-12)
    assert not np.array_equal(moved["w"], two_compiled_steps(name)[0][0]["w"])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.once
def test_trees_of_any_shape(name):
    transform = TRANSFORMS[name]()
    if name in ("per_group", "per_parameter"):
        return  # their hyperparameters fix the tree of parameters
    update = lambda params: transform.update(params, transform.init(params), params)[0]
    trees = jnp.ones(()), {}, {"a": None, "b": jnp.ones((2, 0))}
    updates, of_number = jax.jit(lambda trees: ([update(tree) for tree in trees], update(1.0)))(trees)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(updates), trees)
    assert np.isfinite(of_number)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.once
def test_orbax_saves_the_state(name, tmp_path):
    init = jax.jit(lambda params: jax.tree.map(lambda x: jnp.full_like(x, 3), TRANSFORMS[name]().init(params)))
    state = init(like(PARAMS, jnp.float32))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: {"state": state}))
    chex.assert_trees_all_equal(restored, {"state": state})


def test_every_transform_of_the_room_has_a_row():
    for name in transforms.__all__:
        function = getattr(transforms, name)
        if inspect.isclass(function) or name.endswith("_schedule") or name in NO_TRANSFORMS:
            continue
        assert name in TRANSFORMS
