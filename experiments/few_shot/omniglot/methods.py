"""The compared methods, and the sizes of the experiment."""

from collections.abc import Callable
from typing import Any, NamedTuple

from metaopt import few_shot, hypergrad

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))


class Scale(NamedTuple):
    size: int = 28
    filters: int = 64
    blocks: int = 4
    steps: int = 20_000  # of prototypical networks; other methods take a share of it
    tasks: int = 16  # per step, with five ways; a quarter as many with twenty ways
    episodes: int = 600
    checks: int = 10  # validations per training
    inner_steps: int = 1  # of MAML and of the methods with MAML's T
    test_steps: int = 5  # at most; the number is chosen by validation
    over_steps: int = 10  # inner steps in the curves


SMALL = Scale(size=14, filters=16, blocks=3, steps=400, tasks=8, checks=5, inner_steps=3, test_steps=10)
SMOKE = Scale(size=7, filters=2, blocks=2, steps=2, tasks=4, episodes=2, checks=1, test_steps=2, over_steps=2)


class Row(NamedTuple):
    make: Callable  # (features, loss, T of MAML) -> Adaptation
    share: float  # share of the outer steps
    ways: bool = True  # whether it needs a separate head for each number of ways
    normalization: str = "support"
    shots: int | None = None  # a fixed number in training, whatever the number at test
    at_test: Callable | None = None  # another adaptation, at test
    head: float = 0.0  # standard deviation of the head's weights at the start, times √D
    context: int = 0  # entries of a context vector that scales and shifts the features
    steps: int | None = None  # T, if scales and shifts have a value for each inner step


KEEP: dict[str, Any] = {"rate": 0.4, "keep_support": True}
ROWS = {
    "prototypical networks": Row(lambda f, loss, T: few_shot.prototypical_networks(f), 1, ways=False),
    "ridge head (R2D2)": Row(lambda f, loss, T: few_shot.ridge_head(f), 1, ways=False),
    "Proto-MAML": Row(lambda f, loss, T: few_shot.proto_maml(f, num_steps=1, rate=0.02), 0.5, ways=False),
    "MAML": Row(lambda f, loss, T: few_shot.maml(loss, num_steps=T, **KEEP), 0.5),
    "FOMAML": Row(lambda f, loss, T: few_shot.fomaml(loss, num_steps=T, **KEEP), 0.75),
    "Reptile": Row(
        lambda f, loss, T: few_shot.maml(loss, num_steps=4, rule=hypergrad.reptile, **KEEP | {"rate": 0.2}),
        0.25,
        shots=5,
    ),
    "ANIL": Row(lambda f, loss, T: few_shot.anil(loss, num_steps=T, **KEEP), 0.5),
    # With a head of zeros, nothing else would have a gradient.
    "BOIL": Row(lambda f, loss, T: few_shot.boil(loss, num_steps=T, **KEEP), 0.5, head=1.0),
    "Meta-SGD": Row(lambda f, loss, T: few_shot.meta_sgd(loss, num_steps=T, **KEEP), 0.5),
    "MAML++": Row(
        lambda f, loss, T: few_shot.maml_plus_plus(
            loss,
            num_steps=3,
            rate=0.2,
            multi_step_steps=100,
            leaves_per_step="scale|shift",
            adapt="^(?!.*(scale|shift))",
            keep_support=True,
        ),
        0.25,
        steps=3,
    ),
    "iMAML": Row(
        lambda f, loss, T: few_shot.imaml(
            loss, proximal=1.0, num_steps=5, rate=0.2, solver=hypergrad.cg(num_steps=3), keep_support=True
        ),
        0.25,
    ),
    "CAVIA": Row(
        lambda f, loss, T: few_shot.cavia(loss, num_context=32, num_steps=T, rate=1.0, keep_support=True),
        0.5,
        head=1.0,
        context=32,
    ),
    "fine-tuning": Row(
        lambda f, loss, T: few_shot.pretrained(loss),
        5,  # a step costs a tenth
        ways=False,
        at_test=lambda f: few_shot.proto_maml(f, adapt="^head", num_steps=5, rate=0.1),
    ),
}


# MAML with other statistics in its normalization. Its row above uses those of the support set.
ROWS |= {
    f"MAML, {name}": Row(
        lambda f, loss, T, k=keep: few_shot.maml(loss, num_steps=T, **KEEP | {"keep_support": k}), 0.5, True, name
    )
    for name, keep in {"batch": False, "tasknorm": True, "group": False, "layer": False, "none": False}.items()
}
