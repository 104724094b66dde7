"""What a healthy step costs with each callback, with the automatic two, and with all that work in a step.

FractionalCheckpoint is left out: it does nothing between two saves. Each way trains blocks of steps that are
interleaved with bare blocks in one process. Printed is the median of the ratios of a block to the bare blocks beside
it, with their range; and the bare step again, for the noise.

usage: python benchmarks/overhead.py [--quick] [--rounds N] [--minutes M] [--device cuda] [--workloads a,b]
                                     [--json FILE]
"""

from __future__ import annotations

import argparse
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

from common import machine, quiet, save, spread  # noqa: E402
from grad_norm import Clock, KeepNothing, Module, SameBatch, Transformer  # noqa: E402

from lightning_stability import (  # noqa: E402
    GradNormMonitor,
    IncidentReport,
    InputCheck,
    NaNEarlyStop,
    PrecisionFallback,
)

FOLDER = tempfile.TemporaryDirectory()

WAYS: dict[str, Callable[[], list[Any]]] = {
    "the bare step again": list,
    "GradNormMonitor": lambda: [GradNormMonitor()],
    "NaNEarlyStop": lambda: [NaNEarlyStop(patience=2)],
    "both": lambda: [NaNEarlyStop(patience=2), GradNormMonitor()],
    "InputCheck": lambda: [InputCheck()],
    "PrecisionFallback": lambda: [PrecisionFallback()],
    "IncidentReport": lambda: [IncidentReport(FOLDER.name)],
    "NaNEarlyStop and IncidentReport": lambda: [NaNEarlyStop(patience=2), IncidentReport(FOLDER.name)],
    "these four together": lambda: [NaNEarlyStop(patience=2), GradNormMonitor(), InputCheck(), PrecisionFallback()],
}  # fmt: skip


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
    return Net(net, fused), tokens, "bf16-mixed" if fused or not cuda else "16-mixed", 40 if cuda else 6


def block(module: Net, batch: Tensor, precision: str, steps: int, callbacks: list[Any], device: torch.device) -> float:
    """The seconds of one step."""
    clock = Clock(device)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=Clock.WARM_UP + steps,
        logger=KeepNothing(),
        log_every_n_steps=50,
        callbacks=[*callbacks, clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=FOLDER.name,
    )
    trainer.fit(module, DataLoader(SameBatch(batch), batch_size=None))
    return clock.seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, 2 rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8, help="no more rounds than fit; one in any case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", default="batch_norms,gpt_bf16_fused,gpt_fp16_foreach")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    device = torch.device(options.device)
    names = options.workloads.split(",")
    report: dict[str, Any] = {"machine": machine(device), "workloads": {}}
    minutes = options.minutes / len(names)
    for name in names:
        deadline = time.monotonic() + 60 * minutes
        module, batch, precision, steps = make_workload(name, device, options.quick)
        batch = batch.to(device)
        bare: list[float] = [block(module, batch, precision, steps, [], device)]  # the first one warms everything up
        ratios: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(2 if options.quick else options.rounds):
            if number and time.monotonic() > deadline:
                break
            bare.append(block(module, batch, precision, steps, [], device))
            for way, make in WAYS.items():
                seconds = block(module, batch, precision, steps, make(), device)
                bare.append(block(module, batch, precision, steps, [], device))
                ratios[way].append(2 * seconds / (bare[-2] + bare[-1]))
        of_workload = {way: spread(values) for way, values in ratios.items()}
        report["workloads"][name] = {
            "precision": precision,
            "bare_ms": spread([1e3 * b for b in bare[1:]]),
            "ratios": of_workload,
        }
        print(f"{name}, {precision}: bare step {1e3 * sorted(bare)[len(bare) // 2]:.2f} ms, {len(ratios[way])} rounds")
        for way, values in of_workload.items():
            print(f"  {way:22s} {values['median']:6.3f}   ({values['min']:.3f} to {values['max']:.3f})", flush=True)
        save(report, options.json)


if __name__ == "__main__":
    main()
