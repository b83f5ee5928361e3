"""Meta-Dataset's own files, without TensorFlow: one file of TFRecords a class, and a JSON that describes them.

A record is a protocol-buffer `Example`: a map from names to lists of bytes, floats or integers.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.tasks._class_sources import Source, _pillow, _pixels, from_arrays
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
    folder: str | os.PathLike[str], *, part: str, size: int, channels: int = 3, check: bool = False
) -> Source:
    """One data set in Meta-Dataset's format: `dataset_spec.json`, and `0.tfrecords`, `1.tfrecords` ..., a file a class.

    Args:
      folder: of one data set (`omniglot`, `aircraft` ...), as Meta-Dataset's conversion scripts write it.
      part: "train", "valid" or "test": the classes that the specification gives to it.
      size: images are resized to a square of so many pixels a side.
      channels: 3, [N, S, S, 3], or 1, gray, [N, S, S].
      check: as for `read_tfrecords`.

    Returns:
      A `Source`: Omniglot's with superclasses, ImageNet's with the ontology of the part.

    Raises:
      FileNotFoundError: there is no specification.
      ValueError: the part has no classes, a file is damaged, or the specification has another form.
      ImportError: Pillow is not installed.
    """
    if part not in PARTS:
        raise ValueError(f"`part` must be one of {', '.join(map(repr, PARTS))}; got {part!r}.")
    folder, image = Path(folder), _pillow("from_meta_dataset")
    if not (folder / "dataset_spec.json").is_file():
        raise FileNotFoundError(f"{folder} has no dataset_spec.json.")
    spec = json.loads((folder / "dataset_spec.json").read_text(encoding="utf-8"))
    superclass = ontology = None
    try:
        if spec["file_pattern"] != "{}.tfrecords":
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
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/dataset_spec.json lacks {error}.") from error
    if not names:
        raise ValueError(f"{folder}: the part {part!r} has no classes.")
    x, y = [], []
    for number in numbers:
        for record in read_tfrecords(folder / f"{number}.tfrecords", check=check):
            encoded = read_example(record)["image"][0]
            x.append(_pixels(image.open(io.BytesIO(encoded)), size, channels))
            y.append(number)
    # Omniglot has "character01" in every alphabet.
    unique = names if len(set(names)) == len(names) else [f"{k}/{name}" for k, name in zip(numbers, names, strict=True)]
    name = spec.get("name", folder.name)
    return from_arrays(np.stack(x), y, name=name, class_names=unique, superclass=superclass, ontology=ontology)


def _in_part(sizes: dict[str, int], part: str) -> range:
    """Classes of the parts follow one another."""
    ends = np.cumsum([sizes.get(p.upper(), 0) for p in PARTS])
    at = PARTS.index(part)
    return range(int(ends[at] - sizes.get(part.upper(), 0)), int(ends[at]))
