"""Thompson sampling between a mixture and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import spaces
from metaopt.blackbox import _domain, _new_task, _new_trials, _predictions, _scores, _surrogates, _transformer


@pytest.mark.once
def test_the_sample_of_thompson_sampling_is_independent_of_the_chosen_model():
    """The transformers' level is uniform in (0, 1), also where they were chosen, which a coin decides."""
    share, num = 0.5, 400
    x, y = np.array([[0.0], [1.0]]), np.array([0.0, 0.5])
    kernel = _surrogates.Kernel(jnp.array([-0.5]), jnp.array(1.5), jnp.array(-2.0))
    tasks = [_surrogates.TaskTrials(x, y), _surrogates.TaskTrials(x, y[::-1])]
    # If all parameters are 0, all bins and a failure have the same probability.
    shapes = jax.eval_shape(lambda key: _transformer.init_transformer(key, 1, 0), jax.random.key(0))
    transformers = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), shapes)
    surrogate = _surrogates.surrogate(tasks, kernel, x)
    surrogate = surrogate._replace(transformers=transformers, transformer_share=share)
    domain = _domain.make_domain({"x": spaces.interval(0.0, 1.0)}, None)
    model = _predictions.make_model(surrogate, None, domain, len(tasks))
    task = _new_task.new_task_of(surrogate, None)
    # Other outcomes for the transformers show which model is chosen. Usually the scores of the two overlap.
    far = 1_000.0
    trials = _scores.TrialArrays(_new_trials.padded(x, y), None, _new_trials.padded(x, y + far), None)

    def drawn(key):
        return _scores.acquisition_score(model, "thompson", key, task, trials)(jnp.full((1, 1), 0.5))[0]

    outcomes = -np.asarray(jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), num)))
    chosen = outcomes > far / 2
    edges = far + 0.5 * _transformer._edges()  # 0.5 is the scale of y
    levels = np.interp(outcomes[chosen], edges, np.arange(len(edges)) / len(edges))
    assert abs(len(levels) / num - share) < 0.1  # four standard deviations
    assert abs(np.mean(levels > 0.5) - 0.5) < 0.15
    assert len(np.unique(levels)) > 0.9 * len(levels)
