"""Saves and loads learned optimizers, searchers, architectures and evaluations; files hold arrays and JSON, no code."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _files, base, predictors, spaces
from metaopt.methods._cell_searcher import CellSearcher, cell_searcher, columns
from metaopt.methods._evaluations import Evaluation
from metaopt.methods._meta_architecture import MetaArchitecture
from metaopt.methods._meta_search import MetaOptimizer, meta_optimizer

VERSION = 4
_FORMAT = "metaopt.meta_optimizer"
_CELL_VERSION = 2
_CELL_FORMAT = "metaopt.cell_searcher"
_ARCHITECTURE_VERSION = 1
_ARCHITECTURE_FORMAT = "metaopt.meta_architecture"
_EVALUATION_VERSION = 1
_EVALUATION_FORMAT = "metaopt.evaluation"
_READERS = {
    _FORMAT: "`methods.load_meta_optimizer`",
    _CELL_FORMAT: "`methods.load_cell_searcher`",
    _ARCHITECTURE_FORMAT: "`methods.load_meta_architecture`",
    _EVALUATION_FORMAT: "`methods.load_evaluation`",
    "metaopt.predictor": "`predictors.load`",
    "metaopt.trained_network": "`methods.load_trained_network`",
}
# Arrays that a version added to a surrogate: the version, and the value in older files.
_ADDED = {"deep_share": (2, 0.0), "transformer_share": (3, 0.0), "max_shown": (4, predictors.MAX_SHOWN)}
# The names of a surrogate's arrays, and the number of their axes.
_AXES: Any = {"reference": 2, "curves": 2, "coefficients": 2, "log_scales": 1, "kernel": (1, 0, 0)}
_AXES |= {"attention": {"log_rates": 2, "logit_share": 1}, "sorted_features": 2, "features": 2}
_AXES |= {"closeness": 0, "residual": 0, "deep_share": 0, "transformer_share": 0, "max_shown": 0}
_TEMPLATE = predictors.Surrogate(**_AXES | {"kernel": predictors.Kernel(*_AXES["kernel"])})
_DEEP_AXES: Any = (3, 3, 2, 3, 2, 2, 2, 1, 1)
_DEEP = predictors.DeepKernel(*_DEEP_AXES)
_TRANSFORMER_AXES: Any = (3, 3, 3, 3, 2, 2, dict.fromkeys(("qkv", "mix", "up", "down"), 4), 3, 2)
_TRANSFORMER = predictors.Transformer(*_TRANSFORMER_AXES)
_EMBEDDING_AXES: Any = ({"entry": {"w": 1, "b": 1}, "pair": {"w": 2, "b": 1}, "embedding": 2}, 1, 1)
_EMBEDDING = predictors.Embedding(*_EMBEDDING_AXES)


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
    arrays: dict[str, Any] = _arrays("outcome", meta_optimizer.surrogate)
    if meta_optimizer.cost_surrogate is not None:
        arrays |= _arrays("cost", meta_optimizer.cost_surrogate)
    _write(path, _encode(header, "The space or a candidate"), arrays)


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

    header, arrays = _read(path, _FORMAT, VERSION, "save_meta_optimizer", check=check)
    with _files.reading(path, fault):
        for name, array in arrays.items():
            if array.dtype.kind == "f":  # features of tasks may be missing
                _files.check_finite(name, array, missing=name.endswith("sorted_features"))
        surrogates = {kind: _surrogate(kind, arrays, int(header["version"])) for kind in _kinds(arrays)}
        space, candidates = spaces.from_json(header["space"]), header["candidates"]
        counts = {name: header.get(name) for name in ("num_records", "effective_tasks")}  # absent before 2026-12
        for name, count in counts.items():
            base.check_positive(name, count, optional=True)
        return meta_optimizer(surrogates["outcome"], surrogates.get("cost"), space, candidates, **counts)


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
        "candidates": [{name: _plain(x) for name, x in candidate.items()} for candidate in searcher.candidates],
    }
    encoded = _encode(header, "A candidate")
    for candidate, back in zip(searcher.candidates, json.loads(encoded)["candidates"], strict=True):
        if candidate != back:
            raise ValueError(f"The candidate {candidate} would come back from JSON as {back}: give it plain values.")
    arrays = {name: getattr(searcher, name) for name in ("encoded", "center", "scale", "units")}
    # The loader computes the prior's features from the candidates and `encoded`.
    arrays |= {f"prior.{name}": np.asarray(x) for name, x in searcher.prior._asdict().items() if name != "features"}
    _write(path, encoded, arrays | _arrays("weights", searcher.meta_params))


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

    header, arrays = _read(path, _CELL_FORMAT, _CELL_VERSION, "save_cell_searcher", oldest=_CELL_VERSION, check=check)
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
        encoder = predictors.cell_encoder(**header["encoder"])
        template = _cell_weights(encoder, len(encoded))
        named = lambda path, _: jnp.asarray(arrays["weights" + jax.tree_util.keystr(path)])
        meta_params = jax.tree_util.tree_map_with_path(named, template)
        told = {name: arrays[f"prior.{name}"] for name in ("mean", "spread", "own", "alone")}
        prior = predictors.ScorePrior(features, **told, noise=float(arrays["prior.noise"]))
        center, scale, units = (arrays[name] for name in ("center", "scale", "units"))
        ops = tuple(header["ops"])
        return cell_searcher(encoded, encoder, meta_params, candidates, ops, center, scale, prior, units)


def _cell_weights(encoder: predictors.CellEncoder, num_members: int) -> base.PyTree:
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
    encoder = predictors.cell_encoder(**header["encoder"])
    if len(ops) != encoder.config["num_ops"]:
        raise ValueError(f"its encoder reads {encoder.config['num_ops']} ops; there are {len(ops)}")
    (num_members, _, _), num_features = specs["encoded"].shape, encoder.config["num_features"]
    shapes = {"encoded": (num_members, len(candidates), encoder.config["width"])}
    shapes |= {"center": (num_features,), "scale": (num_features,), "units": (2,), "prior.noise": ()}
    shapes |= {f"prior.{name}": (len(candidates),) for name in ("mean", "alone")}
    # We take the number of earlier tasks and of columns from the file; the number of columns depends on `encoded`.
    shapes |= {"prior.spread": (len(candidates), specs["prior.spread"].shape[-1])}
    shapes |= {"prior.own": (specs["prior.own"].shape[-1],)}
    shapes |= {name: leaf.shape for name, leaf in _arrays("weights", _cell_weights(encoder, num_members)).items()}
    check_shapes(specs, shapes)


def check_shapes(specs: Mapping[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises a ValueError unless the arrays are floating-point, with these names and shapes."""
    there = {name: spec.shape for name, spec in specs.items()}
    if there != shapes:
        wrong = [name for name in sorted({*there, *shapes}) if there.get(name) != shapes.get(name)]
        differ = ", ".join(f"{name} {there.get(name)} instead of {shapes.get(name)}" for name in wrong[:5])
        raise ValueError(f"its arrays do not have shapes that fit: {differ}")
    for name, spec in specs.items():
        if not _files.is_float(spec):
            raise ValueError(f"its array {name} is {spec.dtype}, which is not floating-point")


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
    shapes = lambda tree: {name: np.shape(leaf) for name, leaf in _arrays("", tree).items()}
    if shapes(hyperparams) != shapes(template):
        raise ValueError(f"λ of this search has the shapes {shapes(template)}; got {shapes(hyperparams)}.")
    header = {
        "format": _ARCHITECTURE_FORMAT,
        "version": _ARCHITECTURE_VERSION,
        "network": meta.settings["search"].get("network"),
        "h": meta.settings["h"],
    }
    arrays = {name: np.asarray(leaf) for name, leaf in _arrays("", hyperparams).items()}
    # The format has no bfloat16; float32 represents each of its numbers exactly.
    arrays = {name: x.astype(np.float32) if x.dtype.kind == "V" else x for name, x in arrays.items()}
    _write(path, _encode(header, "The search"), arrays)


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
            check_shapes(specs, {name: leaf.shape for name, leaf in _arrays("", template).items()})

    _, arrays = _read(path, _ARCHITECTURE_FORMAT, _ARCHITECTURE_VERSION, "save_meta_architecture", check=check)
    with _files.reading(path, fault):
        for name, array in arrays.items():
            _files.check_finite(name, array)
    named = lambda path, leaf: jnp.asarray(arrays[jax.tree_util.keystr(path)], leaf.dtype)
    return jax.tree_util.tree_map_with_path(named, template)


def save_evaluation(path: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Writes the result of `evaluate_episodes` as one `.npz` file, atomically.

    Args:
      path: the file.
      evaluation: scores of any methods; `join_evaluations` adds scores of other methods on the same episodes.
    """
    names, sources = list(evaluation.scores), list(evaluation.sources)
    header = {
        "format": _EVALUATION_FORMAT,
        "version": _EVALUATION_VERSION,
        "methods": names,
        "sources": sources,
        "transductive": [bool(evaluation.transductive[name]) for name in names],
        "higher_is_better": bool(evaluation.higher_is_better),
        "score": evaluation.score,
    }
    arrays = {}
    for j, source in enumerate(sources):
        arrays |= {f"scores {i} {j}": evaluation.scores[name][source] for i, name in enumerate(names)}
        arrays |= {f"ways {j}": evaluation.num_ways[source], f"shots {j}": evaluation.num_shots[source]}
        if source in evaluation.marks:
            arrays[f"marks {j}"] = evaluation.marks[source]
    _write(path, _encode(header, "A name"), arrays)


def load_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Reads a file of `save_evaluation`. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      An `Evaluation`, equal to the saved one to the bit.

    Raises:
      ValueError: if the file has another format or a newer version, or its arrays do not fit each other.
    """
    fault = "does not describe an `Evaluation` as it should"

    def check(header, specs):
        with _files.reading(path, fault):
            _check_evaluation(header, specs)

    header, arrays = _read(path, _EVALUATION_FORMAT, _EVALUATION_VERSION, "save_evaluation", check=check)
    names, sources = header["methods"], header["sources"]
    flags = dict(zip(names, header["transductive"], strict=True))
    scores = {n: {s: arrays[f"scores {i} {j}"] for j, s in enumerate(sources)} for i, n in enumerate(names)}
    ways, shots = ({s: arrays[f"{what} {j}"] for j, s in enumerate(sources)} for what in ("ways", "shots"))
    marks = {s: arrays[f"marks {j}"] for j, s in enumerate(sources) if f"marks {j}" in arrays}
    # Files of earlier versions do not state the score.
    return Evaluation(scores, ways, shots, flags, header["higher_is_better"], marks, header.get("score", ""))


def _check_evaluation(header: dict[str, Any], specs: Mapping[str, Any]) -> None:
    """Raises an error unless the header and the shapes of the arrays fit each other."""
    names, sources, flags = (header[name] for name in ("methods", "sources", "transductive"))
    is_bool = lambda value: isinstance(value, bool)
    if not all(isinstance(name, str) for name in [*names, *sources, header.get("score", "")]):
        raise ValueError("the names of methods, of sources and of the score must be texts")
    if len(flags) != len(names) or not all(map(is_bool, [*flags, header["higher_is_better"]])):
        raise ValueError("`transductive` and `higher_is_better` must be true or false")
    for j, source in enumerate(sources):
        (num,), expected = specs[f"ways {j}"].shape, {f"scores {i} {j}": 2 for i in range(len(names))}
        expected |= {
            f"{what} {j}": 1 for what in ("ways", "shots", "marks") if f"{what} {j}" in specs or what != "marks"
        }
        for name, num_axes in expected.items():
            spec = specs[name]
            if len(spec.shape) != num_axes or spec.shape[0] != num or 0 in spec.shape[1:]:
                raise ValueError(f"the arrays of source {source!r} are not all of {num} episodes")
            if spec.dtype.kind not in "iuf":
                raise ValueError(f"the arrays of source {source!r} must be numbers; {name!r} is {spec.dtype}")


def _plain(value: Any) -> Any:
    """Converts NumPy numbers, which rows of a table may have, to Python numbers for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _encode(header: dict[str, Any], what: str) -> bytes:
    """Encodes the header as JSON; `what` names the part that may fail, for the error message."""
    try:
        return json.dumps(header, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}.") from error


def _write(path: str | os.PathLike[str], header: bytes, arrays: dict[str, Any]) -> None:
    _files.write_npz(path, {"header": np.frombuffer(header, np.uint8), **arrays})


def _read(
    path: str | os.PathLike[str],
    format_: str,
    version: int,
    writer: str,
    *,
    oldest: int = 1,
    check: Callable[[dict[str, Any], dict[str, _files.Spec]], None] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the header and the arrays of a file.

    Args:
      path: the file.
      format_: the format that the file must have.
      version: the newest version that can be read.
      writer: the function that writes such files, for error messages.
      oldest: the oldest version that can be read.
      check: `(header, specs)`, raises an error if the header, or the shapes and types of the arrays, are invalid. It is
        called before the arrays are read.

    Returns:
      The header, and the arrays by name.

    Raises:
      ValueError: if the file has another format, a newer version, or a version older than `oldest`.
    """
    with _files.reading(path, f"is not a file that `{writer}` wrote"), _files.open_npz(path) as file:
        header = file.header()
        found = header["format"], int(header["version"])
        if found[0] != format_:
            reader = f": {_READERS[found[0]]} reads it" if found[0] in _READERS else ""
            raise ValueError(f"{os.fspath(path)} is of format {found[0]!r}, and `{writer}` writes {format_!r}{reader}.")
        if found[1] > version:
            raise ValueError(
                f"{os.fspath(path)} is of version {found[1]}; this metaopt reads {format_!r} up to version {version}. "
                "A newer metaopt reads it."
            )
        if found[1] < oldest:
            raise ValueError(
                f"{os.fspath(path)} is of version {found[1]}, and lacks what {format_!r} has since version {oldest}: "
                "train and save it again."
            )
        if check is not None:
            check(header, file.specs)
        return header, {name: file[name] for name in file.specs}


def _arrays(kind: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name; leaves may also be shapes with types."""
    return {kind + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _kinds(arrays: Mapping[str, Any]) -> list[str]:
    return [kind for kind in ("outcome", "cost") if kind == "outcome" or any(n.startswith(kind) for n in arrays)]


def _tree(kind: str, arrays: Mapping[str, Any], version: int) -> predictors.Surrogate:
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
        init = lambda: predictors.init_deep_kernel(key, num_dims, num_features, num_hidden=num_hidden)
        shapes["deep"] = sizes(found.deep)
        expected["deep"] = [(num_deep, *size) for size in sizes(jax.eval_shape(init))]
    if found.transformers is not None:
        num, num_layers, width, _ = found.transformers.layers["mix"].shape
        init = lambda: predictors.init_transformer(key, num_dims, num_features, width=width, num_layers=num_layers)
        shapes["transformers"] = sizes(found.transformers)
        expected["transformers"] = [(num, *size) for size in sizes(jax.eval_shape(init))]
    if shapes != expected:
        raise ValueError(f"its arrays have shapes {shapes}, and should have {expected}")


def _surrogate(kind: str, arrays: Mapping[str, np.ndarray], version: int) -> predictors.Surrogate:
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
