"""Meta-Dataset's own files, and those of its builder for tfds, without TensorFlow: TFRecords, and a JSON about them.

A record is a protocol-buffer `Example`: a map from names to lists of bytes, floats or integers.
"""

import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.tasks._class_sources import Source, from_arrays
from metaopt.tasks._image_sources import _pillow, _pixels
from metaopt.tfrecord import fields, integers, read_tfrecords

PARTS = ("train", "valid", "test")


def read_example(data: bytes) -> dict[str, list[Any]]:
    """A serialized `tf.train.Example`: the values of each feature.

    Args:
      data: one record.

    Returns:
      Name -> list of bytes, floats or ints.

    Raises:
      ValueError: the data are something else.
    """
    example: dict[str, list[Any]] = {}
    try:
        for _, features in fields(data):
            for _, entry in fields(features):
                pair = dict(fields(entry))  # 1: the name, 2: the values
                values: list[Any] = []
                for kind, content in fields(pair.get(2, b"")):  # 1: bytes, 2: floats, 3: integers; one value, or many
                    for _, value in fields(content):
                        if kind == 1:
                            values.append(value)
                        elif kind == 2:
                            values.extend(np.frombuffer(value, "<f4").tolist())
                        else:
                            many = [value] if isinstance(value, int) else integers(value)
                            values.extend(v - (1 << 64) if v >> 63 else v for v in many)
                example[pair[1].decode()] = values
    except (IndexError, KeyError, TypeError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"this is no `Example`: {error!r}.") from error
    return example


def from_meta_dataset(
    folder: str | os.PathLike[str],
    *,
    part: str,
    size: int,
    channels: int = 3,
    version: str = "v1",
    check: bool = False,
) -> Source:
    """One data set of Meta-Dataset, as its conversion scripts write it: `dataset_spec.json`, and `0.tfrecords`,
    `1.tfrecords` ..., a file a class; or as its builder for TensorFlow Datasets does (`tfds build md_tfds`):
    `metadata.json`, and all classes, one after another, in `*-all_classes.tfrecord-*`.

    Args:
      folder: of one data set (`omniglot`, `aircraft` ...; with tfds `meta_dataset/omniglot/1.0.0`).
      part: "train", "valid" or "test": the classes that the specification gives to it.
      size: images are resized to a square of so many pixels a side.
      channels: 3, [N, S, S, 3], or 1, gray, [N, S, S].
      version: of the protocol, where the files have both: "v1", or "v2" (with VTAB, which has other parts).
      check: as for `read_tfrecords`.

    Returns:
      A `Source`: Omniglot's with superclasses, ImageNet's with the ontology of the part.

    Raises:
      FileNotFoundError: there is no specification, or there are no records.
      ValueError: the part has no classes, a file is damaged, or the specification has another form.
      ImportError: Pillow is not installed.

    Source: Triantafillou et al., ICLR 2020, https://arxiv.org/abs/1903.03096; the formats:
    https://github.com/google-research/meta-dataset
    """
    if part not in PARTS:
        raise ValueError(f"`part` must be one of {', '.join(map(repr, PARTS))}; got {part!r}.")
    folder, image = Path(folder), _pillow("from_meta_dataset")
    of_tfds = (folder / "metadata.json").is_file()
    if not of_tfds and not (folder / "dataset_spec.json").is_file():
        raise FileNotFoundError(f"{folder} has no dataset_spec.json, and no metadata.json of tfds's builder.")
    file = folder / ("metadata.json" if of_tfds else "dataset_spec.json")
    superclass = ontology = None
    slices: dict[str, list[int]] = {}
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
        if of_tfds:
            slices, spec = spec["relative_class_slices"][version][part], spec["dataset_specs"][version]
        elif spec["file_pattern"] != "{}.tfrecords":
            raise ValueError(f"{folder}: only files '{{}}.tfrecords' are read; got {spec['file_pattern']!r}.")
        if "superclasses_per_split" in spec:
            sizes = spec["classes_per_superclass"]
            sizes = [sizes[str(k)] for k in range(len(sizes))]
            above = _in_part(spec["superclasses_per_split"], part)
            first = sum(sizes[: above.start])
            superclass = [k for k in above for _ in range(sizes[k])]
            numbers = range(first, first + len(superclass))
        elif "split_subgraphs" in spec:
            graphs = spec["split_subgraphs"]
            numbers = _in_part({p: sum(not n["children_ids"] for n in graph) for p, graph in graphs.items()}, part)
            ontology = {n["wn_id"]: n["children_ids"] for n in graphs[part.upper()]}
        else:
            numbers = _in_part(spec["classes_per_split"], part)
        names = [spec["class_names"][str(k)] for k in numbers]
        at = [slices[str(k)] for k in range(len(numbers))] if of_tfds else []
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} lacks {error}.") from error
    if not names:
        raise ValueError(f"{folder}: the part {part!r} has no classes.")
    if of_tfds:
        classes = _of_tfds(folder, at, check)
    else:
        classes = (read_tfrecords(folder / f"{number}.tfrecords", check=check) for number in numbers)
    x, y = [], []
    for number, records in zip(numbers, classes, strict=True):
        for record in records:
            encoded = read_example(record)["image"][0]
            x.append(_pixels(image.open(io.BytesIO(encoded)), size, channels))
            y.append(number)
    # Omniglot has "character01" in every alphabet.
    unique = names if len(set(names)) == len(names) else [f"{k}/{name}" for k, name in zip(numbers, names, strict=True)]
    name = spec.get("name", folder.name)
    return from_arrays(np.stack(x), y, name=name, class_names=unique, superclass=superclass, ontology=ontology)


def _of_tfds(folder: Path, slices: list[list[int]], check: bool) -> Iterator[Iterator[bytes]]:
    """The records of each class, which are at a slice of all that follow one another in the shards.

    The classes of a part follow one another, too, so that one pass reads them.
    """
    files = sorted(folder.glob("*-all_classes.tfrecord-*"))
    if not files:
        raise FileNotFoundError(f"{folder} has no files *-all_classes.tfrecord-* (other formats of tfds are not read).")
    records = itertools.chain.from_iterable(read_tfrecords(file, check=check) for file in files)
    read = 0
    for start, stop in slices:
        if start < read:
            raise ValueError(f"{folder}: the classes of a part must follow one another; one starts at {start}.")
        found = list(itertools.islice(records, start - read, stop - read))
        if len(found) < stop - start:
            raise ValueError(f"{folder}: records {start} to {stop} were expected; the files end before.")
        read = stop
        yield iter(found)


def _in_part(sizes: dict[str, int], part: str) -> range:
    """Classes of the parts follow one another."""
    ends = np.cumsum([sizes.get(p.upper(), 0) for p in PARTS])
    at = PARTS.index(part)
    return range(int(ends[at] - sizes.get(part.upper(), 0)), int(ends[at]))
