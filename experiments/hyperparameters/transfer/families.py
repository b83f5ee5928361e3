"""The division of the families: for judging, for development, and for learning."""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.data import from_data_folder, regression_tables
from experiments.data.corpus import Excluded, reserved
from experiments.data.corpus.families import exclude, is_in_share, table_keys
from metaopt import tasks

FILE = Path(__file__).with_name("families.json")
AUTOML_FILE = Path(__file__).parents[2] / "automl" / "families.json"
DEVELOPMENT_SHARE = 0.15
# R tables that hold the rows of a judged table, although no other rule recognizes them. `biopsy` is `breast-w`. Each of
# its columns has ten values, too few to identify the table.
OTHER_NAMES = frozenset(("biopsy",))


def judged_tables(own: Sequence[tasks.Table] | None = None) -> list[tasks.Table]:
    """Returns the tables of the families for judging, from the data folder."""
    families = set(json.loads(FILE.read_text())["judging"])
    return [table for table in (from_data_folder() if own is None else own) if table.family in families]


def excluded_tables(own: Sequence[tasks.Table] | None = None) -> Excluded:
    """Returns the tables that the corpus must not hold: those for judging, and those of `reserved.json`."""
    excluded = exclude(judged_tables(own), reserved())
    return excluded._replace(stems=excluded.stems | OTHER_NAMES)


def excluded_of_regression() -> Excluded:
    """Returns the tables that the corpus of regression must not hold.

    These are all tables of regression of the data folder, those for judging here and of AutoML, and those of
    `reserved.json`.
    """
    families = set(json.loads(AUTOML_FILE.read_text())["judging"]["classification"])
    own = from_data_folder()
    judged = [*judged_tables(own), *(table for table in own if table.family in families), *regression_tables()]
    excluded = exclude(judged, reserved())
    return excluded._replace(stems=excluded.stems | OTHER_NAMES)


def is_development(family: str) -> bool:
    """Whether a family of the corpus is for development: 15 % of them, by a hash of the name."""
    return is_in_share(family, DEVELOPMENT_SHARE)


def draw_judging(folds: Sequence[int], fold_of_family: dict[str, int]) -> list[str]:
    """Returns the real families of some folds of the data folder's index that are not reserved."""
    own, kept = from_data_folder(), reserved()
    is_reserved = lambda t: kept.has_name(t.name) or kept.has_name(t.family) or kept.has_columns(table_keys(t))
    dropped = tasks.SYNTHETIC_FAMILIES | {table.family for table in own if is_reserved(table)}
    return sorted({t.family for t in own if fold_of_family[t.family] in folds} - dropped)
