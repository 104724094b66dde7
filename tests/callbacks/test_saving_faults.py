"""What a save must not refuse, lose or leave unsaid: forms of faults that runs in the field have shown."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_stability import NaNEarlyStop
from lightning_stability.checkpointing import last_good_checkpoint, list_checkpoints, writing
from lightning_stability.checkpointing.listing import newest_good
from lightning_stability.checkpointing.stopping import FILE_NAME
from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import saved
from tests.callbacks.test_fractional_checkpoint_troubles import loudly, small_disk

__all__ = ["small_disk"]

pl = runs.load_namespace("pytorch_lightning")
Base: Any = type(fits.make_module(pl))
INF = math.inf


# Infinities by design


class FrozenMask(Base):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.triu(torch.full((8, 8), -INF), 1), requires_grad=False)


class FrozenMaskThatIsFilled(Base):
    """Finite at first; filled when an epoch starts."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(8, 8), requires_grad=False)

    def on_train_epoch_start(self) -> None:
        self.hidden.data.fill_(-INF)


class MaskOfTheFirstForward(Base):
    """Filled in place, among distances that are neither 0 nor 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(4, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.hidden.any():
            self.hidden += torch.arange(16.0).view(4, 4) + torch.triu(torch.full((4, 4), -INF), 1)
        return super().training_step(batch, batch_idx)


class MaskThatIsMade(Base):
    """Of another shape in every batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.register_buffer("hidden", torch.triu(torch.full((batch_idx + 2,) * 2, INF), 1))
        return super().training_step(batch, batch_idx)


class PaddingMask(Base):
    """Other places in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.hidden = torch.zeros(8).masked_fill(torch.arange(8) == batch_idx % 8, -INF)
        return super().training_step(batch, batch_idx)


class MetricBeforeItsFirstUpdate(Base):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = torchmetrics.MinMetric()
        self.hidden.persistent(True)


class MetricThatIsReset(MetricBeforeItsFirstUpdate):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.hidden.update(batch[0].mean())
        if batch_idx % 2:
            self.hidden.reset()
        return super().training_step(batch, batch_idx)


class BufferThatIsReset(Base):
    """Finite at first; reset when an epoch starts, or when it ends."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(()))
        setattr(self, hook, self.reset)

    def reset(self) -> None:
        self.hidden.fill_(INF)


class BufferThatStartsInfinite(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.tensor(INF))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.hidden = torch.minimum(self.hidden, loss.detach()) if batch_idx % 3 else torch.tensor(INF)
        return loss


BY_DESIGN: dict[str, Any] = {
    "a frozen parameter": FrozenMask,
    "a frozen parameter that a hook fills": FrozenMaskThatIsFilled,
    "a mask that the first forward pass fills in": MaskOfTheFirstForward,
    "a mask that is made anew in another shape": MaskThatIsMade,
    "a mask of padding": PaddingMask,
    "a metric before its first update": MetricBeforeItsFirstUpdate,
    "a metric that is reset": MetricThatIsReset,
    "a buffer that is reset when an epoch starts": lambda: BufferThatIsReset("on_train_epoch_start"),
    "a buffer that is reset when an epoch ends": lambda: BufferThatIsReset("on_train_epoch_end"),
    "a buffer that starts infinite": BufferThatStartsInfinite,
}


@pytest.mark.parametrize("name", BY_DESIGN)
def test_infinities_by_design_are_saved_before_and_after_a_resume(tmp_path: Path, name: str) -> None:
    options = {"module": lambda pl: BY_DESIGN[name](), "checkpoint": {"every_n_epochs": 1 / 7}}
    if "another shape" in name:
        options["checkpoint"] = {"every_n_epochs": 1 / 7, "save_weights_only": True}  # none loads into another shape
    _, said = loudly(tmp_path, max_epochs=1, **options)
    assert [info.step for info in list_checkpoints(tmp_path / "checkpoints") if "last" not in info.path.name] == [
        *range(1, 8)
    ], said
    assert not [message for message in said if "non-finite" in message]
    infos = list_checkpoints(tmp_path / "checkpoints", verify=True)
    if "another shape" not in name:
        assert all(info.is_good for info in infos), infos
        _, said = loudly(tmp_path, max_epochs=2, ckpt_path=str(saved(tmp_path)[3]), **options)
        assert len(saved(tmp_path)) == 7 + 3 + 7, "those of before are overwritten by none"


# Damage


class Damage(pl.Callback):
    """Writes a non-finite value where it is no design."""

    def __init__(self, where: str, value: float = INF) -> None:
        self.where, self.value = where, value

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            state = trainer.optimizers[0].state[module.net[0].weight]
            tensors = {**module.state_dict(), "exp_avg_sq": state["exp_avg_sq"], "bank": getattr(module, "bank", None)}
            tensors[self.where].view(-1)[0] = self.value


class Bank(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.rand(4), persistent=False)


class Teacher(Base):
    """A frozen parameter that training writes."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Parameter(torch.rand(4), requires_grad=False)


class Everything(BufferThatStartsInfinite):
    """Infinite elsewhere by design, at a place that is not damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor([1.0, -INF, 2.0]))


@pytest.mark.parametrize(
    ("where", "value", "module"),
    [
        ("net.0.weight", INF, Base),
        ("net.0.weight", -INF, Base),
        ("net.1.running_var", INF, Base),
        ("average", INF, Base),
        ("exp_avg_sq", INF, Base),
        ("table", -INF, Everything),
        ("hidden", math.nan, Everything),
        ("mask", math.nan, Everything),
        ("bank", math.nan, Bank),
        ("teacher", INF, Teacher),
    ],
)
def test_what_became_non_finite_is_refused_and_named_at_once(
    tmp_path: Path, where: str, value: float, module: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, said = loudly(
            tmp_path,
            max_epochs=1,
            validate=False,
            module=lambda pl: module(),
            checkpoint={"every_n_epochs": 1 / 7},
            callbacks=lambda pl: [Damage(where, value)],
        )
    assert 3 not in [info.step for info in list_checkpoints(tmp_path / "checkpoints")]
    refused = [message for message in said if "nothing was saved at step 3" in message]
    assert len(refused) == 1
    assert where in refused[0]
    assert "allow_nonfinite" in refused[0]
    assert "step=000002.ckpt stays the newest" in refused[0]


def test_weights_that_are_not_finite_at_the_start_are_named_before_the_first_batch(tmp_path: Path) -> None:
    class Broken(Base):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].bias.data[0] = math.nan

    _, said = loudly(tmp_path, max_epochs=1, module=lambda pl: Broken(), checkpoint={"every_n_epochs": 5})
    assert [message for message in said if "nothing will be saved as things are: net.0.bias" in message]
    assert not saved(tmp_path)


@pytest.mark.parametrize("names", ["average", ["aver*"]])
def test_what_the_user_allows_may_become_non_finite(tmp_path: Path, names: Any) -> None:
    checkpoint = {"every_n_epochs": 1 / 7, "allow_nonfinite": names}
    loudly(tmp_path, max_epochs=1, checkpoint=checkpoint, callbacks=lambda pl: [Damage("average")])
    assert len(saved(tmp_path)) == 7
    assert all(info.is_good for info in list_checkpoints(tmp_path / "checkpoints", verify=True))


# A stop


@pytest.mark.parametrize(("bad", "steps"), [(3, {3}), (4, {3, 5})])
@pytest.mark.parametrize("end", ["stop", "raise", "another callback"])
def test_a_stop_waits_for_the_write_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, bad: int, steps: set[int]
) -> None:
    import time

    run = writing.run

    def slowly(job: Any) -> None:
        time.sleep(0.3)
        run(job)

    monkeypatch.setattr(writing, "run", slowly)

    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            if end == "another callback" and not torch.isfinite(outputs["loss"]):
                raise ArithmeticError("on purpose")

    logger = pl.loggers.CSVLogger(tmp_path / "logs")
    guard = NaNEarlyStop(patience=0, action="raise" if end == "raise" else "stop")
    options = {
        "logger": logger,
        "module": {"bad": bad},
        "validate": False,
        "callbacks": lambda pl: [guard, Fails()],
        "checkpoint": {"every_n_epochs": 3 / 7, "async_save": True, "dirpath": tmp_path / "c"},
    }
    try:
        trainer, _ = loudly(tmp_path, **options)
        assert end == "stop"
        [callback] = trainer.checkpoint_callbacks
        assert Path(callback.best_model_path).exists()
    except (ArithmeticError, RuntimeError):
        assert end != "stop"
    events = [event["event"] for event in runs.incidents(logger.log_dir)]
    assert events.count("checkpoint_saved") == 1
    assert {info.step for info in list_checkpoints(tmp_path / "c", verify=True) if info.is_good} == steps


def test_a_write_that_fails_while_the_run_is_stopped_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Any) -> None:
        raise OSError("on purpose")

    monkeypatch.setattr(writing, "run", fail)
    logger = pl.loggers.CSVLogger(tmp_path / "logs")
    options = {"module": {"bad": 3}, "validate": False, "patience": 0, "logger": logger}
    checkpoint = {"every_n_epochs": 3 / 7, "async_save": True, "dirpath": tmp_path / "c"}
    trainer, said = loudly(tmp_path, checkpoint=checkpoint, **options)
    assert "checkpoint_failed" in [event["event"] for event in runs.incidents(logger.log_dir)]
    assert [message for message in said if "on purpose" in message]
    assert trainer.checkpoint_callbacks[0].best_model_path == "", "it names no file that is not there"


class Grows(Base):
    """Its second checkpoint is larger than its first."""

    def __init__(self) -> None:
        super().__init__()
        self.cat = torchmetrics.CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.cat.update(torch.ones(2000))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("save", ["fractional", "none"])
@pytest.mark.parametrize("room", [0, 40_000])
@pytest.mark.parametrize("small_disk", [400], indirect=True)
def test_a_second_stop_on_a_full_disk_leaves_the_first_ones_file(small_disk: Path, save: str, room: int) -> None:
    class Bad(pl.Callback):
        def __init__(self, at: int, fill: bool) -> None:
            self.at, self.fill = at, fill

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
                batch[0].fill_(math.nan)
                if self.fill:
                    import shutil

                    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))

    options: dict[str, Any] = {"module": lambda pl: Grows(), "validate": False, "max_epochs": 1}
    if save == "none":
        options["checkpoint"] = "none"
        where = small_disk / "run"
    else:
        options["checkpoint"] = {"every_n_epochs": 10, "dirpath": small_disk / "run" / "checkpoints"}
        where = small_disk.parent / "run"
    kept = small_disk / "run" / "checkpoints" / FILE_NAME
    loudly(where, callbacks=lambda pl: [NaNEarlyStop(patience=0), Bad(2, False)], **options)
    before = kept.read_bytes()
    _, said = loudly(
        where, callbacks=lambda pl: [NaNEarlyStop(patience=0), Bad(5, True)], ckpt_path=str(kept), **options
    )
    [message] = [message for message in said if "ended the run" in message]
    assert kept.read_bytes() == before
    assert str(kept) in message
    assert last_good_checkpoint(kept.parent) == kept


@pytest.mark.parametrize("damage", ["cut short", "flipped"])
def test_a_stop_recommends_no_file_that_it_cannot_read(tmp_path: Path, damage: str) -> None:
    class Harm(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                newest = saved(tmp_path)[-1]
                raw = bytearray(newest.read_bytes())
                if damage == "flipped":
                    raw[len(raw) // 2] ^= 0x40
                newest.unlink()  # `last.ckpt` is the same file
                (tmp_path / "checkpoints" / "last.ckpt").unlink()
                newest.write_bytes(raw if damage == "flipped" else raw[:-100])

    monitor = {"module": {"bad": 4}, "checkpoint": {"every_n_epochs": 2 / 7}, "validate": False, "max_epochs": 1}
    callbacks = lambda pl: [NaNEarlyStop(patience=0), Harm()]  # noqa: E731
    _, said = loudly(tmp_path, callbacks=callbacks, **monitor)
    [message] = [message for message in said if "ended the run" in message]
    good = newest_good(list_checkpoints(tmp_path / "checkpoints"))
    assert f"last good checkpoint: {good}\n" in message
    assert good != saved(tmp_path)[1]
