"""Files of trained objects: a header in JSON and arrays, in one `.npz` file. They hold no code."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from metaopt import _files

_READERS = {
    "metaopt.meta_optimizer": "`blackbox.load_meta_optimizer`",
    "metaopt.cell_searcher": "`blackbox.load_cell_searcher`",
    "metaopt.meta_architecture": "`blackbox.load_meta_architecture`",
    "metaopt.evaluation": "`blackbox.load_evaluation`",
    "metaopt.predictor": "`predictors.load`",
    "metaopt.trained_network": "`nas.load_trained_network`",
}


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


def plain(value: Any) -> Any:
    """Converts NumPy numbers, which rows of a table may have, to Python numbers for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def encode(header: dict[str, Any], what: str) -> bytes:
    """Encodes the header as JSON; `what` names the part that may fail, for the error message."""
    try:
        return json.dumps(header, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}.") from error


def write(path: str | os.PathLike[str], header: bytes, arrays: dict[str, Any]) -> None:
    _files.write_npz(path, {"header": np.frombuffer(header, np.uint8), **arrays})


def read(
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


def arrays(kind: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name; leaves may also be shapes with types."""
    return {kind + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
