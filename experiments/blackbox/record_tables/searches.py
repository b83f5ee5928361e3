"""Searches in a table: fixed orders, a Gaussian process without other tasks, and metaopt."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist

from experiments.blackbox.record_tables.tables import Records, make_space
from metaopt import base, blackbox, spaces
from metaopt.blackbox import _acquisition, _posterior, _surrogates, _transformer

NUM_TRIALS = 20
AT = (1, 5, 20)
FARTHEST_EVERY = 8  # the same as in the searcher
NUM_DEEP = 2  # deep kernels
DEEP = {"metaopt with deep kernels": 0.5, "deep kernels alone (FSBO)": 1.0}  # their share of the mixture
NUM_TRANSFORMERS = 4
TRANSFORMERS = {"metaopt with transformers": 0.5, "transformers alone": 1.0}  # their share of the expected outcome
NOT_ADAPTED = "deep kernels alone, not adapted"
LEARNED = ("metaopt", *DEEP, *TRANSFORMERS)
PLAIN = "GP, no other task"
PLAIN_LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # for the Gaussian process without other tasks, in units of the encoding
ABLATED = ("metaopt, no features", NOT_ADAPTED)  # with --ablate


def curve(regret: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the best regret so far of one task, for configurations in this order.

    Failed configurations are skipped.
    """
    tried = regret[order]
    tried = tried[np.isfinite(tried)][:NUM_TRIALS]
    return np.minimum.accumulate(np.pad(tried, (0, NUM_TRIALS - len(tried)), mode="edge"))


def greedy(regret: np.ndarray) -> np.ndarray:
    """Returns configurations that complement one another on these tasks. A failed one counts as the worst."""
    regret, best, order = np.where(np.isnan(regret), 1, regret), np.ones(len(regret)), []
    for _ in range(min(8 * NUM_TRIALS, regret.shape[1])):
        value = np.minimum(best[:, None], regret).mean(0) + 1e-6 * regret.mean(0)
        value[order] = np.inf
        order.append(int(value.argmin()))
        best = np.minimum(best, regret[:, order[-1]])
    return np.array(order)


@partial(jax.jit, static_argnames="adaptation_steps")
def search(surrogate, x, functions, weights, error, start, distances, adaptation_steps=10):
    """Runs the searcher of `blackbox` on one task, with all steps in one program. Returns [NUM_TRIALS] configurations.

    `distances` [C, C] define the farthest configuration.
    """
    open_, share = jnp.isfinite(error), surrogate.transformer_share
    error = jnp.where(open_, error, 0.0)
    typical_scale = jnp.exp(jnp.median(surrogate.log_scales))

    def step(carry, i):
        seen, mask, tried = carry
        y = error[seen]
        conditioned = _posterior.condition(surrogate, weights, (x[seen], y, mask), adaptation_steps=adaptation_steps)
        mixture = _posterior.posterior_at(surrogate, conditioned, x, functions=functions)
        best = jnp.where(mask > 0, y, jnp.inf).min()
        score = _acquisition.expected_improvement(mixture, best)
        if surrogate.transformers is not None:
            # As in the searcher: outcomes far above the upper quartile of the trials are cut off.
            upper = jnp.sort(jnp.where(mask > 0, y, jnp.inf))[(3 * (i - 1)) // 4] - best
            shown = jnp.where((i >= 4) & (upper > 0), jnp.minimum(y, best + 4 * upper), y)
            read = _transformer.read_trials(surrogate.transformers, (x[seen], shown, mask), typical_scale)
            binned = _transformer.predict_binned(surrogate.transformers, read, x)
            score = share * _transformer.binned_improvement(binned, best) + (1 - share) * score
        nearest = jnp.where(mask[:, None] > 0, distances[seen], jnp.inf).min(0)
        score = jnp.where(i % FARTHEST_EVERY == FARTHEST_EVERY - 1, nearest, score)
        new = jnp.argmax(jnp.where(open_ & ~tried, score, -jnp.inf))
        return (seen.at[i].set(new), mask.at[i].set(1.0), tried.at[new].set(True)), None

    seen, mask = jnp.full(NUM_TRIALS, start), jnp.zeros(NUM_TRIALS).at[0].set(1.0)
    tried = jnp.zeros(len(error), bool).at[start].set(True)
    (seen, _, _), _ = jax.lax.scan(step, (seen, mask, tried), jnp.arange(1, NUM_TRIALS))
    return seen


@jax.jit
def plain_search(grams, error, starts):
    """Returns [runs, NUM_TRIALS] trials of one Gaussian process, by expected improvement.

    Before each trial, its kernel (one of K, see `grams`), mean and amplitude are set by maximum likelihood.
    """
    open_ = jnp.isfinite(error)
    error = jnp.where(open_, error, 0.0)

    def one(start):
        def step(carry, i):
            seen, mask, tried = carry
            y = error[seen]
            both = mask[:, None] * mask[None]

            def fitted(gram):
                among = gram[seen][:, seen] * both + jnp.diag(jnp.where(mask > 0, 1e-3, 1.0))
                inverse = jnp.linalg.inv(among)
                total = mask @ inverse @ mask
                mean = (mask @ inverse @ y) / total
                rest = (y - mean) * mask
                square = (rest @ inverse @ rest) / jnp.maximum(i - 1, 1) + 1e-8
                nll = (i - 1) * jnp.log(square) + jnp.linalg.slogdet(among)[1] + jnp.log(total)
                return nll, inverse, mean, rest, jnp.sqrt(square)

            nll, *posteriors = jax.vmap(fitted)(grams)
            best = jnp.argmin(nll)
            inverse, mean, rest, scale = (leaf[best] for leaf in posteriors)
            cross = grams[best][:, seen] * mask[None]
            variance = 1 + 1e-3 - ((cross @ inverse) * cross).sum(1)
            mu, std = mean + cross @ inverse @ rest, scale * jnp.sqrt(jnp.maximum(variance, 1e-9))
            mixture = _posterior.Mixture(jnp.zeros(1), mu[:, None], std[:, None])
            score = _acquisition.expected_improvement(mixture, jnp.where(mask > 0, y, jnp.inf).min())
            new = jnp.argmax(jnp.where(open_ & ~tried, score, -jnp.inf))
            return (seen.at[i].set(new), mask.at[i].set(1.0), tried.at[new].set(True)), None

        seen, mask = jnp.full(NUM_TRIALS, start), jnp.zeros(NUM_TRIALS).at[0].set(1.0)
        tried = jnp.zeros(len(error), bool).at[start].set(True)
        return jax.lax.scan(step, (seen, mask, tried), jnp.arange(1, NUM_TRIALS))[0][0]

    return jax.vmap(one)(starts)


def encode(space: dict, plain: list[dict]) -> jax.Array:
    """Returns the encoding [C, D] that g uses.

    Missing values are at their defaults, and a missing label is one of the other labels.
    """
    whole = [spaces.from_configuration(space, spaces.complete(space, c)) for c in plain]
    return jnp.stack([spaces.encode(space, hyperparams) for hyperparams in whole])


def without_others(data: Records, test: np.ndarray, num_starts: int) -> dict:
    """Returns [test tasks, NUM_TRIALS] curves of the Gaussian process without other tasks."""
    encoded = encode(*make_space(data.configurations))
    of_length = lambda log: _surrogates.Kernel(jnp.full(encoded.shape[1], log), jnp.array(4.0), jnp.array(0.0))
    grams = jnp.stack([_surrogates.kernel_matrix(of_length(log), encoded, encoded) for log in np.log(PLAIN_LENGTHS)])
    rng, curves = np.random.default_rng(0), []
    for t in test:
        regret = data.regret[t]
        starts = jnp.asarray(rng.choice(np.flatnonzero(np.isfinite(regret)), num_starts))
        tried = np.asarray(plain_search(grams, jnp.asarray(data.error[t], jnp.float32), starts))
        curves.append(np.mean([curve(regret, run) for run in tried], 0))
    return {PLAIN: np.stack(curves)}


@jax.jit
def expected(g, encoded, weights):
    """Returns [C] the expected outcomes without a trial."""
    outcomes = _surrogates.expected_outcomes(g, encoded) @ weights
    if g.transformers is None:
        return outcomes
    read = _transformer.read_trials(g.transformers, (encoded[:0], encoded[:0, 0], encoded[:0, 0]))
    mean, _ = _transformer.binned_moments(_transformer.predict_binned(g.transformers, read, encoded), 1.0)
    return g.transformer_share * mean + (1 - g.transformer_share) * outcomes


def learned(
    data: Records, train: np.ndarray, test: np.ndarray, seed: int, options, with_transformers: bool
) -> dict[str, Any]:
    """Returns name -> [test tasks, NUM_TRIALS] curves of `metaopt`.

    The time is measured only for the first key. For other keys, the programs are already compiled, and all parts are
    trained together, which gives the same result.
    """
    timed = seed == 0
    space, plain = make_space(data.configurations)
    names = [str(t) for t in range(len(data.error))]
    records = [
        base.Record(names[t], plain[c], float(e), status="COMPLETE" if np.isfinite(e) else "FAIL")
        for t in train
        for c, e in enumerate(data.error[t])
    ]
    features, families = dict(zip(names, data.features, strict=True)), dict(zip(names, data.family, strict=True))
    num_steps = 5 if options.smoke else 150
    train_g = partial(
        blackbox.train_meta_searcher,
        records,
        space=space,
        candidates=plain,
        features=features,
        families=families,
        key=jax.random.key(seed),
        num_steps=num_steps,
    )
    seconds, learners = [np.nan] * 3, {}
    every = {"deep_kernels": NUM_DEEP} | ({"transformers": NUM_TRANSFORMERS} if with_transformers else {})
    if timed:
        networks = {}
        for i, (name, num) in enumerate([("", 0), *every.items()]):  # each is trained as if it were the only one
            jax.clear_caches()
            begin = time.process_time()
            g = train_g(**({name: num} if name else {}))
            seconds[i] = time.process_time() - begin
            networks[name] = g.surrogate
            if name != "deep_kernels":
                learners[name] = g
        surrogate, deep, h = networks[""], networks["deep_kernels"].deep, networks.get("transformers")
    else:
        h = train_g(**every).surrogate
        deep, h = h.deep, h._replace(deep=None, deep_share=0.0)
        surrogate = h._replace(transformers=None, transformer_share=0.0)
    variants = {"metaopt": surrogate}
    variants |= {name: surrogate._replace(deep=deep, deep_share=share) for name, share in DEEP.items()}
    if with_transformers:
        variants |= {name: h._replace(transformer_share=share) for name, share in TRANSFORMERS.items()}
    if options.ablate:
        variants |= {ABLATED[0]: surrogate, NOT_ADAPTED: variants["deep kernels alone (FSBO)"]}
    encoded = encode(space, plain)
    functions = _posterior.functions_at(surrogate, encoded)
    distances = jnp.asarray(cdist(encoded, encoded), jnp.float32)
    curves = {name: [] for name in variants}

    def trials(name, t, error, open_):
        own_features = None if name == ABLATED[0] else data.features[t]
        weights, g_at_task = (
            _surrogates.task_weights(variants[name], own_features),
            _surrogates.at_task(variants[name], own_features),
        )
        start = open_[np.asarray(expected(g_at_task, encoded, weights))[open_].argmin()]
        return search(g_at_task, encoded, functions, weights, error, start, distances, 0 if name == NOT_ADAPTED else 10)

    asks = []
    # The last task is repeated with the user's interface. A task without failures is preferred, so that all trials are
    # compared.
    whole = [t for t in test if np.isfinite(data.error[t]).all()]
    t = (whole or list(test))[-1]
    error, open_ = jnp.asarray(data.error[t], jnp.float32), np.flatnonzero(np.isfinite(data.error[t]))
    for name, learner in zip(("metaopt", *TRANSFORMERS), learners.values(), strict=False):
        tried = np.asarray(trials(name, t, error, open_)).tolist()
        again, milliseconds = one_by_one(learner, data, t, plain)
        asks.append(milliseconds)
        check_same_trials(f"{data.name}, {name}", again, tried)
    for t in test:
        error, regret = jnp.asarray(data.error[t], jnp.float32), data.regret[t]
        open_ = np.flatnonzero(np.isfinite(regret))
        for name in variants:
            curves[name].append(curve(regret, np.asarray(trials(name, t, error, open_))))
    curves = {name: np.stack(by_task) for name, by_task in curves.items()}
    return curves | {"seconds": (*seconds, *asks, np.nan, np.nan)[:5]}


def check_same_trials(name: str, again: list[int], tried: list[int]) -> None:
    """Raises an error if the first trials of the searcher differ from those of `search`, which replaces it."""
    if again != tried[: len(again)]:
        raise RuntimeError(
            f"{name}: the searcher of `blackbox` tries {again}, and `search`, whose curves would be reported as "
            f"metaopt's, {tried[: len(again)]}. They must be one and the same; mend `search`."
        )


def one_by_one(g: blackbox.MetaOptimizer, data: Records, t: int, plain: list[dict]) -> tuple[list[int], float]:
    """Runs the first trials of the searcher, one by one. Also returns the median milliseconds of an `ask`."""
    searcher = g.searcher(data.features[t], first=())
    state, tried, times = searcher.init(jax.random.key(0), g.space), [], []
    for _ in range(8):
        begin = time.process_time()
        (trial,), state = searcher.ask(state, 1)
        times.append(1e3 * (time.process_time() - begin))
        tried.append(plain.index(trial.configuration))
        outcome = data.error[t, tried[-1]]
        if not np.isfinite(outcome):  # `search` does not try it
            return tried[:-1], float(np.median(times[2:]))
        state = searcher.tell(state, [trial._replace(status="COMPLETE", outcome=float(outcome))])
    return tried, float(np.median(times[2:]))
