"""g and h from records of earlier trials: `train_meta_optimizer`, `train_meta_searcher`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt import base, hypergrad, predictors, spaces, training

# Expected improvement, a confidence bound, Thompson sampling.
ACQUISITIONS = ("ei", "ucb", "thompson")
_RANDOM_EVERY = 4  # trials of a search without candidates
_MAX_TRIALS = 256  # of the new task that the surrogate looks at
_NUM_RESTARTS, _NUM_ASCENTS = 8, 20


class PredictFn(Protocol):
    def __call__(self, new_task: Any = None) -> dict[str, Any]:
        """The configuration to use on a new task without a trial."""
        ...


class PortfolioFn(Protocol):
    def __call__(self, num: int, new_task: Any = None) -> list[dict[str, Any]]:
        """So many configurations that complement one another: on most tasks one of them is good."""
        ...


class MakeSearcherFn(Protocol):
    def __call__(
        self,
        new_task: Any = None,
        *,
        acquisition: str = "ei",
        first: Sequence[Mapping[str, Any]] = (),
    ) -> base.Searcher:
        """A searcher that spends trials on a new task, beginning with what `predict` says."""
        ...


class MetaOptimizer(NamedTuple):
    """What `train_meta_optimizer` and `train_meta_searcher` return. A new task is given as a `base.Task` with its
    `features`, as the features themselves [F], or as None where nothing is known of it.

    Attributes:
      predict: `(new_task) -> configuration`, as plain values by name.
      portfolio: `(num, new_task) -> configurations`.
      searcher: `(new_task, *, acquisition, first) -> Searcher`: fine-tuning with trials.
      surrogate: what was learned (`predictors.Surrogate`).
      space: of λ.
    """

    predict: PredictFn
    portfolio: PortfolioFn
    searcher: MakeSearcherFn
    surrogate: predictors.Surrogate
    space: base.PyTree


class MetaSearcherState(NamedTuple):
    """Carried from one call to the next.

    Attributes:
      key: of the search; a trial's own is folded from it and the trial's number.
      num_asked: how many trials have been asked for.
      pending: (trial, encoded configuration [D]) of what has not been told.
      x: encoded configurations [D] that were told.
      y: their outcomes; NaN where the trial failed.
    """

    key: jax.Array
    num_asked: int
    pending: tuple[tuple[int, np.ndarray], ...]
    x: tuple[np.ndarray, ...]
    y: tuple[float, ...]


def train_meta_optimizer(
    records: Sequence[base.Record],
    *,
    space: base.PyTree,
    features: Mapping[str, Any] | None = None,
    families: Mapping[str, Any] | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    num_members: int = 8,
    num_steps: int = 150,
    max_reference: int = 512,
    key: jax.Array | None = None,
) -> MetaOptimizer:
    """Learns from the records of earlier tasks to predict λ for a new one, and to spend trials on it.

    Three things are learned, each by `training.fit` over `hypergrad.direct` or in closed form: a kernel between
    configurations, by the marginal likelihood of the tasks' outcomes; what every earlier task says about every
    configuration, with mean and covariance over tasks (`predictors.surrogate`); and how a task's features weigh
    earlier tasks, by the regret of what would have been chosen for each task had its family been unknown
    (`predictors.attention_loss`), as an ensemble of bootstrapped members.

    `predict` minimizes the weighted mean outcome by gradient descent over the relaxed space from several starts, or
    over the candidates. The searcher's first trial is that; afterwards it maximizes an acquisition function under
    `predictors.posterior`, in the same way. Records of unrelated tasks lose their weight after a few trials.

    Args:
      records: trials of earlier tasks: complete ones at full fidelity, and failed ones, which count as bad. Names
        and labels that the space does not have are ignored, and what a record lacks is at its default: tasks whose
        spaces differ still teach.
      space: of λ, for new tasks.
      features: task name -> [F] numbers, NaN where unknown; tasks without an entry are unknown altogether.
      families: task name -> family; tasks of one family (near-duplicates) are left out together while features are
        learned. By default, every task is its own.
      candidates: configurations to choose from; None searches the space.
      num_members: of the ensemble that reads features.
      num_steps: outer steps that learn the kernel, and the ensemble.
      max_reference: configurations at which functions are kept; where more were tried, a random choice of them.
      key: what everything random follows from; `jax.random.key(0)` by default.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: no record has an outcome, a candidate does not fit the space, features have different lengths.
    """
    base.check_integer("num_members", num_members, 1)
    base.check_integer("num_steps", num_steps, 0)
    base.check_integer("max_reference", max_reference, 2)
    key = jax.random.key(0) if key is None else key
    kernel_key, attention_key, reference_key = jax.random.split(key, 3)
    encode = _encoder(space)
    names, trials = _by_task(records, encode)
    kernel = _fit_kernel(kernel_key, trials, num_steps)
    if candidates is None:
        # What a configuration has for itself can be found out in a finite set alone: in a continuum every new point
        # would promise it, next to the best one too.
        kernel = kernel._replace(logit_smooth=jnp.maximum(kernel.logit_smooth, 5.0))
    tried = np.unique(np.concatenate([task.x for task in trials]).round(6), axis=0)
    if len(tried) > max_reference:
        tried = tried[np.asarray(jax.random.permutation(reference_key, len(tried)))[:max_reference]]
    known = _features(names, features)
    surrogate = predictors.surrogate(trials, kernel, tried, features=known)
    if known is not None:
        family = [name if families is None else families.get(name, name) for name in names]
        attention = _fit_attention(attention_key, surrogate, family, num_members, num_steps)
        surrogate = surrogate._replace(attention=attention)
    finite = None if candidates is None else np.stack([encode(candidate, True) for candidate in candidates])
    return _meta_optimizer(surrogate, space, candidates, finite)


def train_meta_searcher(
    records: Sequence[base.Record],
    *,
    space: base.PyTree,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    **kwargs,
) -> MetaOptimizer:
    """`train_meta_optimizer` over a finite set: architectures of a benchmark, pipelines, configurations already tried.

    Args:
      records: as for `train_meta_optimizer`.
      space: of architectures; `spaces.encode` of it is what the kernel compares.
      candidates: the architectures to choose from; by default, all that are in the records.
      **kwargs: of `train_meta_optimizer`.

    Returns:
      A `MetaOptimizer` whose `predict`, `portfolio` and `searcher` stay among the candidates.

    Raises:
      ValueError: as for `train_meta_optimizer`.
    """
    if candidates is None:
        plain = lambda record: spaces.configuration(
            space, spaces.from_configuration(space, record.configuration, strict=False)
        )
        candidates = list({tuple(sorted(c.items(), key=lambda i: i[0])): c for c in map(plain, records)}.values())
    return train_meta_optimizer(records, space=space, candidates=candidates, **kwargs)


def _encoder(space: base.PyTree):
    """`(configuration, strict) -> [D]`, each configuration computed once."""
    encode, known = jax.jit(lambda hyperparams: spaces.encode(space, hyperparams)), {}

    def encoded(configuration, strict=False):
        name = tuple(sorted(configuration.items(), key=lambda item: item[0]))
        if name not in known:
            known[name] = np.asarray(encode(spaces.from_configuration(space, configuration, strict=strict)))
        return known[name]

    return encoded


def _by_task(records, encode):
    """Names of the tasks with an outcome, and their trials."""
    of: dict[str, list[tuple[np.ndarray, float]]] = {}
    for record in records:
        failed = record.status == "FAIL"
        if failed or (record.status == "COMPLETE" and record.fidelity == 1.0):
            y = np.nan if failed or not np.isfinite(record.outcome) else record.outcome
            of.setdefault(record.task, []).append((encode(record.configuration), y))
    of = {name: pairs for name, pairs in of.items() if np.isfinite([y for _, y in pairs]).any()}
    if not of:
        raise ValueError('`records` must hold trials that are "COMPLETE" at fidelity 1; there is none.')
    trials = [predictors.TaskTrials(np.stack([x for x, _ in p]), np.array([y for _, y in p])) for p in of.values()]
    return list(of), trials


def _features(names, features) -> np.ndarray | None:
    if features is None or not any(name in features for name in names):
        return None
    rows = [np.asarray(features[name], float).ravel() if name in features else None for name in names]
    lengths = sorted({len(row) for row in rows if row is not None})
    if len(lengths) != 1:
        raise ValueError(f"All tasks must have as many `features`; got {lengths}.")
    return np.stack([np.full(lengths[0], np.nan) if row is None else row for row in rows])


def _fit_kernel(key, trials, num_steps: int, *, num_tasks: int = 16, num_trials: int = 64) -> predictors.Kernel:
    """By the marginal likelihood of some trials of some tasks at every step."""
    num_dims = trials[0].x.shape[1]
    start = predictors.Kernel(jnp.full(num_dims, -0.5), jnp.array(2.0), jnp.log(jnp.array(0.1)))
    usable = [task for task in trials if np.isfinite(task.y).sum() > 1]
    if not usable or num_dims == 0:
        return start
    size = min(num_trials, max(int(np.isfinite(task.y).sum()) for task in usable))

    def sample_tasks(key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        batch = []
        for s in rng.integers(len(usable), size=num_tasks):
            y, _ = predictors.normalize(usable[s].y)
            rows = rng.permutation(np.flatnonzero(np.isfinite(y)))[:size]
            pad = (0, size - len(rows))
            x = np.pad(usable[s].x[rows], (pad, (0, 0)))
            batch.append((x, np.pad(y[rows] - y[rows].mean(), pad), np.pad(np.ones(len(rows)), pad)))
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.result_type(float)), *batch)

    estimator = hypergrad.direct(lambda kernel, task, key: predictors.kernel_loss(kernel, task))
    learner = training.learner(hypergrad.over_tasks(estimator), optax.adam(0.05))
    fitted = training.fit(learner, sample_tasks, hyperparams=start, num_steps=num_steps, key=key, progress=False)
    return fitted.hyperparams


def _fit_attention(key, surrogate, family, num_members: int, num_steps: int):
    """An ensemble whose members see the families with weights of their own."""
    init_key, boot_key, fit_key = jax.random.split(key, 3)
    _, of = np.unique([str(name) for name in family], return_inverse=True)
    size = np.bincount(of)
    draws = jax.random.exponential(boot_key, (num_members, len(size)))[:, of] / np.sqrt(size)[of][None]
    data = {
        "features": surrogate.features,
        "curves": surrogate.curves,
        "same_family": jnp.asarray(of[:, None] == of[None]),
        "weights": draws / draws.sum(1, keepdims=True),
    }
    start = predictors.init_attention(init_key, num_members, surrogate.features.shape[1])
    if len(size) < 2:
        return predictors.init_attention(init_key, 0, surrogate.features.shape[1])
    estimator = hypergrad.direct(lambda attention, data, key: predictors.attention_loss(attention, data))
    learner = training.learner(estimator, optax.adam(0.05))
    fitted = training.fit(
        learner, lambda key: data, hyperparams=start, num_steps=num_steps, key=fit_key, progress=False
    )
    return fitted.hyperparams


def _meta_optimizer(surrogate, space, candidates, finite) -> MetaOptimizer:
    """The functions over what was learned; `finite` [P, D] are the encoded candidates, or None."""
    # A configuration's vector of unconstrained coordinates is what is ascended.
    template, unravel = ravel_pytree(spaces.to_unconstrained(space, spaces.default(space)))
    relaxed = lambda z: spaces.encode(space, spaces.to_constrained(space, unravel(z)))
    rounded = lambda z: spaces.encode(
        space,
        jax.tree.map(
            lambda x: jnp.asarray(x, z.dtype), spaces.discretize(space, spaces.to_constrained(space, unravel(z)))
        ),
    )
    sample = jax.vmap(lambda key: ravel_pytree(spaces.to_unconstrained(space, spaces.sample(key, space)))[0])
    num_random = 256

    def search(key, score):
        """The z of the best of random configurations and of ascents from the best of them, after rounding."""
        z = jnp.concatenate([template[None], sample(jax.random.split(key, num_random))])
        top = z[jax.lax.top_k(score(jax.vmap(rounded)(z)), _NUM_RESTARTS)[1]]
        optimizer = optax.adam(0.1)

        def ascend(carry, _):
            z, state = carry
            grads = jax.grad(lambda z: -score(jax.vmap(relaxed)(z)).sum())(z)
            # Acquisition functions are flat far from the best: the direction counts.
            grads = grads / jnp.maximum(jnp.linalg.norm(grads, axis=1, keepdims=True), 1e-12)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(z, updates), state), None

        (ascended, _), _ = jax.lax.scan(ascend, (top, optimizer.init(top)), length=_NUM_ASCENTS)
        both = jnp.concatenate([top, jnp.asarray(ascended)])
        return both[jnp.argmax(score(jax.vmap(rounded)(both)))]

    def expected(weights, x):
        return -(predictors.expected_outcomes(surrogate, x) @ weights)

    def acquire(acquisition, key, weights, trials, x):
        """[P] scores, larger is better."""
        mixture = predictors.posterior(surrogate, weights, trials, x)
        _, y, mask = trials
        if acquisition == "ei":
            return predictors.expected_improvement(mixture, jnp.where(mask > 0, y, jnp.inf).min())
        if acquisition == "ucb":
            return predictors.lower_confidence_bound(mixture)
        # One earlier task and scale is drawn, and an outcome for each configuration.
        at = jax.random.categorical(key, mixture.log_weights)
        noise = jax.random.normal(jax.random.fold_in(key, 1), (len(x),)) if finite is not None else jnp.zeros(len(x))
        return -(mixture.mean[:, at] + noise * mixture.std[:, at])

    @jax.jit
    def best_expected(key, weights):
        return search(key, lambda x: expected(weights, x))

    def suggest(acquisition, key, weights, trials):
        return search(key, lambda x: acquire(acquisition, key, weights, trials, x))

    @jax.jit
    def believe(weights, trials, x):
        mixture = predictors.posterior(surrogate, weights, trials, x)
        return mixture.mean @ jnp.exp(mixture.log_weights)

    suggest = jax.jit(suggest, static_argnums=0)
    acquire_finite = jax.jit(acquire, static_argnums=0)
    expected_finite = jax.jit(expected)
    outcomes = jax.jit(lambda x: predictors.expected_outcomes(surrogate, x))
    to_configuration = lambda z: spaces.configuration(space, spaces.to_constrained(space, unravel(z)))
    encode = _encoder(space)

    def weights_of(new_task):
        features = new_task.features if isinstance(new_task, base.Task) else new_task
        num_features = len(surrogate.sorted_features)
        if features is not None and num_features and np.shape(features) != (num_features,):
            raise ValueError(f"A new task has [{num_features}] features; got shape {np.shape(features)}.")
        return predictors.task_weights(surrogate, features)

    def predict(new_task: Any = None) -> dict[str, Any]:
        weights = weights_of(new_task)
        if finite is not None:
            return dict(candidates[int(jnp.argmax(expected_finite(weights, jnp.asarray(finite))))])
        return to_configuration(best_expected(jax.random.key(0), weights))

    def portfolio(num: int, new_task: Any = None) -> list[dict[str, Any]]:
        base.check_integer("num", num, 1)
        weights, chosen = np.asarray(weights_of(new_task)), [predict(new_task)]
        if finite is not None:
            pool = list(candidates)
        else:
            zs = sample(jax.random.split(jax.random.key(1), num_random))
            pool = list({tuple(sorted(c.items())): c for c in [chosen[0], *map(to_configuration, zs)]}.values())
        curves = np.asarray(outcomes(jnp.asarray(np.stack([encode(c) for c in pool]))))
        taken = {pool.index(chosen[0])}
        best = curves[pool.index(chosen[0])]
        while len(chosen) < min(num, len(pool)):
            left = np.minimum(curves, best[None]) @ weights + 1e-4 * (curves @ weights)
            left[list(taken)] = np.inf
            taken.add(int(left.argmin()))
            chosen.append(dict(pool[int(left.argmin())]))
            best = np.minimum(best, curves[left.argmin()])
        return chosen

    def searcher(new_task: Any = None, *, acquisition: str = "ei", first: Sequence[Mapping[str, Any]] = ()):
        if acquisition not in ACQUISITIONS:
            raise ValueError(f"`acquisition` must be one of {', '.join(map(repr, ACQUISITIONS))}; got {acquisition!r}.")
        weights, structure = weights_of(new_task), jax.tree.structure(space)
        given = [spaces.configuration(space, spaces.from_configuration(space, c)) for c in first]
        widest = 2 * float(np.exp(np.max(surrogate.log_scales)))
        plan: list[dict[str, Any]] = []  # what to try while there is no outcome

        def init(key, space):
            if space is not None and jax.tree.structure(space) != structure:
                raise ValueError("The searcher was trained for another space; give `init` that one, or None.")
            return MetaSearcherState(key, 0, (), (), ())

        def choose(key, state):
            """The next configuration, given all that was told and is pending."""
            seen = np.isfinite(state.y)
            if not seen.any():
                known = [tuple(x) for x in state.x] + [tuple(x) for _, x in state.pending]
                if len(plan) <= len(known):
                    plan[:] = portfolio(len(known) + 8, new_task)
                return next((c for c in plan if tuple(encode(c)) not in known), plan[-1])
            x, y = np.stack(state.x), np.where(seen, state.y, np.max(np.array(state.y)[seen]))
            y = np.minimum(y - y.min(), widest)  # an offset means nothing; what diverged does not set the scale
            if len(y) > _MAX_TRIALS:  # the best, and the latest
                half = _MAX_TRIALS // 2
                keep = np.union1d(np.argsort(y)[:half], np.arange(len(y) - half, len(y)))
                x, y = x[keep], y[keep]
            trials = _padded(x, y)
            if state.pending:  # they are believed to give what is expected
                waiting = np.stack([x for _, x in state.pending])
                padded = _padded(waiting, np.zeros(len(waiting)))[0]
                believed = np.asarray(believe(weights, trials, padded))[: len(waiting)]
                x, y = np.concatenate([x, waiting]), np.concatenate([y, believed])
                trials = _padded(x, y)
            if finite is None and state.num_asked % _RANDOM_EVERY == _RANDOM_EVERY - 1:
                return to_configuration(sample(key[None])[0])  # what the surrogate will not look at
            if finite is None:
                return to_configuration(suggest(acquisition, key, weights, trials))
            score = np.array(acquire_finite(acquisition, key, weights, trials, jnp.asarray(finite)))
            tried = {tuple(row) for row in x}
            score[[tuple(row) in tried for row in finite]] = -np.inf
            if not np.isfinite(score).any():
                score = np.asarray(expected_finite(weights, jnp.asarray(finite)))  # all were tried
            return dict(candidates[int(score.argmax())])

        def ask(state, num):
            asked = []
            for _ in range(num):
                trial = state.num_asked
                seed_key, trial_key = jax.random.split(jax.random.fold_in(state.key, trial))
                configuration = given[trial] if trial < len(given) else choose(trial_key, state)
                seed = int(jax.random.randint(seed_key, (), 0, 2**31 - 1))
                asked.append(base.Record("", configuration, seed=seed, status="WAITING", trial=trial))
                pending = (*state.pending, (trial, encode(configuration)))
                state = state._replace(num_asked=trial + 1, pending=pending)
            return asked, state

        def tell(state, records):
            for record in records:
                if record.status not in ("COMPLETE", "PRUNED", "FAIL"):
                    continue
                pending = tuple(p for p in state.pending if p[0] != record.trial)
                y = record.outcome if record.status == "COMPLETE" and record.fidelity == 1.0 else np.nan
                x = (*state.x, encode(record.configuration))
                state = state._replace(pending=pending, x=x, y=(*state.y, float(y)))
            return state

        return base.Searcher(init, ask, tell)

    return MetaOptimizer(predict, portfolio, searcher, surrogate, space)


def _padded(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Trials at a power of two: few programs are compiled."""
    size = max(8, 1 << (len(y) - 1).bit_length())
    pad = size - len(y)
    dtype = jnp.result_type(float)
    # Padding lies far away, so that it is nobody's neighbor.
    x = np.concatenate([x, 1e3 + np.arange(pad)[:, None] * np.ones(x.shape[1])[None]]) if pad else x
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(np.pad(y, (0, pad)), dtype),
        jnp.asarray(np.pad(np.ones(len(y)), (0, pad)), dtype),
    )
