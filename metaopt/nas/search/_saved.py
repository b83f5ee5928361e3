"""Saves and loads learned searchers of cells and λ of architecture searches over tasks."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _files, _saving, base
from metaopt.nas.search import _cell_encoder, _score_prior
from metaopt.nas.search._cell_searcher import CellSearcher, cell_searcher, columns
from metaopt.nas.search._meta_architecture import MetaArchitecture

_CELL_VERSION = 2


_CELL_FORMAT = "metaopt.cell_searcher"


_ARCHITECTURE_VERSION = 1


_ARCHITECTURE_FORMAT = "metaopt.meta_architecture"


def save_cell_searcher(path: str | os.PathLike[str], searcher: CellSearcher) -> None:
    """Writes the result of `train_cell_searcher` as one `.npz` file, atomically.

    Args:
      path: the file.
      searcher: the learned searcher, with its candidates.

    Raises:
      ValueError: if a candidate cannot be written as JSON, or JSON would return another value, as for a tuple.
    """
    header = {
        "format": _CELL_FORMAT,
        "version": _CELL_VERSION,
        "encoder": searcher.encoder.config,
        "ops": list(searcher.ops),
        "candidates": [{name: _saving.plain(x) for name, x in candidate.items()} for candidate in searcher.candidates],
    }
    encoded = _saving.encode(header, "A candidate")
    for candidate, back in zip(searcher.candidates, json.loads(encoded)["candidates"], strict=True):
        if candidate != back:
            raise ValueError(f"The candidate {candidate} would come back from JSON as {back}: give it plain values.")
    arrays = {name: getattr(searcher, name) for name in ("encoded", "center", "scale", "units")}
    # The loader computes the prior's features from the candidates and `encoded`.
    arrays |= {f"prior.{name}": np.asarray(x) for name, x in searcher.prior._asdict().items() if name != "features"}
    _saving.write(path, encoded, arrays | _saving.arrays("weights", searcher.meta_params))


def load_cell_searcher(path: str | os.PathLike[str]) -> CellSearcher:
    """Reads a file of `save_cell_searcher`. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      A `CellSearcher` that predicts like the saved one. Results are equal to the bit if JAX's default floating-point
      type is the same.

    Raises:
      ValueError: if the file has another format, a newer version, or version 1.
      ValueError: if its arrays do not fit each other, or are not finite floating-point numbers.
    """
    fault = "does not describe a `CellSearcher` as it should"

    def check(header, specs):
        with _files.reading(path, fault):
            _check_cell_searcher(header, specs)

    header, arrays = _saving.read(
        path, _CELL_FORMAT, _CELL_VERSION, "save_cell_searcher", oldest=_CELL_VERSION, check=check
    )
    with _files.reading(path, fault):
        for name, array in arrays.items():
            _files.check_finite(name, array)
        candidates, encoded = header["candidates"], arrays["encoded"]
        features = np.concatenate([block for block, _ in columns(candidates, encoded, candidates, encoded)], 1)
        if arrays["prior.own"].shape != features.shape[1:]:
            raise ValueError(
                f"its arrays do not have shapes that fit: prior.own {arrays['prior.own'].shape}, and the candidates "
                f"have {features.shape[1]} columns"
            )
        encoder = _cell_encoder.cell_encoder(**header["encoder"])
        template = _cell_weights(encoder, len(encoded))
        named = lambda path, _: jnp.asarray(arrays["weights" + jax.tree_util.keystr(path)])
        meta_params = jax.tree_util.tree_map_with_path(named, template)
        told = {name: arrays[f"prior.{name}"] for name in ("mean", "spread", "own", "alone")}
        prior = _score_prior.ScorePrior(features, **told, noise=float(arrays["prior.noise"]))
        center, scale, units = (arrays[name] for name in ("center", "scale", "units"))
        ops = tuple(header["ops"])
        return cell_searcher(encoded, encoder, meta_params, candidates, ops, center, scale, prior, units)


def _cell_weights(encoder: _cell_encoder.CellEncoder, num_members: int) -> base.PyTree:
    """The shapes and types of the weights."""
    init = lambda key: jax.vmap(encoder.init)(jax.random.split(key, num_members))
    return jax.eval_shape(init, jax.random.key(0))


def _check_cell_searcher(header: dict[str, Any], specs: Mapping[str, Any]) -> None:
    """Raises an error unless the header and the shapes of the arrays fit each other."""
    candidates, ops = header["candidates"], header["ops"]
    if not candidates or not all(isinstance(candidate, dict) for candidate in candidates):
        raise ValueError("its candidates are not configurations")
    if not isinstance(ops, list) or not all(isinstance(op, str) for op in ops):
        raise ValueError(f"its ops are not names: {ops}")
    encoder = _cell_encoder.cell_encoder(**header["encoder"])
    if len(ops) != encoder.config["num_ops"]:
        raise ValueError(f"its encoder reads {encoder.config['num_ops']} ops; there are {len(ops)}")
    (num_members, _, _), num_features = specs["encoded"].shape, encoder.config["num_features"]
    shapes = {"encoded": (num_members, len(candidates), encoder.config["width"])}
    shapes |= {"center": (num_features,), "scale": (num_features,), "units": (2,), "prior.noise": ()}
    shapes |= {f"prior.{name}": (len(candidates),) for name in ("mean", "alone")}
    # We take the number of earlier tasks and of columns from the file; the number of columns depends on `encoded`.
    shapes |= {"prior.spread": (len(candidates), specs["prior.spread"].shape[-1])}
    shapes |= {"prior.own": (specs["prior.own"].shape[-1],)}
    shapes |= {
        name: leaf.shape for name, leaf in _saving.arrays("weights", _cell_weights(encoder, num_members)).items()
    }
    _saving.check_shapes(specs, shapes)


def save_meta_architecture(path: str | os.PathLike[str], meta: MetaArchitecture, hyperparams: base.HyperParams) -> None:
    """Writes λ of a `meta_architecture_search` as one `.npz` file, atomically: h's weights and initial parameters.

    Args:
      path: the file.
      meta: the search that λ belongs to.
      hyperparams: λ, {"h": φ, "init": θ_0} or {"h": φ}, such as `training.fit(...).hyperparams`.

    Raises:
      ValueError: if the shapes of λ are not those of `meta`.
    """
    template = jax.eval_shape(meta.hyperparams, jax.random.key(0))
    shapes = lambda tree: {name: np.shape(leaf) for name, leaf in _saving.arrays("", tree).items()}
    if shapes(hyperparams) != shapes(template):
        raise ValueError(f"λ of this search has the shapes {shapes(template)}; got {shapes(hyperparams)}.")
    header = {
        "format": _ARCHITECTURE_FORMAT,
        "version": _ARCHITECTURE_VERSION,
        "network": meta.settings["search"].get("network"),
        "h": meta.settings["h"],
    }
    arrays = {name: np.asarray(leaf) for name, leaf in _saving.arrays("", hyperparams).items()}
    # The format has no bfloat16; float32 represents each of its numbers exactly.
    arrays = {name: x.astype(np.float32) if x.dtype.kind == "V" else x for name, x in arrays.items()}
    _saving.write(path, _saving.encode(header, "The search"), arrays)


def load_meta_architecture(path: str | os.PathLike[str], meta: MetaArchitecture) -> base.HyperParams:
    """Reads a file of `save_meta_architecture`. Nothing in the file is executed.

    Args:
      path: the file.
      meta: the search, built by the same code as the saved one. Its ops and losses are functions, and the file does not
        contain functions.

    Returns:
      λ, for `meta.alpha`, `meta.genotype` and `meta.fine_tune`.

    Raises:
      ValueError: if the file has another format or a newer version.
      ValueError: if it belongs to another network or predictor than `meta`.
      ValueError: if its arrays have other shapes, or are not finite floating-point numbers.
    """
    template = jax.eval_shape(meta.hyperparams, jax.random.key(0))
    own = json.loads(json.dumps({"network": meta.settings["search"].get("network"), "h": meta.settings["h"]}))

    fault = "does not have λ of this search"

    def check(header, specs):
        for name, value in own.items():
            if header.get(name) != value:
                raise ValueError(
                    f"{os.fspath(path)} is of another `{name}` than this search: {header.get(name)}, not {value}."
                )
        with _files.reading(path, fault):
            _saving.check_shapes(specs, {name: leaf.shape for name, leaf in _saving.arrays("", template).items()})

    _, arrays = _saving.read(path, _ARCHITECTURE_FORMAT, _ARCHITECTURE_VERSION, "save_meta_architecture", check=check)
    with _files.reading(path, fault):
        for name, array in arrays.items():
            _files.check_finite(name, array)
    named = lambda path, leaf: jnp.asarray(arrays[jax.tree_util.keystr(path)], leaf.dtype)
    return jax.tree_util.tree_map_with_path(named, template)
