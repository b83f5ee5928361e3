"""A random forest tuned from records of earlier tables: a prediction for a new table, then a few trials.

`n_estimators` and `max_depth` have no gradient. Still, gradients train g, from the records of trials on earlier tables.

1. Tables: rows are split once. Test rows are only used to score the chosen configurations.
2. Records: the same random configurations on every table (scikit-learn's defaults first), cross-validated on the
   training rows. `blackbox.collect` makes them, and they are kept next to the results. All methods look up the
   outcomes of their trials there.
3. g = `blackbox.train_meta_searcher`, trained on the records of other families, with meta-features. `g.predict` chooses
   for a table that was not used for training (five folds, by family).
4. `g.searcher` spends a few trials on this table.

The baselines, compared on the test rows, are scikit-learn's defaults, random search, Optuna's TPE and BOHB, and SMAC3.
The others are the best configuration on average, the best one of the nearest table in meta-features, and a portfolio.
Some optimizers do not know the configurations of the records. Each of their proposals is replaced by the nearest
untried configuration (in the encoding of `spaces.encode`). BOHB's fidelity is the number of trees. A forest that
continues pays only for its new trees.

    python experiments/blackbox/auto_random_forest                    from the records next to the results
    python experiments/blackbox/auto_random_forest --collect          makes new records (resumable: --store)
    python experiments/blackbox/auto_random_forest --optimizers TPE BOHB SMAC      runs these again on the records
    python experiments/blackbox/auto_random_forest --train-seeds 20 --work FOLDER    g trained with 20 keys
    python experiments/blackbox/auto_random_forest --rows             g reads the tables' rows, too (needs the tables)
    python experiments/blackbox/auto_random_forest --smoke            4 tables, tiny forests (for the tests)
    python experiments/blackbox/auto_random_forest --full --collect   more rows, trees and configurations (hours)

With --work, the choices of g are saved for each fold and each key as soon as they are made. A run that was killed
continues from there. Several processes that run the same command share the work.

With --rows, three more models are trained: g of meta-features and rows (`datasets` of `train_meta_searcher`), g of rows
only, and g of neither. This result has its own page, auto_random_forest_rows.md and .png, which is not committed with
the others.

`--collect` reads tables of Python packages. If the environment variable METAOPT_DATA names a larger collection, it
reads that one, too. Tables that are simulated or follow a rule (`tasks.SYNTHETIC_FAMILIES`) are left out.
"""
