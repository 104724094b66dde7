"""Runs that really spike: a byte-level GPT on the standard library's source, and what each way makes of it.

Cases: `bursts` (three corrupted batches in a row, at random places), `weight` and `moment` (a flipped exponent bit, in
a weight and in Adam's first moment, after which the loss is finite and up), `rate` (a learning rate ten times too high,
without warm-up), and healthy runs: `text`, `images`, `heavy_tails`, `eeg` (see common/spiky.py).

Many runs share a device, so their seconds say nothing: the step ratios are measured alone, before them. A run is
ruined if its loss ends non-finite, or 0.5 above that of the healthy bare run with the same seed. Steps lost are updates
on good batches that are not in the final weights; restored are single numbers. arc-training takes part if it is
installed (pip install arc-training).

usage: python benchmarks/spikes.py [--quick] [--device cuda] [--seeds 3-7] [--steps N] [--cases a,b] [--ways "a;b"]
                                   [--workers N] [--minutes M] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare run is bare

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import machine, quiet, save, spread  # noqa: E402
from common.rivals import SkipStep, ZClip, arc, has_arc, spike_detection  # noqa: E402
from common.spiky import SIZES, Workload, workload  # noqa: E402

from lightning_stability import NaNEarlyStop, SpikeRecovery  # noqa: E402

FAULTS, HEALTHY = ("bursts", "weight", "moment"), ("text", "images", "heavy_tails", "eeg")
CASES = (*FAULTS, "rate", *HEALTHY)
RUINED_BY = 0.5
OURS = "SpikeRecovery"


@dataclass(frozen=True)
class Way:
    """Callbacks, and Lightning's clipping."""

    make: Callable[[], list[Any]] = list
    clip: float | None = None
    also: tuple[str, ...] = HEALTHY
    """In which cases it takes part, besides those with faults."""


WAYS = {
    "bare": Way(also=("rate", *HEALTHY)),
    "clipping": Way(clip=1.0, also=("rate", "text")),
    "SpikeDetection": Way(lambda: [spike_detection()]),
    "ZClip": Way(lambda: [ZClip()], also=("text",)),
    "OLMo's skip-step": Way(lambda: [SkipStep()]),
    **({"arc-training": Way(lambda: [arc()])} if has_arc() else {}),
    OURS: Way(lambda: [SpikeRecovery(), NaNEarlyStop()], also=("rate", *HEALTHY)),
    f"{OURS}, clipping": Way(lambda: [SpikeRecovery(), NaNEarlyStop()], 1.0, ("rate", "text")),
}


# One run.


def make_trainer(device: str, steps: int, callbacks: list[Any], clip: float | None, folder: str) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=[torch.cuda.current_device()] if device.startswith("cuda") else 1,
        precision="bf16-mixed" if device.startswith("cuda") else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=clip,
        default_root_dir=folder,
        callbacks=callbacks,
    )


def run(case: str, way: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    """Train once, and say what became of it."""
    quiet()
    work, callbacks = workload(case, seed, device, steps), WAYS[way].make()
    recovery = next((callback for callback in callbacks if isinstance(callback, SpikeRecovery)), None)
    skipped: list[int] = next((callback.skipped for callback in callbacks if hasattr(callback, "skipped")), [])
    if recovery is not None:
        recovery.on_record = watched(recovery.on_record, skipped)  # type: ignore[method-assign]
    said = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(device, steps, [*work.callbacks, *callbacks], WAYS[way].clip, folder)
        began = time.perf_counter()
        try:
            trainer.fit(work.module, DataLoader(work.data, batch_size=None))
        except Exception as error:  # SpikeDetection ends a run so
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        seconds = time.perf_counter() - began
    ends = [str(w.message) for w in caught if "ended the run" in str(w.message)]
    trained = trainer.global_step
    applied = recovery._position if recovery is not None else trained - len(skipped)
    good_skips = set(skipped) - work.bad - after_fault(work)
    return {
        **{"case": case, "way": way, "seed": seed, "steps": trained, "seconds": seconds},
        "val_loss": work.evaluate(),
        "ended": (ends[0] if ends else said),
        "bad": len(work.bad),
        "bad_skipped": len(work.bad & set(skipped)),
        "false_skips": len(good_skips),
        "lost": max(0, steps - applied - len(work.bad & set(skipped))),
        "rewinds": recovery.rewinds if recovery is not None else 0,
        "restored_numbers": recovery.restored_numbers if recovery is not None else 0,
        "fault": getattr(work.callbacks[0], "flipped", None) if work.callbacks else None,
        "fault_at": work.fault_at,
        "why": [str(w.message)[:400] for w in caught if "rewound" in str(w.message)],
    }


def after_fault(work: Workload) -> set[int]:
    """The steps whose skips a flipped bit may be to blame for."""
    return set() if work.fault_at is None else set(range(work.fault_at, work.fault_at + 100))


def watched(on_record: Callable[[Any], None], skipped: list[int]) -> Callable[[Any], None]:
    def on(record: Any) -> None:
        on_record(record)
        if record.outcome in ("spike", "bad"):
            skipped.append(record.step)

    return on


# What a step costs.


class Clock(pl.Callback):
    """Times all steps after the first few."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.seconds = warm_up, math.nan

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up:
            self._wait(module)
            self.began = time.perf_counter()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._wait(module)
        self.seconds = (time.perf_counter() - self.began) / (trainer.global_step - self.warm_up)

    def _wait(self, module: Any) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()


def step_ratios(device: str, ways: list[str], steps: int, rounds: int) -> dict[str, Any]:
    """The step of each way over the mean of the bare ones right before and after it."""
    warm_up = steps // 3

    def block(way: str) -> float:
        work, clock = workload("text", 0, device, steps), Clock(warm_up)
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [*WAYS[way].make(), clock]
            trainer = make_trainer(device, steps, callbacks, WAYS[way].clip, folder)
            trainer.fit(work.module, DataLoader(work.data, batch_size=None))
        return clock.seconds

    timed = [way for way in ways if way not in ("bare", "SpikeDetection", f"{OURS}, clipping")]
    ratios: dict[str, list[float]] = {way: [] for way in timed}
    bare = [block("bare"), block("bare")][1:]
    for _ in range(rounds):
        for way in timed:
            seconds = block(way)
            bare.append(block("bare"))
            ratios[way].append(2 * seconds / (bare[-2] + bare[-1]))
    return {
        "bare_ms": spread([1e3 * b for b in bare]),
        "ratio": {way: spread(values) for way, values in ratios.items()},
    }


def host_memory(device: str) -> int:
    """Bytes of the two snapshots of a GPT."""
    callback, size = SpikeRecovery(), 0

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            nonlocal size
            size = callback._fit.snapshots.state.nbytes()

    work = workload("text", 0, device, 3)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(device, 3, [callback, Looks()], None, folder)
        trainer.fit(work.module, DataLoader(work.data, batch_size=None))
    return 2 * size


# All runs.

Job = tuple[str, str, int]


def jobs(cases: list[str], ways: list[str], seeds: list[int]) -> Iterator[Job]:
    """What matters most first. The healthy bare run is the measure of all."""
    faults, others = [case for case in cases if case in FAULTS], [case for case in cases if case not in FAULTS]
    for seed in seeds:
        yield "text", "bare", seed
        yield from ((case, way, seed) for case in faults for way in ways)
    for seed, case, way in itertools.product(seeds, others, ways):
        if case in WAYS[way].also and (case, way) != ("text", "bare"):
            yield case, way, seed


def start_worker(numbers: Any) -> None:
    """One thread for each process; on several GPUs by turns."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def all_runs(
    todo: list[Job], device: str, steps: int, workers: int, deadline: float, keep: Callable[[dict[str, Any]], None]
) -> int:
    """Run them beside each other; none is started after the deadline. Returns how many there was no time for."""
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    waiting = iter(todo)
    with ProcessPoolExecutor(workers, context, start_worker, (numbers,)) as pool:
        running: set[Future[dict[str, Any]]] = set()
        started = 0
        while True:
            while len(running) < workers and time.monotonic() < deadline:
                job = next(waiting, None)
                if job is None:
                    break
                running.add(pool.submit(run, *job, device, steps))
                started += 1
            if not running:
                return len(todo) - started
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if error is None:
                    keep(future.result())
                else:  # of one run, which must not cost the others
                    print(f"a run failed: {error!r}", file=sys.stderr, flush=True)


HEAD = (
    *("way", "final loss", "ruined", "ended early", "bad skipped", "false skips", "steps lost", "restored", "rewinds"),
    "step ratio",
)


def table(report: dict[str, Any]) -> str:
    """Medians over the seeds (and ranges) of each case, and how often a way ends lower than all others."""
    lines = []
    runs = report["runs"]
    clean = {r["seed"]: r["val_loss"] for r in runs if (r["case"], r["way"]) == ("text", "bare")}
    ratios = report["steps_alone"]["ratio"]
    for case in [case for case in CASES if any(r["case"] == case for r in runs)]:
        of_case = [r for r in runs if r["case"] == case]
        lines += [f"\n{case}", f"| {' | '.join(HEAD)} |", "|---|" + "---|" * (len(HEAD) - 1)]
        for way in [way for way in WAYS if any(r["way"] == way for r in of_case)]:
            rows = [r for r in of_case if r["way"] == way]
            losses = sorted(finite(r["val_loss"]) for r in rows)
            count, bad = len(rows), sum(r["bad"] for r in rows)
            ruined = sum(is_ruined(r, clean) for r in rows) if case in (*FAULTS, "rate", "text") else "-"
            cells = [
                f"{statistics.median(losses):.3f} ({losses[0]:.3f} to {losses[-1]:.3f})",
                f"{ruined} of {count}" if ruined != "-" else "-",
                f"{sum(bool(r['ended']) for r in rows)} of {count}",
                f"{sum(r['bad_skipped'] for r in rows)} of {bad}" if bad else "-",
                f"{sum(r['false_skips'] for r in rows)} of {sum(r['steps'] for r in rows)}",
                f"{statistics.mean(r['lost'] for r in rows):.0f}",
                f"{sum(r['restored_numbers'] for r in rows)}",
                f"{sum(r['rewinds'] for r in rows)}",
                f"{ratios[way]['median']:.3f}" if way in ratios else "-",
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        if case in FAULTS:
            lines += ["", lowest(of_case, OURS), lowest(of_case, f"{OURS}, clipping")]
    if report["not_run"]:
        lines.append(f"\nno time for {report['not_run']} runs")
    return "\n".join(lines)


def lowest(of_case: list[dict[str, Any]], way: str) -> str:
    """In how many seeds it ends lower than every way without SpikeRecovery."""
    better: list[int] = []
    seeds = sorted({r["seed"] for r in of_case})
    for seed in seeds:
        others = [finite(r["val_loss"]) for r in of_case if r["seed"] == seed and not r["way"].startswith(OURS)]
        ours = [finite(r["val_loss"]) for r in of_case if r["seed"] == seed and r["way"] == way]
        if others and ours and ours[0] < min(others):
            better.append(seed)
    return f"{way} ends lower than every way without {OURS} in {len(better)} of {len(seeds)} seeds {better}"


def finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def is_ruined(row: dict[str, Any], clean: dict[int, float]) -> bool:
    return not row["val_loss"] <= clean.get(row["seed"], math.inf) + RUINED_BY


def main() -> None:
    args = arguments()
    quiet()
    began = time.monotonic()
    steps, ways = args.steps or SIZES[args.device].steps, [way for way in WAYS if way in args.ways.split(";")]
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    report: dict[str, Any] = {
        "machine": machine(torch.device(args.device)),
        **{"steps": steps, "size": vars(SIZES[args.device]), "seeds": args.seeds, "runs": [], "not_run": 0},
        "host_memory_of_two_snapshots": host_memory(args.device),
        "steps_alone": step_ratios(args.device, ways, 90 if args.device == "cuda" else 60, args.rounds),
    }
    print(json.dumps({name: value for name, value in report.items() if name != "runs"}), flush=True)

    def keep(row: dict[str, Any]) -> None:
        report["runs"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        save(report, args.json)

    todo = list(jobs(args.cases.split(","), ways, args.seeds))
    deadline = began + 60 * args.minutes
    report["not_run"] = all_runs(todo, args.device, steps, args.workers, deadline, keep)
    report["minutes"] = (time.monotonic() - began) / 60
    save(report, args.json)
    print(table(report))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed of the cases with faults, and three ways")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", default="3-7", help="the first and the last; the rule was chosen on 0 to 2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons: names have commas")
    parser.add_argument("--rounds", type=int, default=2, help="of the step ratios")
    parser.add_argument("--workers", type=int, help="processes; 8 for each GPU, 1 on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="after that no run is started")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(cases=",".join(FAULTS), ways=f"bare;clipping;{OURS}", seeds="3", steps=200, rounds=1)
        args = parser.parse_args()
    first, _, last = args.seeds.partition("-")
    args.seeds = list(range(int(first), int(last or first) + 1))
    args.workers = args.workers or (8 * torch.cuda.device_count() if args.device == "cuda" else 1)
    return args


if __name__ == "__main__":
    main()
