"""Exact resumes of runs that are not the usual one: samplers and loaders of all kinds, callbacks that change the run.

Each case is resumed from every checkpoint that it wrote, and has to end bit-equal with the run that went through.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanSquaredError
from torchmetrics.aggregation import RunningMean
from torchmetrics.wrappers import MinMaxMetric

from tests import checkpoint_fit as fits
from tests import runs
from tests.callbacks.test_fractional_checkpoint import fit, result, resume_from_all, saved

pl = runs.load_namespace("pytorch_lightning")
Base: Any = type(fits.make_module(pl))


def stateful(count: int = 28, **options: Any) -> Any:
    return StatefulDataLoader(fits.Samples(count), **{"batch_size": 4, "shuffle": True, **options})


# Loaders


class Batches(Sampler[list[int]]):
    """A batch sampler whose `set_epoch` Lightning does not call, as it calls that of samplers only."""

    epoch = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(28, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([order[4 * i : 4 * i + 4] for i in range(7)])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class SetEpoch(Sampler[int]):
    epoch = 0

    def __len__(self) -> int:
        return 28

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(28, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ChangingData(pl.LightningDataModule):
    """Epochs of 7, 4 and 10 batches, in turn, as curricula have."""

    def train_dataloader(self) -> Any:
        return stateful([28, 16, 40][self.trainer.current_epoch % 3])

    def val_dataloader(self) -> Any:
        return StatefulDataLoader(fits.Samples(8, augment=False), batch_size=4)


class SeveralBatches(Base):
    """Trains on what several loaders give."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in batch if part is not None]
        x, indices = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return super().training_step((x, indices), batch_idx)


def combined(mode: str, *loaders: Callable[[], Any]) -> dict[str, Any]:
    return {"module": lambda pl: SeveralBatches(), "data": lambda: CombinedLoader([make() for make in loaders], mode)}


def plain(count: int = 28, **options: Any) -> Any:
    augment = options.pop("augment", True)
    return DataLoader(fits.Samples(count, augment), **{"batch_size": 4, "shuffle": True, **options})


class Buckets(Sampler[list[int]]):
    """Counts its epochs, and draws from a global generator while it is asked."""

    def __init__(self) -> None:
        self.epochs = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        for first in range(0, 28, 4):
            bucket = [(index + self.epochs) % 28 for index in range(first, first + 4)]
            random.shuffle(bucket)
            yield bucket


class SeededPerSample(fits.Samples):
    """Noise from the seed of the worker that makes the sample, and its index."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        worker = torch.utils.data.get_worker_info()
        generator = torch.Generator().manual_seed((worker.seed + index) % 2**63)
        return self.x[index] + torch.rand((), generator=generator), index


class WithoutState(IterableDataset):
    """In an order that each epoch draws."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        samples = fits.Samples(32, augment=False)
        return iter([samples[index] for index in torch.randperm(32).tolist()])


class PlainChangingData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return plain([28, 16, 40][self.trainer.current_epoch % 3])

    def val_dataloader(self) -> Any:
        return plain(8, augment=False)


def stream() -> Any:
    return fits.loader("stream", 0, True)


LOADERS: dict[str, dict[str, Any]] = {
    "plain": {"data": plain, "val_check_interval": 2, "validate": lambda: plain(8)},
    "plain, a generator of its own": {"data": lambda: plain(generator=torch.Generator().manual_seed(3))},
    "plain, drawn with replacement": {
        "data": lambda: plain(
            shuffle=None,
            sampler=RandomSampler(range(28), replacement=True, generator=torch.Generator().manual_seed(1)),
        )
    },
    "plain, a batch sampler that draws as it goes": {
        "data": lambda: DataLoader(fits.Samples(), batch_sampler=Buckets())
    },
    "plain, workers seeded as they were": {
        "data": lambda: DataLoader(
            SeededPerSample(), batch_size=4, shuffle=True, num_workers=3, persistent_workers=True, prefetch_factor=3
        ),
        "max_epochs": 3,
    },
    "plain, workers started for each epoch": {
        "data": lambda: DataLoader(SeededPerSample(), batch_size=4, shuffle=True, num_workers=2)
    },
    "plain and short, beside another": combined("max_size_cycle", stateful, lambda: plain(12)),
    "plain, epochs of changing length": {
        "data": PlainChangingData,
        "max_epochs": 3,
        "reload_dataloaders_every_n_epochs": 2,
        "accumulate_grad_batches": 2,
    },
    "plain, limited": {"data": plain, "limit_train_batches": 5},
    "plain data without a position, skipped by loading": {
        "data": lambda: DataLoader(WithoutState(), batch_size=4),
        "checkpoint": {"steps_per_epoch": 8, "skip_by_loading": True},
    },
    "batch sampler with set_epoch": {"data": lambda: StatefulDataLoader(fits.Samples(), batch_sampler=Batches())},
    "sampler with set_epoch": {"data": lambda: stateful(shuffle=None, sampler=SetEpoch())},
    "two loaders, the longest counts": combined("max_size", stateful, lambda: stateful(20)),
    "two loaders, the shorter begins again": combined("max_size_cycle", stateful, lambda: stateful(12)),
    "two loaders, the shortest counts": combined("min_size", stateful, lambda: stateful(20)),
    "a stream and a shorter loader": {
        **combined("max_size_cycle", stream, lambda: stateful(12)),
        "checkpoint": {"steps_per_epoch": 8},
    },
    "epochs of changing length": {
        "data": ChangingData,
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "reload_dataloaders_every_n_epochs": 1,
        "checkpoint": {"every_n_epochs": 0.3},
    },
    "loaders kept for two epochs": {"data": ChangingData, "max_epochs": 3, "reload_dataloaders_every_n_epochs": 2},
    "shuffled validation": {"validate": lambda: stateful(8), "val_check_interval": 2},
    "validation in an order of its own, not in the first epoch": {
        "validate": lambda: DataLoader(
            fits.Samples(8), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(4)
        ),
        "check_val_every_n_epoch": 2,
        "max_epochs": 4,
        "checkpoint": {"every_n_epochs": 1.2},
    },
    "a batch size of its own, a last batch that is short, workers kept": {
        "data": lambda: StatefulDataLoader(
            fits.Samples(30, augment=False), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True
        ),
        "limit_train_batches": 0.9,
        "check_val_every_n_epoch": None,
        "val_check_interval": 10,
    },
}


# Modules, and callbacks that change what is trained


class Adversaries(pl.LightningModule):
    """Two optimizers in turn; the first also steps on gradients that came with the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.BatchNorm1d(6))
        self.b = nn.Linear(6, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self.b(self.a(batch[0])).pow(2).mean()
        self.seen.append(batch[1].tolist())
        mine = second if batch_idx % 2 else first
        mine.zero_grad()
        self.manual_backward(loss)
        mine.step()
        if batch_idx % 2 and batch_idx % 3 == 0:
            first.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log("train_loss", loss, on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.a.parameters(), 1e-2)
        second = torch.optim.SGD(self.b.parameters(), 1e-2, momentum=0.9)
        return [first, second], [
            torch.optim.lr_scheduler.StepLR(first, 3),
            torch.optim.lr_scheduler.CosineAnnealingLR(second, 10),
        ]


class AccumulatesByHand(pl.LightningModule):
    """A window of three batches, across the borders of epochs of seven."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 1))
        self.seen: list[list[int]] = []
        self.batches = nn.Parameter(torch.zeros(()), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.net(batch[0]).pow(2).mean()
        self.seen.append(batch[1].tolist())
        self.manual_backward(loss)
        self.batches += 1
        if self.batches % 3 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        self.log("train_loss", loss, on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), 1e-2)


class Wrappers(Base):
    """Metrics that keep something beside their states, and metrics logged from every hook that can."""

    def __init__(self) -> None:
        super().__init__()
        self.extremes, self.recent = MinMaxMetric(MeanSquaredError()), RunningMean(window=4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.extremes.update(loss.detach().view(1), torch.zeros(1))
        self.recent.update(loss.detach())
        self.log("recent", self.recent.compute())
        self.log("sum", loss.detach(), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log_dict(self.extremes.compute())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("drawn", torch.rand(()), on_step=True, on_epoch=True)


class DrawsWhenSaving(Base):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"torch": torch.rand(()), "python": random.random()}


class Backbone(Base):
    """`BackboneFinetuning` trains the backbone from epoch 1 on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


class Doubles(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0].double(), batch[1]), batch_idx)


MODULES: dict[str, dict[str, Any]] = {
    "two optimizers in turn": {"module": lambda pl: Adversaries(), "checkpoint": {"every_n_epochs": 3 / 7}},
    "accumulation by hand across epochs": {
        "module": lambda pl: AccumulatesByHand(),
        "checkpoint": {"every_n_epochs": 0.5},
    },
    "metrics that keep more than states": {"module": lambda pl: Wrappers(), "checkpoint": {"every_n_epochs": 1 / 3}},
    "random numbers drawn while saving": {"module": lambda pl: DrawsWhenSaving()},
    "64-true": {"module": lambda pl: Doubles(), "precision": "64-true", "validate": False},
    "averaged weights": {"callbacks": lambda pl: [pl.callbacks.EMAWeightAveraging(decay=0.8)]},
    "stochastic weight averaging": {
        "callbacks": lambda pl: [pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)]
    },
    "a backbone that is frozen at first": {
        "module": lambda pl: Backbone(),
        "callbacks": lambda pl: [pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
        "max_epochs": 3,
    },
    "accumulation that grows": {
        "callbacks": lambda pl: [pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})],
        "max_epochs": 3,
    },
    "an early stop that waits for min_epochs": {
        "callbacks": lambda pl: [pl.callbacks.EarlyStopping("val_loss", patience=0, min_delta=1e9)],
        "min_epochs": 2,
        "max_epochs": 9,
        "val_check_interval": 3,
        "checkpoint": {"every_n_epochs": 13 / 14},
    },
}


SLOW = ("workers", "the shortest counts")  # in parts of their names


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if any(part in name for part in SLOW) else ())
        for name in (*LOADERS, *MODULES)
    ],
)
def test_resumed_from_any_of_its_checkpoints_it_ends_as_if_it_had_not_been_interrupted(
    tmp_path: Path, name: str
) -> None:
    fits.needs_new_swa(name)
    case = {**LOADERS, **MODULES}[name]
    options = {"max_epochs": 2, **case, "checkpoint": {"every_n_epochs": 0.4, **case.get("checkpoint", {})}}
    fit(tmp_path, **options)
    paths = saved(tmp_path)
    assert len(paths) >= 2, "what is by design not finite must not keep it from saving"
    if "early stop" in name:
        assert result(tmp_path)["epoch"] == 2
    resume_from_all(paths, tmp_path, options)
