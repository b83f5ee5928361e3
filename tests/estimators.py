"""The table of all estimators: each rule for dF/dλ, and each wrapper of a rule, has a row in `ESTIMATORS`.

To add a rule:

1. Write one file in `metaopt/hypergrad/`, such as `_my_rule.py`: a function `(problem, *, ...) -> base.Estimator`.
2. Export it in `metaopt/hypergrad/__init__.py`, in the import and in `__all__`.
3. Add a row to `ESTIMATORS` under the name of the function, such as
   `"my_rule": Row(lambda problem: hypergrad.my_rule(problem, num_steps=2))`. `Row` documents the
   fields; the defaults are those of a rule that continues one training run and answers for leaves of the losses. A
   second setting of a rule may have its own row, "my_rule, setting".

The page `docs/rules.md` must name the rule. So must the docstring of `hypergrad.recommend`, if it does not compare it.
With `recommended=True` and random estimates, add it to the stochastic rules in the slow test of
`test_recommend.py`. Each row is checked for these properties:

- the contract (`test_contract.py`): names of arguments, kind, shapes and types of an estimate;
- the keys (`test_keys.py`): all follow from the seed, each use has its own, and each estimate has new ones;
- the hypergradient (`hypergrad/test_battery.py`), by the kind of the estimator:
  "exact": it is the derivative of `value` from the same state, by finite differences in float64;
  "unbiased": its mean over keys is the derivative of the mean of `value`, within the standard error;
  "biased": its cosine with the derivative of the mean of `value` over a whole run is positive in each leaf. If the row
  has a `limit`, the rule is exact there;
  "pseudo": nothing more.

These tests pass for related rules too. So write a test of the paper's formula in `hypergrad/test_my_rule.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import base, hypergrad, inner, predictors, spaces
from metaopt.nas import _early_stop

# ---- The problem ----------------------------------------------------------------------------------------------------
#
#   ℓ = Σ_d [c_d (θ_d − batch_d)² + penalty_d θ_d²] / 2,    SGD at `rate` from θ_0 = `start`,
#   f = Σ_d (θ_d − batch_d − offset)² / 2,    θ*_d = c_d batch_d / (c_d + penalty_d).
#
# Noise from each of the keys is added to θ_0, to both batches and to the gradient of ℓ.

LEAVES = {"penalty": jnp.array([0.4, 0.7]), "rate": jnp.array(0.3), "start": jnp.array(-1.0), "offset": jnp.array(0.2)}
CURVATURES = jnp.array([1.0, 0.6])
TASK = base.Task(jnp.array([-1.6, -1.1]), jnp.array([-0.9, -0.1]), jnp.array([0.3, -0.2]))
TASKS = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x, 0.8 * x]), TASK)
NUM_STEPS = 2


def leaf_of(hyperparams, name):
    """A leaf of λ, or the constant in its place if λ does not have it."""
    return hyperparams.get(name, LEAVES[name])


def silent(use, key, *numbers):
    """The report of a problem whose keys nobody looks at."""


def problem_of(*, noise: float = 0.0, report: Callable = silent) -> base.Problem:
    """The problem; `report(use, key, *numbers)` gets the key of each use, and the outer loss's λ."""

    def noisy(key, x):
        return x + noise * jax.random.normal(key, x.shape) if noise else x

    def init(key, hyperparams, data):
        report("init", key)
        return noisy(key, leaf_of(hyperparams, "start") * jnp.ones(2)), None

    def sampler(key, step, data):
        report("batch", key)
        return noisy(jax.random.fold_in(key, step), data)

    def loss(params, hyperparams, batch, context):
        report("context", context.key, context.step)
        penalty = (leaf_of(hyperparams, "penalty") * params**2).sum() / 2
        linear = (noisy(context.key, jnp.zeros(2)) * params).sum()
        return (CURVATURES * (params - batch) ** 2).sum() / 2 + penalty + linear

    def outer_loss(params, hyperparams, batch, context):
        report("context", context.key, context.step)
        report("λ", context.key, *(x for name in LEAVES for x in jnp.ravel(leaf_of(hyperparams, name))))
        return ((params - batch - leaf_of(hyperparams, "offset")) ** 2).sum() / 2

    def outer_batch(key, task):
        report("outer", key)
        return noisy(key, task.valid)

    loop = inner.loop(
        loss, lambda hp: optax.sgd(leaf_of(hp, "rate")), init=init, sampler=sampler, with_context=True, im2col=False
    )
    return inner.problem(loop, outer_loss, outer_batch=outer_batch, with_context=True, im2col=False)


def optimum(hyperparams: dict[str, jax.Array], task: base.Task = TASK) -> jax.Array:
    """f(θ*(λ), λ) of the problem without noise."""
    params = CURVATURES * task.train / (CURVATURES + leaf_of(hyperparams, "penalty"))
    return ((params - task.valid - leaf_of(hyperparams, "offset")) ** 2).sum() / 2


# ---- The table ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One estimator, how it uses keys, and where it is exact.

    Attributes:
      make: `problem -> Estimator`, for the problem above. Choose few steps.
      leaves: the names of the leaves of λ that the rule answers for, of `LEAVES`.
      runs: the number of training runs with their own keys at a time.
      fresh: whether each estimate starts new training runs.
      outer: the number of outer batches with their own keys, in one estimate.
      perturbs: "estimate" if each estimate draws three new antithetic pairs of λ, "run" if each training run does,
        "proposals" if it draws values of λ that share a key; None if the rule uses only one λ. `test_keys.py` tests
        these draws. For any other perturbation, set a string of your choice, and test the draws yourself.
      limit: for a biased rule, `problem -> Estimator`: the same rule in a limit in which it is exact, or None.
      limit_answer: the answer in the limit: "value" (the derivative of `value` from the same state, which is the
        answer of exact rules, too), "mean" (as for unbiased rules), or "optimum" (the derivative of f(θ*(λ), λ), after
        many estimates).
      rtol: the relative tolerance of the hypergradient in the limit.
      hyperparams: λ, if it does not consist of `leaves`.
      task: the task, or a batch of tasks.
      recommended: whether `candidates` in `_recommend.py` lists the rule, so that `hypergrad.recommend` compares it.
    """

    make: Callable[[base.Problem], base.Estimator]
    leaves: str = "penalty offset"
    runs: int = 1
    fresh: bool = False
    outer: int = 1
    perturbs: str | None = None
    limit: Callable[[base.Problem], base.Estimator] | None = None
    limit_answer: str = "value"
    rtol: float = 1e-6
    hyperparams: Any = None
    task: base.Task = TASK
    recommended: bool = False


def hyperparams_of(row: Row) -> base.HyperParams:
    """The λ at which a row is checked."""
    return {name: LEAVES[name] for name in row.leaves.split()} if row.hyperparams is None else row.hyperparams


def whole(problem):
    return hypergrad.unrolled(problem, num_steps=NUM_STEPS)


def one_step(problem):
    """The limit of `lookahead` in which it is exact: no step is committed."""
    return hypergrad.lookahead(problem, commit=0)


def direct(problem):
    return hypergrad.direct(
        lambda hp, task, key: ((hp["penalty"] - problem.outer_batch(key, task)) ** 2).sum() * hp["offset"]
    )


def with_small_rate(problem):
    """The problem with small inner steps."""
    return base.reparametrized(problem, lambda hyperparams, step: {**hyperparams, "rate": jnp.array(0.01)})


SPACE = {"penalty": spaces.positive([0.4, 0.7], shape=(2,))}
PREDICTOR = predictors.mlp(SPACE, 2, num_hidden=3)
WEIGHTS = jax.tree.map(
    lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), PREDICTOR.init(jax.random.key(7))
)


def amortize(problem):
    return predictors.amortize(whole(spaces.constrain(problem, SPACE)), PREDICTOR)


DISTRIBUTION = predictors.mlp(SPACE, 2, num_hidden=3, spread=0.5)


def best_of(problem):
    return predictors.best_of(whole(spaces.constrain(problem, SPACE)), DISTRIBUTION, num_proposals=4)


def partition(problem):
    """Two rules that train from one key, and so see one F."""
    return hypergrad.partition(problem, {"a": whole, "b": whole}, {"penalty": "a", "offset": "a", "rate": "b"})


def stopped_by_curvature(problem, rule=hypergrad.lookahead):
    return _early_stop.stopped_by_curvature(rule(problem), problem, every=1)


def stopped_by_skips(problem, rule=hypergrad.lookahead):
    return _early_stop.stopped_by_skips(rule(problem), lambda hyperparams: jnp.zeros([]), every=2)


WINDOWS = {"num_steps": 6, "truncation_length": 2}
ONE_WINDOW = {"num_steps": 2, "truncation_length": 2}
PAIRS = {"sigma": 0.1, "num_pairs": 3}
ALL = "penalty rate start offset"
STEP = "penalty rate offset"
ESTIMATORS = {
    # Exact rules.
    "unrolled": Row(whole, ALL, fresh=True, recommended=True),
    "forward": Row(lambda problem: hypergrad.forward(problem, num_steps=NUM_STEPS), ALL, fresh=True, recommended=True),
    "direct": Row(direct, runs=0),
    # Rules by perturbation.
    "evolution": Row(
        lambda problem: hypergrad.evolution(problem, num_steps=NUM_STEPS, **PAIRS),
        ALL,
        runs=3,
        fresh=True,
        outer=3,
        perturbs="estimate",
        recommended=True,
    ),
    "mix_with_es": Row(
        lambda problem: hypergrad.mix_with_es(whole(problem), **PAIRS),
        ALL,
        runs=3,
        fresh=True,
        outer=3,
        perturbs="estimate",
        recommended=True,
    ),
    "persistent_es": Row(
        lambda problem: hypergrad.persistent_es(problem, **WINDOWS, **PAIRS),
        STEP,
        runs=3,
        outer=3,
        perturbs="estimate",
        recommended=True,
    ),
    "es_single": Row(
        lambda problem: hypergrad.es_single(problem, **WINDOWS, **PAIRS),
        STEP,
        runs=3,
        outer=3,
        perturbs="run",
        recommended=True,
    ),
    "truncated_es": Row(
        lambda problem: hypergrad.truncated_es(problem, **WINDOWS, **PAIRS),
        STEP,
        runs=3,
        outer=3,
        perturbs="estimate",
        limit=lambda problem: hypergrad.truncated_es(problem, **ONE_WINDOW, **PAIRS),
        limit_answer="mean",
        recommended=True,
    ),
    # Rules that differentiate the next steps of a training run.
    "truncated": Row(
        lambda problem: hypergrad.truncated(problem, **WINDOWS),
        ALL,
        limit=lambda problem: hypergrad.truncated(problem, **ONE_WINDOW),
        recommended=True,
    ),
    "lookahead": Row(hypergrad.lookahead, STEP, limit=one_step, recommended=True),
    "darts_fd": Row(
        hypergrad.darts_fd, STEP, limit=lambda problem: hypergrad.darts_fd(problem, commit=0), recommended=True
    ),
    "sama": Row(hypergrad.sama, STEP, recommended=True),
    "hypergradient_descent": Row(  # it has no outer loss
        hypergrad.hypergradient_descent,
        "rate",
        outer=0,
        limit=hypergrad.hypergradient_descent,
        recommended=True,
    ),
    # Rules for the inner minimum.
    "implicit": Row(
        lambda problem: hypergrad.implicit(problem, num_steps=NUM_STEPS),
        limit=lambda problem: hypergrad.implicit(problem, num_steps=NUM_STEPS),
        limit_answer="optimum",
        recommended=True,
    ),
    "warm_implicit": Row(
        lambda problem: hypergrad.warm_implicit(problem, num_steps=NUM_STEPS, adjoint_rate=0.1),
        limit=lambda problem: hypergrad.warm_implicit(problem, num_steps=NUM_STEPS, adjoint_rate=0.1),
        limit_answer="optimum",
        recommended=True,
    ),
    "f2sa": Row(
        lambda problem: hypergrad.f2sa(problem, num_steps=NUM_STEPS, multiplier=1.0),
        outer=NUM_STEPS + 1,
        limit=lambda problem: hypergrad.f2sa(problem, num_steps=NUM_STEPS, multiplier=1e5),
        limit_answer="optimum",
        rtol=1e-4,
        recommended=True,
    ),
    "bome": Row(
        lambda problem: hypergrad.bome(problem, num_steps=NUM_STEPS),
        limit=lambda problem: hypergrad.bome(with_small_rate(problem), num_steps=600, barrier=30.0),
        limit_answer="optimum",
        rtol=0.02,
        recommended=True,
    ),
    # A direction that is not a gradient.
    "reptile": Row(lambda problem: hypergrad.reptile(problem, num_steps=NUM_STEPS), "start", fresh=True),
    # Wrappers of a rule.
    "partition": Row(partition, STEP, fresh=True),
    "over_seeds": Row(lambda problem: hypergrad.over_seeds(whole(problem), 3), ALL, runs=3, fresh=True, outer=3),
    "over_tasks": Row(
        lambda problem: hypergrad.over_tasks(whole(problem)), ALL, runs=3, fresh=True, outer=3, task=TASKS
    ),
    "amortize": Row(amortize, "", fresh=True, hyperparams=WEIGHTS),
    "best_of": Row(
        best_of, "", fresh=True, perturbs="proposals", hyperparams=DISTRIBUTION.init(jax.random.key(7)) | WEIGHTS
    ),
    "stopped_by_curvature": Row(
        stopped_by_curvature, outer=2, limit=lambda problem: stopped_by_curvature(problem, one_step)
    ),
    "stopped_by_skips": Row(stopped_by_skips, limit=lambda problem: stopped_by_skips(problem, one_step)),
}
