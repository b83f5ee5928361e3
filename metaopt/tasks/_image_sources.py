"""Readers of image sources: folders of images, and data sets of TensorFlow Datasets.

Nothing is downloaded.
"""

import io
import os
import struct
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from metaopt import _checks, _extras, _files
from metaopt.tasks._class_sources import Source, from_arrays

_MAX_PIXELS = 2**26  # of one image


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
      size: pixels per side, as for `read_images`.
      channels: 1 for gray [N, S, S], or 3 for colors [N, S, S, 3].
      levels: 1 or 2.
      group_fn: `path -> the maker of the image`; None if the makers are not known.
      name: the name of the source; by default that of the folder.

    Returns:
      A `Source` of uint8 images, in the order of their paths. It skips files with a suffix that Pillow does not know,
      and files and folders whose name begins with a dot. It warns of folders in which no image is left, of images in
      other places of the folder, and of equal images.

    Raises:
      ValueError: if the folder does not exist or has no images.
      ValueError: if an image cannot be read, has more than 2**26 pixels, or has pixels of 32 bits. The message has the
        first five such files.
      ValueError: if `size < 1`, or `channels` is neither 1 nor 3.
      ImportError: if Pillow is not installed.
    """
    folder = Path(folder)
    suffixes = _pillow("from_image_folder").registered_extensions()
    pattern = "/".join(["*"] * levels)
    is_visible = lambda path: not any(part.startswith(".") for part in path.relative_to(folder).parts)
    files = [f for f in sorted(folder.glob(f"{pattern}/*")) if f.suffix.lower() in suffixes and is_visible(f)]
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if not files:
        raise ValueError(f"{folder} has no images; they must lie in {pattern}/ below it, a folder for each class.")
    labels = ["/".join(file.relative_to(folder).parts[:levels]) for file in files]
    names = sorted(set(labels))
    folders = [f for f in sorted(folder.glob(pattern)) if f.is_dir() and is_visible(f)]
    folder_names = ("/".join(f.relative_to(folder).parts) for f in folders)
    if empty := [name for name in folder_names if name not in set(names)]:
        warnings.warn(
            f"{folder}: {len(empty)} folders have no images of a format that Pillow knows, and are not classes: "
            f"{', '.join(map(repr, empty[:5]))}.",
            stacklevel=2,
        )
    is_image = lambda f: f.suffix.lower() in suffixes and is_visible(f) and f.is_file()
    if others := sorted({f for f in folder.rglob("*") if is_image(f)} - set(files)):
        warnings.warn(
            f"{folder}: {len(others)} images do not lie in {pattern}/ and are left out, such as {others[0]}.",
            stacklevel=2,
        )
    images = read_images(files, size=size, channels=channels)
    _warn_of_copies(files, images)
    return from_arrays(
        images,
        labels,
        name=folder.name if name is None else name,
        group=None if group_fn is None else [str(group_fn(file)) for file in files],
        superclass=[label.split("/")[0] for label in names] if levels == 2 else None,
    )


def _warn_of_copies(files: list[Path], images: np.ndarray) -> None:
    """Warns if images are equal: copies in training and in test data make the test accuracy too high."""
    first: dict[bytes, Path] = {}
    pairs = [(file, first.setdefault(image.tobytes(), file)) for file, image in zip(files, images, strict=True)]
    if copies := [pair for pair in pairs if pair[0] != pair[1]]:
        warnings.warn(
            f"{len(copies)} of {len(files)} images are equal to others, such as {copies[0][0]} and {copies[0][1]}. "
            "Remove copies, since a copy of a training image among the test images makes the test accuracy too high.",
            stacklevel=3,
        )


def read_images(files: Iterable[str | os.PathLike[str]], *, size: int, channels: int = 1) -> np.ndarray:
    """Reads image files as `from_image_folder` does, such as new images to predict. Needs Pillow.

    Args:
      files: the image files.
      size: S, pixels per side; images are rotated as their EXIF data say (if these can be read), and resized to a
        square by area means.
      channels: 1 for gray, or 3 for colors.

    Returns:
      uint8 [N, S, S], or [N, S, S, 3]. Transparent pixels become white, and gray of 16 bits is divided by 256.

    Raises:
      ValueError: if `files` is one path or is empty.
      ValueError: if an image cannot be read, has more than 2**26 pixels, or has pixels of 32 bits. The message has the
        first five such files.
      ValueError: if `size < 1`, or `channels` is neither 1 nor 3.
      ImportError: if Pillow is not installed.
    """
    if isinstance(files, str | os.PathLike):
        raise ValueError(f"`files` must be a list of image files; got one path, {os.fspath(files)!r}.")
    _checks.check_integer("size", size, 1)
    _check_channels(channels)
    pillow, pixels, faults = _pillow("read_images"), [], []
    for file in map(Path, files):
        try:
            with _files.reading(file, "is not an image that Pillow can read"):
                # A damaged header may request any number of bytes. A buffer in memory returns only those of the file.
                pixels.append(_pixels(pillow, io.BytesIO(file.read_bytes()), size, channels, rotate=True))
        except ValueError as error:
            faults.append(str(error))  # the exception would keep the file and its pixels in memory
    if faults:
        more = f" {len(faults) - 5} more files cannot be read." if len(faults) > 5 else ""
        raise ValueError(f"{' '.join(faults[:5])}{more} Repair or remove such files.")
    if not pixels:
        raise ValueError("`files` is empty.")
    return np.stack(pixels)


def _check_channels(channels: Any) -> None:
    if isinstance(channels, bool) or channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 for gray, or 3 for colors; got {channels!r}.")


def _pillow(caller: str) -> Any:
    return _extras.require("PIL.Image", "episodes", f"`{caller}`")


def _pixels(pillow: Any, file: Any, size: int | None, channels: int, *, rotate: bool = False) -> np.ndarray:
    """Reads the pixels of an image file with the module of Pillow; [size, size], or [size, size, 3].

    With `rotate`, the image is turned as its EXIF data say.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # metaopt's own limit is lower
        try:
            image = pillow.open(file)
        except pillow.DecompressionBombError as error:
            raise ValueError(str(error)) from None
        except pillow.UnidentifiedImageError:  # its message has only the address of `file` in memory
            raise ValueError("its content is not of an image format that Pillow knows") from None
    with image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"the image has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are read")
        return _resized(pillow, _upright(image, pillow.Transpose) if rotate else image, size, channels)


def _upright(image: Any, methods: Any) -> Any:
    """Turns an image as its EXIF data say: cameras store the rotation next to the pixels."""
    image.load()  # turns a TIFF file by itself
    try:
        orientation = image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):  # `exif_transpose` of Pillow would raise
        return image
    names = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_270",
        7: "TRANSVERSE",
        8: "ROTATE_90",
    }
    return image.transpose(methods[names[orientation]]) if orientation in names else image


def _resized(pillow: Any, image: Any, size: int | None, channels: int) -> np.ndarray:
    image = _opaque(pillow, _of_8_bits(pillow, image)).convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), resample=4)  # box: the mean over the area
    return np.asarray(image, np.uint8)


def _of_8_bits(pillow: Any, image: Any) -> Any:
    """Gray of 16 bits as 8 bits, which Pillow would clip at 255."""
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        gray = pillow.fromarray((pixels >> 8).astype(np.uint8))
        if "transparency" in image.info:  # one of the 65,536 grays
            gray.putalpha(pillow.fromarray(np.where(pixels == image.info["transparency"], 0, 255).astype(np.uint8)))
        return gray
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode!r}), whose range is not known. Save it with 8 or 16 bits"
        )
    return image


def _opaque(pillow: Any, image: Any) -> Any:
    """The image on a white background.

    The stored colors of transparent pixels are arbitrary. They are often the color of the drawing itself.
    """
    if not image.mode.endswith("A") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)


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
      KeyError: if the data set lacks one of these features.
      ValueError: if examples of one class are of several superclasses.
      ValueError: if images differ in shape and no `size` is given, or have pixels of 32 bits and a `size` is given.
      ValueError: if `size < 1`, or if a `size` is given and `channels` is neither 1 nor 3.
    """
    if size is not None:
        _checks.check_integer("size", size, 1)
        _check_channels(channels)
    tfds = _extras.require("tensorflow_datasets", "episodes", "`from_tfds`")
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not builder.info.splits:
        where = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
        raise FileNotFoundError(
            f"The data set {name!r} is not prepared in {builder.data_dir}; `from_tfds` downloads nothing. Prepare it, "
            f'`tfds.builder({name!r}{where}, file_format="array_record")'
            '.download_and_prepare(file_format="array_record")`, or pass the `data_dir` with which it was prepared.'
        )
    examples = list(builder.as_data_source(split=split))
    x = [np.asarray(row[image]) for row in examples]
    if size is not None:
        pillow = _pillow("from_tfds")
        x = [_resized(pillow, pillow.fromarray(pixels.squeeze()), size, channels) for pixels in x]
    x = np.stack(x)
    x = x[..., 0] if x.ndim == 4 and x.shape[-1] == 1 else x
    y = np.array([int(row[label]) for row in examples])
    names = getattr(builder.info.features[label], "names", None) or [str(k) for k in range(int(y.max()) + 1)]
    superclass_of_class = None
    if superclass is not None:
        pairs = sorted({(int(row[label]), row[superclass]) for row in examples})
        if len(pairs) > len(np.unique(y)):
            raise ValueError(
                f"In {name!r}, a class has examples with different values of {superclass!r}, so this feature cannot be "
                "the superclass."
            )
        superclass_of_class = [value for _, value in pairs]
    return from_arrays(
        x,
        y,
        name=name.split(":")[0],
        group=None if group is None else np.array([row[group] for row in examples]),
        class_names=[names[k] for k in np.unique(y)],
        superclass=superclass_of_class,
    )
