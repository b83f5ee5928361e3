"""The result of a training: predictions, portfolios and trials for a new task, from a surrogate of earlier tasks.

The files follow the order of the algorithm. `_encoding` turns configurations into vectors, and `_domain` chooses them
from a space or a finite set. `_new_task` specializes the surrogate to a task's features, and `_new_trials` turns its
trials into arrays. `_predictions` and `_scores` have the formulas, and `_programs` compiles them. `_goal_search` has
the score of several outcomes. `_suggestions` chooses configurations by these scores, `_meta_searcher` keeps the trials
of a search, and `_meta_outcomes` predicts outcomes.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from metaopt import base, spaces
from metaopt.blackbox import _meta_searcher, _predictions
from metaopt.blackbox._domain import NUM_RANDOM, default_candidates, make_domain
from metaopt.blackbox._encoding import encode_fn, encoder
from metaopt.blackbox._goal_search import as_goal_outcomes, make_goal_search
from metaopt.blackbox._goals import Goals
from metaopt.blackbox._meta_outcomes import OutcomesFn, predict_outcomes
from metaopt.blackbox._new_task import new_task_of
from metaopt.blackbox._new_trials import EndedTrials, as_configurations, as_outcomes
from metaopt.blackbox._programs import Learned, make_learned
from metaopt.blackbox._suggestions import best_configuration, complementary, make_search, next_configuration
from metaopt.blackbox._surrogates import Kernel, Surrogate, TaskTrials, explained_share


class Evidence(NamedTuple):
    """The amount of evidence from earlier tasks, and its weight in `MetaOptimizer.predict`.

    Attributes:
      num_tasks: S, the number of earlier tasks whose trials have different outcomes.
      num_records: number of their trials, including failed ones.
      effective_tasks: E, at most S. It sums, over tasks, the share of the variance that the task's trials explain. The
        variance is over the space, or over the candidates. A task with few trials counts as a fraction of a task.
      weight: w = E / (E + 7), the weight of earlier tasks in the objective of `predict`. The rest is the weight of a
        prior in favor of the space's default. w is 1 if `candidates` do not hold the default, since `predict` cannot
        return it then.
    """

    num_tasks: int
    num_records: int
    effective_tasks: float
    weight: float


class PredictFn(Protocol):
    def __call__(self, new_task: Any = None, y: Any = None) -> dict[str, Any]:
        """Returns a configuration for a new task without trials; near the default if `evidence.weight` is small.

        `predict(x, y)` is `predict((x, y))`: rows and labels of the new task, if training had `datasets` of such
        pairs."""
        ...


class PortfolioFn(Protocol):
    def __call__(self, num: int, new_task: Any = None) -> list[dict[str, Any]]:
        """Returns `num` configurations that complement each other, so that one of them is good on most tasks."""
        ...


class SuggestFn(Protocol):
    def __call__(
        self,
        configurations: Sequence[Mapping[str, Any]],
        outcomes: Sequence[float] | Sequence[Mapping[str, float]] | np.ndarray,
        new_task: Any = None,
        *,
        num: int = 1,
        acquisition: str = "ei",
        pending: Sequence[Mapping[str, Any]] = (),
        key: jax.Array | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the next `num` configurations, given finished and running (`pending`) trials.

        Nothing is trained: the posterior is in closed form. An outcome of NaN means that the trial failed.

        Once a trial has an outcome, some suggestions explore, as in the searcher: they ignore the acquisition function
        and costs.

        - Without candidates, every fourth suggestion is random. It is made if the number of finished and running
          trials is 3, 7, 11 and so on. It depends only on `key` and on that number.
        - With candidates, every eighth suggestion (7, 15, 23 and so on) is the untried candidate that is farthest from
          all finished and running trials.

        The searcher instead counts the trials that it has proposed.

        Configurations are dicts or the rows of a data frame. A gap in a data frame is a missing value, or None if None
        is a label. Missing values are at their defaults. Names and values that the space does not have raise
        `ValueError`. Outcomes are [N] or [N, 1]. With `objectives` or `constraints` they are N dicts by name, or
        [N, M + C], objectives before constraints. There, a trial whose outcomes are all NaN has failed, and one NaN is
        an unknown outcome. With more than 256 trials, only the best, the latest failed and the latest trials are used.
        Without candidates, the configurations of the other trials are checked only if no trial has an outcome."""
        ...


class MakeSearcherFn(Protocol):
    def __call__(
        self,
        new_task: Any = None,
        *,
        acquisition: str = "ei",
        first: Sequence[Mapping[str, Any]] | None = None,
    ) -> base.Searcher:
        """Returns a searcher that spends trials on a new task.

        Its trials are, in this order:

        1. The configurations of `first`, with missing values at their defaults. By default this is the space's
           default, as in other searchers, or nothing if candidates do not hold the default. A configuration of `first`
           is skipped if `tell` has received a full-budget record of it from another search.
        2. Until there is an outcome: the configuration of `predict`, then configurations that complement it. If trials
           have failed, the next trial is the configuration with the best expected outcome, given these failures.
           `first=()` starts here.
        3. Maxima of the acquisition function. Without candidates every fourth trial is random. With candidates every
           eighth trial is the untried candidate that is farthest from all earlier trials."""
        ...


class MetaOptimizer(NamedTuple):
    """The result of `train_meta_optimizer` and `train_meta_searcher`.

    Below, g is this learned optimizer. `new_task` is one of these:

    - a `base.Task` with its `features`, and with its `train` rows if g reads rows. If the Task lacks the features that
      g reads, a warning says so;
    - the features themselves, [F];
    - a `tasks.Table`, or a pair (x, y) of rows and labels, if g was trained with `datasets` of such data;
    - None if nothing is known about the task.

    All functions compute in the precision (`jax_enable_x64`) in which g was trained or loaded, whatever the setting is
    when they are called.

    Attributes:
      predict: `(new_task) -> configuration` or `(x, y) -> configuration`, as plain values by name, without a trial.
      portfolio: `(num, new_task) -> configurations` that complement each other: one of them is good on most tasks.
      suggest: `(configurations, outcomes, new_task, *, num=1, acquisition="ei", pending=(), key=None) ->
        configurations`, the next `num` trials, for callers that keep the trials themselves. The first two arguments are
        the finished trials; an outcome of NaN is a failure. `pending` are the configurations of running trials.
      searcher: `(new_task, *, acquisition="ei", first=None) -> Searcher`. `acquisition` is "ei" (expected improvement),
        "ei_per_cost", "ucb" or "thompson". The first trials are the configurations of `first`; by default the space's
        default, if it is a candidate.
      outcomes: `(configurations, new_task, *, tried=(), outcomes=(), levels=(0.1, 0.5, 0.9)) -> Outcomes`, the
        predicted outcomes of P configurations after the trials `tried`: their `mean` [P], and `quantiles` [P, L] at L
        levels. Without `outcomes`, they are normalized: 0 is the best outcome of the task, and 1 its worst.
      surrogate: the learned model of outcomes on earlier tasks, a NamedTuple of arrays.
      cost_surrogate: a surrogate of the logarithm of trials' costs, or None.
      space: the search space of λ.
      candidates: the configurations to choose from, or None.
      evidence: `num_tasks`, `num_records` and `effective_tasks` of the earlier tasks, and their `weight` w in
        `predict`.
      reads: "table" or "images" if a new task may be given as such data; otherwise None.
      objectives: the names of the outcomes that `searcher` and `suggest` minimize together; () for the `outcome`.
      constraints: name -> the largest feasible value of another outcome.
      other_surrogates: the models of the other outcomes, in the order of `objectives[1:]` and `constraints`.
    """

    predict: PredictFn
    portfolio: PortfolioFn
    suggest: SuggestFn
    searcher: MakeSearcherFn
    outcomes: OutcomesFn
    surrogate: Surrogate
    cost_surrogate: Surrogate | None
    space: base.PyTree
    candidates: list[dict[str, Any]] | None
    evidence: Evidence
    reads: str | None = None
    objectives: tuple[str, ...] = ()
    constraints: Mapping[str, float] = types.MappingProxyType({})
    other_surrogates: tuple[Surrogate, ...] = ()


def meta_optimizer(
    surrogate: Surrogate,
    cost_surrogate: Surrogate | None,
    space: base.PyTree,
    candidates: Sequence[Mapping[str, Any]] | None,
    *,
    num_records: int = 0,
    effective_tasks: float | None = None,
    reads: str | None = None,
    goals: Goals | None = None,
    other_surrogates: Sequence[Surrogate] = (),
) -> MetaOptimizer:
    """The `MetaOptimizer` of a surrogate; E is the number of earlier tasks if `effective_tasks` is None.

    With `goals`, the surrogate is that of the first objective, and `other_surrogates` those of the other outcomes.
    """
    num_tasks = len(surrogate.curves)
    num_effective = float(num_tasks if effective_tasks is None else effective_tasks)
    domain = make_domain(space, candidates)
    model = _predictions.make_model(surrogate, cost_surrogate, domain, num_effective)
    learned = make_learned(model, domain, reads)
    if goals is not None:
        models = [_predictions.make_model(other, None, domain, len(other.curves)) for other in other_surrogates]
        every = learned, *(make_learned(model, domain, reads) for model in models)
        learned = learned._replace(goals=make_goal_search(goals, every))
    x64 = bool(jax.config.jax_enable_x64)
    bind = lambda function: in_precision(x64, functools.partial(function, learned))
    return MetaOptimizer(
        predict=bind(predict),
        portfolio=bind(portfolio),
        suggest=bind(suggest),
        searcher=bind(functools.partial(searcher, x64)),
        outcomes=bind(predict_outcomes),
        surrogate=surrogate,
        cost_surrogate=cost_surrogate,
        space=space,
        candidates=domain.candidates or None,
        evidence=Evidence(num_tasks, num_records, num_effective, model.weight),
        reads=reads,
        objectives=() if goals is None else goals.objectives,
        constraints={} if goals is None else goals.constraints,
        other_surrogates=tuple(other_surrogates),
    )


def in_precision(x64: bool, function: Callable) -> Any:
    """Wraps a function so that it runs under `jax.enable_x64(x64)`, whatever the caller's setting is.

    Networks keep the precision in which g was made. Encoded configurations keep it too, since tried configurations are
    identified by their bytes.
    """

    @functools.wraps(function, assigned=())  # a partial function has neither a name nor a docstring
    def within(*args, **kwargs):
        with jax.enable_x64(x64):
            return function(*args, **kwargs)

    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    within.__name__, within.__doc__ = inner.__name__, inner.__doc__
    return within


def predict(learned: Learned, new_task: Any = None, y: Any = None) -> dict[str, Any]:
    """Returns one configuration for a new task, without a trial: `predict(new_task)` or `predict(x, y)`.

    `help(metaopt.blackbox.MetaOptimizer)` describes the tasks that it takes.
    """
    new_task = new_task if y is None else (new_task, y)
    return best_configuration(learned, new_task_of(learned.model.surrogate, new_task, learned.reads))


def portfolio(learned: Learned, num: int, new_task: Any = None) -> list[dict[str, Any]]:
    """`MetaOptimizer.portfolio`."""
    return complementary(learned, new_task_of(learned.model.surrogate, new_task, learned.reads), num)


def suggest(
    learned: Learned,
    configurations: Sequence[Mapping[str, Any]],
    outcomes: Sequence[float] | Sequence[Mapping[str, float]] | np.ndarray,
    new_task: Any = None,
    *,
    num: int = 1,
    acquisition: str = "ei",
    pending: Sequence[Mapping[str, Any]] = (),
    key: jax.Array | None = None,
) -> list[dict[str, Any]]:
    """`MetaOptimizer.suggest`."""
    encode, space = learned.domain.encode, learned.domain.space
    configurations = as_configurations("configurations", configurations, space)
    pending = as_configurations("pending", pending, space)
    all_outcomes = None
    if learned.goals is None:
        y = as_outcomes(outcomes, len(configurations))
    else:
        all_outcomes = as_goal_outcomes(outcomes, len(configurations), learned.goals.goals)
        y = all_outcomes[:, 0]
    ended = EndedTrials(
        y,
        np.zeros(len(y), bool),
        np.full(len(y), np.nan),
        # Encode on demand: only some trials are used, and all are needed only to find the untried candidates.
        lambda i: encode(configurations[i], True),
        lambda: {encode(configuration, True).tobytes() for configuration in configurations},
        all_outcomes,
    )
    task = new_task_of(learned.model.surrogate, new_task, learned.reads)
    search = make_search(learned, task, acquisition, new_task)
    running = {len(y) + i: encode(configuration, True) for i, configuration in enumerate(pending)}
    suggestions = []
    for trial in range(len(y) + len(running), len(y) + len(running) + num):
        trial_key = jax.random.fold_in(jax.random.key(0) if key is None else key, trial)
        best = next_configuration(learned, search, jax.random.split(trial_key)[1], ended, running, trial)
        suggestions.append(best)
        running[trial] = encode(best)
    return suggestions


def searcher(
    x64: bool,
    learned: Learned,
    new_task: Any = None,
    *,
    acquisition: str = "ei",
    first: Sequence[Mapping[str, Any]] | None = None,
) -> base.Searcher:
    """`MetaOptimizer.searcher`, which computes in the precision `x64`."""
    domain = learned.domain
    task = new_task_of(learned.model.surrogate, new_task, learned.reads)
    search = make_search(learned, task, acquisition, new_task)
    if first is None:
        first = [{}] if domain.encoded is None else default_candidates(domain)[:1]
    whole = tuple(spaces.complete(domain.space, c) for c in as_configurations("first", first, domain.space))
    return base.Searcher(
        functools.partial(_meta_searcher.init, learned, whole),
        in_precision(x64, functools.partial(_meta_searcher.ask, learned, search)),
        in_precision(x64, functools.partial(_meta_searcher.tell, learned)),
    )


def effective_tasks(
    trials: Sequence[TaskTrials],
    kernel: Kernel,
    space: base.PyTree,
    candidates: Sequence[Mapping[str, Any]] | None,
) -> float:
    """E of `Evidence`: `explained_share`, summed over tasks, averaged over candidates or random points."""
    if candidates:
        encode = encoder(space)
        x = np.stack([encode(candidate, True) for candidate in candidates])
    else:
        sample = jax.jit(jax.vmap(lambda key: encode_fn(space)(spaces.sample(key, space))))
        x = np.asarray(sample(jax.random.split(jax.random.key(2), NUM_RANDOM)))
    return float(sum(explained_share(kernel, task.x, x).mean() for task in trials))
