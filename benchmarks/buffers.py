"""What it costs a step to keep the buffers of 53 batch norms, compare them and restore them, in several ways.

A good step is `remember` before the forward pass, `nonfinite` and `restore` after the backward pass. For each way:
host microseconds of such a step on an idle device, device microseconds and kernels where there is a GPU, operations
that are dispatched, and the time of a training step over that of a bare Trainer's, from blocks that are interleaved
with bare blocks in one process. Before anything is timed, each way restores a bad step bit by bit.

usage: python benchmarks/buffers.py [--quick] [--rounds N] [--steps N] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"

from common import machine, quiet, save, spread  # noqa: E402
from common.nets import batch_norm_net  # noqa: E402

from lightning_stability import GradNormMonitor, NaNEarlyStop  # noqa: E402
from lightning_stability.internals import copy_each  # noqa: E402
from lightning_stability.recovery import BufferUndo, flat_copies, guard  # noqa: E402

WARM_UP = 10


def main() -> None:
    options = arguments()
    quiet()
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": machine(device), "rounds": options.rounds, "hook": {}, "step": {}}
    print(report["machine"], flush=True)
    for name in WAYS:
        report["hook"][name] = of_one_step(name, device, 20 if options.quick else 300)
        print_hook(name, report["hook"][name])
        save(report, options.json)
    if options.rounds:
        report["step"] = step_ratios(device, options.rounds, options.steps)
        print_ratios(report["step"])
        save(report, options.json)


# The ways


class PerKind:
    """As it was: a flat tensor for floats and one for integers, gathered twice, compared in 13 operations."""

    def __init__(self, module: nn.Module) -> None:
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self.kinds = [_Kind(tensors) for tensors in kinds.values()]

    def remember(self) -> None:
        for kind in self.kinds:
            kind.is_in_place()
            torch._foreach_copy_(kind.old_views, kind.data)

    def nonfinite(self) -> tuple[Tensor, Tensor] | None:
        found = None
        for kind in self.kinds:
            kind.is_in_place()
            if kind.old.is_floating_point():
                torch.cat([data.reshape(-1) for data in kind.data], out=kind.new)
                bad = _bad(kind.new).logical_and_(_bad(kind.old).logical_not_())
                found = bad.any(), bad.to(torch.uint8).argmax() + 0
        return found

    def restore(self, bad: Tensor) -> None:
        for kind in self.kinds:
            kind.is_in_place()
            torch.cat([data.reshape(-1) for data in kind.data], out=kind.new)
            torch.where(bad, kind.old, kind.new, out=kind.new)
            torch._foreach_copy_(kind.data, kind.new_views)

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None  # what else the guard asks of a BufferUndo


class _Kind:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.data = [tensor.data for tensor in tensors]
        sizes = [tensor.numel() for tensor in tensors]
        self.old, self.new = (tensors[0].new_zeros(sum(sizes)) for _ in range(2))
        self.old_views, self.new_views = (
            [piece.view(t.shape) for piece, t in zip(flat.split(sizes), tensors, strict=True)]
            for flat in (self.old, self.new)
        )

    def is_in_place(self) -> bool:
        return all(tensor.data_ptr() for tensor in self.tensors)


def _bad(values: Tensor) -> Tensor:
    return torch.isnan(values).logical_or_(torch.isposinf(values))


class ByForeachCopy(flat_copies.FlatCopies):
    """Gathers by `_foreach_copy_` into views of the flat tensor in place of `torch.cat`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._remember._run = lambda: copy_each(self._old_words, self._words)

    def _gather_and_compare(self) -> None:
        copy_each(self._new_words, self._words)
        self._found = None
        for span in self._spans:
            self._found = flat_copies.either(self._found, span.nonfinite())


class BySplitCopy(flat_copies.FlatCopies):
    """Scatters by `torch.split_with_sizes_copy`, made for FSDP, in place of `_foreach_copy_`."""

    def _restore_where_bad(self) -> None:
        torch.where(self._bad, self._old, self._new, out=self._new)
        sizes = [words.numel() for words in self._words]
        torch.split_with_sizes_copy(self._new, sizes, out=self._words)


class OneStorage(BufferUndo):
    """Every buffer a view of one flat tensor: refused, since a checkpoint then shares that storage. The lower bound."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.flats = []
        for dtype in (torch.float32, torch.int64):
            buffers = [buffer for buffer in module.buffers() if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            for buffer, piece in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.data = piece.view(buffer.shape)
            self.flats.append((flat, torch.empty_like(flat)))

    def remember(self) -> None:
        for flat, old in self.flats:
            old.copy_(flat)

    def nonfinite(self) -> tuple[Tensor, Tensor]:
        new, old = self.flats[0]
        largest, index = torch.where(old < torch.inf, new, 0).max(0)
        return (largest < torch.inf).logical_not_(), index

    def restore(self, bad: Tensor) -> None:
        for flat, old in self.flats:
            torch.where(bad, old, flat, out=flat)


@contextlib.contextmanager
def using(copies: type = flat_copies.FlatCopies, graphs: bool = False, of: type = BufferUndo) -> Iterator[type]:
    """Within it BufferUndo, the guard's too, works in this way."""
    from lightning_stability.recovery import undo

    with (
        mock.patch.object(undo, "FlatCopies", copies),
        mock.patch.object(flat_copies, "CUDA_GRAPHS", graphs),
        mock.patch.object(guard, "BufferUndo", of),
    ):
        yield of


WAYS: dict[str, Callable[[], Any]] = {
    "as it was": lambda: using(of=PerKind),
    "flat copies": using,
    "flat copies, gathered by _foreach_copy_": lambda: using(ByForeachCopy),
    "flat copies, scattered by split_with_sizes_copy": lambda: using(BySplitCopy),
    "flat copies, as CUDA graphs": lambda: using(graphs=True),
    "buffers in one storage (refused)": lambda: using(of=OneStorage),
}


# One step


@torch.no_grad()
def of_one_step(name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    with WAYS[name]() as make, mock.patch("lightning_stability.recovery.undo.is_on_host", return_value=False):
        module = batch_norm_net().to(device)
        undo = make(module)
        good = torch.tensor(False, device=device)

        def remember() -> None:
            undo.remember()

        def after() -> None:
            found = undo.nonfinite()
            undo.restore(good | found[0])

        for _ in range(WARM_UP):
            remember()
            after()
        check(module, undo, device)
        result: dict[str, Any] = {"remember_us": [], "after_us": []}
        for _ in range(repeats):
            for part, function in (("remember_us", remember), ("after_us", after)):
                synchronise(device)
                start = time.perf_counter()
                function()
                result[part].append(1e6 * (time.perf_counter() - start))
        result = {part: statistics.median(times) for part, times in result.items()}
        with CountOperations() as counted:
            remember()
            after()
        result["operations"] = counted.count
        if device.type == "cuda":
            result |= on_device(lambda: (remember(), after()))
        return result


def check(module: nn.Module, undo: Any, device: torch.device) -> None:
    """A bad step is restored bit by bit, a good one stays."""
    for value, is_bad in ((1.0, False), (torch.nan, True), (2.0, False), (torch.inf, True)):
        before = [buffer.clone() for buffer in module.buffers()]
        undo.remember()
        for buffer in module.buffers():
            buffer.add_(1)
        module[1].running_mean.fill_(value)
        after = [buffer.clone() for buffer in module.buffers()]
        bad = undo.nonfinite()[0]
        assert bool(bad) == is_bad, "it does not see what is bad"
        undo.restore(bad)
        expected = before if is_bad else after
        assert all(torch.equal(a, b) for a, b in zip(module.buffers(), expected, strict=True)), "it does not restore"
    synchronise(device)


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not str(function).startswith(("aten.view", "aten.detach", "aten.reshape"))
        return function(*args, **(kwargs or {}))


def on_device(step: Callable[[], Any]) -> dict[str, float]:
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(100_000_000)  # the host queues all of it meanwhile
    start.record()
    for _ in range(20):
        step()
    end.record()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {"device_us": 1e3 * start.elapsed_time(end) / 20, "kernels": sum(e.count for e in kernels) / 4}


# Whole steps


class SameBatch(Dataset[Tensor]):
    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Tensor:
        return self.batch


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = batch_norm_net()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).float().pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


class Clock(pl.Callback):
    def __init__(self, device: torch.device) -> None:
        self.device, self.start, self.seconds = device, 0.0, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            synchronise(self.device)
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        synchronise(self.device)
        self.seconds = time.perf_counter() - self.start


class BuffersAlone(pl.Callback):
    """Keeps and restores buffers, and nothing else of a guard."""

    def __init__(self, make: type) -> None:
        self.make = make

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.undo = self.make(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.undo.remember()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.undo.restore(self.undo.nonfinite()[0])


def step_ratios(device: torch.device, rounds: int, steps: int) -> dict[str, Any]:
    batch = torch.randn(16, 3, 32, 32).to(device)

    def block(callbacks: list[pl.Callback]) -> float:
        clock = Clock(device)
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if device.type == "cuda" else "32-true",
            max_steps=WARM_UP + steps,
            callbacks=[*callbacks, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), DataLoader(SameBatch(batch), batch_size=None))
        return clock.seconds / steps

    block([])
    with_guard = ("as it was", "flat copies", "flat copies, as CUDA graphs", "buffers in one storage (refused)")
    cases: list[tuple[str, str | None, Any]] = [
        ("the bare run again", None, lambda make: []),
        ("GradNormMonitor", None, lambda make: [GradNormMonitor()]),
        *((f"buffers alone, {name}", name, lambda make: [BuffersAlone(make)]) for name in WAYS),
        *((f"NaNEarlyStop, {name}", name, lambda make: [NaNEarlyStop()]) for name in with_guard),
    ]
    ratios: dict[str, list[float]] = {case: [] for case, _, _ in cases}
    bare = []
    for _ in range(rounds):
        random.shuffle(cases)
        bare.append(block([]))
        for case, way, make_callbacks in cases:
            with WAYS[way]() if way else contextlib.nullcontext() as make:
                seconds = block(make_callbacks(make))
            bare.append(block([]))
            ratios[case].append(2 * seconds / (bare[-2] + bare[-1]))
    result = {case: spread(values) for case, values in sorted(ratios.items())}
    return {"bare_ms": spread([1e3 * seconds for seconds in bare]), "ratio": result}


# The report


def print_hook(name: str, row: dict[str, Any]) -> None:
    on_gpu = f"device {row['device_us']:7.1f} us, {row['kernels']:5.1f} kernels" if "kernels" in row else ""
    total = row["remember_us"] + row["after_us"]
    print(
        f"{name:48s} host {total:7.1f} us ({row['remember_us']:.1f} + {row['after_us']:.1f}),"
        f" {row['operations']:3d} operations  {on_gpu}",
        flush=True,
    )


def print_ratios(result: dict[str, Any]) -> None:
    bare = result["bare_ms"]
    print(f"\nbare step {bare['median']:.2f} ms ({bare['min']:.2f} to {bare['max']:.2f})")
    for case, ratio in result["ratio"].items():
        print(f"{case:64s} {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})", flush=True)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, short blocks and 2 rounds")
    parser.add_argument("--rounds", type=int, help="of interleaved blocks (9); 0: no whole steps")
    parser.add_argument("--steps", type=int, help="in a block (100 on a GPU, 20 on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rounds = options.rounds if options.rounds is not None else (2 if options.quick else 9)
    options.steps = options.steps or (5 if options.quick else 100 if options.device.startswith("cuda") else 20)
    return options


if __name__ == "__main__":
    main()
