"""Amounts in `fit_encoder`: numbers next to one sign of a currency or of percent."""

import json
import logging

import numpy as np
import pytest

import metaopt
from metaopt import tasks
from metaopt.tasks._amounts import UNSURE, UNUSUAL


def fitted(texts):
    encoder = tasks.fit_encoder({"a": texts})
    return encoder, encoder.transform({"a": texts})[:, 0]


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["€ 1,234.50", "€950", "-€ 5", "€-6"], [1234.5, 950, -5, -6]),
        (["$1,200", "$3.5", None, "None", "$1e3"], [1200, 3.5, np.nan, np.nan, 1000]),
        (["12 %", "3.5%", "-1%"], [12, 3.5, -1]),
        (["1.234,50 €", "950 €", "1.000 €"], [1234.5, 950, 1000]),
        (["5\xa0€", "12,50\u202f€", "-3 €"], [5, 12.5, -3]),
        (["12,5 %", "1,234 %"], [12.5, 1.234]),  # the first one shows that the comma is a decimal one
        (["12,345 %", "1,234 %", "5 %"], [12.345, 1.234, 5]),  # percentages rarely have thousands
        (["1,234.5 %", "5 %"], [1234.5, 5]),
        (["1.234 €", "1.234.567 €"], [1234, 1234567]),
        (["950 €", "2.527 €", "12.345 €", "-0 €", "1.234.567 €"], [950, 2527, 12345, 0, 1234567]),
        (["950 €", "2.527 €", "2.5 €"], [950, 2.527, 2.5]),
        (["950 €", "0.527 €"], [950, 0.527]),
        (["950 %", "2.527 %"], [950, 2.527]),
        (["$950", "$2.527"], [950, 2.527]),
        (["1.459 €", "1.379 €", "0 €", "2 €"], [1.459, 1.379, 0, 2]),
        ([f"{k} €" for k in range(120, 150)] + ["2.527 €", "- €", "VB €"], [*range(120, 150), 2527, np.nan, np.nan]),
        (["£1,234", "£2,345"], [1234, 2345]),  # as in "1,234" without a sign
        (["₹ 1", "2 ₹"], [1, 2]),
        (["-€ 5", "-€ 6"], [-5, -6]),
        (["EUR 1,200", "-EUR 5", "EUR -6.5", "7 EUR"], [1200, -5, -6.5, 7]),
        (["1.200 EUR", "950 EUR", "-3 EUR"], [1200, 950, -3]),
        (["USD 1,200", "3.5 USD"], [1200, 3.5]),
        (["CHF\xa012.50", "3 CHF"], [12.5, 3]),
        (["GBP 5", "GBP 6"], [5, 6]),
        (["JPY 1,200", "JPY 950"], [1200, 950]),
        (["US$ 1,200", "US$5.5", "-US$6", "7 US$"], [1200, 5.5, -6, 7]),
        (["A$950", "A$2.527"], [950, 2.527]),  # as "$950"
        (["C$5", "C$ 6"], [5, 6]),
        (["(1,200.50)", "35", "(7)"], [-1200.5, 35, -7]),
        (["($1,200.50)", "$(5)", "$3"], [-1200.5, -5, 3]),
        (["(1.200,50 €)", "(5) €"], [-1200.5, -5]),
        (["(3 EUR)", "EUR 4"], [-3, 4]),
        (["(3 %)", "4 %"], [-3, 4]),
        (["\N{MINUS SIGN}5", "6"], [-5, 6]),
        (["\N{MINUS SIGN}€ 5", "€ \N{MINUS SIGN}6"], [-5, -6]),
        (["1.2k", "3M", "950", "-2K", "(1.5k)", "1,065"], [1200, 3e6, 950, -2000, -1500, 1065]),
        (["0.07k", "1.1M", "None"], [70, 1_100_000, np.nan]),
        (["$50k", "$3M", "$950"], [50_000, 3e6, 950]),
        (["1.2k€", "3M €", "5 €"], [1200, 3e6, 5]),
        (["EUR 1.5M", "20k EUR"], [1.5e6, 20_000]),
        ([f"{k}.5" for k in range(30)] + ["€ 5"], [k + 0.5 for k in range(30)] + [np.nan]),  # a word among numbers
    ],
)
def test_amounts_become_numbers(texts, numbers):
    encoder, x = fitted(texts)
    np.testing.assert_array_equal(x, numbers)
    assert not encoder.categorical.any() and encoder.columns[0].kind == "number"


@pytest.mark.parametrize(
    "texts",
    [
        ["5 $", "5 €"],
        ["€ 5", "6"],
        ["€ 5 €", "€ 6 €"],
        ["€ 5 6", "€ 7 8"],
        ["%", "a %"],
        ["€ 2020-01-31", "€ 2021-02-28"],
        ["5 kg", "6 kg"],
        ["EUR 5", "USD 6"],
        ["$5", "US$6"],
        ["eur 5", "eur 6"],
        ["EUR 5 EUR", "EUR 6 EUR"],
        ["EUR6", "EUR5"],  # emission standards
        ["USD-3", "USD-4"],
        ["12CHF", "13CHF"],
        ["PHP 8", "PHP 7.4"],  # versions
        ["TOP 10", "TOP 20"],
        ["EURO 5", "EURO 6"],
        ["A4", "A5"],
        ["A$AP", "A$"],
        ["(1)", "(2)"],  # notes
        [f"({k})" for k in range(30)] + ["none or all"],
        ["(a)", "5"],
        ["(555) 123", "(555) 456"],
        ["f(2)", "f(3)"],
        ["(-5)", "(+6)"],
        ["(2020-01-31)", "2020"],
        ["3M", "Acme", "IBM"],
        ["3M", "6M", "12M"],  # sizes or months
        ["5K", "10K"],
        ["5k", "950"],
        ["950 €", "1.234 €", "1.2k €"],  # the point separates thousands, or is the decimal mark
        ["5 k", "6"],
        ["1.2k", "5 k", "x"],
        ["1.2k", "1.2kg"],
        ["1.2m", "3m"],  # meters
        ["k", "M", "1.2k"],
        ["1e3k", "1.2k"],
    ],
)
def test_other_texts_stay_categories(texts):
    encoder, _ = fitted(texts * 2)
    assert encoder.categorical.all() and encoder.columns[0].sign == ""


def test_a_price_column_of_different_values_is_no_id(caplog):
    prices = np.random.default_rng(0).permutation(200) + 100  # without the sign, they number the rows
    texts = [f"€ {price}" for price in prices]
    np.testing.assert_array_equal(fitted(texts)[1], prices)
    texts[3] = texts[5] = "on request"
    assert not caplog.messages
    encoder, x = fitted(texts)
    assert np.flatnonzero(np.isnan(x)).tolist() == [3, 5]
    (note,) = encoder.notes
    assert note.reason == (
        f"is text that holds numbers with the sign '€' ('{texts[0]}' is read as {prices[0]}), except 2 values such as "
        "'on request', which count as missing"
    )
    assert note.reason in caplog.text
    texts[:30] = ["on request"] * 30  # too many words
    assert fitted(texts)[0].columns == () or fitted(texts)[0].categorical.all()


def test_one_word_keeps_k_and_m_texts():
    """Among plain numbers, a tenth may be words."""
    texts = [f"{k}.5" for k in range(98)]
    assert fitted([*texts, "1.2k", "3M"])[1][-2:].tolist() == [1200, 3e6]
    encoder, x = fitted([*texts, "1.2k", "3M", "Acme"])
    assert np.isnan(x[-3:]).all() and not np.isnan(x[:-3]).any() and "except 3 values" in encoder.notes[0].reason
    encoder, _ = fitted([f"{k % 50}.5k" for k in range(98)] + ["Acme"] * 2)
    assert encoder.categorical.all()


def test_dates_stay_dates():
    dates = ["2020-01-31", "2021-02-28"]
    assert fitted(dates)[0].columns[0].kind == "time"
    assert fitted([*dates, "1.2k"] * 2)[0].categorical.all()


@pytest.mark.parametrize(
    ("texts", "example", "warns"),
    [
        (["(1,200)", "35"], f"('(1,200)' is read as -1200; {UNUSUAL})", True),
        (["35.5", "(12)"], f"('(12)' is read as -12; {UNUSUAL})", True),  # estimates
        (["1999", "2000", "2001", "(2002)"], f"('(2002)' is read as -2002; {UNUSUAL})", True),
        (["1.2k", "(12)", "3M"], f"('(12)' is read as -12; {UNUSUAL})", True),  # the doubtful one, not the first
        (["(1.2k)", "1.5k"], f"('(1.2k)' is read as -1200; {UNUSUAL})", True),
        (["1.8M", "1.75", "1.62", "1.80"], f"('1.8M' is read as 1800000; {UNUSUAL})", True),  # meters
        (["1.2k", "3M"], "('1.2k' is read as 1200)", False),
        (["950", "1.2k", "3M", "1,065"], "('1.2k' is read as 1200)", False),
        (["($5)", "$3"], "('($5)' is read as -5)", False),  # an amount
        (["(1.5 %)", "3 %"], "('(1.5 %)' is read as -1.5)", False),
    ],
)
def test_doubtful_parentheses_and_multiples_are_warned_of(texts, example, warns, caplog):
    with caplog.at_level(logging.INFO):
        encoder, _ = fitted(texts * 5)
    assert encoder.notes[0].reason.endswith(example)
    (record,) = caplog.records
    assert example in record.getMessage() and (record.levelname == "WARNING") == warns


def test_new_rows_may_have_parentheses_and_the_unicode_minus_first():
    encoder, _ = fitted(["$950", "$20"])
    np.testing.assert_array_equal(encoder.transform({"a": ["($5)", "\N{MINUS SIGN}$6"]})[:, 0], [-5, -6])
    encoder, _ = fitted([1.5, 2.5])
    np.testing.assert_array_equal(encoder.transform({"a": ["(5)", "\N{MINUS SIGN}6", "1.2k"]})[:, 0], [-5, -6, np.nan])


@pytest.mark.parametrize(
    ("texts", "example", "warns"),
    [
        (["950 €", "1.234 €"], f"('1.234 €' is read as 1234; {UNSURE})", True),
        (["1.459 €", "1.234 €"], f"('1.459 €' is read as 1.459; {UNSURE})", True),  # such as prices of fuel
        (["1234 €", "1.234 €"], f"('1.234 €' is read as 1.234; {UNSURE})", True),
        (["€ 1,459", "€ 1,379"], f"('€ 1,459' is read as 1459; {UNSURE})", True),
        (["12,345 %", "1,234 %"], "('12,345 %' is read as 12.345)", False),
        (["1.234 €", "1.50 €"], "('1.234 €' is read as 1.234)", False),  # the second one has a decimal point
        (["$950", "$1,234"], "('$1,234' is read as 1234)", False),
        (["C$950", "C$1,234"], "('C$1,234' is read as 1234)", False),
        (["950 EUR", "1.234 EUR"], f"('1.234 EUR' is read as 1234; {UNSURE})", True),
        (["1.234 %", "2.345 %"], "('1.234 %' is read as 1.234)", False),  # shares often have three decimals
    ],
)
def test_the_note_shows_how_a_mark_is_read(texts, example, warns, caplog):
    with caplog.at_level(logging.INFO):
        encoder, _ = fitted(texts)
    assert encoder.notes[0].reason.endswith(example)
    (record,) = caplog.records
    assert example in record.getMessage() and (record.levelname == "WARNING") == warns


def test_a_new_amount_may_be_the_first_one_with_a_separator_of_thousands():
    encoder, _ = fitted(["$950", "$20"])
    np.testing.assert_array_equal(encoder.transform({"a": ["$1,234", "$1.5"]})[:, 0], [1234, 1.5])


def test_new_amounts_are_read_in_the_same_way_and_other_signs_are_missing(caplog, tmp_path):
    encoder, _ = fitted(["1.234,50 €", "950 €"])
    metaopt.save(tmp_path / "encoder.json", encoder)
    for each in (encoder, metaopt.load(tmp_path / "encoder.json")):
        assert each == encoder and each.columns[0].sign == "€"
        new = ["1.500 €", "€ 2,5", "3", "4 $", "5 %", None]  # "1.500" alone would be 1.5
        caplog.clear()
        np.testing.assert_array_equal(each.transform({"a": new})[:, 0], [1500, 2.5, *[np.nan] * 4])
        message = "3 of 6 values that are not numbers with decimal commas next to the sign '€'; they count as missing"
        assert f"{message} (such as '3')" in caplog.text
    for numbers in ([3, 4], [0.5, np.nan], [True, False]):  # the unit of a number without a sign is not known
        caplog.clear()
        assert np.isnan(encoder.transform({"a": numbers})).all() and "next to the sign '€'" in caplog.text


@pytest.mark.parametrize(("key", "value"), [("sign", "XYZ"), ("sign", 1), ("reading", "ymd"), ("kind", "boolean")])
def test_a_damaged_sign_is_rejected(key, value):
    state = json.loads(json.dumps(fitted(["€ 5", "€ 6"])[0].state()))
    state["columns"][0][key] = value
    with pytest.raises(ValueError, match="do not fit each other"):
        tasks.TableEncoder.from_state(state)
