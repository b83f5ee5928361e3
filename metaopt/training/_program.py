"""Descriptions of compiled programs that two processes can compare.

A description of a program is plain data (JSON). Its digest is a hash of the traced program. Every operation is hashed
with its parameters and the hashes of its operands, from the inputs to the outputs. The digest therefore does not depend
on the names of variables and functions, on source lines or on memory addresses. It does not depend on the order in
which independent operations were traced either. Constants are hashed by their content.

The other entries count numbers, constants, loops and operations, so that `differences` can name the changes.
"""

import dataclasses
import enum
import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _jaxpr
from metaopt._jaxpr import Jaxpr, Literal, Tracer

# Parameters that do not change a result. The placement of an array is one of them: a restored state is on one device.
_NAMES = ("name", "debug_info", "sharding", "out_sharding", "in_shardings", "out_shardings", "dst_sharding")
_KINDS = {"loops": "a loop of", "numbers": "the number", "constants": "the constant", "operations": "the operation"}
_MAX_LISTED = 3  # the number of differences of one kind that a message lists


def environment() -> dict[str, Any]:
    """The facts that decide how JAX traces a program. Descriptions from different environments cannot be compared."""
    return {"version of JAX": jax.__version__, "platform": jax.default_backend(), "devices": jax.device_count()}


def describe(closed: Any) -> dict[str, Any]:
    """Describes a traced program.

    Python functions inside it (callbacks to the host, derivative rules that are not used) are not compared.

    Args:
      closed: a `ClosedJaxpr`, such as `jax.jit(function).trace(*args).jaxpr`.

    Returns:
      A mapping of JSON values with the keys "digest", "numbers", "constants", "loops" and "operations". The last four
      map a text to its number of occurrences.
    """
    hasher = _Hasher()
    digest = hasher.program(closed)
    equations = list(_jaxpr.equations(closed.jaxpr))
    operands = [v for equation in equations for v in equation.invars]
    literals: list[Any] = [v for v in operands if isinstance(v, Literal) and _is_number(v.aval)]
    return {
        "digest": digest,
        "numbers": Counter(hasher.numbers) + Counter(_number(v.val, v.aval.dtype) for v in literals),
        "constants": Counter(hasher.constants),
        "loops": Counter(f"{e.params['length']} steps" for e in equations if e.primitive.name == "scan"),
        "operations": Counter(f"{e.primitive.name} {_result(e)}" for e in equations),
    }


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Names the differences between two descriptions of programs; "" if their digests are equal."""
    if stored["digest"] == current["digest"]:
        return ""
    only_stored, only_current = [], []
    for kind, noun in _KINDS.items():
        before, after = Counter(stored[kind]), Counter(current[kind])
        only_stored += _listed(noun, before - after)
        only_current += _listed(noun, after - before)
    if not only_stored and not only_current:
        return "the same operations have other operands or other settings"
    parts = [("only the checkpoint has", only_stored), ("only this run has", only_current)]
    return "; ".join(f"{owner} {', '.join(entries)}" for owner, entries in parts if entries)


def _listed(noun: str, surplus: Counter) -> list[str]:
    texts = [f"{noun} {text}" + (f" ({num} times)" if num > 1 else "") for text, num in surplus.items()]
    left = len(texts) - _MAX_LISTED
    return texts if left <= 0 else [*texts[:_MAX_LISTED], f"{left} more like that"]


class _Hasher:
    """Hashes jaxprs and arrays, each one once, and keeps the texts of numbers and constants."""

    def __init__(self):
        self.digests: dict[int, str] = {}  # by the id of a jaxpr or an array
        self.kept: list[Any] = []  # an id is unique only as long as its object lives
        self.numbers: list[str] = []
        self.constants: set[str] = set()

    def program(self, jaxpr: Any) -> str:
        """The digest of a jaxpr, which may be open or closed."""
        if id(jaxpr) not in self.digests:
            self.kept.append(jaxpr)
            self.digests[id(jaxpr)] = self._program(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", None))
        return self.digests[id(jaxpr)]

    def _program(self, jaxpr: Any, consts: Any) -> str:
        values = {v: f"input {i} {_type(v.aval)}" for i, v in enumerate(jaxpr.invars)}
        for i, v in enumerate(jaxpr.constvars):
            values[v] = f"constant {i} {_type(v.aval)}" if consts is None else self.array(consts[i], v.aval)
            if consts is not None and _is_number(v.aval):
                self.numbers.append(values[v])

        def read(v):
            return self.array(v.val, v.aval) if isinstance(v, Literal) else values[v]

        effects = []
        for equation in jaxpr.eqns:
            params = [(k, self.parameter(x)) for k, x in sorted(equation.params.items()) if k not in _NAMES]
            operation = _hash(equation.primitive.name, params, [read(v) for v in equation.invars])
            values.update((v, f"{operation} {i} {_type(v.aval)}") for i, v in enumerate(equation.outvars))
            if equation.effects:
                effects.append(operation)
        return _hash([read(v) for v in jaxpr.outvars], effects)

    def array(self, x: Any, aval: Any) -> str:
        if _is_number(aval):
            return _number(x, aval.dtype)
        if id(x) not in self.digests:
            self.kept.append(x)
            self.digests[id(x)] = _array(x)
            self.constants.add(self.digests[id(x)])
        return self.digests[id(x)]

    def parameter(self, x: Any) -> Any:
        """The part of a parameter that is the same in every process: its value, or at least its type."""
        if x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
            return repr(x)
        if isinstance(getattr(x, "jaxpr", x), Jaxpr):
            return self.program(x)
        if isinstance(x, enum.Enum):
            return f"{type(x).__name__}.{x.name}"
        if isinstance(x, (np.ndarray, np.generic, jax.Array)):
            return self.array(x, x)
        if isinstance(x, (tuple, list)):
            return [self.parameter(part) for part in x]
        if isinstance(x, Mapping):
            return sorted((repr(key), self.parameter(value)) for key, value in x.items())
        if isinstance(x, (set, frozenset)):
            return sorted(repr(self.parameter(part)) for part in x)
        if isinstance(x, (np.dtype, type)):
            return jnp.dtype(x).name if isinstance(x, np.dtype) else x.__name__
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return _type(x)
        if dataclasses.is_dataclass(x):
            return [self.parameter(getattr(x, field.name)) for field in dataclasses.fields(x)]
        return type(x).__name__


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _type(aval: Any) -> str:
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return type(aval).__name__
    return f"{aval.dtype}{list(aval.shape)}"


def _result(equation: Any) -> str:
    return ", ".join(_type(v.aval) for v in equation.outvars[:1])


def _is_number(aval: Any) -> bool:
    return getattr(aval, "shape", None) == () and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _number(x: Any, dtype: Any) -> str:
    return f"{dtype} traced" if isinstance(x, Tracer) else f"{np.asarray(x, dtype)} ({dtype})"


def _array(x: Any) -> str:
    """The type of an array, with a hash of its content if this process has all of it."""
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return _type(x)
    data = np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    return f"{_type(x)} {hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()[:12]}"
