"""The embedding of a table's rows that `predictors.dataset_embedding` and the surrogates of `blackbox` share."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _batches, _checks, base


def init_embedding(key: jax.Array, width: int = 16) -> dict[str, Any]:
    """Parameters of `embed_rows`, in the default type.

    Args:
      key: consumed.
      width: W, of every layer and of the embedding.

    Returns:
      A dict: "entry" {"w", "b"} are W₁ and b₁, "pair" {"w", "b"} are W₂ and b₂, "embedding" is W₃.
    """
    return init_weights(list(jax.random.split(key, 3)), width, jnp.result_type(float))


def init_weights(keys: Sequence[jax.Array], width: int, dtype: Any) -> dict[str, Any]:
    """Parameters of `embed_rows` from three keys."""
    entry_key, pair_key, out_key = keys
    pair_inputs = 2 * width + 1
    return {
        "entry": {"w": jax.random.normal(entry_key, (width,), dtype), "b": jnp.linspace(-2, 2, width, dtype=dtype)},
        "pair": {
            "w": jax.random.normal(pair_key, (pair_inputs, width), dtype) * np.sqrt(2 / pair_inputs),
            "b": jnp.zeros(width, dtype),
        },
        "embedding": jax.random.normal(out_key, (width, width), dtype) / np.sqrt(width),
    }


def embed_rows(params: dict[str, Any], data: base.Data, *, max_rows: int = 256) -> jax.Array:
    """The embedding of `dataset_embedding`: it ignores the order of rows, columns and classes.

    Args:
      params: the parameters, from `init_embedding`.
      data: a dict like `train` of `tasks.to_task`: "x" [N, D] of N rows and D columns, "y" [N] in {0, …, C − 1}, and
        "class_mask" [C]. "mask" [N] and "feature_mask" [D] state which rows and columns are real; by default, all are.
        An "x" with more axes, such as images [N, H, W, c], is flattened to D = H·W·c columns: the position of a pixel
        is ignored.
      max_rows: the maximal number of rows to use; the first real ones are used.

    Returns:
      [W]. It takes memory O((N + C) D W), and is differentiable in `params` and in "x".

    Raises:
      KeyError: at trace time, if `data` lacks an entry.
      ValueError: if "y" is not traced and the label of a real row is not a class.
      AssertionError: at trace time, if "y" or a mask has another shape.
    """
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])
    x = x.reshape(len(x), -1)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(params["entry"]["w"].dtype)
    mask, feature_mask = (
        jnp.asarray(data[name]) if name in data else jnp.ones(num, x.dtype)
        for name, num in zip(("mask", "feature_mask"), x.shape, strict=True)
    )
    chex.assert_shape((y, mask, feature_mask), [(len(x),), (len(x),), (x.shape[1],)])
    _checks.check_labels('The labels "y"', y, len(data["class_mask"]), mask=mask)
    if len(mask) > max_rows:
        first = jnp.argsort(mask <= 0, stable=True)[:max_rows]  # real rows first, wherever they are
        x, y, mask = x[first], y[first], mask[first]
    entry, pair = params["entry"], params["pair"]
    entries = jax.nn.relu(x[..., None] * entry["w"][None, None] + entry["b"][None, None])  # [N, D, W]
    member = _batches.one_hot({"y": y, "mask": mask, "class_mask": data["class_mask"]}, x.dtype)  # [N, C]
    count, total = member.sum(0), mask.sum()
    by_class = jnp.einsum("nc,ndw->cdw", member, entries) / jnp.maximum(count, 1)[:, None, None]
    overall = jnp.einsum("n,ndw->dw", mask, entries) / total
    share = count / total
    pairs = jnp.concatenate(
        [
            by_class,
            jnp.broadcast_to(overall[None], by_class.shape),
            jnp.broadcast_to(share[:, None, None], (*by_class.shape[:2], 1)),
        ],
        axis=-1,
    )
    hidden = jax.nn.relu(pairs @ pair["w"] + pair["b"][None, None]) @ params["embedding"]  # [C, D, W]
    return jnp.einsum("c,d,cdw->w", share, feature_mask / feature_mask.sum(), hidden)
