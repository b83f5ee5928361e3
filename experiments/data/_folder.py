"""The folder of the converted files."""

import csv
import gzip
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Folder = str | os.PathLike[str] | None  # None: the folder that METAOPT_DATA names


def data_file(name: str, path: Folder = None) -> Path:
    """Returns the path of one file of the data folder.

    Args:
      name: of the file.
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      The path of an existing file.

    Raises:
      FileNotFoundError: if the folder or the file does not exist.
    """
    folder = os.environ.get("METAOPT_DATA") if path is None else path
    if not folder:
        raise FileNotFoundError("no data folder: set METAOPT_DATA to it, or pass `path`.")
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"the data folder {folder} has no {name}.")
    return file


def read_arrays(name: str, path: Folder = None) -> Mapping[str, np.ndarray]:
    """Opens an `.npz` file; each array is read when it is used."""
    return np.load(data_file(name, path), allow_pickle=False)


def read_rows(name: str, path: Folder = None) -> list[dict[str, str]]:
    """Reads a CSV file, compressed if its name ends in ".gz"; one dict per row."""
    file = data_file(name, path)
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return list(csv.DictReader(text.decode("utf-8").splitlines()))
