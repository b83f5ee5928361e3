"""A callback of `fit` that writes the metrics of each step to a file, or to a tool that shows curves."""

import json
import logging
import math
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from metaopt import _checks

_log = logging.getLogger(__name__)

_START = b'{"step": '  # of each line

WriteFn = Callable[[int, Mapping[str, float]], Any]  # step, scalar metrics


def log_to(target: Any, *, every: int = 1) -> Callable[[int, Mapping[str, Any]], None]:
    """Makes a callback of `fit` that writes the scalar metrics of each step, for `fit(callback=...)`.

    A target is one of these:

    - a path that ends in ".jsonl": each step is one line, a JSON object, for `pandas.read_json(path, lines=True)`
    - an object with `add_scalar(name, value, step)`: a `SummaryWriter` for TensorBoard, of tensorboardX or PyTorch
    - an object with `log_metrics(metrics, step=)`: the module `mlflow`, inside a run of it
    - an object with `log(metrics, step=)`: a run of Weights & Biases, from `wandb.init()`, which ignores steps that it
      already has

    The file: a value that is not finite becomes null. Each line is on disk after its step. When a run continues from a
    checkpoint, `fit` reports the steps since the checkpoint again, and the file's earlier lines of these steps are
    replaced. So a run that was killed and continued writes the same file as a run that was not killed. A new run
    replaces a file of an older run, also if both have the same callback. A metric with the name "step" is left out. If
    the disk is full, there is one warning. The run goes on, and the lines wait in memory until they can be written.

    Cost: TensorBoard and Weights & Biases take 1 to 2 ms for a call. MLflow takes about 10 ms of a processor, and less
    than 1 ms after `mlflow.config.enable_async_logging()`. The tools also have threads that use a core. If a step takes
    less than a second, use `every=10`.

    Args:
      target: a path, or an object with one of these methods.
      every: writes only steps that this number divides, and steps with an evaluation.

    Returns:
      The callback `(step, metrics) -> None`, which your own loop can call, too. Call it with increasing steps: a step
      that is not larger than the last one replaces the lines from that step on. It leaves out metrics that are not one
      number, such as dicts. Flatten them: `callback(step, {"loss": loss, **hyperparams})`.

    Raises:
      ValueError: if `target` is a path that does not end in ".jsonl", or `every` is below 1.
      ValueError: at the first step, if the file exists and holds something else.
      OSError: if the file cannot be opened at the first step, or if its first line cannot be written. `fit` then writes
        a checkpoint and raises the error.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "run.jsonl"
      >>> callback = log_to(path)
      >>> callback(1, {"value": 0.5, "hypergrad_norm": 2.0})
      >>> print(path.read_text(), end="")
      {"step": 1, "value": 0.5, "hypergrad_norm": 2.0}
    """
    _checks.check_integer("every", every, 1)
    begin, write = _writer(target)

    def callback(step: int, metrics: Mapping[str, Any]) -> None:
        begin(step)
        if step % every and "evaluation" not in metrics:
            return
        write(step, {name: float(value) for name, value in metrics.items() if _is_number(value)})

    return callback


def _is_number(value: Any) -> bool:
    """Whether this is one number, of Python, NumPy or JAX."""
    is_scalar = hasattr(value, "dtype") and np.ndim(value) == 0
    return isinstance(value, numbers.Real) or (is_scalar and jnp.issubdtype(value.dtype, np.number))


def _writer(target: Any) -> tuple[Callable[[int], Any], WriteFn]:
    """Two functions: one for the start of each step, and one that writes the metrics of a step to the target."""
    if isinstance(target, str | os.PathLike):
        if Path(target).suffix != ".jsonl":
            raise ValueError(
                f'The name of a log file must end in ".jsonl", which says its format; got {os.fspath(target)!r}. '
                "To get a CSV file, convert it at the end: `pandas.read_json(path, lines=True).to_csv(...)`."
            )
        lines = _Lines(Path(target))
        return lines.begin, lines.write
    if hasattr(target, "add_scalar"):
        return _nothing, lambda step, metrics: [target.add_scalar(name, value, step) for name, value in metrics.items()]
    method = getattr(target, "log_metrics", None) or target.log
    return _nothing, lambda step, metrics: method(dict(metrics), step=step)


def _nothing(step: int) -> None:
    """Does nothing: tools keep track of the steps themselves."""


class _Lines:
    """A file with one line for each step that is written."""

    def __init__(self, path: Path):
        self.path = path
        self.length: int | None = None  # bytes of the lines that are on disk; None before the first step
        self.waiting: list[bytes] = []  # lines that are not on disk yet
        self.last_step = 0
        self.warned = False

    def begin(self, step: int) -> None:
        """Finds where the lines of earlier steps end, also if this step is not written."""
        if self.length is None or step <= self.last_step:  # at the start, and if a run continues or begins again
            self.length = _length_before(self.path, step)
            self.waiting = [line for line in self.waiting if json.loads(line)["step"] < step]
            with open(self.path, "ab") as file:  # at once: the next line may come many steps later
                file.truncate(self.length)
        self.last_step = step

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items() if name != "step"}
        self.waiting.append(json.dumps({"step": step, **values}).encode() + b"\n")
        try:
            self._append()
        except OSError as error:
            if not self.length:  # no line was ever written
                raise
            if not self.warned:
                _log.warning("%s: %s. The run goes on, and lines wait until they can be written.", self.path, error)
            self.warned = True

    def _append(self) -> None:
        """Writes the waiting lines after those on disk. They replace all later bytes there, such as half a line."""
        assert self.length is not None
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.seek(self.length)
            file.truncate()
            file.write(b"".join(self.waiting))
            file.flush()
            self.length = file.tell()
        self.waiting = []


def _length_before(path: Path, step: int) -> int:
    """The number of bytes of the leading lines whose steps are before `step`; 0 without a file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0
    length = 0
    with open(path, "rb") as file:
        for line in file:
            if line[: len(_START)] != _START[: len(line)]:
                raise ValueError(f"{path} exists, and is not a log of `fit`: {line[:60]!r}. Use another name.")
            if not line.endswith(b"\n"):  # half a line: the process was killed
                break
            if json.loads(line)["step"] >= step:
                break
            length += len(line)
    return length
