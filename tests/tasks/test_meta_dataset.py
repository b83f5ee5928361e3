"""Meta-Dataset's files, written here byte by byte."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image
from tfrecords import crc32c, field, framed, varint

from metaopt import tasks
from metaopt.tasks import _hierarchy, _meta_dataset


def test_the_published_check_value():
    assert crc32c(b"123456789") == 0xE3069283


def example(**features):
    """Name -> bytes, or a list of ints or floats."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            content = field(1, field(1, value))
        elif isinstance(value[0], float):
            content = field(2, field(1, struct.pack(f"<{len(value)}f", *value)))
        else:
            content = field(3, field(1, b"".join(map(varint, value))))
        entries += field(1, field(1, name.encode()) + field(2, content))
    return field(1, entries)


def test_an_example_is_read():
    data = example(image=b"\x00\xff" * 100, label=[3, 300, -1], size=[0.5, -2.0], empty=b"")
    features = _meta_dataset.read_example(data)
    assert features == {"image": [b"\x00\xff" * 100], "label": [3, 300, -1], "size": [0.5, -2.0], "empty": [b""]}
    unpacked = field(1, field(1, field(1, b"n") + field(2, field(3, varint(1 << 3) + varint(7)))))
    assert _meta_dataset.read_example(unpacked) == {"n": [7]}
    for damaged in (data[:-3], b"\x0b\x00", b"\xff"):
        with pytest.raises(ValueError, match="not an `Example`"):
            _meta_dataset.read_example(damaged)


def test_records_and_their_checksums(tmp_path):
    file = tmp_path / "a.tfrecords"
    file.write_bytes(framed(b"first") + framed(b"") + framed(b"third" * 50))
    assert list(_meta_dataset.read_tfrecords(file, check=True)) == [b"first", b"", b"third" * 50]
    whole = file.read_bytes()
    changed = whole.replace(b"first", b"furst")
    for content, check, message in (
        (changed, True, "a record does not match"),
        (whole[:-2], False, "truncated"),
        (b"\x07" + whole[1:], False, "a length does not match"),
        (whole + b"abc", False, "not a TFRecord file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(_meta_dataset.read_tfrecords(file, check=check))
    file.write_bytes(changed)
    assert next(_meta_dataset.read_tfrecords(file)) == b"furst"  # not looked at


def write(folder, spec, num_classes, per_class=2):
    for k in range(num_classes):
        records = b""
        for i in range(per_class):
            stream = io.BytesIO()
            Image.fromarray(np.full((4, 4, 3), 10 * k + i, np.uint8)).save(stream, "PNG")
            records += framed(example(image=stream.getvalue(), label=[k]))
        (folder / f"{k}.tfrecords").write_bytes(records)
    spec = {"name": "toy", "file_pattern": "{}.tfrecords", **spec}
    (folder / "dataset_spec.json").write_text(json.dumps(spec))


def test_a_flat_data_set(tmp_path):
    names = {str(k): f"class {k}" for k in range(6)}
    write(tmp_path, {"classes_per_split": {"TRAIN": 3, "VALID": 1, "TEST": 2}, "class_names": names}, 6)
    train, valid, test = (tasks.from_meta_dataset(tmp_path, part=p, size=2) for p in ("train", "valid", "test"))
    assert [s.class_names for s in (train, valid)] == [("class 0", "class 1", "class 2"), ("class 3",)]
    np.testing.assert_array_equal(test.x[:, 0, 0, 0], [40, 41, 50, 51])
    assert train.x.shape == (6, 2, 2, 3) and test.name == "toy"
    with pytest.raises(ValueError, match="`part` must be one of"):
        tasks.from_meta_dataset(tmp_path, part="dev", size=2)
    with pytest.raises(FileNotFoundError, match="has no dataset_spec.json"):
        tasks.from_meta_dataset(tmp_path / "..", part="test", size=2)
    write(tmp_path, {"classes_per_split": {"TRAIN": 3, "TEST": 3}}, 6)
    with pytest.raises(ValueError, match="it lacks 'class_names'"):
        tasks.from_meta_dataset(tmp_path, part="test", size=2)
    write(tmp_path, {"classes_per_split": {"TRAIN": 6}, "class_names": names}, 6)
    with pytest.raises(ValueError, match="'test' has no classes"):
        tasks.from_meta_dataset(tmp_path, part="test", size=2)


def test_rotations_of_cameras_are_ignored_as_published(tmp_path):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    write(tmp_path, {"classes_per_split": {"TRAIN": 0, "VALID": 0, "TEST": 1}, "class_names": {"0": "one"}}, 0)
    (tmp_path / "0.tfrecords").write_bytes(framed(example(image=stream.getvalue(), label=[0])))
    np.testing.assert_array_equal(tasks.from_meta_dataset(tmp_path, part="test", size=2).x[0], pixels)


def test_superclasses_and_ontologies(tmp_path):
    spec = {
        "superclasses_per_split": {"TRAIN": 1, "VALID": 0, "TEST": 2},
        "classes_per_superclass": {"0": 2, "1": 1, "2": 3},
        "class_names": {str(k): "character01" if k in (0, 3) else f"c{k}" for k in range(6)},
    }
    write(tmp_path, spec, 6)
    test = tasks.from_meta_dataset(tmp_path, part="test", size=4, channels=1)
    np.testing.assert_array_equal(test.superclass, [0, 1, 1, 1])
    np.testing.assert_array_equal(test.x[:, 0, 0], [20, 21, 30, 31, 40, 41, 50, 51])
    graph = [
        {"wn_id": "n0", "words": "", "children_ids": ["n1", "n2"], "parents_ids": []},
        *[{"wn_id": name, "words": "", "children_ids": [], "parents_ids": ["n0"]} for name in ("n1", "n2")],
    ]
    other = [{"wn_id": "n3", "words": "", "children_ids": [], "parents_ids": []}]
    names = {"0": "n1", "1": "n2", "2": "n3"}
    write(tmp_path, {"split_subgraphs": {"TRAIN": graph, "VALID": [], "TEST": other}, "class_names": names}, 3)
    train = tasks.from_meta_dataset(tmp_path, part="train", size=4)
    assert _hierarchy.ontology_nodes(train.ontology, train.class_names, min_leaves=2) == [("n0", [0, 1])]
    assert tasks.from_meta_dataset(tmp_path, part="test", size=4).class_names == ("n3",)


def test_the_files_of_its_builder_for_tfds(tmp_path):
    """Classes one after another, in shards that do not end with them; the parts of v2 are others."""
    records = []
    for k, per_class in enumerate((2, 3, 1, 2)):
        for i in range(per_class):
            stream = io.BytesIO()
            Image.fromarray(np.full((4, 4, 3), 10 * k + i, np.uint8)).save(stream, "PNG")
            records.append(framed(example(image=stream.getvalue(), label=[k])))
    for shard, part in enumerate((records[:3], records[3:4], records[4:])):
        (tmp_path / f"meta_dataset-all_classes.tfrecord-{shard:05d}-of-00003").write_bytes(b"".join(part))
    spec = {"name": "toy", "file_pattern": "{}.tfrecords", "class_names": {str(k): f"class {k}" for k in range(4)}}
    slices = [[0, 2], [2, 5], [5, 6], [6, 8]]

    def spec_of(train, valid, test):
        parts = {"train": range(train), "valid": range(train, train + valid), "test": range(train + valid, 4)}
        slices_of = {p: {str(i): slices[k] for i, k in enumerate(ks)} for p, ks in parts.items()}
        return {**spec, "classes_per_split": {"TRAIN": train, "VALID": valid, "TEST": test}}, slices_of

    versions = {"v1": spec_of(1, 1, 2), "v2": spec_of(3, 0, 1)}
    content = {"dataset_specs": {v: s for v, (s, _) in versions.items()}}
    content["relative_class_slices"] = {v: slices_of for v, (_, slices_of) in versions.items()}
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    read_part = lambda part, **options: tasks.from_meta_dataset(tmp_path, part=part, size=2, **options)
    test = read_part("test", check=True)
    assert test.class_names == ("class 2", "class 3") and test.name == "toy"
    np.testing.assert_array_equal(test.x[:, 0, 0, 0], [20, 30, 31])
    np.testing.assert_array_equal(read_part("valid").x[:, 0, 0, 0], [10, 11, 12])
    np.testing.assert_array_equal(read_part("train", version="v2").x[:, 0, 0, 0], [0, 1, 10, 11, 12, 20])
    np.testing.assert_array_equal(read_part("train", version="v2").y, [0, 0, 1, 1, 1, 2])
    with pytest.raises(ValueError, match="metadata.json is not a specification of Meta-Dataset: it lacks 'v3'"):
        read_part("test", version="v3")
    (tmp_path / "meta_dataset-all_classes.tfrecord-00002-of-00003").unlink()
    with pytest.raises(ValueError, match="expected records 5 to 6, but the files have fewer"):
        read_part("test")
    for file in tmp_path.glob("*.tfrecord-*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no files"):
        read_part("test")
