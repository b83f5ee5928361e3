"""Reverse-mode hypergradients through the whole of training.

    θ_{t+1} = Φ(θ_t, λ),    dF/dλ = Σ_t w_t [∂f/∂λ + (∂f/∂θ_t) dθ_t/dλ],

by differentiating the program that trains. Exact, for any λ that enters anywhere: the initialization, the loss, the
optimizer, the outer loss. What it costs is memory, and checkpointing buys memory with recomputation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, inner
from metaopt.hypergrad import _mixed

REMAT = ("none", "step", "grads", "sqrt")
# Steps up to which a loop is written out: a tenth faster for small models (MAML), longer to compile. Its memory grows
# with the steps; above 32 MiB the C library maps it anew at every call, and a scan that stays below can take a third of
# the time (`experiments/results/anil.md`).
UNROLLED = 5


def _check(num_steps: int, remat: str | int) -> None:
    base.check_integer("num_steps", num_steps, 0)
    if remat not in REMAT and (isinstance(remat, bool) or not (isinstance(remat, int) and remat >= 1)):
        raise ValueError(
            f"`remat` must be one of {', '.join(map(repr, REMAT))}, or a number of levels, at least 1; got {remat!r}."
        )


def checkpointed_scan(step: Callable, carry: Any, xs: Any, *, length: int, remat: str | int) -> tuple[Any, Any]:
    """`jax.lax.scan` whose reverse pass stores less.

    Args:
      step: `(carry, x) -> (carry, y)`.
      carry: where it starts.
      xs: per-step inputs with a leading axis of `length`, or None.
      length: T.
      remat: "none" stores what every step computed; "step" stores each step's carry and recomputes within the step;
        "sqrt" stores √T carries, and recomputes a stretch of √T steps at a time, each with its own steps recomputed;
        an integer k has k levels of such stretches, one within the other: about k T^(1/k) carries, each step
        computed k times again ("step" is 1, "sqrt" is 2; more than log₂ T are no use, and are not taken).
        Within "step", and within the shortest stretches, the gradients that `mixed_grad` returns are stored too.
        "grads" is "sqrt" with those gradients stored for all steps: a stretch is then computed again without the loss,
        by the optimizer's updates alone.

    Returns:
      The last carry, and the stacked y.

    Raises:
      ValueError: `length` is negative or `remat` is unknown.
    """
    _check(length, remat)
    step, policy = _mixed.keeping(step)
    if remat == "none" and 0 < length <= UNROLLED:
        # The first step before the scan, whose carry has an axis of tasks under `vmap`: what all tasks start from has
        # none, and its products are one for all tasks (a tenth of MAML's time with one step).
        carry, xs = jax.tree.map(jnp.asarray, (carry, xs))  # as a scan does
        if any(len(x) != length for x in jax.tree.leaves(xs)):
            raise ValueError(
                f"`xs` must have {length} entries, one a step; got {[len(x) for x in jax.tree.leaves(xs)]}."
            )
        carry, first = step(carry, jax.tree.map(lambda x: x[0], xs))
        first = jax.tree.map(lambda y: jnp.asarray(y)[None], first)
        if length == 1:
            return carry, first
        rest = jax.tree.map(lambda x: x[1:], xs)
        carry, ys = jax.lax.scan(step, carry, rest, length=length - 1, unroll=length - 1)
        return carry, jax.tree.map(lambda *both: jnp.concatenate(both), first, ys)
    if remat == "none":
        return jax.lax.scan(step, carry, xs, length=length)
    levels = {"step": 1, "grads": 2, "sqrt": 2}[remat] if isinstance(remat, str) else remat
    levels = min(levels, max(length.bit_length() - 1, 1))
    # What `mixed_grad` returns is kept: its reverse rule does not need the forward pass again. A loop of one step is
    # inlined by XLA, which would there share what is to be computed anew.
    step = jax.checkpoint(step, prevent_cse=length == 1, policy=policy)
    # The least whole number whose power is T at least, to rounding.
    branches = int(np.ceil(round(length ** (1 / levels), 9)))
    between = policy if remat == "grads" else None
    return _stretched(step, carry, xs, length=length, branches=branches, levels=levels, policy=between)


def _stretched(
    step: Callable, carry: Any, xs: Any, *, length: int, branches: int, levels: int, policy: Callable | None
) -> tuple[Any, Any]:
    """A scan in stretches of branches^(levels - 1) steps, checkpointed, each in shorter ones; the rest is one more."""
    while levels > 1 and length <= branches ** (levels - 1):
        levels -= 1
    if levels == 1:
        return jax.lax.scan(step, carry, xs, length=length)
    size = branches ** (levels - 1)
    stretches, rest = divmod(length, size)

    def stretch(length):
        return partial(_stretched, step, length=length, branches=branches, levels=levels - 1, policy=policy)

    head = jax.tree.map(lambda x: x[: stretches * size].reshape(stretches, size, *x.shape[1:]), xs)
    tail = jax.tree.map(lambda x: x[stretches * size :], xs)
    full = jax.checkpoint(stretch(size), prevent_cse=stretches == 1, policy=policy)
    carry, ys = jax.lax.scan(full, carry, head, length=stretches)
    ys = jax.tree.map(lambda y: y.reshape(stretches * size, *y.shape[2:]), ys)
    if rest:
        carry, last = jax.checkpoint(stretch(rest), policy=policy)(carry, tail)
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, last)
    return carry, ys


def _weights(outer: str | Sequence[float] | np.ndarray | jax.Array, num_steps: int) -> tuple[Any, float]:
    """The weights w_1..w_T of F = Σ_t w_t f(θ_t, λ); or None, and w_T, where only the last step is known to count."""
    if isinstance(outer, str):
        if outer not in ("last", "mean"):
            raise ValueError(f'`outer` must be "last", "mean" or {num_steps} weights; got {outer!r}.')
        if outer == "last":
            return None, 1.0
        weights = np.full(num_steps, 1 / max(num_steps, 1))
    else:
        weights = outer if isinstance(outer, jax.Array) else np.asarray(outer, float)
        if weights.shape != (num_steps,):
            raise ValueError(f"`outer` must have one weight per step, shape ({num_steps},); got {weights.shape}.")
    if num_steps == 0:
        raise ValueError('With `num_steps=0` there is no step to weigh: take `outer="last"`.')
    if isinstance(weights, jax.Array) or weights[:-1].any():
        return weights, 1.0
    return None, float(weights[-1])


def _weighted_scan(
    step: Callable, outer_loss: Callable, state: Any, xs: Any, *, weights: tuple, num_steps: int, remat: str | int
) -> tuple[jax.Array, Any]:
    """Σ_t w_t outer_loss(state_t) along a checkpointed scan of `step`, `(state, x) -> state`; and the last state."""
    each, last = weights

    def weighted(state, x):
        weight, x = x
        state = step(state, x)
        if weight is None:
            return state, None
        shape = jax.eval_shape(outer_loss, state)
        value = lambda state: weight.astype(shape.dtype) * outer_loss(state)
        if not some_zero:
            return state, value(state)
        # Without weight it is not evaluated: a loss that overflows at an early step would be 0 · ∞.
        return state, jax.lax.cond(weight != 0, value, lambda state: jnp.zeros(shape.shape, shape.dtype), state)

    some_zero = isinstance(each, jax.Array) or not np.all(each)
    each = None if each is None else jnp.asarray(each)
    state, losses = checkpointed_scan(weighted, state, (each, xs), length=num_steps, remat=remat)
    return (last * outer_loss(state) if losses is None else losses.sum()), state


def unroll(loop: base.InnerLoop, *, num_steps: int, remat: str | int = "none", grad: Callable = jax.grad) -> Callable:
    """Training as a plain differentiable function: jit it, vmap it, differentiate it, nest it.

    Reverse mode stores, per step, everything ("none": 2.9 times the operations of plain training), the state alone
    ("step": 3.9), √T states ("sqrt": 5.0), or about k T^(1/k) states (an integer k: each level is one more forward
    pass). With `mixed_grad` it stores the gradients of the steps whose states are stored too, which saves a
    recomputation ("step": 3.3, "sqrt": 4.4); with "grads" those of all steps, and √T states (3.4): with Adam, whose
    state is three times the parameters, a third of the memory of "step", and in long runs less time. (Without
    `mixed_grad` it is "sqrt"; a model state, such as batch statistics, is computed again by the loss.) Time follows
    where matrix products dominate; in small networks memory traffic does, and it is more (the README's tables). Forward
    mode (`jax.jvp`, `jax.jacfwd`) works too, with memory that does not depend on T, as do vmap and any nesting. Loops
    of at most 5 steps that store everything are written out.

    Args:
      loop: how θ is trained.
      num_steps: T, at least 0.
      remat: "none", "step", "grads", "sqrt", or a number of levels; see `checkpointed_scan`.
      grad: what takes the inner gradient; see `inner.step`. `hypergrad.mixed_grad` saves time and memory where only
        reverse mode is needed.

    Returns:
      `(key, hyperparams, data) -> InnerState` after T steps; `loop.params` takes θ out of it.

    Raises:
      ValueError: `num_steps` is negative or `remat` is unknown.

    >>> import jax, optax
    >>> from metaopt import hypergrad, inner
    >>> loop = inner.loop(
    ...     lambda params, hp, data: (params - data) ** 2 / 2,
    ...     lambda hp: optax.sgd(hp["rate"]),
    ...     init=lambda key, hp, data: jax.numpy.zeros([]),
    ... )
    >>> solve = hypergrad.unroll(loop, num_steps=2)
    >>> outer = lambda rate: loop.params(solve(jax.random.key(0), {"rate": rate}, jax.numpy.array(1.0)))
    >>> print(round(float(jax.grad(outer)(0.25)), 4))  # θ_2 = 1 − (1 − rate)²
    1.5
    """
    _check(num_steps, remat)

    def solve(key, hyperparams, data):
        def step(state, _):
            return inner.step(loop, state, hyperparams, data, grad=grad), None

        state = loop.init(key, hyperparams, data)
        return checkpointed_scan(step, state, None, length=num_steps, remat=remat)[0]

    return solve


def unrolled(
    problem: base.Problem,
    *,
    num_steps: int,
    remat: str | int = "none",
    outer: str | Sequence[float] | np.ndarray | jax.Array = "last",
    grad: Callable = _mixed.mixed_grad,
) -> base.Estimator:
    """Estimates dF/dλ exactly, by reverse mode through T steps from a fresh start.

        F(λ) = Σ_{t=1..T} w_t f(θ_t(λ), λ)

    Every call starts anew, with a fresh key for the initialization, the order of the data and the noise; F is then a
    sample of its mean over keys. Works under jit and vmap. The estimate may be differentiated again: its hypergradient
    in either mode, its value in reverse mode (in forward mode with `grad=jax.grad`).

    Args:
      problem: any; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, at least 1 (0 with `outer="last"`: f at the initialization, plain training of λ).
      remat: "none", "step", "grads", "sqrt", or a number of levels; time and memory in `unroll`.
      outer: "last" (w_T = 1), "mean" (w_t = 1/T), or T weights w_1..w_T, which may be traced: a schedule of the outer
        step. f is not evaluated at steps of weight zero, nor has F a derivative by such a weight.
      grad: what takes the inner gradient; see `inner.step`. `mixed_grad` says where `jax.grad` is to be taken instead.

    Returns:
      An `Estimator` of kind "exact", `done` after every estimate; its state is a key.

    Raises:
      ValueError: `num_steps`, `remat` or the number of weights is wrong.

    Source: Domke, AISTATS 2012; Maclaurin, Duvenaud & Adams, ICML 2015, https://arxiv.org/abs/1502.03492; Franceschi
      et al., ICML 2017, https://arxiv.org/abs/1703.01785. MAML's per-step losses: Antoniou et al., ICLR 2019.
    """
    _check(num_steps, remat)
    weights = _weights(outer, num_steps)
    loop = problem.loop

    def objective(hyperparams, key, task):
        train_key, outer_key = jax.random.split(key)

        def outer_loss(state):
            # The same validation batch for every step of one training.
            batch = problem.outer_batch(outer_key, task)
            return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

        def step(state, _):
            return inner.step(loop, state, hyperparams, task.train, grad=grad)

        state = loop.init(train_key, hyperparams, task.train)
        scan = _weighted_scan(step, outer_loss, state, None, weights=weights, num_steps=num_steps, remat=remat)
        return scan[0]

    def init(key, hyperparams, task):
        del hyperparams, task
        return key

    def estimate(hyperparams, task, state):
        base.check_hyperparams(hyperparams)
        run_key, key = jax.random.split(state)
        value, hypergrad = jax.value_and_grad(objective)(hyperparams, run_key, task)
        return base.Estimate(value, hypergrad, jnp.array(True), {}), key

    return base.Estimator(init, estimate, kind="exact")
