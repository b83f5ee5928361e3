"""Few-shot learning under the papers' names: each method is a setting of `adaptation`.

This module adds only losses, and heads that are computed from a support set (prototypes, ridge regression).
"""

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import _checks, hypergrad, inner
from metaopt.few_shot._adaptation import Adaptation, adaptation
from metaopt.few_shot._adaptation_checks import check_pattern


def _check_options(name: str, options: Mapping[str, Any], *taken: str) -> None:
    """Raises ValueError if an option is given that the method sets itself or cannot have."""
    given = [option for option in taken if option in options]
    if given:
        raise ValueError(
            f"`{name}` has no option `{given[0]}`, because the method fixes it. Use `few_shot.adaptation` to choose it."
        )


def maml(loss: Callable, *, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """MAML: F(λ) = f(θ_T), θ_0 = λ, θ_{t+1} = θ_t − α ∇ℓ(θ_t), differentiated through all T steps.

    Args:
      loss: ℓ, and also f: `(params, hyperparams, batch) -> []`.
      num_steps: T.
      rate: α, in θ² per unit of the loss.
      **options: as for `adaptation`. Use `keep_support=True` if the model is normalized by the support set, such as
        `conv4(normalization="support")`, which rejects query sets without it.

    Returns:
      An `Adaptation`. It takes the time of T second-order gradients per task; memory grows with T (`remat`).

    Source: Finn, Abbeel & Levine, ICML 2017, https://arxiv.org/abs/1703.03400

    >>> import jax, optax
    >>> from metaopt import few_shot, hypergrad, tasks, training
    >>> loss = lambda params, hyperparams, batch: ((params["a"] * batch["x"] + params["b"] - batch["y"]) ** 2).mean()
    >>> line = few_shot.maml(loss, num_steps=2)
    >>> result = training.fit(
    ...     training.learner(hypergrad.over_tasks(line.estimator), optax.adam(0.1)),
    ...     tasks.episode_batches(tasks.sinusoids(num_shots=5), 4),
    ...     hyperparams=line.hyperparams({"a": 1.0, "b": 1.0}), num_steps=5, key=jax.random.key(0),
    ... )
    >>> sorted(result.hyperparams["init"])
    ['a', 'b']
    """
    return adaptation(loss, num_steps=num_steps, rate=rate, **options)


def fomaml(loss: Callable, *, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """First-order MAML: dF/dλ ≈ ∇f(θ_T). Inner gradients are held constant, so that ∂θ_T/∂λ is the identity.

    It is backpropagation truncated to one step (`hypergrad.truncated`) in the coordinates δ = θ − λ, with ∇ℓ held
    constant. In these coordinates every step depends on λ, by θ = λ + δ, so a cut between steps, at δ, loses nothing.
    In θ itself, λ is only the start, so a cut would lose everything. If ∇ℓ is not held constant, truncation to one step
    keeps the last step's curvature: (I − α ∂²ℓ/∂θ²) ∇f(θ_T).

    Args:
      loss: as for `maml`.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` whose estimator is "biased". The bias is of the order of α T times the curvature of ℓ.

    Raises:
      ValueError: if `order` is given, which this method sets itself, or if an option is invalid.

    Source: Finn, Abbeel & Levine, ICML 2017, Sec. 5.2, https://arxiv.org/abs/1703.03400
    """
    _check_options("fomaml", options, "order")
    return adaptation(loss, num_steps=num_steps, rate=rate, order="first", **options)


def reptile(loss: Callable, *, num_steps: int = 5, rate: float = 0.01, **options: Any) -> Adaptation:
    """Reptile: λ ← λ + ε (θ_T − λ); the outer optimizer is `optax.sgd(ε)` or any other.

    Args:
      loss: as for `maml`.
      num_steps: T; use more than one, since one step is joint training.
      rate: α.
      **options: as for `adaptation`. A `sampler` of minibatches is usual. All leaves adapt.

    Returns:
      An `Adaptation` whose estimator is "pseudo": see `hypergrad.reptile`.

    Raises:
      ValueError: if `rule` is given, which this method sets itself, or if an option is invalid.

    Source: Nichol, Achiam & Schulman, 2018, https://arxiv.org/abs/1803.02999
    """
    _check_options("reptile", options, "rule")
    rule = lambda problem: hypergrad.reptile(problem, num_steps=operator.index(num_steps))
    return adaptation(loss, num_steps=num_steps, rate=rate, rule=rule, **options)


HEAD = "(^|/)head(/|$)"  # leaves within a part named "head", but not "heads" or "forehead"


def anil(loss: Callable, *, head: str = HEAD, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """ANIL, almost no inner loop: MAML in which only the head adapts.

    Args:
      loss: as for `maml`.
      head: the leaves that adapt, as `adapt` of `adaptation`. The default is all leaves within a part named "head";
        "" is MAML.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation`. The body is computed once for the support set and once for the query set. More inner steps cost
      only passes through the head.

    Raises:
      ValueError: if `adapt` is given, which this method sets itself, or if an option is invalid.

    Source: Raghu et al., ICLR 2020, https://arxiv.org/abs/1909.09157
    """
    _check_options("anil", options, "adapt")
    check_pattern("head", head)
    return adaptation(loss, adapt=head, num_steps=num_steps, rate=rate, **options)


def boil(loss: Callable, *, head: str = HEAD, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """BOIL, body only inner loop: MAML in which everything but the head adapts.

    Args:
      loss: as for `maml`.
      head: the leaves that do not adapt: a regular expression for paths, with the default of `anil`.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation`.

    Raises:
      ValueError: if `adapt` is given, which this method sets itself, or if an option is invalid.

    Source: Oh et al., ICLR 2021, https://arxiv.org/abs/2008.08882
    """
    _check_options("boil", options, "adapt")
    check_pattern("head", head)
    if not isinstance(head, str) and head.flags & ~re.UNICODE:
        raise ValueError(f"`head` must have no flags, which do not survive within another pattern; got {head!r}.")
    head = getattr(head, "pattern", head)
    return adaptation(loss, adapt=f"^(?!.*(?:{head}))", num_steps=num_steps, rate=rate, **options)


def meta_sgd(
    loss: Callable, *, num_steps: int = 1, rate: float = 0.01, rates: str = "entry", **options: Any
) -> Adaptation:
    """Meta-SGD: θ_{t+1} = θ_t − α ∘ ∇ℓ(θ_t), with a learned rate for each entry of θ; rates may become negative.

    Args:
      loss: as for `maml`.
      num_steps: T.
      rate: the initial value of all entries of α.
      rates: "entry", or "leaf" for fewer rates.
      **options: as for `adaptation`; `rates_per_step=True` with "leaf" is LSLR of MAML++.

    Returns:
      An `Adaptation` whose λ has "rate", shaped like θ.

    Source: Li et al., 2017, https://arxiv.org/abs/1707.09835
    """
    return adaptation(loss, num_steps=num_steps, rate=rate, rates=rates, **options)


def maml_plus_plus(
    loss: Callable,
    *,
    num_steps: int = 5,
    rate: float = 0.1,
    first_order_steps: int = 0,
    multi_step_steps: int = 0,
    **options: Any,
) -> Adaptation:
    """MAML++: a learned rate for each leaf and step; optionally a loss after each step, and first order at the start.

        F = Σ_t w_t f(θ_t),    w_t = max(0, 1 − k/N)/T for t < T,    w_T = 1 − Σ_{t<T} w_t    at outer step k.

    Both schedules are off by default. Only `estimator_at` follows them; `estimator` is the estimator after their end.
    Use `training.learner(lambda step: hypergrad.over_tasks(a.estimator_at(step)), optimizer)`. (The paper keeps a small
    weight on early steps until outer step N, and removes it there.)

    Per-step normalization belongs to the model. A scale and a shift with a leading axis of T are `leaves_per_step`
    (`conv4(num_steps=T)`), and a loss with `with_context` receives the step. Each step is normalized by the statistics
    of its batch. The paper also gathers running statistics for each step. The authors' code never reads them: in
    training and at test it normalizes by the batch (`F.batch_norm(..., training=True)`). Running statistics change no
    prediction, so metaopt does not keep them.

    Args:
      loss: as for `maml`.
      num_steps: T.
      rate: the initial value of all rates.
      first_order_steps: number of outer steps before second derivatives are used.
      multi_step_steps: N; with 0, f is evaluated only after the last step.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation`; its `estimator_at` follows the schedules. λ's "rate" is like θ, with a leading axis of T.

    Raises:
      ValueError: if a number of steps is negative, or if an option is invalid.

    Source: Antoniou, Edwards & Storkey, ICLR 2019, https://arxiv.org/abs/1810.09502; their code,
      https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch (`MetaBatchNormLayer` at 006eb57).
    """

    _check_options("maml_plus_plus", options, "outer")
    _checks.check_integer("first_order_steps", first_order_steps, 0)
    _checks.check_integer("multi_step_steps", multi_step_steps, 0)

    def weights(step):
        early = jnp.maximum(0, 1 - step / multi_step_steps) / num_steps
        return jnp.full(num_steps, early).at[-1].set(1 - (num_steps - 1) * early)

    options = {"rates": "leaf", "rates_per_step": True, "order": first_order_steps or "second", **options}
    outer = weights if multi_step_steps else "last"
    return adaptation(loss, num_steps=num_steps, rate=rate, outer=outer, **options)


def imaml(
    loss: Callable,
    *,
    proximal: float,
    num_steps: int = 16,
    rate: float = 0.01,
    solver: hypergrad.Solver | None = None,
    **options: Any,
) -> Adaptation:
    """iMAML: θ*(λ) = argmin_θ ℓ(θ) + μ |θ − λ|²/2, differentiated at θ*, independently of the path to it:

        dF/dλ = (I + ∂²ℓ/∂θ² / μ)⁻¹ ∇f(θ*).

    Args:
      loss: as for `maml`; ℓ + μ |θ|²/2 should be convex near θ*.
      proximal: μ, positive.
      num_steps: inner steps towards θ*; memory does not depend on their number.
      rate: α, below 2 / (curvature + μ).
      solver: solver of the linear system, `hypergrad.cg()` by default.
      **options: as for `adaptation`, with a fixed rate.

    Returns:
      An `Adaptation` whose estimator is `hypergrad.implicit`; it is "biased" if θ has not reached θ*.

    Raises:
      ValueError: if `proximal` is not positive, or if an option is given that this method sets itself or that belongs
        to unrolling (`order`, `outer`, `remat`).

    Source: Rajeswaran et al., NeurIPS 2019, https://arxiv.org/abs/1909.04630
    """
    if not proximal > 0:
        raise ValueError(f"`proximal` must be positive, or θ* does not depend on the initialization; got {proximal}.")
    _check_options("imaml", options, "rule", "rates", "rates_per_step")
    rule = lambda problem: hypergrad.implicit(problem, num_steps=num_steps, solver=solver, warm_start=False)
    return adaptation(loss, proximal=proximal, num_steps=num_steps, rate=rate, rule=rule, **options)


def cavia(loss: Callable, *, num_context: int, num_steps: int = 2, rate: float = 1.0, **options: Any) -> Adaptation:
    """CAVIA: only a context vector φ adapts, starting from zero: φ_{t+1} = φ_t − α ∇_φ ℓ(φ_t, λ).

    Args:
      loss: as for `maml`. Its `params` are λ["init"], which must be a dict, plus "context" [num_context]. The context
        is an input of the first layer, or the input of a layer that computes FiLM's scales and shifts.
      num_context: number of entries of φ.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`, without `init` and `adapt`.

    Returns:
      An `Adaptation`. `hyperparams` needs no context in the meta-parameters.

    Raises:
      ValueError: if `num_context < 1`, or if `init` or `adapt` is given; at trace time, if λ["init"] is not a dict.

    Source: Zintgraf et al., ICML 2019, https://arxiv.org/abs/1810.03642
    """
    _checks.check_integer("num_context", num_context, 1)
    _check_options("cavia", options, "init", "adapt")

    def init(key, hyperparams, data):
        dtype = jnp.result_type(*jax.tree.leaves(hyperparams["init"]))
        params = {**_as_dict(hyperparams["init"]), "context": jnp.zeros(num_context, dtype)}
        return (params, None) if options.get("with_context") else params

    return adaptation(loss, init=init, adapt="^context$", num_steps=num_steps, rate=rate, **options)


def pretrained(loss: Callable, *, test_steps: int = 10, rate: float = 0.01, **options: Any) -> Adaptation:
    """The baseline of pre-training and fine-tuning: λ is trained on all tasks at once, and adapts only at test.

    It is for regression, and for classes that keep their labels across tasks. If every episode assigns new labels to
    its classes, a single head cannot learn them. Then train features and a head on all classes at once, with
    `tasks.labelled_batches`, and give every task a new head at test, as Chen et al. (ICLR 2019) do. Their head is drawn
    at random; this one starts from prototypes:

        head = few_shot.linear_head(features)
        loss = lambda params, hyperparams, batch: few_shot.cross_entropy(head(params, batch), batch)
        learner = training.learner(few_shot.pretrained(loss).estimator, optax.adam(1e-3))
        result = training.fit(learner, tasks.labelled_batches(sources, 64), ...)    # head: {"w": [D, C], "b": [C]}
        tuned = few_shot.proto_maml(features, adapt="^head", num_steps=10)    # from prototypes; adapt="" tunes all
        method = few_shot.adapted(tuned, result.hyperparams, head)

    This function fine-tunes θ, a task's model, by inner steps. `training.fine_tune` fine-tunes λ, a task's
    hyperparameters, by hypergradient steps.

    Args:
      loss: as for `maml`; F(λ) is the loss of λ itself on the query set.
      test_steps: inner steps at test.
      rate: α, at test.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` with T = 0 in training.

    Raises:
      ValueError: if `num_steps` is given, which this method sets itself, or if an option is invalid.
    """
    _check_options("pretrained", options, "num_steps")
    return adaptation(loss, num_steps=0, test_steps=test_steps, rate=rate, **options)


# ---- Heads computed from the support set -----------------------------------------------------------------------------


def _as_dict(params: Any) -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise ValueError(
            'λ["init"] must be a dict, because the method adds its own leaves to it; '
            f"got {type(params).__name__}. Put the meta-parameters into a dict."
        )
    return dict(params)


def linear_head(features: Callable) -> Callable:
    """Returns `(params, batch) -> outputs` [N, W] of a linear head on features: x ↦ features(x) w + b.

    Args:
      features: `(params, batch) -> [N, D]`, of a batch with "x" and "mask": `conv4(...).features`, or any other.

    Returns:
      A function of `params` with "head": {"w": [D, W], "b": [W]}, and of a batch with "x". Pass it to `adapted`.

    Raises:
      ValueError: if `features` is not a function of two arguments. (A loss, for example, has three.)
    """
    try:
        takes_two = callable(features) and bool(inspect.signature(features).bind("params", "batch"))
    except TypeError:
        takes_two = False
    except ValueError:  # the signature is not available
        takes_two = True
    if not takes_two:
        raise ValueError(
            f"`features` must be a function `(params, batch) -> [N, D]`; got {features!r}. A loss, "
            "`(params, hyperparams, batch) -> []`, is for methods such as `maml`."
        )
    return lambda params, batch: features(params, batch) @ params["head"]["w"] + params["head"]["b"][None]


def cross_entropy(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy over the real rows of an episode, among its real classes.

    Args:
      logits: [N, W].
      batch: with "y" [N], "mask" [N] and "class_mask" [W], as episodes have them.

    Returns:
      [], in nats. In a traced program it is NaN if the label of a real row is not in 0..W-1.

    Raises:
      ValueError: if logits have another shape, such as those of a head for another number of classes, or if untraced
        labels are not in 0..W-1.
    """
    if logits.ndim != 2:
        raise ValueError(
            "`cross_entropy` takes one episode, with logits [N, W], one row for each example; got shape "
            f"{logits.shape}. Use `hypergrad.over_tasks` for a batch of tasks."
        )
    y, ways = batch["y"], batch["class_mask"].shape[0]
    if logits.shape != (*y.shape, ways):  # [N, 1] would broadcast
        raise ValueError(
            f"`cross_entropy` takes logits [N, W] = {(*y.shape, ways)}, one for each row and class of the episode; got "
            f"{logits.shape}: a head for {logits.shape[1]} classes. Episodes of several numbers of classes need a head "
            "that the support set makes (`proto_maml`, `ridge_head`, ...)."
        )
    return inner.cross_entropy(logits, batch)


def _one_hot(batch: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """Returns [N, W], with zeros in padded rows."""
    _checks.check_labels('The labels "y"', batch["y"], len(batch["class_mask"]), mask=batch["mask"])
    y = jnp.asarray(batch["y"], jnp.int32)  # in 8 bits, class 256 would be the same as class 0
    return jax.nn.one_hot(y, len(batch["class_mask"]), dtype=dtype) * batch["mask"][:, None]


def _with_head(features: Callable, make: Callable, loss: Callable, **options: Any) -> Adaptation:
    """Returns an adaptation whose head is `make(features [N, D], λ, support)`."""
    head = linear_head(features)
    _check_options("a method whose head the support set makes", options, "init", "outer_loss", "with_context")

    def init(key, hyperparams, data):
        params = _as_dict(hyperparams["init"])
        return {**params, "head": make(features(params, data), hyperparams, data)}

    inner_loss = lambda params, hyperparams, batch: loss(head(params, batch), batch)
    return adaptation(inner_loss, init=init, **{"keep_support": True, **options})


def proto_maml(features: Callable, *, num_steps: int = 5, rate: float = 0.01, **options: Any) -> Adaptation:
    """Proto-MAML: MAML whose head starts at the prototypes p_c, the mean features of each class in the support set:

        w_c = 2 p_c,    b_c = −|p_c|²,    so that the first logits are −|x − p_c|² up to a term shared by all classes.

    Args:
      features: `(params, batch) -> [N, D]`; λ["init"] is a dict.
      num_steps: T; 0 is a prototypical network.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` for episodes with classes; `linear_head(features)` predicts.

    Source: Triantafillou et al., ICLR 2020, Sec. 3.2, https://arxiv.org/abs/1903.03096
    """

    def prototypes(x, hyperparams, data):
        one_hot = _one_hot(data, x.dtype)
        means = (one_hot.T @ x) / jnp.maximum(one_hot.sum(0), 1)[:, None]
        return {"w": 2 * means.T, "b": -(means**2).sum(-1)}

    return _with_head(features, prototypes, cross_entropy, num_steps=num_steps, rate=rate, **options)


def prototypical_networks(features: Callable, **options: Any) -> Adaptation:
    """Prototypical networks: the nearest class mean in feature space, p(c | x) ∝ exp(−|x − p_c|²); no inner steps.

    Args:
      features: as for `proto_maml`.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` for episodes with classes; `linear_head(features)` predicts.

    Raises:
      ValueError: if `num_steps` is given, which this method sets itself, or if an option is invalid.

    Source: Snell, Swersky & Zemel, NeurIPS 2017, https://arxiv.org/abs/1703.05175
    """
    _check_options("prototypical_networks", options, "num_steps")
    return proto_maml(features, num_steps=0, **options)


def ridge_head(features: Callable, *, loss: Callable = cross_entropy, **options: Any) -> Adaptation:
    """R2D2: the head is the ridge regression of the support set, solved exactly and differentiated through:

        W = argmin_W |X W − Y|² + ρ |W|² = Xᵀ (X Xᵀ + ρ I)⁻¹ Y,    outputs = scale · X W + shift,

    where X holds the features and, as in the authors' code, a column of ones for an intercept, which is a row of W. The
    intercept is shrunk too, so subtract the mean from targets that are far from 0. The smaller of the two systems is
    solved, by Cholesky. ρ, scale and shift are learned: λ has "log_ridge", "scale" and "shift".

    Args:
      features: `(params, batch) -> [N, D]`; λ["init"] is a dict.
      loss: `(outputs, batch) -> []`: `cross_entropy` (Y is one-hot), or `mean_squared_error` (Y is "y" [N, W]).
      **options: as for `adaptation`. With `num_steps`, the head and the features adapt from this start.

    Returns:
      An `Adaptation`; `linear_head(features)` predicts.

    Raises:
      ValueError: if, at trace time, "y" is neither integers [N] nor numbers [N, W].

    Source: Bertinetto et al., ICLR 2019, https://arxiv.org/abs/1805.08136. MetaOptNet uses a support vector machine
      instead: Lee et al., CVPR 2019, https://arxiv.org/abs/1904.03758
    """

    def solve(x, hyperparams, data):
        classes = jnp.issubdtype(data["y"].dtype, jnp.integer)
        if data["y"].ndim != (1 if classes else 2):
            raise ValueError(
                '`ridge_head` takes a support set whose "y" is integers [N], or numbers [N, W] (of one target: '
                f"`y[:, None]`); got {data['y'].dtype} of shape {data['y'].shape}."
            )
        y = _one_hot(data, x.dtype) if classes else data["y"] * data["mask"][:, None]
        x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1) * data["mask"][:, None]
        ridge = jnp.exp(hyperparams["log_ridge"])
        regular = lambda matrix: matrix + ridge * jnp.eye(len(matrix), dtype=matrix.dtype)
        if x.shape[0] <= x.shape[1]:
            w = x.T @ jax.scipy.linalg.solve(regular(x @ x.T), y, assume_a="pos")
        else:
            w = jax.scipy.linalg.solve(regular(x.T @ x), x.T @ y, assume_a="pos")
        return {"w": hyperparams["scale"] * w[:-1], "b": hyperparams["scale"] * w[-1] + hyperparams["shift"]}

    _check_options("ridge_head", options, "extra")
    extra = {"log_ridge": jnp.zeros([]), "scale": jnp.ones([]), "shift": jnp.zeros([])}
    return _with_head(features, solve, loss, extra=extra, **{"num_steps": 0, **options})
