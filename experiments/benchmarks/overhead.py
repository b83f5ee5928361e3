"""What `training.fit` adds to an outer step of 100 ms: checkpoints, log sinks, progress, and the loop itself.

The step is a hypergradient through the training of an MLP on scikit-learn's digits. The number of inner steps is chosen
so that a step takes about 100 ms on this machine. λ contains the initial weights, so that a checkpoint has a megabyte.

`fit` and a bare loop over the same compiled step take turns, in blocks with the same number of steps. In each block of
`fit`, a thread writes one checkpoint. The report has the ratio of the times of each pair of blocks.

The first sink is a JSONL file, which gets every step. The other sinks are TensorBoard (tensorboardX), MLflow and
Weights & Biases, if they are installed. They get every tenth step by default (`--every`). After the run, the calls of
each sink are timed without steps in between.

    python experiments/benchmarks/overhead.py            # minutes; writes experiments/results/overhead.md
    python experiments/benchmarks/overhead.py --smoke    # seconds; prints only
"""

import contextlib
import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import compiled

from experiments import script
from metaopt import base, hypergrad, inner, training

AIM = 1.03
NUM_BLOCKS, NUM_CALLS = 7, 50  # of each sink


def make_learner(case: cases.Case, num_steps: int) -> training.Learner:
    loop = inner.loop(
        lambda params, hp, batch: case.loss(params, batch) + cases.penalty(params, hp["decay"]),
        lambda hp: optax.adam(hp["rate"], eps=cases.EPS),
        init=lambda key, hp, data: hp["start"],
        sampler=inner.minibatch(case.batch_size),
    )
    problem = inner.problem(loop, lambda params, hp, batch: case.loss(params, batch))
    outer = optax.adam(1e-8)  # λ, with its rate near 0, hardly moves: only the time counts
    return training.learner(hypergrad.unrolled(problem, num_steps=num_steps, remat="step"), outer)


def seconds_of(call: Callable[[], Any], repetitions: int = 5) -> float:
    """Returns the median seconds of a call, without the first one."""
    taken = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def calibrated(case: cases.Case, hyperparams: base.HyperParams, task: base.Task, seconds: float) -> int:
    """Returns the number of inner steps of an outer step of this many seconds."""
    num_steps = 8
    for _ in range(3):
        learner = make_learner(case, num_steps)
        state = learner.init(jax.random.key(0), hyperparams, task)
        program, _ = compiled(learner.step, state, task)
        taken = seconds_of(lambda: program(state, task))  # noqa: B023
        if 0.9 < taken / seconds < 1.1:
            break
        num_steps = max(round(num_steps * seconds / taken), 1)
    return num_steps


@contextlib.contextmanager
def sinks(folder: Path, every: int) -> Iterator[dict[str, Callable]]:
    """Returns the callbacks of all sinks that are installed, by name. Tools get every n-th step."""
    with contextlib.ExitStack() as stack:
        loggers = {"a JSONL file": training.log_to(folder / "run.jsonl")}
        if importlib.util.find_spec("tensorboardX"):
            import tensorboardX  # pyright: ignore[reportMissingImports]

            writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"))
            stack.callback(writer.close)
            loggers["TensorBoard"] = training.log_to(writer, every=every)
        if importlib.util.find_spec("mlflow"):
            import mlflow  # pyright: ignore[reportMissingImports]

            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            mlflow.config.enable_async_logging()
            stack.enter_context(mlflow.start_run())
            loggers["MLflow (asynchronous)"] = training.log_to(mlflow, every=every)
        if importlib.util.find_spec("wandb"):
            import wandb  # pyright: ignore[reportMissingImports]

            run = wandb.init(mode="offline", dir=str(folder))
            stack.callback(run.finish)
            loggers["Weights & Biases (offline)"] = training.log_to(run, every=every)
        yield loggers


def costs(callbacks: dict[str, Callable], first_step: int, metrics: Any) -> dict[str, np.ndarray]:
    """Returns the milliseconds of a call of each callback: the means of several blocks of calls."""
    taken = {name: [] for name in callbacks}
    steps = itertools.count(first_step)
    for _ in range(NUM_BLOCKS):
        for name, callback in callbacks.items():
            start = time.perf_counter()
            for _ in range(NUM_CALLS):
                callback(next(steps), {**metrics, "evaluation": 0.0})  # each of these calls writes
            taken[name].append(1e3 * (time.perf_counter() - start) / NUM_CALLS)
    return {name: np.array(values) for name, values in taken.items()}


def measured(
    learner: training.Learner, hyperparams: base.HyperParams, task: base.Task, pairs: int, block: int, every: int
) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """Returns the seconds of `fit` and of the bare loop [pairs, 2], the costs of sinks, and the number of metrics."""
    step = jax.jit(learner.step, donate_argnums=0)
    last = [{}]
    carried = [jax.tree.map(jnp.copy, learner.init(jax.random.key(0), hyperparams, task))]
    seconds, start = np.zeros((pairs, 2)), [0.0]

    def bare() -> None:
        for _ in range(block):
            carried[0], metrics = step(carried[0], task)
            jax.device_get(metrics)

    def take_turns(number: int, metrics: Any) -> None:
        """The last callback of a step. After a block of `fit`, the bare loop has its turn."""
        last[0] = metrics
        if number % block:
            return
        pair = number // block - 2  # the first block compiles
        if pair >= 0:
            seconds[pair, 0] = time.perf_counter() - start[0]
        begin = time.perf_counter()
        bare()
        start[0] = time.perf_counter()
        if pair >= 0:
            seconds[pair, 1] = start[0] - begin

    with tempfile.TemporaryDirectory() as folder, sinks(Path(folder), every) as loggers:
        training.fit(
            learner,
            lambda key: task,
            hyperparams=hyperparams,
            num_steps=(pairs + 1) * block,
            key=jax.random.key(0),
            callback=[*loggers.values(), take_turns],
            checkpoint_dir=os.path.join(folder, "checkpoints"),
            checkpoint_every=block,
            keep_nonfinite=1,
        )
        per_sink = costs(loggers, (pairs + 1) * block + 1, last[0])
    return seconds, per_sink, len(last[0]) + 1


def report(
    seconds: np.ndarray,
    per_sink: dict[str, np.ndarray],
    num_metrics: int,
    block: int,
    every: int,
    num_steps: int,
    size: int,
) -> str:
    ratios = np.sort(seconds[:, 0] / seconds[:, 1])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    reached = "reached" if high < AIM else "not shown" if low < AIM else "missed"
    bare = 1e3 * np.median(seconds[:, 1]) / block
    rows = [
        ["bare loop", f"{bare:.2f}", "1.0000", ""],
        ["`fit`, all sinks", f"{1e3 * np.median(seconds[:, 0]) / block:.2f}", f"{np.median(ratios):.4f}"]
        + [f"{low:.4f} to {high:.4f}"],
    ]
    sink_rows = [
        [name, f"{np.median(ms):.3f}", f"{ms.min():.3f} to {ms.max():.3f}", f"{np.median(ms):.2f} %"]
        for name, ms in per_sink.items()
    ]
    return "\n\n".join(
        [
            f"{len(ratios)} pairs of blocks of {block} steps, in turns, with one checkpoint for each block. A step is "
            f"a hypergradient through {num_steps} steps of Adam; λ has {size:,} numbers. Sinks: {', '.join(per_sink)}. "
            f"The file has each step, and the tools have {'each step' if every == 1 else f'one of {every}'}.",
            script.table(["loop", "ms of a step, median", "ratio, median of pairs", "95 % interval"], rows),
            f"Ratios of all pairs: {', '.join(f'{ratio:.3f}' for ratio in ratios)}. The interval is a bootstrap over "
            f"pairs. The aim is a ratio below {AIM}: {reached}.",
            f"Calls of one sink after the other, with {num_metrics} metrics, without steps in between: {NUM_BLOCKS} "
            f"blocks of {NUM_CALLS} calls. The share is of a step of 100 ms.",
            script.table(
                ["sink", "ms of a call, median of blocks", "smallest and largest", "share of a step, in each step"],
                sink_rows,
            ),
        ]
    )


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="of blocks")
    parser.add_argument("--block", type=int, default=20, help="outer steps of a block")
    parser.add_argument("--every", type=int, default=10, help="steps between calls of the tools")
    options = parser.parse_args()
    width, pairs, block, seconds = (16, 3, 2, 5e-3) if options.smoke else (256, options.pairs, options.block, 0.1)
    case = cases.mlp(width)
    task = jax.tree.map(jnp.asarray, base.Task(case.train, case.valid))
    hyperparams = jax.tree.map(jnp.asarray, {**case.hyperparams, "start": case.params})
    num_steps = calibrated(case, hyperparams, task, seconds)
    results = measured(make_learner(case, num_steps), hyperparams, task, pairs, block, options.every)
    size = sum(x.size for x in jax.tree.leaves(hyperparams))
    script.publish(
        __file__, "What `fit` adds to a step", report(*results, block, options.every, num_steps, size), options
    )


if __name__ == "__main__":
    script.run(main)
