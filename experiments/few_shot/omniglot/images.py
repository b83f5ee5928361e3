"""The images, and a classifier that does not learn."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import script
from experiments.data import from_image_sets, omniglot_split
from metaopt import tasks


def load(split: str, size: int) -> tuple[dict[str, tasks.Source], dict]:
    """Returns the parts train, valid and test, with images of `size`; and the split."""
    path = script.data_file(Path(__file__).parent, "omniglot.npz").parent
    source = from_image_sets(["omniglot"], path=path)["omniglot"]
    source = source._replace(x=shrunk(source.x, size))
    whole = omniglot_split(path)
    if split == "random":
        whole = tasks.split_classes(source, {"train": 1200, "test": 423}, seed=0)
    background = tasks.select(source, whole, "train")[0]
    held = tasks.split_classes(background, {"valid": 64, "train": background.num_classes - 64}, seed=1)
    parts = tasks.Split(held | {"test": whole["test"]})
    sources = {part: tasks.select(source, parts, part)[0] for part in ("train", "valid", "test")}
    return {**sources, "train": sources["train"].with_rotations()}, parts


def shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Shrinks [N, 28, 28] to [N, size, size], by means over squares."""
    step = images.shape[1] // size
    return images.reshape(len(images), size, step, size, step).mean((2, 4)).astype(np.uint8)


def pixels(key, support, query):
    """Classifies by the nearest class mean of the images, by cosine."""
    flat = lambda x: x.reshape(len(x), -1)
    center = jax.nn.one_hot(support["y"], len(support["class_mask"])).T @ (
        flat(support["x"]) * support["mask"][:, None]
    )
    return (flat(query["x"]) @ (center / jnp.linalg.norm(center, axis=1, keepdims=True)).T)[None]
