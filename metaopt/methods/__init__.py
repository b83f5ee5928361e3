"""Named compositions of the contract, with no numerics of their own."""

from metaopt.methods._adaptation import Adaptation, adaptation, adapted
from metaopt.methods._architecture import (OneShot, Search, architecture_search, beta_darts, darts, darts_minus, gdas, implicit_darts, pc_darts, robust_darts, single_path_one_shot, under_budget, unrolled_darts,)
from metaopt.methods._conv4 import NORMALIZATIONS, Network, conv4
from metaopt.methods._evaluate import (AdaptFn, Evaluation, accuracy, average_ranks, by_number, evaluate_episodes, leaderboard, mean_absolute_error, mean_scores, mean_squared_error, paired_differences,)
from metaopt.methods._evolution import EvolutionState, regularized_evolution
from metaopt.methods._few_shot import (anil, boil, cavia, cross_entropy, fomaml, imaml, linear_head, maml, maml_plus_plus, meta_sgd, pretrained, proto_maml, prototypical_networks, reptile, ridge_head,)
from metaopt.methods._fine_tune import FineTuned, fine_tune
from metaopt.methods._meta_optimizer import (ACQUISITIONS, MetaOptimizer, MetaSearcherState, train_meta_optimizer, train_meta_searcher,)
from metaopt.methods._optuna import bohb, tpe
from metaopt.methods._retrain import (ArchitectureScores, Retraining, SearchReport, batched_accuracy, retraining, search_report, train,)
from metaopt.methods._training_free import ScreenedState, screened_random_search, training_free_scores

__all__ = [
    "ACQUISITIONS",
    "NORMALIZATIONS",
    "AdaptFn",
    "Adaptation",
    "ArchitectureScores",
    "Evaluation",
    "EvolutionState",
    "FineTuned",
    "MetaOptimizer",
    "MetaSearcherState",
    "Network",
    "OneShot",
    "Retraining",
    "ScreenedState",
    "Search",
    "SearchReport",
    "accuracy",
    "adaptation",
    "adapted",
    "anil",
    "architecture_search",
    "average_ranks",
    "batched_accuracy",
    "beta_darts",
    "bohb",
    "boil",
    "by_number",
    "cavia",
    "conv4",
    "cross_entropy",
    "darts",
    "darts_minus",
    "evaluate_episodes",
    "fine_tune",
    "fomaml",
    "gdas",
    "imaml",
    "implicit_darts",
    "leaderboard",
    "linear_head",
    "maml",
    "maml_plus_plus",
    "mean_absolute_error",
    "mean_scores",
    "mean_squared_error",
    "meta_sgd",
    "paired_differences",
    "pc_darts",
    "pretrained",
    "proto_maml",
    "prototypical_networks",
    "regularized_evolution",
    "reptile",
    "retraining",
    "ridge_head",
    "robust_darts",
    "screened_random_search",
    "search_report",
    "single_path_one_shot",
    "tpe",
    "train",
    "train_meta_optimizer",
    "train_meta_searcher",
    "training_free_scores",
    "under_budget",
    "unrolled_darts",
]
