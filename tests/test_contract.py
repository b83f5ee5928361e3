"""Both halves of every pair name their arguments as the contract does, so that they can be given by name."""

import inspect

import estimators
import jax
import jax.numpy as jnp
import optax
import problems
import pytest
from estimators import ESTIMATORS

from metaopt import base, hypergrad, inner, nas, predictors, spaces, training
from metaopt.nas import _early_stop

PROBLEM = estimators.problem_of()
SPACE = {"log_penalty": spaces.real(0.0, shape=(problems.NUM_FEATURES,))}
UNROLLED = hypergrad.unrolled(problems.RIDGE, num_steps=1)
MLP = predictors.mlp(SPACE, 2)
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
    estimator = ESTIMATORS[name].make(PROBLEM)
    assert estimator.kind in base.ESTIMATOR_KINDS
    assert names(estimator.init) == stated(base.EstimatorInitFn)
    assert names(estimator.estimate) == stated(base.EstimateFn)


WRAPPERS = {
    "amortize": lambda estimator: predictors.amortize(estimator, MLP),
    "over_seeds": lambda estimator: hypergrad.over_seeds(estimator, 2),
    "over_tasks": hypergrad.over_tasks,
    "stopped_by_curvature": lambda estimator: _early_stop.stopped_by_curvature(estimator, problems.RIDGE, every=1),
    "stopped_by_skips": lambda estimator: _early_stop.stopped_by_skips(estimator, lambda λ: jnp.zeros([]), every=1),
}


@pytest.mark.parametrize("kind", base.ESTIMATOR_KINDS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_keep_the_kind(name, kind):
    assert WRAPPERS[name](UNROLLED._replace(kind=kind)).kind == kind


def test_every_estimator_has_a_row():
    signatures = {
        name: inspect.signature(getattr(room, name))
        for room in (hypergrad, nas, predictors)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
    }
    unstated = {name for name, signature in signatures.items() if signature.return_annotation is signature.empty}
    assert not unstated & set(hypergrad.__all__), "state what the function returns"
    factories = {name for name, signature in signatures.items() if signature.return_annotation is base.Estimator}
    rows = {name.split(", ")[0] for name in ESTIMATORS}  # a rule may have a row for another setting, "name, setting"
    # `nas.robust_darts` and `nas.darts_plus` use the private ones.
    assert rows == factories | {"stopped_by_curvature", "stopped_by_skips"}


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
        hypergrad.cg(normal=True),
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
def test_every_context_and_estimate_has_the_fields_of_the_contract():
    state = problems.RIDGE_LOOP.init(jax.random.key(0), problems.LAM, problems.TASK.train)
    context = problems.RIDGE_LOOP.context(state)
    assert isinstance(context, base.Context) and context.step.dtype == jnp.int32
    for row in ESTIMATORS.values():
        estimator, hyperparams = row.make(PROBLEM), estimators.hyperparams_of(row)
        carried = estimator.init(jax.random.key(0), hyperparams, row.task)
        estimate, after = jax.eval_shape(estimator.estimate, hyperparams, row.task, carried)
        assert isinstance(estimate, base.Estimate)
        num_tasks = row.task.features.shape[:-1]  # () for one task
        assert estimate.value.shape == () and estimate.done.shape == num_tasks and estimate.done.dtype == bool
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert shapes(estimate.hypergrad) == shapes(hyperparams)
        assert jax.tree.structure(after) == jax.tree.structure(carried)
