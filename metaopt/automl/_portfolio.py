"""The models that an AutoML estimator fits, in an order of preference."""

import importlib.util
from typing import Any, NamedTuple

from metaopt import _extras
from metaopt.automl._kinds import KINDS

PRESETS = ("instant", "balanced", "best")


class Member(NamedTuple):
    """One model with settings. `name` is unique within a portfolio."""

    name: str
    kind: str
    settings: dict[str, Any]


# Holzmüller et al., "Better by default", NeurIPS 2024, https://arxiv.org/abs/2407.04491: tuned defaults of their code
# (Apache-2.0). Its patience is 300 rounds; ours is 50, which costs a third of the time.
_LIGHTGBM = {
    "classification": {
        "learning_rate": 0.04,
        "bagging_fraction": 0.75,
        "bagging_freq": 1,
        "num_leaves": 50,
        "min_data_in_leaf": 40,
        "min_sum_hessian_in_leaf": 1e-7,
    },
    "regression": {
        "learning_rate": 0.05,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
        "num_leaves": 100,
        "min_data_in_leaf": 3,
        "min_sum_hessian_in_leaf": 1e-7,
    },
}
_XGBOOST = {
    "classification": {
        "learning_rate": 0.08,
        "min_child_weight": 5e-6,
        "reg_lambda": 0.0,
        "max_depth": 6,
        "colsample_bylevel": 0.9,
        "subsample": 0.65,
    },
    "regression": {
        "learning_rate": 0.05,
        "min_child_weight": 2.0,
        "reg_lambda": 0.0,
        "max_depth": 9,
        "subsample": 0.7,
    },
}
_CATBOOST = {
    "classification": {
        "learning_rate": 0.08,
        "depth": 7,
        "random_strength": 0.8,
        "one_hot_max_size": 15,
        "leaf_estimation_iterations": 1,
    },
    "regression": {
        "learning_rate": 0.09,
        "depth": 9,
        "random_strength": 0.0,
        "one_hot_max_size": 20,
        "leaf_estimation_iterations": 20,
    },
}
_CATBOOST_SHARED = {"l2_leaf_reg": 1e-5, "boosting_type": "Plain", "bootstrap_type": "Bernoulli", "subsample": 0.9}
_STOP = {"num_rounds": 1000, "patience": 50}


def portfolio(problem: str, preset: str, kinds: str | tuple[str, ...] | None, num_rows: int) -> list[Member]:
    """Lists the models of a preset, the most useful ones first.

    Args:
      problem: "classification" or "regression".
      preset: "instant", "balanced" or "best".
      kinds: the kinds to use; a string is one kind, and None means all that are installed.
      num_rows: the number of rows of the table. For a small table, leaves of LightGBM's trees need fewer rows.

    Returns:
      The members.

    Raises:
      ValueError: if `preset` or a kind is unknown.
      ImportError: if a kind is requested and its package is not installed.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}; got {preset!r}.")
    known = ("network", *(kind for kind in KINDS if problem == "regression" or kind != "gaussian_process"))
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds is not None and not len(kinds):
        raise ValueError(f"`models` must name at least one of {', '.join(known)}, or be None; got none.")
    if kinds is not None and (unknown := [kind for kind in kinds if kind not in known]):
        raise ValueError(f"`models` must be among {', '.join(known)}; got {', '.join(map(str, unknown))}.")
    if kinds is None:
        kinds = ("network",) if preset == "instant" else tuple(kind for kind in known if _installed(kind))
        if "lightgbm" in kinds:  # the same algorithm, in a third of the time
            kinds = tuple(kind for kind in kinds if kind != "hist_gradient_boosting")
    for kind in kinds:
        if not _installed(kind):
            package = KINDS[kind].module.partition(".")[0]
            extra = "catboost" if package == "catboost" else "automl"
            raise ImportError(f"The model {kind} needs {package}: {_extras.hint(extra)}.")
    members = _members(problem, num_rows)
    if preset == "instant":  # the draws of the network share one compiled program
        first = {member.kind: member for member in reversed(members)}
        members = [member for member in members if "draw" in member.settings or member is first[member.kind]]
    elif preset == "balanced":
        members = [member for member in members if not member.name.endswith("*")]
    return [m._replace(name=m.name.rstrip("*")) for m in members if m.kind in kinds]


def _installed(kind: str) -> bool:
    return kind == "network" or importlib.util.find_spec(KINDS[kind].module.partition(".")[0]) is not None


def _members(problem: str, num_rows: int) -> list[Member]:
    """All members; a name that ends in a star belongs to the preset "best" only."""
    is_class = problem == "classification"
    leaf = "min_data_in_leaf"
    lightgbm, xgboost = {**_LIGHTGBM[problem], **_STOP}, {**_XGBOOST[problem], **_STOP}
    catboost = {**_CATBOOST[problem], **_CATBOOST_SHARED, **_STOP}
    lightgbm[leaf] = min(lightgbm[leaf], max(2, num_rows // 25))
    small = {"num_leaves": 8, "learning_rate": 0.05, leaf: min(10, max(2, num_rows // 50)), "lambda_l2": 1.0}
    linear = ({"C": 0.1}, {"C": 1.0}, {"C": 0.01}) if is_class else ({"alpha": 10.0}, {"alpha": 1.0}, {"alpha": 100.0})
    criterion = {"criterion": "entropy"} if is_class else {}
    half = {"max_features": 0.5}
    return [
        Member("network", "network", {"draw": 0}),
        Member("linear", "linear", linear[0]),
        Member("lightgbm", "lightgbm", lightgbm),
        Member("extra_trees", "extra_trees", {"min_samples_leaf": 2, **half, **criterion}),
        Member("gaussian_process", "gaussian_process", {}),
        Member("random_forest", "random_forest", {"min_samples_leaf": 2, **criterion}),
        Member("xgboost", "xgboost", xgboost),
        Member("catboost", "catboost", catboost),
        Member("network refined", "network", {"num_refined": 3}),
        Member("network 2", "network", {"draw": 1}),
        Member("lightgbm small", "lightgbm", {**lightgbm, **small}),
        Member("hist_gradient_boosting", "hist_gradient_boosting", {"learning_rate": 0.05, "l2_regularization": 1.0}),
        Member("network 3", "network", {"draw": 2}),
        Member("linear 2", "linear", linear[1]),
        Member("extra_trees 2", "extra_trees", {"min_samples_leaf": 1, "max_features": 1.0}),
        Member("network 4", "network", {"draw": 3}),
        Member("linear 3", "linear", linear[2]),
        Member("random_forest 2*", "random_forest", {"min_samples_leaf": 5, **half}),
        Member("xgboost small*", "xgboost", {**xgboost, "max_depth": 3, "reg_lambda": 1.0, "min_child_weight": 1.0}),
        Member("network 5*", "network", {"draw": 4}),
        Member("network 6*", "network", {"draw": 5}),
        Member("lightgbm extra*", "lightgbm", {**lightgbm, "extra_trees": True, "num_leaves": 31}),
        Member("extra_trees 3*", "extra_trees", {"min_samples_leaf": 5, "max_features": 1.0, "n_estimators": 400}),
        Member("network 7*", "network", {"draw": 6}),
        Member("network 8*", "network", {"draw": 7}),
    ]
