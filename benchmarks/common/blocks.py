"""Blocks of steps on one batch, timed: what the benchmarks that compare step times share."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch.utils.data import DataLoader, Dataset

from common import spread
from lightning_stability import FractionalCheckpoint

Ways = dict[str, Callable[[], list[Any]]]
"""For each way, how its callbacks are made."""
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
"""Where the host waits for a GPU."""
Attached = TypeVar("Attached")


class SameBatch(Dataset[Any]):
    """One batch over and over, so that no loading is timed."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Any:
        return self.batch


class KeepNothing(Logger):
    """A logger that costs nothing, the same for every way."""

    name = "none"
    version = "0"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock(pl.Callback):
    """Times the steps of a block, from the start of one batch to that of another."""

    WARM_UP = 3

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.times = device, steps, list[float]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.WARM_UP, self.WARM_UP + self.steps):
            synchronise(self.device)
        if batch_idx >= self.WARM_UP:
            self.times.append(self.now())

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    @property
    def mean(self) -> float:
        """Seconds of a step."""
        return (self.times[self.steps] - self.times[0]) / self.steps

    @property
    def median(self) -> float:
        """The same of the step in the middle."""
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def train_block(
    module: pl.LightningModule,
    batch: Any,
    clock: Clock,
    callbacks: list[Any],
    folder: str,
    **options: Any,
) -> Clock:
    """Train as many steps as the clock times, on the clock's device.

    Args:
        module: What is trained.
        batch: On its device.
        clock: Is the last callback.
        callbacks: The way that is timed.
        folder: For what they write.
        **options: More for the Trainer.
    """
    defaults = {
        "accelerator": "gpu" if clock.device.type == "cuda" else "cpu",
        "devices": 1,
        "max_steps": Clock.WARM_UP + clock.steps + 1,
        "logger": KeepNothing(),
        "log_every_n_steps": 50,
        "callbacks": [*callbacks, clock],
        "enable_checkpointing": any(isinstance(callback, FractionalCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    pl.Trainer(**(defaults | options)).fit(module, DataLoader(SameBatch(batch), batch_size=None))
    return clock


def within(rounds: int, deadline: float) -> Callable[[int], bool]:
    """Whether another round is trained: as many as there shall be, no more than fit, one in any case.

    Args:
        rounds: At most.
        deadline: By `time.monotonic`.
    """
    return lambda done: done < rounds and (not done or time.monotonic() < deadline)


def interleaved(
    train: Callable[[Attached], Clock],
    ways: dict[str, Callable[[], Attached]],
    go_on: Callable[[int], bool],
    after_round: Callable[[dict[str, Any]], None] = lambda figures: None,
    nothing: Callable[[], Any] = list,
) -> dict[str, Any]:
    """The ratio of each way's blocks to the bare blocks before and after, of mean and of median steps.

    Args:
        train: Trains a block with what a way attaches; some callbacks, say.
        ways: What is compared, in an order that is drawn for each round.
        go_on: Whether another round is trained after this many.
        after_round: Gets the figures so far.
        nothing: What a bare block has attached.
    """
    order, bare, rounds = list(ways), [train(nothing())], 0
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    of_medians: dict[str, list[float]] = {way: [] for way in ways}
    milliseconds: dict[str, list[float]] = {way: [] for way in ways}
    figures: dict[str, Any] = {}
    while go_on(rounds):
        random.Random(rounds).shuffle(order)
        for way in order:
            clock = train(ways[way]())
            bare.append(train(nothing()))
            ratios[way].append(2 * clock.mean / (bare[-2].mean + bare[-1].mean))
            of_medians[way].append(2 * clock.median / (bare[-2].median + bare[-1].median))
            milliseconds[way].append(1e3 * clock.mean)
        rounds += 1
        figures = {
            "rounds": rounds,
            "bare_ms": spread([1e3 * clock.mean for clock in bare]),
            "ms": {way: spread(values) for way, values in milliseconds.items()},
            "ratios": {way: spread(values) for way, values in ratios.items()},
            "ratios_of_medians": {way: spread(values) for way, values in of_medians.items()},
        }
        after_round(figures)
    return figures


def parser(
    description: str | None, *, rounds: int | None, minutes: float | None, of_rounds: str | None = None
) -> argparse.ArgumentParser:
    """The options that benchmarks of step times share.

    Args:
        description: The docstring of the script.
        rounds: How many by default.
        minutes: How long by default; None leaves the option out.
        of_rounds: More about the rounds.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=of_rounds)
    if minutes is not None:
        made.add_argument("--minutes", type=float, default=minutes, help="no more rounds than fit; one in any case")
    made.add_argument("--ways", help="names of ways, with commas")
    made.add_argument("--json", type=Path)
    return made
