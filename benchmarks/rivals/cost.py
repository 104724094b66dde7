"""What each way costs on a run where nothing goes wrong: step time, waits, memory; beside a bare Trainer."""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from common.blocks import WAITS, Clock, interleaved, train_block, within
from common.children import in_a_child
from common.nets import Transformer, batch_norms
from torch import Tensor, nn

from rivals.rows import Attached

Make = Callable[[bool], Attached]
COUNTED = 8
"""Steps of which the waits are counted; as many as share one reading of ours."""


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
        return sum(event.name() in self.names for event in raw_events(self.profiler)) / COUNTED


def raw_events(profiler: Any) -> list[Any]:
    """What was recorded; the profiler's own tables of it take longer to make than the steps."""
    events: list[Any] = profiler.profiler.kineto_results.events()
    return events


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

    def block(self, attached: Attached, extra: tuple[Any, ...] = (), steps: int | None = None) -> Clock:
        """Timed steps of a new module, without what another way has left on it."""
        self.renew()
        return self.train(attached, extra, steps)

    def train(self, attached: Attached, extra: tuple[Any, ...] = (), steps: int | None = None) -> Clock:
        """The same of the module that is there."""
        clock = CpuClock(self.device, steps or self.steps)
        callbacks = [*attached.callbacks, *extra]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            options = {"max_epochs": 1, **attached.options}
            train_block(self.module, self.batch, clock, callbacks, self.folder, **options)
        return clock

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
            before = torch.cuda.memory_allocated()
            self.train(attached, steps=4)
            return float(torch.cuda.max_memory_allocated() - before)
        with torch.profiler.profile(profile_memory=True) as profiler:
            self.train(attached, steps=4)
        changes = [(event.start_ns(), event.nbytes()) for event in raw_events(profiler) if event.name() == "[memory]"]
        held = most = 0
        for _, change in sorted(changes):
            held += change
            most = max(most, held)
        return float(most)


def measure(
    ways: dict[str, Make],
    device: torch.device,
    rounds: int,
    deadline: float,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, dict[str, Any]]:
    """All ways on all workloads, each with its share of the time that is left, for one round in any case.

    On a CPU each way has a process of its own, so that what it leaves behind delays no other.

    Args:
        ways: How each is made.
        device: Where it is trained.
        rounds: At most.
        deadline: By `time.monotonic`.
        keep: Gets the figures so far.
    """
    found: dict[str, dict[str, Any]] = {way: {} for way in ways}
    places = [(way, name) for name in workloads(device) for way in ways]
    bare: dict[str, dict[str, Any]] = {}
    for done, (way, name) in enumerate(places):
        if name not in bare:
            bare[name] = _apart(partial(_counted, Bare, name, device), device)
        until = time.monotonic() + (deadline - time.monotonic()) / (len(places) - done)
        found[way][name] = _apart(partial(_measured, ways[way], name, device, rounds, until, bare[name]), device)
        keep(found)
    return found


def Bare(closely: bool) -> Attached:
    """Nothing."""
    return Attached()


def _apart(run: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What it returns, in a process of its own where there can be one; or its `error`."""
    if device.type == "cpu":
        found = in_a_child(run)
        died = f"its process ended with {found['killed']}" if "killed" in found else None
        error = found.get("raised") or died
        return {"error": error} if error else found
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:160]}


def _counted(make: Make, name: str, device: torch.device) -> dict[str, Any]:
    bench = Bench(name, device)
    bench.block(Attached(), steps=1)  # warms everything up
    return {"waits": bench.waits(make(False)), "peak": bench.peak(make(False))}


def _measured(
    make: Make, name: str, device: torch.device, rounds: int, deadline: float, bare: dict[str, Any]
) -> dict[str, Any]:
    """What a way adds to a bare step's counts, and blocks of it between bare blocks."""
    counts, bench = _counted(make, name, device), Bench(name, device)
    ways = {"way": lambda: make(False)}
    figures = interleaved(bench.block, ways, within(rounds, deadline), nothing=Attached)
    added = {key: counts[key] - bare[key] for key in counts}
    kept = {"bare_ms": figures["bare_ms"], "ratio": figures["ratios"]["way"], "rounds": figures["rounds"]}
    return {**kept, "added_waits": round(added["waits"], 2), "added_mb": round(added["peak"] / 1e6, 2)}
