"""Training-free scores: predictions of how well a network will train, from its initialization; larger is better.

All scores have the form `(supernet, params, weights, batch) -> []`. A discrete network has `weights=None`. For a
supernet with `single_path`, `weights` are the one-hot weights of a genotype; one program then serves all genotypes. A
score costs one backward pass on one batch (`nwot`: a forward pass), and holds for one draw of the parameters. Rows that
the "mask" [N] of the batch marks as padding do not count: a score equals the score of the real rows only, up to
rounding. If nothing arrives at the output, `synflow` and `jacob_cov` are −inf, and the scores from the gradient of the
loss are small.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from metaopt import _jaxpr, base
from metaopt._batches import check_labels, row_mask
from metaopt._jaxpr import Literal
from metaopt.inner import cross_entropy
from metaopt.nas._ops import NORMALIZATION
from metaopt.nas._supernet import Supernet, Weights


class Score(Protocol):
    def __call__(
        self, supernet: Supernet, params: base.Params, weights: Weights | None, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        """[], larger is better."""
        ...


def _loss(supernet, params, weights, batch, loss) -> jax.Array:
    if loss is cross_entropy:
        check_labels(batch, supernet.network.num_outputs)
    return loss(_outputs(supernet, params, weights, batch), batch)


def _outputs(supernet, params, weights, batch) -> jax.Array:
    """Calls `apply` with only three arguments if the batch has no padding, so that your own `apply` needs no more."""
    mask = row_mask(batch)
    mask_args = () if mask is None else (None, mask)
    return supernet.apply(params, weights, batch["x"], *mask_args)


def _rows_mask(batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """The mask for a score that can leave out only whole rows; raises ValueError if the batch masks parts of rows."""
    mask = row_mask(batch)
    if mask is None and batch.get("mask") is not None:
        raise ValueError(
            f"The score needs a mask of rows, [N] = {batch['x'].shape[:1]}, since it cannot leave out parts of rows; "
            f'got shape {jnp.shape(batch["mask"])}. If there is no padding, leave "mask" out of the batch.'
        )
    return mask


def _each_weight(params: base.Params) -> list[tuple[jax.Array, int]]:
    """The convolutions and matrices in params, each with its number of stacking axes.

    Stacking axes are leading axes over layers and edges. Biases are left out.
    """
    each = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [getattr(entry, "key", None) for entry in path]
        # Parameters in "layers" are stacked by layer; those of a cell's ops also by edge.
        stacked = 0 if keys[0] != "layers" else 2 if keys[2:3] == ["edges"] else 1
        if leaf.ndim - stacked >= 2:
            each.append((leaf, stacked))
    return each


def grad_norm(
    supernet: Supernet,
    params: base.Params,
    weights: Weights | None,
    batch: Mapping[str, jax.Array],
    *,
    loss: Callable = cross_entropy,
) -> jax.Array:
    """Σ_W ‖∂L/∂W‖₂ over the convolutions and matrices W, with one norm for each.

    Args:
      supernet: a supernet of `nas.supernet`.
      params: its initial parameters.
      weights: one-hot mixing weights, or None.
      batch: {"x": [N, *in_shape], "y": labels in the form that `loss` takes}.
      loss: L, `(outputs [N, num_outputs], batch) -> []`; by default `cross_entropy`, with labels "y" [N].

    Returns:
      [], the score.

    Raises:
      ValueError: if `loss` is the default and labels are not classes (not checked for traced labels).

    Source: Abdelfattah et al., ICLR 2021, https://arxiv.org/abs/2101.08134
    """
    grads = jax.grad(lambda params: _loss(supernet, params, weights, batch, loss))(params)
    norms = [jnp.sqrt((g**2).sum(tuple(range(stacked, g.ndim)))).sum() for g, stacked in _each_weight(grads)]
    return sum(norms, jnp.zeros(()))


def snip(
    supernet: Supernet,
    params: base.Params,
    weights: Weights | None,
    batch: Mapping[str, jax.Array],
    *,
    loss: Callable = cross_entropy,
) -> jax.Array:
    """Σ |θ · ∂L/∂θ| over the entries of convolutions and matrices.

    Args:
      supernet: as for `grad_norm`.
      params: as for `grad_norm`.
      weights: as for `grad_norm`.
      batch: as for `grad_norm`.
      loss: as for `grad_norm`.

    Returns:
      [].

    Source: Lee, Ajanthan & Torr, ICLR 2019, https://arxiv.org/abs/1810.02340
    """
    grads = jax.grad(lambda params: _loss(supernet, params, weights, batch, loss))(params)
    pairs = zip(_each_weight(params), _each_weight(grads), strict=True)
    return sum((abs(p * g).sum() for (p, _), (g, _) in pairs), jnp.zeros(()))


def synflow(
    supernet: Supernet, params: base.Params, weights: Weights | None, batch: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """log Σ |θ · ∂R/∂θ|, R = the sum of the outputs for an input of ones, with |θ| and without any normalization.

    It needs no data. It removes the normalization of `nas.normalized`. If your own op normalizes in another way, that
    normalization stays. Input and output are scaled by 1e-15, so that sums up to 1e50 fit into float32; networks of 17
    cells reach 1e40. The scaling is correct if outputs are proportional to inputs, as with convolutions, pooling and
    ReLU. Nonzero biases, GELU and attention (the blocks "mlp" and "attention") break this, and the score is then
    meaningless.

    Args:
      supernet: as for `grad_norm`.
      params: as for `grad_norm`.
      weights: as for `grad_norm`.
      batch: not used.

    Returns:
      [].

    Source: Tanaka et al., NeurIPS 2020, https://arxiv.org/abs/2006.05467; as a score Abdelfattah et al., ICLR 2021
    """
    del batch
    scale = 1e-15  # of input and output, so that products in between neither overflow nor underflow
    # Two rows, of which only one counts: `apply` rejects a single row before the normalization is removed.
    ones = jnp.full((2, *supernet.in_shape), scale)
    plain = _without_normalization(lambda params: supernet.apply(params, weights, ones)[:1].sum() * scale)
    positive = jax.tree.map(jnp.abs, params)
    grads = jax.grad(plain)(positive)
    pairs = zip(_each_weight(positive), _each_weight(grads), strict=True)
    total = sum((abs(p * g).sum() for (p, _), (g, _) in pairs), jnp.zeros(()))
    return jnp.log(total) - 2 * jnp.log(scale)


def jacob_cov(
    supernet: Supernet, params: base.Params, weights: Weights | None, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """−Σ_i log(λ_i + k) + 1/(λ_i + k), a score of how well the network distinguishes inputs.

    λ are the eigenvalues of the correlation matrix [N, N] of the inputs' Jacobians, the rows J_n = ∂ Σ outputs / ∂x_n,
    and k = 1e-5. The score is at most −N, for uncorrelated rows.

    Args:
      supernet: as for `grad_norm`.
      params: as for `grad_norm`.
      weights: as for `grad_norm`.
      batch: {"x": [N, *in_shape]}, with N at least 2.

    Returns:
      [].

    Raises:
      ValueError: if the mask of the batch is not a mask of rows.

    Source: Mellor et al., 2020, https://arxiv.org/abs/2006.04647v1
    """
    x, mask = jnp.asarray(batch["x"], jnp.result_type(batch["x"], float)), _rows_mask(batch)
    real = None if mask is None else jnp.asarray(mask) > 0
    total = lambda outputs: outputs.sum()
    if real is not None:
        total = lambda outputs: jnp.where(real.reshape(-1, *[1] * (outputs.ndim - 1)), outputs, 0).sum()
    rows = jax.grad(lambda x: total(_outputs(supernet, params, weights, {**batch, "x": x})))(x).reshape(len(x), -1)
    centered = rows - rows.mean(1, keepdims=True)
    if real is not None:
        centered = jnp.where(real[:, None], centered, 0)
    # Divide by the largest entry first: products of small numbers vanish in float32.
    centered = centered / jnp.maximum(abs(centered).max(), jnp.finfo(rows.dtype).tiny)
    lengths = jnp.sqrt((centered**2).sum(1, keepdims=True))
    unit = centered / jnp.where(lengths > 0, lengths, 1)
    if real is None:
        all_rows_vary, correlations, padding = (lengths > 0).all(), unit @ unit.T, 0.0
    else:  # each padding row adds an eigenvalue 1, whose term is removed
        all_rows_vary = ((lengths[:, 0] > 0) | ~real).all()
        correlations = unit @ unit.T + jnp.diag((~real).astype(unit.dtype))
        padding = (~real).sum() * (jnp.log1p(1e-5) + 1 / (1 + 1e-5))
    values = jnp.linalg.eigvalsh(correlations).clip(0) + 1e-5
    return jnp.where(all_rows_vary, padding - (jnp.log(values) + 1 / values).sum(), -jnp.inf)


def nwot(supernet: Supernet, params: base.Params, weights: Weights | None, batch: Mapping[str, jax.Array]) -> jax.Array:
    """log |det K|, where K_ij counts the ReLUs at which inputs i and j are on the same side: NASWOT.

        K = C Cᵀ + (1 − C)(1 − C)ᵀ,    C[n, r] = 1 if the ReLU r is positive for the input n

    A ReLU is `jax.nn.relu`, or any maximum of the number 0 and an array of N rows, in an op that runs.

    Args:
      supernet: as for `grad_norm`.
      params: as for `grad_norm`.
      weights: as for `grad_norm`; a supernet without `single_path` counts the ReLUs of all its ops.
      batch: {"x": [N, *in_shape]}.

    Returns:
      []; −inf if two inputs are on the same side at every ReLU.

    Raises:
      ValueError: if the network has no ReLU, or if the mask of the batch is not a mask of rows.

    Source: Mellor et al., ICML 2021, https://arxiv.org/abs/2006.04647
    """
    x, mask = batch["x"], _rows_mask(batch)
    args = (params, weights, x) if mask is None else (params, weights, x, None, mask)
    closed = jax.make_jaxpr(supernet.apply)(*args)
    if not _holds_relu(closed.jaxpr, len(x)):
        raise ValueError("`nwot` needs the signs of ReLU inputs, but this network has no ReLU.")
    _, kernel = _agreements(closed.jaxpr, closed.consts, jax.tree.leaves(args), len(x))
    if mask is not None:  # each padding row becomes a separate block with determinant 1
        real = jnp.asarray(mask) > 0
        kernel = jnp.where(real[:, None] & real[None], kernel, 0) + jnp.diag((~real).astype(kernel.dtype))
    sign, log = jnp.linalg.slogdet(kernel)
    return jnp.where(sign > 0, log, -jnp.inf)


SCORES: dict[str, Score] = {
    "synflow": synflow,
    "jacob_cov": jacob_cov,
    "nwot": nwot,
    "grad_norm": grad_norm,
    "snip": snip,
}


# ---- Inspecting a network -------------------------------------------------------------------------------------------


def gradient_features(
    supernet: Supernet,
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    loss: Callable = cross_entropy,
    num_keys: int = 2,
) -> jax.Array:
    """Computes gradients with respect to each op's weight at initialization, as features of a task for a predictor h.

        d[o] = mean over initializations and edges e of (∂L/∂w[e, o] − mean_o' ∂L/∂w[e, o'])

    The gradients are at equal mixing weights. If d[o] is negative, a larger weight of op o lowers the loss at
    initialization more than a larger weight of the average op.

    Args:
      supernet: a supernet of a space, without `single_path`: ops that do not run would get no gradient.
      key: key of the initializations.
      batch: {"x": [N, *in_shape], "y": labels in the form that `loss` takes}; two training batches are enough rows.
      loss: L, `(outputs [N, num_outputs], batch) -> []`; by default `cross_entropy`, with labels "y" [N].
      num_keys: number of initializations, at least 1.

    Returns:
      [K], the features of the ops, one kind of cell after another. The features of each kind have norm 1.

    Raises:
      ValueError: if the supernet has `single_path`, or if labels are not classes.
    """
    if supernet.single_path:
        raise ValueError(
            "`supernet` runs only one op per edge (`single_path`), so the other ops get no gradient. Pass a "
            "`nas.supernet` of the same spec without `single_path`."
        )
    sizes = {kind: (len(cell.edges), len(cell.edges[0].ops)) for kind, cell in supernet.network.cells.items()}
    equal = {kind: jnp.full(size, 1 / size[1]) for kind, size in sizes.items()}
    value = lambda w, key: _loss(supernet, supernet.init(key), w, batch, loss)
    w = jax.lax.map(lambda key: jax.grad(value)(equal, key), jax.random.split(key, num_keys))
    ops = [(w[kind] - w[kind].mean(-1, keepdims=True)).mean((0, 1)) for kind in sizes]
    return jnp.concatenate([x / (jnp.linalg.norm(x) + 1e-6) for x in ops])


def _without_normalization(fn: Callable[[base.Params], jax.Array]) -> Callable[[base.Params], jax.Array]:
    """`fn` with every `nas.normalized` replaced by the identity."""

    def identity(equation: Any) -> Callable | None:
        return (lambda x, epsilon: x) if equation.params.get("name") == NORMALIZATION else None

    def plain(params):
        closed = jax.make_jaxpr(fn)(params)
        return _jaxpr.evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(params), identity)[0]

    return plain


def _is_relu(equation: Any, num_rows: int) -> bool:
    zeros = [v for v in equation.invars if isinstance(v, Literal) and jnp.ndim(v.val) == 0 and v.val == 0]
    shape = getattr(equation.outvars[0].aval, "shape", ())
    return equation.primitive.name == "max" and bool(zeros) and len(shape) > 1 and shape[0] == num_rows


def _holds_relu(jaxpr: Any, num_rows: int) -> bool:
    return any(_is_relu(equation, num_rows) for equation in _jaxpr.equations(jaxpr))


def _agreements(jaxpr: Any, consts: Any, args: Any, num_rows: int) -> tuple[list, jax.Array]:
    """The outputs of a jaxpr, and K [N, N], which counts the ReLUs at which two rows are on the same side."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    kernel = jnp.zeros((num_rows, num_rows))
    run = lambda closed, *operands: _agreements(closed.jaxpr, closed.consts, operands, num_rows)
    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        name, params, kernel_increment = equation.primitive.name, equation.params, 0.0
        if not any(_is_relu(inner, num_rows) for inner in _jaxpr.equations_inside(equation)):
            outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
            outputs = outputs if equation.primitive.multiple_results else [outputs]
            if _is_relu(equation, num_rows):
                active = (outputs[0] > 0).reshape(num_rows, -1).astype(kernel.dtype)
                kernel_increment = active @ active.T + (1 - active) @ (1 - active).T
        elif name == "cond":
            index, *rest = operands
            branches = [lambda *a, b=b: run(b, *a) for b in params["branches"]]
            outputs, kernel_increment = jax.lax.switch(index, branches, *rest)
        elif name == "scan":
            # Newer versions of JAX have no parameter `num_consts`, so the ranks tell the three kinds of operands apart.
            # Constants and carries have the same rank in the body. Scanned values have one more axis outside.
            # The order is: operands (constants, carries, xs), outputs (carries, ys).
            closed = params["jaxpr"]
            num_ys = sum(v.aval.ndim > a.ndim for v, a in zip(equation.outvars, closed.out_avals, strict=True))
            num_xs = sum(v.aval.ndim > a.ndim for v, a in zip(equation.invars, closed.in_avals, strict=True))
            num_carry = len(equation.outvars) - num_ys
            num_consts = len(operands) - num_carry - num_xs
            fixed, carry, xs = (
                operands[:num_consts],
                operands[num_consts : num_consts + num_carry],
                operands[num_consts + num_carry :],
            )

            def body(carry, x, fixed=fixed, num_carry=num_carry, closed=closed):
                carry, kernel = carry
                outputs, kernel_increment = run(closed, *fixed, *carry, *x)
                return (outputs[:num_carry], kernel + kernel_increment), outputs[num_carry:]

            start = (carry, jnp.zeros_like(kernel))
            (carry, kernel_increment), ys = jax.lax.scan(body, start, xs, params["length"], params["reverse"])
            outputs = [*carry, *ys]
        else:  # nested calls, functions with a custom derivative, checkpoints: run inline, once
            inner = params.get("call_jaxpr", params.get("fun_jaxpr", params.get("jaxpr")))
            if name == "while" or inner is None:
                raise ValueError(f"`nwot` cannot count ReLUs inside {name!r}.")
            consts = getattr(inner, "consts", ())
            outputs, kernel_increment = _agreements(getattr(inner, "jaxpr", inner), consts, operands, num_rows)
        kernel = kernel + kernel_increment
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars], kernel
