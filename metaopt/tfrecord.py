"""TFRecord files and protocol buffers, without TensorFlow.

A TFRecord file is a row of records: the length (8 bytes, little-endian), a checksum of it (4), the data, a checksum of
those (4); checksums are CRC-32C, rotated and shifted. A protocol buffer is a row of fields, each a number and a value.
Meta-Dataset's files and those of NAS-Bench-101 are made of both.
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
                at = stream.tell() - len(head)
                raise ValueError(
                    f"{file} is no TFRecord file, or is damaged at byte {at}: a length does not match its checksum."
                )
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


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol-buffer message.

    Args:
      data: the message.

    Returns:
      An iterator over (number, value): an integer, or the bytes of a float, a string or what is nested.

    Raises:
      ValueError: a field is cut off, or of an unknown kind.
      IndexError: an integer is cut off.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"this is no protocol buffer of the kind expected: a field is of the unknown kind {kind}.")
        length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(data):
            raise ValueError("this is no protocol buffer of the kind expected: a field is cut off.")
        yield tag >> 3, data[at : at + length]
        at += length


def integers(packed: bytes) -> Iterator[int]:
    """Integers that are packed in one field.

    Args:
      packed: its bytes.

    Returns:
      An iterator over them, without sign.

    Raises:
      IndexError: the last one is cut off.
    """
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value
