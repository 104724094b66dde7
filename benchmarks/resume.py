"""What resuming inside an epoch costs: from `iter(loader)` to the first batch that was not trained yet.

Beside it the same loader at the start of an epoch, which draws an order too, and what loading the skipped batches would
take if a sample took a millisecond.

usage: python benchmarks/resume.py [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import machine, save  # noqa: E402

from lightning_stability.checkpointing.passes import Passes, Start  # noqa: E402

ROUNDS = 5


class Numbers(Dataset[int]):
    """As many samples as are asked for, which cost nothing; it counts them."""

    def __init__(self, count: int) -> None:
        self.count, self.loaded = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.loaded += 1
        return index


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer samples: to see that it runs")
    options = parser.parse_args()
    shapes = [(10_000, 32)] if options.quick else [(1_000_000, 32), (1_000_000, 2), (16_000_000, 32)]
    rows = [measure(*shape) for shape in shapes]
    names = ("samples", "batch size", "at batch", "start of an epoch (s)", "resumed (s)", "loaded", "by loading (s)")
    print("| " + " | ".join(names) + " |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for value in row.values()]
        print("| " + " | ".join(cells) + " |")
    if options.json:
        save({"machine": machine(torch.device("cpu")), "rows": rows}, options.json)


def measure(samples: int, batch_size: int) -> dict[str, Any]:
    """One row of the table: the median of some rounds."""
    torch.manual_seed(0)
    loader, passes = made(samples, batch_size)
    iterator = iter(loader)
    next(iterator)
    [position] = passes.positions([loader])
    passes.stop()
    assert position is not None
    batch = samples // batch_size - 2
    starts, resumes, loaded = [], [], set()
    for _ in range(ROUNDS):
        bare = DataLoader(Numbers(samples), batch_size, shuffle=True)
        started = time.perf_counter()
        next(iter(bare))
        starts.append(time.perf_counter() - started)
        loader, passes = made(samples, batch_size)
        passes.begin_at(loader, Start({**position, "batches": batch, "last": None}))
        started = time.perf_counter()
        next(iter(loader))
        resumes.append(time.perf_counter() - started)
        loaded.add(loader.dataset.loaded)
        passes.stop()
    assert loaded == {batch_size}
    return {
        "samples": samples,
        "batch_size": batch_size,
        "batch": batch,
        "epoch_start_s": statistics.median(starts),
        "resumed_s": statistics.median(resumes),
        "loaded": batch_size,
        "by_loading_s": batch * batch_size * 1e-3,
    }


def made(samples: int, batch_size: int) -> tuple[Any, Passes]:
    """A shuffled loader that is followed."""
    loader, passes = DataLoader(Numbers(samples), batch_size, shuffle=True), Passes()
    passes.start()
    passes.follow([loader], 1)
    return loader, passes


if __name__ == "__main__":
    main()
