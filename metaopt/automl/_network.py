"""An ensemble of small networks for classification tables: its search space, problem and predictions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, inner, spaces, tasks

HINGES = (-0.67, 0.0, 0.67)  # the quartiles of a standard normal
_SHARED = ("feature_mask", "class_mask", "num_features")  # entries of a table that every minibatch has


class TabularNetwork(NamedTuple):
    """A training run for tables.

    Attributes:
      space: the space of λ, fourteen numbers in natural units.
      problem: its inner loop and outer loss; λ is in natural units.
      num_steps: the number of inner steps of a whole run.
      log_probabilities: `(params, hyperparams, rows) -> [N, C]`, the logarithm of the mean of the members'
        probabilities. `rows` is a dict like `tabular_task(...).train`; its "y" and "mask" are not used.
    """

    space: dict[str, spaces.Leaf]
    problem: base.Problem
    num_steps: int
    log_probabilities: Callable[[base.Params, base.HyperParams, dict[str, Any]], jax.Array]


def tabular_network(
    *, num_steps: int = 100, batch_size: int = 64, num_members: int = 4, num_hidden: int = 32
) -> TabularNetwork:
    """Makes a training run for classification tables, with fourteen hyperparameters.

    The M members are networks with one hidden layer of ReLUs. They share an additive part that is linear in each column
    x and in its hinges max(0, x − c), where c are the quartiles of a standard normal:

        logits_m = s_o V_m relu(s_h U_m x + b_m) + a_m + s_l W [x, s_c max(0, x − c)]

    The loss ℓ is the cross entropy with label smoothing and class weights, averaged over members and rows. Inputs get
    uniform noise, and hidden units are multiplied by 1 ± σ. The optimizer is Adam with decoupled weight decay and a
    polynomial decay of the rate. The outer loss f is the log loss of the mean of the members' probabilities on the
    validation rows, without noise.

    λ is "rate", "rate_decay", "one_minus_b1", "one_minus_b2", "decay_hidden", "decay_output" (of V and of the additive
    part W), "input_noise" (standard deviation; columns are standardized), "hidden_noise" (σ; 1 is dropout with
    probability 1/2), "label_smoothing", "class_weighting" (p; the weight of a class is proportional to share^−p),
    "hidden_scale" s_h, "output_scale" s_o, "linear_scale" s_l and "hinge_scale" s_c, all on a logarithmic scale.

    Args:
      num_steps: the number of inner steps of a whole run, after which the rate is zero.
      batch_size: rows of a minibatch.
      num_members: M.
      num_hidden: hidden units of each member.

    Returns:
      A `TabularNetwork`, for tables of any size. The shipped g was trained with the default sizes.
    """

    def init(key, hyperparams, data):
        del hyperparams
        return _init_params(key, data, num_members, num_hidden), None

    def loss(params, hyperparams, batch, context):
        return _loss(params, hyperparams, batch, context.key)

    def optimizer(hyperparams):
        return _optimizer(hyperparams, num_steps)

    def outer_loss(params, hyperparams, batch):
        log_p = log_probabilities(params, hyperparams, batch)
        nll = -jnp.take_along_axis(log_p, batch["y"][:, None], axis=1)[:, 0]
        return jnp.sum(nll * batch["mask"]) / batch["mask"].sum()

    sampler = _with_share(inner.minibatch(batch_size, shared=_SHARED))
    loop = inner.loop(loss, optimizer, init=init, sampler=sampler, with_context=True)
    return TabularNetwork(tabular_space(), inner.problem(loop, outer_loss), num_steps, log_probabilities)


def tabular_space() -> dict[str, spaces.Leaf]:
    """The search space of `tabular_network`."""

    def log(low, high, default):
        return spaces.interval(low, high, log=True, default=default)

    return {
        "rate": log(3e-4, 1e-1, 3e-3),
        "rate_decay": log(0.1, 4.0, 1.0),  # p of (1 − t/T)^p
        "one_minus_b1": log(1e-2, 0.5, 0.1),
        "one_minus_b2": log(5e-4, 0.3, 1e-3),
        "decay_hidden": log(1e-4, 10.0, 1e-2),
        "decay_output": log(1e-4, 10.0, 1e-2),
        "input_noise": log(1e-2, 1.0, 5e-2),
        "hidden_noise": log(1e-2, 1.0, 0.1),
        "label_smoothing": log(1e-4, 0.3, 1e-3),
        "class_weighting": log(1e-2, 1.0, 2e-2),
        "hidden_scale": log(0.1, 5.0, 1.0),
        "output_scale": log(0.1, 10.0, 1.0),
        "linear_scale": log(1e-2, 3.0, 0.3),
        "hinge_scale": log(1e-2, 3.0, 0.3),
    }


def tabular_task(
    prepared: tasks.PreparedTable, *, shape: tasks.TaskShape | None = None, features: Any = None
) -> base.Task:
    """Makes the task of `tabular_network` from a prepared table.

    Args:
      prepared: the table.
      shape: the padded shape, for tables that are stacked into one batch; by default there is no padding.
      features: meta-features, copied unchanged into the task.

    Returns:
      The task of `tasks.to_task`.

    Raises:
      ValueError: as `tasks.to_task` does.
    """
    shape = prepared.shape if shape is None else shape
    rows, sizes = (shape.train_rows, shape.valid_rows), {"num_features": shape.features, "num_classes": shape.classes}
    return tasks.to_task(prepared, rows=rows, features=features, **sizes)


def train(network: TabularNetwork, key: jax.Array, hyperparams: base.HyperParams, task: base.Task) -> base.Params:
    """Trains on the training rows of one task.

    Args:
      network: the network, from `tabular_network`.
      key: the random key, for the initialization, the order of the data and the noise.
      hyperparams: λ in natural units.
      task: the task, from `tabular_task`.

    Returns:
      θ, for `network.log_probabilities`. It works under `jit` and `vmap`.
    """
    return network.problem.loop.params(inner.run(network.problem.loop, network.num_steps)(key, hyperparams, task.train))


# --- the training run ---


def _with_share(sampler: Callable) -> Callable:
    """Adds "share" [C] to every batch, the share of each class among all training rows.

    It is computed for each batch: an entry of the task would be wrong after a new split of the rows (`tasks.resplit`).
    """

    def sample(key, step, data):
        is_class = data["y"][:, None] == jnp.arange(data["class_mask"].shape[0])[None]
        rows = jnp.sum(is_class * data["mask"][:, None], axis=0)
        return {**sampler(key, step, data), "share": rows / rows.sum()}

    return sample


def _init_params(key: jax.Array, data: dict[str, Any], num_members: int, num_hidden: int) -> base.Params:
    num_columns, num_classes = data["x"].shape[1], data["class_mask"].shape[0]
    hidden_key, bias_key, output_key = jax.random.split(key, 3)
    width = num_members * num_hidden
    return {
        # Fan-in is the true number of columns, without padding.
        "hidden": jax.random.normal(hidden_key, (num_columns, width)) / jnp.sqrt(data["num_features"]),
        "bias": 0.3 * jax.random.normal(bias_key, (width,)),
        "output": jax.random.normal(output_key, (num_members, num_hidden, num_classes)) / num_hidden**0.5,
        "output_bias": jnp.zeros((num_members, num_classes)),
        "linear": jnp.zeros((num_columns * (1 + len(HINGES)), num_classes)),
    }


def _random_signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns ±1 with equal probability, 32 signs per random word. Otherwise, noise would cost as much as training."""
    size = int(np.prod(shape))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (2.0 * bits.astype(jnp.float32) - 1.0).reshape(-1)[:size].reshape(shape)


def _member_log_probabilities(params, hyperparams, batch, key: jax.Array | None = None) -> jax.Array:
    """Returns [M, N, C], with noise if there is a key."""
    x, (members, hidden, _) = batch["x"], params["output"].shape
    if key is not None:
        input_key, hidden_key = jax.random.split(key)
        # Uniform noise with standard deviation 1 costs a third of normal noise.
        noise = jax.random.uniform(input_key, x.shape, minval=-(3**0.5), maxval=3**0.5)
        x = x + hyperparams["input_noise"] * noise * batch["feature_mask"][None]
    hinges = [hyperparams["hinge_scale"] * jax.nn.relu(x - c) * batch["feature_mask"][None] for c in HINGES]
    additive = jnp.concatenate([x, *hinges], axis=1)
    activations = jax.nn.relu(hyperparams["hidden_scale"] * (x @ params["hidden"]) + params["bias"][None])
    if key is not None:
        signs = _random_signs(hidden_key, activations.shape)
        activations = activations * (1 + hyperparams["hidden_noise"] * signs)
    activations = activations.reshape(-1, members, hidden)
    logits = hyperparams["output_scale"] * jnp.einsum("bmh,mhc->mbc", activations, params["output"])
    logits = logits + params["output_bias"][:, None] + hyperparams["linear_scale"] * (additive @ params["linear"])[None]
    return jax.nn.log_softmax(jnp.where(batch["class_mask"] > 0, logits, -1e9))


def log_probabilities(params, hyperparams, batch) -> jax.Array:
    """Returns [N, C], the logarithm of the mean of the members' probabilities. It needs "x" and the two masks."""
    members = params["output"].shape[0]
    return jax.nn.logsumexp(_member_log_probabilities(params, hyperparams, batch), axis=0) - np.log(members)


def _loss(params, hyperparams, batch, key: jax.Array) -> jax.Array:
    log_p = _member_log_probabilities(params, hyperparams, batch, key)
    present, share = batch["class_mask"], batch["share"]
    nll = -jnp.take_along_axis(log_p, batch["y"][None, :, None], axis=2)[..., 0]
    uniform = -jnp.sum(jnp.where(present > 0, log_p, 0.0), axis=2) / present.sum()
    weight = jnp.where(share > 0, share, 1.0) ** -hyperparams["class_weighting"]
    weight = weight[batch["y"]] / jnp.sum(share * weight)
    smoothing = hyperparams["label_smoothing"]
    return jnp.mean(weight[None] * ((1 - smoothing) * nll + smoothing * uniform))


def _optimizer(hyperparams, num_steps: int) -> optax.GradientTransformation:
    def rate(step):
        return hyperparams["rate"] * jnp.maximum(1 - step / num_steps, 1e-6) ** hyperparams["rate_decay"]

    decays = {"hidden": "decay_hidden", "output": "decay_output", "linear": "decay_output"}

    def decay(updates, params):
        return {
            name: u + hyperparams[decays[name]] * params[name] if name in decays else u for name, u in updates.items()
        }

    # One flat vector gives fewer and larger operations, which compile in half the time.
    adam = optax.scale_by_adam(1 - hyperparams["one_minus_b1"], 1 - hyperparams["one_minus_b2"])
    return optax.chain(optax.flatten(adam), optax.stateless(decay), optax.scale_by_learning_rate(rate))
