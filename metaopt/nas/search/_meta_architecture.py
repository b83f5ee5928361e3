"""Learns a predictor h of α for a task, and a shared start θ_0 of training, by hypergradients over many tasks.

    α = h(t; φ),    θ_0 shared,    F(φ, θ_0) = Σ_t f_t(θ_T(θ_0, h(t; φ)), h(t; φ))

On a new task, h predicts α at once. A few alternating steps of weights and α (`lookahead`, the rule of DARTS) fine-tune
both.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import tree_leaves_with_path

from metaopt import _proposals, base, hypergrad, predictors, spaces, training
from metaopt.nas import _specs
from metaopt.nas.search._search import Search
from metaopt.nas.search._settings import plain


class FineTunedArchitecture(NamedTuple):
    """The result of fine-tuning on a new task.

    Attributes:
      alpha: α after the last step. For a search with `learn_init`, `search.genotype({"alpha": alpha})` decodes it.
      params: the supernet's weights after the last step. `search.supernet.inherit` extracts the weights of one network.
        `trained_network(search.supernet, params, task.train, weights=search.weights(alpha))` predicts with them.
      values: [num_steps] the outer loss before every step of α.
    """

    alpha: base.HyperParams
    params: base.Params
    values: jax.Array


class MetaArchitecture(NamedTuple):
    """An architecture search over many tasks; `training.fit` learns its λ with the estimator `over_tasks()`.

    Attributes:
      estimator: estimates dF/dλ for one task. λ is {"h": φ, "init": θ_0}, or {"h": φ} if θ_0 is drawn at random.
      hyperparams: `(key) -> λ`, the starting point.
      alpha: `(λ, task) -> α`, the prediction of h for a task.
      genotype: `(λ, task) -> Genotype`, a*.
      fine_tune: `(key, λ, task) -> FineTunedArchitecture`, with the fields `alpha` (α after the last step), `params`
        (the supernet's weights after it) and `values` [num_steps] (the outer loss before every step of α). Jit it, and
        vmap it over tasks.
      over_tasks: `(**options) -> ` the estimator for a batch of tasks: `hypergrad.over_tasks(estimator, **options)`.
        On a CPU (as the default backend), tasks run one after the other if inputs have positions, as images do.
        Their activations then stay in the caches (`experiments/benchmarks/architecture.py`). The option `task_chunk`
        overrides this.
      settings: settings of the search and of h, as JSON values, for `training.fit(settings=meta.settings)`.

    `metaopt.save` writes λ as a `TrainedMetaArchitecture`.
    """

    estimator: base.Estimator
    hyperparams: Callable[[jax.Array], base.HyperParams]
    alpha: Callable[[base.HyperParams, base.Task], base.HyperParams]
    genotype: Callable[[base.HyperParams, base.Task], _specs.Genotype]
    fine_tune: Callable[[jax.Array, base.HyperParams, base.Task], FineTunedArchitecture]
    over_tasks: Callable[..., base.Estimator]
    settings: dict[str, Any]


def meta_architecture_search(
    search: Search,
    predictor: base.Predictor,
    *,
    num_steps: int = 10,
    ahead: int = 1,
    optimizer: optax.GradientTransformation | None = None,
) -> MetaArchitecture:
    """Makes an architecture search over many tasks: h predicts α for each task, and a few steps fine-tune it.

    With `architecture_search(..., learn_init=True)` and `hypergrad.unrolled`, α and the start of training are learned
    together through T inner steps. With a predictor that reads nothing of the task, this is the shared α of T-NAS and
    MetaNAS, learned by exact second-order MAML. Without `learn_init`, only h is learned, by any rule.

    Args:
      search: a search for one task; its `estimator` is the rule that learns h.
      predictor: h, whose prediction is α as `search` takes it. Use `predictors.mlp` for a task's features, or
        `predictors.dataset_embedding` for its rows. Their space has `spaces.real` leaves, one [edges, ops] for each
        kind. `spaces.Unconstrained` predictions are converted by the space in `predictor.config`, which must have one
        (`{"space": spaces.to_json(space)}`). If h predicts a spread, α is the center of the distribution. The estimator
        rejects such an h, since a spread has no gradient here.
      num_steps: steps of fine-tuning, at least 0. Each is one step of the weights, starting from θ_0, and then one
        step of α.
      ahead: virtual steps of `hypergrad.lookahead` in fine-tuning; 1 is second-order DARTS, 0 is first-order DARTS.
      optimizer: the optimizer of α in fine-tuning; `optax.adam(0.05, b1=0.5)` by default.

    Returns:
      A `MetaArchitecture`; its estimator is of the same kind as that of the search.

    Raises:
      ValueError: if `search` is the result of `under_budget`.
      ValueError: at trace time, if h predicts α of other kinds or shapes than the search has, or if the estimator is
        used with an h that predicts a spread.

    Sources: Elsken et al., CVPR 2020 (MetaNAS), https://arxiv.org/abs/1911.11090; Lian et al., ICLR 2020 (T-NAS).

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import base, hypergrad, nas, predictors, spaces
    >>> cell = nas.complete_cell(1, ("none", "mlp"))
    >>> table = nas.Network(
    ...     {"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), num_outputs=2
    ... )
    >>> rule = lambda problem: hypergrad.unrolled(problem, num_steps=3)
    >>> search = nas.architecture_search(table, (3,), rule, ops=nas.BLOCKS, learn_init=True)
    >>> h = predictors.mlp({"cell": spaces.real(shape=(1, 2))}, num_features=5)
    >>> meta = nas.meta_architecture_search(search, h, num_steps=2)
    >>> # `training.fit` of `meta.over_tasks()` learns it
    >>> learned = meta.hyperparams(jax.random.key(0))
    >>> sorted(learned)
    ['h', 'init']

    A new task, whose features h reads:

    >>> rows = {"x": jax.random.normal(jax.random.key(1), (16, 3)), "y": jnp.arange(16) % 2}
    >>> task = base.Task(rows, rows, features=jnp.ones(5))
    >>> sorted(meta.genotype(learned, task))  # a*, at once: kind -> edges
    ['cell']
    >>> tuned = jax.jit(meta.fine_tune)(jax.random.key(2), learned, task)
    >>> tuned.values.shape, sorted(search.genotype({"alpha": tuned.alpha}))
    ((2,), ['cell'])
    """
    optimizer = optax.adam(0.05, b1=0.5) if optimizer is None else optimizer
    template = jax.eval_shape(search.hyperparams, jax.eval_shape(lambda: jax.random.key(0)))
    if isinstance(template, dict) and "multiplier" in template:
        raise ValueError(
            "`search` has a multiplier, which h cannot predict. Instead of `under_budget`, use a search with "
            "`penalty=nas.resource_penalty(...)`."
        )
    alpha = functools.partial(_alpha, predictor, jax.eval_shape(search.alpha, template))
    predict = lambda meta_params, task: _with_start(meta_params, alpha(meta_params, task))
    trained = lambda meta_params, task: _with_start(meta_params, alpha(meta_params, task, is_trained=True))
    hyperparams = functools.partial(_start, search, predictor)
    estimator = predictors.amortize(search.estimator, base.Predictor(hyperparams, trained, predictor.config))
    return MetaArchitecture(
        estimator=estimator,
        hyperparams=hyperparams,
        alpha=alpha,
        genotype=lambda meta_params, task: search.genotype(predict(meta_params, task)),
        fine_tune=functools.partial(_fine_tune, search, alpha, optimizer, num_steps, ahead),
        over_tasks=functools.partial(_over_tasks, estimator, search.supernet),
        settings={"search": search.settings, "h": plain(predictor.config, depth=20)},
    )


def _start(search, predictor, key):
    """Draws λ: h's weights, and θ_0 if the search learns it."""
    h_key, init_key = jax.random.split(key)
    own = search.hyperparams(init_key)
    learns_init = isinstance(own, dict) and set(own) == {"alpha", "init"}
    return {"h": predictor.init(h_key), **({"init": own["init"]} if learns_init else {})}


def _with_start(meta_params, alpha):
    """Returns the search's λ: α, with θ_0 if it is learned."""
    return {"alpha": alpha, "init": meta_params["init"]} if "init" in meta_params else alpha


def _alpha(predictor, template, meta_params, task, is_trained=False):
    """Predicts α; raises ValueError if it does not have the leaves and shapes of `template`."""
    prediction = predictor.apply(meta_params["h"], task)
    alpha = _proposals.center_of(prediction)
    if is_trained and alpha is not prediction:
        raise ValueError("`predictor` predicts a spread, which gets no gradient here. Create it without `spread`.")
    if isinstance(alpha, spaces.Unconstrained):
        alpha = spaces.to_constrained(spaces.from_json(predictor.config["space"]), alpha)
    shapes = lambda tree: {jax.tree_util.keystr(path) or "α": x.shape for path, x in tree_leaves_with_path(tree)}
    if jax.tree.structure(alpha) != jax.tree.structure(template) or shapes(alpha) != shapes(template):
        raise ValueError(
            f"`predictor` must return α with the leaves and shapes of the search, {shapes(template)}; it returned "
            f"{shapes(alpha)}. `predictors.mlp` returns such a tree for a space with the same leaves, "
            "`{kind: spaces.real(shape=(edges, ops))}`."
        )
    return alpha


def _fine_tune(search, predict_alpha, optimizer, num_steps, ahead, key, meta_params, task) -> FineTunedArchitecture:
    """Alternates steps of the weights from θ_0, which stays fixed, and steps of α."""
    problem = base.reparametrized(search.problem, lambda alpha, step: _with_start(meta_params, alpha))
    learner = training.learner(hypergrad.lookahead(problem, num_steps=ahead), optimizer)

    def step(state, _):
        state, metrics = learner.step(state)
        return state, metrics["value"]

    state = learner.init(key, predict_alpha(meta_params, task), task)
    state, values = jax.lax.scan(step, state, length=num_steps)
    return FineTunedArchitecture(state.hyperparams, search.problem.loop.params(state.estimator_state.inner), values)


def _over_tasks(estimator, supernet, **options) -> base.Estimator:
    if jax.default_backend() == "cpu" and len(supernet.in_shape) > 1:
        options = {"task_chunk": 1, **options}
    return hypergrad.over_tasks(estimator, **options)
