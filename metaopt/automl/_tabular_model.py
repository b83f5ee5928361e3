"""A trained tabular network with the encoding of its table, which predicts new rows and is saved as one file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metaopt import _files, _saving, base, tasks
from metaopt.automl._network import log_probabilities, tabular_space

_FLAGS = ("categorical", "has_gaps", "has_others", "kept")
_PARAMS = ("hidden", "bias", "output", "output_bias", "linear")


class TabularModel(NamedTuple):
    """A trained `tabular_network`, with its hyperparameters and the encoding of its table.

    `metaopt.save` writes it to one file. Another process, without the training rows, loads it and predicts new rows.

    Attributes:
      params: θ, the result of `train` with the task of this table, without padding.
      hyperparams: λ in natural units.
      encoder: how the columns of a frame become numbers, `PreparedTable.encoder`; None for a table without names.
      columns: how these numbers become inputs of the network, `PreparedTable.columns`.
      classes: [C] the labels, `PreparedTable.classes`.

    >>> import jax
    >>> from metaopt import automl, spaces, tasks
    >>> frame = {
    ...     "size": [1.5, 2.5, 3.5, 4.5] * 5,
    ...     "color": ["red", "blue"] * 10,
    ...     "sold": ["no", "yes"] * 10,
    ... }
    >>> table = tasks.prepare(frame, "sold", test_fraction=0.0)
    >>> network = automl.tabular_network(num_steps=5)
    >>> hyperparams = spaces.default(network.space)
    >>> params = automl.train(
    ...     network, jax.random.key(0), hyperparams, automl.tabular_task(table)
    ... )
    >>> model = automl.TabularModel(
    ...     params, hyperparams, table.encoder, table.columns, table.classes
    ... )
    >>> model.predict_proba({"size": [2.0, 1.0], "color": ["red", "blue"]}).shape
    (2, 2)
    """

    params: base.Params
    hyperparams: base.HyperParams
    encoder: tasks.TableEncoder | None
    columns: tasks.FittedColumns
    classes: np.ndarray

    def predict_proba(self, rows: Any) -> np.ndarray:
        """Returns the probabilities of the classes.

        Args:
          rows: new rows: a frame with the columns of the encoder, or [n, d] numbers if there is no encoder.

        Returns:
          [n, C], in the order of `classes`.

        Raises:
          ValueError: if a column is missing, or `rows` has another number of columns.
          ValueError: if `rows` is a frame and there is no encoder: the model does not know the names of its columns.
        """
        if self.encoder is None and (isinstance(rows, Mapping) or hasattr(rows, "columns")):
            raise ValueError(
                "The model has no `encoder`, so it cannot encode the frame `rows`. Pass [n, d] numbers in the order of "
                "the training columns, or prepare the table from a frame: `tasks.prepare(frame, target)`."
            )
        return np.exp(_log_probabilities(self, rows if self.encoder is None else self.encoder.transform(rows)))

    def predict(self, rows: Any) -> np.ndarray:
        """Returns the most probable class of each row: [n], of `classes`.

        Args:
          rows: new rows, as for `predict_proba`.
        """
        return self.classes[self.predict_proba(rows).argmax(axis=1)]


def _log_probabilities(model: TabularModel, numbers: np.ndarray) -> np.ndarray:
    x = jnp.asarray(model.columns.transform(numbers))
    ones = lambda num: jnp.ones(num, x.dtype)  # as in a task
    batch = {"x": x, "feature_mask": ones(x.shape[1]), "class_mask": ones(len(model.classes))}
    # Weak types would be promoted differently next to float64. So make all types strong, as they are in a loaded model.
    hyperparams = {name: jnp.asarray(np.asarray(value)) for name, value in model.hyperparams.items()}
    return np.asarray(log_probabilities(model.params, hyperparams, batch))


# --- files ---


def encode_labels(classes: np.ndarray) -> dict[str, Any]:
    """Labels of any type as JSON values."""
    if classes.dtype.kind in "mM":  # times, in whole units
        return {"dtype": classes.dtype.str, "values": classes.astype(np.int64).tolist()}
    return {"dtype": classes.dtype.str if classes.dtype.kind in "biufU" else "object", "values": classes.tolist()}


def decode_labels(labels: dict[str, Any]) -> np.ndarray:
    """The inverse of `encode_labels`."""
    if not all(isinstance(value, str | int | float | bool) for value in labels["values"]):
        raise ValueError("its classes are not texts, numbers or booleans")
    return np.array(labels["values"], dtype=np.dtype(labels["dtype"]))


def _encode(model: TabularModel) -> tuple[dict[str, Any], dict[str, Any]]:
    _check(model)
    header = {
        "encoder": None if model.encoder is None else model.encoder.state(),
        "classes": encode_labels(model.classes),
    }
    arrays = {f"params.{name}": model.params[name] for name in _PARAMS}
    arrays |= {f"hyperparams.{name}": model.hyperparams[name] for name in tabular_space()}
    return header, arrays | {f"columns.{name}": value for name, value in model.columns._asdict().items()}


def _decode(header: dict[str, Any], file: _files.Npz) -> TabularModel:
    model = TabularModel(
        {name: jnp.asarray(file[f"params.{name}"]) for name in _PARAMS},
        {name: jnp.asarray(file[f"hyperparams.{name}"]) for name in tabular_space()},
        None if header["encoder"] is None else tasks.TableEncoder.from_state(header["encoder"]),
        tasks.FittedColumns(**{name: file[f"columns.{name}"] for name in tasks.FittedColumns._fields}),
        decode_labels(header["classes"]),
    )
    _check(model)
    return model


def _check(model: TabularModel) -> None:
    """Raises ValueError unless the parts of a model fit each other. It predicts two rows."""
    num_columns = len(model.columns.categorical)
    if model.encoder is not None and len(model.encoder.names) != num_columns:
        raise ValueError(f"its encoder has {len(model.encoder.names)} columns, and its network {num_columns}")
    for name, leaf in [*model.params.items(), *model.hyperparams.items()]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or (name in model.hyperparams and leaf.shape):
            raise ValueError(f"the array {name} should be floating-point, and is {leaf.dtype} of shape {leaf.shape}")
        _files.check_finite(name, np.asarray(leaf))
    for name, array in model.columns._asdict().items():
        kinds = "b" if name in _FLAGS else "iu" if name == "num_knots" else "f"
        if array.dtype.kind not in kinds:
            raise ValueError(f"the array {name} of its columns is of type {array.dtype}")
        if kinds == "f":
            _files.check_finite(name, array, missing=True)
    try:
        predicted = _log_probabilities(model, np.array([[0.0], [np.nan]]) * np.ones(num_columns))
    except Exception as error:
        raise ValueError(f"its network, columns and classes do not fit each other: {error}") from error
    if predicted.shape != (2, len(model.classes)) or not np.isfinite(predicted).all():
        raise ValueError("its predictions are not finite numbers, one for each row and class")


_saving.register(_saving.Kind("tabular_model", TabularModel, _encode, _decode))
