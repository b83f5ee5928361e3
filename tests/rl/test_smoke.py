"""The experiments on reinforcement learning run from end to end."""

import pytest
from test_reproductions import number, smoke


@pytest.mark.once
def test_meta_gradients(tmp_path):
    rows = smoke("meta_gradients", tmp_path)
    methods = ("bad values", "reference, bad rate", "meta-gradients", "best of the grid")
    searches = [
        f"{name}, {steps}" for name in ("random search", "TPE", "PBT") for steps in ("equal steps", "2 times the steps")
    ]
    for method in (*methods, *searches):
        assert all(0 <= number(cell.split(" [")[0]) <= 1 for cell in rows[method][1:]), method
    assert float(rows["start"][0]) == 3e-4 != float(rows["Catch, end"][0])
    assert all(float(cell.replace(",", "")) > 0 for cell in rows["Catch"])  # steps per second


@pytest.mark.once
def test_bad_values(tmp_path):
    from experiments.rl import bad_values

    rows = smoke("bad_values", tmp_path)
    assert set(bad_values.STARTS) <= set(rows)
    for start in bad_values.STARTS:
        kind, *cells = rows[start]  # the last row of each start
        assert kind == "all tuned" and all(0 <= number(cell.split(" [")[0]) <= 1 for cell in cells[:2])


@pytest.mark.once
def test_bandits(tmp_path):
    rows = smoke("bandits", tmp_path)
    assert 40 < number(rows["random"][0]) < number(rows["Gittins index"][0]) < 80
    assert number(rows["RL²"][0]) > 40


@pytest.mark.once
def test_families(tmp_path):
    rows = smoke("families", tmp_path)
    for method in ("MAML", "first-order MAML", "MAML by evolution", "trained on all goals", "random start"):
        assert all(-1 <= number(cell) <= 1 for cell in rows[method]), method
    for method in ("bad values", "random search", "unrolled", "truncated, 1 update", "persistent_es"):
        assert 0 <= number(rows[method][0]) <= 1 and 0 <= float(rows[method][1]) <= 1, method
