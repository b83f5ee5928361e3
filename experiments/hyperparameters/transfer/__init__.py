"""Does a g that learned on many tables hold on tables of new families? Searches of up to 100 trials are next to it.

The script continues `auto_tune`, with the same network and search space, on a larger corpus of some 2,400 tasks of 760
families (`experiments.data.corpus`). It has seven steps, which can run at different times:

    python experiments/hyperparameters/transfer prepare           builds and prepares the corpus (20 core-minutes)
    python experiments/hyperparameters/transfer learn --seed 0    one λ for all tables, then g (14 core-minutes)
    python experiments/hyperparameters/transfer compare           compares predictors on all development families
    python experiments/hyperparameters/transfer choose            compares spreads of draws on the development families
    python experiments/hyperparameters/transfer ten-runs          compares uses of ten runs on the development families
    python experiments/hyperparameters/transfer judge             compares on the judging families (30 core-minutes)
    python experiments/hyperparameters/transfer ship              puts the trained g into the package
    python experiments/hyperparameters/transfer --smoke           all of them, small

Families are divided once, in `families.json`: those for judging, those for development, and all others for learning.
Settings and the number of steps are chosen on the development families. The judging families are used by `judge` only.
With `--extended`, the corpus also has tasks with many classes and simulated rules. It does not improve
g on the development families.
"""
