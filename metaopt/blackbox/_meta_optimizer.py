"""Trains g and h, predictors of hyperparameters and of architectures, on records of earlier trials."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import base, spaces
from metaopt.blackbox import _surrogates
from metaopt.blackbox._datasets import check_datasets, features_of_datasets, is_dataset
from metaopt.blackbox._earlier_trials import (
    as_records,
    by_task,
    check_task_names,
    costs_by_task,
    features_by_task,
    inferred_space,
    stands_for_nothing,
    warn_of_foreign,
)
from metaopt.blackbox._encoding import encoder
from metaopt.blackbox._fit_networks import fit_deep_kernels, fit_transformers
from metaopt.blackbox._fit_surrogate import (
    at_least_smooth,
    fit_attention,
    fit_embedding,
    fit_kernel,
    reference_configurations,
    stacked_rows,
)
from metaopt.blackbox._fitting import Budget
from metaopt.blackbox._goals import Goals, goals_of_records, records_of_outcome
from metaopt.blackbox._meta_search import MetaOptimizer, effective_tasks, meta_optimizer
from metaopt.blackbox._new_trials import as_configurations

_log = logging.getLogger(__name__)


def train_meta_optimizer(
    records: Iterable[base.Record],
    *,
    space: base.PyTree = None,
    features: Mapping[str, Any] | None = None,
    datasets: Mapping[str, Any] | None = None,
    families: Mapping[str, Any] | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    num_members: int = 8,
    num_steps: int = 150,
    max_reference: int = 512,
    deep_kernels: int = 0,
    deep_share: float = 0.5,
    transformers: int = 0,
    transformer_share: float = 0.5,
    costs: bool = False,
    objectives: Sequence[str] | None = None,
    constraints: Mapping[str, float] | None = None,
    progress: bool | None = None,
    key: jax.Array | None = None,
) -> MetaOptimizer:
    """Learns from records of earlier tasks to predict λ for a new task, and to propose trials on it.

    It learns three parts, each by `training.fit` over `hypergrad.direct` or in closed form:

    - A kernel between configurations. The loss is the marginal likelihood of the tasks' outcomes.
    - The outcomes of every configuration on every earlier task, with mean and covariance over tasks.
    - The weights of earlier tasks, as a function of a task's features. This is an ensemble of bootstrapped members. The
      loss is the regret of the configuration that would have been chosen for each task, with its family left out.

    `deep_kernels` adds Gaussian processes whose mean and kernel see configurations and the task's features through a
    network. They are meta-learned by the marginal likelihood of the tasks' outcomes. A few steps adapt them to a new
    task's trials (FSBO).

    `transformers` adds networks that read the trials of a task as a set and predict the outcome of another trial. They
    need no adaptation (a prior-fitted network, or transformer neural process). Expected outcomes and acquisition values
    are then weighted means of transformers and Gaussian processes. Thompson sampling draws one of the two.

    `predict` minimizes, by gradient descent over the relaxed space from several starts, or over the candidates,

        w m(c) + (1 − w) √v (1 − k(c, c₀)),    w = E / (E + 7),

    Here m is the weighted mean outcome, c₀ the space's default, k the kernel, and v the variance of outcomes within a
    task. E is the number of earlier tasks, where a task with few trials counts as a fraction of a task. With records of
    one or two tasks, `predict` returns the default or a configuration near it. With many tasks it returns the minimum
    of m. `MetaOptimizer.evidence` has the numbers, and the log warns if w < 0.5. If candidates do not hold the default,
    w is 1.

    The searcher's first trial is the space's default. With `first=()`, or if candidates do not hold the default, it is
    the configuration of `predict`. Later trials maximize an acquisition function, given the trials, in the same way.
    Without candidates, every fourth trial is random. With candidates, every eighth trial is the untried candidate that
    is farthest from all earlier trials. Both find configurations that the surrogate underrates. In a batch, and while
    other trials run, the score is the expected improvement that a trial adds to that of the running trials.

    After a few trials, the Gaussian processes give unrelated earlier tasks little weight. The share of transformers
    does not change. Outcomes of earlier tasks are normalized separately for each task. The scale of a new task's
    outcomes is unknown. The model weighs the scales of the earlier tasks and, in case the units differ, the scale that
    fits the new trials best.

    A task whose trials all have the same outcome, such as a task with one trial, is skipped. It does not show which
    configuration is better. A failed trial of the new task is treated as censored: its expected outcome is at least as
    bad as the worst finite outcome.

    Transformers read and predict failures. They read the best trials, the latest failures and the latest trials, up to
    the number that they were trained with (at most 32). They read running trials with the outcomes that the Gaussian
    processes expect.

    Args:
      records: trials of earlier tasks, or a data frame of them (`blackbox.records_to_frame`). Complete trials at full
        fidelity count. Failed trials count as bad. A complete trial without a finite outcome counts as failed, so give
        no records of trials that never ran. A warning names tasks that have outcomes, but none at the full budget.
        Tasks with other spaces are also used: names that the space does not have are ignored. A missing value, or None
        instead of a number, is at its default. A warning counts records with values that the space does not have
        (`spaces.foreign`). Of these, an unknown label is equally near to all labels, and a number out of bounds counts
        as the bound. A text or boolean instead of a number counts as the default. Remove such records if these
        replacements are wrong for them.
      space: the search space of λ, for new tasks. None infers it from the records' configurations and the candidates
        (`spaces.infer`). Ranges then go from the smallest to the largest value, choices have the observed values, and
        conditions follow from choices. A warning states the space, the missing values, and the number of
        configurations that support each condition.
      features: task name -> [F] numbers, NaN if unknown, for example by `tasks.fit_scaling(...).transform`. All
        features of a task without an entry are unknown. A warning is given if some tasks lack entries and some entries
        match no task.
      datasets: task name -> its labeled data, in place of `features`: a `tasks.Table`, or a pair (x, y) of rows [n, d]
        or images [n, height, width] or [n, height, width, channels], and n labels. A numeric target (floating-point,
        with fractions or more than 20 values) is cut into four classes. Thirteen meta-features describe a table (size,
        classes, correlation, information), and `tasks.image_features` describe images. The result then has
        `predict(x, y)`.
        Or: task name -> a dict like `train` of `tasks.to_task`. An embedding of the first 64 rows (as in
        `predictors.dataset_embedding`) is then trained jointly with the weights of tasks, and appended to the features.
        A new task must then have its `train`. Give a precomputed embedding as `features` instead.
      families: task name -> family. Tasks of one family (near-duplicates) are left out together while the weights of
        tasks are learned. By default, every task is its own family.
      candidates: configurations to choose from; None searches the space.
      num_members: size of the ensemble that reads features.
      num_steps: outer steps for the kernel, and for the ensemble; deep kernels and transformers take four times as
        many.
      max_reference: the largest number of configurations at which the learned outcomes of each earlier task are stored.
        If the records have more, a random subset is used.
      deep_kernels: number of deep kernels, which differ by their initialization; 0 trains none.
      deep_share: total prior probability of deep kernels, before a new task has trials; 1 uses nothing else.
      transformers: number of transformers, which differ by their initialization and whose predictions are averaged; 0
        trains none.
      transformer_share: weight of the transformers' predictions, whatever a new task's trials show. With 1, the
        Gaussian processes only impute the outcomes of failed and running trials.
      costs: whether to learn the cost of trials as well. The target is the logarithm of a record's `cost`, up to a
        factor for each task. `searcher(acquisition="ei_per_cost")` uses it: expected improvement per predicted cost
        (Snoek et al., 2012).
      objectives: the names of outcomes to minimize together, if the records have `outcomes`. None minimizes the
        `outcome`, which is the first one. `searcher` and `suggest` then maximize the expected improvement of the
        hypervolume that the trials dominate. Each outcome has its own surrogate, and outcomes count as independent. The
        hypervolume ends a tenth of the front's range above the front's worst values. It ends at least half of a range
        above the front's best values: the range of all trials, or the typical one of earlier tasks if that is larger.
        The choice does not depend on the units of objectives. If an objective varies over orders of magnitude, return
        its logarithm. `predict`, `portfolio` and `outcomes` use only the first objective.
      constraints: name -> the largest feasible value of another outcome. Scores are multiplied by the probability that
        the constraints hold. While no trial is feasible, this probability is the score.
      progress: as for `training.fit`, for each part.
      key: random key; `jax.random.key(0)` by default.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: if a share is not in [0, 1].
      ValueError: if a record is invalid (unknown status, fidelity outside (0, 1], or non-numeric outcome).
      ValueError: if `space` is None and cannot be inferred from the records.
      ValueError: if no record has an outcome at the full budget, or if all outcomes of every task are equal.
      ValueError: if `candidates` is empty, or a candidate does not fit the space.
      ValueError: (by NumPy) if features have different lengths.
      ValueError: if `features` or `families` have none of the records' tasks.
      ValueError: if `datasets` lacks a task of the records; if its entries have different forms; or if they are tables
        or images, and `features` are given too.
      KeyError: if a dict of `datasets` lacks an array of a task's rows.
      ValueError: if `costs` is True and no task has records of different costs.
      ValueError: if a complete trial lacks one of the `objectives` or `constraints`, or they are given with
        `transformers`.

    Source: Jomaa, Schmidt-Thieme & Grabocka, Dataset2Vec, DMKD 2021, https://arxiv.org/abs/1905.11063, for `datasets`;
      Wistuba & Grabocka, ICLR 2021, https://arxiv.org/abs/2101.07667, for `deep_kernels`;
      Müller et al., PFNs4BO, ICML 2023, https://arxiv.org/abs/2305.17535, and Nguyen & Grover, ICML 2022,
      https://arxiv.org/abs/2207.04179, for `transformers`;
      Emmerich, Deutz & Klinkenberg, CEC 2011, for `objectives`; Gardner et al., ICML 2014, for `constraints`.

    >>> import jax
    >>> from metaopt import blackbox, spaces
    >>> from metaopt.base import Record
    >>> space = {"x": spaces.interval(0.0, 1.0)}
    >>> # here a task's feature says where its best is
    >>> bests = {f"task {i}": i / 29 for i in range(30)}
    >>> loss = lambda configuration, best: (configuration["x"] - best) ** 2
    >>> tried = [{"x": i / 10} for i in range(11)]
    >>> records = [
    ...     Record(name, c, loss(c, best)) for name, best in bests.items() for c in tried
    ... ]
    >>> features = {name: [best] for name, best in bests.items()}
    >>> g = blackbox.train_meta_optimizer(
    ...     records, space=space, features=features, num_members=2, num_steps=60
    ... )
    >>> g.evidence.num_tasks, g.evidence.num_records, round(g.evidence.weight, 1)
    (30, 330, 0.8)
    >>> new_task = [0.8]  # its features, or `base.Task(train, valid, features)`
    >>> configuration = g.predict(new_task)
    >>> abs(configuration["x"] - 0.8) < 0.1
    True

    Fine-tuning with trials of the new task (use `g.suggest` if you keep the trials elsewhere):

    >>> searcher = g.searcher(new_task, first=[configuration])
    >>> state = searcher.init(jax.random.key(0), space)
    >>> (trial,), state = searcher.ask(state, 1)
    >>> trial.configuration == configuration
    True
    >>> outcome = loss(trial.configuration, 0.8)
    >>> # tell the outcome, and ask again
    >>> state = searcher.tell(state, [trial._replace(status="COMPLETE", outcome=outcome)])
    """
    _check_shares(deep_share=deep_share, transformer_share=transformer_share)
    if candidates is not None:
        candidates = as_configurations("candidates", candidates, space)
        if not len(candidates):
            raise ValueError("`candidates` is empty. Pass None to search the whole space.")
    records, goals, other_outcomes = _by_outcome(as_records(records), objectives, constraints)
    if goals is not None and transformers:
        raise ValueError("`transformers` predict one outcome; omit them, or `objectives` and `constraints`.")
    if space is None:
        space = inferred_space(records, candidates)
    warn_of_foreign(space, records)
    encode = encoder(space)
    names, trials = by_task(records, encode)
    if families is not None:
        check_task_names("families", families, names)
    family = [name if families is None else families.get(name, name) for name in names]
    reads, features, rows = _descriptions(names, features, datasets)
    key, budget = jax.random.key(0) if key is None else key, Budget(num_steps, progress)
    setup = _Setup(key, budget, candidates is None, max_reference, num_members)
    surrogate = _surrogate_of(setup, trials, family, features_by_task(names, features), rows)
    if deep_kernels:
        surrogate = _with_deep_kernels(setup, surrogate, trials, deep_kernels, deep_share)
    if transformers:
        surrogate = _with_transformers(setup, surrogate, trials, family, transformers, transformer_share)
    cost_surrogate = _cost_surrogate(setup, costs_by_task(records, encode)) if costs else None
    g = meta_optimizer(
        surrogate,
        cost_surrogate,
        space,
        candidates,
        num_records=sum(len(task.y) for task in trials),
        effective_tasks=effective_tasks(trials, surrogate.kernel, space, candidates),
        reads=reads,
        goals=goals,
        other_surrogates=_other_surrogates(setup, other_outcomes, encode, features, families),
    )
    _warn_of_little_evidence(g)
    return g


def train_meta_searcher(
    records: Iterable[base.Record],
    *,
    space: base.PyTree = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> MetaOptimizer:
    """`train_meta_optimizer` over a finite set: architectures of a benchmark, pipelines, configurations already tried.

    Args:
      records: as for `train_meta_optimizer`.
      space: the space of architectures. The kernel compares their encodings (`spaces.encode`). None infers the space,
        as in `train_meta_optimizer`.
      candidates: the architectures to choose from. By default, all architectures of the records, with only the names
        that the space has. Architectures with values that the space does not have (`spaces.foreign`) are excluded. If
        the space is inferred, so are architectures with None instead of a number.
      **kwargs: other arguments of `train_meta_optimizer`.

    Returns:
      A `MetaOptimizer` whose `predict`, `portfolio` and `searcher` return only candidates.

    Raises:
      ValueError: as for `train_meta_optimizer`, or if no record is a candidate.

    >>> from metaopt import blackbox, spaces
    >>> from metaopt.base import Record
    >>> space = {"model": spaces.choice(["forest", "svm", "linear"])}
    >>> losses = {
    ...     "iris": [0.1, 0.3, 0.3],
    ...     "wine": [0.2, 0.4, 0.4],
    ...     "digits": [0.5, 0.2, 0.4],
    ... }
    >>> records = [
    ...     Record(task, {"model": model}, loss)
    ...     for task, row in losses.items()
    ...     for model, loss in zip(["forest", "svm", "linear"], row)
    ... ]
    >>> h = blackbox.train_meta_searcher(records, space=space, num_steps=5)
    >>> h.predict(), h.portfolio(2)
    ({'model': 'forest'}, [{'model': 'forest'}, {'model': 'svm'}])
    """
    records = as_records(records)
    if candidates is not None:
        candidates = as_configurations("candidates", candidates, space)
    inferred = space is None
    if inferred:
        space = inferred_space(records, candidates)
    if candidates is None:
        tried = [record.configuration for record in records if not spaces.foreign(space, record.configuration)]
        if inferred:  # None instead of a number has an unknown meaning, so it is not a candidate
            tried = [c for c in tried if not any(stands_for_nothing(leaf, c, name) for name, leaf in space.items())]
        whole = [spaces.complete(space, configuration, strict=False) for configuration in tried]
        candidates = list({tuple(sorted(c.items(), key=lambda i: i[0])): c for c in whole}.values())
        if records and not candidates:
            raise ValueError(
                "No record can be a candidate: each has a value that the space does not have. Pass `candidates`. The "
                f"first record has {spaces.foreign(space, records[0].configuration)}."
            )
    return train_meta_optimizer(records, space=space, candidates=candidates, **kwargs)


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1]; got {share}.")


def _by_outcome(
    records: list[base.Record], objectives: Sequence[str] | None, constraints: Mapping[str, float] | None
) -> tuple[list[base.Record], Goals | None, dict[str, list[base.Record]]]:
    """The records of the first outcome, the goals, and the records of every other outcome by its name."""
    goals = goals_of_records(records, objectives, constraints)
    if goals is None:
        return records, None, {}
    first, *others = goals.names
    return records_of_outcome(records, first), goals, {name: records_of_outcome(records, name) for name in others}


def _descriptions(
    names: list[str], features: Mapping[str, Any] | None, datasets: Mapping[str, Any] | None
) -> tuple[str | None, Mapping[str, Any] | None, dict[str, jax.Array] | None]:
    """What describes the tasks.

    Returns:
      The kind of the datasets that the `MetaOptimizer` reads, if features are computed from them; task -> features; and
      the rows of all tasks, if an embedding of them is trained.
    """
    if datasets is not None:
        check_datasets(names, datasets)
    if datasets and all(map(is_dataset, datasets.values())):
        return *features_of_datasets(datasets, features), None
    return None, features, None if datasets is None else stacked_rows(names, datasets)


class _Setup(NamedTuple):
    """The settings that the parts of a learned optimizer share.

    Attributes:
      key: the key of the training.
      budget: number of steps of the kernel and of the weights of tasks.
      smooth: whether to bound the share of the outcome that is specific to a configuration (`at_least_smooth`). True
        without candidates.
      max_reference: maximum number of reference configurations.
      num_members: size of the ensemble that weights the tasks.
    """

    key: jax.Array
    budget: Budget
    smooth: bool
    max_reference: int
    num_members: int

    @property
    def keys(self) -> jax.Array:
        """[3] keys: for the kernel, for the weights of tasks, and for the reference configurations."""
        return jax.random.split(self.key, 3)

    @property
    def long_budget(self) -> Budget:
        """The budget of networks: four times as many steps."""
        return self.budget._replace(num_steps=4 * self.budget.num_steps)


def _surrogate_of(
    setup: _Setup,
    trials: list[_surrogates.TaskTrials],
    family: list[Any],
    features: np.ndarray | None,
    rows: dict[str, jax.Array] | None = None,
) -> _surrogates.Surrogate:
    """The surrogate of one outcome. If there are features or rows, its weights of tasks are fitted to them."""
    kernel_key, weights_key, reference_key = setup.keys
    kernel = fit_kernel(kernel_key, trials, setup.budget, smooth=setup.smooth)
    reference = reference_configurations(reference_key, trials, setup.max_reference)
    surrogate = _surrogates.surrogate(trials, kernel, reference, features=features)
    if rows is not None:
        return fit_embedding(weights_key, surrogate, rows, family, setup.num_members, setup.budget)
    if features is not None:
        return fit_attention(weights_key, surrogate, family, setup.num_members, setup.budget)
    return surrogate


def _warn_of_little_evidence(g: MetaOptimizer) -> None:
    if g.evidence.weight < 0.5:
        _log.warning(
            "The records have little weight in `predict` (%.2f): %d records of %d task%s count as %.1f tasks on which "
            "every configuration was tried. `predict` returns the default or a configuration near it. See "
            "`MetaOptimizer.evidence`.",
            g.evidence.weight,
            g.evidence.num_records,
            g.evidence.num_tasks,
            "" if g.evidence.num_tasks == 1 else "s",
            g.evidence.effective_tasks,
        )


def _other_surrogates(
    setup: _Setup, outcomes: Mapping[str, list[base.Record]], encode, features, families
) -> list[_surrogates.Surrogate]:
    """The surrogates of further outcomes, each with its own key."""
    surrogates = []
    for number, (outcome, records) in enumerate(outcomes.items()):
        names, trials = by_task(records, encode, f"records` of the outcome `{outcome}")
        own = setup._replace(key=jax.random.fold_in(setup.key, 6 + number))
        family = [name if families is None else families.get(name, name) for name in names]
        surrogates.append(_surrogate_of(own, trials, family, features_by_task(names, features)))
    return surrogates


def _with_deep_kernels(
    setup: _Setup, surrogate: _surrogates.Surrogate, trials: list[_surrogates.TaskTrials], num: int, share: float
) -> _surrogates.Surrogate:
    key = jax.random.fold_in(setup.key, 3)
    deep = fit_deep_kernels(key, trials, surrogate.features, num, setup.long_budget)
    deep = at_least_smooth(deep) if setup.smooth else deep
    return surrogate._replace(deep=deep, deep_share=float(share))


def _with_transformers(
    setup: _Setup,
    surrogate: _surrogates.Surrogate,
    trials: list[_surrogates.TaskTrials],
    family: list[Any],
    num: int,
    share: float,
) -> _surrogates.Surrogate:
    key = jax.random.fold_in(setup.key, 4)
    networks, num_shown = fit_transformers(key, trials, surrogate, family, num, setup.long_budget)
    return surrogate._replace(transformers=networks, transformer_share=float(share), max_shown=num_shown)


def _cost_surrogate(setup: _Setup, trials: list[_surrogates.TaskTrials]) -> _surrogates.Surrogate:
    kernel = fit_kernel(jax.random.fold_in(setup.key, 5), trials, setup.budget, smooth=True)
    reference = reference_configurations(setup.keys[2], trials, setup.max_reference)
    return _surrogates.surrogate(trials, kernel, reference)
