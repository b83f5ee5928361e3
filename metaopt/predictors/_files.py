"""Files of predictors, for `metaopt.save` and `metaopt.load`: everything that a prediction for a new task needs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _files, _proposals, _saving, base, spaces, tasks
from metaopt._jaxpr import Tracer
from metaopt.predictors import _networks


class TrainedPredictor(NamedTuple):
    """A predictor with its weights: what `metaopt.save` writes and `metaopt.load` returns.

    Attributes:
      predictor: g or h, made by a factory of `metaopt.predictors`.
      meta_params: φ, with the shapes of `predictor.init`. (If `nas.meta_architecture_search` learned {"h", "init"},
        this is the entry "h"; `nas.TrainedMetaArchitecture` holds both.)
      scaling: the scaling of raw meta-features, from which `scaled_features` computes `task.features`; None if the
        predictor has none.
      trained_on: name of a task -> any text that identifies its rows, for each task that g learned from. With it, an
        evaluation can leave these tasks out. For the shipped g, the text is `row_hash` of `experiments/data/corpus`.
    """

    predictor: base.Predictor
    meta_params: base.PyTree
    scaling: tasks.FeatureScaling | None = None
    trained_on: Mapping[str, str] = {}

    @property
    def space(self) -> base.PyTree:
        """The space of λ, whose coordinates `predictor.apply` predicts."""
        return spaces.from_json(self.predictor.config["space"])

    def predict(self, task: base.Task) -> base.HyperParams:
        """Predicts λ for one task.

        `training.propose` draws from the distribution of a predictor with `spread`: pass it
        `predictor.apply(meta_params, task)` instead.

        Args:
          task: the task. Only the entries that the predictor reads are used, such as `features` [F]. It works under
            `jit`. For a batch of tasks, which have a leading axis, use `jax.vmap(trained.predict)(batch)`.

        Returns:
          λ in natural units. For a predictor with `spread`, it is the center of the distribution.

        Raises:
          ValueError: if `task.features` does not have F entries; or, outside of `jit` and `vmap`, has a NaN or an
            infinite entry.
        """
        num_features = _networks.option_of(self.predictor.config, "num_features")
        if num_features and np.shape(task.features) != (num_features,):
            raise ValueError(
                f"`task.features` must have shape ({num_features},); got shape {np.shape(task.features)}. For a batch "
                "of tasks, use `jax.vmap(trained.predict)(batch)`."
            )
        if num_features and not isinstance(task.features, Tracer) and not np.isfinite(task.features).all():
            raise ValueError(
                f"`task.features` must be finite; got {np.asarray(task.features)}. `scaled_features` replaces missing "
                "features by those of the median table."
            )
        prediction = _proposals.center_of(self.predictor.apply(self.meta_params, task))
        if isinstance(prediction, spaces.Unconstrained):
            return spaces.to_constrained(self.space, prediction)
        return prediction

    def scaled_features(self, features: Mapping[str, float]) -> np.ndarray:
        """Computes `task.features` of one task for this predictor.

        Args:
          features: raw meta-features, by name.

        Returns:
          [F], by `tasks.FeatureScaling.transform`: with the predictor's `limit`, or with `clip=3.0` if it has none.

        Raises:
          ValueError: if there is no scaling.
          KeyError: if a name is absent.
        """
        if self.scaling is None:
            raise ValueError("This predictor has no `scaling` of features.")
        limit = _networks.option_of(self.predictor.config, "limit")
        return self.scaling.transform(features, **({"clip": 3.0} if limit is None else {"limit": limit}))


def _encode(trained: TrainedPredictor) -> tuple[dict[str, Any], dict[str, Any]]:
    predictor, meta_params, scaling, trained_on = trained
    if not predictor.config:
        raise ValueError(
            "This predictor has no `config`, so it could not be rebuilt from a file. Create the `Predictor` with the "
            "`config` of its options, or save its weights yourself."
        )
    shapes = _saving.shapes("", jax.eval_shape(lambda: meta_params))
    expected = _saving.shapes("", jax.eval_shape(predictor.init, jax.random.key(0)))
    if shapes != expected:
        raise ValueError(f"`meta_params` must have the shapes that `predictor.init` returns, {expected}; got {shapes}.")
    fields = None if scaling is None else _feature_scaling(scaling._asdict())._asdict()
    header = {"config": predictor.config, "scaling": fields, "trained_on": dict(trained_on)}
    return header, _saving.named_leaves("", meta_params)


def _decode(header: dict[str, Any], file: _files.Npz) -> TrainedPredictor:
    config, fields, trained_on = header["config"], header["scaling"], header.get("trained_on", {})
    if not isinstance(trained_on, dict) or not all(isinstance(text, str) for text in trained_on.values()):
        raise ValueError("its `trained_on` is not a dict of texts")
    scaling = None if fields is None else _feature_scaling(fields)
    _check_sizes(config, spaces.from_json(config["space"]), file)
    predictor = _networks.from_config(config)
    template = jax.eval_shape(predictor.init, jax.random.key(0))
    arrays = file.floats(_saving.shapes("", template))
    meta_params = jax.tree.map(jnp.asarray, _saving.tree_from_leaves("", arrays, template))
    return TrainedPredictor(predictor, meta_params, scaling, trained_on)


def _feature_scaling(fields: Any) -> tasks.FeatureScaling:
    """A `FeatureScaling` of plain values, from a mapping of its fields."""
    types = {"names": str, "center": float, "scale": float, "log": bool}
    if fields.keys() != types.keys():
        raise ValueError(f"the fields of its scaling are {', '.join(map(str, fields))}, not {', '.join(types)}")
    scaling = tasks.FeatureScaling(**{name: tuple(map(types[name], fields[name])) for name in types})
    if len({len(values) for values in scaling}) > 1:
        raise ValueError(f"the fields of its scaling have the lengths {[len(values) for values in scaling]}")
    for name in ("center", "scale"):  # `float` reads the text "nan", too
        _files.check_finite(f"{name} of its scaling", np.asarray(getattr(scaling, name)))
    if min(scaling.scale, default=1.0) <= 0:
        raise ValueError("its scaling has a scale that is not positive")
    return scaling


def _check_sizes(config: Any, space: base.PyTree, file: _files.Npz) -> None:
    """Raises ValueError if the predictor or one of its members would be larger than the file's weights."""
    num_weights = sum(math.prod(spec.shape) for spec in file.specs.values())
    if spaces.num_dims(space) > num_weights:
        raise ValueError(f"its space has {spaces.num_dims(space)} dimensions, and there are only {num_weights} weights")
    while isinstance(config, dict) and "member" in config:
        config = config["member"]
        if spaces.from_json(config["space"]) != space:
            raise ValueError("the members of its ensemble have a space that differs from the ensemble's")


_saving.register(_saving.Kind("predictor", TrainedPredictor, _encode, _decode))
