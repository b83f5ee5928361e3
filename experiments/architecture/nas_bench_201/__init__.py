"""Trains supernets of NAS-Bench-201 on real images, and looks up the resulting cells in the table.

A supernet of the space is trained on one half of the training images, and each searcher trains α on the other half. The
final α gives one of the 15,625 cells of the benchmark. The table has their test accuracies after 200 epochs on
CIFAR-10, CIFAR-100 and ImageNet16-120, so no cell is trained here. Searchers have the same steps, batches and rates,
except where their papers change them. No choice depends on a test accuracy.

One run of first-order DARTS gives three rows. They are the cell at its end, at the epoch that RobustDARTS keeps, and at
the last epoch before the cell has two skips (DARTS+). At the end of every epoch, the run measures the dominant
eigenvalue of the Hessian of the validation loss in α, which RobustDARTS needs. `nas.robust_darts` and `nas.darts_plus`
keep the same epochs.

Three methods read the table's validation accuracies, which are after 12 epochs: random search, regularized evolution,
and the best architecture of the other two tasks. The next row is cell 9930, which is nearly the best on every task. The
last rows are the best of 100 random cells by training-free scores at initialization, or by their FLOPs.

    python experiments/architecture/nas_bench_201  forty minutes on a core: 16x16 images, C = 8, N = 1, 300 steps
    python experiments/architecture/nas_bench_201 --full  the benchmark's scale: 32x32, C = 16, N = 5, 19,500 steps
    python experiments/architecture/nas_bench_201 --smoke  seconds; prints only
    python experiments/architecture/nas_bench_201 --report  only the report of the finished runs

Every finished (searcher, seed) is saved in results/nas_bench_201.json and does not run again. A search that is killed
continues from its checkpoint. Images and tables are read from the folder that METAOPT_DATA names. It has 10,000
training images of CIFAR-10, two fifths of those in the searches of the benchmark's authors. So 50 of their epochs are
125 of ours.
"""
