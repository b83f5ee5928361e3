"""Training with fixed hyperparameters, with tuned ones, and searches: a grid, random search, TPE and PBT.

All of them train the same actor-critic and count steps of the environments. A curve is an array [updates, 2]: the sum
of the returns of all finished episodes, and their number, after each update. Coordinates z are unconstrained.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.rl.actor_critic import SPACE, START
from metaopt import base, blackbox, inner, spaces, training


class Trainer(NamedTuple):
    """Trains many runs with fixed hyperparameters.

    Attributes:
      start: `(keys [R], z [R]) -> states [R]`.
      advance: `(states [R], z [R], num_updates) -> (states [R], curves [R, num_updates, 2])`.
    """

    start: Callable
    advance: Callable

    def train(self, keys, z, num_updates: int) -> np.ndarray:
        return self.advance(self.start(keys, z), z, num_updates)[1]


def coordinates(values: Sequence[dict[str, float]]) -> Any:
    """Returns z with a leading axis, from hyperparameters; those that are missing are at `START`."""
    stacked = {name: jnp.array([{**START, **hp}[name] for hp in values], float) for name in SPACE}
    return jax.vmap(lambda hp: spaces.to_unconstrained(SPACE, hp))(stacked)


def outer_rates(values: Sequence[float], tuned: Sequence[str] = tuple(SPACE)) -> Any:
    """Returns rates with the structure of z and a leading axis: each value for the tuned names, and 0 for others."""
    values = jnp.asarray(values, float)
    return spaces.Unconstrained({name: values * (name in tuned) for name in SPACE})


def run_keys(seeds: Sequence[int], repeats: int = 1) -> jax.Array:
    """Returns one key per seed and repetition, [len(seeds) * repeats]."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return jax.vmap(lambda key: jax.random.split(key, repeats))(keys).reshape(-1)


def trainer(problem: base.Problem, physics: Any, max_updates: int, chunk: int) -> Trainer:
    """Returns a trainer of at most `max_updates` updates per call, `chunk` runs at a time: one program for all."""
    loop, physics = problem.loop, jax.tree.map(jnp.asarray, physics)

    def advance_one(state, z, num_updates):
        def update(i, carry):
            state, curve = carry
            state = inner.step(loop, state, z, physics)
            return state, curve.at[i].set(state.model_state.actors.finished)

        return jax.lax.fori_loop(0, num_updates, update, (state, jnp.zeros((max_updates, 2))))

    start = _in_chunks(jax.jit(jax.vmap(lambda key, z: loop.init(key, z, physics))), chunk)
    compiled = _in_chunks(jax.jit(jax.vmap(advance_one, (0, 0, None))), chunk)

    def advance(states, z, num_updates):
        states, curves = compiled(states, z, rest=(num_updates,))
        return states, np.asarray(curves[:, :num_updates], np.float64)

    return Trainer(start, advance)


def _in_chunks(function: Callable, chunk: int) -> Callable:
    """Calls `function` with `chunk` rows at a time; the last chunk repeats rows."""

    def call(*batched, rest=()):
        num = len(jax.tree.leaves(batched)[0])
        rows = np.arange(-(-num // chunk) * chunk) % num
        parts = [
            function(*jax.tree.map(lambda x, part=part: x[part], batched), *rest) for part in rows.reshape(-1, chunk)
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num], *parts)

    return call


def mean_returns(curves: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Returns the mean return of the episodes that ended in this part of the updates, for each run.

    Without such episodes, it is the mean over all earlier ones. Without earlier ones, it is NaN.
    """
    num = curves.shape[-2]
    first, last = round(start * num), round(stop * num)
    before = curves[..., first - 1, :] if first else np.zeros_like(curves[..., 0, :])
    ended = curves[..., last - 1, :] - before
    total = np.where(ended[..., 1:] > 0, ended, curves[..., last - 1, :])
    return total[..., 0] / np.where(total[..., 1] > 0, total[..., 1], np.nan)


def final(curves: np.ndarray) -> np.ndarray:
    return mean_returns(curves, 0.9, 1.0)


def chosen(curves: np.ndarray) -> np.ndarray:
    """Returns the final return of the trial whose return was best just before, from curves [seeds, trials, T, 2]."""
    best = np.nan_to_num(mean_returns(curves, 0.8, 0.9), nan=-np.inf).argmax(1)
    return np.take_along_axis(final(curves), best[:, None], 1)[:, 0]


def best_of_grid(trainer: Trainer, grid: list[dict], seeds: Sequence[int], num_updates: int) -> tuple[dict, np.ndarray]:
    """Returns the point of the grid with the best mean final return over these seeds, and all means."""
    values = [point for point in grid for _ in seeds]
    keys = jnp.tile(run_keys(seeds), len(grid))
    means = final(trainer.train(keys, coordinates(values), num_updates)).reshape(len(grid), -1).mean(1)
    return grid[int(np.nan_to_num(means, nan=-np.inf).argmax())], means


def random_search(trainer: Trainer, seeds: Sequence[int], num_trials: int, num_updates: int) -> np.ndarray:
    """Returns the final return of the best of `num_trials` random trials of each seed."""
    keys = run_keys(seeds, num_trials)
    z = jax.vmap(lambda key: spaces.to_unconstrained(SPACE, spaces.sample(jax.random.fold_in(key, 1), SPACE)))(keys)
    curves = trainer.train(keys, z, num_updates)
    return chosen(curves.reshape(len(seeds), num_trials, *curves.shape[1:]))


def tpe(trainer: Trainer, seeds: Sequence[int], num_trials: int, num_updates: int) -> np.ndarray:
    """Returns the final return of the best of `num_trials` trials of Optuna's TPE; a third of them are random."""
    searcher = blackbox.tpe(first=(), num_random=max(num_trials // 3, 1))
    states = [searcher.init(jax.random.key(seed), SPACE) for seed in seeds]
    keys, curves = run_keys(seeds, num_trials).reshape(len(seeds), num_trials), []
    for trial in range(num_trials):
        asked, states = zip(*(searcher.ask(state, 1) for state in states), strict=True)
        z = coordinates([records[0].configuration for records in asked])
        curves.append(trainer.train(keys[:, trial], z, num_updates))
        outcomes = np.nan_to_num(-mean_returns(curves[-1], 0.8, 0.9), nan=1e3)
        states = [
            searcher.tell(state, [records[0]._replace(outcome=float(outcome), status="COMPLETE")])
            for state, records, outcome in zip(states, asked, outcomes, strict=True)
        ]
    return chosen(np.stack(curves, 1))


def pbt(trainer: Trainer, seeds: Sequence[int], size: int, num_updates: int, num_rounds: int = 10) -> np.ndarray:
    """Population-based training (Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846).

    After each round, the worst quarter of a population copies parameters and hyperparameters of random members of the
    best quarter, and moves z by normal noise of deviation 0.3. Returns the final return of the member that was best in
    the last round but one.
    """
    keys, rng = run_keys(seeds, size), np.random.default_rng(list(seeds))
    z = jax.vmap(lambda key: spaces.to_unconstrained(SPACE, spaces.sample(jax.random.fold_in(key, 1), SPACE)))(keys)
    states, returns = trainer.start(keys, z), []
    for number in range(num_rounds):
        before = np.asarray(states.model_state.actors.finished)
        states, curves = trainer.advance(states, z, num_updates // num_rounds)
        returns.append(_ratio(curves[:, -1] - before, curves[:, -1]).reshape(len(seeds), size))
        if number < num_rounds - 1:
            states, z = _exploit(states, z, returns[-1], rng)
    best = returns[-2].argmax(1)
    return np.take_along_axis(returns[-1], best[:, None], 1)[:, 0]


def _exploit(states: Any, z: Any, returns: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any]:
    """Replaces the worst quarter of each population, from returns [populations, members]."""
    num, size = returns.shape
    quarter, order = max(size // 4, 1), returns.argsort(1)
    winners = np.take_along_axis(order, rng.integers(size - quarter, size, (num, quarter)), 1)
    source = np.tile(np.arange(size), (num, 1))
    np.put_along_axis(source, order[:, :quarter], winners, 1)
    copied = (source != np.arange(size)).reshape(-1)
    rows = (source + size * np.arange(num)[:, None]).reshape(-1)
    states, z = jax.tree.map(lambda x: x[rows], (states, z))
    z = jax.tree.map(lambda x: x + (0.3 * copied * rng.standard_normal(len(rows))).astype(x.dtype), z)
    keys = jax.vmap(jax.random.fold_in)(states.key, jnp.arange(len(rows)))  # copies see other episodes
    return states._replace(key=keys), z


def _ratio(ended: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Mean returns from sums and numbers [R, 2] of a round, or of all rounds if no episode ended; -inf if none did."""
    used = np.where(ended[:, 1:] > 0, ended, total)
    return np.where(used[:, 1] > 0, used[:, 0] / np.maximum(used[:, 1], 1), -np.inf)


def tuned(estimator: base.Estimator, num_estimates: int, chunk: int) -> Callable:
    """Returns `(keys [R], z [R], outer_rates [R], tasks [R]) -> (curves [R, num_estimates, 2], paths)`.

    The hyperparameters are tuned by Adam during one training run; their paths are {name: [R, num_estimates]}. Outer
    rates have the structure of z; a hyperparameter with rate 0 is fixed. With several particles, a curve is their sum.
    """

    def run(key, z, outer_rates, task):
        scaled = lambda updates, _: jax.tree.map(lambda update, rate: -rate * update, updates, outer_rates)
        learner = training.learner(estimator, optax.chain(optax.scale_by_adam(), optax.stateless(scaled)))

        def step(state, _):
            state, _ = learner.step(state)
            finished = state.estimator_state.inner.model_state.actors.finished.reshape(-1, 2).sum(0)
            return state, (finished, spaces.to_constrained(SPACE, state.hyperparams))

        return jax.lax.scan(step, learner.init(key, z, task), length=num_estimates)[1]

    compiled = _in_chunks(jax.jit(jax.vmap(run)), chunk)

    def tune(keys, z, outer_rates, tasks):
        curves, paths = compiled(keys, z, outer_rates, tasks)
        return np.asarray(curves, np.float64), {name: np.asarray(paths[name]) for name in SPACE}

    return tune
