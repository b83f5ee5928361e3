"""Architecture search under the papers' names.

Each method sets options of `architecture_search` and adds no numerics.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from metaopt import _checks, base, hypergrad, inner, training
from metaopt.nas import _budgets, _costs, _derivation, _ops, _relaxations, _specs, _supernet
from metaopt.nas.search._architecture_checks import alpha_beside_init, check_single, found
from metaopt.nas.search._settings import of_network, plain, with_settings


class Search(NamedTuple):
    """A search for α on one task; `training.learner` and `fit` run it.

    Attributes:
      estimator: estimates dF/dα.
      problem: the problem that `estimator` differentiates.
      supernet: the network that is trained. To predict, use
        `trained_network(supernet, params, train, weights=weights(α))`.
      hyperparams: `(key) -> λ`, the starting point. λ is α, or {"alpha": α, "init": θ_0} with `learn_init`. In the
        entries below, "α" means this λ.
      alpha: `(λ) -> α`: extracts α from λ.
      weights: `(α) -> ` mixing weights, kind -> [edges, ops]. Genotypes are decoded from them (see `decode`).
      genotype: `(α) -> Genotype`. The example of `search_report` shows the steps that follow.
      rule: `(problem, own) -> Estimator`, which made `estimator`. `under_budget` uses it to make an estimator of
        another problem with another λ: `own(λ)` extracts the λ of this search.
      found: `(training.FitResult) -> α`, the result of a run: α after its last step (an earlier α for RobustDARTS).
        Raises ValueError if no step had a finite loss and a finite hypergradient. α has then not moved, and
        `genotype` would decode a cell that no search selected.
      settings: the method's name, the network, and the other arguments of the search, as JSON values. Pass them as
        `training.fit(settings=search.settings)`. Other searches have α and states of the same shapes, so without
        settings a checkpoint of another search could continue as this one. Functions are identified by their names
        and the values that they enclose, not by their results. `relaxation`, `decode`, `keep` and `network` are
        stored after defaults are filled in.
    """

    estimator: base.Estimator
    problem: base.Problem
    supernet: _supernet.Supernet
    hyperparams: Callable[[jax.Array], base.HyperParams]
    alpha: Callable[[base.HyperParams], base.HyperParams]
    weights: Callable[[base.HyperParams], dict[str, jax.Array]]
    genotype: Callable[[base.HyperParams], _specs.Genotype]
    rule: Callable[[base.Problem, Callable], base.Estimator]
    found: Callable[[training.FitResult], base.HyperParams]
    settings: dict[str, Any]


def check_data(loss: Callable, network: _specs.Space, *parts: Any) -> None:
    """Raises ValueError if `loss` is the default and untraced labels are not classes. Other losses may differ."""
    if loss is inner.cross_entropy:
        for part in parts:
            inner.check_labels(part, network.num_outputs)


def _sgd(hyperparams: base.HyperParams) -> optax.GradientTransformation:
    """The DARTS optimizer for weights, at a constant rate."""
    return optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.025, momentum=0.9))


def _outputs(supernet, relaxation, params, alpha, batch, context):
    weights, mask = (
        _relaxations.mixing_weights(relaxation, supernet.network, alpha, context.key, context.step),
        inner.row_mask(batch),
    )
    return supernet.apply(params, weights, batch["x"], None, mask)


def _loop(supernet, relaxation, loss, decay, optimizer, sampler, learn_init=False) -> base.InnerLoop:
    """The inner loop that trains a supernet's weights."""

    def train_loss(params, hyperparams, batch, context):
        alpha = hyperparams["alpha"] if learn_init else hyperparams
        value = loss(_outputs(supernet, relaxation, params, alpha, batch, context), batch)
        return value + decay / 2 * optax.tree.norm(params, squared=True)

    def init(key, hyperparams, data):
        check_data(loss, supernet.network, data)
        return hyperparams["init"] if learn_init else supernet.init(key), None

    return inner.loop(train_loss, optimizer, init=init, sampler=sampler, with_context=True)


@with_settings
def architecture_search(
    network: _specs.Space,
    in_shape: Sequence[int],
    rule: Callable[[base.Problem], base.Estimator],
    *,
    ops: Mapping[str, _ops.Op],
    loss: Callable = inner.cross_entropy,
    decay: float = 3e-4,
    optimizer: Callable[[base.HyperParams], optax.GradientTransformation] = _sgd,
    sampler: inner.Sampler | None = None,
    outer_batch: base.OuterBatchFn | None = None,
    relaxation: _relaxations.Relaxation | None = None,
    decode: _relaxations.Relaxation | None = None,
    penalty: Callable | None = None,
    partial: int = 1,
    single_path: bool = False,
    remat_edges: bool = False,
    edge_weights: bool = False,
    learn_init: bool = False,
    keep: int | None | str = "space",
) -> Search:
    """The general architecture search: all other searches are settings of it.

        ℓ(θ, α) = loss on training rows + decay |θ|²/2,    f(θ, α) = loss on validation rows + penalty(α),
        mixing weights = relaxation(α)

    Training and validation draw separate noise. Schedules count inner steps.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input, without the batch axis.
      rule: `(problem) -> Estimator`.
      ops: the ops of the space, such as `nas.DARTS_OPS`.
      loss: `(outputs [N, num_outputs], batch) -> []`. The default is `inner.cross_entropy`, for labels "y" [N]. Batches
        have "x" [N, *in_shape], and "mask" [N] if some rows are padding (`tasks.to_task` pads). The default loss and
        `nas.normalized` ignore padded rows; your own loss must do so too.
      decay: weight decay of the weights. It is part of the loss, so that implicit rules see it.
      optimizer: as for `inner.loop`. The default is the DARTS optimizer for weights (SGD, rate 0.025, momentum 0.9,
        clipped at 5). The DARTS optimizer for α is
        `optax.chain(optax.add_decayed_weights(1e-3), optax.adam(3e-4, b1=0.5))`.
      sampler: sampler of training rows, such as `inner.minibatch(64)`.
      outer_batch: `(key, task) -> batch` of validation rows; the default uses all of them.
      relaxation: softmax by default.
      decode: the relaxation used to decode genotypes, at step 0 and with one fixed key. The default is `relaxation`
        without noise and auxiliary paths. If your own relaxation has noise or a schedule, pass
        another one here.
      penalty: `(α, step) -> []`. Make a cost penalty from the network that is searched. With `keep=1`, that is
        `nas.resource_penalty(table, network._replace(keep=1), ...)`; for another network it counts other edges.
      partial: as for `nas.supernet`.
      single_path: as for `nas.supernet`.
      remat_edges: as for `nas.supernet`.
      edge_weights: makes α of a kind {"ops": [edges, ops], "edges": [edges]}, as `nas.edge_normalized` takes it.
      learn_init: makes λ {"alpha": α, "init": θ_0}. Training starts at θ_0 instead of a random draw, and both are
        learned together over many tasks (MetaNAS, T-NAS). This is second-order MAML with an α. It needs a rule that
        differentiates through all of training (`hypergrad.unrolled`).
      keep: edges into each node, as for `nas.derive_genotype`. The default is the network's own value, which is 2
        unless the network sets another one. The search's network is `search.supernet.network`, which has the new value.
        Use that network to decode, count or encode genotypes (`nas.cost_of`, `nas.genotype_to_configuration`).

    Returns:
      A `Search`.

    Raises:
      ValueError: if the spec and the shapes do not fit, or if `single_path` is set and the relaxation gives weight to
        several ops. Also if `relaxation` or `decode` is not a relaxation, or if `penalty` is not a function. Also if
        `keep` is neither None nor an integer of at least 1, or if it is given for NAS-Bench-101's space. `weights` and
        `genotype` raise it if α has other kinds of cells or other shapes. The estimator's `init` raises it if `loss` is
        the default and untraced labels of the task are not classes. (With such labels, a traced loss is NaN instead:
        see `Search.found`.)

    >>> import jax
    >>> from metaopt import nas
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    >>> table = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2)
    >>> search = nas.darts(table, (3,), ops=nas.BLOCKS, keep=1)
    >>> alpha = search.hyperparams(jax.random.key(0))  # then `training.fit` a learner of `search.estimator`
    >>> search.settings["method"], search.settings["keep"]  # `fit(settings=search.settings)` knows its checkpoints
    ('darts', 1)
    >>> len(search.genotype(alpha)["cell"])  # an edge into each of two nodes
    2

    A new method also takes only a few lines: replace the relaxation, the penalty or the rule of DARTS. FairDARTS is an
    example (Chu et al., ECCV 2020, https://arxiv.org/abs/1911.12126): its ops do not compete, and a penalty pushes
    their weights to 0 or 1:

    >>> def fair_darts(network, in_shape, *, ops, weight=10.0, **options):
    ...   def penalty(alpha, step):  # -w (sigmoid(α) - 1/2)², mean over entries
    ...     entries = [(jax.nn.sigmoid(a) - 0.5) ** 2 for a in jax.tree.leaves(alpha)]
    ...     return -weight * sum(x.mean() for x in entries) / len(entries)
    ...   options = {"order": "first", "relaxation": nas.sigmoid(), "penalty": penalty, **options}
    ...   return nas.darts(network, in_shape, ops=ops, **options)
    >>> search = fair_darts(table, (3,), ops=nas.BLOCKS)
    >>> weights = search.weights(search.hyperparams(jax.random.key(0)))["cell"]
    >>> weights.shape, bool((abs(weights - 0.5) < 0.01).all())
    ((3, 3), True)
    """
    relax = _relaxations.softmax() if relaxation is None else relaxation
    _relaxations.check_relaxation("relaxation", relax)
    decode = _relaxations.decoding(relax) if decode is None else decode
    _relaxations.check_relaxation("decode", decode)
    if penalty is not None and not callable(penalty):
        raise ValueError(f"`penalty` must be `(α, step) -> []`, such as `nas.resource_penalty(...)`; got {penalty!r}.")
    if isinstance(network, _specs.Network) and keep != "space":
        if keep != network.keep and "graph" in (keep, network.keep):
            raise ValueError(
                '`keep` must be left out for NAS-Bench-101\'s space, whose cells are graphs (its own is "graph"), and '
                f"be a number of edges or None for others; got {keep!r}."
            )
        network = network._replace(keep=keep)  # for all code that decodes genotypes or counts their cost
    supernet = _supernet.supernet(
        network, in_shape, ops=ops, partial=partial, single_path=single_path, remat_edges=remat_edges
    )
    if single_path:
        check_single(relax, network, edge_weights)
    loop = _loop(supernet, relax, loss, decay, optimizer, sampler, learn_init)
    alpha_of = alpha_beside_init if learn_init else lambda hyperparams: hyperparams

    def valid_loss(params, hyperparams, batch, context):
        alpha = alpha_of(hyperparams)
        apart = context._replace(key=jax.random.fold_in(context.key, 1))
        value = loss(_outputs(supernet, relax, params, alpha, batch, apart), batch)
        return value if penalty is None else value + penalty(alpha, context.step)

    problem = inner.problem(loop, valid_loss, outer_batch=outer_batch, with_context=True)

    def hyperparams(key):
        alpha = _supernet.init_alpha(key, network)
        if edge_weights:
            alpha = {kind: {"ops": a, "edges": jnp.zeros(len(a), a.dtype)} for kind, a in alpha.items()}
        return {"alpha": alpha, "init": supernet.init(jax.random.fold_in(key, 1))} if learn_init else alpha

    def weights(hyperparams):
        return _relaxations.mixing_weights(decode, network, alpha_of(hyperparams), jax.random.key(0))

    def genotype(hyperparams):
        return _derivation.derive_genotype(network, jax.device_get(weights(hyperparams)))

    def checked(problem):
        estimator = rule(problem)
        if not isinstance(estimator, base.Estimator):  # it is rejected where it is used
            return estimator

        def init(key, hyperparams, task):
            if isinstance(task, base.Task):
                check_data(loss, network, task.train, task.valid)
            return estimator.init(key, hyperparams, task)

        return estimator._replace(init=init)

    of_any = lambda problem, own: checked(problem)
    settings = {
        "keep": plain(network.keep if isinstance(network, _specs.Network) else keep),
        "relaxation": plain(relax),
        "decode": plain(decode),
        "network": of_network(network),
    }
    estimator = checked(problem)
    return Search(estimator, problem, supernet, hyperparams, alpha_of, weights, genotype, of_any, found, settings)


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
      ValueError: if `order` or `difference` is unknown.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055
    """
    rules = {
        "first": lambda problem: hypergrad.lookahead(problem, num_steps=0),
        "second": lambda problem: hypergrad.darts_fd(problem, epsilon=epsilon, difference=difference),
        "exact": lambda problem: hypergrad.darts_fd(problem, epsilon=None),
    }
    if order not in rules:
        raise ValueError(f"`order` must be one of {', '.join(rules)}; got {order!r}.")
    return architecture_search(network, in_shape, rules[order], ops=ops, **options)


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
      ValueError: if `num_steps < 1`, and as for `architecture_search`.
    """
    _checks.check_integer("num_steps", num_steps, 1)  # with 0 steps, the weights would not be trained
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
      ValueError: if `num_steps < 1`, and as for `architecture_search`.

    Source: Dong & Yang, CVPR 2019, https://arxiv.org/abs/1910.04465
    """
    _checks.check_integer("num_steps", num_steps, 1)  # with 0 steps, Optax's schedule would stay at 10
    relaxation = _relaxations.gumbel_softmax(optax.linear_schedule(10.0, 0.1, num_steps), hard=True)
    options = {"relaxation": relaxation, "single_path": True, "order": "first", **options}
    return darts(network, in_shape, ops=ops, **options)


@with_settings
def pc_darts(
    network: _specs.Space, in_shape: Sequence[int], *, ops: Mapping[str, _ops.Op], partial: int = 4, **options: Any
) -> Search:
    """PC-DARTS: only 1/K of the channels goes through the ops, and the edges into a node share its weight.

    Args:
      network: the spec of the network to search; K divides its channels.
      in_shape: shape of one input.
      ops: the ops of the space.
      partial: K.
      **options: as for `architecture_search`.

    Returns:
      A `Search`, first-order. (As published, α does not move in the first epochs: use a schedule for its rate.)

    Source: Xu et al., ICLR 2020, https://arxiv.org/abs/1907.05737
    """
    options = {
        "relaxation": _relaxations.edge_normalized(_relaxations.softmax()),
        "edge_weights": True,
        "order": "first",
        **options,
    }
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
      ValueError: if `num_steps < 1`, and as for `architecture_search`.

    Source: Chu et al., ICLR 2021, https://arxiv.org/abs/2009.01027
    """
    _checks.check_integer("num_steps", num_steps, 1)  # with 0 steps, the skip would stay
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
      weight: the weight at the end, not negative; with 0 the method is `darts(order="first")`.
      penalty: a further penalty, as for `architecture_search`.
      **options: as for `architecture_search`.

    Returns:
      A `Search`, first-order unless `order` is given.

    Raises:
      ValueError: if `num_steps < 1`, if `weight` is negative, and as for `architecture_search`.

    Source: Ye et al., CVPR 2022, https://arxiv.org/abs/2203.01665
    """
    if penalty is not None and not callable(penalty):
        raise ValueError(f"`penalty` must be `(α, step) -> []`; got {penalty!r}. The weight of β-DARTS is `weight=`.")
    _checks.check_integer("num_steps", num_steps, 1)  # with 0 steps, the weight would stay 0
    if not isinstance(weight, Tracer):
        _checks.check_positive("weight", weight, zero=True)
    grows = optax.linear_schedule(0.0, weight, num_steps)

    def decay(alpha, step):
        value = grows(step) * _relaxations.beta_decay(alpha)
        return value if penalty is None else value + penalty(alpha, step)

    return darts(network, in_shape, ops=ops, penalty=decay, **{"order": "first", **options})


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
      budget: in the table's unit. It may be traced, so that one program can search within many budgets.
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
