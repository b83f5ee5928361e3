"""Trains g and h on records of earlier trials: `train_meta_optimizer`, `train_meta_searcher`."""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base, hypergrad, predictors, spaces, training
from metaopt._progress import report_progress
from metaopt.blackbox import _deep_kernel, _posterior, _surrogates, _transformer
from metaopt.blackbox._earlier_trials import (
    as_records,
    by_task,
    costs_by_task,
    features_by_task,
    inferred_space,
    some,
    stands_for_nothing,
    warn_of_foreign,
)
from metaopt.blackbox._meta_search import (
    ROWS,
    MetaOptimizer,
    check_rows,
    effective_tasks,
    encoder,
    meta_optimizer,
)
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
    progress: bool | None = None,
    key: jax.Array | None = None,
) -> MetaOptimizer:
    """Learns from records of earlier tasks to predict λ for a new task, and to search on it with trials.

    It learns three parts, each by `training.fit` over `hypergrad.direct` or in closed form:

    - A kernel between configurations. The loss is the marginal likelihood of the tasks' outcomes.
    - The outcomes of every configuration on every earlier task, with mean and covariance over tasks
      (`blackbox.surrogate`).
    - The weights of earlier tasks, as a function of a task's features. This is an ensemble of bootstrapped members. The
      loss is the regret of the configuration that would have been chosen for each task, with its family left out
      (`blackbox.attention_loss`).

    `deep_kernels` adds Gaussian processes whose mean and kernel see configurations and the task's features through a
    network. They are meta-learned by the marginal likelihood of the tasks' outcomes (`blackbox.deep_kernel_loss`). A
    few steps adapt them to a new task's trials (FSBO).

    `transformers` adds networks that read the trials of a task as a set and predict the outcome of another trial
    (`blackbox.transformer_loss`). They need no adaptation (a prior-fitted network, or transformer neural process).
    Expected outcomes and acquisition values are then weighted means of transformers and Gaussian processes. Thompson
    sampling draws one of the two.

    `predict` minimizes, by gradient descent over the relaxed space from several starts, or over the candidates,

        w m(c) + (1 − w) √v (1 − k(c, c₀)),    w = E / (E + 7),

    Here m is the weighted mean outcome, c₀ the space's default, k the kernel, and v the variance of outcomes within a
    task. E is the number of earlier tasks, where a task with few trials counts as a fraction of a task. With records of
    one or two tasks, `predict` returns the default or a configuration near it. With many tasks it returns the minimum
    of m. `MetaOptimizer.evidence` has the numbers, and the log warns if w < 0.5. If candidates do not hold the default,
    w is 1.

    The searcher's first trial is the space's default. With `first=()`, or if candidates do not hold the default, it is
    the configuration of `predict`. Later trials maximize an acquisition function under `blackbox.posterior` in the
    same way. Without candidates, every fourth trial is random. With candidates, every eighth trial is the untried
    candidate that is farthest from all earlier trials. Both find configurations that the surrogate underrates. In a
    batch, and while trials run, expected improvement counts only what a trial adds to the running trials
    (`blackbox.batch_expected_improvement`).

    Records of unrelated tasks lose their weight after a few trials, except in the share of transformers. Outcomes of
    earlier tasks are normalized separately for each task. Outcomes of a new task are expected on the scales of earlier
    tasks, and on the scale that fits its own trials best, in case its units differ.

    A task whose trials all have the same outcome, such as a task with one trial, is skipped. It does not show which
    configuration is better. A failed trial of the new task is treated as censored: its expected outcome is no better
    than the worst finite one (`blackbox.censored_mean`).

    Transformers read and predict failures. They read the best trials, the latest failures and the latest trials, up to
    the number that they were trained with (at most `blackbox.MAX_SHOWN`). They read running trials with the outcomes
    that the surrogate's mixture expects.

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
      features: task name -> [F] numbers, NaN if unknown (`tasks.apply_scaling` of meta-features). All features of a
        task without an entry are unknown. A warning is given if some tasks lack entries and some entries match no task.
      datasets: task name -> its labeled rows, a dict like `train` of `tasks.to_task`. An embedding of the first 64 rows
        (`predictors.embed_rows`) is trained jointly with the weights of tasks, and appended to the features. A new task
        must then have its `train`. Give a precomputed embedding as `features` instead.
      families: task name -> family. Tasks of one family (near-duplicates) are left out together while the weights of
        tasks are learned. By default, every task is its own family.
      candidates: configurations to choose from; None searches the space.
      num_members: size of the ensemble that reads features.
      num_steps: outer steps for the kernel, and for the ensemble; deep kernels and transformers take four times as
        many.
      max_reference: maximum number of configurations at which the functions of tasks are stored. If more were tried, a
        random subset is used.
      deep_kernels: number of deep kernels, which differ by their initialization; 0 trains none.
      deep_share: total prior probability of deep kernels, before a new task has trials; 1 uses nothing else.
      transformers: number of transformers, which differ by their initialization and whose predictions are averaged; 0
        trains none.
      transformer_share: weight of the transformers' predictions, whatever a new task's trials show. With 1, the
        Gaussian processes only impute the outcomes of failed and running trials.
      costs: whether to learn the cost of trials as well. The target is the logarithm of a record's `cost`, up to a
        factor for each task. `searcher(acquisition="ei_per_cost")` uses it: expected improvement per predicted cost
        (Snoek et al., 2012).
      progress: as for `training.fit`, for each part.
      key: random key; `jax.random.key(0)` by default.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: if a count or a share is out of range.
      ValueError: if a record is invalid (unknown status, fidelity outside (0, 1], or non-numeric outcome).
      ValueError: if `space` is None and cannot be inferred from the records.
      ValueError: if no record has an outcome at the full budget, or if all outcomes of every task are equal.
      ValueError: if `candidates` is empty, or a candidate does not fit the space.
      ValueError: if features have different lengths.
      ValueError: if `features` or `families` have none of the records' tasks.
      ValueError: if `datasets` lacks a task of the records, or an entry of a task's rows.
      ValueError: if `costs` is True and no task has records of different costs.

    Source: Jomaa, Schmidt-Thieme & Grabocka, Dataset2Vec, DMKD 2021, https://arxiv.org/abs/1905.11063, for `datasets`;
      Wistuba & Grabocka, ICLR 2021, https://arxiv.org/abs/2101.07667, for `deep_kernels`;
      Müller et al., PFNs4BO, ICML 2023, https://arxiv.org/abs/2305.17535, and Nguyen & Grover, ICML 2022,
      https://arxiv.org/abs/2207.04179, for `transformers`.

    >>> import jax
    >>> from metaopt import Record, blackbox, spaces
    >>> space = {"x": spaces.interval(0.0, 1.0)}
    >>> bests = {f"task {i}": i / 29 for i in range(30)}  # here a task's feature says where its best is
    >>> loss = lambda configuration, best: (configuration["x"] - best) ** 2
    >>> tried = [{"x": i / 10} for i in range(11)]
    >>> records = [Record(name, c, loss(c, best)) for name, best in bests.items() for c in tried]
    >>> features = {name: [best] for name, best in bests.items()}
    >>> g = blackbox.train_meta_optimizer(records, space=space, features=features, num_members=2, num_steps=60)
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
    >>> state = searcher.tell(state, [trial._replace(status="COMPLETE", outcome=outcome)])  # and ask again
    """
    _checks.check_integer("num_members", num_members, 1)
    _checks.check_integer("num_steps", num_steps, 0)
    _checks.check_integer("max_reference", max_reference, 2)
    _checks.check_integer("deep_kernels", deep_kernels, 0)
    _checks.check_integer("transformers", transformers, 0)
    for name, share in (("deep_share", deep_share), ("transformer_share", transformer_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1]; got {share}.")
    if candidates is not None:
        candidates = as_configurations("candidates", candidates, space)
    if candidates is not None and not len(candidates):
        raise ValueError("`candidates` must hold a configuration, or be None to search the whole space; it is empty.")
    records = as_records(records)
    key = jax.random.key(0) if key is None else key
    kernel_key, attention_key, reference_key = jax.random.split(key, 3)
    if space is None:
        space = inferred_space(records, candidates)
    warn_of_foreign(space, records)
    encode = encoder(space)
    names, trials = by_task(records, encode)
    kernel = _fit_kernel(kernel_key, trials, num_steps, progress)
    if candidates is None:
        # A deviation specific to each configuration is learnable only in a finite set. In a continuous space every new
        # point would promise such a deviation, even a point next to the best one.
        kernel = kernel._replace(logit_smooth=jnp.maximum(kernel.logit_smooth, 5.0))
    num_records, num_effective = sum(len(task.y) for task in trials), effective_tasks(trials, kernel, space, candidates)
    known = features_by_task(names, features)
    if families is not None and not any(name in families for name in names):
        raise ValueError(f"`families` has none of the records' tasks, {some(names)}; its keys are {some(families)}.")
    surrogate = _surrogates.surrogate(trials, kernel, _reference(reference_key, trials, max_reference), features=known)
    family = [name if families is None else families.get(name, name) for name in names]
    if datasets is not None:
        rows = _stacked_rows(names, datasets)
        surrogate = _fit_embedding(attention_key, surrogate, rows, family, num_members, num_steps, progress)
    elif known is not None:
        attention = _fit_attention(attention_key, surrogate, family, num_members, num_steps, progress)
        surrogate = surrogate._replace(attention=attention)
    if deep_kernels:
        deep = _fit_deep_kernels(
            jax.random.fold_in(key, 3), trials, surrogate.features, deep_kernels, 4 * num_steps, progress
        )
        if candidates is None:
            deep = deep._replace(logit_smooth=jnp.maximum(deep.logit_smooth, 5.0))
        surrogate = surrogate._replace(deep=deep, deep_share=float(deep_share))
    if transformers:
        networks_key = jax.random.fold_in(key, 4)
        networks, num_shown = _fit_transformers(
            networks_key, trials, surrogate, family, transformers, 4 * num_steps, progress
        )
        share = float(transformer_share)
        surrogate = surrogate._replace(transformers=networks, transformer_share=share, max_shown=num_shown)
    cost_surrogate = None
    if costs:
        trials = costs_by_task(records, encode)
        kernel = _fit_kernel(jax.random.fold_in(key, 5), trials, num_steps, progress)
        kernel = kernel._replace(logit_smooth=jnp.maximum(kernel.logit_smooth, 5.0))
        cost_surrogate = _surrogates.surrogate(trials, kernel, _reference(reference_key, trials, max_reference))
    counts = {"num_records": num_records, "effective_tasks": num_effective}
    g = meta_optimizer(surrogate, cost_surrogate, space, candidates, **counts)
    if g.evidence.weight < 0.5:
        _log.warning(
            "g has learned from %d tasks with %d records, worth %.1f tasks on which every configuration was tried. "
            "`predict` returns the default or a configuration near it: the records have a weight of %.2f "
            "(`MetaOptimizer.evidence`).",
            *g.evidence,
        )
    return g


def train_meta_searcher(
    records: Iterable[base.Record],
    *,
    space: base.PyTree = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    **kwargs,
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

    >>> from metaopt import Record, blackbox, spaces
    >>> space = {"model": spaces.choice(["forest", "svm", "linear"])}
    >>> losses = {"iris": [0.1, 0.3, 0.3], "wine": [0.2, 0.4, 0.4], "digits": [0.5, 0.2, 0.4]}
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
                "Each of the `records` has a value that the space does not have, so that none is a candidate; give "
                f"`candidates`. The first one has {spaces.foreign(space, records[0].configuration)}."
            )
    return train_meta_optimizer(records, space=space, candidates=candidates, **kwargs)


def _reference(key, trials, max_reference: int) -> np.ndarray:
    """[M, D] tried configurations, or a random subset of them."""
    tried = np.unique(np.concatenate([task.x for task in trials]).round(6), axis=0)
    if len(tried) > max_reference:
        tried = tried[np.asarray(jax.random.permutation(key, len(tried)))[:max_reference]]
    return tried


def _fit_kernel(key, trials, num_steps: int, progress: bool | None) -> _surrogates.Kernel:
    """Fits the kernel by the marginal likelihood of some trials of some tasks at every step."""
    num_dims = trials[0].x.shape[1]
    start = _surrogates.Kernel(jnp.full(num_dims, -0.5), jnp.array(2.0), jnp.log(jnp.array(0.1)))
    usable = [task for task in trials if np.isfinite(task.y).sum() > 1]
    if not usable or num_dims == 0:
        return start

    def center(rng, s, x, y, mask):
        return x, (y - (y * mask).sum() / mask.sum()) * mask, mask

    sample_tasks = _sample_trials(usable, 64, center)
    return _fit("the kernel", _kernel_learner, sample_tasks, start, num_steps, key, progress)


# `training.fit` compiles the step of a learner once for each shape. We cache learners by `shapes`, so that training on
# other records of the same shapes, or with another key, does not compile again. The cache is small, since a learner's
# compiled programs are freed only with the learner.
_keep = functools.lru_cache(maxsize=2)


@_keep
def _kernel_learner(shapes) -> training.Learner:
    estimator = hypergrad.direct(lambda kernel, task, key: _surrogates.kernel_loss(kernel, task))
    return training.learner(hypergrad.over_tasks(estimator), optax.adam(0.05))


@_keep
def _deep_kernel_learner(shapes, num_steps: int) -> training.Learner:
    def loss(deep, task, key):
        return jax.vmap(lambda member: _deep_kernel.deep_kernel_loss(member, *task))(deep).sum()

    rate = optax.cosine_decay_schedule(3e-3, max(num_steps, 1))
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    return training.learner(hypergrad.over_tasks(hypergrad.direct(loss)), optimizer)


@_keep
def _transformer_learner(shapes, num_steps: int) -> training.Learner:
    def loss(transformers, task, key):
        return jax.vmap(lambda member: _transformer.transformer_loss(member, *task))(transformers).sum()

    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, max(num_steps // 20, 1), max(num_steps, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
    return training.learner(hypergrad.over_tasks(hypergrad.direct(loss)), optimizer)


@_keep
def _attention_learner(shapes) -> training.Learner:
    estimator = hypergrad.direct(lambda attention, data, key: _surrogates.attention_loss(attention, data))
    return training.learner(estimator, optax.adam(0.05))


@_keep
def _embedding_learner(shapes) -> training.Learner:
    def loss(hyperparams, batch, key):
        attention, params = hyperparams
        data, rows = batch
        found = _standardized(_embed(params, rows))[0]
        data = data | {"features": jnp.concatenate([data["features"], found], axis=1)}
        return _surrogates.attention_loss(attention, data)

    rates = optax.partition({"attention": optax.adam(0.05), "rows": optax.adam(3e-3)}, ("attention", "rows"))
    return training.learner(hypergrad.direct(loss), rates)


def _fit(part: str, make_learner, sample_tasks, start, num_steps: int, key, progress: bool | None, *settings):
    """Returns the parameters after training from `start`; `part` is their name in the log."""
    leaves, structure = jax.tree.flatten((start, sample_tasks(key)))
    learner = make_learner((structure, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)), *settings)
    options = {"hyperparams": start, "num_steps": num_steps, "key": key, "progress": progress}
    with report_progress(None, progress, f"learned {part}") as report, report.during(f"learning {part}"):
        fitted = training.fit(learner, sample_tasks, **options)
    return fitted.hyperparams


def _fit_deep_kernels(
    key, trials, features, num_members: int, num_steps: int, progress: bool | None
) -> _deep_kernel.DeepKernel:
    """Fits deep kernels by the marginal likelihood of few or many trials, with or without the task's features."""
    init_key, fit_key = jax.random.split(key)
    usable = np.array([s for s, task in enumerate(trials) if np.isfinite(task.y).sum() > 1])
    features = np.asarray(features)
    num_dims, num_features = trials[0].x.shape[1], features.shape[1]
    init = lambda key: _deep_kernel.init_deep_kernel(key, num_dims, num_features)
    start = jax.vmap(init)(jax.random.split(init_key, num_members))
    if not len(usable) or num_dims == 0:
        return start

    def with_features(rng, s, x, y, mask):
        few = np.arange(len(mask)) < rng.integers(2, len(mask) + 1)
        return (x, y, mask * few), features[usable[s]] * (rng.random() < 0.8)

    sample_tasks = _sample_trials([trials[s] for s in usable], 32, with_features)
    return _fit("deep kernels", _deep_kernel_learner, sample_tasks, start, num_steps, fit_key, progress, num_steps)


def _fit_transformers(key, trials, surrogate, family, num_members: int, num_steps: int, progress: bool | None):
    """Fits transformers on outcomes of some trials of a task, given zero, few or many others, more often good ones.

    Also returns the maximum number of trials of a task that they have read.
    """
    init_key, start_key, fit_key = jax.random.split(key, 3)
    features = np.asarray(surrogate.features)
    usable = [s for s, task in enumerate(trials) if np.isfinite(task.y).sum() > 1]
    init = lambda key: _transformer.init_transformer(key, trials[0].x.shape[1], features.shape[1])
    start = jax.vmap(init)(jax.random.split(init_key, num_members))
    if not usable:
        return start, _transformer.MAX_SHOWN
    outcomes = [_surrogates.normalize(trials[s].y)[0] for s in usable]
    # The choice of given trials may depend on the expectation from other families, but not on the task's own outcomes,
    # which are the targets.
    functions = jax.jit(lambda x: _posterior.functions_at(surrogate, x))
    _, of = np.unique([str(name) for name in family], return_inverse=True)
    expected = [mean_of_others(np.asarray(functions(jnp.asarray(trials[s].x))), of == of[s]) for s in usable]
    largest = max(len(y) for y in outcomes)
    num_shown = min(_transformer.MAX_SHOWN, largest - 1)
    num_asked = min(_transformer.MAX_SHOWN, largest)

    def sample_tasks(key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        batch = []
        for i in rng.integers(len(usable), size=16):
            x, y = trials[usable[i]].x, outcomes[i]
            good = -rng.uniform(0, 3) * expected[i] / max(expected[i].std(), 1e-9)
            order = np.argsort(-good - rng.gumbel(size=len(y)))
            few = min(int((num_shown + 1) * rng.random() ** 2), len(y) - 1)

            def padded(rows, size, x=x, y=y):
                pad = (0, size - len(rows))
                mask = np.pad(np.ones(len(rows)), pad)
                return np.pad(x[rows], (pad, (0, 0))), np.pad(y[rows], pad), mask

            shown, asked = padded(order[:few], num_shown), padded(order[few:][:num_asked], num_asked)
            batch.append((shown, asked, features[usable[i]] * (rng.random() < 0.8)))
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.result_type(float)), *batch)

    # Initialize the output bias with the log frequency of each bin. Bins without outcomes would otherwise dominate the
    # mean, since they lie far away.
    drawn = [sample_tasks(key) for key in jax.random.split(start_key, 32)]
    counts = np.ones(start.head_bias.shape[1]) / 10
    for shown, asked, _ in drawn:
        at = np.asarray(jax.vmap(_transformer.outcome_classes)(shown, asked))
        counts += np.bincount(at[np.asarray(asked[2]) > 0], minlength=len(counts))
    start = start._replace(head_bias=start.head_bias + jnp.log(jnp.asarray(counts / counts.sum()))[None])

    return _fit(
        "transformers", _transformer_learner, sample_tasks, start, num_steps, fit_key, progress, num_steps
    ), num_shown


def mean_of_others(functions: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """[P] the mean function over the tasks that are not left out; 0 if no task remains.

    `functions` [P, 1 + S] has f̄ and f_s − f̄. `left_out` [S] marks the tasks to leave out.
    """
    num = (~left_out).sum()
    return functions[:, 0] + functions[:, 1:][:, ~left_out].sum(1) / num if num else np.zeros(len(functions))


def _sample_trials(trials, num_trials: int, make, *, num_tasks: int = 16):
    """Returns `sample_tasks` for `fit`: it stacks `make(rng, s, x, y, mask)` of normalized trials of some tasks."""
    size = min(num_trials, max(int(np.isfinite(task.y).sum()) for task in trials))

    def sample_tasks(key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        batch = []
        for s in rng.integers(len(trials), size=num_tasks):
            y, _ = _surrogates.normalize(trials[s].y)
            rows = rng.permutation(np.flatnonzero(np.isfinite(y)))[:size]
            pad = (0, size - len(rows))
            x, mask = np.pad(trials[s].x[rows], (pad, (0, 0))), np.pad(np.ones(len(rows)), pad)
            batch.append(make(rng, s, x, np.pad(y[rows], pad), mask))
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.result_type(float)), *batch)

    return sample_tasks


def _fit_attention(key, surrogate, family, num_members: int, num_steps: int, progress: bool | None):
    """Fits an ensemble whose members each weigh the families with their own random weights."""
    init_key, boot_key, fit_key = jax.random.split(key, 3)
    data = _attention_data(boot_key, surrogate, family, num_members)
    if data is None:
        return _surrogates.init_attention(init_key, 0, surrogate.features.shape[1])
    start = _surrogates.init_attention(init_key, num_members, surrogate.features.shape[1])
    return _fit("the weights of tasks", _attention_learner, lambda key: data, start, num_steps, fit_key, progress)


def _attention_data(key, surrogate, family, num_members: int):
    """The data for `attention_loss`; None if there is only one family, since no other family is left to learn from."""
    _, of = np.unique([str(name) for name in family], return_inverse=True)
    size = np.bincount(of)
    if len(size) < 2:
        return None
    draws = jax.random.exponential(key, (num_members, len(size)))[:, of] / np.sqrt(size)[of][None]
    return {
        "features": surrogate.features,
        "curves": surrogate.curves,
        "same_family": jnp.asarray(of[:, None] == of[None]),
        "weights": draws / draws.sum(1, keepdims=True),
    }


def _fit_embedding(
    key, surrogate, rows, family, num_members: int, num_steps: int, progress: bool | None, *, num_tasks: int = 32
):
    """Fits the embedding of rows jointly with the weights of tasks.

    Each step sees a subset of tasks. For each of them, its family is left out of this subset.
    """
    init_key, boot_key, fit_key, embedding_key = jax.random.split(key, 4)
    data = _attention_data(boot_key, surrogate, family, num_members)
    params = predictors.init_embedding(embedding_key)
    width = len(params["embedding"])
    attention = _surrogates.init_attention(init_key, num_members, surrogate.features.shape[1] + width)
    if data is None:
        attention = _surrogates.init_attention(init_key, 0, surrogate.features.shape[1] + width)
    else:

        def sample_tasks(key):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(family)))
            at, same = order[: min(num_tasks, len(family))], np.asarray(data["same_family"])
            if same[at[0], at].all():  # more than one family must be among them
                at = np.append(at[:-1], next(i for i in order if not same[at[0], i]))
            weights = data["weights"][:, at]
            some = {"features": data["features"][at], "curves": data["curves"][at]}
            some |= {"same_family": data["same_family"][at][:, at]}
            some |= {"weights": weights / weights.sum(1, keepdims=True)}
            return some, jax.tree.map(lambda leaf: leaf[at], rows)

        attention, params = _fit(
            "the embedding of rows", _embedding_learner, sample_tasks, (attention, params), num_steps, fit_key, progress
        )
    found, center, scale = _embed_all(params, rows)
    return surrogate._replace(
        attention=attention,
        features=jnp.concatenate([surrogate.features, found], axis=1),
        embedding=_surrogates.Embedding(params, center, scale),
    )


def _embed(params, rows):
    """[S, W] embeddings of the rows of S tables."""
    return jax.vmap(lambda data: predictors.embed_rows(params, data, max_rows=_surrogates.MAX_ROWS))(rows)


def _standardized(raw):
    """Standardizes over tasks; also returns the centers and scales."""
    center, scale = raw.mean(0), jnp.sqrt(raw.var(0) + 1e-6)
    return (raw - center[None]) / scale[None], center, scale


@jax.jit
def _embed_all(params, rows):
    return _standardized(_embed(params, rows))


def _stacked_rows(names, datasets) -> dict[str, jax.Array]:
    """[S, ...] the rows that the embedding reads, with columns and classes padded to a common size."""
    if missing := [name for name in names if name not in datasets]:
        raise ValueError(
            f"`datasets` must hold the rows of each task of the records that teaches; it lacks {some(missing)}."
        )
    kept = ROWS
    for name in names:
        check_rows(f"`datasets[{name!r}]`", datasets[name])
    cut = [
        {k: np.asarray(datasets[n][k])[: _surrogates.MAX_ROWS if k in kept[:3] else None] for k in kept} for n in names
    ]
    largest = {k: np.max([of[k].shape for of in cut], axis=0) for k in kept}
    pad = lambda k, leaf: np.pad(leaf, [(0, n - have) for n, have in zip(largest[k], leaf.shape, strict=True)])
    return {
        k: jnp.asarray(np.stack([pad(k, of[k]) for of in cut]), None if k == "y" else jnp.result_type(float))
        for k in kept
    }
