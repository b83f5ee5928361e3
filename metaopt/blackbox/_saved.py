"""Saves and loads learned optimizers."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, _files, _saving, predictors, spaces
from metaopt.blackbox import _deep_kernel, _surrogates, _transformer
from metaopt.blackbox._meta_search import MetaOptimizer, meta_optimizer

VERSION = 4
_FORMAT = "metaopt.meta_optimizer"
# Arrays that a version added to a surrogate: the version, and the value in older files.
_ADDED = {"deep_share": (2, 0.0), "transformer_share": (3, 0.0), "max_shown": (4, _transformer.MAX_SHOWN)}
# The names of a surrogate's arrays, and the number of their axes.
_AXES: Any = {"reference": 2, "curves": 2, "coefficients": 2, "log_scales": 1, "kernel": (1, 0, 0)}
_AXES |= {"attention": {"log_rates": 2, "logit_share": 1}, "sorted_features": 2, "features": 2}
_AXES |= {"closeness": 0, "residual": 0, "deep_share": 0, "transformer_share": 0, "max_shown": 0}
_TEMPLATE = _surrogates.Surrogate(**_AXES | {"kernel": _surrogates.Kernel(*_AXES["kernel"])})
_DEEP_AXES: Any = (3, 3, 2, 3, 2, 2, 2, 1, 1)
_DEEP = _deep_kernel.DeepKernel(*_DEEP_AXES)
_TRANSFORMER_AXES: Any = (3, 3, 3, 3, 2, 2, dict.fromkeys(("qkv", "mix", "up", "down"), 4), 3, 2)
_TRANSFORMER = _transformer.Transformer(*_TRANSFORMER_AXES)
_EMBEDDING_AXES: Any = ({"entry": {"w": 1, "b": 1}, "pair": {"w": 2, "b": 1}, "embedding": 2}, 1, 1)
_EMBEDDING = _surrogates.Embedding(*_EMBEDDING_AXES)


def save_meta_optimizer(path: str | os.PathLike[str], meta_optimizer: MetaOptimizer) -> None:
    """Writes the result of `train_meta_optimizer` or `train_meta_searcher` as one `.npz` file, atomically.

    Args:
      path: the file.
      meta_optimizer: the learned optimizer, with its space and its candidates.

    Raises:
      ValueError: if the space or a candidate cannot be written as JSON.
    """
    space, candidates = spaces.to_json(meta_optimizer.space), meta_optimizer.candidates
    header = {"format": _FORMAT, "version": VERSION, "space": space, "candidates": candidates}
    header |= {name: getattr(meta_optimizer.evidence, name) for name in ("num_records", "effective_tasks")}
    arrays: dict[str, Any] = _saving.arrays("outcome", meta_optimizer.surrogate)
    if meta_optimizer.cost_surrogate is not None:
        arrays |= _saving.arrays("cost", meta_optimizer.cost_surrogate)
    _saving.write(path, _saving.encode(header, "The space or a candidate"), arrays)


def load_meta_optimizer(path: str | os.PathLike[str]) -> MetaOptimizer:
    """Reads a file of `save_meta_optimizer`. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      A `MetaOptimizer` that predicts and searches like the saved one. Results are equal to the bit if JAX's default
      floating-point type is the same.

    Raises:
      ValueError: if the file has another format or a newer version.
      ValueError: if its arrays do not fit each other, or are not finite floating-point numbers. Features of tasks may
        be NaN.
    """
    fault = "does not describe a `MetaOptimizer` as it should"

    def check(header, specs):
        with _files.reading(path, fault):
            num_dims, version = spaces.num_dims(spaces.from_json(header["space"])), int(header["version"])
            for kind in _kinds(specs):
                _check_surrogate(kind, specs, num_dims, version)

    header, arrays = _saving.read(path, _FORMAT, VERSION, "save_meta_optimizer", check=check)
    with _files.reading(path, fault):
        for name, array in arrays.items():
            if array.dtype.kind == "f":  # features of tasks may be missing
                _files.check_finite(name, array, missing=name.endswith("sorted_features"))
        surrogates = {kind: _surrogate(kind, arrays, int(header["version"])) for kind in _kinds(arrays)}
        space, candidates = spaces.from_json(header["space"]), header["candidates"]
        counts = {name: header.get(name) for name in ("num_records", "effective_tasks")}  # absent before 2026-12
        for name, count in counts.items():
            _checks.check_positive(name, count, optional=True)
        return meta_optimizer(surrogates["outcome"], surrogates.get("cost"), space, candidates, **counts)


def _kinds(arrays: Mapping[str, Any]) -> list[str]:
    return [kind for kind in ("outcome", "cost") if kind == "outcome" or any(n.startswith(kind) for n in arrays)]


def _tree(kind: str, arrays: Mapping[str, Any], version: int) -> _surrogates.Surrogate:
    """A `Surrogate` of the arrays, or of their shapes and types; the number of axes is not checked."""
    has = lambda part: any(name.startswith(f"{kind}.{part}.") for name in arrays)
    added = {f"{kind}.{name}": np.array(before) for name, (since, before) in _ADDED.items() if version < since}
    template = _TEMPLATE._replace(deep=_DEEP if has("deep") else None)
    template = template._replace(transformers=_TRANSFORMER if has("transformers") else None)
    template = template._replace(embedding=_EMBEDDING if has("embedding") else None)
    named = lambda path, _: {**added, **arrays}[kind + jax.tree_util.keystr(path)]
    return jax.tree_util.tree_map_with_path(named, template)


def _check_surrogate(kind: str, specs: Mapping[str, Any], num_dims: int, version: int) -> None:
    """Raises an error unless the arrays of a surrogate have shapes and types that fit each other."""
    found = _tree(kind, specs, version)
    template = _TEMPLATE._replace(deep=None if found.deep is None else _DEEP)
    template = template._replace(transformers=None if found.transformers is None else _TRANSFORMER)
    template = template._replace(embedding=None if found.embedding is None else _EMBEDDING)

    def check(path, num_axes, spec):
        is_count = path[-1] == jax.tree_util.GetAttrKey("max_shown")
        if len(spec.shape) != num_axes or not (spec.dtype.kind == "i" if is_count else _files.is_float(spec)):
            raise ValueError(f"{kind}{jax.tree_util.keystr(path)} has shape {spec.shape} and type {spec.dtype}")

    is_spec = lambda node: hasattr(node, "dtype")
    specs_of = lambda tree: jax.tree.leaves(tree, is_leaf=is_spec)
    for (path, num_axes), spec in zip(jax.tree_util.tree_leaves_with_path(template), specs_of(found), strict=True):
        check(path, num_axes, spec)
    num_tasks, num_reference = found.curves.shape
    num_members, num_features = found.attention["log_rates"].shape
    width = 0 if found.embedding is None else found.embedding.center.shape[0]
    expected = {
        "reference": (num_reference, num_dims),
        "coefficients": (num_reference, 1 + num_tasks),
        "log_scales": (num_tasks,),
        "sorted_features": (num_features - width, num_tasks),
        "features": (num_tasks, num_features),
    }
    shapes: dict[str, Any] = {name: getattr(found, name).shape for name in expected}
    shapes |= {"log_lengths": found.kernel.log_lengths.shape, "logit_share": found.attention["logit_share"].shape}
    expected |= {"log_lengths": (num_dims,), "logit_share": (num_members,)}
    key, sizes = jax.random.key(0), lambda tree: [leaf.shape for leaf in specs_of(tree)]
    if found.embedding is not None:
        shapes["embedding"] = sizes(found.embedding)
        expected["embedding"] = sizes(jax.eval_shape(lambda: predictors.init_embedding(key, width))) + 2 * [(width,)]
    if found.deep is not None:
        num_deep, num_hidden = found.deep.bias.shape
        init = lambda: _deep_kernel.init_deep_kernel(key, num_dims, num_features, num_hidden=num_hidden)
        shapes["deep"] = sizes(found.deep)
        expected["deep"] = [(num_deep, *size) for size in sizes(jax.eval_shape(init))]
    if found.transformers is not None:
        num, num_layers, width, _ = found.transformers.layers["mix"].shape
        init = lambda: _transformer.init_transformer(key, num_dims, num_features, width=width, num_layers=num_layers)
        shapes["transformers"] = sizes(found.transformers)
        expected["transformers"] = [(num, *size) for size in sizes(jax.eval_shape(init))]
    if shapes != expected:
        raise ValueError(f"its arrays have shapes {shapes}, and should have {expected}")


def _surrogate(kind: str, arrays: Mapping[str, np.ndarray], version: int) -> _surrogates.Surrogate:
    """The surrogate of arrays that passed `_check_surrogate`."""
    found = _tree(kind, arrays, version)
    return jax.tree.map(jnp.asarray, found)._replace(
        sorted_features=np.asarray(found.sorted_features),
        closeness=float(found.closeness),
        residual=float(found.residual),
        deep_share=float(found.deep_share),
        transformer_share=float(found.transformer_share),
        max_shown=int(found.max_shown),
    )
