"""What IncidentReport costs while all is well: the step's time, and what is held in memory.

Blocks of steps with IncidentReport are interleaved with bare blocks, and with blocks of NaNEarlyStop, which guards the
same steps without recording any. Printed is the median of the ratios of a block to the bare ones beside it, with their
range, and the same in microseconds a step. On a CPU this process's own time counts, so that other work on the machine
counts less. Memory: batches that are alive when a step ends, and bytes that a block of steps peaks at.

usage: python benchmarks/incidents.py [--quick] [--rounds N] [--minutes M] [--device cuda] [--workloads a,b]
                                      [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import machine, quiet, save, spread  # noqa: E402
from common.blocks import KeepNothing, synchronise  # noqa: E402
from overhead import make_workload  # noqa: E402

from lightning_stability import IncidentReport, NaNEarlyStop  # noqa: E402

FOLDER = tempfile.TemporaryDirectory()
WAYS: dict[str, Callable[[], list[Any]]] = {
    "the bare step again": list,
    "NaNEarlyStop": lambda: [NaNEarlyStop(patience=2)],
    "IncidentReport": lambda: [IncidentReport(FOLDER.name)],
    "both": lambda: [NaNEarlyStop(patience=2), IncidentReport(FOLDER.name)],
}
WARM_UP = 3


class Copies(Dataset[Any]):
    """One batch over and over, each a tensor of its own."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Tensor:
        return self.batch.clone()


class Meter(pl.Callback):
    """The seconds of a block's steps, and how many batches are alive when one ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.alive = 0.0, 0
        self._batches: list[weakref.ref[Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        self._batches = [ref for ref in self._batches if ref() is not None] + [weakref.ref(batch)]
        if batch_idx == WARM_UP * trainer.accumulate_grad_batches:
            self.seconds = -self._now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.alive = max(self.alive, sum(ref() is not None for ref in self._batches))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds += self._now()

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter() if self.device.type == "cuda" else time.process_time()


def block(workload: Any, steps: int, callbacks: list[Any], device: torch.device, accumulate: int = 1) -> dict[str, Any]:
    """The milliseconds of one step, the most batches alive, and on a GPU the most memory, in MiB."""
    module, batch, precision = workload
    meter = Meter(device)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_steps=WARM_UP + steps,
        accumulate_grad_batches=accumulate,
        logger=KeepNothing(),
        log_every_n_steps=50,
        callbacks=[*callbacks, meter],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=FOLDER.name,
    )
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.fit(module, DataLoader(Copies(batch), batch_size=None))
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"ms": 1e3 * meter.seconds / steps, "batches": meter.alive, "peak_mib": peak}


def measure(workload: Any, steps: int, device: torch.device, rounds: int, deadline: float) -> dict[str, Any]:
    """Ratios and differences of each way to the bare blocks beside it."""
    block(workload, steps, [], device)  # warms everything up
    bare = [block(workload, steps, [], device)["ms"]]
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    added: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for way, make in WAYS.items():
            ms = block(workload, steps, make(), device)["ms"]
            bare.append(block(workload, steps, [], device)["ms"])
            beside = (bare[-2] + bare[-1]) / 2
            ratios[way].append(ms / beside)
            added[way].append(1e3 * (ms - beside))
    return {
        "bare_ms": spread(bare),
        "rounds": len(ratios["both"]),
        "ratios": {way: spread(values) for way, values in ratios.items()},
        "added_us": {way: spread(values) for way, values in added.items()},
        "memory": {
            f"{way}, windows of {accumulate}": block(workload, 6, WAYS[way](), device, accumulate)
            for way in ("the bare step again", "IncidentReport")
            for accumulate in (1, 4)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8, help="no more rounds than fit; one in any case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", default="batch_norms,gpt_bf16_fused,gpt_fp16_foreach")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round: to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.workloads = 1, "batch_norms"
    quiet()
    device = torch.device(options.device)
    names = options.workloads.split(",")
    report: dict[str, Any] = {"machine": machine(device), "workloads": {}}
    for name in names:
        module, batch, precision, steps = make_workload(name, device, quick=False)
        deadline = time.monotonic() + 60 * options.minutes / len(names)
        found = measure((module, batch.to(device), precision), 3 * steps, device, options.rounds, deadline)
        report["workloads"][name] = {"precision": precision, **found}
        print(f"{name}, {precision}: bare step {found['bare_ms']['median']:.2f} ms, {found['rounds']} rounds")
        for way in WAYS:
            ratio, us = found["ratios"][way], found["added_us"][way]
            spans = f"({ratio['min']:.3f} to {ratio['max']:.3f}), {us['median']:+6.0f} us"
            print(f"  {way:22s} {ratio['median']:6.3f}   {spans}", flush=True)
        for way, values in found["memory"].items():
            peak = "" if values["peak_mib"] is None else f", peak {values['peak_mib']:.1f} MiB"
            print(f"  {way:36s} {values['batches']} batches alive{peak}")
        save(report, options.json)


if __name__ == "__main__":
    main()
