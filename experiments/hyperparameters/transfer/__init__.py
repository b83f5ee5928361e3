"""Does a g that learned on many tables hold on tables of new families? Its rivals are searches of up to 100 trials.

The script continues `auto_tune`, with the same network and search space. The corpus is larger: about 2,400 tasks of 760
families (`experiments.data.corpus`). There are ten steps, which can run at different times:

    python experiments/hyperparameters/transfer prepare           builds and prepares the corpus (20 core-minutes)
    python experiments/hyperparameters/transfer learn --seed 0    one λ for all tables, then g (14 core-minutes)
    python experiments/hyperparameters/transfer compare           compares predictors on all development families
    python experiments/hyperparameters/transfer choose            compares spreads of draws on the development families
    python experiments/hyperparameters/transfer ten-runs          compares uses of ten runs on the development families
    python experiments/hyperparameters/transfer rates             compares rates of fine-tuning, on the same tables
    python experiments/hyperparameters/transfer variants          compares a learned spread and a set network with g
    python experiments/hyperparameters/transfer second-stage      compares a search that learned from other tables
    python experiments/hyperparameters/transfer judge             compares on the judging families (30 core-minutes)
    python experiments/hyperparameters/transfer ship              puts the trained g into the package
    python experiments/hyperparameters/transfer --smoke           prepare, learn and judge, small

With `--regression`, the steps prepare, learn, compare and ship are those of a second g, for `AutoRegressor`. Its tasks
have intervals of numeric columns as targets.

`families.json` has the families for judging. About 15 % of the other families are for development, and the rest are
for learning. Settings and the number of steps are chosen on the development families. Only `judge` uses the families
for judging. With `--extended`, the corpus also has tasks with many classes and simulated rules; g was not better on
the development families then.
"""
