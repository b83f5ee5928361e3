"""Reads the containers, texts and numbers of a pickle. Nothing in the pickle is imported, called or executed.

A pickle is a program for a stack machine. This module is such a machine with few instructions: those of protocols 2 to
5 that build plain values, NumPy's scalars, and PyTorch's tensors, which become None. It rejects every other instruction
and name.

Four rules keep time and memory proportional to the length of the data. The memo is a dict, so a large index takes no
memory. A text must end within the data. An integer has at most 16 bytes. Keys of dicts are plain values, because the
hash of nested tuples can take exponential time.
"""

import re
import struct
from typing import Any, NamedTuple

import numpy as np

_MAX_INTEGER = 16  # bytes
_MAX_LINE = 200  # bytes of a name

_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_NUMBERS = {ord(code): struct.Struct(form) for code, form in {"K": "<B", "M": "<H", "J": "<i", "G": ">d"}.items()}
_ONE, _FOUR, _EIGHT = (struct.Struct(form) for form in ("<B", "<I", "<Q"))
_TEXTS = {ord("X"): _FOUR, 0x8C: _ONE, 0x8D: _EIGHT, ord("U"): _ONE, ord("T"): _FOUR}
_BYTES = {ord("B"): _FOUR, ord("C"): _ONE, 0x8E: _EIGHT}
_INTEGERS = {0x8A: _ONE, 0x8B: _FOUR}
_PUT = {ord("q"): _ONE, ord("r"): _FOUR}
_GET = {ord("h"): _ONE, ord("j"): _FOUR}
_TUPLES = {ord(")"): 0, 0x85: 1, 0x86: 2, 0x87: 3}
_EMPTY = {ord("]"): list, ord("}"): dict, 0x8F: set}


class _Name(NamedTuple):
    """A class or function that the file names. It is not looked up."""

    module: str
    name: str


class _Type:
    """A NumPy type, as the file describes it."""

    def __init__(self, code: Any):
        self.code, self.order = code, "="


def read_pickle(data: bytes, start: int = 0) -> tuple[Any, int]:
    """Reads the value of a pickle.

    Args:
      data: bytes that contain the pickle.
      start: position where the pickle starts.

    Returns:
      The value, and the position where the pickle ends. An `OrderedDict` becomes a dict, a tensor becomes None.

    Raises:
      ValueError: if an instruction, or the name of a class or function, is not supported.
      Exception: IndexError, KeyError, TypeError, AttributeError or struct.error, if the data are damaged.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # stacks below a mark
    memo: dict[int, Any] = {}
    position = start
    while True:
        code, position = data[position], position + 1
        if code in _NUMBERS:
            (value,) = _NUMBERS[code].unpack_from(data, position)
            stack.append(value)
            position += _NUMBERS[code].size
        elif code in _TEXTS:
            text, position = _sized(data, position, _TEXTS[code])
            stack.append(text.decode("utf-8", "surrogatepass"))
        elif code in _GET:
            stack.append(memo[_GET[code].unpack_from(data, position)[0]])
            position += _GET[code].size
        elif code in _PUT:
            memo[_PUT[code].unpack_from(data, position)[0]] = stack[-1]
            position += _PUT[code].size
        elif code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code == ord("("):
            outer.append(stack)
            stack = []
        elif code in _AFTER_MARK:
            items, stack = stack, outer.pop()
            _AFTER_MARK[code](stack, items)
        elif code in _TUPLES:
            first = len(stack) - _TUPLES[code]
            if first < 0:
                raise ValueError("The stack is empty.")
            stack[first:] = [tuple(stack[first:])]
        elif code in _ONE_ITEM:
            value = stack.pop()
            _ONE_ITEM[code](stack, value)
        elif code in _BYTES:
            value, position = _sized(data, position, _BYTES[code])
            stack.append(value)
        elif code in _INTEGERS:
            value, position = _sized(data, position, _INTEGERS[code], _MAX_INTEGER)
            stack.append(int.from_bytes(value, "little", signed=True))
        elif code == ord("c"):  # GLOBAL
            module, position = _line(data, position)
            name, position = _line(data, position)
            stack.append(_allowed_name(module, name))
        elif code == ord("."):
            return stack.pop(), position
        elif code == 0x80:  # PROTO
            position += 1
        elif code == 0x95:  # FRAME, whose length is not needed
            position += 8
        else:
            raise ValueError(f"The instruction {code:#04x} at byte {position - 1} is not supported.")


def _sized(data: bytes, position: int, length: struct.Struct, most: int | None = None) -> tuple[bytes, int]:
    """Reads a length and that many bytes; returns the bytes and the position after them."""
    (size,) = length.unpack_from(data, position)
    start = position + length.size
    if size > (len(data) - start if most is None else most) or start + size > len(data):
        raise ValueError(
            f"The length {size} of the value at byte {start} is larger than allowed or than the rest of the data."
        )
    return data[start : start + size], start + size


def _line(data: bytes, position: int) -> tuple[str, int]:
    end = data.index(b"\n", position, position + _MAX_LINE)
    return data[position:end].decode(), end + 1


def _extend(stack, items):
    _container(stack, list).extend(items)


def _update(stack, items):
    _container(stack, dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))


def _add(stack, items):
    _container(stack, set).update(map(_key, items))


def _set_item(stack, value):
    key = _key(stack.pop())
    _container(stack, dict)[key] = value


def _container(stack, kind):
    if not isinstance(stack[-1], kind):
        raise ValueError(f"A {kind.__name__} should be on the stack; there is a {type(stack[-1]).__name__}.")
    return stack[-1]


def _key(value):
    parts = value if isinstance(value, tuple) else (value,)
    if not all(part is None or isinstance(part, str | bytes | int | float) for part in parts):
        raise ValueError(f"A key must be a string or a number, or a tuple of them; got a {type(value).__name__}.")
    return value


def _stack_name(stack, name):
    stack.append(_allowed_name(stack.pop(), name))


def _call(stack, args):
    """Pushes the result of a call in the file; a tensor becomes None."""
    name = stack.pop()
    if not isinstance(name, _Name) or not isinstance(args, tuple):
        raise ValueError("The file calls a value that is not a class or a function.")
    stack.append(_CALLS.get(name, lambda *args: None)(*args))


def _set_state(stack, state):
    """Sets the attributes of an object: only the byte order of a type is used."""
    if isinstance(stack[-1], _Type):
        stack[-1].order = state[1]


def _allowed_name(module, name):
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("The name of a class or function in the file is not a string.")
    full_name = _Name(module, name)
    if full_name not in _CALLS and full_name not in _TENSORS and not (module == "torch" and name.endswith("Storage")):
        raise ValueError(f"The file names {module}.{name}, which is not a supported class or function.")
    return full_name


def _scalar(dtype, data=b""):
    is_number = (
        isinstance(dtype, _Type)
        and re.fullmatch("[biuf][1248]", str(dtype.code))
        and dtype.order in ("<", ">", "|", "=")
    )
    if not is_number:
        raise ValueError("The file has a number whose type is not one of NumPy's integers and floats.")
    return np.frombuffer(data, dtype.order + dtype.code)[0].item()


_AFTER_MARK = {
    ord("e"): _extend,
    ord("u"): _update,
    0x90: _add,
    ord("t"): lambda stack, items: stack.append(tuple(items)),
}
_ONE_ITEM = {
    ord("a"): lambda stack, value: _container(stack, list).append(value),
    ord("s"): _set_item,
    0x93: _stack_name,
    ord("R"): _call,
    0x81: _call,  # NEWOBJ
    ord("b"): _set_state,
    ord("Q"): lambda stack, _: stack.append(None),  # a storage of PyTorch
}
_CALLS = {
    _Name("collections", "OrderedDict"): lambda pairs=(): {_key(key): value for key, value in pairs},
    _Name("builtins", "set"): lambda items=(): {_key(item) for item in items},
    _Name("__builtin__", "set"): lambda items=(): {_key(item) for item in items},
    _Name("numpy", "dtype"): lambda code, *_: _Type(code),
    _Name("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how protocol 2 writes bytes
    _Name("numpy.core.multiarray", "scalar"): _scalar,
    _Name("numpy._core.multiarray", "scalar"): _scalar,
}
_TENSORS = {_Name("torch._utils", f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "parameter")}
