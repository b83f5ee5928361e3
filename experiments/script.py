"""Shared code of all scripts: options, data files, saved work, scores, tables, and how a result was made."""

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
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # halves the compile time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt
from experiments import pages
from metaopt.training import report_progress

FOLDER = Path(__file__).resolve().parent  # experiments/
RESULTS = FOLDER / "results"


def run(main: Callable[[], Any]) -> Any:
    """Runs the `main` of a script, and reports its progress in a log file."""
    with reporting():
        return main()


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Prints a line every 10 s if standard error is not a terminal: the place in the script, and the step of `fit`."""
    if not sys.stderr.isatty():
        print(f"{_program()} begins", file=sys.stderr, flush=True)
    with report_progress(None, False if sys.stderr.isatty() else None, "{place}", place=_Place()):
        yield


class _Place:
    """Formats as the function of a script that the main thread runs, such as "random_search (auto_tune.py:395)"."""

    def __str__(self) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        place, compiling = "", False
        while frame is not None:
            path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname.replace(".<locals>", "")
            if path.stem in ("compiler", "mlir", "partial_eval") and {"jax", "_src"} <= set(path.parts):
                place, compiling = "", True  # inner frames belong to functions that JAX traces
            elif not place and _is_of_an_experiment(path) and "<" not in name:
                place = f"{name} ({path.name}:{frame.f_lineno})"
            frame = frame.f_back
        return f"compiling in {place}" if compiling else place or _program()


def _is_of_an_experiment(path: Path) -> bool:
    return FOLDER in path.parents and path.name not in ("script.py", "__main__.py")


def _program() -> str:
    """Returns the name of the script, or of the folder that runs as a script."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def parser(doc: str | None, *, num_seeds: int = 3) -> argparse.ArgumentParser:
    """Returns a parser with the options of all scripts: --smoke, --seeds, --out. `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(_program(), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one seed; writes no result")
    parser.add_argument("--seeds", type=_count, default=num_seeds, help="how many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}.")
    return int(text)


def data_file(file: str | Path, name: str) -> Path:
    """Returns the path of a data file of the script or folder `file`. Exits the script if the data file is missing."""
    path = Path(os.environ.get("METAOPT_DATA", "")) / name
    if not path.is_file():
        sys.exit(f"{Path(file).stem} needs {name}, in the folder that the environment variable METAOPT_DATA names.")
    return path


def code(*files: str | Path) -> str:
    """Returns a digest of these files and folders, the readers of data and the library: the code of a result."""
    digest = hashlib.sha256()
    own = [path for file in (*files, Path(__file__).parent / "data") for path in _python_files(Path(file))]
    for path in [*own, *sorted(Path(metaopt.__file__).parent.rglob("*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def work_folder(folder: Path, *files: str | Path) -> Path:
    """Returns the folder in which a run of these files keeps its finished work.

    The folder depends on the code. Work of other code is in other folders, and is not used.
    """
    own = folder / code(*files)
    others = [path.name for path in folder.glob("*/") if path != own]
    if others and not own.is_dir():
        print(f"{folder} holds what other code made, which is not taken: {', '.join(sorted(others)[:5])}", flush=True)
    return own


def kept(folder: Path | None, name: str, make: Callable[[], dict], *, wait: bool = True) -> dict[str, Any]:
    """Returns arrays by name: the result of `make`, or its saved result from an earlier call.

    If another process is computing the result, this call waits. With `wait=False`, it returns an empty dict instead. To
    share work among several processes, each one first requests all results with `wait=False`, and then requests them
    with `wait=True`.
    """
    if folder is None:
        return make() if wait else {}
    import fcntl

    file = folder / f"{name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        with open(f"{file}.lock", "w") as lock:  # a lock of the operating system, which ends with the process
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return {}
            if not file.is_file():  # another process may have written it in the meantime
                arrays = make()
                with open(f"{file}.part", "wb") as part:
                    np.savez(part, **arrays)
                Path(f"{file}.part").replace(file)
    with np.load(file, allow_pickle=False) as saved:
        return {key: array for key, array in saved.items()}


def timed_parts(folder: Path | None) -> tuple[Callable[[str, Callable[[], dict]], dict[str, Any]], list[float]]:
    """Returns a function `(name, make) -> arrays` like `kept`, and the list of the processor seconds of its parts.

    The seconds of a part are saved with it, so that those of an earlier call count, too. The function prints each part:
    the mean of its "score", if it has one, and its seconds.
    """
    seconds: list[float] = []

    def keep(name, make):
        def timed():
            begin = time.process_time()
            return {**make(), "seconds": np.array(time.process_time() - begin)}

        arrays = kept(folder, name.replace(",", "").replace(" ", "_"), timed)
        seconds.append(float(arrays.pop("seconds")))
        score = f"{arrays['score'].mean():.3f}, " if "score" in arrays else ""
        print(f"{name}: {score}{seconds[-1]:.0f} s", flush=True)
        return arrays

    return keep, seconds


def repeated(tree: Any, num: int) -> Any:
    """Returns a tree with a leading axis of `num` equal rows."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), tree)


def add_scores(scores: dict[Any, list[dict[str, float]]], seed: int, name: Any, /, **values: float) -> None:
    """Appends the scores of one seed to the list of `name`, and prints them."""
    scores.setdefault(name, []).append(values)
    print(f"seed {seed}: {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def spread(values, digits: int = 3) -> str:
    """Returns mean ± standard deviation. The deviation of one value is 0."""
    values = np.asarray(values, float)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"


def listed(places: Mapping[str, Sequence]) -> str:
    """Lists names with their places: "MAML (5, 20); ANIL (5)". Names without a place are omitted."""
    return "; ".join(f"{name} ({', '.join(map(str, where))})" for name, where in places.items() if len(where)) or "none"


def place(file: str | Path) -> str:
    """Returns the path of a script or folder below the root of the repository, as in a command."""
    return Path(file).resolve().relative_to(FOLDER.parent).as_posix()


def publish(
    file: str | Path,
    title: str,
    text: str,
    options: argparse.Namespace,
    *,
    name: str | None = None,
    picture: str = "",
    seconds: float | None = None,
) -> None:
    """Prints a result and a line on how it was made. Writes both as Markdown, except in a smoke run.

    `file` is the script, or the folder that runs as a script. `name` is the name of the result; by default it is the
    name of the script or folder. `picture` describes the picture next to the result. `seconds` is the processor time
    of all the work, also in earlier calls; by default, it is that of this process.
    """
    name = name or Path(file).stem
    command = shlex.join(["python", place(file), *sys.argv[1:]])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seconds = time.process_time() if seconds is None else seconds
    text += f"\n\n`{command}`, {seconds:.0f} processor seconds on {jax.default_backend()}, {cores} core(s); "
    text += f"Python {platform.python_version()}, JAX {jax.__version__}, optax {optax.__version__}, metaopt "
    text += f"{metaopt.__version__}.\n"
    print(text)
    if not options.smoke:
        pages.write(options.out / f"{name}.md", title, text, picture)
