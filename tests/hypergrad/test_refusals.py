"""Arguments that would give a silently wrong answer are an error: one table of calls and messages for the room."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, few_shot, hypergrad, inner, predictors, spaces

KEY = jax.random.key(0)
RIDGE, LAM, TASK = problems.RIDGE, problems.LAM, problems.TASK
ONE_STEP = hypergrad.unrolled(RIDGE, num_steps=1)
WINDOWS = {"sigma": 0.1, "num_pairs": 2}
check = partial(hypergrad.check, ONE_STEP, LAM, TASK)
unrolled, unroll = partial(hypergrad.unrolled, RIDGE), partial(hypergrad.unroll, RIDGE.loop)
truncated, lookahead = partial(hypergrad.truncated, RIDGE), partial(hypergrad.lookahead, RIDGE)
implicit, darts_fd = partial(hypergrad.implicit, RIDGE), partial(hypergrad.darts_fd, RIDGE)
evolution = partial(hypergrad.evolution, RIDGE, num_steps=4, **WINDOWS)
persistent_es = partial(hypergrad.persistent_es, RIDGE, num_steps=4, truncation_length=2, **WINDOWS)


def estimate_in(dtype, sigma):
    estimator = hypergrad.evolution(RIDGE, num_steps=1, sigma=sigma, num_pairs=2)
    jax.eval_shape(estimator.estimate, {"log_penalty": jnp.zeros([], dtype)}, TASK, KEY)


def batched(tasks):
    return hypergrad.over_tasks(ONE_STEP).init(KEY, LAM, tasks)


def partition(rules, labels):
    loop = inner.loop(problems.penalized, lambda hp: optax.sgd(hp["rate"]), init=problems.zeros)
    problem = inner.problem(loop, lambda params, hp, batch: problems.mean_squares(params, batch))
    lam = {"penalty": jnp.ones(problems.NUM_FEATURES), "rate": jnp.array(0.1)}
    return hypergrad.partition(problem, rules, labels).init(KEY, lam, TASK)


RULE = partial(hypergrad.unrolled, num_steps=1)
IMPLICIT = partial(hypergrad.warm_implicit, num_steps=3, adjoint_rate=0.3)
LABELS = {"penalty": "a", "rate": "b"}
LEAVES = {"penalty": jnp.full(4, 0.3), "outer": jnp.array(1.0), "rate": jnp.array(0.3), "start": jnp.array(0.1)}


def problem_of(loss=problems.penalized, init=lambda key, hp, data: hp["start"] * jnp.ones(4)):
    """λ enters the inner loss, the outer loss, the optimizer and the initialization."""
    loop = inner.loop(loss, lambda hp: optax.sgd(hp["rate"]), init=init)
    return inner.problem(loop, lambda params, hp, batch: hp["outer"] * problems.mean_squares(params, batch))


def start(rule, problem=None, lam=LEAVES, **options):
    return rule(problem or problem_of(), **options).init(KEY, lam, TASK)


def start_of_a_rate_and_a_weight(num_steps):
    loss = lambda params, hp, batch: hp["outer"] * problems.mean_squares(params, batch)
    lam = {name: LEAVES[name] for name in ("rate", "outer")}
    return start(hypergrad.lookahead, problem_of(loss, problems.zeros), lam, num_steps=num_steps)


def start_of_a_predictor():
    space = {name: spaces.positive(0.1, shape=value.shape) for name, value in LEAVES.items()}
    predictor = predictors.mlp(space, 2)
    estimator = predictors.amortize(IMPLICIT(spaces.constrain(problem_of(), space)), predictor)
    return estimator.init(KEY, predictor.init(KEY), TASK)


def start_of_one_number():
    loss = lambda params, hp, batch: problems.mean_squares(params, batch)
    loop = inner.loop(loss, lambda hp: optax.sgd(hp), init=problems.zeros)
    return start(IMPLICIT, inner.problem(loop, loss), jnp.array(0.1))


def start_of_hypergradient_descent(loss):
    def outer_loss(params, hyperparams, batch):
        raise AssertionError("the outer loss is not looked at")

    loop = inner.loop(loss, lambda hp: optax.sgd(hp["rate"]), init=lambda key, hp, data: hp["start"])
    lam = {"penalty": LEAVES["penalty"], "rate": jnp.array(0.1), "start": jnp.zeros(4)}
    return start(hypergrad.hypergradient_descent, inner.problem(loop, outer_loss), lam)


def slope_of_a_momentum():
    """The state of the optimizer has no implicit derivative: a zero would be wrong."""
    loop = inner.loop(problems.penalized, lambda hp: optax.sgd(hp["rate"], momentum=0.5), init=problems.zeros)
    solve = hypergrad.implicit_solve(loop, num_steps=2)

    def momentum(rate):
        state = solve(KEY, {"penalty": jnp.full(4, 0.3), "rate": rate}, TASK.train)
        return optax.tree.sum(optax.tree.get(state, "trace"))

    return jax.grad(momentum)(0.1)


RATE_AND_START = r"cannot estimate the hypergradient of the leaves \['rate'\], \['start'\] of λ.*unrolled"
REFUSALS = [
    # Numbers of steps.
    (lambda: unrolled(num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: unrolled(num_steps=2.5), "`num_steps` must be an integer of at least 0; got 2.5"),
    (lambda: unrolled(num_steps=True), "`num_steps` must be an integer of at least 0; got True"),
    (lambda: unrolled(num_steps=None), "`num_steps` must be an integer of at least 0; got None"),
    (lambda: unroll(num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: hypergrad.forward(RIDGE, num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: hypergrad.trace(RIDGE, num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: evolution(num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: lookahead(num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: lookahead(commit=-1), "`commit` must be at least 0; got -1"),
    (lambda: implicit(num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: hypergrad.implicit_solve(RIDGE.loop, num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: hypergrad.nystrom(rank=-1, damping=0.1), "`rank` must be at least 1; got -1"),
    # Numbers of 16 bits, and integers.
    *(
        (
            lambda dtype=dtype, sigma=sigma: estimate_in(dtype, sigma),
            rf"`sigma` must be at least .* for a λ of dtype {dtype}.* of a λ near 1 away; got .*Use float32 for λ",
        )
        for dtype, sigma in (("float16", 1e-4), ("bfloat16", 1e-3), ("float16", {"log_penalty": 1e-4}))
    ),
    (
        lambda: hypergrad.recommend(RIDGE, {"log_penalty": 1}, TASK, num_steps=2),
        r"`hyperparams\['log_penalty'\]` has dtype int.*only floating-point",
    ),
    # Windows, weights of steps, checkpoints.
    (lambda: truncated(num_steps=0, truncation_length=1), "`truncation_length` must be at least 1 and divide"),
    (lambda: truncated(num_steps=4, truncation_length=0), "`truncation_length` must be at least 1 and divide.*got 0 "),
    (lambda: truncated(num_steps=4, truncation_length=3), "`truncation_length` .* divide `num_steps`.*got 3 and 4"),
    (lambda: truncated(num_steps=4, truncation_length=8), "`truncation_length` .* divide `num_steps`"),
    (lambda: persistent_es(num_steps=5), "`truncation_length` .* divide `num_steps`.*got 2 and 5"),
    (lambda: persistent_es(truncation_length=0), "`truncation_length` must be at least 1"),
    (lambda: truncated(num_steps=4, truncation_length=2, outer="sum"), '`outer` must be "last", "mean" or 2 weights'),
    (lambda: unrolled(num_steps=2, outer="first"), '`outer` must be "last", "mean" or 2 weights; got \'first\''),
    (lambda: unrolled(num_steps=2, outer=[1.0]), r"`outer` must have one weight per step, shape \(2,\); got \(1,\)"),
    (
        lambda: unrolled(num_steps=1, remat="all"),
        "`remat` must be one of 'none', 'step', 'grads', 'sqrt', 'offload'",
    ),
    (lambda: unroll(num_steps=1, remat=True), "or a number of levels, at least 1; got True"),
    (lambda: unroll(num_steps=1, remat=0), "or a number of levels, at least 1; got 0"),
    (lambda: truncated(num_steps=4, truncation_length=2, remat="all"), "`remat` must be one of"),
    (lambda: lookahead(remat="some"), "`remat` must be one of"),
    (lambda: unrolled(num_steps=0, outer="mean"), "`outer` cannot weight steps if `num_steps=0`"),
    (lambda: unrolled(num_steps=0, outer=jnp.zeros(0)), "`outer` cannot weight steps if `num_steps=0`"),
    # Implicit and first-order rules, and solvers.
    (lambda: implicit(num_steps=1, batch="last"), '`batch` must be "next", "full" or a function .*; got \'last\''),
    (lambda: implicit(num_steps=1, condition="minimum"), "`condition` must be one of 'gradient', 'step'; got 'mini"),
    (lambda: implicit(num_steps=1, damping=-0.1), "`damping` must be at least 0; got -0.1"),
    (lambda: implicit(num_steps=1, damping=jnp.nan), "`damping` must be at least 0; got nan"),
    (lambda: hypergrad.implicit_solve(RIDGE.loop, num_steps=1, damping=-0.1), "`damping` must be at least 0; got -0.1"),
    (lambda: implicit(num_steps=1, solver=hypergrad.cg), r"the result of `hypergrad.cg\(...\)`, not .*: call it"),
    (lambda: implicit(num_steps=1, solver="cg"), r"such as `hypergrad.cg\(num_steps=20\)`; got 'cg'"),
    (lambda: hypergrad.implicit_solve(RIDGE.loop, num_steps=1, solver=hypergrad.nystrom), "`hypergrad.nystrom"),
    (lambda: hypergrad.argmin(problems.penalized, solver=hypergrad.cg), "`hypergrad.cg"),
    (lambda: hypergrad.argmin(problems.penalized, num_steps=0), "`num_steps` must be .*1.*; got 0"),
    (lambda: hypergrad.argmin(problems.penalized, tol=0.0), "`tol` must be positive; got 0.0"),
    (lambda: hypergrad.nystrom(rank=2, damping=-0.1), "`damping` must be positive; got -0.1"),
    *(
        (lambda rule=rule: rule(horizon=-1), "`horizon` must be at least 0, or None; got -1")
        for rule in (
            *(partial(rule, RIDGE) for rule in (hypergrad.hypergradient_descent, hypergrad.sama)),
            *(lookahead, darts_fd, partial(implicit, num_steps=1)),
        )
    ),
    (lambda: implicit(num_steps=1, horizon=9, warm_start=False), "`horizon` needs `warm_start=True`, .*; got 9"),
    (lambda: implicit(num_steps=1, condition="step", gauss_newton=(len, len)), "`gauss_newton` approximates a Hess"),
    (lambda: darts_fd(difference="backward"), "`difference` must be one of central, forward; got 'backward'"),
    # Evolution strategies.
    (lambda: hypergrad.mix_with_es(ONE_STEP, sigma=0.1, num_pairs=2), "`num_pairs` must be at least 3; got 2"),
    (lambda: hypergrad.evolution(RIDGE, num_steps=4, sigma=0.1, num_pairs=0), "`num_pairs` must be at least 1; got 0"),
    *(
        (lambda s=s: hypergrad.evolution(RIDGE, num_steps=4, sigma=s, num_pairs=2), "`sigma` must be positive; got")
        for s in (0, -0.1, np.float32(0), {"log_penalty": jnp.array([0.1, 0.0])}, jnp.nan)
    ),
    (lambda: hypergrad.mix_with_es(ONE_STEP, sigma=0.0, num_pairs=4), "`sigma` must be positive; got 0.0"),
    (
        lambda: evolution(sigma={"rate": 0.1}).estimate(LAM, TASK, KEY),
        "`sigma` must be a number or a tree like λ, .*'log_penalty': .*; got .*'rate': ",
    ),
    (lambda: hypergrad.mix_with_es(lookahead(), sigma=0.1, num_pairs=4), '`estimator` must be of kind "exact".*"bia'),
    # Batches of tasks.
    *(
        (
            lambda value=value: hypergrad.over_tasks(ONE_STEP, max_norm=value),
            "`max_norm` must be positive, or None; got",
        )
        for value in (0.0, -1.0, jnp.nan)
    ),
    (lambda: hypergrad.over_tasks(ONE_STEP, max_norm=1.0, normalize=True), "`normalize` and `max_norm` exclude"),
    (lambda: batched(()), r"A batch of tasks is one `Task\(train, valid\)`.*; got a tuple of \[\]"),
    (lambda: batched([TASK, TASK]), r"A batch of tasks is one `Task.*`tasks.stack`.*got a list of \['Task', 'Task'\]"),
    (lambda: batched((TASK, None)), r"or a tuple of such batches; got a tuple of \['Task', 'NoneType'\]"),
    (lambda: batched(base.Task(None, None)), r"there must be at least one task; got axes \[\]"),
    (lambda: batched(base.Task(jnp.zeros((0, 3)), None)), r"at least one task; got axes \['\(0,\)'\]"),
    (lambda: batched(base.Task(jnp.zeros(3), jnp.zeros(4))), r"as its leading axis.*\(3,\).*\(4,\).*`tasks.stack`"),
    (lambda: batched(base.Task(jnp.zeros([]), jnp.zeros(4))), "must have the number of tasks"),
    # Leaves of λ that a rule cannot see.
    (lambda: start(hypergrad.lookahead), r"the hypergradient of the leaves \['start'\] of λ: the 1 virtual"),
    (lambda: start_of_a_rate_and_a_weight(0), r"the hypergradient of the leaves \['rate'\] of λ: the 0 virtual"),
    (lambda: start(hypergrad.darts_fd), r"`darts_fd` cannot estimate .* the leaves \['start'\] of λ.*unrolled"),
    (lambda: start(hypergrad.sama), r"`sama` cannot estimate .* the leaves \['start'\] of λ.*unrolled"),
    (lambda: start(hypergrad.bome, num_steps=1), RATE_AND_START),
    (lambda: start(hypergrad.f2sa, num_steps=1, multiplier=10.0), RATE_AND_START),
    (lambda: start(IMPLICIT), RATE_AND_START),
    (
        lambda: start(hypergrad.implicit, num_steps=1, condition="step"),
        r"leaves \['start'\] of λ: neither a training step nor.*unrolled",
    ),
    # A leaf that adds to ℓ is not in ∇θ ℓ.
    (
        lambda: start(
            IMPLICIT, problem_of(lambda params, hp, batch: problems.penalized(params, hp, batch) + hp["start"])
        ),
        r"\['start'\]",
    ),
    (start_of_a_predictor, r"\['rate'\], \['start'\]"),
    (start_of_one_number, "the leaves itself of λ"),
    (
        lambda: start(hypergrad.reptile, problems.EVERYTHING, problems.EVERYTHING_LAM, num_steps=1),
        r"leaves \.penalty, \.rate, \.temperature of λ",
    ),
    (
        lambda: start_of_hypergradient_descent(problems.penalized),
        r"cannot estimate the hypergradient of the leaves .*\['penalty'\], \['start'\].* of λ",
    ),
    (
        lambda: start_of_hypergradient_descent(lambda p, hp, b: problems.penalized(p, hp, b) + hp["rate"] * p.sum()),
        r"cannot estimate the hypergradient of the leaves .*\['rate'\].* of λ",
    ),
    (slope_of_a_momentum, r"leaves \['rate'\] of λ: neither the gradient"),
    # Others.
    (lambda: hypergrad.diagnose(RIDGE, LAM, TASK, num_steps=1), "`num_steps` must be at least 2; got 1"),
    (lambda: hypergrad.diagnose(RIDGE, LAM, TASK, num_steps=2, key=7), r"such as `jax.random.key\(7\)`; got 7"),
    (lambda: hypergrad.diagnose(RIDGE, LAM, TASK._asdict(), num_steps=2), r"a dict with the keys \['train', 'valid'"),
    (lambda: hypergrad.recommend(RIDGE, LAM, TASK._asdict(), num_steps=2), r"pass `base.Task\(\*\*task\)`"),
    (lambda: hypergrad.recommend(ONE_STEP, LAM, TASK, num_steps=2), "must be a `base.Problem`.*; got Estimator"),
    (lambda: hypergrad.diagnose(ONE_STEP, LAM, TASK, num_steps=2), "must be a `base.Problem`.*; got Estimator"),
    (lambda: hypergrad.check(IMPLICIT(RIDGE), LAM, TASK._asdict()), r"pass `base.Task\(\*\*task\)`"),
    (lambda: check(key=0), r"`key` must be a random key, such as `jax.random.key\(0\)`; got 0"),
    (lambda: check(num_directions=0), "`num_directions` must be at least 1; got 0"),
    (lambda: check(num_samples=1), "`num_samples` must be at least 2; got 1"),
    (lambda: partition({"a": RULE}, LABELS), r"the leaves of λ have \['a', 'b'\], and the estimators \['a'\]"),
    (lambda: partition({"a": RULE, "b": RULE, "c": RULE}, LABELS), r"and the estimators \['a', 'b', 'c'\]"),
    (
        lambda: partition({"a": IMPLICIT, "b": RULE}, {"rate": "a", "penalty": "b"}),
        r"cannot estimate the hypergradient of the leaves \['rate'\] of λ",
    ),
    (lambda: partition({}, LABELS), r"the leaves of λ have \['a', 'b'\], and the estimators \[\]"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("dtype", "sigma"), [("float16", 1e-3), ("bfloat16", 0.01), ("float32", 1e-9)])
def test_a_sigma_above_the_precision_of_lambda_is_no_error(dtype, sigma):
    estimate_in(dtype, sigma)


@pytest.mark.parametrize("other", [hypergrad.unrolled, few_shot.maml(RIDGE.loop.loss)], ids=["rule", "method"])
def test_what_is_no_estimator_is_an_error_of_python(other):
    with pytest.raises(AttributeError, match="'(function|Adaptation)' object has no attribute 'kind'"):
        hypergrad.over_tasks(other)


def test_integer_hyperparams_are_an_error_of_jax():
    with pytest.raises(TypeError, match="grad requires real-valued inputs|real- or complex-valued inputs"):
        ONE_STEP.estimate({"log_penalty": 1}, TASK, KEY)


def test_a_loss_that_is_no_scalar_is_an_error_of_jax():
    with pytest.raises(TypeError, match="scalar-output"):
        hypergrad.direct(lambda hyperparams, task, key: hyperparams).estimate(jnp.ones(2), None, KEY)
