"""One-shot search: it trains weights that all architectures share, by which any search can score architectures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from metaopt import _batches, base, inner
from metaopt._progress import reporting
from metaopt.nas import _genotypes, _ops, _relaxations, _specs, _supernet
from metaopt.nas.search._search import check_rows, sgd, training_loop
from metaopt.nas.search._settings import with_settings


class OneShot(NamedTuple):
    """A search whose supernet is trained once; any search over genotypes can then use `score`.

    Attributes:
      train: `(key, data) -> params`.
      score: `(params, genotype, batch) -> []`, the loss of a genotype with the shared weights, smaller is better. It
        normalizes by the batch, so compare genotypes on the same batch of many rows. To predict with a genotype, use
        `trained_network(supernet, params, train, weights=nas.one_hot(network, genotype))`.
      supernet: the network that is trained.
      loop: the training loop, for runs that may be interrupted and continued, with checkpoints and a progress bar:
        `nas.train_loop(loop, data, num_steps=..., key=key, hyperparams=hyperparams, checkpoint_dir=...)[0].params`.
      hyperparams: λ of the loop, from which architectures are drawn.
      settings: as in `Search`, for `nas.train_loop`.
    """

    train: Callable[[jax.Array, base.Data], base.Params]
    score: Callable[[base.Params, _specs.Genotype, base.Batch], jax.Array]
    supernet: _supernet.Supernet
    loop: base.InnerLoop
    hyperparams: base.HyperParams
    settings: dict[str, Any]


@with_settings
def single_path_one_shot(
    network: _specs.Space,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    num_steps: int,
    loss: Callable = inner.cross_entropy,
    decay: float = 3e-4,
    optimizer: Callable[[base.HyperParams], optax.GradientTransformation] = sgd,
    sampler: inner.Sampler | None = None,
) -> OneShot:
    """Single-path one-shot: weights shared by all architectures; each step trains one, drawn uniformly.

    The method has no α: any search over a finite space can use `score` afterwards.

    Args:
      network: the spec of the network to search.
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: training steps.
      loss: as for `architecture_search`.
      decay: as for `architecture_search`.
      optimizer: as for `architecture_search`.
      sampler: as for `architecture_search`.

    Returns:
      A `OneShot`: `train`, `(key, data) -> params`; `score`, `(params, genotype, batch) -> []`, the loss of a genotype
      with the shared weights, smaller is better; `supernet`; and for `nas.train_loop`, `loop`, `hyperparams` and
      `settings`. Rows that are padding by "mask" [N] do not enter the loss or the normalization.

    Raises:
      ValueError: if the spec and the shapes do not fit. `train` and `score` raise it if `loss` is the default and
        labels of the data are not classes.

    Source: Guo et al., ECCV 2020, https://arxiv.org/abs/1904.00420
    """
    supernet = _supernet.supernet(network, in_shape, ops=ops, single_path=True)
    loop = training_loop(supernet, _relaxations.uniform_path(), loss, decay, optimizer, sampler)
    run = inner.run(loop, num_steps)
    alpha = _supernet.init_alpha(jax.random.key(0), network, scale=0.0)

    def train(key, data):
        return run(key, alpha, data).params

    @jax.jit
    def evaluate(params, weights, batch):
        mask = _batches.row_mask(batch)
        return loss(supernet.apply(params, weights, batch["x"], None, mask), batch)

    reported = reporting(evaluate, "the score")

    def score(params, genotype, batch):
        check_rows(supernet, loss, "batch", batch)
        return reported(params, _genotypes.one_hot(network, genotype), batch)

    return OneShot(train, score, supernet, loop, alpha, {})
