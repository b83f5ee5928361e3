"""Checks of architecture search: relaxations that mix on a single path, runs that found nothing, and a wrong λ."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, training
from metaopt.nas import _relaxations


def check_single(relaxation, network, edge_weights) -> None:
    """Raises ValueError if a relaxation gives weight to several ops of an edge, even at one-hot α.

    On a single path only one of them would run.
    """
    with jax.ensure_compile_time_eval():
        alpha = {kind: jnp.eye(len(c.edges[0].ops))[jnp.zeros(len(c.edges), int)] for kind, c in network.cells.items()}
        given = {k: {"ops": a, "edges": jnp.zeros(len(a))} for k, a in alpha.items()} if edge_weights else alpha
        weights = _relaxations.mixing_weights(relaxation, network, given, jax.random.key(0))
        several = [kind for kind, w in weights.items() if bool(((w != 0).sum(-1) > 1).any())]
    if several:
        raise ValueError(
            f"`single_path` runs only the op with the largest weight, but `relaxation` gives weight to several ops of "
            f"an edge of {several[0]!r}. Use `nas.gumbel_softmax(..., hard=True)` or `nas.uniform_path()`."
        )


def alpha_beside_init(hyperparams: base.HyperParams) -> base.HyperParams:
    """Returns α of {"alpha": α, "init": θ_0}; raises ValueError for another λ."""
    if not isinstance(hyperparams, Mapping) or "alpha" not in hyperparams:
        got = f"the keys {[*hyperparams]}" if isinstance(hyperparams, Mapping) else type(hyperparams).__name__
        raise ValueError(
            'With `learn_init` the search\'s λ is {"alpha": α, "init": θ_0}; got ' + got + ". If you have "
            'only α, for example from `fine_tune`, pass {"alpha": α}; genotypes and weights need nothing else.'
        )
    return hyperparams["alpha"]


def found(result: training.FitResult) -> base.HyperParams:
    """Returns λ after the last step; raises ValueError if no step had a finite loss and a finite hypergradient."""
    num = len(result.history.get("skipped", ()))
    if num and not (np.isfinite(result.history["value"]) & (np.asarray(result.history["skipped"]) == 0)).any():
        raise ValueError(
            f"None of the run's {num} steps had a finite loss and a finite hypergradient, so α was not trained and has "
            "no meaningful genotype. Losses (`result.history`) are NaN if labels are outside 0..number of outputs - 1, "
            "if data are NaN (`tasks.stack` rejects them), or if the weights diverge (use a smaller rate)."
        )
    return result.hyperparams
