"""Any architecture search, within a budget of the expected cost."""

import jax
import jax.numpy as jnp

from metaopt.nas import _budgets, _costs, _relaxations
from metaopt.nas.search._search import Search
from metaopt.nas.search._settings import plain


def under_budget(
    search: Search,
    table: _costs.CostTable,
    *,
    budget: float | jax.Array,
    multiplier: float = -3.0,
    damping: float = 0.0,
    relaxation: _relaxations.Relaxation | None = None,
) -> Search:
    """The same search within a budget: min over α, max over μ ≥ 0 of F(α) + μ (C(α)/budget − 1).

    λ becomes {"hyperparams": α, "multiplier": m} with μ = softplus(m); one descending optimizer moves both. (With
    `learn_init`, "hyperparams" holds the whole λ of `search` instead of α.) If the budget binds, the expected cost
    converges to it. The genotype takes the argmax, so it may cost more or less. Project it by
    `nas.within_budget(search.supernet.network, search.weights(λ), table, budget)`.

    NAS-Bench-101's graphs cannot be projected. Their expected cost counts all vertices and edges by their weights, and
    exceeds the cost of the decoded cell.

    Args:
      search: a search whose rule differentiates the outer loss. `relaxation` must convert its α to weights of choices.
      table: cost table of the search space.
      budget: the largest expected cost, in the table's unit. It may be traced, so one program can search within many
        budgets.
      multiplier: the initial m; softplus(−3) = .049.
      damping: weight of max(0, c)² in the outer loss, which reduces oscillation; not negative.
      relaxation: as for `nas.resource_penalty`.

    Returns:
      A `Search`.

    Raises:
      ValueError: if the budget is not positive, or the table has choices that the space does not have.

    Source: Platt & Barr, Constrained Differential Optimization, NIPS 1987

    >>> import jax
    >>> from metaopt import nas
    >>> space = nas.mlp_space(2, widths=(4, 64), depths=(1, 3))
    >>> table = nas.cost_table(space, (3,), nas.num_params, ops={})
    >>> search = nas.under_budget(nas.darts(space, (3,), ops={}), table, budget=1_000.0)
    >>> sorted(search.hyperparams(jax.random.key(0)))
    ['hyperparams', 'multiplier']
    """
    excess = _budgets.over_budget(table, search.supernet.network, budget=budget, relaxation=relaxation)
    constraint = lambda hyperparams, step: excess(search.alpha(hyperparams), step)
    problem = _budgets.lagrangian(search.problem, constraint, damping=damping)
    rule = lambda problem, own: search.rule(problem, lambda hyperparams: own(hyperparams)["hyperparams"])
    inside = [search.settings["under_budget"]] if "under_budget" in search.settings else []  # an earlier budget
    settings = plain([table, budget, multiplier, damping, relaxation]) + inside
    return search._replace(
        estimator=rule(problem, lambda both: both),
        problem=problem,
        rule=rule,
        hyperparams=lambda key: {"hyperparams": search.hyperparams(key), "multiplier": jnp.asarray(multiplier)},
        alpha=lambda both: search.alpha(both["hyperparams"]),
        weights=lambda both: search.weights(both["hyperparams"]),
        genotype=lambda both: search.genotype(both["hyperparams"]),
        settings={**search.settings, "under_budget": settings},
    )
