"""A frame and the labels of its rows as arrays."""

from typing import Any, NamedTuple

import numpy as np

from metaopt.tasks._encoder import TableEncoder, fit_encoder
from metaopt.tasks._labels import fit_labels
from metaopt.tasks._scaled_columns import LARGEST


class LabeledFrame(NamedTuple):
    """The rows of a frame that have a label.

    Attributes:
      x: [n, d] float64, encoded, with NaN in gaps.
      y: [n] int32 in 0..C-1.
      encoder: the encoder of the columns of the frame without the target.
      classes: [C] the labels.
      index: [n] int64, the position of each row in the frame.
    """

    x: np.ndarray
    y: np.ndarray
    encoder: TableEncoder
    classes: np.ndarray
    index: np.ndarray


def labeled_frame(frame: Any, target: Any) -> LabeledFrame:
    """Encodes the rows of a frame that have a label.

    Args:
      frame: a frame of any type that `fit_encoder` takes.
      target: the name or the position of a column, which is not used as a feature, or one label per row.

    Raises:
      ValueError: if `fit_encoder` rejects the frame, `fit_labels` the target, or there is not one label for each row.
    """
    target = int(target) if isinstance(target, np.integer) else target
    is_name = isinstance(target, str | int)
    classes, codes = fit_labels(frame, column=target) if is_name else fit_labels(target)
    encoder = fit_encoder(frame, drop=[target] if is_name else ())
    x = encoded(encoder, frame)
    if len(x) != len(codes):
        raise ValueError(f"`target` must have one label for each of the {len(x)} rows; got {len(codes)}.")
    index = np.flatnonzero(codes >= 0)
    return LabeledFrame(x[index], codes[index], encoder, classes, index)


def encoded(encoder: TableEncoder, frame: Any) -> np.ndarray:
    """[n, d] float64, the rows of a frame, with NaN in gaps and numbers of at most 10¹⁵."""
    return np.clip(encoder.transform(frame), -LARGEST, LARGEST)
