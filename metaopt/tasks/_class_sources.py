"""Sources of classes for few-shot episodes: labeled examples, who made them, and the superclasses of the classes.

A source is one data set in memory. The readers are in `_image_sources`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import _checks


class Source(NamedTuple):
    """Labeled examples of one kind: `N` examples of `C` classes.

    Functions such as `from_arrays` make sources and check them.

    Attributes:
      name: unique among the sources in use.
      x: [N, ...], the examples; it is best to leave images as uint8.
      y: [N] int32 in 0..C-1; every class has an example.
      group: [N] int32 in 0..G-1, the maker of each example (drawer, speaker, camera); None if the makers are not known.
      class_names: C names, all different.
      superclass: [C] int32, the superclass of each class (the alphabet of a character), or None.
      ontology: node -> the names of its children, which are nodes or classes; a directed acyclic graph over the
        classes, or None.
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
        """G; 1 if groups are not known."""
        return 1 if self.group is None else int(self.group.max()) + 1

    def keep(self, *, classes: Sequence[str] | None = None, rows: Any = None, min_examples: int = 1) -> "Source":
        """Returns a part: some classes and some examples, without classes that are too small.

        Args:
          classes: names of the classes to keep, in any order; None keeps all.
          rows: the examples to keep: [M] int, their numbers; [N] bool; or a slice. None keeps all.
          min_examples: classes with fewer remaining examples are dropped.

        Returns:
          A `Source` of the same name; its classes and groups are numbered again, in the same order.

        Raises:
          ValueError: if a class or row is not in the source, `rows` has another shape or type, or nothing remains.
        """
        chosen = np.ones(len(self.x), bool) if rows is None else _row_mask(rows, len(self.x))
        if classes is not None:
            unknown = sorted(set(classes) - set(self.class_names))
            if unknown:
                raise ValueError(f"Source {self.name!r} has no class {', '.join(map(repr, unknown[:5]))}.")
            chosen &= np.isin(np.array(self.class_names), list(classes))[self.y]
        counts = np.bincount(self.y[chosen], minlength=self.num_classes)
        chosen &= (counts >= min_examples)[self.y]
        kept_classes = np.unique(self.y[chosen])
        return from_arrays(
            self.x[chosen],
            self.y[chosen],
            name=self.name,
            group=None if self.group is None else self.group[chosen],
            class_names=[self.class_names[c] for c in kept_classes],
            superclass=None if self.superclass is None else self.superclass[kept_classes],
            ontology=self.ontology,
        )

    def with_rotations(self) -> "Source":
        """Returns a source with four classes for each class: its images rotated by 0, 90, 180 and 270 degrees.

        This is usual for training on Omniglot (Santoro et al., ICML 2016; Vinyals et al., NIPS 2016). Rotate the
        training part after a split. Otherwise a rotated class may be in another part than its original.

        Examples must be square images [N, S, S] or [N, S, S, channels].

        Returns:
          A `Source` of 4 C classes. For each angle, the superclasses have new numbers.

        Raises:
          ValueError: if the images are not square, or there is an ontology.
        """
        if self.ontology is not None:
            raise ValueError(
                "`with_rotations` cannot rotate the classes of an ontology; call `_replace(ontology=None)` first."
            )
        num_classes, superclass = self.num_classes, self.superclass
        return Source(
            self.name,
            np.concatenate([np.rot90(self.x, k, axes=(1, 2)) for k in range(4)]),
            np.concatenate([self.y + k * num_classes for k in range(4)]).astype(np.int32),
            None if self.group is None else np.tile(self.group, 4),
            tuple(f"{name}@{90 * k}" for k in range(4) for name in self.class_names),
            None
            if superclass is None
            else np.concatenate([superclass + k * (superclass.max() + 1) for k in range(4)]).astype(np.int32),
        )


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
    """Makes a source from arrays.

    Args:
      x: [N, ...], the examples. They must be finite, also in the type to which JAX converts them (float32 for float64).
        One NaN would affect the outputs of its whole episode.
      y: [N], their labels: integers or strings. The classes are the different labels, sorted.
      name: the name of the source.
      group: [N], the maker of each example; None if the makers are not known. Values may have any type; equal values
        are one group.
      class_names: the names of the classes, in the order of the sorted labels; None uses the labels.
      superclass: [C], the superclass of each class, in the order of the sorted labels; any values.
      ontology: node -> its children, which are nodes or names of classes.

    Returns:
      A `Source`.

    Raises:
      ValueError: if `x` is empty, or lengths differ.
      ValueError: if the number of class names is not the number of classes, or two names are equal.
      TypeError: (by NumPy) if `x` is not numeric.
      ValueError: if `x` is not finite.
      ValueError: if a label is missing (NaN, None) or is a number that is not whole, or a group or superclass is
        missing.
    """
    x, labels, y = np.asarray(x), y, exact_array(y)
    y = y.astype(np.float32) if y.dtype.kind == "V" else y  # such as bfloat16
    if not x.ndim or not len(x):
        raise ValueError(f"Source {name!r} is empty: `x` must have at least one example; got shape {x.shape}.")
    for what, array in (("`y`", y), ("`group`", group)):
        if array is not None and np.shape(array) != (len(x),):
            raise ValueError(
                f"Source {name!r}: {what} must have one entry for each of the {len(x)} examples; "
                f"got shape {np.shape(array)}."
            )
    if x.dtype.kind not in "biu" and not (finite := _checks.is_finite(x)).all():
        index = tuple(np.argwhere(~finite)[0].tolist())
        raise ValueError(
            f"Source {name!r}: `x` must be finite in {jax.dtypes.canonicalize_dtype(x.dtype)}; got {x[index]} at "
            f"{list(index)}. Fill gaps first, for instance with the mean over the examples that are trained on, and "
            "rescale large values."
        )
    _check_labels(name, labels, y)
    for what, values in (("`group`", group), ("`superclass`", superclass)):
        if values is not None and (entry := first_missing(values)) is not None:
            raise ValueError(
                f"Source {name!r}: {what} must not have missing values; entry {entry} is {values[entry]}. Give "
                "each unknown entry its own value."
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
        superclass = np.unique(exact_array(superclass), return_inverse=True)[1].astype(np.int32)
    if group is not None:
        group = np.unique(exact_array(group), return_inverse=True)[1].astype(np.int32)
        group = group if group.max() > 0 else None
    if ontology is not None:
        ontology = {str(node): tuple(map(str, children)) for node, children in ontology.items()}
    return Source(name, x, y.astype(np.int32), group, names, superclass, ontology)


def _check_labels(name: str, labels: Any, y: np.ndarray) -> None:
    """Raises ValueError if a label is missing or is not a class."""
    is_not_class = lambda label: (
        label is None or isinstance(label, float | np.floating) and not float(label).is_integer()
    )
    # Check the original values: in an array of strings and NaN, NumPy turns NaN into the string "nan".
    must_check_original = y.dtype.kind == "U" and not isinstance(labels, np.ndarray)
    for row, label in enumerate(labels if must_check_original else y if y.dtype.kind in "fO" else ()):
        if is_not_class(label):
            raise ValueError(
                f"Source {name!r}: `y` must be classes, as integers or strings; got {label} for example {row}. Bin "
                "continuous values, and remove examples without a label."
            )


def exact_array(values: Any) -> np.ndarray:
    """Makes an array in which integers keep their exact values.

    NumPy converts a list such as [2**63, -1] to floats, which makes some different integers equal.

    Args:
      values: an array, or a sequence.

    Returns:
      The array; it holds Python objects if float64 cannot represent every integer.
    """
    array = np.asarray(values)
    if array.dtype.kind == "f" and not isinstance(values, np.ndarray) and (np.abs(array) >= 2**53).any():
        return np.asarray(values, object)
    return array


def first_missing(values: Any) -> int | None:
    """Returns the index of the first missing value (None, NaN or NaT), or None if all values are present.

    Args:
      values: the original values. After NumPy has converted strings and NaN to an array, NaN is the string "nan".

    Returns:
      The index, or None.
    """
    return next((index for index, value in enumerate(values) if value is None or value != value), None)


def _row_mask(rows: Any, num_rows: int) -> np.ndarray:
    """Returns [num_rows] bool for row numbers, a mask or a slice. Raises ValueError if they do not fit."""
    mask = np.zeros(num_rows, bool)
    if isinstance(rows, slice):
        mask[rows] = True
        return mask
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == mask.shape:
        return rows
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise ValueError(
            f"`rows` must be [M] int, a mask [{num_rows}] bool, or a slice; got {rows.dtype} of shape {rows.shape}."
        )
    if rows.size and not 0 <= rows.min() <= rows.max() < num_rows:  # NumPy counts negative rows from the end
        raise ValueError(f"`rows` must be in 0..{num_rows - 1}; got {rows.min()}..{rows.max()}.")
    mask[rows.astype(int)] = True
    return mask


def labelled_rows(sources: Source | Sequence[Source]) -> dict[str, np.ndarray]:
    """Returns all rows of sources, not divided into episodes, for training on all classes at once.

    Use them for the pre-training before fine-tuning, and for baselines.

    Args:
      sources: one or several, with examples of one shape and type.

    Returns:
      "x" [N, ...], unchanged; "y" [N] int32, with classes numbered across all sources; and "source" [N] int32. This is
      the form that `inner.minibatch` takes.

    Raises:
      ValueError: if shapes or types differ, or two sources have the same name.
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
    """Raises ValueError if sources cannot be joined into one array.

    Args:
      sources: the sources to join.
    """
    names = check_names(sources)
    for source in sources:
        if source.x.shape[1:] != sources[0].x.shape[1:] or source.x.dtype != sources[0].x.dtype:
            raise ValueError(
                f"The examples of all sources must have one shape and type; those of {source.name!r} are "
                f"{source.x.dtype} {source.x.shape[1:]}, of {names[0]!r} {sources[0].x.dtype} "
                f"{sources[0].x.shape[1:]}. Resize them."
            )


def check_names(sources: Sequence[Source]) -> list[str]:
    """Returns the names of sources. Raises ValueError if two sources have the same name.

    Args:
      sources: any.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"`sources` must have different names; got {names}. Use `source._replace(name=...)`.")
    return names
