"""Saving of fitted estimators as one file: JSON, arrays, and models in the formats of their libraries. No pickle."""

import platform
import sys
from typing import Any

import numpy as np

from metaopt import _extras, _files, _saving, tasks
from metaopt.automl import _kinds, _table_estimator
from metaopt.automl._ensemble_fit import FittedEnsemble, FittedMember, predict_ensemble
from metaopt.automl._estimators import AutoClassifier, AutoRegressor
from metaopt.automl._inputs import Inputs, TargetTable
from metaopt.automl._network_folds import NetworkModel
from metaopt.automl._portfolio import Member
from metaopt.automl._report import report_frame
from metaopt.automl._score_error import ScoreError
from metaopt.automl._tabular_model import decode_labels, encode_labels

_LIBRARIES = ("sklearn", "lightgbm", "xgboost")  # some models are in their formats, which change between versions


def encode(estimator: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the arrays of a fitted estimator."""
    shared = _table_estimator.encode(estimator, "ensemble_")
    limit, ensemble = shared["params"]["time_limit"], estimator.ensemble_
    shared["params"]["time_limit"] = None if limit is None or np.isinf(limit) else limit  # JSON has no infinity
    arrays = {"nonconformity": estimator.nonconformity_, "out_of_fold": ensemble.out_of_fold}
    arrays["score_error"] = np.array(estimator.score_error_)
    for i, inputs in enumerate(ensemble.inputs):
        arrays |= _encode_inputs(f"fold {i}: ", inputs)
        arrays[f"fold {i}: classes"] = ensemble.classes[i]
    members = []
    for member in ensemble.members:
        fields = member._replace(models=[], member=list(member.member))._asdict()
        members.append(fields | {"num_models": len(member.models)})
        for i, model in enumerate(member.models):
            arrays |= _encode_model(f"{member.member.name} {i}: ", member.member.kind, model)
    arrays["odd_predictions"] = predict_ensemble(ensemble, _table_estimator.odd_rows(estimator))
    header = {
        **shared,
        "python": platform.python_version(),
        "versions": _versions(),
        "target_name": estimator.target_name_,
        "group_name": estimator.group_name_,
        "target_encoder": None if estimator.target_encoder_ is None else estimator.target_encoder_.state(),
        "suspected_leaks": list(estimator.suspected_leaks_),
        "suspected_groups": list(estimator.suspected_groups_),
        "row_notes": estimator.row_notes_,
        "ensemble": {
            "num_folds": len(ensemble.inputs),
            "num_classes": ensemble.num_classes,
            "temperature": ensemble.temperature,
            "score": ensemble.score,
            "failed": ensemble.failed,
            "members": members,
        },
    }
    if ensemble.num_classes:
        header["classes"] = encode_labels(estimator.classes_)
    else:
        header |= {"mean": estimator.mean_, "scale": estimator.scale_}
    return header, arrays


def decode(estimator: Any, header: dict[str, Any], file: _files.Npz) -> Any:
    """Fills an unfitted estimator."""
    _table_estimator.decode(estimator, header)
    parts = header["ensemble"]
    num_folds, num_classes = int(parts["num_folds"]), int(parts["num_classes"])
    members = []
    for fields in parts["members"]:
        name, kind, settings = fields["member"]
        models = [_decode_model(f"{name} {i}: ", kind, header, file) for i in range(int(fields["num_models"]))]
        if models and len(models) != num_folds:
            raise ValueError(f"the model {name} has {len(models)} folds, and there are {num_folds}")
        numbers = {key: float(fields[key]) for key in ("score", "weight", "fit_seconds", "predict_seconds")}
        members.append(FittedMember(Member(name, kind, settings), models, **numbers))
    estimator.ensemble_ = FittedEnsemble(
        [_decode_inputs(f"fold {i}: ", file) for i in range(num_folds)],
        [file[f"fold {i}: classes"] for i in range(num_folds)],
        members,
        dict(parts["failed"]),
        float(parts["temperature"]),
        file["out_of_fold"],
        num_classes,
        float(parts["score"]),
    )
    _check_prediction(estimator, header, file)
    estimator.nonconformity_ = file["nonconformity"]
    if estimator.nonconformity_.ndim != 2 or len(estimator.nonconformity_) != 2:
        raise ValueError("its nonconformity scores must be [2, n]: scores and weights")
    error, num_blocks, num_units = file["score_error"].tolist()
    estimator.score_error_ = ScoreError(error, int(num_blocks), int(num_units))
    estimator.target_name_, estimator.group_name_ = header["target_name"], header["group_name"]
    state = header["target_encoder"]
    estimator.target_encoder_ = None if state is None else tasks.TableEncoder.from_state(state)
    estimator.suspected_leaks_ = tuple(header["suspected_leaks"])
    estimator.suspected_groups_ = tuple(header["suspected_groups"])
    estimator.row_notes_ = [(action, reason) for action, reason in header.get("row_notes", [])]
    suspected = estimator.suspected_leaks_, estimator.suspected_groups_
    estimator.report_ = report_frame(estimator.encoder_, *suspected, estimator.row_notes_)
    if num_classes:
        estimator.classes_ = decode_labels(header["classes"])
        if len(estimator.classes_) != num_classes:
            raise ValueError(f"it has {len(estimator.classes_)} class labels, but {num_classes} classes")
    else:
        estimator.mean_, estimator.scale_ = float(header["mean"]), float(header["scale"])
    return estimator


def _check_prediction(estimator: Any, header: dict[str, Any], file: _files.Npz) -> None:
    """Raises ValueError unless a loaded estimator predicts two rows as it did when it was saved.

    Its parts may not fit each other. Or a library may read the format of its other versions wrongly: XGBoost 2.1 reads
    files of XGBoost 3.4 without an error, and predicts other values.
    """
    ensemble = estimator.ensemble_
    shape = (2, ensemble.num_classes) if ensemble.num_classes else (2,)
    try:
        predicted = predict_ensemble(ensemble, _table_estimator.odd_rows(estimator))
    except Exception as error:
        note = _note_of_versions(header)
        raise ValueError(f"its models, columns and classes do not fit each other: {error}{note}") from error
    if predicted.shape != shape or not np.isfinite(predicted).all():
        raise ValueError("its predictions are not finite numbers, one for each row and class")
    if "odd_predictions" in file and not np.allclose(predicted, file["odd_predictions"], rtol=1e-3, atol=1e-4):
        raise ValueError(f"its models predict other values than when they were saved{_note_of_versions(header)}")


def _versions() -> dict[str, str]:
    """Module -> version, of the libraries that are imported."""
    return {name: str(sys.modules[name].__version__) for name in _LIBRARIES if name in sys.modules}


def _note_of_versions(header: dict[str, Any]) -> str:
    """The end of a message: the libraries that had other versions when the file was saved, if any."""
    saved, here = header.get("versions", {}), _versions()
    other = [name for name in here if saved.get(name, here[name]) != here[name]]
    if not other:
        return ""
    listed = lambda versions: ", ".join(f"{name} {versions[name]}" for name in other)
    return f" (it was saved with {listed(saved)}; install these versions, here are {listed(here)})"


def _encode_inputs(prefix: str, inputs: Inputs) -> dict[str, np.ndarray]:
    arrays = {f"{prefix}kept": inputs.kept, f"{prefix}medians": inputs.medians}
    arrays |= {f"{prefix}columns.{name}": value for name, value in inputs.fitted._asdict().items()}
    for j, table in enumerate(inputs.targets):
        arrays |= {f"{prefix}targets.{j}.{name}": np.asarray(value) for name, value in table._asdict().items()}
    return arrays


def _decode_inputs(prefix: str, file: _files.Npz) -> Inputs:
    targets = []
    while f"{prefix}targets.{len(targets)}.column" in file:
        fields = {name: file[f"{prefix}targets.{len(targets)}.{name}"] for name in TargetTable._fields}
        targets.append(TargetTable(**{**fields, "column": int(fields["column"])}))
    fitted = tasks.FittedColumns(**{name: file[f"{prefix}columns.{name}"] for name in tasks.FittedColumns._fields})
    return Inputs(tuple(targets), file[f"{prefix}kept"], file[f"{prefix}medians"], fitted)


def _encode_model(prefix: str, kind: str, model: Any) -> dict[str, np.ndarray]:
    if kind != "network":  # None is the model of a fold with one class
        data = b"" if model is None else _kinds.KINDS[kind].dumps(model)
        return {f"{prefix}model": np.frombuffer(data, np.uint8)}
    arrays = {f"{prefix}params.{name}": value for name, value in model.params.items()}
    arrays |= {f"{prefix}scales.{name}": np.float64(value) for name, value in model.scales.items()}
    return arrays if model.centers is None else arrays | {f"{prefix}centers": model.centers}


def _decode_model(prefix: str, kind: str, header: dict[str, Any], file: _files.Npz) -> Any:
    if kind != "network":
        data = file[f"{prefix}model"].tobytes()
        try:
            return _kinds.KINDS[kind].loads(data) if data else None
        except ImportError as error:
            note = _note_of_versions(header)
            if note and (error.name or "").split(".")[0] in sys.modules:  # it lacks a part that another version has
                raise ValueError(f"its model {prefix.rstrip(': ')} cannot be read: {error}{note}") from error
            extra = "catboost" if kind == "catboost" else "automl"
            raise ImportError(f"The file has a model {kind}: {_extras.hint(extra)} ({error}).") from error
        except Exception as error:  # each library has its own types of errors
            raise ValueError(
                f"its model {prefix.rstrip(': ')} cannot be read: {error}{_note_of_versions(header)}"
            ) from error
    params = {key: file[f"{prefix}params.{key}"] for key in ("hidden", "bias", "output", "output_bias", "linear")}
    names = ("hinge_scale", "hidden_scale", "output_scale", "linear_scale")
    scales = {key: float(file[f"{prefix}scales.{key}"]) for key in names}
    return NetworkModel(params, scales, file[f"{prefix}centers"] if f"{prefix}centers" in file else None)


def _decode_classifier(header: dict[str, Any], file: _files.Npz) -> AutoClassifier:
    return decode(AutoClassifier(), header, file)


def _decode_regressor(header: dict[str, Any], file: _files.Npz) -> AutoRegressor:
    return decode(AutoRegressor(), header, file)


_saving.register(_saving.Kind("auto_classifier", AutoClassifier, encode, _decode_classifier, compress=True))
_saving.register(_saving.Kind("auto_regressor", AutoRegressor, encode, _decode_regressor, compress=True))
