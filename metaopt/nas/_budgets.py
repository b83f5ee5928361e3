"""Searches within limits: penalties and constraints on what an architecture costs, and fronts of what was found."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from metaopt import base
from metaopt.nas import _genotypes
from metaopt.nas._costs import CostTable, cost_of, expected_cost
from metaopt.nas._relaxations import Relaxation, mixing_weights, softmax
from metaopt.nas._specs import Genotype, Space

# ---- Penalties and constraints --------------------------------------------------------------------------------------


def resource_penalty(
    table: CostTable,
    network: Space,
    *,
    weight: float,
    target: float,
    form: str = "linear",
    relaxation: Relaxation | None = None,
) -> Callable[[base.HyperParams, Any], jax.Array]:
    """A penalty on the expected cost, for `penalty=` of any search, or for `penalized`.

        linear:    weight · C/target                 (ProxylessNAS)
        hinge:     weight · max(0, C/target − 1)     nothing within the budget
        absolute:  weight · |C/target − 1|           (TuNAS: as large as allowed, too)

    Args:
      table: of the space.
      network: the space.
      weight: in outer loss.
      target: in the table's unit, positive.
      form: one of these.
      relaxation: from α to the weights that are counted; softmax by default, which are the probabilities by which
        `gumbel_softmax` samples, too. Where α is {"ops", "edges"} (PC-DARTS), it is of the ops: the weight of an edge
        in its node's sum does not say that the edge is not run.

    Returns:
      `(α, step) -> []`.

    Raises:
      ValueError: a number is out of range, or `form` unknown.

    Sources: Cai, Zhu & Han, ICLR 2019, https://arxiv.org/abs/1812.00332; Bender et al., CVPR 2020,
    https://arxiv.org/abs/2008.06120
    """
    forms = {"linear": lambda r: r, "hinge": lambda r: jax.nn.relu(r - 1), "absolute": lambda r: jnp.abs(r - 1)}
    if form not in forms:
        raise ValueError(f"`form` must be one of {', '.join(forms)}; got {form!r}.")
    base.check_positive("weight", weight, zero=True)
    excess = over_budget(table, network, budget=target, relaxation=relaxation)
    return lambda alpha, step: weight * forms[form](1 + excess(alpha, step))


def over_budget(
    table: CostTable, network: Space, *, budget: float | jax.Array, relaxation: Relaxation | None = None
) -> Callable[[base.HyperParams, Any], jax.Array]:
    """C(w(α))/budget − 1, a constraint for `lagrangian`: at most 0 within the budget.

    Args:
      table: of the space.
      network: the space.
      budget: in the table's unit, positive; it may be traced, and is not checked then.
      relaxation: as for `resource_penalty`.

    Returns:
      `(α, step) -> []`.

    Raises:
      ValueError: the budget is not positive.
    """
    if not isinstance(budget, Tracer):
        base.check_positive("budget", budget)
    relax = softmax() if relaxation is None else relaxation

    def excess(alpha, step):
        alpha = {kind: a["ops"] if isinstance(a, Mapping) else a for kind, a in alpha.items()}
        weights = mixing_weights(relax, network, alpha, jax.random.key(0), step)
        return expected_cost(table, weights) / budget - 1

    return excess


def penalized(problem: base.Problem, penalty: Callable[[base.HyperParams, Any], jax.Array]) -> base.Problem:
    """The same problem with f(θ, λ) + penalty(λ, step) for an outer loss.

    Args:
      problem: any.
      penalty: `(λ, step) -> []`, such as `resource_penalty`.

    Returns:
      A `Problem`, for any rule.
    """

    def outer_loss(params, hyperparams, batch, context):
        return problem.outer_loss(params, hyperparams, batch, context) + penalty(hyperparams, context.step)

    return problem._replace(outer_loss=outer_loss)


def lagrangian(
    problem: base.Problem, constraint: Callable[[base.HyperParams, Any], jax.Array], *, damping: float = 0.0
) -> base.Problem:
    """The problem min_λ max_{μ ≥ 0} f(θ, λ) + μ·c(λ) + damping/2 · max(0, c(λ))², for one optimizer that descends.

    The new λ is {"hyperparams": λ, "multiplier": m}, with μ = softplus(m): the gradient of m has its sign turned, so
    that a step down is a step up in μ. The value stays f. Start m where μ is small, −3 for instance, and give it a rate
    of its own where μ is to grow faster than λ moves (`optax.partition`). Damping stills the oscillation between both.

    It is a saddle point and no minimum: the value does not change with the multiplier, though its gradient is not zero.
    So rules must differentiate f, as all but those that perturb λ (evolution strategies) do.

    Args:
      problem: any.
      constraint: `(λ, step) -> []`, at most 0 where it is met, such as `over_budget`.
      damping: at least 0.

    Returns:
      A `Problem` in both.

    Raises:
      ValueError: `damping` is negative.

    Source: Platt & Barr, Constrained Differential Optimization, NIPS 1987
    """
    base.check_positive("damping", damping, zero=True)
    inner = base.reparametrized(problem, lambda both, step: both["hyperparams"])

    def outer_loss(params, both, batch, context):
        value = problem.outer_loss(params, both["hyperparams"], batch, context)
        c, mu = constraint(both["hyperparams"], context.step), jax.nn.softplus(both["multiplier"])
        stop = jax.lax.stop_gradient
        more = stop(mu) * c - mu * stop(c) + damping / 2 * jax.nn.relu(c) ** 2
        return value + (more - stop(more)).astype(value.dtype)

    return inner._replace(outer_loss=outer_loss)


def within_budget(network: Space, weights: Mapping[str, np.ndarray], table: CostTable, budget: float) -> Genotype:
    """The projection onto a budget: the likeliest op of every edge, or size, less what is needed to stay within it.

    While the network costs too much, that choice is changed which loses least log weight for the cost that it saves.
    Greedy: a likelier network within the budget may be there, since this is a knapsack problem.

    Args:
      network: the space; every edge has an op, or "none" (no "two edges a node").
      weights: kind -> [edges, ops], positive.
      table: of the space.
      budget: in the table's unit.

    Returns:
      A `Genotype`, of a network that costs at most `budget`.

    Raises:
      ValueError: no change makes the network cheaper, and it still costs too much.
    """
    weights = {kind: np.maximum(np.asarray(w, np.float64), 1e-300) for kind, w in weights.items()}
    digits = {(kind, e): int(row.argmax()) for kind, w in weights.items() for e, row in enumerate(w)}

    def genotype(digits):
        edges = {kind: [] for kind in network.cells}
        for (kind, e), d in digits.items():
            edge = network.cells[kind].edges[e]
            if edge.ops[d] != _genotypes.NONE:
                edges[kind].append((edge.source, edge.target, edge.ops[d]))
        return {kind: tuple(each) for kind, each in edges.items()}

    price = lambda digits: cost_of(table, network, genotype(digits))
    now = price(digits)
    while now > budget:
        best = None
        for (kind, e), old in digits.items():
            for new in range(weights[kind].shape[1]):
                changed = {**digits, (kind, e): new}
                saved = now - price(changed)
                if saved > 0:
                    loss = np.log(weights[kind][e, old]) - np.log(weights[kind][e, new])
                    # Down to the budget, no saving is worth more than what is missing.
                    rate = loss / min(saved, now - budget)
                    best = min(best or (np.inf, 0.0, digits), (rate, -saved, changed), key=lambda each: each[:2])
        if best is None:
            raise ValueError(f"`budget` is {budget} {table.unit}, and the cheapest network found costs {now}.")
        digits = best[2]
        now = price(digits)
    return genotype(digits)


# ---- Fronts ---------------------------------------------------------------------------------------------------------


def pareto_front(points: Any) -> np.ndarray:
    """Which points no other one dominates: none is as good in everything and better in something. Smaller is better.

    Args:
      points: [n, k] of k objectives; a row with NaN is dominated by all.

    Returns:
      [m] indices, by the first objective; equal points are all in.

    Raises:
      ValueError: `points` has another shape.
    """
    points = _points(points)
    order = np.lexsort(points.T[::-1])
    kept: list[int] = []
    for i in order:
        better = points[kept]
        dominated = ((better <= points[i]).all(1) & (better < points[i]).any(1)).any()
        if not dominated and not np.isnan(points[i]).any():
            kept.append(int(i))
    return np.array(kept, int)


def hypervolume(points: Any, reference: Sequence[float]) -> float:
    """The volume that points dominate, up to a reference: larger is a better front. Smaller objectives are better.

    Exact, by slices along the last objective: n log n for two objectives, nᵏ⁻¹ for k.

    Args:
      points: [n, k]; those beyond the reference in some objective add nothing.
      reference: [k].

    Returns:
      The volume.

    Raises:
      ValueError: the shapes do not fit.

    Source: the measure of Zitzler & Thiele, IEEE Transactions on Evolutionary Computation 3(4), 1999
    """
    points, limit = _points(points), np.asarray(reference, float)
    if limit.shape != points.shape[1:]:
        raise ValueError(f"`reference` must have an entry for each of {points.shape[1]} objectives; got {reference}.")
    inside = points[(points < limit[None]).all(1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(limit[0] - inside.min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    heights = np.diff([*inside[:, -1], limit[-1]])
    slices = [hypervolume(inside[: i + 1, :-1], list(limit[:-1])) if h > 0 else 0.0 for i, h in enumerate(heights)]
    return float(heights @ slices)


def _points(points: Any) -> np.ndarray:
    points = np.asarray(points, float)
    if points.ndim != 2 or points.shape[1] < 1:
        raise ValueError(f"`points` must be [n, k], a row for each of n architectures; got the shape {points.shape}.")
    return points
