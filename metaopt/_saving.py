"""One pair for everything that can be saved: `metaopt.save(path, value)` and `metaopt.load(path)`.

A file holds a header (JSON) and arrays, and no code. It is one `.npz` file, or a JSON text if the value has no arrays.
A subpackage registers its types next to their code:

    _saving.register(_saving.Kind("predictor", TrainedPredictor, encode, decode))

Files may come from anyone. `decode` therefore checks the header, and the shapes and types of the arrays in
`file.specs`, before it reads an array.
"""

import contextlib
import importlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, MutableSequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _files


class Kind(NamedTuple):
    """How values of one type are saved.

    Attributes:
      name: the header's "format" is "metaopt." followed by this name.
      type: the type of the values.
      encode: `(value) -> (header, arrays)`, a dict of JSON values and a dict of arrays by name.
      decode: `(header, file, **parts) -> value`, where `file` is a `_files.Npz`.
      parts: the arguments of `decode` that the caller of `load` must pass, since no file can hold them: name ->
        description for the error message.
      compress: whether the arrays are compressed.
      version: the version of the header and the arrays; `load` rejects newer files.
    """

    name: str
    type: type
    encode: Callable[[Any], tuple[dict[str, Any], Mapping[str, Any]]]
    decode: Callable[..., Any]
    parts: Mapping[str, str] = {}
    compress: bool = False
    version: int = 1


_KINDS: dict[str, Kind] = {}
# Formats of modules that need an extra. `load` imports the module, which then registers the format.
_LATE = {
    "metaopt.auto_classifier": "metaopt.automl._saved",
    "metaopt.auto_clusterer": "metaopt.automl._clusterer",
    "metaopt.auto_regressor": "metaopt.automl._saved",
}


def register(kind: Kind) -> None:
    """Adds a kind of values to those that `save` and `load` support."""
    _KINDS[f"metaopt.{kind.name}"] = kind


def save(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a trained or computed value to one file, atomically. `metaopt.load` reads it.

    | value | contents |
    |---|---|
    | `predictors.TrainedPredictor` | a predictor g or h, its weights and the scaling of features |
    | `blackbox.MetaOptimizer` | the result of `train_meta_optimizer` or `train_meta_searcher` |
    | `nas.CellSearcher` | the result of `train_cell_searcher` |
    | `nas.TrainedMetaArchitecture` | the λ that a `meta_architecture_search` learned; `load` needs `meta=` |
    | `nas.TrainedNetwork` | a network of `trained_network` or `retraining`; `load` needs `ops=` |
    | `nas.Benchmark` | a table of architectures |
    | `nas.Network`, `nas.ElasticNetwork` | a network or a space of networks; a JSON text |
    | `nas.CostTable` | measured costs of the parts of networks; a JSON text |
    | `evaluation.Evaluation` | scores of methods on episodes |
    | `transforms.LearnedWeights` | the weights of `transforms.learned` |
    | `automl.AutoClassifier`, `automl.AutoRegressor` | a fitted estimator with its models |
    | `automl.AutoClusterer` | a fitted estimator with its clusters |
    | `automl.TabularModel` | a trained `tabular_network`, its λ and the encoding of its table |
    | `tasks.TableEncoder` | how columns of a data frame become numbers; a JSON text |
    | `tasks.Split` | classes, rows and sources of each part; a JSON text |
    | any other pytree of arrays | λ, θ, or the state of a model, an optimizer or a learner; `load` needs `like=` |

    Records have a separate store (`blackbox.append_records`), and `training.fit` writes its checkpoints.

    Args:
      path: the file. The name is used unchanged; an existing file is replaced.
      value: a value of one of these types. Numbers in bfloat16 are saved as float32, which represents each of them
        exactly.

    Raises:
      TypeError: if values of this type cannot be saved, such as a pipeline. (If the last step of a pipeline has one of
        these types, you can save this step.)
      ValueError: if the value is inconsistent, or a part of it cannot be written as JSON.
      ValueError: if a number is not finite. A pytree of arrays may have infinities, but no NaN, and no number beyond
        the largest float32.

    >>> import os, tempfile, metaopt
    >>> split = metaopt.tasks.Split({"train": {"letters": {}}, "test": {"digits": {}}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     metaopt.save(os.path.join(folder, "split.json"), split)
    ...     metaopt.load(os.path.join(folder, "split.json")) == split
    True
    """
    by_type = {kind.type: (format_, kind) for format_, kind in _KINDS.items()}
    if type(value) not in by_type and (reason := _reason_against_a_pytree(value)):
        names = ", ".join(sorted(type_.__name__ for type_ in by_type if type_ is not Pytree))
        raise TypeError(
            f"`metaopt.save` cannot save a {type(value).__name__}; it saves {names}, and pytrees of "
            f"arrays. This value is not a pytree of arrays: {reason}."
        )
    format_, kind = by_type.get(type(value)) or by_type[Pytree]
    header, arrays = kind.encode(value)
    header = {"format": format_, "version": kind.version, **header}
    try:
        text = json.dumps(header, allow_nan=False, ensure_ascii=False, indent=None if arrays else 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"This `{kind.type.__name__}` cannot be written as JSON: {error}.") from error
    if arrays:
        arrays = {"header": np.frombuffer(text.encode(), np.uint8)} | {k: storable(x) for k, x in arrays.items()}
        _files.write_npz(path, arrays, compress=kind.compress)
        return
    with _files.replacing(path) as file:
        file.write(text.encode() + b"\n")


def load(path: str | os.PathLike[str], **parts: Any) -> Any:
    """Reads a file that `metaopt.save` wrote. Nothing in the file is executed.

    Args:
      path: the file.
      **parts: the parts that the file cannot hold: `ops=` for a `nas.TrainedNetwork` (such as `nas.DARTS_OPS`; {} for a
        network of sizes), `meta=` for a `nas.TrainedMetaArchitecture`, and `like=` for a pytree: one of the same
        structure, shapes and types (arrays, or the result of `jax.eval_shape`). Floating-point arrays are cast to the
        types in `like`. All other arrays must already have the types in `like`. For every other type of value, pass
        only the path. `load` compares the classes in `like` (modules, states of optimizers) with those in the file, and
        raises if they differ. It warns if a number or a text among the settings of an Equinox or NNX module differs. It
        cannot compare the settings of a model whose parameters are plain dicts. If `like` is from such a model with
        another normalization layer, the weights load without an error, and its predictions are wrong.

    Returns:
      The saved value. Predictions are equal to the bit if JAX's default floating-point type is the same.

    Raises:
      ValueError: if the file is damaged, is of a newer version, or its contents do not fit each other.
      ValueError: if a part is missing or is not needed.
    """
    name = os.fspath(path)
    with _files.reading(path, "is not a file that `metaopt.save` wrote"), _opened(path) as (header, file):
        format_, version = header["format"], int(header["version"])
        if format_ in _LATE:
            importlib.import_module(_LATE[format_])
        kind = _KINDS.get(format_)
        if kind is None:
            raise ValueError(f"its format is {format_!r}; this metaopt reads {', '.join(sorted(_KINDS))}")
        if version > kind.version:
            raise ValueError(
                f"{name} is of version {version}; this metaopt reads {format_!r} up to version {kind.version}. A newer "
                "metaopt reads it."
            )
        if parts.keys() != kind.parts.keys():
            needs = ", ".join(f"`{part}=`, {description}" for part, description in kind.parts.items())
            got = ", ".join(f"`{part}=`" for part in parts)
            raise ValueError(
                f"{name} holds a `{kind.type.__name__}`: `metaopt.load` needs {needs or 'the path only'}; got "
                f"{got or 'the path only'}."
            )
        with _files.reading(path, f"does not describe a `{kind.type.__name__}` as it should"):
            return kind.decode(header, file, **parts)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], _files.Npz]]:
    """Opens a file, and yields its header and its arrays. A JSON text has no arrays."""
    with open(path, "rb") as stream:
        start = stream.read(1)
        stream.seek(0)
        if start == b"{":
            with zipfile.ZipFile(io.BytesIO(), "w") as empty:
                yield _files.parse_json(stream.read()), _files.Npz(empty, 0)
        else:
            with _files.open_npz(stream) as file:
                yield file.header(), file


def storable(x: Any) -> np.ndarray:
    """Returns the array in a type that `.npz` files support: bfloat16 becomes float32."""
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def named_leaves(prefix: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, which is `prefix` and the path. A leaf may also be a shape with a type."""
    return {prefix + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tree_from_leaves(prefix: str, arrays: Mapping[str, Any], template: Any) -> Any:
    """The inverse of `named_leaves`: a tree with the structure of `template`."""
    named = lambda path, _: arrays[prefix + jax.tree_util.keystr(path)]
    return jax.tree_util.tree_map_with_path(named, template)


def shapes(prefix: str, tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves of a tree by name, for `_files.Npz.floats`."""
    return {name: tuple(np.shape(leaf)) for name, leaf in named_leaves(prefix, tree).items()}


class Pytree:
    """The type of all other pytrees."""


def _reason_against_a_pytree(value: Any, *, abstract: bool = False) -> str:
    """Describes the first leaf that is not an array of numbers. Returns an empty text if all leaves are such arrays.

    With `abstract`, a leaf may also be a shape with a type.
    """
    types = float | np.generic | np.ndarray | jax.Array
    types = types | jax.ShapeDtypeStruct if abstract else types
    leaves = jax.tree_util.tree_leaves_with_path(value)
    for path, leaf in leaves:
        where = f"its leaf {jax.tree_util.keystr(path)}" if path else "it"
        if not isinstance(leaf, types):
            return f"{where} is of type {type(leaf).__name__}"
        dtype = getattr(leaf, "dtype", np.dtype(float))
        if not (jnp.issubdtype(dtype, jnp.floating) or _is_key(leaf) or dtype.kind in "biuc"):
            return f"{where} is of type {dtype}"
    return "" if leaves else "it has no leaf"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def _encode_pytree(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    leaves = named_leaves("leaf", value)
    keys = {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)}
    arrays = {name: storable(jax.random.key_data(leaf) if name in keys else leaf) for name, leaf in leaves.items()}
    for name, array in arrays.items():
        if array.dtype.kind in "fc":
            # The best value of a new `reduce_on_plateau` is infinite.
            _files.check_finite(name, array, infinite=True)
    return {"nodes": _nodes("leaf", value)} | ({"keys": keys} if keys else {}), arrays


def _decode_pytree(header: dict[str, Any], file: _files.Npz, *, like: Any) -> Any:
    if reason := _reason_against_a_pytree(like, abstract=True):
        raise ValueError(f"`like` must be a pytree of arrays, but {reason}")
    templates = named_leaves("leaf", like)
    stored = {k: jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x for k, x in templates.items()}
    types = {name: np.dtype(getattr(leaf, "dtype", float)) for name, leaf in stored.items()}
    others = {name: dtype for name, dtype in types.items() if not jnp.issubdtype(dtype, jnp.floating)}
    expected = {name: tuple(np.shape(leaf)) for name, leaf in stored.items()}
    arrays = file.floats(expected, others=others, infinite=True)
    _check_nodes(header["nodes"], _nodes("leaf", like))
    keys = header.get("keys", {})
    loaded = {name: _like(name, arrays[name], leaf, keys.get(name)) for name, leaf in templates.items()}
    return tree_from_leaves("leaf", loaded, like)


def _like(name: str, array: np.ndarray, template: Any, implementation: str | None) -> jax.Array:
    """Converts an array of a file to the type of its template.

    `implementation` names the generator of a PRNG key, such as "threefry2x32". Any other array has None.
    """
    if implementation is None and not _is_key(template):
        result = jnp.asarray(array, jnp.result_type(template))
        if array.dtype.kind in "iu" and (np.asarray(result) != array).any():
            raise ValueError(f"the array {name} has integers beyond {result.dtype}: enable `jax_enable_x64`")
        if array.dtype.kind == "f" and (np.isfinite(array) & ~np.isfinite(np.asarray(result, np.float64))).any():
            raise ValueError(f"the array {name} has numbers beyond {result.dtype}, the type of `like`")
        return result
    data = jnp.asarray(array)
    key = jax.random.wrap_key_data(data, impl=implementation) if implementation else data
    if key.dtype != template.dtype:
        raise ValueError(f"the array {name} should be of type {template.dtype}, but is of type {key.dtype}")
    return key


def _nodes(name: str, tree: Any) -> dict[str, Any]:
    """Returns name -> [type, settings] for each node that has leaves, except for plain containers.

    `settings` maps the names of attributes to texts.

    A layer normalization and a group normalization have arrays of the same names and shapes. Only the type of the node
    and settings such as the number of groups differ.
    """
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if not children or not children[0][0]:
        return {}
    child_nodes = [_nodes(name + jax.tree_util.keystr(path), child) for path, child in children]
    nodes = {key: node for part in child_nodes for key, node in part.items()}
    if isinstance(tree, Mapping | MutableSequence) or type(tree) is tuple or not jax.tree.leaves(tree):
        return nodes
    leaves = {jax.tree_util.keystr(path, simple=True) for path, _ in children}
    attributes = getattr(tree, "__dict__", {}).items()
    public = {key: x for key, x in attributes if key not in leaves and not key.startswith("_")}
    settings = {key: repr(x) for key, x in public.items() if _is_setting(x)}
    return {name: [type(tree).__qualname__, settings]} | nodes


def _is_setting(x: Any) -> bool:
    # Booleans are not compared, since many of them are switches between training and evaluation.
    return type(x) in (int, float, str) or (type(x) is tuple and all(map(_is_setting, x)))


def _check_nodes(stored: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raises ValueError if a node of `like` has another type than in the file. Warns if settings differ."""
    plain = ["plain container", {}]
    for name in {**stored, **like}:
        stored_type, stored_settings = stored.get(name, plain)
        like_type, like_settings = like.get(name, plain)
        if stored_type != like_type:
            raise ValueError(
                f"{name} is of type {stored_type} in the file and of type {like_type} in `like`; make `like` by the "
                "code that made the saved value"
            )
        different = [key for key, setting in like_settings.items() if stored_settings.get(key, setting) != setting]
        if different:
            texts = [f"`{key}` is {like_settings[key]} (in the file {stored_settings[key]})" for key in different]
            warnings.warn(
                f"The settings of the {like_type} {name} differ between `like` and the file: {', '.join(texts)}. The "
                "settings of `like` are used.",
                stacklevel=4,
            )


_LIKE = {"like": "a pytree of the same structure, shapes and types"}
register(Kind("pytree", Pytree, _encode_pytree, _decode_pytree, parts=_LIKE))
