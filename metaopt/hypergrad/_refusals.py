"""Finds where each leaf of λ enters a problem, and rejects leaves for which a rule would return a wrong zero."""

from collections.abc import Mapping

import jax

from metaopt import _jaxpr, base


def paths(hyperparams: base.HyperParams) -> list[str]:
    """The path of each leaf of λ, as in "['rate']"; "itself" if λ is one array."""
    return [jax.tree_util.keystr(path) or "itself" for path, _ in jax.tree_util.tree_leaves_with_path(hyperparams)]


def entering(
    problem: base.Problem, state: base.InnerState, hyperparams: base.HyperParams, task: base.Task, *places: str
) -> dict[str, bool]:
    """Reports which leaves of λ enter at least one of `places`.

    Args:
      problem: the problem that contains the places.
      state: a state of the inner loop; only its shapes matter.
      hyperparams: λ; only its shapes matter.
      task: a task; only its shapes matter.
      *places: any of "inner" (∇θ ℓ), "model_state" (the auxiliary output of the inner loss), "update", "outer" (f).

    Returns:
      For each leaf of λ, by path: whether the leaf enters one of the places.
    """
    loop = problem.loop

    def inner_grad(hyperparams, state, task):
        batch, context = loop.batch(state, task.train), loop.context(state)
        return jax.grad(loop.loss, has_aux=True)(loop.iterate(state), hyperparams, batch, context)[0]

    def model_state(hyperparams, state, task):
        return loop.loss(loop.iterate(state), hyperparams, loop.batch(state, task.train), loop.context(state))[1]

    def update(hyperparams, state, task):
        return loop.update(state, loop.iterate(state), loop.context(state).model_state, hyperparams)

    def outer_loss(hyperparams, state, task):
        batch = problem.outer_batch(jax.random.key(0), task)
        return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

    functions = {"inner": inner_grad, "model_state": model_state, "update": update, "outer": outer_loss}
    used = [_jaxpr.used_leaves(functions[place], hyperparams, state, task) for place in places]
    return {path: any(flags) for path, *flags in zip(paths(hyperparams), *used, strict=True)}


def refuse_unanswered(rule: str, is_answered: Mapping[str, bool], reason: str) -> None:
    """Rejects the leaves of λ whose hypergradient would be a wrong zero.

    Args:
      rule: the name of the rule, for the message.
      is_answered: for each leaf of λ, by path: whether the rule can estimate its hypergradient.
      reason: the end of the message: why the rule cannot estimate it, and what to use instead.

    Raises:
      ValueError: if a leaf is not answered.
    """
    refused = [path for path, answered in is_answered.items() if not answered]
    if refused:
        leaves = ", ".join(refused)
        raise ValueError(f"{rule} cannot estimate the hypergradient of the leaves {leaves} of λ: {reason}")
