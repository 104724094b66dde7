"""What a program of the zoo is: a small training run that goes wrong at a known place, or only looks as if it would.

A file with `held_out = True` was written before anybody looked at how the diagnosis treats it, and no rule of the
diagnosis may be made with it: the published figures are of those programs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

WHERE = {
    "nonfinite_input": ("tensor", "samples"),
    "extreme_sample": ("tensor", "samples"),
    "input_scale": ("module", "tensor"),
    "fp16_overflow": ("module",),
    "undefined_operation": ("module", "line"),
    "undefined_gradient": ("module", "line"),
    "masked_attention": ("module", "samples"),
    "empty_reduction": ("module", "line"),
    "divergence": ("module", "tensor"),
    "nonfinite_weights": ("tensor",),
    "extreme_weights": ("tensor",),
    "optimizer_update": ("tensor", "option"),
    "compiled_code": ("module",),
    "transient": (),
}
"""For each cause, what says where it is."""


@dataclass
class Expected:
    """Where the first non-finite value is made.

    Attributes:
        phase: `"input"`, `"weights"`, `"forward"`, `"backward"` or `"optimizer"`.
        module: The path of the module; several, where the seed decides.
        file: The program's file.
        mark: A comment on the line, such as `# here`; empty where a replay is finite.
        tensor: The name of the entry of the batch, or the parameter.
        samples: The positions in the batch.
        cause: Why it goes wrong, in the words of the diagnosis: the right word, then those that a careful reader would
            accept as well.
        cause_module: The module at fault, where it is not the one above; several, where each of them would be right.
        cause_tensor: The entry of the batch, parameter or buffer at fault, likewise.
        cause_samples: The positions at fault, where the origin's operation does not show them.
        option: The optimizer's option at fault.
    """

    phase: str
    module: str | tuple[str, ...]
    file: str
    mark: str = "# here"
    tensor: str | None = None
    samples: list[int] | None = None
    cause: str | tuple[str, ...] = ()
    cause_module: str | tuple[str, ...] | None = None
    cause_tensor: str | tuple[str, ...] | None = None
    cause_samples: list[int] | None = None
    option: str | None = None

    @property
    def causes(self) -> tuple[str, ...]:
        return (self.cause,) if isinstance(self.cause, str) else self.cause

    def fault(self, word: str) -> dict[str, Any]:
        """Where a cause has to point to be right: some of `module`, `line`, `tensor`, `samples` and `option`."""
        module = self.module if self.cause_module is None else self.cause_module
        tensor = self.tensor if self.cause_tensor is None else self.cause_tensor
        samples = self.samples if self.cause_samples is None else self.cause_samples
        line = None if self.cause_module or not self.mark else self.line
        every = {"module": module, "line": line, "tensor": tensor, "samples": samples, "option": self.option}
        return {name: every[name] for name in WHERE[word] if every[name] is not None}

    def misplaced(self, word: str, said: dict[str, Any]) -> dict[str, Any]:
        """What a cause points to instead, as said and known."""
        known = self.fault(word)
        allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in known.items()}
        return {name: (said[name], value) for name, value in known.items() if said[name] not in allowed[name]}

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
