"""Relaxations: from α to mixing weights; and what keeps a search from collapsing.

A **relaxation** is a function `(alpha, cell, key, step) -> weights [edges, ops]` of one kind of cell; key and step are
those of `base.Context`, for noise and schedules. Those below are made by functions, and wrap one another.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from metaopt import base
from metaopt.nas._genotypes import NONE, SKIP, check_finite, edges_kept
from metaopt.nas._specs import Cell, Space

Schedule = float | Callable[[Any], Any]  # a number, or step -> number, as optax has them


class Relaxation(Protocol):
    def __call__(self, alpha: Any, cell: Cell, key: jax.Array, step: jax.Array | int) -> jax.Array:
        """Mixing weights [edges, ops] of one kind of cell."""
        ...


class Decoded(NamedTuple):
    """A relaxation with noise or a schedule, and the one by which genotypes are read from its α.

    Attributes:
      relax: from α to the weights that train.
      decode: from α to the weights that a genotype is read from.
    """

    relax: Relaxation
    decode: Relaxation

    def __call__(self, alpha, cell, key, step):
        return self.relax(alpha, cell, key, step)


def decoding(relaxation: Relaxation) -> Relaxation:
    """The relaxation by which genotypes are read: without what only training has.

    Args:
      relaxation: any; of `gumbel_softmax` the softmax without noise, of `auxiliary_skip` what it wraps, of a `softmax`
        with a schedule that of temperature 1.

    Returns:
      A `Relaxation`; the same one where nothing else is known.
    """
    return relaxation.decode if isinstance(relaxation, Decoded) else relaxation


def check_relaxation(name: str, value: Any) -> None:
    """Refuses what is no relaxation.

    Args:
      name: what the message calls it.
      value: what was given.

    Raises:
      ValueError: it is no function, or one that does not take (alpha, cell, key, step), such as `softmax` itself, which
        makes one.
    """
    takes = callable(value)
    if takes:
        try:
            inspect.signature(value).bind(*[None] * 4)
        except ValueError:  # of a function that says nothing of its arguments
            pass
        except TypeError:
            takes = False
    if not takes:
        made = "; call it, if it makes one" if callable(value) else ""
        raise ValueError(
            f"`{name}` must be a function `(alpha, cell, key, step) -> weights [edges, ops]`, such as `nas.softmax()` "
            f"gives; got {value!r}{made}."
        )


def _check_temperature(temperature: Schedule) -> None:
    """Of a number that is known: what a schedule or a traced one gives is known where it runs."""
    if not callable(temperature) and not isinstance(temperature, Tracer):
        if np.ndim(temperature):
            raise ValueError(f"`temperature` must be one number; got shape {np.shape(temperature)}.")
        base.check_positive("temperature", temperature)


def _at(schedule: Schedule, step) -> Any:
    return schedule(step) if callable(schedule) else schedule


def mixing_weights(
    relaxation: Relaxation,
    network: Space,
    alpha: base.HyperParams,
    key: jax.Array,
    step: jax.Array | int = 0,
) -> dict[str, jax.Array]:
    """The mixing weights of all kinds of cells, with a key for each.

    Args:
      relaxation: from α to weights.
      network: a supernet's spec.
      alpha: kind -> α.
      key: a PRNG key.
      step: of a schedule.

    Returns:
      kind -> [edges, ops].

    Raises:
      ValueError: the kinds of α are not those of the network.
    """
    if not isinstance(alpha, Mapping) or set(alpha) != set(network.cells):
        got = f"the kinds {sorted(map(str, alpha))}" if isinstance(alpha, Mapping) else type(alpha).__name__
        raise ValueError(
            f"α must have a leaf for each kind of cell of the network, {sorted(network.cells)}; got {got}. It is of "
            "another search, or not α alone."
        )
    kinds = network.cells.items()
    return {k: relaxation(alpha[k], cell, jax.random.fold_in(key, i), step) for i, (k, cell) in enumerate(kinds)}


def discretized(network: Space, weights: Mapping[str, Any]) -> dict[str, jax.Array]:
    """`one_hot(network, discretize(network, weights))`, for weights that are traced.

    Args:
      network: a supernet's, whose `keep` says how many edges are kept.
      weights: kind -> [edges, ops], not negative.

    Returns:
      kind -> [edges, ops]: 1 for the ops that are kept, 0 elsewhere. Constant for derivatives.

    Raises:
      ValueError: the weights do not have the network's shape; some are NaN or infinite, where they are not traced; the
        network is one of NAS-Bench-101.
    """
    keep, found = edges_kept(network, "space"), {}
    for kind, cell in network.cells.items():
        w = jax.lax.stop_gradient(jnp.asarray(weights[kind]))
        some = np.array([[op != NONE for op in edge.ops] for edge in cell.edges])
        if w.shape != some.shape:
            raise ValueError(f"The weights of {kind!r} must have the shape {some.shape}; got {w.shape}.")
        if not isinstance(w, Tracer):
            check_finite(kind, np.asarray(w))
        among = w if keep is None else jnp.where(some, w, -jnp.inf)
        kept = jax.nn.one_hot(among.argmax(1), some.shape[1], dtype=w.dtype) * some
        if keep is not None:
            strongest = jnp.zeros(len(w), w.dtype)
            for node in sorted({edge.target for edge in cell.edges}):
                into = np.array([e for e, edge in enumerate(cell.edges) if edge.target == node])
                first = jax.lax.top_k(among.max(1)[into], min(keep, len(into)))[1]  # of equal ones the first
                strongest = strongest.at[jnp.asarray(into)[first]].set(1.0)
            kept = kept * strongest[:, None]
        found[kind] = kept
    return found


def softmax(temperature: Schedule = 1.0) -> Relaxation:
    """w = softmax(α / τ) over the ops of an edge (DARTS).

    Args:
      temperature: τ, positive, or a schedule of the inner step; genotypes are read at τ = 1 then (`decoding`), and
        not at the temperature of the first step.

    Returns:
      A `Relaxation`.

    Raises:
      ValueError: `temperature` is neither a schedule nor one positive number.
    """
    _check_temperature(temperature)
    relax = lambda alpha, cell, key, step: jax.nn.softmax(alpha / _at(temperature, step), -1)
    return Decoded(relax, softmax()) if callable(temperature) else relax


def sigmoid() -> Relaxation:
    """w = σ(α): ops do not compete (FairDARTS).

    Returns:
      A `Relaxation`.

    Source: Chu et al., ECCV 2020, https://arxiv.org/abs/1911.12126
    """
    return lambda alpha, cell, key, step: jax.nn.sigmoid(alpha)


def gumbel_softmax(temperature: Schedule, *, hard: bool) -> Relaxation:
    """w = softmax((log softmax(α) + G) / τ), G Gumbel noise; or its largest entry's one-hot, with the gradient of w.

        hard: onehot(argmax w) − stop(w) + w

    Soft is SNAS; hard, with a `single_path` supernet, is GDAS. The argmax is a sample of softmax(α), whatever τ. The
    hard form's gradient is biased, by the less the lower τ is.

    Args:
      temperature: τ, positive, or a schedule of the inner step such as `optax.linear_schedule(10, 0.1, num_steps)`.
      hard: one op an edge.

    Returns:
      A `Relaxation`.

    Raises:
      ValueError: `temperature` is neither a schedule nor one positive number.

    Sources: Xie et al., ICLR 2019, https://arxiv.org/abs/1812.09926; Dong & Yang, CVPR 2019,
    https://arxiv.org/abs/1910.04465
    """
    _check_temperature(temperature)

    def relax(alpha, cell, key, step):
        noise = jax.random.gumbel(key, alpha.shape, alpha.dtype)
        w = jax.nn.softmax((jax.nn.log_softmax(alpha, -1) + noise) / _at(temperature, step), -1)
        if not hard:
            return w
        # 1 exactly, and 0 exactly: the rounding of w − stop(w) would let other ops in.
        chosen = jax.nn.one_hot(jnp.argmax(w, -1), w.shape[-1], dtype=w.dtype)
        return chosen + (w - jax.lax.stop_gradient(w))

    return Decoded(relax, softmax())


def uniform_path() -> Relaxation:
    """One op an edge, each alike, whatever α is: single-path one-shot's sampling.

    Returns:
      A `Relaxation` without a gradient.

    Source: Guo et al., ECCV 2020, https://arxiv.org/abs/1904.00420
    """

    def relax(alpha, cell, key, step):
        index = jax.random.randint(key, alpha.shape[:1], 0, alpha.shape[1])
        return jax.nn.one_hot(index, alpha.shape[1], dtype=alpha.dtype)

    return relax


def edge_normalized(relaxation: Relaxation) -> Relaxation:
    """w[e, o] · softmax(β)[e] over the edges into the same node (PC-DARTS): a softmax an edge cannot tell edges apart.

    Args:
      relaxation: of the ops.

    Returns:
      A `Relaxation` of {"ops": α [edges, ops], "edges": β [edges]}.

    Raises:
      ValueError: `relaxation` is none.

    Source: Xu et al., ICLR 2020, https://arxiv.org/abs/1907.05737
    """

    check_relaxation("relaxation", relaxation)

    def relax(alpha, cell, key, step):
        w, beta = relaxation(alpha["ops"], cell, key, step), alpha["edges"]
        targets = np.array([edge.target for edge in cell.edges])
        same = jnp.asarray(targets[:, None] == targets[None])
        # A softmax over each row's own group, of which the row's own entry is taken.
        logs = jax.nn.logsumexp(jnp.where(same, beta[None], -jnp.inf), -1)
        return w * jnp.exp(beta - logs)[:, None]

    inside = decoding(relaxation)
    return relax if inside is relaxation else Decoded(relax, edge_normalized(inside))


def auxiliary_skip(relaxation: Relaxation, beta: Schedule) -> Relaxation:
    """β more weight on skipping, on every edge (DARTS−): what a skip gives to training is not laid to α's account.

    The auxiliary path has the parameters of the edge's own skip, where it has any: at a stride.

    Args:
      relaxation: of the ops.
      beta: β, or a schedule of the inner step, such as `optax.linear_schedule(1, 0, num_steps)`: at its end nothing is
        left. Genotypes are read by the relaxation alone (`decoding`).

    Returns:
      A `Relaxation`.

    Raises:
      ValueError: `relaxation` is none; when called, an edge has no "skip_connect".

    Source: Chu et al., ICLR 2021, https://arxiv.org/abs/2009.01027
    """

    check_relaxation("relaxation", relaxation)

    def relax(alpha, cell, key, step):
        if any(SKIP not in edge.ops for edge in cell.edges):
            raise ValueError(f"`auxiliary_skip` needs {SKIP!r} among the candidates of every edge.")
        w = relaxation(alpha, cell, key, step)
        skips = jnp.asarray([[op == SKIP for op in edge.ops] for edge in cell.edges], w.dtype)
        return w + _at(beta, step) * skips

    return Decoded(relax, decoding(relaxation))


def beta_decay(alpha: base.HyperParams) -> jax.Array:
    """The mean over all edges of logsumexp(α), a penalty for the outer loss (β-DARTS).

    Its gradient, softmax(α) / edges, shrinks the α of strong ops most, so that none runs away.

    Args:
      alpha: kind -> [edges, ops], or a tree with such leaves.

    Returns:
      [].

    Source: Ye et al., CVPR 2022, https://arxiv.org/abs/2203.01665
    """
    return jnp.concatenate([jax.nn.logsumexp(leaf, -1) for leaf in jax.tree.leaves(alpha) if leaf.ndim > 1]).mean()


def dominant_eigenvalue(loss: Callable, at: base.PyTree, key: jax.Array, *, num_steps: int = 20) -> jax.Array:
    """The eigenvalue of ∇² loss at `at` that is largest in absolute value, by Lanczos iterations.

    Each takes one Hessian-vector product, forward over reverse; the vectors are kept orthogonal. The error falls
    exponentially in `num_steps` over the root of the relative gap, and is zero at the number of dimensions.

    Args:
      loss: `(at) -> []`, twice differentiable.
      at: a tree of floating-point arrays, such as α.
      key: of the first vector.
      num_steps: at least 1; no more than there are dimensions are taken.

    Returns:
      [], with its sign.

    Raises:
      ValueError: `num_steps` is below 1.

    Source: Zela et al., ICLR 2020, https://arxiv.org/abs/1909.09656, of ∇²α of the validation loss
    """
    base.check_integer("num_steps", num_steps, 1)
    flat, unravel = ravel_pytree(at)
    steps = min(num_steps, flat.size)
    product = lambda v: jax.jvp(jax.grad(lambda x: loss(unravel(x))), (flat,), (v,))[1]
    start = jax.random.normal(key, flat.shape, flat.dtype)

    def step(carry, i):
        basis, v = carry
        basis = basis.at[i].set(v)
        w = product(v)
        diagonal = w @ v
        for _ in range(2):  # twice, against rounding
            w = w - basis.T @ (basis @ w)
        norm = jnp.linalg.norm(w)
        # Where the space is exhausted nothing follows, and nothing couples to it.
        small = norm <= 1e-6 * jnp.maximum(jnp.abs(diagonal), jnp.finfo(flat.dtype).tiny)
        return (basis, jnp.where(small, 0, w / jnp.where(small, 1, norm))), (diagonal, jnp.where(small, 0, norm))

    basis = jnp.zeros((steps, flat.size), flat.dtype)
    _, (diagonal, off) = jax.lax.scan(step, (basis, start / jnp.linalg.norm(start)), jnp.arange(steps))
    off = off[:-1]
    values = jnp.linalg.eigvalsh(jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
    return values[jnp.argmax(jnp.abs(values))]
