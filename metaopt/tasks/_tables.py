"""Tables, families of tables from the same source, and folds that keep families together.

Two tables belong to one **family** if one is a part, a variant or a copy of the other: `yeast1` and `yeast`, or
scikit-learn's `digits` and UCI's `optdigits`. If a method learns on a table and is judged on its sibling, it is judged
on data that it has seen. So every split over tables is a split over families.
"""

import itertools
import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metaopt.tasks._shared_rows import pairs_with_shared_rows

_log = logging.getLogger(__name__)


class Table(NamedTuple):
    """One classification table. `n` rows, `d` columns, `K` classes.

    Attributes:
      name: unique among the tables in use.
      family: shared by near-duplicates and parts of one source.
      x: [n, d] float32; NaN where missing; a categorical column holds its codes 0..L-1.
      y: [n] int32 in 0..K-1.
      categorical: [d] bool.
      class_names: K names, or None.
      source: the origin of the table.
    """

    name: str
    family: str
    x: np.ndarray
    y: np.ndarray
    categorical: np.ndarray
    class_names: tuple[str, ...] | None = None
    source: str = ""

    @property
    def num_classes(self) -> int:
        """K: the largest class number plus one."""
        return int(self.y.max()) + 1


# Other names of a source -> its family, as in the index of the data folder (`METAOPT_DATA`, see CONTRIBUTING.md).
FAMILY_ALIASES = {
    "ada": "adult",
    "allbp": "thyroid",
    "australian": "credit-approval",
    "automobile": "autos",
    "balance": "balance-scale",
    "breast-cancer": "wdbc",  # scikit-learn's; the Ljubljana table comes with its own family
    "breast-w": "breast-cancer-wisconsin",
    "bupa": "liver-disorders",
    "cleveland": "heart-disease",
    "cm1": "nasa-mdp",
    "column2c": "vertebral-column",
    "column3c": "vertebral-column",
    "contraceptive": "cmc",
    "credit-g": "german-credit",
    "crx": "credit-approval",
    "diabetes": "pima",
    "diabetes-pima": "pima",
    "digits": "optdigits",
    "dis": "thyroid",
    "flare": "solar-flare",
    "german": "german-credit",
    "heart": "heart-disease",
    "heart-cleveland": "heart-disease",
    "heart-hungarian": "heart-disease",
    "heart-statlog": "heart-disease",
    "hypothyroid": "thyroid",
    "jm1": "nasa-mdp",
    "kc1": "nasa-mdp",
    "kc2": "nasa-mdp",
    "kr-vs-k": "kropt",  # an end game with a rook; `kr-vs-kp` is a different one
    "led24": "led",
    "led7digit": "led",
    "lymphography": "lymph",
    "magictelescope": "magic",
    "movement-libras": "movement_libras",
    "mfeat-karhunen": "mfeat",
    "mfeat-morphological": "mfeat",
    "mfeat-zernike": "mfeat",
    "newthyroid": "new-thyroid",
    "pc1": "nasa-mdp",
    "pc3": "nasa-mdp",
    "satellite-anomaly": "satimage",
    "sick": "thyroid",
    "spect": "spect-heart",
    "spect-f": "spect-heart",
    "spectf": "spect-heart",
    "spectfheart": "spect-heart",
    "sylva": "covertype",
    "waveform-5000": "waveform",
    "winequality-red": "wine-quality",
    "winequality-white": "wine-quality",
    "wisconsin": "breast-cancer-wisconsin",
}

# Simulated data, or a rule written out as a table; leave them out if you need real data.
SYNTHETIC_FAMILIES = frozenset(
    "waveform led monk-2 hill-valley churn attrition wa-churn tic-tac-toe balance-scale car nursery kr-vs-kp kropt "
    "poker".split()
)


def family_name(name: str) -> str:
    """Returns the family of a table, as far as its name shows it: lower case, hyphens, then an alias.

    Args:
      name: the name of a table.

    Returns:
      The family's name.

    >>> family_name("Australian"), family_name("my_own_table")
    ('credit-approval', 'my-own-table')
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return FAMILY_ALIASES.get(plain, plain)


def join_families(tables: Sequence[Table]) -> list[Table]:
    """Joins the families of tables that hold the same rows.

    Args:
      tables: any number; their families come from their names or sources.

    Returns:
      The tables in the same order. A joined family has the name of the family of the first table with shared rows. The
      log names each pair of tables whose families were joined.
    """
    joined = {table.family: table.family for table in tables}  # family -> its name after joining
    for i, j in pairs_with_shared_rows([(table.x, table.categorical) for table in tables]):
        first, second = joined[tables[i].family], joined[tables[j].family]
        if first != second:
            _log.warning(
                "tables %s and %s hold the same rows; their families %s and %s are joined",
                tables[i].name,
                tables[j].name,
                first,
                second,
            )
            joined = {family: first if name == second else name for family, name in joined.items()}
    return [table._replace(family=joined[table.family]) for table in tables]


def deduplicate(*sources: Sequence[Table]) -> list[Table]:
    """Joins the tables of several sources, and omits a table if an earlier source has one of its family and shape.

    First, tables that hold the same rows get one family, within a source and between sources. The rows and the columns
    may be in any order, and the columns may have any names.

    Shapes count as equal if rows differ by at most 25 %, columns by at most 10 % or 2, and classes by at most 20 %. The
    reason is that sources drop rows with gaps, constant columns and the rarest classes. `yeast1`, which has two
    classes, stays next to `yeast`, which has nine; their family keeps them in one fold. Within one source, no table is
    omitted, because a source may have several tables with the same columns of the same patients but other targets.

    Args:
      *sources: lists of tables, the preferred source first.

    Returns:
      The remaining tables in the same order. Their names are unique: a later table of the same name gets a number,
      "glass-2".
    """
    joined = iter(join_families([table for source in sources for table in source]))
    kept: list[Table] = []
    names: set[str] = set()
    for source in sources:
        earlier = tuple(kept)
        for table in itertools.islice(joined, len(source)):
            twin = next((other for other in earlier if _same(other, table)), None)
            if twin is not None:
                _log.info("table %s is left out: %s is the same table", table.name, twin.name)
                continue
            name, number = table.name, 2
            while name in names:
                name, number = f"{table.name}-{number}", number + 1
            names.add(name)
            kept.append(table._replace(name=name))
    return kept


def _same(a: Table, b: Table) -> bool:
    def near(p, q, share, least=0):
        return abs(p - q) <= max(share * max(p, q), least)

    return (
        a.family == b.family
        and near(a.x.shape[0], b.x.shape[0], 0.25)
        and near(a.x.shape[1], b.x.shape[1], 0.1, 2)
        and near(a.num_classes, b.num_classes, 0.2)
    )


def split_by_family(tables: Sequence[Table], num_folds: int = 5, seed: int = 0) -> np.ndarray:
    """Assigns a fold to every table. No family is in two folds, and the folds hold about the same number of tables.

    The largest families go first, each into the fold that is smallest so far. Families of the same size are in random
    order.

    Args:
      tables: the tables to split; only `family` is used.
      num_folds: at least 2, and at most the number of families.
      seed: the seed of the order among families of one size.

    Returns:
      [T] int32 in 0..num_folds-1, in the order of `tables`; the fold of a family does not depend on that order.

    Raises:
      ValueError: if there are fewer families than folds.
    """
    families, index, counts = np.unique([t.family for t in tables], return_inverse=True, return_counts=True)
    if len(families) < num_folds:
        raise ValueError(
            f"{len(families)} families cannot fill {num_folds} folds, because no family may be in two; "
            "take fewer folds."
        )
    shuffled = np.random.default_rng(seed).permutation(len(families))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    fold_of, size = np.zeros(len(families), np.int32), np.zeros(num_folds, int)
    for family in order:
        fold_of[family] = np.argmin(size)
        size[fold_of[family]] += counts[family]
    return fold_of[index]
