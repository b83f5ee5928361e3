"""Few-shot methods whose linear head is computed from the support set: prototypes and ridge regression.

A new method of this kind is a function `(features [N, D], λ, support) -> {"w": [D, W], "b": [W]}` and an alias that
passes it to `_with_head`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import _batches, inner
from metaopt.few_shot._adaptation import Adaptation, adaptation


def linear_head(features: Callable) -> Callable:
    """Returns `(params, batch) -> outputs` [N, W] of a linear head on features: x ↦ features(x) w + b.

    Args:
      features: `(params, batch) -> [N, D]`, of a batch with "x" and "mask": `conv4(...).features`, or any other.

    Returns:
      A function of `params` with "head": {"w": [D, W], "b": [W]}, and of a batch with "x". Pass it to `adapted`.
    """
    return lambda params, batch: features(params, batch) @ params["head"]["w"] + params["head"]["b"][None]


def proto_maml(features: Callable, *, num_steps: int = 5, rate: float = 0.01, **options: Any) -> Adaptation:
    """Proto-MAML: MAML whose head starts at the prototypes p_c, the mean features of each class in the support set:

        w_c = 2 p_c,    b_c = −|p_c|²,    so that the first logits are −|x − p_c|² up to a term shared by all classes.

    Args:
      features: `(params, batch) -> [N, D]`; λ["init"] is a dict.
      num_steps: T; 0 is a prototypical network.
      rate: α.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` for episodes with classes; `linear_head(features)` predicts.

    Source: Triantafillou et al., ICLR 2020, Sec. 3.2, https://arxiv.org/abs/1903.03096
    """

    return _with_head(features, _prototypes, inner.cross_entropy, num_steps=num_steps, rate=rate, **options)


def _prototypes(x: jax.Array, hyperparams: Mapping[str, Any], data: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The head of `proto_maml` from features [N, D] of the support set."""
    weights = _batches.one_hot(data, x.dtype)
    total = weights.sum(0)
    means = (weights.T @ x) / jnp.where(total > 0, total, 1)[:, None]  # a class without rows has the prototype 0
    return {"w": 2 * means.T, "b": -(means**2).sum(-1)}


def prototypical_networks(features: Callable, **options: Any) -> Adaptation:
    """Prototypical networks: the nearest class mean in feature space, p(c | x) ∝ exp(−|x − p_c|²); no inner steps.

    Args:
      features: as for `proto_maml`.
      **options: as for `adaptation`.

    Returns:
      An `Adaptation` for episodes with classes; `linear_head(features)` predicts.

    Source: Snell, Swersky & Zemel, NeurIPS 2017, https://arxiv.org/abs/1703.05175
    """
    return proto_maml(features, num_steps=0, **options)


def ridge_head(features: Callable, *, loss: Callable = inner.cross_entropy, **options: Any) -> Adaptation:
    """R2D2: the head is a ridge regression on the support set, solved exactly and differentiated:

        W = argmin_W |X W − Y|² + ρ |W|² = Xᵀ (X Xᵀ + ρ I)⁻¹ Y,    outputs = scale · X W + shift,

    where X holds the features and, as in the authors' code, a column of ones for an intercept, which is a row of W. The
    penalty shrinks the intercept too, so subtract the mean from targets that are far from 0. The smaller of the two
    linear systems is solved. ρ, scale and shift are learned: λ has "log_ridge", "scale" and "shift".
    If the "mask" of a row is a fraction m, the squared error of this row has the weight m.

    Args:
      features: `(params, batch) -> [N, D]`; λ["init"] is a dict.
      loss: `(outputs, batch) -> []`: `inner.cross_entropy` (Y is one-hot), or `mean_squared_error` (Y is "y" [N, W]).
      **options: as for `adaptation`. With `num_steps`, the head and the features adapt from this start.

    Returns:
      An `Adaptation`; `linear_head(features)` predicts.

    Raises:
      ValueError: if, at trace time, "y" is neither integers [N] nor numbers [N, W].

    Source: Bertinetto et al., ICLR 2019, https://arxiv.org/abs/1805.08136. MetaOptNet uses a support vector machine
      instead: Lee et al., CVPR 2019, https://arxiv.org/abs/1904.03758
    """

    extra = {"log_ridge": jnp.zeros([]), "scale": jnp.ones([]), "shift": jnp.zeros([])}
    return _with_head(features, _ridge_regression, loss, extra=extra, **{"num_steps": 0, **options})


def _ridge_regression(
    x: jax.Array, hyperparams: Mapping[str, Any], data: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The head of `ridge_head` from features [N, D] of the support set."""
    classes = jnp.issubdtype(data["y"].dtype, jnp.integer)
    if data["y"].ndim != (1 if classes else 2):
        raise ValueError(
            '`ridge_head` takes a support set whose "y" is integers [N], or numbers [N, W] (for one target, '
            f"pass `y[:, None]`); got {data['y'].dtype} of shape {data['y'].shape}."
        )
    mask = data["mask"][:, None]
    y = _batches.one_hot(data, x.dtype) if classes else data["y"] * mask
    x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
    ridge = jnp.exp(hyperparams["log_ridge"])
    regular = lambda matrix: matrix + ridge * jnp.eye(len(matrix), dtype=matrix.dtype)
    if x.shape[0] <= x.shape[1]:
        w = x.T @ jax.scipy.linalg.solve(regular(mask * (x @ x.T)), y)
    else:
        w = jax.scipy.linalg.solve(regular(x.T @ (mask * x)), x.T @ y, assume_a="pos")
    return {"w": hyperparams["scale"] * w[:-1], "b": hyperparams["scale"] * w[-1] + hyperparams["shift"]}


def _with_head(features: Callable, make: Callable, loss: Callable, **options: Any) -> Adaptation:
    """Returns an adaptation whose head is `make(features [N, D], λ, support)`."""
    head = linear_head(features)

    def init(key, hyperparams, data):
        params = hyperparams["init"]
        return {**params, "head": make(features(params, data), hyperparams, data)}

    inner_loss = lambda params, hyperparams, batch: loss(head(params, batch), batch)
    return adaptation(inner_loss, init=init, **{"keep_support": True, **options})
