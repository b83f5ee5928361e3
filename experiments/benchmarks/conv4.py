"""The cost of one outer step of MAML on Omniglot's network, compared with naive JAX, PyTorch and torch.func.

There are 8 tasks of 5 ways, 1 shot and 5 query examples per class, 28 × 28. The network has four blocks of 64 filters
(batch statistics), with max-pooling or with convolutions of stride 2, as in Finn et al. for Omniglot. There is one
inner step at .4, second order. The benchmark times the gradient of the mean query loss. Every program has the same
weights and images. Each gradient is compared with that of naive JAX. The run fails if an error is above 1e-2 (float32,
through a normalization).

    python experiments/benchmarks/conv4.py                 # writes experiments/results/conv4.md
    python experiments/benchmarks/conv4.py --peers PYTHON  # PyTorch too: install_peers.sh makes that PYTHON
    python experiments/benchmarks/conv4.py --smoke         # seconds; prints only

`taskset -c 0 python ...` keeps all of them, XLA and torch, on one thread.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import circumstances, num_cores, temporary_mib
from turns import medians

from experiments import pages, script
from metaopt import base, few_shot, hypergrad, inner

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "conv4.md"
TOLERANCE = 1e-2
WAYS, QUERY, RATE = 5, 5, 0.4
INTRO = """\
- Times are processor milliseconds for the gradient of one outer step, float32, {threads} thread(s); medians of \
{repetitions} turns.
- "/ metaopt" of PyTorch: the median of {rounds} rounds, and their smallest and largest ratio. In every round, \
metaopt is timed again, before PyTorch and after it.
- "In a scan": one of {many} steps that are a scan, as `training.fit(steps_per_call=...)` runs them.
- "Error": of the gradient, against naive JAX; {agree} below {tol:g}.
- "Naive": `jax.vmap` over tasks and `jax.grad`, with XLA's convolutions, which become grouped ones.
- "Unrolled": the same in a Python loop over tasks, whose convolutions stay as they are. In the body of a scan, XLA \
has no fast kernel for their backward pass.
- The programs of `torch.func` have batch normalization written by hand, or ("fused") PyTorch's own. Under \
`torch.func`, the gradient of the fused one is off by some thousandths. With max-pooling, that of the hand-written \
one is, too.
"""
FUSED = "torch.func, vmap, fused"
NETWORKS = {"pool": "Max-pooling", "stride": "Strides of 2"}
HEADER = ["program", "CPU-ms", "in a scan", "/ metaopt", "compile s", "temporary MiB", "error"]


def data(num_tasks: int, size: int) -> base.Task:
    """Returns noise: the time does not depend on the images."""
    rng = np.random.default_rng(0)

    def part(each):
        rows = WAYS * each
        return {
            "x": jnp.asarray(rng.random((num_tasks, rows, size, size)), jnp.float32),
            "y": jnp.tile(jnp.repeat(jnp.arange(WAYS), each), (num_tasks, 1)),
            "mask": jnp.ones((num_tasks, rows)),
            "class_mask": jnp.ones((num_tasks, WAYS)),
        }

    return base.Task(part(1), part(QUERY))


def network_of(settings) -> few_shot.ConvNet:
    return few_shot.conv4(num_filters=settings.filters, num_blocks=settings.blocks, downsampling=settings.downsampling)


def programs(settings, params, tasks) -> dict:
    """Returns name -> `params -> ` the gradient of the mean query loss."""
    network = network_of(settings)
    head = few_shot.linear_head(network.features)
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)

    def one(params, task):
        grads = jax.grad(loss)(params, None, task.train)
        return loss(jax.tree.map(lambda p, g: p - RATE * g, params, grads), None, task.valid)

    def looped(params):
        task = lambda i: jax.tree.map(lambda x: x[i], tasks)
        return sum(one(params, task(i)) for i in range(settings.tasks)) / settings.tasks

    adaptation = few_shot.maml(loss, num_steps=1, rate=RATE)
    estimator = hypergrad.over_tasks(adaptation.estimator)
    state = estimator.init(jax.random.key(0), {"init": params}, tasks)
    return {
        "metaopt": lambda params: estimator.estimate({"init": params}, tasks, state)[0].hypergrad["init"],
        "naive: JAX, vmap": jax.grad(lambda params: jax.vmap(one, (None, 0))(params, tasks).mean()),
        "JAX, unrolled": jax.grad(looped),
    }


def measure(by_name: dict, params, settings) -> tuple[dict[str, dict], dict, Callable]:
    """Returns name -> printed values; name -> gradient; a call of metaopt's program."""
    rows, calls, gradients = {}, {}, {}
    for name, gradient in by_name.items():

        def several(params, gradient=gradient):
            body = lambda params, _: (jax.tree.map(lambda p, g: p - 1e-6 * g, params, gradient(params)), None)
            return jax.lax.scan(body, params, length=settings.many)[0]

        start = time.process_time()
        program = jax.jit(gradient).lower(params).compile()
        rows[name] = {
            "compile": time.process_time() - start,
            "memory": temporary_mib(program),
        }
        gradients[name] = jax.device_get(program(params))
        calls[name, "once"] = lambda program=program: jax.block_until_ready(program(params))
        if name == "metaopt":  # in a scan, the other programs take a hundred times as long
            scanned = jax.jit(several).lower(params).compile()
            calls[name, "scan"] = lambda scanned=scanned: jax.block_until_ready(scanned(params))
    for (name, kind), seconds in medians(calls, settings.repetitions, clock=time.process_time).items():
        rows[name][kind] = 1e3 * seconds / (settings.many if kind == "scan" else 1)
    return rows, gradients, calls["metaopt", "once"]


def peers(settings, options, params, tasks) -> tuple[list[dict], str]:
    """Returns rows of PyTorch, from its own environment, and its version. A gradient has an array per leaf."""
    arrays = {f"params/{layer}/{leaf}": x for layer, leaves in params.items() for leaf, x in leaves.items()}
    arrays |= {f"{part}/{n}": getattr(tasks, part)[n] for part in ("train", "valid") for n in ("x", "y")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.npz"
        np.savez(file, **arrays)
        numbers = (settings.blocks, RATE, num_cores(), settings.repetitions, settings.downsampling)
        command = [options.peers, str(HERE / "conv4_peers.py"), str(file), *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        return [{"name": "PyTorch", "reason": f"failed, exit {done.returncode}: {last_line}"}], ""
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["rows"], answer["versions"]


def error(actual, expected) -> float:
    """Returns the relative error of the whole gradient: shifts before a normalization have a zero gradient."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return float(np.linalg.norm(flat(actual) - flat(expected)) / np.linalg.norm(flat(expected)))


def compare(settings, options) -> tuple[list[list[str]], dict[str, float], str]:
    """Returns the rows of one network, the error of each program, and the peers' versions."""
    params = network_of(settings).init(jax.random.key(0))
    depth = settings.filters * ((settings.size // 2**settings.blocks) ** 2 if settings.downsampling == "pool" else 1)
    params["head"] = {"w": jax.random.normal(jax.random.key(1), (depth, WAYS)) / depth**0.5, "b": jnp.zeros(WAYS)}
    tasks = data(settings.tasks, settings.size)
    measured, gradients, call = measure(programs(settings, params, tasks), params, settings)
    expected = gradients["naive: JAX, vmap"]
    ours = measured["metaopt"]["once"]
    errors = {name: error(gradient, expected) for name, gradient in gradients.items()}
    rows = [
        [name, f"{row['once']:.1f}", f"{row['scan']:.1f}" if "scan" in row else "", f"{row['once'] / ours:.2f}"]
        + [f"{row['compile']:.1f}", f"{row['memory']:.1f}", f"{errors[name]:.0e}"]
        for name, row in measured.items()
    ]
    if not options.peers:
        return rows, errors, ""
    again = lambda: 1e3 * medians({"": call}, settings.repetitions, clock=time.process_time)[""]
    ratios, before = {}, again()
    for _ in range(settings.rounds):
        answers, versions = peers(settings, options, params, tasks)
        after = again()
        for row in answers:
            if "ms" in row:
                ratios.setdefault(row["name"], []).append(row["ms"] / ((before + after) / 2))
        before = after
    for row in answers:
        if "reason" in row:
            rows.append([f"{row['name']} ({row['reason']})", *[""] * 6])
            continue
        gradient = jax.tree.map(np.asarray, row["gradient"], is_leaf=lambda x: isinstance(x, list))
        errors[row["name"]] = error(gradient, expected)
        taken = ratios[row["name"]]
        ratio = f"{statistics.median(taken):.2f} [{min(taken):.2f}, {max(taken):.2f}]"
        rows.append([row["name"], f"{row['ms']:.1f}", "", ratio, "", "", f"{errors[row['name']]:.0e}"])
    return rows, errors, versions


def main() -> None:
    parser = argparse.ArgumentParser(description="What one outer step of MAML costs on Omniglot's network.")
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition; writes no result")
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment that install_peers.sh made")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of PyTorch beside metaopt")
    options = parser.parse_args()
    settings = argparse.Namespace(tasks=8, size=28, filters=64, blocks=4, many=3, repetitions=options.repetitions)
    settings.rounds = options.rounds
    if options.smoke:
        settings = argparse.Namespace(tasks=2, size=4, filters=2, blocks=1, many=2, repetitions=1, rounds=1)
    tables, wrong, versions = [], [], ""
    for downsampling, title in NETWORKS.items():
        settings.downsampling = downsampling
        rows, errors, versions = compare(settings, options)
        off = [f"{title}, {name}: {e:.1e}" for name, e in errors.items() if not e <= TOLERANCE and name != FUSED]
        wrong += off
        tables += ["", f"## {title}", "", script.table(HEADER, rows)]
    text = INTRO.format(
        threads=num_cores(),
        repetitions=settings.repetitions,
        rounds=settings.rounds,
        many=settings.many,
        agree="all, but for the fused one," if not wrong else "NOT all",
        tol=TOLERANCE,
    )
    flags = f" --repetitions {options.repetitions} --rounds {options.rounds}" + (
        " --peers PYTHON" if options.peers else ""
    )
    flags += " --smoke" if options.smoke else ""
    end = circumstances(f"python experiments/benchmarks/conv4.py{flags}")
    text = "\n".join([text, *tables, "", end + (f" Peers: {versions}." if versions else "")])
    print(text)
    if not options.smoke:
        pages.write(RESULT, "The cost of an outer step of MAML on Omniglot's network", f"{text}\n")
    if wrong:
        sys.exit("\n".join(["Gradients disagree:", *wrong]))


if __name__ == "__main__":
    script.run(main)
