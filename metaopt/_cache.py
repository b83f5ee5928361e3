"""JAX's persistent compilation cache for the duration of a call."""

import contextlib
import os
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache


@contextlib.contextmanager
def compilation_cache(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keeps compiled programs in `folder`, and restores JAX's setting afterwards; None changes nothing."""
    former = jax.config.jax_compilation_cache_dir
    if folder is None or os.fspath(folder) == former:
        yield
        return
    _set(os.fspath(folder))
    try:
        yield
    finally:
        _set(former)


def _set(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax_cache.reset_cache()  # JAX reads the setting once
