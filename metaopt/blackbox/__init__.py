"""blackbox"""

from metaopt.blackbox import lightning
from metaopt.blackbox._asha import (
    AshaState,
    asha,
)
from metaopt.blackbox._collect import (
    collect,
)
from metaopt.blackbox._enqueue import (
    EnqueuedState,
    enqueue,
)
from metaopt.blackbox._evolution import (
    EvolutionState,
    regularized_evolution,
)
from metaopt.blackbox._frames import (
    records_from_frame,
    records_to_frame,
)
from metaopt.blackbox._freeze_thaw import (
    CurveSearcher,
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
    Evidence,
    MetaOptimizer,
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
from metaopt.blackbox._random_search import (
    random_search,
    untried,
)
from metaopt.blackbox._records import (
    append_records,
    read_records,
    recover_records,
)
from metaopt.blackbox._saved import load_meta_optimizer, save_meta_optimizer
from metaopt.blackbox._sklearn import (
    SKLEARN_MODELS,
    SklearnModel,
    sklearn_model,
    sklearn_objective,
)
from metaopt.blackbox._trial_tables import (
    PublishedCurves,
    TrialTable,
    from_hpob,
    from_hpob_curves,
    from_hpobench_mlp,
    from_lcdb,
    from_oboe,
    from_openml_evaluations,
    from_pmlb_results,
    from_taskset,
    table_records,
    tabulate,
    to_hpob,
    to_openml_evaluations,
)
from metaopt.blackbox._trials import (
    ObjectiveFn,
    Pruned,
)

__all__ = [
    "AshaState",
    "CurveSearcher",
    "EnqueuedState",
    "Evidence",
    "EvolutionState",
    "MetaOptimizer",
    "ObjectiveFn",
    "Outcomes",
    "Pruned",
    "PublishedCurves",
    "SKLEARN_MODELS",
    "SklearnModel",
    "TrialTable",
    "append_records",
    "asha",
    "bohb",
    "collect",
    "enqueue",
    "from_hpob",
    "from_hpob_curves",
    "from_hpobench_mlp",
    "from_lcdb",
    "from_oboe",
    "from_openml_evaluations",
    "from_optuna_study",
    "from_pmlb_results",
    "from_taskset",
    "lightning",
    "load_meta_optimizer",
    "optuna_sampler",
    "random_search",
    "read_records",
    "records_from_frame",
    "records_to_frame",
    "recover_records",
    "regularized_evolution",
    "save_meta_optimizer",
    "sklearn_model",
    "sklearn_objective",
    "table_records",
    "tabulate",
    "to_hpob",
    "to_openml_evaluations",
    "to_optuna_study",
    "tpe",
    "train_curve_searcher",
    "train_meta_optimizer",
    "train_meta_searcher",
    "untried",
]
