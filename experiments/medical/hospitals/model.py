"""A site's logistic model, its hyperparameters λ, and g, which predicts λ from 20 labelled patients.

The pooled model of the other hospitals has the logit s = s₁ + s₂ + s₃: columns that are usually measured, columns that
are often missing, and marks of missing values. A site's model with parameters θ = (b, a, δ) is

    logit p(x) = (b + a (s₁ + κ₂ s₂ + κ₃ s₃) + δ·x) / T,
    ℓ(θ, λ) = Σ_i c(y_i) CE_i(θ) + ½ ρ_b (b − b₀)² + ½ ρ_a (a − a₀)² + ½ ρ_x |δ_values|² + ½ ρ_m |δ_marks|²,

where T does not enter ℓ. So λ has the shrinkage to the pooled model (ρ, a₀), the prior shift (b₀), the weights of
columns with missing values and of their marks (κ), the ratio of the class weights c, and the temperature T. ℓ is
strictly convex. Newton's method finds θ, and the implicit function theorem gives dθ/dλ (`hypergrad.argmin`).
"""

import jax
import jax.numpy as jnp

from metaopt import base, hypergrad, predictors, spaces

NUM_FEATURES = 7

SPACE = {
    "often_missing": spaces.interval(0.02, 2.0, log=True, default=1.0),  # κ₂
    "marks": spaces.interval(0.02, 2.0, log=True, default=1.0),  # κ₃
    "slope": spaces.interval(0.1, 2.0, log=True, default=0.8),  # a₀
    "intercept": spaces.interval(-4.0, 4.0, default=0.0),  # b₀
    "penalty": {
        "intercept": spaces.interval(0.03, 300.0, log=True, default=1.0),
        "slope": spaces.interval(0.03, 1000.0, log=True, default=10.0),
        "values": spaces.interval(1.0, 1e4, log=True, default=100.0),
        "marks": spaces.interval(1.0, 1e4, log=True, default=100.0),
    },
    "class_weight": spaces.interval(0.2, 5.0, log=True, default=1.0),  # weight of the sick over that of the healthy
    "temperature": spaces.interval(0.4, 2.5, log=True, default=1.0),
}


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the log losses, one for each patient; y may be a share."""
    return jax.nn.softplus(logits) - y * logits


def ridge_logistic(
    rows: jax.Array, target: jax.Array, weights: jax.Array, center: jax.Array, penalty: jax.Array
) -> jax.Array:
    """Returns argmin_θ Σ_i w_i CE(rows_i·θ, target_i) + ½ Σ_j ρ_j (θ_j − center_j)².

    It takes ten steps of Newton's method, each with the best of six lengths. At the minimum, all lengths have the same
    value except for rounding errors. So the full step gets an advantage of this size.

    Args:
      rows: [N, P].
      target: [N], outcomes or shares.
      weights: [N].
      center, penalty: [P].
    """
    lengths = jnp.array([1.0, 0.5, 0.25, 0.1, 0.02, 0.0])

    def step(_, params):
        logits = rows @ params
        p = jax.nn.sigmoid(logits)
        gradient = rows.T @ (weights * (p - target)) + penalty * (params - center)
        curvature = (rows * (weights * p * (1 - p))[:, None]).T @ rows + jnp.diag(penalty)
        direction = jax.scipy.linalg.solve(curvature, gradient, assume_a="pos")
        along = rows @ direction

        def value(length):
            fit = (weights * cross_entropy(logits - length * along, target)).sum()
            return fit + 0.5 * (penalty * (params - length * direction - center) ** 2).sum()

        values = jax.vmap(value)(lengths)
        rounding = 100 * jnp.finfo(values.dtype).eps * jnp.abs(values[0])
        return params - lengths[jnp.argmin(values.at[0].add(-rounding))] * direction

    return jax.lax.fori_loop(0, 10, step, center)


def design(hp: base.HyperParams, data: dict[str, jax.Array]) -> jax.Array:
    """Returns [N, 2 + columns], the rows (1, weighted score of the pooled model, columns)."""
    weights = jnp.stack([jnp.ones_like(hp["marks"]), hp["often_missing"], hp["marks"]])
    score = data["scores"] @ weights
    return jnp.concatenate([jnp.ones((len(score), 1)), score[:, None], data["x"]], axis=1)


def prior(hp: base.HyperParams, num_marks: int, num_columns: int) -> tuple[jax.Array, jax.Array]:
    """Returns the center of θ, and the penalty of each entry; marks are the last columns."""
    center = jnp.concatenate([jnp.stack([hp["intercept"], hp["slope"]]), jnp.zeros(num_columns)])
    penalty = hp["penalty"]
    values, marks = (
        jnp.full(num, penalty[name]) for name, num in (("values", num_columns - num_marks), ("marks", num_marks))
    )
    return center, jnp.concatenate([jnp.stack([penalty["intercept"], penalty["slope"]]), values, marks])


def patient_weights(hp: base.HyperParams, data: dict[str, jax.Array]) -> jax.Array:
    """Returns [N], the class weights c of the labelled patients, and 0 for those whose "mask" is 0."""
    ratio = jnp.sqrt(hp["class_weight"])
    return data["mask"] * jnp.where(data["y"] > 0, ratio, 1 / ratio)


def site_loss(params: jax.Array, hp: base.HyperParams, data: dict[str, jax.Array]) -> jax.Array:
    """ℓ(θ, λ) on the labelled patients."""
    center, penalty = prior(hp, data["marks"].shape[-1], data["x"].shape[1])
    fit = (patient_weights(hp, data) * cross_entropy(design(hp, data) @ params, data["y"])).sum()
    return fit + 0.5 * (penalty * (params - center) ** 2).sum()


def fit_site(hp: base.HyperParams, data: dict[str, jax.Array]) -> jax.Array:
    """Returns θ*(λ), differentiable in λ."""
    center, penalty = prior(hp, data["marks"].shape[-1], data["x"].shape[1])
    arguments = design(hp, data), data["y"], patient_weights(hp, data), center, penalty
    solve = hypergrad.argmin(site_loss, minimize=lambda fn, start: ridge_logistic(*arguments), solver=hypergrad.dense())
    return solve(center, hp, data)


def site_logits(params: jax.Array, hp: base.HyperParams, data: dict[str, jax.Array]) -> jax.Array:
    """Returns the logits of patients, whose labels are not used."""
    return design(hp, data) @ params / hp["temperature"]


def outer_loss(coordinates: base.HyperParams, task: base.Task, key: jax.Array) -> jax.Array:
    """F(λ): the log loss on the other patients of the site."""
    del key
    hp = spaces.to_constrained(SPACE, coordinates)
    logits = site_logits(fit_site(hp, task.train), hp, task.valid)
    return cross_entropy(logits, task.valid["y"]).mean()


def features(data: dict[str, jax.Array]) -> jax.Array:
    """Returns [NUM_FEATURES] numbers that describe the labelled patients, before scaling.

    They compare outcomes with the pooled model: the log odds of the share of the sick, mean residual, spread of the
    scores, how outcomes follow the scores and the marks, log loss, and the share of missing values. Means of age and
    scores are left out on purpose. They identify the few training sites, and g would extrapolate from them.
    """
    mask, y, scores = data["mask"], data["y"], data["scores"]
    num = mask.sum()
    mean = lambda values: (mask * values).sum() / num
    score = scores.sum(1)
    share = mean(y)
    spread = jnp.sqrt(mean((score - mean(score)) ** 2) + 1e-6)
    return jnp.stack(
        [
            jnp.log((num * share + 0.5) / (num * (1 - share) + 0.5)),
            mean(y - jax.nn.sigmoid(score)),
            spread,
            mean((y - share) * score) / spread,
            mean((y - share) * scores[:, 2]),
            mean(cross_entropy(score, y)),
            mean(data["marks"].mean(1)),
        ]
    )


PREDICTOR = predictors.mlp(SPACE, NUM_FEATURES, num_hidden=0, limit=2.0)  # g
