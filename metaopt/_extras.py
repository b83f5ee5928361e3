"""Imports of optional dependencies, with an error that names the extra to install."""

import importlib
from collections.abc import Callable
from typing import Any


def require(module: str, extra: str, caller: str) -> Any:
    """Imports a module that an extra installs.

    Args:
      module: its dotted name.
      extra: the extra of the package `metaopt-jax`.
      caller: what needs the module, for the error message.

    Returns:
      The module.

    Raises:
      ImportError: if the module, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{caller} needs {package}: {hint(extra)} ({error}).") from error


def hint(extra: str) -> str:
    """Returns how to install an extra: from a clone, or by the package's name if a package index has the package."""
    return (
        f'install the extra "{extra}" of metaopt-jax, in a clone by `pip install -e ".[{extra}]"`, '
        f'or else by `pip install "metaopt-jax[{extra}]"`'
    )


def quietly(optuna: Any, fn: Callable[[], Any]) -> Any:
    """Calls `fn` without Optuna's log line on standard error for every new study."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return fn()
    finally:
        optuna.logging.set_verbosity(before)
