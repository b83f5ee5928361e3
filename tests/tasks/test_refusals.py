"""Arguments of `tasks` that would give an empty part, a shared row or a wrong unit, without an error anywhere else."""

import numpy as np
import pytest

from metaopt import base, tasks

SOURCE = tasks.from_arrays(np.arange(20.0).reshape(10, 2), np.arange(10) % 2, name="s")
TABLE = tasks.Table("t", "t", np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2, np.zeros(3, bool))
USERS = tasks.from_user_records(np.arange(8.0).reshape(8, 1), np.arange(8.0), np.repeat(["a", "b"], 4))


def tasks_of_types(*dtypes):
    return [base.Task({"x": np.ones((2, 1), dtype)}, {"x": np.ones((2, 1), dtype)}) for dtype in dtypes]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tasks.keep(SOURCE, rows=[0, -1]), ValueError, r"`rows` must be in 0\.\.9; got -1\.\.0"),
        (lambda: tasks.keep(SOURCE, rows=[10]), ValueError, r"`rows` must be in 0\.\.9; got 10\.\.10"),
        (
            lambda: tasks.select(SOURCE, {"train": {"s": {"rows": [-1]}}, "test": {"s": {"rows": [9]}}}, "train"),
            ValueError,
            "`rows` must be in",
        ),
        (lambda: tasks.from_arrays(np.array(["2020-01-01"], "M8[D]"), [0], name="s"), TypeError, "must be numbers"),
        (lambda: tasks.stack(tasks_of_types(np.uint8, np.float32)), ValueError, "is float32 in .* and uint8 in"),
        (lambda: tasks.prepare(TABLE, max_features=-1), ValueError, "`max_features` must be at least 1; got -1"),
        (lambda: tasks.prepare(TABLE, max_levels=1), ValueError, "`max_levels` must be at least 2; got 1"),
        (lambda: tasks.prepare(TABLE, max_classes=1), ValueError, "`max_classes` must be at least 2; got 1"),
        (
            lambda: tasks.user_episodes(USERS, num_support=2, num_query=0, order="random"),
            ValueError,
            "`num_query` must be at least 1",
        ),
        (lambda: tasks.sinusoids(num_query=0), ValueError, "`num_query` must be at least 1; got 0"),
        (lambda: tasks.metafeatures((TABLE.x * 1j, TABLE.y, TABLE.categorical)), ValueError, "need real numbers"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
