"""Trains the result of a search from scratch, by the recipe of DARTS.

α --`Search.genotype`--> genotype --`nas.discrete`--> network --`retraining`--> a loop --`train_loop`--> a state
  --`Retraining.finish`--> a `TrainedNetwork`, which predicts
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _batches, _checks, base, inner
from metaopt.nas import _augmentation, _normalization, _ops, _specs, _supernet
from metaopt.nas.search._search import check_rows
from metaopt.nas.search._trained_network import TrainedNetwork, trained_network

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]  # key, x -> x


class Retraining(NamedTuple):
    """The training of one network from scratch.

    Attributes:
      loop: an inner loop without hyperparameters: λ is None. Run it by `inner.run(loop, num_steps)`, or by
        `train_loop`, which can continue after an interruption.
      finish: `(state, data) -> TrainedNetwork`, from a state of the loop and its training data. The result predicts
        with normalization by statistics of training rows, without dropped edges or the auxiliary head.
        `metaopt.save` writes it.
      num_steps: the number of steps that the schedules are made for.
    """

    loop: base.InnerLoop
    finish: Callable[[base.InnerState, base.Data], TrainedNetwork]
    num_steps: int


def retraining(
    network: _specs.Network,
    in_shape: Sequence[int],
    *,
    ops: Mapping[str, _ops.Op],
    num_steps: int,
    batch_size: int = 96,
    augment: Sequence[Augmentation] = (),
    drop_path: float = 0.2,
    auxiliary: float = 0.4,
    auxiliary_widths: tuple[int, int] = (128, 768),
    rate: float = 0.025,
    momentum: float = 0.9,
    decay: float = 3e-4,
    clip: float = 5.0,
    loss: Callable = inner.cross_entropy,
) -> Retraining:
    """Makes the training of one network from scratch, by the recipe of DARTS.

    The published recipe takes 600 epochs, for 20 cells with 36 channels.

        ℓ = loss(network) + `auxiliary` · loss(auxiliary head)
        SGD with momentum on ℓ's gradient, clipped by its norm, plus decay · θ; rate_t = rate (1 + cos(π t / T)) / 2
        for each example, an edge is dropped with probability drop_path · t / T

    The auxiliary head reads the last layer that has a stride. Two things differ from the published code: schedules
    count steps instead of epochs, and normalization has no scale and shift. Expect slightly lower accuracies than the
    published ones. Training normalizes by the batch; `finish` computes statistics of training rows for predictions.

    Args:
      network: a discrete network (`nas.discrete`). Train a network of sizes (`nas.conv_net_space`) by `inner.loop`
        instead: it has no edges and no cells.
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: T.
      batch_size: rows of data {"x": [N, *in_shape], "y": [N]} in a batch. If the data have "mask" [N], padding is not
        drawn. Integers in "x" are converted to floats without scaling: scale images of 0..255 yourself.
      augment: functions `(key, x) -> x` of a batch's x (floats), applied in order. The published ones are
        `nas.crop_and_flip(4)` and `nas.cutout(16)` for 32 × 32 images. Predictions do not apply them.
      drop_path: the probability at the end, in [0, 1). It must be 0 if a cell has only one edge, as in NAS-Bench-Macro.
      auxiliary: weight of the auxiliary head; 0 leaves it out.
      auxiliary_widths: channels of the two convolutions of the auxiliary head.
      rate: SGD's rate at the start.
      momentum: SGD's momentum.
      decay: weight decay of the weights.
      clip: largest norm of the gradient.
      loss: `(outputs, batch) -> []`.

    Returns:
      A `Retraining`: `loop`, an inner loop whose λ is None, for `nas.train_loop` or `inner.run`; `finish`,
      `(state, data) -> TrainedNetwork`, which makes the network that predicts; and `num_steps`. The example of
      `search_report` shows all steps from the search to predictions.

    Raises:
      ValueError: if `rate` or `clip` is not positive.
      ValueError: if the network still has mixing weights, or if `drop_path` is not in [0, 1). Also if no layer has a
        stride for the auxiliary head, or if a cell has only one edge and `drop_path` is not 0. The loop raises it if
        `loss` is the default and untraced labels are not classes.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055, and its code
    """
    for name, value in (("rate", rate), ("clip", clip)):
        _checks.check_positive(name, value)  # a clip of 0 would leave only the weight decay
    _check_edges(network, drop_path)
    strided = [i for i, layer in enumerate(network.layers) if layer.stride > 1]
    if auxiliary and not strided:
        raise ValueError("The auxiliary head needs a layer with a stride, but `network` has none. Pass `auxiliary=0`.")
    recipe = _Recipe(
        supernet=_supernet.supernet(network, in_shape, ops=ops),
        head=_augmentation.auxiliary_head(network.num_outputs, widths=auxiliary_widths),
        head_layer=strided[-1] if auxiliary else None,
        auxiliary=auxiliary,
        augment=tuple(augment),
        drop_path=drop_path,
        num_steps=num_steps,
        loss=loss,
    )

    def optimizer(hyperparams):
        return optax.chain(
            optax.clip_by_global_norm(clip),
            optax.add_decayed_weights(decay),
            optax.sgd(optax.cosine_decay_schedule(rate, num_steps), momentum=momentum),
        )

    loop = inner.loop(
        functools.partial(_train_loss, recipe),
        optimizer,
        init=functools.partial(_init, recipe),
        sampler=inner.minibatch(batch_size),
        with_context=True,
    )
    finish = lambda state, data: trained_network(recipe.supernet, loop.params(state)["network"], data)
    return Retraining(loop, finish, num_steps)


class _Recipe(NamedTuple):
    """The options of the loss. The fields without a comment are its arguments."""

    supernet: _supernet.Supernet
    head: _ops.Op
    head_layer: int | None  # index of the layer that the auxiliary head reads; None without a head
    auxiliary: float
    augment: tuple[Augmentation, ...]
    drop_path: float
    num_steps: int
    loss: Callable


def _check_edges(network: _specs.Network, drop_path: float) -> None:
    if not 0 <= drop_path < 1:
        raise ValueError(f"`drop_path` must be a probability below 1; got {drop_path!r}.")
    if any(len(edge.ops) != 1 for cell in network.cells.values() for edge in cell.edges):
        raise ValueError("`network` must have one op on every edge: pass `nas.discrete(network, genotype)`.")
    if drop_path and (single := [kind for kind, cell in network.cells.items() if len(cell.edges) == 1]):
        raise ValueError(
            f"`drop_path` drops edges at random and needs cells with several edges; {single[0]!r} has only one, but "
            f"`drop_path` is {drop_path}. Pass `drop_path=0`."
        )


def _init(recipe: _Recipe, key, hyperparams, data):
    supernet = recipe.supernet
    num_outputs = supernet.network.num_outputs
    augmented = lambda rows: {**rows, "x": _augmented(recipe, [key] * len(recipe.augment), rows["x"])}
    check_rows(supernet, recipe.loss, "data", data, augmented)
    if isinstance(data, Mapping):
        _checks.warn_of_unscaled_images("`data['x']`", data.get("x"))
    params = {"network": supernet.init(key)}
    if recipe.head_layer is not None:
        x = jax.ShapeDtypeStruct((2, *supernet.in_shape), jnp.zeros(0).dtype)
        shape = jax.eval_shape(supernet.features, params["network"], None, x)[recipe.head_layer].shape[1:]
        params["auxiliary"] = recipe.head.init(jax.random.fold_in(key, 1), shape, num_outputs, 1)
    return params, None


def _augmented(recipe: _Recipe, keys: Sequence[jax.Array], x: Any) -> jax.Array:
    x = jnp.asarray(x, jnp.result_type(x, float))
    for change, key in zip(recipe.augment, keys, strict=True):
        x = change(key, x)
    return x


def _train_loss(recipe: _Recipe, params, hyperparams, batch, context):
    supernet, loss = recipe.supernet, recipe.loss
    drop_key, *keys = jax.random.split(context.key, 1 + len(recipe.augment))
    mask = _batches.row_mask(batch)
    x = _augmented(recipe, keys, batch["x"])
    edges = (drop_key, recipe.drop_path * context.step / recipe.num_steps) if recipe.drop_path else None
    if recipe.head_layer is None:
        return loss(supernet.apply(params["network"], None, x, edges, mask), batch)
    features = supernet.features(params["network"], None, x, edges, mask)
    outputs = supernet.head(params["network"], features[-1])
    auxiliary_outputs = lambda x: recipe.head.apply(params["auxiliary"], x, supernet.network.num_outputs, 1)
    early_outputs = _normalization.over_real_rows(auxiliary_outputs, features[recipe.head_layer], mask)
    return loss(outputs, batch) + recipe.auxiliary * loss(early_outputs, batch)
