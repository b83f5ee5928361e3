"""Finds out why a hypergradient goes wrong: one training run with diagnostic numbers, and advice."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, _explained, base, spaces
from metaopt._progress import Report, report_progress
from metaopt.hypergrad._perturbed_run import Steps, has_gradient, perturbed_run

MAX_LEAVES = 8  # of λ, each of which takes two more training runs at most
FACTOR = 10.0  # how much a leaf of λ changes in such a run
_NO_DERIVATIVE = (
    "Look for a function without a finite derivative: √x or a norm at 0, or a division in the unused branch of "
    "`jnp.where`. Or a number is too large for its type."
)
_MORE = " Hypergradients were not checked: pass `estimator`."


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
      checked: the checks that `diagnose` made, in words.
    """

    findings: list[Finding]
    growth: float
    products: np.ndarray
    inner_loss: np.ndarray
    inner_grad_norm: np.ndarray
    checked: list[str]

    def __str__(self) -> str:
        lines = [f"* {finding.what}\n  {finding.advice}" for finding in self.findings]
        more = "" if any("hypergradients" in name for name in self.checked) else _MORE
        return "\n".join(lines or [f"No problem was found. Checked: {'; '.join(self.checked)}.{more}"])


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
    perturbation starts only in θ, and is then carried through the optimizer's state too. Its norm covers both.

    If training diverges, its derivative explodes or its loss does not fall, `diagnose` trains again with each positive
    leaf of λ at a tenth and at ten times its value, within the space. It names the leaves whose change repairs the run,
    or reports that none does. If both changes of a leaf repair the run, it names the one with the lower outer loss. If
    it names several leaves, the first one repairs the run best: its outer loss is the lowest. If the loss is flat, the
    noise of batches can make a change look like a repair. A larger weight decay can hide a rate that is too large. The
    search takes up to two more runs for each leaf, without another compilation. `diagnose` skips it if there are more
    than 8 such leaves.

    Args:
      problem: the problem to tune. Its inner loss must be differentiable in forward mode.
      hyperparams: λ in the form that the problem takes: natural units, or `spaces.Unconstrained` after
        `spaces.constrain` (`spaces.to_unconstrained(space, λ)`).
      task: one task.
      num_steps: T, at least 2.
      key: the PRNG key; fixed by default.
      space: the search space of λ. The report names leaves that are at a bound. For λ in unconstrained coordinates,
        `diagnose` tries other values of λ only if `space` is given.
      estimator: a rule for this problem. Its residuals and hypergradients are checked too.
      num_estimates: the number of estimates of that rule at λ.

    Returns:
      A `Diagnosis`. `print` shows its `findings`, the most serious first: each has `what` (the problem) and `advice`
      (what to change). It also has `growth`, the mean log growth of a perturbation of θ per step, and three arrays over
      the steps, [T]: `products`, `inner_loss` and `inner_grad_norm`. `checked` lists the checks, also those without a
      finding.

    Raises:
      ValueError: if `problem` is not a `base.Problem`, `num_steps < 2`, `key` is not a random key, λ does not fit
        `space`, or the task is a dict or has labels outside its classes.

    Source: Metz et al., ICML 2019, https://arxiv.org/abs/1810.10180, on chaos and on smaller steps as the remedy.
    """
    _checks.check_problem(problem)
    _checks.check_integer("num_steps", num_steps, 2)  # the loss of one step cannot fall
    _checks.check_task_labels("task", task)
    key = jax.random.key(0) if key is None else _checks.checked_key(key)
    start_key, noise_key, estimator_key = jax.random.split(key, 3)

    def perturbed(hyperparams):
        return perturbed_run(problem, hyperparams, task, start_key, noise_key, num_steps, with_slopes)

    with report_progress(1 + (estimator is not None), None, unit="part") as report:
        with report.compiling("the training run with a perturbation"), _explained.tasks(task):
            with_slopes = has_gradient(problem, hyperparams, task, start_key)
            compiled = jax.jit(perturbed).lower(hyperparams).compile()
        run = lambda hyperparams: _judged(*jax.tree.map(np.asarray, compiled(hyperparams)))
        with report.during("training with a perturbation"):
            judged = run(hyperparams)
        findings = _findings_of_run(judged, num_steps)
        if not _is_sound(judged, num_steps):
            findings += _findings_of_leaves(run, hyperparams, space, num_steps, report)
        report(1)
        if space is not None:
            findings += _findings_of_bounds(space, hyperparams)
        if estimator is not None:
            findings += _findings_of_estimator(estimator, estimator_key, hyperparams, task, num_estimates, report)
            report(2)
    steps = judged.steps
    checked = [f"the losses and gradients of {num_steps} steps"]
    checked += [f"the outer loss at the end{' and its gradients' if with_slopes else ''}"]
    checked += ["the growth of a perturbation of θ"]
    checked += ["the bounds of λ"] if space is not None else []
    checked += [f"{num_estimates} hypergradients of the rule"] if estimator is not None else []
    return Diagnosis(findings, judged.rate, np.cumsum(steps.growth), steps.loss, steps.grad_norm, checked)


class _Judged(NamedTuple):
    """A training run with the numbers that judge it.

    Attributes:
      steps: the numbers of each step.
      outer: the outer loss f at the end.
      slopes: whether ∂f/∂θ and ∂f/∂λ are finite at the end.
      first_bad: the first step whose loss or gradient is not finite, or None.
      kept: [t] the growth before that step.
      settled: [t'] the last four fifths of `kept`. Before them, the perturbation turns into the direction that grows.
      rate: the mean of `settled`; NaN if it is empty.
    """

    steps: Steps
    outer: Any
    slopes: tuple[Any, Any]
    first_bad: int | None
    kept: np.ndarray
    settled: np.ndarray
    rate: float


def _judged(steps: Steps, outer: Any, slopes: tuple[Any, Any]) -> _Judged:
    bad = np.flatnonzero(~np.isfinite(steps.loss) | ~np.isfinite(steps.grad_norm))
    kept = steps.growth[: bad[0]] if bad.size else steps.growth
    settled = kept[len(kept) // 5 :]
    rate = float(np.mean(settled)) if settled.size else math.nan
    return _Judged(steps, outer, slopes, int(bad[0]) if bad.size else None, kept, settled, rate)


def _explodes(judged: _Judged, num_steps: int) -> bool:
    return judged.rate * num_steps > math.log(1e3)


def _falls(judged: _Judged, num_steps: int) -> bool:
    """Whether the inner loss is lower in the last tenth of the steps than in the first tenth."""
    loss, tenth = judged.steps.loss, max(1, num_steps // 10)
    return bool(loss[-tenth:].mean() < loss[:tenth].mean())


def _is_sound(judged: _Judged, num_steps: int) -> bool:
    """Whether a run is finite, its derivative does not explode, and its inner loss falls."""
    is_finite = judged.first_bad is None and bool(np.isfinite(judged.outer))
    return is_finite and not _explodes(judged, num_steps) and _falls(judged, num_steps)


def _is_repaired(judged: _Judged, num_steps: int) -> bool:
    """Whether a run is sound, and its derivatives are finite."""
    return _is_sound(judged, num_steps) and all(judged.slopes) and not _lost(judged.kept).size


def _lost(growth: np.ndarray) -> np.ndarray:
    """The steps after which the perturbation is not finite. A growth of −∞ is that of a perturbation that ends."""
    return np.flatnonzero(np.isnan(growth) | np.isposinf(growth))


def _divergence(steps: Steps, first: int, num_steps: int) -> Finding:
    """The finding of a run whose inner loss or gradient is not finite from step `first` on."""
    when = f"From step {first} of {num_steps} on" if first else "Before any step"
    if np.isfinite(steps.loss[first]):
        return Finding(
            f"{when}, the inner loss is finite, but its gradient is not.",
            _NO_DERIVATIVE,
        )
    if first == 0:
        advice = "Look for labels that are not among the classes of the loss, NaN in the data, and log(0) or 0/0."
        return Finding(f"{when}, the inner loss is not finite.", advice)
    advice = "Start at a smaller rate, bound it by the space, or clip gradients in the optimizer."
    return Finding(f"Training diverges. {when}, the inner loss is not finite.", advice)


def _findings_of_run(judged: _Judged, num_steps: int) -> list[Finding]:
    """Problems with training and its derivative."""
    findings = []
    if judged.first_bad is not None:
        findings.append(_divergence(judged.steps, judged.first_bad, num_steps))
    elif not np.isfinite(judged.outer):
        findings.append(Finding("The outer loss is not finite after training.", "Look for log(0) or 0/0 in it."))
    else:
        for name, slope in zip(("θ", "λ"), judged.slopes, strict=True):
            if not slope:
                fault = f"The outer loss is finite after training, but its gradient with respect to {name} is not."
                findings.append(Finding(fault, _NO_DERIVATIVE))
    findings += _findings_of_growth(judged, num_steps)
    if judged.first_bad is None:
        findings += _findings_of_loss(judged, num_steps)
    return findings


def _findings_of_growth(judged: _Judged, num_steps: int) -> list[Finding]:
    """Problems with the derivative of training, from the log growth of the perturbation at each step."""
    kept, settled, rate = judged.kept, judged.settled, judged.rate
    if (bad := _lost(kept)).size:
        fault = f"From step {bad[0]} of {num_steps} on, the derivative of the step with respect to θ is not finite."
        return [Finding(fault, f"The gradient of the inner loss is finite, but not its derivative. {_NO_DERIVATIVE}")]
    if _explodes(judged, num_steps):
        return [
            Finding(
                f"Products of Jacobians explode: a perturbation of θ grows by exp({rate:.3f}) a step, and by "
                f"exp({rate * num_steps:.0f}) over {num_steps}: training is chaotic, and its hypergradient is noise.",
                "Use a smaller inner rate. Or use fewer steps, `truncated`, clipping per task "
                "(`over_tasks(max_norm=...)`), or `persistent_es`, whose F is the mean of f over all steps.",
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


def _findings_of_loss(judged: _Judged, num_steps: int) -> list[Finding]:
    """Problems with training itself, from a finite inner loss at each step."""
    steps, tenth = judged.steps, max(1, num_steps // 10)
    loss = steps.loss
    before, after, first = loss[-2 * tenth : -tenth].mean(), loss[-tenth:].mean(), loss[:tenth].mean()
    if after >= first:
        is_too_large = _explodes(judged, num_steps) or after > 2 * first
        direction = "large" if is_too_large else "small or too large"
        fault = f"The inner loss does not fall: {first:.4g} at first, {after:.4g} at the end."
        return [Finding(fault, f"The rate is too {direction} for this many steps.")]
    # Differences of the loss below this bound are rounding errors.
    rounding = 100 * float(jnp.finfo(loss.dtype).eps) * abs(first)
    if num_steps >= 20 and before - after > max(0.05 * (first - after), rounding):
        return [
            Finding(
                "The inner loop has not converged: the last tenth of the steps lowered ℓ by "
                f"{before - after:.3g}, out of {first - after:.3g} in total; ‖∇θ ℓ‖ = {steps.grad_norm[-1]:.3g}.",
                "An implicit rule is biased here: train longer, or take `unrolled`, which needs no convergence.",
            )
        ]
    return []


def _findings_of_leaves(
    run: Callable, hyperparams: base.HyperParams, space: base.PyTree | None, num_steps: int, report: Report
) -> list[Finding]:
    """Findings on leaves of λ for which another value repairs the run, or one finding that no leaf does."""
    is_unconstrained = isinstance(hyperparams, spaces.Unconstrained)
    if is_unconstrained and space is None:
        return [Finding("No other λ was tried: its space is unknown.", "Pass `space`.")]
    in_natural_units = spaces.to_constrained(space, hyperparams) if is_unconstrained else hyperparams
    leaves, structure = jax.tree_util.tree_flatten_with_path(in_natural_units)
    positive = [i for i, (_, leaf) in enumerate(leaves) if _is_positive(leaf)]
    repairs, tried = [], []
    for i in positive if len(positive) <= MAX_LEAVES else []:
        name, findings_by_loss = f"λ{jax.tree_util.keystr(leaves[i][0])}", {}
        for factor, amount in ((1 / FACTOR, "a tenth of"), (FACTOR, "ten times")):
            changed = [leaf * factor if k == i else leaf for k, (_, leaf) in enumerate(leaves)]
            changed = structure.unflatten(changed)
            try:
                coordinates = None if space is None else spaces.to_unconstrained(space, changed)
            except ValueError:  # outside of the space
                continue
            with report.during(f"training with {amount} {name}"):
                judged = run(_like(coordinates if is_unconstrained else changed, hyperparams))
            tried.append(f"{amount} {name}")
            if _is_repaired(judged, num_steps):
                fault = (
                    f"{name} is likely the cause: with {amount} its value, training is finite and the inner loss falls."
                )
                finding = Finding(fault, f"Start {name} at a {'smaller' if factor < 1 else 'larger'} value.")
                findings_by_loss[float(judged.outer)] = finding
        # Both changes may repair a run: a loss that is flat except for the noise of batches also falls by chance.
        repairs += [min(findings_by_loss.items())] if findings_by_loss else []
    findings = [finding for _, finding in sorted(repairs)]  # first the leaf whose change gives the lowest outer loss
    return findings or [_no_remedy(len(positive), tried)]


def _no_remedy(num_positive: int, tried: list[str]) -> Finding:
    if tried:
        advice = "Change several leaves, or one by more than a factor of ten. Or look at the data and the losses."
        return Finding(f"No change of one leaf of λ repairs the run. Tried: {', '.join(tried)}.", advice)
    if num_positive > MAX_LEAVES:
        fault = f"λ has {num_positive} positive leaves, and `diagnose` tries at most {MAX_LEAVES}."
    elif num_positive:
        fault = "a tenth and ten times the value of each positive leaf are outside the space."
    else:
        fault = "no leaf is positive."
    return Finding(f"No other λ was tried: {fault}", "Try others by hand, or look at the data and the losses.")


def _is_positive(leaf: Any) -> bool:
    return _is_float(leaf) and bool(jnp.size(leaf)) and bool((np.asarray(leaf) > 0).all())


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _like(tree: base.PyTree, reference: base.PyTree) -> base.PyTree:
    """`tree` with the types of the leaves of `reference`, as a compiled program needs them."""
    cast = lambda x, like: np.asarray(x, jnp.result_type(like)) if _is_float(like) else like  # such as a PRNG key
    return jax.tree.map(cast, tree, reference)


def _findings_of_bounds(space: base.PyTree, hyperparams: base.HyperParams) -> list[Finding]:
    """Leaves of λ that are at a bound of their range."""
    is_unconstrained = isinstance(hyperparams, spaces.Unconstrained)
    in_natural_units = spaces.to_constrained(space, hyperparams) if is_unconstrained else hyperparams
    return [
        Finding(
            f"λ{jax.tree_util.keystr(path)} is at a bound of its range ({int(np.sum(leaf))} entries).",
            "Widen the range, or fix the leaf.",
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(spaces.at_bounds(space, in_natural_units))
        if np.any(leaf)
    ]


def _findings_of_estimator(estimator, key, hyperparams, task, num_estimates, report: Report) -> list[Finding]:
    """Problems that the hypergradients and metrics of an estimator reveal."""

    def next_estimate(state, _):
        estimate, state = estimator.estimate(hyperparams, task, state)
        return state, estimate

    start = estimator.init(key, hyperparams, task)
    with report.compiling(f"{num_estimates} estimates"):
        run = jax.jit(lambda state: jax.lax.scan(next_estimate, state, length=num_estimates)[1]).lower(start).compile()
    with report.during(f"{num_estimates} estimates"):
        estimates = jax.tree.map(np.asarray, run(start))
    findings = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(estimates.hypergrad):
        name = f"λ{jax.tree_util.keystr(path)}"
        if not np.isfinite(leaf).all():
            findings.append(
                Finding(
                    f"The hypergradient of {name} is not finite.",
                    "See the finding on training above, if there is one. A derivative that is NaN at zero (√0, 0/0) "
                    "has this effect too.",
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
                    f"The linear solve has not converged: {name} = {residual:.3g} of {scale:.3g} after "
                    f"{num_estimates} estimates.",
                    "Use more solver steps, a warm start, damping, or (Neumann, adjoint steps) a rate below 2 / λmax.",
                )
            )
    return findings
