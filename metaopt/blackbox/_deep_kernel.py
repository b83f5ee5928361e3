"""A Gaussian process whose kernel compares network embeddings of configurations, adapted to a task by a few steps.

    y = a + b f(c),    f ~ GP(m, k),    m(c) = w·φ(c, t),
    k(c, c') = v (s exp(−½ Σ_h ((φ_h(c, t) − φ_h(c', t))/ℓ_h)²) + (1 − s) [c = c']),
    φ(c, t) = tanh(U tanh(W c + V x_t + β) + γ),

where c is an encoded configuration and x_t are the task's features. All parameters are meta-learned by gradient steps
on the marginal likelihood of earlier tasks' outcomes, on a few trials of a few tasks at a time. On a new task, a few
more steps ascend the same likelihood of the task's trials. This is the few-shot adaptation. m, k and φ are shared
between tasks. The offset a and the scale b belong to one task: a is integrated out and several b are tried, as in
`_processes`.

Sources: Wistuba & Grabocka, Few-shot Bayesian optimization with deep kernel surrogates (FSBO), ICLR 2021,
https://arxiv.org/abs/2101.07667; Patacchiola et al., Bayesian meta-learning for the few-shot setting via deep kernels,
NeurIPS 2020, https://arxiv.org/abs/1910.05199; task features as in Jomaa et al., https://arxiv.org/abs/2101.12431.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.blackbox import _processes

ADAPTATION_STEPS = 10
ADAPTATION_RATE = 1e-2  # of Adam
MAX_ADAPTED = 128  # the number of trials that a step uses


class DeepKernel(NamedTuple):
    """Parameters of one such process, or of E processes with one more leading axis on every leaf.

    Attributes:
      configuration: W [D, H].
      task: V [F, H].
      bias: β [H].
      hidden: U [H, H].
      hidden_bias: γ [H].
      mean: w [H].
      log_lengths: logarithms of ℓ, [H].
      logit_smooth: logit of s/.99, [].
      log_amplitude: logarithm of v, [], of normalized outcomes.
    """

    configuration: jax.Array
    task: jax.Array
    bias: jax.Array
    hidden: jax.Array
    hidden_bias: jax.Array
    mean: jax.Array
    log_lengths: jax.Array
    logit_smooth: jax.Array
    log_amplitude: jax.Array


def at_features(network: Any, features: jax.Array) -> Any:
    """A `DeepKernel` or `Transformer` for one task: the task's features enter only through β.

    Args:
      network: one, or E of them, with "bias" β [..., W] and "task" V [..., F, W].
      features: x_t [F], ranked (`rank_features`); zeros if unknown.

    Returns:
      The same network with β + V x_t; x_t is not needed after that.
    """
    return network._replace(bias=network.bias + jnp.einsum("f,...fw->...w", features, network.task))


def init_deep_kernel(key: jax.Array, num_dims: int, num_features: int, *, num_hidden: int = 32) -> DeepKernel:
    """Initial parameters: a random φ, a mean of zero, and a smooth k.

    Args:
      key: consumed.
      num_dims: D, of encoded configurations.
      num_features: F, of tasks; 0 for no features.
      num_hidden: H.

    Returns:
      A `DeepKernel`.
    """
    keys = jax.random.split(key, 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(max(shape[0], 1))
    return DeepKernel(
        2 * normal(keys[0], num_dims, num_hidden),
        normal(keys[1], num_features, num_hidden) / 2,
        jax.random.normal(keys[2], (num_hidden,)) / 2,
        1.5 * normal(keys[3], num_hidden, num_hidden),
        jnp.zeros(num_hidden),
        jnp.zeros(num_hidden),
        jnp.full(num_hidden, np.log(num_hidden) / 2 - 0.5),
        jnp.array(2.0),
        jnp.log(jnp.array(0.1)),
    )


def embed(deep: DeepKernel, x: jax.Array) -> jax.Array:
    """φ of one process.

    Args:
      deep: one process.
      x: [P, D]; differentiable.

    Returns:
      [P, H] in (−1, 1).
    """
    hidden = jnp.tanh(x @ deep.configuration + deep.bias[None])
    return jnp.tanh(hidden @ deep.hidden + deep.hidden_bias[None])


def covariance(deep: DeepKernel, embedded_x: jax.Array, embedded_z: jax.Array, same: jax.Array) -> jax.Array:
    """k of one process between configurations whose φ is given.

    Args:
      deep: one process.
      embedded_x: φ [P, H] of the first configurations.
      embedded_z: φ [N, H] of the second configurations.
      same: [P, N] bool, whether two configurations are the same.

    Returns:
      [P, N].
    """
    inverse = jnp.exp(-deep.log_lengths)[None]
    a, b = embedded_x * inverse, embedded_z * inverse
    distance = jnp.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)
    smooth = 0.99 * jax.nn.sigmoid(deep.logit_smooth)
    return jnp.exp(deep.log_amplitude) * (smooth * jnp.exp(-distance / 2) + (1 - smooth) * same)


def condition_deep(
    deep: DeepKernel, log_scales: jax.Array, trials: tuple[jax.Array, jax.Array, jax.Array], *, own_scale: bool = True
) -> _processes.Processes:
    """Conditions one process on trials, without adapting it.

    Args:
      deep: one process.
      log_scales: [B] logarithms of b.
      trials: (x [N, D], y [N], mask [N]).
      own_scale: as in `_processes.condition`.

    Returns:
      A `Processes` with K = 1.
    """
    x, y, mask = trials
    embedded_x = embed(deep, x)
    k = covariance(deep, embedded_x, embedded_x, _processes.same_configuration(x, x))
    return _processes.condition((embedded_x @ deep.mean)[:, None], k, log_scales[None], (y, mask), own_scale=own_scale)


def deep_kernel_loss(
    deep: DeepKernel, trials: tuple[jax.Array, jax.Array, jax.Array], features: jax.Array, *, penalty: float = 1e-3
) -> jax.Array:
    """The negative log marginal likelihood per trial of one task's normalized outcomes, plus a weight penalty.

    Args:
      deep: one process, to be meta-learned.
      trials: (x [N, D], y [N] normalized, mask [N]); at least two are real.
      features: [F] of the task, ranked.
      penalty: on the sum of squares of w and V, because there are few tasks, each with many trials.

    Returns:
      [].
    """
    process = condition_deep(at_features(deep, features), jnp.zeros(1), trials, own_scale=False)
    nll = -process.log_likelihood[0, 0] / (trials[2].sum() - 1)
    return nll + penalty * ((deep.task**2).sum() + (deep.mean**2).sum())


def adapt_deep_kernel(
    deep: DeepKernel,
    log_scales: jax.Array,
    trials: tuple[jax.Array, jax.Array, jax.Array],
    *,
    num_steps: int = ADAPTATION_STEPS,
    rate: float = ADAPTATION_RATE,
) -> DeepKernel:
    """Few-shot adaptation: Adam steps on the likelihood of a new task's trials, from the meta-learned parameters.

    Args:
      deep: one process, at the task's features.
      log_scales: [B] logarithms of b, all equally likely.
      trials: (x [N, D], y [N], mask [N]), in the task's units, in chronological order. A single trial is not
        informative and changes nothing. If there are more than 128, the steps use the 64 best trials and the 64 latest
        others.
      num_steps: the number of steps; keep it small, since only this keeps the parameters near the meta-learned ones.
      rate: Adam's learning rate.

    Returns:
      A `DeepKernel`. It costs `num_steps` O(N³), N up to 128. Do not differentiate through it.
    """
    optimizer, trials = optax.adam(rate), best_and_latest(trials, MAX_ADAPTED)

    def loss(deep):
        process = condition_deep(deep, log_scales, trials)
        return -jax.nn.logsumexp(process.log_likelihood) / jnp.maximum(trials[2].sum() - 1, 1)

    def step(_, carry):
        deep, state = carry
        updates, state = optimizer.update(jax.grad(loss)(deep), state)
        return optax.apply_updates(deep, updates), state

    adapted, _ = jax.lax.fori_loop(0, num_steps, step, (deep, optimizer.init(deep)))
    some = trials[2].sum() > 1
    return jax.tree.map(lambda new, old: jnp.where(some, new, old), adapted, deep)


def best_and_latest(trials: tuple[jax.Array, jax.Array, jax.Array], num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Selects some of many trials: the best ones as half of the selection, and the latest others.

    Args:
      trials: (x [N, D], y [N], mask [N]), in chronological order.
      num: the number of selected trials, including padding.

    Returns:
      (x, y, mask) of `num` trials, or of all N if N is smaller. If at most `num` trials are real, all of them are
        selected.
    """
    x, y, mask = trials
    if len(y) <= num:
        return trials
    best = jnp.argsort(jnp.where(mask > 0, y, jnp.inf))[: num // 2]
    # Padding has -1. The best trials have -2, because they are already selected.
    when = jnp.where(mask > 0, jnp.arange(len(y)), -1).at[best].set(-2)
    keep = jnp.concatenate([best, jax.lax.top_k(when, num - num // 2)[1]])
    return x[keep], y[keep], mask[keep]
