"""Image sets of 28 × 28 pixels, and Omniglot's official split."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metaopt import tasks

from ._folder import Folder, read_arrays

IMAGE_SETS = ("omniglot", "quickdraw8", "signdigits", "spoken_digits", "fashion_mnist", "mnist")


def from_image_sets(names: Sequence[str] = IMAGE_SETS, *, path: Folder = None) -> dict[str, tasks.Source]:
    """Reads image sets: 28 × 28, ink high, [N, 28, 28] uint8.

    | source | classes | examples | group | superclass |
    |---|---|---|---|---|
    | omniglot | 1,623 characters | 32,460 | 20 drawers | 50 alphabets |
    | quickdraw8 | 8 | 4,000 | | |
    | signdigits | 10 | 1,200 | | |
    | spoken_digits | 10 | 3,000 spectrograms | 6 speakers | |
    | fashion_mnist | 10 | 35,000 | | |
    | mnist | 10 | 70,000 | | |

    Omniglot has 20 drawers for every alphabet; "drawer 3" is one person within an alphabet. `omniglot_split` returns
    its official split.

    Args:
      names: the sets to read.
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      Name -> `tasks.Source`.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.
    """
    return {name: _image_set(name, path) for name in names}


def _image_set(name: str, path: Folder) -> tasks.Source:
    data = read_arrays("fashion_mnist_sub.npz" if name == "fashion_mnist" else f"{name}.npz", path)
    if name in ("fashion_mnist", "mnist"):
        x, y = (np.concatenate([data[f"{array}_{part}"] for part in ("train", "val", "test")]) for array in "xy")
        return tasks.from_arrays(x, y, name=name)
    if name == "omniglot":
        characters = data["character"]
        return tasks.from_arrays(
            data["images"],
            characters,
            name=name,
            group=data["drawer"],
            class_names=list(data["character_names"]),
            superclass=data["alphabet"][np.unique(characters, return_index=True)[1]],
        )
    class_names = list(data["class_names"])
    return tasks.from_arrays(data["images"], data["label"], name=name, group=data["group"], class_names=class_names)


def omniglot_split(path: Folder = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns Omniglot's official split: 964 characters of 30 alphabets for training, 659 of the 20 others for testing.

    Args:
      path: the folder of `omniglot.npz`; by default, the environment variable METAOPT_DATA.

    Returns:
      A split with the parts "train" and "test", in the form that `tasks.select` takes.

    Raises:
      FileNotFoundError: if the folder or the file does not exist.

    Source: Lake, Salakhutdinov & Tenenbaum, Science 2015.
    """
    data = read_arrays("omniglot.npz", path)
    characters, first = np.unique(data["character"], return_index=True)
    part, names = data["split"][first], data["character_names"]
    return {
        word: {"omniglot": {"classes": [str(names[c]) for c in characters[part == number]]}}
        for number, word in enumerate(("train", "test"))
    }
