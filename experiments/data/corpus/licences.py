"""Licences of the R packages whose tables are in the corpus.

`licences.csv` has the field "License" of a package's file `DESCRIPTION`, and the version of that file, from a public
mirror of CRAN. The version can be older than that of the table. For six packages the mirror has no such file.
"""

import csv
import functools
from pathlib import Path

FILE = Path(__file__).with_name("licences.csv")


@functools.cache
def _licences() -> dict[str, str]:
    with open(FILE, newline="") as file:
        return {row["package"]: row["licence"] for row in csv.DictReader(file)}


def source_of(package: str) -> str:
    """Returns the source of a table of an R package, with the licence of the package if it is known."""
    return f"R package {package}; {_licences().get(package, 'licence unknown')}"
