"""What was learned over tasks, and evaluations, on disk: one file of arrays and JSON, nothing that runs code."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, predictors, spaces
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
}
# What arrays of a surrogate were added: since which version, and what they are in files of before.
_ADDED = {"deep_share": (2, 0.0), "transformer_share": (3, 0.0), "max_shown": (4, predictors.MAX_SHOWN)}
# What the arrays of a surrogate are called, and how many axes they have.
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
    """Writes what `train_meta_optimizer` or `train_meta_searcher` learned as one `.npz` file, atomically.

    Args:
      path: the file.
      meta_optimizer: what was learned, with its space and its candidates.

    Raises:
      ValueError: the space, or a candidate, holds what JSON cannot say.
    """
    space, candidates = spaces.to_json(meta_optimizer.space), meta_optimizer.candidates
    header = {"format": _FORMAT, "version": VERSION, "space": space, "candidates": candidates}
    header |= {name: getattr(meta_optimizer.evidence, name) for name in ("num_records", "effective_tasks")}
    arrays: dict[str, Any] = _arrays("outcome", meta_optimizer.surrogate)
    if meta_optimizer.cost_surrogate is not None:
        arrays |= _arrays("cost", meta_optimizer.cost_surrogate)
    _write(path, _encode(header, "The space or a candidate"), arrays)


def load_meta_optimizer(path: str | os.PathLike[str]) -> MetaOptimizer:
    """Reads what `save_meta_optimizer` wrote. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      A `MetaOptimizer` that predicts and searches as the one that was saved; to the bit where JAX's default
      floating-point type is the same.

    Raises:
      ValueError: the file is no such file, of a newer version, or its arrays do not fit one another.
    """
    header, arrays = _read(path, _FORMAT, VERSION, "save_meta_optimizer")
    try:
        space, candidates = spaces.from_json(header["space"]), header["candidates"]
        version, num_dims = int(header["version"]), spaces.num_dims(space)
        surrogate = _surrogate("outcome", arrays, num_dims, version)
        has_costs = any(name.startswith("cost") for name in arrays)
        costs = _surrogate("cost", arrays, num_dims, version) if has_costs else None
        counts = {name: header.get(name) for name in ("num_records", "effective_tasks")}  # absent before 2026-12
        for name, count in counts.items():
            base.check_positive(name, count, optional=True)
        return meta_optimizer(surrogate, costs, space, candidates, **counts)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} does not describe a `MetaOptimizer` as it should: {error}.") from error


def save_cell_searcher(path: str | os.PathLike[str], searcher: CellSearcher) -> None:
    """Writes what `train_cell_searcher` learned as one `.npz` file, atomically.

    Args:
      path: the file.
      searcher: what was learned, with its candidates.

    Raises:
      ValueError: a candidate holds what JSON cannot say or gives back as something else, such as a tuple.
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
    # Its features follow from the candidates and `encoded`.
    arrays |= {f"prior.{name}": np.asarray(x) for name, x in searcher.prior._asdict().items() if name != "features"}
    _write(path, encoded, arrays | _arrays("weights", searcher.meta_params))


def load_cell_searcher(path: str | os.PathLike[str]) -> CellSearcher:
    """Reads what `save_cell_searcher` wrote. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      A `CellSearcher` that predicts as the one that was saved; to the bit where JAX's default floating-point type is
      the same.

    Raises:
      ValueError: the file is no such file, of a newer version or of version 1, or its arrays do not fit one another.
    """
    header, arrays = _read(path, _CELL_FORMAT, _CELL_VERSION, "save_cell_searcher", oldest=_CELL_VERSION)
    try:
        candidates, ops = header["candidates"], tuple(header["ops"])
        if not candidates or not all(isinstance(candidate, dict) for candidate in candidates):
            raise ValueError("its candidates are no configurations")
        encoder = predictors.cell_encoder(**header["encoder"])
        if len(ops) != encoder.config["num_ops"]:
            raise ValueError(f"its encoder reads {encoder.config['num_ops']} ops; there are {len(ops)}")
        num_members = len(arrays["encoded"])
        num_features = encoder.config["num_features"]
        template = jax.eval_shape(jax.vmap(encoder.init), jax.random.split(jax.random.key(0), num_members))
        shapes = {"encoded": (num_members, len(candidates), encoder.config["width"])}
        shapes |= {"center": (num_features,), "scale": (num_features,), "units": (2,), "prior.noise": ()}
        shapes |= {f"prior.{name}": (len(candidates),) for name in ("mean", "alone")}
        encoded, num_tasks = arrays["encoded"], arrays["prior.spread"].shape[-1]
        blocks = columns(candidates, encoded, candidates, encoded) if encoded.shape == shapes["encoded"] else []
        features = np.concatenate([block for block, _ in blocks] or [np.zeros((len(candidates), 0))], 1)
        shapes |= {"prior.spread": (len(candidates), num_tasks), "prior.own": (features.shape[1],)}
        shapes |= {name: leaf.shape for name, leaf in _arrays("weights", template).items()}
        found = {name: array.shape for name, array in arrays.items()}
        if found != shapes or any(array.dtype.kind != "f" for array in arrays.values()):
            raise ValueError(f"its arrays have shapes {found}, and should be numbers with {shapes}")
        named = lambda path, _: jnp.asarray(arrays["weights" + jax.tree_util.keystr(path)])
        meta_params = jax.tree_util.tree_map_with_path(named, template)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} does not describe a `CellSearcher` as it should: {error}.") from error
    told = {name: arrays[f"prior.{name}"] for name in ("mean", "spread", "own", "alone")}
    prior = predictors.ScorePrior(features, **told, noise=float(arrays["prior.noise"]))
    center, scale, units = (arrays[name] for name in ("center", "scale", "units"))
    return cell_searcher(encoded, encoder, meta_params, candidates, ops, center, scale, prior, units)


def save_meta_architecture(path: str | os.PathLike[str], meta: MetaArchitecture, hyperparams: base.HyperParams) -> None:
    """Writes λ of a `meta_architecture_search` as one `.npz` file, atomically: h's weights, and where training starts.

    Args:
      path: the file.
      meta: what λ is of.
      hyperparams: λ, {"h": φ, "init": θ_0} or {"h": φ}, such as `training.fit(...).hyperparams`.

    Raises:
      ValueError: λ is not of `meta`.
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
    # The format has no bfloat16; every such number is one of float32.
    arrays = {name: x.astype(np.float32) if x.dtype.kind == "V" else x for name, x in arrays.items()}
    _write(path, _encode(header, "The search"), arrays)


def load_meta_architecture(path: str | os.PathLike[str], meta: MetaArchitecture) -> base.HyperParams:
    """Reads what `save_meta_architecture` wrote. Nothing in the file is executed.

    Args:
      path: the file.
      meta: the search, built by the same code as the one that was saved: ops and losses are functions, which no file
        has.

    Returns:
      λ, for `meta.alpha`, `meta.genotype` and `meta.fine_tune`.

    Raises:
      ValueError: the file is no such file, of a newer version, or of another network or predictor than `meta`.
    """
    header, arrays = _read(path, _ARCHITECTURE_FORMAT, _ARCHITECTURE_VERSION, "save_meta_architecture")
    own = {"network": meta.settings["search"].get("network"), "h": meta.settings["h"]}
    for name, value in json.loads(json.dumps(own)).items():
        if header.get(name) != value:
            raise ValueError(
                f"{os.fspath(path)} is of another `{name}` than this search: {header.get(name)}, not {value}."
            )
    template = _arrays("", jax.eval_shape(meta.hyperparams, jax.random.key(0)))
    shapes, expected = ({name: np.shape(x) for name, x in each.items()} for each in (arrays, template))
    if shapes != expected or any(array.dtype.kind != "f" for array in arrays.values()):
        raise ValueError(f"{os.fspath(path)} has arrays of shapes {shapes}, and should have numbers of {expected}.")
    named = lambda path, leaf: jnp.asarray(arrays[jax.tree_util.keystr(path)], leaf.dtype)
    return jax.tree_util.tree_map_with_path(named, jax.eval_shape(meta.hyperparams, jax.random.key(0)))


def save_evaluation(path: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Writes what `evaluate_episodes` returned as one `.npz` file, atomically.

    Args:
      path: the file.
      evaluation: scores of any methods; `join_evaluations` adds those of others on the same episodes.
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
    """Reads what `save_evaluation` wrote. Nothing in the file is executed.

    Args:
      path: the file.

    Returns:
      An `Evaluation`, as the one that was saved to the bit.

    Raises:
      ValueError: the file is no such file, of a newer version, or its arrays do not fit one another.
    """
    header, arrays = _read(path, _EVALUATION_FORMAT, _EVALUATION_VERSION, "save_evaluation")
    try:
        names, sources = header["methods"], header["sources"]
        flags = {name: bool(flag) for name, flag in zip(names, header["transductive"], strict=True)}
        scores = {n: {s: arrays[f"scores {i} {j}"] for j, s in enumerate(sources)} for i, n in enumerate(names)}
        ways, shots = ({s: arrays[f"{what} {j}"] for j, s in enumerate(sources)} for what in ("ways", "shots"))
        marks = {s: arrays[f"marks {j}"] for j, s in enumerate(sources) if f"marks {j}" in arrays}
        for source in sources:
            num, numbers = len(ways[source]), [of[source] for of in (ways, shots, marks) if source in of]
            shapes = [x.shape[:1] for x in numbers] + [of[source].shape[:-1] for of in scores.values()]
            if any(shape != (num,) for shape in shapes):
                raise ValueError(f"the arrays of source {source!r} are not all of {num} episodes")
        # Files of earlier versions do not say which score.
        return Evaluation(
            scores, ways, shots, flags, bool(header["higher_is_better"]), marks, str(header.get("score", ""))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} does not describe an `Evaluation` as it should: {error}.") from error


def _plain(value: Any) -> Any:
    """NumPy's numbers, as rows of a table have them, as JSON has them."""
    return value.item() if isinstance(value, np.generic) else value


def _encode(header: dict[str, Any], what: str) -> bytes:
    """As JSON; `what` of it may not be."""
    try:
        return json.dumps(header, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}.") from error


def _write(path: str | os.PathLike[str], header: bytes, arrays: dict[str, Any]) -> None:
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"  # others may write there, too
    with open(temporary, "wb") as file:
        np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)
    os.replace(temporary, path)


def _read(
    path: str | os.PathLike[str], format_: str, version: int, writer: str, *, oldest: int = 1
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header, of this format and of a version between these two, and the arrays."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        found = header["format"], int(header["version"])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is nothing that `{writer}` wrote: {error}.") from error
    if found[0] != format_:
        reader = f": {_READERS[found[0]]} reads it" if found[0] in _READERS else ""
        raise ValueError(f"{os.fspath(path)} is of format {found[0]!r}, and `{writer}` writes {format_!r}{reader}.")
    if found[1] > version:
        raise ValueError(
            f"{os.fspath(path)} is of version {found[1]}; this metaopt reads {format_!r} up to version {version}. A "
            "newer metaopt reads it."
        )
    if found[1] < oldest:
        raise ValueError(
            f"{os.fspath(path)} is of version {found[1]}, and lacks what {format_!r} has since version {oldest}: "
            "train and save it anew."
        )
    return header, arrays


def _arrays(kind: str, tree: Any) -> dict[str, Any]:
    """Leaves by name; of shapes, as they are."""
    return {kind + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _surrogate(kind: str, arrays: dict[str, np.ndarray], num_dims: int, version: int) -> predictors.Surrogate:
    has = lambda part: any(name.startswith(f"{kind}.{part}.") for name in arrays)
    for name, (since, before) in _ADDED.items():
        if version < since:
            arrays.setdefault(f"{kind}.{name}", np.array(before))
    template = _TEMPLATE._replace(deep=_DEEP if has("deep") else None)
    template = template._replace(transformers=_TRANSFORMER if has("transformers") else None)
    template = template._replace(embedding=_EMBEDDING if has("embedding") else None)

    def read(path, num_axes):
        array = arrays[kind + jax.tree_util.keystr(path)]
        is_count = path[-1] == jax.tree_util.GetAttrKey("max_shown")
        if array.ndim != num_axes or array.dtype.kind != ("i" if is_count else "f"):
            raise ValueError(f"{kind}{jax.tree_util.keystr(path)} has shape {array.shape} and type {array.dtype}")
        return array

    found: predictors.Surrogate = jax.tree_util.tree_map_with_path(read, template)
    num_tasks, num_reference = found.curves.shape
    num_members, num_features = found.attention["log_rates"].shape
    width = 0 if found.embedding is None else len(found.embedding.center)
    expected = {
        "reference": (num_reference, num_dims),
        "coefficients": (num_reference, 1 + num_tasks),
        "log_scales": (num_tasks,),
        "sorted_features": (num_features - width, num_tasks),
        "features": (num_tasks, num_features),
    }
    shapes: dict[str, Any] = {name: np.shape(getattr(found, name)) for name in expected}
    shapes |= {"log_lengths": found.kernel.log_lengths.shape, "logit_share": found.attention["logit_share"].shape}
    expected |= {"log_lengths": (num_dims,), "logit_share": (num_members,)}
    key, sizes = jax.random.key(0), lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
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
    on_device = jax.tree.map(jnp.asarray, found)
    return on_device._replace(
        sorted_features=np.asarray(found.sorted_features),
        closeness=float(found.closeness),
        residual=float(found.residual),
        deep_share=float(found.deep_share),
        transformer_share=float(found.transformer_share),
        max_shown=int(found.max_shown),
    )
