"""What every script here begins and ends with: its options, its data, its tables, and what made a result."""

import argparse
import contextlib
import hashlib
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # half the time to compile

import jax
import numpy as np
import optax

import metaopt
from metaopt.progress import report_progress


def run(main: Callable[[], Any]) -> Any:
    """Runs the `main` of a script, and reports what it does in a log file."""
    with reporting():
        return main()


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Prints a line every 10 s if standard error is not a terminal: the place in the script, and the step of `fit`."""
    if not sys.stderr.isatty():
        print(f"{Path(sys.argv[0]).name} begins", file=sys.stderr, flush=True)
    with report_progress(None, False if sys.stderr.isatty() else None, "{place}", place=_Place()):
        yield


class _Place:
    """As a string: the function of a script that the main thread is in, such as "random_search (auto_tune.py:395)"."""

    def __str__(self) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        place, compiling = "", False
        while frame is not None:
            path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname.replace(".<locals>", "")
            if path.stem in ("compiler", "mlir", "partial_eval") and {"jax", "_src"} <= set(path.parts):
                place, compiling = "", True  # frames inside are of functions that JAX traces
            elif not place and path.parent == Path(__file__).parent and path != Path(__file__) and "<" not in name:
                place = f"{name} ({path.name}:{frame.f_lineno})"
            frame = frame.f_back
        return f"compiling in {place}" if compiling else place or Path(sys.argv[0]).name


def parser(doc: str | None, *, num_seeds: int = 3) -> argparse.ArgumentParser:
    """The options that all have: --smoke, --seeds, --out; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one seed; writes no result")
    parser.add_argument("--seeds", type=_count, default=num_seeds, help="how many")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}.")
    return int(text)


def data_file(file: str, name: str) -> Path:
    """Where the data of the script `file` are; ends the script where they are not."""
    path = Path(os.environ.get("METAOPT_DATA", "")) / name
    if not path.is_file():
        sys.exit(f"{Path(file).stem} needs {name}, in the folder that the environment variable METAOPT_DATA names.")
    return path


def code(*files: str) -> str:
    """What tells the code of a result from other code: a digest of these files and of the library."""
    library = Path(metaopt.__file__).parent
    digest = hashlib.sha256()
    for path in [*map(Path, files), *sorted(library.rglob("*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def work_folder(folder: Path, *files: str) -> Path:
    """Where a run of these files keeps what has ended: what other code made lies in other folders, and is not taken."""
    own = folder / code(*files)
    others = [path.name for path in folder.glob("*/") if path != own]
    if others and not own.is_dir():
        print(f"{folder} holds what other code made, which is not taken: {', '.join(sorted(others)[:5])}", flush=True)
    return own


def kept(folder: Path | None, name: str, make: Callable[[], dict], *, wait: bool = True) -> dict[str, Any]:
    """Arrays by name: what `make` gives, or gave before, as the folder has it. Where another process is making it, this
    one waits, or gives nothing: who calls without waiting for all that there is to make, and then with it, shares the
    work with the processes that do so, too."""
    if folder is None:
        return make() if wait else {}
    import fcntl

    file = folder / f"{name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        with open(f"{file}.lock", "w") as lock:  # the system's: it ends with the process
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return {}
            if not file.is_file():  # nor has it been made while this one waited
                made = make()
                with open(f"{file}.part", "wb") as part:
                    np.savez(part, **made)
                Path(f"{file}.part").replace(file)
    with np.load(file, allow_pickle=False) as found:
        return {key: array for key, array in found.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def spread(values, digits: int = 3) -> str:
    """Mean ± standard deviation; of one value, ± 0."""
    values = np.asarray(values, float)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"


def listed(found: Mapping[str, Sequence]) -> str:
    """Names, each with where it was found: "MAML (5, 20); ANIL (5)". Those that were found nowhere are left out."""
    return "; ".join(f"{name} ({', '.join(map(str, where))})" for name, where in found.items() if len(where)) or "none"


def publish(
    file: str, title: str, text: str, options: argparse.Namespace, *, name: str | None = None, picture: str = ""
) -> None:
    """Prints a result and the line that says what made it, and writes both as Markdown, but for a smoke run.

    `name` is that of the result, where it is not the script's; `picture` says what is seen in the one beside it.
    """
    name = name or Path(file).stem
    command = shlex.join(["python", f"experiments/{Path(file).name}", *sys.argv[1:]])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text += (
        f"\n\n`{command}`, {time.process_time():.0f} processor seconds on {jax.default_backend()}, {cores} core(s); "
    )
    text += f"Python {platform.python_version()}, JAX {jax.__version__}, optax {optax.__version__}, metaopt "
    text += f"{metaopt.__version__}.\n"
    print(text)
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        shown = f"![{picture}]({name}.png)\n\n" if picture else ""
        (options.out / f"{name}.md").write_text(f"# {title}\n\n{shown}{text}")
