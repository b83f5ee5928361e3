"""Finds out why a hypergradient goes wrong: one training run with diagnostic numbers, and advice."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base, inner, spaces


class Finding(NamedTuple):
    """One problem.

    Attributes:
      what: the problem, with its number.
      advice: what to change.
    """

    what: str
    advice: str


class Diagnosis(NamedTuple):
    """The result of `diagnose`; it prints as a report.

    Attributes:
      findings: the problems, the most serious first; empty if `diagnose` found none.
      growth: mean log growth of a perturbation of θ per step. Above 0, products of Jacobians explode.
      products: [T] log norm of the product of Jacobians up to each step, along a random direction.
      inner_loss: [T] the inner loss ℓ.
      inner_grad_norm: [T] ‖∇θ ℓ‖ on each step's batch.
    """

    findings: list[Finding]
    growth: float
    products: np.ndarray
    inner_loss: np.ndarray
    inner_grad_norm: np.ndarray

    def __str__(self) -> str:
        lines = [f"* {finding.what}\n  {finding.advice}" for finding in self.findings] or ["Nothing was found."]
        return "\n".join(lines)


def diagnose(
    problem: base.Problem,
    hyperparams: base.HyperParams,
    task: base.Task,
    *,
    num_steps: int,
    key: jax.Array | None = None,
    space: base.PyTree | None = None,
    estimator: base.Estimator | None = None,
    num_estimates: int = 5,
) -> Diagnosis:
    """Finds the cause of bad tuning: the training itself, its derivative, the linear solve, or λ.

    One training run carries a random perturbation δ of θ, with δ_{t+1} = (∂θ_{t+1}/∂θ_t) δ_t (forward mode, one pass).
    A hypergradient through training consists of products of these Jacobians, and δ shows their growth step by step. The
    perturbation starts only in θ, and is then carried through the optimizer's state too. Its norm is that of both.

    Args:
      problem: the problem to tune. Its inner loss must be differentiable in forward mode.
      hyperparams: λ in the form that the problem takes: natural units, or `spaces.Unconstrained` after
        `spaces.constrain`.
      task: one task.
      num_steps: T, at least 2.
      key: the PRNG key; fixed by default.
      space: the search space of λ. The report names leaves that are at a bound.
      estimator: a rule for this problem. Its residuals and hypergradients are checked too.
      num_estimates: the number of estimates of that rule at λ.

    Returns:
      A `Diagnosis`; print it.

    Raises:
      ValueError: if λ does not fit `space`, or the task has labels outside its classes.

    Source: Metz et al., ICML 2019, https://arxiv.org/abs/1810.10180, on chaos and on smaller steps as the remedy.
    """
    _checks.check_task_labels("task", task)
    key = jax.random.key(0) if key is None else key
    start_key, noise_key, estimator_key = jax.random.split(key, 3)
    run = jax.jit(lambda hyperparams: _perturbed_run(problem, hyperparams, task, start_key, noise_key, num_steps))
    steps, outer = jax.tree.map(np.asarray, run(hyperparams))
    bad = np.flatnonzero(~np.isfinite(steps.loss) | ~np.isfinite(steps.grad_norm))
    kept = steps.growth[: bad[0]] if bad.size else steps.growth
    # The perturbation needs some steps to turn into the direction that grows.
    settled = kept[len(kept) // 5 :]
    rate = float(np.mean(settled)) if settled.size else math.nan
    findings: list[Finding] = []
    if bad.size:
        findings.append(_divergence(int(bad[0]), num_steps))
    elif not np.isfinite(outer):
        findings.append(Finding("The outer loss is not finite after training.", "Look for log(0) or 0/0 in it."))
    findings += _findings_of_growth(kept, settled, rate, num_steps)
    if not bad.size:
        findings += _findings_of_loss(steps, num_steps)
    if space is not None:
        findings += _findings_of_bounds(space, hyperparams)
    if estimator is not None:
        findings += _findings_of_estimator(estimator, estimator_key, hyperparams, task, num_estimates)
    return Diagnosis(findings, rate, np.cumsum(steps.growth), steps.loss, steps.grad_norm)


class _Steps(NamedTuple):
    """The numbers of one training run, step by step.

    Attributes:
      loss: [T] the inner loss ℓ.
      grad_norm: [T] ‖∇θ ℓ‖.
      growth: [T] log growth of the perturbation.
    """

    loss: Any
    grad_norm: Any
    growth: Any


def _perturbed_run(
    problem: base.Problem,
    hyperparams: base.HyperParams,
    task: base.Task,
    start_key: jax.Array,
    noise_key: jax.Array,
    num_steps: int,
) -> tuple[_Steps, jax.Array]:
    """Trains once, with a perturbation of θ in forward mode. Returns the numbers of each step, and f at the end."""
    loop = problem.loop
    state = loop.init(start_key, hyperparams, task.train)
    leaves, structure = jax.tree.flatten(state)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def join(floats, state):
        floats = iter(floats)
        return structure.unflatten(
            [next(floats) if m else x for m, x in zip(moves, jax.tree.leaves(state), strict=True)]
        )

    def floats_of(state):
        return [x for m, x in zip(moves, jax.tree.leaves(state), strict=True) if m]

    # Only θ is perturbed; optimizer states follow. `params` of a state of indices gives the places of θ.
    is_param = set(jax.tree.leaves(loop.params(structure.unflatten(list(range(len(leaves)))))))
    noise = [
        jax.random.normal(jax.random.fold_in(noise_key, i), x.shape, x.dtype) if i in is_param else jnp.zeros_like(x)
        for i, x in enumerate(leaves)
        if moves[i]
    ]
    noise = jax.tree.map(lambda n: n / optax.tree.norm(noise), noise)

    def step(carry, _):
        state, delta = carry
        context, batch = loop.context(state), loop.batch(state, task.train)
        value, grads = jax.value_and_grad(loop.loss, has_aux=True)(loop.params(state), hyperparams, batch, context)

        def advance(floats):
            new = inner.step(loop, join(floats, state), hyperparams, task.train)
            return floats_of(new), new

        _, delta, new = jax.jvp(advance, (floats_of(state),), (delta,), has_aux=True)
        size = optax.tree.norm(delta)
        delta = jax.tree.map(lambda d: d / jnp.where(size > 0, size, 1), delta)
        return (new, delta), _Steps(value[0], optax.tree.norm(grads), jnp.log(size))

    (state, _), steps = jax.lax.scan(step, (state, noise), length=num_steps)
    batch = problem.outer_batch(start_key, task)
    return steps, problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))


def _divergence(first: int, num_steps: int) -> Finding:
    """The finding of a run whose inner loss or gradient is not finite from step `first` on."""
    what = f"the inner loss or its gradient is not finite from step {first} of {num_steps} on."
    if first == 0:
        advice = "Look for labels that are not among the classes of the loss, NaN in the data, and log(0) or 0/0."
        return Finding(f"Before any step, {what}", advice)
    return Finding(f"Training diverges: {what}", "Start at a smaller rate, bound it by the space, or clip gradients.")


def _findings_of_growth(kept: np.ndarray, settled: np.ndarray, rate: float, num_steps: int) -> list[Finding]:
    """Problems with the derivative of training, from the log growth of the perturbation at each step."""
    if rate * num_steps > math.log(1e3):
        return [
            Finding(
                f"Products of Jacobians explode: a perturbation of θ grows by exp({rate:.3f}) a step, and by "
                f"exp({rate * num_steps:.0f}) over {num_steps}: training is chaotic, and its hypergradient is noise.",
                "Use a smaller inner rate. Or use fewer steps, `truncated`, `persistent_es`, or clipping per task "
                "(`over_tasks(max_norm=...)`).",
            )
        ]
    if float(np.max(settled, initial=-math.inf)) > math.log(3):
        worst = len(kept) - len(settled) + int(np.argmax(settled))
        return [
            Finding(
                f"The step is chaotic in places: at step {worst} a perturbation grows by {math.exp(kept[worst]):.1f}.",
                "Clip gradients in the optimizer, or warm the rate up.",
            )
        ]
    return []


def _findings_of_loss(steps: _Steps, num_steps: int) -> list[Finding]:
    """Problems with training itself, from a finite inner loss at each step."""
    loss, tenth = steps.loss, max(1, num_steps // 10)
    before, after, first = loss[-2 * tenth : -tenth].mean(), loss[-tenth:].mean(), loss[:tenth].mean()
    if after >= first:
        return [
            Finding(
                f"The inner loss does not fall: {first:.4g} at first, {after:.4g} at the end.",
                "The rate is too small or too large for this many steps.",
            )
        ]
    # Smaller differences of the loss are rounding errors, and their shares have no meaning.
    rounding = 100 * np.finfo(loss.dtype).eps * abs(first)
    if num_steps >= 20 and before - after > max(0.05 * (first - after), rounding):
        return [
            Finding(
                "The inner loop has not converged: the last tenth of the steps still lowered ℓ by "
                f"{before - after:.3g} of {first - after:.3g} in all; ‖∇θ ℓ‖ = {steps.grad_norm[-1]:.3g}.",
                "An implicit rule is biased here: train longer, or take `unrolled`, which needs no convergence.",
            )
        ]
    return []


def _findings_of_bounds(space: base.PyTree, hyperparams: base.HyperParams) -> list[Finding]:
    """Leaves of λ that are at a bound of their range."""
    is_unconstrained = isinstance(hyperparams, spaces.Unconstrained)
    natural = spaces.to_constrained(space, hyperparams) if is_unconstrained else hyperparams
    return [
        Finding(
            f"λ{jax.tree_util.keystr(path)} is at a bound of its range ({int(np.sum(leaf))} entries).",
            "Widen the range, or fix the leaf.",
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(spaces.at_bounds(space, natural))
        if np.any(leaf)
    ]


def _findings_of_estimator(estimator, key, hyperparams, task, num_estimates) -> list[Finding]:
    """Problems that an estimator's own numbers reveal."""

    def again(state, _):
        estimate, state = estimator.estimate(hyperparams, task, state)
        return state, estimate

    run = jax.jit(lambda state: jax.lax.scan(again, state, length=num_estimates)[1])
    estimates = jax.tree.map(np.asarray, run(estimator.init(key, hyperparams, task)))
    findings = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(estimates.hypergrad):
        name = f"λ{jax.tree_util.keystr(path)}"
        if not np.isfinite(leaf).all():
            findings.append(
                Finding(
                    f"The hypergradient of {name} is not finite.",
                    "Look at the finding on training above; a NaN in the loss at zero (√0, 0/0) has this effect too.",
                )
            )
        elif not leaf.any():
            findings.append(
                Finding(
                    f"The hypergradient of {name} is zero in {num_estimates} estimates.",
                    "Is it used? `hypergrad.check` reports whether the outer loss depends on it.",
                )
            )
    last = {name: values[-1] for name, values in estimates.metrics.items() if values.ndim == 1}
    findings += [Finding(sentence, _checks.REST_ADVICE) for sentence in _checks.far_from_rest(last)]
    for name, values in estimates.metrics.items():
        if not name.endswith("residual"):
            continue
        # `partition` puts a label before the names of its rules' metrics. Only rules with "outer_grad_norm" are judged.
        prefix, residual = name[: name.rfind("/") + 1], float(values[-1])
        scale = float(estimates.metrics.get(f"{prefix}outer_grad_norm", [np.inf])[-1])
        if not residual <= 0.1 * scale:
            findings.append(
                Finding(
                    f"The linear solve is not done: {name} = {residual:.3g} of {scale:.3g} after {num_estimates} "
                    "estimates.",
                    "More solver steps, a warm start, damping, or (Neumann, adjoint steps) a rate below 2 / λmax.",
                )
            )
    return findings
