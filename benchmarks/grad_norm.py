"""What measuring gradient norms costs: GradNormMonitor beside a bare Trainer and what people do today.

Two figures for each way:

* hook time: the microseconds on host and device that the hooks themselves take, on the gradients of a real
  step, beside one bare `torch._foreach_norm` over the same gradients; the mean of as many steps as share one
  reading.
* step ratio: the time of a step over that of a bare Trainer's. Blocks of steps of all ways are interleaved in
  one process with bare blocks around them; each block is compared with the bare blocks at its sides, and the
  median over the rounds is given with the range.

usage: python benchmarks/grad_norm.py [--quick] [--rounds N] [--device cuda] [--workloads a,b] [--json FILE]
                                      [--gpu-tests] [--minutes M]

`--gpu-tests` first runs the tests marked `gpu`, which count synchronisations, so that one command does
everything on a machine with a GPU. The hook times of all workloads come next, then their step ratios. The file
is written after each part and each round: a run that is cut short, or that stops itself after `--minutes`,
leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare Trainer shall be bare where the package is installed

from common import machine, quiet, save, spread  # noqa: E402
from common.blocks import KeepNothing, SameBatch, synchronise  # noqa: E402
from common.nets import Transformer  # noqa: E402

from lightning_stability import GradNormMonitor  # noqa: E402
from lightning_stability.runtime import session_of  # noqa: E402

Gradients = list[Tensor]


def main() -> None:
    started = time.monotonic()
    options = arguments()
    quiet()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if options.gpu_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"], cwd=ROOT, check=False)
    device = torch.device(options.device)
    report = Report(options.json, device, options.rounds)
    for name in options.workloads:
        workload = make_workload(name, device, options.quick)
        if workload is not None:
            bandwidth = report.content["machine"]["read_bytes_per_second"]
            report.add_hooks(name, workload, hook_times(workload, device, bandwidth))
    for name in options.workloads if options.rounds else ():
        workload = make_workload(name, device, options.quick)
        if workload is not None:
            deadline = started + 60 * options.minutes
            step_ratios(workload, device, options.rounds, deadline, partial(report.add_steps, name))
            report.print_steps(name)


# Workloads


class Workload:
    """A module, its batches, and how long a block of steps should be."""

    def __init__(self, module: pl.LightningModule, batch: Any, steps: int, precision: str) -> None:
        self.module = module
        self.batch = batch
        self.steps = steps
        self.precision = precision


class Module(pl.LightningModule):
    """Any network whose output is pulled to zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).float().pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class ManyTensors(nn.Module):
    """2,000 weights of 1,024 numbers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(1024) * 0.02 for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.weights)) @ x.T


def make_workload(name: str, device: torch.device, quick: bool) -> Workload | None:
    cuda = device.type == "cuda"
    precision = "16-mixed" if cuda else "32-true"
    shorter = 3 if quick else 1
    torch.manual_seed(0)
    if name == "transformer":
        width, layers, length, batch = (768, 12, 512, 16) if cuda else (256, 4, 64, 4)
        net = Transformer(width, layers, 12 if cuda else 4, 32_000 if cuda else 4_000, length)
        tokens = torch.randint(0, 4_000, (batch, length))
        return Workload(Module(net), tokens.to(device), 10 // shorter, precision)
    if name == "small_tensors":
        layers = [part for _ in range(73) for part in (nn.Linear(128, 128), nn.Tanh())]
        net = nn.Sequential(*layers, nn.Linear(128, 128, bias=False))
        return Workload(Module(net), torch.randn(32, 128).to(device), 24 // shorter, precision)
    if name == "2000_tensors":
        return Workload(Module(ManyTensors(2000)), torch.randn(8, 1024).to(device), 12 // shorter, precision)
    return probe_workload(device, precision, (8 if cuda else 6) // shorter)


def probe_workload(device: torch.device, precision: str, steps: int) -> Workload | None:
    try:
        from lightning_stability.tuab import EEGPTProbe
    except ImportError as error:
        print(f"probe: skipped, because lightning_stability.tuab cannot be imported here ({error})")
        return None

    class Probe(EEGPTProbe):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5)

    cuda = device.type == "cuda"
    module = Probe(encoder="large" if cuda else "small")
    count = 32 if cuda else 2
    batch = {"eeg": torch.randn(count, 19, 2048), "label": torch.randint(0, 2, (count,))}
    return Workload(module, {key: value.to(device) for key, value in batch.items()}, steps, precision)


# The ways to look at gradients


class EachStep(pl.Callback):
    """Calls a function where the usual recipes do."""

    def __init__(self, look: Callable[[pl.LightningModule], Any]) -> None:
        self.look = look

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.look(pl_module)


def gradients(module: nn.Module) -> Gradients:
    return [p.grad for p in module.parameters() if p.grad is not None]


def lightnings_recipe(module: pl.LightningModule) -> None:
    from pytorch_lightning.utilities import grad_norm

    module.log_dict(grad_norm(module, norm_type=2))


def isfinite_loop(module: pl.LightningModule) -> None:
    for gradient in gradients(module):
        if not torch.isfinite(gradient).all():
            break


def item_per_parameter(module: pl.LightningModule) -> None:
    """As Composer's OptimizerMonitor does."""
    norms = {f"l2_norm/grad/{n}": p.grad.norm().item() for n, p in module.named_parameters() if p.grad is not None}
    norms["l2_norm/grad/global"] = sum(norm**2 for norm in norms.values()) ** 0.5


def total_norm(module: pl.LightningModule) -> None:
    torch.nn.utils.get_total_norm(gradients(module))


WAYS: dict[str, Callable[[], tuple[list[pl.Callback], float | None]]] = {
    "Lightning's grad_norm": lambda: ([EachStep(lightnings_recipe)], None),
    "isfinite per parameter": lambda: ([EachStep(isfinite_loop)], None),
    ".item() per parameter": lambda: ([EachStep(item_per_parameter)], None),
    "get_total_norm, not read": lambda: ([EachStep(total_norm)], None),
    "GradNormMonitor, every step": lambda: ([GradNormMonitor(every_n_steps=1)], None),
    "GradNormMonitor, every 50": lambda: ([GradNormMonitor(every_n_steps=50)], None),
    "clipping": lambda: ([], 1.0),
    "clipping + GradNormMonitor, every 50": lambda: ([GradNormMonitor(every_n_steps=50)], 1.0),
}
SHORTER = {"Lightning's grad_norm": 4}
"""By what to divide the steps of a way that takes several times as long, and shows it in fewer."""


# Step ratios


class Clock(pl.Callback):
    """Times the steps of a block after the first few."""

    WARM_UP = 3

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.WARM_UP:
            synchronise(self.device)
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        synchronise(self.device)
        self.seconds = time.perf_counter() - self.start


def run_block(
    workload: Workload, device: torch.device, callbacks: list[pl.Callback], clip: float | None, steps: int
) -> float:
    """Train for a block of steps; the seconds of one step."""
    clock = Clock(device)
    trainer = make_trainer(workload, device, [*callbacks, clock], clip, Clock.WARM_UP + steps)
    trainer.fit(workload.module, DataLoader(SameBatch(workload.batch), batch_size=None))
    return clock.seconds / steps


def make_trainer(
    workload: Workload, device: torch.device, callbacks: list[pl.Callback], clip: float | None, steps: int
) -> pl.Trainer:
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=workload.precision,  # type: ignore[arg-type]
        max_steps=steps,
        logger=KeepNothing(),
        log_every_n_steps=50,
        callbacks=callbacks,
        gradient_clip_val=clip,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def step_ratios(
    workload: Workload, device: torch.device, rounds: int, deadline: float, save: Callable[[dict[str, Any]], None]
) -> None:
    """Save the ratios after each round; start none that would outlast the deadline."""
    run_block(workload, device, [], None, workload.steps)  # compiles, allocates, warms caches
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    bare: list[float] = []
    order = random.Random(0)
    longest = 0.0
    for done in range(rounds):
        started = time.monotonic()
        if started + longest > deadline:
            print(f"no time for more than {done} of {rounds} rounds")
            return
        ways = list(WAYS)
        order.shuffle(ways)
        bare.append(run_block(workload, device, [], None, workload.steps))
        for way in ways:
            callbacks, clip = WAYS[way]()
            seconds = run_block(workload, device, callbacks, clip, max(2, workload.steps // SHORTER.get(way, 1)))
            # A bare block before and after: what drifts over the round falls on both sides.
            bare.append(run_block(workload, device, [], None, workload.steps))
            ratios[way].append(2 * seconds / (bare[-2] + bare[-1]))
        bare_ms = {key: 1e3 * value for key, value in spread(bare).items()}
        save({"rounds": done + 1, "bare_ms": bare_ms, "ratio": {way: spread(r) for way, r in ratios.items()}})
        longest = max(longest, time.monotonic() - started)


# Hook times


class TimeHooks(pl.Callback):
    """Runs everything that is timed again and again on the gradients of one real step."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self.result: dict[str, dict[str, Any]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step != 3 or self.result:
            return
        pipeline = session_of(trainer).pipeline
        held = gradients(pl_module)
        parameters = [p for p in pl_module.parameters() if p.grad is not None]
        loss = torch.ones((), device=self.device)

        def ours(clip: bool) -> None:
            pipeline.on_loss(loss)
            pipeline.on_step_begin(optimizer)
            pipeline.measure(optimizer)
            if clip:
                assert pipeline.clips(optimizer, 1e6)
            pipeline.on_step_end()

        clips = bool(trainer.gradient_clip_val)
        ours(clips)  # makes the meter
        timed: dict[str, Callable[[], Any]] = {
            "torch._foreach_norm": lambda: torch._foreach_norm(held),
            "GradNormMonitor": lambda: ours(clip=False),
            "get_total_norm": lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters]),
        }
        if clips:
            timed = {
                "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e6),
                "GradNormMonitor with clipping": lambda: ours(clip=True),
            }
        self.result = interleaved(timed, self.device, self.repeats)
        pipeline.on_step_begin(optimizer)  # leave the real step as it was found


def hook_times(workload: Workload, device: torch.device, bandwidth: float) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for clip in (None, 1e6):
        hooks = TimeHooks(device, repeats=60)
        # The monitor's interval keeps these steps off its log, as most are.
        trainer = make_trainer(workload, device, [GradNormMonitor(every_n_steps=10**6), hooks], clip, 5)
        trainer.fit(workload.module, DataLoader(SameBatch(workload.batch), batch_size=None))
        result.update(hooks.result)
    size = sum(p.numel() * p.element_size() for p in workload.module.parameters() if p.requires_grad)
    result["one read at the measured bandwidth"] = {"device_us": 1e6 * size / bandwidth}
    return result


STEPS = GradNormMonitor.read_every
"""A monitor's steps differ: every so many it hands over what was read. So many make one measurement."""


def interleaved(timed: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, Any]:
    """Host and device microseconds of each function, in turns, each call on an idle device; the mean of STEPS."""
    host: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 3):
        for name, function in timed.items():
            elapsed = 0.0
            for _ in range(STEPS):
                synchronise(device)
                start = time.perf_counter()
                function()
                elapsed += time.perf_counter() - start
            if repeat >= 3:
                host[name].append(1e6 * elapsed / STEPS)
    result: dict[str, Any] = {}
    for name, function in timed.items():
        spread_of_host = spread(host[name])
        result[name] = {"host_us": spread_of_host["median"], "host_us_range": spread_of_host}
        if device.type == "cuda":
            result[name]["device_us"] = device_microseconds(function)
    return result


def device_microseconds(function: Callable[[], Any], calls: int = STEPS) -> float:
    """The time of the function's work on the device, which waits until the host has queued it all."""
    times = []
    for repeat in range(6):
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)  # about a fifth of a second
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        ahead = not start.query()
        end.synchronize()
        if repeat and ahead:  # the first one pins memory
            times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times) if times else float("nan")


# The machine and the report


def described(device: torch.device) -> dict[str, Any]:
    return {**machine(device), "read_bytes_per_second": read_bandwidth(device)}


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of the fastest of some sums over a large tensor."""
    tensor = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            tensor.sum()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            tensor.sum()
            best = min(best, time.perf_counter() - started)
    return tensor.numel() * 4 / best


class Report:
    """What was measured: printed part by part, and in the file from the first part on."""

    def __init__(self, path: Path | None, device: torch.device, rounds: int) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": described(device), "rounds": rounds, "workloads": {}}
        print(json.dumps(self.content["machine"]))

    def add_hooks(self, name: str, workload: Workload, hooks: dict[str, Any]) -> None:
        trained = [p for p in workload.module.parameters() if p.requires_grad]
        numbers = sum(p.numel() for p in trained)
        self.content["workloads"][name] = {"parameters": numbers, "tensors": len(trained), "hooks": hooks}
        save(self.content, self.path)
        print(f"\n{name}: {numbers:,} trained numbers in {len(trained)} tensors")
        print(f"{'hook':40s} {'host us':>10s} {'ratio':>7s} {'device us':>10s} {'ratio':>7s}")
        for hook, times in hooks.items():
            reference = hooks["clip_grad_norm_" if "clip" in hook else "torch._foreach_norm"]
            columns = ""
            for key in ("host_us", "device_us"):
                columns += f" {times[key]:10.1f}" if key in times else " " * 11
                columns += f" {times[key] / reference[key]:7.2f}" if key in times and key in reference else " " * 8
            print(f"{hook:40s}{columns}")

    def add_steps(self, name: str, steps: dict[str, Any]) -> None:
        self.content["workloads"][name]["steps"] = steps
        save(self.content, self.path)

    def print_steps(self, name: str) -> None:
        steps = self.content["workloads"][name].get("steps")
        if steps is None:
            return
        bare = steps["bare_ms"]
        rounds = f"{steps['rounds']} rounds"
        print(f"\n{name}: bare step {bare['median']:.2f} ms ({bare['min']:.2f} to {bare['max']:.2f}), {rounds}")
        print(f"{'way':40s} {'step ratio':>10s}   range")
        for way, ratio in steps["ratio"].items():
            print(f"{way:40s} {ratio['median']:10.3f}   {ratio['min']:.3f} to {ratio['max']:.3f}")


def arguments() -> argparse.Namespace:
    every = ["transformer", "small_tensors", "2000_tensors", "probe"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter blocks and 3 rounds: to see that it runs")
    parser.add_argument("--rounds", type=int, help="rounds of interleaved blocks (7); 0: hook times alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=every, help=", ".join(every))
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="start no round that would end later than this (7.5)"
    )
    parser.add_argument("--gpu-tests", action="store_true", help="first run the tests marked gpu")
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 3 if options.quick else 7
    return options


if __name__ == "__main__":
    main()
