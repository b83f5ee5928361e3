"""Checks a hypergradient against finite differences of F in float64, on the user's own problem.

No derivative is trusted here. F is only evaluated, at λ + t d for several t, with the estimator's own randomness held
fixed. The slope of F is then compared with the slope of the hypergradient along d.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, _explained, _jaxpr, base
from metaopt._progress import report_progress
from metaopt.hypergrad import _check_report, _slopes
from metaopt.hypergrad._check_report import Check, LeafCheck

_ROUNDED_ZERO = 1e-6  # smaller entries are zeros up to float32 rounding, such as 2.4e-7
# The relative rounding error of F, and the smallest `epsilon` and `rtol` that go with it.
_NOISE_FLOAT64, _NOISE_FLOAT32 = 1e-14, 1e-6
_EPSILON_FLOAT32, _RTOL_FLOAT32 = 1e-2, 1e-2
# F is flat if a step of one unit changes F by less than this fraction. Only slopes that are not known to `rtol` use it.
_FLAT = 1e-8


def check(
    estimator: base.Estimator,
    hyperparams: base.HyperParams,
    task: base.Task,
    *,
    key: jax.Array | None = None,
    num_directions: int = 8,
    epsilon: float = 1e-4,
    radius: float = 0.1,
    rtol: float = 1e-3,
    num_estimates: int = 20,
    num_samples: int = 64,
) -> Check:
    """Compares an estimator with finite differences of F in float64, on the given problem.

    The hypergradient is computed once, at λ. At all other points, only F is evaluated. Both run in float64, whatever
    the problem's types: the check traces its functions, and replaces every narrower floating-point type in them.
    Operations for which that is impossible (callbacks, foreign kernels) are listed in `float32_operations`. In that
    case ε and `rtol` are at least 1e-2.

    In each leaf, the check compares slopes along a direction. The slope of F comes from differences at the distances ε,
    ε/2 and ε/4, combined so that its error is O(ε⁴). The uncertainty of this slope is how much the three differences
    disagree, or the jump between the slopes to the left and right of λ if that is larger, plus rounding. If the
    uncertainty is too large, the check tries other distances and another direction. It tries smaller distances (down to
    1e-5 ε), since F may have a kink nearby, and larger ones (up to 1e3 ε), since rounding may hide the slope. A leaf is

    - "right" if the slope of F is known to `rtol`, and the hypergradient agrees to `rtol`;
    - "wrong" if they disagree by more than `rtol` and the uncertainty together;
    - "zero" if the hypergradient is zero up to rounding, and F is flat;
    - "dead" if the hypergradient is zero, and F is not flat;
    - "inconclusive" if none of these holds.

    F may also have jumps. If jumps make up most of the change of F over `radius`, the message says so. A right
    hypergradient is then of little use, since it ignores the jumps. If the hypergradient is zero, the leaf is dead.

    The meaning of F, and the condition to pass, depend on the estimator's kind:

    - "exact": F is the estimate's value from the state after `init`. Every leaf must be right or zero.
    - "biased": F(λ) is the value of the last estimate of a run at constant λ. The run ends when it is `done`, or after
      `num_estimates`. The hypergradient must point uphill (cosine > 0), and no leaf may be dead. The errors of the
      leaves show the size of the bias. If the rule is exact in a limit, check it there as an exact rule:
      `check(estimator._replace(kind="exact"), ...)`. If the rule draws perturbations of λ (it has the metric
      "sampling_variance"), F and the hypergradient are means over `num_samples` runs with different keys. If the
      direction of this mean is not clear within 3 standard errors, the check is inconclusive.
    - "unbiased": the check takes the mean over the estimates of such a run, and over `num_samples` runs with different
      keys. It compares the slope of this mean hypergradient with the slope of the mean value, for the same keys. Slopes
      must agree within 3 standard errors (or `rtol`). A leaf whose 3 standard errors exceed its slope is inconclusive.
    - "pseudo": the hypergradient must be finite. The cosine is reported.

    Args:
      estimator: any estimator, including wrappers.
      hyperparams: λ, the point of the check.
      task: a task, or another value that the estimator accepts as its task.
      key: the PRNG key; fixed by default.
      num_directions: random directions in the whole of λ, for cosine and metasmoothness; at least 1.
      epsilon: ε, the first distance, in units of each leaf's largest entry (in units of 1 if that is below 1e-6).
      radius: the distance for metasmoothness, in the same units; about one outer step.
      rtol: the largest relative error that passes.
      num_estimates: the maximum number of estimates in one run of a "biased" or "unbiased" rule; at least 1.
      num_samples: the number of runs of a rule with random estimates; at least 2.

    Returns:
      A `Check`. `print` shows it as a table. Its `verdict` is "passed", "failed" or "inconclusive", and `passed` is
      true only for the first. It also has `leaves` with the slopes of each leaf of λ, `cosine`, `metasmoothness`, and a
      `message` with the conclusions.

    Raises:
      ValueError: if a number of directions, estimates or samples is too small.

    Source: metasmoothness follows Engstrom et al., 2025, https://arxiv.org/abs/2503.13751.
    """
    counts = (
        ("num_directions", num_directions, 1),
        ("num_estimates", num_estimates, 1),
        ("num_samples", num_samples, 2),
    )
    for name, count, least in counts:
        _checks.check_integer(name, count, least)
    options = {"num_estimates": num_estimates, "num_samples": num_samples, "epsilon": epsilon, "rtol": rtol}
    point = evaluated(estimator, hyperparams, task, key=key, **options)
    return compared(estimator.kind, point, num_directions, radius)


def is_random(kind: str, metrics: Mapping[str, Any]) -> bool:
    """Returns whether a rule's estimates are random: it is "unbiased", or it has the metric "sampling_variance".

    Under `partition` the name of the metric has a prefix, such as "es/sampling_variance".
    """
    return kind == "unbiased" or any(name.rpartition("/")[2] == "sampling_variance" for name in metrics)


class Point(NamedTuple):
    """F near λ, and its hypergradients at λ.

    Attributes:
      mean_value: a function from the leaves of λ to F, the mean over the keys.
      paths: the path of each leaf of λ.
      center: the leaves of λ.
      units: the unit of each leaf's steps.
      value: F(λ).
      grads: the leaves of the hypergradients, [K, ...], one for each key.
      float32_operations: the operations that stay in float32.
      noise: the relative rounding error of F.
      epsilon: the first step, in units.
      rtol: the largest relative error that passes.
    """

    mean_value: Callable[[list[np.ndarray]], float]
    paths: list[str]
    center: list[np.ndarray]
    units: list[float]
    value: float
    grads: list[np.ndarray]
    float32_operations: list[str]
    noise: float
    epsilon: float
    rtol: float


def evaluated(
    estimator: base.Estimator,
    hyperparams: base.HyperParams,
    task: base.Task,
    *,
    key: jax.Array | None = None,
    num_estimates: int,
    num_samples: int,
    epsilon: float,
    rtol: float,
) -> Point:
    """Computes the hypergradients at λ in float64, once, and prepares F as a function of λ; see `check`."""
    key = jax.random.key(0) if key is None else _checks.checked_key(key)
    with _explained.tasks(task):
        state = estimator.init(key, hyperparams, task)
    metrics = (
        {} if estimator.kind == "exact" else jax.eval_shape(estimator.estimate, hyperparams, task, state)[0].metrics
    )
    keys = jax.random.split(key, num_samples if is_random(estimator.kind, metrics) else 1)
    samples, args = _samples(estimator, num_estimates), (task, state, keys)
    leaves, structure = jax.tree.flatten(hyperparams)
    center = [np.asarray(leaf, np.float64) for leaf in leaves]
    both, float32_operations = _jaxpr.in_float64(samples, hyperparams, *args)
    only_values, _ = _jaxpr.in_float64(lambda *args: samples(*args)[0], hyperparams, *args)
    gradient_fn, value_fn = jax.jit(lambda *args: both(*args)[1]), jax.jit(only_values)

    def mean_value(leaves):
        with jax.enable_x64(True), np.errstate(invalid="ignore", over="ignore"):
            return float(np.mean(value_fn(structure.unflatten(leaves), *args)))

    with report_progress(None, None) as report, report.compiling("the hypergradient"), jax.enable_x64(True):
        grads = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient_fn(structure.unflatten(center), *args))]
    with report_progress(None, None) as report, report.compiling("the outer loss"):
        value = mean_value(center)
    noise = _NOISE_FLOAT64
    if float32_operations:
        noise, epsilon, rtol = _NOISE_FLOAT32, max(epsilon, _EPSILON_FLOAT32), max(rtol, _RTOL_FLOAT32)
    paths = [jax.tree_util.keystr(path) or "λ" for path, _ in jax.tree_util.tree_leaves_with_path(hyperparams)]
    units = [_unit(x) for x in center]
    return Point(mean_value, paths, center, units, value, grads, sorted(float32_operations), noise, epsilon, rtol)


def compared(kind: str, point: Point, num_directions: int, radius: float) -> Check:
    """The result of `check`, from the hypergradients at λ and the values of F next to it."""
    rng = np.random.default_rng(0)
    with np.errstate(invalid="ignore", over="ignore"):
        leaves = [_check_leaf(point, rng, i, radius) for i in range(len(point.center))]
        cosine, uphill, metasmoothness = _check_directions(point, rng, num_directions, radius)
    verdict = _check_report.verdict(kind, leaves, uphill)
    message = _check_report.advice(kind, leaves, uphill, metasmoothness, point.float32_operations, point.rtol)
    return Check(kind, verdict, point.value, leaves, cosine, metasmoothness, point.float32_operations, message)


def _samples(estimator: base.Estimator, num_estimates: int) -> Callable:
    """`(λ, task, state, keys [K]) -> (F [K], hypergradients [K, ...])`, one entry for each key."""

    def whole_run(hyperparams, task, key):
        def step(carry, _):
            state, ended = carry
            estimate, state = estimator.estimate(hyperparams, task, state)
            done = jnp.all(jnp.stack([jnp.all(d) for d in jax.tree.leaves(estimate.done)]))
            return (state, ended | done), (estimate.value, estimate.hypergrad, ~ended)

        start = (estimator.init(key, hyperparams, task), jnp.array(False))
        _, (values, grads, counted) = jax.lax.scan(step, start, length=num_estimates)
        if estimator.kind == "unbiased":
            weights = counted / counted.sum()
        else:  # the last estimate before the end
            weights = jnp.arange(num_estimates) == counted.sum() - 1

        def mean(x):
            used = (weights > 0).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.tensordot(weights.astype(x.dtype), jnp.where(used, x, 0), 1)  # later entries may be NaN

        return jax.tree.map(mean, (values, grads))

    def samples(hyperparams, task, state, keys):
        if estimator.kind == "exact":
            estimate, _ = estimator.estimate(hyperparams, task, state)
            return jax.tree.map(lambda x: jnp.asarray(x)[None], (estimate.value, estimate.hypergrad))
        return jax.lax.map(lambda key: whole_run(hyperparams, task, key), keys)

    return samples


def _unit(leaf: np.ndarray) -> float:
    """The scale of a leaf's steps: its largest entry, or 1 if that entry is zero up to rounding."""
    largest = float(np.max(np.abs(leaf), initial=0.0))
    return largest if largest > _ROUNDED_ZERO else 1.0


def _moved(center: list[np.ndarray], direction: list[np.ndarray], distance: float) -> list[np.ndarray]:
    return [x + distance * d for x, d in zip(center, direction, strict=True)]


def _claimed_slopes(point: Point, direction: list[np.ndarray]) -> np.ndarray:
    """[K] the slopes that the estimator claims along a direction, one for each key."""
    return np.asarray(sum(g.reshape(len(g), -1) @ d.ravel() for g, d in zip(point.grads, direction, strict=True)))


def _standard_error(samples: np.ndarray) -> float:
    """The standard error of the mean of [K] samples; 0 for K = 1, which only rules without random estimates have."""
    return float(samples.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else 0.0


def _leaf_directions(point: Point, rng: np.random.Generator, index: int) -> list[list[np.ndarray]]:
    """Two random sign vectors in one leaf.

    Out of 16 vectors, the function takes the two with the largest claimed slopes, along which the entries of the
    hypergradient cancel least. If the hypergradient is random (several keys), it takes the first two, since the largest
    slopes would have the largest errors.
    """
    grads, unit = point.grads[index], point.units[index]
    signs = unit * rng.choice([-1.0, 1.0], (16, *grads.shape[1:]))
    slopes = np.abs(signs.reshape(16, -1) @ grads[0].ravel())
    best = np.argsort(-slopes, kind="stable")[:2] if len(grads) == 1 else (0, 1)
    zeros = [np.zeros(x.shape) for x in point.center]
    return [[*zeros[:index], signs[i], *zeros[index + 1 :]] for i in best]


def _check_leaf(point: Point, rng: np.random.Generator, index: int, radius: float) -> LeafCheck:
    """Compares slopes within one leaf; tries a second direction if the first is inconclusive."""
    path, norm = point.paths[index], float(np.linalg.norm(point.grads[index].mean(0)))
    if not np.isfinite([norm, point.value]).all():
        return LeafCheck(path, norm, np.nan, np.nan, np.nan, np.nan, 0.0, "not finite", "")
    leaf = None
    for direction in _leaf_directions(point, rng, index):
        samples = _claimed_slopes(point, direction)
        claimed, standard_error = float(samples.mean()), _standard_error(samples)
        function = lambda t, direction=direction: point.mean_value(_moved(point.center, direction, t))
        slope, tried = _slopes.at_best_step(function, point.value, point.epsilon, point.noise, claimed, point.rtol)
        size = max(abs(claimed), abs(slope.value), 1e-300)
        error = max(0.0, abs(claimed - slope.value) - slope.uncertainty) / size
        status, note = _judge(point, norm, claimed, standard_error, slope, tried)
        if status in ("right", "zero"):
            status, note = _judge_jumps(point, function, radius, slope, (status, note))
        if leaf is None or status != "inconclusive":
            numbers = (norm, claimed, slope.value, slope.uncertainty, error, standard_error)
            leaf = LeafCheck(path, *numbers, status, note)
        if status != "inconclusive":
            break
    assert leaf is not None
    return leaf


def _judge(
    point: Point, norm: float, claimed: float, standard_error: float, slope: _slopes.Slope, tried: list[_slopes.Slope]
) -> tuple[str, str]:
    """The status of a leaf, and a note on it."""
    size, gap = max(abs(claimed), abs(slope.value)), abs(claimed - slope.value) - slope.uncertainty
    is_known = slope.uncertainty <= max(point.rtol * size, standard_error)
    # A slope that consists only of rounding errors counts as zero: a bias before batch normalization has such a slope.
    flat = (point.rtol if norm == 0 else _FLAT) * max(abs(point.value), 1e-300)
    if not np.isfinite(slope.value):
        return "inconclusive", "F is not finite next to λ"
    if norm == 0 and abs(slope.value) > 2 * slope.uncertainty:
        return "dead", ""
    if (norm == 0 or not is_known) and size + slope.uncertainty <= flat:
        return "zero", ""
    if norm != 0 and gap > max(point.rtol * size, 3 * standard_error):
        return "wrong", ""
    if norm == 0 or not is_known:
        return "inconclusive", _cause(point, size, slope, tried)
    if 3 * standard_error > size:
        return "inconclusive", "three standard errors exceed the slope"
    if slope.step < tried[0].step:
        return "right", f"F has a kink or a sharp bend within {tried[0].step:.1g}; the step is {slope.step:.1g}"
    return "right", ""


def _judge_jumps(
    point: Point, function: Callable, radius: float, slope: _slopes.Slope, judged: tuple[str, str]
) -> tuple[str, str]:
    """The status and the note of a right or zero leaf, after a test whether F changes mostly by jumps over the radius.

    Between its jumps, F is smooth, and its derivative ignores the jumps. So a right derivative may be of no use.
    """
    far_slope = (function(radius) - function(-radius)) / (2 * radius)
    if not np.isfinite(far_slope) or 0.5 * abs(far_slope) <= slope.value * np.sign(far_slope) <= 2 * abs(far_slope):
        return judged
    if point.float32_operations:  # rounding errors of float32 look like jumps
        return judged
    by_jumps, size = _slopes.change_by_jumps(function, point.value, radius, slope, point.noise)
    if abs(by_jumps) <= 0.5 * size:
        return judged
    note = (
        f"F jumps: its slope is {slope.value:.3g} between the jumps, and {far_slope:.3g} over the distance {radius:g}. "
        "The hypergradient leaves out jumps, such as those of Adam's first updates, of the slope of ReLU, and of a "
        "random mask whose probability depends on λ. Only for a mask, draw the numbers in a differentiable way, or "
        "use `hypergrad.evolution`"
    )
    return ("dead" if judged[0] == "zero" else "right"), note


def _cause(point: Point, size: float, slope: _slopes.Slope, tried: list[_slopes.Slope]) -> str:
    """The reason why finite differences are inconclusive."""
    value = max(abs(point.value), 1e-300)
    if slope.rounding > slope.uncertainty / 2:
        return f"the slope is only {size / value:.1g} of F, so rounding hides it"
    noise = _slopes.noise(tried)
    if noise > 0:
        return f"F has noise of {noise / value:.1g} of its value, since something amplifies rounding errors"
    if slope.kinked:
        return f"F has a kink at λ: its slope is {slope.left:.3g} on the left and {slope.right:.3g} on the right"
    return "F is too rough at every step"


def _check_directions(
    point: Point, rng: np.random.Generator, num_directions: int, radius: float
) -> tuple[float, str, float]:
    """The cosine, whether the hypergradient points uphill, and the metasmoothness.

    The second result is "yes", "no", "rough" (the slopes of F are not known well enough) or "noisy" (the estimates are
    too random).
    """
    claims, slopes, errors, far_slopes = [], [], [], []
    for _ in range(num_directions):
        direction = [unit * rng.normal(size=x.shape) for x, unit in zip(point.center, point.units, strict=True)]
        claim = _claimed_slopes(point, direction)
        function = lambda t, direction=direction: point.mean_value(_moved(point.center, direction, t))
        arguments = (point.value, point.epsilon, point.noise, float(claim.mean()), 10 * point.rtol)
        slope, _ = _slopes.at_best_step(function, *arguments)
        far = [function(radius + sign * point.epsilon) for sign in (1, -1)]
        claims.append(claim)
        slopes.append(slope.value)
        errors.append(slope.uncertainty)
        far_slopes.append(far[0] - far[1])
    samples, slopes, errors, far_slopes = map(np.array, (claims, slopes, errors, far_slopes))  # samples [D, K]
    claims = samples.mean(axis=1)
    product, noise = claims @ slopes, 3 * _standard_error(slopes @ samples)
    cosine = float(product / max(np.linalg.norm(claims) * np.linalg.norm(slopes), 1e-300))
    margin = float(np.abs(claims) @ errors)
    if product > margin + noise or product <= -margin - noise:
        uphill = "yes" if product > 0 else "no"
    else:
        uphill = "noisy" if noise > margin else "rough"
    weight = max(np.abs(slopes).sum(), 1e-300)
    return cosine, uphill, float((slopes * np.sign(far_slopes)).sum() / weight)
