"""The proof that a resume was exact: steps that are taken again are compared, and a difference is named as its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability.checkpointing import fingerprints
from lightning_stability.checkpointing.fingerprints import Comparison, StepFile, Window, read_window
from lightning_stability.events import read_events
from lightning_stability.status.report import look
from lightning_stability.status.run import Run
from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import fit, result, saved
from tests.callbacks.test_resume_after_stop import free_port

pl = runs.load_namespace("pytorch_lightning")
OPTIONS: dict[str, Any] = {"max_epochs": 2, "checkpoint": {"every_n_epochs": 0.5}, "validate": False}


def logger(folder: Path, version: int) -> Any:
    return pl.loggers.CSVLogger(str(folder), name="logs", version=version)


def outcome(folder: Path) -> dict[str, Any] | None:
    """What the resumed run's events say of the comparison."""
    events = list(read_events(folder / "logs" / "version_1"))
    found = [event for event in events if event["event"] in ("resume_verified", "resume_differs")]
    assert len(found) <= 1
    return found[0] if found else None


def resume(folder: Path, path: Path, **options: Any) -> dict[str, Any] | None:
    """Resume from a checkpoint of the run in the folder, and return what its events say."""
    fit(folder, ckpt_path=str(path), seed=9, logger=logger(folder, 1), **{**OPTIONS, **options})
    return outcome(folder)


def test_a_resume_that_is_exact_is_said_to_be_in_log_events_and_status(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, **OPTIONS)
    with caplog.at_level("INFO"):
        event = resume(tmp_path, saved(tmp_path)[0])
    assert event is not None
    assert (event["event"], event["equal"], event["steps"]) == ("resume_verified", 3, 3)
    assert "resumed exactly: 3 of 3 steps bitwise identical" in caplog.text
    report = look(Run(tmp_path / "logs" / "version_1"))
    assert ("resume", "resumed exactly: 3 of 3 steps bitwise identical") in report.lines
    assert ("incidents", "0") in report.lines


def test_a_killed_run_is_compared_as_far_as_it_had_gone(tmp_path: Path, processes: fits.Fits) -> None:
    options = {**OPTIONS, "checkpoint": {"every_n_epochs": 1}}
    assert processes.run(tmp_path, kill_after_batch=10, **options) == -9
    assert processes.run(tmp_path, ckpt_path=str(saved(tmp_path)[0]), seed=7, **options) == 0
    # three steps were taken after the save, and the last one's numbers may not have been written yet
    assert result(tmp_path)["proved"] in ((True, 2), (True, 3))


def test_twenty_steps_after_a_save_are_kept_and_no_more(tmp_path: Path) -> None:
    checkpoint = {"every_n_epochs": 4}
    fit(tmp_path, **{**OPTIONS, "max_epochs": 8, "checkpoint": checkpoint})
    rows = [json.loads(line) for line in (tmp_path / "checkpoints" / "steps.jsonl").read_text().splitlines()]
    assert sorted({row["n"] for row in rows if "n" in row}) == list(range(1, 21))
    event = resume(tmp_path, saved(tmp_path)[0], max_epochs=8, checkpoint=checkpoint)
    assert event is not None
    assert event["why"] == "resumed exactly: 20 of 20 steps bitwise identical"


def test_accumulation_norms_and_loss_scale_are_compared_too(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "fp16": True, "patience": 3}
    fit(tmp_path, **{**OPTIONS, **options})
    rows = [json.loads(line) for line in (tmp_path / "checkpoints" / "steps.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert {"data", "loss", "bits", "lr", "scale", "norm"} <= names
    event = resume(tmp_path, saved(tmp_path)[0], **options)
    assert event is not None
    assert event["event"] == "resume_verified"


@pytest.mark.slow
def test_two_ranks_agree_on_what_was_compared_and_name_the_rank(tmp_path: Path, processes: fits.Fits) -> None:
    options: dict[str, Any] = {"ranks": 2, "data": "ranks", "module": {"bad": None}, **OPTIONS}
    assert processes.run(tmp_path, port=free_port(), **options) == 0
    path = saved(tmp_path)[0]
    assert processes.run(tmp_path, port=free_port(), ckpt_path=str(path), **options) == 0
    assert [result(tmp_path, rank)["proved"] for rank in range(2)] == [(True, 3), (True, 3)]
    rows = tmp_path / "checkpoints" / "steps.rank1.jsonl"
    rows.write_text(rows.read_text().replace('"data": "', '"data": "0'))  # as if rank 1 had had other batches
    assert processes.run(tmp_path, port=free_port(), ckpt_path=str(path), **options) == 0
    assert [result(tmp_path, rank)["proved"][0] for rank in range(2)] == [False, False]
    assert (
        "other data: step 5 was trained on another batch than before, on rank 1" in (tmp_path / "log-0.txt").read_text()
    )


# Differences, each named as its kind


class Permuted(fits.Samples):
    """Shuffled once, by a seed of the user's."""

    def __init__(self, seed: int) -> None:
        super().__init__(augment=False)
        self.x = self.x[torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))]


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The same checkpoint under another name, with something in it changed."""
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    copy = path.with_name(f"edited-{path.name}")
    torch.save(checkpoint, copy)
    return copy


def flip_last_bit(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["net.0.weight"].view(torch.int32)[3, 2] ^= 1


def forget_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"] = {}


def halve_rate(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] /= 2


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str, int]] = {
    "a weight's last bit": (flip_last_bit, "weights", 0),
    "a missing optimizer state": (forget_optimizer, "optimizer state", 0),
    "another learning rate": (halve_rate, "learning rate", 1),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_changed_checkpoint_is_named_by_what_changed(tmp_path: Path, name: str) -> None:
    edit, kind, first = EDITS[name]
    fit(tmp_path, **OPTIONS)
    event = resume(tmp_path, edited(saved(tmp_path)[0], edit))
    assert event is not None
    assert (event["event"], event["kind"], event["first"]) == ("resume_differs", kind, first)
    assert ("resume", f"not exact: {event['why']}") in look(Run(tmp_path / "logs" / "version_1")).lines


def test_data_shuffled_by_another_seed_are_named_as_data(tmp_path: Path) -> None:
    def data(seed: int) -> Callable[[], Any]:
        return lambda: StatefulDataLoader(Permuted(seed), batch_size=4)

    fit(tmp_path, data=data(1), **OPTIONS)
    event = resume(tmp_path, saved(tmp_path)[0], data=data(2))
    assert event is not None
    assert (event["kind"], event["first"]) == ("data", 1)
    assert "step 5 was trained on another batch" in event["why"]


def wide(pl: Any) -> Any:
    """Wide enough that threads share a sum."""

    class Wide(type(fits.make_module(pl))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(1, 1)
            self.much = torch.randn(2**19, generator=torch.Generator().manual_seed(3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (self.much * self.wide.weight).sin().sum().abs()

    return Wide()


def test_another_thread_count_is_named_as_numerics_with_what_changed(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fit(tmp_path, module=wide, **OPTIONS)
        torch.set_num_threads(1)
        event = resume(tmp_path, saved(tmp_path)[0], module=wide)
    finally:
        torch.set_num_threads(threads)
    assert event is not None
    assert (event["event"], event["kind"]) == ("resume_differs", "numerics")
    assert event["changed"] == ["threads: 2 -> 1"]


def test_other_random_numbers_are_not_called_numerics(tmp_path: Path) -> None:
    class Draws(pl.Callback):
        def on_train_epoch_start(self, *args: Any) -> None:
            if self.is_resumed:
                torch.rand(3)

    def callbacks(is_resumed: bool) -> Callable[[Any], list[Any]]:
        draws = Draws()
        draws.is_resumed = is_resumed
        return lambda pl: [draws]

    options = {"data": lambda: DataLoader(fits.Samples(augment=False), batch_size=4)}
    options = {**OPTIONS, **options, "checkpoint": {"every_n_epochs": 1}}
    fit(tmp_path, **options, callbacks=callbacks(False))
    event = resume(tmp_path, saved(tmp_path)[0], **options, callbacks=callbacks(True))
    assert event is not None
    assert (event["kind"], event["first"]) == ("computation", 1)
    assert "random numbers drawn elsewhere" in event["why"]


# The file


def test_half_lines_and_strange_ones_are_passed_over(tmp_path: Path) -> None:
    file = StepFile(tmp_path, rank=0)
    file.begin(Window("a", 1, {}))
    file.add(1, {"loss": 1.0})
    with file.path.open("ab") as half:
        half.write(b'[1, 2]\n{"save": "a", "start": 1, "n": 2, "lo')
    file.add(2, {"loss": float("nan")})
    window = read_window(file.path, "a")
    assert window is not None
    assert window.rows == {1: {"loss": 1.0}, 2: {"loss": "nan"}}
    assert read_window(file.path, "b") is None


def test_the_file_stays_small_and_keeps_the_newest_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_MAX_BYTES", 2**16)
    file = StepFile(tmp_path, rank=0)
    for save in range(40):
        file.begin(Window(str(save), 1, {"environment": {"filler": "x" * 1000}}))
        for n in range(1, 21):
            file.add(n, {"loss": 1.0, "data": "0" * 16, "lr": [0.1]})
    assert file.path.stat().st_size < 1.2 * 2**16
    newest = read_window(file.path, "39")
    assert newest is not None
    assert newest.steps == 20
    kept = [save for save in range(40) if read_window(file.path, str(save))]
    assert kept == list(range(kept[0], 40))
    assert len(kept) > 5


def test_a_folder_that_cannot_be_written_costs_the_fingerprints_only(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "steps.jsonl").mkdir(parents=True)
    fit(tmp_path, **OPTIONS)
    assert len(saved(tmp_path)) == 4


def test_of_several_tries_the_one_that_got_furthest_is_compared_with(tmp_path: Path) -> None:
    file = StepFile(tmp_path, rank=0)
    for start, steps in ((1, 3), (2, 5), (3, 2)):
        file.begin(Window("a", start, {}))
        for n in range(1, steps + 1):
            file.add(n, {"loss": float(start)})
    window = read_window(file.path, "a")
    assert window is not None
    assert (window.start, window.steps) == (2, 5)


def test_numbers_that_are_not_finite_are_equal_to_themselves() -> None:
    comparison = Comparison(Window("a", 1, {}, {1: {"loss": "nan"}}), {}, steps=1)
    comparison.add(1, {"loss": float("nan")})
    assert comparison.difference() is None
