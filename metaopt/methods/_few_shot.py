"""Few-shot learning under the papers' names: each is a setting of `adaptation`; its own are losses, and heads that a
support set makes (prototypes, ridge regression)."""

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import base, hypergrad, nas
from metaopt.methods._adaptation import Adaptation, adaptation
from metaopt.methods._adaptation_checks import check_pattern


def _check_options(name: str, options: Mapping[str, Any], *taken: str) -> None:
    """ValueError where an option is given that the method sets itself, or cannot have."""
    given = [option for option in taken if option in options]
    if given:
        raise ValueError(f"`{name}` has no option `{given[0]}`: the method says what it is. Take `methods.adaptation`.")


def maml(loss: Callable, *, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """MAML: F(λ) = f(θ_T), θ_0 = λ, θ_{t+1} = θ_t − α ∇g(θ_t), differentiated through all T steps.

    Args:
      loss: g, and f too: `(params, hyperparams, batch) -> []`.
      num_steps: T.
      rate: α, in θ² per unit of the loss.
      **options: as for `adaptation`: `keep_support=True` where the model is normalized by the support set, such as
        `conv4(normalization="support")`, which refuses query sets without it.

    Returns:
      An `Adaptation`. Time is that of T second-order gradients a task; memory grows with T (`remat`).

    Source: Finn, Abbeel & Levine, ICML 2017, https://arxiv.org/abs/1703.03400

    >>> import jax, optax
    >>> from metaopt import hypergrad, methods, tasks, training
    >>> loss = lambda params, hyperparams, batch: ((params["a"] * batch["x"] + params["b"] - batch["y"]) ** 2).mean()
    >>> line = methods.maml(loss, num_steps=2)
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

    It is backpropagation truncated to one step (`hypergrad.truncated`) in coordinates δ = θ − λ, with ∇g held: there
    every step sees λ, in θ = λ + δ, and a cut between steps, at δ, takes nothing away. In θ itself, where λ is the
    start alone, a cut would take away all of it. Without holding ∇g, truncation to one step keeps the last step's
    curvature: (I − α ∂²g/∂θ²) ∇f(θ_T).

    Args:
      loss: as for `maml`.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` whose estimator is "biased", by the order of α T times the curvature of g.

    Raises:
      ValueError: an option is set here (`order`), or is not valid.

    Source: Finn, Abbeel & Levine, ICML 2017, Sec. 5.2, https://arxiv.org/abs/1703.03400
    """
    _check_options("fomaml", options, "order")
    return adaptation(loss, num_steps=num_steps, rate=rate, order="first", **options)


def reptile(loss: Callable, *, num_steps: int = 5, rate: float = 0.01, **options: Any) -> Adaptation:
    """Reptile: λ ← λ + ε (θ_T − λ); the outer optimizer is `optax.sgd(ε)` or any other.

    Args:
      loss: as for `maml`.
      num_steps: T; more than one, or it is joint training.
      rate: α.
      **options: as for `adaptation`. A `sampler` of minibatches is usual; everything adapts.

    Returns:
      An `Adaptation` whose estimator is "pseudo": see `hypergrad.reptile`.

    Raises:
      ValueError: an option is set here (`rule`), or is not valid.

    Source: Nichol, Achiam & Schulman, 2018, https://arxiv.org/abs/1803.02999
    """
    _check_options("reptile", options, "rule")
    rule = lambda problem: hypergrad.reptile(problem, num_steps=operator.index(num_steps))
    return adaptation(loss, num_steps=num_steps, rate=rate, rule=rule, **options)


HEAD = "(^|/)head(/|$)"  # leaves within something that is called "head", and not "heads" or "forehead"


def anil(loss: Callable, *, head: str = HEAD, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """ANIL, almost no inner loop: MAML in which the head alone adapts.

    Args:
      loss: as for `maml`.
      head: what adapts, as `adapt` of `adaptation`, by default what is in a part that is called "head"; "" is MAML.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation`. The body is computed once for the support set, and once for the query set: more inner steps cost
      passes through the head alone.

    Raises:
      ValueError: an option is set here (`adapt`), or is not valid.

    Source: Raghu et al., ICLR 2020, https://arxiv.org/abs/1909.09157
    """
    _check_options("anil", options, "adapt")
    check_pattern("head", head)
    return adaptation(loss, adapt=head, num_steps=num_steps, rate=rate, **options)


def boil(loss: Callable, *, head: str = HEAD, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """BOIL, body only inner loop: MAML in which everything but the head adapts.

    Args:
      loss: as for `maml`.
      head: what does not adapt: a regular expression for paths; by default as for `anil`.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation`.

    Raises:
      ValueError: an option is set here (`adapt`), or is not valid.

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
    """Meta-SGD: θ_{t+1} = θ_t − α ∘ ∇g(θ_t), with a learned rate for each entry of θ; rates may become negative.

    Args:
      loss: as for `maml`.
      num_steps: T.
      rate: where all of α starts.
      rates: "entry", or "leaf" for fewer.
      **options: as for `adaptation`; `rates_per_step=True` with "leaf" is MAML++'s LSLR.

    Returns:
      An `Adaptation` whose λ has "rate", like θ.

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
    """MAML++: a learned rate for each leaf and step; if asked for, a loss after each step and first order at first.

        F = Σ_t w_t f(θ_t),    w_t = max(0, 1 − k/N)/T for t < T,    w_T = 1 − Σ_{t<T} w_t    at outer step k.

    Both schedules are off unless they are given, and then followed by `estimator_at` alone (`estimator` is what comes
    after them): `training.learner(lambda step: hypergrad.over_tasks(a.estimator_at(step)), optimizer)`. (The paper
    keeps a small weight on early steps until N, and drops it there.) Per-step normalization is the model's: a scale and
    a shift with a leading axis of T are `leaves_per_step` (`conv4(num_steps=T)`), and a loss with `with_context` is
    told the step. Each step is normalized by the statistics of its own batch. The paper also gathers running statistics
    for each step, but its authors' code reads them nowhere: in training and at test it normalizes by the batch
    (`F.batch_norm(..., training=True)`), so that they change no prediction, and they are not kept here.

    Args:
      loss: as for `maml`.
      num_steps: T.
      rate: where all rates start.
      first_order_steps: outer steps before second derivatives are taken.
      multi_step_steps: N; 0 judges the last step alone.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation`; its schedules are followed by `estimator_at`. λ's "rate" is like θ, with a leading axis of T.

    Raises:
      ValueError: a number of steps is negative, or an option is not valid.

    Source: Antoniou, Edwards & Storkey, ICLR 2019, https://arxiv.org/abs/1810.09502; their code,
      https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch (`MetaBatchNormLayer` at 006eb57).
    """

    _check_options("maml_plus_plus", options, "outer")
    base.check_integer("first_order_steps", first_order_steps, 0)
    base.check_integer("multi_step_steps", multi_step_steps, 0)

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
    """iMAML: θ*(λ) = argmin_θ g(θ) + μ |θ − λ|²/2, differentiated where it is, whatever way led there:

        dF/dλ = (I + ∂²g/∂θ² / μ)⁻¹ ∇f(θ*).

    Args:
      loss: as for `maml`; g + μ |θ|²/2 should be convex near θ*.
      proximal: μ, positive.
      num_steps: inner steps towards θ*; memory does not depend on them.
      rate: α, below 2 / (curvature + μ).
      solver: of the linear system, `hypergrad.cg()` by default.
      **options: as for `adaptation`, with a fixed rate.

    Returns:
      An `Adaptation` whose estimator is `hypergrad.implicit`, "biased" where θ is not at θ*.

    Raises:
      ValueError: `proximal` is not positive, or an option is set here, or is of unrolling (`order`, `outer`, `remat`).

    Source: Rajeswaran et al., NeurIPS 2019, https://arxiv.org/abs/1909.04630
    """
    if not proximal > 0:
        raise ValueError(f"`proximal` must be positive, or θ* does not depend on the initialization; got {proximal}.")
    _check_options("imaml", options, "rule", "rates", "rates_per_step")
    rule = lambda problem: hypergrad.implicit(problem, num_steps=num_steps, solver=solver, warm_start=False)
    return adaptation(loss, proximal=proximal, num_steps=num_steps, rate=rate, rule=rule, **options)


def cavia(loss: Callable, *, num_context: int, num_steps: int = 2, rate: float = 1.0, **options: Any) -> Adaptation:
    """CAVIA: a context vector φ alone adapts, from zero: φ_{t+1} = φ_t − α ∇_φ g(φ_t, λ).

    Args:
      loss: as for `maml`; `params` has "context" [num_context] beside λ["init"], which is a dict: an input of the first
        layer, or the input of a layer that makes FiLM's scales and shifts.
      num_context: the entries of φ.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`, without `init` and `adapt`.

    Returns:
      An `Adaptation`. `hyperparams` needs no context in the meta-parameters.

    Raises:
      ValueError: `num_context` is below 1, or an option is set here; at trace time, λ["init"] is no dict.

    Source: Zintgraf et al., ICML 2019, https://arxiv.org/abs/1810.03642
    """
    base.check_integer("num_context", num_context, 1)
    _check_options("cavia", options, "init", "adapt")

    def init(key, hyperparams, data):
        dtype = jnp.result_type(*jax.tree.leaves(hyperparams["init"]))
        params = {**_as_dict(hyperparams["init"]), "context": jnp.zeros(num_context, dtype)}
        return (params, None) if options.get("with_context") else params

    return adaptation(loss, init=init, adapt="^context$", num_steps=num_steps, rate=rate, **options)


def pretrained(loss: Callable, *, test_steps: int = 10, rate: float = 0.01, **options: Any) -> Adaptation:
    """Pre-training and fine-tuning, the baseline: λ is trained on all tasks at once, and adapts at test alone.

    For regression, and for classes that keep their labels from task to task. Where every episode labels its classes
    anew there is nothing that one head could learn for all of them: train features and a head on all classes at once,
    with `tasks.labelled_batches`, and give every task a new head at test, as Chen et al. (ICLR 2019) do (theirs is
    drawn; here it starts from prototypes):

        head = methods.linear_head(features)
        loss = lambda params, hyperparams, batch: methods.cross_entropy(head(params, batch), batch)
        learner = training.learner(methods.pretrained(loss).estimator, optax.adam(1e-3))
        result = training.fit(learner, tasks.labelled_batches(sources, 64), ...)    # head: {"w": [D, C], "b": [C]}
        tuned = methods.proto_maml(features, adapt="^head", num_steps=10)    # from prototypes; adapt="" tunes it all
        method = methods.adapted(tuned, result.hyperparams, head)

    Fine-tuning here is of θ, a task's model, by inner steps. `methods.fine_tune` is of λ, a task's hyperparameters, by
    hypergradient steps.

    Args:
      loss: as for `maml`; F(λ) is the loss of λ itself on the query set.
      test_steps: inner steps at test.
      rate: α, at test.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` with T = 0 in training.

    Raises:
      ValueError: an option is set here (`num_steps`), or is not valid.
    """
    _check_options("pretrained", options, "num_steps")
    return adaptation(loss, num_steps=0, test_steps=test_steps, rate=rate, **options)


# ---- Heads that the support set makes --------------------------------------------------------------------------------


def _as_dict(params: Any) -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise ValueError(
            'λ["init"] must be a dict, to which the method adds leaves of its own; '
            f"got {type(params).__name__}. Put the meta-parameters into one."
        )
    return dict(params)


def linear_head(features: Callable) -> Callable:
    """`(params, batch) -> outputs` [N, W] of a linear head on features: x ↦ features(x) w + b.

    Args:
      features: `(params, batch) -> [N, D]`, of a batch with "x" and "mask": `conv4(...).features`, or any other.

    Returns:
      A function of `params` with "head": {"w": [D, W], "b": [W]}, and of a batch with "x"; `adapted` takes it.

    Raises:
      ValueError: `features` is no function of two arguments, such as a loss, which has three.
    """
    try:
        takes_two = callable(features) and bool(inspect.signature(features).bind("params", "batch"))
    except TypeError:
        takes_two = False
    except ValueError:  # its arguments cannot be told
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
      ValueError: if logits have another shape, such as those of a head for another number of classes; if labels that
        are not traced are not in 0..W-1.
    """
    if logits.ndim != 2:
        raise ValueError(
            "`cross_entropy` is of one episode, whose logits are [N, W], a row an example; got shape "
            f"{logits.shape}. A batch of tasks needs `hypergrad.over_tasks` around the estimator."
        )
    y, ways = batch["y"], batch["class_mask"].shape[0]
    if logits.shape != (*y.shape, ways):  # [N, 1] would broadcast
        raise ValueError(
            f"`cross_entropy` takes logits [N, W] = {(*y.shape, ways)}, one for each row and class of the episode; got "
            f"{logits.shape}: a head for {logits.shape[1]} classes. Episodes of several numbers of classes need a head "
            "that the support set makes (`proto_maml`, `ridge_head`, ...)."
        )
    return nas.cross_entropy(logits, batch)


def _one_hot(batch: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """[N, W], zeros in rows that are padding."""
    base.check_labels('The labels "y"', batch["y"], len(batch["class_mask"]), mask=batch["mask"])
    y = jnp.asarray(batch["y"], jnp.int32)  # of fewer bits, class 256 would be class 0, too
    return jax.nn.one_hot(y, len(batch["class_mask"]), dtype=dtype) * batch["mask"][:, None]


def _with_head(features: Callable, make: Callable, loss: Callable, **options: Any) -> Adaptation:
    """An adaptation whose head is `make(features [N, D], λ, support)`."""
    head = linear_head(features)
    _check_options("a method whose head the support set makes", options, "init", "outer_loss", "with_context")

    def init(key, hyperparams, data):
        params = _as_dict(hyperparams["init"])
        return {**params, "head": make(features(params, data), hyperparams, data)}

    inner_loss = lambda params, hyperparams, batch: loss(head(params, batch), batch)
    return adaptation(inner_loss, init=init, **{"keep_support": True, **options})


def proto_maml(features: Callable, *, num_steps: int = 5, rate: float = 0.01, **options: Any) -> Adaptation:
    """Proto-MAML: MAML whose head starts at the prototypes p_c, the mean features of each class in the support set:

        w_c = 2 p_c,    b_c = −|p_c|²,    so that the first logits are −|x − p_c|² up to what all classes share.

    Args:
      features: `(params, batch) -> [N, D]`; λ["init"] is a dict.
      num_steps: T; 0 is a prototypical network.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` of episodes with classes; `linear_head(features)` predicts.

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
      An `Adaptation` of episodes with classes; `linear_head(features)` predicts.

    Raises:
      ValueError: an option is set here (`num_steps`), or is not valid.

    Source: Snell, Swersky & Zemel, NeurIPS 2017, https://arxiv.org/abs/1703.05175
    """
    _check_options("prototypical_networks", options, "num_steps")
    return proto_maml(features, num_steps=0, **options)


def ridge_head(features: Callable, *, loss: Callable = cross_entropy, **options: Any) -> Adaptation:
    """R2D2: the head is the ridge regression of the support set, solved exactly and differentiated through:

        W = argmin_W |X W − Y|² + ρ |W|² = Xᵀ (X Xᵀ + ρ I)⁻¹ Y,    outputs = scale · X W + shift,

    where X has the features and, as in the authors' code, a column of ones for an intercept, a row of W: it is shrunk
    as well, so that of targets far from 0 their mean is to be taken off. Whichever of the two systems is smaller is
    solved, by Cholesky. ρ, scale and shift are learned: λ has "log_ridge", "scale" and "shift".

    Args:
      features: `(params, batch) -> [N, D]`; λ["init"] is a dict.
      loss: `(outputs, batch) -> []`: `cross_entropy` (Y is one-hot), or `mean_squared_error` (Y is "y" [N, W]).
      **options: as for `adaptation`; with `num_steps` the head and the features adapt from there.

    Returns:
      An `Adaptation`; `linear_head(features)` predicts.

    Raises:
      ValueError: at trace time, "y" is neither integers [N] nor numbers [N, W].

    Source: Bertinetto et al., ICLR 2019, https://arxiv.org/abs/1805.08136. MetaOptNet has a support vector machine in
      its place: Lee et al., CVPR 2019, https://arxiv.org/abs/1904.03758
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
