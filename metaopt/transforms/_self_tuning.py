"""An optimizer that tunes its own hyperparameters while it trains, by the training or the validation loss.

What a step of the optimizer does to a loss f is seen after it: with θ_t = θ_{t−1} + u_{t−1}(λ),

    h_t = (∂θ_t/∂λ)ᵀ g_t,    g_t = ∇f(θ_t),

where ∂θ_t/∂λ is that of the last step alone, ∂u_{t−1}/∂λ, or is carried along with training. The next training gradient
is such a g_t for free: for the rate of SGD, h_t = −g_t · g_{t−1}. An optimizer of λ, the tuner, descends along h. The
tuner is any transform, and so may tune itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from metaopt import base
from metaopt.transforms._differentiable import differentiable


class SelfTuningState(NamedTuple):
    """What `self_tuning` carries.

    Attributes:
      hyperparams: λ, as the last step used it: look here for logging.
      inner: the optimizer's state.
      tuner: the state of the optimizer of λ.
      last: what says how λ moved the parameters: with `mode="forward"` the derivatives themselves, with a leading axis
        for the entries of λ; with "reverse" what the last step was made of.
      count: [] int32, the steps taken.
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
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose λ descends along a hypergradient h of the training or the validation loss, before each step.

        rule="additive":        λ ← λ + tuner(h)
        rule="multiplicative":  λ ← λ · exp(tuner(λ h))
        rule="normalized":      λ ← λ · exp(tuner(λ h / (‖g_t‖ ‖u_{t−1}‖)))

    h_t = (∂u_{t−1}/∂λ)ᵀ g_t says how the last step's λ changed the loss at θ_t. λ h is the derivative in log λ, so that
    the last two rules keep λ positive; the last does not depend on the scale of the loss: for a rate it moves log λ by
    β times the cosine between g_t and the last step, with `optax.sgd(β)` as the tuner. β from 0.1 to 0.5 is a place to
    start: a rate that is 100 times too small is found within some hundred steps.

    Start too small rather than too large, at a hundredth of a guess: a network may be damaged, or have overfitted,
    before λ has come down, and five decades are climbed in some 50 steps. The training loss does not see overfitting:
    where it goes to zero, following it keeps the rate too large (`experiments/results/self_tuning.md`).

    **Which loss.** By default g_t is the gradient that `update` is given, that of the training loss: hypergradient
    descent, at no gradient more. With the extra argument `valid_grad_fn` it is `valid_grad_fn(params)`, the gradient of
    the validation loss, on a batch of the caller's: T1–T2. One more gradient a step; a smaller batch costs less. A
    `gap` γ counts the gap between the losses once more, g_t = ∇f_valid + γ (∇f_valid − ∇f_train): it grows before the
    validation loss does, where a network is about to overfit. There, γ = 1 was better than 0, and elsewhere worse.

    **How far back.** One step is short-sighted: it knows of no later step, prefers small rates on noisy gradients, and
    cannot see what a small decay does over time. With a `discount` μ > 0 the derivative is carried along with training,

        Z_t = ∂Φ/∂λ + μ (∂Φ/∂(θ, s)) Z_{t−1},    h_t = Z_tᵀ g_t,    (θ, s)_t = Φ((θ, s)_{t−1}, λ),

    with s the optimizer's state. μ = 0 is one step; μ = 1 is the exact derivative of f(θ_t) along an equal shift of all
    λ so far (of all log λ, but for "additive"); between them, steps longer ago than 1/(1 − μ) are forgotten: a short
    truncation, biased by what it forgets. It needs `grad_fn`, `params -> gradient` of this step's training loss; what
    transforms gradients before this optimizer in a chain has no part in the derivative.

    **What it costs**, with n entries of λ. `mode="forward"` keeps n derivatives of the parameters (μ > 0: and of the
    optimizer's state), in their precision, and pushes n tangents through the optimizer's operations; with μ > 0 it
    takes n products with the Hessian, too. `mode="reverse"` takes one pullback through the optimizer's operations
    whatever n is, and keeps the last gradient and copies of the optimizer's state and the parameters: for many λ, such
    as a rate for each parameter. Its extra arguments of the optimizer itself (`value`) are this step's, where the last
    step is looked at too. In forward mode, the normalized rule has the largest of the n ‖λ ∂u/∂λ‖ in the place of
    ‖u‖, which is the same thing where λ holds the rate.

    The tuner may be a `self_tuning` itself, to any height. The state is a pytree of arrays, and λ enters `update` from
    there: nothing recompiles. Extra arguments come through `optax.chain`, `apply_if_finite`, `inject_hyperparams`,
    `MultiSteps` and `nnx.Optimizer.update(model, grads, valid_grad_fn=fn)`. Flax's `TrainState.apply_gradients` has no
    way for them; these two lines are what it does, with them:

        updates, opt_state = ts.tx.update(grads, ts.opt_state, ts.params, valid_grad_fn=fn)
        ts = ts.replace(step=ts.step + 1, params=optax.apply_updates(ts.params, updates), opt_state=opt_state)

    Args:
      factory: `hyperparams -> optax.GradientTransformation`, such as `lambda hp: optax.adamw(hp["rate"])`.
      hyperparams: λ to start from, any tree of numbers; positive but for "additive".
      tuner: the optimizer of λ.
      rule: "additive", "multiplicative" or "normalized".
      discount: μ, in [0, 1].
      gap: γ, at least 0; counts where there is a validation loss.
      mode: "forward", for few λ, or "reverse", for many, with μ = 0.

    Returns:
      A transform, with parameters as a required argument of `update`, and `valid_grad_fn` and `grad_fn` as extra ones.

    Raises:
      ValueError: `rule` or `mode` is something else, `factory` is no function, λ is empty, or not positive where it
        must be, `discount` is not in [0, 1], or not 0 in reverse mode, `gap` is negative; in `update`: there are no
        parameters, or no `grad_fn` where μ > 0 needs one.

    Source: Baydin et al., ICLR 2018, https://arxiv.org/abs/1703.04782; a stack of them: Chandra et al., NeurIPS 2022,
    https://arxiv.org/abs/1909.13371; T1–T2: Luketina et al., ICML 2016, https://arxiv.org/abs/1511.06727; carried:
    Franceschi et al., ICML 2017, https://arxiv.org/abs/1703.01785, with a discount: Donini et al., IJCAI 2020,
    https://arxiv.org/abs/1910.08525

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
    if rule not in ("additive", "multiplicative", "normalized"):
        raise ValueError(f'`rule` must be "additive", "multiplicative" or "normalized"; got {rule!r}.')
    if mode not in ("forward", "reverse"):
        raise ValueError(f'`mode` must be "forward" or "reverse"; got {mode!r}.')
    if not 0 <= discount <= 1:
        raise ValueError(f"`discount` must be in [0, 1]; got {discount}.")
    if not gap >= 0:
        raise ValueError(f"`gap` must be at least 0; got {gap}.")
    if discount and mode == "reverse":
        raise ValueError(
            f'`discount` must be 0 with `mode="reverse"`, which looks at the last step alone; got {discount}. '
            'Use `mode="forward"`.'
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(hyperparams):
        if rule != "additive" and not isinstance(leaf, Tracer) and not np.all(np.asarray(leaf) > 0):
            raise ValueError(
                f"`hyperparams` must be positive, since the {rule} rule moves their logarithms; got {leaf} at "
                f'{jax.tree_util.keystr(path) or "the root"}. Use `rule="additive"`, or leave it in the factory.'
            )
    if not jax.tree.leaves(hyperparams):
        raise ValueError(f"`hyperparams` must hold at least one number to tune; got {hyperparams}.")
    if not callable(factory):
        raise ValueError(
            "`factory` must be a function `hyperparams -> optax.GradientTransformation`, such as "
            f"`lambda hp: optax.adamw(hp['rate'])`; got {type(factory).__name__} itself."
        )
    tuner = optax.with_extra_args_support(tuner)
    logarithmic = rule != "additive"

    def optimizer(hyperparams):
        return differentiable(factory(hyperparams))

    def init(params):
        # A copy, so that a program may be given the buffer: the next run starts from λ again.
        start = jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), hyperparams)
        inner = optimizer(start).init(params)
        if mode == "reverse":  # copies, so that a program may be given the buffers of both
            last = (optax.tree.zeros_like(params), *jax.tree.map(jnp.copy, (inner, params)))
        else:
            num = ravel_pytree(start)[0].size
            carried = (params, _split(inner)[0] if discount else None)
            last = jax.tree.map(lambda x: jnp.zeros((num, *jnp.shape(x)), jnp.result_type(x)), carried)
        return SelfTuningState(start, inner, tuner.init(start), last, jnp.zeros([], jnp.int32))

    def signal_forward(judge, state, extra_args):
        """Z_tᵀ g_t; zero before the first step, since Z is."""
        del extra_args
        derivatives, _ = state.last
        flat, unravel = ravel_pytree(state.hyperparams)
        # With `axis_size`, parameters may be an empty tree.
        dots = jax.vmap(lambda z: optax.tree.vdot(_wide(z), _wide(judge)), axis_size=flat.size)(derivatives)
        signal = jnp.asarray(dots)
        if rule == "normalized":
            lengths = jax.vmap(_norm, axis_size=flat.size)(derivatives)
            signal = _divided(signal, _norm(judge) * jnp.max(lengths))
        return unravel(jnp.asarray(signal, flat.dtype))

    def signal_reverse(judge, state, extra_args):
        """(∂u_{t−1}/∂λ)ᵀ g_t."""
        last_grads, last_inner, last_params = state.last

        def last_update(hyperparams):
            return optimizer(hyperparams).update(last_grads, last_inner, last_params, **extra_args)[0]

        last_updates, pullback = jax.vjp(last_update, state.hyperparams)
        if rule == "normalized":  # before the products, for which half precision may have no room
            norm = _norm(judge)
            judge = jax.tree.map(lambda g: _divided(g, norm), _wide(judge))
        (signal,) = pullback(_like(judge, last_updates))
        if logarithmic:
            signal = jax.tree.map(jnp.multiply, state.hyperparams, signal)
        if rule == "normalized":
            length = _norm(last_updates)
            signal = jax.tree.map(lambda h: _divided(h, length), signal)
        # Before the first step there is nothing to judge.
        return jax.tree.map(lambda h: jnp.where(state.count > 0, h, 0), signal)

    def step_reverse(updates, state, params, tuned, grad_fn, extra_args):
        """u_t, the optimizer's state after it, and what the next signal is made of."""
        del grad_fn
        out, inner = optimizer(tuned).update(updates, state.inner, params, **extra_args)
        return out, inner, (updates, state.inner, params)

    def step_forward(updates, state, params, tuned, grad_fn, extra_args):
        floats, rest = _split(state.inner)
        flat, unravel = ravel_pytree(tuned)
        # Each λ, or each log λ.
        primals, tangents = (tuned,), (jax.vmap(unravel)(jnp.diag(flat if logarithmic else jnp.ones_like(flat))),)
        if discount:
            by_params, by_floats = jax.tree.map(lambda z: discount * z, state.last)
            if grad_fn is None:
                raise ValueError(
                    "`discount` above 0 needs the gradient of the training loss as a function, to see how it changes "
                    "with the parameters: call `update(updates, state, params, grad_fn=grad_fn)`."
                )
            _, hessian = jax.linearize(grad_fn, params)
            by_updates = _like(jax.vmap(hessian, axis_size=flat.size)(by_params), updates)
            primals, tangents = (tuned, updates, floats, params), (*tangents, by_updates, by_floats, by_params)

        def advance(hyperparams, updates=updates, floats=floats, params=params):
            out, inner = optimizer(hyperparams).update(updates, _merge(floats, rest), params, **extra_args)
            floats, rest_out = _split(_like(inner, state.inner))
            return (out, floats), rest_out

        (out, floats), push, rest = jax.linearize(advance, *primals, has_aux=True)
        by_params_out, by_floats_out = jax.vmap(push)(*tangents)
        if not discount:
            return out, _merge(floats, rest), (by_params_out, None)
        return out, _merge(floats, rest), (jax.tree.map(jnp.add, by_params, by_params_out), by_floats_out)

    signal_of, step = (signal_forward, step_forward) if mode == "forward" else (signal_reverse, step_reverse)

    def update(updates, state, params=None, *, valid_grad_fn=None, grad_fn=None, **extra_args):
        if params is None:
            raise ValueError("`self_tuning` needs the parameters: call `update(updates, state, params)`.")
        updates, params = jax.tree.map(jnp.asarray, (updates, params))
        masked = any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
        if masked and (valid_grad_fn is not None or grad_fn is not None):
            raise ValueError(
                "`valid_grad_fn` and `grad_fn` need all parameters, and within `optax.masked` or `multi_transform` "
                "`self_tuning` sees some of the parameters alone. Put it outside: "
                "`self_tuning(lambda hp: optax.multi_transform({...: optax.adam(hp[...])}, labels), ...)`."
            )
        judge = updates if valid_grad_fn is None else valid_grad_fn(params)
        if gap and valid_grad_fn is not None:
            judge = jax.tree.map(lambda v, g: v + gap * (v - g), _wide(judge), _wide(updates))
        signal = signal_of(judge, state, extra_args)
        at = jax.tree.map(jnp.log, state.hyperparams) if logarithmic else state.hyperparams
        moves, tuner_state = tuner.update(signal, state.tuner, at)

        def moved(x, move):
            return (x * jnp.exp(move) if logarithmic else x + move).astype(x.dtype)

        tuned = jax.tree.map(moved, state.hyperparams, moves)
        new_updates, inner, last = step(updates, state, params, tuned, grad_fn, extra_args)
        last, inner = _like((last, inner), (state.last, state.inner))
        return _like(new_updates, updates), SelfTuningState(tuned, inner, tuner_state, last, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _like(new, old):
    """With the precision of `old`: λ in float32 does not widen what is in bfloat16."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if _is_float(y) else x, new, old)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _wide(tree):
    """At least in float32: squares of half-precision gradients underflow."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _norm(tree):
    return optax.tree.norm(_wide(tree))


def _divided(x, norm):
    """x / norm, and zero where that is zero."""
    return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1), 0)


def _split(tree):
    """What has a derivative, and what has none (counts, PRNG keys), each with None in the place of the other."""

    def only(floating):
        return jax.tree.map(lambda x: x if _is_float(x) == floating else None, tree)

    return only(True), only(False)


def _merge(floats, rest):
    return jax.tree.map(lambda x, y: y if x is None else x, floats, rest, is_leaf=lambda x: x is None)
