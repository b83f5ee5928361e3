"""Searches within limits: penalties and constraints on the cost of an architecture."""

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.nas import _derivation, _genotypes
from metaopt.nas._costs import CostTable, check_table
from metaopt.nas._relaxations import Relaxation, edge_normalized, mixing_weights, softmax
from metaopt.nas._specs import Genotype, Network, Space

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
    """Makes a penalty on the expected cost, for the argument `penalty` of any search.

        linear:    weight · C/target                 (ProxylessNAS)
        hinge:     weight · max(0, C/target − 1)     zero within the budget
        absolute:  weight · |C/target − 1|           (TuNAS: also pushes C up to the target)

    If the space keeps a number of edges into each node, C counts only the edges that are the strongest at α
    (`CostTable.expected_cost`).

    Args:
      table: costs of the space.
      network: the space.
      weight: the weight of the penalty, in units of the outer loss; not negative.
      target: the target cost in the unit of the table, positive.
      form: "linear", "hinge" or "absolute".
      relaxation: maps α to the weights in C. The default is softmax, whose weights are also the probabilities by which
        `gumbel_softmax` samples. If α is {"ops", "edges"} (PC-DARTS), the relaxation takes the ops. The weight of an
        edge then only decides which edges are kept, as when genotypes are read. It does not change the cost of an edge.

    Returns:
      `(α, step) -> []`.

    Raises:
      KeyError: if `form` is unknown.
      ValueError: if the table has choices that the network lacks.

    Sources: Cai, Zhu & Han, ICLR 2019, https://arxiv.org/abs/1812.00332; Bender et al., CVPR 2020,
    https://arxiv.org/abs/2008.06120
    """
    forms = {"linear": lambda r: r, "hinge": lambda r: jax.nn.relu(r - 1), "absolute": lambda r: jnp.abs(r - 1)}
    shape = forms[form]
    excess = over_budget(table, network, budget=target, relaxation=relaxation)
    return lambda alpha, step: weight * shape(1 + excess(alpha, step))


def over_budget(
    table: CostTable, network: Space, *, budget: float | jax.Array, relaxation: Relaxation | None = None
) -> Callable[[base.HyperParams, Any], jax.Array]:
    """C(w(α))/budget − 1, a constraint for `lagrangian`: at most 0 within the budget.

    If the space keeps a number of edges into each node, C counts only the edges that are the strongest at α
    (`CostTable.expected_cost`).

    Args:
      table: costs of the space.
      network: the space.
      budget: the largest cost, in the unit of the table, positive. It may be traced; then it is not checked.
      relaxation: as for `resource_penalty`.

    Returns:
      `(α, step) -> []`.

    Raises:
      ValueError: if the table has choices that the network lacks.
    """
    check_table(table, network)
    relax = softmax() if relaxation is None else relaxation
    some_are_kept = isinstance(network, Network) and isinstance(network.keep, numbers.Integral)

    def counted(alpha, cell, key, step):
        if not isinstance(alpha, Mapping):
            return relax(alpha, cell, key, step)
        if not some_are_kept:
            return relax(alpha["ops"], cell, key, step)
        # The products w · softmax(β) decide which edges are kept. β does not change costs, because `expected_cost`
        # divides the products of an edge by their sum.
        alpha = {"ops": alpha["ops"], "edges": jax.lax.stop_gradient(alpha["edges"])}
        return edge_normalized(relax)(alpha, cell, key, step)

    def excess(alpha, step):
        weights = mixing_weights(counted, network, alpha, jax.random.key(0), step)
        return table.expected_cost(weights, network) / budget - 1

    return excess


def penalized(problem: base.Problem, penalty: Callable[[base.HyperParams, Any], jax.Array]) -> base.Problem:
    """The same problem with f(θ, λ) + penalty(λ, step) as its outer loss.

    Args:
      problem: any problem.
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

    The new λ is {"hyperparams": λ, "multiplier": m}, with μ = softplus(m). The gradient of m has the opposite sign, so
    a descent step in m is an ascent step in μ. The value of the outer loss stays f. Start with an m for which μ is
    small, for instance −3. If μ should grow faster than λ moves, give m its own learning rate (`optax.partition`).
    Damping reduces the oscillation between λ and μ.

    The solution is a saddle point, not a minimum. The value of the new outer loss does not depend on m, but its
    gradient in m is not zero. So a rule must differentiate the outer loss. All rules do so, except rules that perturb λ
    (evolution strategies).

    Args:
      problem: any problem.
      constraint: `(λ, step) -> []`, at most 0 if the constraint is met, such as `over_budget`.
      damping: not negative.

    Returns:
      A `Problem` in {"hyperparams", "multiplier"}.

    Source: Platt & Barr, Constrained Differential Optimization, NIPS 1987
    """
    inner = base.reparametrized(problem, lambda both, step: both["hyperparams"])

    def outer_loss(params, both, batch, context):
        value = problem.outer_loss(params, both["hyperparams"], batch, context)
        c, mu = constraint(both["hyperparams"], context.step), jax.nn.softplus(both["multiplier"])
        stop = jax.lax.stop_gradient
        constraint_terms = stop(mu) * c - mu * stop(c) + damping / 2 * jax.nn.relu(c) ** 2
        return value + (constraint_terms - stop(constraint_terms)).astype(value.dtype)

    return inner._replace(outer_loss=outer_loss)


def within_budget(
    network: Space,
    weights: Mapping[str, np.ndarray],
    table: CostTable,
    budget: float,
    *,
    keep: int | None | str = "space",
) -> Genotype:
    """Reads a genotype from mixing weights, and changes it until its network is within a budget.

    It starts with `derive_genotype`. While the network costs too much, it makes the change that loses the least log
    weight per saved cost. A change replaces the op of an edge, or a size. If the space keeps a number of edges into
    each node, a change may also replace an edge by another edge into the same node. The method is greedy for a knapsack
    problem, so a network with larger weights within the budget may exist.

    Args:
      network: the space.
      weights: kind -> [edges, ops], not negative.
      table: costs of the space.
      budget: the largest cost, in the unit of the table.
      keep: edges into each node, as for `derive_genotype`; "space" uses the rule of the network.

    Returns:
      A `Genotype` of a network that costs at most `budget`.

    Raises:
      ValueError: if the network costs too much and no change makes it cheaper, or as for `derive_genotype`.
    """
    keeps_fixed_number = _genotypes.edges_kept(network, keep) is not None
    logs = {kind: np.log(np.maximum(np.asarray(w, np.float64), 1e-300)) for kind, w in weights.items()}
    price = lambda choices: table.cost_of(network, _genotype_of(network, choices))
    genotype = _derivation.derive_genotype(network, weights, keep=keep)
    choices = _choices_of(network, genotype, keeps_fixed_number)
    cost = price(choices)
    while cost > budget:
        best = (np.inf, 0.0, None)
        for i, old in enumerate(choices):
            for new in _alternatives(network, choices, old, keeps_fixed_number):
                changed = [*choices[:i], new, *choices[i + 1 :]]
                saved = cost - price(changed)
                if saved > 0:
                    loss = logs[old.kind][old.edge, old.op] - logs[new.kind][new.edge, new.op]
                    # A saving counts only down to the budget.
                    rate = loss / min(saved, cost - budget)
                    best = min(best, (rate, -saved, changed), key=lambda change: change[:2])
        if best[2] is None:
            unit = f" {table.unit}" if table.unit else ""
            raise ValueError(f"`budget` is {budget}{unit}, and the cheapest network found costs {cost}{unit}.")
        choices = best[2]
        cost = price(choices)
    return _genotype_of(network, choices)


class _Choice(NamedTuple):
    """The indices of an edge and of its op. `within_budget` changes one choice at a time."""

    kind: str
    edge: int
    op: int


def _choices_of(network: Space, genotype: Genotype, keeps_fixed_number: bool) -> list[_Choice]:
    """The choices of a genotype. Unless `keeps_fixed_number`, absent edges have the choice "none"."""
    choices = []
    for kind, cell in network.cells.items():
        ops = {(s, t): op for s, t, op in genotype[kind]}
        for e, edge in enumerate(cell.edges):
            if edge[:2] in ops or not keeps_fixed_number:
                choices.append(_Choice(kind, e, edge.ops.index(ops.get(edge[:2], _genotypes.NONE))))
    return choices


def _genotype_of(network: Space, choices: Sequence[_Choice]) -> Genotype:
    genotype = {kind: [] for kind in network.cells}
    for kind, e, o in sorted(choices, key=lambda choice: choice.edge):
        edge = network.cells[kind].edges[e]
        if edge.ops[o] != _genotypes.NONE:
            genotype[kind].append((edge.source, edge.target, edge.ops[o]))
    return {kind: tuple(edges) for kind, edges in genotype.items()}


def _alternatives(
    network: Space, choices: Sequence[_Choice], old: _Choice, keeps_fixed_number: bool
) -> Iterator[_Choice]:
    """Yields other ops of the edge and, if a fixed number of edges is kept, unused edges into the same node."""
    edges = network.cells[old.kind].edges
    taken = {choice.edge for choice in choices if choice.kind == old.kind} - {old.edge}
    free = [e for e in range(len(edges)) if edges[e].target == edges[old.edge].target and e not in taken]
    for e in free if keeps_fixed_number else [old.edge]:
        for op, name in enumerate(edges[e].ops):
            if (e, op) != (old.edge, old.op) and not (keeps_fixed_number and name == _genotypes.NONE):
                yield _Choice(old.kind, e, op)
