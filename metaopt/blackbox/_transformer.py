"""A transformer over the trials of a task: it predicts the outcome of a configuration, given the trials so far.

The trials are tokens of a set. The queried configurations are further tokens; each attends to the trials and to itself:

    task:   e₀ = β + V x_t + N [log(1 + n), n = 0, n = 1]
    trial:  e_i = C c_i + Y [asinh(10 v_i), v_i = 0, it failed, it did not]
    query:  e_c = C c + q
    e ← e + Σ_heads attention(norm e; the task, the trials, itself),    e ← e + W₂ relu(W₁ norm e)    (L times)
    p(v, or failure | c, trials) = softmax(W norm e_c + b)

where c is an encoded configuration, x_t are the task's features, and n is the number of trials that did not fail.
Outcomes are relative to the trials themselves, so their units do not matter: with n > 1,

    v = (y − min_i y_i) / s,    s = max(Σ_i (y_i − min_j y_j), b / 10) / (n − 1).

b is the scale of earlier tasks. It bounds s from below because a few equal, or nearly equal, outcomes do not imply that
all others are equal. One trial has no scale: then s is b. Without any trial, the minimum is unknown too: then v is the
normalized outcome (0 the task's best, 1 its worst).

p is constant within bins. The bins are narrow near the best trial and wide far from it; failure is a separate class.
Nothing depends on the order of the trials. The parameters are trained on earlier tasks: a random number of a task's
trials is shown, and the outcomes of others are predicted. One forward pass then replaces the inference that a Gaussian
process does by solving equations.

Sources: Müller et al., Transformers can do Bayesian inference, ICLR 2022, https://arxiv.org/abs/2112.10510 (the pattern
of attention, the bins); Müller et al., PFNs4BO, ICML 2023, https://arxiv.org/abs/2305.17535; Nguyen & Grover,
Transformer neural processes, ICML 2022, https://arxiv.org/abs/2207.04179 (trained on tasks, not on a prior).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox import _deep_kernel

NUM_BINS = 100
MAX_SHOWN = 32  # a transformer is trained with at most this number of trials of a task
_LEAST = 0.1  # lower bound of the sum of y − min y, as a fraction of the scale of earlier tasks
_NUM_HEADS = 4
_LOWEST, _HIGHEST, _NARROW = -10.0, 50.0, 0.1  # of v; values outside are in the outermost bins


class Transformer(NamedTuple):
    """Parameters of one transformer, or of E of them with one more leading axis on every leaf. W is its width.

    Attributes:
      configuration: C [D, W].
      outcome: Y [4, W].
      task: V [F, W].
      count: N [3, W].
      bias: β [W].
      query: q [W].
      layers: "qkv" [L, W, 3 W], "mix" [L, W, W], "up" [L, W, 2 W], "down" [L, 2 W, W].
      head: W [W, B + 1]; the last column is for failures.
      head_bias: b [B + 1].
    """

    configuration: jax.Array
    outcome: jax.Array
    task: jax.Array
    count: jax.Array
    bias: jax.Array
    query: jax.Array
    layers: dict[str, jax.Array]
    head: jax.Array
    head_bias: jax.Array


class Binned(NamedTuple):
    """Outcomes at P configurations, with constant density in each of B bins that all configurations share.

    Attributes:
      edges: [B + 1] ascending, in the units of the task.
      probs: [P, B] of the bins.
      failure: [P] probability that a trial fails; with `probs` it sums to 1.
    """

    edges: jax.Array
    probs: jax.Array
    failure: jax.Array


class TrialsRead(NamedTuple):
    """A transformer's encoding of the N trials of a task; it serves for any queries.

    Attributes:
      keys: [L, N + 1, heads, W / heads]; with one more leading axis for E transformers.
      values: as `keys`.
      mask: [N + 1] bool.
      possible: [B + 1] bool, whether an outcome can be in each bin; the last entry is for failure, always true.
      low: [] the zero of v, in the units of the task.
      scale: [] s.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    possible: jax.Array
    low: jax.Array
    scale: jax.Array


def init_transformer(
    key: jax.Array, num_dims: int, num_features: int, *, width: int = 32, num_layers: int = 2
) -> Transformer:
    """Random layers and a zero head: all bins have the same logit, whatever the trials are.

    Args:
      key: consumed.
      num_dims: D, of encoded configurations.
      num_features: F, of tasks; 0 for no features.
      width: W, a multiple of 4 (the number of heads).
      num_layers: L.

    Returns:
      A `Transformer`.
    """
    keys = jax.random.split(key, 5)
    normal = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(max(shape[-2], 1))

    def layer(key):
        keys = jax.random.split(key, 4)
        return {
            "qkv": normal(keys[0], width, 3 * width),
            "mix": normal(keys[1], width, width) / np.sqrt(num_layers),
            "up": normal(keys[2], width, 2 * width),
            "down": normal(keys[3], 2 * width, width) / np.sqrt(num_layers),
        }

    return Transformer(
        2 * normal(keys[0], num_dims, width),
        normal(keys[1], 4, width),
        normal(keys[2], num_features, width) / 2,
        normal(keys[3], 3, width),
        jnp.zeros(width),
        jnp.zeros(width),
        jax.vmap(layer)(jax.random.split(keys[4], num_layers)),
        jnp.zeros((width, NUM_BINS + 1)),
        jnp.zeros(NUM_BINS + 1),
    )


def read_trials(
    transformers: Transformer, trials: tuple[jax.Array, jax.Array, jax.Array], scale: jax.Array | float = 1.0
) -> TrialsRead:
    """Encodes the trials of a task.

    Args:
      transformers: E transformers, specialized to the task (`at_features`).
      trials: (x [N, D], y [N], mask [N]); y may have any units, and is NaN if the trial failed. N may be 0.
      scale: b, the scale of earlier tasks (`Surrogate.log_scales`), for trials whose outcomes do not determine a scale.

    Returns:
      A `TrialsRead` with leaves [E, ...]; it costs O(E L W N (N + W)).
    """
    return jax.vmap(lambda member: _read(member, trials, scale))(transformers)


def _read(transformer, trials, scale) -> TrialsRead:
    x, y, mask = trials
    seen = (mask > 0) & ~jnp.isnan(y)
    low, scale = _zero_and_scale(y, seen, scale)
    v = jnp.where(seen, (y - low) / scale, 0.0)
    num = seen.sum()
    outcome_features = [jnp.arcsinh(v / _NARROW), seen & (v <= 0), (mask > 0) & ~seen, seen]
    of_outcome = jnp.stack([mark.astype(x.dtype) for mark in outcome_features], 1)
    of_count = jnp.stack([jnp.log1p(num.astype(x.dtype)), num == 0, num == 1]).astype(x.dtype)
    first = transformer.bias + of_count @ transformer.count
    tokens = jnp.concatenate([first[None], x @ transformer.configuration + of_outcome @ transformer.outcome])
    is_real = jnp.concatenate([jnp.ones(1, bool), mask > 0])
    tokens = jnp.where(is_real[:, None], tokens, 0.0)  # padding may hold any values

    def step(tokens, layer):
        q, k, v = _qkv(tokens, layer)
        logits = jnp.einsum("uhk,vhk->huv", q, k) / np.sqrt(q.shape[-1])
        mixed = jnp.einsum("huv,vhk->uhk", jax.nn.softmax(logits, where=is_real[None, None]), v)
        return _onward(tokens, mixed, layer), (k, v)

    _, (keys, values) = jax.lax.scan(step, tokens, transformer.layers)
    # Without a trial, v is a normalized outcome, in [0, 1]. With one trial, v is the difference of two such outcomes,
    # in [-1, 1].
    lowest = jnp.where(num == 0, 0.0, jnp.where(num == 1, -1.0, -jnp.inf))
    highest = jnp.where(num < 2, 1.0, jnp.inf)
    edges = jnp.asarray(_edges(), x.dtype)
    possible = jnp.append((edges[1:] > lowest) & (edges[:-1] <= highest), True)
    return TrialsRead(keys, values, is_real, possible, low, scale)


def _logits(transformer: Transformer, read: TrialsRead, x: jax.Array) -> jax.Array:
    """[P, B + 1] log probabilities of v's bins, and of failure."""
    tokens = x @ transformer.configuration + transformer.query[None]

    def step(tokens, layer_and_trials):
        layer, keys, values = layer_and_trials
        q, k, v = _qkv(tokens, layer)
        root = np.sqrt(q.shape[-1])
        trial_logits = jnp.where(read.mask[None, None], jnp.einsum("phk,nhk->phn", q, keys) / root, -jnp.inf)
        self_logits = (q * k).sum(-1) / root
        shares = jax.nn.softmax(jnp.concatenate([trial_logits, self_logits[..., None]], -1))
        mixed = jnp.einsum("phn,nhk->phk", shares[..., :-1], values) + shares[..., -1:] * v
        return _onward(tokens, mixed, layer), None

    tokens, _ = jax.lax.scan(step, tokens, (transformer.layers, read.keys, read.values))
    logits = _norm(tokens) @ transformer.head + transformer.head_bias[None]
    return jax.nn.log_softmax(jnp.where(read.possible[None], logits, -1e9))


def predict_binned(transformers: Transformer, read: TrialsRead, x: jax.Array) -> Binned:
    """Predicts the outcomes at x by the mean of the probabilities of E transformers.

    Args:
      transformers: E transformers, specialized to the task (`at_features`).
      read: the task's trials, by `read_trials`.
      x: [P, D]; differentiable.

    Returns:
      A `Binned`; it costs O(E L W P (N + W)).
    """
    probs = jnp.exp(jax.vmap(_logits, in_axes=(0, 0, None))(transformers, read, x)).mean(0)
    edges = read.low[0] + read.scale[0] * jnp.asarray(_edges(), probs.dtype)
    return Binned(edges, probs[:, :-1], probs[:, -1])


def transformer_loss(
    transformer: Transformer,
    trials: tuple[jax.Array, jax.Array, jax.Array],
    targets: tuple[jax.Array, jax.Array, jax.Array],
    features: jax.Array,
) -> jax.Array:
    """The cross-entropy of the binned outcomes of some trials of a task, given others.

    Args:
      transformer: one transformer, to be trained.
      trials: (x [N, D], y [N], mask [N]) that are shown; y is normalized, and NaN if the trial failed.
      targets: (x [P, D], y [P], mask [P]) whose outcomes are predicted; at least one is real.
      features: [F] of the task, ranked.

    Returns:
      [].
    """
    x, _, mask = targets
    transformer = _deep_kernel.at_features(transformer, features)
    logits = _logits(transformer, _read(transformer, trials, 1.0), x)
    log_probs = jnp.take_along_axis(logits, outcome_classes(trials, targets)[:, None], axis=1)[:, 0]
    return -(log_probs * mask).sum() / mask.sum()


def outcome_classes(
    trials: tuple[jax.Array, jax.Array, jax.Array], targets: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    """The index of the bin that contains an outcome, or B if the trial failed.

    Args:
      trials: the trials that are shown, as for `transformer_loss`.
      targets: [P] trials to predict, as for `transformer_loss`.

    Returns:
      [P] integers.
    """
    _, y, mask = trials
    low, scale = _zero_and_scale(y, (mask > 0) & ~jnp.isnan(y), 1.0)
    v = (targets[1] - low) / scale
    bins = jnp.searchsorted(jnp.asarray(_edges(), v.dtype), v, side="right") - 1
    return jnp.where(jnp.isnan(v), NUM_BINS, jnp.clip(bins, 0, NUM_BINS - 1))


def binned_improvement(binned: Binned, best: jax.Array | float) -> jax.Array:
    """E[max(best − y, 0)]; a failed trial improves nothing.

    Args:
      binned: the predictions at P configurations.
      best: [] the smallest outcome so far.

    Returns:
      [P], larger is better.
    """
    left, right = binned.edges[:-1], binned.edges[1:]
    below = lambda edge: jnp.maximum(best - edge, 0.0) ** 2
    return binned.probs @ ((below(left) - below(right)) / (2 * (right - left)))


def binned_moments(binned: Binned, failed: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the outcomes.

    Args:
      binned: the predictions at P configurations.
      failed: [] the outcome that a failed trial is assumed to have.

    Returns:
      [P], [P].
    """
    left, right = binned.edges[:-1], binned.edges[1:]
    mean = binned.probs @ ((left + right) / 2) + binned.failure * failed
    apart = (left + right)[None] / 2 - mean[:, None]
    variance = (binned.probs * (apart**2 + (right - left)[None] ** 2 / 12)).sum(1)
    variance = variance + binned.failure * (failed - mean) ** 2
    return mean, jnp.sqrt(jnp.maximum(variance, 1e-12))  # 0 if failure is certain, where the root has no derivative


def binned_quantile(binned: Binned, level: jax.Array | float) -> jax.Array:
    """The quantile of the outcomes at a level; failures count as larger than all outcomes.

    Args:
      binned: the predictions at P configurations.
      level: [] or [P], in (0, 1).

    Returns:
      [P]; the last edge, if the trial fails at this level.
    """
    cumulative = jnp.pad(jnp.cumsum(binned.probs, axis=1), ((0, 0), (1, 0)))
    level = jnp.broadcast_to(level, len(cumulative))
    return jax.vmap(lambda level, cumulative: jnp.interp(level, cumulative, binned.edges))(level, cumulative)


def binned_below(binned: Binned, y: jax.Array) -> jax.Array:
    """The probability of an outcome below y; failures count as larger than all outcomes.

    Args:
      binned: the predictions at P configurations.
      y: [P].

    Returns:
      [P].
    """
    left, right = binned.edges[:-1][None], binned.edges[1:][None]
    return (binned.probs * jnp.clip((y[:, None] - left) / (right - left), 0.0, 1.0)).sum(1)


def _edges() -> np.ndarray:
    """[B + 1] edges of v, evenly spaced in asinh(v/δ) on either side of 0, which is one of the edges."""
    lowest, highest = np.arcsinh(_LOWEST / _NARROW), np.arcsinh(_HIGHEST / _NARROW)
    num_below = round(NUM_BINS * lowest / (lowest - highest))
    below, above = np.linspace(lowest, 0, num_below + 1), np.linspace(0, highest, NUM_BINS - num_below + 1)
    return _NARROW * np.sinh(np.concatenate([below[:-1], above]))


def _zero_and_scale(y, seen, scale):
    num = seen.sum()
    low = jnp.where(num > 0, jnp.where(seen, y, jnp.inf).min(initial=jnp.inf), 0.0)
    excess = jnp.maximum(jnp.where(seen, y - low, 0.0).sum(), _LEAST * scale)
    return low, jnp.where(num > 1, excess / jnp.maximum(num - 1, 1), scale)


def _norm(tokens):
    return jax.nn.standardize(tokens, epsilon=1e-6)


def _qkv(tokens, layer):
    return jnp.split((_norm(tokens) @ layer["qkv"]).reshape(len(tokens), _NUM_HEADS, -1), 3, axis=-1)


def _onward(tokens, mixed, layer):
    tokens = tokens + mixed.reshape(tokens.shape) @ layer["mix"]
    return tokens + jax.nn.relu(_norm(tokens) @ layer["up"]) @ layer["down"]
