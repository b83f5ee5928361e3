"""Lightning's epochs as fidelities: by a stub of what is called of it, and, where it is installed, by itself."""

import functools
import importlib.util
import json
import math
import sys
import traceback
import types
from pathlib import Path
from pickle import UnpicklingError

import jax
import pytest

from metaopt import blackbox, spaces
from metaopt.base import Record
from metaopt.blackbox import lightning

SPACE = {"width": spaces.integer(4, 32, log=True), "rate": spaces.interval(1e-4, 1e-1, log=True)}
real = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")


class StubTrainer:
    """What `Trainer.fit` does with callbacks and checkpoints, and no more."""

    is_global_zero = True

    def __init__(self, *, max_epochs, callbacks, **options):
        self.max_epochs, self.callbacks, self.options = max_epochs, callbacks, options
        self.callback_metrics, self.should_stop, self.current_epoch = {}, False, 0

    def dump_checkpoint(self):
        checkpoint = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        checkpoint |= {"epoch": self.current_epoch + 1, "theta": self.module.theta}
        checkpoint |= {"hyper_parameters": {"act": abs}, "hparams_type": dict}
        checkpoint |= {"datamodule_hyper_parameters": {"folder": Path("a")}}
        for callback in self.callbacks:
            callback.on_save_checkpoint(self, self.module, checkpoint)
        return checkpoint

    def save_checkpoint(self, path):
        Path(path).write_text(json.dumps(self.dump_checkpoint()))

    def fit(self, module, train, valid, ckpt_path=None):
        self.module = module
        if ckpt_path is not None:
            state = module.read(Path(ckpt_path))
            self.current_epoch, module.theta = state["epoch"], state["theta"]
            for callback in self.callbacks:
                callback.load_state_dict(state[callback.state_key])
        for callback in self.callbacks:
            callback.setup(self, module, "fit")
        while self.current_epoch < self.max_epochs and not self.should_stop:
            for callback in self.callbacks:
                callback.on_train_epoch_start(self, module)
            for callback in self.callbacks:
                callback.on_train_batch_start(self, module, None, 0)
            module.theta = module.step(module.theta)
            self.callback_metrics = {module.logs: module.theta}
            for callback in self.callbacks:
                callback.on_train_epoch_end(self, module)
            assert "hyper_parameters" in self.dump_checkpoint()  # those of others have them
            self.current_epoch += 1


class Halving:
    logs = "val_loss"

    def __init__(self, rate):
        self.theta, self.rate, self.steps = 1.0, rate, 0

    def step(self, theta):
        self.steps += 1
        return theta * (1 - self.rate)

    def read(self, checkpoint):
        return json.loads(checkpoint.read_text())


@pytest.fixture
def stub(monkeypatch):
    """Replaces Lightning by a stub; returns the list of seeds that were set."""
    module: object = types.ModuleType("lightning.pytorch")
    seeds = []
    module.Callback, module.Trainer = type("Callback", (), {}), StubTrainer
    module.LightningDataModule = type("LightningDataModule", (), {})
    module.seed_everything = lambda seed, verbose: seeds.append(seed)
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    return seeds


def make(modules, **kwargs):
    def module(configuration, task):
        modules.append(Halving(configuration["rate"]))
        return modules[-1]

    return lightning.objective(module, lambda configuration, task: ((), ()), max_epochs=8, **kwargs)


TRIAL = Record("t", {"rate": 0.5}, fidelity=0.5, seed=7, status="WAITING", trial=3)


def test_every_epoch_is_a_record_and_the_last_is_the_outcome(stub):
    modules, reports = [], []
    assert make(modules, report=reports.append)(TRIAL, None) == 1 / 16
    assert [record.fidelity for record in reports] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert [record.outcome for record in reports] == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    assert all(record[:2] == TRIAL[:2] and (record.seed, record.trial) == (7, 3) for record in reports)
    assert len(set(stub)) == 8 and stub[0] == stub[1] == 7  # the module's, the first epoch's, two for each
    assert make(modules, mode="max")(TRIAL, None) == -1 / 16


def test_a_stopped_trial_is_pruned_with_its_last_outcome(stub):
    modules = []
    records = blackbox.collect(
        make(modules, report=lambda record: record.outcome > 0.3),
        {"rate": spaces.interval(0.1, 0.9)},
        {"t": None},
        num_trials=2,
        key=jax.random.key(0),
        searcher=blackbox.random_search(first=[{"rate": 0.1}, {"rate": 0.8}]),
        isolated=False,
    )
    assert [record.status for record in records] == ["PRUNED", "COMPLETE"]
    assert records[0].outcome == pytest.approx(0.9) and modules[0].steps == 1
    assert records[1].outcome == pytest.approx(0.2**8)


def test_a_larger_fidelity_continues_from_the_checkpoint_to_the_same_outcome(stub, tmp_path):
    modules = []
    objective = make(modules, checkpoints=tmp_path)
    whole = make([])(TRIAL._replace(fidelity=1.0), None)
    of_whole = stub[1:]
    stub.clear()
    assert objective(TRIAL, None) == 1 / 16 and modules[0].steps == 4
    seeds = stub[1:]
    stub.clear()
    assert objective(TRIAL._replace(fidelity=1.0), None) == whole == 1 / 256 and modules[1].steps == 4
    assert seeds + stub[1:] == of_whole  # each epoch's own, wherever training was cut
    assert objective(TRIAL._replace(fidelity=1.0), None) == whole and modules[2].steps == 0
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["000008.ckpt", "source.txt"]  # nothing unfinished
    other = TRIAL._replace(configuration={"rate": 0.25})
    assert objective(other, None) == 0.75**4 and modules[3].steps == 4  # another trial's checkpoint is not its own


def test_under_asha_each_epoch_is_trained_once(stub, tmp_path):
    modules = []
    searcher = blackbox.asha(reduction_factor=2, num_rungs=4)
    records = blackbox.collect(
        make(modules, checkpoints=tmp_path),
        {"rate": spaces.interval(0.1, 0.9)},
        {"t": None},
        num_trials=4,
        key=jax.random.key(0),
        searcher=searcher,
        resumes=True,
        isolated=False,
    )
    assert {record.fidelity for record in records} == {1 / 8, 1 / 4, 1 / 2, 1.0}
    assert sum(module.steps for module in modules) == 32
    for record in records:
        assert record.outcome == pytest.approx((1 - record.configuration["rate"]) ** round(8 * record.fidelity))


HALVINGS = {"rate": spaces.interval(0.1, 0.9)}


def collect(objective, **kwargs):
    kwargs = {"num_trials": 4, "key": jax.random.key(0), "isolated": False} | kwargs
    return blackbox.collect(objective, HALVINGS, {"t": None}, **kwargs)


def test_a_new_store_over_old_checkpoints_has_each_fidelity_s_own_outcome(stub, tmp_path):
    modules, collections = [], []
    for i in range(2):
        searcher = blackbox.asha(reduction_factor=2, num_rungs=4)
        kwargs = {"searcher": searcher, "resumes": True, "store": tmp_path / f"{i}.db"}
        collections.append(collect(make(modules, checkpoints=tmp_path / "checkpoints"), **kwargs))
    assert sum(module.steps for module in modules) == 32  # only the first collection trained
    assert [record._replace(cost=0.0) for record in collections[0]] == [
        record._replace(cost=0.0) for record in collections[1]
    ]
    for record in collections[1]:
        assert record.outcome == pytest.approx((1 - record.configuration["rate"]) ** round(8 * record.fidelity))


def test_a_checkpoint_belongs_to_one_trial_and_one_version(stub, tmp_path):
    modules = []
    first = make(modules, checkpoints=tmp_path)
    assert first(TRIAL, None) == first(TRIAL, None) == 1 / 16
    assert make(modules, checkpoints=tmp_path, trainer={"enable_progress_bar": True})(TRIAL, None) == 1 / 16
    assert [module.steps for module in modules] == [4, 0, 0]  # the display changes nothing
    modules.clear()
    for options in ({"version": "2"}, {"mode": "max"}):
        other = make(modules, checkpoints=tmp_path, **options)
        assert other(TRIAL, None) == other(TRIAL, None) == (-1 / 16 if "mode" in options else 1 / 16)
    for trial in (TRIAL._replace(seed=8), TRIAL._replace(task="u"), TRIAL._replace(configuration={"rate": 0.25})):
        first(trial, None)
    assert [module.steps for module in modules] == [4, 0, 4, 0, 4, 4, 4]


class Growing(Halving):
    def step(self, theta):
        self.steps += 1
        return theta * (1 + self.rate)


def test_a_changed_source_gives_a_warning_and_another_version_starts_again(stub, tmp_path):
    data = lambda configuration, task: ((), ())

    def objective(cls, **kwargs):
        return lightning.objective(
            lambda configuration, task: cls(configuration["rate"]), data, max_epochs=8, checkpoints=tmp_path, **kwargs
        )

    assert objective(Halving)(TRIAL, None) == objective(Halving)(TRIAL, None) == 1 / 16
    for changed in (objective(Growing), objective(Halving, trainer={"precision": 16})):
        with pytest.warns(UserWarning, match=r"source of the objective has changed .*000003-.* another `version`"):
            assert changed(TRIAL, None) == 1 / 16  # the outcome in the checkpoint
    assert objective(Growing, version="growing")(TRIAL, None) == 1.5**4
    # Objects without source text are skipped.
    kwargs = {"max_epochs": 8, "checkpoints": tmp_path}
    callback = lightning.callback(TRIAL, version="other", sources=[functools.partial(data), len], **kwargs)
    assert callback.checkpoint is None


@pytest.mark.parametrize("raises", [False, True])
def test_a_failed_trial_is_trained_again_after_a_correction(raises, stub, tmp_path):
    wrong = [True]  # not part of the source text

    class Corrected(Halving):
        def step(self, theta):
            if wrong and raises and self.steps == 3:
                raise RuntimeError("no memory")
            bad = wrong and self.steps == 3
            return math.nan if bad else (0.9 if wrong else 1.0) * super().step(theta)

    objective = lightning.objective(
        lambda c, task: Corrected(c["rate"]), lambda c, task: ((), ()), max_epochs=8, checkpoints=tmp_path
    )
    kwargs = {"num_trials": 2, "store": tmp_path / "r.db"}
    assert {record.status for record in collect(objective, **kwargs)} == {"FAIL"}
    assert not list(tmp_path.glob("*/*.ckpt"))
    wrong.clear()
    for record in collect(objective, retry_failed=True, **kwargs):
        assert record.outcome == pytest.approx((1 - record.configuration["rate"]) ** 8)


TORCH_SAYS = """Weights only load failed. This file can still be loaded: set `weights_only` to `False`.
WeightsUnpickler error: Unsupported global: GLOBAL pathlib.PosixPath was not an allowed global by default."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UnpicklingError(TORCH_SAYS), r"holds pathlib\.PosixPath, which .* save text or numbers instead"),
        (EOFError("Ran out of input"), "EOFError: Ran out of input"),
    ],
)
def test_a_checkpoint_that_is_not_read_says_what_to_do(error, message, stub, tmp_path):
    class Unread(Halving):
        def read(self, checkpoint):
            raise error

    objective = lightning.objective(
        lambda c, task: Unread(c["rate"]), lambda c, task: ((), ()), max_epochs=8, checkpoints=tmp_path
    )
    objective(TRIAL, None)
    with pytest.raises(
        ValueError, match=rf"Trial 3 could not continue .*{message}.*retry_failed.* from the beginning"
    ) as raised:
        objective(TRIAL, None)
    assert "weights_only" not in "".join(traceback.format_exception(raised.value))
    assert objective(TRIAL, None) == 1 / 16


def test_a_loss_of_nan_is_a_failure_and_errors_name_the_cause(stub, monkeypatch):
    objective = make([])
    assert math.isnan(objective(TRIAL._replace(configuration={"rate": math.nan}), None))
    monkeypatch.setattr(Halving, "logs", "loss")
    with pytest.raises(ValueError, match=r"logs no 'val_loss' in an epoch; it logs \['loss'\]"):
        objective(TRIAL, None)
    with pytest.raises(ValueError, match="`mode` must be 'min' or 'max'; got 'least'"):
        lightning.callback(TRIAL, max_epochs=3, mode="least")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"metaopt-jax\[lightning\]"):
        lightning.callback(TRIAL, max_epochs=3)


# ---- By itself ------------------------------------------------------------------------------------------------------


def digits_module(configuration, task):
    import lightning as L
    import torch

    class Digits(L.LightningModule):
        def __init__(self, width, rate, act=torch.nn.ReLU):
            super().__init__()
            self.save_hyperparameters()  # a class among them
            self.rate = rate
            hidden = torch.nn.Linear(64, width), act(), torch.nn.Dropout(0.2)
            self.net = torch.nn.Sequential(*hidden, torch.nn.Linear(width, 10))

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), self.rate)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Digits(configuration["width"], configuration["rate"])


def digits_data(configuration, task):
    import torch
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    train, valid = torch.utils.data.Subset(data, range(600)), torch.utils.data.Subset(data, range(600, 900))
    return (
        torch.utils.data.DataLoader(train, batch_size=50, shuffle=True),
        torch.utils.data.DataLoader(valid, batch_size=300),
    )


CPU = {"accelerator": "cpu", "devices": 1}


@real
@pytest.mark.filterwarnings("ignore")
def test_digits_continued_from_checkpoints_equal_digits_in_one_go(tmp_path):
    trial = Record("digits", {"width": 32, "rate": 1e-2}, seed=5, status="WAITING", trial=0)
    reports = []
    whole = lightning.objective(digits_module, digits_data, max_epochs=6, trainer=CPU, report=reports.append)
    parts = lightning.objective(digits_module, digits_data, max_epochs=6, trainer=CPU, checkpoints=tmp_path)
    expected = whole(trial, None)
    assert [round(6 * record.fidelity) for record in reports] == [1, 2, 3, 4, 5, 6]
    assert expected < reports[0].outcome < 2.4
    assert parts(trial._replace(fidelity=1 / 3), None) == reports[1].outcome
    assert parts(trial._replace(fidelity=1 / 2), None) == reports[2].outcome
    assert parts(trial, None) == expected == parts(trial, None)
    assert whole(trial._replace(seed=6), None) != expected


@real
@pytest.mark.filterwarnings("ignore")
def test_objects_that_torch_does_not_load_safely_are_named(tmp_path):
    def module(configuration, task):
        module = digits_module(configuration, task)
        module.on_save_checkpoint = lambda checkpoint: checkpoint.update(folder=Path("a"))
        return module

    trial = Record("digits", {"width": 4, "rate": 1e-2}, fidelity=0.5, seed=5, status="WAITING", trial=3)
    objective = lightning.objective(module, digits_data, max_epochs=2, trainer=CPU, checkpoints=tmp_path)
    first = objective(trial, None)
    with pytest.raises(
        ValueError, match=r"Trial 3 could not continue .*it holds pathlib\S*\.PosixPath, which"
    ) as raised:
        objective(trial._replace(fidelity=1.0), None)
    assert "weights_only" not in "".join(traceback.format_exception(raised.value))
    assert objective(trial, None) == first


@real
@pytest.mark.filterwarnings("ignore")
def test_digits_are_collected_with_pruning(tmp_path):
    outcomes = {}

    def worse_than_the_median(record):
        """Optuna's median rule, by hand."""
        others = outcomes.setdefault(record.fidelity, [])
        others.append(record.outcome)
        return record.outcome > sorted(others)[len(others) // 2]

    objective = lightning.objective(
        digits_module, digits_data, max_epochs=4, trainer=CPU, report=worse_than_the_median, checkpoints=tmp_path
    )
    first = [{"width": 32, "rate": 1e-2}, {"width": 32, "rate": 2e-2}, {"width": 4, "rate": 1e-4}]
    searcher = blackbox.random_search(first=first)
    records = blackbox.collect(
        objective, SPACE, {"digits": None}, num_trials=3, key=jax.random.key(0), searcher=searcher, isolated=False
    )
    assert [record.status for record in records] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert records[0].outcome < 0.8 and records[2].outcome > 2.0
