"""Compares the accuracies that a search reports with those after training from scratch.

Every searched architecture has three accuracies, which `search_report` compares:

- of the supernet with the mixing weights that the architecture was decoded from,
- of the architecture with the supernet's weights (one-hot mixing weights),
- of the architecture trained from scratch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ArchitectureScores(NamedTuple):
    """Accuracies of one architecture on the same rows, each in [0, 1], as from `TrainedNetwork.accuracy`.

    Attributes:
      name: the architecture's name.
      inherited: accuracy with the supernet's weights (one-hot mixing weights).
      retrained: accuracies after training from scratch, one per seed.
      mixed: accuracy of the supernet with the mixing weights that the architecture was decoded from; NaN if the
        architecture does not come from a search. If only one op per edge was trained (GDAS), compute this accuracy with
        a `nas.supernet` of the same spec without `single_path`.
    """

    name: str
    inherited: float
    retrained: tuple[float, ...]
    mixed: float = math.nan


class SearchReport(NamedTuple):
    """The result of `search_report`, which describes the fields."""

    correlation: float
    interval: tuple[float, float]
    discretization_gap: float
    evaluation_gap: float
    text: str


def search_report(scores: Sequence[ArchitectureScores]) -> SearchReport:
    """Compares the search's ranking of architectures with their ranking after training from scratch.

        interval = tanh(artanh ρ ± 1.96 √((1 + ρ²/2) / (n − 3)))

    Args:
      scores: at least one. A single architecture has no ranks: the report then shows only the gaps.

    Returns:
      A `NamedTuple`:

      - `correlation`: Spearman's rank correlation of `inherited` with the mean of `retrained`, over architectures.
        It is NaN for a single architecture, and if one side is constant.
      - `interval`: its 95 % interval; NaN for fewer than five architectures.
      - `discretization_gap`: the mean of mixed − inherited, over architectures with a finite `mixed`.
      - `evaluation_gap`: the mean of retrained − inherited, over all architectures.
      - `text`: the whole report as a table in Markdown.

    Raises:
      ValueError: if an accuracy is not in [0, 1].

    Source: Bonett & Wright, Psychometrika 65, 2000, for the interval; Yu et al., ICLR 2020,
    https://arxiv.org/abs/1902.08142, for the question

    A small example of all steps after a search:

    >>> import jax, numpy as np, optax
    >>> from metaopt import base, nas, training
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    >>> network = nas.Network({"cell": cell}, (nas.Layer("cell", 8),), num_outputs=2)
    >>> x = np.random.default_rng(0).normal(size=(64, 3))
    >>> y = (x[:, 0] * x[:, 1] > 0).astype(int)
    >>> task = base.Task({"x": x[:32], "y": y[:32]}, {"x": x[32:], "y": y[32:]})
    >>> search = nas.darts(network, (3,), ops=nas.BLOCKS, order="first")
    >>> result = training.fit(
    ...     training.learner(search.estimator, optax.adam(0.1)),
    ...     lambda key: task,
    ...     num_steps=10,
    ...     progress=False,
    ...     hyperparams=search.hyperparams(jax.random.key(0)),
    ...     key=jax.random.key(1),
    ... )
    >>> alpha = search.selected_alpha(result)
    >>> genotype = search.genotype(alpha)  # `nas.genotype_to_text` keeps it

    Train from scratch (without the auxiliary head, because no layer has a stride):

    >>> small = nas.discrete(network, genotype)
    >>> alone = nas.retraining(
    ...     small, (3,), ops=nas.BLOCKS, num_steps=20, batch_size=16, auxiliary=0
    ... )
    >>> state, losses = nas.train_loop(
    ...     alone.loop,
    ...     task.train,
    ...     num_steps=alone.num_steps,
    ...     key=jax.random.key(2),
    ...     progress=False,
    ... )

    >>> trained = alone.finish(state, task.train)  # `metaopt.save` writes it
    >>> trained.predict(x[:1]).shape
    (1,)

    The three accuracies (a real evaluation uses a third part of the rows, which neither search nor training has seen):

    >>> shared = result.state.estimator_state.inner.params  # the supernet's weights
    >>> supernet = lambda weights: nas.trained_network(
    ...     search.supernet, shared, task.train, weights=weights
    ... )
    >>> scores = nas.ArchitectureScores(
    ...     "found",
    ...     inherited=supernet(nas.one_hot(network, genotype)).accuracy(task.valid),
    ...     retrained=(trained.accuracy(task.valid),),
    ...     mixed=supernet(search.weights(alpha)).accuracy(task.valid),
    ... )
    >>> print(nas.search_report([scores]).text)  # doctest: +ELLIPSIS
    |  | supernet, mixed | supernet's weights, discrete | retrained | mixed − discrete | seeds |
    | --- | --- | --- | --- | --- | --- |
    | found | ... | ... | ... | ... | 1 |
    <BLANKLINE>
    Accuracies in %. Rank correlation (Spearman) ... undefined, one architecture has no ranks. Discretization gap ...
    """
    scores = list(scores)
    for score in scores:
        for value in (score.inherited, score.mixed, *score.retrained):
            if value < 0 or value > 1 + 1e-6:  # False for NaN, which is allowed
                raise ValueError(
                    f"Accuracies must be in [0, 1], as `TrainedNetwork.accuracy`; got {value} of {score.name!r}. "
                    "Divide percentages by 100."
                )
    inherited = np.array([score.inherited for score in scores])
    retrained = np.array([np.mean(score.retrained) for score in scores])
    mixed = np.array([score.mixed for score in scores])
    correlation, interval = _rank_correlation(inherited, retrained)
    searched = np.isfinite(mixed)
    discretization = float((mixed - inherited)[searched].mean()) if searched.any() else math.nan
    evaluation = float((retrained - inherited).mean())
    text = "\n".join([*_table(scores), "", _summary(len(scores), correlation, interval, discretization, evaluation)])
    return SearchReport(correlation, interval, discretization, evaluation, text)


def _rank_correlation(inherited: np.ndarray, retrained: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Returns Spearman's correlation and its 95 % interval, NaN where they are undefined."""
    if np.ptp(inherited) == 0 or np.ptp(retrained) == 0:
        return math.nan, (math.nan, math.nan)
    from scipy.stats import spearmanr

    rho = float(np.asarray(spearmanr(inherited, retrained))[0])
    if len(inherited) < 5:
        return rho, (math.nan, math.nan)
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(inherited) - 3))
    center = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    return rho, (math.tanh(center - half), math.tanh(center + half))


def _table(scores: Sequence[ArchitectureScores]) -> list[str]:
    """Returns the lines of a Markdown table with one row for each architecture."""
    header = ["", "supernet, mixed", "supernet's weights, discrete", "retrained", "mixed − discrete", "seeds"]
    rows = [header, ["---"] * len(header)]
    percent = lambda value: "" if math.isnan(value) else f"{100 * value:.1f}"
    for score in scores:
        spread = f" ± {100 * np.std(score.retrained, ddof=1):.1f}" if len(score.retrained) > 1 else ""
        rows.append(
            [
                score.name,
                percent(score.mixed),
                percent(score.inherited),
                percent(float(np.mean(score.retrained))) + spread,
                percent(score.mixed - score.inherited),
                f"{len(score.retrained)}",
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows]


def _summary(num: int, correlation: float, interval: tuple[float, float], discretization: float, evaluation: float):
    """Returns the sentences below the table."""
    if math.isnan(correlation):
        ranks = "undefined, " + ("one side is constant" if num > 1 else "one architecture has no ranks")
    else:
        ranks = f"{correlation:.2f}"
    if not math.isnan(interval[0]):
        ranks += f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})"
    gap = "unknown" if math.isnan(discretization) else f"{100 * discretization:.1f} points"
    return (
        f"Accuracies in %. Rank correlation (Spearman) of discrete with retrained over {num} "
        f"architecture{'s' if num > 1 else ''}: {ranks}. Discretization gap (mixed − discrete, of the searched "
        f"ones): {gap}; retrained − discrete, of all: {100 * evaluation:.1f} points."
    )
