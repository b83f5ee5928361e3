"""DARTS and its relatives, under the papers' names: each sets options of `architecture_search`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from metaopt import _checks, hypergrad
from metaopt.nas import _ops, _relaxations, _specs
from metaopt.nas.search._search import Search, architecture_search
from metaopt.nas.search._settings import with_settings


@with_settings
def darts(
    network: _specs.Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    order: str = "second",
    epsilon: float = 0.01,
    difference: str = "central",
    **options: Any,
) -> Search:
    """DARTS: after every step of the weights, one hypergradient step of α, with a lookahead of one step.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input.
      ops: the ops of the space.
      order: "first": dF/dα ≈ ∂f/∂α. "second": a lookahead of one step by finite differences, as published
        (`hypergrad.darts_fd`). "exact": the same lookahead by differentiation (`epsilon=None`, which equals
        `hypergrad.lookahead`).
      epsilon: step size of the finite differences. Kinks (ReLUs) make them inaccurate: see `hypergrad.darts_fd`.
        "exact" does not have this error.
      difference: "central", as published, or "forward": one gradient fewer per step, with an error of O(ε).
      **options: as for `architecture_search`.

    Returns:
      A `Search`.

    Raises:
      KeyError: if `order` is unknown.
      ValueError: if `difference` is unknown.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055
    """
    rules = {
        "first": lambda problem: hypergrad.lookahead(problem, num_steps=0),
        "second": lambda problem: hypergrad.darts_fd(problem, epsilon=epsilon, difference=difference),
        "exact": lambda problem: hypergrad.darts_fd(problem, epsilon=None),
    }
    rule = _checks.named(rules, order, "`order`")
    return architecture_search(network, in_shape, rule, ops=ops, **options)


@with_settings
def unrolled_darts(
    network: _specs.Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    num_steps: int,
    remat: str | int = "step",
    **options: Any,
) -> Search:
    """DARTS without its approximation: dF/dα through the whole training, which every estimate repeats from the start.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: T, at least 1.
      remat: as for `hypergrad.unrolled`. "step" stores the weights, the optimizer's state and the gradients of all T
        steps. "sqrt" stores about 2 √T of them, and computes one more gradient per step.
      **options: as for `architecture_search`.

    Returns:
      A `Search` with exact hypergradients.

    Raises:
      ValueError: as for `architecture_search`.
    """
    rule = lambda problem: hypergrad.unrolled(problem, num_steps=num_steps, remat=remat)
    return architecture_search(network, in_shape, rule, ops=ops, **options)


@with_settings
def implicit_darts(
    network: _specs.Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    num_steps: int,
    solver: hypergrad.Solver | None = None,
    damping: float = 0.0,
    **options: Any,
) -> Search:
    """DARTS by the implicit function theorem, as in iDARTS: dF/dα at weights that have converged.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: steps of the weights per estimate; memory does not depend on it.
      solver: solver of the linear system; iDARTS uses `hypergrad.neumann`.
      damping: as for `hypergrad.implicit`. ∂²ℓ/∂θ² of a network that has not converged has negative eigenvalues.
      **options: as for `architecture_search`.

    Returns:
      A `Search`, exact at a strict minimum.

    Source: Zhang et al., ICML 2021, https://arxiv.org/abs/2106.10784
    """
    rule = lambda problem: hypergrad.implicit(problem, num_steps=num_steps, solver=solver, damping=damping)
    return architecture_search(network, in_shape, rule, ops=ops, **options)


@with_settings
def gdas(
    network: _specs.Space, in_shape: Sequence[int], *, ops: Mapping[str, _ops.Op], num_steps: int, **options: Any
) -> Search:
    """GDAS: one op per edge in every step, sampled by a hard Gumbel-softmax whose temperature falls from 10 to 0.1.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: inner steps over which the temperature falls, at least 1.
      **options: as for `architecture_search`.

    Returns:
      A `Search`, first-order unless `order` is given. Only the sampled ops run, and only they have a gradient.

    Raises:
      ValueError: as for `architecture_search`.

    Source: Dong & Yang, CVPR 2019, https://arxiv.org/abs/1910.04465
    """
    relaxation = _relaxations.gumbel_softmax(optax.linear_schedule(10.0, 0.1, num_steps), hard=True)
    options = {"relaxation": relaxation, "single_path": True, "order": "first", **options}
    return darts(network, in_shape, ops=ops, **options)


@with_settings
def pc_darts(
    network: _specs.Space, in_shape: Sequence[int], *, ops: Mapping[str, _ops.Op], partial: int = 4, **options: Any
) -> Search:
    """PC-DARTS: only 1/K of the channels go through the ops, and a softmax weights the edges into each node.

    Args:
      network: the spec of the network to search; K divides its channels.
      in_shape: shape of one input.
      ops: the ops of the space.
      partial: K.
      **options: as for `architecture_search`.

    Returns:
      A `Search`, first-order unless `order` is given. (In the paper, α is not updated in the first epochs. For this,
      use a schedule for the rate of α.)

    Source: Xu et al., ICLR 2020, https://arxiv.org/abs/1907.05737
    """
    options = {"edge_weights": True, "order": "first", **options}
    return darts(network, in_shape, ops=ops, partial=partial, **options)


@with_settings
def darts_minus(
    network: _specs.Space, in_shape: Sequence[int], *, ops: Mapping[str, _ops.Op], num_steps: int, **options: Any
) -> Search:
    """DARTS−: an auxiliary skip next to every edge, whose weight falls from 1 to 0.

    Args:
      network: the spec of the network to search; all its edges must have "skip_connect".
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: inner steps over which the skip's weight falls, at least 1.
      **options: as for `architecture_search`.

    Returns:
      A `Search`, first-order unless `order` is given.

    Raises:
      ValueError: as for `architecture_search`.

    Source: Chu et al., ICLR 2021, https://arxiv.org/abs/2009.01027
    """
    relaxation = _relaxations.auxiliary_skip(_relaxations.softmax(), optax.linear_schedule(1.0, 0.0, num_steps))
    options = {"relaxation": relaxation, "order": "first", **options}
    return darts(network, in_shape, ops=ops, **options)


@with_settings
def beta_darts(
    network: _specs.Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    num_steps: int,
    weight: float = 50.0,
    penalty: Callable | None = None,
    **options: Any,
) -> Search:
    """β-DARTS: f plus a penalty on logsumexp(α), whose weight grows from 0.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: inner steps over which the weight grows, at least 1.
      weight: the weight at the end; it may be traced. With 0 the method is `darts(order="first")`.
      penalty: a further penalty, as for `architecture_search`.
      **options: as for `architecture_search`.

    Returns:
      A `Search`, first-order unless `order` is given.

    Raises:
      ValueError: as for `architecture_search`.

    Source: Ye et al., CVPR 2022, https://arxiv.org/abs/2203.01665
    """
    weight_schedule = optax.linear_schedule(0.0, weight, num_steps)

    def decay(alpha, step):
        value = weight_schedule(step) * _relaxations.beta_decay(alpha)
        return value if penalty is None else value + penalty(alpha, step)

    return darts(network, in_shape, ops=ops, penalty=decay, **{"order": "first", **options})
