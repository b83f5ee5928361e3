"""Few-shot learning under the papers' names: each method is a setting of `adaptation`.

Options that a method sets itself cannot be passed again: Python raises a TypeError. `_heads.py` has the methods whose
head is computed from the support set. Reptile is `maml(loss, num_steps=5, rule=hypergrad.reptile)`.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import _checks, hypergrad
from metaopt.few_shot._adaptation import Adaptation, adaptation


def maml(loss: Callable, *, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """MAML: F(λ) = f(θ_T), θ_0 = λ, θ_{t+1} = θ_t − α ∇ℓ(θ_t), differentiated through all T steps.

    Args:
      loss: ℓ, and also f: `(params, hyperparams, batch) -> []`.
      num_steps: T.
      rate: α, in θ² per unit of the loss.
      **options: as for `adaptation`. Use `keep_support=True` if the model is normalized by the support set, such as
        `conv4(normalization="support")`, which rejects query sets without it. `rule=hypergrad.reptile` is Reptile: the
        outer step λ ← λ + ε (θ_T − λ) is that of `optax.sgd(ε)`.

    Returns:
      An `Adaptation`. It takes the time of T second-order gradients per task; memory grows with T (`remat`).

    Source: Finn, Abbeel & Levine, ICML 2017, https://arxiv.org/abs/1703.03400

    >>> import jax, optax
    >>> from metaopt import few_shot, hypergrad, tasks, training
    >>> loss = lambda params, hyperparams, batch: (
    ...     (params["a"] * batch["x"] + params["b"] - batch["y"]) ** 2
    ... ).mean()
    >>> line = few_shot.maml(loss, num_steps=2)
    >>> result = training.fit(
    ...     training.learner(hypergrad.over_tasks(line.estimator), optax.adam(0.1)),
    ...     tasks.episode_batches(tasks.sinusoids(num_shots=5), 4),
    ...     hyperparams=line.hyperparams({"a": 1.0, "b": 1.0}),
    ...     num_steps=5,
    ...     key=jax.random.key(0),
    ... )
    >>> sorted(result.hyperparams["init"])
    ['a', 'b']
    """
    return adaptation(loss, num_steps=num_steps, rate=rate, **options)


def fomaml(loss: Callable, *, num_steps: int = 1, rate: float = 0.01, **options: Any) -> Adaptation:
    """First-order MAML: dF/dλ ≈ ∇f(θ_T). Inner gradients are held constant, so that ∂θ_T/∂λ is the identity.

    First-order MAML equals backpropagation truncated to one step (`hypergrad.truncated`) in the coordinates δ = θ − λ,
    with ∇ℓ held constant. In these coordinates every step depends on λ, by θ = λ + δ, so truncation at δ loses nothing.
    In θ itself, only the start depends on λ, so truncation would lose the whole hypergradient. If ∇ℓ is not held
    constant, truncation to one step keeps the last step's curvature: (I − α ∂²ℓ/∂θ²) ∇f(θ_T).

    Args:
      loss: as for `maml`.
      num_steps: T.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` whose estimator is "biased". The bias is of the order of α T times the curvature of ℓ.

    Source: Finn, Abbeel & Levine, ICML 2017, Sec. 5.2, https://arxiv.org/abs/1703.03400
    """
    return adaptation(loss, num_steps=num_steps, rate=rate, order="first", **options)


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

    Source: Raghu et al., ICLR 2020, https://arxiv.org/abs/1909.09157
    """
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

    Source: Oh et al., ICLR 2021, https://arxiv.org/abs/2008.08882
    """
    pattern = re.compile(head)
    body = re.compile(f"^(?!.*(?:{pattern.pattern}))", pattern.flags)
    return adaptation(loss, adapt=body, num_steps=num_steps, rate=rate, **options)


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
    """MAML++: a learned rate for each leaf and step. Options: a loss after each step; first order at the start.

        F = Σ_t w_t f(θ_t),    w_t = max(0, 1 − k/N)/T for t < T,    w_T = 1 − Σ_{t<T} w_t    at outer step k.

    Both schedules are off by default. Only `estimator_at` follows them; `estimator` is the estimator after their end.
    Use `training.learner(lambda step: hypergrad.over_tasks(a.estimator_at(step)), optimizer)`. (In the paper, the early
    steps keep a small weight until outer step N, and lose it there.)

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
      ValueError: if a number of steps is negative.

    Source: Antoniou, Edwards & Storkey, ICLR 2019, https://arxiv.org/abs/1810.09502; their code,
      https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch (`MetaBatchNormLayer` at 006eb57).
    """
    _checks.check_positive("multi_step_steps", multi_step_steps, zero=True)  # −1 would weight early steps ever more

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
      ValueError: if `proximal` is not positive, or if an option belongs to unrolling (`order`, `outer`, `remat`).

    Source: Rajeswaran et al., NeurIPS 2019, https://arxiv.org/abs/1909.04630
    """
    if not proximal > 0:
        raise ValueError(f"`proximal` must be positive, or θ* does not depend on the initialization; got {proximal}.")
    rule = functools.partial(hypergrad.implicit, solver=solver, warm_start=False)
    # The implicit derivative of a rate would be 0.
    return adaptation(loss, proximal=proximal, num_steps=num_steps, rate=rate, rates="fixed", rule=rule, **options)


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
      An `Adaptation`. Its function `hyperparams` takes meta-parameters without "context".

    Source: Zintgraf et al., ICML 2019, https://arxiv.org/abs/1810.03642
    """

    def init(key, hyperparams, data):
        dtype = jnp.result_type(*jax.tree.leaves(hyperparams["init"]))
        params = {**hyperparams["init"], "context": jnp.zeros(num_context, dtype)}
        return (params, None) if options.get("with_context") else params

    return adaptation(loss, init=init, adapt="^context$", num_steps=num_steps, rate=rate, **options)


def pretrained(loss: Callable, *, test_steps: int = 10, rate: float = 0.01, **options: Any) -> Adaptation:
    """The pre-training baseline: λ, the parameters of a model, is trained on all tasks at once, and adapts only at
    test.

    It is for regression, and for classes that keep their labels across tasks. If every episode assigns new labels to
    its classes, a single head cannot learn them. Then train features and a head on all classes at once, with
    `tasks.labelled_batches`, and give every task a new head at test, as Chen et al. (ICLR 2019) do. Their head is drawn
    at random; this one starts from prototypes:

        head = few_shot.linear_head(features)
        loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
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

    """
    return adaptation(loss, num_steps=0, test_steps=test_steps, rate=rate, **options)
