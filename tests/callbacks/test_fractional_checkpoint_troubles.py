"""FractionalCheckpoint where something outside of it is not as it was: the disk, the folder, the data, the options."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability import FractionalCheckpoint
from lightning_stability._compat import MisconfigurationException
from lightning_stability.callbacks.checkpoint_messages import warn_of_failure
from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints
from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import (
    assert_same,
    fit,
    kept_steps,
    log,
    ranked,
    result,
    saved,
    steps,
    train,
)

pl = runs.load_namespace("pytorch_lightning")


def loudly(folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """Fit; return the Trainer and what it warned of."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fits.fit(folder, **options)
    return trainer, [str(warning.message) for warning in caught]


# The disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("left", "more"), [(2, "2 more failures in a row"), (1, "the next failure in a row"), (0, "")])
def test_a_failed_save_says_how_many_more_end_the_run_while_it_trains(left: int, more: str) -> None:
    with pytest.warns(UserWarning, match="could not be written") as caught:
        warn_of_failure("a.ckpt", "no space", left)
    said = str(caught[0].message)
    assert more in said
    assert ("training continues" in said) == (left > 0)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_is_full_for_a_while_costs_only_the_saves_of_that_time(small_disk: Path, async_save: bool) -> None:
    def fill(pl: Any) -> list[Any]:
        class Fill(pl.Callback):
            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == 2:
                    trainer.checkpoint_callbacks[0]._finish_pending(trainer)
                    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free))
                if trainer.global_step == 4:
                    trainer.checkpoint_callbacks[0]._finish_pending(trainer)
                    (small_disk / "others").unlink()

        return [Fill()]

    checkpoint = {"every_n_epochs": 1 / 7, "save_top_k": 1, "async_save": async_save, "dirpath": small_disk}
    folder = small_disk.parent / "run"
    _, said = loudly(folder, max_epochs=1, validate=False, checkpoint=checkpoint, callbacks=fill)
    failures = [message for message in said if "could not be written" in message]
    assert ["step=000003" in failures[0], "step=000004" in failures[1], len(failures)] == [True, True, 2]
    assert "the disk is full: 0." in failures[0]
    assert "0.0 MB free" in failures[0], "what torch says of it does not name the disk"
    files = sorted(path.name for path in small_disk.iterdir())
    assert files == ["epoch=001.00-step=000007.ckpt", "last.ckpt", "steps.jsonl"]
    assert all(info.is_good for info in list_checkpoints(small_disk, verify=True))


def test_a_full_disk_that_stays_full_ends_the_run_and_leaves_what_was_there(small_disk: Path) -> None:
    checkpoint = {"every_n_epochs": 1 / 7, "save_top_k": -1, "dirpath": small_disk}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="3 saves in a row failed"):
            fits.fit(small_disk.parent, max_epochs=2, checkpoint=checkpoint)
    failures = [str(each.message) for each in caught if "could not be written" in str(each.message)]
    ends = [message.rpartition("; ")[2] for message in failures]
    assert ends == [f"training continues, and ends at {n} in a row." for n in ("2 more failures", "the next failure")]
    infos = list_checkpoints(small_disk, verify=True)
    assert len(infos) >= 2
    assert all(info.is_good for info in infos)
    assert not list(small_disk.glob(".*"))


@pytest.mark.parametrize("async_save", [False, True])
def test_a_folder_that_is_deleted_under_the_run_is_made_again(tmp_path: Path, async_save: bool) -> None:
    def delete(pl: Any) -> list[Any]:
        class Delete(pl.Callback):
            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == 4:
                    while (tmp_path / "checkpoints").exists():  # a write in the background may put a file there
                        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)

        return [Delete()]

    fit(tmp_path, max_epochs=1, checkpoint={"save_top_k": 1, "async_save": async_save}, callbacks=delete)
    assert kept_steps(tmp_path / "checkpoints") == [7]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 7


def test_a_path_with_file_in_front_is_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(tmp_path, FractionalCheckpoint(0.5, dirpath=f"file://{tmp_path}/there"))
    assert kept_steps(tmp_path / "there") == [8]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_name_of_the_second_name_is_refused_for_the_first() -> None:
    with pytest.raises(MisconfigurationException, match="save_last"):
        FractionalCheckpoint(filename="last")
    FractionalCheckpoint(filename="last", save_last=False)


# Another interval, other data, another version


def test_with_another_interval_it_goes_on_rotating_and_last_moves_on(tmp_path: Path) -> None:
    options = {"save_top_k": 1, "monitor": "train_loss_step"}
    fit(tmp_path, max_epochs=1, checkpoint={"every_n_epochs": 0.25, **options})
    last = tmp_path / "checkpoints" / "last.ckpt"
    [best] = [p for p in saved(tmp_path) if p.stat().st_ino != last.stat().st_ino] or [saved(tmp_path)[-1]]
    trainer = fit(tmp_path, max_epochs=2, checkpoint={"every_n_epochs": 0.1, **options}, ckpt_path=str(last))
    assert torch.load(last)["global_step"] == 14
    [callback] = trainer.checkpoint_callbacks
    assert Path(callback.best_model_path).exists()
    assert not list(last.parent.glob("*-v1.ckpt"))
    assert len(saved(tmp_path)) <= 3, "the best, the newest, and what the run was resumed from"
    assert best.exists() or Path(callback.best_model_path).name > best.name
    fit(tmp_path / "whole", max_epochs=2, checkpoint={"every_n_epochs": 0.25, **options})
    assert_same(result(tmp_path), result(tmp_path / "whole"))


OTHER_DATA = {
    "fewer samples": lambda: StatefulDataLoader(fits.Samples(12), batch_size=4, shuffle=True),
    "no position": lambda: DataLoader(fits.Samples(28), batch_size=4, shuffle=True),
    "smaller batches": lambda: StatefulDataLoader(fits.Samples(28), batch_size=2, shuffle=True),
    "larger batches": lambda: StatefulDataLoader(fits.Samples(28), batch_size=7, shuffle=True),
    "larger batches, no position": lambda: DataLoader(fits.Samples(28), batch_size=7, shuffle=True),
}


@pytest.mark.parametrize("name", OTHER_DATA)
@pytest.mark.parametrize("place", ["000.85", "001.00"])
def test_other_data_is_called_out_and_trained_on_from_its_beginning(tmp_path: Path, name: str, place: str) -> None:
    """Torchdata raises StopIteration for it, which a loop of Lightning's takes for the end of the fit."""
    fit(tmp_path / "a", max_epochs=1, checkpoint={"every_n_epochs": 6 / 7})
    [path] = [path for path in saved(tmp_path / "a") if place in path.name]
    trainer, said = loudly(tmp_path / "b", max_epochs=2, data=OTHER_DATA[name], ckpt_path=str(path))
    inside = place == "000.85"
    if inside and name in ("smaller batches", "larger batches"):
        assert [message for message in said if "dealt out anew" in message]
        indices = [index for batch in result(tmp_path / "b")["seen"] for index in batch]
        assert [len(indices), len(set(indices[:4]))] == [4 + 28, 4], "what was left of the epoch, and the next one"
        return
    if inside or "batches" not in name:  # between two epochs batches of any size have the same place
        assert [message for message in said if "could not be restored" in message]
    assert trainer.current_epoch == 2
    batches = len(OTHER_DATA[name]())
    seen = result(tmp_path / "b")["seen"]
    epochs = [seen[i : i + batches] for i in range(0, len(seen), batches)]
    assert len(epochs) == 2 if inside else len(seen) >= batches, "the epoch under way begins again, and is whole"
    for epoch in epochs if inside else [seen[-batches:]]:
        indices = [index for batch in epoch for index in batch]
        assert len(indices) == len(set(indices)) == (12 if name == "fewer samples" else 28), "all of the new data"


def test_of_a_plain_loader_too_other_batches_are_dealt_out_of_what_is_left(tmp_path: Path) -> None:
    loader = lambda size: lambda: DataLoader(fits.Samples(28), batch_size=size, shuffle=True)  # noqa: E731
    loudly(tmp_path / "a", max_epochs=1, checkpoint={"every_n_epochs": 6 / 7}, data=loader(4))
    [path] = [path for path in saved(tmp_path / "a") if "000.85" in path.name]
    _, said = loudly(tmp_path / "b", max_epochs=1, data=loader(7), ckpt_path=str(path))
    assert [message for message in said if "dealt out anew" in message]
    assert len({index for batch in result(tmp_path / "b")["seen"] for index in batch}) == 4


def test_an_epoch_that_begins_again_is_saved_in_like_any_other(tmp_path: Path) -> None:
    fit(tmp_path / "a", max_epochs=1, checkpoint={"every_n_epochs": 6 / 7})
    [path] = [path for path in saved(tmp_path / "a") if "000.85" in path.name]
    options = {"data": OTHER_DATA["fewer samples"], "checkpoint": {"every_n_epochs": 1 / 3, "save_top_k": -1}}
    loudly(tmp_path / "b", max_epochs=1, ckpt_path=str(path), **options)
    assert steps(tmp_path / "b") == [7, 8, 9]


@pytest.mark.slow
def test_where_one_rank_does_not_find_its_place_all_begin_the_epoch_again(tmp_path: Path, processes: fits.Fits) -> None:
    options = {"data": "ranks", "augment": False, "validate": False, "max_epochs": 1, "ranks": 2}
    run = ranked(processes)
    assert run(tmp_path / "a", **options) == 0, log(tmp_path / "a")
    path = saved(tmp_path / "a")[0]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_stability"]["ranks"][1]["data"]["lengths"] = [99]
    other = tmp_path / "other.ckpt"
    torch.save(checkpoint, other)
    assert run(tmp_path / "b", ckpt_path=str(other), **options) == 0, log(tmp_path / "b")
    seen = [index for rank in range(2) for batch in result(tmp_path / "b", rank)["seen"] for index in batch]
    assert sorted(seen) == list(range(56)), "the whole epoch, once"


def test_a_section_of_another_version_is_left_to_lightnings_own_resume(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1)
    path = last_good_checkpoint(tmp_path / "checkpoints")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_stability"]["format"] = 10**6
    torch.save(checkpoint, path)
    trainer, said = loudly(tmp_path, max_epochs=2, ckpt_path=str(path))
    assert [message for message in said if "lightning-stability, in format 1000000" in message]
    assert trainer.global_step >= 14
