"""Spaces of the literature, and spaces of sizes."""

from collections.abc import Sequence

from metaopt.nas._specs import (
    Cell,
    Edge,
    ElasticLayer,
    ElasticNetwork,
    Layer,
    Network,
    complete_cell,
)

DARTS_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NAS_BENCH_201_PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
TRANS_NAS_BENCH_101_PRIMITIVES = ("none", "skip_connect", "conv1x1", "conv3x3")
NAS_BENCH_MACRO_PRIMITIVES = ("identity", "MB3_K3", "MB6_K5")
NAS_BENCH_101_PRIMITIVES = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")


def darts_space(
    num_outputs: int = 10,
    *,
    channels: int = 16,
    num_cells: int = 8,
    num_nodes: int = 4,
    primitives: Sequence[str] = DARTS_PRIMITIVES,
) -> Network:
    """The DARTS space: normal cells, and reduction cells at a third and two thirds of the depth.

    Args:
      num_outputs: number of classes.
      channels: channels of the first cells; the stem has three times as many, and reductions double them.
      num_cells: number of all cells.
      num_nodes: number of nodes of a cell, besides its two inputs.
      primitives: the candidates on every edge; ("skip_connect", "sep_conv_3x3") is the space S2 of RobustDARTS.

    Returns:
      A `Network` over `DARTS_OPS`, of two kinds, "normal" and "reduce", by default with mixing weights [14, 8] each.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055
    """
    cell = complete_cell(num_nodes, primitives, num_inputs=2)._replace(output=tuple(range(2, 2 + num_nodes)))
    layers, width = [Layer("stem", 3 * channels)], channels
    for i in range(num_cells):
        reduces = i in (num_cells // 3, 2 * num_cells // 3)
        width *= 2 if reduces else 1
        layers.append(Layer("reduce", width, 2) if reduces else Layer("normal", width))
    kinds = {layer.name for layer in layers}
    cells = {kind: cell for kind in ("normal", "reduce") if kind in kinds}
    return Network(cells, tuple(layers), num_outputs)


def nas_bench_201_space(num_outputs: int = 10, *, channels: int = 16, cells_per_stage: int = 5) -> Network:
    """The space of NAS-Bench-201: three stages of one kind of cell with four nodes, and residual blocks between them.

    Args:
      num_outputs: number of classes.
      channels: C of the first stage; the benchmark has 16.
      cells_per_stage: N; the benchmark has 5.

    Returns:
      A `Network` over `NAS_BENCH_201_OPS`, of the single kind "cell" with mixing weights [6, 5]. The edges are 0→1,
      0→2, 1→2, 0→3, 1→3, 2→3. A genotype takes the argmax of each edge separately.

    Source: Dong & Yang, ICLR 2020, https://arxiv.org/abs/2001.00326
    """
    stage = lambda width: [Layer("cell", width)] * cells_per_stage
    layers = [Layer("stem", channels), *stage(channels)]
    for width in (2 * channels, 4 * channels):
        layers += [Layer("residual", width, 2), *stage(width)]
    cell = complete_cell(3, NAS_BENCH_201_PRIMITIVES, preprocess=False)
    return Network({"cell": cell}, (*layers, Layer("norm_relu", 4 * channels)), num_outputs, keep=None)


def trans_nas_bench_101_space(num_outputs: int = 10, *, channels: int = 64, cells_per_module: int = 2) -> Network:
    """The micro space of TransNAS-Bench-101: five modules of one kind of cell.

    The first, third and fifth module are reductions. A reduction doubles the channels and halves the positions, on the
    edges from the input of its first cell. The macro space exists only as a table: the shapes of its networks depend on
    the choices, and the terms of a mixture must have one shape.

    Args:
      num_outputs: number of classes or targets; the benchmark has its own decoders for tasks with outputs at every
        pixel.
      channels: C of the stem; the reductions after it double C three times. The benchmark has 64.
      cells_per_module: number of cells per module; the benchmark has 2.

    Returns:
      A `Network` over `TRANS_NAS_BENCH_101_OPS`, of the single kind "cell" with mixing weights [6, 4]. The edges are as
      in `nas_bench_201_space`. A `Benchmark` of this space takes its genotypes directly.

    Source: Duan et al., CVPR 2021, https://arxiv.org/abs/2105.11871
    """
    layers = [Layer("stem", -(-channels // 2), 2), Layer("conv3x3", channels, 2)]
    for i in range(5):
        width = channels * 2 ** (i // 2 + 1)
        layers += [Layer("cell", width, 1 if i % 2 else 2), *[Layer("cell", width)] * (cells_per_module - 1)]
    cell = complete_cell(3, TRANS_NAS_BENCH_101_PRIMITIVES, preprocess=False)
    return Network({"cell": cell}, tuple(layers), num_outputs, keep=None)


def nas_bench_macro_space(num_outputs: int = 10, *, channels: int = 32, features: int = 1280) -> Network:
    """The space of NAS-Bench-Macro: eight layers, each an identity or one of two inverted residuals.

    Each layer is chosen separately. The first, third and sixth layer double the channels and halve the positions. The
    layers form a single path, so dropping one would leave nothing. `nas.retraining` therefore takes only `drop_path=0`.

    Args:
      num_outputs: number of classes.
      channels: channels of the stem; the benchmark has 32.
      features: channels of the last convolution; the benchmark has 1,280.

    Returns:
      A `Network` over `NAS_BENCH_MACRO_OPS`, of the kinds "block0" to "block7" with mixing weights [1, 3] each. A
      `Benchmark` of this space takes its genotypes directly.

    Source: Su et al., CVPR 2021, https://arxiv.org/abs/2103.11922
    """
    layers, width = [Layer("stem_relu", channels)], channels
    for i in range(8):
        halves = i in (0, 2, 5)
        width *= 2 if halves else 1
        layers.append(Layer(f"block{i}", width, 2 if halves else 1))
    cell = Cell(1, (Edge(0, 1, NAS_BENCH_MACRO_PRIMITIVES),), (1,), preprocess=False)
    layers.append(Layer("last_relu", features))
    return Network({f"block{i}": cell for i in range(8)}, tuple(layers), num_outputs, keep=None)


def conv_net_space(
    num_outputs: int = 10,
    *,
    widths: Sequence[int] = (16, 32, 48, 64),
    kernels: Sequence[int] = (3, 5, 7),
    depths: Sequence[int] = (1, 2),
    hidden: Sequence[int] = (256, 512, 1024),
    norm: str | None = None,
) -> ElasticNetwork:
    """Conv–ReLU–Pool–Conv–ReLU–Pool–Flatten–Linear with all sizes searched, for images, sequences and volumes.

    Args:
      num_outputs: number of classes.
      widths: candidates for the channels of both convolutions.
      kernels: candidates for their windows.
      depths: candidates for the number of Conv–ReLU before each pool; (1,) gives the network of the first line.
      hidden: candidates for the features of the linear layer (with ReLU). Another linear layer gives the outputs.
      norm: normalization of the convolutions, as for `ElasticLayer`.

    Returns:
      An `ElasticNetwork`: 1,728 networks by default.

    >>> from metaopt import nas
    >>> network = nas.conv_net_space(
    ...     3, widths=(2, 4), kernels=(3,), depths=(1,), hidden=(8,)
    ... )
    >>> list(network.layers)
    ['conv1', 'pool1', 'conv2', 'pool2', 'flatten', 'linear']
    """
    conv = ElasticLayer("conv", tuple(widths), tuple(kernels), tuple(depths), norm=norm)
    pool = ElasticLayer("max_pool", stride=2)
    layers = {"conv1": conv, "pool1": pool, "conv2": conv, "pool2": pool, "flatten": ElasticLayer("flatten")}
    return ElasticNetwork({**layers, "linear": ElasticLayer("linear", tuple(hidden))}, num_outputs)


def mlp_space(
    num_outputs: int,
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (1, 2, 3, 4),
    norm: str | None = None,
) -> ElasticNetwork:
    """Linear–ReLU layers for rows of a table, with a searched depth and one width for all layers.

    Args:
      num_outputs: number of classes, or of targets.
      widths: candidates for the number of features.
      depths: candidates for the number of hidden layers.
      norm: as for `ElasticLayer`.

    Returns:
      An `ElasticNetwork`.
    """
    return ElasticNetwork({"linear": ElasticLayer("linear", tuple(widths), (), tuple(depths), 1, norm)}, num_outputs)
