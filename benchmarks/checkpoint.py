"""What a save costs training: FractionalCheckpoint beside Lightning's ModelCheckpoint.

A model with AdamW, of 110 million parameters (1.3 GB of state) if nothing else is said, is trained in blocks of steps;
the first step of a block saves, the others feel what goes on in the background. The time lost per save is a block with
a save less as many bare steps, measured before and after it. Each way saves three times in a fit, and the first, which
allocates, is left out; ways are interleaved, and the median over all saves is given with the range. Over hundreds of
short steps the difference of two sums is noisy; what the step that saves takes longer than a bare one is the part that
is sharp.

Beside them the limits: the state's bytes over the bandwidth of the disk, written once and flushed, and over that of a
plain copy to host memory (pinned, on a GPU).

With `--sharded` the same for FSDP2 in a world of one process: each rank writes what it holds, by torch's distributed
checkpoint. Beside Lightning's ModelCheckpoint stands torch's own `async_save`, as it is called with no options.

usage: python benchmarks/checkpoint.py [--quick] [--parameters MILLIONS] [--rounds N] [--minutes M] [--device cuda]
                                       [--folder DIR] [--json FILE] [--gpu-tests] [--sharded]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare Trainer shall be bare where the package is installed

from common import machine, quiet, save, spread  # noqa: E402

from lightning_stability import FractionalCheckpoint  # noqa: E402

EPOCH = 10**6
Way = Callable[[Path, int], tuple[list[pl.Callback], list[Any]]]


def main() -> None:
    options = arguments()
    options.until = time.monotonic() + 60 * options.minutes
    quiet()
    if options.gpu_tests:
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests/test_gpu_checkpoint.py")]
        subprocess.run(words, cwd=ROOT, check=False)
    device = torch.device(options.device)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        report = measure(device, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(report)
    save(report, options.json)


def measure(device: torch.device, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    millions = 27.5 if options.quick else options.parameters
    width = round(math.sqrt(1e5 * millions))
    ways = SHARDED_WAYS if options.sharded else WAYS
    module = Module(width, rows=64 if device.type == "cuda" else 4, sharded=options.sharded).to(device)
    state = trained_state(module, device)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state)
    limits = {"disk": disk_seconds(size, folder), "copy": copy_seconds(state, device)}
    del state
    step = bare_step(module, device, folder, steps=5)
    # long enough for a save in the background to end within its block
    writes = 3.5 if options.sharded else 2  # times as long as the disk alone
    steps = max(4, math.ceil(writes * max(limits["disk"]["median"], 0.2) / step))
    lost: dict[str, list[float]] = {way: [] for way in ways}
    waited: dict[str, list[float]] = {way: [] for way in ways}
    bare_steps: list[float] = []
    rounds, longest = 0, 0.0
    while rounds < options.rounds and (not rounds or time.monotonic() + longest < options.until):
        started = time.monotonic()
        before = bare_step(module, device, folder, math.ceil(steps / 4))
        for name, way in ways.items():
            blocks = block_seconds(module, device, way, folder, steps, saves=3)
            after = bare_step(module, device, folder, math.ceil(steps / 4))
            lost[name] += [block - steps * (before + after) / 2 for block in blocks.seconds[1:]]
            waited[name] += [step - (before + after) / 2 for step in blocks.first_steps[1:]]
            bare_steps.append(before := after)
        rounds, longest = rounds + 1, max(longest, time.monotonic() - started)
    ours, theirs = spread(lost["FractionalCheckpoint"]), spread(lost["ModelCheckpoint"])
    return {
        "machine": machine(device),
        "parameters": sum(p.numel() for p in module.parameters()),
        "bytes": size,
        "steps_in_a_block": steps,
        "bare_step_ms": {key: 1e3 * value for key, value in spread(bare_steps).items()},
        "rounds": rounds,
        "limits_seconds": limits,
        "lost_seconds": {way: spread(values) for way, values in lost.items()},
        "waited_seconds": {way: spread(values) for way, values in waited.items()},
        "sync_over_lightning": ours["median"] / theirs["median"],
        "async_over_copy": spread(lost["FractionalCheckpoint, async_save"])["median"] / limits["copy"]["median"],
        "async_wait_over_copy": spread(waited["FractionalCheckpoint, async_save"])["median"] / limits["copy"]["median"],
    }


WAYS: dict[str, Way] = {
    "ModelCheckpoint": lambda folder, steps: ([lightnings(folder, steps)], []),
    "ModelCheckpoint, AsyncCheckpointIO": lambda folder, steps: ([lightnings(folder, steps)], [AsyncCheckpointIO()]),
    "FractionalCheckpoint": lambda folder, steps: ([ours(folder, steps, False)], []),
    "FractionalCheckpoint, async_save": lambda folder, steps: ([ours(folder, steps, True)], []),
}


def lightnings(folder: Path, steps: int) -> pl.Callback:
    return ModelCheckpoint(dirpath=folder / "lightning", every_n_train_steps=steps)


def ours(folder: Path, steps: int, async_save: bool) -> pl.Callback:
    return FractionalCheckpoint(steps / EPOCH, dirpath=folder / "ours", async_save=async_save)


class TorchsOwn(pl.Callback):
    """torch's `async_save`, as it is called with no options."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder / "torch", steps
        self.group: Any = None
        self.future: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.group = torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % self.steps:
            return
        self.wait()
        model, optimizer = get_state_dict(pl_module, trainer.optimizers)
        path = self.folder / str(trainer.global_step)
        state = {"state_dict": model, "optimizer_0": optimizer}
        self.future = async_save(state, checkpoint_id=path, process_group=self.group)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.wait()

    def wait(self) -> None:
        if self.future is not None:
            self.future.result()


SHARDED_WAYS: dict[str, Way] = {
    "ModelCheckpoint": WAYS["ModelCheckpoint"],
    "torch's async_save": lambda folder, steps: ([TorchsOwn(folder, steps)], []),
    "FractionalCheckpoint": WAYS["FractionalCheckpoint"],
    "FractionalCheckpoint, async_save": WAYS["FractionalCheckpoint, async_save"],
}


class SameSample(Dataset[Tensor]):
    """One sample over and over, so that no loading is timed."""

    def __init__(self, width: int) -> None:
        self.sample = torch.randn(width)

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index: int) -> Tensor:
        return self.sample


class Module(pl.LightningModule):
    """Ten square layers: little to compute, much to save."""

    def __init__(self, width: int, rows: int, sharded: bool = False) -> None:
        super().__init__()
        self.width, self.rows, self.sharded = width, rows, sharded
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(10)))

    def configure_model(self) -> None:
        if self.sharded and not hasattr(self.net[0].weight, "full_tensor"):
            for layer in self.net:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch.expand(self.rows, -1)).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


class Blocks(pl.Callback):
    """Times blocks of steps, from the end of the step before a save."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps = device, steps
        self.seconds: list[float] = []
        self.first_steps: list[float] = []
        self.start: float | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # the last step before a multiple of `steps` saves when it is over: a block starts with that step
        if (trainer.global_step + 1) % self.steps == 0:
            now = self._now()
            if self.start is not None:
                self.seconds.append(now - self.start)
            self.start = now
        elif trainer.global_step % self.steps == 0 and self.start is not None:
            self.first_steps.append(self._now() - self.start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def bare_step(module: Module, device: torch.device, folder: Path, steps: int) -> float:
    """Seconds of a step without any save: all alike, so that fewer of them do."""
    return statistics.median(block_seconds(module, device, None, folder, steps, saves=3).seconds) / steps


def block_seconds(
    module: Module, device: torch.device, way: Way | None, folder: Path, steps: int, saves: int
) -> Blocks:
    """Train for so many blocks, with a save in each, or without."""
    callbacks, plugins = ([], []) if way is None else way(folder, steps)
    blocks = Blocks(device, steps)
    if module.sharded:
        module = Module(module.width, module.rows, sharded=True)
    trainer = pl.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1) if module.sharded else "auto",
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=steps * (saves + 1),
        logger=False,
        callbacks=[blocks, *callbacks],
        plugins=plugins,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, StatefulDataLoader(SameSample(module.width), batch_size=1))
    shutil.rmtree(folder / "lightning", ignore_errors=True)
    shutil.rmtree(folder / "ours", ignore_errors=True)
    shutil.rmtree(folder / "torch", ignore_errors=True)
    os.sync()  # what was written lazily is not left to the next one
    return blocks


# Limits


def trained_state(module: Module, device: torch.device) -> list[Tensor]:
    """As large as what a checkpoint holds: weights and both of Adam's moments."""
    return [torch.zeros_like(p, device=device) for p in module.parameters() for _ in range(3)]


def disk_seconds(size: int, folder: Path) -> dict[str, float]:
    """Write so many bytes to a new file and flush it."""
    chunk = os.urandom(2**24)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with (folder / "limit").open("wb", buffering=0) as file:
            for _ in range(math.ceil(size / len(chunk))):
                file.write(chunk)
            os.fsync(file.fileno())
        times.append(time.perf_counter() - start)
        (folder / "limit").unlink()
    return spread(times)


def copy_seconds(state: list[Tensor], device: torch.device) -> dict[str, float]:
    """Copy the state to host memory that is there already, pinned on a GPU."""
    pinned = device.type == "cuda"
    memory = [torch.empty_like(tensor, device="cpu", pin_memory=pinned) for tensor in state]
    times = []
    for repeat in range(6):
        if pinned:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for target, source in zip(memory, state, strict=True):
            target.copy_(source, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        if repeat:
            times.append(time.perf_counter() - start)
    return spread(times)


# The machine and the report


def print_report(report: dict[str, Any]) -> None:
    print(json.dumps(report["machine"]))
    size, steps = report["bytes"] / 1e9, report["steps_in_a_block"]
    print(f"{report['parameters']:,} parameters, {size:.2f} GB; {steps} steps a block")
    print(f"{'seconds lost per save':40s} {'median':>8s}   {'range':20s}   of it in the step that saves")
    for way, lost in report["lost_seconds"].items():
        between = f"{lost['min']:.3f} to {lost['max']:.3f}"
        print(f"{way:40s} {lost['median']:8.3f}   {between:20s}   {report['waited_seconds'][way]['median']:.3f}")
    for name, limit in report["limits_seconds"].items():
        print(f"{'limit: ' + name:40s} {limit['median']:8.3f}   {limit['min']:.3f} to {limit['max']:.3f}")
    print(f"synchronous over ModelCheckpoint {report['sync_over_lightning']:.3f} (target 1.1)")
    print(f"asynchronous over the copy       {report['async_over_copy']:.3f} (target 1.3, on a GPU)")
    print(f"... the step that saves alone    {report['async_wait_over_copy']:.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the parameters: to see that it runs")
    parser.add_argument("--parameters", type=float, default=110, help="of the model, in millions")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of interleaved ways")
    parser.add_argument("--minutes", type=float, default=4, help="no more rounds than fit; one in any case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where to write, a folder on the disk to be measured")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 in a world of one process")
    parser.add_argument("--gpu-tests", action="store_true", help="first run the checkpoints' tests marked gpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
