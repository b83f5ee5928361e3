"""An optimizer that tunes its own hyperparameters while it trains, by the training or the validation loss.

The effect of an optimizer step on a loss f is known after the step: with θ_t = θ_{t−1} + u_{t−1}(λ),

    h_t = (∂θ_t/∂λ)ᵀ g_t,    g_t = ∇f(θ_t),

where ∂θ_t/∂λ is either that of only the last step, ∂u_{t−1}/∂λ, or is carried along with training. The next training
gradient is such a g_t at no extra cost: for the rate of SGD, h_t = −g_t · g_{t−1}. An optimizer of λ, the tuner,
descends along h. The tuner is any transform, and so may tune itself.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from metaopt import _checks, _jaxpr, base
from metaopt.transforms._differentiable import differentiable


class SelfTuningState(NamedTuple):
    """State of `self_tuning`.

    Attributes:
      hyperparams: λ, as the last step used it; read it for logging.
      inner: the optimizer's state.
      tuner: the state of the optimizer of λ.
      last: the data that determine how λ moved the parameters. With `mode="forward"` these are the derivatives
        themselves, with a leading axis for the entries of λ; with "reverse", the inputs of the last step.
      count: [] int32, the number of steps taken.
    """

    hyperparams: base.HyperParams
    inner: optax.OptState
    tuner: optax.OptState
    last: tuple
    count: jax.Array


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
    """An optimizer whose λ descends along a hypergradient h of the training or the validation loss, before each step.

        rule="additive":        λ ← λ + tuner(h)
        rule="multiplicative":  λ ← λ · exp(tuner(λ h))
        rule="normalized":      λ ← λ · exp(tuner(λ h / (‖g_t‖ ‖u_{t−1}‖)))
        rule="cosine":          λ_i ← λ_i · exp(tuner(h_i / (‖g_t‖ ‖∂u_{t−1}/∂λ_i‖)))

    h_t = (∂u_{t−1}/∂λ)ᵀ g_t states how the last step's λ changed the loss at θ_t. λ h is the derivative in log λ, so
    all rules except the first keep λ positive. The last two do not depend on the scale of the loss. With `optax.sgd(β)`
    as the tuner, they move the logarithm of a rate by β times the cosine between −g_t and the last step. A good initial
    choice of β is 0.1 to 0.5: a rate that is 100 times too small is then corrected within some hundred steps.

    The two rules differ if there is more than one λ. "normalized" follows the gradient in log λ. A λ that moves the
    parameters little, such as a weight decay, is then hardly tuned. With "cosine" each λ moves by the cosine of its own
    effect, independently of the effect's size. Two dtypes limit this. The parameters' dtype must represent λ ∂u/∂λ
    (float16 does not, for a decay of 0.01 at a rate of 1e-5). float32 must represent its square.

    **What bounds λ.** With "normalized" or "cosine" and `optax.sgd(β)`, each step multiplies λ by at most exp(β). The
    other rules have no such bound. If a rate is too large, its own signal changes sign and reduces it. But a long step
    of another λ may be too large for this to help. An example is a problem on which decay helps at every step, such as
    ½‖θ‖², with β = 2. There rate · decay exceeds 2, each step moves θ to the other side and further out, and training
    diverges. A momentum may also exceed 1. `projection_fn` moves λ back into its range, at the start and after each
    move: λ ← P(λ). It receives all of λ:

        lambda hp: optax.projections.projection_box(hp, low, high)              # bounds of each, in trees like λ
        lambda hp: {**hp, "decay": jnp.minimum(hp["decay"], 1 / hp["rate"])}    # rate · decay ≤ 1, of AdamW

    With the second example, a decay removes at most the whole of a parameter in a step. So it cannot move a parameter
    further from zero than it was. If P(λ) = λ, the projection changes nothing.

    Start too small rather than too large, at a hundredth of a guess. With a rate that is too large, a network may be
    damaged, or may overfit, before λ has come down. From below, λ rises by five decades in about 50 steps. The training
    loss does not show overfitting: if it goes to zero, following it keeps the rate too large. The best variant
    (`experiments/results/self_tuning.md`) follows a validation loss, with the weight decay in λ and `rule="cosine"`.
    Networks overfit on three problems. On two of them, this variant ended with a lower loss than the best constant
    rate, from either start. It uses the tuners `optax.sgd(0.5)` for the rate and `optax.sgd(2.0)` for the decay. The
    decay starts at 0.01 and is kept below 1 / rate by the projection above.

    **Which loss.** By default g_t is the gradient passed to `update`, which is that of the training loss. This is
    hypergradient descent, without an additional gradient. With the extra argument `valid_grad_fn`, g_t is
    `valid_grad_fn(params)`, the gradient of the validation loss on a batch that the caller chooses: T1–T2.
    Alternatively, give `self_tuning` the loss itself as `valid_loss_fn`, and `update` the extra argument `valid_batch`.
    (For complex parameters, g_t is then the conjugate of JAX's gradient: the direction of ascent.) All members of a
    chain get the same extra arguments. This costs one more gradient per step; a smaller batch costs less.

    A `gap` γ adds the gap between the losses with a weight: g_t = ∇f_valid + γ (∇f_valid − ∇f_train). If a network is
    about to overfit, the gap grows before the validation loss does. On three such problems γ = 1 (with a validation
    batch twice as large) was better than 0. On two others it was worse, and on the remaining ones the results were
    mixed.

    **How far back.** One step is short-sighted. It does not see later steps, prefers small rates on noisy gradients,
    and cannot measure the effect of a small decay over time. With a `discount` μ > 0 the derivative is carried along
    with training,

        Z_t = ∂Φ/∂λ + μ (∂Φ/∂(θ, s)) Z_{t−1},    h_t = Z_tᵀ g_t,    (θ, s)_t = Φ((θ, s)_{t−1}, λ),

    with s the optimizer's state. μ = 0 is one step. μ = 1 is the exact derivative of f(θ_t) along an equal shift of all
    λ so far (of all log λ, except for "additive"). For values between them, steps longer ago than 1/(1 − μ) are
    forgotten: a short truncation, biased by the forgotten steps. It needs `grad_fn`, `params -> gradient` of this
    step's training loss. Transforms before this optimizer in a chain, which change gradients, and transforms after it,
    which change updates, do not enter the derivative. (With μ = 0, `grad_fn` is passed to the optimizer, as other extra
    arguments are: to `optax.contrib.sam`.)

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
    Flax's `TrainState.apply_gradients` does not pass them to the optimizer. Use its two lines instead, with the
    arguments:

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
        a simplex does not work); by default λ is not bounded.
      valid_loss_fn: the validation loss, `(params, batch) -> []`, if `update` gets only the batch.

    Returns:
      A transform whose `update` requires the parameters, and takes `valid_grad_fn` or `valid_batch`, and `grad_fn`, as
        extra arguments.

    Raises:
      ValueError: if `rule` or `mode` is unknown; `factory`, `projection_fn` or `valid_loss_fn` is not a function; or
        `tuner` is not a transform.
      ValueError: if λ is empty, not a finite real number, or not positive although the rule requires it.
      ValueError: if `gap` is negative, or `discount` is not in [0, 1]; with `mode="reverse"`, if `discount` is not 0,
        or `rule` is "cosine".
      ValueError: in `init`, if `projection_fn` returns a tree that is not like λ, or values that are not positive
        although the rule requires it.
      ValueError: in `update`, if the parameters are missing, or `grad_fn` is missing with μ > 0.
      ValueError: in `update`, if exactly one of `valid_batch` and `valid_loss_fn` is given (but `valid_grad_fn` may
        replace the batch), or both `valid_batch` and `valid_grad_fn`.
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
    >>> sgd = transforms.self_tuning(lambda hp: optax.sgd(hp["rate"]), {"rate": 1e-3}, optax.sgd(0.1))
    >>> params, state = jnp.array([1.0, 2.0]), sgd.init(jnp.array([1.0, 2.0]))
    >>> for _ in range(50):
    ...     updates, state = sgd.update(params, state, params)
    ...     params = params + updates
    >>> bool(state.hyperparams["rate"] > 0.05)
    True
    """
    if rule not in ("additive", "multiplicative", "normalized", "cosine"):
        raise ValueError(f'`rule` must be "additive", "multiplicative", "normalized" or "cosine"; got {rule!r}.')
    if mode not in ("forward", "reverse"):
        raise ValueError(f'`mode` must be "forward" or "reverse"; got {mode!r}.')
    if not 0 <= discount <= 1:
        raise ValueError(f"`discount` must be in [0, 1]; got {discount}.")
    if not gap >= 0:
        raise ValueError(f"`gap` must be at least 0; got {gap}.")
    if discount and mode == "reverse":
        raise ValueError(
            f'`discount` must be 0 with `mode="reverse"`, which uses only the last step; got {discount}. '
            'Use `mode="forward"`.'
        )
    if rule == "cosine" and mode == "reverse":
        raise ValueError(
            '`rule="cosine"` needs the effect of each λ by itself, which `mode="reverse"` never has. Use '
            '`mode="forward"`, or `rule="normalized"`.'
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(hyperparams):
        where = jax.tree_util.keystr(path) or "the root"
        if isinstance(leaf, Tracer):
            continue
        kind = np.asarray(leaf).dtype
        if not jnp.issubdtype(kind, jnp.number) or jnp.issubdtype(kind, jnp.complexfloating):
            raise ValueError(f"`hyperparams` must be real numbers; got {leaf!r} at {where}.")
        if not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise ValueError(
                f"`hyperparams` must be finite, since updates cannot change an infinite value; got {leaf} at {where}."
            )
        if rule != "additive" and not np.all(np.asarray(leaf) > 0):
            raise ValueError(
                f"`hyperparams` must be positive, since the {rule} rule moves their logarithms; got {leaf} at "
                f'{where}. Use `rule="additive"`, or make it a constant of the factory.'
            )
    if not jax.tree.leaves(hyperparams):
        raise ValueError(f"`hyperparams` must hold at least one number to tune; got {hyperparams}.")
    if not callable(factory):
        raise ValueError(
            "`factory` must be a function `hyperparams -> optax.GradientTransformation`, such as "
            f"`lambda hp: optax.adamw(hp['rate'])`; got {type(factory).__name__} itself."
        )
    _checks.check_transform("tuner", tuner)
    if valid_loss_fn is not None and not callable(valid_loss_fn):
        kind = type(valid_loss_fn).__name__
        raise ValueError(f"`valid_loss_fn` must be a function, `(params, batch) -> loss`; got a {kind}.")
    if projection_fn is not None and not callable(projection_fn):
        raise ValueError(
            "`projection_fn` must be a function `hyperparams -> hyperparams`, such as `lambda hp: "
            f"optax.projections.projection_box(hp, low, high)`; got a {type(projection_fn).__name__}."
        )
    tuner = optax.with_extra_args_support(tuner)
    logarithmic = rule != "additive"
    checked = set()

    def optimizer(hyperparams):
        try:
            with _checks.explained_schedules("factory"):
                made = factory(hyperparams)
        except TypeError as error:
            error.add_note("`factory` is called with the whole of λ: for a dict, `lambda hp: optax.adamw(**hp)`.")
            raise
        _checks.check_transform("factory(hyperparams)", made)
        return differentiable(made)

    def run(hyperparams, updates, inner, params, extra_args):
        """u and the next state of the optimizer, as arrays, since some states hold a Python number."""
        with _checks.explained_schedules("factory"):
            return jax.tree.map(jnp.asarray, optimizer(hyperparams).update(updates, inner, params, **extra_args))

    def projected(hyperparams):
        if projection_fn is None:
            return hyperparams
        allowed = projection_fn(hyperparams)
        _check_like("what `projection_fn` returns", allowed, hyperparams, "λ", hint="")
        # Copies, since P may return the caller's own array, or one array twice.
        return jax.tree.map(lambda x, like: jnp.array(x, like.dtype), allowed, hyperparams)

    def init(params):
        # A copy, so that the buffer may be donated to a program: the next run starts from λ again.
        params = jax.tree.map(jnp.asarray, params)
        start = jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), hyperparams)
        start = projected(start)
        known = [x for x in jax.tree.leaves(start) if not isinstance(x, Tracer)]
        if logarithmic and projection_fn is not None and not all(np.all(x > 0) for x in known):
            raise ValueError(
                f"What `projection_fn` returns must be positive, since the {rule} rule moves logarithms, and a λ of "
                f"zero never moves again; got {start}."
            )
        inner = jax.tree.map(jnp.asarray, optimizer(start).init(params))
        if mode == "reverse":  # copies, so that the buffers of both may be donated to a program
            last = (optax.tree.zeros_like(params), *jax.tree.map(jnp.copy, (inner, params)))
        else:
            num = ravel_pytree(start)[0].size
            carried = (_split(params)[0], _split(inner)[0] if discount else None)
            last = jax.tree.map(lambda x: jnp.zeros((num, *jnp.shape(x)), jnp.result_type(x)), carried)
        return SelfTuningState(start, inner, tuner.init(start), last, jnp.zeros([], jnp.int32))

    def signal_forward(judge, state, extra_args):
        """Z_tᵀ g_t; zero before the first step, since Z is zero."""
        del extra_args
        derivatives, _ = state.last
        flat, unravel = ravel_pytree(state.hyperparams)
        # `axis_size` allows parameters that are an empty tree.
        dots = jax.vmap(lambda z: optax.tree.vdot(_wide(z), _wide(judge)), axis_size=flat.size)(derivatives)
        signal = jnp.real(dots)
        if rule in ("normalized", "cosine"):
            lengths = jax.vmap(_norm, axis_size=flat.size)(derivatives)
            signal = _divided(signal, _norm(judge) * (lengths if rule == "cosine" else jnp.max(lengths)))
        return unravel(jnp.asarray(signal, flat.dtype))

    def signal_reverse(judge, state, extra_args):
        """(∂u_{t−1}/∂λ)ᵀ g_t."""
        last_grads, last_inner, last_params = state.last

        def last_update(hyperparams):
            out, _ = run(hyperparams, last_grads, last_inner, last_params, extra_args)
            return _split(out)[0]

        last_updates, pullback = jax.vjp(last_update, state.hyperparams)
        if rule == "normalized":  # before the products, which may over- or underflow in half precision
            norm = _norm(judge)
            judge = jax.tree.map(lambda g: _divided(g, norm), _wide(judge))
        # JAX's pullback belongs to u ↦ Re Σ g u, without a conjugate.
        (signal,) = pullback(_like(jax.tree.map(jnp.conj, judge), last_updates))
        if logarithmic:
            signal = jax.tree.map(jnp.multiply, state.hyperparams, signal)
        if rule == "normalized":
            length = _norm(last_updates)
            signal = jax.tree.map(lambda h: _divided(h, length), signal)
        # No update exists yet before the first step.
        return jax.tree.map(lambda h: jnp.where(state.count > 0, h, 0), signal)

    def step_reverse(updates, state, params, tuned, grad_fn, extra_args):
        """u_t, the next state of the optimizer, and the inputs of the next signal."""
        del grad_fn
        out, inner = run(tuned, updates, state.inner, params, extra_args)
        return out, inner, (updates, state.inner, params)

    def step_forward(updates, state, params, tuned, grad_fn, extra_args):
        floats, rest = _split((updates, params, state.inner))
        flat, unravel = ravel_pytree(tuned)
        # One tangent per entry, in λ or in log λ.
        primals, tangents = (tuned,), (jax.vmap(unravel)(jnp.diag(flat if logarithmic else jnp.ones_like(flat))),)
        if discount:
            by_params, by_inner = jax.tree.map(lambda z: discount * z, state.last)
            if grad_fn is None:
                raise ValueError(
                    "`discount` above 0 needs the gradient of the training loss as a function, to see how it changes "
                    "with the parameters: call `update(updates, state, params, grad_fn=grad_fn)`."
                )
            train_grad = lambda p: _gradient("grad_fn", grad_fn, _merge(p, rest[1]), updates)
            _, hessian = jax.linearize(train_grad, floats[1])
            by_updates = _like(jax.vmap(hessian, axis_size=flat.size)(by_params), floats[0])
            primals, tangents = (tuned, floats), (*tangents, (by_updates, by_params, by_inner))

        def advance(hyperparams, floats=floats):
            updates, params, inner = _merge(floats, rest)
            out, inner = run(hyperparams, updates, inner, params, extra_args)
            return _split((out, _like(inner, state.inner)))

        floats_out, push, rest_out = jax.linearize(advance, *primals, has_aux=True)
        by_params_out, by_inner_out = jax.vmap(push)(*tangents)
        out, inner = _merge(floats_out, rest_out)
        if not discount:
            return out, inner, (by_params_out, None)
        return out, inner, (jax.tree.map(jnp.add, by_params, by_params_out), by_inner_out)

    def refuse_what_has_no_effect(updates, state, params, extra_args):
        """Raises ValueError if a leaf of λ does not move the updates (with a discount: nor the optimizer's state)."""

        def moved(hyperparams):
            out, inner = run(hyperparams, updates, state.inner, params, extra_args)
            return _split((out, inner if discount else None))[0]

        used = _jaxpr.used_leaves(moved, state.hyperparams)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.hyperparams)]
        # In a tree of λ, leaves that belong to masked-out parameters need not be used.
        nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)
        out = [path for path, node in nodes if _is_masked(node)]
        kept = [path for path, node in nodes if not _is_masked(node)]

        def masked_out(path):
            return _belongs_to(path, out) and not _belongs_to(path, kept)

        unused = [path for path, u in zip(paths, used, strict=True) if not (u or masked_out(path))]
        idle = [jax.tree_util.keystr(path) or "itself" for path in unused]
        if idle:
            some_out = (
                " Some parameters are masked out here: what is theirs alone belongs outside, too, unless it stands at "
                "their path in λ."
            )
            raise ValueError(
                f"The leaves {', '.join(idle)} of λ do not change the updates. `factory` does not use them, or its "
                "optimizer keeps them in its state, as `optax.inject_hyperparams` does. Make the optimizer of "
                "`hyperparams` itself, as in `lambda hp: optax.adamw(hp['rate'])`; around `self_tuning`, "
                f"`inject_hyperparams` works.{some_out if out else ''}"
            )

    signal_of, step = (signal_forward, step_forward) if mode == "forward" else (signal_reverse, step_reverse)

    def update(updates, state, params=None, *, valid_grad_fn=None, valid_batch=None, grad_fn=None, **extra_args):
        if params is None:
            raise ValueError("`self_tuning` needs the parameters: call `update(updates, state, params)`.")
        updates, params = jax.tree.map(jnp.asarray, (updates, params))
        if valid_loss_fn is not None and valid_batch is None and valid_grad_fn is None:
            raise ValueError(
                "`valid_loss_fn` needs its batch: call `update(updates, state, params, valid_batch=batch)`; got none. "
                "(Flax's `TrainState.apply_gradients` cannot pass it.)"
            )
        if valid_batch is not None:
            if valid_loss_fn is None or valid_grad_fn is not None:
                raise ValueError(
                    "`valid_batch` needs the validation loss, `self_tuning(..., valid_loss_fn=loss)`, and takes the "
                    "place of `valid_grad_fn`; got " + ("both." if valid_loss_fn is not None else "no such loss.")
                )
            valid_grad_fn = functools.partial(_loss_gradient, valid_loss_fn, valid_batch)
        if grad_fn is not None and not discount:  # an extra argument of the optimizer itself
            extra_args, grad_fn = {**extra_args, "grad_fn": grad_fn}, None
        masked = any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
        if masked and (valid_grad_fn is not None or grad_fn is not None):
            raise ValueError(
                "A validation loss and `grad_fn` need all parameters, but within `optax.masked` or `multi_transform` "
                "`self_tuning` sees only some of the parameters. Put it outside: "
                "`self_tuning(lambda hp: optax.multi_transform({...: optax.adam(hp[...])}, labels), ...)`."
            )
        _check_like("the parameters", params, updates, real=False)
        judge = _split(updates)[0]
        if valid_grad_fn is not None:
            judge = _gradient("valid_grad_fn", valid_grad_fn, params, updates)
        structure = jax.tree.structure((updates, extra_args))
        if jax.tree.leaves(judge) and structure not in checked:
            refuse_what_has_no_effect(updates, state, params, extra_args)
            checked.add(structure)
        if gap and valid_grad_fn is not None:
            judge = jax.tree.map(lambda v, g: v + gap * (v - g), _wide(judge), _wide(_split(updates)[0]))
        signal = signal_of(judge, state, extra_args)
        at = jax.tree.map(jnp.log, state.hyperparams) if logarithmic else state.hyperparams
        moves, tuner_state = tuner.update(signal, state.tuner, at)

        def moved(x, move):
            return (x * jnp.exp(move) if logarithmic else x + move).astype(x.dtype)

        tuned = projected(jax.tree.map(moved, state.hyperparams, moves))
        new_updates, inner, last = step(updates, state, params, tuned, grad_fn, extra_args)
        last, inner = _like((last, inner), (state.last, state.inner))
        return _promoted(new_updates, updates, params), SelfTuningState(
            tuned, inner, tuner_state, last, state.count + 1
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _like(new, old):
    """Casts `new` to the precision of `old`, so that λ in float32 does not widen values in bfloat16."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if _is_float(y) else x, new, old)


def _promoted(new, updates, params):
    """Casts to the wider dtype of gradient and parameter: in bfloat16 a decay would be lost next to a larger step."""

    def one(x, update, param):
        return x.astype(jnp.promote_types(update.dtype, param.dtype)) if _is_float(update) else x

    return jax.tree.map(one, new, updates, params)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _loss_gradient(loss_fn, batch, params):
    """The direction of ascent, as optax defines it for complex parameters; integers have none."""
    grads = jax.grad(loss_fn, allow_int=True)(params, batch)
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


def _belongs_to(path, others):
    """Whether some end of `path` starts with one of the other paths, or is the start of one."""

    def names(path):
        return [jax.tree_util.keystr((key,), simple=True) for key in path]

    ends = [names(path)[i:] for i in range(len(path))]
    return any(end[: len(other)] == other[: len(end)] for other in map(names, others) for end in ends)


def _wide(tree):
    """Casts to at least float32, since squares of half-precision gradients underflow."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _norm(tree):
    """The norm, with a derivative of zero at zero, since the last update is zero before the first step."""
    square = optax.tree.norm(_wide(tree), squared=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


_CHANGED_STRUCTURE = (
    " (`jax.value_and_grad` returns a pair; what changes the parameters' structure, as `optax.lookahead` does, belongs "
    "around `self_tuning`, not into its factory.)"
)


def _check_like(what, tree, like, name="the gradients that `update` is given", *, hint=_CHANGED_STRUCTURE, real=True):
    """Raises ValueError if a tree differs from another in structure or shapes, or is not floating-point like it.

    With `real`, it must not be complex either if the other is real.
    """
    shapes = [jax.tree.map(jnp.shape, t) for t in (tree, like)]
    start = f"{what[0].upper()}{what[1:]} must be"
    if jax.tree.structure(tree) != jax.tree.structure(like) or shapes[0] != shapes[1]:
        raise ValueError(f"{start} a tree like {name}, {shapes[1]}; got {shapes[0]}.{hint}")
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True):
        if not _is_float(other):
            continue
        kinds = [jnp.result_type(x) for x in (leaf, other)]
        imaginary = real and jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(other)
        if not jnp.issubdtype(kinds[0], jnp.inexact) or imaginary:
            where = jax.tree_util.keystr(path) or "the root"
            raise ValueError(f"{start} of the kind of {name}, {kinds[1]} at {where}; got {kinds[0]}.")


def _gradient(name, grad_fn, params, updates):
    """The result of the caller's gradient function, for the leaves whose updates have a derivative."""
    if not callable(grad_fn):
        raise ValueError(f"`{name}` must be a function, `params -> gradient`; got a {type(grad_fn).__name__}.")
    found = grad_fn(params)
    _check_like(f"what `{name}` returns", found, updates)
    return jax.tree.map(lambda x, u: jnp.asarray(x) if _is_float(u) else None, found, updates)


def _divided(x, norm):
    """x / norm, or zero if the norm is zero."""
    return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1), 0)


def _split(tree):
    """Leaves with a derivative, and leaves without (counts, PRNG keys); each tree has None for the other's leaves."""

    def only(floating):
        return jax.tree.map(lambda x: x if _is_float(x) == floating else None, tree)

    return only(True), only(False)


def _merge(floats, rest):
    return jax.tree.map(lambda x, y: y if x is None else x, floats, rest, is_leaf=lambda x: x is None)
