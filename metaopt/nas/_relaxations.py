"""Relaxations, which map α to mixing weights; and tools that keep a search from collapsing.

A **relaxation** is a function `(alpha, cell, key, step) -> weights [edges, ops]` for one kind of cell. Key and step
come from `base.Context`, for noise and schedules. The functions below make relaxations, and some of them wrap a
relaxation.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metaopt import base
from metaopt._jaxpr import Tracer
from metaopt.nas._genotypes import NONE, SKIP, check_finite, edges_kept
from metaopt.nas._specs import Cell, Space

Schedule = float | Callable[[Any], Any]  # a number, or step -> number, as in optax


class Relaxation(Protocol):
    """Maps α of one kind of cell to its mixing weights: `(alpha, cell, key, step) -> [edges, ops]`."""

    def __call__(self, alpha: Any, cell: Cell, key: jax.Array, step: jax.Array | int) -> jax.Array:
        """Mixing weights [edges, ops] of one kind of cell."""
        ...


class Decoded(NamedTuple):
    """A relaxation with noise or a schedule, together with the relaxation by which genotypes are read from its α.

    Attributes:
      relax: maps α to the weights for training.
      decode: maps α to the weights from which a genotype is read.
    """

    relax: Relaxation
    decode: Relaxation

    def __call__(self, alpha, cell, key, step):
        return self.relax(alpha, cell, key, step)


def decoding(relaxation: Relaxation) -> Relaxation:
    """The relaxation by which genotypes are read, without the parts that only training needs.

    Args:
      relaxation: any relaxation. For `gumbel_softmax` the result is the softmax without noise. For `auxiliary_skip` it
        is the wrapped relaxation. For a `softmax` with a schedule it is the softmax at temperature 1.

    Returns:
      A `Relaxation`; the same one if it has no separate decoding.
    """
    return relaxation.decode if isinstance(relaxation, Decoded) else relaxation


def _value(schedule: Schedule, step) -> Any:
    return schedule(step) if callable(schedule) else schedule


def mixing_weights(
    relaxation: Relaxation,
    network: Space,
    alpha: base.HyperParams,
    key: jax.Array,
    step: jax.Array | int = 0,
) -> dict[str, jax.Array]:
    """The mixing weights of all kinds of cells, with a separate key for each kind.

    Args:
      relaxation: maps α to weights.
      network: the spec of a supernet.
      alpha: kind -> α.
      key: a PRNG key.
      step: step of the schedules.

    Returns:
      kind -> [edges, ops].

    Raises:
      ValueError: if the kinds of α are not the kinds of the network.
    """
    if not isinstance(alpha, Mapping) or set(alpha) != set(network.cells):
        got = f"the kinds {sorted(map(str, alpha))}" if isinstance(alpha, Mapping) else type(alpha).__name__
        raise ValueError(
            f"α must have a leaf for each kind of cell of the network, {sorted(network.cells)}; got {got}. Pass "
            "only α, from a search of this network."
        )
    kinds = network.cells.items()
    return {k: relaxation(alpha[k], cell, jax.random.fold_in(key, i), step) for i, (k, cell) in enumerate(kinds)}


def discretized(network: Space, weights: Mapping[str, Any]) -> dict[str, jax.Array]:
    """`one_hot(network, derive_genotype(network, weights))`, also for traced weights.

    Args:
      network: the spec of a supernet, whose `keep` is the number of kept edges.
      weights: kind -> [edges, ops], not negative.

    Returns:
      kind -> [edges, ops]: 1 for the ops that are kept, 0 elsewhere. Derivatives treat it as constant.

    Raises:
      ValueError: if the weights do not have the shape of the network, or if some are NaN or infinite (not checked for
        traced weights).
      ValueError: if the network is a NAS-Bench-101 space.
    """
    keep, chosen = edges_kept(network, "space"), {}
    for kind, cell in network.cells.items():
        w = jax.lax.stop_gradient(jnp.asarray(weights[kind]))
        is_op = np.array([[op != NONE for op in edge.ops] for edge in cell.edges])
        if w.shape != is_op.shape:
            raise ValueError(f"The weights of {kind!r} must have the shape {is_op.shape}; got {w.shape}.")
        if not isinstance(w, Tracer):
            check_finite(kind, np.asarray(w))
        candidate_weights = w if keep is None else jnp.where(is_op, w, -jnp.inf)
        kept = jax.nn.one_hot(candidate_weights.argmax(1), is_op.shape[1], dtype=w.dtype) * is_op
        if keep is not None:
            strongest, strength = jnp.zeros(len(w), w.dtype), candidate_weights.max(1)
            for node in sorted({edge.target for edge in cell.edges}):
                edges_into_node = np.array([e for e, edge in enumerate(cell.edges) if edge.target == node])
                # Of equal strengths, `top_k` takes the first.
                first = jax.lax.top_k(strength[edges_into_node], min(keep, len(edges_into_node)))[1]
                strongest = strongest.at[jnp.asarray(edges_into_node)[first]].set(1.0)
            kept = kept * strongest[:, None]
        chosen[kind] = kept
    return chosen


def softmax(temperature: Schedule = 1.0) -> Relaxation:
    """w = softmax(α / τ) over the ops of an edge (DARTS).

    Args:
      temperature: τ, positive, or a schedule of the inner step. With a schedule, genotypes are read at τ = 1, not at
        the temperature of the first step.

    Returns:
      A `Relaxation`.

    """
    relax = lambda alpha, cell, key, step: jax.nn.softmax(alpha / _value(temperature, step), -1)
    return Decoded(relax, softmax()) if callable(temperature) else relax


def sigmoid() -> Relaxation:
    """w = σ(α), so ops do not compete (FairDARTS).

    Returns:
      A `Relaxation`.

    Source: Chu et al., ECCV 2020, https://arxiv.org/abs/1911.12126
    """
    return lambda alpha, cell, key, step: jax.nn.sigmoid(alpha)


def gumbel_softmax(temperature: Schedule, *, hard: bool) -> Relaxation:
    """w = softmax((log softmax(α) + G) / τ) with Gumbel noise G, or a hard form of it.

        hard: onehot(argmax w) − stop(w) + w

    The hard form is the one-hot of the largest entry of w, with the gradient of w. The soft form is SNAS. The hard
    form, with a `single_path` supernet, is GDAS. The argmax is a sample of softmax(α) for any τ. The gradient of the
    hard form is biased; the bias is smaller for lower τ.

    Args:
      temperature: τ, positive, or a schedule of the inner step such as `optax.linear_schedule(10, 0.1, num_steps)`.
      hard: whether to select one op per edge.

    Returns:
      A `Relaxation`.

    Sources: Xie et al., ICLR 2019, https://arxiv.org/abs/1812.09926; Dong & Yang, CVPR 2019,
    https://arxiv.org/abs/1910.04465
    """

    def relax(alpha, cell, key, step):
        noise = jax.random.gumbel(key, alpha.shape, alpha.dtype)
        w = jax.nn.softmax((jax.nn.log_softmax(alpha, -1) + noise) / _value(temperature, step), -1)
        if not hard:
            return w
        # Exactly 1 and exactly 0: otherwise the rounding of w − stop(w) would give weight to other ops.
        chosen = jax.nn.one_hot(jnp.argmax(w, -1), w.shape[-1], dtype=w.dtype)
        return chosen + (w - jax.lax.stop_gradient(w))

    return Decoded(relax, softmax())


def uniform_path() -> Relaxation:
    """Samples one op per edge, all equally likely, whatever α is, as in single-path one-shot.

    Returns:
      A `Relaxation` without a gradient.

    Source: Guo et al., ECCV 2020, https://arxiv.org/abs/1904.00420
    """

    def relax(alpha, cell, key, step):
        index = jax.random.randint(key, alpha.shape[:1], 0, alpha.shape[1])
        return jax.nn.one_hot(index, alpha.shape[1], dtype=alpha.dtype)

    return relax


def edge_normalized(relaxation: Relaxation) -> Relaxation:
    """w[e, o] · softmax(β)[e] over the edges into the same node (PC-DARTS).

    A softmax over the ops of each edge cannot compare edges; β can.

    Args:
      relaxation: relaxation of the ops.

    Returns:
      A `Relaxation` of {"ops": α [edges, ops], "edges": β [edges]}.

    Source: Xu et al., ICLR 2020, https://arxiv.org/abs/1907.05737
    """

    def relax(alpha, cell, key, step):
        w, beta = relaxation(alpha["ops"], cell, key, step), alpha["edges"]
        targets = np.array([edge.target for edge in cell.edges])
        same = jnp.asarray(targets[:, None] == targets[None])
        # For each edge, its own entry of the softmax over the edges into its node.
        logs = jax.nn.logsumexp(jnp.where(same, beta[None], -jnp.inf), -1)
        return w * jnp.exp(beta - logs)[:, None]

    inside = decoding(relaxation)
    return relax if inside is relaxation else Decoded(relax, edge_normalized(inside))


def auxiliary_skip(relaxation: Relaxation, beta: Schedule) -> Relaxation:
    """Adds β to the weight of the skip on every edge (DARTS−).

    Then α does not measure how much a skip helps training. The auxiliary path uses the parameters of the edge's own
    skip. (A skip has parameters only if it changes the shape.)

    Args:
      relaxation: relaxation of the ops.
      beta: β, or a schedule of the inner step, such as `optax.linear_schedule(1, 0, num_steps)`, which ends at 0.
        Genotypes are read without β.

    Returns:
      A `Relaxation`.

    Raises:
      ValueError: when called, if an edge has no "skip_connect".

    Source: Chu et al., ICLR 2021, https://arxiv.org/abs/2009.01027
    """

    def relax(alpha, cell, key, step):
        if any(SKIP not in edge.ops for edge in cell.edges):
            raise ValueError(f"`auxiliary_skip` needs {SKIP!r} among the candidates of every edge.")
        w = relaxation(alpha, cell, key, step)
        skips = jnp.asarray([[op == SKIP for op in edge.ops] for edge in cell.edges], w.dtype)
        return w + _value(beta, step) * skips

    return Decoded(relax, decoding(relaxation))


def beta_decay(alpha: base.HyperParams) -> jax.Array:
    """The mean over all edges of logsumexp(α), a penalty for the outer loss (β-DARTS).

    Its gradient, softmax(α) / edges, shrinks the α of strong ops most, so that no α grows without bound.

    Args:
      alpha: kind -> [edges, ops], or a tree with such leaves.

    Returns:
      [].

    Source: Ye et al., CVPR 2022, https://arxiv.org/abs/2203.01665
    """
    return jnp.concatenate([jax.nn.logsumexp(leaf, -1) for leaf in jax.tree.leaves(alpha) if leaf.ndim > 1]).mean()


def dominant_eigenvalue(loss: Callable, point: base.PyTree, key: jax.Array, *, num_steps: int = 20) -> jax.Array:
    """The eigenvalue of ∇² loss at `point` with the largest absolute value, by Lanczos iterations.

    Each iteration takes one Hessian-vector product, forward over reverse. The vectors are kept orthogonal. The error
    falls exponentially in `num_steps` times the root of the relative gap. It is zero if `num_steps` reaches the number
    of dimensions.

    Args:
      loss: `(point) -> []`, twice differentiable.
      point: a tree of floating-point arrays, such as α.
      key: key of the first vector.
      num_steps: at least 1; at most as many steps are taken as there are dimensions.

    Returns:
      [], with its sign.

    Source: Zela et al., ICLR 2020, https://arxiv.org/abs/1909.09656, for ∇²α of the validation loss
    """
    flat, unravel = ravel_pytree(point)
    steps = min(num_steps, flat.size)
    product = lambda v: jax.jvp(jax.grad(lambda x: loss(unravel(x))), (flat,), (v,))[1]
    start = jax.random.normal(key, flat.shape, flat.dtype)

    def step(carry, i):
        basis, v = carry
        basis = basis.at[i].set(v)
        w = product(v)
        diagonal = w @ v
        for _ in range(2):  # twice, to remove rounding errors
            w = w - basis.T @ (basis @ w)
        norm = jnp.linalg.norm(w)
        # If the Krylov space is exhausted, the next vector and its coupling are 0.
        small = norm <= 1e-6 * jnp.maximum(jnp.abs(diagonal), jnp.finfo(flat.dtype).tiny)
        return (basis, jnp.where(small, 0, w / jnp.where(small, 1, norm))), (diagonal, jnp.where(small, 0, norm))

    basis = jnp.zeros((steps, flat.size), flat.dtype)
    _, (diagonal, off) = jax.lax.scan(step, (basis, start / jnp.linalg.norm(start)), jnp.arange(steps))
    off = off[:-1]
    values = jnp.linalg.eigvalsh(jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
    return values[jnp.argmax(jnp.abs(values))]
