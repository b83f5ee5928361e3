"""Records on disk: reading returns the written records, and a broken record loses no other record."""

import concurrent.futures
import math
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from metaopt import blackbox
from metaopt.base import Record

RECORDS = [
    Record("iris", {"rate": 0.1, "model": "svm", "deep": True, "cap": None, "num": 3}, 0.25, 1 / 3, 1.5, 7, trial=0),
    Record("iris", {"rate": 1e-300}, status="FAIL", trial=1, reason="signal SIGSEGV"),
    Record("wine", {}, math.inf, status="PRUNED", trial=0),
]


def same(records, others):
    return [repr(record) for record in records] == [repr(record) for record in others]  # NaN equals NaN


def test_records_come_back_and_are_filtered(tmp_path):
    file = tmp_path / "records.db"
    blackbox.append_records(file, RECORDS[:2], study="a")
    blackbox.append_records(str(file), RECORDS[2:], study="b")
    blackbox.append_records(file, [])
    assert same(blackbox.read_records(file), RECORDS)
    assert type(blackbox.read_records(file)[0].configuration["deep"]) is bool
    for filters, expected in (
        ({"study": "b"}, RECORDS[2:]),
        ({"task": "iris", "status": "FAIL"}, RECORDS[1:2]),
        ({"task": ["iris", "wine"], "status": ("FAIL", "PRUNED")}, RECORDS[1:]),
        ({"study": "b", "task": "iris"}, []),
    ):
        assert same(blackbox.read_records(file, **filters), expected)


def test_numbers_of_numpy_are_written_as_python_s(tmp_path):
    configuration = {"n": np.int64(3), "x": np.float32(0.5), "deep": np.bool_(True), "kind": np.str_("a")}
    plain = {"n": 3, "x": 0.5, "deep": True, "kind": "a"}
    record = Record("t", configuration, np.float32(0.25), np.float64(0.5), np.int64(2), np.int64(7), trial=np.uint8(1))
    expected = Record("t", plain, 0.25, 0.5, 2.0, 7, trial=1)
    blackbox.append_records(tmp_path / "records.db", [record])
    assert same(blackbox.read_records(tmp_path / "records.db"), [expected])
    pytest.importorskip("pandas")
    (loaded,) = blackbox.records_from_frame(blackbox.records_to_frame([record]))
    assert repr(loaded.configuration) == repr(plain) and loaded == expected


def test_any_number_of_tasks_is_asked_for_and_a_wrong_query_is_no_damage(tmp_path):
    file = tmp_path / "records.db"
    blackbox.append_records(file, RECORDS)
    many = [str(number) for number in range(300_000)]
    assert same(blackbox.read_records(file, task=[*many, "iris", 'it"s']), RECORDS[:2])
    assert blackbox.read_records(file, task=[]) == [] == blackbox.read_records(file, task=many)
    with sqlite3.connect(file) as connection:
        connection.execute("ALTER TABLE records RENAME TO others")
    connection.close()
    message = r"records.db is marked as a file of records, but lacks .*no such table: records.*recover_records"
    for fn in (blackbox.read_records, lambda file: blackbox.append_records(file, RECORDS)):
        with pytest.raises(ValueError, match=message):
            fn(file)
    with pytest.raises(ValueError, match="lacks their table"):
        blackbox.recover_records(file, tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()


def test_the_last_row_of_a_trial_counts_and_none_is_overwritten(tmp_path):
    file = tmp_path / "records.db"
    running = [record._replace(status="RUNNING", outcome=math.nan, reason="") for record in RECORDS]
    blackbox.append_records(file, running)
    blackbox.append_records(file, RECORDS[1:])
    assert same(blackbox.read_records(file), [running[0], *RECORDS[1:]])
    assert same(blackbox.read_records(file, history=True), running + RECORDS[1:])
    assert same(blackbox.read_records(file, status="RUNNING"), running[:1])
    # A trial that has ended is not running, even if another process began it again and was killed.
    blackbox.append_records(file, running[1:2])
    assert same(blackbox.read_records(file, status="FAIL"), RECORDS[1:2])
    # Another fidelity, seed, task or study is another trial.
    blackbox.append_records(file, [RECORDS[0]._replace(fidelity=1.0), RECORDS[0]._replace(seed=8)])
    blackbox.append_records(file, RECORDS[:1], study="b")
    assert len(blackbox.read_records(file)) == 6


def test_trials_without_numbers_are_told_apart_and_repeats_of_one_all_count(tmp_path):
    file = tmp_path / "records.db"
    line = [Record("a", {"x": x / 10, "kind": "b"}, abs(x - 3) / 10, cost=1.0) for x in range(11)]
    blackbox.append_records(file, line)
    assert blackbox.read_records(file) == line
    # Once more the same, with its names in another order, is the same: whatever is imported twice is there once.
    blackbox.append_records(file, [r._replace(configuration=dict(reversed(r.configuration.items()))) for r in line])
    assert blackbox.read_records(file) == line
    line = blackbox.read_records(file)
    # A search that runs, and one that has ended, under the number of another one's trial.
    running = Record("a", {"x": 0.77}, cost=1.0, status="RUNNING")
    blackbox.append_records(file, [running])
    assert blackbox.read_records(file)[:11] == line and same(blackbox.read_records(file, status="RUNNING"), [running])
    ended = running._replace(status="COMPLETE", outcome=0.5)
    blackbox.append_records(file, [ended])
    repeats = [ended._replace(outcome=y) for y in (0.25, 0.75)]
    failed = ended._replace(status="FAIL", outcome=math.nan)
    blackbox.append_records(file, repeats[:1])
    blackbox.append_records(file, [running, repeats[1], failed, failed, ended, running])
    assert same(blackbox.read_records(file), [*line, ended, *repeats, failed])
    # What failed was run again.
    blackbox.append_records(file, [ended._replace(outcome=1.5)])
    assert blackbox.read_records(file) == [*line, ended, *repeats, ended._replace(outcome=1.5)]


@pytest.mark.parametrize("numbered", [{"trial": 3}, {"seed": 5}, {"trial": 3, "seed": 5}])
def test_the_last_end_of_a_numbered_trial_counts_and_every_outcome_of_others(tmp_path, numbered):
    one = Record("a", {"x": 1}, 0.5, cost=1.0)
    fail, pruned = one._replace(status="FAIL", outcome=math.nan), one._replace(status="PRUNED")
    right, running = one._replace(outcome=0.25), one._replace(status="RUNNING", outcome=math.nan)
    for i, (rows, of_repeats) in enumerate(
        (
            ([one, right], [one, right]),  # a correction, or a repeat
            ([one, right, one], [one, right]),
            ([one, fail], [one, fail]),
            ([fail, one], [one]),  # it was run again
            ([one, pruned], [pruned]),  # an outcome once more is the same trial
            ([pruned, one], [one]),
            ([one, running], [one]),
        )
    ):
        for changes, expected in (({}, of_repeats), (numbered, [row for row in rows if row != running][-1:])):
            file = tmp_path / f"{i}{bool(changes)}.db"
            for row in rows:
                blackbox.append_records(file, [row._replace(**changes)])
            assert same(blackbox.read_records(file), [row._replace(**changes) for row in expected])
            assert same(blackbox.read_records(file, history=True), [row._replace(**changes) for row in rows])


def test_ten_thousand_trials_are_read_at_once_also_where_one_is_repeated_as_often(tmp_path):
    file = tmp_path / "records.db"
    blackbox.append_records(file, [Record("a", {"x": x}, float(x)) for x in range(10_000)])  # nobody numbered them
    blackbox.append_records(file, [Record("b", {"x": 0}, float(y)) for y in range(10_000)])
    begin = time.thread_time()
    assert [record.outcome for record in blackbox.read_records(file)] == 2 * list(map(float, range(10_000)))
    assert time.thread_time() - begin < 2


def write(file, name, num):
    for trial in range(num):
        blackbox.append_records(file, [Record(name, {"trial": trial}, float(trial), trial=trial)])
        time.sleep(1e-3)


def test_two_writers_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "records.db"
    with concurrent.futures.ThreadPoolExecutor() as pool:  # each `append_records` opens its own connection
        list(pool.map(lambda name: write(file, name, 20), "ab"))
    for name in "ab":
        assert [record.trial for record in blackbox.read_records(file, task=name)] == list(range(20))


WRITER = "import sys, test_records; test_records.write(*sys.argv[1:3], int(sys.argv[3]))"


@pytest.mark.slow
def test_two_processes_write_and_one_that_is_killed_loses_nothing_that_it_had_written(tmp_path):
    file = tmp_path / "records.db"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    start = lambda name, num: subprocess.Popen([sys.executable, "-c", WRITER, str(file), name, num], env=environment)
    killed, others = start("k", "1000000"), [start(name, "200") for name in "ab"]
    assert [other.wait(timeout=300) for other in others] == [0, 0]
    killed.kill()
    killed.wait()
    for name in "ab":
        assert [record.trial for record in blackbox.read_records(file, task=name)] == list(range(200))
    trials = [record.trial for record in blackbox.read_records(file, task="k")]
    assert trials == list(range(len(trials))) and trials


def test_a_file_of_something_else_and_a_later_version_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of records at"):
        blackbox.read_records(tmp_path / "none.db")
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE x (y)")
    connection.close()
    for fn in (lambda: blackbox.read_records(other), lambda: blackbox.append_records(other, RECORDS)):
        with pytest.raises(ValueError, match="other.db is an SQLite file, but not a file of records"):
            fn()
    (tmp_path / "text.db").write_text("a,b\n" * 1_000)
    with pytest.raises(
        ValueError, match="damaged or is not a file of records: file is not a database.*recover_records"
    ):
        blackbox.read_records(tmp_path / "text.db")
    with pytest.raises(ValueError, match="damaged or is not a file of records: file is not a database.$"):
        blackbox.recover_records(tmp_path / "text.db", tmp_path / "new.db")
    file = tmp_path / "records.db"
    blackbox.append_records(file, RECORDS)
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(ValueError, match="has version 9; this metaopt reads versions up to 1"):
        blackbox.read_records(file)


@pytest.fixture
def not_root():
    """Root may write everywhere; a test of permissions runs as another user."""
    if not hasattr(os, "seteuid"):
        pytest.skip("there are no users to switch to")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.fixture
def open_folder():
    """A folder that every user may read, which `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        os.chmod(folder, 0o755)


WRITER_THAT_DIES = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
columns = "study, task, configuration, outcome, fidelity, cost, seed, status, trial"
connection.execute(f"INSERT INTO records SELECT id + 10, {columns} + 10, reason, outcomes FROM records")
os._exit(0)
"""


@pytest.fixture(params=["closed", "killed"])
def store_of_another_user(request, open_folder):
    """A store in a folder that is read-only; a writer that was killed has left rows in the `-wal` file."""
    file = open_folder / "records?.db"
    blackbox.append_records(file, RECORDS)
    if request.param == "killed":
        subprocess.run([sys.executable, "-c", WRITER_THAT_DIES, str(file)], check=True)
        assert (open_folder / "records?.db-wal").stat().st_size
        os.remove(open_folder / "records?.db-shm")
    before = sorted(open_folder.iterdir())
    os.chmod(open_folder, 0o555)
    yield file, 6 if request.param == "killed" else 3
    assert sorted(open_folder.iterdir()) == before


@pytest.mark.parametrize("mode", [0o444, 0o666])
def test_a_store_in_a_read_only_folder_is_read(store_of_another_user, mode, request):
    file, num_records = store_of_another_user
    os.chmod(file, mode)
    request.getfixturevalue("not_root")
    loaded = blackbox.read_records(file)
    assert same(loaded[:3], RECORDS) and len(loaded) == num_records
    for path in (file, file.with_name("new.db"), file.parent / "nowhere" / "new.db"):
        with pytest.raises(
            OSError,
            match=rf"{re.escape(str(path))} cannot be written.*must exist and be writable; it is {path.parent}",
        ):
            blackbox.append_records(path, RECORDS)


def test_a_store_that_must_not_be_read_is_named(open_folder, request):
    file = open_folder / "records.db"
    blackbox.append_records(file, RECORDS)
    os.chmod(file, 0)
    request.getfixturevalue("not_root")
    with pytest.raises(OSError, match=f"{file} cannot be read .*Check the permissions"):
        blackbox.read_records(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("configuration = '{\"x\": '", "Its configuration must be JSON; got '{\"x\": '"),
        ("configuration = '[1]'", r"configuration must be a dict from parameter names to values; got \[1\]"),
        ("configuration = x'00'", "Its configuration must be a string of valid Unicode; got b'.x00'"),
        ("status = 'DONE'", "status must be one of WAITING.*got 'DONE'"),
        ("outcome = 'good'", "outcome must be a number, or NaN if it is unknown; got 'good'"),
        ("fidelity = 'full'", "fidelity must be a number, .*; got 'full'"),
        ("seed = 'x'", "seed must be a 64-bit integer; got 'x'"),
        ("trial = 0.5", "trial must be a 64-bit integer; got 0.5"),
        ("task = cast(x'ff41' as text)", "Its task must be a string of valid Unicode; got '.udcffA'"),
        ("reason = x'41'", "Its reason must be a string of valid Unicode; got b'A'"),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_recovered(tmp_path, change, message):
    file, new = tmp_path / "records.db", tmp_path / "new.db"
    blackbox.append_records(file, RECORDS)
    with sqlite3.connect(file) as connection:
        connection.execute(f"UPDATE records SET {change} WHERE id = 2")
    connection.close()
    for history in (False, True):
        with pytest.raises(
            ValueError, match=rf"records.db: row 2 of the table `records` is broken\. .*{message}.*recov"
        ):
            blackbox.read_records(file, history=history)
    assert blackbox.recover_records(file, new) == 2
    assert same(blackbox.read_records(new), [RECORDS[0], RECORDS[2]])


def damaged(file, damage, num=2_000):
    """A file of many pages, of which some in the middle are overwritten, or the last third is missing."""
    records = [Record("t", {"x": trial}, trial / 8, trial=trial, reason="r" * 50) for trial in range(num)]
    blackbox.append_records(file, records, study="s")
    size = os.path.getsize(file)
    with open(file, "r+b") as stream:
        if damage == "cut":
            stream.truncate(size // 3 * 2 // 4096 * 4096)
        else:
            stream.seek(size // 8 // 4096 * 4096)
            stream.write(b"\xff" * 4 * 4096)
    return records


@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_the_readable_records_of_a_damaged_file_are_recovered(tmp_path, damage):
    file, new = tmp_path / "records.db", tmp_path / "new.db"
    records = damaged(file, damage)
    before = Path(file).read_bytes()
    with pytest.raises(ValueError, match="records.db is damaged or .*malformed.*`blackbox.recover_records`"):
        blackbox.read_records(file, history=True)
    num = blackbox.recover_records(file, new)
    recovered = blackbox.read_records(new, study="s")
    assert (0.8 if damage == "overwritten" else 0.3) * len(records) < num == len(recovered) < len(records)
    assert set(map(repr, recovered)) < set(map(repr, records))
    assert Path(file).read_bytes() == before
    with pytest.raises(FileExistsError, match="new file"):
        blackbox.recover_records(file, new)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(3, {}), "task must be a string, the name of the task; got 3"),  # pyright: ignore
        (Record("t", {}, status="DONE"), "status must be one of WAITING, .*; got 'DONE'"),
        (Record("t", {"x": object()}), "a object cannot be written as JSON"),
        (Record("t", {"x": math.nan}), "not JSON compliant"),
        (Record("t", {}, fidelity=math.nan), r"fidelity must lie in \(0, 1\]; got nan"),
        (Record("t", {}, reason=None), "reason must be a string"),  # pyright: ignore
        (Record("t", {}, reason="\udcff"), r"reason must be a string of valid Unicode; got '.udcff'"),
        (Record("\udcff", {}), "task must be a string of valid Unicode"),
        (Record("t", {}, seed=2**63), "seed must be a 64-bit integer; got 9223372036854775808"),
        (Record("t", {}, seed=None), "seed must be a 64-bit integer; got None"),  # pyright: ignore
        (Record("t", {}, seed=1.5), "seed must be a 64-bit integer; got 1.5"),  # pyright: ignore
        (Record("t", {}, trial="2"), "trial must be a 64-bit integer; got '2'"),  # pyright: ignore
        (Record("t", {}, None), "outcome must be a number, or NaN if it is unknown; got None"),  # pyright: ignore
        (Record("t", {}, cost="1 s"), "cost must be a number, or NaN if it is unknown; got '1 s'"),  # pyright: ignore
        (Record("t", {}, fidelity=None), "fidelity must be a number"),  # pyright: ignore
        (Record("t", {"x": np.longdouble(1)}), "a longdouble cannot be written as JSON"),
        (Record("t", {"x": np.zeros(2)}), "a ndarray cannot be written as JSON"),
    ],
)
def test_records_that_cannot_be_written_are_refused_and_nothing_is_written(tmp_path, record, message):
    file = tmp_path / "records.db"
    with pytest.raises((TypeError, ValueError), match=message):
        blackbox.append_records(file, [RECORDS[0], record])
    assert not file.exists()
    blackbox.append_records(file, [])
    with pytest.raises(ValueError, match=r"`status` must be one or more of WAITING, .*; got \['DONE'\]"):
        blackbox.read_records(file, status="DONE")
    with pytest.raises(ValueError, match="rejected the row or the query: NOT NULL"):  # and is not damaged
        blackbox.append_records(file, RECORDS, study=None)  # pyright: ignore
