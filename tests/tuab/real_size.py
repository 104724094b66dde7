"""A cache of the size of the whole corpus, whose array is a sparse file: the system reads zeros without having them.

Also used by `benchmarks/tuab.py`, which runs this file in a new process to measure the first training step.

usage: real_size.py ROOT CACHE_DIR WORKERS BALANCED
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytorch_lightning as pl
import torch

from lightning_stability.tuab import TUABDataModule, WindowCache, WindowDataset, find_recordings
from lightning_stability.tuab.index import (
    INDEX,
    ROW_BYTES,
    SAMPLES,
    CachedRecording,
    cached_line,
    file_stamps,
    last_line,
    settings_line,
)

RECORDINGS, WINDOWS = 2_993, 930_495  # the crash report's
LENGTH, STRIDE = 8 * 256, 4 * 256
# Nearly all of the recordings are in the train set: two in each of the others.
OPTIONS: dict[str, Any] = {"val_fraction": 0.001, "batch_size": 32}


def write_sparse_cache(root: Path, cache_dir: Path) -> Path:
    """Write a corpus of empty files and a finished cache of it; return the cache's folder."""
    for number in range(RECORDINGS):
        split, name = ("eval" if number < 2 else "train"), ("normal", "abnormal")[number % 2]
        folder = root / "edf" / split / name / "01_tcp_ar"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:08d}_s001_t000.edf").touch()
    folder = TUABDataModule(root=str(root), cache_dir=str(cache_dir)).cache_folder
    folder.mkdir(parents=True)
    recordings = find_recordings(root)
    stamps = file_stamps(root, recordings)
    lines, rows = [settings_line()], 0
    for number, recording in enumerate(recordings):
        windows = WINDOWS // RECORDINGS + (number < WINDOWS % RECORDINGS)
        cached = CachedRecording(**asdict(recording), start=rows, samples=(windows - 1) * STRIDE + LENGTH)
        lines.append(cached_line(cached, stamps[recording.path], 0))
        rows += cached.samples
    (folder / INDEX).write_bytes(b"".join([*lines, last_line()]))
    with (folder / SAMPLES).open("wb") as file:
        file.truncate(rows * ROW_BYTES)
    return folder


def open_cache(folder: Path) -> WindowDataset:
    """Open a cache and lay all windows out in it."""
    cache = WindowCache(folder)
    return WindowDataset(cache, range(len(cache.recordings)), LENGTH / 256, STRIDE / 256)


class OneStep(pl.LightningModule):
    """Next to no model: what is measured is the way to the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(19, 2)
        self.estimated = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trainer.should_stop = True
        return torch.nn.functional.cross_entropy(self.layer(batch["eeg"].mean(2)), batch["label"])

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        return torch.optim.AdamW(self.parameters())


def first_step(root: Path, cache_dir: Path, workers: int, balanced: bool, **options: Any) -> dict[str, Any]:
    """Train one step from nothing; return how long it took and how much memory the process gained."""
    before, started, used = resident_bytes(), time.perf_counter(), time.process_time()
    options = {**OPTIONS, "num_workers": workers, "class_balanced": balanced, **options}
    data = TUABDataModule(root=str(root), cache_dir=str(cache_dir), **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = OneStep()
    trainer.fit(module, data)
    assert trainer.global_step == 1
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "rss_growth_mb": (resident_bytes() - before) / 1e6,
        "train_windows": len(data.datasets["train"]),
        "estimated_stepping_batches": module.estimated,
    }


def read_bytes() -> int:
    """Return how much this process has read so far, bytes."""
    fields = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def resident_bytes() -> int:
    """Return the memory of this process that is not shared with others, bytes."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0]) + 1024 * int(fields["RssFile"].split()[0])


if __name__ == "__main__":
    root, cache_dir, workers, balanced = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4]))
    # What torch and Lightning import at their first step is not what the windows take.
    first_step(root, cache_dir, 0, balanced, stride_seconds=400.0)
    result = first_step(root, cache_dir, workers, balanced)
    print(json.dumps(result))
