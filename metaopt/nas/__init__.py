"""What is built: ops, cells and networks as data, supernets with mixing weights, genotypes.

A search makes the choice of ops differentiable: every edge mixes its candidates by weights w(α), and α is one more λ.

    spec (`darts_space`, `nas_bench_201_space`, one's own `Network`) --`supernet`--> init, apply
    α --relaxation--> weights --`discretize`--> genotype --`discrete`--> spec of one network --`supernet`--> init, apply

`methods.darts` and its kin put these together.
"""

from metaopt.nas._augmentation import auxiliary_head, crop_and_flip, cutout
from metaopt.nas._benchmark_files import (load_benchmark, nas_bench_301_genotype, read_nas_bench_101, read_nas_bench_201, read_nas_bench_301, save_benchmark,)
from metaopt.nas._benchmarks import (Benchmark, nas_bench_101_table, nas_bench_201_table, nas_bench_graph_table, nas_bench_macro_table, trans_nas_bench_101_table,)
from metaopt.nas._budgets import (hypervolume, lagrangian, over_budget, pareto_front, penalized, resource_penalty, within_budget,)
from metaopt.nas._costs import (CostTable, CostTerm, cost_of, cost_table, cost_table_from_json, cost_table_to_json, expected_cost, latency, nas_bench_201_costs, num_params,)
from metaopt.nas._early_stop import CurvatureState, sharpness_stop, skip_count_stop, stopped_by_curvature
from metaopt.nas._genotypes import (Graph, NAS_BENCH_101_PRIMITIVES, canonical, configuration_space, discrete, discretize, from_configuration, from_darts, from_nas_bench_201, genotype_from_json, genotype_to_json, nas_bench_101_hash, nas_bench_201_genotypes, nas_bench_201_string, one_hot, pruned, random_genotype, to_darts, to_nas_bench_201,)
from metaopt.nas._graph_ops import TOKEN_OPS, graph_ops
from metaopt.nas._nas_bench_101 import (discretize_graph, graph_genotype, graph_op, nas_bench_101_cells, nas_bench_101_graph, nas_bench_101_network, nas_bench_101_space,)
from metaopt.nas._ops import (BLOCKS, DARTS_OPS, NAS_BENCH_101_OPS, NAS_BENCH_201_OPS, Op, convolution, convolve, normalized, subsample, uniform,)
from metaopt.nas._relaxations import (Relaxation, auxiliary_skip, beta_decay, decoding, dominant_eigenvalue, edge_normalized, gumbel_softmax, mixing_weights, sigmoid, softmax, uniform_path,)
from metaopt.nas._scores import SCORES, Score, grad_norm, jacob_cov, nwot, snip, synflow
from metaopt.nas._specs import (Cell, DARTS_PRIMITIVES, Edge, ElasticLayer, ElasticNetwork, Genotype as Genotype, Layer, NAS_BENCH_201_PRIMITIVES, Network, Space, check_network, complete_cell, conv_net_space, darts_space, from_json, mlp_space, nas_bench_201_space, to_json,)
from metaopt.nas._supernet import Supernet, init_alpha, supernet

__all__ = [
    "BLOCKS",
    "DARTS_OPS",
    "DARTS_PRIMITIVES",
    "NAS_BENCH_101_OPS",
    "NAS_BENCH_101_PRIMITIVES",
    "NAS_BENCH_201_OPS",
    "NAS_BENCH_201_PRIMITIVES",
    "SCORES",
    "TOKEN_OPS",
    "Benchmark",
    "Cell",
    "CostTable",
    "CostTerm",
    "CurvatureState",
    "Edge",
    "ElasticLayer",
    "ElasticNetwork",
    "Graph",
    "Layer",
    "Network",
    "Op",
    "Relaxation",
    "Score",
    "Space",
    "Supernet",
    "auxiliary_head",
    "auxiliary_skip",
    "beta_decay",
    "canonical",
    "check_network",
    "complete_cell",
    "configuration_space",
    "conv_net_space",
    "convolution",
    "convolve",
    "cost_of",
    "cost_table",
    "cost_table_from_json",
    "cost_table_to_json",
    "crop_and_flip",
    "cutout",
    "darts_space",
    "decoding",
    "discrete",
    "discretize",
    "discretize_graph",
    "dominant_eigenvalue",
    "edge_normalized",
    "expected_cost",
    "from_configuration",
    "from_darts",
    "from_json",
    "from_nas_bench_201",
    "genotype_from_json",
    "genotype_to_json",
    "grad_norm",
    "graph_genotype",
    "graph_op",
    "graph_ops",
    "gumbel_softmax",
    "hypervolume",
    "init_alpha",
    "jacob_cov",
    "lagrangian",
    "latency",
    "load_benchmark",
    "mixing_weights",
    "mlp_space",
    "nas_bench_101_cells",
    "nas_bench_101_graph",
    "nas_bench_101_hash",
    "nas_bench_101_network",
    "nas_bench_101_space",
    "nas_bench_101_table",
    "nas_bench_201_costs",
    "nas_bench_201_genotypes",
    "nas_bench_201_space",
    "nas_bench_201_string",
    "nas_bench_201_table",
    "nas_bench_301_genotype",
    "nas_bench_graph_table",
    "nas_bench_macro_table",
    "normalized",
    "num_params",
    "nwot",
    "one_hot",
    "over_budget",
    "pareto_front",
    "penalized",
    "pruned",
    "random_genotype",
    "read_nas_bench_101",
    "read_nas_bench_201",
    "read_nas_bench_301",
    "resource_penalty",
    "save_benchmark",
    "sharpness_stop",
    "sigmoid",
    "skip_count_stop",
    "snip",
    "softmax",
    "stopped_by_curvature",
    "subsample",
    "supernet",
    "synflow",
    "to_darts",
    "to_json",
    "to_nas_bench_201",
    "trans_nas_bench_101_table",
    "uniform",
    "uniform_path",
    "within_budget",
]
