"""Arguments of `nas` that would give a network that is not trained, or a number of something else."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_search import NET, ONE, OPS

from metaopt import nas

TABLE = nas.CostTable(1.0, (nas.CostTerm((("cell", 0),), np.arange(3.0)),), "s")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nas.single_path_one_shot(ONE, (3,), ops=OPS, num_steps=0), "`num_steps` must be at least 1; got 0"),
        (lambda: nas.retraining(ONE, (3,), ops=OPS, num_steps=1, clip=0.0), "`clip` must be positive; got 0.0"),
        (lambda: nas.beta_darts(NET, (3,), ops=OPS, num_steps=2, weight=-1.0), "`weight` must be at least 0; got -1.0"),
        (lambda: nas.darts_plus(NET, (3,), ops=OPS, every=1, most=-1), "`most` must be at least 0; got -1"),
        (lambda: nas.expected_cost(TABLE, {"cell": jnp.ones((2, 1, 3))}), "must be .edges, ops. of one task"),
        (lambda: nas.genotype_from_text('{"version":1,"genotype":{"cell":{}}}'), "the edges of 'cell' must be a list"),
        (lambda: nas.graph_ops(jnp.ones((3, 1))), r"`adjacency` must be square; got shape \(3, 1\)"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
