"""Records as data frames and Parquet files."""

import functools
import math
import types

import pytest

from metaopt import blackbox
from metaopt.base import Record

pd = pytest.importorskip("pandas")

RECORDS = [
    Record("iris", {"rate": 0.1, "model": "svm", "cap": None, "num": 3}, 0.25, 1 / 3, 1.5, 7, trial=0),
    Record("iris", {"model": 2, "deep": True}, status="FAIL", trial=1, reason="signal SIGSEGV"),
]


@pytest.mark.parametrize("through_parquet", [False, True])
def test_records_come_back_with_their_types(tmp_path, through_parquet):
    frame = blackbox.records_to_frame(RECORDS)
    if through_parquet:
        pytest.importorskip("pyarrow")
        frame.to_parquet(tmp_path / "records.parquet")
        frame = pd.read_parquet(tmp_path / "records.parquet")
    loaded = blackbox.records_from_frame(frame)
    assert list(map(repr, loaded)) == list(map(repr, RECORDS))
    assert type(loaded[0].configuration["num"]) is int and type(loaded[0].trial) is int


def test_gaps_of_nullable_types_are_those_of_others():
    records = [RECORDS[0]._replace(outcome=1.0, cost=2.0), RECORDS[1], Record("wine", {}, 3.0, trial=2)]
    frame = blackbox.records_to_frame(records)
    nullable = frame.convert_dtypes()
    assert nullable["cost"].dtype == nullable["outcome"].dtype == "Int64" and None not in nullable["outcome"].tolist()
    for table in (frame, nullable, nullable.assign(reason=nullable["reason"].replace("", pd.NA))):
        loaded = blackbox.records_from_frame(table)
        assert list(map(repr, loaded)) == list(map(repr, records))
        assert all(type(record.trial) is type(record.seed) is int for record in loaded)
    texts = frame.assign(reason=pd.array(["", None, "time limit"], "string"), outcome=[None, 0.5, float("nan")])
    loaded = blackbox.records_from_frame(texts)
    assert [record.reason for record in loaded] == ["", "", "time limit"] and repr(loaded[0].outcome) == "nan"


def test_frames_of_other_libraries_are_converted_or_named():
    frame = blackbox.records_to_frame(RECORDS)
    other = types.SimpleNamespace(columns=list(frame.columns), to_pandas=lambda: frame)  # as polars' frames are
    assert list(map(repr, blackbox.records_from_frame(other))) == list(map(repr, RECORDS))  # pyright: ignore
    pa = pytest.importorskip("pyarrow")
    assert list(map(repr, blackbox.records_from_frame(pa.Table.from_pandas(frame)))) == list(map(repr, RECORDS))


@pytest.mark.parametrize(("names", "reason"), [(["007", "1e5"], "12"), (["NA", "7"], "NA"), (["31", "31"], "")])
def test_records_come_back_from_csv_and_can_be_stored(tmp_path, names, reason):
    kept = [record._replace(cost=1.0, reason=reason) for record in RECORDS]
    records = [record._replace(task=name) for record, name in zip(kept, names, strict=True)]
    blackbox.records_to_frame(records).to_csv(tmp_path / "records.csv", index=False)
    read_csv = functools.partial(pd.read_csv, tmp_path / "records.csv")
    texts, gaps = {"task": str, "reason": str}, {"outcome": "", "cost": ""}
    loaded = blackbox.records_from_frame(read_csv(dtype=texts, na_values=gaps, keep_default_na=False))
    assert list(map(repr, loaded)) == list(map(repr, records))
    with pytest.raises(ValueError, match="column 'task' must contain strings; got .* CSV"):
        blackbox.records_from_frame(read_csv())
    blackbox.append_records(tmp_path / "records.db", loaded)
    assert list(map(repr, blackbox.read_records(tmp_path / "records.db"))) == list(map(repr, records))


def test_wide_frames_have_a_column_for_each_parameter():
    frame = blackbox.records_to_frame(RECORDS, wide=True)
    assert frame["configuration.rate"].tolist()[0] == 0.1 and math.isnan(frame["configuration.rate"][1])
    assert list(map(repr, blackbox.records_from_frame(frame))) == list(map(repr, RECORDS))
    assert blackbox.records_from_frame(blackbox.records_to_frame([])) == []


def test_a_frame_of_a_person_s_own_needs_two_columns():
    frame = pd.DataFrame({"task": ["a"], "configuration": ['{"x": 1}'], "outcome": [0.5]})
    assert blackbox.records_from_frame(frame)[0]._replace(cost=0.0) == Record("a", {"x": 1}, 0.5, cost=0.0)
