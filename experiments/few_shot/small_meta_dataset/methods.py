"""The compared methods, their networks, and the sizes of the experiment."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.few_shot.film import modulated
from metaopt import few_shot, hypergrad, inner

LEFT_OUT = ("quickdraw8", "signdigits", "spoken_digits", "fashion_mnist", "mnist")


class Settings(NamedTuple):
    filters: int = 16
    tasks: int = 2  # per step, of each training
    steps: int = 400
    plain_steps: int = 1500  # of fine-tuning's pre-training; a step costs a tenth
    test_steps: int | None = None  # at most, for all; the number is chosen on episodes of the training sources
    rows: int = 2000  # at most, per source; Omniglot's are all used
    episodes: int = 600
    sources: int = len(LEFT_OUT)


SMOKE = Settings(filters=2, tasks=1, steps=2, plain_steps=2, test_steps=2, rows=200, episodes=2, sources=2)
MOST_WAYS = 8
EPISODES: dict[str, Any] = {"min_ways": 5, "max_ways": MOST_WAYS, "max_query": 5, "max_support": 40}
BATCH = 64  # rows of a step of pre-training
# gains of the network's features and of the image, at the start: distances in both have a similar size
GAINS = (4.0, 5.0)
RATES = (1e-3, 5e-3, 2e-2)  # of fine-tuning, chosen on episodes of the training sources
CHECKED = 60  # such episodes
UNTRAINED = "prototypical networks, untrained"


class Row(NamedTuple):
    make: Callable  # (features, loss) -> Adaptation
    head: float | None = None  # for a learned head: standard deviation of its weights at the start, times √D
    context: int = 0  # entries of a context vector that scales and shifts the features
    plain: bool = False  # pre-trained on all classes at once
    outer: Callable = optax.adam  # a schedule -> the outer optimizer
    outer_rate: float = 3e-3  # at first
    test_steps: int = 15  # at most


LEARNED: dict[str, Any] = {"rates": "leaf", "order": "first"}
FIXED: dict[str, Any] = {"rate": 0.2, "keep_support": True}
STRONGER: dict[str, Any] = {"rate": 0.4, "keep_support": True}
ROWS = {
    "prototypical networks": Row(lambda f, loss: few_shot.prototypical_networks(f)),
    "ridge head (R2D2)": Row(lambda f, loss: few_shot.ridge_head(f)),
    "Proto-MAML": Row(lambda f, loss: few_shot.proto_maml(f, num_steps=2, rate=0.005, **LEARNED)),
    "MAML": Row(lambda f, loss: few_shot.maml(loss, num_steps=5, **FIXED), 0.0),
    "FOMAML": Row(lambda f, loss: few_shot.fomaml(loss, num_steps=5, **FIXED), 0.0),
    "Meta-SGD, a rate a leaf": Row(lambda f, loss: few_shot.meta_sgd(loss, num_steps=5, **FIXED, **LEARNED), 0.0),
    "MAML++": Row(lambda f, loss: few_shot.maml_plus_plus(loss, num_steps=5, multi_step_steps=200, **FIXED), 0.0),
    "ANIL": Row(lambda f, loss: few_shot.anil(loss, num_steps=5, **FIXED), 0.0),
    # With a head of zeros, nothing else would have a gradient.
    "BOIL": Row(lambda f, loss: few_shot.boil(loss, num_steps=5, **STRONGER), 0.3, test_steps=30),
    # Its direction is a distance moved, not a gradient.
    "Reptile": Row(
        lambda f, loss: few_shot.maml(loss, num_steps=5, rule=hypergrad.reptile, **STRONGER),
        0.0,
        outer=optax.sgd,
        outer_rate=0.3,
        test_steps=30,
    ),
    "iMAML": Row(lambda f, loss: imaml(loss), 0.0, outer_rate=2e-3, test_steps=20),
    "CAVIA, with prototypes": Row(lambda f, loss: cavia_with_prototypes(f), context=32),
    "fine-tuning": Row(lambda f, loss: few_shot.pretrained(loss), 0.0, plain=True),
}


def pixels(key, support, query):
    """Classifies by the nearest class mean of the images, by cosine."""
    flat = lambda x: x.reshape(len(x), -1)
    members = jax.nn.one_hot(support["y"], len(support["class_mask"])) * support["mask"][:, None]
    center = members.T @ flat(support["x"])
    length = jnp.maximum(jnp.linalg.norm(center, axis=1, keepdims=True), 1e-6)
    return (flat(query["x"]) @ (center / length).T)[None]


def beside_the_image(network: few_shot.ConvNet) -> few_shot.ConvNet:
    """Concatenates the network's features and the image, each times a learned gain.

    The image has length 1, minus the mean of the support set. Without this subtraction, the common part of all images
    would make up most of the curvature for a head that starts from zeros.
    """

    def init(key):
        return {**network.init(key), "gain": jnp.array(GAINS)}

    def of_length_1(batch):
        image = batch["x"].reshape(len(batch["x"]), -1)
        return image / jnp.sqrt((image**2).sum(1, keepdims=True) + 1e-6)

    def features(params, batch):
        learned = network.features(params, batch)
        support = params.get("support", batch)  # for a support set, the batch itself
        mean = (of_length_1(support) * support["mask"][:, None]).sum(0) / support["mask"].sum()
        image = of_length_1(batch) - mean
        gain = params["gain"]
        return jnp.concatenate([gain[0] * learned / learned.shape[1] ** 0.5, gain[1] * image], axis=1)

    return few_shot.ConvNet(init, features)


def cavia_with_prototypes(features: Callable) -> few_shot.Adaptation:
    """Adapts a context vector, from zero, as in CAVIA. The head is the prototypes of the unmodulated features."""
    prototypes = few_shot.proto_maml(features).problem.loop

    def init(key, hyperparams, data):
        adapted = prototypes.params(prototypes.init(key, {"init": hyperparams["init"]}, data))
        context = jnp.zeros(hyperparams["init"]["modulation"].shape[1])
        return {**hyperparams["init"], "head": adapted["head"], "context": context}

    head = few_shot.linear_head(modulated(features))
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    return few_shot.adaptation(loss, init=init, adapt="^context$", num_steps=2, rate=0.5, keep_support=True)


def imaml(loss: Callable) -> few_shot.Adaptation:
    """iMAML with momentum, which comes closer to θ* than plain steps."""
    momentum = lambda rate: optax.sgd(rate, momentum=0.9)
    options: dict[str, Any] = {"optimizer": momentum, "rate": 0.05, "keep_support": True}
    return few_shot.imaml(loss, proximal=0.3, num_steps=15, solver=hypergrad.cg(num_steps=5), **options)
