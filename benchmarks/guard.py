"""What it costs to let no bad update land, and which ways of doing it survive what.

For each way, with fused and with foreach AdamW: the time of a step over that of a bare Trainer's, from blocks that are
interleaved with bare blocks in one process (see grad_norm.py). Beside it, once and on the CPU, which bad steps a run
survives: it ends without an exception and with finite weights, buffers and epoch metrics.

First of all InputCheck's check of a batch: host and device time of its hook, with the Triton kernels and with torch's
pass in their place, beside one read of the batch's bytes at the bandwidth measured and beside one `amax`, and the
number of kernels.

usage: python benchmarks/guard.py [--quick] [--rounds N] [--device cuda] [--workloads a,b] [--json FILE]
                                  [--no-inputs] [--no-scenarios]
`stabilityguard` is compared if it is installed (pip install --no-deps stabilityguard==0.3.0).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import grad_norm  # noqa: E402
from common import quiet, save, spread  # noqa: E402
from common.nets import batch_norm_net  # noqa: E402
from common.rivals import spike_detection  # noqa: E402

from lightning_stability import GradNormMonitor, InputCheck, NaNEarlyStop  # noqa: E402
from lightning_stability.health import input_scan  # noqa: E402
from tests.recovery import poison  # noqa: E402

FUSED = {"fused": True, "foreach": False}


def main() -> None:
    options = arguments()
    quiet()
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": grad_norm.described(device), "rounds": options.rounds, "workloads": {}}
    print(json.dumps(report["machine"]), flush=True)
    if options.inputs:
        report["inputs"] = looks(device, options.quick, report["machine"]["read_bytes_per_second"])
        print_looks(report["inputs"])
        save(report, options.json)
    for name in options.workloads:
        for kind, fused in FUSED.items():
            workload = make_workload(name, device, options.quick, fused)
            result = step_ratios(workload, device, options.rounds)
            report["workloads"][f"{name}, {kind}"] = result
            print_ratios(f"{name}, {kind} AdamW", result)
            save(report, options.json)
            del workload
    if options.scenarios:
        report["survives"] = survival()
        print_survival(report["survives"])
        save(report, options.json)


# The ways


class EachStep(pl.Callback):
    """What people write: look at the loss of each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs is not None and outputs["loss"].isnan():
            trainer.should_stop = True


class StabilityGuard(pl.Callback):
    """`stabilityguard.GuardedOptimizer` around the optimizer, where its README puts it."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from stabilityguard import GuardedOptimizer

        self.folder = tempfile.TemporaryDirectory()
        options = {"nan_action": "skip", "verbose": False, "log_every": 10**9, "log_dir": self.folder.name}
        with contextlib.redirect_stdout(io.StringIO()):
            guarded = GuardedOptimizer(trainer.optimizers[0], pl_module, **options)

        def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Callable[[], Any]) -> None:
            loss = closure()
            with contextlib.redirect_stdout(io.StringIO()):
                guarded.step(loss=None if loss is None else float(loss))

        pl_module.optimizer_step = optimizer_step
        self.guarded = guarded

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        del pl_module.optimizer_step
        self.guarded._hook_manager.detach()


WAYS: dict[str, Callable[[], list[pl.Callback]]] = {
    "EarlyStopping(check_finite=True)": lambda: [EarlyStopping("loss", check_on_train_epoch_end=True, patience=10**9)],
    ".isnan() each step": lambda: [EachStep()],
    "SpikeDetection": lambda: [spike_detection(rtol=1e9)],
    "GradNormMonitor": lambda: [GradNormMonitor(every_n_steps=50)],
    "NaNEarlyStop": lambda: [NaNEarlyStop()],
    "InputCheck": lambda: [InputCheck()],
    'InputCheck(action="skip")': lambda: [InputCheck(action="skip")],
    "NaNEarlyStop + GradNormMonitor": lambda: [NaNEarlyStop(), GradNormMonitor(every_n_steps=50)],
}
if importlib.util.find_spec("stabilityguard"):
    WAYS["stabilityguard"] = lambda: [StabilityGuard()]


# The look at a batch


BATCHES = {
    "32 x 19 x 2048 (EEG)": (32, 19, 2048),
    "256 x 3 x 224 x 224 (images)": (256, 3, 224, 224),
    "16 x 1024 x 768 (tokens)": (16, 1024, 768),
    "4096 x 64 (features)": (4096, 64),
}


class TimeLook(pl.Callback):
    """Times InputCheck's look at the batch of a real step; InputCheck is the callback before this one."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.result: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx < 5:
            return
        check = trainer.callbacks[trainer.callbacks.index(self) - 1]

        def look() -> None:
            check._check(trainer, batch, batch_idx, None)
            check._reads.poll()

        def look_by_torch() -> None:
            scan, input_scan.scan = input_scan.scan, input_scan.scan_with_torch
            look()
            input_scan.scan = scan

        timed = {"look": look, "torch": look_by_torch, "amax": lambda: batch.amax()}
        self.result = grad_norm.interleaved(timed, self.device, self.repeats)
        self.result["kernels"] = kernels_of(look) if self.device.type == "cuda" else None
        trainer.should_stop = True


def kernels_of(look: Callable[[], None]) -> float:
    """How many kernels and copies a look puts on the device; the mean of as many as share one reading."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(8):
            look()
        torch.cuda.synchronize()
    # (the host's calls are events too)
    on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.count for event in on_device) / 8


def looks(device: torch.device, quick: bool, bandwidth: float) -> dict[str, Any]:
    result = {}
    for name, shape in BATCHES.items():
        shape = (max(shape[0] // 16, 2), *shape[1:]) if quick and device.type == "cpu" else shape
        batch = torch.randn(shape).to(device)
        module = grad_norm.Module(FirstValues())
        workload = grad_norm.Workload(module, batch, 8, "32-true")
        timer = TimeLook(device, repeats=5 if quick else 60)
        trainer = grad_norm.make_trainer(workload, device, [InputCheck(), timer], None, 8)
        trainer.fit(module, grad_norm.DataLoader(grad_norm.SameBatch(batch), batch_size=None))
        read = 1e6 * batch.numel() * batch.element_size() / bandwidth
        result[name] = {"shape": shape, "read_us": read, **timer.result}
    return result


class FirstValues(torch.nn.Module):
    """Next to nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten()[:16] * self.weight


# Step ratios


def make_workload(name: str, device: torch.device, quick: bool, fused: bool) -> grad_norm.Workload:
    if name == "batch_norm":
        images = torch.randn(16, 3, 32, 32).to(device)
        workload = grad_norm.Workload(grad_norm.Module(batch_norm_net()), images, 20, "32-true")
    else:
        made = grad_norm.make_workload(name, device, quick)
        assert made is not None
        workload = made
    if quick:
        workload.steps = max(workload.steps // 2, 3)
    workload.precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    module = workload.module

    def configure_optimizers() -> torch.optim.Optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-5, fused=fused, foreach=None if fused else True)

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    return workload


def step_ratios(workload: grad_norm.Workload, device: torch.device, rounds: int) -> dict[str, Any]:
    def block(callbacks: list[pl.Callback]) -> float:
        return grad_norm.run_block(workload, device, callbacks, None, workload.steps)

    block([])  # compiles, allocates, warms caches
    ways = [way for way in WAYS if way != "EarlyStopping(check_finite=True)"]  # it looks once an epoch: costs nothing
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    bare: list[float] = []
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(ways)
        bare.append(block([]))
        for way in ways:
            seconds = block(WAYS[way]())
            bare.append(block([]))
            ratios[way].append(2 * seconds / (bare[-2] + bare[-1]))
    summary = {way: spread(values) for way, values in ratios.items()}
    return {"bare_ms": {k: 1e3 * v for k, v in spread(bare).items()}, "ratio": summary}


# Survival


SCENARIOS = {
    "NaN input, batch norm": {2: "nan_input"},
    "infinite loss": {2: "inf_loss"},
    "NaN gradient, finite loss": {2: "nan_gradient"},
    "gradient whose square overflows": {2: "overflow"},
    "the very first batch": {0: "nan_input"},
    "two in a row": {2: "nan_input", 3: "nan_input"},
    "in an accumulation window": {1: "nan_input"},
}


def survival() -> dict[str, dict[str, str]]:
    """Per way and scenario: "yes", or what was lost."""
    result: dict[str, dict[str, str]] = {}
    # (what these scenarios spoil is spoilt behind InputCheck's back, in the module)
    for way in ["bare", *(way for way in WAYS if not way.startswith("InputCheck"))]:
        result[way] = {}
        for scenario, kinds in SCENARIOS.items():
            callbacks = [] if way == "bare" else WAYS[way]()
            for callback in callbacks:
                if isinstance(callback, NaNEarlyStop):
                    callback.patience = 2  # skip and go on, as the others do
            accumulate = 2 if "window" in scenario else 1
            result[way][scenario] = survives(kinds, callbacks, accumulate)
    return result


def survives(kinds: dict[int, str], callbacks: list[pl.Callback], accumulate: int) -> str:
    module = poison.make_module(pl, kinds, lambda p: torch.optim.AdamW(p, lr=1e-2), by_hand=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = poison.fit(pl, module, callbacks, accumulate_grad_batches=accumulate)
    except Exception as error:
        return f"raises {type(error).__name__}"
    lost = {"weights" if name in trained(module) else "buffers" for name in poison.nonfinite(result["weights"])}
    state = result["optimizers"][0]["state"]
    if any(not torch.isfinite(t).all() for s in state.values() for t in s.values()):
        lost.add("optimizer state")
    metrics = [value for epoch in result["metrics"] for value in epoch.values()]
    if any(not torch.isfinite(torch.tensor(value)) for value in metrics):
        lost.add("epoch metrics")
    return "yes" if not lost else "no: " + ", ".join(sorted(lost))


def trained(module: pl.LightningModule) -> set[str]:
    return {name for name, _ in module.named_parameters()}


# The report


def print_looks(result: dict[str, Any]) -> None:
    heads = f"{'one read us':>12s} {'host us':>9s} {'device us':>10s} {'/ read':>7s} {'amax us':>9s} {'kernels':>8s}"
    print(f"\n{'InputCheck looks at':32s} {heads}")
    for name, of_batch in result.items():
        amax = of_batch["amax"].get("device_us", of_batch["amax"]["host_us"])
        for way, title in (("look", name), ("torch", "  by torch")):
            host, device = of_batch[way]["host_us"], of_batch[way].get("device_us")
            ratio = f"{'-':>10s} {'-':>7s}" if device is None else f"{device:10.1f} {device / of_batch['read_us']:7.2f}"
            kernels = "-" if way == "torch" or of_batch["kernels"] is None else f"{of_batch['kernels']:.1f}"
            print(f"{title:32s} {of_batch['read_us']:12.1f} {host:9.1f} {ratio:>18s} {amax:9.1f} {kernels:>8s}")


def print_ratios(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}: {result['bare_ms']['median']:.1f} ms bare")
    for way, ratio in result["ratio"].items():
        print(f"  {way:40s} {ratio['median']:.3f} ({ratio['min']:.2f} to {ratio['max']:.2f})", flush=True)


def print_survival(table: dict[str, dict[str, str]]) -> None:
    for way, row in table.items():
        print(f"\n{way}")
        for scenario, verdict in row.items():
            print(f"  {scenario:40s} {verdict}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter blocks and fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", default="small_tensors,batch_norm")
    parser.add_argument("--no-inputs", dest="inputs", action="store_false")
    parser.add_argument("--no-scenarios", dest="scenarios", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rounds = options.rounds if options.rounds is not None else (3 if options.quick else 7)
    # without rounds there is nothing to say of a workload
    options.workloads = [name for name in options.workloads.split(",") if name] if options.rounds else []
    return options


if __name__ == "__main__":
    main()
