"""Files of learned optimizers, for `metaopt.save` and `metaopt.load`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, _files, _row_embedding, _saving, spaces
from metaopt.blackbox import _deep_kernel, _surrogates, _transformer
from metaopt.blackbox._goals import make_goals
from metaopt.blackbox._meta_search import MetaOptimizer, meta_optimizer

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


def _encode(learned: MetaOptimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    header = {"space": spaces.to_json(learned.space), "candidates": learned.candidates}
    header |= {name: getattr(learned.evidence, name) for name in ("num_records", "effective_tasks")}
    header |= {"reads": learned.reads} if learned.reads else {}
    if learned.objectives:
        header |= {"objectives": list(learned.objectives), "constraints": dict(learned.constraints)}
    arrays = _saving.named_leaves("outcome", learned.surrogate)
    for number, other in enumerate(learned.other_surrogates):
        arrays |= _saving.named_leaves(f"other{number}", other)
    if learned.cost_surrogate is not None:
        arrays |= _saving.named_leaves("cost", learned.cost_surrogate)
    return header, arrays


def _decode(header: dict[str, Any], file: _files.Npz) -> MetaOptimizer:
    space = spaces.from_json(header["space"])
    goals = make_goals(header.get("objectives"), header.get("constraints"))
    others = [] if goals is None else [f"other{number}" for number in range(len(goals.names) - 1)]
    kinds = [*_kinds(file.specs), *others]
    for kind in kinds:
        _check_surrogate(kind, file.specs, spaces.num_dims(space))
    arrays = {name: file[name] for name in file.specs}
    for name, array in arrays.items():
        if array.dtype.kind == "f":  # features of tasks may be missing
            _files.check_finite(name, array, missing=name.endswith("sorted_features"))
    counts = {name: header[name] for name in ("num_records", "effective_tasks")}
    for name, count in counts.items():
        _checks.check_positive(name, count)
    surrogates = {kind: _surrogate(kind, arrays) for kind in kinds}
    reads = header.get("reads")
    if reads not in (None, "table", "images"):
        raise ValueError(f"`reads` is {reads!r}, and should be 'table' or 'images'")
    candidates = header["candidates"]
    options: Any = {"reads": reads, "goals": goals, "other_surrogates": [surrogates[kind] for kind in others]}
    return meta_optimizer(surrogates["outcome"], surrogates.get("cost"), space, candidates, **options, **counts)


def _kinds(arrays: Mapping[str, Any]) -> list[str]:
    return [kind for kind in ("outcome", "cost") if kind == "outcome" or any(n.startswith(kind) for n in arrays)]


def _tree(kind: str, arrays: Mapping[str, Any]) -> _surrogates.Surrogate:
    """A `Surrogate` of the arrays, or of their shapes and types; the number of axes is not checked."""
    has = lambda part: any(name.startswith(f"{kind}.{part}.") for name in arrays)
    template = _TEMPLATE._replace(deep=_DEEP if has("deep") else None)
    template = template._replace(transformers=_TRANSFORMER if has("transformers") else None)
    template = template._replace(embedding=_EMBEDDING if has("embedding") else None)
    return _saving.tree_from_leaves(kind, arrays, template)


def _check_surrogate(kind: str, specs: Mapping[str, Any], num_dims: int) -> None:
    """Raises an error unless the arrays of a surrogate have shapes and types that fit each other."""
    surrogate = _tree(kind, specs)
    template = _TEMPLATE._replace(deep=None if surrogate.deep is None else _DEEP)
    template = template._replace(transformers=None if surrogate.transformers is None else _TRANSFORMER)
    template = template._replace(embedding=None if surrogate.embedding is None else _EMBEDDING)

    def check(path, num_axes, spec):
        is_count = path[-1] == jax.tree_util.GetAttrKey("max_shown")
        if len(spec.shape) != num_axes or not (spec.dtype.kind == "i" if is_count else _files.is_real_float(spec)):
            raise ValueError(f"{kind}{jax.tree_util.keystr(path)} has shape {spec.shape} and type {spec.dtype}")

    is_spec = lambda node: hasattr(node, "dtype")
    specs_of = lambda tree: jax.tree.leaves(tree, is_leaf=is_spec)
    for (path, num_axes), spec in zip(jax.tree_util.tree_leaves_with_path(template), specs_of(surrogate), strict=True):
        check(path, num_axes, spec)
    num_tasks, num_reference = surrogate.curves.shape
    num_members, num_features = surrogate.attention["log_rates"].shape
    width = 0 if surrogate.embedding is None else surrogate.embedding.center.shape[0]
    expected = {
        "reference": (num_reference, num_dims),
        "coefficients": (num_reference, 1 + num_tasks),
        "log_scales": (num_tasks,),
        "sorted_features": (num_features - width, num_tasks),
        "features": (num_tasks, num_features),
    }
    shapes: dict[str, Any] = {name: getattr(surrogate, name).shape for name in expected}
    shapes |= {
        "log_lengths": surrogate.kernel.log_lengths.shape,
        "logit_share": surrogate.attention["logit_share"].shape,
    }
    expected |= {"log_lengths": (num_dims,), "logit_share": (num_members,)}
    key, sizes = jax.random.key(0), lambda tree: [leaf.shape for leaf in specs_of(tree)]
    if surrogate.embedding is not None:
        shapes["embedding"] = sizes(surrogate.embedding)
        expected["embedding"] = sizes(jax.eval_shape(lambda: _row_embedding.init_embedding(key, width))) + 2 * [
            (width,)
        ]
    if surrogate.deep is not None:
        num_deep, num_hidden = surrogate.deep.bias.shape
        init = lambda: _deep_kernel.init_deep_kernel(key, num_dims, num_features, num_hidden=num_hidden)
        shapes["deep"] = sizes(surrogate.deep)
        expected["deep"] = [(num_deep, *size) for size in sizes(jax.eval_shape(init))]
    if surrogate.transformers is not None:
        num, num_layers, width, _ = surrogate.transformers.layers["mix"].shape
        init = lambda: _transformer.init_transformer(key, num_dims, num_features, width=width, num_layers=num_layers)
        shapes["transformers"] = sizes(surrogate.transformers)
        expected["transformers"] = [(num, *size) for size in sizes(jax.eval_shape(init))]
    if shapes != expected:
        raise ValueError(f"its arrays have shapes {shapes}, and should have {expected}")


def _surrogate(kind: str, arrays: Mapping[str, np.ndarray]) -> _surrogates.Surrogate:
    """The surrogate of arrays that passed `_check_surrogate`."""
    surrogate = _tree(kind, arrays)
    return jax.tree.map(jnp.asarray, surrogate)._replace(
        sorted_features=np.asarray(surrogate.sorted_features),
        closeness=float(surrogate.closeness),
        residual=float(surrogate.residual),
        deep_share=float(surrogate.deep_share),
        transformer_share=float(surrogate.transformer_share),
        max_shown=int(surrogate.max_shown),
    )


_saving.register(_saving.Kind("learned_optimizer", MetaOptimizer, _encode, _decode))
