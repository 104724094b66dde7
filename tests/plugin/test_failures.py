"""What fails in the automatic form is one line, and the run ends as it would without the package."""

import sys
import warnings

import pytest
import torch

from lightning_stability import GradNormMonitor
from lightning_stability._compat import MisconfigurationException
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
