"""A change of coordinates is a change of the problem."""

from metaopt import base
from metaopt.spaces._tree import num_dims, to_constrained


def constrain(problem: base.Problem, space: base.PyTree) -> base.Problem:
    """The same problem in unconstrained coordinates: F̃(z) = F(λ(z)), with λ = `to_constrained(space, z)`.

    λ(z) is composed into the loop's `init`, `loss` and `update` and into `outer_loss`, the four functions that see λ.
    So every rule works in z: gradients obey the chain rule, dF̃/dz = (∂λ/∂z)ᵀ dF/dλ, and rules that perturb (evolution
    strategies, finite differences) never leave the range. Fixed leaves are None in z, without a gradient.

    Args:
      problem: in λ.
      space: a tree of leaves, structured like λ.

    Returns:
      A problem in z, which takes coordinates marked as `Unconstrained` and nothing else. `training.fit` and
      `methods.fine_tune` convert λ to z and back where they have `space`; elsewhere, `to_unconstrained(space, λ)` and
      `to_constrained(space, z)` do.

    Raises:
      ValueError: if the space has a leaf of another kind, or nothing to tune; at trace time, if it is given λ in
        natural units, or z does not fit the space.

    >>> import jax
    >>> from metaopt import base, spaces
    >>> loop = base.InnerLoop(
    ...     init=lambda key, hyperparams, data: data,
    ...     batch=lambda state, data: data,
    ...     loss=lambda params, hyperparams, batch, context: (hyperparams["rate"] * params, None),
    ...     update=lambda state, grads, model_state, hyperparams: state - hyperparams["rate"] * grads,
    ...     params=lambda state: state,
    ...     context=lambda state: base.Context(jax.random.key(0), 0),
    ... )
    >>> problem = base.Problem(loop, lambda params, hyperparams, batch, context: params, lambda key, task: task.valid)
    >>> problem = spaces.constrain(problem, {"rate": spaces.positive(0.5)})
    >>> float(problem.loop.update(1.0, 1.0, None, spaces.Unconstrained({"rate": 0.0})))
    0.5
    """
    if num_dims(space) == 0:
        raise ValueError(f"`space` must have a leaf that is tuned; got {space}.")
    return base.reparametrized(problem, lambda hyperparams, step: to_constrained(space, hyperparams))
