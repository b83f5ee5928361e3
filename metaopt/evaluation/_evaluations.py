"""Summaries of methods' scores on the same episodes: means, paired differences, ranks and tables."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Evaluation(NamedTuple):
    """The scores of `M` methods on `E` episodes of each of several sources.

    Attributes:
      scores: method -> source -> [E, T + 1], after 0..T adaptation steps; each method has its own T.
      num_ways: source -> [E]; 1 if there are no classes.
      num_shots: source -> [E], support examples per way, on average.
      transductive: method -> whether its output for one query example depends on the others.
      higher_is_better: True for scores such as an accuracy, False for errors.
      marks: source -> [E], a number computed from the data of each episode. `join_evaluations` compares them to detect
        different episodes.
      score: the name of `score_fn`, such as "accuracy"; "" if it is not known.
    """

    scores: dict[str, dict[str, np.ndarray]]
    num_ways: dict[str, np.ndarray]
    num_shots: dict[str, np.ndarray]
    transductive: dict[str, bool]
    higher_is_better: bool = True
    marks: dict[str, np.ndarray] = {}
    score: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self.num_ways)


def join_evaluations(first: Evaluation, second: Evaluation) -> Evaluation:
    """Joins two evaluations of different methods on the same episodes, for example one that `metaopt.load` has read.

    Args:
      first: a result of `few_shot.evaluate_episodes`.
      second: a result with the same key, the same samplers and the same number of episodes, for other methods. Equal
        `marks` show that the episodes are the same. If neither evaluation has marks, only the numbers of ways and shots
        are compared. Scores are compared by the names of their functions, if both evaluations have them.

    Returns:
      An `Evaluation` of both, starting with the first's methods, as if all had been evaluated together.

    Raises:
      ValueError: if sources, episodes or scores differ, or if a method is in both.
    """
    shared_methods = [name for name in second.scores if name in first.scores]
    if shared_methods:
        raise ValueError(f"The method {shared_methods[0]!r} is in both evaluations: give one of them another name.")
    if first.higher_is_better != second.higher_is_better:
        raise ValueError("The evaluations cannot be compared: one has accuracies and the other errors.")
    if first.score and second.score and first.score != second.score:
        raise ValueError(
            f"The evaluations cannot be compared: their scores are {first.score!r} and {second.score!r}. Evaluate both "
            "with one `score_fn`; if only its name differs, give one evaluation the other's (`_replace(score=...)`)."
        )
    for field in ("num_ways", "num_shots", "marks"):
        first_numbers, second_numbers = getattr(first, field), getattr(second, field)
        if set(first_numbers) != set(second_numbers):
            raise ValueError(
                f"The evaluations must be of the same sources; got `{field}` of {[*first_numbers]} and "
                f"{[*second_numbers]}."
            )
        for source, numbers in first_numbers.items():
            others = second_numbers[source]
            # Marks of different episodes differ by far more than by rounding on another machine. (A NaN equals
            # nothing.)
            tolerance = 1e-2 * np.std(numbers) + 1e-6 * np.max(np.abs(numbers))
            if len(numbers) != len(others) or not np.all(np.abs(numbers - others) <= tolerance):
                raise ValueError(
                    f"The episodes of source {source!r} are not the same (their `{field}` differ): evaluate both with "
                    "one key, one sampler and one number of episodes."
                )
    return first._replace(
        scores={**first.scores, **second.scores},
        transductive={**first.transductive, **second.transductive},
        score=first.score or second.score,
    )


def _scores_after(evaluation: Evaluation, method: str, source: str, step: int) -> np.ndarray:
    """Returns [E], the scores after `step` steps, or after the method's last step if it takes fewer."""
    if step < -1:
        raise ValueError(f"`step` must be a number of steps, or -1 for a method's last; got {step!r}.")
    scores = np.asarray(evaluation.scores[method][source], np.float64)  # squares of large scores do not overflow
    return scores[:, step] if step < scores.shape[1] else scores[:, -1]


def _mean(scores: np.ndarray) -> tuple[float, float]:
    """Returns the mean and half of its normal 95 % interval: NaN for a single score, or if a score is not finite."""
    if len(scores) < 2 or not np.isfinite(scores).all():
        with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN
            return float(scores.mean()), math.nan
    return float(scores.mean()), float(1.96 * scores.std(ddof=1) / math.sqrt(len(scores)))


def _differences(evaluation: Evaluation, method: str, reference: str, source: str, step: int) -> np.ndarray:
    """Returns [E] differences to the reference, NaN where both diverge."""
    with np.errstate(invalid="ignore"):
        return _scores_after(evaluation, method, source, step) - _scores_after(evaluation, reference, source, step)


def mean_scores(evaluation: Evaluation, *, step: int = -1) -> dict[str, dict[str, tuple[float, float]]]:
    """Computes the mean score of every method on every source.

    Args:
      evaluation: a result of `few_shot.evaluate_episodes`.
      step: the number of adaptation steps. −1 means after the last step of each method. So does a number that is larger
        than a method's number of steps.

    Returns:
      Method -> source -> (mean, half of the normal 95 % interval, 1.96 s / √E). The second is NaN for a single episode
      and for a method that diverges.
    """
    return {
        method: {source: _mean(_scores_after(evaluation, method, source, step)) for source in evaluation.sources}
        for method in evaluation.scores
    }


def paired_differences(
    evaluation: Evaluation, reference: str, *, step: int = -1
) -> dict[str, dict[str, tuple[float, float]]]:
    """Subtracts the score of a reference method, episode by episode. So the difficulty of an episode cancels.

    A positive difference is better if the score is an accuracy, and worse if it is an error.

    Args:
      evaluation: a result of `few_shot.evaluate_episodes`.
      reference: the method that the others are compared with.
      step: as for `mean_scores`.

    Returns:
      Method -> source -> (mean difference of the scores, half of its 95 % interval).

    Raises:
      KeyError: if `reference` is not one of the methods.
    """
    return {
        method: {
            source: _mean(_differences(evaluation, method, reference, source, step)) for source in evaluation.sources
        }
        for method in evaluation.scores
    }


def average_ranks(evaluation: Evaluation, *, step: int = -1) -> dict[str, float]:
    """Ranks all methods by their mean score on each source, and averages the ranks; 1 is best, and ties share a rank.

    Inductive methods are ranked among themselves. So are transductive methods, which use more information.

    Args:
      evaluation: a result of `few_shot.evaluate_episodes`.
      step: as for `mean_scores`.

    Returns:
      Method -> rank: the inductive methods, best first, then the transductive ones, best first.
    """
    sign = -1 if evaluation.higher_is_better else 1
    means = mean_scores(evaluation, step=step)
    ranks: dict[str, float] = {}
    for transductive in (False, True):
        names = [name for name in means if evaluation.transductive[name] == transductive]
        if not names:
            continue
        losses = [[sign * mean for mean, _ in means[name].values()] for name in names]
        losses = np.nan_to_num(np.array(losses), nan=np.inf)  # [methods, sources]
        better = (losses[None] < losses[:, None]).sum(axis=1)
        equal = (losses[None] == losses[:, None]).sum(axis=1)
        mean_ranks = (better + (equal + 1) / 2).mean(axis=1).tolist()
        ranks |= sorted(zip(names, mean_ranks, strict=True), key=lambda pair: pair[1])
    return ranks


def by_number(
    evaluation: Evaluation, count: str, edges: Sequence[float], *, step: int = -1
) -> dict[str, list[tuple[float, int, float, float]]]:
    """Bins the scores by the number of ways or of shots, over the episodes of all sources.

    Args:
      evaluation: a result of `few_shot.evaluate_episodes`.
      count: "ways" or "shots". (For the number of adaptation steps, use `mean_scores(evaluation, step=t)` for each t.)
      edges: ascending; bin k holds the episodes with edges[k] ≤ number < edges[k + 1].
      step: as for `mean_scores`.

    Returns:
      Method -> for each non-empty bin (mean number, episodes, mean score, half of its 95 % interval).

    Raises:
      KeyError: if `count` is not "ways" or "shots".
    """
    numbers = np.concatenate(list({"ways": evaluation.num_ways, "shots": evaluation.num_shots}[count].values()))
    binned: dict[str, list[tuple[float, int, float, float]]] = {}
    for method in evaluation.scores:
        scores = np.concatenate([_scores_after(evaluation, method, source, step) for source in evaluation.sources])
        inside = [(numbers >= low) & (numbers < high) for low, high in zip(edges, edges[1:], strict=False)]
        binned[method] = [(float(numbers[b].mean()), int(b.sum()), *_mean(scores[b])) for b in inside if b.any()]
    return binned


def leaderboard(evaluation: Evaluation, *, step: int = -1, reference: str | None = None, digits: int = 3) -> str:
    """Formats the evaluation as tables in Markdown, with a row per method, sorted by average rank.

    The first table has the inductive methods. If there are transductive methods, they have their own table: they use
    more information, and are compared among themselves.

    Args:
      evaluation: a result of `few_shot.evaluate_episodes`.
      step: as for `mean_scores`.
      reference: if given, adds a column of the mean paired difference to this method over the sources.
      digits: digits after the decimal point.

    Returns:
      The tables, and a line that explains them. For each source, the best method of a table is bold. So are all methods
      for which the 95 % interval of the paired difference to the best one contains zero.

    Raises:
      KeyError: if `reference` is not one of the methods.
    """
    differences = None if reference is None else paired_differences(evaluation, reference, step=step)
    lines = []
    for transductive in (False, True):
        names = [name for name in evaluation.scores if evaluation.transductive[name] == transductive]
        if names:
            part = evaluation._replace(scores={name: evaluation.scores[name] for name in names})
            kind = "transductive method" if transductive else "method"
            lines += [*_table(part, kind, differences, reference, step, digits), ""]
    counts = sorted({len(number) for number in evaluation.num_ways.values()})
    better = "higher" if evaluation.higher_is_better else "lower"
    lines.append(
        f"{'–'.join(map(str, counts))} episodes of each source, the same for all; mean ± 95 %; {better} is better."
    )
    return "\n".join(lines) + "\n"


def _table(
    evaluation: Evaluation, kind: str, differences: dict | None, reference: str | None, step: int, digits: int
) -> list[str]:
    means, ranks = mean_scores(evaluation, step=step), average_ranks(evaluation, step=step)
    sign = 1 if evaluation.higher_is_better else -1
    bold = set()
    for source in evaluation.sources:
        finite = [method for method, by_source in means.items() if math.isfinite(by_source[source][0])]
        if not finite:  # all methods diverge
            continue
        best = max(finite, key=lambda method: sign * means[method][source][0])
        for method, by_source in paired_differences(evaluation, best, step=step).items():
            difference, half = by_source[source]
            if method == best or abs(difference) <= half:
                bold.add((method, source))
    name_of = lambda name: str(name).replace("|", "\\|")  # an unescaped bar would end the cell
    head = [kind, *map(name_of, evaluation.sources), "average rank"]
    head += [] if reference is None else [f"against {name_of(reference)}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, rank in ranks.items():
        cells = [name_of(method)]
        for source in evaluation.sources:
            mean, half = means[method][source]
            text = f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")  # NaN: one episode
            cells.append(f"**{text}**" if (method, source) in bold else text)
        cells.append(f"{rank:.2f}")
        if differences is not None:
            pairs = np.array(list(differences[method].values()))
            half = math.sqrt((pairs[:, 1] ** 2).sum()) / len(pairs)
            text = f"{_mean(pairs[:, 0])[0]:+.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
            cells.append("" if method == reference else text)
        lines.append("| " + " | ".join(cells) + " |")
    return lines
