"""What a healthy step costs with each callback, with the automatic two, and with all that work in a step.

FractionalCheckpoint does nothing between two saves, and SpikeRecovery takes no snapshot here but where a row says so.
Each way trains blocks of steps that are interleaved with bare blocks in one process. Printed is the median of the
ratios of a block to the bare blocks beside it, with their range, then that of their median steps, which a hiccup does
not move; and the bare step again, for the noise.

usage: python benchmarks/overhead.py [--quick] [--rounds N] [--minutes M] [--device cuda] [--workloads a,b]
                                     [--ways a,b] [--json FILE]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare Trainer shall be bare where the package is installed

from common import machine, quiet, save  # noqa: E402
from common.blocks import Clock, Ways, interleaved, parser, train_block, within  # noqa: E402
from common.nets import Transformer, batch_norms  # noqa: E402
from grad_norm import Module  # noqa: E402

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


WAYS: Ways = {
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


class Net(Module):
    """With the optimizer that a workload asks for."""

    def __init__(self, net: nn.Module, fused: bool) -> None:
        super().__init__(net)
        self.fused = fused

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6, fused=self.fused, foreach=None if self.fused else True)


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


def main() -> None:
    options_of = parser(__doc__, rounds=9, minutes=8)
    options_of.add_argument("--quick", action="store_true", help="a small network, 2 rounds")
    options_of.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options_of.add_argument("--workloads", default="batch_norms,gpt_bf16_fused,gpt_fp16_foreach")
    options = options_of.parse_args()
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


def measure(name: str, ways: Ways, device: torch.device, quick: bool, rounds: int, deadline: float) -> dict[str, Any]:
    """The ratios of each way, from as many rounds as fit."""
    module, batch, precision, steps = make_workload(name, device, quick)
    batch = batch.to(device)

    def train(callbacks: list[Any]) -> Clock:
        return train_block(module, batch, Clock(device, steps), callbacks, FOLDER.name, precision=precision)

    train([])  # warms everything up
    return {"precision": precision, **interleaved(train, ways, within(rounds, deadline))}


def print_workload(name: str, figures: dict[str, Any]) -> None:
    bare = figures["bare_ms"]["median"]
    print(f"{name}, {figures['precision']}: bare step {bare:.2f} ms, {figures['rounds']} rounds")
    for way, mean in figures["ratios"].items():
        median = figures["ratios_of_medians"][way]
        both = "   ".join(f"{r['median']:6.3f} ({r['min']:.3f} to {r['max']:.3f})" for r in (mean, median))
        print(f"  {way:26s} {both}", flush=True)


if __name__ == "__main__":
    main()
