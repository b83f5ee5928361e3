"""TFRecord files: a file that was cut is an error wherever the cut is."""

import struct

import pytest

from metaopt import _tfrecord


def record(data):
    length = struct.pack("<Q", len(data))
    checksum = lambda data: struct.pack("<I", _tfrecord.masked_crc(data))
    return length + checksum(length) + data + checksum(data)


def test_a_file_that_was_cut_within_a_record_is_an_error(tmp_path):
    records = [b"first", b"", b"a third one"]
    whole = b"".join(map(record, records))
    ends = [len(b"".join(map(record, records[:n]))) for n in range(4)]
    file = tmp_path / "records"
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        if size in ends:
            assert list(_tfrecord.read_tfrecords(file)) == records[: ends.index(size)]
        else:
            with pytest.raises(ValueError, match="truncated in its last record|a length does not match its checksum"):
                list(_tfrecord.read_tfrecords(file))
