"""Searches of black boxes: regret and ranks over the budget, and the importance of hyperparameters."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metaopt import _extras, base, blackbox
from metaopt.blackbox._earlier_trials import full_loss
from metaopt.blackbox._goals import feasible_outcomes, make_goals, records_of_outcome
from metaopt.plots._axes import WITH_LEGEND, legend_at_right, line_style, new_axes, rows_of_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = Mapping[str, Sequence[base.Record] | Sequence[Sequence[base.Record]]]
_NO_OUTCOME = 1e-6  # added to the regret of a run without an outcome, so that it ranks last


def regret(
    runs: Runs,
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    families: Mapping[str, str] | None = None,
    constraints: Mapping[str, float] | None = None,
    resumes: bool = False,
    ranks: bool = False,
    log: bool = False,
    axes: "Axes | None" = None,
) -> "Axes":
    """Plots the normalized regret of each method, or its rank, against the budget of a task, with 95 % intervals.

    The normalized regret of a task is (y − best) / (worst − best), where y is the smallest outcome so far. It is at
    most 1, also before the first outcome. It is 0 if all outcomes of the task are equal. The budget is the sum of the
    fidelities of the trials so far (see `resumes`). It is the number of trials if all have the full budget. Only trials
    that are "COMPLETE" at the full budget have outcomes; the others only spend their budget.

    If trials have several outcomes, y is the first one. To compare searches by a Pareto front, replace the outcome of
    each trial by the negative hypervolume of the trials so far: see "Black boxes" in the documentation.

    Args:
      runs: method -> its records of all tasks, as `blackbox.collect` returns them: in the order of the trials. Or
        method -> a list of R such lists, one for each repetition with another key. The regret of a task is then the
        mean over repetitions.
      bounds: task -> (best, worst) outcome, such as the smallest and largest outcome in a table of all configurations.
        By default they are the smallest and the largest outcome of the task in `runs`. The regret then depends on the
        methods that are compared.
      families: task -> its family, for near-duplicates and parts of one source. Tasks of a family are averaged first,
        and the interval is over families. By default, each task is its own family.
      constraints: name -> bound of other outcomes. A trial with a larger outcome only spends its budget. By default,
        all trials count, also those that the searcher's own constraints exclude.
      resumes: whether trials continued from their own checkpoints of lower fidelities, as in `collect(resumes=True)`.
        Then only the difference of the two fidelities counts as spent.
      ranks: whether to draw ranks instead: the methods are ranked by their regrets on each task, where 1 is the best,
        and ties share a rank. Among methods with a regret of 1, those without an outcome are the last.
      log: whether the axis of the regret is logarithmic. A regret of 0 is then not drawn.
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes, with one line per method: the mean over the n families, with the normal 95 % interval ±1.96 s/√n. A
      line ends where the first of the method's runs has spent its budget. Ranks end where the first of all runs does.

    Raises:
      ValueError: if there is no record, or methods or repetitions have different tasks.
      ValueError: if `bounds` are not finite and ascending, or a complete trial lacks the outcome of a constraint.
      ImportError: if matplotlib is not installed.
    """
    goals = make_goals(None, constraints)
    feasible = lambda records: records if goals is None else feasible_outcomes(records, goals)
    by_run = {name: [_by_task(feasible(run)) for run in _repetitions(records)] for name, records in runs.items()}
    tasks = sorted({task for repetitions in by_run.values() for run in repetitions for task in run})
    if not tasks:
        raise ValueError("`runs` has no record.")
    for name, repetitions in by_run.items():
        if missing := [task for task in tasks if any(task not in run for run in repetitions)]:
            raise ValueError(f"All runs must have the same tasks; {name!r} has no records of {missing}.")
    for task, (best, worst) in (bounds or {}).items():
        if not -math.inf < best <= worst < math.inf:
            raise ValueError(
                f"`bounds` of task {task!r} must be (best, worst), finite and ascending; got {best, worst}."
            )
    bounds = {**_bounds(by_run, tasks), **(bounds or {})}
    before = 1 + _NO_OUTCOME if ranks else 1.0
    curves = {
        name: _curves(repetitions, bounds, tasks, before, resumes) for name, repetitions in by_run.items()
    }  # [T, N]
    if ranks:
        curves = _ranked(curves)
    groups = [(families or {}).get(task, task) for task in tasks]
    axes = new_axes(axes, width=WITH_LEGEND)
    for number, (name, values) in enumerate(curves.items()):
        values = np.array([values[[g == group for g in groups]].mean(0) for group in dict.fromkeys(groups)])
        mean, half = values.mean(0), np.full(values.shape[1], np.nan)
        if len(values) > 1:
            half = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
        budget, look = np.arange(1, len(mean) + 1), line_style(number)
        axes.plot(budget, mean, **look, label=name)
        axes.fill_between(budget, mean - half, mean + half, color=look["color"], alpha=0.2, linewidth=0)
    if log and not ranks:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel("trials at the full budget, per task")
    axes.set_ylabel("mean rank (1: best)" if ranks else "normalized regret (0: best, 1: worst)")
    return legend_at_right(axes)


def _repetitions(records: Sequence) -> Sequence[Sequence[base.Record]]:
    return [records] if all(isinstance(record, base.Record) for record in records) else records


def _by_task(records: Sequence[base.Record]) -> dict[str, list[base.Record]]:
    by_task: dict[str, list[base.Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    return by_task


def _outcomes(records: Sequence[base.Record]) -> np.ndarray:
    """[n] the outcomes at the full budget, NaN for other trials."""
    return np.array([full_loss(record) for record in records], float)


def _bounds(by_run: Mapping[str, Sequence[Mapping]], tasks: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The smallest and the largest outcome of each task; NaN if it has none."""
    bounds = {}
    for task in tasks:
        values = np.concatenate([_outcomes(run[task]) for runs in by_run.values() for run in runs])
        values = values[np.isfinite(values)]
        bounds[task] = (values.min(), values.max()) if len(values) else (math.nan, math.nan)
    return bounds


def _curves(
    repetitions: Sequence[Mapping[str, Sequence[base.Record]]],
    bounds: Mapping[str, Any],
    tasks: Sequence[str],
    before: float,
    resumes: bool,
) -> np.ndarray:
    """[T, N] the mean regret over repetitions, after budgets of 1 ... N trials: as many as each run has spent."""
    spent = [_spent(records, resumes)[-1] for run in repetitions for records in run.values()]
    budgets = np.arange(1, math.floor(min(spent) + 1e-6) + 1)
    regret_of = lambda run, task: _regrets(run[task], _spent(run[task], resumes), bounds[task], budgets, before)
    regrets = [[regret_of(run, task) for task in tasks] for run in repetitions]
    return np.mean(regrets, 0)


def _spent(records: Sequence[base.Record], resumes: bool) -> np.ndarray:
    """[n] the budget of the first trial, of the first two, ..., of all n."""
    paid: dict[int, float] = {}  # the highest fidelity of each trial so far
    costs = []
    for record in records:
        before = paid.get(record.trial, 0.0) if resumes else 0.0
        costs.append(max(record.fidelity - before, 0.0))
        paid[record.trial] = max(record.fidelity, before)
    return np.cumsum(costs)


def _regrets(
    records: Sequence[base.Record], spent: np.ndarray, bounds: tuple[float, float], budgets: np.ndarray, before: float
) -> np.ndarray:
    """[N] the normalized regret of one run on one task; it is `before` until the first outcome, and then at most 1."""
    best, worst = bounds
    outcomes = _outcomes(records)
    regrets = (outcomes - best) / (worst - best) if worst > best else np.zeros(len(outcomes))
    regrets = np.where(np.isnan(outcomes), before, np.minimum(regrets, 1.0))
    regrets = np.minimum.accumulate(np.append(before, regrets))
    return regrets[np.searchsorted(spent, budgets + 1e-6)]


def _ranked(curves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The ranks of M methods [M, T, N] on each task, after as many trials as all of them have."""
    from scipy import stats

    shortest = min(values.shape[1] for values in curves.values())
    # Equal means over repetitions differ by rounding.
    stacked = np.stack([values[:, :shortest] for values in curves.values()]).round(9)
    return dict(zip(curves, stats.rankdata(stacked, axis=0), strict=True))


def importance(
    records: Sequence[base.Record],
    space: base.PyTree,
    *,
    outcome: str | None = None,
    seed: int = 0,
    axes: "Axes | None" = None,
) -> "Axes":
    """Plots the importance of each hyperparameter: its share of the variance of the outcomes over the space (fANOVA).

    Optuna fits a forest to the trials of one task, and integrates it over the whole space. The share of a
    hyperparameter is the variance of its main effect, divided by the variance of the forest. Hyperparameters on a
    logarithmic scale are integrated on this scale. The last row is the rest: interactions, and noise that the forest
    fits. Shares from a few dozen trials are unreliable. So are shares from trials that a searcher has concentrated in
    one region; use random trials.

    For a learned `blackbox.MetaOptimizer` g, you need no trials: draw configurations of its space, and make records of
    the predictions `g.outcomes(configurations).mean`.

    Args:
      records: trials that are "COMPLETE" at the full budget have outcomes; others are ignored.
      space: the space of the configurations. A hyperparameter that some of these trials do not have, such as a
        conditional one, belongs to the rest.
      outcome: the name of one outcome, if trials have several; None takes the first one.
      seed: the seed of the forest, below 2³².
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes, with one row per hyperparameter, the largest share first: the mean over tasks, with the normal 95 %
      interval ±1.96 s/√T. There is no interval for one task.

    Raises:
      ValueError: if a record is invalid or does not fit the space, or a complete trial lacks the `outcome`.
      RuntimeError: (by Optuna) if the outcomes of a task are all equal.
      ImportError: if matplotlib, Optuna or scikit-learn is not installed.

    Source: Hutter, Hoos & Leyton-Brown, ICML 2014, https://proceedings.mlr.press/v32/hutter14.html, by
    `optuna.importance.FanovaImportanceEvaluator`.
    """
    optuna = _extras.require("optuna", "examples", "The importance of hyperparameters")
    # Optuna's fANOVA explains one outcome.
    single = [r._replace(outcomes=None) for r in records] if outcome is None else records_of_outcome(records, outcome)
    shares_of = lambda own: _extras.quietly(optuna, lambda: _shares(optuna, own, space, seed))
    by_task = [shares_of(own) for own in _by_task(single).values()]
    names = list(dict.fromkeys(name for shares in by_task for name in shares))
    values = np.array([[shares.get(name, 0.0) for name in names] for shares in by_task])  # [T, H]
    order = np.argsort(-values.mean(0), kind="stable")
    names, values = [names[i] for i in order], values[:, order]
    values = np.column_stack([values, 1 - values.sum(1)])
    halves = np.full(values.shape[1], np.nan)
    if len(values) > 1:
        halves = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
    rows = [*names, "interactions and noise"]
    label = "share of variance" + (f", mean over {len(values)} tasks" if len(values) > 1 else "")
    axes = rows_of_means(rows, values.mean(0).tolist(), halves.tolist(), axes=axes, xlabel=label, highlight=rows[-1:])
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    return axes


def _shares(optuna: Any, records: Sequence[base.Record], space: base.PyTree, seed: int) -> dict[str, float]:
    """The share of each hyperparameter on one task."""
    study = optuna.create_study()
    for trial in blackbox.to_optuna_study(records, space).get_trials():
        if trial.state.name == "COMPLETE" and math.isfinite(trial.value):
            study.add_trial(_on_linear_scales(optuna, trial))
    return optuna.importance.FanovaImportanceEvaluator(seed=seed).evaluate(study)


def _on_linear_scales(optuna: Any, trial: Any) -> Any:
    """The trial with the logarithms of its logarithmic parameters: Optuna integrates over the parameters themselves."""
    values, distributions = dict(trial.params), dict(trial.distributions)
    for name, distribution in trial.distributions.items():
        if getattr(distribution, "log", False):
            low, high = math.log(distribution.low), math.log(distribution.high)
            distributions[name] = optuna.distributions.FloatDistribution(low, high)
            values[name] = min(max(math.log(values[name]), low), high)
    return optuna.trial.create_trial(value=trial.value, params=values, distributions=distributions)
