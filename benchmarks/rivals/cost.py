"""What each way costs on a run where nothing goes wrong: step time, synchronisations, memory; beside a bare Trainer."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import random
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
        "transformer": (lambda: Transformer(192, 3, 4, 1_000, 64), torch.randint(0, 1_000, (4, 64)), 5),
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
        self.module: Timed | None = None
        self.make, self.batch, self.steps = workloads(device)[name]
        self.device, self.folder = device, tempfile.mkdtemp()

    def renew(self) -> None:
        """A module that was never trained: nothing is left of the blocks before."""
        self.module = None
        gc.collect()
        self.module = Timed(self.make())

    def block(self, attached: Attached, extra: tuple[Any, ...] = (), steps: int | None = None) -> float:
        """Seconds of a step; the module is a new one, without what another way has left on it."""
        self.renew()
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


def measure(
    ways: dict[str, Callable[[bool], Attached]], name: str, device: torch.device, rounds: int
) -> dict[str, Any]:
    """All ways on one workload: blocks of each between bare blocks, in one process. A way that fails is named."""
    bench, failed, found = Bench(name, device), dict[str, str](), dict[str, Any]()
    bench.block(Attached())  # warms everything up
    bare = {"waits": bench.waits(Attached()), "peak": bench.peak(Attached())}
    for way, make in ways.items():
        try:
            waits, peak = bench.waits(make(False)) - bare["waits"], bench.peak(make(False)) - bare["peak"]
            found[way] = {"added_waits": round(waits, 2), "added_mb": round(peak / 1e6, 2)}
        except Exception as error:
            failed[way] = f"{type(error).__name__}: {error}"[:200]
    blocks: dict[str, list[float]] = {way: [] for way in found}
    around = [bench.block(Attached())]
    for number in range(rounds):
        order = list(found)
        random.Random(number).shuffle(order)
        for way in order:
            seconds = bench.block(ways[way](False))
            around.append(bench.block(Attached()))
            blocks[way].append(2 * seconds / (around[-2] + around[-1]))
    bare_ms = spread([1e3 * seconds for seconds in around])
    figures = {way: {"bare_ms": bare_ms, "ratio": spread(blocks[way]), **found[way]} for way in found}
    return {**figures, **{way: {"error": said} for way, said in failed.items()}}
