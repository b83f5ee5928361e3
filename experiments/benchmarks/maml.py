"""The cost of one outer step of MAML on sinusoids, compared with hand-written JAX and other libraries.

There are 25 tasks, with 10 support and 10 query points each. The network has two hidden layers of 40 units. MAML is
second order, with 1 and 5 inner steps at .01, and a step of the outer Adam. Every program starts at the same weights
and sees the same tasks. Each gradient is compared with that of hand-written JAX, and the run fails if an error is above
1e-3.

    python experiments/benchmarks/maml.py                 # writes experiments/results/maml.md
    python experiments/benchmarks/maml.py --peers PYTHON  # other libraries too: install_peers.sh makes that PYTHON
    python experiments/benchmarks/maml.py --smoke         # seconds; prints only

`taskset -c 0 python ...` keeps all of them, XLA and torch, on one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import circumstances, num_cores, relative_error
from turns import medians

from experiments import pages, script
from metaopt import few_shot, hypergrad, tasks, training

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "maml.md"
TOLERANCE = 1e-3  # of gradients, in float32
INNER_RATE, OUTER_RATE = 0.01, 1e-3
LAYERS = ("hidden0", "hidden1", "out")
BY_HAND = "by hand: JAX, {how}"
INTRO = """\
- "CPU-ms": processor milliseconds for one outer step, float32, {threads} thread(s); medians of {repetitions} turns.
- "/ by hand": divided by the time of the better hand-written program with as many steps a call.
- "/ metaopt": divided by the time of metaopt with one step a call.
- "error": of the gradient, against hand-written JAX; {agree} below {tol:g}.
- Programs of many steps a call are scans, as `training.fit(steps_per_call=...)` runs them. Their {many} steps share \
the cost of the call.
"""
HEADER = ["inner steps", "program", "steps a call", "CPU-ms a step", "/ by hand", "/ metaopt", "error", "compile s"]


def initial(width: int) -> dict:
    rng = np.random.default_rng(0)
    sizes = dict(zip(LAYERS, ((1, width), (width, width), (width, 1)), strict=True))
    weights = {name: (rng.normal(size=size) * (2 / size[0]) ** 0.5).astype(np.float32) for name, size in sizes.items()}
    return {name: {"w": w, "b": np.zeros(w.shape[1], np.float32)} for name, w in weights.items()}


def loss(params, batch):
    x = batch["x"]
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
    return ((x @ params["out"]["w"] + params["out"]["b"] - batch["y"]) ** 2).mean()


def objective_by_hand(num_steps: int, scan: bool) -> Callable:
    """Returns (λ, tasks) -> F(λ), written without metaopt."""

    def one(params, task):
        def step(params, _):
            grads = jax.grad(loss)(params, task.train)
            return jax.tree.map(lambda p, g: p - INNER_RATE * g, params, grads), None

        if scan:
            params, _ = jax.lax.scan(step, params, length=num_steps)
        else:
            for _ in range(num_steps):
                params, _ = step(params, None)
        return loss(params, task.valid)

    return lambda params, batch: jax.vmap(one, (None, 0))(params, batch).mean()


def stepper(step: Callable, state, many: int) -> tuple[Callable, float]:
    """Returns a call that takes `many` outer steps and continues from the last call.

    Also returns the compile seconds.
    """
    if many > 1:
        one, step = step, lambda state: jax.lax.scan(lambda state, _: (one(state), None), state, length=many)[0]
    state = jax.tree.map(jnp.copy, state)
    start = time.process_time()
    program = jax.jit(step, donate_argnums=0).lower(state).compile()
    seconds = time.process_time() - start
    carried = [state]

    def call():
        carried[0] = jax.block_until_ready(program(carried[0]))

    return call, seconds


def ours(num_steps: int, many: int, params, batch):
    """Returns {(name, steps per call): (call, compile seconds)}, and {name: gradient}."""
    params = jax.tree.map(jnp.asarray, params)
    optimizer = optax.adam(OUTER_RATE)
    calls, gradients = {}, {}
    for scan in (False, True) if num_steps > 1 else (False,):
        name = BY_HAND.format(how="scan" if scan else "unrolled")
        objective = objective_by_hand(num_steps, scan)

        def step(state, objective=objective):
            params, opt_state, batch = state
            updates, opt_state = optimizer.update(jax.grad(objective)(params, batch), opt_state, params)
            return optax.apply_updates(params, updates), opt_state, batch

        gradients[name] = jax.jit(jax.grad(objective))(params, batch)
        for n in (1, many):
            calls[name, n] = stepper(step, (params, optimizer.init(params), batch), n)

    adaptation = few_shot.maml(lambda params, hp, batch: loss(params, batch), num_steps=num_steps, rate=INNER_RATE)
    estimator = hypergrad.over_tasks(adaptation.estimator)
    learner = training.learner(estimator, optimizer)
    state = learner.init(jax.random.key(0), adaptation.hyperparams(params), batch)
    estimate, _ = jax.jit(estimator.estimate)(state.hyperparams, batch, state.estimator_state)
    gradients["metaopt"] = estimate.hypergrad["init"]
    for n in (1, many):
        calls["metaopt", n] = stepper(lambda state: learner.step(state)[0], state, n)
    return calls, gradients


def peers(num_steps: int, options, params, batch) -> tuple[list[dict], str]:
    """Returns rows of other libraries, from their own environment, and its versions."""
    arrays = {f"params/{layer}/{leaf}": x for layer, leaves in params.items() for leaf, x in leaves.items()}
    arrays |= {f"{part}/{n}": getattr(batch, part)[n] for part in ("train", "valid") for n in ("x", "y")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.npz"
        np.savez(file, **arrays)
        numbers = (num_steps, INNER_RATE, OUTER_RATE, num_cores(), options.repetitions, options.calls)
        command = [options.peers, str(HERE / "maml_peers.py"), str(file), *map(str, numbers)]
        cold = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # a second run compiles like the first one
        done = subprocess.run(command, capture_output=True, text=True, env=cold)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        return [{"name": "other libraries", "reason": f"failed, exit {done.returncode}: {last_line}"}], ""
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["rows"], answer["versions"]


def rows_of(num_steps: int, options) -> tuple[list[list[str]], list[str], str]:
    """Returns the printed rows of one number of inner steps, the gradients that disagree, and the peers' versions."""
    params = initial(options.width)
    batch = tasks.episode_batches(tasks.sinusoids(), options.tasks)(jax.random.key(1))
    measured, gradients = ours(num_steps, options.many, params, batch)
    repeat = {(name, n): options.calls if n == 1 else 1 for name, n in measured}
    calls = {
        key: lambda call=call, key=key: [call() for _ in range(repeat[key])] for key, (call, _) in measured.items()
    }
    seconds = medians(calls, options.repetitions, clock=time.process_time)
    ms = {(name, n): 1e3 * seconds[name, n] / (repeat[name, n] * n) for name, n in measured}
    expected = jax.device_get(gradients[BY_HAND.format(how="unrolled")])
    errors = {name: relative_error(jax.device_get(actual), expected) for name, actual in gradients.items()}
    rows = []
    for (name, n), (_, compile_seconds) in measured.items():
        hand = min(t for (other, m), t in ms.items() if m == n and other.startswith("by hand"))
        ratio = f"{ms[name, n] / ms['metaopt', 1]:.2f}" if n == 1 else ""
        rows.append(
            [str(num_steps), name, str(n), f"{ms[name, n]:.3f}", f"{ms[name, n] / hand:.2f}", ratio]
            + [f"{errors[name]:.0e}", f"{compile_seconds:.1f}"]
        )
    versions = ""
    if options.peers:
        others, versions = peers(num_steps, options, params, batch)
        for row in others:
            if "reason" in row:
                rows.append([str(num_steps), f"{row['name']} ({row['reason']})", *[""] * 6])
                continue
            actual = jax.tree.map(np.asarray, row["gradient"], is_leaf=lambda x: isinstance(x, list))
            errors[row["name"]] = relative_error(actual, expected)
            compile_seconds = f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else ""
            rows.append(
                [str(num_steps), row["name"], "1", f"{row['ms']:.3f}", "", f"{row['ms'] / ms['metaopt', 1]:.1f}"]
                + [f"{errors[row['name']]:.0e}", compile_seconds]
            )
    wrong = [f"{num_steps} steps, {name}: {e:.1e}" for name, e in errors.items() if not e <= TOLERANCE]
    return rows, wrong, versions


def main() -> None:
    parser = argparse.ArgumentParser(description="What one outer step of MAML costs.")
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition; writes no result")
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment that install_peers.sh made")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    options.calls, options.many, options.width, options.tasks = (2, 3, 4, 2) if options.smoke else (30, 100, 40, 25)
    if options.smoke:
        options.repetitions = 1
    printed, wrong, versions = [], [], ""
    for num_steps in (2,) if options.smoke else (1, 5):
        rows, off, versions = rows_of(num_steps, options)
        printed, wrong = printed + rows, wrong + off
    agree = "all" if not wrong else "NOT all"
    text = INTRO.format(
        threads=num_cores(), repetitions=options.repetitions, agree=agree, tol=TOLERANCE, many=options.many
    )
    flags = (" --peers PYTHON" if options.peers else "") + (" --smoke" if options.smoke else "")
    end = circumstances(f"python experiments/benchmarks/maml.py{flags}", memory=False)
    text = "\n".join([text, script.table(HEADER, printed), "", end + (f" Peers: {versions}." if versions else "")])
    print(text)
    if not options.smoke:
        pages.write(RESULT, "The cost of an outer step of MAML", f"{text}\n")
    if wrong:
        sys.exit("\n".join(["Gradients disagree:", *wrong]))


if __name__ == "__main__":
    script.run(main)
