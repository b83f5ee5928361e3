"""Both halves of every pair name their arguments as the contract does, so that they can be given by name."""

import inspect

import jax
import jax.numpy as jnp
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, nas, predictors, spaces, training
from metaopt.nas import _early_stop

SPACE = {"log_penalty": spaces.real(0.0, shape=(problems.NUM_FEATURES,))}
UNROLLED = hypergrad.unrolled(problems.RIDGE, num_steps=1)
MLP = predictors.mlp(SPACE, 2)
ESTIMATORS = {
    "unrolled": UNROLLED,
    "bome": hypergrad.bome(problems.RIDGE, num_steps=1),
    "darts_fd": hypergrad.darts_fd(problems.RIDGE),
    "f2sa": hypergrad.f2sa(problems.RIDGE, num_steps=1, multiplier=1.0),
    "hypergradient_descent": hypergrad.hypergradient_descent(problems.RIDGE),
    "lookahead": hypergrad.lookahead(problems.RIDGE),
    "reptile": hypergrad.reptile(problems.RIDGE, num_steps=1),
    "sama": hypergrad.sama(problems.RIDGE),
    "implicit": hypergrad.implicit(problems.RIDGE, num_steps=1),
    "forward": hypergrad.forward(problems.RIDGE, num_steps=1),
    "truncated": hypergrad.truncated(problems.RIDGE, num_steps=2, truncation_length=1),
    "t1t2": hypergrad.t1t2(problems.RIDGE, num_steps=2),
    "partition": hypergrad.partition(problems.RIDGE, {"a": lambda p: hypergrad.unrolled(p, num_steps=1)}, "a"),
    "warm_implicit": hypergrad.warm_implicit(problems.RIDGE, num_steps=1, adjoint_rate=0.1),
    "direct": hypergrad.direct(lambda hyperparams, task, key: problems.closed_form(hyperparams, task)),
    "evolution": hypergrad.evolution(problems.RIDGE, num_steps=1, sigma=0.1, num_pairs=1),
    "persistent_es": hypergrad.persistent_es(problems.RIDGE, num_steps=2, truncation_length=1, sigma=0.1, num_pairs=1),
    "es_single": hypergrad.es_single(problems.RIDGE, num_steps=2, truncation_length=1, sigma=0.1, num_pairs=1),
    "truncated_es": hypergrad.truncated_es(problems.RIDGE, num_steps=2, truncation_length=1, sigma=0.1, num_pairs=1),
    "mix_with_es": hypergrad.mix_with_es(UNROLLED, sigma=0.1, num_pairs=3),
    "amortize": predictors.amortize(UNROLLED, MLP),
    "stopped_by_curvature": nas.stopped_by_curvature(hypergrad.lookahead(problems.RIDGE), problems.RIDGE, every=1),
    "stopped_by_skips": _early_stop.stopped_by_skips(
        hypergrad.lookahead(problems.RIDGE), lambda λ: jnp.zeros([]), every=1
    ),
    "over_seeds": hypergrad.over_seeds(UNROLLED, 2),
    "over_tasks": hypergrad.over_tasks(UNROLLED),
}
LOOPS = {
    "loop": problems.RIDGE_LOOP,
    "with_context": problems.EVERYTHING_LOOP,
    "constrained": spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE).loop,
}


def names(function):
    """Names of positional arguments, without those that have a default."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


def stated(protocol):
    return names(protocol.__call__)[1:]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name):
    estimator = ESTIMATORS[name]
    assert estimator.kind in base.ESTIMATOR_KINDS
    assert names(estimator.init) == stated(base.EstimatorInitFn)
    assert names(estimator.estimate) == stated(base.EstimateFn)


WRAPPERS = {
    "amortize": lambda estimator: predictors.amortize(estimator, MLP),
    "over_seeds": lambda estimator: hypergrad.over_seeds(estimator, 2),
    "over_tasks": hypergrad.over_tasks,
    "stopped_by_curvature": lambda estimator: nas.stopped_by_curvature(estimator, problems.RIDGE, every=1),
    "stopped_by_skips": lambda estimator: _early_stop.stopped_by_skips(estimator, lambda λ: jnp.zeros([]), every=1),
}


@pytest.mark.parametrize("kind", base.ESTIMATOR_KINDS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_keep_the_kind(name, kind):
    assert WRAPPERS[name](UNROLLED._replace(kind=kind)).kind == kind


def test_every_estimator_of_the_room_is_in_the_battery():
    factories = {
        name
        for room in (hypergrad, nas, predictors)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
        and inspect.signature(getattr(room, name)).return_annotation is base.Estimator
    }
    assert factories == set(ESTIMATORS)


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name):
    loop = LOOPS[name]
    for function, protocol in (
        (loop.init, base.InitFn),
        (loop.batch, base.BatchFn),
        (loop.loss, base.LossFn),
        (loop.update, base.UpdateFn),
    ):
        assert names(function) == stated(protocol)
    assert names(loop.params) == names(loop.context) == ["state"]


@pytest.mark.parametrize("problem", [problems.RIDGE, problems.EVERYTHING, spaces.constrain(problems.RIDGE, SPACE)])
def test_problems(problem):
    assert names(problem.outer_loss) == stated(base.OuterLossFn)
    assert names(problem.outer_batch) == stated(base.OuterBatchFn)


@pytest.mark.parametrize("predictor", [MLP, predictors.dataset_embedding(SPACE)])
def test_predictors(predictor):
    assert names(predictor.init) == ["key"]
    assert names(predictor.apply) == ["meta_params", "task"]
    assert predictor.config["kind"]


def test_functions_of_training():
    assert names(hypergrad.unroll(problems.RIDGE_LOOP, num_steps=1)) == ["key", "hyperparams", "data"]
    assert names(hypergrad.implicit_solve(problems.RIDGE_LOOP, num_steps=1)) == ["key", "hyperparams", "data"]
    assert names(inner.run(problems.RIDGE_LOOP, num_steps=1)) == ["key", "hyperparams", "data"]
    for sampler in (inner.minibatch(2), inner.minibatch(2, replace=True)):
        assert names(sampler) == stated(inner.Sampler)


@pytest.mark.parametrize(
    "solver",
    [
        hypergrad.bicgstab(),
        hypergrad.cg(),
        hypergrad.dense(),
        hypergrad.gmres(),
        hypergrad.neumann(num_steps=1, rate=1.0),
        hypergrad.normal_cg(),
        hypergrad.nystrom(rank=1, damping=1.0),
    ],
)
def test_solvers(solver):
    assert names(solver) == stated(hypergrad.Solver)


def test_learner():
    learner = training.learner(UNROLLED, optax.sgd(0.1))
    assert names(learner.init) == ["key", "hyperparams", "tasks"]
    assert names(learner.step) == ["state"]


@pytest.mark.once
def test_contexts_and_estimates_have_the_fields_of_the_contract():
    state = problems.RIDGE_LOOP.init(jax.random.key(0), problems.LAM, problems.TASK.train)
    context = problems.RIDGE_LOOP.context(state)
    assert isinstance(context, base.Context) and context.step.dtype == jnp.int32
    for name in set(ESTIMATORS) - {"amortize", "over_tasks", "hypergradient_descent", "reptile"}:  # another λ, or tasks
        estimator = ESTIMATORS[name]
        carried = estimator.init(jax.random.key(0), problems.LAM, problems.TASK)
        estimate, after = jax.eval_shape(estimator.estimate, problems.LAM, problems.TASK, carried)
        assert isinstance(estimate, base.Estimate)
        assert estimate.value.shape == estimate.done.shape == () and estimate.done.dtype == bool
        assert jax.tree.map(lambda x: x.shape, estimate.hypergrad) == {"log_penalty": (problems.NUM_FEATURES,)}
        assert jax.tree.structure(after) == jax.tree.structure(carried)
