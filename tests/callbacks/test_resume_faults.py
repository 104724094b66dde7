"""What a resume must not change: ends of fit, hidden buffers, samplers, steps that nobody counts, clocks, commands."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability import FractionalCheckpoint
from lightning_stability.checkpointing import last_good_checkpoint
from lightning_stability.checkpointing.stopping import resume_command
from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import (
    assert_same,
    fit,
    log,
    logging_values,
    result,
    resume_from_all,
    saved,
    train,
)
from tests.callbacks.test_fractional_checkpoint_troubles import loudly

pl = runs.load_namespace("pytorch_lightning")
Base: Any = type(fits.make_module(pl))

# Killed at the end of fit

ENDS: dict[str, dict[str, Any]] = {
    "averaged weights": {"extra": "ema"},
    "stochastic weight averaging": {"extra": "swa"},
    "an early stop": {"extra": "early", "max_epochs": 9},
    "an early stop inside an epoch": {"extra": "early", "max_epochs": 9, "val_check_interval": 3},
    "max_steps inside an epoch": {"max_epochs": None, "max_steps": 10, "extra": "ema"},
    "accumulation": {"accumulate_grad_batches": 4, "extra": "ema"},
    "manual optimization": {"module": {"manual": True}, "extra": "ema"},
    "in the background": {"checkpoint": {"async_save": True}, "extra": "ema"},
}


@pytest.mark.parametrize("name", ENDS)
def test_killed_at_the_end_of_fit_it_ends_as_one_that_was_not_killed(
    tmp_path: Path, processes: fits.Fits, name: str
) -> None:
    fits.needs_new_swa(name)
    options = {"max_epochs": 2, **ENDS[name]}
    options["checkpoint"] = {"every_n_epochs": 0.5, **options.get("checkpoint", {})}
    assert processes.run(tmp_path / "reference", **options) == 0, log(tmp_path / "reference")
    killed = tmp_path / "killed"
    assert processes.run(killed, kill_in="on_train_end", **options) == -9, log(killed)
    last = {"ckpt_path": str(last_good_checkpoint(killed / "checkpoints")), "seed": 50}
    assert processes.run(killed, **last, **options) == 0, log(killed)
    assert_same(result(killed), result(tmp_path / "reference"))
    assert result(killed)["metrics"] == result(tmp_path / "reference")["metrics"]
    assert result(killed)["metrics"]
    assert fits.read_rows(killed) == fits.read_rows(tmp_path / "reference")
    again = {"ckpt_path": str(last_good_checkpoint(killed / "checkpoints")), "seed": 51}
    assert processes.run(killed, **again, **options) == 0, log(killed)
    assert_same(result(killed), result(tmp_path / "reference"))


# Buffers that no state_dict has


class Hidden(Base):
    """A memory bank: `how` it changes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.part = how, torch.nn.Module()
        self.part.register_buffer("bank", torch.zeros(8), persistent=False)
        self.part.register_buffer("table", torch.arange(8.0), persistent=False)
        self.part.register_buffer("empty", None, persistent=False)
        self.part.register_buffer("sparse", torch.zeros(4).to_sparse(), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * (1 + self.part.bank.mean())
        new = batch[0].detach().mean(0).sum()
        if self.how == "assigned":
            self.part.bank = 0.5 * self.part.bank + new
        elif self.how == "in place":
            self.part.bank.mul_(0.5).add_(new)
        elif self.how == "through .data":
            self.part.bank.data.roll(1)
            self.part.bank.data[batch_idx] = new
        elif self.how == "grows":
            self.part.bank = torch.cat([self.part.bank[-20:], new[None]])
        elif self.how == "sparse":
            bank = self.part.sparse.to_dense()
            loss = loss * (1 + bank.mean())
            self.part.sparse = (0.5 * bank + new).to_sparse()
        elif self.how == "None at first":
            loss = loss if self.part.empty is None else loss * (1 + self.part.empty.mean())
            self.part.empty = new[None].clone()
        elif self.how == "appears later" and self.trainer.global_step == 3:
            self.part.register_buffer("late", new[None].clone(), persistent=False)
        return loss * (1 + self.part.late.mean()) if hasattr(self.part, "late") else loss


BUFFER_OF = {"appears later": "part.late", "sparse": "part.sparse", "None at first": "part.empty"}


@pytest.mark.parametrize("how", [*BUFFER_OF, "assigned", "in place", "through .data", "grows"])
def test_a_buffer_that_is_not_persistent_is_resumed_if_training_changes_it(tmp_path: Path, how: str) -> None:
    options = {"module": lambda pl: Hidden(how), "max_epochs": 2, "checkpoint": {"every_n_epochs": 0.6}}
    fit(tmp_path, **options)
    kept = torch.load(saved(tmp_path)[1], weights_only=True)["lightning_stability"]["ranks"][0]["buffers"]
    assert set(kept) == {BUFFER_OF.get(how, "part.bank")}, "a table that is computed stays out"
    resume_from_all(saved(tmp_path), tmp_path, options)


# Orders

MODULE_WIDE = np.random.default_rng(5)


class Own(Sampler[int]):
    """Draws its order from what it keeps itself."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0
        self.numpy, self.python = np.random.default_rng(3), random.Random(4)
        self.legacy, self.device = np.random.RandomState(2), torch.Generator().manual_seed(3)
        self.nested = {"inner": [np.random.Generator(np.random.Philox(8))]}

    def __len__(self) -> int:
        return 28

    def __iter__(self) -> Iterator[int]:
        self.calls += 1
        if self.kind == "numpy":
            return iter(self.numpy.permutation(28).tolist())
        if self.kind == "python":
            return iter(self.python.sample(range(28), 28))
        if self.kind == "legacy numpy":
            return iter(self.legacy.permutation(28).tolist())
        if self.kind == "torch, under another name":
            return iter(torch.randperm(28, generator=self.device).tolist())
        if self.kind == "nested":
            return iter(self.nested["inner"][0].permutation(28).tolist())
        if self.kind == "global name":
            return iter(MODULE_WIDE.permutation(28).tolist())
        return iter(torch.randperm(28, generator=torch.Generator().manual_seed(self.calls)).tolist())


KINDS = ("numpy", "python", "legacy numpy", "torch, under another name", "nested", "counts")


# (those of a loader with a state cost the most)
FAST_KINDS = [(kind, DataLoader) for kind in KINDS] + [("python", StatefulDataLoader), ("nested", StatefulDataLoader)]
SLOW_KINDS = [(kind, StatefulDataLoader) for kind in KINDS if kind not in ("python", "nested")]


@pytest.mark.parametrize(
    ("kind", "loader"), [*FAST_KINDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_KINDS)]
)
def test_a_sampler_with_a_generator_of_its_own_is_resumed(tmp_path: Path, kind: str, loader: Any) -> None:
    every = 0.4 if loader is StatefulDataLoader else 1
    options = {
        "data": lambda: loader(fits.Samples(), batch_size=4, sampler=Own(kind)),
        "max_epochs": 3,
        "checkpoint": {"every_n_epochs": every},
    }
    fit(tmp_path, **options)
    resume_from_all(saved(tmp_path), tmp_path, options)


class OwnBatches(Own):
    """A batch sampler with a state that does not say where it is in an epoch."""

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        order = list(super().__iter__())
        for first in range(0, 28, 4):
            yield order[first : first + 4]

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
def test_a_batch_sampler_whose_state_is_no_position_is_resumed(tmp_path: Path, loader: Any) -> None:
    options = {
        "data": lambda: loader(fits.Samples(), batch_sampler=OwnBatches("counts")),
        "max_epochs": 2,
        "checkpoint": {"every_n_epochs": 0.6},
    }
    fit(tmp_path, **options)
    resume_from_all(saved(tmp_path), tmp_path, options)


def test_workers_that_deliver_as_they_finish_are_warned_of(tmp_path: Path) -> None:
    def data(**options: Any) -> Any:
        return lambda: DataLoader(fits.Samples(), batch_size=4, num_workers=1, **options)

    for options, times in ({"in_order": False}, 1), ({}, 0):
        _, said = loudly(tmp_path, max_epochs=1, validate=False, data=data(**options))
        assert ["in_order=False" in message for message in said].count(True) == times, said


def test_a_sampler_that_uses_a_generator_of_its_module_is_resumed(tmp_path: Path) -> None:
    start = MODULE_WIDE.bit_generator.state
    options = {
        "data": lambda: StatefulDataLoader(fits.Samples(), batch_size=4, sampler=Own("global name")),
        "max_epochs": 3,
        "checkpoint": {"every_n_epochs": 0.4},
    }
    fit(tmp_path, **options)
    for path in saved(tmp_path):
        MODULE_WIDE.bit_generator.state = start
        resume_from_all([path], tmp_path, options)


class Streams(Sampler[int]):
    """Its order is in an iterator that is under way."""

    def __init__(self) -> None:
        self.stream = (torch.randperm(28, generator=torch.Generator().manual_seed(i)).tolist() for i in range(99))

    def __len__(self) -> int:
        return 28

    def __iter__(self) -> Iterator[int]:
        return iter(next(self.stream))


class NoState(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        samples = fits.Samples()
        return iter([samples[i] for i in torch.randperm(28).tolist()])


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (lambda: StatefulDataLoader(fits.Samples(), batch_size=4, sampler=Streams()), "Streams.stream"),
        (lambda: DataLoader(fits.Samples(), batch_size=4, sampler=Streams()), "Streams.stream"),
        (lambda: StatefulDataLoader(NoState(), batch_size=4), "NoState has no state_dict"),
    ],
)
def test_an_order_that_cannot_be_restored_is_said_when_training_starts(tmp_path: Path, data: Any, phrase: str) -> None:
    said_by_first_batch: list[str] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit), pytest.warns(UserWarning, match=phrase) as caught:
        fits.fit(tmp_path, data=data, checkpoint={"steps_per_epoch": 7}, callbacks=lambda pl: [Look()])
    said_by_first_batch += [str(warning.message) for warning in caught]
    assert [message for message in said_by_first_batch if "between two epochs" in message]


# Steps that Lightning does not count


class Uncounted(Base):
    """Steps with what Lightning does not see."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.automatic_optimization, self.how = False, how
        self.own = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.net(batch[0]).pow(2).mean()
        self.seen.append(batch[1].tolist())
        self.zero_grad()
        self.manual_backward(loss)
        if self.how == "bare":
            self.optimizers(use_pl_optimizer=False).step()
        elif self.how == "its own":
            self.own.step()
        elif batch_idx % 2 or self.how == "by hand":
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter -= 0.01 * parameter.grad

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.how == "bare" else None

    def on_train_epoch_end(self) -> None:
        pass


@pytest.mark.parametrize("how", ["bare", "its own", "by hand"])
def test_steps_that_lightning_does_not_count_are_saved_and_resumed(tmp_path: Path, how: str) -> None:
    options = {"module": lambda pl: Uncounted(how), "max_epochs": 2, "checkpoint": {"every_n_epochs": 0.5}}
    fit(tmp_path, **options)
    assert [path.name[6:12] for path in saved(tmp_path)] == ["000.57", "001.00", "001.57", "002.00"]
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    for path in saved(tmp_path):
        fit(tmp_path / "again", ckpt_path=str(path), seed=99, **options)
        assert_same(result(tmp_path / "again"), result(tmp_path))


# Clocks


@pytest.mark.parametrize("at", ["in a run", "before a resume"])
def test_a_clock_that_is_set_back_hides_no_newer_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    real = time.time

    class Back(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if at == "in a run" and trainer.global_step == 4:
                monkeypatch.setattr(time, "time", lambda: real() - 3600)

    options = {"checkpoint": {"every_n_epochs": 2 / 7}, "callbacks": lambda pl: [Back()], "validate": False}
    fit(tmp_path, max_epochs=1, **options)
    newest = last_good_checkpoint(tmp_path / "checkpoints")
    assert torch.load(newest, weights_only=True)["global_step"] == 7
    monkeypatch.setattr(time, "time", lambda: real() - 7200)
    fit(tmp_path, max_epochs=2, ckpt_path=str(newest), **options)
    checkpoint = torch.load(last_good_checkpoint(tmp_path / "checkpoints"), weights_only=True)
    assert checkpoint["global_step"] == 14
    first = torch.load(newest, weights_only=True)["lightning_stability"]
    assert checkpoint["lightning_stability"]["run_id"] == first["run_id"]
    assert (first["start"], checkpoint["lightning_stability"]["start"]) == (1, 2)


def test_a_run_that_is_resumed_from_an_older_checkpoint_is_the_newer_one(tmp_path: Path) -> None:
    options = {"checkpoint": {"every_n_epochs": 2 / 7}, "validate": False}
    fit(tmp_path, max_epochs=1, **options)
    older = saved(tmp_path)[0]
    for start, steps in ((2, 4), (3, 3)):
        fit(tmp_path, max_steps=steps, ckpt_path=str(older), **options)
        newest = torch.load(last_good_checkpoint(tmp_path / "checkpoints"), weights_only=True)
        assert (newest["global_step"], newest["lightning_stability"]["start"]) == (steps, start)


# Commands

SCRIPT = """
import sys, os
import torch, pytorch_lightning as pl
from lightning_stability import FractionalCheckpoint, NaNEarlyStop
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel

class Thing: ...

class Model(BoringModel):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters({"width": width, "thing": Thing()})
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        first = not os.path.exists("stopped")
        if batch_idx == 5 and first:
            open("stopped", "w").close()
            return loss * float("nan")
        return loss

if __name__ == "__main__":
    LightningCLI(Model, trainer_defaults=dict(max_epochs=1, logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, limit_val_batches=0,
        callbacks=[NaNEarlyStop(patience=0)]), save_config_callback=None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["script", "module", "module in a package"])
def test_the_resume_command_works_as_printed(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "pack" if "package" in form else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "job.py").write_text(SCRIPT)
    start = {"script": ["job.py"], "module": ["-m", "job"], "module in a package": ["-m", "pack.job"]}[form]
    done = subprocess.run(
        [sys.executable, *start, "fit", "--model.width", "4"], cwd=tmp_path, capture_output=True, text=True
    )
    [line] = [line for line in done.stderr.splitlines() if line.startswith("  resume: ")]
    words = line.removeprefix("  resume: ")
    assert words.startswith("python " + " ".join(start))
    again = subprocess.run(
        words.replace("python", sys.executable, 1), cwd=tmp_path, shell=True, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert "Restored all states" in again.stderr


class Thing:
    """An object of the user's own."""


@pytest.mark.parametrize("thing", [Thing, lambda: Path("there"), lambda: torch.nn.ReLU, lambda: 3])
def test_a_file_with_the_modules_own_objects_is_resumed_as_printed(tmp_path: Path, thing: Any) -> None:
    def module(pl: Any) -> Any:
        made = fits.make_module(pl)
        made.save_hyperparameters({"thing": thing()})
        return made

    fit(tmp_path, max_epochs=1, module=module)
    path = str(saved(tmp_path)[-1])
    with torch.serialization.safe_globals([]):
        torch.serialization.clear_safe_globals()
        command = resume_command(path)
        try:
            torch.load(path, weights_only=True)
        except Exception:
            assert command == f"trainer.fit(model, ckpt_path={path!r}, weights_only=False)"
        else:
            assert command == f"trainer.fit(model, ckpt_path={path!r})"
        fit(tmp_path, max_epochs=2, module=module, ckpt_path=path)
        assert result(tmp_path)["epoch"] == 2
        torch.serialization.clear_safe_globals()


# Folders


def test_an_automatic_callback_makes_no_folder_that_the_project_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    users = pl.callbacks.ModelCheckpoint(tmp_path / "mine")
    automatic = FractionalCheckpoint(1 / 2)
    automatic.automatic = True
    train(tmp_path, automatic, trainer={"callbacks": [users, automatic]}, **logging_values([1.0] * 8))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_a_logger_checkpoints_are_where_lightnings_own_would_be(tmp_path: Path) -> None:
    callback = FractionalCheckpoint(1 / 2)
    train(tmp_path, callback, trainer={"default_root_dir": tmp_path / "root"}, **logging_values([1.0] * 8))
    assert Path(callback.dirpath) == tmp_path / "root" / "checkpoints"


def test_a_run_with_another_seed_than_the_killed_one_is_told_nothing_wrong(tmp_path: Path) -> None:
    """Nothing is warned of where everything is restored."""
    fit(tmp_path, max_epochs=1, validate=False)
    _, said = loudly(tmp_path, max_epochs=2, validate=False, seed=7, ckpt_path=str(saved(tmp_path)[1]))
    assert not [message for message in said if "FractionalCheckpoint" in message]
