"""How often GradNormMonitor's rule sees a rising norm, and how often it warns of one that only varies.

A healthy run is noise in the logarithm of the norm, around a constant or a slow course (`SHAPES`). A rise multiplies
the norm by 100 within some steps, and the norm stays there. It is seen if the rule warns within 100 steps of its start.

The settings are a grid: length of the rise x standard deviation of the noise x first step of the rise x kind of noise.
The rule was made on every second setting, as on a chessboard ("made_on"). The docs give the figures of the other half.

usage: python benchmarks/norm_trend.py [--quick] [--seeds N] [--steps N] [--half made_on|held_out] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another version's rule can be measured too

from lightning_stability.health.trend import NormTrend  # noqa: E402

Floats = Any
FACTOR = 100.0
LENGTHS = (5, 10, 20, 35, 50, 70, 85, 100)
DEVIATIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
STARTS = (0, 5, 10, 20, 35, 50, 100, 300)


def normal(random: np.random.Generator, steps: int) -> Floats:
    return random.normal(size=steps)


def student(degrees: int) -> Callable[[np.random.Generator, int], Floats]:
    """Heavy tails, scaled so that the middle half is as wide as a normal one's."""
    quartile = {2: 0.8165, 3: 0.7649}[degrees]
    return lambda random, steps: random.standard_t(degrees, size=steps) * 0.6745 / quartile


def spikes(random: np.random.Generator, steps: int) -> Floats:
    """One step in fifty is six standard deviations up."""
    return random.normal(size=steps) + 6.0 * (random.random(steps) < 0.02)


def wandering(random: np.random.Generator, steps: int) -> Floats:
    """Each step is like the one before it: an autoregressive process with coefficient 0.8."""
    values, value = random.normal(size=steps), random.normal()
    for step in range(steps):
        value = 0.8 * value + 0.6 * values[step]
        values[step] = value
    return values


NOISES = {"normal": normal, "student 3": student(3), "student 2": student(2), "spikes": spikes, "wandering": wandering}


def settling(steps: Floats) -> Floats:
    """Falls to a thirtieth in the first 200 steps, as many runs begin."""
    return np.log(30.0) * np.maximum(1.0 - steps / 200, 0.0)


def warming_up(steps: Floats) -> Floats:
    """Rises to five times within 50 steps, and is back 150 steps later, as with a learning rate that warms up."""
    return np.log(5.0) * np.clip(np.minimum(steps / 50, (200 - steps) / 150), 0.0, 1.0)


def growing(steps: Floats) -> Floats:
    """Ten times as large after 1,000 steps, twenty times after 2,000."""
    return np.log(1.0 + steps / 105)


def by_epochs(steps: Floats) -> Floats:
    """Three times as large at each epoch's end as at its beginning; an epoch has 150 steps."""
    return np.log(3.0) * (steps % 150) / 150


SHAPES = {
    "constant": np.zeros_like,
    "settling": settling,
    "warming up": warming_up,
    "growing": growing,
    "by epochs": by_epochs,
}


def main() -> None:
    options = arguments()
    detection, alarms = [], []
    for name, deviation, length, start in settings(options.half, NOISES, DEVIATIONS, LENGTHS, STARTS):
        seen = 0
        for seed in range(options.seeds):
            random = np.random.default_rng([seed, start, length, round(1000 * deviation)])
            logs = deviation * NOISES[name](random, start + 100)
            logs[start:] += np.log(FACTOR) * np.minimum(np.arange(1, 101) / length, 1.0)
            warned = warnings(logs)
            seen += any(step >= start for step in warned)
        detection.append(
            {"noise": name, "deviation": deviation, "length": length, "start": start, "seen": seen / options.seeds}
        )
    for name, deviation, shape in settings(options.half, NOISES, DEVIATIONS, SHAPES):
        random = np.random.default_rng([round(1000 * deviation), list(NOISES).index(name)])
        course = SHAPES[shape](np.arange(2000.0))
        runs = max(1, options.steps // 2000)
        count = sum(len(warnings(course + deviation * NOISES[name](random, 2000))) for _ in range(runs))
        rate = 1e4 * count / (2000 * runs)
        alarms.append({"noise": name, "deviation": deviation, "shape": shape, "per_10000_steps": rate})
    print_tables(detection, alarms)
    if options.json:
        options.json.write_text(json.dumps({"detection": detection, "false_warnings": alarms}, indent=1) + "\n")


def settings(half: str, *axes: Any) -> Iterator[Any]:
    """Every second setting of the grid."""
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        if sum(places) % 2 == (half == "held_out"):
            yield tuple(list(axis)[place] for axis, place in zip(axes, places, strict=True))


def warnings(logs: Floats) -> list[int]:
    """The steps at which the rule warns."""
    trend, group = NormTrend(("all",)), np.ones(1)
    return [step for step, norm in enumerate(np.exp(logs).tolist()) if trend.update(norm, group) is not None]


def print_tables(detection: list[dict[str, Any]], alarms: list[dict[str, Any]]) -> None:
    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    for axis in ("length", "deviation", "start", "noise"):
        print(f"\n{axis:>12s}  seen    worst setting")
        for value in dict.fromkeys(row[axis] for row in detection):
            rows = [row for row in detection if row[axis] == value]
            print(f"{value!s:>12s}  {100 * mean(rows, 'seen'):5.1f} %  {100 * min(r['seen'] for r in rows):5.1f} %")
    below = sum(row["seen"] < 0.95 for row in detection)
    print(f"\nall: {100 * mean(detection, 'seen'):.1f} % seen; {below} of {len(detection)} settings below 95 %")
    for row in sorted(detection, key=lambda row: row["seen"])[:10]:
        print("   ", row)
    print("\nfalse warnings in 10,000 steps")
    for axis in ("noise", "deviation", "shape"):
        for value in dict.fromkeys(row[axis] for row in alarms):
            rows = [row for row in alarms if row[axis] == value]
            worst = max(row["per_10000_steps"] for row in rows)
            print(f"{value!s:>12s}  {mean(rows, 'per_10000_steps'):.3f}  {worst:.2f}")
    print(f"mean {mean(alarms, 'per_10000_steps'):.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="runs of each setting (20)")
    parser.add_argument("--steps", type=int, default=40_000, help="healthy steps of each kind and deviation (40,000)")
    parser.add_argument("--half", choices=("made_on", "held_out"), default="held_out")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--quick", action="store_true", help="one run of each setting: to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = 1, 500
    return options


if __name__ == "__main__":
    main()
