"""Private names of Lightning and torch are where `internals.py` looks for them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability import internals
from lightning_stability.internals import Overrides
from tests import runs


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


# --- Checkpoints, loop progress and data loaders ---


def boring_model(library: Any) -> Any:
    return importlib.import_module(f"{library.__name__}.demos.boring_classes").BoringModel()


def boring() -> Any:
    return StatefulDataLoader([torch.zeros(32)] * 8, 2)


def in_second_epoch(library: Any, check: Any) -> Any:
    """What a check returns in the second epoch of a fit."""
    done = []

    class Check(library.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.current_epoch == 1 and not done:
                done.append(check(trainer))

    trainer = runs.trainer(library, max_epochs=2, limit_val_batches=0, callbacks=[Check()])
    trainer.fit(boring_model(library), boring())
    return done[0]


def test_loaders_and_their_fetcher_are_found(pl: Any) -> None:
    def check(trainer: Any) -> Any:
        combined = internals.combined_loader(trainer)
        states = internals.loader_states(trainer)
        assert len(states) == 1
        internals.load_loader_states(trainer, states)
        assert internals.consumed(trainer) == [False]
        internals.set_consumed(trainer, [False])
        assert not internals.loaders_are_due(trainer)
        assert internals.epoch_of_loaders(trainer) == 0
        internals.load_loaders_of_epoch(trainer, 0)
        internals.set_sampler_epoch(combined.flattened[0], 1)
        assert internals.data_fetcher(trainer).fetched >= 1
        return len(combined.flattened), len(internals.iterators(combined)), internals.validation_loader(trainer)

    assert in_second_epoch(pl, check) == (1, 1, None)


def test_a_fetcher_reads_ahead(pl: Any) -> None:
    def check(trainer: Any) -> int:
        fetcher = internals.data_fetcher(trainer)
        before = len(fetcher.batches)
        internals.fetch_ahead(fetcher)
        return len(fetcher.batches) - before

    assert in_second_epoch(pl, check) == 1


def test_progress_and_results_are_found(pl: Any, tmp_path: Path) -> None:
    def check(trainer: Any) -> Any:
        assert all(hasattr(internals.logger_connector(trainer), name) for name in internals.METRIC_STATE)
        assert hasattr(internals.training_results(trainer), "items")
        assert internals.writes_one_file(trainer)
        assert internals.dump_checkpoint(trainer, weights_only=True).keys() >= {"state_dict", "global_step"}
        flags = internals.epoch_is_over(trainer), internals.window_is_incomplete(trainer)
        return *flags, internals.can_stop_early(trainer)

    assert in_second_epoch(pl, check) == (False, False, True)
    assert internals.last_saved(pl.callbacks.ModelCheckpoint(tmp_path)) == ""


def test_progress_is_loaded_and_the_end_of_fit_runs_alone(pl: Any) -> None:
    ended = []

    class End(pl.Callback):
        def on_train_end(self, trainer: Any, *args: Any) -> None:
            ended.append((trainer.current_epoch, trainer.global_step))
            if len(ended) == 1:
                loops = trainer.fit_loop.state_dict()
                load = lambda: internals.load_loop_progress(trainer, loops, inside_epoch=False)  # noqa: E731
                internals.run_to_the_end(trainer, inside_epoch=False, restore=load)

    trainer = runs.trainer(pl, max_epochs=1, limit_val_batches=0, callbacks=[End()])
    trainer.fit(boring_model(pl), boring())
    assert ended == [(1, 4), (1, 4)]
    averaging = pl.callbacks.StochasticWeightAveraging(1e-2)
    averaging._model_contains_batch_norm = True
    internals.prepare_end_of_averaging(trainer, averaging)
    assert averaging._accumulate_grad_batches == 1


def test_buffers_that_no_state_dict_has_are_found() -> None:
    module = torch.nn.Module()
    module.register_buffer("hidden", torch.ones(1), persistent=False)
    module.register_buffer("shown", torch.ones(1))
    assert list(internals.non_persistent_buffers(module)) == ["hidden"]


# --- Modules, metrics and tensors ---


# --- Autograd and dispatch, for diagnosis ---
