"""Learns architectures by hypergradient over many tasks, generates them for new tasks, fine-tunes and compares them.

The four steps, on real images and tables:

1. Build the meta-training set: tasks of two shapes, described by features and grouped by families. The shapes are
   images (8 x 8, subsets of the classes of several sources) and tables.
2. Learn a meta-searcher h, α = h(t; φ), together with the initial weights, by hypergradient through the training of a
   supernet. Some families of the meta-training set are left out. They decide how far to trust the task's features in h,
   α = h(average) + trust · (h(t) − h(average)).
3. Generate an architecture a* for tasks of families that were not used for training.
4. Fine-tune α and the weights on these tasks by a few alternations.

A second h learns from records of tasks of the same families. Each task has its own random networks, which were trained
on it. The records estimate how much every op adds to the validation loss. A third method combines the α of both h, in
the same units.

The baselines are the best fixed architecture, random search, regularized evolution, and DARTS on each task. DARTS uses
the best of several orders, rates, and ways to read an architecture from α. Every choice is made on validation rows of
the same task, or of tasks of other families. The test rows of a task are read once, for the table of results.

    python experiments/architecture/auto_architecture  one fold of each shape (minutes)
    python experiments/architecture/auto_architecture --smoke  a few tasks and steps (for the tests)
    python experiments/architecture/auto_architecture --full  all folds, more steps, tuned rates, 50 random networks

Finished parts (random networks and folds) are saved next to the result and do not run again. For example, a run with
`--full` continues after an earlier run with `--full --folds 0`. Its table includes all finished parts. `--full
--report` only makes the tables. Parts of earlier code are only used with --any-code or --report, and the result states
how many there are.

Without a data folder, the images are scikit-learn's digits, and the two halves of its classes are two families. If the
environment variable METAOPT_DATA names a data folder, the image sources and tables of this folder are used, too. Then a
family of images has whole sources. Tasks and spaces are in image_table_tasks.py.
"""
