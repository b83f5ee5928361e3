"""The alternatives without a hypergradient: random search, evolution, and the best fixed architecture."""

import jax
import numpy as np

from experiments.architecture.auto_architecture.image_table_tasks import NUM_CLASSES
from experiments.architecture.auto_architecture.training import Shape
from metaopt import blackbox, spaces


def evolve(shape: Shape, key, batch, test, num: int) -> np.ndarray:
    """Returns [num, n, 3] outcomes of regularized evolution on each of n tasks. All searches advance together."""
    n = len(test["y"])
    searcher = blackbox.regularized_evolution(population_size=shape.config.population, sample_size=3)
    space = {f"edge {i}": spaces.integer(0, size - 1) for i, size in enumerate(shape.sizes())}
    states = [searcher.init(jax.random.fold_in(key, i), space) for i in range(n)]
    outcomes = []
    for i in range(num):
        asked = [searcher.ask(state, 1) for state in states]
        codes = np.array([list(trials[0].configuration.values()) for trials, _ in asked])
        outcome, _ = shape.train(jax.random.fold_in(key, n + i), shape.one_hot(codes), batch, test)
        states = [
            searcher.tell(state, [trials[0]._replace(outcome=float(row[0]), status="COMPLETE")])
            for (trials, state), row in zip(asked, outcome, strict=True)
        ]
        outcomes.append(outcome)
    return np.stack(outcomes)


def best_of(outcomes: np.ndarray, num: int, rng, num_draws: int = 200) -> np.ndarray:
    """Returns [n, 2] test loss and error of the best by validation of `num` networks, mean over random subsets.

    outcomes: [trained, n, 3].
    """
    trained, n = outcomes.shape[:2]
    if num >= trained:
        return outcomes[outcomes[:, :, 0].argmin(0), np.arange(n), 1:]
    total = np.zeros((n, 2))
    for _ in range(num_draws):
        subsets = np.stack([rng.permutation(trained)[:num] for _ in range(n)])
        best = subsets[np.arange(n), outcomes[subsets, np.arange(n)[:, None], 0].argmin(1)]
        total += outcomes[best, np.arange(n), 1:]
    return total / num_draws


def best_fixed(codes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Returns the network [edges] of [networks, edges] with the smallest mean of losses [networks, tasks]."""
    return codes[np.minimum(losses, np.log(NUM_CLASSES)).mean(1).argmin()]
