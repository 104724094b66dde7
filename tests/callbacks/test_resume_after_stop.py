"""A run resumed from `nan_early_stop.ckpt` ends as one that skipped the bad batch and went on."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability import FractionalCheckpoint, NaNEarlyStop, NonFiniteError, internals
from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from lightning_stability.checkpointing.stopping import FILE_NAME
from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import assert_same, fit, result, saved

pl = runs.load_namespace("pytorch_lightning")
LONG = {"every_n_epochs": 10}  # a FractionalCheckpoint that saves at the end alone

# Epochs have seven batches, streams eight.
EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "in the middle, with FractionalCheckpoint": (3, {"checkpoint": LONG}),
    "in the middle, without": (3, {"checkpoint": "none"}),
    "the epoch's last, with FractionalCheckpoint": (6, {"checkpoint": LONG}),
    "the epoch's last, without": (6, {"checkpoint": "none"}),
    "the epoch's last, a plain loader": (6, {"checkpoint": "none", "data": "plain"}),
    "the epoch's last, an order that is in no state": (6, {"checkpoint": "none", "data": "weighted"}),
    "in the middle of an order that is in no state": (3, {"checkpoint": LONG, "data": "weighted"}),
    "in the middle of a plain loader": (3, {"checkpoint": LONG, "data": "plain"}),
    "in the middle of a stream": (3, {"checkpoint": {**LONG, "steps_per_epoch": 8}, "data": "stream"}),
    "a stream's last": (7, {"checkpoint": {**LONG, "steps_per_epoch": 8}, "data": "stream"}),
    "the second epoch's first": (7, {"checkpoint": "none"}),
    "the last of fit": (13, {"checkpoint": "none"}),
    "a validation inside the epoch is due": (3, {"checkpoint": "none", "val_check_interval": 2}),
    "inside a window of accumulation": (2, {"checkpoint": "none", "accumulate_grad_batches": 2}),
    "a plateau scheduler is due": (6, {"checkpoint": "none", "module": {"plateau": "step"}}),
    "manual optimization": (3, {"checkpoint": LONG, "module": {"manual": True}}),
}


def rows(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / fits.ROWS).read_text().splitlines()]
    return [line for line in lines if "skipped_updates" not in line[1]]


def stop(folder: Path, options: dict[str, Any]) -> Path:
    """Train until the bad batch; return what is kept."""
    fit(folder / "stopped", patience=0, **options)
    return folder / "stopped" / "checkpoints" / FILE_NAME


@pytest.mark.parametrize("name", EXACT)
def test_after_a_bad_batch_it_ends_as_the_run_that_went_on(tmp_path: Path, name: str) -> None:
    bad, options = EXACT[name]
    module = {**options.get("module", {}), "bad": bad}
    options = {"namespace": runs.NAMESPACES[len(name) % 2], "max_epochs": 2, **options, "module": module}
    fit(tmp_path / "reference", patience=1, **options)
    kept = stop(tmp_path, options)
    fit(tmp_path / "resumed", patience=0, ckpt_path=str(kept), seed=99, **options)
    assert_same(result(tmp_path / "resumed"), result(tmp_path / "reference"))
    together = rows(tmp_path / "stopped") + rows(tmp_path / "resumed")
    assert json.dumps(together) == json.dumps(rows(tmp_path / "reference")), "the NaN that it was logged as, too"


@pytest.mark.slow
@pytest.mark.parametrize("bad", [3, 6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_with_several_ranks_or_workers_it_ends_as_the_run_that_went_on(
    tmp_path: Path, processes: fits.Fits, ranks: int, bad: int
) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "module": {"bad": bad}, "checkpoint": LONG, "ranks": ranks}
    options |= {"data": "ranks"} if ranks > 1 else {"workers": 2, "augment": False, "checkpoint": "none"}
    kept = tmp_path / "stopped" / "checkpoints" / FILE_NAME
    for name, more in {
        "reference": {"patience": 1},
        "stopped": {"patience": 0},
        "resumed": {"patience": 0, "seed": 99, "ckpt_path": str(kept)},
    }.items():
        if ranks > 1:
            more["port"] = free_port()
        assert processes.run(tmp_path / name, **options, **more) == 0
    for rank in range(ranks):
        assert_same(result(tmp_path / "resumed", rank), result(tmp_path / "reference", rank))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("data", "bad", "trained"),
    [
        ("plain", 3, 3 + 7),  # of the epoch's order from its beginning, as Lightning does
        ("stream", 3, 3 + 8),  # the one that had been read ahead is lost, as in Lightning
        ("weighted", 3, 3 + 7),
    ],
)
def test_where_the_position_is_not_known_there_is_no_empty_epoch(
    tmp_path: Path, data: str, bad: int, trained: int
) -> None:
    options = {"max_epochs": 2, "data": data, "checkpoint": "none", "module": {"bad": bad}}
    trainer = fit(tmp_path / "resumed", patience=0, ckpt_path=str(stop(tmp_path, options)), **options)
    assert len(result(tmp_path / "resumed")["seen"]) == trained
    assert trainer.current_epoch == 2


@pytest.mark.parametrize(("data", "bad"), [("samples", 3), ("samples", 6), ("plain", 6)])
def test_a_trainer_without_the_package_loses_no_batch_and_repeats_none(tmp_path: Path, data: str, bad: int) -> None:
    options = {"max_epochs": 2, "data": data, "checkpoint": "none", "module": {"bad": bad}}
    fit(tmp_path / "resumed", ckpt_path=str(stop(tmp_path, options)), **options)
    end = result(tmp_path / "resumed")
    assert (end["global_step"], end["epoch"]) == (14, 2)
    seen = result(tmp_path / "stopped")["seen"] + end["seen"]
    for epoch in (seen[:7], seen[7:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(28))


def test_a_plain_loader_goes_on_without_fractional_checkpoint_and_leaves_nothing_behind(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "data": "plain", "module": {"bad": 3}}
    fit(tmp_path / "reference", patience=1, checkpoint=LONG, **options)
    kept = stop(tmp_path, {**options, "checkpoint": LONG})
    trainer = fit(tmp_path / "resumed", patience=0, ckpt_path=str(kept), seed=99, checkpoint="none", **options)
    assert_same(result(tmp_path / "resumed"), result(tmp_path / "reference"))
    assert internals.LOADERS_ARE_MADE not in vars(trainer.fit_loop)
    assert getattr(internals.LoaderIterator, internals.BEGIN_ANEW).__module__ == "torch.utils.data.dataloader"


def test_fractional_checkpoint_makes_up_for_the_save_that_the_stop_kept_it_from(tmp_path: Path) -> None:
    options = {"max_epochs": 1, "module": {"bad": 3}, "checkpoint": {"every_n_epochs": 4 / 7}}
    fit(tmp_path / "reference", patience=1, **options)
    kept = stop(tmp_path, options)
    assert saved(tmp_path / "stopped") == []
    fit(tmp_path / "resumed", patience=0, ckpt_path=str(kept), **options)
    names = [path.name for path in saved(tmp_path / "reference")]
    assert [path.name for path in saved(tmp_path / "resumed")] == names
    assert names[0].startswith("epoch=000.57")


def test_it_is_listed_as_finite_and_as_the_last_good_one(tmp_path: Path) -> None:
    kept = stop(tmp_path, {"max_epochs": 2, "module": {"bad": 10}, "checkpoint": {"every_n_epochs": 1}})
    assert last_good_checkpoint(kept.parent) == kept
    [info] = list_checkpoints(kept)
    assert (info.complete, info.finite, info.step) == (True, True, 11)
    assert info.epochs == pytest.approx(11 / 7)
    assert "val_loss" in info.metrics
    [verified] = list_checkpoints(kept, verify=True)
    assert verified.is_good, "the module's mask of -inf is so by design"


def test_with_action_raise_it_is_kept_as_well(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        fit(tmp_path, callbacks=lambda pl: [NaNEarlyStop(patience=0, action="raise")], module={"bad": 3})
    fit(tmp_path / "resumed", patience=0, max_epochs=1, ckpt_path=str(tmp_path / "checkpoints" / FILE_NAME))
    assert len(result(tmp_path / "resumed")["seen"]) == 3


class Fails(pl.Callback):
    """A user's own answer to a bad batch, after the guard's in the list."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        if not torch.isfinite(outputs["loss"]):
            raise ArithmeticError("on purpose")


def test_it_is_kept_when_another_callback_fails_over_the_bad_batch(tmp_path: Path) -> None:
    options = {"module": {"bad": 6}, "checkpoint": "none", "max_epochs": 2}
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, callbacks=lambda pl: [NaNEarlyStop(patience=0), Fails()], **options)
    trainer = fit(tmp_path / "resumed", patience=0, max_epochs=2, ckpt_path=str(tmp_path / "checkpoints" / FILE_NAME))
    assert len(result(tmp_path / "resumed")["seen"]) == 7
    assert trainer.current_epoch == 2


class Spoils(pl.Callback):
    """Writes NaN into weights past the optimizer."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            module.net[0].weight.data.fill_(torch.nan)


def test_weights_that_somebody_else_spoilt_are_not_kept(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=lambda pl: [NaNEarlyStop(patience=0), Spoils()], checkpoint="none")
    assert list((tmp_path / "checkpoints").glob("*.ckpt")) == []


class Looks(pl.Callback):
    """What stands in for methods of the loops."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
            self.found |= {name for name, value in vars(loop).items() if callable(value) and hasattr(type(loop), name)}


def test_a_run_without_incident_has_nothing_in_its_loops_place(tmp_path: Path) -> None:
    look = Looks()
    trainer = fit(tmp_path, callbacks=lambda pl: [look], patience=0, checkpoint="none", max_epochs=1)
    assert not look.found
    kept = stop(tmp_path, {"module": {"bad": 3}, "checkpoint": "none"})
    trainer = fit(tmp_path, callbacks=lambda pl: [look], patience=0, checkpoint="none", ckpt_path=str(kept))
    assert look.found, "a resumed run is put where it was"
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
        assert not {"on_advance_end", "on_advance_start", "on_run_start", "reset"} & vars(loop).keys()


def test_resumed_and_stopped_again_it_goes_on_again(tmp_path: Path) -> None:
    options = {"max_epochs": 2, "checkpoint": "none"}
    fit(tmp_path / "reference", callbacks=lambda pl: [NaNEarlyStop(1), Second(6)], module={"bad": 3}, **options)
    first = stop(tmp_path, {**options, "module": {"bad": 3}})
    again = {**options, "module": {"bad": 6}}
    fit(tmp_path / "again", patience=0, ckpt_path=str(first), **again)
    fit(tmp_path / "end", patience=0, ckpt_path=str(tmp_path / "again" / "checkpoints" / FILE_NAME), **again)
    assert_same(result(tmp_path / "end"), result(tmp_path / "reference"))


class Second(pl.Callback):
    """Makes another batch bad."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.bad:
            batch[0].fill_(torch.nan)


def test_the_section_says_what_fractional_checkpoint_reads(tmp_path: Path) -> None:
    kept = stop(tmp_path, {"module": {"bad": 6}, "checkpoint": "none"})
    theirs = fit(tmp_path / "other", max_epochs=1).checkpoint_callback
    assert isinstance(theirs, FractionalCheckpoint)
    ours, other = (
        torch.load(path, weights_only=True)["lightning_stability"] for path in (kept, theirs.last_model_path)
    )
    assert ours.keys() == other.keys()
    assert (ours["batch_is_over"], ours["more_batches"], other["batch_is_over"]) == (False, False, True)
