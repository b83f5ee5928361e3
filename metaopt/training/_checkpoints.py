"""Checkpoints of a run: orbax writes the arrays, next to a file that identifies the run.

A checkpoint is a directory named after its step. The directory appears only when all of it is written. It holds the
arrays in a flat dictionary by their path in the tree, each with a checksum, and a JSON file. Nothing is pickled. PRNG
keys are saved as their data.

A thread writes while the run goes on. If JAX runs several processes, each writes its parts of the arrays that are split
over them, and the first one writes the rest.
"""

import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _locks, base
from metaopt.training import _processes

_log = logging.getLogger(__name__)

FORMAT = 1
NONFINITE = "nonfinite"  # the folder of the states before non-finite steps
_PROBE = 2**16  # bytes of a file that is written and removed; a full or read-only disk rejects it
_SLACK = 2**22  # bytes of a checkpoint besides its arrays


class Saved(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      step: the step of the checkpoint.
      extra: the plain values saved with it.
      arrays: path in the saved tree -> array, keys as their data. Those that were split over several processes are
        JAX arrays with the same split, and the others numpy arrays.
      impls: path -> the name of the PRNG implementation, for keys.
      directory: the directory that it was read from.
    """

    step: int
    extra: dict[str, Any]
    arrays: dict[str, Any]
    impls: dict[str, str]
    directory: str

    def tree(self, like: base.PyTree) -> base.PyTree:
        """Returns the saved arrays in the structure of `like`: numpy arrays where `like` has them, else JAX arrays.

        Raises:
          ValueError: if the two differ in structure, shape or dtype.
        """
        leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        for name in sorted(set(names).symmetric_difference(self.arrays)):
            where = "the checkpoint" if name in self.arrays else "this run"
            raise ValueError(self.refusal(f"only {where} has the array `{name}`"))
        restored = []
        for name, (_, leaf) in zip(names, leaves, strict=True):
            array = self.arrays[name]
            if not isinstance(leaf, np.ndarray) or name in self.impls:
                array = jnp.asarray(array)
            if name in self.impls:
                array = jax.random.wrap_key_data(array, impl=self.impls[name])
            if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                own, stored = (f"{x.dtype}{list(x.shape)}" for x in (leaf, array))
                raise ValueError(self.refusal(f"`{name}` is {stored} in the checkpoint and {own} in this run"))
            restored.append(array)
        return jax.tree.unflatten(treedef, restored)

    def refusal(self, difference: str) -> str:
        """The error message for a difference between this run and the checkpoint's."""
        return _refusal(self.directory, self.step, difference)


class Checkpoints:
    """The newest two checkpoints of one run, and the best ones, in one folder, which is locked until `close`.

    Args:
      directory: the folder; made if it does not exist. Each run needs its own.
      settings: plain values on which the run depends. A checkpoint with other settings is rejected.
      keep_best: the number of checkpoints with the smallest losses to keep, besides the newest two.

    Attributes:
      directory: the folder, as an absolute path.
      newest: the step of the newest checkpoint, after `restore` or `save`; None before.
      is_kept: whether `restore` has read a state of `keep_nonfinite`, in the folder NONFINITE/STEP. A run that takes
        this step again writes no checkpoint there: the next call would continue from it.

    Raises:
      ValueError: if `directory` is in use by another run, or if several processes do not see one folder there.
      OSError: if `directory` is a file, or cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: dict[str, Any], keep_best: int = 0):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = os.path.abspath(directory)
        self._settings = {"format": FORMAT, **settings}
        self._keep_best = keep_best
        self.newest: int | None = None
        self.is_kept = False
        with contextlib.ExitStack() as stack:
            _processes.in_all(stack.enter_context, _claimed(self.directory))
            _check_shared(self.directory)
            _processes.in_all(_remove_damaged_losses, self.directory)
            self._manager = self._open()
            stack.callback(lambda: self._manager.close())
            self._stack = stack.pop_all()

    def _open(self):
        from orbax.checkpoint import checkpoint_managers as policies

        loss = lambda metrics: metrics["loss"]
        newest = policies.LatestN(2)
        best = policies.BestN(get_metric_fn=loss, reverse=True, n=self._keep_best)
        options = self._ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best] if self._keep_best else [newest]),
            best_fn=loss if self._keep_best else None,
            enable_async_checkpointing=True,
        )
        return self._ocp.CheckpointManager(self.directory, options=options)

    def inside(self, folder: str) -> "Checkpoints":
        """Checkpoints of the same run in a folder inside this one."""
        settings = {name: value for name, value in self._settings.items() if name != "format"}
        return Checkpoints(os.path.join(self.directory, folder), settings)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if jax.process_count() > 1:
            self._stack.close()
            return
        self.settle()
        with contextlib.suppress(OSError, ValueError):  # orbax may raise the error of the last write a second time
            self._stack.close()

    def save(self, step: int, tree: base.PyTree, extra: dict[str, Any], loss: float = math.inf) -> None:
        """Copies the arrays, and writes them in a thread. An interrupted write leaves the former checkpoint intact.

        It waits for the former write, and `close` waits for the last one. If a write fails, for example because the
        disk is full, a run of one process logs the error and goes on, and its former checkpoints stay.

        Several processes first compare whether each of them can write to the folder, and whether the disk, which they
        share, has space for the arrays of all. If not, all log this, skip the checkpoint and go on. If a write fails
        after that, an error is raised, since no process can write again. The threads of the other processes wait at
        orbax's barriers, which the failed thread never reaches.

        Args:
          step: the step, larger than that of every other checkpoint.
          tree: the arrays.
          extra: JSON values.
          loss: the loss that `keep_best` compares; infinite if it is not known.
        """
        args = self._ocp.args
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        arrays, impls, described = {}, {}, {}
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                impls[name] = str(jax.random.key_impl(leaf))
                leaf = jax.random.key_data(leaf)
            arrays[name], described[name] = _to_save(leaf)
        run = {"settings": self._settings, "extra": extra, "impls": impls, "arrays": described}
        # Orbax does not save empty arrays; `restore` makes them from their description.
        full = {str(i): x for i, x in enumerate(arrays.values()) if x.size}
        saved = args.Composite(arrays=args.StandardSave(full), run=args.JsonSave(run))
        metrics = {"loss": loss} if self._keep_best else None
        if jax.process_count() > 1:
            self._manager.wait_until_finished()
            if self._is_writable(step, sum(x.nbytes for x in full.values())):
                self._save(step, saved, metrics)
            return
        self.settle()
        try:
            try:
                self._save(step, saved, metrics)
            except (OSError, ValueError):  # orbax may raise the error of the former write a second time
                self._save(step, saved, metrics)
        except (OSError, ValueError):  # tensorstore raises a ValueError for an error of the system
            self._log_failure(step)

    def _is_writable(self, step: int, size: int) -> bool:
        """Whether all processes can write a checkpoint of `size` bytes; otherwise the error is logged in each."""
        try:
            _processes.in_all(_check_space, self.directory, size)
        except (OSError, ValueError):
            _log.exception(f"The checkpoint of step {step} in {self.directory} was skipped by all processes.")
            return False
        return True

    def _save(self, step: int, args: Any, metrics: dict[str, float] | None) -> None:
        if not self._manager.save(step, args=args, metrics=metrics, force=True):
            raise RuntimeError(f"orbax did not save the checkpoint of step {step} in {self.directory}.")
        self.newest = step

    def settle(self) -> None:
        """Waits for the last write. If it failed, the error is logged, and the step can be saved again."""
        try:
            self._manager.wait_until_finished()
        except Exception:
            self._log_failure(self.newest)

    def _log_failure(self, step: int | None) -> None:
        _log.exception(f"The checkpoint of step {step} in {self.directory} could not be written.")
        self.newest = None

    def restore(self) -> Saved | None:
        """Returns the newest readable checkpoint, or None without checkpoints.

        Unreadable checkpoints are moved aside, with a warning.

        Raises:
          ValueError: if the directory holds another run, or no checkpoint in it can be read.
        """
        unreadable = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                # If one process cannot read a file of this checkpoint, all processes skip the checkpoint together.
                run = _processes.in_all(self._read, step, "run", self._ocp.args.JsonRestore())
                saved = _processes.in_all(self._read_arrays, step, run)
                _processes.in_all(_check_sums, saved, run["arrays"])
            except Exception as error:  # damage raises many types: from orbax, tensorstore, JSON, the checksum
                unreadable.append(step)
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                warnings.warn(
                    f"The checkpoint of step {step} in {self.directory} cannot be read and is moved aside ({reason})",
                    stacklevel=2,
                )
                continue
            break
        else:
            if unreadable:
                raise ValueError(
                    f"No checkpoint in {self.directory} can be read (steps {unreadable}); remove the directory to "
                    "start again."
                )
            return None
        if run["settings"].get("format") != FORMAT:
            raise ValueError(
                f"{self.directory} holds a checkpoint of the format {run['settings'].get('format')}, of another "
                f"version of metaopt; this one has the format {FORMAT}. Continue with the version that began the run, "
                "or remove the directory to start again."
            )
        for name in {**self._settings, **run["settings"]}:
            own, stored = self._settings.get(name), run["settings"].get(name)
            if own != stored:
                name, stored, own = _first_difference(name, stored, own)
                raise ValueError(
                    _refusal(self.directory, step, f"`{name}` is {stored} in the checkpoint and {own} in this run")
                )
        self._move_aside(unreadable)
        self.newest = saved.step
        self.is_kept = pathlib.Path(self.directory).parts[-2:] == (NONFINITE, str(saved.step))
        return saved

    def _read(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=self._ocp.args.Composite(**{item: args}))[item]

    def _read_arrays(self, step: int, run: dict[str, Any]) -> Saved:
        described = run["arrays"]
        empty = [_target(x) for x in described.values()]
        target = {str(i): x for i, x in enumerate(empty) if math.prod(x.shape)}
        full = self._read(step, "arrays", self._ocp.args.StandardRestore(target))
        arrays = {name: full.get(str(i), empty[i]) for i, name in enumerate(described)}
        return Saved(step, run["extra"], arrays, run["impls"], self.directory)

    def _move_aside(self, steps: list[int]) -> None:
        # Orbax silently skips saving a step that is not newer than every other.
        if not steps:
            return
        self._manager.close()
        _processes.in_all(_rename_unreadable, self.directory, steps)
        self._manager = self._open()


@contextlib.contextmanager
def _claimed(directory: str) -> Iterator[None]:
    """Locks a folder for this run, which also checks early that it can be written to.

    If JAX runs several processes together (`jax.distributed`), the first one locks the folder for all of them.
    """
    if jax.process_index() > 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(directory, exist_ok=True)
            stack.enter_context(_locks.exclusive(os.path.join(directory, ".lock")))
        except _locks.Locked as error:
            owner = "another run" if error.process is None else f"a run of process {error.process}"
            if error.process == os.getpid():
                owner = "another run of this process"
            raise ValueError(
                f"`checkpoint_dir` {directory} is in use by {owner}: two runs would delete each other's checkpoints. "
                "Wait until that run has ended, or use another folder for this run."
            ) from None
        yield


def _check_shared(directory: str) -> None:
    """Raises ValueError unless all processes of a run see the same folder. Orbax joins their parts in it."""
    if jax.process_count() == 1:
        return
    # A new name, since a local folder may have files of an older run.
    probe = pathlib.Path(directory, f".shared_{_processes.of_first(time.time())}")
    first = jax.process_index() == 0
    try:
        _processes.in_all(probe.touch if first else lambda: None)
        _processes.in_all(_check_is_there, probe)
    finally:
        if first:
            with contextlib.suppress(OSError):  # an error in only one process would leave the others waiting
                probe.unlink(missing_ok=True)


def _check_is_there(probe: pathlib.Path) -> None:
    if not probe.exists():
        raise ValueError(
            f"`checkpoint_dir` {probe.parent} of process {jax.process_index()} is not the folder of the first process. "
            "Give all processes of a run one folder, on a file system that their machines share."
        )


def _check_space(directory: str, size: int) -> None:
    """Raises OSError if a file cannot be written here, or if the disk has no space for `size` bytes and some more."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(_PROBE))
        file.flush()
    free = shutil.disk_usage(directory).free
    if free < size + _SLACK:
        raise OSError(errno.ENOSPC, f"The checkpoint has {size:,} bytes, and the disk has {free:,}", directory)


def _remove_damaged_losses(directory: str) -> None:
    """Removes the losses that `keep_best` cannot read, since orbax raises an error for them at every start."""
    for path in sorted(pathlib.Path(directory).glob("*/metrics/metrics")) if jax.process_index() == 0 else []:
        try:
            json.loads(path.read_text())["loss"]
        except (ValueError, LookupError, TypeError):
            warnings.warn(f"The loss in {path} cannot be read and is removed.", stacklevel=2)
            path.unlink()


def _rename_unreadable(directory: str, steps: list[int]) -> None:
    for step in steps if jax.process_index() == 0 else []:
        source = os.path.join(directory, str(step))
        target = next(name for i in range(1000) if not os.path.exists(name := f"{source}.unreadable{i or ''}"))
        os.rename(source, target)


def _to_save(leaf: jax.Array) -> tuple[Any, dict[str, Any]]:
    """The value that orbax saves for an array, and the description of the array."""
    described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _processes.is_split(leaf):
        sharding = _processes.described_sharding(leaf)
        if sharding is not None:
            return leaf, described | {"sum": _processes.checksum(leaf), "sharding": sharding}
        array = _processes.gathered(leaf)
    else:
        array = np.array(leaf)  # a copy: the array is donated to the next step, while a thread writes
    return array, described | {"crc32": checksum(array)}


def _target(described: dict[str, Any]) -> Any:
    """The template from which orbax restores an array."""
    shape, dtype = described["shape"], jnp.dtype(described["dtype"])
    sharding = _processes.sharding(described["sharding"]) if "sharding" in described else None
    if sharding is None:
        return np.empty(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _check_sums(saved: Saved, described: dict[str, Any]) -> None:
    # Compute all checksums before raising an error: every process must take part in the checksum of a split array.
    damaged = [name for name, array in saved.arrays.items() if _is_damaged(array, described[name])]
    if damaged:
        raise ValueError(f"the checksum of `{damaged[0]}` does not match")


def _is_damaged(array: Any, described: dict[str, Any]) -> bool:
    if "sum" in described:  # the array was split
        return _processes.checksum(jnp.asarray(array)) != described["sum"]
    return checksum(array) != described["crc32"]


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of the bits, for any dtype."""
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _refusal(directory: str, step: int, difference: str) -> str:
    return (
        f"{directory} holds the checkpoint (step {step}) of another run: {difference}. Use another directory for "
        "this run, or continue the other run with its arguments."
    )


def _first_difference(name: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """Returns the first entries of two nested lists or dicts that differ, with their name, such as "sizes[1]"."""
    entries: list[tuple[str, Any, Any]] = []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        entries = [(f"{name}[{key!r}]", a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        entries = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    for entry in entries:
        if entry[1] != entry[2]:
            return _first_difference(*entry)
    return name, a, b
