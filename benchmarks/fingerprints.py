"""What the fingerprints of FractionalCheckpoint cost a step, and what they cost a save.

A step that leaves a fingerprint is one of the 20 after a save. Blocks of such steps are interleaved with bare ones in
one fit; printed is the median of the ratios of a block to the bare blocks beside it. That is noisy, so the time of the
hooks is taken too: what the host spends in them on one step, and the device on the check sum of the batch. Their share
of a bare step is the sharp figure. Over a run it is less: 20 steps of all between two saves.

usage: python benchmarks/fingerprints.py [--quick] [--rounds N] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import machine, quiet, save, spread  # noqa: E402
from common.blocks import SameBatch  # noqa: E402
from common.nets import Transformer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from lightning_stability.callbacks.resume_proof import ResumeProof, header  # noqa: E402
from lightning_stability.checkpointing.fingerprints import StepFile  # noqa: E402
from lightning_stability.events import EventLog  # noqa: E402
from lightning_stability.health.checksums import BatchChecksum  # noqa: E402

BETWEEN_SAVES = 1000


def main() -> None:
    options = arguments()
    quiet()
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": machine(device), "workloads": {}}
    for name, (make, batch, precision, steps) in workloads(device, options.quick).items():
        report["workloads"][name] = measure(make(), batch, precision, steps, device, options.rounds)
        print_row(name, report["workloads"][name])
        save(report, options.json)


def workloads(device: torch.device, quick: bool) -> dict[str, tuple[Callable[[], nn.Module], Any, str, int]]:
    """Each a network, its batch, the precision and the steps of a block."""
    torch.manual_seed(0)
    large = device.type == "cuda" and not quick
    width, layers, length, vocabulary = (768, 12, 1024, 50_304) if large else (128, 2, 64, 1_000)
    tokens = torch.randint(0, vocabulary, (16, length))
    side, count = (224, 64) if large else (32, 16)
    images = {"image": torch.randn(count, 3, side, side), "label": torch.randint(0, 10, (count,))}
    return {
        "GPT": (lambda: Transformer(width, layers, 12 if large else 4, vocabulary, length), tokens, "bf16-mixed", 20),
        "convolutions": (convolutions, images, "bf16-mixed", 20),
    }  # fmt: skip


class Images(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])


def convolutions() -> nn.Module:
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 4)]
    for _ in range(16):
        parts += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    return Images(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch)
        return loss if loss.dim() == 0 else loss.float().pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6, fused=True)


class Blocks(pl.Callback):
    """Every second block of steps leaves fingerprints."""

    def __init__(self, device: torch.device, steps: int, folder: Path) -> None:
        self.device, self.steps, self.folder = device, steps, folder
        self.seconds: list[float] = []
        self.hooks: list[float] = []
        self.proof: ResumeProof | None = None
        self.save_seconds: list[float] = []
        self.waits = 0
        self.started = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        block, place = divmod(batch_idx, self.steps)
        if place == 0:
            self._begin(trainer, block)
        if self.proof is not None:
            started = time.perf_counter()
            self.proof.on_batch_start(trainer, batch)
            self.hooks.append(time.perf_counter() - started)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.proof is not None:
            started = time.perf_counter()
            self.proof.on_batch_end(trainer, outputs)
            self.hooks[-1] += time.perf_counter() - started

    def _begin(self, trainer: Any, block: int) -> None:
        if block:
            self.seconds.append(self._now() - self.started)
        self._now()
        self.proof = None
        if block % 2:
            file = StepFile(self.folder, 0)
            self.proof = ResumeProof(EventLog(None), lambda: None, file, limit=10**9)
            started = self._now()
            header(trainer)
            self.save_seconds.append(self._now() - started)
            self.proof.begin(trainer, f"block {block}")
        self.started = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(
    net: nn.Module, batch: Any, precision: str, steps: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        blocks = Blocks(device, steps, Path(folder))
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_steps=steps * (2 * rounds + 3) + 1,
            logger=False,
            callbacks=[blocks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Module(net), DataLoader(SameBatch(batch), batch_size=None))
    bare, ours = blocks.seconds[2::2], blocks.seconds[3::2]  # the first of each makes its memory
    ratios = [2 * o / (a + b) for a, o, b in zip(bare, ours, bare[1:], strict=False)]
    step = statistics.median(bare) / steps
    hook = statistics.median(blocks.hooks[steps:])
    on_device = device_seconds(batch, device)
    share = (on_device if device.type == "cuda" else hook) / step
    return {
        "step_ms": 1e3 * step,
        "ratio": spread(ratios),
        "hook_host_us": 1e6 * hook,
        "checksum_device_us": 1e6 * on_device,
        "host_share_of_step": hook / step,
        "device_share_of_step": share,
        "share_of_run": hook / step * 20 / BETWEEN_SAVES,
        "at_a_save_ms": 1e3 * statistics.median(blocks.save_seconds[1:]),
        "waits_for_the_device": waits(batch, device),
    }


def device_seconds(batch: Any, device: torch.device) -> float:
    """What the device is busy with for one batch's check sum."""
    if device.type != "cuda":
        return 0.0
    moved = _moved(batch, device)
    checksum = BatchChecksum()
    checksum.of(moved)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(20):
        torch.cuda._sleep(2_000_000)  # so that all launches are queued before the first one runs
        start.record()
        checksum.of(moved)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def waits(batch: Any, device: torch.device) -> int:
    """How often the check sum of a batch makes the host wait."""
    if device.type != "cuda":
        return 0
    moved, checksum = _moved(batch, device), BatchChecksum()
    checksum.of(moved)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checksum.of(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(caught)


def _moved(batch: Any, device: torch.device) -> Any:
    return {k: v.to(device) for k, v in batch.items()} if isinstance(batch, dict) else batch.to(device)


def print_row(name: str, row: dict[str, Any]) -> None:
    between = f"{row['ratio']['min']:.3f} to {row['ratio']['max']:.3f}"
    print(f"{name}: a bare step takes {row['step_ms']:.2f} ms")
    print(f"  a step with a fingerprint, over a bare one  {row['ratio']['median']:.4f} ({between})")
    print(f"  in the hooks, on the host    {row['hook_host_us']:.0f} us ({row['host_share_of_step']:.2%} of a step)")
    print(f"  check sum, on the device     {row['checksum_device_us']:.0f} us ({row['device_share_of_step']:.2%})")
    print(f"  over {BETWEEN_SAVES} steps between saves  {row['share_of_run']:.4%} (target 0.2 %)")
    print(f"  at a save                    {row['at_a_save_ms']:.2f} ms")
    print(f"  waits for the device         {row['waits_for_the_device']}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks: to see that it runs")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
