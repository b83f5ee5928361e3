"""Reverse-mode hypergradients through the whole training run.

    θ_{t+1} = Φ(θ_t, λ),    dF/dλ = Σ_t w_t [∂f/∂λ + (∂f/∂θ_t) dθ_t/dλ],

by differentiation of the training program. They are exact, for any λ that enters anywhere: the initialization, the
loss, the optimizer, the outer loss. Their cost is memory. Checkpointing reduces the memory and adds recomputation.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from metaopt import _checks, base, inner
from metaopt.hypergrad import _mixed

REMAT = ("none", "step", "grads", "sqrt", "offload")
# Loops of up to this many steps are written out. This is a tenth faster for small models (MAML), but takes longer to
# compile. Its memory grows with the steps. Above 32 MiB, the C library maps this memory again at every call. A scan
# that stays below this limit can take a third of the time (`experiments/results/anil.md`).
UNROLLED = 5


def check_steps(num_steps: int, remat: str | int) -> None:
    """Raises a `ValueError` unless a number of steps and a kind of checkpointing are valid."""
    _checks.check_integer("num_steps", num_steps, 0)
    if remat not in REMAT and (isinstance(remat, bool) or not (isinstance(remat, int) and remat >= 1)):
        raise ValueError(
            f"`remat` must be one of {', '.join(map(repr, REMAT))}, or a number of levels, at least 1; got {remat!r}."
        )


def _offloaded(step: Callable) -> Callable:
    """A step whose carry is stored in the memory of the host; the values within the step are computed again."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["carry"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def from_host(carry, x):
        named = lambda leaf: checkpoint_name(leaf, "carry") if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
        return step(jax.tree.map(named, carry), x)

    return jax.checkpoint(from_host, prevent_cse=False, policy=policy)


@cache
def _can_offload(platform: str) -> bool:
    """Whether the compiler of this platform puts the carries of a scan into the memory of the host.

    Some compilers ignore the request without a message. So we compile a small loop, and look at its memory.
    """

    def loop(x):
        step = _offloaded(lambda x, _: (jnp.sin(x), None))
        return jax.lax.scan(step, x, None, length=8)[0].sum()

    memory = jax.jit(jax.grad(loop)).lower(jax.ShapeDtypeStruct((1024,), jnp.float32)).compile().memory_analysis()
    return memory is not None and memory.host_temp_size_in_bytes > 0


def check_windows(num_steps: int, truncation_length: int) -> None:
    """Raises a `ValueError` unless `num_steps` steps consist of whole windows of `truncation_length` steps."""
    if truncation_length < 1 or num_steps < 1 or num_steps % truncation_length:
        raise ValueError(
            "`truncation_length` must be at least 1 and divide `num_steps`, so that all windows are full; got "
            f"{truncation_length} and {num_steps}."
        )


def checkpointed_scan(step: Callable, carry: Any, xs: Any, *, length: int, remat: str | int) -> tuple[Any, Any]:
    """`jax.lax.scan` with a reverse pass that stores less.

    Args:
      step: `(carry, x) -> (carry, y)`.
      carry: the initial carry.
      xs: per-step inputs with a leading axis of `length`, or None.
      length: T.
      remat: the values that are stored. "none" stores all values of every step. "step" stores each step's carry and
        recomputes within the step. "sqrt" stores the carries at the starts of √T stretches. The reverse pass recomputes
        one stretch of √T steps at a time, which stores √T more carries, and each step within the stretch once more. An
        integer k has k nested levels of such stretches: it stores about k T^(1/k) carries and computes each step k more
        times. So "step" is 1 and "sqrt" is 2. More than log₂ T levels do not help, so k is limited to log₂ T. With
        "step", and within the shortest stretches, the gradients that `mixed_grad` returns are stored too. "grads" is
        "sqrt" with those gradients stored for all steps. A stretch is then recomputed without the loss, only with the
        optimizer's updates. "offload" stores each step's carry in the memory of the host, and nothing else: it
        recomputes the gradients of `mixed_grad`.

    Returns:
      The last carry, and the stacked y.
    """
    step, policy = _mixed.keeping(step)
    if remat == "none" and 0 < length <= UNROLLED:
        # The first step runs before the scan. Under `vmap`, the carry of a scan has an axis of tasks. The shared start
        # of all tasks has no such axis, so its products are computed once for all tasks. This saves a tenth of MAML's
        # time with one step.
        carry, xs = jax.tree.map(jnp.asarray, (carry, xs))  # as in a scan
        carry, first = step(carry, jax.tree.map(lambda x: x[0], xs))
        first = jax.tree.map(lambda y: jnp.asarray(y)[None], first)
        if length == 1:
            return carry, first
        rest = jax.tree.map(lambda x: x[1:], xs)
        carry, ys = jax.lax.scan(step, carry, rest, length=length - 1, unroll=length - 1)
        return carry, jax.tree.map(lambda *both: jnp.concatenate(both), first, ys)
    if remat == "none":
        return jax.lax.scan(step, carry, xs, length=length)
    if remat == "offload":
        if not _can_offload(platform := jax.default_backend()):
            raise ValueError(
                f"`remat='offload'` moves inner states from the memory of a device to that of its host, which the "
                f"compiler for {platform!r} does not do. Use 'step', 'sqrt' or 'grads'."
            )
        return jax.lax.scan(_offloaded(step), carry, xs, length=length)
    levels = {"step": 1, "grads": 2, "sqrt": 2}[remat] if isinstance(remat, str) else remat
    levels = min(levels, max(length.bit_length() - 1, 1))
    # The gradients that `mixed_grad` returns are kept, since its reverse rule then needs no second forward pass. XLA
    # inlines a loop of one step. It would then share the values that should be computed again.
    step = jax.checkpoint(step, prevent_cse=length == 1, policy=policy)
    # The smallest integer whose power `levels` is at least T, up to rounding.
    branches = int(np.ceil(round(length ** (1 / levels), 9)))
    between = policy if remat == "grads" else None
    return _stretched(step, carry, xs, length=length, branches=branches, levels=levels, policy=between)


def _stretched(
    step: Callable, carry: Any, xs: Any, *, length: int, branches: int, levels: int, policy: Callable | None
) -> tuple[Any, Any]:
    """A scan in checkpointed stretches of branches^(levels - 1) steps, split recursively; the rest forms one more."""
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


def step_weights(outer: str | Sequence[float] | np.ndarray | jax.Array, num_steps: int) -> tuple[Any, float]:
    """The weights of F = Σ_t w_t f(θ_t, λ), as `(w_1..w_T, 1)`, or as `(None, w_T)` if the others are known to be zero.

    Raises a `ValueError` if a number of steps or of weights is wrong.
    """
    _checks.check_integer("num_steps", num_steps, 0)
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
        raise ValueError('`outer` cannot weight steps if `num_steps=0`; use "last".')
    if isinstance(weights, jax.Array) or weights[:-1].any():
        return weights, 1.0
    return None, float(weights[-1])


def weighted_scan(
    step: Callable, outer_loss: Callable, state: Any, xs: Any, *, weights: tuple, num_steps: int, remat: str | int
) -> tuple[jax.Array, Any]:
    """Σ_t w_t outer_loss(state_t) along a checkpointed scan of `step`, `(state, x) -> state`, and the last state."""
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
        # Steps of weight 0 do not evaluate the loss: if it overflows at an early step, 0 · ∞ would be NaN.
        return state, jax.lax.cond(weight != 0, value, lambda state: jnp.zeros(shape.shape, shape.dtype), state)

    some_zero = isinstance(each, jax.Array) or not np.all(each)
    each = None if each is None else jnp.asarray(each)
    state, losses = checkpointed_scan(weighted, state, (each, xs), length=num_steps, remat=remat)
    return (last * outer_loss(state) if losses is None else losses.sum()), state


def weighted_training(
    problem: base.Problem,
    state: Any,
    hyperparams: base.HyperParams,
    task: base.Task,
    outer_key: jax.Array,
    *,
    weights: tuple,
    num_steps: int,
    remat: str | int,
    grad: Callable,
) -> tuple[jax.Array, Any]:
    """Σ_t w_t f(θ_t, λ) along T inner steps from `state`, and the last state; all steps use one validation batch."""
    loop = problem.loop

    def outer_loss(state):
        batch = problem.outer_batch(outer_key, task)
        return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

    def step(state, _):
        return inner.step(loop, state, hyperparams, task.train, grad=grad)

    return weighted_scan(step, outer_loss, state, None, weights=weights, num_steps=num_steps, remat=remat)


def unroll(loop: base.InnerLoop, *, num_steps: int, remat: str | int = "none", grad: Callable = jax.grad) -> Callable:
    """Makes training a plain differentiable function, for `jit`, `vmap`, differentiation and any nesting.

    In reverse mode, `remat` determines the stored values. The figures are operations in multiples of plain training:

    - "none" stores everything in each step: 2.9.
    - "step" stores only the state of each step: 3.9, or 3.3 with `mixed_grad`.
    - "sqrt" stores about 2 √T states: 5.0, or 4.4 with `mixed_grad`.
    - "offload" is "step", but its states go to the memory of the host and come back, and the gradients of `mixed_grad`
      are not stored but computed again. It needs a GPU or TPU. It has never been run on one; only its program was
      examined.
    - An integer k stores about k T^(1/k) states: each level is one more forward pass. More than log₂ T levels do not
      help, so k is limited to log₂ T.
    - "grads" with `mixed_grad` stores the gradients of all steps and about 2 √T states: 3.4. With Adam, whose state is
      three times the parameters, it takes a third of the memory of "step", and in long runs less time. Without
      `mixed_grad` it is "sqrt". A model state, such as batch statistics, is not stored; the loss computes it again.

    With `mixed_grad`, gradients are stored too, which saves a recomputation: T of them with "step", √T with "sqrt", and
    T^(1/k) with an integer k. The time follows these figures if matrix products dominate. In small networks, memory
    traffic dominates, and the time is longer (see the page "Performance"). Forward mode (`jax.jvp`, `jax.jacfwd`) works
    too, with memory that does not depend on T. vmap and any nesting also work. With "none", the steps of loops of at
    most 5 steps are unrolled in the program.

    Args:
      loop: the inner loop, which trains θ.
      num_steps: T, at least 0.
      remat: "none", "step", "grads", "sqrt", "offload", or a number of levels.
      grad: the function that takes the inner gradient; see `inner.step`. If only reverse mode is needed,
        `hypergrad.mixed_grad` saves time and memory.

    Returns:
      `(key, hyperparams, data) -> InnerState` after T steps. `loop.params` extracts θ from it.

    Raises:
      ValueError: if `num_steps` is negative, or `remat` is unknown.
      ValueError: at trace time, if `remat="offload"` and the platform cannot do it.

    >>> import jax, optax
    >>> from metaopt import hypergrad, inner
    >>> loop = inner.loop(
    ...     lambda params, hp, data: (params - data) ** 2 / 2,
    ...     lambda hp: optax.sgd(hp["rate"]),
    ...     init=lambda key, hp, data: jax.numpy.zeros([]),
    ... )
    >>> solve = hypergrad.unroll(loop, num_steps=2)
    >>> outer = lambda rate: loop.params(
    ...     solve(jax.random.key(0), {"rate": rate}, jax.numpy.array(1.0))
    ... )
    >>> print(round(float(jax.grad(outer)(0.25)), 4))  # θ_2 = 1 − (1 − rate)²
    1.5
    """
    check_steps(num_steps, remat)

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

    Every call starts from scratch, with a new key for the initialization, the order of the data and the noise. So F is
    a sample of its mean over keys. The rule works under jit and vmap. The estimate may be differentiated again: its
    hypergradient in either mode, and its value in reverse mode (in forward mode with `grad=jax.grad`).

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, at least 1. (0 is allowed with `outer="last"`: F is then f at the initialization, without training.)
      remat: "none", "step", "grads", "sqrt", "offload", or a number of levels; see `unroll` for time and memory.
      outer: "last" (w_T = 1), "mean" (w_t = 1/T), or T weights w_1..w_T. Traced weights are allowed, such as a schedule
        of the outer step. The rule does not evaluate f at steps of weight zero. F has no derivative with respect to
        such a weight.
      grad: the function that takes the inner gradient; see `inner.step`. The docstring of `mixed_grad` states when to
        use `jax.grad` instead.

    Returns:
      An `Estimator` of kind "exact", `done` after every estimate. Its state is a key.

    Raises:
      ValueError: if `num_steps`, `remat` or the number of weights is wrong.

    Source: Domke, AISTATS 2012; Maclaurin, Duvenaud & Adams, ICML 2015, https://arxiv.org/abs/1502.03492; Franceschi
      et al., ICML 2017, https://arxiv.org/abs/1703.01785. MAML's per-step losses: Antoniou et al., ICLR 2019.
    """
    check_steps(num_steps, remat)
    weights = step_weights(outer, num_steps)
    train = partial(weighted_training, problem, weights=weights, num_steps=num_steps, remat=remat, grad=grad)

    def objective(hyperparams, key, task):
        train_key, outer_key = jax.random.split(key)
        state = problem.loop.init(train_key, hyperparams, task.train)
        return train(state, hyperparams, task, outer_key)[0]

    def init(key, hyperparams, task):
        del hyperparams, task
        return key

    def estimate(hyperparams, task, state):
        run_key, key = jax.random.split(state)
        value, hypergrad = jax.value_and_grad(objective)(hyperparams, run_key, task)
        return base.Estimate(value, hypergrad, jnp.array(True), {}), key

    return base.Estimator(init, estimate, kind="exact")
