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


def differ(outputs: jax.Array, outputs_of_blank: jax.Array, query: dict[str, jax.Array]) -> bool:
    """Returns whether outputs [B, T + 1, Q, ...] of examples that `blank` kept differ by more than rounding."""
    real = np.asarray(query["mask"])[:, ::2] > 0
    steps = zip(_outputs_of_steps(outputs, query), _outputs_of_steps(outputs_of_blank, query), strict=True)
    # Each step and each episode is compared separately. The outputs of one that diverges are so large that differences
    # in the others would look small.
    return any(_step_differs(before, after, real) for before, after in steps)


def _outputs_of_steps(outputs: jax.Array, query: dict[str, jax.Array]) -> np.ndarray:
    """[T + 1, B, Q / 2, ...] the outputs of the examples that `blank` kept; NaN for classes that an episode lacks."""
    kept = np.asarray(outputs, np.float64)[:, :, ::2]
    if "class_mask" in query and kept.shape[3:] == query["class_mask"].shape[1:]:
        # Outputs of classes that an episode lacks are often large numbers, next to which all others look equal.
        kept = np.where(np.asarray(query["class_mask"])[:, None, None] > 0, kept, np.nan)
    return np.moveaxis(kept, 1, 0)


def _step_differs(before: np.ndarray, after: np.ndarray, real: np.ndarray) -> bool:
    """Returns whether outputs [B, Q / 2, ...] after one step differ. `real` [B, Q / 2] is False for padding."""
    if not np.array_equal(np.isfinite(before[real]), np.isfinite(after[real])):
        return True
    finite = lambda values: np.where(np.isfinite(values), values, 0).reshape(len(values), -1)
    before_of_episodes = [finite(values[is_real]) for values, is_real in zip(before, real, strict=True)]
    after_of_episodes = [finite(values[is_real]) for values, is_real in zip(after, real, strict=True)]
    # Compare with the spread of most examples' outputs: an offset that all share, or one outlier, would otherwise hide
    # a difference. Also compare with the rounding error of each example.
    spreads = [float(np.quantile(abs(x - np.median(x, axis=0)), 0.9)) if x.size else 0.0 for x in before_of_episodes]
    usual_spread = float(np.median(np.array(spreads)))
    for old, new, spread in zip(before_of_episodes, after_of_episodes, spreads, strict=True):
        rounding = 1e-5 * abs(old).max(axis=1, initial=0, keepdims=True)
        # A single example has no spread.
        if np.any(abs(old - new) > np.maximum(1e-3 * (spread or usual_spread), rounding)):
            return True
    return False
