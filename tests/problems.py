"""Problems that the batteries share, with answers that metaopt did not compute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, inner, spaces

# Ridge regression with one learned penalty per feature, p = exp(λ):
#   ℓ = |Xθ − y|²/2N + Σ_d p_d θ_d²/2,    θ*(λ) = (XᵀX/N + diag p)⁻¹ Xᵀy/N,    f = |Xv θ − yv|²/2M.

NUM_FEATURES = 4


def regression_task(seed: int, num_train: int = 20, num_valid: int = 15) -> base.Task:
    """A linear task with noise; its two meta-features are random."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=NUM_FEATURES)

    def part(num):
        x = rng.normal(size=(num, NUM_FEATURES))
        return {"x": x, "y": x @ weights + 0.5 * rng.normal(size=num)}

    return jax.tree.map(jnp.asarray, base.Task(part(num_train), part(num_valid), rng.normal(size=2)))


def mean_squares(params, data):
    return ((data["x"] @ params - data["y"]) ** 2).mean() / 2


def penalized(params, hyperparams, batch):
    return mean_squares(params, batch) + (hyperparams["penalty"] * params**2).sum() / 2


def zeros(key, hyperparams, data):
    return jnp.zeros(data["x"].shape[-1], data["x"].dtype)


RIDGE_LOOP = inner.loop(
    lambda params, hyperparams, batch: penalized(params, {"penalty": jnp.exp(hyperparams["log_penalty"])}, batch),
    lambda hyperparams: optax.sgd(0.4),
    init=zeros,
)
RIDGE = inner.problem(RIDGE_LOOP, lambda params, hyperparams, batch: mean_squares(params, batch))
LAM = {"log_penalty": jnp.linspace(-2.0, 0.0, NUM_FEATURES)}
TASK = regression_task(0)


def solution(hyperparams, task=TASK):
    """θ*(λ)."""
    x, y = task.train["x"], task.train["y"]
    hessian = x.T @ x / len(y) + jnp.diag(jnp.exp(hyperparams["log_penalty"]))
    return jnp.linalg.solve(hessian, x.T @ y / len(y))


def closed_form(hyperparams, task=TASK):
    """F(λ) = f(θ*(λ))."""
    return mean_squares(solution(hyperparams, task), task.valid)


# The same with the penalty itself as λ, for changes of coordinates.
SPACE = {"penalty": spaces.positive(0.3, shape=(NUM_FEATURES,))}
POSITIVE_RIDGE = inner.problem(
    inner.loop(penalized, lambda hyperparams: optax.sgd(0.4), init=zeros),
    lambda params, hyperparams, batch: mean_squares(params, batch),
)

# No training run: the squared distance of the penalty from that of the task. It is for tests of λ and its units.


def _distance(coordinates, task, key):
    return ((spaces.to_constrained(SPACE, coordinates)["penalty"] - task.valid) ** 2).sum()


DISTANCE = hypergrad.direct(_distance)
DISTANCE_TASKS = [base.Task(jnp.zeros(1), jnp.array([0.9, 0.2, 1.5, x])) for x in (1.2, 0.7, 2.6)]


# A network with everything that training has: dropout, minibatches, running statistics, Adam; λ enters everywhere.


class Everything(NamedTuple):
    """λ of `EVERYTHING`."""

    start: Any  # θ_0 (MAML)
    penalty: jax.Array  # in the inner loss
    rate: jax.Array  # in the optimizer
    temperature: jax.Array  # in the outer loss


def network(params, stats, x, key=None):
    """One hidden layer, normalized; with a key it trains: dropout, and statistics of the batch, which come back too."""
    h = x @ params["w"] + params["b"][None]
    if key is None:
        mean, var = stats["mean"], stats["var"]
    else:
        mean, var = h.mean(0), h.var(0)
        stats = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, stats, {"mean": mean, "var": var})
    h = jnp.tanh((h - mean[None]) / jnp.sqrt(var + 0.1)[None])
    if key is not None:
        h = h * jax.random.bernoulli(key, 0.7, h.shape) / 0.7
    return h @ params["out"], stats


def _everything_loss(params, hyperparams, batch, context):
    predicted, stats = network(params, context.model_state, batch["x"], context.key)
    penalty = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
    schedule = 1 + 0.1 * context.step
    return ((predicted - batch["y"]) ** 2).mean() + schedule * hyperparams.penalty * penalty, stats


def _everything_outer_loss(params, hyperparams, batch, context):
    predicted, _ = network(params, context.model_state, batch["x"])
    return (jnp.tanh(hyperparams.temperature * (predicted - batch["y"])) ** 2).mean()


def _everything_init(key, hyperparams, data):
    noise = 0.1 * jax.random.normal(key, hyperparams.start["w"].shape)
    params = {**hyperparams.start, "w": hyperparams.start["w"] + noise}
    return params, {"mean": jnp.zeros(3), "var": jnp.ones(3)}


EVERYTHING_LOOP = inner.loop(
    _everything_loss,
    lambda hyperparams: optax.adam(hyperparams.rate),
    init=_everything_init,
    sampler=inner.minibatch(6),
    with_context=True,
)
EVERYTHING = inner.problem(EVERYTHING_LOOP, _everything_outer_loss, with_context=True)


def _everything_lam():
    rng = np.random.default_rng(1)
    start = {"w": rng.normal(size=(NUM_FEATURES, 3)), "b": 0.1 * rng.normal(size=3), "out": rng.normal(size=3)}
    lam = Everything(start, np.array(0.01), np.array(0.05), np.array(0.7))
    return jax.tree.map(jnp.asarray, lam)


EVERYTHING_LAM = _everything_lam()


# One number with all the noise of training. It is for tests of keys, and compiles in a tenth of the time.


def _noisy_loss(params, hyperparams, batch, context):
    return (params - hyperparams * batch.mean() - jax.random.normal(context.key)) ** 2, None


NOISY = inner.problem(
    inner.loop(
        _noisy_loss,
        lambda hyperparams: optax.sgd(0.1),
        init=lambda key, hyperparams, data: (jax.random.normal(key), None),
        sampler=inner.minibatch(2),
        with_context=True,
    ),
    lambda params, hyperparams, batch: (params - batch) ** 2,
)
NOISY_TASK = base.Task(jnp.arange(6.0), jnp.array(1.0))


# Tasks of different sizes, padded to one size: the last rows of the smaller tasks are padding.

SIZES = (5, 8, 7)
PADDED = 8


def unpadded_tasks() -> list[base.Task]:
    """Regression tasks with a mask and a count of rows, no padding."""

    def part(data):
        num = len(data["y"])
        return {**data, "mask": jnp.ones(num), "num_rows": jnp.array(num, jnp.int32)}

    tasks = [regression_task(seed, size, size) for seed, size in enumerate(SIZES)]
    return [task._replace(train=part(task.train), valid=part(task.valid)) for task in tasks]


def pad(task: base.Task, num: int = PADDED) -> base.Task:
    """Zeros after the real rows."""

    def leaf(x):
        return jnp.pad(x, [(0, num - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]) if x.ndim else x

    return task._replace(train=jax.tree.map(leaf, task.train), valid=jax.tree.map(leaf, task.valid))


def stack(tasks) -> base.Task:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def masked_squares(params, data):
    return (data["mask"] * (data["x"] @ params - data["y"]) ** 2).sum() / data["mask"].sum() / 2


def masked_problem(sampler=None) -> base.Problem:
    def loss(params, hyperparams, batch):
        return masked_squares(params, batch) + (jnp.exp(hyperparams["log_penalty"]) * params**2).sum() / 2

    loop = inner.loop(loss, lambda hyperparams: optax.adam(0.1), init=zeros, sampler=sampler)
    return inner.problem(loop, lambda params, hyperparams, batch: masked_squares(params, batch))


# Logistic regression with a penalty per feature, p = exp(λ), by Newton's method and the implicit function theorem:
# ℓ = mean log(1 + exp(−y xᵀθ)) + Σ p_d θ_d²/2,  f = the same mean on the validation rows + 0.1 Σ λ_d².


def logistic_task(seed=0):
    task = regression_task(seed, num_train=40)
    return jax.tree.map(lambda part: jnp.where(part > 0, 1.0, -1.0) if part.ndim == 1 else part, task)


LOGISTIC_TASK = logistic_task()


def log_loss(params, data):
    return jnp.logaddexp(0.0, -data["y"] * (data["x"] @ params)).mean()


LOGISTIC = inner.problem(
    inner.loop(
        lambda params, hp, batch: log_loss(params, batch) + (jnp.exp(hp["log_penalty"]) * params**2).sum() / 2,
        lambda hp: optax.sgd(1.0, momentum=0.5),
        init=zeros,
    ),
    lambda params, hp, batch: log_loss(params, batch) + 0.1 * (hp["log_penalty"] ** 2).sum(),
)


def logistic_answer(lam, task=LOGISTIC_TASK):
    """θ* to 1e-12, the Hessian there, ∂f/∂θ, the mixed product's diagonal, and dF/dλ."""
    x, y, penalty = np.asarray(task.train["x"]), np.asarray(task.train["y"]), np.exp(np.asarray(lam["log_penalty"]))
    theta = np.zeros(x.shape[1])
    for _ in range(50):
        odds = 1 / (1 + np.exp(y * (x @ theta)))  # of being wrong
        grad = -x.T @ (y * odds) / len(y) + penalty * theta
        hessian = x.T @ ((odds * (1 - odds))[:, None] * x) / len(y) + np.diag(penalty)
        theta = theta - np.linalg.solve(hessian, grad)
    assert np.linalg.norm(grad) < 1e-12
    xv, yv = np.asarray(task.valid["x"]), np.asarray(task.valid["y"])
    f_theta = -xv.T @ (yv / (1 + np.exp(yv * (xv @ theta)))) / len(yv)
    mixed = penalty * theta  # ∂²ℓ/∂λ∂θ is diagonal
    hypergradient = 0.2 * np.asarray(lam["log_penalty"]) - mixed * np.linalg.solve(hessian, f_theta)
    return theta, hessian, f_theta, mixed, hypergradient
