"""The published examples of hypertorch, next to hypertorch."""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published
from rules_rows import HERE, TOLERANCE, number
from timing import compiled, num_cores, relative_error, temporary_mib
from turns import medians

from experiments import script

PUBLISHED = """\
## hypertorch's published examples

Its four examples have its own T, K, rates and sizes; `published.py` names the exceptions. Times are of one outer \
step: T inner steps from the start, and the hypergradient. "error" is the relative difference of the two \
hypergradients in the worst leaf. The linear systems of the last two examples are badly conditioned, and that of iMAML \
is indefinite. So K steps in float32 amplify rounding. In float64 the two libraries agree to 4e-7 (iMAML, one task, \
width 16) and 3e-10. In the row "conjugate gradients" of iMAML, metaopt uses JAX's `cg`, which continues through \
negative curvature like hypertorch's; `hypergrad.cg` stops there.

"""


def published_rows(options: argparse.Namespace) -> tuple[str, list]:
    """Returns the table of hypertorch's examples, and the rows that disagree.

    The table also reports the first example's run to its end.
    """
    printed, wrong, end = [], [], ""
    for name, (make, file) in published.SETTINGS.items():
        if options.smoke and not options.problems and name != "logistic":
            continue
        if file and not published.data_file(file).is_file():
            printed.append([f"{name} (METAOPT_DATA names no folder with {file})", *[""] * 8])
            continue
        setting, num_outer = make(options.smoke), 3 if options.smoke else published.NUM_OUTER
        arguments = jax.tree.map(jnp.asarray, (setting.hyperparams, setting.task))
        programs = {r: compiled(published.program(rule), *arguments) for r, rule in setting.rules.items()}
        calls = {r: lambda p=p, a=arguments: jax.block_until_ready(p(*a)) for r, (p, _) in programs.items()}
        seconds = medians(calls, options.repetitions, options.seconds, options.clock)
        theirs, hypergrads, reason = {}, {}, ""
        if options.peers:
            theirs, hypergrads, reason = hypertorch(name, setting, num_outer, options)
        for rule, (program, _) in programs.items():
            off, ms, other = None, 1e3 * seconds[rule], theirs.get("ms", {}).get(rule, float("nan"))
            if hypergrads:
                hypergradient = jax.device_get(calls[rule]()[1])
                hypergradient = hypergradient if isinstance(hypergradient, dict) else {"log_penalty": hypergradient}
                off = relative_error(hypergradient, {leaf: hypergrads[f"{rule}/hp_{leaf}"] for leaf in hypergradient})
                wrong += [f"{name}, {rule}: {off:.1e}"] if not (off <= TOLERANCE or name in published.ROUGH) else []
            steps = [str(setting.steps[count]) for count in "TK"]
            printed.append(
                [setting.text, *steps, rule + reason, number(ms, 2), number(other, 2), number(other / ms, 1)]
            )
            printed[-1] += [number(temporary_mib(program), 2), "" if off is None else f"{off:.0e}"]
        if name == "logistic":
            run, compile_seconds = compiled(published.run_to_the_end(setting, num_outer), *arguments)
            begin = options.clock()
            value = float(run(*arguments)[-1])
            end = f"The logistic regression to its end, {num_outer:,} outer steps by the first rule: metaopt "
            end += f"{options.clock() - begin:.2f} s and {compile_seconds:.1f} s to compile, validation loss "
            end += f"{value:.6f}"
            end += f"; hypertorch {theirs['seconds']:.1f} s, {theirs['value']:.6f}." if theirs else "."
    header = ["example", "T", "K", "rule", "metaopt ms", "hypertorch ms", "/ metaopt", "MiB", "error"]
    return f"{PUBLISHED}{script.table(header, printed)}\n\n{end}", wrong


def hypertorch(
    name: str, setting: published.Setting, num_outer: int, options: argparse.Namespace
) -> tuple[dict, dict[str, np.ndarray], str]:
    """Returns the times and hypergradients of hypertorch, and the reason if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "example.npz"
        saved: dict = {**setting.steps, **setting.arrays}
        np.savez(file, **saved)
        command = [options.peers, str(HERE / "published_peers.py"), name, str(file), str(num_cores())]
        done = subprocess.run(
            [*command, str(options.repetitions), str(options.seconds), str(num_outer), options.clock.__name__],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or [""])[-1]
            return {}, {}, f" (hypertorch failed, exit {done.returncode}: {last_line})"
        return json.loads(done.stdout.splitlines()[-1]), dict(np.load(f"{file}.found.npz")), ""
