"""A run in two processes that is killed inside an epoch, and goes on in one: which samples does the epoch have?"""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common.children import Child, in_a_child
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rivals.saves import KILL, STEPS, Net, Way, run

BATCH, RANKS = 4, 2
SAMPLES = STEPS * BATCH * RANKS


class Numbered(Dataset[Any]):
    """Samples that know their number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((8,), index / SAMPLES), index


class NumberedNet(Net):
    """Writes down with which samples each step was made."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log_file = log

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values, numbers = batch
        with self.log_file.open("a") as file:
            print(self.trainer.global_step, *numbers.tolist(), file=file)
        return super().training_step(values, batch_idx)


class Killed(pl.Callback):
    """Every process ends at once."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == KILL:
            trainer.strategy.barrier()
            os._exit(9)


def judged(way: Way) -> dict[str, Any]:
    """Where it goes on, and what the epoch has of each sample."""
    with tempfile.TemporaryDirectory() as name:
        folder, logs = Path(name) / "checkpoints", Path(name)
        folder.mkdir()
        port = _free_port()
        children = [Child(lambda: _of_rank(way, folder, logs, rank, port)) for rank in range(RANKS)]  # noqa: B023
        first = [child.result() for child in children]
        resumed = in_a_child(lambda: _fit(way, folder, logs / "resumed", None))
        outcome: dict[str, Any] = {"first": first, "resumed": resumed}
        if "raised" in resumed or "killed" in resumed:
            return {**outcome, "outcome": f"no resume: {resumed.get('raised', 'killed').partition(':')[0]}"}
        before = [sample for rank in range(RANKS) for sample in _seen(logs / f"{rank}", resumed["began"])]
        seen = Counter(before + _seen(logs / "resumed", 10**9))
    again, never = sum(count - 1 for count in seen.values()), SAMPLES - len(seen)
    where = f"resumed at step {resumed['began']}" if resumed["began"] else "started anew"
    amiss = again + never
    text = f"{where}; {again} of {SAMPLES} samples again, {never} never" if amiss else f"{where}, each sample once"
    return {**outcome, "outcome": text, "again": again, "never": never, "amiss": amiss}


def _seen(log: Path, until: int) -> list[int]:
    if not log.exists():
        return []
    lines = [[int(word) for word in line.split()] for line in log.read_text().splitlines()]
    return [sample for step, *samples in lines if step < until for sample in samples]


def _of_rank(way: Way, folder: Path, logs: Path, rank: int, port: int) -> dict[str, Any]:
    of_launcher = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "ranks"}
    os.environ.update({name: str(value) for name, value in (of_launcher | place).items()})
    return _fit(way, folder, logs / f"{rank}", Killed(), devices=RANKS, strategy="ddp")


def _fit(way: Way, folder: Path, log: Path, fault: pl.Callback | None, **options: Any) -> dict[str, Any]:
    data = DataLoader(Numbered(), batch_size=BATCH)
    return run(way, folder, NumberedNet(log), data, fault, **options)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
