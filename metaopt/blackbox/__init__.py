"""Black-box search: objectives without a gradient, records of their trials, and searchers that learn from records.

- Trials: `collect` runs an objective `(trial, task) -> outcome` with a searcher on many tasks, and stores a `Record` of
  each trial (`append_records`, `read_records`, `recover_records`). `best_records` finds the best trials, by one outcome
  or several. `sklearn_objective` and `lightning.objective` make objectives; `from_optuna_study`, `from_hpob` and
  `from_openml_evaluations` read the trials of other programs.
- Searchers: `random_search`, `tpe`, `bohb`, `regularized_evolution`; `asha` and `enqueue` wrap any searcher.
- Learned searchers: `train_meta_optimizer` and `train_meta_searcher` learn from the records of earlier tasks which
  configurations to try on a new task; `train_curve_searcher` learns from their learning curves. `optuna_sampler`
  offers the result to Optuna, and `should_prune` prunes its trials with several objectives.
"""

from metaopt.blackbox import _saved as _saved  # registers learned optimizers for `metaopt.save`
from metaopt.blackbox import lightning
from metaopt.blackbox._asha import (
    asha,
)
from metaopt.blackbox._collect import (
    collect,
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
    train_curve_searcher,
)
from metaopt.blackbox._goals import (
    best_records,
)
from metaopt.blackbox._meta_optimizer import (
    train_meta_optimizer,
    train_meta_searcher,
)
from metaopt.blackbox._meta_search import (
    MetaOptimizer,
)
from metaopt.blackbox._optuna_outcomes import (
    should_prune,
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
)
from metaopt.blackbox._records import (
    append_records,
    read_records,
    recover_records,
)
from metaopt.blackbox._sklearn import (
    sklearn_model,
    sklearn_objective,
)
from metaopt.blackbox._trial_tables import (
    TrialTable,
    from_hpob,
    from_openml_evaluations,
    tabulate,
    to_hpob,
    to_openml_evaluations,
)
from metaopt.blackbox._trials import (
    Pruned,
)

__all__ = [
    "CurveSearcher",
    "MetaOptimizer",
    "Pruned",
    "TrialTable",
    "append_records",
    "asha",
    "best_records",
    "bohb",
    "collect",
    "enqueue",
    "from_hpob",
    "from_openml_evaluations",
    "from_optuna_study",
    "lightning",
    "optuna_sampler",
    "random_search",
    "read_records",
    "records_from_frame",
    "records_to_frame",
    "recover_records",
    "regularized_evolution",
    "should_prune",
    "sklearn_model",
    "sklearn_objective",
    "tabulate",
    "to_hpob",
    "to_openml_evaluations",
    "to_optuna_study",
    "tpe",
    "train_curve_searcher",
    "train_meta_optimizer",
    "train_meta_searcher",
]
