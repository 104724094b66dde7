"""What the callbacks cost on one, two and more GPUs: step time, collectives, waits; and weak scaling with and without.

For each number of processes, one process group trains blocks of steps of every way, interleaved with bare blocks, on
the GPT of 124 million parameters (bf16-mixed, fused AdamW, the same batch on every GPU). Printed are the median of the
ratios of a block to the bare blocks beside it, with their range; the bare block again, for the noise; and the tokens a
second and GPU.

Collectives, bytes, kernels and waits are those of profiled steps without logging, less the bare run's: collectives are
the events that the process group's backend makes (`nccl:all_reduce`, `gloo:all_reduce`), waits are the host's calls
of cudaStreamSynchronize, cudaEventSynchronize and cudaDeviceSynchronize. Bytes are those of the tensors handed over.

usage: python benchmarks/scale.py [--quick] [--gpus 1,2] [--strategy ddp|fsdp2] [--rounds N] [--minutes M]
                                  [--ways a,b] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.spike import SpikeDetection
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare Trainer shall be bare where the package is installed

from common import machine, quiet, save  # noqa: E402
from common.blocks import WAITS, Clock, Ways, interleaved, parser, train_block  # noqa: E402
from overhead import BARE, RARELY, BetweenSaves, Net, make_workload  # noqa: E402

from lightning_stability import (  # noqa: E402
    GradNormMonitor,
    IncidentReport,
    NaNEarlyStop,
    PrecisionFallback,
    SpikeRecovery,
)

FOLDER = tempfile.TemporaryDirectory()
CUDA = torch.cuda.is_available()
ALL = "all"
LIGHTNINGS = "Lightning's SpikeDetection"
"""For comparison: it puts collectives of its own on each step, so that the count is seen to count."""
BETWEEN_SNAPSHOTS = 25
PROFILED = 8  # steps; as many as share one reading
NAMES = "LIGHTNING_STABILITY_SCALE"


def saving() -> list[Any]:
    return [BetweenSaves(0.9, dirpath=FOLDER.name)]


WAYS: Ways = {
    BARE: list,
    "NaNEarlyStop": lambda: [NaNEarlyStop(patience=2)],
    "GradNormMonitor": lambda: [GradNormMonitor()],
    "PrecisionFallback": lambda: [PrecisionFallback()],
    "FractionalCheckpoint": saving,
    "SpikeRecovery": lambda: [SpikeRecovery(every_n_steps=RARELY)],
    f"SpikeRecovery, a snapshot every {BETWEEN_SNAPSHOTS}": lambda: [SpikeRecovery(every_n_steps=BETWEEN_SNAPSHOTS)],
    "IncidentReport": lambda: [IncidentReport(FOLDER.name)],
    LIGHTNINGS: lambda: [SpikeDetection(rtol=1e9, exclude_batches_path=str(Path(FOLDER.name) / "skip.json"))],
    "the automatic ones": lambda: [NaNEarlyStop(patience=2), GradNormMonitor()],
    ALL: lambda: [
        NaNEarlyStop(patience=2),
        GradNormMonitor(),
        PrecisionFallback(),
        *saving(),
        SpikeRecovery(every_n_steps=RARELY),
        IncidentReport(FOLDER.name),
    ],
}
REFUSED = {"fsdp2": PrecisionFallback}
"""What a strategy does not have: its parameters carry their precision."""


def ways_of(options: argparse.Namespace) -> Ways:
    """Those that were asked for, without what the strategy refuses."""
    refused = REFUSED.get(options.strategy, ())

    def without_refused(make: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        return lambda: [callback for callback in make() if not isinstance(callback, refused)]

    ways = {way: without_refused(make) for way, make in WAYS.items() if way in options.ways or way == BARE}
    return {way: make for way, make in ways.items() if way == BARE or make()}


# One process.


class Sharded(Net):
    """Its blocks sharded one by one, as FSDP2 is used."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = self.device_mesh["data_parallel"]
        if isinstance(self.net, FSDPModule):
            return
        for block in self.net.blocks.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Ranks:
    """The process group, and blocks of training in it."""

    def __init__(self, strategy: str, quick: bool) -> None:
        self.rank, self.size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cuda", self.rank) if CUDA else torch.device("cpu")
        if CUDA:
            torch.cuda.set_device(self.device)
        torch.distributed.init_process_group("nccl" if CUDA else "gloo", device_id=self.device if CUDA else None)
        self.strategy = strategy
        module, batch, self.precision, self.steps = make_workload("gpt_bf16_fused", self.device, quick)
        self.module, self.batch = module, batch.to(self.device)
        self.tokens = batch.numel()

    def block(self, callbacks: list[Any], steps: int | None = None, log_every: int = 50) -> Clock:
        """Train a block on all ranks."""
        strategy: Any = "ddp"
        module = self.module
        if self.strategy == "fsdp2":
            strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=self.size, tensor_parallel_size=1)
            module = Sharded(_copied(self.module.net), fused=True)
        clock = Clock(self.device, self.steps if steps is None else steps)
        more = {"precision": self.precision, "devices": self.size, "strategy": strategy, "log_every_n_steps": log_every}
        return train_block(module, self.batch, clock, callbacks, FOLDER.name, **more)

    def agree(self, flag: bool) -> bool:
        """What the first rank says."""
        said = torch.tensor(float(flag), device=self.device)
        torch.distributed.broadcast(said, 0)
        return bool(said)


def _copied(net: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(net)


def work(options: argparse.Namespace) -> None:
    """What every rank does; the first one writes the figures."""
    ranks = Ranks(options.strategy, options.quick)
    ways = ways_of(options)
    report: dict[str, Any] = {"strategy": options.strategy, "processes": ranks.size, "backend": _backend()}

    def write() -> None:
        if ranks.rank == 0:
            save(report, options.json)

    ranks.block([], steps=3)  # the first one warms everything up
    report["added"] = added(ranks, ways)
    write()
    deadline = time.monotonic() + 60 * options.minutes

    def go_on(done: int) -> bool:
        return done < options.rounds and (not done or ranks.agree(time.monotonic() < deadline))

    def keep(figures: dict[str, Any]) -> None:
        milliseconds = {"bare": figures["bare_ms"], **figures["ms"]}
        speeds = {way: 1e3 * ranks.tokens / values["median"] for way, values in milliseconds.items()}
        report.update({**figures, "tokens_per_second_and_process": speeds})
        write()

    interleaved(ranks.block, ways, go_on, keep)
    if options.rounds and options.strategy == "ddp":
        ranks.block(WAYS[ALL]())
        report["weights_equal_on_all_ranks"] = _same_weights(ranks)
    write()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _backend() -> str:
    return str(torch.distributed.get_backend())


def _same_weights(ranks: Ranks) -> bool:
    total = torch.stack([p.detach().double().sum() for p in ranks.module.parameters()]).sum().reshape(1)
    if _backend() == "nccl":  # the Trainer has moved the module back
        total = total.cuda()
    sums = [torch.empty_like(total) for _ in range(ranks.size)]
    torch.distributed.all_gather(sums, total)
    return all(bool(other == sums[0]) for other in sums)


# What is added to a step.


class Profile(pl.Callback):
    """Profiles some steps, from one batch's start to another's."""

    FIRST = 12

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * CUDA
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.FIRST:
            self.profiler.start()
        elif batch_idx == self.FIRST + PROFILED:
            self.profiler.stop()

    def counts(self) -> dict[str, Any]:
        """Of one step: collectives and their bytes, kernels, waits of the host."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        counted: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        for event in events:
            name, kind = str(event.get("name", "")), event.get("cat")
            if kind in ("user_annotation", "cpu_op") and name.startswith(("nccl:", "gloo:")):
                counted["collectives"] += 1
                counted["bytes"] += _bytes_of(event.get("args", {}))
                kinds[name] += 1
            elif kind == "kernel":
                counted["nccl_kernels" if name.startswith("nccl") else "kernels"] += 1
            elif kind in ("gpu_memcpy", "gpu_memset"):
                counted["copies"] += 1
            elif kind == "cuda_runtime" and name in WAITS:
                counted["waits"] += 1
                kinds[name] += 1
        result: dict[str, Any] = {name: counted[name] / PROFILED for name in _COUNTED}
        return {**result, "of": {name: count / PROFILED for name, count in sorted(kinds.items())}}


_COUNTED = ("collectives", "bytes", "kernels", "nccl_kernels", "copies", "waits")
_SIZES = {"float": 4, "double": 8, "long int": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1}


def _bytes_of(args: dict[str, Any]) -> int:
    """Of the tensors that a collective was given."""
    total = 0
    for shape, kind in zip(args.get("Input Dims", []), args.get("Input type", []), strict=False):
        tensors = shape if shape and isinstance(shape[0], list) else [shape]
        total += sum(_SIZES.get(kind, 1) * math.prod(dimensions) for dimensions in tensors if dimensions or kind)
    return total


def added(ranks: Ranks, ways: Ways) -> dict[str, Any]:
    """What each way has in a step that a bare step has not."""

    def counts(callbacks: list[Any]) -> dict[str, Any]:
        profile = Profile()
        ranks.block([*callbacks, profile], steps=Profile.FIRST + PROFILED, log_every=RARELY)
        return profile.counts()

    counts([])  # (the profiler's own first time)
    bare = counts([])
    result: dict[str, Any] = {"bare": bare}
    for way, make in ways.items():
        ours = counts(make())
        names = {*ours["of"], *bare["of"]}
        differences = {name: ours["of"].get(name, 0) - bare["of"].get(name, 0) for name in names}
        more: dict[str, Any] = {name: ours[name] - bare[name] for name in _COUNTED}
        result[way] = {**more, "of": {name: count for name, count in differences.items() if count}}
    return result


# All of them.


def main() -> None:
    options = arguments()
    quiet()
    if NAMES in os.environ:
        work(options)
        return
    device = torch.device("cuda" if CUDA else "cpu")
    report: dict[str, Any] = {"machine": machine(device), "date": time.strftime("%Y-%m-%d"), "sizes": {}}
    print(report["machine"], flush=True)
    for size in options.gpus:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.json"
            words = [word for word in sys.argv[1:] if not word.startswith("--json=")]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            command = [*launcher, __file__, *words, f"--json={path}"]
            status = subprocess.run(command, env={**os.environ, NAMES: "1"}, check=False).returncode
            if path.exists():
                report["sizes"][size] = json.loads(path.read_text())
                print_size(report["sizes"][size])
            if status:
                print(f"{size} processes: ended with status {status}", flush=True)
        save(report, options.json)
    print_scaling(report["sizes"])


def print_size(figures: dict[str, Any]) -> None:
    print(f"\n{figures['strategy']}, {figures['processes']} processes on {figures['backend']}", end="")
    if "bare_ms" in figures:
        bare = figures["bare_ms"]
        print(f", {figures['rounds']} rounds: bare step {bare['median']:.2f} ms", end="")
        print(f" ({bare['min']:.2f} to {bare['max']:.2f})", end="")
    print(f"\n  {'':36s} {'step ratio':24s} collectives  bytes  kernels  copies  waits  (added to a step)")
    for way, more in figures["added"].items():
        ratio = figures.get("ratios", {}).get(way)
        text = "" if ratio is None else f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
        counts = f"{more['collectives']:11.2f} {more['bytes']:6.0f} {more['kernels']:8.1f} {more['copies']:7.1f}"
        print(f"  {way:36s} {text:24s} {counts} {more['waits']:6.2f}")
        if way != "bare" and more["of"]:
            print(f"  {'':36s}   {more['of']}")
    if "weights_equal_on_all_ranks" in figures:
        print(f"  weights equal on all ranks afterwards: {figures['weights_equal_on_all_ranks']}", flush=True)


def print_scaling(sizes: dict[int, dict[str, Any]]) -> None:
    known = {size: figures["tokens_per_second_and_process"] for size, figures in sizes.items() if "rounds" in figures}
    if not known:
        return
    first = next(iter(known))
    print(f"\ntokens a second and process, and over those at {first}")
    for way in known[first]:
        rows = [(size, of_size[way], known[first][way]) for size, of_size in known.items() if way in of_size]
        print(f"  {way:36s} " + "   ".join(f"{size}: {here:,.0f} ({here / one:.3f})" for size, here, one in rows))


def arguments() -> argparse.Namespace:
    most = torch.cuda.device_count() if CUDA else 2
    options_of = parser(__doc__, rounds=None, minutes=4, of_rounds="for each size; 0: only what is added to a step")
    options_of.add_argument("--quick", action="store_true", help="a small network; 1 round on CPUs, else 2")
    options_of.add_argument("--gpus", help="numbers of processes, with commas; 1, 2, 4 and 8 as far as there are GPUs")
    options_of.add_argument("--strategy", default="ddp", choices=("ddp", "fsdp2"))
    options = options_of.parse_args()
    options.rounds = options.rounds if options.rounds is not None else (2 if CUDA else 1) if options.quick else 7
    options.gpus = [int(n) for n in options.gpus.split(",")] if options.gpus else [n for n in (1, 2, 4, 8) if n <= most]
    options.ways = options.ways.split(",") if options.ways else list(WAYS)
    return options


if __name__ == "__main__":
    main()
