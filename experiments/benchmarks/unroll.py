"""The cost of a hypergradient through training, in time and memory.

An MLP is trained with Adam on scikit-learn's digits, 64 rows per step. λ is the learning rate and a penalty for each
layer. For every number of inner steps T and every checkpoint policy, the report has:

* The time divided by that of plain training. `hypergrad.unroll` under `value_and_grad` is compared with `inner.run` and
the same outer loss. Both are compiled and called in turns, and the medians count.
* The temporary memory, and its ratio to `remat="none"` of the same T. It is stated by the compiler, without noise.

The second table has tasks per second: `hypergrad.over_tasks`, all at once and in chunks, against a Python loop over one
compiled task.

    python experiments/benchmarks/unroll.py            # minutes; writes experiments/results/unroll.md
    python experiments/benchmarks/unroll.py --smoke    # seconds; prints only
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import circumstances, compiled, temporary_mib
from turns import medians

from experiments import pages, script
from metaopt import base, hypergrad, inner, tasks

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "experiments" / "results" / "unroll.md"
REMAT = ("none", "step", "sqrt")
SHARED = ("feature_mask", "class_mask", "num_features")
HYPERPARAMS = {"rate": 3e-3, "decay": {"in": 1e-4, "hidden": 1e-4, "out": 1e-4}}


def digits() -> base.Task:
    """Returns scikit-learn's digits as one task."""
    table = tasks.prepare({table.name: table for table in tasks.from_sklearn()}["digits"])
    shape = table.shape
    return tasks.to_task(table, rows=shape[:2], num_features=shape.features, num_classes=shape.classes)


def make_problem(width: int):
    """An MLP of two hidden layers, trained by Adam on minibatches of 64 rows."""

    def init(key, hp, data):
        sizes = (data["x"].shape[1], width, width, data["class_mask"].shape[0])
        keys = jax.random.split(key, 3)
        layers = zip(("in", "hidden", "out"), keys, sizes[:-1], sizes[1:], strict=True)
        return {name: jax.random.normal(key, (n, m)) / np.sqrt(n) for name, key, n, m in layers}

    def valid_loss(params, hp, batch):
        hidden = jax.nn.relu(jax.nn.relu(batch["x"] @ params["in"]) @ params["hidden"])
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], batch["y"])
        return (batch["mask"] * nll).sum() / batch["mask"].sum()

    def train_loss(params, hp, batch):
        return valid_loss(params, hp, batch) + sum(hp["decay"][name] * (w**2).sum() for name, w in params.items())

    sampler = inner.minibatch(64, shared=SHARED)
    return inner.problem(
        inner.loop(train_loss, lambda hp: optax.adam(hp["rate"]), init=init, sampler=sampler), valid_loss
    )


def time_and_memory(problem, task, num_steps: int, repetitions: int) -> list[list[str]]:
    """Returns rows of the first table, for one T."""
    loop, key = problem.loop, jax.random.key(0)

    def outer_loss(state, hp):
        return problem.outer_loss(loop.params(state), hp, task.valid, loop.context(state))

    def plain(key, hp):
        return outer_loss(inner.run(loop, num_steps)(key, hp, task.train), hp)

    def hypergradient(remat):
        solve = hypergrad.unroll(loop, num_steps=num_steps, remat=remat)
        return lambda key, hp: jax.value_and_grad(lambda hp: outer_loss(solve(key, hp, task.train), hp))(hp)

    functions = {"plain training": plain, **{f'`"{remat}"`': hypergradient(remat) for remat in REMAT}}
    programs = {name: compiled(function, key, HYPERPARAMS) for name, function in functions.items()}
    calls = {
        name: lambda program=program: jax.block_until_ready(program(key, HYPERPARAMS))
        for name, (program, _) in programs.items()
    }
    seconds = medians(calls, repetitions)
    stored = temporary_mib(programs['`"none"`'][0])
    return [
        [
            str(num_steps),
            name,
            f"{1e3 * seconds[name]:.1f}",
            f"{seconds[name] / seconds['plain training']:.2f}",
            f"{temporary_mib(program):.2f}",
            f"{temporary_mib(program) / stored:.4f}",
            f"{compile_seconds:.1f}",
        ]
        for name, (program, compile_seconds) in programs.items()
    ]


def tasks_per_second(problem, task, num_tasks: int, num_steps: int, repetitions: int) -> list[list[str]]:
    """Returns rows of the second table: hypergradients of a batch of tasks, which are random splits of the digits."""
    keys = jax.random.split(jax.random.key(1), num_tasks)
    batch = jax.jit(jax.vmap(tasks.resplit, in_axes=(0, None)))(keys, task)
    single = hypergrad.unrolled(problem, num_steps=num_steps, remat="step")
    programs, calls = {}, {}
    for name, chunk in (("all at once (vmap)", None), (f"chunks of {num_tasks // 4}", num_tasks // 4)):
        estimator = hypergrad.over_tasks(single, task_chunk=chunk)
        state = estimator.init(jax.random.key(2), HYPERPARAMS, batch)
        programs[name] = compiled(estimator.estimate, HYPERPARAMS, batch, state)
        calls[name] = lambda program=programs[name][0], state=state: jax.block_until_ready(
            program(HYPERPARAMS, batch, state)[0].hypergrad
        )

    name, alone = "Python loop over one compiled task", tasks.unstack(batch)
    states = [single.init(key, HYPERPARAMS, one) for key, one in zip(keys, alone, strict=True)]
    programs[name] = compiled(single.estimate, HYPERPARAMS, alone[0], states[0])

    def python_loop():
        program = programs[name][0]
        results = [program(HYPERPARAMS, *args)[0].hypergrad for args in zip(alone, states, strict=True)]
        return jax.block_until_ready(jax.tree.map(lambda *leaves: sum(leaves) / num_tasks, *results))

    calls[name] = python_loop
    seconds = medians(calls, repetitions)
    return [
        [
            name,
            f"{num_tasks / seconds[name]:.1f}",
            f"{seconds['Python loop over one compiled task'] / seconds[name]:.2f}",
            f"{temporary_mib(program):.2f}",
            f"{compile_seconds:.1f}",
        ]
        for name, (program, compile_seconds) in programs.items()
    ]


def report(options: argparse.Namespace) -> str:
    """Runs everything. Returns the report in Markdown."""
    problem, task = make_problem(options.width), jax.tree.map(jnp.asarray, digits())
    first, repetitions = [], options.repetitions
    for num_steps in options.num_steps:
        first += time_and_memory(problem, task, num_steps, repetitions)
    second = tasks_per_second(problem, task, options.num_tasks, options.task_steps, repetitions)
    header = ["T", "`remat`", "ms", "time / plain", "temporary MiB", "memory / `none`", "compile s"]
    return "\n\n".join(
        [
            f"An MLP of 61, {options.width}, {options.width} and 10 units with Adam on scikit-learn's digits, 64 rows "
            f"a step, float32; medians of {repetitions} calls in turns.",
            script.table(header, first),
            f'Hypergradients of {options.num_tasks} tasks of {options.task_steps} steps, `remat="step"`:',
            script.table(["tasks", "tasks a second", "against the loop", "temporary MiB", "compile s"], second),
            circumstances(f"python experiments/benchmarks/unroll.py{options.flags}"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition; writes no result")
    parser.add_argument("--repetitions", type=int, default=None, help="of every measurement; 9 by default")
    options = parser.parse_args()
    if options.repetitions is not None and options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1; got {options.repetitions}.")
    options.flags = "".join(f" {argument}" for argument in sys.argv[1:])
    sizes = (8, (16,), 4, 4, 1) if options.smoke else (64, (16, 256, 1024), 16, 100, 9)
    options.width, options.num_steps, options.num_tasks, options.task_steps, default = sizes
    options.repetitions = options.repetitions or default
    text = report(options)
    print(text)
    if not options.smoke:
        pages.write(RESULT, "The cost of a hypergradient", f"{text}\n")


if __name__ == "__main__":
    script.run(main)
