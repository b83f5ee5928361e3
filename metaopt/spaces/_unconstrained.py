"""The type of unconstrained coordinates: z and λ have different types, so that they cannot be confused."""

import dataclasses
from typing import Any

import jax

from metaopt import base

_HOW_TO_CONVERT = (
    "`spaces.to_constrained(space, z)` converts coordinates to λ. A loss that is written for λ needs an estimator of "
    "`spaces.constrain(problem, space)`."
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Unconstrained:
    """Unconstrained coordinates z of a space, as a pytree node around their tree.

    `to_unconstrained` returns this type. `to_constrained` and the problem that `constrain` returns accept only this
    type. Optimizers, `jax.grad` and `jax.tree` work through it; its leaves have the same paths as those of λ. Reading
    an entry, `z["rate"]`, raises, because a loss that reads an entry expects λ in natural units.

    Args:
      coordinates: structured like the space, with None for fixed leaves.

    >>> import jax
    >>> from metaopt import spaces
    >>> z = spaces.Unconstrained({"rate": 0.5, "seed": None})
    >>> jax.tree.map(lambda x: 2 * x, z)
    Unconstrained(coordinates={'rate': 1.0, 'seed': None})
    >>> z.coordinates["rate"]
    0.5
    """

    coordinates: base.PyTree

    def __getitem__(self, key: Any) -> Any:
        raise ValueError(
            f"These are unconstrained coordinates and not λ: they have no entry {key!r}. {_HOW_TO_CONVERT}"
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"These are unconstrained coordinates and not λ: they have no attribute {name!r}. {_HOW_TO_CONVERT}"
        )

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        paths, structure = jax.tree_util.tree_flatten_with_path(self.coordinates, is_leaf=self._is_below)
        # A single array has an empty path.
        keys = [path[0] if path else jax.tree_util.GetAttrKey("coordinates") for path, _ in paths]
        return list(zip(keys, (child for _, child in paths), strict=True)), structure

    def tree_flatten(self) -> tuple[list[Any], Any]:
        return jax.tree.flatten(self.coordinates, is_leaf=self._is_below)

    @classmethod
    def tree_unflatten(cls, structure: Any, children: Any) -> "Unconstrained":
        return cls(jax.tree.unflatten(structure, children))

    def _is_below(self, node: Any) -> bool:
        # The children are those of `coordinates`, not `coordinates` itself, so that paths are the same as in λ.
        return node is not self.coordinates
