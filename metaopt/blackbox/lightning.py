"""PyTorch Lightning: a module as a black box whose epochs are fidelities, pruned and continued from checkpoints.

Lightning and torch are imported when a function is called (extra `lightning`).
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

from metaopt import _checks, base
from metaopt.blackbox import _trials
from metaopt.blackbox._fingerprint import fingerprint

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
    parts: Sequence[Any] = (),
) -> Any:
    """Makes a callback for `lightning.Trainer(callbacks=[...])`: after epoch e it reports a record of fidelity e/E.

    If `report` returns true, the callback raises `blackbox.Pruned`, which ends `Trainer.fit`. In `blackbox.collect` the trial
    is then "PRUNED", with the outcome of its last epoch. If the metric is not finite, training stops, and the trial's
    checkpoint is removed.

    After every epoch, a new checkpoint atomically replaces the old one. It holds the outcomes of all epochs.
    `Trainer.fit(ckpt_path=callback.checkpoint)` continues from it, at a larger fidelity or after a kill. Every epoch
    begins with seeds that follow from the trial's seed and the epoch. A continued run therefore equals an uninterrupted
    one, as far as torch's own operations are reproducible.

    A checkpoint does not hold hyper-parameters (`save_hyperparameters`), which may be classes, functions or paths: you
    make the module again. Everything else that is saved must be tensors and plain values, because torch can read only
    those safely. This concerns `on_save_checkpoint` and `state_dict` of the module, its data and other callbacks.

    A checkpoint belongs to one trial and one objective. Its folder is named by the trial's number and a fingerprint.
    The fingerprint covers the task's name, the configuration, the seed, `monitor`, `mode`, and the readable content of
    `parts`. If one of these changes, no checkpoint is found, and training starts from the beginning; the old folders
    stay. Folders from before there were fingerprints are named only by the trial's number. They are not used: remove
    them.

    The fingerprint does not cover:

    - the content of the task and the data;
    - what functions call: code elsewhere, and values that they read from global variables or files;
    - objects, lists and dicts that functions enclose;
    - what modules hold besides their parts and plain values, such as tensors and functions;
    - the versions of libraries.

    If any of these changes, use another folder, or empty this one. Thus give each store of records, and each objective,
    its own folder. If a plain attribute of a module differs each time, such as the time of day, no checkpoint is ever
    found.

    Args:
      trial: the running trial. Its records have its task, trial number, seed and configuration, and its folder is named
        by them.
      max_epochs: E, the epochs of the full budget.
      monitor: the metric that the module logs once per epoch.
      mode: "min", or "max", for which the records hold the negative metric.
      report: `(record) -> bool`, whether to stop the trial early. It is called for epochs when they are trained. To
        keep learning curves, use `lambda r: blackbox.append_records("curves.db", [r])`. Epochs that are trained again are
        reported again; therefore use a separate file for each objective. In an Optuna objective, use
        `lambda r: optuna_trial.report(r.outcome, round(r.fidelity * E)) or optuna_trial.should_prune()`.
      checkpoints: a folder; None keeps no checkpoint.
      parts: further things on which a checkpoint depends: the LightningModule, functions (such as the function that
        makes the data), plain values and dicts of them.

    Returns:
      A `lightning.pytorch.Callback` with four attributes. `outcomes` has the outcome of each epoch; it includes the
      epochs before the checkpoint once that is read. `outcome` is the last one. `num_epochs` is the number of epochs
      that this trial has completed. `checkpoint` is the path of its last checkpoint, or None.

    Raises:
      ValueError: if an argument is invalid; in training, if the module does not log `monitor`.
      ImportError: if Lightning is not installed.
    """
    _checks.check_integer("max_epochs", max_epochs, 1)
    if mode not in ("min", "max"):
        raise ValueError(f"`mode` must be 'min' or 'max'; got {mode!r}.")
    lightning = _lightning()
    folder = None
    if checkpoints is not None:
        configuration = repr(sorted(trial.configuration.items()))
        of = fingerprint(trial.task, configuration, trial.seed, monitor, mode, *parts)
        folder = Path(checkpoints) / f"{trial.trial:06d}-{of}"
    found = sorted(folder.glob("*.ckpt")) if folder is not None else []

    class Epochs(lightning.Callback):
        """`blackbox.lightning.callback`."""

        checkpoint = str(found[-1]) if found else None
        num_epochs = int(found[-1].stem) if found else 0
        outcomes: tuple[float, ...] = ()
        state_key = "metaopt"
        begun = saves = False

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
            _seed(lightning, trial, self.num_epochs)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch != self.num_epochs or self.begun:
                _seed(lightning, trial, trainer.current_epoch)
            self.begun = True

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                _seed(lightning, trial, trainer.current_epoch, 1)  # for dropout and similar operations

        def on_train_epoch_end(self, trainer, pl_module):
            # Lightning calls this after validation, when all metrics of the epoch are available.
            if monitor not in trainer.callback_metrics:
                raise ValueError(
                    f"The module logs no {monitor!r} in an epoch; it logs {sorted(trainer.callback_metrics)}. Log it "
                    "in `validation_step` with `self.log`, or name another `monitor`."
                )
            value = float(trainer.callback_metrics[monitor])
            self.outcomes = (*self.outcomes, value if mode == "min" else -value)
            self.num_epochs = trainer.current_epoch + 1
            if not math.isfinite(value):
                self.discard(trainer)  # a corrected trial starts from the beginning
                trainer.should_stop = True
                return
            if folder is not None:
                self.saves = True
                self.checkpoint = _replace_checkpoint(trainer, folder, self.num_epochs, self.checkpoint)
                self.saves = False
            fidelity = min(self.num_epochs / max_epochs, 1.0)
            record = trial._replace(outcome=self.outcome, fidelity=fidelity, status="COMPLETE")
            if report is not None and report(record) and self.num_epochs < max_epochs:
                raise _trials.Pruned(self.outcome)

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if self.saves:  # not if another callback saves
                for name in ("hyper_parameters", "hparams_type"):
                    checkpoint.pop(name, None)
                    checkpoint.pop(f"datamodule_{name}", None)

        def discard(self, trainer):
            """Removes the checkpoint."""
            if self.checkpoint is not None and trainer.is_global_zero:
                Path(self.checkpoint).unlink(missing_ok=True)
            self.checkpoint = None

    return Epochs()


def objective(
    make_module: Callable[[dict[str, Any], Any], Any],
    make_data: Callable[[dict[str, Any], Any], Any],
    *,
    max_epochs: int,
    monitor: str = "val_loss",
    mode: str = "min",
    report: ReportFn | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> _trials.ObjectiveFn:
    """Makes an objective for `blackbox.collect`: it trains a LightningModule with a trial's configuration.

    Any PyTorch or Lightning model is a black box to JAX: nothing is differentiated through it. Learning from its
    records (`blackbox.train_meta_optimizer`) uses JAX, and so does a search with the result.

    A trial at fidelity s trains for round(s E) epochs, at least one. With `checkpoints`, it continues from its state at
    a smaller fidelity (`blackbox.collect(resumes=True)` counts its cost accordingly). `blackbox.asha` and `blackbox.bohb`
    then pay for each epoch once. If its checkpoint is already further, the outcome is that of the requested epoch.

    If a trial itself fails, by an exception or a non-finite outcome, its checkpoint is removed. `blackbox.collect` with
    `retry_failed` then trains it from the beginning. A trial that was ended from outside, by a limit or a kill,
    continues.

    The docstring of `callback` explains when a checkpoint is used. Here `parts` are the module, `make_module`,
    `make_data`, and the plain values of `trainer`. If one of them changes, trials are trained again, and `report`
    receives their epochs again. Old folders that are named only by the trial's number are not used.

    Args:
      make_module: `(configuration, task) -> LightningModule`. Before the call, torch is seeded with the trial's seed.
      make_data: `(configuration, task)` -> a LightningDataModule, or the loaders (train, validation).
      max_epochs: E, the epochs of the full budget.
      monitor: as for `callback`.
      mode: as for `callback`.
      report: as for `callback`.
      checkpoints: as for `callback`.
      trainer: arguments of `lightning.Trainer`, such as `{"accelerator": "gpu", "devices": 1}`. By default there is no
        logger, no progress bar and no model summary, and the only checkpoint is the one in `checkpoints`.

    Returns:
      `(trial, task) -> outcome`, the metric of the last epoch, or minus the metric if `mode` is "max".

    Raises:
      ValueError: if an argument is invalid; when a trial runs, if its checkpoint cannot be continued. The checkpoint is
        then removed.
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
    _checks.check_integer("max_epochs", max_epochs, 1)
    kwargs = {"monitor": monitor, "mode": mode, "report": report, "checkpoints": checkpoints}

    def run(trial, task):
        lightning = _lightning()
        _seed(lightning, trial, 0)
        module = make_module(trial.configuration, task)
        changed = {name: value for name, value in (trainer or {}).items() if name not in _SHOWN}
        parts = module, make_module, make_data, changed
        epochs = callback(trial, max_epochs=max_epochs, parts=parts, **kwargs)
        asked = max(1, round(trial.fidelity * max_epochs))
        data = make_data(trial.configuration, task)
        options = dict.fromkeys(_SHOWN, False) | {"num_sanity_val_steps": 0} | dict(trainer or {})
        callbacks = [*options.pop("callbacks", ()), epochs]
        # The checkpoint may be further than requested: if a kill came between the checkpoint and the record, or if the
        # store is new. Then `fit` only reads the checkpoint.
        trains = lightning.Trainer(max_epochs=max(asked, epochs.num_epochs), callbacks=callbacks, **options)
        try:
            if isinstance(data, lightning.LightningDataModule):
                trains.fit(module, datamodule=data, ckpt_path=epochs.checkpoint)
            else:
                trains.fit(module, *data, ckpt_path=epochs.checkpoint)
        except _trials.Pruned:
            raise
        except Exception as error:
            read = epochs.checkpoint is None or epochs.outcomes
            epochs.discard(trains)
            if read:
                raise
            raise ValueError(_unread(trial, error)) from None if isinstance(error, UnpicklingError) else error
        return epochs.outcomes[asked - 1] if len(epochs.outcomes) >= asked else epochs.outcome

    return run


def _lightning() -> Any:
    """`lightning.pytorch`, under its installed name."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError('This needs PyTorch Lightning; install it with `pip install "metaopt-jax[lightning]"`.')


def _seed(lightning, trial: base.Record, epoch: int, part: int = 0) -> None:
    lightning.seed_everything((trial.seed + 1_000_003 * (2 * epoch + part)) % 2**32, verbose=False)


def _unread(trial: base.Record, error: Exception) -> str:
    """The error message for an unreadable checkpoint. Torch's own message recommends unsafe reading."""
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it holds {found[1] if found else 'something'}, which is neither a tensor nor a plain value and could "
            "run any code when it is read; in `on_save_checkpoint` and `state_dict` of the module, its data and "
            "callbacks, save text or numbers instead"
        )
    return (
        f"Trial {trial.trial} did not go on from its checkpoint ({why}). The checkpoint is removed: run the trial "
        "again (`blackbox.collect` with `retry_failed`), and it is trained anew."
    )


def _replace_checkpoint(trainer, folder: Path, num_epochs: int, before: str | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num_epochs:06d}.ckpt"
    temporary = folder / "unfinished"
    trainer.save_checkpoint(str(temporary))  # called by all processes of a distributed training
    if trainer.is_global_zero:
        os.replace(temporary, path)
        if before is not None and before != str(path):
            Path(before).unlink(missing_ok=True)
    return str(path)
