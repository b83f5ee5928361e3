"""The training of networks and supernets, which the tasks of one shape share."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.architecture.auto_architecture.config import Config
from experiments.architecture.auto_architecture.image_table_tasks import NUM_CLASSES, OPS, make_network
from metaopt import base, hypergrad, inner, nas, spaces


def masked_loss(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the mean cross-entropy over real rows and classes. Labels are smoothed by `batch["smoothing"]`."""
    present, smoothing = batch["class_mask"], batch["smoothing"]
    log_p = jax.nn.log_softmax(jnp.where(present[None] > 0, outputs, -1e9))
    own = jnp.take_along_axis(log_p, batch["y"][:, None], 1)[:, 0]
    every = jnp.where(present[None] > 0, log_p, 0.0).sum(1) / present.sum()
    loss = -(1 - smoothing) * own - smoothing * every
    return jnp.sum(loss * batch["mask"]) / batch["mask"].sum()


def as_they_are(alpha, cell, key, step):
    """A relaxation that returns α itself. α holds one-hot weights, which define a discrete network."""
    return alpha


_COMPILED: set[Callable] = set()


def in_chunks(function: Callable, shared: Any, args: Any, size: int) -> tuple[Any, float]:
    """Runs `function(shared, args)` on `size` tasks at a time. Also returns processor seconds per task.

    One program serves any number of tasks. The last chunk is filled up with its last task. Compilation does not count.
    """
    n = len(jax.tree.leaves(args)[0])
    chunks = [np.minimum(np.arange(i, i + size), n - 1) for i in range(0, n, size)]
    rows_of_args = lambda rows: jax.tree.map(lambda x: x[rows], args)
    if function not in _COMPILED:
        jax.block_until_ready(function(shared, rows_of_args(chunks[0])))
        _COMPILED.add(function)
    start = time.process_time()
    out = [jax.device_get(function(shared, rows_of_args(rows))) for rows in chunks]
    seconds = (time.process_time() - start) / sum(map(len, chunks))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:n], *out), seconds


class Shape:
    """The common parts of all tasks of one shape: the space, and the programs that train its networks."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config
        self.network, self.in_shape = make_network(name)
        cosine = lambda steps: lambda hyperparams: optax.adam(optax.cosine_decay_schedule(config.rate, steps, 0.1))
        self.options: dict[str, Any] = {
            "ops": OPS,
            "loss": masked_loss,
            "decay": 1e-3,
            "sampler": inner.minibatch(config.batch_size, shared=("class_mask", "smoothing")),
            "keep": None,
        }
        rule = lambda problem: hypergrad.unrolled(problem, num_steps=config.unroll)
        constant = lambda hyperparams: optax.adam(config.rate)
        self.search = nas.architecture_search(
            self.network, self.in_shape, rule, optimizer=constant, learn_init=True, **self.options
        )
        # The problem of fine-tuning. As in DARTS, each step has a batch of validation rows.
        self.tuning = nas.architecture_search(
            self.network,
            self.in_shape,
            rule,
            optimizer=constant,
            outer_batch=self.some_valid,
            learn_init=True,
            **self.options,
        )
        # Networks are trained one after another in a loop. So only one op per edge runs.
        one = nas.architecture_search(
            self.network,
            self.in_shape,
            rule,
            optimizer=cosine(config.num_steps),
            relaxation=as_they_are,
            single_path=True,
            learn_init=True,
            **self.options,
        )
        self.init = one.supernet.init
        train = inner.run(one.problem.loop, config.num_steps)

        def outcome(supernet, params, weights, batch):
            outputs = supernet.apply(params, weights, batch["x"])
            wrong = jnp.where(batch["class_mask"][None] > 0, outputs, -jnp.inf).argmax(-1) != batch["y"]
            return masked_loss(outputs, batch), jnp.sum(wrong * batch["mask"]) / batch["mask"].sum()

        def trial(key, weights, start, task, test):
            state = train(key, {"alpha": weights, "init": start}, task.train)
            params = one.problem.loop.params(state)
            valid, tested = (outcome(one.supernet, params, weights, batch) for batch in (task.valid, test))
            return jnp.stack([valid[0], *tested])

        def supernet(params, mixed, discrete, test):
            return jnp.array([outcome(self.search.supernet, params, weights, test) for weights in (mixed, discrete)])

        self.supernets = jax.jit(lambda _, args: jax.lax.map(lambda a: supernet(*a), args))
        self.trials = jax.jit(lambda _, args: jax.lax.map(lambda a: trial(*a), args))
        self.starts = jax.jit(lambda _, keys: jax.vmap(self.init)(keys))

    def some_valid(self, key, task):
        """Draws a batch of validation rows, for each alternation."""
        return inner.minibatch(self.config.batch_size, shared=("class_mask", "smoothing"))(
            key, jnp.int32(0), task.valid
        )

    def train(self, key, weights, tasks_, test, start=None) -> tuple[np.ndarray, float]:
        """Trains n networks, each on its own task.

        Returns [n, 3]: validation loss, test loss, test error; and the processor seconds per network. All networks
        start at `start`. Without it, each starts at its own random weights.
        """
        init_keys, keys = jax.random.split(key, (2, len(test["y"])))
        if start is None:
            start, _ = in_chunks(self.starts, None, init_keys, self.config.held_out)
        else:
            start = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(keys), *x.shape)), start)
        args = (keys, weights, start, tasks_, test)
        out, seconds = in_chunks(self.trials, None, args, self.config.held_out)
        return np.where(np.isfinite(out), out, np.array([np.inf, np.log(NUM_CLASSES), 1.0])), seconds

    def gaps(self, alpha, params, codes: np.ndarray, test) -> np.ndarray:
        """Returns [n, 2, 2] test loss and error of supernets, each on its own task.

        The first row uses the mixing weights. The second row uses the discrete architecture that was read from them,
        with the supernet's weights.
        """
        mixed = jax.tree.map(lambda a: jax.nn.softmax(a, -1), alpha)
        args = (params, mixed, self.one_hot(codes), test)
        out = in_chunks(self.supernets, None, args, self.config.held_out)[0]
        return np.where(np.isfinite(out), out, np.array([np.log(NUM_CLASSES), 1.0]))

    def validation_loss(self, keys, codes: np.ndarray, tasks_, test) -> float:
        """Returns the validation loss of one architecture per task.

        It is a mean over tasks and over one training by each key.
        """
        runs = [self.train(key, self.one_hot(codes), tasks_, test)[0][:, 0] for key in keys]
        return float(np.minimum(runs, np.log(NUM_CLASSES)).mean())

    def sizes(self) -> list[int]:
        """Returns the number of candidates of every edge, in order."""
        return [len(edge.ops) for cell in self.network.cells.values() for edge in cell.edges]

    def one_hot(self, codes: np.ndarray) -> dict[str, jax.Array]:
        """Returns weights of architectures [n, edges] of integers."""
        weights, first = {}, 0
        for kind, cell in self.network.cells.items():
            part = codes[:, first : first + len(cell.edges)]
            weights[kind] = jax.nn.one_hot(jnp.asarray(part), len(cell.edges[0].ops))
            first += len(cell.edges)
        return weights

    def decode(self, alpha: dict[str, jax.Array]) -> np.ndarray:
        """Returns [n, edges] of integers: the largest α of every edge."""
        return np.concatenate([np.asarray(alpha[kind]).argmax(-1) for kind in self.network.cells], -1)

    def describe(self, code: np.ndarray) -> str:
        edges = [edge for cell in self.network.cells.values() for edge in cell.edges]
        return ", ".join(edge.ops[c] for edge, c in zip(edges, code, strict=True))

    def in_runs(self, batch: base.Task, codes: np.ndarray, estimators: dict[str, base.Estimator]) -> dict[str, float]:
        """Returns the cost of one estimate by each estimator, by counted operations, in training runs of one network.

        λ is α. The operations of a training run are the mean over `codes`.
        """
        task, key = jax.tree.map(lambda x: x[0], batch)._replace(features=None), jax.random.key(0)
        rows = {k: v[: self.config.batch_size] for k, v in task.train.items() if v.ndim > 0}
        rows |= {name: task.train[name] for name in ("class_mask", "smoothing")}
        single = []
        for code in codes:
            weights = {kind: np.asarray(w[0]) for kind, w in self.one_hot(code[None]).items()}
            genotype = nas.derive_genotype(self.network, weights, keep=None)
            supernet = nas.supernet(nas.discrete(self.network, genotype), self.in_shape, ops=OPS)
            loss = lambda params, apply=supernet.apply: masked_loss(apply(params, None, rows["x"]), rows)
            single.append(hypergrad.flops(jax.grad(loss), supernet.init(key)))
        run, alpha = np.mean(single) * self.config.num_steps, nas.init_alpha(key, self.network)
        costs = {}
        for name, estimator in estimators.items():
            state = jax.eval_shape(lambda e=estimator: e.init(key, alpha, task))
            costs[name] = float(
                hypergrad.flops(lambda s, e=estimator: e.estimate(alpha, task, s)[0].hypergrad, state) / run
            )
        return costs

    def tuning_alone(self) -> base.Estimator:
        """Returns the estimator of one alternation of fine-tuning, for α."""
        start = self.init(jax.random.key(0))
        at_step = lambda alpha, step: {"alpha": alpha, "init": start}
        return hypergrad.lookahead(base.reparametrized(self.tuning.problem, at_step), num_steps=1)

    def space(self):
        return {kind: spaces.real(shape=(len(c.edges), len(c.edges[0].ops))) for kind, c in self.network.cells.items()}
