"""Checkpoints of a run: orbax writes the arrays, next to a file that identifies the run. Each appears as a whole.

A checkpoint is a directory named after its step. It holds the arrays in a flat dictionary by their path in the tree,
each with a checksum, and a JSON file. Nothing is pickled. PRNG keys are saved as their data.
"""

import contextlib
import os
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _locks, base

FORMAT = 1


class Saved(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      step: the step of the checkpoint.
      extra: the plain values saved with it.
      arrays: path in the saved tree -> array, keys as their data.
      impls: path -> the name of the PRNG implementation, for keys.
      directory: the directory that it was read from.
    """

    step: int
    extra: dict[str, Any]
    arrays: dict[str, np.ndarray]
    impls: dict[str, str]
    directory: str

    def tree(self, like: base.PyTree) -> base.PyTree:
        """Returns the saved arrays in the structure of `like`, as numpy arrays if `like` has them, else as JAX arrays.

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
            if not isinstance(leaf, np.ndarray):
                array = jnp.asarray(array)
            if name in self.impls:
                array = jax.random.wrap_key_data(jnp.asarray(array), impl=self.impls[name])
            if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                own, stored = (f"{x.dtype}{list(x.shape)}" for x in (leaf, array))
                raise ValueError(self.refusal(f"`{name}` is {stored} in the checkpoint and {own} in this run"))
            restored.append(array)
        return jax.tree.unflatten(treedef, restored)

    def refusal(self, difference: str) -> str:
        """The error message for a difference between this run and the checkpoint's."""
        return _refusal(self.directory, self.step, difference)


class Checkpoints:
    """The newest two checkpoints of one run, in one folder, which is locked until `close`.

    Args:
      directory: the folder; made if it does not exist. Each run needs its own.
      settings: plain values on which the run depends. A checkpoint with other settings is rejected.

    Attributes:
      directory: the folder, as an absolute path.
      newest: the step of the newest checkpoint, after `restore` or `save`; None before.

    Raises:
      ValueError: if `directory` is in use by another run.
      OSError: if `directory` is a file, or cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: dict[str, Any]):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = os.path.abspath(directory)
        self._settings = {"format": FORMAT, **settings}
        self.newest: int | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(_claimed(self.directory))
            self._manager = self._open()
            stack.callback(lambda: self._manager.close())
            self._stack = stack.pop_all()

    def _open(self):
        options = self._ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        return self._ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def save(self, step: int, tree: base.PyTree, extra: dict[str, Any]) -> None:
        """Writes a checkpoint. It is on disk on return. An interrupted write leaves the former checkpoint intact."""
        args = self._ocp.args
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        arrays, impls = {}, {}
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                impls[name] = str(jax.random.key_impl(leaf))
                leaf = jax.random.key_data(leaf)
            arrays[name] = np.asarray(leaf)
        described = {
            name: {"shape": list(x.shape), "dtype": str(x.dtype), "crc32": checksum(x)} for name, x in arrays.items()
        }
        run = {"settings": self._settings, "extra": extra, "impls": impls, "arrays": described}
        # Orbax does not save empty arrays; `restore` makes them from their description.
        full = {str(i): x for i, x in enumerate(arrays.values()) if x.size}
        saved = args.Composite(arrays=args.StandardSave(full), run=args.JsonSave(run))
        if not self._manager.save(step, args=saved, force=True):
            raise RuntimeError(f"orbax did not save the checkpoint of step {step} in {self.directory}.")
        self.newest = step

    def restore(self) -> Saved | None:
        """Returns the newest readable checkpoint, or None without checkpoints.

        Unreadable checkpoints are moved aside, with a warning.

        Raises:
          ValueError: if the directory holds another run, or no checkpoint in it can be read.
        """
        unreadable = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                run = self._read(step, "run", self._ocp.args.JsonRestore())
                saved = self._read_arrays(step, run)
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
                raise ValueError(
                    _refusal(self.directory, step, f"`{name}` is {stored} in the checkpoint and {own} in this run")
                )
        self._move_aside(unreadable)
        self.newest = saved.step
        return saved

    def _read(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=self._ocp.args.Composite(**{item: args}))[item]

    def _read_arrays(self, step: int, run: dict[str, Any]) -> Saved:
        described = run["arrays"]
        empty = [np.empty(x["shape"], jnp.dtype(x["dtype"])) for x in described.values()]
        target = {str(i): x for i, x in enumerate(empty) if x.size}
        full = self._read(step, "arrays", self._ocp.args.StandardRestore(target))
        arrays = {name: full.get(str(i), empty[i]) for i, name in enumerate(described)}
        for name, array in arrays.items():
            if checksum(array) != described[name]["crc32"]:
                raise ValueError(f"the checksum of `{name}` does not match")
        return Saved(step, run["extra"], arrays, run["impls"], self.directory)

    def _move_aside(self, steps: list[int]) -> None:
        # Orbax silently skips saving a step that is not newer than every other.
        if not steps:
            return
        self._manager.close()
        for step in steps:
            source = os.path.join(self.directory, str(step))
            target = next(name for i in range(1000) if not os.path.exists(name := f"{source}.unreadable{i or ''}"))
            os.rename(source, target)
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


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of the bits, for any dtype."""
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _refusal(directory: str, step: int, difference: str) -> str:
    return (
        f"{directory} holds the checkpoint (step {step}) of another run: {difference}. Give this run a directory of "
        "its own, or continue the other with the arguments that it had."
    )
