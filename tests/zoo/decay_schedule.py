"""The weight decay is moved from step to step by a schedule, in numpy, over 0 steps: 0 / 0, and it is NaN."""

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from tests.zoo.program import Expected, Program, draw, loader

held_out = True


class SelfDistillation(pl.LightningModule):
    def __init__(self, width=16, steps=0):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.GRU(4, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def on_train_batch_start(self, batch, batch_idx):
        with np.errstate(invalid="ignore", divide="ignore"):
            part = np.float64(self.global_step) / self.hparams.steps
        for group in self.optimizers().param_groups:
            group["weight_decay"] = float(0.4 - 0.36 * (1 + np.cos(np.pi * part)) / 2)

    def training_step(self, batch, batch_idx):
        x, label = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x)[1][0]), label)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)  # here


def program(seed):
    data = [(torch.randn(6, 4), torch.tensor(i % 2)) for i in range(16)]
    module = SelfDistillation(width=8 + draw(seed, 8))
    expected = Expected("optimizer", "encoder", __file__, cause="optimizer_update", option="weight_decay")
    return Program(module, loader(data), expected)
