"""The origins of the outcomes in a store: the arrays of each task, and the source text of the objective.

`collect` reads outcomes of earlier calls. If the data of a task have changed since then, these outcomes do not belong
to the new data. So the store keeps a digest of each task's arrays and of the source text, and `check_origins` compares
these digests with those of the current call.
"""

import contextlib
import functools
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

_PLAIN = ("string", "boolean", "integer", "floating", "mixed-integer-float", "empty")  # of pandas' `infer_dtype`


def check_origins(runner: Runner, ended: Collection[str]) -> None:
    """Compares the tasks and the objective with those of the stored trials, and keeps their digests in the store.

    Args:
      runner: the collection, which has a store.
      ended: the names of the tasks that have ended trials in the store.

    Raises:
      ValueError: if the arrays or frames of a task with ended trials have changed.
    """
    known = read_origins(runner.store, runner.study)
    text = source_text([_with_source(runner.objective)])
    source = hashlib.blake2b(text.encode(), digest_size=16).hexdigest() if text else None
    digests = {f"task {name}": digest_of(task) for name, task in runner.tasks.items()}
    digests |= {f"objective of {name}": source for name in runner.tasks}
    digests = {name: digest for name, digest in digests.items() if digest is not None}
    other = {name for name, digest in digests.items() if known.get(name, digest) != digest}
    if changed := [name for name in runner.tasks if f"task {name}" in other and name in ended]:
        raise ValueError(
            f"The data of {', '.join(map(repr, changed[:5]))} have changed since the trials in {runner.store}, whose "
            f"outcomes belong to the earlier data. Use another `store`, or another `study` than {runner.study!r}."
        )
    if any(f"objective of {name}" in other for name in ended):
        _log.warning(
            "The source text of the objective has changed since the trials in %s, which do not run again. If it would "
            "return other outcomes now, use another `store`, or another `study` than %r.",
            runner.store,
            runner.study,
        )
    if new := dict(digests.items() - known.items()):
        with contextlib.suppress(OSError):  # the store may be read only, if no trial has to run
            keep_origins(runner.store, new, study=runner.study)


def _with_source(objective: Any) -> Any:
    """The function or the class whose source text defines an objective."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    return objective if inspect.isroutine(objective) else type(objective)


def digest_of(task: Any) -> str | None:
    """A digest of the arrays of a task, with their places in its pytree; None for a task without arrays.

    Frames and series of pandas count as arrays. Numbers do not count, since they may be settings such as a number of
    threads. Other objects, such as a path or a loader, do not count either.
    """
    try:
        leaves, _ = jax.tree_util.tree_flatten_with_path(task)
    except (TypeError, ValueError):  # a dict whose keys have no order
        return None
    digest, has_array = hashlib.blake2b(digest_size=16), False
    for path, leaf in leaves:
        array = _as_array(leaf)
        if array is not None:
            has_array = True
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
            digest.update(array.tobytes())
    return digest.hexdigest() if has_array else None


def _as_array(leaf: Any) -> np.ndarray | None:
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(leaf, pandas.DataFrame | pandas.Series):
        columns = [column for _, column in leaf.items()] if isinstance(leaf, pandas.DataFrame) else [leaf]
        for column in columns:
            if column.dtype == object and pandas.api.types.infer_dtype(column, skipna=True) not in _PLAIN:
                return None  # pandas hashes the texts of other objects, which may contain addresses
        return pandas.util.hash_pandas_object(leaf, index=False).to_numpy()
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted() or not leaf.is_fully_addressable:
            return None
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, np.ndarray | jax.Array):
        return None
    array = np.asarray(leaf, order="C")
    return None if array.dtype.hasobject else array


def source_text(sources: Sequence[Any]) -> str:
    """Joins texts, and the source texts of functions and classes. Those without a source are skipped."""
    texts = []
    for source in sources:
        try:
            texts.append(source if isinstance(source, str) else inspect.getsource(source))
        except (OSError, TypeError):  # no file has its source
            continue
    return "\n".join(texts)
