"""Optimizers as an architecture: a mixture of transforms, whose weights can be tuned."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import all_leaves

from metaopt import _schedule_free, _trees, base
from metaopt._jaxpr import eval_jaxpr
from metaopt.transforms import _prefixes


@jax.custom_jvp
def _weighted(weight, update):
    """w·u; for w = 0 it is −0 for any u, because adding −0 changes no bit of the other term."""
    return jnp.where(weight == 0, -jnp.zeros_like(update), weight * update)


@_weighted.defjvp
def _weighted_jvp(primals, tangents):
    (weight, update), (weight_dot, update_dot) = primals, tangents
    # At w = 0 the derivative in w is u, or zero if u is not finite. If the condition were only `weight == 0`,
    # `by_update` would be zero there. The derivative of `weight * by_update` in w, the mixed second derivative, would
    # then be lost.
    is_excluded = (weight == 0) & ~jnp.isfinite(update)
    by_weight, by_update = jnp.where(is_excluded, 0, update), jnp.where(is_excluded, 0, update_dot)
    return _weighted(weight, update), weight_dot * by_weight + weight * by_update


def mixture(
    transforms: Iterable[optax.GradientTransformation], weights: base.PyTree
) -> optax.GradientTransformationExtraArgs:
    """The weighted mean of the updates of several transforms, u = Σ_k w_k u_k.

    Each member sees the same gradients and parameters and keeps its own state, whatever its weight. Memory and time are
    the sums of the members'. With a one-hot w the update equals that member's to the bit.

    A member of weight zero may have a non-finite update or state. It then affects neither the values nor any
    derivative, and the derivative with respect to its weight is zero. For finite members, that derivative is the
    member's update. A member with a nonzero weight passes on non-finite values.

    It is differentiable in the weights and through the members, in both modes, as far as the members are. Wrap the
    mixture in `differentiable`, as `inner.loop` does.

    Args:
      transforms: the members, at least one; use `optax.chain` to give a member its own rate.
      weights: [K], an array or a list of K numbers, one for each member. Or a tree of such vectors that is a prefix of
        the parameters' tree, for a separate mixture in each subtree (in `nnx.Optimizer`, a dict or an `nnx.State`). The
        weights are used unchanged: `spaces.simplex(K)` or a softmax keeps them nonnegative with sum one.

    Returns:
      A transform; its state is the tuple of the members' states. Extra arguments reach every member that takes them.

    Raises:
      ValueError: if weights are not [K]; in `update`, by JAX, if the tree of weights does not fit the parameters.
      ValueError: in `init`, if a member is a schedule-free optimizer. Its average needs parameters that move by its own
        updates. Use `optax.contrib.schedule_free(mixture([...], weights), rate)` instead.

    >>> import jax.numpy as jnp, optax
    >>> from metaopt import transforms
    >>> half = transforms.mixture(
    ...     [optax.sgd(0.1), optax.sign_sgd(0.1)], jnp.array([0.5, 0.5])
    ... )
    >>> print(half.update(jnp.array([4.0, -1.0]), half.init(jnp.zeros(2)))[0])
    [-0.25  0.1 ]
    """
    transforms = list(transforms)  # a generator can be iterated only once
    members = [optax.with_extra_args_support(member) for member in transforms]
    weights = jax.tree.map(_as_vector, _prefixes.opened(weights), is_leaf=_is_list_of_numbers)
    for leaf in jax.tree.leaves(weights):
        if np.shape(leaf) != (len(members),):
            raise ValueError(
                f"`weights` must be an array of one weight for each of the {len(members)} transforms, or a tree of "
                f"such arrays; got a leaf of shape {np.shape(leaf)}."
            )

    def init(params):
        states = tuple(member.init(params) for member in members)
        if free := [k for k, state in enumerate(states) if _schedule_free.states(state)]:
            raise ValueError(
                f"`transforms` has the schedule-free optimizers {free}. They average parameters that move by their own "
                "updates, and here the parameters move by the mean of all updates. Wrap the mixture instead: "
                "`optax.contrib.schedule_free(mixture(...), rate)`."
            )
        return states

    def update(updates, state, params=None, **extra_args):
        results = []
        for k, (member, member_state) in enumerate(zip(members, state, strict=True)):
            idle = jnp.all(jnp.array([leaf[k] == 0 for leaf in jax.tree.leaves(weights)]))
            results.append(_update_apart(member, idle, (updates, member_state, params), extra_args))

        def mean(weights, *leaves):
            terms = [_weighted(jnp.asarray(w, u.dtype), u) for w, u in zip(weights, leaves, strict=True)]
            return sum(terms[1:], start=terms[0])

        full = _prefixes.spread(weights, updates)
        mixed = jax.tree.map(mean, full, *(u for u, _ in results))
        return mixed, tuple(s for _, s in results)

    return optax.GradientTransformationExtraArgs(init, update)


def _update_apart(member, idle, operands, extra_args):
    """A member's update. It passes no derivative on while the member is idle and not finite, since 0 · ∞ is NaN."""
    function = lambda operands: member.update(*operands, **extra_args)
    # The constants of the jaxpr are the hyperparameters and other arrays that the member closes over.
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(operands)
    arguments = (closed.consts, jax.tree.leaves(operands))
    evaluate = lambda arguments: eval_jaxpr(closed.jaxpr, arguments[0], *arguments[1])
    # The compiler merges this evaluation with the one below.
    outputs = filter(_trees.is_inexact, evaluate(jax.lax.stop_gradient(arguments)))
    is_excluded = idle & ~jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in outputs]))
    stop_if_excluded = lambda x: jnp.where(is_excluded, jax.lax.stop_gradient(x), x) if _trees.is_inexact(x) else x
    return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(jax.tree.map(stop_if_excluded, arguments)))


def _is_list_of_numbers(x) -> bool:
    return isinstance(x, list | tuple) and len(x) > 0 and all_leaves(x) and all(np.ndim(number) == 0 for number in x)


def _as_vector(weights):
    return jnp.stack([jnp.asarray(w) for w in weights]) if _is_list_of_numbers(weights) else weights
