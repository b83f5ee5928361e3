"""Learns hyperparameters by gradient over many tables, predicts them for new tables, fine-tunes and compares them.

The four steps, on real classification tables:

1. Build the meta-training set: tables, split, encoded, described by meta-features, and grouped by family.
2. Learn one λ for all tables. Starting there, learn a meta-optimizer g, λ = g(t; φ). Both use the hypergradient through
   the whole training of a network.
3. Predict λ = g(t') for tables of families that were not used for training.
4. Fine-tune λ on these tables by a few hypergradient steps.

The script compares this with the usual alternatives: defaults, random search and Optuna's TPE on each table, random
forests and gradient boosting. Every choice is made on validation rows. The test rows of a table are read once, for the
table of results.

    python experiments/hyperparameters/auto_tune                   one fold, one seed, packaged tables (minutes)
    python experiments/hyperparameters/auto_tune --smoke           a few tables and steps (for the tests)
    python experiments/hyperparameters/auto_tune --full            all folds and seeds
    python experiments/hyperparameters/auto_tune --csv FOLDER --target COLUMN      your own tables

The environment variable METAOPT_DATA adds a larger collection (`data.from_data_folder`). Without `--full`,
tables with more than 20 classes are left out (`--max-classes`), because all tables of a bucket are padded to the
largest number of classes.
"""
