"""What the Triton kernels over a table of addresses save over `torch._foreach_norm`, as the way to measure all norms.

GradNormMonitor trains the same module with both ways, in blocks of steps that are interleaved in one process with
blocks of a bare Trainer, in a random order: bf16 (fp32 on a CPU) and fused AdamW, where the host can run ahead of the
device. Given are the time of a step over that of the bare blocks at its sides, and the kernels' ratio over that of
`_foreach_norm` in the same round: median, quartiles and range. Beside it the host time of one measurement.

usage: python benchmarks/norm_kernels.py [--quick] [--rounds N] [--minutes M] [--device cuda] [--json FILE]

The file is written after each round; no round is started that would end after `--minutes`. Without an NVIDIA GPU both
ways are `_foreach_norm`: their ratio is then the noise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import grad_norm  # noqa: E402
from common import machine, quiet, save  # noqa: E402
from guard import make_workload as guard_workload  # noqa: E402

from lightning_stability import GradNormMonitor  # noqa: E402
from lightning_stability.health import GradientMeter, LateReads  # noqa: E402
from lightning_stability.health.pointer_norms import PointerNorms  # noqa: E402

WORKLOADS = {"transformer": "GPT of 110 M", "small_tensors": "147 small tensors", "batch_norm": "53 batch norms"}
STEPS = {"transformer": 16, "small_tensors": 40, "batch_norm": 40}


def main() -> None:
    options = arguments()
    quiet()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": machine(device), "workloads": {}}
    for place, (name, title) in enumerate(WORKLOADS.items()):
        deadline = time.monotonic() + 60 * options.minutes / len(WORKLOADS)
        workload = make_workload(name, device, options.quick)
        result = report["workloads"][title] = {
            "host_us": host_times(workload.module.to(device), device, 2 if options.quick else 60)
        }
        print(f"{title}: host us of one measurement {result['host_us']}")
        for round_ in rounds(workload, device, options.rounds, deadline, seed=place):
            result.setdefault("rounds", []).append(round_)
            result["summary"] = summary(result["rounds"])
            save(report, options.json)
        for key, values in result.get("summary", {}).items():
            print(f"    {key:28s} " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        del workload


def make_workload(name: str, device: torch.device, quick: bool) -> Any:
    workload = guard_workload(name, device, quick, fused=True)
    workload.precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    workload.steps = 3 if quick else STEPS[name]
    return workload


def monitor(by_address: bool) -> Any:
    """Trains with one of the ways: a context, and the monitor."""
    suit = PointerNorms.suit if by_address else staticmethod(lambda parameters: False)
    return mock.patch.object(PointerNorms, "suit", suit), [GradNormMonitor(every_n_steps=50)]


def rounds(workload: Any, device: torch.device, count: int, deadline: float, seed: int) -> Any:
    """Each round's seconds a step, of each way's block and of the bare blocks around it."""
    order, longest = random.Random(seed), 0.0
    grad_norm.run_block(workload, device, [], None, workload.steps)  # compiles, allocates
    bare = grad_norm.run_block(workload, device, [], None, workload.steps)
    for done in range(count):
        started = time.monotonic()
        if done and started + longest > deadline:
            print(f"    no time for more than {done} of {count} rounds")
            return
        times: dict[str, float] = {}
        ways = [True, False]
        order.shuffle(ways)
        for by_address in ways:
            patch, callbacks = monitor(by_address)
            with patch:
                seconds = grad_norm.run_block(workload, device, callbacks, None, workload.steps)
            before, bare = bare, grad_norm.run_block(workload, device, [], None, workload.steps)
            name = "kernels" if by_address else "foreach"
            times[name], times[f"bare of {name}"] = seconds, (before + bare) / 2
        longest = max(longest, time.monotonic() - started)
        yield times


def summary(done: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    def spread(values: list[float]) -> dict[str, float]:
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        return {
            "median": quartiles[1], "lower quartile": quartiles[0], "upper quartile": quartiles[2],
            "min": min(values), "max": max(values), "rounds": float(len(values)),
        }  # fmt: skip

    ratios = {
        "kernels over bare": [t["kernels"] / t["bare of kernels"] for t in done],
        "foreach over bare": [t["foreach"] / t["bare of foreach"] for t in done],
    }
    ratios["kernels over foreach"] = [
        kernels / foreach
        for kernels, foreach in zip(ratios["kernels over bare"], ratios["foreach over bare"], strict=True)
    ]
    return {name: spread(values) for name, values in ratios.items()}


def host_times(module: nn.Module, device: torch.device, repeats: int) -> dict[str, float]:
    """Microseconds of the host for one measurement and its sending, each way; the mean of interleaved calls."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    meters = {}
    for by_address in (True, False):
        patch, _ = monitor(by_address)
        with patch:
            meters["kernels" if by_address else "foreach"] = GradientMeter(torch.optim.SGD(parameters), {}, False)
    if meters["kernels"].pointers is None:
        print("    the kernels cannot be used here: both ways are torch._foreach_norm")
    times: dict[str, list[float]] = {name: [] for name in meters}
    reads = {name: LateReads(every=8) for name in meters}
    loss = torch.ones((), device=device)
    for repeat in range(8 * (repeats + 1)):
        for name, meter in meters.items():
            grad_norm.synchronise(device)
            start = time.perf_counter()
            meter.measure({}, {"loss": loss})
            meter.send(reads[name], lambda measurement: None)
            reads[name].poll()
            if repeat >= 8:  # memory is pinned in the first ones
                times[name].append(1e6 * (time.perf_counter() - start))
    for parameter in parameters:
        parameter.grad = None
    return {name: round(statistics.fmean(values), 1) for name, values in times.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short blocks and 2 rounds: to see that it runs")
    parser.add_argument("--rounds", type=int, help="rounds of interleaved blocks (40)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all workloads together (8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 2 if options.quick else 40
    return options


if __name__ == "__main__":
    main()
