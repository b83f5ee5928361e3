"""Records on disk: one SQLite file, to which rows are only ever appended.

A row is one `base.Record`: the state of a trial at one time. A trial has a row "RUNNING" when it starts, and later a
row that states how it ended. Rows belong to the same trial if study, task, trial number, configuration, fidelity and
seed are equal. The number is not enough, because every search counts from 0. For each trial,

- a row with an end replaces rows "WAITING" and "RUNNING", in any order;
- a later end replaces an earlier one, even a failure. So you correct a row by appending another one.

If number and seed are 0, the trials have no numbers. Then such rows may come from several trials, which repeat one
configuration:

- different outcomes are repeats, and each counts. A second row with an equal outcome is the same trial, and its later
  status counts. For example, of a row "PRUNED" with outcome 0.5 and a row "COMPLETE" with outcome 0.5, only the later
  one counts;
- a failure, or an end without a finite outcome, is replaced by the next end, because the trial was run again. A failure
  after an outcome is a repeat that failed, and both count.

Each `append_records` is one transaction. A process that is killed loses only the records that it has not appended.
Several processes of one machine may append to one file at a time. (SQLite's write-ahead log needs a local file system,
not a network file system.)
"""

import contextlib
import json
import math
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaopt._checks import check_record
from metaopt.base import STATUSES, Record

VERSION = 1
_TIMEOUT = 300  # seconds that a writer waits for others

_APPLICATION = 0x6D657461  # "meta", in the header of the file
_COLUMNS = ", ".join(Record._fields)
_ORIGINS = "CREATE TABLE IF NOT EXISTS origins (study TEXT, name TEXT, digest TEXT, PRIMARY KEY (study, name))"
_BEGUN = ("WAITING", "RUNNING")
_NOT_ITS_FAULT = ("SQLITE_BUSY", "SQLITE_FULL")
_NOT_WRITABLE = ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")
_SCHEMA = f"""
CREATE TABLE records (
  id INTEGER PRIMARY KEY, study TEXT NOT NULL, task TEXT NOT NULL, configuration TEXT NOT NULL, outcome REAL,
  fidelity REAL NOT NULL, cost REAL, seed INTEGER NOT NULL, status TEXT NOT NULL, trial INTEGER NOT NULL,
  reason TEXT NOT NULL, outcomes TEXT);
CREATE INDEX trials ON records (study, task, trial, fidelity, seed);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
"""


def append_records(file: str | os.PathLike[str], records: Sequence[Record], *, study: str = "") -> None:
    """Appends records to a file, in one transaction. The file is created if it does not exist.

    Args:
      file: its path. SQLite keeps the files `-wal` and `-shm` next to it while it is in use.
      records: any number. NumPy's numbers are written as Python's.
      study: the name of the search that the records belong to. Trials are numbered within a study and a task. A later
        row with the same number corrects the trial. Trials without numbers (`trial` and `seed` are 0) are distinguished
        by their configurations, and repeats of one configuration by their outcomes. To count repeats with equal
        outcomes separately, give them numbers.

    Raises:
      ValueError: if a record's status is unknown, its fidelity outside (0, 1], or its outcome or cost not a number.
      ValueError: if a record's task or reason is not text, or its seed or trial not an integer of 64 bits.
      ValueError: if a record's outcomes by name are not numbers, or the first one is not its outcome.
      TypeError: if a record's configuration is not plain data; NaN in it is a ValueError.
      ValueError: if the file is damaged, is not a file of records, or is from a later version of metaopt.
      OSError: if the file or its folder cannot be written.
    """
    _insert(file, [(study, *_to_row(record)) for record in records])


def read_records(
    file: str | os.PathLike[str],
    *,
    study: str | None = None,
    task: str | Sequence[str] | None = None,
    status: str | Sequence[str] | None = None,
    history: bool = False,
) -> list[Record]:
    """Reads the records of a file: for each trial its last row with an end, or its last row if it has not ended.

    For trials without numbers, it returns each different outcome.

    Args:
      file: its path; the file and its folder may be read-only.
      study: the study to read; by default, all of them.
      task: the name of a task to read, or several names; by default, all tasks.
      status: the status of the records to read, or several, such as `("COMPLETE", "PRUNED")`.
      history: return every row that was ever appended, in that order, instead of one for each trial.

    Returns:
      The records, in the order in which their trials, or their repeats, were first appended.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged, is not a file of records, or is from a later version of metaopt.
      ValueError: if a row is broken (the message has its number), or `status` is unknown.
    """
    if unknown := set(_listed(status or ())) - set(STATUSES):
        raise ValueError(f"`status` must be one or more of {', '.join(STATUSES)}; got {sorted(unknown)}.")
    conditions, values = "WHERE 1", []
    # The status of a trial is known only after all of its rows have been read.
    for column, wanted in (("study", study), ("task", task), ("status", status if history else None)):
        if wanted is not None:  # pass one JSON variable, because SQLite limits the number of variables
            conditions += f" AND {column} IN (SELECT value FROM json_each(?))"
            values.append(json.dumps(_listed(wanted), default=as_python))
    with _open(file) as connection:
        query = f"SELECT id, study, {_COLUMNS} FROM records {conditions} ORDER BY id"
        rows = connection.execute(query, values)
        if history:
            return [_read_row(file, row) for row in rows]
        records = _of_each_trial(file, rows)
    return [record for record in records if status is None or record.status in _listed(status)]


def _of_each_trial(file, rows) -> list[Record]:
    """Returns the records that count for each trial, from rows in the order in which they were appended."""
    names: dict[str, str] = {}  # JSON text of a configuration -> the same with sorted keys
    trials: dict[tuple, dict[Any, tuple[int, Record]]] = {}  # trial -> end -> (position in the result, record)
    for position, row in enumerate(rows):
        record, study, text = _read_row(file, row), row[1], row[3]
        if (name := names.get(text)) is None:
            name = names[text] = json.dumps(record.configuration, sort_keys=True)
        ends = trials.setdefault((study, record.task, record.trial, name, record.fidelity, record.seed), {})
        if record.status in _BEGUN:
            if not ends or _BEGUN in ends:
                ends[_BEGUN] = ends.get(_BEGUN, (position,))[0], record
            continue
        end_key = _end_key(record)
        # An end replaces an equal one, or else the start of its trial, or else a failure, and takes its position.
        replaced_key = next((key for key in (end_key, _BEGUN, "FAIL") if key in ends), None)
        ends[end_key] = position if replaced_key is None else ends.pop(replaced_key)[0], record
    placed = sorted((end for ends in trials.values() for end in ends.values()), key=lambda end: end[0])
    return [record for _, record in placed]


def _end_key(record: Record) -> Any:
    """The key of an ended trial's record. A later record of the trial with an equal key replaces it."""
    if record.trial != 0 or record.seed != 0:
        return "LAST"
    # Without a number, different outcomes are repeats.
    if record.status == "FAIL" or not math.isfinite(record.outcome):
        return "FAIL"
    return record.outcome if record.outcomes is None else repr(record.outcomes)  # in a text, NaN equals NaN


def read_origins(file: str | os.PathLike[str], study: str) -> dict[str, str]:
    """Returns the digests that `keep_origins` wrote, by name; an empty dict without a file or without digests."""
    if not os.path.exists(file):
        return {}
    with _open(file) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'origins' AND type = 'table'").fetchone():
            return {}
        return dict(connection.execute("SELECT name, digest FROM origins WHERE study = ?", (study,)).fetchall())


def keep_origins(file: str | os.PathLike[str], digests: dict[str, str], *, study: str) -> None:
    """Writes digests by name to a file of records, in place of those with the same study and name."""
    with _open(file, create=True) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_ORIGINS)
        rows = [(study, name, digest) for name, digest in digests.items()]
        connection.executemany("INSERT OR REPLACE INTO origins VALUES (?, ?, ?)", rows)


def recover_records(file: str | os.PathLike[str], to: str | os.PathLike[str]) -> int:
    """Copies the readable rows of a damaged file to a new one, row by row; the old file is not changed.

    Args:
      file: the damaged file.
      to: the path of a file that does not exist yet.

    Returns:
      The number of copied rows. Broken rows, and rows on unreadable pages of the file, are lost.

    Raises:
      FileNotFoundError: if `file` does not exist.
      FileExistsError: if there is a file at `to`.
      ValueError: if nothing can be read: the header is not that of a file of records, or the file has no table of
        records.
    """
    if os.path.exists(to):
        raise FileExistsError(f"{to} already exists; pass the path of a new file for the recovered records.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(file).name
        shutil.copyfile(file, copy)
        if os.path.isfile(f"{file}-wal"):
            shutil.copyfile(f"{file}-wal", f"{copy}-wal")
        _pad(copy)
        with _open(copy, recover=True, named=Path(file)) as connection:
            connection.execute(f"SELECT study, {_COLUMNS} FROM records LIMIT 0")  # reads no row; checks the columns
            # A row takes more than 30 bytes, which bounds the number of rows. The file's own counts may be unreadable.
            for number in range(1, os.path.getsize(copy) // 30 + 1):
                with contextlib.suppress(sqlite3.DatabaseError, ValueError, TypeError):
                    query = f"SELECT study, {_COLUMNS} FROM records WHERE id = ?"
                    row = connection.execute(query, (number,)).fetchone()
                    if row is not None:
                        rows.append((row[0], *_to_row(_from_row(row[1:]))))
    _insert(to, rows)
    return len(rows)


def _pad(file: Path) -> None:
    """Appends zeros for lost pages at the end: SQLite cannot read a file that is shorter than its header says."""
    with open(file, "r+b") as stream:
        header = stream.read(32)
        if header.startswith(b"SQLite format 3\0"):
            page, num_pages = int.from_bytes(header[16:18]), int.from_bytes(header[28:32])
            stream.truncate(max(os.path.getsize(file), page * num_pages))


def _insert(file, rows):
    with _open(file, create=True) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        marks = ", ".join("?" * (1 + len(Record._fields)))
        connection.executemany(f"INSERT INTO records (study, {_COLUMNS}) VALUES ({marks})", rows)


@contextlib.contextmanager
def _open(
    file, *, create: bool = False, recover: bool = False, named: Path | None = None
) -> Iterator[sqlite3.Connection]:
    """A connection to a file of records; SQLite's errors are replaced by errors that name the file and a remedy.

    `named` is the file that the errors name if `file` is a temporary copy of it.
    """
    path = Path(file)
    if not create and not path.is_file():
        raise FileNotFoundError(f"There is no file of records at {file}.")
    with contextlib.ExitStack() as stack:
        try:
            yield _connect(path, named or path, create, stack)
        except (
            sqlite3.DatabaseError,
            UnicodeDecodeError,
        ) as error:  # UnicodeDecodeError if SQLite's message has bytes of the file
            raise _explained(error, named or path, create, recover) from error


def _connect(path: Path, named: Path, create: bool, stack: contextlib.ExitStack) -> sqlite3.Connection:
    """A connection that `stack` closes. To read a file, its folder need not be writable."""

    def connect(name, uri=False):
        connection = sqlite3.connect(name, isolation_level=None, uri=uri)  # transactions are started explicitly
        stack.callback(connection.close)
        connection.text_factory = _decoded
        _check(connection, named, create)
        return connection

    try:
        return connect(path)
    except sqlite3.OperationalError as error:
        if create or not _error_name(error).startswith(_NOT_WRITABLE):
            raise
    # SQLite cannot create `-shm` next to the file. A `-wal` file holds rows that are not in the file yet. Without such
    # rows, we open the file as immutable. Otherwise, we copy both files to a folder that is writable.
    wal = Path(f"{path}-wal")
    if not wal.is_file() or not wal.stat().st_size:
        return connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for part in (path, wal):
        shutil.copyfile(part, folder / part.name)
    return connect(folder / path.name)


def _explained(error: Exception, path: Path, create: bool, recover: bool) -> Exception:
    name, text = _error_name(error), str(error)
    if name.startswith(_NOT_WRITABLE):
        if create:
            return OSError(
                f"{path} cannot be written ({error}). SQLite writes this file and others next to it, so the folder "
                f"must exist and be writable; it is {path.absolute().parent}."
            )
        return OSError(f"{path} cannot be read ({error}). Check the permissions of the file and its folder.")
    if name.startswith(_NOT_ITS_FAULT):
        return OSError(f"{path}: {error}.")
    if "no such table" in text or "no such column" in text or "has no column" in text:
        return ValueError(
            f"{path} is marked as a file of records, but lacks their table or a column of it ({error}). Its list of "
            "tables is damaged, or another program or version wrote it. `blackbox.recover_records` cannot read it "
            "either; try SQLite's own shell, `sqlite3 FILE .recover`, which prints the data that it can still find."
        )
    if name.startswith(("SQLITE_CONSTRAINT", "SQLITE_ERROR")):  # the row or the query is wrong, not the file
        return ValueError(f"{path} rejected the row or the query: {error}.")
    hint = "" if recover else " `blackbox.recover_records` copies all records that can still be read to a new file."
    return ValueError(f"{path} is damaged or is not a file of records: {error}.{hint}")


def _error_name(error: Exception) -> str:
    return getattr(error, "sqlite_errorname", None) or ""  # errors of Python lack this attribute


def _decoded(text: bytes) -> str:
    """Text that is not UTF-8 gets surrogates, which `_from_row` rejects."""
    return text.decode(errors="surrogateescape")


def _check(connection, file, create):
    application, version = _header_of_made(connection, create)
    if application != _APPLICATION:
        raise ValueError(f"{file} is an SQLite file, but not a file of records.")
    # A query of a view may never end.
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'records' AND type = 'view'").fetchone():
        raise ValueError(f"{file} is not a file of records: `records` is a view instead of a table.")
    if version > VERSION:
        raise ValueError(
            f"{file} has version {version}; this metaopt reads versions up to {VERSION}. Use a later metaopt."
        )


def _header_of_made(connection, create: bool) -> list[int]:
    """Returns the application and the version in the header, after this process or another one has created the file."""
    header = lambda: [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    deadline = time.monotonic() + _TIMEOUT
    connection.execute("PRAGMA busy_timeout = 100")  # then check again whether another process has created the file
    while True:
        try:
            if header()[0] == 0 and not connection.execute("SELECT * FROM sqlite_master").fetchone():
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    if not connection.execute("SELECT * FROM sqlite_master").fetchone():
                        for statement in _SCHEMA.split(";")[:-1]:
                            connection.execute(statement)
            if create:
                connection.execute("PRAGMA journal_mode = WAL")  # SQLite stores this mode in the file
            values = header()
            connection.execute(f"PRAGMA busy_timeout = {1000 * _TIMEOUT}")
            return values
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise


def _to_row(record: Record) -> tuple:
    check_record(record)
    for name, text in (("task", record.task), ("reason", record.reason)):
        if not _is_text(text):  # such as names of files, which may be any bytes
            raise ValueError(f"A record's {name} must be a string of valid Unicode; got {text!r}.")
    return (
        record.task,
        json.dumps(record.configuration, allow_nan=False, default=as_python),
        _number_or_null(record.outcome),
        float(record.fidelity),
        _number_or_null(record.cost),
        _integer("seed", record.seed),
        record.status,
        _integer("trial", record.trial),
        record.reason,
        None if record.outcomes is None else json.dumps({name: float(y) for name, y in record.outcomes.items()}),
    )


def _read_row(file, row) -> Record:
    """Returns the record of a row (id, study, fields of a record ...). Raises ValueError with the file and the row."""
    try:
        return _from_row(row[2:])
    except ValueError as error:
        raise ValueError(
            f"{file}: row {row[0]} of the table `records` is broken. {error} `blackbox.recover_records` copies the "
            "other rows to a new file."
        ) from error


def _from_row(row) -> Record:
    """Returns the record of a row. Raises ValueError if the row is not a valid record."""
    record = Record(*row)
    for name, text in (("task", record.task), ("configuration", record.configuration), ("reason", record.reason)):
        if not _is_text(text):
            raise ValueError(f"Its {name} must be a string of valid Unicode; got {text!r}.")
    try:
        configuration = json.loads(str(record.configuration))
    except ValueError as error:
        raise ValueError(f"Its configuration must be JSON; got {record.configuration!r} ({error}).") from None
    outcomes = record.outcomes
    if outcomes is not None:
        try:
            outcomes = json.loads(str(outcomes))
        except ValueError as error:
            raise ValueError(f"Its outcomes must be JSON; got {outcomes!r} ({error}).") from None
    outcome, cost = (math.nan if value is None else value for value in (record.outcome, record.cost))
    seed, trial = _integer("seed", record.seed), _integer("trial", record.trial)
    record = record._replace(configuration=configuration, outcome=outcome, cost=cost, seed=seed, trial=trial)
    record = record._replace(outcomes=outcomes)
    check_record(record)
    return record


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _number_or_null(value: float) -> float | None:
    """SQLite has no NaN."""
    return None if math.isnan(value) else float(value)


def _integer(name: str, value: Any) -> int:
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value or not -(2**63) <= whole < 2**63:
        raise ValueError(f"A record's {name} must be a 64-bit integer; got {value!r}.")
    return whole


def as_python(value: Any) -> Any:
    """Converts NumPy's scalars to values that JSON can write: for `json.dumps(default=)`."""
    if isinstance(value, np.generic) and not isinstance(number := value.item(), np.generic):  # not a longdouble
        return number
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def _listed(value) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
