"""Readers of image sources: folders of images, data sets of TensorFlow Datasets, and image sets of the data folder.

Nothing is downloaded.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaopt import _files
from metaopt.tasks._class_sources import Source, from_arrays
from metaopt.tasks._splits import Split

IMAGE_SETS = ("omniglot", "quickdraw8", "signdigits", "spoken_digits", "fashion_mnist", "mnist")
_MAX_PIXELS = 2**26  # of one image
_EXTRA = 'install it with `pip install "metaopt-jax[episodes]"`.'


def from_image_folder(
    folder: str | os.PathLike[str],
    *,
    size: int,
    channels: int = 1,
    levels: int = 1,
    group_fn: Callable[[Path], Any] | None = None,
    name: str | None = None,
) -> Source:
    """Reads a folder of images: each folder in it is a class; with two levels, a superclass of classes. Needs Pillow.

    Args:
      folder: FOLDER/class/image.png, or FOLDER/superclass/class/image.png.
      size: pixels per side; images are resized to a square of this size by area means.
      channels: 1 for gray [N, S, S], or 3 for colors [N, S, S, 3].
      levels: 1 or 2.
      group_fn: `path -> the maker of the image`; None if the makers are not known.
      name: of the source; by default, the name of the folder.

    Returns:
      A `Source` of uint8 images, in the order of their paths. Files with a suffix that Pillow does not know are
      skipped.

    Raises:
      FileNotFoundError: if the folder does not exist.
      ValueError: if the folder has no images, or an argument is out of range.
      ValueError: if an image cannot be read or has more than 2**26 pixels.
      ImportError: if Pillow is not installed.
    """
    if levels not in (1, 2) or channels not in (1, 3) or size < 1:
        raise ValueError(
            f"`levels` must be 1 or 2, `channels` 1 or 3 and `size` at least 1; got {levels}, {channels} and {size}."
        )
    folder, image = Path(folder), _pillow("from_image_folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    known = image.registered_extensions()
    files = [f for f in sorted(folder.glob("/".join(["*"] * (levels + 1)))) if f.suffix.lower() in known]
    if not files:
        raise ValueError(f"{folder} has no images; they must lie in {'/'.join(['*'] * levels)}/ below it.")
    labels = ["/".join(file.relative_to(folder).parts[:levels]) for file in files]
    names = sorted(set(labels))
    pixels = []
    for file in files:
        with _files.reading(file, "is not an image that Pillow can read"):
            pixels.append(_pixels(image, file, size, channels))
    return from_arrays(
        np.stack(pixels),
        labels,
        name=folder.name if name is None else name,
        group=None if group_fn is None else [str(group_fn(file)) for file in files],
        superclass=[label.split("/")[0] for label in names] if levels == 2 else None,
    )


def _pillow(caller: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"`{caller}` needs Pillow; {_EXTRA}") from error
    return Image


def _pixels(pillow: Any, file: Any, size: int | None, channels: int) -> np.ndarray:
    """Reads the pixels of an image file with the module of Pillow; [size, size], or [size, size, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # metaopt's own limit is lower
        try:
            image = pillow.open(file)
        except pillow.DecompressionBombError as error:
            raise ValueError(str(error)) from None
    with image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"the image has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are read")
        return _resized(image, size, channels)


def _resized(image: Any, size: int | None, channels: int) -> np.ndarray:
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), resample=4)  # box: the mean over the area
    return np.asarray(image, np.uint8)


def from_tfds(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    image: str = "image",
    label: str = "label",
    group: str | None = None,
    superclass: str | None = None,
    size: int | None = None,
    channels: int = 1,
) -> Source:
    """Reads a data set of TensorFlow Datasets without TensorFlow.

    The data set must have been prepared as `array_record`: `tfds.builder(name,
    file_format="array_record").download_and_prepare(file_format="array_record")`.

    Args:
      name: the tfds name, such as "omniglot" or "cifar10:3.0.2".
      split: "train", "test", "train[:10%]", "train+test".
      data_dir: where the data set was prepared; None is the default folder of tfds.
      image: the feature that holds the example.
      label: the feature that holds the class.
      group: the feature that holds the maker of the example; None if the makers are not known.
      superclass: the feature that holds the superclass of the class, such as "alphabet" of "omniglot"; None omits it.
      size: pixels per side; images are resized to a square of this size (needs Pillow). None leaves them unchanged.
      channels: 1 or 3, if images are resized.

    Returns:
      A `Source`; a last axis of one channel is dropped.

    Raises:
      FileNotFoundError: if the data set is not prepared in `data_dir`.
      ImportError: if tensorflow-datasets or array_record is not installed.
      ValueError: if the data set lacks one of these features, or examples of one class are of several superclasses.
      ValueError: if images differ in shape and no `size` is given.
    """
    try:
        tfds: Any = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ImportError(f"`from_tfds` needs tensorflow-datasets and array_record; {_EXTRA}") from error
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not builder.info.splits:
        where = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
        raise FileNotFoundError(
            f"The data set {name!r} is not prepared in {builder.data_dir}; `from_tfds` downloads nothing. Prepare it, "
            f'`tfds.builder({name!r}{where}, file_format="array_record")'
            '.download_and_prepare(file_format="array_record")`, or say where it is by `data_dir`.'
        )
    features = builder.info.features
    missing = [feature for feature in (image, label, group, superclass) if feature and feature not in features]
    if missing:
        raise ValueError(f"The data set {name!r} has no feature {missing[0]!r}; it has {', '.join(features)}.")
    examples = list(builder.as_data_source(split=split))
    x = [np.asarray(row[image]) for row in examples]
    if size is not None:
        pillow = _pillow("from_tfds")
        x = [_resized(pillow.fromarray(one.squeeze()), size, channels) for one in x]
    shapes = {one.shape for one in x}
    if len(shapes) > 1:
        raise ValueError(f"The images of {name!r} have {len(shapes)} shapes; give `size`, to which they are resized.")
    x = np.stack(x)
    x = x[..., 0] if x.ndim == 4 and x.shape[-1] == 1 else x
    y = np.array([int(row[label]) for row in examples])
    names = getattr(features[label], "names", None) or [str(k) for k in range(int(y.max()) + 1)]
    belongs = None
    if superclass is not None:
        pairs = sorted({(int(row[label]), row[superclass]) for row in examples})
        if len(pairs) > len(np.unique(y)):
            raise ValueError(
                f"In {name!r} a class has examples of several {superclass!r}, which is not a superclass then."
            )
        belongs = [one for _, one in pairs]
    return from_arrays(
        x,
        y,
        name=name.split(":")[0],
        group=None if group is None else np.array([row[group] for row in examples]),
        class_names=[names[k] for k in np.unique(y)],
        superclass=belongs,
    )


def from_image_sets(
    names: Sequence[str] = IMAGE_SETS, *, path: str | os.PathLike[str] | None = None
) -> dict[str, Source]:
    """Reads the image sets in the folder that METAOPT_DATA names: 28 × 28, ink high, [N, 28, 28] uint8.

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
      Name -> `Source`.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.
      ValueError: if a name is not in the table, or a file is damaged.
    """
    unknown = sorted(set(names) - set(IMAGE_SETS))
    if unknown:
        raise ValueError(f"`names` must be among {', '.join(IMAGE_SETS)}; got {', '.join(map(repr, unknown))}.")
    sources = {}
    for name in names:
        file = data_file("fashion_mnist_sub.npz" if name == "fashion_mnist" else f"{name}.npz", path)
        with _files.reading(file, "is not an image set of the data folder"), _files.open_npz(file) as data:
            sources[name] = _image_set(name, data)
    return sources


def _image_set(name: str, data: _files.Npz) -> Source:
    if name in ("fashion_mnist", "mnist"):
        x, y = (np.concatenate([data[f"{what}_{part}"] for part in ("train", "val", "test")]) for what in "xy")
        return from_arrays(x, y, name=name)
    if name == "omniglot":
        characters = data["character"]
        return from_arrays(
            data["images"],
            characters,
            name=name,
            group=data["drawer"],
            class_names=list(data["character_names"]),
            superclass=data["alphabet"][np.unique(characters, return_index=True)[1]],
        )
    names = list(data["class_names"])
    return from_arrays(data["images"], data["label"], name=name, group=data["group"], class_names=names)


def data_file(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """Returns the path of one file of the data folder.

    Args:
      name: of the file.
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      The path of an existing file.

    Raises:
      FileNotFoundError: if the folder or the file does not exist.
    """
    folder = os.environ.get("METAOPT_DATA") if path is None else path
    if not folder:
        raise FileNotFoundError("no data folder: set METAOPT_DATA to it, or pass `path`.")
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"the data folder {folder} has no {name}.")
    return file


def omniglot_split(path: str | os.PathLike[str] | None = None) -> Split:
    """Returns Omniglot's official split: 964 characters of 30 alphabets for training, 659 of the 20 others for testing.

    Args:
      path: the folder of `omniglot.npz`; by default, the environment variable METAOPT_DATA.

    Returns:
      A split with the parts "train" and "test", in the form that `select` takes.

    Raises:
      FileNotFoundError: if the folder or the file does not exist.
      ValueError: if the file is damaged.

    Source: Lake, Salakhutdinov & Tenenbaum, Science 2015.
    """
    file = data_file("omniglot.npz", path)
    with _files.reading(file, "is not the Omniglot of the data folder"), _files.open_npz(file) as data:
        characters, first = np.unique(data["character"], return_index=True)
        part, names = data["split"][first], data["character_names"]
        return Split(
            {
                word: {"omniglot": {"classes": [str(names[c]) for c in characters[part == number]]}}
                for number, word in enumerate(("train", "test"))
            }
        )
