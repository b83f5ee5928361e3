"""Architecture searches that stop early and return an earlier α: DARTS with a check for signs of its collapse."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from metaopt import base
from metaopt.nas import _early_stop, _ops, _specs
from metaopt.nas.search._darts import darts
from metaopt.nas.search._search import Search
from metaopt.nas.search._settings import with_settings


@with_settings
def robust_darts(
    network: _specs.Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    every: int,
    window: int = 5,
    start: int = 10,
    delta: int = 4,
    factor: float = 1.3,
    num_iterations: int = 20,
    **options: Any,
) -> Search:
    """RobustDARTS: DARTS that stops when the validation loss becomes too sharp in α, and returns an earlier α.

    Run it with `callback=lambda step, metrics: metrics["stop"] > 0`. Then decode the cell from the earlier α,
    `search.selected_alpha(result)`. Do not use `result.hyperparams`: it is the α of the step that stopped, which is
    too late.

    At the end of every epoch it measures κ, the dominant eigenvalue of ∂²f/∂α², which the metric "curvature" reports
    (NaN at other estimates). This costs `num_iterations` Hessian-vector products of f in α.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input.
      ops: the ops of the space.
      every: estimates per epoch.
      window: the number of epochs over which |κ| is averaged.
      start: the first epoch that may stop, counted from 0.
      delta: how many epochs to look back for the comparison, and to go back.
      factor: the search stops if the mean of |κ| exceeds this factor times the mean `delta` epochs before.
      num_iterations: iterations for κ.
      **options: as for `darts`.

    Returns:
      A `Search`, first-order unless `order` is given.

    Raises:
      ValueError: if `every` is below 1, and as for `darts`.

    Source: Zela et al., ICLR 2020, https://arxiv.org/abs/1909.09656
    """
    search = darts(network, in_shape, ops=ops, **{"order": "first", **options})
    stop = {"every": every, "window": window, "start": start, "delta": delta, "factor": factor}
    stop["num_iterations"] = num_iterations

    def rule(problem, own):
        # Curvature is measured for f in α only, without any added constraint.
        watched = search.rule(problem, own)
        return _early_stop.stopped_by_curvature(watched, search.problem, own=own, alpha=search.alpha, **stop)

    return _stopped_by(search, rule)


@with_settings
def darts_plus(
    network: _specs.Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    every: int,
    max_skips: int = 1,
    start: int = 1,
    **options: Any,
) -> Search:
    """DARTS+: DARTS that stops when a cell has too many skips, and returns the α of the previous epoch.

    Run it like `robust_darts`, with `callback=lambda step, metrics: metrics["stop"] > 0`. Then
    `search.selected_alpha(result)` is the α to use.

    Args:
      network: the spec of the network to search; it must have "skip_connect".
      in_shape: shape of one input.
      ops: the ops of the space.
      every: estimates per epoch.
      max_skips: the search stops if a cell has more skips than this. (As published, it is one, and only normal cells
        are counted. Here, the kind of cell with the most skips is counted.)
      start: the first epoch that may stop, counted from 0; at least 1.
      **options: as for `darts`.

    Returns:
      A `Search`, first-order unless `order` is given.

    Raises:
      ValueError: if `every` or `start` is below 1, if the network has no skips, and as for `darts`.

    Source: Liang et al., 2019, https://arxiv.org/abs/1909.06035

    >>> from metaopt import nas
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    >>> table = nas.Network(
    ...     {"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2
    ... )
    >>> search = nas.darts_plus(table, (3,), ops=nas.BLOCKS, every=20)
    >>> search.settings["method"], search.settings["max_skips"]
    ('darts_plus', 1)
    """
    search = darts(network, in_shape, ops=ops, **{"order": "first", **options})

    def rule(problem, own):
        num_skips = lambda hyperparams: _early_stop.num_skips(search.supernet.network, search.weights(own(hyperparams)))
        return _early_stop.stopped_by_skips(
            search.rule(problem, own), num_skips, every=every, max_skips=max_skips, start=start
        )

    # Raises for a network without skips.
    weights = lambda key: search.weights(search.hyperparams(key))
    jax.eval_shape(lambda key: _early_stop.num_skips(search.supernet.network, weights(key)), jax.random.key(0))
    return _stopped_by(search, rule)


def _stopped_by(search: Search, rule: Callable[[base.Problem, Callable], base.Estimator]) -> Search:
    """Returns the same search with another rule, whose state stores the α to return."""

    def selected_alpha(result):
        search.selected_alpha(result)  # raises
        return result.state.estimator_state.kept

    return search._replace(
        estimator=rule(search.problem, lambda hyperparams: hyperparams), rule=rule, selected_alpha=selected_alpha
    )
