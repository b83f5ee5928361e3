"""A mutation campaign: small faults at places drawn at random, and whether the tests detect them.

    python tests/mutation/campaign.py draw --seed 0 --num 150      # writes mutants.json
    python tests/mutation/campaign.py run --workers 2              # hours; continues where it was stopped
    python tests/mutation/campaign.py report                       # writes mutants.md
    python tests/mutation/campaign.py move                         # finds the places again after the code has moved

Each list has its own folder: `--folder tests/mutation/seed_1` before the command.

`draw` parses every file of `metaopt`, lists all places where an operator applies, and draws from them: rooms take
turns, and within a room operators take turns, so that neither a large room nor a frequent operator dominates. `run`
applies one mutant at a time to a copy of the repository and runs, up to the number of `--stages`, the tests of its
file, those of its room, the batteries over all rooms, and the whole suite. The test that detected it in the last
campaign comes first. A mutant is detected if a test fails twice or the tests run 25 minutes. A later run with more
stages continues with the survivors of fewer. With `--since COMMIT`, mutants whose file or test has changed since this
commit come first.

A mutant that survives is either equivalent (no input gives another result; `equivalent.json` says why) or shows a
missing test.
"""

import argparse
import ast
import json
import os
import pathlib
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 1500  # seconds of one stage of tests


class Mutant(NamedTuple):
    """One small fault.

    Attributes:
      operator: its kind.
      file: relative to the repository.
      line: counted from 1.
      start: offset of the replaced bytes in the file.
      end: where they end.
      text: the new text.
      was: the old text.
      test: the test that detected it in the last campaign, or "".
      column: number of bytes before it on its line.
    """

    operator: str
    file: str
    line: int
    start: int
    end: int
    text: str
    was: str
    test: str = ""
    column: int = 0


def read(folder: pathlib.Path) -> list[Mutant]:
    return [Mutant(**fields) for fields in json.loads((folder / "mutants.json").read_text())]


def write(folder: pathlib.Path, mutants: list[Mutant]) -> None:
    folder.mkdir(exist_ok=True)
    text = json.dumps([mutant._asdict() for mutant in mutants], indent=1, ensure_ascii=False)
    (folder / "mutants.json").write_text(text + "\n")


# ---- Operators: syntax node -> (name, replaced node, new text) ----------------------------------------------------


def _name(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""


def _is_mask(node: ast.AST) -> bool:
    return "mask" in _name(node).lower()


def _is_text(node: ast.AST) -> bool:
    """Whether an operand is text or a list: a sum of them has no sign."""
    is_constant = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    is_sum = isinstance(node, ast.BinOp) and (_is_text(node.left) or _is_text(node.right))
    return is_constant or is_sum or isinstance(node, (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple))


def faults(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """The faults that one node of the syntax tree can have."""
    text = ast.unparse
    if isinstance(node, ast.BinOp) and not (_is_text(node.left) or _is_text(node.right)):
        left, right = text(node.left), text(node.right)
        if isinstance(node.op, (ast.Add, ast.Sub)):
            other = "-" if isinstance(node.op, ast.Add) else "+"
            yield "sign", node, f"(({left}) {other} ({right}))"
            yield "dropped term", node, f"({left})"
        if isinstance(node.op, ast.Mult):
            if _is_mask(node.left) or _is_mask(node.right):
                yield "missing mask", node, f"({right if _is_mask(node.left) else left})"
            else:
                yield "dropped term", node, f"({left})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign", node, f"({text(node.operand)})"
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        swapped = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}.get(type(node.ops[0]))
        if swapped:
            yield "off by one", node, f"({text(node.left)} {swapped} {text(node.comparators[0])})"
    if isinstance(node, ast.Call):
        yield from _faulty_calls(node)
    if isinstance(node, ast.Attribute) and node.attr in ("train", "valid") and isinstance(node.ctx, ast.Load):
        yield "swapped train and valid", node, f"{text(node.value)}.{'valid' if node.attr == 'train' else 'train'}"
    if (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and _name(node.value.func).endswith("random.split")
    ):
        target = node.targets[0]
        names = [text(e) for e in target.elts if isinstance(e, ast.Name)] if isinstance(target, ast.Tuple) else []
        if len(names) >= 2:
            yield "reused key", node, f"{text(node)}; {names[1]} = {names[0]}"


def _faulty_calls(node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    text, name = ast.unparse, _name(node.func)
    if name.endswith("stop_gradient") and len(node.args) == 1:
        yield "removed stop_gradient", node, f"({text(node.args[0])})"
    if name.endswith("random.fold_in") and len(node.args) == 2:
        yield "reused key", node, f"({text(node.args[0])})"
    if name in ("jnp.where", "np.where") and len(node.args) == 3:
        yield "missing mask", node, f"({text(node.args[1])})"
    if name in ("range", "jnp.arange", "np.arange") and len(node.args) == 1:
        yield "off by one", node, f"{name}({text(node.args[0])} - 1)"
    for keyword in node.keywords:
        if keyword.arg == "axis" and isinstance(keyword.value, (ast.Constant, ast.UnaryOp)):
            axis = ast.literal_eval(keyword.value)
            if isinstance(axis, int):
                yield "wrong axis", keyword.value, {0: "-1", 1: "0", -1: "0"}.get(axis, "0")
        if keyword.arg in ("where", "mask"):
            yield "missing mask", keyword.value, "None" if keyword.arg == "mask" else "True"


# ---- Drawing ------------------------------------------------------------------------------------------------------


def places(file: pathlib.Path) -> list[Mutant]:
    """All mutants of one file, leaving out annotations, decorators, docstrings and the text of errors."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    mutants: list[Mutant] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
            return
        for operator, part, new in faults(node):
            start = starts[part.lineno - 1] + part.col_offset
            end = starts[part.end_lineno - 1] + part.end_col_offset
            was = source[start:end].decode()
            place = (str(file.relative_to(ROOT)), part.lineno, start, end)
            mutants.append(Mutant(operator, *place, new, was, column=part.col_offset))
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(ast.parse(source))
    return mutants


def room_of(file: str) -> str:
    parts = pathlib.Path(file).parts
    return parts[1] if len(parts) > 2 else "top level"


def draw(seed: int, num: int, pattern: str) -> list[Mutant]:
    """`num` mutants: rooms take turns, within a room operators do, and the place is uniform."""
    rng = random.Random(seed)
    by_room: dict[str, dict[str, list[Mutant]]] = {}
    for file in sorted((ROOT / "metaopt").rglob("*.py")):
        if not re.search(pattern, str(file.relative_to(ROOT))):
            continue
        for mutant in places(file):
            by_room.setdefault(room_of(mutant.file), {}).setdefault(mutant.operator, []).append(mutant)
    drawn: list[Mutant] = []
    turns = {room: rng.sample(sorted(operators), len(operators)) for room, operators in by_room.items()}
    while len(drawn) < num and any(turns.values()):
        for room in sorted(turns):
            if len(drawn) == num or not turns[room]:
                continue
            operator = turns[room].pop(0)
            mutants = by_room[room][operator]
            drawn.append(mutants.pop(rng.randrange(len(mutants))))
            if mutants:
                turns[room].append(operator)
    return drawn


def moved(mutant: Mutant, number: int, everywhere: list[Mutant]) -> Mutant:
    """The same fault in today's files: in its own file, or else in another one, at the nearest line.

    If its code is gone, another place of its operator and room is drawn, with `number` as the seed.
    """
    fault, own = (mutant.operator, mutant.was, mutant.text), ROOT / mutant.file
    same = [m for m in everywhere if (m.operator, m.was, m.text) == fault]
    near = [m for m in same if ROOT / m.file == own] or same
    if near:
        distance = lambda m: (abs(m.line - mutant.line), abs(m.column - mutant.column))
        return min(near, key=distance)._replace(test=mutant.test)
    kind = (mutant.operator, room_of(mutant.file))
    drawn = random.Random(number).choice([m for m in everywhere if (m.operator, room_of(m.file)) == kind])
    print(f"{number}: {mutant.was!r} of {mutant.file}:{mutant.line} is gone; now {drawn.file}:{drawn.line}")
    return drawn


# ---- Running ------------------------------------------------------------------------------------------------------


def mutated(source: bytes, mutant: Mutant) -> bytes:
    """Returns the file with the fault. Raises ValueError if its text at this place has changed since the draw."""
    was = source[mutant.start : mutant.end].decode()
    if was != mutant.was:
        raise ValueError(f"{mutant.file}:{mutant.line} has changed since the draw: {was!r} was {mutant.was!r}.")
    return source[: mutant.start] + mutant.text.encode() + source[mutant.end :]


def stages(mutant: Mutant) -> list[list[str]]:
    """Arguments of pytest, the nearest tests first: those of the file, of its room, of all rooms, and the whole suite.

    The test of the last campaign comes before those of the file.
    """
    file = pathlib.Path(mutant.file)
    stems = {file.stem.strip("_"), *(part.strip("_") for part in file.parts[1:-1])}
    room = ROOT / "tests" / room_of(mutant.file)
    pattern = re.compile(rf"test_({'|'.join(map(re.escape, sorted(stems)))})(_.*)?\.py")
    folders = {room, ROOT / "tests"}
    relative = lambda files: sorted(str(f.relative_to(ROOT)) for f in files)
    near = relative(f for folder in folders for f in folder.glob("test_*.py") if pattern.fullmatch(f.name))
    batteries = relative((ROOT / "tests").glob("test_*.py"))
    batteries = [f for f in batteries if not re.search("experiment|benchmarks|notebook|reproductions|house", f)]
    return [[mutant.file, *near], relative([room]) if room.is_dir() else [], batteries, ["tests", "metaopt"]]


def first_failure(copy: pathlib.Path, targets: list[str]) -> str:
    """Returns the first failing test of pytest's arguments, a note if it has no name, or "" if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", *targets]
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"{targets[0]}: ran more than {TIMEOUT} s"
    if ran.returncode in (0, 5):  # 5: no tests there
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", ran.stdout, re.MULTILINE)
    return failed[0] if failed else ran.stdout[-200:] + ran.stderr[-200:]


def fails_again(copy: pathlib.Path, test: str) -> bool:
    """Whether the test of the last campaign still exists and fails twice."""
    return all(first_failure(copy, [test]) == test for _ in range(2))


def outcome(copy: pathlib.Path, mutant: Mutant, which: slice) -> tuple[str, str]:
    """("detected" or "survived", the first failing test or "") of some of the stages.

    A failure counts if the test fails again on its own: a busy machine makes tests fail, too.
    """
    path = copy / mutant.file
    source = path.read_bytes()
    path.write_bytes(mutated(source, mutant))
    try:
        if which.start == 0 and mutant.test and fails_again(copy, mutant.test):
            return "detected", mutant.test
        for targets in filter(None, stages(mutant)[which]):
            failed, skipped = first_failure(copy, targets), []
            while failed and "::" in failed and not first_failure(copy, [failed]):
                skipped += ["--deselect", failed]
                failed = first_failure(copy, targets + skipped)
            if failed:
                return "detected", failed
        return "survived", ""
    finally:
        path.write_bytes(source)


def changed_first(mutants: list[Mutant], commit: str) -> list[int]:
    """Numbers of all mutants: first those whose file or test has changed since a commit."""
    command = ["git", "diff", "--name-only", commit, "--", "metaopt", "tests"]
    changed = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    is_same = lambda i: changed.isdisjoint({mutants[i].file, mutants[i].test.split("::")[0]})
    return sorted(range(len(mutants)), key=is_same)


def run(folder: pathlib.Path, workers: int, num_stages: int, since: str) -> None:
    """Runs the mutants that have no result yet and are not equivalent; every result is written at once."""
    mutants, equivalent = read(folder), reasons(folder)
    results_file = folder / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    waiting: queue.Queue[int] = queue.Queue()
    for i in changed_first(mutants, since):
        result = results.get(str(i), {"outcome": "survived", "stages": 0})
        if str(i) not in equivalent and result["outcome"] == "survived" and result["stages"] < num_stages:
            waiting.put(i)
    lock = threading.Lock()

    def work(copy: pathlib.Path) -> None:
        while True:
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                return
            verdict, test = outcome(copy, mutants[i], slice(results.get(str(i), {"stages": 0})["stages"], num_stages))
            with lock:
                results[str(i)] = {"outcome": verdict, "test": test, "stages": num_stages}
                results_file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                print(
                    f"{i:4d} {verdict:9s} {mutants[i].operator:24s} {mutants[i].file}:{mutants[i].line} {test}",
                    flush=True,
                )

    with tempfile.TemporaryDirectory() as work_dir:
        threads = []
        for worker in range(workers):
            copy = pathlib.Path(work_dir) / str(worker) / "metaopt"
            ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "results_local", "_build")
            shutil.copytree(ROOT, copy, ignore=ignored)
            threads.append(threading.Thread(target=work, args=(copy,)))
            threads[-1].start()
        for thread in threads:
            thread.join()


def reasons(folder: pathlib.Path) -> dict[str, str]:
    """Number of a mutant that changes no result -> why."""
    file = folder / "equivalent.json"
    return json.loads(file.read_text()) if file.exists() else {}


def report(folder: pathlib.Path) -> str:
    """The list of mutants with their outcome, as Markdown."""
    mutants, equivalent = read(folder), reasons(folder)
    results = json.loads((folder / "results.json").read_text())
    rows, counts = [], {"detected": 0, "survived": 0, "equivalent": 0, "not run": 0}
    for i, mutant in enumerate(mutants):
        result = results.get(str(i), {"outcome": "not run", "test": mutant.test})
        kind = "equivalent" if str(i) in equivalent else result["outcome"]
        counts[kind] += 1
        reason = equivalent.get(str(i), result["test"])
        was, text = (" ".join(x.split()).replace("|", "\\|")[:60] for x in (mutant.was, mutant.text))
        rows.append(
            f"| {i} | {mutant.operator} | {mutant.file}:{mutant.line} | `{was}` → `{text}` | {kind} | {reason} |"
        )
    share = counts["detected"] / max(1, counts["detected"] + counts["survived"])
    tried = f"{counts['detected']} detected, {counts['survived']} survived"
    others = f"{counts['equivalent']} equivalent, {counts['not run']} not run"
    head = (
        f"# Mutation campaign\n\n{len(mutants)} mutants: {tried}, {others}. Detected among those that were run and are "
        f"not equivalent: {share:.1%}.\n\n"
        "`tests/mutation/campaign.py` draws, runs and reports them. Lines are those of the commit that last changed "
        "`mutants.json`.\n\n"
        "| | operator | place | change | outcome | detected by, or why it is equivalent |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="of the list")
    drawing = commands.add_parser("draw", help="draw mutants and write mutants.json")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--num", type=int, default=150)
    drawing.add_argument("--files", default="", help="a regular expression of the files to draw from")
    running = commands.add_parser("run", help="run the tests on every mutant without a result")
    running.add_argument("--workers", type=int, default=2)
    running.add_argument("--stages", type=int, default=3, choices=range(1, 5), help="how many, nearest first")
    running.add_argument("--since", default="HEAD", help="mutants whose file or test changed since then come first")
    commands.add_parser("report", help="write mutants.md, and what detected each into mutants.json")
    commands.add_parser("move", help="find the places of mutants.json in today's files")
    options = parser.parse_args()
    if options.command == "draw":
        write(options.folder, draw(options.seed, options.num, options.files))
    elif options.command == "move":
        everywhere = [m for file in sorted((ROOT / "metaopt").rglob("*.py")) for m in places(file)]
        write(options.folder, [moved(m, number, everywhere) for number, m in enumerate(read(options.folder))])
    elif options.command == "run":
        run(options.folder, options.workers, options.stages, options.since)
    else:
        (options.folder / "mutants.md").write_text(report(options.folder))
        results = json.loads((options.folder / "results.json").read_text())
        mutants = read(options.folder)
        tested = [m._replace(test=results[str(i)]["test"]) if str(i) in results else m for i, m in enumerate(mutants)]
        write(options.folder, tested)


if __name__ == "__main__":
    main()
