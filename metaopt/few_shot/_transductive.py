"""Detects transductive methods, whose outputs for one query example depend on the other query examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base


def of_rows(function: Callable, name: str, tree: base.PyTree, size: int, axis: int = 0) -> base.PyTree:
    """Applies a function to the leaves that have a value for each of `size` examples."""

    def one(x):
        return function(x) if jnp.ndim(x) > axis and x.shape[axis] == size else x

    return tree if name in ("class_mask", "num_rows") else jax.tree.map(one, tree)


def blank(query: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sets every other example of a chunk of query sets [B, Q, ...] to zero."""
    size = query["y"].shape[1]

    def without(x):
        odd = (jnp.arange(size) % 2 == 1).reshape(1, -1, *[1] * (x.ndim - 2))
        return jnp.where(odd, jnp.zeros_like(x), x)

    kept = ("y", "mask")
    return {k: x if k in kept else of_rows(without, k, x, size, axis=1) for k, x in query.items()}


def differ(outputs: jax.Array, again: jax.Array, query: dict[str, jax.Array]) -> bool:
    """Returns whether outputs [B, T + 1, Q, ...] of examples that `blank` kept differ by more than rounding."""
    real = np.asarray(query["mask"])[:, ::2] > 0
    both = [np.moveaxis(np.asarray(o, np.float64), 1, 2)[:, ::2] for o in (outputs, again)]  # [B, Q/2, T + 1, ...]
    if "class_mask" in query and both[0].shape[3:] == query["class_mask"].shape[1:]:
        # Outputs of classes that an episode lacks are often large numbers, next to which all others look equal.
        among = np.asarray(query["class_mask"])[:, None, None] > 0
        both = [np.where(among, o, np.nan) for o in both]
    # Step by step, and episode by episode: next to a step or an episode that diverges, all others look small.
    for before, after in zip(*(np.moveaxis(o, 2, 0) for o in both), strict=True):
        if not np.array_equal(np.isfinite(before[real]), np.isfinite(after[real])):
            return True
        pairs = [
            [np.where(np.isfinite(o), o, 0).reshape(len(o), -1) for o in (b[r], a[r])]
            for b, a, r in zip(before, after, real, strict=True)
        ]
        # Compare with the spread of most examples' outputs: an offset that all share, or one outlier, would otherwise
        # hide a difference. Also compare with the rounding error of each example.
        spreads = [float(np.quantile(abs(b - np.median(b, axis=0)), 0.9)) if b.size else 0.0 for b, _ in pairs]
        usual = float(np.median(np.array(spreads)))
        for (b, a), spread in zip(pairs, spreads, strict=True):
            rounding = 1e-5 * abs(b).max(axis=1, initial=0, keepdims=True)
            if np.any(abs(b - a) > np.maximum(1e-3 * (spread or usual), rounding)):  # a single example has no spread
                return True
    return False
