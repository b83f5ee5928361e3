"""Splits of classes, sources and examples into parts: plain data, saved with the run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metaopt import _checks, _files, _saving
from metaopt.tasks._class_sources import Source, check_names


class Split(dict[str, dict[str, dict[str, Any]]]):
    """A dict of JSON values: part -> source -> {"classes": names, "rows": numbers}; `metaopt.save` writes it as JSON.

    A missing entry means all classes or all rows. A source that a part does not name is not in the part. For example,
    `Split({"train": {"letters": {}}, "test": {"digits": {}}})` assigns whole sources to parts.
    """


def split_classes(source: Source, sizes: Mapping[str, int], *, seed: int = 0, by_superclass: bool = False) -> Split:
    """Splits one source into parts with different classes, at random.

    Args:
      source: the source to split.
      sizes: part -> its number of classes (of superclasses, with `by_superclass`).
      seed: the seed of the random order.
      by_superclass: assign whole superclasses to one part, so that not only characters but also alphabets are new.

    Returns:
      A split.

    Raises:
      ValueError: if the parts have more classes than the source, a part has size 0, or `by_superclass` is given and the
        source has no superclasses.
    """
    if by_superclass and source.superclass is None:
        raise ValueError(f"Source {source.name!r} has no superclasses; take `by_superclass=False`.")
    unit = source.superclass if by_superclass and source.superclass is not None else np.arange(source.num_classes)
    parts = {
        part: {source.name: {"classes": [source.class_names[c] for c in np.flatnonzero(np.isin(unit, chosen))]}}
        for part, chosen in _draw(
            source.name, np.unique(unit), sizes, seed, "superclasses" if by_superclass else "classes"
        )
    }
    return Split(parts)


def split_rows(source: Source, sizes: Mapping[str, float], *, seed: int = 0) -> Split:
    """Splits one source into parts with different examples of every class.

    If the source has groups, the parts have different groups.

    Args:
      source: the source to split.
      sizes: part -> its share, positive; shares sum to at most 1.
      seed: the seed of the random order.

    Returns:
      A split, whose parts all have all classes. So `select` numbers the classes of each part as the source does.

    Raises:
      ValueError: if a share is not positive, or shares sum to more than 1.
      ValueError: if a part has no example, or none of some class.
    """
    if min(sizes.values(), default=0) <= 0 or sum(sizes.values()) > 1 + 1e-9:
        raise ValueError(f"`sizes` must be positive shares that sum to at most 1; got {dict(sizes)}.")
    rng = np.random.default_rng(seed)
    if source.group is not None:
        quantile = rng.permutation(source.num_groups)[source.group] / source.num_groups
    else:
        order = np.lexsort((rng.random(len(source.y)), source.y))  # at random within the classes
        counts = np.bincount(source.y)
        rank = np.empty(len(order))
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        quantile = rank / counts[source.y]
    split = Split()
    start = 0.0
    for part, share in sizes.items():
        rows = np.flatnonzero((quantile >= start - 1e-9) & (quantile < start + share - 1e-9))
        if not len(rows):
            raise ValueError(f"Part {part!r} of source {source.name!r} has no example: its share {share} is too small.")
        missing = np.setdiff1d(source.y, source.y[rows])
        if len(missing):  # `select` would number the classes of this part differently
            fewest = math.ceil(1 / min(sizes.values()) - 1e-9)
            fix = f"Drop small classes, `source.keep(min_examples={fewest})`, or take other shares."
            if source.group is not None:
                fix = "The parts have different groups. Take another `seed`, or drop this class by `source.keep`."
            count = np.count_nonzero(source.y == missing[0])
            raise ValueError(
                f"Part {part!r} of source {source.name!r} has no example of {len(missing)} classes: "
                f"{source.class_names[missing[0]]!r} has {count} in all. {fix}"
            )
        split[part] = {source.name: {"rows": rows.tolist()}}
        start += share
    return split


def merge_splits(*splits: Mapping[str, Mapping[str, Any]]) -> Split:
    """Merges splits of different sources.

    Args:
      *splits: the splits; no source may be in two of them.

    Returns:
      A split with all their parts.

    Raises:
      ValueError: if two splits name the same source.
    """
    merged = Split()
    seen: set[str] = set()
    for split in splits:
        names = {name for part in split.values() for name in part}
        if names & seen:
            raise ValueError(
                f"Two splits name the source {sorted(names & seen)[0]!r}; only splits of different sources can be "
                "merged."
            )
        seen |= names
        for part, sources in split.items():
            merged[part] = {**merged.get(part, {}), **sources}
    return merged


def select(
    sources: Source | Mapping[str, Source] | Sequence[Source], split: Mapping[str, Any], part: str
) -> list[Source]:
    """Returns the sources of one part, each with only the classes and rows of this part.

    The classes of each source are numbered again. If two parts have different classes, the same label means different
    classes: compare their `class_names`.

    Args:
      sources: all sources of the split, with different names; a single source is allowed.
      split: part -> source -> its classes and rows.
      part: the name of the part.

    Returns:
      The sources of the part, in its order.

    Raises:
      KeyError: if the part or a source does not exist.
      ValueError: if a class or a row does not exist.
      ValueError: if two parts share an example, or two sources share a name.
    """
    _check_split(split, "`split`")
    sources = [sources] if isinstance(sources, Source) else sources  # a `Source` is a tuple, too
    sources = list(sources.values() if isinstance(sources, Mapping) else sources)
    by_name = dict(zip(check_names(sources), sources, strict=True))
    chosen_part = _checks.named(split, part, "`part`")
    for name in chosen_part:
        _check_disjoint(split, by_name[name])
    return [
        by_name[name].keep(classes=chosen.get("classes"), rows=chosen.get("rows"))
        for name, chosen in chosen_part.items()
    ]


def _check_split(split: Any, name: str) -> None:
    """Raises ValueError unless `split` is a split."""
    parts = list(split.values()) if isinstance(split, Mapping) else [None]
    if not all(isinstance(part, Mapping) and all(map(_is_selection, part.values())) for part in parts):
        raise ValueError(f"{name} is not a split: it must be part -> source -> classes and rows.")


def _is_selection(selection: Any) -> bool:
    """Returns whether `selection` has only names of classes and numbers of rows."""
    if not isinstance(selection, Mapping) or not set(selection) <= {"classes", "rows"}:
        return False
    classes, rows = selection.get("classes"), selection.get("rows")
    if isinstance(classes, str) or isinstance(rows, str):
        return False
    is_row = lambda row: isinstance(row, int | np.integer) and not isinstance(row, bool)
    try:
        return all(isinstance(name, str) for name in classes or ()) and all(
            map(is_row, rows if rows is not None else ())
        )
    except TypeError:
        return False


def _draw(name, units, sizes: Mapping[str, int], seed: int, what: str) -> list[tuple[str, np.ndarray]]:
    if min(sizes.values(), default=0) < 1:
        raise ValueError(f"`sizes` must give every part at least 1; got {dict(sizes)}.")
    if sum(sizes.values()) > len(units):
        raise ValueError(f"Source {name!r} has {len(units)} {what}; the parts ask for {sum(sizes.values())}.")
    order = np.random.default_rng(seed).permutation(units)
    ends = np.cumsum(list(sizes.values()))
    return [(part, order[end - size : end]) for (part, size), end in zip(sizes.items(), ends, strict=True)]


def _check_disjoint(split: Mapping[str, Any], source: Source) -> None:
    owner = np.full(len(source.y), -1)
    parts = [part for part in split if source.name in split[part]]
    for number, part in enumerate(parts):
        chosen = split[part][source.name]
        in_part = np.ones(len(source.y), bool)
        if chosen.get("classes") is not None:
            in_part &= np.isin(np.array(source.class_names), chosen["classes"])[source.y]
        if chosen.get("rows") is not None:
            in_part &= np.isin(np.arange(len(source.y)), chosen["rows"])
        shared = np.flatnonzero(in_part & (owner >= 0))
        if len(shared):
            raise ValueError(
                f"The parts {parts[owner[shared[0]]]!r} and {part!r} share example {shared[0]} of source "
                f"{source.name!r}."
            )
        owner[in_part] = number


def _encode(split: Split) -> tuple[dict[str, Any], dict[str, Any]]:
    _check_split(split, "`split`")
    return {"parts": split}, {}


def _decode(header: dict[str, Any], file: _files.Npz) -> Split:
    _check_split(header["parts"], "`parts`")
    return Split(header["parts"])


_saving.register(_saving.Kind("split", Split, _encode, _decode))
