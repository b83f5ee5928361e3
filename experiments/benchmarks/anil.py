"""The cost of ANIL: the body does not adapt, and is computed once for the support set, for any number of inner steps.

The benchmark times the gradient of the mean query loss, second order. There are two models. The first is a network of
three hidden layers of 256 units on 25 tasks of a sinusoid, with 10 support and 10 query points each. The second is
conv4 of 32 filters (batch statistics) on 8 tasks of 5 ways, 1 shot and 5 query examples per class, 14 × 14. Only the
head adapts, at .001.

"At every step" is the same adaptation by `Adaptation.problem`, whose inner loss computes the body, and its derivative,
at each step. The hand-written program computes the features before the loop, which is a scan. Every program has the
same weights and tasks. Each gradient is compared with the hand-written one, and the run fails if an error is above
1e-3.

    python experiments/benchmarks/anil.py           # writes experiments/results/anil.md
    python experiments/benchmarks/anil.py --smoke   # seconds; prints only

`taskset -c 0 python ...` keeps XLA on one thread.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conv4
import jax
import jax.numpy as jnp
from timing import circumstances, num_cores, temporary_mib
from turns import medians

from experiments import pages, script
from metaopt import base, few_shot, hypergrad, inner, tasks

RESULT = Path(__file__).resolve().parents[1] / "results" / "anil.md"
TOLERANCE, RATE = 1e-3, 1e-3
INTRO = """\
- "CPU-ms": processor milliseconds for the gradient of one outer step, float32, {threads} thread(s). They are medians \
of {repetitions} turns. Each turn has two calls, and the second one is timed.
- "/ by hand": divided by the time of the hand-written program with as many steps.
- "error": of the gradient, against that of the hand-written program; {agree} below {tol:g}.
- conv4 computes its convolutions as matrix products in all programs.
- metaopt unrolls one and five steps and scans ten. The hand-written programs always scan.
- Unrolled, five steps with features at every step hold more memory than the C library keeps between calls (32 MiB). \
The system maps this memory again at each call. That time, "of it system", is most of their time.
"""
HEADER = ["model", "inner steps", "program", "CPU-ms", "of it system", "/ by hand"]
HEADER += ["temporary MiB", "compile s", "error"]
BY_HAND = "by hand: features first"


def dense(settings) -> tuple[Any, base.Task, Callable, Callable]:
    """Returns parameters, a batch of tasks, `(params, batch) -> features`, and `(head, z, batch) -> []`.

    The last one is the loss of a head.
    """
    sizes = [1, *[settings.width] * 3]
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, m, n: {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
    body = [draw(key, m, n) for key, m, n in zip(keys[:3], sizes, sizes[1:], strict=False)]
    params = {"body": body, "head": draw(keys[3], settings.width, 1)}

    def features(params, batch):
        x = batch["x"]
        for layer in params["body"]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x

    loss = lambda head, z, batch: ((z @ head["w"] + head["b"] - batch["y"]) ** 2).mean()
    return params, tasks.episode_batches(tasks.sinusoids(), settings.tasks)(jax.random.key(1)), features, loss


def convolutional(settings) -> tuple[Any, base.Task, Callable, Callable]:
    network = few_shot.conv4(num_filters=settings.filters, num_blocks=settings.blocks)
    batch = conv4.data(8 if settings.blocks > 1 else 2, settings.size)
    params = network.init(jax.random.key(0))
    depth = settings.filters * (settings.size // 2**settings.blocks) ** 2
    params["head"] = {"w": jax.random.normal(jax.random.key(1), (depth, 5)) / depth**0.5, "b": jnp.zeros(5)}
    loss = lambda head, z, batch: inner.cross_entropy(z @ head["w"] + head["b"], batch)
    return params, batch, network.features, loss


def by_hand(features: Callable, loss: Callable, num_steps: int, batch: base.Task) -> Callable:
    """Returns `params -> ` the mean query loss, written without metaopt."""

    def one(params, task):
        z = features(params, task.train)

        def step(head, _):
            return jax.tree.map(lambda p, g: p - RATE * g, head, jax.grad(loss)(head, z, task.train)), None

        head, _ = jax.lax.scan(step, params["head"], length=num_steps)
        return loss(head, features(params, task.valid), task.valid)

    return lambda params: jax.vmap(one, (None, 0))(params, batch).mean()


def programs(model, num_steps: int) -> dict[str, Callable]:
    """Returns name -> `params -> ` the gradient of the mean query loss."""
    _, batch, features, loss = model
    whole = lambda params, hyperparams, batch: loss(params["head"], features(params, batch), batch)
    anil = few_shot.anil(whole, num_steps=num_steps, rate=RATE)

    def gradient(estimator):
        estimator = hypergrad.over_tasks(estimator)
        return lambda params: (
            estimator.estimate({"init": params}, batch, estimator.init(jax.random.key(0), {"init": params}, batch))[0]
        ).hypergrad["init"]

    return {
        BY_HAND: jax.grad(inner.im2col(by_hand(features, loss, num_steps, batch))),
        "metaopt": gradient(anil.estimator),
        "at every step": gradient(hypergrad.unrolled(anil.problem, num_steps=num_steps)),
    }


def rows_of(name: str, model, num_steps: int, repetitions: int) -> tuple[list[list[str]], list[str]]:
    """Returns the printed rows, and the gradients that disagree."""
    params, calls, hypergradients, gradients = model[0], {}, {}, {}
    for program, gradient in programs(model, num_steps).items():
        start = time.process_time()
        compiled = jax.jit(gradient).lower(params).compile()
        hypergradients[program] = temporary_mib(compiled), time.process_time() - start
        gradients[program] = jax.device_get(compiled(params))
        calls[program] = lambda compiled=compiled: jax.block_until_ready(compiled(params))
    timed = lambda clock: {name: 1e3 * s for name, s in medians(calls, repetitions, clock=clock, twice=True).items()}
    ms, system = timed(time.process_time), timed(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_stime)
    errors = {program: conv4.error(gradient, gradients[BY_HAND]) for program, gradient in gradients.items()}
    rows = [
        [name, str(num_steps), program, f"{ms[program]:.2f}", f"{system[program]:.2f}"]
        + [f"{ms[program] / ms[BY_HAND]:.2f}", f"{memory:.1f}", f"{seconds:.1f}", f"{errors[program]:.0e}"]
        for program, (memory, seconds) in hypergradients.items()
    ]
    return rows, [f"{name}, {num_steps} steps, {p}: {e:.1e}" for p, e in errors.items() if not e <= TOLERANCE]


def main() -> None:
    parser = argparse.ArgumentParser(description="What ANIL costs.")
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition; writes no result")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    settings = argparse.Namespace(tasks=25, width=256, filters=32, blocks=3, size=14, repetitions=options.repetitions)
    if options.smoke:
        settings = argparse.Namespace(tasks=2, width=4, filters=2, blocks=1, size=4, repetitions=1)
    printed, wrong = [], []
    for name, model, steps in (("dense", dense(settings), (1, 5, 10)), ("conv4", convolutional(settings), (5,))):
        for num_steps in (2,) if options.smoke else steps:
            rows, off = rows_of(name, model, num_steps, settings.repetitions)
            printed, wrong = printed + rows, wrong + off
    agree = "all" if not wrong else "NOT all"
    text = INTRO.format(threads=num_cores(), repetitions=settings.repetitions, agree=agree, tol=TOLERANCE)
    end = circumstances(f"python experiments/benchmarks/anil.py{' --smoke' if options.smoke else ''}")
    text = "\n".join([text, script.table(HEADER, printed), "", end])
    print(text)
    if not options.smoke:
        pages.write(RESULT, "The cost of ANIL", f"{text}\n")
    if wrong:
        sys.exit("\n".join(["Gradients disagree:", *wrong]))


if __name__ == "__main__":
    script.run(main)
