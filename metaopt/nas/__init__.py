"""Neural architectures: ops, cells and networks as data, supernets with mixing weights, and genotypes.

An op is one operation of a network, such as a convolution. A search makes the choice of ops differentiable: every edge
of a cell computes a weighted sum of its candidate ops, with weights w(α). α is part of the hyperparameters λ.

    spec (`darts_space`, `nas_bench_201_space`, your own `Network`) --`supernet`--> init, apply
    α --relaxation--> weights --`derive_genotype`--> genotype --`discrete`--> spec of one network --`supernet`--> ...

`darts` and related searches combine these parts.
"""

from metaopt._pareto import (
    hypervolume,
    pareto_front,
)
from metaopt.nas._augmentation import (
    crop_and_flip,
    cutout,
)
from metaopt.nas._budgets import (
    resource_penalty,
    within_budget,
)
from metaopt.nas._configurations import (
    configuration_space,
    genotype_from_configuration,
    genotype_to_configuration,
)
from metaopt.nas._costs import (
    CostTable,
    CostTerm,
    cost_table,
    latency,
    num_params,
)
from metaopt.nas._derivation import (
    derive_genotype,
)
from metaopt.nas._genotype_text import (
    genotype_from_text,
    genotype_to_text,
)
from metaopt.nas._genotypes import (
    discrete,
    one_hot,
    op_scores,
    random_genotype,
)
from metaopt.nas._graph_ops import (
    graph_ops,
)
from metaopt.nas._graphs import (
    Graph,
    edge_graph,
)
from metaopt.nas._named_spaces import (
    DARTS_PRIMITIVES,
    conv_net_space,
    darts_space,
    mlp_space,
    nas_bench_201_space,
    nas_bench_macro_space,
    trans_nas_bench_101_space,
)
from metaopt.nas._nas_bench_101 import (
    nas_bench_101_network,
    nas_bench_101_space,
)
from metaopt.nas._ops import (
    BLOCKS,
    DARTS_OPS,
    NAS_BENCH_101_OPS,
    NAS_BENCH_201_OPS,
    NAS_BENCH_MACRO_OPS,
    TRANS_NAS_BENCH_101_OPS,
    Op,
    convolution,
    convolve,
    normalized,
    subsample,
    uniform,
)
from metaopt.nas._relaxations import (
    auxiliary_skip,
    gumbel_softmax,
    mixing_weights,
    sigmoid,
    softmax,
    uniform_path,
)
from metaopt.nas._scores import (
    SCORES,
    gradient_features,
)
from metaopt.nas._specs import (
    Cell,
    Edge,
    ElasticLayer,
    ElasticNetwork,
    Genotype,
    Layer,
    Network,
    complete_cell,
)
from metaopt.nas._supernet import (
    Supernet,
    init_alpha,
    supernet,
)
from metaopt.nas.benchmarks._files import (
    read_nas_bench_101,
    read_nas_bench_201,
    read_nas_bench_301,
)
from metaopt.nas.benchmarks._tables import (
    Benchmark,
    benchmark_table,
)
from metaopt.nas.search._cell_searcher import (
    CellSearcher,
)
from metaopt.nas.search._conv_nets import (
    ConvNets,
    conv_nets,
)
from metaopt.nas.search._darts import (
    beta_darts,
    darts,
    darts_minus,
    gdas,
    implicit_darts,
    pc_darts,
    unrolled_darts,
)
from metaopt.nas.search._early_stopped import (
    darts_plus,
    robust_darts,
)
from metaopt.nas.search._meta_architecture import (
    MetaArchitecture,
    meta_architecture_search,
)
from metaopt.nas.search._one_shot import (
    single_path_one_shot,
)
from metaopt.nas.search._retrain import (
    retraining,
)
from metaopt.nas.search._saved import (
    TrainedMetaArchitecture,
)
from metaopt.nas.search._search import (
    Search,
    architecture_search,
)
from metaopt.nas.search._search_report import (
    ArchitectureScores,
    search_report,
)
from metaopt.nas.search._train import (
    train_loop,
)
from metaopt.nas.search._train_cell_searcher import (
    train_cell_searcher,
)
from metaopt.nas.search._trained_network import (
    TrainedNetwork,
    trained_network,
)
from metaopt.nas.search._training_free import (
    screened_random_search,
    training_free_scores,
)
from metaopt.nas.search._under_budget import (
    under_budget,
)

__all__ = [
    "ArchitectureScores",
    "BLOCKS",
    "Benchmark",
    "Cell",
    "CellSearcher",
    "ConvNets",
    "CostTable",
    "CostTerm",
    "DARTS_OPS",
    "DARTS_PRIMITIVES",
    "Edge",
    "ElasticLayer",
    "ElasticNetwork",
    "Genotype",
    "Graph",
    "Layer",
    "MetaArchitecture",
    "NAS_BENCH_101_OPS",
    "NAS_BENCH_201_OPS",
    "NAS_BENCH_MACRO_OPS",
    "Network",
    "Op",
    "SCORES",
    "Search",
    "Supernet",
    "TRANS_NAS_BENCH_101_OPS",
    "TrainedMetaArchitecture",
    "TrainedNetwork",
    "architecture_search",
    "auxiliary_skip",
    "benchmark_table",
    "beta_darts",
    "complete_cell",
    "configuration_space",
    "conv_net_space",
    "conv_nets",
    "convolution",
    "convolve",
    "cost_table",
    "crop_and_flip",
    "cutout",
    "darts",
    "darts_minus",
    "darts_plus",
    "darts_space",
    "derive_genotype",
    "discrete",
    "edge_graph",
    "gdas",
    "genotype_from_configuration",
    "genotype_from_text",
    "genotype_to_configuration",
    "genotype_to_text",
    "gradient_features",
    "graph_ops",
    "gumbel_softmax",
    "hypervolume",
    "implicit_darts",
    "init_alpha",
    "latency",
    "meta_architecture_search",
    "mixing_weights",
    "mlp_space",
    "nas_bench_101_network",
    "nas_bench_101_space",
    "nas_bench_201_space",
    "nas_bench_macro_space",
    "normalized",
    "num_params",
    "one_hot",
    "op_scores",
    "pareto_front",
    "pc_darts",
    "random_genotype",
    "read_nas_bench_101",
    "read_nas_bench_201",
    "read_nas_bench_301",
    "resource_penalty",
    "retraining",
    "robust_darts",
    "screened_random_search",
    "search_report",
    "sigmoid",
    "single_path_one_shot",
    "softmax",
    "subsample",
    "supernet",
    "train_loop",
    "train_cell_searcher",
    "trained_network",
    "training_free_scores",
    "trans_nas_bench_101_space",
    "under_budget",
    "uniform",
    "uniform_path",
    "unrolled_darts",
    "within_budget",
]
