"""Files of evaluations, for `metaopt.save` and `metaopt.load`."""

from collections.abc import Mapping
from typing import Any

from metaopt import _files, _saving
from metaopt.evaluation._evaluations import Evaluation


def _encode(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, Any]]:
    names, sources = list(evaluation.scores), list(evaluation.sources)
    if not all(isinstance(name, str) for name in [*names, *sources]):
        raise ValueError(f"The names of methods and sources must be texts; got {names} and {sources}.")
    header = {
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
    return header, arrays


def _decode(header: dict[str, Any], file: _files.Npz) -> Evaluation:
    _check_evaluation(header, file.specs)
    names, sources = header["methods"], header["sources"]
    flags = dict(zip(names, header["transductive"], strict=True))
    scores = {n: {s: file[f"scores {i} {j}"] for j, s in enumerate(sources)} for i, n in enumerate(names)}
    ways, shots = ({s: file[f"{kind} {j}"] for j, s in enumerate(sources)} for kind in ("ways", "shots"))
    marks = {s: file[f"marks {j}"] for j, s in enumerate(sources) if f"marks {j}" in file}
    return Evaluation(scores, ways, shots, flags, header["higher_is_better"], marks, header["score"])


def _check_evaluation(header: dict[str, Any], specs: Mapping[str, Any]) -> None:
    """Raises an error unless the header and the shapes of the arrays fit each other."""
    names, sources, flags = (header[name] for name in ("methods", "sources", "transductive"))
    is_bool = lambda value: isinstance(value, bool)
    if not all(isinstance(name, str) for name in [*names, *sources, header["score"]]):
        raise ValueError("the names of methods, of sources and of the score must be texts")
    if len(flags) != len(names) or not all(map(is_bool, [*flags, header["higher_is_better"]])):
        raise ValueError("`transductive` and `higher_is_better` must be true or false")
    for j, source in enumerate(sources):
        (num,), num_axes = specs[f"ways {j}"].shape, {f"scores {i} {j}": 2 for i in range(len(names))}
        num_axes |= {f"{kind} {j}": 1 for kind in ("ways", "shots")}
        num_axes |= {f"marks {j}": 1} if f"marks {j}" in specs else {}
        for name, axes in num_axes.items():
            spec = specs[name]
            if len(spec.shape) != axes or spec.shape[0] != num or 0 in spec.shape[1:]:
                raise ValueError(f"the arrays of source {source!r} are not all of {num} episodes")
            if spec.dtype.kind not in "iuf":
                raise ValueError(f"the arrays of source {source!r} must be numbers; {name!r} is {spec.dtype}")


_saving.register(_saving.Kind("evaluation", Evaluation, _encode, _decode))
