"""Benchmarks of architectures, from the converted files in the data folder (`METAOPT_DATA`).

The files were converted from those that the authors of the benchmarks publish. The README of the folder lists the
sources. `nas.read_nas_bench_101`, `nas.read_nas_bench_201` and `nas.read_nas_bench_301` read the published files.
"""

import os
from pathlib import Path

import numpy as np

from metaopt import nas


def nas_bench_201_table(folder: str | os.PathLike | None = None) -> nas.Benchmark:
    """NAS-Bench-201: 15,625 cells on CIFAR-10, CIFAR-100 and ImageNet16-120, in the order of the benchmark.

    Validation errors are from the separate schedule of 12 epochs, the only true validation; test errors are after 200
    epochs. So the only fidelity, 1.0, stands for those 12 epochs. `nas.read_nas_bench_201` has both lengths, and its
    1.0 stands for 200 epochs. Errors are in %. Costs are seconds for the 12 epochs: the figures of the benchmark for
    CIFAR-10, scaled to the other tasks in proportion to the number of images (25,000, 50,000 and 151,700). Row 9930 is
    the best cell nearly everywhere.

    Args:
      folder: folder of nasbench201.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`; a digit is an index into the ops of an edge of `nas.nas_bench_201_space()`.
    """
    data = _arrays("nasbench201", folder)
    cost = data["cost_12_s_cifar10"][:, None] * (np.array([25_000, 50_000, 151_700]) / 25_000)
    return nas.benchmark_table(
        "NAS-Bench-201",
        data["datasets"],
        data["edge_order"].tolist(),
        [5] * 6,
        data["edge_ops"],
        100 - data["val_acc_12"],
        test=100 - data["test_acc_200"],
        cost=cost[..., None],
    )


def trans_nas_bench_101_table(folder: str | os.PathLike | None = None, *, space: str = "micro") -> nas.Benchmark:
    """TransNAS-Bench-101: 4,096 cells or 3,256 networks on six tasks; validation only, in the metric of each task.

    Args:
      folder: folder of transnasbench101.npz; by default the folder that METAOPT_DATA names.
      space: "micro" or "macro". The digits of "micro" stand for none, skip, 1×1 and 3×3 convolution on six edges. The
        digits of "macro" state the type of each of up to six blocks (0: no block; plain, more channels, stride 2,
        both). Micro cells are the cells of `nas.trans_nas_bench_101_space`. Macro networks exist only as a table.

    Returns:
      A `Benchmark`; losses are the negative metric.
    """
    data = _arrays("transnasbench101", folder)
    micro = space == "micro"
    return nas.benchmark_table(
        f"TransNAS-Bench-101, {space}",
        data["tasks"],
        data["micro_edge_order"].tolist() if micro else [f"block{i}" for i in range(6)],
        [4 if micro else 5] * 6,
        np.maximum(data[f"{space}_enc"], 0),  # −1 marks a missing block
        -data[f"{space}_val"],
    )


def nas_bench_macro_table(folder: str | os.PathLike | None = None) -> nas.Benchmark:
    """NAS-Bench-Macro: 6,561 networks of eight blocks on CIFAR-10.

    The benchmark has the test accuracies of three runs. A search sees the first run, and is judged by the mean of the
    other two. Errors are in %.

    Args:
      folder: folder of nasbenchmacro.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`; digits stand for an identity and two inverted residuals, the layers of `nas.nas_bench_macro_space`.
    """
    data = _arrays("nasbenchmacro", folder)
    errors = 100 - data["test_acc"]
    return nas.benchmark_table(
        "NAS-Bench-Macro",
        ["cifar10"],
        [f"block{i}" for i in range(8)],
        [3] * 8,
        data["blocks"],
        errors[:, :1],
        test=errors[:, 1:].mean(1)[:, None],
    )


def nas_bench_graph_table(folder: str | os.PathLike | None = None) -> nas.Benchmark:
    """NAS-Bench-Graph: 26,206 graph networks on seven graphs. Errors are fractions.

    On "proteins" only 2,021 of them were trained. The others are NaN, and `nas.Benchmark.records` makes no records of
    them. The benchmark exists only as a table. A cell is one of nine shapes, not a choice of ops on edges, so no
    supernet covers it.

    Args:
      folder: folder of nasbenchgraph.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`; the first digit is one of the nine shapes of the cell, the others are the ops of its four nodes.
    """
    data = _arrays("nasbenchgraph", folder)
    return nas.benchmark_table(
        "NAS-Bench-Graph",
        data["datasets"],
        ["links", *(f"op{i}" for i in range(4))],
        [9] * 5,
        np.concatenate([data["link_idx"][:, None], data["ops"]], 1),
        1 - data["val"],
        test=1 - data["test"],
    )


def nas_bench_101_table(folder: str | os.PathLike | None = None) -> nas.Benchmark:
    """A part of NAS-Bench-101: 30,001 of its 423,624 cells, on CIFAR-10, at 4, 12, 36 and 108 epochs.

    It has validation results only, from one run each. Errors are fractions. Seconds are for 108 epochs, and
    proportionally less for fewer epochs.

    Args:
      folder: folder of nasbench101_subset.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `Benchmark`. Digits are the 21 entries above the diagonal of the matrix, then the ops of vertices 1 to 5: 1 is a
      3×3 convolution, 2 a 1×1 convolution, 3 a pool, and 0 stands for the output or for a vertex that does not exist.
    """
    data = _arrays("nasbench101_subset", folder)
    ops = np.maximum(data["ops"][:, 1:6].astype(int), -1) + 1
    fidelities = tuple(float(x) for x in data["budgets"] / data["budgets"][-1])
    return nas.benchmark_table(
        "NAS-Bench-101, a part",
        ["cifar10"],
        [*(f"{s}->{t}" for s, t in zip(*np.triu_indices(7, 1), strict=True)), *(f"op{i}" for i in range(1, 6))],
        [2] * 21 + [4] * 5,
        np.concatenate([data["adj_upper"], ops], 1),
        1 - data["val_acc"][:, None],
        fidelities=fidelities,
        cost=data["train_time_s"][:, None, None] * np.array(fidelities),
    )


def nas_bench_201_costs(
    resource: str, task: str = "cifar10", *, folder: str | os.PathLike | None = None
) -> nas.CostTable:
    """The measurements of HW-NAS-Bench for the networks of NAS-Bench-201, as a table: one term over all six edges.

    Args:
      resource: "edgegpu_latency", "raspi4_latency", "edgetpu_latency", "pixel3_latency", "eyeriss_latency" or
        "fpga_latency" (ms); "edgegpu_energy", "eyeriss_energy" or "fpga_energy" (mJ); "eyeriss_arithmetic_intensity".
      task: "cifar10", "cifar100" or "ImageNet16-120".
      folder: folder of nasbench201.npz; by default the folder that METAOPT_DATA names.

    Returns:
      A `CostTable` of `nas.nas_bench_201_space`, for one image.

    Source: Li et al., ICLR 2021, https://arxiv.org/abs/2103.10584
    """
    data = _arrays("nasbench201", folder)
    row, column = data["datasets"].tolist().index(task), data["hw_names"].tolist().index(resource)
    values = np.zeros([5] * 6)
    values[tuple(data["edge_ops"].T.astype(int))] = data["hw_cost"][row, :, column]
    unit = "ms" if resource.endswith("latency") else "mJ" if resource.endswith("energy") else ""
    return nas.CostTable(0.0, (nas.CostTerm(tuple(("cell", edge) for edge in range(6)), values),), unit)


def _arrays(name: str, folder: str | os.PathLike | None) -> dict[str, np.ndarray]:
    path = Path(os.environ.get("METAOPT_DATA", "") if folder is None else folder) / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Pass its folder, or set METAOPT_DATA to it.")
    with np.load(path) as data:
        return dict(data)
