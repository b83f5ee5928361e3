"""The training run that is tuned: its search space, network, loss and optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.hyperparameters.auto_tune.config import Config
from metaopt import inner, spaces


def make_space() -> dict[str, spaces.Leaf]:
    """The search space: fourteen quantities of one training run, tuned jointly, in log coordinates within bounds."""

    def log(low, high, default):
        return spaces.interval(low, high, log=True, default=default)

    return {
        "rate": log(3e-4, 1e-1, 3e-3),
        "rate_decay": log(0.1, 4.0, 1.0),  # p of (1 − t/T)^p
        "one_minus_b1": log(1e-2, 0.5, 0.1),
        "one_minus_b2": log(5e-4, 0.3, 1e-3),
        "decay_hidden": log(1e-4, 10.0, 1e-2),
        "decay_output": log(1e-4, 10.0, 1e-2),
        "input_noise": log(1e-2, 1.0, 5e-2),  # standard deviation; columns are standardized
        "hidden_noise": log(1e-2, 1.0, 0.1),  # each unit is multiplied by 1 ± σ; σ = 1 is dropout with probability 1/2
        "label_smoothing": log(1e-4, 0.3, 1e-3),
        "class_weighting": log(1e-2, 1.0, 2e-2),  # the weight of a class is proportional to share^−p
        "hidden_scale": log(0.1, 5.0, 1.0),
        "output_scale": log(0.1, 10.0, 1.0),
        "linear_scale": log(1e-2, 3.0, 0.3),  # scales the linear part, which is added to the hidden layer's logits
        "hinge_scale": log(1e-2, 3.0, 0.3),  # scales the hinges max(0, x − c) that are added to each column x
    }


def random_signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns ±1 with equal probability, 32 signs per random word. Otherwise, noise would cost as much as training."""
    size = int(np.prod(shape))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (2.0 * bits.astype(jnp.float32) - 1.0).reshape(-1)[:size].reshape(shape)


HINGES = (-0.67, 0.0, 0.67)  # the quartiles of a standard normal


def make_problem(config: Config, least_probability: float = 0.0):
    """An ensemble of small networks with a linear part, Adam with decoupled decay, and validation log loss.

    The linear part reads each column and its hinges at the quartiles. So it is an additive model of piecewise linear
    functions. The hidden layers read the columns. The members share the batch, and each minimizes its own loss. Their
    probabilities are averaged.

    Returns:
      The problem, and a function (params, λ, rows) -> log loss and error. Its log loss replaces smaller probabilities
      of the true class by `least_probability`.
    """
    members, hidden, num_steps = config.num_members, config.num_hidden, config.num_steps

    def init(key, hyperparams, data):
        del hyperparams
        num_columns, num_classes = data["x"].shape[1], data["class_mask"].shape[0]
        hidden_key, bias_key, output_key = jax.random.split(key, 3)
        # Fan-in is the true number of columns, without padding.
        params = {
            "hidden": jax.random.normal(hidden_key, (num_columns, members * hidden)) / jnp.sqrt(data["num_features"]),
            "bias": 0.3 * jax.random.normal(bias_key, (members * hidden,)),
            "output": jax.random.normal(output_key, (members, hidden, num_classes)) / hidden**0.5,
            "output_bias": jnp.zeros((members, num_classes)),
            "linear": jnp.zeros((num_columns * (1 + len(HINGES)), num_classes)),
        }
        return params, None

    def log_probabilities(params, hyperparams, batch, key=None):
        x = batch["x"]
        if key is not None:
            input_key, hidden_key = jax.random.split(key)
            # Uniform noise with standard deviation 1 costs a third of normal noise.
            noise = jax.random.uniform(input_key, x.shape, minval=-(3**0.5), maxval=3**0.5)
            x = x + hyperparams["input_noise"] * noise * batch["feature_mask"][None]
        hinges = [hyperparams["hinge_scale"] * jax.nn.relu(x - c) * batch["feature_mask"][None] for c in HINGES]
        additive = jnp.concatenate([x, *hinges], axis=1)
        h = jax.nn.relu(hyperparams["hidden_scale"] * (x @ params["hidden"]) + params["bias"][None])
        if key is not None:
            h = h * (1 + hyperparams["hidden_noise"] * random_signs(hidden_key, h.shape))
        h = h.reshape(-1, members, hidden)
        logits = hyperparams["output_scale"] * jnp.einsum("bmh,mhc->mbc", h, params["output"])
        logits = (
            logits + params["output_bias"][:, None] + hyperparams["linear_scale"] * (additive @ params["linear"])[None]
        )
        return jax.nn.log_softmax(jnp.where(batch["class_mask"] > 0, logits, -1e9))  # [members, rows, classes]

    def loss(params, hyperparams, batch, context):
        log_p = log_probabilities(params, hyperparams, batch, context.key)
        present, share = batch["class_mask"], batch["share"]
        nll = -jnp.take_along_axis(log_p, batch["y"][None, :, None], axis=2)[..., 0]
        uniform = -jnp.sum(jnp.where(present > 0, log_p, 0.0), axis=2) / present.sum()
        weight = jnp.where(share > 0, share, 1.0) ** -hyperparams["class_weighting"]
        weight = weight[batch["y"]] / jnp.sum(share * weight)
        smoothing = hyperparams["label_smoothing"]
        return jnp.mean(weight[None] * ((1 - smoothing) * nll + smoothing * uniform))

    def optimizer(hyperparams):
        def rate(step):
            return hyperparams["rate"] * jnp.maximum(1 - step / num_steps, 1e-6) ** hyperparams["rate_decay"]

        decays = {"hidden": "decay_hidden", "output": "decay_output", "linear": "decay_output"}

        def decay(updates, params):
            return {
                name: u + hyperparams[decays[name]] * params[name] if name in decays else u
                for name, u in updates.items()
            }

        # One flat vector gives fewer and larger operations, which compile in half the time.
        adam = optax.scale_by_adam(1 - hyperparams["one_minus_b1"], 1 - hyperparams["one_minus_b2"])
        return optax.chain(optax.flatten(adam), optax.stateless(decay), optax.scale_by_learning_rate(rate))

    def outer_loss(params, hyperparams, batch):
        return scores(params, hyperparams, batch, 0.0)[0]

    def scores(params, hyperparams, batch, least_probability=least_probability):
        """Returns log loss and error of the averaged probabilities, over the real rows."""
        log_p = jax.nn.logsumexp(log_probabilities(params, hyperparams, batch), axis=0) - np.log(members)
        nll = -jnp.take_along_axis(log_p, batch["y"][:, None], axis=1)[:, 0]
        if least_probability:
            nll = jnp.minimum(nll, -np.log(least_probability))
        wrong = log_p.argmax(1) != batch["y"]
        return jnp.sum(nll * batch["mask"]) / batch["mask"].sum(), jnp.sum(wrong * batch["mask"]) / batch["mask"].sum()

    shared = ("feature_mask", "class_mask", "num_features", "share")
    loop = inner.loop(
        loss, optimizer, init=init, sampler=inner.minibatch(config.batch_size, shared=shared), with_context=True
    )
    return inner.problem(loop, outer_loss), scores
