"""Operations, memory traffic and communication per device of `training.shard`, and a model of 8, 64 and 512 chips.

The estimator of a small transformer's hypergradient is sharded over 1 to 512 virtual CPU devices and compiled. Nothing
is run. λ is the initialization and a learning rate. For each program the compiler states the floating-point operations,
the bytes that instructions read and write, and the memory of one device. The collective operations are read from the
text of the compiled program.

With weak scaling, each device has the same number of tasks. With strong scaling, the number of all tasks is the same.
If there are more devices than tasks, a second axis of the mesh splits the rows of each task.

The model of chips turns these numbers into seconds. Its assumptions are in the report.

    python experiments/benchmarks/scaling.py            # minutes; writes experiments/results/scaling.md
    python experiments/benchmarks/scaling.py --smoke    # seconds; prints only
"""

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import cases
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import script
from metaopt import base, hypergrad, inner, training

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


# ---- Compiled programs -----------------------------------------------------------------------------------------------


class Options(NamedTuple):
    layers: int
    width: int
    length: int
    batch: int
    num_steps: int


class Collective(NamedTuple):
    kind: str
    size: int  # bytes of the array: summed (all-reduce), after (all-gather) or before (others) the operation
    num: int  # devices that take part
    stride: int  # the distance between them


class Program(NamedTuple):
    devices: int
    rows: int  # devices that share a task
    tasks: int
    flops: float  # of one device, like all below
    bytes: float
    memory: int
    collectives: list[Collective]
    traced: float  # the share of this device in the operations of the traced program


def collectives(text: str) -> list[Collective]:
    """Returns the collective operations of a compiled program, which must not be in loops."""
    if re.search(rf" (?:{KINDS})\(", text.partition("\nENTRY ")[0]) or re.search(rf" (?:{KINDS})-start\(", text):
        raise RuntimeError("a collective operation is in a loop or asynchronous, and would not be counted right")
    collectives = []
    for types, kind, rest in re.findall(rf" = (.+?) ({KINDS})\((.*)", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
        size = sum(BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in arrays)
        ids = _group(rest)
        size *= len(ids) if kind == "reduce-scatter" else 1
        collectives.append(Collective(kind, size, len(ids), int(ids[1] - ids[0]) if len(ids) > 1 else 1))
    return collectives


def _group(text: str) -> np.ndarray:
    """Returns the devices of the first group, from one of XLA's three notations of groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array([int(n) for n in match[1].split(",")])
    if match := re.search(r"replica_groups=mesh\[(.+?)\] \{(.+?)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", match[2])]
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        return np.moveaxis(ids, axes, range(-len(axes), 0)).reshape(-1, math.prod(ids.shape[a] for a in axes))[0]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(n) for n in match[3].split(",")]
        order = [int(n) for n in match[4].split(",")] if match[4] else range(len(sizes))
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(int(match[1]), int(match[2]))[0]
    raise RuntimeError(f"unknown replica groups: {text[:200]}")


def case_of(options: Options) -> cases.Case:
    return cases.transformer(options.layers, options.width, options.length, options.batch, unroll=True)


@functools.cache
def estimator_of(options: Options) -> base.Estimator:
    case = case_of(options)
    loss = lambda params, hp, tokens: case.loss(params, {"x": tokens})
    sgd = lambda hp: optax.sgd(hp["rate"], momentum=0.9)
    problem = inner.problem(inner.loop(loss, sgd, init=lambda key, hp, data: hp["start"]), loss)
    # `unrolled` writes out up to five steps if it stores everything. In a loop, the compiler would count the body only
    # once.
    return hypergrad.over_tasks(hypergrad.unrolled(problem, num_steps=options.num_steps, remat="none"))


def arguments(options: Options, tasks: int) -> tuple[base.HyperParams, base.Task, base.PyTree]:
    """Returns the shapes of λ, of the tasks and of the estimator's state."""
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)
    hyperparams = shapes({"rate": np.float32(0.1), "start": case_of(options).params})
    tokens = jax.ShapeDtypeStruct((tasks, options.batch, options.length + 1), np.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = base.Task(tokens, tokens)
    return hyperparams, batch, jax.eval_shape(estimator_of(options).init, key, hyperparams, batch)


@functools.cache
def traced_flops(options: Options) -> float:
    """Returns the operations of one task, counted without the compiler."""
    return hypergrad.flops(estimator_of(options).estimate, *arguments(options, 1))


@functools.cache
def compiled(options: Options, devices: int, tasks: int) -> Program:
    """Compiles the sharded estimator. Its arguments are only shapes."""
    estimator = estimator_of(options)
    rows = max(devices // tasks, 1)
    mesh = jax.make_mesh(
        (devices // rows, rows), ("tasks", "rows"), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,) * 2
    )

    def split(tree, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    hyperparams, batch, state = arguments(options, tasks)
    args = split(hyperparams), split(batch, "tasks", "rows"), split(state, "tasks")
    lowered = jax.jit(training.shard(estimator, mesh).estimate).lower(*args)
    program = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    cost, memory = program.cost_analysis(), program.memory_analysis()
    return Program(
        devices,
        rows,
        tasks,
        cost["flops"],
        cost["bytes accessed"],
        memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        collectives(program.as_text()),
        traced_flops(options) * tasks / devices,
    )


# ---- The model of chips ----------------------------------------------------------------------------------------------


class Chip(NamedTuple):
    name: str
    flops: float  # a second, at most
    memory: float  # bytes a second
    island: int  # chips that the fast network connects
    fast: float  # bytes a second out of each chip, within an island
    slow: float  # and between islands


CHIPS = (
    Chip("H100", 494.7e12, 3.35e12, 8, 450e9, 50e9),
    Chip("TPU v5e", 197e12, 819e9, 256, 200e9, 6.4e12 / 8 / 256),
)
PEAK, MEMORY, NETWORK = 0.4, 0.7, 0.7  # the parts of the published rates that a program reaches
HOP_FAST, HOP_SLOW = 1e-6, 5e-6  # seconds, for each hop of a ring

ASSUMPTIONS = f"""\
- H100 (SXM): 494.7 TFLOP/s in TF32 without sparsity, 3.35 TB/s of memory, NVLink with 450 GB/s in each direction within
  8 chips, and 400 Gbit/s for each chip between hosts. Sources: NVIDIA's data sheets of H100 and DGX H100.
- TPU v5e: 197 TFLOP/s in bfloat16, which is also JAX's default for products of float32 there, 819 GB/s of memory,
  interconnect of 400 GB/s in both directions together within a pod of 256 chips, and 6.4 Tbit/s for each pod between
  pods. Source: Google Cloud's page "TPU v5e". So 512 chips are two pods.
- A program reaches {PEAK:.0%} of the peak, {MEMORY:.0%} of the memory's bandwidth and {NETWORK:.0%} of the network's.
  These numbers are assumed, not measured.
- The seconds of a device are the larger one of operations and memory traffic, plus the network. Nothing overlaps with
  communication.
- All-reduce is a ring over the chips of an island, 2(n − 1)/n of the array through each link, and then a ring over the
  islands, for the part of the array of each chip. All-gather and reduce-scatter take half. Each hop takes
  {HOP_FAST * 1e6:.0f} µs within an island and {HOP_SLOW * 1e6:.0f} µs between islands (assumed). Real networks also
  have trees and tori with fewer hops.
- The bytes of memory traffic are those of the CPU's compiler, which fuses fewer operations than those of GPU and TPU.
  They are too large for chips with better fusion.
- Operations, bytes and collective operations are those of programs that XLA compiled for virtual CPU devices. Compilers
  for GPU and TPU may choose other collective operations for the second axis of the mesh.
- All chips are equally fast, and all tasks take equally long. The time to launch kernels, the data, the host,
  evaluations and checkpoints take no time. The outer optimizer is left out: every chip repeats it for the whole λ."""


def network_seconds(one: Collective, chip: Chip) -> float:
    """Returns the seconds of one collective operation: rings within islands of chips, then a ring over islands."""
    inside = max(1, min(one.num, chip.island // one.stride))
    passes = 2 if one.kind == "all-reduce" else 1
    ring = lambda num, size, rate, hop: passes * (num - 1) * (size / num / (NETWORK * rate) + hop)
    within = ring(inside, one.size, chip.fast, HOP_FAST)
    return within + ring(one.num // inside, one.size / inside, chip.slow, HOP_SLOW)


def modelled(program: Program, chip: Chip) -> tuple[float, float, float]:
    """Returns the seconds of one device for operations, for memory traffic and for the network."""
    network = sum(network_seconds(one, chip) for one in program.collectives)
    return program.flops / (PEAK * chip.flops), program.bytes / (MEMORY * chip.memory), network


def total(seconds: tuple[float, float, float]) -> float:
    return max(seconds[:2]) + seconds[2]


def efficiency(program: Program, first: Program, chip: Chip) -> float:
    """Returns the modelled tasks per second and device, divided by those of one device."""
    rate = lambda p: p.tasks / p.devices / total(modelled(p, chip))
    return rate(program) / rate(first)


# ---- The report ------------------------------------------------------------------------------------------------------


def report(options: Options, programs: dict[tuple[str, int], Program]) -> str:
    counts, models = [], []
    for (scaling, devices), p in programs.items():
        sent = [one.size for one in p.collectives if one.num > 1]
        counts.append(
            [scaling, str(devices), f"{devices // p.rows} × {p.rows}", str(p.tasks), f"{p.flops / 1e9:.2f}"]
            + [f"{p.flops / p.traced:.3f}", f"{p.bytes / 1e9:.3f}", f"{sum(sent) / 2**20:.3f}"]
            + [str(len(sent)), f"{p.memory / 2**20:.0f}"]
        )
        for chip in CHIPS if devices >= 8 else ():
            seconds = modelled(p, chip)
            models.append(
                [scaling, str(devices), chip.name, *(f"{1e3 * s:.3f}" for s in (*seconds, total(seconds)))]
                + [f"{efficiency(p, programs[scaling, 1], chip):.3f}"]
            )
    size = sum(x.size for x in case_of(options).params.values())
    header = ["scaling", "devices", "tasks × rows", "tasks", "GFLOP", "compiled / traced", "GB read and written"]
    header += ["MiB in collectives", "collectives", "MiB of memory"]
    model_header = ["scaling", "chips", "chip", "operations, ms", "memory, ms", "network, ms", "step, ms", "efficiency"]
    return "\n\n".join(
        [
            f"A transformer of {options.layers} layers of width {options.width} ({size:,} parameters), "
            f"{options.batch} sequences of {options.length} tokens, {options.num_steps} steps of SGD with momentum, "
            f'float32, `remat="none"`. λ is the initialization and the rate, {4 * (size + 1) / 2**20:.3f} MiB.',
            "From compiled programs, for each device. `hypergrad.flops` counts the operations of the traced program.",
            script.table(header, counts),
            "**A model: nothing was run on these chips.** Milliseconds of one outer step of one chip. Efficiency is "
            "tasks per second and chip, divided by those of one chip (also where one chip has too little memory).",
            script.table(model_header, models),
            f"Assumptions:\n\n{ASSUMPTIONS}",
        ]
    )


def draw(programs: dict[tuple[str, int], Program], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for scaling, style in (("weak", "--"), ("strong", "-")):
        chosen = {devices: p for (name, devices), p in programs.items() if name == scaling}
        left.loglog(list(chosen), [p.flops / 1e9 for p in chosen.values()], f"o{style}", color="C2", label=scaling)
        for color, chip in enumerate(CHIPS):
            ms = [1e3 * total(modelled(p, chip)) for p in chosen.values()]
            right.loglog(list(chosen), ms, f"o{style}", color=f"C{color}", label=f"{chip.name}, {scaling}")
    devices = sorted({devices for _, devices in programs})
    for axes, label in ((left, "GFLOP per device, compiled"), (right, "ms of an outer step, modelled")):
        axes.set(xlabel="devices", ylabel=label)
        axes.set_xticks(devices, devices)
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = script.parser(__doc__).parse_args()
    sizes = Options(1, 32, 16, 8, 1) if options.smoke else Options(2, 256, 64, 16, 2)
    devices, each, together = ((1, 8), 1, 4) if options.smoke else ((1, 2, 4, 8, 64, 512), 8, 64)
    jax.config.update("jax_num_cpu_devices", max(devices))
    programs = {}
    for scaling in ("weak", "strong"):
        for num in devices:
            programs[scaling, num] = compiled(sizes, num, num * each if scaling == "weak" else together)
    text = report(sizes, programs)
    picture = "Operations per device, and the modelled time of an outer step"
    script.publish(__file__, "Scaling over devices", text, options, picture=picture)
    if not options.smoke:
        draw(programs, options.out / "scaling.png")


if __name__ == "__main__":
    script.run(main)
