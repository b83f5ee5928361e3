"""Small convolutional networks of any size, for records of many image tasks: an objective, and one call to train."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from metaopt import _checks, inner, spaces
from metaopt.nas import _genotypes, _named_spaces, _specs, _supernet
from metaopt.nas.search._trained_network import TrainedNetwork, trained_network

_LAYERS = ("conv1", "conv2")


class ConvNets(NamedTuple):
    """What `conv_nets` returns. A task is (images, labels, other images, their labels), all as arrays.

    Attributes:
      space: of the configurations, for `blackbox.collect` and `metaopt.train_meta_searcher`: "channels" of both
        convolutions, the side of their "kernel", and the "width" of the linear layer.
      objective: `(trial, task) -> float`. It trains a network of the trial's sizes on the images. The outcome is the
        mean log loss of the other images.
      train: `(configuration, images, labels, *, seed=0) -> nas.TrainedNetwork`. It builds a network of these sizes,
        with an output for each class of the labels, and trains it as `objective` does. It raises ValueError if the
        configuration is not of `space`, if the images have another shape, or if there are more images or classes than
        in the tasks of `conv_nets`.
    """

    space: dict[str, Any]
    objective: Callable[[Any, Any], float]
    train: Callable[..., TrainedNetwork]


def conv_nets(
    tasks: Iterable[tuple[Any, Any, Any, Any]],
    *,
    max_channels: int = 8,
    kernels: tuple[int, ...] = (3, 1, 5),
    max_width: int = 32,
    num_steps: int = 120,
    batch_size: int = 16,
    rate: float = 0.01,
) -> ConvNets:
    """Makes an objective and a trainer of networks Conv–Pool–Conv–Pool–Linear, for image tasks of one shape.

    A smaller network is the largest one with some of its weights masked, and all tasks are padded to one shape. So one
    compiled program trains all sizes on all tasks. Each pool halves the sides of the images.

    Args:
      tasks: all tasks, also those for which networks are trained later; a dict of tasks works as well. Of each task,
        the images are [n, height, width, channels] floats, and the labels [n] integers from 0.
      max_channels: the largest number of channels. The default of the space is near its square root.
      kernels: odd sides of the kernels. The first one is the default of the space.
      max_width: the largest number of features of the linear layer, at least 2.
      num_steps: training steps of Adam.
      batch_size: images of each step.
      rate: the learning rate.

    Returns:
      A `ConvNets`. The first call compiles.

    Raises:
      ValueError: if there are no tasks, their images have several shapes, labels do not fit their images, or a size is
        not possible.

    >>> images = np.random.default_rng(0).normal(size=(20, 8, 8, 1))
    >>> labels = (images.mean((1, 2, 3)) > 0).astype(int)
    >>> task = images[:12], labels[:12], images[12:], labels[12:]
    >>> nets = conv_nets([task], max_channels=2, max_width=4, num_steps=2)
    >>> configuration = {"channels": 2, "kernel": 3, "width": 4}
    >>> network = nets.train(configuration, images[:12], labels[:12])
    >>> network.outputs(images).shape
    (20, 2)
    """
    for name, value, least in (("max_channels", max_channels, 1), ("max_width", max_width, 2)):
        _checks.check_integer(name, value, least)
    tasks = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    if not tasks:
        raise ValueError("`tasks` is empty.")
    in_shape = np.shape(tasks[0][0])[1:]
    for images, labels in [pair for task in tasks for pair in (task[:2], task[2:])]:
        _check(images, labels, in_shape)
    _checks.warn_of_unscaled_images("conv_nets", tasks[0][0])
    most_images = max(len(task[1]) for task in tasks)
    most_classes = 1 + max(int(np.max(labels)) for task in tasks for labels in (task[1], task[3]))
    space: dict[str, Any] = {
        "channels": spaces.integer(1, max_channels, log=True, default=round(max_channels**0.5)),
        "kernel": spaces.choice(list(kernels)),
        "width": spaces.integer(2, max_width, log=True, default=max(2, round((2 * max_width) ** 0.5))),
    }
    network = _named_spaces.conv_net_space(
        most_classes,
        widths=range(1, max_channels + 1),
        kernels=sorted(kernels),
        depths=(1,),
        hidden=range(2, max_width + 1),
    )
    supernet = _supernet.supernet(network, in_shape, ops={})

    def loss(params, sizes, batch):
        return inner.cross_entropy(supernet.apply(params, sizes, batch["x"]), batch)

    optimizer = lambda sizes: optax.adam(rate)
    init = lambda key, sizes, data: supernet.init(key)
    loop = inner.loop(loss, optimizer, init=init, sampler=inner.minibatch(batch_size))
    run, loss_of = jax.jit(inner.run(loop, num_steps=num_steps)), jax.jit(loss)

    def fitted(configuration, images, labels, seed):
        genotype = _genotype(configuration)
        sizes = _genotypes.one_hot(network, genotype)
        missing = most_images - len(labels)  # all tasks get one shape
        pad = lambda rows: np.pad(rows, [(0, missing)] + [(0, 0)] * (np.ndim(rows) - 1))
        data = {"x": pad(_floats(images)), "y": pad(labels), "mask": pad(np.ones(len(labels)))}
        return genotype, sizes, run(jax.random.key(seed), sizes, data).params

    def objective(trial, task):
        images, labels, other_images, other_labels = task
        _, sizes, params = fitted(trial.configuration, images, labels, trial.seed)
        return float(loss_of(params, sizes, {"x": _floats(other_images), "y": other_labels}))

    def train(configuration, images, labels, *, seed=0):
        spaces.from_configuration(space, configuration)  # raises for foreign values
        _check(images, labels, in_shape)
        num_classes = int(np.max(labels)) + 1
        if len(labels) > most_images or num_classes > most_classes:
            raise ValueError(
                f"There are {len(labels)} images of {num_classes} classes; the tasks of `conv_nets` have at most "
                f"{most_images} images of {most_classes} classes. Give it a task of the largest size."
            )
        genotype, _, params = fitted(configuration, images, labels, seed)
        params = supernet.inherit(params, genotype)
        # All training runs have `most_classes` outputs. Only those of the task's classes stay.
        params["head"] = jax.tree.map(lambda leaf: leaf[..., :num_classes], params["head"])
        small = _genotypes.discrete(network, genotype)._replace(num_outputs=num_classes)
        return trained_network(_supernet.supernet(small, in_shape, ops={}), params, {"x": _floats(images)})

    return ConvNets(space, objective, train)


def _floats(images: Any) -> np.ndarray:
    """In JAX's default precision, as the parameters are."""
    return np.asarray(images, jax.dtypes.canonicalize_dtype(np.float64))


def _genotype(configuration: Mapping[str, Any]) -> _specs.Genotype:
    """The genotype of `conv_net_space` in which both convolutions have the sizes of the configuration."""
    edge = lambda name: ((0, 1, str(configuration[name])),)
    sizes = {"width": edge("channels"), "kernel": edge("kernel")}
    convolutions = {f"{layer}.{size}": value for layer in _LAYERS for size, value in sizes.items()}
    return {**convolutions, "linear.width": edge("width")}


def _check(images: Any, labels: Any, in_shape: tuple[int, ...]) -> None:
    """Raises ValueError if images have another shape, or labels are not whole numbers from 0, one for each image."""
    if np.shape(images)[1:] != in_shape or len(in_shape) != 3:
        raise ValueError(f"Images must be [n, height, width, channels], of one shape; got {np.shape(images)}.")
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not len(labels) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"Labels must be [{len(images)}] whole numbers from 0; got an array of {labels.dtype} and shape "
            f"{labels.shape}. `np.unique(labels, return_inverse=True)` numbers other labels."
        )
