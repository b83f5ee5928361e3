"""Thompson sampling between a mixture and transformers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox import _scores


def test_the_sample_of_thompson_sampling_is_independent_of_the_chosen_model(monkeypatch):
    """The transformers' level is uniform in (0, 1), also where they were chosen, which a coin decides."""
    share, num = 0.5, 400
    # Constant scores show which model is chosen. Trained models have overlapping scores.
    monkeypatch.setattr(_scores, "_mixture_score", lambda *args: lambda x: -jnp.ones(len(x)))
    level = lambda model, acquisition, key, *args: lambda x: jnp.full(len(x), jax.random.uniform(key))
    monkeypatch.setattr(_scores, "_transformer_score", level)
    model = SimpleNamespace(transformer_share=share)

    def drawn(key):
        return _scores.acquisition_score(model, "thompson", key, None, None)(jnp.zeros((1, 1)))[0]

    scores = np.asarray(jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), num)))
    levels = scores[scores >= 0]
    assert abs(len(levels) / num - share) < 0.1  # four standard deviations
    assert abs(np.mean(levels > 0.5) - 0.5) < 0.15
