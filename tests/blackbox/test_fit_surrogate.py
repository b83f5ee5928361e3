"""The embedding of rows, as it is learned with the weights of tasks."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _row_embedding
from metaopt.blackbox import _fit_surrogate, _surrogates


def test_the_embedding_stands_next_to_the_features_of_each_task():
    """The loss is that of tasks whose features are their own and, standardized over tasks, those of their rows."""
    rng = np.random.default_rng(0)
    num_tasks, num_features, num_members = 3, 2, 2
    rows = {
        "x": rng.normal(size=(num_tasks, 6, 2)),
        "y": np.tile(np.arange(6) % 2, (num_tasks, 1)),
        "mask": np.ones((num_tasks, 6)),
        "feature_mask": np.ones((num_tasks, 2)),
        "class_mask": np.ones((num_tasks, 2)),
    }
    data = {
        "features": rng.normal(size=(num_tasks, num_features)),
        "curves": rng.uniform(size=(num_tasks, 5)),
        "same_family": np.eye(num_tasks, dtype=bool),
        "weights": np.full((num_members, num_tasks), 1 / num_tasks),
    }
    rows, data = jax.tree.map(jnp.asarray, (rows, data))
    params = _row_embedding.init_embedding(jax.random.key(0))
    embedded = np.asarray(jax.jit(jax.vmap(_row_embedding.embed_rows, (None, 0)))(params, rows))
    embedded = (embedded - embedded.mean(0)) / np.sqrt(embedded.var(0) + 1e-6)
    attention = _surrogates.init_attention(jax.random.key(1), num_members, num_features + embedded.shape[1])
    value = jax.jit(_fit_surrogate.embedding_loss)((attention, params), (data, rows))
    whole = data | {"features": jnp.asarray(np.hstack([data["features"], embedded]))}
    np.testing.assert_allclose(value, jax.jit(_surrogates.attention_loss)(attention, whole), rtol=1e-8)
