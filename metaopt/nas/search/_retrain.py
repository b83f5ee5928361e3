"""Trains the result of a search from scratch, and compares its accuracy with the search's own accuracies.

    α --`Search.genotype`--> genotype --`nas.discrete`--> network --`retraining`--> a loop --`train`--> a state
      --`Retraining.finish`--> a `TrainedNetwork`, which predicts

Every searched architecture has three accuracies, which `search_report` compares:

- of the supernet with the mixing weights that the architecture was decoded from,
- of the architecture with the supernet's weights (one-hot mixing weights),
- of the architecture trained from scratch.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _checks, base, inner, training
from metaopt.nas import _augmentation, _normalization, _ops, _specs, _supernet
from metaopt.nas.search._architecture import check_data
from metaopt.nas.search._trained_network import TrainedNetwork, trained_network

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]  # key, x -> x


class Retraining(NamedTuple):
    """The training of one network from scratch.

    Attributes:
      loop: an inner loop without hyperparameters (λ is None). Run it by `inner.run(loop, num_steps)`, or by `train`,
        which can continue after an interruption.
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
    """The standard recipe for comparing searched architectures, from DARTS: 600 epochs of 20 cells with 36 channels.

        ℓ = loss(network) + `auxiliary` · loss(auxiliary head)
        SGD with momentum on ℓ's gradient, clipped by its norm, plus decay · θ; rate_t = rate (1 + cos(π t / T)) / 2
        for each example, an edge is dropped with probability drop_path · t / T

    The auxiliary head reads the last layer that has a stride. Two things differ from the published code: schedules
    count steps instead of epochs, and normalization has no scale and shift. Expect slightly lower accuracies than the
    published ones. Training normalizes by the batch; `finish` computes statistics of training rows for predictions.

    Args:
      network: a discrete network (`nas.discrete`).
      in_shape: shape of one input.
      ops: the ops of the space.
      num_steps: T.
      batch_size: rows of data {"x": [N, *in_shape], "y": [N]} in a batch. If the data have "mask" [N], padding is not
        drawn. Integers in "x" are converted to floats without scaling: scale images of 0..255 yourself.
      augment: functions `(key, x) -> x` of a batch's x (floats), applied in order. The published ones are
        `nas.crop_and_flip(4)` and `nas.cutout(16)` for 32 × 32 images. Predictions do not apply them.
      drop_path: the probability at the end, in [0, 1). It must be 0 if a cell has only one edge, as in NAS-Bench-Macro.
      auxiliary: weight of the auxiliary head; 0 leaves it out.
      auxiliary_widths: as for `nas.auxiliary_head`.
      rate: SGD's rate at the start.
      momentum: SGD's momentum.
      decay: weight decay of the weights.
      clip: largest norm of the gradient.
      loss: `(outputs, batch) -> []`.

    Returns:
      A `Retraining`. The example of `search_report` shows all steps from the search to predictions.

    Raises:
      ValueError: if the network still has mixing weights, or is a network of sizes (`nas.conv_net_space`). Also if no
        layer has a stride for the auxiliary head, if a number is out of range, or if a cell has only one edge and
        `drop_path` is not 0. The loop raises it if `loss` is the default and untraced labels are not classes.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055, and its code
    """
    _checks.check_integer("num_steps", num_steps, 1)
    _checks.check_integer("batch_size", batch_size, 1)
    for name, value in (("rate", rate), ("clip", clip)):
        _checks.check_positive(name, value)
    for name, value in (("auxiliary", auxiliary), ("decay", decay), ("momentum", momentum)):
        _checks.check_positive(name, value, zero=True)
    if not 0 <= drop_path < 1:
        raise ValueError(f"`drop_path` must be a probability below 1; got {drop_path!r}.")
    if not isinstance(network, _specs.Network):
        raise ValueError(
            "`network` must be a `nas.Network`; a network of sizes has no edges for `drop_path` and no cells for an "
            "auxiliary head. Train it with `inner.loop` over `nas.supernet(network, in_shape, ops={}).apply`."
        )
    if any(len(edge.ops) != 1 for cell in network.cells.values() for edge in cell.edges):
        raise ValueError("`network` must have one op on every edge: pass `nas.discrete(network, genotype)`.")
    if drop_path and (single := [kind for kind, cell in network.cells.items() if len(cell.edges) == 1]):
        raise ValueError(
            f"`drop_path` drops edges at random and needs cells with several edges; {single[0]!r} has only one, but "
            f"`drop_path` is {drop_path}. Pass `drop_path=0`."
        )
    supernet = _supernet.supernet(network, in_shape, ops=ops)
    strided = [i for i, layer in enumerate(network.layers) if layer.stride > 1]
    if auxiliary and not strided:
        raise ValueError("The auxiliary head needs a layer with a stride, but `network` has none. Pass `auxiliary=0`.")
    auxiliary_layer = strided[-1] if auxiliary else None
    head = _augmentation.auxiliary_head(network.num_outputs, widths=auxiliary_widths)

    def init(key, hyperparams, data):
        check_data(loss, network, data)
        params = {"network": supernet.init(key)}
        if auxiliary_layer is not None:
            x = jax.ShapeDtypeStruct((2, *in_shape), jnp.zeros(0).dtype)
            shape = jax.eval_shape(supernet.features, params["network"], None, x)[auxiliary_layer].shape[1:]
            params["auxiliary"] = head.init(jax.random.fold_in(key, 1), shape, network.num_outputs, 1)
        return params, None

    def train_loss(params, hyperparams, batch, context):
        drop_key, *keys = jax.random.split(context.key, 1 + len(augment))
        mask = inner.row_mask(batch)
        x = jnp.asarray(batch["x"], jnp.result_type(batch["x"], float))
        for change, key in zip(augment, keys, strict=True):
            x = change(key, x)
        edges = (drop_key, drop_path * context.step / num_steps) if drop_path else None
        if auxiliary_layer is None:
            return loss(supernet.apply(params["network"], None, x, edges, mask), batch)
        features = supernet.features(params["network"], None, x, edges, mask)
        outputs = supernet.head(params["network"], features[-1])
        auxiliary_outputs = lambda x: head.apply(params["auxiliary"], x, network.num_outputs, 1)
        early_outputs = _normalization.over_real_rows(auxiliary_outputs, features[auxiliary_layer], mask)
        return loss(outputs, batch) + auxiliary * loss(early_outputs, batch)

    def optimizer(hyperparams):
        return optax.chain(
            optax.clip_by_global_norm(clip),
            optax.add_decayed_weights(decay),
            optax.sgd(optax.cosine_decay_schedule(rate, num_steps), momentum=momentum),
        )

    sampler = inner.minibatch(batch_size)
    loop = inner.loop(train_loss, optimizer, init=init, sampler=sampler, with_context=True)
    finish = lambda state, data: trained_network(supernet, loop.params(state)["network"], data)
    return Retraining(loop, finish, num_steps)


def train(
    loop: base.InnerLoop,
    data: base.Data,
    *,
    num_steps: int,
    key: jax.Array,
    hyperparams: base.HyperParams = None,
    callback: Callable[[int, dict[str, Any]], Any] | None = None,
    progress: bool | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int = 1_000,
    settings: Mapping[str, Any] | None = None,
    compilation_cache: str | os.PathLike | None = None,
) -> tuple[base.InnerState, np.ndarray]:
    """Trains an inner loop step by step on the host: `inner.run` for long runs that may be interrupted and continued.

    It calls `training.fit` with a rule whose λ has no effect. Progress, checkpoints and signals work as in `fit`:
    Ctrl-C or SIGTERM ends the training after the current step. It then raises, so half-trained parameters are never
    returned, and a loop over architectures ends too. The result equals, to rounding, that of `inner.run` with the first
    key of `jax.random.split(key)`.

    Args:
      loop: the inner loop.
      data: its training data.
      num_steps: total number of steps, including the steps before an interruption.
      key: the source of all randomness.
      hyperparams: λ, constant, a tree of arrays; None if the loop has none.
      callback: `(step, metrics) -> stop`, with the metric "loss", the training loss. Training continues after a
        non-finite loss, as in `inner.run`: use the callback to stop it.
      progress: as for `training.fit`: None shows a bar in a terminal, and prints lines elsewhere.
      checkpoint_dir: the folder for checkpoints; each training needs its own. None writes no checkpoints.
      checkpoint_every: steps between checkpoints. Checkpoints do not contain the data.
      settings: as for `training.fit`, such as `{"genotype": nas.genotype_to_json(genotype)}`.
      compilation_cache: as for `training.fit`: a folder in which JAX keeps compiled programs.

    Returns:
      The inner state, and [steps] training losses: fewer than `num_steps` if `callback` stopped it.

    Raises:
      KeyboardInterrupt: if SIGINT arrived; with `checkpoint_dir`, the same call continues. The exception's `result` is
        the partial `FitResult`, whose `state.estimator_state` is the inner state.
      SystemExit: the same for SIGTERM, with status 143.
      ValueError: if a count is out of range; if the loop's `init` rejects the data, such as labels that are not classes
        of a `retraining`. Also if `checkpoint_dir` is in use, cannot be written to, or holds another run: another key,
        other data, another λ, another program or other `settings`.
    """
    init_key, fit_key = jax.random.split(key)
    # `fit` traces the data, and the values of traced labels cannot be checked. So let `init` see the arrays once.
    arrays = jax.tree.map(jnp.asarray, (hyperparams, data))
    jax.eval_shape(lambda key: loop.init(key, *arrays), init_key)

    # The loop's λ comes with the data; the rule's own λ is a number without effect.
    def init(key, hyperparams, task):
        return loop.init(init_key, task["hyperparams"], task["data"])

    def estimate(hyperparams, task, state):
        batch, context = loop.batch(state, task["data"]), loop.context(state)
        loss = jax.value_and_grad(loop.loss, has_aux=True)
        (value, model_state), grads = loss(loop.params(state), task["hyperparams"], batch, context)
        state = loop.update(state, grads, model_state, task["hyperparams"])
        # A non-finite value would end the task, and training would start again.
        finite = jnp.where(jnp.isfinite(value), value, jnp.finfo(value.dtype).max)
        return base.Estimate(finite, jnp.zeros_like(hyperparams), jnp.array(False), {"loss": value}), state

    learner = training.learner(base.Estimator(init, estimate, kind="exact"), optax.set_to_zero())
    result = training.fit(
        learner,
        lambda key: {"data": data, "hyperparams": hyperparams},
        hyperparams=jnp.zeros(()),
        num_steps=num_steps,
        key=fit_key,
        callback=callback,
        progress=progress,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        settings=settings,
        compilation_cache=compilation_cache,
    )
    return result.state.estimator_state, result.history.get("loss", np.zeros(0))


# ---- Scores of the search against training from scratch ------------------------------------------------------------


class ArchitectureScores(NamedTuple):
    """Accuracies of one architecture on the same rows, each in [0, 1], as from `TrainedNetwork.accuracy`.

    Attributes:
      name: the architecture's name.
      inherited: accuracy with the supernet's weights (one-hot mixing weights).
      retrained: accuracies after training from scratch, one per seed.
      mixed: accuracy of the supernet with the mixing weights that the architecture was decoded from; NaN if it does
        not come from a search. If only one op per edge was trained (GDAS), compute it with a `nas.supernet` of the
        same spec without `single_path`.
    """

    name: str
    inherited: float
    retrained: tuple[float, ...]
    mixed: float = math.nan


class SearchReport(NamedTuple):
    """The result of `search_report`.

    Attributes:
      correlation: Spearman's rank correlation of `inherited` with the mean of `retrained`, over architectures. It is
        NaN for a single architecture, and if one side is constant.
      interval: its 95 % interval; NaN for fewer than five architectures.
      discretization_gap: the mean of mixed − inherited, over architectures with a finite `mixed`.
      evaluation_gap: the mean of retrained − inherited, over all architectures.
      text: the whole report as a table in Markdown.
    """

    correlation: float
    interval: tuple[float, float]
    discretization_gap: float
    evaluation_gap: float
    text: str


def search_report(scores: Sequence[ArchitectureScores]) -> SearchReport:
    """Compares the search's ranking of architectures with their ranking after training from scratch.

        interval = tanh(artanh ρ ± 1.96 √((1 + ρ²/2) / (n − 3)))

    Args:
      scores: at least one. A single architecture has no ranks: the report then shows only the gaps.

    Returns:
      A `SearchReport`.

    Raises:
      ValueError: if `scores` is empty, if an entry has no `retrained`, or if an accuracy is not in [0, 1].

    Source: Bonett & Wright, Psychometrika 65, 2000, for the interval; Yu et al., ICLR 2020,
    https://arxiv.org/abs/1902.08142, for the question

    A small example of all steps after a search:

    >>> import jax, numpy as np, optax
    >>> from metaopt import base, nas, training
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
    >>> network = nas.Network({"cell": cell}, (nas.Layer("cell", 8),), num_outputs=2)
    >>> x = np.random.default_rng(0).normal(size=(64, 3))
    >>> y = (x[:, 0] * x[:, 1] > 0).astype(int)
    >>> task = base.Task({"x": x[:32], "y": y[:32]}, {"x": x[32:], "y": y[32:]})
    >>> search = nas.darts(network, (3,), ops=nas.BLOCKS, order="first")
    >>> result = training.fit(
    ...     training.learner(search.estimator, optax.adam(0.1)), lambda key: task, num_steps=10, progress=False,
    ...     hyperparams=search.hyperparams(jax.random.key(0)), key=jax.random.key(1),
    ... )
    >>> alpha = search.found(result)
    >>> genotype = search.genotype(alpha)  # `nas.genotype_to_json` keeps it

    Train from scratch (without the auxiliary head, because no layer has a stride):

    >>> small = nas.discrete(network, genotype)
    >>> alone = nas.retraining(small, (3,), ops=nas.BLOCKS, num_steps=20, batch_size=16, auxiliary=0)
    >>> state, losses = nas.train(
    ...     alone.loop, task.train, num_steps=alone.num_steps, key=jax.random.key(2), progress=False
    ... )

    >>> trained = alone.finish(state, task.train)  # `metaopt.save` writes it
    >>> trained.predict(x[:1]).shape
    (1,)

    The three accuracies (a real evaluation uses a third part of the rows, which neither search nor training has seen):

    >>> shared = result.state.estimator_state.inner.params  # the supernet's weights
    >>> supernet = lambda weights: nas.trained_network(search.supernet, shared, task.train, weights=weights)
    >>> found = nas.ArchitectureScores(
    ...     "found", inherited=supernet(nas.one_hot(network, genotype)).accuracy(task.valid),
    ...     retrained=(trained.accuracy(task.valid),), mixed=supernet(search.weights(alpha)).accuracy(task.valid),
    ... )
    >>> print(nas.search_report([found]).text)  # doctest: +ELLIPSIS
    |  | supernet, mixed | supernet's weights, discrete | retrained | mixed − discrete | seeds |
    | --- | --- | --- | --- | --- | --- |
    | found | ... | ... | ... | ... | 1 |
    <BLANKLINE>
    Accuracies in %. Rank correlation (Spearman) ... undefined, one alone has no ranks. Discretization gap ... points.
    """
    scores = list(scores)
    if not scores or any(not len(score.retrained) for score in scores):
        raise ValueError(
            "`scores` must hold at least one architecture, each with at least one `retrained` accuracy; got "
            f"{[(score.name, len(score.retrained)) for score in scores]}."
        )
    for score in scores:
        for value in (score.inherited, score.mixed, *score.retrained):
            if value < 0 or value > 1 + 1e-6:  # False for NaN, which is allowed
                raise ValueError(
                    f"Accuracies must be in [0, 1], as `TrainedNetwork.accuracy`; got {value} of {score.name!r}. "
                    "Divide percentages by 100."
                )
    inherited = np.array([score.inherited for score in scores])
    retrained = np.array([np.mean(score.retrained) for score in scores])
    rho, interval = math.nan, (math.nan, math.nan)
    if np.ptp(inherited) > 0 and np.ptp(retrained) > 0:
        from scipy.stats import spearmanr

        rho = float(np.asarray(spearmanr(inherited, retrained))[0])
        if len(scores) >= 5:
            half = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(scores) - 3))
            center = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
            interval = (math.tanh(center - half), math.tanh(center + half))
    mixed = np.array([score.mixed for score in scores])
    searched = np.isfinite(mixed)
    discretization = float((mixed - inherited)[searched].mean()) if searched.any() else math.nan
    evaluation = float((retrained - inherited).mean())
    header = ["", "supernet, mixed", "supernet's weights, discrete", "retrained", "mixed − discrete", "seeds"]
    rows = [header, ["---"] * len(header)]
    for score, alone in zip(scores, retrained, strict=True):
        told = lambda value: "" if math.isnan(value) else f"{100 * value:.1f}"
        spread = f" ± {100 * np.std(score.retrained, ddof=1):.1f}" if len(score.retrained) > 1 else ""
        gap = told(score.mixed - score.inherited)
        rows.append(
            [score.name, told(score.mixed), told(score.inherited), told(alone) + spread, gap, f"{len(score.retrained)}"]
        )
    why = "one side is constant" if len(scores) > 1 else "one alone has no ranks"
    ranks = f"undefined, {why}" if math.isnan(rho) else f"{rho:.2f}"
    ranks += "" if math.isnan(interval[0]) else f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})"
    num = "architectures" if len(scores) > 1 else "architecture"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        "",
        f"Accuracies in %. Rank correlation (Spearman) of discrete with retrained over {len(scores)} {num}: "
        f"{ranks}. Discretization gap (mixed − discrete, of what was searched for): "
        f"{100 * discretization:.1f} points; retrained − discrete, of all: {100 * evaluation:.1f} points.",
    ]
    return SearchReport(rho, interval, discretization, evaluation, "\n".join(lines))
