"""Functions of a whole space: each applies one operation to every leaf of the tree.

Unconstrained coordinates are marked by `Unconstrained` and have the structure of the space, with None for fixed leaves.
Every tree is first matched with the space, so that an error names the entry, the expected value and the actual one.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _proposals, _tuned_space, base
from metaopt._jaxpr import Tracer
from metaopt.spaces._leaves import Leaf
from metaopt.spaces._unconstrained import Unconstrained


def sample(key: jax.Array, space: base.PyTree) -> base.HyperParams:
    """Draws one λ, each leaf independently from its own distribution; `jax.vmap` over keys draws many.

    Args:
      key: consumed.
      space: a tree of leaves.

    Returns:
      λ, of JAX's default floating-point type. Integers and choices are relaxed (see `discretize`), and fixed leaves are
      their value.

    Raises:
      ValueError: if the space has a leaf of another kind.

    >>> import jax
    >>> from metaopt import spaces
    >>> space = {
    ...     "rate": spaces.interval(1e-4, 1e-1, log=True),
    ...     "momentum": spaces.fixed(0.9),
    ... }
    >>> many = jax.vmap(lambda key: spaces.sample(key, space))(
    ...     jax.random.split(jax.random.key(0), 5)
    ... )
    >>> many["rate"].shape, many["momentum"].shape
    ((5,), (5,))
    """
    leaves, treedef = _flatten(space)
    # Each leaf has a key, tuned or not, so that fixing one leaf does not change the draws of the others.
    keys = jax.random.split(key, max(1, len(leaves)))
    return treedef.unflatten([leaf.sample(key) for (_, leaf), key in zip(leaves, keys, strict=False)])


def default(space: base.PyTree) -> base.HyperParams:
    """Returns λ at the start of a search: the default of every leaf, in JAX's default floating-point type.

    These are arrays. For a black box, `spaces.configuration(space, spaces.default(space))` has plain values, such as
    the integer 20 instead of an array.

    Args:
      space: a tree of leaves.

    Returns:
      λ, like a sample.

    Raises:
      ValueError: if the space has a leaf of another kind.

    >>> from metaopt import spaces
    >>> λ = spaces.default(
    ...     {"rate": spaces.interval(1e-4, 1e-2, log=True), "mix": spaces.simplex(4)}
    ... )
    >>> round(float(λ["rate"]), 6), λ["mix"].tolist()
    (0.001, [0.25, 0.25, 0.25, 0.25])
    """
    leaves, treedef = _flatten(space)
    return treedef.unflatten([leaf.default_value() for _, leaf in leaves])


def to_constrained(space: base.PyTree, unconstrained: Unconstrained) -> base.HyperParams:
    """Returns λ from unconstrained coordinates: the bijection of every leaf, applied entry by entry.

    It is differentiable in both modes, to any order. A coordinate so large that λ is at a bound has a zero gradient,
    not NaN.

    Args:
      space: a tree of leaves.
      unconstrained: z, structured like the space with None for fixed leaves; a leaf is [*value_shape].

    Returns:
      λ in natural units, structured like the space, of the types of z; fixed leaves are their value.

    Raises:
      ValueError: if z is not marked as `Unconstrained`, for example because it is λ in natural units.
      ValueError: if z does not fit the space.

    >>> import jax
    >>> from metaopt import spaces
    >>> space = {
    ...     "rate": spaces.positive(0.1),
    ...     "dropout": spaces.interval(0, 1),
    ...     "epochs": spaces.fixed(3),
    ... }
    >>> z = spaces.to_unconstrained(space, spaces.default(space))
    >>> {
    ...     name: value if value is None else float(value)
    ...     for name, value in z.coordinates.items()
    ... }
    {'dropout': 0.0, 'epochs': None, 'rate': 0.0}
    >>> grads = jax.grad(lambda z: spaces.to_constrained(space, z)["dropout"])(z)
    >>> float(grads.coordinates["dropout"]), grads.coordinates["epochs"]
    (0.25, None)
    """
    matched, treedef = _match(space, unconstrained, constrained=False)
    _tuned_space.note(space)
    return treedef.unflatten([leaf.to_constrained(z) for _, leaf, z in matched])


def to_unconstrained(space: base.PyTree, hyperparams: base.HyperParams) -> Unconstrained:
    """Returns unconstrained coordinates from λ, the inverse of `to_constrained`.

    A value at a bound (within the type's eps of the range) has no finite coordinate. It is moved inside, by 0.001 of
    the (log) range. There the derivative of λ in z is 0.001 of the range, so a gradient that points inward can move λ
    away from the bound. A zero weight in a simplex of n weights becomes 0.001/n. All other values are kept. The
    coordinates of a simplex are centered.

    Args:
      space: a tree of leaves.
      hyperparams: λ in natural units, structured like the space; integers may be relaxed or not.

    Returns:
      z, structured like the space with None for fixed leaves. Its types are those of λ if they are floating-point. A
      traced value outside the range of its leaf cannot raise: its coordinate is NaN.

    Raises:
      ValueError: if λ does not fit the space, or is already `Unconstrained`.
      ValueError: if an untraced value is outside the range of its leaf, or is not the value of a fixed leaf, up to a
        few rounding errors.

    >>> from metaopt import spaces
    >>> spaces.to_unconstrained({"momentum": spaces.interval(0, 1)}, {"momentum": 2.0})
    Traceback (most recent call last):
      ...
    ValueError: λ lies outside the space at `momentum`: it must be between 0.0 and 1.0; got 2.0. ...
    """
    matched, treedef = _match(space, hyperparams)
    _check_range(matched, jax.tree.leaves(hyperparams))
    return Unconstrained(treedef.unflatten([_coordinate(leaf, value) for _, leaf, value in matched]))


def discretize(space: base.PyTree, hyperparams: base.HyperParams) -> base.HyperParams:
    """Returns λ for code without a gradient: integers rounded to int32, simplexes one-hot at the largest weight.

    Args:
      space: a tree of leaves.
      hyperparams: λ, structured like the space.

    Returns:
      λ, with integer leaves rounded, clipped to their bounds and int32; simplexes and choices one-hot; fixed leaves at
      their value; the rest unchanged. The discrete entries have no gradient.

    Raises:
      ValueError: if λ does not fit the space.

    >>> import jax.numpy as jnp
    >>> from metaopt import spaces
    >>> space = {"layers": spaces.integer(1, 8), "op": spaces.simplex(3)}
    >>> λ = spaces.discretize(space, {"layers": 2.7, "op": jnp.array([0.2, 0.7, 0.1])})
    >>> int(λ["layers"]), λ["op"].tolist()
    (3, [0.0, 1.0, 0.0])
    """
    matched, treedef = _match(space, hyperparams)
    return treedef.unflatten([leaf.discretize(value) for _, leaf, value in matched])


def encode(space: base.PyTree, hyperparams: base.HyperParams) -> jax.Array:
    """Returns λ as one vector in the unit cube, for surrogates. `sample` is uniform in it, except in weights.

    Intervals are encoded as their fraction of the (log) range. `real` and `positive` become Φ(z), the normal cumulative
    distribution. A simplex becomes its weights. Integers may be relaxed or rounded. Fixed leaves are omitted. A value
    outside the range, for example from a record of another space, is encoded as the nearest bound.

    Args:
      space: a tree of leaves.
      hyperparams: λ, structured like the space.

    Returns:
      [num_dims] in [0, 1], ordered like `names`.

    Raises:
      ValueError: if λ does not fit the space.

    >>> from metaopt import spaces
    >>> space = {
    ...     "rate": spaces.interval(1e-4, 1.0, log=True),
    ...     "layers": spaces.integer(1, 4),
    ... }
    >>> (
    ...     spaces.names(space),
    ...     [
    ...         round(x, 3)
    ...         for x in spaces.encode(space, {"rate": 0.1, "layers": 1}).tolist()
    ...     ],
    ... )
    (('layers', 'rate'), [0.125, 0.75])
    """
    matched, _ = _match(space, hyperparams)
    parts = [leaf.encode(_floating(value)) for _, leaf, value in matched if leaf.tuned]
    if not parts:
        return jnp.zeros((0,))
    return jnp.concatenate([jnp.ravel(part) for part in parts])


def num_dims(space: base.PyTree) -> int:
    """Returns the length of the encoding: the number of entries of tuned leaves, including all weights of a simplex.

    Args:
      space: a tree of leaves.

    Returns:
      A Python int.

    Raises:
      ValueError: if the space has a leaf of another kind.
    """
    return sum(int(np.prod(leaf.value_shape)) for _, leaf in _flatten(space)[0] if leaf.tuned)


def names(space: base.PyTree) -> tuple[str, ...]:
    """Returns a name for each dimension of the encoding: its path, with an index if the leaf has a shape.

    Args:
      space: a tree of leaves.

    Returns:
      `num_dims` strings, ordered like `encode`.

    Raises:
      ValueError: if the space has a leaf of another kind.

    >>> from metaopt import spaces
    >>> spaces.names(
    ...     {
    ...         "adam": {"rate": spaces.positive(1e-3)},
    ...         "mix": spaces.simplex(2),
    ...         "seed": spaces.fixed(0),
    ...     }
    ... )
    ('adam.rate', 'mix[0]', 'mix[1]')
    """
    result = []
    for path, leaf in _flatten(space)[0]:
        if leaf.tuned:
            for index in np.ndindex(leaf.value_shape):
                result.append(_name(path) + (f"[{','.join(map(str, index))}]" if index else ""))
    return tuple(result)


def at_bounds(space: base.PyTree, hyperparams: base.HyperParams, *, tol: float = 1e-2) -> base.PyTree:
    """Returns which leaves are at a bound.

    Widen the range of an interval or integer at a bound. A simplex at a bound has collapsed to one weight.

    Args:
      space: a tree of leaves.
      hyperparams: λ, structured like the space.
      tol: the largest distance from a bound, as a fraction of the (log) range; in [0, 0.5).

    Returns:
      Structured like the space, [*shape] bool. Intervals and integers are true within `tol` of a bound. Simplexes are
      true if one weight is at least 1 − `tol`. Unbounded and fixed leaves are false.

    Raises:
      ValueError: if λ does not fit the space.

    >>> from metaopt import spaces
    >>> reached = spaces.at_bounds(
    ...     {"rate": spaces.interval(1e-4, 1.0, log=True)}, {"rate": 0.99}
    ... )
    >>> bool(reached["rate"])
    True
    """
    matched, treedef = _match(space, hyperparams)
    return treedef.unflatten(
        [leaf.at_bounds(_floating(value) if leaf.tuned else value, tol) for _, leaf, value in matched]
    )


def _flatten(space):
    """[(path, leaf)] and the structure of a space. Raises ValueError if a leaf is not a `Leaf`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(space)
    for path, leaf in leaves:
        if not isinstance(leaf, Leaf):
            raise ValueError(
                f"Every leaf of a space must be made by `real`, `positive`, `interval`, `integer`, "
                f"`simplex`, `choice` or `fixed`; got {leaf!r} at `{_name(path)}`. A value that is not tuned is "
                "`fixed(value)`."
            )
    return leaves, treedef


def _coordinate(leaf: Leaf, value: jax.Array) -> jax.Array | None:
    """z of one leaf: NaN if the value is outside its range, None for a fixed leaf."""
    if not leaf.tuned:
        return None
    value = _floating(value)
    return jnp.where(leaf.contains(value), leaf.to_unconstrained(value), jnp.nan)


def _check_range(matched, values) -> None:
    """Raises ValueError if a value that is not traced lies outside the range of its leaf."""
    for (path, leaf, _), value in zip(matched, values, strict=True):
        if isinstance(value, Tracer):
            continue
        with jax.ensure_compile_time_eval():
            array = jnp.asarray(value)
            array = np.asarray(_floating(array) if leaf.tuned else array)
            inside = np.asarray(leaf.contains(array))
        if not np.all(inside):
            index = tuple(np.argwhere(~inside)[0][: len(leaf.shape)])
            raise ValueError(
                f"λ lies outside the space at `{_name(path)}`: it must be {leaf.range}; got {array[index].tolist()}. "
                "Change the value, or the leaf of the space."
            )


def _match(space, tree, *, constrained: bool = True):
    """[(path, leaf, array or None)] and the structure of the space. Raises ValueError if `tree` does not fit.

    If `constrained` is false, `tree` is marked as `Unconstrained`, and has None for fixed leaves.
    """
    leaves, treedef = _flatten(space)
    _proposals.check_no_spread("λ", tree)
    if constrained and isinstance(tree, Unconstrained):
        raise ValueError(
            "Expected λ in natural units, but got unconstrained coordinates (`spaces.Unconstrained`). Convert them "
            "with `spaces.to_constrained(space, z)`."
        )
    if not constrained:
        if not isinstance(tree, Unconstrained):
            raise ValueError(
                "Expected unconstrained coordinates (`spaces.Unconstrained`), but got λ in natural units "
                f"({_describe(tree)}). Pass `space=` to `training.fit` or `training.fine_tune`, or convert λ by "
                "`spaces.to_unconstrained(space, hyperparams)`. Mark your own coordinates with "
                "`spaces.Unconstrained(z)`."
            )
        tree = tree.coordinates
    expected = space if constrained else jax.tree.map(lambda leaf: leaf if leaf.tuned else None, space)
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        subject = "λ" if constrained else "The unconstrained λ"
        difference = _difference(space, expected, tree, ())
        if difference is None:
            difference = ((), f"expected {jax.tree.structure(expected)}, got {jax.tree.structure(tree)}")
        path, text = difference
        source = "default(space)" if constrained else "to_unconstrained(space, default(space))"
        raise ValueError(
            f"{subject} does not fit the space at `{_name(path)}`: {text}. "
            f"`spaces.{source}` has the structure that is needed."
        )
    values = iter(jax.tree.leaves(tree))
    matched = []
    for path, leaf in leaves:
        value = next(values) if constrained or leaf.tuned else None
        matched.append((path, leaf, value if value is None else _as_array(path, leaf, value, constrained)))
    return matched, treedef


def _as_array(path, leaf, value, constrained):
    subject = "λ" if constrained else "The unconstrained λ"
    expected = f"{subject} does not fit the space at `{_name(path)}`: expected {_expectation(leaf)}"
    array = None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        array = jnp.asarray(value)
    if array is None or any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.complexfloating, jax.dtypes.extended)):
        raise ValueError(f"{expected}, got {value!r}. Give a number or an array of real numbers.")
    if array.shape != leaf.value_shape:
        raise ValueError(
            f"{expected}, got shape {array.shape}. Give the leaf of the space another `shape`; or, where leading axes "
            f"are a batch, call the function under `jax.vmap`."
        )
    return array if constrained else _floating(array)


def _floating(array):
    """Casts integers and booleans to the default floating-point type; floating-point types are kept."""
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.result_type(float))


def _difference(space, expected, tree, path):
    """(path, text) of the first difference in structure, or None. In `expected`, fixed leaves may be None."""
    if isinstance(space, Leaf):
        if expected is None:
            if tree is not None:
                return (
                    path,
                    f"expected None, since a fixed leaf has no unconstrained coordinates, got {_describe(tree)}",
                )
            return None
        if tree is None or not jax.tree_util.all_leaves([tree]):
            hint = "; make it one array" if isinstance(tree, (list, tuple)) else ""
            return path, f"expected {_expectation(space)}, got {_describe(tree)}{hint}"
        return None
    if type(space) is not type(tree):
        return path, f"expected {_describe(space)}, got {_describe(tree)}"
    spaces, expecteds, trees = _children(space), _children(expected), _children(tree)
    for name, (key, child) in spaces.items():
        if name not in trees:
            wanted = _expectation(child) if isinstance(child, Leaf) else _describe(child)
            return (*path, key), f"expected {wanted}, got nothing"
        difference = _difference(child, expecteds[name][1], trees[name][1], (*path, key))
        if difference is not None:
            return difference
    for name, (key, child) in trees.items():
        if name not in spaces:
            return (*path, key), (
                f"expected nothing, got {_describe(child)}; leave it out, or add it to the space, "
                f"as `fixed(value)` where it is not tuned"
            )
    return None


def _children(node) -> dict[Any, tuple]:
    """One level of a tree: the printed key of each child, with the key and the child."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)
    return {jax.tree_util.keystr(path): (path[0], child) for path, child in pairs}


def _expectation(leaf: Leaf) -> str:
    return f"an array of shape {leaf.value_shape} ({leaf.kind})"


def _describe(tree) -> str:
    if hasattr(tree, "shape"):
        return f"an array of shape {tuple(tree.shape)}"
    return "None" if tree is None else type(tree).__name__


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "hyperparams"
