"""PyTorch Lightning: a module as a black box whose epochs are fidelities, pruned and continued from checkpoints.

Lightning, and torch below it, are imported when a function is called (extra `lightning`).
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

from metaopt import base, tasks
from metaopt.integrations._fingerprint import fingerprint

__all__ = ["ReportFn", "callback", "objective"]


# What a Trainer shows and keeps by itself, which is off here: it changes no outcome.
_SHOWN = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class ReportFn(Protocol):
    """Hears of every epoch; says whether the trial is to be given up."""

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
    """A callback for `lightning.Trainer(callbacks=[...])`: after each epoch e it reports a record of fidelity e/E.

    Where `report` says so, it raises `tasks.Pruned`, which ends `Trainer.fit` and, in `tasks.collect`, makes the trial
    "PRUNED" with the outcome of its last epoch. Where the metric is not finite, training stops, and the trial's
    checkpoint is removed. A checkpoint of the trial is replaced after every epoch, atomically;
    `Trainer.fit(ckpt_path=callback.checkpoint)` continues from it, at a larger fidelity, or after a kill, and it holds
    the outcomes of all epochs. Every epoch begins with seeds that follow from the trial's and the epoch, so that what
    is continued equals what was not interrupted, as far as torch's own operations repeat themselves. It holds no
    hyper-parameters (`save_hyperparameters`), which may be classes, functions or paths: the module is made anew. What
    else is saved, by `on_save_checkpoint` and `state_dict` of the module, its data and other callbacks, must be tensors
    and plain values, for torch reads nothing else safely.

    A checkpoint is of one trial and one objective: its folder is named by the trial's number and a fingerprint of the
    task's name, the configuration, the seed, `monitor`, `mode`, and what can be told of `parts`. Where one of these is
    another one, there is no checkpoint, and training begins anew; the folders of what was before stay. Folders that are
    named by the trial's number alone, as they were before there were fingerprints, are not taken: remove them. What
    cannot be told is what the task and the data hold, what functions call (code elsewhere, and what they read from
    global variables or files), objects, lists and dicts that they enclose, what modules hold beside their parts and
    plain values (such as tensors and functions), and the versions of libraries. Where that changes, give another
    folder, or empty this one. So give each store of records, and each objective, a folder of its own. A plain attribute
    of a module that is another one each time, such as the time of day, lets no checkpoint be found.

    Args:
      trial: what runs: its task, trial number, seed and configuration are those of its records, and name its folder.
      max_epochs: E, the epochs of the full budget.
      monitor: the metric that the module logs once an epoch.
      mode: "min", or "max", whose records hold the negative metric.
      report: `(record) -> bool`, whether to give up; it hears of epochs when they are trained. It may be
        `lambda r: tasks.append_records("curves.db", [r])`, to keep learning curves (what is trained anew is heard of
        anew: give those of each objective a file of their own), or, in an objective of Optuna,
        `lambda r: optuna_trial.report(r.outcome, round(r.fidelity * E)) or optuna_trial.should_prune()`.
      checkpoints: a folder; None keeps no checkpoint.
      parts: what a checkpoint depends on beside the trial: the LightningModule, functions (such as what makes the
        data), plain values and dicts of them.

    Returns:
      A `lightning.pytorch.Callback` with `outcomes`, of each epoch, those before the checkpoint among them once it is
      read; `outcome`, the last one; `num_epochs`, those that this trial has behind it; and `checkpoint`, the path of
      its last checkpoint, or None.

    Raises:
      ValueError: an argument is not valid; in training, the module does not log `monitor`.
      ImportError: Lightning is not installed.
    """
    base.check_integer("max_epochs", max_epochs, 1)
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
        """`integrations.lightning.callback`."""

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

        # The order of an epoch's data is drawn when its iterator is made: of the first one before its callbacks are
        # called, of the others afterwards.
        def setup(self, trainer, pl_module, stage):
            _seed(lightning, trial, self.num_epochs)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch != self.num_epochs or self.begun:
                _seed(lightning, trial, trainer.current_epoch)
            self.begun = True

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                _seed(lightning, trial, trainer.current_epoch, 1)  # dropout and the like

        def on_train_epoch_end(self, trainer, pl_module):
            # Lightning calls it after validation, when the epoch's metrics are all there.
            if monitor not in trainer.callback_metrics:
                raise ValueError(
                    f"The module logs no {monitor!r} in an epoch; it logs {sorted(trainer.callback_metrics)}. Log it "
                    "in `validation_step` with `self.log`, or name another `monitor`."
                )
            value = float(trainer.callback_metrics[monitor])
            self.outcomes = (*self.outcomes, value if mode == "min" else -value)
            self.num_epochs = trainer.current_epoch + 1
            if not math.isfinite(value):
                self.discard(trainer)  # what is corrected begins anew
                trainer.should_stop = True
                return
            if folder is not None:
                self.saves = True
                self.checkpoint = _replace_checkpoint(trainer, folder, self.num_epochs, self.checkpoint)
                self.saves = False
            fidelity = min(self.num_epochs / max_epochs, 1.0)
            record = trial._replace(outcome=self.outcome, fidelity=fidelity, status="COMPLETE")
            if report is not None and report(record) and self.num_epochs < max_epochs:
                raise tasks.Pruned(self.outcome)

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if self.saves:  # and not another callback, for itself
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
) -> tasks.ObjectiveFn:
    """An objective for `tasks.collect`: a LightningModule, trained with a trial's configuration.

    Any PyTorch or Lightning model is a black box to JAX: nothing is differentiated through it. What is learned from its
    records (`methods.train_meta_optimizer`) is JAX, and so is the search with them. A trial at fidelity s trains for
    round(s E) epochs, at least one; with `checkpoints` it goes on where it stood at a smaller fidelity
    (`tasks.collect(resumes=True)` counts it so), so that `methods.asha` and `methods.bohb` pay for each epoch once.
    Where its checkpoint has been further already, the outcome is that of the epoch that is asked for. A trial that
    fails by itself, with an exception or an outcome that is not finite, loses its checkpoint: `tasks.collect` with
    `retry_failed` trains it anew. One that is ended from without, by a limit or a kill, goes on.

    `callback` says what a checkpoint belongs to. Here its `parts` are the module, `make_module`, `make_data`, and the
    plain values of `trainer`: change one of them, and trials are trained anew, and `report` hears of their epochs anew.
    Folders that are named by the trial's number alone, as they were before, are not taken.

    Args:
      make_module: `(configuration, task) -> LightningModule`; torch is seeded with the trial's seed before.
      make_data: `(configuration, task)` -> a LightningDataModule, or the loaders (train, validation).
      max_epochs: E, the epochs of the full budget.
      monitor: as for `callback`.
      mode: as for `callback`.
      report: as for `callback`.
      checkpoints: as for `callback`.
      trainer: arguments of `lightning.Trainer`, such as `{"accelerator": "gpu", "devices": 1}`; by default there is no
        logger, no progress bar and no checkpoint but that of `checkpoints`.

    Returns:
      `(trial, task) -> outcome`, the metric of the last epoch, negative where `mode` is "max".

    Raises:
      ValueError: an argument is not valid; when a trial runs, its checkpoint cannot be continued, and is removed.
      ImportError: when a trial runs, Lightning is not installed.

    A network for handwritten digits, of any width and rate, with every epoch's loss kept and ASHA's budgets:

        import lightning, torch
        from metaopt import integrations, methods, spaces, tasks

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

        objective = integrations.lightning.objective(
            lambda c, task: Digits(c["width"], c["rate"]), lambda c, task: (task.train_loader, task.valid_loader),
            max_epochs=27, checkpoints="checkpoints", report=lambda r: tasks.append_records("curves.db", [r]),
        )
        space = {"width": spaces.integer(8, 256, log=True), "rate": spaces.interval(1e-4, 1e-1, log=True)}
        records = tasks.collect(objective, space, {"digits": loaders}, searcher=methods.asha(), num_trials=20,
                                resumes=True, key=jax.random.key(0), store="records.db")
    """
    base.check_integer("max_epochs", max_epochs, 1)
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
        # It may have been further already: a kill came between the checkpoint and the record, or the store is new.
        # Then `fit` reads the checkpoint, and trains no more.
        trains = lightning.Trainer(max_epochs=max(asked, epochs.num_epochs), callbacks=callbacks, **options)
        try:
            if isinstance(data, lightning.LightningDataModule):
                trains.fit(module, datamodule=data, ckpt_path=epochs.checkpoint)
            else:
                trains.fit(module, *data, ckpt_path=epochs.checkpoint)
        except tasks.Pruned:
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
    """`lightning.pytorch`, under the name that it is installed by."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError('This needs PyTorch Lightning; install it with `pip install "metaopt-jax[lightning]"`.')


def _seed(lightning, trial: base.Record, epoch: int, part: int = 0) -> None:
    lightning.seed_everything((trial.seed + 1_000_003 * (2 * epoch + part)) % 2**32, verbose=False)


def _unread(trial: base.Record, error: Exception) -> str:
    """Why it cannot go on, and what to do. Torch's own text recommends to read what is not safe."""
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
        "again (`tasks.collect` with `retry_failed`), and it is trained anew."
    )


def _replace_checkpoint(trainer, folder: Path, num_epochs: int, before: str | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num_epochs:06d}.ckpt"
    temporary = folder / "unfinished"
    trainer.save_checkpoint(str(temporary))  # by all processes of a distributed training
    if trainer.is_global_zero:
        os.replace(temporary, path)
        if before is not None and before != str(path):
            Path(before).unlink(missing_ok=True)
    return str(path)
