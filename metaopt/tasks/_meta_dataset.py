"""Meta-Dataset's own files, without TensorFlow: one file of TFRecords a class, and a JSON that describes them.

A TFRecord file is a row of records: the length (8 bytes, little-endian), a checksum of it (4), the data, a checksum of
those (4); checksums are CRC-32C, rotated and shifted. The data are a protocol-buffer `Example`: a map from names to
lists of bytes, floats or integers.
"""

import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.tasks._class_sources import Source, _pillow, _pixels, from_arrays

PARTS = ("train", "valid", "test")


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C (Castagnoli), rotated right by 15 bits, plus a constant.

    Args:
      data: any bytes.

    Returns:
      A 32-bit integer.
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_tfrecords(file: str | os.PathLike[str], *, check: bool = False) -> Iterator[bytes]:
    """The records of an uncompressed TFRecord file.

    Args:
      file: its path.
      check: also the checksums of the data (slow: about a second for 5 MB); those of the lengths are always checked.

    Returns:
      An iterator over the data of the records.

    Raises:
      ValueError: the file is cut off, or a checksum is wrong.
    """
    with open(file, "rb") as stream:
        while head := stream.read(12):
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
            if len(head) < 12 or struct.unpack("<I", head[8:])[0] != masked_crc(head[:8]):
                raise ValueError(f"{file} is no TFRecord file, or is damaged: a length does not match its checksum.")
            data, end = stream.read(length), stream.read(4)
            if len(data) < length or len(end) < 4:
                raise ValueError(f"{file} is cut off in its last record.")
            if check and struct.unpack("<I", end)[0] != masked_crc(data):
                raise ValueError(f"{file} is damaged: a record does not match its checksum.")
            yield data


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer that starts at `at`, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol-buffer message: its number, and an integer or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"this is no `Example`: a field is of the unknown kind {kind}.")
        length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(data):
            raise ValueError("this is no `Example`: a field is cut off.")
        yield tag >> 3, data[at : at + length]
        at += length


def _integers(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


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
        for _, features in _fields(data):
            for _, entry in _fields(features):
                pair = dict(_fields(entry))  # 1: the name, 2: the values
                values: list[Any] = []
                for kind, content in _fields(pair.get(2, b"")):  # 1: bytes, 2: floats, 3: integers; one value, or many
                    for _, value in _fields(content):
                        if kind == 1:
                            values.append(value)
                        elif kind == 2:
                            values.extend(np.frombuffer(value, "<f4").tolist())
                        else:
                            many = [value] if isinstance(value, int) else _integers(value)
                            values.extend(v - (1 << 64) if v >> 63 else v for v in many)
                example[pair[1].decode()] = values
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
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
