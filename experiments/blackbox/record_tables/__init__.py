"""Three tables of real records: how much earlier tasks help on a new one, after 1, 5 and 20 trials.

A table holds the outcome of every configuration on every task (balanced error, one run each). The first one has 56
configurations of a random forest on 164 tables of PMLB. The second one has 381 configurations of six algorithms on the
same tables. The third one has 219 pipelines on 418 tables of OpenML (OBOE). There are five folds, and all
near-duplicates of a table are in the same fold. Each fold is left out in turn, and methods learn only on the other
four. The normalized regret of a task is 0 at its best and 1 at its worst configuration.

`metaopt` is `blackbox.train_meta_searcher`, with a task's features. Its searcher begins with its prediction and
continues by expected improvement. Every eighth trial is instead the configuration farthest from all earlier ones. The
method was developed on the regrets in folds 0–2. The regrets of folds 3 and 4 were not looked at before the first whole
run, and are also reported separately.

Deep kernels (FSBO: meta-learned by marginal likelihood, adapted to the task's trials by ten steps) are mixed with its
Gaussian processes, or used on their own. The same holds for transformers over the trials. Both were also developed on
folds 0–2.

The baselines:

- random search;
- TPE (Optuna): numbers are given by their rank, and a configuration that is not in the table, or was already tried,
  becomes the nearest one;
- the 1-nearest neighbor in features: its best configurations in order;
- the best configurations on average, in order;
- a greedy portfolio;
- a Gaussian process with expected improvement and without other tasks, from a random start; its kernel's length is set
  by maximum likelihood at every step.

No method may choose a configuration that failed on the new task. TPE and SMAC3 run separately (`--baselines`), and
their curves are kept next to the results. BOHB is not included: a table has one fidelity, so BOHB would be the same as
TPE.

    python experiments/blackbox/record_tables             writes experiments/results/record_tables.md and .png
    python experiments/blackbox/record_tables --baselines TPE SMAC     more of SMAC3 (extra `smac`; 20 minutes a seed)
    python experiments/blackbox/record_tables --train-seeds 20 --store FOLDER      metaopt trained with 20 keys
    python experiments/blackbox/record_tables --extra-trees     prints only: forests choose the first trial by features
    python experiments/blackbox/record_tables --components      prints only: the same by components of regrets
    python experiments/blackbox/record_tables --smoke     seconds; prints only

The tables are read from the folder that METAOPT_DATA names. With --store, the learned result of each fold and key is
saved as soon as it is finished. A run that was killed continues from there. Several processes that run the same command
share the work.
"""
