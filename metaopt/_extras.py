"""Imports of optional dependencies, with an error that names the extra to install."""

import importlib
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
        raise ImportError(
            f'{caller} needs {package}; install it with `pip install "metaopt-jax[{extra}]"` ({error}).'
        ) from error
