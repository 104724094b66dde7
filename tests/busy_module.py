"""A module whose training step writes to everything that it can reach, and a fit of it that tells all it has become."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

from tests import runs


class Rows(Dataset):
    """Batches are dictionaries, which the training step takes apart and writes into."""

    def __init__(self, scale: float = 1.0) -> None:
        self.x = scale * torch.randn(24, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index].clone(), "rest": {"label": index % 2}}


@dataclass
class Meter:
    """An object of the user's own."""

    count: int = 0
    seen: list[float] = field(default_factory=list)


class MaxNorm(nn.Linear):
    """Renormalises its weights in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.3))
        return super().forward(x)


def make_module(pl: Any, **overrides: Any) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), MaxNorm(8, 8)
            )
            self.head = nn.Linear(8, 1)
            self.teacher = nn.Linear(6, 8).requires_grad_(False)
            self.register_buffer("average", torch.zeros(8))
            self.mean, self.auroc = MeanMetric(), BinaryAUROC()
            self.scores = MetricCollection({"accuracy": BinaryAccuracy(), "auroc": BinaryAUROC()})
            self.steps, self.losses, self.by_class = 0, [], {0: [], 1: []}
            self.meter, self.recent, self.table = Meter(), torch.zeros(3), np.zeros(4)
            self.own_noise, self.own_numpy = torch.Generator().manual_seed(3), np.random.default_rng(4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, label = batch["x"], batch.pop("rest")["label"]
            x.mul_(1.0 + 0.01 * random.random() + 0.01 * np.random.rand() + 0.01 * self.own_numpy.random())
            x = x + 0.01 * torch.randn(x.shape, generator=self.own_noise).to(x)
            hidden = self.net(x)
            self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0).to(self.average)
            for slow, fast in zip(self.teacher.parameters(), self.net[0].parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
            out = self.head(hidden)[:, 0].float()
            loss = nn.functional.binary_cross_entropy_with_logits(out, label.float())
            probability = torch.sigmoid(out.detach())
            self.mean(loss.detach())
            self.auroc.update(probability, label)
            self.scores.update(probability, label)
            self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            self.steps += 1
            self.losses.append(loss.detach())
            self.by_class[int(label[0])].append(self.steps)
            self.meter.count += 1
            self.meter.seen.append(float(loss.detach()))
            self.recent[self.steps % 3] = loss.detach()
            self.table[self.steps % 4] += self.steps
            if self.steps == 1:
                self.first = label
                self.logger.log_metrics({"by_hand": float(loss.detach())}, step=0)
            return loss

        def on_train_epoch_end(self) -> None:
            self.log("auroc", self.auroc.compute().float())
            self.log_dict({f"score_{name}": value.float() for name, value in self.scores.compute().items()})
            self.auroc.reset()
            self.scores.reset()

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-2, eps=1e-4)

    for name, method in overrides.items():
        setattr(Module, name, method)
    return Module()


def fit(pl: Any, module: Any, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    """All that a fit leaves behind.

    Args:
        pl: The namespace.
        module: From `make_module`.
        callbacks: Of the Trainer.
        options: More of the Trainer's.
    """
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    logger = options.pop("logger", None) or runs.memory_logger(pl)
    trainer = runs.trainer(pl, callbacks=callbacks, logger=logger, **{"max_epochs": 2, **options})
    trainer.fit(module, DataLoader(Rows(), batch_size=4, shuffle=True))
    optimizer = trainer.optimizers[0]
    return {
        "weights": dict(module.state_dict()),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
        "rows": [row for row in getattr(logger, "rows", []) if not any(key.startswith("input/") for key in row[1])],
        "logged": sorted(trainer.fit_loop.epoch_loop._results),
        "callback_metrics": dict(trainer.callback_metrics),
        "random": [random.getstate(), *np.random.get_state(), torch.get_rng_state()],
        "own random": [module.own_noise.get_state(), module.own_numpy.bit_generator.state],
        "plain": [module.steps, module.losses, module.by_class, vars(module.meter), module.recent, module.table],
        "step": [trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx],
        "names": sorted(vars(module)),
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two results differ, to the bit; NaN equals NaN.

    Args:
        a: One result.
        b: The other.
        path: Where they are.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, 1e9), torch.nan_to_num(b, 1e9))
        return [] if same else [path]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b, equal_nan=True) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{path}: {sorted(map(str, a))} and {sorted(map(str, b))}"] if a.keys() != b.keys() else []
        return keys + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a} and {b}"]
