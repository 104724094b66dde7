"""What the TUAB corpus costs at its real size: opening its cache, the first step, reading windows, preprocessing.

* opening and first step: 930,495 windows of 2,993 recordings in a sparse file of 36 GB. Opening is what
  `WindowCache` and `WindowDataset` take; the first step is measured in a new process, from making the data module to
  the end of one step of next to no model, `trainer.estimated_stepping_batches` included, without imports.
* windows read a second, in random order, with the file in the page cache: by one process one by one, and through the
  data module's kind of loader with two workers, batches of 32 collated. Beside them the limit, copies of a window's
  bytes from a random place of an array in memory.
* preprocessing: recordings a minute with one process and with as many as there are cores, and where the time goes in
  one process. The files are noise in TUAB's form: 20 minutes, 32 signals at 250 Hz of which 19 are used.

usage: python benchmarks/tuab.py [--quick] [--recordings N] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytorch_lightning as pl
import torch
from edfio import Edf, EdfSignal
from torchdata.stateful_dataloader import StatefulDataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"

from common import save, spread  # noqa: E402

from lightning_stability.tuab import (  # noqa: E402
    CHANNELS,
    TUABDataModule,
    WindowCache,
    WindowDataset,
    build_cache,
    building,
    corpus,
    find_recordings,
)
from tests.tuab import real_size  # noqa: E402

TRAINING_SPEED = 258  # windows a second, the crash report's
REPORTED_OPENING = 0.14  # seconds
RATE, SIGNALS = 250, 32


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    report: dict[str, Any] = {"machine": machine()}
    print(json.dumps(report["machine"]), flush=True)
    try:
        for name, part in (("real_size", opening), ("preprocessing", preprocessing_speed), ("reading", reading)):
            (folder / name).mkdir()
            report[name] = part(folder / name, options)
            save(report, options.json)
            shutil.rmtree(folder / name)
    finally:
        shutil.rmtree(folder)


# Opening and the first step


def opening(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    root, cache_dir = folder / "tuab", folder / "cache"
    cache = real_size.write_sparse_cache(root, cache_dir)
    seconds = []
    for _ in range(5 if options.quick else 20):
        started = time.perf_counter()
        real_size.open_cache(cache)
        seconds.append(time.perf_counter() - started)
    data = TUABDataModule(root=str(root), cache_dir=str(cache_dir), **real_size.OPTIONS)
    started = time.perf_counter()
    data.prepare_data()
    data.setup("fit")
    result: dict[str, Any] = {
        "windows": real_size.WINDOWS,
        "recordings": real_size.RECORDINGS,
        "opening_seconds": spread(seconds),
        "prepare_and_setup_seconds": time.perf_counter() - started,
        "first_step": {},
    }
    print(f"\n{real_size.WINDOWS:,} windows of {real_size.RECORDINGS:,} recordings")
    print(f"  opening                    {show(result['opening_seconds'])} s (the report's: {REPORTED_OPENING})")
    print(f"  prepare_data and setup     {result['prepare_and_setup_seconds']:.3f} s")
    for workers, balanced in ((0, 0), (2, 0), (2, 1)):
        words = [sys.executable, real_size.__file__, str(root), str(cache_dir), str(workers), str(balanced)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        way = f"{workers} workers{', balanced' if balanced else ''}"
        step = result["first_step"][way] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"  first step, {way:20s} {step['seconds']:.2f} s, the main process gains {step['rss_growth_mb']:.0f} MB",
            flush=True,
        )
    return result


# Preprocessing


def preprocessing_speed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    seconds = 120 if options.quick else 1200
    root = folder / "tuab"
    write_noise(root, options.recordings, seconds)
    recordings = find_recordings(root)
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"recordings": len(recordings), "seconds_each": seconds, "per_minute": {}}
    print(f"\npreprocessing {len(recordings)} recordings of {seconds} s, {SIGNALS} signals at {RATE} Hz")
    for processes in sorted({1, cores}):
        with stages(active=processes == 1) as spent:
            started = time.perf_counter()
            build_cache(root, recordings, folder / f"cache{processes}", processes)
            whole = time.perf_counter() - started
        result["per_minute"][processes] = 60 * len(recordings) / whole
        print(f"  {processes} processes (their start included): {60 * len(recordings) / whole:.0f} recordings a minute")
        if processes == 1:
            spent["everything else"] = whole - sum(spent.values())
            result["seconds_per_recording"] = {stage: value / len(recordings) for stage, value in spent.items()}
            for stage, value in spent.items():
                print(f"    {stage:20s} {1e3 * value / len(recordings):7.1f} ms a recording, {value / whole:4.0%}")
    sys.stdout.flush()
    return result


def write_noise(root: Path, count: int, seconds: int) -> None:
    rng = np.random.default_rng(0)
    names = [*CHANNELS, *(f"X{number}" for number in range(SIGNALS - len(CHANNELS)))]
    for number in range(count):
        folder = root / "edf" / ("eval" if number < 2 else "train") / ("normal", "abnormal")[number % 2] / "01_tcp_ar"
        folder.mkdir(parents=True, exist_ok=True)
        signals = [
            EdfSignal(
                rng.normal(0, 30, RATE * seconds),
                RATE,
                label=f"EEG {name}-REF",
                physical_dimension="uV",
                physical_range=(-3276, 3276),
            )
            for name in names
        ]
        Edf(signals).write(folder / f"{number:08d}_s001_t000.edf")


@contextmanager
def stages(active: bool) -> Iterator[dict[str, float]]:
    """Time what a build calls, in this process."""
    spent: dict[str, float] = defaultdict(float)
    originals = []
    watched = (
        ("reading EDF", corpus, "_open_recording"),
        ("reading EDF", mne.io.BaseRaw, "load_data"),
        ("filtering", mne.io.BaseRaw, "filter"),
        ("resampling", mne.io.BaseRaw, "resample"),
        ("scaling", corpus, "robust_z_score"),
        ("writing", building._Writer, "add"),
    )

    def timed(stage: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[stage] += time.perf_counter() - started

        return call

    for stage, owner, name in watched if active else ():
        originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, timed(stage, getattr(owner, name)))
    try:
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


# Reading windows


def reading(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    seconds, count, windows = (600, 8, 2_000) if options.quick else (1200, 64, 20_000)
    cache = write_windows(folder, count, seconds)
    dataset = WindowDataset(cache, range(count), 8, 4)
    order = random.Random(0).choices(range(len(dataset)), k=windows)
    for number in range(count):
        cache.read(number)  # from here on it is in the page cache
    one = []
    for _ in range(3):
        started = time.perf_counter()
        for index in order:
            dataset[index]
        one.append(windows / (time.perf_counter() - started))
    result = {
        "bytes_a_window": 19 * dataset.length * 2,
        "one_process": spread(one),
        "two_workers": spread(loaded(dataset, order)),
        "limit": spread(copied(cache, count, dataset.length, windows)),
        "report_trained": TRAINING_SPEED,
    }
    print(f"\nrandom windows a second, of {count * seconds * 256 * 38 / 1e9:.1f} GB in the page cache")
    for way in ("one_process", "two_workers", "limit"):
        against = f", {result[way]['median'] / TRAINING_SPEED:.0f} times the report's {TRAINING_SPEED}"
        print(f"  {way.replace('_', ' '):12s} {show(result[way], 0)}{against}")
    sys.stdout.flush()
    return result


def write_windows(folder: Path, count: int, seconds: int) -> WindowCache:
    """Write a cache of noise, without the way through EDF files."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((seconds * 256, 19), dtype=np.float32).astype(np.float16)
    (folder / "cache").mkdir()
    lines = [real_size.settings_line()]
    with (folder / "cache" / real_size.SAMPLES).open("wb") as file:
        for number in range(count):
            place = {"path": f"{number}.edf", "subject": "s", "label": number % 2, "official_split": "train"}
            cached = real_size.CachedRecording(**place, start=number * len(noise), samples=len(noise))  # type: ignore[arg-type]
            lines.append(real_size.cached_line(cached, [0, 0], 0))
            file.write(np.roll(noise, number, axis=0).tobytes())
    (folder / "cache" / real_size.INDEX).write_bytes(b"".join([*lines, real_size.last_line()]))
    return WindowCache(folder / "cache")


def loaded(dataset: WindowDataset, order: list[int]) -> list[float]:
    loader: Any = StatefulDataLoader(dataset, batch_size=32, sampler=order, num_workers=2, persistent_workers=True)
    next(iter(loader))  # starts the workers
    speeds = []
    for _ in range(3):
        started = time.perf_counter()
        for _batch in loader:
            pass
        speeds.append(len(order) / (time.perf_counter() - started))
    return speeds


def copied(cache: WindowCache, count: int, length: int, windows: int) -> list[float]:
    """Windows' bytes a second that are copied within memory, from random places, by one process."""
    rows = np.concatenate([cache.read(number) for number in range(min(count, 16))])  # more than any processor's cache
    starts = random.Random(1).choices(range(len(rows) - length), k=windows)
    speeds = []
    for _ in range(3):
        started = time.perf_counter()
        for start in starts:
            rows[start : start + length].copy()
        speeds.append(windows / (time.perf_counter() - started))
    return speeds


def show(values: dict[str, float], digits: int = 3) -> str:
    median, least, most = (f"{values[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def machine() -> dict[str, Any]:
    return {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
        "mne": mne.__version__,
        "python": platform.python_version(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter recordings, fewer windows")
    parser.add_argument("--recordings", type=int, help="to preprocess, at least four")
    parser.add_argument("--folder", type=Path, help="where temporary files go; 3 GB are needed, 0.3 with --quick")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.recordings = options.recordings or (8 if options.quick else 24)
    return options


if __name__ == "__main__":
    main()
