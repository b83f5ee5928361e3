"""Black-box search: objectives without a gradient, records of their trials, and searchers that learn from records.

* Trials: `collect` runs an objective `(trial, task) -> outcome` with a searcher on many tasks, and stores a `Record`
  of each trial (`append_records`, `read_records`, `recover_records`). `sklearn_objective` and `lightning.objective`
  make objectives; `from_optuna_study`, `from_hpob` and `from_openml_evaluations` read the trials of other programs.
* Searchers: `random_search`, `tpe`, `bohb`, `regularized_evolution`; `asha` and `enqueue` wrap any searcher.
* Learned searchers: `train_meta_optimizer` and `train_meta_searcher` learn from the records of earlier tasks which
  configurations to try on a new task; `train_curve_searcher` learns from their learning curves. `optuna_sampler`
  offers the result to Optuna.
* Surrogates: the models of earlier tasks that the learned searchers use.
"""

from metaopt.blackbox import lightning
from metaopt.blackbox._acquisition import (
    batch_expected_improvement,
    censored_mean,
    expected_improvement,
    lower_confidence_bound,
    thompson_sample,
)
from metaopt.blackbox._asha import (
    asha,
)
from metaopt.blackbox._collect import (
    collect,
)
from metaopt.blackbox._curves import (
    CurveNoise,
    CurveSurrogate,
    Observed,
    calibrate,
    curve_improvement,
    curve_loss,
    curve_posterior,
    curve_surrogate,
    leave_out,
)
from metaopt.blackbox._deep_kernel import (
    DeepKernel,
    adapt_deep_kernel,
    deep_kernel_loss,
    init_deep_kernel,
)
from metaopt.blackbox._enqueue import (
    enqueue,
)
from metaopt.blackbox._evolution import (
    regularized_evolution,
)
from metaopt.blackbox._frames import (
    records_from_frame,
    records_to_frame,
)
from metaopt.blackbox._freeze_thaw import (
    CurveSearcher,
    FreezeThawState,
    train_curve_searcher,
)
from metaopt.blackbox._meta_optimizer import (
    train_meta_optimizer,
    train_meta_searcher,
)
from metaopt.blackbox._meta_outcomes import (
    Outcomes,
)
from metaopt.blackbox._meta_search import (
    ACQUISITIONS,
    Evidence,
    MetaOptimizer,
    MetaSearcherState,
)
from metaopt.blackbox._new_trials import (
    TriedConfiguration,
)
from metaopt.blackbox._optuna_searchers import (
    bohb,
    tpe,
)
from metaopt.blackbox._optuna_studies import (
    from_optuna_study,
    optuna_sampler,
    to_optuna_study,
)
from metaopt.blackbox._posterior import (
    Conditioned,
    Joint,
    Mixture,
    condition,
    expected_after_failures,
    functions_at,
    joint_posterior_at,
    posterior,
    posterior_at,
)
from metaopt.blackbox._random_search import (
    random_search,
)
from metaopt.blackbox._records import (
    append_records,
    read_records,
    recover_records,
)
from metaopt.blackbox._saved import load_meta_optimizer, save_meta_optimizer
from metaopt.blackbox._sklearn import (
    sklearn_model,
    sklearn_objective,
)
from metaopt.blackbox._surrogates import (
    MAX_ROWS,
    Embedding,
    Kernel,
    Surrogate,
    TaskTrials,
    at_task,
    attention_loss,
    attention_weights,
    expected_outcomes,
    explained_share,
    init_attention,
    kernel_loss,
    kernel_matrix,
    normalize,
    rank_features,
    surrogate,
    task_features,
    task_weights,
)
from metaopt.blackbox._transformer import (
    MAX_SHOWN,
    Binned,
    Transformer,
    TrialsRead,
    binned_below,
    binned_improvement,
    binned_moments,
    binned_quantile,
    init_transformer,
    outcome_classes,
    predict_binned,
    read_trials,
    transformer_loss,
)
from metaopt.blackbox._trial_tables import (
    TrialTable,
    from_hpob,
    from_openml_evaluations,
    table_records,
    tabulate,
    to_hpob,
    to_openml_evaluations,
)
from metaopt.blackbox._trials import (
    Pruned,
)

__all__ = [
    "ACQUISITIONS",
    "Binned",
    "Conditioned",
    "CurveNoise",
    "CurveSearcher",
    "CurveSurrogate",
    "DeepKernel",
    "Embedding",
    "Evidence",
    "FreezeThawState",
    "Joint",
    "Kernel",
    "MAX_ROWS",
    "MAX_SHOWN",
    "MetaOptimizer",
    "MetaSearcherState",
    "Mixture",
    "Observed",
    "Outcomes",
    "Pruned",
    "Surrogate",
    "TaskTrials",
    "Transformer",
    "TrialTable",
    "TrialsRead",
    "TriedConfiguration",
    "adapt_deep_kernel",
    "append_records",
    "asha",
    "at_task",
    "attention_loss",
    "attention_weights",
    "batch_expected_improvement",
    "binned_below",
    "binned_improvement",
    "binned_moments",
    "binned_quantile",
    "bohb",
    "calibrate",
    "censored_mean",
    "collect",
    "condition",
    "curve_improvement",
    "curve_loss",
    "curve_posterior",
    "curve_surrogate",
    "deep_kernel_loss",
    "enqueue",
    "expected_after_failures",
    "expected_improvement",
    "expected_outcomes",
    "explained_share",
    "from_hpob",
    "from_openml_evaluations",
    "from_optuna_study",
    "functions_at",
    "init_attention",
    "init_deep_kernel",
    "init_transformer",
    "joint_posterior_at",
    "kernel_loss",
    "kernel_matrix",
    "leave_out",
    "lightning",
    "load_meta_optimizer",
    "lower_confidence_bound",
    "normalize",
    "optuna_sampler",
    "outcome_classes",
    "posterior",
    "posterior_at",
    "predict_binned",
    "random_search",
    "rank_features",
    "read_records",
    "read_trials",
    "records_from_frame",
    "records_to_frame",
    "recover_records",
    "regularized_evolution",
    "save_meta_optimizer",
    "sklearn_model",
    "sklearn_objective",
    "surrogate",
    "table_records",
    "tabulate",
    "task_features",
    "task_weights",
    "thompson_sample",
    "to_hpob",
    "to_openml_evaluations",
    "to_optuna_study",
    "tpe",
    "train_curve_searcher",
    "train_meta_optimizer",
    "train_meta_searcher",
    "transformer_loss",
]
