"""Is a hypergradient right? Finite differences in float64, on the user's own problem.

Nothing here trusts a derivative: F is only evaluated, at λ + ε d and λ − ε d, with the estimator's own randomness held
fixed, and compared with the hypergradient along d.
"""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from metaopt import base


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


class LeafCheck(NamedTuple):
    """One leaf of λ.

    Attributes:
      path: where it is in λ.
      norm: of the hypergradient's leaf.
      hypergrad: its slope along a random direction within the leaf.
      finite_difference: the same, by finite differences.
      relative_error: |difference| / max of the two, above what the finite difference itself is uncertain by.
      standard_error: of a stochastic rule's mean slope; 0 for others.
      status: "right", "wrong", "zero" (both are), "dead" (the hypergradient is zero, F is not flat), "uncertain" (F is
        too rough at ε for finite differences to tell), "not finite".
    """

    path: str
    norm: float
    hypergrad: float
    finite_difference: float
    relative_error: float
    standard_error: float
    status: str


class Check(NamedTuple):
    """What `check` returns; printed, it is a table.

    Attributes:
      kind: the estimator's.
      passed: whether the hypergradient is what its kind promises.
      value: F(λ).
      leaves: one `LeafCheck` per leaf.
      cosine: between hypergradient and finite differences over random directions in the whole of λ, in [−1, 1].
      metasmoothness: in [−1, 1]; near 1 the slope of F keeps its sign at a distance of `radius`, near 0 it tells
        nothing about a step of that size.
      float32_constants: arrays that the loss holds in float32: these bound the accuracy that can be seen.
      message: what to make of it.
    """

    kind: str
    passed: bool
    value: float
    leaves: list[LeafCheck]
    cosine: float
    metasmoothness: float
    float32_constants: list[str]
    message: str

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("leaf", "|hypergradient|", "slope", "finite difference", "relative error", "")]
        for leaf in self.leaves:
            numbers = (leaf.norm, leaf.hypergrad, leaf.finite_difference, leaf.relative_error)
            rows.append((leaf.path, *(f"{x:.3e}" for x in numbers), leaf.status))
        head = f"{'passed' if self.passed else 'FAILED'}: {self.kind} estimator at F = {self.value:.6g}"
        tail = f"cosine {self.cosine:.4f}, metasmoothness {self.metasmoothness:.3f}. {self.message}"
        return "\n".join([head, aligned(rows), tail])


def _widen(tree: Any) -> Any:
    """Floating-point leaves as float64; keys, integers and masks as they are."""

    def leaf(x):
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        return jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)

    return jax.tree.map(leaf, tree)


def _held_arrays(thing: Any, name: str, seen: set[int]) -> list[tuple[str, np.ndarray]]:
    """(name, array) of what a function holds: through closures, partials, containers and its module's globals."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, (jax.Array, np.ndarray)):
        is_key = jnp.issubdtype(thing.dtype, jax.dtypes.prng_key)
        return [] if is_key or isinstance(thing, Tracer) else [(name, np.asarray(thing))]
    parts: list[tuple[str, Any]] = []
    if isinstance(thing, functools.partial):
        parts = [(name, part) for part in (thing.func, *thing.args, *thing.keywords.values())]
    elif isinstance(thing, dict):
        parts = [(f"{name}[{key!r}]", part) for key, part in thing.items()]
    elif isinstance(thing, (list, tuple)):
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(thing)]
    elif hasattr(thing, "__wrapped__"):
        parts = [(name, thing.__wrapped__)]
    elif hasattr(thing, "__func__"):  # a method
        parts = [(name, thing.__self__), (name, thing.__func__)]
    elif hasattr(thing, "__code__"):
        code, scope = thing.__code__, thing.__globals__
        for variable, cell in zip(code.co_freevars, thing.__closure__ or (), strict=False):
            try:
                parts.append((variable, cell.cell_contents))
            except ValueError:  # not assigned yet
                continue
        defaults = thing.__defaults__ or ()
        parts += zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
        parts += [(variable, scope[variable]) for variable in code.co_names if variable in scope]
        # The globals that are followed are data and the user's functions, not whole libraries.
        libraries = ("jax", "optax", "numpy", "flax", "chex")
        parts = [p for p in parts if not (getattr(p[1], "__module__", None) or "").startswith(libraries)]
    elif hasattr(thing, "__dict__") and not isinstance(thing, (type, types.ModuleType)):  # an object
        parts = [(f"{name}.{field}", part) for field, part in vars(thing).items()]
    return [found for label, part in parts for found in _held_arrays(part, label, seen)]


def _narrow(closed: Any) -> tuple[list[np.ndarray], int]:
    """The float32 constants of a program and of all its parts, and how often it casts float64 to float32."""
    constants = [np.asarray(c) for c in getattr(closed, "consts", []) if getattr(c, "dtype", None) == np.float32]
    casts = 0
    for equation in getattr(closed, "jaxpr", closed).eqns:
        if equation.primitive.name == "convert_element_type" and equation.params["new_dtype"] == np.float32:
            casts += equation.invars[0].aval.dtype == np.float64
        for value in equation.params.values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(getattr(part, "jaxpr", part), "eqns"):
                    more, count = _narrow(part)
                    constants, casts = constants + more, casts + count
    return constants, casts


def _float32(estimator: base.Estimator, hyperparams: Any, task: Any, state: Any) -> list[str]:
    """What stays in float32 although everything given is in float64, by name."""
    narrow, casts = _narrow(jax.make_jaxpr(estimator.estimate)(hyperparams, task, state))
    names = {}
    if narrow:
        held = _held_arrays(estimator.estimate, "", set())
        names = {(a.shape, a.tobytes()): name for name, a in held if a.dtype == np.float32}
    out = [
        f"{names.get((c.shape, c.tobytes()), 'an array')}, float32{list(c.shape)}, held by a function" for c in narrow
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if getattr(leaf, "dtype", None) == np.float32:
            out.append(f"state{jax.tree_util.keystr(path)}, made in float32 by `init`")
    if casts and not out:
        out.append("a cast of float64 to float32 inside the problem")
    return sorted(set(out))


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
    """Compares an estimator with finite differences of F in float64, on the problem at hand.

    Slopes along d are (4 D(ε/2) − D(ε)) / 3 with D(ε) = [F(λ + ε d) − F(λ − ε d)] / 2ε; their own uncertainty,
    |D(ε/2) − D(ε)| and rounding, is not held against the estimator. What is compared depends on the estimator's kind:

    * "exact": F is the estimate's value from the state after `init`; passes where every leaf's slope agrees to `rtol`.
    * "biased": F(λ) is the value of the last estimate of a run that stays at λ until it is `done`, or for
      `num_estimates`, which is what a user means by it; passes where the hypergradient points uphill (cosine > 0) and
      no leaf is dead. The errors say how large the bias is.
    * "unbiased": the mean over the estimates of such a run, and over `num_samples` runs with different keys, against
      the mean of the values with the same keys; passes where the slopes agree within 3 standard errors (or `rtol`).
    * "pseudo": passes where it is finite; the cosine is reported.

    Args:
      estimator: any; wrappers included.
      hyperparams: λ, where to check.
      task: a task, or what the estimator takes for one.
      key: a fixed one by default.
      num_directions: random directions in the whole of λ, for cosine and metasmoothness; at least 1.
      epsilon: in units of each leaf's largest entry (1 where the leaf is zero).
      radius: likewise; the distance for metasmoothness, about one outer step.
      rtol: the relative error that passes.
      num_estimates: the most estimates of one run of a "biased" or "unbiased" rule; at least 1.
      num_samples: see "unbiased"; at least 2.

    Returns:
      A `Check`; print it.

    Raises:
      ValueError: an argument is out of range.

    Source: metasmoothness after Engstrom et al., 2025, https://arxiv.org/abs/2503.13751.
    """
    counts = {
        "num_directions": (num_directions, 1),
        "num_estimates": (num_estimates, 1),
        "num_samples": (num_samples, 2),
    }
    for name, (count, least) in counts.items():
        base.check_integer(name, count, least)
    base.check_positive("epsilon", epsilon)
    base.check_positive("radius", radius)
    key = jax.random.key(0) if key is None else key
    with jax.enable_x64(True):
        hyperparams, task = _widen(hyperparams), _widen(task)
        state = estimator.init(key, hyperparams, task)
        narrow = _float32(estimator, hyperparams, task, state)
        if narrow:
            epsilon, rtol = max(epsilon, 1e-2), max(rtol, 3e-2)
        return _check(
            estimator, hyperparams, task, state, key, narrow, num_directions, epsilon, radius, rtol, num_estimates,
            num_samples,
        )  # fmt: skip


def _check(
    estimator, hyperparams, task, state, key, narrow, num_directions, epsilon, radius, rtol, num_estimates, num_samples
) -> Check:
    kind = estimator.kind
    keys = jax.random.split(key, num_samples if kind == "unbiased" else 1)

    def run(hyperparams, key):
        """(F, hypergradient) of one run at λ."""
        if kind == "exact":
            estimate, _ = estimator.estimate(hyperparams, task, state)
            return estimate.value, estimate.hypergrad

        def again(carry, _):
            state, ended = carry
            estimate, state = estimator.estimate(hyperparams, task, state)
            done = jnp.all(jnp.stack([jnp.all(d) for d in jax.tree.leaves(estimate.done)]))
            return (state, ended | done), (estimate.value, estimate.hypergrad, ~ended)

        start = (estimator.init(key, hyperparams, task), jnp.array(False))
        _, (values, grads, counted) = jax.lax.scan(again, start, length=num_estimates)
        if kind == "unbiased":
            weights = counted / counted.sum()
        else:  # the last one before the end
            weights = jnp.arange(num_estimates) == counted.sum() - 1

        def mean(x):
            counts = (weights > 0).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.tensordot(weights.astype(x.dtype), jnp.where(counts, x, 0), 1)  # after the end, anything may be

        return jax.tree.map(mean, (values, grads))

    run = jax.jit(run)

    def mean_value(hyperparams):
        return float(np.mean([run(hyperparams, k)[0] for k in keys]))

    samples = [run(hyperparams, k) for k in keys]
    value = float(np.mean([s[0] for s in samples]))
    grads = [jax.tree.map(np.asarray, s[1]) for s in samples]
    scales = jax.tree.map(lambda x: float(np.max(np.abs(x), initial=0)) or 1.0, hyperparams)

    def moved(center, direction, distance):
        return jax.tree.map(lambda x, d: x + distance * d, center, direction)

    def slope(direction, center=hyperparams):
        """The slope of F, and how uncertain it is."""
        wide, half = (
            (mean_value(moved(center, direction, e)) - mean_value(moved(center, direction, -e))) / (2 * e)
            for e in (epsilon, epsilon / 2)
        )
        rounding = (1e-6 if narrow else 1e-14) * max(abs(value), 1e-300) / epsilon
        return (4 * half - wide) / 3, abs(half - wide) + rounding

    def along(direction):
        """The mean slope that the estimator gives, and its standard error."""
        dots = [
            sum(float(np.vdot(g, d)) for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(direction), strict=True))
            for grad in grads
        ]
        error = float(np.std(dots, ddof=1) / len(dots) ** 0.5) if len(dots) > 1 else 0.0
        return float(np.mean(dots)), error

    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(hyperparams)
    paths = [jax.tree_util.keystr(p) or "λ" for p, _ in jax.tree_util.tree_leaves_with_path(hyperparams)]
    flat_scales = jax.tree.leaves(scales)
    rows = []
    for i, path in enumerate(paths):
        direction = structure.unflatten(
            [
                flat_scales[i] * rng.choice([-1.0, 1.0], np.shape(x)) if i == j else np.zeros(np.shape(x))
                for j, x in enumerate(leaves)
            ]
        )
        (found, standard_error), (expected, uncertain) = along(direction), slope(direction)
        norm = float(np.linalg.norm(np.mean([np.ravel(jax.tree.leaves(g)[i]) for g in grads], axis=0)))
        gap = max(0.0, abs(found - expected) - uncertain)
        error = gap / max(abs(found), abs(expected), 1e-300)
        if not np.isfinite([found, expected, norm]).all():
            status = "not finite"
        elif norm == 0:
            status = "zero" if abs(expected) <= 2 * uncertain else "dead"
        elif gap == 0 and standard_error == 0 and uncertain > rtol * max(abs(found), abs(expected)):
            status = "uncertain"
        else:
            status = "right" if error <= rtol or gap <= 3 * standard_error else "wrong"
        rows.append(LeafCheck(path, norm, found, expected, error, standard_error, status))

    ours, theirs, there = [], [], []
    for _ in range(num_directions):
        direction = jax.tree.map(lambda x, s: s * rng.normal(size=np.shape(x)), hyperparams, scales)
        ours.append(along(direction)[0])
        theirs.append(slope(direction)[0])
        there.append(slope(direction, moved(hyperparams, direction, radius))[0])
    ours, theirs, there = map(np.array, (ours, theirs, there))
    cosine = float(ours @ theirs / max(np.linalg.norm(ours) * np.linalg.norm(theirs), 1e-300))
    weight = max(np.abs(theirs).sum(), 1e-300)
    metasmoothness = float((np.abs(theirs) * np.sign(theirs) * np.sign(there)).sum() / weight)

    bad = [f"{r.path} ({r.status})" for r in rows if r.status not in ("right", "zero")]
    broken = [r.path for r in rows if r.status in ("not finite", "dead")]
    if kind in ("exact", "unbiased"):
        passed = not bad
    elif kind == "pseudo":
        passed = all(r.status != "not finite" for r in rows)
    else:
        passed = not broken and cosine > 0
    return Check(
        kind, passed, value, rows, cosine, metasmoothness, narrow, _advice(kind, rows, bad, metasmoothness, narrow)
    )


def _advice(kind, rows, bad, metasmoothness, narrow) -> str:
    words = []
    if any(r.status == "not finite" for r in rows):
        words.append("A hypergradient is not finite: run `hypergrad.diagnose` for where training diverges.")
    dead = [r.path for r in rows if r.status == "dead"]
    if dead:
        words.append(
            f"F depends on {', '.join(dead)}, and the hypergradient does not: a stop_gradient, a cast to integers, or "
            "a rule that cannot see it."
        )
    zero = [r.path for r in rows if r.status == "zero"]
    if zero:
        words.append(f"F does not depend on {', '.join(zero)} here.")
    rough = [r.path for r in rows if r.status == "uncertain"]
    if rough:
        words.append(
            f"F is too rough for finite differences along {', '.join(rough)}: another `epsilon`, or see `diagnose`."
        )
    if kind in ("exact", "unbiased") and any(r.status == "wrong" for r in rows):
        words.append(f"It is not the derivative of F: {', '.join(bad)}.")
    if metasmoothness < 0.5:
        words.append("F is rough at this radius: smaller outer steps, a smaller inner rate, fewer inner steps, or ES.")
    if narrow:
        words.append("In float32, which bounds what can be seen (ε ≥ 1e-2, rtol ≥ 3e-2): " + "; ".join(narrow) + ".")
    return " ".join(words) or "Nothing to remark."
