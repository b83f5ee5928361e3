"""Evolution strategies against Gaussian smoothing by quadrature, windows against whole trainings, variances."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, predictors, spaces, training

KEY = jax.random.key(0)
WINDOWED = {
    "persistent_es": hypergrad.persistent_es,
    "es_single": hypergrad.es_single,
    "truncated_es": hypergrad.truncated_es,
}


# F is a polynomial in λ, so Gauss–Hermite quadrature smooths it to rounding. λ enters the initialization, the
# optimizer, the inner loss and the outer loss:  θ_0 = start,  θ ← θ − rate (θ − pull),  f = (θ − 1)²/2 + rate²/5.

LAM = {"pull": jnp.array(0.4), "rate": jnp.array(0.7), "start": jnp.array(-0.5)}
SIGMA = {"pull": 0.4, "rate": 0.5, "start": 0.3}
TASK = base.Task(jnp.zeros([]), jnp.array(1.0))
POLYNOMIAL = inner.problem(
    inner.loop(
        lambda params, hyperparams, batch: (params - hyperparams["pull"]) ** 2 / 2,
        lambda hyperparams: optax.sgd(hyperparams["rate"]),
        init=lambda key, hyperparams, data: hyperparams["start"],
    ),
    lambda params, hyperparams, batch: (params - batch) ** 2 / 2 + hyperparams["rate"] ** 2 / 5,
)


def window_losses(perturbations, length):
    """The mean of f over every window, in numpy; `perturbations` [windows, 3, ...] are ε in the order of LAM."""
    lams = [
        [float(LAM[name]) + SIGMA[name] * e for name, e in zip(LAM, epsilon, strict=True)] for epsilon in perturbations
    ]
    theta, losses = lams[0][2], []
    for pull, rate, _ in lams:
        outer = []
        for _ in range(length):
            theta = theta - rate * (theta - pull)
            outer.append((theta - 1) ** 2 / 2 + rate**2 / 5)
        losses.append(np.mean(outer, 0))
    return losses


def quadrature(num_dims, order=7):
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    grid = np.stack(np.meshgrid(*[nodes] * num_dims, indexing="ij")).reshape(num_dims, -1)
    return grid, np.prod(list(itertools.product(weights / weights.sum(), repeat=num_dims)), axis=1)


def smoothed_gradient(loss, perturbations, weights):
    """E [Σ_j ε_j loss / σ], [3], over all windows' `perturbations` [J, 3, points]."""
    return (perturbations.sum(0) * loss * weights).sum(1) / np.array(list(SIGMA.values()))


def sampled(estimator, num_seeds, *, windows=1, lam=LAM, task=TASK):
    """Estimates of `num_seeds` episodes, [seeds, windows, ...]."""

    def episode(key):
        def window(state, _):
            estimate, state = estimator.estimate(lam, task, state)
            return state, estimate

        return jax.lax.scan(window, estimator.init(key, lam, task), None, length=windows)[1]

    return jax.jit(jax.vmap(episode))(jax.random.split(KEY, num_seeds))


def first(estimator, lam, task, key):
    """The first estimate."""
    return jax.jit(lambda key: estimator.estimate(lam, task, estimator.init(key, lam, task))[0])(key)


def columns(hypergrad):
    return np.stack(jax.tree.leaves(hypergrad), axis=-1)


def standard_errors(samples, expected):
    """How many of them the mean of `samples` [seeds, ...] is off."""
    return (samples.mean(0) - expected) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


@pytest.mark.parametrize("outer", ["last", [0.5, 0.0, 2.0]])
@pytest.mark.once
def test_evolution_is_unbiased_for_the_smoothed_loss(outer):
    epsilon, weights = quadrature(3, order=9)
    f = np.stack(window_losses([epsilon] * 3, 1))
    smoothed = np.array([0, 0, 1] if outer == "last" else outer) @ f
    expected = smoothed_gradient(smoothed, epsilon[None], weights)
    estimator = hypergrad.evolution(POLYNOMIAL, num_steps=3, sigma=SIGMA, num_pairs=2, outer=outer)
    out = sampled(estimator, 20_000)
    estimates = columns(out.hypergrad)[:, 0]
    assert np.abs(standard_errors(estimates, expected)).max() < 3
    assert np.abs(standard_errors(np.asarray(out.value[:, 0]), smoothed @ weights)) < 3
    assert out.done.all() and estimator.kind == "unbiased"
    # σ is large enough here that the plain gradient is another one.
    whole = hypergrad.unrolled(POLYNOMIAL, num_steps=3, outer=outer)
    plain = columns(jax.jit(whole.estimate)(LAM, TASK, KEY)[0].hypergrad)
    assert np.abs(standard_errors(estimates, plain)).max() > 10
    # The metric of one estimate agrees with the variance of many estimates.
    np.testing.assert_allclose(out.metrics["sampling_variance"].mean(), estimates.var(0).sum(), rtol=0.1)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.once
def test_every_window_has_its_stated_mean(name):
    length, windows = 2, 2
    estimator = WINDOWED[name](
        POLYNOMIAL, num_steps=length * windows, truncation_length=length, sigma=SIGMA, num_pairs=2
    )
    out = sampled(estimator, 20_000, windows=windows)
    if name == "es_single":
        epsilon, weights = quadrature(3)
        losses, perturbations = window_losses([epsilon] * windows, length), [epsilon[None]] * windows
    else:
        epsilon, weights = quadrature(3 * windows)
        each = epsilon.reshape(windows, 3, -1)
        losses = window_losses(each, length)
        first = 0 if name == "persistent_es" else None
        perturbations = [each[w if first is None else first : w + 1] for w in range(windows)]
    expected = np.stack([smoothed_gradient(*pair, weights) for pair in zip(losses, perturbations, strict=True)])
    assert np.abs(standard_errors(columns(out.hypergrad), expected)).max() < 3
    values = np.stack([loss @ weights for loss in losses])
    assert np.abs(standard_errors(np.asarray(out.value), values)).max() < 3
    assert np.array_equal(out.done[0], [False, True]) and np.array_equal(out.metrics["inner_steps"][0], [2, 4])
    assert estimator.kind == ("biased" if name == "truncated_es" else "unbiased")


# Influence balancing (Tallec & Ollivier): θ ← Aθ + λ s, A = (I + shift)/2, where λ pushes the first unit up at once
# and, through all the others, down in the end. F is quadratic in λ: smoothing does not change its gradient.

SIGNS = np.array([1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
MATRIX = (np.eye(6) + np.eye(6, k=1)) / 2
INFLUENCE = inner.problem(
    inner.loop(
        lambda params, hyperparams, batch: (
            params @ jax.lax.stop_gradient(params - MATRIX @ params - hyperparams * SIGNS)
        ),
        lambda hyperparams: optax.sgd(1.0),
        init=lambda key, hyperparams, data: jnp.zeros(6),
    ),
    lambda params, hyperparams, batch: (params[0] - 1) ** 2 / 2,
)


def influence_gradient(lam, num_steps=24):
    theta, slope, grads = np.zeros(6), np.zeros(6), []
    for _ in range(num_steps):
        theta, slope = MATRIX @ theta + lam * SIGNS, MATRIX @ slope + SIGNS
        grads.append((theta[0] - 1) * slope[0])
    return np.mean(grads)


@pytest.mark.once
def test_short_windows_are_unbiased_where_truncation_has_the_wrong_sign():
    lam, episodes = jnp.array(0.5), {}
    for name, rule in WINDOWED.items():
        estimator = rule(INFLUENCE, num_steps=24, truncation_length=1, sigma=0.1, num_pairs=4)
        episodes[name] = np.asarray(sampled(estimator, 5_000, windows=24, lam=lam).hypergrad)
    off = {name: standard_errors(x.mean(1), influence_gradient(0.5)) for name, x in episodes.items()}
    assert np.abs(off["persistent_es"]) < 3 and np.abs(off["es_single"]) < 3
    assert np.abs(off["truncated_es"]) > 30
    assert episodes["truncated_es"].mean() * influence_gradient(0.5) < 0
    # One perturbation for all windows: a smaller variance of an episode's mean, and of its last window.
    persistent, single = episodes["persistent_es"], episodes["es_single"]
    assert single.mean(1).var() < 0.75 * persistent.mean(1).var()
    assert single[:, -1].var() < persistent[:, -1].var() / 4


@pytest.mark.once
def test_one_window_is_the_whole_training():
    options = {"sigma": SIGMA, "num_pairs": 3}
    expected = first(hypergrad.evolution(POLYNOMIAL, num_steps=4, outer="mean", **options), LAM, TASK, KEY)
    assert optax.tree.norm(expected.hypergrad) > 1e-2 and expected.done
    run_key, _ = jax.random.split(KEY)  # what `evolution` draws from
    for name, rule in WINDOWED.items():
        once = first(rule(POLYNOMIAL, num_steps=4, truncation_length=4, **options), LAM, TASK, run_key)
        chex.assert_trees_all_close((once.value, once.hypergrad), (expected.value, expected.hypergrad), rtol=1e-12)
        assert once.done, name


@pytest.mark.once
def test_windows_of_one_perturbation_make_up_the_whole_training():
    # Noise, minibatches, a running mean and momentum are carried from window to window.
    def loss(params, hyperparams, batch, context):
        noise = jax.random.normal(context.key)
        mean = 0.5 * context.model_state + 0.5 * batch["y"].mean()
        return hyperparams["penalty"] * params**2 + (params - mean - noise) ** 2, mean

    loop = inner.loop(
        loss,
        lambda hyperparams: optax.sgd(hyperparams["rate"], momentum=0.5),
        init=lambda key, hyperparams, data: (jax.random.normal(key), jnp.zeros([])),
        sampler=inner.minibatch(4),
        with_context=True,
    )
    problem = inner.problem(loop, lambda params, hyperparams, batch: (params - 1) ** 2)
    lam, options = {"penalty": jnp.array(0.3), "rate": jnp.array(0.2)}, {"sigma": 0.1, "num_pairs": 2}
    run_key, _ = jax.random.split(KEY)
    windows = hypergrad.es_single(problem, num_steps=4, truncation_length=2, **options)
    state, estimates = jax.jit(windows.init)(run_key, lam, problems.TASK), []
    step = jax.jit(windows.estimate)
    for _ in range(2):
        estimate, state = step(lam, problems.TASK, state)
        estimates.append((estimate.value, estimate.hypergrad))
    expected = first(hypergrad.evolution(problem, num_steps=4, outer="mean", **options), lam, problems.TASK, KEY)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *estimates)
    chex.assert_trees_all_close(mean, (expected.value, expected.hypergrad), rtol=1e-9)
    assert optax.tree.norm(optax.tree.sub(estimates[0][1], estimates[1][1])) > 1e-3


def test_antithetic_pairs_have_a_smaller_variance_than_two_plain_samples():
    estimator = hypergrad.evolution(POLYNOMIAL, num_steps=3, sigma=0.1, num_pairs=1)
    antithetic = columns(sampled(estimator, 5_000).hypergrad)[:, 0]
    epsilon = np.random.default_rng(0).normal(size=(3, 2, 5_000))
    lams = [float(LAM[name]) + 0.1 * e for name, e in zip(LAM, epsilon, strict=True)]
    theta = lams[2]
    for _ in range(3):
        theta = theta - lams[1] * (theta - lams[0])
    plain = (epsilon * ((theta - 1) ** 2 / 2 + lams[1] ** 2 / 5) / 0.1).mean(1)
    np.testing.assert_allclose(antithetic.mean(0), plain.mean(1), atol=5 * plain.std() / np.sqrt(5_000))
    assert (antithetic.var(0) < plain.var(1) / 4).all()


@pytest.mark.once
def test_the_variance_on_a_linear_loss_is_the_stated_one():
    # (n + 1) |∇F|² / N, whatever σ; large noise from both keys cancels, since a pair shares them.
    slope, noise = jnp.arange(1.0, 5.0), lambda key, *_: 100 * jax.random.normal(key)
    loop = inner.loop(lambda params, hp, batch: 0 * params, lambda hp: optax.sgd(1.0), init=noise)
    linear = inner.problem(loop, lambda params, hp, batch: hp @ slope + params + batch, outer_batch=noise)
    estimator = hypergrad.evolution(linear, num_steps=0, sigma=jnp.full(4, 3.0), num_pairs=2)
    estimates = sampled(estimator, 20_000, lam=jnp.ones(4)).hypergrad[:, 0]
    np.testing.assert_allclose(estimates.var(0).sum(), 5 * (slope**2).sum() / 2, rtol=0.03)
    assert np.abs(standard_errors(estimates, slope)).max() < 3


# What wraps an estimator.

RULES = {
    "evolution": lambda problem, **options: hypergrad.evolution(problem, num_steps=2, **options),
    **{
        name: lambda problem, rule=rule, **options: rule(problem, num_steps=4, truncation_length=2, **options)
        for name, rule in WINDOWED.items()
    },
}


def types(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(jax.tree.map(jax.typeof, tree))]


@pytest.mark.parametrize("name", ["evolution", "persistent_es"])
@pytest.mark.once
def test_tasks_differ_in_their_perturbations_and_the_state_keeps_its_types(name):
    one = RULES[name](POLYNOMIAL, sigma=0.1, num_pairs=2)
    one = hypergrad.over_seeds(one, 2) if name == "persistent_es" else one
    many, lam, tasks = hypergrad.over_tasks(one), LAM, problems.stack([TASK, TASK])
    chex.clear_trace_counter()
    estimate = jax.jit(chex.assert_max_traces(many.estimate, n=1))
    state, dones = jax.jit(many.init)(KEY, lam, tasks), []
    for _ in range(2):
        out, after = estimate(lam, tasks, state)
        assert jax.tree.structure(after) == jax.tree.structure(state) and types(after) == types(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(out.hypergrad, lam)
        assert out.metrics["num_finite"] == 2 and out.metrics["hypergrad_variance"] > 0
        state = after
        dones.append(out.done.tolist())
    assert dones == ([[True] * 2] * 2 if name == "evolution" else [[False] * 2, [True] * 2])


@pytest.mark.once
def test_perturbs_in_unconstrained_coordinates():
    unconstrained = spaces.Unconstrained({"penalty": jnp.array([2.0, -1.0, 1.5, 0.5])})

    def by_hand(z):
        return spaces.to_constrained(problems.SPACE, z)

    loss = lambda params, z, batch: problems.penalized(params, by_hand(z), batch)
    loop = inner.loop(loss, lambda z: optax.sgd(0.4), init=problems.zeros)
    expected = inner.problem(loop, lambda params, z, batch: problems.mean_squares(params, batch))
    results = []
    for problem in (spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE), expected):
        estimator = RULES["es_single"](problem, sigma=spaces.Unconstrained({"penalty": 0.5}), num_pairs=2)
        results.append(first(estimator, unconstrained, problems.TASK, KEY))
    assert optax.tree.norm(results[0].hypergrad) > 1e-4
    chex.assert_trees_all_close(results[0].hypergrad, results[1].hypergrad, rtol=1e-12)


@pytest.mark.once
def test_amortized_evolution_perturbs_the_prediction():
    apply = lambda phi, task: {"log_penalty": phi @ task.features}
    predictor, phi = base.Predictor(lambda key: phi, apply), jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
    one = RULES["persistent_es"](problems.RIDGE, sigma={"log_penalty": 0.3}, num_pairs=2)
    tasks = [problems.regression_task(seed) for seed in range(2)]
    out = first(hypergrad.over_tasks(predictors.amortize(one, predictor)), phi, problems.stack(tasks), KEY)

    @jax.jit
    def single(key, task):
        lam = apply(phi, task)
        slope = one.estimate(lam, task, one.init(key, lam, task))[0].hypergrad["log_penalty"]
        return jnp.outer(slope, task.features)

    singles = [single(key, task) for key, task in zip(jax.random.split(KEY, 2), tasks, strict=True)]
    assert optax.tree.norm(singles) > 1e-3
    np.testing.assert_allclose(out.hypergrad, sum(singles) / 2, rtol=1e-9)


@pytest.mark.once
def test_a_pair_that_is_not_finite_makes_its_task_left_out():
    # log λ under perturbations that reach below zero in some tasks.
    loop = inner.loop(lambda params, hp, batch: params**2, lambda hp: optax.sgd(0.1), init=lambda *_: jnp.ones([]))
    problem = inner.problem(loop, lambda params, hyperparams, batch: jnp.log(hyperparams) + params)
    one, lam = RULES["persistent_es"](problem, sigma=1.0, num_pairs=3), jnp.array(1.5)
    tasks = base.Task(jnp.zeros(8), jnp.zeros(8))
    many = hypergrad.over_tasks(one)
    state = jax.jit(many.init)(KEY, lam, tasks)
    out, _ = jax.jit(many.estimate)(lam, tasks, state)
    each, _ = jax.jit(jax.vmap(one.estimate, (None, 0, 0)))(lam, tasks, state)
    finite = np.isfinite(each.hypergrad)
    assert 0 < finite.sum() < 8 and out.metrics["num_finite"] == finite.sum()
    np.testing.assert_allclose(out.hypergrad, each.hypergrad[finite].mean(), rtol=1e-12)
    assert out.done[~finite].all()


@pytest.mark.once
def test_the_learner_starts_afresh_at_the_horizon():
    estimator = RULES["persistent_es"](POLYNOMIAL, sigma=0.1, num_pairs=2)
    learner = training.learner(estimator, optax.sgd(0.1))
    state, steps, step = jax.jit(learner.init)(KEY, LAM, TASK), [], jax.jit(learner.step)
    for _ in range(5):
        state, metrics = step(state)
        steps.append(int(metrics["inner_steps"]))
    assert steps == [2, 4, 2, 4, 2]


def test_no_derivative_of_the_training_is_needed():
    # A loss in steps: its gradient is zero everywhere, that of its smoothing Σ_k φ((k/2 − λ)/σ)/2σ is not.
    loop = inner.loop(lambda params, hp, batch: 0 * params, lambda hp: optax.sgd(1.0), init=lambda *_: jnp.zeros([]))
    problem = inner.problem(loop, lambda params, hyperparams, batch: jnp.floor(2 * hyperparams) / 2)
    estimator = hypergrad.evolution(problem, num_steps=1, sigma=0.1, num_pairs=4)
    estimates = np.asarray(sampled(estimator, 10_000, lam=jnp.array(0.45)).hypergrad)[:, 0]
    jumps = (np.arange(-3, 6) / 2 - 0.45) / 0.1
    expected = (np.exp(-(jumps**2) / 2) / np.sqrt(2 * np.pi)).sum() / 0.2
    assert np.abs(standard_errors(estimates, expected)) < 3
