"""What the outcomes in a store come from: the numbers of each task, and the source text of the objective.

`collect` reads outcomes of earlier calls. If the data of a task have changed since, they are outcomes of other data. So
the store keeps a digest of each task's numbers and of the source text, and `check_origins` compares them.
"""

import contextlib
import hashlib
import inspect
import logging
import sys
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox._records import keep_origins, read_origins
from metaopt.blackbox._workers import Runner

_log = logging.getLogger(__name__)

_SOURCE = "objective"


def check_origins(runner: Runner, ended: Collection[str]) -> None:
    """Compares the tasks and the objective with those of the stored trials, and keeps their digests in the store.

    Args:
      runner: the collection, which has a store.
      ended: the names of the tasks that have ended trials in the store.

    Raises:
      ValueError: if the arrays, frames or numbers of a task with ended trials have changed.
    """
    digests = {f"task {name}": digest_of(task) for name, task in runner.tasks.items()}
    text = source_text([runner.objective])
    digests[_SOURCE] = _digest([text.encode()]) if text else None
    known = read_origins(runner.store, runner.study)
    other = {name for name, digest in digests.items() if digest is not None and known.get(name, digest) != digest}
    if changed := [name for name in runner.tasks if f"task {name}" in other and name in ended]:
        raise ValueError(
            f"The data of {', '.join(map(repr, changed[:5]))} have changed since the trials in {runner.store}, whose "
            f"outcomes belong to the earlier data. Use another `store`, or another `study` than {runner.study!r}."
        )
    if _SOURCE in other and ended:
        _log.warning(
            "The source text of the objective has changed since the trials in %s, which do not run again. If it would "
            "return other outcomes now, use another `store`, or another `study` than %r.",
            runner.store,
            runner.study,
        )
    if new := {name: digest for name, digest in digests.items() if digest is not None and known.get(name) != digest}:
        with contextlib.suppress(OSError):  # the store may be read only, if no trial has to run
            keep_origins(runner.store, new, study=runner.study)


def digest_of(task: Any) -> str | None:
    """A digest of the arrays and numbers of a task, with their places in its pytree; None if it has none of them.

    Frames and series of pandas count as arrays. Other objects, such as a path or a loader, do not count.
    """
    try:
        leaves, _ = jax.tree_util.tree_flatten_with_path(task)
    except (TypeError, ValueError):  # a dict whose keys have no order
        return None
    parts = []
    for path, leaf in leaves:
        array = _as_array(leaf)
        if array is not None:
            parts += [f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode(), array.tobytes()]
    return _digest(parts) if parts else None


def _as_array(leaf: Any) -> np.ndarray | None:
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(leaf, pandas.DataFrame | pandas.Series):
        try:
            return pandas.util.hash_pandas_object(leaf, index=False).to_numpy()
        except TypeError:  # values that have no hash, such as lists
            return None
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array | bool | int | float | complex):
        return None
    array = np.ascontiguousarray(leaf)
    return None if array.dtype.hasobject else array


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{len(part)} ".encode() + part)
    return digest.hexdigest()


def source_text(sources: Sequence[Any]) -> str:
    """Joins texts, and the source texts of functions and classes. Those without a source are skipped."""
    texts = []
    for source in sources:
        try:
            texts.append(source if isinstance(source, str) else inspect.getsource(source))
        except (OSError, TypeError):  # no file has its source
            continue
    return "\n".join(texts)
