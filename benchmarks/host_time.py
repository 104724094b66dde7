"""Host microseconds that the callbacks add to a step of a tiny network on the CPU, where nothing else takes time.

Counted is the time of the thread that trains, so that other processes disturb little. A block is a fit of some hundred
steps; its figure is the median step. Blocks of all ways are interleaved, and with `--against` those of another checkout
too, each round in a process of its own. Printed is what each way adds to the bare step: the median over all rounds, and
the least and the most; medians of ratios would say little, since the bare step is nearly all Lightning's own.

usage: python benchmarks/host_time.py [--quick] [--rounds N] [--blocks N] [--steps N] [--ways a,b] [--against CHECKOUT]
                                      [--json FILE]
       python benchmarks/host_time.py --profile NaNEarlyStop     where the time goes
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = Path(os.environ.get("HOST_TIME_CHECKOUT", HERE.parent.parent))
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import torch  # noqa: E402
from common import machine, quiet, save, spread  # noqa: E402
from common.blocks import Clock, parser, train_block  # noqa: E402
from overhead import BARE, FOLDER, WAYS, Net  # noqa: E402
from torch import nn  # noqa: E402

CPU = torch.device("cpu")


class ThreadClock(Clock):
    """Times steps by what the thread has used of a core."""

    def now(self) -> float:
        return time.thread_time()


def fit(callbacks: list[Any], steps: int) -> float:
    """Train a block; returns the microseconds of its median step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    clock = ThreadClock(CPU, steps)
    return 1e6 * train_block(Net(net, fused=True), torch.randn(4, 8), clock, callbacks, FOLDER.name).median


def one_round(ways: list[str], blocks: int, steps: int) -> dict[str, float]:
    """Of each way the least of its blocks' medians: a block can only be made slower by what is beside it."""
    fit([], 30)
    found: dict[str, list[float]] = {way: [] for way in (BARE, *ways)}
    for _ in range(blocks):
        for way in found:
            found[way].append(fit(WAYS[way](), steps))
    return {way: min(values) for way, values in found.items()}


def of_checkout(checkout: Path, options: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own, with the package of a checkout."""
    numbers = ["--blocks", str(options.blocks), "--steps", str(options.steps), "--ways", options.ways]
    environment = {**os.environ, "HOST_TIME_CHECKOUT": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), "--one-round", *numbers]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def added(rounds: list[dict[str, float]], way: str) -> dict[str, Any]:
    """What a way adds to the bare step of its round."""
    return spread([of_round[way] - of_round[BARE] for of_round in rounds])


def profile(way: str, steps: int) -> None:
    """Print the package's functions by the time spent in them and below; the profiler itself takes as much again."""
    fit(WAYS[way](), 30)
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    fit(WAYS[way](), steps)
    profiler.disable()
    rows = [
        (1e6 * below / steps, 1e6 * own / steps, calls / steps, f"{Path(file).name}:{line} {name}")
        for (file, line, name), (_, calls, own, below, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
        if "lightning_stability" in file
    ]
    print("  below     own   calls  (microseconds and calls per step)")
    for below, own, calls, place in sorted(rows, reverse=True)[:80]:
        print(f"{below:7.1f} {own:7.1f} {calls:7.1f}  {place}")


def main() -> None:
    options_of = parser(__doc__, rounds=5, minutes=None)
    options_of.add_argument("--blocks", type=int, default=3, help="fits of each way in a round")
    options_of.add_argument("--steps", type=int, default=300, help="of a fit")
    options_of.add_argument("--against", type=Path, help="another checkout of this repository")
    options_of.add_argument("--profile", metavar="WAY")
    options_of.add_argument("--one-round", action="store_true", help=argparse.SUPPRESS)
    options_of.set_defaults(ways=",".join(way for way in WAYS if way not in (BARE, "SpikeRecovery, every 15")))
    options_of.add_argument("--quick", action="store_true", help="one round of short fits: to see that it runs")
    options = options_of.parse_args()
    if options.quick:
        options.rounds, options.blocks, options.steps = 1, 1, 30
    quiet()
    torch.set_num_threads(1)
    ways = options.ways.split(",")
    if options.profile:
        profile(options.profile, options.steps)
        return
    if options.one_round:
        print(json.dumps(one_round(ways, options.blocks, options.steps)))
        return
    checkouts = {"this": ROOT, **({} if options.against is None else {"that": options.against.resolve()})}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(options.rounds):
        for name in list(checkouts)[:: -1 if number % 2 else 1]:
            rounds[name].append(of_checkout(checkouts[name], options))
    report = {
        "machine": machine(CPU),
        "bare_us": {name: spread([of_round[BARE] for of_round in rounds[name]]) for name in rounds},
        "added_us": {name: {way: added(rounds[name], way) for way in ways} for name in rounds},
    }
    print(report["machine"])
    for name, of_checkouts in report["added_us"].items():
        print(f"{name}: bare step {report['bare_us'][name]['median']:.0f} us, {options.rounds} rounds; added by")
        for way, of_way in of_checkouts.items():
            low, high = of_way["min"], of_way["max"]
            print(f"  {way:26s} {of_way['median']:6.0f} us  ({low:.0f} to {high:.0f})", flush=True)
    save(report, options.json)


if __name__ == "__main__":
    main()
