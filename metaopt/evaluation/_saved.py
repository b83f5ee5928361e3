"""Saves and loads evaluations."""

import os
from collections.abc import Mapping
from typing import Any

from metaopt import _files, _saving
from metaopt.evaluation._evaluations import Evaluation

_VERSION = 1


_FORMAT = "metaopt.evaluation"


def save_evaluation(path: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Writes the result of `evaluate_episodes` as one `.npz` file, atomically.

    Args:
      path: the file.
      evaluation: scores of any methods; `join_evaluations` adds scores of other methods on the same episodes.
    """
    names, sources = list(evaluation.scores), list(evaluation.sources)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
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
    _saving.write(path, _saving.encode(header, "A name"), arrays)


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

    header, arrays = _saving.read(path, _FORMAT, _VERSION, "save_evaluation", check=check)
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
