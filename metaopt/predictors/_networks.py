"""Networks that map a task to λ: from its meta-features, or from the data themselves.

Both return unconstrained coordinates z of a space (`spaces.Unconstrained`), computed as one vector,

    z = z₀ + A t + B tanh(C t + b),    t the task's features or its embedding,

with A and B zero at the start. So training begins with the same λ for all tasks, given by z₀.
`spaces.to_constrained(space, z)` is λ.

With a `limit` L, a prediction shrinks towards z₀ as features x leave the range |x| ≤ L where g was trained:

    z = w g(x clipped to ±L) + (1 - w) z₀,    w = 1 / (1 + mean_i e_i²),    e_i = max(|x_i| / L - 1, 0).

Within the range, w is exactly 1. It is 1/2 if all features are at ±2L. It falls to 0 like 1/x², has a continuous
derivative, and never increases as a feature moves away.

With `spread`, they also return the standard deviation of every coordinate, and z is the center of a distribution of λ:

    log s = c + D t,    with c = log spread and D = 0 at the start.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metaopt import _checks, _heads, _proposals, _row_embedding, base, spaces


def _start(space: base.PyTree, hyperparams: base.HyperParams | None):
    """z₀ as a vector, and the function from a vector to `Unconstrained`."""
    if spaces.num_dims(space) == 0:
        raise ValueError(f"`space` must have at least one leaf that is tuned; got {space}.")
    hyperparams = spaces.default(space) if hyperparams is None else hyperparams
    return ravel_pytree(spaces.to_unconstrained(space, hyperparams))


def _guarded(features: jax.Array, limit: float | None) -> jax.Array:
    """The features [F], clipped at the limit."""
    return features if limit is None else jnp.clip(features, -limit, limit)


def _apply_head(params, inputs: jax.Array, features: jax.Array, limit: float | None) -> jax.Array:
    """z [Z] as a vector. The inputs of the head end with the clipped features [F]; `features` are not clipped."""
    z = _heads.apply_head(params, inputs)
    if limit is None:
        return z
    weight = 1 / (1 + jnp.mean(((features - _guarded(features, limit)) / limit) ** 2))
    return weight * z + (1 - weight) * params["center"]


def _check_options(limit: float | None, num_features: int, spread: float | None) -> None:
    """Raises ValueError for options that a file may have, and that would silently reverse or spoil predictions."""
    for name, value in (("limit", limit), ("spread", spread)):
        _checks.check_positive(name, value, optional=True)
    if spread is not None and not np.isfinite(spread):
        raise ValueError(f"`spread` must be finite, or None; got {spread!r}.")
    if limit is not None and not num_features:
        raise ValueError(
            f"`limit` clips `task.features`, but `num_features` is 0; got {limit}. Set `num_features`, or omit `limit`."
        )


def _options(**options: float | None) -> dict[str, float]:
    """The entries of `config` for options that are set."""
    return {name: float(value) for name, value in options.items() if value is not None}


def option_of(config: dict[str, Any], name: str) -> Any:
    """An option of the predictor that `config` describes, or of the members of an ensemble; None if it is not set."""
    while "member" in config:
        config = config["member"]
    return config.get(name)


def _init_spread(spread: float | None, num_inputs: int, center: jax.Array) -> dict[str, Any]:
    """Initial weights, with which every coordinate has the given spread for all tasks; an empty dict for None."""
    if spread is None:
        return {}
    linear = jnp.zeros((num_inputs, center.shape[0]), center.dtype)
    return {"log_spread": {"center": jnp.full_like(center, np.log(spread)), "linear": linear}}


def _with_spread(meta_params: dict[str, Any], inputs: jax.Array, prediction: base.HyperParams, unravel):
    """The prediction with its spread, as `_proposals.Normal`."""
    weights = meta_params["log_spread"]
    return _proposals.Normal(prediction, unravel(jnp.exp(weights["center"] + inputs @ weights["linear"])))


def mlp(
    space: base.PyTree,
    num_features: int,
    *,
    num_hidden: int = 16,
    hyperparams: base.HyperParams | None = None,
    limit: float | None = None,
    spread: float | None = None,
) -> base.Predictor:
    """A predictor g(t; φ) of a task's meta-features: a constant, plus a linear map, plus a layer of tanh units.

    Args:
      space: the space of λ, whose unconstrained coordinates are predicted.
      num_features: F; `task.features` must be [F], standardized (`tasks.FeatureScaling.transform`).
      num_hidden: H, the number of tanh units; with 0 the map is linear.
      hyperparams: the initial λ, in natural units; by default the space's default.
      limit: L, a safeguard against extrapolation. Features beyond ±L shrink the prediction towards "center" of φ:

            z = w g(x clipped to ±L) + (1 - w) z₀,    w = 1 / (1 + mean_i max(|x_i| / L - 1, 0)²).

        Within ±L, w = 1 and nothing changes. A usual value is 2. Scale features by
        `tasks.FeatureScaling.transform(..., limit=L)` or `TrainedPredictor.scaled_features`: a smaller `clip` would
        hide from w how far a feature is outside. None: no safeguard.
      spread: the initial standard deviation of each coordinate, positive: g predicts a distribution, a named tuple
        (center, spread). `best_of` trains it, and `training.propose` draws from it. None: g predicts one λ.

    Returns:
      A `Predictor` of `spaces.Unconstrained` coordinates, whose φ is a dict: "center" [Z], "linear" [F, Z], "hidden"
        [F, H], "bias" [H], "out" [H, Z]; with `spread` also "log_spread" {"center" [Z], "linear" [F, Z]}.

    Raises:
      ValueError: if the space has nothing to tune, or `hyperparams` do not fit the space.
      ValueError: if `limit` is not positive, `spread` is not positive and finite, or there are no features to limit.
    """
    _check_options(limit, num_features, spread)
    center, unravel = _start(space, hyperparams)

    def init(key):
        head = _heads.init_head(key, num_features, num_hidden, center)
        return head | _init_spread(spread, num_features, center)

    def apply(meta_params, task):
        inputs = _guarded(task.features, limit)
        z = unravel(_apply_head(meta_params, inputs, task.features, limit))
        return z if spread is None else _with_spread(meta_params, inputs, z, unravel)

    config = {"kind": "mlp", "num_features": num_features, "num_hidden": num_hidden, "space": spaces.to_json(space)}
    return base.Predictor(init, apply, config | _options(limit=limit, spread=spread))


def dataset_embedding(
    space: base.PyTree,
    *,
    num_features: int = 0,
    width: int = 16,
    num_hidden: int = 16,
    max_rows: int = 256,
    hyperparams: base.HyperParams | None = None,
    limit: float | None = None,
    spread: float | None = None,
) -> base.Predictor:
    """A predictor g(t; φ) that reads a labeled table; its embedding ignores the order of rows, columns and classes.

        e(n, d) = relu(W₁ x_nd + b₁)                                  per entry
        s(c, d) = relu(W₂ [mean_{n: y_n = c} e(n, d), mean_n e(n, d), share of c] + b₂)
        t = [mean_d Σ_c share(c) W₃ s(c, d), task.features]

    Permuting the used rows, the columns or the classes does not change t. Padding is ignored: masks state which rows
    and columns are real. It costs N·D·width multiplications.

    Args:
      space: the space of λ.
      num_features: F, the number of entries of `task.features` that are appended to the embedding; with 0 they are
        ignored.
      width: the width of the embedding.
      num_hidden: tanh units of the head.
      max_rows: the maximal number of rows to use; the first real ones are used (rows of prepared tables are in random
        order).
      hyperparams: the initial λ, in natural units; by default the space's default.
      limit: as in `mlp`, of `task.features` only: an embedding far from those of training does not shrink the
        prediction.
      spread: as for `mlp`.

    Returns:
      A `Predictor` of `spaces.Unconstrained` coordinates; `task.train` must be a dict like that of `tasks.to_task`
        ("x", "y", "class_mask" and optionally "mask" and "feature_mask").

    Raises:
      ValueError: if the space has nothing to tune; if `limit` is not positive, `spread` is not positive and finite, or
        there are no features to limit.

    Source: Jomaa, Schmidt-Thieme & Grabocka, Dataset2Vec, DMKD 2021, https://arxiv.org/abs/1905.11063 (its three-level
      pooling); Zaheer et al., Deep Sets, NeurIPS 2017, https://arxiv.org/abs/1703.06114.
    """
    _check_options(limit, num_features, spread)
    center, unravel = _start(space, hyperparams)

    def init(key):
        *keys, head_key = jax.random.split(key, 4)
        params = _row_embedding.init_weights(keys, width, center.dtype)
        head = {"head": _heads.init_head(head_key, width + num_features, num_hidden, center)}
        return params | head | _init_spread(spread, width + num_features, center)

    def apply(meta_params, task):
        embedding = _row_embedding.embed_rows(meta_params, task.train, max_rows=max_rows)
        inputs = embedding
        if num_features:
            inputs = jnp.concatenate([embedding, _guarded(task.features, limit)])
        z = unravel(_apply_head(meta_params["head"], inputs, task.features, limit))
        return z if spread is None else _with_spread(meta_params, inputs, z, unravel)

    config = {
        "kind": "dataset_embedding",
        "num_features": num_features,
        "width": width,
        "num_hidden": num_hidden,
        "max_rows": max_rows,
        "space": spaces.to_json(space),
    }
    return base.Predictor(init, apply, config | _options(limit=limit, spread=spread))


def ensemble(predictor: base.Predictor, num_members: int) -> base.Predictor:
    """The mean of several predictions, in unconstrained coordinates: g(t; φ) = (1/M) Σ_m g_m(t; φ_m).

    Hypergradients through training are noisy. Predictors that were trained with different keys disagree about a new
    task as much as good methods differ from each other; averaging them removes this noise. Train each member separately
    (`amortize` with `predictor`), and stack their φ_m along a new leading axis.

    Args:
      predictor: the predictor of one member. With a `limit`, each member shrinks towards its own z₀, and the ensemble
        towards their mean.
      num_members: M, at least 1.

    Returns:
      A `Predictor` whose φ has leaves [M, ...]; `apply` costs M predictions, by vmap. It is differentiable in any mode.

    Raises:
      ValueError: at trace time, if the weights are not [M, ...].

    Source: Breiman, Bagging predictors, Machine Learning 1996; Lakshminarayanan et al., NeurIPS 2017,
      https://arxiv.org/abs/1612.01474 (members that differ by initialization and order of the data).
    """

    def init(key):
        return jax.vmap(predictor.init)(jax.random.split(key, num_members))

    def apply(meta_params, task):
        for path, leaf in jax.tree_util.tree_leaves_with_path(meta_params):
            if jnp.shape(leaf)[:1] != (num_members,):
                raise ValueError(
                    f"The weights of an ensemble of {num_members} must be stacked, leaves [{num_members}, ...]; got "
                    f"shape {jnp.shape(leaf)} at {jax.tree_util.keystr(path)}. Stack those of the members."
                )
        return jax.tree.map(lambda z: z.mean(0), jax.vmap(predictor.apply, in_axes=(0, None))(meta_params, task))

    config = {}
    if "space" in predictor.config:
        space = predictor.config["space"]
        config = {"kind": "ensemble", "member": predictor.config, "num_members": num_members, "space": space}
    return base.Predictor(init, apply, config)


_FACTORIES: dict[str, Any] = {
    "mlp": mlp,
    "dataset_embedding": dataset_embedding,
    "ensemble": lambda _, member, num_members: ensemble(from_config(member), num_members),
}


def from_config(config: dict[str, Any]) -> base.Predictor:
    """Builds the predictor that `config` describes.

    Args:
      config: as in `base.Predictor.config`.

    Returns:
      A `Predictor` that predicts as the described one does; its `init` starts from the space's default λ.

    Raises:
      KeyError: if the kind is unknown.
    """
    options = dict(config)
    kind = options.pop("kind", None)
    return _FACTORIES[kind](spaces.from_json(options.pop("space")), **options)
