"""Training-free search: scores of architectures at initialization, and a searcher that tries the best ones first."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import _batches, base, blackbox, inner
from metaopt._progress import reporting
from metaopt.nas import _genotypes, _ops, _scores, _specs, _supernet


def training_free_scores(
    network: _specs.Network,
    in_shape: Sequence[int],
    scores: Mapping[str, _scores.Score] | None = None,
    *,
    ops: Mapping[str, _ops.Op],
) -> Callable[[jax.Array, _specs.Genotype, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """Makes a function that scores any genotype of a space, with one compiled program.

    Args:
      network: the spec of the search space.
      in_shape: shape of one input.
      scores: score functions by name; `nas.SCORES` by default. For your own loss:
        `{"snip": functools.partial(nas.SCORES["snip"], loss=mine)}`.
      ops: the ops of the space.

    Returns:
      `(key, genotype, batch) -> {name: []}`, larger is better, at an initialization that is drawn with the key. Rows
      that are padding by the batch's "mask" [N] have no effect.

    Raises:
      ValueError: if labels of a batch are not classes, and a score uses their cross-entropy.

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import nas
    >>> network = nas.nas_bench_201_space(channels=2, cells_per_stage=1)
    >>> scores = {"synflow": nas.SCORES["synflow"]}
    >>> score = nas.training_free_scores(
    ...     network, (4, 4, 1), scores, ops=nas.NAS_BENCH_201_OPS
    ... )
    >>> key, batch = jax.random.key(0), {"x": jnp.zeros((2, 4, 4, 1))}
    >>> float(score(key, {"cell": ()}, batch)["synflow"])  # of the cell without any op
    -inf
    """
    chosen = dict(_scores.SCORES if scores is None else scores)
    supernet = _supernet.supernet(network, in_shape, ops=ops, single_path=True)
    supernet = supernet._replace(apply=inner.im2col(supernet.apply, only_on_cpu=True))

    @jax.jit
    def evaluate(key, weights, batch):
        params = supernet.init(key)
        return {name: score(supernet, params, weights, batch) for name, score in chosen.items()}

    reported = reporting(evaluate, "the scores")

    def score(key, genotype, batch):
        if _scores.grad_norm in chosen.values() or _scores.snip in chosen.values():  # their default loss needs classes
            _batches.check_labels(batch, network.num_outputs)
        return reported(key, _genotypes.one_hot(network, genotype), batch)

    return score


class ScreenedState(NamedTuple):
    """State of `screened_random_search`, carried from one call to the next.

    Attributes:
      random: the state of the random search that draws candidates.
      waiting: candidates that were scored and not yet asked for, best first.
      num_asked: number of trials that have been asked for.
    """

    random: Any
    waiting: tuple[base.Record, ...]
    num_asked: int


def screened_random_search(score: Callable[[dict[str, Any]], float], *, num_candidates: int) -> base.Searcher:
    """Random search that tries the configurations with the largest scores first.

    It draws and scores `num_candidates` configurations at a time. After all of them have been tried, it draws the next.

    Args:
      score: `(configuration) -> number`, such as a training-free score; larger is better, NaN is the worst.
      num_candidates: at least 1; 1 is random search.

    Returns:
      A searcher that learns nothing from outcomes.

    >>> import jax
    >>> from metaopt import nas, spaces
    >>> searcher = nas.screened_random_search(
    ...     lambda c: -abs(c["depth"] - 40), num_candidates=50
    ... )
    >>> state = searcher.init(jax.random.key(0), {"depth": spaces.integer(1, 99)})
    >>> (first, second), state = searcher.ask(state, 2)
    >>> abs(first.configuration["depth"] - 40) <= abs(
    ...     second.configuration["depth"] - 40
    ... ) < 10
    True
    """
    random = blackbox.random_search(first=())

    def init(key, space):
        return ScreenedState(random.init(key, space), (), 0)

    def ask(state, num):
        trials = []
        for _ in range(num):
            if not state.waiting:
                drawn, drawing = random.ask(state.random, num_candidates)
                values = np.array([float(score(trial.configuration)) for trial in drawn])
                order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
                state = state._replace(random=drawing, waiting=tuple(drawn[i] for i in order))
            best, *rest = state.waiting
            trials.append(best._replace(trial=state.num_asked))
            state = ScreenedState(state.random, tuple(rest), state.num_asked + 1)
        return trials, state

    def tell(state, records):
        del records
        return state

    return base.Searcher(init, ask, tell)
