"""Runs the shapes side by side, each on one core, and writes the result."""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import script
from experiments.architecture import auto_architecture
from experiments.architecture.auto_architecture.config import PRESETS, Config
from experiments.architecture.auto_architecture.image_table_tasks import SHAPES
from experiments.architecture.auto_architecture.kept import CAN_SHARE, Kept
from experiments.architecture.auto_architecture.report import finish
from experiments.architecture.auto_architecture.results import costs_of, joined
from experiments.architecture.auto_architecture.shapes import run_shape

# No part of a fold depends on these files. If they change, finished parts still count as made by the same code.
ONLY_SHOWS = ("results", "report", "reading")


def one_shape(name: str, core: int, compiled: str, arguments: tuple, kept: tuple) -> None:
    """Runs a shape on one core.

    Programs this small are not faster on several cores, and processor seconds refer to one core.
    """
    begin = time.perf_counter()
    say = lambda text: print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)
    if (parent := multiprocessing.parent_process()) is not None:
        # this process ends with its parent
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    jax.config.update("jax_compilation_cache_dir", compiled)
    run_shape(name, *arguments, say, Kept(*kept))


def one_shape_reported(*args) -> None:
    """Calls `one_shape` in a separate process, which prints its own progress."""
    with script.reporting():
        one_shape(*args)


def side_by_side(names: tuple[str, ...], cores: list[int], compiled: str, arguments: tuple, kept: tuple) -> None:
    """Runs each shape in a separate process.

    If one fails, the others still run to their end, so that no other work is lost.
    """
    context = multiprocessing.get_context("spawn")
    running = {
        name: context.Process(target=one_shape_reported, args=(name, core, compiled, arguments, kept), daemon=True)
        for name, core in zip(names, itertools.cycle(cores), strict=False)
    }
    for process in running.values():
        process.start()
    for process in running.values():
        process.join()
    if failed := {name: process.exitcode for name, process in running.items() if process.exitcode}:
        what = ", ".join(f"{name} ended with exit code {code}" for name, code in failed.items())
        sys.exit(f"{what}. What is finished is kept: the same call goes on from there.")


def parse(argv) -> tuple[argparse.Namespace, str, Config]:
    parser = argparse.ArgumentParser(
        "auto_architecture", description=auto_architecture.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--smoke", action="store_true", help="a few tasks and steps")
    preset.add_argument("--full", action="store_true", help="all folds")
    parser.add_argument("--report", action="store_true", help="tables of what is finished, and no more")
    parser.add_argument("--any-code", action="store_true", help="take what is finished by whatever code made it")
    parser.add_argument("--packaged", action="store_true", help="leave METAOPT_DATA out")
    parser.add_argument("--out", metavar="FOLDER", default="results_local", help="where results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, nargs="+", help="which folds to hold out, in turn")
    parser.add_argument("--note", default="", help="a sentence that the result should carry")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    for field in dataclasses.fields(Config):
        if field.type in (int, float, "int", "float"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=float if "float" in str(field.type) else int)
    args = parser.parse_args(argv)
    name = "full" if args.full else "smoke" if args.smoke else "default"
    changed = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name, None) is not None
    }
    changed |= {k: tuple(changed[k]) for k in ("folds", "shapes") if k in changed}
    config = dataclasses.replace(PRESETS[name], **changed)
    if not set(config.folds) <= set(range(config.num_folds)):
        parser.error(f"--folds must be of 0 to {config.num_folds - 1}; got {' '.join(map(str, config.folds))}.")
    return args, name, config


def main(argv=None) -> list[dict[str, Any]]:
    args, name, config = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    path = out / f"auto_architecture_{name}"
    data = bool(os.environ.get("METAOPT_DATA")) and not args.packaged
    settings = {**dataclasses.asdict(config), "seed": args.seed, "data": data}
    # The cache of compiled programs: the folds of a shape share their programs, and so does a run that continues.
    compiled = str((out / "compiled").absolute())
    if args.smoke and not args.report:
        Path(f"{path}_parts.json").unlink(missing_ok=True)
    code = script.code(*(file for file in sorted(Path(__file__).parent.glob("*.py")) if file.stem not in ONLY_SHOWS))
    settings = {k: v for k, v in settings.items() if k not in ("folds", "shapes")}
    keep = Path(f"{path}_parts.json"), settings, code, args.any_code
    arguments = config, not args.packaged, args.seed
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    # Several calls at the same time do not all use the first cores.
    cores = cores[os.getpid() % len(cores) :] + cores[: os.getpid() % len(cores)]
    earlier, processes = any(Kept(*keep).before), 0
    if not args.report:
        processes = min(len(config.shapes), len(cores)) if CAN_SHARE else 1
    if processes > 1:
        side_by_side(config.shapes, cores, compiled, arguments, keep)
    elif processes:
        for shape in config.shapes:
            one_shape(shape, cores[0], compiled, arguments, keep)
    kept = Kept(*keep)
    results = []
    for shape in SHAPES:
        parts = []
        for key in sorted(key for key in kept.parts if key.startswith(f"{shape}, fold")):
            part_of = lambda what, key=key: kept.parts.get(key.replace(", fold", f", {what}, fold"))
            more = part_of("records") or {"scores": {}, "architectures": {}}
            darts = {order: part_of(f"DARTS, {order} order") for order in config.darts_orders}
            if all(darts.values()):  # otherwise, the fold is not finished
                part = dict(kept.parts[key]) | {"darts": darts}
                parts.append(part | {name: {**part[name], **more[name]} for name in more})
        if parts and not {f"{shape}, costs", f"{shape}, costs of DARTS"} <= set(kept.parts):
            sys.exit(f"{kept.path} does not hold the costs of {shape}: call without --report.")
        if parts:
            random = np.array(kept.parts[f"{shape}, random networks"]["outcomes"])
            results.append(joined(parts, costs_of(kept.parts, shape), random, config))
    if not results:
        sys.exit(f"{kept.path} holds no fold that is finished.")
    seconds, processor = kept.seconds()
    arguments_given = [x for x in (sys.argv[1:] if argv is None else argv) if x not in ("--note", args.note)]
    call = " ".join(["python experiments/architecture/auto_architecture", *arguments_given])
    details = {
        "command": call.strip() + (", after earlier calls" if earlier else ""),
        "preset": name,
        "note": args.note,
        "seed": args.seed,
        "config": dataclasses.asdict(config),
        "data": data,
        "seconds": seconds,
        "processor": processor,
        "this_call": time.perf_counter() - begin,
        "processes": processes,
        "num_parts": len(kept.parts),
        "num_other_code": kept.num_other_code(),
        "results": results,
    }
    finish(details, path)
    return results
