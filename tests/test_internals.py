"""Private names of Lightning and torch are where `internals.py` looks for them."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_stability.internals import Overrides, logger_prefix


class Thing:
    def act(self):
        return "own"


def test_overrides_restore_in_reverse_order():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "first")
    overrides.set(thing, "act", lambda: "second")
    assert thing.act() == "second"
    overrides.restore()
    assert thing.act() == "own"
    assert vars(thing) == {}


def test_overrides_leave_what_somebody_set_over_them():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "ours")
    thing.act = lambda: "theirs"
    overrides.restore()
    assert thing.act() == "theirs"


# --- The training loop ---


# --- Precision plugins and optimizers ---


# --- Loggers ---


@pytest.mark.parametrize("prefix", ["", "run"])
def test_a_loggers_prefix_is_that_of_its_keys(pl, tmp_path, prefix):
    logger = pl.loggers.TensorBoardLogger(tmp_path, prefix=prefix)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["scalars"] == [f"{logger_prefix(logger)}loss"]


# --- Checkpoints, loop progress and data loaders ---


# --- Modules, metrics and tensors ---


# --- Autograd and dispatch, for diagnosis ---
