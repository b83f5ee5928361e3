"""Predictions, portfolios and trials for a new task, from a surrogate of earlier tasks."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt import _checks, base, spaces, tasks
from metaopt.blackbox import _acquisition, _posterior, _random_search, _surrogates, _transformer
from metaopt.blackbox._meta_outcomes import OutcomesFn, mean_of, outcomes_fn
from metaopt.blackbox._new_trials import (
    MAX_TRIALS,
    Told,
    TriedConfiguration,
    as_configurations,
    as_outcomes,
    at_full_budget,
    best_and_latest,
    farthest,
    from_the_best,
    padded,
    rounded_fidelity,
    shown_to_transformers,
    tried_configuration,
)

# Expected improvement, expected improvement per predicted cost, a confidence bound, Thompson sampling.
ACQUISITIONS = ("ei", "ei_per_cost", "ucb", "thompson")
_RANDOM_EVERY = 4  # trials, in a search without candidates
_FARTHEST_EVERY = 8  # trials, in a search with candidates
_DEFAULT_TASKS = 7.0  # weight of the prior in favor of the default, in earlier tasks
_MAX_COSTS = 64  # trials whose costs are used
_NUM_RANDOM, _NUM_RESTARTS, _NUM_ASCENTS = 256, 8, 20


class Evidence(NamedTuple):
    """The amount of evidence from earlier tasks, and its weight in `MetaOptimizer.predict`.

    Attributes:
      num_tasks: S, the number of earlier tasks whose trials have different outcomes.
      num_records: number of their trials, including failed ones. None if a file of an earlier version does not state
        it.
      effective_tasks: E, at most S. It sums, over tasks, the share of the variance that the task's trials explain
        (`blackbox.explained_share`). The variance is over the space, or over the candidates. A task with few trials
        counts as a fraction of a task. E is S if a file of an earlier version does not state it.
      weight: w = E / (E + 7), the weight of earlier tasks in the objective of `predict`. The rest is the weight of a
        prior in favor of the space's default. w is 1 if `candidates` do not hold the default, since `predict` cannot
        return it then.
    """

    num_tasks: int
    num_records: int | None
    effective_tasks: float
    weight: float


class PredictFn(Protocol):
    def __call__(self, new_task: Any = None) -> dict[str, Any]:
        """Returns a configuration for a new task without trials; near the default if `evidence.weight` is small."""
        ...


class PortfolioFn(Protocol):
    def __call__(self, num: int, new_task: Any = None) -> list[dict[str, Any]]:
        """Returns `num` configurations that complement each other, so that one of them is good on most tasks."""
        ...


class SuggestFn(Protocol):
    def __call__(
        self,
        configurations: Sequence[Mapping[str, Any]],
        outcomes: Sequence[float] | np.ndarray,
        new_task: Any = None,
        *,
        num: int = 1,
        acquisition: str = "ei",
        pending: Sequence[Mapping[str, Any]] = (),
        key: jax.Array | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the next `num` configurations, given finished and running (`pending`) trials, without a fit.

        The posterior is in closed form. An outcome of NaN means that the trial failed.

        As in the searcher, some suggestions ignore the acquisition function and costs once a trial has an outcome:

        - Without candidates, every fourth suggestion is random. It is made if the number of finished and running
          trials is 3, 7, 11 and so on. It depends only on `key` and on that number.
        - With candidates, every eighth suggestion (7, 15, 23 and so on) is the untried candidate that is farthest from
          all finished and running trials.

        The searcher counts the trials that it has asked for instead.

        Configurations are dicts or the rows of a data frame. A gap in a data frame is a missing value, or None if None
        is a label. Missing values are at their defaults. Names and values that the space does not have raise
        `ValueError`. Outcomes are [N] or [N, 1]. With more than 256 trials, only the best, the latest failed and the
        latest trials are used. The other trials are not checked if there is an outcome and no candidates."""
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
           have failed, the best expected configuration given these failures. `first=()` starts here.
        3. Maxima of the acquisition function. Without candidates every fourth trial is random. With candidates every
           eighth trial is the untried candidate that is farthest from all earlier trials."""
        ...


class MetaOptimizer(NamedTuple):
    """The result of `train_meta_optimizer` and `train_meta_searcher`.

    `new_task` is one of these:

    - a `base.Task` with its `features`, and with its `train` rows if g reads rows. If the Task lacks the features that
      g reads, a warning says so;
    - the features themselves, [F];
    - None if nothing is known about the task.

    All functions compute in the precision (`jax_enable_x64`) in which g was trained or loaded, whatever the setting is
    when they are called.

    Attributes:
      predict: `(new_task) -> configuration`, as plain values by name.
      portfolio: `(num, new_task) -> configurations`.
      suggest: `(configurations, outcomes, new_task, *, num, acquisition, pending, key) -> configurations`: fine-tuning
        with trials that the caller keeps.
      searcher: `(new_task, *, acquisition, first) -> Searcher`: fine-tuning with trials.
      outcomes: `(configurations, new_task, *, tried, outcomes, levels) -> Outcomes`: predicted outcomes.
      surrogate: the learned `blackbox.Surrogate`.
      cost_surrogate: a surrogate of the logarithm of trials' costs, or None.
      space: the search space of λ.
      candidates: the configurations to choose from, or None.
      evidence: the numbers of earlier tasks and records, and their weight in `predict`.
    """

    predict: PredictFn
    portfolio: PortfolioFn
    suggest: SuggestFn
    searcher: MakeSearcherFn
    outcomes: OutcomesFn
    surrogate: _surrogates.Surrogate
    cost_surrogate: _surrogates.Surrogate | None
    space: base.PyTree
    candidates: list[dict[str, Any]] | None
    evidence: Evidence


class MetaSearcherState(NamedTuple):
    """State of the searcher, passed from one call to the next.

    Attributes:
      key: the key of the search. The key of a trial is folded from it and the trial's number.
      num_asked: number of trials that were asked for.
      pending: encoded configurations [D] of trials without a result, by trial number.
      tried: the ended trials, by trial number, seed, encoded configuration, and repeat. A trial is unnumbered if its
        number and seed are both 0. Another outcome of an unnumbered trial at the same fidelity is a repeat. Another
        outcome of a numbered trial at the same fidelity replaces the former one, and its repeat is 0.
      first: configurations to try before others.
      repeats: for unnumbered trials, the number of outcomes of a configuration at a fidelity, and the repeat that
        each outcome belongs to.
    """

    key: jax.Array
    num_asked: int
    pending: dict[int, np.ndarray]
    tried: dict[tuple[int, int, bytes, int], TriedConfiguration]
    first: tuple[dict[str, Any], ...]
    repeats: dict[tuple, int]


ROWS = ("x", "y", "mask", "feature_mask", "class_mask")  # the arrays of a labeled table that an embedding reads


def check_rows(name: str, data: Any) -> None:
    """Raises `ValueError` if `data` is not a mapping with all arrays that an embedding reads."""
    lacks = [key for key in ROWS if not isinstance(data, Mapping) or key not in data]
    if lacks:
        raise ValueError(
            f"{name} must be a dict of {', '.join(ROWS)}, like `train` of `tasks.to_task`; it lacks {', '.join(lacks)}."
        )


def check_no_mapping(name: str, features: Any) -> None:
    """Rejects a mapping, as `tasks.metafeatures` returns it: features must be in the order of earlier tasks."""
    if isinstance(features, Mapping):
        raise ValueError(
            f"`{name}` must have features as an array of numbers [F], and not by name; `tasks.fit_scaling` and "
            "`tasks.apply_scaling` make one of `tasks.metafeatures`."
        )


def features_of(new_task: Any) -> np.ndarray | None:
    """[F] features of a new task, or None if nothing is known about it.

    Args:
      new_task: a `base.Task`, features, or None.

    Raises:
      ValueError: if `new_task` is anything else, such as a `tasks.Table`.
    """
    features = new_task.features if isinstance(new_task, base.Task) else new_task
    check_no_mapping("new_task", features)
    if features is None:
        return None
    try:
        array = np.asarray(features, float)
    except (TypeError, ValueError):
        array = np.zeros(())
    if array.ndim != 1:
        of_a_table = (
            " A table's features are `tasks.apply_scaling(scaling, tasks.metafeatures(table))`, scaled as those of "
            "earlier tasks (`tasks.fit_scaling`); where g reads rows, `tasks.to_task` makes a Task of what "
            "`tasks.prepare` returns."
        )
        raise ValueError(
            "`new_task` must be a `base.Task` with `features`, those features as an array of numbers [F], or None; got "
            f"{f'shape {np.shape(features)}' if array.ndim else type(features).__name__}."
            + of_a_table
            * isinstance(new_task, (tasks.Table, tasks.PreparedTable))
        )
    return array


def encoder(space: base.PyTree):
    """Returns `(configuration, strict) -> [D]`, which caches results and puts inactive values at their defaults.

    If strict, values that are `spaces.foreign` raise an error. Otherwise:

    - an unknown label is encoded as equally near to all labels;
    - a number out of bounds is moved to the bound;
    - a non-number instead of a number becomes the default.
    """
    encode, known = jax.jit(_encode_fn(space)), {}

    def encoded(configuration, strict=False):
        # The types separate labels that compare equal (1, 1.0, True).
        name = strict, *configuration, *configuration.values(), *map(type, configuration.values())
        try:
            found = known.get(name)
        except TypeError:  # values of other spaces may not be hashable
            found = known.get(name := (strict, repr(sorted(configuration.items(), key=lambda item: item[0]))))
        if found is None:
            gaps = {k: math.nan for k, v in configuration.items() if isinstance(v, float) and v != v}
            if any(configuration[key] is not math.nan for key in gaps):  # a NaN is found in the cache only by identity
                return encoded({**configuration, **gaps}, strict)
            # Fill missing labels with the plain default first: a relaxed default lies between labels.
            whole = spaces.complete(space, configuration, strict=strict)
            others = {} if strict else spaces.foreign(space, configuration)
            hyperparams = spaces.from_configuration(space, whole | others, strict=strict)
            found = known[name] = np.asarray(encode(hyperparams))
        return found

    return encoded


def _encode_fn(space: base.PyTree):
    """`spaces.encode` with inactive values at their defaults, so that unused values do not distinguish trials."""
    if not any(leaf.condition for leaf in jax.tree.leaves(space)):
        return lambda hyperparams: spaces.encode(space, hyperparams)
    default = lambda x: spaces.encode(space, spaces.default(space)).astype(x.dtype)

    def encode(hyperparams):
        x = spaces.encode(space, hyperparams)
        return jnp.where(spaces.active(space, hyperparams), x, default(x))

    return encode


def _in_precision(x64: bool, function: Callable) -> Any:
    """Wraps a function so that it runs under `jax.enable_x64(x64)`, whatever the caller's setting is.

    Networks keep the precision in which g was made. Encoded configurations keep it too, since tried configurations are
    identified by their bytes.
    """

    @functools.wraps(function)
    def within(*args, **kwargs):
        with jax.enable_x64(x64):
            return function(*args, **kwargs)

    return within


def _repeat_of(repeats: dict[tuple, int], name: tuple[bytes, float], outcome: float) -> int:
    """The index of the repeat of a configuration at a fidelity that an outcome belongs to.

    A new finite outcome is added to `repeats`. A failure is not added, so that the next new outcome replaces it.
    """
    if not np.isfinite(outcome):
        return repeats.get(name, 0)
    if (*name, outcome) not in repeats:
        repeats[*name, outcome] = repeats.get(name, 0)
        repeats[name] = repeats.get(name, 0) + 1
    return repeats[*name, outcome]


def effective_tasks(
    trials: Sequence[_surrogates.TaskTrials],
    kernel: _surrogates.Kernel,
    space: base.PyTree,
    candidates: Sequence[Mapping[str, Any]] | None,
) -> float:
    """E of `Evidence`: `blackbox.explained_share`, summed over tasks, averaged over candidates or random points."""
    if candidates:
        encode = encoder(space)
        x = np.stack([encode(candidate, True) for candidate in candidates])
    else:
        sample = jax.jit(jax.vmap(lambda key: _encode_fn(space)(spaces.sample(key, space))))
        x = np.asarray(sample(jax.random.split(jax.random.key(2), _NUM_RANDOM)))
    return float(sum(_surrogates.explained_share(kernel, task.x, x).mean() for task in trials))


def meta_optimizer(
    surrogate: _surrogates.Surrogate,
    cost_surrogate: _surrogates.Surrogate | None,
    space: base.PyTree,
    candidates: Sequence[Mapping[str, Any]] | None,
    *,
    num_records: int | None = None,
    effective_tasks: float | None = None,
) -> MetaOptimizer:
    """The `MetaOptimizer` of a surrogate; each earlier task counts as a whole one if `effective_tasks` is None."""
    encode, encode_relaxed = encoder(space), _encode_fn(space)
    in_precision = functools.partial(_in_precision, bool(jax.config.jax_enable_x64))
    pool = [dict(candidate) for candidate in candidates or ()]
    finite = np.stack([encode(candidate, True) for candidate in pool]) if pool else None  # [P, D]
    finite_keys = [] if finite is None else [row.tobytes() for row in finite]
    # Gradient ascent runs over a configuration's vector of unconstrained coordinates, z.
    template, unravel = ravel_pytree(spaces.to_unconstrained(space, spaces.default(space)))
    relaxed = lambda z: encode_relaxed(spaces.to_constrained(space, unravel(z)))
    # A simplex keeps its weights, as in `spaces.configuration`.
    plain = lambda leaf, x, dtype: x if leaf.kind == "simplex" else jnp.asarray(leaf.discretize(x), dtype)
    rounded = lambda z: encode_relaxed(
        jax.tree.map(lambda leaf, x: plain(leaf, x, z.dtype), space, spaces.to_constrained(space, unravel(z)))
    )
    sample = jax.jit(jax.vmap(lambda key: ravel_pytree(spaces.to_unconstrained(space, spaces.sample(key, space)))[0]))

    def search(key, score):
        """Returns z of the best configuration, scored after rounding.

        It chooses among the best of the default and random configurations, and the ends of ascents from them.
        """
        z = jnp.concatenate([template[None], sample(jax.random.split(key, _NUM_RANDOM))])
        top = z[jax.lax.top_k(score(jax.vmap(rounded)(z)), _NUM_RESTARTS)[1]]
        optimizer = optax.adam(0.1)

        def ascend(carry, _):
            z, state = carry
            grads = jax.grad(lambda z: -score(jax.vmap(relaxed)(z)).sum())(z)
            # Acquisition functions are flat far from their maximum, so we use only the direction of the gradient.
            grads = grads / jnp.maximum(jnp.linalg.norm(grads, axis=1, keepdims=True), 1e-12)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(z, updates), state), None

        (ascended, _), _ = jax.lax.scan(ascend, (top, optimizer.init(top)), length=_NUM_ASCENTS)
        both = jnp.concatenate([top, jnp.asarray(ascended)])
        return both[jnp.argmax(score(jax.vmap(rounded)(both)))]

    # Deep kernels and transformers are the parts of a surrogate that depend on the task.
    at = lambda networks: surrogate._replace(deep=networks[0], transformers=networks[1])
    share = 0.0 if surrogate.transformers is None else float(surrogate.transformer_share)
    typical_scale = float(np.exp(np.median(surrogate.log_scales)))
    widest = 2 * float(np.exp(np.max(surrogate.log_scales)))

    def read_mean(networks, shown, x):
        """[P] normalized outcomes that transformers expect if no trial has one; a failure counts as the worst, 1."""
        read = _transformer.read_trials(networks[1], shown)
        return _transformer.binned_moments(_transformer.predict_binned(networks[1], read, x), 1.0)[0]

    def outcomes_of(weights, networks, x):
        """[P, K] normalized outcomes that are possible before the first trial, and [K] their weights."""
        found = _surrogates.expected_outcomes(at(networks), x)
        if not share:
            return found, weights
        nothing = jnp.zeros((0, x.shape[1]), x.dtype), jnp.zeros(0, x.dtype), jnp.zeros(0, x.dtype)
        found = jnp.concatenate([found, read_mean(networks, nothing, x)[:, None]], axis=1)
        return found, jnp.append((1 - share) * weights, share)

    def expected(weights, networks, x):
        found, weights = outcomes_of(weights, networks, x)
        return -(found @ weights)

    default = encode({})
    num_tasks = len(surrogate.curves)
    num_effective = float(num_tasks if effective_tasks is None else effective_tasks)
    holds_default = finite is None or bool((finite == default).all(1).any())
    weight = num_effective / (num_effective + _DEFAULT_TASKS) if holds_default else 1.0
    evidence = Evidence(num_tasks, num_records, num_effective, weight)

    def shrunk(weights, networks, x):
        """The score of `predict`: −(w m(x) + (1 − w) √v (1 − k(x, default))), where m is the expected outcome."""
        score = weight * expected(weights, networks, x)
        if not holds_default:
            return score
        near = _surrogates.kernel_matrix(surrogate.kernel, x, jnp.asarray(default, x.dtype)[None])[:, 0]
        return score - (1 - weight) * jnp.exp(surrogate.kernel.log_amplitude / 2) * (1 - near)

    def after_failures(weights, networks, failed, shown, x):
        found = -_posterior.expected_after_failures(at(networks), weights, failed, x)
        return (1 - share) * found - share * read_mean(networks, shown, x) if share else found

    def log_cost_fn(trials, functions):
        """x -> [P] log costs, up to a constant that depends on the machine and on the task's size."""
        learned = cost_surrogate
        assert learned is not None
        weights = jnp.full(len(learned.curves), 1 / len(learned.curves))
        if trials is None:
            weights *= jnp.exp(learned.log_scales)
            return lambda x: _surrogates.expected_outcomes(learned, x) @ weights
        conditioned = _posterior.condition(learned, weights, trials)
        return lambda x: mean_of(_posterior.posterior_at(learned, conditioned, x, functions=functions))

    def score_fn(acquisition, key, weights, networks, given, costs, functions=None, cost_functions=None):
        """x -> [P] scores, larger is better. `functions` are the precomputed values at x, if x is always the same."""
        trials, pending, shown = given
        _, y, mask = trials
        best = jnp.where(mask > 0, y, jnp.inf).min()
        conditioned = _posterior.condition(at(networks), weights, trials)
        log_cost = log_cost_fn(costs, cost_functions) if acquisition == "ei_per_cost" else lambda x: jnp.zeros(len(x))

        def by_mixture(x):
            if acquisition in ("ei", "ei_per_cost") and pending is not None:
                gain = _acquisition.batch_expected_improvement(
                    surrogate, conditioned, pending, x, best, key, functions=functions
                )
                return gain * jnp.exp(-log_cost(x))
            mixture = _posterior.posterior_at(surrogate, conditioned, x, functions=functions)
            if acquisition == "ucb":
                return _acquisition.lower_confidence_bound(mixture)
            if acquisition == "thompson":
                return _acquisition.thompson_sample(key, mixture, independent=finite is not None)
            return _acquisition.expected_improvement(mixture, best) * jnp.exp(-log_cost(x))

        if not share:
            return by_mixture
        read = _transformer.read_trials(networks[1], shown, typical_scale)
        coin_key, level_key = jax.random.split(jax.random.fold_in(key, 2))

        def by_transformers(x):
            binned = _transformer.predict_binned(networks[1], read, x)
            if acquisition == "ucb":
                mean, std = _transformer.binned_moments(binned, jnp.where(mask > 0, y, -jnp.inf).max())
                return std - mean
            if acquisition == "thompson":  # without candidates one level for all x, so that the score is smooth in x
                level = jax.random.uniform(level_key, (len(x),) if finite is not None else (), x.dtype)
                return -_transformer.binned_quantile(binned, level)
            # The improvement is on the smallest outcome that the transformer reads. It reads running trials with their
            # expected outcomes, so that repeating them gains nothing.
            return _transformer.binned_improvement(binned, read.low[0]) * jnp.exp(-log_cost(x))

        def score(x):
            if acquisition == "thompson":
                return jnp.where(jax.random.uniform(coin_key) < share, by_transformers(x), by_mixture(x))
            return share * by_transformers(x) + ((1 - share) * by_mixture(x) if share < 1 else 0.0)

        return score

    @jax.jit
    def best_expected(key, weights, networks):
        return search(key, lambda x: shrunk(weights, networks, x))

    @jax.jit
    def best_after_failures(key, weights, networks, failed, shown):
        return search(key, lambda x: after_failures(weights, networks, failed, shown, x))

    @jax.jit
    def finite_after_failures(weights, networks, failed, shown):
        return after_failures(weights, networks, failed, shown, jnp.asarray(finite))

    def suggest_z(acquisition, key, *given):
        # split(key, n)[i] is fold_in(key, i), so that `search` uses the numbers below _NUM_RANDOM.
        return search(key, score_fn(acquisition, jax.random.fold_in(key, _NUM_RANDOM), *given))

    def acquire_finite(acquisition, key, *given):
        return score_fn(acquisition, key, *given)(jnp.asarray(finite))  # the last two are `functions` at `finite`

    @jax.jit
    def believe(weights, networks, trials, x):
        return mean_of(_posterior.posterior(at(networks), weights, trials, x))

    @jax.jit
    def believe_failed(weights, networks, trials, x, worst):
        return _acquisition.censored_mean(_posterior.posterior(at(networks), weights, trials, x), worst)

    def with_failed(task, x, y, failed):
        """A failed trial is treated as censored: its outcome is at least as bad as the worst observed one.

        We impute the expected value above that bound.
        """
        (at_failed, *_), worst = padded(x[failed], y[failed]), y[~failed].max()
        found = believe_failed(*task, padded(x[~failed], y[~failed]), at_failed, worst)
        y = y.copy()
        y[failed] = np.asarray(found)[: failed.sum()]
        return y

    suggest_z = jax.jit(suggest_z, static_argnums=0)
    acquire_finite = jax.jit(acquire_finite, static_argnums=0)
    functions_at = jax.jit(_posterior.functions_at)
    at_finite = lambda of: None if finite is None or of is None else functions_at(of, jnp.asarray(finite))
    of_finite = at_finite(surrogate), at_finite(cost_surrogate)
    expected_finite, shrunk_finite = jax.jit(expected), jax.jit(shrunk)
    possible = jax.jit(outcomes_of)
    to_configuration = lambda z: spaces.configuration(space, spaces.to_constrained(space, unravel(z)))

    def seen_from(new_task, stacklevel=4):
        """Returns the task-specific inputs: the weights of earlier tasks, and the networks with the task's features.

        Warnings point at the line that calls the public function; `_in_precision` adds a frame in between.
        """
        features = features_of(new_task)
        num_features = len(surrogate.sorted_features)
        if features is not None and num_features and np.shape(features) != (num_features,):
            raise ValueError(
                f"A new task must have features of shape [{num_features}]; got shape {np.shape(features)}."
            )
        if features is not None and not num_features:
            warnings.warn(
                "The new task's features are ignored, because training had no features. Pass the features of the "
                "earlier tasks to `train_meta_optimizer(features=)`, or pass None for the new task.",
                stacklevel=stacklevel,
            )
        if features is None and num_features and isinstance(new_task, base.Task):
            warnings.warn(
                f"The new task has no `features`, but training used [{num_features}] of each task; they count as "
                "unknown here. Pass them with `tasks.to_task(..., features=)`, or pass None if nothing is known.",
                stacklevel=stacklevel,
            )
        rows = new_task.train if isinstance(new_task, base.Task) else None
        if rows is not None and surrogate.embedding is not None:
            check_rows("The new task's `train`", rows)
            rows = {name: np.asarray(rows[name]) for name in ROWS}  # JAX arrays would keep the caller's precision
        of = features, rows
        seen = _surrogates.at_task(surrogate, *of)
        return _surrogates.task_weights(surrogate, *of), (seen.deep, seen.transformers)

    def best_for(task) -> dict[str, Any]:
        if finite is not None:
            return dict(pool[int(jnp.argmax(shrunk_finite(*task, jnp.asarray(finite))))])
        return to_configuration(best_expected(jax.random.key(0), *task))

    def complementary(num: int, task) -> list[dict[str, Any]]:
        chosen = [best_for(task)]
        if pool:
            among = pool
        else:
            zs = sample(jax.random.split(jax.random.key(1), _NUM_RANDOM))
            among = list({tuple(sorted(c.items())): c for c in [chosen[0], *map(to_configuration, zs)]}.values())
        curves, weights = map(np.asarray, possible(*task, jnp.asarray(np.stack([encode(c) for c in among]))))
        taken = {among.index(chosen[0])}
        best = curves[among.index(chosen[0])]
        while len(chosen) < min(num, len(among)):
            left = np.minimum(curves, best[None]) @ weights + 1e-4 * (curves @ weights)
            left[list(taken)] = np.inf
            taken.add(int(left.argmin()))
            chosen.append(dict(among[int(left.argmin())]))
            best = np.minimum(best, curves[left.argmin()])
        return chosen

    def predict(new_task: Any = None) -> dict[str, Any]:
        return best_for(seen_from(new_task))

    def portfolio(num: int, new_task: Any = None) -> list[dict[str, Any]]:
        _checks.check_integer("num", num, 1)
        return complementary(num, seen_from(new_task))

    def chooser(new_task: Any, acquisition: str):
        """Returns `(key, told, pending, num_asked) -> configuration`, which chooses the next configuration.

        `told` has the ended trials. `pending` has the encoded configurations [D] of running trials by number.
        """
        if acquisition not in ACQUISITIONS:
            raise ValueError(f"`acquisition` must be one of {', '.join(map(repr, ACQUISITIONS))}; got {acquisition!r}.")
        if acquisition == "ei_per_cost" and cost_surrogate is None:
            raise ValueError("'ei_per_cost' needs `train_meta_optimizer(..., costs=True)`, and records with costs.")
        task = seen_from(new_task, stacklevel=5)
        plan: list[dict[str, Any]] = []  # configurations to try before the first outcome

        def planned(key, told, pending):
            """Returns the next configuration before the first outcome.

            It is the next one of the portfolio. If trials have failed, it is the one with the best expected outcome,
            where configurations similar to failed or running trials are expected to be bad.
            """
            known = names_of(told, pending)
            if num := len(told.y):
                ended = np.stack([told.x(i) for i in range(max(num - MAX_TRIALS, 0), num)])
                failed = np.concatenate([ended, *([x] for x in pending.values())])[-MAX_TRIALS:]
                at_failed, _, mask = padded(failed, np.zeros(len(failed)))
                given = (at_failed, mask), shown(ended, np.full(len(ended), np.nan))
                if finite is None:
                    return to_configuration(best_after_failures(key, *task, *given))
                score = np.array(finite_after_failures(*task, *given))
                score[~untried(known)] = -np.inf
                if np.isfinite(score).any():
                    return dict(pool[int(score.argmax())])
            if len(plan) <= len(known):
                plan[:] = complementary(len(known) + 8, task)
            return next((c for c in plan if encode(c).tobytes() not in known), plan[-1])

        def names_of(told, pending):
            """The distinct configurations of ended and running trials."""
            return told.names() | {x.tobytes() for x in pending.values()}

        def untried(known):
            return np.array([name not in known for name in finite_keys])

        def shown(x, y):
            return shown_to_transformers(x, y, surrogate.max_shown) if share else None

        def choose(key, told, pending, num_asked):
            y, seen = told.y, np.isfinite(told.y)
            if not seen.any():
                return planned(key, told, pending)
            # Sometimes try a configuration that the surrogate may underrate.
            if finite is None and num_asked % _RANDOM_EVERY == _RANDOM_EVERY - 1:
                return to_configuration(sample(key[None])[0])
            known = set() if finite is None else names_of(told, pending)
            left = untried(known)
            if finite is not None and left.any() and num_asked % _FARTHEST_EVERY == _FARTHEST_EVERY - 1:
                before = np.frombuffer(b"".join(known), finite.dtype).reshape(len(known), -1)
                return dict(pool[np.flatnonzero(left)[farthest(finite[left], before)]])
            if (ended := seen & ~told.given_up).any():
                y = np.where(told.given_up, np.maximum(y, y[ended].min()), y)
            y = from_the_best(y, widest)[0]
            keep = best_and_latest(y, MAX_TRIALS)
            x, y = np.stack([told.x(i) for i in keep]), y[keep]
            given_y = y
            if (failed := np.isnan(y)).any():
                y = with_failed(task, x, np.where(failed, np.nanmax(y), y), failed)
            trials, running, costs, read = padded(x, y), None, None, shown(x, given_y)
            if pending:
                waiting = np.stack(list(pending.values()))
                at_waiting, _, mask = padded(waiting, np.zeros(len(waiting)))
                running = at_waiting, mask
                if share or acquisition in ("ucb", "thompson"):  # assume that running trials give the expected outcome
                    believed = np.asarray(believe(*task, trials, at_waiting))[: len(waiting)]
                    read = shown(np.concatenate([x, waiting]), np.concatenate([given_y, believed]))
                if acquisition in ("ucb", "thompson"):
                    trials = padded(np.concatenate([x, waiting]), np.concatenate([y, believed]))
                    running = None
            if acquisition == "ei_per_cost":
                of_cost = keep[np.isfinite(told.log_cost[keep])][-_MAX_COSTS:]
                if len(of_cost):
                    costs = padded(np.stack([told.x(i) for i in of_cost]), told.log_cost[of_cost])
            if finite is None:
                return to_configuration(suggest_z(acquisition, key, *task, (trials, running, read), costs))
            score = np.array(acquire_finite(acquisition, key, *task, (trials, running, read), costs, *of_finite))
            score[~left] = -np.inf
            if not np.isfinite(score).any():
                score = np.asarray(expected_finite(*task, jnp.asarray(finite)))  # all candidates were tried
            return dict(pool[int(score.argmax())])

        return choose

    def searcher(new_task: Any = None, *, acquisition: str = "ei", first: Sequence[Mapping[str, Any]] | None = None):
        choose, own_space = chooser(new_task, acquisition), space
        if first is None:
            first = (
                [{}] if finite is None else [c for i, c in enumerate(pool) if np.array_equal(finite[i], default)][:1]
            )
        given = tuple(spaces.complete(space, c) for c in as_configurations("first", first, space))

        def init(key, space):
            if space is not None and space != own_space:
                raise ValueError(
                    "The searcher was trained for another space (other leaves, bounds or labels); give `init` that "
                    "one, which is the `space` of the `MetaOptimizer`, or None."
                )
            return MetaSearcherState(key, 0, {}, {}, given, {})

        def chosen(key, state):
            tried = list(state.tried.values())
            told = Told(
                at_full_budget(tried),
                np.array([trial.given_up for trial in tried], bool),
                np.array([trial.log_cost for trial in tried]),
                lambda i: tried[i].x,
                lambda: {name[2] for name in state.tried},
            )
            return choose(key, told, state.pending, state.num_asked)

        def ask(state, num):
            asked = []
            for _ in range(num):
                trial = state.num_asked
                seed_key, trial_key = jax.random.split(jax.random.fold_in(state.key, trial))
                configuration = state.first[0] if state.first else chosen(trial_key, state)
                seed = int(jax.random.randint(seed_key, (), 0, 2**31 - 1))
                asked.append(base.Record("", configuration, seed=seed, status="WAITING", trial=trial))
                pending = {**state.pending, trial: encode(configuration)}
                state = state._replace(num_asked=trial + 1, pending=pending, first=state.first[1:])
            return asked, state

        def tell(state, records):
            pending, tried, repeats = dict(state.pending), dict(state.tried), dict(state.repeats)
            for record in records:
                if record.status == "WAITING":
                    continue
                x = encode(record.configuration)
                if record.status == "RUNNING":  # elsewhere
                    pending[record.trial] = x
                    continue
                if record.trial in pending and np.array_equal(pending[record.trial], x):  # not another search's trial
                    del pending[record.trial]
                outcome = float(record.outcome) if record.status in ("COMPLETE", "PRUNED") else np.nan
                level, numbered = rounded_fidelity(record.fidelity), record.trial != 0 or record.seed != 0
                repeat = 0 if numbered else _repeat_of(repeats, (x.tobytes(), level), outcome)
                name = record.trial, record.seed, x.tobytes(), repeat
                before = tried.get(name, tried_configuration(x, {}))
                # The outcome of a pruned trial counts. The cost of a pruned or failed trial does not, since the trial
                # did not finish. With several fidelities only the first one gives the cost: later ones may have resumed
                # from a checkpoint.
                says = record.status == "COMPLETE" and 0 < record.cost < np.inf
                known = before.log_costs.get(level, np.nan) if record.status == "COMPLETE" else np.nan
                cost = float(np.log(record.cost / record.fidelity)) if says else known
                last = level >= max(before.outcomes, default=0.0)
                given_up = record.status == "PRUNED" if last else before.given_up
                outcomes, log_costs = {**before.outcomes, level: outcome}, {**before.log_costs, level: cost}
                tried[name] = tried_configuration(x, outcomes, log_costs, given_up)
            first = _random_search.untried(state.first, records, state.num_asked)
            return state._replace(pending=pending, tried=tried, first=first, repeats=repeats)

        return base.Searcher(init, in_precision(ask), in_precision(tell))

    def suggest(
        configurations: Sequence[Mapping[str, Any]],
        outcomes: Sequence[float] | np.ndarray,
        new_task: Any = None,
        *,
        num: int = 1,
        acquisition: str = "ei",
        pending: Sequence[Mapping[str, Any]] = (),
        key: jax.Array | None = None,
    ) -> list[dict[str, Any]]:
        _checks.check_integer("num", num, 1)
        configurations = as_configurations("configurations", configurations, space)
        pending = as_configurations("pending", pending, space)
        y = as_outcomes(outcomes, len(configurations))
        told = Told(
            y,
            np.zeros(len(y), bool),
            np.full(len(y), np.nan),
            # Encode on demand: only some trials are used, and all are needed only to find the untried candidates.
            lambda i: encode(configurations[i], True),
            lambda: {encode(configuration, True).tobytes() for configuration in configurations},
        )
        choose, found = chooser(new_task, acquisition), []
        running = {len(y) + i: encode(configuration, True) for i, configuration in enumerate(pending)}
        for trial in range(len(y) + len(running), len(y) + len(running) + num):
            of_trial = jax.random.fold_in(jax.random.key(0) if key is None else key, trial)
            found.append(choose(jax.random.split(of_trial)[1], told, running, trial))
            running[trial] = encode(found[-1])
        return found

    outcomes_at = outcomes_fn(surrogate, space, encode, seen_from, with_failed, widest)
    return MetaOptimizer(
        predict=in_precision(predict),
        portfolio=in_precision(portfolio),
        suggest=in_precision(suggest),
        searcher=in_precision(searcher),
        outcomes=in_precision(outcomes_at),
        surrogate=surrogate,
        cost_surrogate=cost_surrogate,
        space=space,
        candidates=pool or None,
        evidence=evidence,
    )
