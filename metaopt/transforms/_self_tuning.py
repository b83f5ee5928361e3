"""An optimizer that tunes its own hyperparameters while it trains, by the training or the validation loss.

The effect of an optimizer step on a loss f is known after the step: with θ_t = θ_{t−1} + u_{t−1}(λ),

    h_t = (∂θ_t/∂λ)ᵀ g_t,    g_t = ∇f(θ_t),

where ∂θ_t/∂λ is either the derivative of only the last step, ∂u_{t−1}/∂λ, or is carried along with training. If f is
the training loss, g_t is the next training gradient, which costs nothing extra. For example, for the rate of SGD,
h_t = −g_t · g_{t−1}. An optimizer of λ, the tuner, descends along h. The tuner is any transform, and so may tune
itself.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaopt import _checks, _explained, _jaxpr, _trees, base, spaces
from metaopt._jaxpr import Tracer
from metaopt.transforms import _tuned_steps
from metaopt.transforms._tuned_steps import SelfTuningState, Settings, cast_like, check_like, gradient


def self_tuning(
    factory: Callable[[base.HyperParams], optax.GradientTransformation],
    hyperparams: base.HyperParams,
    tuner: optax.GradientTransformation,
    *,
    rule: str = "normalized",
    discount: float = 0.0,
    gap: float = 0.0,
    mode: str = "forward",
    projection_fn: Callable[[base.HyperParams], base.HyperParams] | None = None,
    valid_loss_fn: Callable[[base.Params, base.Batch], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer that tunes its own λ: before each step, λ descends along a hypergradient h of a loss.

        rule="additive":        λ ← λ + tuner(h)
        rule="multiplicative":  λ ← λ · exp(tuner(λ h))
        rule="normalized":      λ ← λ · exp(tuner(λ h / (‖g_t‖ ‖u_{t−1}‖)))
        rule="cosine":          λ_i ← λ_i · exp(tuner(h_i / (‖g_t‖ ‖∂u_{t−1}/∂λ_i‖)))

    g_t is the gradient of the training or the validation loss at θ_t (see "Which loss"). The derivative of this loss
    with respect to the λ of the last update u_{t−1} is h_t = (∂u_{t−1}/∂λ)ᵀ g_t. λ h is the derivative in log λ, so all
    rules except the first keep λ positive. The last two do not depend on the scale of the loss. With `optax.sgd(β)` as
    the tuner, they move the logarithm of a rate by β times the cosine between −g_t and the last step. A good initial
    choice of β is 0.1 to 0.5. A rate that is 100 times too small then needs at least log(100)/β steps, 47 or 10, and
    several times as many if the cosines are small.

    These two rules differ if λ has more than one entry. "normalized" follows the gradient in log λ. An entry that moves
    the parameters little, such as a weight decay or the rate of a small group, is then hardly tuned. With "cosine",
    the logarithm of each entry moves by β times the cosine between −g_t and ∂u_{t−1}/∂λ_i, whatever the size of
    ∂u_{t−1}/∂λ_i. Both are vectors over all parameters. So if λ_i moves only a group of parameters, the cosine is at
    most the group's share of the norm of g_t. The gradients of frozen parameters count in this norm, so set them to
    zero. Two dtypes limit the rule. The parameters' dtype must represent λ ∂u/∂λ (float16 does not, for a decay of 0.01
    at a rate of 1e-5). float32 must represent its square.

    **What bounds λ.** With "normalized" or "cosine", `mode="forward"` and `optax.sgd(β)`, each step multiplies λ by at
    most exp(β). The other rules have no such bound. Neither has "normalized" with `mode="reverse"`: it divides by ‖u‖,
    which is small if the parts of u cancel. If a rate is too large, its hypergradient changes sign and reduces it. But
    another entry of λ may have moved so far in one step that this does not help. An example is a problem on which decay
    helps at every step, such as ½‖θ‖², with β = 2. There rate · decay exceeds 2, each step moves θ to the other side
    and further out, and training diverges. A momentum may also leave [0, 1), without an error: tune 1 − b1 instead of
    b1.

    To bound entries, tune the unconstrained coordinates z of a space. They may be negative, so the rule is "additive".
    A tuner such as Adam gives steps that do not depend on the scale of the loss:

        z = spaces.to_unconstrained(space, spaces.default(space))
        self_tuning(lambda z: chain(spaces.to_constrained(space, z)), z, optax.adam(0.1), rule="additive")

    For a bound that depends on other entries, `projection_fn` moves λ back into its range, at the start and after each
    move: λ ← P(λ). It receives all of λ:

        lambda hp: {**hp, "decay": jnp.clip(hp["decay"], 1e-4, 1 / hp["rate"])}    # rate · decay ≤ 1, of AdamW

    Here a decay removes at most the whole of a parameter in a step. So it cannot move a parameter further from zero
    than it was. If P(λ) = λ, the projection changes nothing.

    Start with a rate that is too small rather than too large: with a hundredth of your guess. A rate that is too large
    may damage a network, or make it overfit, before λ has become smaller. A rate that is too small rises fast: in the
    picture of the results (β = 0.5), all rates that start at 1/10,000 of the best one pass it within 100 steps. The
    training loss does not show overfitting: if the training loss goes to zero, tuning by
    it keeps the rate too large. The best variant (`experiments/results/self_tuning.md`) follows a validation loss, with
    the weight decay in λ and `rule="cosine"`. Networks overfit on three problems. On two of them, this variant ended
    with a lower loss than the best constant rate. It did so from starts at 1/10,000 and at 1/10 of the best rate. It
    uses the tuners `optax.sgd(0.5)` for the rate and `optax.sgd(2.0)` for the decay. The decay starts at 0.01 and is
    kept below 1 / rate by the projection above.

    **Which loss.** By default g_t is the gradient passed to `update`, which is that of the training loss. This is
    hypergradient descent, without an additional gradient. **In a chain**, put every transform that changes the gradient
    into `factory`, such as `scale_by_adam` or `add_decayed_weights`. If only the tail is wrapped, as in
    `optax.chain(optax.scale_by_adam(), self_tuning(optax.scale_by_learning_rate, ...))`, g_t is Adam's output, and the
    rate grows until training diverges, without an error. Only clipping may stay outside. With a validation loss, the
    place of the transforms makes no difference if μ = γ = 0.

    With the extra argument `valid_grad_fn`, g_t is `valid_grad_fn(params)`, the gradient of the validation loss on a
    batch that the caller chooses. This is the method T1–T2. Alternatively, give `self_tuning` the loss itself as
    `valid_loss_fn`, and `update` the extra argument `valid_batch`. (For complex parameters, g_t is then the conjugate
    of JAX's gradient: the direction of ascent.) All members of a chain get the same extra arguments. This costs one
    more gradient per step; a smaller batch costs less.

    A `gap` γ > 0 adds γ times the difference of the validation and the training loss to the loss that λ minimizes:
    g_t = ∇f_valid + γ (∇f_valid − ∇f_train). If a network is about to overfit, this difference grows before the
    validation loss does. On three such problems γ = 1 (with a validation batch twice as large) was better than 0. On
    two others it was worse, and on the remaining ones the results were mixed.

    **Not finite.** If a gradient makes h NaN or infinite, λ and the tuner's state stay the same in this step. Training
    itself takes its step as usual. `optax.apply_if_finite(self_tuning(...), n)` skips steps whose training gradient is
    not finite.

    **How far back.** The derivative of only one step is short-sighted. It omits the effect of λ on later steps, prefers
    small rates if gradients are noisy, and cannot measure the effect of a small decay over time. With a `discount`
    μ > 0 the derivative is carried along with training,

        Z_t = ∂Φ/∂λ + μ (∂Φ/∂(θ, s)) Z_{t−1},    h_t = Z_tᵀ g_t,    (θ, s)_t = Φ((θ, s)_{t−1}, λ),

    with s the optimizer's state. μ = 0 is one step. μ = 1 is the exact derivative of f(θ_t) along an equal shift of all
    λ so far (of all log λ, except for "additive"). For values between 0 and 1, the derivative forgets steps that are
    more than about 1/(1 − μ) steps ago. This is a short truncation, biased by the forgotten steps. A `discount` needs
    the extra argument `grad_fn`, `params -> gradient` of this step's training loss. Transforms before this optimizer in
    a chain, which change gradients, and transforms after it, which change updates, do not enter the derivative. (With
    μ = 0, `grad_fn` is passed to the optimizer like other extra arguments, for example to `optax.contrib.sam`.)

    **Cost**, with n entries of λ. `mode="forward"` keeps n derivatives of the parameters (if μ > 0, also of the
    optimizer's state), in their precision, and pushes n tangents through the optimizer's operations. With μ > 0 it also
    takes n products with the Hessian. `mode="reverse"` takes one pullback through the optimizer's operations for any n.
    It keeps the last gradient and copies of the optimizer's state and the parameters. Use it for many λ, such as a rate
    for each parameter. In reverse mode the last step is recomputed, with the current step's extra arguments of the
    optimizer itself (`value`). In forward mode, the normalized rule uses the largest of the n ‖λ ∂u/∂λ‖ instead of ‖u‖,
    which is the same if λ contains the rate.

    The tuner may be a `self_tuning` itself, to any depth. The state is a pytree of arrays, and `update` reads λ from
    it, so a change of λ does not recompile anything. Extra arguments are passed through `optax.chain`,
    `apply_if_finite`, `inject_hyperparams`, `MultiSteps` and `nnx.Optimizer.update(model, grads, valid_grad_fn=fn)`.
    (With k small batches for each step, `MultiSteps` calls `update` k times and keeps one result. So `valid_grad_fn`
    runs k times, too.) Flax's `TrainState.apply_gradients` does not pass them to the optimizer. Use its two lines
    instead, with the arguments:

        updates, opt_state = ts.tx.update(grads, ts.opt_state, ts.params, valid_grad_fn=fn)
        ts = ts.replace(step=ts.step + 1, params=optax.apply_updates(ts.params, updates), opt_state=opt_state)

    Args:
      factory: `hyperparams -> optax.GradientTransformation`, such as `lambda hp: optax.adamw(hp["rate"])`; or
        `lambda hp: optax.adamw(**hp)`, if λ has the names of its arguments.
      hyperparams: the initial λ, any tree of numbers; positive except for "additive".
      tuner: the optimizer of λ.
      rule: "additive", "multiplicative", "normalized" or "cosine"; the last needs `mode="forward"`.
      discount: μ, in [0, 1].
      gap: γ, at least 0; has an effect only with a validation loss.
      mode: "forward", for few λ, or "reverse", for many, with μ = 0.
      projection_fn: P, `hyperparams -> hyperparams`, positive except for "additive" (a λ of zero never moves again, so
        a simplex does not work; use a space); by default λ is not bounded.
      valid_loss_fn: the validation loss, `(params, batch) -> []`, if `update` gets only the batch.

    Returns:
      A transform. Its `update` requires the parameters, and takes `valid_grad_fn` or `valid_batch`, and `grad_fn`, as
        extra arguments. Its state has the attribute `hyperparams`, which is λ as the last step used it; in a chain,
        `optax.tree.get(state, "hyperparams")` reads it. With a tuner that is a `self_tuning` too, or within
        `inject_hyperparams`, two states have this attribute, and optax raises a KeyError. Read it from the member of
        the chain then: `state[1].hyperparams`.

    Raises:
      TypeError: in `update`, if the name of an argument is nearly one of those above.
      ValueError: if `factory` is not a function, or `tuner` is not an optax transform.
      ValueError: if `rule` or `mode` is unknown, or `mode="reverse"` is given with a `discount` or `rule="cosine"`.
      ValueError: if `gap` is negative, or `discount` is not in [0, 1].
      ValueError: if λ is not of finite real numbers, or not positive although the rule requires it.
      ValueError: in `init` and `update`, if `projection_fn` returns a tree that is not like λ; in `init`, if its values
        are not positive although the rule requires it.
      ValueError: in `update`, if `grad_fn` is missing with μ > 0.
      ValueError: in `update`, if only one of `valid_loss_fn` and `valid_batch` is given, or both `valid_batch` and
        `valid_grad_fn`. (`valid_grad_fn` may replace the batch.)
      ValueError: in `update`, if the parameters or the results of `valid_grad_fn` or `grad_fn` are not a tree like the
        gradients.
      ValueError: in `update`, if a leaf of λ does not move the updates (within `optax.masked`, leaves at the paths of
        masked-out parameters are exempt).
      ValueError: in `update`, if a validation loss or `grad_fn` is given within `optax.masked` or `multi_transform`.

    Source: Baydin et al., ICLR 2018, https://arxiv.org/abs/1703.04782; a stack of tuners: Chandra et al., NeurIPS 2022,
      https://arxiv.org/abs/1909.13371; T1–T2: Luketina et al., ICML 2016, https://arxiv.org/abs/1511.06727; carried
      derivative: Franceschi et al., ICML 2017, https://arxiv.org/abs/1703.01785, with a discount: Donini et al., IJCAI
      2020, https://arxiv.org/abs/1910.08525

    >>> import jax, jax.numpy as jnp, optax
    >>> from metaopt import transforms
    >>> sgd = transforms.self_tuning(
    ...     lambda hp: optax.sgd(hp["rate"]), {"rate": 1e-3}, optax.sgd(0.1)
    ... )
    >>> params, state = jnp.array([1.0, 2.0]), sgd.init(jnp.array([1.0, 2.0]))
    >>> for _ in range(50):
    ...     updates, state = sgd.update(params, state, params)
    ...     params = params + updates
    >>> bool(state.hyperparams["rate"] > 0.05)
    True
    """
    if rule not in ("additive", "multiplicative", "normalized", "cosine") or mode not in ("forward", "reverse"):
        raise ValueError(
            '`rule` must be "additive", "multiplicative", "normalized" or "cosine", and `mode` must be "forward" or '
            f'"reverse"; got {rule!r} and {mode!r}.'
        )
    if not (0 <= discount <= 1 and gap >= 0):
        raise ValueError(f"`discount` must be in [0, 1], and `gap` at least 0; got {discount} and {gap}.")
    if mode == "reverse" and (discount or rule == "cosine"):
        raise ValueError(
            '`mode="reverse"` differentiates only the last step, and does not compute ‖∂u/∂λ_i‖ for each entry of λ. '
            f'Use `mode="forward"` for `rule="cosine"` or a `discount`; got `rule={rule!r}` and `discount={discount}`.'
        )
    if not callable(factory):
        raise ValueError(
            "`factory` must be a function of λ that returns an optax transform, such as "
            f"`lambda hp: optax.adamw(hp['rate'])`; got a {type(factory).__name__}."
        )
    _check_values("`hyperparams`", hyperparams, rule)
    _checks.check_optimizer("tuner", tuner)
    settings = Settings(
        factory,
        hyperparams,
        optax.with_extra_args_support(tuner),
        rule,
        discount,
        gap,
        mode,
        projection_fn,
        valid_loss_fn,
    )
    return optax.GradientTransformationExtraArgs(
        init=functools.partial(_init, settings), update=functools.partial(_update, settings, set())
    )


def _check_values(name: str, hyperparams: base.HyperParams, rule: str) -> None:
    """Raises ValueError for values that are not finite and real, or not positive although a rule moves logarithms."""
    if isinstance(hyperparams, spaces.Unconstrained) and rule != "additive":
        raise ValueError(
            f'{name} are coordinates of a space, which may be negative, and `rule="{rule}"` moves logarithms: pass '
            '`rule="additive"`.'
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(hyperparams):
        if isinstance(leaf, Tracer):
            continue
        value = np.asarray(leaf)
        real = jnp.issubdtype(value.dtype, jnp.number) and not jnp.issubdtype(value.dtype, jnp.complexfloating)
        finite = real and np.all(np.isfinite(np.asarray(value, np.float64)))
        if not finite or (rule != "additive" and not np.all(value > 0)):
            raise ValueError(
                f'{name} must be finite real numbers, and positive unless `rule` is "additive", since the other rules '
                f"move logarithms; got {leaf!r} at {jax.tree_util.keystr(path) or 'the root'}.{_hint(leaf)}"
            )


def _hint(leaf: Any) -> str:
    """What to pass instead of a leaf that is not a number."""
    if isinstance(leaf, spaces.Leaf):
        return (
            ' Instead of a space, pass `spaces.to_unconstrained(space, spaces.default(space))` and `rule="additive"`.'
        )
    if callable(leaf):
        return " A schedule belongs into `factory`: `lambda hp: optax.adamw(lambda n: hp['rate'] * schedule(n))`."
    return ""


def _init(settings: Settings, params: base.Params) -> SelfTuningState:
    """The state before the first step: λ at its start, and no step whose effect is known."""
    params = jax.tree.map(jnp.asarray, params)
    # A copy, so that the buffer may be donated to a program: the next run starts from λ again.
    copied = lambda x: jnp.array(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    start = _projected(settings, jax.tree.map(copied, settings.start))
    if settings.projection_fn is not None:
        _check_values("The results of `projection_fn`", start, settings.rule)
    with _explained.structures(params):
        inner = jax.tree.map(jnp.asarray, _tuned_steps.make_optimizer(settings.factory, start).init(params))
    if settings.mode == "reverse":  # copies, so that the buffers of both may be donated to a program
        last = (optax.tree.zeros_like(params), *jax.tree.map(jnp.copy, (inner, params)))
    else:
        num = ravel_pytree(start)[0].size
        carried = (_trees.split(params)[0], _trees.split(inner)[0] if settings.discount else None)
        last = jax.tree.map(lambda x: jnp.zeros((num, *jnp.shape(x)), jnp.result_type(x)), carried)
    return SelfTuningState(start, inner, settings.tuner.init(start), last, jnp.zeros([], jnp.int32))


def _projected(settings: Settings, hyperparams: base.HyperParams) -> base.HyperParams:
    """P(λ)."""
    if settings.projection_fn is None:
        return hyperparams
    allowed = settings.projection_fn(hyperparams)
    check_like("the result of `projection_fn`", allowed, hyperparams, "λ", hint="")
    # Copies, since P may return the caller's own array, or one array twice.
    return jax.tree.map(lambda x, like: jnp.array(x, like.dtype), allowed, hyperparams)


def _update(
    settings: Settings,
    checked: set,
    updates: optax.Updates,
    state: Any,
    params: base.Params | None = None,
    *,
    valid_grad_fn: Callable | None = None,
    valid_batch: base.Batch | None = None,
    grad_fn: Callable | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, SelfTuningState]:
    """Moves λ along its signal, and then takes a step with the new λ.

    `checked` collects the structures of the arguments for which all of λ is known to have an effect on the updates.
    """
    updates, params = jax.tree.map(jnp.asarray, (updates, params))
    for name in extra_args:  # of the inner optimizer, unless they are misspelt
        if meant := difflib.get_close_matches(name, ("valid_grad_fn", "valid_batch", "grad_fn"), cutoff=0.8):
            raise TypeError(f"`update` of `self_tuning` has no argument {name!r}. Did you mean {meant[0]!r}?")
    valid_grad_fn = _valid_gradient(settings, valid_grad_fn, valid_batch)
    if grad_fn is not None and not settings.discount:  # an extra argument of the optimizer itself
        extra_args, grad_fn = {**extra_args, "grad_fn": grad_fn}, None
    _check_params(params, updates, needs_all=valid_grad_fn is not None or grad_fn is not None)
    grads = (
        _trees.split(updates)[0] if valid_grad_fn is None else gradient("valid_grad_fn", valid_grad_fn, params, updates)
    )
    structure = jax.tree.structure((updates, extra_args))
    if jax.tree.leaves(grads) and structure not in checked:
        _check_effect(settings, updates, state, params, extra_args)
        checked.add(structure)
    if settings.gap and valid_grad_fn is not None:
        train_grads = _trees.wide(_trees.split(updates)[0])
        grads = jax.tree.map(lambda v, g: v + settings.gap * (v - g), _trees.wide(grads), train_grads)
    if settings.mode == "reverse":
        signal = _tuned_steps.reverse_signal(settings, grads, state, extra_args)
    else:
        signal = _tuned_steps.forward_signal(settings, grads, state)
    hyperparams, tuner_state = _tuned(settings, signal, state)
    if settings.mode == "reverse":
        new_updates, inner = _tuned_steps.run(settings.factory, hyperparams, updates, state.inner, params, extra_args)
        last = (updates, state.inner, params)
    else:
        new_updates, inner, last = _tuned_steps.forward_step(
            settings, hyperparams, updates, state, params, grad_fn, extra_args
        )
    last, inner = cast_like((last, inner), (state.last, state.inner))
    new_state = SelfTuningState(hyperparams, inner, tuner_state, last, state.count + 1)
    return _promoted(new_updates, updates, params), new_state


def _valid_gradient(settings: Settings, valid_grad_fn: Callable | None, valid_batch: Any) -> Callable | None:
    """`params -> gradient` of the validation loss, or None without a validation loss."""
    if valid_batch is None and (settings.valid_loss_fn is None or valid_grad_fn is not None):
        return valid_grad_fn
    if settings.valid_loss_fn is None or valid_batch is None or valid_grad_fn is not None:
        raise ValueError(
            "A validation loss `self_tuning(..., valid_loss_fn=loss)` and its batch `update(updates, state, params, "
            "valid_batch=batch)` must be given together, and without `valid_grad_fn`. (Flax's "
            "`TrainState.apply_gradients` and `MultiSteps(...).gradient_transformation()` cannot pass the batch.)"
        )
    return functools.partial(_loss_gradient, settings.valid_loss_fn, valid_batch)


def _loss_gradient(loss_fn: Callable, batch: base.Batch, params: base.Params) -> base.Params:
    """The direction of ascent, as optax defines it for complex parameters; integers have none."""
    grads = jax.grad(loss_fn, allow_int=True)(params, batch)
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


def _tuned(
    settings: Settings, signal: base.HyperParams, state: SelfTuningState
) -> tuple[base.HyperParams, optax.OptState]:
    """λ after one step of the tuner, and the tuner's state. Both stay the same if the signal is not finite."""
    logarithmic = settings.rule != "additive"
    point = jax.tree.map(jnp.log, state.hyperparams) if logarithmic else state.hyperparams
    moves, tuner_state = settings.tuner.update(signal, state.tuner, point)
    moved = lambda x, move: (x * jnp.exp(move) if logarithmic else x + move).astype(x.dtype)
    new = _projected(settings, jax.tree.map(moved, state.hyperparams, moves)), tuner_state
    # Otherwise one batch whose gradient is not finite would make λ NaN in all later steps.
    is_finite = jnp.isfinite(ravel_pytree(signal)[0]).all()
    return jax.tree.map(lambda x, old: jnp.where(is_finite, x, old), new, (state.hyperparams, state.tuner))


def _promoted(new: optax.Updates, updates: optax.Updates, params: base.Params) -> optax.Updates:
    """Casts to the wider dtype of gradient and parameter: in bfloat16 a decay would be lost next to a larger step."""

    def cast(x, update, param):
        return x.astype(jnp.promote_types(update.dtype, param.dtype)) if _trees.is_inexact(update) else x

    return jax.tree.map(cast, new, updates, params)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _check_params(params: base.Params, updates: optax.Updates, *, needs_all: bool) -> None:
    """Raises ValueError if the parameters are not like the gradients, or are not all there although they must be."""
    if needs_all and any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        raise ValueError(
            "A validation loss and `grad_fn` need all parameters, but within `optax.masked` or `multi_transform` "
            "`self_tuning` sees only some of the parameters. Put it outside: "
            "`self_tuning(lambda hp: optax.multi_transform({...: optax.adam(hp[...])}, labels), ...)`."
        )
    hint = {} if params is not None else {"hint": " Call `update(grads, state, params)`."}
    check_like("the parameters, the third argument of `update`,", params, updates, real=False, **hint)


def _check_effect(
    settings: Settings, updates: optax.Updates, state: SelfTuningState, params: base.Params, extra_args: dict[str, Any]
) -> None:
    """Raises ValueError if a leaf of λ does not move the updates (with a discount: nor the optimizer's state)."""

    def moved(hyperparams):
        out, inner = _tuned_steps.run(settings.factory, hyperparams, updates, state.inner, params, extra_args)
        return _trees.split((out, inner if settings.discount else None))[0]

    used = _jaxpr.used_leaves(moved, state.hyperparams)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.hyperparams)]
    # In a tree of λ, leaves that belong to masked-out parameters need not be used.
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)
    masked = [path for path, node in nodes if _is_masked(node)]
    kept = [path for path, node in nodes if not _is_masked(node)]
    unused = [
        jax.tree_util.keystr(path)
        for path, is_used in zip(paths, used, strict=True)
        if not is_used and not (_belongs_to(path, masked) and not _belongs_to(path, kept))
    ]
    if unused:
        hint = (
            " Some parameters are masked out here. Keep hyperparameters of only those parameters outside, too, unless "
            "they are at the paths of these parameters in λ."
        )
        leaves = f"The leaves {', '.join(unused)} of λ do not change" if any(unused) else "λ does not change"
        raise ValueError(
            f"{leaves} the updates. `factory` does not use this part of λ, or its optimizer stores it in its state, as "
            "`optax.inject_hyperparams` does. Make the optimizer from the argument of `factory`, as in "
            "`lambda hp: optax.adamw(hp['rate'])`; around `self_tuning`, "
            f"`inject_hyperparams` works.{hint if masked else ''}"
        )


def _belongs_to(path: tuple, others: list[tuple]) -> bool:
    """Whether a suffix of `path` starts with one of the other paths, or is a prefix of one of them.

    λ may hold a tree of parameters below names of its own: the path of a rate may be ["rate"]["encoder"]["bias"], and
    that of its parameter ["encoder"]["bias"]. The number of these names is not known, so all suffixes are compared. A
    suffix is shorter than the parameter's path if one rate is for a subtree.
    """

    def names(path):
        return [jax.tree_util.keystr((key,), simple=True) for key in path]

    ends = [names(path)[i:] for i in range(len(path))]
    return any(end[: len(other)] == other[: len(end)] for other in map(names, others) for end in ends)
