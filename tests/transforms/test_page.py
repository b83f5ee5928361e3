"""The page "From optax in one line" is a program that runs, and its numbers are correct."""

import re
from pathlib import Path

import pytest

import metaopt.transforms

PAGE = Path(metaopt.transforms.__file__).parent / "README.md"


@pytest.mark.once
def test_the_page_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes a log
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    first, log, in_space, sizes, _, _, _, derivatives, _, ready, untrained, learned, *_ = (
        capsys.readouterr().out.splitlines()
    )
    plain, tuned = map(float, first.split()[:2])
    assert tuned < plain and float(log.split()[0]) < plain and float(in_space.split()[0]) < plain
    broken, safe = map(float, derivatives.split())
    assert broken != broken and safe == safe  # NaN, and not
    _, adamw, both = map(int, re.findall(r"\d+", sizes))
    assert 2 * adamw <= both < 2.1 * adamw  # two entries of λ: two more copies of the parameters
    assert float(ready) < float(untrained)
    before, after = map(float, re.findall(r"\d+\.\d+", learned)[:2])
    assert after < before


def test_the_page_names_everything():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]  # the table at the end
    for name in metaopt.transforms.__all__:
        assert name.endswith("State") or any(f"`{name}`" in row for row in rows)
