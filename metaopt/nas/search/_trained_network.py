"""A trained network that predicts: its weights, and the statistics of training rows that it normalizes by.

    state, losses = train_loop(made.loop, data, ...)
    network = made.finish(state, data)         # or `trained_network(supernet, params, data)`
    network.predict(x)                         # a batch of one row, or of any number of rows
    metaopt.save(path, network)                # `metaopt.load(path, ops=...)` reads it

Training normalizes by the batch. A prediction must not do so: the answer for a row would depend on the other rows of
the batch. After training, the moments of every normalization are therefore computed over training rows, as one batch,
and stored. There are three reasons to prefer these statistics to running averages of training:

- they are exact after any number of steps;
- they hold for any mixing weights of a supernet, while no single running average does;
- training carries no additional state.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _batches, _files, _saving, base, inner
from metaopt.nas import _ops, _specs, _supernet

_BATCH = 256  # rows per prediction batch
_OTHER_UNITS = 8  # inputs this many times larger than those of training are probably in other units


class TrainedNetwork(NamedTuple):
    """A network whose output for a row depends only on this row; `trained_network` makes it.

    Attributes:
      supernet: the `nas.supernet` of the network's spec.
      params: the network's weights.
      weights: mixing weights of a supernet, kind -> [edges, ops]; None for a discrete network.
      statistics: mean and variance of every normalization, over training rows.
      largest: max |x| of these training rows.
      apply: `(x) -> [N, num_outputs]`, the function of `outputs`. It does not compare x with `largest`.

    `outputs`, `predict` and `accuracy` warn if x has entries 8 times larger than those of the training rows, such as
    pixels from 0 to 255 after a training with pixels from 0 to 1.
    """

    supernet: _supernet.Supernet
    params: base.Params
    weights: Mapping[str, Any] | None
    statistics: list[Any]
    largest: float
    apply: Callable[[Any], np.ndarray]

    def outputs(self, x: Any) -> np.ndarray:
        """Computes the outputs of each row, such as logits, on the host.

        Args:
          x: [N, *in_shape], with any N.

        Returns:
          [N, num_outputs]; [N, positions..., num_outputs] for a network without pooling.

        Raises:
          ValueError: if x has another shape.
        """
        _warn_of_units(x, self.largest, stacklevel=3)
        return self.apply(x)

    def predict(self, x: Any) -> np.ndarray:
        """Predicts the class of each row: the index of the largest output.

        Args:
          x: [N, *in_shape]. For one image, pass `image[None]`.

        Returns:
          [N] integers; [N, positions...] for a network without pooling.

        Raises:
          ValueError: if x has another shape, or an output is NaN.
        """
        _warn_of_units(x, self.largest, stacklevel=3)
        outputs = self.apply(x)
        wrong = np.isnan(outputs).any(-1)
        if wrong.any():
            raise ValueError(
                f"The outputs of {int(wrong.sum())} of {wrong.size} rows are NaN, so they have no class: `x` has a NaN "
                "there, or the training diverged (take a smaller rate)."
            )
        return outputs.argmax(-1)

    def accuracy(self, data: Mapping[str, Any]) -> float:
        """Returns the share of rows with a correct prediction.

        Args:
          data: {"x" [N, *in_shape], "y"}. Labels are integers or booleans, shaped like the outputs without their last
            axis. With "mask" [N] or "num_rows", only real rows count. With "class_mask" [C], only real classes can be
            predicted.

        Returns:
          In [0, 1]. A row with a NaN among its outputs counts as wrong.

        Raises:
          ValueError: if x and y have different numbers of rows or no rows, or if y has another type or shape. Also if
            "mask" is not [N] or has no real row, if "class_mask" is not [C], or if a label is not a class.
        """
        rows = _real_rows(data)
        x, y = np.asarray(data["x"]), np.asarray(data["y"])
        if not len(x):
            raise ValueError(f'"x" must have at least one row; got shape {x.shape}.')
        if data.get("mask") is not None and np.shape(data["mask"]) != x.shape[:1]:
            raise ValueError(
                f'"mask" must be [N] = {x.shape[:1]}, 1 for a real row and 0 for padding; got shape '
                f"{np.shape(data['mask'])}."
            )
        if not len(rows):
            raise ValueError('"mask" and "num_rows" leave no real row.')
        _warn_of_units(x[rows], self.largest, stacklevel=3)
        outputs = self.apply(x[rows])
        is_real = np.isin(np.arange(len(x)), rows)
        _batches.check_labels({**data, "mask": is_real}, outputs.shape[-1], (len(x), *outputs.shape[1:-1]))
        if data.get("class_mask") is not None:
            outputs = np.where(np.asarray(data["class_mask"]) > 0, outputs, -np.inf)
        right = (outputs.argmax(-1) == y[rows]) & ~np.isnan(outputs).any(-1)
        return float(right.mean())


def trained_network(
    supernet: _supernet.Supernet,
    params: base.Params,
    data: Mapping[str, Any],
    *,
    weights: Mapping[str, Any] | None = None,
    num_rows: int = 1_024,
) -> TrainedNetwork:
    """Computes the statistics that a trained network normalizes by, so that it can predict.

        mean, variance = moments of each normalization's input over training rows, taken as one batch

    The rows are not augmented, and no edges are dropped. A network without normalization has no statistics.

    Args:
      supernet: `nas.supernet` of a discrete network or of a space, such as `search.supernet`.
      params: its trained weights.
      data: the training data, {"x": [N, *in_shape]}. With "mask" [N] or "num_rows", only real rows are used, as by
        `inner.minibatch`.
      weights: mixing weights of a supernet: `search.weights(alpha)`, or `nas.one_hot(network, genotype)` for one
        architecture with the supernet's weights. None for a discrete network.
      num_rows: R, the largest number of training rows used for the statistics, at least 2. If there are more rows, R
        of them are drawn, always the same ones. The standard error of the means is about 1/√R of a channel's standard
        deviation, and less if there are positions. It takes the memory of one forward pass of R rows.

    Returns:
      A `TrainedNetwork`.

    Raises:
      ValueError: if `data` is not a dict with "x" [N, *in_shape], if there are fewer than two real rows, or if
        `num_rows < 2`. Also if the supernet is `single_path` and `weights` are not one-hot. Also if an op computes over
        the batch without `nas.normalized`, so that the output for a row still depends on the other rows.

    Sources: Guo et al., ECCV 2020, https://arxiv.org/abs/1904.00420 (statistics of each architecture in a supernet);
      Wu & Johnson, 2021, https://arxiv.org/abs/2105.07576, Sec. 3 (statistics of training rows or running averages)

    >>> import jax, numpy as np
    >>> from metaopt import nas
    >>> network = nas.Network(
    ...     {}, (nas.Layer("linear", 4), nas.Layer("norm_relu", 4)), num_outputs=2
    ... )
    >>> supernet = nas.supernet(network, (3,), ops=nas.BLOCKS)
    >>> rows = np.random.default_rng(0).normal(size=(32, 3))
    >>> trained = nas.trained_network(
    ...     supernet, supernet.init(jax.random.key(0)), {"x": rows}
    ... )
    >>> bool(trained.predict(rows[5:6])[0] == trained.predict(rows)[5])
    True
    """
    rows = _real_rows(data)
    _supernet.check_shape("data['x']", data["x"], supernet.in_shape)
    if min(len(rows), num_rows) < 2:
        raise ValueError(f"Statistics need at least two real rows; got {len(rows)} and `num_rows={num_rows}`.")
    if len(rows) > num_rows:
        rows = np.sort(rows[np.asarray(jax.random.permutation(jax.random.key(0), len(rows))[:num_rows])])
    x = np.asarray(data["x"])[rows]
    jax.eval_shape(lambda x: supernet.statistics(params, weights, x), x)  # checks mixing weights, which jit would trace
    statistics = jax.jit(inner.im2col(supernet.statistics, only_on_cpu=True))(params, weights, x)
    network = _network(supernet, params, weights, statistics, float(np.abs(np.asarray(x, np.float32)).max()))
    _check_independent(network, x[:_BATCH])
    return network


def _encode(network: TrainedNetwork) -> tuple[dict[str, Any], dict[str, Any]]:
    supernet = network.supernet
    header = {
        "network": _specs.network_to_dict(supernet.network),
        "in_shape": [int(size) for size in supernet.in_shape],
        "single_path": bool(supernet.single_path),
        "partial": int(supernet.partial),
        "largest": network.largest,
    }
    trees = {"params": network.params, "statistics": network.statistics, "weights": network.weights}
    arrays = {}
    for kind, tree in trees.items():
        arrays |= {name: _saving.storable(x) for name, x in _saving.named_leaves(kind, tree).items()}
    _check_finite(arrays)
    return header, arrays


def _decode(header: dict[str, Any], file: _files.Npz, *, ops: Mapping[str, _ops.Op]) -> TrainedNetwork:
    supernet, templates = _templates(header, file.specs, ops)
    shapes = {name: size for kind, tree in templates.items() for name, size in _saving.shapes(kind, tree).items()}
    arrays = file.floats(shapes, missing=_may_be_missing)
    _check_finite(arrays)
    trees = {kind: _saving.tree_from_leaves(kind, arrays, tree) for kind, tree in templates.items()}
    trees = jax.tree.map(jnp.asarray, trees)
    largest = float(header["largest"])
    if not 0 <= largest < np.inf:
        raise ValueError(f"its largest input is {largest}")
    return _network(supernet, trees["params"], trees["weights"], trees["statistics"], largest)


def _templates(
    header: dict[str, Any], specs: Mapping[str, Any], ops: Mapping[str, _ops.Op]
) -> tuple[_supernet.Supernet, Any]:
    """Returns the supernet and the shapes and types of its params, weights and statistics."""
    options = {name: header[name] for name in ("single_path", "partial")}
    network, in_shape = _specs.network_from_dict(header["network"]), tuple(header["in_shape"])
    try:
        supernet = _supernet.supernet(network, in_shape, ops=ops, **options)
    except KeyError as error:
        raise ValueError(f"`ops` has no op {error}; pass the ops with which the network was made") from error
    params = jax.eval_shape(supernet.init, jax.random.key(0))
    weights = None
    if any(name.startswith("weights") for name in specs):
        sizes = {kind: (len(cell.edges), len(cell.edges[0].ops)) for kind, cell in network.cells.items()}
        weights = {kind: jax.ShapeDtypeStruct(size, jnp.zeros(0).dtype) for kind, size in sizes.items()}
    x = jax.ShapeDtypeStruct((2, *in_shape), jnp.zeros(0).dtype)
    statistics = jax.eval_shape(supernet.statistics, params, weights, x)
    return supernet, {"params": params, "weights": weights, "statistics": statistics}


def _network(supernet, params, weights, statistics, largest: float) -> TrainedNetwork:
    apply = lambda state, x: supernet.apply(state[0], state[1], x, statistics=state[2])
    run = jax.jit(inner.im2col(apply, only_on_cpu=True))
    dtype = jnp.result_type(*jax.tree.leaves(params))

    def apply_to_rows(x):
        x, parts = np.asarray(x), []
        _supernet.check_shape("x", x, supernet.in_shape)
        x = x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # convolutions need equal types
        for start in range(0, max(len(x), 1), _BATCH):
            part = x[start : start + _BATCH]
            # Rounds up to a power of two, because every new size is compiled.
            size = 1 << max(len(part) - 1, 0).bit_length()
            padded = np.concatenate([part, np.zeros((size - len(part), *x.shape[1:]), x.dtype)])
            parts.append(np.asarray(run((params, weights, statistics), padded))[: len(part)])
        return np.concatenate(parts)

    return TrainedNetwork(supernet, params, weights, statistics, largest, apply_to_rows)


def _warn_of_units(x: Any, largest: float, *, stacklevel: int) -> None:
    """Warns if x is much larger than the training rows. With `stacklevel=3`, the warning names the caller's caller."""
    size_of_x = float(np.abs(np.asarray(x, np.float32)).max(initial=0))
    if size_of_x > _OTHER_UNITS * largest:
        warnings.warn(
            f"`x` has an entry of size {size_of_x:g}, and the training rows had none above {largest:g}. Scale `x` "
            "like the training rows; otherwise the predictions are wrong.",
            stacklevel=stacklevel,
        )


def _real_rows(data: Mapping[str, Any]) -> np.ndarray:
    """Returns the indices of the rows that are not padding: those that `inner.minibatch` draws in training."""
    _batches.row_mask(data)  # checks its shape
    rows = np.arange(len(data["x"]))
    if data.get("mask") is not None:  # [N], or [N, positions] with rows that are masked throughout
        rows = np.flatnonzero((np.asarray(data["mask"]) > 0).reshape(len(rows), -1).any(axis=1))
    return rows[: int(data["num_rows"])] if "num_rows" in data else rows


def _check_independent(network: TrainedNetwork, x: np.ndarray) -> None:
    """Raises ValueError if the outputs of the even rows change when the odd rows are set to zero."""
    others = np.arange(len(x)) % 2 == 1
    blank = np.where(others.reshape(-1, *[1] * (x.ndim - 1)), np.zeros_like(x), x)
    before, after = (network.apply(rows)[~others] for rows in (x, blank))
    if not np.allclose(before, after, rtol=1e-3, atol=1e-3 * np.nanmax(abs(before), initial=0), equal_nan=True):
        raise ValueError(
            "The outputs of a row still depend on the other rows of the batch, because one of your own ops computes "
            "over the batch. Normalize with `nas.normalized` in this op."
        )


def _may_be_missing(name: str) -> bool:
    return name.startswith("statistics")


def _check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if a weight is not finite or a variance is negative. Ops that never run have NaN statistics."""
    for name, array in arrays.items():
        _files.check_finite(name, array, missing=_may_be_missing(name))
        if name.endswith("variance") and (array < 0).any():
            raise ValueError(f"the array {name} has negative entries")


_saving.register(
    _saving.Kind(
        "trained_network",
        TrainedNetwork,
        _encode,
        _decode,
        parts={"ops": "the ops that the network was built with, such as `nas.DARTS_OPS`"},
    )
)
