"""A long run, by hand: memory stays flat, and JAX traces the loss as often in 2,000 steps as in one.

python tests/training/soak.py [--steps 2000]
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, inner, training

NUM_TASKS, BATCH = 1_000, 8


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2_000)
    num_steps = parser.parse_args().steps
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_TASKS, 64, 16)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(NUM_TASKS, 16, 1)).astype(np.float32))[..., 0]
    traces, memory, drawn = [], {}, set()

    def loss(params, hp, rows):
        traces.append(None)
        return jnp.mean((jnp.tanh(rows[0] @ params["in"]) @ params["out"] - rows[1]) ** 2)

    def train_loss(params, hp, rows):
        return loss(params, hp, rows) + jnp.exp(hp["log_decay"]) * optax.tree.norm(params, squared=True)

    def init(key, hp, rows):
        return {"in": jax.random.normal(key, (16, 32)) / 4, "out": jnp.zeros(32)}

    def sample_tasks(key):
        rows = np.asarray(jax.random.choice(key, NUM_TASKS, (BATCH,), replace=False))
        drawn.update(rows.tolist())
        return base.Task((x[rows, :32], y[rows, :32]), (x[rows, 32:], y[rows, 32:]))

    def measure(step, metrics):
        if step == 1 or step % (num_steps // 10) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory[step] = pages * resource.getpagesize() / 2**20
            print(
                f"step {step}: {memory[step]:.0f} MiB, {len(traces)} traces, value {metrics['value']:.4f}", flush=True
            )

    loop = inner.loop(train_loss, lambda hp: optax.adam(jnp.exp(hp["log_rate"])), init=init)
    estimator = hypergrad.over_tasks(hypergrad.unrolled(inner.problem(loop, loss), num_steps=10))
    with tempfile.TemporaryDirectory() as folder:
        result = training.fit(
            training.learner(estimator, optax.adam(0.01)),
            sample_tasks,
            hyperparams={"log_rate": jnp.array(-3.0), "log_decay": jnp.array(-6.0)},
            num_steps=num_steps,
            key=jax.random.key(0),
            evaluate=lambda key, hp: hp["log_decay"] ** 2,
            keep_best=2,
            keep_nonfinite=2,
            callback=[training.log_to(Path(folder) / "run.jsonl"), measure],
            checkpoint_dir=Path(folder) / "checkpoints",
            progress=False,
        )
        lines = (Path(folder) / "run.jsonl").read_text().splitlines()
    first, second, *_, last = memory.values()
    print(f"{len(drawn)} tasks, {len(lines)} lines, last step {json.loads(lines[-1])['step']}, {result.stopped}")
    print(f"memory after 1 step {first:.0f} MiB, after a tenth {second:.0f} MiB, at the end {last:.0f} MiB")


if __name__ == "__main__":
    main()
