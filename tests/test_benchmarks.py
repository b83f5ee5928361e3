"""The benchmark runs, and its tables say what was measured."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "experiments" / "benchmarks" / "unroll.py"


def rows(text):
    """The cells of every line of the Markdown tables in `text`."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def test_smoke():
    # Half the seconds of compiling; memory is ordered as it is with all optimizations.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    cost = {row[1]: row for row in rows(done.stdout) if row[0] == "16"}
    assert list(cost) == ["plain training", '`"none"`', '`"step"`', '`"sqrt"`']
    memory = {name: float(row[4]) for name, row in cost.items()}
    assert memory['`"none"`'] > memory['`"step"`'] > memory['`"sqrt"`'] > memory["plain training"] > 0
    assert float(cost['`"none"`'][5]) == 1 and float(cost["plain training"][3]) == 1
    speed = {row[0]: float(row[1]) for row in rows(done.stdout) if row[0].split()[0] in ("all", "chunks", "Python")}
    assert len(speed) == 3 and min(speed.values()) > 0
    assert "--smoke` with Python" in done.stdout


def test_the_table_goes_between_the_markers_of_the_readme(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("unroll_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:start -->\nold\n<!-- benchmark:end -->\nafter\n")
    for _ in range(2):
        script.put_into_readme(r"new \1")
        assert readme.read_text() == ("before\n<!-- benchmark:start -->\nnew \\1\n<!-- benchmark:end -->\nafter\n")
