"""The inputs of a searcher: the digits and the graph of an architecture, and the features of a task."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

from metaopt import nas

EDGE_OPS = {"TransNAS-Bench-101, micro": ("none", "skip_connect", "conv1x1", "conv3x3")}  # cells with ops on edges


def kept_by_alpha(table: nas.Benchmark, scores: np.ndarray) -> int:
    """Returns the row of the cell that α gives, where α is computed from the scores [A] of all rows.

    α of an op is the mean score of the cells that contain it, minus the mean score.
    """
    cell = nas.complete_cell(3, EDGE_OPS[table.name])
    network = nas.Network({"cell": cell}, (nas.Layer("conv", 8), nas.Layer("cell", 8)), num_outputs=2)
    genotypes = [
        {"cell": tuple((*e[:2], e.ops[x]) for e, x in zip(cell.edges, row, strict=True) if e.ops[x] != "none")}
        for row in table.encodings
    ]
    alpha = nas.op_scores(network, genotypes, scores)
    weights = {kind: jax.nn.softmax(a, -1) for kind, a in alpha.items()}
    return genotypes.index(nas.derive_genotype(network, weights, keep=None))


PROBED = 100  # architectures whose training-free scores describe a task
PROBES = ("grasp", "fisher", "grad_norm", "plain", "nwot", "jacov", "snip")  # the scores that all tasks have
GRAPHS = {  # nodes, edges, features, classes
    "cora": (2_708, 5_278, 1_433, 7),
    "citeseer": (3_327, 4_552, 3_703, 6),
    "pubmed": (19_717, 44_324, 500, 3),
    "cs": (18_333, 81_894, 6_805, 15),
    "physics": (34_493, 247_962, 8_415, 5),
    "computers": (13_752, 245_861, 767, 10),
}


def task_features(table: nas.Benchmark, folder: Path) -> dict[str, np.ndarray]:
    """Returns knowledge about a task without training: sizes of a graph, or probes by training-free scores."""
    if table.name == "NAS-Bench-Graph":
        return {
            name: np.log([nodes, edges / nodes, width, classes])
            for name, (nodes, edges, width, classes) in GRAPHS.items()
        }
    space = table.name.split(", ")[1]
    with np.load(folder / "transnasbench101.npz") as data:
        scores, names = data[f"{space}_score_subset"], data["score_subset_names"].tolist()
    rows = np.flatnonzero(np.isfinite(scores).all((1, 2)))
    rows = np.random.default_rng(0).permutation(rows)[:PROBED]
    operations, columns = scores[rows, :, names.index("flops")], [names.index(name) for name in PROBES]
    rho = lambda a, b: float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    return {
        task: np.array([rho(scores[rows, t, c], operations[:, t]) for c in columns])
        for t, task in enumerate(table.tasks)
    }


def configurations(table: nas.Benchmark) -> list[dict]:
    return [dict(zip(table.dims, row, strict=True)) for row in table.encodings.tolist()]


def cell_searcher(table: nas.Benchmark, graphs: list, others: list[int], features, smoke: bool, seed: int):
    """Runs `nas.train_cell_searcher` on the records of the other tasks, with the key of `seed`."""
    cells, name = configurations(table), lambda c: tuple(c.values())
    row_of = {name(c): row for row, c in enumerate(cells)}

    names = [table.tasks[t] for t in others]
    sizes: dict[str, Any] = {"num_steps": 2, "num_members": 2, "width": 8} if smoke else {}
    return nas.train_cell_searcher(
        table.records(names),
        lambda c: graphs[row_of[name(c)]],
        features=features,
        tests=table.records(names, test=True),
        key=jax.random.key(seed),
        **sizes,
    )
