"""Reads Meta-Dataset's own files, and the files of its builder for tfds, without TensorFlow.

The files are TFRecords, and a JSON that describes them. A record is a protocol-buffer `Example`: a map from names to
lists of bytes, floats or integers.
"""

import io
import itertools
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaopt import _files
from metaopt._tfrecord import fields, integers, read_tfrecords
from metaopt.tasks._class_sources import Source, from_arrays
from metaopt.tasks._image_sources import _check_channels, _pillow, _pixels

PARTS = ("train", "valid", "test")


def read_example(data: bytes) -> dict[str, list[Any]]:
    """Reads a serialized `tf.train.Example`: the values of each feature.

    Args:
      data: one record.

    Returns:
      Name -> list of bytes, floats or ints.

    Raises:
      ValueError: if the data are not an `Example`.
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"This is not an `Example`: {error!r}.") from error
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
    """Reads one data set of Meta-Dataset, in the form of its conversion scripts or of its builder for tfds.

    The scripts write `dataset_spec.json`, and one file per class: `0.tfrecords`, `1.tfrecords` ... The builder (`tfds
    build md_tfds`) writes `metadata.json`, and all classes, one after another, to `*-all_classes.tfrecord-*`.

    Args:
      folder: the folder of one data set (`omniglot`, `aircraft` ...; with tfds `meta_dataset/omniglot/1.0.0`).
      part: "train", "valid" or "test": the classes that the specification assigns to this part.
      size: pixels per side; images are resized to a square of this size. As in the published pipeline, EXIF data are
        ignored.
      channels: 3 for colors [N, S, S, 3], or 1 for gray [N, S, S].
      version: the version of the protocol: "v1", or "v2" (with VTAB), which assigns other classes to the parts. Only
        the files of the builder have both versions. For the files of the scripts, this argument is ignored.
      check: whether to check the checksums of the data, too (slow: about a second for 5 MB). The checksums of the
        lengths are always checked.

    Returns:
      A `Source`. Omniglot's source has superclasses; ImageNet's has the ontology of the part.

    Raises:
      FileNotFoundError: if the specification or the records do not exist.
      ValueError: if the part has no classes, a file is damaged, or an image has more than 2**26 pixels.
      ValueError: if the specification has another form, or `channels` is neither 1 nor 3.
      ImportError: if Pillow is not installed.

    Source: Triantafillou et al., ICLR 2020, https://arxiv.org/abs/1903.03096; the formats:
    https://github.com/google-research/meta-dataset
    """
    if part not in PARTS:
        raise ValueError(f"`part` must be one of {', '.join(map(repr, PARTS))}; got {part!r}.")
    _check_channels(channels)
    folder, image = Path(folder), _pillow("from_meta_dataset")
    is_tfds = (folder / "metadata.json").is_file()
    if not is_tfds and not (folder / "dataset_spec.json").is_file():
        raise FileNotFoundError(f"{folder} has no dataset_spec.json, and no metadata.json of tfds's builder.")
    file = folder / ("metadata.json" if is_tfds else "dataset_spec.json")
    with _files.reading(file, "is not a specification of Meta-Dataset"):
        spec, slices = _files.read_json(file), None
        if is_tfds:
            slices, spec = spec["relative_class_slices"][version][part], spec["dataset_specs"][version]
        elif spec["file_pattern"] != "{}.tfrecords":
            raise ValueError(f"only files '{{}}.tfrecords' are read; got {spec['file_pattern']!r}")
        part_classes = _classes_of_part(spec, part)
        ranges = [slices[str(k)] for k in range(len(part_classes.numbers))] if slices is not None else []
    if not part_classes.numbers:
        raise ValueError(f"{folder}: the part {part!r} has no classes.")
    if is_tfds:
        records_of_classes = _tfds_records(folder, ranges, check)
    else:
        files = (folder / f"{number}.tfrecords" for number in part_classes.numbers)
        records_of_classes = (read_tfrecords(file, check=check) for file in files)
    x, y = [], []
    with _files.reading(folder, "has a record that is not an image of Meta-Dataset"):
        for number, records in zip(part_classes.numbers, records_of_classes, strict=True):
            for record in records:
                x.append(_pixels(image, io.BytesIO(read_example(record)["image"][0]), size, channels))
                y.append(number)
        names = part_classes.names
        # Omniglot has "character01" in every alphabet.
        if len(set(names)) < len(names):
            names = [f"{number}/{name}" for number, name in zip(part_classes.numbers, names, strict=True)]
        return from_arrays(
            np.stack(x),
            y,
            name=str(spec.get("name", folder.name)),
            class_names=names,
            superclass=part_classes.superclass,
            ontology=part_classes.ontology,
        )


class _PartClasses(NamedTuple):
    """The classes of a part, from a specification."""

    numbers: range
    names: list[str]
    superclass: list[int] | None = None
    ontology: dict[str, list[str]] | None = None


def _classes_of_part(spec: Any, part: str) -> _PartClasses:
    """Returns the classes of a part. If the specification has another form, it may raise any error."""
    num_classes = len(spec["class_names"])
    superclass = ontology = None
    if "superclasses_per_split" in spec:
        sizes = spec["classes_per_superclass"]
        sizes = [operator.index(sizes[str(k)]) for k in range(len(sizes))]
        if min(sizes, default=0) < 0 or sum(sizes) > num_classes:
            raise ValueError(f"`classes_per_superclass` must add up to at most {num_classes} classes")
        superclasses = _in_part(spec["superclasses_per_split"], part, len(sizes))
        first = sum(sizes[: superclasses.start])
        superclass = [k for k in superclasses for _ in range(sizes[k])]
        numbers = range(first, first + len(superclass))
    elif "split_subgraphs" in spec:
        graphs = spec["split_subgraphs"]
        leaves = {p: sum(not node["children_ids"] for node in graph) for p, graph in graphs.items()}
        numbers = _in_part(leaves, part, num_classes)
        ontology = {str(node["wn_id"]): [str(child) for child in node["children_ids"]] for node in graphs[part.upper()]}
    else:
        numbers = _in_part(spec["classes_per_split"], part, num_classes)
    return _PartClasses(numbers, [str(spec["class_names"][str(k)]) for k in numbers], superclass, ontology)


def _tfds_records(folder: Path, slices: list[list[int]], check: bool) -> Iterator[Iterator[bytes]]:
    """Yields the records of each class, which are a slice of the sequence of all records in the shards.

    The slices of the classes of a part follow one another, so that one pass over the shards reads them.
    """
    files = sorted(folder.glob("*-all_classes.tfrecord-*"))
    if not files:
        raise FileNotFoundError(f"{folder} has no files *-all_classes.tfrecord-* (other formats of tfds are not read).")
    records = itertools.chain.from_iterable(read_tfrecords(file, check=check) for file in files)
    num_read = 0
    for start, stop in slices:
        if not num_read <= start <= stop:
            raise ValueError(f"{folder}: the classes of a part must follow one another; one starts at {start}.")
        records_of_class = list(itertools.islice(records, start - num_read, stop - num_read))
        if len(records_of_class) < stop - start:
            raise ValueError(f"{folder}: expected records {start} to {stop}, but the files have fewer.")
        num_read = stop
        yield iter(records_of_class)


def _in_part(sizes: dict[str, int], part: str, num: int) -> range:
    """Returns the classes of a part, out of `num` classes. Classes of one part are contiguous."""
    sizes = {p: operator.index(sizes.get(p.upper(), 0)) for p in PARTS}
    if min(sizes.values()) < 0 or sum(sizes.values()) > num:
        raise ValueError(f"the parts have {sizes} classes, and there are {num}")
    start = sum(sizes[p] for p in PARTS[: PARTS.index(part)])
    return range(start, start + sizes[part])
