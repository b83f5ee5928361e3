"""PyTorch Lightning: modules as black boxes. Epochs are fidelities, and trials are pruned or continue from checkpoints.

Lightning and torch are imported when a function is called (extra `lightning`).
"""

import hashlib
import importlib
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Protocol

from metaopt import _extras, base
from metaopt.blackbox import _trials
from metaopt.blackbox._origins import source_text

__all__ = ["ReportFn", "callback", "objective"]


# Displays and storage of a Trainer, which are off here by default. They do not change the outcome.
_SHOWN = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class ReportFn(Protocol):
    """Receives a record after every epoch, and returns whether to stop the trial early."""

    def __call__(self, record: base.Record, /) -> bool | None: ...


def callback(
    trial: base.Record,
    *,
    max_epochs: int,
    monitor: str = "val_loss",
    mode: str = "min",
    report: ReportFn | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    version: str = "",
    sources: Sequence[Any] = (),
) -> Any:
    """Makes a callback for `lightning.Trainer(callbacks=[...])`: after epoch e it reports a record of fidelity e/E.

    If `report` returns true, the callback raises `blackbox.Pruned`, which ends `Trainer.fit`. In `blackbox.collect` the
    trial is then "PRUNED", with the outcome of its last epoch. If the metric is not finite, training stops, and the
    trial's checkpoint is removed.

    After every epoch, a new checkpoint atomically replaces the old one. It holds the outcomes of all epochs.
    `Trainer.fit(ckpt_path=callback.checkpoint)` continues from it, at a larger fidelity or after a kill. Every epoch
    begins with seeds that follow from the trial's seed and the epoch. A continued run therefore equals an uninterrupted
    one, as far as torch's own operations are reproducible.

    A checkpoint does not hold hyper-parameters (`save_hyperparameters`), which may be classes, functions or paths. To
    continue from it, construct the module again. Everything else that is saved must be tensors and plain values,
    because torch can read only those safely. This concerns `on_save_checkpoint` and `state_dict` of the module, its
    data and other callbacks.

    A checkpoint belongs to one trial and one version of the objective. Its folder is named by the trial's number and a
    digest of the task's name, the configuration, the seed, `monitor`, `mode` and `version`. If one of these changes, no
    checkpoint is found, and training starts from the beginning; the old folders stay. If you change the module, the
    data or the Trainer, pass another `version`: metaopt cannot recognize such changes. The source text of `sources` is
    saved with the checkpoint. If it has changed, a warning is given, and training continues from the checkpoint.

    Args:
      trial: the running trial. Its records have its task, trial number, seed and configuration, and its folder is named
        by them.
      max_epochs: E, the epochs of the full budget.
      monitor: the metric that the module logs once per epoch.
      mode: "min", or "max", for which the records hold the negative metric.
      report: `(record) -> bool`, whether to stop the trial early. It is called after each epoch that is trained and has
        a finite metric, and not for epochs that are read from a checkpoint. To keep learning curves, use
        `lambda r: blackbox.append_records("curves.db", [r])`. Epochs that are trained again are reported again;
        therefore use a separate file for each objective. In an Optuna objective, use
        `lambda r: optuna_trial.report(r.outcome, round(r.fidelity * E)) or optuna_trial.should_prune()`.
      checkpoints: a folder; None keeps no checkpoint.
      version: the version of the objective: any text.
      sources: classes and functions on which a checkpoint depends, such as the class of the module, or texts. Objects
        without source text (such as `functools.partial`, or functions that were typed into a shell) are skipped.

    Returns:
      A `lightning.pytorch.Callback` with four attributes. `outcomes` has the outcome of each epoch; it includes the
      epochs before the checkpoint once that is read. `outcome` is the last one. `num_epochs` is the number of epochs
      that this trial has completed. `checkpoint` is the path of its last checkpoint, or None.

    Raises:
      ValueError: if `mode` is unknown; in training, if the module does not log `monitor`.
      ImportError: if Lightning is not installed.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"`mode` must be 'min' or 'max'; got {mode!r}.")
    lightning = _lightning()
    folder, source = None, ""
    if checkpoints is not None:
        identity = repr((trial.task, sorted(trial.configuration.items()), trial.seed, monitor, mode, version))
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        folder, source = Path(checkpoints) / f"{trial.trial:06d}-{digest}", source_text(sources)
    settings = _Settings(max_epochs, monitor, mode, report, folder, source)
    return type("Epochs", (_Epochs, lightning.Callback), {})(lightning, trial, settings)


class _Settings(NamedTuple):
    max_epochs: int
    monitor: str
    mode: str
    report: ReportFn | None
    folder: Path | None  # of the trial's checkpoint
    source: str  # text, saved next to the checkpoint


class _Epochs:
    """The callback, without its base class of Lightning, which is imported when a callback is made."""

    state_key = "metaopt"

    def __init__(self, lightning: Any, trial: base.Record, settings: _Settings):
        self._lightning, self._trial, self._settings = lightning, trial, settings
        self._begun = self._saves = False
        self.outcomes: tuple[float, ...] = ()
        saved = [] if settings.folder is None else sorted(settings.folder.glob("*.ckpt"))
        self.checkpoint = str(saved[-1]) if saved else None
        self.num_epochs = int(saved[-1].stem) if saved else 0
        if self.checkpoint is not None:
            _warn_of_other_source(settings)

    @property
    def outcome(self):
        return self.outcomes[-1] if self.outcomes else math.nan

    def state_dict(self):
        return {"outcomes": list(self.outcomes)}

    def load_state_dict(self, state_dict):
        self.outcomes = tuple(state_dict["outcomes"])

    # The order of an epoch's data is drawn when its iterator is made. For the first epoch, this happens before its
    # callbacks are called; for the others, afterwards.
    def setup(self, trainer, pl_module, stage):
        _seed(self._lightning, self._trial, self.num_epochs)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch != self.num_epochs or self._begun:
            _seed(self._lightning, self._trial, trainer.current_epoch)
        self._begun = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            _seed(self._lightning, self._trial, trainer.current_epoch, 1)  # for dropout and similar operations

    def on_train_epoch_end(self, trainer, pl_module):
        # Lightning calls this after validation, when all metrics of the epoch are available.
        settings = self._settings
        if settings.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"The module logs no {settings.monitor!r} in an epoch; it logs {sorted(trainer.callback_metrics)}. "
                "Log it in `validation_step` with `self.log`, or name another `monitor`."
            )
        value = float(trainer.callback_metrics[settings.monitor])
        self.outcomes = (*self.outcomes, value if settings.mode == "min" else -value)
        self.num_epochs = trainer.current_epoch + 1
        if not math.isfinite(value):
            self.discard(trainer)  # a corrected trial starts from the beginning
            trainer.should_stop = True
            return
        if settings.folder is not None:
            self._saves = True
            self.checkpoint = _replace_checkpoint(trainer, settings, self.num_epochs, self.checkpoint)
            self._saves = False
        fidelity = min(self.num_epochs / settings.max_epochs, 1.0)
        record = self._trial._replace(outcome=self.outcome, fidelity=fidelity, status="COMPLETE")
        if settings.report is not None and settings.report(record) and self.num_epochs < settings.max_epochs:
            raise _trials.Pruned(self.outcome)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self._saves:  # not if another callback saves
            for name in ("hyper_parameters", "hparams_type"):
                checkpoint.pop(name, None)
                checkpoint.pop(f"datamodule_{name}", None)

    def discard(self, trainer):
        """Removes the checkpoint."""
        if self.checkpoint is not None and trainer.is_global_zero:
            Path(self.checkpoint).unlink(missing_ok=True)
        self.checkpoint = None


def objective(
    make_module: Callable[[dict[str, Any], Any], Any],
    make_data: Callable[[dict[str, Any], Any], Any],
    *,
    max_epochs: int,
    monitor: str = "val_loss",
    mode: str = "min",
    report: ReportFn | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    version: str = "",
    trainer: Mapping[str, Any] | None = None,
) -> _trials.ObjectiveFn:
    """Makes an objective for `blackbox.collect`: it trains a LightningModule with a trial's configuration.

    Any PyTorch or Lightning model is a black box to JAX: nothing is differentiated through it. Learning from its
    records (`blackbox.train_meta_optimizer`) uses JAX, and so does a search with the result.

    A trial at fidelity s trains for round(s E) epochs, at least one. With `checkpoints`, it continues from its state at
    a smaller fidelity (`blackbox.collect(resumes=True)` counts its cost accordingly). `blackbox.asha` and
    `blackbox.bohb` then pay for each epoch once. If its checkpoint is already further, the outcome is that of the
    requested epoch.

    If a trial itself fails, by an exception or a non-finite outcome, its checkpoint is removed. `blackbox.collect` with
    `retry_failed` then trains it from the beginning. A trial that was ended from outside, by a limit or a kill,
    continues.

    The docstring of `callback` explains when a checkpoint is used. If you change the module, the data or the `trainer`,
    pass another `version`; trials are then trained again, and `report` receives their epochs again. A warning is given
    if the source text of `make_module`, `make_data` or the module's class, or a plain value of `trainer`, differs from
    that of the checkpoint.

    Args:
      make_module: `(configuration, task) -> LightningModule`. Before the call, torch is seeded with the trial's seed.
      make_data: `(configuration, task)` -> a LightningDataModule, or the loaders (train, validation).
      max_epochs: E, the epochs of the full budget.
      monitor: as for `callback`.
      mode: as for `callback`.
      report: as for `callback`.
      checkpoints: as for `callback`.
      version: as for `callback`.
      trainer: arguments of `lightning.Trainer`, such as `{"accelerator": "gpu", "devices": 1}`. By default there is no
        logger, no progress bar and no model summary, and the only checkpoint is the one in `checkpoints`.

    Returns:
      `(trial, task) -> outcome`, the metric of the last epoch, or minus the metric if `mode` is "max".

    Raises:
      ValueError: when a trial runs, if `mode` is unknown, or its checkpoint cannot be continued. The checkpoint is then
        removed.
      ImportError: when a trial runs, if Lightning is not installed.

    The example trains a network for handwritten digits, of any width and rate, with ASHA's budgets. It keeps the loss
    of every epoch:

        import lightning, torch
        from metaopt import spaces

        class Digits(lightning.LightningModule):
            def __init__(self, width, rate):
                super().__init__()
                self.rate = rate
                self.net = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))

            def training_step(self, batch, _):
                return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def validation_step(self, batch, _):
                self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), self.rate)

        objective = blackbox.lightning.objective(
            lambda c, task: Digits(c["width"], c["rate"]), lambda c, task: (task.train_loader, task.valid_loader),
            max_epochs=27, checkpoints="checkpoints", report=lambda r: blackbox.append_records("curves.db", [r]),
        )
        space = {"width": spaces.integer(8, 256, log=True), "rate": spaces.interval(1e-4, 1e-1, log=True)}
        records = blackbox.collect(objective, space, {"digits": loaders}, searcher=blackbox.asha(), num_trials=20,
                                resumes=True, key=jax.random.key(0), store="records.db")
    """
    kwargs = {"monitor": monitor, "mode": mode, "report": report, "checkpoints": checkpoints, "version": version}
    plain = {name: value for name, value in (trainer or {}).items() if isinstance(value, bool | int | float | str)}
    changing = repr(sorted((name, value) for name, value in plain.items() if name not in _SHOWN))

    def run(trial, task):
        lightning = _lightning()
        _seed(lightning, trial, 0)
        module = make_module(trial.configuration, task)
        sources = (make_module, make_data, type(module), changing)
        epochs = callback(trial, max_epochs=max_epochs, sources=sources, **kwargs)
        asked = max(1, round(trial.fidelity * max_epochs))
        data = make_data(trial.configuration, task)
        options = dict.fromkeys(_SHOWN, False) | {"num_sanity_val_steps": 0} | dict(trainer or {})
        callbacks = [*options.pop("callbacks", ()), epochs]
        # The checkpoint may be further than requested: if a kill came between the checkpoint and the record, or if the
        # store is new. Then `fit` only reads the checkpoint.
        fitted = lightning.Trainer(max_epochs=max(asked, epochs.num_epochs), callbacks=callbacks, **options)
        _fit(lightning, fitted, module, data, epochs, trial)
        return epochs.outcomes[asked - 1] if len(epochs.outcomes) >= asked else epochs.outcome

    return run


def _fit(lightning: Any, trainer: Any, module: Any, data: Any, epochs: Any, trial: base.Record) -> None:
    """Trains, and removes the checkpoint if training fails."""
    try:
        if isinstance(data, lightning.LightningDataModule):
            trainer.fit(module, datamodule=data, ckpt_path=epochs.checkpoint)
        else:
            trainer.fit(module, *data, ckpt_path=epochs.checkpoint)
    except _trials.Pruned:
        raise
    except Exception as error:
        was_read = epochs.checkpoint is None or epochs.outcomes
        epochs.discard(trainer)
        if was_read:
            raise
        raise ValueError(_unread(trial, error)) from None if isinstance(error, UnpicklingError) else error


def _lightning() -> Any:
    """`lightning.pytorch`, under its installed name."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError(f"This needs PyTorch Lightning: {_extras.hint('lightning')}.")


def _seed(lightning, trial: base.Record, epoch: int, part: int = 0) -> None:
    lightning.seed_everything((trial.seed + 1_000_003 * (2 * epoch + part)) % 2**32, verbose=False)


def _warn_of_other_source(settings: _Settings) -> None:
    file = _source_file(settings)
    if file.is_file() and file.read_text(encoding="utf-8") != settings.source:
        warnings.warn(
            f"The source of the objective has changed since the checkpoint in {file.parent} was saved. Training "
            "continues from this checkpoint; to train from the beginning, pass another `version`.",
            stacklevel=4,
        )


def _source_file(settings: _Settings) -> Path:
    assert settings.folder is not None
    return settings.folder / "source.txt"


def _unread(trial: base.Record, error: Exception) -> str:
    """The error message for an unreadable checkpoint. Torch's own message recommends unsafe reading."""
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, UnpicklingError):
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it holds {unsafe[1] if unsafe else 'something'}, which is neither a tensor nor a plain value and could "
            "run any code when it is read; in `on_save_checkpoint` and `state_dict` of the module, its data and "
            "callbacks, save text or numbers instead"
        )
    return (
        f"Trial {trial.trial} could not continue from its checkpoint ({why}). The checkpoint is removed: run the trial "
        "again (`blackbox.collect` with `retry_failed`) to train it from the beginning."
    )


def _replace_checkpoint(trainer, settings: _Settings, num_epochs: int, before: str | None) -> str:
    folder = settings.folder
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num_epochs:06d}.ckpt"
    temporary = folder / "unfinished"
    trainer.save_checkpoint(str(temporary))  # called by all processes of a distributed training
    if trainer.is_global_zero:
        if before is None:
            _source_file(settings).write_text(settings.source, encoding="utf-8")
        os.replace(temporary, path)
        if before is not None and before != str(path):
            Path(before).unlink(missing_ok=True)
    return str(path)
