"""TFRecord files and protocol buffers, without TensorFlow.

A TFRecord file is a sequence of records. Each record has the length (8 bytes, little-endian), a checksum of the length
(4 bytes), the data, and a checksum of the data (4 bytes). Checksums are CRC-32C, rotated and shifted. A protocol buffer
is a sequence of fields, each a number and a value. The files of Meta-Dataset and of NAS-Bench-101 combine both formats.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """Returns the checksum of a TFRecord: CRC-32C (Castagnoli), rotated right by 15 bits, plus a constant.

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
    """Returns the records of an uncompressed TFRecord file.

    Args:
      file: its path.
      check: whether to check the checksums of the data (slow: about a second for 5 MB). The checksums of the lengths
        are always checked.

    Returns:
      An iterator over the data of the records.

    Raises:
      ValueError: if the file is truncated, or a checksum is wrong.
    """
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        while head := stream.read(12):
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
            if len(head) < 12 or struct.unpack("<I", head[8:])[0] != masked_crc(head[:8]):
                raise ValueError(
                    f"{file} is not a TFRecord file, or is damaged at byte {stream.tell() - len(head)}: a length does "
                    "not match its checksum."
                )
            if length + 4 > size - stream.tell():  # checked before memory is allocated
                raise ValueError(f"{file} is truncated in its last record.")
            data, checksum = stream.read(length), stream.read(4)
            if check and struct.unpack("<I", checksum)[0] != masked_crc(data):
                raise ValueError(f"{file} is damaged: a record does not match its checksum.")
            yield data


_MAX_VARINT = 10  # bytes: 64 bits, with seven bits per byte


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """The 64-bit integer that starts at `start`, with seven bits per byte, and the position of its end."""
    value = 0
    for i, byte in enumerate(data[start : start + _MAX_VARINT]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value & (1 << 64) - 1, start + i + 1
    raise ValueError(f"An integer is truncated, or has more than {_MAX_VARINT} bytes.")


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Returns the fields of a protocol-buffer message. The time is proportional to the length of the message.

    Args:
      data: the message.

    Returns:
      An iterator over (number, value). A value is an integer, or the bytes of a float, a string or a nested message.

    Raises:
      ValueError: if a field is truncated or of an unknown kind, or an integer has more than 10 bytes.
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"This is not a protocol buffer of the expected form: a field is of the kind {kind}.")
        length, position = _varint(data, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
        if position + length > len(data):
            raise ValueError("This is not a protocol buffer of the expected form: a field is truncated.")
        yield tag >> 3, data[position : position + length]
        position += length


def integers(packed: bytes) -> Iterator[int]:
    """Returns the integers that are packed in one field.

    Args:
      packed: the bytes of the field.

    Returns:
      An iterator over the integers, without sign.

    Raises:
      ValueError: if an integer is truncated, or has more than 10 bytes.
    """
    position = 0
    while position < len(packed):
        value, position = _varint(packed, position)
        yield value
