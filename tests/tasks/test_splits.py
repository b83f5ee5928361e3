"""Parts of a split have nothing in common, and come back from the file as they went."""

import json

import numpy as np
import pytest

import metaopt
from metaopt import tasks

Y = np.repeat(np.arange(12), 5)
LETTERS = tasks.from_arrays(
    np.arange(60), Y, name="letters", group=np.tile(np.arange(5), 12), superclass=np.repeat(np.arange(4), 3)
)
DIGITS = tasks.from_arrays(np.arange(40), np.arange(40) % 2, name="digits")


def test_classes():
    split = tasks.split_classes(LETTERS, {"train": 7, "valid": 2, "test": 3})
    parts = [tasks.select([LETTERS], split, part)[0] for part in split]
    assert [part.num_classes for part in parts] == [7, 2, 3]
    assert sorted(np.concatenate([part.x for part in parts]).tolist()) == list(range(60))
    assert split == tasks.split_classes(LETTERS, {"train": 7, "valid": 2, "test": 3})
    assert split != tasks.split_classes(LETTERS, {"train": 7, "valid": 2, "test": 3}, seed=1)


def test_whole_superclasses():
    split = tasks.split_classes(LETTERS, {"train": 3, "test": 1}, by_superclass=True)
    train, test = (tasks.select([LETTERS], split, part)[0] for part in ("train", "test"))
    assert (train.num_classes, test.num_classes, test.superclass.max()) == (9, 3, 0)


def test_rows_of_other_groups_or_a_share_of_every_class():
    split = tasks.split_rows(LETTERS, {"train": 0.6, "test": 0.4})
    train, test = (tasks.select([LETTERS], split, part)[0] for part in ("train", "test"))
    assert (np.bincount(train.y) == 3).all() and (np.bincount(test.y) == 2).all()
    assert not set((train.x % 5).tolist()) & set((test.x % 5).tolist())  # the groups
    split = tasks.split_rows(DIGITS, {"train": 0.7, "valid": 0.1, "test": 0.2})
    parts = [tasks.select([DIGITS], split, part)[0] for part in split]
    assert [np.bincount(part.y).tolist() for part in parts] == [[14, 14], [2, 2], [4, 4]]
    assert sorted(np.concatenate([part.x for part in parts]).tolist()) == list(range(40))


def test_splits_are_json_and_merge(tmp_path):
    split = tasks.merge_splits(
        tasks.split_classes(LETTERS, {"train": 8, "test": 4}), tasks.Split({"test": {"digits": {}}})
    )
    metaopt.save(tmp_path / "split.json", split)
    assert metaopt.load(tmp_path / "split.json") == split == json.loads((tmp_path / "split.json").read_text())["parts"]
    train, test = (tasks.select({"a": LETTERS, "b": DIGITS}, split, part) for part in ("train", "test"))
    assert [s.name for s in train] == ["letters"] and [s.name for s in test] == ["letters", "digits"]
    assert test[1].num_classes == 2
    assert tasks.select(DIGITS, tasks.Split({"all": {"digits": {}}}), "all")[0].num_classes == 2  # one alone
    for other in ("[1]", '{"train": [1]}', '{"train": {"digits": [1]}}'):
        (tmp_path / "other.json").write_text('{"format": "metaopt.split", "version": 1, "parts": ' + other + "}")
        with pytest.raises(ValueError, match="`parts` is not a split"):
            metaopt.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"train":\n {"digits": ')
    with pytest.raises(ValueError, match="other.json is not a file that .*line 2"):
        metaopt.load(tmp_path / "other.json")
