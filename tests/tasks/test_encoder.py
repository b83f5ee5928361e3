"""`fit_encoder` and `TableEncoder`: types of frames and values, dropped columns, and rows that come later."""

import datetime
import decimal
import enum
import fractions
import json
import logging
import sys
import types

import numpy as np
import pytest

import metaopt
from metaopt import tasks

pd = pytest.importorskip("pandas")
RNG = np.random.default_rng(0)


def fitted(*columns, **options):
    """The encoder of a dict of columns, and its encoding of the same rows."""
    frame = columns[0] if columns else options
    encoder = tasks.fit_encoder(frame)
    return encoder, encoder.transform(frame)


def reasons(encoder, column):
    return [(note.action, note.reason) for note in encoder.notes if note.column == column]


def mixed(n=60):
    """Columns of all kinds. In each categorical one, every level repeats."""
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "size": rng.normal(size=n),
            "member": rng.random(n) < 0.5,
            "grade": pd.Categorical(np.arange(n) % 3, categories=[2, 0, 1], ordered=True),
            "color": np.array(["red", "blue", "None"], object)[rng.integers(0, 3, n)],
            "price": [f"{value:,}" for value in rng.integers(500, 2000, n)],
            "sold": pd.date_range("2020-01-01 03:00", periods=n, freq="37h"),
            "seen": [f"{1 + k % 28}.{1 + k % 12}.2021" for k in range(n)],
            "count": pd.array([None if k % 7 == 0 else k % 5 for k in range(n)], "Int64"),
            "flag": pd.array([None if k % 7 == 1 else k % 2 == 0 for k in range(n)], "boolean"),
            "word": pd.array(rng.choice(["u", "v"], n), "string"),
            "both": [1, "a", 2.0, None] * (n // 4),
            "time": pd.to_timedelta(rng.integers(0, 1000, n), unit="h"),
        }
    )


def test_numbers_categories_and_booleans():
    encoder, x = fitted(
        {"number": [1.5, -2, 3], "flag": [True, False, None], "word": ["b", "a", "b"], "level": ["10", "9x", "9x"]}
    )
    assert encoder.names == ("number", "flag", "word", "level")
    np.testing.assert_array_equal(encoder.categorical, [False, False, True, True])
    assert encoder.levels == ((), (), ("b", "(other)"), ("9x", "(other)"))
    np.testing.assert_array_equal(x, [[1.5, 1, 0, 1], [-2, 0, 1, 0], [3, np.nan, 0, 0]])
    assert x.dtype == np.float64


def test_levels_are_sorted_numbers_first_or_in_the_order_of_pandas():
    words = ["10", "9", "b", "a"] * 2
    encoder, x = fitted(word=words, grade=pd.Categorical(words, categories=["b", "10", "c", "a", "9"], ordered=True))
    assert encoder.levels == (("9", "10", "a", "b"), ("b", "10", "a", "9"))
    np.testing.assert_array_equal(x[:4], [[1, 1], [0, 3], [3, 0], [2, 2]])


def test_a_frame_of_all_kinds_is_the_same_as_lists_dicts_and_arrays_of_objects():
    frame = mixed()
    encoder, x = fitted(frame)
    assert [name.split(".")[0] for name in encoder.names if "." in name] == ["sold"] * 4 + ["seen"] * 3
    assert np.isnan(x).sum() == 9 + 9 + 15
    for same in (
        frame.to_dict("list"),
        frame.to_dict("records"),
        frame.to_numpy(),
        frame.astype(object).to_numpy().tolist(),
        frame.astype({"size": "float64[pyarrow]", "word": "category"}),
        frame[frame.columns[::-1]].assign(more=[[1]] * 60),
    ):
        np.testing.assert_array_equal(encoder.transform(same), x)
    for row in (0, 1, 59):
        np.testing.assert_array_equal(encoder.transform(frame.iloc[[row]]), x[[row]])
    order = RNG.permutation(60)
    np.testing.assert_array_equal(encoder.transform(frame.iloc[order]), x[order])


def test_unnamed_columns_are_matched_by_position():
    array = np.column_stack([RNG.normal(size=30), np.ones(30), RNG.normal(size=30)])
    encoder, x = fitted(array)
    assert encoder.names == ("0", "2") and reasons(encoder, "1") == [("dropped", "is constant")]
    np.testing.assert_array_equal(x, array[:, [0, 2]])
    np.testing.assert_array_equal(encoder.transform(pd.DataFrame(array, columns=["c", "b", "a"])), x)
    named = tasks.fit_encoder(pd.DataFrame(array, columns=["c", "b", "a"]))
    np.testing.assert_array_equal(named.transform(array.tolist()), x)
    for wrong in (array[:, :2], array[:, :1].tolist()):
        for each in (encoder, named):
            with pytest.raises(ValueError, match=r"X has [12] features, but \w+ is expecting 3 features as input"):
                each.transform(wrong)
    numbered = tasks.fit_encoder(pd.DataFrame(array)[[0, 2]])
    np.testing.assert_array_equal(numbered.transform(pd.DataFrame(array)[[2, 0]]), x)
    np.testing.assert_array_equal(numbered.transform(pd.DataFrame(array[:, [0, 2]])), x)


def test_missing_and_repeated_names():
    frame = mixed()
    encoder, x = fitted(frame.assign(same=1))
    np.testing.assert_array_equal(encoder.transform(frame), x)  # the constant column is not needed
    message = "feature names should match.*\nFeature names seen at fit time, yet now missing:\n- member\n- color\n"
    with pytest.raises(ValueError, match=message):
        encoder.transform(frame.drop(columns=["member", "color"]))
    frame = pd.DataFrame(RNG.normal(size=(5, 3)), columns=["a", "a", "a_2"])
    encoder, x = fitted(frame)
    assert encoder.names == ("a", "a_2", "a_2_2")
    np.testing.assert_array_equal(x, frame.to_numpy())


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["1", "-2.5", "1e3", ".5"], [1, -2.5, 1000, 0.5]),
        (["1,065", "870", "1,065.50", "2"], [1065, 870, 1065.5, 2]),
        (["1,5", "2", "0,25", "1.065,5"], [1.5, 2, 0.25, 1065.5]),
        (["1", "?", "NA", "2", "", "3", "None", " 4 "], [1, np.nan, np.nan, 2, np.nan, 3, np.nan, 4]),
        ([1, "2", None, 2.5, np.nan, pd.NA, "4"], [1, 2, np.nan, 2.5, np.nan, np.nan, 4]),
        (
            [decimal.Decimal("1.5"), fractions.Fraction(1, 4), np.float32(2), 7, None, decimal.Decimal("sNaN")],
            [1.5, 0.25, 2, 7, np.nan, np.nan],
        ),
        ([datetime.time(1, 30), None, datetime.time(23)], [1.5, np.nan, 23]),
        ([datetime.timedelta(hours=36), np.timedelta64(1, "D"), None], [1.5, 1, np.nan]),
        (np.array(["1", "2.5"]), [1, 2.5]),
        (np.ma.masked_array([1, 2, 3], [False, True, False]), [1, 2, 3]),
        (pd.arrays.SparseArray([0.0, 1.0, np.nan]), [0, 1, np.nan]),
    ],
)
def test_texts_and_objects_that_are_numbers(texts, numbers):
    encoder, x = fitted({"a": texts})
    assert not encoder.categorical.any()
    np.testing.assert_array_equal(x[:, 0], numbers)


def test_words_among_many_numbers_are_missing_and_reported(caplog):
    texts = [str(k * 1.5) for k in range(60)]
    texts[7] = texts[9] = "unknown"
    encoder, x = fitted({"a": texts})
    np.testing.assert_array_equal(x[:, 0], [np.nan if k in (7, 9) else k * 1.5 for k in range(60)])
    reason = "is text that holds numbers, except 2 values such as 'unknown', which count as missing"
    assert reasons(encoder, "a") == [("changed", reason)] and reason in caplog.text
    few = ["1", "2", "3"] * 20 + ["unknown"] * 2  # the codes of few numbers and a word are levels
    assert fitted({"a": few})[0].levels == (("1", "2", "3", "unknown"),)
    caplog.clear()
    np.testing.assert_array_equal(encoder.transform({"a": ["x", "7", None, 8]})[:, 0], [np.nan, 7, np.nan, 8])
    message = "the column 'a' has 1 of 4 values that are not numbers; they count as missing (such as 'x')"
    assert caplog.messages == [message]


def test_unseen_categories_are_reported(caplog):
    frame = {"a": ["x", "y"] * 10, "b": ["u", "v", "v", "u"] * 5, "c": ["r", "s"] * 9 + ["once", "twice"]}
    encoder, _ = fitted(frame)
    caplog.clear()
    x = encoder.transform({"a": ["X", "Y", None, "X", "X", "Y"], "b": ["u"] + ["w"] * 5, "c": ["r"] + ["w"] * 5})
    assert np.isnan(x[:, 0]).all() and np.isnan(x[1:, 1]).all() and (x[1:, 2] == 2).all()  # "(other)"
    reason = "values that do not occur in the rows of `fit`; they count as missing"
    assert caplog.messages == [
        f"the column 'a' has 5 of 6 {reason} (such as 'X')",
        f"the column 'b' has 5 of 6 {reason} (such as 'w')",
    ]
    caplog.clear()
    encoder.transform({"a": ["x"] * 45 + ["z"] * 5, "b": ["u"] * 46 + ["w"] * 4, "c": ["w"] * 50})
    reason = "values that are not levels of the rows of `fit`; all of them count as '(other)'"
    assert caplog.messages == [f"the column 'c' has 50 of 50 {reason} (such as 'w')"]


def test_dates_in_another_order_are_reported_with_the_order_of_fit(caplog):
    dates = [f"{day}.{month:02}.2024" for month in (1, 2, 3) for day in range(10, 25)]
    encoder, _ = fitted({"day": dates})
    caplog.clear()
    encoder.transform({"day": ["3/13/2024", "3/12/2024", None]})
    reason = "values that are not dates in the order day-month-year; they count as missing"
    assert caplog.messages == [f"the column 'day' has 1 of 3 {reason} (such as '3/13/2024')"]


def test_dates_with_the_year_first_are_read_in_any_column_of_dates(caplog):
    december = [18627, 18626, 18625]
    for dates in (["31/12/2020", "30/12/2020", "29/12/2020"], ["12/31/2020", "12/30/2020", "12/29/2020"]):
        encoder, _ = fitted({"t": dates})
        new = [dates[0], "2020-12-30T00:00:00Z", datetime.date(2020, 12, 29)]
        for column in (new, ["2020-12-31", "2020-12-30", "2020/12/29"], pd.Series(new[:2] + ["2020.12.29"])):
            np.testing.assert_array_equal(encoder.transform({"t": column})[:, 0], december)
            np.testing.assert_array_equal(fitted({"t": column})[1][:, 0], december)  # in the rows of `fit`, too
    assert not caplog.messages
    encoder.transform({"t": ["2020-13-31", "2020-12-30"]})
    assert "1 of 2 values that are not dates" in caplog.text
    mixed_dates = ["1.2.2020", "2020-04-03", "2.2.2020"] * 10  # dates with the year last have dots: the day is first
    for words in ([], ["unknown"] * 2):
        _, x = fitted({"t": mixed_dates * 2 + [f"2019-01-{day:02}" for day in range(1, 32)] + words})
        np.testing.assert_array_equal(x[:3, 1], [2, 4, 2])


def test_an_order_that_is_guessed_is_a_warning_also_next_to_other_forms(caplog):
    years_first = [f"2019-01-{day:02}" for day in range(1, 32)]
    for words in ([], ["unknown"]):
        caplog.clear()
        _, x = fitted({"t": ["05/06/2020"] * 3 + years_first + words})
        assert x[0, 1] == 5 and "the order of day and month is ambiguous" in caplog.text
        caplog.clear()
        fitted({"t": ["05/06/2020", "06/13/2020"] + years_first + words})
        assert "ambiguous" not in caplog.text


def test_times_become_days_month_weekday_and_hour():
    times = ["2021-02-28T18:00:00", "1970-01-01T00:00:00", "2024-02-29T23:59:59", "1969-12-31T06:30:00"]
    moments = [datetime.datetime.fromisoformat(time) for time in times]
    since = [(moment - datetime.datetime(1970, 1, 1)).total_seconds() / 86400 for moment in moments]
    expected = np.array([[day, m.month, m.weekday(), m.hour] for day, m in zip(since, moments, strict=True)])
    for column in (times, moments, pd.to_datetime(times), np.array(times, "datetime64[ns]"), pd.Series(moments)):
        encoder, x = fitted({"t": column})
        assert encoder.names == ("t.days", "t.month", "t.weekday", "t.hour") and not encoder.categorical.any()
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(encoder.transform({"t": [*times, None, "soon"]})[:4], expected, rtol=0, atol=1e-9)
        assert np.isnan(encoder.transform({"t": [None, "soon", 3]})).all()
    assert fitted({"t": ["31/12/2020", "1/1/2021"]})[1][0, 0] == fitted({"t": ["2020-12-31", "2021-01-01"]})[1][0, 0]
    dates, _ = fitted({"t": [datetime.date(2020, 1, 1), datetime.date(2020, 1, 8), None]})
    assert dates.names == ("t.days",)  # the same month, weekday and hour
    zone = pd.Series(pd.to_datetime(["2020-07-01 01:00", "2020-07-02 05:00"])).dt.tz_localize("Europe/Berlin")
    np.testing.assert_array_equal(fitted({"t": zone})[1][:, -1], [23, 3])


def test_time_zones_become_utc():
    east = datetime.timezone(datetime.timedelta(hours=5))
    moments = [datetime.datetime(2020, 7, 1, 3, tzinfo=east), datetime.datetime(2020, 7, 2, 6, tzinfo=east)]
    expected = [[18443 + 22 / 24, 6, 1, 22], [18445 + 1 / 24, 7, 3, 1]]
    for column in (moments, pd.Series(moments), [moment.isoformat() for moment in moments], [*moments, None]):
        np.testing.assert_allclose(fitted({"t": column})[1][:2], expected, rtol=0, atol=1e-9)


def test_dates_whose_order_is_unknown_are_noted(caplog):
    for days in (["1/2/2020", "3/4/2020"], ["1/1/1970", "3/4/2020"]):  # the second begins with second 0
        encoder, x = fitted({"t": days})
        np.testing.assert_array_equal(x[:, 1], [1, 3])
        assert "the order of day and month is ambiguous" in reasons(encoder, "t")[0][1]
        (warning,) = caplog.messages  # the other note, that they become days and month, is only information
        assert "ambiguous" in warning
        caplog.clear()
    encoder, _ = fitted({"t": ["1/1/2020", "2/2/2020"]})  # both readings agree
    assert "ambiguous" not in reasons(encoder, "t")[0][1] and not caplog.text
    encoder, x = fitted({"t": ["1.2.2020", "3.4.2020"]})  # dots have the day first
    np.testing.assert_array_equal(x[:, 1], [2, 4])
    assert "ambiguous" not in reasons(encoder, "t")[0][1] and not caplog.text
    encoder, x = fitted({"t": ["1/2/2020", "3.4.2020"]})  # not all dates have dots
    np.testing.assert_array_equal(x[:, 1], [1, 3])
    assert "ambiguous" in reasons(encoder, "t")[0][1] and "ambiguous" in caplog.text
    caplog.clear()
    _, x = fitted({"t": ["1/2/2020 10:00:00.5", "3/4/2020 10:00:00.5"]})  # dots of seconds
    np.testing.assert_array_equal(x[:, 1], [1, 3])
    assert "ambiguous" in caplog.text
    _, x = fitted({"t": ["12.31.2020", "3.4.2020"]})  # the first date has no other order
    np.testing.assert_array_equal(x[:, 1], [12, 3])


def test_the_decimal_mark_decides_between_readings():
    columns = {"either": ["1,065", "2,310", "7"], "no": ["1,065,000", "2,310", "7"], "plain": ["1.065", "2,5", "7"]}
    _, x = fitted(columns)
    np.testing.assert_array_equal(x[:, 0], [1065, 2310, 7])
    encoder = tasks.fit_encoder(columns, decimal=",")
    expected = [[1.065, 1_065_000, 1065], [2.31, 2310, 2.5], [7, 7, 7]]
    np.testing.assert_array_equal(encoder.transform(columns), expected)
    np.testing.assert_array_equal(encoder.transform(dict.fromkeys(columns, ["0,500"]))[:, [0, 2]], [[0.5, 0.5]])
    with pytest.raises(ValueError, match='`decimal` is "." or ","; got \';\''):
        tasks.fit_encoder(columns, decimal=";")


def test_commas_that_may_be_decimal_marks_are_warned_of(caplog):
    encoder, x = fitted({"a": ["1,616", "2,310", "17"]})
    assert reasons(encoder, "a") == [
        (
            "changed",
            "is text that holds numbers with thousands separators ('1,616' is read as 1616; if this is wrong, remove "
            "separators of thousands, and write a point as the decimal mark)",
        )
    ]
    assert "'1,616' is read as 1616" in caplog.text
    caplog.clear()
    fitted({"a": ["1,616,000", "2,310", "17"], "b": ["1,616.5", "2,310", "17"]})
    assert not caplog.text


def test_a_point_is_no_separator_of_thousands_if_decimal_commas_had_none(caplog):
    weights = [f"{i},{i:03d}" for i in range(30)]
    encoder, _ = fitted({"a": weights, "b": [*weights[:-1], "1.234"], "c": weights[::-1]})
    x = encoder.transform({"a": ["1.234", "1.234,5"], "b": ["1.234", "1,5"], "c": ["1,616", "7"]})
    np.testing.assert_array_equal(x, [[np.nan, 1234, 1.616], [1234.5, 1.5, 7]])
    assert "the column 'a' has 1 of 2 values that are not numbers with decimal commas" in caplog.text


def test_none_is_a_level_and_markers_are_missing():
    encoder, x = fitted(a=["None", "NA", "b", "?", None, "None", "b", "", "none"])
    assert encoder.levels == (("None", "b", "(other)"),)
    np.testing.assert_array_equal(x[:, 0], [0, np.nan, 1, np.nan, np.nan, 0, 1, np.nan, 2])


def test_infinite_values_are_missing(caplog):
    encoder, x = fitted(np.array([[1.0, 2.0], [np.inf, 3.0], [-np.inf, 4.0], [3e39, 5.0]]))
    np.testing.assert_array_equal(x[:, 0], [1, np.nan, np.nan, np.nan])
    assert "3 values that are infinite or beyond float32" in reasons(encoder, "0")[0][1] and "infinite" in caplog.text
    np.testing.assert_array_equal(encoder.transform([[np.inf, 10**400]]), [[np.nan, np.nan]])


def test_numbers_that_float32_merges_are_shifted():
    low = 2**60
    for column in (
        [low, low + 1, low + 2],
        np.array([low, low + 1, low + 2], np.uint64),
        [f"{low + k}" for k in range(3)],
    ):
        encoder, x = fitted({"a": column})
        np.testing.assert_array_equal(x[:, 0], [0, 1, 2])
        np.testing.assert_array_equal(encoder.transform({"a": [low - 1, low + 5]})[:, 0], [-1, 5])
        assert f"{low} is subtracted from all" in reasons(encoder, "a")[-1][1]
    texts = [f"{low:,}", f"{low + 1:,}", "NA", f"{low + 3}"]  # with gaps and thousands separators
    np.testing.assert_array_equal(fitted({"a": texts})[1][:, 0], [0, 1, np.nan, 3])
    numbers = [low, low + 1, None, low + 3]
    for gaps in (numbers, pd.array(numbers, "Int64"), np.array(numbers, object)):
        encoder, x = fitted({"a": gaps})
        np.testing.assert_array_equal(x[:, 0], [0, 1, np.nan, 3])
        np.testing.assert_array_equal(encoder.transform({"a": [low + 2, low, low, low]})[:2, 0], [2, 0])
    seconds = 1.7e9 + np.arange(0, 50, 0.25)
    np.testing.assert_array_equal(fitted({"a": seconds})[1][:, 0], seconds - seconds[0])


@pytest.mark.parametrize("kind", [int, str])
def test_numbers_that_float32_merges_for_good_are_reported(kind, caplog):
    """Ids that repeat, from 7 on: no subtraction helps."""
    column = [kind(value) for value in [7, 2**53, 2**53 + 1, 7, 2**53, 2**53 + 1]]
    encoder, _ = fitted({"a": column, "b": [1, 2, 3, 4, 5, 6]})
    assert reasons(encoder, "a")[-1] == ("changed", "has 3 different numbers, which float32 rounds to 2")
    assert "the column 'a' is changed: it has 3 different numbers, which float32 rounds to 2" in caplog.text
    assert "'b'" not in caplog.text


def test_levels_of_64_bits_stay_different():
    ids = pd.Series(np.array([2**63 + 1, 2**63 + 2] * 2, np.uint64)).astype("category")
    assert fitted({"a": ids})[0].levels == ((f"{2**63 + 1}", f"{2**63 + 2}"),)


def test_constants_copies_and_columns_without_values_are_dropped():
    n = 30
    word, number = RNG.choice(["x", "y", "z"], n), RNG.normal(size=n)
    number[3] = np.nan
    frame = {
        "number": number,
        "one": np.ones(n),
        "gap": [None, *[1.0] * (n - 1)],
        "none": [None] * n,
        "a": ["a"] * n,
        "copy": number.astype(object),
        "word": word,
        "renamed": [{"x": "q", "y": "b", "z": "c"}[w] for w in word],
        "day": [datetime.date(2020, 1, 1)] * n,
    }
    encoder, x = fitted(frame)
    assert encoder.names == ("number", "gap", "word")
    assert {note.column: note.reason for note in encoder.notes} == {
        "one": "is constant",
        "none": "has no values",
        "a": "is constant",
        "copy": "is a copy of the column 'number'",
        "renamed": "is a copy of the column 'word'",
        "day": "is constant",
    }
    few = {name: column[:10] for name, column in frame.items()}
    assert {"copy", "renamed"} <= set(tasks.fit_encoder(few).names)  # equal by chance, perhaps


def test_ids_are_dropped_with_a_warning(caplog):
    n = 200
    sparse = np.sort(RNG.choice(10**6, n, replace=False)) + 10**6
    frame = pd.DataFrame(
        {
            "row": np.arange(n),
            "shuffled": RNG.permutation(n) + 7,
            "sampled": RNG.choice(int(1.5 * n), n, replace=False) * 1.0,
            "user_id": sparse,
            "userId": sparse[::-1],
            "paid": sparse[RNG.permutation(n)],
            "name": [f"person {k}" for k in range(n)],
            "age": RNG.integers(18, 90, n),
        }
    )
    encoder = tasks.fit_encoder(frame)
    assert encoder.names == ("paid", "age")
    for name in ("row", "shuffled", "sampled", "user_id", "userId", "name"):
        assert reasons(encoder, name)[0][0] == "dropped" and f"the column {name!r} is dropped" in caplog.text
    assert reasons(encoder, "paid") == [
        (
            "changed",
            "looks like an id, since its large whole numbers hardly repeat, but stays; drop it unless it is a "
            "measurement",
        )
    ]
    assert tasks.fit_encoder(frame, keep=["row", 3]).names == ("row", "user_id", "paid", "age")
    assert tasks.fit_encoder(frame.iloc[:10]).names == (
        "row",
        "shuffled",
        "sampled",
        "user_id",
        "userId",
        "paid",
        "age",
    )


def test_rare_and_unseen_levels():
    words = ["a"] * 10 + ["b"] * 9 + ["c"]
    encoder, x = fitted(rare=words, plain=["u", "v"] * 10)
    assert encoder.levels == (("a", "b", "(other)"), ("u", "v"))
    np.testing.assert_array_equal(x[-1], [2, 1])
    np.testing.assert_array_equal(
        encoder.transform({"rare": ["new", "b"], "plain": ["new", "u"]}), [[2, np.nan], [1, 0]]
    )
    many = np.repeat([f"w{k}" for k in range(40)], 2)
    encoder = tasks.fit_encoder({"a": many, "b": np.roll(many, 1)}, max_levels=39)
    np.testing.assert_array_equal(encoder.high_cardinality, [True, True])
    np.testing.assert_array_equal(tasks.fit_encoder({"a": many, "b": words * 4}).high_cardinality, [True, False])
    thousands = np.array(["a", "b"])[np.arange(20_000) % 2].astype(object)
    thousands[:3] = "c"
    assert tasks.fit_encoder({"a": thousands}).levels == (("a", "b", "(other)"),)
    names = [f"{k}" if k % 9 else "Ann" for k in range(30)]  # hardly any value repeats
    assert tasks.fit_encoder({"a": [f"person {name}" for name in names]}).levels == (("person Ann", "(other)"),)


def test_values_of_another_type_than_before():
    encoder, _ = fitted({"n": [1.0, 2.0, 5.0], "c": ["1", "1", "x"], "b": [True, False, True]})
    x = encoder.transform({"n": ["1,0", "True", "7"], "c": [1.0, 2, "1"], "b": ["true", 0, "FALSE"]})
    np.testing.assert_array_equal(x, [[np.nan, 0, 1], [np.nan, 1, 0], [7, 0, 0]])
    assert np.isnan(encoder.transform({"n": [[1]], "c": [{}], "b": [datetime.date(2020, 1, 1)]})).all()
    x = encoder.transform({"n": [True], "c": [True], "b": [3]})
    np.testing.assert_array_equal(x, [[1, 1, 3]])


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def test_a_hostile_table():
    n = 40
    frame = pd.DataFrame(
        {
            "list": [[k] for k in range(n)],
            "dict": [{"a": k} for k in range(n)],
            "tuple": [(1, 2)] * n,
            "array": [np.ones(2)] * n,
            "object": [object() for _ in range(n)],
            "partly": ["a", "b", [1], "a"] * (n // 4),
            "enum": [Color.RED, Color.BLUE] * (n // 2),
            "bytes": [b"a", b"\xff", b"b", b"b"] * (n // 4),
            "interval": pd.cut(RNG.normal(size=n), 3),
            "period": pd.period_range("2020-01", periods=n, freq="M"),
            "huge": pd.Series([10**400, -(10**400), 1, 2] * (n // 4), dtype=object),  # pandas 2 tries to make floats
            "zero": [0.0, -0.0] * (n // 2),
            "unicode": ["\ud7ff", "é", " é", "\x00"] * (n // 4),
            "half": RNG.normal(size=n).astype(np.float16),
            ("tuple", "name"): RNG.normal(size=n),
            "": RNG.normal(size=n),
            3: RNG.normal(size=n),
        }
    )
    encoder, x = fitted(frame)
    assert {note.column for note in encoder.notes if note.action == "dropped"} == {
        *("list", "dict", "tuple", "array", "object", "partly", "zero")
    }
    assert reasons(encoder, "list") == [("dropped", "has values of type list")]
    assert len(encoder.names) == x.shape[1] == len(set(encoder.names)) and "('tuple', 'name')" in encoder.names
    assert encoder.levels[:2] == (("Color.BLUE", "Color.RED"), ("a", "b", "\N{REPLACEMENT CHARACTER}"))
    np.testing.assert_array_equal(encoder.transform(frame), x)
    nothing, x = fitted({"a": [1, 1], "b": [[], []]})
    assert nothing.names == () and x.shape == (2, 0) and nothing.categorical.dtype == bool


HOSTILE = [
    *(None, np.nan, pd.NA, pd.NaT, 0, 1, True, False, np.True_, 2**63, 10**400, 1e308, np.inf, np.float32(1.5), b"a"),
    *(
        "",
        "?",
        "None",
        "a",
        " a ",
        "1",
        "1,000",
        "1,5",
        "1e400",
        "nan",
        "0x10",
        "\ud800",
        "x\x00y",
        "True",
        "9999-12-31",
    ),
    *("2020-01-01", "2020-13-45", "31/12/2020", "2020-01-01T10:00:00+02:00", datetime.date(1, 1, 1), datetime.time(3)),
    *(pd.Timestamp("2020-01-01", tz="Asia/Tokyo"), datetime.timedelta(5), np.datetime64("2020", "Y"), Color.RED),
    *(
        decimal.Decimal("1.50"),
        decimal.Decimal("sNaN"),
        pd.Period("2020-01"),
        pd.Interval(0, 1),
        [1],
        {"a": 1},
        object(),
    ),
]


@pytest.mark.parametrize("seed", range(100))
def test_random_values_are_encoded_and_a_row_depends_on_itself_only(seed):
    rng = np.random.default_rng(seed)
    num_rows = int(rng.choice([1, 2, 8, 25, 60]))

    def column():
        few = rng.choice(len(HOSTILE), rng.choice([1, 2, 3, 8]))
        return [HOSTILE[rng.choice(few)] if rng.random() < 0.9 else str(rng.normal()) for _ in range(num_rows)]

    frame = {name: column() for name in "abcd"}
    encoder, x = fitted(frame)
    assert x.shape == (num_rows, len(encoder.names)) and not np.isinf(x).any()
    row = int(rng.integers(num_rows))
    one = {name: [values[row]] for name, values in frame.items()}
    np.testing.assert_array_equal(encoder.transform(one), x[[row]])
    assert tasks.TableEncoder.from_state(json.loads(json.dumps(encoder.state()))) == encoder
    others = encoder.transform({name: HOSTILE for name in "abcd"})
    for levels, codes in zip(encoder.levels, others.T, strict=True):
        assert not levels or set(codes[~np.isnan(codes)]) <= set(range(len(levels)))
    assert np.isfinite(tasks.fit_columns(x, encoder.categorical).transform(others)).all()


def test_sparse_matrices_are_rejected():
    sparse = pytest.importorskip("scipy.sparse")
    encoder = tasks.fit_encoder(np.eye(3))
    for matrix in (sparse.csr_matrix(np.eye(3)), sparse.csr_array(np.eye(3)), sparse.dok_array(np.eye(3))):
        for function in (tasks.fit_encoder, encoder.transform):
            with pytest.raises(TypeError, match="Sparse data was passed, but dense data is required"):
                function(matrix)


def test_columns_are_dropped_by_name_and_by_position():
    frame = mixed()
    assert "size" not in tasks.fit_encoder(frame, drop="size").names
    encoder = tasks.fit_encoder(frame, drop=["color", 0, -1])
    assert not {"size", "color", "time"} & set(encoder.names) and reasons(encoder, "size")[0][0] == "dropped"
    assert tasks.fit_encoder(np.eye(3), drop=[1]).names == ("0", "2")


def test_frames_of_other_libraries(monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    frame = mixed().drop(columns=["both", "grade"])
    encoder, x = fitted(frame)
    table = arrow.Table.from_pandas(frame)
    np.testing.assert_array_equal(encoder.transform(table), x)
    assert tasks.fit_encoder(table).names == encoder.names

    class Stub:  # with polars' methods
        columns = list(frame.columns)

        def to_dict(self, *, as_series):
            assert not as_series
            return table.to_pydict()

    class Lazy:
        def collect(self):
            return Stub()

    class Other:
        columns = list(frame.columns)

        def to_pandas(self):
            return frame

    monkeypatch.setattr(Stub, "__module__", "polars.dataframe.frame")
    monkeypatch.setattr(Lazy, "__module__", "polars.lazyframe.frame")
    for other in (Stub(), Lazy(), Other()):
        np.testing.assert_array_equal(encoder.transform(other), x)
    records = np.array([(1.0, "a"), (2.0, "b")] * 2, [("n", float), ("w", "U3")])
    np.testing.assert_array_equal(fitted(records)[1], [[1, 0], [2, 1]] * 2)


def test_polars():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(
        {"n": [1.5, None, 2], "w": ["a", "b", "a"], "t": [datetime.date(2020, 1, k) for k in (1, 2, 3)]}
    )
    encoder, x = fitted(frame)
    assert encoder.names == ("n", "w", "t.days", "t.weekday")
    np.testing.assert_array_equal(x[:, 0], [1.5, np.nan, 2])
    np.testing.assert_array_equal(encoder.transform(frame.lazy()), x)


def test_a_saved_encoder_is_equal_and_is_a_json_text(tmp_path):
    frame = mixed().assign(big=2**60 + np.arange(60) % 9, id=np.arange(60))
    encoder, x = fitted(frame)
    metaopt.save(tmp_path / "encoder.json", encoder)
    loaded = metaopt.load(tmp_path / "encoder.json")
    rebuilt = tasks.TableEncoder.from_state(json.loads(json.dumps(encoder.state())))
    assert loaded == rebuilt == encoder and json.loads((tmp_path / "encoder.json").read_text())["named"]
    np.testing.assert_array_equal(loaded.transform(frame), x)
    assert [note.reason for note in loaded.notes] == [note.reason for note in encoder.notes]


def test_the_target_and_the_other_rows_are_not_looked_at():
    frame = mixed()
    encoder = tasks.fit_encoder(frame.iloc[:40])
    x = encoder.transform(frame.iloc[40:])
    changed = frame.copy()
    changed.loc[40:, "size"] = np.inf
    np.testing.assert_array_equal(encoder.transform(changed.iloc[40:])[:, 1:], x[:, 1:])
    np.testing.assert_array_equal(encoder.transform(changed)[:40], encoder.transform(frame.iloc[:40]))


def test_pandas_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.ModuleType("pandas"))
    encoder, x = fitted({"a": [1, "2", None], "t": [datetime.date(2020, 1, 1), None, datetime.date(2020, 5, 1)]})
    assert encoder.names[0] == "a" and x.shape[0] == 3


def test_the_log_has_notes_as_information(caplog):
    with caplog.at_level(logging.INFO):
        tasks.fit_encoder({"a": ["1,065", "2"], "b": [1, 2]})
    assert "the column 'a' is changed: it is text that holds numbers with thousands separators" in caplog.text
