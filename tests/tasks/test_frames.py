"""Records as data frames and Parquet files."""

import math

import pytest

from metaopt import Record, tasks

pd = pytest.importorskip("pandas")

RECORDS = [
    Record("iris", {"rate": 0.1, "model": "svm", "cap": None, "num": 3}, 0.25, 1 / 3, 1.5, 7, trial=0),
    Record("iris", {"model": 2, "deep": True}, status="FAIL", trial=1, reason="signal SIGSEGV"),
]


@pytest.mark.parametrize("through_parquet", [False, True])
def test_records_come_back_with_their_types(tmp_path, through_parquet):
    frame = tasks.records_to_frame(RECORDS)
    if through_parquet:
        pytest.importorskip("pyarrow")
        frame.to_parquet(tmp_path / "records.parquet")
        frame = pd.read_parquet(tmp_path / "records.parquet")
    back = tasks.records_from_frame(frame)
    assert list(map(repr, back)) == list(map(repr, RECORDS))
    assert type(back[0].configuration["num"]) is int and type(back[0].trial) is int


def test_records_come_back_from_csv_and_can_be_stored(tmp_path):
    records = [record._replace(task="31", cost=1.0, reason="") for record in RECORDS]  # an OpenML data set's name
    tasks.records_to_frame(records).to_csv(tmp_path / "records.csv", index=False)
    back = tasks.records_from_frame(pd.read_csv(tmp_path / "records.csv"))
    assert list(map(repr, back)) == list(map(repr, records))
    tasks.append_records(tmp_path / "records.db", back)
    assert list(map(repr, tasks.read_records(tmp_path / "records.db"))) == list(map(repr, records))


def test_wide_frames_have_a_column_for_each_parameter():
    frame = tasks.records_to_frame(RECORDS, wide=True)
    assert frame["configuration.rate"].tolist()[0] == 0.1 and math.isnan(frame["configuration.rate"][1])
    assert list(map(repr, tasks.records_from_frame(frame))) == list(map(repr, RECORDS))
    assert tasks.records_from_frame(tasks.records_to_frame([])) == []


def test_a_frame_of_a_person_s_own_needs_two_columns():
    frame = pd.DataFrame({"task": ["a"], "configuration": ['{"x": 1}'], "outcome": [0.5]})
    assert tasks.records_from_frame(frame)[0]._replace(cost=0.0) == Record("a", {"x": 1}, 0.5, cost=0.0)
    with pytest.raises(ValueError, match=r"no column \['configuration'\]"):
        tasks.records_from_frame(frame.drop(columns="configuration"))
