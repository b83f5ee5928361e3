"""Files of learned searchers of cells and of λ of architecture searches, for `metaopt.save` and `metaopt.load`."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _files, _saving, base
from metaopt.nas.search import _cell_encoder, _score_prior
from metaopt.nas.search._cell_searcher import CellSearcher, cell_searcher, columns
from metaopt.nas.search._meta_architecture import MetaArchitecture


def _encode_cell_searcher(searcher: CellSearcher) -> tuple[dict[str, Any], dict[str, Any]]:
    plain = lambda x: x.item() if isinstance(x, np.generic) else x
    candidates = [{name: plain(x) for name, x in candidate.items()} for candidate in searcher.candidates]
    for candidate in candidates:
        if (restored := json.loads(json.dumps(candidate, allow_nan=False))) != candidate:
            raise ValueError(
                f"The candidate {candidate} would come back from JSON as {restored}: give it plain values."
            )
    header = {"encoder": searcher.encoder.config, "ops": list(searcher.ops), "candidates": candidates}
    arrays = {name: getattr(searcher, name) for name in ("encoded", "center", "scale", "slope")}
    # `_decode_cell_searcher` computes the prior's features from the candidates and `encoded`.
    arrays |= {f"prior.{name}": np.asarray(x) for name, x in searcher.prior._asdict().items() if name != "features"}
    return header, arrays | _saving.named_leaves("weights", searcher.meta_params)


def _decode_cell_searcher(header: dict[str, Any], file: _files.Npz) -> CellSearcher:
    arrays = file.floats(_cell_searcher_shapes(header, file.specs))
    candidates, encoded = header["candidates"], arrays["encoded"]
    features = np.concatenate([block for block, _ in columns(candidates, encoded, candidates, encoded)], 1)
    if arrays["prior.own"].shape != features.shape[1:]:
        raise ValueError(
            f"the array prior.own has shape {arrays['prior.own'].shape}, and the candidates have {features.shape[1]} "
            "columns"
        )
    encoder = _cell_encoder.cell_encoder(**header["encoder"])
    meta_params = _saving.tree_from_leaves("weights", arrays, _cell_weights(encoder, len(encoded)))
    prior_arrays = {name: arrays[f"prior.{name}"] for name in ("mean", "spread", "own", "alone")}
    prior = _score_prior.ScorePrior(features, **prior_arrays, noise=float(arrays["prior.noise"]))
    center, scale, slope = (arrays[name] for name in ("center", "scale", "slope"))
    ops = tuple(header["ops"])
    meta_params = jax.tree.map(jnp.asarray, meta_params)
    return cell_searcher(encoded, encoder, meta_params, candidates, ops, center, scale, prior, slope)


def _cell_weights(encoder: _cell_encoder.CellEncoder, num_members: int) -> base.PyTree:
    """The shapes and types of the weights."""
    init = lambda key: jax.vmap(encoder.init)(jax.random.split(key, num_members))
    return jax.eval_shape(init, jax.random.key(0))


def _cell_searcher_shapes(header: dict[str, Any], specs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that the arrays must have; raises an error if the parts of the header do not fit each other."""
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
    shapes |= {"center": (num_features,), "scale": (num_features,), "slope": (), "prior.noise": ()}
    shapes |= {f"prior.{name}": (len(candidates),) for name in ("mean", "alone")}
    # We take the number of earlier tasks and of columns from the file; the number of columns depends on `encoded`.
    shapes |= {"prior.spread": (len(candidates), specs["prior.spread"].shape[-1])}
    shapes |= {"prior.own": (specs["prior.own"].shape[-1],)}
    return shapes | _saving.shapes("weights", _cell_weights(encoder, num_members))


class TrainedMetaArchitecture(NamedTuple):
    """λ of an architecture search over tasks: what `metaopt.save` writes, and `metaopt.load(path, meta=meta)` returns.

    Attributes:
      meta: the search. A file does not hold it, since its ops and losses are functions. `load` takes a search that was
        built by the same code, and checks that network and predictor are equal.
      hyperparams: λ, {"h": φ, "init": θ_0} or {"h": φ}, such as `training.fit(...).hyperparams`.
    """

    meta: MetaArchitecture
    hyperparams: base.HyperParams


def _identity(meta: MetaArchitecture) -> dict[str, Any]:
    """The parts of a search that λ depends on, as JSON values."""
    return json.loads(json.dumps({"network": meta.settings["search"].get("network"), "h": meta.settings["h"]}))


def _encode_meta_architecture(trained: TrainedMetaArchitecture) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes = _saving.shapes("", trained.hyperparams)
    expected = _saving.shapes("", jax.eval_shape(trained.meta.hyperparams, jax.random.key(0)))
    if shapes != expected:
        raise ValueError(f"λ of this search has the shapes {expected}; got {shapes}.")
    return _identity(trained.meta), _saving.named_leaves("", trained.hyperparams)


def _decode_meta_architecture(
    header: dict[str, Any], file: _files.Npz, *, meta: MetaArchitecture
) -> TrainedMetaArchitecture:
    for name, value in _identity(meta).items():
        if header[name] != value:
            raise ValueError(f"its `{name}` differs from that of this search: {header[name]}, not {value}")
    template = jax.eval_shape(meta.hyperparams, jax.random.key(0))
    leaves = _saving.tree_from_leaves("", file.floats(_saving.shapes("", template)), template)
    return TrainedMetaArchitecture(meta, jax.tree.map(lambda x, leaf: jnp.asarray(x, leaf.dtype), leaves, template))


_saving.register(_saving.Kind("learned_cell_searcher", CellSearcher, _encode_cell_searcher, _decode_cell_searcher))
_saving.register(
    _saving.Kind(
        "meta_architecture",
        TrainedMetaArchitecture,
        _encode_meta_architecture,
        _decode_meta_architecture,
        parts={"meta": "the `meta_architecture_search` that λ belongs to"},
    )
)
