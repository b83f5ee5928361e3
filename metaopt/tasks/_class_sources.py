"""Where the classes of few-shot episodes come from: labelled examples, who made them, and what the classes belong to.

A source is one data set in memory. Nothing is downloaded.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_EXTRA = 'install it with `pip install "metaopt-jax[episodes]"`.'


class Source(NamedTuple):
    """Labelled examples of one kind: `N` examples of `C` classes. Made by `from_arrays` and its like, which check it.

    Attributes:
      name: unique among the sources in use.
      x: [N, ...], the examples; images are best left as uint8.
      y: [N] int32 in 0..C-1; every class has an example.
      group: [N] int32 in 0..G-1, who made the example (drawer, speaker, camera); None where that is not known.
      class_names: C names, all different.
      superclass: [C] int32, what a class belongs to (a character's alphabet), or None.
      ontology: node -> the names of its children, nodes or classes: a directed acyclic graph over the classes, or None.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    group: np.ndarray | None
    class_names: tuple[str, ...]
    superclass: np.ndarray | None = None
    ontology: Mapping[str, tuple[str, ...]] | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def num_groups(self) -> int:
        """G; 1 where groups are not known."""
        return 1 if self.group is None else int(self.group.max()) + 1


def from_arrays(
    x: Any,
    y: Any,
    *,
    name: str = "arrays",
    group: Any = None,
    class_names: Sequence[str] | None = None,
    superclass: Any = None,
    ontology: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """A source from arrays.

    Args:
      x: [N, ...], the examples; finite, since a gap would reach the outputs of its whole episode.
      y: [N], their labels: integers or strings; the classes are the different labels, sorted.
      name: of the source.
      group: [N], who made each example; None where that is not known. Any values: equal ones are one group.
      class_names: of the classes, sorted by label; None: the labels.
      superclass: [C], what each class belongs to, sorted by label; any values.
      ontology: node -> its children, which are nodes or names of classes.

    Returns:
      A `Source`.

    Raises:
      ValueError: there is no example; lengths differ; names are not as many as classes, or not all different; x is no
        numbers, or not finite; a label is missing (NaN, None) or no class: a number that is not whole; a group or
        superclass is missing.
    """
    x, given, y = np.asarray(x), y, np.asarray(y)
    y = y.astype(np.float32) if y.dtype.kind == "V" else y  # bfloat16, for one
    if not x.ndim or not len(x):
        raise ValueError(f"Source {name!r} is empty: `x` must have at least one example; got shape {x.shape}.")
    for what, array in (("`y`", y), ("`group`", group)):
        if array is not None and np.shape(array) != (len(x),):
            raise ValueError(
                f"Source {name!r}: {what} must have one entry for each of the {len(x)} examples; "
                f"got shape {np.shape(array)}."
            )
    if x.dtype.kind not in "biufcV":
        raise ValueError(f"Source {name!r}: `x` must be numbers; got {x.dtype}. Number what is text, or embed it.")
    if x.dtype.kind in "fcV" and not np.isfinite(x).all():
        at = tuple(np.argwhere(~np.isfinite(x))[0].tolist())
        raise ValueError(
            f"Source {name!r}: `x` must be finite; got {x[at]} at {list(at)}. Fill gaps first, for instance with "
            "the mean over the examples that are trained on."
        )
    _check_labels(name, given, y)
    for what, values in (("`group`", group), ("`superclass`", superclass)):
        missing = [(i, v) for i, v in enumerate(() if values is None else values) if v is None or v != v]
        if missing:
            raise ValueError(
                f"Source {name!r}: {what} must say of all; entry {missing[0][0]} is {missing[0][1]}. Give each that is "
                "not known a value of its own."
            )
    labels, y = np.unique(y, return_inverse=True)
    names = tuple(map(str, labels if class_names is None else class_names))
    if len(names) != len(labels) or len(set(names)) < len(names):
        raise ValueError(
            f"Source {name!r}: `class_names` must be {len(labels)} different names, one for each label; got "
            f"{len(names)} ({len(set(names))} different)."
        )
    if superclass is not None:
        if np.shape(superclass) != (len(labels),):
            raise ValueError(
                f"Source {name!r}: `superclass` must have one entry for each of the {len(labels)} classes; got shape "
                f"{np.shape(superclass)}."
            )
        superclass = np.unique(np.asarray(superclass), return_inverse=True)[1].astype(np.int32)
    if group is not None:
        group = np.unique(np.asarray(group), return_inverse=True)[1].astype(np.int32)
        group = group if group.max() > 0 else None
    if ontology is not None:
        ontology = {str(node): tuple(map(str, children)) for node, children in ontology.items()}
    return Source(name, x, y.astype(np.int32), group, names, superclass, ontology)


def _check_labels(name: str, given: Any, y: np.ndarray) -> None:
    """Raises a `ValueError` where a label is missing, or no class."""
    no_class = lambda label: label is None or isinstance(label, float | np.floating) and not float(label).is_integer()
    # As `given`: of strings and NaN NumPy makes strings, "nan" among them.
    of = given if y.dtype.kind == "U" and not isinstance(given, np.ndarray) else y if y.dtype.kind in "fO" else ()
    for row, label in enumerate(of):
        if no_class(label):
            raise ValueError(
                f"Source {name!r}: `y` must be classes, integers or strings; got {label} for example {row}. Bin what "
                "is measured, and leave out examples without a label."
            )


def keep(source: Source, *, classes: Sequence[str] | None = None, rows: Any = None, min_examples: int = 1) -> Source:
    """A part of a source: some classes, some examples, no class that is too small.

    Args:
      source: the whole.
      classes: names of the classes to keep, in any order; None keeps all.
      rows: [M] int, the examples to keep; None keeps all.
      min_examples: classes that are left with fewer are dropped.

    Returns:
      A `Source` of the same name, classes and groups numbered anew in the same order.

    Raises:
      ValueError: a class or row is not in the source, or nothing is left.
    """
    chosen = np.ones(len(source.x), bool)
    if rows is not None:
        rows = np.asarray(rows)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer) or len(rows) == 0:
            raise ValueError(f"`rows` must be integers, at least one; got {rows.dtype} of shape {rows.shape}.")
        if rows.min() < 0 or rows.max() >= len(source.x):
            raise ValueError(f"`rows` must be in 0..{len(source.x) - 1}; got {rows.min()}..{rows.max()}.")
        chosen = np.zeros(len(source.x), bool)
        chosen[rows] = True
    if classes is not None:
        unknown = sorted(set(classes) - set(source.class_names))
        if unknown:
            raise ValueError(f"Source {source.name!r} has no class {', '.join(map(repr, unknown[:5]))}.")
        chosen &= np.isin(np.array(source.class_names), list(classes))[source.y]
    counts = np.bincount(source.y[chosen], minlength=source.num_classes)
    chosen &= (counts >= min_examples)[source.y]
    if not chosen.any():
        raise ValueError(f"Nothing of source {source.name!r} is left: no class of these has {min_examples} examples.")
    left = np.unique(source.y[chosen])
    return from_arrays(
        source.x[chosen],
        source.y[chosen],
        name=source.name,
        group=None if source.group is None else source.group[chosen],
        class_names=[source.class_names[c] for c in left],
        superclass=None if source.superclass is None else source.superclass[left],
        ontology=source.ontology,
    )


def with_rotations(source: Source) -> Source:
    """Every class four times: its images turned by 0, 90, 180 and 270 degrees are classes of their own.

    Usual for training on Omniglot (Santoro et al., ICML 2016; Vinyals et al., NIPS 2016). Turn what a split left for
    training, so that no class is turned into another part.

    Args:
      source: of square images [N, S, S] or [N, S, S, channels], without an ontology.

    Returns:
      A `Source` of 4 C classes; turned classes belong to superclasses of their own, one for each angle.

    Raises:
      ValueError: the images are not square, or there is an ontology.
    """
    if source.x.ndim < 3 or source.x.shape[1] != source.x.shape[2]:
        raise ValueError(f"`with_rotations` needs square images [N, S, S, ...]; got shape {source.x.shape}.")
    if source.ontology is not None:
        raise ValueError("`with_rotations` cannot turn the classes of an ontology; `_replace(ontology=None)` first.")
    num, superclass = source.num_classes, source.superclass
    return Source(
        source.name,
        np.concatenate([np.rot90(source.x, k, axes=(1, 2)) for k in range(4)]),
        np.concatenate([source.y + k * num for k in range(4)]).astype(np.int32),
        None if source.group is None else np.tile(source.group, 4),
        tuple(f"{name}@{90 * k}" for k in range(4) for name in source.class_names),
        None
        if superclass is None
        else np.concatenate([superclass + k * (superclass.max() + 1) for k in range(4)]).astype(np.int32),
    )


def labelled_rows(sources: Source | Sequence[Source]) -> dict[str, np.ndarray]:
    """Sources without episodes, for training on all classes at once: fine-tuning's pre-training, and baselines.

    Args:
      sources: one or several, with examples of one shape and type.

    Returns:
      "x" [N, ...] as it is in the sources, "y" [N] int32, classes numbered through all sources, "source" [N] int32: as
      `inner.minibatch` takes them.

    Raises:
      ValueError: there is no source, or shapes or types differ.
    """
    sources = [sources] if isinstance(sources, Source) else list(sources)
    check_alike(sources)
    offsets = np.cumsum([0] + [source.num_classes for source in sources])
    return {
        "x": np.concatenate([source.x for source in sources]),
        "y": np.concatenate([s.y + offset for s, offset in zip(sources, offsets, strict=False)]).astype(np.int32),
        "source": np.repeat(np.arange(len(sources), dtype=np.int32), [len(source.x) for source in sources]),
    }


def check_alike(sources: Sequence[Source]) -> None:
    """Raises a `ValueError` where sources cannot be joined to one array.

    Args:
      sources: to be joined.
    """
    if not len(sources):
        raise ValueError("`sources` must hold at least one source; it is empty.")
    names = check_names(sources)
    for source in sources:
        if source.x.shape[1:] != sources[0].x.shape[1:] or source.x.dtype != sources[0].x.dtype:
            raise ValueError(
                f"The examples of all sources must have one shape and type; those of {source.name!r} are "
                f"{source.x.dtype} {source.x.shape[1:]}, of {names[0]!r} {sources[0].x.dtype} "
                f"{sources[0].x.shape[1:]}. Resize them."
            )


def check_names(sources: Sequence[Source]) -> list[str]:
    """The names of sources; a `ValueError` where two have the same.

    Args:
      sources: any.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"`sources` must have different names; got {names}. Use `source._replace(name=...)`.")
    return names


# --- folders and packages --------------------------------------------------------------------------------------------


def from_image_folder(
    folder: str | os.PathLike[str],
    *,
    size: int,
    channels: int = 1,
    levels: int = 1,
    group_fn: Callable[[Path], Any] | None = None,
    name: str | None = None,
) -> Source:
    """A folder of images: each folder in it is a class; with two levels, a superclass of classes. Needs Pillow.

    Args:
      folder: FOLDER/class/image.png, or FOLDER/superclass/class/image.png.
      size: of the images, which are resized to a square of so many pixels a side, in area means.
      channels: 1, gray, [N, S, S]; 3, colors, [N, S, S, 3].
      levels: 1 or 2.
      group_fn: `path -> who made it`; None where that is not known.
      name: of the source; None: the folder's.

    Returns:
      A `Source` of uint8 images, in the order of their paths. Files whose suffix Pillow does not know are passed over.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there is no image, or an argument is out of range.
      ImportError: Pillow is not installed.
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
        raise ValueError(f"there is no image in {folder}: images lie in {'/'.join(['*'] * levels)}/ below it.")
    labels = ["/".join(file.relative_to(folder).parts[:levels]) for file in files]
    names = sorted(set(labels))
    return from_arrays(
        np.stack([_pixels(image.open(file), size, channels) for file in files]),
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


def _pixels(image: Any, size: int | None, channels: int) -> np.ndarray:
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
    """A data set of TensorFlow Datasets, read without TensorFlow. It must have been prepared as `array_record`:
    `tfds.builder(name, file_format="array_record").download_and_prepare(file_format="array_record")`.

    Args:
      name: as tfds knows it, "omniglot" or "cifar10:3.0.2".
      split: "train", "test", "train[:10%]", "train+test".
      data_dir: where it was prepared; None: tfds's own place.
      image: the feature that holds the example.
      label: the feature that holds the class.
      group: the feature that says who made the example; None: that is not known.
      superclass: the feature that says what its class belongs to, such as "alphabet" of "omniglot"; None: nothing.
      size: images are resized to a square of so many pixels a side (needs Pillow); None leaves them.
      channels: 1 or 3, where images are resized.

    Returns:
      A `Source`; a last axis of one channel is dropped.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ImportError: tensorflow-datasets or array_record is not installed.
      ValueError: the data set has no such features, images differ in shape and `size` is None, or examples of one
        class are of several superclasses.
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
        x = [_pixels(pillow.fromarray(one.squeeze()), size, channels) for one in x]
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
            raise ValueError(f"In {name!r} a class has examples of several {superclass!r}: it is no superclass.")
        belongs = [one for _, one in pairs]
    return from_arrays(
        x,
        y,
        name=name.split(":")[0],
        group=None if group is None else np.array([row[group] for row in examples]),
        class_names=[names[k] for k in np.unique(y)],
        superclass=belongs,
    )


# --- the sets in the folder that METAOPT_DATA names -----------------------------------------------------------------

IMAGE_SETS = ("omniglot", "quickdraw8", "signdigits", "spoken_digits", "fashion_mnist", "mnist")


def from_image_sets(
    names: Sequence[str] = IMAGE_SETS, *, path: str | os.PathLike[str] | None = None
) -> dict[str, Source]:
    """The image sets in the folder that METAOPT_DATA names, 28 × 28, ink high: [N, 28, 28] uint8.

    | source | classes | examples | group | superclass |
    |---|---|---|---|---|
    | omniglot | 1,623 characters | 32,460 | 20 drawers | 50 alphabets |
    | quickdraw8 | 8 | 4,000 | | |
    | signdigits | 10 | 1,200 | | |
    | spoken_digits | 10 | 3,000 spectrograms | 6 speakers | |
    | fashion_mnist | 10 | 35,000 | | |
    | mnist | 10 | 70,000 | | |

    Omniglot has 20 drawers for every alphabet; "drawer 3" is one person within an alphabet. Its official split is
    `omniglot_split`.

    Args:
      names: which of them.
      path: the folder; None: the environment variable METAOPT_DATA.

    Returns:
      Name -> `Source`.

    Raises:
      FileNotFoundError: there is no such folder or file.
      ValueError: a name is not in the table.
    """
    unknown = sorted(set(names) - set(IMAGE_SETS))
    if unknown:
        raise ValueError(f"`names` must be among {', '.join(IMAGE_SETS)}; got {', '.join(map(repr, unknown))}.")
    found = {}
    for name in names:
        with np.load(data_file("fashion_mnist_sub.npz" if name == "fashion_mnist" else f"{name}.npz", path)) as data:
            if name == "omniglot":
                first = np.unique(data["character"], return_index=True)[1]
                found[name] = from_arrays(
                    data["images"],
                    data["character"],
                    name=name,
                    group=data["drawer"],
                    class_names=list(data["character_names"]),
                    superclass=data["alphabet"][first],
                )
            elif name in ("fashion_mnist", "mnist"):
                parts = ("train", "val", "test")
                x, y = (np.concatenate([data[f"{what}_{part}"] for part in parts]) for what in "xy")
                found[name] = from_arrays(x, y, name=name)
            else:
                found[name] = from_arrays(
                    data["images"], data["label"], name=name, group=data["group"], class_names=list(data["class_names"])
                )
    return found


def data_file(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """The path of one file of the data folder.

    Args:
      name: of the file.
      path: the folder; None: the environment variable METAOPT_DATA.

    Returns:
      The path, of a file that exists.

    Raises:
      FileNotFoundError: there is no such folder or file.
    """
    folder = os.environ.get("METAOPT_DATA") if path is None else path
    if not folder:
        raise FileNotFoundError("no data folder: set METAOPT_DATA to it, or pass `path`.")
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"the data folder {folder} has no {name}.")
    return file


def omniglot_split(path: str | os.PathLike[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Omniglot's official split: 964 characters of 30 alphabets to train on, 659 of the 20 others to judge on.

    Args:
      path: the folder of `omniglot.npz`; None: the environment variable METAOPT_DATA.

    Returns:
      A split with the parts "train" and "test", as `select` takes it.

    Raises:
      FileNotFoundError: there is no such folder or file.

    Source: Lake, Salakhutdinov & Tenenbaum, Science 2015.
    """
    with np.load(data_file("omniglot.npz", path)) as data:
        characters, first = np.unique(data["character"], return_index=True)
        part, names = data["split"][first], data["character_names"]
    return {
        word: {"omniglot": {"classes": [str(names[c]) for c in characters[part == number]]}}
        for number, word in enumerate(("train", "test"))
    }
