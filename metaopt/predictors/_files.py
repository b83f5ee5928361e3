"""Saves predictors: one file holds everything that a prediction for a new task needs, and loading it runs no code."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _files, base, spaces, tasks
from metaopt.predictors import _networks

VERSION = 1


class SavedPredictor(NamedTuple):
    """The result of `load`.

    Attributes:
      predictor: g or h.
      meta_params: φ.
      space: of λ: `spaces.to_constrained(space, predictor.apply(meta_params, task))` is λ.
      scaling: for `tasks.apply_scaling`, which computes `task.features` from raw meta-features; None if none was saved.
    """

    predictor: base.Predictor
    meta_params: base.PyTree
    space: base.PyTree
    scaling: tasks.FeatureScaling | None


def save(
    path: str | os.PathLike[str],
    predictor: base.Predictor,
    meta_params: base.PyTree,
    *,
    scaling: tasks.FeatureScaling | Mapping[str, Any] | None = None,
) -> None:
    """Writes a predictor with its weights, its space and its feature scaling to one `.npz` file, atomically.

    Args:
      path: the file.
      predictor: made by a factory of `metaopt.predictors`.
      meta_params: φ, with the shapes of `predictor.init`; bfloat16 becomes float32. (If `meta_architecture_search`
        learned {"h", "init"}, pass the entry "h"; `nas.save_meta_architecture` writes both.)
      scaling: from `tasks.fit_scaling`, or its `_asdict()`.

    Raises:
      ValueError: if the predictor has no `config` from which it can be rebuilt, `meta_params` do not have the shapes of
        `predictor.init`, or `scaling` is not a `tasks.FeatureScaling`.
    """
    if not predictor.config:
        raise ValueError(
            "This predictor has no `config`, so it could not be rebuilt from a file. Create the `Predictor` with the "
            "`config` of its options, or save its weights yourself."
        )
    scaling = None if scaling is None else _feature_scaling(scaling)
    shapes = lambda tree: {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    given, own = shapes(jax.eval_shape(lambda: meta_params)), shapes(jax.eval_shape(predictor.init, jax.random.key(0)))
    if given != own:
        raise ValueError(
            f"`meta_params` must have the shapes that `predictor.init` returns, {own}; got {given}, which `load` "
            "could not read."
        )
    plain = None if scaling is None else scaling._asdict()
    header = {"format": "metaopt.predictor", "version": VERSION, "config": predictor.config, "scaling": plain}
    leaves = jax.tree_util.tree_leaves_with_path(meta_params)
    arrays: dict[str, Any] = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    # The `.npz` format has no bfloat16; float32 holds every such number exactly.
    arrays = {name: x.astype(np.float32) if x.dtype.kind == "V" else x for name, x in arrays.items()}
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)  # before writing: it may not be serializable
    _files.write_npz(path, {"header": encoded, **arrays})


def _feature_scaling(scaling: Any) -> tasks.FeatureScaling:
    """A `FeatureScaling` of plain values, from a `FeatureScaling` or a mapping of its fields."""
    try:
        fields = scaling._asdict() if isinstance(scaling, tasks.FeatureScaling) else dict(scaling)
        types = {"names": str, "center": float, "scale": float, "log": bool}
        if fields.keys() != types.keys():
            raise ValueError(f"its fields are {', '.join(map(str, fields))}")
        found = tasks.FeatureScaling(**{name: tuple(map(types[name], fields[name])) for name in types})
        if len({len(values) for values in found}) > 1:
            raise ValueError(f"its fields have the lengths {[len(values) for values in found]}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`scaling` must be a `tasks.FeatureScaling`, with `names`, `center`, `scale` and `log` of one length; got "
            f"{type(scaling).__name__} ({error})."
        ) from error
    return found


def load(path: str | os.PathLike[str]) -> SavedPredictor:
    """Reads a file that `save` wrote. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      A `SavedPredictor`.

    Raises:
      ValueError: if the file is not a predictor or is of a newer version.
      ValueError: if the weights do not fit the file's description or are not finite floating-point numbers.
      ValueError: if the scaling is not a `tasks.FeatureScaling`.
    """
    fault = "is not a predictor that `predictors.save` wrote"
    with _files.reading(path, fault), _files.open_npz(path) as file:
        header = file.header()
        format_, version = header["format"], int(header["version"])
        if format_ != "metaopt.predictor" or version > VERSION:
            raise ValueError(
                f"{os.fspath(path)} is of format {format_!r} version {version}; this metaopt reads 'metaopt.predictor' "
                f"up to version {VERSION}. A newer metaopt reads it."
            )
        config, scaling = header["config"], header.get("scaling")
        if isinstance(scaling, list):  # earlier versions wrote the fields of a `FeatureScaling` without their names
            scaling = dict(zip(tasks.FeatureScaling._fields, scaling, strict=True))
        scaling = None if scaling is None else _feature_scaling(scaling)
        space = spaces.from_json(config["space"])
        _check_sizes(config, space, file)
        predictor = _networks.from_config(config)
        template = jax.eval_shape(predictor.init, jax.random.key(0))
        named = lambda path: jax.tree_util.keystr(path)
        shapes = {named(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(template)}
        arrays = file.floats(shapes)
        meta_params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(arrays[named(path)]), template)
        return SavedPredictor(predictor, meta_params, space, scaling)


def _check_sizes(config: Any, space: base.PyTree, file: _files.Npz) -> None:
    """Raises ValueError if the predictor or one of its members would be larger than the file's weights."""
    num_weights = sum(math.prod(spec.shape) for spec in file.specs.values())
    if spaces.num_dims(space) > num_weights:
        raise ValueError(f"its space has {spaces.num_dims(space)} dimensions, and there are only {num_weights} weights")
    while isinstance(config, dict) and "member" in config:
        config = config["member"]
        if spaces.from_json(config["space"]) != space:
            raise ValueError("the members of its ensemble have other spaces")
