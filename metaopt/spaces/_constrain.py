"""Changes the coordinates of a problem from λ to the unconstrained z."""

from metaopt import base
from metaopt.spaces._tree import num_dims, to_constrained


def constrain(problem: base.Problem, space: base.PyTree) -> base.Problem:
    """Returns the same problem in unconstrained coordinates: F̃(z) = F(λ(z)), with λ = `to_constrained(space, z)`.

    λ(z) is composed into the four functions that take λ: the loop's `init`, `loss` and `update`, and `outer_loss`.
    Every rule therefore works in z. Gradients obey the chain rule, dF̃/dz = (∂λ/∂z)ᵀ dF/dλ. Rules that perturb
    (evolution strategies, finite differences) never leave the range. Fixed leaves are None in z, without a gradient.

    Args:
      problem: a problem in λ.
      space: a tree of leaves, structured like λ.

    Returns:
      A problem in z, which accepts only coordinates marked as `Unconstrained`. `training.fit` and `training.fine_tune`
      convert λ to z and back if they have `space`. Elsewhere, use `to_unconstrained(space, λ)` and
      `to_constrained(space, z)`.

    Raises:
      ValueError: if the space has a leaf of another kind, or has no leaf to tune.
      ValueError: at trace time, if the problem gets λ in natural units, or z does not fit the space; if
        `training.fit` or `training.fine_tune` has another `space`.

    >>> import jax, optax
    >>> from metaopt import inner, spaces
    >>> loss = lambda params, hp, batch: (params - batch) ** 2
    >>> loop = inner.loop(
    ...     loss, lambda hp: optax.sgd(hp["rate"]), init=lambda key, hp, data: 0.0
    ... )
    >>> space = {"rate": spaces.positive(0.25)}
    >>> problem = spaces.constrain(inner.problem(loop, loss), space)
    >>> z = spaces.to_unconstrained(space, {"rate": 0.5})
    >>> state = inner.run(problem.loop, num_steps=1)(jax.random.key(0), z, 1.0)
    >>> round(float(state.params), 3)  # one step at the rate 0.5 reaches the minimum
    1.0
    """
    if num_dims(space) == 0:
        raise ValueError(f"`space` must have at least one leaf that is tuned; got {space}.")
    return base.reparametrized(problem, lambda hyperparams, step: to_constrained(space, hyperparams))
