"""Predictors on disk: one file with what is needed to predict for a new task, and nothing that runs code."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, spaces, tasks
from metaopt.predictors import _networks

VERSION = 1


class SavedPredictor(NamedTuple):
    """What `load` returns.

    Attributes:
      predictor: g or h.
      meta_params: φ.
      space: of λ: `spaces.to_constrained(space, predictor.apply(meta_params, task))` is λ.
      scaling: for `tasks.apply_scaling`, which makes `task.features` of raw meta-features; None if none was saved.
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
    """Writes a predictor with its weights, its space and its feature scaling as one `.npz` file, atomically.

    Args:
      path: the file.
      predictor: made by a factory of this room.
      meta_params: φ, as `predictor.init` makes it; bfloat16 becomes float32. (If `meta_architecture_search` learned
        {"h", "init"}, this is "h"; `methods.save_meta_architecture` writes both.)
      scaling: from `tasks.fit_scaling`, or its `_asdict()`.

    Raises:
      ValueError: if the predictor has no `config` to build it again from, `meta_params` do not have the shapes of
        `predictor.init`, or `scaling` is not a `tasks.FeatureScaling`.
    """
    if not predictor.config:
        raise ValueError(
            "This predictor carries no `config` and could not be built again from a file: give `Predictor` the "
            "options that it was made with, or save its weights yourself."
        )
    scaling = None if scaling is None else _feature_scaling(scaling)
    shapes = lambda tree: {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    given, own = shapes(jax.eval_shape(lambda: meta_params)), shapes(jax.eval_shape(predictor.init, jax.random.key(0)))
    if given != own:
        raise ValueError(
            f"`meta_params` must be what `predictor.init` makes, with the shapes {own}; got {given}, which `load` "
            "could not read."
        )
    plain = None if scaling is None else scaling._asdict()
    header = {"format": "metaopt.predictor", "version": VERSION, "config": predictor.config, "scaling": plain}
    leaves = jax.tree_util.tree_leaves_with_path(meta_params)
    arrays: dict[str, Any] = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    # The format has no bfloat16; every such number is one of float32.
    arrays = {name: x.astype(np.float32) if x.dtype.kind == "V" else x for name, x in arrays.items()}
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)  # before there is a file: it may not be serializable
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"  # others may write there, too
    with open(temporary, "wb") as file:
        np.savez(file, header=encoded, **arrays)
    os.replace(temporary, path)


def _feature_scaling(scaling: Any) -> tasks.FeatureScaling:
    """A `FeatureScaling` of plain values, from one or from its fields by name."""
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
    """Reads what `save` wrote. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      A `SavedPredictor`.

    Raises:
      ValueError: if the file is not a predictor, is of a newer version, or its weights or its scaling do not fit its
        description.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        format_, version = header["format"], int(header["version"])
        config, scaling = header.get("config"), header.get("scaling")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is no predictor that `predictors.save` wrote: {error}") from error
    if format_ != "metaopt.predictor" or version > VERSION:
        raise ValueError(
            f"{os.fspath(path)} is of format {format_!r} version {version}; this metaopt reads 'metaopt.predictor' up "
            f"to version {VERSION}. A newer metaopt reads it."
        )
    try:
        predictor, space = _networks.from_config(config), spaces.from_json(config["space"])
        if isinstance(scaling, list):  # earlier versions wrote the fields of a `FeatureScaling` without their names
            scaling = dict(zip(tasks.FeatureScaling._fields, scaling, strict=True))
        scaling = None if scaling is None else _feature_scaling(scaling)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} does not describe its predictor as it should: {error!r}.") from error
    template = jax.eval_shape(predictor.init, jax.random.key(0))
    leaves = []
    for key, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = jax.tree_util.keystr(key)
        if name not in arrays or arrays[name].shape != leaf.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise ValueError(f"{os.fspath(path)}: the weights {name} should have shape {leaf.shape}; found {found}.")
        leaves.append(jnp.asarray(arrays.pop(name)))
    if arrays:
        raise ValueError(f"{os.fspath(path)} has weights that its predictor does not: {', '.join(sorted(arrays))}.")
    meta_params = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return SavedPredictor(predictor, meta_params, space, scaling)
