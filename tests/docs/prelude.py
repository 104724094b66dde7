"""What the pages' Python blocks find when they are run: `Trainer`, a small `model` and its `data`.

All blocks of a page run in one process and one empty folder, one after the other, with the names that they define.
`model` is new for each block. A `trainer` that a block makes and does not use is fitted after it, for two epochs unless
it says how long: that it can be made is not what the page promises.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

END_OF_BLOCK = "-- end of block --"


class Model(LightningModule):
    """Two layers, a training loss and a validation loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.head(self.encoder(batch[0])).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.head(self.encoder(batch[0])).pow(2).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Data(LightningDataModule):
    """Eight batches to train on, two to validate."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(32, 6)), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4)


def run(blocks: list[tuple[str, str]]) -> None:
    """Run the blocks of a page.

    Args:
        blocks: Where each stands, and its text.
    """
    names: dict[str, Any] = {"Trainer": Trainer, "data": Data()}
    for place, text in blocks:
        names.update(model=Model(), trainer=None)
        try:
            exec(compile(text, place, "exec"), names)
            trainer = names["trainer"]
            if trainer is not None and not trainer.state.finished:
                if trainer.max_epochs is None:
                    trainer.fit_loop.max_epochs = 2
                trainer.fit(names["model"], names["data"])
        except BaseException:
            print(f"{place} failed")
            traceback.print_exc()
            raise SystemExit(1) from None
        for stream in (sys.stdout, sys.stderr):
            print(END_OF_BLOCK, file=stream, flush=True)
