"""What each way costs on a run where nothing goes wrong: step time, synchronisations, memory; beside a bare Trainer."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import spread
from common.blocks import Clock, train_block
from torch import Tensor, nn

from rivals.rows import Attached

COUNTED = 8
"""Steps of which the synchronisations are counted; as many as share one reading of ours."""
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


class Timed(pl.LightningModule):
    """Trained with AdamW as torch makes it, and its loss is logged as most do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).float().pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


def workloads(device: torch.device) -> dict[str, tuple[Callable[[], nn.Module], Tensor, int]]:
    """For each name: how the network is made, its batch, and the steps of a block."""
    from grad_norm import Transformer
    from overhead import batch_norms

    if device.type == "cuda":
        tokens = torch.randint(0, 1_000, (16, 1024))
        return {
            "transformer": (lambda: Transformer(768, 12, 12, 50_304, 1024), tokens.to(device), 20),
            "batch norms": (batch_norms, torch.randn(8, 16, 8, 8).to(device), 60),
        }
    return {
        "transformer": (lambda: Transformer(192, 3, 4, 1_000, 64), torch.randint(0, 1_000, (4, 64)), 8),
        "batch norms": (batch_norms, torch.randn(8, 16, 8, 8), 8),
    }


class CpuClock(Clock):
    """On a CPU the process's own time is taken, which other work on the machine disturbs less."""

    def now(self) -> float:
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()


class Counter(pl.Callback):
    """Profiles some steps, and counts where the host waits for the device (on a CPU: reads one number of a tensor)."""

    FIRST = 9

    def __init__(self, device: torch.device) -> None:
        self.names = WAITS if device.type == "cuda" else ("aten::_local_scalar_dense",)
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * (device.type == "cuda"))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.FIRST:
            self.profiler.start()
        elif batch_idx == self.FIRST + COUNTED:
            self.profiler.stop()

    def per_step(self) -> float:
        return sum(event.count for event in self.profiler.key_averages() if event.key in self.names) / COUNTED


class Bench:
    """One workload, trained in blocks."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.module: Timed | None
        self.make, self.batch, self.steps = workloads(device)[name]
        self.device, self.folder = device, tempfile.mkdtemp()
        self.renew()

    def renew(self) -> None:
        """A module that was never trained: nothing is left of the blocks before."""
        self.module = None
        gc.collect()
        self.module = Timed(self.make())

    def block(self, attached: Attached, extra: tuple[Any, ...] = (), steps: int | None = None) -> float:
        """Seconds of a step."""
        clock = CpuClock(self.device, steps or self.steps)
        callbacks = [*attached.callbacks, *extra]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            options = {"max_epochs": 1, **attached.options}
            train_block(self.module, self.batch, clock, callbacks, self.folder, **options)
        return clock.mean

    def waits(self, attached: Attached) -> float:
        """Of a step."""
        counter = Counter(self.device)
        self.block(attached, (counter,), steps=Counter.FIRST + COUNTED + 1)
        return counter.per_step()

    def peak(self, attached: Attached) -> float:
        """The most bytes of tensors that a short fit holds, besides what was there before."""
        self.renew()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.block(attached, steps=4)
            return float(torch.cuda.max_memory_allocated())
        with torch.profiler.profile(profile_memory=True) as profiler:
            self.block(attached, steps=4)
        path = Path(self.folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        path.unlink()
        memory = [event["args"] for event in events if event.get("name") == "[memory]"]
        before = memory[0]["Total Allocated"] - memory[0]["Bytes"]  # the profiler counts on from its last time
        return float(max(args["Total Allocated"] for args in memory) - before)


def measure(make: Callable[[bool], Attached], name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """One way on one workload: blocks of it between bare blocks, in one process."""
    bench = Bench(name, device)
    bench.block(Attached())  # warms everything up
    bare = [bench.block(Attached())]
    ratios = []
    for _ in range(rounds):
        seconds = bench.block(make(False))
        bare.append(bench.block(Attached()))
        ratios.append(2 * seconds / (bare[-2] + bare[-1]))
    return {
        "bare_ms": spread([1e3 * seconds for seconds in bare]),
        "ratio": spread(ratios),
        "added_waits": round(bench.waits(make(False)) - bench.waits(Attached()), 2),
        "added_mb": round((bench.peak(make(False)) - bench.peak(Attached())) / 1e6, 2),
    }
