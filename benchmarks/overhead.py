"""What a healthy step costs with each callback, with the automatic two, and with all that work in a step.

FractionalCheckpoint does nothing between two saves, and SpikeRecovery takes no snapshot here but where a row says so.
Each way trains blocks of steps that are interleaved with bare blocks in one process. Printed is the median of the
ratios of a block to the bare blocks beside it, with their range, then that of their median steps, which a hiccup does
not move; and the bare step again, for the noise.

usage: python benchmarks/overhead.py [--quick] [--rounds N] [--minutes M] [--device cuda] [--workloads a,b]
                                     [--ways a,b] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare Trainer shall be bare where the package is installed

from common import machine, quiet, save, spread  # noqa: E402
from grad_norm import KeepNothing, Module, SameBatch, Transformer, synchronise  # noqa: E402

from lightning_stability import (  # noqa: E402
    FractionalCheckpoint,
    GradNormMonitor,
    IncidentReport,
    InputCheck,
    NaNEarlyStop,
    PrecisionFallback,
    SpikeRecovery,
)

FOLDER = tempfile.TemporaryDirectory()
BARE = "the bare step again"
RARELY = 10**6
"""Steps until the next snapshot: what one costs is not the steady step's."""


class BetweenSaves(FractionalCheckpoint):
    """Without the save at the end of a fit: a block ends too soon after it began."""

    def on_place(self, trainer: Any, place: Any) -> None:
        if not place.ending:
            super().on_place(trainer, place)


def five() -> list[Any]:
    return [
        NaNEarlyStop(patience=2),
        GradNormMonitor(),
        InputCheck(),
        PrecisionFallback(),
        BetweenSaves(0.9, dirpath=FOLDER.name),
    ]


WAYS: dict[str, Callable[[], list[Any]]] = {
    BARE: list,
    "GradNormMonitor": lambda: [GradNormMonitor()],
    "NaNEarlyStop": lambda: [NaNEarlyStop(patience=2)],
    "both": lambda: [NaNEarlyStop(patience=2), GradNormMonitor()],
    "InputCheck": lambda: [InputCheck()],
    "PrecisionFallback": lambda: [PrecisionFallback()],
    "IncidentReport": lambda: [IncidentReport(FOLDER.name)],
    "SpikeRecovery": lambda: [SpikeRecovery(every_n_steps=RARELY)],
    "SpikeRecovery, every 15": lambda: [SpikeRecovery(every_n_steps=15)],
    "these five together": five,
    "all seven": lambda: [*five(), IncidentReport(FOLDER.name), SpikeRecovery(every_n_steps=RARELY)],
}
"""(The five: NaNEarlyStop, GradNormMonitor, InputCheck, PrecisionFallback and FractionalCheckpoint.)"""


class Clock(pl.Callback):
    """Times the steps of a block, from the start of one batch to that of another."""

    WARM_UP = 3

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.times = device, steps, list[float]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.WARM_UP, self.WARM_UP + self.steps):
            synchronise(self.device)
        if batch_idx >= self.WARM_UP:
            self.times.append(time.perf_counter())

    @property
    def mean(self) -> float:
        """Seconds of a step."""
        return (self.times[self.steps] - self.times[0]) / self.steps

    @property
    def median(self) -> float:
        """The same of the step in the middle."""
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))


class Net(Module):
    """With the optimizer that a workload asks for."""

    def __init__(self, net: nn.Module, fused: bool) -> None:
        super().__init__(net)
        self.fused = fused

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6, fused=self.fused, foreach=None if self.fused else True)


def batch_norms() -> nn.Module:
    """53 of them, as a ResNet-50 has, each behind a small convolution."""
    parts = [part for _ in range(53) for part in (nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU())]
    return nn.Sequential(*parts)


def make_workload(name: str, device: torch.device, quick: bool) -> tuple[Net, Tensor, str, int]:
    """The module, its batch, its precision and the steps of a block."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    if name == "batch_norms":
        return Net(batch_norms(), True), torch.randn(8, 16, 8, 8), "bf16-mixed", 150 if cuda else 10
    width, layers, length, vocabulary = (768, 12, 1024, 50_304) if cuda and not quick else (128, 2, 64, 1_000)
    net = Transformer(width, layers, 12 if width == 768 else 4, vocabulary, length)
    tokens = torch.randint(0, 1_000, (16 if cuda else 2, length))
    fused = name == "gpt_bf16_fused"
    return Net(net, fused), tokens, "bf16-mixed" if fused or not cuda else "16-mixed", 30 if cuda else 6


def block(module: Net, batch: Tensor, precision: str, steps: int, callbacks: list[Any], device: torch.device) -> Clock:
    """Train a block of steps and time them."""
    clock = Clock(device, steps)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=Clock.WARM_UP + steps + 1,
        logger=KeepNothing(),
        log_every_n_steps=50,
        callbacks=[*callbacks, clock],
        enable_checkpointing=any(isinstance(callback, FractionalCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=FOLDER.name,
    )
    trainer.fit(module, DataLoader(SameBatch(batch), batch_size=None))
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, 2 rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8, help="no more rounds than fit; one in any case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", default="batch_norms,gpt_bf16_fused,gpt_fp16_foreach")
    parser.add_argument("--ways", help="names of ways, with commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = {way: make for way, make in WAYS.items() if options.ways is None or way in (BARE, *options.ways.split(","))}
    quiet()
    device = torch.device(options.device)
    names = options.workloads.split(",")
    report: dict[str, Any] = {"machine": machine(device), "workloads": {}}
    print(report["machine"], flush=True)
    for name in names:
        deadline = time.monotonic() + 60 * options.minutes / len(names)
        rounds = 2 if options.quick else options.rounds
        report["workloads"][name] = of_workload = measure(name, ways, device, options.quick, rounds, deadline)
        print_workload(name, of_workload)
        save(report, options.json)


def measure(
    name: str, ways: dict[str, Callable[[], list[Any]]], device: torch.device, quick: bool, rounds: int, deadline: float
) -> dict[str, Any]:
    """The ratios of each way, from as many rounds as fit."""
    module, batch, precision, steps = make_workload(name, device, quick)
    batch = batch.to(device)

    def train(callbacks: list[Any]) -> Clock:
        return block(module, batch, precision, steps, callbacks, device)

    train([])  # warms everything up
    order, bare = list(ways), [train([])]
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    of_medians: dict[str, list[float]] = {way: [] for way in ways}
    done = 0
    while done < rounds and not (done and time.monotonic() > deadline):
        random.Random(done).shuffle(order)
        for way in order:
            clock = train(ways[way]())
            bare.append(train([]))
            ratios[way].append(2 * clock.mean / (bare[-2].mean + bare[-1].mean))
            of_medians[way].append(2 * clock.median / (bare[-2].median + bare[-1].median))
        done += 1
    return {
        "precision": precision,
        "rounds": done,
        "bare_ms": spread([1e3 * clock.mean for clock in bare]),
        "ratios": {way: spread(values) for way, values in ratios.items()},
        "ratios_of_medians": {way: spread(values) for way, values in of_medians.items()},
    }


def print_workload(name: str, figures: dict[str, Any]) -> None:
    bare = figures["bare_ms"]["median"]
    print(f"{name}, {figures['precision']}: bare step {bare:.2f} ms, {figures['rounds']} rounds")
    for way, mean in figures["ratios"].items():
        median = figures["ratios_of_medians"][way]
        both = "   ".join(f"{r['median']:6.3f} ({r['min']:.3f} to {r['max']:.3f})" for r in (mean, median))
        print(f"  {way:26s} {both}", flush=True)


if __name__ == "__main__":
    main()
