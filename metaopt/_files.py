"""Reads and writes arrays, JSON and compressed data. Files may come from anyone: checks come before large allocations.

A reader opens its file inside `reading`, which turns the exceptions of a damaged file into one `ValueError` with the
path. Nothing is unpickled or executed. A write either replaces the whole file or leaves the old one.
"""

import bz2
import contextlib
import gzip
import json
import math
import os
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

# Compressed data may unpack to this many bytes, plus this many for each byte on disk. None of the published tables that
# metaopt reads unpacks to more than 30 bytes for each byte.
_UNPACKED_BASE = 2**24
_UNPACKED_PER_BYTE = 100
_CHUNK = 2**20

_MAX_HEADER = 10_000  # bytes of the header of an array
_MAX_MESSAGE = 1_000  # characters of a message that may come from the file
_HEADER = re.compile(
    rb"\{'descr': ?'([<>|=]?[biufcSU]\d{1,9})', ?'fortran_order': ?(?:True|False), ?"
    rb"'shape': ?\(((?:\d{1,18},? ?)*)\),? ?\}\s*"
)

_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError, NotImplementedError
    SyntaxError,  # raised by Pillow
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], fault: str) -> Iterator[None]:
    """Turns the exceptions that a damaged file causes into a `ValueError` that names the file.

    Args:
      path: the path of the file.
      fault: the predicate of the message, such as "is not a file that `metaopt.save` wrote".

    Raises:
      ValueError: "{path} {fault}: {reason}".
      OSError: if the operating system cannot open or read the file. Such an error has a `filename` and passes
        unchanged. (Errors of damaged compressed data may also be an `OSError`, but without a `filename`. They become a
        ValueError.) A ValueError or an OSError whose message begins with the path passes unchanged, too.
    """
    name = os.fspath(path)
    try:
        with np.errstate(all="ignore"):  # readers check the results of their arithmetic
            yield
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, ValueError | OSError) and (
            str(error).startswith(name) or getattr(error, "filename", None) is not None
        ):
            if isinstance(error, ValueError) and len(str(error)) > _MAX_MESSAGE:
                raise ValueError(f"{str(error)[:_MAX_MESSAGE]} ...") from error
            raise
        reason = str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
        reason = f"it lacks {error}" if isinstance(error, KeyError) else reason
        reason = reason if len(reason) < _MAX_MESSAGE else f"{reason[:_MAX_MESSAGE]} ..."
        raise ValueError(f"{name} {fault}: {reason.rstrip('.')}.") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a new file. When the body ends, it replaces the file at `path`; after an error, the old file is unchanged.

    Args:
      path: the path of the file.
    """
    # Another process or thread may write to the same path.
    temporary = f"{os.fspath(path)}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Any], *, compress: bool = False) -> None:
    """Writes arrays as one `.npz` file, atomically. The path is used unchanged.

    Args:
      path: the path of the file.
      arrays: arrays by name. JSON is written as its bytes, uint8.
      compress: whether the arrays are compressed.
    """
    with replacing(path) as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text, whose numbers must all be finite.

    Args:
      text: a string, or bytes in UTF-8.

    Raises:
      ValueError: if it is not JSON, or has NaN, an infinity, or a number beyond the range of float64.
      RecursionError: if it is nested too deeply.
    """

    def finite(number):
        if not math.isfinite(value := float(number)):
            raise ValueError(f"The JSON has the number {number[:50]}, which is not finite.")
        return value

    return json.loads(text if isinstance(text, str) else text.decode(), parse_float=finite, parse_constant=finite)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns the value of a JSON file, as `parse_json` reads it."""
    return parse_json(Path(path).read_bytes())


def read_compressed(path: str | os.PathLike[str]) -> bytes:
    """Returns the bytes of a file, unpacked if its name ends in .gz, .bz2 or .pbz2.

    Args:
      path: the path of the file.

    Raises:
      ValueError: if it unpacks to far more bytes than real data do.
      OSError, EOFError, zlib.error: if it is damaged.
    """
    end = Path(path).suffix.lower()
    if end not in (".gz", ".bz2", ".pbz2"):
        return Path(path).read_bytes()
    limit = unpacked_limit(os.path.getsize(path))
    parts, size = [], 0
    with (gzip.open if end == ".gz" else bz2.open)(path, "rb") as file:
        while part := file.read(_CHUNK):
            size += len(part)
            if size > limit:
                raise ValueError(
                    f"{os.fspath(path)} unpacks to more than {limit} bytes, so it is probably damaged or malicious."
                )
            parts.append(part)
    return b"".join(parts)


def unpacked_limit(packed: int) -> int:
    """Returns the number of bytes to which a file of `packed` bytes may unpack."""
    return _UNPACKED_BASE + _UNPACKED_PER_BYTE * packed


class Spec(NamedTuple):
    """Shape and type of an array, from its header."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Npz:
    """The arrays of an open `.npz` file.

    Names, types and shapes are read when the file is opened. Each array is read only when it is requested.

    Attributes:
      specs: type and shape by name. The shape agrees with the number of bytes, and the total number of bytes is within
        limits.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._archive = archive
        self.specs: dict[str, Spec] = {}
        total = 0
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or name in self.specs:
                raise ValueError(f"its member {info.filename!r} is not an array, or occurs twice")
            spec = self.specs[name] = self._spec(info)
            # Axes of length 0 count as 1: a list of 1e9 empty rows is large, too.
            total += math.prod(max(n, 1) for n in spec.shape) * max(spec.dtype.itemsize, 1)
        if total > unpacked_limit(size):
            raise ValueError(f"its arrays would take {total} bytes in memory, and the file has only {size}")

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.specs:
            raise ValueError(f"it has no array {name!r}; it has {', '.join(self.specs)}")
        with self._archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)  # JAX has no other byte order
        if array.dtype.kind == "U":
            codes = np.frombuffer(array.tobytes(), np.uint32)
            if ((codes > 0x10FFFF) | (codes >> 11 == 0xD800 >> 11)).any():
                raise ValueError(f"the array {name} has texts that are not Unicode")
        return array

    def header(self) -> dict[str, Any]:
        """Returns the JSON object in the array "header", and removes that array from `specs`."""
        header = parse_json(self["header"].tobytes())
        if not isinstance(header, dict):
            raise ValueError(f"its header is not a JSON object, but a {type(header).__name__}")
        del self.specs["header"]
        return header

    def floats(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        missing: Callable[[str], bool] = lambda name: False,
        others: Mapping[str, np.dtype] = {},
        infinite: bool = False,
    ) -> dict[str, np.ndarray]:
        """Returns all arrays, which must have these names and shapes, be floating-point, and be finite in float32.

        Args:
          shapes: the expected shapes by name.
          missing: `(name) -> bool`, whether an array may have NaN, as the mark of a missing value.
          others: the types of the arrays that are not floating-point, such as int32.
          infinite: whether infinities are allowed.

        Raises:
          ValueError: if an array is missing, not expected, of another shape or type, or not finite.
        """
        if unexpected := sorted(self.specs.keys() - shapes.keys()):
            raise ValueError(f"it has unexpected arrays: {', '.join(unexpected)}")
        for name, shape in shapes.items():
            spec = self.specs.get(name)
            dtype_fits = spec is not None and (spec.dtype == others[name] if name in others else is_real_float(spec))
            if spec is None or spec.shape != shape or not dtype_fits:
                actual = "it is missing" if spec is None else f"it is {spec.dtype} of shape {spec.shape}"
                expected = others.get(name, "floating-point")
                raise ValueError(f"the array {name} should be {expected} of shape {shape}, but {actual}")
        arrays = {name: self[name] for name in shapes}
        for name, array in arrays.items():
            if array.dtype.kind in "fc":
                check_finite(name, array, missing=missing(name), infinite=infinite)
        return arrays

    def _spec(self, info: zipfile.ZipInfo) -> Spec:
        with self._archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
            header = stream.read(min(length, _MAX_HEADER))
            match = _HEADER.fullmatch(header)
            if match is None:
                raise ValueError(f"the array {info.filename} is not of numbers or texts: {header[:100]!r}")
            shape = tuple(int(n) for n in match[2].replace(b",", b" ").split())
            spec = Spec(shape, np.dtype(match[1].decode()))
            if stream.tell() + math.prod(shape) * spec.dtype.itemsize != info.file_size:
                raise ValueError(f"the array {info.filename} has {info.file_size} bytes, which do not fit {spec}")
        return spec


@contextlib.contextmanager
def open_npz(file: str | os.PathLike[str] | IO[bytes]) -> Iterator[Npz]:
    """Opens an `.npz` file and reads the names, types and shapes of its arrays. Nothing in it is unpickled.

    Args:
      file: its path, or the open file.
    """
    with contextlib.ExitStack() as stack:
        stream: Any = file if hasattr(file, "read") else stack.enter_context(open(file, "rb"))  # type: ignore[arg-type]
        size = stream.seek(0, os.SEEK_END)
        yield Npz(stack.enter_context(zipfile.ZipFile(stream)), size)


def is_real_float(spec: Any) -> bool:
    """Whether an array has a floating-point type that JAX supports, too."""
    return spec.dtype.kind == "f" and spec.dtype.itemsize <= 8


def check_finite(name: str, array: np.ndarray, *, missing: bool = False, infinite: bool = False) -> None:
    """Raises a ValueError if an array has entries that are not finite in float32.

    Args:
      name: the name of the array.
      array: an array of numbers.
      missing: whether NaN is allowed, as the mark of a missing value.
      infinite: whether infinities are allowed.
    """
    if np.iscomplexobj(array):
        for part in (np.real(array), np.imag(array)):
            check_finite(name, part, missing=missing, infinite=infinite)
        return
    is_valid = np.abs(array) <= np.finfo(np.float32).max
    if missing:
        is_valid |= np.isnan(array)
    if infinite:
        is_valid |= np.isinf(array)
    if not is_valid.all():
        fault = "NaN, or beyond the largest float32" if infinite else "not finite in float32"
        raise ValueError(f"the array {name} has entries that are {fault}")
