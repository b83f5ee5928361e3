"""An optimizer that tunes its own hyperparameters while it trains, from the training gradients it sees anyway.

The loss after a step, f(θ_t) with θ_t = θ_{t−1} + u_{t−1}(λ), changes with the λ of that step by

    h_t = (∂u_{t−1}/∂λ)ᵀ g_t,    g_t = ∇f(θ_t),

which the next gradient says for free: for the rate of SGD it is −g_t · g_{t−1}. An optimizer of λ, the tuner, descends
along it. The tuner is any transform, and so may tune itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from metaopt import base
from metaopt.transforms._differentiable import differentiable


class SelfTuningState(NamedTuple):
    """What `self_tuning` carries.

    Attributes:
      hyperparams: λ, as the next step uses it: look here for logging.
      inner: the optimizer's state.
      tuner: the state of the optimizer of λ.
      last: what the last step was made of: the gradient, the optimizer's state and the parameters before it.
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
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose λ descends along the one-step hypergradient h_t of the training loss, before each step.

        rule="additive":        λ ← λ + tuner(h)
        rule="multiplicative":  λ ← λ · exp(tuner(λ h))
        rule="normalized":      λ ← λ · exp(tuner(λ h / (‖g_t‖ ‖u_{t−1}‖)))

    With `optax.sgd(β)` as the tuner they are hypergradient descent. λ h is the derivative in log λ, so that the last
    two keep λ positive; the last does not depend on the scale of the loss: for a rate it moves log λ by β times the
    cosine between the new gradient and the last step, and β = 0.02 is a place to start. The rule is short-sighted: it
    knows of no later step, and prefers smaller rates on noisy gradients and a smaller weight decay than a validation
    loss does. `hypergrad` has the rules that look further.

    `tuner` may be a `self_tuning` itself, to any height. Takes a pullback through the optimizer's operations a step and
    one more copy of the gradient, the optimizer's state and the parameters. Extra arguments (`value`) are this step's,
    where the last step is looked at too. The state is a pytree of arrays, and λ enters `update` from there: nothing
    recompiles. Flax's `TrainState` and `nnx.Optimizer` hold it as any other.

    Args:
      factory: `hyperparams -> optax.GradientTransformation`, such as `lambda hp: optax.adamw(hp["rate"])`.
      hyperparams: λ to start from, any tree of numbers; positive but for "additive".
      tuner: the optimizer of λ.
      rule: "additive", "multiplicative" or "normalized".

    Returns:
      A transform, with parameters as a required argument of `update`.

    Raises:
      ValueError: `rule` is something else, or λ is not positive where it must be.

    Source: Baydin et al., ICLR 2018, https://arxiv.org/abs/1703.04782; a stack of them: Chandra et al., NeurIPS 2022,
    https://arxiv.org/abs/1909.13371

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
    for path, leaf in jax.tree_util.tree_leaves_with_path(hyperparams):
        if rule != "additive" and not isinstance(leaf, Tracer) and not jnp.all(jnp.asarray(leaf) > 0):
            raise ValueError(
                f"`hyperparams` must be positive, since the {rule} rule moves their logarithms; got {leaf} at "
                f'{jax.tree_util.keystr(path) or "the root"}. Use `rule="additive"`, or leave it in the factory.'
            )
    tuner = optax.with_extra_args_support(tuner)
    logarithmic = rule != "additive"

    def optimizer(hyperparams):
        return differentiable(factory(hyperparams))

    def init(params):
        start = jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), hyperparams)
        inner = optimizer(start).init(params)
        # Copies, so that a program may be given the buffers of both.
        last = (optax.tree.zeros_like(params), *jax.tree.map(jnp.copy, (inner, params)))
        return SelfTuningState(start, inner, tuner.init(start), last, jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("`self_tuning` needs the parameters: call `update(updates, state, params)`.")
        last_grads, last_inner, last_params = state.last

        def last_update(hyperparams):
            return optimizer(hyperparams).update(last_grads, last_inner, last_params, **extra_args)[0]

        last_updates, pullback = jax.vjp(last_update, state.hyperparams)
        (signal,) = pullback(jax.tree.map(lambda g, u: g.astype(u.dtype), updates, last_updates))
        if logarithmic:
            signal = jax.tree.map(jnp.multiply, state.hyperparams, signal)
        if rule == "normalized":
            scale = optax.tree.norm(updates) * optax.tree.norm(last_updates)
            signal = jax.tree.map(lambda h: jnp.where(scale > 0, h / jnp.where(scale > 0, scale, 1), 0), signal)
        # Before the first step there is nothing to judge.
        signal = jax.tree.map(lambda h: jnp.where(state.count > 0, h, 0), signal)
        at = jax.tree.map(jnp.log, state.hyperparams) if logarithmic else state.hyperparams
        moves, tuner_state = tuner.update(signal, state.tuner, at)

        def moved(x, move):
            return (x * jnp.exp(move) if logarithmic else x + move).astype(x.dtype)

        tuned = jax.tree.map(moved, state.hyperparams, moves)
        new_updates, inner = optimizer(tuned).update(updates, state.inner, params, **extra_args)
        last = _like((updates, state.inner, params), state.last)
        new_state = SelfTuningState(tuned, _like(inner, state.inner), tuner_state, last, state.count + 1)
        return _like(new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _like(new, old):
    """With the precision of `old`: λ in float32 does not widen what is in bfloat16."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if jnp.issubdtype(y.dtype, jnp.floating) else x, new, old)
