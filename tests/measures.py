"""Sizes that show how hard the code is to take over: `python tests/measures.py` prints them as a table.

`test_house.py` asserts the limits of functions and files.
"""

import ast
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import prose

ROOT = Path(__file__).parents[1]
AIMS = {  # by the names of `measures`
    "unusual turns of phrase per 1,000 words": "below 1",
    "sentences above 30 words in README": "below 5%",
    "public names in packages": "about 330",
    "`raise` and calls of checks per 1,000 lines": "below 10",
    "longest function, without docstring": "below 80 lines",
    "longest file": "below 500 lines",
    "longest file of `experiments`": "below 500 lines",
    "`import metaopt` after its dependencies": "below 0.5 s",
    "README, CHANGELOG": "below 12 kB, 3 kB",
}


class Function(NamedTuple):
    """A function, and its number of lines without the docstring."""

    lines: int
    file: str
    name: str


def files(folder: str) -> dict[str, str]:
    """The Python files of a folder: path -> text."""
    return {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / folder).rglob("*.py"))}


def functions(folder: str) -> list[Function]:
    """All functions of a folder, the longest first."""
    lengths = []
    for file, text in files(folder).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                lengths.append(Function(lines, file, node.name))
    return sorted(lengths, reverse=True)


def _checks(text: str) -> Iterator[ast.AST]:
    for node in ast.walk(ast.parse(text)):
        function = node.func if isinstance(node, ast.Call) else None
        name = getattr(function, "attr", getattr(function, "id", ""))
        if isinstance(node, ast.Raise) or name.lstrip("_").startswith("check_"):
            yield node


def _unused(names: dict[str, list[str]]) -> list[str]:
    """The public names, such as "nas.darts", that neither other rooms nor the experiments use."""
    texts, unused = files("metaopt") | files("experiments"), []
    for room in names:
        others = "\n".join(text for file, text in texts.items() if not file.startswith(f"metaopt/{room}/"))
        used = re.findall(rf"\b{room}\.(\w+)", others)
        unused += [f"{room}.{name}" for name in names[room] if name not in used]
    return unused


class _Anonymous(ast.NodeTransformer):
    """Numbers the names of a function in their order."""

    def __init__(self):
        self.numbers: dict[str, str] = {}

    def visit_Name(self, node):
        return ast.Name(self.numbers.setdefault(node.id, str(len(self.numbers))), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self.numbers.setdefault(node.arg, str(len(self.numbers))))


def copies(folder: str, least: int = 25) -> list[list[str]]:
    """Groups of functions that differ only in names, from `least` nodes of the syntax tree on."""
    groups: dict[str, list[str]] = {}
    for file, text in files(folder).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                anonymous = _Anonymous()
                parts = [anonymous.visit(part) for part in (node.args, *body)]
                if sum(1 for part in parts[1:] for _ in ast.walk(part)) >= least:
                    groups.setdefault("".join(map(ast.dump, parts)), []).append(f"{file}: {node.name}")
    return [group for group in groups.values() if len(group) > 1]


def _import_seconds() -> float:
    """Seconds of `import metaopt` after its dependencies, the least of three."""
    code = (
        "import jax, flax, optax, chex, time; t = time.perf_counter(); import metaopt; print(time.perf_counter() - t)"
    )
    run = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return min(float(run()) for _ in range(3))


def measures() -> dict[str, str]:
    """Every measure by name, as text."""
    metaopt = importlib.import_module("metaopt")
    packages = [p.parent.name for p in (ROOT / "metaopt").glob("[a-z]*/__init__.py")]
    names = {p: list(importlib.import_module(f"metaopt.{p}").__all__) for p in packages}
    library = files("metaopt")
    lines = sum(text.count("\n") for text in library.values())
    longest = functions("metaopt")[0]
    raises = sum(isinstance(node, ast.Raise) for text in library.values() for node in _checks(text))
    checks = sum(1 for text in library.values() for _ in _checks(text))
    texts = {
        "`metaopt`": (ROOT / "metaopt").rglob("*.py"),
        "`docs` and README": [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("[!_]*/*.md"), ROOT / "README.md"],
        "code of `experiments`": (ROOT / "experiments").rglob("*.py"),
        "`tests`": (ROOT / "tests").rglob("*.py"),
        "CHANGELOG": [ROOT / "CHANGELOG.md"],
    }
    turns = {name: prose.measure(paths)[0] for name, paths in texts.items()}
    return {
        "unusual turns of phrase per 1,000 words": ", ".join(f"{value:.1f} in {name}" for name, value in turns.items()),
        "sentences above 30 words in README": f"{prose.measure([ROOT / 'README.md'])[1]:.1%}",
        "public names in packages": f"{sum(map(len, names.values()))} in {len(names)}, "
        f"and {len(metaopt.__all__)} at the top",
        "public names that neither other rooms nor experiments use": str(len(_unused(names))),
        "groups of functions that differ only in names": f"{len(copies('metaopt'))} in `metaopt`, "
        f"{len(copies('experiments'))} in `experiments`",
        "lines of `metaopt`": f"{lines:,}",
        "`raise` statements per 1,000 lines": f"{1000 * raises / lines:.1f}",
        "`raise` and calls of checks per 1,000 lines": f"{1000 * checks / lines:.1f}",
        "longest function, without docstring": f"{longest.lines} lines, `{longest.name}`",
        "functions above 60 lines": str(sum(f.lines > 60 for f in functions("metaopt"))),
        "longest file": f"{max(text.count(chr(10)) for text in library.values())} lines",
        "longest file of `experiments`": f"{max(t.count(chr(10)) for t in files('experiments').values())} lines",
        "`import metaopt` after its dependencies": f"{_import_seconds():.2f} s",
        "README, CHANGELOG": ", ".join(
            f"{(ROOT / name).stat().st_size / 1000:.1f} kB" for name in ("README.md", "CHANGELOG.md")
        ),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(f"Measured on {time.strftime('%Y-%m-%d')}.\n\n| measure | value | aim |\n|---|---|---|")
    print("\n".join(f"| {name} | {value} | {AIMS.get(name, '')} |" for name, value in measures().items()))
