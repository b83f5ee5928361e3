"""The settings of a search as JSON values, by which checkpoints are recognized."""

import dataclasses
import functools
import inspect
import math
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from metaopt._jaxpr import Tracer
from metaopt.nas import _specs

P = ParamSpec("P")
S = TypeVar("S")


def plain(value: Any, depth: int = 12) -> Any:
    """Converts a value to JSON types.

    A function becomes its name, the values in its closure and the defaults of its arguments. A method becomes its
    function and its object, and a dataclass its name and its fields. An array of more than 100 entries becomes its
    shape and a checksum. Values of other types, and values that are nested more than `depth` levels deep, become the
    name of their type. So the result has the arguments of a factory, such as 2.0 in `nas.softmax(2.0)`. It does not
    have the constants in a function's body.
    """
    if isinstance(value, np.generic | np.ndarray | jax.Array) and not isinstance(value, Tracer):
        if isinstance(value, jax.Array) and (value.is_deleted() or not value.is_fully_addressable):
            value = f"{value.shape}, {value.dtype}"  # the entries cannot be read here
        elif jnp.issubdtype(value.dtype, np.number) or value.dtype == bool:
            array = np.asarray(value)
            value = array.tolist() if array.size <= 100 else f"{array.shape}, checksum {zlib.crc32(array.tobytes())}"
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if not depth:
        return type(value).__name__
    inside = lambda x: plain(x, depth - 1)
    if isinstance(value, Mapping):
        return {str(inside(name)): inside(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [inside(x) for x in value]
    if inspect.ismethod(value):  # before jitted functions: a method has the attributes of its function
        return inside([value.__func__, value.__self__])
    if callable(value) and hasattr(value, "__wrapped__"):  # jitted
        return inside(inspect.unwrap(value))
    if isinstance(value, functools.partial):
        return inside([value.func, value.args, value.keywords])
    if inspect.isfunction(value):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        enclosed = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}  # skips unassigned
        defaults = {f"default {i}": x for i, x in enumerate(value.__defaults__ or ())} | (value.__kwdefaults__ or {})
        return {f"{value.__module__}.{value.__qualname__}": inside(enclosed | defaults)}
    if dataclasses.is_dataclass(value) and not inspect.isclass(value):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]  # skips unassigned
        return {type(value).__name__: inside({name: getattr(value, name) for name in fields})}
    return type(value).__name__


def of_network(network: _specs.Space) -> dict[str, Any]:
    """Converts a spec to JSON types."""
    return _specs.network_to_dict(network)


def with_settings(method: Callable[P, S]) -> Callable[P, S]:
    """Wraps a method: its result's `settings` then have the method's name, the network and all arguments except `ops`.

    If methods call one another, `settings` has the name of the outermost one. An argument of an inner method, given or
    default, overrides the argument of the same name of the outer one. So passing a default explicitly changes nothing.
    Settings that a method has already put into its result override its arguments.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def method_with_settings(*args: P.args, **kwargs: P.kwargs) -> S:
        result: Any = method(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {name: x for name, x in bound.arguments.items() if name not in ("network", "ops", "options")}
        settings = {"method": "", **{name: plain(x) for name, x in arguments.items()}, **result.settings}
        network = settings.pop("network", None) or of_network(bound.arguments["network"])
        # The error about a checkpoint names the first setting that differs, so the whole network comes last.
        return result._replace(settings={**settings, "method": method.__name__, "network": network})

    return method_with_settings
