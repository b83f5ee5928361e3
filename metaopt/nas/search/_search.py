"""The contract of all architecture searches, `Search`, and the factory behind them, `architecture_search`.

A method with a paper's name sets options of `architecture_search` and adds no numerics. The example of
`architecture_search` adds such a method in a few lines. `tests/nas/test_searches.py` explains how to add it to the
tests.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _batches, _checks, base, inner, training
from metaopt.nas import _derivation, _ops, _relaxations, _specs, _supernet
from metaopt.nas.search._settings import of_network, plain, with_settings


class Search(NamedTuple):
    """A search for α on one task; `training.learner` and `training.fit` run it.

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
      rule: `(problem, own) -> Estimator`, the function that made `estimator`. `under_budget` uses it to make an
        estimator of another problem with another λ: `own(λ)` extracts the λ of this search.
      selected_alpha: `(training.FitResult) -> α`, the result of a run: α after its last step (an earlier α for
        RobustDARTS). Raises ValueError if no step had a finite loss and a finite hypergradient. α has then not moved,
        and `genotype` would decode a cell that no search selected.
      settings: the method's name, the network, and the other arguments of the search, as JSON values. Pass them as
        `training.fit(settings=search.settings)`. Different searches may have α and states of the same shapes. So
        without settings, a checkpoint of another search could be continued as if it were of this one. Functions are
        identified by their names and the values that they enclose, not by their results. `relaxation`, `decode`, `keep`
        and `network` are stored after defaults are filled in.
    """

    estimator: base.Estimator
    problem: base.Problem
    supernet: _supernet.Supernet
    hyperparams: Callable[[jax.Array], base.HyperParams]
    alpha: Callable[[base.HyperParams], base.HyperParams]
    weights: Callable[[base.HyperParams], dict[str, jax.Array]]
    genotype: Callable[[base.HyperParams], _specs.Genotype]
    rule: Callable[[base.Problem, Callable], base.Estimator]
    selected_alpha: Callable[[training.FitResult], base.HyperParams]
    settings: dict[str, Any]


def sgd(hyperparams: base.HyperParams) -> optax.GradientTransformation:
    """The DARTS optimizer for weights, at a constant rate."""
    return optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.025, momentum=0.9))


@with_settings
def architecture_search(
    network: _specs.Space,
    in_shape: Sequence[int],
    rule: Callable[[base.Problem], base.Estimator],
    *,
    ops: Mapping[str, _ops.Op],
    loss: Callable = inner.cross_entropy,
    decay: float = 3e-4,
    optimizer: Callable[[base.HyperParams], optax.GradientTransformation] = sgd,
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
    """The general architecture search, with any rule for dF/dα. `darts` and other searches are settings of it.

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
      relaxation: maps α of a kind of cell to mixing weights, `(alpha, cell, key, step) -> [edges, ops]`;
        `nas.softmax()` by default.
      decode: the relaxation by which genotypes are read from α, at step 0 and with one fixed key. The default is
        `relaxation` without noise and auxiliary paths. If your own relaxation has noise or a schedule, pass another one
        here.
      penalty: `(α, step) -> []`. A penalty on cost must be made for the network that is searched, including its
        `keep`; otherwise it counts other edges. With `keep=1`, pass
        `nas.resource_penalty(table, network._replace(keep=1), ...)`.
      partial: as for `nas.supernet`.
      single_path: as for `nas.supernet`.
      remat_edges: as for `nas.supernet`.
      edge_weights: if true, α of each kind of cell is {"ops": [edges, ops], "edges": β [edges]}. The relaxation gets
        "ops", and its weights of an edge are multiplied by softmax(β)[e] over the edges into the same node (PC-DARTS).
      learn_init: if true, λ is {"alpha": α, "init": θ_0}. Training starts at θ_0 instead of a random draw, and both are
        learned together over many tasks (MetaNAS, T-NAS). This is second-order MAML with an α. It needs a rule that
        differentiates through all of training (`hypergrad.unrolled`).
      keep: edges into each node, as for `nas.derive_genotype`. The default is the network's own value, which is 2
        unless the network sets another one. The search's network is `search.supernet.network`, which has the new value.
        Use that network to decode, count or encode genotypes (`CostTable.cost_of`, `nas.genotype_to_configuration`).

    Returns:
      A `Search`.

    Raises:
      ValueError: if the spec and the shapes do not fit, or if `single_path` is set and the relaxation gives weight to
        several ops. Also if `keep` is given for NAS-Bench-101's space. `weights` and `genotype` raise it if α has other
        kinds of cells or other shapes. `training.fit` and the estimator's `init` raise it if `loss` is the default and
        untraced labels of the task are not classes. (Labels of a batch of tasks are traced. If they are not classes,
        the loss is NaN: see `Search.selected_alpha`.)

    >>> import jax
    >>> from metaopt import nas
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    >>> table = nas.Network(
    ...     {"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2
    ... )
    >>> search = nas.darts(table, (3,), ops=nas.BLOCKS, keep=1)
    >>> # the initial α, for `training.fit` with a learner of `search.estimator`
    >>> alpha = search.hyperparams(jax.random.key(0))
    >>> # `fit(settings=search.settings)` knows its checkpoints
    >>> search.settings["method"], search.settings["keep"]
    ('darts', 1)
    >>> len(search.genotype(alpha)["cell"])  # an edge into each of two nodes
    2

    A new method also takes only a few lines: replace the relaxation, the penalty or the rule of DARTS. FairDARTS is an
    example (Chu et al., ECCV 2020, https://arxiv.org/abs/1911.12126): its ops do not compete, and a penalty pushes
    their weights to 0 or 1:

    >>> def fair_darts(network, in_shape, *, ops, weight=10.0, **options):
    ...     def penalty(alpha, step):  # -w (sigmoid(α) - 1/2)², mean over entries
    ...         entries = [(jax.nn.sigmoid(a) - 0.5) ** 2 for a in jax.tree.leaves(alpha)]
    ...         return -weight * sum(x.mean() for x in entries) / len(entries)
    ...
    ...     options = {
    ...         "order": "first",
    ...         "relaxation": nas.sigmoid(),
    ...         "penalty": penalty,
    ...         **options,
    ...     }
    ...     return nas.darts(network, in_shape, ops=ops, **options)
    >>> search = fair_darts(table, (3,), ops=nas.BLOCKS)
    >>> weights = search.weights(search.hyperparams(jax.random.key(0)))["cell"]
    >>> weights.shape, bool((abs(weights - 0.5) < 0.01).all())
    ((3, 3), True)
    """
    relax = _relaxations.softmax() if relaxation is None else relaxation
    decode = _relaxations.decoding(relax) if decode is None else decode
    if edge_weights:
        relax, decode = _relaxations.edge_normalized(relax), _relaxations.edge_normalized(decode)
    network = _with_keep(network, keep)
    supernet = _supernet.supernet(
        network, in_shape, ops=ops, partial=partial, single_path=single_path, remat_edges=remat_edges
    )
    if single_path:
        _check_single_path(relax, network, edge_weights)
    loop = training_loop(supernet, relax, loss, decay, optimizer, sampler, learn_init)
    valid_loss = functools.partial(_valid_loss, supernet, relax, loss, penalty, learn_init)
    problem = inner.problem(loop, valid_loss, outer_batch=outer_batch, with_context=True)
    alpha = functools.partial(_alpha, learn_init)
    weights = lambda hyperparams: _relaxations.mixing_weights(decode, network, alpha(hyperparams), jax.random.key(0))
    make_estimator = lambda problem, own: _checks_rows(rule(problem), supernet, loss, sampler, outer_batch)
    return Search(
        estimator=make_estimator(problem, None),
        problem=problem,
        supernet=supernet,
        hyperparams=functools.partial(_start, supernet, edge_weights, learn_init),
        alpha=alpha,
        weights=weights,
        genotype=lambda hyperparams: _derivation.derive_genotype(network, jax.device_get(weights(hyperparams))),
        rule=make_estimator,
        selected_alpha=_last_alpha,
        settings={
            "keep": plain(network.keep if isinstance(network, _specs.Network) else keep),
            "relaxation": plain(relax),
            "decode": plain(decode),
            "network": of_network(network),
        },
    )


def check_rows(
    supernet: _supernet.Supernet, loss: Callable, name: str, rows: Any, draw: Callable[[Any], Any] = lambda rows: rows
) -> None:
    """Raises ValueError if rows do not fit the network, or if `loss` is the default and labels are not classes.

    The network itself sees only batches. Its errors would have the shape of a batch, not of the caller's arrays.

    Args:
      supernet: the network that is searched or trained.
      loss: its loss. With another loss than the default, labels may be of another kind.
      name: the name of `rows` in the error message, such as "task.train".
      rows: a dict with "x" and "y"; other values pass. Of traced arrays, only shapes and types are checked.
      draw: `(rows) -> batch`. Rows of another shape pass if a batch fits: a sampler may cut or reshape them.
    """
    network = supernet.network
    fits = lambda rows: "x" not in rows or np.shape(rows["x"])[1:] == supernet.in_shape
    if not isinstance(rows, Mapping):
        return
    has_own_labels = loss is inner.cross_entropy and isinstance(network, _specs.Network) and network.pooled
    has_columns = lambda rows: has_own_labels and "y" in rows and np.ndim(rows["y"]) != 1  # instead of one label a row
    batch = rows if fits(rows) and not has_columns(rows) else jax.eval_shape(draw, rows)
    if not fits(batch):
        _supernet.check_shape(f"{name}['x']", rows["x"], supernet.in_shape, of_task=True)
    _check_labels(supernet, loss, name, rows, np.shape(rows["y"])[:1] if has_columns(batch) else None)


def _check_labels(supernet, loss, name: str, rows: Any, shape: tuple[int, ...] | None = None) -> None:
    if loss is inner.cross_entropy:
        _batches.check_labels(rows, supernet.network.num_outputs, shape, name=f"`{name}['y']`")


def _first_batch(sampler: inner.Sampler | None, key: jax.Array) -> Callable[[Any], Any]:
    return lambda rows: rows if sampler is None else sampler(key, jnp.int32(0), rows)


def training_loop(supernet, relaxation, loss, decay, optimizer, sampler, learn_init=False) -> base.InnerLoop:
    """Returns the inner loop that trains a supernet's weights."""

    def train_loss(params, hyperparams, batch, context):
        outputs = _outputs(supernet, relaxation, params, _alpha(learn_init, hyperparams), batch, context)
        return loss(outputs, batch) + decay / 2 * optax.tree.norm(params, squared=True)

    def init(key, hyperparams, data):
        check_rows(supernet, loss, "data", data, _first_batch(sampler, key))
        return hyperparams["init"] if learn_init else supernet.init(key), None

    return inner.loop(train_loss, optimizer, init=init, sampler=sampler, with_context=True)


def _alpha(learn_init: bool, hyperparams: base.HyperParams) -> base.HyperParams:
    return hyperparams["alpha"] if learn_init else hyperparams


def _outputs(supernet, relaxation, params, alpha, batch, context):
    mask = _batches.row_mask(batch)  # first, because its error explains a batch of the wrong form
    weights = _relaxations.mixing_weights(relaxation, supernet.network, alpha, context.key, context.step)
    return supernet.apply(params, weights, batch["x"], None, mask)


def _valid_loss(supernet, relaxation, loss, penalty, learn_init, params, hyperparams, batch, context):
    """f: the loss on validation rows, with noise that training does not share, plus the penalty."""
    alpha = _alpha(learn_init, hyperparams)
    own_noise = context._replace(key=jax.random.fold_in(context.key, 1))
    value = loss(_outputs(supernet, relaxation, params, alpha, batch, own_noise), batch)
    return value if penalty is None else value + penalty(alpha, context.step)


def _start(supernet, edge_weights, learn_init, key):
    """Draws the λ that a search starts from."""
    alpha = _supernet.init_alpha(key, supernet.network)
    if edge_weights:
        alpha = {kind: {"ops": a, "edges": jnp.zeros(len(a), a.dtype)} for kind, a in alpha.items()}
    return {"alpha": alpha, "init": supernet.init(jax.random.fold_in(key, 1))} if learn_init else alpha


def _checks_rows(estimator, supernet, loss, sampler, outer_batch) -> base.Estimator:
    """Returns the estimator, whose `init` checks the rows of its task. `fit` lets it see the values of labels once."""
    if not isinstance(estimator, base.Estimator):  # it is rejected where it is used
        return estimator

    def init(key, hyperparams, task):
        if isinstance(task, base.Task):
            draws = {"train": _first_batch(sampler, key), "valid": lambda rows: rows}
            if outer_batch is not None:
                draws["valid"] = lambda rows: outer_batch(key, task._replace(valid=rows))
            for name, draw in draws.items():
                rows = getattr(task, name)
                if _has_axes(rows, 1 + len(supernet.in_shape)):
                    check_rows(supernet, loss, f"task.{name}", rows, draw)
                else:  # perhaps a batch of tasks, if the rule has `over_tasks`; the loop's `init` checks each task
                    _check_labels(supernet, loss, f"task.{name}", rows)
            if isinstance(task.train, Mapping):
                _checks.warn_of_unscaled_images("`task.train['x']`", task.train.get("x"))
        return estimator.init(key, hyperparams, task)

    return estimator._replace(init=init)


def _has_axes(rows: Any, num_axes: int) -> bool:
    return isinstance(rows, Mapping) and np.ndim(rows.get("x")) == num_axes


def _with_keep(network: _specs.Space, keep: int | None | str) -> _specs.Space:
    """Returns the network with its own `keep`, for all code that decodes genotypes or counts their cost."""
    if not isinstance(network, _specs.Network) or keep == "space":
        return network
    if keep != network.keep and "graph" in (keep, network.keep):
        raise ValueError(
            '`keep` must be left out for NAS-Bench-101\'s space, whose cells are graphs (its own is "graph"), and be a '
            f"number of edges or None for others; got {keep!r}."
        )
    return network._replace(keep=keep)


def _check_single_path(relaxation, network, edge_weights) -> None:
    """Raises ValueError if a relaxation gives weight to several ops of an edge, even at one-hot α.

    On a single path only one of them would run.
    """
    with jax.ensure_compile_time_eval():
        alpha = {kind: jnp.eye(len(c.edges[0].ops))[jnp.zeros(len(c.edges), int)] for kind, c in network.cells.items()}
        if edge_weights:
            alpha = {kind: {"ops": a, "edges": jnp.zeros(len(a))} for kind, a in alpha.items()}
        weights = _relaxations.mixing_weights(relaxation, network, alpha, jax.random.key(0))
        several = [kind for kind, w in weights.items() if bool(((w != 0).sum(-1) > 1).any())]
    if several:
        raise ValueError(
            f"`single_path` runs only the op with the largest weight, but `relaxation` gives weight to several ops of "
            f"an edge of {several[0]!r}. Use `nas.gumbel_softmax(..., hard=True)` or `nas.uniform_path()`."
        )


def _last_alpha(result: training.FitResult) -> base.HyperParams:
    """Returns λ after the last step; raises ValueError if no step had a finite loss and a finite hypergradient."""
    num = len(result.history.get("skipped", ()))
    if num and not (np.isfinite(result.history["value"]) & (np.asarray(result.history["skipped"]) == 0)).any():
        raise ValueError(
            f"None of the run's {num} steps had a finite loss and a finite hypergradient, so α was not trained and has "
            "no meaningful genotype. Losses (`result.history`) are NaN if labels are not classes, if data are NaN "
            f"(`tasks.stack` rejects them), or if the weights diverge (use a smaller rate). {_checks.LABELS_ADVICE}"
        )
    return result.hyperparams
