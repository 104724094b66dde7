"""What a program of the zoo is: a small training run that goes wrong at a known place, or only looks as if it would."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass
class Expected:
    """Where the first non-finite value is made.

    Attributes:
        phase: `"input"`, `"weights"`, `"forward"`, `"backward"` or `"optimizer"`.
        module: The path of the module.
        file: The program's file.
        mark: A comment on the line, such as `# here`.
        tensor: The name of the entry of the batch, or the parameter.
        samples: The positions in the batch.
    """

    phase: str
    module: str
    file: str
    mark: str = "# here"
    tensor: str | None = None
    samples: list[int] | None = None

    @property
    def line(self) -> int:
        lines = Path(self.file).read_text().splitlines()
        [found] = [number for number, line in enumerate(lines, 1) if line.rstrip().endswith(self.mark)]
        return found


@dataclass
class Program:
    """One training run.

    Attributes:
        module: What is trained.
        data: The training batches.
        expected: Where it goes wrong; None if it does not.
        precision: Lightning's word; `"16-mixed"` is real fp16 on a CPU.
        loss_scale: The first, where there is a GradScaler.
        options: More for the Trainer.
    """

    module: pl.LightningModule
    data: Any
    expected: Expected | None = None
    precision: str = "32-true"
    loss_scale: float = 1024.0
    options: dict[str, Any] = field(default_factory=dict)


class Module(pl.LightningModule):
    """A LightningModule that is trained with AdamW."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(dataset: Dataset[Any] | list[Any], batch_size: int | None = 8) -> DataLoader[Any]:
    """The samples in their order."""
    return DataLoader(dataset, batch_size=batch_size)


def draw(seed: int, below: int) -> int:
    """A place drawn from a seed."""
    return int(torch.randint(below, (), generator=torch.Generator().manual_seed(100 + seed)))


def mlp(*sizes: int) -> torch.nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[torch.nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(into, out), torch.nn.GELU()]
    return torch.nn.Sequential(*layers[:-1])


__all__ = ["Expected", "Module", "Program", "Tensor", "draw", "loader", "mlp"]
