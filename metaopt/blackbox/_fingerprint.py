"""Fingerprints of modules and functions, from everything that can be read without running them."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np

_PLAIN = (bool, int, float, str, bytes, type(None), np.generic)
_CACHED = type(functools.lru_cache(len))
_FUNCTIONS = (FunctionType, staticmethod, classmethod, property, functools.cached_property, _CACHED)
_LIBRARIES = ("builtins", "lightning", "pytorch_lightning", "torch")  # their classes are not inspected


def fingerprint(*parts: Any) -> str:
    """Returns 16 hexadecimal digits that differ if the readable content of the parts differs.

    The following content is readable:

    - Plain values, and dicts and lists of them at any depth. Other values in them are skipped.
    - Functions: their code, and the plain values, functions and classes that they enclose or have as defaults.
    - Modules of torch: their layers as printed, and the shapes of their parameters. Then, for each of `modules()`, its
      class, its hyper-parameters, and its own attributes that are plain values, or dicts and lists of them.
    - Classes: the code of methods and properties, and the attributes that are plain values, or dicts and lists of them.
      Base classes are included, except for those of torch and Lightning.
    - Lists of parts.

    An attribute of a module is skipped if its name begins with "_" and it is a dict with integer keys, because torch
    keeps its hooks in such dicts. Memory addresses are skipped, too. If a class collects values in a list or dict while
    trials run, its fingerprint changes. A list of a million numbers takes about a second.

    Args:
      *parts: plain values, functions, classes, modules of torch, and lists of these.

    Returns:
      The digits. They are the same in every process of one version of Python, because they depend on its byte code.
    """
    told = json.dumps([_told(part, set()) for part in parts], sort_keys=True, default=repr)
    return hashlib.sha256(_without_addresses(told).encode()).hexdigest()[:16]


def _without_addresses(printed: str) -> str:
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "", printed)


def _told(part: Any, seen: set[int]) -> Any:
    if isinstance(part, Mapping):
        return _values(part)
    if isinstance(part, (list, tuple)):
        return [_told(each, seen) for each in part]
    if isinstance(part, (*_PLAIN, type, MethodType, functools.partial, *_FUNCTIONS)):
        return _code(part, seen)
    shapes = [(name, _shape(value)) for name, value in getattr(part, "named_parameters", list)()]
    modules = part.modules() if callable(getattr(part, "modules", None)) else [part]
    return [repr(part), shapes, [_module(module, seen) for module in modules]]


def _module(module: Any, seen: set[int]) -> Any:
    hparams = getattr(module, "hparams", {})
    hparams = hparams if isinstance(hparams, Mapping) else getattr(hparams, "__dict__", {})  # such as a namespace
    own = {
        name: value
        for name, value in getattr(module, "__dict__", {}).items()
        # torch numbers the hooks in its dicts by a counter of the process.
        if not (name.startswith("_") and isinstance(value, Mapping) and all(isinstance(key, int) for key in value))
    }
    return [_code(type(module), seen), _values(hparams), _values(own)]


def _values(of: Any, within: tuple[int, ...] = ()) -> Any:
    """The plain values in a list or dict. A dict becomes a list, because its keys may have any type."""
    if isinstance(of, _PLAIN):
        return of
    if id(of) in within:
        return "itself"
    within = (*within, id(of))
    if isinstance(of, Mapping):
        items = [[_without_addresses(_ordered(k)), _values(v, within)] for k, v in _items(of) if _is_plain(v)]
        return ["dict", sorted(items, key=repr)]
    return [_values(v, within) for v in of if _is_plain(v)]


def _items(of: Mapping) -> Iterator[tuple[Any, Any]]:
    for key in of:
        try:
            value = of[key]
        except Exception:  # OmegaConf raises for a required value that is missing
            value = "missing"
        yield key, value


def _is_plain(value) -> bool:
    return isinstance(value, _PLAIN) or isinstance(value, (list, tuple, Mapping))


def _shape(parameter) -> Any:
    try:
        return list(parameter.shape)
    except RuntimeError:  # a lazy parameter has no shape yet
        return None


def _code(of: Any, seen: set[int]) -> Any:
    """The content of a function, a class or their parts. Each one is described once, and then only by its name."""
    tell = lambda each: _code(each, seen)
    if isinstance(of, _PLAIN):
        return of
    if isinstance(of, CodeType):
        constants = [tell(c) if isinstance(c, CodeType) else _ordered(c) for c in of.co_consts]
        return [of.co_code.hex(), constants, list(of.co_names)]
    if isinstance(of, (staticmethod, classmethod, MethodType)):
        return tell(of.__func__)
    if isinstance(of, property):
        return [tell(of.fget), tell(of.fset)]
    if isinstance(of, functools.cached_property):
        return tell(of.func)
    if isinstance(of, _CACHED):
        return tell(of.__wrapped__)
    if isinstance(of, functools.partial):
        return [tell(of.func), [tell(value) for value in of.args], {n: tell(v) for n, v in of.keywords.items()}]
    if not isinstance(of, (FunctionType, type)) or id(of) in seen:
        return getattr(of, "__qualname__", type(of).__qualname__)  # an object may change from trial to trial
    seen.add(id(of))
    if isinstance(of, FunctionType):
        enclosed = [tell(_content(cell)) for cell in of.__closure__ or ()]
        defaults = [tell(value) for value in (*(of.__defaults__ or ()), *(of.__kwdefaults__ or {}).values())]
        return [of.__qualname__, tell(of.__code__), enclosed, defaults]
    classes = [each for each in of.__mro__ if each.__module__.partition(".")[0] not in _LIBRARIES]
    told = lambda value: _values(value) if _is_plain(value) else tell(value)
    return [[each.__qualname__, {name: told(value) for name, value in _members(each)}] for each in classes]


def _members(of: type) -> list[tuple[str, Any]]:
    """The functions and plain values of a class, without those that Python adds, such as `__firstlineno__`."""
    return [
        (name, value)
        for name, value in sorted(vars(of).items())
        if isinstance(value, _FUNCTIONS) or _is_plain(value) and not name.startswith("__")
    ]


def _content(cell) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _ordered(constant) -> str:
    """The printed form of a constant. A set is sorted, because its order differs between processes."""
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
