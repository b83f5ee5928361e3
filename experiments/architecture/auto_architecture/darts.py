"""DARTS on each task: its orders, rates of α, and ways to read an architecture from α.

Fine-tuning is compared with the best variant. The tasks that tune the rate of fine-tuning also select this variant.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.architecture.auto_architecture.training import Shape, in_chunks
from metaopt import nas, training

# Ways to read an architecture from the mixing weights, as `keep` of `nas.derive_genotype`. The last one is the
# published way: without "none", and with the two strongest edges into a node. a* and random networks may have a "none"
# on any edge.
NONE_COUNTS = "none counts"
NONE_LEFT_OUT = "none left out"
TWO_EDGES = "two edges a node"
READINGS: dict[str, int | None] = {NONE_COUNTS: None, NONE_LEFT_OUT: 1_000, TWO_EDGES: 2}


class Darts:
    """The searches on tasks of one shape, by order."""

    def __init__(self, shape: Shape):
        self.shape, config = shape, shape.config
        self.searches = {
            order: nas.darts(
                shape.network,
                shape.in_shape,
                order=order,
                optimizer=lambda hyperparams: optax.adam(config.rate),
                outer_batch=shape.some_valid,
                **shape.options,
            )
            for order in config.darts_orders
        }
        self.programs = {order: jax.jit(self._program(search)) for order, search in self.searches.items()}
        most = max(np.bincount([edge.target for edge in cell.edges]).max() for cell in shape.network.cells.values())
        self.readings = [name for name in READINGS if name != TWO_EDGES or most > 2]  # with two edges, both are kept

    def _program(self, search: nas.Search):
        def alone(rate, key, task):
            learner = training.learner(search.estimator, optax.adam(rate, b1=0.5))
            state = learner.init(key, search.hyperparams(key), task)
            step = lambda state, _: (learner.step(state)[0], None)
            state = jax.lax.scan(step, state, length=self.shape.config.darts_steps)[0]
            return state.hyperparams, search.problem.loop.params(state.estimator_state.inner)

        return lambda rate, args: jax.vmap(alone, in_axes=(None, 0, 0))(rate, *args)

    def search(self, order: str, rate, keys: jax.Array, tasks_) -> tuple[tuple[dict[str, np.ndarray], Any], float]:
        """Returns α of each task, its supernet's weights, and the processor seconds per task."""
        return in_chunks(self.programs[order], jnp.float32(rate), (keys, tasks_._replace(features=None)), 4)

    def read(self, alpha: dict[str, np.ndarray], reading: str) -> np.ndarray:
        """Returns [n, edges] of integers: each task's architecture. An edge that is not kept is "none"."""
        network, keep = self.shape.network, READINGS[reading]
        # A cell of one edge has no "none".
        weights = jax.device_get(jax.tree.map(lambda a: jax.nn.softmax(a, -1), alpha))
        codes = []
        for i in range(len(jax.tree.leaves(alpha)[0])):
            genotype = nas.derive_genotype(network, {kind: w[i] for kind, w in weights.items()}, keep=keep)
            rows = nas.one_hot(network, genotype)
            codes.append(np.concatenate([self._codes(kind, rows[kind]) for kind in network.cells]))
        return np.array(codes)

    def _codes(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Returns [edges] of integers from rows [edges, ops] that are one-hot, or 0 for an edge that is left out."""
        ops = self.shape.network.cells[kind].edges[0].ops
        return np.where(rows.any(1), rows.argmax(1), ops.index("none") if "none" in ops else 0)

    def variants(self, order: str, tuning: tuple, held: tuple) -> dict[str, Any]:
        """Evaluates every reading at its best rate, on held-out tasks. The result is ready for JSON.

        Args:
          order: one of the orders of the config.
          tuning: keys of the searches [m], keys of the trainings that evaluate the resulting architectures, tasks,
            test.
          held: keys of the searches [n], the key that all networks are trained with, tasks, test.

        Returns:
          "rates": the rates that were tried. All other entries are dicts by reading. "losses" are the validation losses
          of all rates on the tuning tasks, and "rate" is the best one. "scores" [n, 2] are test loss and error.
          "supernets" [n, 2, 2] are those of `Shape.gaps`. "architectures" are descriptions.
        """
        shape, rates = self.shape, list(self.shape.config.darts_rates)
        search_keys, check_keys, some, some_test = tuning
        losses: dict[str, list[float]] = {reading: [] for reading in self.readings}
        for rate in rates:
            (alpha, _), _ = self.search(order, rate, search_keys, some)
            for reading in self.readings:
                codes = self.read(alpha, reading)
                losses[reading].append(shape.validation_loss(check_keys, codes, some, some_test))
        best = {reading: rates[int(np.argmin(x))] for reading, x in losses.items()}
        keys, run_key, new, new_test = held
        searched = {rate: self.search(order, rate, keys, new)[0] for rate in sorted(set(best.values()))}
        codes = {reading: self.read(searched[rate][0], reading) for reading, rate in best.items()}
        trained = lambda code: shape.train(run_key, shape.one_hot(code), new, new_test)[0][:, 1:]
        return {
            "rates": rates,
            "losses": losses,
            "rate": best,
            "scores": {reading: trained(code).tolist() for reading, code in codes.items()},
            "supernets": {
                reading: shape.gaps(*searched[best[reading]], code, new_test).tolist()
                for reading, code in codes.items()
            },
            "architectures": {reading: [shape.describe(code) for code in x] for reading, x in codes.items()},
        }

    def costs(self, batch, codes: np.ndarray, rate) -> dict[str, dict[str, float]]:
        """Returns costs by order.

        The cost of an alternation is in training runs, by operations. The cost of a search is in processor seconds.
        """
        keys = jax.random.split(jax.random.key(0), min(8, len(batch.train["y"])))
        few = jax.tree.map(lambda x: x[: len(keys)], batch)
        return {
            "operations": self.shape.in_runs(batch, codes, {o: s.estimator for o, s in self.searches.items()}),
            "seconds": {order: self.search(order, rate, keys, few)[1] for order in self.searches},
        }
