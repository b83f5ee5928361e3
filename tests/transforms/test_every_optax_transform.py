"""`transforms.differentiable` over every public transform of optax: the same values, finite and correct gradients.

A transform that optax adds and that is not here fails `test_every_public_transform_of_optax_has_a_case`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from optax.experimental import aggregating

from metaopt import transforms

# The whole takes an hour; `test_differentiable` has the optimizers that are used most, and here are wrappers.
AMONG_THE_QUICK = ("ema", "lookahead", "sam", "schedule_free_sgd")


@pytest.fixture(autouse=True)
def optax_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


class Case(NamedTuple):
    make: Callable  # rate -> transform
    wrap: Callable = lambda params: params  # our parameters -> those of the transform
    read: Callable = lambda params: params


def scaled(make):
    """A transform without a rate, with one."""
    return lambda rate: optax.chain(make(rate), optax.scale(-rate))


def plain(transform):
    return scaled(lambda rate: transform)


def without_extra_arguments(transform):
    """What aggregates says that it takes them, and does not, or hands callables to a `cond`."""
    return optax.GradientTransformation(*transform)


def per_example(make):
    """Two examples' gradients, for what aggregates them."""
    examples = optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.stack([u, 2 * u]), updates))
    return lambda rate: without_extra_arguments(optax.chain(examples, make(rate)))


def decayed(make):
    return lambda rate: make(rate, weight_decay=rate)


def matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def dimensions(tree):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), tree)


def takes_grad_fn_alone(transform):
    """Of extra arguments, as SAM, though optax hands on all of them."""

    def update(updates, state, params=None, *, grad_fn, **_):
        return transform.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def sharpness_aware(rate, opaque_mode=False):
    ascent = optax.chain(contrib.normalize(), optax.sgd(rate))
    return takes_grad_fn_alone(contrib.sam(optax.adam(rate, eps=0.1), ascent, sync_period=2, opaque_mode=opaque_mode))


def by_deviation(rate):
    """Steps in units of the examples' deviation."""
    steps = lambda pair, _: jax.tree.map(
        lambda mean, squares: -rate * mean / (jnp.sqrt(squares) + 1e-3), pair[0], pair[1]["sum_sq_diff_grads"]
    )
    return optax.chain(aggregating.get_per_element_mean_and_sum_sq_diff_grads(), optax.stateless(steps))


def sometimes(step, updates=None, params=None, **extra_args):
    return step % 2 == 0


DEAD = {"matrix": False, "dead": True}
double = lambda updates, params=None: jax.tree.map(lambda u: 2 * u, updates)

CASES: dict[str, Any] = {
    # optax's aliases
    **{name: getattr(optax, name) for name in """
        adabelief adagrad adam adamax amsgrad fromage lion nadam novograd optimistic_adam
        optimistic_adam_v2 radam rprop sgd sign_sgd signum sm3 yogi""".split()},
    **{name: decayed(getattr(optax, name)) for name in """
        adamaxw adamw adan lamb nadamw""".split()},
    "adafactor": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2),
    "adadelta": lambda rate: optax.adadelta(rate, eps=1e-2),
    "rmsprop": lambda rate: optax.rmsprop(rate, centered=True, momentum=0.5),
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=jax.random.key(0)),
    "lars": lambda rate: optax.lars(rate, weight_decay=rate, trust_coefficient=0.1),
    "optimistic_gradient_descent": lambda rate: optax.optimistic_gradient_descent(rate, alpha=0.7, beta=0.1),
    "polyak_sgd": lambda rate: optax.polyak_sgd(scaling=rate, f_min=-9.0),
    "lbfgs(linesearch=None)": lambda rate: optax.lbfgs(rate, linesearch=None),
    # its building blocks
    **{name: plain(getattr(optax, name)()) for name in """
        centralize identity scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad
        scale_by_belief scale_by_lbfgs scale_by_lion scale_by_novograd
        scale_by_optimistic_gradient scale_by_param_block_norm scale_by_param_block_rms scale_by_radam scale_by_rms
        scale_by_rss scale_by_sign scale_by_sm3 scale_by_stddev scale_by_trust_ratio scale_by_yogi set_to_zero
        normalize_by_update_norm zero_nans""".split()},
    "adaptive_grad_clip": scaled(optax.adaptive_grad_clip),
    "add_decayed_weights": scaled(optax.add_decayed_weights),
    "add_noise": scaled(lambda rate: optax.add_noise(rate, 0.5, key=jax.random.key(0))),
    "apply_every": scaled(lambda rate: optax.apply_every(2)),
    "clip": scaled(lambda rate: optax.clip(14 * rate)),  # two gradients of three
    "clip_by_block_rms": scaled(optax.clip_by_block_rms),
    "clip_by_global_norm": scaled(optax.clip_by_global_norm),
    "ema": scaled(lambda rate: optax.ema(1 - rate)),
    "freeze": scaled(lambda rate: optax.freeze(DEAD)),
    "keep_params_nonnegative": lambda rate: optax.chain(optax.scale(-rate), optax.keep_params_nonnegative()),
    "scale": lambda rate: optax.scale(-rate),
    "scale_by_adadelta": plain(optax.scale_by_adadelta(eps=1e-2)),
    "scale_by_backtracking_linesearch": scaled(lambda rate: optax.scale_by_backtracking_linesearch(3)),
    "scale_by_distance_over_gradients": plain(optax.scale_by_distance_over_gradients(reps_rel=0.1)),
    "scale_by_factored_rms": plain(optax.scale_by_factored_rms(min_dim_size_to_factor=2)),
    "scale_by_learning_rate": optax.scale_by_learning_rate,
    "scale_by_polyak": scaled(lambda rate: optax.scale_by_polyak(f_min=-9.0)),
    "scale_by_rprop": scaled(optax.scale_by_rprop),
    "scale_by_schedule": lambda rate: optax.scale_by_schedule(lambda step: -rate / (step + 1)),
    "snapshot": scaled(lambda rate: optax.snapshot("norm", optax.tree.norm)),
    "stateless": scaled(lambda rate: optax.stateless(double)),
    "stateless_with_tree_map": scaled(lambda rate: optax.stateless_with_tree_map(lambda u, p: u * rate + p)),
    "trace": scaled(lambda rate: optax.trace(1 - rate)),
    # wrappers
    "apply_if_finite": lambda rate: optax.apply_if_finite(optax.adam(rate), 2),
    "chain": lambda rate: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate)),
    "conditionally_mask": lambda rate: optax.conditionally_mask(optax.adam(rate, eps=0.1), sometimes),
    "conditionally_transform": lambda rate: optax.conditionally_transform(optax.adam(rate), sometimes),
    "flatten": lambda rate: optax.flatten(optax.adam(rate)),
    "inject_hyperparams": lambda rate: optax.inject_hyperparams(optax.adam)(rate),
    "inject_stateful_hyperparams": lambda rate: optax.inject_stateful_hyperparams(optax.adam)(rate),
    "lookahead": Case(
        lambda rate: optax.lookahead(optax.adam(rate), 2, 0.5),
        optax.LookaheadParams.init_synced,
        lambda params: params.slow,
    ),
    "masked": lambda rate: optax.chain(optax.masked(optax.adam(rate, eps=0.1), matrices), optax.scale(rate)),
    "measure_with_ema": lambda rate: optax.chain(
        optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}), optax.sgd(rate)
    ),
    "monitor": lambda rate: optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.sgd(rate)),
    "named_chain": lambda rate: optax.named_chain(("clip", optax.clip(0.7)), ("adam", optax.adam(rate))),
    "partition": lambda rate: optax.partition({True: optax.adam(rate), False: optax.sgd(rate)}, matrices),
    "selective_transform": lambda rate: optax.selective_transform(optax.adam(rate), freeze_mask=DEAD),
    "with_extra_args_support": lambda rate: optax.with_extra_args_support(optax.sgd(rate)),
    # Its accumulators in half precision change their type, whatever is done with it.
    "MultiSteps": lambda rate: optax.MultiSteps(
        optax.adam(rate, eps=0.1), 2, accumulator_dtype=jnp.promote_types(rate.dtype, jnp.float32)
    ).gradient_transformation(),
    # contributed
    **{name: getattr(contrib, name) for name in """
        acprop ademamix dowg madgrad schedule_free_adamw schedule_free_sgd
        simplified_ademamix""".split()},
    **{name: plain(getattr(contrib, name)()) for name in """
        scale_by_acprop scale_by_ademamix scale_by_simplified_ademamix normalize
        reduce_on_plateau""".split()},
    "adopt": lambda rate: contrib.adopt(rate, eps=0.7, use_clipping=False),
    "momo": lambda rate: contrib.momo(rate, lower_bound=-9.0),
    "momo_adam": lambda rate: contrib.momo_adam(rate, lower_bound=-9.0),
    # What estimates its own rate starts from a millionth, and is free of scales but for ε: with the defaults two steps
    # have no derivative to speak of.
    "dadapt_adamw": lambda rate: contrib.dadapt_adamw(rate, eps=0.1, estim_lr0=0.1),
    "dog": lambda rate: contrib.dog(rate, ("distance", 0.1)),
    "prodigy": lambda rate: contrib.prodigy(rate, eps=0.1, estim_lr0=0.1),
    "scale_by_adopt": plain(contrib.scale_by_adopt(eps=0.7, use_clipping=False)),
    "scale_by_cocob": plain(contrib.scale_by_cocob(alpha=1.0)),
    "muon": contrib.muon,
    "scale_by_muon": plain(optax.masked(contrib.scale_by_muon(weight_dimension_numbers=dimensions), matrices)),
    "cocob": scaled(lambda rate: contrib.cocob(alpha=1.0)),
    "differentially_private_aggregate": per_example(
        scaled(lambda rate: contrib.differentially_private_aggregate(1.0, rate, key=jax.random.key(0)))
    ),
    "dpsgd": per_example(lambda rate: contrib.dpsgd(rate, 1.0, 0.1, seed=0)),
    "mechanize": lambda rate: contrib.mechanize(optax.adam(rate, eps=0.1), weight_decay=rate, s_init=0.1),
    "sam": sharpness_aware,
    "sam(opaque_mode=True)": lambda rate: sharpness_aware(rate, opaque_mode=True),
    "scale_by_madgrad": contrib.scale_by_madgrad,
    "schedule_free": lambda rate: contrib.schedule_free(optax.adam(rate, b1=0.0), rate),
    "galore": lambda rate: contrib.galore(rate, rank=1),
    "scale_by_galore": plain(contrib.scale_by_galore(rank=1)),
    "sophia": lambda rate: contrib.sophia(rate, eps=0.8, gamma=300.0, update_interval=1),
    "hutchinson_estimator_diag_hessian": plain(contrib.hutchinson_estimator_diag_hessian()),
    "split_real_and_imaginary": lambda rate: contrib.split_real_and_imaginary(optax.adam(rate)),
    # experimental: of gradients by example, by batch
    "process": per_example(
        lambda rate: aggregating.process(
            optax.clip_by_global_norm(0.5), aggregating.average_per_element_updates(), optax.sgd(rate)
        )
    ),
    "average_per_element_updates": per_example(scaled(lambda rate: aggregating.average_per_element_updates())),
    "accumulate_avg_updates": lambda rate: without_extra_arguments(
        aggregating.process(optax.identity(), aggregating.accumulate_avg_updates(2), optax.adam(rate, eps=0.1))
    ),
    "average_incrementally_updates": per_example(
        scaled(lambda rate: aggregating.average_incrementally_updates(0, accumulation_steps=2))
    ),
    "get_per_element_mean_and_sum_sq_diff_grads": per_example(by_deviation),
    "track_per_element_mean_and_variance_with_ema": per_example(
        lambda rate: aggregating.process(
            optax.identity(),
            aggregating.get_per_element_mean_and_sum_sq_diff_grads(),
            optax.chain(aggregating.track_per_element_mean_and_variance_with_ema(1 - rate), optax.sgd(rate)),
            aggregator_has_aux=True,
        )
    ),
    "add_mean_variance_to_opt": per_example(lambda rate: aggregating.add_mean_variance_to_opt(optax.sgd(rate))),
}  # fmt: skip

# A while loop of unknown length carries derivatives, so JAX differentiates it only in forward mode.
FORWARD_ONLY = {
    "lbfgs": lambda rate: optax.chain(optax.lbfgs(), optax.scale(10 * rate)),
    "scale_by_zoom_linesearch": scaled(lambda rate: optax.scale_by_zoom_linesearch(3)),
}
# Differentiable, but optax stops a gradient inside, which `differentiable` respects: the derivative is that of optax,
# and not that of the values.
STOPS_THE_GRADIENT = {
    "lbfgs(linesearch=None)": "in the first scale of its inverse Hessian",
    "scale_by_lbfgs": "as lbfgs",
    "lbfgs": "as lbfgs",
}
NO_TRANSFORM = {
    "schedule_free_eval_params": "reads parameters off a state",
    "get_unbiased_mean_and_variance_ema": "reads averages off a state",
    "get_batch_size_from_per_elt_updates": "counts examples",
}

NUM_STEPS = 2
# A dead row and a dead entry, and a parameter that is dead as a whole.
ALIVE = {"matrix": np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), "dead": np.zeros(2)}
ALL_ALIVE = jax.tree.map(np.ones_like, ALIVE)
START = {"matrix": np.array([[0.5, -1.0], [0.4, 0.2], [-0.6, 0.8]]), "dead": np.array([0.5, -0.5])}
LAM = np.array([0.05, 0.9])  # the rate, and a scale within the loss


def loss(params, scale, alive=ALIVE):
    terms = jax.tree.map(
        lambda mask, leaf: jnp.sum(jnp.asarray(mask, leaf.dtype) * jnp.sin(scale * leaf + 0.3)), alive, params
    )
    return sum(jax.tree.leaves(terms))


def train(case, lam, wrap, alive=ALIVE):
    """θ_T as the outer loss sees it, and the transform's state."""
    case = case if isinstance(case, Case) else Case(case)
    rate, scale = lam
    transform = optax.with_extra_args_support(wrap(case.make(rate)))

    def step(carry, _):
        params, state = carry
        fast = params.fast if isinstance(params, optax.LookaheadParams) else params
        # A line search hands it all that it was given.
        value_fn = lambda params, obj_fn=None, grad_fn=None: loss(params, scale, alive)
        value, grads = jax.value_and_grad(value_fn)(fast)
        extra = {"value": value, "grad": grads, "value_fn": value_fn, "obj_fn": value_fn}
        extra["grad_fn"] = lambda params, step: jax.grad(value_fn)(params)
        updates, state = transform.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    params = case.wrap(jax.tree.map(lambda x: jnp.asarray(x, lam.dtype), START))
    state = transform.init(params)
    # Some states change their type in the first step; those of monitors their structure, so that no scan carries them.
    after = jax.eval_shape(step, (params, state), None)[0][1]
    if jax.tree.structure(after) == jax.tree.structure(state):
        state = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), state, after)
        (params, state), _ = jax.lax.scan(step, (params, state), length=NUM_STEPS)
    else:
        for _ in range(NUM_STEPS):
            (params, state), _ = step((params, state), None)
    return case.read(params), state


def objective(case, lam, wrap, alive=ALIVE):
    params, state = train(case, lam, wrap, alive)
    return loss(params, jnp.asarray(1.3, lam.dtype), ALL_ALIVE), (params, state)


def bits(tree):
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


# Half the time of these programs goes into machine code that runs once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ALL = [name if name in AMONG_THE_QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
AROUND = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
# Step and relative error of finite differences; GaLore takes its singular vectors in float32.
EPS, RTOL = 1e-6, 1e-4
COARSE = {"galore": (3e-3, 5e-3), "scale_by_galore": (3e-3, 5e-3)}
# Whether the derivatives in the rate and in the loss's scale are large enough to be compared, where one is zero.
FLAT = {
    "set_to_zero": [False, False],
    **dict.fromkeys(  # a sign knows no scale
        ("lion", "rprop", "sign_sgd", "signum", "scale_by_lion", "scale_by_rprop", "scale_by_sign"), [True, False]
    ),
}
# Where optax itself divides 0 by 0: float16 rounds ε, or another small factor of the denominator, to zero; bfloat16
# rounds b2 = .999 to 1.
NOT_FINITE = {
    jnp.bfloat16: ["inject_hyperparams", "inject_stateful_hyperparams"],
    jnp.float16: """
        adabelief adam adamax amsgrad fromage nadam novograd optimistic_adam optimistic_adam_v2 adamaxw adamw
        adan nadamw adafactor rmsprop scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad
        scale_by_belief scale_by_novograd scale_by_rms scale_by_stddev scale_by_factored_rms apply_if_finite
        chain conditionally_transform flatten inject_hyperparams inject_stateful_hyperparams lookahead partition
        selective_transform acprop ademamix schedule_free_adamw simplified_ademamix scale_by_acprop
        scale_by_ademamix scale_by_simplified_ademamix muon schedule_free galore scale_by_galore
        split_real_and_imaginary named_chain momo_adam dadapt_adamw scale_by_cocob cocob mechanize
    """.split(),
}
AT = jnp.asarray(LAM + EPS * AROUND)
LOW = [jnp.float32, jnp.bfloat16, jnp.float16]


def plain_transform(transform):
    return transform


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.once
def test_values_and_gradients(name):
    case = CASES[name]
    # One program without `differentiable`, at λ and around it; one with it.
    plain = jax.jit(jax.vmap(lambda lam: objective(case, lam, plain_transform)), compiler_options=QUICK)
    eps, rtol = COARSE.get(name, (EPS, RTOL))
    points = jnp.asarray(LAM + eps * AROUND)
    values, expected = plain(points)
    gradient = jax.value_and_grad(lambda lam: objective(case, lam, transforms.differentiable), has_aux=True)
    (_, outputs), grads = jax.jit(jax.vmap(gradient), compiler_options=QUICK)(points)
    # A program that keeps residuals for its derivative is compiled otherwise, and may differ in the last bit.
    chex.assert_trees_all_close(bits(outputs), bits(expected), rtol=1e-9, atol=1e-14)
    chex.assert_tree_all_finite((values, grads))
    if name not in STOPS_THE_GRADIENT:
        differences = np.array([values[1] - values[2], values[3] - values[4]]) / (2 * eps)
        np.testing.assert_allclose(grads[0], differences, rtol=rtol, atol=1e-9)
        # Or else the comparison says nothing.
        assert list(np.abs(differences) > 1e-5) == FLAT.get(name, [True, True])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STOPS_THE_GRADIENT if name in CASES])
def test_gradients_that_optax_stops(name):
    # Without dead entries, where optax's own gradient is finite.
    gradients = [
        jax.jit(jax.grad(lambda lam, wrap=wrap: objective(CASES[name], lam, wrap, ALL_ALIVE)[0]))(AT[0])
        for wrap in (transforms.differentiable, plain_transform)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-8)


@pytest.mark.optimized
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float64, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in LOW)])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.once
def test_values_are_equal_to_the_bit(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):  # as it is used; some of optax takes its own state for float64 with it
        expected, outputs = (
            jax.jit(lambda lam, wrap=wrap: train(CASES[name], lam, wrap))(jnp.asarray(LAM, dtype))
            for wrap in (plain_transform, transforms.differentiable)
        )
    chex.assert_trees_all_equal(bits(outputs), bits(expected))  # NaN where there is NaN


@pytest.mark.slow
@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_forward_derivatives_alone(name):
    def derivative(wrap, alive=ALIVE):
        function = lambda lam: objective(FORWARD_ONLY[name], lam, wrap, alive)[0]
        return jax.jit(lambda lam: jax.jvp(function, (lam,), (lam,)), compiler_options=QUICK)(jnp.asarray(LAM))

    wrapped = lambda lam: objective(FORWARD_ONLY[name], lam, transforms.differentiable)[0]
    plain = jax.jit(lambda lam: objective(FORWARD_ONLY[name], lam, plain_transform)[0], compiler_options=QUICK)
    value, forward = derivative(transforms.differentiable)
    np.testing.assert_allclose(value, plain(jnp.asarray(LAM)), rtol=1e-9)
    assert abs(forward) > 1e-3
    if name in STOPS_THE_GRADIENT:
        forward, expected = (derivative(wrap, ALL_ALIVE)[1] for wrap in (transforms.differentiable, plain_transform))
        np.testing.assert_allclose(forward, expected, rtol=1e-8)
    else:
        ends = [plain(jnp.asarray(LAM * (1 + sign * EPS))) for sign in (1, -1)]
        np.testing.assert_allclose(forward, (ends[0] - ends[1]) / (2 * EPS), rtol=1e-4)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work for lax.while_loop"):
        jax.grad(wrapped)(jnp.asarray(LAM))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_lower_precision(name):
    with jax.enable_x64(False):  # as it is used; some of optax takes its own state for float64 with it
        for dtype in LOW:
            lam = jnp.asarray(LAM, dtype)

            def function(lam):
                value, (params, _) = objective(CASES[name], lam, transforms.differentiable)
                return value.astype(jnp.float32), params

            grads, params = jax.jit(jax.grad(function, has_aux=True), compiler_options=QUICK)(lam)
            # Where it is not, what optax computes is not either: `test_values_are_equal_to_the_bit`. (A compiler that
            # keeps more digits on the way may divide no 0 by 0.)
            assert is_finite(params) or name in NOT_FINITE.get(dtype, ())
            if is_finite(params):
                chex.assert_tree_all_finite(grads)


def is_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def test_every_public_transform_of_optax_has_a_case():
    public = set()
    for module in (optax, optax.transforms, contrib, aggregating):
        for name, function in vars(module).items():
            is_function = inspect.isfunction(function) and function.__module__.startswith("optax")
            returns = str(inspect.signature(function).return_annotation) if is_function else ""
            unannotated = is_function and (module in (contrib, aggregating) or name.startswith("scale_by_"))
            if name[0] != "_" and ("GradientTransformation" in returns or unannotated):
                public.add(function.__name__)
    # multi_transform is partition; per-example clips, microbatching and schedules are not transforms.
    tested = {name.split("(")[0] for name in (*CASES, *FORWARD_ONLY, *NO_TRANSFORM)}
    assert public - tested == set()
    # nadam is a partial function, MultiSteps a class; monitor has no annotation.
    assert tested - public == {"MultiSteps", "monitor", "nadam", "nadamw"}


# What `self_tuning` refuses, or has no use for, and why.
NOT_SELF_TUNED = {
    "rprop": "the rate is in the state alone",
    "inject_hyperparams": "the rate is in the state alone",
    "inject_stateful_hyperparams": "the rate is in the state alone",
    "lookahead": "its parameters are pairs: it belongs around",
    "measure_with_ema": "its state grows in the first step",
    "monitor": "its state grows in the first step",
    "scale_by_backtracking_linesearch": "hands its objective all that `update` is given",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_self_tuning_of_every_transform(mode):
    """Updates like the parameters, and a state that a scan can carry."""
    params = jax.tree.map(jnp.asarray, START)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    value_fn = lambda params, **_: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    def both_states(case):
        tuned = transforms.self_tuning(case.make if isinstance(case, Case) else case, 0.1, optax.sgd(0.1), mode=mode)
        extra = {"value": 1.0, "grad": params, "value_fn": value_fn, "obj_fn": value_fn}
        extra["grad_fn"] = lambda params, step: jax.grad(value_fn)(params)
        state = jax.eval_shape(tuned.init, params)
        updates, after = jax.eval_shape(lambda s: tuned.update(params, s, params, **extra), state)
        assert types(updates) == types(params)
        return types(state), types(after)

    for name in CASES.keys() - NOT_SELF_TUNED.keys():
        before, after = both_states(CASES[name])
        assert before == after, name
    for name, why in NOT_SELF_TUNED.items():
        if "state alone" in why:
            with pytest.raises(ValueError, match="do not change the updates"):
                both_states(CASES[name])
