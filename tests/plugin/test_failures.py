"""What fails in the automatic form is one line, and the run ends as it would without the package."""

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_stability import GradNormMonitor, InputCheck
from lightning_stability._compat import MisconfigurationException
from lightning_stability.checkpointing.finite import FiniteCheck
from lightning_stability.checkpointing.loaders import TrainingData
from lightning_stability.notices import warn
from lightning_stability.plugin import AutomaticCallbacks
from tests import runs

VARIABLE = "LIGHTNING_STABILITY_CALLBACKS"


@pytest.fixture
def train(pl, monkeypatch, tmp_path):
    """Trains in an environment that has the entry point, as an editable install does."""

    def train(automatic="", callbacks=()):
        monkeypatch.setenv(VARIABLE, automatic)
        module = runs.make_module(pl)
        logger = pl.loggers.CSVLogger(tmp_path)
        trainer = runs.trainer(pl, callbacks=[pl.Callback(), *callbacks], logger=logger, max_steps=3)
        found = [type(callback).__name__ for callback in trainer.callbacks]
        assert ("AutomaticCallbacks" in found) == (automatic != "none")
        trainer.fit(module, runs.data())
        assert is_as_made(trainer)
        return module.net.head.weight.detach().clone()

    return train


def is_as_made(trainer):
    ours = [c for c in trainer.callbacks if type(c).__module__.startswith("lightning_stability.")]
    return not ours and "optimizer_step" not in vars(trainer.precision_plugin)


def said(recorded):
    return [str(one.message) for one in recorded if "lightning-stability" in str(one.message)]


class Finder:
    """Cannot find `lightning_stability.plugin`."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "lightning_stability.plugin":
            raise self.error


def fails_after(original):
    def fail(*args, **kwargs):
        original(*args, **kwargs)
        raise RuntimeError("on purpose")

    return fail


@pytest.mark.parametrize("error", [ImportError("broken"), OSError("broken"), SystemError("broken")], ids=repr)
def test_a_package_that_cannot_be_imported_is_one_line(train, monkeypatch, error, recwarn):
    bare = train("none")
    monkeypatch.delitem(sys.modules, "lightning_stability.plugin")
    monkeypatch.setattr(sys, "meta_path", [Finder(error), *sys.meta_path])
    assert torch.equal(train(), bare)
    assert said(recwarn) == [f"lightning-stability disables itself in this run: {type(error).__name__}: broken"]


@pytest.mark.parametrize("method", ["join", "introduce", "leave"])
def test_a_failure_of_what_brings_the_callbacks_is_one_line(train, monkeypatch, method, recwarn):
    bare = train("none")
    monkeypatch.setattr(AutomaticCallbacks, method, fails_after(getattr(AutomaticCallbacks, method)))
    assert torch.equal(train("NaNEarlyStop,GradNormMonitor"), bare)
    assert said(recwarn) == ["lightning-stability disables itself in this run: RuntimeError: on purpose"]


def test_a_callback_that_fails_in_setup_leaves_the_others_at_work(train, monkeypatch, recwarn, caplog):
    bare = train("none")
    monkeypatch.setattr(GradNormMonitor, "setup", fails_after(GradNormMonitor.setup))
    with caplog.at_level("INFO"):
        assert torch.equal(train(), bare)
    [line] = said(recwarn)
    assert "GradNormMonitor" in line
    assert line.endswith("in this run: on purpose")
    assert "lightning-stability: NaNEarlyStop is active" in caplog.text


def test_warnings_that_are_errors_do_not_make_ours_one(train, monkeypatch, caplog):
    bare = train("none")
    monkeypatch.setattr(GradNormMonitor, "setup", fails_after(GradNormMonitor.setup))
    monkeypatch.setattr(AutomaticCallbacks, "leave", fails_after(AutomaticCallbacks.leave))
    with warnings.catch_warnings(record=True) as recorded, caplog.at_level("INFO"):
        warnings.filterwarnings("error", message="lightning-stability")
        assert torch.equal(train(), bare)
    assert said(recorded) == ["lightning-stability: GradNormMonitor disables itself in this run: on purpose"]
    assert "in this run: RuntimeError: on purpose" in caplog.text


def test_advice_that_is_made_an_error_disables_nothing(train, monkeypatch, caplog):
    bare, original = train("none"), GradNormMonitor.on_record

    def advise(self, record):
        original(self, record)
        warn("GradNormMonitor: the gradient norm is rising.")

    monkeypatch.setattr(GradNormMonitor, "on_record", advise)
    with warnings.catch_warnings(record=True) as recorded, caplog.at_level("INFO"):
        warnings.filterwarnings("error", message="GradNormMonitor")
        assert torch.equal(train("GradNormMonitor"), bare)
    assert said(recorded) == []
    assert caplog.text.count("is rising") == 3


@pytest.mark.parametrize("value", ["Nonsense", "NaNEarlyStop(", "NaNEarlyStop(patience=-1)"])
def test_an_error_in_the_variable_stays_an_error(train, value):
    with pytest.raises(MisconfigurationException, match=f"{VARIABLE}: .*{value[:8]}"):
        train(value)
    train()


def test_a_fit_that_failed_in_on_exception_leaves_nothing_in_the_next(pl, monkeypatch):
    class Fails(pl.Callback):
        def on_train_batch_end(self, *args):
            raise ValueError("the user's own")

        def on_exception(self, *args):
            raise KeyError("and again")

    monkeypatch.setenv(VARIABLE, "NaNEarlyStop")
    fails = Fails()
    trainer = runs.trainer(pl, callbacks=[fails], max_steps=2)
    with pytest.raises(KeyError):
        trainer.fit(runs.make_module(pl), runs.data())
    trainer.callbacks.remove(fails)
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(runs.make_module(pl), runs.data())
    assert is_as_made(trainer)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(runs.data())


def fit_saving(pl, folder, data=None, **options):
    options = {"logger": False, "enable_checkpointing": True, "default_root_dir": folder, **options}
    trainer = runs.trainer(pl, **options)
    module = runs.make_module(pl)
    trainer.fit(module, runs.data() if data is None else data)
    assert is_as_made(trainer)
    assert not [
        name for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop) for name in vars(loop) if "adv" in name
    ]
    return module.net.head.weight.detach().clone()


def test_data_without_a_length_disables_the_automatic_checkpoint_in_words(pl, monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv(VARIABLE, "FractionalCheckpoint")
    fit_saving(pl, tmp_path, DataLoader(Stream(), batch_size=None), max_steps=3)
    [line] = said(recwarn)
    assert line.startswith("lightning-stability: FractionalCheckpoint disables itself in this run: Fractional")
    assert "has to know how long an epoch is" in line


@pytest.mark.parametrize("part", [(TrainingData, "before_fetch"), (FiniteCheck, "after_first_batch")])
def test_a_failure_at_a_save_point_disables_what_saves_there(pl, monkeypatch, tmp_path, recwarn, part):
    monkeypatch.setenv(VARIABLE, "none")
    bare = fit_saving(pl, tmp_path / "bare")
    monkeypatch.setenv(VARIABLE, "FractionalCheckpoint,NaNEarlyStop")
    monkeypatch.setattr(*part, fails_after(getattr(*part)))
    assert torch.equal(fit_saving(pl, tmp_path / "ours"), bare)
    [line] = said(recwarn)
    assert "FractionalCheckpoint disables itself in this run: RuntimeError('on purpose')" in line


def test_sparse_gradients_that_lightning_does_not_clip_are_not_clipped(pl, monkeypatch, tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.words(x[:, 0].abs().long() % 5))

    for value in ("none", "NaNEarlyStop,GradNormMonitor"):
        monkeypatch.setenv(VARIABLE, value)
        module = runs.make_module(pl, Words(), lambda self: torch.optim.SGD(self.parameters(), 0.1))
        trainer = runs.trainer(pl, gradient_clip_val=0.1, default_root_dir=tmp_path)
        with pytest.raises(NotImplementedError, match="Sparse"):
            trainer.fit(module, runs.data())


@pytest.mark.parametrize("fails", [False, True])
def test_a_callback_that_fails_inside_a_window_leaves_the_retry_of_another_whole(pl, monkeypatch, tmp_path, fails):
    original = InputCheck.on_before_backward

    def on_before_backward(self, trainer, *args):
        original(self, trainer, *args)
        if fails and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 3:  # of the window of batches 2 and 3
            raise RuntimeError("on purpose")

    weights = []
    for names in ("PrecisionFallback", "PrecisionFallback,InputCheck"):
        monkeypatch.setattr(InputCheck, "on_before_backward", on_before_backward)
        monkeypatch.setenv(VARIABLE, names)
        data = runs.data(16)
        data.dataset.tensors[0][6] *= 1e6
        module = runs.make_module(pl)
        plugins = runs.fp16(pl, init_scale=256.0)
        trainer = runs.trainer(pl, plugins=plugins, accumulate_grad_batches=2, default_root_dir=tmp_path)
        trainer.fit(module, data)
        assert str(trainer.precision) == "32-true"
        weights.append(module.net.head.weight.detach().clone())
    assert torch.equal(*weights)
