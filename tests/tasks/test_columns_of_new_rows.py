"""Warnings about columns that are empty in new rows, or outside the range in the rows of `fit_encoder`."""

import datetime
import json

import numpy as np
import pytest

import metaopt
from metaopt import tasks

TEXTS = {
    "amount": [f"€ {k}" for k in range(100)],
    "level": ["u", "v"] * 50,
    "day": [f"2020-01-{1 + k % 31:02}" for k in range(100)],
    "size": np.random.default_rng(0).normal(size=100).tolist(),
}


def with_gaps(values, share):
    return [None if i < share * len(values) else value for i, value in enumerate(values)]


def test_one_warning_names_the_columns_without_values(caplog, tmp_path):
    encoder = tasks.fit_encoder(TEXTS)
    metaopt.save(tmp_path / "encoder.json", encoder)
    for each in (encoder, metaopt.load(tmp_path / "encoder.json")):
        caplog.clear()
        each.transform({name: values[:50] for name, values in TEXTS.items()})
        assert not caplog.messages
        each.transform(dict.fromkeys(TEXTS, [None] * 50))
        have = "have no values in any of the 50 rows, but had values in the rows of `fit`"
        assert caplog.messages == [f"the columns 'amount', 'level', 'day', 'size' {have}"]
        caplog.clear()
        each.transform(TEXTS | {"size": ["NA"] * 100})
        each.transform(TEXTS | {"size": ["NA"] * 99 + [0.5]})
        have = "has no values in any of the 100 rows, but had values in the rows of `fit`"
        assert caplog.messages == [f"the column 'size' {have}"]


@pytest.mark.parametrize(
    ("share", "num_rows", "warns"),
    [
        (0, 9, False),  # the rows of a small table may be alike
        (0, 10, True),
        (0.5, 9, False),
        (0.5, 10, True),
        (0.8, 30, False),  # .8³⁰ = .0012
        (0.8, 31, True),
        (0.9, 65, False),
        (0.9, 66, True),  # .9⁶⁶ = .00096
        (0.95, 10_000, False),
    ],
)
def test_the_warning_depends_on_the_gaps_of_fit_and_on_the_number_of_rows(share, num_rows, warns, caplog):
    for name, values in TEXTS.items():
        state = json.dumps(tasks.fit_encoder({"a": with_gaps(values, share)}).state())
        encoder = tasks.TableEncoder.from_state(json.loads(state))
        caplog.clear()
        encoder.transform({"a": [None] * num_rows})
        assert ("has no values in any of the" in caplog.text) == warns, name


def test_words_count_as_gaps(caplog):
    words = ["unknown"] * 5 + [f"{k}.5" for k in range(95)]
    encoder = tasks.fit_encoder({"a": words, "b": ["None"] * 95 + ["1", "2", "3", "4", "5"]})
    caplog.clear()
    encoder.transform({"a": ["unknown"] * 5 + [None] * 95, "b": [None] * 100})
    assert [message.partition(" values")[0] for message in caplog.messages] == ["the column 'a' has no"]
    caplog.clear()
    encoder.transform({"a": ["unknown"] * 100, "b": ["None"] * 100})
    assert len(caplog.messages) == 2 and "are not numbers; they count as missing" in caplog.messages[0]
    assert "no values in any" not in caplog.text  # one reason is enough


def test_a_share_or_a_range_that_is_not_known_gives_no_warning(caplog):
    state = tasks.fit_encoder({"a": np.arange(100) / 7}).state()
    for entry in ("share_missing", "low", "high", "unit"):
        del state["columns"][0][entry]
    encoder = tasks.TableEncoder.from_state(json.loads(json.dumps(state)))
    for value in (np.nan, -1e38, 1e38):
        encoder.transform({"a": np.full(10_000, value)})
    assert not caplog.messages


@pytest.mark.parametrize("share", [-0.1, 1.5, "0", True])
def test_a_damaged_share_is_rejected(share):
    state = json.loads(json.dumps(tasks.fit_encoder(TEXTS).state()))
    state["columns"][0]["share_missing"] = share
    with pytest.raises(ValueError, match="do not fit each other"):
        tasks.TableEncoder.from_state(state)


@pytest.mark.parametrize(
    ("values", "warns"),
    [
        (np.linspace(20, 80, 30) * 12, True),  # months instead of years
        (np.linspace(20, 80, 30) / 100, True),
        (np.r_[np.full(10, 81.0), np.full(9, 50.0)], True),
        (np.r_[np.full(10, 81.0), np.full(10, 50.0)], False),  # half of them
        (np.r_[np.full(10, 81.0), np.full(9, 50.0), np.full(99, np.nan)], True),  # gaps do not count
        (np.full(9, 1e3), False),
        (np.r_[20.0, 80.0, np.full(30, 50.0)], False),
    ],
)
@pytest.mark.parametrize("kind", ["number", "amount", "large", "boolean"])
def test_numbers_outside_the_range_of_fit_are_reported(values, warns, kind, caplog, tmp_path):
    as_kind = {
        "number": list,
        "amount": lambda x: [None if np.isnan(v) else f"€ {v:.2f}" for v in x],
        "large": lambda x: [None if np.isnan(v) else 10**9 + int(100 * v) for v in x],  # an offset is subtracted
        "boolean": lambda x: [None if np.isnan(v) else v > 0 for v in x],
    }[kind]
    ages = np.random.default_rng(0).uniform(20, 80, 200).round(2)
    ages[:2] = 20, 80
    encoder = tasks.fit_encoder({"age": as_kind(ages)} if kind != "boolean" else {"age": [True, False] * 100})
    metaopt.save(tmp_path / "encoder.json", encoder)
    caplog.clear()
    metaopt.load(tmp_path / "encoder.json").transform({"age": as_kind(values)})
    assert ("values outside the range in the rows of `fit`" in caplog.text) == (warns and kind != "boolean")
    if warns and kind == "number":
        assert "'age' has " in caplog.text and "20 to 80 (such as " in caplog.text and "unit" in caplog.text


def test_the_range_of_durations_and_times_of_day_has_a_unit(caplog, tmp_path):
    hours = [datetime.timedelta(hours=12 * k) for k in range(21)]
    times = [datetime.time(k) for k in range(21)]
    late, night = [datetime.timedelta(days=36)] * 20, [datetime.time(23)] * 20
    columns = [
        (hours, late, "0 to 10 days (such as 36 days)"),
        (np.array(hours, "timedelta64[s]"), np.array(late, "timedelta64[h]"), "0 to 10 days (such as 36 days)"),
        (hours, [864000.0] * 20, "0 to 10 days (such as 864000)"),  # seconds
        (list(range(21)), late, "0 to 20 (such as 36 days)"),
        ([*times, None], night, "0 to 20 hours (such as 23 hours)"),
    ]
    for fit_rows, new_rows, expected in columns:
        metaopt.save(tmp_path / "encoder.json", tasks.fit_encoder({"a": fit_rows}, keep=("a",)))
        caplog.clear()
        metaopt.load(tmp_path / "encoder.json").transform({"a": new_rows})
        (message,) = caplog.messages
        assert f"in the rows of `fit`, {expected}; has its unit or decimal mark changed?" in message


def test_rows_of_fit_are_within_their_range(caplog):
    frame = {"a": (10.0 ** np.arange(20)).tolist() + [-1e30, 1e30], "b": [0.1] * 10 + [None] * 11 + [1e-40]}
    encoder = tasks.fit_encoder(frame)
    caplog.clear()
    encoder.transform(frame)
    assert "outside the range" not in caplog.text


def test_the_rounding_of_float32_is_within_the_range(caplog):
    encoder = tasks.fit_encoder({"a": [0.1, 0.2, 0.3] * 10})
    caplog.clear()
    encoder.transform({"a": np.full(20, np.float32(0.3))})  # larger than .3 as a float64
    assert "outside the range" not in caplog.text
    encoder.transform({"a": np.full(20, 0.301)})
    assert "outside the range" in caplog.text
    frame = {"a": 1e9 + np.random.default_rng(0).uniform(0, 1, 200)}  # an offset is subtracted
    encoder = tasks.fit_encoder(frame)
    caplog.clear()
    encoder.transform({"a": frame["a"].astype(np.float32)})
    assert "outside the range" not in caplog.text


def test_one_value_that_is_far_outside_the_range_is_named(caplog):
    encoder = tasks.fit_encoder({"weight": [f"{i % 7 + i / 1000}" for i in range(40)], "x": np.arange(-20, 20) / 2})
    encoder.transform({"weight": ["1.616", "120.5"], "x": [-200.0, 199.0]})
    assert not caplog.text
    encoder.transform({"weight": ["1.616", "1616", None], "x": [0, -201, 30]})
    known = "the column 'weight' has 1 of 2 values outside the range in the rows of `fit`, 0 to 6.034 (such as 1616)"
    assert known in caplog.text and "(such as -201)" in caplog.text
