"""Hyperparameters with a different value in each window of training steps."""

from typing import Any

import jax
import jax.numpy as jnp

from metaopt import base


def piecewise(problem: base.Problem, windows: Any, *, num_steps: int) -> base.Problem:
    """Returns the same problem with a schedule for λ: one value for each of W equal windows of the T steps.

        λ_t = λ[⌊t W / T⌋],    t = 0..T−1

    The inner loss and the update of step t use λ_t. The initialization uses the first value. The outer loss uses the
    value of the inner step before it. Steps beyond T keep the last value.

    The hypergradient of an entry is a sum over its window, which averages noise over the window. It accounts for all
    steps up to the end of training, so it is not greedy. Any rule works: use `hypergrad.forward` if T is large, and
    `hypergrad.unrolled` if λ has many entries.

    Args:
      problem: a problem in λ.
      windows: W, at least 1; or a tree of such numbers, a prefix of λ, with 0 for a leaf that stays constant.
      num_steps: T, at least W.

    Returns:
      A problem whose λ has a leading axis of W on every leaf, except on leaves with W = 0.

    Raises:
      ValueError: if a W is negative or above T; at trace time, if a leaf of λ does not have this axis.

    Source: Micaelli & Storkey, NeurIPS 2021, https://arxiv.org/abs/2007.07869.

    >>> import jax, optax
    >>> from metaopt import inner
    >>> loop = inner.loop(
    ...     lambda params, hp, data: params,
    ...     lambda hp: optax.sgd(hp["rate"]),
    ...     init=lambda key, hp, data: 0.0,
    ... )
    >>> problem = inner.piecewise(
    ...     inner.problem(loop, lambda params, hp, data: params), 2, num_steps=6
    ... )
    >>> rates = {"rate": jax.numpy.array([0.5, 0.125])}
    >>> print(inner.run(problem.loop, num_steps=6)(jax.random.key(0), rates, None).params)
    -1.875
    """
    counts = jax.tree.leaves(windows)
    for count in counts:
        if not 0 <= count <= num_steps:
            raise ValueError(f"`windows` must be between 0 and `num_steps`, which is {num_steps}; got {count}.")

    def current(hyperparams, step):
        """λ_t, with t = step."""

        def value(path, leaf, count):
            if not count:
                return leaf
            if jnp.shape(leaf)[:1] != (count,):
                raise ValueError(
                    f"λ{jax.tree_util.keystr(path)} must have a leading axis of {count}, one value for each window; "
                    f"got shape {jnp.shape(leaf)}."
                )
            return jnp.asarray(leaf)[jnp.clip(step, 0, num_steps - 1) * count // num_steps]

        spread = jax.tree.map(lambda count, part: jax.tree.map(lambda _: count, part), windows, hyperparams)
        return jax.tree_util.tree_map_with_path(value, hyperparams, spread)

    return base.reparametrized(problem, current)
