"""The states of `optax.contrib.schedule_free` and `optax.inject_hyperparams` within a state of any optimizer.

A schedule-free state holds z. The gradient is taken at the parameters y, and the average is x = (y - (1 - b1) z) / b1.
Under `optax.masked` or `optax.partition`, z has `optax.MaskedNode` in place of the parameters that this optimizer does
not train.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt import base


def _is_state(x: Any) -> bool:
    return isinstance(x, optax.contrib.ScheduleFreeState)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def states(tree: base.PyTree) -> list[optax.contrib.ScheduleFreeState]:
    """Returns the schedule-free states in a tree.

    Args:
      tree: such as the state of an optimizer.

    Returns:
      The states, without those that are nested in another one.
    """
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(x)]


def average(state: optax.contrib.ScheduleFreeState, params: base.Params) -> base.Params:
    """Returns the average x for the parameters with a z in the state, and y for all other parameters.

    Args:
      state: a schedule-free state.
      params: y.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if z does not have the structure and the shapes of the parameters.
    """

    def leaf(z, y):
        if _is_masked(z):
            return y
        if not jax.tree_util.all_leaves([y]) or jnp.shape(z) != jnp.shape(y):
            raise ValueError("The shapes differ.")
        # In a batch of states, b1 has one entry for each state.
        b1 = jnp.expand_dims(state.b1, tuple(range(jnp.ndim(state.b1), jnp.ndim(z))))
        return ((y - (1.0 - b1) * z) / b1).astype(y.dtype)

    try:
        return jax.tree.map(leaf, state.z, params, is_leaf=_is_masked)
    except ValueError as error:
        raise ValueError(
            "The parameters of a schedule-free optimizer do not have the structure and the shapes of its state, so "
            "that their average is unknown. Wrap it only by transforms that keep the shapes (not by `optax.flatten`)."
        ) from error


def check_is_last(tree: base.PyTree) -> None:
    """Raises ValueError if a transform follows a schedule-free one in an `optax.chain`.

    The later transform would change the updates, and z would not include these changes. A masked member of a chain is
    not checked, because the members that follow it may be for other parameters.

    Args:
      tree: the state of an optimizer. The state of a chain is a plain tuple. The state of a named chain is an
        `OrderedDict`.
    """
    is_known = lambda x: _is_state(x) or isinstance(x, optax.MaskedState)
    members = list(tree.values()) if isinstance(tree, collections.OrderedDict) else tree
    if type(members) in (tuple, list) and any(map(_is_state, jax.tree.leaves(members[:-1], is_leaf=is_known))):
        raise ValueError(
            "`optax.contrib.schedule_free` must be the last transform of its `optax.chain`. A later transform changes "
            "the updates, and the average of the parameters would be wrong. Put it into the optimizer that "
            "`schedule_free` wraps. For groups of parameters, use `optax.partition`."
        )
    for child in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree):
        if child is not tree:
            check_is_last(child)


def _is_injected(x: Any) -> bool:
    return isinstance(x, optax.InjectStatefulHyperparamsState)


def keeps_hyperparams(tree: base.PyTree) -> bool:
    """Whether the state of an optimizer holds hyperparameters of its factory, which `refreshed` replaces."""
    has_hyperparams = lambda x: _is_state(x) or _is_injected(x)
    return any(map(has_hyperparams, jax.tree.leaves(tree, is_leaf=has_hyperparams)))


def refreshed(tree: base.PyTree, fresh: base.PyTree) -> base.PyTree:
    """Replaces the hyperparameters that optax keeps in a state: b1 of schedule-free, and injected hyperparameters.

    The state has their values for the λ with which it was made. λ may have changed since then.

    Args:
      tree: the state of an optimizer.
      fresh: a state that was made with the current hyperparameters.

    Returns:
      `tree` with the hyperparameters of `fresh`.
    """

    def replaced(x, new):
        if _is_injected(x):
            return x._replace(hyperparams=new.hyperparams, inner_state=refreshed(x.inner_state, new.inner_state))
        if _is_state(x):
            base_state = refreshed(x.base_optimizer_state, new.base_optimizer_state)
            return x._replace(b1=new.b1, base_optimizer_state=base_state)
        return x

    return jax.tree.map(replaced, tree, fresh, is_leaf=lambda x: _is_state(x) or _is_injected(x))


def shifted(tree: base.PyTree, shift: base.Params) -> base.PyTree:
    """Moves z in schedule-free states, so that the average moves as y does.

    Args:
      tree: the state of an optimizer, or a tree that contains it.
      shift: how far y moves.

    Returns:
      `tree` with z + `shift`.
    """
    move = lambda z, delta: z if _is_masked(z) else z + delta.astype(z.dtype)

    def moved(x):
        return x._replace(z=jax.tree.map(move, x.z, shift, is_leaf=_is_masked)) if _is_state(x) else x

    return jax.tree.map(moved, tree, is_leaf=_is_state)
