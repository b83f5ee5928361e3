"""Architectures from tables of earlier searches: h(t') for a new task, without a trial and with five.

The only knowledge is records of other tasks: architectures × tasks × losses. One task at a time is left out. Losses
become normal scores, since tasks have different metrics. With one-hot digits and pairs of digits as features, a task is
a vector of coefficients. The other tasks define its prior, and trials condition it (`CellSearcher.prior`):

    h(t'), no trial:   the largest expected score
    h(t'), k trials:   condition on the scores of the trials, next try the largest expected improvement, and
                       choose by the posterior mean.

Within a run, no choice depends on the task that is left out. Without a trial, only one method knows anything about this
task: "crossed" (below) reads its features. With trials, a method uses only their order. Their normal scores are shifted
and scaled to the scores that the prior expects for them. (The form of the model, u and d of `CellSearcher.prior`, was
decided after a first run on these tables.)

This method is "h by digits".

"h by cells" is the `scores` of `nas.train_cell_searcher`: a transformer over the graphs of cells, trained on the
same records by a ranking loss. "Crossed" also reads features of the task. For TransNAS-Bench-101, they are the
correlations of training-free scores of 100 of its architectures on the task with their operations. For NAS-Bench-Graph,
they are the sizes of the graph. The sizes, steps and rate of the transformer were chosen on NAS-Bench-201, which is not
in the comparison.

"h" is `nas.CellSearcher`. Without trials, it is the average of the other tasks' normal scores, shrunk towards the
linear model and, where that helps, the transformer. The weights are chosen by leaving out one of the *other* tasks at a
time. With trials, it uses the same posterior. Its features are digits and pairs, and also the transformer's embedding
of a cell if the weight of the transformer is not 0. The form of h was chosen on the left-out tasks of these tables, so
these results are not a test of h. Most of the form was chosen with the linear model. Two rules were added after results
of the whole h. The first rule: the transformer gets a weight only if its gain is above the standard error of the gain.
The second rule: without a weight, its embedding is not used.

"Half of the table" is the choice from a random half of the rows of the table. The score is a mean over 40 such halves.
From the whole table, the choice is a single architecture, and its percentile owes much to chance.

"Mean effects of ops" is for the micro space, whose ops are on edges. It turns the predictions of h for all cells into
α: the value of an op is the mean over the cells that contain it (`nas.op_scores`). The report names the cell that this
α gives, with one op per edge. A search that begins at this α begins with this cell. The knowledge of h about
combinations of ops is lost.

The first baseline is the architecture with the best mean rank on the other tasks. With five trials, it is the best by
validation of the five architectures with the best mean ranks. The others are the best of random architectures, and the
best by validation of the whole table, which is the best choice that validation by itself allows. A choice is scored by
its percentile of the test losses of its task (1: the best).

The second part has regret curves of random search and regularized evolution. It also has the constant cell 9930, which
is nearly the best on every task of NAS-Bench-201. So this benchmark cannot show that a search depends on its task.

    python experiments/architecture/architecture_tables --afresh  ten minutes; writes the page and picture
    python experiments/architecture/architecture_tables --train-seeds 3 --afresh  transformers trained with three keys
    python experiments/architecture/architecture_tables --any-code  minutes: uses the tasks in the committed .json
    python experiments/architecture/architecture_tables --smoke  seconds; prints only

Tables are read from the folder that METAOPT_DATA names. The outcome of each task is saved in
results/architecture_tables.json and is not computed again. Outcomes of other code, including other versions of the
library, are only used with --any-code, and the result states how many there are. --afresh starts again from nothing.
The same command without it continues a run that was stopped.
"""
