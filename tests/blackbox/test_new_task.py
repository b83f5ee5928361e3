"""The rows of a new task that a meta-optimizer reads."""

from types import SimpleNamespace

import numpy as np

from metaopt import base
from metaopt.blackbox import _new_task


def test_a_meta_optimizer_reads_the_training_rows_of_a_new_task_only(monkeypatch):
    train, valid = ({name: np.full(3, value) for name in _new_task.ROWS} for value in (1.0, 2.0))
    read = []
    specialized = SimpleNamespace(deep=None, transformers=None)
    monkeypatch.setattr(_new_task._surrogates, "at_task", lambda *args: read.append(args[2]) or specialized)
    monkeypatch.setattr(_new_task._surrogates, "task_weights", lambda *args: read.append(args[2]))
    surrogate = SimpleNamespace(sorted_features=(), embedding=True)
    _new_task.new_task_of(surrogate, base.Task(train, valid))
    assert len(read) == 2 and all((rows[name] == 1.0).all() for rows in read for name in _new_task.ROWS)
